"""The Unix socket on which segments of shared memory are handed over to clients of this host and user.

One thread accepts, and one for each connection answers it: a client that is slow is slow for itself. A connection
stands for its segment; when it ends, whatever ended it, the segment is let go of. Knows sockets and the registry; no
gRPC.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import secrets
import socket
import stat
import tempfile
import threading
from typing import Final

from optwire_proto import errors, handover, limits
from optwire_server import registry as registries
from optwire_server import segments

# In which a message must come or go, once it has begun; and the first one after the connection.
MESSAGE_S: Final = 5.0
# How long it is waited for pushes that use a segment whose client wants to write to it.
QUIET_S: Final = 10.0
_BACKLOG: Final = 64
_SUFFIX: Final = ".handover"
# A path of a Unix socket is as long as the kernel's structure for it.
_PATH_BYTES_MAX: Final = 106

_log = logging.getLogger("optwire.handover")


class Handover:
    """Hands segments over until it is closed.

    Args:
      registry: whose sessions they are for.
      folder: where the socket is to be; empty: in a folder of its own, which nobody else can read.
      connections_max: most connections at once, and so most segments.

    Attributes:
      path: of the socket.

    Raises:
      OSError: there can be no socket.
    """

    def __init__(self, registry: registries.Registry, folder: str, connections_max: int) -> None:
        self._registry = registry
        self._connections_max = connections_max
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._closed = threading.Event()
        self._own_folder = None if folder else tempfile.mkdtemp(prefix="optwire-")
        try:
            self.path = os.path.join(os.path.abspath(folder or self._own_folder or ""), secrets.token_hex(4) + _SUFFIX)
            self._listener = _listener(self.path)
        except OSError:
            self._remove_folder()
            raise
        self._accepting = threading.Thread(target=self._accept, name="optwire-handover", daemon=True)

    def start(self) -> None:
        """Starts answering."""
        self._accepting.start()

    def close(self) -> None:
        """Ends every connection, and takes the socket away. Segments that pushes use stay until these end."""
        self._closed.set()
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._remove_folder()
        with self._lock:
            connections = dict(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in (self._accepting, *connections.values()):
            if thread.ident is not None:
                thread.join(MESSAGE_S)

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._connections)

    def _remove_folder(self) -> None:
        if self._own_folder is not None:
            with contextlib.suppress(OSError):
                os.rmdir(self._own_folder)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                self._closed.wait(0.1)  # out of file descriptors, perhaps; or closed
                continue
            if refusal := self._begin(connection):
                with connection, contextlib.suppress(OSError):  # a short message into an empty buffer: does not wait
                    _refuse(connection, refusal)

    def _begin(self, connection: socket.socket) -> str:
        """Has a thread answer on a connection; why not, or nothing."""
        thread = threading.Thread(target=self._serve, args=(connection,), name="optwire-handover-client", daemon=True)
        with self._lock:
            if len(self._connections) >= self._connections_max or self._closed.is_set():
                return f"{self._connections_max} segments are handed over, the most this server takes"
            self._connections[connection] = thread
        try:
            thread.start()
        except RuntimeError as exc:  # the machine has no room for another thread now
            with self._lock:
                self._connections.pop(connection, None)
            return f"{exc}; try again later"
        return ""

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                self._answer(connection)
        except (OSError, handover.HandoverError) as exc:
            _log.debug("a connection ended: %s", exc)
        except Exception:  # noqa: BLE001  the boundary: whatever else is raised is a defect of ours, and ends nothing else
            _log.exception("a connection ended by a defect")
        finally:
            with self._lock:
                self._connections.pop(connection, None)

    def _answer(self, connection: socket.socket) -> None:
        user = handover.peer_user(connection)
        if user != os.geteuid():
            _refuse(connection, f"is of user {user}; this server shares memory with user {os.geteuid()} only")
            return
        try:
            message = handover.receive(connection, limits.HANDOVER_REQUEST_BYTES_MAX, MESSAGE_S)
            request = handover.Request.from_json(message)
            segment, layout = self._registry.share(request.session_id, request.worker)
        except (errors.OptwireError, handover.HandoverError) as exc:
            _refuse(connection, str(exc), exc.reason if isinstance(exc, errors.OptwireError) else "")
            return
        try:
            grant = handover.Grant(segment.slot, segment.nbytes, segment.params_offset, layout.offsets)
            handover.send(connection, grant.to_json(), MESSAGE_S, file=segment.file)
            segment.close_file()
            self._keep(connection, segment)
        finally:
            self._registry.segments.drop(segment)

    def _keep(self, connection: socket.socket, segment: segments.Segment) -> None:
        """Waits for the end of the connection, and answers what is asked for on it meanwhile."""
        while True:
            connection.settimeout(None)
            if not connection.recv(1, socket.MSG_PEEK):
                return
            message = handover.receive(connection, limits.HANDOVER_REQUEST_BYTES_MAX, MESSAGE_S)
            if message != handover.ASK_QUIET:
                raise handover.HandoverError("a message that means nothing")
            is_quiet = self._registry.segments.quiet(segment, QUIET_S)
            handover.send(connection, handover.Quiet(is_quiet, segment.slot).to_json(), MESSAGE_S)


def _listener(path: str) -> socket.socket:
    """A listening socket at ``path`` that only this user can reach; clears away what dead servers left beside it."""
    if len(os.fsencode(path)) > _PATH_BYTES_MAX:
        raise OSError(f"handover_dir: {path} has more than {_PATH_BYTES_MAX} bytes, too long for a Unix socket")
    for other in pathlib.Path(path).parent.glob(f"*{_SUFFIX}"):
        _remove_if_dead(other)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Under its name only when it listens: until then it looks like one of the dead.
        listener.bind(f"{path}-")
        os.chmod(f"{path}-", stat.S_IRUSR | stat.S_IWUSR)
        listener.listen(_BACKLOG)
        os.rename(f"{path}-", path)
    except BaseException:
        listener.close()
        with contextlib.suppress(OSError):
            os.unlink(f"{path}-")
        raise
    return listener


def _remove_if_dead(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return  # somebody's file: whatever it is, it refuses connections as well
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:  # nobody listens any more
            path.unlink()


def _refuse(connection: socket.socket, why: str, reason: str = "") -> None:
    refusal = {"refused": why[: limits.ERROR_MESSAGE_BYTES_MAX], "reason": reason}
    handover.send(connection, refusal, MESSAGE_S)
