"""`optwire bench cold`: what the first session of a fresh server waits for, and that a second one compiles nothing.

As a module, a server that counts: it is the ordinary one, in a process where JAX is asked how often it compiled.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from optwire_bench import models, processes, roles, stepping

# Reported by JAX once for each module that XLA compiles, on whichever thread, with the seconds it took.
_EVENT = "/jax/core/compile/backend_compile_duration"

# Without a compilation for as long, there is none under way.
_SETTLED_S = 1.0


def serve() -> None:
    """Serves until the input ends; answers how often XLA has compiled so far, and for how long."""
    import jax

    from optwire_server import testing

    seconds: list[float] = []

    def hear(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _EVENT:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(hear)
    with testing.serve(compiles_ahead=True) as server:
        for command in roles.commands():
            if command["do"] == "where":
                roles.reply(server.target)
            else:
                roles.reply({"count": len(seconds), "seconds": sum(seconds)})


def run(tensors: int, label: str, optimizer: str, rounds: int, progress: stepping.Progress) -> dict[str, Any]:
    """Measures; the result is what ``reports`` writes. A fresh server for every round."""
    rows = []
    for index in range(rounds):
        progress(f"round {index + 1} of {rounds}")
        server = processes.Role("the server", processes.module("cold", "serve"))
        try:
            rows.append(_round(server, models.model(label, tensors), optimizer))
        finally:
            server.end()
    return {"tensors": tensors, "model": label, "optimizer": optimizer, "rounds": rounds, "rows": rows}


def _round(server: processes.Role, model: models.Model, optimizer: str) -> dict[str, Any]:
    import optwire

    row: dict[str, Any] = {}
    # Another number of leaves, of other sizes, and of more dimensions.
    other = {f"other{index}": np.zeros((3 + index % 7, 1 + index % 5), np.float32) for index in range(50)}
    with optwire.connect(server.ask("where"), transport="stream", timeout=300.0) as client:
        for name, params in (("first", models.params(model)), ("second", other)):
            before = server.ask("compilations")
            started = time.perf_counter()
            session = client.create_session(params, optimizer)
            created = time.perf_counter()
            session.step({key: np.ones_like(leaf) for key, leaf in params.items()})
            stepped = time.perf_counter()
            after = server.ask("compilations")
            row[name] = {
                "create_s": created - started,
                "step_s": stepped - created,
                "compilations": after["count"] - before["count"],
                "compile_s": after["seconds"] - before["seconds"],
            }
            row[name]["ahead"] = _settled(server) - after["count"]
    return row


def _settled(server: processes.Role) -> int:
    """How often the server has compiled once it has stopped: what it compiles ahead, nobody waits for."""
    seen, since = -1, time.monotonic()
    while time.monotonic() - since < _SETTLED_S:
        count: int = server.ask("compilations")["count"]
        if count != seen:
            seen, since = count, time.monotonic()
        time.sleep(0.05)
    return seen


if __name__ == "__main__":
    serve()
