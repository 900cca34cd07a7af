"""Optimizer states as trees, as marked trees, and as named tensors that go to a file and come back, without pickle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optwire_server import optimizers

OPTIMIZERS = {
    "sgd": optimizers.sgd(0.1),
    "momentum": optimizers.momentum(0.1, 0.9),
    "adam": optimizers.adam(optimizers.exponential_decay(0.1, 7, 0.6)),
    "sm3": optimizers.sm3(0.1),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def params_of(seed_number):
    def leaf(*shape, dtype=jnp.float32):
        return jnp.asarray(np.random.default_rng([seed_number, *shape]).standard_normal(shape), dtype)

    return {
        "dense": [leaf(2, 3), leaf(3, dtype=jnp.bfloat16)],
        "odd/name.%": (leaf(dtype=jnp.float16), None, leaf(0)),
        "tail": {0: leaf(1, 2, 2, dtype=jnp.bfloat16)},
    }


def bits(tree):
    return [(np.asarray(x).dtype, np.shape(x), np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def trained(optimizer, opt_state, steps):
    update = jax.jit(optimizer.update_fn)
    for i in steps:
        opt_state = update(i, params_of(i + 1), opt_state)
    return opt_state


@every_optimizer
def test_a_state_is_a_tree(name):
    optimizer = OPTIMIZERS[name]
    opt_state = optimizer.init_fn(params_of(0))
    doubled = jax.tree.map(lambda x: 2 * x, opt_state)
    assert isinstance(doubled, optimizers.OptimizerState)
    assert jax.tree.structure(doubled) == jax.tree.structure(opt_state)
    assert doubled._fields == ("packed_state", "tree_def", "subtree_defs")
    assert bits(jax.jit(optimizer.params_fn)(doubled)) == bits(jax.tree.map(lambda x: 2 * x, params_of(0)))
    assert hash(jax.tree.structure(opt_state)) == hash(jax.tree.structure(doubled))


@every_optimizer
@pytest.mark.parametrize("params", [params_of(0), jnp.ones(3), {}], ids=["tree", "array", "empty"])
def test_unpack_and_pack_are_inverse(name, params):
    opt_state = OPTIMIZERS[name].init_fn(params)
    marked = optimizers.unpack_optimizer_state(opt_state)
    marks = jax.tree.leaves(marked)
    assert len(marks) == len(jax.tree.leaves(params))
    assert all(isinstance(mark, optimizers.JoinPoint) for mark in marks)
    assert all(list(mark) == [mark.subtree] for mark in marks)
    packed = optimizers.pack_optimizer_state(marked)
    assert jax.tree.structure(packed) == jax.tree.structure(opt_state)
    assert all(ours is theirs for ours, theirs in zip(*map(jax.tree.leaves, (packed, opt_state)), strict=True))
    assert packed == opt_state


def test_only_marked_trees_are_packed():
    with pytest.raises(TypeError, match="a leaf of the marked tree is a float, not a JoinPoint"):
        optimizers.pack_optimizer_state({"a": optimizers.JoinPoint(1.0), "b": 2.0})


def test_names_of_tensors():
    params = {"a": [1.0, jnp.ones((2, 3))], "odd/name.%": jnp.ones(())}
    names = {name: list(optimizers.state_to_tensors(OPTIMIZERS[name].init_fn(params))) for name in OPTIMIZERS}
    assert names["sgd"] == ["a/0/0", "a/1/0", "odd%2Fname%2E%25/0"]
    assert names["momentum"][:4] == ["a/0/0", "a/0/1", "a/1/0", "a/1/1"]
    assert names["sm3"][3:7] == ["a/1/0", "a/1/1", "a/1/2.0", "a/1/2.1"]
    assert list(optimizers.state_to_tensors(OPTIMIZERS["adam"].init_fn(jnp.ones(2)))) == ["0", "1", "2"]
    assert optimizers.state_to_tensors(OPTIMIZERS["adam"].init_fn({})) == {}


def test_tensors_are_the_arrays_themselves():
    opt_state = OPTIMIZERS["adam"].init_fn(params_of(0))
    tensors = optimizers.state_to_tensors(opt_state)
    assert all(a is b for a, b in zip(tensors.values(), jax.tree.leaves(opt_state), strict=True))


@every_optimizer
def test_a_saved_state_goes_on_with_the_same_bits(name, tmp_path):
    optimizer = OPTIMIZERS[name]
    opt_state = trained(optimizer, optimizer.init_fn(params_of(0)), range(3))
    np.savez(tmp_path / "state.npz", **optimizers.state_to_tensors(opt_state))

    like = jax.eval_shape(optimizer.init_fn, params_of(0))
    with np.load(tmp_path / "state.npz", allow_pickle=False) as tensors:
        loaded = optimizers.state_from_tensors(tensors, like)
    assert jax.tree.structure(loaded) == jax.tree.structure(opt_state)
    assert bits(loaded) == bits(opt_state)
    assert bits(trained(optimizer, loaded, range(3, 6))) == bits(trained(optimizer, opt_state, range(3, 6)))


def test_a_saved_float64_state_stays_so():
    optimizer = OPTIMIZERS["adam"]
    opt_state = optimizer.init_fn({"w": np.ones(3)})
    loaded = optimizers.state_from_tensors(optimizers.state_to_tensors(opt_state), opt_state)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype(np.float64)}


def test_tensors_that_do_not_fit_are_all_named():
    like = jax.eval_shape(OPTIMIZERS["momentum"].init_fn, {"a": jnp.ones(2), "b": jnp.ones(3, jnp.bfloat16)})
    tensors = {
        "a/0": np.ones(2, np.float32),
        "a/1": np.ones(2, np.float64),
        "b/0": np.ones((3, 1), jnp.bfloat16),
        "c/0": np.ones(2, np.float32),
    }
    with pytest.raises(optimizers.StateTensorsError) as error:
        optimizers.state_from_tensors(tensors, like)
    assert error.value.missing == ("b/1",)
    assert error.value.extra == ("c/0",)
    assert error.value.misshaped == ("b/0",)
    assert error.value.mistyped == ("a/1",)
    assert str(error.value) == (
        "tensors do not match the optimizer state: missing: 'b/1'; extra: 'c/0'; "
        "of another shape: 'b/0'; of another dtype: 'a/1'"
    )


@pytest.mark.parametrize("tensor", [np.ones(3, np.uint16), np.ones(3, np.float16), np.zeros(3, "V4"), [1.0, 2.0, 3.0]])
def test_only_raw_bytes_are_taken_for_another_dtype(tensor):
    like = jax.eval_shape(OPTIMIZERS["sgd"].init_fn, jnp.ones(3, jnp.bfloat16))
    with pytest.raises(optimizers.StateTensorsError, match="of another dtype: '0'"):
        optimizers.state_from_tensors({"0": tensor}, like)


def test_raw_bytes_are_not_taken_for_a_dtype_numpy_has():
    like = jax.eval_shape(OPTIMIZERS["sgd"].init_fn, jnp.ones(3, jnp.float16))
    with pytest.raises(optimizers.StateTensorsError, match="of another dtype: '0'"):
        optimizers.state_from_tensors({"0": np.zeros(3, "V2")}, like)


@jax.tree_util.register_pytree_with_keys_class
class Twins:
    """A container whose two children have the same key."""

    def __init__(self, *children):
        self.children = children

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey("same"), child) for child in self.children], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_two_arrays_of_one_name_are_refused():
    with pytest.raises(ValueError, match="both named 'same/0'"):
        optimizers.state_to_tensors(OPTIMIZERS["sgd"].init_fn(Twins(1.0, 2.0)))
