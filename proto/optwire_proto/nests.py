"""Nests: the containers that arrays come in, taken apart into nodes in preorder and put together again.

A nest is any nesting of dict, OrderedDict, list, tuple and named tuple; None is an empty place, all else is a leaf. The
order of children is JAX's. Knows no arrays.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import keyword
from collections.abc import Iterator, Sequence
from typing import Any

from optwire_proto import errors, limits

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


def opened(value: Any, path: tuple[Key, ...], what: str) -> tuple[Node, list[tuple[Key, Any]]]:
    """What ``value`` is, and its children by key."""
    if len(path) > limits.DEPTH_MAX:
        raise errors.TreeError(f"{where(what, path)[:80]}…: nested deeper than {limits.DEPTH_MAX}")
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


def children_of(node: Node, value: Any) -> Sequence[Any] | None:
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


def build(nodes: Iterator[Node], leaves: Iterator[Any], types: Iterator[type]) -> Any:
    """The nest that starts at the next node."""
    node = next(nodes)
    if node.kind is Kind.LEAF:
        return next(leaves)
    if node.kind is Kind.NONE:
        return None
    if node.kind is Kind.NAMEDTUPLE:
        # The parent comes before its children in preorder, so its type must be taken first.
        kind = next(types, None) or collections.namedtuple(node.type_name, [str(key) for key in node.keys])
        return kind(*[build(nodes, leaves, types) for _ in range(node.children)])
    children = [build(nodes, leaves, types) for _ in range(node.children)]
    if node.kind is Kind.LIST:
        return children
    if node.kind is Kind.TUPLE:
        return tuple(children)
    mapping = dict(zip(node.keys, children, strict=True))
    return collections.OrderedDict(mapping) if node.kind is Kind.ORDERED_DICT else mapping


def names(nodes: Sequence[Node], kind: Kind = Kind.LEAF) -> Iterator[str]:
    """Names of the leaves, or of nodes of another kind; checks what ``flatten`` guarantees by construction."""
    stack: list[tuple[str | None, Iterator[Key]]] = [(None, iter([""]))]  # (path of the container, keys still to come)
    for node in nodes:
        while stack and (key := next(stack[-1][1], None)) is None:
            stack.pop()
        if not stack:
            raise errors.TreeError("the nest has nodes after its end")
        prefix = stack[-1][0]
        path = str(key) if not prefix else f"{prefix}/{key}"
        if node.kind is kind:
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
        raise errors.TreeError(f"{describe(node)}: {len(node.keys)} keys for {node.children} children")
    if node.type_name and node.kind is not Kind.NAMEDTUPLE:
        raise errors.TreeError(f"{describe(node)}: has the type name {node.type_name[:80]!r}, expected none")
    if node.kind in (Kind.LEAF, Kind.NONE) and node.children:
        raise errors.TreeError(f"{describe(node)}: has {node.children} children, expected none")
    if not keyed:
        return range(node.children)
    _checked_keys(list(node.keys), (), "nest")
    if len(set(node.keys)) != len(node.keys):
        raise errors.TreeError(f"{describe(node)}: a key comes twice")
    if node.kind is Kind.DICT and list(node.keys) != sorted(node.keys):
        raise errors.TreeError(f"{describe(node)}: keys are not sorted")
    if node.kind is Kind.NAMEDTUPLE:
        words = (node.type_name, *node.keys)
        if not all(isinstance(word, str) and word.isidentifier() and not keyword.iskeyword(word) for word in words):
            raise errors.TreeError(f"{describe(node)}: a name that is not an identifier")
        if len(node.type_name) > limits.TYPE_NAME_BYTES_MAX or any(str(key).startswith("_") for key in node.keys):
            raise errors.TreeError(f"{describe(node)}: a name that is too long or starts with an underscore")
    return node.keys


def _checked_keys(keys: list[Any], path: tuple[Key, ...], what: str) -> list[Key]:
    text = all(type(key) is str for key in keys)
    if not text and not all(type(key) is int and -(2**63) <= key < 2**63 for key in keys):
        kinds = ", ".join(sorted({type(key).__name__ for key in keys}))
        raise errors.TreeError(
            f"{where(what, path)}: keys of type {kinds}, expected all str or all int", expected="str or int", got=kinds
        )
    return keys


def where(what: str, path: tuple[Key, ...]) -> str:
    return f"{what}[{'/'.join(map(str, path))!r}]" if path else what


def describe(node: Node) -> str:
    name = f"named tuple {node.type_name}" if node.kind is Kind.NAMEDTUPLE else node.kind.name.lower()
    return f"{name} of {brief(node.keys)}" if node.keys else f"{name} of {node.children}" if node.children else name


def brief(items: Sequence[Any]) -> str:
    """Enough of a sequence to recognise it, not more than a message should carry."""
    text = ", ".join(str(item)[:60] for item in items[:6])
    return f"({text}, … {len(items)} in all)" if len(items) > 6 else f"({text})"
