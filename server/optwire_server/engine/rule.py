"""A rule: an optimizer over a list of leaves as pure functions, before it is compiled; and the rules around a rule.

Whatever a spec describes ends up as one of these, so that wrappers need not know whether the seed or optax computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax import lax

from optwire_server.engine import reductions

Leaves = list[Any]
State = Any


@dataclasses.dataclass(slots=True)
class Call:
    """One traced update: what it is told beside gradients, and what it tells beside the new state.

    Attributes:
      index: index of the update, from 0: what the seed's schedules and bias corrections look at. shape=(), int32
      closing: whether this push closes a step; static. Others are only gathered, where the rule accumulates.
      extras: what the push brought along, by optax's names, such as ``value``. shape=(), float32
      notes: scalars of this update for the one who asked, by name.
      present: whether each leaf has a gradient; None: all have. shape=(), bool, each
      rounded: whether updates are rounded before they are added, so that whoever adds them elsewhere gets the same.
      added: what was added to the parameters, one array a leaf, where the rule knows. Set by the update.
    """

    index: Any
    closing: bool = True
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    present: Sequence[Any] | None = None
    rounded: bool = False
    added: Leaves | None = None


class Rule(NamedTuple):
    """An optimizer ready to be compiled.

    Attributes:
      init: leaves -> state.
      update: (gradients, state, call) -> state.
      params: state -> leaves, those that gradients are computed on.
      views: other parameters that can be read, by name: state -> leaves.
      every: pushes that make one update.
    """

    init: Callable[[Leaves], State]
    update: Callable[[Leaves, State, Call], State]
    params: Callable[[State], Leaves]
    views: Mapping[str, Callable[[State], Leaves]]
    every: int = 1


class Stage(NamedTuple):
    """State of ``after``: the transformation's, and the rule's."""

    outer: State
    inner: State


class Gathered(NamedTuple):
    """State of ``accumulate``: sums of gradients, one a leaf, and the rule's."""

    sums: Leaves
    inner: State


class Guarded(NamedTuple):
    """State of ``on_nonfinite``: pushes taken, shape=(), int32, and the rule's."""

    taken: Any
    inner: State


class Averaged(NamedTuple):
    """State of ``ema_params``: averages, one a leaf; the weight of params in them, shape=(), float32; the rule's."""

    average: Leaves
    weight: Any
    inner: State


class Kept(NamedTuple):
    """The state of a rule that keeps parameters as they are.

    Attributes:
      params: the leaves.
      slots: what it keeps beside them.
    """

    params: Leaves
    slots: Any


def of_transformation(transformation: Any, *, schedule_free: bool = False) -> Rule:
    """The rule that adds the updates of an optax transformation to the parameters. State: Kept, its state as slots.

    With ``schedule_free`` "eval" reads the averages that its schedule-free optimizers are judged by.
    """

    def init(params: Leaves) -> State:
        return Kept(params, transformation.init(params))

    def update(grads: Leaves, state: State, call: Call) -> State:
        params, inner = state
        updates, inner = transformation.update(like(grads, params), inner, params, **call.extras)
        if call.rounded:
            updates = [rounded(leaf, call.index) for leaf in updates]
        call.added = list(updates)
        return Kept(optax.apply_updates(params, updates), inner)

    reads = {"eval": lambda state: _schedule_free(*state)} if schedule_free else {}
    return Rule(init, update, lambda state: state.params, reads)


def after(transformation: Any, rule: Rule) -> Rule:
    """A rule whose gradients pass a transformation first. State: (the transformation's, the rule's)."""

    def init(params: Leaves) -> State:
        return Stage(transformation.init(params), rule.init(params))

    def update(grads: Leaves, state: State, call: Call) -> State:
        outer, inner = state
        params = rule.params(inner)
        grads, outer = transformation.update(like(grads, params), outer, params, **call.extras)
        return Stage(outer, rule.update(grads, inner, call))

    return around(rule, init, update)


def around(
    rule: Rule,
    init: Callable[[Leaves], State],
    update: Callable[[Leaves, State, Call], State],
    **views: Callable[[State], Leaves],
) -> Rule:
    """A wrapper of a rule, whose own state is the last part of the wrapper's: reads as the rule does."""
    passed = {name: lambda state, view=view: view(state[-1]) for name, view in rule.views.items()}
    return Rule(init, update, lambda state: rule.params(state[-1]), {**passed, **views}, rule.every)


