"""Nests of arrays as ordered, named leaves: what fixes a session's tree and lays out its payload.

A nest is any nesting of dict, OrderedDict, list, tuple and named tuple with arrays at its leaves; None is an empty
place. Leaves come in JAX's order. Knows NumPy; knows neither protobuf nor JAX.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from optwire_proto import errors, limits, nests, tensors


@dataclasses.dataclass(frozen=True, slots=True)
class LeafSpec:
    """Name, shape and element type of one array.

    Raises:
      TreeError: a name that could not be a path, a shape or an element type outside the limits.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        _check_name(self.name)
        if self.dtype not in tensors.DTYPE_NAMES:
            raise errors.TreeError(
                f"leaf {self.name!r}: unknown element type {self.dtype!r}",
                subject=self.name,
                expected=f"one of {', '.join(tensors.DTYPE_NAMES)}",
                got=self.dtype,
            )
        if len(self.shape) > limits.RANK_MAX or not all(0 <= size <= limits.DIM_MAX for size in self.shape):
            raise errors.TreeError(
                f"leaf {self.name!r}: shape {nests.brief(self.shape)}, expected at most {limits.RANK_MAX} dimensions, "
                f"each from 0 to {limits.DIM_MAX}",
                subject=self.name,
                got=nests.brief(self.shape),
            )

        # An empty leaf counts as one with its zeros taken for ones, as libraries multiply before they notice the zero.
        if math.prod(max(size, 1) for size in self.shape) * tensors.itemsize(self.dtype) > limits.PAYLOAD_BYTES_MAX:
            raise errors.TreeError(
                f"leaf {self.name!r}: shape {nests.brief(self.shape)}, expected at most {limits.PAYLOAD_BYTES_MAX} "
                "bytes",
                subject=self.name,
                got=nests.brief(self.shape),
            )

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Length of the leaf's bytes."""
        return self.elements * tensors.itemsize(self.dtype)


