"""Workers that die, freeze, return and are replaced, as processes: the others go on within a lease."""

from __future__ import annotations

import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.e2e import wire, worker_processes

import optwire
from optwire import optimizers as opt
from optwire_proto import sessions
from optwire_server import testing

pytestmark = pytest.mark.usefixtures("no_error_is_logged")

LEASE_S = 1.5
# What a busy machine takes for the rest of a step.
MORE_S = 4.0
FLOAT = np.float32
State = sessions.WorkerState


@pytest.fixture(scope="module")
def serving() -> Iterator[testing.Serving]:
    with wire.served() as serving:
        yield serving


@pytest.fixture
def client(serving: testing.Serving) -> Iterator[optwire.Client]:
    with optwire.connect(serving.target, timeout=20) as client:
        yield client
        for info in client.list_sessions():  # what workers pushed that were killed is kept as long
            client.delete_session(info.name)


def session(client: optwire.Client, aggregation: str) -> str:
    """The name of a new session, by a process that is none of its workers."""
    name = secrets.token_hex(4)
    client.create_session({"w": np.zeros(5, FLOAT)}, opt.sgd(1.0), name=name, aggregation=aggregation).close()
    return name


def mean(*ranks: int) -> np.float32:
    """Of the gradients of these ranks, summed in their order."""
    total = FLOAT(0)
    for rank in sorted(ranks):
        total = FLOAT(total + FLOAT(rank + 1))
    return FLOAT(total / FLOAT(len(ranks)))


def states(client: optwire.Client, name: str) -> dict[int, sessions.WorkerInfo]:
    with client.attach(name) as reader:
        return {int(worker.worker, 16): worker for worker in reader.workers()}


def all_step(*workers: worker_processes.Worker) -> list[dict[str, Any]]:
    for worker in workers:
        worker.begin()
    return [worker.result() for worker in workers]


def test_the_barrier_is_released_within_the_lease_of_a_worker_that_was_killed(
    serving: testing.Serving, client: optwire.Client
) -> None:
    name = session(client, f"sync(3, lease_s={LEASE_S})")
    with worker_processes.started(serving.target, name, 0, 1, 2) as (zero, one, two):
        for said in all_step(zero, one, two):
            assert (said["step"], said["value"]) == (1, -mean(0, 1, 2))
        two.kill()
        start_s = time.monotonic()
        zero.begin()
        one.begin()
        wire.until(lambda: states(client, name)[0].has_pushed and states(client, name)[1].has_pushed, "both pushed")
        assert [rank for rank, worker in states(client, name).items() if worker.is_awaited] == [2]
        first, second = zero.result(), one.result()
        assert time.monotonic() - start_s < LEASE_S + MORE_S
        expected = FLOAT(-mean(0, 1, 2) - mean(0, 1))
        assert (first["step"], first["value"]) == (second["step"], second["value"]) == (2, expected)
        found = states(client, name)
        assert (found[2].state, found[2].is_awaited, found[2].seq) == (State.LOST, False, 1)
        assert (found[0].state, found[0].is_awaited, found[0].seq) == (State.LIVE, True, 2)
        start_s = time.monotonic()
        all_step(zero, one)
        assert time.monotonic() - start_s < LEASE_S, "who is lost is not waited for again"


def test_what_a_killed_worker_had_pushed_counts(serving: testing.Serving, client: optwire.Client) -> None:
    name = session(client, f"sync(3, lease_s={LEASE_S})")
    with worker_processes.started(serving.target, name, 0, 1, 2) as (zero, one, two):
        two.begin()
        wire.until(lambda: states(client, name)[2].has_pushed, "it has pushed")
        two.kill()
        wire.until(lambda: states(client, name)[2].state is State.LOST, "its lease is over", LEASE_S + MORE_S)
        for said in all_step(zero, one):
            assert (said["step"], said["value"]) == (1, -mean(0, 1, 2))


def test_what_a_frozen_worker_had_pushed_counts_and_it_hears_of_it_when_it_thaws(
    serving: testing.Serving, client: optwire.Client
) -> None:
    name = session(client, f"sync(2, lease_s={LEASE_S})")
    with worker_processes.started(serving.target, name, 0, 1) as (zero, one):
        one.begin()
        wire.until(lambda: states(client, name)[1].has_pushed, "it has pushed")
        one.freeze()
        assert zero.step()["value"] == -mean(0, 1)
        one.thaw()
        said = one.result()
        assert (said["step"], said["value"]) == (1, -mean(0, 1))


def test_a_frozen_worker_is_released_and_goes_on_when_it_thaws(
    serving: testing.Serving, client: optwire.Client
) -> None:
    name = session(client, f"sync(2, lease_s={LEASE_S})")
    with worker_processes.started(serving.target, name, 0, 1) as (zero, one):
        all_step(zero, one)
        one.freeze()
        start_s = time.monotonic()
        assert zero.step()["step"] == 2
        assert LEASE_S / 2 < time.monotonic() - start_s < LEASE_S + MORE_S
        assert states(client, name)[1].state is State.LOST
        one.thaw()
        said = one.step()
        assert (said["error"], said["step"]) == ("StepClosedError", 2)
        said = one.step(late="params")
        assert (said["step"], said["value"], said["late"]) == (2, FLOAT(-mean(0, 1) - mean(0)), 1)
        wire.until(lambda: states(client, name)[1].state is State.LIVE, "it is there again")
        for said in all_step(zero, one):
            assert (said["step"], said["value"]) == (3, FLOAT(FLOAT(-mean(0, 1) - mean(0)) - mean(0, 1)))


