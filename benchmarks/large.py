"""A session of 3 GB against a client with default limits: 12 leaves of 64 Mi float32 over a stream, every bit checked.

Needs 10 GB of memory for both ends together, as the gradients share theirs. ``python benchmarks/large.py [GB]``.
"""

from __future__ import annotations

import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

import optwire
from optwire import optimizers

LEAF = 64 * 1024 * 1024  # elements
STEPS = 3
RATE = 0.5


def main() -> None:
    leaves = round(float(sys.argv[1]) * 1e9 / 4 / LEAF) if len(sys.argv) > 1 else 12
    # Small whole numbers, so that every step is exact whatever the order of its operations.
    base = np.random.default_rng(0).integers(-8, 8, LEAF + 1000 * leaves, np.int8).astype(np.float32)
    params = [base[1000 * leaf : 1000 * leaf + LEAF] for leaf in range(leaves)]
    grads = [base[1000 * leaf + 7 : 1000 * leaf + 7 + LEAF] for leaf in reversed(range(leaves))]
    with tempfile.TemporaryDirectory() as folder:
        port = pathlib.Path(folder, "port")
        command = [sys.executable, "-m", "optwire_server", "serve", "--listen", "127.0.0.1:0", "--port-file", str(port)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                while not port.exists() or not port.read_text():
                    time.sleep(0.05)
                train(port.read_text(), params, grads)
                for line in pathlib.Path(f"/proc/{server.pid}/status").read_text().splitlines():
                    if line.startswith("VmHWM"):
                        print("server", line)
            finally:
                server.send_signal(signal.SIGTERM)


def train(target: str, params: list[np.ndarray], grads: list[np.ndarray]) -> None:
    with optwire.connect(target, transport="stream") as client:
        started = time.perf_counter()
        session = client.create_session(params, optimizers.sgd(RATE))
        size = session.info().payload_bytes
        print(f"{size / 1e9:.2f} GB, created in {time.perf_counter() - started:.1f} s")
        out = session.param_buffers()
        for step in range(1, STEPS + 1):
            started = time.perf_counter()
            session.step(grads, out=out)
            seconds = time.perf_counter() - started
            check(out, params, grads, step)
            print(f"step {step}: {seconds:.1f} s, {2 * size / seconds / 1e9:.2f} GB/s both ways, all bits right")
        session.params(out=out)
        check(out, params, grads, STEPS)
        client.delete_session(session.name)


def check(out: list[np.ndarray], params: list[np.ndarray], grads: list[np.ndarray], steps: int) -> None:
    for got, before, grad in zip(out, params, grads, strict=True):
        for at in range(0, got.size, 1 << 20):
            part = slice(at, at + (1 << 20))
            assert np.array_equal(got[part], before[part] - np.float32(RATE * steps) * grad[part])


if __name__ == "__main__":
    main()
