"""The seed's optimizers and schedules by their own names and signatures, torch's, outer ones, and what goes around.

Each builds a spec. No JAX here. What the seed's names compute is documented in ``optwire_server.optimizers``, what
``torch_*`` do by torch, outer optimizers by their papers; optax's optimizers are in ``optwire.optax``. All mix:
``chain(optax.clip_by_global_norm(1.0), adam(1e-3))``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optwire_proto import catalogue, checks, entries, limits, spec_text, specs

Spec = specs.Spec
Rate = float | Spec

__all__ = [
    "Spec",
    "accumulate",
    "adagrad",
    "adam",
    "adamax",
    "chain",
    "clip_by_leaf_norm",
    "clip_grads",
    "constant",
    "delayed_nesterov",
    "ema_params",
    "exponential_decay",
    "exported",
    "fedadagrad",
    "fedadam",
    "fedavgm",
    "fedyogi",
    "grouped",
    "inverse_time_decay",
    "master_weights",
    "momentum",
    "nesterov",
    "on_nonfinite",
    "parse",
    "partition",
    "per_leaf",
    "piecewise_constant",
    "polynomial_decay",
    "rmsprop",
    "rmsprop_momentum",
    "sgd",
    "sm3",
    "table",
    "torch_adadelta",
    "torch_adagrad",
    "torch_adam",
    "torch_adamax",
    "torch_adamw",
    "torch_asgd",
    "torch_nadam",
    "torch_radam",
    "torch_rmsprop",
    "torch_rprop",
    "torch_sgd",
]


def _optimizer(name: str, **arguments: object) -> Spec:
    return _checked("optimizer", name, arguments)


def _schedule(name: str, **arguments: object) -> Spec:
    return _checked("schedule", name, arguments)


def _checked(kind: str, name: str, arguments: dict[str, object]) -> Spec:
    described = Spec(name, tuple((parameter, _plain(value)) for parameter, value in arguments.items()))
    return checks.check(described, kind)


def described(entry: entries.Entry, arguments: Mapping[str, Any]) -> Spec:
    """The spec of an entry of the catalogue with the arguments given, and no others; raises SpecError."""
    spec = Spec(entry.name, tuple((parameter, _plain(value)) for parameter, value in arguments.items()))
    return checks.check(spec, "schedule" if entry.kind == "schedule" else "transformation", complete=False)


def _plain(value: Any) -> Any:
    """NumPy's and other libraries' scalars and arrays as Python's numbers and lists, mappings as pairs."""
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return np.dtype(value).name
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bytes):
        return specs.Blob(value)
    if isinstance(value, Mapping):
        return tuple((_plain(key), _plain(item)) for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(_plain(item) for item in value)
    return value


def sgd(step_size: Rate) -> Spec:
    """Stochastic gradient descent: ``x - step_size * g``.

    Args:
      step_size: learning rate, a finite number, or a schedule of this module.

    Raises:
      SpecError: an argument has a value it cannot take. So do all functions of this module.
    """
    return _optimizer("sgd", step_size=step_size)


def momentum(step_size: Rate, mass: float) -> Spec:
    """Heavy-ball momentum; ``mass`` is the share of the velocity that is kept (Polyak, 1964)."""
    return _optimizer("momentum", step_size=step_size, mass=mass)


def nesterov(step_size: Rate, mass: float) -> Spec:
    """Nesterov's accelerated gradient; ``mass`` as in ``momentum`` (Sutskever et al., 2013)."""
    return _optimizer("nesterov", step_size=step_size, mass=mass)


def adagrad(step_size: Rate, momentum: float = 0.9) -> Spec:
    """Adagrad with momentum (Duchi et al., 2011)."""
    return _optimizer("adagrad", step_size=step_size, momentum=momentum)


def rmsprop(step_size: Rate, gamma: float = 0.9, eps: float = 1e-8) -> Spec:
    """RMSProp; ``gamma`` is the decay of the mean square, ``eps`` keeps the root from zero (Tieleman, Hinton, 2012)."""
    return _optimizer("rmsprop", step_size=step_size, gamma=gamma, eps=eps)


def rmsprop_momentum(step_size: Rate, gamma: float = 0.9, eps: float = 1e-8, momentum: float = 0.9) -> Spec:
    """RMSProp with momentum."""
    return _optimizer("rmsprop_momentum", step_size=step_size, gamma=gamma, eps=eps, momentum=momentum)


def adam(step_size: Rate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Spec:
    """Adam; ``b1`` and ``b2`` are the decays of the two moments (Kingma, Ba, 2015)."""
    return _optimizer("adam", step_size=step_size, b1=b1, b2=b2, eps=eps)


def adamax(step_size: Rate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Spec:
    """Adamax, Adam with the infinity norm (Kingma, Ba, 2015, section 7)."""
    return _optimizer("adamax", step_size=step_size, b1=b1, b2=b2, eps=eps)


def sm3(step_size: Rate, momentum: float = 0.9) -> Spec:
    """SM3, second moments kept per row and column only (Anil et al., 2019)."""
    return _optimizer("sm3", step_size=step_size, momentum=momentum)


def constant(step_size: float) -> Spec:
    """The same learning rate at every step."""
    return _schedule("constant", step_size=step_size)


def exponential_decay(step_size: float, decay_steps: float, decay_rate: float) -> Spec:
    """``step_size * decay_rate ** (step / decay_steps)``; steps count from 0."""
    return _schedule("exponential_decay", step_size=step_size, decay_steps=decay_steps, decay_rate=decay_rate)


def inverse_time_decay(step_size: float, decay_steps: float, decay_rate: float, staircase: bool = False) -> Spec:
    """``step_size / (1 + decay_rate * step / decay_steps)``; with ``staircase`` the quotient is rounded down."""
    return _schedule(
        "inverse_time_decay",
        step_size=step_size,
        decay_steps=decay_steps,
        decay_rate=decay_rate,
        staircase=staircase,
    )


def polynomial_decay(step_size: float, decay_steps: float, final_step_size: float, power: float = 1.0) -> Spec:
    """From ``step_size`` to ``final_step_size`` over ``decay_steps`` steps, then constant."""
    return _schedule(
        "polynomial_decay",
        step_size=step_size,
        decay_steps=decay_steps,
        final_step_size=final_step_size,
        power=power,
    )


def piecewise_constant(boundaries: Sequence[float], values: Sequence[float]) -> Spec:
    """``values[k]`` from ``boundaries[k - 1]`` (in steps) on; one value more than boundaries."""
    return _schedule("piecewise_constant", boundaries=boundaries, values=values)


def clip_grads(max_norm: float) -> Spec:
    """Scales all gradients so that their joint L2 norm is at most ``max_norm``; a member of a ``chain``."""
    return _checked("transformation", "clip_grads", {"max_norm": max_norm})


def clip_by_leaf_norm(max_norm: float) -> Spec:
    """Scales the gradient of each leaf so that its L2 norm is at most ``max_norm``; a member of a ``chain``."""
    return _checked("transformation", "clip_by_leaf_norm", {"max_norm": max_norm})


def table(values: Sequence[float]) -> Spec:
    """A schedule given by one value for each step, at most 16,384 of them; the last one goes on."""
    if len(values) > limits.SPEC_ARRAY_BYTES_MAX // 4:
        most = limits.SPEC_ARRAY_BYTES_MAX // 4
        raise specs.wrong("table.values", f"at most {most} numbers", f"{len(values)} numbers")
    numbers = _plain(values)
    if isinstance(numbers, tuple) and all(map(specs.is_number, numbers)):
        numbers = specs.Array.of("f32", (len(numbers),), numbers)
    return _schedule("table", values=numbers)


def chain(*members: Spec) -> Spec:
    """Members in order, each on the updates of the one before: ``chain(clip_grads(1.0), adam(1e-3))``.

    An optimizer of the seed, or anything that has one, can only be the last.
    """
    return _checked("transformation", "chain", {"members": members})


def partition(transforms: Mapping[str, Spec]) -> Spec:
    """An optimizer for each group of parameters: ``partition({"**/bias": sgd(0.1), "**": adam(1e-3)})``.

    Args:
      transforms: optimizer by name pattern, in order: the first pattern that matches a leaf's name decides. ``*`` is
        any text within one component of a name, ``**`` any number of components. ``optax.set_to_zero()`` freezes a
        group.

    Raises:
      SpecError: as all functions here; and when a session is created, where a parameter is in no group, or a pattern
        matches none that earlier ones left.
    """
    return _checked("transformation", "partition", {"transforms": transforms})


def per_leaf(optimizer: Spec) -> Spec:
    """One instance of an optimizer for each leaf: ``per_leaf(torch_adamw(1e-3))``.

    Each leaf has slots and a count of updates of its own, so that ``session.step`` may be given None in the place of a
    gradient: that leaf, its slots and its count stay as they are. Norms that the optimizer takes are of one leaf.

    Args:
      optimizer: anything but ``accumulate``, ``partition``, ``grouped`` and what has them inside.
    """
    return _optimizer("per_leaf", optimizer=optimizer)


def grouped(of: Sequence[int], *optimizers: Spec) -> Spec:
    """An optimizer for each group of leaves, by position: ``grouped([0, 1, 0], adam(1e-3), sgd(0.1))``.

    Args:
      of: for every leaf, in the order of the session's tree, which of the optimizers it gets, from 0.
      optimizers: each has at least one leaf.

    Raises:
      SpecError: as all functions here; and when a session is created, where there are more or fewer leaves.
    """
    return _checked("transformation", "grouped", {"of": of, "optimizers": optimizers})


def accumulate(optimizer: Spec, k: int) -> Spec:
    """One update for every ``k`` pushes, with the mean of their gradients; the pushes between change no parameter."""
    return _optimizer("accumulate", optimizer=optimizer, k=k)


def on_nonfinite(optimizer: Spec, policy: str = "reject") -> Spec:
    """What becomes of a push with NaN or infinity in it, or one that would make the state so.

    Args:
      optimizer: what it surrounds.
      policy: "reject": ``NonFiniteError``, nothing is applied, the step stays. "skip": the step counts, state and
        parameters stay, and ``last_ack.metrics["skipped"]`` is 1. "zero": such elements of gradients become 0.
    """
    return _optimizer("on_nonfinite", optimizer=optimizer, policy=policy)


def ema_params(optimizer: Spec, decay: float = 0.999, debias: bool = False) -> Spec:
    """Keeps a moving average of the parameters, read by ``session.params(which="ema")``.

    Without ``debias`` it starts at the initial parameters; with it, at zero, corrected for that when read.
    """
    return _optimizer("ema_params", optimizer=optimizer, decay=decay, debias=debias)


def master_weights(optimizer: Spec, dtype: str = "float32") -> Spec:
    """Keeps the parameters in ``dtype`` and computes in it, while those that travel have the session's element type."""
    return _optimizer("master_weights", optimizer=optimizer, dtype=dtype)


def exported(update: bytes, learning_rate: Rate = 1.0) -> Spec:
    """An optimizer of your own: ``update(step, rate, grad, param, *slots) -> (param, *slots)`` as a file.

    Args:
      update: what ``jax.export``'s ``serialize`` gave, at most 256 KiB; ``optwire.jax.export_update`` makes it.
      learning_rate: what ``rate`` gets at each step.

    Raises:
      UnsupportedError: when a session is created, where the server's operator does not allow programs.
    """
    return _optimizer("exported", update=update, learning_rate=learning_rate)


def torch_sgd(
    learning_rate: Rate = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> Spec:
    """``torch.optim.SGD`` by torch's own definition, as all ``torch_*``.

    Every number of these optimizers may change from step to step without compiling anything (``set_hyperparams``);
    whether there is a momentum at all is decided when the session is created.

    Args:
      learning_rate: torch's ``lr``, or a schedule.
      momentum: the share of the buffer that is kept; 0: there is no buffer.
      dampening: one minus the share of a gradient that enters the buffer.
      weight_decay: multiplies the parameters; the product is added to the gradients.
      nesterov: whether the gradient is taken ahead; needs a momentum, and no dampening.
      maximize: whether gradients are turned around.
    """
    return _optimizer(
        "torch_sgd",
        learning_rate=learning_rate,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
    )


def torch_adam(
    learning_rate: Rate = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> Spec:
    """``torch.optim.Adam``; ``beta1`` and ``beta2`` are its ``betas``, ``amsgrad`` keeps the greatest second moment."""
    return _optimizer(
        "torch_adam",
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        maximize=maximize,
        decoupled_weight_decay=decoupled_weight_decay,
    )


def torch_adamw(
    learning_rate: Rate = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
) -> Spec:
    """``torch.optim.AdamW``: Adam whose weight decay shrinks parameters by themselves, past the moments."""
    return _optimizer(
        "torch_adamw",
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        maximize=maximize,
    )


def torch_nadam(
    learning_rate: Rate = 2e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> Spec:
    """``torch.optim.NAdam``: Adam with Nesterov's momentum; ``momentum_decay`` says how it grows."""
    return _optimizer(
        "torch_nadam",
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        momentum_decay=momentum_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
    )


def torch_radam(
    learning_rate: Rate = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> Spec:
    """``torch.optim.RAdam``: Adam, rectified while its second moment has seen little."""
    return _optimizer(
        "torch_radam",
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
    )


def torch_adamax(
    learning_rate: Rate = 2e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> Spec:
    """``torch.optim.Adamax``: Adam with the infinity norm."""
    return _optimizer(
        "torch_adamax",
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
    )


def torch_adadelta(
    learning_rate: Rate = 1.0,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> Spec:
    """``torch.optim.Adadelta``; ``rho`` is the share of its two averages that is kept."""
    return _optimizer(
        "torch_adadelta", learning_rate=learning_rate, rho=rho, eps=eps, weight_decay=weight_decay, maximize=maximize
    )


def torch_adagrad(
    learning_rate: Rate = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    *,
    maximize: bool = False,
) -> Spec:
    """``torch.optim.Adagrad``: rates shrink with the squared gradients seen."""
    return _optimizer(
        "torch_adagrad",
        learning_rate=learning_rate,
        lr_decay=lr_decay,
        weight_decay=weight_decay,
        initial_accumulator_value=initial_accumulator_value,
        eps=eps,
        maximize=maximize,
    )


def torch_rmsprop(
    learning_rate: Rate = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    *,
    maximize: bool = False,
) -> Spec:
    """``torch.optim.RMSprop``: gradients over a running root mean square, with ``centered`` over a deviation."""
    return _optimizer(
        "torch_rmsprop",
        learning_rate=learning_rate,
        alpha=alpha,
        eps=eps,
        weight_decay=weight_decay,
        momentum=momentum,
        centered=centered,
        maximize=maximize,
    )


def torch_rprop(
    learning_rate: Rate = 1e-2,
    eta_minus: float = 0.5,
    eta_plus: float = 1.2,
    step_min: float = 1e-6,
    step_max: float = 50.0,
    *,
    maximize: bool = False,
) -> Spec:
    """``torch.optim.Rprop``; the pairs are its ``etas`` and ``step_sizes``, the learning rate is the first step."""
    return _optimizer(
        "torch_rprop",
        learning_rate=learning_rate,
        eta_minus=eta_minus,
        eta_plus=eta_plus,
        step_min=step_min,
        step_max=step_max,
        maximize=maximize,
    )


def torch_asgd(
    learning_rate: Rate = 1e-2,
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> Spec:
    """``torch.optim.ASGD``: gradient descent whose slot ``ax`` is the average of the parameters from ``t0`` on."""
    return _optimizer(
        "torch_asgd",
        learning_rate=learning_rate,
        lambd=lambd,
        alpha=alpha,
        t0=t0,
        weight_decay=weight_decay,
        maximize=maximize,
    )


def fedavgm(learning_rate: Rate = 1.0, momentum: float = 0.9) -> Spec:
    """FedAvgM (Hsu et al., 2019): ``v = momentum * v + g``, ``x - learning_rate * v``, for pseudo-gradients ``g``.

    Pseudo-gradients are the global parameters minus the local ones, as ``optwire.LocalSteps`` pushes them; so for all
    outer optimizers. As those of ``torch_*``, their numbers may change at every step without compiling anything.
    """
    return _optimizer("fedavgm", learning_rate=learning_rate, momentum=momentum)


def fedadagrad(
    learning_rate: Rate, beta1: float = 0.0, tau: float = 1e-3, initial_accumulator_value: float = 0.0
) -> Spec:
    """FedAdagrad (Reddi et al., 2021); arguments as in ``fedadam``."""
    return _optimizer(
        "fedadagrad",
        learning_rate=learning_rate,
        beta1=beta1,
        tau=tau,
        initial_accumulator_value=initial_accumulator_value,
    )


def fedadam(
    learning_rate: Rate,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    initial_accumulator_value: float = 0.0,
) -> Spec:
    """FedAdam (Reddi et al., 2021), which corrects no moment for its start.

    Args:
      learning_rate: the server's, or a schedule.
      beta1: the share of the first moment that is kept.
      beta2: the share of the second moment that is kept.
      tau: added to the root of the second moment: the smaller, the more adaptive.
      initial_accumulator_value: what the second moment starts at, where that is more than ``tau`` squared.
    """
    return _optimizer(
        "fedadam",
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        tau=tau,
        initial_accumulator_value=initial_accumulator_value,
    )


def fedyogi(
    learning_rate: Rate,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    initial_accumulator_value: float = 0.0,
) -> Spec:
    """FedYogi (Reddi et al., 2021); arguments as in ``fedadam``."""
    return _optimizer(
        "fedyogi",
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        tau=tau,
        initial_accumulator_value=initial_accumulator_value,
    )


def delayed_nesterov(learning_rate: Rate = 0.7, momentum: float = 0.9, n: int = 4, c: float = 0.0) -> Spec:
    """Delayed Nesterov (Liu et al., 2024), for pseudo-gradients that are applied one by one, as in ``async`` sessions.

    Args:
      learning_rate: the outer one, or a schedule.
      momentum: the share of the momentum that is kept, every ``n`` updates.
      n: updates for each change of the momentum: the number of workers, say.
      c: share of the momentum that acts at each update between, at most ``1 / n``.
    """
    return _optimizer("delayed_nesterov", learning_rate=learning_rate, momentum=momentum, n=n, c=c)


def parse(text: str) -> Spec:
    """The spec that a text describes, such as ``"chain(clip_by_global_norm(1.0), adamw(1e-3, mask='**/kernel'))"``.

    Raises:
      SpecError: says at which line, column and path it goes wrong.
    """
    if not isinstance(text, str):
        raise specs.wrong("spec", "text", text)
    return spec_text.parse(text, catalogue.CATALOGUE)
