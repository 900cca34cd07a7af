"""Requests for what this version does not serve, and questions that have no answer."""

from __future__ import annotations

from typing import Any

from tests.e2e import wire
from tests.e2e.bad_pushes import ALL, END, INVALID, NOBODY
from tests.e2e.bad_sessions import NAN, refused
from tests.e2e.bench import PAYLOAD

from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import tensor_pb2 as tensor_pb


def not_served(name: str, fragment: str, **changes: Any) -> list[Any]:
    """A capability that the protocol names, asked for by a push on both roads."""
    return [
        refused(
            f"{name}, unary",
            "UNIMPLEMENTED",
            "NOT_SERVED",
            fragment,
            lambda b: b.peer.step(b.begin(**changes), PAYLOAD),
        ),
        refused(
            f"{name}, streamed",
            "UNIMPLEMENTED",
            "NOT_SERVED",
            fragment,
            lambda b: b.peer.stream(b.begin(**changes), ALL, END),
        ),
    ]


def not_created(name: str, fragment: str, **changes: Any) -> Any:
    return refused(name, "UNIMPLEMENTED", "NOT_SERVED", fragment, lambda b: b.create(**changes))


RATE = pb.Argument(name="learning_rate", value=pb.Value(number=0.1))

_CHOICES: dict[Any, Any] = {"wait": 2, "sqrt": 2, "sum": 2}  # as the message has them

LATER = [
    *not_served("another codec than the session's", "codec bf16, expected f32", codec=tensor_pb.CODEC_BF16),
    *not_served("an unknown codec", "push.codec: 99", codec=99),
    refused(
        "a slot of shared memory that nobody was given",
        INVALID,
        "INVALID_ARGUMENT",
        "shared_memory_slot",
        lambda b: b.peer.stream(b.begin(shared_memory_slot=1), END),
    ),
    *not_served("an unknown reply", "push.reply: 99", reply=99),
    *(
        not_created(f"durability {level}", f"durability: {level} is not served", durability=level)
        for level in (pb.DURABILITY_SNAPSHOT, pb.DURABILITY_LOG, pb.DURABILITY_LOG_SYNC, 99)
    ),
    *(
        not_created(f"aggregation mode {mode}", f"aggregation.mode: {mode}", aggregation=pb.Aggregation(mode=mode))
        for mode in (8, 99)
    ),
    *(
        refused(
            f"aggregation mode {mode} with nothing that it needs",
            INVALID,
            "INVALID_ARGUMENT",
            f"aggregation.{field}: {got}, expected",
            lambda b, mode=mode: b.create(aggregation=pb.Aggregation(mode=mode)),
        )
        for mode, field, got in ((2, "workers", 0), (3, "workers", 0), (5, "staleness_max", None), (6, "k", 0))
    ),
    *(
        refused(
            f"aggregation with {field}",
            INVALID,
            "INVALID_ARGUMENT",
            f"aggregation.{field.replace('_steps_', '_')}: {value}",
            lambda b, field=field, value=value: b.create(
                aggregation=pb.Aggregation(**{field: _CHOICES.get(value, value)})
            ),
        )
        for field, value in (
            ("workers", 1),
            ("k", 1),
            ("staleness_steps_max", 1),
            ("deadline_s", 1.0),
            ("policy", "wait"),
            ("damping", "sqrt"),
            ("combine", "sum"),
            ("lease_s", 1.0),
            ("compensation", 0.5),
        )
    ),
    not_created("an unknown codec of gradients", "grads_codec: 7", grads_codec=7),
    not_created("an unknown codec of parameters", "params_codec: 99", params_codec=99),
]


def wrong_read(name: str, code: str, reason: str, fragment: str, **request: Any) -> Any:
    asked = pb.ReadParamsRequest(**{"session": wire.named("reference")} | request)
    return refused(name, code, reason, fragment, lambda b: list(b.peer.stub.ReadParams(asked, timeout=5)))


def wrong_rate(
    name: str, code: str, reason: str, fragment: str, *values: pb.Value, argument: str = "learning_rate", **request: Any
) -> Any:
    hyperparams = [pb.Argument(name=argument, value=value) for value in values]
    asked = pb.UpdateHyperparamsRequest(session=wire.named("reference"), hyperparams=hyperparams, **request)
    return refused(name, code, reason, fragment, lambda b: b.peer.stub.UpdateHyperparams(asked, timeout=5))


ONE = pb.Value(number=0.1)
UNKNOWN_REF = pb.SessionRef(id=NOBODY)

