"""Torch's optimizers: the update rules of ``torch.optim``, as its documentation defines them, with its slots.

Each function gives ``(init, update)`` over a list of leaves: ``init(params, alone=...) -> slots`` and ``update(grads,
params, slots) -> (params, slots)``. Slots are named tuples of torch's names; ``step`` counts updates, once for all
leaves, or for each alone. A ``None`` in them is what these arguments do not keep.

Numbers come as ``Number``s, traced or not. Torch takes what depends on numbers alone, such as ``1 - beta ** step``, in
Python's 64 bits; here it is taken in 32 where the program has no others, in ways that lose no digits. Leaves of 16 bits
are computed in 32; complex leaves as their real and imaginary parts, each by itself, as torch does.

https://docs.pytorch.org/docs/stable/optim.html, torch 2.13. Must not know trees, sessions or specs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax

Leaves: TypeAlias = list[Any]
Slots: TypeAlias = Any
Rate: TypeAlias = Callable[[Any], Any]
"""From the number of updates so far, shape (), int32, to the learning rate of the next one."""


class Number(NamedTuple):
    """A number of 64 bits as two of 32, for programs that have no others.

    Attributes:
        value: the nearest one of 32 bits. shape=()
        rest: what is missing to it. shape=()
    """

    value: Any
    rest: Any

    @classmethod
    def of(cls, value: float) -> Number:
        """Both parts of a Python number."""
        return cls(*halves(value))

    @property
    def whole(self) -> Any:
        """The number, in the widest type of the program. shape=()"""
        return _scalar(self.value) + _scalar(self.rest)

    @property
    def complement(self) -> Any:
        """One minus the number, to the last digit: of 0.999 in 32 bits, 1e-5 of it would be lost. shape=()"""
        return (1 - _scalar(self.value)) - _scalar(self.rest)

    @property
    def _log(self) -> Any:
        return jnp.log1p(-self.complement)

    def unbiased(self, t: Any) -> Any:
        """One minus the t-th power: what an average that began at zero has seen after t values. shape=()"""
        return -jnp.expm1(t * self._log)


def halves(value: float) -> tuple[float, float]:
    """A number as the nearest one of 32 bits, and what is missing to it."""
    nearest = float(np.float32(value))
    return nearest, value - nearest


class Rule(NamedTuple):
    """An optimizer of torch.

    Attributes:
        init: (params, alone) -> slots. What is of shape () there is one for all leaves; alone, a list of one for each.
        update: (grads, params, slots) -> (params, slots).
    """

    init: Callable[[Leaves, bool], Slots]
    update: Callable[[Leaves, Leaves, Slots], tuple[Leaves, Slots]]


# ---------------------------------------------------------------------------------------------------------------------
# The rules. `element` is of one real array: (g, x, its slots, coefficients) -> (x, its slots).


class SgdSlots(NamedTuple):
    """Slots of SGD; torch keeps no step, the first momentum and a schedule need one."""

    step: Any
    momentum_buffer: Leaves | None


def sgd(
    rate: Rate,
    momentum: Number,
    dampening: Number,
    weight_decay: Number,
    *,
    nesterov: bool,
    maximize: bool,
    keeps_momentum: bool,
) -> Rule:
    """SGD: `b ← μ·b + (1 - τ)·g`, at first `b ← g`; `x ← x - α·b`, with Nesterov `x ← x - α·(g + μ·b)`.

    Where μ is 0, b stays as it is and `x ← x - α·g`. Weight decay is added to g.

    Args:
        keeps_momentum: whether there is a b at all.
    """

    def coefficients(count: Any, t: Any) -> Coefficients:
        mu = momentum.whole
        return (_scalar(rate(count)), mu, dampening.complement, weight_decay.whole, _scalar(count == 0)), ()

    def element(g: Any, x: Any, slots: Slots, c: Sequence[Any]) -> tuple[Any, Slots]:
        alpha, mu, kept, decay, first = c
        g = _decayed(g, x, decay)
        if not slots:
            return x - alpha * g, ()
        (b,) = slots
        new = jnp.where(first != 0, g, _product(b, mu) + kept * g)
        direction = g + mu * new if nesterov else new
        return x - alpha * jnp.where(mu != 0, direction, g), (jnp.where(mu != 0, new, b),)

    return _lifted(SgdSlots, {"momentum_buffer": 0.0 if keeps_momentum else None}, coefficients, element, maximize)


class AdamSlots(NamedTuple):
    """Slots of Adam and AdamW."""

    step: Any
    exp_avg: Leaves
    exp_avg_sq: Leaves
    max_exp_avg_sq: Leaves | None


def adam(
    rate: Rate,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    *,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
) -> Rule:
    """Adam: `m ← β₁·m + (1 - β₁)·g`, `v ← β₂·v + (1 - β₂)·g²`, `x ← x - α / (1 - β₁^t)·m / (√v / √(1 - β₂^t) + ε)`.

    With AMSGrad the greatest v so far stands under the root. Decoupled, weight decay is `x ← x·(1 - α·λ)` beforehand.
    """

    def coefficients(count: Any, t: Any) -> Coefficients:
        alpha = _scalar(rate(count))
        scales = alpha / beta1.unbiased(t), jnp.sqrt(beta2.unbiased(t)), eps.whole
        decay = alpha * weight_decay.whole if decoupled_weight_decay else weight_decay.whole
        return (beta1.whole, beta1.complement, beta2.whole, beta2.complement, *scales, decay), ()

    def element(g: Any, x: Any, slots: Slots, c: Sequence[Any]) -> tuple[Any, Slots]:
        b1, new1, b2, new2, alpha, root, eps, decay = c
        m, v, *greatest = slots
        if decoupled_weight_decay:
            x = _product(x, 1 - decay)
        else:
            g = _decayed(g, x, decay)
        m = _mixed(m, g, b1, new1)
        v = _product(v, b2) + new2 * g * g
        greatest = [jnp.maximum(most, v) for most in greatest]
        denominator = jnp.sqrt(greatest[0] if amsgrad else v) / root + eps
        return x - alpha * m / denominator, (m, v, *greatest)

    starts = {"exp_avg": 0.0, "exp_avg_sq": 0.0, "max_exp_avg_sq": 0.0 if amsgrad else None}
    return _lifted(AdamSlots, starts, coefficients, element, maximize)


def adamw(
    rate: Rate,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    *,
    amsgrad: bool,
    maximize: bool,
) -> Rule:
    """AdamW: Adam with decoupled weight decay."""
    flags = {"amsgrad": amsgrad, "maximize": maximize, "decoupled_weight_decay": True}
    return adam(rate, beta1, beta2, eps, weight_decay, **flags)


class NadamSlots(NamedTuple):
    """Slots of NAdam; mu_product is the product of all μ so far. shape=()"""

    step: Any
    mu_product: Any
    exp_avg: Leaves
    exp_avg_sq: Leaves


def nadam(
    rate: Rate,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    momentum_decay: Number,
    *,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> Rule:
    """NAdam: m and v as in Adam, `μ_t = β₁·(1 - 0.96^(t·ψ) / 2)`, `M_t` the product of the μ up to t,
    `x ← x - α·((1 - μ_t) / (1 - M_t)·g + μ_{t+1} / (1 - M_{t+1})·m) / (√(v / (1 - β₂^t)) + ε)`.
    """

    def mu(t: Any) -> Any:
        return beta1.whole * (1 - 0.5 * jnp.exp(t * momentum_decay.whole * math.log(0.96)))

    def coefficients(count: Any, t: Any, product: Any) -> Coefficients:
        alpha = _scalar(rate(count))
        product = product * mu(t)
        scales = alpha * (1 - mu(t)) / (1 - product), alpha * mu(t + 1) / (1 - product * mu(t + 1))
        decay = alpha * weight_decay.whole if decoupled_weight_decay else weight_decay.whole
        betas = beta1.whole, beta1.complement, beta2.whole, beta2.complement
        return (*betas, beta2.unbiased(t), eps.whole, *scales, decay), (product,)

    def element(g: Any, x: Any, slots: Slots, c: Sequence[Any]) -> tuple[Any, Slots]:
        b1, new1, b2, new2, seen, eps, of_g, of_m, decay = c
        m, v = slots
        if decoupled_weight_decay:
            x = _product(x, 1 - decay)
        else:
            g = _decayed(g, x, decay)
        m = _mixed(m, g, b1, new1)
        v = _product(v, b2) + new2 * g * g
        denominator = jnp.sqrt(v / seen) + eps
        return x - of_g * g / denominator - of_m * m / denominator, (m, v)

    starts = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
    return _lifted(NadamSlots, starts, coefficients, element, maximize, mu_product=lambda: _scalar(1))


class MomentSlots(NamedTuple):
    """Slots of RAdam."""

    step: Any
    exp_avg: Leaves
    exp_avg_sq: Leaves


def radam(
    rate: Rate,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    *,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> Rule:
    """RAdam: m and v as in Adam; `x ← x - α·m̂·r_t·√(1 - β₂^t) / (√v + ε)` where `ρ_t > 5`, else `x ← x - α·m̂`.

    `ρ_t = ρ_∞ - 2·t·β₂^t / (1 - β₂^t)`, `ρ_∞ = 2 / (1 - β₂) - 1`,
    `r_t = √((ρ_t - 4)·(ρ_t - 2)·ρ_∞ / ((ρ_∞ - 4)·(ρ_∞ - 2)·ρ_t))`.
    """

    def coefficients(count: Any, t: Any) -> Coefficients:
        alpha = _scalar(rate(count))
        seen = beta2.unbiased(t)
        most = 2 / beta2.complement - 1
        length = _length(-beta2._log, beta2.complement, t)
        ratio = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
        rectified = length > 5
        scale = jnp.where(rectified, jnp.sqrt(jnp.where(rectified, ratio, 1) * seen), 0)
        decay = alpha * weight_decay.whole if decoupled_weight_decay else weight_decay.whole
        betas = beta1.whole, beta1.complement, beta2.whole, beta2.complement
        return (*betas, alpha, beta1.unbiased(t), scale, _scalar(rectified), eps.whole, decay), ()

    def element(g: Any, x: Any, slots: Slots, c: Sequence[Any]) -> tuple[Any, Slots]:
        b1, new1, b2, new2, alpha, seen, scale, rectified, eps, decay = c
        m, v = slots
        if decoupled_weight_decay:
            x = _product(x, 1 - decay)
        else:
            g = _decayed(g, x, decay)
        m = _mixed(m, g, b1, new1)
        v = _product(v, b2) + new2 * g * g
        return x - m / seen * alpha * jnp.where(rectified != 0, scale / (jnp.sqrt(v) + eps), 1), (m, v)

    return _lifted(MomentSlots, {"exp_avg": 0.0, "exp_avg_sq": 0.0}, coefficients, element, maximize)


class AdamaxSlots(NamedTuple):
    """Slots of Adamax."""

    step: Any
    exp_avg: Leaves
    exp_inf: Leaves


def adamax(rate: Rate, beta1: Number, beta2: Number, eps: Number, weight_decay: Number, *, maximize: bool) -> Rule:
    """Adamax: `m ← β₁·m + (1 - β₁)·g`, `u ← max(β₂·u, |g| + ε)`, `x ← x - α / (1 - β₁^t)·m / u`."""

    def coefficients(count: Any, t: Any) -> Coefficients:
        alpha = _scalar(rate(count)) / beta1.unbiased(t)
        return (beta1.whole, beta1.complement, beta2.whole, alpha, eps.whole, weight_decay.whole), ()

    def element(g: Any, x: Any, slots: Slots, c: Sequence[Any]) -> tuple[Any, Slots]:
        b1, new1, b2, alpha, eps, decay = c
        m, u = slots
        g = _decayed(g, x, decay)
        m = _mixed(m, g, b1, new1)
        u = jnp.maximum(b2 * u, jnp.abs(g) + eps)
        return x - alpha * m / u, (m, u)

    return _lifted(AdamaxSlots, {"exp_avg": 0.0, "exp_inf": 0.0}, coefficients, element, maximize)


class AdadeltaSlots(NamedTuple):
    """Slots of Adadelta."""

    step: Any
    square_avg: Leaves
    acc_delta: Leaves


def adadelta(rate: Rate, rho: Number, eps: Number, weight_decay: Number, *, maximize: bool) -> Rule:
    """Adadelta: `v ← ρ·v + (1 - ρ)·g²`, `d = √(u + ε) / √(v + ε)·g`, `u ← ρ·u + (1 - ρ)·d²`, `x ← x - α·d`."""

    def coefficients(count: Any, t: Any) -> Coefficients:
        return (_scalar(rate(count)), rho.whole, rho.complement, eps.whole, weight_decay.whole), ()

    def element(g: Any, x: Any, slots: Slots, c: Sequence[Any]) -> tuple[Any, Slots]:
        alpha, kept, new, eps, decay = c
        v, u = slots
        g = _decayed(g, x, decay)
        v = _product(v, kept) + new * g * g
        d = jnp.sqrt(u + eps) / jnp.sqrt(v + eps) * g
        return x - alpha * d, (v, _product(u, kept) + new * d * d)

    return _lifted(AdadeltaSlots, {"square_avg": 0.0, "acc_delta": 0.0}, coefficients, element, maximize)


class AdagradSlots(NamedTuple):
    """Slots of Adagrad."""

    step: Any
    sum: Leaves


def adagrad(
    rate: Rate,
    lr_decay: Number,
    weight_decay: Number,
    initial_accumulator_value: Number,
    eps: Number,
    *,
    maximize: bool,
) -> Rule:
    """Adagrad: `s ← s + g²`, `x ← x - α / (1 + (t - 1)·η)·g / (√s + ε)`; s starts at a value of its own."""

    def coefficients(count: Any, t: Any) -> Coefficients:
        alpha = _scalar(rate(count)) / (1 + (t - 1) * lr_decay.whole)
        return (alpha, eps.whole, weight_decay.whole), ()

    def element(g: Any, x: Any, slots: Slots, c: Sequence[Any]) -> tuple[Any, Slots]:
        alpha, eps, decay = c
        g = _decayed(g, x, decay)
        s = slots[0] + g * g
        return x - alpha * g / (jnp.sqrt(s) + eps), (s,)

    return _lifted(AdagradSlots, {"sum": initial_accumulator_value}, coefficients, element, maximize)


class RmspropSlots(NamedTuple):
    """Slots of RMSprop."""

    step: Any
    square_avg: Leaves
    momentum_buffer: Leaves | None
    grad_avg: Leaves | None


def rmsprop(
    rate: Rate,
    alpha: Number,
    eps: Number,
    weight_decay: Number,
    momentum: Number,
    *,
    centered: bool,
    maximize: bool,
    keeps_momentum: bool,
) -> Rule:
    """RMSprop: `v ← a·v + (1 - a)·g²`, `d = g / (√v + ε)`, `b ← μ·b + d`, `x ← x - α·b`; where μ is 0, `x ← x - α·d`.

    Centered, `√(v - ḡ²)` stands for √v, with `ḡ ← a·ḡ + (1 - a)·g`.

    Args:
        keeps_momentum: whether there is a b at all.
    """

    def coefficients(count: Any, t: Any) -> Coefficients:
        numbers = alpha.whole, alpha.complement, eps.whole, weight_decay.whole, momentum.whole
        return (_scalar(rate(count)), *numbers), ()

    def element(g: Any, x: Any, slots: Slots, c: Sequence[Any]) -> tuple[Any, Slots]:
        alpha, kept, new, eps, decay, mu = c
        v, *further = slots
        g = _decayed(g, x, decay)
        v = _product(v, kept) + new * g * g
        under = v
        if centered:
            further[-1] = _mixed(further[-1], g, kept, new)
            under = v - further[-1] * further[-1]
        d = g / (jnp.sqrt(under) + eps)
        if keeps_momentum:
            b = _product(further[0], mu) + d
            further[0] = jnp.where(mu != 0, b, further[0])
            d = jnp.where(mu != 0, b, d)
        return x - alpha * d, (v, *further)

    starts = {
        "square_avg": 0.0,
        "momentum_buffer": 0.0 if keeps_momentum else None,
        "grad_avg": 0.0 if centered else None,
    }
    return _lifted(RmspropSlots, starts, coefficients, element, maximize)


class RpropSlots(NamedTuple):
    """Slots of Rprop."""

    step: Any
    prev: Leaves
    step_size: Leaves


def rprop(
    rate: Rate,
    eta_minus: Number,
    eta_plus: Number,
    step_min: Number,
    step_max: Number,
    *,
    maximize: bool,
) -> Rule:
    """Rprop: `s ← s·η⁺` where g has the sign it had, `s ← s·η⁻` where it has the other, and g counts as 0 then; s is
    kept within bounds; `x ← x - sign(g)·s`. The learning rate is the first s.
    """

    def coefficients(count: Any, t: Any) -> Coefficients:
        numbers = eta_minus.whole, eta_plus.whole, step_min.whole, step_max.whole
        return (*numbers, _scalar(rate(count)), _scalar(count == 0)), ()

    def element(g: Any, x: Any, slots: Slots, c: Sequence[Any]) -> tuple[Any, Slots]:
        minus, plus, least, most, alpha, first = c
        before, s = slots
        agreement = g * before
        s = jnp.where(first != 0, alpha, s)  # as torch makes it at the first step
        s = jnp.clip(s * jnp.where(agreement > 0, plus, jnp.where(agreement < 0, minus, 1)), least, most)
        g = jnp.where(agreement < 0, 0, g)
        sign = jnp.where(jnp.isnan(g), 0, jnp.sign(g))  # torch's sign of what is no number is 0
        return x - sign * s, (g, s)

    return _lifted(RpropSlots, {"prev": 0.0, "step_size": rate}, coefficients, element, maximize)


class AsgdSlots(NamedTuple):
    """Slots of ASGD; eta and mu are what the next step uses. shape=()"""

    step: Any
    eta: Any
    mu: Any
    ax: Leaves


def asgd(
    rate: Rate,
    lambd: Number,
    alpha: Number,
    t0: Number,
    weight_decay: Number,
    *,
    maximize: bool,
) -> Rule:
    """ASGD: `x ← x·(1 - λ·η) - η·g`, `a ← a + μ·(x - a)`; then `η ← α / (1 + λ·α·t)^κ`, `μ ← 1 / max(1, t - t₀)`.

    η starts as the learning rate, μ as 1, which makes a the parameters. Weight decay is added to g.
    """

    def coefficients(count: Any, t: Any, eta: Any, mu: Any) -> Coefficients:
        first = _scalar(rate(count))
        eta = jnp.where(count == 0, first, eta)  # as torch makes it at the first step
        after = first / (1 + lambd.whole * first * t) ** alpha.whole
        share = 1 / jnp.maximum(1, t - t0.whole)
        return (eta, lambd.whole * eta, mu, weight_decay.whole), (after, share)

    def element(g: Any, x: Any, slots: Slots, c: Sequence[Any]) -> tuple[Any, Slots]:
        eta, shrink, mu, decay = c
        g = _decayed(g, x, decay)
        x = _product(x, 1 - shrink) - eta * g
        average = slots[0]
        return x, (jnp.where(mu == 1, x, average + mu * (x - average)),)

    return _lifted(
        AsgdSlots,
        {"ax": 0.0},
        coefficients,
        element,
        maximize,
        eta=lambda: _scalar(rate(_zero())),
        mu=lambda: _scalar(1),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What they share.

Coefficients: TypeAlias = tuple[tuple[Any, ...], tuple[Any, ...]]
"""What an update multiplies by, and the scalars among the slots afterwards; each of shape ()."""


def _lifted(
    kind: Callable[..., Slots],
    starts: dict[str, Any],
    coefficients: Callable[..., Coefficients],
    element: Callable[[Any, Any, Slots, Sequence[Any]], tuple[Any, Slots]],
    maximize: bool,
    **scalars: Callable[[], Any],
) -> Rule:
    """The rule of a formula for one real array.

    Args:
        kind: named tuple of the slots.
        starts: by name what an array of a leaf starts with: a number, a Number, a rate; None: there is none.
        coefficients: (updates so far, t, the scalars) -> Coefficients.
        element: (g, x, the leaf's arrays, coefficients in its type) -> (x, the leaf's arrays).
        maximize: whether gradients are turned around first.
        scalars: by name what a scalar beside the step starts with.
    """
    kept = [name for name, start in starts.items() if start is not None]

    def init(params: Leaves, alone: bool) -> Slots:
        def each(start: Callable[[], Any]) -> Any:
            return [start() for _ in params] if alone else start()

        shared = {name: each(start) for name, start in scalars.items()}
        arrays = {name: [_filled(x, starts[name]) for x in params] if name in kept else None for name in starts}
        return kind(step=each(_zero), **shared, **arrays)

    def update(grads: Leaves, params: Leaves, slots: Slots) -> tuple[Leaves, Slots]:
        alone = isinstance(slots.step, list)
        shared = [getattr(slots, name) for name in ("step", *scalars)]
        counts = list(zip(*shared, strict=True)) if alone else [tuple(shared)]
        made = [coefficients(step, _scalar(step + 1), *numbers) for step, *numbers in counts]
        moved = []
        for i, (g, x) in enumerate(zip(grads, params, strict=True)):
            own = tuple(getattr(slots, name)[i] for name in kept)
            # Behind a barrier of its own a leaf is computed in the same way whatever else is compiled with it.
            c = lax.optimization_barrier(made[i if alone else 0][0])
            moved.append(_moved(element, -g if maximize else g, x, own, c))
        afters = [(step + 1, *after) for (step, *_), (_, after) in zip(counts, made, strict=True)]
        after = afters[0] if afters else [[] for _ in shared]  # of a rule that keeps each leaf by itself, and has none
        if alone and afters:
            after = [list(numbers) for numbers in zip(*afters, strict=True)]
        arrays = {name: [own[k] for _, own in moved] for k, name in enumerate(kept)}
        return [x for x, _ in moved], slots._replace(**dict(zip(("step", *scalars), after, strict=True)), **arrays)

    return Rule(init, update)


def _moved(element: Callable[..., Any], g: Any, x: Any, own: Slots, c: Sequence[Any]) -> tuple[Any, Slots]:
    """One leaf and its arrays after an update, in the types they had."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        real = _moved(element, jnp.real(g), jnp.real(x), tuple(map(jnp.real, own)), c)
        imag = _moved(element, jnp.imag(g), jnp.imag(x), tuple(map(jnp.imag, own)), c)
        return lax.complex(real[0], imag[0]), tuple(map(lax.complex, real[1], imag[1]))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    arrays = (array.astype(wide) for array in (g, x, *own))
    g_wide, x_wide, *own_wide = arrays
    new, slots = element(g_wide, x_wide, tuple(own_wide), [scalar.astype(wide) for scalar in c])
    return new.astype(x.dtype), tuple(after.astype(before.dtype) for after, before in zip(slots, own, strict=True))


