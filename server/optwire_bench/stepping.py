"""`optwire bench step`: rounds in which all ways to make a step take turns, each in a process of its own.

Ratios are formed within a round, from the medians of that round: whatever else the machine does disturbs them alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optwire_bench import cases, counting, folders, models, processes

REFERENCE = "local"
# Of the local step: median over best. Beyond it something else used the machine.
DISTURBED = 1.5
# Steps that compile and warm up, not counted; and one more at the start of every turn.
WARM_UP = 2
# Parameters up to -> steps of a turn.
STEPS = ((10_000, 100), (2_000_000, 10), (50_000_000, 4), (2_000_000_000, 2))
# Of the memory that is free, how much processes may be started for at a time.
MEMORY_SHARE = 0.75
# Memory of a process beside its arrays.
_PROCESS_BYTES = 350 << 20

# Files of a payload each that parameters are compared in: of the reference, a case's own one, what is held, what came.
_SCRATCH_PAYLOADS = 4

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
      labels: of the models.
      tensors: leaves of a model that is given by its size; 0: as ``models.model`` says.
      cases: that take turns beside the local step.
      rounds: of turns.
      steps: of one turn; 0: by the size of the model.
      extras: whether bytes on the wire and peaks of memory are measured too, in runs of their own.
    """

    labels: tuple[str, ...]
    tensors: int
    cases: tuple[cases.Case, ...]
    rounds: int
    steps: int = 0
    extras: bool = True


