"""The machine's own limits: memcpy, and raw TCP between two processes. ``python -m optwire_bench.limits``.

Answers the lines of ``roles``, with other commands:

    {"do": "open", "bytes": 100000000}                                 -> {"pids": [...]}
    {"do": "memcpy" | "up" | "down" | "duplex", "count": 3}            -> as for "step"

Up: all bytes sent, and one byte back that says they are there. Duplex: all bytes up and as many down at the same time.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from optwire_bench import processes, roles

_ORDER = struct.Struct("<cQ")
_UP, _DOWN, _DUPLEX = b"u", b"d", b"x"


class Near:
    """The side that is told what to do; the other one is a process of its own."""

    def open(self, size: int) -> dict[str, Any]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            command = processes.module("limits", "far", str(listener.getsockname()[1]))
            self._far = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            self._socket, _ = listener.accept()
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._out, self._in = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        return {"pids": [self._far.pid]}

    def act(self, do: str) -> Callable[[], None]:
        """What a command times."""
        return {"memcpy": self._memcpy, "up": self._up, "down": self._down, "duplex": self._duplex}[do]

    def close(self) -> None:
        self._socket.close()
        self._far.wait(20)
        del self._out, self._in

    def _memcpy(self) -> None:
        np.copyto(self._in, self._out)

    def _order(self, way: bytes) -> None:
        self._socket.sendall(_ORDER.pack(way, self._out.size))

    def _up(self) -> None:
        self._order(_UP)
        self._socket.sendall(self._out.data)
        self._socket.recv(1)

    def _down(self) -> None:
        self._order(_DOWN)
        receive(self._socket, self._in)

    def _duplex(self) -> None:
        self._order(_DUPLEX)
        sending = threading.Thread(target=self._socket.sendall, args=(self._out.data,))
        sending.start()
        receive(self._socket, self._in)
        sending.join()
        self._socket.recv(1)


def far(port: int) -> None:
    """The other side: does what each order says until the connection ends."""
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        out = into = np.ones(0, np.uint8)
        while order := peer.recv(_ORDER.size, socket.MSG_WAITALL):
            way, size = _ORDER.unpack(order)
            if out.size != size:
                out, into = np.ones(size, np.uint8), np.zeros(size, np.uint8)
            sending = threading.Thread(target=peer.sendall, args=(out.data,))
            if way != _UP:
                sending.start()
            if way != _DOWN:
                receive(peer, into)
            if way != _UP:
                sending.join()
            if way != _DOWN:
                peer.sendall(b".")


def receive(peer: socket.socket, into: np.ndarray) -> None:
    """Fills an array of bytes."""
    view = into.data.cast("B")
    while view:
        got = peer.recv_into(view)
        if not got:
            raise ConnectionError("the other side is gone")
        view = view[got:]


def serve() -> None:
    """Answers commands until the input ends."""
    near = Near()
    for command in roles.commands():
        if command["do"] == "open":
            roles.reply(near.open(command["bytes"]))
        elif command["do"] == "close":
            near.close()
            roles.reply(None)
        else:
            roles.reply(roles.measured(near.act(command["do"]), command["count"]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["far"]:
        far(int(sys.argv[2]))
    else:
        serve()
