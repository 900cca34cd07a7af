"""Dtypes that stay what they are: rounding back to a slot's dtype, scalars that do not promote, 64 bits kept.

Knows dtypes and the precision jax computes in. Must not know trees, rules or schedules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def own_precision(*leaves: Any) -> contextlib.AbstractContextManager[Any]:
    """Gives the context to compute `leaves` in: that of 64 bits, for this thread, where jax would narrow one of them.

    Under `jit` there is nothing to do here: jax has narrowed the arguments before it calls the traced function, unless
    the caller entered `jax.enable_x64`.
    """
    narrowed = any(
        isinstance(dtype, np.dtype) and jax.dtypes.canonicalize_dtype(dtype) != dtype
        for dtype in (getattr(leaf, "dtype", None) for leaf in leaves)
    )
    return jax.enable_x64(True) if narrowed else contextlib.nullcontext()


def refuse_narrowed(g: Any, slots: Iterable[Any]) -> None:
    """Refuses a traced 32-bit gradient for slots of 64 bits while x64 is off: `jit` has narrowed it on its way in.

    Raises:
        TypeError: says what to do instead.
    """
    x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    if x64 or not isinstance(g, jax.core.Tracer) or g.dtype not in (np.float32, np.complex64):
        return
    for dtype in map(dtype_of, slots):
        if dtype in (np.float64, np.complex128):
            raise TypeError(
                f"a gradient of dtype {g.dtype} for a leaf kept in {dtype}: jit narrows 64-bit NumPy arrays while x64 "
                "is off; call the compiled function under jax.enable_x64(True)"
            )


def dtype_of(leaf: Any) -> Any:
    """Gives the dtype of an array as it is, 64 bits included, and of a Python number the one jax computes it in."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def keep_dtype(value: Any, was: Any) -> Any:
    """Rounds `value` to the dtype of `was`, whose place it takes; what has no dtype is left as it is.

    Raises:
        TypeError: the dtype of `was` has no room for it, as an integer has none for a float.
    """
    if not (_has_dtype(value) and _has_dtype(was)):
        return value
    dtype, old_dtype = dtype_of(value), dtype_of(was)
    if dtype == old_dtype:
        return value
    if not _has_room(old_dtype, dtype):
        raise TypeError(f"an update of dtype {dtype} does not fit a slot of dtype {old_dtype}, shape {jnp.shape(was)}")
    return lax.convert_element_type(value, old_dtype)


def scalar_like(scalar: Any, like: Any) -> Any:
    """Gives `scalar` in the dtype of the array it multiplies, as jax does with a Python number.

    An array, or a traced value, would otherwise promote what it multiplies: float32 times bfloat16 is float32.
    """
    if not hasattr(scalar, "dtype") or not _has_room(dtype_of(like), scalar.dtype):
        return scalar
    return lax.convert_element_type(scalar, dtype_of(like))


def widened(i: Any) -> Any:
    """Gives a step's index in integers no narrower than jax's own, so that 64 bits see a schedule of 64 bits."""
    dtype, own = getattr(i, "dtype", None), jnp.result_type(int)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer) or dtype.itemsize >= own.itemsize:
        return i
    return lax.convert_element_type(i, own)


def _has_dtype(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float | complex) or hasattr(leaf, "dtype")


def _has_room(dtype: Any, other: Any) -> bool:
    return _rung(other) <= _rung(dtype)


def _rung(dtype: Any) -> int:
    ladder = (jnp.integer, jnp.floating, jnp.complexfloating)
    return next((rung for rung, kind in enumerate(ladder, 1) if jnp.issubdtype(dtype, kind)), 0)
