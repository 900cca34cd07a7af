"""The cut: which leaves of a session lie together, and in which blocks they are updated. Pure: no array, no compiler.

A **span** is what one rule treats alike: leaves of one kind, laid end to end and cut into flat blocks (ELEMENT), one
leaf in its own shape (TENSOR), or all leaves (TREE). A **block** is what one call of a compiled kernel updates. A span
can be split later, as its leaves part ways; where its leaves lie in a landing stays as it was.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from optwire_proto import tensors, trees
from optwire_server.engine import layout as layouts
from optwire_server.engine.granularity import Granularity
from optwire_server.engine.layout import Layout

# Elements of a flat block: few enough that temporaries stay small and other sessions get their turn after a
# millisecond, enough that a call costs a hundredth of it.
BLOCK = 1 << 20
# Of the blocks that a short span, or the end of a long one, is cut into.
SMALL = 1 << 14
# More small blocks than these take longer than one large block that is mostly padding.
SMALL_MAX = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One array of a block.

    Attributes:
      shape: of the array.
      dtype: its element type.
      size: its number of elements.
      offset: where it lies in a landing, in bytes, as it is; None: it has to be gathered.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    size: int
    offset: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Elements ``start`` to ``stop`` of a part, flat, and the byte of a landing where they are."""

    part: int
    start: int
    stop: int
    offset: int


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """What one call updates.

    Attributes:
      parts: the arrays of gradients, and of parameters: one, but in a whole tree.
      valid: elements of leaves; what follows in a flat block is padding.
      runs: where they are in a landing.
    """

    parts: tuple[Part, ...]
    valid: int
    runs: tuple[Run, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Leaves that are updated alike.

    Attributes:
      kind: position of their kind in the cut.
      leaves: their positions in the tree.
      starts: in a flat span, the first element of each, and the end.
      blocks: in order.
    """

    kind: int
    leaves: tuple[int, ...]
    starts: tuple[int, ...]
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start`` to ``stop``, flat, of a part of a block of a span."""

    span: int
    block: int
    part: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a session is cut.

    Attributes:
      granularity: how finely.
      kinds: what tells leaves apart that are not updated alike.
      spans: as they are at first.
      layout: where the leaves of a payload lie.
    """

    granularity: Granularity
    kinds: tuple[Hashable, ...]
    spans: tuple[Span, ...]
    layout: Layout

    @property
    def is_flat(self) -> bool:
        """Whether blocks are flat ranges of elements."""
        return self.granularity is Granularity.ELEMENT

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.granularity, self.kinds, self.layout))

    def __hash__(self) -> int:
        """Taken once: there may be tens of thousands of leaves."""
        return self._hash


def make(tree: trees.TreeSpec, granularity: Granularity, verdicts: Sequence[Hashable]) -> Cut:
    """The cut of a tree.

    Args:
      tree: the session's.
      granularity: how finely it may be cut.
      verdicts: what the spec says of each leaf, beside its element type and shape.
    """
    leaves = tree.leaves
    if granularity is Granularity.TREE:
        layout = layouts.aligned(tree)
        parts = tuple(_part(leaf, offset) for leaf, offset in zip(leaves, layout.offsets, strict=True))
        return Cut(granularity, ((),), (Span(0, tuple(range(len(leaves))), (), (_whole(parts),)),), layout)
    if granularity is Granularity.TENSOR:
        layout = layouts.aligned(tree)
        kinds: dict[Hashable, int] = {}
        spans = []
        for index, leaf in enumerate(leaves):
            kind = kinds.setdefault((verdicts[index], leaf.dtype, leaf.shape), len(kinds))
            spans.append(Span(kind, (index,), (), (_whole((_part(leaf, layout.offsets[index]),)),)))
        return Cut(granularity, tuple(kinds), tuple(spans), layout)
    return _flat(tree, verdicts)


def _part(leaf: trees.LeafSpec, offset: int) -> Part:
    return Part(leaf.shape, tensors.numpy_dtype(leaf.dtype), math.prod(leaf.shape), offset)


def _whole(parts: tuple[Part, ...]) -> Block:
    """A block of arrays in their own shapes."""
    runs = tuple(
        Run(position, 0, part.size, part.offset)
        for position, part in enumerate(parts)
        if part.size and part.offset is not None
    )
    return Block(parts, sum(part.size for part in parts), runs)


def _flat(tree: trees.TreeSpec, verdicts: Sequence[Hashable]) -> Cut:
    members: dict[tuple[Hashable, str, bool], list[int]] = {}
    for index, leaf in enumerate(tree.leaves):
        members.setdefault((verdicts[index], leaf.dtype, math.prod(leaf.shape) == 1), []).append(index)
    offsets = [0] * len(tree.leaves)
    gaps, bounds, first = [], [], 0
    for (_, _, is_single), positions in members.items():
        end = first
        for index in positions:
            offsets[index] = end
            end += tree.leaves[index].nbytes
        itemsize = tensors.itemsize(tree.leaves[positions[0]].dtype)
        stop = layouts.padded(first + sum(_sizes((end - first) // itemsize, is_single=is_single)) * itemsize)
        if stop > end:
            gaps.append((end, stop))
        bounds.append(first)
        first = stop
    layout = Layout(tuple(offsets), first, tuple(gaps))
    spans = tuple(
        _span(kind, positions, tree, layout, first)
        for kind, (positions, first) in enumerate(zip(members.values(), bounds, strict=True))
    )
    return Cut(Granularity.ELEMENT, tuple(members), spans, layout)


def _sizes(elements: int, *, is_single: bool) -> list[int]:
    """The blocks of so many elements; one at least, as what belongs to no leaf must go on, too.

    Leaves of a single element have a block each: by itself, such a leaf is rounded otherwise than one among others.
    """
    if is_single:
        return [1] * elements
    whole, rest = divmod(elements, BLOCK)
    small = -(-rest // SMALL)
    if small > SMALL_MAX:
        return [BLOCK] * (whole + 1)
    return [BLOCK] * whole + [SMALL] * (small if whole else max(small, 1))


def _span(kind: int, positions: Sequence[int], tree: trees.TreeSpec, layout: Layout, first: int | None) -> Span:
    """A flat span; ``first`` is its first byte in a landing, None where its leaves do not lie together there."""
    leaves = [tree.leaves[index] for index in positions]
    dtype = tensors.numpy_dtype(leaves[0].dtype)
    starts = tuple(itertools.accumulate((leaf.nbytes // dtype.itemsize for leaf in leaves), initial=0))
    ranges = _merged(starts, [layout.offsets[index] for index in positions], dtype.itemsize)
    blocks, start = [], 0
    for size in sizes(tree, positions):
        offset = None if first is None else first + start * dtype.itemsize
        runs = tuple(_within(ranges, start, start + size, dtype.itemsize))
        valid = max(0, min(size, starts[-1] - start))
        blocks.append(Block((Part((size,), dtype, size, offset),), valid, runs))
        start += size
    return Span(kind, tuple(positions), starts, tuple(blocks))


def _merged(starts: Sequence[int], offsets: Sequence[int], itemsize: int) -> list[tuple[int, int, int]]:
    """(first element, end, byte) of stretches of a span that lie together in a landing, too."""
    merged: list[tuple[int, int, int]] = []
    for start, stop, offset in zip(starts, starts[1:], offsets, strict=False):
        if stop == start:
            continue
        if merged and merged[-1][2] + (start - merged[-1][0]) * itemsize == offset:
            merged[-1] = (merged[-1][0], stop, merged[-1][2])
        else:
            merged.append((start, stop, offset))
    return merged


def _within(ranges: Sequence[tuple[int, int, int]], start: int, stop: int, itemsize: int) -> Iterator[Run]:
    """The parts of stretches that are in a block, as runs of it."""
    for low, high, offset in ranges:
        a, b = max(low, start), min(high, stop)
        if a < b:
            yield Run(0, a - start, b - start, offset + (a - low) * itemsize)


def sizes(tree: trees.TreeSpec, positions: Sequence[int]) -> list[int]:
    """The blocks of a flat span of some leaves, by their numbers of elements."""
    counts = [math.prod(tree.leaves[index].shape) for index in positions]
    return _sizes(sum(counts), is_single=all(count == 1 for count in counts))


def split(cut: Cut, span: Span, tree: trees.TreeSpec, groups: Sequence[Sequence[int]]) -> tuple[Span, ...]:
    """A flat span in several, one for each group of its leaves; none of them lies together any more."""
    return tuple(_span(span.kind, positions, tree, cut.layout, None) for positions in groups)


def pieces(spans: Sequence[Span], leaves: int) -> list[tuple[Piece, ...]]:
    """Where each leaf of a tree is, in order."""
    found: list[tuple[Piece, ...]] = [()] * leaves
    for at, span in enumerate(spans):
        if not span.starts:
            for part, (index, array) in enumerate(zip(span.leaves, span.blocks[0].parts, strict=True)):
                found[index] = (Piece(at, 0, part, 0, array.size),)
            continue
        bounds = tuple(itertools.accumulate((block.parts[0].size for block in span.blocks), initial=0))
        block = 0
        for index, start, stop in zip(span.leaves, span.starts, span.starts[1:], strict=False):
            own = []
            while start < stop:
                while bounds[block + 1] <= start:
                    block += 1
                end = min(stop, bounds[block + 1])
                own.append(Piece(at, block, 0, start - bounds[block], end - bounds[block]))
                start = end
            found[index] = tuple(own)
    return found


def merged(found: Sequence[tuple[Piece, ...]]) -> tuple[Piece, ...]:
    """The pieces of leaves in order, neighbours joined and empty ones left out."""
    joined: list[Piece] = []
    for piece in itertools.chain.from_iterable(found):
        if piece.start == piece.stop:
            continue
        last = joined[-1] if joined else None
        here = piece.span, piece.block, piece.part, piece.start
        if last and (last.span, last.block, last.part, last.stop) == here:
            joined[-1] = dataclasses.replace(last, stop=piece.stop)
        else:
            joined.append(piece)
    return tuple(joined)
