"""The registry and its surroundings under pressure: full tables, retries, defects, slow compiles, bad flags."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.e2e import wire

import optwire
from optwire import optimizers as opt
from optwire_proto import digests, errors, payloads, sessions, trees
from optwire_server import clock, config, live, testing
from optwire_server.engine import engine, held
from optwire_server.session import machine

PARAMS = {"w": np.ones(5, np.float32)}
BIG = {"w": np.ones(50_000, np.float32)}


def test_a_defect_during_an_update_is_told_once_and_the_session_goes_on() -> None:
    with testing.serve() as serving, optwire.connect(serving.target) as client:
        session = client.create_session(PARAMS, opt.adam(opt.exponential_decay(0.1, 10, 0.9)), name="hiccup")
        live = serving.server.registry._table.by_name["hiccup"]
        program = live.plan.program
        schedule, program.learning_rate = program.learning_rate, fail
        with pytest.raises(optwire.InternalError, match="changed nothing"):
            session.step(PARAMS)
        program.learning_rate = schedule
        session.step(PARAMS)
        assert session.step_count == 1


def fail(*_: Any) -> float:
    raise MemoryError("no room for a number")


def test_a_session_that_cannot_be_described_can_be_deleted() -> None:
    with testing.serve() as serving, optwire.connect(serving.target) as client:
        client.create_session(PARAMS, opt.adam(opt.exponential_decay(0.1, 10, 0.9)), name="blurred")
        serving.server.registry._table.by_name["blurred"].plan.program.learning_rate = fail
        with pytest.raises(optwire.InternalError):
            client.delete_session("blurred")
        assert client.list_sessions() == []
        client.create_session(PARAMS, opt.sgd(0.1), name="blurred")


def test_whatever_an_answer_raises_all_who_wait_are_told() -> None:
    with (
        testing.serve() as serving,
        optwire.connect(serving.target, timeout=10) as client,
        concurrent.futures.ThreadPoolExecutor(3) as pool,
    ):
        first = client.create_session(PARAMS, opt.sgd(0.1), name="told", aggregation="sync(3)")
        workers = [first, *(client.attach("told", worker=rank) for rank in (1, 2))]
        live = serving.server.registry._table.by_name["told"]
        serving.server.registry._engine.params = fail  # type: ignore[method-assign]
        pushes = []
        for rank, worker in enumerate(workers):
            pushes.append(pool.submit(worker.step, PARAMS))
            wire.until(lambda rank=rank: len(live.machine.gathered) == rank + 1 or rank == 2, "gathered")
        for push in pushes:
            with pytest.raises(optwire.InternalError):
                push.result(10)


class Driven:
    """A session whose workers call the registry itself, with pushes as they like."""

    def __init__(self, serving: testing.Serving, name: str) -> None:
        self.registry = serving.server.registry
        self.live = self.registry._table.by_name[name]

    def join(self, *ranks: int) -> None:
        for rank in ranks:
            self.registry.join(sessions.worker_id(rank), f"{rank + 1:032x}", name=self.live.machine.name)

    def push(self, rank: int, seq: int, base: int, value: float) -> live.Reply:
        key = sessions.PushKey(
            session_id=self.live.machine.id,
            incarnation=1,
            worker=sessions.worker_id(rank),
            seq=seq,
            base_step=base,
            epoch=1,
        )
        payload = np.full(5, value, np.float32).tobytes()
        with self.registry.pushing(key) as push:
            push.landing.write(0, payload)
            outcome = self.registry.push(push, digests.digest(payload))
            return outcome if isinstance(outcome, live.Reply) else self.registry.wait(push, outcome, lambda: True)

    def beat(self, rank: int) -> None:
        self.registry.beat(self.live.machine.id, sessions.worker_id(rank), 1)

    def states(self) -> dict[int, str]:
        infos = self.registry.workers(name=self.live.machine.name)
        return {int(info.worker, 16): str(info.state) for info in infos}

    def held(self, count: int) -> None:
        """Waits until so many calls wait for other workers."""
        waiting = self.live.room._waiting
        wire.until(lambda: sum(map(len, list(waiting.values()))) == count, f"{count} calls wait")


@contextlib.contextmanager
def driven(aggregation: str) -> Iterator[tuple[Driven, concurrent.futures.ThreadPoolExecutor]]:
    with (
        wire.served() as serving,
        optwire.connect(serving.target) as client,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        client.create_session(PARAMS, opt.sgd(1.0), name="driven", aggregation=aggregation)
        yield Driven(serving, "driven"), pool


def test_a_retry_that_makes_the_step_answers_the_calls_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.Clock, "watch", lambda *_: None)  # time passes, and nobody says so
    with driven("quorum(1, 2, deadline_s=0.3)") as (session, pool):
        session.join(0, 1)
        first = pool.submit(session.push, 0, 1, 0, 2.0)
        session.held(1)
        time.sleep(0.4)
        assert session.push(0, 1, 0, 2.0).ack.applied_step == 1
        reply = first.result(10)
        assert (reply.ack.applied_step, reply.ack.step, reply.params[0][0]) == (1, 1, -1.0)
        reply.params.clear()


def test_a_retry_of_what_counts_takes_no_part_in_the_step_that_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.Clock, "watch", lambda *_: None)
    with driven("quorum(1, 2, deadline_s=0.3)") as (session, pool):
        session.join(0)
        session.push(0, 1, 0, 100.0)
        session.join(1)
        second = pool.submit(session.push, 0, 2, 1, 2.0)
        session.held(1)
        time.sleep(0.4)
        assert session.push(0, 1, 0, 100.0).ack.duplicate
        session.registry._runner._tick(session.live)
        reply = second.result(10)
        assert (reply.ack.applied_step, reply.params[0][0]) == (2, 1.0 - 100.0 - 2.0)
        reply.params.clear()


def test_what_follows_an_answer_is_done_though_the_answer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with driven("bounded_staleness(1, policy=wait)") as (session, pool):
        session.join(0, 1)
        session.push(0, 1, 0, 1.0).params.clear()
        fast = pool.submit(session.push, 0, 2, 1, 1.0)
        session.held(1)
        params, failing = session.registry._engine.params, [fail]
        monkeypatch.setattr(
            session.registry._engine, "params", lambda *given: (failing.pop() if failing else params)(*given)
        )
        with pytest.raises(MemoryError):
            session.push(1, 1, 0, 1.0)
        fast.result(10).params.clear()
        assert (session.live.machine.step, session.live.machine.phase) == (3, machine.Phase.OPEN)


def test_heartbeats_count_though_the_session_is_busy_for_longer_than_a_lease() -> None:
    with driven("sync(2, lease_s=0.3)") as (session, pool):
        session.join(0, 1)
        is_over = threading.Event()

        def busy() -> Iterator[None]:
            while not is_over.is_set():
                time.sleep(0.005)
                yield

        working = pool.submit(session.registry._engine.work, busy(), session.live.held)
        for _ in range(10):
            began_s = time.monotonic()
            session.beat(0)
            assert time.monotonic() - began_s < 0.3, "it waits for nobody's turn"
            time.sleep(0.1)
        assert session.registry.workers(name="driven")[0].silent_s < 0.3
        is_over.set()
        working.result(10)
        wire.until(lambda: session.states()[1] == "lost", "its lease is over")
        session.beat(0)
        assert session.states()[0] == "live"
        wire.until(lambda: session.states()[0] == "lost", "now its own is")
        session.beat(0)
        assert session.states()[0] == "live"


def test_the_time_of_a_push_is_when_it_came_and_not_its_turn() -> None:
    with driven("quorum(1, 3, deadline_s=60)") as (session, pool):
        session.join(0, 1)
        is_over = threading.Event()

        def busy() -> Iterator[None]:
            while not is_over.wait(0.005):
                yield

        working = pool.submit(session.registry._engine.work, busy(), session.live.held)
        waiting = pool.submit(session.push, 0, 1, 0, 1.0)
        time.sleep(0.5)
        is_over.set()
        working.result(10)
        session.held(1)
        assert time.monotonic() - session.live.machine.opened_s >= 0.4
        session.push(1, 1, 0, 1.0).params.clear()
        waiting.result(10).params.clear()


def test_what_was_due_and_went_wrong_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_AGAIN_S", 0.01)
    calls, is_done = [fail], threading.Event()
    watch = clock.Clock(lambda _: calls.pop()() if calls else is_done.set())
    with driven("async") as (session, _):
        watch.watch(session.live, time.monotonic())
        assert is_done.wait(10)
    watch.close()


def test_a_session_that_fails_holds_no_memory_of_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    with driven("async(compensation=1)") as (session, _):
        session.join(0)
        session.push(0, 1, 0, 1.0).params.clear()
        assert session.live.given

        def lost(*_: Any) -> Any:
            raise held.UpdateError("the device is lost", state_lost=True)

        monkeypatch.setattr(session.registry._engine, "update", lost)
        with pytest.raises(errors.SessionFailedError):
            session.push(0, 2, 1, 1.0)
        assert (session.live.given, session.live.added, session.live.held.state) == ({}, None, None)


def test_a_creation_tried_again_on_a_full_server_finds_its_session() -> None:
    with testing.serve(sessions_max=1) as serving:
        registry = serving.server.registry
        flat = trees.flatten(PARAMS)
        for _ in range(2):
            with registry.creations.creating("only", flat.spec, opt.sgd(0.1), "a" * 32) as creation:
                data = b"".join(payloads.pieces(list(flat.arrays)))
                creation.landing.write(0, data)
                assert registry.creations.create(creation, digests.digest(data)).name == "only"
        with (
            pytest.raises(errors.LimitError, match="sessions_max: 2, expected at most 1"),
            registry.creations.creating("another", flat.spec, opt.sgd(0.1), "b" * 32),
        ):
            pass


def test_room_is_kept_for_sessions_that_are_being_created() -> None:
    flat = trees.flatten(PARAMS)
    with testing.serve(sessions_max=1) as serving:
        registry = serving.server.registry
        with registry.creations.creating("first", flat.spec, opt.sgd(0.1), "a" * 32):
            with (
                pytest.raises(errors.LimitError) as refused,
                registry.creations.creating("second", flat.spec, opt.sgd(0.1), "b" * 32),
            ):
                pass
            assert refused.value.retry_after_s > 0
        with registry.creations.creating("second", flat.spec, opt.sgd(0.1), "b" * 32):
            pass


def test_an_idle_stream_makes_room_for_the_next_call() -> None:
    with (
        testing.serve(streams_max=1) as serving,
        optwire.connect(serving.target, transport="stream", timeout=10) as client,
    ):
        first = client.create_session(BIG, opt.sgd(0.1), name="first")
        second = client.create_session(BIG, opt.sgd(0.1), name="second")
        for _ in range(3):
            first.step(BIG)
            second.step(BIG)
            first.params()
        assert (first.step_count, second.step_count) == (3, 3)


def test_a_tree_too_large_to_be_described_is_refused_before_it_is_created() -> None:
    # Each name stands in its leaf and as a key of the nest: together just below what one message may carry.
    params = {f"{index:04}" + "x" * 996: np.ones(1, np.float32) for index in range(2065)}
    with testing.serve(leaves_max=4096) as serving, optwire.connect(serving.target) as client:
        with pytest.raises(optwire.LimitError, match="tree and spec: 41[0-9]* bytes as a message"):
            client.create_session(params, opt.sgd(0.1), name="long-names")
        assert client.list_sessions() == []


def test_more_leaves_than_the_server_compiles_are_refused_by_number() -> None:
    params = [np.ones(1, np.float32)] * 9
    with (
        testing.serve(leaves_max=8) as serving,
        optwire.connect(serving.target) as client,
        pytest.raises(optwire.LimitError, match="leaves_max: 9, expected at most 8"),
    ):
        client.create_session(params, opt.sgd(0.1))


def test_reading_counts_as_bytes_in_flight() -> None:
    with testing.serve() as serving, optwire.connect(serving.target) as client:
        client.create_session(BIG, opt.sgd(0.1), name="read")
        registry = serving.server.registry
        with registry.reading(name="read"):
            assert registry._landings.lent_bytes >= 200_000
        assert registry._landings.lent_bytes == 0


def test_a_program_is_compiled_once_however_many_ask() -> None:
    running = engine.Engine()
    tree = trees.flatten([np.ones((3, n), np.float32) for n in range(1, 6)]).spec
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        programs = list(
            pool.map(lambda rate: running.compile(running.check(opt.adam(rate)), tree), [0.1 + i for i in range(8)])
        )
    assert all(program is programs[0] for program in programs)
    running.close()


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "127.0.0.1", ":50051", "localhost:http", "[::1]"])
def test_an_address_that_is_none_is_refused_with_its_form(address: str) -> None:
    with pytest.raises(ValueError, match="expected host:port with a port from 0 to 65535"):
        config.ServerConfig(listen=(address,))


@pytest.mark.parametrize("address", ["0.0.0.0:1", "192.0.2.1:50051", "[::]:50051", "example.org:50051"])
def test_an_address_beyond_loopback_wants_to_be_called_insecure(address: str) -> None:
    with pytest.raises(ValueError, match="not a loopback address"):
        config.ServerConfig(listen=(address,))
    assert config.ServerConfig(listen=(address,), insecure=True).listen == (address,)


@pytest.mark.parametrize("field", ["sessions_max", "streams_max", "landing_bytes_max", "stall_s", "drain_s"])
def test_limits_must_be_positive(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: 0, expected more than 0"):
        config.ServerConfig(**{field: 0})


@pytest.mark.parametrize(("streams", "threads"), [(1, 128), (96, 128), (97, 129), (1100, 1132)])
def test_there_are_threads_for_as_many_streams_as_are_asked_for(streams: int, threads: int) -> None:
    flags = config.parser().parse_args(["serve", "--streams-max", str(streams)])
    assert config.from_flags(flags).threads == threads
    with pytest.raises(ValueError, match=f"threads: {streams}, expected more than streams_max"):
        config.ServerConfig(threads=streams, streams_max=streams)


def test_flags_are_the_configuration() -> None:
    argv = ["serve", "--listen", "127.0.0.1:0", "--listen", "unix:/tmp/x", "--sessions-max", "7", "--drain-s", "0.5"]
    flags: argparse.Namespace = config.parser().parse_args(argv)
    made = config.from_flags(flags)
    assert (made.listen, made.sessions_max, made.drain_s) == (("127.0.0.1:0", "unix:/tmp/x"), 7, 0.5)
    assert config.from_flags(config.parser().parse_args(["serve"])) == config.ServerConfig()


def optwire_serve(*flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "optwire_server", "serve", "--listen", "127.0.0.1:0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--listen", "127.0.0.1:70000"), 64, "expected host:port"),
        (("--listen", "0.0.0.0:0"), 64, "--insecure"),
        (("--port-file", "/nonexistent/port"), 2, "/nonexistent/port"),
        (("--listen", "unix:/nonexistent/socket"), 2, "cannot listen on unix:/nonexistent/socket"),
    ],
    ids=str,
)
def test_serve_says_what_is_wrong_with_its_flags_and_ends(flags: tuple[str, ...], code: int, message: str) -> None:
    process = optwire_serve(*flags)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert message in stderr
    assert "Traceback" not in stderr


def test_sigterm_does_not_wait_for_a_compile(tmp_path: pathlib.Path) -> None:
    port_file = tmp_path / "port"
    process = optwire_serve("--port-file", str(port_file), "--drain-s", "0.5")
    deadline = time.monotonic() + 60
    while not port_file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    code = (
        "import sys, numpy as np, optwire; from optwire import optimizers as opt; "
        "params = [np.ones((2, n), np.float32) for n in range(1, 1200)]; "
        "optwire.connect(sys.argv[1]).create_session(params, opt.sm3(0.1))"
    )
    client = subprocess.Popen([sys.executable, "-c", code, port_file.read_text()], stderr=subprocess.DEVNULL)
    try:
        time.sleep(3.0)  # well within the compile, which takes longer than this test may
        assert client.poll() is None
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
        assert process.returncode == 0
        assert time.monotonic() - started < 10
    finally:
        client.kill()
        client.wait()
