"""`sync(n)`: the mean of one push of each worker is one step, the same bits whoever comes first, applied once."""

from __future__ import annotations

import contextlib
import random
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest
from jax.example_libraries import optimizers as seed
from tests.e2e import wire

import optwire
from optwire import optimizers as opt
from optwire_proto import aggregations, convert, sessions, trees
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_server import testing
from optwire_server.engine import landing

pytestmark = pytest.mark.usefixtures("no_error_is_logged")

SMALL, LARGE = 57, 400_000  # elements: one unary message; two chunks on a stream


@pytest.fixture(scope="module")
def serving() -> Iterator[testing.Serving]:
    with wire.served() as serving:
        yield serving


@pytest.fixture
def client(serving: testing.Serving) -> Iterator[optwire.Client]:
    with optwire.connect(serving.target, timeout=20) as client:
        yield client


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


class Workers:
    """A session of n workers, and a handle for each."""

    def __init__(self, client: optwire.Client, params: Any, spec: Any, count: int, **options: Any) -> None:
        self.name = secrets.token_hex(4)
        first = client.create_session(params, spec, name=self.name, aggregation=f"sync({count})", **options)
        self.handles = [first, *(client.attach(self.name, worker=rank) for rank in range(1, count))]


def tree(rng: np.random.Generator, elements: int) -> dict[str, np.ndarray]:
    return {
        "b": rng.standard_normal(7, np.float32),
        "w": rng.standard_normal((elements - 7, 1), np.float32),
    }


def filled(value: float, elements: int = SMALL) -> dict[str, np.ndarray]:
    return {"w": np.full(elements, value, np.float32)}


def mean(grads: Sequence[Any]) -> Any:
    """((g[0] + g[1]) + g[2] ...) / n in 32 bits, one rounding after another."""
    total = grads[0]
    for each in grads[1:]:
        total = jax.tree.map(lambda a, b: np.asarray(a + b, np.float32), total, each)
    return jax.tree.map(lambda a: np.asarray(a / np.float32(len(grads)), np.float32), total)


def assert_same(remote: Any, local: Any) -> None:
    for name in local:
        assert np.asarray(remote[name]).tobytes() == np.asarray(local[name]).tobytes(), name


def gathered(serving: testing.Serving, name: str) -> Any:
    return serving.server.registry._table.find(name=name).machine.gathered


def waits(serving: testing.Serving, name: str, *ranks: int) -> None:
    """Waits until exactly the pushes of these ranks are gathered."""
    wanted = {sessions.worker_id(rank) for rank in ranks}
    wire.until(lambda: set(gathered(serving, name)) == wanted, f"gathered: {ranks}")


# ------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("transport", ["unary", "stream"])
@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_twenty_steps_of_four_workers_equal_the_mean_computed_here(
    serving: testing.Serving, pool: ThreadPoolExecutor, optimizer: str, transport: str
) -> None:
    rng, shuffle = np.random.default_rng(1), random.Random(2)
    elements = SMALL if transport == "unary" else LARGE
    params = tree(rng, elements)
    arguments = (0.01,) if optimizer == "adam" else (0.01, 0.9)
    init, update, get_params = getattr(seed, optimizer)(*arguments)
    state, update = init(params), jax.jit(update)
    with optwire.connect(serving.target, timeout=30, transport=transport) as client:
        workers = Workers(client, params, getattr(opt, optimizer)(*arguments), 4)
        for step in range(20):
            grads = [tree(rng, elements) for _ in range(4)]
            state = update(step, mean(grads), state)
            started: dict[int, Future[Any]] = {}
            for rank in shuffle.sample(range(4), 4):
                started[rank] = pool.submit(workers.handles[rank].step, grads[rank])
                if shuffle.random() < 0.3:
                    time.sleep(0.005)  # some arrive well before the next
            for rank in range(4):
                assert_same(started[rank].result(30), get_params(state))
                assert workers.handles[rank].step_count == step + 1
        client.delete_session(workers.name)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0)], ids=str)
