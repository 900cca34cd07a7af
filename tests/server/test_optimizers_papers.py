"""The rules against the papers: float64 NumPy, written without regard to the order of operations.

Runs our rules in float64 to nearly its last digit, which also shows that no float32 creeps in on the way.
"""

import jax
import numpy as np
import pytest
from tests import oracles

from optwire_server import optimizers

RULES = [
    ("sgd", {}),
    ("momentum", {"mass": 0.9}),
    ("nesterov", {"mass": 0.8}),
    ("adagrad", {"momentum": 0.9}),
    ("adagrad", {"momentum": 0.0}),
    ("rmsprop", {"gamma": 0.8, "eps": 1e-8}),
    ("rmsprop_momentum", {"gamma": 0.9, "eps": 1e-6, "momentum": 0.7}),
    ("adam", {"b1": 0.9, "b2": 0.999, "eps": 1e-8}),
    ("adamax", {"b1": 0.8, "b2": 0.99, "eps": 1e-8}),
    ("sm3", {"momentum": 0.9}),
]
SCHEDULES = [
    ("exponential_decay", (0.1, 5, 0.5)),
    ("inverse_time_decay", (0.1, 5, 0.5)),
    ("inverse_time_decay", (0.1, 5, 0.5, True)),
    ("polynomial_decay", (0.1, 12, 0.01)),
    ("polynomial_decay", (0.1, 12, 0.01, 0.5)),
    ("piecewise_constant", ([3, 8, 15], [0.1, 0.05, 0.02, 0.01])),
]
STEPS = 20


def draw(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape)
    return np.where(np.abs(values) < 0.2, 0.0, values)  # some entries see no gradient at all


@pytest.mark.parametrize(("name", "settings"), RULES)
def test_rule_is_the_papers(name, settings):
    schedule = optimizers.exponential_decay(0.1, 7, 0.6)
    init_fun, update_fun, get_params = getattr(optimizers, name)(schedule, **settings)
    shapes = {"matrix": (4, 3), "scalar": (), "tensor": (2, 3, 2), "vector": (5,)}
    params = {leaf: draw(0, shape) for leaf, shape in shapes.items()}
    grads = [{leaf: draw(i + 1, shape) for leaf, shape in shapes.items()} for i in range(STEPS)]
    rates = np.array([oracles.exponential_decay(i, 0.1, 7, 0.6) for i in range(STEPS)])

    with jax.enable_x64(True):
        step = jax.jit(update_fun)
        opt_state = init_fun(params)
        for i in range(STEPS):
            opt_state = step(i, grads[i], opt_state)
        ours = get_params(opt_state)

    for leaf, x0 in params.items():
        theirs = getattr(oracles, name)(x0, [g[leaf] for g in grads], rates, **settings)
        assert ours[leaf].dtype == np.float64
        np.testing.assert_allclose(ours[leaf], theirs, rtol=1e-12, atol=1e-14, err_msg=leaf)


@pytest.mark.parametrize(("name", "arguments"), SCHEDULES)
def test_schedule_is_its_formula(name, arguments):
    schedule = getattr(optimizers, name)(*arguments)
    expected = [getattr(oracles, name)(i, *arguments) for i in range(STEPS)]
    with jax.enable_x64(True):
        compiled = jax.jit(schedule)
        np.testing.assert_allclose([schedule(i) for i in range(STEPS)], expected, rtol=1e-12)
        # From the last step on, compiled code may be off by the rounding of 1 - n·(1/n): half an ulp, or its root.
        np.testing.assert_allclose([compiled(i) for i in range(STEPS)], expected, rtol=1e-12, atol=2e-8)


def test_norm_and_clipping_are_their_formulas():
    grads = {"w": draw(1, (4, 3)), "b": [draw(2, (5,)), draw(3, ())]}
    flat = np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])
    norm = np.sqrt(np.sum(flat**2))
    assert float(optimizers.l2_norm(grads)) == pytest.approx(norm, rel=1e-14)
    clipped = optimizers.clip_grads(grads, 0.5)
    for ours, g in zip(jax.tree.leaves(clipped), jax.tree.leaves(grads), strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, g * 0.5 / norm, rtol=1e-14)
