"""Trees of parameters that a server must refuse: leaves, and the nests they came from."""

from __future__ import annotations

from typing import Any

from tests.e2e.bad_sessions import refused, spec

from optwire_proto import convert, limits
from optwire_proto.v1 import tensor_pb2 as tensor_pb

Leaf = tensor_pb.LeafSpec
Node = tensor_pb.TreeNode
Key = tensor_pb.TreeKey
F32 = tensor_pb.DATA_TYPE_F32


def wrong_tree(
    name: str, leaves: list[Leaf], fragment: str, *, nodes: list[Node] | None = None, optimizer: str = "adam"
) -> Any:
    tree = tensor_pb.TreeSpec(leaves=leaves, nodes=nodes or [])
    described = convert.spec_to_proto(spec(optimizer, step_size=0.1))
    return refused(name, "INVALID_ARGUMENT", "INVALID_TREE", fragment, lambda b: b.create(tree=tree, spec=described))


def leaf(name: str = "w", shape: tuple[int, ...] = (2,), data_type: int = F32) -> Leaf:
    return Leaf(name=name, shape=shape, data_type=data_type)  # type: ignore[arg-type]


def node(kind: str, *keys: str | int, children: int | None = None, type_name: str = "") -> Node:
    made = [Key(text=key) if isinstance(key, str) else Key(integer=key) for key in keys]
    count = len(keys) if children is None else children
    return Node(kind=Node.Kind.Value(f"KIND_{kind}"), children=count, keys=made, type_name=type_name)


LEAF = node("LEAF")


X, Y = leaf("x"), leaf("y")
NT = "Point"