def test_whoever_comes_first_the_bits_are_the_same(
    serving: testing.Serving, client: optwire.Client, pool: ThreadPoolExecutor, order: tuple[int, ...]
) -> None:
    grads = [
        filled(1e8),
        filled(1.0),
        filled(-1e8),
    ]  # 0 in the order of ranks, 1/3 if the first and the last come first
    workers = Workers(client, filled(0.0), opt.sgd(1.0), 3)
    started = []
    for number, rank in enumerate(order):
        started.append(pool.submit(workers.handles[rank].step, grads[rank]))
        if number < 2:
            waits(serving, workers.name, *order[: number + 1])
    for future in started:
        assert_same(future.result(10), {"w": np.zeros(SMALL, np.float32) - mean(grads)["w"]})


def test_a_push_of_every_worker_is_one_step_and_no_push_two(client: optwire.Client, pool: ThreadPoolExecutor) -> None:
    workers = Workers(client, filled(0.0), opt.sgd(1.0), 2)
    for handle in workers.handles:
        assert str(handle.info().aggregation) == "sync(2)"
    for step in (1, 2, 3):
        done = [pool.submit(handle.step, filled(1.0)) for handle in workers.handles]
        assert_same(done[0].result(10), filled(-float(step)))
        assert_same(done[1].result(10), filled(-float(step)))
        acks = [handle.last_ack for handle in workers.handles]
        assert [(ack.applied_step, ack.step, ack.seq, ack.duplicate) for ack in acks if ack] == [
            (step, step, step, False)
        ] * 2


