"""A payload that is decoded as it comes, in pieces of any length. Knows bytes and arrays, not how they travel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from optwire_proto import errors, tensors, trees
from optwire_proto.codecs import casts, codec

Bytes = npt.NDArray[np.uint8]
_ITEM: Final = 2  # bytes of a value that a cast sends


class Decoder:
    """Decodes one payload into arrays.

    Values of 16 bits go straight to their places, and so do leaves that are not encoded. Of what another codec makes of
    a leaf, the bytes are gathered first: those of one leaf at a time.

    Args:
      how: the codec.
      leaves: in the payload.
      out: one writable, C-contiguous array for each, in its element type and in native byte order.
      what: what to call the nest in errors.
      scratch: memory of ``scratch_bytes``; None: new one. uint8
    """

    def __init__(
        self,
        how: codec.Codec,
        leaves: Sequence[trees.LeafSpec],
        out: Sequence[tensors.Array],
        what: str,
        scratch: Bytes | None = None,
    ) -> None:
        self._codec = how
        self._what = what
        self.payload_bytes = sum(map(how.encoded_bytes, leaves))
        self._leaves: Iterator[tuple[trees.LeafSpec, tensors.Array]] = iter(zip(leaves, out, strict=True))
        self._scratch = np.empty(scratch_bytes(how, leaves), np.uint8) if scratch is None else scratch
        self._rest = b""  # the first byte of a value of two
        self._problem: errors.PayloadError | None = None
        self._leaf: tuple[trees.LeafSpec, tensors.Array] | None = None
        self._target: Bytes | npt.NDArray[Any] = self._scratch[:0]  # what is still empty of the leaf
        self._left = 0  # bytes that are still to come of the leaf
        self._next()

    def write(self, data: bytes | memoryview) -> None:
        """Takes the next bytes; no more than the payload has left."""
        source = np.frombuffer(data, np.uint8)
        while source.size:
            assert self._leaf is not None, "bytes beyond the end of the payload"
            count = min(source.size, self._left)
            self._take(source[:count])
            source = source[count:]
            self._left -= count
            if not self._left:
                self._end()
                self._next()

    def check(self) -> None:
        """Raises PayloadError, with the name of the leaf, where some of the payload means no values."""
        if self._problem is not None:
            raise self._problem

    def close(self) -> None:
        """Lets go of all memory; nothing may be written afterwards."""
        self._leaves, self._leaf = iter(()), None
        self._target = self._scratch = np.empty(0, np.uint8)

    def _next(self) -> None:
        """Goes on to the next leaf that has bytes."""
        for leaf, out in self._leaves:
            self._leaf, self._left = (leaf, out), self._codec.encoded_bytes(leaf)
            flat = out.reshape(-1)
            if not self._codec.bears_on(leaf.dtype):
                self._target = flat.view(np.uint8)
            elif isinstance(self._codec, casts.Cast):
                self._target = flat
            else:
                self._target = self._scratch[: self._left]
            if self._left:
                return
        self._leaf = None

    def _take(self, source: Bytes) -> None:
        assert self._leaf is not None
        if isinstance(self._codec, casts.Cast) and self._codec.bears_on(self._leaf[0].dtype):
            if self._rest or source.size % _ITEM:
                source = np.frombuffer(self._rest + source.tobytes(), np.uint8)
                whole = source.size // _ITEM * _ITEM
                self._rest, source = source[whole:].tobytes(), source[:whole]
            bits = source.view(np.dtype("<u2"))
            for piece in codec.pieces(bits.size):
                self._codec.widen(bits[piece], self._target[piece])
            self._target = self._target[bits.size :]
        else:
            self._target[: source.size] = source
            self._target = self._target[source.size :]

    def _end(self) -> None:
        """All bytes of a leaf are there."""
        assert self._leaf is not None
        leaf, out = self._leaf
        if not self._codec.bears_on(leaf.dtype) or isinstance(self._codec, casts.Cast):
            return
        encoded = views(self._codec, leaf, self._scratch)
        try:
            self._codec.decode(encoded, out.reshape(-1), where(self._what, leaf))
        except errors.PayloadError as exc:
            self._problem = self._problem or exc


def where(what: str, leaf: trees.LeafSpec) -> str:
    """What to call a leaf in an error."""
    return f"{what}[{leaf.name!r}]" if leaf.name else what


def scratch_bytes(how: codec.Codec, leaves: Sequence[trees.LeafSpec]) -> int:
    """Bytes that a ``Decoder`` gathers at most."""
    if isinstance(how, casts.Cast):
        return 0
    return max((how.encoded_bytes(leaf) for leaf in leaves if how.bears_on(leaf.dtype)), default=0)


def views(how: codec.Codec, leaf: trees.LeafSpec, memory: Bytes) -> list[tensors.Array]:
    """The arrays of one encoded leaf, from the start of its bytes on."""
    arrays = []
    for part in how.encoded(leaf):
        arrays.append(memory[: part.nbytes].view(tensors.numpy_dtype(part.dtype)))
        memory = memory[part.nbytes :]
    return arrays
