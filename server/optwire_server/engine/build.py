"""A checked spec to the optimizer it describes. Looked up by name; nothing is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from optwire_proto import specs
from optwire_server import optimizers


class Rule(NamedTuple):
    """An optimizer ready to be compiled.

    Attributes:
      init: leaves -> opt_state.
      update: (learning rate or None, index, gradients, opt_state) -> opt_state.
      get_params: opt_state -> leaves.
      schedule: index -> learning rate; None where the learning rate is an operand of ``update``.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any, Any], Any]
    get_params: Callable[[Any], Any]
    schedule: Callable[[Any], Any] | None


def rule(spec: specs.Spec) -> Rule:
    """Builds the rule of a checked spec.

    A constant learning rate becomes an operand, so that one compiled update serves every value of it.
    """
    stages = _stages(spec)
    optimizer_spec = specs.core(spec)
    schedule = _schedule(optimizer_spec["step_size"])

    def optimizer(learning_rate: Any) -> optimizers.Optimizer:
        arguments = dict(optimizer_spec.arguments) | {"step_size": learning_rate if schedule is None else schedule}
        built: optimizers.Optimizer = getattr(optimizers, optimizer_spec.name)(**arguments)
        return built

    def update(learning_rate: Any, index: Any, grads: Any, opt_state: Any) -> Any:
        for stage in stages:
            grads = optimizers.clip_grads(grads, stage["max_norm"])
        return optimizer(learning_rate).update_fn(index, grads, opt_state)

    # Neither depends on the learning rate.
    any_rate = optimizer(0.0)
    return Rule(any_rate.init_fn, update, any_rate.params_fn, schedule)


def _stages(spec: specs.Spec) -> list[specs.Spec]:
    """The transformations of a chain, outermost first; chains may end in chains."""
    if spec.name != "chain":
        return []
    *transformations, last = spec["members"]
    return [*transformations, *_stages(last)]


def _schedule(rate: specs.Value) -> Callable[[Any], Any] | None:
    if not isinstance(rate, specs.Spec) or rate.name == "constant":
        return None
    built: Callable[[Any], Any] = getattr(optimizers, rate.name)(**dict(rate.arguments))
    return built
