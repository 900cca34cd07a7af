"""What codecs have in common that send a scale for each block of values, and a few bits for each value."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from optwire_proto import tensors, trees
from optwire_proto.codecs import codec


class Scaled(codec.Codec):
    """One scale a block, and codes of the values.

    Attributes:
      block: values that have a scale together; ``codec.PIECE`` is a multiple.
      codes: name of the array of codes.
      dtype: its element type.
      per_code: values that an element of it stands for.
    """

    block: ClassVar[int]
    codes: ClassVar[str]
    dtype: ClassVar[str]
    per_code: ClassVar[int] = 1

    def parts(self, size: int) -> tuple[trees.LeafSpec, ...]:
        scales = codec.part("scales", codec.blocks(size, self.block), "f32")
        return scales, codec.part(self.codes, codec.blocks(size, self.per_code), self.dtype)

    @abc.abstractmethod
    def encode_piece(
        self,
        values: codec.Floats,
        scratch: codec.Floats,
        count: int,
        scales: codec.Floats,
        codes: npt.NDArray[Any],
        left: codec.Floats | None,
    ) -> None:
        """Encodes one piece.

        Args:
          values: whole blocks, with zeros after the end; may be written over. shape=(blocks, block)
          scratch: of the shape of values.
          count: number of values.
          scales: to be written. shape=(blocks,)
          codes: to be written.
          left: where to write what is left behind, or None. shape=(count,)
        """

    @abc.abstractmethod
    def decode_piece(self, scales: codec.Floats, codes: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
        """Decodes one piece, flat."""

    def _encode(self, size: int, read: codec.Read, arrays: Sequence[tensors.Array], left: codec.Floats | None) -> None:
        room = min(codec.blocks(size, self.block) * self.block, codec.PIECE)
        values, scratch = np.empty((2, room), np.float32)
        for piece in codec.pieces(size):
            count = piece.stop - piece.start
            whole = codec.blocks(count, self.block) * self.block
            read(piece.start, piece.stop, values[:count])
            values[count:whole] = 0
            grids = values[:whole].reshape(-1, self.block), scratch[:whole].reshape(-1, self.block)
            self.encode_piece(*grids, count, *self._of(piece, arrays), None if left is None else left[piece])

    def _decode(self, arrays: Sequence[tensors.Array], out: npt.NDArray[Any], where: str) -> None:
        self.check(arrays, out.size, where)
        for piece in codec.pieces(out.size):
            self.decode_piece(*self._of(piece, arrays), out[piece])

    def _add(self, arrays: Sequence[tensors.Array], out: npt.NDArray[Any], where: str) -> None:
        self.check(arrays, out.size, where)
        decoded = np.empty(min(out.size, codec.PIECE), np.float32)
        for piece in codec.pieces(out.size):
            part = decoded[: piece.stop - piece.start]
            self.decode_piece(*self._of(piece, arrays), part)
            out[piece] += part

    def _of(self, piece: slice, arrays: Sequence[tensors.Array]) -> tuple[codec.Floats, npt.NDArray[Any]]:
        """The scales and codes of a piece."""
        scales, codes = arrays
        return (
            scales[piece.start // self.block : codec.blocks(piece.stop, self.block)],
            codes[piece.start // self.per_code : codec.blocks(piece.stop, self.per_code)],
        )


def check(scales: codec.Floats, where: str, *, nan: bool = False) -> None:
    """Raises PayloadError unless scales are finite and not negative; NaN passes where it has a meaning."""
    good = (scales >= 0) & (scales < np.inf)
    if nan:
        good |= np.isnan(scales)
    if not good.all():
        bad = int(np.flatnonzero(~good)[0])
        raise codec.malformed(where, f"scale {bad}", "finite, 0 or more", f"{scales[bad]}")
