"""Parameters on their way out while the session goes on: a reader sees one step whole, however slowly it reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tests.e2e import wire

from optwire import optimizers as opt
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_server import testing

SIZE = 4 * 2**20  # elements: 16 MiB, more than gRPC buffers on the way


@pytest.fixture
def serving() -> Iterator[testing.Serving]:
    with wire.served() as serving:
        yield serving


def counting(peer: wire.Peer) -> pb.Session:
    """A session whose parameters all equal its step."""
    return peer.create({"w": np.zeros(SIZE, np.float32)}, opt.sgd(1.0), "readers")


def count(peer: wire.Peer, session: pb.Session, steps: range) -> None:
    payload = wire.payload_of({"w": np.full(SIZE, -1.0, np.float32)})
    for step in steps:
        frames = peer.stream(wire.upload(wire.push(session, step + 1, step), payload))
        assert values(frames) == [step + 1.0]


def values(frames: list[pb.StreamStepsResponse] | list[pb.ReadParamsResponse]) -> list[float]:
    return np.unique(np.frombuffer(wire.params_of(frames), np.float32)).tolist()


def test_readers_see_whole_steps_while_others_push(peer: wire.Peer):
    session = counting(peer)
    done = threading.Event()

    def read() -> int:
        times = 0
        while not done.is_set():
            step, data = peer.read("readers")
            assert np.unique(np.frombuffer(data, np.float32)).tolist() == [float(step)]
            times += 1
        return times

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            count(peer, session, range(12))
        finally:
            done.set()
        assert all(reader.result(20) for reader in readers)


def test_a_reader_that_stops_half_way_gets_the_rest_of_its_step(peer: wire.Peer):
    session = counting(peer)
    count(peer, session, range(2))
    readers = []
    for step in range(2, 5):
        reader = peer.stub.ReadParams(pb.ReadParamsRequest(session=wire.named("readers")), timeout=wire.TIMEOUT_S)
        readers.append((step, [next(reader), next(reader)], reader))
        count(peer, session, range(step, step + 1))
    for step, begun, reader in readers:
        frames = [*begun, *reader]
        assert frames[0].begin.session.step == step
        assert values(frames) == [step]


def test_a_reply_that_stops_half_way_is_of_its_step_though_others_push_on(peer: wire.Peer):
    session = counting(peer)
    payload = wire.payload_of({"w": np.full(SIZE, -1.0, np.float32)})
    requests = [pb.StreamStepsRequest(**{wire._field(f): f}) for f in wire.upload(wire.push(session, 1, 0), payload)]
    call = peer.stub.StreamSteps(iter(requests), timeout=wire.TIMEOUT_S)
    begun = [next(call), next(call)]
    other = "b" * 32
    for step in range(1, 3):
        peer.stream(wire.upload(wire.push(session, step, step, worker=other), payload))
    assert begun[0].ack.step == 1
    assert values([*begun, *call]) == [1.0]
    assert peer.read("readers")[0] == 3


def test_a_session_deleted_while_it_is_read_is_read_to_its_end(peer: wire.Peer):
    session = counting(peer)
    count(peer, session, range(1))
    reader = peer.stub.ReadParams(pb.ReadParamsRequest(session=wire.named("readers")), timeout=wire.TIMEOUT_S)
    begun = [next(reader), next(reader)]
    peer.stub.DeleteSession(pb.DeleteSessionRequest(session=wire.named("readers")), timeout=wire.TIMEOUT_S)
    peer.create({"w": np.full(SIZE, 7.0, np.float32)}, opt.sgd(1.0), "readers")
    assert values([*begun, *reader]) == [1.0]


def test_a_reader_that_leaves_half_way_holds_up_nobody(peer: wire.Peer):
    session = counting(peer)
    for step in range(4):
        reader = peer.stub.ReadParams(pb.ReadParamsRequest(session=wire.named("readers")), timeout=wire.TIMEOUT_S)
        next(reader)
        reader.cancel()
        count(peer, session, range(step, step + 1))
