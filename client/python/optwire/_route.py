"""Route: how the pushes of one handle travel, and the memory that they travel through. No gRPC, no protobuf."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

from optwire import _deadlines, _options, _payload, _rpc, _segment, _shared, _stages
from optwire_proto import errors, limits, sessions, tensors, trees

# One try of a push: deadline, key, options, payload, where the reply goes.
Push = Callable[
    [_deadlines.Deadline, sessions.PushKey, sessions.PushOptions, _payload.Outgoing, _rpc.Receive],
    tuple[sessions.Ack, list[tensors.Array]],
]


class Route:
    """What carries the pushes of one handle: messages, a stream, shared memory. Used under the handle's lock.

    Attributes:
      sharing: what the handle has to do with shared memory.

    Args:
      channel: to the server.
      transport: what the user asked for.
      tree: the session's.
      session_id: of the session.
      worker: the handle's.
      codecs: in words, those that are not "f32"; empty: there are none.
      is_encoded: whether gradients are, with a residual or without.
    """

    def __init__(
        self,
        channel: _rpc.Channel,
        transport: _options.Transport,
        tree: trees.TreeSpec,
        *,
        session_id: str,
        worker: str,
        codecs: str,
        is_encoded: bool,
    ) -> None:
        self._channel = channel
        self._transport = transport
        self._tree = tree
        self._session_id = session_id
        self._is_encoded = is_encoded
        self._stream: _rpc.Stream | None = None
        self._stage: _stages.Stage | None = None  # once gradients are to go up before their push
        self._staged: _rpc.Stream | None = None  # that they go up on
        self._unary_left = _options.UNARY_FIRST  # small pushes before they get a stream
        self._grads: list[tensors.Array] | None = None  # buffers, once asked for
        self._params: list[tensors.Array] | None = None
        self._pid = os.getpid()  # of the process that they belong to
        self._is_forked = False  # whether memory is shared with the process that this one was forked off
        self.sharing = _shared.Sharing(
            transport,
            session_id,
            worker,
            tree,
            channel.handover_path,
            unless=f"codecs ({codecs}) make messages shorter, and shared memory has none" if codecs else "",
        )
        channel.watch_over(self.sharing)

    def way(self, deadline: _deadlines.Deadline, length: int | None = None) -> Push:
        """How the next push travels.

        Args:
          deadline: of the push.
          length: of a payload that is none of the session's, in bytes, which travels in messages; None: it is one.

        Raises:
          LimitError: it is too large for the transport that the user wants.
          UnsupportedError: the server does not have that transport.
          UnavailableError, DeadlineError: the server could not be asked whether it has.
        """
        if length is None and self.sharing.segment(deadline) is not None:
            return self._push_shared
        length = self._tree.payload_bytes if length is None else length
        if self._transport is _options.Transport.UNARY and length > limits.UNARY_PAYLOAD_BYTES_MAX:
            raise errors.LimitError(
                f"grads: {length} bytes, expected at most {limits.UNARY_PAYLOAD_BYTES_MAX} with transport='unary'; "
                "connect with transport='auto'",
                subject="grads",
                expected=str(limits.UNARY_PAYLOAD_BYTES_MAX),
                got=str(length),
            )
        if self._transport is _options.Transport.UNARY:
            return self._channel.step
        if length > _options.WHOLE_BYTES_MAX:
            return self._push_on_stream
        if self._transport is _options.Transport.AUTO and (self._stream is None or not self._stream.is_open):
            if self._stream is not None:
                self._stream, self._unary_left = None, _options.UNARY_AFTER_LOSS
            if self._unary_left > 0:
                self._unary_left -= 1
                return self._channel.step
        return functools.partial(self._push_on_stream, whole=True)

    def grads(self) -> list[tensors.Array] | None:
        """The arrays of ``grad_buffers``; None before they are made, in this process."""
        return self._grads if self._pid == os.getpid() else None

    def params(self) -> list[tensors.Array] | None:
        """The arrays of ``param_buffers``; None before they are made, in this process."""
        return self._params if self._pid == os.getpid() else None

    def make_buffers(self, deadline: _deadlines.Deadline) -> list[tensors.Array]:
        """The arrays of ``grad_buffers``: in shared memory, or else in some of our own."""
        self._leave_parent()
        if self._grads is None:
            segment = self._shared(deadline)
            self._grads = _payload.aligned(self._tree) if segment is None else self.sharing.lend(segment, deadline)
        return self._grads

    def make_param_buffers(self, deadline: _deadlines.Deadline) -> list[tensors.Array]:
        """The arrays of ``param_buffers``, in the same way."""
        self._leave_parent()
        if self._params is None:
            segment = self._shared(deadline)
            self._params = _payload.aligned(self._tree) if segment is None else segment.params
        return self._params

    def staging(self, deadline: _deadlines.Deadline, incarnation: int) -> _stages.Stage:
        """A stage for the next push; what is copied to it goes up at once where that push travels in frames.

        A push of its buffers, and no other, ends it.
        """
        buffers = self.make_buffers(deadline)
        if self._stage is None:
            self._stage = _stages.Stage(self._tree, buffers)
        if self._stage.may_send and self._goes_in_frames():
            self._staged = stream = self._taken_stream()
            self._stage.send_by(lambda feed: stream.stage(self._session_id, incarnation, feed))
        return self._stage

    def close(self) -> None:
        """Lets go of streams and shared memory."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
        staged, self._staged = self._staged, None
        if staged is not None:
            staged.cancel()
        self.sharing.close()

    def _shared(self, deadline: _deadlines.Deadline) -> _segment.Segment | None:
        return None if self._is_forked else self.sharing.segment(deadline)

    def _leave_parent(self) -> None:
        """In a forked process: the buffers are the parent's."""
        if self._pid != os.getpid():
            self._pid, self._is_forked = os.getpid(), True
            self._grads = self._params = self._stage = None

    def _goes_in_frames(self) -> bool:
        """Whether pushes travel in frames on a stream."""
        is_unary = self._transport is _options.Transport.UNARY
        is_long = self._tree.payload_bytes > _options.WHOLE_BYTES_MAX
        return is_long and not is_unary and not self._is_encoded and not self.sharing.is_used

    def _push_on_stream(
        self,
        deadline: _deadlines.Deadline,
        key: sessions.PushKey,
        options: sessions.PushOptions,
        payload: _payload.Outgoing,
        receive: _rpc.Receive,
        *,
        whole: bool = False,
    ) -> tuple[sessions.Ack, list[tensors.Array]]:
        if self._stage is not None and not whole and self._stage.owns(payload.arrays):
            return self._push_staged(self._stage, deadline, key, options, payload, receive)
        stream = self._taken_stream()
        reply = stream.push(deadline, key, options, payload, receive, whole=whole)
        self._stream = stream
        return reply

    def _push_shared(
        self,
        deadline: _deadlines.Deadline,
        key: sessions.PushKey,
        options: sessions.PushOptions,
        payload: _payload.Outgoing,
        receive: _rpc.Receive,
    ) -> tuple[sessions.Ack, list[tensors.Array]]:
        """One try by shared memory; in a stream, where the segment is lost."""

        def send(deadline: _deadlines.Deadline, slot: int, digest: sessions.Digest) -> sessions.Ack:
            stream = self._taken_stream()
            ack = stream.push_shared(deadline, key, options, slot, digest)
            self._stream = stream
            return ack

        while self.sharing.segment(deadline) is not None:
            try:
                return self.sharing.push(deadline, options, payload, receive, send)
            except _shared.SegmentLostError:
                continue
            except _shared.NoSegmentError:
                break
        return self._push_on_stream(deadline, key, options, payload, receive)

    def _taken_stream(self) -> _rpc.Stream:
        """An open stream, to be put back only after a whole reply."""
        stream, self._stream = self._stream, None
        return stream if stream is not None and stream.is_open else self._channel.open_stream()

    def _push_staged(
        self,
        stage: _stages.Stage,
        deadline: _deadlines.Deadline,
        key: sessions.PushKey,
        options: sessions.PushOptions,
        payload: _payload.Outgoing,
        receive: _rpc.Receive,
    ) -> tuple[sessions.Ack, list[tensors.Array]]:
        """One try of a push whose payload was staged; the first, unless its stream is lost, sends only what is left."""

        def heard(ack: sessions.Ack | None) -> _payload.Incoming:
            incoming = receive(ack)
            incoming.heard = stage.heard
            return incoming

        feed, stream, self._staged = stage.taken(), self._staged, None
        if feed is None or stream is None or not stream.is_open:
            if stream is not None:
                stream.cancel()
            feed, stream = None, self._taken_stream()
        try:
            reply = stream.push(deadline, key, options, payload, heard, staged=feed)
        except BaseException:
            if feed is not None:
                stage.lost(feed)
            raise
        if feed is not None:
            stage.resent_bytes += feed.sent_bytes - payload.length
        self._stream = stream
        return reply