def test_one_worker_waits_for_nobody(client: optwire.Client) -> None:
    (handle,) = Workers(client, filled(0.0), opt.sgd(1.0), 1).handles
    assert_same(handle.step(filled(2.0)), filled(-2.0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_summed_in_32(client: optwire.Client, pool: ThreadPoolExecutor, dtype: str) -> None:
    kind = jax.numpy.dtype(dtype)
    grads = [np.full(5, value, kind) for value in (60_000, 60_000, 3)]  # their sum is infinite in float16
    workers = Workers(client, np.zeros(5, kind), opt.sgd(1.0), 3)
    done = [pool.submit(*call) for call in zip((h.step for h in workers.handles), grads, strict=True)]
    expected = -((np.float32(grads[0][0]) + np.float32(grads[1][0]) + np.float32(grads[2][0])) / np.float32(3))
    for future in done:
        np.testing.assert_array_equal(future.result(10), np.full(5, expected).astype(kind))


def test_each_hears_what_it_asked_for(client: optwire.Client, pool: ThreadPoolExecutor) -> None:
    workers = Workers(client, filled(5.0), opt.sgd(1.0), 3)
    wishes: list[dict[str, Any]] = [{"reply": "updates"}, {"reply": "none"}, {"telemetry": True}]
    for step in (1, 2):
        done = [pool.submit(h.step, filled(2.0), **w) for h, w in zip(workers.handles, wishes, strict=True)]
        assert_same(done[0].result(10), filled(-2.0))
        assert done[1].result(10) is None
        assert_same(done[2].result(10), filled(5.0 - 2.0 * step))
        ack = workers.handles[2].last_ack
        assert ack is not None
        assert ack.metrics["grad_norm"] == pytest.approx(2.0 * SMALL**0.5)


def test_hyperparameters_come_along_where_all_bring_the_same(client: optwire.Client, pool: ThreadPoolExecutor) -> None:
    workers = Workers(client, filled(0.0), opt.sgd(1.0), 2)
    done = [pool.submit(h.step, filled(1.0), hyperparams={"learning_rate": 0.5}) for h in workers.handles]
    for future in done:
        assert_same(future.result(10), filled(-0.5))
    assert [change.values for change in workers.handles[0].info().changes] == [(("sgd.step_size", 0.5),)]


def test_leaves_that_no_worker_has_gradients_for_stay(client: optwire.Client, pool: ThreadPoolExecutor) -> None:
    params = {"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}
    workers = Workers(client, params, "per_leaf(sgd(1.0))", 2)
    grads = {"a": None, "b": np.full(2, 3.0, np.float32)}
    for future in [pool.submit(handle.step, grads) for handle in workers.handles]:
        assert_same(future.result(10), {"a": params["a"], "b": np.full(2, -2.0, np.float32)})


# ---------------------------------------------------------------------------------------- workers that leave and return


@pytest.mark.parametrize("transport", ["unary", "stream"])
def test_a_worker_whose_deadline_passes_pushes_again_and_counts_once(
    serving: testing.Serving, client: optwire.Client, pool: ThreadPoolExecutor, transport: str
) -> None:
    elements = SMALL if transport == "unary" else LARGE
    workers = Workers(client, filled(0.0, elements), opt.sgd(1.0), 2)
    with optwire.connect(serving.target, timeout=0.4, transport=transport) as hasty:
        handle = hasty.attach(workers.name, worker=1)
        for _ in range(2):
            with pytest.raises(optwire.DeadlineError):
                handle.step(filled(3.0, elements))
        waits(serving, workers.name, 1)
        last = pool.submit(workers.handles[0].step, filled(1.0, elements))
        assert_same(handle.step(filled(3.0, elements)), filled(-2.0, elements))
        assert_same(last.result(10), filled(-2.0, elements))
        assert handle.last_ack is not None
    assert workers.handles[0].info().step == 1


def test_a_step_closes_without_the_calls_of_those_who_left_and_answers_them_later(
    serving: testing.Serving, client: optwire.Client
) -> None:
    workers = Workers(client, filled(0.0), opt.sgd(1.0), 2)
    with optwire.connect(serving.target, timeout=0.3) as hasty:
        handle = hasty.attach(workers.name, worker=1)
        with pytest.raises(optwire.DeadlineError):
            handle.step(filled(3.0))
        assert_same(workers.handles[0].step(filled(1.0)), filled(-2.0))
        assert_same(handle.step(filled(3.0)), filled(-2.0))
        assert handle.last_ack is not None
        assert handle.last_ack.duplicate
    assert workers.handles[0].info().step == 1


def test_a_worker_that_died_after_its_push_comes_back_under_its_rank(
    serving: testing.Serving, client: optwire.Client, pool: ThreadPoolExecutor
) -> None:
    workers = Workers(client, filled(0.0), opt.sgd(1.0), 2)
    mortal = optwire.connect(serving.target, timeout=20)
    dying = pool.submit(mortal.attach(workers.name, worker=1).step, filled(3.0))
    waits(serving, workers.name, 1)
    mortal.close()
    with pytest.raises(optwire.DetachedError):
        dying.result(10)
    again = client.attach(workers.name, worker=1)
    done = pool.submit(again.step, filled(3.0))
    assert_same(workers.handles[0].step(filled(1.0)), filled(-2.0))
    assert_same(done.result(10), filled(-2.0))


def test_a_worker_restarted_with_other_gradients_takes_its_own_place(
    serving: testing.Serving, client: optwire.Client, pool: ThreadPoolExecutor
) -> None:
    workers = Workers(client, filled(0.0), opt.sgd(1.0), 2)
    first = pool.submit(workers.handles[1].step, filled(100.0))
    waits(serving, workers.name, 1)
    second = pool.submit(client.attach(workers.name, worker=1).step, filled(3.0))
    with pytest.raises(optwire.StalePushError, match="another push of worker 1 took the place of this one"):
        first.result(10)
    assert_same(workers.handles[0].step(filled(1.0)), filled(-2.0))
    assert_same(second.result(10), filled(-2.0))


def test_a_replaced_push_whose_call_has_ended_gives_its_buffer_back(
    serving: testing.Serving, client: optwire.Client, pool: ThreadPoolExecutor
) -> None:
    workers = Workers(client, filled(0.0), opt.sgd(1.0), 2)
    landings = serving.server.registry._landings
    before = landings.lent_bytes
    with optwire.connect(serving.target, timeout=0.3) as hasty:
        for value in (1.0, 2.0, 3.0):
            with pytest.raises(optwire.DeadlineError):
                hasty.attach(workers.name, worker=1).step(filled(value))
    one = landing.buffer_bytes(serving.server.registry._table.find(name=workers.name).held.layout)
    wire.until(lambda: 0 < landings.lent_bytes - before <= one, "one payload is kept")
    assert_same(workers.handles[0].step(filled(1.0)), filled(-2.0))
    wire.until(lambda: landings.lent_bytes == before, "none is kept")


def test_a_push_made_again_while_its_call_waits_holds_one_buffer(
    serving: testing.Serving, client: optwire.Client, pool: ThreadPoolExecutor
) -> None:
    workers = Workers(client, filled(0.0), opt.sgd(1.0), 2)
    landings = serving.server.registry._landings
    before = landings.lent_bytes
    room = serving.server.registry._table.find(name=workers.name).room
    calls = []
    for others in range(4):
        calls.append(pool.submit(client.attach(workers.name, worker=1).step, filled(1.0)))
        wire.until(lambda others=others: len(room._waiting.get(sessions.worker_id(1), ())) > others, "it waits")
    one = landing.buffer_bytes(serving.server.registry._table.find(name=workers.name).held.layout)
    assert 0 < landings.lent_bytes - before <= one, "one payload is kept"
    assert_same(workers.handles[0].step(filled(1.0)), filled(-1.0))
    for call in calls:
        assert_same(call.result(10), filled(-1.0))


def test_a_call_that_waits_for_updates_gets_them_though_its_push_was_made_again(
    serving: testing.Serving, client: optwire.Client, pool: ThreadPoolExecutor
) -> None:
    workers = Workers(client, filled(5.0), opt.sgd(1.0), 2)
    first = pool.submit(client.attach(workers.name, worker=1).step, filled(1.0), reply="updates")
    waits(serving, workers.name, 1)
    room = serving.server.registry._table.find(name=workers.name).room
    again = pool.submit(client.attach(workers.name, worker=1).step, filled(1.0))
    wire.until(lambda: len(room._waiting[sessions.worker_id(1)]) == 2, "both wait")
    assert_same(workers.handles[0].step(filled(1.0)), filled(4.0))
    assert_same(first.result(10), filled(-1.0))
    assert_same(again.result(10), filled(4.0))


# ---------------------------------------------------------------------------------------------------- ends of a step


def fails_for_all(
    serving: testing.Serving,
    pool: ThreadPoolExecutor,
    workers: Workers,
    end: Callable[[], object],
    kind: type[optwire.OptwireError],
    match: str,
) -> None:
    """All but the last worker wait; ``end`` ends that."""
    started = [pool.submit(handle.step, filled(1.0)) for handle in workers.handles[:-1]]
    waits(serving, workers.name, *range(len(started)))
    end()
    for future in started:
        with pytest.raises(kind, match=match):
            future.result(10)


def test_gradients_that_are_not_finite_are_refused_for_all(
    serving: testing.Serving, client: optwire.Client, pool: ThreadPoolExecutor
) -> None:
    workers = Workers(client, filled(0.0), "on_nonfinite(sgd(1.0), 'reject')", 3)

    def last() -> None:
        with pytest.raises(optwire.NonFiniteError, match=r"grads\['w'\]"):
            workers.handles[-1].step(filled(np.nan))

    fails_for_all(serving, pool, workers, last, optwire.NonFiniteError, r"grads\['w'\]: 57 of 57")
    done = [pool.submit(handle.step, filled(1.0)) for handle in workers.handles]
    for future in done:
        assert_same(future.result(10), filled(-1.0))


def test_those_who_wait_hear_that_the_session_was_deleted(
    serving: testing.Serving, client: optwire.Client, pool: ThreadPoolExecutor
) -> None:
    workers = Workers(client, filled(0.0), opt.sgd(1.0), 3)
    end = lambda: client.delete_session(workers.name)  # noqa: E731
    started = [pool.submit(handle.step, filled(1.0)) for handle in workers.handles[:-1]]
    waits(serving, workers.name, 0, 1)
    end()
    for future in started:
        with pytest.raises(optwire.SessionNotFoundError, match="was deleted"):
            future.result(10)


def test_those_who_wait_hear_that_a_state_was_loaded(
    serving: testing.Serving, client: optwire.Client, pool: ThreadPoolExecutor
) -> None:
    workers = Workers(client, filled(0.0), opt.sgd(1.0), 2)
    reader = client.attach(workers.name)
    load = lambda: reader.load_state({"params/w": filled(9.0)["w"]})  # noqa: E731
    fails_for_all(serving, pool, workers, load, optwire.IncarnationError, "a state was loaded while this push waited")
    for handle in workers.handles:
        assert_same(handle.params(), filled(9.0))
    done = [pool.submit(handle.step, filled(1.0)) for handle in workers.handles]
    for future in done:
        assert_same(future.result(10), filled(8.0))


def test_a_session_that_is_extended_keeps_its_workers_and_ends_the_open_step(
    serving: testing.Serving, client: optwire.Client, pool: ThreadPoolExecutor
) -> None:
    workers = Workers(client, filled(0.0), opt.sgd(1.0), 2)
    other = client.attach(workers.name)
    more = {**filled(0.0), "x": np.zeros(2, np.float32)}
    waiting = pool.submit(workers.handles[0].step, filled(1.0))
    waits(serving, workers.name, 0)
    extended = client.create_session(more, opt.sgd(1.0), extends=other, worker=0)
    with pytest.raises(optwire.SessionNotFoundError, match="was deleted"):
        waiting.result(10)
    assert str(extended.info().aggregation) == "sync(2)"
    second = client.attach(workers.name, worker=1)
    grads = {**filled(1.0), "x": np.ones(2, np.float32)}
    done = [pool.submit(handle.step, grads) for handle in (extended, second)]
    for future in done:
        assert_same(future.result(10), {**filled(-1.0), "x": -np.ones(2, np.float32)})


@pytest.mark.parametrize("transport", ["unary", "stream"])
def test_a_server_that_drains_tells_those_who_wait(pool: ThreadPoolExecutor, transport: str) -> None:
    with testing.serve(drain_s=10.0) as serving:
        client = optwire.connect(serving.target, timeout=4, transport=transport)
        workers = Workers(client, filled(0.0), opt.sgd(1.0), 2)
        waiting = pool.submit(workers.handles[0].step, filled(1.0))
        waits(serving, workers.name, 0)
        started = time.monotonic()
    assert time.monotonic() - started < 3, "a server ends though its workers wait for each other"
    with pytest.raises(optwire.UnavailableError):
        waiting.result(10)
    client.close()


# ------------------------------------------------------------------------------------------------------ disagreements


def test_workers_of_one_step_must_say_the_same(
    serving: testing.Serving, client: optwire.Client, pool: ThreadPoolExecutor
) -> None:
    workers = Workers(client, filled(0.0), opt.sgd(1.0), 2)
    waiting = pool.submit(workers.handles[0].step, filled(4.0), grad_scale=4.0)
    waits(serving, workers.name, 0)
    second = workers.handles[1]
    with pytest.raises(optwire.InvalidArgumentError, match="grad_scale 1.0 of worker 1, but worker 0 pushed with 4.0"):
        second.step(filled(4.0))
    with pytest.raises(optwire.InvalidArgumentError, match="hyperparams"):
        second.step(filled(4.0), grad_scale=4.0, hyperparams={"learning_rate": 0.5})
    assert_same(second.step(filled(8.0), grad_scale=4.0), filled(-1.5))
    assert_same(waiting.result(10), filled(-1.5))


def test_a_worker_of_no_rank_can_read_and_not_push(client: optwire.Client) -> None:
    workers = Workers(client, filled(0.0), opt.sgd(1.0), 3)
    reader = client.attach(workers.name)
    assert_same(reader.params(), filled(0.0))
    with pytest.raises(
        optwire.InvalidArgumentError, match=r"expected one of the workers 0 to 2, as its steps are of sync\(3\)"
    ):
        reader.step(filled(1.0))


@pytest.mark.parametrize("rank", [3, -1, 2**70, 1.0, True, "1"], ids=repr)
def test_a_rank_that_is_none_is_refused_at_attach(client: optwire.Client, rank: Any) -> None:
    workers = Workers(client, filled(0.0), opt.sgd(1.0), 3)
    with pytest.raises(optwire.InvalidArgumentError, match="worker: .* expected a rank from 0 to"):
        client.attach(workers.name, worker=rank)
    with pytest.raises(optwire.InvalidArgumentError, match="worker: .* expected a rank from 0 to 2"):
        client.create_session(filled(0.0), opt.sgd(1.0), aggregation="sync(3)", worker=rank)


def test_a_creator_may_have_any_rank(client: optwire.Client, pool: ThreadPoolExecutor) -> None:
    name = secrets.token_hex(4)
    last = client.create_session(filled(0.0), opt.sgd(1.0), name=name, aggregation="sync(2)", worker=1)
    done = [pool.submit(h.step, filled(1.0)) for h in (last, client.attach(name, worker=0))]
    for future in done:
        assert_same(future.result(10), filled(-1.0))


def test_a_rank_outside_sync_is_a_worker_that_can_come_back(client: optwire.Client) -> None:
    name = secrets.token_hex(4)
    client.create_session(filled(0.0), opt.sgd(1.0), name=name)
    assert str(client.attach(name).info().aggregation) == "single"
    client.attach(name, worker=5).step(filled(1.0))
    assert_same(client.attach(name, worker=5).step(filled(1.0)), filled(-2.0))


UGLY = [
    "sync(0)",
    "sync(-1)",
    "sync(4",
    "sync(1e9)",
    "sync(1025)",
    "sync(04)",
    "sync()",
    "sync(4.0)",
    "sync (4)",
    "SYNC(4)",
]
UGLY += ["", "sync", "await", "sync(4)\n", " sync(4)", "sync(٤)", "sync(" + "9" * 5000 + ")", "single(1)"]


@pytest.mark.parametrize("text", [*UGLY, 4, b"sync(4)", ["sync(4)"], True], ids=lambda text: repr(text)[:20])
def test_an_aggregation_that_is_none_is_refused(client: optwire.Client, text: Any) -> None:
    with pytest.raises(optwire.InvalidArgumentError, match="aggregation.*: .*expected ('single', 'sync|1 to 1024)"):
        client.create_session(filled(0.0), opt.sgd(1.0), aggregation=text)


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"mode": 2}, "INVALID_ARGUMENT", "aggregation.workers: 0, expected 1 to 1024 in mode sync"),
        ({"mode": 2, "workers": 1025}, "INVALID_ARGUMENT", "aggregation.workers: 1025, expected 1 to 1024"),
        ({"mode": 2, "workers": 2, "k": 1}, "INVALID_ARGUMENT", "aggregation.k: 1, expected 0 in mode sync"),
        ({"mode": 2, "workers": 2, "staleness_steps_max": 1}, "INVALID_ARGUMENT", "aggregation.staleness_max: 1"),
        ({"mode": 2, "workers": 2, "deadline_s": float("nan")}, "INVALID_ARGUMENT", "aggregation.deadline_s: nan"),
        ({"mode": 8, "workers": 2}, "UNIMPLEMENTED", "aggregation.mode: 8 is not served"),
    ],
    ids=str,
)
def test_what_a_mode_cannot_have_and_nobody_serves_is_refused(
    serving: testing.Serving, fields: dict[str, Any], code: str, message: str
) -> None:
    peer = wire.Peer(serving.target)
    failure = wire.Failure.of(lambda: peer.create_from(begin(pb.Aggregation(**fields)), *rest()))
    assert failure is not None
    assert (failure.code, message in failure.message) == (code, True), failure
    peer.close()


