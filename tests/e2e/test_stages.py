"""Payloads that come before their push: what is staged, replaced, left out and lost, by hand and over a bad network."""

from __future__ import annotations

import itertools
import queue
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tests.e2e import proxy as proxies
from tests.e2e import wire

import optwire
from optwire import optimizers as opt
from optwire_proto import convert, limits, trees
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import tensor_pb2 as tensor_pb
from optwire_server import testing

pytestmark = pytest.mark.usefixtures("no_error_is_logged")

RATE = 0.01


@pytest.fixture(scope="module")
def serving() -> Iterator[testing.Serving]:
    with wire.served(stall_s=0.4) as serving:
        yield serving


def arrays(seed: int = 0) -> wire.Params:
    rng = np.random.default_rng(seed)
    return {
        "a": rng.standard_normal(10).astype(np.float32),
        "b": rng.standard_normal((3, 5)).astype(np.float32),
        "c": np.zeros(0, np.float32),
        "d": rng.standard_normal(1).astype(np.float32),
    }


def stage_of(session: pb.Session) -> pb.PushStage:
    return pb.PushStage(session_id=session.id, incarnation=session.incarnation)


def part(payload: bytes, start: int, stop: int) -> tensor_pb.Chunk:
    return tensor_pb.Chunk(offset=start, data=payload[start:stop])


def end(payload: bytes) -> pb.PayloadEnd:
    return pb.PayloadEnd(digest=wire.digest(payload))


def refusal(call: Callable[[], Any], code: str) -> str:
    failure = wire.Failure.of(call)
    assert failure is not None
    assert failure.code == code, failure
    return failure.message


def plainly(peer: wire.Peer, spec: Any, *payloads: bytes, **changes: Any) -> bytes:
    """What the same pushes make of the same parameters where nothing is staged."""
    session = peer.create(arrays(), spec)
    for step, payload in enumerate(payloads):
        frames = peer.stream(*wire.upload(wire.push(session, step + 1, step, **changes), payload))
    return wire.params_of(frames)


# ------------------------------------------------------------------------------------------------------- by hand


def test_chunks_of_a_stage_come_in_any_order_before_and_after_begin(peer: wire.Peer) -> None:
    payload = wire.payload_of(arrays(1))
    expected = plainly(peer, opt.adam(RATE), payload)
    pieces = [part(payload, *at) for at in ((0, 8), (8, 40), (40, 41), (41, 100), (100, 104))]
    for order in itertools.islice(itertools.permutations(pieces), 0, 120, 17):
        for begins in (0, 3, 5):
            session = peer.create(arrays(), opt.adam(RATE))
            begin = wire.push(session, 1, 0)
            frames = peer.stream(stage_of(session), order[:begins], begin, order[begins:], end(payload))
            assert wire.params_of(frames) == expected


def test_a_later_chunk_replaces_what_an_earlier_one_said(peer: wire.Peer) -> None:
    payload = wire.payload_of(arrays(1))
    session = peer.create(arrays(), opt.adam(RATE))
    wrong = tensor_pb.Chunk(offset=44, data=b"\1" * 50)
    begin = wire.push(session, 1, 0)
    frames = peer.stream(
        stage_of(session), wrong, part(payload, 0, 40), part(payload, 40, 100), wrong, begin,
        part(payload, 44, 94), part(payload, 100, 104), end(payload),
    )  # fmt: skip
    assert wire.params_of(frames) == plainly(peer, opt.adam(RATE), payload)


def test_the_digest_is_of_what_stands_at_the_end(peer: wire.Peer) -> None:
    payload = wire.payload_of(arrays(1))
    session = peer.create(arrays(), opt.adam(RATE))
    whole = (part(payload, 0, 40), part(payload, 40, 100), part(payload, 100, 104))
    changed = tensor_pb.Chunk(offset=0, data=b"\1" * 4)
    begin = wire.push(session, 1, 0)
    message = refusal(lambda: peer.stream(stage_of(session), whole, begin, changed, end(payload)), "INVALID_ARGUMENT")
    assert "damaged" in message
    assert wire.params_of(peer.stream(stage_of(session), changed, begin, whole, end(payload)))
    retry = peer.stream(*wire.upload(begin, payload))
    assert retry[0].ack.duplicate, "the digest of a staged push is the one of the same push sent plainly"


