"""Nests of arrays as ordered, named leaves: what fixes a session's tree and lays out its payload.

A nest is any nesting of dict, OrderedDict, list, tuple and named tuple with arrays at its leaves; None is an empty
place. Leaves come in JAX's order. Knows NumPy; knows neither protobuf nor JAX.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import itertools
import keyword
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from optwire_proto import errors, limits, tensors

Key = str | int


class Kind(enum.IntEnum):
    """What a node of the nest is; the values are the protocol's."""

    LEAF = 1
    NONE = 2
    DICT = 3
    ORDERED_DICT = 4
    LIST = 5
    TUPLE = 6
    NAMEDTUPLE = 7


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One container or leaf of a nest, in preorder; ``children`` nodes of the next depth follow."""

    kind: Kind
    children: int = 0
    keys: tuple[Key, ...] = ()
    type_name: str = ""


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
                f"leaf {self.name!r}: unknown element type {self.dtype!r}", subject=self.name, got=self.dtype
            )
        if len(self.shape) > limits.RANK_MAX or not all(0 <= size <= limits.DIM_MAX for size in self.shape):
            raise errors.TreeError(
                f"leaf {self.name!r}: shape {_brief(self.shape)}, expected at most {limits.RANK_MAX} dimensions, "
                f"each from 0 to {limits.DIM_MAX}",
                subject=self.name,
                got=_brief(self.shape),
            )

        # An empty leaf counts as one with its zeros taken for ones, as libraries multiply before they notice the zero.
        if math.prod(max(size, 1) for size in self.shape) * tensors.itemsize(self.dtype) > limits.PAYLOAD_BYTES_MAX:
            raise errors.TreeError(
                f"leaf {self.name!r}: shape {_brief(self.shape)}, expected at most {limits.PAYLOAD_BYTES_MAX} bytes",
                subject=self.name,
                got=_brief(self.shape),
            )

    @property
    def nbytes(self) -> int:
        """Length of the leaf's bytes."""
        return math.prod(self.shape) * tensors.itemsize(self.dtype)


@dataclasses.dataclass(frozen=True)
class TreeSpec:
    """The ordered leaves of a session, and the nest they came from (empty: a flat mapping from name to array).

    Raises:
      TreeError: no leaf, too many, two with one name, or a nest that does not name the same leaves.
    """

    leaves: tuple[LeafSpec, ...]
    nodes: tuple[Node, ...] = ()

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
        if self.nodes and list(_leaf_names(self.nodes)) != names:
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


class Flat(NamedTuple):
    """A nest taken apart."""

    spec: TreeSpec
    arrays: list[tensors.Array]  # C-contiguous, little-endian, bf16 as uint16
    types: tuple[type, ...]  # the named tuple types met, in preorder


def flatten(tree: Any, what: str = "params") -> Flat:
    """Takes a nest apart into named leaves.

    Args:
      tree: a nest of dict, OrderedDict, list, tuple, named tuple and None with arrays at its leaves, or one array.
      what: what to call the nest in errors.

    Raises:
      TreeError: something in the nest is neither a known container nor an array of a served element type.
    """
    nodes: list[Node] = []
    leaves: list[LeafSpec] = []
    arrays: list[tensors.Array] = []
    types: list[type] = []
    # A stack, not a nested function that calls itself: such a function is a cycle, and would keep the arrays alive
    # until the garbage collector comes by.
    waiting: list[tuple[tuple[Key, ...], Any]] = [((), tree)]
    while waiting:
        path, value = waiting.pop()
        node, children = _open(value, path, what)
        nodes.append(node)
        if node.kind is Kind.LEAF:
            dtype, array = tensors.wire_array(_as_array(value, path, what), _where(what, path))
            leaves.append(LeafSpec("/".join(map(str, path)), array.shape, dtype))
            arrays.append(array)
        elif node.kind is Kind.NAMEDTUPLE:
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
    return _build(iter(spec.nodes), iter(arrays), iter(types))


