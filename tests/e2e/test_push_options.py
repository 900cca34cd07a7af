"""What a push may bring along or leave out: hyperparameters, absent gradients, and what its reply carries."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import pytest
from tests.e2e import wire

import optwire
from optwire import optimizers as opt
from optwire_proto import trees
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_server import testing

PARAMS = {"b": np.linspace(-1, 1, 5, dtype=np.float32), "w": np.linspace(1, 2, 12, dtype=np.float32).reshape(4, 3)}


def grads(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(leaf.shape, np.float32) for name, leaf in PARAMS.items()}


def same(got: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b), strict=True), got, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Hyperparameters.


def test_a_change_in_the_push_is_a_change_before_the_push(client: optwire.Client) -> None:
    inside = client.create_session(PARAMS, opt.adam(0.1))
    before = client.create_session(PARAMS, opt.adam(0.1))
    for step, rate in enumerate((0.1, 0.3, 0.3, 0.02)):
        before.set_hyperparams(learning_rate=rate)
        same(inside.step(grads(step), hyperparams={"learning_rate": rate}), before.step(grads(step)))
        assert inside.last_ack is not None
        assert inside.last_ack.learning_rate == pytest.approx(rate)
    assert inside.info().changes == before.info().changes
    assert inside.last_ack is not None
    assert inside.last_ack.changes == 4


def test_a_push_that_is_refused_changes_no_hyperparameter(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.on_nonfinite(opt.adam(0.1), "reject"))
    bad = {**grads(0), "b": np.full(5, np.nan, np.float32)}
    with pytest.raises(optwire.NonFiniteError):
        session.step(bad, hyperparams={"learning_rate": 0.5})
    assert session.info().changes == ()
    assert session.info().learning_rate == 0.1
    session.step(grads(0))
    assert session.last_ack is not None
    assert session.last_ack.learning_rate == pytest.approx(0.1)


def test_a_retry_changes_nothing_again(client: optwire.Client, peer: wire.Peer) -> None:
    session = peer.create(PARAMS, opt.adam(0.1), "changes-once")
    rate = pb.Argument(name="learning_rate", value=pb.Value(number=0.5))
    begin = wire.push(session, 1, 0, hyperparams=[rate])
    first = peer.step(begin, wire.payload_of(grads(0)))
    client.attach("changes-once").set_hyperparams(learning_rate=0.25)
    again = peer.step(begin, wire.payload_of(grads(0)))
    assert again.ack.duplicate
    assert again.payload == first.payload
    info = client.attach("changes-once").info()
    assert [dict(change.values) for change in info.changes] == [{"adam.step_size": 0.5}, {"adam.step_size": 0.25}]
    assert info.learning_rate == 0.25
    other = wire.push(session, 1, 0, hyperparams=[pb.Argument(name="learning_rate", value=pb.Value(number=0.6))])
    failure = wire.Failure.of(lambda: peer.step(other, wire.payload_of(grads(0))))
    assert failure is not None
    assert "applied as step 1 with other hyperparams" in failure.message
    client.delete_session("changes-once")


def test_a_schedule_may_come_with_a_push(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, optwire.optax.sgd(0.1))
    session.step(grads(0), hyperparams={"learning_rate": opt.piecewise_constant([2], [0.5, 0.25])})
    rates = []
    for step in range(1, 4):
        session.step(grads(step))
        assert session.last_ack is not None
        rates.append(session.last_ack.learning_rate)
    assert rates == [0.5, 0.5, 0.25]


def test_a_change_that_needs_another_program_is_compiled_before_the_push(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.adam(0.1))
    same(
        session.step(grads(0), hyperparams={"b1": 0.5}),
        client.create_session(PARAMS, opt.adam(0.1, b1=0.5)).step(grads(0)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Replies.


@pytest.mark.parametrize("transport", ["unary", "stream"])
@pytest.mark.parametrize(
    ("spec", "transformation"),
    [
        (optwire.optax.adamw(0.1), optax.adamw(0.1)),
        (
            opt.chain(optwire.optax.clip_by_global_norm(0.5), optwire.optax.sgd(0.1, momentum=0.9)),
            optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9)),
        ),
    ],
    ids=["adamw", "clip and sgd"],
)
def test_updates_are_optaxs_own(server: testing.Serving, spec: Any, transformation: Any, transport: str) -> None:
    with optwire.connect(server.target, transport=transport) as client:
        session = client.create_session(PARAMS, spec)
        params, state = PARAMS, transformation.init(PARAMS)
        update = jax.jit(transformation.update)
        for step in range(4):
            updates, state = update(grads(step), state, params)
            got = session.step(grads(step), reply="updates")
            jax.tree.map(lambda a, b: np.testing.assert_array_max_ulp(a, np.asarray(b), 2), got, updates)
            params = jax.tree.map(np.asarray, optax.apply_updates(params, got))
            same(params, session.params())


@pytest.mark.parametrize(
    "spec",
    [
        opt.momentum(0.1, 0.9),
        opt.sm3(0.1),
        opt.per_leaf(opt.torch_adamw(0.1)),
        opt.accumulate(opt.adam(0.1), 2),
        opt.partition({"b": opt.sgd(0.1), "*": optwire.optax.adam(0.1)}),
        opt.on_nonfinite(optwire.optax.sgd(0.1), "skip"),
        opt.ema_params(optwire.optax.sgd(0.1), 0.9),
    ],
    ids=lambda spec: spec.name,
)
def test_updates_lead_from_the_parameters_before_to_those_after(client: optwire.Client, spec: Any) -> None:
    session = client.create_session(PARAMS, spec)
    before = PARAMS
    for step in range(3):
        updates = session.step(grads(step), reply="updates")
        after = session.params()
        same({name: before[name] + updates[name] for name in before}, after)
        before = after


def test_nothing_comes_back_where_nothing_was_asked_for(server: testing.Serving) -> None:
    for transport in ("unary", "stream"):
        with optwire.connect(server.target, transport=transport) as client:
            session = client.create_session(PARAMS, opt.sgd(0.1))
            assert session.step(grads(0), reply="none") is None
            assert session.step(grads(1), reply="none") is None
            assert session.step_count == 2
            same(session.step(grads(2)), session.params())


def test_a_retry_hears_the_same_updates_until_another_push(client: optwire.Client, peer: wire.Peer) -> None:
    session = peer.create(PARAMS, opt.momentum(0.1, 0.9), "updates-again")
    begin = wire.push(session, 1, 0, reply=pb.REPLY_CONTENT_UPDATES)
    first = peer.step(begin, wire.payload_of(grads(0)))
    again = peer.step(begin, wire.payload_of(grads(0)))
    assert again.ack.duplicate
    assert again.payload == first.payload
    client.attach("updates-again").step(grads(1))
    failure = wire.Failure.of(lambda: peer.step(begin, wire.payload_of(grads(0))))
    assert failure is not None
    assert failure.detail is not None
    assert failure.detail.reason == "STALE_STEP"
    assert "what step 1 added to the parameters is not kept any more" in failure.message
    client.delete_session("updates-again")


def test_a_retry_hears_the_same_updates_after_a_push_that_was_refused(client: optwire.Client, peer: wire.Peer) -> None:
    session = peer.create(PARAMS, opt.on_nonfinite(opt.sgd(0.1), "reject"), "updates-kept")
    begin = wire.push(session, 1, 0, reply=pb.REPLY_CONTENT_UPDATES)
    first = peer.step(begin, wire.payload_of(grads(0)))
    other = client.attach("updates-kept")
    with pytest.raises(optwire.NonFiniteError):
        other.step({name: array * np.float32(np.nan) for name, array in grads(1).items()})
    assert peer.step(begin, wire.payload_of(grads(0))).payload == first.payload
    client.delete_session("updates-kept")


def test_updates_that_nobody_asked_for_were_never_kept(client: optwire.Client, peer: wire.Peer) -> None:
    session = peer.create(PARAMS, opt.sgd(0.1), "never-kept")
    peer.step(wire.push(session, 1, 0), wire.payload_of(grads(0)))
    again = wire.push(session, 1, 0, reply=pb.REPLY_CONTENT_UPDATES)
    failure = wire.Failure.of(lambda: peer.step(again, wire.payload_of(grads(0))))
    assert failure is not None
    assert "what step 1 added to the parameters was not kept, as no push asked for it then" in failure.message
    client.delete_session("never-kept")


@pytest.fixture
def slow_change(server: testing.Serving, peer: wire.Peer) -> Iterator[SlowChange]:
    slow = SlowChange(server, peer)
    yield slow
    slow.finish()


class SlowChange:
    """A push that brings hyperparameters along and whose payload comes late."""

    def __init__(self, server: testing.Serving, peer: wire.Peer) -> None:
        self._server, self._peer = server, peer
        self._gate = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._pushed: list[concurrent.futures.Future[Any]] = []

    def begin(self, session: optwire.Session, **hyperparams: float) -> None:
        values = [pb.Argument(name=name, value=pb.Value(number=value)) for name, value in hyperparams.items()]
        key = wire.push(pb.Session(id=session.id, incarnation=1), 1, session.step_count, hyperparams=values)
        first, *rest = wire.upload(key, wire.payload_of(grads(0)))

        def frames() -> Iterator[Any]:
            yield first
            self._gate.wait(20)
            yield from rest

        lent = self._server.server.registry._landings
        before = lent.lent_bytes
        self._pushed.append(self._pool.submit(lambda: self._peer.stream(frames())))
        wire.until(lambda: lent.lent_bytes > before, "the push is admitted")

    def finish(self) -> None:
        self._gate.set()
        while self._pushed:
            self._pushed.pop().result(20)


def test_what_was_compiled_while_a_change_was_coming_is_compiled_for_what_it_leads_to(
    client: optwire.Client, peer: wire.Peer, slow_change: SlowChange
) -> None:
    session = client.create_session(PARAMS, "ema_params(optax.adam(0.1), 0.9)")
    slow_change.begin(session, b1=0.8)
    session.params("ema")
    begin = wire.push(pb.Session(id=session.id, incarnation=1), 1, 0, worker="b" * 32, telemetry=True)
    assert wire.Failure.of(lambda: peer.step(begin, b"1234")) is not None  # it broke off, but was compiled for
    slow_change.finish()
    session.params()
    assert session.step(grads(1), telemetry=True) is not None
    assert session.last_ack is not None
    assert "grad_norm" in session.last_ack.metrics
    assert set(session.params("ema")) == set(PARAMS)


def test_a_change_that_a_push_brings_along_is_not_lost_to_one_that_is_being_compiled(
    server: testing.Serving, client: optwire.Client, slow_change: SlowChange
) -> None:
    session = client.create_session(PARAMS, "optax.adam(0.1)")
    slow_change.begin(session, learning_rate=0.5)
    engine = server.server.registry._engine
    compile_ = engine.compile

    def overtaken(*what: Any) -> Any:
        slow_change.finish()
        return compile_(*what)

    engine.compile = overtaken
    try:
        session.set_hyperparams(b1=0.8)
    finally:
        del engine.compile
    assert session.info().step == 1
    adam = session.info().spec
    assert (adam["learning_rate"], adam["b1"]) == (0.5, 0.8)


# ---------------------------------------------------------------------------------------------------------------------
# Absent gradients.


def present(step: int, *names: str) -> dict[str, np.ndarray | None]:
    return {name: grad if name in names else None for name, grad in grads(step).items()}


@pytest.mark.parametrize("transport", ["unary", "stream"])
@pytest.mark.parametrize(
    "spec",
    [opt.adam(0.1), optwire.optax.adamw(0.1), opt.momentum(0.1, 0.9)],
    ids=lambda spec: spec.name,
)
def test_an_absent_leaf_is_as_if_it_had_not_been_pushed(server: testing.Serving, spec: Any, transport: str) -> None:
    with optwire.connect(server.target, transport=transport) as client:
        session = client.create_session(PARAMS, opt.per_leaf(spec))
        alone = {name: client.create_session({name: leaf}, opt.per_leaf(spec)) for name, leaf in PARAMS.items()}
        expected = dict(PARAMS)
        for step, names in enumerate([("b", "w"), ("b",), ("w",), ("w",), ("b", "w"), ("b",)]):
            for name in names:
                expected |= alone[name].step({name: grads(step)[name]})
            same(session.step(present(step, *names)), expected)


def test_a_leaf_that_is_absent_needs_an_optimizer_leaf_by_leaf(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, optwire.optax.adamw(0.1))
    with pytest.raises(optwire.InvalidArgumentError, match=r"grads\['b'\] is absent.*put per_leaf\(...\) around"):
        session.step(present(0, "w"))
    assert session.step_count == 0


def test_a_global_clip_sees_the_leaves_that_are_there(client: optwire.Client) -> None:
    clipped = opt.chain(optwire.optax.clip_by_global_norm(0.5), opt.per_leaf(optwire.optax.sgd(1.0)))
    after = client.create_session(PARAMS, clipped).step(present(0, "w"))
    g = grads(0)["w"].astype(np.float64)
    np.testing.assert_allclose(after["w"], PARAMS["w"] - 0.5 * g / np.linalg.norm(g), rtol=1e-6)
    same(after["b"], PARAMS["b"])


def test_leaves_that_part_ways_need_room_or_nothing_changes() -> None:
    """Apart from one another they take twice the memory: what is held counts, not what the leaves have."""
    with testing.serve(state_bytes_max=300_000) as serving, optwire.connect(serving.target) as client:
        session = client.create_session(PARAMS, opt.per_leaf(opt.torch_adamw(0.1)))
        before = session.state()
        live = serving.server.registry._table.by_name[session.name]
        with pytest.raises(
            optwire.LimitError, match=r"state_bytes_max: 39\d{4}, expected at most 300000; .* push zeros"
        ):
            session.step(present(0, "w"))
        with pytest.raises(optwire.LimitError, match="state_bytes_max: 39"):
            session.load_state({"step/w": np.array(7, np.int32)})
        after = session.state()
        assert after.step == before.step == 0
        for name, array in before.arrays.items():
            same(after.arrays[name], array)
        session.step(grads(0))
        session.load_state({"step/w": np.array(7, np.int32), "step/b": np.array(7, np.int32)})
        assert len(live.held.spans) == 1
    with testing.serve(state_bytes_max=420_000) as serving, optwire.connect(serving.target) as client:
        session = client.create_session(PARAMS, opt.per_leaf(opt.torch_adamw(0.1)))
        session.step(present(0, "w"))
        with pytest.raises(optwire.LimitError, match="state_bytes_max: 58"):
            client.create_session(PARAMS, opt.per_leaf(opt.torch_adamw(0.1)))
        session.step(present(1, "b"))  # nothing grows any more


def test_updates_that_are_kept_for_a_retry_need_room_or_nothing_changes() -> None:
    params = {"w": np.zeros(16_384, np.float32)}  # as many as fit a small block, so that nothing is padding
    payload = params["w"].nbytes
    with testing.serve(state_bytes_max=230_000) as serving, optwire.connect(serving.target) as client:
        session = client.create_session(params, opt.sgd(0.1))
        other = client.create_session(params, opt.sgd(0.1))
        creations = serving.server.registry.creations
        before = creations._held_bytes()
        assert before <= 230_000 < before + 2 * payload
        session.step(params, reply="updates")
        session.step(params, reply="updates")
        assert creations._held_bytes() == before + payload
        with pytest.raises(optwire.LimitError, match="state_bytes_max: .* ask for parameters"):
            other.step(params, reply="updates")
        assert other.step_count == 0
        session.step(params)  # and what was kept is let go of
        assert creations._held_bytes() == before
        other.step(params, reply="updates")


def test_nothing_there_is_no_push(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.per_leaf(opt.sgd(0.1)))
    with pytest.raises(optwire.TreeMismatchError, match="None, and so is every other array"):
        session.step(present(0))
    with pytest.raises(optwire.TreeMismatchError, match="no arrays"):
        session.step({"w": None})
    assert session.step_count == 0


def test_none_inside_nests_and_flat_trees(client: optwire.Client) -> None:
    nested = {"a": [np.zeros(2, np.float32), (np.ones(3, np.float32), None)]}
    session = client.create_session(nested, opt.per_leaf(opt.sgd(1.0)))
    after = session.step({"a": [None, (np.ones(3, np.float32), None)]})
    same(after, {"a": [np.zeros(2, np.float32), (np.zeros(3, np.float32), None)]})
    flat = trees.TreeSpec(trees.flatten(PARAMS).spec.leaves)
    arrays = trees.match_present(flat, {"w": PARAMS["w"], "b": None})
    assert arrays[0] is None
    assert arrays[1] is not None


def test_telemetry_and_updates_with_absent_leaves(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.per_leaf(optwire.optax.sgd(1.0)))
    updates = session.step(present(0, "w"), reply="updates", telemetry=True)
    same(updates["b"], np.zeros(5, np.float32))
    assert session.last_ack is not None
    assert session.last_ack.metrics["grad_norm"] == pytest.approx(np.linalg.norm(grads(0)["w"]), rel=1e-6)
