"""A TCP forwarder that counts what passes, for measuring bytes on the wire."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class Count:
    """Bytes that passed, towards the server and back."""

    up = 0
    down = 0


@contextlib.contextmanager
def forwarder(target: str) -> Iterator[tuple[str, Count]]:
    """Forwards one connection after another to ``target``: (address in front of it, the count)."""
    host, _, port = target.rpartition(":")
    count = Count()
    listener = socket.create_server(("127.0.0.1", 0))
    sockets: list[socket.socket] = [listener]

    def pump(source: socket.socket, sink: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                setattr(count, way, getattr(count, way) + len(data))
                sink.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                front, _ = listener.accept()
                back = socket.create_connection((host, int(port)))
                sockets.extend((front, back))
                threading.Thread(target=pump, args=(front, back, "up"), daemon=True).start()
                threading.Thread(target=pump, args=(back, front, "down"), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}", count
    finally:
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
