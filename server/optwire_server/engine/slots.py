"""The arrays of a state by name: which leaf each belongs to, and what it is there.

Names are the protocol's: "SLOT/LEAF" where an array belongs to a leaf, "state/PATH" elsewhere. Parameters are found by
following the arrays that the rule reads them from; slots by the lists with one entry a leaf that rules and optax keep.
"""

from __future__ import annotations

import bisect
import dataclasses
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from optwire_proto import errors, tensors, trees
from optwire_server import optimizers

# Names that are ours, whatever an optimizer calls its slots.
PARAMS = "params"
STATE = "state"
SKIPPED = f"{STATE}/skipped"

# What may stand between a parameter and the array that it is kept in.
_CASTS = ("convert_element_type", "reshape")
# What cannot stand in a component of a name.
_UNFIT = re.compile(r"[/\x00-\x1f\x7f]|^\.{1,2}$|^$")

# Of how many sessions' leaves the arrays are kept by name.
_KNOWN_MAX = 16

# A key of a container as JAX has it, and what is there.
Child = tuple[Any, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where an array stands in a state.

    Attributes:
      parts: the way to it, without the position of its leaf: names, and positions as digits.
      leaf: which it belongs to, by position; None: to none.
      named: how many parts there are up to the last that is a name.
    """

    parts: tuple[str, ...]
    leaf: int | None
    named: int


class Known:
    """What the arrays of a state are, by the names of the leaves, for the last sessions that asked. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrays: dict[tuple[str, ...], tuple[trees.LeafSpec, ...]] = {}

    def get(self, leaves: Sequence[str]) -> tuple[trees.LeafSpec, ...] | None:
        """The arrays for leaves of these names, where they are known."""
        with self._lock:
            return self._arrays.get(tuple(leaves))

    def put(self, leaves: Sequence[str], arrays: tuple[trees.LeafSpec, ...]) -> tuple[trees.LeafSpec, ...]:
        """Keeps the arrays for leaves of these names, and returns them."""
        with self._lock:
            self._arrays[tuple(leaves)] = arrays
            if len(self._arrays) > _KNOWN_MAX:
                del self._arrays[next(iter(self._arrays))]
        return arrays


def names(state: Any, read: Callable[[Any], Sequence[Any]], leaves: Sequence[str]) -> tuple[str, ...]:
    """Unique names of a state's arrays, in JAX's order. The same spec gives the same ones, whatever leaves are added.

    Args:
      state: abstract, of a rule.
      read: from state to parameters, one a leaf.
      leaves: names of the leaves.
    """
    params = _params(state, read)
    places = list(_Walk(params).places(state, len(leaves)))
    slots = _slots(place for index, place in enumerate(places) if index not in params)
    made: dict[str, None] = {}
    for index, place in enumerate(places):
        leaf = params.get(index, place.leaf)
        slot = PARAMS if index in params else slots[place.parts, place.named]
        name = f"{STATE}/{slot}" if leaf is None else f"{slot}/{leaves[leaf]}" if leaves[leaf] else slot
        while name in made or name == SKIPPED:  # whatever an optimizer thinks of
            name = f"{name}_"
        made[name] = None
    return tuple(made)


def leaf_specs(state: Any, named: Sequence[str]) -> tuple[trees.LeafSpec, ...]:
    """Name, shape and element type of every array of a state; keys of randomness as the numbers they are made of.

    Raises:
      TreeError: an array that the protocol has no words for.
    """
    return tuple(
        trees.LeafSpec(name, *_form(name, array)) for name, array in zip(named, jax.tree.leaves(state), strict=True)
    )


def to_numpy(array: jax.Array) -> np.ndarray:
    """An array of a state as it travels; on a CPU a view of it."""
    return np.asarray(jax.random.key_data(array) if _is_key(array) else array)


def from_numpy(array: tensors.Array, old: jax.Array) -> jax.Array:
    """A new array for the place of an old one; copies."""
    made = jax.numpy.array(array, copy=True)
    return jax.random.wrap_key_data(made, impl=jax.random.key_impl(old)) if _is_key(old) else made


def _is_key(array: Any) -> bool:
    return bool(jax.numpy.issubdtype(array.dtype, jax.dtypes.extended))


def _form(name: str, array: Any) -> tuple[tuple[int, ...], str]:
    if _is_key(array):
        data = jax.eval_shape(jax.random.key_data, array)
        return data.shape, "u32"
    dtype = tensors.dtype_name(np.dtype(array.dtype))
    if dtype is None:
        raise errors.TreeError(f"{name}: element type {array.dtype} cannot be sent", subject=name, got=f"{array.dtype}")
    return tuple(array.shape), dtype


def _params(state: Any, read: Callable[[Any], Sequence[Any]]) -> dict[int, int]:
    """Position of the leaf by position of the array that it is read from, where it is one."""
    jaxpr = jax.make_jaxpr(read)(state).jaxpr
    whence = {id(variable): index for index, variable in enumerate(jaxpr.invars)}
    for equation in jaxpr.eqns:
        if equation.primitive.name in _CASTS and id(equation.invars[0]) in whence:
            whence[id(equation.outvars[0])] = whence[id(equation.invars[0])]
    return {whence[id(out)]: leaf for leaf, out in enumerate(jaxpr.outvars) if id(out) in whence}


class _Walk:
    """One walk through a state, array by array in JAX's order."""

    def __init__(self, params: Mapping[int, int]) -> None:
        self._params = sorted(params.items())

    def places(self, state: Any, leaves: int) -> Iterator[Place]:
        """The place of every array of a state for so many leaves."""
        return self._inside(state, 0, Place((), None, 0), range(leaves))

    def _inside(self, node: Any, first: int, place: Place, scope: Sequence[int]) -> Iterator[Place]:
        """Places inside a node that belongs to no single leaf.

        Args:
          node: of the state.
          first: position of its first array.
          place: the node's.
          scope: leaves that it may hold something for.
        """
        children = _children(node)
        if children is None:
            yield place
            return
        scope = self._held(first, _count(node)) or scope
        owners = self._owners(node, children, first, scope)
        for position, (key, child) in enumerate(children):
            if isinstance(node, optimizers.OptimizerState):
                yield from _seed_places(child, scope)
            elif owners is not None:
                yield from _below(child, dataclasses.replace(place, leaf=owners[position]))
            else:
                yield from self._inside(child, first, _beneath(place, key), scope)
            first += _count(child)

    def _held(self, first: int, count: int) -> list[int]:
        """Leaves whose parameters are among some arrays."""
        start = bisect.bisect_left(self._params, (first, -1))
        stop = bisect.bisect_left(self._params, (first + count, -1))
        return sorted(leaf for _, leaf in self._params[start:stop])

    def _owners(self, node: Any, children: Sequence[Child], first: int, scope: Sequence[int]) -> list[int] | None:
        """The leaf that each child of a node belongs to; None where they belong to none.

        A list stands for the leaves in order, as the parameters themselves do.
        """
        if type(node) is not list or len(children) != len(scope):
            return None
        for (_, child), owner in zip(children, scope, strict=True):
            if self._held(first, count := _count(child)) not in ([], [owner]):
                return None
            first += count
        return list(scope)


def _seed_places(packed: Sequence[Any], scope: Sequence[int]) -> Iterator[Place]:
    """Places in the state of one of the seed's optimizers: for each leaf the parameter, then its slots."""
    for leaf, arrays in zip(scope if packed else (), packed, strict=True):  # a group's, of which no leaf is here
        for position, array in enumerate(arrays):
            yield from _below(array, Place((f"slot{position}",), leaf, 1))


def _below(node: Any, place: Place) -> Iterator[Place]:
    """Places inside a node that belongs to one leaf, or is an array."""
    children = _children(node)
    if children is None:
        yield place
        return
    if isinstance(node, optimizers.OptimizerState) and place.leaf is not None:
        yield from _seed_places(node.packed_state, [place.leaf])
        return
    for key, child in children:
        yield from _below(child, _beneath(place, key))


def _beneath(place: Place, key: Any) -> Place:
    """The place of a child."""
    text = getattr(key, "name", None) or getattr(key, "key", None)
    if isinstance(text, str):
        return Place((*place.parts, _UNFIT.sub("_", text)), place.leaf, len(place.parts) + 1)
    number = getattr(key, "idx", getattr(key, "key", 0))
    return dataclasses.replace(place, parts=(*place.parts, str(number)))


def _children(node: Any) -> list[Child] | None:
    """(key, child) pairs of a container; None where the node is an array."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda inner: inner is not node)
    if len(pairs) == 1 and not pairs[0][0]:
        return None
    return [(path[0], child) for path, child in pairs]


def _count(node: Any) -> int:
    return len(jax.tree.leaves(node))


def _slots(places: Iterable[Place]) -> dict[tuple[tuple[str, ...], int], str]:
    """The shortest ends of places that tell them apart, by what is left of a place without its leaf."""
    leaves: dict[tuple[tuple[str, ...], int], set[int | None]] = {}
    for place in places:
        leaves.setdefault((place.parts, place.named), set()).add(place.leaf)
    ends = {key: _ends(*key) for key in leaves}
    longer = True
    while longer:
        longer = False
        used: dict[tuple[str, int | None], list[tuple[tuple[str, ...], int]]] = {}
        for key, own in leaves.items():
            for leaf in own:
                used.setdefault((ends[key][0], leaf), []).append(key)
        for (end, leaf), keys in used.items():
            if len(keys) > 1 or (leaf is not None and end in (PARAMS, STATE)):
                for key in keys:
                    if len(ends[key]) > 1 and ends[key][0] == end:
                        ends[key] = ends[key][1:]
                        longer = True
    return {key: left[0] for key, left in ends.items()}


def _ends(parts: tuple[str, ...], named: int) -> list[str]:
    """What a slot may be called, shortest first: its name, then with positions inside, then with what is around."""
    if not named:
        return [".".join(parts) or "array"]
    return [parts[named - 1], *(".".join(parts[start:]) for start in range(named - 1, -1, -1))]
