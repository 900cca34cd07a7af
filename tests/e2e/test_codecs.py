"""Codecs with a real server: what the session computes, what clients have, and that each push still counts once.

What a codec makes of numbers is held against its definition in tests/proto/test_codecs.py. Here a twin in this process
does what both ends should do with that, one after the other.
"""

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
from optwire import _codecs
from optwire import optimizers as opt
from optwire_proto import codecs, convert, sessions, tensors, trees
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import tensor_pb2 as tensor_pb
from optwire_server import optimizers, testing

pytestmark = pytest.mark.usefixtures("no_error_is_logged")

RATE = 0.01
LOSSY = ("int8", "top_k(0.01)", "sign")
ALL = ("bf16", "f16", *LOSSY)
SHARES = {"bf16": 0.5, "f16": 0.5, "int8": 0.27, "top_k(0.01)": 0.03, "sign": 0.04}
LARGE = 700_000  # elements: three chunks of a megabyte as f32


@pytest.fixture(scope="module")
def serving() -> Iterator[testing.Serving]:
    with wire.served() as serving:
        yield serving


@pytest.fixture
def client(serving: testing.Serving) -> Iterator[optwire.Client]:
    with optwire.connect(serving.target, timeout=20) as client:
        yield client


def tree_of(seed: int, elements: int = 20_000) -> Any:
    rng = np.random.default_rng(seed)
    return {
        "b": rng.standard_normal(7, np.float32),
        "none": np.zeros((0, 3), np.float32),
        "w": rng.standard_normal((elements // 4, 4), np.float32),
    }


def roundtrip(text: str, array: np.ndarray) -> np.ndarray:
    """What arrives of an array."""
    how = codecs.parse(text)
    leaf = trees.LeafSpec("w", array.shape, tensors.dtype_name(array.dtype) or "")
    if not how.bears_on(leaf.dtype):
        return array.copy()
    parts = [np.empty(part.shape, tensors.numpy_dtype(part.dtype)) for part in how.encoded(leaf)]
    how.encode(array.size, codecs.reader(array.reshape(-1)), parts)
    out = np.empty(array.size, np.float32)
    how.decode(parts, out, "twin")
    return out.astype(array.dtype).reshape(array.shape)


class Twin:
    """The same optimization in this process: the client's residual, the server's update, the replica."""

    def __init__(self, params: Any, grads_codec: str, params_codec: str) -> None:
        init, update, self._params = optimizers.adam(RATE)
        self._state, self._update = init(params), jax.jit(update)
        self.up, self.down = grads_codec, params_codec
        self.residual = {name: np.zeros_like(array) for name, array in params.items()}
        self.replica: Any = None
        self.steps = 0

    def push(self, grads: Any) -> Any:
        """One step; returns what the client has then."""
        arrived = {}
        for name, grad in grads.items():
            whole = grad + self.residual[name]
            arrived[name] = roundtrip(self.up, whole)
            if codecs.parse(self.up).loses:
                self.residual[name] = whole - arrived[name]
        self._state = self._update(self.steps, arrived, self._state)
        self.steps += 1
        return self.view()

    def params(self) -> Any:
        return {name: np.asarray(array) for name, array in self._params(self._state).items()}

    def view(self) -> Any:
        params = self.params()
        if not codecs.parse(self.down).loses:
            return {name: roundtrip(self.down, array) for name, array in params.items()}
        if self.replica is None:
            self.replica = {name: array.copy() for name, array in params.items()}
        else:
            for name, array in params.items():
                self.replica[name] += roundtrip(self.down, array - self.replica[name])
        return self.replica


def assert_same(got: Any, wanted: Any) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(np.asarray(got[name]).view(np.uint8), wanted[name].view(np.uint8), strict=True)


def residuals(session: optwire.Session, twin: Twin) -> None:
    for name, own in zip(sorted(twin.residual), session._up.residuals, strict=True):
        wanted = twin.residual[name].reshape(-1)
        np.testing.assert_array_equal(np.zeros_like(wanted) if own is None else own, wanted)


class Road:
    """A session with codecs, a client that reaches it through a proxy, and the twin."""

    def __init__(self, target: str, up: str, down: str, *, elements: int = 20_000, timeout: float = 20, **more: Any):
        self.client = optwire.connect(target, timeout=timeout, transport=more.pop("transport", "stream"))
        self._seed, self._elements = 0, elements
        params = self.grads()
        self.session = self.client.create_session(
            params, opt.adam(RATE), name=secrets.token_hex(4), grads_codec=up, params_codec=down, **more
        )
        self.twin = Twin(params, up, down)

    def grads(self) -> Any:
        self._seed += 1
        return tree_of(self._seed, self._elements)

    def step(self, grads: Any = None, **more: Any) -> None:
        grads = self.grads() if grads is None else grads
        assert_same(self.session.step(grads, **more), self.twin.push(grads))
        self.check()

    def check(self) -> None:
        assert self.session.step_count == self.twin.steps == self.session.info().step
        residuals(self.session, self.twin)
        assert_same(self.session.params(), self.twin.params())

    def close(self) -> None:
        self.client.delete_session(self.session.name)
        self.client.close()


# --------------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("up", ["f32", *ALL])
@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_the_server_updates_with_the_decoded_gradients(serving: testing.Serving, up: str, transport: str):
    road = Road(serving.target, up, "f32", transport=transport)
    for _ in range(3):
        road.step()
    road.close()


@pytest.mark.parametrize("down", ALL)
@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_clients_have_what_the_codec_of_the_parameters_says(serving: testing.Serving, down: str, transport: str):
    road = Road(serving.target, "f32", down, transport=transport)
    for step in range(4):
        road.step()
        ack = road.session.last_ack
        assert ack is not None
        is_whole = codecs.parse(down).loses and step == 0
        assert ack.params_codec is (codecs.Kind.RAW if is_whole else codecs.parse(down).kind)
    road.close()


def test_what_clients_have_stays_close_to_the_parameters(serving: testing.Serving):
    for down, most in (("int8", 1e-3), ("sign", 0.2), ("top_k(0.1)", 0.2)):
        road = Road(serving.target, "f32", down)
        grads = road.grads()
        for _ in range(30):
            road.step(grads)
        gaps = [np.abs(road.twin.replica[name] - array).max(initial=0) for name, array in road.twin.params().items()]
        assert max(gaps) < most, down
        road.close()


@pytest.mark.parametrize("text", ALL)
def test_the_bytes_of_a_step_are_as_few_as_promised(serving: testing.Serving, text: str):
    counts = {}
    for used in ("f32", text):
        with proxies.before(serving.target) as proxy:
            road = Road(proxy.target, used, used, elements=LARGE)
            road.session.step(road.grads())
            road.session.step(road.grads())
            before = dict(proxy.bytes)
            road.session.step(road.grads())
            ack = road.session.last_ack
            assert ack is not None
            wire.until(lambda: proxy.bytes[DOWN] - before[DOWN] >= ack.payload_bytes, "the answer is through")  # noqa: B023
            counts[used] = {way: proxy.bytes[way] - before[way] for way in (UP, DOWN)}
            road.close()
    for way in (UP, DOWN):
        assert counts[text][way] <= (SHARES[text] + 0.005) * counts["f32"][way]


def test_leaves_of_other_element_types_travel_as_they_are(client: optwire.Client):
    rng = np.random.default_rng(0)
    params = {"f16": rng.standard_normal(9).astype(np.float16), "w": rng.standard_normal(900, np.float32)}
    exact = client.create_session(params, opt.sgd(RATE))
    session = client.create_session(params, opt.sgd(RATE), grads_codec="sign", params_codec="int8")
    for _ in range(3):
        grads = {name: rng.standard_normal(array.shape).astype(array.dtype) for name, array in params.items()}
        wanted, got = exact.step(grads), session.step(grads)
        np.testing.assert_array_equal(got["f16"], wanted["f16"])
        assert got["w"].dtype == np.float32


def test_buffers_futures_and_other_replies_go_with_codecs(serving: testing.Serving):
    road = Road(serving.target, "int8", "sign")
    out = road.session.param_buffers()
    for _ in range(2):
        grads = road.grads()
        assert road.session.step(grads, out=out) is out
        assert_same(out, road.twin.push(grads))
    grads = road.grads()
    assert_same(road.session.step_async(grads).result(20), road.twin.push(grads))
    # Replies without parameters leave the view where it was; the next change is from there.
    before, kept = road.twin.params(), {name: array.copy() for name, array in road.twin.replica.items()}
    grads = road.grads()
    added = road.session.step(grads, reply="updates")
    road.twin.push(grads)
    assert_same(added, {name: array - before[name] for name, array in road.twin.params().items()})
    grads = road.grads()
    assert road.session.step(grads, reply="none") is None
    road.twin.push(grads)
    road.twin.replica = kept
    road.step()
    ack = road.session.last_ack
    assert ack is not None
    assert ack.params_codec is codecs.Kind.SIGN
    road.close()


def test_gradients_may_be_scaled_by_another_factor_each_time(serving: testing.Serving):
    road = Road(serving.target, "int8", "f32")
    for scale in (1.0, 1024.0, 512.0, 0.25):
        grads = road.grads()
        scaled = {name: grad * np.float32(scale) for name, grad in grads.items()}
        got, wanted = road.session.step(scaled, grad_scale=scale), road.twin.push(grads)
        for name in wanted:  # the compiled update that divides by a scale rounds in other places
            np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-6)
        residuals(road.session, road.twin)
    road.close()


@pytest.mark.parametrize("up", ["int8", "top_k(0.01)"])
def test_absent_leaves_keep_their_residual(client: optwire.Client, up: str):
    params = tree_of(0)
    session = client.create_session(params, opt.per_leaf(opt.sgd(RATE)), grads_codec=up)
    session.step(tree_of(1))
    before = session._up.residuals
    session.step({**tree_of(2), "w": None})
    after = session._up.residuals
    np.testing.assert_array_equal(after[2], before[2])
    assert not np.array_equal(after[0], before[0])


# -------------------------------------------------------------------------------------------------------- exactly once


@pytest.fixture(params=[("sign", "int8"), ("top_k(0.3)", "top_k(0.3)"), ("bf16", "sign")], ids=str, scope="module")
def faulty(request: pytest.FixtureRequest, serving: testing.Serving) -> Iterator[tuple[proxies.Proxy, Road]]:
    with proxies.before(serving.target) as proxy:
        road = Road(proxy.target, *request.param, elements=LARGE)
        road.step()
        yield proxy, road
        road.close()


@pytest.mark.parametrize("frame", range(4))
@pytest.mark.parametrize("direction", [UP, DOWN])
def test_a_step_survives_a_cut_after_every_frame(faulty: tuple[proxies.Proxy, Road], direction: str, frame: int):
    proxy, road = faulty
    road.session.info()
    proxy.fail(direction, messages=frame)
    road.step()
    proxy.heal()
    road.step()


@pytest.fixture
def doubtful(serving: testing.Serving) -> Iterator[tuple[proxies.Proxy, Road]]:
    """A session whose client gives up soon."""
    with proxies.before(serving.target) as proxy:
        road = Road(proxy.target, "sign", "int8", timeout=1)
        road.step()
        yield proxy, road
        road.step()
        road.close()


def lost(proxy: proxies.Proxy, road: Road, direction: str, grads: Any) -> None:
    """A push of unknown outcome: applied where its answer was lost."""
    road.session.info()
    fault = proxy.fail(direction, bytes=0, act="hold")
    with pytest.raises(optwire.DeadlineError):
        road.session.step(grads)
    assert fault.done.is_set()
    residuals(road.session, road.twin)  # as it was
    if direction == DOWN:
        road.twin.push(grads)
    proxy.heal()


@pytest.mark.parametrize("direction", [UP, DOWN])
def test_the_same_gradients_again_are_the_same_push(doubtful: tuple[proxies.Proxy, Road], direction: str):
    proxy, road = doubtful
    grads = road.grads()
    lost(proxy, road, direction, grads)
    got = road.session.step({name: grad.copy() for name, grad in grads.items()})
    assert_same(got, road.twin.replica if direction == DOWN else road.twin.push(grads))
    road.check()


@pytest.mark.parametrize("direction", [UP, DOWN])
def test_reading_parameters_settles_what_was_left_behind(doubtful: tuple[proxies.Proxy, Road], direction: str):
    proxy, road = doubtful
    lost(proxy, road, direction, road.grads())
    assert_same(road.session.params(), road.twin.params())
    road.check()


def test_other_gradients_are_another_push(doubtful: tuple[proxies.Proxy, Road]):
    proxy, road = doubtful
    lost(proxy, road, UP, road.grads())
    road.step()
    lost(proxy, road, DOWN, road.grads())
    with pytest.raises(optwire.DivergentRetryError):
        road.session.step(road.grads())
    residuals(road.session, road.twin)  # that of the push which was applied
    road.session.params()
    road.check()


def test_one_of_several_unknown_pushes_leaves_no_residual(doubtful: tuple[proxies.Proxy, Road]):
    proxy, road = doubtful
    lost(proxy, road, UP, road.grads())
    lost(proxy, road, DOWN, road.grads())
    assert_same(road.session.params(), road.twin.params())
    road.twin.residual = {name: np.zeros_like(array) for name, array in road.twin.residual.items()}
    road.check()


@pytest.mark.parametrize("up", ALL)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_gradients_that_are_not_finite_are_refused_as_such(client: optwire.Client, up: str, bad: float):
    session, twin = (
        client.create_session(tree_of(0), opt.on_nonfinite(opt.adam(RATE)), grads_codec=up, params_codec="int8")
        for _ in range(2)
    )
    for handle in (session, twin):
        handle.step(tree_of(1))
    grads = tree_of(2)
    grads["w"][11, 1] = bad
    with pytest.raises(optwire.NonFiniteError, match="'w'"):
        session.step(grads)
    assert_same(session.step(tree_of(3)), twin.step(tree_of(3)))  # as if nothing had been


def test_a_push_that_is_skipped_leaves_the_residual(client: optwire.Client):
    spec = opt.on_nonfinite(opt.adam(RATE), "skip")
    session, twin = (client.create_session(tree_of(0), spec, grads_codec="int8") for _ in range(2))
    for handle in (session, twin):
        handle.step(tree_of(1))
    grads = tree_of(2)
    grads["b"][3] = np.inf
    session.step(grads)
    for own, other in zip(session._up.residuals, twin._up.residuals, strict=True):
        np.testing.assert_array_equal(own, other)


def test_a_refused_push_leaves_the_residual(serving: testing.Serving):
    road = Road(serving.target, "sign", "f32")
    road.step()
    with pytest.raises(optwire.StaleStepError):
        road.session.step(road.grads(), base_step=0)
    road.check()
    road.step()
    road.close()


def test_a_loaded_state_has_no_residual_and_no_view(serving: testing.Serving):
    road = Road(serving.target, "sign", "int8")
    road.step()
    road.step()
    road.session.load_state(road.session.state())
    assert road.session._up.residuals == [None, None, None]
    road.twin.residual = {name: np.zeros_like(array) for name, array in road.twin.residual.items()}
    road.twin.replica = None
    road.step()
    ack = road.session.last_ack
    assert ack is not None
    assert ack.params_codec is codecs.Kind.RAW
    road.step()
    road.close()


# ------------------------------------------------------------------------------------------------------ several clients


@pytest.mark.parametrize("codec", ["bf16", *LOSSY])
def test_the_mean_is_that_of_the_decoded_gradients(client: optwire.Client, codec: str):
    params = tree_of(0)
    options: dict[str, Any] = {"grads_codec": codec, "params_codec": codec, "aggregation": "sync(2)"}
    first = client.create_session(params, opt.adam(RATE), name=secrets.token_hex(4), worker=0, **options)
    workers = [first, client.attach(first.name, worker=1)]
    twins = [Twin(params, codec, codec), Twin(params, codec, codec)]
    mean = Twin(params, "f32", codec)
    with ThreadPoolExecutor(2) as pool:
        for step in range(3):
            pushed = [tree_of(10 * step + rank) for rank in range(2)]
            futures = [pool.submit(worker.step, grads) for worker, grads in zip(workers, pushed, strict=True)]
            got = [future.result(20) for future in futures]
            arrived = []
            for twin, grads in zip(twins, pushed, strict=True):
                whole = {name: grads[name] + twin.residual[name] for name in grads}
                arrived.append({name: roundtrip(codec, array) for name, array in whole.items()})
                if codecs.parse(codec).loses:
                    twin.residual = {name: whole[name] - arrived[-1][name] for name in whole}
            means = {name: (arrived[0][name] + arrived[1][name]) / np.float32(2) for name in params}
            wanted = mean.push(means)
            for params_of_worker in got:
                assert_same(params_of_worker, wanted)
    for worker, twin in zip(workers, twins, strict=True):
        residuals(worker, twin)
    client.delete_session(first.name)


def test_who_comes_late_gets_the_replica_as_a_whole(serving: testing.Serving, client: optwire.Client):
    road = Road(serving.target, "f32", "top_k(0.01)")
    road.step()
    road.step()
    late = client.attach(road.session.name)
    info = late.info()
    assert (info.grads_codec, info.params_codec) == ("f32", "top_k(0.01)")
    grads = road.grads()
    assert_same(late.step(grads), road.twin.push(grads))
    assert late.last_ack is not None
    assert late.last_ack.params_codec is codecs.Kind.RAW
    grads = road.grads()
    assert_same(late.step(grads), road.twin.push(grads))
    assert late.last_ack.params_codec is codecs.Kind.TOP_K
    # The first handle has an older step: it reads, pushes, and gets a whole reply; then changes again.
    road.session.params()
    for kind in (codecs.Kind.RAW, codecs.Kind.TOP_K):
        road.step()
        assert road.session.last_ack is not None
        assert road.session.last_ack.params_codec is kind
    road.close()


def test_many_handles_that_race_have_the_replica_each_time(serving: testing.Serving):
    road = Road(serving.target, "int8", "int8", elements=100_000)
    seen: dict[int, list[Any]] = {}
    lock = threading.Lock()

    def train(rank: int) -> None:
        with optwire.connect(serving.target, timeout=30, transport="stream") as client:
            handle = client.attach(road.session.name)
            done = 0
            while done < 8:
                try:
                    params = handle.step(tree_of(rank, 100_000))
                except optwire.StaleStepError:
                    handle.params()
                    continue
                done += 1
                with lock:
                    seen.setdefault(handle.step_count, []).append(params)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(train, range(3)))
    for several in seen.values():
        for params in several[1:]:
            assert_same(params, several[0])
    newest = road.session.params()
    assert max(np.abs(seen[24][0][name] - newest[name]).max(initial=0) for name in newest) < 1e-2
    road.close()


