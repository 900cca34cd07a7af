"""Flower's FedAdam, one client: a round is a step. The client sends weights, and their difference is the gradient.

Over its own stream of gRPC messages (``start_server`` and ``start_client``); the newer SuperLink polls, and is slower.
FedAdam counts its steps from 2 and has its epsilon elsewhere than Adam, so it brings a reference of its own. Its rates
are given as float32: of Python's floats NumPy 2 would make float64 weights, and twice the bytes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import flwr
import numpy as np
from flwr import client as clients
from flwr.common import ndarrays_to_parameters
from flwr.compat.client.app import start_client
from flwr.compat.server.app import start_server
from flwr.server import ServerConfig
from flwr.server.strategy import FedAdam

from optwire_bench import models, roles

_BYTES_MAX = 2**31 - 1


class Client(clients.NumPyClient):
    """Waits in ``fit`` until the next step is asked for."""

    def __init__(self) -> None:
        self.arrived: queue.Queue[list[np.ndarray]] = queue.Queue()
        self.answer: queue.Queue[list[np.ndarray]] = queue.Queue()
        self.grads: list[np.ndarray] = []

    def fit(self, parameters: list[np.ndarray], config: Any) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        self.arrived.put(parameters)
        self.answer.get()
        return [leaf - grad for leaf, grad in zip(parameters, self.grads, strict=True)], 1, {}


class Flower:
    """The worker."""

    def __init__(self) -> None:
        self.client = Client()
        self.ports: queue.Queue[int] = queue.Queue()
        self._server: subprocess.Popen[bytes] | None = None

    def open(self, model: models.Model) -> dict[str, Any]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, __file__, "serve", str(port), model.label, str(model.tensors)]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self.client.grads = list(models.grads(model).values())
        self._reference = [np.array(leaf) for leaf in models.params(model).values()]
        self._slots = [(np.zeros_like(leaf), np.zeros_like(leaf)) for leaf in self._reference]
        self._steps = 0
        until_served(port)
        self.ports.put(port)
        self._params = self.client.arrived.get(timeout=60)
        says = f"flwr {flwr.__version__}, FedAdam"
        # The difference of two weights has an error of their last place, which counts where the gradient is small.
        return {"pids": [self._server.pid], "says": says, "reference": True, "path": 1e-3}

    def step(self) -> None:
        self.client.answer.put([])
        self._params = self.client.arrived.get(timeout=120)

    def produce(self, factor: float) -> None:
        """Also takes the step that should have been taken: Reddi et al., "Adaptive federated optimization"."""
        self._steps += 1
        rate = models.LEARNING_RATE * (1 - models.B2 ** (self._steps + 1)) ** 0.5 / (1 - models.B1 ** (self._steps + 1))
        for leaf, grad, (mu, nu) in zip(self._reference, self.client.grads, self._slots, strict=True):
            difference = (leaf - grad) - leaf
            mu *= np.float32(models.B1)
            mu += np.float32(1 - models.B1) * difference
            nu *= np.float32(models.B2)
            nu += np.float32(1 - models.B2) * np.square(difference)
            leaf += np.float32(rate) * mu / (np.sqrt(nu) + np.float32(models.EPS))
            np.multiply(grad, np.float32(factor), out=grad)

    def saved(self, what: str) -> Iterable[np.ndarray]:
        return self._reference if what == "reference" else self._params

    def close(self) -> None:
        self.kill()
        assert self._server is not None
        self._server.wait(30)

    def kill(self) -> None:
        """Ends the server, if there is one."""
        if self._server is not None:
            self._server.kill()


def until_served(port: int) -> None:
    """Waits until something listens: Flower's client does not."""
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)


def serve(port: int, label: str, tensors: int) -> None:
    """Flower's server, for as many rounds as there may be."""
    start_server(
        server_address=f"127.0.0.1:{port}",
        config=ServerConfig(num_rounds=1_000_000),
        grpc_max_message_length=_BYTES_MAX,
        strategy=FedAdam(
            fraction_evaluate=0.0,
            min_fit_clients=1,
            min_evaluate_clients=0,
            min_available_clients=1,
            initial_parameters=ndarrays_to_parameters(list(models.params(models.model(label, tensors)).values())),
            eta=np.float32(models.LEARNING_RATE),
            beta_1=np.float32(models.B1),
            beta_2=np.float32(models.B2),
            tau=np.float32(models.EPS),
        ),
    )


def main() -> None:
    """The worker: Flower's client wants the main thread."""
    role = Flower()

    def answer() -> None:
        code = 1
        try:
            roles.serve(role)
            code = 0
        finally:  # whatever the main thread waits for
            if code:
                traceback.print_exc()
            role.kill()
            os._exit(code)

    threading.Thread(target=answer).start()
    port = role.ports.get()
    start_client(
        server_address=f"127.0.0.1:{port}",
        client=role.client.to_client(),
        grpc_max_message_length=_BYTES_MAX,
        insecure=True,
        max_wait_time=60,
    )


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if sys.argv[1:2] == ["serve"]:
        roles.end_with_input()
        serve(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        main()
