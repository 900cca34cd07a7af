"""Workers as handles: when they join, how long they are waited for, what comes of late and weighted gradients."""

from __future__ import annotations

import gc
import secrets
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from tests.e2e import proxy as proxies
from tests.e2e import wire

import optwire
from optwire import optimizers as opt
from optwire_proto import sessions
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_server import config as configs
from optwire_server import testing

pytestmark = pytest.mark.usefixtures("no_error_is_logged")

LEASE_S = 1.0
MORE_S = 4.0
FLOAT = np.float32
State = sessions.WorkerState


@pytest.fixture(scope="module")
def serving() -> Iterator[testing.Serving]:
    with wire.served() as serving:
        yield serving


@pytest.fixture
def client(serving: testing.Serving) -> Iterator[optwire.Client]:
    with optwire.connect(serving.target, timeout=20) as client:
        yield client


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def filled(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full(5, value, FLOAT)}


def created(client: optwire.Client, aggregation: str | None, **options: Any) -> optwire.Session:
    return client.create_session(
        filled(0.0), opt.sgd(1.0), name=secrets.token_hex(4), aggregation=aggregation, **options
    )


def states(session: optwire.Session) -> dict[int, sessions.WorkerInfo]:
    return {int(worker.worker, 16): worker for worker in session.workers()}


def beating() -> set[threading.Thread]:
    """Threads that renew leases."""
    return {thread for thread in threading.enumerate() if thread.name == "optwire-heartbeat"}


# ------------------------------------------------------------------------------------------------------- who joins


def test_a_rank_joins_at_once_and_leaves_when_it_is_closed(client: optwire.Client) -> None:
    session = created(client, "sync(3)", worker=0)
    one = client.attach(session.name, worker=1)
    assert [(w.epoch, w.state, w.is_awaited) for w in session.workers()] == [
        (1, State.LIVE, True),
        (1, State.LIVE, True),
        (0, State.EXPECTED, True),
    ]
    one.close()
    one.close()
    assert states(session)[1].state is State.LEFT
    assert not states(session)[1].is_awaited
    again = client.attach(session.name, worker=1)
    assert (states(session)[1].epoch, states(session)[1].state) == (2, State.LIVE)
    again.close()


def test_who_reads_or_only_creates_is_nobody_that_is_waited_for(client: optwire.Client) -> None:
    first = created(client, "sync(2)")
    first.params()
    first.close()
    with client.attach(first.name) as reader:
        reader.params()
        assert [(w.epoch, w.state, w.is_awaited) for w in reader.workers()] == [(0, State.EXPECTED, True)] * 2
        with pytest.raises(optwire.InvalidArgumentError, match="expected one of the workers 0 to 1"):
            reader.step(filled(1.0))
    elastic = created(client, "quorum(1, 4)")
    with client.attach(elastic.name) as reader:
        reader.params()
        assert elastic.workers() == reader.workers() == ()
        np.testing.assert_array_equal(elastic.step(filled(1.0))["w"], filled(-1.0)["w"])
        (worker,) = reader.workers()
        assert (worker.epoch, worker.state, worker.seq, worker.base_step) == (1, State.LIVE, 1, 1)


def test_nobody_joins_a_session_of_single_steps(client: optwire.Client) -> None:
    before = beating()
    session = created(client, None, worker=3)
    session.step(filled(1.0))
    assert session.workers() == ()
    assert beating() <= before


def test_a_rank_that_the_session_has_not_is_refused(client: optwire.Client) -> None:
    name = created(client, "k_of_n(1, 2)").name
    with pytest.raises(optwire.InvalidArgumentError, match="worker: 2, expected a rank from 0 to 1"):
        client.attach(name, worker=2)
    quorum = created(client, "quorum(1, 2)", worker=7)
    client.attach(quorum.name, worker=900)
    with pytest.raises(optwire.LimitError, match="2 workers are there"):
        client.attach(quorum.name, worker=0)


