"""Payloads: arrays as pieces on their way out, pieces to arrays on their way in. Knows neither gRPC nor protobuf."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from optwire_proto import digests, errors, limits, payloads, sessions, tensors, trees


class Outgoing:
    """The bytes of some arrays, without copying them as a whole.

    Args:
      arrays: C-contiguous and little-endian, as ``trees.match`` and ``trees.flatten`` return them. Their memory is read
        while chunks are made, so it must not change meanwhile.
    """

    def __init__(self, arrays: Sequence[tensors.Array]) -> None:
        self.arrays = arrays
        self.length = sum(array.nbytes for array in arrays)  # bytes

    def views(self) -> Iterator[list[memoryview]]:
        """The bytes in order, as ``payloads.views``: each piece of ``limits.CHUNK_BYTES`` but the last."""
        return payloads.views(list(self.arrays))

    def whole(self) -> tuple[bytes, sessions.Digest]:
        """All bytes at once and their digest; for payloads that fit one message."""
        data = b"".join([tensors.wire_bytes(array) for array in self.arrays])
        return data, digests.digest(data)


def fresh(tree: trees.TreeSpec) -> list[tensors.Array]:
    """New arrays for every leaf, with nothing in them."""
    return [tensors.empty(leaf.shape, leaf.dtype) for leaf in tree.leaves]


def aligned(tree: trees.TreeSpec) -> list[tensors.Array]:
    """Arrays for every leaf in one piece of memory, each on a 64-byte boundary; zeros, so that no page is touched."""
    memory = np.zeros(tree.aligned_offsets[-1] + limits.ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % limits.ALIGNMENT_BYTES
    return [
        memory[start + offset : start + offset + leaf.nbytes].view(tensors.numpy_dtype(leaf.dtype)).reshape(leaf.shape)
        for leaf, offset in zip(tree.leaves, tree.aligned_offsets, strict=False)
    ]


def overlap(arrays: Sequence[tensors.Array], others: Sequence[tensors.Array]) -> bool:
    """Whether one of ``arrays`` shares memory with another of them, or with one of ``others``; all are contiguous."""
    spans = [
        (array.ctypes.data, array.nbytes, mine)
        for mine, group in ((True, arrays), (False, others))
        for array in group
        if array.nbytes
    ]
    spans.sort()
    end, end_of_mine = 0, 0
    for start, length, mine in spans:
        if start < (end if mine else end_of_mine):
            return True
        end = max(end, start + length)
        if mine:
            end_of_mine = start + length
    return False


class Incoming:
    """Fills arrays from pieces in order; each byte is copied once.

    Args:
      arrays: C-contiguous and little-endian, one a leaf, in order.
    """

    def __init__(self, arrays: Sequence[tensors.Array]) -> None:
        self.arrays = list(arrays)
        self._views = iter([tensors.wire_bytes(array) for array in self.arrays if array.size])
        self._length = sum(array.nbytes for array in self.arrays)
        self._room = memoryview(b"")  # what is still empty of the leaf being filled
        self._offset = 0
        # Told the step of the ack and how many bytes have come, once there is an ack, where somebody listens.
        self.heard: Callable[[int, int], None] | None = None
        self._acked_step: int | None = None

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Takes the next piece.

        Raises:
          UnavailableError: the chunk leaves a gap, overlaps, or goes past the end.
        """
        if offset != self._offset:
            raise damaged("the offset of a chunk", self._offset, offset)
        if offset + len(data) > self._length:
            raise damaged("the end of a chunk", f"at most {self._length}", offset + len(data))
        self._offset += len(data)
        self._take(data)
        self._tell()

    def _take(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            if not self._room:
                self._room = next(self._views)
            count = min(len(rest), len(self._room))
            self._room[:count] = rest[:count]
            self._room, rest = self._room[count:], rest[count:]

    def acked(self, step: int) -> None:
        """The ack has come: what is written, and has been so far, is of this step."""
        self._acked_step = step
        if self._offset:
            self._tell()

    def _tell(self) -> None:
        self._say(self._offset)

    def _say(self, count: int) -> None:
        if self.heard is not None and self._acked_step is not None:
            self.heard(self._acked_step, count)

    def finish(self, length: int) -> list[tensors.Array]:
        """The arrays, complete, in the tree's order.

        Args:
          length: how many bytes the server says it has sent.

        Raises:
          UnavailableError: bytes are missing.
        """
        if not self._offset == self._length == length:
            raise damaged("the payload's length", self._length, f"{self._offset}, sent were {length}")
        return self.arrays


def damaged(what: str, expected: object, got: object) -> errors.UnavailableError:
    """What is worth another try: the server still has the parameters."""
    return errors.UnavailableError(
        f"parameters from the server: {what} is {got}, expected {expected}",
        subject="params",
        expected=str(expected),
        got=str(got),
    )
