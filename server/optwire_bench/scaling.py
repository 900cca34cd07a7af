"""`optwire bench workers`, its first half: steps of several workers whose gradients are averaged, beside those of one.

A crew is the workers of one session, each a process of its own; a peer's crew shares whatever the peer calls that. All
crews take turns within a round. A step begins when the first worker of a crew begins, and ends when the last has its
parameters. Those are compared with Adam on the mean, computed in one process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from optwire_bench import cases, folders, models, processes, stepping

# Memory of a worker's process beside its arrays, ours and a peer's.
_OWN_BYTES, _PEER_BYTES = 130 << 20, 400 << 20
# What each further worker needs at most, both ends together, in payloads.
_FURTHER_PAYLOADS = 4
# Files of a payload each that parameters are compared in: of the reference, what is held, what came.
_SCRATCH_PAYLOADS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
      label: of the model.
      counts: of workers, beside one.
      cases: that take turns; the first, one of ours, does in every group.
      rounds: of turns.
      steps: of one turn; 0: by the size of the model.
    """

    label: str
    counts: tuple[int, ...]
    cases: tuple[cases.Case, ...]
    rounds: int
    steps: int = 0


def run(plan: Plan, progress: stepping.Progress) -> dict[str, Any]:
    """Measures; the result is what ``reports`` writes.

    Raises:
      BenchError: a process died, or parameters are not those of the reference.
    """
    model = models.model(plan.label)
    steps = plan.steps or next(steps for most, steps in stepping.STEPS if model.parameters <= most)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for count in plan.counts:
        for number, group in enumerate(groups(plan.cases, model, count, processes.available_bytes())):
            progress(f"{plan.label}, {count} workers: {', '.join(case.name for case in group)}")
            rounds = _Rounds(model, group, count, steps, left_out, progress)
            rows += [row | {"of": count, "group": number} for row in rounds.rows(plan.rounds)]
    return {
        "model": plan.label,
        "parameters": model.parameters,
        "rounds": plan.rounds,
        "steps_a_turn": steps,
        "rows": rows,
        "left_out": left_out,
        "disturbed": sorted(
            {
                row["of"]
                for row in rows
                if row["case"] == stepping.REFERENCE and row["median_ms"] > stepping.DISTURBED * row["best_ms"]
            }
        ),
    }


def groups(
    taken: Sequence[cases.Case], model: models.Model, count: int, available_bytes: int
) -> list[list[cases.Case]]:
    """Cases whose crews fit in memory at the same time, in their order, the first of them in each group."""

    def need(case: cases.Case) -> int:
        payloads = case.payloads + (count - 1) * _FURTHER_PAYLOADS
        if not case.server:
            return payloads * model.payload_bytes + (count + 1) * _PEER_BYTES
        return (payloads + case.payloads) * model.payload_bytes + (count + 1) * _OWN_BYTES

    local = 2 * cases.against(stepping.REFERENCE).payloads + _SCRATCH_PAYLOADS
    anchor, *others = taken
    used = base = local * model.payload_bytes + 3 * _PEER_BYTES + need(anchor)
    found = [[anchor]]
    for case in others:
        if len(found[-1]) > 1 and used + need(case) > available_bytes * stepping.MEMORY_SHARE:
            found.append([anchor])
            used = base
        found[-1].append(case)
        used += need(case)
    return found


class Crew:
    """The workers of one case, each a process; ended with the stack.

    Raises:
      BenchError: one of them could not begin.
    """

    def __init__(
        self, case: cases.Case, count: int, model: models.Model, server: processes.Server, stack: contextlib.ExitStack
    ) -> None:
        self.case, self.count = case, count
        self.turns: list[dict[str, Any]] = []
        size = 1 if case.name == stepping.REFERENCE else count
        meeting = stack.enter_context(tempfile.TemporaryDirectory(prefix="optwire-crew-"))
        self._roles: list[processes.Role] = []
        for rank in range(size):
            self._roles.append(processes.Role(f"{case.name}, worker {rank}", case.command(server)))
            stack.callback(self._roles[-1].end)
        stack.callback(self._finish)
        for rank, role in enumerate(self._roles):
            role.tell("open", model=model.label, tensors=0, rank=rank, workers=count, meeting=meeting)
        facts = [role.told() for role in self._roles]
        self.says = str(facts[0].get("says", ""))
        self._pids = [role.pid for role in self._roles]
        self._pids += [server.pid] if case.server else [pid for fact in facts for pid in fact.get("pids", ())]

    @property
    def roles(self) -> Sequence[processes.Role]:
        """By rank."""
        return self._roles

    def _finish(self) -> None:
        """Tells all of them, before one is waited for: a peer's may end together only."""
        for role in self._roles:
            role.finish()

    def steps(self, count: int) -> None:
        """So many steps, that are not kept."""
        for _ in range(count):
            self._step()

    def turn(self, count: int) -> None:
        """A step that is not kept, and so many that are."""
        self.steps(1)
        before = processes.spent(self._pids)
        seconds = [self._step() for _ in range(count)]
        self.turns.append({"seconds": seconds, "cpu_s": processes.spent(self._pids) - before})

    def _step(self) -> float:
        """Seconds from the first worker's beginning to the last one's end."""
        for role in self._roles:
            role.tell("step", count=1)
        told = [role.told() for role in self._roles]
        try:
            ends = [turn["starts"][0] + turn["seconds"][0] for turn in told]
            return float(max(ends) - min(turn["starts"][0] for turn in told))
        except (KeyError, TypeError, IndexError):
            raise processes.BenchError(
                f"{self.case.name}: answered {str(told)[:80]}, expected starts and seconds"
            ) from None


