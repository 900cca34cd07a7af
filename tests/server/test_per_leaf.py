"""Leaf by leaf, and groups by position: what is absent stays, and what is grouped computes as it does alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from tests.server.test_torch_rules import SHAPES, Run, arrays

from optwire import optax
from optwire import optimizers as opt
from optwire_proto import checks, errors
from optwire_server.engine import admission, build, granularity, knobs

ADAMW = opt.torch_adamw(0.01, amsgrad=True)
INNER = {
    "torch_adamw": ADAMW,
    "torch_sgd": opt.torch_sgd(0.1, momentum=0.9, dampening=0.5),
    "torch_nadam": opt.torch_nadam(),
    "torch_asgd": opt.torch_asgd(t0=2.0),
    "seed": opt.adam(0.01),
    "optax": optax.adamw(0.01),
    "master weights": opt.master_weights(ADAMW),
    "average": opt.ema_params(ADAMW, 0.9),
    "chain": opt.chain(optax.clip_by_global_norm(1.0), ADAMW),
    "schedule": opt.torch_adamw(opt.table([0.1, 0.05, 0.025])),
}
SKIPPED = ((True, True, True, True), (True, False, True, False), (False, False, False, True), (True, True, False, True))


def equal(ours: Any, theirs: Any) -> None:
    """Bit for bit, and of one structure."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def close(ours: Any, theirs: Any) -> None:
    """To the last bit or two: compilers round at other places in another program."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6, atol=1e-7)


def alone(spec: opt.Spec, at: int, presence: Sequence[Sequence[bool]]) -> np.ndarray:
    """A leaf by itself, pushed only where it is present."""
    run = Run(spec, [arrays(np.float32, seed=0)[at]], [list(SHAPES)[at]])
    for step, present in enumerate(presence):
        if present[at]:
            run.push([arrays(np.float32, seed=step + 1)[at]])
    return run.params()[0]


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_what_is_absent_stays_and_the_rest_goes_on_as_by_itself(inner: opt.Spec) -> None:
    """The promise: "A leaf whose gradient is absent keeps its bits, its slots and its count"."""
    spec = opt.per_leaf(inner)
    run = Run(spec, arrays(np.float32, seed=0))
    for step, present in enumerate(SKIPPED):
        grads = arrays(np.float32, seed=step + 1)
        before = jax.tree.map(np.array, run.params())
        grads = [g if there else np.full_like(g, np.nan) for g, there in zip(grads, present, strict=True)]
        after = run.push(grads, present)
        for there, old, new in zip(present, before, after, strict=True):
            if not there:
                np.testing.assert_array_equal(old, new)
    for at, leaf in enumerate(run.params()):
        np.testing.assert_allclose(leaf, alone(spec, at, SKIPPED), rtol=1e-6, atol=1e-7)


def test_a_leaf_counts_its_own_updates() -> None:
    run = Run(opt.per_leaf(ADAMW), arrays(np.float32, seed=0))
    old = run.state
    for present in SKIPPED:
        run.push(arrays(np.float32, seed=1), present)
    assert [int(run.state[f"step/{name}"]) for name in SHAPES] == [3, 2, 2, 3]
    assert run.state.keys() == old.keys()
    seeded = Run(opt.per_leaf(opt.adam(0.01)), arrays(np.float32, seed=0))
    for present in SKIPPED:
        seeded.push(arrays(np.float32, seed=1), present)
    assert [int(seeded.state[f"counts/{name}"]) for name in SHAPES] == [3, 2, 2, 3]


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_a_push_with_every_gradient_has_the_bits_of_one_that_may_lack_some(inner: opt.Spec) -> None:
    one, other = (Run(opt.per_leaf(inner), arrays(np.float32, seed=0)) for _ in range(2))
    for step in range(1, 4):
        one.push(arrays(np.float32, seed=step))
        other.push(arrays(np.float32, seed=step), [True] * len(SHAPES))
    equal(one.state, other.state)


@pytest.mark.parametrize("name", ["torch_adamw", "torch_sgd", "torch_nadam", "torch_asgd", "schedule"])
def test_leaf_by_leaf_is_all_at_once_where_nothing_is_absent(name: str) -> None:
    one, other = (Run(spec, arrays(np.float32, seed=0)) for spec in (INNER[name], opt.per_leaf(INNER[name])))
    for step in range(1, 6):
        close(one.push(arrays(np.float32, seed=step)), other.push(arrays(np.float32, seed=step)))


# ---------------------------------------------------------------------------------------------------------------------
# Groups by position.


def test_groups_compute_as_they_do_alone() -> None:
    of = [0, 1, 0, 1]
    members = opt.per_leaf(ADAMW), opt.per_leaf(opt.master_weights(opt.torch_sgd(0.1, momentum=0.9)))
    run = Run(opt.grouped(of, *members), arrays(np.float32, seed=0))
    for step, present in enumerate(SKIPPED):
        run.push(arrays(np.float32, seed=step + 1), present)
    for at, leaf in enumerate(run.params()):
        close(leaf, alone(members[of[at]], at, SKIPPED))


def test_one_optimizer_in_two_groups_has_the_bits_of_one_group() -> None:
    joined = Run(opt.per_leaf(ADAMW), arrays(np.float32, seed=0))
    parted = Run(opt.grouped([1, 0, 1, 0], opt.per_leaf(ADAMW), opt.per_leaf(ADAMW)), arrays(np.float32, seed=0))
    for step in range(1, 6):
        equal(joined.push(arrays(np.float32, seed=step)), parted.push(arrays(np.float32, seed=step)))


AROUND = {
    "chain": lambda spec: opt.chain(opt.clip_grads(1.0), spec),
    "master_weights": opt.master_weights,
    "ema_params": lambda spec: opt.ema_params(spec, 0.9),
    "on_nonfinite": lambda spec: opt.on_nonfinite(spec, "skip"),
    "accumulate": lambda spec: opt.accumulate(spec, 1),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_groups_stand_inside_what_surrounds_an_update(around: Any) -> None:
    ours = Run(around(opt.grouped([0, 1, 1, 0], ADAMW, ADAMW)), arrays(np.float32, seed=0))
    theirs = Run(around(ADAMW), arrays(np.float32, seed=0))
    for step in range(1, 4):
        close(ours.push(arrays(np.float32, seed=step)), theirs.push(arrays(np.float32, seed=step)))


def test_every_leaf_says_its_group_and_the_paths_of_its_knobs() -> None:
    run = Run(opt.grouped([0, 1, 0, 1], ADAMW, opt.per_leaf(opt.torch_sgd(0.5))), arrays(np.float32, seed=0))
    first, second = knobs.groups(run.spec, tuple(SHAPES))
    assert (first.leaves, first.group, first.passes) == ((0, 2), "0", ("torch_adamw",))
    assert (second.leaves, second.group, second.passes) == ((1, 3), "1", ("per_leaf", "torch_sgd"))
    assert dict(second.knobs)["grouped.optimizers[1].per_leaf.optimizer.torch_sgd.learning_rate"] == 0.5


@pytest.mark.parametrize(
    ("spec", "subject"),
    [
        ("grouped([0, 1], sgd(0.1))", "grouped.of[1]"),
        ("grouped([0, 0], sgd(0.1), adam(0.1))", "grouped.optimizers[1]"),
        ("grouped([0.5], sgd(0.1))", "grouped.of[0]"),
        ("grouped([-1], sgd(0.1))", "grouped.of[0]"),
        ("grouped([], sgd(0.1))", "grouped.of"),
        ("grouped(array([0.0]), sgd(0.1))", "grouped.of"),
        ("grouped('0', sgd(0.1))", "grouped.of"),
        ("per_leaf(clip_grads(1.0))", "per_leaf.optimizer"),
    ],
)
def test_groups_that_mean_nothing_are_named(spec: str, subject: str) -> None:
    with pytest.raises(errors.SpecError) as caught:
        checks.check(opt.parse(spec))
    assert caught.value.subject == subject


FOUR = "[0, 0, 0, 0]"


@pytest.mark.parametrize(
    ("spec", "subject"),
    [
        ("grouped([0, 0, 0], sgd(0.1))", "grouped.of"),
        (f"per_leaf(grouped({FOUR}, sgd(0.1)))", "per_leaf.optimizer"),
        ("per_leaf(partition({'**': sgd(0.1)}))", "per_leaf.optimizer"),
        ("per_leaf(per_leaf(sgd(0.1)))", "per_leaf.optimizer"),
        ("per_leaf(accumulate(sgd(0.1), 2))", "per_leaf.optimizer"),
        ("per_leaf(on_nonfinite(sgd(0.1), 'skip'))", "per_leaf.optimizer"),
        (f"partition({{'**': grouped({FOUR}, sgd(0.1))}})", "partition.transforms['**']"),
        (f"grouped({FOUR}, grouped({FOUR}, sgd(0.1)))", "grouped.optimizers[0]"),
        (f"grouped({FOUR}, accumulate(sgd(0.1), 2))", "grouped.optimizers[0]"),
    ],
)
def test_what_tells_leaves_apart_gets_all_of_them(spec: str, subject: str) -> None:
    tree = Run(opt.sgd(0.1), arrays(np.float32, seed=0)).tree
    with pytest.raises(errors.SpecError) as caught:
        admission.check(checks.check(opt.parse(spec)), tree)
    assert caught.value.subject == subject


@pytest.mark.parametrize(
    ("spec", "skippable"),
    [
        ("per_leaf(sgd(0.1))", True),
        ("chain(clip_grads(1.0), per_leaf(sgd(0.1)))", True),
        ("chain(trace(0.9), per_leaf(sgd(0.1)))", False),
        ("ema_params(on_nonfinite(master_weights(per_leaf(sgd(0.1)))))", True),
        ("accumulate(per_leaf(sgd(0.1)), 2)", False),
        ("grouped([0, 1], per_leaf(sgd(0.1)), per_leaf(torch_sgd(0.1)))", True),
        ("grouped([0, 1], per_leaf(sgd(0.1)), torch_sgd(0.1))", False),
        ("partition({'a': per_leaf(sgd(0.1)), '**': per_leaf(torch_sgd(0.1))})", True),
        ("partition({'a': per_leaf(sgd(0.1)), '**': torch_sgd(0.1)})", False),
        ("torch_sgd(0.1)", False),
    ],
)
def test_gradients_may_be_left_out_only_leaf_by_leaf(spec: str, *, skippable: bool) -> None:
    assert build.skippable(checks.check(opt.parse(spec))) is skippable


@pytest.mark.parametrize("spec", [ADAMW, opt.per_leaf(ADAMW), opt.per_leaf(opt.adam(0.01))], ids=str)
def test_counts_that_no_gradient_reaches_leave_elements_apart(spec: opt.Spec) -> None:
    run = Run(spec, arrays(np.float32, seed=0))
    assert run.program.granularity is granularity.Granularity.ELEMENT
