"""A real server for tests, examples and benchmarks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from optwire_server import config as configs
from optwire_server import server as servers


class Serving:
    """A running server and where it answers."""

    def __init__(self, server: servers.Server) -> None:
        self.server = server
        self.target = server.addresses[0]


@contextlib.contextmanager
def serve(**config: Any) -> Iterator[Serving]:
    """Runs a server in this process on a free port of the loopback interface, and drains it at the end.

    Args:
      **config: fields of ``ServerConfig``.

    Example:
      >>> with serve() as server:
      ...     client = optwire.connect(server.target)
    """
    fields: dict[str, Any] = {"listen": ("127.0.0.1:0",), "drain_s": 1.0} | config
    server = servers.Server(configs.ServerConfig(**fields))
    server.start()
    try:
        yield Serving(server)
    finally:
        server.stop()
