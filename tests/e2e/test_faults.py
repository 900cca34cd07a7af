"""Connections that break anywhere: every step is applied once and whole, and nothing is left behind."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest
from tests.e2e import proxy as proxies
from tests.e2e import wire
from tests.e2e.proxy import DOWN, UP

import optwire
from optwire import optimizers as opt
from optwire_proto import limits
from optwire_server import optimizers, testing

pytestmark = pytest.mark.usefixtures("no_error_is_logged")

RATE = 0.01
FRAMES = 5  # begin, 3 chunks, end; and ack, 3 chunks, end
POINTS = 12  # cuts at a byte, evenly spread, in each direction


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


class Local:
    """The same optimization in this process, undisturbed."""

    def __init__(self, params: Any) -> None:
        init, update, self._params = optimizers.adam(RATE)
        self._state = init(params)
        self._update = jax.jit(update)
        self.step = 0

    def push(self, grads: Any) -> Any:
        self._state = self._update(self.step, grads, self._state)
        self.step += 1
        return self.params()

    def params(self) -> Any:
        return jax.tree.map(np.asarray, self._params(self._state))


def assert_same(remote: Any, local: Any) -> None:
    assert remote.keys() == local.keys()
    for name in local:
        np.testing.assert_array_equal(np.asarray(remote[name]).view(np.uint8), local[name].view(np.uint8), strict=True)


class Road:
    """A session, a client that reaches it through a proxy, and the same run in this process."""

    def __init__(self, serving: testing.Serving, proxy: proxies.Proxy, elements: int, transport: str) -> None:
        self.server = serving.server
        self.proxy = proxy
        self._rng = np.random.default_rng(0)
        params = self.grads(elements)
        self.local = Local(params)
        self.client = optwire.connect(proxy.target, transport=transport, timeout=20)
        self.session = self.client.create_session(params, opt.adam(RATE), name=secrets.token_hex(4))

    def grads(self, elements: int | None = None) -> Any:
        elements = elements or self._size
        self._size = elements
        return {"b": normal(self._rng, 7), "w": normal(self._rng, elements - 7)}

    def step(self) -> None:
        """One step, which must succeed whatever happens on the way, and be the same as here."""
        grads = self.grads()
        params = self.session.step(grads)
        assert_same(params, self.local.push(grads))
        assert self.session.step_count == self.local.step == self.session.info().step
        ack = self.session.last_ack
        assert ack is not None
        assert (ack.applied_step, ack.step) == (self.local.step, self.local.step)


@pytest.fixture(scope="module")
def serving() -> Iterator[testing.Serving]:
    with testing.serve() as serving:
        before = proxies.threads()
        yield serving
        # All clients and proxies of this file are closed by now.
        wire.until(lambda: proxies.threads() <= before, f"threads ended of {proxies.threads() - before}")


def travelled(serving: testing.Serving, elements: int, transport: str) -> Iterator[Road]:
    with proxies.before(serving.target) as proxy:
        road = Road(serving, proxy, elements, transport)
        road.step()
        yield road
        road.step()  # whatever happened, the next step is like any other
        assert_same(road.session.params(), road.local.params())
        road.client.delete_session(road.session.name)
        road.client.close()
    wire.until(wire.idle(serving.server), "landing buffers and streams given back")


@pytest.fixture(scope="module")
def streamed(serving: testing.Serving) -> Iterator[Road]:
    elements = (2 * limits.CHUNK_BYTES + limits.CHUNK_BYTES // 2) // 4
    yield from travelled(serving, elements, "stream")


@pytest.fixture(scope="module")
def unary(serving: testing.Serving) -> Iterator[Road]:
    yield from travelled(serving, 4000, "unary")


@pytest.fixture(scope="module")
def whole(serving: testing.Serving) -> Iterator[Road]:
    """A small push, in one frame on a stream that stays open: of a server of its own."""
    with testing.serve() as own:
        yield from travelled(own, 4000, "stream")


def test_the_proxy_sees_the_frames_of_a_step(streamed: Road):
    streamed.step()
    before = dict(streamed.proxy.messages)
    grads = streamed.grads()
    assert_same(streamed.session.step(grads), streamed.local.push(grads))
    after = streamed.proxy.messages
    assert {way: after[way] - before[way] for way in (UP, DOWN)} == {UP: FRAMES, DOWN: FRAMES}


@pytest.mark.parametrize("act", ["reset", "close"])
@pytest.mark.parametrize("frame", range(FRAMES + 1))
@pytest.mark.parametrize("direction", [UP, DOWN])
def test_a_step_survives_a_cut_after_every_frame(streamed: Road, direction: str, frame: int, act: str):
    if frame == FRAMES:
        # After the last frame the step is done; the next one finds the connection cut.
        fault = streamed.proxy.fail(direction, messages=frame, act=act)
        streamed.step()
        assert fault.done.wait(5)
        streamed.step()
    else:
        streamed.session.info()  # opens the connection, so that only frames of the step are counted
        fault = streamed.proxy.fail(direction, messages=frame, act=act)
        streamed.step()
        assert fault.done.is_set()


@pytest.mark.parametrize("point", range(POINTS))
@pytest.mark.parametrize("direction", [UP, DOWN])
def test_a_step_survives_a_cut_at_any_byte(streamed: Road, direction: str, point: int):
    streamed.session.info()
    before = streamed.proxy.bytes[direction]
    grads = streamed.grads()
    assert_same(streamed.session.step(grads), streamed.local.push(grads))
    total = streamed.proxy.bytes[direction] - before
    fault = streamed.proxy.fail(direction, bytes=1 + (total - 2) * point // POINTS)
    streamed.step()
    assert fault.done.is_set()


@pytest.mark.parametrize("point", range(POINTS))
@pytest.mark.parametrize("direction", [UP, DOWN])
def test_a_unary_step_survives_a_cut_at_any_byte(unary: Road, direction: str, point: int):
    before = unary.proxy.bytes[direction]
    grads = unary.grads()
    assert_same(unary.session.step(grads), unary.local.push(grads))
    total = unary.proxy.bytes[direction] - before
    fault = unary.proxy.fail(direction, bytes=1 + (total - 2) * point // POINTS)
    unary.step()
    assert fault.done.is_set()


@pytest.mark.parametrize("point", range(POINTS))
@pytest.mark.parametrize("direction", [UP, DOWN])
def test_a_step_in_one_frame_survives_a_cut_at_any_byte(whole: Road, direction: str, point: int):
    whole.session.info()
    before, messages = whole.proxy.bytes[direction], dict(whole.proxy.messages)
    grads = whole.grads()
    assert_same(whole.session.step(grads), whole.local.push(grads))
    total = whole.proxy.bytes[direction] - before
    assert {way: whole.proxy.messages[way] - messages[way] for way in (UP, DOWN)} == {UP: 1, DOWN: 1}
    fault = whole.proxy.fail(direction, bytes=1 + (total - 2) * point // POINTS)
    whole.step()
    assert fault.done.is_set()


def test_a_step_survives_cut_after_cut(streamed: Road):
    for frame in (1, 3, 0, 4):
        streamed.proxy.fail(UP, messages=frame)
        streamed.step()
        streamed.proxy.fail(DOWN, messages=frame)
        streamed.step()


@pytest.mark.parametrize("frame", range(FRAMES))
def test_parameters_are_read_whole_whatever_is_cut(streamed: Road, frame: int):
    streamed.session.info()
    fault = streamed.proxy.fail(DOWN, messages=frame)
    assert_same(streamed.session.params(), streamed.local.params())
    assert fault.done.is_set()


@pytest.mark.parametrize(("direction", "frames"), [(UP, 3), (DOWN, 1)])
def test_a_creation_that_is_cut_makes_one_session(serving: testing.Serving, direction: str, frames: int):
    params = {"w": np.arange(1000, dtype=np.float32)}
    for frame in range(frames):
        with proxies.before(serving.target) as proxy, optwire.connect(proxy.target, timeout=20) as client:
            count = len(client.list_sessions())
            fault = proxy.fail(direction, messages=frame)
            session = client.create_session(params, opt.adam(RATE))
            assert fault.done.is_set()
            assert [info.step for info in client.list_sessions() if info.name == session.name] == [0]
            assert len(client.list_sessions()) == count + 1
            assert_same(session.params(), params)
            client.delete_session(session.name)
    wire.until(wire.idle(serving.server), "landing buffers and streams given back")


def test_a_deletion_whose_answer_is_lost_is_no_error(serving: testing.Serving):
    with proxies.before(serving.target) as proxy, optwire.connect(proxy.target, timeout=20) as client:
        client.create_session({"w": np.zeros(3, np.float32)}, opt.sgd(RATE), name="doomed")
        proxy.fail(DOWN, messages=0)
        client.delete_session("doomed")
        assert "doomed" not in [info.name for info in client.list_sessions()]


@pytest.mark.parametrize("direction", [UP, DOWN])
@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_a_push_of_unknown_outcome_is_found_out_by_the_next_call(
    serving: testing.Serving, direction: str, transport: str
):
    with (
        proxies.before(serving.target) as proxy,
        optwire.connect(proxy.target, transport=transport, timeout=1) as client,
    ):
        params = {"w": np.ones(50, np.float32)}
        local = Local(params)
        session = client.create_session(params, opt.adam(RATE))
        grads = {"w": np.full(50, 0.5, np.float32)}
        assert_same(session.step(grads), local.push(grads))
        fault = proxy.fail(direction, bytes=0, act="hold")
        with pytest.raises(optwire.DeadlineError):
            session.step(grads)
        assert fault.done.is_set()
        proxy.heal()
        assert_same(session.step(grads), local.push(grads))
        assert session.step_count == local.step == 2
        ack = session.last_ack
        assert ack is not None
        assert ack.duplicate == (direction == DOWN), "the push was applied where only its answer was lost"
        client.delete_session(session.name)


def test_many_clients_on_a_bad_network_lose_and_double_nothing(serving: testing.Serving):
    done = threading.Event()
    steps = 20

    def train(index: int) -> None:
        rng = np.random.default_rng(index)
        elements = (500, 20_000, 400_000)[index]
        transport = ("unary", "stream", "stream")[index]
        with optwire.connect(proxy.target, timeout=60, transport=transport) as client:
            params = {"w": normal(rng, elements)}
            local = Local(params)
            session = client.create_session(params, opt.adam(RATE))
            for _ in range(steps):
                grads = {"w": normal(rng, elements)}
                assert_same(session.step(grads), local.push(grads))
                assert session.last_ack is not None
                assert session.last_ack.applied_step == local.step
            assert session.info().step == steps
            client.delete_session(session.name)

    def disturb() -> int:
        rng = np.random.default_rng(9)
        faults = []
        while not done.wait(rng.uniform(0.01, 0.15)):
            direction = (UP, DOWN)[rng.integers(2)]
            faults.append(proxy.fail(direction, bytes=int(rng.integers(1, 10 ** rng.integers(1, 7)))))
        return sum(fault.done.is_set() for fault in faults)

    with proxies.before(serving.target) as proxy, ThreadPoolExecutor(4) as pool:
        disturber = pool.submit(disturb)
        try:
            list(pool.map(train, range(3)))
        finally:
            done.set()
        assert disturber.result(10) >= 3, "the network was too good"
    wire.until(wire.idle(serving.server), "landing buffers and streams given back")
