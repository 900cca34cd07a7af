"""A server in a process of its own, as examples have one. `make frameworks` installs what these tests need."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server."""
    folder = tmp_path_factory.mktemp("server")
    port = folder / "port"
    command = [sys.executable, "-m", "optwire_server", "serve", "--listen", "127.0.0.1:0", "--port-file", str(port)]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield _address(port, process, folder / "log")
        finally:
            process.terminate()
            assert process.wait(20) == 0


def _address(port: pathlib.Path, process: subprocess.Popen[bytes], log: pathlib.Path) -> str:
    give_up_s = time.monotonic() + 60
    while not (port.exists() and port.read_text()):
        if process.poll() is not None or time.monotonic() > give_up_s:
            raise RuntimeError(f"the server does not serve:\n{log.read_text()}")
        time.sleep(0.05)
    return port.read_text()
