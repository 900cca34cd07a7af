"""Local steps against the papers' algorithms in float64 NumPy, and what becomes of them where something goes wrong."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import optwire
from optwire import optimizers as opt
from optwire_server import testing

SHAPES = {"a": (40,), "b": (5, 3), "c": (), "d": (7, 9)}
Params = dict[str, np.ndarray]


def params(seed: int = 0) -> Params:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}


def inner(own: Any, rank: int, step: int) -> Any:
    """One local step: towards a point of each worker's own, a little differently at every step."""
    return {
        name: (array - (0.1 + 0.01 * (step % 3)) * (array - (rank + index))).astype(array.dtype)
        for index, (name, array) in enumerate(own.items())
    }


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """How parameters are exchanged; ``parts`` are the fragments by name, in the order in which they are pushed."""

    every: int
    parts: tuple[tuple[str, ...], ...]
    delay: int = 0
    mixing: float = 0.0
    rate: float = 0.7
    momentum: float = 0.9


SETTINGS = {
    "DiLoCo": Setting(5, (("a", "b", "c", "d"),)),
    "averaging": Setting(3, (("a", "b", "c", "d"),), rate=1.0, momentum=0.0),
    "each step": Setting(1, (("a", "b", "c", "d"),)),
    "fragments": Setting(6, (("a",), ("b", "c"), ("d",))),
    "overlap": Setting(6, (("a", "b", "c", "d"),), delay=2, mixing=0.25),
    "streaming": Setting(6, (("a",), ("b", "c", "d")), delay=2, mixing=0.5),
    "several under way": Setting(6, (("a",), ("b", "c"), ("d",)), delay=5, mixing=0.5),
}


def simulated(setting: Setting, workers: int, steps: int) -> list[list[Params]]:
    """What every worker has after each local step: Algorithm 2 of arXiv:2501.18512, all of DiLoCo's being a case of it.

    θ_m ← inner step; every H steps, a fragment p at its own offset: Δ = mean of (θ_p − θ_m,p), outer Nesterov step; τ
    steps later θ_m,p ← α·θ_m,p + (1 − α)·θ_p.
    """
    world = {name: array.astype(np.float64) for name, array in params().items()}
    velocity = {name: np.zeros_like(array) for name, array in world.items()}
    own = [dict(world) for _ in range(workers)]
    coming: dict[int, Params] = {}
    history = []
    for t in range(1, steps + 1):
        own = [inner(each, rank, t) for rank, each in enumerate(own)]
        for p, part in enumerate(setting.parts):
            if t % setting.every == round((p + 1) * setting.every / len(setting.parts)) % setting.every:
                for name in part:
                    delta = np.mean([world[name] - each[name] for each in own], axis=0)
                    velocity[name] = setting.momentum * velocity[name] + delta
                    moved = setting.rate * (delta + setting.momentum * velocity[name])
                    world[name] = world[name] - moved
                coming[t + setting.delay] = {name: world[name] for name in part}
        for name, value in coming.pop(t, {}).items():
            for each in own:
                each[name] = setting.mixing * each[name] + (1 - setting.mixing) * value
        history.append([dict(each) for each in own])
    return history


def spec(setting: Setting) -> opt.Spec:
    return opt.per_leaf(opt.torch_sgd(setting.rate, momentum=setting.momentum, nesterov=setting.momentum > 0))


def fragments(setting: Setting) -> Any:
    return [f"[{''.join(part)}]" for part in setting.parts]


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("transport", ["auto", "stream"])
def test_workers_have_what_the_papers_algorithm_gives_them(
    server: testing.Serving, setting: Setting, transport: str
) -> None:
    steps = 3 * setting.every + 4
    wanted = simulated(setting, 2, steps)
    with optwire.connect(server.target, transport=transport) as client:
        first = client.create_session(params(), spec(setting), aggregation="sync(2)", worker=0)
        handles = [first, client.attach(first.name, worker=1)]

        def run(rank: int) -> None:
            local = optwire.LocalSteps(
                handles[rank],
                every=setting.every,
                fragments=fragments(setting),
                delay=setting.delay,
                mixing=setting.mixing,
            )
            own = local.params()
            for t in range(1, steps + 1):
                own = local.step(inner(own, rank, t))
                for name, array in own.items():
                    assert array.dtype == np.float32
                    np.testing.assert_allclose(
                        array, wanted[t - 1][rank][name], rtol=2e-5, atol=2e-5, err_msg=f"{name} after step {t}"
                    )

        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            for done in [threads.submit(run, rank) for rank in range(2)]:
                done.result()
        client.delete_session(first.name)


