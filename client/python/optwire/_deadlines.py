"""How long a call may take, who cancels it when that is over, and when a failed try is tried again. No gRPC."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from optwire import _options
from optwire_proto import errors

T = TypeVar("T")

# After these, of all our own errors, it is not known whether what was asked for was done. Some may be the server's own
# word, but all may come of a connection that was lost, in the words of gRPC or of a proxy.
OUTCOME_UNKNOWN = (
    errors.DeadlineError,
    errors.UnavailableError,
    errors.DetachedError,
    errors.InternalError,
    errors.LimitError,
)


class Deadline:
    """The end of one call, retries included.

    Args:
      timeout_s: seconds, as the user gave them.
      payload_bytes: bytes to carry, both directions together; a second more for each 4 MiB.
      leaves: leaves of a tree whose update may have to be compiled first; a second more for each 10.
    """

    def __init__(self, timeout_s: float, payload_bytes: int = 0, leaves: int = 0) -> None:
        allowance_s = payload_bytes / _options.BYTES_PER_SECOND_MIN + leaves / _options.LEAVES_PER_SECOND_MIN
        self.timeout_s = timeout_s + allowance_s
        self.at_s = time.monotonic() + self.timeout_s

    @property
    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at_s - time.monotonic())


def retried(attempt: Callable[[int], T], deadline: Deadline, what: str, outcome: str = "") -> T:
    """Calls ``attempt(number of the try)`` until it succeeds, fails for good, or the deadline is too near.

    Only a server that cannot be reached, drains, or says when to come back is tried again. Pauses double from
    50 ms to 2 s, and each is a random part of that, so that many clients do not return at once.

    Args:
      attempt: one try; must itself end by the deadline.
      deadline: of all tries together.
      what: the call, for messages.
      outcome: what is now unknown, for messages.

    Raises:
      DeadlineError: no answer in time.
      UnavailableError: every try failed.
      LimitError: every try was refused for now.
      OptwireError: whatever else ``attempt`` raises, at once.
    """
    pause_max_s = _options.PAUSE_FIRST_S
    tries, unanswered = 0, ""
    while True:
        tries += 1
        try:
            return attempt(tries)
        except (errors.UnavailableError, errors.LimitError) as exc:
            if isinstance(exc, errors.LimitError) and not exc.retry_after_s:
                raise
            if isinstance(exc, errors.UnavailableError):
                unanswered = outcome
            pause_s = max(exc.retry_after_s, random.uniform(0.0, pause_max_s))
            if pause_s >= deadline.remaining_s:
                raise _given_up(exc, what, tries, deadline, unanswered) from exc
        except errors.DeadlineError as exc:
            raise _given_up(exc, what, tries, deadline, outcome) from exc
        time.sleep(pause_s)
        pause_max_s = min(2 * pause_max_s, _options.PAUSE_MAX_S)


def _given_up(
    last: errors.OptwireError, what: str, tries: int, deadline: Deadline, outcome: str
) -> errors.OptwireError:
    """The last error, with how often and how long it was tried."""
    kind = next(
        kind for kind in (errors.LimitError, errors.DeadlineError, errors.UnavailableError) if isinstance(last, kind)
    )
    verdict = "refused" if kind is errors.LimitError else "no answer"
    times = "1 try" if tries == 1 else f"{tries} tries"
    unknown = f"; {outcome}" if outcome else ""
    return kind(
        f"{what}: {verdict} after {times} within {deadline.timeout_s:.3g} s{unknown}; last: {last}",
        subject=last.subject,
        expected=last.expected,
        got=last.got,
        step=last.step,
        retry_after_s=last.retry_after_s,
    )


class Watchdog:
    """Cancels what is still under way at its deadline; a stream outlives the steps on it and has no deadline itself.

    One daemon thread, started at a watch; it ends by itself when nothing was watched for a second. Safe to use from
    several threads.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watched: dict[object, tuple[float, Callable[[], None]]] = {}
        self._wakes_s = float("inf")  # when the thread looks next, by time.monotonic
        self._idle_since_s = 0.0  # when the last watch ended, by time.monotonic
        self._thread: threading.Thread | None = None
        self._closed = False

    @contextlib.contextmanager
    def watch(self, deadline: Deadline, cancel: Callable[[], None]) -> Iterator[None]:
        """Calls ``cancel`` from another thread if the block has not ended by the deadline."""
        token = object()
        with self._changed:
            self._watched[token] = deadline.at_s, cancel
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="optwire-deadlines", daemon=True)
                self._thread.start()
            elif deadline.at_s < self._wakes_s:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._watched.pop(token, None)
                self._idle_since_s = time.monotonic()

    def close(self) -> None:
        """Ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                now_s = time.monotonic()
                idle = not self._watched and now_s - self._idle_since_s >= _options.WATCHDOG_IDLE_S
                if idle or self._closed:
                    self._thread = None
                    return
                due = [token for token, (at_s, _) in self._watched.items() if at_s <= now_s]
                cancels = [self._watched.pop(token)[1] for token in due]
                if not cancels:
                    # Not later than in a second: a watch that ends wakes nobody, for steps are many and short.
                    looks_s = now_s + _options.WATCHDOG_IDLE_S
                    self._wakes_s = min([looks_s, *(at_s for at_s, _ in self._watched.values())])
                    self._changed.wait(self._wakes_s - now_s)
            for cancel in cancels:  # outside the lock: what they wake may want to end its watch
                cancel()
