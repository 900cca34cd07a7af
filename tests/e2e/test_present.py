"""reply="present": the parameters of the leaves that a push has gradients for, by every way, encoded and not."""

from __future__ import annotations

import concurrent.futures
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.e2e import proxy as proxies
from tests.e2e import wire

import optwire
from optwire import optimizers as opt
from optwire_proto import convert, sessions
from optwire_server import testing

SHAPES = {"a": (7,), "b": (3, 5, 1001), "c": (), "empty": (0, 4), "z": (70_001,)}
SPEC = opt.per_leaf(opt.torch_sgd(0.5, momentum=0.9))
WAYS = ["auto", "stream", "unary", *(["shared_memory"] if sys.platform == "linux" else [])]


def tree(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape, np.float32)) for name, shape in SHAPES.items()}


def only(grads: dict[str, np.ndarray], *names: str) -> dict[str, Any]:
    return {name: array if name in names else None for name, array in grads.items()}


def same(got: np.ndarray, wanted: np.ndarray) -> bool:
    return got.dtype == wanted.dtype and got.shape == wanted.shape and got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("transport", WAYS)
@pytest.mark.parametrize("names", [("z",), ("a", "c"), ("b", "empty"), ("a", "b", "c", "z"), ("empty",)], ids=str)
def test_what_comes_back_are_the_new_parameters_of_the_leaves_that_were_pushed(
    server: testing.Serving, transport: str, names: tuple[str, ...]
) -> None:
    with optwire.connect(server.target, transport=transport) as client:
        session = client.create_session(tree(0), SPEC)
        for step in range(3):
            got = session.step(only(tree(step + 1), *names), reply="present")
            newest = session.params()
            assert [name for name, array in got.items() if array is not None] == list(names)
            assert all(same(got[name], newest[name]) for name in names)
            assert session.step_count == step + 1
        client.delete_session(session.name)


def test_a_push_of_all_leaves_gets_all_parameters(client: optwire.Client) -> None:
    session = client.create_session(tree(0), opt.sgd(0.5))
    got = session.step(tree(1), reply="present")
    assert all(same(got[name], array) for name, array in session.params().items())


def test_other_leaves_are_not_sent(server: testing.Serving) -> None:
    with proxies.before(server.target) as proxy, optwire.connect(proxy.target, transport="stream") as client:
        session = client.create_session(tree(0), SPEC)
        session.step(only(tree(1), "a"), reply="present")
        before = proxy.bytes[proxies.DOWN]
        session.step(only(tree(2), "a"), reply="present")
        assert proxy.bytes[proxies.DOWN] - before < 1000
        assert session.last_ack is not None
        assert session.last_ack.payload_bytes == 28


@pytest.mark.parametrize("transport", WAYS)
def test_arrays_that_were_given_are_filled_where_a_leaf_was_pushed(server: testing.Serving, transport: str) -> None:
    with optwire.connect(server.target, transport=transport) as client:
        session = client.create_session(tree(0), SPEC)
        out = {name: np.full(shape, 3, np.float32) for name, shape in SHAPES.items()}
        assert session.step(only(tree(1), "b", "c"), reply="present", out=out) is out
        newest = session.params()
        assert same(out["b"], newest["b"])
        assert same(out["c"], newest["c"])
        assert all((out[name] == 3).all() for name in ("a", "z"))


@pytest.mark.parametrize("codec", ["bf16", "f16", "int8", "sign", "top_k(0.05)"])
def test_codecs_have_a_replica_of_each_set_of_leaves(server: testing.Serving, codec: str) -> None:
    """The same as if each set were a session of its own."""
    sets = [("a", "c"), ("b",), ("empty", "z")]
    with optwire.connect(server.target, transport="stream") as client:
        one = client.create_session(tree(0), SPEC, params_codec=codec)
        several = [
            client.create_session({name: tree(0)[name] for name in names}, SPEC, params_codec=codec) for names in sets
        ]
        for step in range(4):
            for names, alone in zip(sets, several, strict=True):
                grads = tree(10 * step + 1)
                got = one.step(only(grads, *names), reply="present")
                wanted = alone.step({name: grads[name] for name in names})
                assert all(same(got[name], wanted[name]) for name in names)
                assert one.last_ack is not None
                assert alone.last_ack is not None
                assert one.last_ack.payload_bytes == alone.last_ack.payload_bytes
                assert one.last_ack.params_codec == alone.last_ack.params_codec


