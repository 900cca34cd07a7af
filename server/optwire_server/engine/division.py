"""How the state of a session is divided into spans, and how spans are split as their leaves part ways.

Knows which arrays belong where; what is computed with them is for others.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import numpy as np

from optwire_proto import errors, limits, tensors
from optwire_server.engine import cut, device, kernel, rows
from optwire_server.engine import program as programs

_NOBODY: Final = frozenset[int]()
# Programs and variants whose work on a session is remembered.
_KEPT_MAX = 16
# A state may grow by so much, or by its own size, as leaves part ways: each of them in blocks of its own at last.
_GROWTH_BYTES_MAX = 64 * limits.MIB
# Of some spans, by position, the leaves of each: in groups that part ways.
Groups = dict[int, list[list[int]]]


class SpanState(NamedTuple):
    """The arrays of a span: common ones, and the own ones of each block."""

    common: list[Any]
    blocks: list[list[Any]]


class Job(NamedTuple):
    """One block of an update.

    Attributes:
      at: position of its span.
      number: its position there.
      block: what is updated.
      kernel: what updates it.
      step: how; None: it stays as it is.
      is_gone: whether its leaves have no gradients.
    """

    at: int
    number: int
    block: cut.Block
    kernel: kernel.Kernel
    step: kernel.Step | None
    is_gone: bool


class Division:
    """The spans of a state, and what is looked up in them over and over again.

    Args:
      program: of the state, or one that has the same state.
      spans: in order.

    Attributes:
      spans: in order.
      held_bytes: of their state in memory.
    """

    def __init__(self, program: programs.Program, spans: tuple[cut.Span, ...]) -> None:
        self.spans = spans
        self._program = program
        self.held_bytes = sum(map(program.span_bytes, spans))
        self._kept: dict[tuple[programs.Program, programs.Variant | None], list[Job]] = {}

    @functools.cached_property
    def pieces(self) -> list[tuple[cut.Piece, ...]]:
        """Where each leaf is."""
        return cut.pieces(self.spans, len(self._program.tree.leaves))

    @functools.cached_property
    def members(self) -> list[list[list[rows.Member]]]:
        """What each block of each span has of leaves."""
        return [rows.members(span, self.pieces) for span in self.spans]

    @functools.cached_property
    def reading(self) -> tuple[cut.Piece, ...]:
        """The pieces of all leaves in payload order."""
        return cut.merged(self.pieces)

    @functools.cached_property
    def span_of(self) -> dict[int, int]:
        """Position of each leaf's span."""
        return {leaf: at for at, span in enumerate(self.spans) for leaf in span.leaves}

    def kernel(self, span: cut.Span) -> kernel.Kernel:
        """That of a span's first block."""
        return self._program.kernel(span, span.blocks[0])

    def jobs(
        self, program: programs.Program, variant: programs.Variant | None, gone: frozenset[int] = _NOBODY
    ) -> list[Job]:
        """What an update does, block by block.

        Args:
          program: of the step.
          variant: of the update; None: it does nothing.
          gone: leaves without gradients; none of them is in a span with others.
        """
        key = (program, variant)
        if not gone and key in self._kept:
            return self._kept[key]
        jobs = []
        for at, span in enumerate(self.spans):
            is_gone = not program.is_tree and span.leaves[0] in gone
            for number, block in enumerate(span.blocks):
                each = program.kernel(span, block)
                variants = program.variants(each, variant) if variant else ()
                own = variants[is_gone] if is_gone < len(variants) else None
                jobs.append(Job(at, number, block, each, each.step(own) if own else None, is_gone))
        if not gone:
            if len(self._kept) > _KEPT_MAX:
                self._kept.clear()
            self._kept[key] = jobs
        return jobs

    def growth(self, groups: Groups) -> int:
        """Bytes of memory that the state takes more once groups of leaves are apart.

        Raises:
          LimitError: more than any state may grow by.
        """
        grown = 0
        for at, parts in groups.items():
            sizes = (cut.sizes(self._program.tree, leaves) for leaves in parts)
            grown += sum(self._program.span_bytes(self.spans[at], each) for each in sizes)
            grown -= self._program.span_bytes(self.spans[at])
        least = self._program.held_bytes
        most = least + max(least, _GROWTH_BYTES_MAX)
        if grown > 0 and self.held_bytes + grown > most:
            raise errors.LimitError(
                f"state: {self.held_bytes + grown} bytes in memory, expected at most {most}: leaves that have no "
                "gradients while others have, or counts of their own, are held apart from these, each set of them in "
                "blocks of its own; push zeros for some of them, or load equal counts",
                subject="state",
                expected=f"at most {most} bytes in memory",
                got=str(self.held_bytes + grown),
            )
        return max(grown, 0)

    def without(self, gone: frozenset[int]) -> Groups:
        """Spans that have gradients for some of their leaves only: these, and the others."""
        if not gone or not self._program.cut.is_flat:
            return {}
        groups: Groups = {}
        for at in sorted({self.span_of[leaf] for leaf in gone}):
            leaves = self.spans[at].leaves
            if stay := [leaf for leaf in leaves if leaf not in gone]:
                groups[at] = [stay, [leaf for leaf in leaves if leaf in gone]]
        return groups

    def unlike(self, state: Sequence[SpanState], places: Mapping[programs.Place, tensors.Array]) -> Groups:
        """Spans whose leaves are to have other common arrays than one another: those with the same ones together."""
        if not self._program.cut.is_flat:
            return {}
        wanted: dict[int, dict[int, bytes]] = {}
        for place, array in places.items():
            if place.leaf is not None:
                each = self.kernel(self.spans[self.span_of[place.leaf]])
                if each.where[place.array][0]:
                    wanted.setdefault(place.leaf, {})[place.array] = np.asarray(array).tobytes()
        groups: Groups = {}
        for at in sorted({self.span_of[leaf] for leaf in wanted}):
            arrays = (np.asarray(array).tobytes() for array in state[at].common)
            there = dict(zip(self.kernel(self.spans[at]).common, arrays, strict=True))
            alike: dict[tuple[tuple[int, bytes], ...], list[int]] = {}
            for leaf in self.spans[at].leaves:
                alike.setdefault(tuple((there | wanted.get(leaf, {})).items()), []).append(leaf)
            if len(alike) > 1:
                groups[at] = list(alike.values())
        return groups

    def parted(self, state: Sequence[SpanState], groups: Groups) -> device.Work[tuple[Division, list[SpanState]]]:
        """The spans, those with groups split into these, and a state of them; what is split is copied."""
        spans: list[cut.Span] = []
        made: list[SpanState] = []
        for at, (span, old) in enumerate(zip(self.spans, state, strict=True)):
            if at not in groups:
                spans.append(span)
                made.append(SpanState(list(old.common), [list(own) for own in old.blocks]))
                continue
            for part in cut.split(self._program.cut, span, self._program.tree, groups[at]):
                spans.append(part)
                made.append(SpanState(list(old.common), (yield from self._regathered(old.blocks, part))))
        return (Division(self._program, tuple(spans)) if groups else self), made

    def _regathered(self, old: Sequence[list[Any]], part: cut.Span) -> device.Work[list[list[Any]]]:
        """The own arrays of some leaves of a span that has these blocks, as the blocks of another one."""
        blocks: list[list[Any]] = [[] for _ in part.blocks]
        for index in range(len(old[0])):
            segments = [
                np.asarray(old[piece.block][index])[piece.start : piece.stop]
                for leaf in part.leaves
                for piece in self.pieces[leaf]
            ]
            dtype = old[0][index].dtype
            flat = np.zeros(sum(block.parts[0].size for block in part.blocks), dtype)
            np.concatenate([*segments, np.empty(0, dtype)], out=flat[: part.starts[-1]])
            start = 0
            with self._program.precision(), self._program.placing():
                for own, block in zip(blocks, part.blocks, strict=True):
                    size = block.parts[0].size
                    own.append(jax.numpy.array(flat[start : start + size], copy=True))
                    start += size
            yield
        return blocks
