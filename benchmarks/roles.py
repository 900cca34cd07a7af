"""What the benchmark's processes do: time steps on command. ``python roles.py local|empty|unary|stream [target]``.

A line of JSON in, a line of JSON out. Each role is a process of its own, so that neither its memory nor its interpreter
lock is counted against another.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

# Below this, a model has two layers: kernel and bias each.
_SMALL_PARAMETERS_MAX = 10_000


def tree(parameters: int, seed: int) -> dict[str, np.ndarray]:
    """A dict of float32 arrays with ``parameters`` elements in all: 4 leaves for small models, 16 for others."""
    rng = np.random.default_rng(seed)
    shares = (0.9, 0.03, 0.06) if parameters <= _SMALL_PARAMETERS_MAX else (0.5, 0.25, 0.125, 0.0625, *(0.005,) * 11)
    sizes = [int(parameters * share) for share in shares]
    sizes.append(parameters - sum(sizes))
    return {f"leaf{i:02}": rng.standard_normal(size, np.float32) for i, size in enumerate(sizes)}


class Local:
    """Adam by a jitted, donated update in this process: what a remote step is compared with."""

    def open(self, parameters: int) -> None:
        import jax

        from optwire_server import optimizers

        init, update, _ = optimizers.adam(1e-3)
        self._jax = jax
        self._update = jax.jit(update, donate_argnums=2)
        self._state = init({name: jax.numpy.array(leaf) for name, leaf in tree(parameters, 0).items()})
        self._grads = {name: jax.numpy.array(leaf) for name, leaf in tree(parameters, 1).items()}
        self._index = 0

    def step(self) -> None:
        self._state = self._jax.block_until_ready(self._update(self._index, self._grads, self._state))
        self._index += 1

    def close(self) -> None:
        del self._state, self._grads


class Remote:
    """The thin client; one handle for each transport, taking turns on sessions of their own."""

    def __init__(self, target: str, transport: str) -> None:
        import optwire

        self._client = optwire.connect(target, transport=transport, timeout=120.0)
        self._name = f"bench-{transport}"

    def open(self, parameters: int) -> None:
        from optwire import optimizers

        self._session = self._client.create_session(
            tree(parameters, 0), optimizers.adam(1e-3), name=f"{self._name}-{parameters}"
        )
        self._grads = tree(parameters, 1)

    def step(self) -> None:
        self._session.step(self._grads)

    def close(self) -> None:
        name = self._session.name
        self._session.close()
        self._client.delete_session(name)
        del self._grads


class Empty:
    """A call that does nothing, the health check: what any gRPC call costs here."""

    def __init__(self, target: str) -> None:
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        self._stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(target))
        self._request = health_pb2.HealthCheckRequest()

    def open(self, parameters: int) -> None:
        pass

    def step(self) -> None:
        self._stub.Check(self._request)

    def close(self) -> None:
        pass


def timed(step: Callable[[], None], count: int) -> list[float]:
    """Seconds of each of ``count`` steps."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return seconds


def serve(role: Local | Remote | Empty) -> None:
    """Answers commands until the input ends."""
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        answer: Any = None
        if command["do"] == "open":
            role.open(command["parameters"])
        elif command["do"] == "close":
            role.close()
        else:
            answer = timed(role.step, command["count"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    kind, *target = sys.argv[1:]
    serve(Local() if kind == "local" else Empty(*target) if kind == "empty" else Remote(*target, kind))
