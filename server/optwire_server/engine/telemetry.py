"""Figures of an update, from sums that it gives when a push asks for them: a sum a block, added on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax.numpy as jnp
from jax import lax

from optwire_server.engine import reductions

# Of the exponent and of the mantissa.
_BITS: Final = {"bfloat16": (8, 7), "float16": (5, 10)}
# Which figure is the root of which sum of squares.
_NORMS: Final = {"grad_norm": "grad_squares", "update_norm": "update_squares", "param_norm": "param_squares"}


def sums(
    grads: list[Any],
    before: list[Any],
    after: list[Any],
    changed: Callable[[list[Any], list[Any]], list[Any]] | None,
) -> dict[str, Any]:
    """What is added over all blocks, by name, without padding. shape=(), float64, each

    To be traced in the update of a block, after it, with the reducer that it has.

    Args:
      grads: gradients as the optimizer gets them, unscaled.
      before: parameters before the update.
      after: parameters after it.
      changed: which gradient elements the leading clip changes, where there is one: (gradients, params) -> flags.
    """
    changes = [_wide(b) - _wide(a) for a, b in zip(before, after, strict=True)]
    taken = {
        "grad_squares": _squares(grads),
        "update_squares": _squares(changes),
        "param_squares": _squares(after),
        "nonfinite": reductions.partial([~jnp.isfinite(g) for g in grads]),
    }
    if changed is not None:
        met = [g.astype(p.dtype) for g, p in zip(grads, before, strict=True)]
        taken["clipped"] = reductions.partial(changed(met, before))
    return taken


def still(params: list[Any]) -> dict[str, Any]:
    """The sums of leaves that a push has no gradients for, as those of ``sums``; what is missing is 0."""
    return {"param_squares": _squares(params)}


def figures(added: Mapping[str, float], elements: int) -> dict[str, float]:
    """The figures by name, from the added sums of all blocks and the number of gradient elements."""
    made = {name: math.sqrt(added.get(squares, 0.0)) for name, squares in _NORMS.items()}
    made["nonfinite"] = float(added.get("nonfinite", 0.0))
    if "clipped" in added:
        made["clip_fraction"] = added["clipped"] / max(elements, 1)
    return made


def _squares(leaves: list[Any]) -> Any:
    return reductions.partial([reductions.square(_wide(leaf)) for leaf in leaves])


def _wide(leaf: Any) -> Any:
    """A leaf in 32 bits at least, rounded as it is kept: XLA leaves out a rounding to 16 bits that is undone again."""
    wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    if leaf.dtype.name not in _BITS:
        return wide
    exponent, mantissa = _BITS[leaf.dtype.name]
    return lax.reduce_precision(wide, exponent_bits=exponent, mantissa_bits=mantissa)
