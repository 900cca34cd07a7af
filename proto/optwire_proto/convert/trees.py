"""Tree specs as messages."""

from __future__ import annotations

from optwire_proto import errors, nests, tensors, trees
from optwire_proto.v1 import tensor_pb2 as tensor_pb

_DATA_TYPES = {name: getattr(tensor_pb, f"DATA_TYPE_{name.upper()}") for name in tensors.DTYPE_NAMES}
_DTYPE_NAMES = {number: name for name, number in _DATA_TYPES.items()}


def tree_to_proto(tree: trees.TreeSpec) -> tensor_pb.TreeSpec:
    return tensor_pb.TreeSpec(
        leaves=[
            tensor_pb.LeafSpec(name=leaf.name, shape=leaf.shape, data_type=_DATA_TYPES[leaf.dtype])
            for leaf in tree.leaves
        ],
        nodes=[
            tensor_pb.TreeNode(
                kind=tensor_pb.TreeNode.Kind.ValueType(node.kind),
                children=node.children,
                keys=[
                    tensor_pb.TreeKey(text=key) if isinstance(key, str) else tensor_pb.TreeKey(integer=key)
                    for key in node.keys
                ],
                type_name=node.type_name,
            )
            for node in tree.nodes
        ],
    )


def tree_from_proto(message: tensor_pb.TreeSpec) -> trees.TreeSpec:
    """Raises TreeError as ``TreeSpec`` and its parts do."""
    leaves = []
    for leaf in message.leaves:
        dtype = _DTYPE_NAMES.get(leaf.data_type)
        if dtype is None:
            raise errors.TreeError(
                f"leaf {leaf.name[:80]!r}: unknown element type number {leaf.data_type}", subject=leaf.name[:80]
            )
        leaves.append(trees.LeafSpec(leaf.name, tuple(leaf.shape), dtype))
    nodes = []
    for node in message.nodes:
        nodes.append(nests.Node(_kind(node.kind), node.children, tuple(map(_key, node.keys)), node.type_name))
    return trees.TreeSpec(tuple(leaves), tuple(nodes))


def _key(message: tensor_pb.TreeKey) -> nests.Key:
    which = message.WhichOneof("key")
    if which is None:
        raise errors.TreeError("a key of the nest without a value", got="nothing")
    return message.text if which == "text" else message.integer


def _kind(number: int) -> nests.Kind:
    try:
        return nests.Kind(number)
    except ValueError as exc:
        raise errors.TreeError(f"unknown kind of node, number {number}", got=str(number)) from exc