def test_a_set_that_shares_leaves_with_an_earlier_one_is_sent_whole(client: optwire.Client) -> None:
    session = client.create_session(tree(0), SPEC, params_codec="int8")
    for step, names in enumerate([("a", "b"), ("b", "z"), ("a", "b"), ("b", "z"), ("a", "b")]):
        got = session.step(only(tree(step + 1), *names), reply="present")
        newest = session.params()
        exact = [same(got[name], newest[name]) for name in names]
        assert all(exact) == (step in (0, 1, 3)), step
        assert all(np.allclose(got[name], newest[name], atol=0.2) for name in names)


def test_a_replica_of_leaves_survives_a_load_and_a_lost_answer(server: testing.Serving) -> None:
    with proxies.before(server.target) as proxy, optwire.connect(proxy.target, transport="stream") as client:
        session = client.create_session(tree(0), SPEC, params_codec="int8")
        other = client.attach(session.name)
        session.step(only(tree(1), "b"), reply="present")
        session.step(only(tree(2), "b"), reply="present")
        session.load_state(session.state())
        got = session.step(only(tree(3), "b"), reply="present")
        assert same(got["b"], session.params()["b"]), "whole, as the history is another one"
        got = session.step(only(tree(4), "b"), reply="present")
        assert not same(got["b"], session.params()["b"])
        assert np.allclose(got["b"], other.params()["b"], atol=0.05)


def test_a_retry_is_answered_with_the_newest_parameters_of_its_leaves(client: optwire.Client, peer: wire.Peer) -> None:
    session = peer.create(tree(0), SPEC, "present-again")
    key = sessions.PushKey(session_id=session.id, incarnation=1, worker=wire.WORKER, seq=1, base_step=0)
    options = sessions.PushOptions(absent=(1, 2, 3, 4), reply=sessions.ReplyContent.PRESENT)
    begin, payload = convert.push_to_proto(key, options), tree(1)["a"].tobytes()
    first = peer.step(begin, payload)
    client.attach("present-again").step(only(tree(2), "a", "c"))
    again = peer.step(begin, payload)
    assert again.ack.duplicate
    assert first.payload != again.payload
    assert again.payload == client.attach("present-again").params()["a"].tobytes()
    client.delete_session("present-again")


def test_whoever_leaves_nothing_out_is_answered_with_everything(client: optwire.Client, peer: wire.Peer) -> None:
    session = peer.create(tree(0), SPEC, "present-whole")
    key = sessions.PushKey(session_id=session.id, incarnation=1, worker=wire.WORKER, seq=1, base_step=0)
    begin = convert.push_to_proto(key, sessions.PushOptions(reply=sessions.ReplyContent.PRESENT))
    payload = peer.step(begin, wire.payload_of(tree(1))).payload
    assert payload == wire.payload_of(client.attach("present-whole").params())
    client.delete_session("present-whole")


@pytest.mark.parametrize("transport", WAYS)
def test_every_worker_of_a_step_gets_the_leaves_that_it_asked_for(server: testing.Serving, transport: str) -> None:
    with (
        optwire.connect(server.target, transport=transport) as client,
        concurrent.futures.ThreadPoolExecutor(2) as threads,
    ):
        session = client.create_session(tree(0), SPEC, aggregation="sync(2)", worker=0)
        other = client.attach(session.name, worker=1)
        for step in range(3):
            grads = only(tree(step + 1), "b", "c")
            waiting = threads.submit(session.step, grads, reply="present")
            whole = other.step(grads)
            got = waiting.result()
            assert got["a"] is None
            assert all(same(got[name], whole[name]) for name in ("b", "c"))
        client.delete_session(session.name)


def test_late_gradients_cannot_be_answered_with_a_part(client: optwire.Client) -> None:
    session = client.create_session(tree(0), SPEC)
    with pytest.raises(optwire.InvalidArgumentError, match="late: .*expected 'raise' with reply='present'"):
        session.step(only(tree(1), "a"), reply="present", late="params")


@pytest.fixture
def peer(server: testing.Serving) -> Iterator[wire.Peer]:
    peer = wire.Peer(server.target)
    yield peer
    peer.close()


def test_where_delays_are_compensated_everything_must_come_back(client: optwire.Client) -> None:
    session = client.create_session(tree(0), SPEC, aggregation="async(compensation=0.5)")
    local = optwire.LocalSteps(session, every=2, fragments=2)
    with pytest.raises(optwire.UnsupportedError, match="reply 'present', but its steps are of async"):
        local.step(local.params())
    assert session.info().step == 0
