"""Departures: new parameters that leave while the update that makes them is under way. Knows neither device nor wire.

What a landing is on the way in, this is on the way out, but that it owns no memory: on a CPU its segments are views of
the state, and as long as one is alive the next update of the session copies instead of writing over it.
"""

from __future__ import annotations

import collections
import queue
from collections.abc import Iterator, Sequence

from optwire_proto import tensors
from optwire_server.engine import cut


class Departure:
    """The parameters of one update, in payload order, each segment as soon as it and all before it are there.

    The thread that updates fills it, and never waits for the one that takes from it.

    Attributes:
      has_begun: whether there is an update whose parameters leave this way.
    """

    def __init__(self) -> None:
        self.has_begun = False
        self._left: collections.deque[cut.Piece] = collections.deque()
        self._there: dict[tuple[int, int], list[tensors.Array]] = {}  # parts of updated blocks, by span and block
        self._segments: queue.SimpleQueue[tensors.Array | None] = queue.SimpleQueue()

    def begin(self, pieces: Sequence[cut.Piece]) -> None:
        """An update begins, whose parameters are these pieces of its blocks, in payload order."""
        self.has_begun = True
        self._left.extend(pieces)

    def updated(self, span: int, block: int, parts: list[tensors.Array]) -> None:
        """Takes the parameters of a block: its parts, flat."""
        self._there[span, block] = parts

    def release(self) -> None:
        """Lets go what can leave; until then nothing does, as the update may still be refused."""
        while self._left:
            piece = self._left[0]
            if (parts := self._there.get((piece.span, piece.block))) is None:
                return
            self._segments.put(parts[piece.part][piece.start : piece.stop])
            self._left.popleft()

    def end(self) -> None:
        """Nothing more comes, whether the update was made or not."""
        self._there.clear()
        self._segments.put(None)

    def segments(self) -> Iterator[tensors.Array]:
        """The segments in order, waiting for each, up to the end."""
        while (segment := self._segments.get()) is not None:
            yield segment
            del segment  # it must not be held on to
