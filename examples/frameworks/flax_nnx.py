"""Flax NNX: nnx.Optimizer under nnx.jit, and a checkpoint by Orbax.

python flax_nnx.py FOLDER 20    # stops after 20 steps
python flax_nnx.py FOLDER 40    # goes on from there
"""

import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint
from flax import nnx

import optwire.jax
from optwire import optax

STEPS, RATE = 40, 1e-2
TARGET = os.environ.get("OPTWIRE_TARGET", "localhost:50051")


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(8, 32, rngs=rngs)
        self.out = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.gelu(self.hidden(x)))


def loss_of(model: Network, x: jax.Array) -> jax.Array:
    return jnp.mean((model(x) - jnp.sin(x).sum(1, keepdims=True)) ** 2)


@nnx.jit
def train_step(model: Network, optimizer: nnx.Optimizer, x: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_of)(model, x)
    optimizer.update(model, grads)
    return loss


def train(folder: pathlib.Path, until: int = STEPS) -> nnx.Module:
    folder.mkdir(parents=True, exist_ok=True)
    model = Network(nnx.Rngs(0))
    checkpoint = (folder / "checkpoint").absolute()
    spec = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE))
    client = optwire.connect(TARGET)
    if checkpoint.exists():
        session = client.attach("flax-nnx")
    else:
        session = optwire.jax.create_session(client, nnx.state(model, nnx.Param), spec, name="flax-nnx")
    tx = optwire.jax.transformation(session)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    with orbax.checkpoint.StandardCheckpointer() as files:
        if checkpoint.exists():
            nnx.update((model, optimizer), files.restore(checkpoint, nnx.state((model, optimizer))))
        for step in range(int(optimizer.step[...]), until):
            loss = train_step(model, optimizer, jax.random.normal(jax.random.key(step), (16, 8)))
        files.save(checkpoint, nnx.state((model, optimizer)), force=True)
    print(f"step {until}: loss {loss:.6f}")
    return model


if __name__ == "__main__":
    train(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