def test_a_leaf_that_has_not_come_whole_is_refused_by_name(peer: wire.Peer) -> None:
    payload = wire.payload_of(arrays(1))
    session = peer.create(arrays(), opt.adam(RATE))
    begin = wire.push(session, 1, 0)
    some = (part(payload, 0, 40), part(payload, 40, 60), part(payload, 64, 100), part(payload, 100, 104))
    message = refusal(lambda: peer.stream(stage_of(session), some, begin, end(payload)), "INVALID_ARGUMENT")
    assert "grads['b']: 56 of 60 bytes" in message
    message = refusal(lambda: peer.stream(stage_of(session), begin, end(payload)), "INVALID_ARGUMENT")
    assert "grads['a']: 0 of 40 bytes" in message
    assert peer.read(session.name)[0] == 0


def test_absent_leaves_are_left_out_of_the_payload_but_not_of_the_offsets(peer: wire.Peer) -> None:
    spec = opt.per_leaf(opt.adam(RATE))
    payload = wire.payload_of(arrays(1))
    rest = payload[40:]  # without leaf a
    expected = plainly(peer, spec, rest, absent_leaves=[0])
    for staged in ((part(payload, 40, 100),), (part(payload, 0, 40), part(payload, 40, 100)), (part(payload, 0, 1),)):
        session = peer.create(arrays(), spec)
        begin = wire.push(session, 1, 0, absent_leaves=[0])
        after = (part(payload, 40, 100), part(payload, 100, 104))
        assert wire.params_of(peer.stream(stage_of(session), staged, begin, after, end(rest))) == expected


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [
        (tensor_pb.Chunk(offset=36, data=bytes(8)), "inside of one leaf; leaf 'a' ends at 40"),
        (tensor_pb.Chunk(offset=100, data=bytes(5)), "leaf 'd' ends at 104"),
        (tensor_pb.Chunk(offset=104, data=bytes(4)), "the payload ends at 104"),
        (tensor_pb.Chunk(offset=2**63, data=bytes(4)), "the payload ends at 104"),
        (tensor_pb.Chunk(offset=4), "a byte or more"),
    ],
)
def test_a_chunk_that_is_not_inside_of_one_leaf_is_refused(
    peer: wire.Peer, chunk: tensor_pb.Chunk, expected: str
) -> None:
    session = peer.create(arrays(), opt.sgd(RATE))
    assert expected in refusal(lambda: peer.stream(stage_of(session), chunk), "INVALID_ARGUMENT")
    begin = wire.push(session, 1, 0)
    assert expected in refusal(lambda: peer.stream(stage_of(session), begin, chunk), "INVALID_ARGUMENT")


def test_pieces_with_gaps_between_them_have_a_limit(peer: wire.Peer) -> None:
    session = peer.create({"a": np.zeros(limits.STAGE_GAPS_MAX, np.float32)}, opt.sgd(RATE))
    gaps = [tensor_pb.Chunk(offset=at, data=b"\0") for at in range(0, 4 * limits.STAGE_GAPS_MAX, 2)]
    assert "pieces with gaps" in refusal(lambda: peer.stream(stage_of(session), gaps), "RESOURCE_EXHAUSTED")


def test_what_a_stage_is_for_must_be_there_and_be_what_is_pushed_to(peer: wire.Peer) -> None:
    session, other = (peer.create(arrays(), opt.sgd(RATE)) for _ in range(2))
    unknown = pb.PushStage(session_id="f" * 32)
    assert refusal(lambda: peer.stream(unknown), "NOT_FOUND")
    assert refusal(lambda: peer.stream(pb.PushStage(session_id="me")), "INVALID_ARGUMENT")
    past = pb.PushStage(session_id=session.id, incarnation=7)
    assert "incarnation" in refusal(lambda: peer.stream(past), "FAILED_PRECONDITION")
    message = refusal(lambda: peer.stream(stage_of(session), wire.push(other, 1, 0)), "INVALID_ARGUMENT")
    assert other.id in message
    assert session.id in message
    twice = refusal(lambda: peer.stream(stage_of(session), stage_of(session)), "INVALID_ARGUMENT")
    assert "'stage', expected 'begin'" in twice
    late = refusal(lambda: peer.stream(wire.push(session, 1, 0), stage_of(session)), "INVALID_ARGUMENT")
    assert "'stage', expected 'end'" in late


