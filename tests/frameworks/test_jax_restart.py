"""A JAX loop that goes on in another session, from a copy of the state, as docs/frameworks.md says."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optwire
import optwire.jax
from optwire import optax as remote_optax

X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)
SPEC = remote_optax.adamw(0.01)


def trained(tx: Any, params: Any, opt_state: Any, steps: int) -> tuple[Any, Any]:
    @jax.jit
    def step(params: Any, opt_state: Any) -> tuple[Any, Any]:
        grads = jax.grad(lambda params: jnp.mean((X @ params["w"] + params["b"] - 1) ** 2))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(steps):
        params, opt_state = step(params, opt_state)
    return params, opt_state


def test_a_copy_of_the_state_goes_on_in_another_session(client: optwire.Client) -> None:
    params = {"w": jnp.ones(3), "b": jnp.zeros(())}
    session = optwire.jax.create_session(client, params, SPEC)
    tx = optwire.jax.transformation(session)
    params, opt_state = trained(tx, params, tx.init(params), 5)
    state = session.state()
    expected, _ = trained(tx, params, opt_state, 5)

    session = optwire.jax.create_session(client, params, SPEC)
    session.load_state(state)
    tx = optwire.jax.transformation(session)
    again, opt_state = trained(tx, params, tx.init(params), 5)
    assert int(opt_state.step) == 10
    for name in expected:
        assert np.asarray(again[name]).tobytes() == np.asarray(expected[name]).tobytes()
