"""Sums over all leaves of a session that is cut into blocks: a global norm, whether everything is finite.

A kernel is the rule traced for one block. Where the rule asks for a sum over all leaves, a `Reducer` that is active on
the thread takes the block's part of it as a **partial**, and gives the rule an operand for the sum of all. One trace
therefore serves several programs:

    def traced(reduced, valid, operands, grads, common, own):
        with reductions.reducing(reduced, valid) as reducer:
            new = made.update(grads, state, call)
        return new, reducer.partials

- Partial program `k` of R returns `partials[k]` alone, needs no more of `reduced` than the first `k`, donates nothing.
- `combine` adds what it gave for each block, in the order of blocks, on the host: that is `reduced[k]`. Partials are of
  64 bits in every program, sums of those that the program has.
- The apply program takes all of `reduced` and returns the new state.

R is the number of partials of a trace with `reducing(())`, whose sums are zeros; it depends on the variant, and must be
the same for all kinds, as the order of the calls is. A partial that is no tracer is the same number for every block of
the kind, 0 mostly: it needs no program. `opaque` is what the analysis of granularity looks at.

Without a reducer, and where the sum is asked for inside of another trace, such as a branch, it is that of the leaves at
hand: whoever analyses the update sees that it ties them. Must not know rules, specs or sessions.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

# Arrays are folded, half onto half, until so many elements are left, and these are added in 64 bits. XLA gives each of
# its threads a part of the elements of a reduction, so that the last bit depends on how many there are; with additions
# of whole arrays it has no choice. And a sum so wide is rounded once, all but the same however leaves are cut.
_FOLDED: Final = 4096


class Reducer:
    """What takes the partials of one trace.

    Attributes:
      partials: the block's part of each sum, in the order the rule asked for them. shape=(), float64, each
      values: what was summed, of all the sums, before any padding was masked; one or more arrays a sum.
      reduced: the sums.
      valid: how many elements of the block count.
    """

    def __init__(self, reduced: Sequence[Any], valid: Any) -> None:
        self.partials: list[Any] = []
        self.values: list[Any] = []
        self.reduced = tuple(reduced)
        self.valid = valid
        self._trace = core.get_opaque_trace_state()

    @property
    def is_inside(self) -> bool:
        """Whether the trace that is running is one inside that of the reducer, whose values cannot leave it."""
        return bool(core.get_opaque_trace_state() != self._trace)

    def total(self, arrays: Sequence[Any], values: Sequence[Any]) -> Any:
        """The sum over all blocks of arrays of this one, which are made of values."""
        position = len(self.partials)
        self.values.extend(values)
        self.partials.append(_local(arrays, self.valid))
        return jnp.asarray(self.reduced[position] if position < len(self.reduced) else 0, dtype())


_active: contextvars.ContextVar[Reducer | None] = contextvars.ContextVar("reducer", default=None)


@contextlib.contextmanager
def reducing(reduced: Sequence[Any] = (), valid: Any = None) -> Iterator[Reducer]:
    """Makes sums those over all blocks, on this thread; to be entered inside of the trace of a kernel.

    Args:
      reduced: the sums, in the order the rule asks for them. shape=(), of ``dtype()``, each; those missing are 0.
      valid: how many elements of the block count, from its start; the rest is padding. None: all, or the block is no
        flat one. shape=(), int32
    """
    reducer = Reducer(reduced, valid)
    token = _active.set(reducer)
    try:
        yield reducer
    finally:
        _active.reset(token)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Makes sums those of the leaves at hand, whatever reducer is active: for rules that keep each leaf by itself."""
    token = _active.set(None)
    try:
        yield
    finally:
        _active.reset(token)


@contextlib.contextmanager
def repeating() -> Iterator[None]:
    """Gives the sums of the update again, from the first one on, and takes no partials: for what its first stage did.

    For figures, which are made after the update, of the gradients that it was given.
    """
    reducer = _crossing()
    token = _active.set(reducer and Reducer(reducer.reduced, reducer.valid))
    try:
        yield
    finally:
        _active.reset(token)


def summed(arrays: Sequence[Any]) -> Any:
    """The sum of all elements of some arrays, over all leaves of the session that the rule is given.

    Args:
      arrays: real, or flags, which are counted; in any number, of blocks' or leaves' shapes, or of shape ().

    Returns:
      The sum, taken in 32 bits at least. shape=(), of ``dtype()``
    """
    return _over_blocks(arrays, arrays)