def test_a_worker_that_only_computes_for_long_is_not_lost(serving: testing.Serving, client: optwire.Client) -> None:
    name = session(client, f"sync(2, lease_s={LEASE_S / 2})")
    with worker_processes.started(serving.target, name, 0, 1) as (zero, one):
        zero.begin()
        end_s = time.monotonic() + 2 * LEASE_S
        while time.monotonic() < end_s:
            found = states(client, name)
            assert [worker.state for worker in found.values()] == [State.LIVE, State.LIVE]
            assert found[1].silent_s < LEASE_S / 2
            time.sleep(0.1)
        one.begin()
        assert (zero.result()["step"], one.result()["step"]) == (1, 1)


def test_a_process_that_was_replaced_is_fenced(serving: testing.Serving, client: optwire.Client) -> None:
    name = session(client, f"sync(2, lease_s={LEASE_S})")
    with (
        worker_processes.started(serving.target, name, 0, 1) as (zero, old),
        optwire.connect(serving.target, timeout=20) as elsewhere,
    ):
        all_step(zero, old)
        old.freeze()
        new = elsewhere.attach(name, worker=1)
        assert states(client, name)[1].epoch == 2
        zero.begin()
        np.testing.assert_array_equal(new.params()["w"], np.full(5, -mean(0, 1)))
        new.step({"w": np.full(5, 2, FLOAT)})
        assert new.last_ack is not None
        assert (new.last_ack.seq, new.last_ack.step) == (2, 2), "it goes on with the count of the process before"
        assert zero.result()["step"] == 2
        old.thaw()
        said = old.step()
        assert said["error"] == "ReplacedError"
        assert "another process has joined" in said["said"]
        said = old.step(late="params")
        assert said["error"] == "ReplacedError"
        zero.begin()
        new.step({"w": np.full(5, 2, FLOAT)})
        assert zero.result()["step"] == 3
        old.end()  # which leaves, as far as it can
        assert states(client, name)[1].state is State.LIVE


def test_who_comes_late_begins_with_the_newest_parameters(serving: testing.Serving, client: optwire.Client) -> None:
    name = session(client, f"quorum(1, 3, lease_s={LEASE_S})")
    with worker_processes.started(serving.target, name, 0) as (zero,):
        for step in (1, 2, 3):
            assert zero.step()["step"] == step
        with worker_processes.started(serving.target, name, 1) as (one,):
            assert (one.joined["step"], one.joined["value"]) == (3, -3 * mean(0))
            zero.begin()
            wire.until(lambda: states(client, name)[0].has_pushed, "the first waits")
            assert states(client, name)[1].is_awaited
            one.begin()
            for worker in (zero, one):
                said = worker.result()
                assert (said["step"], said["value"]) == (4, FLOAT(-3 * mean(0) - mean(0, 1)))
            start_s = time.monotonic()
            one.end()
            assert states(client, name)[1].state is State.LEFT
        assert zero.step()["step"] == 5
        assert time.monotonic() - start_s < LEASE_S + MORE_S


def test_the_command_says_who_is_waited_for(serving: testing.Serving, client: optwire.Client) -> None:
    name = session(client, f"sync(3, lease_s={LEASE_S})")
    with worker_processes.started(serving.target, name, 0, 1) as (zero, _):
        zero.begin()
        wire.until(lambda: states(client, name)[0].has_pushed, "it has pushed")
        command = [sys.executable, "-m", "optwire_server", "workers", name, "--target", serving.target]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        title, headings, *rows = done.stdout.splitlines()
        assert title == f"session {name!r}: sync(3, lease_s={LEASE_S}), step 0"
        assert headings.split() == ["worker", "epoch", "state", "seq", "base_step", "pushed", "awaited", "silent"]
        assert [row.split()[:7] for row in rows] == [
            ["0", "1", "live", "0", "0", "yes", "no"],
            ["1", "1", "live", "0", "0", "no", "yes"],
            ["2", "0", "expected", "0", "0", "no", "yes"],
        ]


@pytest.mark.parametrize(
    ("name", "target", "code"),
    [("no-such-session", "", 2), (".hidden", "", 64), ("x", "localhost:1", 2), ("x", "nowhere", 64)],
)
def test_the_command_says_why_it_cannot(serving: testing.Serving, name: str, target: str, code: int) -> None:
    command = [sys.executable, "-m", "optwire_server", "workers", name, "--timeout", "2"]
    done = subprocess.run([*command, "--target", target or serving.target], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("optwire workers: ")
    assert "Traceback" not in done.stderr
