"""Optimizers over trees: the state a rule keeps for every leaf, and the lifting of an array rule to whole trees.

Knows flattening and structure checks. Must not know any update rule, schedule, session or wire format.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef, register_pytree_node, tree_flatten

from optwire_server.optimizers.precision import keep_dtype, own_precision, refuse_narrowed, widened

Tree: TypeAlias = Any
"""Any nest of containers jax knows, with arrays or numbers as leaves."""

Step: TypeAlias = int | jax.Array | np.integer[Any]
"""A step's index, counted from 0; a traced value under `jit`."""

ArrayRule: TypeAlias = tuple[Callable[[Any], Any], Callable[[Any, Any, Any], Any], Callable[[Any], Any]]
"""What a rule for one array is: `init(x0)`, `update(i, g, state)` and `get_params(state)`."""

P = ParamSpec("P")


class OptimizerState(NamedTuple):
    """The state of an optimizer over a tree, flattened twice.

    Attributes:
        packed_state: one sequence per leaf of the params: the flattened arrays the rule keeps for that leaf.
        tree_def: the structure of the params.
        subtree_defs: one structure per leaf of the params: that of the rule's own state.
    """

    packed_state: Sequence[Sequence[Any]]
    tree_def: PyTreeDef
    subtree_defs: Sequence[PyTreeDef]


def _flatten_state(opt_state: OptimizerState) -> tuple[tuple[Any], tuple[PyTreeDef, Sequence[PyTreeDef]]]:
    return (opt_state.packed_state,), (opt_state.tree_def, opt_state.subtree_defs)


def _unflatten_state(structure: tuple[PyTreeDef, Sequence[PyTreeDef]], children: tuple[Any]) -> OptimizerState:
    return OptimizerState(children[0], *structure)


register_pytree_node(OptimizerState, _flatten_state, _unflatten_state)


class Optimizer(NamedTuple):
    """The three functions of an optimizer over trees; unpack it as `init_fun, update_fun, get_params`.

    Attributes:
        init_fn: `params -> opt_state`.
        update_fn: `(step, grads, opt_state) -> opt_state`.
        params_fn: `opt_state -> params`.
    """

    init_fn: Callable[[Tree], OptimizerState]
    update_fn: Callable[[Step, Tree, OptimizerState], OptimizerState]
    params_fn: Callable[[OptimizerState], Tree]


def optimizer(make_rule: Callable[P, ArrayRule]) -> Callable[P, Optimizer]:
    """Lifts a rule written for one array to an optimizer over any tree of arrays.

    The rule is applied to each leaf on its own. Its state may be any tree; that tree must keep its structure from step
    to step, and every array in it its dtype: a result of another precision is rounded back to the dtype of the slot it
    belongs to, so that no schedule, step or gradient changes the dtype of a parameter. A leaf of 64 bits is computed in
    64 bits, whatever jax is set to; to keep it so under `jit`, call the compiled function under `jax.enable_x64(True)`.

    Args:
        make_rule: returns `(init, update, get_params)`, each for a single array: `init(x0)` is the state of a leaf,
            `update(i, g, state)` its state after step `i` with gradient `g`, `get_params(state)` the leaf's value.

    Returns:
        A function of the same arguments as `make_rule` that returns an `Optimizer`. The functions of that optimizer
        raise `TypeError` when

        - a tree of gradients has another structure than the params the state was made from,
        - the rule returns a state of another structure than the one it was given, or
        - the rule returns a value its slot has no room for: a float for an integer, a complex for a real, or
        - `jit` has narrowed the gradient of a 64-bit leaf, as it does with NumPy arrays while x64 is off.
    """

    @functools.wraps(make_rule)
    def make_optimizer(*args: P.args, **kwargs: P.kwargs) -> Optimizer:
        return _lift(*make_rule(*args, **kwargs))

    return make_optimizer


