"""Which elements of a session the rows of a push are, and what their gradients are. NumPy only; no device, no state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from optwire_proto import rows, sessions, tensors, trees
from optwire_server.engine import cut, device, landing, mean
from optwire_server.engine.layout import Layout


class Selected(NamedTuple):
    """Elements of a leaf, flat: all of them, or some rows.

    Attributes:
      starts: first element of each row, ascending; None: the whole leaf. shape=(count,), int64
      width: elements of a row.
      size: how many elements.
    """

    starts: np.ndarray[Any, Any] | None
    width: int
    size: int

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
        return Selected(None, 0, leaf.elements)
    width = leaf.elements // max(leaf.shape[0], 1)
    return Selected(indices.astype(np.int64) * width, width, indices.size * width)


class Member(NamedTuple):
    """What a block has of a leaf: a piece, and where in the leaf that begins."""

    leaf: int
    piece: cut.Piece
    low: int

    @property
    def high(self) -> int:
        """Where in the leaf it ends."""
        return self.low + self.piece.stop - self.piece.start


def members(span: cut.Span, pieces: Sequence[tuple[cut.Piece, ...]]) -> list[list[Member]]:
    """For each block of a span what it has of leaves, in the order of its elements.

    Args:
      span: of the session's.
      pieces: of each leaf.
    """
    found: list[list[Member]] = [[] for _ in span.blocks]
    for leaf in span.leaves:
        low = 0
        for piece in pieces[leaf]:
            found[piece.block].append(Member(leaf, piece, low))
            low = found[piece.block][-1].high
    return found


class Group(NamedTuple):
    """Elements that are updated together: a whole block, or those of some blocks.

    Attributes:
      members: of each block its number in the span, and the elements; None: all.
      values: their gradients, in order.
      size: how many elements.
    """

    members: list[tuple[int, np.ndarray[Any, Any] | None]]
    values: list[np.ndarray[Any, Any]]
    size: int

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

    def fill_block(self, block: Sequence[Member], out: np.ndarray[Any, Any]) -> None:
        """Writes the gradients of a flat block over zeros. shape=(size,)"""
        for leaf, piece, low in block:
            positions, chosen = self.selected[leaf].within(low, low + piece.stop - piece.start)
            out[positions + piece.start] = self.values[leaf][chosen]

    def groups(self, span: cut.Span, blocks: Sequence[Sequence[Member]]) -> Iterator[Group]:
        """The elements of a flat span that have gradients, in its order; small ones of several blocks together.

        Args:
          span: of the session's.
          blocks: what each of its blocks has of leaves.
        """
        few = Group([], [], 0)
        for number, block in enumerate(blocks):
            if not block:
                continue
            group = self._of_block(number, block, span.blocks[number].valid)
            if group.is_whole or group.size > cut.SMALL:
                yield group
                continue
            if few.size + group.size > cut.SMALL:
                yield few
                few = Group([], [], 0)
            if group.size:
                few = Group(few.members + group.members, few.values + group.values, few.size + group.size)
        if few.size:
            yield few

    def _of_block(self, number: int, block: Sequence[Member], valid: int) -> Group:
        """The elements of a block."""
        if all(self.selected[member.leaf].starts is None for member in block):
            found = [self.values[member.leaf][member.low : member.high] for member in block]
            return Group([(number, None)], found, valid)
        positions, values = [], []
        for member in block:
            inside, chosen = self.selected[member.leaf].within(member.low, member.high)
            positions.append(inside + member.piece.start)
            values.append(self.values[member.leaf][chosen])
        where = np.concatenate(positions)
        return Group([(number, None if where.size == valid else where)], values, where.size)


def joined(
    tree: trees.TreeSpec, pushes: Sequence[Sparse], factors: Sequence[float] = (), divisor: float = 0.0
) -> device.Work[Sparse]:
    """The sum of several workers' gradients, divided: of every row that one of them has; as ``mean.into_first``.

    Leaves that come whole are written over those of the first; rows are in memory of their own, as long as all of the
    pushes together at most. Yields between leaves.

    Args:
      tree: of the session.
      pushes: in the order in which they are added; the same leaves come by rows in all of them.
      factors: one for each; empty: 1.
      divisor: of the sum; 0: the number of pushes.
    """
    arrays: list[tensors.Array] = []
    counts: list[tuple[int, int]] = []
    for position, leaf in enumerate(tree.leaves):
        if position not in pushes[0].indices:
            yield from mean.into_first([[push.values[position]] for push in pushes], factors, divisor)
            arrays.append(pushes[0].values[position])
            continue
        union = _union([push.indices[position] for push in pushes])
        dtype = pushes[0].values[position].dtype
        total = np.zeros((union.size, *leaf.shape[1:]), np.promote_types(dtype, np.float32))
        with np.errstate(all="ignore"):  # what is not finite, the update will see
            for push, factor in zip(pushes, factors or [1.0] * len(pushes), strict=True):
                indices = push.indices[position]
                values = push.values[position].reshape((indices.size, *leaf.shape[1:])).astype(total.dtype)
                total[np.searchsorted(union, indices)] += values * total.dtype.type(factor)
                yield
            arrays += [union, (total / total.dtype.type(divisor or len(pushes))).astype(dtype)]
        counts.append((position, union.size))
    return Sparse(tree, tuple(counts), arrays)


def _union(several: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """All numbers, ascending. ``numpy.unique`` takes longer, as it hashes what nearly is in order."""
    merged = np.sort(np.concatenate(several), kind="stable")
    is_new = np.ones(merged.size, bool)
    np.not_equal(merged[1:], merged[:-1], out=is_new[1:])
    return merged[is_new]


class RowLanding(landing.Landing):
    """The landing of a push whose gradients come by rows.

    Attributes:
      sparse: the gradients, valid until ``close``.
      selected: the elements of each leaf that they are of, once they have come; also after ``close``.

    Args:
      session_tree: of the session.
      counts: of the leaves that come by rows.
      tree: of the payload.
      layout: as that of any landing, as are the others.
      memory: as above.
      give_back: as above.
    """

    def __init__(
        self,
        session_tree: trees.TreeSpec,
        counts: rows.Counts,
        tree: trees.TreeSpec,
        layout: Layout,
        memory: np.ndarray[Any, Any],
        give_back: Callable[[], None],
    ) -> None:
        super().__init__(tree, layout, memory, give_back)
        self.sparse = Sparse(session_tree, counts, self.arrays())
        self.selected: list[Selected] = []

    def finish(self, digest: sessions.Digest) -> None:
        """Checks that all bytes came, and came unharmed, and that they have indices.

        Raises:
          PayloadError: the payload ended early, or its digest is another.
          InvalidArgumentError: indices of rows are out of range, or not strictly increasing.
        """
        super().finish(digest)
        self.sparse.check()
        self.selected = self.sparse.selected

    def close(self) -> None:
        """Gives the memory back; may be called more than once."""
        if self.is_open:
            del self.sparse
        super().close()


def given(lent: landing.Landing | mean.Gathered | Sparse) -> np.ndarray[Any, Any] | mean.Gathered | Sparse:
    """What holds gradients: memory in the session's layout, several of these, or some rows."""
    if isinstance(lent, Sparse | mean.Gathered):
        return lent
    return lent.sparse if isinstance(lent, RowLanding) else lent.memory
