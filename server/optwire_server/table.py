"""The table of all live sessions of a server."""

from __future__ import annotations

import threading

from optwire_proto import errors
from optwire_server.live import LiveSession


class Table:
    """Sessions by id and by name. Whoever looks at more than one, or enters one, holds ``lock``."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.by_id: dict[str, LiveSession] = {}
        self.by_name: dict[str, LiveSession] = {}

    def find(self, *, id_: str = "", name: str = "") -> LiveSession:
        """The session with this id, or else this name; raises SessionNotFoundError."""
        with self.lock:
            live = self.by_id.get(id_) if id_ else self.by_name.get(name)
        if live is None:
            raise errors.SessionNotFoundError(
                f"session {id_ or name!r} is not held by this server; sessions in memory end with the server's process",
                subject=id_ or name,
            )
        return live

    def drop(self, live: LiveSession) -> None:
        """Forgets a session."""
        with self.lock:
            self.by_id.pop(live.machine.id, None)
            self.by_name.pop(live.machine.name, None)
