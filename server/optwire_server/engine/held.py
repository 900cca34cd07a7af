"""What one session holds on the device: the arrays of its state, block by block, and what is done with them.

In the session's turn only.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import numpy as np

from optwire_proto import limits, tensors
from optwire_server.engine import (
    cut,
    departure,
    device,
    division,
    kernel,
    lazy,
    mean,
    reductions,
    rows,
    slots,
    telemetry,
)
from optwire_server.engine import program as programs
from optwire_server.engine.layout import Layout

_NOBODY: Final = frozenset[int]()
# Asks for so many bytes of memory more, for all sessions together; raises LimitError.
Room = Callable[[int], None]


class UpdateError(Exception):
    """An update raised. ``state_lost`` says whether the old state was consumed before it did."""

    def __init__(self, problem: str, *, state_lost: bool) -> None:
        super().__init__(problem)
        self.state_lost = state_lost


class _Given(NamedTuple):
    """What all blocks of an update are given: operands one by one, sums over all leaves, and gradients in memory."""

    operands: list[Any]
    reduced: list[Any]
    memory: np.ndarray | mean.Gathered | rows.Sparse
    gone: frozenset[int]


class Held:
    """One session's arrays.

    Attributes:
      program: of the step to come.
      state: the arrays of each span; None: they are lost, or freed.
      lane: of the session's tasks.
    """

    def __init__(self, program: programs.Program) -> None:
        self.program = program
        self.state: list[division.SpanState] | None = None
        self.lane = device.Lane()
        self._scratch: dict[int, np.ndarray] = {}
        self._divided = division.Division(program, program.cut.spans)

    @property
    def spans(self) -> tuple[cut.Span, ...]:
        """What the state is the arrays of: the program's spans, until they are split."""
        return self._divided.spans

    @property
    def layout(self) -> Layout:
        """Where the leaves of a payload lie."""
        return self.program.layout

    @property
    def state_bytes(self) -> int:
        """Size of parameters and slots, as they can be read."""
        return self.program.state_bytes

    @property
    def is_in_blocks(self) -> bool:
        """Whether an update is made of several blocks."""
        return len(self.spans) > 1 or len(self.spans[0].blocks) > 1

    @property
    def held_bytes(self) -> int:
        """Size of parameters and slots in memory, as the spans are now."""
        return self._divided.held_bytes

    def fill(self, memory: np.ndarray, rates: tuple[float, ...], seed: int) -> None:
        """Makes the state before the first step, of parameters in the session's layout, which are copied.

        In no turn: nobody else knows the session yet, and a whole tree may compile.
        """
        given = _Given([], [], memory, frozenset())
        made = []
        for job in self._divided.jobs(self.program, programs.Variant()):
            parts = [self._grad(given, job, at) for at in range(len(job.block.parts))]
            own, common = job.kernel.init(parts, rates, seed)
            if job.number == 0:
                made.append(division.SpanState(common, []))
            made[-1].blocks.append(own)
        self.state = jax.block_until_ready(made)

    # ------------------------------------------------------------------------------------------- updates

    def update(
        self,
        variant: programs.Variant,
        operands: programs.Operands,
        memory: np.ndarray | mean.Gathered | rows.Sparse,
        out: np.ndarray | departure.Departure | None,
    ) -> device.Work[tuple[Mapping[str, float], list[np.ndarray]]]:
        """Replaces the state by the next one, block by block, yielding between them.

        Args:
          variant: which of the program's updates to run; prepared.
          operands: what it takes beside gradients.
          memory: the gradients, in the session's layout, those of several pushes, or some rows of them; read until this
            returns.
          out: where new parameters go, each block as soon as it is there: memory that they are written to in the
            session's layout, a departure, which none goes to if the update is refused, or None.

        Returns:
          Notes by name, and what was added to the parameters: segments in payload order, where the variant has it.

        Raises:
          UpdateError: nothing or everything of the old state is left, as it says.
        """
        results: list[tuple[division.Job, list[Any]]] = []
        common: dict[int, list[Any]] = {}
        try:
            gone = _gone(operands)
            if groups := self._divided.without(gone):
                self._divided, self.state = yield from self._divided.parted(self._state, groups)
            state = self._state
            jobs = self._divided.jobs(self.program, variant, gone)
            if operands.present is not None and not self.program.is_tree:
                operands = operands._replace(present=None)
            given = _Given(jax.tree.leaves(operands), [], memory, gone)
            yield from self._reduce(jobs, given)
            if isinstance(out, departure.Departure):
                out.begin(self._divided.reading)
            for job in jobs:
                if job.step is not None:
                    made = self._applied(job, job.step, given)
                    count, shared = len(job.kernel.own), len(job.kernel.common)
                    state[job.at].blocks[job.number] = made[:count]
                    common[job.at] = made[count : count + shared]
                    results.append((job, made[count + shared :]))
                    made[0].block_until_ready()
                if isinstance(out, np.ndarray):
                    self._write(job, common.get(job.at, state[job.at].common), out)
                elif out is not None:
                    out.updated(job.at, job.number, self._params(job, common.get(job.at, state[job.at].common)))
                    if not self._may_be_refused(results):
                        out.release()
                yield
            for at, arrays in common.items():
                state[at].common[:] = arrays
        except Exception as exc:
            lost = bool(results) or any(array.is_deleted() for array in jax.tree.leaves(self.state))
            if lost:
                self.state = None
            raise UpdateError(f"{type(exc).__name__}: {exc}", state_lost=lost) from exc
        return self._told(variant, results)

    def update_lazily(
        self, variant: programs.Variant, operands: programs.Operands, sparse: rows.Sparse
    ) -> device.Work[Mapping[str, float]]:
        """Updates those elements that have gradients, yielding between blocks; the others stay as they are.

        Args:
          variant: which of the program's updates to run; prepared, and one that ``lazy.problem`` says nothing of.
          operands: what it takes beside gradients.
          sparse: the gradients; read until this returns.

        Returns:
          Notes by name.

        Raises:
          UpdateError: nothing or everything of the old state is left, as it says.
        """
        given = jax.tree.leaves(operands)
        update = lazy.Update(self.program, variant, given, sparse, self._memory)
        try:
            spans = zip(self.spans, self._divided.members, self._state, strict=True)
            yield from update.run([lazy.Part(span, members, *state) for span, members, state in spans])
        except Exception as exc:
            lost = update.has_written or any(array.is_deleted() for array in jax.tree.leaves(self.state))
            if lost:
                self.state = None
            raise UpdateError(f"{type(exc).__name__}: {exc}", state_lost=lost) from exc
        return update.notes

    def write_params(self, out: np.ndarray) -> device.Work[None]:
        """Writes the parameters to memory of the layout's length, yielding between blocks."""
        for job in self._divided.jobs(self.program, None):
            self._write(job, self._state[job.at].common, out)
            yield

    @property
    def _state(self) -> list[division.SpanState]:
        assert self.state is not None, "the session's state is gone"
        return self.state

    def _reduce(self, jobs: Sequence[division.Job], given: _Given) -> device.Work[None]:
        """Takes the sums over all leaves, one after the other, each of the parts of all blocks in their order."""
        steps = [(job, job.step) for job in jobs if job.step is not None]
        for at in range(max((len(step.partials) for _, step in steps), default=0)):
            parts: list[Any] = []
            for job, step in steps:
                part = step.partials[at]
                if isinstance(part, float):
                    parts.append(part)
                else:
                    parts.append(np.asarray(self._call(part, job, given)[0]))
                    yield
            with self.program.precision():
                given.reduced.append(reductions.combine(parts, reductions.dtype()))

    def _applied(self, job: division.Job, step: kernel.Step, given: _Given) -> list[Any]:
        """Updates a block; what ``kernel.Step.apply`` gives, sums included."""
        # Over before gradients are gathered again, into the same memory.
        sums = jax.block_until_ready(self._call(step.figures, job, given)) if step.figures else []
        made = self._call(step.apply, job, given)
        first = len(job.kernel.own) + len(job.kernel.common) + len(step.notes)
        made[first:first] = sums
        return made

    def _call(self, call: kernel.Call, job: division.Job, given: _Given) -> list[Any]:
        """Runs an executable for a block."""
        common, blocks = self._state[job.at]
        own = blocks[job.number]
        grad = functools.partial(self._grad, given, job)
        arguments = call.arguments(given.operands, given.reduced, job.block.valid, grad, common, own)
        return self.program.run(call, arguments)

    def _grad(self, given: _Given, job: division.Job, at: int) -> Any:
        """A gradient, or parameters at first: a view where they lie in memory as the block has them."""
        part = job.block.parts[at]
        if job.is_gone or (given.gone and self.program.is_tree and at in given.gone):
            return np.zeros(part.shape, part.dtype)
        if isinstance(given.memory, rows.Sparse):
            return self._sparse_grad(given.memory, job, at)
        if isinstance(given.memory, mean.Gathered):
            return self._gathered_grad(given.memory, job, at)
        if part.offset is not None:
            stop = part.offset + part.size * part.dtype.itemsize
            return given.memory[part.offset : stop].view(part.dtype).reshape(part.shape)
        gathered = self._memory(part.size * part.dtype.itemsize).view(part.dtype)
        for run in job.block.runs:
            stop = run.offset + (run.stop - run.start) * part.dtype.itemsize
            gathered[run.start : run.stop] = given.memory[run.offset : stop].view(part.dtype)
        gathered[job.block.valid :] = 0
        return gathered

    def _gathered_grad(self, pushes: mean.Gathered, job: division.Job, at: int) -> Any:
        """A gradient that several pushes make together."""
        part = job.block.parts[at]
        if part.offset is not None and (blocks := pushes.plain(part.offset, part.size, part.dtype)):
            taken = self.program.means.take(blocks, pushes.divisor)
            if taken is not None:
                return taken.reshape(part.shape) if len(part.shape) != 1 else taken
        is_flat, size = self.program.cut.is_flat, part.size * part.dtype.itemsize
        gathered = (self._memory(size) if is_flat else _aligned(size)).view(part.dtype)
        for run in job.block.runs:
            if run.part == at:
                pushes.read(run.offset, gathered[run.start : run.stop])
        if is_flat:
            gathered[job.block.valid :] = 0
        return gathered.reshape(part.shape)

    def _sparse_grad(self, sparse: rows.Sparse, job: division.Job, at: int) -> np.ndarray:
        """A gradient that is zero where no rows came."""
        part = job.block.parts[at]
        if not self.program.cut.is_flat:
            whole = _aligned(part.size * part.dtype.itemsize).view(part.dtype)
            sparse.fill(self.spans[job.at].leaves[at], whole)
            return whole.reshape(part.shape)
        gathered = self._memory(part.size * part.dtype.itemsize).view(part.dtype)
        gathered[:] = 0
        sparse.fill_block(self._divided.members[job.at][job.number], gathered)
        return gathered

    def _memory(self, size: int) -> np.ndarray:
        """So many bytes on a boundary; the same ones each time."""
        if size not in self._scratch:
            self._scratch[size] = _aligned(size)
        return self._scratch[size]

    def _params(self, job: division.Job, common: list[Any]) -> list[np.ndarray]:
        """The parameters of a block, each part flat."""
        return self._read("", job.kernel, common, self._state[job.at].blocks[job.number])

    def _may_be_refused(self, results: Sequence[tuple[division.Job, list[Any]]]) -> bool:
        """Whether an update turns out to be none: any block knows, as what is not finite was looked for in all."""
        return self.program.rejects and not (results and _notes(*results[0]).get("finite"))

    def _write(self, job: division.Job, common: list[Any], out: np.ndarray) -> None:
        """Writes the parameters of a block where they belong."""
        arrays = self._params(job, common)
        for run in job.block.runs:
            segment = arrays[run.part][run.start : run.stop].view(np.uint8)
            out[run.offset : run.offset + segment.nbytes] = segment

    def _told(
        self, variant: programs.Variant, results: Sequence[tuple[division.Job, list[Any]]]
    ) -> tuple[Mapping[str, float], list[np.ndarray]]:
        """What an update tells, of what its blocks gave beside their state."""
        if not any(rest for _, rest in results):
            return {}, []
        notes: dict[str, float] = {}
        sums: dict[str, list[Any]] = {}
        added: dict[tuple[int, int], list[np.ndarray]] = {}
        for job, rest in results:
            assert job.step is not None
            told, parts = len(job.step.notes), len(job.step.sums)
            notes = notes or _notes(job, rest)
            for name, value in zip(job.step.sums, rest[told:], strict=False):
                sums.setdefault(name, []).append(np.asarray(value))
            if variant.updates:
                added[job.at, job.number] = [np.asarray(array).reshape(-1) for array in rest[told + parts :]]
        if variant.telemetry:
            totals = {name: float(reductions.combine(parts, np.float64)) for name, parts in sums.items()}
            notes |= telemetry.figures(totals, self.program.elements)
        if not variant.updates:
            return notes, []
        return notes, [added[at.span, at.block][at.part][at.start : at.stop] for at in self._divided.reading]

    # ------------------------------------------------------------------------------------------- reading

    def params(self, which: str = "") -> device.Work[list[np.ndarray]]:
        """The parameters, or those of a view that was prepared: segments in payload order.

        They are views of the state, or computed of it block by block, yielding between them.
        """
        found: dict[tuple[int, int], list[np.ndarray]] = {}
        segments = []
        for at in self._divided.reading:
            if (arrays := found.get((at.span, at.block))) is None:
                common, blocks = self._state[at.span]
                span = self.spans[at.span]
                each = self.program.kernel(span, span.blocks[at.block])
                arrays = found[at.span, at.block] = self._read(which, each, common, blocks[at.block])
                if each.view(which).call is not None:
                    yield
            segments.append(arrays[at.part][at.start : at.stop])
        return segments

    def read(self, which: str, selected: Sequence[rows.Selected | None]) -> device.Work[list[np.ndarray]]:
        """Parts of the parameters, or of a view that was prepared, yielding between blocks: flat copies, in order.

        Args:
          which: the view; empty: the parameters.
          selected: of each leaf; None: nothing.
        """
        out = []
        for leaf, wanted in enumerate(selected):
            if wanted is None:
                continue
            low, found = 0, np.empty(wanted.size, tensors.numpy_dtype(self.program.tree.leaves[leaf].dtype))
            for piece in self._divided.pieces[leaf]:
                high = low + piece.stop - piece.start
                inside, chosen = wanted.within(low, high)
                if inside.size:
                    common, blocks = self._state[piece.span]
                    span = self.spans[piece.span]
                    each = self.program.kernel(span, span.blocks[piece.block])
                    array = self._read(which, each, common, blocks[piece.block])[piece.part]
                    found[chosen] = array[inside + piece.start]
                    yield
                low = high
            out.append(found)
        return out

    def arrays(self) -> list[np.ndarray]:
        """All arrays of the state, in the order of the program's places: segments, views of the state."""
        with self.program.precision():
            return list(itertools.chain.from_iterable(map(self._segments, self.program.places)))

    def array(self, position: int) -> np.ndarray:
        """One array of the state, flat."""
        with self.program.precision():
            segments = self._segments(self.program.places[position])
        if len(segments) == 1:
            return segments[0]
        return np.concatenate([*segments, np.empty(0, self.program.array_dtype(position))])

    def _read(self, which: str, each: kernel.Kernel, common: list[Any], own: list[Any]) -> list[np.ndarray]:
        """Parameters of a block, each part flat."""
        view = each.view(which)
        if view.call is None:
            return [np.asarray(own[at]).reshape(-1) for at in view.arrays]
        takes = view.call.takes
        with self.program.precision():  # casts that change nothing are no part of a program, and would narrow here
            made = view.call.run(*(common[at] for at in takes.common), *(own[at] for at in takes.own))
        return [np.asarray(array).reshape(-1) for array in made]

    def _segments(self, place: programs.Place) -> list[np.ndarray]:
        at = 0 if place.leaf is None else self._divided.span_of[place.leaf]
        each, holder = self._divided.kernel(self.spans[at]), self._state[at]
        is_common, index = each.where[place.array]
        if is_common or not self.program.cut.is_flat or place.leaf is None:
            array = holder.common[index] if is_common else holder.blocks[0][index]
            return [slots.to_numpy(array).reshape(-1)]
        return [
            np.asarray(holder.blocks[piece.block][index])[piece.start : piece.stop]
            for piece in self._divided.pieces[place.leaf]
        ]

    # ------------------------------------------------------------------------------------------- writing

    def replace(self, arrays: Mapping[int, tensors.Array], room: Room) -> device.Work[None]:
        """Puts copies of arrays in the place of those of the state, yielding between them.

        Whatever it raises, the state is the old one.

        Args:
          arrays: by position among the program's places.
          room: asked before anything is copied, where the state grows.

        Raises:
          LimitError: there is no room for it.
        """
        places = {self.program.places[position]: array for position, array in arrays.items()}
        groups = self._divided.unlike(self._state, places)
        if grown := self._divided.growth(groups):
            room(grown)
        divided, state = yield from self._divided.parted(self._state, groups)
        yield from self._put(divided, state, places)
        self._divided, self.state = divided, jax.block_until_ready(state)

    def _put(
        self,
        divided: division.Division,
        state: list[division.SpanState],
        places: Mapping[programs.Place, tensors.Array],
    ) -> device.Work[None]:
        """Writes arrays over those of a state that nobody else has; leaves of a span have the same common arrays."""
        touched: dict[tuple[int, int, int], np.ndarray] = {}
        for place, array in places.items():
            if place.leaf is None:
                self._put_everywhere(divided, state, place, array)
                yield
                continue
            at = divided.span_of[place.leaf]
            is_common, index = divided.kernel(divided.spans[at]).where[place.array]
            if is_common or not self.program.cut.is_flat:
                holder = state[at].common if is_common else state[at].blocks[0]
                self._set(holder, index, array)
                yield
                continue
            flat, start = array.reshape(-1), 0
            for piece in divided.pieces[place.leaf]:
                key = at, piece.block, index
                if key not in touched:
                    touched[key] = np.array(state[at].blocks[piece.block][index])
                size = piece.stop - piece.start
                touched[key][piece.start : piece.stop] = flat[start : start + size].view(touched[key].dtype)
                start += size
                yield
        for (at, block, index), host in touched.items():
            self._set(state[at].blocks[block], index, host)
            yield

    def _put_everywhere(
        self, divided: division.Division, state: list[division.SpanState], place: programs.Place, array: tensors.Array
    ) -> None:
        """Writes an array that belongs to no leaf, in all spans."""
        for at, span in enumerate(divided.spans):
            each = divided.kernel(span)
            found = place.array if self.program.is_tree else each.position(place.name)
            if found is not None:
                is_common, index = each.where[found]
                self._set(state[at].common if is_common else state[at].blocks[0], index, array)

    def _set(self, holder: list[Any], index: int, array: tensors.Array) -> None:
        """Puts a copy of an array in the place of an old one."""
        with self.program.precision(), self.program.placing():
            holder[index] = slots.from_numpy(array, holder[index])

    def growth(self, gone: frozenset[int]) -> int:
        """Bytes of memory that the state takes more once leaves that have no gradients are apart from the rest.

        At any time, of the state as it is then.

        Raises:
          LimitError: more than any state may grow by.
        """
        divided = self._divided
        return divided.growth(divided.without(gone))

    def carry(self, new: Held, pairs: Sequence[tuple[int, int]], room: Room) -> device.Work[None]:
        """Copies arrays to another state, by positions here and there, as ``replace`` does.

        What is of another type there is left out.
        """
        arrays: dict[int, tensors.Array] = {}
        for here, there in pairs:
            if self.program.array_dtype(here) == new.program.array_dtype(there):
                arrays[there] = self.array(here).reshape(new.program.array_shape(there))
                yield
        yield from new.replace(arrays, room)


def _notes(job: division.Job, rest: Sequence[Any]) -> dict[str, float]:
    """What an update tells in every block, of what one gave beside its state."""
    assert job.step is not None
    return {name: float(value) for name, value in zip(job.step.notes, rest, strict=False)}


def _gone(operands: programs.Operands) -> frozenset[int]:
    """Leaves that a push has no gradients for."""
    if operands.present is None:
        return _NOBODY
    return frozenset(leaf for leaf, is_there in enumerate(operands.present) if not is_there)


def _aligned(size: int) -> np.ndarray:
    """Memory on a boundary, so that it is adopted as it is."""
    whole = np.zeros(size + limits.ALIGNMENT_BYTES, np.uint8)
    start = -whole.ctypes.data % limits.ALIGNMENT_BYTES
    return whole[start : start + size]
