"""Payloads: arrays as chunks on their way out, chunks as arrays on their way in. Knows neither gRPC nor protobuf."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from optwire_proto import digests, errors, payloads, sessions, tensors, trees


class Outgoing:
    """The bytes of some arrays, without copying them as a whole.

    Args:
      arrays: C-contiguous and little-endian, as ``trees.match`` and ``trees.flatten`` return them. Their memory is read
        while chunks are made, so it must not change meanwhile.
    """

    def __init__(self, arrays: Sequence[tensors.Array]) -> None:
        self._arrays = arrays
        self.length = sum(array.nbytes for array in arrays)  # bytes

    def views(self) -> Iterator[list[memoryview]]:
        """The bytes in order, as ``payloads.views``: each piece of ``limits.CHUNK_BYTES`` but the last."""
        return payloads.views(list(self._arrays))

    def whole(self) -> tuple[bytes, sessions.Digest]:
        """All bytes at once and their digest; for payloads that fit one message."""
        data = b"".join([tensors.wire_bytes(array) for array in self._arrays])
        return data, digests.digest(data)


class Incoming:
    """New arrays for every leaf of ``tree``, filled from chunks in order; each byte is copied once."""

    def __init__(self, tree: trees.TreeSpec) -> None:
        self._arrays = [tensors.empty(leaf.shape, leaf.dtype) for leaf in tree.leaves]
        self._views = iter([tensors.wire_bytes(array) for array in self._arrays if array.size])
        self._length = tree.payload_bytes
        self._room = memoryview(b"")  # what is still empty of the leaf being filled
        self._offset = 0

    def write(self, offset: int, data: bytes) -> None:
        """Takes the next chunk.

        Raises:
          UnavailableError: the chunk leaves a gap, overlaps, or goes past the end.
        """
        if offset != self._offset:
            raise _damaged("the offset of a chunk", self._offset, offset)
        if offset + len(data) > self._length:
            raise _damaged("the end of a chunk", f"at most {self._length}", offset + len(data))
        self._offset += len(data)
        rest = memoryview(data)
        while rest:
            if not self._room:
                self._room = next(self._views)
            count = min(len(rest), len(self._room))
            self._room[:count] = rest[:count]
            self._room, rest = self._room[count:], rest[count:]

    def finish(self, length: int) -> list[tensors.Array]:
        """The arrays, complete, in the tree's order.

        Args:
          length: how many bytes the server says it has sent.

        Raises:
          UnavailableError: bytes are missing.
        """
        if not self._offset == self._length == length:
            raise _damaged("the payload's length", self._length, f"{self._offset}, sent were {length}")
        return self._arrays


def _damaged(what: str, expected: object, got: object) -> errors.UnavailableError:
    """What is worth another try: the server still has the parameters."""
    return errors.UnavailableError(
        f"parameters from the server: {what} is {got}, expected {expected}",
        subject="params",
        expected=str(expected),
        got=str(got),
    )
