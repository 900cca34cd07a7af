"""One try of a call and the time it has: what is given up, what is asked again, what is left behind."""

from __future__ import annotations

import socket
import threading
import time
from concurrent import futures

import grpc
import numpy as np
import pytest

import optwire
from optwire import _deadlines, _options, _payload, _rpc
from optwire import optimizers as opt
from optwire_proto import convert, digests, errors, sessions, trees
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import optimizer_pb2_grpc as pb_grpc
from optwire_server import testing

TREE = trees.TreeSpec((trees.LeafSpec("w", (4,), "f32"),))


@pytest.fixture
def channel(server: testing.Serving):
    channel = _rpc.Channel(_options.Options(target=server.target, timeout_s=10.0, transport=_options.Transport.STREAM))
    yield channel
    channel.close()


def test_a_push_without_memory_for_its_reply_ends_its_stream(channel: _rpc.Channel, server: testing.Serving):
    def no_memory(ack: sessions.Ack) -> _payload.Incoming:
        raise MemoryError(str(ack.step))

    with optwire.connect(server.target) as client:
        session = client.create_session({"w": np.zeros(4, np.float32)}, opt.sgd(0.1))
    key = sessions.PushKey(session_id=session.id, incarnation=1, worker="0" * 32, seq=1, base_step=0)
    stream = channel.open_stream()
    assert stream.is_open
    grads = _payload.Outgoing([np.ones(4, np.float32)])
    with pytest.raises(MemoryError, match="1"):
        stream.push(_deadlines.Deadline(10.0), key, sessions.PLAIN, grads, no_memory)
    assert not stream.is_open


class DamagedOnce(pb_grpc.OptimizerServiceServicer):
    """Answers a read with half of the bytes, then with all of them."""

    reads = 0

    def ReadParams(self, request, context):  # noqa: N802  gRPC's name
        self.reads += 1
        data = np.ones(4, np.float32).tobytes()
        yield pb.ReadParamsResponse(begin=pb.ParamsBegin())
        yield convert.chunk_into(pb.ReadParamsResponse(), 0, data[: 8 * self.reads])
        yield pb.ReadParamsResponse(end=pb.PayloadEnd(digest=convert.digest_to_proto(digests.digest(data))))


def serving(servicer: pb_grpc.OptimizerServiceServicer, calls_max: int | None = None) -> tuple[grpc.Server, str]:
    server = grpc.server(futures.ThreadPoolExecutor(2), maximum_concurrent_rpcs=calls_max)
    pb_grpc.add_OptimizerServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}"


def test_a_damaged_reply_is_asked_for_again():
    servicer = DamagedOnce()
    server, target = serving(servicer)
    channel = _rpc.Channel(_options.Options(target=target, timeout_s=10.0, transport=_options.Transport.AUTO))
    deadline = _deadlines.Deadline(10.0)
    (array,) = _deadlines.retried(
        lambda _: channel.read_params(
            deadline, id="0" * 32, worker="", epoch=0, incoming=_payload.Incoming(_payload.fresh(TREE)), which=""
        ),
        deadline,
        "params",
    )[2]
    assert array.tolist() == [1.0] * 4
    assert servicer.reads == 2
    channel.close()
    server.stop(None).wait()


def test_a_server_without_a_thread_for_the_call_refused_it():
    server, target = serving(pb_grpc.OptimizerServiceServicer(), calls_max=0)
    with optwire.connect(target, timeout=0.5) as client:
        with pytest.raises(optwire.LimitError, match=r"refused after \d+ tries .*Concurrent RPC limit") as caught:
            client.delete_session("x")
        assert "may or may not" not in str(caught.value)
    server.stop(None).wait()


def test_a_refusal_after_a_lost_try_says_that_the_outcome_is_unknown():
    def attempt(tries: int) -> None:
        if tries == 1:
            raise errors.UnavailableError("lost")
        raise errors.LimitError("full", subject="landing", expected="1", got="2", retry_after_s=0.01)

    with pytest.raises(errors.LimitError, match=r"push: refused after \d+ tries .*unknown; last: full") as caught:
        _deadlines.retried(attempt, _deadlines.Deadline(0.2), "push", "unknown")
    assert (caught.value.subject, caught.value.expected, caught.value.got) == ("landing", "1", "2")
    assert caught.value.retry_after_s == 0.01


def test_a_creation_has_a_second_more_for_every_10_leaves():
    silent = socket.create_server(("127.0.0.1", 0))
    client = optwire.connect(f"127.0.0.1:{silent.getsockname()[1]}", timeout=0.25)
    params = [np.zeros(1, np.float32)] * 5
    with silent, client, pytest.raises(optwire.DeadlineError, match=r"within 0\.75 s"):
        client.create_session(params, opt.sgd(0.1))


# ---------------------------------------------------------------------------------------------------- the watchdog


def watchers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "optwire-deadlines"}


def test_the_watchdog_ends_when_it_has_nothing_to_watch_and_starts_again():
    others = watchers()
    watchdog = _deadlines.Watchdog()
    for _ in range(2):
        with watchdog.watch(_deadlines.Deadline(60.0), lambda: None):
            (thread,) = watchers() - others
        thread.join(5.0)  # not after the minute that was watched
        assert not thread.is_alive()
    cancelled = threading.Event()
    with watchdog.watch(_deadlines.Deadline(0.05), cancelled.set):
        assert cancelled.wait(5.0)
    watchdog.close()


def test_the_watchdog_keeps_its_thread_over_many_short_watches():
    others, seen = watchers(), set()
    watchdog = _deadlines.Watchdog()
    end_s = time.monotonic() + 2.5
    while time.monotonic() < end_s:
        with watchdog.watch(_deadlines.Deadline(60.0), lambda: None):
            seen |= watchers() - others
    assert len(seen) == 1
    watchdog.close()
    assert watchers() <= others
