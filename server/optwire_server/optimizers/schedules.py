"""Learning rates over the steps: schedules, and the learning rate as a rule applies it to one leaf.

Knows step indices and scalars. Must not know trees, optimizer states or any update rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from optwire_server.optimizers.precision import scalar_like
from optwire_server.optimizers.state import Step

Scalar: TypeAlias = float | jax.Array
"""A number or an array of shape (), traced or not."""

Schedule: TypeAlias = Callable[[Any], Any]
"""A learning rate for each step: a positive scalar of the step's index."""


def constant(step_size: Scalar) -> Schedule:
    """The same learning rate at every step: `α_i = α`.

    Args:
        step_size: α, a positive scalar.
    """

    def schedule(i: Step) -> Any:
        return step_size

    return schedule


def exponential_decay(step_size: Scalar, decay_steps: Scalar, decay_rate: Scalar) -> Schedule:
    """A learning rate that falls by the same factor every `decay_steps` steps: `α_i = α · r^(i / n)`.

    Args:
        step_size: α, the learning rate of step 0.
        decay_steps: n, in steps; need not be whole.
        decay_rate: r, the factor per n steps.
    """

    def schedule(i: Any) -> Any:
        return step_size * decay_rate ** (i / decay_steps)

    return schedule


def inverse_time_decay(step_size: Scalar, decay_steps: Scalar, decay_rate: Scalar, staircase: bool = False) -> Schedule:
    """A learning rate that falls as one over the time passed: `α_i = α / (1 + r · i / n)`.

    Args:
        step_size: α, the learning rate of step 0.
        decay_steps: n, in steps.
        decay_rate: r, how much the divisor grows per n steps.
        staircase: hold the learning rate between multiples of n, that is, take `floor(i / n)` for `i / n`.
    """

    def schedule(i: Any) -> Any:
        if staircase:
            return step_size / (1 + decay_rate * jnp.floor(i / decay_steps))
        return step_size / (1 + decay_rate * i / decay_steps)

    return schedule


def polynomial_decay(step_size: Scalar, decay_steps: Scalar, final_step_size: Scalar, power: Scalar = 1.0) -> Schedule:
    """A learning rate that falls to its last value along a power: `α_i = (α - ω) · (1 - min(i, n) / n)^p + ω`.

    Compiled code multiplies by `1 / n`, which may leave the base a rounding error below zero at step n. A whole power
    takes that error as it is; for any other the base is held at zero, since its power would not be a number.

    Args:
        step_size: α, the learning rate of step 0.
        decay_steps: n, in steps; the learning rate is ω from there on.
        final_step_size: ω.
        power: p, positive.
    """
    whole = isinstance(power, int | float) and float(power).is_integer()

    def schedule(i: Any) -> Any:
        base = 1 - jnp.minimum(i, decay_steps) / decay_steps
        factor = (base if whole else jnp.maximum(base, 0)) ** power
        return factor * (step_size - final_step_size) + final_step_size

    return schedule


def piecewise_constant(boundaries: Sequence[Any] | jax.Array, values: Sequence[Any] | jax.Array) -> Schedule:
    """A learning rate that changes at given steps: `α_i = values[number of boundaries below i]`.

    Args:
        boundaries: steps in ascending order, shape (k,); the new value holds from the step after each.
        values: the learning rates, shape (k + 1,).

    Raises:
        ValueError: either is not a flat sequence, or there is not one boundary fewer than there are values.
    """
    steps, rates = jnp.shape(jnp.array(boundaries)), jnp.shape(jnp.array(values))
    if not len(steps) == len(rates) == 1:
        raise ValueError(f"boundaries and values must each be a flat sequence, not of shapes {steps} and {rates}")
    if steps[0] != rates[0] - 1:
        raise ValueError(f"{rates[0]} values need one boundary fewer, not {steps[0]}")

    def schedule(i: Any) -> Any:
        return jnp.array(values)[jnp.sum(i > jnp.array(boundaries))]

    return schedule


def make_schedule(scalar_or_schedule: Scalar | Schedule) -> Schedule:
    """Gives a schedule as it is, and makes a constant one of a scalar.

    Args:
        scalar_or_schedule: a callable of the step's index, or a number or array of shape (), traced or not.

    Raises:
        TypeError: it is neither.
    """
    if callable(scalar_or_schedule):
        return scalar_or_schedule
    if not isinstance(scalar_or_schedule, int | float) and getattr(scalar_or_schedule, "ndim", None) != 0:
        raise TypeError(f"a learning rate is a scalar or a schedule, not {scalar_or_schedule!r}")
    return constant(scalar_or_schedule)


def learning_rate(step_size: Scalar | Schedule) -> Callable[[Step, Any], Any]:
    """Gives the learning rate as a function of the step and of the array it multiplies, in that array's dtype.

    Args:
        step_size: a positive scalar, traced or not, or a schedule.
    """
    schedule = make_schedule(step_size)
    return lambda i, like: scalar_like(schedule(i), like)
