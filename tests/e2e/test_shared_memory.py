"""Shared memory: the same bits and the same promises as by stream, and nothing left behind or given away."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gc
import json
import os
import pathlib
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from tests.e2e import proxy as proxies
from tests.e2e import wire
from tests.e2e.proxy import DOWN, UP

import optwire
import optwire.jax
from optwire import _deadlines, _options, _shared, optax
from optwire import optimizers as opt
from optwire_proto import convert, handover, sessions, trees
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_server import optimizers, testing

RATE = 0.01
SHAPES = {"a": (7,), "b": (3, 5, 1001), "c": (), "empty": (0, 4), "z": (70_001,)}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory is handed over on Linux")


def tree(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape, np.float32)) for name, shape in SHAPES.items()}


class Local:
    """The same optimization in this process."""

    def __init__(self, params: Any, rate: float = RATE) -> None:
        init, update, self._params = optimizers.adam(rate)
        self._state = init(params)
        self._update = jax.jit(update)
        self._step = 0

    def push(self, grads: Any) -> Any:
        self._state = self._update(self._step, grads, self._state)
        self._step += 1
        return self.params()

    def params(self) -> Any:
        return jax.tree.map(np.asarray, self._params(self._state))


def assert_same(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for name in other:
        mine, theirs = np.asarray(one[name]), np.asarray(other[name])
        assert mine.shape == theirs.shape
        np.testing.assert_array_equal(mine.reshape(-1).view(np.uint8), theirs.reshape(-1).view(np.uint8))


@pytest.fixture(scope="module")
def serving() -> Iterator[testing.Serving]:
    with testing.serve() as serving:
        yield serving


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "serving" in request.fixturenames:
        server = request.getfixturevalue("serving").server
        wire.until(lambda: held(server) == (0, 0, 0), f"segments are let go of: {held(server)}")


def held(server: Any) -> tuple[int, int, int]:
    segments = server.registry.segments
    return len(segments), segments.shared_bytes, server.handover.connections


@contextlib.contextmanager
def connected(target: str, transport: str = "shared_memory", **options: Any) -> Iterator[optwire.Client]:
    with optwire.connect(target, transport=transport, **{"timeout": 20, **options}) as client:
        yield client


def test_steps_have_the_bits_of_a_stream_and_of_a_local_optimizer(serving: testing.Serving) -> None:
    params, local = tree(0), Local(tree(0))
    with connected(serving.target) as shared, connected(serving.target, "stream") as streamed:
        one = shared.create_session(params, opt.adam(RATE))
        other = streamed.create_session(params, opt.adam(RATE))
        buffers, out = one.grad_buffers(), one.param_buffers()
        for index in range(6):
            grads = tree(index + 1)
            expected = local.push(grads)
            assert_same(other.step(grads), expected)
            if index % 3 == 0:
                mine = one.step(grads)
            elif index % 3 == 1:
                mine = one.step(grads, out=out)
                assert mine is out
            else:
                for name, grad in grads.items():
                    buffers[name][...] = grad
                mine = one.step(buffers, out=out)
                assert_same(buffers, grads)  # nobody writes over them
            assert_same(mine, expected)
        assert_same(one.params(), local.params())
        info = one.info()
        assert (info.transport, other.info().transport) == ("shared_memory", "stream")
        assert serving.server.handover.path in info.transport_reason


def test_buffers_lie_on_boundaries_and_can_be_swapped(serving: testing.Serving) -> None:
    params = {"a": np.zeros(1001, np.float32), "b": np.zeros(1001, np.float32)}
    with connected(serving.target) as client:
        session = client.create_session(params, opt.sgd(1.0))
        buffers = session.grad_buffers()
        assert buffers["a"].ctypes.data % 64 == 0
        assert buffers["a"] is not buffers["b"]
        buffers["a"][...], buffers["b"][...] = 1.0, 2.0
        # Each where the other belongs: neither may be written over before it is read.
        views = session.param_buffers()
        out = session.step({"a": buffers["b"], "b": buffers["a"]}, out=views)
        assert (out["a"] == -2.0).all()
        assert (out["b"] == -1.0).all()
        assert (buffers["a"] == 1.0).all()
        assert (buffers["b"] == 2.0).all()
        # Parameters as gradients: they lie in the segment, too.
        assert (session.step(views)["a"] == 0.0).all()
        with pytest.raises(optwire.InvalidArgumentError, match="share memory"):
            session.step(views, out=views)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "complex64"])
def test_every_element_type_goes_through(serving: testing.Serving, dtype: str) -> None:
    rng = np.random.default_rng(3)
    dt = np.dtype(jax.numpy.dtype(dtype))
    params, grads = ({"w": rng.standard_normal(1003).astype(dt), "x": np.ones(3, np.float32)} for _ in range(2))
    with connected(serving.target) as shared, connected(serving.target, "stream") as streamed:
        one, other = (each.create_session(params, opt.momentum(0.5, 0.9)) for each in (shared, streamed))
        for _ in range(2):
            assert_same(one.step(grads), other.step(grads))
        buffers = one.grad_buffers()
        assert buffers["w"].dtype == dt
        buffers["w"][...], buffers["x"][...] = grads["w"], grads["x"]
        assert_same(one.step(buffers, out=one.param_buffers()), other.step(grads))


def test_whatever_a_push_may_say_it_may_say_by_shared_memory(serving: testing.Serving) -> None:
    spec = opt.per_leaf(opt.adam(RATE))
    with connected(serving.target) as shared, connected(serving.target, "stream") as streamed:
        one, other = (each.create_session(tree(0), spec) for each in (shared, streamed))
        for index, wish in enumerate(
            (
                {"reply": "updates"},
                {"reply": "none"},
                {"telemetry": True, "grad_scale": 4.0},
                {"hyperparams": {"learning_rate": 0.5}},
                {"reply": "updates", "absent": True},
                {"absent": True},
                {},
            )
        ):
            grads: dict[str, Any] = dict(tree(index + 1))
            if wish.pop("absent", False):
                grads["b"] = None
            mine, theirs = one.step(grads, **wish), other.step(grads, **wish)
            if theirs is None:
                assert mine is None
            else:
                assert_same(mine, theirs)
            assert one.last_ack.metrics == other.last_ack.metrics
        assert_same(one.params(), other.params())


def test_small_sessions_do_not_bother(serving: testing.Serving) -> None:
    with connected(serving.target, "auto") as client:
        small = client.create_session({"w": np.ones(5, np.float32)}, opt.sgd(0.1))
        small.step({"w": np.ones(5, np.float32)})
        assert small.info().transport != "shared_memory"
        assert "20 bytes" in small.info().transport_reason
        large = client.create_session(tree(0), opt.sgd(0.1))
        assert large.info().transport == "auto"
        large.step(tree(1))
        assert large.info().transport == "shared_memory"


# ------------------------------------------------------------------------------------------------------- promises


class Road:
    """A session whose messages pass a proxy; memory is shared past it."""

    def __init__(self, proxy: proxies.Proxy, timeout: float = 20) -> None:
        self.proxy = proxy
        self.client = optwire.connect(proxy.target, transport="shared_memory", timeout=timeout)
        self.session = self.client.create_session(tree(0), opt.adam(RATE), name=secrets.token_hex(4))
        self.local = Local(tree(0))
        self.step(1)

    def step(self, seed: int) -> None:
        assert_same(self.session.step(tree(seed)), self.local.push(tree(seed)))
        assert self.session.step_count == self.session.info().step == self.local._step

    def lose_an_answer(self, seed: int, act: str = "hold", grads: Any = None) -> None:
        """The push arrives, its answer does not, and the caller is told so."""
        fault = self.proxy.fail(DOWN, messages=0, act=act)
        hurry(self.session, self.proxy.target)
        with pytest.raises(optwire.DeadlineError if act == "hold" else optwire.InternalError):
            self.session.step(tree(seed) if grads is None else grads)
        assert fault.done.is_set()
        self.proxy.heal()
        self.session._options = self.client._options


def hurry(session: Any, target: str) -> None:
    """From now on the session waits for half a second only."""
    session._options = dataclasses.replace(session._options, target=target, timeout_s=0.5)


@pytest.fixture
def road(serving: testing.Serving) -> Iterator[Road]:
    with proxies.before(serving.target) as proxy:
        road = Road(proxy)
        with road.client:
            yield road
            road.step(1000)  # whatever happened, the next step is like any other
            assert road.session.info().transport == "shared_memory"


def test_a_push_is_one_small_message_each_way(road: Road) -> None:
    messages, count = dict(road.proxy.messages), dict(road.proxy.bytes)
    road.session.step(tree(2))
    road.local.push(tree(2))
    assert {way: road.proxy.messages[way] - messages[way] for way in (UP, DOWN)} == {UP: 1, DOWN: 1}
    assert max(road.proxy.bytes[way] - count[way] for way in (UP, DOWN)) < 500


@pytest.mark.parametrize("direction", [UP, DOWN])
@pytest.mark.parametrize("act", ["reset", "close"])
def test_a_step_survives_a_cut_before_and_after_its_message(road: Road, direction: str, act: str) -> None:
    for messages in (0, 1):
        road.session.info()
        fault = road.proxy.fail(direction, messages=messages, act=act)
        road.step(2 + messages)
        road.session.info()
        assert fault.done.wait(5)


def test_the_same_gradients_again_are_the_same_push(road: Road) -> None:
    road.lose_an_answer(2)
    assert not road.session._route.sharing._segment.is_in_use  # it was taken back when the answer was given up
    road.step(2)
    assert road.session.last_ack.duplicate


def test_an_error_of_somebody_between_is_no_answer(road: Road) -> None:
    """A proxy that ends the call does so in words that a server has as well."""
    road.lose_an_answer(2, act="end")
    road.step(2)
    assert road.session.last_ack.duplicate


def test_whoever_interrupts_twice_may_push_again(serving: testing.Serving, road: Road) -> None:
    """The first Ctrl-C ends the push, the second one the wait for the server to be done with the memory."""
    segment = road.session._route.sharing._segment
    claim = serving.server.registry.segments.claim(segment.slot, key_of(road.session))
    fault = road.proxy.fail(DOWN, messages=0, act="hold")

    def press() -> None:
        assert fault.done.wait(10)
        os.kill(os.getpid(), signal.SIGINT)
        wire.until(lambda: segment._asked, "the memory is asked for")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    # A shell that runs the tests in the background has them ignore it.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with claim.using():
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                road.session.step(tree(2))
            thread.join()
    finally:
        signal.signal(signal.SIGINT, usual)
    assert segment.is_in_use  # it was not waited for
    road.proxy.heal()
    road.step(2)
    assert road.session.last_ack.duplicate
    assert not segment.is_in_use


@pytest.mark.parametrize("transport", ["shared_memory", "auto", "stream"])
def test_the_buffers_are_the_users_alone(serving: testing.Serving, transport: str) -> None:
    with connected(serving.target, transport) as client:
        session = client.create_session(tree(0), opt.sgd(1.0))
        session.step(tree(1))
        buffers = session.grad_buffers()
        assert_same(buffers, {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()})
        for name, grad in tree(2).items():
            buffers[name][...] = grad
        for index in range(3):
            before = session.params()
            other = tree(3 + index)
            assert_same(session.step(other), {name: before[name] - other[name] for name in SHAPES})
            assert_same(buffers, tree(2))
        mixed = {**tree(9), "z": buffers["z"]}
        before = session.params()
        assert_same(session.step(mixed), {name: before[name] - mixed[name] for name in SHAPES})
        assert_same(buffers, tree(2))
        before = session.params()
        assert_same(session.step(buffers), {name: before[name] - tree(2)[name] for name in SHAPES})
        assert held(serving.server)[0] == (0 if transport == "stream" else 2)


@pytest.mark.parametrize("first", ["buffers", "others"])
def test_a_push_made_again_from_other_memory_is_the_same_push(road: Road, first: str) -> None:
    buffers = road.session.grad_buffers()
    for name, grad in tree(2).items():
        buffers[name][...] = grad
    road.lose_an_answer(2, grads=buffers if first == "buffers" else None)
    assert_same(road.session.step(tree(2) if first == "buffers" else buffers), road.local.push(tree(2)))
    assert road.session.last_ack.duplicate
    assert_same(buffers, tree(2))


def test_without_room_beside_the_buffers_other_gradients_go_by_stream() -> None:
    one = trees.flatten(tree(0)).spec.payload_bytes * 3
    with testing.serve(shared_bytes_max=one) as serving:
        for transport in ("auto", "shared_memory"):
            with connected(serving.target, transport) as client:
                session = client.create_session(tree(0), opt.sgd(1.0))
                buffers = session.grad_buffers()
                for name, grad in tree(1).items():
                    buffers[name][...] = grad
                if transport == "auto":
                    session.step(tree(2))
                else:
                    with pytest.raises(optwire.UnsupportedError, match=r"beside grad_buffers\(\).*bytes"):
                        session.step(tree(2))
                assert_same(buffers, tree(1))
                session.step(buffers, out=session.param_buffers())
                assert session.info().transport == "shared_memory"
            wire.until(lambda: held(serving.server) == (0, 0, 0), "closing lets go of it")


def test_a_client_closed_during_a_push_takes_its_memory_back_first(serving: testing.Serving, road: Road) -> None:
    client = optwire.connect(road.proxy.target, transport="shared_memory", timeout=20)
    session = client.attach(road.session.name)
    session.step(tree(2))
    road.local.push(tree(2))
    road.session.params()
    segment = session._route.sharing._segment
    claim = serving.server.registry.segments.claim(segment.slot, key_of(session))
    fault = road.proxy.fail(DOWN, messages=0, act="hold")
    failures: list[BaseException] = []

    def push() -> None:
        try:
            session.step(tree(3))
        except optwire.OptwireError as exc:
            failures.append(exc)

    thread = threading.Thread(target=push)
    with claim.using():
        thread.start()
        assert fault.done.wait(10)
        wire.until(lambda: segment.is_in_use, "the push is under way")  # what was held may be a late frame of another
        client.close()
        wire.until(lambda: segment._asked, "the memory is asked for")
        assert segment.is_in_use
    thread.join(10)
    assert isinstance(failures[0], optwire.DetachedError)
    assert not segment.is_in_use
    road.proxy.heal()
    road.local.push(tree(3))
    road.session.params()


def test_the_same_gradients_in_the_buffers_are_the_same_push_too(road: Road) -> None:
    buffers = road.session.grad_buffers()
    road.lose_an_answer(2)
    for name, grad in tree(2).items():
        buffers[name][...] = grad
    assert_same(road.session.step(buffers), road.local.push(tree(2)))
    assert road.session.last_ack.duplicate


def test_other_gradients_after_a_lost_answer_are_refused(road: Road) -> None:
    road.lose_an_answer(2)
    with pytest.raises(optwire.DivergentRetryError):
        road.session.step(tree(3))
    road.local.push(tree(2))
    assert_same(road.session.params(), road.local.params())
    assert road.session.step_count == 2


def test_an_answer_given_up_never_touches_the_memory_again(serving: testing.Serving, road: Road) -> None:
    """The push waits for the device; its caller gives up, and writes other gradients: they are not applied with it."""
    engine, began, go = serving.server.engine, threading.Event(), threading.Event()
    live = serving.server.registry._table.by_name[road.session.name]

    def occupy() -> None:
        began.set()
        go.wait(20)

    thread = threading.Thread(target=lambda: engine.run(occupy, live.held))
    thread.start()
    began.wait(10)
    buffers = road.session.grad_buffers()
    hurry(road.session, road.proxy.target)
    for name, grad in tree(2).items():
        buffers[name][...] = grad
    with pytest.raises(optwire.DeadlineError):
        road.session.step(buffers)
    for grad in buffers.values():
        grad[...] = np.nan
    go.set()
    thread.join()
    engine.run(lambda: None, live.held)
    road.session._options = road.client._options
    assert road.session.info().step == 1  # it was not applied
    road.step(2)


def test_a_push_of_a_server_that_is_gone_ends_and_the_buffers_stay() -> None:
    with testing.serve() as serving, contextlib.ExitStack() as stack:
        client = stack.enter_context(connected(serving.target))
        session = client.create_session(tree(0), opt.adam(RATE))
        session.step(tree(1), out=session.param_buffers())
        kept, grads, path = session.param_buffers(), session.grad_buffers(), pathlib.Path(serving.server.handover.path)
        before = {name: array.copy() for name, array in kept.items()}
        assert path.exists()
        serving.server.stop()
        hurry(session, serving.target)
        assert not path.exists()
        assert not path.parent.exists()
        with pytest.raises(optwire.UnavailableError):
            session.step(tree(2))
        assert_same(kept, before)
        session.grad_buffers()["z"][...] = 3.0
        assert grads["z"][0] == 3.0


def test_a_server_that_came_back_knows_neither_session_nor_segment() -> None:
    with testing.serve() as serving:
        target = serving.target
        client = optwire.connect(target, transport="shared_memory", timeout=20)
        session = client.create_session(tree(0), opt.adam(RATE), name="before")
        session.step(tree(1))
    with client, testing.serve(listen=(target,)) as serving:
        with pytest.raises(optwire.SessionNotFoundError):
            session.step(tree(2))
        again = client.create_session(tree(0), opt.adam(RATE))
        assert_same(again.step(tree(1)), Local(tree(0)).push(tree(1)))
        assert again.info().transport == "shared_memory"
        assert serving.server.handover.path in again.info().transport_reason


def test_a_lost_connection_and_a_lost_answer_together_apply_a_push_once(serving: testing.Serving, road: Road) -> None:
    """The second try lies in another segment, under the token of the first."""
    fault = road.proxy.fail(DOWN, messages=0, act="hold")
    stop = threading.Event()

    live = serving.server.registry._table.by_name[road.session.name]

    def cut() -> None:
        wire.until(lambda: live.machine.step == 2 and fault.done.is_set(), "the push is applied")
        road.session._route.sharing._segment._connection.send(b"\xff" * 8)
        wire.until(lambda: serving.server.handover.connections == 0, "the connection has ended")
        road.proxy.heal()
        stop.set()

    thread = threading.Thread(target=cut)
    thread.start()
    grads = tree(2)
    assert_same(road.session.step(grads), road.local.push(grads))
    thread.join()
    assert stop.is_set()
    assert road.session.last_ack.duplicate
    assert road.session.info().step == 2


def test_a_slot_is_good_for_its_session_and_worker_only(serving: testing.Serving) -> None:
    with connected(serving.target) as client, contextlib.closing(wire.Peer(serving.target)) as peer:
        one, other = (client.create_session(tree(0), opt.adam(RATE)) for _ in range(2))
        for session in (one, other):
            session.step(tree(1))
        slot = one._route.sharing._segment.slot
        length = trees.flatten(tree(0)).spec.payload_bytes
        digest = convert.digest_to_proto(sessions.Digest(length, token=secrets.token_bytes(16)))

        def push(session: Any, slot: int, **changes: Any) -> wire.Failure | None:
            begin = convert.push_to_proto(dataclasses.replace(key_of(session), **changes))
            request = pb.StepRequest(begin=convert.slot_into(begin, slot), digest=digest)
            return wire.Failure.of(lambda: peer.stub.Step(request, timeout=10))

        for failure in (push(other, slot), push(one, slot, worker="b" * 32), push(one, slot + 1000)):
            assert failure is not None
            assert failure.code == "INVALID_ARGUMENT"
            assert "shared_memory_slot" in failure.message
        failure = push(one, slot, incarnation=7)
        assert failure is not None
        assert failure.detail.reason == "WRONG_INCARNATION"
        digest.length += 4
        failure = push(one, slot)
        assert failure is not None
        assert failure.detail.reason == "INVALID_PAYLOAD"
        digest.length -= 4
        assert push(one, slot) is None  # and this one is right


def test_a_loaded_state_changes_nothing_about_the_memory(serving: testing.Serving) -> None:
    with connected(serving.target) as client:
        session = client.create_session(tree(0), opt.adam(RATE))
        session.step(tree(1))
        state = session.state()
        expected = {name: array.copy() for name, array in session.step(tree(2)).items()}
        session.load_state(state)
        assert_same(session.step(tree(2)), expected)
        assert session.info().transport == "shared_memory"
        assert session.info().incarnation == 2


# ------------------------------------------------------------------------------------------------------ several workers


def test_the_mean_of_several_workers_leaves_their_gradients_alone(serving: testing.Serving) -> None:
    with connected(serving.target) as client, connected(serving.target, "stream") as streamed:
        handles = [client.create_session(tree(0), opt.adam(RATE), name="two", aggregation="sync(2)", worker=0)]
        handles.append(client.attach("two", worker=1))
        other = [streamed.create_session(tree(0), opt.adam(RATE), name="two-streamed", aggregation="sync(2)", worker=0)]
        other.append(streamed.attach("two-streamed", worker=1))
        for step in range(3):
            grads = [tree(10 * step + rank) for rank in range(2)]
            for handle, mine in zip(handles, grads, strict=True):
                for name, buffer in handle.grad_buffers().items():
                    buffer[...] = mine[name]
            replies = together([lambda h=h: h.step(h.grad_buffers(), out=h.param_buffers()) for h in handles])
            expected = together([lambda h=h, g=g: h.step(g) for h, g in zip(other, grads, strict=True)])
            for handle, mine, reply, right in zip(handles, grads, replies, expected, strict=True):
                assert_same(reply, right)
                assert_same(handle.grad_buffers(), mine)
        for name in ("two", "two-streamed"):
            client.delete_session(name)


def test_a_gathered_push_is_what_was_pushed_whatever_its_client_writes_then(serving: testing.Serving) -> None:
    with connected(serving.target) as client:
        first = client.create_session(tree(0), opt.sgd(1.0), name="gathered", aggregation="sync(2)", worker=0)
        second = client.attach("gathered", worker=1)
        buffers = first.grad_buffers()
        for name, grad in tree(1).items():
            buffers[name][...] = grad
        hurry(first, serving.target)
        with pytest.raises(optwire.DeadlineError):
            first.step(buffers)  # gathered, and nobody waits for it any more
        for grad in buffers.values():
            grad[...] = 7.0
        out = second.step(tree(1))
        assert_same(out, {name: tree(0)[name] - tree(1)[name] for name in SHAPES})
        client.delete_session("gathered")


_WAITING = """
import sys, numpy as np, optwire
client = optwire.connect(sys.argv[1], transport="shared_memory", timeout=60)
session = client.attach("killed", worker=1)
buffers = session.grad_buffers()
for buffer in buffers.values():
    buffer[...] = 3.0
