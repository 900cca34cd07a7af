"""A real `optwire serve` that is told to end: what is under way finishes, what cannot is told so, and it exits 0."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tests.e2e import wire
from tests.e2e.test_faults import RATE, Local, assert_same

import optwire
from optwire import optimizers as opt
from optwire_proto.v1 import optimizer_pb2 as pb

PARAMS = {"w": np.linspace(-1, 1, 750_000, dtype=np.float32)}
GRADS = {"w": np.linspace(2, -3, 750_000, dtype=np.float32)}
SERVE = (sys.executable, "-m", "optwire_server", "serve", "--listen")
PATIENT_S, HASTY_S = 20.0, 1.0  # how long servers let pushes finish


class Process:
    """`optwire serve` in a process of its own."""

    def __init__(self, directory: pathlib.Path, address: str, drain_s: float) -> None:
        port_file = directory / "port"
        port_file.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [*SERVE, address, "--drain-s", str(drain_s), "--port-file", str(port_file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wire.until(lambda: port_file.exists() and port_file.read_text() != "", "the server serves", 30.0)
        self.target = port_file.read_text()

    def end(self, number: signal.Signals = signal.SIGTERM) -> float:
        """Tells it to end, and returns how many seconds it took."""
        started = time.monotonic()
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=PATIENT_S)
        assert "Traceback" not in output, output
        if number is not signal.SIGKILL:
            assert self.process.returncode == 0, output
        return time.monotonic() - started


@contextlib.contextmanager
def serving(directory: pathlib.Path, address: str = "127.0.0.1:0", drain_s: float = PATIENT_S) -> Iterator[Process]:
    process = Process(directory, address, drain_s)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_with_an_idle_client_ends_at_once(tmp_path: pathlib.Path, number: signal.Signals):
    with serving(tmp_path) as server, optwire.connect(server.target, transport="stream", timeout=3) as client:
        session = client.create_session(PARAMS, opt.adam(RATE))
        assert_same(session.step(GRADS), Local(PARAMS).push(GRADS))
        assert server.end(number) < PATIENT_S
        with pytest.raises((optwire.UnavailableError, optwire.DeadlineError)):
            session.step(GRADS)


def half_frames(session: pb.Session, go_on: threading.Event, begun: threading.Event) -> Iterator[pb.StreamStepsRequest]:
    for index, frame in enumerate(wire.upload(wire.push(session, 1, 0), wire.payload_of(GRADS))):
        if index == 2:
            begun.set()
            go_on.wait(20)
        yield pb.StreamStepsRequest(**{wire._field(frame): frame})


def test_a_push_under_way_is_finished_and_the_stream_told_to_go(tmp_path: pathlib.Path):
    with serving(tmp_path) as server, ThreadPoolExecutor(2) as pool:
        peer = wire.Peer(server.target)
        session = peer.create(PARAMS, opt.adam(RATE), "late")
        go_on, begun = threading.Event(), threading.Event()
        call = pool.submit(lambda: list(peer.stub.StreamSteps(half_frames(session, go_on, begun), timeout=20)))
        assert begun.wait(10)
        time.sleep(0.2)  # the begin and the chunk are on their way to another process that cannot be asked
        ended = pool.submit(server.end)
        time.sleep(0.3)  # into the drain
        go_on.set()
        *frames, last = call.result(20)
        assert last.go_away.reason == "DRAINING"
        assert wire.params_of(frames) == wire.payload_of(Local(PARAMS).push(GRADS))
        assert ended.result(20) < PATIENT_S
        peer.close()


def test_a_push_that_does_not_end_in_time_is_told_that_the_server_leaves(tmp_path: pathlib.Path):
    with serving(tmp_path, drain_s=HASTY_S) as server, ThreadPoolExecutor(2) as pool:
        peer = wire.Peer(server.target)
        session = peer.create(PARAMS, opt.adam(RATE), "never")
        go_on, begun = threading.Event(), threading.Event()
        requests = half_frames(session, go_on, begun)
        call = pool.submit(lambda: wire.Failure.of(lambda: list(peer.stub.StreamSteps(requests, timeout=20))))
        assert begun.wait(10)
        time.sleep(0.2)
        assert HASTY_S - 0.2 < server.end() < PATIENT_S
        failure = call.result(20)
        assert failure is not None
        assert failure.code in ("UNAVAILABLE", "CANCELLED"), failure
        go_on.set()
        peer.close()


def test_new_pushes_are_refused_during_the_drain(tmp_path: pathlib.Path):
    with serving(tmp_path) as server, ThreadPoolExecutor(2) as pool:
        peer = wire.Peer(server.target)
        session = peer.create(PARAMS, opt.adam(RATE), "half")
        small = peer.create({"w": np.zeros(3, np.float32)}, opt.adam(RATE), "small")
        go_on, begun = threading.Event(), threading.Event()
        requests = half_frames(session, go_on, begun)
        call = pool.submit(lambda: wire.Failure.of(lambda: list(peer.stub.StreamSteps(requests, timeout=20))))
        assert begun.wait(10)
        time.sleep(0.2)
        ended = pool.submit(server.end)
        time.sleep(0.3)
        failure = wire.Failure.of(lambda: peer.step(wire.push(small, 1, 0), bytes(12)))
        assert failure is not None
        assert failure.code == "UNAVAILABLE", failure
        go_on.set()
        assert call.result(20) is None
        ended.result(20)
        peer.close()


def test_a_server_killed_and_started_again_says_that_the_session_is_gone(tmp_path: pathlib.Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with serving(tmp_path, address) as server, optwire.connect(address, transport="stream", timeout=20) as client:
        session = client.create_session(PARAMS, opt.adam(RATE), name="lost")
        session.step(GRADS)
        server.end(signal.SIGKILL)
        with serving(tmp_path, address):
            with pytest.raises(optwire.SessionNotFoundError, match="sessions in memory end with the server's process"):
                session.step(GRADS)
            assert client.list_sessions() == []
            again = client.create_session(PARAMS, opt.adam(RATE), name="lost")
            assert_same(again.step(GRADS), Local(PARAMS).push(GRADS))


def test_two_servers_do_not_share_a_port(tmp_path: pathlib.Path):
    with serving(tmp_path) as server:
        second = subprocess.run(
            [*SERVE, server.target],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert second.returncode == 2
        assert "cannot listen on" in second.stderr