def _lift(
    init: Callable[[Any], Any], update: Callable[[Any, Any, Any], Any], get_params: Callable[[Any], Any]
) -> Optimizer:
    @functools.wraps(init)
    def init_fun(params: Tree) -> OptimizerState:
        leaves, tree_def = tree_flatten(params)
        return _pack([_in_own_precision(_init_leaf, init, x0) for x0 in leaves], tree_def)

    @functools.wraps(update)
    def update_fun(i: Step, grads: Tree, opt_state: OptimizerState) -> OptimizerState:
        leaves, tree_def = tree_flatten(grads)
        if tree_def != opt_state.tree_def:
            raise TypeError(f"grads do not have the structure of the params: got {tree_def}, not {opt_state.tree_def}")
        step = functools.partial(_update_leaf, update, i)
        pairs = list(zip(leaves, _leaf_states(opt_state), strict=True))
        for g, state in pairs:
            refuse_narrowed(g, jax.tree.leaves(state))
        return _pack([_in_own_precision(step, g, state) for g, state in pairs], tree_def)

    @functools.wraps(get_params)
    def params_fun(opt_state: OptimizerState) -> Tree:
        params = [_in_own_precision(get_params, state) for state in _leaf_states(opt_state)]
        return opt_state.tree_def.unflatten(params)

    return Optimizer(init_fun, update_fun, params_fun)


def _init_leaf(init: Callable[[Any], Any], x0: Any) -> Any:
    """Gives the leaf's first state. A NumPy array becomes a jax array, which `jit` takes as it is: NumPy's float64 it
    would narrow without a word."""
    return init(jnp.asarray(x0) if isinstance(x0, np.ndarray) else x0)


def _in_own_precision(function: Callable[..., Any], *args: Any) -> Any:
    with own_precision(*jax.tree.leaves(args)):
        return function(*args)


def _update_leaf(update: Callable[[Any, Any, Any], Any], i: Step, g: Any, state: Any) -> Any:
    """Gives the leaf's next state, of the structure and dtypes of `state`."""
    new_state = update(widened(i), g, state)
    old_def: PyTreeDef = jax.tree.structure(state)
    new_def: PyTreeDef = jax.tree.structure(new_state)
    if new_def != old_def:
        raise TypeError(f"the rule's update changed the structure of its state from {old_def} to {new_def}")
    return jax.tree.map(keep_dtype, new_state, state)


def _pack(states: list[Any], tree_def: PyTreeDef) -> OptimizerState:
    flat = [tree_flatten(state) for state in states]
    return OptimizerState(tuple(slots for slots, _ in flat), tree_def, tuple(subtree for _, subtree in flat))


def _leaf_states(opt_state: OptimizerState) -> list[Any]:
    pairs = zip(opt_state.subtree_defs, opt_state.packed_state, strict=True)
    return [subtree_def.unflatten(slots) for subtree_def, slots in pairs]


class JoinPoint:
    """Marks, in the tree `unpack_optimizer_state` returns, where a leaf of the params became the rule's state.

    Not a container to jax: a tree of join points has them as its leaves.

    Attributes:
        subtree: the state the rule keeps for this leaf.
    """

    def __init__(self, subtree: Any) -> None:
        """Marks `subtree`."""
        self.subtree = subtree

    def __iter__(self) -> Iterator[Any]:
        """Yields the marked subtree, so that code which walks containers finds it."""
        yield self.subtree


def unpack_optimizer_state(opt_state: OptimizerState) -> Tree:
    """Gives the state as a tree of the params' structure with a `JoinPoint` in the place of each leaf.

    Args:
        opt_state: the state of any optimizer.

    Returns:
        A tree from which `pack_optimizer_state` makes `opt_state` again.
    """
    return opt_state.tree_def.unflatten([JoinPoint(state) for state in _leaf_states(opt_state)])


def pack_optimizer_state(marked_tree: Tree) -> OptimizerState:
    """Makes an optimizer's state of the tree `unpack_optimizer_state` gave.

    Args:
        marked_tree: a tree whose every leaf is a `JoinPoint`.

    Raises:
        TypeError: a leaf is no `JoinPoint`.
    """
    marks, tree_def = tree_flatten(marked_tree)
    for mark in marks:
        if not isinstance(mark, JoinPoint):
            raise TypeError(f"a leaf of the marked tree is a {type(mark).__name__}, not a JoinPoint")
    return _pack([mark.subtree for mark in marks], tree_def)
