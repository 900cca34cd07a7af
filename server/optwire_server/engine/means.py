"""Means: what adds up a block's gradients of several pushes, and divides them; compiled for each number of pushes.

The same bits as ``mean`` has, but that JAX takes numbers below the smallest normal one for zero, as in the update.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from optwire_server.engine import recipe

# For more pushes than that nothing is compiled.
PUSHES_MAX: Final = 16


class Means:
    """The means of one program. Thread-safe; compiles on the thread that calls ``prepare``."""

    def __init__(self, given: recipe.Recipe) -> None:
        self._recipe = given
        self._lock = threading.Lock()
        self._made: dict[tuple[int, np.dtype[Any], int], Any] = {}

    def prepare(self, size: int, dtype: np.dtype[Any], pushes: int) -> None:
        """Compiles what takes the mean of so many pushes' blocks, unless it is, or NumPy will do."""
        key = size, dtype, pushes
        if key in self._made or not 2 <= pushes <= PUSHES_MAX or np.issubdtype(dtype, np.complexfloating):
            return
        with self._lock, self._recipe.building():
            grads = [jax.ShapeDtypeStruct((size,), dtype)] * pushes
            divisor = jax.ShapeDtypeStruct((), np.promote_types(dtype, np.float32))
            self._made[key] = self._recipe.compiled.get(jax.make_jaxpr(_mean)(divisor, *grads), (0,)).run

    def take(self, blocks: Sequence[np.ndarray[Any, Any]], divisor: float) -> Any:
        """The sum of blocks in their order, divided by their number or by 1; None where nothing is compiled for it."""
        first = blocks[0]
        run = self._made.get((first.size, first.dtype, len(blocks)))
        if run is None:
            return None
        with self._recipe.precision():
            (made,) = run(np.promote_types(first.dtype, np.float32).type(divisor), *blocks)
        return made


def _mean(divisor: Any, *grads: Any) -> Any:
    total = grads[0].astype(divisor.dtype)
    for grad in grads[1:]:
        total = total + grad.astype(divisor.dtype)
    if len(grads) & (len(grads) - 1):
        # For a single divisor XLA multiplies by its reciprocal, which is exact for powers of two only.
        divisor = jnp.where(total == total, divisor, 1)
    return (total / divisor).astype(grads[0].dtype)
