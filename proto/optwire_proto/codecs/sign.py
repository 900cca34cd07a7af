"""One bit a value: its sign. Its magnitude is the mean one of its block of 4,096."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from optwire_proto import tensors, trees
from optwire_proto.codecs import codec

BLOCK: Final = 4096
_31: Final = np.uint32(31)
_NAN: Final = np.uint32(0x7FC0_0000)


class Sign(codec.Codec):
    """``value = scale of its block``, negative where the bit is set, which is so for values below 0.

    The scale is the mean magnitude of the block.

    Bits of eight neighbours make a byte, the first of them its least significant bit. A block that has a value that is
    not finite is sent with the scale NaN, and so decoded as NaN.
    """

    kind = codec.Kind.SIGN

    def parts(self, size: int) -> tuple[trees.LeafSpec, ...]:
        return codec.part("scales", codec.blocks(size, BLOCK), "f32"), codec.part("bits", codec.blocks(size, 8), "u8")

    def _encode(self, size: int, read: codec.Read, arrays: Sequence[tensors.Array], left: codec.Floats | None) -> None:
        scales, bits = arrays
        room = min(codec.blocks(size, BLOCK) * BLOCK, codec.PIECE)
        values, magnitudes = np.empty((2, room), np.float32)
        for piece in codec.pieces(size):
            count = piece.stop - piece.start
            whole = codec.blocks(count, BLOCK) * BLOCK
            read(piece.start, piece.stop, values[:count])
            values[count:whole] = 0
            grid = values[:whole].reshape(-1, BLOCK)
            of_blocks = scales[piece.start // BLOCK :][: len(grid)]
            _means(grid, magnitudes[:whole].reshape(-1, BLOCK), count, of_blocks)
            packed = np.packbits(values[:count] < 0, bitorder="little")
            bits[piece.start // 8 :][: len(packed)] = packed
            if left is not None:
                decoded = magnitudes[:count]
                _decode_piece(of_blocks, packed, decoded)
                np.subtract(values[:count], decoded, out=left[piece])
                if np.isnan(of_blocks).any():
                    left[piece][np.isnan(decoded)] = 0

    def check(self, arrays: Sequence[tensors.Array], size: int, where: str) -> None:
        _checked(arrays, size, where)

    def _decode(self, arrays: Sequence[tensors.Array], out: npt.NDArray[Any], where: str) -> None:
        scales, bits = _checked(arrays, out.size, where)
        for piece in codec.pieces(out.size):
            _decode_piece(scales[piece.start // BLOCK :], bits[piece.start // 8 :], out[piece])

    def _add(self, arrays: Sequence[tensors.Array], out: npt.NDArray[Any], where: str) -> None:
        scales, bits = _checked(arrays, out.size, where)
        decoded = np.empty(min(out.size, codec.PIECE), np.float32)
        for piece in codec.pieces(out.size):
            part = decoded[: piece.stop - piece.start]
            _decode_piece(scales[piece.start // BLOCK :], bits[piece.start // 8 :], part)
            out[piece] += part


def _checked(arrays: Sequence[tensors.Array], size: int, where: str) -> tuple[codec.Floats, npt.NDArray[np.uint8]]:
    scales, bits = arrays
    codec.check_scales(scales, where, nan=True)
    if size % 8 and bits[-1] >> (size % 8):
        raise codec.malformed(
            where, "the last byte of the bits", f"{size % 8} bits, and zeros after them", f"{bits[-1]:#04x}"
        )
    return scales, bits


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


def _decode_piece(scales: codec.Floats, packed: npt.NDArray[np.uint8], out: npt.NDArray[Any]) -> None:
    """Decodes a piece: as many blocks from the first of ``scales`` on as ``out`` has."""
    count = out.size
    decoded = out.view(np.uint32) if out.dtype == np.float32 else np.empty(count, np.uint32)
    decoded[:] = np.unpackbits(packed[: codec.blocks(count, 8)], count=count, bitorder="little")
    np.left_shift(decoded, _31, out=decoded)
    magnitudes = np.where(np.isnan(scales), _NAN, scales.view(np.uint32) & np.uint32(0x7FFF_FFFF))
    whole = count // BLOCK * BLOCK
    grid = decoded[:whole].reshape(-1, BLOCK)
    np.bitwise_or(grid, magnitudes[: len(grid), None], out=grid)
    if whole < count:
        decoded[whole:] |= magnitudes[len(grid)]
    if out.dtype != np.float32:
        out[:] = decoded.view(np.float32)
