"""Flax Linen: TrainState under jit, and a checkpoint by flax.serialization.

python flax_linen.py FOLDER 20    # stops after 20 steps
python flax_linen.py FOLDER 40    # goes on from there
"""

import os
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, serialization
from flax.training.train_state import TrainState

import optwire.jax
from optwire import optax

STEPS, RATE = 40, 1e-2
TARGET = os.environ.get("OPTWIRE_TARGET", "localhost:50051")


class Network(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(1)(linen.gelu(linen.Dense(32)(x)))


@jax.jit
def train_step(state: TrainState, x: jax.Array) -> tuple[TrainState, jax.Array]:
    def loss_of(params: Any) -> jax.Array:
        return jnp.mean((state.apply_fn(params, x) - jnp.sin(x).sum(1, keepdims=True)) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss


def train(folder: pathlib.Path, until: int = STEPS) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    model = Network()
    params = model.init(jax.random.key(0), jnp.zeros((1, 8)))
    checkpoint = folder / "checkpoint.msgpack"
    spec = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE))
    client = optwire.connect(TARGET)
    if checkpoint.exists():
        session = client.attach("flax-linen")
    else:
        session = optwire.jax.create_session(client, params, spec, name="flax-linen")
    tx = optwire.jax.transformation(session)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    if checkpoint.exists():
        state = serialization.from_bytes(state, checkpoint.read_bytes())
    for step in range(int(state.step), until):
        state, loss = train_step(state, jax.random.normal(jax.random.key(step), (16, 8)))
    checkpoint.write_bytes(serialization.to_bytes(state))
    print(f"step {until}: loss {loss:.6f}")
    return state.params


if __name__ == "__main__":
    train(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
