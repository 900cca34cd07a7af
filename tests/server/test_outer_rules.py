"""Outer optimizers on the server against their papers: float64 NumPy, in the papers' signs and order.

The papers write what workers return as `Δ = local - global`; a push brings `global - local`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from tests.server.test_torch_rules import SHAPES, Run, arrays

from optwire import optimizers as opt
from optwire_proto import errors

STEPS = 40
Deltas = Sequence[np.ndarray]


def fedavgm(x: np.ndarray, deltas: Deltas, rate: float = 1.0, momentum: float = 0.9) -> Iterator[np.ndarray]:
    """Hsu et al., arXiv:1909.06335: v ← βv + Δw, w ← w - v, with Δw from the local to the global parameters."""
    v = np.zeros_like(x)
    for delta in deltas:
        v = momentum * v - delta
        x = x - rate * v
        yield x


def fedopt(
    kind: str,
    x: np.ndarray,
    deltas: Deltas,
    rate: float,
    *,
    beta1: float,
    beta2: float = 0.0,
    tau: float,
    first: float | None = None,
) -> Iterator[np.ndarray]:
    """Reddi et al., arXiv:2003.00295, Algorithm 2."""
    m, v = np.zeros_like(x), np.full_like(x, tau**2 if first is None else first)
    for delta in deltas:
        m = beta1 * m + (1 - beta1) * delta
        if kind == "fedadagrad":
            v = v + delta**2
        elif kind == "fedadam":
            v = beta2 * v + (1 - beta2) * delta**2
        else:
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        x = x + rate * m / (np.sqrt(v) + tau)
        yield x


def delayed_nesterov(
    theta: np.ndarray, deltas: Deltas, rate: float, beta: float, n: int, c: float
) -> Iterator[np.ndarray]:
    """Liu et al., arXiv:2401.09135, Algorithm 3; its pseudo-gradients are ours."""
    m, total = np.zeros_like(theta), np.zeros_like(theta)
    for t, delta in enumerate(deltas):
        g = -delta
        total = total + g
        if (t + 1) % n == 0:
            m = beta * m + total / n
            theta = theta - rate * ((1 - c * n + c) * beta * m + g / n)
            total = np.zeros_like(theta)
        else:
            theta = theta - rate * (c * beta * m + g / n)
        yield theta


CASES: dict[str, tuple[opt.Spec, Any]] = {
    "fedavgm": (opt.fedavgm(), fedavgm),
    "fedavgm, other numbers": (opt.fedavgm(0.3, 0.5), lambda x, d: fedavgm(x, d, 0.3, 0.5)),
    "fedadagrad": (opt.fedadagrad(0.1), lambda x, d: fedopt("fedadagrad", x, d, 0.1, beta1=0.0, tau=1e-3)),
    "fedadam": (opt.fedadam(0.1), lambda x, d: fedopt("fedadam", x, d, 0.1, beta1=0.9, beta2=0.99, tau=1e-3)),
    "fedadam, other numbers": (
        opt.fedadam(0.03, 0.5, 0.75, 0.1, 0.2),
        lambda x, d: fedopt("fedadam", x, d, 0.03, beta1=0.5, beta2=0.75, tau=0.1, first=0.2),
    ),
    "fedyogi": (opt.fedyogi(0.1), lambda x, d: fedopt("fedyogi", x, d, 0.1, beta1=0.9, beta2=0.99, tau=1e-3)),
    "fedyogi from far above": (
        opt.fedyogi(0.1, initial_accumulator_value=9.0),
        lambda x, d: fedopt("fedyogi", x, d, 0.1, beta1=0.9, beta2=0.99, tau=1e-3, first=9.0),
    ),
    "delayed Nesterov": (opt.delayed_nesterov(), lambda x, d: delayed_nesterov(x, d, 0.7, 0.9, 4, 0.0)),
    "delayed Nesterov, other numbers": (
        opt.delayed_nesterov(0.3, 0.5, n=3, c=0.25),
        lambda x, d: delayed_nesterov(x, d, 0.3, 0.5, 3, 0.25),
    ),
}


def worst(spec: opt.Spec, oracle: Any, dtype: Any) -> float:
    """The largest difference from the paper over all steps, of the largest magnitude that the leaf has had."""
    start = arrays(dtype, seed=0)
    grads = [arrays(dtype, seed=step + 1) for step in range(STEPS)]
    run = Run(spec, start)
    ours = [run.push(each) for each in grads]
    found = 0.0
    for leaf, x in enumerate(start):
        deltas = [-each[leaf].astype(np.float64) for each in grads]
        theirs = list(oracle(x.astype(np.float64), deltas))
        scale = max((float(np.abs(values).max(initial=0.0)) for values in theirs), default=1.0) or 1.0
        for step, expected in enumerate(theirs):
            found = max(found, float(np.abs(ours[step][leaf] - expected).max(initial=0.0)) / scale)
    return found


@pytest.mark.parametrize("case", CASES)
def test_updates_are_the_papers(case: str) -> None:
    assert worst(*CASES[case], np.float32) < 2e-6
    with jax.enable_x64(True):
        assert worst(*CASES[case], np.float64) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_of_elements(case: str) -> None:
    assert Run(CASES[case][0], arrays(np.float32, seed=0)).program.granularity.name == "ELEMENT"


@pytest.mark.parametrize("case", CASES)
def test_leaves_by_themselves_are_updated_alike(case: str) -> None:
    start = arrays(np.float32, seed=0)
    together, alone = Run(CASES[case][0], start), Run(opt.per_leaf(CASES[case][0]), start)
    for step in range(6):
        grads = arrays(np.float32, seed=step + 1)
        for a, b in zip(together.push(grads), alone.push(grads), strict=True):
            assert np.array_equal(a, b)


def test_a_leaf_counts_its_own_updates() -> None:
    """A fragment that is pushed at every second step changes its momentum at its own n-th push."""
    start = arrays(np.float32, seed=0)
    run = Run(opt.per_leaf(opt.delayed_nesterov(0.7, 0.9, n=2)), start)
    first = [index == 0 for index in range(len(SHAPES))]
    deltas: list[np.ndarray] = []
    for step in range(8):
        grads = arrays(np.float32, seed=step + 1)
        params = run.push(grads, first if step % 2 == 0 else [not is_first for is_first in first])
        deltas += [-grads[0].astype(np.float64)] if step % 2 == 0 else []
    *_, expected = delayed_nesterov(start[0].astype(np.float64), deltas, 0.7, 0.9, 2, 0.0)
    np.testing.assert_allclose(params[0], expected, rtol=1e-5, atol=1e-6)


def test_a_share_that_exceeds_the_momentum_is_refused() -> None:
    with pytest.raises(errors.SpecError, match=r"delayed_nesterov\.c: 0\.5, expected at most 1 / n, which is 0\.25"):
        opt.delayed_nesterov(n=4, c=0.5)


def test_numbers_are_operands() -> None:
    start = arrays(np.float32, seed=0)
    run = Run(opt.fedadam(0.1), start)
    grads = arrays(np.float32, seed=1)
    run.push(grads)
    run.change(learning_rate=0.0, beta1=0.5, tau=0.1)  # asserts that the program is the same
    for before, after in zip(run.params(), run.push(grads), strict=True):
        assert np.array_equal(before, after)
