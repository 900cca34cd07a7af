"""Equinox: a loop under eqx.filter_jit, and a checkpoint of its leaves.

python equinox_loop.py FOLDER 20    # stops after 20 steps
python equinox_loop.py FOLDER 40    # goes on from there
"""

import pathlib
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

STEPS, RATE = 40, 1e-2


def loss_of(model: eqx.nn.MLP, x: jax.Array) -> jax.Array:
    return jnp.mean((jax.vmap(model)(x)[:, 0] - jnp.sin(x).sum(1)) ** 2)


@eqx.filter_jit
def train_step(model: eqx.nn.MLP, opt_state: Any, tx: Any, x: jax.Array) -> tuple[eqx.nn.MLP, Any, jax.Array]:
    loss, grads = eqx.filter_value_and_grad(loss_of)(model, x)
    updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, updates), opt_state, loss


def train(folder: pathlib.Path, until: int = STEPS) -> eqx.nn.MLP:
    folder.mkdir(parents=True, exist_ok=True)
    model = eqx.nn.MLP(8, 1, 32, 2, key=jax.random.key(0))
    checkpoint = folder / "checkpoint.eqx"
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE))
    opt_state = tx.init(eqx.filter(model, eqx.is_array))
    start = jnp.asarray(0)
    if checkpoint.exists():
        start, model, opt_state = eqx.tree_deserialise_leaves(checkpoint, (start, model, opt_state))
    for step in range(int(start), until):
        model, opt_state, loss = train_step(model, opt_state, tx, jax.random.normal(jax.random.key(step), (16, 8)))
    eqx.tree_serialise_leaves(checkpoint, (jnp.asarray(until), model, opt_state))
    print(f"step {until}: loss {loss:.6f}")
    return model


if __name__ == "__main__":
    train(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