@dataclasses.dataclass(frozen=True)
class TreeSpec:
    """The ordered leaves of a session, and the nest they came from (empty: a flat mapping from name to array).

    Raises:
      TreeError: no leaf, too many, two with one name, or a nest that does not name the same leaves.
    """

    leaves: tuple[LeafSpec, ...]
    nodes: tuple[nests.Node, ...] = ()

    def __post_init__(self) -> None:
        names = [leaf.name for leaf in self.leaves]
        if not names:
            raise errors.TreeError("the tree has no arrays, expected at least one", expected="1 leaf", got="0 leaves")
        for what, count, most in (
            ("leaves", len(names), limits.LEAVES_MAX),
            ("nodes", len(self.nodes), limits.NODES_MAX),
        ):
            if count > most:
                raise errors.TreeError(f"the tree has {count} {what}, expected at most {most}", got=str(count))
        duplicates = [name for name, count in collections.Counter(names).items() if count > 1]
        if duplicates:
            raise errors.TreeError(
                f"two leaves have the name {duplicates[0]!r}; names are paths joined by '/' and must differ",
                subject=duplicates[0],
            )
        if "" in names and len(names) > 1:
            raise errors.TreeError("a leaf has an empty name, which only a tree that is a single array may have")
        if self.nodes and list(nests.names(self.nodes)) != names:
            raise errors.TreeError("the nest does not name the same leaves in the same order as the leaves do")

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each leaf starts in the payload, in bytes; one more entry than leaves, the last is the total."""
        return (0, *itertools.accumulate(leaf.nbytes for leaf in self.leaves))

    @functools.cached_property
    def aligned_offsets(self) -> tuple[int, ...]:
        """Where each leaf starts in a buffer that keeps every leaf on a 64-byte boundary; the last is the total."""
        padded = (-(-leaf.nbytes // limits.ALIGNMENT_BYTES) * limits.ALIGNMENT_BYTES for leaf in self.leaves)
        return (0, *itertools.accumulate(padded))

    @property
    def payload_bytes(self) -> int:
        """Length of one payload, in bytes."""
        return self.offsets[-1]

    def without(self, absent: Sequence[int]) -> TreeSpec:
        """The flat tree of the leaves whose positions are not in ``absent``."""
        gone = frozenset(absent)
        return TreeSpec(tuple(leaf for index, leaf in enumerate(self.leaves) if index not in gone))


class Flat(NamedTuple):
    """A nest taken apart."""

    spec: TreeSpec
    arrays: list[tensors.Array]  # C-contiguous, little-endian, bf16 as uint16
    types: tuple[type, ...]  # the named tuple types met, in preorder


def flatten(tree: Any, what: str = "params") -> Flat:
    """Takes a nest apart into named leaves.

    Args:
      tree: a nest of dict, OrderedDict, list, tuple, named tuple and None with arrays at its leaves, or one array; or
        what was taken apart already, as adapters do that know other containers.
      what: what to call the nest in errors.

    Raises:
      TreeError: something in the nest is neither a known container nor an array of a served element type.
    """
    if isinstance(tree, Flat):
        return tree
    nodes: list[nests.Node] = []
    leaves: list[LeafSpec] = []
    arrays: list[tensors.Array] = []
    types: list[type] = []
    # A stack, not a nested function that calls itself: such a function is a cycle, and would keep the arrays alive
    # until the garbage collector comes by.
    waiting: list[tuple[tuple[nests.Key, ...], Any]] = [((), tree)]
    while waiting:
        path, value = waiting.pop()
        node, children = nests.opened(value, path, what)
        nodes.append(node)
        if node.kind is nests.Kind.LEAF:
            dtype, array = tensors.wire_array(_as_array(value, path, what), nests.where(what, path))
            leaves.append(LeafSpec("/".join(map(str, path)), array.shape, dtype))
            arrays.append(array)
        elif node.kind is nests.Kind.NAMEDTUPLE:
            types.append(type(value))
        waiting.extend(((*path, key), child) for key, child in reversed(children))
    return Flat(TreeSpec(tuple(leaves), tuple(nodes)), arrays, tuple(types))


def unflatten(spec: TreeSpec, arrays: Sequence[Any], types: Sequence[type] = ()) -> Any:
    """Puts a nest together again.

    Args:
      spec: the tree spec; without a nest the result is a dict from name to array.
      arrays: one a leaf, in order.
      types: named tuple types in preorder, as ``flatten`` found them; without them equal-looking types are made.
    """
    if not spec.nodes:
        return dict(zip((leaf.name for leaf in spec.leaves), arrays, strict=True))
    return nests.build(iter(spec.nodes), iter(arrays), iter(types))


def match(spec: TreeSpec, tree: Any, what: str = "grads") -> list[tensors.Array]:
    """Takes apart a nest that must have the session's structure, shapes and element types.

    A session without a nest takes a mapping from name to array.

    Returns:
      The arrays in the session's order, C-contiguous and little-endian.

    Raises:
      TreeMismatchError: names the first difference, what was expected and what came.
    """
    arrays = _walk(spec, tree)
    if arrays is not None:
        return arrays
    try:
        flat = flatten(tree, what)
    except errors.TreeError as exc:
        message = str(exc)
        if not message.startswith(what):
            message = f"{what}: {message}; the session's leaves are {nests.brief([leaf.name for leaf in spec.leaves])}"
        raise errors.TreeMismatchError(message, subject=exc.subject, expected=exc.expected, got=exc.got) from exc
    nones = set(nests.names(flat.spec.nodes, nests.Kind.NONE))
    if not spec.nodes:
        flat = _in_order_of(spec, flat)
    expected = {leaf.name: leaf for leaf in spec.leaves}
    got = {leaf.name: leaf for leaf in flat.spec.leaves}
    for verb, names in (
        ("missing", [name for name in expected if name not in got]),
        ("not in the session's tree", [name for name in got if name not in expected]),
    ):
        if names and names[0] in nones:
            raise errors.TreeMismatchError(
                f"{what}[{names[0]!r}]: None, expected an array", subject=names[0], expected="array", got="None"
            )
        if names:
            raise errors.TreeMismatchError(
                f"{what}: {len(names)} of the leaves {verb}: {nests.brief(names)}",
                subject=names[0],
                expected=nests.brief(tuple(expected)),
                got=nests.brief(tuple(got)),
            )
    if spec.nodes and spec.nodes != flat.spec.nodes:
        ours, theirs = next((a, b) for a, b in zip(spec.nodes, flat.spec.nodes, strict=False) if a != b)
        raise errors.TreeMismatchError(
            f"{what}: the nest differs from the session's: {nests.describe(theirs)}, expected {nests.describe(ours)}",
            expected=nests.describe(ours),
            got=nests.describe(theirs),
        )
    for name, leaf in expected.items():
        for field, came, wanted in (
            ("shape", got[name].shape, leaf.shape),
            ("element type", got[name].dtype, leaf.dtype),
        ):
            if came != wanted:
                raise errors.TreeMismatchError(
                    f"{what}[{name!r}]: {field} {came}, expected {wanted}",
                    subject=name,
                    expected=str(wanted),
                    got=str(came),
                )
    return flat.arrays


def match_present(spec: TreeSpec, tree: Any, what: str = "grads", other: type | tuple[()] = ()) -> list[Any]:
    """As ``match``, but None or one of a class ``other`` may stand in the place of an array, and in the result.

    Raises:
      TreeMismatchError: as ``match``; or nothing is there.
    """
    arrays: list[Any] | None = _walk(spec, tree) or None
    if arrays is not None:
        return arrays
    values = leaf_values(spec, tree)
    absent = [index for index, value in enumerate(values or ()) if value is None or isinstance(value, other)]
    if values is None or not absent:
        return list(match(spec, tree, what))
    stand_ins = {index: values[index] for index in absent}
    if all(value is None for value in values):
        name = spec.leaves[0].name
        raise errors.TreeMismatchError(
            f"{what}[{name!r}]: None, and so is every other array; expected at least one",
            subject=name,
            expected="an array",
            got="None",
        )
    for index in absent:  # memory that is never touched
        values[index] = tensors.empty(spec.leaves[index].shape, spec.leaves[index].dtype)
    arrays = list(match(spec, unflatten(spec, values), what))
    for index, value in stand_ins.items():
        arrays[index] = value
    return arrays


def match_into(spec: TreeSpec, tree: Any, what: str = "out") -> list[tensors.Array]:
    """As ``match``, of a nest whose arrays are to be written: NumPy's, writable, and laid out as the wire has them.

    Raises:
      TreeMismatchError: as ``match``; or an array cannot be written in place.
    """
    arrays = match(spec, tree, what)
    for leaf, array, value in zip(spec.leaves, arrays, leaf_values(spec, tree) or (), strict=True):
        problem = ""
        if not isinstance(value, np.ndarray):
            problem = type(value).__name__
        elif not value.flags.writeable:
            problem = "an array that is read-only"
        elif array is not value and not np.may_share_memory(array, value):
            problem = "an array that is not contiguous and little-endian"
        if problem and leaf.nbytes:
            expected = "a NumPy array that can be written in place"
            raise errors.TreeMismatchError(
                f"{what}[{leaf.name!r}]: {problem}, expected {expected}",
                subject=leaf.name,
                expected=expected,
                got=problem,
            )
    return arrays


def leaf_values(spec: TreeSpec, tree: Any) -> list[Any] | None:
    """What stands in the places of the leaves, whatever it is; None where the containers differ."""
    if not spec.nodes:
        names = [leaf.name for leaf in spec.leaves]
        return [tree[name] for name in names] if isinstance(tree, dict) and tree.keys() == set(names) else None
    values: list[Any] = []
    waiting = [tree]
    for node in spec.nodes:
        value = waiting.pop()
        if node.kind is nests.Kind.LEAF:
            values.append(value)
            continue
        children = nests.children_of(node, value)
        if children is None:
            return None
        waiting.extend(reversed(children))
    return values


def _walk(spec: TreeSpec, tree: Any) -> list[tensors.Array] | None:
    """The arrays of a nest that matches, at once; None where anything differs and wants a closer look."""
    arrays: list[tensors.Array] = []
    leaves = iter(spec.leaves)
    waiting = [tree]
    for node in spec.nodes:
        value = waiting.pop()
        if node.kind is nests.Kind.LEAF:
            leaf = next(leaves)
            if type(value) is not np.ndarray or value.shape != leaf.shape:
                return None
            if tensors.dtype_name(value.dtype) != leaf.dtype:
                return None
            arrays.append(tensors.wire_array(value, leaf.name)[1])
            continue
        children = nests.children_of(node, value)
        if children is None:
            return None
        waiting.extend(reversed(children))
    return arrays if spec.nodes else None


def _in_order_of(spec: TreeSpec, flat: Flat) -> Flat:
    """Reorders leaves that came by name; leaves that ``spec`` does not know stay at the end."""
    position = {leaf.name: index for index, leaf in enumerate(spec.leaves)}
    order = sorted(range(len(flat.arrays)), key=lambda index: position.get(flat.spec.leaves[index].name, len(position)))
    leaves = tuple(flat.spec.leaves[index] for index in order)
    return Flat(TreeSpec(leaves), [flat.arrays[index] for index in order], flat.types)


def _as_array(value: Any, path: tuple[nests.Key, ...], what: str) -> tensors.Array:
    if isinstance(value, np.ma.MaskedArray):
        raise errors.TreeError(
            f"{nests.where(what, path)}: a masked array, expected one without a mask; fill it first",
            subject="/".join(map(str, path)),
            expected="array",
            got="masked array",
        )
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    if hasattr(value, "__array__"):
        try:
            return np.asarray(value)
        except Exception as exc:  # whatever a foreign array type raises, for example for memory on another device
            raise errors.TreeError(f"{nests.where(what, path)}: cannot be read as a NumPy array: {exc}") from exc
    raise errors.TreeError(
        f"{nests.where(what, path)}: {type(value).__name__}, expected an array or a dict, OrderedDict, list, tuple, "
        "named tuple or None",
        subject="/".join(map(str, path)),
        expected="array",
        got=type(value).__name__,
    )


# Patterns, as a tree has tens of thousands of names.
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_NO_COMPONENT: Final = re.compile(r"(?:\A|/)\.{0,2}(?:/|\Z)")


def _check_name(name: str) -> None:
    problem = ""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        problem, size = "not valid Unicode", 0
    if size > limits.NAME_BYTES_MAX:
        problem = f"{size} bytes, expected at most {limits.NAME_BYTES_MAX}"
    elif _CONTROL.search(name):
        problem = "control characters"
    elif name and _NO_COMPONENT.search(name):
        problem = "a component that is empty, '.' or '..'"
    if problem:
        shown = name if len(name) <= 80 else name[:80] + "…"
        raise errors.TreeError(f"leaf name {shown!r}: {problem}", subject=shown, got=problem)