class _Rounds:
    """All rounds of some cases with so many workers, of ours beside one worker each."""

    def __init__(
        self,
        model: models.Model,
        group: Sequence[cases.Case],
        count: int,
        steps: int,
        left_out: list[str],
        progress: stepping.Progress,
    ) -> None:
        self._model, self._group, self._count, self._steps = model, group, count, steps
        self._left_out, self._progress = left_out, progress

    def rows(self, rounds: int) -> list[dict[str, Any]]:
        """A row for each crew that ran, the references first."""
        local = cases.against(stepping.REFERENCE)
        wanted = [(case, count) for case in (local, *self._group) for count in (1, self._count)]
        with contextlib.ExitStack() as stack:
            scratch_bytes = _SCRATCH_PAYLOADS * self._model.payload_bytes
            self._folder = stack.enter_context(folders.folder(scratch_bytes=scratch_bytes))
            server = stack.enter_context(processes.server())
            crews = []
            for case, count in wanted:
                if count == 1 and not (case.server or case is local):
                    continue  # `bench step` has the peers' one worker
                crew = self._begun(case, count, server, stack)
                if crew is not None:
                    crews.append(crew)
            start = cases.start(self._model)
            self._check(crews, start, stepping.WARM_UP)
            for index in range(rounds):
                for crew in crews if index % 2 == 0 else crews[::-1]:
                    crew.turn(self._steps)
                self._check(crews, start, stepping.WARM_UP + (index + 1) * (self._steps + 1))
            return [self._row(crew, crews) for crew in crews]

    def _begun(
        self, case: cases.Case, count: int, server: processes.Server, stack: contextlib.ExitStack
    ) -> Crew | None:
        """A crew that has warmed up; None: a peer, or a transport, that is not to be had."""
        where = f"{case.name}, {count} workers"
        with contextlib.ExitStack() as own:
            try:
                crew = Crew(case, count, self._model, server, own)
                crew.steps(stepping.WARM_UP)
            except processes.BenchError as exc:
                if case.server or case.name == stepping.REFERENCE:
                    raise
                self._leave_out(f"{where}: {exc}")
                return None
            for role in crew.roles if case.transport else ():
                used, reason = role.ask("transport")
                if used != case.transport:
                    self._leave_out(f"{where}: over {used} instead: {reason}")
                    return None
            stack.push(own.pop_all())
        return crew

    def _leave_out(self, why: str) -> None:
        self._left_out.append(why)
        self._progress(f"left out: {why}")

    def _check(self, crews: Sequence[Crew], start: np.ndarray, steps: int) -> None:
        """Compares everybody's parameters with those of the reference; raises Wrong."""
        references = {crew.count: crew for crew in crews if crew.case.name == stepping.REFERENCE}
        for count, reference in references.items():
            wanted = self._saved(reference.roles[0], "reference")
            for crew in crews:
                if crew.count == count and crew is not reference:
                    self._check_crew(crew, wanted, start, steps)

    def _check_crew(self, crew: Crew, wanted: np.ndarray, start: np.ndarray, steps: int) -> None:
        case, held = crew.case, wanted
        if case.reply is not None:
            held = self._saved(crew.roles[0], "held", "master")
            cases.compare(held, wanted, start, case.check, steps=steps, where=f"{case.name}, what is held")
        for role in crew.roles:
            found = self._saved(role, "found")
            cases.compare(found, held, start, case.reply or case.check, steps=steps, where=role.name)

    def _saved(self, role: processes.Role, file: str, what: str = "") -> np.ndarray:
        path = pathlib.Path(self._folder, file)
        path.unlink(missing_ok=True)  # an array may still be mapped from the one before
        role.ask("save", path=str(path), what=what)
        return np.memmap(path, np.float32, "r")

    def _row(self, crew: Crew, crews: Sequence[Crew]) -> dict[str, Any]:
        medians = [statistics.median(turn["seconds"]) for turn in crew.turns]
        every = [second for turn in crew.turns for second in turn["seconds"]]
        return {
            "case": crew.case.name,
            "workers": crew.count,
            "ours": crew.case.server,
            "median_ms": statistics.median(medians) * 1e3,
            "best_ms": min(every) * 1e3,
            "worst_ms": max(every) * 1e3,
            "rounds_ms": [median * 1e3 for median in medians],
            "cpu_s_a_step": sum(turn["cpu_s"] for turn in crew.turns) / len(every),
            "over": {
                name: _ratios(medians, other)
                for other in crews
                if other is not crew and (name := _compared(crew, other)) is not None
            },
            "says": crew.says,
            "check": "is the reference" if crew.case.name == stepping.REFERENCE else str(crew.case.check),
        }


def _compared(crew: Crew, other: Crew) -> str | None:
    """What another crew is called where one's steps are compared with its; None: they are not."""
    if other.case == crew.case:
        return "one worker" if other.count == 1 else None
    is_peer = not other.case.server and other.case.name != stepping.REFERENCE
    return other.case.name if is_peer and other.count == crew.count else None


def _ratios(medians: Sequence[float], other: Crew) -> dict[str, float]:
    """Of a step's time over another's, formed within each round."""
    its = [statistics.median(turn["seconds"]) for turn in other.turns]
    ratios = [a / b for a, b in zip(medians, its, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
