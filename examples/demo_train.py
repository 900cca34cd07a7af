"""The demo's model and training loop, and the two processes that run them.

    demo_train.py FOLDER TARGET    NumPy and optwire: gradients out, parameters back; writes remote.npz
    demo_train.py FOLDER           the same with the optimizer in this process, on JAX; writes local.npz

Both read ``data.npz`` and ``recipe.json`` from the folder and print "<step> <loss>" lines as they go. The first makes
sure, before it ends, that its interpreter never imported JAX.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

import optwire
from optwire import optimizers as opt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Params = dict[str, Floats]
# What differs between the two processes: takes gradients, applies one update, returns the new parameters.
Step = Callable[[Params], Params]

PARAMS = ("w1", "b1", "w2", "b2")
FORBIDDEN = ("jax", "jaxlib", "torch", "optwire_server")


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """How to train.

    Attributes:
      hidden: units of the hidden layer.
      epochs: passes over the training images.
      batch: images a step; what does not fill a batch at the end of an epoch is left out.
      learning_rate: Adam's.
      accuracy_min: share of the test images that the trained model must get right.
    """

    hidden: int
    epochs: int
    batch: int
    learning_rate: float
    accuracy_min: float

    def steps(self, images: int) -> int:
        """Steps of the whole training."""
        return self.epochs * (images // self.batch)


def initial_params(pixels: int, hidden: int, classes: int) -> Params:
    """He's initialization, the same at every run."""
    rng = np.random.default_rng(0)
    return {
        "w1": rng.standard_normal((pixels, hidden), np.float32) * np.float32((2 / pixels) ** 0.5),
        "b1": np.zeros(hidden, np.float32),
        "w2": rng.standard_normal((hidden, classes), np.float32) * np.float32((2 / hidden) ** 0.5),
        "b2": np.zeros(classes, np.float32),
    }


def forward(params: Params, images: Bytes) -> tuple[Floats, Floats, Floats]:
    """Inputs (images, pixels), activations of the hidden layer (images, hidden), scores (images, classes)."""
    inputs = images.astype(np.float32) / np.float32(255)
    hidden = np.maximum(inputs @ params["w1"] + params["b1"], 0)
    return inputs, hidden, hidden @ params["w2"] + params["b2"]


def loss_and_grads(params: Params, images: Bytes, labels: Bytes) -> tuple[float, Params]:
    """The mean cross-entropy of a batch, and its gradients by hand."""
    inputs, hidden, scores = forward(params, images)
    scores -= scores.max(axis=1, keepdims=True)
    log_probabilities = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    loss = -float(log_probabilities[rows, labels].mean())

    d_scores = np.exp(log_probabilities)
    d_scores[rows, labels] -= 1
    d_scores /= np.float32(len(labels))
    d_hidden = (d_scores @ params["w2"].T) * (hidden > 0)
    grads = {
        "w1": inputs.T @ d_hidden,
        "b1": d_hidden.sum(axis=0),
        "w2": hidden.T @ d_scores,
        "b2": d_scores.sum(axis=0),
    }
    return loss, grads


def accuracy(params: Params, images: Bytes, labels: Bytes) -> float:
    """The share of images whose highest score is their label's."""
    return float((forward(params, images)[2].argmax(axis=1) == labels).mean())


def train(
    params: Params, images: Bytes, labels: Bytes, recipe: Recipe, step: Step, report: Callable[[int, float], None]
) -> tuple[Params, list[float]]:
    """Trains, whoever applies the updates; returns the last parameters and the loss of every step."""
    rng = np.random.default_rng(1)
    losses: list[float] = []
    for _ in range(recipe.epochs):
        shuffled = rng.permutation(len(images))
        for batch in np.split(shuffled, range(recipe.batch, len(images), recipe.batch)):
            if len(batch) == recipe.batch:
                loss, grads = loss_and_grads(params, images[batch], labels[batch])
                params = step(grads)
                losses.append(loss)
                report(len(losses), loss)
    return params, losses


def local_step(params: Params, learning_rate: float) -> Step:
    """Adam in this process: what the server computes, without the server."""
    import jax

    from optwire_server import optimizers

    init_fun, update_fun, get_params = optimizers.adam(learning_rate)
    update_fun = jax.jit(update_fun)
    opt_state = init_fun(params)
    steps_done = 0

    def step(grads: Params) -> Params:
        nonlocal opt_state, steps_done
        opt_state = update_fun(steps_done, grads, opt_state)
        steps_done += 1
        return {name: np.asarray(leaf) for name, leaf in get_params(opt_state).items()}

    return step


def check_thin() -> None:
    """Raises if this interpreter imported, by whatever detour, what a thin client must do without."""
    found = [name for name in FORBIDDEN if name in sys.modules]
    if found:
        raise RuntimeError(f"the client's interpreter imported {', '.join(found)}")


def main(folder: pathlib.Path, target: str | None = None) -> None:
    recipe = Recipe(**json.loads((folder / "recipe.json").read_text()))
    with np.load(folder / "data.npz") as data:
        images, labels = data["images"], data["labels"]
    params = initial_params(images.shape[1], recipe.hidden, int(labels.max()) + 1)

    def report(step: int, loss: float) -> None:
        if step % 10 == 0 or step == recipe.steps(len(images)):
            print(step, loss, flush=True)

    if target is None:
        trained, losses = train(params, images, labels, recipe, local_step(params, recipe.learning_rate), report)
    else:
        with optwire.connect(target) as client:
            session = client.create_session(params, opt.adam(recipe.learning_rate), name="demo")
            trained, losses = train(params, images, labels, recipe, session.step, report)
        check_thin()
    results: dict[str, Any] = {**trained, "losses": losses, "modules": len(sys.modules)}
    np.savez(folder / ("local.npz" if target is None else "remote.npz"), **results)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), *sys.argv[2:])
