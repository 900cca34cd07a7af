"""The service itself: one short method an RPC, messages to calls and back."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import grpc
import numpy as np

import optwire_server
from optwire_proto import aggregations, codecs, convert, errors, limits, sessions
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import optimizer_pb2_grpc as pb_grpc
from optwire_proto.v1 import tensor_pb2 as tensor_pb
from optwire_server import live, waiting
from optwire_server import registry as registries
from optwire_server.config import ServerConfig
from optwire_server.engine import departure
from optwire_server.engine import engine as engines
from optwire_server.transport import frames, stages, streams


class Servicer(pb_grpc.OptimizerServiceServicer):
    """Serves ``optwire.v1.OptimizerService``."""

    def __init__(
        self,
        registry: registries.Registry,
        engine: engines.Engine,
        table: streams.StreamTable,
        config: ServerConfig,
        handover_path: str = "",
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._streams = table
        self._config = config
        self._handover_path = handover_path

    def register(self, server: grpc.Server) -> None:
        """Adds the service to a server that has not started."""
        pb_grpc.add_OptimizerServiceServicer_to_server(self, server)

    def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        versions, devices = self._engine.describe()
        info = sessions.ServerInfo(
            version=optwire_server.__version__,
            library_versions={**versions, "grpcio": grpc.__version__},
            devices=devices,
            limits={
                "chunk_bytes_max": limits.CHUNK_BYTES_MAX,
                "unary_payload_bytes_max": limits.UNARY_PAYLOAD_BYTES_MAX,
                "control_bytes_max": limits.MESSAGE_BYTES_MAX,
                "leaves_max": self._config.leaves_max,
                "sessions_max": self._config.sessions_max,
                "streams_max": self._config.streams_max,
                "landing_bytes_max": self._config.landing_bytes_max,
            },
            catalogue=self._engine.catalogue,
            features=(
                "stream",
                "unary",
                *(mode for mode in aggregations.Mode if mode is not aggregations.Mode.SINGLE),
                "rows",
                *(f"codec.{kind.name.lower()}" for kind in codecs.Kind if kind is not codecs.Kind.RAW),
                *(("shared_memory",) if self._handover_path else ()),
                *(("programs",) if self._config.allow_programs else ()),
            ),
            handover_path=self._handover_path,
        )
        return convert.server_to_proto(info)

    def CreateSession(
        self, request_iterator: Iterator[pb.CreateSessionRequest], context: grpc.ServicerContext
    ) -> pb.CreateSessionResponse:
        with self._streams.open(context.cancel) as stream:
            begin = frames.first(request_iterator)
            convert.check_begin(begin)
            _check_answerable(begin)
            tree, spec = convert.tree_from_proto(begin.tree), convert.spec_from_proto(begin.spec)
            key, seed, extends = begin.create_key, begin.seed, convert.extension_from_proto(begin)
            creations = self._registry.creations
            terms = convert.terms_from_proto(begin)
            asked = creations.creating(begin.name, tree, spec, key, seed, extends=extends, terms=terms)
            with stream.busy(), asked as creation:
                digest = frames.land(request_iterator, creation.landing, stream)
                info = creations.create(creation, digest)
        return pb.CreateSessionResponse(session=_without_tree(info))

    def GetSession(self, request: pb.GetSessionRequest, context: grpc.ServicerContext) -> pb.GetSessionResponse:
        id_, name = convert.ref_from_proto(request.session)
        info, seq = self._registry.info(id_=id_, name=name, worker=request.worker)
        workers = map(convert.worker_to_proto, self._registry.workers(id_=info.id))
        return pb.GetSessionResponse(session=convert.session_to_proto(info), worker_seq=seq, workers=workers)

    def ListSessions(self, request: pb.ListSessionsRequest, context: grpc.ServicerContext) -> pb.ListSessionsResponse:
        if request.page_size > 1000:
            raise errors.InvalidArgumentError(
                f"page_size: {request.page_size}, expected at most 1000",
                subject="page_size",
                got=str(request.page_size),
            )
        page, token = self._registry.list(request.page_size or 100, request.page_token)
        response = pb.ListSessionsResponse(next_page_token=token)
        size = 0
        for info in page:
            session = convert.session_to_proto(info)
            size += session.ByteSize()
            if size > limits.MESSAGE_BYTES_MAX // 2 and response.sessions:  # the page ends early
                response.next_page_token = response.sessions[-1].name
                break
            response.sessions.append(session)
        return response

    def DeleteSession(
        self, request: pb.DeleteSessionRequest, context: grpc.ServicerContext
    ) -> pb.DeleteSessionResponse:
        id_, name = convert.ref_from_proto(request.session)
        return pb.DeleteSessionResponse(session=convert.session_to_proto(self._registry.delete(id_=id_, name=name)))

    def DescribeOptimizer(
        self, request: pb.DescribeOptimizerRequest, context: grpc.ServicerContext
    ) -> pb.DescribeOptimizerResponse:
        id_, name = convert.ref_from_proto(request.session)
        described = convert.optimizer_to_proto(self._registry.describe(id_=id_, name=name))
        _check_size("optimizer", described.ByteSize(), "fewer groups or masks")
        return described

    def UpdateHyperparams(
        self, request: pb.UpdateHyperparamsRequest, context: grpc.ServicerContext
    ) -> pb.UpdateHyperparamsResponse:
        id_, name = convert.ref_from_proto(request.session)
        info, step = self._registry.set_hyperparams(
            convert.hyperparams_from_proto(request),
            id_=id_,
            name=name,
            incarnation=request.incarnation,
            from_step=request.from_step if request.HasField("from_step") else None,
        )
        return pb.UpdateHyperparamsResponse(session=convert.session_to_proto(info), from_step=step)

    def JoinSession(self, request: pb.JoinSessionRequest, context: grpc.ServicerContext) -> pb.JoinSessionResponse:
        id_, name = convert.ref_from_proto(request.session)
        info, seq, epoch, lease_s = self._registry.join(request.worker, request.join_key, id_=id_, name=name)
        session = _without_tree(info)
        return pb.JoinSessionResponse(session=session, worker_seq=seq, epoch=epoch, lease_s=lease_s)

    def Heartbeat(self, request: pb.HeartbeatRequest, context: grpc.ServicerContext) -> pb.HeartbeatResponse:
        id_ = sessions.check_id(request.session_id, "session_id")
        step, incarnation, awaited = self._registry.beat(id_, request.worker, request.epoch)
        return pb.HeartbeatResponse(step=step, incarnation=incarnation, awaited=awaited)

    def LeaveSession(self, request: pb.LeaveSessionRequest, context: grpc.ServicerContext) -> pb.LeaveSessionResponse:
        id_ = sessions.check_id(request.session_id, "session_id")
        self._registry.leave(id_, request.worker, request.epoch)
        return pb.LeaveSessionResponse()

    def ReadParams(
        self, request: pb.ReadParamsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ReadParamsResponse]:
        convert.check_read(request)
        id_, name = convert.ref_from_proto(request.session)
        with (
            self._streams.open(context.cancel) as stream,
            stream.busy(),
            self._registry.reading(
                id_=id_,
                name=name,
                worker=request.worker,
                epoch=request.worker_epoch,
                which=request.which,
                wanted=convert.wanted_from_proto(request),
            ) as read,
            stream.transferring(),
        ):
            begin = pb.ParamsBegin(session=_without_tree(read.info), worker_seq=read.worker_seq)
            yield pb.ReadParamsResponse(begin=begin)
            yield from _payload(read.params, pb.ReadParamsResponse, stream)

    def ReadState(self, request: pb.ReadStateRequest, context: grpc.ServicerContext) -> Iterator[pb.ReadStateResponse]:
        id_, name = convert.ref_from_proto(request.session)
        with (
            self._streams.open(context.cancel) as stream,
            stream.busy(),
            self._registry.states.reading(id_=id_, name=name) as read,
            stream.transferring(),
        ):
            begin = pb.StateBegin(session=_without_tree(read.info), tree=convert.tree_to_proto(read.tree))
            _check_size("state's names", begin.ByteSize(), "shorter names or fewer leaves")
            yield pb.ReadStateResponse(begin=begin)
            yield from _payload(read.arrays, pb.ReadStateResponse, stream)

    def LoadState(
        self, request_iterator: Iterator[pb.LoadStateRequest], context: grpc.ServicerContext
    ) -> pb.LoadStateResponse:
        with self._streams.open(context.cancel) as stream:
            key, tree = convert.load_from_proto(frames.first(request_iterator))
            states = self._registry.states
            with stream.busy(), states.loading(key, tree) as load:
                info = states.load(load, frames.land(request_iterator, load.landing, stream))
        return pb.LoadStateResponse(session=_without_tree(info))

    def Step(self, request: pb.StepRequest, context: grpc.ServicerContext) -> pb.StepResponse:
        return self._whole(request, self._streams.waiting(context.cancel), context)

    def _whole(
        self, request: pb.StepRequest, wait: contextlib.AbstractContextManager[None], context: grpc.ServicerContext
    ) -> pb.StepResponse:
        """A push and its reply in one message each."""
        key, options = convert.push_from_proto(request.begin)
        if not request.HasField("digest"):
            raise errors.PayloadError("push without a digest", subject="digest", expected="a digest", got="nothing")
        slot = convert.slot_from_proto(request.begin)
        most = 0 if slot else limits.UNARY_PAYLOAD_BYTES_MAX
        if len(request.payload) > most:
            raise errors.LimitError(
                f"payload of {len(request.payload)} bytes in one message, expected at most {most}; send it in chunks",
                subject="payload",
                expected=f"at most {most} bytes",
                got=str(len(request.payload)),
            )
        with self._registry.pushing(key, options, payload_bytes_max=most or None, slot=slot) as push:
            if request.payload:
                push.landing.write(0, request.payload)
            digest = convert.digest_from_proto(request.digest)
            reply = self._pushed(push, digest, wait, context)
            payload = b"".join(map(b"".join, codecs.payload_views(reply.codec, reply.params)))
        length = tensor_pb.PayloadDigest(length=len(payload))
        return pb.StepResponse(ack=convert.ack_to_proto(reply.ack), payload=payload, digest=length)

    def StreamSteps(
        self, request_iterator: Iterator[pb.StreamStepsRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.StreamStepsResponse]:
        with self._streams.open(context.cancel) as stream:
            while (start := next(request_iterator, None)) is not None:
                if convert.kind_of(start) == "whole":
                    with stream.busy():
                        whole = self._whole(start.whole, stream.waiting(), context)
                        with stream.transferring():
                            yield pb.StreamStepsResponse(whole=whole)
                else:
                    yield from self._framed(start, request_iterator, stream, context)
                if self._streams.draining:
                    yield pb.StreamStepsResponse(go_away=pb.GoAway(reason="DRAINING"))
                    return

    def _framed(
        self,
        start: pb.StreamStepsRequest,
        messages: Iterator[pb.StreamStepsRequest],
        stream: streams.Stream,
        context: grpc.ServicerContext,
    ) -> Iterator[Any]:
        """A push and its reply in frames."""
        begun = stages.begun(start, messages, self._registry, stream, context.cancel)
        with begun as (begin, stage), stream.busy():
            key, options = convert.push_from_proto(begin)
            slot, departs = convert.slot_from_proto(begin), begin.params_before_ack
            with self._registry.pushing(key, options, stage=stage, slot=slot, departs=departs) as push:
                digest = frames.end(messages, stream) if slot else frames.land(messages, push.landing, stream)
                if push.departure is not None:
                    yield from self._departing(push, push.departure, digest, stream)
                    return
                reply = self._pushed(push, digest, stream.waiting(), context)
                # The landing stays lent until the reply is out: its bytes stand for the reply's.
                with stream.transferring():
                    yield pb.StreamStepsResponse(ack=convert.ack_to_proto(reply.ack))
                    yield from _payload(reply.params, pb.StreamStepsResponse, stream, reply.codec)

    def _departing(
        self, push: live.Push, out: departure.Departure, digest: sessions.Digest, stream: streams.Stream
    ) -> Iterator[Any]:
        """Applies a push, and sends its parameters meanwhile; the ack as soon as it is applied.

        On a thread of its own, which waits for no client. That is over when this is, even if the client has gone: until
        then the landing is read.
        """
        reply: live.Reply | None = None
        with concurrent.futures.ThreadPoolExecutor(1, "optwire-update") as thread:
            applied = thread.submit(self._registry.push, push, digest)
            applied.add_done_callback(lambda _: out.end())
            for chunk in _chunks(out.segments(), stream, push.session.params_codec):
                with stream.transferring():
                    yield chunk
                    if reply is None and applied.done():
                        reply = _alone(applied.result())
                        yield pb.StreamStepsResponse(ack=convert.ack_to_proto(reply.ack))
            with stream.transferring():
                if reply is None:
                    reply = _alone(applied.result())
                    yield pb.StreamStepsResponse(ack=convert.ack_to_proto(reply.ack))
                if reply.params:  # there was no update: it is a retry
                    yield from _payload(reply.params, pb.StreamStepsResponse, stream, reply.codec)
                else:
                    yield pb.StreamStepsResponse(end=_end(reply.ack.payload_bytes))

    def _pushed(
        self,
        push: live.Push,
        digest: sessions.Digest,
        wait: contextlib.AbstractContextManager[None],
        context: grpc.ServicerContext,
    ) -> live.Reply:
        """Applies a push, and waits inside ``wait`` where others must push first."""
        outcome = self._registry.push(push, digest)
        if isinstance(outcome, waiting.Waiting):
            with wait:
                return self._registry.wait(push, outcome, context.is_active)
        return outcome

    def SnapshotSession(
        self, request: pb.SnapshotSessionRequest, context: grpc.ServicerContext
    ) -> pb.SnapshotSessionResponse:
        raise _not_served("SnapshotSession")

    def ForkSession(self, request: pb.ForkSessionRequest, context: grpc.ServicerContext) -> pb.ForkSessionResponse:
        raise _not_served("ForkSession")

    def RollbackSession(
        self, request: pb.RollbackSessionRequest, context: grpc.ServicerContext
    ) -> pb.RollbackSessionResponse:
        raise _not_served("RollbackSession")


def _alone(outcome: live.Reply | waiting.Waiting) -> live.Reply:
    """What came of a push that is a step by itself."""
    assert isinstance(outcome, live.Reply), "a push that waits for others has no departure"
    return outcome


def _payload(
    params: list[np.ndarray[Any, Any]],
    response: Callable[..., Any],
    stream: streams.Stream,
    codec: codecs.Codec = codecs.RAW,
) -> Iterator[Any]:
    """Chunks and the end of the parameters; empties ``params``."""
    length = yield from _chunks(params, stream, codec)
    yield response(end=_end(length))


def _chunks(
    params: Iterable[np.ndarray[Any, Any]], stream: streams.Stream, codec: codecs.Codec
) -> Generator[Any, None, int]:
    """Chunks of parameters, which may have to be waited for; a list is emptied. Returns their length in bytes."""
    offset = 0
    for piece in codecs.payload_views(codec, params):
        length = sum(view.nbytes for view in piece)
        yield convert.chunk_to_wire(offset, piece)
        offset += length
        stream.progressed()
    return offset


def _end(length: int) -> pb.PayloadEnd:
    return pb.PayloadEnd(digest=tensor_pb.PayloadDigest(length=length))


def _without_tree(info: sessions.SessionInfo) -> pb.Session:
    return convert.session_to_proto(dataclasses.replace(info, tree=None, changes=()))


def _check_answerable(begin: pb.CreateSessionBegin) -> None:
    """Raises LimitError where a session could be created, but GetSession could not describe it in one message."""
    size = begin.tree.ByteSize() + begin.spec.ByteSize()
    _check_size("tree and spec", size, "shorter names or fewer leaves")


def _check_size(what: str, size: int, advice: str) -> None:
    most = limits.MESSAGE_BYTES_MAX - limits.MIB  # room for the changes of hyperparameters, and what is around
    if size > most:
        raise errors.LimitError(
            f"{what}: {size} bytes as a message, expected at most {most}; use {advice}",
            subject=what.partition(" ")[0],
            expected=f"at most {most} bytes",
            got=str(size),
        )


def _not_served(method: str) -> errors.UnsupportedError:
    return errors.UnsupportedError(f"{method} is not served by this version", subject=method)
