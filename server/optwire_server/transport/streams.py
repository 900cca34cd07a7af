"""The long calls under way: how many there may be, which of them have stalled, which are idle. Knows no messages."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import grpc

from optwire_proto import errors


class Stream:
    """One call under way."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self.context = context
        self.is_working = False
        self.since_s = time.monotonic()

    def progressed(self) -> None:
        """Notes that bytes came or left."""
        self.since_s = time.monotonic()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Marks the time in which a push is under way; otherwise the stream is idle."""
        self.is_working = True
        self.progressed()
        try:
            yield
        finally:
            self.is_working = False
            self.progressed()


class StreamTable:
    """The open streams of a server. Thread-safe.

    A watching thread ends those from which no byte has come for too long: uploads that stalled, so that their buffers
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
    def open(self, context: grpc.ServicerContext) -> Iterator[Stream]:
        """Counts a call for as long as it is under way.

        Raises:
          LimitError: too many are.
          UnavailableError: the server is draining.
        """
        stream = Stream(context)
        with self._lock:
            if self.draining:
                raise errors.UnavailableError("the server is draining", subject="server", got="draining")
            if len(self._streams) >= self._streams_max:
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

    def __len__(self) -> int:
        return len(self._streams)

    def drain(self) -> None:
        """Takes no further streams, ends the idle ones; working ones end after their push."""
        with self._lock:
            self.draining = True
            idle = [stream for stream in self._streams if not stream.is_working]
        for stream in idle:
            stream.context.cancel()

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._closed.wait(min(self._stall_s, self._idle_s, 4.0) / 4):
            now = time.monotonic()
            with self._lock:
                overdue = [
                    stream
                    for stream in self._streams
                    if now - stream.since_s > (self._stall_s if stream.is_working else self._idle_s)
                ]
            for stream in overdue:
                stream.context.cancel()
