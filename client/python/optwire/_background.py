"""Background: a thread that does what a handle is asked for later, in order. No gRPC, no protobuf."""

from __future__ import annotations

import atexit
import collections
import concurrent.futures
import contextlib
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

from optwire import _options
from optwire_proto import errors

Future = concurrent.futures.Future[Any]

_log = logging.getLogger("optwire")


class Background:
    """One thread that works off what it is given, at the end of the program as well. Thread-safe."""

    def __init__(self, name: str) -> None:
        # The thread must not keep this object alive, or whoever holds it: it knows its tasks alone.
        self._tasks = _Tasks()
        # A daemon, as nobody may ever end it; what is left at the end of the program is waited for by `_finish`.
        self._thread = threading.Thread(target=self._tasks.work, name=name, daemon=True)
        _at_exit(self._tasks, self._thread)
        self._thread.start()

    def submit(self, task: Callable[[], Any]) -> Future:
        """A future of what ``task`` returns or raises; may be cancelled until its turn comes.

        Waits while as many are waiting as may; not on the thread itself, where a callback may ask.

        Raises:
          DetachedError: it was ended.
        """
        future: Future = concurrent.futures.Future()
        self._tasks.put(future, task, may_wait=threading.current_thread() is not self._thread)
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
        self._gives_up = False  # at the first task that fails

    def put(self, future: Future, task: Callable[[], Any], *, may_wait: bool) -> None:
        with self._changed:
            if may_wait:
                self._changed.wait_for(lambda: len(self._waiting) < _options.WAITING_MAX or self._ended)
            if self._ended:
                raise errors.DetachedError("nothing can be asked for any more: the handle was closed")
            self._waiting.append((future, task))
            self._submitted += 1
            self._changed.notify_all()

    def wait(self) -> None:
        with self._changed:
            submitted = self._submitted
            self._changed.wait_for(lambda: self._over >= submitted)

    def end(self, *, gives_up: bool = False) -> None:
        with self._changed:
            self._ended = True
            self._gives_up = self._gives_up or gives_up
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
                    self._failed(exc)
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
            if not self._waiting:
                return None
            found = self._waiting.popleft()
            self._changed.notify_all()  # there is room
            return found

    def _passed(self) -> None:
        """Notes that a task is over, before its future says so: what its callbacks wait for may wait for that."""
        with self._changed:
            self._over += 1
            self._changed.notify_all()

    def _failed(self, exc: BaseException) -> None:
        """At the end of the program what follows a task that failed is given up: it is waited for no longer."""
        with self._changed:
            if not self._gives_up:
                return
            dropped = [future for future, _ in self._waiting]
            self._waiting.clear()
            self._over += len(dropped)
        _log.warning("at exit: %d pushes of step_async were dropped after one that failed: %s", len(dropped), exc)
        for future in dropped:
            future.cancel()


_threads: weakref.WeakKeyDictionary[_Tasks, threading.Thread] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_is_registered = False


def _at_exit(tasks: _Tasks, thread: threading.Thread) -> None:
    """Has tasks finished at the end of the program; ``_threads`` forgets them with their thread."""
    global _is_registered
    with _lock:
        _threads[tasks] = thread
        if not _is_registered:
            # As the standard library's executors do it: before threads of others, which a push may need, are ended.
            with contextlib.suppress(RuntimeError):  # the program has ended: what is asked for now may be lost
                getattr(threading, "_register_atexit", atexit.register)(_finish)
            _is_registered = True


def _finish() -> None:
    """Waits for what was asked for, up to the first task that fails; each ends by its own deadline."""
    with _lock:
        threads = list(_threads.items())
    for tasks, _ in threads:
        tasks.end(gives_up=True)
    for _, thread in threads:
        if thread.ident is not None:  # one that was never started cannot be joined
            thread.join()