def begin(aggregation: pb.Aggregation, key: str = "") -> pb.CreateSessionBegin:
    return pb.CreateSessionBegin(
        tree=convert.tree_to_proto(trees.flatten(filled(0.0)).spec),
        spec=convert.spec_to_proto(opt.sgd(1.0)),
        create_key=key or secrets.token_hex(16),
        aggregation=aggregation,
    )


def rest() -> list[Any]:
    payload = wire.payload_of(filled(0.0))
    return [*wire.chunks(payload, 2**20), pb.PayloadEnd(digest=wire.digest(payload))]


def test_a_creation_tried_again_must_ask_for_the_same_workers(serving: testing.Serving) -> None:
    peer, key = wire.Peer(serving.target), secrets.token_hex(16)
    two = begin(pb.Aggregation(mode=pb.Aggregation.MODE_SYNC, workers=2), key)
    assert peer.create_from(two, *rest()).id == peer.create_from(two, *rest()).id
    three = begin(pb.Aggregation(mode=pb.Aggregation.MODE_SYNC, workers=3), key)
    failure = wire.Failure.of(lambda: peer.create_from(three, *rest()))
    assert failure is not None
    assert failure.code == "ALREADY_EXISTS"
    peer.close()


# -------------------------------------------------------------------------------------------------------------- limits


