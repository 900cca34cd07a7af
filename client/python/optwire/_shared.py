"""Shared memory with a server on this host: how a handle gets it, and what goes through it. No gRPC, no protobuf.

The server makes a segment and hands it over on a Unix socket; the push that names its slot travels as a message.
While a push is under way its gradients are the server's to read: they are not written over before it is known that the
server has finished with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from optwire import _deadlines, _options, _payload, _segment
from optwire_proto import digests, errors, handover, limits, sessions, tensors, trees

# What a send gets: the try's deadline, the slot, and what stands for the payload.
Send = Callable[[_deadlines.Deadline, int, sessions.Digest], sessions.Ack]

_MESSAGE_S: Final = 5.0


class Sharing:
    """What one handle has to do with shared memory. Used by one thread at a time, but for ``close``.

    Args:
      transport: what the user asked for.
      session_id: of the handle's session.
      worker: the handle's.
      tree: the session's.
      find_path: asks the server where its handover socket is; empty: nowhere.
      unless: why the session's pushes cannot go through shared memory; empty: they can.

    Attributes:
      reason: why pushes go through shared memory, or not; empty as long as nothing was tried.
    """

    def __init__(
        self,
        transport: _options.Transport,
        session_id: str,
        worker: str,
        tree: trees.TreeSpec,
        find_path: Callable[[_deadlines.Deadline], str],
        *,
        unless: str = "",
    ) -> None:
        self._transport = transport
        self._session_id = session_id
        self._worker = worker
        self._tree = tree
        self._find_path = find_path
        self._segment: _segment.Segment | None = None
        self._is_lent = False  # whether the user writes to the segment's gradients: nobody else does from then on
        self._beside: _segment.Segment | None = None  # another, for gradients that lie elsewhere once the first is lent
        self._is_refused_beside = False
        self._path = ""  # of the server's handover socket
        self._unanswered: _Unanswered | None = None
        self._pid = 0  # of the process that the segment was handed over to
        self._lock = threading.Lock()  # of what follows: `close` may come from another thread
        self._is_busy = False  # whether a push is being made
        self._is_closed = False
        self.reason = unless or self._refusal()

    def segment(self, deadline: _deadlines.Deadline) -> _segment.Segment | None:
        """The segment of this handle, which is asked for at the first call; None where there is none.

        Raises:
          UnsupportedError, SessionNotFoundError: the user wants no other transport.
          UnavailableError, DeadlineError: nor could the server be asked.
        """
        must = self._transport is _options.Transport.SHARED_MEMORY and not self._is_closed
        if self._segment is not None and os.getpid() != self._pid:
            self._lose("this process was forked off the one that the memory was handed over to")
        if not self.reason and not self._is_closed:
            soon = _deadlines.Deadline(min(_MESSAGE_S, deadline.remaining_s / 2))
            try:
                self._path = _deadlines.retried(lambda _: self._find_path(soon), soon, "asking for shared memory")
                self._segment = self._attached(deadline)
                self._pid, self.reason = os.getpid(), f"handed over on {self._path}"
            except _segment.RefusedError as exc:
                self.reason = str(exc)
                if must and exc.reason == errors.SessionNotFoundError.reason:
                    raise errors.SessionNotFoundError(self.reason, subject=self._session_id) from exc
            except (errors.UnavailableError, errors.DeadlineError) as exc:
                if must:
                    raise
                self.reason = f"the server could not be asked: {exc}"
            self._let_go_if_closed()
        if self._segment is None and must:
            raise _unsupported(self.reason)
        return self._segment

    def lend(self, segment: _segment.Segment, deadline: _deadlines.Deadline) -> list[tensors.Array]:
        """The gradients of the segment, zeros, for the user to write to; from now on no push does.

        Raises:
          UnavailableError: the server still works on a push of other gradients that lie there.
        """
        if segment.is_in_use:
            self._take_back(segment, deadline.remaining_s)
        if segment.is_filled:
            segment.empty()
        self._is_lent = True
        return segment.grads

    @property
    def transport(self) -> tuple[str, str]:
        """How pushes travel, and why."""
        if self.is_used:
            return _options.Transport.SHARED_MEMORY, self.reason
        if not self.reason:
            return self._transport, "nothing was pushed yet"
        is_unary = self._transport is _options.Transport.UNARY
        return _options.Transport.UNARY if is_unary else _options.Transport.STREAM, self.reason

    @property
    def is_used(self) -> bool:
        """Whether there is a segment."""
        return self._segment is not None

    def push(
        self,
        deadline: _deadlines.Deadline,
        options: sessions.PushOptions,
        payload: _payload.Outgoing,
        receive: Callable[[sessions.Ack | None], _payload.Incoming],
        send: Send,
    ) -> tuple[sessions.Ack, list[tensors.Array]]:
        """One try of a push.

        Args:
          deadline: of the try.
          options: what the push says beside its gradients.
          payload: the gradients of the leaves that have any; the same object in every try of a push.
          receive: where the arrays of the reply go.
          send: sends the message, and waits for the answer.

        Raises:
          UnavailableError: the server still works on an earlier try, or cannot be reached.
          UnsupportedError: it has no segment for gradients that lie elsewhere, and the user wants no other transport.
          SegmentLostError: the server knows the segment no more; nothing was applied.
          NoSegmentError: it has none, and another transport will do.
        """
        segment = self._fitting(deadline, payload, options)
        before = self._unanswered
        if segment.is_in_use:
            self._take_back(segment, deadline.remaining_s)
        if before is None or before.payload is not payload or before.segment is not segment:
            token = before.token if before and before.is_made_by(payload) else secrets.token_bytes(limits.TOKEN_BYTES)
            segment.fill(payload.arrays, options.absent)  # once: what is copied may come from where replies go
            before = _Unanswered(token, payload, options.absent, segment)
        # From here on the server may read what lies there: until its answer says that it has.
        self._unanswered, segment.is_in_use = before, True
        try:
            ack = send(deadline, segment.slot, sessions.Digest(payload.length, token=before.token))
        except errors.OptwireError as exc:
            if isinstance(exc, errors.InvalidArgumentError) and exc.subject == "shared_memory_slot":
                self._drop(segment)
                raise SegmentLostError from exc
            if not isinstance(exc, _deadlines.OUTCOME_UNKNOWN):
                self._unanswered, segment.is_in_use = None, False  # the server has answered
            raise
        segment.is_in_use = False
        if options.reply is sessions.ReplyContent.NONE:
            return ack, []
        incoming = receive(ack)
        left_out = options.absent if options.reply is sessions.ReplyContent.PRESENT else ()
        arrays = segment.read(incoming, left_out)
        if incoming.heard is not None:
            incoming.heard(ack.step, ack.payload_bytes)
        return ack, arrays

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Around all tries of a push, until it is counted: where its outcome stays unknown, notes what it was.

        Afterwards its gradients may be written over: the server reads them no more.
        """
        with self._lock:
            self._is_busy = True
        try:
            yield
            self._unanswered = None
        except BaseException:
            unanswered = self._unanswered
            if unanswered is not None and unanswered.payload is not None:
                unanswered.payload, segment = None, unanswered.segment
                # First, as whoever waits may be interrupted once more; nobody writes to the gradients meanwhile.
                there = (views for index, views in enumerate(segment.grads) if index not in unanswered.absent)
                unanswered.content = _digest([_segment.wire_view(array) for array in there])
                if segment.is_in_use:
                    with contextlib.suppress(errors.UnavailableError):
                        self._take_back(segment, _MESSAGE_S)
            raise
        finally:
            with self._lock:
                self._is_busy = False
            self._let_go_if_closed()

    def close(self) -> None:
        """Lets go of the segment, or has the push that is being made do it. Memory stays as long as there are views."""
        with self._lock:
            self._is_closed = True
        self._let_go_if_closed()

    def _let_go_if_closed(self) -> None:
        with self._lock:
            if self._is_closed and not self._is_busy:
                self._lose("the handle was closed")

    def _attached(self, deadline: _deadlines.Deadline) -> _segment.Segment:
        """A new segment; half of the time that is left must do, as the push has not begun."""
        return _segment.attach(self._path, self._session_id, self._worker, self._tree, deadline.remaining_s / 2)

    def _fitting(
        self, deadline: _deadlines.Deadline, payload: _payload.Outgoing, options: sessions.PushOptions
    ) -> _segment.Segment:
        """The segment for a push: what is lent is written to by the user alone."""
        assert self._segment is not None, "nothing is shared"
        if not self._is_lent or self._segment.holds(payload.arrays, options.absent):
            return self._segment
        if self._beside is not None:
            return self._beside
        if self._is_refused_beside:
            raise NoSegmentError
        try:
            self._beside = self._attached(deadline)
        except _segment.RefusedError as exc:
            if self._transport is not _options.Transport.SHARED_MEMORY:
                self._is_refused_beside = True
                raise NoSegmentError from exc
            if exc.is_said:
                raise _unsupported(f"gradients beside grad_buffers(): {exc}") from exc
            raise errors.UnavailableError(f"memory for gradients beside grad_buffers(): {exc}") from exc
        return self._beside

    def _refusal(self) -> str:
        """Why it is no use to ask for a segment; empty: it is worth trying."""
        if self._transport not in (_options.Transport.AUTO, _options.Transport.SHARED_MEMORY):
            return f"connect(transport={str(self._transport)!r})"
        if self._transport is _options.Transport.AUTO and self._tree.payload_bytes <= _options.WHOLE_BYTES_MAX:
            return f"{self._tree.payload_bytes} bytes travel faster in a message"
        return ""

    def _lose(self, why: str = "") -> None:
        """Lets go of all segments, and says why there will be no other; empty: another is to be asked for."""
        for segment in (self._segment, self._beside):
            if segment is not None:
                segment.close()
        self._segment = self._beside = None
        self._is_lent, self._is_refused_beside, self.reason = False, False, why

    def _drop(self, segment: _segment.Segment) -> None:
        """Lets go of a segment that is of no further use."""
        if segment is self._segment:
            self._lose()
            return
        segment.close()
        if segment is self._beside:
            self._beside = None

    def _take_back(self, segment: _segment.Segment, timeout_s: float) -> None:
        try:
            is_quiet = segment.quiet(timeout_s)
        except (OSError, handover.HandoverError) as exc:
            self._drop(segment)
            raise errors.UnavailableError(f"the connection for shared memory has ended: {exc}") from exc
        if not is_quiet:
            raise errors.UnavailableError("the server still works on an earlier try of a push in shared memory")
        segment.is_in_use = False


