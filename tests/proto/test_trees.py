"""Nests of arrays: JAX's order, the way there and back, what does not match, what is too much."""

from __future__ import annotations

import collections
import string
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optwire_proto import convert, errors, limits, nests, trees
from optwire_proto.v1 import tensor_pb2 as tensor_pb


class Point(NamedTuple):
    x: Any
    y: Any


class Single(NamedTuple):
    value: Any


Deep = collections.namedtuple("Deep", ["b", "a"])
F32 = np.float32


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, F32)


# ------------------------------------------------------------------------------------------------ order, there and back

NESTS = {
    "one array": ones(2),
    "a scalar": np.float32(3),
    "a dict": {"w": ones(2), "b": ones(3)},
    "a dict that is not sorted": {"z": ones(1), "a": ones(2), "M": ones(3), "é": ones(4)},
    "a dict with whole numbers as keys": {10: ones(1), 9: ones(2), -1: ones(3)},
    "an ordered dict": collections.OrderedDict([("z", ones(1)), ("a", ones(2))]),
    "a list": [ones(1), ones(2), ones(3)],
    "a list of eleven": [ones(i) for i in range(11)],
    "a tuple": (ones(1), ones(2)),
    "a tuple of one": (ones(1),),
    "a named tuple": Point(ones(1), ones(2)),
    "a named tuple whose fields are not sorted": Deep(ones(1), ones(2)),
    "none beside an array": [None, ones(1), None],
    "empty containers": [{}, [], (), collections.OrderedDict(), ones(1)],
    "named tuples in named tuples": Point(Single(ones(1)), Point(Single(ones(2)), None)),
    "everything": {"a": [Point(ones(1), {"k": (ones(2), None)}), Single(ones(3))], "b": {1: {"x": ones(4)}, 0: []}},
    "keys with slashes": {"a/b": ones(1), "a": {"c": ones(2)}},
    "layers as torch names them": {"0.weight": ones(2, 2), "0.bias": ones(2), "10.weight": ones(1)},
}


def assert_like_jax(nest: Any) -> None:
    flat = trees.flatten(nest)
    leaves, _ = jax.tree.flatten(nest)
    assert len(flat.arrays) == len(leaves)
    for ours, theirs in zip(flat.arrays, leaves, strict=True):
        assert ours.ctypes.data == np.asarray(theirs).ctypes.data or np.array_equal(ours, theirs)
        assert ours.shape == np.shape(theirs)


def assert_equal(ours: Any, nest: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(nest)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(nest), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
def test_leaves_come_in_the_order_of_jax(nest: Any):
    assert_like_jax(nest)


@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
def test_a_nest_survives_the_way_there_and_back(nest: Any):
    flat = trees.flatten(nest)
    assert_equal(trees.unflatten(flat.spec, flat.arrays, flat.types), nest)
    assert convert.tree_from_proto(convert.tree_to_proto(flat.spec)) == flat.spec
    wire = tensor_pb.TreeSpec.FromString(convert.tree_to_proto(flat.spec).SerializeToString())
    assert convert.tree_from_proto(wire) == flat.spec


@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
def test_a_nest_matches_itself_fast_and_slow(nest: Any):
    flat = trees.flatten(nest)
    matched = trees.match(flat.spec, nest)
    assert [array.tobytes() for array in matched] == [array.tobytes() for array in flat.arrays]


def test_names_are_paths():
    nest = {"b": [ones(1), Point(ones(1), ones(1))], "a": {2: ones(1), 10: ones(1)}}
    names = [leaf.name for leaf in trees.flatten(nest).spec.leaves]
    assert names == ["a/2", "a/10", "b/0", "b/1/x", "b/1/y"]


def test_an_array_by_itself_has_an_empty_name():
    assert trees.flatten(ones(2)).spec.leaves == (trees.LeafSpec("", (2,), "f32"),)


def test_types_met_again_are_given_back_and_others_are_made():
    nest = {"p": Point(ones(1), Single(ones(2)))}
    flat = trees.flatten(nest)
    again = trees.unflatten(flat.spec, flat.arrays, flat.types)
    assert type(again["p"]) is Point
    assert type(again["p"].y) is Single
    made = trees.unflatten(flat.spec, flat.arrays)
    assert type(made["p"]).__name__ == "Point"
    assert made["p"]._fields == ("x", "y")
    assert trees.match(flat.spec, made) is not None


def test_offsets_are_where_leaves_start():
    spec = trees.flatten({"a": ones(3), "b": np.zeros((0, 4), F32), "c": np.ones(2, np.float64)}).spec
    assert spec.offsets == (0, 12, 12, 28)
    assert spec.payload_bytes == 28


KEYS = st.text(string.ascii_letters + string.digits + "._- é語", min_size=1, max_size=5).filter(
    lambda key: key not in (".", "..")
)
LEAVES = st.builds(
    lambda shape, value: np.full(shape, value, F32), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 99)
)
RECORDS = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=3, unique=True)


