"""Trains with what a thin client installs, and nothing else: ``python -I train_thin.py TARGET`` in such an environment.

Runs where pytest is not installed; ``.ci/run thin`` calls it.
"""

import math
import sys

import numpy as np

import optwire
from optwire import optimizers as opt

STEPS = 20
FORBIDDEN = ("jax", "jaxlib", "ml_dtypes", "torch", "optwire_server")


def train(client: optwire.Client, spec: opt.Spec, *, bf16: bool) -> tuple[float, float]:
    """Logistic regression with parameters of float32 or bfloat16; returns the first loss and the last."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 5), np.float32)
    y = (x @ np.array([1, -1, 2, 0, -2], np.float32) > 0).astype(np.float32)
    narrow = optwire.to_bf16 if bf16 else np.asarray
    widen = optwire.from_bf16 if bf16 else np.asarray

    params = {"b": narrow(np.zeros((), np.float32)), "w": narrow(np.zeros(5, np.float32))}
    session = client.create_session(params, spec)
    losses = []
    for _ in range(STEPS + 1):
        probability = 1 / (1 + np.exp(-(x @ widen(params["w"]) + widen(params["b"]))))
        losses.append(-float(np.log(np.where(y == 1, probability, 1 - probability)).mean()))
        if len(losses) <= STEPS:
            error = (probability - y).astype(np.float32)
            grads = {"b": narrow(np.asarray(error.mean())), "w": narrow(error @ x / np.float32(len(x)))}
            params = session.step(grads)
    check(session.step_count == STEPS, f"step_count is {session.step_count}")
    check(params["w"].itemsize == (2 if bf16 else 4), f"w has come back as {params['w'].dtype}")
    client.delete_session(session.name)
    return losses[0], losses[-1]


def check(truth: bool, message: str) -> None:
    """An assert that ``python -O`` keeps."""
    if not truth:
        raise SystemExit(f"train_thin: {message}")


def main(target: str) -> None:
    with optwire.connect(target) as client:
        results = {
            "float32": train(client, opt.adam(0.1), bf16=False),
            # Not Adam: in bfloat16 its b2 of 0.999 is 1, the bias correction divides by 0, and nothing moves.
            "bfloat16": train(client, opt.momentum(0.2, mass=0.9), bf16=True),
        }
    for name, (first, last) in results.items():
        check(math.isclose(first, math.log(2), rel_tol=1e-3), f"{name}: the first loss is {first}")
        check(last < 0.6 * first, f"{name}: the loss went from {first} to {last}")
    found = [name for name in FORBIDDEN if name in sys.modules]
    check(not found, f"imported {', '.join(found)}")
    losses = ", ".join(f"{name} loss {first:.3f} to {last:.3f}" for name, (first, last) in results.items())
    print(f"trained {STEPS} steps on {len(sys.modules)} modules, none of them {' '.join(FORBIDDEN)}: {losses}")


if __name__ == "__main__":
    main(sys.argv[1])
