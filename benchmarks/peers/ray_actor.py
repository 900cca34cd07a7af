"""A parameter server as a Ray actor: torch's fused Adam in it, arrays through Ray's object store in shared memory."""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import ray
import torch

from optwire_bench import models, roles


class Server:
    """What the actor is."""

    def __init__(self, model: models.Model, threads: int) -> None:
        torch.set_num_threads(threads)  # Ray would leave it one
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self._params = {name: torch.from_numpy(leaf) for name, leaf in models.params(model).items()}
        betas = (models.B1, models.B2)
        self._rule = torch.optim.Adam(self._params.values(), models.LEARNING_RATE, betas, models.EPS, fused=True)

    def step(self, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name, grad in grads.items():
            self._params[name].grad = torch.from_numpy(grad)
        self._rule.step()
        return {name: leaf.detach().numpy() for name, leaf in self._params.items()}


class Ray:
    """The worker: gradients handed over as Ray passes arguments, parameters as Ray passes results."""

    def open(self, model: models.Model) -> dict[str, Any]:
        threads = torch.get_num_threads()
        ray.init(
            num_cpus=threads,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=6 * model.payload_bytes + (200 << 20),
        )
        self._grads = models.grads(model)
        self._server = ray.remote(Server).options(num_cpus=threads).remote(model, threads)
        self._params: dict[str, np.ndarray] = {}
        return {
            "pids": descendants(os.getpid()),
            "says": f"ray {ray.__version__}, torch {torch.__version__}, fused Adam",
        }

    def step(self) -> None:
        self._params = ray.get(self._server.step.remote(self._grads))

    def produce(self, factor: float) -> None:
        for leaf in self._grads.values():
            np.multiply(leaf, np.float32(factor), out=leaf)

    def saved(self, what: str) -> Iterable[np.ndarray]:
        return self._params.values()

    def close(self) -> None:
        self._params.clear()
        ray.shutdown()


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have."""
    found: list[int] = []
    for children in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *descendants(child)]
    return found


if __name__ == "__main__":
    roles.serve(Ray())
