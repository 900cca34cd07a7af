"""A spec with any kind of mistake is refused with the path inside the spec, and nothing is allocated for it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import jax.monitoring
import numpy as np
import pytest
from tests.e2e import bad_specs, wire
from tests.e2e.bad_specs import BadRequest, BadSpec
from tests.e2e.bench import PARAMS, PAYLOAD, Bench

from optwire_proto import convert, specs, trees
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import tensor_pb2 as tensor_pb
from optwire_server import testing
from optwire_server.engine import build

COMPILED = "/jax/core/compile/backend_compile_duration"


class Held:
    """What a server of this process holds for specs: programs, and room for sessions that are being created."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self.compiled = 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._count)

    def _count(self, event: str, duration_s: float, **_: Any) -> None:
        self.compiled += event == COMPILED

    def now(self) -> dict[str, Any]:
        registry, programs = self._server.registry, self._server.engine._programs
        return {
            "programs": set(programs._programs),
            "programs under way": list(programs._compiling),
            "compiled": self.compiled,
            "bytes of sessions under way": list(registry.creations._creating),
            "bytes of sessions": sum(live.held.state_bytes for live in registry._table.by_id.values()),
            "bytes of payloads": registry._landings.lent_bytes,
        }


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with testing.serve() as serving:
        peer = wire.Peer(serving.target)
        yield Bench(peer, serving.server)
        peer.close()


@pytest.fixture(scope="module")
def held(bench: Bench) -> Iterator[Held]:
    held = Held(bench.server)
    yield held
    held.close()


def refused(call: Any, code: str, reason: str, subject: str, fragment: str) -> None:
    """Checks how a call fails; a subject that begins with a dot or a bracket is a part of a long path."""
    failure = wire.Failure.of(call)
    assert failure is not None, "served what must be refused"
    assert failure.code == code, failure
    assert failure.detail is not None, failure
    assert failure.detail.reason == reason, failure
    assert fragment in failure.message, failure
    if subject.startswith((".", "[")):
        assert subject in failure.detail.subject, failure
    else:
        assert failure.detail.subject == subject, failure


@pytest.mark.parametrize("case", bad_specs.ALL)
def test_a_spec_that_cannot_be_is_refused_with_its_path_and_nothing_is_allocated(
    bench: Bench, held: Held, case: BadSpec
):
    before = held.now()
    refused(lambda: bench.create(spec=case.spec), *case.outcome, case.subject, case.fragment)
    wire.until(wire.idle(bench.server), "landing buffers and streams given back")
    assert held.now() == before
    bench.check_nothing_happened()


def test_there_are_enough_of_them():
    assert len(bad_specs.ALL) >= 80
    assert len({case.id for case in bad_specs.ALL}) == len(bad_specs.ALL)


def test_every_kind_of_argument_is_given_what_it_cannot_take():
    parameters = [
        (f"{entry.name}.{parameter.name}", parameter.takes)
        for entry in build.CATALOGUE.values()
        for parameter in entry.parameters
    ]
    places = [re.sub(r"\[.*?\]", "", case.values[0].subject) for case in bad_specs.ALL]
    tried = {
        kind
        for place in places
        for end, takes in parameters
        if specs.ends_with(place, end)
        for kind in takes.split(":")
    }
    assert tried == {kind for _, takes in parameters for kind in takes.split(":")}


# Spec.arguments, Argument.value, Value.spec, and so on; Spec.arguments, Argument.value, then Value.list in Value.list.
NESTED = {"specs": b"\x12\x12\x2a" * 3333, "lists": b"\x12\x12" + b"\x32\x0a" * 5000}


@pytest.mark.parametrize("tags", NESTED.values(), ids=NESTED)
def test_10_000_messages_inside_one_another_are_refused_before_they_are_read(bench: Bench, held: Held, tags: bytes):
    data = bad_specs.wrapped(b"\x0a\x1a" + tags)  # in CreateSessionRequest.begin, CreateSessionBegin.spec
    before = held.now()
    method = f"/{wire.SERVICE.full_name}/CreateSession"
    refused(lambda: bench.peer.raw(method, data), "INVALID_ARGUMENT", "MALFORMED_REQUEST", method, "not its request")
    assert held.now() == before
    bench.check_nothing_happened()


def test_a_schedule_of_10_000_000_points_does_not_get_through(bench: Bench, held: Held):
    points = bytes(4 * 10**7)
    shape = tensor_pb.LeafSpec(shape=[10**7], data_type=1)
    spec = bad_specs.scheduled(bad_specs.spec("table", values=pb.TensorValue(leaf=shape, data=points)))
    before = held.now()
    failure = wire.Failure.of(lambda: bench.create(spec=spec))
    assert failure is not None
    assert failure.code == "RESOURCE_EXHAUSTED"  # gRPC itself, from the length of the message alone
    assert held.now() == before
    bench.check_nothing_happened()


LONG = {
    "stars": "*a" * 120 + "b",
    "components": "**/" + "*/" * 125 + "x",
    "any components": "**/*/" * 50 + "x",
}