def test_more_workers_than_can_wait_are_refused(client: optwire.Client) -> None:
    with pytest.raises(optwire.LimitError, match="streams_max: 97, expected at most 96"):
        client.create_session(filled(0.0), opt.sgd(1.0), aggregation="sync(97)")


def test_sessions_whose_payloads_cannot_all_wait_are_refused() -> None:
    with testing.serve(landing_bytes_max=600_000) as serving, optwire.connect(serving.target, timeout=5) as client:
        client.create_session(filled(0.0), opt.sgd(1.0), name="first", aggregation="sync(4)")
        with pytest.raises(optwire.LimitError, match="landing_bytes_max: 52[0-9]{4} bytes.*at most 300000, half of it"):
            client.create_session(filled(0.0), opt.sgd(1.0), aggregation="sync(4)")
        client.delete_session("first")
        client.create_session(filled(0.0), opt.sgd(1.0), aggregation="sync(4)")


def test_room_for_payloads_that_wait_is_kept_while_a_session_is_created() -> None:
    tree = trees.flatten(filled(0.0)).spec
    with testing.serve(landing_bytes_max=600_000) as serving:
        creations = serving.server.registry.creations
        four = sessions.Terms(aggregation=aggregations.Aggregation(aggregations.Mode.SYNC, 4))
        with creations.creating("one", tree, opt.sgd(1.0), "a" * 32, terms=four):
            with (
                pytest.raises(optwire.LimitError, match="half of it") as refused,
                creations.creating("two", tree, opt.sgd(1.0), "b" * 32, terms=four),
            ):
                pass
            assert refused.value.retry_after_s > 0, "the other may fail"
        with creations.creating("two", tree, opt.sgd(1.0), "b" * 32, terms=four):
            pass


