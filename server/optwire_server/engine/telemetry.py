"""Figures of one update, computed inside of it when a push asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp


def measure(
    grads: list[Any], before: list[Any], after: list[Any], clip: Callable[[list[Any], list[Any]], Any] | None
) -> dict[str, Any]:
    """Scalars of shape (), float32, by name.

    Args:
      grads: gradients as the optimizer gets them, unscaled.
      before: parameters before the update.
      after: parameters after it.
      clip: the share of gradient elements that the leading clip changes, where there is one.
    """
    wide = [jnp.promote_types(leaf.dtype, jnp.float32) for leaf in before]
    changes = [b.astype(w) - a.astype(w) for a, b, w in zip(before, after, wide, strict=True)]
    measured = {
        "grad_norm": norm(grads),
        "update_norm": norm(changes),
        "param_norm": norm(after),
        "nonfinite": sum(jnp.sum(~jnp.isfinite(g), dtype=jnp.float32) for g in grads),
    }
    if clip is not None:
        measured["clip_fraction"] = clip([g.astype(p.dtype) for g, p in zip(grads, before, strict=True)], before)
    return {name: jnp.asarray(value, jnp.float32) for name, value in measured.items()}


def norm(leaves: list[Any]) -> Any:
    """The Euclidean length of all leaves together, in 32 bits at least."""
    squares = [jnp.sum(jnp.square(jnp.abs(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))))) for leaf in leaves]
    return jnp.sqrt(sum(squares))
