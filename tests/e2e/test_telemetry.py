"""Figures that a reply carries when its push asks for them, against NumPy.

The promise: "Telemetry in each reply: step, learning rate used, gradient/update/parameter norms, clip fraction,
non-finite counts, all computed inside the update when asked for."
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tests.e2e import wire

import optwire
from optwire import optax as remote
from optwire import optimizers as opt
from optwire_server import testing

Tree = dict[str, np.ndarray]

SHAPES = {"b": (5,), "s": (), "w": (40, 30)}
FIGURES = {"grad_norm", "learning_rate", "nonfinite", "param_norm", "step", "update_norm"}


def tree(seed: int, dtype: Any = np.float32, scale: float = 1.0) -> Tree:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(scale * rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


PARAMS = tree(0)
GRADS = [tree(seed) for seed in range(1, 7)]


def norm(values: Mapping[str, Any]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(array, np.float64))) for array in values.values())))


def difference(after: Tree, before: Tree) -> dict[str, Any]:
    return {name: np.asarray(after[name], np.float64) - np.asarray(before[name], np.float64) for name in after}


def bits(params: Tree) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in params.items()}


def metrics(session: optwire.Session) -> dict[str, float]:
    assert session.last_ack is not None
    return dict(session.last_ack.metrics)


@pytest.mark.parametrize("transport", ["unary", "stream"])
@pytest.mark.parametrize("namespace", [opt, remote], ids=["seed", "optax"])
def test_each_figure_is_the_formula(server: testing.Serving, transport: str, namespace: Any) -> None:
    with optwire.connect(server.target, transport=transport) as client:
        schedule = namespace.exponential_decay(0.1, 2, 0.5)
        session = client.create_session(PARAMS, namespace.adam(schedule))
        before = PARAMS
        for step, g in enumerate(GRADS):
            after = session.step(g, telemetry=True)
            figures = metrics(session)
            assert set(figures) == FIGURES
            assert figures["step"] == step + 1 == session.step_count
            assert figures["learning_rate"] == pytest.approx(0.1 * 0.5 ** (step / 2), rel=1e-6)
            assert session.last_ack is not None
            assert figures["learning_rate"] == session.last_ack.learning_rate
            assert figures["grad_norm"] == pytest.approx(norm(g), rel=1e-5)
            assert figures["param_norm"] == pytest.approx(norm(after), rel=1e-5)
            assert figures["update_norm"] == pytest.approx(norm(difference(after, before)), rel=1e-5)
            assert figures["nonfinite"] == 0.0
            before = after


SPECS: dict[str, Callable[[], opt.Spec]] = {
    "seed": lambda: opt.chain(opt.clip_grads(1.0), opt.adam(1e-2, b2=0.98)),
    "optax": lambda: opt.chain(remote.clip(0.5), remote.adamw(1e-2)),
    "sm3": lambda: opt.sm3(0.1),
    "wrapped": lambda: opt.ema_params(opt.on_nonfinite(opt.accumulate(remote.lamb(1e-2), 2), "skip")),
    "master": lambda: opt.master_weights(opt.nesterov(0.1, 0.9)),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_asking_changes_no_bit_of_the_parameters(client: optwire.Client, name: str, dtype: str) -> None:
    # sm3 has no answer for arrays of shape ()
    start = {key: PARAMS[key].astype(jnp.dtype(dtype)) for key in ("w", "b")}
    asked, silent = (client.create_session(start, SPECS[name]()) for _ in range(2))
    for number, g in enumerate(GRADS):
        own = {key: g[key].astype(jnp.dtype(dtype)) for key in start}
        ours = asked.step(own, telemetry=number % 3 != 2)  # now and then, as a loop would
        assert bits(ours) == bits(silent.step(own))
        assert metrics(silent) == {}
        assert bool(metrics(asked)) == (number % 3 != 2)
    for which in asked.describe().views:
        assert bits(asked.params(which)) == bits(silent.params(which))


def test_nothing_is_told_where_nothing_is_asked(client: optwire.Client) -> None:
    for spec in (opt.sgd(0.1), opt.on_nonfinite(opt.sgd(0.1), "skip"), opt.on_nonfinite(opt.sgd(0.1), "reject")):
        session = client.create_session(PARAMS, spec)
        session.step(GRADS[0])
        assert metrics(session) == {}


def test_norms_of_narrow_leaves_are_taken_in_32_bits(client: optwire.Client) -> None:
    """In f16 the square of 300 is infinite, and in bf16 a sum of a thousand squares stops short."""
    for dtype in (jnp.bfloat16, jnp.float16):
        start, g = tree(0, dtype), tree(1, dtype, 300.0)
        session = client.create_session(start, opt.sgd(2.0**-10))
        after = session.step(g, telemetry=True)
        figures = metrics(session)
        assert figures["grad_norm"] == pytest.approx(norm(g), rel=1e-5)
        assert figures["param_norm"] == pytest.approx(norm(after), rel=1e-5)
        assert figures["update_norm"] == pytest.approx(norm(difference(after, start)), rel=1e-5)


def test_an_update_that_rounding_takes_back_has_no_length(client: optwire.Client) -> None:
    start = {"w": np.ones(100, jnp.bfloat16)}
    session = client.create_session(start, opt.sgd(1e-3))
    assert session.step(start, telemetry=True)["w"].tobytes() == start["w"].tobytes()
    assert metrics(session)["update_norm"] == 0.0
    kept = client.create_session(start, opt.master_weights(opt.sgd(1e-3)))
    kept.step(start, telemetry=True)
    assert metrics(kept)["update_norm"] == 0.0, "of the parameters that travel"


def test_norms_of_float64_and_complex_leaves(client: optwire.Client) -> None:
    wide = {"w": np.linspace(-1, 1, 50)}
    session = client.create_session(wide, opt.adam(1e-2))
    after = session.step(wide, telemetry=True)
    assert metrics(session)["grad_norm"] == pytest.approx(norm(wide), rel=1e-6)
    assert metrics(session)["update_norm"] == pytest.approx(norm(difference(after, wide)), rel=1e-6)
    plane = {"w": np.asarray([3 + 4j, 1j, -2], np.complex64)}
    session = client.create_session(plane, opt.sgd(0.5))
    session.step(plane, telemetry=True)
    assert metrics(session)["grad_norm"] == pytest.approx(np.sqrt(25 + 1 + 4), rel=1e-6)
    assert metrics(session)["update_norm"] == pytest.approx(np.sqrt(30) / 2, rel=1e-6)
    assert metrics(session)["nonfinite"] == 0.0


def test_the_gradient_norm_is_of_what_was_divided_by_the_scale(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.sgd(0.1))
    session.step(
        {name: array * np.float32(1024) for name, array in GRADS[0].items()}, grad_scale=1024.0, telemetry=True
    )
    assert metrics(session)["grad_norm"] == pytest.approx(norm(GRADS[0]), rel=1e-5)


def test_figures_of_gathered_pushes_tell_that_nothing_moved(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.accumulate(opt.sgd(0.1), 3))
    before = PARAMS
    for push, g in enumerate(GRADS, 1):
        after = session.step(g, telemetry=True)
        figures = metrics(session)
        assert figures["step"] == push
        assert figures["grad_norm"] == pytest.approx(norm(g), rel=1e-5)
        assert figures["update_norm"] == pytest.approx(norm(difference(after, before)), rel=1e-5)
        assert (figures["update_norm"] == 0) == (push % 3 != 0)
        before = after


def test_figures_are_of_all_blocks_whatever_they_are_made_of(client: optwire.Client) -> None:
    """Three element types, a leaf over several blocks, one of a single element, and one of none."""
    shapes = {"a": ((190, 211), np.float32), "b": ((), np.float32), "c": ((0, 4), np.float32), "d": ((70,), np.float16)}
    dtypes = {name: (shape, jnp.dtype(dtype)) for name, (shape, dtype) in shapes.items()} | {
        "e": ((3, 5), jnp.dtype("bfloat16"))
    }

    def drawn(seed: int) -> Tree:
        rng = np.random.default_rng(seed)
        return {name: np.asarray(rng.standard_normal(shape)).astype(dtype) for name, (shape, dtype) in dtypes.items()}

    start, g = drawn(3), drawn(4)
    g["a"][7, 3:9] = np.inf
    session = client.create_session(start, opt.chain(remote.clip(0.8), opt.sgd(2.0**-6)))
    after = session.step(g, telemetry=True)
    figures = metrics(session)
    assert figures["nonfinite"] == 6
    assert figures["param_norm"] == pytest.approx(norm(after), rel=1e-5)
    assert figures["update_norm"] == pytest.approx(norm(difference(after, start)), rel=1e-5)
    changed = sum(np.count_nonzero(np.abs(array.astype(np.float32)) > 0.8) for array in g.values())
    assert figures["clip_fraction"] == pytest.approx(changed / sum(array.size for array in g.values()), rel=1e-3)
    session.step(drawn(5), telemetry=True)
    assert metrics(session)["grad_norm"] == pytest.approx(norm(drawn(5)), rel=1e-5)


def test_leaves_without_a_gradient_count_in_the_norm_of_the_parameters(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.per_leaf(opt.sgd(0.1)))
    after = session.step({"w": GRADS[0]["w"], "b": None, "s": None}, telemetry=True)
    assert metrics(session)["param_norm"] == pytest.approx(norm(after), rel=1e-5)
    assert metrics(session)["grad_norm"] == pytest.approx(norm({"w": GRADS[0]["w"]}), rel=1e-5)
    assert metrics(session)["update_norm"] == pytest.approx(0.1 * norm({"w": GRADS[0]["w"]}), rel=1e-4)


# -------------------------------------------------------------------------------------------------------- clip fraction


def _block(g: np.ndarray, most: float) -> bool:
    return bool(np.sqrt(np.mean(g**2)) > most)


def _adaptive(g: np.ndarray, x: np.ndarray, clipping: float) -> np.ndarray:
    """Where the gradient of a unit, one an output of a matrix, is longer than its share of the unit."""
    axes = (0,) if g.ndim == 2 else None
    size, most = (np.sqrt(np.sum(array**2, axis=axes, keepdims=True)) for array in (g, x))
    return np.broadcast_to(size > clipping * np.maximum(most, 1e-3), g.shape)


def _share(changed: Mapping[str, Any]) -> float:
    total = sum(int(np.prod(shape)) for shape in SHAPES.values())
    return sum(float(np.sum(np.broadcast_to(changed[name], SHAPES[name]))) for name in SHAPES) / total


CLIPS: dict[str, tuple[opt.Spec, Callable[[Tree], float]]] = {
    "value": (remote.clip(0.8), lambda g: _share({k: np.abs(v) > np.float32(0.8) for k, v in g.items()})),
    "block": (remote.clip_by_block_rms(0.99), lambda g: _share({k: _block(v, 0.99) for k, v in g.items()})),
    "leaf": (opt.clip_by_leaf_norm(2.0), lambda g: _share({k: np.linalg.norm(v) > 2.0 for k, v in g.items()})),
    "global": (remote.clip_by_global_norm(20.0), lambda g: float(norm(g) > 20.0)),
    "seed": (opt.clip_grads(20.0), lambda g: float(norm(g) > 20.0)),
    "adaptive": (
        remote.adaptive_grad_clip(1.0),
        lambda g: _share({k: _adaptive(v, PARAMS[k], 1.0) for k, v in g.items()}),
    ),
}


@pytest.mark.parametrize("kind", CLIPS)
def test_the_clip_fraction_is_the_share_of_elements_that_the_clip_changed(client: optwire.Client, kind: str) -> None:
    clip, formula = CLIPS[kind]
    shares = []
    for scale in (0.01, 1.0, 100.0):
        g = tree(7, scale=scale)
        session = client.create_session(PARAMS, opt.chain(clip, opt.sgd(0.1)))
        session.step(g, telemetry=True)
        assert set(metrics(session)) == FIGURES | {"clip_fraction"}
        shares.append(metrics(session)["clip_fraction"])
        assert shares[-1] == pytest.approx(formula(g), abs=1e-6)
    assert shares[0] == 0
    assert shares[-1] > 0.9


def test_the_clip_is_found_inside_of_wrappers_and_chains(client: optwire.Client) -> None:
    inner = opt.chain(opt.chain(remote.clip(0.8), remote.trace(0.9)), opt.sgd(0.1))
    expected = CLIPS["value"][1](GRADS[0])
    for spec in (
        opt.ema_params(inner),
        opt.on_nonfinite(inner, "skip"),
        opt.ema_params(opt.on_nonfinite(inner, "zero")),
        opt.master_weights(inner),
    ):
        session = client.create_session(PARAMS, spec)
        session.step(GRADS[0], telemetry=True)
        assert metrics(session)["clip_fraction"] == pytest.approx(expected, abs=1e-6)
    plain = client.create_session(PARAMS, opt.chain(remote.trace(0.9), opt.sgd(0.1)))
    plain.step(GRADS[0], telemetry=True)
    assert "clip_fraction" not in metrics(plain)


def test_a_clip_of_gathered_gradients_is_measured_on_their_mean(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.accumulate(opt.chain(remote.clip(0.8), opt.sgd(0.1)), 2))
    for first, second in zip(GRADS[::2], GRADS[1::2], strict=True):
        session.step(first, telemetry=True)
        assert "clip_fraction" not in metrics(session), "nothing is clipped yet"
        session.step(second, telemetry=True)
        means = {name: (first[name] + second[name]) / np.float32(2) for name in first}
        assert metrics(session)["clip_fraction"] == pytest.approx(CLIPS["value"][1](means), abs=1e-6)


# ---------------------------------------------------------------------------------------------------------- non-finite


def test_elements_that_are_not_finite_are_counted_over_all_leaves(client: optwire.Client) -> None:
    bad = {name: array.copy() for name, array in GRADS[0].items()}
    bad["w"][0, :7] = np.nan
    bad["b"][1:3] = np.inf
    bad["s"] = np.asarray(-np.inf, np.float32)
    for policy in ("skip", "zero"):
        session = client.create_session(PARAMS, opt.on_nonfinite(opt.sgd(0.1), policy))
        session.step(bad, telemetry=True)
        figures = metrics(session)
        assert figures["nonfinite"] == 10.0
        assert figures.get("skipped") == (1.0 if policy == "skip" else None)
        assert (figures["update_norm"] == 0.0) == (policy == "skip")
        assert np.isfinite(figures["param_norm"])
        session.step(GRADS[0], telemetry=True)
        assert metrics(session)["nonfinite"] == 0.0
        assert metrics(session).get("skipped") == (0.0 if policy == "skip" else None)
    plain = client.create_session(PARAMS, opt.sgd(0.1))
    plain.step(bad, telemetry=True)
    assert metrics(plain)["nonfinite"] == 10.0


def test_elements_that_become_zero_are_not_what_is_clipped(client: optwire.Client) -> None:
    bad = {name: array.copy() for name, array in GRADS[0].items()}
    bad["w"][0, :7] = np.nan
    zeroed = {name: np.where(np.isfinite(array), array, 0) for name, array in bad.items()}
    for clip, expected in ((remote.clip(0.8), CLIPS["value"][1](zeroed)), (remote.clip_by_global_norm(1e6), 0.0)):
        session = client.create_session(PARAMS, opt.on_nonfinite(opt.chain(clip, opt.sgd(0.1)), "zero"))
        session.step(bad, telemetry=True)
        assert metrics(session)["clip_fraction"] == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- retries


def test_a_duplicate_gets_the_figures_of_the_first_reply(client: optwire.Client, peer: wire.Peer) -> None:
    spec = opt.on_nonfinite(opt.chain(remote.clip(0.8), opt.adam(1e-2)), "skip")
    made = peer.create(PARAMS, spec, name="told-twice")
    payload = wire.payload_of(GRADS[0])
    first = peer.step(wire.push(made, 1, 0, telemetry=True), payload)
    assert set(first.ack.metrics) == FIGURES | {"clip_fraction", "skipped"}
    again = peer.step(wire.push(made, 1, 0, telemetry=True), payload)
    assert again.ack.duplicate
    assert not first.ack.duplicate
    assert dict(again.ack.metrics) == dict(first.ack.metrics)
    # The same on a stream.
    frames = peer.stream(*wire.upload(wire.push(made, 1, 0, telemetry=True), payload))
    assert frames[0].ack.duplicate
    assert dict(frames[0].ack.metrics) == dict(first.ack.metrics)
    assert wire.params_of(frames) == first.payload
    client.delete_session("told-twice")
