"""Steps in the background: their order, their errors, and what becomes of them when the handle is closed."""

from __future__ import annotations

import concurrent.futures
import gc
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import optwire
from optwire import _options
from optwire import optimizers as opt
from optwire_server import testing

GRADS = [np.ones(3, np.float32)]


@pytest.fixture(params=["stream", "unary", "auto"])
def session(request: pytest.FixtureRequest, server: testing.Serving):
    with optwire.connect(server.target, transport=request.param) as client:
        yield client.create_session([np.zeros(3, np.float32)], opt.sgd(1.0))


def workers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("optwire-")}


def test_futures_come_true_in_the_order_they_were_asked_for(session: optwire.Session):
    ends: list[int] = []
    futures = [session.step_async(GRADS) for _ in range(20)]
    for number, future in enumerate(futures):
        future.add_done_callback(lambda _, number=number: ends.append(number))
    assert [future.result()[0][0] for future in futures] == [-1.0 - number for number in range(20)]
    session.params()
    assert ends == list(range(20))
    assert session.step_count == 20


def test_other_calls_wait_for_what_was_asked_for_before_them(session: optwire.Session):
    for number in range(1, 6):
        future = session.step_async(GRADS)
        assert session.params()[0][0] == -2.0 * number + 1
        assert future.done()
        assert session.step(GRADS)[0][0] == -2.0 * number


def test_arguments_and_errors_are_those_of_a_step(session: optwire.Session):
    out = session.param_buffers()
    assert session.step_async(GRADS, 0, grad_scale=2.0, telemetry=True, out=out).result() is out
    assert out[0][0] == -0.5
    assert session.last_ack is not None
    assert session.last_ack.metrics
    wrong = session.step_async([np.ones(4, np.float32)])
    stale = session.step_async(GRADS, 0)
    right = session.step_async(GRADS, reply="none")
    with pytest.raises(optwire.TreeMismatchError, match=r"shape \(4,\)"):
        wrong.result()
    assert isinstance(stale.exception(), optwire.StaleStepError)
    assert right.result() is None
    with pytest.raises(TypeError, match="nonsense"):
        session.step_async(GRADS, nonsense=1)  # at once: it would never be a push
    assert session.params()[0][0] == -1.5


def test_a_callback_may_use_the_handle(session: optwire.Session):
    seen: list[float] = []
    future = session.step_async(GRADS)
    future.add_done_callback(lambda _: seen.append(session.step(GRADS)[0][0]))
    concurrent.futures.wait([future])
    session.params()
    assert len(seen) == 1


def test_one_thread_is_made_when_it_is_needed_and_ends_with_the_handle(server: testing.Serving):
    others = workers()
    with optwire.connect(server.target) as client:
        session = client.create_session([np.zeros(3, np.float32)], opt.sgd(1.0), name="background")
        session.step(GRADS)
        assert not {t for t in workers() - others if "background" in t.name}
        for _ in range(3):
            session.step_async(GRADS).result()
        (thread,) = {t for t in workers() - others if "background" in t.name}
        assert thread.daemon
        session.close()
        assert not thread.is_alive()
        with pytest.raises(optwire.DetachedError, match="this handle was closed"):
            session.step_async(GRADS)


def test_the_thread_of_a_forgotten_handle_ends(server: testing.Serving):
    with optwire.connect(server.target) as client:
        session = client.create_session([np.zeros(3, np.float32)], opt.sgd(1.0), name="forgotten")
        session.step_async(GRADS).result()
        (thread,) = {t for t in workers() if "forgotten" in t.name}
        del session
        gc.collect()
        thread.join(5.0)
        assert not thread.is_alive()


@pytest.fixture(params=["stream", "unary"])
def session_behind(request: pytest.FixtureRequest, relay):
    with optwire.connect(relay.target, transport=request.param, timeout=10.0) as client:
        session = client.create_session([np.zeros(3, np.float32)], opt.sgd(1.0))
        session.step(GRADS)
        yield session


