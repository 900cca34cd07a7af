"""Granularity: what the dataflow of an update says, against what a changed number does.

The oracle knows nothing of jaxprs. It changes one element of one gradient or parameter, lets the update run on, and
looks at which numbers of the state come out otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax import lax

from optwire_server import optimizers
from optwire_server.engine import granularity

ELEMENT, TENSOR, TREE = granularity.Granularity
SHAPES = ((6, 4), (5,), (), (3, 3, 2, 4))
F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Rule:
    """An update, its first state, and where the parameters are in it."""

    init: Callable[[Any], Any]
    update: Callable[[Any, Any], Any]
    params: Callable[[Any], Any] = lambda state: state[0]
    shapes: tuple[tuple[int, ...], ...] = SHAPES

    def derive(self, dtype: Any = F32) -> granularity.Granularity:
        leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape in self.shapes]
        return granularity.derive(self.update, leaves, jax.eval_shape(self.init, leaves))


def of_optax(transformation: Any, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> Rule:
    def update(grads: Any, state: Any) -> Any:
        params, slots = state
        updates, slots = transformation.update(grads, slots, params)
        return optax.apply_updates(params, updates), slots

    return Rule(lambda params: (params, transformation.init(params)), update, shapes=shapes)


def descending(transformation: Any) -> Any:
    return optax.chain(transformation, optax.scale(-0.1))


def of_ours(optimizer: optimizers.Optimizer, max_norm: float | None = None) -> Rule:
    def update(grads: Any, state: Any) -> Any:
        step, opt_state = state
        grads = grads if max_norm is None else optimizers.clip_grads(grads, max_norm)
        return step + 1, optimizer.update_fn(step, grads, opt_state)

    return Rule(lambda params: (jnp.int32(0), optimizer.init_fn(params)), update, lambda s: optimizer.params_fn(s[1]))


def partitioned() -> Any:
    parts = {"moving": optax.adam(0.1), "still": optax.set_to_zero()}
    return optax.partition(parts, ["moving", "still", "moving", "still"])


DECAY = functools.partial(optax.cosine_decay_schedule, 0.1, 10)
NO_SCALARS = tuple(shape for shape in SHAPES if shape)
ENTRIES: dict[str, tuple[granularity.Granularity, Callable[[], Rule]]] = {
    "optax sgd": (ELEMENT, lambda: of_optax(optax.sgd(0.1))),
    "optax momentum": (ELEMENT, lambda: of_optax(optax.sgd(0.1, momentum=0.9))),
    "optax nesterov": (ELEMENT, lambda: of_optax(optax.sgd(0.1, momentum=0.9, nesterov=True))),
    "optax sgd, scheduled": (ELEMENT, lambda: of_optax(optax.sgd(DECAY()))),
    "optax adam": (ELEMENT, lambda: of_optax(optax.adam(0.1))),
    "optax adam, injected": (ELEMENT, lambda: of_optax(optax.inject_hyperparams(optax.adam)(DECAY()))),
    "optax adamw": (ELEMENT, lambda: of_optax(optax.adamw(0.1))),
    "optax lion": (ELEMENT, lambda: of_optax(optax.lion(0.1))),
    "optax rmsprop": (ELEMENT, lambda: of_optax(optax.rmsprop(0.1, centered=True, momentum=0.9))),
    "optax adagrad": (ELEMENT, lambda: of_optax(optax.adagrad(0.1))),
    "optax adadelta": (ELEMENT, lambda: of_optax(optax.adadelta(0.1))),
    "optax yogi": (ELEMENT, lambda: of_optax(optax.yogi(0.1))),
    "optax amsgrad": (ELEMENT, lambda: of_optax(optax.amsgrad(0.1))),
    "optax adamax": (ELEMENT, lambda: of_optax(optax.adamax(0.1))),
    "optax radam": (ELEMENT, lambda: of_optax(optax.radam(0.1))),
    "optax nadam": (ELEMENT, lambda: of_optax(optax.nadam(0.1))),
    "optax adabelief": (ELEMENT, lambda: of_optax(optax.adabelief(0.1))),
    "optax adan": (ELEMENT, lambda: of_optax(optax.adan(0.1))),
    "optax sign_sgd": (ELEMENT, lambda: of_optax(optax.sign_sgd(0.1))),
    "optax clip": (ELEMENT, lambda: of_optax(descending(optax.clip(1.0)))),
    "optax ema": (ELEMENT, lambda: of_optax(descending(optax.ema(0.9)))),
    # A count decides by a cond when the collected gradients are applied.
    "optax MultiSteps": (ELEMENT, lambda: of_optax(optax.MultiSteps(optax.adam(0.1), 2))),
    "optax partition": (ELEMENT, lambda: of_optax(partitioned())),
    "optax schedule_free_adamw": (ELEMENT, lambda: of_optax(optax.contrib.schedule_free_adamw(0.1))),
    "optax ademamix": (ELEMENT, lambda: of_optax(optax.contrib.ademamix(0.1))),
    "optax cocob": (ELEMENT, lambda: of_optax(optax.contrib.cocob())),
    "optax lamb": (TENSOR, lambda: of_optax(optax.lamb(0.1))),
    "optax lars": (TENSOR, lambda: of_optax(optax.lars(0.1))),
    "optax fromage": (TENSOR, lambda: of_optax(optax.fromage(0.1))),
    "optax adafactor": (TENSOR, lambda: of_optax(optax.adafactor(0.1, min_dim_size_to_factor=2))),
    # The unfactored second moment is elementwise; the clipping by block and the scaling by parameters are not.
    "optax adafactor, unfactored": (TENSOR, lambda: of_optax(optax.adafactor(0.1))),
    # Optax's SM3 is not defined for a leaf of shape ().
    "optax sm3": (TENSOR, lambda: of_optax(optax.sm3(0.1), NO_SCALARS)),
    # One second moment for each leaf, of shape (): a scalar of the state that its leaf owns.
    "optax novograd": (TENSOR, lambda: of_optax(optax.novograd(0.1))),
    "optax clip_by_block_rms": (TENSOR, lambda: of_optax(descending(optax.clip_by_block_rms(1.0)))),
    "optax centralize": (TENSOR, lambda: of_optax(descending(optax.centralize()))),
    "optax adaptive_grad_clip": (TENSOR, lambda: of_optax(descending(optax.adaptive_grad_clip(0.01)))),
    "optax scale_by_param_block_norm": (TENSOR, lambda: of_optax(descending(optax.scale_by_param_block_norm()))),
    # Elementwise in the parameters, but it keeps for each leaf whether it has met a NaN.
    "optax zero_nans": (TENSOR, lambda: of_optax(descending(optax.zero_nans()))),
    # Its coefficients are an array of the state, which all matrices read.
    "optax muon": (TENSOR, lambda: of_optax(optax.contrib.muon(0.1), (*SHAPES, (4, 6), (6, 4)))),
    # The noise depends on no gradient, but it does on the place of an element and on the shape of its leaf.
    "optax noisy_sgd": (TENSOR, lambda: of_optax(optax.noisy_sgd(0.1, key=0))),
    "optax clip_by_global_norm": (TREE, lambda: of_optax(descending(optax.clip_by_global_norm(1.0)))),
    "optax clip_by_global_norm, scalars": (
        TREE,
        lambda: of_optax(descending(optax.clip_by_global_norm(1.0)), ((), (), ())),
    ),
    "optax apply_if_finite": (TREE, lambda: of_optax(optax.apply_if_finite(optax.adam(0.1), 3))),
    "optax normalize_by_update_norm": (TREE, lambda: of_optax(descending(optax.normalize_by_update_norm()))),
    "optax prodigy": (TREE, lambda: of_optax(optax.contrib.prodigy(0.1))),
    "optax dadapt_adamw": (TREE, lambda: of_optax(optax.contrib.dadapt_adamw(0.1))),
    "optax mechanize": (TREE, lambda: of_optax(optax.contrib.mechanize(optax.adam(0.1)))),
    "optax flatten": (TREE, lambda: of_optax(optax.flatten(optax.lamb(0.1)))),
    "ours sgd": (ELEMENT, lambda: of_ours(optimizers.sgd(0.1))),
    "ours momentum": (ELEMENT, lambda: of_ours(optimizers.momentum(0.1, 0.9))),
    "ours nesterov": (ELEMENT, lambda: of_ours(optimizers.nesterov(0.1, 0.9))),
    "ours adagrad": (ELEMENT, lambda: of_ours(optimizers.adagrad(0.1))),
    "ours rmsprop": (ELEMENT, lambda: of_ours(optimizers.rmsprop(0.1))),
    "ours rmsprop_momentum": (ELEMENT, lambda: of_ours(optimizers.rmsprop_momentum(0.1))),
    "ours adam": (ELEMENT, lambda: of_ours(optimizers.adam(0.1))),
    "ours adamax": (ELEMENT, lambda: of_ours(optimizers.adamax(0.1))),
    "ours sm3": (TENSOR, lambda: of_ours(optimizers.sm3(0.1))),
    "ours adam, scheduled": (
        ELEMENT,
        lambda: of_ours(optimizers.adam(optimizers.piecewise_constant([3, 8], [0.1, 0.05, 0.02]))),
    ),
    "ours adam, clipped": (TREE, lambda: of_ours(optimizers.adam(0.1), max_norm=1.0)),
}
# Coarser than any number shows: what depends on a place is never of the element class.
FINER_BY_NUMBERS = {"optax noisy_sgd": ELEMENT}

every_entry = pytest.mark.parametrize("entry", ENTRIES)


# ---------------------------------------------------------------------------------------------------------------------
# The oracle.


def observed(rule: Rule, update: Callable[[Any, Any], Any]) -> granularity.Granularity:
    """The class that the numbers of a few steps show: at most as coarse as the true one."""
    rng = np.random.default_rng(0)
    params, *pushes = [[np.asarray(rng.normal(size=shape), np.float32) for shape in rule.shapes] for _ in range(4)]
    state = update(pushes.pop(), rule.init([jnp.asarray(leaf) for leaf in params]))
    base = run(update, pushes, state)
    found, reached = ELEMENT, []
    for index, shape in enumerate(rule.shapes):
        place = tuple(length // 2 for length in shape)
        touched = set()
        for grads, start in perturbed(rule, pushes[0], state, index, place):
            for k, changed in enumerate(differing(base, run(update, [grads, *pushes[1:]], start))):
                touched |= {k % (len(base) // len(pushes))} if changed.any() else set()
                changed[place if changed.shape == shape else ...] &= changed.shape != shape
                found = TENSOR if changed.any() else found
        reached.append(touched)
    meet = any(one & other for one, other in itertools.combinations(reached, 2))
    return TREE if meet else found


def run(update: Callable[[Any, Any], Any], pushes: Sequence[Any], state: Any) -> list[np.ndarray]:
    """The numbers of the state after each of some steps, one step after the other. Keys are no numbers."""
    states = []
    for grads in pushes:
        state = update(grads, state)
        states.append(state)
    leaves = jax.tree.leaves(states)
    return [np.asarray(leaf) for leaf in leaves if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]


def perturbed(rule: Rule, grads: Any, state: Any, index: int, place: tuple[int, ...]) -> Iterator[tuple[Any, Any]]:
    """A step with one element of a gradient or of a parameter moved, or not a number."""
    leaves, structure = jax.tree.flatten(state)
    param = jax.tree.leaves(rule.params(state))[index]
    for move in (lambda x: x + 3, lambda x: x * np.nan):
        yield [moved(g, place, move) if k == index else g for k, g in enumerate(grads)], state
        # Where in the state a parameter lies is the business of its rule, so it is known by identity.
        yield grads, jax.tree.unflatten(structure, [moved(x, place, move) if x is param else x for x in leaves])


def moved(array: Any, place: tuple[int, ...], move: Callable[[Any], Any]) -> np.ndarray:
    copy = np.array(array)
    copy[place] = move(copy[place])
    return copy


def differing(before: list[np.ndarray], after: list[np.ndarray]) -> list[np.ndarray]:
    return [np.asarray((a != b) & ((a == a) | (b == b))) for a, b in zip(before, after, strict=True)]


@every_entry
def test_the_numbers_of_an_update_show_the_class_that_its_dataflow_gives(entry):
    expected, make = ENTRIES[entry]
    rule = make()
    assert observed(rule, jax.jit(rule.update)) is FINER_BY_NUMBERS.get(entry, expected)


@every_entry
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_optimizer_has_its_class_in_every_precision(entry, dtype):
    expected, make = ENTRIES[entry]
    assert make().derive(dtype) is expected


# ---------------------------------------------------------------------------------------------------------------------
# Programs made at random: the class is never finer than the numbers show.

POOL_SHAPES = ((2, 3), (3,), ())
UNARY: tuple[Callable[[Any], Any], ...] = (
    jnp.tanh,
    jax.nn.relu,
    lambda x: jnp.cumsum(x).reshape(x.shape),
    jnp.sum,
    lambda x: x * jnp.arange(x.size, dtype=x.dtype).reshape(x.shape),
    lambda x: jnp.flip(x),
    lambda x: x.reshape(x.shape),
    jax.jit(lambda x: x - jnp.max(x)),
    lambda x: x * np.full(x.shape, 2, np.float32),
    jax.jit(lambda x: lax.fori_loop(0, 2, lambda _, y: y * 0.5, x)),
    jax.jit(lambda x: lax.cond(x.ravel()[0] > 0, jnp.sin, jnp.cos, x)),
)
BINARY: tuple[Callable[[Any, Any], Any], ...] = (
    lambda x, y: x * 0.5 + y,
    lambda x, y: jnp.where(y > 0, x, 0.1),
    lambda x, y: x * jnp.mean(y),
)


def program(ops: Sequence[tuple[int, int, int]], outputs: Sequence[int]) -> Rule:
    """Runs `ops` on a pool that holds gradients, parameters, slots and a count, and returns some of what comes out."""

    def update(grads: Any, state: Any) -> Any:
        params, slots, count = state
        pool = [*grads, *params, *slots, count]
        for op, left, right in ops:
            x, y = pool[left % len(pool)], pool[right % len(pool)]
            op %= len(UNARY) + len(BINARY)
            if op < len(UNARY):
                pool.append(UNARY[op](x))
            elif x.shape == y.shape or not y.shape:
                pool.append(BINARY[op - len(UNARY)](x, y))
        picked = iter(outputs)

        def successor(before: Any) -> Any:
            fitting = [value for value in pool if value.shape == before.shape]
            return fitting[-1 - next(picked) % len(fitting)] + before

        moved = [successor(x) - g for x, g in zip(params, grads, strict=True)]
        return moved, [*map(successor, slots)], successor(count)

    return Rule(lambda params: (params, [x * 0.1 for x in params], jnp.ones((), F32)), update, shapes=POOL_SHAPES)


number = st.integers(0, 1000)


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.tuples(number, number, number), max_size=8), st.lists(number, min_size=7, max_size=7))
def test_the_class_is_never_finer_than_the_numbers_of_a_random_update_show(ops, outputs):
    rule = program(ops, outputs)
    order = [ELEMENT, TENSOR, TREE]
    assert order.index(observed(rule, rule.update)) <= order.index(rule.derive())


# ---------------------------------------------------------------------------------------------------------------------
# Updates made for one question each. Their state is the list of parameters unless they say otherwise.


def derive(update: Callable[[Any, Any], Any], *shapes: tuple[int, ...], state: Any = None) -> granularity.Granularity:
    leaves = [jax.ShapeDtypeStruct(shape, F32) for shape in shapes]
    return granularity.derive(update, leaves, leaves if state is None else state)


def each(function: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """Every leaf on its own, its gradient changed by `function`."""
    return lambda grads, params: [x - function(g) for g, x in zip(grads, params, strict=True)]


def scalar(dtype: Any = F32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), dtype)


@jax.custom_jvp
def doubled(x):
    return x * 2


doubled.defjvp(lambda primals, tangents: (doubled(*primals), tangents[0]))


@jax.custom_vjp
def halved(x):
    return x / 2


halved.defvjp(lambda x: (halved(x), None), lambda _, cotangent: (cotangent,))


@pytest.mark.parametrize(
    "function",
    [
        jnp.sort,
        lax.cumsum,
        jnp.flip,
        lambda g: g.T,
        lambda g: g.T.T,
        lambda g: g.reshape(-1).reshape(g.shape),
        lambda g: lax.reshape(g, g.shape, dimensions=(1, 0)),
        lambda g: g @ g,
        lambda g: jnp.linalg.inv(g + jnp.eye(4)),
        lambda g: g / jnp.linalg.norm(g),
        lambda g: g - g[0],
        lambda g: g + jnp.sum(g, axis=0),
        lambda g: jax.pure_callback(np.sin, jax.ShapeDtypeStruct(g.shape, F32), g),
        lambda g: lax.fori_loop(0, 3, lambda _, y: y * 0.5, g),
        lambda g: lax.scan(lambda y, _: (y * 0.5, None), g, length=3)[0],
        lambda g: jax.jit(lambda y: y / jnp.max(y))(g),
        lambda g: lax.cond(jnp.sum(g) > 0, jnp.sin, jnp.cos, g),
        lambda g: lax.bitcast_convert_type(lax.bitcast_convert_type(g, jnp.uint8), F32),
    ],
)
def test_what_is_not_known_to_be_elementwise_needs_the_tensor(function):
    assert derive(each(function), (4, 4), (4, 4)) is TENSOR


@pytest.mark.parametrize(
    "function",
    [
        jax.jit(jnp.tanh),
        jax.checkpoint(jnp.sin),
        jax.nn.relu,
        doubled,
        halved,
        lambda g: lax.clamp(-1.0, g, 1.0),
        lambda g: jnp.where(g > 0, g**3, jnp.sign(g) * 2.0),
        lambda g: jnp.nan_to_num(g).astype(jnp.bfloat16).astype(F32),
        lambda g: jnp.abs(lax.complex(g, -g)),
        lambda g: lax.bitcast_convert_type(lax.bitcast_convert_type(g, jnp.uint32) ^ 1, F32),
        lambda g: lax.stop_gradient(g).reshape(g.shape).transpose(0, 1)[:, :],
        lambda g: g + jnp.ones((4,))[:, None] * jnp.zeros_like(g),
        lambda g: g * np.full((4, 4), 3, np.float32),
    ],
)
def test_elementwise_functions_stay_so_however_they_are_wrapped(function):
    assert derive(each(function), (4, 4), (4, 4)) is ELEMENT


@pytest.mark.parametrize(
    "function",
    [
        lambda g: g * jnp.arange(4.0),
        lambda g: g * lax.broadcasted_iota(F32, (4, 4), 0),
        lambda g: g * np.arange(16, dtype=np.float32).reshape(4, 4),
        lambda g: g.at[0, 0].set(0.0),
        lambda g: jnp.triu(g),
        lambda g: g * lax.bitcast_convert_type(jnp.uint32(7), jnp.uint8).astype(F32),
    ],
)
def test_what_depends_on_the_place_of_an_element_needs_the_tensor(function):
    assert derive(each(function), (4, 4), (4, 4)) is TENSOR


def test_a_place_counts_in_a_leaf_of_one_element_too():
    """Such a leaf would be laid end to end with others, and its element would no longer be the first."""
    assert derive(each(lambda g: g * jnp.arange(1.0)), (1,), (1,)) is TENSOR
    assert derive(each(jnp.tanh), (1,), (1, 1), ()) is ELEMENT


def test_a_reduction_of_a_leaf_of_shape_nothing_is_still_a_reduction():
    assert derive(each(lambda g: g / jnp.linalg.norm(g)), (), ()) is TENSOR


def test_an_unknown_primitive_over_several_leaves_ties_them():
    def update(grads, params):
        shapes = [jax.ShapeDtypeStruct(g.shape, F32) for g in grads]
        return each(lambda g: g)(jax.pure_callback(lambda *gs: gs, tuple(shapes), *grads), params)

    assert derive(update, (3,), (2,)) is TREE


def test_leaves_laid_end_to_end_are_tied():
    def update(grads, params):
        flat = jnp.concatenate(grads) * 0.1
        return [params[0] - flat[:3], params[1] - flat[3:]]

    assert derive(update, (3,), (2,)) is TREE


def test_a_leaf_of_one_element_can_tie_others():
    def update(grads, params):
        return [params[0] - grads[0], params[1] - grads[1] * params[0]]

    for shape in ((), (1,)):
        assert derive(update, shape, (3,)) is TREE


@pytest.mark.parametrize(
    ("predicate", "expected"),
    [
        (lambda grads, count: count > 3, ELEMENT),
        (lambda grads, count: jnp.sum(grads[0]) > 0, TREE),
        (lambda grads, count: optax.tree.norm(grads) > count, TREE),
    ],
)
def test_a_predicate_ties_what_it_decides_over_to_what_it_looks_at(predicate, expected):
    def update(grads, state):
        params, count = state
        moved = lax.cond(
            predicate(grads, count), lambda gs: [-g for g in gs], lambda gs: [jnp.zeros_like(g) for g in gs], grads
        )
        return [x + u for x, u in zip(params, moved, strict=True)], count + 1

    leaves = [jax.ShapeDtypeStruct(shape, F32) for shape in SHAPES]
    assert derive(update, *SHAPES, state=(leaves, scalar())) is expected


def test_the_coarsest_branch_of_a_cond_counts():
    def update(grads, state):
        params, count = state
        return [
            x - lax.switch(count, [jnp.sin, jnp.sort, jnp.cos], g) for g, x in zip(grads, params, strict=True)
        ], count

    leaves = [jax.ShapeDtypeStruct((3,), F32)] * 2
    assert derive(update, (3,), (3,), state=(leaves, scalar(jnp.int32))) is TENSOR


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (lambda grads, s: s * 0.9 + 1.0, ELEMENT),
        (lambda grads, s: jnp.interp(s, jnp.arange(3.0), jnp.ones(3)), ELEMENT),
        (lambda grads, s: s + jnp.sum(grads[0]), TREE),
        (lambda grads, s: s + grads[2], TREE),
        (lambda grads, s: s + optax.tree.norm(grads), TREE),
    ],
)
def test_a_scalar_of_the_state_is_free_until_it_looks_at_a_leaf(scale, expected):
    def update(grads, state):
        params, s = state
        return [x - s * g for g, x in zip(grads, params, strict=True)], scale(grads, s)

    leaves = [jax.ShapeDtypeStruct(shape, F32) for shape in SHAPES]
    assert derive(update, *SHAPES, state=(leaves, scalar())) is expected


def test_a_scalar_is_not_free_if_another_that_it_follows_is_not():
    def update(grads, state):
        params, first, second, third = state
        params = [params[0] - grads[0] * first, params[1] - grads[1]]
        return params, second, third, third + jnp.sum(grads[1])

    leaves = [jax.ShapeDtypeStruct((3,), F32)] * 2
    assert derive(update, (3,), (3,), state=(leaves, scalar(), scalar(), scalar())) is TREE


def test_a_scalar_that_looks_at_one_leaf_only_belongs_to_that_leaf():
    def update(grads, state):
        params, s = state
        return [params[0] - grads[0] * s, params[1] - grads[1]], s + jnp.sum(grads[0])

    leaves = [jax.ShapeDtypeStruct((3,), F32)] * 2
    assert derive(update, (3,), (3,), state=(leaves, scalar())) is TENSOR


def test_noise_from_a_key_of_the_state_needs_the_tensor_and_no_more():
    def update(grads, state):
        params, key = state
        key, *keys = jax.random.split(key, len(grads) + 1)
        noise = [jax.random.normal(k, g.shape) for k, g in zip(keys, grads, strict=True)]
        return [x - g - n for x, g, n in zip(params, grads, noise, strict=True)], key

    leaves = [jax.ShapeDtypeStruct(shape, F32) for shape in SHAPES]
    for make in (jax.random.key, jax.random.PRNGKey):  # A scalar, and an array of two numbers.
        assert derive(update, *SHAPES, state=(leaves, jax.eval_shape(make, 0))) is TENSOR


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda g, table: g, ELEMENT),
        (lambda g, table: g * table, TENSOR),
        (lambda g, table: g * table[0], TENSOR),
        (lambda g, table: jnp.polyval(table, g), TENSOR),
    ],
)
def test_an_array_of_the_state_that_no_gradient_reaches_may_be_read_by_whole_tensors(read, expected):
    """As Muon's coefficients are. Cut with the elements of one leaf, it could not be cut with those of another."""

    def update(grads, state):
        params, table = state
        return each(lambda g: read(g, table))(grads, params), table * 2

    leaves = [jax.ShapeDtypeStruct((3,), F32)] * 2
    assert derive(update, (3,), (3,), state=(leaves, leaves[0])) is expected


