"""The seed's optimizers and schedules by their own names and signatures; each builds a spec. No JAX here.

What the names compute is documented in ``optwire_server.optimizers``, of which these are descriptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optwire_proto import specs

Spec = specs.Spec
Rate = float | Spec

__all__ = [
    "Spec",
    "adagrad",
    "adam",
    "adamax",
    "chain",
    "clip_grads",
    "constant",
    "exponential_decay",
    "inverse_time_decay",
    "momentum",
    "nesterov",
    "piecewise_constant",
    "polynomial_decay",
    "rmsprop",
    "rmsprop_momentum",
    "sgd",
    "sm3",
]


def _optimizer(name: str, **arguments: object) -> Spec:
    return _checked("optimizer", name, arguments)


def _schedule(name: str, **arguments: object) -> Spec:
    return _checked("schedule", name, arguments)


def _checked(kind: str, name: str, arguments: dict[str, object]) -> Spec:
    return specs.check(Spec(name, tuple((parameter, _plain(value)) for parameter, value in arguments.items())), kind)


def _plain(value: Any) -> Any:
    """NumPy's and other libraries' scalars and arrays as Python's numbers and lists; all else as it is."""
    if hasattr(value, "tolist"):
        value = value.tolist()
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


def chain(*members: Spec) -> Spec:
    """Transformations of the gradients, in order, then one optimizer: ``chain(clip_grads(1.0), adam(1e-3))``."""
    return _optimizer("chain", members=members)