def containers(child: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.dictionaries(KEYS, child, max_size=4),
        st.dictionaries(st.integers(-(2**63), 2**63 - 1), child, max_size=4),
        st.lists(st.tuples(KEYS, child), max_size=4).map(collections.OrderedDict),
        st.lists(child, max_size=4),
        st.lists(child, max_size=3).map(tuple),
        st.tuples(RECORDS, st.lists(child, min_size=3, max_size=3)).map(
            lambda made: collections.namedtuple("Record", made[0])(*made[1][: len(made[0])])
        ),
    )


ANY_NEST = st.recursive(LEAVES | st.none(), containers, max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(nest=ANY_NEST)
def test_any_nest_comes_in_the_order_of_jax_and_survives_the_way_there_and_back(nest: Any):
    if not jax.tree.leaves(nest):
        with pytest.raises(errors.TreeError, match="no arrays"):
            trees.flatten(nest)
        return
    assert_like_jax(nest)
    flat = trees.flatten(nest)
    assert_equal(trees.unflatten(flat.spec, flat.arrays, flat.types), nest)
    assert convert.tree_from_proto(convert.tree_to_proto(flat.spec)) == flat.spec
    assert [array.tobytes() for array in trees.match(flat.spec, nest)] == [array.tobytes() for array in flat.arrays]
    made = trees.unflatten(flat.spec, flat.arrays)
    assert [array.tobytes() for array in trees.match(flat.spec, made)] == [array.tobytes() for array in flat.arrays]


@settings(max_examples=200, deadline=None)
@given(one=ANY_NEST, other=ANY_NEST)
def test_nests_match_exactly_where_jax_sees_one_structure(one: Any, other: Any):
    if not jax.tree.leaves(one):
        return
    spec = trees.flatten(one).spec
    same = [np.shape(leaf) for leaf in jax.tree.leaves(one)] == [np.shape(leaf) for leaf in jax.tree.leaves(other)]
    # JAX tells types apart that have one name; we cannot, they come from different processes.
    ours, theirs = (str(jax.tree.structure(nest)) for nest in (one, other))
    if same and ours == theirs:
        trees.match(spec, other)
    else:
        with pytest.raises(errors.TreeMismatchError):
            trees.match(spec, other)


# -------------------------------------------------------------------------------------------------- what does not match

MODEL = {"b": ones(3), "w": ones(2, 3)}
WRONG = {
    "a leaf is missing": ({"b": ones(3)}, "grads: 1 of the leaves missing: (w)"),
    "a leaf too much": (MODEL | {"c": ones(1)}, "grads: 1 of the leaves not in the session's tree: (c)"),
    "a leaf by another name": ({"b": ones(3), "W": ones(2, 3)}, "1 of the leaves missing: (w)"),
    "another shape": (MODEL | {"b": ones(4)}, "grads['b']: shape (4,), expected (3,)"),
    "a transposed shape": (MODEL | {"w": ones(3, 2)}, "grads['w']: shape (3, 2), expected (2, 3)"),
    "another rank": (MODEL | {"b": ones(3, 1)}, "grads['b']: shape (3, 1), expected (3,)"),
    "another element type": (MODEL | {"b": np.ones(3)}, "grads['b']: element type f64, expected f32"),
    "whole numbers": (MODEL | {"b": np.ones(3, int)}, "grads['b']: element type i64, expected f32"),
    "another container": (collections.OrderedDict(MODEL), "ordered_dict of (b, w), expected dict of (b, w)"),
    "none for an array": (MODEL | {"b": None}, "grads['b']: None, expected an array"),
    "an empty place too much": (MODEL | {"c": None}, "the nest differs from the session's: dict of (b, c, w)"),
    "a number for an array": (MODEL | {"b": 1.0}, "grads['b']: float, expected an array or a dict"),
    "objects": (MODEL | {"b": np.array([None] * 3)}, "grads['b']: element type object, expected one of f32"),
    "nothing": (None, "the tree has no arrays"),
    "an empty dict": ({}, "the tree has no arrays"),
    "an array by itself": (ones(3), "2 of the leaves missing: (b, w)"),
}


@pytest.mark.parametrize(("nest", "fragment"), WRONG.values(), ids=WRONG)
def test_a_nest_that_does_not_match_is_refused_by_name(nest: Any, fragment: str):
    with pytest.raises(errors.TreeMismatchError) as caught:
        trees.match(trees.flatten(MODEL).spec, nest)
    assert fragment in str(caught.value)


def test_a_list_is_no_tuple():
    with pytest.raises(errors.TreeMismatchError, match="tuple of 2, expected list of 2"):
        trees.match(trees.flatten([ones(1), ones(1)]).spec, (ones(1), ones(1)))


def test_a_named_tuple_of_another_name_or_other_fields_is_refused():
    spec = trees.flatten(Point(ones(1), ones(1))).spec
    other = collections.namedtuple("Other", ["x", "y"])
    with pytest.raises(errors.TreeMismatchError, match="named tuple Other .*expected named tuple Point"):
        trees.match(spec, other(ones(1), ones(1)))
    with pytest.raises(errors.TreeMismatchError, match="missing"):
        trees.match(spec, collections.namedtuple("Point", ["x", "z"])(ones(1), ones(1)))


def test_a_tree_without_a_nest_takes_leaves_by_name_in_any_order():
    spec = trees.TreeSpec((trees.LeafSpec("w", (2, 3), "f32"), trees.LeafSpec("b", (3,), "f32")))
    arrays = trees.match(spec, {"b": ones(3) * 2, "w": ones(2, 3)})
    assert [array.shape for array in arrays] == [(2, 3), (3,)]
    assert list(trees.unflatten(spec, arrays)) == ["w", "b"]
    with pytest.raises(errors.TreeMismatchError, match="1 of the leaves missing: \\(b\\)"):
        trees.match(spec, {"w": ones(2, 3)})
    with pytest.raises(errors.TreeMismatchError, match="not in the session's tree: \\(c\\)"):
        trees.match(spec, {"w": ones(2, 3), "b": ones(3), "c": ones(1)})


@pytest.mark.parametrize(
    "array", [np.ones((3, 2), F32).T, np.asfortranarray(ones(2, 3)), ones(2, 3).astype(">f4"), ones(4, 6)[::2, ::2]]
)
def test_memory_layout_is_no_difference(array: np.ndarray):
    values = np.arange(6, dtype=F32).reshape(2, 3)
    array = array.copy(order="K") if array.flags.owndata else array
    array[...] = values
    (matched,) = trees.match(trees.flatten([ones(2, 3)]).spec, [array])
    assert matched.tobytes() == values.tobytes()


# ------------------------------------------------------------------------------------------------------ what is refused

REFUSED = {
    "keys of two kinds": ({1: ones(1), "a": ones(1)}, "keys of type int, str, expected all str or all int"),
    "flags as keys": ({True: ones(1)}, "keys of type bool"),
    "tuples as keys": ({("a",): ones(1)}, "keys of type tuple"),
    "keys beyond 64 bits": ({2**63: ones(1)}, "keys of type int"),
    "a set": ({"a": {1.0}}, "params['a']: set, expected an array"),
    "a default dict": (collections.defaultdict(list, a=ones(1)), "params: defaultdict, expected an array"),
    "a number": ([1.0], "params['0']: float, expected an array"),
    "text": (["x"], "params['0']: str, expected an array"),
    "text as an array": ([np.array("x")], "params['0']: element type <U1, expected one of f32"),
    "dates": ([np.zeros(1, "M8[s]")], "element type datetime64[s]"),
    "records": ([np.zeros(1, [("x", F32)])], "expected one of f32"),
    "an empty key": ({"a": {"": ones(1)}}, "leaf name 'a/': a component that is empty"),
    "a key that climbs": ({"..": ones(1)}, "a component that is empty, '.' or '..'"),
    "a key with a line break": ({"a\nb": ones(1)}, "control characters"),
    "a key with half a surrogate pair": ({"\ud800": ones(1)}, "not valid Unicode"),
    "a long key": ({"k" * 1025: ones(1)}, "1025 bytes, expected at most 1024"),
    "two paths of one name": ({"a": {"b": ones(1)}, "a/b": ones(1)}, "two leaves have the name 'a/b'"),
    "rank 9": ([np.ones((1,) * 9, F32)], "expected at most 8 dimensions"),
}


@pytest.mark.parametrize(("nest", "fragment"), REFUSED.values(), ids=REFUSED)
def test_a_nest_that_cannot_be_served_is_refused_by_name(nest: Any, fragment: str):
    with pytest.raises(errors.TreeError) as caught:
        trees.flatten(nest)
    assert fragment in str(caught.value)


def test_a_nest_may_be_as_deep_as_the_limit_and_no_deeper():
    def nested(depth: int) -> Any:
        return [nested(depth - 1)] if depth else ones(1)

    flat = trees.flatten(nested(limits.DEPTH_MAX))
    assert convert.tree_from_proto(convert.tree_to_proto(flat.spec)) == flat.spec
    with pytest.raises(errors.TreeError, match="nested deeper than 64"):
        trees.flatten(nested(limits.DEPTH_MAX + 1))


def test_a_tree_may_have_as_many_leaves_as_the_limit_and_no_more():
    leaves = tuple(trees.LeafSpec(str(i), (), "f32") for i in range(limits.LEAVES_MAX))
    assert trees.TreeSpec(leaves).payload_bytes == 4 * limits.LEAVES_MAX
    with pytest.raises(errors.TreeError, match="65537 leaves, expected at most 65536"):
        trees.TreeSpec((*leaves, trees.LeafSpec("more", (), "f32")))


@pytest.mark.parametrize("shape", [(2**40,), (0, 2**40), (1,) * 8, ()])
def test_a_shape_at_the_limit_is_a_shape(shape: tuple[int, ...]):
    assert trees.LeafSpec("w", shape, "f32").shape == shape


@pytest.mark.parametrize("shape", [(2**40 + 1,), (-1,), (1,) * 9, (2**40, 2**40), (0, 2**40, 2**40), (2**31, 2**31)])
def test_a_shape_beyond_the_limits_is_refused(shape: tuple[int, ...]):
    with pytest.raises(errors.TreeError, match="leaf 'w': shape"):
        trees.LeafSpec("w", shape, "f32")


@settings(max_examples=300, deadline=None)
@given(
    leaves=st.lists(st.sampled_from(["a", "b", "0", "1", "a/b", "a/0"]), max_size=3),
    nodes=st.lists(
        st.builds(
            nests.Node,
            st.sampled_from(nests.Kind),
            st.integers(0, 3),
            st.lists(st.sampled_from(["a", "b", 0, 1]), max_size=3).map(tuple),
            st.sampled_from(["", "T"]),
        ),
        max_size=5,
    ),
)
def test_nodes_from_outside_are_refused_or_make_a_nest_that_comes_back(leaves: list[str], nodes: list[nests.Node]):
    try:
        spec = trees.TreeSpec(tuple(trees.LeafSpec(name, (1,), "f32") for name in leaves), tuple(nodes))
    except errors.TreeError:
        return
    nest = trees.unflatten(spec, [np.full(1, i, F32) for i in range(len(leaves))])
    if nodes:
        again = trees.flatten(nest)
        assert again.spec == spec
        assert [int(array[0]) for array in again.arrays] == list(range(len(leaves)))