def test_an_element_of_an_array_is_no_free_scalar():
    def update(grads, state):
        (x,), table = state
        return [x - grads[0] * table[0]], table

    leaves = [jax.ShapeDtypeStruct((3,), F32)]
    assert derive(update, (3,), state=(leaves, leaves[0])) is TENSOR


def test_an_array_that_one_leaf_alone_reads_is_cut_along_with_it():
    def update(grads, state):
        params, mask = state
        return [params[0] - grads[0] * mask, params[1] - grads[1]], mask

    leaves = [jax.ShapeDtypeStruct((3,), F32)] * 2
    assert derive(update, (3,), (3,), state=(leaves, leaves[0])) is ELEMENT


def test_an_array_of_the_state_that_a_gradient_reaches_ties_all_that_read_it():
    def update(grads, state):
        params, table = state
        return each(lambda g: g * table)(grads, params), table + grads[0]

    leaves = [jax.ShapeDtypeStruct((3,), F32)] * 2
    assert derive(update, (3,), (3,), state=(leaves, leaves[0])) is TREE


def test_in_a_tree_of_one_leaf_a_global_norm_is_that_leafs_own():
    assert of_optax(descending(optax.clip_by_global_norm(1.0)), ((6, 4),)).derive() is TENSOR
    assert of_optax(descending(optax.clip_by_global_norm(1.0)), ((),)).derive() is TENSOR


