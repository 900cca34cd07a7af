"""The one thread that works on a device, and whose turn it is: sessions take turns, block by block.

What is done for one session is done in the order in which it was asked for; between sessions the turn passes after each
block, so that a large update delays a small one by a block and not by itself.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import threading
from collections.abc import Generator
from typing import Any, TypeVar

from optwire_proto import errors

T = TypeVar("T")
# What yields between blocks, and returns what came of it.
Work = Generator[None, None, T]


@dataclasses.dataclass(slots=True, eq=False)
class _Task:
    work: Work[Any]
    outcome: concurrent.futures.Future[Any] = dataclasses.field(default_factory=concurrent.futures.Future)

    def advance(self) -> bool:
        """One block further; whether the task is over."""
        try:
            next(self.work)
        except StopIteration as stop:
            self.outcome.set_result(stop.value)
            return True
        except BaseException as exc:  # noqa: BLE001  it is the caller's
            self.outcome.set_exception(exc)
            return True
        return False


class Lane:
    """The tasks of one session, in order.

    Args:
      turns: blocks that are worked off before the turn passes to the next session.
    """

    def __init__(self, turns: int = 1) -> None:
        self.turns = turns
        self.tasks: collections.deque[_Task] = collections.deque()


class Device:
    """Runs tasks on a thread of its own. Thread-safe."""

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._waiting: collections.deque[Lane] = collections.deque()  # lanes with tasks, the next one first
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def run(self, lane: Lane, work: Work[T]) -> T:
        """Runs a generator on the device's thread, and waits for what it returns.

        Args:
          lane: of the session that it is done for.
          work: whenever it yields, other sessions get their turns.

        Raises:
          UnavailableError: the device is closed.
        """
        task = _Task(work)
        with self._changed:
            if self._closed:
                raise errors.UnavailableError("the server is shutting down")
            lane.tasks.append(task)
            if len(lane.tasks) == 1:
                self._waiting.append(lane)
                self._changed.notify()
        result: T = task.outcome.result()
        return result

    def close(self) -> None:
        """Finishes what was asked for and stops the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while (lane := self._next()) is not None:
            task = lane.tasks[0]
            for _ in range(lane.turns):
                if over := task.advance():
                    break
            with self._changed:
                if over:
                    lane.tasks.popleft()
                if lane.tasks:
                    self._waiting.append(lane)
            del task  # nor may the thread keep alive what the task held

    def _next(self) -> Lane | None:
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            return self._waiting.popleft()
