"""The one table between torch's names and the catalogue's: which optimizers there are, and what their arguments become.

Values, defaults and their checks are torch's own: its constructor is asked, with a parameter of no importance.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Final

import torch

from optwire_proto import errors

# Say how torch computes, not what; at their defaults they may stand in a group, as they do in torch's own.
IMPLEMENTATION: Final = ("foreach", "fused", "capturable", "differentiable")
# What the learning rate is called in every one of torch's optimizers.
RATE: Final = "lr"


@dataclasses.dataclass(frozen=True, slots=True)
class Definition:
    """One optimizer of ``torch.optim`` that the server has by torch's own definition.

    Attributes:
      name: as users write it: the class's name in lower case.
      kind: torch's class.
      numbers: torch's argument to the spec's, two of them where torch takes a pair. They may change while training.
      fixed: arguments of the same name on both sides that decide what slots there are, or how they start.
    """

    name: str
    kind: type[torch.optim.Optimizer]
    numbers: Mapping[str, tuple[str, ...]]
    fixed: tuple[str, ...] = ("maximize",)

    @property
    def constructor(self) -> str:
        """Name in the catalogue, and in ``optwire.optimizers``."""
        return f"torch_{self.name}"

    @property
    def arguments(self) -> tuple[str, ...]:
        """What torch's constructor takes beside the parameters."""
        return tuple(inspect.signature(self.kind).parameters)[1:]

    def defaults(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults of all groups, complete, as torch's optimizer would have them.

        Raises:
          TypeError: an argument that torch's optimizer does not have.
          InvalidArgumentError: an argument that says how torch is to compute.
          ValueError: whatever else torch refuses, in torch's words.
        """
        for name in arguments:
            if name not in self.arguments:
                raise TypeError(
                    f"RemoteOptimizer({self.name!r}): unexpected argument {name!r}; "
                    f"{self.kind.__name__} takes {', '.join(self.arguments)}"
                )
        refuse_implementation(arguments, f"RemoteOptimizer({self.name!r})")
        plain = {name: value for name, value in arguments.items() if name not in IMPLEMENTATION}
        return dict(self.kind([torch.zeros(1, requires_grad=True)], **plain).defaults)

    def check(self, group: Mapping[str, Any]) -> None:
        """Raises what torch's constructor would for the values of a group."""
        self.defaults({name: group[name] for name in self.arguments if name in group})


def refuse_implementation(arguments: Mapping[str, Any], where: str) -> None:
    """Raises InvalidArgumentError where an argument asks for one of torch's ways to compute."""
    for name in IMPLEMENTATION:
        if arguments.get(name):
            raise errors.InvalidArgumentError(
                f"{where}: {name}={arguments[name]!r} says how torch computes an update on this machine; "
                "remote: not needed, leave it out",
                subject=name,
                expected="None or False",
                got=repr(arguments[name]),
            )


def definition(optimizer: str | type) -> Definition | None:
    """The definition of that name, or of that class of torch; None where the text is no name.

    Raises:
      UnsupportedError: an optimizer of torch that is not served, with the reason.
    """
    name = optimizer.__name__.lower() if isinstance(optimizer, type) else optimizer
    if name in _REFUSED:
        raise errors.UnsupportedError(f"RemoteOptimizer({name!r}): {_REFUSED[name]}", subject=name)
    return DEFINITIONS.get(name)


_MOMENTS: Final[Mapping[str, tuple[str, ...]]] = {
    RATE: ("learning_rate",),
    "betas": ("beta1", "beta2"),
    "eps": ("eps",),
    "weight_decay": ("weight_decay",),
}


def _numbers(*names: str) -> dict[str, tuple[str, ...]]:
    return {RATE: ("learning_rate",), **{name: (name,) for name in names}}


DEFINITIONS: Final[Mapping[str, Definition]] = {
    found.name: found
    for found in (
        Definition(
            "sgd", torch.optim.SGD, _numbers("momentum", "dampening", "weight_decay"), fixed=("nesterov", "maximize")
        ),
        Definition("adam", torch.optim.Adam, _MOMENTS, fixed=("amsgrad", "decoupled_weight_decay", "maximize")),
        Definition("adamw", torch.optim.AdamW, _MOMENTS, fixed=("amsgrad", "maximize")),
        Definition(
            "nadam",
            torch.optim.NAdam,
            {**_MOMENTS, "momentum_decay": ("momentum_decay",)},
            fixed=("decoupled_weight_decay", "maximize"),
        ),
        Definition("radam", torch.optim.RAdam, _MOMENTS, fixed=("decoupled_weight_decay", "maximize")),
        Definition("adamax", torch.optim.Adamax, _MOMENTS),
        Definition("adadelta", torch.optim.Adadelta, _numbers("rho", "eps", "weight_decay")),
        Definition(
            "adagrad",
            torch.optim.Adagrad,
            _numbers("lr_decay", "weight_decay", "eps"),
            fixed=("initial_accumulator_value", "maximize"),
        ),
        Definition(
            "rmsprop",
            torch.optim.RMSprop,
            _numbers("alpha", "eps", "weight_decay", "momentum"),
            fixed=("centered", "maximize"),
        ),
        Definition(
            "rprop",
            torch.optim.Rprop,
            {**_numbers(), "etas": ("eta_minus", "eta_plus"), "step_sizes": ("step_min", "step_max")},
        ),
        Definition("asgd", torch.optim.ASGD, _numbers("lambd", "alpha", "t0", "weight_decay")),
    )
}

_REFUSED: Final[Mapping[str, str]] = {
    "lbfgs": "LBFGS evaluates the loss function several times in a step, which only this process can",
    "sparseadam": "SparseAdam is not served, as sparse gradients are not; use 'adam' with dense ones",
    "adafactor": "torch's Adafactor is not served; optax's is, as a spec: 'adafactor(1e-3)'",
    "muon": "torch's Muon is not served; optax's is, as a spec: 'muon(1e-3)'",
}


def names() -> str:
    """What can be written in the place of an optimizer, for messages."""
    return ", ".join(repr(name) for name in DEFINITIONS)