def test_an_extended_session_keeps_its_codecs_unless_others_are_asked_for(client: optwire.Client):
    old = client.create_session({"a": np.ones(3, np.float32)}, opt.sgd(RATE), grads_codec="int8", params_codec="bf16")
    params = {"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}
    new = client.create_session(params, opt.sgd(RATE), extends=old)
    assert (new.info().grads_codec, new.info().params_codec) == ("int8", "bf16")
    new.step(params)
    params = {**params, "c": np.ones(2, np.float32)}
    newer = client.create_session(params, opt.sgd(RATE), extends=new, params_codec="f32")
    assert (newer.info().grads_codec, newer.info().params_codec) == ("int8", "f32")
    newer.step(params)


def test_the_replica_counts_as_state(client: optwire.Client):
    sizes = {
        down: client.create_session(tree_of(0), opt.sgd(RATE), params_codec=down).info().state_bytes
        for down in ("f32", "bf16", "int8")
    }
    payload = sum(array.nbytes for array in tree_of(0).values())
    assert sizes["bf16"] == sizes["f32"]
    assert sizes["int8"] - sizes["f32"] >= payload
    with testing.serve(state_bytes_max=sizes["f32"] + payload) as small, optwire.connect(small.target) as other:
        other.create_session(tree_of(0), opt.sgd(RATE), name="fits")
        other.delete_session("fits")
        with pytest.raises(optwire.LimitError, match="state_bytes_max"):
            other.create_session(tree_of(0), opt.sgd(RATE), params_codec="int8")


def test_what_replies_are_encoded_in_is_held_and_is_no_state(serving: testing.Serving, client: optwire.Client):
    session = client.create_session(tree_of(0), opt.sgd(RATE), params_codec="top_k(0.01)")
    live = serving.server.registry._table.by_name[session.name]
    padding = live.held.held_bytes - live.held.state_bytes
    largest = max(array.nbytes for array in tree_of(0).values())
    assert session.info().state_bytes == live.state_bytes
    assert live.held_bytes - padding >= live.state_bytes + largest


@pytest.mark.parametrize("text", ["int8", "sign", "top_k(0.01)"])
def test_a_difference_is_added_as_a_whole_or_not_at_all(text: str):
    how, spec = codecs.parse(text), trees.flatten([np.zeros(300, np.float32)] * 2).spec
    down = _codecs.Down(how, spec)
    down.take([np.zeros(300, np.float32)] * 2, 1)

    def difference() -> list[np.ndarray]:
        parts: list[np.ndarray] = []
        for leaf in spec.leaves:
            made = [np.empty(part.shape, tensors.numpy_dtype(part.dtype)) for part in how.encoded(leaf)]
            how.encode(300, codecs.reader(np.ones(300, np.float32)), made)
            parts += made
        return parts

    filled = [np.empty(300, np.float32) for _ in range(2)]
    bad = difference()
    if text.startswith("top_k"):
        bad[2][0] = 300
    else:
        bad[2][0] = -1.0
    with pytest.raises(optwire.UnavailableError, match="parameters from the server"):
        down.add(bad, filled, 2)
    assert down.step == 1, "the copy is as it was, and may be asked to differ from"
    down.add(difference(), filled, 2)
    expected = np.zeros(300, np.float32)
    how.add(difference()[:2], expected, "")
    for array in filled:
        np.testing.assert_array_equal(array, expected)


def test_a_difference_from_parameters_that_are_not_here_is_refused():
    spec = trees.flatten([np.zeros(300, np.float32)]).spec
    receive = _codecs.Down(codecs.parse("int8"), spec).receiving([np.zeros(300, np.float32)], is_params=True)
    with pytest.raises(optwire.UnavailableError, match="what they differ from"):
        receive(
            sessions.Ack(
                step=1,
                applied_step=1,
                durable_step=0,
                incarnation=1,
                seq=1,
                duplicate=False,
                learning_rate=0.1,
                payload_bytes=312,
                params_codec=codecs.Kind.INT8,
            )
        )


def test_what_is_no_codec_is_refused_before_anything_is_sent(client: optwire.Client):
    for name in ("grads_codec", "params_codec"):
        with pytest.raises(optwire.InvalidArgumentError, match=name):
            client.create_session(tree_of(0), opt.sgd(RATE), **{name: "zip"})
    with pytest.raises(optwire.InvalidArgumentError, match="fraction"):
        client.create_session(tree_of(0), opt.sgd(RATE), grads_codec="top_k(0.1)", params_codec="top_k(0.2)")


def test_a_session_with_codecs_says_why_it_uses_messages(serving: testing.Serving):
    with optwire.connect(serving.target) as client:
        info = client.create_session(tree_of(0, LARGE), opt.sgd(RATE), grads_codec="bf16").info()
        assert info.transport == "stream"
        assert "bf16" in info.transport_reason
        server = client.server_info()
        assert {f"codec.{name}" for name in ("bf16", "f16", "int8", "top_k", "sign")} <= set(server.features)


# ------------------------------------------------------------------------------------------------------------ by hand

PARAMS = {"a": np.zeros(5, np.float32), "w": np.zeros(1000, np.float32)}


def begun(peer: wire.Peer, **changes: Any) -> pb.Session:
    payload = wire.payload_of(PARAMS)
    begin = pb.CreateSessionBegin(
        tree=convert.tree_to_proto(trees.flatten(PARAMS).spec),
        spec=convert.spec_to_proto(opt.sgd(RATE)),
        create_key=secrets.token_hex(16),
        **changes,
    )
    return peer.create_from(begin, wire.chunks(payload, 2**20), pb.PayloadEnd(digest=wire.digest(payload)))


def refused(call: Any, code: str, fragment: str) -> None:
    failure = wire.Failure.of(call)
    assert failure is not None
    assert (failure.code, fragment in failure.message) == (code, True), failure.message


def encoded(text: str, **changes: Any) -> bytes:
    """A payload of ones, with ``changes`` of the arrays of "w" by part."""
    how, data = codecs.parse(text), b""
    for name, array in PARAMS.items():
        leaf = trees.LeafSpec(name, array.shape, "f32")
        parts = {part.name: np.empty(part.shape, tensors.numpy_dtype(part.dtype)) for part in how.encoded(leaf)}
        how.encode(array.size, codecs.reader(np.ones(array.size, np.float32)), list(parts.values()))
        for part, (at, value) in changes.items() if name == "w" else ():
            parts[part][at] = value
        data += b"".join(part.tobytes() for part in parts.values())
    return data


@pytest.mark.parametrize(
    ("text", "changes", "fragment"),
    [
        ("top_k(0.01)", {"indices": (-1, 1000)}, "grads['w']: index 9 is 1000, expected less than 1000"),
        ("top_k(0.01)", {"indices": (-1, 2**32 - 1)}, "grads['w']: index 9 is 4294967295"),
        ("top_k(0.01)", {"indices": (3, 2)}, "grads['w']: index 3 is 2, expected more than 2"),
        ("top_k(0.01)", {"indices": (3, 0)}, "grads['w']: index 3 is 0, expected more than 2"),
        ("int8", {"scales": (1, np.nan)}, "grads['w']: scale 1 is nan"),
        ("int8", {"scales": (1, np.inf)}, "grads['w']: scale 1 is inf"),
        ("int8", {"scales": (1, -1)}, "grads['w']: scale 1 is -1.0"),
        ("sign", {"scales": (0, np.inf)}, "grads['w']: scale 0 is inf"),
        ("sign", {"scales": (0, -0.5)}, "grads['w']: scale 0 is -0.5"),
    ],
)
def test_payloads_that_mean_no_gradients_are_refused(
    peer: wire.Peer, serving: testing.Serving, text: str, changes: Any, fragment: str
):
    how = codecs.parse(text)
    session = begun(peer, grads_codec=how.kind, top_k_fraction=codecs.fraction(how))
    bad, good = encoded(text, **changes), encoded(text)
    end = pb.PayloadEnd(digest=wire.digest(bad))
    refused(lambda: peer.step(wire.push(session, 1, 0), bad), "INVALID_ARGUMENT", fragment)
    refused(lambda: peer.stream(wire.push(session, 1, 0), wire.chunks(bad, 7), end), "INVALID_ARGUMENT", fragment)
    for length in (len(good) - 1, len(good) + 1, 0, 4 * 1005):
        wrong = (good + bytes(5000))[:length]
        refused(lambda wrong=wrong: peer.step(wire.push(session, 1, 0), wrong), "INVALID_ARGUMENT", "payload")
    damaged = wire.digest(good)
    refused(lambda: peer.step(wire.push(session, 1, 0), bad, digest=damaged), "INVALID_ARGUMENT", "payload damaged")
    assert peer.read(session.name) == (0, wire.payload_of(PARAMS)), "nothing was applied"
    assert peer.step(wire.push(session, 1, 0), good).ack.step == 1
    wire.until(lambda: serving.server.registry._landings.lent_bytes == 0, "landing buffers given back")


def test_codecs_that_are_not_served_are_refused_by_name(peer: wire.Peer):
    refused(lambda: begun(peer, grads_codec=9), "UNIMPLEMENTED", "CreateSession.grads_codec: 9")
    refused(lambda: begun(peer, params_codec=9), "UNIMPLEMENTED", "CreateSession.params_codec: 9")
    for fraction in (-0.1, 0.51, 2.0, float("nan"), float("inf")):
        call = lambda fraction=fraction: begun(peer, grads_codec=5, top_k_fraction=fraction)  # noqa: E731
        refused(call, "INVALID_ARGUMENT", "top_k: fraction")
    session = begun(peer, grads_codec=tensor_pb.CODEC_BF16)
    begin = wire.push(session, 1, 0)
    for codec, code in ((9, "push.codec: 9"), (tensor_pb.CODEC_RAW, "expected bf16"), (4, "expected bf16")):
        begin.codec = codec
        refused(lambda: peer.step(begin, encoded("bf16")), "UNIMPLEMENTED", code)
    begin.codec = tensor_pb.CODEC_BF16
    assert peer.step(begin, encoded("bf16")).ack.step == 1


def test_ways_that_leave_codecs_out_are_refused(peer: wire.Peer):
    for changes in ({"grads_codec": 2}, {"params_codec": 4}):
        session = begun(peer, **changes)
        begin = wire.push(session, 1, 0)
        begin.shared_memory_slot = 1
        refused(lambda begin=begin: peer.step(begin, b""), "UNIMPLEMENTED", "shared memory")


def test_a_reply_is_whole_unless_the_client_has_the_step_before(peer: wire.Peer):
    session = begun(peer, params_codec=tensor_pb.CODEC_INT8)
    grads = wire.payload_of({name: np.arange(array.size, dtype=np.float32) for name, array in PARAMS.items()})

    def push(seq: int, view: int | None) -> pb.StepResponse:
        begin = wire.push(session, seq, seq - 1)
        if view is not None:
            begin.view_step = view
        response = peer.step(begin, grads)
        assert response.ack.payload_bytes == len(response.payload) == response.digest.length
        assert response.ack.step == seq
        return response

    whole = push(1, None)
    assert whole.ack.params_codec in (tensor_pb.CODEC_RAW, tensor_pb.CODEC_UNSPECIFIED)
    again = push(1, None)  # its answer was lost
    assert again.ack.duplicate
    assert again.payload == whole.payload
    change = push(2, 1)
    assert change.ack.params_codec == tensor_pb.CODEC_INT8
    same = push(2, 1)
    assert (same.payload, same.ack.duplicate) == (change.payload, True)
    replica = push(2, None)
    assert replica.ack.params_codec in (tensor_pb.CODEC_RAW, tensor_pb.CODEC_UNSPECIFIED)
    have = np.frombuffer(whole.payload, np.float32).copy()
    data = np.frombuffer(change.payload, np.uint8)
    at = 0
    for part in (have[:5], have[5:]):
        leaf = trees.LeafSpec("w", part.shape, "f32")
        size = codecs.Int8().encoded_bytes(leaf)
        codecs.Int8().add(codecs.views(codecs.Int8(), leaf, data[at : at + size].copy()), part, "w")
        at += size
    assert have.tobytes() == replica.payload, "a client that decoded every change has the replica"
    for view in (0, 2, 7):  # not the step before
        assert push(2, view).payload == replica.payload
