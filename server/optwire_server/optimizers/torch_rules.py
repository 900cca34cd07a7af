"""Torch's optimizers: the update rules of ``torch.optim``, as its documentation defines them, with its slots.

Each function gives a ``formulas.Rule`` whose slots have torch's names. Numbers come as ``formulas.Number``s, traced or
not. Torch takes what depends on numbers alone, such as ``1 - beta ** step``, in Python's 64 bits; here it is taken in
32 where the program has no others, in ways that lose no digits.

https://docs.pytorch.org/docs/stable/optim.html, torch 2.13. Must not know trees, sessions or specs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from optwire_server.optimizers import formulas

# ---------------------------------------------------------------------------------------------------------------------
# The rules. `element` is of one real array: (g, x, its slots, coefficients) -> (x, its slots).


class SgdSlots(NamedTuple):
    """Slots of SGD; torch keeps no step, the first momentum and a schedule need one."""

    step: Any
    momentum_buffer: formulas.Leaves | None


def sgd(
    rate: formulas.Rate,
    momentum: formulas.Number,
    dampening: formulas.Number,
    weight_decay: formulas.Number,
    *,
    nesterov: bool,
    maximize: bool,
    keeps_momentum: bool,
) -> formulas.Rule:
    """SGD: `b ← μ·b + (1 - τ)·g`, at first `b ← g`; `x ← x - α·b`, with Nesterov `x ← x - α·(g + μ·b)`.

    Where μ is 0, b stays as it is and `x ← x - α·g`. Weight decay is added to g.

    Args:
        keeps_momentum: whether there is a b at all.
    """

    def coefficients(count: Any, t: Any) -> formulas.Coefficients:
        mu = momentum.whole
        return (
            formulas.scalar(rate(count)),
            mu,
            dampening.complement,
            weight_decay.whole,
            formulas.scalar(count == 0),
        ), ()

    def element(g: Any, x: Any, slots: formulas.Slots, c: Sequence[Any]) -> tuple[Any, formulas.Slots]:
        alpha, mu, kept, decay, first = c
        g = _decayed(g, x, decay)
        if not slots:
            return x - alpha * g, ()
        (b,) = slots
        new = jnp.where(first != 0, g, formulas.product(b, mu) + kept * g)
        direction = g + mu * new if nesterov else new
        return x - alpha * jnp.where(mu != 0, direction, g), (jnp.where(mu != 0, new, b),)

    return formulas.lifted(
        SgdSlots, {"momentum_buffer": 0.0 if keeps_momentum else None}, coefficients, element, maximize
    )


class AdamSlots(NamedTuple):
    """Slots of Adam and AdamW."""

    step: Any
    exp_avg: formulas.Leaves
    exp_avg_sq: formulas.Leaves
    max_exp_avg_sq: formulas.Leaves | None


def adam(
    rate: formulas.Rate,
    beta1: formulas.Number,
    beta2: formulas.Number,
    eps: formulas.Number,
    weight_decay: formulas.Number,
    *,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
) -> formulas.Rule:
    """Adam: `m ← β₁·m + (1 - β₁)·g`, `v ← β₂·v + (1 - β₂)·g²`, `x ← x - α / (1 - β₁^t)·m / (√v / √(1 - β₂^t) + ε)`.

    With AMSGrad the greatest v so far stands under the root. Decoupled, weight decay is `x ← x·(1 - α·λ)` beforehand.
    """

    def coefficients(count: Any, t: Any) -> formulas.Coefficients:
        alpha = formulas.scalar(rate(count))
        scales = alpha / beta1.unbiased(t), jnp.sqrt(beta2.unbiased(t)), eps.whole
        decay = alpha * weight_decay.whole if decoupled_weight_decay else weight_decay.whole
        return (beta1.whole, beta1.complement, beta2.whole, beta2.complement, *scales, decay), ()

    def element(g: Any, x: Any, slots: formulas.Slots, c: Sequence[Any]) -> tuple[Any, formulas.Slots]:
        b1, new1, b2, new2, alpha, root, eps, decay = c
        m, v, *greatest = slots
        if decoupled_weight_decay:
            x = formulas.product(x, 1 - decay)
        else:
            g = _decayed(g, x, decay)
        m = formulas.mixed(m, g, b1, new1)
        v = formulas.product(v, b2) + new2 * g * g
        greatest = [jnp.maximum(most, v) for most in greatest]
        denominator = jnp.sqrt(greatest[0] if amsgrad else v) / root + eps
        return x - alpha * m / denominator, (m, v, *greatest)

    starts = {"exp_avg": 0.0, "exp_avg_sq": 0.0, "max_exp_avg_sq": 0.0 if amsgrad else None}
    return formulas.lifted(AdamSlots, starts, coefficients, element, maximize)


def adamw(
    rate: formulas.Rate,
    beta1: formulas.Number,
    beta2: formulas.Number,
    eps: formulas.Number,
    weight_decay: formulas.Number,
    *,
    amsgrad: bool,
    maximize: bool,
) -> formulas.Rule:
    """AdamW: Adam with decoupled weight decay."""
    flags = {"amsgrad": amsgrad, "maximize": maximize, "decoupled_weight_decay": True}
    return adam(rate, beta1, beta2, eps, weight_decay, **flags)


class NadamSlots(NamedTuple):
    """Slots of NAdam; mu_product is the product of all μ so far. shape=()"""

    step: Any
    mu_product: Any
    exp_avg: formulas.Leaves
    exp_avg_sq: formulas.Leaves


def nadam(
    rate: formulas.Rate,
    beta1: formulas.Number,
    beta2: formulas.Number,
    eps: formulas.Number,
    weight_decay: formulas.Number,
    momentum_decay: formulas.Number,
    *,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> formulas.Rule:
    """NAdam: m and v as in Adam, `μ_t = β₁·(1 - 0.96^(t·ψ) / 2)`, `M_t` the product of the μ up to t,
    `x ← x - α·((1 - μ_t) / (1 - M_t)·g + μ_{t+1} / (1 - M_{t+1})·m) / (√(v / (1 - β₂^t)) + ε)`.
    """

    def mu(t: Any) -> Any:
        return beta1.whole * (1 - 0.5 * jnp.exp(t * momentum_decay.whole * math.log(0.96)))

    def coefficients(count: Any, t: Any, product: Any) -> formulas.Coefficients:
        alpha = formulas.scalar(rate(count))
        product = product * mu(t)
        scales = alpha * (1 - mu(t)) / (1 - product), alpha * mu(t + 1) / (1 - product * mu(t + 1))
        decay = alpha * weight_decay.whole if decoupled_weight_decay else weight_decay.whole
        betas = beta1.whole, beta1.complement, beta2.whole, beta2.complement
        return (*betas, beta2.unbiased(t), eps.whole, *scales, decay), (product,)

    def element(g: Any, x: Any, slots: formulas.Slots, c: Sequence[Any]) -> tuple[Any, formulas.Slots]:
        b1, new1, b2, new2, seen, eps, of_g, of_m, decay = c
        m, v = slots
        if decoupled_weight_decay:
            x = formulas.product(x, 1 - decay)
        else:
            g = _decayed(g, x, decay)
        m = formulas.mixed(m, g, b1, new1)
        v = formulas.product(v, b2) + new2 * g * g
        denominator = jnp.sqrt(v / seen) + eps
        return x - of_g * g / denominator - of_m * m / denominator, (m, v)

    starts = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
    return formulas.lifted(NadamSlots, starts, coefficients, element, maximize, mu_product=lambda: formulas.scalar(1))


class MomentSlots(NamedTuple):
    """Slots of RAdam."""

    step: Any
    exp_avg: formulas.Leaves
    exp_avg_sq: formulas.Leaves


def radam(
    rate: formulas.Rate,
    beta1: formulas.Number,
    beta2: formulas.Number,
    eps: formulas.Number,
    weight_decay: formulas.Number,
    *,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> formulas.Rule:
    """RAdam: m and v as in Adam; `x ← x - α·m̂·r_t·√(1 - β₂^t) / (√v + ε)` where `ρ_t > 5`, else `x ← x - α·m̂`.

    `ρ_t = ρ_∞ - 2·t·β₂^t / (1 - β₂^t)`, `ρ_∞ = 2 / (1 - β₂) - 1`,
    `r_t = √((ρ_t - 4)·(ρ_t - 2)·ρ_∞ / ((ρ_∞ - 4)·(ρ_∞ - 2)·ρ_t))`.
    """

    def coefficients(count: Any, t: Any) -> formulas.Coefficients:
        alpha = formulas.scalar(rate(count))
        seen = beta2.unbiased(t)
        most = 2 / beta2.complement - 1
        length = _length(-beta2.log, beta2.complement, t)
        ratio = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
        rectified = length > 5
        scale = jnp.where(rectified, jnp.sqrt(jnp.where(rectified, ratio, 1) * seen), 0)
        decay = alpha * weight_decay.whole if decoupled_weight_decay else weight_decay.whole
        betas = beta1.whole, beta1.complement, beta2.whole, beta2.complement
        return (*betas, alpha, beta1.unbiased(t), scale, formulas.scalar(rectified), eps.whole, decay), ()

    def element(g: Any, x: Any, slots: formulas.Slots, c: Sequence[Any]) -> tuple[Any, formulas.Slots]:
        b1, new1, b2, new2, alpha, seen, scale, rectified, eps, decay = c
        m, v = slots
        if decoupled_weight_decay:
            x = formulas.product(x, 1 - decay)
        else:
            g = _decayed(g, x, decay)
        m = formulas.mixed(m, g, b1, new1)
        v = formulas.product(v, b2) + new2 * g * g
        return x - m / seen * alpha * jnp.where(rectified != 0, scale / (jnp.sqrt(v) + eps), 1), (m, v)

    return formulas.lifted(MomentSlots, {"exp_avg": 0.0, "exp_avg_sq": 0.0}, coefficients, element, maximize)


class AdamaxSlots(NamedTuple):
    """Slots of Adamax."""

    step: Any
    exp_avg: formulas.Leaves
    exp_inf: formulas.Leaves


def adamax(
    rate: formulas.Rate,
    beta1: formulas.Number,
    beta2: formulas.Number,
    eps: formulas.Number,
    weight_decay: formulas.Number,
    *,
    maximize: bool,
) -> formulas.Rule:
    """Adamax: `m ← β₁·m + (1 - β₁)·g`, `u ← max(β₂·u, |g| + ε)`, `x ← x - α / (1 - β₁^t)·m / u`."""

    def coefficients(count: Any, t: Any) -> formulas.Coefficients:
        alpha = formulas.scalar(rate(count)) / beta1.unbiased(t)
        return (beta1.whole, beta1.complement, beta2.whole, alpha, eps.whole, weight_decay.whole), ()

    def element(g: Any, x: Any, slots: formulas.Slots, c: Sequence[Any]) -> tuple[Any, formulas.Slots]:
        b1, new1, b2, alpha, eps, decay = c
        m, u = slots
        g = _decayed(g, x, decay)
        m = formulas.mixed(m, g, b1, new1)
        u = jnp.maximum(b2 * u, jnp.abs(g) + eps)
        return x - alpha * m / u, (m, u)

    return formulas.lifted(AdamaxSlots, {"exp_avg": 0.0, "exp_inf": 0.0}, coefficients, element, maximize)


class AdadeltaSlots(NamedTuple):
    """Slots of Adadelta."""

    step: Any
    square_avg: formulas.Leaves
    acc_delta: formulas.Leaves


def adadelta(
    rate: formulas.Rate, rho: formulas.Number, eps: formulas.Number, weight_decay: formulas.Number, *, maximize: bool
) -> formulas.Rule:
    """Adadelta: `v ← ρ·v + (1 - ρ)·g²`, `d = √(u + ε) / √(v + ε)·g`, `u ← ρ·u + (1 - ρ)·d²`, `x ← x - α·d`."""

    def coefficients(count: Any, t: Any) -> formulas.Coefficients:
        return (formulas.scalar(rate(count)), rho.whole, rho.complement, eps.whole, weight_decay.whole), ()

    def element(g: Any, x: Any, slots: formulas.Slots, c: Sequence[Any]) -> tuple[Any, formulas.Slots]:
        alpha, kept, new, eps, decay = c
        v, u = slots
        g = _decayed(g, x, decay)
        v = formulas.product(v, kept) + new * g * g
        d = jnp.sqrt(u + eps) / jnp.sqrt(v + eps) * g
        return x - alpha * d, (v, formulas.product(u, kept) + new * d * d)

    return formulas.lifted(AdadeltaSlots, {"square_avg": 0.0, "acc_delta": 0.0}, coefficients, element, maximize)


class AdagradSlots(NamedTuple):
    """Slots of Adagrad."""

    step: Any
    sum: formulas.Leaves


def adagrad(
    rate: formulas.Rate,
    lr_decay: formulas.Number,
    weight_decay: formulas.Number,
    initial_accumulator_value: formulas.Number,
    eps: formulas.Number,
    *,
    maximize: bool,
) -> formulas.Rule:
    """Adagrad: `s ← s + g²`, `x ← x - α / (1 + (t - 1)·η)·g / (√s + ε)`; s starts at a value of its own."""

    def coefficients(count: Any, t: Any) -> formulas.Coefficients:
        alpha = formulas.scalar(rate(count)) / (1 + (t - 1) * lr_decay.whole)
        return (alpha, eps.whole, weight_decay.whole), ()

    def element(g: Any, x: Any, slots: formulas.Slots, c: Sequence[Any]) -> tuple[Any, formulas.Slots]:
        alpha, eps, decay = c
        g = _decayed(g, x, decay)
        s = slots[0] + g * g
        return x - alpha * g / (jnp.sqrt(s) + eps), (s,)

    return formulas.lifted(AdagradSlots, {"sum": initial_accumulator_value}, coefficients, element, maximize)


class RmspropSlots(NamedTuple):
    """Slots of RMSprop."""

    step: Any
    square_avg: formulas.Leaves
    momentum_buffer: formulas.Leaves | None
    grad_avg: formulas.Leaves | None


def rmsprop(
    rate: formulas.Rate,
    alpha: formulas.Number,
    eps: formulas.Number,
    weight_decay: formulas.Number,
    momentum: formulas.Number,
    *,
    centered: bool,
    maximize: bool,
    keeps_momentum: bool,
) -> formulas.Rule:
    """RMSprop: `v ← a·v + (1 - a)·g²`, `d = g / (√v + ε)`, `b ← μ·b + d`, `x ← x - α·b`; where μ is 0, `x ← x - α·d`.

    Centered, `√(v - ḡ²)` stands for √v, with `ḡ ← a·ḡ + (1 - a)·g`.

    Args:
        keeps_momentum: whether there is a b at all.
    """

    def coefficients(count: Any, t: Any) -> formulas.Coefficients:
        numbers = alpha.whole, alpha.complement, eps.whole, weight_decay.whole, momentum.whole
        return (formulas.scalar(rate(count)), *numbers), ()

    def element(g: Any, x: Any, slots: formulas.Slots, c: Sequence[Any]) -> tuple[Any, formulas.Slots]:
        alpha, kept, new, eps, decay, mu = c
        v, *further = slots
        g = _decayed(g, x, decay)
        v = formulas.product(v, kept) + new * g * g
        under = v
        if centered:
            further[-1] = formulas.mixed(further[-1], g, kept, new)
            under = v - further[-1] * further[-1]
        d = g / (jnp.sqrt(under) + eps)
        if keeps_momentum:
            b = formulas.product(further[0], mu) + d
            further[0] = jnp.where(mu != 0, b, further[0])
            d = jnp.where(mu != 0, b, d)
        return x - alpha * d, (v, *further)

    starts = {
        "square_avg": 0.0,
        "momentum_buffer": 0.0 if keeps_momentum else None,
        "grad_avg": 0.0 if centered else None,
    }
    return formulas.lifted(RmspropSlots, starts, coefficients, element, maximize)


class RpropSlots(NamedTuple):
    """Slots of Rprop."""

    step: Any
    prev: formulas.Leaves
    step_size: formulas.Leaves


def rprop(
    rate: formulas.Rate,
    eta_minus: formulas.Number,
    eta_plus: formulas.Number,
    step_min: formulas.Number,
    step_max: formulas.Number,
    *,
    maximize: bool,
) -> formulas.Rule:
    """Rprop: `s ← s·η⁺` where g has the sign it had, `s ← s·η⁻` where it has the other, and g counts as 0 then; s is
    kept within bounds; `x ← x - sign(g)·s`. The learning rate is the first s.
    """

    def coefficients(count: Any, t: Any) -> formulas.Coefficients:
        numbers = eta_minus.whole, eta_plus.whole, step_min.whole, step_max.whole
        return (*numbers, formulas.scalar(rate(count)), formulas.scalar(count == 0)), ()

    def element(g: Any, x: Any, slots: formulas.Slots, c: Sequence[Any]) -> tuple[Any, formulas.Slots]:
        minus, plus, least, most, alpha, first = c
        before, s = slots
        agreement = g * before
        s = jnp.where(first != 0, alpha, s)  # as torch makes it at the first step
        s = jnp.clip(s * jnp.where(agreement > 0, plus, jnp.where(agreement < 0, minus, 1)), least, most)
        g = jnp.where(agreement < 0, 0, g)
        sign = jnp.where(jnp.isnan(g), 0, jnp.sign(g))  # torch's sign of what is no number is 0
        return x - sign * s, (g, s)

    return formulas.lifted(RpropSlots, {"prev": 0.0, "step_size": rate}, coefficients, element, maximize)


class AsgdSlots(NamedTuple):
    """Slots of ASGD; eta and mu are what the next step uses. shape=()"""

    step: Any
    eta: Any
    mu: Any
    ax: formulas.Leaves


def asgd(
    rate: formulas.Rate,
    lambd: formulas.Number,
    alpha: formulas.Number,
    t0: formulas.Number,
    weight_decay: formulas.Number,
    *,
    maximize: bool,
) -> formulas.Rule:
    """ASGD: `x ← x·(1 - λ·η) - η·g`, `a ← a + μ·(x - a)`; then `η ← α / (1 + λ·α·t)^κ`, `μ ← 1 / max(1, t - t₀)`.

    η starts as the learning rate, μ as 1, which makes a the parameters. Weight decay is added to g.
    """

    def coefficients(count: Any, t: Any, eta: Any, mu: Any) -> formulas.Coefficients:
        first = formulas.scalar(rate(count))
        eta = jnp.where(count == 0, first, eta)  # as torch makes it at the first step
        after = first / (1 + lambd.whole * first * t) ** alpha.whole
        share = 1 / jnp.maximum(1, t - t0.whole)
        return (eta, lambd.whole * eta, mu, weight_decay.whole), (after, share)

    def element(g: Any, x: Any, slots: formulas.Slots, c: Sequence[Any]) -> tuple[Any, formulas.Slots]:
        eta, shrink, mu, decay = c
        g = _decayed(g, x, decay)
        x = formulas.product(x, 1 - shrink) - eta * g
        average = slots[0]
        return x, (jnp.where(mu == 1, x, average + mu * (x - average)),)

    return formulas.lifted(
        AsgdSlots,
        {"ax": 0.0},
        coefficients,
        element,
        maximize,
        eta=lambda: formulas.scalar(rate(formulas.zero())),
        mu=lambda: formulas.scalar(1),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What they share beyond the formula.


def _decayed(g: Any, x: Any, decay: Any) -> Any:
    """The gradient with `decay·x` in it; as it is where decay is 0, even if x is not finite."""
    return jnp.where(decay != 0, g + decay * x, g)


def _length(a: Any, new: Any, t: Any) -> Any:
    """RAdam's `ρ_t = 2 / (1 - β) - 1 - 2·t / (e^(a·t) - 1)`, with `a = -log β` and `new = 1 - β`.

    While a·t is below 1 the great terms cancel out: with `φ(y) = y / (e^y - 1) - 1 + y / 2` it is also
    `t + 2·(φ(a) - φ(a·t)) / a`, and φ a series in y².
    """
    y = a * t
    early = t + 2 * (_phi(a) - _phi(y)) / a
    late = 2 / new - 1 - 2 * t / jnp.expm1(y)
    return jnp.where(y < 1, early, late)


def _phi(y: Any) -> Any:
    """`y / (e^y - 1) - 1 + y / 2` for y from 0 to 1: the sum of `B_2k / (2k)!·y^2k`, to 16 digits."""
    return y * y * functools.reduce(lambda total, term: total * y * y + term, reversed(_BERNOULLI), jnp.zeros_like(y))


# B_2k / (2k)! for k from 1: 2·(-1)^(k+1)·ζ(2k) / (2π)^2k.
_BERNOULLI = tuple(
    number / math.factorial(2 * k)
    for k, number in enumerate(
        (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798, -174611 / 330), 1
    )
)
