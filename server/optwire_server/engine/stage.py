"""Stages: landings of payloads that come before it is known what push they are of, in pieces of any order."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

import numpy as np

from optwire_proto import errors, limits, sessions, tensors, trees
from optwire_server.engine import landing
from optwire_server.engine import layout as layouts


class Stage(landing.Landing):
    """A landing whose chunks come in any order, each inside of one leaf; a later one replaces an earlier one.

    Offsets are those of a payload with every leaf. Which leaves there are is said at last, by ``leave_out``. The digest
    is taken at the end, in one pass, since some of what came earlier may have been replaced.

    Attributes:
      is_pushed: whether a push has taken it over, which closes it.
    """

    def __init__(
        self, tree: trees.TreeSpec, layout: layouts.Layout, memory: np.ndarray, give_back: Callable[[], None]
    ) -> None:
        super().__init__(tree, layout, memory, give_back)
        self.is_pushed = False
        self._whole, self._places = tree, layout.offsets  # with every leaf, whatever is left out
        self._absent: frozenset[int] = frozenset()
        self._came = Ranges()

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Copies a chunk to its place.

        Raises:
          PayloadError: the chunk is empty, is not inside of one leaf, or goes past the end.
          LimitError: too many pieces with gaps between them.
        """
        offsets, end = self._whole.offsets, offset + len(data)
        leaf = bisect.bisect_right(offsets, offset) - 1
        if not data or end > offsets[-1] or end > offsets[leaf + 1]:
            inside = (
                f"leaf {self._whole.leaves[leaf].name!r} ends at {offsets[leaf + 1]}" if offset < offsets[-1] else ""
            )
            raise errors.PayloadError(
                f"staged chunk of {len(data)} bytes at offset {offset}: expected a byte or more, inside of one leaf"
                f"; {inside or f'the payload ends at {offsets[-1]}'}",
                subject="chunk",
                expected="a byte or more, inside of one leaf",
                got=f"offset {offset}, {len(data)} bytes",
            )
        target = self._places[leaf] + offset - offsets[leaf]
        self.memory[target : target + len(data)] = np.frombuffer(data, np.uint8)
        self._came.add(offset, end)
        most = len(self._whole.leaves) + limits.STAGE_GAPS_MAX
        if len(self._came) > most:
            raise errors.LimitError(
                f"staged chunks: {len(self._came)} pieces with gaps between them, expected at most {most}; send each "
                "leaf from its start to its end",
                subject="stage",
                expected=f"at most {most} pieces",
                got=str(len(self._came)),
            )

    def leave_out(self, absent: Sequence[int]) -> None:
        """Takes the payload for one that lacks leaves, by position; what came of them does not count."""
        if absent:
            self._absent = frozenset(absent)
            self._tree, self._layout = self._whole.without(absent), self._layout.without(absent)

    def finish(self, digest: sessions.Digest) -> None:
        """Checks that all bytes of all leaves that there are came, and came unharmed.

        Raises:
          PayloadError: a leaf has not come, or not all of it; or the digest is another.
        """
        for index, leaf in enumerate(self._whole.leaves):
            start, stop = self._whole.offsets[index : index + 2]
            count = stop - start if index in self._absent else self._came.count(start, stop)
            if count < stop - start:
                raise errors.PayloadError(
                    f"grads[{leaf.name!r}]: {count} of {leaf.nbytes} bytes came, expected all of them, or the leaf's "
                    "position in absent_leaves",
                    subject=leaf.name,
                    expected=f"{leaf.nbytes} bytes",
                    got=f"{count} bytes",
                )
        for array in self.arrays():
            self._digester.update(tensors.wire_bytes(array))
        self._received = self._tree.payload_bytes
        super().finish(digest)


class Ranges:
    """Ranges of offsets that touch nowhere, in order."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, start: int, stop: int) -> None:
        """Joins a range to those that it touches."""
        first = bisect.bisect_left(self._stops, start)
        last = bisect.bisect_right(self._starts, stop)
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last], self._stops[first:last] = [start], [stop]

    def count(self, start: int, stop: int) -> int:
        """How many offsets of a range are in these."""
        first = bisect.bisect_right(self._stops, start)
        last = bisect.bisect_left(self._starts, stop)
        pairs = zip(self._starts[first:last], self._stops[first:last], strict=True)
        return sum(min(stop, theirs) - max(start, own) for own, theirs in pairs)