def test_encoded_gradients_are_not_staged_and_encoded_parameters_may_come_back(serving: testing.Serving) -> None:
    grads = {"w": np.random.default_rng(0).standard_normal(50_000).astype(np.float32)}
    for grads_codec, params_codec in (("f32", "bf16"), ("f32", "int8"), ("int8", "f32")):
        with optwire.connect(serving.target, transport="stream") as client:
            codecs = {"grads_codec": grads_codec, "params_codec": params_codec}
            session, plain = (client.create_session(grads, opt.adam(RATE), **codecs) for _ in range(2))
            for _ in range(3):
                copies = session._staging()
                copies.copy(0, grads["w"])
                assert copies.is_sending == (grads_codec == "f32")
                params = session.step_async(session.grad_buffers()).result()
                np.testing.assert_array_equal(params["w"], plain.step(grads)["w"])
            assert copies.resent_bytes == 0
            if grads_codec != "f32":
                peer = wire.Peer(serving.target)
                stage = pb.PushStage(session_id=session.id)
                assert "int8" in refusal(lambda peer=peer, stage=stage: peer.stream(stage), "UNIMPLEMENTED")
                peer.close()


def test_two_workers_of_one_step_may_stage(peer: wire.Peer) -> None:
    payloads = [wire.payload_of(arrays(seed)) for seed in (1, 2)]

    def outcome(*, staged: bool) -> bytes:
        begin = pb.CreateSessionBegin()
        begin.CopyFrom(_creation(aggregation=pb.Aggregation(mode=pb.Aggregation.MODE_SYNC, workers=2)))
        initial = wire.payload_of(arrays())
        session = peer.create_from(begin, wire.chunks(initial, 64), end(initial))
        calls = []
        for rank, payload in enumerate(payloads):
            push = wire.push(session, 1, 0, worker=f"{rank:032x}")
            frames = [push, *wire.chunks(payload, 2**20), end(payload)]
            if staged:
                pieces = (part(payload, 100, 104), part(payload, 40, 100), part(payload, 0, 40))
                frames = [stage_of(session), *pieces[:2], push, pieces[2], end(payload)]
            requests = [pb.StreamStepsRequest(**{wire._field(frame): frame}) for frame in frames]
            calls.append(peer.stub.StreamSteps(iter(requests), timeout=wire.TIMEOUT_S))
        first, second = (wire.params_of(list(call)) for call in calls)
        assert first == second
        return first

    assert outcome(staged=True) == outcome(staged=False)


def _creation(**more: Any) -> pb.CreateSessionBegin:
    tree = convert.tree_to_proto(trees.flatten(arrays()).spec)
    return pb.CreateSessionBegin(
        tree=tree, spec=convert.spec_to_proto(opt.adam(RATE)), create_key=secrets.token_hex(16), **more
    )


# -------------------------------------------------------------------------------------------------- room and time


class Slow:
    """A stream whose frames are sent one by one."""

    def __init__(self, peer: wire.Peer, *frames: Any) -> None:
        self._frames: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.call = peer.stub.StreamSteps(iter(self._frames.get, None), timeout=wire.TIMEOUT_S)
        self.send(*frames)

    def send(self, *frames: Any) -> None:
        for frame in frames:
            self._frames.put(pb.StreamStepsRequest(**{wire._field(frame): frame}))

    def finish(self) -> list[Any]:
        self._frames.put(None)
        return list(self.call)


def staged_bytes(serving: testing.Serving) -> int:
    return serving.server.registry._landings.lent_bytes


