"""Requests about pushes that a server must refuse."""

from __future__ import annotations

import math
from typing import Any

from tests.e2e import wire
from tests.e2e.bad_sessions import chunk, refused
from tests.e2e.bench import ADAM, PARAMS, PAYLOAD, STEPS, Bench

from optwire_proto.v1 import optimizer_pb2 as pb

INVALID = "INVALID_ARGUMENT"
NOBODY = "0" * 32
END = pb.PayloadEnd(digest=wire.digest(PAYLOAD))
ALL = chunk(0, PAYLOAD)


def wrong_key(name: str, code: str, reason: str, fragment: str, **key: Any) -> list[Any]:
    """The same key on all roads that a push may take."""
    return [
        refused(
            f"{name}, whole", code, reason, fragment, lambda b: b.peer.stream(wire.whole(b.begin(key=key), PAYLOAD))
        ),
        refused(f"{name}, unary", code, reason, fragment, lambda b: b.peer.step(b.begin(key=key), PAYLOAD)),
        refused(f"{name}, streamed", code, reason, fragment, lambda b: b.peer.stream(b.begin(key=key), ALL, END)),
    ]


def wrong_bytes(name: str, fragment: str, *frames: Any, code: str = INVALID, reason: str = "INVALID_PAYLOAD") -> Any:
    return refused(name, code, reason, fragment, lambda b: b.peer.stream(b.begin(), *frames))


def argument(name: str, value: float | str) -> pb.Argument:
    return pb.Argument(name=name, value=pb.Value(**{"text" if isinstance(value, str) else "number": value}))


def wrong_option(name: str, fragment: str, reason: str = "INVALID_ARGUMENT", **options: Any) -> list[Any]:
    """What a push says beside its gradients, on all roads that it may take."""
    return [
        refused(
            f"{name}, whole",
            INVALID,
            reason,
            fragment,
            lambda b: b.peer.stream(wire.whole(b.begin(**options), PAYLOAD)),
        ),
        refused(f"{name}, unary", INVALID, reason, fragment, lambda b: b.peer.step(b.begin(**options), PAYLOAD)),
        refused(f"{name}, streamed", INVALID, reason, fragment, lambda b: b.peer.stream(b.begin(**options), ALL, END)),
    ]


def push_to_deleted(bench: Bench) -> object:
    session = bench.peer.create(PARAMS, ADAM, "gone")
    bench.peer.stub.DeleteSession(pb.DeleteSessionRequest(session=wire.named("gone")), timeout=wire.TIMEOUT_S)
    return bench.peer.step(wire.push(session, 1, 0), PAYLOAD)


