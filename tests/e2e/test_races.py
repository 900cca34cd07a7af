"""Pushes that come twice, late, at once or never end, and servers and clients that die: no step is lost or doubled."""

from __future__ import annotations

import contextlib
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from tests.e2e import wire
from tests.e2e.test_faults import RATE, Local, assert_same

import optwire
from optwire import optimizers as opt
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_server import testing

pytestmark = pytest.mark.usefixtures("no_error_is_logged")

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZE = 750_000  # elements: three chunks
BIG = {"w": np.linspace(-1, 1, SIZE, dtype=np.float32)}
GRADS = {"w": np.linspace(2, -3, SIZE, dtype=np.float32)}
OTHER = {"w": np.linspace(5, 1, SIZE, dtype=np.float32)}

# A client that sends a begin and a chunk, says so, and then nothing.
HALF = """
import sys, time
from tests.e2e import test_races, wire
peer = wire.Peer(sys.argv[1])
session = peer.stub.GetSession(wire.pb.GetSessionRequest(session=wire.named(sys.argv[2]))).session
def frames():
    yield wire.push(session, 1, session.step, worker="b" * 32)
    yield wire.tensor_pb.Chunk(offset=0, data=bytes(2**20))
    print("half", flush=True)
    time.sleep(600)
peer.stream(frames())
"""


@pytest.fixture
def serving() -> Iterator[testing.Serving]:
    with wire.served(stall_s=0.4) as serving:
        yield serving


def values(peer: wire.Peer, name: str) -> dict[str, np.ndarray]:
    return {"w": np.frombuffer(peer.read(name)[1], np.float32)}


class HalfPush:
    """A push under way from this process: a begin and one chunk are there, the rest comes when asked for."""

    def __init__(self, peer: wire.Peer, server: Any, begin: pb.PushBegin, payload: bytes) -> None:
        self._frames: queue.SimpleQueue[Any] = queue.SimpleQueue()
        first, *self._rest = wire.chunks(payload, 2**20)
        self._end = pb.PayloadEnd(digest=wire.digest(payload))
        for frame in (begin, first):
            self._frames.put(frame)
        self._pool = ThreadPoolExecutor(1)
        lent = server.registry._landings.lent_bytes
        self._reply = self._pool.submit(lambda: peer.stream(iter(self._frames.get, None)))
        wire.until(lambda: server.registry._landings.lent_bytes > lent, "the upload began")

    def finish(self) -> list[pb.StreamStepsResponse]:
        for frame in (*self._rest, self._end, None):
            self._frames.put(frame)
        try:
            return self._reply.result(20)
        finally:
            self._pool.shutdown()

    def outcome(self) -> wire.Failure | None:
        """What the call fails with though nothing more is sent."""
        failure = wire.Failure.of(lambda: self._reply.result(20))
        self._frames.put(None)
        self._pool.shutdown()
        return failure


def test_a_push_that_comes_twice_is_applied_once(peer: wire.Peer):
    session = peer.create(BIG, opt.adam(RATE), "twice")
    local = Local(BIG)
    push = wire.upload(wire.push(session, 1, 0), wire.payload_of(GRADS))
    frames = peer.stream(push, push)
    acks = [frame.ack for frame in frames if frame.HasField("ack")]
    assert [(ack.step, ack.applied_step, ack.duplicate) for ack in acks] == [(1, 1, False), (1, 1, True)]
    assert_same(values(peer, "twice"), local.push(GRADS))
    assert peer.read("twice")[0] == 1


def test_a_push_that_comes_twice_at_once_is_applied_once(serving: testing.Serving, peer: wire.Peer):
    session = peer.create(BIG, opt.adam(RATE), "at-once")
    local = Local(BIG)
    for step in range(5):
        payload = wire.payload_of(GRADS)
        tries = [HalfPush(peer, serving.server, wire.push(session, step + 1, step), payload) for _ in range(3)]
        with ThreadPoolExecutor(len(tries)) as pool:
            replies = list(pool.map(HalfPush.finish, tries))
        acks = [frames[0].ack for frames in replies]
        assert sorted(ack.duplicate for ack in acks) == [False, True, True]
        assert {ack.applied_step for ack in acks} == {step + 1}
        expected = wire.payload_of(local.push(GRADS))
        assert all(wire.params_of(frames) == expected for frames in replies)


def begin_of(params: Any, spec: Any, name: str, key: str) -> pb.CreateSessionBegin:
    tree = wire.convert.tree_to_proto(wire.trees.flatten(params).spec)
    return pb.CreateSessionBegin(name=name, tree=tree, spec=wire.convert.spec_to_proto(spec), create_key=key)


