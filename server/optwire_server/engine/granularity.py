"""How finely a session's state may be cut into blocks, read off the dataflow of its update on abstract values.

For every value in the jaxpr of an update, `_Flow` says which gradients and state arrays reach it: `near` those that
reach an element from the same element of an array of the same shape, `far` those that reach it in any other way. A
value that is not `uniform` also depends on where its elements lie: an iota, random bits, a table. A primitive that is
not in the tables below mixes all it touches, so that not knowing gives the coarser class, never the finer.

A class says what reaches what, and for these shapes only. That leaves compute alike, or that a constant did not come
from a leaf's shape, does not follow from it. Must not know sessions, specs or devices, and computes nothing.
"""

from __future__ import annotations

import collections
import enum
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core


class Granularity(enum.StrEnum):
    """What a session may be cut into: flat ranges of elements, tensors, or nothing smaller than the whole tree."""

    ELEMENT = "element"
    TENSOR = "tensor"
    TREE = "tree"


def derive(update: Callable[[Any, Any], Any], grads: Sequence[Any], state: Any) -> Granularity:
    """The finest granularity that the dataflow of an update allows.

    A leaf is a gradient and all state that it is connected with, whichever way. State whose successor no gradient
    reaches belongs to no leaf, and many leaves may read it: a count of steps, a key, a table of coefficients. Such
    state allows ELEMENT if it is of shape () or read by one leaf alone, otherwise TENSOR at best. Parameters are taken
    to follow their own gradient if it goes anywhere at all.

    Args:
      update: (gradients, state) -> state; traced, never run.
      grads: one abstract array, such as a ShapeDtypeStruct, for each leaf.
      state: a nest of abstract arrays, parameters included. The update returns it in the structure it came in.

    Raises:
      TypeError: the update returns another structure than it was given, or other shapes.
    """
    closed, successor = jax.make_jaxpr(update, return_shape=True)(list(grads), state)
    _check_successor(state, successor)
    if closed.effects:
        return Granularity.TREE  # A callback or a mutable array may carry anything past the dataflow.
    count = len(closed.in_avals) - len(closed.out_avals)
    flows = _walk(closed, [_Flow(near=1 << node) for node in range(len(closed.in_avals))])
    successors = dict(enumerate(flows, start=count))
    links = {node: flow.sources for node, flow in successors.items()}
    common = _closed(links, sum(1 << node for node in links))
    if _idle_leaf_may_be_read(closed.in_avals, count, links, common) or not _apart(count, links, common):
        return Granularity.TREE
    scalars = _closed(links, sum(1 << node for node in _bits(common) if closed.in_avals[node].shape == ()))
    arrays = [flow for node, flow in successors.items() if not scalars >> node & 1]
    in_place = all(flow.uniform and not flow.far & ~scalars for flow in arrays)
    return Granularity.ELEMENT if in_place and _apart(count, links, scalars) else Granularity.TENSOR


class _Flow(NamedTuple):
    """What reaches a value. The sets of sources are bit masks over the inputs of the update: gradients, then state."""

    near: int = 0
    far: int = 0
    uniform: bool = True

    @property
    def sources(self) -> int:
        return self.near | self.far


# ---------------------------------------------------------------------------------------------------------------------
# Which state belongs to which leaf.


def _check_successor(state: Any, successor: Any) -> None:
    expected: Any = jax.tree.structure(state)
    got: Any = jax.tree.structure(successor)
    if got != expected:
        raise TypeError(f"update: returned the structure {got}, expected that of the state it was given, {expected}")
    for k, pair in enumerate(zip(jax.tree.leaves(state), jax.tree.leaves(successor), strict=True)):
        before, after = map(np.shape, pair)
        if before != after:
            raise TypeError(f"update: array {k} of the state came back in shape {after}, expected {before}")


def _closed(links: dict[int, int], nodes: int) -> int:
    """Those of some nodes whose successors depend on one another alone; `links` are the sources of every successor."""
    while True:
        bound = sum(1 << node for node in _bits(nodes) if links[node] & ~nodes)
        if not bound:
            return nodes
        nodes &= ~bound


def _apart(count: int, links: dict[int, int], free: int) -> bool:
    """Whether nothing but what is `free` connects any two of the `count` leaves."""
    grads = (1 << count) - 1
    if any((sources & grads).bit_count() > 1 for sources in links.values()):
        return False  # Where the whole tree meets, this alone finds it, and soon.
    components = _connected(count + len(links), {node: sources & ~free for node, sources in links.items()})
    return all(sum(node < count for node in members) <= 1 for members in components)


def _idle_leaf_may_be_read(avals: Sequence[Any], count: int, links: dict[int, int], common: int) -> bool:
    """Whether other state may depend on the parameters of a leaf whose gradient goes nowhere.

    Which state these are is not known. They look like the gradient, and no gradient reaches them.
    """
    kinds = [(aval.shape, bool(jax.numpy.issubdtype(aval.dtype, jax.numpy.inexact))) for aval in avals]
    reached = functools.reduce(operator.or_, links.values(), 0)
    idle = collections.Counter(kinds[node] for node in range(count) if not reached >> node & 1)
    if not idle:
        return False
    read = {kinds[source] for node, sources in links.items() for source in _bits(sources & common & ~(1 << node))}
    return not idle <= collections.Counter(kinds[node] for node in _bits(common)) or bool(idle.keys() & read)