@pytest.mark.parametrize("pattern", LONG.values(), ids=LONG)
def test_a_pattern_of_many_stars_against_long_names_is_refused_at_once(bench: Bench, held: Held, pattern: str):
    params = {name: np.zeros(1, np.float32) for name in ("/".join("a" * 500), "a" * 1000)}
    tree, spec = convert.tree_to_proto(trees.flatten(params).spec), bad_specs.masked(pattern)
    before, start_s = held.now(), time.monotonic()
    refused(lambda: bench.create(tree=tree, spec=spec), *bad_specs.INVALID, "adamw.mask", "matches no parameter")
    assert time.monotonic() - start_s < 2
    assert held.now() == before
    bench.check_nothing_happened()


def test_a_whole_number_where_a_real_one_is_meant_is_taken(bench: Bench):
    spec = bad_specs.spec("adamw", learning_rate=1, b1=0, eps=1, weight_decay=2)
    bench.peer.create_from(
        bench.create_begin(spec=spec, name="whole"),
        wire.chunks(wire.payload_of(PARAMS), 2**20),
        pb.PayloadEnd(digest=wire.digest(wire.payload_of(PARAMS))),
    )
    bench.peer.stub.DeleteSession(pb.DeleteSessionRequest(session=wire.named("whole")), timeout=wire.TIMEOUT_S)
    bench.check_nothing_happened()


# --------------------------------------------------------------------------------- requests to sessions that are there


class Live:
    """The sessions of ``bad_specs.SESSIONS``, each one step old."""

    def __init__(self, peer: wire.Peer, server: Any) -> None:
        self.peer = peer
        self.server = server
        self.sessions: dict[str, pb.Session] = {}
        self.steps = dict.fromkeys(bad_specs.SESSIONS, 0)
        payload = wire.payload_of(PARAMS)
        for name, text in bad_specs.SESSIONS.items():
            begin = pb.CreateSessionBegin(
                name=name,
                tree=convert.tree_to_proto(trees.flatten(PARAMS).spec),
                spec=pb.Spec(text=text),
                create_key=f"{len(self.sessions):032x}",
            )
            end = pb.PayloadEnd(digest=wire.digest(payload))
            self.sessions[name] = peer.create_from(begin, wire.chunks(payload, 2**20), end)
            self.push(name)

    def begin(self, name: str, **changes: Any) -> pb.PushBegin:
        """The next push of a session."""
        if self.sessions[name].name == "polyak":
            changes = {"extras": bad_specs.LOSS} | changes
        return wire.push(self.sessions[name], self.steps[name] + 1, self.steps[name], **changes)

    def push(self, name: str) -> None:
        response = self.peer.step(self.begin(name), PAYLOAD)
        self.steps[name] += 1
        assert response.ack.step == self.steps[name]

    def state(self) -> dict[str, Any]:
        """Everything that can be asked about every session."""
        ask = pb.GetSessionRequest
        return {
            name: (
                self.peer.read(name),
                self.peer.stub.GetSession(ask(session=wire.named(name)), timeout=wire.TIMEOUT_S).SerializeToString(
                    deterministic=True
                ),
            )
            for name in self.sessions
        }


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with testing.serve() as serving:
        peer = wire.Peer(serving.target)
        yield Live(peer, serving.server)
        peer.close()


@pytest.fixture(scope="module")
def held_live(live: Live) -> Iterator[Held]:
    held = Held(live.server)
    yield held
    held.close()


def check_live(live: Live, held: Held, case: BadRequest, call: Any) -> None:
    """The request is refused, no session has changed, and the next push is served."""
    state, before = live.state(), held.now()
    refused(call, case.code, case.reason, case.subject, case.fragment)
    wire.until(wire.idle(live.server), "landing buffers and streams given back")
    after = held.now()
    if not case.compiles:
        assert after == before
    assert after["bytes of sessions"] == before["bytes of sessions"]
    assert live.state() == state
    live.push(case.session)


@pytest.mark.parametrize("case", bad_specs.PUSHES)
@pytest.mark.parametrize("road", ["unary", "streamed"])
def test_a_push_that_brings_the_wrong_things_along_is_refused(live: Live, held_live: Held, road: str, case: BadRequest):
    changes = {"extras": []} | case.changes
    begin = live.begin(case.session, **changes)
    if road == "unary":
        check_live(live, held_live, case, lambda: live.peer.step(begin, PAYLOAD))
    else:
        check_live(live, held_live, case, lambda: live.peer.stream(wire.upload(begin, PAYLOAD)))


@pytest.mark.parametrize("case", bad_specs.READS)
def test_a_view_that_is_not_kept_cannot_be_read(live: Live, held_live: Held, case: BadRequest):
    request = pb.ReadParamsRequest(session=wire.named(case.session), **case.changes)
    check_live(live, held_live, case, lambda: list(live.peer.stub.ReadParams(request, timeout=wire.TIMEOUT_S)))


@pytest.mark.parametrize("case", bad_specs.CHANGES)
def test_a_change_of_hyperparameters_that_cannot_be_is_refused(live: Live, held_live: Held, case: BadRequest):
    request = pb.UpdateHyperparamsRequest(session=wire.named(case.session), **case.changes)
    check_live(live, held_live, case, lambda: live.peer.stub.UpdateHyperparams(request, timeout=wire.TIMEOUT_S))
