"""A small network, and what tests do with it: train it by torch and by us on the same gradients, and compare."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

RELATIVE = 1e-6


def network(dtype: Any = torch.float32) -> Any:
    """Always the same one."""
    generator = torch.Generator().manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    return model.to(dtype)


def loss(model: Any, step: int = 0) -> Any:
    """On a batch of its own for each step."""
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    inputs, targets = (torch.randn(16, width, generator=generator).to(dtype) for width in (4, 2))
    return torch.nn.functional.mse_loss(model(inputs), targets)


def backward(model: Any, step: int = 0) -> None:
    model.zero_grad()
    loss(model, step).backward()


def same_gradients(source: Any, target: Any) -> None:
    """Gives one model the gradients of the other."""
    for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
        ours.grad = None if theirs.grad is None else theirs.grad.clone()


def follow(
    local: Any,
    local_model: Any,
    remote: Any,
    remote_model: Any,
    steps: range,
    each: Callable[[int], None] = lambda _: None,
) -> float:
    """Steps both on the gradients of the local model; returns the worst drift of all steps."""
    worst = 0.0
    for step in steps:
        backward(local_model, step)
        same_gradients(local_model, remote_model)
        local.step()
        remote.step()
        each(step)
        worst = max(worst, drift(local_model, remote_model))
    return worst


def drift(a: Any, b: Any) -> float:
    """The largest difference in a parameter over the largest magnitude in it."""
    pairs = [(p.detach(), q.detach()) for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    assert all(t.isfinite().all() for pair in pairs for t in pair), "a maximum is blind to NaN"
    return max(float((p - q).abs().max() / p.abs().max()) for p, q in pairs)


def values(model: Any) -> list[Any]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Any], b: list[Any]) -> bool:
    """Bit for bit."""
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@contextlib.contextmanager
def closing(*optimizers: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for optimizer in optimizers:
            optimizer.close()