def test_a_client_that_is_closed_leaves_for_all_its_handles(serving: testing.Serving, client: optwire.Client) -> None:
    session = created(client, "sync(3)", worker=0)
    with optwire.connect(serving.target, timeout=20) as other:
        other.attach(session.name, worker=1)  # nobody holds it
        kept = other.attach(session.name, worker=2)
        gc.collect()
    found = states(session)
    assert found[2].state is State.LEFT
    assert kept.step_count == 0
    np.testing.assert_array_equal(session.params()["w"], filled(0.0)["w"])


def test_a_handle_says_whom_it_waits_for_while_it_waits(client: optwire.Client, pool: ThreadPoolExecutor) -> None:
    session = created(client, "sync(3)", worker=0)
    one = client.attach(session.name, worker=1)
    waiting = pool.submit(session.step, filled(1.0))
    wire.until(lambda: states(session)[0].has_pushed, "it waits")
    assert [(w.has_pushed, w.is_awaited) for w in session.workers()] == [(True, False), (False, True), (False, True)]
    done = pool.submit(one.step, filled(1.0))
    wire.until(lambda: states(session)[1].has_pushed, "so does the other")
    assert [w.is_awaited for w in session.workers()] == [False, False, True]
    client.attach(session.name, worker=2).step(filled(1.0))
    assert waiting.result(10) is not None
    assert done.result(10) is not None
    session.close()
    with pytest.raises(optwire.DetachedError):
        session.workers()


# ----------------------------------------------------------------------------------------------------- heartbeats


def test_heartbeats_end_with_the_handle_even_if_nobody_closes_it(client: optwire.Client) -> None:
    session = created(client, f"sync(2, lease_s={LEASE_S})", worker=0)
    before = beating()
    handle = client.attach(session.name, worker=1)
    (thread,) = beating() - before
    gone = weakref.ref(handle)
    del handle
    gc.collect()
    assert gone() is None
    wire.until(lambda: not thread.is_alive(), "the thread has ended")
    wire.until(lambda: states(session)[1].state is State.LOST, "the lease is over", LEASE_S + MORE_S)
    assert states(session)[0].state is State.LIVE


def test_a_lease_that_lasts_for_ever_has_no_heartbeats(client: optwire.Client) -> None:
    before = beating()
    created(client, "sync(2, lease_s=inf)", worker=0)
    assert beating() <= before


def test_a_connection_that_is_lost_for_a_while_costs_nobody_the_lease(
    serving: testing.Serving, client: optwire.Client
) -> None:
    session = created(client, f"sync(2, lease_s={4 * LEASE_S})", worker=0)
    with proxies.before(serving.target) as proxy, optwire.connect(proxy.target, timeout=20) as far:
        handle = far.attach(session.name, worker=1)
        for _ in range(3):
            proxy.cut()
            joined_s = time.monotonic()
            wire.until(lambda: states(session)[1].silent_s < 0.3, "heard of again", 4 * LEASE_S)
            assert time.monotonic() - joined_s < 4 * LEASE_S
        assert states(session)[1].state is State.LIVE
        handle.close()
        far.close()


def test_a_handle_outlives_a_server_that_is_restarted_and_says_what_was_lost() -> None:
    with testing.serve() as first:
        port, before = first.target.rpartition(":")[2], beating()
        client = optwire.connect(first.target, timeout=20)
        session = created(client, f"sync(1, lease_s={LEASE_S})", worker=0)
        session.step(filled(1.0))
        (thread,) = beating() - before
    with testing.serve(listen=(f"127.0.0.1:{port}",)):
        wire.until(lambda: not thread.is_alive(), "no heartbeat for a session that is gone", MORE_S)
        with pytest.raises(optwire.SessionNotFoundError):
            session.step(filled(1.0))
        again = client.create_session(
            session_params(client), opt.sgd(1.0), name=session.name, aggregation="sync(1)", worker=0
        )
        np.testing.assert_array_equal(again.step(filled(1.0))["w"], filled(-2.0)["w"])
        session.close()
        client.close()


def session_params(client: optwire.Client) -> dict[str, np.ndarray]:
    """What a worker has of the session that its server lost."""
    assert client.list_sessions() == []
    return filled(-1.0)


# ------------------------------------------------------------------------------------------------- late, weighted


