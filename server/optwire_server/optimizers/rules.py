"""The nine update rules, each for a single array and lifted to trees by `optimizer`.

Every rule is written as its paper has it, in the order of operations that fixes its bits. Must not know trees,
sessions or how learning rates come about.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from optwire_server.optimizers.schedules import Scalar, Schedule, learning_rate
from optwire_server.optimizers.state import ArrayRule, Step, optimizer

LearningRate: TypeAlias = Scalar | Schedule
"""A positive scalar, traced or not, or a schedule that gives one for each step."""


@optimizer
def sgd(step_size: LearningRate) -> ArrayRule:
    """Stochastic gradient descent: `x ← x - α·g`.

    Robbins and Monro, "A stochastic approximation method", https://doi.org/10.1214/aoms/1177729586.

    Args:
        step_size: α, the learning rate: a scalar, shape (), or a schedule.

    Returns:
        An optimizer. State per leaf: x.
    """
    alpha = learning_rate(step_size)

    def init(x0: Any) -> Any:
        return x0

    def update(i: Step, g: Any, x: Any) -> Any:
        return x - alpha(i, g) * g

    def get_params(x: Any) -> Any:
        return x

    return init, update, get_params


@optimizer
def momentum(step_size: LearningRate, mass: float) -> ArrayRule:
    """Gradient descent with momentum: `v ← μ·v + g`, `x ← x - α·v`.

    Polyak, "Some methods of speeding up the convergence of iteration methods",
    https://doi.org/10.1016/0041-5553(64)90137-5, in the form that scales the velocity by the learning rate last.

    Args:
        step_size: α, the learning rate: a scalar, shape (), or a schedule.
        mass: μ, the share of the velocity kept from step to step, in [0, 1).

    Returns:
        An optimizer. State per leaf: x and the velocity v, of the leaf's shape and dtype.
    """
    alpha = learning_rate(step_size)

    def update(i: Step, g: Any, state: Any) -> Any:
        x, v = state
        v = mass * v + g
        return x - alpha(i, v) * v, v

    return _with_zeros(1), update, _first


@optimizer
def nesterov(step_size: LearningRate, mass: float) -> ArrayRule:
    """Gradient descent with Nesterov's momentum: `v ← μ·v + g`, `x ← x - α·(μ·v + g)`.

    Nesterov, "A method for solving the convex programming problem with convergence rate O(1/k²)", 1983, as rewritten
    for gradients at x by Sutskever et al., http://proceedings.mlr.press/v28/sutskever13.html.

    Args:
        step_size: α, the learning rate: a scalar, shape (), or a schedule.
        mass: μ, the share of the velocity kept from step to step, in [0, 1).

    Returns:
        An optimizer. State per leaf: x and the velocity v, of the leaf's shape and dtype.
    """
    alpha = learning_rate(step_size)

    def update(i: Step, g: Any, state: Any) -> Any:
        x, v = state
        v = mass * v + g
        return x - alpha(i, v) * (mass * v + g), v

    return _with_zeros(1), update, _first


@optimizer
def adagrad(step_size: LearningRate, momentum: float = 0.9) -> ArrayRule:
    """Adagrad with momentum: `s ← s + g²`, `m ← (1 - μ)·(g / √s) + μ·m`, `x ← x - α·m`, with `0 / √0` taken as 0.

    Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning and stochastic optimization",
    https://jmlr.org/papers/v12/duchi11a.html.

    Args:
        step_size: α, the learning rate: a scalar, shape (), or a schedule.
        momentum: μ, the share of m kept from step to step, in [0, 1); the paper has 0.

    Returns:
        An optimizer. State per leaf: x, the sum of squares s and the average m, of the leaf's shape and dtype.
    """
    alpha = learning_rate(step_size)

    def update(i: Step, g: Any, state: Any) -> Any:
        x, s, m = state
        s = s + jnp.square(g)
        m = (1.0 - momentum) * (g * _inverse_root(s)) + momentum * m
        return x - alpha(i, m) * m, s, m

    return _with_zeros(2), update, _first


@optimizer
def rmsprop(step_size: LearningRate, gamma: float = 0.9, eps: float = 1e-8) -> ArrayRule:
    """RMSProp: `s ← γ·s + (1 - γ)·g²`, `x ← x - α·g / √(s + ε)`.

    Hinton, "Neural networks for machine learning", lecture 6e,
    https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf.

    Args:
        step_size: α, the learning rate: a scalar, shape (), or a schedule.
        gamma: γ, the share of the mean square kept from step to step, in [0, 1).
        eps: ε, added to the mean square, in units of g².

    Returns:
        An optimizer. State per leaf: x and the mean square s, of the leaf's shape and dtype.
    """
    alpha = learning_rate(step_size)

    def update(i: Step, g: Any, state: Any) -> Any:
        x, s = state
        s = s * gamma + jnp.square(g) * (1.0 - gamma)
        return x - alpha(i, g) * g / jnp.sqrt(s + eps), s

    return _with_zeros(1), update, _first


@optimizer
def rmsprop_momentum(
    step_size: LearningRate, gamma: float = 0.9, eps: float = 1e-8, momentum: float = 0.9
) -> ArrayRule:
    """RMSProp with momentum: `s ← γ·s + (1 - γ)·g²`, `v ← μ·v + α·g / √(s + ε)`, `x ← x - v`.

    Hinton, lecture 6e as for `rmsprop`, with the momentum of Graves, "Generating sequences with recurrent neural
    networks", https://arxiv.org/abs/1308.0850.

    Args:
        step_size: α, the learning rate: a scalar, shape (), or a schedule.
        gamma: γ, the share of the mean square kept from step to step, in [0, 1).
        eps: ε, added to the mean square, in units of g².
        momentum: μ, the share of the velocity kept from step to step, in [0, 1).

    Returns:
        An optimizer. State per leaf: x, the mean square s and the velocity v, of the leaf's shape and dtype.
    """
    alpha = learning_rate(step_size)

    def update(i: Step, g: Any, state: Any) -> Any:
        x, s, v = state
        s = s * gamma + jnp.square(g) * (1.0 - gamma)
        v = momentum * v + alpha(i, g) * g / jnp.sqrt(s + eps)
        return x - v, s, v

    return _with_zeros(2), update, _first


@optimizer
def adam(step_size: LearningRate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> ArrayRule:
    """Adam: `m ← (1 - β₁)·g + β₁·m`, `v ← (1 - β₂)·g² + β₂·v`, `x ← x - α·m̂ / (√v̂ + ε)`.

    The averages are freed of their bias towards zero first: `m̂ = m / (1 - β₁^(i+1))`, `v̂ = v / (1 - β₂^(i+1))`.
    Kingma and Ba, "Adam: a method for stochastic optimization", algorithm 1, https://arxiv.org/abs/1412.6980.

    Args:
        step_size: α, the learning rate: a scalar, shape (), or a schedule.
        b1: β₁, the share of m kept from step to step, in [0, 1).
        b2: β₂, the share of v kept from step to step, in [0, 1).
        eps: ε, added to the root of v̂, in units of g.

    Returns:
        An optimizer. State per leaf: x and the moments m and v, of the leaf's shape and dtype.
    """
    alpha = learning_rate(step_size)

    def update(i: Step, g: Any, state: Any) -> Any:
        x, m, v = state
        m = (1 - b1) * g + b1 * m
        v = (1 - b2) * jnp.square(g) + b2 * v
        m_hat = m / _unbias(b1, i, m)
        v_hat = v / _unbias(b2, i, m)
        return x - alpha(i, m_hat) * m_hat / (jnp.sqrt(v_hat) + eps), m, v

    return _with_zeros(2), update, _first


@optimizer
def adamax(step_size: LearningRate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> ArrayRule:
    """AdaMax: `m ← (1 - β₁)·g + β₁·m`, `u ← max(β₂·u, |g|)`, `x ← x - α / (1 - β₁^(i+1))·m / (u + ε)`.

    Kingma and Ba, "Adam: a method for stochastic optimization", algorithm 2, https://arxiv.org/abs/1412.6980, with ε
    added so that a gradient that has always been zero moves nothing.

    Args:
        step_size: α, the learning rate: a scalar, shape (), or a schedule.
        b1: β₁, the share of m kept from step to step, in [0, 1).
        b2: β₂, the share of u kept from step to step, in [0, 1).
        eps: ε, added to u, in units of g.

    Returns:
        An optimizer. State per leaf: x, the average m and the greatest gradient u, of the leaf's shape and dtype.
    """
    alpha = learning_rate(step_size)

    def update(i: Step, g: Any, state: Any) -> Any:
        x, m, u = state
        m = (1 - b1) * g + b1 * m
        u = jnp.maximum(b2 * u, jnp.abs(g))
        return x - (alpha(i, m) / _unbias(b1, i, m)) * m / (u + eps), m, u

    return _with_zeros(2), update, _first


@optimizer
def sm3(step_size: LearningRate, momentum: float = 0.9) -> ArrayRule:
    """SM3-II with momentum: `s ← min_r v_r + g²`, `m ← (1 - μ)·(g / √s) + μ·m`, `x ← x - α·m`, `v_r ← max_{≠r} s`.

    Axis r of a leaf keeps one vector v_r of that axis's length; s, of the leaf's shape, is never kept. A leaf of shape
    () is treated as one of shape (1,). Anil et al., "Memory-efficient adaptive optimization",
    https://arxiv.org/abs/1901.11150.

    Args:
        step_size: α, the learning rate: a scalar, shape (), or a schedule.
        momentum: μ, the share of m kept from step to step, in [0, 1).

    Returns:
        An optimizer. State per leaf: x and m, of the leaf's shape, and the list of v_r, shape (d_r,), all of its dtype;
        besides the leaf's shape itself, as structure and not as an array.
    """
    alpha = learning_rate(step_size)

    def init(x0: Any) -> Any:
        x = jnp.atleast_1d(x0)
        return x, jnp.zeros_like(x), [jnp.zeros(d, x.dtype) for d in x.shape], _LeafShape(jnp.shape(x0))

    def update(i: Step, g: Any, state: Any) -> Any:
        x, m, vs, shape = state
        s = _cover(vs) + jnp.square(g)
        m = (1.0 - momentum) * (g * _inverse_root(s)) + momentum * m
        vs = [_greatest(s, axis) if s.size else v for axis, v in enumerate(vs)]
        return x - alpha(i, m) * m, m, vs, shape

    def get_params(state: Any) -> Any:
        x, _, _, shape = state
        return jnp.reshape(x, shape.lengths)

    return init, update, get_params


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _LeafShape:
    """A leaf's shape as part of the structure of its state, where `jit` does not turn it into traced numbers."""

    lengths: tuple[int, ...]


