"""Fine-tuning with everything around the update described as data, from NumPy and from PyTorch: the same bits.

    make examples                     # or: python examples/05_finetune.py

A frozen base, AdamW for the head without decay on its biases, a warm-up and cosine for the rate, the global norm
clipped, gradients of 4 pushes accumulated, a moving average of the parameters to evaluate with. The client only ever
computes gradients; what is done with them is one text. The PyTorch half runs where PyTorch is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from sklearn import datasets

import optwire
from optwire_server import testing

PUSHES, ACCUMULATED = 1600, 4
SPEC = f"""
    ema_params(decay=0.99, optimizer=accumulate(k={ACCUMULATED}, optimizer=chain(
        clip_by_global_norm(1.0),
        partition({{
            "base/**": set_to_zero(),                       # frozen
            "**": adamw(
                warmup_cosine_decay_schedule(0.0, 0.03, warmup_steps=50, decay_steps={PUSHES // ACCUMULATED}),
                weight_decay=0.01,
                mask=["**", "!**/bias"],                    # no decay on biases
            ),
        }}),
    )))
"""
Params = dict[str, dict[str, np.ndarray]]


def pretrained() -> Params:
    """A base with weights of -1, 0 and 1, so that its features are exact everywhere, and a head that knows nothing."""
    rng = np.random.default_rng(0)
    return {
        "base": {"weight": rng.integers(-1, 2, (64, 96)).astype(np.float32)},
        "head": {"weight": np.zeros((96, 10), np.float32), "bias": np.zeros(10, np.float32)},
    }


def examples() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Handwritten digits: pixels (in 256ths) and targets of -1 and 1 to train on; pixels and labels to evaluate on."""
    digits = datasets.load_digits()
    pixels = (digits.data / 256).astype(np.float32)
    targets = np.where(np.eye(10)[digits.target] > 0, 1, -1).astype(np.float32)
    return pixels[:1400], targets[:1400], pixels[1400:], digits.target[1400:]


def scores(features: Any, weight: Any, bias: Any) -> Any:
    """``features @ weight + bias``, one feature after another: a sum whose order no library may choose."""
    total = bias
    for i in range(weight.shape[0]):
        total = total + features[..., i : i + 1] * weight[i]
    return total


def numpy_gradients() -> Callable[[Params, np.ndarray, np.ndarray], Params]:
    """Gradients of half the squared error of one example, by hand."""

    def gradients(params: Params, x: np.ndarray, target: np.ndarray) -> Params:
        features = np.maximum(x @ params["base"]["weight"], 0)
        error = scores(features, params["head"]["weight"], params["head"]["bias"]) - target
        return {
            "base": {"weight": np.zeros_like(params["base"]["weight"])},  # frozen
            "head": {"weight": features[:, None] * error, "bias": error},
        }

    return gradients


def torch_gradients() -> Callable[[Params, np.ndarray, np.ndarray], Params]:
    """The same, by PyTorch's autograd through a module; parameters are written into the module as they arrive."""
    import torch

    torch.set_num_threads(1)
    base, head = torch.nn.Linear(64, 96, bias=False), torch.nn.Linear(96, 10)
    base.requires_grad_(requires_grad=False)

    def gradients(params: Params, x: np.ndarray, target: np.ndarray) -> Params:
        with torch.no_grad():
            base.weight.copy_(torch.from_numpy(params["base"]["weight"]).T)
            head.weight.copy_(torch.from_numpy(params["head"]["weight"]).T)
            head.bias.copy_(torch.from_numpy(params["head"]["bias"]))
        head.zero_grad()
        features = torch.relu(base(torch.from_numpy(x)))
        loss = 0.5 * (scores(features, head.weight.T, head.bias) - torch.from_numpy(target)).square().sum()
        loss.backward()
        return {
            "base": {"weight": np.zeros_like(params["base"]["weight"])},  # frozen
            "head": {"weight": head.weight.grad.T.contiguous().numpy(), "bias": head.bias.grad.numpy()},
        }

    return gradients


def order(count: int) -> Iterator[int]:
    rng = np.random.default_rng(1)
    for _ in range(PUSHES):
        yield int(rng.integers(count))


def fine_tune(client: optwire.Client, name: str, gradients: Callable[..., Params]) -> tuple[Params, Params]:
    """Trains one session; returns its last parameters, and their average."""
    x, targets, _, _ = examples()
    params = pretrained()
    session = client.create_session(params, SPEC, name=name)
    for i in order(len(x)):
        params = session.step(gradients(params, x[i], targets[i]))
    return params, session.params("ema")


def accuracy(params: Params) -> float:
    _, _, x, labels = examples()
    features = np.maximum(x @ params["base"]["weight"], 0)
    return float((scores(features, params["head"]["weight"], params["head"]["bias"]).argmax(-1) == labels).mean())


def main() -> None:
    with testing.serve() as server, optwire.connect(server.target) as client:
        params, average = fine_tune(client, "numpy", numpy_gradients())
        print(f"NumPy: {accuracy(params):.1%} of the digits right, {accuracy(average):.1%} with the average")
        for group in client.attach("numpy").describe().groups:
            decay = [value for path, value in group.knobs if path.endswith(".weight_decay")] or ["none"]
            print(f"  group {group.group!r}: leaves {group.leaves}, {group.passes[-1]}, weight decay {decay[0]}")
        assert accuracy(average) > 0.8
        assert np.array_equal(params["base"]["weight"], pretrained()["base"]["weight"]), "the base is frozen"
        if importlib.util.find_spec("torch") is None:
            print("PyTorch: not installed here")
            return
        for ours, theirs in zip((params, average), fine_tune(client, "torch", torch_gradients()), strict=True):
            for room, leaves in ours.items():
                for leaf, value in leaves.items():
                    assert value.tobytes() == theirs[room][leaf].tobytes(), f"{room}/{leaf} differs"
        print("PyTorch: the same bits")


if __name__ == "__main__":
    main()