def test_a_worker_that_never_comes_leaves_room_for_other_sessions(pool: ThreadPoolExecutor) -> None:
    with testing.serve(landing_bytes_max=600_000) as serving, optwire.connect(serving.target, timeout=5) as client:
        workers = Workers(client, filled(0.0), opt.sgd(1.0), 4)
        other = client.create_session(filled(0.0), opt.sgd(1.0))
        with optwire.connect(serving.target, timeout=0.3) as hasty:
            pushes = [pool.submit(hasty.attach(workers.name, worker=rank).step, filled(1.0)) for rank in range(3)]
            for push in pushes:
                assert isinstance(push.exception(10), optwire.DeadlineError)
        assert len(gathered(serving, workers.name)) == 3
        assert_same(other.step(filled(1.0)), filled(-1.0))


@pytest.mark.parametrize("transport", ["unary", "stream"])
def test_workers_that_wait_make_room_for_those_they_wait_for(pool: ThreadPoolExecutor, transport: str) -> None:
    with (
        testing.serve(streams_max=2) as serving,
        optwire.connect(serving.target, timeout=30, transport=transport) as client,
    ):
        groups = [Workers(client, filled(0.0), opt.sgd(1.0), 2) for _ in range(3)]
        for step in (1, 2):
            first = [pool.submit(workers.handles[0].step, filled(1.0)) for workers in groups]
            for workers in groups:
                waits(serving, workers.name, 0)
            second = [pool.submit(workers.handles[1].step, filled(3.0)) for workers in groups]
            for future in (*first, *second):
                assert_same(future.result(30), filled(-2.0 * step))