session.step(buffers)
"""


def test_what_a_killed_process_had_pushed_counts_and_its_memory_is_let_go_of(serving: testing.Serving) -> None:
    with connected(serving.target) as client:
        first = client.create_session(tree(0), opt.sgd(1.0), name="killed", aggregation="sync(2)", worker=0)
        process = subprocess.Popen([sys.executable, "-c", _WAITING, serving.target])
        try:
            wire.until(lambda: any(worker.has_pushed for worker in first.workers()), "a push waits")
        finally:
            process.kill()
            process.wait(10)
        out = first.step({name: np.ones(shape, np.float32) for name, shape in SHAPES.items()})
        assert_same(out, {name: np.asarray(tree(0)[name] - np.float32(2)) for name in SHAPES})
        client.delete_session("killed")


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


# ------------------------------------------------------------------------------------------------------- bad neighbours


def test_who_scribbles_during_an_update_hurts_only_its_own_session(serving: testing.Serving) -> None:
    """Clipping reads gradients twice, and what it reads lies beside padding. No other session may notice."""
    spec = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE))
    with connected(serving.target) as client:
        bad, good = (client.create_session(tree(0), spec, name=name) for name in ("bad", "good"))
        right = client.create_session(tree(0), spec, name="right")
        bad.step(tree(1))
        whole = np.frombuffer(bad.grad_buffers()["z"].base, np.uint8)
        over = threading.Event()

        def scribble() -> None:
            noise = np.random.default_rng(9)
            while not over.is_set():
                whole[...] = noise.integers(0, 256, whole.size, np.uint8)
                whole[...] = 255  # NaN wherever it is read as a number

        thread = threading.Thread(target=scribble)
        thread.start()
        try:
            for step in range(20):
                bad.step(bad.grad_buffers(), out=bad.param_buffers())
                mine = good.step(tree(step))
        finally:
            over.set()
            thread.join()
        for step in range(20):
            expected = right.step(tree(step))
        assert_same(mine, expected)
        for name in ("bad", "good", "right"):
            client.delete_session(name)


def test_what_lies_beside_the_leaves_counts_for_nothing(serving: testing.Serving) -> None:
    spec = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE))
    with connected(serving.target) as client, connected(serving.target, "stream") as streamed:
        one, other = (each.create_session(tree(0), spec) for each in (client, streamed))
        one.step(tree(1)), other.step(tree(1))
        whole = np.frombuffer(one.grad_buffers()["z"].base, np.uint8)
        for step in range(3):
            whole[...] = 255  # not a number, in all of the segment
            mine = one.step(tree(step), telemetry=True)
            theirs = other.step(tree(step), telemetry=True)
            assert_same(mine, theirs)
            assert one.last_ack.metrics == other.last_ack.metrics


def test_a_program_of_the_clients_own_never_reads_what_its_client_can_write_to() -> None:
    def sgd(step: Any, rate: Any, grad: Any, param: Any) -> Any:
        return param - rate * grad

    spec = opt.exported(optwire.jax.export_update(sgd, slots=0), 0.5)
    with testing.serve(allow_programs=True, landing_bytes_max=5_000_000) as serving:
        params = {"w": np.ones(100_000, np.float32)}
        with connected(serving.target) as client:
            session = client.create_session(params, spec)
            assert (session.step(params)["w"] == 0.5).all()
            slot = session._route.sharing._segment.slot
            with serving.server.registry.pushing(key_of(session), slot=slot) as push:
                assert push.claim is not None
                assert not np.shares_memory(push.landing.memory, push.claim.grads)


def key_of(session: Any) -> sessions.PushKey:
    return sessions.PushKey(
        session_id=session.id, incarnation=1, worker=session._worker, seq=session._seq + 1, base_step=session.step_count
    )


def test_a_segment_can_neither_shrink_nor_grow_nor_be_unsealed(serving: testing.Serving) -> None:
    with connected(serving.target) as client:
        session = client.create_session(tree(0), opt.adam(RATE))
        with asked(serving, session) as (grant, file):
            assert os.fstat(file).st_size == grant.nbytes
            for size in (0, grant.nbytes // 2, grant.nbytes + 4096):
                with pytest.raises(PermissionError):
                    os.ftruncate(file, size)
            with pytest.raises(PermissionError):
                fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
            sealed = fcntl.fcntl(file, fcntl.F_GET_SEALS)
            assert sealed == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            assert not os.get_inheritable(file)


@contextlib.contextmanager
def asked(serving: testing.Serving, session: Any) -> Iterator[tuple[handover.Grant, int]]:
    """A segment asked for by hand."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(serving.server.handover.path)
        handover.send(connection, handover.Request(session.id, "c" * 32).to_json(), 5)
        files: list[int] = []
        grant = handover.Grant.from_json(handover.receive(connection, 10**6, 5, files=files))
        try:
            yield grant, files[0]
        finally:
            for file in files:
                os.close(file)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\0\0",
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", 2**31),
        struct.pack(">I", 5000) + b"x" * 5000,
        struct.pack(">I", 3) + b"{]}",
        struct.pack(">I", 2) + b"[]",
        struct.pack(">I", 2) + b"{}",
        struct.pack(">I", 4) + b"\xff\xfe\xfd\xfc",
        b"[" * 4000,
        struct.pack(">I", 4000) + b"[" * 4000,
        *(
            struct.pack(">I", len(body)) + body
            for message in (
                {"session": "x", "worker": "c" * 32},
                {"session": "a" * 32, "worker": "c" * 32},
                {"session": ["a"], "worker": None},
                {"session": "a" * 32, "worker": "c" * 32, "path": "/dev/shm/mine"},
                {"quiet": True},
            )
            for body in (json.dumps(message).encode(),)
        ),
    ],
)
def test_whatever_is_said_on_the_socket_the_server_goes_on(serving: testing.Serving, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect(serving.server.handover.path)
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
        if answer:
            assert "refused" in json.loads(answer[4:])
    with connected(serving.target) as client:
        client.create_session(tree(0), opt.sgd(0.1)).step(tree(1))


def test_what_a_client_says_later_can_only_end_its_own_connection(serving: testing.Serving) -> None:
    with connected(serving.target) as client:
        session = client.create_session(tree(0), opt.adam(RATE))
        session.step(tree(1))
        local, buffers = Local(tree(0)), session.grad_buffers()
        local.push(tree(1))
        for index, words in enumerate((struct.pack(">I", 3) + b"???", b"\xff" * 8, struct.pack(">I", 2) + b"{}")):
            session._route.sharing._segment._connection.sendall(words)
            wire.until(lambda: serving.server.handover.connections == 0, "the connection has ended")
            for name, grad in tree(index + 2).items():
                buffers[name][...] = grad
            assert_same(session.step(buffers), local.push(tree(index + 2)))  # another segment was handed over
            assert session.info().transport == "shared_memory"


def test_who_says_nothing_keeps_nobody_waiting(serving: testing.Serving) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            silent = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            silent.connect(serving.server.handover.path)
            silent.sendall(b"\0")
        with connected(serving.target) as client:
            client.create_session(tree(0), opt.sgd(0.1)).step(tree(1))


def test_a_server_that_hands_nothing_over_takes_no_more_than_the_deadline(tmp_path: pathlib.Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        spec = trees.flatten(tree(0)).spec
        sharing = _shared.Sharing(_options.Transport.AUTO, "a" * 32, "b" * 32, spec, lambda _: str(tmp_path / "silent"))
        start_s = time.monotonic()
        assert sharing.segment(_deadlines.Deadline(0.5)) is None
        assert time.monotonic() - start_s < 2
        assert "in time" in sharing.reason


def test_without_room_for_a_thread_one_client_is_refused_and_the_next_is_not(serving: testing.Serving) -> None:
    usual = threading.stack_size(2**46)  # more than any address space has
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(serving.server.handover.path)
            answer = handover.receive(connection, 10_000, 10)
    finally:
        threading.stack_size(usual)
    assert "thread" in answer["refused"]
    with connected(serving.target) as client:
        client.create_session(tree(0), opt.sgd(0.1)).step(tree(1))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused_and_told_why(tmp_path: pathlib.Path) -> None:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o111)
    with testing.serve(handover_dir=str(tmp_path)) as serving:
        path = serving.server.handover.path
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert "Permission denied" in as_nobody(path)
        os.chmod(path, 0o666)
        assert "is of user 65534; this server shares memory with user 0 only" in as_nobody(path)
        wire.until(lambda: held(serving.server) == (0, 0, 0), "nothing was handed over")


def as_nobody(path: str) -> str:
    """What the socket answers to another user."""
    program = f"""
import os, socket
os.setgid(65534); os.setuid(65534)
s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
try:
    s.connect({path!r}); s.settimeout(10); print(s.recv(4096))
except OSError as exc:
    print(exc)
"""
    return subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=60).stdout


