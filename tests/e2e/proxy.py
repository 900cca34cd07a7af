"""A TCP proxy that can fail: it cuts its connections at a byte or after a gRPC message, or stops forwarding."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct
import threading
from collections.abc import Iterator

UP, DOWN = "up", "down"  # client to server, server to client

_PREFACE = 24  # bytes that a client says before its first HTTP/2 frame
_DATA = 0


class Messages:
    """Finds where gRPC messages end in one direction of an HTTP/2 connection that has one call under way at a time."""

    def __init__(self, direction: str) -> None:
        self._skip = _PREFACE if direction == UP else 0  # bytes of no interest still to come
        self._frame = bytearray()  # head of an HTTP/2 frame
        self._left = 0  # bytes of a DATA frame still to come
        self._head = bytearray()  # head of a gRPC message
        self._body = 0  # bytes of a message still to come

    def feed(self, data: bytes) -> list[int]:
        """Positions in ``data`` right after each message that ends there."""
        ends, at = [], 0
        while at < len(data):
            plain = self._plain()
            if plain > 1:  # the fast road through bodies
                step = min(plain - 1, len(data) - at)
                self._pass(step)
                at += step
                continue
            if self._ends_with(data[at]):
                ends.append(at + 1)
            at += 1
        return ends

    def _plain(self) -> int:
        """How many of the next bytes belong to one body, or to nothing of interest."""
        if self._skip:
            return self._skip
        return min(self._left, self._body) if self._left and self._body else 0

    def _pass(self, count: int) -> None:
        if self._skip:
            self._skip -= count
        else:
            self._left -= count
            self._body -= count

    def _ends_with(self, byte: int) -> bool:
        if self._skip:
            self._skip -= 1
        elif not self._left:
            self._frame.append(byte)
            if len(self._frame) == 9:
                length = int.from_bytes(self._frame[:3], "big")
                if self._frame[3] == _DATA:
                    self._left = length
                else:
                    self._skip = length
                self._frame.clear()
        elif self._body:
            self._left -= 1
            self._body -= 1
            return self._body == 0
        else:
            self._left -= 1
            self._head.append(byte)
            if len(self._head) == 5:
                self._body = int.from_bytes(self._head[1:], "big")
                self._head.clear()
                return self._body == 0
        return False


@dataclasses.dataclass
class Fault:
    """What is to happen once: after so many messages or bytes in one direction, counted from when it was planned."""

    direction: str
    messages: int | None = None
    bytes: int | None = None
    act: str = "reset"  # reset, close, hold, or end: the call as by an error of a proxy's own, holding the rest
    done: threading.Event = dataclasses.field(default_factory=threading.Event)

    def room(self, data: bytes, ends: list[int]) -> int | None:
        """How much of ``data`` still passes before the fault; None if all of it does and nothing happens yet."""
        if self.messages is not None:
            if self.messages == 0:
                return 0
            if self.messages <= len(ends):
                return ends[self.messages - 1]
            self.messages -= len(ends)
            return None
        assert self.bytes is not None
        if self.bytes <= len(data):
            return self.bytes
        self.bytes -= len(data)
        return None


class Proxy:
    """Forwards to ``target``; ``fail`` plans one fault. Threads are joined by ``close``."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._address = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.bytes = {UP: 0, DOWN: 0}
        self.messages = {UP: 0, DOWN: 0}
        self._fault: Fault | None = None
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads = [threading.Thread(target=self._accept, name="proxy-accept")]
        self._threads[0].start()

    def fail(self, direction: str, **when: int | str) -> Fault:
        """Plans a fault: ``messages=`` or ``bytes=`` from now on in ``direction``, and how to ``act``."""
        with self._lock:
            self._fault = Fault(direction, **when)  # type: ignore[arg-type]
            return self._fault

    def heal(self) -> None:
        """Forgets the fault, and resets what it holds."""
        with self._lock:
            self._fault = None
        self.cut()

    def cut(self, how: str = "reset") -> None:
        """Ends every connection."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    if how == "reset":
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)
        # The pumps close the sockets when they notice, each of them once both have.

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10.0)
            assert not thread.is_alive(), "a thread of the proxy hangs"

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._address, timeout=5.0)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs.append((near, far))
            self._threads.append(threading.Thread(target=self._join, args=(near, far), name="proxy-pair"))
            self._threads[-1].start()

    def _join(self, near: socket.socket, far: socket.socket) -> None:
        back = threading.Thread(target=self._pump, args=(far, near, DOWN), name="proxy-down")
        back.start()
        self._pump(near, far, UP)
        back.join()
        near.close()
        far.close()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        messages = Messages(direction)
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                ends = messages.feed(data)
                with self._lock:
                    self.bytes[direction] += len(data)
                    self.messages[direction] += len(ends)
                    fault = self._fault if self._fault and self._fault.direction == direction else None
                    passing = fault.room(data, ends) if fault else None
                    if fault and passing is not None:
                        fault.done.set()
                        if fault.act in ("hold", "end"):
                            fault.bytes, fault.messages = 0, None  # nothing passes until `heal`
                        else:
                            self._fault = None
                sink.sendall(data if passing is None else data[:passing])
                if fault and passing is not None and fault.act == "end":
                    sink.sendall(_reset_stream(data[passing:]))
                    fault.act = "hold"
                if fault and passing is not None and fault.act != "hold":
                    self.cut(fault.act)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _reset_stream(frames: bytes) -> bytes:
    """The HTTP/2 frame that ends the first call among whole frames with INTERNAL_ERROR."""
    while frames:
        length, stream = int.from_bytes(frames[:3], "big"), frames[5:9]
        if stream != bytes(4):
            return b"\0\0\4\3\0" + stream + (2).to_bytes(4, "big")
        frames = frames[9 + length :]
    raise AssertionError("no frame of a call")


@contextlib.contextmanager
def before(target: str) -> Iterator[Proxy]:
    """A proxy in front of ``target``."""
    proxy = Proxy(target)
    try:
        yield proxy
    finally:
        proxy.close()


def threads() -> set[threading.Thread]:
    """Living threads but the server's own, which come when they are needed and stay."""
    own = ("optwire-rpc", "optwire-device", "optwire-streams", "optwire-handover")
    return {thread for thread in threading.enumerate() if not thread.name.startswith(own)}
