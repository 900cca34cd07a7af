"""The leaves of any pytree by name, and how they stand in a session's tree.

A name is the key path, joined by "/". A last component ``value`` that is an attribute, and alone in its parent, is left
out: so Flax boxes its variables, here and there, and the name must not depend on it.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optwire_proto import errors, nests, tensors, trees


class Leaves(NamedTuple):
    """A pytree taken apart.

    Attributes:
      names: one a leaf, in JAX's order; empty places (None) count.
      values: arrays, tracers or None.
      treedef: of the pytree, with None as a leaf.
    """

    names: tuple[str, ...]
    values: tuple[Any, ...]
    treedef: Any

    def rebuilt(self, by_name: dict[str, Any]) -> Any:
        """The same pytree with other leaves; places without one are None."""
        return jax.tree_util.tree_unflatten(self.treedef, [by_name.get(name) for name in self.names])


def leaves_of(tree: Any) -> Leaves:
    """Takes any pytree apart."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda value: value is None)
    siblings = collections.Counter(path[:-1] for path, _ in pairs)
    names = tuple("/".join(map(_component, _unboxed(path, siblings))) for path, _ in pairs)
    return Leaves(names, tuple(value for _, value in pairs), treedef)


def in_order(spec: trees.TreeSpec, leaves: Leaves, what: str) -> list[Any]:
    """The values in the session's order; None where there is none.

    Raises:
      TreeMismatchError: names the first leaf that is missing, unknown, or of another shape or element type.
    """
    by_name = dict(zip(leaves.names, leaves.values, strict=True))
    expected = {leaf.name for leaf in spec.leaves}
    for verb, names in (
        ("missing", [leaf.name for leaf in spec.leaves if leaf.name not in by_name]),
        ("not in the session's tree", [n for n, v in by_name.items() if v is not None and n not in expected]),
    ):
        if names:
            raise errors.TreeMismatchError(
                f"{what}: {len(names)} of the leaves {verb}: {nests.brief(names)}",
                subject=names[0],
                expected=nests.brief([leaf.name for leaf in spec.leaves]),
                got=nests.brief(leaves.names),
            )
    for leaf in spec.leaves:
        if by_name[leaf.name] is not None:
            _check(leaf, by_name[leaf.name], what)
    return [by_name[leaf.name] for leaf in spec.leaves]


def to_jax(value: Any, name: str) -> jax.Array:
    """A JAX array; raises TreeError for an element type that JAX would narrow."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise errors.TreeError(
            f"params[{name!r}]: element type {dtype}, which JAX would narrow; set jax.config.update("
            "'jax_enable_x64', True), or convert the array",
            subject=name,
            expected=str(jax.dtypes.canonicalize_dtype(dtype)),
            got=str(dtype),
        )
    return jnp.asarray(value)


def all_to_jax(spec: trees.TreeSpec, arrays: Sequence[Any]) -> dict[str, jax.Array]:
    """JAX arrays by name, of arrays in the session's order; None is left out."""
    return {
        leaf.name: to_jax(array, leaf.name)
        for leaf, array in zip(spec.leaves, arrays, strict=True)
        if array is not None
    }


def _check(leaf: trees.LeafSpec, value: Any, what: str) -> None:
    dtype = getattr(value, "dtype", None)
    kind = (tensors.dtype_name(dtype) if isinstance(dtype, np.dtype) else None) or str(dtype or type(value).__name__)
    for field, came, wanted in (("shape", np.shape(value), leaf.shape), ("element type", kind, leaf.dtype)):
        if came != wanted:
            raise errors.TreeMismatchError(
                f"{what}[{leaf.name!r}]: {field} {came}, expected {wanted}",
                subject=leaf.name,
                expected=str(wanted),
                got=str(came),
            )


def _unboxed(path: tuple[Any, ...], siblings: dict[tuple[Any, ...], int]) -> tuple[Any, ...]:
    boxed = path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
    return path[:-1] if boxed and siblings[path[:-1]] == 1 else path


def _component(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)