# ------------------------------------------------------------------------------------------------------- limits, ends


def test_what_does_not_fit_goes_by_stream_and_says_why() -> None:
    with testing.serve(shared_bytes_max=1_000_000, shared_segments_max=2) as serving:
        with connected(serving.target, "auto") as client:
            sessions = [client.create_session(tree(0), opt.adam(RATE)) for _ in range(2)]
            for session in sessions:
                session.step(tree(1))
            first, second = (session.info() for session in sessions)
            assert first.transport == "shared_memory"
            assert second.transport == "stream"
            assert "1000000 bytes of shared memory are in use" in second.transport_reason
            sessions[0].close()
            wire.until(lambda: held(serving.server) == (0, 0, 0), "the first is let go of")
            third = client.attach(sessions[1].name)
            third.step(tree(2), base_step=1)
            assert third.info().transport == "shared_memory"
        wire.until(lambda: held(serving.server) == (0, 0, 0), "closing the client lets go of all")
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                stack.enter_context(socket.socket(socket.AF_UNIX)).connect(serving.server.handover.path)
            wire.until(lambda: serving.server.handover.connections == 2, "the server is full")
            with connected(serving.target) as client, pytest.raises(optwire.UnsupportedError, match="2 segments"):
                client.create_session(tree(0), opt.adam(RATE)).step(tree(1))


