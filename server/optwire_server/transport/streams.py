"""The long calls under way: how many there may be, which of them have stalled, which are idle. Knows no messages."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from optwire_proto import errors


class Stream:
    """One call under way, and what it is doing.

    Attributes:
      is_busy: a push or a read is under way; otherwise the stream is idle.
      is_waiting: its push waits for those of other workers; ending the call loses nothing, as the push stays.
      is_transferring: bytes are expected to move; compiling and updating may take what they take.
      since_s: when the last of this changed, or bytes last moved.
    """

    def __init__(self, cancel: Callable[[], object]) -> None:
        self.cancel = cancel
        self.is_busy = False
        self.is_waiting = False
        self.is_transferring = False
        self.since_s = time.monotonic()

    def progressed(self) -> None:
        """Notes that bytes moved."""
        self.since_s = time.monotonic()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """The time from the first frame of a push to the last of its reply."""
        self.is_busy = True
        try:
            yield
        finally:
            self.is_busy = False
            self.progressed()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The time in which nothing is to be done but to wait for other workers."""
        self.is_waiting = True
        self.progressed()
        try:
            yield
        finally:
            self.is_waiting = False

    @contextlib.contextmanager
    def transferring(self) -> Iterator[None]:
        """The time in which the client must keep the bytes moving."""
        self.progressed()  # first, or the time before would count
        self.is_transferring = True
        try:
            yield
        finally:
            self.is_transferring = False


class StreamTable:
    """The open streams of a server. Thread-safe.

    Where no more may be open, an idle one makes room for the next, or else one that waits for other workers, who may be
    the ones that ask; only busy ones make it wait.

    A watching thread ends those on which nothing has moved for too long: transfers that stalled, so that their buffers
    are freed, and idle streams, so that their threads are.
    """

    def __init__(self, *, streams_max: int, stall_s: float, idle_s: float) -> None:
        self._streams_max = streams_max
        self._stall_s = stall_s
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._streams: set[Stream] = set()
        self._closed = threading.Event()
        self.draining = False
        self._watcher = threading.Thread(target=self._watch, name="optwire-streams", daemon=True)
        self._watcher.start()

    @contextlib.contextmanager
    def open(self, cancel: Callable[[], object]) -> Iterator[Stream]:
        """Counts a call for as long as it is under way; ``cancel`` must end it from another thread.

        Raises:
          LimitError: too many are.
          UnavailableError: the server is draining.
        """
        stream = Stream(cancel)
        with self._lock:
            if self.draining:
                raise errors.UnavailableError("the server is draining", subject="server", got="draining")
            idle = [other for other in self._streams if not other.is_busy]
            idle = idle or [other for other in self._streams if other.is_waiting]
            if len(self._streams) >= self._streams_max and idle:
                # The one that has been idle longest makes room; its client opens another when it needs one, and sends
                # a push that waited again.
                longest = min(idle, key=lambda other: other.since_s)
                self._streams.discard(longest)
                longest.cancel()
            elif len(self._streams) >= self._streams_max:
                raise errors.LimitError(
                    f"{len(self._streams)} streams are open, the most this server takes",
                    subject="streams_max",
                    expected=f"at most {self._streams_max}",
                    got=str(len(self._streams) + 1),
                    retry_after_s=1.0,
                )
            self._streams.add(stream)
        try:
            yield stream
        finally:
            with self._lock:
                self._streams.discard(stream)

    @contextlib.contextmanager
    def waiting(self, cancel: Callable[[], object]) -> Iterator[None]:
        """Counts a short call that has to wait for other workers; raises as ``open`` does."""
        with self.open(cancel) as stream, stream.busy(), stream.waiting():
            yield

    def __len__(self) -> int:
        return len(self._streams)

    def drain(self) -> None:
        """Takes no further streams, ends the idle ones; busy ones end after their push."""
        with self._lock:
            self.draining = True
            idle = [stream for stream in self._streams if not stream.is_busy]
        for stream in idle:
            stream.cancel()

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._closed.wait(min(self._stall_s, self._idle_s, 4.0) / 4):
            with self._lock:
                overdue = [stream for stream in self._streams if self._is_overdue(stream)]
            for stream in overdue:
                stream.cancel()

    def _is_overdue(self, stream: Stream) -> bool:
        quiet_s = time.monotonic() - stream.since_s
        return (stream.is_transferring and quiet_s > self._stall_s) or (not stream.is_busy and quiet_s > self._idle_s)