def test_a_tree_without_leaves_has_nothing_that_could_be_tied():
    assert derive(lambda grads, count: count + 1, state=scalar()) is ELEMENT


def test_a_leaf_that_stands_still_is_no_obstacle():
    for still in ((2,), ()):
        assert derive(lambda grads, params: [params[0] - grads[0], params[1] * 0.9], (3,), still) is ELEMENT


def test_a_leaf_that_stands_still_is_not_read_by_others():
    assert derive(lambda grads, params: [params[0] - jnp.sum(params[1]), params[1]], (3,), (2,)) is TREE
    for still in ((2,), ()):
        assert derive(lambda grads, params: [params[0] - grads[0] * jnp.max(params[1]), params[1]], (3,), still) is TREE


def test_a_leaf_without_a_gradient_that_follows_another_is_tied_to_it():
    assert derive(lambda grads, params: [params[0] - grads[0], params[1] + params[0]], (3,), (3,)) is TREE


def test_slots_tie_leaves_as_parameters_do():
    def update(grads, state, order):
        params, slots = state
        slots = [slots[k] + g for k, g in zip(order, grads, strict=True)]
        return [x - m for x, m in zip(params, slots, strict=True)], slots

    leaves = [jax.ShapeDtypeStruct((3,), F32)] * 2
    assert derive(functools.partial(update, order=(0, 1)), (3,), (3,), state=(leaves, leaves)) is ELEMENT
    assert derive(functools.partial(update, order=(1, 0)), (3,), (3,), state=(leaves, leaves)) is TREE