@pytest.mark.parametrize("config", [{"handover_dir": "none"}, {"handover_dir": "there"}])
def test_without_shared_memory_a_client_says_why(config: dict[str, Any], tmp_path: pathlib.Path) -> None:
    if config["handover_dir"] == "there":
        config = {"handover_dir": str(tmp_path)}
    with testing.serve(**config) as serving:
        if serving.server.handover is None:
            reason = "the server shares no memory"
            assert "shared_memory" not in optwire.connect(serving.target).server_info().features
        else:  # as in another container: the server is there, its folder is not
            os.rename(serving.server.handover.path, tmp_path / "elsewhere")
            reason = "no socket of the server at"
        with connected(serving.target, "auto") as client:
            session = client.create_session(tree(0), opt.adam(RATE))
            assert_same(session.step(tree(1)), Local(tree(0)).push(tree(1)))
            assert session.info().transport == "stream"
            assert reason in session.info().transport_reason
        with connected(serving.target) as client, pytest.raises(optwire.UnsupportedError, match=reason):
            client.create_session(tree(0), opt.adam(RATE)).step(tree(1))


def test_a_folder_that_cannot_be_is_said_at_the_start(tmp_path: pathlib.Path) -> None:
    with pytest.raises(OSError, match="No such file"), testing.serve(handover_dir=str(tmp_path / "missing")):
        pass
    with pytest.raises(OSError, match="too long"), testing.serve(handover_dir=str(tmp_path / ("x" * 120))):
        pass


