"""Landing buffers: where the bytes of a payload are copied to, once, from the messages they came in.

Where a layout says so, memory is on a 64-byte boundary, so that JAX takes it as it is instead of copying it. Buffers
are reused: fresh memory costs a page fault every 4 KiB, more than the copy itself.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import functools
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from optwire_proto import digests, errors, limits, sessions, tensors, trees
from optwire_server.engine import layout as layouts
from optwire_server.engine.layout import Layout

L = TypeVar("L", bound="Landing")


def buffer_bytes(layout: Layout) -> int:
    """Bytes of the buffer for one payload that is laid out so."""
    return layout.nbytes + limits.ALIGNMENT_BYTES


class Landings:
    """Lends landing buffers, up to a total of bytes in flight, and keeps some of those that come back. Thread-safe."""

    def __init__(self, *, bytes_max: int, keep_bytes: int) -> None:
        self._bytes_max = bytes_max
        self._keep_bytes = keep_bytes
        self._lock = threading.Lock()
        self._free: collections.deque[_Buffer] = collections.deque()
        self._free_bytes = 0
        self._lent_bytes = 0
        self._yielding: dict[Landing, Callable[[], object]] = {}  # landings that give way, the oldest first

    @property
    def lent_bytes(self) -> int:
        """Bytes of buffers lent now."""
        return self._lent_bytes

    def land_as(self, kind: Callable[..., L], tree: trees.TreeSpec, layout: Layout | None, scratch_bytes: int) -> L:
        """As ``land``, of a kind that needs memory beside the payload's: its ``memory`` has that at the end."""
        return self._land(kind, tree, layout or layouts.aligned(tree), is_first=True, scratch_bytes=scratch_bytes)

    def land(self, tree: trees.TreeSpec, layout: Layout | None = None) -> Landing:
        """Lends a buffer for one payload of ``tree``; the caller must ``close`` the landing.

        Args:
          tree: of the payload.
          layout: where its leaves go; None: every leaf on a boundary, in order.

        Raises:
          LimitError: the payloads in flight would exceed the limit.
        """
        return self._land(Landing, tree, layout or layouts.aligned(tree), is_first=True)

    def land_early(self, kind: type[L], tree: trees.TreeSpec, layout: Layout, give_way: Callable[[], object]) -> L:
        """As ``land``, for a payload whose push may be far off: it gives way to all that is to be done now.

        Args:
          kind: of the landing.
          tree: of the payload.
          layout: where its leaves go.
          give_way: called, from another thread, where somebody lacks the room: the landing is to be closed soon.

        Raises:
          LimitError: the payloads in flight would exceed the limit; none of them gives way to this one.
        """
        made = self._land(kind, tree, layout, is_first=False)
        with self._lock:
            self._yielding[made] = give_way
        return made

    def keep(self, early: Landing) -> bool:
        """What was lent early gives way no more; False where somebody had asked it to."""
        with self._lock:
            return self._yielding.pop(early, None) is not None

    def _land(
        self, kind: Callable[..., L], tree: trees.TreeSpec, layout: Layout, *, is_first: bool, scratch_bytes: int = 0
    ) -> L:
        size = buffer_bytes(layout) + scratch_bytes
        with self._counting() as asked:
            self._count(size, asked, is_first=is_first)
            buffer = self._take(size, layout.gaps)
        try:
            return self._made(kind, tree, layout, buffer, size)
        except BaseException:  # there is no memory for it, say: nobody will close it
            with self._lock:
                self._lent_bytes -= size
            raise

    def _made(
        self, kind: Callable[..., L], tree: trees.TreeSpec, layout: Layout, buffer: _Buffer | None, size: int
    ) -> L:
        """A landing in a buffer that is counted as lent; in a new one where there is none."""
        if buffer is None:
            # JAX lets go of memory that it took over when Python collects, and not before: a buffer that was not kept
            # may still be there, beside this one.
            gc.collect(0)
            buffer = _Buffer(np.empty(size, np.uint8), None)
        memory = buffer.memory()
        if buffer.gaps != layout.gaps:
            for start, stop in layout.gaps:
                memory[start:stop] = 0
        return kind(tree, layout, memory, functools.partial(self._give_back, _Buffer(buffer.whole, layout.gaps)))

    def check_size(self, layout: Layout, advice: str) -> None:
        """Raises LimitError, with advice, where a payload that is laid out so could never land."""
        size = buffer_bytes(layout)
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
        with self._counting() as asked:
            self._count(size, asked, alone=True)
        try:
            yield
        finally:
            with self._lock:
                self._lent_bytes -= size

    @contextlib.contextmanager
    def _counting(self) -> Iterator[list[Callable[[], object]]]:
        """Inside, the lock is held; who is to give way is asked once it is let go of, as nobody knows what they do."""
        asked: list[Callable[[], object]] = []
        try:
            with self._lock:
                yield asked
        finally:
            for give_way in asked:
                give_way()

    def _count(
        self, size: int, asked: list[Callable[[], object]], *, alone: bool = False, is_first: bool = True
    ) -> None:
        passes = alone and self._lent_bytes == 0
        if self._lent_bytes + size > self._bytes_max and not passes:
            if is_first and (alone or size <= self._bytes_max):
                asked += self._yielded(self._lent_bytes + size - self._bytes_max)
            raise errors.LimitError(
                f"payload of {size} bytes: {self._lent_bytes} of {self._bytes_max} bytes of landing buffers are in use",
                subject="landing_bytes_max",
                expected=f"at most {self._bytes_max} bytes in flight",
                got=str(size),
                # Waiting helps only where the payload would fit by itself.
                retry_after_s=0.1 if size <= self._bytes_max or alone else 0.0,
            )
        self._lent_bytes += size

    def _yielded(self, lacking: int) -> Iterator[Callable[[], object]]:
        """Those who are to give way so many bytes: whoever is refused now finds the room when it comes again."""
        while lacking > 0 and self._yielding:
            early = next(iter(self._yielding))
            lacking -= early.memory.nbytes
            yield self._yielding.pop(early)

    def _give_back(self, buffer: _Buffer) -> None:
        with self._lock:
            self._lent_bytes -= buffer.whole.nbytes
            self._free.append(buffer)
            self._free_bytes += buffer.whole.nbytes
            while self._free_bytes > self._keep_bytes:
                self._free_bytes -= self._free.popleft().whole.nbytes

    def _take(self, size: int, gaps: Gaps) -> _Buffer | None:
        """A buffer of a size; one with these gaps, if there is one."""
        fitting = [index for index, buffer in enumerate(self._free) if buffer.whole.nbytes == size]
        if not fitting:
            return None
        index = next((index for index in fitting if self._free[index].gaps == gaps), fitting[0])
        buffer = self._free[index]
        del self._free[index]
        self._free_bytes -= size
        return buffer