def test_state_may_list_its_leaves_in_an_order_of_its_own():
    assert derive(lambda grads, params: [params[0] - grads[1], params[1] - grads[0]], (3,), (3,)) is ELEMENT


def test_what_has_effects_is_not_cut():
    def printing(grads, params):
        jax.debug.callback(lambda _: None, grads[0])
        return each(jnp.tanh)(grads, params)

    def hoarding(grads, params):
        shared = jax.new_ref(grads[0])
        shared[...] += grads[1]
        return [params[0] - shared[...], params[1] - grads[1]]

    assert derive(printing, (3,), (3,)) is TREE
    assert derive(hoarding, (3,), (3,)) is TREE
    assert derive(jax.jit(hoarding), (3,), (3,)) is TREE


def test_an_update_that_returns_another_structure_is_refused():
    with pytest.raises(TypeError, match="update: returned the structure"):
        derive(lambda grads, params: tuple(params), (3,))


def test_an_update_that_returns_other_shapes_is_refused():
    with pytest.raises(TypeError, match=r"update: array 1 of the state came back in shape \(4,\), expected \(4, 4\)"):
        derive(lambda grads, params: [params[0], params[1][0]], (3,), (4, 4))


def test_a_hundred_and_fifty_leaves_take_less_than_a_second():
    rule = of_optax(optax.adam(0.1), ((64, 64), (64,)) * 75)
    rule.derive()
    begin = time.process_time()
    assert rule.derive() is ELEMENT
    assert time.process_time() - begin < 1
