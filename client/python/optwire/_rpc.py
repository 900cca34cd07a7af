"""The client's only module that knows gRPC and generated code. Plain data in, plain data and typed errors out.

One try of one call each; `_deadlines.retried` decides about the next.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import grpc

from optwire import _allocator, _deadlines, _options, _payload, _shared, _stages
from optwire_proto import convert, digests, errors, limits, rows, sessions, specs, tensors, trees
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import optimizer_pb2_grpc as pb_grpc

ERROR_KEY = "optwire-error-bin"
# Room for what surrounds a chunk or payload of the longest kind.
_MESSAGE_BYTES_MAX = limits.MESSAGE_BYTES_MAX + limits.MIB
_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", _MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX),
    # A server that vanished without a word is noticed within 30 s; also between steps.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Tries and pauses are ours, and so short that a restarted server is found at once.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Clients of one process do not share a connection behind our back.
    ("grpc.use_local_subchannel_pool", 1),
)

Frame = TypeVar("Frame", pb.CreateSessionRequest, pb.LoadStateRequest, pb.StreamStepsRequest)


# Where the parameters of a reply go. None: its ack has not come yet.
Receive = Callable[[sessions.Ack | None], _payload.Incoming]


class Channel:
    """One connection to a server and the calls on it; safe to use from several threads. Connects at the first call.

    Every method may raise ``UnavailableError``, ``DeadlineError``, ``DetachedError`` (after ``close``), and what the
    server answers.
    """

    def __init__(self, options: _options.Options) -> None:
        self._channel = grpc.insecure_channel(options.target, options=_CHANNEL_OPTIONS)
        self._stub = pb_grpc.OptimizerServiceStub(cast(grpc.Channel, _Frames(self._channel)))
        self._watchdog = _deadlines.Watchdog()
        self._closed = threading.Event()
        self._sharings: weakref.WeakSet[_shared.Sharing] = weakref.WeakSet()

    def close(self) -> None:
        """Ends every call under way and the connection."""
        self._closed.set()
        self._channel.close()
        for sharing in tuple(self._sharings):
            sharing.close()
        self._watchdog.close()

    def watch_over(self, sharing: _shared.Sharing) -> None:
        """Has shared memory of one handle let go of when this is closed."""
        self._sharings.add(sharing)

    def handover_path(self, deadline: _deadlines.Deadline) -> str:
        """Where the server hands shared memory over; empty: nowhere."""
        with self.translated():
            response = self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=deadline.remaining_s)
        return response.handover_path

    def server_info(self, deadline: _deadlines.Deadline) -> sessions.ServerInfo:
        with self.translated():
            response = self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=deadline.remaining_s)
        return convert.server_from_proto(response)

    def create_session(
        self,
        deadline: _deadlines.Deadline,
        *,
        name: str,
        tree: trees.TreeSpec,
        spec: specs.Spec,
        create_key: str,
        seed: int,
        params: _payload.Outgoing,
        extends: sessions.Extension | None = None,
        terms: sessions.Terms,
    ) -> sessions.SessionInfo:
        begin = pb.CreateSessionRequest(
            begin=pb.CreateSessionBegin(
                name=name,
                tree=convert.tree_to_proto(tree),
                spec=convert.spec_to_proto(spec),
                create_key=create_key,
                seed=seed,
                extends=convert.extension_to_proto(extends) if extends else None,
            )
        )
        convert.terms_into(begin.begin, terms)
        with self.translated():
            call = self._stub.CreateSession.future(_frames(begin, params), timeout=deadline.remaining_s)
            with _cancelled_unless_done(call):
                response = call.result()
        return convert.session_from_proto(response.session)

    def get_session(
        self, deadline: _deadlines.Deadline, *, id: str = "", name: str = "", worker: str = ""
    ) -> tuple[sessions.SessionInfo, int]:
        """The session with its tree, and the seq of the worker's last applied push (0: none)."""
        request = pb.GetSessionRequest(session=convert.ref_to_proto(id=id, name=name), worker=worker)
        with self.translated():
            response = self._stub.GetSession(request, timeout=deadline.remaining_s)
        return convert.session_from_proto(response.session), response.worker_seq

    def workers(
        self, deadline: _deadlines.Deadline, *, id: str = "", name: str = ""
    ) -> tuple[sessions.SessionInfo, tuple[sessions.WorkerInfo, ...]]:
        """A session, and the workers that it knows, in the order of their ids."""
        request = pb.GetSessionRequest(session=convert.ref_to_proto(id=id, name=name))
        with self.translated():
            response = self._stub.GetSession(request, timeout=deadline.remaining_s)
        workers = tuple(map(convert.worker_from_proto, response.workers))
        return convert.session_from_proto(response.session), workers

    def join_session(
        self, deadline: _deadlines.Deadline, *, id: str, worker: str, join_key: str
    ) -> tuple[int, int, float]:
        """The seq of the worker's last applied push (0: none), its epoch, and its lease in seconds."""
        request = pb.JoinSessionRequest(session=convert.ref_to_proto(id=id), worker=worker, join_key=join_key)
        with self.translated():
            response = self._stub.JoinSession(request, timeout=deadline.remaining_s)
        return response.worker_seq, response.epoch, response.lease_s

    def heartbeat(self, deadline: _deadlines.Deadline, *, id: str, worker: str, epoch: int) -> None:
        request = pb.HeartbeatRequest(session_id=id, worker=worker, epoch=epoch)
        with self.translated():
            self._stub.Heartbeat(request, timeout=deadline.remaining_s)

    def leave_session(self, deadline: _deadlines.Deadline, *, id: str, worker: str, epoch: int) -> None:
        request = pb.LeaveSessionRequest(session_id=id, worker=worker, epoch=epoch)
        with self.translated():
            self._stub.LeaveSession(request, timeout=deadline.remaining_s)

    def list_sessions(self, deadline: _deadlines.Deadline, page_token: str) -> tuple[list[sessions.SessionInfo], str]:
        """One page, and the token of the next one (empty: none)."""
        request = pb.ListSessionsRequest(page_token=page_token)
        with self.translated():
            response = self._stub.ListSessions(request, timeout=deadline.remaining_s)
        return [convert.session_from_proto(session) for session in response.sessions], response.next_page_token

    def delete_session(self, deadline: _deadlines.Deadline, *, name: str) -> None:
        request = pb.DeleteSessionRequest(session=convert.ref_to_proto(name=name))
        with self.translated():
            self._stub.DeleteSession(request, timeout=deadline.remaining_s)

    def describe_optimizer(self, deadline: _deadlines.Deadline, *, id: str) -> sessions.OptimizerInfo:
        request = pb.DescribeOptimizerRequest(session=convert.ref_to_proto(id=id))
        with self.translated():
            return convert.optimizer_from_proto(self._stub.DescribeOptimizer(request, timeout=deadline.remaining_s))

    def update_hyperparams(
        self,
        deadline: _deadlines.Deadline,
        *,
        id: str,
        incarnation: int,
        hyperparams: Mapping[str, specs.Value],
        from_step: int | None,
    ) -> int:
        """The first step (0-based) that uses the new values."""
        request = pb.UpdateHyperparamsRequest(
            session=convert.ref_to_proto(id=id),
            incarnation=incarnation,
            from_step=from_step,
            hyperparams=[
                pb.Argument(name=name, value=convert.value_to_proto(value)) for name, value in hyperparams.items()
            ],
        )
        with self.translated():
            return self._stub.UpdateHyperparams(request, timeout=deadline.remaining_s).from_step

    def read_params(
        self,
        deadline: _deadlines.Deadline,
        *,
        id: str,
        worker: str,
        epoch: int,
        incoming: _payload.Incoming,
        which: str,
        wanted: rows.Wanted = (),
    ) -> tuple[sessions.SessionInfo, int, list[tensors.Array]]:
        """The session without its tree, the seq of the worker's last applied push, and the newest parameters."""
        request = pb.ReadParamsRequest(
            session=convert.ref_to_proto(id=id),
            worker=worker,
            worker_epoch=epoch,
            which=which,
            rows=convert.wanted_to_proto(wanted),
        )
        with self.translated():
            call = self._stub.ReadParams(request, timeout=deadline.remaining_s)
            with _cancelled_unless_done(call):
                frames = iter(call)
                begin = next(frames, pb.ReadParamsResponse())
                if not begin.HasField("begin"):
                    raise _out_of_order("ReadParams", "begin", f"{begin.WhichOneof('frame')}")
                arrays = _received(frames, incoming, "ReadParams")
        return convert.session_from_proto(begin.begin.session), begin.begin.worker_seq, arrays

    def read_state(
        self, deadline: _deadlines.Deadline, *, id: str
    ) -> tuple[sessions.SessionInfo, list[str], list[tensors.Array]]:
        """The session without its tree, and the names and arrays of its state."""
        request = pb.ReadStateRequest(session=convert.ref_to_proto(id=id))
        with self.translated():
            call = self._stub.ReadState(request, timeout=deadline.remaining_s)
            with _cancelled_unless_done(call):
                frames = iter(call)
                begin = next(frames, pb.ReadStateResponse())
                if not begin.HasField("begin"):
                    raise _out_of_order("ReadState", "begin", f"{begin.WhichOneof('frame')}")
                tree = convert.tree_from_proto(begin.begin.tree)
                arrays = _received(frames, _payload.Incoming(_payload.fresh(tree)), "ReadState")
        return convert.session_from_proto(begin.begin.session), [leaf.name for leaf in tree.leaves], arrays

    def load_state(
        self,
        deadline: _deadlines.Deadline,
        key: sessions.LoadKey,
        tree: trees.TreeSpec,
        arrays: _payload.Outgoing,
    ) -> sessions.SessionInfo:
        """The session in its new incarnation, without its tree."""
        begin = pb.LoadStateRequest(begin=convert.load_to_proto(key, tree))
        with self.translated():
            call = self._stub.LoadState.future(_frames(begin, arrays), timeout=deadline.remaining_s)
            with _cancelled_unless_done(call):
                response = call.result()
        return convert.session_from_proto(response.session)

    def step(
        self,
        deadline: _deadlines.Deadline,
        key: sessions.PushKey,
        options: sessions.PushOptions,
        grads: _payload.Outgoing,
        receive: Receive,
    ) -> tuple[sessions.Ack, list[tensors.Array]]:
        """One push and its reply, in one message each; no arrays where none were asked for."""
        request = _whole(pb.StepRequest(), key, options, grads)
        with self.translated():
            response = self._stub.Step(request, timeout=deadline.remaining_s)
        return _answer(response, options, receive)

    def open_stream(self) -> Stream:
        """A stream for any number of pushes, one at a time."""
        with self.translated():
            return Stream(self, self._stub, self._watchdog)

    @contextlib.contextmanager
    def translated(self, deadline: _deadlines.Deadline | None = None) -> Iterator[None]:
        """Turns what gRPC raises into our errors; a call cancelled after ``deadline`` into DeadlineError."""
        if self._closed.is_set():
            raise _client_closed()
        try:
            yield
        except grpc.RpcError as exc:
            if self._closed.is_set():
                raise _client_closed() from exc
            if exc.code() is grpc.StatusCode.CANCELLED and deadline is not None and not deadline.remaining_s:
                raise errors.DeadlineError("cancelled at the deadline") from exc
            raise _typed(exc) from exc
        except ValueError as exc:  # what gRPC raises where `close` came between
            if self._closed.is_set() and not isinstance(exc, errors.OptwireError):
                raise _client_closed() from exc
            raise


