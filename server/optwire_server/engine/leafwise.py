"""Rules that keep each leaf by itself, so that a push may leave gradients out: any rule by leaf, and formulas."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optwire_server.engine import reductions, rule
from optwire_server.optimizers import formulas


class PerLeaf(NamedTuple):
    """The state of a rule that keeps each leaf by itself.

    Attributes:
      leaves: a state for each leaf.
      counts: how many updates each leaf has had; None: the leaves' rule does not look at it. shape=(), int32, each
    """

    leaves: list[rule.State]
    counts: list[Any] | None


def per_leaf(rules: Sequence[rule.Rule], *, counted: bool) -> rule.Rule:
    """A rule of its own for each leaf, so that a push may leave gradients out: what is absent stays, bit for bit.

    Args:
      rules: one for each leaf.
      counted: whether the rules look at ``Call.index``, which is then the count of the leaf's own updates.
    """

    def init(params: rule.Leaves) -> rule.State:
        counts = [jnp.zeros((), jnp.int32) for _ in rules] if counted else None
        return PerLeaf([each.init([leaf]) for each, leaf in zip(rules, params, strict=True)], counts)

    def update(grads: rule.Leaves, state: rule.State, call: rule.Call) -> rule.State:
        def one(at: int, own: rule.State) -> rule.State:
            index = call.index if state.counts is None else state.counts[at]
            alone = dataclasses.replace(call, index=index, present=None, added=None)
            with reductions.alone():  # a norm in here is of one leaf
                return rules[at].update([grads[at]], own, alone)

        new = PerLeaf(
            [one(at, own) for at, own in enumerate(state.leaves)],
            None if state.counts is None else [count + 1 for count in state.counts],
        )
        return new if call.present is None else _only(call.present, new, state)

    def joined(state: rule.State, which: str = "") -> rule.Leaves:
        pairs = zip(rules, state.leaves, strict=True)
        return [leaf for each, own in pairs for leaf in each.views.get(which, each.params)(own)]

    names = sorted({name for each in rules for name in each.views})
    views = {name: lambda state, name=name: joined(state, name) for name in names}
    return rule.Rule(init, update, joined, views)


def of_formula(made: formulas.Rule, *, alone: bool = False) -> rule.Rule:
    """The rule of an optimizer from a formula: torch's, and the outer ones. State: ``rule.Kept``.

    Args:
      made: the optimizer.
      alone: whether every leaf counts by itself, so that a push may leave gradients out, as in ``per_leaf``.
    """

    def update(grads: rule.Leaves, state: rule.State, call: rule.Call) -> rule.State:
        new = rule.Kept(*made.update(grads, state.params, state.slots))
        return new if call.present is None else _only(call.present, new, state)

    return rule.Rule(lambda params: rule.Kept(params, made.init(params, alone)), update, lambda state: state.params, {})


def _only(present: Sequence[Any], new: rule.State, old: rule.State) -> rule.State:
    """The new state where a gradient is present, elsewhere the old one. Lists in it have one entry a leaf."""

    def chosen(after: rule.Leaves, before: rule.Leaves) -> rule.Leaves:
        pairs = enumerate(zip(after, before, strict=True))
        return [jax.tree.map(functools.partial(jnp.where, present[at]), *pair) for at, pair in pairs]

    return jax.tree.map(chosen, new, old, is_leaf=lambda node: type(node) is list)
