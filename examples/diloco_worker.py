"""One worker of a training with several: a character-level transformer in torch or in JAX, as ``09_diloco.py`` runs it.

    python examples/diloco_worker.py TARGET SESSION RANK torch --steps 500 --every 50

With ``--every 0`` it pushes gradients at every step, and has no optimizer of its own. Both frameworks have one model
with the same names and shapes, that of ``demo_torch.py``, so that any of them can be mixed in one session.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sysconfig
from collections.abc import Callable
from typing import Any

import numpy as np

import optwire

WORKERS, BATCH, CONTEXT, HEADS = 4, 16, 48, 4
WARM_UP = 50
DECAY = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1}
HELD_OUT = 200_000  # characters at the end, which nobody trains on

Params = dict[str, np.ndarray]
Step = Callable[[np.ndarray], float]
"""One step on rows of characters, shape=(BATCH, CONTEXT + 1); returns their loss."""


def text() -> tuple[np.ndarray, str]:
    """Python's standard library as numbers of characters, and the characters."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    source = "".join(path.read_text("utf-8", "replace") for path in sorted(folder.glob("*.py")))
    alphabet = "".join(sorted(set(source)))
    index = {character: i for i, character in enumerate(alphabet)}
    return np.array([index[character] for character in source], np.int32), alphabet


def shard(data: np.ndarray, rank: int) -> np.ndarray:
    """What one worker trains on."""
    trained_on = len(data) - HELD_OUT
    return data[rank * trained_on // WORKERS : (rank + 1) * trained_on // WORKERS]


def drawn(data: np.ndarray, rng: np.random.Generator, rows: int = BATCH) -> np.ndarray:
    """Random rows of text. shape=(rows, CONTEXT + 1)"""
    at = rng.integers(0, len(data) - CONTEXT - 1, rows)
    return data[at[:, None] + np.arange(CONTEXT + 1)]


def schedule(rate: float, steps: int) -> optwire.optimizers.Spec:
    """The learning rate of all runs, as the server's optimizer takes it."""
    return optwire.optax.warmup_cosine_decay_schedule(0.0, rate, WARM_UP, steps, 0.05 * rate)


def rate_at(step: int, rate: float, steps: int) -> float:
    """The same, as a number."""
    if step < WARM_UP:
        return rate * step / WARM_UP
    share = min(1.0, (step - WARM_UP) / (steps - WARM_UP))
    return rate * (0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2)


# ------------------------------------------------------------------------------------------------------------- torch


def torch_step(session: optwire.Session, options: argparse.Namespace, characters: int) -> Step:
    """A training of a torch module."""
    import demo_torch
    import torch
    from torch.nn import functional

    from optwire.torch import LocalSteps, tree_of

    torch.set_num_threads(1)
    model = demo_torch.Transformer(characters)
    parameters = dict(model.named_parameters())
    local = inner = None
    if options.every:
        local = LocalSteps(parameters.items(), session, **exchange(options))
        betas = (DECAY["b1"], DECAY["b2"])
        inner = torch.optim.AdamW(model.parameters(), lr=1.0, betas=betas, weight_decay=DECAY["weight_decay"])
        turn = torch.optim.lr_scheduler.LambdaLR(inner, lambda at: rate_at(at, options.rate, options.steps))

    def take(params: Params) -> None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.from_numpy(params[name]))

    def step(rows: np.ndarray) -> float:
        batch = torch.from_numpy(rows).long()
        loss = functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        if local is None or inner is None:
            take(session.step(tree_of((name, parameter.grad) for name, parameter in parameters.items())))
            return loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        inner.step()
        turn.step()
        local.step()
        return loss.item()

    if not options.every:
        take(session.params())
    return step


# --------------------------------------------------------------------------------------------------------------- JAX