class Stream:
    """A long-lived StreamSteps call. Used by one thread at a time; after any exception it is of no further use.

    gRPC pulls what is to be sent from a thread of its own, one frame at a time, as flow control allows.
    """

    def __init__(self, channel: Channel, stub: pb_grpc.OptimizerServiceStub, watchdog: _deadlines.Watchdog) -> None:
        self._channel = channel
        self._watchdog = watchdog
        pushes: queue.SimpleQueue[Iterator[pb.StreamStepsRequest] | None] = queue.SimpleQueue()
        self._pushes = pushes
        self._call = stub.StreamSteps(frame for push in iter(pushes.get, None) for frame in push)
        # However the call ends, the thread that waits for the next push must end too.
        if not self._call.add_callback(lambda: pushes.put(None)):
            pushes.put(None)
        self._leaving = False  # the server asked us to go
        self._begins: queue.SimpleQueue[pb.StreamStepsRequest] = queue.SimpleQueue()  # of what was staged

    @property
    def is_open(self) -> bool:
        """Whether another push may be tried; a True may be outdated."""
        return self._call.is_active() and not self._leaving

    def push(
        self,
        deadline: _deadlines.Deadline,
        key: sessions.PushKey,
        options: sessions.PushOptions,
        grads: _payload.Outgoing,
        receive: Receive,
        *,
        whole: bool = False,
        staged: _stages.Feed | None = None,
    ) -> tuple[sessions.Ack, list[tensors.Array]]:
        """One push and its reply. Whatever interrupts it cancels the call, and the sending with it.

        Args:
          deadline: of this try.
          key: of the push.
          options: what it says beside its gradients.
          grads: its payload.
          receive: where the reply goes.
          whole: in one message each way; for payloads that fit one.
          staged: what sends the payload, begun with ``stage``; None: nothing was staged.
        """
        with (
            self._channel.translated(deadline),
            _cancelled_unless_done(self._call),
            self._watchdog.watch(deadline, self.cancel),
        ):
            if whole:
                request = pb.StreamStepsRequest()
                _whole(request.whole, key, options, grads)
                self._pushes.put(iter((request,)))
                return _answer(self._next("whole").whole, options, receive)
            begin = pb.StreamStepsRequest(begin=convert.push_to_proto(key, options))
            begin.begin.params_before_ack = True
            if staged is None:
                self._pushes.put(_frames(begin, grads))
            else:
                self._begins.put(begin)
                staged.push(options.absent)
            return self._reply(receive)

    def stage(self, session_id: str, incarnation: int, feed: _stages.Feed) -> None:
        """Sends what ``feed`` gives, for a push that follows; it ends with the call."""
        if not self._call.add_callback(feed.end):
            feed.end()
        stage = pb.StreamStepsRequest(stage=convert.stage_to_proto(session_id, incarnation))
        self._pushes.put(_staged(stage, feed, self._begins))

    def push_shared(
        self,
        deadline: _deadlines.Deadline,
        key: sessions.PushKey,
        options: sessions.PushOptions,
        slot: int,
        digest: sessions.Digest,
    ) -> sessions.Ack:
        """One push whose gradients, and the arrays of its reply, lie in shared memory: a message each way."""
        request = pb.StreamStepsRequest()
        request.whole.begin.CopyFrom(convert.slot_into(convert.push_to_proto(key, options), slot))
        request.whole.digest.CopyFrom(convert.digest_to_proto(digest))
        with (
            self._channel.translated(deadline),
            _cancelled_unless_done(self._call),
            self._watchdog.watch(deadline, self.cancel),
        ):
            self._pushes.put(iter((request,)))
            return convert.ack_from_proto(self._next("whole").whole.ack)

    def close(self) -> None:
        """Tells the server that no push follows, and gives it a moment to end the call."""
        deadline = _deadlines.Deadline(_options.CLOSE_S)
        self._pushes.put(None)
        with contextlib.suppress(grpc.RpcError), self._watchdog.watch(deadline, self.cancel):
            for _ in self._call:
                pass

    def cancel(self) -> None:
        _cancel(self._call)

    def _reply(self, receive: Receive) -> tuple[sessions.Ack, list[tensors.Array]]:
        """A reply in frames. Chunks may come before the ack; without one they are nothing."""
        ack: sessions.Ack | None = None
        incoming: _payload.Incoming | None = None
        while True:
            frame = self._next("chunk", "ack" if ack is None else "end")
            chunk = convert.chunk_of(frame)
            if chunk is not None:
                incoming = incoming or receive(None)
                incoming.write(chunk.offset, chunk.data)
            elif ack is None:
                ack = convert.ack_from_proto(frame.ack)
                incoming = incoming or receive(ack)
                incoming.acked(ack.step)
            else:
                assert incoming is not None, "made with the ack"
                return ack, incoming.finish(frame.end.digest.length)
            del frame, chunk  # or their memory were held while the next one comes

    def _next(self, *expected: str) -> Any:
        """The next frame of one of the kinds ``expected``."""
        for frame in self._call:
            kind = convert.kind_of(frame)
            if kind == "go_away":
                self._leaving = True
                # Before the ack nothing tells whether this push will still be served.
                if "ack" in expected or "whole" in expected:
                    raise errors.UnavailableError(f"the server is leaving this stream: {frame.go_away.reason}")
            elif kind in expected:
                return frame
            else:
                raise _out_of_order("StreamSteps", " or ".join(expected), f"{kind}")
        raise errors.UnavailableError("the server ended the stream")


