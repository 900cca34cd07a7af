"""Which elements of a session the rows of a push are, and what their gradients are. NumPy only; no device, no state."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from optwire_proto import rows, tensors, trees
from optwire_server.engine import cut


class Selected(NamedTuple):
    """Elements of a leaf, flat: all of them, or some rows.

    Attributes:
      starts: first element of each row, ascending; None: the whole leaf. shape=(count,), int64
      width: elements of a row.
    """

    starts: np.ndarray[Any, Any] | None
    width: int

    def within(self, low: int, high: int) -> tuple[np.ndarray[Any, Any], slice]:
        """The selected elements from ``low`` up to ``high``, less ``low``; and which of all that are selected they are.

        Both ascending.
        """
        if self.starts is None:
            return np.arange(high - low), slice(low, high)
        first = int(np.searchsorted(self.starts, low - self.width, side="right"))
        last = int(np.searchsorted(self.starts, high))
        if first >= last or not self.width:
            return np.empty(0, np.int64), slice(0, 0)
        found = (self.starts[first:last, None] + np.arange(self.width)).reshape(-1)
        before, beyond = max(0, low - int(found[0])), max(0, int(found[-1]) + 1 - high)
        chosen = slice(first * self.width + before, last * self.width - beyond)
        return found[before : found.size - beyond] - low, chosen


def selected(leaf: trees.LeafSpec, indices: np.ndarray[Any, Any] | None) -> Selected:
    """The elements of some rows of a leaf; None: of all."""
    if indices is None:
        return Selected(None, 0)
    width = leaf.elements // max(leaf.shape[0], 1)
    return Selected(indices.astype(np.int64) * width, width)


class Group(NamedTuple):
    """Elements that are updated together: a whole block, or those of some blocks.

    Attributes:
      members: of each block its number in the span, and the elements; None: all.
      values: their gradients, in order.
      count: how many elements.
    """

    members: list[tuple[int, np.ndarray[Any, Any] | None]]
    values: list[np.ndarray[Any, Any]]
    count: int

    @property
    def is_whole(self) -> bool:
        """Whether it is all of one block."""
        return bool(self.members) and self.members[0][1] is None


class Sparse:
    """The gradients of a push some of whose leaves come by rows.

    Args:
      tree: of the session.
      counts: of the leaves that come by rows.
      arrays: as ``rows.payload_tree`` says; read as long as this is used.
    """

    def __init__(self, tree: trees.TreeSpec, counts: rows.Counts, arrays: Sequence[tensors.Array]) -> None:
        self._leaves = tree.leaves
        self.counts = counts
        by_rows, given = frozenset(leaf for leaf, _ in counts), iter(arrays)
        self.indices: dict[int, np.ndarray[Any, Any]] = {}  # of rows, by leaf
        self.values: list[np.ndarray[Any, Any]] = []  # of each leaf, flat
        for position in range(len(tree.leaves)):
            if position in by_rows:
                self.indices[position] = next(given)
            self.values.append(next(given).reshape(-1))

    def check(self) -> None:
        """Raises InvalidArgumentError unless indices are in range and strictly increasing."""
        for position, indices in self.indices.items():
            rows.check_indices(self._leaves[position], indices)

    @functools.cached_property
    def selected(self) -> list[Selected]:
        """The elements of each leaf that have gradients."""
        return [selected(leaf, self.indices.get(position)) for position, leaf in enumerate(self._leaves)]

    def named(self) -> Iterator[tuple[trees.LeafSpec, np.ndarray[Any, Any]]]:
        """Each leaf, and the gradients that it has."""
        return zip(self._leaves, self.values, strict=True)

    def fill(self, leaf: int, out: np.ndarray[Any, Any]) -> None:
        """Writes the gradients of a leaf over zeros. shape=(elements,)"""
        positions, chosen = self.selected[leaf].within(0, out.size)
        out[positions] = self.values[leaf][chosen]

    def groups(self, span: cut.Span, pieces: Sequence[tuple[cut.Piece, ...]]) -> Iterator[Group]:
        """The elements of a flat span that have gradients, in its order; small ones of several blocks together.

        Args:
          span: of the session's.
          pieces: of each leaf.
        """
        few = Group([], [], 0)
        for number, members in itertools.groupby(_placed(span, pieces), lambda member: member[1].block):
            group = self._of_block(number, list(members), span.blocks[number].valid)
            if group.is_whole or group.count > cut.SMALL:
                yield group
                continue
            if few.count + group.count > cut.SMALL:
                yield few
                few = Group([], [], 0)
            if group.count:
                few = Group(few.members + group.members, few.values + group.values, few.count + group.count)
        if few.count:
            yield few

    def _of_block(self, number: int, members: Sequence[tuple[int, cut.Piece, int]], valid: int) -> Group:
        """The elements of a block."""
        positions, values = [], []
        if all(self.selected[leaf].starts is None for leaf, _, _ in members):
            found = [self.values[leaf][low : low + piece.stop - piece.start] for leaf, piece, low in members]
            return Group([(number, None)], found, valid)
        for leaf, piece, low in members:
            inside, chosen = self.selected[leaf].within(low, low + piece.stop - piece.start)
            positions.append(inside + piece.start)
            values.append(self.values[leaf][chosen])
        where = np.concatenate(positions)
        return Group([(number, None if where.size == valid else where)], values, where.size)


def _placed(span: cut.Span, pieces: Sequence[tuple[cut.Piece, ...]]) -> Iterator[tuple[int, cut.Piece, int]]:
    """The pieces of a span's leaves in the order of its elements: leaf, piece, and its first element in the leaf."""
    for leaf in span.leaves:
        low = 0
        for piece in pieces[leaf]:
            yield leaf, piece, low
            low += piece.stop - piece.start
