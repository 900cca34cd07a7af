"""The engine: compiled updates that write in place, landings that are adopted, failures that say what is left."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import optwire
from optwire import optax
from optwire import optimizers as opt
from optwire_proto import checks, digests, errors, limits, payloads, specs, tensors, trees
from optwire_server import testing
from optwire_server.engine import engine, landing, layout, program, rates

TREE = trees.flatten({"w": np.ones((64, 33), np.float32), "b": np.zeros(7, np.float32)}).spec
OPTIMIZERS = (
    opt.sgd(0.1),
    opt.momentum(0.1, 0.9),
    opt.nesterov(0.1, 0.9),
    opt.adagrad(0.1),
    opt.rmsprop(0.1),
    opt.rmsprop_momentum(0.1),
    opt.adam(0.1),
    opt.adamax(0.1),
    opt.sm3(0.1),
    opt.adam(opt.exponential_decay(0.1, 10, 0.9)),
    opt.chain(opt.clip_grads(1.0), opt.adam(0.1)),
    optax.adamw(0.1),
    optax.amsgrad(0.1),
    opt.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
    opt.partition({"b": opt.sgd(0.1), "**": optax.adamw(0.1)}),
    opt.ema_params(opt.adam(0.1)),
)


ONCE = program.Operands((0.1,), 0)


@pytest.fixture
def running() -> Iterator[engine.Engine]:
    made = engine.Engine()
    yield made
    made.close()


def full(value: float, compiled: program.Program) -> landing.Landing:
    lent = landing.Landings(bytes_max=1 << 30, keep_bytes=0).land(TREE, compiled.layout)
    for array in lent.arrays():
        array[...] = value
    return lent


@pytest.mark.parametrize(
    ("spec", "rate"),
    [
        (opt.sgd(2), 2.0),
        (opt.sgd(opt.constant(0.5)), 0.5),
        (opt.chain(opt.clip_grads(1.0), opt.sgd(0.25)), 0.25),
        (opt.sgd(opt.exponential_decay(0.1, 10, 0.5)), None),
        (opt.chain(opt.sgd(opt.polynomial_decay(0.1, 10, 0.0))), None),
    ],
)
def test_the_learning_rate_is_known_where_it_is_constant(spec: specs.Spec, rate: float | None) -> None:
    assert rates.constant_rate(spec) == rate


@pytest.mark.parametrize("spec", OPTIMIZERS, ids=str)
def test_the_whole_state_is_written_in_place(spec: specs.Spec) -> None:
    compiled = program.Program(checks.check(spec), TREE, jax.devices()[0])
    assert compiled.flaws == ()
    for each in compiled._kernels.values():
        update: Any = each.step(program.Variant()).apply.run
        memory = update.memory_analysis()
        assert memory.alias_size_in_bytes >= sum(each.arrays[at].size * 4 for at in each.own)
        assert memory.output_size_in_bytes - memory.alias_size_in_bytes <= 64 * 40  # the table of output pointers
        assert " copy(" not in update.as_text()


def test_programs_are_shared_whatever_the_learning_rate_and_the_names(running: engine.Engine) -> None:
    renamed = trees.flatten([np.zeros((7,), np.float32), np.zeros((64, 33), np.float32)][::-1]).spec
    order = trees.TreeSpec(tuple(reversed(TREE.leaves)))
    assert running.compile(opt.adam(0.1), order) is running.compile(opt.adam(0.2), renamed)
    assert running.compile(opt.adam(0.1), order) is running.compile(opt.adam(opt.constant(0.3)), order)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (opt.adam(0.1, b1=0.8), opt.adam(0.1)),
        (opt.adam(0.1), opt.adamax(0.1)),
        (opt.adam(0.1), opt.chain(opt.clip_grads(1.0), opt.adam(0.1))),
        (opt.adam(opt.exponential_decay(0.1, 10, 0.9)), opt.adam(opt.exponential_decay(0.2, 10, 0.9))),
        (opt.sgd(opt.polynomial_decay(0.1, 9, 0.0, 2)), opt.sgd(opt.polynomial_decay(0.1, 9, 0.0, 2.0))),
    ],
    ids=str,
)
def test_programs_are_not_shared_where_the_arithmetic_differs(
    running: engine.Engine, one: specs.Spec, other: specs.Spec
) -> None:
    assert running.compile(one, TREE) is not running.compile(other, TREE)


def test_a_session_made_with_a_constant_schedule_steps_like_one_made_with_the_number(client: optwire.Client) -> None:
    params = {"w": np.ones(5, np.float32)}
    results = []
    for name, rate in (("number", 0.1), ("schedule", opt.constant(0.1))):
        with client.create_session(params, opt.adam(rate), name=f"constant-{name}") as session:
            results.append(session.step(params)["w"].tobytes())
        client.delete_session(session.name)
    assert results[0] == results[1]


def test_a_failed_update_that_consumed_nothing_leaves_the_state(running: engine.Engine) -> None:
    compiled = running.compile(opt.adam(0.1), TREE)
    held = running.hold(compiled, full(1.0, compiled), ONCE.rates)
    before = [leaf.copy() for leaf in running.work(running.params(held), held)]
    short = landing.Landing.filled(np.zeros(64, np.uint8), TREE, compiled.layout)
    with pytest.raises(engine.UpdateError) as failed:
        running.work(running.update(held, program.Variant(), ONCE, short))
    assert not failed.value.state_lost
    for ours, theirs in zip(before, running.work(running.params(held), held), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    running.work(running.update(held, program.Variant(), ONCE, full(1.0, compiled)))


def test_a_failed_update_that_lost_the_state_fails_the_session_for_everyone_and_no_other_session() -> None:
    params = {"w": np.ones(5, np.float32)}
    with testing.serve() as serving, optwire.connect(serving.target) as client:
        doomed = client.create_session(params, opt.adam(0.1), name="doomed")
        sound = client.create_session(params, opt.adam(0.1), name="sound")
        doomed.step(params)
        # What a device does that goes away in the middle of an update.
        held = serving.server.registry._table.by_name["doomed"].held
        for leaf in jax.tree.leaves(held.state):
            leaf.delete()
        with pytest.raises(optwire.SessionFailedError, match=r"'doomed' failed at step 1 and lost its state"):
            doomed.step(params)
        with pytest.raises(optwire.SessionFailedError):
            doomed.params()
        with pytest.raises(optwire.SessionFailedError):
            client.attach("doomed").step(params)
        assert client.attach("doomed").info().failure
        sound.step(params)
        assert sound.step_count == 1
        client.delete_session("doomed")
        assert [info.name for info in client.list_sessions()] == ["sound"]


@pytest.mark.parametrize("transport", ["unary", "stream"])
def test_the_state_stays_where_it_is_from_step_to_step(transport: str) -> None:
    """A reply's view of the parameters is gone before the next update, which would otherwise copy."""
    params = {"w": np.ones(300_000, np.float32), "b": np.ones(3, np.float32)}
    with testing.serve() as serving, optwire.connect(serving.target, transport=transport) as client:
        session = client.create_session(params, opt.adam(0.1), name="in-place")
        held = serving.server.registry._table.by_name["in-place"].held
        places = []
        for _ in range(5):
            session.step(params)
            leaves = serving.server.engine.run(lambda: jax.tree.leaves(held.state))
            places.append([leaf.unsafe_buffer_pointer() for leaf in leaves])
            del leaves
        assert all(place == places[0] for place in places)


