"""Segments: memory that is shared with a client of this host, where gradients come and parameters go without a copy.

A segment is an anonymous file in memory. It has no name, its size is sealed, and it is gone when both ends have let go
of it, however they ended. Its first half belongs to the client's gradients, its second half to the parameters that are
written back. Nothing that decides anything is ever read from it: lengths and offsets are the server's own.

Knows neither sockets nor sessions.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from optwire_proto import errors, limits, sessions

# What is mapped starts on such a boundary, and so does each half.
_PAGE: Final = mmap.PAGESIZE
_SEALS: Final = ("F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_SEAL")
_SLOT_MAX: Final = 2**32 - 1


def missing() -> str:
    """Why segments cannot be made here; empty where they can."""
    needed = hasattr(os, "memfd_create") and all(hasattr(fcntl, seal) for seal in _SEALS)
    return "" if sys.platform == "linux" and needed else f"needs sealed anonymous files, which {sys.platform} has not"


class Segments:
    """Makes segments up to a total of bytes, and finds them by their slots. Thread-safe."""

    def __init__(self, *, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._by_slot: dict[int, Segment] = {}
        self._last_slot = 0
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._by_slot)

    @property
    def shared_bytes(self) -> int:
        """Bytes of all segments that are handed over, or used still."""
        return self._bytes

    def make(self, session_id: str, worker: str, payload_bytes: int) -> Segment:
        """A new segment for the pushes of one worker; whoever holds it must ``drop`` it.

        Args:
          session_id: of the session it is for.
          worker: whose pushes may lie in it.
          payload_bytes: room for gradients, and as much for parameters.

        Raises:
          LimitError: all segments together would exceed the limit, or the machine has no memory for it.
        """
        half = -(-max(payload_bytes, 1) // _PAGE) * _PAGE
        with self._lock:
            self._count(2 * half)
        try:
            made = Segment(self, session_id, worker, half)
        except BaseException:
            self.free(2 * half)
            raise
        with self._lock:
            self._number(made)
        return made

    def claim(self, slot: int, key: sessions.PushKey) -> Claim:
        """The use of a segment for one push.

        Raises:
          InvalidArgumentError: no segment was handed over under this number, for this session and worker.
        """
        with self._lock:  # held until the claim is made: it must be of the time when the segment had this slot
            found = self._by_slot.get(slot)
            if found is not None and (found.session_id, found.worker) == (key.session_id, key.worker):
                return found.claim()
        raise errors.InvalidArgumentError(
            f"shared_memory_slot: {slot} is no segment of this session and worker",
            subject="shared_memory_slot",
            expected="a slot handed over for the session and worker of the push",
            got=str(slot),
        )

    def quiet(self, segment: Segment, timeout_s: float) -> bool:
        """Gives a segment another slot, and waits until no push that came under the old one uses it any more.

        Whatever of such pushes is still on its way will find no segment.

        Returns:
          Whether nothing reads or writes the memory now.
        """
        with self._lock:
            if self._by_slot.pop(segment.slot, None) is not None:
                self._number(segment)
        return segment.quiet(timeout_s)

    def drop(self, segment: Segment) -> None:
        """Lets a segment go, at once or when no push uses it any more."""
        with self._lock:
            self._by_slot.pop(segment.slot, None)
        segment.release()

    def free(self, nbytes: int) -> None:
        """Takes bytes out of the count; ``Segment`` calls it."""
        with self._lock:
            self._bytes -= nbytes

    def _number(self, segment: Segment) -> None:
        while True:
            self._last_slot = self._last_slot % _SLOT_MAX + 1
            if self._last_slot not in self._by_slot:  # after four thousand million, the numbers begin again
                break
        segment.slot = self._last_slot
        self._by_slot[segment.slot] = segment

    def _count(self, nbytes: int) -> None:
        if self._bytes + nbytes > self._bytes_max:
            raise errors.LimitError(
                f"segment of {nbytes} bytes: {self._bytes} of {self._bytes_max} bytes of shared memory are in use",
                subject="shared_bytes_max",
                expected=f"at most {self._bytes_max} bytes together",
                got=str(nbytes),
            )
        self._bytes += nbytes


class Segment:
    """Memory shared with one client. Made by ``Segments``.

    Attributes:
      slot: its number for now; 0: none yet.
      session_id: of the session it is for.
      worker: whose pushes may lie in it.
      nbytes: its size.
      params_offset: where its second half starts.
      file: descriptor of the anonymous file, to be handed over and closed; -1 afterwards.
    """

    def __init__(self, owner: Segments, session_id: str, worker: str, half: int) -> None:
        self.slot = 0
        self.session_id = session_id
        self.worker = worker
        self.nbytes = 2 * half
        self.params_offset = half
        self._owner = owner
        self._changed = threading.Condition()
        self._users = 0
        self._era = 0  # claims of an earlier one are of no use any more
        self._evictions: list[Callable[[], object]] = []
        self.file = -1
        self._memory: np.ndarray | None = None
        try:
            self.file = os.memfd_create("optwire", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.file, self.nbytes)
            # Memory that is not there is an error here, and not a signal in the middle of an update.
            os.posix_fallocate(self.file, 0, self.nbytes)
            fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._memory = np.frombuffer(mmap.mmap(self.file, self.nbytes), np.uint8)
        except (OSError, MemoryError) as exc:
            self.close_file()
            raise errors.LimitError(
                f"segment of {self.nbytes} bytes: this machine has no memory to share: {exc}",
                subject="shared memory",
                expected=f"{self.nbytes} bytes",
                got=type(exc).__name__,
            ) from exc
        self._memory[::_PAGE] = 0  # its pages are entered here, and not during the first update

    def close_file(self) -> None:
        """Closes the descriptor; the memory stays."""
        file, self.file = self.file, -1
        if file >= 0:
            os.close(file)

    def claim(self) -> Claim:
        """The use of the segment for one push; see ``Segments.claim``."""
        with self._changed:
            memory = np.empty(0, np.uint8) if self._memory is None else self._memory  # let go of: can never be entered
            return Claim(self, self._era, memory[: self.params_offset], memory[self.params_offset :])

    def quiet(self, timeout_s: float) -> bool:
        """Ends all claims: those that have not begun never will, the others are waited for. See ``Segments.quiet``."""
        with self._changed:
            self._era += 1
            evictions = list(self._evictions)
        for evict in evictions:
            evict()
        with self._changed:
            return self._changed.wait_for(lambda: not self._users, timeout_s)

    def release(self) -> None:
        """Lets go of the memory, and of the room it takes, as soon as nobody uses it; ``Segments.drop`` calls it."""
        self.close_file()
        with self._changed:
            self._era += 1
            dropped, self._memory = self._memory is not None, None
            is_over = dropped and self._users == 0
        if is_over:
            self._owner.free(self.nbytes)

    def keep(self, era: int, evict: Callable[[], object]) -> Callable[[], None]:
        """Begins the use of a claim until what this returns is called; see ``Claim.keep``."""
        self.enter(era)
        with self._changed:
            self._evictions.append(evict)

        def leave() -> None:
            with self._changed:
                self._evictions.remove(evict)
            self.leave()

        return leave

    def enter(self, era: int) -> None:
        """Begins the use of a claim; raises UnavailableError where it is outdated."""
        with self._changed:
            if era != self._era:
                raise errors.UnavailableError("the client has taken its shared memory back, or left")
            self._users += 1

    def leave(self) -> None:
        """Ends the use of a claim."""
        with self._changed:
            self._users -= 1
            is_over = self._users == 0 and self._memory is None
            self._changed.notify_all()
        if is_over:
            self._owner.free(self.nbytes)


class Claim:
    """The use of a segment for one push.

    Attributes:
      grads: the first half. uint8
      params: the second half. uint8
    """

    def __init__(self, segment: Segment, era: int, grads: np.ndarray, params: np.ndarray) -> None:
        self._segment = segment
        self._era = era
        self.grads = grads
        self.params = params

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """The time in which the memory is read and written; what it holds then, belongs to this push.

        Raises:
          UnavailableError: the client has taken the segment back or let go of it; nothing may be read or written.
        """
        self._segment.enter(self._era)
        try:
            yield
        finally:
            self._segment.leave()

    def keep(self, evict: Callable[[], object]) -> Callable[[], None]:
        """As ``using``, until what this returns is called once; a client that takes its memory back waits for that.

        Args:
          evict: called, from another thread, when the client wants the memory back: what is returned is to be called
            soon.
        """
        return self._segment.keep(self._era, evict)


def check_token(digest: sessions.Digest, payload_bytes: int) -> None:
    """Raises PayloadError unless a digest is the token of a payload of this length in shared memory."""
    if len(digest.token) != limits.TOKEN_BYTES or digest.length != payload_bytes:
        expected = f"{payload_bytes} bytes and a token"
        raise errors.PayloadError(
            f"payload in shared memory: {digest}, expected {expected}",
            subject="digest",
            expected=expected,
            got=str(digest),
        )
