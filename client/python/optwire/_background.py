"""Background: a thread that does what a handle is asked for later, in order. No gRPC, no protobuf."""

from __future__ import annotations

import collections
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

Future = concurrent.futures.Future[Any]


class Background:
    """One daemon thread that works off what it is given. Thread-safe."""

    def __init__(self, name: str) -> None:
        # The thread must not keep this object alive, or whoever holds it: it knows its tasks alone.
        self._tasks = _Tasks()
        self._thread = threading.Thread(target=self._tasks.work, name=name, daemon=True)
        self._thread.start()

    def submit(self, task: Callable[[], Any]) -> Future:
        """A future of what ``task`` returns or raises; may be cancelled until its turn comes."""
        future: Future = concurrent.futures.Future()
        self._tasks.put(future, task)
        return future

    def wait(self) -> None:
        """Waits until all that was submitted so far is over; not on the thread itself, where a callback may ask."""
        if threading.current_thread() is not self._thread:
            self._tasks.wait()

    def end(self) -> None:
        """Ends the thread after what was submitted."""
        self._tasks.end()

    def close(self) -> None:
        """As ``end``, and waits for it."""
        self.end()
        if threading.current_thread() is not self._thread:
            self._thread.join()


class _Tasks:
    """What waits to be done, in order, and how much of it is over."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: collections.deque[tuple[Future, Callable[[], Any]]] = collections.deque()
        self._submitted = 0
        self._over = 0
        self._ended = False

    def put(self, future: Future, task: Callable[[], Any]) -> None:
        with self._changed:
            self._waiting.append((future, task))
            self._submitted += 1
            self._changed.notify_all()

    def wait(self) -> None:
        with self._changed:
            submitted = self._submitted
            self._changed.wait_for(lambda: self._over >= submitted)

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def work(self) -> None:
        while (found := self._next()) is not None:
            future, task = found
            del found
            if not future.set_running_or_notify_cancel():
                self._passed()
            else:
                try:
                    result = task()
                except BaseException as exc:  # noqa: BLE001  it is for whoever asks the future
                    self._passed()
                    future.set_exception(exc)
                    del exc
                else:
                    self._passed()
                    future.set_result(result)
                    del result
            del future, task  # nor may they live on while the next is waited for

    def _next(self) -> tuple[Future, Callable[[], Any]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended)
            return self._waiting.popleft() if self._waiting else None

    def _passed(self) -> None:
        """Notes that a task is over, before its future says so: what its callbacks wait for may wait for that."""
        with self._changed:
            self._over += 1
            self._changed.notify_all()
