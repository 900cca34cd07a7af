"""What every leaf gets: the group it is in, the transformations it passes, the value of every knob that bears on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from optwire_proto import patterns, sessions, specs
from optwire_proto.specs import Spec, Value
from optwire_server.engine import build

# A mask says which leaves an argument bears on; those it leaves out get none of that argument.
_MASKED: Final[Mapping[str, tuple[str, ...]]] = {
    "mask": ("weight_decay", "weight_decay_rate"),
    "weight_decay_mask": ("weight_decay", "weight_decay_rate"),
    "trust_ratio_mask": ("trust_coefficient",),
}
# Wrappers whose mask decides what is inside of them; the truth says which leaves get the inside.
_INSIDE: Final[Mapping[str, tuple[str, bool]]] = {
    "masked": ("mask", True),
    "selective_transform": ("freeze_mask", False),
}


class _Leaf(NamedTuple):
    """One leaf on its way through a spec."""

    at: int
    names: tuple[str, ...]


class _Treatment(NamedTuple):
    """What one leaf gets."""

    group: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    knobs: tuple[tuple[str, Value], ...] = ()

    def and_then(self, other: _Treatment) -> _Treatment:
        return _Treatment(self.group + other.group, self.passes + other.passes, self.knobs + other.knobs)


def groups(spec: Spec, names: tuple[str, ...]) -> tuple[sessions.LeafGroup, ...]:
    """Leaves that a checked spec treats alike, in the order of their first ones."""
    found: dict[str, tuple[_Treatment, list[int]]] = {}
    for index in range(len(names)):
        treatment = _treatment(spec, "", _Leaf(index, names))
        found.setdefault(repr(treatment), (treatment, []))[1].append(index)
    return tuple(
        sessions.LeafGroup(tuple(leaves), " > ".join(group), passes, knobs)
        for (group, passes, knobs), leaves in found.values()
    )


def _treatment(spec: Spec, path: str, leaf: _Leaf) -> _Treatment:
    inside = f"{path}.{spec.name}" if path else spec.name
    if spec.name == "partition":
        return _of_group(spec, f"{inside}.transforms", leaf)
    if spec.name == "grouped":
        chosen = spec["of"].numbers[leaf.at]
        member = _treatment(spec["optimizers"][chosen], f"{inside}.optimizers[{chosen}]", leaf)
        return _Treatment(group=(str(chosen),)).and_then(member)
    if spec.name in _INSIDE and not _is_inside(spec, inside, leaf):
        return _Treatment(passes=() if spec.name == "masked" else ("set_to_zero",))
    if spec.name == "freeze":
        return _Treatment(passes=("set_to_zero",) if _in_mask(spec["mask"], f"{inside}.mask", leaf) else ())
    treatment = _Treatment(passes=() if spec.name in ("chain", "named_chain") else (spec.name,))
    masked_out = set(_masked_out(spec, inside, leaf))
    for name, value in spec.arguments:
        if name not in masked_out and "mask" not in name:
            for found in _of_argument(value, f"{inside}.{name}", leaf):
                treatment = treatment.and_then(found)
    return treatment


def _of_argument(value: Value, place: str, leaf: _Leaf) -> Iterator[_Treatment]:
    if isinstance(value, Spec) and build.CATALOGUE[value.name].kind != "schedule":
        yield _treatment(value, place, leaf)
    elif isinstance(value, tuple) and any(isinstance(found, Spec) for _, found in specs.places(value)):
        for path, found in specs.places(value, place):
            if isinstance(found, Spec) and path.count("[") == place.count("[") + 1 and path.endswith("]"):
                yield _treatment(found, path, leaf)
    elif not isinstance(value, specs.Blob):
        yield _Treatment(knobs=((place, value),))


def _of_group(spec: Spec, place: str, leaf: _Leaf) -> _Treatment:
    transforms = spec["transforms"]
    chosen = patterns.groups(tuple(pattern for pattern, _ in transforms), leaf.names, place)[leaf.at]
    pattern, member = transforms[chosen]
    return _Treatment(group=(pattern,)).and_then(_treatment(member, f"{place}[{pattern!r}]", leaf))


def _is_inside(spec: Spec, inside: str, leaf: _Leaf) -> bool:
    name, truth = _INSIDE[spec.name]
    return _in_mask(spec[name], f"{inside}.{name}", leaf) is truth


def _masked_out(spec: Spec, inside: str, leaf: _Leaf) -> Iterator[str]:
    for name, value in spec.arguments:
        if name in _MASKED and value is not None and not _in_mask(value, f"{inside}.{name}", leaf):
            yield from _MASKED[name]


def _in_mask(value: Value, place: str, leaf: _Leaf) -> bool:
    return patterns.mask(value, leaf.names, place)[leaf.at]
