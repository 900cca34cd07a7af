"""Landing buffers: where the bytes of a payload are copied to, once, from the messages they came in.

Each leaf starts on a 64-byte boundary, so that JAX takes the buffer as it is instead of copying it. Buffers are reused:
fresh memory costs a page fault every 4 KiB, more than the copy itself.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from optwire_proto import digests, errors, limits, sessions, tensors, trees


def buffer_bytes(tree: trees.TreeSpec) -> int:
    """Bytes of the buffer for one payload of ``tree``."""
    return tree.aligned_offsets[-1] + limits.ALIGNMENT_BYTES


class Landings:
    """Lends landing buffers, up to a total of bytes in flight, and keeps some of those that come back. Thread-safe."""

    def __init__(self, *, bytes_max: int, keep_bytes: int) -> None:
        self._bytes_max = bytes_max
        self._keep_bytes = keep_bytes
        self._lock = threading.Lock()
        self._free: collections.deque[np.ndarray] = collections.deque()
        self._free_bytes = 0
        self._lent_bytes = 0

    @property
    def lent_bytes(self) -> int:
        """Bytes of buffers lent now."""
        return self._lent_bytes

    def land(self, tree: trees.TreeSpec) -> Landing:
        """Lends a buffer for one payload of ``tree``; the caller must ``close`` the landing.

        Raises:
          LimitError: the payloads in flight would exceed the limit.
        """
        size = buffer_bytes(tree)
        with self._lock:
            self._count(size)
            buffer = self._take(size)
        return Landing(self, tree, np.empty(size, np.uint8) if buffer is None else buffer)

    def check_size(self, tree: trees.TreeSpec, advice: str) -> None:
        """Raises LimitError, with advice, where a payload of ``tree`` could never land."""
        size = buffer_bytes(tree)
        if size > self._bytes_max:
            raise errors.LimitError(
                f"payload of {size} bytes: landing_bytes_max is {self._bytes_max}; {advice}",
                subject="landing_bytes_max",
                expected=f"at most {self._bytes_max} bytes",
                got=str(size),
            )

    @contextlib.contextmanager
    def counted(self, size: int) -> Iterator[None]:
        """Counts bytes on their way out, which need no buffer: raises as ``land``, but lets any size pass alone."""
        with self._lock:
            self._count(size, alone=True)
        try:
            yield
        finally:
            with self._lock:
                self._lent_bytes -= size

    def _count(self, size: int, *, alone: bool = False) -> None:
        passes = alone and self._lent_bytes == 0
        if self._lent_bytes + size > self._bytes_max and not passes:
            raise errors.LimitError(
                f"payload of {size} bytes: {self._lent_bytes} of {self._bytes_max} bytes of landing buffers are in use",
                subject="landing_bytes_max",
                expected=f"at most {self._bytes_max} bytes in flight",
                got=str(size),
                # Waiting helps only where the payload would fit by itself.
                retry_after_s=0.1 if size <= self._bytes_max or alone else 0.0,
            )
        self._lent_bytes += size

    def give_back(self, buffer: np.ndarray) -> None:
        """Takes a buffer back; ``Landing.close`` calls it."""
        with self._lock:
            self._lent_bytes -= buffer.nbytes
            self._free.append(buffer)
            self._free_bytes += buffer.nbytes
            while self._free_bytes > self._keep_bytes:
                self._free_bytes -= self._free.popleft().nbytes

    def _take(self, size: int) -> np.ndarray | None:
        for index, buffer in enumerate(self._free):
            if buffer.nbytes == size:
                del self._free[index]
                self._free_bytes -= size
                return buffer
        return None


class Landing:
    """One payload on its way in: takes chunks in order, counts and checks them, and gives the leaves as arrays."""

    def __init__(self, lender: Landings, tree: trees.TreeSpec, buffer: np.ndarray) -> None:
        self._lender = lender
        self._tree = tree
        self._buffer: np.ndarray | None = buffer
        self._start = -buffer.ctypes.data % limits.ALIGNMENT_BYTES
        self._received = 0
        self._digester = digests.Digester()

    def write(self, offset: int, data: bytes) -> None:
        """Copies a chunk to its place.

        Raises:
          PayloadError: the chunk is empty, leaves a gap, overlaps, or goes past the end.
        """
        end = offset + len(data)
        if not data or offset != self._received or end > self._tree.payload_bytes:
            problem = (
                "is empty"
                if not data
                else f"leaves a gap: expected offset {self._received}"
                if offset > self._received
                else f"overlaps: expected offset {self._received}"
                if offset < self._received
                else f"goes past the end of the payload, {self._tree.payload_bytes} bytes"
            )
            raise errors.PayloadError(
                f"chunk of {len(data)} bytes at offset {offset} {problem}",
                subject="chunk",
                expected=f"offset {self._received}, at most {self._tree.payload_bytes - self._received} bytes",
                got=f"offset {offset}, {len(data)} bytes",
            )
        assert self._buffer is not None, "written to after close"
        offsets = self._tree.offsets
        source = np.frombuffer(data, np.uint8)
        leaf = bisect.bisect_right(offsets, offset) - 1
        while offset < end:
            stop = min(offsets[leaf + 1], end)
            target = self._start + self._tree.aligned_offsets[leaf] + offset - offsets[leaf]
            self._buffer[target : target + stop - offset] = source[: stop - offset]
            source = source[stop - offset :]
            offset = stop
            leaf += 1
        self._digester.update(data)
        self._received = end

    def finish(self, digest: sessions.Digest) -> None:
        """Checks that all bytes came, and came unharmed.

        Raises:
          PayloadError: the payload ended early, or its digest is another.
        """
        if self._received != self._tree.payload_bytes:
            raise errors.PayloadError(
                f"payload ended after {self._received} of {self._tree.payload_bytes} bytes",
                subject="end",
                expected=f"{self._tree.payload_bytes} bytes",
                got=f"{self._received} bytes",
            )
        came = self._digester.digest()
        if digest != came:
            raise errors.PayloadError(
                f"payload damaged: {came} came, but {digest} was sent",
                subject="digest",
                expected=str(digest),
                got=str(came),
            )

    def arrays(self) -> Sequence[tensors.Array]:
        """The leaves as aligned views of the buffer, valid until ``close``; bf16 as ``ml_dtypes`` has it."""
        assert self._buffer is not None, "read after close"
        views = []
        for leaf, offset in zip(self._tree.leaves, self._tree.aligned_offsets, strict=False):
            start = self._start + offset
            flat = self._buffer[start : start + leaf.nbytes].view(tensors.numpy_dtype(leaf.dtype))
            views.append(flat.reshape(leaf.shape))
        return views

    def grads(self, tree: trees.TreeSpec, absent: Sequence[int]) -> Sequence[tensors.Array]:
        """One array for each leaf of ``tree``: zeros, in memory that is never touched, where the payload has none."""
        if not absent:
            return self.arrays()
        there, gone = iter(self.arrays()), frozenset(absent)
        return [
            np.zeros(leaf.shape, tensors.numpy_dtype(leaf.dtype)) if index in gone else next(there)
            for index, leaf in enumerate(tree.leaves)
        ]

    def close(self) -> None:
        """Gives the buffer back; may be called more than once."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._lender.give_back(buffer)
