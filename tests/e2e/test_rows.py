"""Gradients and parameters by rows: lazy and exact updates, pulls, bytes, retries, several workers, what is refused."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from tests.e2e import proxy, wire

import optwire
from optwire import optimizers as opt
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_server import testing

pytestmark = pytest.mark.usefixtures("no_error_is_logged")

ROWS, WIDTH = 500, 6
Rows = optwire.Rows


@pytest.fixture(scope="module")
def serving() -> Iterator[testing.Serving]:
    with wire.served() as serving:
        yield serving


@pytest.fixture(params=["auto", "stream", "unary"])
def client(serving: testing.Serving, request: pytest.FixtureRequest) -> Iterator[optwire.Client]:
    with optwire.connect(serving.target, transport=request.param, timeout=30) as client:
        yield client


@pytest.fixture
def plain(serving: testing.Serving) -> Iterator[optwire.Client]:
    with optwire.connect(serving.target, timeout=30) as client:
        yield client


def params(seed: int = 0, rows: int = ROWS) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "bias": rng.standard_normal(3, np.float32),
        "scale": np.float32(1.5),
        "table": rng.standard_normal((rows, WIDTH), np.float32),
    }


def batch(seed: int, count: int = 20) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gradients by rows, some of them twice, and the same as whole arrays."""
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, ROWS, count)
    rows = rng.integers(-8, 8, (count, WIDTH)).astype(np.float32)  # whole numbers, so that sums have one result
    rest = {"bias": rng.standard_normal(3, np.float32), "scale": np.float32(rng.standard_normal())}
    whole = np.zeros((ROWS, WIDTH), np.float32)
    np.add.at(whole, indices, rows)
    return {**rest, "table": Rows(indices, rows)}, {**rest, "table": whole}


# ---------------------------------------------------------------------------------------------------------------------
# Numbers.


@pytest.mark.parametrize(
    "spec", [opt.sgd(0.1), opt.momentum(0.1, 0.9), opt.adam(0.1), opt.sm3(0.1), opt.accumulate(opt.adam(0.1), 2)]
)
def test_an_exact_update_is_the_dense_one_everywhere(client: optwire.Client, spec: Any) -> None:
    by_rows, dense = client.create_session(params(), spec), client.create_session(params(), spec)
    for step in range(5):
        sparse, whole = batch(step)
        got, expected = by_rows.step(sparse, rows="exact"), dense.step(whole)
        touched = np.unique(sparse["table"].indices)
        np.testing.assert_array_equal(got["table"].indices, touched)
        np.testing.assert_array_equal(got["table"].rows, expected["table"][touched])
        np.testing.assert_array_equal(got["bias"], expected["bias"])
        assert got["scale"] == expected["scale"]
    for name, array in by_rows.state().arrays.items():
        np.testing.assert_array_equal(array, dense.state().arrays[name], err_msg=name)


