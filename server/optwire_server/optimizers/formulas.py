"""Update rules from the formula for one real array: numbers as operands, scalars among the slots, element types.

Each rule is ``(init, update)`` over a list of leaves: ``init(params, alone) -> slots`` and ``update(grads, params,
slots) -> (params, slots)``. Slots are named tuples; ``step`` counts updates, once for all leaves, or for each alone. A
``None`` in them is what these arguments do not keep. Leaves of 16 bits are computed in 32; complex leaves as their real
and imaginary parts, each by itself.

Must not know trees, sessions or specs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax

Leaves: TypeAlias = list[Any]
Slots: TypeAlias = Any
Rate: TypeAlias = Callable[[Any], Any]
"""From the number of updates so far, shape (), int32, to the learning rate of the next one."""


class Number(NamedTuple):
    """A number of 64 bits as two of 32, for programs that have no others.

    Attributes:
        value: the nearest one of 32 bits. shape=()
        rest: what is missing to it. shape=()
    """

    value: Any
    rest: Any

    @classmethod
    def of(cls, value: float) -> Number:
        """Both parts of a Python number."""
        return cls(*halves(value))

    @property
    def whole(self) -> Any:
        """The number, in the widest type of the program. shape=()"""
        return scalar(self.value) + scalar(self.rest)

    @property
    def complement(self) -> Any:
        """One minus the number, to the last digit: of 0.999 in 32 bits, 1e-5 of it would be lost. shape=()"""
        return (1 - scalar(self.value)) - scalar(self.rest)

    @property
    def log(self) -> Any:
        return jnp.log1p(-self.complement)

    def unbiased(self, t: Any) -> Any:
        """One minus the t-th power: what an average that began at zero has seen after t values. shape=()"""
        return -jnp.expm1(t * self.log)


def halves(value: float) -> tuple[float, float]:
    """A number as the nearest one of 32 bits, and what is missing to it."""
    nearest = float(np.float32(value))
    return nearest, value - nearest


class Rule(NamedTuple):
    """An optimizer over a list of leaves.

    Attributes:
        init: (params, alone) -> slots. What is of shape () there is one for all leaves; alone, a list of one for each.
        update: (grads, params, slots) -> (params, slots).
    """

    init: Callable[[Leaves, bool], Slots]
    update: Callable[[Leaves, Leaves, Slots], tuple[Leaves, Slots]]


Coefficients: TypeAlias = tuple[tuple[Any, ...], tuple[Any, ...]]
"""What an update multiplies by, and the scalars among the slots afterwards; each of shape ()."""


def lifted(
    kind: Callable[..., Slots],
    starts: dict[str, Any],
    coefficients: Callable[..., Coefficients],
    element: Callable[[Any, Any, Slots, Sequence[Any]], tuple[Any, Slots]],
    maximize: bool = False,
    **scalars: Callable[[], Any],
) -> Rule:
    """The rule of a formula for one real array.

    Args:
        kind: named tuple of the slots.
        starts: by name what an array of a leaf starts with: a number, a Number, a rate; None: there is none.
        coefficients: (updates so far, t, the scalars) -> Coefficients.
        element: (g, x, the leaf's arrays, coefficients in its type) -> (x, the leaf's arrays).
        maximize: whether gradients are turned around first.
        scalars: by name what a scalar beside the step starts with.
    """
    kept = [name for name, start in starts.items() if start is not None]

    def init(params: Leaves, alone: bool) -> Slots:
        def each(start: Callable[[], Any]) -> Any:
            return [start() for _ in params] if alone else start()

        shared = {name: each(start) for name, start in scalars.items()}
        arrays = {name: [_filled(x, starts[name]) for x in params] if name in kept else None for name in starts}
        return kind(step=each(zero), **shared, **arrays)

    def update(grads: Leaves, params: Leaves, slots: Slots) -> tuple[Leaves, Slots]:
        alone = isinstance(slots.step, list)
        shared = [getattr(slots, name) for name in ("step", *scalars)]
        counts = list(zip(*shared, strict=True)) if alone else [tuple(shared)]
        made = [coefficients(step, scalar(step + 1), *numbers) for step, *numbers in counts]
        moved = []
        for i, (g, x) in enumerate(zip(grads, params, strict=True)):
            own = tuple(getattr(slots, name)[i] for name in kept)
            # Behind a barrier of its own a leaf is computed in the same way whatever else is compiled with it.
            c = lax.optimization_barrier(made[i if alone else 0][0])
            moved.append(_moved(element, -g if maximize else g, x, own, c))
        afters = [(step + 1, *after) for (step, *_), (_, after) in zip(counts, made, strict=True)]
        after = afters[0] if afters else [[] for _ in shared]  # of a rule that keeps each leaf by itself, and has none
        if alone and afters:
            after = [list(numbers) for numbers in zip(*afters, strict=True)]
        arrays = {name: [own[k] for _, own in moved] for k, name in enumerate(kept)}
        return [x for x, _ in moved], slots._replace(**dict(zip(("step", *scalars), after, strict=True)), **arrays)

    return Rule(init, update)


def _moved(element: Callable[..., Any], g: Any, x: Any, own: Slots, c: Sequence[Any]) -> tuple[Any, Slots]:
    """One leaf and its arrays after an update, in the types they had."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        real = _moved(element, jnp.real(g), jnp.real(x), tuple(map(jnp.real, own)), c)
        imag = _moved(element, jnp.imag(g), jnp.imag(x), tuple(map(jnp.imag, own)), c)
        return lax.complex(real[0], imag[0]), tuple(map(lax.complex, real[1], imag[1]))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    arrays = (array.astype(wide) for array in (g, x, *own))
    g_wide, x_wide, *own_wide = arrays
    new, slots = element(g_wide, x_wide, tuple(own_wide), [scalar.astype(wide) for scalar in c])
    return new.astype(x.dtype), tuple(after.astype(before.dtype) for after, before in zip(slots, own, strict=True))


def _filled(x: Any, start: Any) -> Any:
    """An array like a leaf; the parts of a complex one are filled alike."""
    if isinstance(start, float):
        return jnp.full_like(x, start)
    number = start.whole if isinstance(start, Number) else scalar(start(zero()))
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        number = lax.complex(number, number)
    return jnp.full_like(x, number)


def zero() -> Any:
    return jnp.zeros((), jnp.int32)


def scalar(number: Any) -> Any:
    """A number in the widest type of the program. shape=()"""
    return jnp.asarray(number, jnp.result_type(float))


def product(a: Any, b: Any) -> Any:
    """`a·b`, rounded by itself, as torch does, and not in one with a sum that it goes into.

    Rounding errors of `x·(1 - α·λ)` have the same sign for many steps. A compiler does not see through the choice.
    """
    product = a * b
    return jnp.where(jnp.isnan(product), a, product)


def mixed(m: Any, g: Any, kept: Any, new: Any) -> Any:
    """`kept·m + new·g`, where kept + new is 1, from the nearer end: an average of equal values is that value."""
    return jnp.where(new < 0.5, m + new * (g - m), g - kept * (g - m))
