"""What is compiled ahead: on one thread, for sessions that may come, while nobody waits for it."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Hashable

from optwire_server.engine import program

# Programs that wait for their turn, and families that are remembered; beyond, the next session compiles for itself.
_WAITING_MAX = 64
_FAMILIES_MAX = 1024

_log = logging.getLogger("optwire.ahead")


class Ahead:
    """Compiles for blocks of the sizes that programs in use do not have. Thread-safe; one daemon thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: weakref.WeakSet[program.Program] = weakref.WeakSet()
        self._families: set[Hashable] = set()
        self._waiting: queue.Queue[program.Program] = queue.Queue(_WAITING_MAX)
        self._thread: threading.Thread | None = None

    def add(self, compiled: program.Program) -> None:
        """Compiles what a program lacks, soon; nothing where that was done for it, or for one of its family."""
        if compiled in self._seen:
            return
        with self._lock:
            self._seen.add(compiled)
            if compiled.family in self._families or self._waiting.full():
                return
            if len(self._families) == _FAMILIES_MAX:
                self._families.clear()
            self._families.add(compiled.family)
            self._waiting.put(compiled)
            if self._thread is None:
                self._thread = threading.Thread(target=self._compile, name="optwire-ahead", daemon=True)
                self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to compile."""
        return not self._waiting.unfinished_tasks

    def _compile(self) -> None:
        while True:
            compiled = self._waiting.get()
            try:
                compiled.compile_ahead()
            except Exception:  # noqa: BLE001  whoever needs it compiles it, and is told what is wrong
                _log.exception("%s: not compiled ahead", compiled.spec.name)
            finally:
                self._waiting.task_done()
                del compiled