def square_norm(leaves: Sequence[Any]) -> Any:
    """The sum of ``|x|²`` over all leaves; elements of 16 bits are squared in 32. shape=(), of ``dtype()``"""
    return summed([square(leaf) for leaf in leaves])


def all_finite(leaves: Sequence[Any]) -> Any:
    """Whether every element of every floating array is finite, over all leaves. shape=(), bool"""
    flags = [~jnp.isfinite(leaf) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    # One pass for all arrays of a shape: most are the slots and gradients of one block.
    shapes = dict.fromkeys(flag.shape for flag in flags)
    merged = [functools.reduce(operator.or_, (flag for flag in flags if flag.shape == shape)) for shape in shapes]
    return _over_blocks(merged, flags) == 0


def partial(arrays: Sequence[Any]) -> Any:
    """The sum of all elements of some arrays that are not padding, of this block or tree alone. shape=(), float64

    For figures that leave the apply program and are added afterwards: the rule cannot have their sum.
    """
    reducer = _active.get()
    return _local(arrays, reducer.valid if reducer else None)


def square(leaf: Any) -> Any:
    """``|x|²`` of each element, in 32 bits at least."""
    if jnp.iscomplexobj(leaf):
        return jnp.square(leaf.real) + jnp.square(leaf.imag)
    return jnp.square(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)))


def dtype() -> Any:
    """The element type of sums: float32, or float64 in a trace that has 64 bits."""
    return jnp.result_type(float)


def combine(partials: Iterable[Any], kind: Any) -> np.generic:
    """The sum of partials, added one after the other in 64 bits, as an operand of the element type of ``dtype()``."""
    total = np.float64(0)
    for value in partials:
        total += np.float64(value)
    with np.errstate(over="ignore"):
        operand: np.generic = total.astype(kind)
    return operand


def opaque(update: Callable[[Any, Any], Any], grads: Any, state: Any) -> tuple[Callable[[Any, Any], Any], Any]:
    """An update as whoever derives its granularity must see it: sums come from outside, what is summed goes there.

    Args:
      update: (gradients, state) -> state, to be traced.
      grads: abstract gradients.
      state: the abstract state.

    Returns:
      The same for `granularity.derive`: its state has one array more for each value that is summed, which that value
      replaces, so that it counts as what it depends on does.
    """

    def seen(grads: Any, state: Any) -> Any:
        with reducing() as reducer:
            new = update(grads, state[0])
        return new, list(reducer.values)

    _, values = jax.eval_shape(seen, grads, (state, []))
    return seen, (state, values)


def _crossing() -> Reducer | None:
    """The reducer that sums over all blocks are had from, where there is one."""
    reducer = _active.get()
    return None if reducer is None or reducer.is_inside else reducer


def _over_blocks(arrays: Sequence[Any], values: Sequence[Any]) -> Any:
    reducer = _crossing()
    return jnp.asarray(_local(arrays, None), dtype()) if reducer is None else reducer.total(arrays, values)


def _local(arrays: Sequence[Any], valid: Any) -> Any:
    """The sum of the elements at hand. A number that is no tracer where there are none. shape=(), float64"""
    total: Any = np.float64(0)
    for position, array in enumerate(arrays):
        own = _sum(_masked(array, valid))
        with jax.enable_x64(True):
            total = own if position == 0 else total + own
    return total


def _masked(array: Any, valid: Any) -> Any:
    """An array with zeros where a flat block is padded; in 32 bits at least."""
    wide = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    if valid is None or wide.ndim != 1:
        return wide
    return jnp.where(lax.iota(jnp.int32, wide.size) < valid, wide, jnp.zeros_like(wide))


def _sum(array: Any) -> Any:
    """The sum of all elements, the same whatever the number of threads. shape=(), float64"""
    flat = array.reshape(-1)
    whole = flat.size // _FOLDED * _FOLDED
    parts = [flat[whole:]] if whole < flat.size or not whole else []
    rows = flat[:whole].reshape(-1, _FOLDED)
    while rows.shape[0] > 1:
        if rows.shape[0] % 2:
            parts.append(rows[-1])
        half = rows.shape[0] // 2
        rows = rows[:half] + rows[half : 2 * half]
    parts.extend(rows)
    with jax.enable_x64(True):
        # The barrier keeps XLA from doing the additions above in 64 bits, too, at four times the cost.
        wide = [lax.convert_element_type(lax.optimization_barrier(part), np.float64) for part in parts]
        return sum((jnp.sum(part) for part in wide[1:]), jnp.sum(wide[0]))
