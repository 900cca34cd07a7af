"""Parameters that leave while the update that makes them is under way: the same bits, and the same promises."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest
from tests.e2e import proxy as proxies
from tests.e2e import wire

import optwire
from optwire import optax
from optwire import optimizers as opt
from optwire_proto import aggregations, convert, specs, trees
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import tensor_pb2 as tensor_pb
from optwire_server import testing
from optwire_server.engine import cut

BLOCK = cut.BLOCK
# Leaves that are not updated alike take turns in the payload, one of them spans several blocks.
MIXED: Any = {
    "a": {"bias": np.zeros(1000, np.float32), "kernel": np.ones((1100, 1000), np.float32)},
    "b": {"bias": np.ones(1, np.float32), "kernel": np.full((500, 700), 2.0, np.float32)},
    "c": {"half": np.ones(300_001, np.float16)},
}
FLAT: Any = {"w": np.ones(BLOCK + 5, np.float32)}


def kinds(frames: list[pb.StreamStepsResponse]) -> list[str]:
    return [frame.WhichOneof("frame") or "" for frame in frames]


def grads_of(params: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), params)


def acks(frames: list[pb.StreamStepsResponse]) -> list[pb.PushAck]:
    return [frame.ack for frame in frames if frame.HasField("ack")]


def requests(begin: pb.PushBegin, payload: bytes) -> Iterator[pb.StreamStepsRequest]:
    return (pb.StreamStepsRequest(**{wire._field(frame): frame}) for frame in wire.upload(begin, payload))


def created(peer: wire.Peer, params: Any, spec: specs.Spec, **terms: Any) -> pb.Session:
    payload = wire.payload_of(params)
    begin = pb.CreateSessionBegin(
        tree=convert.tree_to_proto(trees.flatten(params).spec),
        spec=convert.spec_to_proto(spec),
        create_key=secrets.token_hex(16),
        **terms,
    )
    return peer.create_from(begin, wire.chunks(payload, 2**20), pb.PayloadEnd(digest=wire.digest(payload)))


# ------------------------------------------------------------------------------------------------- what comes, and when


@pytest.mark.parametrize("codec", [tensor_pb.CODEC_UNSPECIFIED, tensor_pb.CODEC_BF16, tensor_pb.CODEC_F16])
@pytest.mark.parametrize(
    ("params", "spec"),
    [
        (FLAT, opt.adam(0.1)),
        (MIXED, optax.adamw(0.1, mask="**/kernel")),
        (MIXED, opt.sm3(0.1)),
        (FLAT, opt.on_nonfinite(opt.chain(opt.clip_grads(1.0), opt.adam(0.1)), "reject")),
        (MIXED, opt.master_weights(opt.adam(0.1))),
    ],
    ids=["flat", "masked", "tensors", "rejecting", "master"],
)
def test_parameters_come_before_the_ack_and_are_the_same(
    peer: wire.Peer, params: Any, spec: specs.Spec, codec: int
) -> None:
    early, late = (created(peer, params, spec, params_codec=codec) for _ in range(2))
    for step in range(2):
        payload = wire.payload_of(grads_of(params, step))
        telling = {"telemetry": bool(step)}
        frames = peer.stream(*wire.upload(wire.push(early, step + 1, step, params_before_ack=True, **telling), payload))
        plain = peer.stream(*wire.upload(wire.push(late, step + 1, step, **telling), payload))
        assert (kinds(frames)[0], kinds(frames)[-1]) == ("chunk", "end")
        assert kinds(plain) == ["ack", *["chunk"] * (len(plain) - 2), "end"]
        assert sorted(kinds(frames)) == sorted(kinds(plain))
        assert wire.params_of(frames) == wire.params_of(plain)
        assert acks(frames) == acks(plain)


@pytest.mark.parametrize(
    ("params", "terms", "push"),
    [
        ({"w": np.ones(BLOCK, np.float32)}, {}, {}),
        ({"w": np.ones(1000, np.float32), "b": np.ones(1, np.float32)}, {}, {}),
        (FLAT, {"params_codec": tensor_pb.CODEC_INT8}, {}),
        (FLAT, {"aggregation": convert.aggregation_to_proto(aggregations.parse("sync(1)"))}, {"worker": "0" * 32}),
        (FLAT, {}, {"reply": pb.REPLY_CONTENT_UPDATES}),
        (FLAT, {}, {"reply": pb.REPLY_CONTENT_NONE}),
    ],
    ids=["one block", "one chunk", "differences", "sync", "updates", "nothing"],
)
def test_the_ack_comes_first_where_nothing_is_gained_or_known_before(
    peer: wire.Peer, params: Any, terms: dict[str, Any], push: dict[str, Any]
) -> None:
    session = created(peer, params, opt.adam(0.1), **terms)
    payload = wire.payload_of(grads_of(params))
    frames = peer.stream(*wire.upload(wire.push(session, 1, 0, params_before_ack=True, **push), payload))
    assert kinds(frames) == ["ack", *["chunk"] * (len(frames) - 2), "end"]


def test_a_leaf_without_a_gradient_comes_too(peer: wire.Peer) -> None:
    spec = opt.per_leaf(opt.adam(0.1))
    early, late = peer.create(MIXED, spec), peer.create(MIXED, spec)
    payload = wire.payload_of({name: leaf for name, leaf in grads_of(MIXED).items() if name != "b"})
    how = {"absent_leaves": [2, 3]}
    frames = peer.stream(*wire.upload(wire.push(early, 1, 0, params_before_ack=True, **how), payload))
    assert kinds(frames)[0] == "chunk"
    assert wire.params_of(frames) == wire.params_of(peer.stream(*wire.upload(wire.push(late, 1, 0, **how), payload)))


# ------------------------------------------------------------------------------------------------ updates that are none


@pytest.mark.parametrize("where", [0, -1])
def test_no_parameters_come_of_a_push_that_is_refused(peer: wire.Peer, where: int) -> None:
    session = peer.create(FLAT, opt.on_nonfinite(opt.adam(0.1), "reject"))
    grads = grads_of(FLAT)
    grads["w"][where] = np.nan
    call = peer.stub.StreamSteps(
        requests(wire.push(session, 1, 0, params_before_ack=True), wire.payload_of(grads)), timeout=wire.TIMEOUT_S
    )
    failure = wire.Failure.of(lambda: next(call))
    assert failure is not None
    assert failure.detail is not None
    assert failure.detail.reason == "NON_FINITE"
    assert peer.read(session.name) == (0, wire.payload_of(FLAT))


def test_a_push_that_is_skipped_brings_the_parameters_as_they_were(peer: wire.Peer) -> None:
    session = peer.create(FLAT, opt.on_nonfinite(opt.adam(0.1), "skip"))
    grads = grads_of(FLAT)
    grads["w"][-1] = np.inf
    frames = peer.stream(*wire.upload(wire.push(session, 1, 0, params_before_ack=True), wire.payload_of(grads)))
    assert kinds(frames)[0] == "chunk"
    assert dict(acks(frames)[0].metrics) == {"skipped": 1.0}
    assert wire.params_of(frames) == wire.payload_of(FLAT)


def broken(serving: testing.Serving, name: str) -> None:
    """Has the last block of a session fail: what a device does that goes away in the middle of an update."""
    held = serving.server.registry._table.by_name[name].held
    assert held.state is not None
    held.state[-1].blocks[-1][0].delete()


def test_an_update_that_fails_half_way_ends_the_call_without_an_ack(serving: testing.Serving, peer: wire.Peer) -> None:
    session = peer.create(FLAT, opt.adam(0.1))
    broken(serving, session.name)
    payload = wire.payload_of(grads_of(FLAT))
    call = peer.stub.StreamSteps(
        requests(wire.push(session, 1, 0, params_before_ack=True), payload), timeout=wire.TIMEOUT_S
    )
    came: list[pb.StreamStepsResponse] = []
    failure = wire.Failure.of(lambda: came.extend([next(call)]) or came.extend(call))
    assert failure is not None
    assert failure.detail is not None
    assert failure.detail.reason == "SESSION_FAILED"
    assert kinds(came)[:1] == ["chunk"]
    assert not acks(came)
    peer.stub.DeleteSession(pb.DeleteSessionRequest(session=wire.named(session.name)), timeout=wire.TIMEOUT_S)
    wire.until(wire.idle(serving.server), "landing buffers and streams given back")


def test_a_client_hears_of_no_parameters_whose_update_failed(serving: testing.Serving) -> None:
    with optwire.connect(serving.target, transport="stream") as client:
        session = client.create_session(FLAT, opt.adam(0.1))
        grads, heard = session.grad_buffers(), list[tuple[int, int]]()
        stage = session._staging()
        stage.heard = lambda step, count: heard.append((step, count))
        stage.copy(0, FLAT["w"])
        session.step(grads, out=session.param_buffers())
        assert heard[-1] == (1, FLAT["w"].nbytes)
        assert [step for step, _ in heard] == [1] * len(heard)
        heard.clear()
        broken(serving, session.name)
        session._staging().copy(0, FLAT["w"])
        with pytest.raises(optwire.SessionFailedError):
            session.step(grads, out=session.param_buffers())
        assert heard == []
        assert session.step_count == 1
        client.delete_session(session.name)


# ---------------------------------------------------------------------------------------------------- slow, gone, again


SLOW: Any = {"w": np.zeros(8 * BLOCK, np.float32)}  # 32 MiB, more than gRPC buffers on the way


def test_a_client_that_reads_slowly_delays_neither_its_own_step_nor_others(peer: wire.Peer) -> None:
    slow, other = peer.create(SLOW, opt.sgd(1.0)), peer.create(FLAT, opt.sgd(1.0))
    down = wire.payload_of({"w": np.full(8 * BLOCK, -1.0, np.float32)})
    call = peer.stub.StreamSteps(requests(wire.push(slow, 1, 0, params_before_ack=True), down), timeout=wire.TIMEOUT_S)
    frames = [next(call)]
    wire.until(lambda: peer.read(slow.name)[0] == 1, "its step is applied")
    for step in range(3):
        payload = wire.payload_of(grads_of(FLAT, step))
        assert acks(peer.stream(*wire.upload(wire.push(other, step + 1, step, params_before_ack=True), payload)))
    # The next update of the same session leaves alone what is still on its way.
    peer.stream(*wire.upload(wire.push(slow, 1, 1, worker="b" * 32), down))
    frames += list(call)
    assert acks(frames)[0].step == 1
    assert set(np.frombuffer(wire.params_of(frames), np.float32)) == {1.0}
    assert set(np.frombuffer(peer.read(slow.name)[1], np.float32)) == {2.0}


def test_the_ack_does_not_wait_for_the_parameters_of_a_client_that_reads_slowly(peer: wire.Peer) -> None:
    session = peer.create(SLOW, opt.sgd(1.0))
    call = peer.stub.StreamSteps(
        requests(wire.push(session, 1, 0, params_before_ack=True), wire.payload_of(SLOW)), timeout=wire.TIMEOUT_S
    )
    frames = [next(call)]
    wire.until(lambda: peer.read(session.name)[0] == 1, "the step is applied")
    frames += list(call)
    after = kinds(frames)[kinds(frames).index("ack") + 1 :]
    assert after.count("chunk") > 0


def test_a_step_is_applied_whose_client_goes_half_way(serving: testing.Serving, peer: wire.Peer) -> None:
    session = peer.create(SLOW, opt.adam(0.1))
    begin = wire.push(session, 1, 0, params_before_ack=True)
    payload = wire.payload_of(grads_of(SLOW))
    call = peer.stub.StreamSteps(requests(begin, payload), timeout=wire.TIMEOUT_S)
    next(call)
    call.cancel()
    wire.until(lambda: peer.read(session.name)[0] == 1, "the step is applied")
    wire.until(wire.idle(serving.server), "landing buffers and streams given back")
    again = peer.stream(*wire.upload(begin, payload))
    assert kinds(again) == ["ack", *["chunk"] * (len(again) - 2), "end"]
    assert again[0].ack.duplicate
    assert (1, wire.params_of(again)) == peer.read(session.name)


FRAMES = 7  # 5 chunks, the ack, end
PARAMS: Any = {"b": np.ones(7, np.float32), "w": np.ones(BLOCK + 3 * cut.SMALL, np.float32)}


@pytest.mark.parametrize("given", [True, False], ids=["into arrays", "into new ones"])
@pytest.mark.parametrize("codec", ["f32", "bf16"])
def test_a_step_survives_a_cut_after_every_frame_of_its_reply(
    serving: testing.Serving, codec: str, given: bool
) -> None:
    frames = FRAMES if codec == "f32" else 5
    with (
        proxies.before(serving.target) as proxy,
        optwire.connect(proxy.target, transport="stream", timeout=20) as client,
        optwire.connect(serving.target, transport="unary", timeout=20) as direct,
    ):
        session = client.create_session(PARAMS, opt.adam(0.1), params_codec=codec)
        twin = client.create_session(PARAMS, opt.adam(0.1), params_codec=codec)
        out = session.param_buffers() if given else None
        for frame in range(frames + 1):
            grads = grads_of(PARAMS, frame)
            expected = twin.step(grads)
            direct.list_sessions()
            session.info()
            before = proxy.messages[proxies.DOWN]
            fault = proxy.fail(proxies.DOWN, messages=frame)
            params = session.step(grads, out=out)
            assert fault.done.wait(5), f"a reply has {proxy.messages[proxies.DOWN] - before} frames"
            ack = session.last_ack
            assert ack is not None
            assert ack.applied_step == frame + 1
            assert ack.duplicate or not 0 < frame < frames, "what had begun to answer was applied"
            for name, array in expected.items():
                np.testing.assert_array_equal(params[name].view(np.uint32), array.view(np.uint32))


def test_the_state_stays_where_it_is_from_step_to_step() -> None:
    """Of what has left, no view is alive at the next update, which would otherwise copy."""
    with testing.serve() as serving, optwire.connect(serving.target, transport="stream") as client:
        session = client.create_session(MIXED, opt.adam(0.1), name="in-place")
        held = serving.server.registry._table.by_name["in-place"].held
        places = []
        for step in range(5):
            session.step(grads_of(MIXED, step))
            leaves = serving.server.engine.run(lambda: jax.tree.leaves(held.state))
            places.append([leaf.unsafe_buffer_pointer() for leaf in leaves])
            del leaves
        assert all(place == places[0] for place in places)


def test_no_thread_outlives_its_push_or_is_started_for_a_small_one(serving: testing.Serving) -> None:
    def names() -> set[str]:
        return {thread.name for thread in threading.enumerate() if thread.name.startswith("optwire-update")}

    with (
        optwire.connect(serving.target, transport="stream") as client,
        ThreadPoolExecutor(1) as pool,
    ):
        large, small = (
            client.create_session(FLAT, opt.adam(0.1)),
            client.create_session([np.ones(BLOCK, np.float32)], opt.adam(0.1)),
        )
        pushing = pool.submit(lambda: [large.step(FLAT) for _ in range(10)])
        wire.until(lambda: bool(names()), "a thread for the large one")
        pushing.result(20)
        wire.until(lambda: not names(), "the thread has ended")
        pushing = pool.submit(lambda: [small.step([np.ones(BLOCK, np.float32)]) for _ in range(10)])
        while not pushing.done():
            assert not names()