def test_a_stage_waits_longer_than_a_transfer_may_stall(serving: testing.Serving, peer: wire.Peer) -> None:
    """A client that computes for long between its chunks is idle, not stalled: the limit here is 0.4 s."""
    payload = wire.payload_of(arrays(1))
    session = peer.create(arrays(), opt.adam(RATE))
    slow = Slow(peer, stage_of(session), part(payload, 0, 40))
    wire.until(lambda: staged_bytes(serving) > 0, "the stage is open")
    (stream,) = serving.server.streams._streams
    wire.until(lambda: _quiet_s(stream) > 1.2, "three times the limit have passed")
    slow.send(part(payload, 40, 100), part(payload, 100, 104), wire.push(session, 1, 0), end(payload))
    assert wire.params_of(slow.finish()) == plainly(peer, opt.adam(RATE), payload)


def test_a_push_that_has_begun_must_not_stall(serving: testing.Serving, peer: wire.Peer) -> None:
    payload = wire.payload_of(arrays(1))
    session = peer.create(arrays(), opt.adam(RATE))
    slow = Slow(peer, stage_of(session), part(payload, 0, 40), wire.push(session, 1, 0))
    assert wire.Failure.of(lambda: list(slow.call))
    wire.until(lambda: staged_bytes(serving) == 0, "the landing is free")


def _quiet_s(stream: Any) -> float:
    return time.monotonic() - stream.since_s


def test_a_stage_without_a_push_ends_as_an_idle_stream_does() -> None:
    with testing.serve(idle_s=0.2) as serving:
        peer = wire.Peer(serving.target)
        session = peer.create(arrays(), opt.sgd(RATE))
        slow = Slow(peer, stage_of(session))
        assert wire.Failure.of(lambda: list(slow.call))
        wire.until(wire.idle(serving.server), "landing buffers and streams given back")
        peer.close()


@pytest.mark.parametrize("ending", ["cancel", "close", "channel", "delete"])
def test_whatever_ends_a_stage_its_landing_is_free(serving: testing.Serving, ending: str) -> None:
    peer = wire.Peer(serving.target)
    session = peer.create(arrays(), opt.sgd(RATE))
    slow = Slow(peer, stage_of(session), part(bytes(104), 0, 40))
    wire.until(lambda: staged_bytes(serving) > 0, "the stage is open")
    if ending == "delete":  # the client hears of it when it pushes
        peer.stub.DeleteSession(pb.DeleteSessionRequest(session=wire.named(session.name)))
        slow.send(wire.push(session, 1, 0))
        assert refusal(lambda: list(slow.call), "NOT_FOUND")
    elif ending == "close":
        assert "before the push that was staged" in refusal(slow.finish, "INVALID_ARGUMENT")
    elif ending == "cancel":
        slow.call.cancel()
    peer.close()
    wire.until(wire.idle(serving.server), "landing buffers and streams given back")


def test_a_stage_gives_way_to_a_push_and_never_takes_room_from_one() -> None:
    params = {"w": np.zeros(100_000, np.float32)}
    grads = {"w": np.ones(100_000, np.float32)}
    with (
        testing.serve(landing_bytes_max=600_000) as serving,
        optwire.connect(serving.target, transport="stream") as client,
    ):
        peer = wire.Peer(serving.target)
        session = client.create_session(params, opt.sgd(RATE))
        other = peer.create(params, opt.sgd(RATE))
        slow = Slow(peer, stage_of(other), tensor_pb.Chunk(data=bytes(4)))
        wire.until(lambda: staged_bytes(serving) > 0, "the stage is open")
        session.step(grads)  # is refused at first, and finds the room when it comes again
        assert wire.Failure.of(lambda: list(slow.call)) is not None
        slow = Slow(peer, stage_of(other))
        wire.until(lambda: staged_bytes(serving) > 0, "the stage is open")
        late = refusal(lambda: peer.stream(stage_of(other)), "RESOURCE_EXHAUSTED")
        assert "of 600000 bytes of landing buffers are in use" in late
        payload = wire.payload_of(grads)
        slow.send(*wire.chunks(payload, 2**20), wire.push(other, 1, 0), end(payload))
        assert wire.params_of(slow.finish()) == wire.payload_of(session.params())
        wire.until(lambda: staged_bytes(serving) == 0, "the landing is free")
        peer.close()