def test_gradients_that_come_too_late_can_be_dropped_for_the_newest_parameters(client: optwire.Client) -> None:
    fast = created(client, "k_of_n(1, 2)", worker=0)
    slow = client.attach(fast.name, worker=1)
    fast.step(filled(1.0))
    fast.step(filled(1.0))
    with pytest.raises(optwire.StepClosedError, match="2") as caught:
        slow.step(filled(5.0))
    assert (caught.value.step, slow.late_count) == (2, 0)
    out = filled(0.0)
    assert slow.step(filled(5.0), late="params", out=out) is out
    np.testing.assert_array_equal(out["w"], filled(-2.0)["w"])
    assert (slow.late_count, slow.step_count, slow.last_ack) == (1, 2, None)
    fast.step(filled(1.0))
    assert slow.step(filled(5.0), late="params", reply="none") is None
    assert slow.late_count == 2
    slow.params()
    np.testing.assert_array_equal(slow.step(filled(5.0), late="params")["w"], filled(-8.0)["w"])
    assert (slow.late_count, slow.step_count) == (2, 4)
    future = slow.step_async(filled(5.0), base_step=0, late="params")
    np.testing.assert_array_equal(future.result(10)["w"], filled(-8.0)["w"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"late": "drop"}, "late: 'drop', expected 'raise' or 'params'"),
        ({"late": "params", "reply": "updates"}, "late: 'params', expected 'raise' with reply='updates'"),
        ({"weight": 0.0}, "weight: 0.0, expected a number from 1e-12 to 1e[+]12"),
        ({"weight": -1}, "weight: -1, expected a number from"),
        ({"weight": 2e-38}, "weight: 2e-38, expected a number from"),
        ({"weight": float("nan")}, "weight: nan, expected a finite number"),
        ({"weight": True}, "weight: True, expected a finite number"),
        ({"weight": 3e38}, "weight: 3e[+]38, expected a number from"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(client: optwire.Client, options: dict[str, Any], match: str) -> None:
    session = created(client, None)
    with pytest.raises(optwire.InvalidArgumentError, match=match):
        session.step(filled(1.0), **options)
    assert session.info().step == 0


def test_the_mean_is_weighted_by_what_each_worker_says(client: optwire.Client, pool: ThreadPoolExecutor) -> None:
    rng = np.random.default_rng(0)
    grads = [{"w": rng.standard_normal(5, FLOAT)} for _ in range(3)]
    weights = [FLOAT(3), FLOAT(0.5), FLOAT(7)]
    first = created(client, "sync(3)", worker=0)
    handles = [first, *(client.attach(first.name, worker=rank) for rank in (1, 2))]
    done = [
        pool.submit(handle.step, grad, weight=weight)
        for handle, grad, weight in zip(handles, grads, weights, strict=True)
    ]
    expected = -sum(w * g["w"].astype(np.float64) for w, g in zip(weights, grads, strict=True)) / 10.5
    for future in done:
        np.testing.assert_allclose(future.result(10)["w"], expected, rtol=1e-6)


def test_a_retry_with_another_weight_is_another_push(client: optwire.Client) -> None:
    session = created(client, "async")
    session.step(filled(1.0), weight=2.0)
    session._seq -= 1  # as if the answer had been lost
    with pytest.raises(optwire.DivergentRetryError, match="weight"):
        session.step(filled(1.0), 0, weight=3.0)
    np.testing.assert_array_equal(session.step(filled(1.0), 0, weight=2.0)["w"], filled(-1.0)["w"])
    assert session.info().step == 1


# ------------------------------------------------------------------------------------------------- by hand, at launch


def test_a_join_that_is_sent_again_gets_the_same_epoch(client: optwire.Client, peer: wire.Peer) -> None:
    name = created(client, "sync(2, lease_s=7)").name
    request = pb.JoinSessionRequest(session=wire.named(name), worker=sessions.worker_id(1), join_key="b" * 32)
    first, again = peer.stub.JoinSession(request), peer.stub.JoinSession(request)
    assert (first.epoch, again.epoch, first.lease_s, first.worker_seq) == (1, 1, 7.0, 0)
    assert first.session.name == name
    beat = pb.HeartbeatRequest(session_id=first.session.id, worker=request.worker, epoch=1)
    heard = peer.stub.Heartbeat(beat)
    assert (heard.step, heard.incarnation, list(heard.awaited)) == (0, 1, [sessions.worker_id(r) for r in (0, 1)])
    request.join_key = "c" * 32
    assert peer.stub.JoinSession(request).epoch == 2
    failure = wire.Failure.of(lambda: peer.stub.Heartbeat(beat))
    assert failure
    assert failure.detail
    assert (failure.code, failure.detail.reason) == ("FAILED_PRECONDITION", "REPLACED")
    leave = pb.LeaveSessionRequest(session_id=first.session.id, worker=request.worker, epoch=1)
    failure = wire.Failure.of(lambda: peer.stub.LeaveSession(leave))
    assert failure
    assert failure.detail
    assert failure.detail.reason == "REPLACED"
    leave.epoch = 2
    peer.stub.LeaveSession(leave)
    peer.stub.LeaveSession(leave)


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("JoinSession", pb.JoinSessionRequest(session=wire.named("x"), worker="0" * 32, join_key="1")),
        ("JoinSession", pb.JoinSessionRequest(session=wire.named("x"), worker="0", join_key="1" * 32)),
        ("JoinSession", pb.JoinSessionRequest(worker="0" * 32, join_key="1" * 32)),
        ("Heartbeat", pb.HeartbeatRequest(session_id="x", worker="0" * 32)),
        ("Heartbeat", pb.HeartbeatRequest(session_id="0" * 32)),
        ("LeaveSession", pb.LeaveSessionRequest(session_id="x", worker="0" * 32)),
        ("LeaveSession", pb.LeaveSessionRequest(session_id="0" * 32)),
    ],
    ids=str,
)
def test_ids_that_are_none_are_refused_by_name(peer: wire.Peer, method: str, request_: Any) -> None:
    failure = wire.Failure.of(lambda: getattr(peer.stub, method)(request_))
    assert failure
    assert failure.code == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    "request_",
    [
        pb.JoinSessionRequest(session=wire.named("x"), worker="0" * 32, join_key="1" * 32),
        pb.HeartbeatRequest(session_id="f" * 32, worker="0" * 32, epoch=1),
        pb.LeaveSessionRequest(session_id="f" * 32, worker="0" * 32, epoch=1),
    ],
    ids=str,
)
def test_a_session_that_is_none_is_not_found(peer: wire.Peer, request_: Any) -> None:
    method = type(request_).__name__.removesuffix("Request")
    failure = wire.Failure.of(lambda: getattr(peer.stub, method)(request_))
    assert failure
    assert failure.code == "NOT_FOUND"


