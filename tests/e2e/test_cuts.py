"""The whole catalogue cut as the engine cuts it, against the same rule for all leaves at once.

The promise: "Results equal to the unblocked update (exact for the seed's nine; tests across granularities)", and
"executables of the catalogue with a copy or an unaliased state buffer: 0, or listed with the reason".

The rule is the same on both sides; the other side knows no cut, no kernel and no sums that cross blocks: it is jitted
here, with its learning rates as operands. What the rule computes is held to optax in ``test_catalogue``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from tests.e2e import catalogue_samples

from optwire import optimizers as opt
from optwire_proto import catalogue, trees
from optwire_server.engine import build, engine, landing, program, rates, rule

# One leaf is longer than a small block, so that flat spans are two of them, with leaves across the border.
SHAPES: Any = {"conv": {"kernel": (3, 3, 2, 4)}, "dense": {"bias": (5,), "kernel": (190, 100)}, "scale": ()}
STEPS = 4
NAN_STEP = 1
SEED = {entry.name for entry in catalogue.SEED if entry.kind == "optimizer"}
# Every sixth, and the seed's: the whole list takes minutes. All of them did, when measured.
ENTRIES = sorted({*sorted(catalogue_samples.entries())[::6], *SEED})
# Of the largest magnitude that the leaf has had: where Adam's moments nearly cancel, a step is rounded as they are.
ULPS_PER_STEP = 2.0

# What is not written in place altogether, and why.
_GRADIENTS = "it keeps the gradients of the step before: a copy of them is its new slot"
_ALSO_NEEDED = (
    "parameters are computed from a new slot while the old one is still needed: it is made beside it and copied"
)
_ARRAYS = "an array of each leaf, from which a norm is taken or a matrix made, is there beside the state"
_RANDOM = "random bits are drawn for all leaves at once"
IN_PART: dict[str, str] = {
    "adan": _GRADIENTS,
    "add_noise": _RANDOM,
    "cocob": _ALSO_NEEDED,
    "fromage": _ARRAYS,
    "galore": _ARRAYS,
    "lars": _ARRAYS,
    "lbfgs": "it keeps the parameters and gradients of the step before, and a history of both",
    "lookahead": _ALSO_NEEDED,
    "mechanize": _GRADIENTS,
    "muon": _ARRAYS,
    "noisy_sgd": _RANDOM,
    "optimistic_adam": _ALSO_NEEDED,
    "optimistic_adam_v2": _ALSO_NEEDED,
    "optimistic_gradient_descent": _GRADIENTS,
    "scale_by_adan": _GRADIENTS,
    "scale_by_cocob": _ALSO_NEEDED,
    "scale_by_galore": _ARRAYS,
    "scale_by_lbfgs": "it keeps the parameters and gradients of the step before, and a history of both",
    "scale_by_optimistic_gradient": _GRADIENTS,
    "schedule_free": _ALSO_NEEDED,
    "schedule_free_adamw": _ALSO_NEEDED,
    "schedule_free_sgd": _ALSO_NEEDED,
}


def is_copied_for_telemetry(compiled: program.Program) -> bool:
    """Figures need parameters before and after. Of flat blocks they are taken first, in another executable.

    Where leaves keep their shapes a step may be products of matrices, which are not computed twice: parameters are
    copied.
    """
    return compiled.granularity != "element"


@pytest.fixture(scope="module")
def running() -> Iterator[engine.Engine]:
    made = engine.Engine(allow_programs=True)
    yield made
    made.close()


@functools.cache
def arrays(scalars: bool) -> tuple[trees.TreeSpec, list[Any], tuple[list[Any], ...]]:
    """The tree, parameters, and the gradients of every step."""
    rng = np.random.default_rng(21)
    shapes = SHAPES if scalars else SHAPES | {"scale": (1,)}
    flat = trees.flatten(
        jax.tree.map(lambda shape: np.zeros(shape, np.float32), shapes, is_leaf=lambda node: isinstance(node, tuple))
    )
    params, *pushes = (
        [np.asarray(rng.standard_normal(leaf.shape), np.float32) for leaf in flat.spec.leaves] for _ in range(STEPS + 1)
    )
    return flat.spec, params, tuple(pushes)


def whole(sample: catalogue_samples.Sample, checked: opt.Spec, every: int, pushed: list[list[Any]]) -> list[list[Any]]:
    """Parameters after every step, one program for all leaves."""
    tree, params, _ = arrays(not sample.why_no_scalars)
    numbers = rates.rates(checked)
    extras = {"value": np.float32(1.5)} if sample.wants_loss else {}

    def made(given: Any) -> rule.Rule:
        return build.build(checked, build.Site(tree.leaves, dict(zip(numbers, given, strict=True))))

    @functools.partial(jax.jit, static_argnames="closing")
    def update(given: Any, index: Any, grads: Any, state: Any, *, closing: bool) -> Any:
        own = made(given)
        new = own.update(grads, state, rule.Call(index, closing, extras))
        return jax.tree.map(lambda after, before: after.astype(before.dtype), new, state), own.params(new)

    given = tuple(numbers.values())
    state = made(given).init(params)
    after = []
    for index, grads in enumerate(pushed):
        state, read = update(given, index, grads, state, closing=(index + 1) % every == 0)
        after.append([np.asarray(leaf) for leaf in read])
    return after


def cut(
    running: engine.Engine, sample: catalogue_samples.Sample, compiled: program.Program, pushed: list[list[Any]]
) -> list[np.ndarray]:
    """The same from the engine, all leaves in one array."""
    tree, params, _ = arrays(not sample.why_no_scalars)
    given = tuple(rates.rates(running.check(sample.spec)).values())
    landings = landing.Landings(bytes_max=1 << 30, keep_bytes=0)

    def laid(leaves: list[Any]) -> landing.Landing:
        lent = landings.land(tree, compiled.layout)
        for array, leaf in zip(lent.arrays(), leaves, strict=True):
            array[...] = leaf
        return lent

    held = running.hold(compiled, laid(params), given)
    after = []
    for index, grads in enumerate(pushed):
        variant = program.Variant(closing=(index + 1) % compiled.every == 0)
        operands = program.Operands(given, index, extras={"value": 1.5} if sample.wants_loss else {})
        running.work(running.update(held, variant, operands, laid(grads)), held)
        after.append(np.concatenate([segment.copy() for segment in running.work(running.params(held), held)]))
    return after


@pytest.mark.parametrize("entry", ENTRIES)
def test_blocks_take_the_steps_of_all_leaves_at_once_and_are_written_in_place(
    running: engine.Engine, entry: str
) -> None:
    sample = catalogue_samples.sample(entry, "float32")
    tree, params, pushes = arrays(not sample.why_no_scalars)
    pushed = [list(grads) for grads in pushes]
    if sample.has_nans:
        spoiled = pushed[NAN_STEP][2].copy()
        spoiled[189, 99] = np.nan
        pushed[NAN_STEP][2] = spoiled
    checked = running.check(sample.spec)
    compiled = running.compile(checked, tree)
    if compiled.granularity == "element":
        assert max(len(span.blocks) for span in compiled.cut.spans) > 1
    assert (entry in IN_PART) == bool(compiled.flaws), compiled.flaws
    compiled.prepare(program.Variant(telemetry=True))
    assert (entry in IN_PART or is_copied_for_telemetry(compiled)) == bool(compiled.flaws), compiled.flaws
    if compiled.granularity == "tree":
        return  # one program for all leaves
    largest = [np.abs(leaf).max() for leaf in params]
    steps = zip(cut(running, sample, compiled, pushed), whole(sample, checked, compiled.every, pushed), strict=True)
    for step, (got, expected) in enumerate(steps):
        largest = [max(most, np.abs(leaf).max()) for most, leaf in zip(largest, expected, strict=True)]
        unit = np.concatenate(
            [np.full(leaf.size, np.spacing(most)) for leaf, most in zip(expected, largest, strict=True)]
        )
        flat = np.concatenate([leaf.reshape(-1) for leaf in expected])
        assert np.isfinite(got).all()
        apart = np.abs(got.astype(np.float64) - flat) / unit
        assert apart.max() <= ULPS_PER_STEP * (step + 1)
        if entry in SEED:
            assert got.tobytes() == flat.tobytes()


@pytest.mark.parametrize("entry", sorted(SEED))
def test_pushes_without_some_gradients_are_written_in_place_too(running: engine.Engine, entry: str) -> None:
    tree, _, _ = arrays(scalars=True)
    compiled = running.compile(running.check(opt.per_leaf(catalogue_samples.sample(entry, "float32").spec)), tree)
    for variant in (program.Variant(absent=True), program.Variant(absent=True, updates=True)):
        compiled.prepare(variant)
        assert compiled.flaws == ()
    compiled.prepare(program.Variant(absent=True, telemetry=True))
    assert bool(compiled.flaws) == is_copied_for_telemetry(compiled), compiled.flaws
