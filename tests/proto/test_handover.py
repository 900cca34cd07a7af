"""What is said on the handover socket: whole messages, or an error in time; descriptors that no child inherits."""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator

import pytest

from optwire_proto import errors, handover

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="descriptors are handed over on Linux")


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with near, far:
        yield near, far


def test_messages_and_a_descriptor_survive(ends: tuple[socket.socket, socket.socket]):
    near, far = ends
    grant = handover.Grant(slot=7, nbytes=2**40, params=2**39, offsets=tuple(range(0, 64 * 5000, 64)))
    with open(os.devnull) as given:
        thread = threading.Thread(
            target=handover.send, args=(near, grant.to_json(), 5), kwargs={"file": given.fileno()}
        )
        thread.start()
        files: list[int] = []
        assert handover.Grant.from_json(handover.receive(far, 10**6, 5, files=files)) == grant
        thread.join()
        assert len(files) == 1
        assert not os.get_inheritable(files[0])
        assert os.fstat(files[0]).st_rdev == os.stat(os.devnull).st_rdev
        os.close(files[0])
    for message in (handover.Request("a" * 32, "b" * 32), handover.Quiet(is_quiet=False, slot=3)):
        handover.send(near, message.to_json(), 5)
        assert type(message).from_json(handover.receive(far, 4096, 5)) == message
    assert handover.peer_user(near) == os.geteuid()


def test_descriptors_that_nobody_asked_for_are_dropped(ends: tuple[socket.socket, socket.socket]):
    near, far = ends
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull) as given:
        for _ in range(20):
            handover.send(near, {}, 5, file=given.fileno())
            assert handover.receive(far, 10, 5) == {}
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (struct.pack(">I", 101), "101 bytes, expected at most 100"),
        (struct.pack(">I", 5) + b"{...}", "no JSON"),
        (struct.pack(">I", 2) + b"[]", "no object"),
        (struct.pack(">I", 2) + b"{", "did not come in time"),
        (b"\0", "did not come in time"),
        (b"", "did not come in time"),
    ],
)
def test_what_is_no_message_is_refused(ends: tuple[socket.socket, socket.socket], said: bytes, problem: str):
    near, far = ends
    near.sendall(said)
    with pytest.raises(handover.HandoverError, match=problem):
        handover.receive(far, 100, 0.2)


def test_the_end_of_the_other_side_is_said(ends: tuple[socket.socket, socket.socket]):
    near, far = ends
    near.sendall(b"\0\0")
    near.close()
    with pytest.raises(handover.HandoverError, match="has gone"):
        handover.receive(far, 100, 5)


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"slot": 1, "nbytes": 2, "params": 1},
        {"slot": 1, "nbytes": 2, "params": 1, "offsets": [-1]},
        {"slot": 1, "nbytes": 2, "params": 1, "offsets": [True]},
        {"slot": 1.0, "nbytes": 2, "params": 1, "offsets": []},
        {"slot": "1", "nbytes": 2, "params": 1, "offsets": []},
        {"quiet": True},
        {"quiet": 1, "slot": 1},
        {"quiet": True, "slot": 0},
        {"session": "a" * 32},
        {"session": "A" * 32, "worker": "b" * 32},
        {"session": "a" * 32, "worker": "b" * 32, "more": 1},
    ],
)
def test_messages_of_another_form_are_refused(message: dict[str, object]):
    for kind in (handover.Request, handover.Grant, handover.Quiet):
        with pytest.raises((handover.HandoverError, errors.InvalidArgumentError)):
            kind.from_json(message)