def test_between_two_pushes_nothing_is_sent_and_the_same_objects_come_back(client: optwire.Client) -> None:
    session = client.create_session(params(), opt.sgd(1.0))
    local = optwire.LocalSteps(session, every=4)
    own = local.params()
    session.close()  # whoever sent something would be told
    for step in range(3):
        moved = inner(own, 0, step)
        assert local.step(moved) is moved
    with pytest.raises(optwire.DetachedError):
        local.step(own)
    client.delete_session(session.name)


def test_what_is_given_out_and_taken_in_is_not_shared(client: optwire.Client) -> None:
    session = client.create_session(params(), opt.sgd(1.0))
    local = optwire.LocalSteps(session, every=2)
    own = local.params()
    for _ in range(2):
        for step in range(2):
            for array in own.values():
                array -= np.float32(0.5)  # in place, as NumPy's loops do
            own = local.step(own)
            assert step == 0 or all(np.array_equal(own[name], array) for name, array in session.params().items())
    assert np.allclose(own["a"], params()["a"] - 2)


def test_fragments_leave_the_other_leaves_as_they_are(client: optwire.Client) -> None:
    session = client.create_session(params(), opt.per_leaf(opt.sgd(1.0)))
    local = optwire.LocalSteps(session, every=2, fragments=["[ab]", "*"])
    own = {name: jnp.asarray(array) for name, array in local.params().items()}
    after = local.step(own)
    assert after["c"] is own["c"]
    assert after["d"] is own["d"]
    assert isinstance(after["a"], np.ndarray)
    again = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree))(after)
    after = local.step(again)
    assert after["a"] is again["a"]
    assert isinstance(after["d"], np.ndarray)


@pytest.mark.parametrize(
    ("count", "parts"),
    [(1, ["abcd"]), (2, ["abc", "d"]), (3, ["a", "bc", "d"]), (4, ["a", "bc", "d"])],
)
def test_leaves_are_divided_by_their_bytes(client: optwire.Client, count: int, parts: list[str]) -> None:
    session = client.create_session(params(), opt.per_leaf(opt.sgd(1.0)))
    local = optwire.LocalSteps(session, every=12, fragments=count)
    own, pushed = local.params(), []
    for _ in range(12):
        after = local.step(own)
        pushed.append("".join(name for name in SHAPES if after[name] is not own[name]))
        own = after
    assert [part for part in pushed if part] == parts


def test_a_push_that_comes_too_late_is_dropped_and_the_newest_parameters_are_taken(client: optwire.Client) -> None:
    session = client.create_session(params(), opt.sgd(1.0))
    local = optwire.LocalSteps(session, every=2)
    own = local.params()
    client.attach(session.name).step({name: np.ones_like(array) for name, array in params().items()})
    own = local.step(local.step(inner(own, 0, 0)))
    assert local.late_count == 1
    assert local.local_steps == 2
    assert all(np.array_equal(array, own[name]) for name, array in session.params().items())
    before = session.step_count
    local.step(local.step(inner(own, 0, 0)))
    assert (local.late_count, session.step_count) == (1, before + 1)


def test_a_straggler_takes_what_the_others_made_without_it(client: optwire.Client) -> None:
    fast = client.create_session(params(), opt.sgd(1.0), aggregation="k_of_n(1, 2)", worker=0)
    slow = client.attach(fast.name, worker=1)
    ahead, behind = (optwire.LocalSteps(session, every=1) for session in (fast, slow))
    lost = inner(behind.params(), 1, 0)
    ahead.step(inner(ahead.params(), 0, 0))
    own = behind.step(lost)
    assert (ahead.late_count, behind.late_count) == (0, 1)
    assert all(np.array_equal(array, own[name]) for name, array in fast.params().items())
    behind.step(inner(own, 1, 1))
    assert (behind.late_count, slow.step_count) == (1, 2)


