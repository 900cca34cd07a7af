"""One bit a value: its sign. Its magnitude is the mean one of its block of 4,096."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from optwire_proto import tensors
from optwire_proto.codecs import codec, scaled

BLOCK: Final = 4096
_31: Final = np.uint32(31)
_NAN: Final = np.uint32(0x7FC0_0000)


class Sign(scaled.Scaled):
    """``value = scale of its block``, negative where the bit is set, which is so for values below 0.

    The scale is the mean magnitude of the block.

    Bits of eight neighbours make a byte, the first of them its least significant bit. A block that has a value that is
    not finite is sent with the scale NaN, and so decoded as NaN.
    """

    kind = codec.Kind.SIGN
    block = BLOCK
    codes = "bits"
    dtype = "u8"
    per_code = 8

    def encode_piece(
        self,
        values: codec.Floats,
        scratch: codec.Floats,
        count: int,
        scales: codec.Floats,
        codes: npt.NDArray[Any],
        left: codec.Floats | None,
    ) -> None:
        """The bits of what is below 0."""
        _means(values, scratch, count, scales)
        codes[:] = np.packbits(values.reshape(-1)[:count] < 0, bitorder="little")
        if left is not None:
            decoded = scratch.reshape(-1)[:count]
            self.decode_piece(scales, codes, decoded)
            np.subtract(values.reshape(-1)[:count], decoded, out=left)
            if np.isnan(scales).any():
                left[np.isnan(decoded)] = 0

    def check(self, arrays: Sequence[tensors.Array], size: int, where: str) -> None:
        scales, bits = arrays
        scaled.check(scales, where, nan=True)
        if size % 8 and bits[-1] >> (size % 8):
            raise codec.malformed(
                where, "the last byte of the bits", f"{size % 8} bits, and zeros after them", f"{bits[-1]:#04x}"
            )

    def decode_piece(self, scales: codec.Floats, codes: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
        """The scales, negative where the bits are set."""
        count = out.size
        decoded = out.view(np.uint32) if out.dtype == np.float32 else np.empty(count, np.uint32)
        decoded[:] = np.unpackbits(codes, count=count, bitorder="little")
        np.left_shift(decoded, _31, out=decoded)
        magnitudes = np.where(np.isnan(scales), _NAN, scales.view(np.uint32) & np.uint32(0x7FFF_FFFF))
        whole = count // BLOCK * BLOCK
        grid = decoded[:whole].reshape(-1, BLOCK)
        np.bitwise_or(grid, magnitudes[: len(grid), None], out=grid)
        if whole < count:
            decoded[whole:] |= magnitudes[len(grid)]
        if out.dtype != np.float32:
            out[:] = decoded.view(np.float32)


def _means(values: codec.Floats, magnitudes: codec.Floats, count: int, out: codec.Floats) -> None:
    """Writes the mean magnitudes of blocks (blocks, 4096) of which ``count`` values are there, the others being 0."""
    sizes = np.full(len(values), BLOCK, np.float32)
    sizes[-1] = count - (len(values) - 1) * BLOCK
    np.abs(values, out=magnitudes)
    np.sum(magnitudes, axis=1, out=out)
    bad = np.flatnonzero(~np.isfinite(out))
    np.divide(out, sizes, out=out)
    for block in bad:  # a sum that overflowed, or something that is not finite
        mean = magnitudes[block].sum(dtype=np.float64) / sizes[block]
        out[block] = mean if np.isfinite(mean) else np.nan
