"""`optwire bench fairness`: what a tiny session waits while a large one trains on the same server.

Alone, beside it, on half of the machine's cores with nobody beside, and on a busy machine: the tiny session's steps in
windows that take turns. Who shares a machine with one other cannot expect more than half of it, so the third is what
the second is measured by. On the busy machine as many processes as there are cores only compute, and no server has to
do with them: what the machine's scheduler costs, which no server can give back. As a module, one such process.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from optwire_bench import cases, processes, roles, stepping

TINY = "1k"
STATES = ("alone", "beside", "half", "busy")
# Name in a row, and the two states whose p99 it is formed of.
RATIOS = (("ratio", "beside", "half"), ("busy_ratio", "busy", "half"), ("beside_over_busy", "beside", "busy"))
_BATCH = 50
# Of an array that a computing process multiplies: 64 KiB, so that it takes nothing but its core.
_ELEMENTS = 1 << 14


def run(
    label: str, transports: Sequence[str], rounds: int, window_s: float, progress: stepping.Progress
) -> dict[str, Any]:
    """Measures; the result is what ``reports`` writes."""
    cores = sorted(os.sched_getaffinity(0))
    half = cores[: max(1, len(cores) // 2)]
    rows = []
    for transport in transports:
        progress(f"beside {label} over {transport}")
        windows, heavy_steps = _windows(label, transport, half, len(cores), rounds, window_s)
        rows.append(_row(label, transport, windows, heavy_steps))
    facts = {"tiny": TINY, "half_cores": len(half), "computing": len(cores)}
    return {"rounds": rounds, "window_s": window_s, **facts, "rows": rows}


def _windows(
    label: str, transport: str, half: Sequence[int], cores: int, rounds: int, window_s: float
) -> tuple[dict[str, list[list[float]]], int]:
    """By state, the seconds of the tiny session's steps in each window; and the steps of the large one."""
    windows: dict[str, list[list[float]]] = {state: [] for state in STATES}
    heavy_steps = 0
    with contextlib.ExitStack() as stack:
        whole = stack.enter_context(processes.server())
        halved = stack.enter_context(processes.server(half))

        def opened(way: str, server: processes.Server, model: str, steps: int, pinned: Sequence[int]) -> processes.Role:
            role = processes.Role(f"{model} over {way}", cases.remote(way).command(server), pinned)
            stack.callback(role.end)
            role.ask("open", model=model, tensors=0)
            role.ask("step", count=steps)
            return role

        tiny = opened("stream", whole, TINY, 2 * _BATCH, ())
        tiny_on_half = opened("stream", halved, TINY, 2 * _BATCH, half)
        heavy = opened(transport, whole, label, 2, ())
        for _ in range(rounds):
            windows["alone"].append(_window(tiny, window_s))
            with _stepping(heavy) as taken:
                windows["beside"].append(_window(tiny, window_s))
            heavy_steps += taken[0]
            windows["half"].append(_window(tiny_on_half, window_s))
            with computing(cores):
                windows["busy"].append(_window(tiny, window_s))
    return windows, heavy_steps


def _window(role: processes.Role, window_s: float) -> list[float]:
    """Seconds of each step within a window."""
    ends, seconds = time.monotonic() + window_s, []
    while time.monotonic() < ends:
        seconds += role.ask("step", count=_BATCH)["seconds"]
    return sorted(seconds)


@contextlib.contextmanager
def _stepping(role: processes.Role) -> Iterator[list[int]]:
    """Has a role step without a pause; yields how often it did."""
    done, taken = threading.Event(), [0]
    failed: list[processes.BenchError] = []

    def step() -> None:
        try:
            while not done.is_set():
                role.ask("step", count=1)
                taken[0] += 1
        except processes.BenchError as exc:
            failed.append(exc)

    thread = threading.Thread(target=step)
    thread.start()
    try:
        yield taken
    finally:
        done.set()
        thread.join()
    if failed:
        raise failed[0]


@contextlib.contextmanager
def computing(count: int) -> Iterator[None]:
    """Has so many processes of their own compute; they have begun, and have ended."""
    with contextlib.ExitStack() as stack:
        begun = []
        for _ in range(count):
            begun.append(processes.Role("computing", processes.module("fairness")))
            stack.callback(begun[-1].end)
        for role in begun:
            role.told()
        yield


def compute() -> None:
    """Says so, and multiplies until the input ends."""
    roles.end_with_input()
    array = np.ones(_ELEMENTS, np.float32)
    roles.reply({})
    while True:
        np.multiply(array, np.float32(1.0), out=array)


def _row(label: str, transport: str, windows: dict[str, list[list[float]]], heavy_steps: int) -> dict[str, Any]:
    row: dict[str, Any] = {"beside": label, "transport": transport, "heavy_steps": heavy_steps}
    for state in STATES:
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            row[f"{state}_{name}_ms"] = statistics.median(stepping.quantile(w, share) for w in windows[state]) * 1e3
    for name, own, other in RATIOS:
        pairs = zip(windows[own], windows[other], strict=True)
        ratios = [stepping.quantile(mine, 0.99) / stepping.quantile(its, 0.99) for mine, its in pairs]
        row |= {name: statistics.median(ratios), f"{name}_min": min(ratios), f"{name}_max": max(ratios)}
    return row


if __name__ == "__main__":
    compute()