@pytest.mark.parametrize("name", ["chosen", ""])
def test_a_creation_that_comes_several_times_at_once_makes_one_session(peer: wire.Peer, name: str):
    payload = wire.payload_of(BIG)
    barrier = threading.Barrier(4)

    def create(key: str) -> str:
        def frames() -> Iterator[Any]:
            yield begin_of(BIG, opt.adam(RATE), name, key)
            yield from wire.chunks(payload, 2**20)
            barrier.wait(10)
            yield pb.PayloadEnd(digest=wire.digest(payload))

        return peer.create_from(frames()).id

    with ThreadPoolExecutor(4) as pool:
        for number in range(5):
            ids = set(pool.map(create, [f"{number:032x}"] * 4))
            assert len(ids) == 1
            listed = peer.stub.ListSessions(pb.ListSessionsRequest(), timeout=wire.TIMEOUT_S).sessions
            assert [session.id for session in listed] == [*ids]
            peer.stub.DeleteSession(
                pb.DeleteSessionRequest(session=pb.SessionRef(id=ids.pop())), timeout=wire.TIMEOUT_S
            )


def test_of_different_creations_of_one_name_one_wins(peer: wire.Peer):
    def create(key: str) -> str:
        failure = wire.Failure.of(lambda: peer.create(BIG, opt.adam(RATE), "name", key))
        return failure.code if failure else "created"

    with ThreadPoolExecutor(3) as pool:
        outcomes = sorted(pool.map(create, ["1" * 32, "2" * 32, "3" * 32]))
    assert outcomes == ["ALREADY_EXISTS", "ALREADY_EXISTS", "created"]


@pytest.mark.parametrize("change", ["spec", "tree", "name"])
def test_a_create_key_stands_for_one_request(peer: wire.Peer, change: str):
    key, small = "e" * 32, {"w": np.zeros(3, np.float32)}
    first = peer.create(small, opt.adam(RATE), "first", key)
    assert peer.create(small, opt.adam(RATE), "first", key).id == first.id
    other = {"params": small, "spec": opt.adam(RATE), "name": "first"} | {
        "spec": {"spec": opt.adam(2 * RATE)},
        "tree": {"params": {"v": np.zeros(3, np.float32)}},
        "name": {"name": "second"},
    }[change]
    failure = wire.Failure.of(lambda: peer.create(**other, key=key))
    assert failure is not None
    assert (failure.code, "create_key was used for session 'first'" in failure.message) == ("ALREADY_EXISTS", True)


def test_pushes_in_the_wrong_order_are_refused_until_their_turn(peer: wire.Peer):
    session = peer.create(BIG, opt.adam(RATE), "order")
    local = Local(BIG)
    first = wire.upload(wire.push(session, 1, 0), wire.payload_of(GRADS))
    second = wire.upload(wire.push(session, 2, 1), wire.payload_of(OTHER))
    third = wire.upload(wire.push(session, 3, 2), wire.payload_of(GRADS))
    early = wire.Failure.of(lambda: peer.stream(second))
    assert early is not None
    assert early.code == "FAILED_PRECONDITION"
    peer.stream(first)
    assert wire.Failure.of(lambda: peer.stream(third)) is not None
    peer.stream(second)
    late = wire.Failure.of(lambda: peer.stream(first))
    assert late is not None
    assert late.detail is not None
    assert late.detail.reason == "STALE_PUSH"
    peer.stream(third)
    for grads in (GRADS, OTHER, GRADS):
        local.push(grads)
    assert_same(values(peer, "order"), local.params())


def test_of_two_clients_that_race_for_a_step_one_wins_and_both_go_on(serving: testing.Serving):
    small = {"w": np.linspace(-1, 1, 100, dtype=np.float32)}
    with optwire.connect(serving.target) as one, optwire.connect(serving.target, transport="stream") as two:
        handles = [one.create_session(small, opt.adam(RATE), name="race"), two.attach("race")]
        mine = [{"w": np.full(100, 1.0 + index, np.float32)} for index in range(2)]
        local = Local(small)
        wins = [0, 0]
        barrier = threading.Barrier(2)

        def run(index: int) -> int | None:
            """The step that the session is said to be at where another was faster; None where this client won."""
            handles[index].params()
            barrier.wait(10)
            try:
                handles[index].step(mine[index])
            except optwire.StaleStepError as exc:
                return exc.step
            return None

        with ThreadPoolExecutor(2) as pool:
            for _ in range(40):
                told = list(pool.map(run, range(2)))
                assert set(told) == {None, local.step + 1}
                winner = told.index(None)
                wins[winner] += 1
                local.push(mine[winner])
        assert_same(one.attach("race").params(), local.params())
        assert handles[0].info().step == sum(wins) == 40