def _with_zeros(count: int) -> Any:
    """Gives the init of a rule whose state is x and `count` arrays of zeros like it."""

    def init(x0: Any) -> tuple[Any, ...]:
        return x0, *(jnp.zeros_like(x0) for _ in range(count))

    return init


def _first(state: Sequence[Any]) -> Any:
    return state[0]


def _inverse_root(s: Any) -> jax.Array:
    """Gives `1 / √s`, and 0 where nothing but zeros has been summed up."""
    return jnp.where(s > 0, 1.0 / jnp.sqrt(s), 0.0)


def _unbias(beta: float, i: Any, m: Any) -> Any:
    """Gives `1 - β^(i+1)` in the dtype of `m`: what an average that began at zero has seen of its values."""
    return 1 - jnp.asarray(beta, m.dtype) ** (i + 1)


def _cover(vs: Sequence[Any]) -> Any:
    """Gives, for each entry of the leaf, the least of the values its axes keep for it."""
    rank = len(vs)
    spread = [jnp.expand_dims(v, [a for a in range(rank) if a != axis]) for axis, v in enumerate(vs)]
    return functools.reduce(jnp.minimum, spread)


def _greatest(s: Any, axis: int) -> Any:
    return jnp.max(s, axis=[a for a in range(s.ndim) if a != axis])
