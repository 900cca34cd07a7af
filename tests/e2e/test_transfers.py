"""What a streamed payload costs beside its bytes: page faults and memory, on both ends, each a process of its own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(), reason="reads what Linux knows of a process"
)

MIB = 1024 * 1024

# A line in, a line out. The arrays are made before they are counted: whoever trains has them anyway.
CLIENT = """
import json, sys
import numpy as np
import optwire
from optwire import optimizers

client = optwire.connect(sys.argv[1], transport="stream", timeout=120.0)
tiny = client.create_session([np.zeros(10, np.float32)], optimizers.sgd(0.1))
tiny.step([np.ones(10, np.float32)])
for line in sys.stdin:
    ask = json.loads(line)
    if "size" in ask:
        session = client.create_session([np.zeros(ask["size"] // 4, np.float32)] * 4, optimizers.sgd(0.5))
        grads, out = session.grad_buffers(), session.param_buffers()
        for array in (*grads, *out):
            array[:] = 1.0
    for _ in range(ask.get("steps", 0)):
        session.step(grads, out=out)
    if "steps" in ask:
        assert all((array[-9:] == -0.5 * session.step_count).all() for array in out)
    print("done", flush=True)
"""


class Process:
    """What the kernel says of a process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._folder = pathlib.Path(f"/proc/{process.pid}")

    def faults(self) -> int:
        """Minor page faults so far."""
        return int((self._folder / "stat").read_text().rpartition(")")[2].split()[7])

    def memory(self, what: str) -> int:
        """VmRSS: bytes resident now; VmHWM: the most since ``reset_peak``."""
        lines = (self._folder / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what + ":"))

    def reset_peak(self) -> None:
        (self._folder / "clear_refs").write_text("5")

    def ask(self, **what: Any) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n", self.process.wait()


@contextlib.contextmanager
def processes(folder: pathlib.Path, **environment: str) -> Iterator[tuple[Process, Process]]:
    """A server and a client of it that have said hello; the client in this environment."""
    port_file = folder / "port"
    command = [sys.executable, "-m", "optwire_server", "serve", "--listen", "127.0.0.1:0", "--port-file", port_file]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            deadline = time.monotonic() + 60
            while not port_file.exists() or not port_file.read_text():
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            with subprocess.Popen(
                [sys.executable, "-c", CLIENT, port_file.read_text()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **environment},
            ) as client:
                ends = Process(server), Process(client)
                ends[1].ask()
                yield ends
                assert client.stdin is not None
                client.stdin.close()
                client.wait(30)
        finally:
            server.terminate()
            server.wait(30)


def test_a_streamed_payload_faults_few_pages_on_either_end(tmp_path: pathlib.Path):
    """At most 10,000 minor faults a GB, both ends together, where a page each 4 KiB would be 244,000 an end."""
    with processes(tmp_path) as (server, client):
        client.ask(size=4_000_000, steps=8)
        counts = [server.faults() + client.faults()]
        for _ in range(5):
            client.ask(steps=8)
            counts.append(server.faults() + client.faults())
    gigabytes = 8 * 2 * 16e6 / 1e9
    # The median: a heap grows now and then, and stays as it is afterwards.
    faults = statistics.median(after - before for before, after in itertools.pairwise(counts))
    assert faults / gigabytes < 10_000


@pytest.mark.slow
def test_a_large_payload_needs_little_memory_beside_the_arrays(tmp_path: pathlib.Path):
    """400 MB each way: the server's peak is at most 64 MiB above state and landing, the client's 32 MiB above arrays.

    With one heap for all threads of the client. By default glibc gives each its own, up to eight a core, and each keeps
    some free megabytes (docs/adr/0011).
    """
    size = 100_000_000
    with processes(tmp_path, MALLOC_ARENA_MAX="1") as (server, client):
        idle = server.memory("VmRSS"), client.memory("VmRSS")
        client.ask(size=size, steps=1)
        peaks = []
        for _ in range(3):  # a machine that is busy otherwise lets chunks pile up at times
            server.reset_peak()
            client.reset_peak()
            client.ask(steps=1)
            peaks.append((server.memory("VmHWM"), client.memory("VmHWM")))
    arrays = 2 * 4 * size
    assert min(peak for peak, _ in peaks) - idle[0] <= arrays + 64 * MIB
    assert min(peak for _, peak in peaks) - idle[1] <= arrays + 32 * MIB