def _build(nodes: Iterator[Node], leaves: Iterator[Any], types: Iterator[type]) -> Any:
    """The nest that starts at the next node."""
    node = next(nodes)
    if node.kind is Kind.LEAF:
        return next(leaves)
    if node.kind is Kind.NONE:
        return None
    if node.kind is Kind.NAMEDTUPLE:
        # The parent comes before its children in preorder, so its type must be taken first.
        kind = next(types, None) or collections.namedtuple(node.type_name, [str(key) for key in node.keys])
        return kind(*[_build(nodes, leaves, types) for _ in range(node.children)])
    children = [_build(nodes, leaves, types) for _ in range(node.children)]
    if node.kind is Kind.LIST:
        return children
    if node.kind is Kind.TUPLE:
        return tuple(children)
    mapping = dict(zip(node.keys, children, strict=True))
    return collections.OrderedDict(mapping) if node.kind is Kind.ORDERED_DICT else mapping


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
        raise errors.TreeMismatchError(str(exc), subject=exc.subject, expected=exc.expected, got=exc.got) from exc
    if not spec.nodes:
        flat = _in_order_of(spec, flat)
    expected = {leaf.name: leaf for leaf in spec.leaves}
    got = {leaf.name: leaf for leaf in flat.spec.leaves}
    for verb, names in (
        ("missing", [name for name in expected if name not in got]),
        ("not in the session's tree", [name for name in got if name not in expected]),
    ):
        if names:
            raise errors.TreeMismatchError(
                f"{what}: {len(names)} of the leaves {verb}: {_brief(names)}",
                subject=names[0],
                expected=_brief(tuple(expected)),
                got=_brief(tuple(got)),
            )
    if spec.nodes and spec.nodes != flat.spec.nodes:
        ours, theirs = next((a, b) for a, b in zip(spec.nodes, flat.spec.nodes, strict=False) if a != b)
        raise errors.TreeMismatchError(
            f"{what}: the nest differs from the session's: {_describe(theirs)}, expected {_describe(ours)}",
            expected=_describe(ours),
            got=_describe(theirs),
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


def _walk(spec: TreeSpec, tree: Any) -> list[tensors.Array] | None:
    """The arrays of a nest that matches, at once; None where anything differs and wants a closer look."""
    arrays: list[tensors.Array] = []
    leaves = iter(spec.leaves)
    waiting = [tree]
    for node in spec.nodes:
        value = waiting.pop()
        if node.kind is Kind.LEAF:
            leaf = next(leaves)
            if not isinstance(value, np.ndarray) or value.shape != leaf.shape:
                return None
            if tensors.dtype_name(value.dtype) != leaf.dtype:
                return None
            arrays.append(tensors.wire_array(value, leaf.name)[1])
            continue
        children = _children(node, value)
        if children is None:
            return None
        waiting.extend(reversed(children))
    return arrays if spec.nodes else None


def _children(node: Node, value: Any) -> Sequence[Any] | None:
    """What is inside a container, in the node's order; None where ``value`` is not what the node describes."""
    if node.kind is Kind.NONE:
        return () if value is None else None
    if node.kind in (Kind.DICT, Kind.ORDERED_DICT):
        same = type(value) is (dict if node.kind is Kind.DICT else collections.OrderedDict)
        if not same or len(value) != node.children or not all(key in value for key in node.keys):
            return None
        if node.kind is Kind.ORDERED_DICT and tuple(value) != node.keys:
            return None
        return [value[key] for key in node.keys]
    if node.kind is Kind.NAMEDTUPLE:
        same = type(value).__name__ == node.type_name and getattr(value, "_fields", None) == node.keys
    else:
        same = type(value) is (list if node.kind is Kind.LIST else tuple)
    return value if same and len(value) == node.children else None


def _in_order_of(spec: TreeSpec, flat: Flat) -> Flat:
    """Reorders leaves that came by name; leaves that ``spec`` does not know stay at the end."""
    position = {leaf.name: index for index, leaf in enumerate(spec.leaves)}
    order = sorted(range(len(flat.arrays)), key=lambda index: position.get(flat.spec.leaves[index].name, len(position)))
    leaves = tuple(flat.spec.leaves[index] for index in order)
    return Flat(TreeSpec(leaves), [flat.arrays[index] for index in order], flat.types)


def _open(value: Any, path: tuple[Key, ...], what: str) -> tuple[Node, list[tuple[Key, Any]]]:
    """What ``value`` is, and its children by key."""
    if len(path) > limits.DEPTH_MAX:
        raise errors.TreeError(f"{_where(what, path)[:80]}…: nested deeper than {limits.DEPTH_MAX}")
    if value is None:
        return Node(Kind.NONE), []
    if type(value) is dict or type(value) is collections.OrderedDict:
        keys = _checked_keys(list(value), path, what)
        if type(value) is dict:
            keys = sorted(keys)
        kind = Kind.DICT if type(value) is dict else Kind.ORDERED_DICT
        return Node(kind, len(keys), tuple(keys)), [(key, value[key]) for key in keys]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields: tuple[str, ...] = value._fields
        return Node(Kind.NAMEDTUPLE, len(fields), fields, type(value).__name__), list(zip(fields, value, strict=True))
    if type(value) is list or type(value) is tuple:
        return Node(Kind.LIST if type(value) is list else Kind.TUPLE, len(value)), list(enumerate(value))
    return Node(Kind.LEAF), []


def _as_array(value: Any, path: tuple[Key, ...], what: str) -> tensors.Array:
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    if hasattr(value, "__array__"):
        try:
            return np.asarray(value)
        except Exception as exc:  # whatever a foreign array type raises, for example for memory on another device
            raise errors.TreeError(f"{_where(what, path)}: cannot be read as a NumPy array: {exc}") from exc
    raise errors.TreeError(
        f"{_where(what, path)}: {type(value).__name__}, expected an array or a dict, OrderedDict, list, tuple, "
        "named tuple or None",
        subject="/".join(map(str, path)),
        expected="array",
        got=type(value).__name__,
    )


def _checked_keys(keys: list[Any], path: tuple[Key, ...], what: str) -> list[Key]:
    text = all(type(key) is str for key in keys)
    if not text and not all(type(key) is int and -(2**63) <= key < 2**63 for key in keys):
        kinds = ", ".join(sorted({type(key).__name__ for key in keys}))
        raise errors.TreeError(
            f"{_where(what, path)}: keys of type {kinds}, expected all str or all int", expected="str or int", got=kinds
        )
    return keys


def _check_name(name: str) -> None:
    problem = ""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        problem, size = "not valid Unicode", 0
    if size > limits.NAME_BYTES_MAX:
        problem = f"{size} bytes, expected at most {limits.NAME_BYTES_MAX}"
    elif any(ord(char) < 0x20 or ord(char) == 0x7F for char in name):
        problem = "control characters"
    elif name and any(part in ("", ".", "..") for part in name.split("/")):
        problem = "a component that is empty, '.' or '..'"
    if problem:
        shown = name if len(name) <= 80 else name[:80] + "…"
        raise errors.TreeError(f"leaf name {shown!r}: {problem}", subject=shown, got=problem)


def _leaf_names(nodes: Sequence[Node]) -> Iterator[str]:
    """Walks nodes from outside, checking what ``flatten`` guarantees by construction."""
    stack: list[tuple[str | None, Iterator[Key]]] = [(None, iter([""]))]  # (path of the container, keys still to come)
    for node in nodes:
        while stack and (key := next(stack[-1][1], None)) is None:
            stack.pop()
        if not stack:
            raise errors.TreeError("the nest has nodes after its end")
        prefix = stack[-1][0]
        path = str(key) if not prefix else f"{prefix}/{key}"
        if node.kind is Kind.LEAF:
            yield path
        keys = _node_keys(node)
        if len(stack) > limits.DEPTH_MAX + 1:
            raise errors.TreeError(f"the nest is deeper than {limits.DEPTH_MAX}")
        stack.append((path, iter(keys)))
    if any(next(keys, None) is not None for _, keys in stack):
        raise errors.TreeError("the nest ends before its last container is full")


def _node_keys(node: Node) -> Sequence[Key]:
    """The keys of a node's children; raises unless they fit the node's kind."""
    keyed = node.kind in (Kind.DICT, Kind.ORDERED_DICT, Kind.NAMEDTUPLE)
    if len(node.keys) != (node.children if keyed else 0):
        raise errors.TreeError(f"{_describe(node)}: {len(node.keys)} keys for {node.children} children")
    if node.type_name and node.kind is not Kind.NAMEDTUPLE:
        raise errors.TreeError(f"{_describe(node)}: has the type name {node.type_name[:80]!r}, expected none")
    if node.kind in (Kind.LEAF, Kind.NONE) and node.children:
        raise errors.TreeError(f"{_describe(node)}: has {node.children} children, expected none")
    if not keyed:
        return range(node.children)
    _checked_keys(list(node.keys), (), "nest")
    if len(set(node.keys)) != len(node.keys):
        raise errors.TreeError(f"{_describe(node)}: a key comes twice")
    if node.kind is Kind.DICT and list(node.keys) != sorted(node.keys):
        raise errors.TreeError(f"{_describe(node)}: keys are not sorted")
    if node.kind is Kind.NAMEDTUPLE:
        words = (node.type_name, *node.keys)
        if not all(isinstance(word, str) and word.isidentifier() and not keyword.iskeyword(word) for word in words):
            raise errors.TreeError(f"{_describe(node)}: a name that is not an identifier")
        if len(node.type_name) > limits.TYPE_NAME_BYTES_MAX or any(str(key).startswith("_") for key in node.keys):
            raise errors.TreeError(f"{_describe(node)}: a name that is too long or starts with an underscore")
    return node.keys


def _where(what: str, path: tuple[Key, ...]) -> str:
    return f"{what}[{'/'.join(map(str, path))!r}]" if path else what


def _describe(node: Node) -> str:
    name = f"named tuple {node.type_name}" if node.kind is Kind.NAMEDTUPLE else node.kind.name.lower()
    return f"{name} of {_brief(node.keys)}" if node.keys else f"{name} of {node.children}" if node.children else name


def _brief(items: Sequence[Any]) -> str:
    """Enough of a sequence to recognise it, not more than a message should carry."""
    text = ", ".join(str(item)[:60] for item in items[:6])
    return f"({text}, … {len(items)} in all)" if len(items) > 6 else f"({text})"