def run(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Measures; the result is what ``reports`` writes.

    Raises:
      BenchError: a process died, or parameters are not those of the reference.
    """
    result: dict[str, Any] = {"warm_up": WARM_UP, "models": []}
    for label in plan.labels:
        model = models.model(label, plan.tensors)
        taken = [case for case in plan.cases if model.payload_bytes <= case.payload_bytes_max]
        rows: list[dict[str, Any]] = []
        left_out: list[str] = []
        for number, group in enumerate(groups(taken, model, processes.available_bytes())):
            progress(f"{label}: {', '.join(case.name for case in group)}")
            found = _Rounds(plan, model, group, left_out, progress).rows()[number > 0 :]
            rows += [row | {"group": number} for row in found]
        entry = {
            "model": label,
            "parameters": model.parameters,
            "tensors": len(model.shapes),
            "payload_bytes": model.payload_bytes,
            "rounds": plan.rounds,
            "steps_a_turn": steps_of(plan, model),
            "rows": rows,
            "left_out": left_out,
            "disturbed": rows[0]["median_ms"] / rows[0]["best_ms"] > DISTURBED,
        }
        if plan.extras:
            ours = [case for case in taken if case.server]
            for case in ours:
                row = next((row for row in rows if row["case"] == case.name), None)
                if row is not None:
                    progress(f"{label}: bytes and memory of {case.name}")
                    row |= _wire_bytes(case, model, plan.tensors) | _memory(case, model, plan.tensors)
        result["models"].append(entry)
    return result


def steps_of(plan: Plan, model: models.Model) -> int:
    """Steps of one turn."""
    return plan.steps or next(steps for most, steps in STEPS if model.parameters <= most)


class _Rounds:
    """All rounds of some cases on one model; the local step is one of them."""

    def __init__(
        self, plan: Plan, model: models.Model, group: Sequence[cases.Case], left_out: list[str], progress: Progress
    ) -> None:
        self._plan, self._model, self._progress = plan, model, progress
        self._count = steps_of(plan, model)
        self._group = [cases.against(REFERENCE), *group]
        self._left_out = left_out
        self._turns: dict[str, list[dict[str, Any]]] = {}
        self._errors: dict[str, dict[str, float]] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each case that ran, the local step first."""
        with contextlib.ExitStack() as stack:
            scratch_bytes = _SCRATCH_PAYLOADS * self._model.payload_bytes
            self._folder = stack.enter_context(folders.folder(scratch_bytes=scratch_bytes))
            server = stack.enter_context(processes.server())
            running = []
            for case in self._group:
                role = self._open(case, server, stack)
                if role is not None:
                    running.append((case, role))
            start = cases.start(self._model)
            self._check(running, start, WARM_UP)
            for index in range(self._plan.rounds):
                for case, role in running if index % 2 == 0 else running[::-1]:
                    self._turns.setdefault(case.name, []).append(self._turn(case, role))
                self._check(running, start, WARM_UP + (index + 1) * (self._count + 1))
            local = [statistics.median(turn["seconds"]) for turn in self._turns[REFERENCE]]
            return [self._row(case, local) for case, _ in running]

    def _open(self, case: cases.Case, server: processes.Server, stack: contextlib.ExitStack) -> processes.Role | None:
        """The case's process; None: a peer that cannot take part is left out, and a transport that is not to be had."""
        try:
            role = processes.Role(case.name, case.command(server))
            stack.callback(role.end)
            facts = role.facts(model=self._model.label, tensors=self._plan.tensors)
            self._facts[case.name] = facts
            role.others = [server.pid] if case.server else list(facts.get("pids", ()))
            role.cost("step", WARM_UP)
        except processes.BenchError as exc:
            if case.server or case.name in cases.LOCALS:
                raise
            self._leave_out(f"{case.name}, {self._model.label}: {exc}")
            return None
        used, reason = role.ask("transport") if case.transport else ("", "")
        if used != case.transport:
            self._leave_out(f"{case.name}, {self._model.label}: over {used} instead: {reason}")
            return None
        return role

    def _leave_out(self, why: str) -> None:
        self._left_out.append(why)
        self._progress(f"left out: {why}")

    def _turn(self, case: cases.Case, role: processes.Role) -> dict[str, Any]:
        role.ask("step", count=1)
        return role.cost("step", self._count)

    def _check(self, running: Sequence[tuple[cases.Case, processes.Role]], start: np.ndarray, steps: int) -> None:
        """Compares everybody's parameters with the local ones, and replies with what the server holds; raises Wrong."""
        reference = self._saved(running[0][1], "reference")
        for case, role in running[1:]:
            facts, where = self._facts[case.name], f"{case.name}, {self._model.label}"
            wanted = self._saved(role, "own", "reference") if facts.get("reference") else reference
            held = self._saved(role, "held", "" if case.reply is None else "master")
            seen = cases.compare(held, wanted, start, self._checked(case), steps=steps, where=where)
            worst = self._errors.setdefault(case.name, seen)
            self._errors[case.name] = {key: max(value, worst[key]) for key, value in seen.items()}
            if case.reply is not None:
                found = self._saved(role, "found")
                cases.compare(found, held, start, case.reply, steps=steps, where=f"{where}, what came back")

    def _checked(self, case: cases.Case) -> cases.Check:
        path = self._facts[case.name].get("path")
        return cases.Check(path=path) if path else case.check

    def _saved(self, role: processes.Role, file: str, what: str = "") -> np.ndarray:
        path = self._folder / file
        path.unlink(missing_ok=True)  # an array may still be mapped from the one before
        role.ask("save", path=str(path), what=what)
        return np.memmap(path, np.float32, "r")

    def _row(self, case: cases.Case, local: Sequence[float]) -> dict[str, Any]:
        turns = self._turns[case.name]
        every = sorted(second for turn in turns for second in turn["seconds"])
        medians = [statistics.median(turn["seconds"]) for turn in turns]
        ratios = [own / other for own, other in zip(medians, local, strict=True)]
        steps = len(every)
        return {
            "case": case.name,
            "ours": case.server,
            "median_ms": statistics.median(medians) * 1e3,
            "best_ms": every[0] * 1e3,
            "p50_ms": statistics.median(every) * 1e3,
            "p90_ms": quantile(every, 0.9) * 1e3,
            "p99_ms": quantile(every, 0.99) * 1e3,
            "worst_ms": every[-1] * 1e3,
            "rounds_ms": [median * 1e3 for median in medians],
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "cpu_s_a_step": sum(turn["cpu_s"] for turn in turns) / steps,
            "faults_a_step": sum(turn["faults"] for turn in turns) / steps,
            "says": self._facts[case.name].get("says", ""),
            "check": "is the reference" if case.name == REFERENCE else str(self._checked(case)),
            "difference": self._errors.get(case.name, {"unequal": 0, "greatest": 0.0, "path": 0.0}),
        }


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value that ``share`` of an ordered sequence does not exceed."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def groups(taken: Sequence[cases.Case], model: models.Model, available_bytes: int) -> list[list[cases.Case]]:
    """Cases that fit in memory at the same time, beside the local one; as few groups as the order allows."""
    room = available_bytes * MEMORY_SHARE
    found: list[list[cases.Case]] = [[]]
    shared = cases.against(REFERENCE).payloads + _SCRATCH_PAYLOADS
    used = base = shared * model.payload_bytes + 2 * _PROCESS_BYTES
    for case in taken:
        if case.name == REFERENCE:
            continue
        need = case.payloads * model.payload_bytes + _PROCESS_BYTES
        if found[-1] and used + need > room:
            found.append([])
            used = base
        found[-1].append(case)
        used += need
    return found


def _wire_bytes(case: cases.Case, model: models.Model, tensors: int) -> dict[str, Any]:
    """Bytes of TCP payload a step, up and down, counted by a forwarder in between; nothing where there is no TCP."""
    if any("{unix}" in part for part in case.argv):
        return {}
    with processes.server() as server, counting.forwarder(server.target) as (front, count):
        role = processes.Role(case.name, [part.format(target=front) for part in case.argv])
        try:
            role.ask("open", model=model.label, tensors=tensors)
            role.ask("step", count=2)
            up, down = count.up, count.down
            role.ask("step", count=2)
            return {"wire_up_bytes": (count.up - up) / 2, "wire_down_bytes": (count.down - down) / 2}
        finally:
            role.end()


def _memory(case: cases.Case, model: models.Model, tensors: int) -> dict[str, Any]:
    """Peaks of the server's memory above its state, and of the client's above gradients and parameters.

    A server and a client of their own. Before anything is measured they have stepped another session, of 1.1 million
    parameters, that is gone: what they had to load and compile is no part of the figures.
    """
    with processes.server() as server:
        role = processes.Role(case.name, case.command(server))
        try:
            role.ask("open", model="1.1M", tensors=0)
            role.ask("step", count=3)
            role.ask("close")
            idle = processes.memory_bytes(server.pid), processes.memory_bytes(role.pid)
            role.ask("open", model=model.label, tensors=tensors)
            role.ask("step", count=2)
            processes.reset_peak(server.pid)
            processes.reset_peak(role.pid)
            role.ask("step", count=4)
            peaks = [processes.memory_bytes(pid, "VmHWM") for pid in (server.pid, role.pid)]
        finally:
            role.end()
    return {
        "server_above_state_mib": (peaks[0] - idle[0] - 3 * model.payload_bytes) / 2**20,
        "client_above_grads_and_params_mib": (peaks[1] - idle[1] - 2 * model.payload_bytes) / 2**20,
    }
