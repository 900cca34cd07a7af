"""Transformations that are ours: the seed's, and optax's where they look across leaves, so that sums may cross blocks.

Where optax has one of the same name, it takes the same arguments, keeps the same state and gives the same numbers, up
to the rounding of a sum. Must not know specs or sessions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optwire_server.engine import reductions
from optwire_server.optimizers import norms


def clip_by_global_norm(max_norm: float) -> Any:
    """``g * min(1, max_norm / ‖g‖)``, as optax's; for leaves of 16 bits rounded once, where optax's may overflow."""

    def update(updates: Any, _: Any) -> Any:
        norm = _norm(updates)

        def clipped(g: Any) -> Any:
            wide = g.astype(jnp.promote_types(g.dtype, jnp.float32))
            scaled = wide / norm.astype(wide.dtype) * max_norm
            return jnp.where(norm < max_norm, g, scaled.astype(g.dtype))

        return jax.tree.map(clipped, updates)

    return optax.stateless(update)


def normalize_by_update_norm(scale_factor: float = 1.0, eps: float = 1e-6) -> Any:
    """``g / ((‖g‖ + eps) / scale_factor)``, as optax's."""
    return optax.stateless(lambda updates, _: _divided(updates, (_norm(updates) + eps) / scale_factor))


def normalize() -> Any:
    """``g / ‖g‖``, as optax's."""
    return optax.stateless(lambda updates, _: _divided(updates, _norm(updates)))


def clip_grads(max_norm: float) -> Any:
    """The seed's, of the length that the gradients have in 32 bits at least."""
    return optax.stateless(lambda grads, _: norms.clip_by_norm(grads, _norm(grads), max_norm))


def clip_by_leaf_norm(max_norm: float) -> Any:
    """``g * min(1, max_norm / ‖g‖)`` for each leaf by itself, the norm taken in 32 bits at least."""

    def clipped(g: Any) -> Any:
        wide = g.astype(jnp.promote_types(g.dtype, jnp.float32))
        norm = jnp.sqrt(jnp.sum(jnp.square(jnp.abs(wide))))
        return jnp.where(norm <= max_norm, g, (wide * (max_norm / norm)).astype(g.dtype))

    return optax.stateless(lambda grads, _: jax.tree.map(clipped, grads))


def apply_if_finite(inner: Any, max_consecutive_errors: int) -> Any:
    """Keeps updates that are not finite from a transformation, as optax's, unless they have come too often in a row.

    Without its branch, inside of which no sum could cross blocks: both sides are computed, and one is taken.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return optax.ApplyIfFiniteState(
            notfinite_count=jnp.zeros((), jnp.int32),
            last_finite=jnp.array(True),
            total_notfinite=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
        )

    def update(updates: Any, state: Any, params: Any = None, **extras: Any) -> Any:
        finite = reductions.all_finite(jax.tree.leaves(updates))
        count = jnp.where(finite, 0, optax.safe_increment(state.notfinite_count))
        applied = finite | (count > max_consecutive_errors)
        new, new_inner = inner.update(updates, state.inner_state, params, **extras)
        taken = jax.tree.map(lambda leaf: jnp.where(applied, leaf, jnp.zeros_like(leaf)), new)
        kept = jax.tree.map(lambda after, before: jnp.where(applied, after, before), new_inner, state.inner_state)
        total = jnp.where(finite, state.total_notfinite, optax.safe_increment(state.total_notfinite))
        return taken, optax.ApplyIfFiniteState(count, finite, total, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _divided(updates: Any, divisor: Any) -> Any:
    return jax.tree.map(lambda g: (g / divisor).astype(g.dtype), updates)


def _norm(leaves: Any) -> Any:
    """The Euclidean length of all leaves together. shape=(), float32, or float64 in a trace that has 64 bits

    The barrier keeps XLA from multiplying by the reciprocal root instead, which rounds otherwise.
    """
    return lax.optimization_barrier(jnp.sqrt(reductions.square_norm(jax.tree.leaves(leaves))))


# By their name in the catalogue.
OURS: Final[Mapping[str, Callable[..., Any]]] = {
    made.__name__: made
    for made in (
        apply_if_finite,
        clip_by_global_norm,
        clip_by_leaf_norm,
        clip_grads,
        normalize,
        normalize_by_update_norm,
    )
}
