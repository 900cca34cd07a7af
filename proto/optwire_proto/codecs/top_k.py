"""The values of the largest magnitude, with their positions; all others are 0."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from optwire_proto import errors, tensors, trees
from optwire_proto.codecs import codec

FRACTION: Final = 0.01
FRACTION_MAX: Final = 0.5
ELEMENTS_MAX: Final = 2**32
_MAGNITUDE: Final = np.uint32(0x7FFF_FFFF)
# Elements that the threshold is guessed from.
_SAMPLES: Final = 65_536
# How much lower than the sample suggests the threshold is guessed, in standard deviations: it is nearly always low
# enough, and then few candidates are too many.
_SPREAD: Final = 4
# Of memory for each candidate, at most: positions as they are found and joined, magnitudes, flags.
_CANDIDATE_BYTES: Final = 24


class TopK(codec.Codec):
    """``ceil(fraction * n)`` values of each leaf of n, exact, at ascending positions.

    Of equal magnitudes the one at the lower position is taken first. Infinite is larger than any number, and NaN larger
    than that.

    Args:
      fraction: of the values that are sent, more than 0. More than a half would take more bytes than all of them.

    Raises:
      InvalidArgumentError: another fraction.
    """

    kind = codec.Kind.TOP_K

    def __init__(self, fraction: float = FRACTION) -> None:
        if not 0 < fraction <= FRACTION_MAX:  # NaN is neither
            expected = f"more than 0, at most {FRACTION_MAX}"
            raise errors.InvalidArgumentError(
                f"top_k: fraction {fraction}, expected {expected}",
                subject="top_k",
                expected=expected,
                got=str(fraction),
            )
        self.fraction = fraction

    def __str__(self) -> str:
        return f"top_k({self.fraction!r})"

    def count(self, size: int) -> int:
        """How many of ``size`` values are sent: the product in 64 bits, rounded up."""
        return min(size, math.ceil(self.fraction * size))

    def parts(self, size: int) -> tuple[trees.LeafSpec, ...]:
        if size > ELEMENTS_MAX:
            raise errors.TreeError(
                f"a leaf of {size} elements, expected at most {ELEMENTS_MAX} with top_k",
                expected=f"at most {ELEMENTS_MAX} elements",
                got=str(size),
            )
        return codec.part("indices", self.count(size), "u32"), codec.part("values", self.count(size), "f32")

    def encoding_bytes(self, size: int) -> int:
        """All values together, and several times the positions of those that may be the largest."""
        return 4 * size + _CANDIDATE_BYTES * _candidates_max(size, self.count(size))

    def _encode(self, size: int, read: codec.Read, arrays: Sequence[tensors.Array], left: codec.Floats | None) -> None:
        if not size:
            return
        values = np.empty(size, np.float32) if left is None else left
        for piece in codec.pieces(size):
            read(piece.start, piece.stop, values[piece])
        chosen = _largest(values.view(np.uint32), self.count(size))
        arrays[0][:] = chosen
        arrays[1][:] = values[chosen]
        if left is not None:
            left[chosen] = 0
            if not np.isfinite(arrays[1]).all():  # there may be more of them than were sent
                left[~np.isfinite(left)] = 0

    def check(self, arrays: Sequence[tensors.Array], size: int, where: str) -> None:
        _check(arrays[0], size, where)

    def _decode(self, arrays: Sequence[tensors.Array], out: npt.NDArray[Any], where: str) -> None:
        _check(arrays[0], out.size, where)
        out[:] = 0
        out[arrays[0]] = arrays[1]

    def _add(self, arrays: Sequence[tensors.Array], out: npt.NDArray[Any], where: str) -> None:
        _check(arrays[0], out.size, where)
        out[arrays[0]] += arrays[1]


def _check(indices: npt.NDArray[np.uint32], size: int, where: str) -> None:
    """Raises PayloadError unless positions ascend, each is there once, and is one of the leaf's."""
    falls = np.flatnonzero(indices[1:] <= indices[:-1])
    if falls.size:
        before, after = (int(index) for index in indices[falls[0] : falls[0] + 2])
        what = f"index {falls[0] + 1}"
        raise codec.malformed(where, what, f"more than {before}, the one before", str(after))
    if indices.size and indices[-1] >= size:
        raise codec.malformed(where, f"index {indices.size - 1}", f"less than {size}", str(indices[-1]))


