"""Codecs that round each value to 16 bits: twice as many fit, and nothing is kept of what the rounding left behind."""

from __future__ import annotations

import abc
import sys
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from optwire_proto import tensors, trees
from optwire_proto.codecs import codec

_16: Final = np.uint32(16)
_ONE: Final = np.uint32(1)
_HALF: Final = np.uint32(0x7FFF)
_QUIET: Final = np.uint32(0x0040)


class Cast(codec.Codec):
    """Rounds to nearest, ties to even."""

    casts = True
    loses = False

    def parts(self, size: int) -> tuple[trees.LeafSpec, ...]:
        return (codec.part("values", size, str(self)),)

    def cast(self, values: npt.NDArray[Any], bits: npt.NDArray[np.uint16]) -> None:
        """Writes the 16 bits of each value; of any size, without a copy of values that are of 32 bits."""
        with np.errstate(all="ignore"):
            for piece in codec.pieces(values.size):
                self.narrow(np.asarray(values[piece], np.float32), bits[piece])

    @abc.abstractmethod
    def narrow(self, values: codec.Floats, out: npt.NDArray[np.uint16]) -> None:
        """Writes the 16 bits of each value; of one piece."""

    @abc.abstractmethod
    def widen(self, bits: npt.NDArray[np.uint16], out: npt.NDArray[Any]) -> None:
        """Writes the values of 16 bits each, exactly; of any size."""

    def _encode(self, size: int, read: codec.Read, arrays: Sequence[tensors.Array], left: codec.Floats | None) -> None:
        values, wide = np.empty((2, min(size, codec.PIECE)), np.float32)
        bits = arrays[0].view(np.uint16)
        for piece in codec.pieces(size):
            count = piece.stop - piece.start
            read(piece.start, piece.stop, values[:count])
            self.narrow(values[:count], bits[piece])
            if left is not None:
                self.widen(bits[piece], wide[:count])
                np.subtract(values[:count], wide[:count], out=left[piece])
                left[piece][~np.isfinite(left[piece])] = 0

    def _decode(self, arrays: Sequence[tensors.Array], out: npt.NDArray[Any], where: str) -> None:
        bits = arrays[0].view(np.uint16)
        for piece in codec.pieces(out.size):
            self.widen(bits[piece], out[piece])


class BF16(Cast):
    """The upper half of 32 bits. What is beyond the largest number becomes infinite; NaN stays NaN.

    By ``ml_dtypes`` where the program has loaded it, as it is twice as fast; the bits of all numbers are the same.
    """

    kind = codec.Kind.BF16

    def narrow(self, values: codec.Floats, out: npt.NDArray[np.uint16]) -> None:
        if (ml_dtypes := sys.modules.get("ml_dtypes")) is not None:
            out.view(ml_dtypes.bfloat16)[:] = values
            return
        bits = values.view(np.uint32)
        rounded = bits >> _16
        rounded &= _ONE
        rounded += _HALF
        rounded += bits  # only NaN patterns can wrap, and those are replaced below
        rounded >>= _16
        out[:] = rounded
        largest = values.max()
        if largest != largest:  # NaN, and its bits may have become those of another number
            nan = np.isnan(values)
            out[nan] = (bits[nan] >> _16) | _QUIET

    def widen(self, bits: npt.NDArray[np.uint16], out: npt.NDArray[Any]) -> None:
        if out.dtype == np.float32:
            target = out.view(np.uint32)
            target[:] = bits
            np.left_shift(target, _16, out=target)
        else:
            out[:] = (bits.astype(np.uint32) << _16).view(np.float32)


class F16(Cast):
    """IEEE 754 half precision, as NumPy converts. What rounds beyond 65,504 becomes infinite: scale the loss."""

    kind = codec.Kind.F16

    def narrow(self, values: codec.Floats, out: npt.NDArray[np.uint16]) -> None:
        out.view(np.float16)[:] = values

    def widen(self, bits: npt.NDArray[np.uint16], out: npt.NDArray[Any]) -> None:
        out[:] = bits.view(np.float16)
