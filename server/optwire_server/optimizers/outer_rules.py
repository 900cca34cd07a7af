"""Outer optimizers: update rules for pseudo-gradients, which say how far workers went in many steps of their own.

A pseudo-gradient is `g = global - local`: it has the sign of a gradient, so that `x ← x - η·g` with η = 1 moves the
global parameters to the local ones. Papers that write `Δ = local - global` have the other sign.

Each function gives a ``formulas.Rule``, and its numbers come as ``formulas.Number``s, as those of ``torch_rules`` do.
Must not know trees, sessions or specs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp

from optwire_server.optimizers import formulas

Second: TypeAlias = Callable[[Any, Any, Any, Any], Any]
"""The second moment after an update: (v, g², β₂, 1 - β₂) -> v."""


class FedavgmSlots(NamedTuple):
    """Slots of FedAvgM."""

    step: Any
    momentum: formulas.Leaves


def fedavgm(rate: formulas.Rate, momentum: formulas.Number) -> formulas.Rule:
    """FedAvgM: `v ← β·v + g`, `x ← x - η·v`. https://arxiv.org/abs/1909.06335"""

    def coefficients(count: Any, t: Any) -> formulas.Coefficients:
        return (formulas.scalar(rate(count)), momentum.whole), ()

    def element(g: Any, x: Any, slots: formulas.Slots, c: Sequence[Any]) -> tuple[Any, formulas.Slots]:
        eta, beta = c
        v = formulas.product(slots[0], beta) + g
        return x - eta * v, (v,)

    return formulas.lifted(FedavgmSlots, {"momentum": 0.0}, coefficients, element)


class FedoptSlots(NamedTuple):
    """Slots of FedAdagrad, FedAdam and FedYogi; the moments by the paper's letters."""

    step: Any
    m: formulas.Leaves
    v: formulas.Leaves


def fedadagrad(
    rate: formulas.Rate,
    beta1: formulas.Number,
    tau: formulas.Number,
    initial_accumulator_value: formulas.Number,
) -> formulas.Rule:
    """FedAdagrad: `v ← v + g²`; all else as in ``fedadam``."""
    return _fedopt(rate, beta1, None, tau, initial_accumulator_value, lambda v, square, b2, new2: v + square)


def fedadam(
    rate: formulas.Rate,
    beta1: formulas.Number,
    beta2: formulas.Number,
    tau: formulas.Number,
    initial_accumulator_value: formulas.Number,
) -> formulas.Rule:
    """FedAdam: `m ← β₁·m + (1 - β₁)·g`, `v ← β₂·v + (1 - β₂)·g²`, `x ← x - η·m / (√v + τ)`.

    Algorithm 2 of https://arxiv.org/abs/2003.00295: no moment is corrected for its start. m starts at 0 and v at `τ²`,
    or at a value of its own where that is more, since the paper asks for `v₋₁ ≥ τ²`.
    """
    return _fedopt(
        rate,
        beta1,
        beta2,
        tau,
        initial_accumulator_value,
        lambda v, square, b2, new2: formulas.product(v, b2) + new2 * square,
    )


def fedyogi(
    rate: formulas.Rate,
    beta1: formulas.Number,
    beta2: formulas.Number,
    tau: formulas.Number,
    initial_accumulator_value: formulas.Number,
) -> formulas.Rule:
    """FedYogi: `v ← v - (1 - β₂)·g²·sign(v - g²)`; all else as in ``fedadam``."""
    return _fedopt(
        rate,
        beta1,
        beta2,
        tau,
        initial_accumulator_value,
        lambda v, square, b2, new2: v - new2 * square * jnp.sign(v - square),
    )


def _fedopt(
    rate: formulas.Rate,
    beta1: formulas.Number,
    beta2: formulas.Number | None,
    tau: formulas.Number,
    initial_accumulator_value: formulas.Number,
    second: Second,
) -> formulas.Rule:
    def coefficients(count: Any, t: Any) -> formulas.Coefficients:
        decays = (beta2.whole, beta2.complement) if beta2 else (formulas.scalar(1), formulas.scalar(0))
        return (formulas.scalar(rate(count)), beta1.whole, beta1.complement, *decays, tau.whole), ()

    def element(g: Any, x: Any, slots: formulas.Slots, c: Sequence[Any]) -> tuple[Any, formulas.Slots]:
        eta, b1, new1, b2, new2, tau = c
        m, v = slots
        m = formulas.mixed(m, g, b1, new1)
        v = second(v, g * g, b2, new2)
        return x - eta * m / (jnp.sqrt(v) + tau), (m, v)

    def first(count: Any) -> Any:
        return jnp.maximum(initial_accumulator_value.whole, tau.whole * tau.whole)

    return formulas.lifted(FedoptSlots, {"m": 0.0, "v": first}, coefficients, element)


class DelayedNesterovSlots(NamedTuple):
    """Slots of delayed Nesterov: the momentum, and the sum of the gradients since it last changed."""

    step: Any
    momentum: formulas.Leaves
    gathered: formulas.Leaves


def delayed_nesterov(
    rate: formulas.Rate,
    momentum: formulas.Number,
    c: formulas.Number,
    *,
    n: int,
) -> formulas.Rule:
    """Delayed Nesterov, for pseudo-gradients that come one by one: `Δ ← Δ + g`; at every n-th update
    `m ← β·m + Δ / n`, `x ← x - ε·((1 - c·n + c)·β·m + g / n)`, `Δ ← 0`; at the others `x ← x - ε·(c·β·m + g / n)`.

    What n updates add up to is one of Nesterov's with the mean of their gradients, up to when momentum acts: c is the
    share of it that acts at each of the others. Algorithm 3 of https://arxiv.org/abs/2401.09135.
    """

    def coefficients(count: Any, t: Any) -> formulas.Coefficients:
        closing = formulas.scalar((count + 1) % n == 0)
        share = jnp.where(closing != 0, 1 - (n - 1) * c.whole, c.whole) * momentum.whole
        return (formulas.scalar(rate(count)), momentum.whole, share, closing), ()

    def element(g: Any, x: Any, slots: formulas.Slots, c: Sequence[Any]) -> tuple[Any, formulas.Slots]:
        epsilon, beta, share, closing = c
        m, total = slots
        total = total + g
        m = jnp.where(closing != 0, formulas.product(m, beta) + total / n, m)
        total = jnp.where(closing != 0, 0, total)
        return x - epsilon * (share * m + g / n), (m, total)

    return formulas.lifted(DelayedNesterovSlots, {"momentum": 0.0, "gathered": 0.0}, coefficients, element)