def _largest(bits: npt.NDArray[np.uint32], count: int) -> npt.NDArray[np.intp]:
    """Positions, ascending, of the ``count`` largest magnitudes, by the bits of 32-bit numbers.

    A threshold guessed from a sample picks candidates; the exact one is found among those. Where they are too few or
    too many, the exact one is found first. What the guess was has no influence on the result.
    """
    for find in (_guess, _exact):
        found = _beyond(bits, count, find(bits, count))
        if found is not None:
            return found
    raise AssertionError("fewer values than are to be sent")


def _beyond(bits: npt.NDArray[np.uint32], count: int, threshold: np.uint32) -> npt.NDArray[np.intp] | None:
    """As ``_largest``; None: it would take too much memory, as too many exceed the threshold, or too few are there."""
    most = _candidates_max(len(bits), count)
    above = _positions(bits, operator.gt, threshold, enough=most + 1)
    if len(above) > most:
        return None
    if len(above) < count:
        # Whatever there is of equal ones, as where most values are 0, no more of them is looked for than is taken.
        equal = _positions(bits, operator.eq, threshold, enough=count - len(above))
        if len(above) + len(equal) < count:
            return None
        return np.sort(np.concatenate([above, equal[: count - len(above)]]))
    magnitudes = bits[above] & _MAGNITUDE
    exact = np.partition(magnitudes, len(above) - count)[len(above) - count]
    chosen = magnitudes > exact
    chosen[np.flatnonzero(magnitudes == exact)[: count - int(np.count_nonzero(chosen))]] = True
    found: npt.NDArray[np.intp] = above[chosen]
    return found


def _candidates_max(size: int, count: int) -> int:
    """How many candidates are looked at: as many more than the guess is meant to give as it is meant to give more."""
    expected = count / max(size, 1) * min(size, _SAMPLES)
    return min(size, math.ceil(count * (1 + 2 * _SPREAD * (math.sqrt(expected) + 1) / max(expected, 1e-9))))


def _guess(bits: npt.NDArray[np.uint32], count: int) -> np.uint32:
    """A magnitude that probably somewhat more than ``count`` others exceed."""
    stride = max(1, len(bits) // _SAMPLES) | 1  # odd, so that it meets all columns of a matrix
    sample = bits[::stride] & _MAGNITUDE
    expected = count / len(bits) * len(sample)
    wanted = min(len(sample), math.ceil(expected + _SPREAD * math.sqrt(expected) + _SPREAD))
    threshold: np.uint32 = np.partition(sample, len(sample) - wanted)[len(sample) - wanted]
    return threshold


def _exact(bits: npt.NDArray[np.uint32], count: int) -> np.uint32:
    """The ``count``-th largest magnitude: its upper half, and then its lower one, by counting."""
    left, found = count, 0
    for shift in (16, 0):
        counts = np.zeros(1 << 16, np.int64)
        for piece in codec.pieces(len(bits)):
            magnitudes = bits[piece] & _MAGNITUDE
            if not shift:
                magnitudes = magnitudes[magnitudes >> 16 == found] & 0xFFFF
            counts += np.bincount(magnitudes >> shift, minlength=1 << 16)
        exceeding = np.cumsum(counts[::-1])
        half = int(np.searchsorted(exceeding, left))
        left -= int(exceeding[half - 1]) if half else 0
        found = found << 16 | (1 << 16) - 1 - half
    return np.uint32(found)


def _positions(
    bits: npt.NDArray[np.uint32],
    compare: Callable[[npt.NDArray[np.uint32], np.uint32], npt.NDArray[np.bool_]],
    threshold: np.uint32,
    enough: int | None = None,
) -> npt.NDArray[np.intp]:
    """Positions, ascending, of the magnitudes that compare so; ends once there are ``enough``."""
    room = np.empty(min(len(bits), codec.PIECE), np.uint32)
    found: list[npt.NDArray[np.intp]] = [np.empty(0, np.intp)]
    total = 0
    for piece in codec.pieces(len(bits)):
        magnitudes = np.bitwise_and(bits[piece], _MAGNITUDE, out=room[: piece.stop - piece.start])
        found.append(np.flatnonzero(compare(magnitudes, threshold)) + piece.start)
        total += len(found[-1])
        if enough is not None and total >= enough:
            break
    return np.concatenate(found)