def _connected(count: int, links: dict[int, int]) -> list[list[int]]:
    """The connected components of the undirected graph with an edge from each node of `links` to its sources."""
    above = list(range(count))

    def root(node: int) -> int:
        while above[node] != node:
            above[node] = above[above[node]]
            node = above[node]
        return node

    for node, sources in links.items():
        for source in _bits(sources):
            above[root(source)] = root(node)
    components = collections.defaultdict(list)
    for node in range(count):
        components[root(node)].append(node)
    return list(components.values())


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


# ---------------------------------------------------------------------------------------------------------------------
# The dataflow.

# Each element of the result is a function of the same element of each operand; operands of one element are spread.
# fmt: off
_ELEMENTWISE = frozenset({
    "add", "add_any", "sub", "mul", "mulhi", "div", "rem", "neg", "abs", "sign", "max", "min", "clamp",
    "square", "sqrt", "rsqrt", "cbrt", "pow", "integer_pow", "exp", "exp2", "expm1", "log", "log1p", "logistic",
    "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
    "erf", "erfc", "erf_inv", "lgamma", "digamma", "polygamma", "zeta", "igamma", "igammac", "igamma_grad_a",
    "regularized_incomplete_beta", "bessel_i0e", "bessel_i1e",
    "eq", "ne", "lt", "le", "gt", "ge", "eq_to", "lt_to", "le_to", "is_finite", "select_n",
    "and", "or", "xor", "not", "shift_left", "shift_right_arithmetic", "shift_right_logical", "clz", "population_count",
    "round", "floor", "ceil", "nextafter", "reduce_precision", "convert_element_type",
    "real", "imag", "complex", "conj",
    "copy", "copy_p", "name", "stop_gradient",
})
# fmt: on
# Each element of the result is an element of the operand, and the same one where the shape stays as it was.
_MOVING = frozenset({"broadcast_in_dim", "reshape", "slice", "squeeze"})
# A function called once on all operands, and the parameter that holds it.
_CALLS = {
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
}


def _walk(function: Any, inputs: Sequence[_Flow]) -> list[_Flow]:
    """The flows of a jaxpr's results, given those of its arguments. `function` is a jaxpr, closed or without consts."""
    jaxpr = getattr(function, "jaxpr", function)
    flows: dict[Any, _Flow] = dict(zip(jaxpr.invars, inputs, strict=True))
    flows.update(zip(jaxpr.constvars, map(_constant, getattr(function, "consts", ())), strict=True))

    def read(atom: Any) -> _Flow:
        return _constant(atom.val) if isinstance(atom, core.Literal) else flows[atom]

    for eqn in jaxpr.eqns:
        flows.update(zip(eqn.outvars, _results(eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _constant(value: Any) -> _Flow:
    """A constant is uniform if all its elements are the same."""
    if np.shape(value) == ():
        return _Flow()
    if jax.numpy.issubdtype(value.dtype, jax.dtypes.extended):
        return _Flow(uniform=False)  # Keys do not compare.
    values = np.asarray(value)
    return _Flow(uniform=bool((values == values.flat[0]).all()) if values.size else True)


def _results(eqn: Any, inputs: list[_Flow]) -> list[_Flow]:
    name = eqn.primitive.name
    if name in _CALLS:
        return _walk(eqn.params[_CALLS[name]], inputs)
    if name == "cond":
        branches = [_walk(branch, inputs[1:]) for branch in eqn.params["branches"]]
        return [_merged([_spread(inputs[0]), *flows]) for flows in zip(*branches, strict=True)]
    if not _stays(eqn):
        # Loops too: what one iteration hands to the next is not looked at.
        mixed = _spread(_merged(inputs))
        moved = mixed.uniform and name in _MOVING
        return [mixed._replace(uniform=moved or var.aval.shape == ()) for var in eqn.outvars]
    shape = eqn.outvars[0].aval.shape
    pairs = zip(inputs, eqn.invars, strict=True)
    return [_merged([flow if atom.aval.shape == shape else _spread(flow) for flow, atom in pairs])]


def _stays(eqn: Any) -> bool:
    """Whether each element of the only result depends on the same element of each operand, or on all of it."""
    name = eqn.primitive.name
    if name == "transpose":
        return tuple(eqn.params["permutation"]) == tuple(range(len(eqn.params["permutation"])))
    if name in _MOVING or name == "bitcast_convert_type":
        shapes = {var.aval.shape for var in (*eqn.invars, *eqn.outvars)}
        return len(shapes) == 1 and eqn.params.get("dimensions") in (None, ())
    return name in _ELEMENTWISE


def _merged(flows: Sequence[_Flow]) -> _Flow:
    near = far = 0
    uniform = True
    for flow in flows:
        near |= flow.near
        far |= flow.far
        uniform &= flow.uniform
    return _Flow(near, far, uniform)


def _spread(flow: _Flow) -> _Flow:
    """A value all of which may reach every element of another."""
    return _Flow(0, flow.sources, flow.uniform)
