"""`optwire bench fairness`: what a tiny session waits while a large one trains on the same server.

Alone, beside, and on half of the machine's cores with nobody beside: the tiny session's steps in windows that take
turns. Who shares a machine with one other cannot expect more than half of it, so the third is what the second is
measured by.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from optwire_bench import cases, processes, stepping

TINY = "1k"
STATES = ("alone", "beside", "half")
_BATCH = 50


def run(
    label: str, transports: Sequence[str], rounds: int, window_s: float, progress: stepping.Progress
) -> dict[str, Any]:
    """Measures; the result is what ``reports`` writes."""
    cores = sorted(os.sched_getaffinity(0))
    half = cores[: max(1, len(cores) // 2)]
    rows: list[dict[str, Any]] = []
    for transport in transports:
        progress(f"beside {label} over {transport}")
        with contextlib.ExitStack() as stack:
            whole = stack.enter_context(processes.server())
            halved = stack.enter_context(processes.server(half))
            tiny, heavy = cases.remote("stream"), cases.remote(transport)
            commands: dict[str, tuple[list[str], list[int]]] = {
                "tiny": (tiny.command(whole), []),
                "half": (tiny.command(halved), half),
                "heavy": (heavy.command(whole), []),
            }
            roles: dict[str, processes.Role] = {}
            for name, (command, pinned) in commands.items():
                role = roles[name] = processes.Role(name, command, pinned)
                stack.callback(role.end)
                role.ask("open", model=label if name == "heavy" else TINY, tensors=0)
                role.ask("step", count=2 if name == "heavy" else 2 * _BATCH)
            windows: dict[str, list[list[float]]] = {state: [] for state in STATES}
            heavy_steps = 0
            for _ in range(rounds):
                windows["alone"].append(_window(roles["tiny"], window_s))
                with _busy(roles["heavy"]) as taken:
                    windows["beside"].append(_window(roles["tiny"], window_s))
                heavy_steps += taken[0]
                windows["half"].append(_window(roles["half"], window_s))
            rows.append(_row(label, transport, windows, heavy_steps))
    return {"rounds": rounds, "window_s": window_s, "tiny": TINY, "half_cores": len(half), "rows": rows}


def _window(role: processes.Role, window_s: float) -> list[float]:
    """Seconds of each step within a window."""
    ends, seconds = time.monotonic() + window_s, []
    while time.monotonic() < ends:
        seconds += role.ask("step", count=_BATCH)["seconds"]
    return sorted(seconds)


@contextlib.contextmanager
def _busy(role: processes.Role) -> Iterator[list[int]]:
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


def _row(label: str, transport: str, windows: dict[str, list[list[float]]], heavy_steps: int) -> dict[str, Any]:
    row: dict[str, Any] = {"beside": label, "transport": transport, "heavy_steps": heavy_steps}
    for state in STATES:
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            row[f"{state}_{name}_ms"] = statistics.median(stepping.quantile(w, share) for w in windows[state]) * 1e3
    pairs = list(zip(windows["beside"], windows["half"], strict=True))
    ratios = [stepping.quantile(beside, 0.99) / stepping.quantile(half, 0.99) for beside, half in pairs]
    return row | {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
