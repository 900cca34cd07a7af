"""A checked spec to the rule it describes. Constructors are looked up in the catalogue; nothing is evaluated."""

from __future__ import annotations

import dataclasses
import functools
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from optwire_proto import catalogue, errors, patterns, specs, tensors, trees
from optwire_proto.entries import Entry, Parameter
from optwire_proto.specs import Spec
from optwire_server import optimizers
from optwire_server.engine import imported, leafwise, rates, reductions, rule, signatures, transformations
from optwire_server.engine.rule import Rule
from optwire_server.optimizers import formulas, outer_rules, torch_rules

# What a server serves: ours, and what the installed optax has.
CATALOGUE: Final[Mapping[str, Entry]] = catalogue.merged(signatures.entries().values())

_SEED_OPTIMIZERS: Final = frozenset(entry.name for entry in catalogue.SEED if entry.kind == "optimizer")
_SEED_SCHEDULES: Final = frozenset(entry.name for entry in catalogue.SEED if entry.kind == "schedule")
_TORCH: Final = frozenset(entry.name for entry in catalogue.TORCH)
_OUTER: Final = frozenset(entry.name for entry in catalogue.OUTER)
# Optimizers from the formula for one array, whose numbers are operands.
_FORMULAS: Final = _TORCH | _OUTER
# What else replaces parameters by itself; first what surrounds all of an update.
_AROUND: Final = ("accumulate", "on_nonfinite", "ema_params", "master_weights")
_RULES: Final = (*_AROUND, "exported", "lookahead", "per_leaf", "grouped")
_CLIPS: Final = (
    "adaptive_grad_clip",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "clip_grads",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """What a spec is built for.

    Attributes:
      leaves: all leaves, in order.
      rates: learning rates by their path in the spec, traced or not; ``rates.rates`` finds the paths.
      seed: of the session's randomness.
    """

    leaves: tuple[trees.LeafSpec, ...]
    rates: Mapping[str, Any]
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all leaves."""
        return tuple(leaf.name for leaf in self.leaves)


def schedule(value: Spec) -> Callable[[Any], Any]:
    """The function from step to number that a checked spec describes."""
    return _Builder(Site((), {})).schedule(value, "")


def build(spec: Spec, site: Site, only: Sequence[int] | None = None) -> Rule:
    """The rule of a checked spec, for all leaves, or only those at some positions.

    Raises:
      SpecError: an optimizer stands where only a transformation can, or optax refuses an argument.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of arguments that optax still has
        return _Builder(site).rule(spec, "", range(len(site.leaves)) if only is None else only)


class _Builder:
    """One build. ``leaves`` are the positions that what is built gets to see."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def rule(self, spec: Spec, path: str, leaves: Sequence[int]) -> Rule:
        """What a spec describes, as a rule."""
        made = self._made(spec, path, leaves)
        averages = specs.any_inside(spec, lambda found: found.name.startswith("schedule_free"))
        return made if isinstance(made, Rule) else rule.of_transformation(made, schedule_free=averages)

    def _made(self, spec: Spec, path: str, leaves: Sequence[int]) -> Any:
        """A rule, or an optax transformation where that is all it is."""
        inside = f"{path}.{spec.name}" if path else spec.name
        if spec.name in _SEED_OPTIMIZERS:
            return self._seed(spec, inside)
        if spec.name in _FORMULAS:
            return self._formula(spec, inside)
        if spec.name == "lookahead":
            return rule.lookahead(self._optax(spec, inside, leaves))
        if spec.name in ("chain", "partition", *_RULES):
            return getattr(self, f"_{spec.name}")(spec, inside, leaves)
        return self._optax(spec, inside, leaves)

    def transformation(self, spec: Spec, path: str, leaves: Sequence[int]) -> Any:
        """What a spec describes, as an optax transformation."""
        made = self._made(spec, path, leaves)
        if isinstance(made, Rule):
            raise errors.SpecError(
                f"{path}: {spec.name} replaces parameters instead of making updates, so it can only be the last member "
                f"of a chain, in a group, or inside accumulate, on_nonfinite, ema_params or master_weights"
                + (f"; optax.{spec.name} can stand here" if f"optax.{spec.name}" in CATALOGUE else ""),
                subject=path,
                expected="a transformation",
                got=spec.name,
            )
        return made

    def schedule(self, spec: Spec, path: str) -> Callable[[Any], Any]:
        """What a spec describes, as a function from step to number."""
        inside = f"{path}.{spec.name}" if path else spec.name
        if spec.name in rates.CONSTANTS and f"{inside}.{rates.CONSTANTS[spec.name]}" in self._site.rates:
            value = self._site.rates[f"{inside}.{rates.CONSTANTS[spec.name]}"]
            return lambda count: value
        if spec.name == "table":
            values = np.asarray(spec["values"].numbers, np.float32)
            return lambda count: jnp.asarray(values)[jnp.clip(count, 0, len(values) - 1)]
        arguments = self._arguments(spec, inside, ())
        if spec.name in _SEED_SCHEDULES:
            return _callable(getattr(optimizers, spec.name)(**arguments))
        return _callable(_called(_maker(spec.name), arguments, inside))

    # ------------------------------------------------------------------------------------------- ours

    def _seed(self, spec: Spec, inside: str) -> Rule:
        arguments = dict(spec.arguments) | {"step_size": self._rate(spec, inside, "step_size")}
        init, update, params = getattr(optimizers, spec.name)(**arguments)

        def step(grads: list[Any], state: Any, call: rule.Call) -> Any:
            return update(call.index, rule.like(grads, params(state)), state)

        return Rule(init, step, params, {})

    def _formula(self, spec: Spec, inside: str, *, alone: bool = False) -> Rule:
        rate = self._rate(spec, inside, "learning_rate")
        numbers, others = {}, {}
        for name, value in spec.arguments:
            place = f"{inside}.{name}"
            if place in self._site.rates and name != "learning_rate":
                numbers[name] = formulas.Number(self._site.rates[place], self._site.rates[rates.rest(place)])
            elif name != "learning_rate":
                others[name] = value
        if spec.name in ("torch_sgd", "torch_rmsprop"):
            others["keeps_momentum"] = spec["momentum"] != 0
        rules = outer_rules if spec.name in _OUTER else torch_rules
        make = getattr(rules, spec.name.removeprefix("torch_"))
        return leafwise.of_formula(make(rate, **numbers, **others), alone=alone)

    def _chain(self, spec: Spec, inside: str, leaves: Sequence[int]) -> Any:
        *firsts, last = spec["members"]
        places = [f"{inside}.members[{index}]" for index in range(len(firsts) + 1)]
        made = [self.transformation(member, place, leaves) for member, place in zip(firsts, places, strict=False)]
        final = self._made(last, places[-1], leaves)
        if not isinstance(final, Rule):
            return optax.chain(*made, final)
        return rule.after(optax.chain(*made), final) if made else final

    def _partition(self, spec: Spec, inside: str, leaves: Sequence[int]) -> Any:
        place = f"{inside}.transforms"
        transforms = spec["transforms"]
        chosen = patterns.groups(tuple(pattern for pattern, _ in transforms), self._site.names, place)
        members = [[i for i in leaves if chosen[i] == group] for group in range(len(transforms))]
        makes = [
            (member, f"{place}[{pattern!r}]", at) for (pattern, member), at in zip(transforms, members, strict=True)
        ]
        if not any(_makes_rule(member) for member, _, _ in makes):
            made = [self._made(member, where, leaves) for member, where, _ in makes]
            return optax.partition(dict(enumerate(made)), [chosen[i] for i in leaves])
        return self._split(makes, leaves)

    def _grouped(self, spec: Spec, inside: str, leaves: Sequence[int]) -> Rule:
        of = spec["of"].numbers
        optimizers = enumerate(spec["optimizers"])
        makes = [(member, f"{inside}.optimizers[{k}]", [i for i in leaves if of[i] == k]) for k, member in optimizers]
        return self._split(makes, leaves)

    def _split(self, makes: Sequence[tuple[Spec, str, Sequence[int]]], leaves: Sequence[int]) -> Rule:
        """Several specs, each with its path and leaves: an exported program may serve no others."""
        rules = [self.rule(member, where, at) for member, where, at in makes]
        position = {leaf: k for k, leaf in enumerate(leaves)}
        return rule.split(rules, [[position[i] for i in at] for _, _, at in makes])

    def _per_leaf(self, spec: Spec, inside: str, leaves: Sequence[int]) -> Rule:
        inner = spec["optimizer"]
        if inner.name in _FORMULAS:
            return self._formula(inner, f"{inside}.optimizer.{inner.name}", alone=True)
        counted = specs.any_inside(spec, lambda found: found.name in _SEED_OPTIMIZERS)
        return leafwise.per_leaf([self._inner(spec, inside, [leaf]) for leaf in leaves], counted=counted)

    def _inner(self, spec: Spec, inside: str, leaves: Sequence[int]) -> Rule:
        return self.rule(spec["optimizer"], f"{inside}.optimizer", leaves)

    def _accumulate(self, spec: Spec, inside: str, leaves: Sequence[int]) -> Rule:
        return rule.accumulate(self._inner(spec, inside, leaves), spec["k"])

    def _on_nonfinite(self, spec: Spec, inside: str, leaves: Sequence[int]) -> Rule:
        return rule.on_nonfinite(self._inner(spec, inside, leaves), spec["policy"])

    def _ema_params(self, spec: Spec, inside: str, leaves: Sequence[int]) -> Rule:
        return rule.ema_params(self._inner(spec, inside, leaves), spec["decay"], debias=spec["debias"])

    def _master_weights(self, spec: Spec, inside: str, leaves: Sequence[int]) -> Rule:
        wide = jnp.dtype(spec["dtype"])
        name = tensors.dtype_name(wide)
        assert name is not None, "checks admits element types of the protocol only"
        within = list(self._site.leaves)
        for i in leaves:
            within[i] = dataclasses.replace(within[i], dtype=name)
        inner = _Builder(dataclasses.replace(self._site, leaves=tuple(within)))._inner(spec, inside, leaves)
        dtypes = [tensors.numpy_dtype(self._site.leaves[i].dtype) for i in leaves]
        return rule.master_weights(inner, wide, dtypes)

    def _exported(self, spec: Spec, inside: str, leaves: Sequence[int]) -> Rule:
        rate = self._rate(spec, inside, "learning_rate")
        return exported_rule(_tried(spec["update"].data, tuple(self._site.leaves[i] for i in leaves)), rate)

    # ------------------------------------------------------------------------------------------- optax's

    def _optax(self, spec: Spec, inside: str, leaves: Sequence[int]) -> Any:
        arguments = self._arguments(spec, inside, leaves)
        if "args" in arguments:  # named_chain
            return optax.named_chain(*arguments["args"])
        made = _called(_maker(spec.name), arguments, inside)
        return optax.with_extra_args_support(made)

    def _arguments(self, spec: Spec, inside: str, leaves: Sequence[int]) -> dict[str, Any]:
        """Values as optax takes them, by parameter name."""
        parameters = {parameter.name: parameter for parameter in CATALOGUE[spec.name].parameters}
        made = {}
        for name, value in spec.arguments:
            taken = self._argument(spec, parameters[name], value, inside, leaves)
            if taken is not _LEFT_OUT:
                made[name] = taken
        return made

    def _argument(self, spec: Spec, parameter: Parameter, value: Any, inside: str, leaves: Sequence[int]) -> Any:
        place = f"{inside}.{parameter.name}"
        if parameter.takes == "seed":
            return self._key(spec, place) if parameter.name == "key" else _LEFT_OUT
        if parameter.name in catalogue.RATES and place in self._site.rates:
            return (
                self._rate(spec, inside, parameter.name)
                if parameter.takes.startswith("rate:")
                else self._site.rates[place]
            )
        if isinstance(value, Spec):
            if CATALOGUE[value.name].kind == "schedule":
                return self.schedule(value, place)
            return self.transformation(value, place, leaves)
        match parameter.takes:
            case "mask" if value is not None and not isinstance(value, bool):
                hits = patterns.mask(value, self._site.names, place)
                return [hits[i] for i in leaves]
            case "mask" if isinstance(value, bool):
                return [value for _ in leaves]
            case "schedules":
                return [self.schedule(item, f"{place}[{index}]") for index, item in enumerate(value)]
            case "named":
                return [(name, self.transformation(item, f"{place}[{name!r}]", leaves)) for name, item in value]
            case "pairs":
                return None if value is None else dict(value)
            case "mappings":
                return [dict(item) for item in value]
            case _:
                return value

    def _rate(self, spec: Spec, inside: str, name: str) -> Any:
        """A learning rate: an operand for the seed; for optax a schedule always, so that its state has one form."""
        place, value = f"{inside}.{name}", spec[name]
        if isinstance(value, Spec):
            if spec.name in _SEED_OPTIMIZERS and f"{place}.constant.step_size" in self._site.rates:
                return self._site.rates[f"{place}.constant.step_size"]
            return self.schedule(value, place)
        number = self._site.rates.get(place, value)
        return number if spec.name in _SEED_OPTIMIZERS else lambda count: number

    def _key(self, spec: Spec, place: str) -> Any:
        """The key that randomness starts from: as the spec says, else the session's seed and the place in the spec."""
        given = dict(spec.arguments)
        own = given.get("key") if given.get("key") is not None else given.get("seed")
        if own is not None:
            return own
        low, high = self._site.seed % 2**32, self._site.seed // 2**32
        seed = jax.random.fold_in(jax.random.key(low), high)
        return jax.random.fold_in(seed, zlib.crc32(place.encode()))


_LEFT_OUT: Final = object()


def _makes_rule(spec: Spec) -> bool:
    """Whether a spec describes a rule, and no optax transformation."""
    if spec.name == "chain":
        return _makes_rule(spec["members"][-1])
    if spec.name == "partition":
        return any(_makes_rule(member) for _, member in spec["transforms"])
    return spec.name in _SEED_OPTIMIZERS or spec.name in _FORMULAS or spec.name in _RULES


def skippable(spec: Spec) -> bool:
    """Whether a checked spec keeps each leaf by itself, so that a push may leave gradients out."""
    if spec.name == "chain":
        *firsts, last = spec["members"]
        return all(member.name in _CLIPS for member in firsts) and skippable(last)
    if spec.name == "grouped":
        return all(map(skippable, spec["optimizers"]))
    if spec.name == "partition":
        return all(skippable(member) for _, member in spec["transforms"])
    if spec.name in ("master_weights", "ema_params", "on_nonfinite"):
        return skippable(spec["optimizer"])
    return spec.name == "per_leaf"


@functools.lru_cache(maxsize=256)
def _tried(data: bytes, leaves: tuple[trees.LeafSpec, ...]) -> imported.Imported:
    """A program that was run once for these leaves, in a process of its own; those tried last are remembered."""
    program = imported.load(data)
    program.check_leaves(leaves)
    _try(data, tuple(dataclasses.replace(leaf, name="") for leaf in leaves))
    return program


@functools.lru_cache(maxsize=256)
def _try(data: bytes, leaves: tuple[trees.LeafSpec, ...]) -> None:
    """Leaves are those of a block, whose size other sessions have, too; their names make no difference."""
    if leaves:
        imported.attempt(imported.load(data), leaves)


def is_elementwise(spec: Spec) -> bool:
    """Whether no exported program of a spec computes with the length of a leaf, which no trace of it would show."""
    found = (value for _, value in specs.places(spec) if isinstance(value, Spec) and value.name == "exported")
    return all(imported.load(value["update"].data).elementwise for value in found)


class ExportedState(NamedTuple):
    """State of an exported program: updates, shape=(), int32; the parameters; the slots of each."""

    step: Any
    params: list[Any]
    slots: list[list[Any]]


def exported_rule(program: imported.Imported, rate: Callable[[Any], Any]) -> Rule:
    """The rule of an exported program: leaf by leaf, slots start at zero."""

    def init(params: list[Any]) -> Any:
        slots = [[jnp.zeros_like(leaf) for _ in range(program.slots)] for leaf in params]
        return ExportedState(jnp.zeros((), jnp.int32), params, slots)

    def update(grads: list[Any], state: Any, call: rule.Call) -> Any:
        step, params, slots = state
        alpha = jnp.asarray(rate(step), jnp.float32)
        triples = zip(rule.like(grads, params), params, slots, strict=True)
        new = [program.update(step, alpha, g, p, *own) for g, p, own in triples]
        return ExportedState(step + 1, [leaf for leaf, *_ in new], [list(own) for _, *own in new])

    return Rule(init, update, lambda state: state[1], {})


def _maker(name: str) -> Callable[..., Any]:
    if name in transformations.OURS:
        return transformations.OURS[name]
    bare = name.removeprefix("optax.")
    module = optax.contrib if CATALOGUE[name].origin == "optax.contrib" else optax
    maker: Callable[..., Any] = getattr(module, bare)
    return maker


def _called(maker: Callable[..., Any], arguments: Mapping[str, Any], inside: str) -> Any:
    """Calls a constructor of optax; what it refuses is an error of the spec."""
    try:
        return maker(**arguments)
    except (TypeError, ValueError, ArithmeticError, AssertionError, NotImplementedError) as exc:
        text = f"{exc}".splitlines()[0][:300] if f"{exc}" else type(exc).__name__
        raise errors.SpecError(f"{inside}: optax refuses these arguments: {text}", subject=inside, got=text) from exc


def _callable(made: Any) -> Callable[[Any], Any]:
    assert callable(made), "a schedule is a function"
    function: Callable[[Any], Any] = made
    return function


def clips(
    spec: Spec, site: Site, state: Any, *, closing: bool, only: Sequence[int] | None = None
) -> Callable[[list[Any], list[Any]], list[Any]] | None:
    """Which of the gradients' elements the leading clip of a checked spec changes: (gradients, params) -> flags.

    None where there is no clip, or where the push is only gathered and meets none. ``state`` is that of the spec's rule
    before the push, for the leaves ``only``, by position: a clip inside an accumulation meets the mean of what was
    gathered. Sums over all leaves that it needs are those of the update.
    """
    found = _leading_clip(spec)
    if found is None or (not closing and not _meets_each_push(spec)):
        return None
    made = _Builder(site).transformation(found, "", range(len(site.names)) if only is None else only)

    def changed(grads: list[Any], params: list[Any]) -> list[Any]:
        grads = _met(spec, grads, state)
        with reductions.repeating():
            after, _ = made.update(grads, made.init(params), params)
        return [a != b for a, b in zip(after, grads, strict=True)]

    return changed


def _meets_each_push(spec: Spec) -> bool:
    """Whether the leading clip stands outside of any accumulation."""
    inner = spec["optimizer"] if spec.name in _AROUND else spec["members"][0] if spec.name == "chain" else None
    return spec.name != "accumulate" and (inner is None or _meets_each_push(inner))


def _met(spec: Spec, grads: list[Any], state: Any) -> list[Any]:
    """Gradients of a push that closes a step as the leading clip meets them, behind the wrappers around it."""
    if spec.name == "chain":
        return _met(spec["members"][0], grads, state)
    if spec.name == "accumulate":
        grads = [((total + g) / spec["k"]).astype(g.dtype) for total, g in zip(state[0], grads, strict=True)]
    elif spec.name == "on_nonfinite" and spec["policy"] == "zero":
        grads = [jnp.where(jnp.isfinite(g), g, jnp.zeros_like(g)) for g in grads]
    if spec.name not in _AROUND:
        return grads
    return _met(spec["optimizer"], grads, state if spec.name == "master_weights" else state[-1])


def _leading_clip(spec: Spec) -> Spec | None:
    """The clip that gradients meet first, wherever it stands in chains and wrappers."""
    if spec.name in _CLIPS:
        return spec
    if spec.name == "chain":
        return _leading_clip(spec["members"][0])
    entry = catalogue.OURS.get(spec.name)
    if spec.name == "per_leaf":
        return None  # a norm that a clip takes inside is of one leaf
    return _leading_clip(spec["optimizer"]) if entry is not None and entry.kind == "wrapper" else None


def passes(spec: Spec) -> Iterator[str]:
    """Names of the stages that gradients pass, in order."""
    if spec.name == "chain":
        for member in spec["members"]:
            yield from passes(member)
    else:
        yield spec.name