TREES = [
    wrong_tree("no leaf", [], "the tree has no arrays, expected at least one"),
    wrong_tree("two leaves of one name", [X, X], "two leaves have the name 'x'"),
    wrong_tree("a name with NUL", [leaf("a\0b")], "control characters"),
    wrong_tree("a name with a line break", [leaf("a\nb")], "control characters"),
    wrong_tree("a name with an escape sequence", [leaf("\x1b[31mred")], "control characters"),
    wrong_tree("a name with delete", [leaf("a\x7f")], "control characters"),
    wrong_tree("a name that climbs", [leaf("../../etc/passwd")], "a component that is empty, '.' or '..'"),
    wrong_tree("a name that is absolute", [leaf("/etc/passwd")], "a component that is empty"),
    wrong_tree("a name with a dot component", [leaf("a/./b")], "a component that is empty, '.'"),
    wrong_tree("a name with an empty component", [leaf("a//b")], "a component that is empty"),
    wrong_tree("a name that ends in a slash", [leaf("a/")], "a component that is empty"),
    wrong_tree("a name of 4 KiB", [leaf("x" * 4096)], "4096 bytes, expected at most 1024"),
    wrong_tree("a name of 400 characters and 1,200 bytes", [leaf("語" * 400)], "1200 bytes, expected at most 1024"),
    wrong_tree("an empty name beside another", [leaf(""), X], "a leaf has an empty name"),
    wrong_tree("rank 9", [leaf(shape=(1,) * 9)], "expected at most 8 dimensions"),
    wrong_tree(
        "a negative dimension", [leaf(shape=(3, -1))], "shape (3, -1), expected at most 8 dimensions, each from 0"
    ),
    wrong_tree("the least dimension there is", [leaf(shape=(-(2**63),))], "expected at most 8 dimensions, each from 0"),
    wrong_tree("a huge dimension beside a zero", [leaf(shape=(0, 2**62))], "each from 0 to 1099511627776"),
    wrong_tree(
        "dimensions whose product overflows to little",
        [leaf(shape=(4194305, 4194305, 211106198978564))],
        "each from 0 to",
    ),
    wrong_tree("dimensions whose product overflows", [leaf(shape=(2**31, 2**31))], "leaf 'w'"),
    wrong_tree("dimensions whose product overflows to zero", [leaf(shape=(2**40, 2**40))], "leaf 'w'"),
    wrong_tree("great dimensions beside a zero", [leaf(shape=(0, 2**40, 2**40))], "leaf 'w'"),
    wrong_tree("an unspecified element type", [leaf(data_type=0)], "unknown element type number 0"),
    wrong_tree("an unknown element type", [leaf(data_type=77)], "leaf 'w': unknown element type number 77"),
    wrong_tree("a negative element type", [leaf(data_type=-1)], "unknown element type number -1"),
    wrong_tree(
        "whole numbers for adam", [leaf(data_type=tensor_pb.DATA_TYPE_I32)], "adam is not defined for element type i32"
    ),
    wrong_tree("flags for sgd", [leaf(data_type=tensor_pb.DATA_TYPE_BOOL)], "sgd is not defined", optimizer="sgd"),
    wrong_tree(
        "complex numbers for adam",
        [leaf(data_type=tensor_pb.DATA_TYPE_C64)],
        "adam is not defined for element type c64",
    ),
    wrong_tree("a node of no kind", [X], "unknown kind of node, number 0", nodes=[Node()]),
    wrong_tree("a node of an unknown kind", [X], "unknown kind of node, number 99", nodes=[Node(kind=99)]),  # type: ignore[arg-type]
    wrong_tree("a nest without leaves", [X], "does not name the same leaves", nodes=[node("NONE")]),
    wrong_tree("a nest of other leaves", [X], "does not name the same leaves", nodes=[node("DICT", "y"), LEAF]),
    wrong_tree(
        "a nest in another order", [Y, X], "does not name the same leaves", nodes=[node("DICT", "x", "y"), LEAF, LEAF]
    ),
    wrong_tree("a nest that ends early", [X], "ends before its last container is full", nodes=[node("DICT", "x")]),
    wrong_tree("a nest with nodes after its end", [X], "nodes after its end", nodes=[node("DICT", "x"), LEAF, LEAF]),
    wrong_tree("a leaf with children", [X], "has 1 children, expected none", nodes=[node("LEAF", children=1), LEAF]),
    wrong_tree("a leaf with a key", [X], "1 keys for 0 children", nodes=[node("LEAF", "x", children=0)]),
    wrong_tree(
        "a dict with fewer keys than children",
        [X, Y],
        "1 keys for 2 children",
        nodes=[node("DICT", "x", children=2), LEAF, LEAF],
    ),
    wrong_tree("a list with keys", [leaf("0")], "1 keys for 1 children", nodes=[node("LIST", 0), LEAF]),
    wrong_tree("a key that comes twice", [X, Y], "a key comes twice", nodes=[node("DICT", "x", "x"), LEAF, LEAF]),
    wrong_tree("keys out of order", [Y, X], "keys are not sorted", nodes=[node("DICT", "y", "x"), LEAF, LEAF]),
    wrong_tree(
        "keys of two kinds", [leaf("0"), X], "expected all str or all int", nodes=[node("DICT", 0, "x"), LEAF, LEAF]
    ),
    wrong_tree(
        "a key without a value",
        [leaf("0")],
        "key",
        nodes=[Node(kind=Node.KIND_DICT, children=1, keys=[Key()]), LEAF],
    ),
    wrong_tree("a dict with a type name", [X], "type name", nodes=[node("DICT", "x", type_name=NT), LEAF]),
    wrong_tree("a named tuple without a name", [X], "not an identifier", nodes=[node("NAMEDTUPLE", "x"), LEAF]),
    wrong_tree(
        "a named tuple whose name is code",
        [X],
        "not an identifier",
        nodes=[node("NAMEDTUPLE", "x", type_name="P(x)"), LEAF],
    ),
    wrong_tree(
        "a field that is a keyword",
        [leaf("def")],
        "not an identifier",
        nodes=[node("NAMEDTUPLE", "def", type_name=NT), LEAF],
    ),
    wrong_tree(
        "a field with an underscore first",
        [leaf("_x")],
        "underscore",
        nodes=[node("NAMEDTUPLE", "_x", type_name=NT), LEAF],
    ),
    wrong_tree(
        "a field that is a number", [leaf("0")], "not an identifier", nodes=[node("NAMEDTUPLE", 0, type_name=NT), LEAF]
    ),
    wrong_tree("a long type name", [X], "too long", nodes=[node("NAMEDTUPLE", "x", type_name="P" * 256), LEAF]),
    wrong_tree(
        "a nest 66 deep", [leaf("/".join("0" * 66))], "deeper than 64", nodes=[*[node("LIST", children=1)] * 66, LEAF]
    ),
    wrong_tree(
        "a list that lacks nearly all its children",
        [leaf("0")],
        "ends before",
        nodes=[node("LIST", children=2**32 - 1), LEAF],
    ),
    wrong_tree(
        "too many leaves",
        [leaf(f"{i}", ()) for i in range(limits.LEAVES_MAX + 1)],
        "65537 leaves, expected at most 65536",
    ),
    wrong_tree("too many nodes", [X], "nodes, expected at most 131072", nodes=[node("NONE")] * (limits.NODES_MAX + 1)),
]