def jax_step(session: optwire.Session, options: argparse.Namespace, characters: int) -> Step:
    """A training of the same model as a function of its parameters, with optax as the inner optimizer."""
    import jax
    import optax

    value_and_grad = jax.jit(jax.value_and_grad(jax_loss))
    if not options.every:
        params = session.params()

        def push(rows: np.ndarray) -> float:
            nonlocal params
            loss, grads = value_and_grad(params, rows)
            params = session.step(grads)
            return float(loss)

        return push

    local = optwire.LocalSteps(session, **exchange(options))
    rates = optax.warmup_cosine_decay_schedule(0.0, options.rate, WARM_UP, options.steps, 0.05 * options.rate)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rates, **DECAY))
    params = local.params()
    state = inner.init(params)

    @jax.jit
    def moved(params: Any, state: Any, rows: Any) -> tuple[Any, Any, Any]:
        loss, grads = jax.value_and_grad(jax_loss)(params, rows)
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def step(rows: np.ndarray) -> float:
        nonlocal params, state
        params, state, loss = moved(params, state, rows)
        params = local.step(params)
        return float(loss)

    return step


def jax_loss(params: Any, rows: Any) -> Any:
    """Mean cross entropy of the next characters, with the parameters of ``demo_torch.Transformer`` by their names."""
    import jax
    import jax.numpy as jnp

    def norm(x: Any, name: str) -> Any:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + 1e-5) * params[f"{name}.weight"] + params[f"{name}.bias"]

    def linear(x: Any, name: str) -> Any:
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    def attended(x: Any, name: str) -> Any:
        batch, length, width = x.shape
        both = x @ params[f"{name}.in_proj_weight"].T + params[f"{name}.in_proj_bias"]
        q, k, v = (part.reshape(batch, length, HEADS, -1).transpose(0, 2, 1, 3) for part in jnp.split(both, 3, axis=-1))
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(width // HEADS)
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
        mixed = (jax.nn.softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(batch, length, width)
        return linear(mixed, f"{name}.out_proj")

    before, after = rows[:, :-1], rows[:, 1:]
    x = params["embed.weight"][before] / 8 + params["place"][: before.shape[1]]
    layers = sum(name.endswith("self_attn.in_proj_weight") for name in params)
    for layer in (f"layers.layers.{index}" for index in range(layers)):
        x = x + attended(norm(x, f"{layer}.norm1"), f"{layer}.self_attn")
        x = x + linear(jax.nn.relu(linear(norm(x, f"{layer}.norm2"), f"{layer}.linear1")), f"{layer}.linear2")
    logits = norm(x, "norm") @ params["embed.weight"].T
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), after[..., None], axis=-1).mean()


# ------------------------------------------------------------------------------------------------------------ worker


def exchange(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("every", "fragments", "delay", "mixing")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("session")
    parser.add_argument("rank", type=int)
    parser.add_argument("framework", choices=("torch", "jax"))
    parser.add_argument("--steps", type=int, default=500, metavar="N")
    parser.add_argument("--rate", type=float, default=3e-3, metavar="R", help="the highest learning rate")
    parser.add_argument("--every", type=int, default=50, metavar="H", help="local steps between two pushes; 0: none")
    parser.add_argument("--fragments", type=int, default=1, metavar="P")
    parser.add_argument("--delay", type=int, default=0, metavar="N")
    parser.add_argument("--mixing", type=float, default=0.0, metavar="A")
    options = parser.parse_args()
    data, alphabet = text()
    own, rng = shard(data, options.rank), np.random.default_rng(options.rank)
    with (
        optwire.connect(options.target, transport="stream", timeout=300) as client,
        client.attach(options.session, worker=options.rank) as session,
    ):
        make = torch_step if options.framework == "torch" else jax_step
        step = make(session, options, len(alphabet))
        losses = [step(drawn(own, rng)) for _ in range(options.steps)]
    print(json.dumps({"rank": options.rank, "framework": options.framework, "loss": np.mean(losses[-20:])}))


if __name__ == "__main__":
    main()
