"""What goes wrong: typed errors, deadlines, retries over broken connections, Ctrl-C. Against the real server."""

import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid

import grpc
import numpy as np
import pytest

import optwire
from optwire import optimizers as opt
from optwire_server import testing

SMALL, LARGE = 100, 1_000_000  # elements of float32: one message, four chunks


def ones(size: int) -> np.ndarray:
    return np.ones(size, np.float32)


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4().hex}"


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------- typed errors


def test_an_unknown_session_is_named(client):
    for call in (lambda: client.attach("no-such"), lambda: client.delete_session("no-such")):
        with pytest.raises(optwire.SessionNotFoundError, match="no-such") as caught:
            call()
        assert isinstance(caught.value, LookupError)
        assert isinstance(caught.value.__cause__, grpc.RpcError)


def test_a_name_that_is_taken_is_named(client, name):
    client.create_session(ones(2), opt.sgd(0.1), name=name)
    with pytest.raises(optwire.SessionExistsError, match=name):
        client.create_session(ones(2), opt.sgd(0.1), name=name)


@pytest.mark.parametrize("wrong", ["", ".hidden", "a/b", "x" * 129])
def test_a_name_that_cannot_be_is_refused(client, wrong):
    with pytest.raises(optwire.InvalidArgumentError, match="session name"):
        client.create_session(ones(2), opt.sgd(0.1), name=wrong)
    with pytest.raises(optwire.InvalidArgumentError, match="session name"):
        client.attach(wrong)


def test_a_spec_that_is_none_or_unknown_is_refused(client):
    with pytest.raises(optwire.SpecError, match=r"expected an optimizer of optwire\.optimizers"):
        client.create_session(ones(2), 0.1)
    with pytest.raises(optwire.SpecError, match="adam: missing argument 'step_size'"):
        client.create_session(ones(2), "adam")
    with pytest.raises(optwire.SpecError, match=r"'lionn': unknown optimizer \(did you mean 'lion'"):
        client.create_session(ones(2), opt.Spec("lionn"))


def test_params_that_cannot_be_served_are_refused(client):
    with pytest.raises(optwire.TreeError, match=r"params\['w'\]: element type object"):
        client.create_session({"w": np.array([None])}, opt.sgd(0.1))
    with pytest.raises(optwire.TreeError, match="no arrays"):
        client.create_session({}, opt.sgd(0.1))


def test_a_deleted_session_ends_its_handles(client, name):
    session = client.create_session(ones(LARGE), opt.sgd(0.1), name=name)
    session.step(ones(LARGE))
    client.delete_session(name)
    for call in (lambda: session.step(ones(LARGE)), session.params, session.info):
        with pytest.raises(optwire.SessionNotFoundError):
            call()


def test_an_error_in_the_middle_of_an_upload_ends_it_at_once(client, name):
    session = client.create_session(ones(30 * LARGE), opt.sgd(0.1), name=name)
    start = time.monotonic()
    with pytest.raises(optwire.FutureStepError):
        session.step(ones(30 * LARGE), base_step=5)
    assert time.monotonic() - start < 5
    session.step(ones(30 * LARGE))
    assert session.step_count == 1


# -------------------------------------------------------------------------------------------------- nobody to talk to


def test_a_server_that_is_not_there_is_unavailable_after_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    start = time.monotonic()
    client = optwire.connect(f"127.0.0.1:{port}", timeout=1.0)
    with client, pytest.raises(optwire.UnavailableError, match=r"server_info: no answer after \d+ tries") as caught:
        client.server_info()
    assert isinstance(caught.value, ConnectionError)
    assert isinstance(caught.value.__cause__, optwire.UnavailableError)
    assert isinstance(caught.value.__cause__.__cause__, grpc.RpcError)
    assert time.monotonic() - start < 2


def test_a_server_that_never_answers_is_a_deadline_error():
    silent = socket.create_server(("127.0.0.1", 0))
    client = optwire.connect(f"127.0.0.1:{silent.getsockname()[1]}", timeout=0.5)
    start = time.monotonic()
    with silent, client, pytest.raises(optwire.DeadlineError, match=r"within 0.5 s") as caught:
        client.server_info()
    assert isinstance(caught.value, TimeoutError)
    assert 0.4 < time.monotonic() - start < 2


def test_a_server_that_comes_late_is_found(server, relay):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    relays = []
    late = threading.Timer(0.7, lambda: relays.append(type(relay)(server.target, port)))
    late.start()
    with optwire.connect(f"127.0.0.1:{port}", timeout=10) as client:
        assert client.server_info().version
    late.join()
    relays[0].close()