def test_workers_that_wait_are_no_stalled_transfer_and_no_idle_stream(pool: ThreadPoolExecutor) -> None:
    with (
        testing.serve(stall_s=0.1, idle_s=0.1) as serving,
        optwire.connect(serving.target, timeout=10, transport="stream") as client,
    ):
        workers = Workers(client, filled(0.0), opt.sgd(1.0), 2)
        waiting = pool.submit(workers.handles[0].step, filled(1.0))
        waits(serving, workers.name, 0)
        stream = next(iter(serving.server.streams._streams))
        time.sleep(0.5)  # several times as long as a transfer may stall
        assert stream in serving.server.streams._streams
        assert_same(workers.handles[1].step(filled(3.0)), filled(-2.0))
        assert_same(waiting.result(10), filled(-2.0))


@pytest.mark.slow
def test_a_worker_that_waits_long_is_not_sent_away_for_asking_whether_the_server_lives(
    serving: testing.Serving, pool: ThreadPoolExecutor
) -> None:
    with optwire.connect(serving.target, timeout=120, transport="stream") as client:
        workers = Workers(client, filled(0.0), opt.sgd(1.0), 2)
        waiting = pool.submit(workers.handles[0].step, filled(1.0))
        waits(serving, workers.name, 0)
        (stream,) = (each for each in serving.server.streams._streams if each.is_waiting)
        time.sleep(85)  # gRPC ends the connection at the third ping too many; clients ping every 20 s
        assert stream in serving.server.streams._streams
        assert_same(workers.handles[1].step(filled(3.0)), filled(-2.0))
        assert_same(waiting.result(10), filled(-2.0))


