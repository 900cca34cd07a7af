"""Starting the processes that are measured, asking them, and what they cost. Linux only, as the counters are."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

from optwire_bench import folders

_START_S = 60.0
# Longer than any answer takes: the steps of a turn, a first one with its compilation, a peer that is being loaded.
_ANSWER_S = 600.0
_END_S = 20.0


class BenchError(Exception):
    """What ends a run: a process that died, or parameters that are not what they should be."""


class Role:
    """A process that answers a line of JSON with a line of JSON; it ends with its input, or with this process.

    Args:
      name: for messages.
      argv: the command.
      cores: that it may use; empty: all.
      answer_s: how long an answer may take.

    Raises:
      BenchError: the command cannot be run.
    """

    def __init__(
        self, name: str, argv: Sequence[str], cores: Sequence[int] = (), *, answer_s: float = _ANSWER_S
    ) -> None:
        self.name = name
        self.others: list[int] = []
        self._answer_s = answer_s
        self._heard = b""
        # What it says beside its answers is read only when it dies.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, as it lives as long as the process
        if shutil.which(argv[0]) is None:
            self._log.close()
            raise BenchError(f"{name}: {argv[0]}: no such command")
        self.process = subprocess.Popen(
            [*_child(cores), *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, do: str, **values: Any) -> Any:
        """The answer to one command; raises BenchError if the process ends instead."""
        self.tell(do, **values)
        return self.told()

    def tell(self, do: str, **values: Any) -> None:
        """Sends a command whose answer is awaited later."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **values}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; `told` reads what it said last, and says so

    def told(self) -> Any:
        """The answer to the command sent last; raises BenchError where none comes in time, or it is no JSON."""
        assert self.process.stdout is not None
        out = self.process.stdout.fileno()
        readable = select.poll()
        readable.register(out, select.POLLIN)
        deadline = time.monotonic() + self._answer_s
        while b"\n" not in self._heard:
            if not readable.poll(max(0.0, deadline - time.monotonic()) * 1e3):
                self.process.kill()
                raise BenchError(f"{self.name}: no answer within {self._answer_s:g} s")
            data = os.read(out, 1 << 16)
            if not data:
                raise self._dead()
            self._heard += data
        line, _, self._heard = self._heard.partition(b"\n")
        try:
            return json.loads(line)
        except ValueError:
            raise BenchError(f"{self.name}: answered {line.decode(errors='replace')[:80]!r}, expected JSON") from None

    def cost(self, do: str, count: int) -> dict[str, Any]:
        """The answer to a command that is measured, with what it cost the other processes added."""
        before = {pid: _spent(pid) for pid in self.others}
        turn = self._measured(self.ask(do, count=count))
        for pid, start in before.items():
            spent = _spent(pid)
            if start and spent:  # a peer's helper may come and go
                turn["cpu_s"] += spent[0] - start[0]
                turn["faults"] += spent[1] - start[1]
        return turn

    def facts(self, **values: Any) -> dict[str, Any]:
        """The answer to "open"; raises BenchError where it is no object."""
        facts = self.ask("open", **values)
        if not isinstance(facts, dict):
            raise BenchError(f'{self.name}: answered "open" with {str(facts)[:80]}, expected an object')
        return facts

    def _measured(self, turn: Any) -> dict[str, Any]:
        try:
            if turn["seconds"] and min(turn["seconds"]) > 0 and turn["cpu_s"] >= 0 and turn["faults"] >= 0:
                return dict(turn)
        except (KeyError, TypeError):
            pass
        raise BenchError(f"{self.name}: answered {str(turn)[:80]}, expected seconds, cpu_s and faults")

    def finish(self) -> None:
        """Tells the process that nothing else is asked for, and waits for nothing."""
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()

    def end(self) -> None:
        """Ends the process, if need be by force."""
        self.finish()
        self._wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()

    def _wait(self) -> int:
        try:
            return self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _dead(self) -> BenchError:
        code = self._wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return BenchError(f"{self.name}: its process ended with {code}: {lines[-1] if lines else 'it said nothing'}")


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module of this package."""
    return [sys.executable, "-m", f"optwire_bench.{name}", *arguments]


class Server:
    """A running server: its process and where it answers."""

    def __init__(self, pid: int, target: str, unix: str) -> None:
        self.pid = pid
        self.target = target
        self.unix = unix


@contextlib.contextmanager
def server(cores: Sequence[int] = (), arguments: Sequence[str] = ()) -> Iterator[Server]:
    """``optwire serve`` in a process of its own, on a free port and on a Unix socket; it ends with this process."""
    with folders.folder() as folder:
        port_file, unix = pathlib.Path(folder, "port"), f"unix:{folder}/socket"
        command = [sys.executable, "-m", "optwire_server", "serve", "--listen", "127.0.0.1:0", "--listen", unix]
        command += ["--compilation-cache", "none"]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                [*_child(cores), *command, "--port-file", str(port_file), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
            try:
                deadline = time.monotonic() + _START_S
                while not port_file.exists():
                    if process.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        raise BenchError(f"the server did not start: {log.read().strip()[-500:]}")
                    time.sleep(0.02)
                yield Server(process.pid, port_file.read_text(), unix)
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


# What a child does first, before it becomes the command: it asks to be ended with the thread that started it, however
# that ends, and takes its cores. Not between fork and exec of this process, whose threads may hold any lock.
_FIRST = """
import ctypes, os, signal, sys
parent, cores, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != int(parent):  # it was faster
    os._exit(1)
if cores:
    os.sched_setaffinity(0, map(int, cores.split(",")))
os.execvp(command[0], command)
"""


def _child(cores: Sequence[int]) -> list[str]:
    """What goes before a command whose process is to end with this one, and to use these cores only; empty: all."""
    return [sys.executable, "-S", "-c", _FIRST, str(os.getpid()), ",".join(map(str, cores))]


def spent(pids: Sequence[int]) -> float:
    """CPU seconds of some processes so far, all their threads; those that are gone count nothing."""
    return sum(found[0] for pid in pids if (found := _spent(pid)))


def _spent(pid: int) -> tuple[float, int] | None:
    """CPU seconds and minor page faults of a process so far, all its threads; None once it is gone."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        cpu_s = time.clock_gettime((~pid << 3) | 2)  # what clock_getcpuclockid(3) makes of a process id on Linux
    except OSError:
        return None
    return cpu_s, int(stat.rpartition(")")[2].split()[7])


def memory_bytes(pid: int, what: str = "VmRSS") -> int:
    """Resident memory of a process now (VmRSS), its peak (VmHWM), or of that what is shared with others (RssShmem)."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(what)


def reset_peak(pid: int) -> None:
    """Makes VmHWM start anew."""
    pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise KeyError("MemAvailable")


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    model = [
        line.partition(":")[2].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    versions = {"python": platform.python_version()}
    for name in ("jax", "optax", "grpcio", "protobuf", "numpy"):
        versions[name] = metadata.version(name)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": model[0] if model else platform.machine(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release().partition("-")[0],
        "versions": versions,
    }
