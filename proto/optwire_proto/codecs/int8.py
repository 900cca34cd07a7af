"""Blocks of 256 values, each as a byte: a share of the largest magnitude of its block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from optwire_proto import tensors
from optwire_proto.codecs import codec, scaled

BLOCK: Final = 256
LARGEST: Final = 127
# The byte of what is not finite; it is decoded as NaN.
NOT_FINITE: Final = -128
# Beyond, the largest of a block would be decoded as infinite.
_SCALE_MAX: Final = np.nextafter(np.float32(np.finfo(np.float32).max / LARGEST), np.float32(0))
# Below, a scale is so coarse that its quotients may be more than 127.
_SCALE_NORMAL: Final = np.finfo(np.float32).tiny * np.float32(2)


class Int8(scaled.Scaled):
    """``value = scale of its block * byte``; the scale is the largest magnitude of the block, by 127.

    A value that is not finite is sent as the byte -128 and decoded as NaN; those around it are unharmed.
    """

    kind = codec.Kind.INT8
    block = BLOCK
    codes = "values"
    dtype = "i8"

    def encode_piece(
        self,
        values: codec.Floats,
        scratch: codec.Floats,
        count: int,
        scales: codec.Floats,
        codes: npt.NDArray[Any],
        left: codec.Floats | None,
    ) -> None:
        """Shares of the scales, rounded to the nearest."""
        lost = _shares(values, scratch, scales)
        codes[:] = scratch.reshape(-1)[:count]
        if left is not None:
            np.multiply(scratch, scales[:, None], out=scratch)
            np.subtract(values.reshape(-1)[:count], scratch.reshape(-1)[:count], out=left)
        if lost is not None:
            codes[lost.reshape(-1)[:count]] = NOT_FINITE
            if left is not None:
                left[lost.reshape(-1)[:count]] = 0

    def check(self, arrays: Sequence[tensors.Array], size: int, where: str) -> None:
        scaled.check(arrays[0], where)

    def decode_piece(self, scales: codec.Floats, codes: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
        """Products of scales and shares."""
        out[:] = codes
        whole = len(codes) // BLOCK * BLOCK
        if out.dtype == np.float32:
            grid = out[:whole].reshape(-1, BLOCK)
            np.multiply(grid, scales[: len(grid), None], out=grid)
            out[whole:] *= scales[-1]
        else:
            out[:] = np.repeat(scales, BLOCK)[: len(codes)] * codes.astype(np.float32)
        if codes.min() == NOT_FINITE:
            out[codes == NOT_FINITE] = np.nan


def _shares(values: codec.Floats, shares: codec.Floats, scales: codec.Floats) -> npt.NDArray[np.bool_] | None:
    """Writes the shares of blocks (blocks, 256), as whole numbers, and their scales; returns what is not finite.

    ``values`` that are not finite become 0.
    """
    np.abs(values, out=shares)
    np.max(shares, axis=1, out=scales)
    lost = None
    if not np.isfinite(scales).all():
        lost = ~np.isfinite(values)
        values[lost] = 0
        np.abs(values, out=shares)
        np.max(shares, axis=1, out=scales)
    np.divide(scales, np.float32(LARGEST), out=scales)
    np.minimum(scales, _SCALE_MAX, out=scales)
    divisors = np.where(scales > 0, scales, np.float32(1))
    np.divide(values, divisors[:, None], out=shares)
    np.rint(shares, out=shares)
    if scales.min() < _SCALE_NORMAL:
        # A block of nothing but zeros; or of numbers so small that their scale is rounded by a large part of itself.
        np.clip(shares, -LARGEST, LARGEST, out=shares)
        shares[scales == 0] = 0
    return lost