# ------------------------------------------------------------------------------------- a push whose answer is missing


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["unary", "stream"])
def test_a_push_whose_answer_was_lost_is_answered_not_applied_again(client, relay, name, size):
    """Quotes the README: "A retry is answered, never re-applied." """
    observer = client.create_session(ones(size), opt.sgd(0.25), name=name)
    with optwire.connect(relay.target) as remote:
        session = remote.attach(name)
        session.step(ones(size))
        relay.hold_replies()
        breaker = threading.Thread(target=lambda: (wait_until(lambda: observer.info().step == 2), relay.cut()))
        breaker.start()
        params = session.step(ones(size))
        breaker.join()
        assert session.last_ack.duplicate
        assert session.step_count == observer.info().step == 2
        assert np.array_equal(params, 0.5 * ones(size))
        session.step(ones(size))
        assert not session.last_ack.duplicate


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["unary", "stream"])
def test_after_a_deadline_the_same_gradients_are_answered_right(client, relay, name, size):
    observer = client.create_session(ones(size), opt.sgd(0.25), name=name)
    with optwire.connect(relay.target, timeout=1.0) as remote:
        session = remote.attach(name)
        session.step(ones(size))
        relay.hold_replies()
        start = time.monotonic()
        with pytest.raises(optwire.DeadlineError, match="may or may not have been applied"):
            session.step(ones(size))
        assert time.monotonic() - start < 5
        assert session.step_count == 1
        wait_until(lambda: observer.info().step == 2)
        relay.cut()
        assert np.array_equal(session.step(ones(size)), 0.5 * ones(size))
        assert session.last_ack.duplicate
        assert observer.info().step == 2


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["unary", "stream"])
def test_after_a_deadline_other_gradients_are_refused_until_params_are_read(client, relay, name, size):
    observer = client.create_session(ones(size), opt.sgd(0.25), name=name)
    with optwire.connect(relay.target, timeout=1.0) as remote:
        session = remote.attach(name)
        session.step(ones(size))
        relay.hold_replies()
        with pytest.raises(optwire.DeadlineError):
            session.step(ones(size))
        wait_until(lambda: observer.info().step == 2)
        relay.cut()
        with pytest.raises(optwire.DivergentRetryError):
            session.step(2 * ones(size))
        assert np.array_equal(session.params(), 0.5 * ones(size))
        assert session.step_count == 2
        assert np.array_equal(session.step(2 * ones(size)), 0 * ones(size))


def test_creating_over_a_broken_connection_makes_one_session(client, relay, name):
    with optwire.connect(relay.target) as remote:
        remote.server_info()
        relay.hold_replies()
        created = threading.Thread(
            target=lambda: (wait_until(lambda: name in [info.name for info in client.list_sessions()]), relay.cut())
        )
        created.start()
        session = remote.create_session(ones(SMALL), opt.sgd(0.25), name=name)
        created.join()
        assert session.id == client.attach(name).id


def test_deleting_over_a_broken_connection_succeeds(client, relay, name):
    client.create_session(ones(SMALL), opt.sgd(0.25), name=name)
    with optwire.connect(relay.target) as remote:
        remote.server_info()
        relay.hold_replies()
        breaker = threading.Thread(
            target=lambda: (wait_until(lambda: name not in [i.name for i in client.list_sessions()]), relay.cut())
        )
        breaker.start()
        remote.delete_session(name)
        breaker.join()
        with pytest.raises(optwire.SessionNotFoundError):
            remote.delete_session(name)


def test_a_broken_connection_between_steps_goes_unnoticed(relay):
    with optwire.connect(relay.target) as remote:
        session = remote.create_session(ones(LARGE), opt.sgd(0.25))
        for _ in range(4):
            session.step(ones(LARGE))
            relay.cut()
        assert session.step_count == 4


def test_a_stream_that_the_server_closed_for_idleness_is_reopened():
    with testing.serve(idle_s=0.3) as server, optwire.connect(server.target) as client:
        session = client.create_session(ones(LARGE), opt.sgd(0.25))
        for _ in range(3):
            session.step(ones(LARGE))
            time.sleep(0.6)
        assert session.step_count == 3


def test_a_server_without_a_free_stream_is_asked_again():
    with testing.serve(streams_max=1) as server, optwire.connect(server.target, timeout=10) as client:
        first = client.create_session(ones(LARGE), opt.sgd(0.25))
        second = client.create_session(ones(LARGE), opt.sgd(0.25))
        first.step(ones(LARGE))
        later = threading.Timer(0.5, first.close)
        later.start()
        second.step(ones(LARGE))
        later.join()


def test_a_restarted_server_holds_no_sessions():
    with testing.serve() as server:
        target = server.target
        client = optwire.connect(target, timeout=10)
        session = client.create_session(ones(LARGE), opt.sgd(0.25))
        session.step(ones(LARGE))
    with client, testing.serve(listen=(target,)), pytest.raises(optwire.SessionNotFoundError):
        session.step(ones(LARGE))


