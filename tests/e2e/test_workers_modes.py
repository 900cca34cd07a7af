"""What each mode of aggregation makes of gradients, over the wire: who is late, who waits, what counts."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.e2e import wire

import optwire
from optwire import optimizers as opt
from optwire_proto import errors, sessions
from optwire_server import testing
from optwire_server.engine import landing, mean

pytestmark = pytest.mark.usefixtures("no_error_is_logged")

FLOAT = np.float32
BF16 = ml_dtypes.bfloat16
BOTH_WAYS = pytest.mark.parametrize("transport", ["stream", "shared_memory"], indirect=True)
LARGE = 700_000  # elements: its parameters leave block by block, while the update is under way


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[testing.Serving]:
    folder = tmp_path_factory.mktemp("handover")
    with wire.served(handover_dir=str(folder)) as serving:
        yield serving


@pytest.fixture(params=["stream"])
def transport(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def client(serving: testing.Serving, transport: Any) -> Iterator[optwire.Client]:
    with optwire.connect(serving.target, timeout=20, transport=transport) as client:
        yield client


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def filled(value: float, size: int = 5) -> dict[str, np.ndarray]:
    return {"w": np.full(size, value, FLOAT)}


class Run:
    """A session of plain SGD with step 1, and handles of its workers."""

    def __init__(
        self, client: optwire.Client, aggregation: str, workers: int, *, size: int = 5, **options: Any
    ) -> None:
        self.name = secrets.token_hex(4)
        self.size = size
        self.client = client
        spec = options.pop("spec", opt.sgd(1.0))
        client.create_session(filled(0.0, size), spec, name=self.name, aggregation=aggregation, **options).close()
        self.workers = [client.attach(self.name, worker=rank) for rank in range(workers)]

    def step(self, rank: int, value: float, **options: Any) -> float:
        """One push of gradients that are all the same; gives a parameter, which must be that of all."""
        params = self.workers[rank].step(filled(value, self.size), **options)["w"]
        assert (params == params[0]).all()
        return float(params[0])

    def read(self, rank: int) -> float:
        return float(self.workers[rank].params()["w"][0])


def f32(value: float) -> float:
    return float(FLOAT(value))


def waits(serving: testing.Serving, run: Run, count: int) -> None:
    live = serving.server.registry._table.find(name=run.name)
    wire.until(lambda: len(live.machine.gathered) == count, f"{count} wait")


# --------------------------------------------------------------------------------------------- every push is a step


@pytest.mark.parametrize("size", [5, LARGE], ids=["small", "large"])
@BOTH_WAYS
def test_in_async_every_push_counts_on_whatever_it_was_computed(client: optwire.Client, size: int) -> None:
    run = Run(client, "async", 2, size=size)
    assert [run.step(0, 1.0), run.step(0, 2.0), run.step(1, 4.0), run.step(0, 8.0)] == [-1.0, -3.0, -7.0, -15.0]
    assert run.workers[1].step_count == 3, "as far as it knows"
    assert run.read(1) == -15.0


def test_late_gradients_count_less_where_they_are_damped(client: optwire.Client) -> None:
    run = Run(client, "async(damping=inverse)", 2)
    assert run.step(0, 3.0) == -3.0
    assert run.step(1, 3.0) == -4.5
    assert run.step(0, 6.0, grad_scale=2.0) == -4.5 - 1.5


def test_a_weight_counts_where_pushes_are_summed(client: optwire.Client) -> None:
    assert Run(client, "async(combine=sum)", 1).step(0, 3.0, weight=2.0) == -6.0
    assert Run(client, "async", 1).step(0, 3.0, weight=2.0) == -3.0


def test_what_gradients_are_multiplied_by_may_make_up_for_their_scale(client: optwire.Client) -> None:
    run = Run(client, "async(combine=sum)", 1)
    assert run.step(0, 3.0, weight=2.0, grad_scale=2.0, telemetry=True) == -3.0
    damped = Run(client, "async(damping=inverse)", 2)
    damped.step(0, 1.0)
    assert damped.step(1, 3.0, grad_scale=0.5, telemetry=True) == -1.0 - 3.0, "halved, as it is late"


def test_a_scale_that_is_none_once_the_weight_is_part_of_it_is_refused(client: optwire.Client) -> None:
    run = Run(client, "async(combine=sum)", 1)
    for scale, weight in ((2e-38, 1e12), (3e38, 1e-12)):
        with pytest.raises(optwire.InvalidArgumentError, match="grad_scale .* once weight and damping are part of it"):
            run.step(0, 1.0, grad_scale=scale, weight=weight)
    assert run.step(0, 1.0) == -1.0


def test_what_exceeds_the_bound_is_refused_and_the_worker_goes_on_once_it_has_read(client: optwire.Client) -> None:
    run = Run(client, "bounded_staleness(1)", 2)
    run.step(0, 1.0)
    run.step(0, 1.0)
    with pytest.raises(optwire.StaleStepError, match="2 steps ago, more than 1"):
        run.step(1, 1.0)
    assert (run.read(1), run.step(1, 1.0)) == (-2.0, -3.0)


def test_a_push_that_is_late_may_change_the_learning_rate_from_its_step_on(client: optwire.Client) -> None:
    run = Run(client, "async", 2)
    run.step(0, 1.0)
    assert run.step(1, 1.0, hyperparams={"learning_rate": 0.5}) == -1.5
    assert run.step(0, 1.0) == -2.0
    assert [change.from_step for change in run.workers[0].info().changes] == [1]


@BOTH_WAYS
def test_a_fast_worker_waits_for_a_slow_one_and_is_told_when_it_has_pushed(
    serving: testing.Serving, client: optwire.Client, pool: ThreadPoolExecutor
) -> None:
    run = Run(client, "bounded_staleness(1, policy=wait)", 2)
    assert run.step(0, 1.0) == -1.0
    fast = pool.submit(run.step, 0, 2.0, hyperparams={"learning_rate": 0.5})
    waits(serving, run, 1)
    assert run.step(1, 4.0) == -5.0
    assert fast.result(10) == -6.0
    assert [change.from_step for change in run.workers[0].info().changes] == [2], "of the step that it became"


def test_a_worker_that_reads_or_leaves_lets_the_fast_ones_go_on(
    serving: testing.Serving, client: optwire.Client, pool: ThreadPoolExecutor
) -> None:
    run = Run(client, "bounded_staleness(1, policy=wait)", 2)
    run.step(0, 1.0)
    slow = run.workers[1]
    for let_go in (slow.params, lambda: slow.rows({"w": [0]}), slow.close):
        fast = pool.submit(run.step, 0, 1.0)
        waits(serving, run, 1)
        let_go()
        fast.result(10)
    assert run.read(0) == -4.0


def test_delays_are_compensated_with_the_parameters_that_the_worker_had(client: optwire.Client) -> None:
    run = Run(client, "async(compensation=0.5)", 2)
    for worker in run.workers:
        worker.params()
    assert run.step(0, 2.0) == -2.0
    assert run.step(0, 1.0) == -3.0
    grad = 4.0 + 0.5 * 4.0 * 4.0 * (-3.0 - 0.0)
    assert run.step(1, 4.0) == -3.0 - grad
    assert run.step(1, 1.0) == -4.0 - grad, "of the newest parameters: nothing is to be compensated"
    live_bytes = run.workers[0].info().state_bytes
    assert live_bytes == 5 * 4


def test_what_a_worker_did_not_get_cannot_be_compensated(client: optwire.Client) -> None:
    run = Run(client, "async(compensation=0.5)", 2)
    run.step(0, 1.0)
    with pytest.raises(optwire.StaleStepError, match="whose parameters are not kept for this worker"):
        run.step(1, 1.0)
    assert (run.read(1), run.step(1, 1.0)) == (-1.0, -2.0)
    with pytest.raises(optwire.UnsupportedError, match=r"params\['w'\]: element type bf16, expected f32 or f64"):
        client.create_session({"w": np.zeros(3, BF16)}, opt.sgd(1.0), aggregation="async(compensation=0.5)")


def test_what_another_process_reads_changes_nothing_for_a_worker(
    serving: testing.Serving, client: optwire.Client
) -> None:
    run = Run(client, "async(compensation=0.5)", 2)
    run.workers[1].params()
    run.step(0, 2.0)
    registry, worker = serving.server.registry, sessions.worker_id(1)
    for epoch in (0, 2):
        with registry.reading(name=run.name, worker=worker, epoch=epoch):
            pass
    assert run.step(1, 4.0) == -2.0 - (4.0 + 0.5 * 4.0 * 4.0 * -2.0)


# ------------------------------------------------------------------------------------------ several pushes are a step


def test_buffered_pushes_are_answered_at_once_and_every_kth_makes_the_step(client: optwire.Client) -> None:
    run = Run(client, "buffered(3)", 2)
    assert [run.step(0, 3.0, weight=2.0), run.step(0, 6.0)] == [0.0, 0.0]
    ack = run.workers[0].last_ack
    assert ack is not None
    assert (ack.step, ack.applied_step, ack.seq) == (0, 1, 2)
    assert run.step(1, 9.0, weight=3.0) == f32(-(2 * 3.0 + 6.0 + 3 * 9.0) / 6.0)
    assert run.step(0, 12.0) == f32(-39.0 / 6.0), "of step 0, and for step 2"
    with pytest.raises(optwire.UnsupportedError, match="reply 'updates', but its steps are of buffered"):
        run.workers[0].step(filled(1.0), reply="updates")


@BOTH_WAYS
def test_a_buffered_sum_is_damped_and_not_divided(client: optwire.Client) -> None:
    run = Run(client, "buffered(2, damping=inverse, combine=sum)", 2)
    grads = filled(1.0)
    assert (run.workers[0].step(grads)["w"] == 0.0).all()
    assert (grads["w"] == 1.0).all(), "what lies in shared memory is the worker's own"
    assert run.step(0, 2.0) == -3.0
    assert [run.step(1, 4.0), run.step(1, 4.0)] == [-3.0, -3.0 - 4.0 / 2 - 4.0]


def test_buffered_gradients_of_sixteen_bits_are_summed_in_thirty_two(client: optwire.Client) -> None:
    values = [1.0, 2.0**-9, 2.0**-9, 2.0**-9]  # in bf16, 1 + 2**-9 is 1
    session = client.create_session({"w": np.zeros(3, BF16)}, opt.sgd(1.0), aggregation="buffered(4, combine=sum)")
    for value in values:
        params = session.step({"w": np.full(3, value, BF16)})["w"]
    assert params.tolist() == [float(BF16(-sum(values)))] * 3 != [-1.0] * 3


@pytest.mark.parametrize("at", [0, 1, 2], ids=["first", "between", "last"])
def test_what_is_not_finite_is_kept_out_of_a_sum(client: optwire.Client, at: int) -> None:
    run = Run(client, "buffered(3)", 2, spec=opt.on_nonfinite(opt.sgd(1.0)))
    for push in range(3):
        if push == at:
            with pytest.raises(optwire.NonFiniteError, match=r"grads\['w'\]: 5 of 5 elements are not finite"):
                run.step(1, float("nan"))
        value = run.step(0, 1.0 + push)
    assert value == -2.0, "what was answered counts"


def test_a_sum_is_refused_where_its_pushes_do_not_agree(client: optwire.Client) -> None:
    run = Run(client, "buffered(2)", 2)
    run.step(0, 1.0)
    with pytest.raises(optwire.InvalidArgumentError, match="grad_scale 2.0 of worker 1, but worker 0 pushed with 1.0"):
        run.step(1, 1.0, grad_scale=2.0)
    assert run.step(1, 3.0) == -2.0


def test_backup_workers_make_a_step_without_the_slowest(
    serving: testing.Serving, client: optwire.Client, pool: ThreadPoolExecutor
) -> None:
    run = Run(client, "k_of_n(2, 3)", 3)
    first = pool.submit(run.step, 2, 4.0)
    waits(serving, run, 1)
    assert (run.step(0, 2.0), first.result(10)) == (-3.0, -3.0)
    with pytest.raises(optwire.StepClosedError, match="that step was made without this push"):
        run.step(1, 100.0)
    assert run.read(1) == -3.0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
def test_the_weighted_mean_has_the_same_bits_whatever_the_order(
    serving: testing.Serving, client: optwire.Client, pool: ThreadPoolExecutor, order: tuple[int, ...]
) -> None:
    values, weights = [0.1, 1e7, -3.3], [3.0, 0.7, 2.0]
    run = Run(client, "quorum(3, 4)", 3)
    done: list[Future[float]] = []
    for count, rank in enumerate(order):
        waits(serving, run, count)
        done.append(pool.submit(run.step, rank, values[rank], weight=weights[rank]))
    total = FLOAT(values[0]) * FLOAT(weights[0])
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total += FLOAT(value) * FLOAT(weight)
    assert {future.result(10) for future in done} == {float(-(total / FLOAT(sum(weights))))}


def test_a_quorum_waits_for_whom_it_has_until_its_deadline(
    serving: testing.Serving, client: optwire.Client, pool: ThreadPoolExecutor
) -> None:
    run = Run(client, "quorum(1, 3, deadline_s=0.3)", 2)
    assert run.step(0, 1.0) == -1.0, "the other one is there, and has not pushed"
    both = [pool.submit(run.step, rank, 2.0) for rank in (0,)]
    with pytest.raises(optwire.StepClosedError):
        run.step(1, 2.0)
    assert both[0].result(10) == -3.0
    with pytest.raises(optwire.LimitError, match="3 workers are there"):
        [client.attach(run.name, worker=rank).step(filled(0.0)) for rank in (7, 8)]


def test_a_step_that_time_makes_uses_what_its_pushes_change(serving: testing.Serving, client: optwire.Client) -> None:
    run = Run(client, "quorum(1, 2, deadline_s=0.2)", 2)
    assert run.step(0, 1.0, hyperparams={"learning_rate": 0.5}, telemetry=True) == -0.5
    ack = run.workers[0].last_ack
    assert ack is not None
    assert (ack.learning_rate, ack.metrics["grad_norm"]) == (0.5, pytest.approx(5.0**0.5, rel=1e-6))


# ----------------------------------------------------------------------------------------------------- what it takes


def test_a_session_that_could_not_hold_what_waits_is_refused(tmp_path: Any) -> None:
    size = landing.buffer_bytes(_layout())
    with wire.served(landing_bytes_max=6 * size, streams_max=4) as serving, optwire.connect(serving.target) as client:
        for refused, what in (
            ("k_of_n(4, 4)", "landing_bytes_max"),
            ("bounded_staleness(4, policy=wait)", "landing_bytes_max|streams_max"),
            ("quorum(1, 5)", "streams_max"),
            ("bounded_staleness(5, policy=wait)", "streams_max"),
        ):
            with pytest.raises(optwire.LimitError, match=what):
                client.create_session(filled(0.0, 4096), opt.sgd(1.0), aggregation=refused)
        for taken in ("k_of_n(2, 4)", "async", "bounded_staleness(99)", "buffered(99)"):
            client.create_session(filled(0.0, 4096), opt.sgd(1.0), aggregation=taken)


def _layout() -> Any:
    with wire.served() as serving, optwire.connect(serving.target) as client:
        client.create_session(filled(0.0, 4096), opt.sgd(1.0), name="one")
        return serving.server.registry._table.find(name="one").held.layout


def test_a_sum_and_what_workers_were_given_count_as_held(serving: testing.Serving, client: optwire.Client) -> None:
    registry = serving.server.registry
    plain = Run(client, "async", 1)
    summed = Run(client, "buffered(2)", 1)
    given = Run(client, "async(compensation=1)", 2)
    held = [registry._table.find(name=run.name).held_bytes for run in (plain, summed, given)]
    live = registry._table.find(name=given.name)
    assert held[1] - held[0] == mean.sum_bytes(live.tree)
    for rank in range(2):
        given.read(rank)
        given.step(rank, 1.0)
    assert live.held_bytes - held[2] == 2 * live.held.layout.nbytes
    live.given = Unseen(live.given)
    assert live.held_bytes - held[2] == 2 * live.held.layout.nbytes, "others ask while it changes"
    given.workers[0].close()
    given.step(1, 1.0)
    assert live.held_bytes - held[2] == live.held.layout.nbytes, "who has left needs none"


class Unseen(dict[str, Any]):
    """A dict as those see it out of turn: gone over, it may change under their eyes."""

    def values(self) -> Any:
        raise RuntimeError("dictionary changed size during iteration")


def test_memory_for_what_workers_are_given_is_asked_for_before_anything_is_applied() -> None:
    with (
        wire.served(state_bytes_max=300_000) as serving,
        optwire.connect(serving.target) as client,
        contextlib.ExitStack() as stack,
    ):
        run = Run(client, "async(compensation=1)", 1, size=4096)
        live = serving.server.registry._table.find(name=run.name)
        run.step(0, 1.0)
        others = []
        for rank in range(1, 20):
            others.append(stack.enter_context(client.attach(run.name, worker=rank)))
            with contextlib.suppress(errors.LimitError):
                others[-1].step(filled(1.0, 4096))
        assert live.machine.step == 1 + sum(other.last_ack is not None for other in others)
        assert others[-1].last_ack is None


def test_memory_for_what_workers_read_is_asked_for() -> None:
    with (
        wire.served(state_bytes_max=300_000) as serving,
        optwire.connect(serving.target) as client,
        contextlib.ExitStack() as stack,
    ):
        run = Run(client, "async(compensation=1)", 0, size=4096)
        live = serving.server.registry._table.find(name=run.name)
        stranger = stack.enter_context(client.attach(run.name))
        workers = [stack.enter_context(client.attach(run.name, worker=rank)) for rank in range(20)]
        with pytest.raises(errors.LimitError, match="state_bytes_max"):
            _ = [worker.params() for worker in workers]
        assert live.held_bytes <= 300_000
        stranger.params()
