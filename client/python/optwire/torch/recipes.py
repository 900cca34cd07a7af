"""What a torch optimizer's groups ask for, as a spec; and which edits of them become changes of hyperparameters.

Two forms: groups that speak torch (``Named``), and a spec that speaks for itself (``Given``). A *value* here is a tuple
of floats: one for a number, two for a pair such as ``betas``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from optwire import optimizers
from optwire.torch import arrays, translation
from optwire_proto import catalogue, checks, errors, spec_text, specs, tensors

Groups = Sequence[dict[str, Any]]
# (group, torch's name of the argument) -> value
Values = dict[tuple[int, str], tuple[float, ...]]


class Kind(NamedTuple):
    """What leaves have in common that one optimizer of the spec serves."""

    group: int
    is_16_bit: bool


class Recipe(Protocol):
    """From groups to a spec, and from edits to hyperparameters."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def defaults(self) -> dict[str, Any]:
        """Of all groups, in torch's names."""

    @property
    def is_scheduled(self) -> bool:
        """Whether the server decides the learning rate step by step."""

    @property
    def wants_loss(self) -> bool:
        """Whether every step has to bring the loss."""

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        """Raises where a group says what cannot be meant."""

    def spec(self, groups: Groups, kinds: Sequence[Kind]) -> specs.Spec:
        """The optimizer of a session; ``kinds`` has one entry a leaf, in the order of the tree."""

    def values(self, groups: Groups) -> Values:
        """What the groups say now."""

    def initial(self, groups: Groups) -> Values:
        """What a session has in effect that was just made with these groups."""

    def fixed(self, groups: Groups) -> list[dict[str, Any]]:
        """Of each group, what cannot change once there is a session."""

    def changes(self, edits: Values, kinds: Sequence[Kind]) -> dict[str, float]:
        """Edits as hyperparameters by path; raises where one cannot be made."""

    def served(self, knobs: Sequence[Mapping[str, Any]], kinds: Sequence[Kind]) -> Values:
        """What a session has in effect; ``knobs`` has one mapping from path to value for each leaf."""

    def kept(self, array: tensors.Array) -> tensors.Array:
        """A parameter in the element type in which the server keeps it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Named:
    """An optimizer of torch by name: every group has its own values of its arguments.

    Attributes:
      definition: which one.
      defaults: complete.
    """

    definition: translation.Definition
    defaults: dict[str, Any]

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def is_scheduled(self) -> bool:
        return False

    @property
    def wants_loss(self) -> bool:
        return False

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        translation.refuse_implementation(group, where)
        self.definition.check(self.defaults | dict(group))

    def spec(self, groups: Groups, kinds: Sequence[Kind]) -> specs.Spec:
        members = [
            optimizers.per_leaf(_with_masters(self._optimizer(groups[kind.group]), is_needed=kind.is_16_bit))
            for kind in distinct(kinds)
        ]
        if len(members) == 1:
            return members[0]
        return optimizers.grouped([distinct(kinds).index(kind) for kind in kinds], *members)

    def values(self, groups: Groups) -> Values:
        return {
            (index, name): floats(group[name], f"param_groups[{index}][{name!r}]", len(parameters))
            for index, group in enumerate(groups)
            for name, parameters in self.definition.numbers.items()
            if name in group
        }

    def initial(self, groups: Groups) -> Values:
        return self.values(groups)

    def kept(self, array: tensors.Array) -> tensors.Array:
        return arrays.widened(array)

    def changes(self, edits: Values, kinds: Sequence[Kind]) -> dict[str, float]:
        return {
            path: number
            for (group, name), value in edits.items()
            for kind in distinct(kinds)
            if kind.group == group
            for path, number in zip(self._paths(kind, name, kinds), value, strict=True)
        }

    def served(self, knobs: Sequence[Mapping[str, Any]], kinds: Sequence[Kind]) -> Values:
        found: Values = {}
        for kind, leaf in zip(kinds, knobs, strict=True):
            for name in self.definition.numbers:
                numbers = [leaf.get(path) for path in self._paths(kind, name, kinds)]
                if all(isinstance(number, int | float) for number in numbers):
                    found[kind.group, name] = tuple(float(number) for number in numbers if number is not None)
        return found

    def fixed(self, groups: Groups) -> list[dict[str, Any]]:
        return [{name: group[name] for name in self.definition.fixed if name in group} for group in groups]

    def _optimizer(self, group: Mapping[str, Any]) -> specs.Spec:
        arguments: dict[str, Any] = {name: group[name] for name in self.definition.fixed if name in group}
        for name, parameters in self.definition.numbers.items():
            arguments |= zip(parameters, floats(group[name], name, len(parameters)), strict=True)
        constructor = getattr(optimizers, self.definition.constructor)
        made: specs.Spec = constructor(**arguments)
        return made

    def _paths(self, kind: Kind, name: str, kinds: Sequence[Kind]) -> Iterator[str]:
        """Where the argument stands in the spec: twice for a pair."""
        members = distinct(kinds)
        place = f"grouped.optimizers[{members.index(kind)}].per_leaf" if len(members) > 1 else "per_leaf"
        masters = "master_weights.optimizer." if kind.is_16_bit else ""
        for parameter in self.definition.numbers[name]:
            yield f"{place}.optimizer.{masters}{self.definition.constructor}.{parameter}"


class Given:
    """A spec: its arguments are its own. Groups have nothing but ``lr``, the first learning rate in it."""

    def __init__(self, spec: specs.Spec | str) -> None:
        if isinstance(spec, str):
            spec = spec_text.parse(spec, catalogue.CATALOGUE)
        self._spec = spec
        self._rates = list(_rates(checks.check(spec, "optimizer")))

    @property
    def name(self) -> str:
        return self._spec.name

    @property
    def defaults(self) -> dict[str, Any]:
        """NaN stands for what is not known before the first step: the value of a schedule."""
        value = self._rates[0][1] if self._rates else math.nan
        return {translation.RATE: float(value) if isinstance(value, int | float) else math.nan}

    @property
    def wants_loss(self) -> bool:
        return "loss" in checks.extras(checks.check(self._spec, "optimizer"), catalogue.CATALOGUE)

    @property
    def is_scheduled(self) -> bool:
        return math.isnan(self.defaults[translation.RATE])

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        for name, value in group.items():
            if name in ("params", "param_names") or isinstance(value, str):
                continue
            if name == translation.RATE and _same((float(value),), (self.defaults[name],)):
                continue
            raise errors.InvalidArgumentError(
                f"{where}[{name!r}] = {value!r}: the spec {self._spec.name}(...) has the arguments of all groups; say "
                "it there, with optwire.optimizers.partition for parts of the model, or give a name such as 'adamw'",
                subject=name,
                got=repr(value),
            )

    def spec(self, groups: Groups, kinds: Sequence[Kind]) -> specs.Spec:
        return self._spec

    def values(self, groups: Groups) -> Values:
        return {
            (index, translation.RATE): floats(group[translation.RATE], f"param_groups[{index}]['lr']", 1)
            for index, group in enumerate(groups)
        }

    def changes(self, edits: Values, kinds: Sequence[Kind]) -> dict[str, float]:
        if not edits:
            return {}
        ((group, _), value), *_ = edits.items()
        where = f"param_groups[{group}]['lr'] was set to {value[0]!r} by a scheduler of torch or by your code"
        if len(set(edits.values())) > 1 or len(edits) < len({kind.group for kind in kinds}):
            raise errors.InvalidArgumentError(
                f"{where}, other groups have other values; the spec has one learning rate for all", subject="lr"
            )
        numbers = [(path, rate) for path, rate in self._rates if isinstance(rate, int | float)]
        if len(self._rates) == 1 and numbers:
            return {numbers[0][0]: value[0]}
        if len(self._rates) > 1:
            raise errors.InvalidArgumentError(
                f"{where}, but the spec has several learning rates: {', '.join(path for path, _ in self._rates)}; "
                "change them by optimizer.session.set_hyperparams",
                subject="lr",
            )
        path, schedule = self._rates[0] if self._rates else (self._spec.name, self._spec)
        raise errors.HyperparameterOwnedError(
            f"{where}, but {path} belongs to the spec's {schedule}: take away the one or the other",
            subject="lr",
            expected=str(schedule),
            got=repr(value[0]),
        )

    def initial(self, groups: Groups) -> Values:
        return {(index, translation.RATE): (self.defaults[translation.RATE],) for index in range(len(groups))}

    def fixed(self, groups: Groups) -> list[dict[str, Any]]:
        return [{} for _ in groups]

    def served(self, knobs: Sequence[Mapping[str, Any]], kinds: Sequence[Kind]) -> Values:
        rates = {path: value for leaf in knobs for path, value in leaf.items() if isinstance(value, int | float)}
        found = [float(rates[path]) for path, _ in self._rates[:1] if path in rates]
        return {(kind.group, translation.RATE): (rate,) for kind in distinct(kinds) for rate in found}

    def kept(self, array: tensors.Array) -> tensors.Array:
        masters = [
            str(place["dtype"])
            for _, place in specs.places(checks.check(self._spec, "optimizer"))
            if isinstance(place, specs.Spec) and place.name == "master_weights"
        ]
        return arrays.widened(array).astype(masters[0]) if masters else array


def recipe(optimizer: Any, arguments: Mapping[str, Any]) -> Named | Given:
    """The recipe for what a user gave in the place of an optimizer, with the keyword arguments that follow it.

    Raises:
      TypeError: no name, class, spec or text of one; an argument that it does not have.
      ValueError: a value that torch refuses; as InvalidArgumentError where the refusal is ours.
      SpecError: a text that is no spec.
      UnsupportedError: an optimizer of torch that is not served.
    """
    if isinstance(optimizer, str | type):
        definition = translation.definition(optimizer)
        if definition is not None:
            return Named(definition, definition.defaults(arguments))
        if isinstance(optimizer, type) or "(" not in optimizer:
            raise errors.InvalidArgumentError(
                f"RemoteOptimizer: {optimizer!r} is no optimizer; expected one of {translation.names()}, the class in "
                "torch.optim, a spec of optwire.optimizers or optwire.optax, or the text of a spec",
                subject="optimizer",
                expected=translation.names(),
                got=repr(optimizer),
            )
    elif not isinstance(optimizer, specs.Spec):
        raise TypeError(
            f"RemoteOptimizer: optimizer is {type(optimizer).__name__}, expected a name such as 'adamw', a class of "
            "torch.optim, a spec or its text"
        )
    if arguments:
        raise TypeError(
            f"RemoteOptimizer: unexpected argument {next(iter(arguments))!r}: a spec has its arguments inside; "
            f"only torch's names ({translation.names()}) take torch's"
        )
    return Given(optimizer)


def distinct(kinds: Sequence[Kind]) -> list[Kind]:
    """Every kind once, by group."""
    return sorted(set(kinds))


def edited(now: Values, acknowledged: Values) -> Values:
    """The values that differ from what the server has."""
    return {key: value for key, value in now.items() if not _same(value, acknowledged.get(key, ()))}


def floats(value: Any, where: str, count: int) -> tuple[float, ...]:
    """A number or a pair, tensors included, as floats; raises InvalidArgumentError."""
    numbers = value if isinstance(value, tuple | list) else (value,)
    try:
        found = tuple(float(number) for number in numbers)
    except (TypeError, ValueError, RuntimeError, OverflowError) as exc:
        raise errors.InvalidArgumentError(f"{where}: {value!r}, expected a number", subject=where) from exc
    if len(found) != count:
        raise errors.InvalidArgumentError(f"{where}: {value!r}, expected {count} numbers", subject=where)
    return found


def _same(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return len(a) == len(b) and all(x == y or (math.isnan(x) and math.isnan(y)) for x, y in zip(a, b, strict=True))


def _with_masters(optimizer: specs.Spec, *, is_needed: bool) -> specs.Spec:
    return optimizers.master_weights(optimizer, "float32") if is_needed else optimizer


def _rates(spec: specs.Spec) -> Iterator[tuple[str, Any]]:
    """Path and value of every learning rate of a complete spec; a constant schedule counts as its number."""
    for path, value in specs.places(spec):
        place, _, name = path.rpartition(".")
        holder = place.rpartition(".")[2]
        is_seeds = name == "step_size" and catalogue.CATALOGUE[holder].kind == "optimizer"
        if value is not None and (name == "learning_rate" or is_seeds):
            is_constant = isinstance(value, specs.Spec) and value.name in ("constant", "constant_schedule")
            yield path, value.arguments[0][1] if is_constant else value


def is_16_bit(parameter: torch.Tensor) -> bool:
    """Whether the server keeps a copy of the parameter in 32 bits."""
    return parameter.dtype in (torch.bfloat16, torch.float16)