def test_a_session_deleted_during_an_upload_takes_nothing_more(serving: testing.Serving, peer: wire.Peer):
    session = peer.create(BIG, opt.adam(RATE), "doomed")
    half = HalfPush(peer, serving.server, wire.push(session, 1, 0), wire.payload_of(GRADS))
    peer.stub.DeleteSession(pb.DeleteSessionRequest(session=wire.named("doomed")), timeout=wire.TIMEOUT_S)
    failure = wire.Failure.of(half.finish)
    assert failure is not None
    assert failure.code == "NOT_FOUND"
    wire.until(wire.idle(serving.server), "the upload's buffer given back")
    peer.create(BIG, opt.adam(RATE), "doomed")
    assert peer.read("doomed")[0] == 0


def test_a_step_taken_during_an_upload_makes_it_stale(serving: testing.Serving, peer: wire.Peer):
    session = peer.create(BIG, opt.adam(RATE), "overtaken")
    half = HalfPush(peer, serving.server, wire.push(session, 1, 0), wire.payload_of(GRADS))
    peer.stream(wire.upload(wire.push(session, 1, 0, worker="c" * 32), wire.payload_of(OTHER)))
    failure = wire.Failure.of(half.finish)
    assert failure is not None
    assert failure.detail is not None
    assert (failure.detail.reason, failure.detail.step) == ("STALE_STEP", 1)
    assert_same(values(peer, "overtaken"), Local(BIG).push(OTHER))


def test_an_upload_that_stalls_is_given_up(serving: testing.Serving, peer: wire.Peer):
    session = peer.create(BIG, opt.adam(RATE), "stalled")
    half = HalfPush(peer, serving.server, wire.push(session, 1, 0), wire.payload_of(GRADS))
    failure = half.outcome()
    assert failure is not None
    assert failure.code in ("CANCELLED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
    wire.until(wire.idle(serving.server), "the upload's buffer given back")
    assert peer.read("stalled")[0] == 0


def test_a_creation_that_stalls_is_given_up(serving: testing.Serving, peer: wire.Peer):
    never: queue.SimpleQueue[Any] = queue.SimpleQueue()
    begin = begin_of(BIG, opt.adam(RATE), "stalled", "d" * 32)
    never.put(begin)
    started = time.monotonic()
    failure = wire.Failure.of(lambda: peer.create_from(iter(never.get, None)))
    assert failure is not None
    never.put(None)
    assert time.monotonic() - started < wire.TIMEOUT_S / 2, "kept its buffer for as long as the client pleased"
    wire.until(wire.idle(serving.server), "the upload's buffer given back")


def test_creations_that_never_begin_keep_no_threads(peer: wire.Peer, serving: testing.Serving):
    never: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(lambda: wire.Failure.of(lambda: peer.create_from(iter(never.get, None))))
        wire.until(lambda: len(serving.server.streams) == 1, "the call is counted", timeout_s=3.0)
        never.put(None)
        assert call.result(20) is not None


def test_a_reply_that_is_read_slowly_is_not_given_up(serving: testing.Serving, peer: wire.Peer):
    size = 8 * 2**20
    params = {"w": np.zeros(size, np.float32)}
    session = peer.create(params, opt.sgd(1.0), "slow")
    payload = wire.payload_of(params)
    frames = wire.upload(wire.push(session, 1, 0), payload)
    requests = (pb.StreamStepsRequest(**{wire._field(frame): frame}) for frame in frames)
    received = b""
    for frame in peer.stub.StreamSteps(requests, timeout=30):
        time.sleep(0.05)  # 34 frames: about 1.7 s, four times stall_s
        received += frame.chunk.data
    assert received == payload


@contextlib.contextmanager
def half_a_push(target: str, name: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that has begun a push on a session, and does not go on."""
    process = subprocess.Popen([sys.executable, "-c", HALF, target, name], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_client_that_dies_during_its_upload_leaves_nothing(number: signal.Signals):
    # A killed client's connection ends at once; a stopped one's stays, and the upload is given up when it stalls.
    with testing.serve(stall_s=60.0 if number is signal.SIGKILL else 2.0) as serving:
        peer = wire.Peer(serving.target)
        session = peer.create(BIG, opt.adam(RATE), "left")
        local = Local(BIG)
        with half_a_push(serving.target, "left") as process:
            wire.until(lambda: serving.server.registry._landings.lent_bytes > 0, "the upload began")
            process.send_signal(number)
            wire.until(wire.idle(serving.server), "the dead client's buffer given back")
            frames = peer.stream(wire.upload(wire.push(session, 1, 0), wire.payload_of(GRADS)))
            assert wire.params_of(frames) == wire.payload_of(local.push(GRADS))
        assert peer.read("left")[0] == 1
        peer.close()
