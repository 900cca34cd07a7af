"""`optwire bench workers`, its second half: what fast workers get done beside a slow one, by mode of aggregation.

Four workers whose gradient takes a while, which is a sleep, one of them several times as long. In windows that take
turns: all four, and the fast ones alone. Each window is a session of its own. As a module, one such worker.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from typing import Any

from optwire_bench import models, processes, roles, stepping

MODEL = "10k"
FAST = 3
# A session of all four, and one of the fast workers alone.
MODES = (
    ("sync(4)", "sync(3)"),
    ("k_of_n(3, 4)", "sync(3)"),
    ("async", "async"),
    ("bounded_staleness(8)", "bounded_staleness(8)"),
    ("bounded_staleness(8, policy=wait)", "bounded_staleness(8, policy=wait)"),
    ("buffered(3)", "buffered(3)"),
)
# Between telling workers to begin and their beginning.
_LEAD_S = 0.1
_WARM_UP_S = 0.5


class Worker:
    """The thin client, one worker."""

    def __init__(self, target: str) -> None:
        import optwire

        self._client = optwire.connect(target, timeout=60.0)

    def open(self, name: str, aggregation: str, rank: int) -> None:
        """Creates a session, as worker 0, or attaches to the one that worker 0 has created."""
        model = models.model(MODEL)
        if rank == 0:
            spec = "momentum(1e-6, 0.9)"
            self._session = self._client.create_session(
                models.params(model), spec, name=name, aggregation=aggregation, worker=0
            )
        else:
            self._session = self._client.attach(name, worker=rank)
        self._session.params()
        self._grads = models.grads(model, rank)

    def work(self, begins: float, ends: float, gradient_s: float) -> dict[str, int]:
        """Steps from one time to another, by the clock that processes share; then it leaves.

        Returns:
          Pushes that were answered within the time: applied, and dropped as they came too late; and the newest step
          that was heard of.
        """
        applied = late = step = 0
        time.sleep(max(0.0, begins - time.monotonic()))
        while True:
            time.sleep(gradient_s)
            self._session.step(self._grads, late="params")
            if time.monotonic() > ends:
                break
            is_late, late = self._session.late_count > late, self._session.late_count
            applied += not is_late
            step = self._session.step_count
        self._session.close()
        return {"applied": applied, "late": late, "step": step}

    def delete(self, name: str) -> None:
        """Ends a session."""
        self._client.delete_session(name)


def run(gradient_s: float, slower: float, window_s: float, rounds: int, progress: stepping.Progress) -> dict[str, Any]:
    """Measures; the result is what ``reports`` writes. Raises BenchError where a process died."""
    found: dict[str, list[list[dict[str, int]]]] = {}
    everyone = [gradient_s] * FAST + [slower * gradient_s]
    windows = dict.fromkeys([(mode, FAST + 1) for mode, _ in MODES] + [(alone, FAST) for _, alone in MODES])
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(processes.server())
        workers = []
        for rank in range(FAST + 1):
            workers.append(processes.Role(f"worker {rank}", processes.module("stragglers", server.target)))
            stack.callback(workers[-1].end)
        _window(workers, "warm-up", "async", everyone, _WARM_UP_S)
        for index in range(rounds):
            progress(f"workers that are slow: round {index + 1} of {rounds}")
            for mode, count in windows if index % 2 == 0 else reversed(windows):
                window = _window(workers[:count], f"{mode} of {count}", mode, everyone[:count], window_s)
                found.setdefault(f"{mode} of {count}", []).append(window)
    rows = [_row(mode, found[f"{mode} of {FAST + 1}"], found[f"{alone} of {FAST}"], window_s) for mode, alone in MODES]
    facts = {"model": MODEL, "fast": FAST, "gradient_ms": gradient_s * 1e3, "slower": slower}
    return {**facts, "rounds": rounds, "window_s": window_s, "rows": rows}


def _window(
    workers: list[processes.Role], name: str, aggregation: str, gradients_s: list[float], window_s: float
) -> list[dict[str, int]]:
    """What each worker did in a session of its own."""
    name = "".join(letter if letter.isalnum() else "-" for letter in name)
    for rank, worker in enumerate(workers):
        worker.ask("open", name=name, aggregation=aggregation, rank=rank)
    begins = time.monotonic() + _LEAD_S
    for worker, gradient_s in zip(workers, gradients_s, strict=True):
        worker.tell("work", begins=begins, ends=begins + window_s, gradient_s=gradient_s)
    told = [worker.told() for worker in workers]
    workers[0].ask("delete", name=name)
    return told


def _row(mode: str, beside: list[Any], alone: list[Any], window_s: float) -> dict[str, Any]:
    def a_second(windows: list[Any], what: str, first: int, stop: int) -> list[float]:
        return [sum(worker[what] for worker in window[first:stop]) / window_s for window in windows]

    fast, its = a_second(beside, "applied", 0, FAST), a_second(alone, "applied", 0, FAST)
    shares = [a / b for a, b in zip(fast, its, strict=True)]
    steps = [max(worker["step"] for worker in window) / window_s for window in beside]
    return {
        "mode": mode,
        "steps_a_s": statistics.median(steps),
        "fast_a_s": statistics.median(fast),
        "fast_alone_a_s": statistics.median(its),
        "fast_late_a_s": statistics.median(a_second(beside, "late", 0, FAST)),
        "slow_a_s": statistics.median(a_second(beside, "applied", FAST, FAST + 1)),
        "slow_late_a_s": statistics.median(a_second(beside, "late", FAST, FAST + 1)),
        "share": statistics.median(shares),
        "share_min": min(shares),
        "share_max": max(shares),
        "shares": shares,
    }


def serve(worker: Worker) -> None:
    """Answers commands until the input ends."""
    for command in roles.commands():
        values = {name: value for name, value in command.items() if name != "do"}
        act: Any = {"open": worker.open, "work": worker.work, "delete": worker.delete}[command["do"]]
        roles.reply(act(**values))


if __name__ == "__main__":
    serve(Worker(sys.argv[1]))