def split(rules: Sequence[Rule], members: Sequence[Sequence[int]]) -> Rule:
    """Several rules, each for its own leaves: ``members[k]`` are the positions that ``rules[k]`` has."""

    def init(params: Leaves) -> State:
        # A tuple: a list in a state has one entry a leaf, which is how arrays find their names.
        return tuple(rule.init([params[i] for i in at]) for rule, at in zip(rules, members, strict=True))

    def update(grads: Leaves, state: State, call: Call) -> State:
        def own(at: Sequence[int]) -> Call:
            present = None if call.present is None else [call.present[i] for i in at]
            return dataclasses.replace(call, present=present, added=None)

        parts = zip(rules, members, state, strict=True)
        return tuple(rule.update([grads[i] for i in at], part, own(at)) for rule, at, part in parts)

    def joined(state: State, which: str = "") -> Leaves:
        leaves: dict[int, Any] = {}
        for rule, at, part in zip(rules, members, state, strict=True):
            leaves.update(zip(at, rule.views.get(which, rule.params)(part), strict=True))
        return [leaves[i] for i in sorted(leaves)]

    names = sorted({name for rule in rules for name in rule.views})
    views = {name: lambda state, name=name: joined(state, name) for name in names}
    return Rule(init, update, joined, views)


def accumulate(rule: Rule, k: int) -> Rule:
    """One update for every ``k`` pushes, with the mean of their gradients. State: (sums, the rule's).

    Sums are kept in 32 bits at least: in f16 the sum of two gradients of 40,000 is infinite, and their mean is not.
    Which push closes a step is known from the session's step: two programs, without a branch in either.
    """

    def init(params: Leaves) -> State:
        return Gathered([jnp.zeros(leaf.shape, _wide(leaf)) for leaf in params], rule.init(params))

    def update(grads: Leaves, state: State, call: Call) -> State:
        sums, inner = state
        sums = [total + g for total, g in zip(sums, like(grads, sums), strict=True)]
        if not call.closing:
            return Gathered(sums, inner)
        means = [total / k for total in sums]
        inner = rule.update(means, inner, dataclasses.replace(call, index=call.index // k))
        return Gathered([jnp.zeros_like(total) for total in sums], inner)

    return around(rule, init, update)._replace(every=k)


def sums(state: State) -> tuple[int, ...]:
    """Positions in a state, in JAX's order, of what ``accumulate`` has gathered for the update to come."""

    def marked(node: Any) -> Any:
        if not isinstance(node, Gathered):
            return False
        return Gathered([True for _ in node.sums], mark(node.inner))

    def mark(node: State) -> State:
        return jax.tree.map(marked, node, is_leaf=lambda found: isinstance(found, Gathered))

    return tuple(position for position, is_sum in enumerate(jax.tree.leaves(mark(state))) if is_sum)


def on_nonfinite(rule: Rule, policy: str) -> Rule:
    """Keeps what is not finite out of the state. State: (pushes taken, the rule's).

    "zero" replaces such gradients by 0. "skip" and "reject" leave the state as it was when a gradient, or anything in
    the new state, is not finite (a finite 1e30 overflows Adam's second moment); the caller tells them apart.
    """

    def init(params: Leaves) -> State:
        return Guarded(jnp.zeros((), jnp.int32), rule.init(params))

    def update(grads: Leaves, state: State, call: Call) -> State:
        taken, inner = state
        if policy == "zero":
            grads = [jnp.where(jnp.isfinite(g), g, jnp.zeros_like(g)) for g in grads]
            return Guarded(taken + 1, rule.update(grads, inner, call))
        new = rule.update(grads, inner, dataclasses.replace(call, index=taken))
        # Parameters may be narrower than the state: what master weights hold can be infinite in f16.
        finite = reductions.all_finite([*grads, *jax.tree.leaves(new), *rule.params(new)])
        call.notes["finite"] = finite & call.notes.get("finite", True)
        kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, inner)
        return Guarded(taken + finite.astype(taken.dtype), kept)

    return around(rule, init, update)


def ema_params(rule: Rule, decay: float, *, debias: bool) -> Rule:
    """Keeps a moving average of the parameters: ``e <- decay * e + (1 - decay) * params``. State: (e, weight, rule's).

    Without ``debias`` it starts at the initial parameters; with it, at zero, and is divided when read by the weight
    that parameters have in it, ``1 - decay ** updates`` unless the decay has changed (Kingma and Ba, 2015, section 3,
    for the parameters themselves). It is kept in 32 bits at least: with a decay of 0.999, one in bf16 would be rounded
    to what it was.
    """

    def init(params: Leaves) -> State:
        start = [jnp.zeros(leaf.shape, _wide(leaf)) if debias else jnp.array(leaf, _wide(leaf)) for leaf in params]
        return Averaged(start, jnp.zeros((), jnp.float32), rule.init(params))

    def update(grads: Leaves, state: State, call: Call) -> State:
        average, weight, inner = state
        inner = rule.update(grads, inner, call)
        if not call.closing:
            return Averaged(average, weight, inner)
        pairs = zip(average, rule.params(inner), strict=True)
        average = [(decay * e + (1 - decay) * leaf).astype(e.dtype) for e, leaf in pairs]
        return Averaged(average, decay * weight + (1 - decay), inner)

    def read(state: State) -> Leaves:
        average, weight, inner = state
        params = rule.params(inner)
        if not debias:
            return like(average, params)
        pairs = zip(average, params, strict=True)
        return [jnp.where(weight > 0, e / weight, leaf).astype(leaf.dtype) for e, leaf in pairs]

    return around(rule, init, update, ema=read)


def master_weights(rule: Rule, dtype: Any, dtypes: Sequence[Any]) -> Rule:
    """Computes in ``dtype``, and rounds the parameters to ``dtypes``, one a leaf, where they are read."""

    def wide(leaves: Leaves) -> Leaves:
        return [leaf.astype(dtype) for leaf in leaves]

    def narrow(leaves: Leaves) -> Leaves:
        return [leaf.astype(own) for leaf, own in zip(leaves, dtypes, strict=True)]

    def update(grads: Leaves, state: State, call: Call) -> State:
        new = rule.update(wide(grads), state, call)
        call.added = None  # of the wide parameters
        return new

    views = {name: lambda state, view=view: narrow(view(state)) for name, view in rule.views.items()}
    return Rule(
        lambda params: rule.init(wide(params)), update, lambda state: narrow(rule.params(state)), views, rule.every
    )


def lookahead(transformation: Any) -> Rule:
    """Optax's lookahead, whose parameters are two sets. Gradients are of the fast ones; "eval" reads the slow ones."""

    def init(params: Leaves) -> State:
        both = optax.LookaheadParams(params, [jnp.array(leaf, copy=True) for leaf in params])
        return both, transformation.init(both)

    def update(grads: Leaves, state: State, call: Call) -> State:
        both, inner = state
        updates, inner = transformation.update(like(grads, both.fast), inner, both)
        return optax.apply_updates(both, updates), inner

    return Rule(init, update, lambda state: list(state[0].fast), {"eval": lambda state: list(state[0].slow)})


def rounded(leaf: Any, index: Any) -> Any:
    """The same values; but the compiler, which would fuse a product into the sum that follows, cannot see that.

    It fuses across barriers, too; that no index is negative is what it does not know.
    """
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    bits = lax.bitcast_convert_type(leaf, f"uint{leaf.dtype.itemsize * 8}")
    return lax.bitcast_convert_type(bits ^ (jnp.asarray(index) < 0).astype(bits.dtype), leaf.dtype)


def like(leaves: Leaves, others: Leaves) -> Leaves:
    """Gradients in the element types of what they belong to; unscaled ones may be wider."""
    return [leaf.astype(other.dtype) for leaf, other in zip(leaves, others, strict=True)]


def _wide(leaf: Any) -> Any:
    """The element type of a leaf, in 32 bits at least."""
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _schedule_free(params: Leaves, state: State) -> Leaves:
    """``x = (y - (1 - b1) z) / b1`` where a schedule-free optimizer works (Defazio et al., 2024); else the params."""
    kind = optax.contrib.ScheduleFreeState
    leaves = list(params)
    for found in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind)):
        if isinstance(found, kind):
            for i, z in enumerate(found.z):
                if not isinstance(z, optax.MaskedNode):
                    x = (leaves[i] - (1.0 - found.b1) * z) / found.b1
                    leaves[i] = x.astype(leaves[i].dtype)
    return leaves
