"""Workers in processes of their own, which can be killed, frozen and thawed at any point."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCRIPT = str(Path(__file__).with_name("worker_process.py"))


class Worker:
    """One process, and what it says.

    Attributes:
      joined: what it found when it had joined: step, and parameters.
    """

    def __init__(self, target: str, name: str, rank: int) -> None:
        self.rank = rank
        self._process = subprocess.Popen(
            [sys.executable, SCRIPT, target, name, str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, name=f"worker-{rank}")
        self._listener.start()
        self.joined: dict[str, Any] = {}

    def begin(self, **options: Any) -> None:
        """Has it make a step."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(options) + "\n")
        self._process.stdin.flush()

    def result(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """What became of the step that was begun."""
        try:
            line = self._said.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"worker {self.rank} said nothing for {timeout_s} s") from None
        assert line, f"worker {self.rank} has ended"
        return dict(json.loads(line))

    def step(self, **options: Any) -> dict[str, Any]:
        self.begin(**options)
        return self.result()

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(10)

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """As at the end of a program: its input is over."""
        assert self._process.stdin
        self._process.stdin.close()
        assert self._process.wait(20) == 0

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)
        self._listener.join(10)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe
                pipe.close()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._said.put(line)
        self._said.put("")


@contextlib.contextmanager
def started(target: str, name: str, *ranks: int) -> Iterator[list[Worker]]:
    """Processes that have joined a session as workers of these ranks."""
    with contextlib.ExitStack() as stack:
        workers = [Worker(target, name, rank) for rank in ranks]
        for worker in workers:
            stack.callback(worker.close)
        for worker in workers:
            worker.joined = worker.result(60.0)
        yield workers