PUSHES = [
    *wrong_key(
        "a session nobody knows", "NOT_FOUND", "SESSION_NOT_FOUND", "is not held by this server", session_id=NOBODY
    ),
    *wrong_key(
        "a session id that is a name", INVALID, "INVALID_ARGUMENT", "session_id 'reference'", session_id="reference"
    ),
    *wrong_key("a session id that climbs", INVALID, "INVALID_ARGUMENT", "session_id '../../x'", session_id="../../x"),
    *wrong_key("an empty session id", INVALID, "INVALID_ARGUMENT", "session_id '': expected 32", session_id=""),
    *wrong_key("an empty worker", INVALID, "INVALID_ARGUMENT", "worker '': expected 32 lower-case", worker=""),
    *wrong_key("a worker with a name", INVALID, "INVALID_ARGUMENT", "worker 'w0'", worker="w0"),
    *wrong_key("a worker in capitals", INVALID, "INVALID_ARGUMENT", "worker", worker="A" * 32),
    *wrong_key("a worker in other digits", INVALID, "INVALID_ARGUMENT", "worker", worker="٣" * 32),
    *wrong_key("seq 0", INVALID, "INVALID_ARGUMENT", "push.key.seq: 0, expected 1 or more", seq=0),
    *wrong_key("an old seq", "ABORTED", "STALE_PUSH", "older than its last applied push, 3", seq=1),
    *wrong_key(
        "a seq that skips one", "FAILED_PRECONDITION", "FUTURE_PUSH", "push 5 of this worker, expected 4", seq=5
    ),
    *wrong_key("the greatest seq", "FAILED_PRECONDITION", "FUTURE_PUSH", "expected 4", seq=2**64 - 1),
    *wrong_key("an old step", "ABORTED", "STALE_STEP", "gradients of step 1, but the session is at 3", base_step=1),
    *wrong_key("a future step", "FAILED_PRECONDITION", "FUTURE_STEP", "gradients of step 4, but", base_step=STEPS + 1),
    *wrong_key(
        "the greatest step", "FAILED_PRECONDITION", "FUTURE_STEP", "gradients of step 184467", base_step=2**64 - 1
    ),
    *wrong_key(
        "another incarnation", "FAILED_PRECONDITION", "WRONG_INCARNATION", "incarnation 2, expected 1", incarnation=2
    ),
    *wrong_key(
        "no incarnation", "FAILED_PRECONDITION", "WRONG_INCARNATION", "incarnation 0, expected 1", incarnation=0
    ),
    *wrong_key("a worker epoch that nobody was given", "FAILED_PRECONDITION", "REPLACED", "of epoch 1", worker_epoch=1),
    *wrong_option("a weight that is not a number", "push.weight: nan, expected", weight=math.nan),
    *wrong_option("a negative weight", "push.weight: -1.0, expected", weight=-1.0),
    *wrong_option("an infinite weight", "push.weight: inf, expected", weight=math.inf),
    *wrong_option("an unknown hyperparameter", "'b3' is none of this session's", hyperparams=[argument("b3", 0.5)]),
    *wrong_option("a hyperparameter twice", "a name twice", hyperparams=[argument("b1", 0.5)] * 2),
    *wrong_option("a hyperparameter that is text", "expected a finite number", hyperparams=[argument("b1", "0.5")]),
    *wrong_option("an infinite rate", "expected a finite number", hyperparams=[argument("learning_rate", math.inf)]),
    *wrong_option("a negative rate", "step_size", "INVALID_SPEC", hyperparams=[argument("learning_rate", -1.0)]),
    *wrong_option("an absent leaf", "needs every gradient; put per_leaf(...) around", absent_leaves=[0]),
    *wrong_option("a leaf absent twice", "not ascending", absent_leaves=[0, 0]),
    *wrong_option("absent leaves out of order", "not ascending", absent_leaves=[1, 0]),
    *wrong_option("every leaf absent", "all 2 leaves, expected a gradient for one", absent_leaves=[0, 1]),
    *wrong_option("an absent leaf beyond the last", "position 2, expected positions below 2", absent_leaves=[0, 2, 9]),
    *wrong_option("the greatest absent leaf", "expected positions below 2", absent_leaves=[2**32 - 1]),
    refused("a deleted session", "NOT_FOUND", "SESSION_NOT_FOUND", "is not held by this server", push_to_deleted),
    refused(
        "a retry with other bytes",
        "ABORTED",
        "DIVERGENT_RETRY",
        "push 3 of this worker was applied as step 3 with other bytes",
        lambda b: b.peer.step(b.begin(key={"seq": 3, "base_step": 2}), bytes(60)),
    ),
    refused(
        "a streamed retry with other bytes",
        "ABORTED",
        "DIVERGENT_RETRY",
        "was applied as step 3",
        lambda b: b.peer.stream(
            b.begin(key={"seq": 3, "base_step": 2}), chunk(0, bytes(60)), pb.PayloadEnd(digest=wire.digest(bytes(60)))
        ),
    ),
    refused(
        "a push without a begin",
        INVALID,
        "INVALID_ARGUMENT",
        "seq: 0",
        lambda b: b.peer.stub.Step(pb.StepRequest(), timeout=5),
    ),
    refused(
        "a push without a digest",
        INVALID,
        "INVALID_PAYLOAD",
        "without a digest",
        lambda b: b.peer.step(b.begin(), PAYLOAD, digest=None),
    ),
    refused(
        "too few gradients",
        INVALID,
        "INVALID_PAYLOAD",
        "payload ended after 56 of 60 bytes",
        lambda b: b.peer.step(b.begin(), PAYLOAD[:-4]),
    ),
    refused(
        "too many gradients",
        INVALID,
        "INVALID_PAYLOAD",
        "goes past the end of the payload, 60",
        lambda b: b.peer.step(b.begin(), PAYLOAD + b"1234"),
    ),
    refused(
        "no gradients",
        INVALID,
        "INVALID_PAYLOAD",
        "payload ended after 0 of 60 bytes",
        lambda b: b.peer.step(b.begin(), b""),
    ),
    refused(
        "a wrong digest",
        INVALID,
        "INVALID_PAYLOAD",
        "payload damaged",
        lambda b: b.peer.step(b.begin(), PAYLOAD, digest=wire.digest(PAYLOAD[::-1])),
    ),
    refused(
        "a wrong length",
        INVALID,
        "INVALID_PAYLOAD",
        "digest",
        lambda b: b.peer.step(b.begin(), PAYLOAD, digest=wire.digest(PAYLOAD, length=61)),
    ),
    refused(
        "a unary payload over the limit",
        "RESOURCE_EXHAUSTED",
        "LIMIT_EXCEEDED",
        "payload of 2097153 bytes in one message",
        lambda b: b.peer.step(b.begin(), bytes(2**21 + 1)),
    ),
    refused(
        "a message over 4 MiB",
        "RESOURCE_EXHAUSTED",
        "",
        "larger than max",
        lambda b: b.peer.step(b.begin(), bytes(2**22)),
    ),
    refused(
        "a chunk that makes a message over 4 MiB",
        "RESOURCE_EXHAUSTED",
        "",
        "larger than max",
        lambda b: b.peer.stream(b.begin(), chunk(0, bytes(2**22))),
    ),
    *(
        refused(f"{name}, whole on a stream", code, reason, fragment, call)
        for name, code, reason, fragment, call in (
            ("no begin", INVALID, "INVALID_ARGUMENT", "seq: 0", lambda b: b.peer.stream(pb.StepRequest())),
            (
                "no digest",
                INVALID,
                "INVALID_PAYLOAD",
                "without a digest",
                lambda b: b.peer.stream(wire.whole(b.begin(), PAYLOAD, digest=None)),
            ),
            (
                "too few gradients",
                INVALID,
                "INVALID_PAYLOAD",
                "payload ended after 56 of 60 bytes",
                lambda b: b.peer.stream(wire.whole(b.begin(), PAYLOAD[:-4])),
            ),
            (
                "a wrong digest",
                INVALID,
                "INVALID_PAYLOAD",
                "payload damaged",
                lambda b: b.peer.stream(wire.whole(b.begin(), PAYLOAD, digest=wire.digest(PAYLOAD[::-1]))),
            ),
            (
                "a payload over the limit",
                "RESOURCE_EXHAUSTED",
                "LIMIT_EXCEEDED",
                "payload of 2097153 bytes in one message",
                lambda b: b.peer.stream(wire.whole(b.begin(), bytes(2**21 + 1))),
            ),
            (
                "a whole push inside another",
                INVALID,
                "MALFORMED_REQUEST",
                "frame 'whole', expected 'end'",
                lambda b: b.peer.stream(b.begin(), ALL, wire.whole(b.begin(), PAYLOAD)),
            ),
        )
    ),
    refused("a creation over 4 MiB", "RESOURCE_EXHAUSTED", "", "larger than max", lambda b: b.create(name="x" * 2**22)),
]

