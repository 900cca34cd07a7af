"""Plain data to messages and back: nothing is lost, nothing unknown let in, the schema does not change unseen."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor

from optwire_proto import catalogue, checks, convert, digests, entries, errors, sessions, specs, trees
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import tensor_pb2 as tensor_pb

SNAPSHOT = pathlib.Path(__file__).with_name("descriptor.txt")
UNKNOWN_FIELD = b"\xa0\x38\x01"  # number 900, a varint

TREE = trees.flatten({"b": np.zeros(3, np.float32), "w": [np.zeros((2, 3), np.float64), None]}).spec
SPEC = checks.check(specs.Spec("adam", (("step_size", 0.1),)))
ARRAY = specs.Array.of("f64", (2, 1), (0.1, -0.0))
KEY = sessions.PushKey(session_id="0" * 32, incarnation=3, worker="f" * 32, seq=2**64 - 1, base_step=7, epoch=9)
WORKER = sessions.WorkerInfo(
    worker="f" * 32,
    epoch=2**32 - 1,
    state=sessions.WorkerState.LOST,
    seq=2**64 - 1,
    base_step=2**63,
    has_pushed=True,
    is_awaited=False,
    silent_s=1 / 3,
)
ACK = sessions.Ack(
    step=9,
    applied_step=8,
    durable_step=1,
    incarnation=3,
    seq=2**64 - 1,
    duplicate=True,
    learning_rate=0.1,
    payload_bytes=60,
    metrics={"grad_norm": 0.25},
)
INFO = sessions.SessionInfo(
    id="0" * 32,
    name="mnist",
    incarnation=3,
    step=2**63,
    durable_step=5,
    tree=TREE,
    spec=SPEC,
    learning_rate=1e-300,
    learning_rate_scheduled=True,
    durability=sessions.Durability.LOG,
    payload_bytes=2**40,
    state_bytes=2**41,
    created_s=1.5e9 + 1 / 3,
    failure="lost",
    seed=2**64 - 1,
    spec_digest=specs.digest(SPEC),
    changes=(sessions.Change(7, (("adam.step_size", 0.5), ("adam.b1", SPEC))),),
)
OPTIMIZER = sessions.OptimizerInfo(
    text=str(SPEC),
    spec_digest=specs.digest(SPEC),
    granularity="element",
    groups=(sessions.LeafGroup((0, 2), "a > b", ("adam", "scale"), (("adam.b1", 0.5), ("adam.mask", ("x", None)))),),
    step=3,
    extras=("loss",),
    views=("ema",),
)
SERVER = sessions.ServerInfo(
    version="1",
    library_versions={"jax": "0.10"},
    devices=(("cpu:0", "cpu"), ("cuda:1", "A100")),
    limits={field.name: number for number, field in enumerate(pb.Limits.DESCRIPTOR.fields)},
    catalogue={},
    features=("stream",),
)


def sent(message: Any) -> Any:
    """The message as it arrives."""
    return type(message).FromString(message.SerializeToString())


@pytest.mark.parametrize(
    "info",
    [INFO, INFO.__class__(**{field: getattr(INFO, field) for field in INFO.__slots__} | {"tree": None, "failure": ""})],
)
def test_a_session_survives_the_wire(info: sessions.SessionInfo):
    assert convert.session_from_proto(sent(convert.session_to_proto(info))) == info


def test_a_tree_survives_the_wire():
    assert convert.tree_from_proto(sent(convert.tree_to_proto(TREE))) == TREE
    plain = trees.TreeSpec(TREE.leaves)
    assert convert.tree_from_proto(sent(convert.tree_to_proto(plain))) == plain


def test_an_ack_survives_the_wire():
    assert convert.ack_from_proto(sent(convert.ack_to_proto(ACK))) == ACK


@pytest.mark.parametrize("state", sessions.WorkerState)
def test_a_worker_survives_the_wire(state: sessions.WorkerState):
    worker = dataclasses.replace(WORKER, state=state)
    assert convert.worker_from_proto(sent(convert.worker_to_proto(worker))) == worker


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan"), 1e39, 1e-39, 1.1e12, 0.9e-12])
def test_a_weight_that_cannot_be_is_refused(weight: float):
    begin = convert.push_to_proto(KEY)
    begin.weight = weight
    with pytest.raises(errors.InvalidArgumentError, match=r"push\.weight: .*, expected 1e-12 to 1e[+]12"):
        convert.push_from_proto(sent(begin))


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 99])
def test_a_digest_survives_the_wire(data: bytes):
    digest = digests.digest(data)
    assert convert.digest_from_proto(sent(convert.digest_to_proto(digest))) == digest
    assert convert.end_from_proto(sent(pb.PayloadEnd(digest=convert.digest_to_proto(digest)))) == digest


def test_what_a_server_says_of_itself_survives_the_wire():
    assert convert.server_from_proto(sent(convert.server_to_proto(SERVER))) == SERVER


def test_what_an_optimizer_does_survives_the_wire():
    assert convert.optimizer_from_proto(sent(convert.optimizer_to_proto(OPTIMIZER))) == OPTIMIZER


@pytest.mark.parametrize(
    "options",
    [
        sessions.PLAIN,
        sessions.PushOptions(
            grad_scale=65536.0, extras=(("loss", 0.25),), telemetry=True, reply=sessions.ReplyContent.UPDATES
        ),
        sessions.PushOptions(weight=1 / 3, reply=sessions.ReplyContent.PRESENT),
        sessions.PushOptions(rows=((0, 0), (3, 2**40)), rows_exact=True),
    ],
)
def test_what_a_push_says_beside_its_gradients_survives_the_wire(options: sessions.PushOptions):
    assert convert.push_from_proto(sent(convert.push_to_proto(KEY, options))) == (KEY, options)


def test_what_is_to_be_read_by_rows_survives_the_wire():
    wanted = ((0, b""), (2, b"1234"), (7, None))
    assert convert.wanted_from_proto(sent(pb.ReadParamsRequest(rows=convert.wanted_to_proto(wanted)))) == wanted


@pytest.mark.parametrize("entry", catalogue.CATALOGUE.values(), ids=catalogue.CATALOGUE)
def test_an_entry_of_the_catalogue_survives_the_wire_but_for_what_it_takes(entry: entries.Entry):
    back = convert.entry_from_proto(sent(convert.entry_to_proto(entry)))
    for name in ("name", "kind", "summary", "origin", "refusal", "extras"):
        assert getattr(back, name) == getattr(entry, name)
    for name in ("name", "takes", "default", "keyword_only"):
        assert [getattr(p, name) for p in back.parameters] == [getattr(p, name) for p in entry.parameters]
    assert [type(p.default) for p in back.parameters] == [type(p.default) for p in entry.parameters]


@pytest.mark.parametrize("ref", [{"id": "a" * 32}, {"name": "mnist"}])
def test_a_reference_survives_the_wire(ref: dict[str, str]):
    assert convert.ref_from_proto(sent(convert.ref_to_proto(**ref))) == (ref.get("id", ""), ref.get("name", ""))


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        1,
        -(2**63),
        2**63 - 1,
        0.0,
        1.0,
        -0.0,
        1e308,
        "",
        "x",
        (),
        (1, (2.0, "a", None)),
        SPEC,
        specs.Blob(b"\0x"),
        ARRAY,
    ],
)
def test_a_value_survives_the_wire_with_its_type(value: specs.Value):
    back = convert.value_from_proto(sent(convert.value_to_proto(value)), "x")
    assert (back, str(back), type(back)) == (value, str(value), type(value))


@pytest.mark.parametrize("error", errors.TABLE.values(), ids=errors.TABLE)
def test_an_error_survives_the_wire(error: tuple[str, type[errors.OptwireError]]):
    code, kind = error
    made = kind("what happened", subject="s", expected="e", got="g", step=0, retry_after_s=0.5)
    back = convert.error_from_proto(code, str(made), convert.error_to_proto(made))
    assert type(back) is kind
    assert vars(back) == vars(made)
    assert str(back) == str(made)


def test_an_error_without_a_step_has_none_afterwards():
    made = errors.StaleStepError("late")
    assert convert.error_from_proto("ABORTED", "late", convert.error_to_proto(made)).step is None


@pytest.mark.parametrize("letter", ["x", "語", "\U0001f600", "\n", "\0"])
def test_an_error_of_any_length_fits_the_metadata(letter: str):
    made = errors.SpecError("m", subject=letter * 10_000, expected=letter * 10_000, got=letter * 10_000)
    detail = convert.error_to_proto(made)
    assert len(detail) < 4096
    back = convert.error_from_proto("INVALID_ARGUMENT", "m", detail)
    assert back.subject
    assert set(back.subject) == {letter}


@pytest.mark.parametrize("detail", [b"\xff\xff", b"\x0a\xff", b"not ours"])
def test_a_detail_that_is_not_ours_does_not_hide_the_status(detail: bytes):
    back = convert.error_from_proto("NOT_FOUND", "no such thing", detail)
    assert type(back) is errors.SessionNotFoundError
    assert str(back) == "no such thing"


@pytest.mark.parametrize(
    ("code", "kind"),
    [("CANCELLED", errors.UnavailableError), ("UNKNOWN", errors.InternalError), ("ABORTED", errors.OutOfStepError)],
)
def test_a_status_without_a_detail_is_read_by_its_code(code: str, kind: type[errors.OptwireError]):
    assert type(convert.error_from_proto(code, "m", None)) is kind


@pytest.mark.parametrize("reason", ["NOT_YET_INVENTED", ""])
def test_a_reason_of_a_later_version_is_read_by_its_code(reason: str):
    detail = pb.ErrorDetail(reason=reason, subject="s").SerializeToString()
    back = convert.error_from_proto("RESOURCE_EXHAUSTED", "m", detail)
    assert (type(back), back.subject) == (errors.LimitError, "s")


# ------------------------------------------------------------------------------------------------------- unknown fields

FULL = pb.CreateSessionRequest(
    begin=pb.CreateSessionBegin(
        tree=convert.tree_to_proto(TREE), spec=convert.spec_to_proto(SPEC), aggregation=pb.Aggregation()
    )
)
PLACES: dict[str, Callable[[Any], Any]] = {
    "CreateSessionRequest": lambda m: m,
    "CreateSessionRequest.begin": lambda m: m.begin,
    "CreateSessionRequest.begin.aggregation": lambda m: m.begin.aggregation,
    "CreateSessionRequest.begin.tree": lambda m: m.begin.tree,
    "CreateSessionRequest.begin.tree.leaves": lambda m: m.begin.tree.leaves[1],
    "CreateSessionRequest.begin.tree.nodes": lambda m: m.begin.tree.nodes[-1],
    "CreateSessionRequest.begin.tree.nodes.keys": lambda m: m.begin.tree.nodes[0].keys[1],
    "CreateSessionRequest.begin.spec": lambda m: m.begin.spec,
    "CreateSessionRequest.begin.spec.arguments": lambda m: m.begin.spec.arguments[3],
    "CreateSessionRequest.begin.spec.arguments.value": lambda m: m.begin.spec.arguments[0].value,
}


def test_known_fields_are_let_in():
    convert.refuse_unknown_fields(sent(FULL))
    convert.refuse_unknown_fields(sent(convert.server_to_proto(SERVER)))


@pytest.mark.parametrize(("place", "find"), PLACES.items(), ids=PLACES)
def test_a_field_nobody_knows_is_refused_wherever_it_is(place: str, find: Callable[[Any], Any]):
    message = sent(FULL)
    find(message).MergeFromString(UNKNOWN_FIELD)
    with pytest.raises(errors.UnsupportedError) as caught:
        convert.refuse_unknown_fields(sent(message))
    assert str(caught.value) == f"{place}: field number 900 is not known to this version"
    assert (caught.value.subject, caught.value.got) == (place, "900")


def test_what_is_extended_survives_the_wire():
    extends = sessions.Extension("a" * 32, 2**64 - 1, 2**63)
    begin = sent(pb.CreateSessionBegin(extends=convert.extension_to_proto(extends)))
    assert convert.extension_from_proto(begin) == extends
    assert convert.extension_from_proto(pb.CreateSessionBegin()) is None
    with pytest.raises(errors.InvalidArgumentError, match=r"extends\.session_id"):
        convert.extension_from_proto(pb.CreateSessionBegin(extends=pb.Extension(incarnation=1)))


@pytest.mark.parametrize("step", [None, 0, 2**64 - 1])
def test_a_load_says_its_step_or_none(step: int | None):
    flat = trees.TreeSpec(TREE.leaves)
    ids = {"session_id": "a" * 32, "load_key": "b" * 32}
    begin = pb.LoadStateBegin(**ids, incarnation=3, tree=convert.tree_to_proto(flat), step=step)
    key = sessions.LoadKey(session_id="a" * 32, incarnation=3, load_key="b" * 32, step=step)
    assert convert.load_from_proto(sent(begin)) == (key, flat)
    assert convert.load_to_proto(key, flat) == begin


def test_a_token_and_a_slot_survive_the_wire():
    digest = sessions.Digest(2**40, token=bytes(range(16)))
    assert convert.digest_from_proto(sent(convert.digest_to_proto(digest))) == digest
    assert str(digest) == f"{2**40} bytes in shared memory, token 000102030405060708090a0b0c0d0e0f"
    begin = sent(convert.slot_into(convert.push_to_proto(KEY), 2**32 - 1))
    assert convert.slot_from_proto(begin) == 2**32 - 1
    assert convert.push_from_proto(begin)[0] == KEY
    assert convert.slot_from_proto(convert.push_to_proto(KEY)) == 0


@pytest.mark.parametrize(
    "fields", [{"token": b"x"}, {"token": bytes(17)}, {"token": bytes(16), "rows_crc32": 0, "columns_crc32": 0}]
)
def test_a_token_that_is_none_is_refused(fields: dict[str, Any]):
    with pytest.raises(errors.PayloadError, match="digest.token: .*expected 16 bytes and no checksums"):
        convert.digest_from_proto(tensor_pb.PayloadDigest(length=4, **fields))


def test_an_end_without_a_digest_is_refused():
    with pytest.raises(errors.PayloadError, match="without a digest"):
        convert.end_from_proto(pb.PayloadEnd())


def test_lists_of_values_are_guarded_against_depth():
    value = pb.Value(number=1.0)
    for _ in range(45):
        value = pb.Value(list=pb.ValueList(values=[value]))
    with pytest.raises(errors.SpecError, match="nested deeper than 40"):
        convert.value_from_proto(value, "x")


# ----------------------------------------------------------------------------------------------------------- the schema


def described() -> Iterator[str]:
    """One line for each field, enum value and method of the schema."""
    for file in (tensor_pb.DESCRIPTOR, pb.DESCRIPTOR):
        for message in file.message_types_by_name.values():
            yield from message_lines(message)
        for enum in file.enum_types_by_name.values():
            yield from enum_lines(enum)
        for service in file.services_by_name.values():
            for method in service.methods:
                up, down = ("stream " * streams for streams in (method.client_streaming, method.server_streaming))
                types = f"({up}{method.input_type.full_name}) returns ({down}{method.output_type.full_name})"
                yield f"{service.full_name}.{method.name} {types}"


def message_lines(message: descriptor.Descriptor) -> Iterator[str]:
    for field in message.fields:
        kind = field.message_type or field.enum_type
        name = kind.full_name if kind else TYPES[field.type]
        oneof = field.containing_oneof
        optional = oneof is not None and oneof.name == f"_{field.name}"  # how proto3 spells `optional`
        marks = "repeated " * field.is_repeated + "optional " * optional
        inside = f" in {oneof.name}" if oneof and not optional else ""
        yield f"{message.full_name}.{field.name} = {field.number} {marks}{name}{inside}"
    for nested in message.nested_types:
        yield from message_lines(nested)
    for enum in message.enum_types:
        yield from enum_lines(enum)


def enum_lines(enum: descriptor.EnumDescriptor) -> Iterator[str]:
    for value in enum.values:
        yield f"{enum.full_name}.{value.name} = {value.number}"


TYPES = {
    getattr(descriptor.FieldDescriptor, name): name.removeprefix("TYPE_").lower()
    for name in dir(descriptor.FieldDescriptor)
    if name.startswith("TYPE_")
}
REGENERATE = f"python -m tests.proto.test_convert > tests/proto/{SNAPSHOT.name}"


def test_the_schema_keeps_every_field_it_had():
    was, now = SNAPSHOT.read_text().splitlines(), list(described())
    lost = [line for line in was if line not in now]
    assert lost == [], f"clients of the last version break; if nobody has them yet: {REGENERATE}"


def test_the_snapshot_of_the_schema_is_of_this_schema():
    added = [line for line in described() if line not in SNAPSHOT.read_text().splitlines()]
    assert added == [], f"new and welcome, note it down: {REGENERATE}"


if __name__ == "__main__":
    print(*described(), sep="\n")


@pytest.mark.parametrize("wrong", [5, None, b"0" * 32, "0" * 31, "F" * 32], ids=repr)
def test_an_id_that_cannot_be_is_refused(wrong: Any):
    with pytest.raises(
        errors.InvalidArgumentError, match="worker .*: expected 32 lower-case hexadecimal digits"
    ) as caught:
        sessions.check_id(wrong, "worker")
    assert caught.value.expected == "32 lower-case hexadecimal digits"
