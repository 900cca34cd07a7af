"""What a codec is: how the values of one leaf become arrays on the wire, and values again. NumPy only.

A codec bears on leaves of real floating-point numbers of 32 or 64 bits; the bytes of all others travel as they are.
Each leaf is encoded by itself, and the lengths of what comes of it depend on its shape alone, never on its values.
Codecs compute in 32 bits: values of 64 are rounded to those first.
"""

from __future__ import annotations

import abc
import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from optwire_proto import errors, tensors, trees

Floats = npt.NDArray[np.float32]
# Writes the values from one position up to another one into an array of that size.
Read = Callable[[int, int, Floats], None]

# Elements that are worked on at once: they stay in the cache, and NumPy's calls weigh nothing. All blocks divide it.
PIECE: Final = 131_072


class Kind(enum.IntEnum):
    """The codecs; the values are the protocol's."""

    RAW = 1
    BF16 = 2
    F16 = 3
    INT8 = 4
    TOP_K = 5
    SIGN = 6


class Codec(abc.ABC):
    """One way of encoding a leaf. Has no state; equal to another one that says the same.

    Attributes:
      kind: which one it is.
      casts: whether every value becomes another element type, and nothing else happens.
      loses: whether what it leaves behind is worth keeping, to be added to the next values of the leaf.
    """

    kind: ClassVar[Kind]
    casts: ClassVar[bool] = False
    loses: ClassVar[bool] = True

    def __str__(self) -> str:
        return self.kind.name.lower()

    def __repr__(self) -> str:
        return f"<codec {self}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codec) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(self.kind)

    def bears_on(self, dtype: str) -> bool:
        """Whether the bytes of leaves of an element type change at all."""
        return dtype in ("f32", "f64")

    def encoded(self, leaf: trees.LeafSpec) -> tuple[trees.LeafSpec, ...]:
        """The arrays that a leaf becomes, in the order in which they travel; their names are the parts of its own."""
        return _parts(self, leaf.elements) if self.bears_on(leaf.dtype) else (leaf,)

    def encoded_bytes(self, leaf: trees.LeafSpec) -> int:
        """Length of what a leaf becomes."""
        return _parts_bytes(self, leaf.elements) if self.bears_on(leaf.dtype) else leaf.nbytes

    def encoding_bytes(self, size: int) -> int:
        """Bytes of memory that encoding a leaf takes for the time, where that grows with its number of elements."""
        return 0

    @abc.abstractmethod
    def parts(self, size: int) -> tuple[trees.LeafSpec, ...]:
        """The arrays that a leaf of ``size`` elements becomes."""

    def encode(self, size: int, read: Read, arrays: Sequence[tensors.Array], left: Floats | None = None) -> None:
        """Encodes one leaf.

        Args:
          size: number of elements.
          read: where the values come from; called once for each piece, in order.
          arrays: what ``parts`` says; written to.
          left: of ``size``; where to write what was left behind: the values minus the decoded ones. It has none that is
            not finite.
        """
        with np.errstate(all="ignore"):
            self._encode(size, read, arrays, left)

    def check(self, arrays: Sequence[tensors.Array], size: int, where: str) -> None:
        """Raises PayloadError where the arrays of one leaf of ``size`` elements mean no values; most always do."""
        return

    def decode(self, arrays: Sequence[tensors.Array], out: npt.NDArray[Any], where: str) -> None:
        """Writes the decoded values of one leaf into ``out``, flat.

        Raises:
          PayloadError: the arrays mean no values; nothing was written.
        """
        with np.errstate(all="ignore"):
            self._decode(arrays, out, where)

    def add(self, arrays: Sequence[tensors.Array], out: npt.NDArray[Any], where: str) -> None:
        """Adds the decoded values of one leaf to those in ``out``, flat.

        Raises:
          PayloadError: as ``decode``.
        """
        with np.errstate(all="ignore"):
            self._add(arrays, out, where)

    @abc.abstractmethod
    def _encode(self, size: int, read: Read, arrays: Sequence[tensors.Array], left: Floats | None) -> None: ...

    @abc.abstractmethod
    def _decode(self, arrays: Sequence[tensors.Array], out: npt.NDArray[Any], where: str) -> None: ...

    def _add(self, arrays: Sequence[tensors.Array], out: npt.NDArray[Any], where: str) -> None:
        decoded = np.empty(out.size, np.float32)
        self._decode(arrays, decoded, where)
        for piece in pieces(out.size):
            out[piece] += decoded[piece]


# A push asks for these for each of its leaves, over and over.
@functools.lru_cache(maxsize=4096)
def _parts(how: Codec, size: int) -> tuple[trees.LeafSpec, ...]:
    return how.parts(size)


@functools.lru_cache(maxsize=4096)
def _parts_bytes(how: Codec, size: int) -> int:
    return sum(part.nbytes for part in how.parts(size))


def reader(values: npt.NDArray[Any], plus: Floats | None = None, factor: float = 1.0) -> Read:
    """Reads flat values, with ``factor * plus`` added where that is given."""

    def read(start: int, stop: int, out: Floats) -> None:
        if plus is None:
            out[:] = values[start:stop]
            return
        if factor == 1.0:
            np.add(values[start:stop], plus[start:stop], out=out, casting="same_kind")
            return
        np.multiply(plus[start:stop], np.float32(factor), out=out)
        np.add(values[start:stop], out, out=out, casting="same_kind")

    return read


def pieces(size: int) -> Iterator[slice]:
    """Slices of PIECE elements but for the last."""
    for start in range(0, size, PIECE):
        yield slice(start, min(start + PIECE, size))


def blocks(size: int, block: int) -> int:
    """How many blocks of ``block`` elements there are, the last one perhaps shorter."""
    return -(-size // block)


def part(name: str, size: int, dtype: str) -> trees.LeafSpec:
    """The description of one flat array on the wire."""
    return trees.LeafSpec(name, (size,), dtype)


def malformed(where: str, what: str, expected: str, got: str) -> errors.PayloadError:
    """The error for encoded arrays that mean no values."""
    return errors.PayloadError(
        f"{where}: {what} is {got}, expected {expected}", subject=where, expected=expected, got=got
    )