def wait_until(condition) -> None:
    end = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def test_a_future_can_be_cancelled_until_its_turn_comes(session_behind: optwire.Session, relay):
    relay.hold_replies()
    running, cancelled, last = (session_behind.step_async(GRADS) for _ in range(3))
    wait_until(running.running)
    assert cancelled.cancel()
    assert not running.cancel()
    relay.cut()
    assert running.result()[0][0] == -2.0  # sent again, and applied once
    assert last.result()[0][0] == -3.0
    with pytest.raises(concurrent.futures.CancelledError):
        cancelled.result()
    assert session_behind.params()[0][0] == -3.0


def test_closing_waits_for_what_is_under_way_and_refuses_what_is_not(session_behind: optwire.Session, relay):
    relay.hold_replies()
    running, waiting = (session_behind.step_async(GRADS) for _ in range(2))
    wait_until(running.running)
    closing = threading.Thread(target=session_behind.close)
    closing.start()
    wait_until(lambda: "closed" in repr(session_behind))
    assert not running.done()
    relay.cut()
    closing.join(10.0)
    assert not closing.is_alive()
    assert running.result()[0][0] == -2.0
    assert isinstance(waiting.exception(), optwire.DetachedError)


def test_a_callback_may_close_the_handle(session: optwire.Session):
    future = session.step_async(GRADS)
    future.add_done_callback(lambda _: session.close())
    future.result()
    wait_until(lambda: "closed" in repr(session))


def test_threads_that_ask_at_once_are_served_one_after_the_other(session: optwire.Session):
    def ask(kind: int) -> None:
        for _ in range(10):
            session.step(GRADS) if kind % 2 else session.step_async(GRADS).result()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert session.params()[0][0] == -40.0
    assert session.step_count == 40


def test_whoever_asks_for_more_than_may_wait_waits(session_behind: optwire.Session, relay):
    relay.hold_replies()
    running = session_behind.step_async(GRADS)
    wait_until(running.running)
    waiting = [session_behind.step_async(GRADS) for _ in range(_options.WAITING_MAX)]
    more = threading.Thread(target=lambda: waiting.append(session_behind.step_async(GRADS)))
    # A callback may ask on the thread itself, which cannot wait for itself.
    running.add_done_callback(lambda _: waiting.append(session_behind.step_async(GRADS)))
    more.start()
    more.join(0.2)
    assert more.is_alive()
    assert len(waiting) == _options.WAITING_MAX
    relay.cut()
    more.join(10.0)
    assert not more.is_alive()
    concurrent.futures.wait(waiting)
    assert session_behind.params()[0][0] == -1.0 - 1 - len(waiting)


SCRIPT = """
import sys, numpy as np, optwire
session = optwire.connect(sys.argv[1], timeout=float(sys.argv[2])).attach("at-exit")
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    session.step_async([np.ones(3, np.float32)])
"""


def test_a_program_that_ends_has_made_the_pushes_it_asked_for(server: testing.Serving):
    with optwire.connect(server.target) as client:
        session = client.create_session([np.zeros(3, np.float32)], opt.sgd(1.0), name="at-exit")
        command = [sys.executable, "-c", SCRIPT, server.target, "20"]
        done = subprocess.run(command, input="\n", capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")
        assert session.params()[0][0] == -20.0
        client.delete_session("at-exit")


def test_a_program_that_ends_waits_for_no_more_than_one_push_that_fails(server: testing.Serving, relay):
    with optwire.connect(server.target) as client:
        client.create_session([np.zeros(3, np.float32)], opt.sgd(1.0), name="at-exit")
        command = [sys.executable, "-c", SCRIPT, relay.target, "1"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            relay.hold_replies()
            start_s = time.monotonic()
            _, said = process.communicate("\n", timeout=60)
            assert time.monotonic() - start_s < 10
        assert "19 pushes of step_async were dropped after one that failed" in said
        assert process.returncode == 0
        client.delete_session("at-exit")
