"""Figures of one update, computed inside of it when a push asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import jax.numpy as jnp
from jax import lax

# Of the exponent and of the mantissa.
_BITS: Final = {"bfloat16": (8, 7), "float16": (5, 10)}


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
    changes = [_wide(b) - _wide(a) for a, b in zip(before, after, strict=True)]
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
    return jnp.sqrt(sum(jnp.sum(jnp.square(jnp.abs(_wide(leaf)))) for leaf in leaves))


def _wide(leaf: Any) -> Any:
    """A leaf in 32 bits at least, rounded as it is kept: XLA leaves out a rounding to 16 bits that is undone again."""
    wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    if leaf.dtype.name not in _BITS:
        return wide
    exponent, mantissa = _BITS[leaf.dtype.name]
    return lax.reduce_precision(wide, exponent_bits=exponent, mantissa_bits=mantissa)
