"""Stages: gradients that go up while others are still being computed, before their push is made. No gRPC, no protobuf.

A stage keeps its own copy of each gradient, in the handle's buffers, so that what is sent, what its digest covers, and
what a retry sends again are the same bytes whatever becomes of the original.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from optwire_proto import digests, limits, sessions, tensors, trees

# How often the gradients of one push are begun to be sent: a connection may have been lost, or the server has no room.
_STARTS_MAX = 2
# Bytes that are compared at once; what NumPy makes of them meanwhile stays in the cache.
_COMPARED_BYTES = 256 * limits.KIB


class Stage:
    """Copies of the gradients of a session's next push, and the sending of them. Thread-safe, one push at a time.

    Attributes:
      buffers: one array for each leaf, in the tree's order, that a push is made of.
      resent_bytes: staged in vain so far: what was replaced later, or had to be sent again with its push.
      heard: told the step of the parameters in a push's reply, and how many bytes of them have come, as they come.
    """

    def __init__(self, tree: trees.TreeSpec, buffers: Sequence[tensors.Array]) -> None:
        self.buffers = list(buffers)
        self.resent_bytes = 0
        self.heard: Callable[[int, int], None] = lambda step, count: None
        self._tree = tree
        self._bytes = [array.reshape(-1).view(np.uint8) for array in self.buffers]
        self._copied: set[int] = set()  # for the push to come
        self._feed: Feed | None = None
        self._starts = 0

    @property
    def may_send(self) -> bool:
        """Whether the sending is to be begun: it is not under way, and was not in vain too often for this push."""
        return not self.is_sending and self._starts < _STARTS_MAX

    @property
    def is_sending(self) -> bool:
        """Whether what is copied goes up at once."""
        return self._feed is not None and not self._feed.is_over

    def send_by(self, start: Callable[[Feed], None]) -> None:
        """Has what is copied from now on go up at once.

        Args:
          start: puts the feed on a stream; may raise.
        """
        lost, self._feed = self._feed, None
        if lost is not None:
            self.lost(lost)
        feed = Feed(self._tree, self._bytes)
        self._starts += 1
        start(feed)
        self._feed = feed
        for index in self._copied:
            feed.add(index)

    def copy(self, index: int, array: tensors.Array) -> None:
        """Takes a gradient, in the place of an earlier one of this leaf, and sends it soon.

        Args:
          index: of the leaf.
          array: of its shape and element type, C-contiguous and little-endian; not needed afterwards.
        """
        feed = self._feed
        if feed is not None:
            feed.outdate(index)
        np.copyto(self._bytes[index], _bytes(array))
        self._copied.add(index)
        if feed is not None:
            feed.add(index)

    def has(self, index: int, array: tensors.Array) -> bool:
        """Whether the copy for the push to come has the same bytes as ``array``."""
        return index in self._copied and _equal(self._bytes[index], _bytes(array))

    def owns(self, arrays: Sequence[tensors.Array]) -> bool:
        """Whether all of the arrays of a push are buffers of this stage."""
        return _addresses(arrays) <= _addresses(self.buffers)

    def taken(self) -> Feed | None:
        """Ends the stage for the push it was for: what sends the payload of that push; None: nothing does."""
        feed = self._feed
        if feed is None or feed.is_over:
            self.close()
            return None
        self._feed, self._copied, self._starts = None, set(), 0
        return feed

    def close(self) -> None:
        """Ends the sending, and forgets what was copied."""
        feed, self._feed = self._feed, None
        self._copied, self._starts = set(), 0
        if feed is not None:
            self.lost(feed)

    def lost(self, feed: Feed) -> None:
        """Ends a feed, all that was sent of which was in vain."""
        feed.end()
        self.resent_bytes += feed.sent_bytes


class Feed:
    """What is to be sent of a stage, in the order in which it was copied; pulled by the thread that sends."""

    def __init__(self, tree: trees.TreeSpec, views: Sequence[np.ndarray[Any, Any]]) -> None:
        self._offsets = tree.offsets
        self._views = views
        self._changed = threading.Condition()
        self._waiting: collections.deque[int] = collections.deque()
        self._versions = [0] * len(views)
        self._absent: frozenset[int] | None = None  # once the push is known
        self._sent = 0  # bytes
        self._over = False

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is going to be sent any more."""
        return self._over

    def outdate(self, index: int) -> None:
        """The copy of a leaf is about to change: what was sent of it is void."""
        self._versions[index] += 1

    def add(self, index: int) -> None:
        """The copy of a leaf is to be sent."""
        with self._changed:
            if index not in self._waiting:
                self._waiting.append(index)
            self._changed.notify()

    def push(self, absent: Sequence[int]) -> None:
        """The push is known, and so is which leaves it lacks; what is copied is final."""
        with self._changed:
            self._absent = frozenset(absent)
            self._changed.notify()

    def end(self) -> None:
        """Ends the sending."""
        with self._changed:
            self._over = True
            self._changed.notify()

    @property
    def sent_bytes(self) -> int:
        """How many bytes were sent so far."""
        return self._sent

    def staged(self) -> Iterator[tuple[int, list[memoryview]]]:
        """Offset and bytes of each chunk up to the push; waits for more until it is known. Ends early if it ends."""
        while (index := self._next()) is not None:
            yield from self._chunks(index)

    def rest(self) -> Iterator[tuple[int, list[memoryview]]]:
        """The chunks that are to be sent yet once the push has begun."""
        assert self._absent is not None, "the push is not known"
        for index in self._waiting:
            if index not in self._absent:
                yield from self._chunks(index)

    def digest(self) -> sessions.Digest:
        """Of the payload, as it is now."""
        assert self._absent is not None, "the push is not known"
        digester = digests.Digester()
        for index, view in enumerate(self._views):
            if index not in self._absent:
                digester.update(view.data)
        return digester.digest()

    def _next(self) -> int | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._absent is not None or self._over)
            if self._over or self._absent is not None:
                return None
            return self._waiting.popleft()

    def _chunks(self, index: int) -> Iterator[tuple[int, list[memoryview]]]:
        view, version = self._views[index].data, self._versions[index]
        for start in range(0, view.nbytes, limits.CHUNK_BYTES):
            if self._over or self._versions[index] != version:
                return  # it comes again
            piece = view[start : start + limits.CHUNK_BYTES]
            self._sent += piece.nbytes
            yield self._offsets[index] + start, [piece]


def _bytes(array: tensors.Array) -> np.ndarray[Any, Any]:
    """A flat view of a contiguous array's bytes."""
    return array.reshape(-1).view(np.uint8)


def _equal(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Whether two flat arrays of bytes are equal."""
    if a.size % 8 == 0 and not (a.ctypes.data | b.ctypes.data) % 8:
        a, b = a.view(np.uint64), b.view(np.uint64)
    step = _COMPARED_BYTES // a.itemsize
    return all(np.array_equal(a[at : at + step], b[at : at + step]) for at in range(0, a.size, step))


def _addresses(arrays: Sequence[tensors.Array]) -> set[int]:
    return {array.ctypes.data for array in arrays if array.nbytes}
