"""A session's nest as arrays in the session's order, and back. NumPy only: it runs inside callbacks of JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optwire import _session
from optwire_proto import tensors, trees


def nest_of(session: _session.Session, values: Sequence[Any]) -> Any:
    """The session's nest with these values at its leaves; None where there is no array."""
    return trees.unflatten(session._tree, values, session._types)


def arrays_of(session: _session.Session, nest: Any, what: str) -> list[Any]:
    """The arrays in a nest of the session's, as NumPy has them for users; None where there is none."""
    tree = session._tree
    return [
        None if array is None else array.view(tensors.numpy_dtype(leaf.dtype))
        for leaf, array in zip(tree.leaves, trees.match_present(tree, nest, what), strict=True)
    ]