def _filled(x: Any, start: Any) -> Any:
    """An array like a leaf; the parts of a complex one are filled alike."""
    if isinstance(start, float):
        return jnp.full_like(x, start)
    number = start.whole if isinstance(start, Number) else _scalar(start(_zero()))
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        number = lax.complex(number, number)
    return jnp.full_like(x, number)


def _zero() -> Any:
    return jnp.zeros((), jnp.int32)


def _scalar(number: Any) -> Any:
    """A number in the widest type of the program. shape=()"""
    return jnp.asarray(number, jnp.result_type(float))


def _decayed(g: Any, x: Any, decay: Any) -> Any:
    """The gradient with `decay·x` in it; as it is where decay is 0, even if x is not finite."""
    return jnp.where(decay != 0, g + decay * x, g)


def _product(a: Any, b: Any) -> Any:
    """`a·b`, rounded by itself, as torch does, and not in one with a sum that it goes into.

    Rounding errors of `x·(1 - α·λ)` have the same sign for many steps. A compiler does not see through the choice.
    """
    product = a * b
    return jnp.where(jnp.isnan(product), a, product)


def _mixed(m: Any, g: Any, kept: Any, new: Any) -> Any:
    """`kept·m + new·g`, where kept + new is 1, from the nearer end: an average of equal values is that value."""
    return jnp.where(new < 0.5, m + new * (g - m), g - kept * (g - m))


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
