"""The protocol by hand: frames made one by one, right or wrong, without the Python client in between."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
import numpy as np

from optwire_proto import convert, digests, specs, trees
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import optimizer_pb2_grpc as pb_grpc
from optwire_proto.v1 import tensor_pb2 as tensor_pb
from optwire_server import testing

SERVICE = pb.DESCRIPTOR.services_by_name["OptimizerService"]
WORKER = "a" * 32
TIMEOUT_S = 20.0

Params = dict[str, np.ndarray]


def digest(payload: bytes, **changes: Any) -> tensor_pb.PayloadDigest:
    """The digest of a payload, with changes that make it wrong."""
    made = convert.digest_to_proto(digests.digest(payload))
    made.MergeFrom(tensor_pb.PayloadDigest(**changes))
    return made


def payload_of(tree: Any) -> bytes:
    return b"".join(array.tobytes() for array in trees.flatten(tree).arrays)


def chunks(payload: bytes, size: int) -> Iterator[tensor_pb.Chunk]:
    for offset in range(0, len(payload), size):
        yield tensor_pb.Chunk(offset=offset, data=payload[offset : offset + size])


def until(true: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Waits for a condition by asking again and again."""
    end_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.002)


def idle(server: Any) -> Callable[[], bool]:
    """Whether a server in this process holds no landing buffer and no stream."""
    return lambda: server.registry._landings.lent_bytes == 0 and len(server.streams) == 0


@contextlib.contextmanager
def served(**config: Any) -> Iterator[testing.Serving]:
    """A server of its own for some tests, which has everything back when they are over."""
    with testing.serve(**config) as serving:
        yield serving
        until(idle(serving.server), "landing buffers and streams given back")


@dataclasses.dataclass
class Failure:
    """How a call failed."""

    code: str
    message: str
    detail: pb.ErrorDetail | None

    @classmethod
    def of(cls, call: Callable[[], object]) -> Failure | None:
        """What ``call`` fails with; None if it does not."""
        try:
            call()
        except grpc.RpcError as exc:
            metadata = dict(exc.trailing_metadata() or ())
            found = metadata.get("optwire-error-bin")
            return cls(exc.code().name, exc.details() or "", pb.ErrorDetail.FromString(found) if found else None)
        return None


class Peer:
    """A client that sends what it is told to."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])
        self.stub = pb_grpc.OptimizerServiceStub(self.channel)

    def close(self) -> None:
        self.channel.close()

    def create(self, params: Any, spec: specs.Spec, name: str = "", key: str = "") -> pb.Session:
        payload = payload_of(params)
        begin = pb.CreateSessionBegin(
            name=name,
            tree=convert.tree_to_proto(trees.flatten(params).spec),
            spec=convert.spec_to_proto(spec),
            create_key=key or secrets.token_hex(16),
        )
        return self.create_from(begin, chunks(payload, 2**20), pb.PayloadEnd(digest=digest(payload)))

    def create_from(self, *frames: Any) -> pb.Session:
        """Creates a session from frames as they are; an iterable stands for its members."""
        stream = (pb.CreateSessionRequest(**{_field(frame): frame}) for frame in _flat(frames))
        return self.stub.CreateSession(stream, timeout=TIMEOUT_S).session

    def step(self, begin: pb.PushBegin, payload: bytes, **changes: Any) -> pb.StepResponse:
        return self.stub.Step(whole(begin, payload, **changes), timeout=TIMEOUT_S)

    def stream(self, *frames: Any) -> list[pb.StreamStepsResponse]:
        """Sends frames as they are on one stream, and returns all that comes back."""
        requests = (pb.StreamStepsRequest(**{_field(frame): frame}) for frame in _flat(frames))
        return list(self.stub.StreamSteps(requests, timeout=TIMEOUT_S))

    def read(self, name: str) -> tuple[int, bytes]:
        """Step and parameters of a session."""
        frames = list(self.stub.ReadParams(pb.ReadParamsRequest(session=named(name)), timeout=TIMEOUT_S))
        payload = b"".join(frame.chunk.data for frame in frames)
        assert frames[-1].end.digest.length == len(payload)
        return frames[0].begin.session.step, payload

    def raw(self, method: str, *messages: bytes) -> list[bytes]:
        """Calls a method of any service with bytes as they are; returns what comes back, undecoded."""
        found = SERVICE.methods_by_name.get(method.rpartition("/")[2]) if SERVICE.full_name in method else None
        up, down = (found.client_streaming, found.server_streaming) if found else (False, False)
        call = getattr(self.channel, f"{'stream' if up else 'unary'}_{'stream' if down else 'unary'}")(method)
        answer = call(iter(messages) if up else b"".join(messages), timeout=TIMEOUT_S)
        return list(answer) if down else [answer]


def named(name: str) -> pb.SessionRef:
    return pb.SessionRef(name=name)


def push(session: pb.Session, seq: int, base_step: int, worker: str = WORKER, **changes: Any) -> pb.PushBegin:
    key = {"session_id": session.id, "incarnation": session.incarnation, "worker": worker, "seq": seq}
    return pb.PushBegin(key=pb.PushKey(**key, base_step=base_step), **changes)


def upload(begin: pb.PushBegin, payload: bytes, size: int = 2**20) -> list[Any]:
    """All frames of a push that is right."""
    return [begin, *chunks(payload, size), pb.PayloadEnd(digest=digest(payload))]


def whole(begin: pb.PushBegin, payload: bytes, **changes: Any) -> pb.StepRequest:
    """A push in one frame."""
    return pb.StepRequest(**{"begin": begin, "payload": payload, "digest": digest(payload)} | changes)


def params_of(frames: list[pb.StreamStepsResponse]) -> bytes:
    """The payload of one reply, its length checked."""
    payload = b"".join(frame.chunk.data for frame in frames if frame.HasField("chunk"))
    assert frames[-1].end.digest.length == len(payload)
    return payload


_FIELDS = {
    pb.PushStage: "stage",
    pb.PushBegin: "begin",
    pb.StepRequest: "whole",
    pb.CreateSessionBegin: "begin",
    tensor_pb.Chunk: "chunk",
    pb.PayloadEnd: "end",
}


def _field(frame: Any) -> str:
    return _FIELDS[type(frame)]


def _flat(frames: Iterable[Any]) -> Iterator[Any]:
    for frame in frames:
        if type(frame) in _FIELDS:
            yield frame
        else:
            yield from frame
