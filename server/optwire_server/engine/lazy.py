"""Lazy updates: of those elements of a session that have gradients, and no others.

What a block has of such elements is gathered, updated by the kernel of a flat block, and scattered into the block,
which is written in place. A block all of whose elements have gradients is updated as ever. In the session's turn only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from optwire_server.engine import cut, device, kernel, program, recipe, reductions, rows

Array = np.ndarray[Any, Any]


class Part(NamedTuple):
    """A span, what its blocks have of leaves, and its arrays: common ones, and the own ones of each block.

    The lists of arrays are written to.
    """

    span: cut.Span
    members: Sequence[Sequence[rows.Member]]
    common: list[Any]
    blocks: list[list[Any]]


def problem(compiled: program.Program, variant: recipe.Variant) -> str:
    """Why an update cannot be lazy; empty: it can. ``variant`` is prepared."""
    if not compiled.cut.is_flat:
        return f"treats no element by itself: its granularity is {compiled.granularity.name.lower()}"
    if compiled.every > 1:
        return "gathers several pushes for one update"
    for span in compiled.cut.spans:
        for partial in compiled.kernel(span, span.blocks[0]).step(variant).partials:
            if isinstance(partial, kernel.Call) and partial.takes.own:
                return "takes sums over elements that have no gradients"
    return ""


def prepare(compiled: program.Program, most: int) -> None:
    """Compiles what moves up to so many elements in and out of blocks, also of spans that are split; on this thread."""
    for span in compiled.cut.spans:
        largest = span.blocks[0].parts[0].size
        for size in {largest, min(largest, cut.SMALL)}:
            compiled.movers.prepare(compiled.kernel_for(span, size)[1], size, most)


class Update:
    """One lazy update.

    Args:
      compiled: of the session's step.
      variant: which of its updates; prepared.
      operands: what it takes beside gradients, one by one.
      sparse: the gradients.
      memory: gives so many bytes on a boundary; the same ones each time.
    """

    def __init__(
        self,
        compiled: program.Program,
        variant: recipe.Variant,
        operands: list[Any],
        sparse: rows.Sparse,
        memory: Callable[[int], Array],
    ) -> None:
        self._program = compiled
        self._variant = variant
        self._operands = operands
        self._sparse = sparse
        self._memory = memory
        self._reduced: list[Any] = []
        self.has_written = False
        self.notes: dict[str, float] = {}

    def run(self, parts: Sequence[Part]) -> device.Work[None]:
        """Writes the new values of elements that have gradients over the old ones, yielding between blocks."""
        yield from self._reduce(parts)
        for part in parts:
            common = part.common
            for group in self._groups(part):
                common = yield from self._group(part, group)
            part.common[:] = common

    def _reduce(self, parts: Sequence[Part]) -> device.Work[None]:
        """Takes the sums over all elements that have gradients, one after the other, in the order of the elements."""
        first = parts[0].span
        for at in range(len(self._program.kernel(first, first.blocks[0]).step(self._variant).partials)):
            found: list[Any] = []
            for part in parts:
                for group in self._groups(part):
                    partial = self._kernel(part.span, group)[1].step(self._variant).partials[at]
                    if isinstance(partial, float):
                        found.append(partial)
                        continue
                    found.append(np.asarray(self._call(partial, part, group, [])[0]))
                    yield
            with self._program.precision():
                self._reduced.append(reductions.combine(found, reductions.dtype()))

    def _groups(self, part: Part) -> Iterator[rows.Group]:
        """The elements of a span that have gradients; none where there are none, as what belongs to none goes on."""
        is_empty = True
        for group in self._sparse.groups(part.span, part.members):
            is_empty = False
            yield group
        if is_empty:
            yield rows.Group([], [], 0)

    def _group(self, part: Part, group: rows.Group) -> device.Work[list[Any]]:
        """Updates the elements of a group; returns the new common arrays."""
        size, each = self._kernel(part.span, group)
        step, count = each.step(self._variant), len(each.own)
        if group.is_whole:
            (number, _), *_ = group.members
            made = self._call(step.apply, part, group, part.blocks[number])
            part.blocks[number] = made[:count]
            self.has_written = True
            made[0].block_until_ready()
        else:
            own = [np.zeros(size, each.arrays[at].dtype) for at in each.own]
            self._gather(part, group, each, own)
            made = self._call(step.apply, part, group, own)
            yield from self._scatter(part, group, each, [np.asarray(array) for array in made[:count]])
        told = made[count + len(each.common) :]
        self.notes = self.notes or {name: float(value) for name, value in zip(step.notes, told, strict=False)}
        yield
        return made[count : count + len(each.common)]

    def _kernel(self, span: cut.Span, group: rows.Group) -> tuple[int, kernel.Kernel]:
        if group.is_whole:
            block = span.blocks[group.members[0][0]]
            return block.parts[0].size, self._program.kernel(span, block)
        return self._program.kernel_for(span, group.size)

    def _call(self, call: kernel.Call, part: Part, group: rows.Group, own: Sequence[Any]) -> list[Any]:
        size, _ = self._kernel(part.span, group)
        dtype = part.span.blocks[0].parts[0].dtype

        def grad(_: int) -> Array:
            memory = self._memory(size * dtype.itemsize).view(dtype)
            start = 0
            for values in group.values:
                memory[start : start + values.size] = values
                start += values.size
            memory[start:] = 0
            return memory

        arguments = call.arguments(self._operands, self._reduced, group.size, grad, part.common, own)
        return self._program.run(call, arguments)

    def _gather(self, part: Part, group: rows.Group, each: kernel.Kernel, own: Sequence[Array]) -> None:
        start = 0
        for number, positions in group.members:
            assert positions is not None, "a whole block is in a group of its own"
            there = self._program.movers.gather(each, part.blocks[number], positions)
            for array, values in zip(own, there, strict=True):
                array[start : start + positions.size] = values
            start += positions.size

    def _scatter(
        self, part: Part, group: rows.Group, each: kernel.Kernel, values: Sequence[Array]
    ) -> device.Work[None]:
        start = 0
        for number, positions in group.members:
            assert positions is not None, "a whole block is in a group of its own"
            few = [array[start : start + positions.size] for array in values]
            part.blocks[number] = self._program.movers.scatter(each, part.blocks[number], positions, few)
            self.has_written = True
            part.blocks[number][0].block_until_ready()
            start += positions.size
            yield
