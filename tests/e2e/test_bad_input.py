"""Bad input is refused by name, changes nothing, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.e2e import bad_pushes, bad_sessions, bad_trees, bad_wishes, wire
from tests.e2e.bench import Bench, Case

from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_server import testing

METHODS = {method.name: f"/{method.containing_service.full_name}/{method.name}" for method in wire.SERVICE.methods}
HEALTH = {name: f"/grpc.health.v1.Health/{name}" for name in ("Check", "Watch")}
LATER = ("SnapshotSession", "ForkSession", "RollbackSession")
GARBAGE = {
    "noise": b"\xff\xfe\x01garbage",
    "a length beyond the end": b"\x0a\xff\xff\xff\xff\x0f",
    "a varint without end": b"\x08" + b"\xff" * 11,
    "groups in groups": b"\x0b" * 5000,
    "field number 0": b"\x02\x00",
    "text that is not UTF-8": b"\x0a\x02\xc3\x28",
}
UNKNOWN_FIELD = b"\xa0\x38\x01"  # number 900, a varint


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with testing.serve() as serving:
        peer = wire.Peer(serving.target)
        yield Bench(peer, serving.server)
        peer.close()


def check(bench: Bench, case: Case) -> None:
    failure = wire.Failure.of(lambda: case.call(bench))
    assert failure is not None, "served what must be refused"
    assert failure.code not in ("UNKNOWN", "INTERNAL"), failure
    assert failure.code == case.code, failure
    assert case.fragment in failure.message, failure
    if case.reason:
        assert failure.detail is not None, failure
        assert failure.detail.reason == case.reason, failure
    bench.check_nothing_happened()


@pytest.mark.parametrize("case", bad_sessions.SPECS)
def test_an_optimizer_that_cannot_be_is_refused(bench: Bench, case: Case):
    check(bench, case)


@pytest.mark.parametrize("case", bad_trees.TREES)
def test_a_tree_that_cannot_be_is_refused(bench: Bench, case: Case):
    check(bench, case)


@pytest.mark.parametrize("case", bad_sessions.NAMES)
def test_a_name_that_cannot_be_is_refused(bench: Bench, case: Case):
    check(bench, case)


@pytest.mark.parametrize("case", bad_sessions.UPLOADS)
def test_parameters_that_do_not_add_up_make_no_session(bench: Bench, case: Case):
    check(bench, case)


@pytest.mark.parametrize("case", bad_pushes.PUSHES)
def test_a_push_that_does_not_fit_is_refused(bench: Bench, case: Case):
    check(bench, case)


@pytest.mark.parametrize("case", bad_pushes.STREAMS)
def test_gradients_that_do_not_add_up_are_refused(bench: Bench, case: Case):
    check(bench, case)


@pytest.mark.parametrize("case", bad_wishes.LATER)
def test_a_capability_of_later_is_refused_and_never_ignored(bench: Bench, case: Case):
    check(bench, case)


@pytest.mark.parametrize("case", bad_wishes.OTHERS)
def test_a_question_that_cannot_be_answered_is_refused(bench: Bench, case: Case):
    check(bench, case)


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("method", [*METHODS.values(), *HEALTH.values()], ids=[*METHODS, *HEALTH])
def test_bytes_that_are_no_message_are_refused_by_every_method(bench: Bench, method: str, data: bytes):
    failure = wire.Failure.of(lambda: bench.peer.raw(method, data))
    assert failure is not None, "took it for a message"
    assert failure.detail is not None, failure
    # To some methods a part of the noise is a field that they do not know.
    expected = [("INVALID_ARGUMENT", "MALFORMED_REQUEST"), ("UNIMPLEMENTED", "NOT_SERVED")]
    assert (failure.code, failure.detail.reason) in expected, failure
    bench.check_nothing_happened()


@pytest.mark.parametrize("method", [*METHODS.values(), *HEALTH.values()], ids=[*METHODS, *HEALTH])
def test_a_field_nobody_knows_is_refused_by_every_method(bench: Bench, method: str):
    failure = wire.Failure.of(lambda: bench.peer.raw(method, UNKNOWN_FIELD))
    assert failure is not None, "ignored a field"
    assert failure.code == "UNIMPLEMENTED", failure
    assert failure.detail is not None, failure
    assert failure.detail.reason == "NOT_SERVED"
    if method not in [METHODS[name] for name in LATER]:
        assert "field number 900 is not known to this version" in failure.message
    bench.check_nothing_happened()


def inside(message: Any, *path: str) -> bytes:
    """A message with a field nobody knows in the message at ``path``; of several, in the last."""
    inner = message
    for name in path:
        inner = getattr(inner, name)
        inner = inner[-1] if hasattr(inner, "append") else inner
    inner.MergeFromString(UNKNOWN_FIELD)
    return message.SerializeToString()


NESTED = {
    "in a leaf": (
        "CreateSession",
        lambda b: [inside(pb.CreateSessionRequest(begin=b.create_begin()), "begin", "tree", "leaves")],
    ),
    "in a value": (
        "CreateSession",
        lambda b: [inside(pb.CreateSessionRequest(begin=b.create_begin()), "begin", "spec", "arguments", "value")],
    ),
    "in the key of a push": ("Step", lambda b: [inside(pb.StepRequest(begin=b.begin()), "begin", "key")]),
    "in a chunk": (
        "StreamSteps",
        lambda b: [
            pb.StreamStepsRequest(begin=b.begin()).SerializeToString(),
            inside(pb.StreamStepsRequest(chunk=bad_pushes.ALL), "chunk"),
        ],
    ),
    "in a session's name": (
        "GetSession",
        lambda b: [inside(pb.GetSessionRequest(session=wire.named("reference")), "session")],
    ),
    "in place of a field of another type": ("ListSessions", lambda b: [b"\x0a\x01x"]),
}


@pytest.mark.parametrize(("method", "messages"), NESTED.values(), ids=NESTED)
def test_a_field_nobody_knows_is_refused_deep_inside(bench: Bench, method: str, messages: Any):
    failure = wire.Failure.of(lambda: bench.peer.raw(METHODS[method], *messages(bench)))
    assert failure is not None, "ignored a field"
    assert failure.code == "UNIMPLEMENTED", failure
    assert "is not known to this version" in failure.message
    bench.check_nothing_happened()


def test_a_stream_without_frames_is_no_error_and_no_step(bench: Bench):
    assert bench.peer.stream() == []
    bench.check_nothing_happened()


def test_an_error_ends_the_stream_and_what_was_applied_on_it_stays(bench: Bench):
    bench.good += 1
    good = wire.upload(wire.push(bench.other, bench.good, bench.good - 1), bad_pushes.PAYLOAD)
    failure = wire.Failure.of(lambda: bench.peer.stream(good, bad_pushes.END))
    assert failure is not None
    assert failure.code == "INVALID_ARGUMENT"
    bench.check_nothing_happened()  # its good request is the push after the one that stayed
