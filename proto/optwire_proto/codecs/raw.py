"""The leaf's own bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from optwire_proto import tensors, trees
from optwire_proto.codecs import codec


class Raw(codec.Codec):
    """Changes nothing. Its name is that of the element type most leaves have."""

    kind = codec.Kind.RAW
    loses = False

    def __str__(self) -> str:
        return "f32"

    def bears_on(self, dtype: str) -> bool:
        return False

    def parts(self, size: int) -> tuple[trees.LeafSpec, ...]:
        return (codec.part("values", size, "f32"),)

    def _encode(self, size: int, read: codec.Read, arrays: Sequence[tensors.Array], left: codec.Floats | None) -> None:
        for piece in codec.pieces(size):
            read(piece.start, piece.stop, arrays[0][piece])
        if left is not None:
            left[:] = 0

    def _decode(self, arrays: Sequence[tensors.Array], out: npt.NDArray[Any], where: str) -> None:
        np.copyto(out, arrays[0], casting="same_kind")