class _Frames:
    """A channel, for the stub to make its calls on: in streams, frames are written and read as ``convert`` does."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def unary_unary(self, *args: Any, **more: Any) -> Any:
        return self._channel.unary_unary(*args, **more)

    def unary_stream(self, method: str, request_serializer: Any, response_deserializer: Any, **more: Any) -> Any:
        return self._channel.unary_stream(
            method, request_serializer, convert.frame_reader(response_deserializer), **more
        )

    def stream_unary(self, method: str, request_serializer: Any, response_deserializer: Any, **more: Any) -> Any:
        return self._channel.stream_unary(
            method, convert.frame_writer(request_serializer), response_deserializer, **more
        )

    def stream_stream(self, method: str, request_serializer: Any, response_deserializer: Any, **more: Any) -> Any:
        write, read = convert.frame_writer(request_serializer), convert.frame_reader(response_deserializer)
        return self._channel.stream_stream(method, write, read, **more)


def _whole(
    request: pb.StepRequest, key: sessions.PushKey, options: sessions.PushOptions, grads: _payload.Outgoing
) -> pb.StepRequest:
    """Fills the message that is a whole push."""
    data, digest = grads.whole()
    request.begin.CopyFrom(convert.push_to_proto(key, options))
    request.payload = data
    request.digest.CopyFrom(convert.digest_to_proto(digest))
    return request


def _answer(
    response: pb.StepResponse, options: sessions.PushOptions, receive: Receive
) -> tuple[sessions.Ack, list[tensors.Array]]:
    """What a message says that is a whole reply."""
    ack = convert.ack_from_proto(response.ack)
    if options.reply is sessions.ReplyContent.NONE:
        return ack, []
    incoming = receive(ack)
    incoming.write(0, response.payload)
    return ack, incoming.finish(response.digest.length)


def _frames(begin: Frame, payload: _payload.Outgoing) -> Iterator[Any]:
    """Begin, chunks, end; the digest is taken on the way. Chunks are bytes of the wire."""
    _allocator.warm_up()
    kind = type(begin)
    yield begin
    digester, offset = digests.Digester(), 0
    for piece in payload.views():
        for view in piece:
            digester.update(view)
        yield convert.chunk_to_wire(offset, piece)
        offset = digester.length
    yield kind(end=pb.PayloadEnd(digest=convert.digest_to_proto(digester.digest())))


def _staged(
    stage: pb.StreamStepsRequest, feed: _stages.Feed, begins: queue.SimpleQueue[pb.StreamStepsRequest]
) -> Iterator[Any]:
    """Stage, chunks, begin, more chunks, end. Does not hold the call, which ends when nobody does."""
    _allocator.warm_up()
    yield stage
    for offset, views in feed.staged():
        yield convert.chunk_to_wire(offset, views)
    if feed.is_over:  # and so is the call
        return
    yield begins.get()
    for offset, views in feed.rest():
        yield convert.chunk_to_wire(offset, views)
    if not feed.is_over:
        yield pb.StreamStepsRequest(end=pb.PayloadEnd(digest=convert.digest_to_proto(feed.digest())))


def _received(frames: Iterator[Any], incoming: _payload.Incoming, method: str) -> list[tensors.Array]:
    """The arrays that chunks bring, up to the end frame."""
    _allocator.warm_up()
    for frame in frames:
        chunk = convert.chunk_of(frame)
        if chunk is None and convert.kind_of(frame) == "end":
            return incoming.finish(frame.end.digest.length)
        if chunk is None:
            raise _out_of_order(method, "chunk or end", f"{convert.kind_of(frame)}")
        incoming.write(chunk.offset, chunk.data)
        del frame, chunk
    raise _out_of_order(method, "end", "nothing more")


@contextlib.contextmanager
def _cancelled_unless_done(call: grpc.Future[Any] | grpc.Call) -> Iterator[None]:
    """Leaves nothing under way behind an exception, Ctrl-C included."""
    try:
        yield
    except BaseException:
        _cancel(call)
        raise


def _cancel(call: grpc.Future[Any] | grpc.Call) -> None:
    call.cancel()  # untyped in the stubs of a Call alone


def _typed(exc: grpc.RpcError) -> errors.OptwireError:
    """The error of a status, with the server's details where it sent any."""
    metadata: Any = exc.trailing_metadata()  # (key, value) pairs, mistyped in the stubs
    detail = dict(metadata or ()).get(ERROR_KEY)
    error = convert.error_from_proto(exc.code().name, exc.details() or exc.code().name, detail)
    if detail is None and "Concurrent RPC limit" in str(error):  # gRPC's own words, for a call that it did not let in
        error.retry_after_s = _options.PAUSE_FIRST_S
    return error


def _out_of_order(method: str, expected: str, got: str) -> errors.InternalError:
    return errors.InternalError(f"{method}: the server answered {got}, expected {expected}", expected=expected, got=got)


def _client_closed() -> errors.DetachedError:
    return errors.DetachedError("the client was closed")
