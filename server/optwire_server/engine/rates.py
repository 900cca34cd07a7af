"""The numbers of a spec that are operands of the compiled update: learning rates, and those of formulas.

A constant schedule in the place of a rate is a number in other words. A number of ``torch_*`` or of an outer optimizer
is two operands: what 32 bits hold of it, and the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from optwire_proto import catalogue, specs
from optwire_proto.specs import Spec
from optwire_server.optimizers import formulas

# Schedules that are a number, and the argument that is it.
CONSTANTS: Final = {"constant": "step_size", "constant_schedule": "value"}
_SCHEDULES: Final = frozenset(entry.name for entry in catalogue.SEED if entry.kind == "schedule")
_OPTIMIZERS: Final = frozenset(entry.name for entry in catalogue.SEED if entry.kind == "optimizer")
# Numbers that are operands beside the rates, and those of them without which a slot is missing.
_NUMBERS: Final = frozenset(
    f"{entry.name}.{parameter.name}"
    for entry in (*catalogue.TORCH, *catalogue.OUTER)
    for parameter in entry.parameters
    if parameter.takes.startswith("operand:")
)
_SLOTS: Final = ("torch_sgd.momentum", "torch_rmsprop.momentum")


def rates(spec: Spec) -> dict[str, float]:
    """The operands of a checked spec by path, and by ``rest`` of one: learning rates that are numbers, and numbers."""
    operands: dict[str, float] = {}
    for path, value in specs.places(spec):
        if _is_number(path):
            operands[path], operands[rest(path)] = formulas.halves(value)
        elif _is_rate(path) and not isinstance(value, Spec) and _is_constant(value):
            operands[path] = float(value)
    return operands


def rest(path: str) -> str:
    """Where the rest of the number at a path stands among the operands; no path is written so."""
    return f"{path} rest"


def rateless(spec: Spec) -> Spec:
    """A checked spec without the values of its operands, however constant rates are given; a slot's stays 0 or not."""
    values = {}
    for path, value in specs.places(spec):
        if _is_number(path):
            values[path] = float(value != 0) if _has_slot(path) else 0.0
        elif path.rpartition(".")[2] in catalogue.RATES and _is_rate(path) and _is_constant(value):
            values[path] = 0.0
    without: Spec = specs.replaced(spec, values)
    return without


def with_slots(spec: Spec, of: Spec) -> Spec:
    """A checked spec whose program keeps every slot that one of ``of`` keeps: a momentum that has become 0 is none."""
    before = {path: value for path, value in specs.places(of) if _has_slot(path) and value != 0}
    values = {path: before[path] for path, value in specs.places(spec) if value == 0 and path in before}
    same: Spec = specs.replaced(spec, values)
    return same


def are_operands(values: Mapping[str, Any], spec: Spec) -> bool:
    """Whether these values, by path, are other operands of the program that was compiled for a checked spec."""
    before = rates(spec)
    return all(
        path in before and not isinstance(value, Spec) and (before[path] != 0 or not _has_slot(path))
        for path, value in values.items()
    )


def _is_number(path: str) -> bool:
    """Whether a number here is an operand, and no rate."""
    return ".".join(path.split(".")[-2:]) in _NUMBERS


def _has_slot(path: str) -> bool:
    """Whether a slot is there only where the number here is not 0."""
    return ".".join(path.split(".")[-2:]) in _SLOTS


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