@pytest.mark.parametrize(("size", "pause_max_s"), [(SMALL, 0.02), (LARGE, 0.3)], ids=["unary", "stream"])
def test_every_push_is_applied_once_however_often_connections_break(relay, size, pause_max_s):
    """Quotes the README: "A push is applied at most once, and once acknowledged it stays applied." """
    done = threading.Event()
    rng = random.Random(11)

    def break_connections():
        while not done.wait(rng.uniform(0.0, pause_max_s)):
            relay.cut()

    breaker = threading.Thread(target=break_connections)
    with optwire.connect(relay.target) as remote:
        session = remote.create_session(ones(size), opt.sgd(1.0))
        breaker.start()
        for step in range(40):
            params = session.step(ones(size))
            assert session.last_ack.applied_step == step + 1
        done.set()
        breaker.join()
    assert np.array_equal(params, (1 - 40) * ones(size))


def test_closing_the_client_ends_a_step_of_another_thread(relay):
    caught = []
    remote = optwire.connect(relay.target)
    session = remote.create_session(ones(LARGE), opt.sgd(0.25))
    session.step(ones(LARGE))
    relay.hold_replies()

    def step():
        try:
            session.step(ones(LARGE))
        except optwire.OptwireError as exc:
            caught.append(exc)

    thread = threading.Thread(target=step)
    thread.start()
    time.sleep(0.3)
    remote.close()
    thread.join(5)
    assert [type(exc) for exc in caught] == [optwire.DetachedError]


# -------------------------------------------------------------------------------------------------------------- Ctrl-C

INTERRUPTED = """
    import signal
    # A shell that runs the tests in the background has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import sys, time
    import numpy as np, optwire
    target, name, size, catch = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "catch"
    client = optwire.connect(target, transport=sys.argv[5])
    session = client.attach(name)
    grads = np.ones(size, np.float32)
    session.step(grads)
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        print("stepping", flush=True)
        session.step(grads)
    except KeyboardInterrupt:
        if not catch:
            raise
        print("interrupted", flush=True)
        sys.stdin.readline()
        session.step(grads)
        print("duplicate", session.last_ack.duplicate, "step", session.step_count, flush=True)
"""


def start_child(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(INTERRUPTED), *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


def interrupt_step(child: subprocess.Popen[str], relay, observer) -> None:
    """Interrupts the child's second step after it was applied and before it was answered."""
    assert child.stdout.readline() == "ready\n"
    relay.hold_replies()
    child.stdin.write("\n")
    assert child.stdout.readline() == "stepping\n"
    wait_until(lambda: observer.info().step == 2)
    os.kill(child.pid, signal.SIGINT)


WAYS = [(SMALL, "unary"), (LARGE, "stream"), (LARGE, "shared_memory")]


@pytest.mark.parametrize(("size", "transport"), WAYS)
def test_ctrl_c_in_a_step_ends_the_process_promptly(client, relay, name, size, transport):
    observer = client.create_session(ones(size), opt.sgd(0.25), name=name)
    with start_child(relay.target, name, size, "raise", transport) as child:
        interrupt_step(child, relay, observer)
        start = time.monotonic()
        try:
            _, stderr = child.communicate(timeout=10)
        finally:
            child.kill()
        assert time.monotonic() - start < 3
        assert "KeyboardInterrupt" in stderr
        assert child.returncode == -signal.SIGINT


@pytest.mark.parametrize(("size", "transport"), WAYS)
def test_after_ctrl_c_the_same_gradients_are_answered_right(client, relay, name, size, transport):
    observer = client.create_session(ones(size), opt.sgd(0.25), name=name)
    with start_child(relay.target, name, size, "catch", transport) as child:
        interrupt_step(child, relay, observer)
        assert child.stdout.readline() == "interrupted\n"
        relay.cut()
        stdout, stderr = child.communicate("\n", timeout=20)
        assert stdout == "duplicate True step 2\n", stderr
        assert child.returncode == 0
        assert observer.info().step == 2


def test_ctrl_c_in_the_middle_of_an_upload_ends_the_process_promptly(client, relay, name):
    size = 30 * LARGE  # far more than connections hold on their way
    observer = client.create_session(ones(size), opt.sgd(0.25), name=name)
    with start_child(relay.target, name, size, "raise", "stream") as child:
        assert child.stdout.readline() == "ready\n"
        relay.hold_replies()  # and with them the word that more may be sent
        child.stdin.write("\n")
        assert child.stdout.readline() == "stepping\n"
        time.sleep(0.5)
        os.kill(child.pid, signal.SIGINT)
        start = time.monotonic()
        try:
            _, stderr = child.communicate(timeout=10)
        finally:
            child.kill()
        assert time.monotonic() - start < 3
        assert "KeyboardInterrupt" in stderr
        assert child.returncode == -signal.SIGINT
    assert observer.info().step == 1
    client.delete_session(name)
