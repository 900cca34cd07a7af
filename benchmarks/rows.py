"""A table of ten million rows of which a thousand are touched: what travels and how long it takes, against whole steps.

    .venv/bin/python benchmarks/rows.py [--rows 10000000] [--width 16] [--touched 1000] [--json FILE]

Adam, one worker, a stream between two processes through a forwarder that counts; medians of rounds in which lazy, exact
and whole steps take turns. Needs about ten times the table's bytes of memory for both ends together.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import numpy as np

import optwire
from optwire import optimizers as opt
from optwire_bench import counting, processes

ROUNDS = 5
# What is compared, and how often it is called in a round.
KINDS = {"lazy": 20, "pull": 20, "exact": 1, "whole": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--touched", type=int, default=1_000)
    parser.add_argument("--json", type=pathlib.Path)
    flags = parser.parse_args()
    table = np.zeros((flags.rows, flags.width), np.float32)
    with (
        processes.server() as server,
        counting.forwarder(server.target) as (target, count),
        optwire.connect(server.target, transport="stream", timeout=120) as client,
        optwire.connect(target, transport="stream", timeout=120) as counted,
    ):
        name = client.create_session({"table": table}, opt.adam(1e-3)).name
        seconds = timed(Steps(client.attach(name), table, flags.touched))
        sizes = weighed(Steps(counted.attach(name), table, flags.touched), count)
    found = {name: {"seconds": seconds[name], "up": sizes[name][0], "down": sizes[name][1]} for name in seconds}
    for name, cost in found.items():
        print(f"{name:>8}: {cost['seconds'] * 1e3:9.2f} ms, {cost['up']:>13,} bytes up, {cost['down']:>13,} down")
    print(f"a lazy step takes 1/{found['whole']['seconds'] / found['lazy']['seconds']:.0f} of the time of a whole one")
    if flags.json:
        shape = {"rows": flags.rows, "width": flags.width, "touched": flags.touched}
        told = {"machine": processes.machine(), **shape, "steps": found}
        flags.json.write_text(json.dumps(told, indent=2) + "\n")


class Steps:
    """The calls that are compared, each with other rows than the one before.

    Args:
      session: whose only leaf is "table".
      table: of its shape.
      touched: rows of a step.
    """

    def __init__(self, session: optwire.Session, table: np.ndarray, touched: int) -> None:
        self._session = session
        self._rng = np.random.default_rng(0)
        self._touched = touched
        self._grads = np.zeros_like(table)
        self._out = {"table": np.empty_like(table)}
        session.params(out=self._out)

    def made(self, name: str) -> Callable[[], object]:
        """The next call of a kind."""
        indices = np.sort(self._rng.choice(len(self._grads), self._touched, replace=False))
        rows = self._rng.standard_normal((self._touched, *self._grads.shape[1:]), np.float32)
        grads = {"table": optwire.Rows(indices, rows)}
        if name == "whole":
            self._grads[indices] = rows
            return lambda: self._session.step({"table": self._grads}, out=self._out)
        if name == "pull":
            return lambda: self._session.rows({"table": indices})
        return lambda: self._session.step(grads, rows=name)


def timed(steps: Steps) -> dict[str, float]:
    """Median seconds of a call of each kind; in turns, of which the first one compiles."""
    taken: dict[str, list[float]] = {name: [] for name in KINDS}
    for _ in range(ROUNDS + 1):
        for name, times in KINDS.items():
            calls = [steps.made(name) for _ in range(times)]
            seconds = []
            for call in calls:
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
            taken[name].append(statistics.median(seconds))
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def weighed(steps: Steps, count: counting.Count) -> dict[str, tuple[int, int]]:
    """Bytes up and down of a call of each kind; the first of each is not counted, as it opens what it needs."""
    found = {}
    for name in KINDS:
        steps.made(name)()
        up, down = count.up, count.down
        steps.made(name)()
        found[name] = count.up - up, count.down - down
    return found


if __name__ == "__main__":
    main()
