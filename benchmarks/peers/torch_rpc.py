"""A parameter server over torch.distributed.rpc (TensorPipe): torch's fused Adam in a process of its own.

Without an argument TensorPipe chooses by itself, and between processes of one host takes shared memory for messages and
cross-memory attach for tensors: no byte of them passes a socket. With "tcp" both go over TCP, as between two hosts.
"""

from __future__ import annotations

import pathlib
import socket
import subprocess
import sys
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


class TorchRpc:
    """The worker."""

    def __init__(self, form: str) -> None:
        self._form = form

    def open(self, model: models.Model) -> dict[str, Any]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, __file__, self._form, "serve", str(port)]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE)
        _join("worker", 0, port, self._form)
        rpc.rpc_sync("server", begin, args=(model.label, model.tensors))
        self._grads = [torch.from_numpy(leaf) for leaf in models.grads(model).values()]
        self._params: list[torch.Tensor] = []
        says = f"torch {torch.__version__}, TensorPipe {through()}, fused Adam"
        return {"pids": [self._server.pid], "says": says}

    def step(self) -> None:
        self._params = rpc.rpc_sync("server", step, args=(self._grads,))

    def produce(self, factor: float) -> None:
        for leaf in self._grads:
            leaf.mul_(factor)

    def saved(self, what: str) -> Iterable[np.ndarray]:
        return [leaf.numpy() for leaf in self._params]

    def close(self) -> None:
        rpc.shutdown()
        self._server.wait(30)


def through() -> str:
    """What messages of this process travel through: TensorPipe maps its segments where it shares memory."""
    shares = "memfd:tensorpipe_shm" in pathlib.Path("/proc/self/maps").read_text()
    return "through shared memory" if shares else "over TCP"


def _join(name: str, rank: int, port: int, form: str) -> None:
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"tcp://127.0.0.1:{port}", rpc_timeout=300, **FORMS[form])
    rpc.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=options)


if __name__ == "__main__":
    form, *arguments = sys.argv[1:] or ["own"]
    if arguments[:1] == ["serve"]:
        roles.end_with_input()
        _join("server", 1, int(arguments[1]), form)
        rpc.shutdown()  # once the worker says so
    else:
        roles.serve(TorchRpc(form))
