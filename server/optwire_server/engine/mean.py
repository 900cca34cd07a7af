"""The mean of gradients that make one step together: the same bits on every run, whoever was first.

In NumPy, on purpose: the gradients are in the host's memory, whatever the device; one payload goes on to the device
instead of all; and no program is compiled for each number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from optwire_proto import tensors

# Elements that are summed at once: small enough that they stay in the cache while each worker's are added.
_BLOCK = 32_768
# And after how many of them others get their turn: a million elements.
_BLOCKS_A_TURN = 32


def into_first(pushes: Sequence[Sequence[tensors.Array]]) -> Iterator[None]:
    """Writes the mean of several workers' gradients over those of the first, yielding now and then.

    ``((g[0] + g[1]) + g[2] ...) / n`` for each element, in the leaf's element type, but in 32 bits at least, and then
    rounded once to that type.

    Args:
      pushes: one sequence of arrays for each worker, in the order in which they are added; contiguous, equal in shapes
        and element types.
    """
    done = 0
    for leaf in zip(*pushes, strict=True):
        arrays = [_numbers(array) for array in leaf]
        for start in range(0, arrays[0].size, _BLOCK):
            _mean_of_block([array[start : start + _BLOCK] for array in arrays])
            done += 1
            if done % _BLOCKS_A_TURN == 0:
                yield


def _mean_of_block(arrays: Sequence[np.ndarray[Any, Any]]) -> None:
    first = arrays[0]
    wide = _wide(first.dtype)
    count = wide.type(len(arrays))  # of its type, so that nothing is promoted
    with np.errstate(all="ignore"):  # what is not finite, the update will see
        total = first.astype(wide)
        for array in arrays[1:]:
            total += array
        first[:] = total / count


def _numbers(array: tensors.Array) -> tensors.Array:
    """A flat view; of complex numbers, one of their parts: NumPy would divide them by a complex number of workers."""
    flat = array.reshape(-1)
    return flat.view(flat.real.dtype) if flat.dtype.kind == "c" else flat


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The element type that sums of a type are taken in."""
    return np.promote_types(dtype, np.float32)