@pytest.mark.parametrize("delay", [0, 1])
def test_a_push_of_unknown_outcome_counts_once_however_often_it_is_made(server: Any, relay: Any, delay: int) -> None:
    with optwire.connect(relay.target, timeout=0.6, transport="stream") as client:
        session = client.create_session(params(), opt.sgd(1.0))
        local = optwire.LocalSteps(session, every=2, delay=delay)
        own = local.params()
        for _ in range(1 + delay):
            own = local.step(own)
        own = {name: array - np.float32(0.25) for name, array in own.items()}
        relay.hold_replies()
        if delay:
            wanted = {name: array + np.float32(0.25) for name, array in own.items()}
        else:
            wanted = own
        for _ in range(2):
            with pytest.raises((optwire.DeadlineError, optwire.UnavailableError)):
                local.step(own)
        relay.cut()
        after = local.step(own)
        assert local.local_steps == 2 + delay
    with optwire.connect(server.target) as client:
        newest = client.attach(session.name)
        assert newest.step_count == 1
        assert all(np.allclose(newest.params()[name], array) for name, array in wanted.items())
        assert all(np.allclose(after[name], array) for name, array in wanted.items())


def together(*steps: Any) -> list[Any]:
    """What several workers' steps return, made at the same time."""
    with concurrent.futures.ThreadPoolExecutor(len(steps)) as threads:
        return [done.result() for done in [threads.submit(step) for step in steps]]


def test_a_worker_that_comes_back_pushes_the_fragment_that_the_others_push(client: optwire.Client) -> None:
    first = client.create_session(params(), opt.per_leaf(opt.sgd(1.0)), aggregation="sync(2)", worker=0)
    gone = client.attach(first.name, worker=1)
    stays, goes = (optwire.LocalSteps(session, every=3, fragments=["a", "[bc]", "d"]) for session in (first, gone))
    own, other = together(lambda: stays.step(stays.params()), lambda: goes.step(goes.params()))
    gone.close()
    own = stays.step(own)  # alone
    back = optwire.LocalSteps(client.attach(first.name, worker=1), every=3, fragments=["a", "[bc]", "d"])
    other = back.params()
    for part in ("d", "a", "bc", "d"):
        moved = inner(own, 0, 0)
        own, after = together(lambda moved=moved: stays.step(moved), lambda other=other: back.step(other))
        assert "".join(name for name in SHAPES if own[name] is not moved[name]) == part
        assert "".join(name for name in SHAPES if after[name] is not other[name]) == part
        other = after
    assert first.step_count == 6
    assert (stays.late_count, back.late_count) == (0, 0)


def test_a_straggler_goes_on_with_the_fragment_of_the_newest_step(client: optwire.Client) -> None:
    first = client.create_session(params(), opt.per_leaf(opt.sgd(1.0)), aggregation="k_of_n(2, 3)", worker=0)
    handles = [first, client.attach(first.name, worker=1), client.attach(first.name, worker=2)]
    locals_ = [optwire.LocalSteps(session, every=2, fragments=["[ab]", "*"]) for session in handles]
    own = [local.params() for local in locals_]
    for _ in range(2):
        own[:2] = together(*(lambda rank=rank: locals_[rank].step(own[rank]) for rank in range(2)))
    own[2] = locals_[2].step(own[2])
    assert (locals_[2].late_count, handles[2].step_count) == (1, 2)
    own[0], own[2] = together(*(lambda rank=rank: locals_[rank].step(own[rank]) for rank in (0, 2)))
    assert (locals_[2].late_count, first.step_count, handles[2].step_count) == (1, 3, 3)


def test_an_interrupted_wait_counts_a_push_once(client: optwire.Client) -> None:
    first = client.create_session(params(), opt.sgd(1.0), aggregation="sync(2)", worker=0)
    second = client.attach(first.name, worker=1)
    local = optwire.LocalSteps(first, every=2, delay=1)
    own = local.step(local.step({name: array - np.float32(1) for name, array in local.params().items()}))
    interrupt = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        local.step(own)
    interrupt.join()
    second.step({name: np.ones_like(array) for name, array in params().items()})
    own = local.step(own)  # a second push would wait for ever
    assert (local.local_steps, second.info().step) == (3, 1)
    assert np.allclose(own["a"], params()["a"] - 1)