def test_a_landing_is_adopted_by_the_device_without_a_copy() -> None:
    pool = landing.Landings(bytes_max=1 << 20, keep_bytes=0)
    lent = pool.land(TREE)
    for array in lent.arrays():
        assert array.ctypes.data % limits.ALIGNMENT_BYTES == 0
        assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data
    lent.close()


def test_landings_are_lent_up_to_a_limit_and_reused() -> None:
    pool = landing.Landings(bytes_max=20_000, keep_bytes=10_000)
    first = pool.land(TREE)
    place = first.arrays()[0].ctypes.data
    second = pool.land(TREE)
    with pytest.raises(errors.LimitError, match="landing buffers are in use") as refused:
        pool.land(TREE)
    assert refused.value.retry_after_s > 0
    first.close()
    first.close()
    assert pool.land(TREE).arrays()[0].ctypes.data == place
    second.close()


def test_a_payload_that_can_never_land_is_refused_without_advice_to_wait() -> None:
    with pytest.raises(errors.LimitError) as refused:
        landing.Landings(bytes_max=100, keep_bytes=0).land(TREE)
    assert refused.value.retry_after_s == 0


def test_what_needs_no_buffer_passes_alone_whatever_its_size() -> None:
    pool = landing.Landings(bytes_max=20_000, keep_bytes=0)
    with pool.counted(50_000):
        for refused in (lambda: pool.land(TREE), lambda: pool.counted(1).__enter__()):
            with pytest.raises(errors.LimitError, match="50000 of 20000 bytes") as caught:
                refused()
            assert caught.value.retry_after_s > 0
    lent = pool.land(TREE)
    with pytest.raises(errors.LimitError) as caught, pool.counted(50_000):
        pass
    assert caught.value.retry_after_s > 0
    lent.close()
    assert pool.lent_bytes == 0


