"""A relay between a client and the real server: connections that stall and break when a test says so."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from optwire_server import testing


class Relay:
    """Forwards TCP both ways. ``hold_replies`` keeps back what the server answers; ``cut`` breaks every connection.

    ``target`` is what clients connect to.
    """

    def __init__(self, target: str, port: int = 0) -> None:
        host, upstream_port = target.rsplit(":", 1)
        self._upstream = (host, int(upstream_port))
        self._replies_flow = threading.Event()
        self._replies_flow.set()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def hold_replies(self) -> None:
        self._replies_flow.clear()

    def cut(self) -> None:
        """Breaks every connection, with what was held back; new ones flow."""
        broken, self._sockets = self._sockets, []
        for sock in broken:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._replies_flow.set()

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                down = self._listener.accept()[0]
                up = socket.create_connection(self._upstream)
                for sock in (down, up):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets += [down, up]
                threading.Thread(target=self._pump, args=(down, up, None), daemon=True).start()
                threading.Thread(target=self._pump, args=(up, down, self._replies_flow), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, flow: threading.Event | None) -> None:
        with contextlib.suppress(OSError), source, sink:
            while data := source.recv(65536):
                if flow:
                    flow.wait()
                sink.sendall(data)


@pytest.fixture
def relay(server: testing.Serving) -> Iterator[Relay]:
    relay = Relay(server.target)
    yield relay
    relay.close()