def test_a_server_may_have_an_aggregation_of_its_own_for_sessions_that_ask_for_none() -> None:
    flags = configs.parser().parse_args(["serve", "--aggregation", "sync(2, lease_s=9)"])
    asked = configs.from_flags(flags).aggregation
    with wire.served(aggregation=asked) as serving, optwire.connect(serving.target, timeout=20) as client:
        session = created(client, None)
        assert str(session.info().aggregation) == "sync(2, lease_s=9)"
        assert [worker.state for worker in session.workers()] == [State.EXPECTED] * 2
        one = client.attach(session.name, worker=1)
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(session.step, filled(1.0))
            np.testing.assert_array_equal(one.step(filled(3.0))["w"], filled(-2.0)["w"])
            assert future.result(10) is not None
        single = created(client, "single")
        assert str(single.info().aggregation) == "single"
        np.testing.assert_array_equal(single.step(filled(1.0))["w"], filled(-1.0)["w"])
        extended = client.create_session(filled(0.0), opt.sgd(1.0), extends=single)
        assert str(extended.info().aggregation) == "single"


def test_an_aggregation_that_is_none_does_not_start_a_server() -> None:
    command = [sys.executable, "-m", "optwire_server", "serve", "--aggregation", "sync(x)", "--listen", "127.0.0.1:0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 64
    assert "optwire serve: aggregation 'sync(x)': expected" in done.stderr
