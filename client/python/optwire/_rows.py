"""Gradients by rows: what a push of them sends, and what its reply becomes. NumPy only; no gRPC, no protobuf."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from optwire import _options, _payload
from optwire_proto import errors, limits, rows, sessions, tensors, trees

Rows = rows.Rows
Sent = rows.Wanted
# Of the bytes of a request to read rows, those that are not indices.
_AROUND_BYTES = 64 * limits.KIB
_INDEX_BYTES_MAX = limits.MESSAGE_BYTES_MAX - _AROUND_BYTES


class Gradients:
    """The gradients of a push, some of which come by rows.

    Args:
      tree: of the session.
      arrays: one for each leaf, as ``trees.match_present`` returns them; ``Rows`` where a leaf comes by rows.

    Raises:
      TreeMismatchError: rows of another shape or element type than the leaf's.
      InvalidArgumentError: indices that are none of its rows.
    """

    def __init__(self, tree: trees.TreeSpec, arrays: Sequence[Any]) -> None:
        self._tree = tree
        self._indices: dict[int, tensors.Array] = {}
        payload: list[tensors.Array] = []
        for position, (leaf, array) in enumerate(zip(tree.leaves, arrays, strict=True)):
            if isinstance(array, Rows):
                indices, values = _summed(leaf, array)
                self._indices[position] = indices
                payload += [indices, values]
            elif array is not None:
                payload.append(array)
        self.payload = _payload.Outgoing(payload)

    @property
    def counts(self) -> rows.Counts:
        """(position of a leaf, number of its rows) pairs."""
        return tuple((position, indices.size) for position, indices in self._indices.items())

    def newest(self, read: Callable[..., list[tensors.Array]], filled: list[tensors.Array]) -> list[tensors.Array]:
        """The newest parameters in the place of a reply, which ``Session._read`` reads: all of them, where the indices
        do not fit one call.
        """
        if sum(indices.nbytes for indices in self._indices.values()) > _INDEX_BYTES_MAX:
            whole = read(_payload.fresh(self._tree))
            return [
                array[self._indices[position]] if position in self._indices else array
                for position, array in enumerate(whole)
            ]
        sent = {position: indices.tobytes() for position, indices in self._indices.items()}
        return read(filled, wanted=tuple((position, sent.get(position)) for position in range(len(self._tree.leaves))))

    def receiving(self, filled: Sequence[tensors.Array]) -> Callable[[object], _payload.Incoming]:
        """Where a reply goes; it comes whole, whatever its ack says."""
        return lambda _: _payload.Incoming(filled)

    def targets(self) -> list[tensors.Array]:
        """New arrays for the reply."""
        return [tensors.empty(leaf.shape, leaf.dtype) for leaf in rows.reply_leaves(self._tree, self.counts)]

    def answer(self, arrays: Sequence[tensors.Array]) -> list[Any]:
        """What stands in the places of the leaves: rows where a leaf came by rows."""
        return [
            Rows(self._indices[position], array) if position in self._indices else array
            for position, array in enumerate(arrays)
        ]


def gradients(tree: trees.TreeSpec, arrays: Sequence[Any]) -> Gradients | None:
    """The gradients of a push; None where none of them come by rows. Raises as ``Gradients``."""
    return Gradients(tree, arrays) if any(isinstance(array, Rows) for array in arrays) else None


class Wanted:
    """Rows that are to be read.

    Args:
      tree: of the session.
      indices: by name of a leaf, in any order, and the same row may come again; None: all of the leaf.

    Raises:
      InvalidArgumentError: a name of no leaf, or indices that are none of its rows.
      LimitError: more than fit one message.
    """

    def __init__(self, tree: trees.TreeSpec, indices: object) -> None:
        names = {leaf.name: position for position, leaf in enumerate(tree.leaves)}
        if not isinstance(indices, Mapping) or not indices:
            raise _options.wrong("rows", "indices by name of a leaf", indices)
        if unknown := [name for name in indices if name not in names]:
            raise _options.wrong("rows", f"names of leaves, such as {tree.leaves[0].name!r}", unknown[0])
        self._places: dict[str, Any] = {}  # of each row that is asked for, among those that are read
        read: dict[int, tensors.Array | None] = {}
        for name, wanted in indices.items():
            leaf = tree.leaves[names[name]]
            if wanted is None:
                self._places[name], read[names[name]] = ..., None
                continue
            distinct, places = np.unique(_checked(leaf, wanted, "rows"), return_inverse=True)
            rows.check_indices(leaf, distinct, "rows")
            self._places[name] = places.reshape(-1)
            read[names[name]] = distinct.astype(_dtype(leaf))
        found = [(position, tree.leaves[position], read[position]) for position in sorted(read)]
        self.sent: rows.Wanted = tuple((at, None if chosen is None else chosen.tobytes()) for at, _, chosen in found)
        self._leaves = [leaf if chosen is None else rows.part(leaf, chosen.size) for _, leaf, chosen in found]
        length = sum(len(data or b"") for _, data in self.sent)
        if length > _INDEX_BYTES_MAX:
            raise errors.LimitError(
                f"rows: {length} bytes of indices, expected at most {_INDEX_BYTES_MAX} in one call",
                subject="rows",
                expected=f"at most {_INDEX_BYTES_MAX} bytes",
                got=str(length),
            )

    def targets(self) -> list[tensors.Array]:
        """New arrays for what is read."""
        return [tensors.empty(leaf.shape, leaf.dtype) for leaf in self._leaves]

    def answer(self, arrays: Sequence[tensors.Array]) -> dict[str, tensors.Array]:
        """The rows that were asked for, by name of their leaf, in the order of the indices."""
        found = dict(zip((leaf.name for leaf in self._leaves), arrays, strict=True))
        return {name: found[name][places] for name, places in self._places.items()}


def exactness(name: object, grads: Gradients | None) -> bool:
    """Whether an update of rows is to be exact.

    Raises:
      InvalidArgumentError: a name of neither kind; there are no rows that it could be said of.
    """
    if name not in ("lazy", "exact"):
        raise _options.wrong("rows", "one of lazy, exact", name)
    if name == "exact" and grads is None:
        raise _options.wrong("rows", "optwire.Rows among the gradients: without them every update is exact", name)
    return name == "exact"


def refuse_out(out: object, options: sessions.PushOptions) -> None:
    """Raises InvalidArgumentError where the reply to a push by rows is to fill arrays."""
    if out is not None and options.rows:
        raise _options.wrong("out", "None with gradients by rows, whose replies are as long as they are", type(out))


def _dtype(leaf: trees.LeafSpec) -> np.dtype[Any]:
    return tensors.numpy_dtype(rows.index_dtype(leaf))


def _array(value: Any, leaf: trees.LeafSpec, where: str) -> tensors.Array:
    try:
        return np.asarray(value)
    except ValueError as exc:  # of lists that are not of one length
        expected, got = "an array, or lists of one length", type(value).__name__
        raise errors.InvalidArgumentError(
            f"{where}: {exc}; expected {expected}", subject=leaf.name, expected=expected, got=got
        ) from exc


def _checked(leaf: trees.LeafSpec, indices: Any, what: str) -> tensors.Array:
    """Indices as whole numbers in a row."""
    found = _array(indices, leaf, f"{what}[{leaf.name!r}].indices")
    where = f"{what}[{leaf.name!r}]"
    if not leaf.shape:
        raise _options.wrong(where, "the whole leaf, which has no axis", Rows)
    if found.size == 0 and found.ndim == 1:
        return found.astype(np.int64)
    if found.dtype.kind not in "iu" or found.ndim != 1:
        expected, got = "whole numbers along one axis", f"{found.dtype} of shape {found.shape}"
        raise errors.InvalidArgumentError(
            f"{where}.indices: {got}, expected {expected}", subject=leaf.name, expected=expected, got=got
        )
    return found


def _summed(leaf: trees.LeafSpec, given: Rows) -> tuple[tensors.Array, tensors.Array]:
    """Indices, ascending, and the sum of the rows that came for each; the arrays given, where they are so already."""
    indices = _checked(leaf, given.indices, "grads")
    where = f"grads[{leaf.name!r}].rows"
    dtype, values = tensors.wire_array(_array(given.rows, leaf, where), where)
    expected = (indices.size, *leaf.shape[1:])
    if values.shape != expected or dtype != leaf.dtype:
        came, wanted = f"{dtype} of shape {values.shape}", f"{leaf.dtype} of shape {expected}"
        raise errors.TreeMismatchError(
            f"grads[{leaf.name!r}].rows: {came}, expected {wanted}", subject=leaf.name, expected=wanted, got=came
        )
    if np.any(indices[1:] <= indices[:-1]):
        order = np.argsort(indices, kind="stable")
        indices, values = indices[order], values[order]
        starts = np.flatnonzero(np.concatenate([[True], indices[1:] != indices[:-1]]))
        if starts.size < indices.size:
            indices, values = indices[starts], _sums(values, starts, dtype)
    rows.check_indices(leaf, indices)
    return np.ascontiguousarray(indices, _dtype(leaf)), values


def _sums(values: tensors.Array, starts: tensors.Array, dtype: str) -> tensors.Array:
    """The sums of neighbours along the first axis, in 32 bits at least."""
    if dtype == "bf16":
        wide = np.add.reduceat(tensors.bf16_to_f32(values), starts, axis=0)
        return tensors.f32_to_bf16(wide).view(np.uint16)
    wide = values.astype(np.float32) if dtype == "f16" else values
    return np.add.reduceat(wide, starts, axis=0).astype(values.dtype, copy=False)