OTHERS = [
    wrong_read("parameters of another kind", INVALID, "INVALID_ARGUMENT", "which: 'ema', but this", which="ema"),
    wrong_read(
        "a very long kind of parameters", INVALID, "INVALID_ARGUMENT", "which: '\U0001f600", which="\U0001f600" * 2000
    ),
    wrong_read("parameters of an old step", "UNIMPLEMENTED", "NOT_SERVED", "ReadParams.step", step=1),
    wrong_read("parameters of step 0", "UNIMPLEMENTED", "NOT_SERVED", "ReadParams.step", step=0),
    wrong_read(
        "parameters of nothing", INVALID, "INVALID_ARGUMENT", "neither id nor name given", session=pb.SessionRef()
    ),
    wrong_read("parameters of a path", INVALID, "INVALID_ARGUMENT", "session name '../x'", session=wire.named("../x")),
    wrong_read("parameters for a bad worker", INVALID, "INVALID_ARGUMENT", "worker 'w0'", worker="w0"),
    wrong_read(
        "parameters of an unknown session",
        "NOT_FOUND",
        "SESSION_NOT_FOUND",
        "'gone' is not held",
        session=wire.named("gone"),
    ),
    wrong_rate("no hyperparameter", INVALID, "INVALID_ARGUMENT", "hyperparams: nothing, expected every name once"),
    wrong_rate(
        "a rate that is not a number",
        INVALID,
        "INVALID_ARGUMENT",
        "learning_rate=nan, expected a finite",
        pb.Value(number=NAN),
    ),
    wrong_rate("an infinite rate", INVALID, "INVALID_ARGUMENT", "learning_rate=inf", pb.Value(number=float("inf"))),
    wrong_rate(
        "a rate in words",
        INVALID,
        "INVALID_ARGUMENT",
        "learning_rate='fast', expected a finite number",
        pb.Value(text="fast"),
    ),
    wrong_rate(
        "a flag as rate",
        INVALID,
        "INVALID_ARGUMENT",
        "learning_rate=True, expected a finite number",
        pb.Value(flag=True),
    ),
    wrong_rate(
        "a schedule without its number as rate",
        INVALID,
        "INVALID_SPEC",
        "step_size.constant: missing argument 'step_size'",
        pb.Value(spec=pb.Spec(name="constant")),
    ),
    wrong_rate("two rates", INVALID, "INVALID_ARGUMENT", "a name twice, expected every name once", ONE, ONE),
    wrong_rate("a rate without a value", INVALID, "INVALID_SPEC", "learning_rate: no value", pb.Value()),
    wrong_rate(
        "an array as rate", INVALID, "INVALID_SPEC", "array with element type 0", pb.Value(tensor=pb.TensorValue())
    ),
    wrong_rate(
        "another hyperparameter", INVALID, "INVALID_ARGUMENT", "'zzz' is none of this session's", ONE, argument="zzz"
    ),
    wrong_rate("a rate from step 0", INVALID, "INVALID_ARGUMENT", "from_step 0, but the next", ONE, from_step=0),
    wrong_rate(
        "a rate for another incarnation",
        "FAILED_PRECONDITION",
        "WRONG_INCARNATION",
        "incarnation 2, expected 1",
        ONE,
        incarnation=2,
    ),
    refused(
        "a page of 1,001",
        INVALID,
        "INVALID_ARGUMENT",
        "page_size: 1001, expected at most 1000",
        lambda b: b.peer.stub.ListSessions(pb.ListSessionsRequest(page_size=1001)),
    ),
    refused(
        "a session of no name",
        INVALID,
        "INVALID_ARGUMENT",
        "neither id nor name given",
        lambda b: b.peer.stub.GetSession(pb.GetSessionRequest()),
    ),
    refused(
        "a session of an empty name",
        INVALID,
        "INVALID_ARGUMENT",
        "session name ''",
        lambda b: b.peer.stub.GetSession(pb.GetSessionRequest(session=wire.named(""))),
    ),
    refused(
        "a session of an empty id",
        INVALID,
        "INVALID_ARGUMENT",
        "session id ''",
        lambda b: b.peer.stub.GetSession(pb.GetSessionRequest(session=pb.SessionRef(id=""))),
    ),
    refused(
        "an unknown session",
        "NOT_FOUND",
        "SESSION_NOT_FOUND",
        "is not held",
        lambda b: b.peer.stub.GetSession(pb.GetSessionRequest(session=UNKNOWN_REF)),
    ),
    refused(
        "a bad worker",
        INVALID,
        "INVALID_ARGUMENT",
        "worker 'x'",
        lambda b: b.peer.stub.GetSession(pb.GetSessionRequest(session=wire.named("reference"), worker="x")),
    ),
    refused(
        "the end of no session",
        INVALID,
        "INVALID_ARGUMENT",
        "neither id nor name",
        lambda b: b.peer.stub.DeleteSession(pb.DeleteSessionRequest()),
    ),
    refused(
        "the end of an unknown session",
        "NOT_FOUND",
        "SESSION_NOT_FOUND",
        "'gone' is not held",
        lambda b: b.peer.stub.DeleteSession(pb.DeleteSessionRequest(session=wire.named("gone"))),
    ),
    refused(
        "a snapshot",
        "UNIMPLEMENTED",
        "NOT_SERVED",
        "not served",
        lambda b: b.peer.stub.SnapshotSession(pb.SnapshotSessionRequest(session=wire.named("reference"))),
    ),
    refused(
        "a fork",
        "UNIMPLEMENTED",
        "NOT_SERVED",
        "not served",
        lambda b: b.peer.stub.ForkSession(pb.ForkSessionRequest(session=wire.named("reference"), name="fork")),
    ),
    refused(
        "a rollback",
        "UNIMPLEMENTED",
        "NOT_SERVED",
        "not served",
        lambda b: b.peer.stub.RollbackSession(pb.RollbackSessionRequest(session=wire.named("reference"), step=1)),
    ),
    refused(
        "a method nobody knows", "UNIMPLEMENTED", "", "", lambda b: b.peer.raw(f"/{wire.SERVICE.full_name}/Nope", b"")
    ),
    refused(
        "a service nobody knows",
        "UNIMPLEMENTED",
        "",
        "",
        lambda b: b.peer.raw("/optwire.v2.OptimizerService/Step", b""),
    ),
    refused("a path that is none", "UNIMPLEMENTED", "", "", lambda b: b.peer.raw("/../../etc/passwd", b"")),
]
