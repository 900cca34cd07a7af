"""Names of the arrays of a state: unique, valid, stable, and of the leaf that they say."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tests.e2e import catalogue_samples

from optwire_proto import checks, spec_text, tensors, trees
from optwire_server.engine import build, rates, rule, slots

SAMPLED = sorted(catalogue_samples.entries() - {"exported"})
LEAVES = {"a": (3,), "b/kernel": (4, 6), "c": (), "d": (0, 2), "e": (5,)}


def built(spec: Any, leaves: dict[str, tuple[int, ...]]) -> rule.Rule:
    checked = checks.check(spec, known=build.CATALOGUE)
    site = build.Site(tuple(trees.LeafSpec(name, shape, "f32") for name, shape in leaves.items()), rates.rates(checked))
    return build.build(checked, site)


def named(spec: Any, leaves: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Abstract arrays of the first state by name."""
    if isinstance(spec, str):
        spec = spec_text.parse(spec, build.CATALOGUE)
    made = built(spec, leaves)
    state = jax.eval_shape(made.init, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in leaves.values()])
    return dict(zip(slots.names(state, made.params, list(leaves)), jax.tree.leaves(state), strict=True))


@pytest.mark.parametrize("entry", SAMPLED)
def test_every_entry_of_the_catalogue_has_names(entry: str):
    sample = catalogue_samples.sample(entry, "float32")
    flat = trees.flatten(jax.tree.map(np.zeros, sample.shapes, is_leaf=lambda node: isinstance(node, tuple)))
    leaves = {leaf.name: leaf.shape for leaf in flat.spec.leaves}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        arrays = named(sample.spec, leaves)
    tree = trees.TreeSpec(tuple(trees.LeafSpec(name, (), "f32") for name in arrays))  # valid, each there once
    assert {f"params/{name}" for name in leaves} <= {leaf.name for leaf in tree.leaves}
    for name in arrays:
        slot, _, rest = name.partition("/")
        assert slot == "state" or rest in leaves, name


@pytest.mark.parametrize(
    "spec",
    [
        "adam(0.1)",
        "sm3(0.1)",
        "optax.adam(0.1)",
        "optax.adafactor(0.1)",
        "chain(clip_by_global_norm(1.0), trace(0.9), optax.adam(0.1))",
        "partition({'a': optax.adam(0.1), '**': optax.sgd(0.1, momentum=0.5)})",
        "partition({'a': momentum(0.1, 0.9), 'b/**': adam(0.1), '**': optax.adam(0.1)})",
        "accumulate(ema_params(on_nonfinite(optax.adam(0.1), 'skip'), 0.9), 2)",
        "per_leaf(torch_adamw(0.1))",
        "per_leaf(optax.adam(0.1))",
    ],
)
def test_a_leaf_more_changes_no_name_of_the_others(spec: str):
    """Whatever its place in the tree: an extension finds what it takes over by name."""
    fewer = {name: LEAVES[name] for name in ("a", "b/kernel", "c")}
    before = named(spec, fewer)
    for more in ({**fewer, "z": (2,)}, {"A": (2,), **fewer}, LEAVES, dict(reversed(LEAVES.items()))):
        after = named(spec, more)
        assert {name: (after[name].shape, after[name].dtype) for name in before} == {
            name: (array.shape, array.dtype) for name, array in before.items()
        }
        assert not [name for name in after.keys() - before.keys() if name.endswith(("/a", "/b/kernel", "/c"))]


ALONE = [  # what treats every leaf by itself
    "adam(0.1)",
    "sm3(0.1)",
    "optax.adam(0.1)",
    "optax.adafactor(0.1, min_dim_size_to_factor=2)",
    "chain(trace(0.9), optax.adam(0.1))",
    "partition({'e': optax.adam(0.1), '**': optax.sgd(0.1, momentum=0.5)})",
    "partition({'e': momentum(0.1, 0.9), 'a': adam(0.1), '**': optax.adam(0.1)})",
    "ema_params(accumulate(optax.adam(0.1), 2), 0.9)",
    "lookahead(optax.sgd(0.1), 2, 0.5)",
    "per_leaf(torch_adamw(0.1))",
    "per_leaf(adam(0.1))",
    "grouped([1, 0, 1, 0, 1], per_leaf(torch_adamw(0.1)), per_leaf(torch_sgd(0.1, momentum=0.9)))",
]


@pytest.mark.parametrize("spec", ALONE)
@pytest.mark.parametrize("leaf", ["a", "b/kernel", "c", "e"])
def test_an_array_that_has_the_name_of_a_leaf_hears_of_no_other(spec: str, leaf: str):
    """One leaf has another gradient: of the arrays, exactly its own may differ, and some do."""
    made = built(spec_text.parse(spec, build.CATALOGUE), LEAVES)
    params = [jnp.ones(shape, jnp.float32) for shape in LEAVES.values()]
    grads = [jnp.full(shape, 0.5, jnp.float32) for shape in LEAVES.values()]
    other = [g * 3 if name == leaf else g for name, g in zip(LEAVES, grads, strict=True)]
    state = made.init(params)
    found = slots.names(state, made.params, list(LEAVES))
    one, two = (made.update(g, state, rule.Call(0)) for g in (grads, other))
    pairs = zip(found, jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    differing = {name for name, x, y in pairs if not np.array_equal(x, y)}
    assert differing
    assert all(name.partition("/")[2] == leaf for name in differing)


def test_names_that_optimizers_think_of_never_meet_ours():
    kept = {"params": [1.0, 1.0], "state": [1.0, 1.0], "skipped": 1.0, "a/b": 1.0, "..": [1.0, 1.0], "": 1.0}
    transformation = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.asarray, kept), lambda grads, state, params=None: (grads, state)
    )
    made = rule.of_transformation(transformation)
    state = jax.eval_shape(made.init, [jnp.zeros(()), jnp.zeros(())])
    found = slots.names(state, made.params, ["x", "y"])
    assert [name for name, count in Counter(found).items() if count > 1] == []
    assert {"params/x", "params/y"} <= set(found)
    assert "state/skipped" not in found
    trees.TreeSpec(tuple(trees.LeafSpec(name, (), "f32") for name in found))


def test_keys_of_randomness_travel_as_numbers_and_come_back():
    key = jax.random.key(7)
    array = slots.to_numpy(key)
    assert (array.shape, array.dtype) == ((2,), np.uint32)
    assert slots.leaf_specs(jax.eval_shape(lambda: key), ["state/key"]) == (
        trees.LeafSpec("state/key", (2,), tensors.dtype_name(array.dtype) or ""),
    )
    back = slots.from_numpy(array, jax.random.key(0))
    assert back.dtype == key.dtype
    assert np.array_equal(jax.random.normal(back, (3,)), jax.random.normal(key, (3,)))