def test_a_socket_that_cannot_get_its_name_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: "taken")
    (tmp_path / "taken.handover").mkdir()  # nothing can be renamed to it
    with pytest.raises(OSError, match="directory"), testing.serve(handover_dir=str(tmp_path)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["taken.handover"]


def test_beside_a_unix_address_the_socket_is_in_its_folder_and_dead_ones_are_cleared(tmp_path: pathlib.Path) -> None:
    dead, somebodys = tmp_path / "0badf00d.handover", tmp_path / "notes.handover"
    somebodys.write_text("no socket")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(dead))
    with testing.serve(listen=(f"unix:{tmp_path}/grpc",)) as serving:
        assert pathlib.Path(serving.server.handover.path).parent == tmp_path
        assert not dead.exists()
        assert somebodys.read_text() == "no socket"
        with testing.serve(handover_dir=str(tmp_path)) as beside:  # and living ones are not
            assert os.path.exists(serving.server.handover.path)
            assert os.path.exists(beside.server.handover.path)
        with connected(serving.target) as client:
            client.create_session(tree(0), opt.adam(RATE)).step(tree(1))
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".handover") == ["notes.handover"]


def test_two_hundred_handles_leave_nothing(serving: testing.Serving) -> None:
    with connected(serving.target) as client:
        session = client.create_session(tree(0), opt.sgd(0.1), name="many")
        session.step(tree(1))

        for index in range(200):
            with client.attach("many") as handle:
                handle.step(tree(index), base_step=index + 1, reply="none")
            if index == 10:
                wire.until(lambda: held(serving.server)[0] == 1, "all but the first are let go of")
                early, _ = count()
        wire.until(lambda: held(serving.server)[0] == 1, "all but the first are let go of")
        files, mapped = count()
        assert mapped == 2  # one segment, by client and server
        assert files <= early + 2
        client.delete_session("many")