def test_who_gives_way_may_do_so_at_once_and_who_was_refused_then_finds_the_room() -> None:
    pool = landing.Landings(bytes_max=20_000, keep_bytes=0)
    where = layout.aligned(TREE)

    def close(at: int) -> None:
        early[at].close()

    early = [pool.land_early(landing.Landing, TREE, where, functools.partial(close, at)) for at in range(2)]
    with pytest.raises(errors.LimitError):
        pool.land_early(landing.Landing, TREE, where, lambda: None)
    assert all(each.is_open for each in early), "none gives way to another that is early"
    with pytest.raises(errors.LimitError):
        pool.land(TREE)
    assert [each.is_open for each in early] == [False, True], "the oldest is enough"
    pool.land(TREE).close()
    assert not pool.keep(early[0])
    assert pool.keep(early[1])
    early[1].close()
    assert pool.lent_bytes == 0


def test_a_landing_that_cannot_be_made_is_not_counted() -> None:
    pool = landing.Landings(bytes_max=1 << 62, keep_bytes=1 << 20)

    def failing(*_: Any) -> landing.Landing:
        raise ZeroDivisionError

    huge = trees.TreeSpec((trees.LeafSpec("a", (1 << 40, 64), "f32"),))
    for raising, why in (
        (lambda: pool.land(huge), MemoryError),
        (lambda: pool.land_as(failing, TREE, layout.aligned(TREE), 8), ZeroDivisionError),
    ):
        with pytest.raises(why):
            raising()
        assert pool.lent_bytes == 0


def test_names_of_arrays_are_kept_for_sessions_that_share_a_program(running: engine.Engine) -> None:
    compiled = running.compile(running.check(optax.adam(0.1)), TREE)
    names = [["a", "b"], ["b", "a"], ["c", "d"]]
    found = [compiled.arrays(each) for each in names]
    for each, arrays in zip(names, found, strict=True):
        assert [leaf.name for leaf in arrays if leaf.name.startswith("params/")] == [f"params/{name}" for name in each]
        assert compiled.arrays(list(each)) is arrays, "found, and not made again"


@pytest.mark.parametrize("size", [1, 7, 4096, 10_000])
def test_chunks_of_any_size_land_in_their_leaves(size: int) -> None:
    rng = np.random.default_rng(0)
    nest = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": np.zeros((0, 4), np.float32),
        "c": np.float16(2.5),
        "d": rng.integers(0, 9, 501).astype(np.int8),
        "e": rng.standard_normal(301),
    }
    flat = trees.flatten(nest)
    data = b"".join(payloads.pieces(list(flat.arrays)))
    lent = landing.Landings(bytes_max=1 << 20, keep_bytes=0).land(flat.spec)
    for start in range(0, len(data), size):
        lent.write(start, data[start : start + size])
    lent.finish(digests.digest(data))
    for ours, theirs in zip(lent.arrays(), flat.arrays, strict=True):
        assert ours.tobytes() == theirs.tobytes()
    lent.close()


def test_pieces_hold_no_array_once_they_are_out() -> None:
    array = np.ones(tensors.itemsize("f32") * 700_000, np.float32)
    alive = weakref.ref(array)
    pieces = payloads.pieces([array])
    del array
    assert sum(map(len, pieces)) == 4 * 2_800_000
    assert alive() is None


def test_a_result_is_freed_as_soon_as_it_is_let_go(client: optwire.Client) -> None:
    """Without the garbage collector: a cycle around a hundred megabytes would be a leak for as long as it sleeps."""
    params = {"w": [np.ones(1000, np.float32)], "b": (np.ones(3, np.float32), None)}
    session = client.create_session(params, opt.sgd(0.1), name="freed")
    gc.disable()
    try:
        for call in (lambda: session.step(params), session.params):
            result = call()
            alive = weakref.ref(result["w"][0])
            del result
            assert alive() is None
    finally:
        gc.enable()
        session.close()
        client.delete_session("freed")
