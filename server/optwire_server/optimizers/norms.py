"""The length of a tree of gradients, and gradients clipped to a length.

Knows arrays and trees. Must not know update rules or optimizer states.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optwire_server.optimizers.precision import keep_dtype, own_precision, scalar_like
from optwire_server.optimizers.schedules import Scalar
from optwire_server.optimizers.state import Tree


def l2_norm(tree: Tree) -> jax.Array:
    """The Euclidean length of all the leaves of a tree taken as one vector: `√(Σ |x|²)`.

    Args:
        tree: arrays of any shapes; several dtypes give the norm in the one they promote to.

    Returns:
        A scalar, shape (); 0 for a tree without leaves.
    """
    leaves = jax.tree.leaves(tree)
    with own_precision(*leaves):
        return jnp.sqrt(sum(jnp.vdot(x, x) for x in leaves))


def clip_grads(grad_tree: Tree, max_norm: Scalar) -> Tree:
    """Scales gradients down to `max_norm` where they are longer: `g · min(1, max_norm / ‖g‖)`.

    Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks",
    https://arxiv.org/abs/1211.5063.

    Args:
        grad_tree: arrays of any shapes.
        max_norm: the greatest length allowed, in the unit of the gradients; a positive scalar.

    Returns:
        The gradients in the same structure, shapes and dtypes.
    """
    with own_precision(*jax.tree.leaves(grad_tree)):
        return clip_by_norm(grad_tree, l2_norm(grad_tree), max_norm)


def clip_by_norm(grad_tree: Tree, norm: jax.Array, max_norm: Scalar) -> Tree:
    """The same as `clip_grads` where the length is known already, such as that of more gradients than are at hand.

    Args:
        grad_tree: arrays of any shapes.
        norm: the length, shape ().
        max_norm: the greatest length allowed; a positive scalar.
    """
    limit = scalar_like(max_norm, norm)
    return jax.tree.map(lambda g: _scaled(g, norm < limit, limit / norm), grad_tree)


def _scaled(g: Any, fits: jax.Array, factor: jax.Array) -> Any:
    scale = factor if jnp.iscomplexobj(g) else jnp.real(factor)
    return keep_dtype(jnp.where(fits, g, g * scale), g)
