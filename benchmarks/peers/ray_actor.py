"""A parameter server as a Ray actor: torch's fused Adam in it, arrays through Ray's object store in shared memory.

Several workers are averaged by an asynchronous actor: a call waits until the gradients of all are there, and all get
the one object that the new parameters are.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from optwire_bench import models, roles

# What `ray.init` chooses when it begins; a process that joins later must have it from the beginning.
os.environ.setdefault("RAY_AUTH_MODE", "token")

import ray


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


class Averaging(Server):
    """What the actor of several workers is."""

    def __init__(self, model: models.Model, threads: int, workers: int) -> None:
        super().__init__(model, threads)
        self._workers = workers
        self._pushed: list[dict[str, np.ndarray]] = []

    async def step_together(self, grads: dict[str, np.ndarray]) -> list[Any]:
        """A list, as Ray would take a reference for the object itself."""
        if not self._pushed:
            self._done: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        done = self._done
        self._pushed.append(grads)
        if len(self._pushed) == self._workers:
            done.set_result([ray.put(self.step(self._mean()))])
        return await done

    def _mean(self) -> dict[str, np.ndarray]:
        """What was pushed cannot be written to."""
        pushed, self._pushed = self._pushed, []
        if len(pushed) == 1:
            return pushed[0]
        mean = {}
        for name in pushed[0]:
            total = torch.add(*(torch.from_numpy(grads[name]) for grads in pushed[:2]))
            for grads in pushed[2:]:
                total.add_(torch.from_numpy(grads[name]))
            mean[name] = total.div_(len(pushed)).numpy()
        return mean


class Ray:
    """The worker: gradients handed over as Ray passes arguments, parameters as Ray passes results."""

    _is_one_of_many = False

    def open(self, model: models.Model) -> dict[str, Any]:
        self._begin(model, 1)
        self._server = (
            ray.remote(Server).options(num_cpus=torch.get_num_threads()).remote(model, torch.get_num_threads())
        )
        return self._opened(model, 0)

    def join(self, model: models.Model, place: roles.Place) -> dict[str, Any]:
        self._is_one_of_many = True
        if place.rank == 0:
            self._begin(model, place.workers)
            threads = torch.get_num_threads()
            actor = ray.remote(Averaging).options(num_cpus=threads, name="server")
            self._server = actor.remote(model, threads, place.workers)
            place.tell(ray.get_runtime_context().gcs_address)
        else:
            ray.init(address=place.told(), namespace="bench", log_to_driver=False, logging_level="ERROR")
            self._server = ray.get_actor("server")
        return self._opened(model, place.rank)

    def _begin(self, model: models.Model, workers: int) -> None:
        """Starts a Ray of this machine."""
        ray.init(
            num_cpus=torch.get_num_threads(),
            namespace="bench",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=(4 + 2 * workers) * model.payload_bytes + (200 << 20),
        )

    def _opened(self, model: models.Model, rank: int) -> dict[str, Any]:
        self._grads = models.grads(model, rank)
        self._params: dict[str, np.ndarray] = {}
        return {
            "pids": descendants(os.getpid()),
            "says": f"ray {ray.__version__}, torch {torch.__version__}, fused Adam",
        }

    def step(self) -> None:
        if self._is_one_of_many:
            (reference,) = ray.get(self._server.step_together.remote(self._grads))
            self._params = ray.get(reference)
        else:
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
