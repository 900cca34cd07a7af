"""Gradients that make one step together, summed: the same bits on every run, for one order.

In NumPy, on purpose: the gradients are in the host's memory, whatever the device; one payload goes on to the device
instead of all; and no program is compiled for each number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from optwire_proto import tensors, trees
from optwire_server.engine import landing

# Elements that are summed at once: small enough that they stay in the cache while each worker's are added.
_BLOCK = 32_768
# And after how many of them others get their turn: a million elements.
_BLOCKS_A_TURN = 32


def into_first(
    pushes: Sequence[Sequence[tensors.Array]], factors: Sequence[float] = (), divisor: float = 0.0
) -> Iterator[None]:
    """Writes the sum of several workers' gradients, divided, over those of the first, yielding now and then.

    ``((f[0] * g[0] + f[1] * g[1]) + f[2] * g[2] ...) / divisor`` for each element, in the leaf's element type, but in
    32 bits at least, and then rounded once to that type.

    Args:
      pushes: one sequence of arrays for each worker, in the order in which they are added; contiguous, equal in shapes
        and element types.
      factors: one for each worker; empty: 1.
      divisor: of the sum; 0: the number of workers.
    """
    divisor = divisor or float(len(pushes))
    if len(pushes) == 1 and not factors and divisor == 1.0:
        return
    for done, blocks in enumerate(_blocks(*pushes), 1):
        _combine(blocks, factors, divisor, blocks[0])
        if done % _BLOCKS_A_TURN == 0:
            yield


class Gathered:
    """Gradients of several pushes, whose sum, divided, is taken where it is read: block by block, into the cache.

    Args:
      pushes: in the order in which they are added; of the same leaves in the same layout. Nothing is written to them.
      factors: as those of ``into_first``.
      divisor: as that of ``into_first``.
    """

    def __init__(self, pushes: Sequence[landing.Landing], factors: Sequence[float] = (), divisor: float = 0.0) -> None:
        self._pushes = pushes
        self._factors = factors
        self._divisor = divisor or float(len(pushes))

    @property
    def divisor(self) -> float:
        """What the sum is divided by."""
        return self._divisor

    def plain(self, offset: int, size: int, dtype: np.dtype[Any]) -> list[np.ndarray[Any, Any]]:
        """The elements of each push that lie in its payload from a byte on, flat; none where they have factors."""
        if self._factors:
            return []
        return [push.memory[offset : offset + size * dtype.itemsize].view(dtype) for push in self._pushes]

    def read(self, offset: int, out: np.ndarray[Any, Any]) -> None:
        """Writes the elements that lie in a payload from a byte on to ``out``, as many as it has; flat."""
        memories = (push.memory[offset : offset + out.nbytes].view(out.dtype) for push in self._pushes)
        for blocks in _blocks([out], *([memory] for memory in memories)):
            _combine(blocks[1:], self._factors, self._divisor, blocks[0])

    def arrays(self) -> Iterator[tensors.Array]:
        """The sum of each leaf, one after the other, in new memory."""
        for leaf in zip(*(push.arrays() for push in self._pushes), strict=True):
            out = np.empty(leaf[0].shape, leaf[0].dtype)
            for blocks in _blocks([out], *([array] for array in leaf)):
                _combine(blocks[1:], self._factors, self._divisor, blocks[0])
            yield out


class Sum:
    """Gradients that are added as they come: one array for each leaf, in its element type but in 32 bits at least."""

    def __init__(self) -> None:
        self._total: list[np.ndarray[Any, Any]] = []
        self._is_empty = True

    def begin(self) -> None:
        """Forgets what was added."""
        self._is_empty = True

    def add(self, grads: Sequence[tensors.Array], factor: float) -> Iterator[None]:
        """Adds ``factor`` times the gradients of a push, yielding now and then; all pushes have the same leaves."""
        is_first, self._is_empty = self._is_empty, False
        if is_first and [array.size for array in self._total] != [array.size for array in grads]:
            self._total = [np.empty(array.shape, _wide(array.dtype)) for array in grads]
        for done, (total, block) in enumerate(_blocks(self._total, grads), 1):
            with np.errstate(all="ignore"):
                if is_first:
                    np.multiply(block, factor, out=total, dtype=total.dtype)
                else:
                    total += _times(block, factor)
            if done % _BLOCKS_A_TURN == 0:
                yield

    def end(self, grads: Sequence[tensors.Array], factor: float, divisor: float) -> Iterator[None]:
        """Adds the last push, and writes the sum over its gradients, divided, and rounded once to their type."""
        for done, (total, block) in enumerate(_blocks(self._total, grads), 1):
            with np.errstate(all="ignore"):
                block[:] = (total + _times(block, factor)) / divisor
            if done % _BLOCKS_A_TURN == 0:
                yield


def sum_bytes(tree: trees.TreeSpec) -> int:
    """Bytes of memory that a ``Sum`` takes, of gradients for all leaves of a tree."""
    wide = (_wide(tensors.numpy_dtype(leaf.dtype)).itemsize * leaf.elements for leaf in tree.leaves)
    return sum(wide)


def compensate(
    grads: Sequence[tensors.Array], moves: Sequence[tuple[tensors.Array, tensors.Array]], strength: float
) -> Iterator[None]:
    """Writes ``g + strength * g * g * (new - old)`` over gradients, elementwise, yielding now and then.

    Args:
      grads: real, contiguous.
      moves: for each of them the old and the new parameters.
      strength: the factor.
    """
    for done, (grad, old, new) in enumerate(_blocks(grads, *zip(*moves, strict=True)), 1):
        with np.errstate(all="ignore"):
            grad += strength * grad * grad * (new - old)
        if done % _BLOCKS_A_TURN == 0:
            yield


def _blocks(*pushes: Sequence[tensors.Array]) -> Iterator[list[np.ndarray[Any, Any]]]:
    """The same elements of several arrays at a time, of one leaf after the other, as flat views."""
    for leaf in zip(*pushes, strict=True):
        arrays = [_numbers(array) for array in leaf]
        for start in range(0, arrays[0].size, _BLOCK):
            yield [array[start : start + _BLOCK] for array in arrays]


def _combine(
    blocks: Sequence[np.ndarray[Any, Any]], factors: Sequence[float], divisor: float, out: np.ndarray[Any, Any]
) -> None:
    """Writes the sum of blocks, divided, to ``out``, which may be one of them; rounded once to its type."""
    with np.errstate(all="ignore"):  # what is not finite, the update will see
        total = blocks[0].astype(_wide(out.dtype))
        if factors:
            total *= factors[0]
        for index, block in enumerate(blocks[1:], 1):
            total += _times(block, factors[index]) if factors else block
        total /= divisor
        out[:] = total


def _times(block: np.ndarray[Any, Any], factor: float) -> np.ndarray[Any, Any]:
    """A block times a number, in the element type of sums."""
    wide = _wide(block.dtype)
    product: np.ndarray[Any, Any] = np.multiply(block, wide.type(factor), dtype=wide)
    return product


def _numbers(array: tensors.Array) -> tensors.Array:
    """A flat view; of complex numbers, one of their parts: NumPy would divide them by a complex number of workers."""
    flat = array.reshape(-1)
    return flat.view(flat.real.dtype) if flat.dtype.kind == "c" else flat


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The element type that sums of a type are taken in."""
    return np.promote_types(dtype, np.float32)
