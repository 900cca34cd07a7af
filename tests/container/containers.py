"""Servers in containers, and how long a test waits for one. Built and run as a careful operator would."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import optwire

ROOT = pathlib.Path(__file__).parents[2]
PORT = "50051/tcp"
# Some user id that no image knows, and nothing that can be written but /tmp.
HARDENED: dict[str, Any] = {
    "user": "12345:0",
    "read_only": True,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "tmpfs": {"/tmp": ""},
}


class Running:
    """A server in a container, and where it answers on the loopback interface."""

    def __init__(self, container: Any) -> None:
        self.container = container
        until(lambda: self._ports(), 10, "a published port")
        self.target = f"127.0.0.1:{self._ports()[0]['HostPort']}"

    def _ports(self) -> list[dict[str, str]]:
        self.container.reload()
        return self.container.ports.get(PORT) or []

    def health(self) -> str:
        self.container.reload()
        return self.container.attrs["State"]["Health"]["Status"]

    def logs(self) -> str:
        return self.container.logs().decode()


@contextlib.contextmanager
def answering(server: Running) -> Iterator[optwire.Client]:
    """A client of a server that has just been started, from its first answer on."""

    def answers() -> bool:
        try:
            client.list_sessions()
        except (optwire.UnavailableError, optwire.DeadlineError):
            return False
        return True

    with optwire.connect(server.target, transport="stream") as client:
        until(answers, 30, "the server's first answer")
        yield client


# Runs a server under a name, with flags, until the end of a `with`.
Start = Callable[..., contextlib.AbstractContextManager[Running]]


def build(folder: pathlib.Path, name: str) -> float:
    """Builds both images of a repository as `make image` does; returns the seconds it took."""
    began = time.monotonic()
    done = run("make", "image", f"IMAGE={name}", folder=folder, timeout_s=1200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return time.monotonic() - began


def run(
    *command: str, folder: pathlib.Path = ROOT, timeout_s: float = 120, **settings: str
) -> subprocess.CompletedProcess[str]:
    """What a program of this machine says, with settings in its environment; 127 where there is none."""
    if shutil.which(command[0]) is None:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")
    environment = os.environ | settings
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def until(condition: Callable[[], Any], patience_s: float, what: str) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience_s:g} s for {what}"
        time.sleep(0.05)
