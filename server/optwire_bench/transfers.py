"""`optwire bench limits`: what a transport makes of the machine: one way and both ways at once, beside raw TCP.

Up is a push that asks for no reply, to a session with sgd, whose update is part of it. Down is reading the parameters.
Duplex is both at the same time, of two sessions on one connection. As a module, the client that does so.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optwire_bench import processes, roles, stepping

WAYS = ("up", "down", "duplex")
# Bytes up to -> transfers of a turn.
_COUNTS = ((1 << 20, 40), (32 << 20, 8), (200 << 20, 3), (1 << 40, 1))


class Transfers:
    """The thin client, with two sessions."""

    def __init__(self, target: str, transport: str) -> None:
        import optwire

        self._client = optwire.connect(target, transport=transport, timeout=120.0)

    def open(self, size: int) -> dict[str, Any]:
        from optwire import optimizers

        count = size // 4
        start = {"w": np.arange(count, dtype=np.float32)}
        self._pushing, self._reading = (self._client.create_session(start, optimizers.sgd(1.0)) for _ in range(2))
        self._grads, self._params = self._pushing.grad_buffers(), self._reading.param_buffers()
        self._grads["w"][...] = 1.0
        return {}

    def act(self, do: str) -> Callable[[], None]:
        """What a command times."""
        return {"up": self._up, "down": self._down, "duplex": self._duplex}[do]

    def check(self) -> bool:
        """Whether everything that was sent has arrived: steps pushed, and parameters read."""
        size = self._grads["w"].size
        start = np.arange(size, dtype=np.float32)
        came = np.array_equal(self._params["w"], start)
        self._pushing.params(out=self._params)
        wanted = start
        for _ in range(self._pushing.step_count):
            wanted = wanted - np.float32(1.0)
        return came and np.array_equal(self._params["w"], wanted)

    def close(self) -> None:
        del self._grads, self._params
        for session in (self._pushing, self._reading):
            session.close()
            self._client.delete_session(session.name)

    def _up(self) -> None:
        self._pushing.step(self._grads, reply="none")

    def _down(self) -> None:
        self._params = self._reading.params(out=self._params)

    def _duplex(self) -> None:
        pushing = threading.Thread(target=self._up)
        pushing.start()
        self._down()
        pushing.join()


def serve(role: Transfers) -> None:
    """Answers commands until the input ends."""
    for command in roles.commands():
        match command["do"]:
            case "open":
                roles.reply(role.open(command["bytes"]))
            case "check":
                roles.reply(role.check())
            case "close":
                role.close()
                roles.reply(None)
            case do:
                roles.reply(roles.measured(role.act(do), command["count"]))


def run(sizes: Sequence[int], transports: Sequence[str], rounds: int, progress: stepping.Progress) -> dict[str, Any]:
    """Measures; the result is what ``reports`` writes. Raises BenchError where what was sent did not arrive."""
    rows: list[dict[str, Any]] = []
    for size in sizes:
        progress(f"{size / 1e6:g} MB")
        rows += _of_size(size - size % 4, transports, rounds)
    return {"rounds": rounds, "rows": rows}


def _of_size(size: int, transports: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    count = next(count for most, count in _COUNTS if size <= most)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(processes.server())
        commands = {"raw TCP": processes.module("limits")}
        for transport in transports:
            target = server.unix if transport in ("unix", "shared_memory") else server.target
            asked = "stream" if transport == "unix" else transport
            commands[transport] = processes.module("transfers", target, asked)
        running: dict[str, processes.Role] = {}
        turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for name, command in commands.items():
            role = running[name] = processes.Role(name, command)
            stack.callback(role.end)
            facts = role.ask("open", bytes=size)
            role.others = facts["pids"] if name == "raw TCP" else [server.pid]
            for way in WAYS:
                role.ask(way, count=2)  # compile, warm up
        running["memcpy"] = running["raw TCP"]
        order = [("memcpy", "memcpy"), *((name, way) for way in WAYS for name in running if name != "memcpy")]
        for index in range(rounds):
            for name, way in order if index % 2 == 0 else order[::-1]:
                turns.setdefault((name, way), []).append(running[name].cost(way, count))
        for name, role in running.items():
            if name in transports and not role.ask("check"):
                raise processes.BenchError(f"{name}, {size:,} bytes: what was sent is not what arrived")
        return [_row(name, way, size, turns) for name, way in order]


def _row(name: str, way: str, size: int, turns: dict[tuple[str, str], list[dict[str, Any]]]) -> dict[str, Any]:
    own = turns[name, way]
    moved = size * (2 if way == "duplex" else 1)
    medians = [statistics.median(turn["seconds"]) for turn in own]
    row = {
        "bytes": size,
        "case": name,
        "way": way,
        "median_ms": statistics.median(medians) * 1e3,
        "gb_s": moved / statistics.median(medians) / 1e9,
        "gb_s_best": moved / min(second for turn in own for second in turn["seconds"]) / 1e9,
        "cpu_s_a_gb": sum(turn["cpu_s"] for turn in own) / sum(len(turn["seconds"]) for turn in own) / moved * 1e9,
        "faults_a_gb": sum(turn["faults"] for turn in own) / sum(len(turn["seconds"]) for turn in own) / moved * 1e9,
    }
    if way != "memcpy":
        raw = [statistics.median(turn["seconds"]) for turn in turns["raw TCP", way]]
        shares = [other / mine for mine, other in zip(medians, raw, strict=True)]
        row |= {"of_raw": statistics.median(shares), "of_raw_min": min(shares), "of_raw_max": max(shares)}
    return row


if __name__ == "__main__":
    serve(Transfers(*sys.argv[1:]))
