"""The handover of shared memory: what both ends say on the Unix socket that file descriptors travel on.

A message is its length in four bytes, big-endian, and as many bytes of JSON: an object. The client asks once, with
``Request``; ``Grant`` comes with the descriptor, a refusal without. The connection then stays open for as
long as the client wants the segment. On it the client may say ``ASK_QUIET``, and hears in a ``Quiet`` by which slot
pushes are to name the segment from now on, and whether those that named it by the old one are over. Standard library
only.
"""

from __future__ import annotations

import array
import dataclasses
import json
import socket
import struct
import time
from typing import Any, Final

from optwire_proto import sessions

_LENGTH = struct.Struct(">I")
_CREDENTIALS = struct.Struct("3i")  # process, user, group
ASK_QUIET: Final = {"quiet": True}


class HandoverError(Exception):
    """What came is no message, or did not come in time."""


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """Asks for a segment.

    Attributes:
      session_id: of the session whose gradients it is for.
      worker: whose pushes they are.
    """

    session_id: str
    worker: str

    def to_json(self) -> dict[str, Any]:
        return {"session": self.session_id, "worker": self.worker}

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> Request:
        """Raises HandoverError or InvalidArgumentError where a message is no request."""
        if set(message) != {"session", "worker"}:
            raise HandoverError(f"a request with {sorted(message)}, expected session and worker"[:200])
        return cls(sessions.check_id(message["session"], "session"), sessions.check_id(message["worker"], "worker"))


@dataclasses.dataclass(frozen=True, slots=True)
class Grant:
    """A segment, and where in it arrays lie.

    Attributes:
      slot: what a push names it by.
      nbytes: its size.
      params: where the half for parameters starts; the one for gradients starts at 0.
      offsets: where each leaf starts in either half.
    """

    slot: int
    nbytes: int
    params: int
    offsets: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {"slot": self.slot, "nbytes": self.nbytes, "params": self.params, "offsets": self.offsets}

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> Grant:
        """Raises HandoverError where a message is no grant."""
        slot, nbytes, params, offsets = (message.get(name) for name in ("slot", "nbytes", "params", "offsets"))
        numbers: list[Any] = [slot, nbytes, params, *offsets] if isinstance(offsets, list) else [None]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise HandoverError("an answer that is no grant")
        return cls(slot, nbytes, params, tuple(numbers[3:]))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, slots=True)
class Quiet:
    """The answer to ``ASK_QUIET``.

    Attributes:
      is_quiet: whether no push that was made before uses the segment.
      slot: what the next push names the segment by.
    """

    is_quiet: bool
    slot: int

    def to_json(self) -> dict[str, Any]:
        return {"quiet": self.is_quiet, "slot": self.slot}

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> Quiet:
        """Raises HandoverError where a message is no such answer."""
        is_quiet, slot = message.get("quiet"), message.get("slot")
        if not isinstance(is_quiet, bool) or type(slot) is not int or slot <= 0:
            raise HandoverError("an answer that does not say whether pushes are over")
        return cls(is_quiet, slot)


def peer_user(connection: socket.socket) -> int:
    """The user id of the process at the other end, as the kernel says."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])


def send(connection: socket.socket, message: dict[str, Any], timeout_s: float, *, file: int | None = None) -> None:
    """Sends a message, and a file descriptor with it.

    Raises:
      OSError: the other end has gone, or does not take it in time.
    """
    body = json.dumps(message, separators=(",", ":")).encode()
    data = memoryview(_LENGTH.pack(len(body)) + body)
    connection.settimeout(timeout_s)
    if file is not None:
        data = data[socket.send_fds(connection, [data], [file]) :]
    if data:
        connection.sendall(data)


def receive(
    connection: socket.socket, bytes_max: int, timeout_s: float, *, files: list[int] | None = None
) -> dict[str, Any]:
    """Receives a message.

    Args:
      connection: where from.
      bytes_max: the longest that is taken.
      timeout_s: in which all of it must come.
      files: takes the file descriptors that come with it; the caller closes them, whatever this raises. None: none are
        taken.

    Raises:
      HandoverError: what comes is no message, or comes too slowly.
      OSError: the other end has gone.
    """
    end_s = time.monotonic() + timeout_s
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size, end_s, files))
    if length > bytes_max:
        raise HandoverError(f"a message of {length} bytes, expected at most {bytes_max}")
    try:
        message = json.loads(_exactly(connection, length, end_s, files))
    except (ValueError, RecursionError) as exc:
        raise HandoverError("a message that is no JSON") from exc
    if not isinstance(message, dict):
        raise HandoverError("a message that is no object")
    return message


def _with_files(connection: socket.socket, count: int, files: list[int]) -> bytes:
    """Receives bytes, and at most one descriptor with them: ``socket.recv_fds``, which leaves it open in children."""
    size = array.array("i").itemsize
    data, ancillary, _, _ = connection.recvmsg(count, socket.CMSG_LEN(size), socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            came = array.array("i")
            came.frombytes(content[: len(content) // size * size])
            files.extend(came)
    return data


def _exactly(connection: socket.socket, count: int, end_s: float, files: list[int] | None) -> bytes:
    data = bytearray()
    while len(data) < count:
        remaining_s = end_s - time.monotonic()
        if remaining_s <= 0:
            raise HandoverError("a message did not come in time")
        connection.settimeout(remaining_s)
        try:
            if files is None:
                part = connection.recv(count - len(data))
            else:
                part = _with_files(connection, count - len(data), files)
        except TimeoutError as exc:
            raise HandoverError("a message did not come in time") from exc
        if not part:
            raise HandoverError("the other end has gone")
        data += part
    return bytes(data)