class SegmentLostError(Exception):
    """The server let go of the segment."""


class NoSegmentError(Exception):
    """The server has no segment for gradients that lie elsewhere."""


@dataclasses.dataclass(slots=True, eq=False)
class _Unanswered:
    """A push that the server has not answered, as far as we know.

    Attributes:
      token: what stands for its bytes.
      payload: as given by the call that makes it; None once that has given up.
      absent: positions of the leaves it has no gradient of.
      segment: where its bytes lie.
      content: what its bytes were, taken when the call gave up; None: not known.
    """

    token: bytes
    payload: _payload.Outgoing | None
    absent: tuple[int, ...]
    segment: _segment.Segment
    content: sessions.Digest | None = None

    def is_made_by(self, payload: _payload.Outgoing) -> bool:
        """Whether it is the push of a payload: made by the same call, or made again by the user with the same bytes."""
        return payload is self.payload or (self.content is not None and self.content == _digest(payload.arrays))


def _unsupported(why: str) -> errors.UnsupportedError:
    return errors.UnsupportedError(
        f"transport='shared_memory': {why}; connect with transport='auto'",
        subject="transport",
        expected="a server of this host and user that hands over shared memory",
        got=why[:200],
    )


def _digest(arrays: Sequence[tensors.Array]) -> sessions.Digest:
    digester = digests.Digester()
    for array in arrays:
        digester.update(tensors.wire_bytes(array))
    return digester.digest()