def test_a_lazy_update_is_the_formula_on_touched_rows_and_nothing_elsewhere(client: optwire.Client) -> None:
    alpha, b1, b2, eps = 0.1, 0.9, 0.999, 1e-8
    session = client.create_session(params(), opt.adam(alpha, b1, b2, eps))
    x = params()["table"].astype(np.float64)
    m, v = np.zeros_like(x), np.zeros_like(x)
    for step in range(6):
        sparse, whole = batch(step)
        touched = np.unique(sparse["table"].indices)
        got = session.step(sparse)
        g = whole["table"][touched].astype(np.float64)
        m[touched] = b1 * m[touched] + (1 - b1) * g
        v[touched] = b2 * v[touched] + (1 - b2) * g**2
        # The step is the session's, as with whole gradients: a row that is met late is corrected for all steps.
        mhat, vhat = m[touched] / (1 - b1 ** (step + 1)), v[touched] / (1 - b2 ** (step + 1))
        x[touched] -= alpha * mhat / (np.sqrt(vhat) + eps)
        np.testing.assert_allclose(got["table"].rows, x[touched], rtol=2e-5, atol=2e-6)
    untouched = np.flatnonzero(~v.any(axis=1))
    assert untouched.size
    after = session.params()["table"]
    np.testing.assert_array_equal(after[untouched], params()["table"][untouched])
    np.testing.assert_allclose(after, x, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("spec", [opt.sgd(0.1), opt.adagrad(0.1, momentum=0.0)])
def test_lazy_is_exact_where_a_zero_gradient_changes_nothing(plain: optwire.Client, spec: Any) -> None:
    lazy, exact = plain.create_session(params(), spec), plain.create_session(params(), spec)
    for step in range(4):
        sparse, _ = batch(step)
        lazy.step(sparse)
        exact.step(sparse, rows="exact")
    np.testing.assert_array_equal(lazy.params()["table"], exact.params()["table"])


def test_a_clip_sees_the_norm_of_what_came(plain: optwire.Client) -> None:
    spec = opt.chain(opt.clip_grads(0.5), opt.sgd(1.0))
    lazy, dense = plain.create_session(params(), spec), plain.create_session(params(), spec)
    sparse, whole = batch(1)
    lazy.step(sparse)
    for name, array in dense.step(whole).items():
        np.testing.assert_allclose(lazy.params()[name], array, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f64"])
def test_rows_that_come_twice_are_summed_in_32_bits_at_least(plain: optwire.Client, dtype: str) -> None:
    def made(array: np.ndarray) -> np.ndarray:
        return optwire.to_bf16(array) if dtype == "bf16" else array.astype({"f16": "f2", "f64": "f8"}[dtype])

    def read(array: np.ndarray) -> np.ndarray:
        return optwire.from_bf16(array) if dtype == "bf16" else np.asarray(array, np.float64)

    session = plain.create_session({"table": made(np.zeros((9, 2), np.float32))}, opt.sgd(1.0))
    # In 16 bits the sum would stay at 2048 (f16) or 256 (bf16) after each of the small ones.
    big = 256.0 if dtype == "bf16" else 2048.0
    rows = made(np.array([[big, 1]] + [[0.5, 1]] * 8 + [[3, 3]], np.float32))
    got = session.step({"table": Rows([4, *[4] * 8, 0], rows)})
    np.testing.assert_array_equal(got["table"].indices, [0, 4])
    np.testing.assert_array_equal(read(got["table"].rows), [[-3, -3], [-(big + 4), -9]])


def test_no_rows_leave_a_leaf_as_it_is_and_the_step_goes_on(plain: optwire.Client) -> None:
    session = plain.create_session(params(), opt.adam(0.1))
    none = Rows(np.empty(0, np.int64), np.empty((0, WIDTH), np.float32))
    got = session.step({**batch(0)[0], "table": none})
    assert got["table"].rows.shape == (0, WIDTH)
    np.testing.assert_array_equal(session.params()["table"], params()["table"])
    only = plain.create_session(params()["table"], opt.adam(0.1))
    only.step(none)
    assert only.step_count == 1
    # The count of updates went on: the next one is the second, as with whole gradients.
    dense = plain.create_session(params()["table"], opt.adam(0.1))
    dense.step(np.zeros((ROWS, WIDTH), np.float32))
    rows = np.ones((1, WIDTH), np.float32)
    whole = np.zeros((ROWS, WIDTH), np.float32)
    whole[3] = 1
    np.testing.assert_array_equal(only.step(Rows([3], rows)).rows[0], dense.step(whole)[3])


def test_rows_of_leaves_that_have_parted_ways(plain: optwire.Client) -> None:
    spec = opt.per_leaf(opt.adam(0.1))
    by_rows, dense = plain.create_session(params(), spec), plain.create_session(params(), spec)
    for step in range(4):
        sparse, whole = batch(step)
        if step == 1:  # from here on they are held in blocks of their own
            for session in (by_rows, dense):
                session.step({**whole, "bias": None})
            continue
        got, expected = by_rows.step(sparse, rows="exact"), dense.step(whole)
        np.testing.assert_array_equal(got["bias"], expected["bias"])
    np.testing.assert_array_equal(by_rows.params()["table"], dense.params()["table"])
    before = by_rows.params()["table"]
    sparse, whole = batch(9)
    lazily, expected = by_rows.step(sparse)["table"], dense.step(whole)["table"]
    np.testing.assert_array_equal(lazily.rows, expected[lazily.indices])
    untouched = np.setdiff1d(np.arange(ROWS), lazily.indices)
    np.testing.assert_array_equal(by_rows.params()["table"][untouched], before[untouched])


def test_a_table_alone_and_one_deep_in_a_nest(plain: optwire.Client) -> None:
    table = params()["table"]
    nested = plain.create_session({"layers": [table, (table, None)]}, opt.sgd(1.0))
    ones = np.ones((2, WIDTH), np.float32)
    got = nested.step({"layers": [Rows([1, 2], ones), (table, None)]})
    assert isinstance(got["layers"], list)
    assert got["layers"][1][1] is None
    np.testing.assert_array_equal(got["layers"][0].rows, table[1:3] - 1)
    np.testing.assert_array_equal(got["layers"][1][0], np.zeros_like(table))
    np.testing.assert_array_equal(nested.rows({"layers/1/0": [0]})["layers/1/0"], [np.zeros(WIDTH)])


def test_a_table_of_scalars_and_one_of_matrices(plain: optwire.Client) -> None:
    session = plain.create_session(
        {
            "one": np.zeros(50_000, np.float32),
            "many": np.zeros((7, 3, 5), np.float32),
            "single": np.zeros((1, 1), "f4"),
        },
        opt.sgd(1.0),
    )
    got = session.step(
        {
            "one": Rows([49_999, 0], np.array([2, 1], np.float32)),
            "many": Rows([6], np.ones((1, 3, 5), np.float32)),
            "single": Rows([0], np.ones((1, 1), np.float32)),
        }
    )
    np.testing.assert_array_equal(got["one"].rows, [-1, -2])
    np.testing.assert_array_equal(session.params()["many"], np.pad(-np.ones((1, 3, 5)), ((6, 0), (0, 0), (0, 0))))
    np.testing.assert_array_equal(session.params()["single"], [[-1]])


def test_steps_by_rows_whole_steps_and_hyperparameters_may_alternate(plain: optwire.Client) -> None:
    by_rows, dense = plain.create_session(params(), opt.adam(0.1)), plain.create_session(params(), opt.adam(0.1))
    for step in range(6):
        sparse, whole = batch(step)
        options: dict[str, Any] = {"hyperparams": {"learning_rate": 0.1 / (step + 1)}, "grad_scale": 2.0**step}
        if step % 2:
            by_rows.step(sparse, rows="exact", **options)
        else:
            by_rows.step(whole, **options)
        dense.step(whole, **options)
    np.testing.assert_array_equal(by_rows.params()["table"], dense.params()["table"])


# ---------------------------------------------------------------------------------------------------------------------
# What travels.


def test_rows_are_read_in_the_order_asked_for_at_one_step(client: optwire.Client) -> None:
    session = client.create_session(params(), opt.sgd(0.1))
    session.step(batch(0)[1], reply="none")
    other = client.attach(session.name)
    got = other.rows({"table": np.array([7, 3, 7, 499], np.uint16), "bias": None, "scale": None})
    everything = session.params()
    np.testing.assert_array_equal(got["table"], everything["table"][[7, 3, 7, 499]])
    np.testing.assert_array_equal(got["bias"], everything["bias"])
    assert got["scale"] == everything["scale"]
    assert other.step_count == 1
    assert other.rows({"table": []})["table"].shape == (0, WIDTH)


def test_other_parameters_are_read_by_rows_too(plain: optwire.Client) -> None:
    session = plain.create_session(params(), opt.ema_params(opt.sgd(0.1), 0.9))
    for step in range(3):
        session.step(batch(step)[1])
    got = session.rows({"table": [5, 2]}, which="ema")["table"]
    np.testing.assert_array_equal(got, session.params("ema")["table"][[5, 2]])


def test_bytes_are_those_of_touched_rows_both_ways(serving: testing.Serving) -> None:
    table = np.zeros((200_000, 16), np.float32)  # 12.8 MB
    with proxy.before(serving.target) as between, optwire.connect(between.target, transport="stream") as client:
        session = client.create_session({"table": table}, opt.adam(0.1))
        indices = np.random.default_rng(0).choice(len(table), 1000, replace=False)
        grads = Rows(indices, np.ones((1000, 16), np.float32))
        for reply, down in (("params", 64_000), ("none", 0)):
            before = dict(between.bytes)
            session.step({"table": grads}, reply=reply)
            up = 68_000  # a row of 64 bytes and an index of 4
            assert up < between.bytes[proxy.UP] - before[proxy.UP] < up + 4_000
            assert down <= between.bytes[proxy.DOWN] - before[proxy.DOWN] < down + 4_000
            assert session.last_ack is not None
            assert session.last_ack.payload_bytes == down
        before = dict(between.bytes)
        session.rows({"table": indices})
        assert between.bytes[proxy.UP] - before[proxy.UP] < 8_000
        assert 64_000 <= between.bytes[proxy.DOWN] - before[proxy.DOWN] < 68_000


def test_by_rows_beside_shared_memory(plain: optwire.Client) -> None:
    session = plain.create_session({"table": np.zeros((20_000, 16), np.float32)}, opt.sgd(1.0))
    session.step({"table": np.ones((20_000, 16), np.float32)})
    session.step({"table": Rows([9], np.ones((1, 16), np.float32))})
    got = session.step({"table": np.ones((20_000, 16), np.float32)})
    assert got["table"][9, 0] == -3
    assert got["table"][8, 0] == -2
    assert session.info().transport in ("shared_memory", "stream")


# ---------------------------------------------------------------------------------------------------------------------
# Exactly once.


def message(session: pb.Session, seq: int, base_step: int, counts: dict[int, int], **changes: Any) -> pb.PushBegin:
    rows = [pb.LeafRows(leaf=leaf, count=count) for leaf, count in counts.items()]
    return wire.push(session, seq, base_step, rows=rows, **changes)


def payload(indices: list[int], value: float = 1.0) -> bytes:
    """Of a session with a table alone."""
    return np.array(indices, "<i4").tobytes() + np.full((len(indices), WIDTH), value, "<f4").tobytes()


TABLE = {"table": params()["table"]}


def test_a_retry_by_rows_is_answered_and_not_applied_again(peer: wire.Peer) -> None:
    session = peer.create(TABLE, opt.adam(0.1), secrets.token_hex(4))
    begin = message(session, 1, 0, {0: 2})
    first = peer.step(begin, payload([4, 9]))
    again = peer.step(begin, payload([4, 9]))
    assert (first.ack.duplicate, again.ack.duplicate) == (False, True)
    assert again.payload == first.payload
    streamed = peer.stream(*wire.upload(begin, payload([4, 9])))
    assert wire.params_of(streamed) == first.payload
    for other, changes in (
        (payload([4, 8]), {}),
        (payload([4, 9]), {"rows_exact": True}),
    ):
        wrong = message(session, 1, 0, {0: 2}, **changes)
        failure = wire.Failure.of(lambda wrong=wrong, other=other: peer.step(wrong, other))
        assert failure is not None
        assert failure.detail is not None
        assert failure.detail.reason == "DIVERGENT_RETRY"
    assert peer.read(session.name)[0] == 1


def test_a_lost_answer_is_asked_for_again(serving: testing.Serving) -> None:
    with proxy.before(serving.target) as between, optwire.connect(between.target, transport="stream") as client:
        session = client.create_session(params(), opt.sgd(1.0))
        session.step(batch(0)[0])
        fault = between.fail(proxy.DOWN, messages=1, act="reset")
        got = session.step({**batch(1)[0], "table": Rows([1], np.ones((1, WIDTH), np.float32))})
        assert fault is not None
        assert session.step_count == 2
        np.testing.assert_array_equal(session.params()["table"][1], got["table"].rows[0])


# ---------------------------------------------------------------------------------------------------------------------
# Several workers.


def ranked(client: optwire.Client, aggregation: str, spec: Any, count: int) -> list[optwire.Session]:
    first = client.create_session(params(), spec, aggregation=aggregation)
    return [first, *(client.attach(first.name, worker=rank) for rank in range(1, count))]


@pytest.mark.parametrize("how", ["lazy", "exact"])
def test_workers_of_one_step_have_the_mean_on_all_their_rows(plain: optwire.Client, how: str) -> None:
    by_rows = ranked(plain, "sync(3)", opt.adam(0.1), 3)
    dense = ranked(plain, "sync(3)", opt.adam(0.1), 3)
    union = [
        np.unique(np.concatenate([batch(3 * step + rank)[0]["table"].indices for rank in range(3)])) for step in (0, 1)
    ]
    with ThreadPoolExecutor(6) as pool:
        for step in (0, 1):
            pushes = [batch(3 * step + rank) for rank in range(3)]
            asked = [
                pool.submit(handle.step, sparse, rows=how, weight=1.0 + rank)
                for rank, (handle, (sparse, _)) in reversed(list(enumerate(zip(by_rows, pushes, strict=True))))
            ]
            whole = [
                pool.submit(handle.step, full, weight=1.0 + rank)
                for rank, (handle, (_, full)) in enumerate(zip(dense, pushes, strict=True))
            ]
            answers = [future.result() for future in reversed(asked)]
            expected = whole[0].result()
            for rank, answer in enumerate(answers):
                touched = np.unique(pushes[rank][0]["table"].indices)
                np.testing.assert_array_equal(answer["table"].indices, touched)
                if how == "exact" or step == 0:
                    np.testing.assert_array_equal(answer["table"].rows, expected["table"][touched])
                np.testing.assert_array_equal(answer["bias"], expected["bias"])
    after = by_rows[0].params()["table"]
    if how == "exact":
        np.testing.assert_array_equal(after, dense[0].params()["table"])
    else:
        never = np.setdiff1d(np.arange(ROWS), np.union1d(*union))
        np.testing.assert_array_equal(after[never], params()["table"][never])


def test_two_calls_that_wait_with_one_push_both_get_its_rows(
    serving: testing.Serving, plain: optwire.Client, peer: wire.Peer
) -> None:
    first = plain.create_session(TABLE, opt.sgd(1.0), aggregation="sync(2)")
    session = pb.Session(id=first.id, incarnation=1)
    room = serving.server.registry._table.by_name[first.name].room
    begins = [message(session, 1, 0, {0: 2}, worker=f"{rank:032x}") for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        waiting = []
        for count in (1, 2):  # the second takes the place of the first
            waiting.append(pool.submit(peer.step, begins[0], payload([4, 9])))
            wire.until(lambda count=count: len(room._waiting.get(f"{0:032x}", ())) == count, "it waits")
        second = peer.step(begins[1], payload([9, 11]))
        answers = [future.result() for future in waiting]
    assert answers[0].payload == answers[1].payload
    table = first.params()["table"]
    assert answers[0].payload == table[[4, 9]].tobytes()
    assert second.payload == table[[9, 11]].tobytes()
    np.testing.assert_array_equal(table[[4, 9, 11]], params()["table"][[4, 9, 11]] - np.float32([[0.5], [1], [0.5]]))


def test_telemetry_of_an_exact_update_is_of_its_gradients(plain: optwire.Client) -> None:
    rows, rng = 1 << 18, np.random.default_rng(0)
    session = plain.create_session({"table": np.zeros((rows, 5), np.float32)}, opt.sgd(1.0))
    for _ in range(20):
        indices = np.sort(rng.choice(rows, 5000, replace=False))
        grad = rng.standard_normal((5000, 5)).astype(np.float32)
        session.step({"table": Rows(indices, grad)}, rows="exact", telemetry=True, reply="none")
        assert session.last_ack is not None
        assert session.last_ack.metrics["grad_norm"] == pytest.approx(np.linalg.norm(grad.astype(np.float64)), 1e-4)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_indices_and_rows_may_be_strided(plain: optwire.Client, dtype: Any) -> None:
    session = plain.create_session({"table": np.zeros((ROWS, WIDTH), np.float32)}, opt.sgd(1.0))
    indices, rows = np.arange(20, dtype=dtype)[::2], np.ones((10, 2 * WIDTH), np.float32)[:, ::2]
    session.step({"table": Rows(indices, rows)})
    assert np.flatnonzero(session.params()["table"][:, 0]).tolist() == indices.tolist()
    assert (session.rows({"table": indices})["table"] == -1).all()


def test_late_rows_that_are_too_many_to_ask_for_are_picked_from_all(plain: optwire.Client) -> None:
    rows = 1_300_000
    session = plain.create_session({"table": np.ones(rows, np.float32), "bias": np.zeros(3, np.float32)}, opt.sgd(1.0))
    whole = {"table": np.arange(rows, dtype=np.float32), "bias": np.ones(3, np.float32)}
    plain.attach(session.name).step(whole, reply="none")
    indices = np.arange(1, rows, dtype=np.int32)
    got = session.step({"table": Rows(indices, whole["table"][1:]), "bias": whole["bias"]}, late="params")
    assert (session.late_count, session.step_count) == (1, 1)
    np.testing.assert_array_equal(got["table"].rows, 1 - whole["table"][1:])
    np.testing.assert_array_equal(got["bias"], -whole["bias"])


def test_exact_without_any_rows_is_refused(plain: optwire.Client) -> None:
    session = plain.create_session(params(), opt.sgd(0.1))
    with pytest.raises(optwire.InvalidArgumentError, match=r"rows: 'exact', expected optwire\.Rows among"):
        session.step(batch(0)[1], rows="exact")


@pytest.mark.parametrize("where", ["indices", "rows", "read"])
def test_lists_of_several_lengths_are_refused_by_name(plain: optwire.Client, where: str) -> None:
    session = plain.create_session({"table": np.zeros((ROWS, 2), np.float32)}, opt.sgd(0.1))
    ragged: Any = [[0], [1, 2]]
    grads = {"table": Rows(ragged, [[1.0]]) if where == "indices" else Rows([0, 1], ragged)}
    with pytest.raises(optwire.InvalidArgumentError, match=r"\['table'\]\.(indices|rows): "):
        session.rows({"table": ragged}) if where == "read" else session.step(grads)


def test_workers_of_one_step_agree_on_what_comes_by_rows(plain: optwire.Client) -> None:
    one, two = ranked(plain, "sync(2)", opt.sgd(0.1), 2)
    sparse, whole = batch(0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(one.step, sparse)
        wire.until(lambda: any(worker.has_pushed for worker in two.workers()), "the first push has come")
        with pytest.raises(optwire.InvalidArgumentError, match="leaves by rows"):
            two.step(whole)
        two.step(sparse)
        waiting.result()


def test_stale_rows_are_applied_where_staleness_is_allowed(plain: optwire.Client) -> None:
    first = plain.create_session(params(), opt.sgd(1.0), aggregation="async(damping=inverse)")
    second = plain.attach(first.name)
    rows = Rows([1, 2], np.ones((2, WIDTH), np.float32))
    rest = {"bias": np.zeros(3, np.float32), "scale": np.float32(0)}
    first.step({**rest, "table": rows})
    got = second.step({**rest, "table": rows})  # of step 0: half as much
    np.testing.assert_allclose(got["table"].rows, params()["table"][[1, 2]] - 1.5, rtol=1e-6)


def test_rows_that_come_too_late_get_the_newest_of_the_same_rows(plain: optwire.Client) -> None:
    first, second = ranked(plain, "k_of_n(1, 2)", opt.sgd(1.0), 2)
    first.step(batch(0)[0])
    got = second.step(batch(1)[0], late="params")
    assert second.late_count == 1
    touched = got["table"].indices
    np.testing.assert_array_equal(got["table"].rows, first.params()["table"][touched])
    assert second.step_count == 1


# ---------------------------------------------------------------------------------------------------------------------
# What is refused.


def test_a_client_refuses_rows_that_do_not_fit(plain: optwire.Client) -> None:
    session = plain.create_session(params(), opt.sgd(0.1))
    sparse, _ = batch(0)
    ones = np.ones((1, WIDTH), np.float32)
    cases: list[tuple[Any, type[Exception], str]] = [
        (Rows([ROWS], ones), optwire.InvalidArgumentError, f"table'].indices: {ROWS}, expected numbers from 0 to 499"),
        (Rows([-1], ones), optwire.InvalidArgumentError, "table'].indices: -1"),
        (Rows([1.5], ones), optwire.InvalidArgumentError, "whole numbers along one axis"),
        (Rows([[1]], ones), optwire.InvalidArgumentError, "whole numbers along one axis"),
        (Rows([True], ones), optwire.InvalidArgumentError, "whole numbers along one axis"),
        (Rows([1, 2], ones), optwire.TreeMismatchError, r"expected f32 of shape \(2, 6\)"),
        (Rows([1], ones.astype(np.float64)), optwire.TreeMismatchError, r"f64 of shape \(1, 6\), expected f32"),
        (Rows([1], "text"), optwire.TreeError, "element type"),
    ]
    for rows, kind, problem in cases:
        with pytest.raises(kind, match=problem):
            session.step({**sparse, "table": rows})
    with pytest.raises(optwire.InvalidArgumentError, match="no axis"):
        session.step({**sparse, "scale": Rows([0], np.ones(1, np.float32))})
    with pytest.raises(optwire.InvalidArgumentError, match="one of lazy, exact"):
        session.step(sparse, rows="both")
    with pytest.raises(optwire.InvalidArgumentError, match="out: "):
        session.step(sparse, out=session.param_buffers())
    for indices, problem in (
        ({"tables": [1]}, "'tables', expected names of leaves"),
        ({}, "indices by name"),
        ({"table": [500]}, "500, expected numbers from 0 to 499"),
        ({"table": [0.5]}, "whole numbers"),
        ({"scale": [0]}, "no axis"),
    ):
        with pytest.raises(optwire.InvalidArgumentError, match=problem):
            session.rows(indices)
    assert session.step_count == 0
    session.step(sparse)


@pytest.mark.parametrize(
    ("spec", "options", "step", "problem"),
    [
        (opt.sm3(0.1), {}, {}, "granularity is tensor; push with rows='exact'"),
        (opt.accumulate(opt.adam(0.1), 2), {}, {}, "gathers several pushes"),
        (opt.sgd(0.1), {}, {"telemetry": True}, "telemetry"),
        (opt.sgd(0.1), {}, {"reply": "updates"}, "reply 'updates'"),
        (opt.sgd(0.1), {"grads_codec": "int8"}, {}, "codecs"),
        (opt.sgd(0.1), {"params_codec": "bf16"}, {}, "codecs"),
        (opt.sgd(0.1), {"aggregation": "buffered(2)"}, {}, "aggregation buffered"),
        (opt.sgd(0.1), {"aggregation": "async(compensation=0.1)"}, {}, "compensation"),
        (opt.per_leaf(opt.sgd(0.1)), {}, {"absent": True}, "absent leaves"),
    ],
)
def test_what_does_not_go_with_rows_is_refused_by_name(
    plain: optwire.Client, spec: Any, options: dict[str, Any], step: dict[str, Any], problem: str
) -> None:
    session = plain.create_session(params(), spec, **options)
    sparse, _ = batch(0)
    if step.pop("absent", False):
        sparse["bias"] = None
    with pytest.raises(optwire.UnsupportedError, match=problem):
        session.step(sparse, **step)
    assert session.info().step == 0


def test_gradients_that_are_not_finite_are_named(plain: optwire.Client) -> None:
    session = plain.create_session(params(), opt.on_nonfinite(opt.sgd(0.1), "reject"))
    sparse, _ = batch(0)
    bad = {**sparse, "table": Rows([1], np.full((1, WIDTH), np.nan, np.float32))}
    with pytest.raises(optwire.NonFiniteError, match=r"grads\['table'\]: 6 of 6 elements"):
        session.step(bad, rows="exact")
    session.step(sparse, rows="exact")
    assert session.step_count == 1


def bad(call: Callable[[], object], reason: str, problem: str) -> None:
    failure = wire.Failure.of(call)
    assert failure is not None
    assert failure.detail is not None
    assert failure.detail.reason == reason, failure
    assert problem in failure.message


def test_a_server_refuses_rows_that_do_not_fit(peer: wire.Peer) -> None:
    tree = {"scale": np.float32(1), "table": params()["table"]}
    session = peer.create(tree, opt.sgd(0.1), secrets.token_hex(4))
    scale = np.float32(0).tobytes()
    one = scale + payload([1])

    def push(counts: dict[int, int], data: bytes, **changes: Any) -> Callable[[], object]:
        return lambda: peer.step(message(session, 1, 0, counts, **changes), data)

    invalid = "INVALID_ARGUMENT"
    bad(push({2: 1}, one), invalid, "leaf 2, expected positions below 2")
    bad(push({2**32 - 1: 1}, one), invalid, "expected positions below 2")
    bad(push({0: 0}, one), invalid, "which has no axis")
    bad(push({1: ROWS + 1}, one), invalid, "expected at most 500")
    bad(push({1: 2**64 - 1}, one), invalid, "expected at most 500")
    bad(push({1: 1, 0: 1}, one), invalid, "not ascending")
    bad(push({}, one, rows_exact=True), invalid, "rows_exact: true without rows")
    bad(push({1: 2}, scale + payload([1, 1])), invalid, "1 before 1, expected strictly increasing")
    bad(push({1: 2}, scale + payload([2, 1])), invalid, "2 before 1")
    bad(push({1: 1}, scale + payload([-1])), invalid, "-1, expected numbers from 0 to 499")
    bad(push({1: 1}, scale + payload([ROWS])), invalid, "500, expected numbers from 0 to 499")
    bad(push({1: 2}, one), "INVALID_PAYLOAD", "ended after")
    bad(push({1: 1}, one + b"1"), "INVALID_PAYLOAD", "past the end")
    bad(push({1: 1}, one, absent_leaves=[0]), "NOT_SERVED", "absent leaves")
    bad(push({1: 1}, b"", shared_memory_slot=5), "NOT_SERVED", "shared memory")

    def read(*rows: pb.LeafIndices) -> Callable[[], object]:
        request = pb.ReadParamsRequest(session=wire.named(session.name), rows=rows)
        return lambda: list(peer.stub.ReadParams(request, timeout=wire.TIMEOUT_S))

    index = np.array([1], "<i4").tobytes()
    bad(read(pb.LeafIndices(leaf=2)), invalid, "leaf 2, expected positions below 2")
    bad(read(pb.LeafIndices(leaf=0, indices=index)), invalid, "which has no axis")
    bad(read(pb.LeafIndices(leaf=1, indices=index), pb.LeafIndices(leaf=1)), invalid, "ascending positions")
    bad(read(pb.LeafIndices(leaf=1, indices=index[:3])), invalid, "3 bytes of indices")
    bad(read(pb.LeafIndices(leaf=1, indices=index + index)), invalid, "1 before 1")
    bad(read(pb.LeafIndices(leaf=1, indices=index, whole=True)), invalid, "which is read whole")
    assert peer.read(session.name) == (0, wire.payload_of(tree))
    assert peer.step(message(session, 1, 0, {1: 1}), one).ack.step == 1
