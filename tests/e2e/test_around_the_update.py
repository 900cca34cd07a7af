"""What goes around an update, against formulas in NumPy and optax run here.

The promise: "Around the update: accumulation over k pushes, gradient clipping (value, block, per-leaf, global norm),
non-finite policy (reject | skip and count | zero), loss-scale (the push carries grad_scale), EMA of parameters readable
as session.params(which="ema"), weight-decay decoupled or not, master weights in f32 with bf16/f16 parameters on the
wire, state dtype (mu_dtype), schedule-free and lookahead evaluation parameters."
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from tests import oracles

import optwire
from optwire import optax as remote
from optwire import optimizers as opt
from optwire_server import testing

Tree = dict[str, np.ndarray]

SHAPES = {"b": (5,), "s": (), "w": (4, 3)}
RELATIVE = 2e-6


def tree(seed: int, dtype: Any = np.float32, scale: float = 1.0) -> Tree:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(scale * rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


PARAMS = tree(0)
GRADS = [tree(seed) for seed in range(1, 13)]


def close(ours: Tree, theirs: Tree, relative: float = RELATIVE) -> None:
    """Asserts numbers that are equal up to rounding in float32."""
    assert sorted(ours) == sorted(theirs)
    for name, array in ours.items():
        np.testing.assert_allclose(
            np.asarray(array, np.float64), np.asarray(theirs[name], np.float64), relative, relative, err_msg=name
        )


def bits(params: Tree) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in params.items()}


def wide(values: Tree) -> Tree:
    return {name: array.astype(np.float64) for name, array in values.items()}


def mean(values: Sequence[Tree]) -> Tree:
    return {name: np.mean([value[name].astype(np.float64) for value in values], 0) for name in SHAPES}


def by_leaf(rule: Callable[..., Any], params: Tree, grads: Sequence[Tree], *arguments: Any) -> Tree:
    """A rule of ``oracles`` on each leaf."""
    return {
        name: rule(leaf.astype(np.float64), [g[name].astype(np.float64) for g in grads], *arguments)
        for name, leaf in params.items()
    }


def norm(values: Tree) -> float:
    return float(np.sqrt(sum(np.sum(np.square(array.astype(np.float64))) for array in values.values())))


def with_nan(grads: Tree, value: float = np.nan) -> Tree:
    bad = {name: array.copy() for name, array in grads.items()}
    bad["w"][1, 2] = value
    return bad


def pushed(session: optwire.Session, grads: Sequence[Tree]) -> list[float]:
    """Pushes all, and returns the learning rates that the server says it used."""
    used = []
    for g in grads:
        session.step(g)
        assert session.last_ack is not None
        used.append(session.last_ack.learning_rate)
    return used


# ------------------------------------------------------------------------------------------------------- accumulation


def test_parameters_keep_their_bytes_until_the_push_that_closes_a_step(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.accumulate(opt.adam(1e-2), 3))
    before = bits(PARAMS)
    for push, g in enumerate(GRADS, 1):
        params = session.step(g)
        assert session.step_count == push
        assert (bits(params) == before) == (push % 3 != 0)
        before = bits(params)
    means = [mean(GRADS[i : i + 3]) for i in range(0, 12, 3)]
    close(params, by_leaf(oracles.adam, PARAMS, means, [1e-2] * 4, 0.9, 0.999, 1e-8))


@pytest.mark.parametrize("namespace", [opt, remote], ids=["seed", "optax"])
def test_a_schedule_counts_updates_and_not_pushes(client: optwire.Client, namespace: Any) -> None:
    schedule = (
        opt.exponential_decay(0.5, 2, 0.5) if namespace is opt else remote.exponential_decay(0.5, 2, 0.5)
    )  # both 0.5 * 0.5 ** (count / 2)
    session = client.create_session(PARAMS, opt.accumulate(namespace.sgd(schedule), 4))
    used = pushed(session, GRADS)
    rates = [0.5 * 0.5 ** (count / 2) for count in range(3)]
    np.testing.assert_allclose(used, np.repeat(rates, 4), 1e-6)
    assert session.info().learning_rate == pytest.approx(0.25 * 0.5**0.5, rel=1e-6)
    means = [mean(GRADS[i : i + 4]) for i in range(0, 12, 4)]
    close(session.params(), by_leaf(oracles.sgd, PARAMS, means, rates))


def test_a_bias_correction_counts_updates_and_not_pushes(client: optwire.Client) -> None:
    for adam in (opt.adam(1e-2), remote.adam(1e-2)):
        session = client.create_session(PARAMS, opt.accumulate(adam, 2))
        pushed(session, GRADS)
        means = [mean(GRADS[i : i + 2]) for i in range(0, 12, 2)]
        close(session.params(), by_leaf(oracles.adam, PARAMS, means, [1e-2] * 6, 0.9, 0.999, 1e-8))


def clipped(grads: Tree, most: float) -> Tree:
    scale = min(1.0, most / norm(grads))
    return {name: array.astype(np.float64) * scale for name, array in grads.items()}


def test_a_clip_before_accumulate_clips_pushes_and_one_inside_clips_their_mean(client: optwire.Client) -> None:
    clip = remote.clip_by_global_norm(1.0)
    outside = client.create_session(PARAMS, opt.chain(clip, opt.accumulate(opt.sgd(0.1), 2)))
    inside = client.create_session(PARAMS, opt.accumulate(opt.chain(clip, opt.sgd(0.1)), 2))
    pairs = [GRADS[i : i + 2] for i in range(0, 12, 2)]
    pushed(outside, GRADS)
    pushed(inside, GRADS)
    of_pushes = [mean([clipped(g, 1.0) for g in pair]) for pair in pairs]
    of_means = [clipped(mean(pair), 1.0) for pair in pairs]
    close(outside.params(), by_leaf(oracles.sgd, PARAMS, of_pushes, [0.1] * 6))
    close(inside.params(), by_leaf(oracles.sgd, PARAMS, of_means, [0.1] * 6))


@pytest.mark.parametrize("order", ["ema outside", "ema inside"])
def test_an_average_moves_only_when_a_step_closes(client: optwire.Client, order: str) -> None:
    outside = opt.ema_params(opt.accumulate(opt.sgd(0.1), 2), decay=0.75)
    inside = opt.accumulate(opt.ema_params(opt.sgd(0.1), decay=0.75), 2)
    session = client.create_session(PARAMS, outside if order == "ema outside" else inside)
    average, before = wide(PARAMS), bits(PARAMS)
    for push, g in enumerate(GRADS, 1):
        params = session.step(g)
        read = session.params(which="ema")
        if push % 2:
            assert bits(read) == before
            continue
        average = {name: 0.75 * average[name] + 0.25 * params[name] for name in average}
        close(read, average)
        before = bits(read)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_mean_of_many_narrow_gradients_is_that_of_their_sum_in_32_bits(client: optwire.Client, dtype: str) -> None:
    narrow = jnp.dtype(dtype)
    params = {"w": np.zeros(3, narrow)}
    # In 16 bits, 64 times 3 stops short at 512 or so beside small ones, and f16 ends at 65504.
    grads = {"w": np.asarray([3.0, 0.7, 2000.0], narrow)}
    session = client.create_session(params, opt.accumulate(opt.sgd(1.0), 64))
    for _ in range(64):
        after = session.step(grads)
    np.testing.assert_array_equal(after["w"].astype(np.float64), -grads["w"].astype(np.float64))


@pytest.mark.parametrize("namespace", [opt, remote], ids=["seed", "optax"])
def test_pushes_that_are_skipped_count_towards_no_step(client: optwire.Client, namespace: Any) -> None:
    """The policy around the accumulation: a step closes with k pushes that were taken."""
    schedule = namespace.exponential_decay(0.5, 1, 0.5)
    session = client.create_session(PARAMS, opt.on_nonfinite(opt.accumulate(namespace.sgd(schedule), 2), "skip"))
    bad = with_nan(GRADS[0])
    good = GRADS[:6]
    used = pushed(session, [good[0], bad, bad, good[1], bad, good[2], good[3], good[4], bad, good[5]])
    assert session.step_count == 10
    np.testing.assert_allclose(used, [0.5] * 4 + [0.25] * 3 + [0.125] * 3, 1e-6)
    means = [mean(good[i : i + 2]) for i in range(0, 6, 2)]
    close(session.params(), by_leaf(oracles.sgd, PARAMS, means, [0.5, 0.25, 0.125]))


def test_updates_that_are_skipped_inside_an_accumulation_take_their_pushes_with_them(client: optwire.Client) -> None:
    spec = opt.accumulate(opt.on_nonfinite(opt.sgd(opt.exponential_decay(0.5, 1, 0.5)), "skip"), 2)
    session = client.create_session(PARAMS, spec)
    bad = with_nan(GRADS[0])
    used = pushed(session, [GRADS[0], GRADS[1], bad, GRADS[2], GRADS[3], GRADS[4], GRADS[5], GRADS[6]])
    np.testing.assert_allclose(used, [0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.125, 0.125], 1e-6)
    means = [mean(GRADS[0:2]), mean(GRADS[3:5]), mean(GRADS[5:7])]
    close(session.params(), by_leaf(oracles.sgd, PARAMS, means, [0.5, 0.25, 0.125]))


# ----------------------------------------------------------------------------------------------------------- clipping


def _rms_of_block(g: np.ndarray, most: float) -> np.ndarray:
    return np.asarray(g / max(1.0, np.sqrt(np.mean(g**2)) / most))


def _leaf_norm(g: np.ndarray, most: float) -> np.ndarray:
    return np.asarray(g * min(1.0, most / np.linalg.norm(g)))


def _adaptive(g: np.ndarray, x: np.ndarray, clipping: float) -> np.ndarray:
    """Brock et al. (2021), equation 3, one unit an output of a matrix."""
    axes = (0,) if g.ndim == 2 else None
    size, most = (np.sqrt(np.sum(array**2, axis=axes, keepdims=True)) for array in (g, x))
    most = clipping * np.maximum(most, 1e-3)
    return np.asarray(np.where(size < most, g, g * most / size)).reshape(g.shape)


CLIPS: dict[str, tuple[opt.Spec, Callable[[Tree, Tree], Tree]]] = {
    "value": (remote.clip(0.5), lambda g, x: {k: np.clip(v, -0.5, 0.5) for k, v in g.items()}),
    "block": (remote.clip_by_block_rms(0.8), lambda g, x: {k: _rms_of_block(v, 0.8) for k, v in g.items()}),
    "per leaf": (opt.clip_by_leaf_norm(1.5), lambda g, x: {k: _leaf_norm(v, 1.5) for k, v in g.items()}),
    "global norm": (remote.clip_by_global_norm(2.0), lambda g, x: clipped(g, 2.0)),
    "global norm of the seed": (opt.clip_grads(2.0), lambda g, x: clipped(g, 2.0)),
    "adaptive": (remote.adaptive_grad_clip(0.3), lambda g, x: {k: _adaptive(v, x[k], 0.3) for k, v in g.items()}),
}


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("namespace", [opt, remote], ids=["seed", "optax"])
def test_gradients_are_clipped_as_the_formula_says(client: optwire.Client, kind: str, namespace: Any) -> None:
    spec, formula = CLIPS[kind]
    session = client.create_session(PARAMS, opt.chain(spec, namespace.sgd(0.5)))
    x = wide(PARAMS)
    for scale in (1.0, 0.01, 100.0):  # one that is clipped in part, one not at all, one altogether
        grads = tree(21, scale=scale)
        step = formula(wide(grads), x)
        x = {name: x[name] - 0.5 * step[name] for name in x}
        params = session.step(grads)
        close(params, x, 1e-5)


# -------------------------------------------------------------------------------------------------------- non-finite


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_push_that_is_not_finite_is_rejected_by_the_name_of_the_leaf(client: optwire.Client, value: float) -> None:
    spec = opt.on_nonfinite(opt.momentum(opt.exponential_decay(0.1, 2, 0.5), 0.9))
    session, calm = client.create_session(PARAMS, spec), client.create_session(PARAMS, spec)
    for step, g in enumerate(GRADS):
        before = bits(session.params())
        with pytest.raises(optwire.NonFiniteError, match=r"grads\['w'\]: 1 of 12 elements are not finite") as caught:
            session.step(with_nan(g, value))
        assert caught.value.subject == "w"
        assert caught.value.step == step
        assert session.info().step == step
        assert session.step_count == step
        assert bits(session.params()) == before
        assert bits(session.step(g)) == bits(calm.step(g))
        assert session.last_ack is not None
        assert calm.last_ack is not None
        assert session.last_ack.learning_rate == calm.last_ack.learning_rate


def test_a_finite_gradient_that_overflows_the_second_moment_is_rejected(client: optwire.Client) -> None:
    for adam in (opt.adam(1e-2), remote.adam(1e-2)):
        session = client.create_session(PARAMS, opt.on_nonfinite(adam))
        calm = client.create_session(PARAMS, opt.on_nonfinite(adam))
        with pytest.raises(optwire.NonFiniteError, match="finite, but the update would make the state infinite"):
            session.step(with_nan(GRADS[0], 1e30))
        assert session.info().step == 0
        for g in GRADS[:3]:
            assert bits(session.step(g)) == bits(calm.step(g))


def test_a_push_within_an_accumulation_is_rejected_and_another_takes_its_place(client: optwire.Client) -> None:
    spec = opt.on_nonfinite(opt.accumulate(opt.adam(1e-2), 2))
    session, calm = client.create_session(PARAMS, spec), client.create_session(PARAMS, spec)
    for g in GRADS[:6]:
        with pytest.raises(optwire.NonFiniteError):
            session.step(with_nan(g))
        assert bits(session.step(g)) == bits(calm.step(g))


@pytest.mark.parametrize(
    ("spec", "subject"),
    [
        (opt.accumulate(opt.on_nonfinite(opt.sgd(0.1)), 2), "accumulate.optimizer"),
        (
            opt.partition({"w": opt.on_nonfinite(opt.sgd(0.1), "skip"), "**": opt.sgd(0.1)}),
            "partition.transforms['w']",
        ),
        (opt.on_nonfinite(opt.on_nonfinite(opt.sgd(0.1), "skip"), "skip"), "on_nonfinite.optimizer"),
        (opt.on_nonfinite(opt.on_nonfinite(opt.sgd(0.1), "reject"), "skip"), "on_nonfinite.optimizer"),
    ],
)
def test_a_policy_that_could_not_be_kept_is_refused_by_its_path(
    client: optwire.Client, spec: opt.Spec, subject: str
) -> None:
    with pytest.raises(optwire.SpecError, match="put one on_nonfinite around everything") as caught:
        client.create_session(PARAMS, spec)
    assert caught.value.subject == subject


def test_parameters_that_would_overflow_in_half_precision_are_rejected(client: optwire.Client) -> None:
    start = {"w": np.full(3, 60000, np.float16)}
    session = client.create_session(start, opt.on_nonfinite(opt.master_weights(opt.sgd(1.0))))
    with pytest.raises(optwire.NonFiniteError, match="the update would make the state infinite"):
        session.step({"w": np.full(3, -10000, np.float16)})
    np.testing.assert_array_equal(
        session.step({"w": np.full(3, -4000, np.float16)})["w"], np.full(3, 64000, np.float16)
    )


# Specs whose outer parts keep something, too: a refused push must leave that alone as well.
AROUND_A_REFUSAL: dict[str, Callable[[opt.Spec], opt.Spec]] = {
    "ema_params": lambda inner: opt.ema_params(inner, decay=0.5),
    "chain": lambda inner: opt.chain(remote.trace(0.9), inner),
    "partition": lambda inner: opt.partition({"w": inner, "**": opt.adam(1e-2)}),
    "partition, two policies": lambda inner: opt.partition({"w": inner, "**": opt.on_nonfinite(opt.adam(1e-2))}),
}


@pytest.mark.parametrize("outer", AROUND_A_REFUSAL)
def test_a_rejected_push_changes_nothing_of_what_is_around_the_policy(client: optwire.Client, outer: str) -> None:
    spec = AROUND_A_REFUSAL[outer](opt.on_nonfinite(opt.momentum(0.1, 0.9)))
    session, calm = client.create_session(PARAMS, spec), client.create_session(PARAMS, spec)
    views = ("", *session.describe().views)
    for g in GRADS[:6]:
        with pytest.raises(optwire.NonFiniteError):
            session.step(with_nan(g))
        session.step(g)
        calm.step(g)
        for which in views:
            assert bits(session.params(which)) == bits(calm.params(which)), which


@pytest.mark.parametrize("outer", ["ema_params", "chain", "momentum and average"])
def test_a_skipped_push_changes_nothing_of_what_is_around_the_policy(client: optwire.Client, outer: str) -> None:
    """A momentum outside would keep a NaN for good, and skip all that follows."""
    around = {
        "momentum and average": lambda inner: opt.ema_params(opt.chain(remote.trace(0.9), inner), debias=True)
    } | AROUND_A_REFUSAL
    spec = around[outer](opt.on_nonfinite(opt.momentum(0.1, 0.9), "skip"))
    session, calm = client.create_session(PARAMS, spec), client.create_session(PARAMS, spec)
    for g in GRADS[:4]:
        session.step(with_nan(g))
        assert session.last_ack is not None
        assert session.last_ack.metrics == {"skipped": 1.0}
        session.step(g)
        assert session.last_ack.metrics == {}
        calm.step(g)
        for which in ("", *session.describe().views):
            assert bits(session.params(which)) == bits(calm.params(which)), which


@pytest.mark.parametrize("name", ["seed", "optax"])
def test_a_push_that_is_not_finite_is_skipped_and_counted(client: optwire.Client, name: str) -> None:
    namespace: Any = opt if name == "seed" else remote
    spec = opt.on_nonfinite(namespace.adam(namespace.exponential_decay(0.1, 2, 0.5)), "skip")
    session, calm = client.create_session(PARAMS, spec), client.create_session(PARAMS, spec)
    rates = pushed(calm, GRADS[:6])
    used = []
    for number, g in enumerate(GRADS[:6]):
        before = bits(session.params())
        if number in (0, 3, 4):
            for bad in (with_nan(g), with_nan(g, 1e30)):
                assert bits(session.step(bad)) == before
                assert session.last_ack is not None
                assert session.last_ack.metrics == {"skipped": 1.0}
        session.step(g)
        assert session.last_ack is not None
        assert session.last_ack.metrics == {}
        used.append(session.last_ack.learning_rate)
    assert session.step_count == session.info().step == 12
    assert used == rates
    assert session.info().learning_rate == calm.info().learning_rate
    assert bits(session.params()) == bits(calm.params())
    session.step(with_nan(GRADS[0]), telemetry=True)
    assert session.last_ack is not None
    assert session.last_ack.metrics["skipped"] == 1.0
    assert session.last_ack.metrics["nonfinite"] == 1.0
    assert session.last_ack.metrics["update_norm"] == 0.0
    session.step(GRADS[0], telemetry=True)
    assert session.last_ack.metrics["skipped"] == 0.0


def test_elements_that_are_not_finite_become_zero(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.on_nonfinite(opt.adam(1e-2), "zero"))
    calm = client.create_session(PARAMS, opt.on_nonfinite(opt.adam(1e-2), "zero"))
    for number, g in enumerate(GRADS[:6]):
        ours = session.step(with_nan(g, (np.nan, np.inf, -np.inf)[number % 3]))
        theirs = calm.step(with_nan(g, 0.0))
        assert session.last_ack is not None
        assert session.last_ack.metrics == {}
        assert bits(ours) == bits(theirs)


def test_without_a_policy_what_is_not_finite_goes_into_the_parameters(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.sgd(1.0))
    params = session.step(with_nan(GRADS[0]))
    assert np.isnan(params["w"][1, 2])
    assert sum(np.isnan(array).sum() for array in params.values()) == 1


# --------------------------------------------------------------------------------------------------------- loss scale


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-3])
def test_gradients_scaled_by_a_power_of_two_give_the_same_bits(client: optwire.Client, scale: float) -> None:
    spec = opt.chain(remote.clip_by_global_norm(1.0), opt.adam(1e-2))
    scaled, plain = client.create_session(PARAMS, spec), client.create_session(PARAMS, spec)
    for g in GRADS[:5]:
        ours = scaled.step({name: array * np.float32(scale) for name, array in g.items()}, grad_scale=scale)
        assert bits(ours) == bits(plain.step(g))


def test_a_scale_may_change_at_every_push(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.momentum(0.1, 0.9))
    for g, scale in zip(GRADS[:5], (3.0, 1.0, 1000.0, 0.1, 7.0), strict=True):
        session.step({name: array * np.float32(scale) for name, array in g.items()}, grad_scale=scale)
    close(session.params(), by_leaf(oracles.momentum, PARAMS, GRADS[:5], [0.1] * 5, 0.9))


def test_scaled_half_precision_gradients_keep_what_would_underflow(client: optwire.Client) -> None:
    """Micikevicius et al. (2018): gradients below 2**-24 are zero in f16 unless they are scaled."""
    rng = np.random.default_rng(5)
    true = [rng.uniform(-4e-8, 4e-8, 50) for _ in range(20)]
    assert not any(np.float16(g / 2).any() for g in true)
    start = np.asarray(rng.standard_normal(50), np.float16)
    session = client.create_session({"w": start}, opt.master_weights(opt.momentum(1e5, 0.9)))
    sent = [np.asarray(g * 65536, np.float16) for g in true]
    for g in sent:
        params = session.step({"w": g}, grad_scale=65536.0)
    unscaled = [g.astype(np.float64) / 65536 for g in sent]
    expected = oracles.momentum(start.astype(np.float64), unscaled, np.full(20, 1e5), 0.9)
    assert params["w"].dtype == np.float16
    assert np.abs(expected - start).max() > 0.01
    # Half a unit in the last place of f16, and a little for float32 before.
    np.testing.assert_allclose(params["w"].astype(np.float64), expected, rtol=2**-11 * 1.01, atol=1e-6)


def test_a_scale_that_overflowed_is_skipped_and_a_smaller_one_goes_on(client: optwire.Client) -> None:
    """Dynamic loss scaling: halve the scale whenever a step was skipped."""
    start = {"w": np.ones(8, np.float16)}
    true = np.asarray(np.linspace(0.5, 4.0, 8), np.float32)
    session = client.create_session(start, opt.on_nonfinite(opt.master_weights(opt.sgd(0.125)), "skip"))
    scale, taken = 2.0**17, 0
    with np.errstate(over="ignore"):
        while taken < 3:
            params = session.step({"w": (true * np.float32(scale)).astype(np.float16)}, grad_scale=scale)
            assert session.last_ack is not None
            if session.last_ack.metrics.get("skipped"):
                assert params["w"].tobytes() == start["w"].tobytes()
                scale /= 2
            else:
                taken += 1
    assert scale == 2.0**13
    assert session.step_count == 7
    np.testing.assert_array_equal(params["w"], np.asarray(1 - 3 * 0.125 * true, np.float16))


# ------------------------------------------------------------------------------------------------------------ averages


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("namespace", [opt, remote], ids=["seed", "optax"])
def test_the_average_of_parameters_is_the_formula(client: optwire.Client, namespace: Any, debias: bool) -> None:
    session = client.create_session(PARAMS, opt.ema_params(namespace.sgd(0.3), decay=0.9, debias=debias))
    assert session.describe().views == ("ema",)
    assert bits(session.params("ema")) == bits(PARAMS), "before the first step the average is the parameters"
    average = {name: 0 * array if debias else array for name, array in wide(PARAMS).items()}
    x = wide(PARAMS)
    for t, g in enumerate(GRADS, 1):
        x = {name: x[name] - 0.3 * g[name] for name in x}
        average = {name: 0.9 * average[name] + 0.1 * x[name] for name in x}
        close(session.step(g), x)
        close(session.params("ema"), {k: v / (1 - 0.9**t) for k, v in average.items()} if debias else average, 1e-5)


def test_the_average_of_narrow_parameters_moves_at_all(client: optwire.Client) -> None:
    """With a decay of 0.999 an average in bfloat16 would stay where it was: it has 8 digits, and 0.001 needs 10."""
    params = {"w": np.zeros(4, jnp.bfloat16)}
    session = client.create_session(params, opt.ema_params(opt.sgd(1.0), decay=0.999))
    session.step({"w": np.full(4, -1.0, jnp.bfloat16)})
    zero = {"w": np.zeros(4, jnp.bfloat16)}
    for _ in range(299):
        session.step(zero)
    read = session.params("ema")["w"]
    assert read.dtype == jnp.bfloat16
    np.testing.assert_allclose(read.astype(np.float64), 1 - 0.999**300, rtol=2**-8)


# ------------------------------------------------------------------------------------------------------ master weights


@pytest.mark.parametrize(("dtype", "rate"), [("bfloat16", 1e-3), ("float16", 1e-4)])
@pytest.mark.parametrize("namespace", [opt, remote], ids=["seed", "optax"])
def test_two_hundred_tiny_updates_add_up_in_master_weights(
    client: optwire.Client, namespace: Any, dtype: str, rate: float
) -> None:
    narrow = jnp.dtype(dtype)
    start, grads = {"w": np.ones(6, narrow)}, {"w": np.asarray([1, 1.5, 1, 0.75, 0.5, 1], narrow)}
    master = client.create_session(start, opt.master_weights(namespace.sgd(rate)))
    alone = client.create_session(start, namespace.sgd(rate))
    for _ in range(200):
        ours, lost = master.step(grads), alone.step(grads)
    assert ours["w"].dtype == narrow
    assert lost["w"].tobytes() == start["w"].tobytes(), "each update by itself is below a rounding"
    kept = np.ones(6, np.float32)
    for _ in range(200):
        kept = kept - np.float32(rate) * grads["w"].astype(np.float32)
    np.testing.assert_array_equal(ours["w"], kept.astype(narrow))
    assert bits(master.params()) == bits(ours)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adam_with_master_weights_is_adam_in_32_bits_rounded_at_the_end(client: optwire.Client, dtype: str) -> None:
    narrow = jnp.dtype(dtype)
    start = tree(3, narrow)
    session = client.create_session(start, opt.master_weights(remote.adam(1e-3)))
    grads = [tree(seed, narrow) for seed in range(20)]
    for g in grads:
        params = session.step(g)
    update = optax.adam(1e-3)
    kept = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in start.items()}
    state = update.init(kept)
    for g in grads:
        changes, state = update.update({name: jnp.asarray(leaf, jnp.float32) for name, leaf in g.items()}, state)
        kept = optax.apply_updates(kept, changes)
    digits = 2**-8 if dtype == "bfloat16" else 2**-11
    for name, leaf in params.items():
        assert leaf.dtype == narrow
        np.testing.assert_allclose(leaf.astype(np.float64), kept[name], digits * 1.01)


# ---------------------------------------------------------------------------------------------- moments, weight decay


def test_a_narrow_first_moment_takes_half_of_its_bytes(client: optwire.Client) -> None:
    size = 1000
    params = {"w": np.ones(size, np.float32)}
    full = client.create_session(params, remote.adam(1e-2))
    half = client.create_session(params, remote.adam(1e-2, mu_dtype="bfloat16"))
    assert full.info().state_bytes - half.info().state_bytes == 2 * size
    assert full.info().state_bytes >= 3 * 4 * size
    update = optax.adam(1e-2, mu_dtype="bfloat16")
    local: Any = {"w": jnp.ones(size)}
    state, step = update.init(local), jax.jit(update.update)
    for seed in range(10):
        g = {"w": np.random.default_rng(seed).standard_normal(size).astype(np.float32)}
        changes, state = step(g, state)
        local = optax.apply_updates(local, changes)
        ours, theirs = half.step(g), full.step(g)
    # A rounding of the moment in bfloat16 may fall to the other side: then updates differ by some 2**-8 of them.
    np.testing.assert_allclose(ours["w"], local["w"], rtol=0, atol=2 * 10 * 1e-2 * 2**-8)
    assert np.mean(ours["w"] == np.asarray(local["w"])) > 0.5
    assert bits(ours) != bits(theirs)


def test_weight_decay_is_decoupled_in_adamw_and_part_of_the_gradient_before_adam(client: optwire.Client) -> None:
    rate, decay, steps = 1e-2, 0.1, 8
    decoupled = client.create_session(PARAMS, remote.adamw(rate, weight_decay=decay))
    coupled = client.create_session(PARAMS, opt.chain(remote.add_decayed_weights(decay), remote.adam(rate)))
    mixed = client.create_session(PARAMS, opt.chain(remote.add_decayed_weights(decay), opt.adam(rate)))
    for g in GRADS[:steps]:
        for session in (decoupled, coupled, mixed):
            session.step(g)

    def adam(x: np.ndarray, grads: Sequence[np.ndarray], inside: float, outside: float) -> np.ndarray:
        """Loshchilov and Hutter (2019), algorithm 2: decay inside is equation 6, outside equation 12."""
        m, v = np.zeros_like(x), np.zeros_like(x)
        for t, gradient in enumerate(grads, 1):
            g = gradient + inside * x
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            x = x - rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + outside * x)
        return x

    close(decoupled.params(), by_leaf(adam, PARAMS, GRADS[:steps], 0.0, decay), 1e-5)
    close(coupled.params(), by_leaf(adam, PARAMS, GRADS[:steps], decay, 0.0), 1e-5)
    close(mixed.params(), by_leaf(adam, PARAMS, GRADS[:steps], decay, 0.0), 1e-5)


# ----------------------------------------------------------------------------------------------- evaluation parameters

SCHEDULE_FREE: dict[str, tuple[opt.Spec, Any]] = {
    "sgd": (
        remote.schedule_free_sgd(0.3, warmup_steps=3, weight_decay=0.1),
        optax.contrib.schedule_free_sgd(0.3, warmup_steps=3, weight_decay=0.1),
    ),
    "adamw": (
        remote.schedule_free_adamw(0.1, b1=0.8, warmup_steps=2, weight_decay=0.05),
        optax.contrib.schedule_free_adamw(0.1, b1=0.8, warmup_steps=2, weight_decay=0.05),
    ),
    "wrapped": (
        remote.schedule_free(remote.sgd(0.2), 0.2, b1=0.7),
        optax.contrib.schedule_free(optax.sgd(0.2), 0.2, b1=0.7),
    ),
}


@pytest.mark.parametrize("kind", SCHEDULE_FREE)
def test_schedule_free_parameters_to_evaluate_are_those_of_optax(client: optwire.Client, kind: str) -> None:
    spec, update = SCHEDULE_FREE[kind]
    session = client.create_session(PARAMS, spec)
    assert session.describe().views == ("eval",)
    local: Any = {name: jnp.asarray(leaf) for name, leaf in PARAMS.items()}
    state = update.init(local)
    step = jax.jit(update.update)
    for g in GRADS:
        changes, state = step(g, state, local)
        local = optax.apply_updates(local, changes)
        params = session.step(g)
    close(params, local, 1e-5)
    evaluated = optax.contrib.schedule_free_eval_params(state, local)
    close(session.params("eval"), evaluated, 1e-5)
    assert max(np.abs(params[name] - evaluated[name]).max() for name in params) > 1e-3


def test_lookahead_evaluates_its_slow_parameters(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, remote.lookahead(remote.sgd(0.1), sync_period=4, slow_step_size=0.5))
    assert session.describe().views == ("eval",)
    slow, fast = wide(PARAMS), wide(PARAMS)
    for push, g in enumerate(GRADS, 1):
        fast = {name: fast[name] - 0.1 * g[name] for name in fast}
        if push % 4 == 0:  # Zhang et al. (2019), algorithm 1
            slow = {name: slow[name] + 0.5 * (fast[name] - slow[name]) for name in slow}
            fast = dict(slow)
        close(session.step(g), fast)
        close(session.params("eval"), slow)


# --------------------------------------------------------------------------------------------------------------- views


def test_parameters_that_a_spec_does_not_keep_are_refused_by_name(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.ema_params(opt.sgd(0.1)))
    for which in ("eval", "EMA", "ema ", "slow"):
        with pytest.raises(optwire.InvalidArgumentError, match=f"which: '{which}'.*keeps beside its.*'ema'") as caught:
            session.params(which)
        assert caught.value.subject == "which"
    plain = client.create_session(PARAMS, opt.sgd(0.1))
    assert plain.describe().views == ()
    with pytest.raises(optwire.InvalidArgumentError, match="which: 'ema'.*none"):
        plain.params("ema")
    with pytest.raises(optwire.InvalidArgumentError, match="which"):
        plain.params(None)  # type: ignore[arg-type]
    assert bits(plain.params()) == bits(PARAMS)


def test_several_views_are_read_through_every_wrapper_by_every_client(
    client: optwire.Client, server: testing.Serving
) -> None:
    narrow = tree(4, jnp.bfloat16)
    inner = opt.chain(remote.clip_by_global_norm(5.0), remote.schedule_free_sgd(0.3))
    spec = opt.ema_params(opt.on_nonfinite(opt.accumulate(opt.master_weights(inner), 2)), decay=0.5)
    session = client.create_session(narrow, spec, name="several-views")
    assert session.describe().views == ("ema", "eval")
    update = optax.chain(optax.clip_by_global_norm(5.0), optax.contrib.schedule_free_sgd(0.3))
    local: Any = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in narrow.items()}
    average = {name: np.asarray(leaf, np.float64) for name, leaf in local.items()}
    state = update.init(local)
    grads = [tree(seed, jnp.bfloat16) for seed in range(8)]
    for push, g in enumerate(grads, 1):
        params = session.step(g)
        if push % 2 == 0:
            changes, state = update.update(
                {name: jnp.asarray(leaf, jnp.float32) for name, leaf in mean(grads[push - 2 : push]).items()},
                state,
                local,
            )
            local = optax.apply_updates(local, changes)
            average = {name: 0.5 * average[name] + 0.5 * params[name].astype(np.float64) for name in average}
    expected = {
        "": local,
        "ema": average,
        "eval": optax.contrib.schedule_free_eval_params(state[1], local),
    }
    with optwire.connect(server.target) as second, second.attach("several-views") as other:
        for which, theirs in expected.items():
            ours = session.params(which)
            close(ours, theirs, 2**-8)
            assert all(leaf.dtype == jnp.bfloat16 for leaf in ours.values())
            assert bits(other.params(which)) == bits(ours)
        assert len({repr(bits(session.params(which))) for which in expected}) == 3
        assert other.describe() == session.describe()
    client.delete_session("several-views")