def count() -> tuple[int, int]:
    """Open files of this process, and segments mapped, twice if both ends are in it."""
    gc.collect()  # JAX lets go of memory that it adopted when it next has something to do, or now
    maps = pathlib.Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("memfd:optwire")


def test_views_outlive_their_handle(serving: testing.Serving) -> None:
    with connected(serving.target) as client:
        session = client.create_session(tree(0), opt.adam(RATE))
        views, grads = session.param_buffers(), session.grad_buffers()
        session.step(tree(1), out=views)
        kept = {name: view.copy() for name, view in views.items()}
        session.close()
        wire.until(lambda: held(serving.server) == (0, 0, 0), "the server has let go of it")
        assert_same(views, kept)
        grads["z"][...] = 5.0
        with pytest.raises(optwire.DetachedError):
            session.step(grads)


CLIENT = """
import sys, time, numpy as np, optwire
from optwire import optimizers as opt
client = optwire.connect(sys.argv[1], transport="shared_memory")
session = client.create_session({"w": np.zeros(100_000, np.float32)}, opt.sgd(1.0), name="killed")
session.step({"w": np.ones(100_000, np.float32)})
print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_client_leaves_nothing(serving: testing.Serving) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT, serving.target], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        assert held(serving.server)[0] == 1
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    wire.until(lambda: held(serving.server) == (0, 0, 0), "its segment is let go of")
    assert count()[1] == 0
    with connected(serving.target) as client:
        session = client.attach("killed")
        assert (session.step({"w": np.ones(100_000, np.float32)})["w"] == -2.0).all()
        client.delete_session("killed")


FORKING = """
import os, sys, numpy as np, optwire
from optwire import optimizers as opt
client = optwire.connect(sys.argv[1], transport="shared_memory", timeout=5)
session = client.create_session({"w": np.zeros(100_000, np.float32)}, opt.sgd(1.0))
ones = {"w": np.ones(100_000, np.float32)}
session.step(ones)
mine = session.grad_buffers()["w"]
child = os.fork()
if child == 0:
    session.grad_buffers()["w"][...] = session.param_buffers()["w"][...] = 77
    try:
        session._route.way(session._deadline())
    except optwire.UnsupportedError as exc:
        os._exit(7 if "forked" in str(exc) else 8)
    os._exit(9)
print(mine[0], end=" ")
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), session.step(ones)["w"][0], session.info().transport)
"""


def test_a_forked_process_does_not_write_to_the_memory_of_its_parent(serving: testing.Serving) -> None:
    """Nor does it take it away."""
    command = [sys.executable, "-c", FORKING, serving.target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "0.0 7 -2.0 shared_memory\n", done.stderr
