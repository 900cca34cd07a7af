"""The usage example of jax.example_libraries.optimizers, trained twice: with the optimizer on a server, and locally.

The training loop knows nothing of it: all that changes is where its three functions come from.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import optwire
import optwire.jax
from optwire import optimizers as opt
from optwire_server import optimizers, testing

LEARNING_RATE = 0.1
STEPS = 50


def initial_params() -> dict[str, jax.Array]:
    return {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}


@jax.jit
def loss_fn(params: dict[str, jax.Array]) -> jax.Array:
    x = jax.random.normal(jax.random.key(0), (64, 4))
    target = jnp.tanh(x[:, :3])
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) - target) ** 2)


def train(opt_init: Any, opt_update: Any, get_params: Any) -> tuple[float, dict[str, jax.Array]]:
    opt_state = opt_init(initial_params())

    def step(i: int, opt_state: Any) -> tuple[jax.Array, Any]:
        value, grads = jax.value_and_grad(loss_fn)(get_params(opt_state))
        opt_state = opt_update(i, grads, opt_state)
        return value, opt_state

    for i in range(STEPS):
        value, opt_state = step(i, opt_state)
    return float(value), get_params(opt_state)


def main() -> None:
    seed = optimizers.sgd(LEARNING_RATE)
    loss, local = train(seed.init_fn, jax.jit(seed.update_fn), seed.params_fn)
    print(f"locally              loss {loss:.6f} after {STEPS} steps")

    with testing.serve() as server, optwire.connect(server.target) as client:
        loss, remote = train(*optwire.jax.optimizer(client, opt.sgd(LEARNING_RATE)))
    print(f"through the server   loss {loss:.6f} after {STEPS} steps")

    for name in local:
        assert np.asarray(local[name]).tobytes() == np.asarray(remote[name]).tobytes(), name
    print("the same parameters, bit for bit")


if __name__ == "__main__":
    main()
