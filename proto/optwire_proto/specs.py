"""Optimizers described as data, and the catalogue of what may be described. Standard library only."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Final

from optwire_proto import errors, limits

# A number, flag, text, nested spec, list of values, or None.
Value = Any


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """A named constructor and its arguments: an optimizer, a transformation or a schedule.

    Build one with ``optwire.optimizers``; ``check`` completes and validates it.

    Attributes:
      name: name in the catalogue.
      arguments: (parameter name, value) pairs; lists are tuples.
    """

    name: str
    arguments: tuple[tuple[str, Value], ...] = ()

    def __getitem__(self, parameter: str) -> Value:
        """The value of an argument; raises KeyError where it was not given."""
        return dict(self.arguments)[parameter]

    def replace(self, **arguments: Value) -> Spec:
        """The same spec with some arguments changed; order kept."""
        merged = dict(self.arguments) | arguments
        return Spec(self.name, tuple(merged.items()))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={shown(value)}' for name, value in self.arguments)})"


REQUIRED: Final = object()


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a constructor: its name, what it takes, its default.

    ``takes`` is one of "rate" (a number or a schedule), "number", "positive", "decay" (from 0 up to 1), "count" (a
    positive number of steps), "flag", "numbers", "specs".
    """

    name: str
    takes: str
    default: Value = REQUIRED


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One constructor of the catalogue; ``kind`` is "optimizer", "schedule" or "transformation"."""

    name: str
    kind: str
    parameters: tuple[Parameter, ...]
    summary: str


_RATE = Parameter("step_size", "rate")

# Names, parameters and defaults are those of jax.example_libraries.optimizers; tests hold them to it.
CATALOGUE: Final[Mapping[str, Entry]] = {
    entry.name: entry
    for entry in (
        Entry("sgd", "optimizer", (_RATE,), "Stochastic gradient descent."),
        Entry("momentum", "optimizer", (_RATE, Parameter("mass", "number")), "Heavy-ball momentum."),
        Entry("nesterov", "optimizer", (_RATE, Parameter("mass", "number")), "Nesterov's accelerated gradient."),
        Entry(
            "adagrad",
            "optimizer",
            (_RATE, Parameter("momentum", "number", 0.9)),
            "Adagrad with momentum: rates shrink with the squared gradients seen.",
        ),
        Entry(
            "rmsprop",
            "optimizer",
            (_RATE, Parameter("gamma", "number", 0.9), Parameter("eps", "positive", 1e-8)),
            "RMSProp: gradients divided by a running root mean square.",
        ),
        Entry(
            "rmsprop_momentum",
            "optimizer",
            (
                _RATE,
                Parameter("gamma", "number", 0.9),
                Parameter("eps", "positive", 1e-8),
                Parameter("momentum", "number", 0.9),
            ),
            "RMSProp with momentum.",
        ),
        Entry(
            "adam",
            "optimizer",
            (
                _RATE,
                Parameter("b1", "decay", 0.9),
                Parameter("b2", "decay", 0.999),
                Parameter("eps", "positive", 1e-8),
            ),
            "Adam: running means of gradients and squared gradients, corrected for their start.",
        ),
        Entry(
            "adamax",
            "optimizer",
            (
                _RATE,
                Parameter("b1", "decay", 0.9),
                Parameter("b2", "decay", 0.999),
                Parameter("eps", "positive", 1e-8),
            ),
            "Adamax: Adam with the infinity norm.",
        ),
        Entry(
            "sm3",
            "optimizer",
            (_RATE, Parameter("momentum", "number", 0.9)),
            "SM3: second moments kept per row and column only.",
        ),
        Entry("constant", "schedule", (Parameter("step_size", "number"),), "The same learning rate at every step."),
        Entry(
            "exponential_decay",
            "schedule",
            # A negative rate has no real power between whole multiples of decay_steps.
            (Parameter("step_size", "number"), Parameter("decay_steps", "count"), Parameter("decay_rate", "positive")),
            "step_size * decay_rate ** (step / decay_steps).",
        ),
        Entry(
            "inverse_time_decay",
            "schedule",
            (
                Parameter("step_size", "number"),
                Parameter("decay_steps", "count"),
                Parameter("decay_rate", "number"),
                Parameter("staircase", "flag", False),
            ),
            "step_size / (1 + decay_rate * step / decay_steps).",
        ),
        Entry(
            "polynomial_decay",
            "schedule",
            (
                Parameter("step_size", "number"),
                Parameter("decay_steps", "count"),
                Parameter("final_step_size", "number"),
                Parameter("power", "number", 1.0),
            ),
            "From step_size to final_step_size over decay_steps, along a power.",
        ),
        Entry(
            "piecewise_constant",
            "schedule",
            (Parameter("boundaries", "numbers"), Parameter("values", "numbers")),
            "One value before, between and after the boundaries (in steps).",
        ),
        Entry(
            "clip_grads",
            "transformation",
            (Parameter("max_norm", "positive"),),
            "Scales all gradients so that their joint L2 norm is at most max_norm.",
        ),
        Entry(
            "chain",
            "optimizer",
            (Parameter("members", "specs"),),
            "Transformations of the gradients, in order, then one optimizer.",
        ),
    )
}


def check(spec: Spec, kind: str = "optimizer", where: str = "") -> Spec:
    """Validates a spec and fills in every default, in the catalogue's order.

    Args:
      spec: what was described.
      kind: what it must be: "optimizer", "schedule" or "transformation".
      where: path of the spec inside another, for messages.

    Raises:
      SpecError: names the constructor or argument, what was expected and what came.
    """
    check_shape(spec)
    where = f"{where}.{spec.name[:80]}" if where else spec.name[:80]
    if where.count(".") >= limits.SPEC_DEPTH_MAX:
        raise errors.SpecError(f"{where[:80]}…: nested deeper than {limits.SPEC_DEPTH_MAX}")
    entry = CATALOGUE.get(spec.name)
    if entry is None or entry.kind != kind:
        known = ", ".join(name for name, other in CATALOGUE.items() if other.kind == kind)
        what = f"unknown {kind}" if entry is None else f"{_article(entry.kind)}, expected {_article(kind)}"
        raise errors.SpecError(
            f"{where!r}: {what}; expected one of {known}", subject=spec.name[:80], expected=known, got=spec.name[:80]
        )
    given: dict[str, Value] = {}
    names = [parameter.name for parameter in entry.parameters]
    for name, value in spec.arguments:
        if name in given or name not in names:
            problem = "given twice" if name in given else f"unknown argument; expected {', '.join(names)}"
            raise errors.SpecError(
                f"{where}({name[:80]}=…): {problem}", subject=f"{where}.{name[:80]}", expected=", ".join(names)
            )
        given[name] = value
    complete = []
    for parameter in entry.parameters:
        value = given.get(parameter.name, parameter.default)
        if value is REQUIRED:
            raise errors.SpecError(
                f"{where}: missing argument {parameter.name!r}", subject=f"{where}.{parameter.name}", got="nothing"
            )
        complete.append((parameter.name, _checked(parameter, value, where)))
    checked = Spec(spec.name, tuple(complete))
    _check_whole(checked, where)
    return checked


def check_shape(spec: Any) -> None:
    """Raises SpecError unless a spec has a name and (name, value) pairs, as its types say."""
    if not isinstance(spec.name, str):
        raise _wrong("spec", "text", spec.name)
    arguments = spec.arguments if isinstance(spec.arguments, tuple | list) else (spec.arguments,)
    for argument in arguments:
        if not isinstance(argument, tuple | list) or len(argument) != 2 or not isinstance(argument[0], str):
            raise _wrong(f"{spec.name[:80]}: arguments", "(name, value) pairs", argument)


def core(spec: Spec) -> Spec:
    """The optimizer itself: the last member of a chain, otherwise the spec."""
    return core(spec["members"][-1]) if spec.name == "chain" else spec


def learning_rate(spec: Spec) -> float | None:
    """The constant learning rate of a checked spec, or None where a schedule gives it."""
    rate = core(spec)["step_size"]
    if isinstance(rate, Spec):
        return float(rate["step_size"]) if rate.name == "constant" else None
    return float(rate)


# takes -> (test, what to say was expected)
_RULES: Final[Mapping[str, tuple[Any, str]]] = {
    "number": (lambda value: True, "a finite number that fits 32 bits"),
    "positive": (lambda value: value > 0, "a positive number"),
    "count": (lambda value: value > 0, "a positive number of steps"),
    "decay": (lambda value: 0 <= value < 1, "a number from 0 up to, not including, 1"),
}


def _checked(parameter: Parameter, value: Value, where: str) -> Value:
    """The value in its stored form; raises where the parameter cannot take it."""
    path = f"{where}.{parameter.name}"
    if parameter.takes in _RULES or (parameter.takes == "rate" and not isinstance(value, Spec)):
        test, expected = _RULES.get(parameter.takes, _RULES["number"])
        if not is_number(value) or not test(value):
            wanted = f"{expected} or a schedule" if parameter.takes == "rate" else expected
            raise _wrong(path, wanted, value)
        return value
    if parameter.takes == "rate":
        return check(value, "schedule", where)
    if parameter.takes == "flag":
        if not isinstance(value, bool):
            raise _wrong(path, "True or False", value)
        return value
    if not isinstance(value, tuple | list) or len(value) > limits.SPEC_LIST_MAX:
        raise _wrong(path, f"a list of at most {limits.SPEC_LIST_MAX} values", value)
    if parameter.takes == "numbers":
        for item in value:
            if not is_number(item):
                raise _wrong(path, "finite numbers", item)
        return tuple(value)
    for item in value:
        if not isinstance(item, Spec):
            raise _wrong(path, "specs", item)
    if not value:
        raise _wrong(path, "transformations and one optimizer", value)
    *transformations, optimizer = value
    return (
        *(check(item, "transformation", where) for item in transformations),
        check(optimizer, "optimizer", where),
    )


def _check_whole(spec: Spec, where: str) -> None:
    """What no argument shows alone."""
    if spec.name == "piecewise_constant":
        boundaries, values = spec["boundaries"], spec["values"]
        if len(values) != len(boundaries) + 1:
            raise _wrong(f"{where}.values", f"{len(boundaries) + 1} values, one more than boundaries", values)
        if any(a > b for a, b in itertools.pairwise(boundaries)):
            raise _wrong(f"{where}.boundaries", "boundaries that do not decrease", boundaries)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def is_number(value: Value) -> bool:
    """Whether an argument can be this number: finite, also in 32 bits."""
    if isinstance(value, int):
        # JAX takes whole numbers as 32 bits; larger ones must say that they are real numbers: 2.0**40.
        return not isinstance(value, bool) and -(2**31) <= value < 2**31
    return isinstance(value, float) and abs(value) <= limits.SPEC_NUMBER_MAX  # False for NaN


def _wrong(path: str, expected: str, value: Value) -> errors.SpecError:
    got = shown(value)[:80]
    return errors.SpecError(f"{path}: {got}, expected {expected}", subject=path, expected=expected, got=got)


def shown(value: Value) -> str:
    """A value as the text of its spec has it."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, int) and value.bit_length() > 1024:  # Python refuses to write down the longest
        return f"a whole number of {value.bit_length()} bits"
    return str(value) if isinstance(value, Spec) else repr(value)