def test_what_is_wrong_with_the_parameters_is_said_before_a_push_is_waited_for(client: optwire.Client) -> None:
    session = client.create_session(params(), opt.sgd(1.0))
    local = optwire.LocalSteps(session, every=2, delay=1, mixing=0.5)
    own = local.step(local.step({name: array - np.float32(1) for name, array in local.params().items()}))
    with pytest.raises(optwire.TreeMismatchError):
        local.step({name: array.astype(np.float64) for name, array in own.items()})
    local.step(own)
    assert np.allclose(session.params()["a"], params()["a"] - 1)
    assert (local.local_steps, session.step_count) == (3, 1)


@pytest.mark.parametrize("codec", ["f32", "int8"])
@pytest.mark.parametrize("aggregation", ["async", "sync(1)"])
def test_a_fragment_behind_one_of_unknown_outcome_is_not_lost(
    server: Any, relay: Any, aggregation: str, codec: str
) -> None:
    with optwire.connect(relay.target, timeout=0.6, transport="stream") as client:
        session = client.create_session(
            params(), opt.per_leaf(opt.sgd(1.0)), aggregation=aggregation, worker=0, grads_codec=codec
        )
        local = optwire.LocalSteps(session, every=4, fragments=["[ab]", "*"], delay=3)
        own = local.step(local.params())
        own = {name: array - np.float32(1) for name, array in own.items()}
        relay.hold_replies()
        for _ in range(3):  # pushes the first after the second step, and the other one behind it after the fourth
            own = local.step(own)
        with pytest.raises((optwire.DeadlineError, optwire.UnavailableError)):
            local.step(own)
        relay.cut()
        for _ in range(3):
            own = local.step(own)
    assert (local.late_count, local.local_steps) == (0, 7)
    with optwire.connect(server.target) as client:
        newest = client.attach(session.name)
        assert newest.step_count == 2
        for name, array in newest.params().items():
            np.testing.assert_allclose(array, params()[name] - 1, atol=0.02, err_msg=name)


def test_a_reset_leaves_nobody_waiting_for_a_fragment_that_was_queued(client: optwire.Client) -> None:
    first = client.create_session(params(), opt.per_leaf(opt.sgd(1.0)), aggregation="sync(2)", worker=0)
    second = client.attach(first.name, worker=1)
    ahead = optwire.LocalSteps(first, every=4, fragments=2, delay=3)
    other = optwire.LocalSteps(second, every=2, fragments=2)
    for _ in range(4):
        ahead.step(ahead.params())  # one push waits for the other worker, and one behind it

    def both() -> Any:
        return other.step(other.step(other.params()))

    together(ahead.reset, both)
    assert (first.step_count, second.step_count) == (2, 2)


def test_a_reset_that_fails_changes_nothing(server: Any, relay: Any) -> None:
    with optwire.connect(relay.target, timeout=0.6, transport="stream") as client:
        session = client.create_session(params(), opt.per_leaf(opt.sgd(1.0)))
        local = optwire.LocalSteps(session, every=4, fragments=2, delay=3)
        relay.hold_replies()
        own = {name: array - np.float32(1) for name, array in local.params().items()}
        for _ in range(4):
            own = local.step(own)
        with pytest.raises((optwire.DeadlineError, optwire.UnavailableError)):
            local.reset()
        relay.cut()
        for _ in range(4):
            try:
                own = local.step(own)
            except (optwire.DeadlineError, optwire.UnavailableError):  # of the push; made again then
                own = local.step(own)
    assert (local.late_count, local.local_steps) == (0, 8)


def test_reset_goes_on_from_the_newest_parameters(client: optwire.Client) -> None:
    session = client.create_session(params(), opt.sgd(1.0))
    local = optwire.LocalSteps(session, every=3, delay=2)
    for _ in range(4):
        local.step(local.params())  # a push is under way now
    client.attach(session.name).load_state({"params/a": np.full(40, 5, np.float32)})
    own = local.reset()
    assert (own["a"] == 5).all()
    for _ in range(5):  # a push after three of them, and two later what came of it
        own = local.step(own)
    assert np.allclose(own["a"], 5)
    assert session.step_count == 2


@pytest.mark.parametrize("mixing", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16, np.complex64])
def test_element_types_are_kept(client: optwire.Client, dtype: Any, mixing: float) -> None:
    session = client.create_session({"w": np.ones(5, dtype), "s": np.ones((), dtype)}, opt.sgd(1.0))
    local = optwire.LocalSteps(session, every=1, mixing=mixing)
    own = local.params()
    for _ in range(2):
        own = local.step({name: np.asarray(array - dtype(0.25)).astype(dtype) for name, array in own.items()})
    assert all(array.dtype == dtype for array in own.values())
    assert own["s"].shape == ()
    np.testing.assert_allclose(own["w"].astype(np.complex128), 0.5)


