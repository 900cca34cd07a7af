"""The clock: sees to it that each session hears of time when something of it is due. Knows no rules."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from optwire_proto import errors
from optwire_server.live import LiveSession

_log = logging.getLogger("optwire.clock")

# After how many seconds what was due is tried again, where it was not done.
_AGAIN_S = 1.0


class Clock:
    """Calls ``tick`` for sessions whose time has come, each call on a thread of its own. Thread-safe.

    The thread that watches is there from the first time on that there is anything to watch.

    Args:
      tick: what is due for a session; may take long.
    """

    def __init__(self, tick: Callable[[LiveSession], None]) -> None:
        self._tick = tick
        self._changed = threading.Condition()
        self._due_s: dict[str, tuple[float, LiveSession]] = {}  # by the session's id
        self._thread: threading.Thread | None = None
        self._wakes_s = 0.0  # when it looks again, by itself
        self._is_closed = False

    def watch(self, live: LiveSession, due_s: float | None) -> None:
        """Something of a session is due at a time of ``time.monotonic``; None: nothing, until this is said anew."""
        id_ = live.machine.id
        if due_s is None and id_ not in self._due_s:
            return
        with self._changed:
            if due_s is None or self._is_closed:
                self._due_s.pop(id_, None)
                return
            self._due_s[id_] = due_s, live
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="optwire-clock", daemon=True)
                self._thread.start()
            elif due_s < self._wakes_s:
                self._changed.notify()

    def close(self) -> None:
        """Watches nothing any more; what has begun goes on."""
        with self._changed:
            self._is_closed = True
            self._due_s.clear()
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._is_closed:
                now_s = time.monotonic()
                for id_ in [id_ for id_, (due_s, _) in self._due_s.items() if due_s <= now_s]:
                    _, live = self._due_s.pop(id_)
                    threading.Thread(target=self._run, args=(live,), name="optwire-tick", daemon=True).start()
                self._wakes_s = min((due_s for due_s, _ in self._due_s.values()), default=threading.TIMEOUT_MAX)
                self._changed.wait(min(self._wakes_s - now_s, threading.TIMEOUT_MAX))

    def _run(self, live: LiveSession) -> None:
        try:
            self._tick(live)
        except errors.UnavailableError:
            pass  # the server is shutting down
        except Exception:  # noqa: BLE001  nobody else would hear of it
            _log.exception("session %s: what was due was not done", live.machine.name)
            self.watch(live, time.monotonic() + _AGAIN_S)
