"""The learning rates of a spec: where they stand, and which of them are numbers, operands of the compiled update.

A constant schedule in the place of a rate is a number in other words.
"""

from __future__ import annotations

from typing import Any, Final

from optwire_proto import catalogue, specs
from optwire_proto.specs import Spec

# Schedules that are a number, and the argument that is it.
CONSTANTS: Final = {"constant": "step_size", "constant_schedule": "value"}
_SCHEDULES: Final = frozenset(entry.name for entry in catalogue.SEED if entry.kind == "schedule")
_OPTIMIZERS: Final = frozenset(entry.name for entry in catalogue.SEED if entry.kind == "optimizer")


def rates(spec: Spec) -> dict[str, float]:
    """The learning rates of a checked spec that are numbers, by path: operands of the compiled update."""
    return {
        path: float(value)
        for path, value in specs.places(spec)
        if _is_rate(path) and not isinstance(value, Spec) and _is_constant(value)
    }


def rateless(spec: Spec) -> Spec:
    """A checked spec without the values of its learning rates, however constant ones are given."""
    values = {
        path: 0.0
        for path, value in specs.places(spec)
        if path.rpartition(".")[2] in catalogue.RATES and _is_rate(path) and _is_constant(value)
    }
    without: Spec = specs.replaced(spec, values)
    return without


def _is_constant(value: Any) -> bool:
    if isinstance(value, Spec):
        return value.name in CONSTANTS
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rate(path: str) -> bool:
    """Whether a number here is an operand: a rate, what a ``scale`` multiplies by, a constant in their place."""
    place, _, name = path.rpartition(".")
    holder, _, constant = place.rpartition(".")
    if CONSTANTS.get(constant) == name and holder:
        return _is_rate(holder)
    return name in catalogue.RATES and constant not in _SCHEDULES and constant != "max_learning_rate"


def first_rate(spec: Spec) -> tuple[str, Any] | None:
    """Path and value, a number or a schedule, of the first learning rate in a checked spec; None: it has none.

    Where nothing is called one, the first schedule of a ``scale_by_schedule`` is taken for it.
    """
    places = [(path, value) for path, value in specs.places(spec) if value is not None]
    named = (found for found in places if is_learning_rate(found[0]))
    return next(named, next((found for found in places if specs.ends_with(found[0], "step_size_fn")), None))


def is_learning_rate(path: str) -> bool:
    """Whether what stands at a path is called a learning rate, or the seed's ``step_size``."""
    place, _, name = path.rpartition(".")
    holder = place.rpartition(".")[2]
    return name in ("learning_rate", "max_learning_rate") or (name == "step_size" and holder in _OPTIMIZERS)


def constant_rate(spec: Spec) -> float | None:
    """The first learning rate of a checked spec where it is one number, given as such or as a constant schedule."""
    found = first_rate(spec)
    if found is None:
        return None
    value = found[1]
    if isinstance(value, Spec):
        return float(value[CONSTANTS[value.name]]) if value.name in CONSTANTS else None
    return float(value)