@pytest.mark.parametrize("nest", [np.ones(3, np.float32), [np.ones(2, np.float32), (np.float32(1), None)]], ids=str)
def test_any_nest_will_do(client: optwire.Client, nest: Any) -> None:
    session = client.create_session(nest, opt.sgd(1.0))
    local = optwire.LocalSteps(session, every=1)
    own = jax.tree.map(lambda leaf: leaf - np.float32(0.5), local.params())
    after = local.step(own)
    assert jax.tree.structure(after) == jax.tree.structure(own)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(own), strict=True))


def test_other_parameters_than_the_sessions_are_refused(client: optwire.Client) -> None:
    session = client.create_session(params(), opt.sgd(1.0))
    local = optwire.LocalSteps(session, every=1)
    for wrong in ({"a": params()["a"]}, [1], params() | {"b": np.zeros((5, 4), np.float32)}):
        with pytest.raises(optwire.TreeMismatchError, match="params"):
            local.step(wrong)
    assert (session.step_count, local.local_steps) == (0, 0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no steps": ({"every": 0}, "every: 0"),
    "half a step": ({"every": 1.5}, "every: 1.5"),
    "a delay as long as every": ({"every": 3, "delay": 3}, "delay: 3, expected less than every, which is 3"),
    "a share above one": ({"every": 3, "mixing": 1.5}, "mixing: 1.5"),
    "no fragments": ({"every": 3, "fragments": 0}, "fragments: 0"),
    "more fragments than leaves": ({"every": 9, "fragments": 5}, "fragments: 5, expected from 1 to 4"),
    "more fragments than steps": ({"every": 2, "fragments": 3}, "fragments: 3, expected from 1 to 2"),
    "patterns for more than the steps": ({"every": 1, "fragments": ["a", "*"]}, "fragments"),
    "patterns that leave one out": ({"every": 9, "fragments": ["a", "b"]}, "fragments"),
    "far more fragments than leaves": ({"every": 10**12, "fragments": 10**12}, "fragments: 1000000000000, expected"),
    "no patterns": ({"every": 9, "fragments": []}, "fragments"),
}


@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED)
def test_arguments_that_cannot_be_are_refused(client: optwire.Client, arguments: tuple[dict[str, Any], str]) -> None:
    session = client.create_session(params(), opt.per_leaf(opt.sgd(1.0)))
    with pytest.raises((optwire.InvalidArgumentError, optwire.SpecError), match=arguments[1]):
        optwire.LocalSteps(session, **arguments[0])


def test_fragments_of_an_optimizer_that_needs_all_leaves_are_refused_by_name(client: optwire.Client) -> None:
    session = client.create_session(params(), opt.sgd(1.0))
    local = optwire.LocalSteps(session, every=2, fragments=2)
    with pytest.raises(optwire.InvalidArgumentError, match="put per_leaf"):
        local.step(local.params())


@pytest.mark.parametrize("codec", ["int8", "top_k(0.1)"])
def test_codecs_with_error_feedback_arrive_where_whole_numbers_do(server: testing.Serving, codec: str) -> None:
    """In fragments: what is left behind comes with the next push. Of ten values top_k sends one."""

    def trained(codec: str) -> Params:
        with optwire.connect(server.target) as client:
            shapes = {"a": np.zeros(300, np.float32), "b": np.zeros((10, 20), np.float32)}
            session = client.create_session(
                shapes, opt.per_leaf(opt.sgd(1.0)), grads_codec=codec, params_codec="int8", aggregation="async"
            )
            local = optwire.LocalSteps(session, every=2, fragments=2)
            goal = {name: np.random.default_rng(3).standard_normal(array.shape) for name, array in shapes.items()}
            own = local.params()
            for _ in range(400):
                own = {name: np.float32(array - 0.05 * (array - goal[name])) for name, array in own.items()}
                own = local.step(own)
            return {name: session.params()[name] - goal[name] for name in shapes}

    whole, encoded = trained("f32"), trained(codec)
    for name in whole:
        assert float(np.abs(whole[name]).max()) < 1e-5
        assert float(np.abs(encoded[name]).max()) < 1e-4
