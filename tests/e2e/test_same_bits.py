"""Promise 1, the same numbers: remote parameters are those of the jitted update run locally, bit for bit.

The oracle is ``jax.example_libraries.optimizers``, which the product never imports.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from jax.example_libraries import optimizers as seed

import optwire
from optwire import optimizers as opt

STEPS = 50

OPTIMIZERS: dict[str, tuple[Any, ...]] = {
    "sgd": (),
    "momentum": (0.9,),
    "nesterov": (0.9,),
    "adagrad": (),
    "rmsprop": (),
    "rmsprop_momentum": (),
    "adam": (),
    "adamax": (),
    "sm3": (),
}
RATES: dict[str, tuple[Any, ...]] = {
    "scalar": (),
    "constant": (1e-2,),
    "exponential_decay": (1e-2, 10, 0.9),
    "inverse_time_decay": (1e-2, 10, 0.9),
    "inverse_time_decay staircase": (1e-2, 10, 0.9, True),
    "polynomial_decay": (1e-2, 30, 1e-4),
    "piecewise_constant": ([10, 25], [1e-2, 1e-3, 1e-4]),
}


def rate_of(module: Any, name: str) -> Any:
    return 1e-2 if name == "scalar" else getattr(module, name.split()[0])(*RATES[name])


def tree(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
    def array(*shape: int) -> np.ndarray:
        return np.asarray(rng.standard_normal(shape), dtype)

    # sm3 keeps one vector a dimension, so the seed's has no answer for arrays of shape ().
    return {"dense": {"kernel": array(7, 5), "bias": array(5)}, "conv": [array(3, 2, 2), array(1), (array(129),)]}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fifty_remote_steps_equal_the_jitted_seed(client: optwire.Client, optimizer: str, rate: str) -> None:
    rng = np.random.default_rng(7)
    params = tree(rng, np.float32)
    grads = [tree(rng, np.float32) for _ in range(5)]
    init, update, get_params = getattr(seed, optimizer)(rate_of(seed, rate), *OPTIMIZERS[optimizer])
    update = jax.jit(update)
    state = init(params)
    name = f"same-{optimizer}-{rate.replace(' ', '-')}"
    spec = getattr(opt, optimizer)(rate_of(opt, rate), *OPTIMIZERS[optimizer])
    with client.create_session(params, spec, name=name) as session:
        for step in range(STEPS):
            state = update(step, grads[step % 5], state)
            remote = session.step(grads[step % 5])
        assert session.step_count == STEPS
    client.delete_session(name)
    same_bits(remote, get_params(state))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sixteen_bit_parameters_keep_their_type_and_bits(client: optwire.Client, optimizer: str, dtype: str) -> None:
    rng = np.random.default_rng(8)
    params = tree(rng, jax.numpy.dtype(dtype))
    grads = [tree(rng, jax.numpy.dtype(dtype)) for _ in range(5)]
    # The default b2 is 1 in bfloat16: the seed's parameters stay where they are, and the server refuses.
    arguments = (0.9, 0.98) if optimizer == "adam" else OPTIMIZERS[optimizer]
    for rate in ("scalar", "exponential_decay"):
        init, update, get_params = getattr(seed, optimizer)(rate_of(seed, rate), *arguments)
        update = jax.jit(update)
        state = init(params)
        name = f"same-{optimizer}-{dtype}-{rate}"
        spec = getattr(opt, optimizer)(rate_of(opt, rate), *arguments)
        with client.create_session(params, spec, name=name) as session:
            for step in range(20):
                state = update(step, grads[step % 5], state)
                remote = session.step(grads[step % 5])
        client.delete_session(name)
        same_bits(remote, get_params(state))


def test_adam_is_refused_where_it_would_never_move_a_parameter(client: optwire.Client) -> None:
    params = {"w": jax.numpy.ones(3, jax.numpy.bfloat16)}
    init, update, get_params = seed.adam(1e-1)
    moved = get_params(update(0, params, init(params)))["w"]
    assert (np.asarray(moved) == 1).all(), "the seed has mended it; so may we"
    with pytest.raises(optwire.SpecError, match=r"adam\.b2: 0\.999 rounds to 1 in bf16"):
        client.create_session(params, opt.adam(1e-1), name="never-moves")


def test_clipping_by_global_norm_equals_the_jitted_seed_but_for_the_sum_of_squares(client: optwire.Client) -> None:
    """The seed rounds the sum at each leaf, which no block can: ours is rounded once; all else is the same."""
    rng = np.random.default_rng(9)
    params, grads = tree(rng, np.float32), tree(rng, np.float32)
    init, update, get_params = seed.adam(1e-2)
    norm = np.sqrt(np.float32(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(grads))))
    np.testing.assert_array_max_ulp(norm, np.float32(seed.l2_norm(grads)), 1)

    @jax.jit
    def clipped(i: int, g: Any, s: Any, norm: Any) -> Any:
        return update(i, jax.tree.map(lambda x: jax.numpy.where(norm < 0.5, x, x * (0.5 / norm)), g), s)

    state = init(params)
    with client.create_session(params, opt.chain(opt.clip_grads(0.5), opt.adam(1e-2)), name="same-clip") as session:
        for step in range(STEPS):
            state = clipped(step, grads, state, norm)
            remote = session.step(grads)
    client.delete_session("same-clip")
    same_bits(remote, get_params(state))


def test_a_learning_rate_set_by_hand_gives_the_bits_of_an_optimizer_made_with_it(client: optwire.Client) -> None:
    rng = np.random.default_rng(10)
    params, grads = tree(rng, np.float32), tree(rng, np.float32)
    spec = opt.adam(opt.exponential_decay(1e-2, 10, 0.9))
    before, after = (seed.adam(rate) for rate in (seed.exponential_decay(1e-2, 10, 0.9), 3e-3))
    state = before.init_fn(params)
    with client.create_session(params, spec, name="same-rate") as session:
        for step in range(20):
            if step == 10:
                assert session.set_hyperparams(learning_rate=3e-3) == 10
            state = jax.jit((before if step < 10 else after).update_fn)(step, grads, state)
            remote = session.step(grads)
        assert session.last_ack is not None
        assert session.last_ack.learning_rate == 3e-3
        assert not session.info().learning_rate_scheduled
    client.delete_session("same-rate")
    same_bits(remote, after.params_fn(state))


def test_float64_is_computed_in_float64_beside_float32_sessions(client: optwire.Client) -> None:
    rng = np.random.default_rng(11)
    params, grads = {"w": rng.standard_normal(50)}, {"w": rng.standard_normal(50)}
    narrow = {"w": params["w"].astype(np.float32)}, {"w": grads["w"].astype(np.float32)}
    with jax.enable_x64(True):
        init, update, get_params = seed.adam(1e-2)
        state, update = init(params), jax.jit(update)
        for step in range(20):
            state = update(step, grads, state)
        wide_expected = get_params(state)
    init, update, get_params = seed.adam(1e-2)
    state, update = init(narrow[0]), jax.jit(update)
    wide = client.create_session(params, opt.adam(1e-2), name="wide")
    slim = client.create_session(narrow[0], opt.adam(1e-2), name="slim")
    for step in range(20):
        state = update(step, narrow[1], state)
        wide_remote, slim_remote = wide.step(grads), slim.step(narrow[1])
    for session in (wide, slim):
        session.close()
        client.delete_session(session.name)
    assert wide_remote["w"].dtype == np.float64
    same_bits(wide_remote, wide_expected)
    same_bits(slim_remote, get_params(state))


def same_bits(remote: Any, local: Any) -> None:
    """Asserts equal structure, dtypes and bytes."""
    assert jax.tree.structure(remote) == jax.tree.structure(local)
    for ours, theirs in zip(jax.tree.leaves(remote), map(np.asarray, jax.tree.leaves(local)), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert ours.tobytes() == theirs.tobytes()