def test_a_server_that_drains_waits_for_no_stage() -> None:
    with testing.serve(drain_s=20.0) as serving:
        peer = wire.Peer(serving.target)
        session = peer.create(arrays(), opt.sgd(RATE))
        slow = Slow(peer, stage_of(session))
        wire.until(lambda: staged_bytes(serving) > 0, "the stage is open")
        begun_s = time.monotonic()
        serving.server.stop()
        assert time.monotonic() - begun_s < 5.0
        assert wire.Failure.of(lambda: list(slow.call))
        peer.close()


# ------------------------------------------------------------------------------------- through the client, and a proxy


class Road:
    """A staged session behind a proxy, and the same one that is pushed to plainly."""

    SIZES = (300_000, 7, limits.CHUNK_BYTES // 4 + 1)
    FRAMES = 8  # stage; 2 + 1 + 2 chunks; begin; end: and ack, 3 chunks, end

    def __init__(self, serving: testing.Serving, proxy: proxies.Proxy) -> None:
        self.proxy = proxy
        self._rng = np.random.default_rng(0)
        params = self.grads()
        self.client = optwire.connect(proxy.target, timeout=20, transport="stream")
        self._direct = optwire.connect(serving.target, transport="stream")
        self.session = self.client.create_session(params, opt.adam(RATE))
        self._plain = self._direct.create_session(params, opt.adam(RATE))

    def grads(self) -> dict[str, np.ndarray]:
        return {
            name: self._rng.standard_normal(size).astype(np.float32)
            for name, size in zip("abc", self.SIZES, strict=True)
        }

    def step(self, stage: Callable[[Any, list[np.ndarray]], None] | None = None) -> None:
        """One step, staged as ``stage`` does, which must be the same as the plain one."""
        grads = self.grads()
        expected = self._plain.step(grads)
        copies = self.session._staging()
        if stage is None:
            for index, array in enumerate(grads.values()):
                copies.copy(index, array)
        else:
            stage(copies, list(grads.values()))
        for index, array in enumerate(grads.values()):
            if not copies.has(index, array):
                copies.copy(index, array)
        params = self.session.step_async(self.session.grad_buffers()).result()
        for name, array in expected.items():
            np.testing.assert_array_equal(params[name].view(np.uint32), array.view(np.uint32))
        assert self.session.step_count == self._plain.step_count == self.session.info().step

    def close(self) -> None:
        for client in (self.client, self._direct):
            client.close()


@pytest.fixture(scope="module")
def road(serving: testing.Serving) -> Iterator[Road]:
    with proxies.before(serving.target) as proxy:
        road = Road(serving, proxy)
        road.step()
        yield road
        road.step()  # whatever happened, the next step is like any other
        road.close()
    wire.until(wire.idle(serving.server), "landing buffers and streams given back")


def test_a_staged_step_sends_each_byte_once(road: Road) -> None:
    road.step()
    before, vain = road.proxy.bytes[proxies.UP], road.session._staging().resent_bytes
    road.step()
    assert road.session._staging().resent_bytes == vain
    assert road.proxy.bytes[proxies.UP] - before < 4 * sum(road.SIZES) + 20_000


# A reply has five frames.
@pytest.mark.parametrize(
    ("direction", "frame"),
    [*((proxies.UP, frame) for frame in range(Road.FRAMES)), *((proxies.DOWN, frame) for frame in range(5))],
)
def test_a_staged_step_survives_a_cut_after_every_frame(road: Road, direction: str, frame: int) -> None:
    """Lost between stage and begin: all is sent again. Lost answers: the retry, sent plainly, is the same push."""
    road.session.info()
    fault = road.proxy.fail(direction, messages=frame)
    road.step()
    assert fault.done.wait(5)


def test_a_connection_lost_before_the_push_is_made_is_not_waited_for(road: Road) -> None:
    def stage(copies: Any, grads: list[np.ndarray]) -> None:
        copies.copy(0, grads[0])
        sent = road.proxy.bytes[proxies.UP]
        wire.until(lambda: road.proxy.bytes[proxies.UP] > sent or copies._feed.sent_bytes, "some was sent")
        road.proxy.cut()
        wire.until(lambda: not copies.is_sending, "the client knows")

    vain = road.session._staging().resent_bytes
    road.step(stage)
    assert road.session._staging().resent_bytes > vain


def test_a_server_without_room_is_asked_twice_a_push_and_no_more() -> None:
    """And the push, which is made plainly, takes the room that others hold who are in no hurry."""
    grads = {"w": np.ones(100_000, np.float32), "x": np.ones(1, np.float32)}
    with (
        testing.serve(landing_bytes_max=600_000) as serving,
        optwire.connect(serving.target, transport="stream") as client,
    ):
        peer = wire.Peer(serving.target)
        slow = Slow(peer, stage_of(peer.create(grads, opt.sgd(RATE))))
        session, plain = (client.create_session(grads, opt.adam(RATE)) for _ in range(2))
        wire.until(lambda: wire.Failure.of(lambda: list(slow.call)) is not None, "creations took the room")
        slow = Slow(peer, stage_of(peer.create(grads, opt.sgd(RATE))))
        wire.until(lambda: staged_bytes(serving) > 0, "the stage is open")
        for starts in (1, 2, 2):
            copies = session._staging()
            assert copies._starts == starts
            wire.until(lambda copies=copies: not copies.is_sending, "it was refused")
        for index, array in enumerate(grads.values()):
            copies.copy(index, array)
        params = session.step_async(session.grad_buffers()).result()
        np.testing.assert_array_equal(params["w"], plain.step(grads)["w"])
        assert session._staging()._starts == 1, "the next push has stages again"
        peer.close()


def test_what_is_replaced_on_the_way_is_what_arrives(road: Road) -> None:
    def stage(copies: Any, grads: list[np.ndarray]) -> None:
        for factor in (3, 2):
            for index, array in enumerate(grads):
                copies.copy(index, array * factor)
        copies.copy(2, grads[2])

    for _ in range(5):
        road.step(stage)


def test_a_plain_push_of_the_handle_leaves_the_stage_alone(road: Road) -> None:
    copies, (other, grads) = road.session._staging(), (road.grads(), road.grads())
    copies.copy(0, grads["a"])
    assert copies.is_sending
    np.testing.assert_array_equal(road.session.step(other)["c"], road._plain.step(other)["c"])
    assert copies.is_sending
    for index, name in enumerate("bc", 1):
        copies.copy(index, grads[name])
    params = road.session.step_async(road.session.grad_buffers()).result()
    np.testing.assert_array_equal(params["a"], road._plain.step(grads)["a"])


@pytest.mark.parametrize("ending", ["session", "client"])
def test_closing_a_handle_or_its_client_ends_what_is_staged(serving: testing.Serving, ending: str) -> None:
    client = optwire.connect(serving.target, transport="stream")
    session = client.create_session({"w": np.zeros(50_000, np.float32)}, opt.sgd(RATE))
    copies = session._staging()
    copies.copy(0, np.ones(50_000, np.float32))
    wire.until(lambda: staged_bytes(serving) > 0, "the stage is open")
    (session if ending == "session" else client).close()
    wire.until(lambda: staged_bytes(serving) == 0, "the landing is free")
    wire.until(lambda: not copies.is_sending, "the sending has ended")
    client.close()


def test_small_sessions_and_unary_ones_are_pushed_whole(serving: testing.Serving) -> None:
    grads = {"w": np.ones(1000, np.float32)}
    for transport in ("auto", "stream", "unary"):
        with optwire.connect(serving.target, transport=transport) as client:
            session, plain = (client.create_session(grads, opt.adam(RATE)) for _ in range(2))
            copies = session._staging()
            copies.copy(0, grads["w"])
            assert not copies.is_sending
            params = session.step_async(session.grad_buffers()).result()
            np.testing.assert_array_equal(params["w"], plain.step(grads)["w"])
            assert copies.resent_bytes == 0
