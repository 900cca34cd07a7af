"""Movers: what gathers elements of a block's arrays, and scatters them into these; compiled when first needed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from optwire_server.engine import cut, kernel, recipe

# Elements that one call moves: what is fewer is padded, so that few programs serve all.
_COUNTS: Final = (512, cut.SMALL, cut.BLOCK)

Array = np.ndarray[Any, Any]


class Movers:
    """The movers of one program. Thread-safe; compiles on the calling thread.

    Args:
      given: what the program's kernels have in common.
      is_host: whether arrays are in the host's memory, where NumPy reads them in less time than a call takes.
    """

    def __init__(self, given: recipe.Recipe, *, is_host: bool) -> None:
        self._recipe = given
        self._is_host = is_host
        self._lock = threading.Lock()
        self._made: dict[tuple[tuple[Any, ...], int, int], tuple[Any, Any]] = {}

    def prepare(self, each: kernel.Kernel, size: int, most: int) -> None:
        """Compiles what moves up to ``most`` elements of a block of a size, unless it is."""
        for count in _COUNTS:
            self._get(each, size, count)
            if count >= min(most, size):
                return

    def gather(self, each: kernel.Kernel, own: Sequence[Any], positions: Array) -> list[Array]:
        """The elements of a block's own arrays at some positions, ascending."""
        if self._is_host:
            return [np.asarray(array)[positions] for array in own]
        padded = _padded(positions, own[0].size)
        take = self._get(each, own[0].size, padded.size)[0]
        with self._recipe.precision():
            taken = take(padded, *own)
        return [np.asarray(array)[: positions.size] for array in taken]

    def scatter(self, each: kernel.Kernel, own: Sequence[Any], positions: Array, values: Sequence[Array]) -> list[Any]:
        """A block's own arrays with other values at some positions, ascending; written over the old ones."""
        padded = _padded(positions, own[0].size)
        given = [np.zeros(padded.size, array.dtype) for array in own]
        for array, value in zip(given, values, strict=True):
            array[: positions.size] = value
        put = self._get(each, own[0].size, padded.size)[1]
        with self._recipe.precision():
            made: list[Any] = put(padded, *given, *own)
        return made

    def _get(self, each: kernel.Kernel, size: int, count: int) -> tuple[Any, Any]:
        """What gathers, and what scatters."""
        dtypes = tuple(each.arrays[at].dtype for at in each.own)
        key = dtypes, size, count
        with self._lock:
            if key not in self._made:
                with self._recipe.building():
                    self._made[key] = self._compiled(dtypes, size, count)
            return self._made[key]

    def _compiled(self, dtypes: Sequence[Any], size: int, count: int) -> tuple[Any, Any]:
        where = jax.ShapeDtypeStruct((count,), jnp.int32)
        few = [jax.ShapeDtypeStruct((count,), dtype) for dtype in dtypes]
        block = [jax.ShapeDtypeStruct((size,), dtype) for dtype in dtypes]
        get, number = self._recipe.compiled.get, len(dtypes)
        taken = None if self._is_host else get(jax.make_jaxpr(_taken)(where, *block), range(number)).run
        put = get(jax.make_jaxpr(_put)(where, *few, *block), range(number), range(1 + number, 1 + 2 * number)).run
        return taken, put


def _taken(where: Any, *arrays: Any) -> list[Any]:
    return [array.at[where].get(mode="clip", indices_are_sorted=True) for array in arrays]


def _put(where: Any, *given: Any) -> list[Any]:
    values, arrays = given[: len(given) // 2], given[len(given) // 2 :]
    return [
        array.at[where].set(value, mode="drop", unique_indices=True, indices_are_sorted=True)
        for value, array in zip(values, arrays, strict=True)
    ]


def _padded(positions: Array, size: int) -> Array:
    """As many positions as a mover takes; those beyond the end of a block are padding, and dropped."""
    count = next(count for count in _COUNTS if count >= positions.size)
    padded = np.arange(size - positions.size, size - positions.size + count, dtype=np.int32)
    padded[: positions.size] = positions
    return padded
