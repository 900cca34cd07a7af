"""Workers in processes of their own are killed at random points, in every mode: the others go on, and it all adds up.

Quotes the issue: "Killing any worker at any point, the run goes on", and "no push counted twice". Every process logs
what it pushed and what it was told. From the logs alone it follows which pushes the session must have been made of, and
with them its parameters are computed again, in float64 NumPy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import pathlib
import random
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from tests.e2e import mortal_worker, proxy, wire

import optwire
from optwire_proto import aggregations, sessions
from optwire_server import testing

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_error_is_logged")]

LEASE_S = 1.5
RATE, MASS = 0.1, 0.5
WORKERS = 3
MARGIN = 15  # steps that are still to come when the end is announced
POINTS = ("upload", "waiting", "between")
MODES = (
    "single",
    f"sync({WORKERS}, lease_s={LEASE_S})",
    f"k_of_n(2, {WORKERS}, lease_s={LEASE_S})",
    f"quorum(1, 4, lease_s={LEASE_S})",
    f"async(damping=inverse, lease_s={LEASE_S})",
    f"bounded_staleness(6, lease_s={LEASE_S})",
    f"bounded_staleness(6, policy=wait, lease_s={LEASE_S})",
    f"buffered(2, damping=sqrt, lease_s={LEASE_S})",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Pushed:
    """A push that a log tells of. ``applied``: the step that it became, as far as anybody was told."""

    rank: int
    seq: int
    base: int
    process: int
    count: int
    applied: int | None = None


class Run:
    """A session, and the processes that work on it."""

    def __init__(self, client: optwire.Client, target: str, aggregation: str, folder: pathlib.Path) -> None:
        self.session = client.create_session(
            np.zeros(mortal_worker.SHAPE, np.float32),
            f"momentum({RATE}, {MASS})",
            name=secrets.token_hex(4),
            aggregation=aggregation,
        )
        self.folder = folder
        self.target = target
        self.by_rank: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}
        self.processes: list[subprocess.Popen[bytes]] = []

    def begin(self, rank: int, *, target: str = "", pause_s: float = 0.02) -> int:
        """Starts a process as the worker of a rank."""
        process = len(self.processes)
        settings = {"name": self.session.name, "rank": rank, "process": process, "folder": str(self.folder)}
        settings |= {"target": target or self.target, "pause_s": pause_s}
        command = [sys.executable, mortal_worker.__file__, json.dumps(settings)]
        self.processes.append(subprocess.Popen(command))
        self.by_rank[rank] = process, self.processes[-1]
        return process

    def log(self, process: int) -> list[dict[str, Any]]:
        """What a process has said so far; a line that it was killed in the middle of does not count."""
        path = self.folder / f"{process}.log"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def heard(self, process: int, what: str, after: int = 0) -> bool:
        return any(line["what"] == what for line in self.log(process)[after:])

    def kill(self, rank: int) -> int:
        process, running = self.by_rank.pop(rank)
        running.kill()
        running.wait(10)
        return process

    def step(self) -> int:
        return self.session.info().step

    def worker(self, rank: int) -> sessions.WorkerInfo | None:
        """What the session knows of a worker; a session of "single" tells nothing."""
        found = {int(worker.worker, 16): worker for worker in self.session.workers()}
        return found.get(rank)


@contextlib.contextmanager
def running(serving: testing.Serving, aggregation: str, folder: pathlib.Path) -> Iterator[Run]:
    with optwire.connect(serving.target, timeout=30) as client:
        run = Run(client, serving.target, aggregation, folder)
        try:
            yield run
        finally:
            for process in run.processes:
                process.kill()
                process.wait(10)


def until(condition: Callable[[], object], what: str, patience_s: float = 60.0) -> None:
    wire.until(condition, what, patience_s)


# --------------------------------------------------------------------------------------------------- where it is killed


def killed(run: Run, rank: int, point: str, chance: random.Random) -> None:
    """Kills the worker of a rank: in the middle of an upload, while its push waits for others, or between two steps."""
    process, _ = run.by_rank[rank]
    if point == "upload":
        run.kill(rank)  # its place is taken by one whose uploads pass a proxy
        with contextlib.closing(proxy.Proxy(run.target)) as way:
            process = run.begin(rank, target=way.target)
            until(lambda: run.heard(process, "joined"), "the worker behind the proxy")
            fault = way.fail(proxy.UP, bytes=chance.randrange(1_000, 150_000), act="hold")
            until(fault.done.is_set, "half an upload")
            run.kill(rank)
        return
    until(lambda: run.heard(process, "joined"), "a worker that has joined")
    if point == "waiting":
        seen = len(run.log(process))
        until(lambda: run.heard(process, "push", seen), "a push")
        with contextlib.suppress(AssertionError):  # where pushes do not wait
            wire.until(lambda: (found := run.worker(rank)) is not None and found.has_pushed, "it waits", 0.3)
    else:
        time.sleep(chance.uniform(0.0, 0.05))
    run.kill(rank)


@pytest.mark.parametrize("aggregation", MODES)
def test_workers_are_killed_anywhere_and_it_all_adds_up(
    serving: testing.Serving, tmp_path: pathlib.Path, aggregation: str
) -> None:
    chance = random.Random(aggregation)
    with running(serving, aggregation, tmp_path) as run:
        for rank in range(WORKERS):
            run.begin(rank, pause_s=chance.choice((0.01, 0.03)))
        for point in chance.sample(POINTS, len(POINTS)):
            rank = chance.randrange(WORKERS)
            killed(run, rank, point, chance)
            before = run.step()
            if chance.random() < 0.5:  # the others go on without it, once its lease is over
                until(lambda before=before: run.step() > before + 3, f"steps after a kill ({point})")
            run.begin(rank)
        replaced = list(run.by_rank.values())
        until(lambda: all(run.heard(process, "joined") for process, _ in replaced), "all to be there again")
        stop = tmp_path / "new"
        stop.write_text(str(run.step() + MARGIN))
        stop.rename(tmp_path / "stop")
        for _, process in replaced:
            assert process.wait(60) == 0
        found = run.session.params()
        step = run.session.step_count
        logs = [run.log(process) for process in range(len(run.processes))]
        last = {int(worker.worker, 16): worker.seq for worker in run.session.workers()}
    mode = aggregations.parse(aggregation)
    candidates = [pushes for pushes in possible(logs, last) if adds_up(mode, pushes, step)]
    computed = list(itertools.chain.from_iterable(histories(mode, pushes, step) for pushes in candidates))
    assert computed, f"no history of {step} steps fits the logs"
    assert step > MARGIN
    off = [float(np.abs(found - params(mode, history)).max()) for history in computed]
    print(f"{aggregation}: {step} steps, {sum(map(len, computed[0]))} pushes, {len(computed)} possible, off {off}")
    assert min(off) < 1e-5 * max(1.0, float(np.abs(found).max()))


# ---------------------------------------------------------------------------------------------------- what follows


def possible(logs: Sequence[Sequence[Mapping[str, Any]]], last: Mapping[int, int]) -> Iterator[list[Pushed]]:
    """Which pushes may have been counted, one for each (worker, seq): more than one way only where a process died."""
    told: dict[tuple[int, int], list[Pushed]] = {}
    unknown: dict[tuple[int, int], list[Pushed]] = {}
    newest: dict[int, int] = dict(last)
    for log in logs:
        open_: Pushed | None = None
        for line in log:
            rank = line["rank"]
            if line["what"] == "push":
                open_ = Pushed(rank, line["seq"], line["base"], line["process"], line["count"])
            elif line["what"] == "ack":
                assert open_ is not None
                assert line["seq"] == open_.seq
                told.setdefault((rank, open_.seq), []).append(dataclasses.replace(open_, applied=line["applied"]))
                open_ = None
            elif line["what"] == "late":
                open_ = None
            if line["what"] in ("ack", "late", "joined"):
                newest[rank] = max(newest.get(rank, 0), line["seq"])
        if open_ is not None:
            unknown.setdefault((open_.rank, open_.seq), []).append(open_)
    assert all(len(pushes) == 1 for pushes in told.values()), "two pushes were told that they are the same one"
    choices: list[list[list[Pushed]]] = []
    for rank in {rank for rank, _ in told.keys() | unknown.keys()}:
        for seq in range(1, 1 + max(seq for of, seq in told.keys() | unknown.keys() if of == rank)):
            sure, maybe = told.get((rank, seq), []), unknown.get((rank, seq), [])
            if sure:
                choices.append([sure])
            elif seq <= newest.get(rank, 0):
                assert maybe, f"worker {rank} counts a push {seq} that nobody has made"
                choices.append([[push] for push in maybe])
            else:  # nobody heard of it again; "single" does not tell
                choices.append([[], *([push] for push in maybe)] if not last else [[]])
    for chosen in itertools.product(*choices):
        yield list(itertools.chain.from_iterable(chosen))


def adds_up(mode: aggregations.Aggregation, pushes: Sequence[Pushed], steps: int) -> bool:
    """Whether some pushes can be the steps, each of as many as the mode takes, none of them staler than it allows."""
    sizes = dict.fromkeys(range(1, steps + 1), 0)
    for push in pushes:
        applied = push.base + 1 if mode.gathers else push.applied
        if applied is None:
            continue
        assert applied == push.applied or push.applied is None
        assert 1 <= applied <= steps + (mode.mode is aggregations.Mode.BUFFERED)
        assert 0 <= applied - 1 - push.base <= staleness_max(mode)
        sizes[applied] = sizes.get(applied, 0) + 1
    if mode.gathers:
        by_step = {(push.rank, push.base) for push in pushes}
        most = mode.k if mode.mode is aggregations.Mode.K_OF_N else mode.workers
        return len(by_step) == len(pushes) and all(1 <= size <= most for size in sizes.values())
    whole = mode.k if mode.mode is aggregations.Mode.BUFFERED else 1
    assert all(size <= whole for size in sizes.values())
    return 0 <= len(pushes) - steps * whole < whole


def staleness_max(mode: aggregations.Aggregation) -> float:
    if mode.takes_stale:
        return float("inf") if mode.staleness_max is None else mode.staleness_max
    return 0


def histories(mode: aggregations.Aggregation, pushes: Sequence[Pushed], steps: int) -> Iterator[list[list[Pushed]]]:
    """The pushes of each step; those whose step nobody was told can only be where others are missing."""
    known = [dataclasses.replace(p, applied=p.base + 1) if mode.gathers else p for p in pushes]
    whole = 1 if mode.mode is not aggregations.Mode.BUFFERED else mode.k
    sizes = dict.fromkeys(range(1, steps + 2), 0)
    for push in known:
        if push.applied is not None:
            sizes[push.applied] += 1
    unknown = [push for push in known if push.applied is None]
    last = len(pushes) - steps * whole
    places = [] if mode.gathers else [s for s in sizes for _ in range((whole if s <= steps else last) - sizes[s])]
    for order in set(itertools.permutations(places)):
        placed = [dataclasses.replace(p, applied=s) for p, s in zip(unknown, order, strict=True)]
        if all(0 <= s - 1 - p.base <= staleness_max(mode) for p, s in zip(unknown, order, strict=True)):
            every = [p for p in (*known, *placed) if p.applied is not None]
            yield [[p for p in every if p.applied == step] for step in range(1, steps + 1)]


def params(mode: aggregations.Aggregation, history: Sequence[Sequence[Pushed]]) -> np.ndarray:
    """Parameters after a history, from zero: v = MASS v + mean of s(staleness) g; w = w - RATE v."""
    w, v = np.zeros(mortal_worker.SHAPE), np.zeros(mortal_worker.SHAPE)
    for number, pushes in enumerate(history):
        total = np.zeros(mortal_worker.SHAPE)
        for push in pushes:
            power = {"none": 0.0, "inverse": -1.0, "sqrt": -0.5}[mode.damping]
            factor = (1.0 + abs(number - push.base)) ** power
            total += factor * mortal_worker.gradient(push.process, push.count)
        v = MASS * v + total / len(pushes)
        w -= RATE * v
    return w


def test_the_reckoning_finds_a_push_that_was_counted_twice() -> None:
    """And one that was left out, and a wrong order: what the test above leans on can fail."""
    mode = aggregations.parse("async")
    pushes = [Pushed(0, 1, 0, 0, 1, 1), Pushed(0, 2, 1, 0, 2, 2), Pushed(1, 1, 0, 1, 1)]
    assert adds_up(mode, pushes, 3)
    (history,) = histories(mode, pushes, 3)
    assert [[push.process for push in step] for step in history] == [[0], [0], [1]]
    assert not adds_up(mode, pushes, 4)
    assert not adds_up(mode, pushes, 2)
    right = params(mode, history)
    for wrong in ([history[1], history[0], history[2]], [history[0], history[0], history[2]], history[:2]):
        assert np.abs(params(mode, wrong) - right).max() > 1e-3
