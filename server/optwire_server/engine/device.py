"""Whose turn it is on a device: one call at a time works on it, and sessions take turns, block by block.

What is done for one session is done in the order in which it was asked for; between sessions the turn passes after each
block, so that a large update delays a small one by a block and not by itself. A call works on its own thread: where
nobody else waits, none is handed over to.
"""

from __future__ import annotations

import collections
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
    """A call, and the signal that it is its turn."""

    work: Work[Any]
    turn: threading.Event = dataclasses.field(default_factory=threading.Event)


class Lane:
    """The calls of one session, in order.

    Args:
      turns: blocks that are worked off before the turn passes to the next session.
    """

    def __init__(self, turns: int = 1) -> None:
        self.turns = turns
        self.tasks: collections.deque[_Task] = collections.deque()


class Device:
    """Gives calls their turns. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: collections.deque[Lane] = collections.deque()  # lanes whose first task waits, the next one first
        self._is_busy = False
        self._is_closed = False

    def run(self, lane: Lane, work: Work[T]) -> T:
        """Waits for its turn, and runs a generator to its end.

        Args:
          lane: of the session that it is done for.
          work: whenever it yields, other sessions get their turns.

        Returns:
          What the generator returns; what it raises is raised.

        Raises:
          UnavailableError: the device is closed.
        """
        task = _Task(work)
        with self._changed:
            if self._is_closed:
                raise errors.UnavailableError("the server is shutting down")
            lane.tasks.append(task)
            if len(lane.tasks) == 1:
                self._waiting.append(lane)
            if not self._is_busy:
                self._pass_on()
        try:
            while True:
                task.turn.wait()
                for _ in range(lane.turns):
                    next(work)
                self._take_turns(lane, task)
        except StopIteration as stop:
            result: T = stop.value
            return result
        finally:
            self._leave(lane, task)

    def close(self) -> None:
        """Takes nothing more, and waits for what was asked for."""
        with self._changed:
            self._is_closed = True
            while self._is_busy:
                self._changed.wait()

    def _take_turns(self, lane: Lane, task: _Task) -> None:
        """Lets others have their turns, if any wait."""
        with self._changed:
            if self._waiting:
                task.turn.clear()
                self._waiting.append(lane)
                self._pass_on()

    def _leave(self, lane: Lane, task: _Task) -> None:
        """Ends a task, be it over or its wait interrupted; where it is its turn, the next one's begins."""
        with self._changed:
            was_first, had_turn = lane.tasks[0] is task, task.turn.is_set()
            lane.tasks.remove(task)
            if was_first and not had_turn:
                self._waiting.remove(lane)
            if was_first and lane.tasks:
                self._waiting.append(lane)
            if had_turn or not self._is_busy:
                self._pass_on()

    def _pass_on(self) -> None:
        """Gives the turn to the first who waits for it, if any; with the lock held."""
        self._is_busy = bool(self._waiting)
        if self._is_busy:
            self._waiting.popleft().tasks[0].turn.set()
        else:
            self._changed.notify_all()
