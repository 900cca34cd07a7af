"""The waiting room of a session: pushes that wait for the others of their step, and the calls that wait with them.

A payload is kept until its step is over, even if the call that brought it has ended: the client may make it again.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

from optwire_proto import sessions
from optwire_server import segments
from optwire_server.engine import landing

# How often a call that waits looks whether it is still wanted, in seconds.
_LOOK_S = 0.2


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """One call that waits for what becomes of its push; ``outcome`` holds the reply, or the error, then.

    With a ``claim`` the parameters of the reply go to shared memory.
    """

    landing: landing.Landing
    options: sessions.PushOptions
    claim: segments.Claim | None = None
    outcome: concurrent.futures.Future[Any] = dataclasses.field(default_factory=concurrent.futures.Future)

    def result(self, look: Callable[[], None]) -> Any:
        """Waits for the outcome; ``look`` is called now and then, and ends the wait by raising."""
        while not concurrent.futures.wait((self.outcome,), _LOOK_S).done:
            look()
        return self.outcome.result()


class WaitingRoom:
    """Payloads and calls of one session's open step. Thread-safe; filled and emptied in the session's turn."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[str, landing.Landing] = {}
        self._left: set[landing.Landing] = set()  # of those kept, the ones whose calls have ended
        self._waiting: dict[str, list[Waiting]] = {}

    def hold(
        self,
        worker: str,
        lent: landing.Landing,
        options: sessions.PushOptions,
        claim: segments.Claim | None = None,
    ) -> Waiting:
        """Keeps a payload, in the place of one that is kept for this worker; gives what its call is to wait for."""
        waiting = Waiting(lent, options, claim)
        with self._lock:
            if (replaced := self._let_go(worker)) is not None:
                replaced.close()  # at once: its call waits on, and needs it no more
            self._kept[worker] = lent
            self._waiting.setdefault(worker, []).append(waiting)
        return waiting

    def kept(self, worker: str) -> landing.Landing:
        """The payload that is kept for a worker."""
        return self._kept[worker]

    def release(self, worker: str) -> list[Waiting]:
        """Lets a worker's payload go; gives the calls that wait for what became of it."""
        with self._lock:
            self._let_go(worker)
            return self._waiting.pop(worker, [])

    def leave(self, lent: landing.Landing) -> None:
        """Ends the call that brought a payload, and its wait; the landing is closed now, or when its step is over."""
        with self._lock:
            for calls in self._waiting.values():
                calls[:] = [waiting for waiting in calls if waiting.landing is not lent]
            if lent in self._kept.values():
                self._left.add(lent)
                return
        lent.close()

    def _let_go(self, worker: str) -> landing.Landing | None:
        lent = self._kept.pop(worker, None)
        if lent is not None:
            lent.used()
        if lent is not None and lent in self._left:
            self._left.discard(lent)
            lent.close()
        return lent
