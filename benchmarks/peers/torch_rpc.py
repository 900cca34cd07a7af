"""A parameter server over torch.distributed.rpc (TensorPipe): torch's fused Adam in a process of its own.

Several workers are averaged as torch's tutorial on batch RPC processing does it: a call waits, without a thread, until
the gradients of all are there.

Without an argument TensorPipe chooses by itself, and between processes of one host takes shared memory for messages and
cross-memory attach for tensors: no byte of them passes a socket. With "tcp" both go over TCP, as between two hosts.
"""

from __future__ import annotations

import pathlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.distributed import rpc

from optwire_bench import models, roles

# Form -> what TensorPipe is told beside the usual.
FORMS: dict[str, dict[str, Any]] = {"own": {}, "tcp": {"_transports": ["uv"], "_channels": ["basic"]}}

# Of the serving process.
_params: list[torch.Tensor] = []
_rule: list[torch.optim.Optimizer] = []
_lock = threading.Lock()
_pushed: list[list[torch.Tensor]] = []
_waiting: list[torch.futures.Future[list[torch.Tensor]]] = []


def begin(label: str, tensors: int) -> None:
    """Makes parameters and optimizer, where it is called."""
    _params[:] = [torch.from_numpy(leaf) for leaf in models.params(models.model(label, tensors)).values()]
    betas = (models.B1, models.B2)
    _rule[:] = [torch.optim.Adam(_params, models.LEARNING_RATE, betas, models.EPS, fused=True)]


def step(grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """One update, where it is called."""
    for leaf, grad in zip(_params, grads, strict=True):
        leaf.grad = grad
    _rule[0].step()
    return _params


@rpc.functions.async_execution
def step_together(grads: list[torch.Tensor], workers: int) -> torch.futures.Future[list[torch.Tensor]]:
    """One update with the mean of all workers' gradients, where it is called, once the last of them are there."""
    with _lock:
        if not _waiting:
            _waiting.append(torch.futures.Future())
        future = _waiting[0]
        _pushed.append(grads)
        if len(_pushed) == workers:
            first, *others = _pushed
            for other in others:
                torch._foreach_add_(first, other)
            torch._foreach_div_(first, float(workers))
            _pushed.clear()
            _waiting.clear()
            future.set_result(step(first))
    return future


class TorchRpc:
    """The worker."""

    def __init__(self, form: str) -> None:
        self._form = form
        self._server: subprocess.Popen[bytes] | None = None

    def open(self, model: models.Model) -> dict[str, Any]:
        self._workers = 0
        return self._opened(model, 0, self._serve(model, 1), 1)

    def join(self, model: models.Model, place: roles.Place) -> dict[str, Any]:
        self._workers = place.workers
        if place.rank:
            return self._opened(model, place.rank, int(place.told()), place.workers)
        port = self._serve(model, place.workers)
        place.tell(str(port))
        return self._opened(model, 0, port, place.workers)

    def _serve(self, model: models.Model, workers: int) -> int:
        """Starts the server; the port at which all find each other."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = int(free.getsockname()[1])
        command = [sys.executable, __file__, self._form, "serve", str(port), str(workers)]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE)
        return port

    def _opened(self, model: models.Model, rank: int, port: int, workers: int) -> dict[str, Any]:
        _join(f"worker{rank}", rank, port, workers, self._form)
        if rank == 0:
            rpc.rpc_sync("server", begin, args=(model.label, model.tensors))
        self._grads = [torch.from_numpy(leaf) for leaf in models.grads(model, rank).values()]
        self._params: list[torch.Tensor] = []
        says = f"torch {torch.__version__}, TensorPipe {through()}, fused Adam"
        return {"pids": [] if self._server is None else [self._server.pid], "says": says}

    def step(self) -> None:
        if self._workers:
            self._params = rpc.rpc_sync("server", step_together, args=(self._grads, self._workers))
        else:
            self._params = rpc.rpc_sync("server", step, args=(self._grads,))

    def produce(self, factor: float) -> None:
        for leaf in self._grads:
            leaf.mul_(factor)

    def saved(self, what: str) -> Iterable[np.ndarray]:
        return [leaf.numpy() for leaf in self._params]

    def close(self) -> None:
        rpc.shutdown()
        if self._server is not None:
            self._server.wait(30)


def through() -> str:
    """What messages of this process travel through: TensorPipe maps its segments where it shares memory."""
    shares = "memfd:tensorpipe_shm" in pathlib.Path("/proc/self/maps").read_text()
    return "through shared memory" if shares else "over TCP"


def _join(name: str, rank: int, port: int, workers: int, form: str) -> None:
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"tcp://127.0.0.1:{port}", rpc_timeout=300, **FORMS[form])
    rpc.init_rpc(name, rank=rank, world_size=workers + 1, rpc_backend_options=options)


if __name__ == "__main__":
    form, *arguments = sys.argv[1:] or ["own"]
    if arguments[:1] == ["serve"]:
        roles.end_with_input()
        workers = int(arguments[2])
        _join("server", workers, int(arguments[1]), workers, form)
        rpc.shutdown()  # once the worker says so
    else:
        roles.serve(TorchRpc(form))
