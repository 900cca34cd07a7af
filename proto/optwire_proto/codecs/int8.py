"""Blocks of 256 values, each as a byte: a share of the largest magnitude of its block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from optwire_proto import tensors, trees
from optwire_proto.codecs import codec

BLOCK: Final = 256
LARGEST: Final = 127
# The byte of what is not finite; it is decoded as NaN.
NOT_FINITE: Final = -128
# Beyond, the largest of a block would be decoded as infinite.
_SCALE_MAX: Final = np.nextafter(np.float32(np.finfo(np.float32).max / LARGEST), np.float32(0))
# Below, a scale is so coarse that its quotients may be more than 127.
_SCALE_NORMAL: Final = np.finfo(np.float32).tiny * np.float32(2)


class Int8(codec.Codec):
    """``value = scale of its block * byte``; the scale is the largest magnitude of the block, by 127.

    A value that is not finite is sent as the byte -128 and decoded as NaN; those around it are unharmed.
    """

    kind = codec.Kind.INT8

    def parts(self, size: int) -> tuple[trees.LeafSpec, ...]:
        return codec.part("scales", codec.blocks(size, BLOCK), "f32"), codec.part("values", size, "i8")

    def _encode(self, size: int, read: codec.Read, arrays: Sequence[tensors.Array], left: codec.Floats | None) -> None:
        scales, codes = arrays
        room = min(codec.blocks(size, BLOCK) * BLOCK, codec.PIECE)
        values, shares = np.empty((2, room), np.float32)
        for piece in codec.pieces(size):
            count = piece.stop - piece.start
            whole = codec.blocks(count, BLOCK) * BLOCK
            read(piece.start, piece.stop, values[:count])
            values[count:whole] = 0
            grid, share = values[:whole].reshape(-1, BLOCK), shares[:whole].reshape(-1, BLOCK)
            lost = _encode_piece(grid, share, scales[piece.start // BLOCK :][: len(grid)])
            codes[piece] = shares[:count]
            if left is not None:
                np.multiply(share, scales[piece.start // BLOCK :][: len(grid), None], out=share)
                np.subtract(values[:count], shares[:count], out=left[piece])
            if lost is not None:
                codes[piece][lost.reshape(-1)[:count]] = NOT_FINITE
                if left is not None:
                    left[piece][lost.reshape(-1)[:count]] = 0

    def check(self, arrays: Sequence[tensors.Array], size: int, where: str) -> None:
        codec.check_scales(arrays[0], where)

    def _decode(self, arrays: Sequence[tensors.Array], out: npt.NDArray[Any], where: str) -> None:
        scales, codes = arrays
        self.check(arrays, out.size, where)
        for piece in codec.pieces(out.size):
            _decode_piece(scales, codes, piece, out[piece])

    def _add(self, arrays: Sequence[tensors.Array], out: npt.NDArray[Any], where: str) -> None:
        scales, codes = arrays
        self.check(arrays, out.size, where)
        decoded = np.empty(min(out.size, codec.PIECE), np.float32)
        for piece in codec.pieces(out.size):
            part = decoded[: piece.stop - piece.start]
            _decode_piece(scales, codes, piece, part)
            out[piece] += part


def _encode_piece(values: codec.Floats, shares: codec.Floats, scales: codec.Floats) -> npt.NDArray[np.bool_] | None:
    """Writes the codes of blocks (blocks, 256), as whole numbers, and their scales; returns what is not finite.

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


def _decode_piece(scales: codec.Floats, codes: npt.NDArray[np.int8], piece: slice, out: npt.NDArray[Any]) -> None:
    ours = codes[piece]
    of_blocks = scales[piece.start // BLOCK : codec.blocks(piece.stop, BLOCK)]
    out[:] = ours
    whole = len(ours) // BLOCK * BLOCK
    if out.dtype == np.float32:
        grid = out[:whole].reshape(-1, BLOCK)
        np.multiply(grid, of_blocks[: len(grid), None], out=grid)
        out[whole:] *= of_blocks[-1]
    else:
        out[:] = np.repeat(of_blocks, BLOCK)[: len(ours)] * ours.astype(np.float32)
    if ours.min() == NOT_FINITE:
        out[ours == NOT_FINITE] = np.nan
