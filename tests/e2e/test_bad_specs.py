"""A spec with any kind of mistake is refused with the path inside the spec, and nothing is allocated for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.monitoring
import pytest
from tests.e2e import bad_specs, wire
from tests.e2e.bad_specs import BadSpec
from tests.e2e.bench import Bench

from optwire_server import testing

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
            "programs": list(programs._programs),
            "programs under way": list(programs._compiling),
            "compiled": self.compiled,
            "bytes of sessions under way": list(registry._creating),
            "bytes of sessions": sum(live.held.state_bytes for live in registry._by_id.values()),
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


def refused(call: Any, code: str, reason: str, subject: str, fragment: str) -> wire.Failure:
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
    return failure


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
