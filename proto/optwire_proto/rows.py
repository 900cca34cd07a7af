"""Rows: gradients and parameters of some rows of a leaf, along its first axis, and how they travel. NumPy only.

In a payload a leaf that comes by rows is two arrays: the indices of its rows, strictly increasing, and the rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import numpy as np

from optwire_proto import errors, tensors, trees

# Up to here indices travel as i32.
_SHORT_MAX: Final = 2**31 - 1
# (position of a leaf in the session's tree, number of its rows) pairs, ascending.
Counts = tuple[tuple[int, int], ...]
# What is to be read: (position of a leaf, indices of its rows as they travel; None: all of it) pairs, ascending.
Wanted = tuple[tuple[int, bytes | None], ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Some rows of an array whose first axis is long, such as an embedding table.

    Attributes:
      indices: which rows, whole numbers from 0; in any order, and the same row may come again. shape=(n,)
      rows: one for each index. shape=(n, ...)
    """

    indices: Any
    rows: Any


def index_dtype(leaf: trees.LeafSpec) -> str:
    """The element type of the indices of a leaf's rows."""
    return "i32" if leaf.shape[0] <= _SHORT_MAX else "i64"


def part(leaf: trees.LeafSpec, count: int) -> trees.LeafSpec:
    """So many rows of a leaf."""
    return trees.LeafSpec(leaf.name, (count, *leaf.shape[1:]), leaf.dtype)


def payload_tree(tree: trees.TreeSpec, counts: Counts) -> trees.TreeSpec:
    """The arrays of a push whose gradients come by rows for some leaves, flat and in order; ``check`` comes first."""
    by_leaf, leaves = dict(counts), []
    for position, leaf in enumerate(tree.leaves):
        if (count := by_leaf.get(position)) is None:
            leaves.append(trees.LeafSpec(f"{position}/whole", leaf.shape, leaf.dtype))
        else:
            leaves.append(trees.LeafSpec(f"{position}/indices", (count,), index_dtype(leaf)))
            leaves.append(trees.LeafSpec(f"{position}/rows", (count, *leaf.shape[1:]), leaf.dtype))
    return trees.TreeSpec(tuple(leaves))


def reply_leaves(tree: trees.TreeSpec, counts: Counts) -> list[trees.LeafSpec]:
    """The arrays of the reply to such a push: of leaves that came by rows, those rows."""
    by_leaf = dict(counts)
    return [part(leaf, by_leaf[position]) if position in by_leaf else leaf for position, leaf in enumerate(tree.leaves)]


def check(tree: trees.TreeSpec, counts: Counts, what: str = "push.rows") -> None:
    """Raises InvalidArgumentError unless leaves have the rows that are said to come; positions are ascending."""
    for position, count in counts:
        if position >= len(tree.leaves):
            raise _wrong(f"{what}: leaf {position}", what, f"positions below {len(tree.leaves)}", str(position))
        leaf = tree.leaves[position]
        if not leaf.shape:
            raise _wrong(f"{what}[{leaf.name!r}]: rows", leaf.name, "the whole leaf, which has no axis", "rows")
        if count > leaf.shape[0]:
            raise _wrong(f"{what}[{leaf.name!r}]: {count} rows", leaf.name, f"at most {leaf.shape[0]}", str(count))


def check_indices(leaf: trees.LeafSpec, indices: np.ndarray[Any, Any], what: str = "grads") -> None:
    """Raises InvalidArgumentError unless indices of rows are in range and strictly increasing."""
    if not indices.size:
        return
    where = f"{what}[{leaf.name!r}].indices"
    beyond = indices[(indices < 0) | (indices >= leaf.shape[0])]
    if beyond.size:
        got = str(int(beyond[0]))
        raise _wrong(f"{where}: {got}", leaf.name, f"numbers from 0 to {leaf.shape[0] - 1}", got)
    falls = np.flatnonzero(indices[1:] <= indices[:-1])
    if falls.size:
        at = int(falls[0])
        got = f"{int(indices[at])} before {int(indices[at + 1])}"
        raise _wrong(f"{where}: {got}", leaf.name, "strictly increasing numbers", got)


def unpacked(tree: trees.TreeSpec, wanted: Wanted) -> dict[int, np.ndarray[Any, Any] | None]:
    """Indices by position of their leaf; None: all of it is to be read.

    Raises:
      InvalidArgumentError: a leaf without rows, or not in order; bytes that are no indices of its rows.
    """
    found: dict[int, np.ndarray[Any, Any] | None] = {}
    for position, data in wanted:
        if found and position <= max(found):
            raise _wrong(f"rows: leaf {position}", "rows", "ascending positions of leaves", str(position))
        if position >= len(tree.leaves):
            raise _wrong(f"rows: leaf {position}", "rows", f"positions below {len(tree.leaves)}", str(position))
        if data is None:
            found[position] = None
            continue
        check(tree, ((position, 0),), "rows")
        leaf = tree.leaves[position]
        dtype = tensors.numpy_dtype(index_dtype(leaf))
        if len(data) % dtype.itemsize:
            got = f"{len(data)} bytes"
            raise _wrong(f"rows[{leaf.name!r}]: {got} of indices", leaf.name, f"a multiple of {dtype.itemsize}", got)
        indices: np.ndarray[Any, Any] = np.frombuffer(data, dtype)
        check_indices(leaf, indices, "rows")
        found[position] = indices
    return found


def _wrong(what: str, subject: str, expected: str, got: str) -> errors.InvalidArgumentError:
    return errors.InvalidArgumentError(f"{what}, expected {expected}", subject=subject, expected=expected, got=got)
