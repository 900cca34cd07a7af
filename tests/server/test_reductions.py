"""Sums that cross blocks: a rule traced for one block, against the same for the whole tree and against NumPy.

The cut here is by hand, so that nothing is shared with the engine's: flat blocks of 512 elements, one trace a rule, a
program for each partial, and one that applies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax import lax

from optwire import optax as remote
from optwire import optimizers as opt
from optwire_proto import checks, tensors, trees
from optwire_server.engine import build, granularity, reductions, rule, telemetry, transformations

BLOCK = 512
SHAPES = ((40, 30), (5,), (), (0, 3), (3, 3, 2, 4), (700,))
ELEMENT, TENSOR, TREE = granularity.Granularity
Leaves = list[Any]


def arrays(seed: int, dtype: Any = np.float32, scale: float = 1.0) -> Leaves:
    rng = np.random.default_rng(seed)
    made = [np.asarray(scale * rng.standard_normal(shape)) for shape in SHAPES]
    if np.issubdtype(dtype, np.complexfloating):
        made = [leaf + 1j * scale * rng.standard_normal(leaf.shape) for leaf in made]
    return [np.asarray(leaf).astype(dtype) for leaf in made]


def length(leaves: Leaves) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.abs(leaf.astype(np.complex128)))) for leaf in leaves)))


def made(spec: opt.Spec, leaves: Leaves) -> rule.Rule:
    own = tuple(
        trees.LeafSpec(f"{k}", leaf.shape, tensors.dtype_name(leaf.dtype) or "") for k, leaf in enumerate(leaves)
    )
    return build.build(checks.check(spec, known=build.CATALOGUE), build.Site(own, {}))


def whole(spec: opt.Spec, params: Leaves, pushes: Sequence[Leaves], every: int = 1) -> Leaves:
    """Parameters after some pushes, all leaves in one program."""
    own = made(spec, params)

    @functools.partial(jax.jit, static_argnums=3)
    def update(index: int, grads: Leaves, state: Any, closing: bool) -> Any:
        return own.update(grads, state, rule.Call(index, closing))

    state = jax.jit(own.init)(params)
    for index, grads in enumerate(pushes):
        state = update(index, grads, state, (index + 1) % every == 0)
    return [np.asarray(leaf) for leaf in own.params(state)]


class Blocked:
    """The same cut into flat blocks; padding is NaN in gradients, so that whoever looks at it is found out."""

    def __init__(self, spec: opt.Spec, params: Leaves) -> None:
        self._dtype = params[0].dtype
        self._rule = made(spec, [np.zeros(BLOCK, self._dtype)])
        self._states = [jax.jit(self._rule.init)([block]) for block, _ in cut(params, 0)]
        self.reduced: tuple[Any, ...] = ()
        self.index = 0

    def step(self, grads: Leaves, *, closing: bool = True) -> None:
        blocks = list(zip(cut(grads, np.nan), self._states, strict=True))
        self.reduced = ()
        *partials, apply = self._programs(closing)
        for program in partials:
            given = [program(self.reduced, valid, self.index, [block], state) for (block, valid), state in blocks]
            self.reduced += (reductions.combine(given, reductions.dtype()),)
        self._states = [apply(self.reduced, valid, self.index, [block], state) for (block, valid), state in blocks]
        self.index += 1

    @functools.cache  # noqa: B019 - as long as the test
    def _programs(self, closing: bool) -> list[Callable[..., Any]]:
        """One for each partial, in order, and the one that applies."""
        traced = functools.partial(self._traced, closing)
        block = jax.ShapeDtypeStruct((BLOCK,), self._dtype)
        sums = len(jax.eval_shape(traced, (), np.int32(BLOCK), 0, [block], self._states[0])[1])
        partials = [jax.jit(lambda *given, k=k: traced(*given)[1][k]) for k in range(sums)]
        return [*partials, jax.jit(lambda *given: traced(*given)[0])]

    def params(self) -> np.ndarray:
        return np.concatenate([np.asarray(self._rule.params(state)[0]) for state in self._states])

    def _traced(self, closing: bool, reduced: Any, valid: Any, index: Any, grads: Leaves, state: Any) -> Any:
        with reductions.reducing(reduced, valid) as reducer:
            new = self._rule.update(grads, state, rule.Call(index, closing))
        return new, reducer.partials


def flat(leaves: Leaves) -> np.ndarray:
    return np.concatenate([leaf.reshape(-1) for leaf in leaves])


def cut(leaves: Leaves, padding: float) -> list[tuple[np.ndarray, np.int32]]:
    """Blocks, and how many elements of each count."""
    laid = flat(leaves)
    starts = range(0, laid.size, BLOCK)
    padded = np.append(laid, np.full(-laid.size % BLOCK, padding, laid.dtype))
    return [(padded[start : start + BLOCK], np.int32(min(BLOCK, laid.size - start))) for start in starts]


def ulps(ours: Any, theirs: Any) -> float:
    """The largest distance in units in the last place of what is expected."""
    expected = np.asarray(theirs)
    kind = jnp.finfo(expected.dtype)
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    size = np.maximum(np.abs(expected.astype(wide)), float(kind.tiny))
    unit = float(kind.eps) * 2.0 ** np.floor(np.log2(size))
    return float(np.max(np.abs(np.asarray(ours).astype(wide) - expected.astype(wide)) / unit, initial=0.0))


# ------------------------------------------------------------------------------------------------------------ sums


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 5 * 4096 + 1, 70_001])
def test_a_sum_is_rounded_once(size: int) -> None:
    values = np.random.default_rng(size).random(size).astype(np.float32)
    total = jax.jit(lambda x: reductions.summed([x]))(values)
    assert total.dtype == np.float32
    assert total == np.float32(np.sum(values, dtype=np.float64))


def test_a_sum_of_nothing_is_zero_and_needs_no_program() -> None:
    assert reductions.summed([]) == 0
    with reductions.reducing((np.float32(3),)) as reducer:
        assert reductions.summed([]) == 3
    assert not isinstance(reducer.partials[0], jax.core.Tracer)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_leaves_of_sixteen_bits_are_summed_in_more(dtype: str) -> None:
    """In f16 the square of 300 is infinite, and in bf16 a sum of a thousand squares stops short."""
    leaves = arrays(1, jnp.dtype(dtype), 300.0)
    total = jax.jit(reductions.square_norm)(leaves)
    assert float(jnp.sqrt(total)) == pytest.approx(length([leaf.astype(np.float32) for leaf in leaves]), rel=1e-6)


def test_complex_leaves_count_with_their_length() -> None:
    leaves = arrays(2, np.complex64)
    assert float(jax.jit(reductions.square_norm)(leaves)) == pytest.approx(length(leaves) ** 2, rel=1e-6)


def test_flags_and_integers_are_counted() -> None:
    assert jax.jit(lambda x: reductions.summed([x > 0, x]))(np.arange(-2, 5, dtype=np.int32)) == 4 + 7


def test_a_trace_of_64_bits_has_sums_of_64() -> None:
    values = np.linspace(0, 1, 1000)
    with jax.enable_x64(True):
        total = jax.jit(lambda x: reductions.summed([x]))(values)
        assert total.dtype == np.float64 == reductions.dtype()
        assert float(total) == pytest.approx(values.sum(), rel=1e-14)
        mixed = jax.jit(lambda x, y: reductions.summed([x, y]))(values, np.ones(3, np.float32))
        assert float(mixed) == pytest.approx(values.sum() + 3, rel=1e-14)


def test_partials_are_added_in_64_bits_one_after_the_other() -> None:
    assert reductions.combine([], np.float32) == 0
    assert reductions.combine([1e8, 1.0, -1e8], np.float32) == 1
    assert reductions.combine([np.float64(1e300)], np.float32) == np.inf
    assert np.isnan(reductions.combine([1.0, np.nan], np.float64))
    assert reductions.combine([1.0], np.float32).dtype == np.float32


def test_the_first_call_gets_the_first_sum_and_padding_counts_in_none() -> None:
    def traced(reduced: Any, valid: Any, x: Any) -> Any:
        with reductions.reducing(reduced, valid) as reducer:
            first, second = reductions.summed([x]), reductions.summed([x * 2, x > 0])
        return first, second, reducer.partials

    x = np.append(np.ones(5, np.float32), np.full(3, np.nan, np.float32))
    first, second, partials = jax.jit(traced)((np.float32(7), np.float32(9)), np.int32(5), x)
    assert (first, second) == (7, 9)
    assert [float(value) for value in partials] == [5, 10 + 5]


def test_inside_of_another_trace_a_sum_is_of_the_leaves_at_hand() -> None:
    def traced(x: Any) -> Any:
        with reductions.reducing((np.float32(7),)) as reducer:
            inside = lax.cond(x[0] > 0, lambda: reductions.summed([x]), lambda: reductions.summed([-x]))
        return inside, len(reducer.partials)

    assert jax.jit(traced)(np.ones(4, np.float32)) == (4, 0)


def test_alone_a_sum_is_of_the_leaves_at_hand() -> None:
    with reductions.reducing((np.float32(7),)) as reducer:
        with reductions.alone():
            assert reductions.summed([np.ones(4, np.float32)]) == 4
        assert reductions.summed([np.ones(4, np.float32)]) == 7
    assert len(reducer.partials) == 1


def test_sums_can_be_had_again_without_another_partial() -> None:
    with reductions.reducing((np.float32(7),)) as reducer:
        reductions.summed([np.ones(4, np.float32)])
        with reductions.repeating():
            assert reductions.summed([np.ones(4, np.float32)]) == 7
    assert len(reducer.partials) == 1
    with reductions.repeating():
        assert reductions.summed([np.ones(4, np.float32)]) == 4


# --------------------------------------------------------------------------------------------- clips against optax


@pytest.mark.parametrize("scale", [1e-3, 0.03, 1.0, 1e6])
def test_clipping_by_global_norm_is_optaxs_but_for_the_rounding_of_its_sum(scale: float) -> None:
    leaves = arrays(3, scale=scale)
    ours, theirs = transformations.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)
    got, state = jax.jit(lambda g: ours.update(g, ours.init(g)))(leaves)
    expected, _ = jax.jit(lambda g: theirs.update(g, theirs.init(g)))(leaves)
    assert state == theirs.init(leaves)
    exact = [leaf.astype(np.float64) * min(1.0, 1.0 / length(leaves)) for leaf in leaves]
    error, theirs_error = (
        max(ulps(a, b.astype(np.float32)) for a, b in zip(clipped, exact, strict=True)) for clipped in (got, expected)
    )
    assert error <= 1
    assert error <= theirs_error
    if length(leaves) < 1:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(got, leaves, strict=True))


def test_a_norm_beyond_f16_clips_and_does_not_erase() -> None:
    leaves = arrays(4, np.float16, 3000.0)
    got = jax.jit(lambda g: transformations.clip_by_global_norm(100.0).update(g, optax.EmptyState())[0])(leaves)
    assert all(leaf.dtype == np.float16 for leaf in got)
    assert length([np.asarray(leaf, np.float32) for leaf in got]) == pytest.approx(100, rel=1e-3)


def test_clips_of_several_element_types_give_each_back() -> None:
    leaves = [np.ones(3, np.float32), np.ones(3, jnp.bfloat16), np.ones(3, np.complex64)]
    for clip in (transformations.clip_by_global_norm(1.5), transformations.clip_grads(1.5)):
        got, _ = jax.jit(lambda g, clip=clip: clip.update(g, clip.init(g)))(leaves)
        assert [leaf.dtype for leaf in got] == [leaf.dtype for leaf in leaves]
        assert all(np.allclose(np.asarray(leaf, np.complex64), 0.5, rtol=4e-3) for leaf in got)


@pytest.mark.parametrize("place", ["chain", "masked", "partition"])
def test_the_norm_is_of_the_leaves_that_the_clip_sees(place: str) -> None:
    leaves = arrays(5)
    mask = [k % 2 == 0 for k in range(len(leaves))]

    def around(clip: Any) -> Any:
        if place == "chain":
            return optax.chain(optax.scale(2.0), clip, optax.add_decayed_weights(0.1))
        if place == "masked":
            return optax.masked(optax.chain(clip, optax.trace(0.9)), mask)
        return optax.partition({"a": clip, "b": optax.sgd(0.1)}, ["a" if own else "b" for own in mask])

    ours, theirs = around(transformations.clip_by_global_norm(0.5)), around(optax.clip_by_global_norm(0.5))
    got, state = jax.jit(lambda g: ours.update(g, ours.init(leaves), leaves))(leaves)
    expected, other = jax.jit(lambda g: theirs.update(g, theirs.init(leaves), leaves))(leaves)
    assert jax.tree.structure(state) == jax.tree.structure(other)
    assert max(ulps(a, b) for a, b in zip(got, expected, strict=True)) <= 2


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (transformations.normalize_by_update_norm(-0.5, 1e-3), optax.normalize_by_update_norm(-0.5, 1e-3)),
        (transformations.normalize(), optax.contrib.normalize()),
    ],
    ids=["normalize_by_update_norm", "normalize"],
)
def test_normalizing_is_optaxs(ours: Any, theirs: Any) -> None:
    leaves = arrays(6)
    got, _ = jax.jit(lambda g: ours.update(g, ours.init(g)))(leaves)
    expected, _ = jax.jit(lambda g: theirs.update(g, theirs.init(g)))(leaves)
    assert max(ulps(a, b) for a, b in zip(got, expected, strict=True)) <= 2


def test_apply_if_finite_keeps_the_state_of_optaxs() -> None:
    leaves = arrays(7)
    ours, theirs = (module.apply_if_finite(optax.adam(0.1), 2) for module in (transformations, optax))
    states = [ours.init(leaves), theirs.init(leaves)]
    for step in range(12):
        grads = arrays(20 + step)
        if step in (2, 3, 5, 6, 7, 8):  # two in a row are kept out, from the third on they are not
            grads[4][0, 0, 0, 0] = (np.nan, np.inf)[step % 2]
        given = [jax.jit(made.update)(grads, state, leaves) for made, state in zip((ours, theirs), states, strict=True)]
        states = [state for _, state in given]
        for got, expected in zip(*map(jax.tree.leaves, given), strict=True):
            np.testing.assert_array_max_ulp(got, expected, 2) if got.dtype == np.float32 else None
            assert got.dtype == expected.dtype
            assert np.array_equal(np.isfinite(got), np.isfinite(expected))
    assert [int(state.total_notfinite) for state in states] == [6, 6]


# ------------------------------------------------------------------------------------------- blocks against the tree

CROSSING: dict[str, tuple[int, Callable[[], opt.Spec]]] = {
    "clipped": (1, lambda: opt.chain(remote.clip_by_global_norm(0.5), remote.adamw(1e-2))),
    "clipped by the seed": (1, lambda: opt.chain(opt.clip_grads(0.5), opt.adam(1e-2))),
    "clipped twice": (
        2,
        lambda: opt.chain(remote.clip_by_global_norm(5.0), remote.trace(0.9), opt.clip_grads(0.1), opt.sgd(0.1)),
    ),
    "clipped after Adam": (1, lambda: opt.chain(remote.scale_by_adam(), remote.clip_by_global_norm(0.1), opt.sgd(0.1))),
    "normalized": (1, lambda: opt.chain(remote.normalize_by_update_norm(0.1), opt.sgd(0.1))),
    "skipped": (1, lambda: opt.on_nonfinite(opt.adam(1e-2), "skip")),
    "rejected, clipped": (
        2,
        lambda: opt.on_nonfinite(opt.chain(opt.clip_grads(0.5), opt.adam(1e-2)), "reject"),
    ),
    "kept out": (1, lambda: opt.chain(remote.apply_if_finite(remote.scale_by_adam(), 3), opt.sgd(0.1))),
    "averaged, wide": (
        1,
        lambda: opt.ema_params(opt.master_weights(opt.chain(remote.clip_by_global_norm(0.5), opt.adam(1e-2))), 0.9),
    ),
    "by leaf": (0, lambda: opt.per_leaf(remote.adam(1e-2))),
}


# Of the seed's rules, and leaf by leaf; XLA contracts products and sums of optax's otherwise in other shapes.
EXACT = ("clipped by the seed", "skipped", "by leaf")


def assert_near(got: np.ndarray, expected: np.ndarray, steps: int) -> None:
    """Within two units in the last place a step, of the largest element."""
    unit = float(jnp.finfo(expected.dtype).eps) * float(np.abs(expected.astype(np.complex128)).max())
    assert np.abs(got.astype(np.complex128) - expected.astype(np.complex128)).max() <= 2 * steps * unit


@pytest.mark.parametrize("name", CROSSING)
def test_blocks_take_the_steps_of_the_whole_tree(name: str) -> None:
    sums, spec = CROSSING[name]
    params, pushes = arrays(8), [arrays(30 + step) for step in range(4)]
    if name in ("skipped", "rejected, clipped", "kept out"):
        pushes[1][0][39, 29] = np.nan
        pushes[2][5][3] = 1e30  # finite, and its square is not
    blocked = Blocked(spec(), params)
    for grads in pushes:
        blocked.step(grads)
        assert len(blocked.reduced) == sums
    expected = flat(whole(spec(), params, pushes))
    got = blocked.params()[: expected.size]
    assert_near(got, expected, len(pushes))
    if name in EXACT:
        assert got.tobytes() == expected.tobytes(), "the sums are rounded once, so that their cut is not seen"


def test_a_clip_inside_an_accumulation_needs_its_sum_once_a_step() -> None:
    spec = opt.accumulate(opt.chain(remote.clip_by_global_norm(0.5), remote.adam(1e-2)), 3)
    params, pushes = arrays(9), [arrays(40 + step) for step in range(6)]
    blocked = Blocked(spec, params)
    for index, grads in enumerate(pushes):
        blocked.step(grads, closing=index % 3 == 2)
        assert len(blocked.reduced) == int(index % 3 == 2)
    expected = flat(whole(spec, params, pushes, every=3))
    assert_near(blocked.params()[: expected.size], expected, len(pushes))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "complex64"])
def test_blocks_of_other_element_types_take_the_steps_of_the_whole_tree(dtype: str) -> None:
    spec = opt.on_nonfinite(opt.chain(remote.clip_by_global_norm(2.0), opt.momentum(2.0**-6, 0.5)), "skip")
    scale = 3000.0 if dtype == "float16" else 1.0  # whose norm no f16 can hold
    params, pushes = arrays(10, jnp.dtype(dtype)), [arrays(50 + step, jnp.dtype(dtype), scale) for step in range(3)]
    with jax.enable_x64(dtype == "float64"):
        blocked = Blocked(spec, params)
        for grads in pushes:
            blocked.step(grads)
        expected = flat(whole(spec, params, pushes))
    assert expected.dtype == jnp.dtype(dtype)
    moved = flat(params).astype(np.complex128) - expected.astype(np.complex128)
    assert np.abs(moved).max() > 0
    assert_near(blocked.params()[: expected.size], expected, len(pushes))


def test_clipped_blocks_are_what_numpy_gives_in_64_bits() -> None:
    params, pushes = arrays(11), [arrays(60 + step) for step in range(3)]
    blocked = Blocked(opt.chain(opt.clip_grads(0.5), opt.momentum(0.1, 0.9)), params)
    x, v = flat(params).astype(np.float64), np.zeros(flat(params).size)
    for grads in pushes:
        blocked.step(grads)
        g = flat(grads).astype(np.float64)
        v = 0.9 * v + g * min(1.0, 0.5 / np.linalg.norm(g))
        x = x - 0.1 * v
    np.testing.assert_allclose(blocked.params()[: x.size], x, rtol=1e-6, atol=1e-7)


def test_one_element_that_is_not_finite_stops_all_blocks() -> None:
    """Also where the gradient is finite, and the new state of its block alone is not."""
    params = arrays(12)
    for bad in (np.nan, -np.inf, 1e30):
        blocked = Blocked(opt.on_nonfinite(opt.adam(1e-2), "skip"), params)
        blocked.step(arrays(70))
        before = blocked.params()
        grads = arrays(71)
        grads[0][0, 0] = bad
        blocked.step(grads)
        assert blocked.reduced[0] > 0
        assert blocked.params().tobytes() == before.tobytes()
        blocked.step(arrays(72))
        assert blocked.reduced == (0,)
        assert blocked.params().tobytes() != before.tobytes()


# ---------------------------------------------------------------------------------------------------------- the class


def derived(spec: opt.Spec, *, opaque: bool = True) -> granularity.Granularity:
    leaves = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((4, 3), (5,), (2, 3, 4))]
    own = made(spec, leaves)
    state = jax.eval_shape(own.init, leaves)

    def update(grads: Any, state: Any) -> Any:
        return own.update(grads, state, rule.Call(0))

    seen, given = reductions.opaque(update, leaves, state) if opaque else (update, state)
    return granularity.derive(seen, leaves, given)


LAMB = remote.scale_by_trust_ratio()


@pytest.mark.parametrize("name", CROSSING)
def test_what_sums_cross_is_cut_into_elements(name: str) -> None:
    sums, spec = CROSSING[name]
    assert derived(spec()) is ELEMENT
    assert derived(spec(), opaque=False) is (TREE if sums else ELEMENT)


@pytest.mark.parametrize(
    ("expected", "spec"),
    [
        (TENSOR, opt.chain(remote.clip_by_global_norm(0.5), remote.lamb(1e-2))),
        (TENSOR, opt.chain(LAMB, remote.clip_by_global_norm(0.5), opt.sgd(0.1))),
        # What is summed depends on whole leaves, though nothing else does.
        (TENSOR, opt.chain(LAMB, remote.apply_if_finite(remote.set_to_zero(), 3), opt.sgd(0.1))),
        (TENSOR, opt.on_nonfinite(remote.lamb(1e-2), "skip")),
        (TENSOR, opt.per_leaf(opt.chain(remote.clip_by_global_norm(0.5), remote.adam(1e-2)))),
        (TREE, opt.chain(remote.clip_by_global_norm(0.5), remote.prodigy(1.0))),
        (TREE, remote.flatten(remote.named_chain(("clip", remote.clip_by_global_norm(0.5)), ("sgd", remote.sgd(0.1))))),
    ],
)
def test_the_class_of_a_rule_is_that_of_what_its_sums_are_made_of(
    expected: granularity.Granularity, spec: opt.Spec
) -> None:
    assert derived(spec) is expected


# ---------------------------------------------------------------------------------------------------------- telemetry


def test_figures_are_made_of_the_sums_of_blocks() -> None:
    spec = opt.chain(remote.clip_by_global_norm(0.5), opt.sgd(0.1))
    params, grads = arrays(13), arrays(80)
    grads[0][1, :7] = np.nan
    block = [np.zeros(BLOCK, np.float32)]
    own, site = made(spec, block), build.Site((trees.LeafSpec("0", (BLOCK,), "f32"),), {})
    checked = checks.check(spec, known=build.CATALOGUE)

    @jax.jit
    def sums(reduced: Any, valid: Any, grads: Leaves, state: Any) -> Any:
        with reductions.reducing(reduced, valid) as reducer:
            new = own.update(grads, state, rule.Call(0))
            changed = build.clips(checked, site, state, closing=True)
            taken = telemetry.sums(grads, own.params(state), own.params(new), changed)
        assert len(reducer.partials) == 1, "the clip's share needs no sum of its own"
        return taken

    finite = [np.nan_to_num(g) for g in grads]
    for pushed, norm in ((finite, np.float32(length(finite) ** 2)), (grads, np.float32(np.nan))):
        added: dict[str, float] = {}
        for (g, valid), (x, _) in zip(cut(pushed, np.nan), cut(params, 0), strict=True):
            for name, value in sums((norm,), valid, [g], own.init([x])).items():
                added[name] = added.get(name, 0.0) + float(value)
        figures = telemetry.figures(added, flat(grads).size)
        if pushed is finite:
            factor = 0.5 / length(finite)
            after = [x - 0.1 * factor * g for x, g in zip(params, finite, strict=True)]
            assert figures["grad_norm"] == pytest.approx(length(finite), rel=1e-6)
            assert figures["update_norm"] == pytest.approx(0.05, rel=1e-4)
            assert figures["param_norm"] == pytest.approx(length(after), rel=1e-6)
            changed = np.count_nonzero(flat(finite))
            assert figures["clip_fraction"] == pytest.approx(changed / flat(grads).size)
        assert figures["nonfinite"] == (0 if pushed is finite else 7)


def test_leaves_without_a_gradient_count_in_the_length_of_the_parameters_alone() -> None:
    params = arrays(14)
    added = {name: float(value) for name, value in jax.jit(telemetry.still)(params).items()}
    figures = telemetry.figures(added, 1)
    assert figures == {"grad_norm": 0, "update_norm": 0, "nonfinite": 0, "param_norm": pytest.approx(length(params))}