class Landing:
    """One payload on its way in: takes chunks in order, counts and checks them, and gives the leaves as arrays.

    Args:
      tree: of the payload.
      layout: where its leaves lie.
      memory: of ``layout.nbytes``, on a 64-byte boundary. shape=(nbytes,), uint8
      give_back: called once, when it is closed.
    """

    def __init__(self, tree: trees.TreeSpec, layout: Layout, memory: np.ndarray, give_back: Callable[[], None]) -> None:
        self._tree = tree
        self._layout = layout
        self._memory: np.ndarray | None = memory
        self._give_back = give_back
        self._received = 0
        self._digester = digests.Digester()

    @classmethod
    def filled(cls, memory: np.ndarray, tree: trees.TreeSpec, layout: Layout) -> Landing:
        """The landing of a payload that is in its memory already, whose owner knows that it came unharmed."""
        made = cls(tree, layout, memory, lambda: None)
        made._received = tree.payload_bytes
        return made

    @property
    def memory(self) -> np.ndarray:
        """All of it, valid until ``close``. shape=(layout.nbytes,), uint8"""
        assert self._memory is not None, "read after close"
        return self._memory

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Copies a chunk to its place.

        Raises:
          PayloadError: the chunk is empty, leaves a gap, overlaps, or goes past the end.
        """
        end = offset + len(data)
        self._check_chunk(offset, len(data))
        assert self._memory is not None, "written to after close"
        offsets = self._tree.offsets
        source = np.frombuffer(data, np.uint8)
        leaf = bisect.bisect_right(offsets, offset) - 1
        while offset < end:
            stop = min(offsets[leaf + 1], end)
            target = self._layout.offsets[leaf] + offset - offsets[leaf]
            self._memory[target : target + stop - offset] = source[: stop - offset]
            source = source[stop - offset :]
            offset = stop
            leaf += 1
        self._digester.update(data)
        self._received = end

    def _check_chunk(self, offset: int, length: int) -> None:
        """Raises PayloadError unless a chunk is the next one of the payload."""
        if length and offset == self._received and offset + length <= self.payload_bytes:
            return
        problem = (
            "is empty"
            if not length
            else f"leaves a gap: expected offset {self._received}"
            if offset > self._received
            else f"overlaps: expected offset {self._received}"
            if offset < self._received
            else f"goes past the end of the payload, {self.payload_bytes} bytes"
        )
        raise errors.PayloadError(
            f"chunk of {length} bytes at offset {offset} {problem}",
            subject="chunk",
            expected=f"offset {self._received}, at most {self.payload_bytes - self._received} bytes",
            got=f"offset {offset}, {length} bytes",
        )

    def finish(self, digest: sessions.Digest) -> None:
        """Checks that all bytes came, and came unharmed.

        Raises:
          PayloadError: the payload ended early, or its digest is another.
        """
        if self._received != self.payload_bytes:
            raise errors.PayloadError(
                f"payload ended after {self._received} of {self.payload_bytes} bytes",
                subject="end",
                expected=f"{self.payload_bytes} bytes",
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

    def copy(self, memory: np.ndarray) -> None:
        """Takes the whole payload at once, from memory with the same layout; no digest is taken of it."""
        for leaf, start in zip(self._tree.leaves, self._layout.offsets, strict=True):
            self.memory[start : start + leaf.nbytes] = memory[start : start + leaf.nbytes]
        self._received = self._tree.payload_bytes

    @property
    def has_come(self) -> bool:
        """Whether all bytes are there."""
        return self._received == self.payload_bytes

    @property
    def is_open(self) -> bool:
        """Whether its memory is still lent."""
        return self._memory is not None

    @property
    def payload_bytes(self) -> int:
        """Length of the payload."""
        return self._tree.payload_bytes

    def arrays(self) -> Sequence[tensors.Array]:
        """The leaves as views of the memory, valid until ``close``; bf16 as ``ml_dtypes`` has it."""
        memory, views = self.memory, []
        for leaf, start in zip(self._tree.leaves, self._layout.offsets, strict=True):
            flat = memory[start : start + leaf.nbytes].view(tensors.numpy_dtype(leaf.dtype))
            views.append(flat.reshape(leaf.shape))
        return views

    def used(self) -> None:
        """To be told when nobody will read the payload any more; the memory stays lent."""

    def close(self) -> None:
        """Gives the memory back; may be called more than once."""
        memory, self._memory = self._memory, None
        if memory is not None:
            give_back, self._give_back = self._give_back, lambda: None  # which holds the buffer
            give_back()


class Lying(Landing):
    """A payload that is read where it lies, until that memory is wanted back: then it is moved to the landing's own.

    Thread-safe; ``lie`` and ``move`` in the session's turn only.
    """

    def __init__(self, tree: trees.TreeSpec, layout: Layout, memory: np.ndarray, give_back: Callable[[], None]) -> None:
        super().__init__(tree, layout, memory, give_back)
        self._lock = threading.Lock()
        self._where: np.ndarray | None = None
        self._leave: Callable[[], object] = lambda: None

    def lie(self, where: np.ndarray, leave: Callable[[], object]) -> None:
        """Has the payload lie in memory of the same layout; ``leave`` is called once it does no more."""
        self._where, self._leave = where, leave
        self._received = self._tree.payload_bytes

    @property
    def memory(self) -> np.ndarray:
        where = self._where
        return super().memory if where is None else where

    def move(self) -> None:
        """Copies the payload from where it lies, if it still does."""
        with self._lock:
            if (where := self._where) is not None:
                self._where = None
                self.copy(where)
                self._leave()

    def used(self) -> None:
        with self._lock:
            if self._where is not None:
                self._where = None
                self._leave()

    def close(self) -> None:
        self.used()
        with self._lock:
            super().close()


# (start, stop) of what is zero in a buffer beside the leaves; None: nothing is known to be.
Gaps = tuple[tuple[int, int], ...] | None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Buffer:
    """Memory that is lent, and where its last layout left zeros."""

    whole: np.ndarray
    gaps: Gaps

    def memory(self) -> np.ndarray:
        """From its first 64-byte boundary on."""
        start = -self.whole.ctypes.data % limits.ALIGNMENT_BYTES
        return self.whole[start : start + self.whole.nbytes - limits.ALIGNMENT_BYTES]