def test_short_calls_are_served_while_many_wait(pool: ThreadPoolExecutor) -> None:
    with (
        testing.serve(streams_max=4, threads=6) as serving,
        optwire.connect(serving.target, timeout=20, transport="unary") as client,
        contextlib.ExitStack() as waiting,
    ):
        workers = Workers(client, filled(0.0), opt.sgd(1.0), 4)
        threads = [threading.Thread(target=handle.step, args=(filled(1.0),)) for handle in workers.handles[:3]]
        for thread in threads:
            thread.start()
            waiting.callback(thread.join)
        waits(serving, workers.name, 0, 1, 2)
        assert client.server_info().features[:3] == ("stream", "unary", "sync")
        assert_same(workers.handles[3].params(), filled(0.0))
        assert_same(workers.handles[3].step(filled(1.0)), filled(-1.0))


# ---------------------------------------------------------------------------------------------- processes of their own

_WORKER = """
import sys
import numpy as np
import optwire
target, name, rank, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rng = np.random.default_rng(rank)
with optwire.connect(target, timeout=60) as client:
    session = client.attach(name, worker=rank)
    for _ in range(steps):
        params = session.step({"w": rng.standard_normal(5000, np.float32)})
    sys.stdout.buffer.write(params["w"].tobytes())
"""


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_four_processes_equal_one_with_their_mean(
    serving: testing.Serving, client: optwire.Client, optimizer: str
) -> None:
    arguments, steps = ((0.01,) if optimizer == "adam" else (0.01, 0.9)), 5
    init, update, get_params = getattr(seed, optimizer)(*arguments)
    params = {"w": np.ones(5000, np.float32)}
    state, update = init(params), jax.jit(update)
    sources = [np.random.default_rng(rank) for rank in range(4)]
    for step in range(steps):
        state = update(step, mean([{"w": source.standard_normal(5000, np.float32)} for source in sources]), state)
    name = f"processes-{optimizer}"
    client.create_session(params, getattr(opt, optimizer)(*arguments), name=name, aggregation="sync(4)")
    command = [sys.executable, "-c", _WORKER, serving.target, name]
    workers = [subprocess.Popen([*command, str(rank), str(steps)], stdout=subprocess.PIPE) for rank in range(4)]
    try:
        outputs = [worker.communicate(timeout=60)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait(10)
    assert outputs == [np.asarray(get_params(state)["w"]).tobytes()] * 4
    client.delete_session(name)