STREAMS = [
    wrong_bytes("a gap", "leaves a gap: expected offset 20", chunk(0, PAYLOAD[:20]), chunk(24, PAYLOAD[24:]), END),
    wrong_bytes("an overlap", "overlaps: expected offset 20", chunk(0, PAYLOAD[:20]), chunk(19, PAYLOAD[19:]), END),
    wrong_bytes(
        "chunks in reverse", "leaves a gap: expected offset 0", chunk(20, PAYLOAD[20:]), chunk(0, PAYLOAD[:20]), END
    ),
    wrong_bytes(
        "a chunk that comes twice", "overlaps: expected offset 20", chunk(0, PAYLOAD[:20]), chunk(0, PAYLOAD[:20]), END
    ),
    wrong_bytes("a chunk past the end", "goes past the end", ALL, chunk(60, b"1"), END),
    wrong_bytes("an offset near 2^64", "leaves a gap", chunk(2**64 - 1, b"12"), END),
    wrong_bytes("an empty chunk, streamed", "is empty", chunk(0, b""), END),
    wrong_bytes("an empty chunk at the end", "is empty", ALL, chunk(60, b""), END),
    wrong_bytes("an end too early", "payload ended after 20 of 60 bytes", chunk(0, PAYLOAD[:20]), END),
    wrong_bytes("no chunks", "payload ended after 0 of 60 bytes", END),
    wrong_bytes("a stream that stops short", "the stream ended before the payload did", chunk(0, PAYLOAD[:20])),
    wrong_bytes("a stream without an end", "the stream ended before the payload did", ALL),
    wrong_bytes("a begin and nothing else", "the stream ended before the payload did"),
    wrong_bytes("an end that lacks a digest", "without a digest", ALL, pb.PayloadEnd()),
    wrong_bytes("a wrong digest, streamed", "payload damaged", ALL, pb.PayloadEnd(digest=wire.digest(PAYLOAD[::-1]))),
    wrong_bytes(
        "a wrong length, streamed", "payload damaged", ALL, pb.PayloadEnd(digest=wire.digest(PAYLOAD, length=1))
    ),
    wrong_bytes("flipped bits", "payload damaged", chunk(0, bytes(byte ^ 1 for byte in PAYLOAD)), END),
    wrong_bytes(
        "a SHA-256, streamed",
        "sha256",
        ALL,
        pb.PayloadEnd(digest=wire.digest(PAYLOAD, sha256=b"1" * 32)),
        code="UNIMPLEMENTED",
        reason="NOT_SERVED",
    ),
    wrong_bytes(
        "a shard, streamed",
        "chunk.shard: 1",
        chunk(0, PAYLOAD, shard=1),
        END,
        code="UNIMPLEMENTED",
        reason="NOT_SERVED",
    ),
    wrong_bytes(
        "a chunk over 2 MiB, streamed",
        "chunk of 2097153 bytes",
        chunk(0, bytes(2**21 + 1)),
        code="RESOURCE_EXHAUSTED",
        reason="LIMIT_EXCEEDED",
    ),
    refused(
        "two begins, streamed",
        INVALID,
        "MALFORMED_REQUEST",
        "frame 'begin', expected 'end'",
        lambda b: b.peer.stream(b.begin(), b.begin(), ALL, END),
    ),
    refused(
        "a begin among the chunks",
        INVALID,
        "MALFORMED_REQUEST",
        "frame 'begin', expected 'end'",
        lambda b: b.peer.stream(b.begin(), ALL, b.begin(), END),
    ),
    refused(
        "a chunk before the begin",
        INVALID,
        "MALFORMED_REQUEST",
        "frame 'chunk', expected 'begin'",
        lambda b: b.peer.stream(ALL, b.begin(), END),
    ),
    refused(
        "an end first", INVALID, "MALFORMED_REQUEST", "frame 'end', expected 'begin'", lambda b: b.peer.stream(END)
    ),
    refused(
        "a frame without content",
        INVALID,
        "MALFORMED_REQUEST",
        "'without content', expected 'begin'",
        lambda b: b.peer.raw(f"/{wire.SERVICE.full_name}/StreamSteps", b""),
    ),
    refused(
        "a frame without content among chunks",
        INVALID,
        "MALFORMED_REQUEST",
        "'without content', expected 'end'",
        lambda b: b.peer.raw(
            f"/{wire.SERVICE.full_name}/StreamSteps", pb.StreamStepsRequest(begin=b.begin()).SerializeToString(), b""
        ),
    ),
]
