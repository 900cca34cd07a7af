"""Plans: which spec, program and learning rates the steps of a session use, as hyperparameters change.

A plan holds from its first step until the next plan's. A change makes a new plan at its step and alters those after it;
programs are compiled before anything changes, so that no update ever waits for one.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

from optwire_proto import catalogue, checks, errors, limits, sessions, specs, trees
from optwire_server.engine import build, knobs, program
from optwire_server.engine import rates as learning_rates

ProgramOf = Callable[[specs.Spec], program.Program]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What steps from ``from_step`` on use.

    Attributes:
      from_step: the first of them, 0-based.
      spec: complete and checked.
      program: compiled for it.
      rates: the spec's learning rates, in the order of the program's ``rate_paths``.
      values: what was changed against the plan before, by path.
      constant_rate: the first learning rate, where it is a number.
    """

    from_step: int
    spec: specs.Spec
    program: program.Program
    rates: tuple[float, ...]
    values: Mapping[str, specs.Value]
    constant_rate: float | None

    @functools.cached_property
    def spec_digest(self) -> str:
        """SHA-256 of the canonical text."""
        return specs.digest(self.spec)

    @functools.cached_property
    def names(self) -> Names:
        """What may change while it is in effect."""
        return Names(self.spec)

    @property
    def scheduled(self) -> bool:
        """Whether a schedule gives the first learning rate."""
        return self.constant_rate is None and learning_rates.first_rate(self.spec) is not None

    def counted(self, index: int, skipped: int) -> int:
        """How many of the pushes before that of an index count towards updates."""
        return index - skipped * self.program.forfeits

    def gathered(self, index: int, skipped: int) -> int:
        """How many of the pushes before that of an index wait in sums for a step to close; 0 right after one."""
        return self.counted(index, skipped) % self.program.every

    def learning_rate(self, index: int, skipped: int) -> float:
        """The first learning rate for the push of an index; ``skipped`` pushes changed nothing. NaN: there is none."""
        if self.constant_rate is not None:
            return self.constant_rate
        scheduled = self.program.learning_rate(self.counted(index, skipped) // self.program.every)
        return float("nan") if scheduled is None else scheduled


def make(spec: specs.Spec, compiled: program.Program, from_step: int, values: Mapping[str, specs.Value]) -> Plan:
    """The plan of a checked spec."""
    rates = tuple(learning_rates.rates(spec).values())
    return Plan(from_step, spec, compiled, rates, values, learning_rates.constant_rate(spec))


def at(plans: Sequence[Plan], step: int) -> Plan:
    """The plan that a step uses."""
    return plans[max(bisect.bisect_right(plans, step, key=lambda plan: plan.from_step) - 1, 0)]


def changed(
    plans: Sequence[Plan], hyperparams: Mapping[str, specs.Value], from_step: int, program_of: ProgramOf
) -> tuple[tuple[Plan, ...], Mapping[str, specs.Value]]:
    """The plans after a change, and the change by whole paths.

    Args:
      plans: as they are, in order.
      hyperparams: new values, by path or end of a path.
      from_step: first step that uses them.
      program_of: gives the program of a checked spec; may take seconds.

    Raises:
      InvalidArgumentError: a name that means nothing, or several values.
      SpecError: a value that the argument cannot take, or that would need other slots.
      LimitError: too many names, or changes for too many steps are waiting.
    """
    base = at(plans, from_step)
    values = _resolved(base.names, hyperparams)
    earlier = [plan for plan in plans if plan.from_step < from_step]
    later = [plan for plan in plans if plan.from_step > from_step]
    if len(earlier) + 1 + len(later) > limits.HYPERPARAM_STEPS_MAX + 1:  # and the one that is in effect
        raise errors.LimitError(
            f"hyperparams: changes are waiting for {limits.HYPERPARAM_STEPS_MAX} steps to come, the limit; make this "
            "one later, or set a schedule",
            subject="from_step",
            expected=f"at most {limits.HYPERPARAM_STEPS_MAX} steps to come",
            got=f"step {from_step} beside them",
        )
    same = base.values if base.from_step == from_step and from_step > 0 else {}
    made: list[Plan] = []
    spec, compiled = base.spec, base.program
    for step, own in ((from_step, _merged(same, values)), *((plan.from_step, plan.values) for plan in later)):
        _check_there(spec, own, step)
        spec = checks.check(specs.replaced(spec, dict(own)), known=build.CATALOGUE)
        checks.check_length(spec)
        if not learning_rates.are_operands(own, compiled.spec):
            # What has lost a number that a slot is for keeps the slot, and its program.
            compiled = program_of(learning_rates.with_slots(spec, plans[0].program.spec))
        if not compiled.same_state(plans[0].program):
            names = ", ".join(own)
            raise errors.SpecError(
                f"{names}: this change needs another state than the session has; create a session with it",
                subject=names[:200],
                expected="a change that keeps every slot",
                got=specs.shown(next(iter(own.values()))),
            )
        made.append(make(spec, compiled, step, own))
    _check_effect(base.program, made[0].program, values)
    return (*earlier, *made), values


def moved(plans: Sequence[Plan], step: int, to: int) -> tuple[Plan, ...] | None:
    """The plans with the change of ``step`` at a later one; None where another plan begins on the way."""
    if any(step < plan.from_step <= to for plan in plans):
        return None
    return tuple(dataclasses.replace(plan, from_step=to) if plan.from_step == step else plan for plan in plans)


def rebased(plans: Sequence[Plan], before: int, after: int) -> tuple[Plan, ...]:
    """The plans of a session whose step becomes another one by itself.

    What is in effect stays so, from the new step on; what is to come begins at its step, or at once where that is over.
    """
    first, *later = current(plans, before)
    first = dataclasses.replace(first, from_step=min(first.from_step, after))
    return current((first, *later), after)


def _check_effect(before: program.Program, after: program.Program, values: Mapping[str, specs.Value]) -> None:
    """Raises InvalidArgumentError where a change makes no difference: the arguments only count at creation."""
    idle = set(values) <= after.idle_rates if after is before else after.update_text == before.update_text
    if idle:
        names = ", ".join(values)
        raise errors.InvalidArgumentError(
            f"hyperparams: {names[:400]} only counts when a session is created; no update looks at it",
            subject=names[:200],
            expected="an argument that updates look at",
            got=names[:200],
        )


def _resolved(names: Names, hyperparams: Mapping[str, specs.Value]) -> dict[str, specs.Value]:
    """New values by whole path; raises InvalidArgumentError where two of them are of one thing."""
    if len(hyperparams) > limits.HYPERPARAM_NAMES_MAX:
        raise errors.LimitError(
            f"hyperparams: {len(hyperparams)} names in one change, expected at most {limits.HYPERPARAM_NAMES_MAX}",
            subject="hyperparams",
            expected=f"at most {limits.HYPERPARAM_NAMES_MAX} names",
            got=str(len(hyperparams)),
        )
    paths: list[str] = []
    for name in hyperparams:
        try:
            paths.append(names.path(name))
        except errors.InvalidArgumentError:
            _check_apart(hyperparams, paths)  # names are judged in their order
            raise
    _check_apart(hyperparams, paths)
    return dict(zip(paths, hyperparams.values(), strict=True))


def _check_apart(names: Iterable[str], paths: Sequence[str]) -> None:
    """Raises InvalidArgumentError where two paths are of one thing: they are one, or one stands inside the other."""
    if _apart(paths):
        return
    index = bisect.bisect(range(len(paths)), False, key=lambda last: not _apart(paths[: last + 1]))
    name, path = next(itertools.islice(names, index, None))[:80], paths[index]
    other = next(other for other in paths[:index] if not _apart((path, other)))
    raise errors.InvalidArgumentError(
        f"hyperparams: {name!r} and another name give {other} two values",
        subject=name,
        expected="one value for each argument",
        got=f"{other}, {path}"[:400],
    )


def _apart(paths: Sequence[str]) -> bool:
    return len(set(paths)) == len(paths) and not _inside(paths, paths)


def _inside(paths: Iterable[str], outer: Iterable[str]) -> set[str]:
    """Those of some paths that stand inside one of others."""
    ends, outer = {f"{path}." for path in paths}, {f"{path}." for path in outer}
    found: set[str] = set()
    around = None
    for path in sorted(ends | outer):  # what is inside of one comes right after it
        if around is not None and path.startswith(around):
            found.add(path)
        elif path in outer:
            around = path
    return {path[:-1] for path in found & ends}


def _merged(before: Mapping[str, specs.Value], values: Mapping[str, specs.Value]) -> dict[str, specs.Value]:
    """Changes of one step in one: what is new wins, and goes into a schedule that was set before."""
    inside, gone, new = _inside(values, before), _inside(before, values), dict(values)
    kept = {path: specs.replaced(value, new, path) for path, value in before.items() if path not in gone}
    return {**kept, **{path: value for path, value in values.items() if path not in inside}}


def _check_there(spec: specs.Spec, values: Mapping[str, specs.Value], step: int) -> None:
    """Raises InvalidArgumentError where a pending change is of something that this change takes away."""
    there = {path for path, _ in specs.places(spec)}
    for path in values:
        if path not in there:
            raise errors.InvalidArgumentError(
                f"hyperparams: {path[-200:]} is to change at step {step}, and would not be there any more",
                subject=path[-200:],
                expected="changes that leave it there, or from that step on",
                got=f"a change before step {step}",
            )


class Names:
    """The arguments of a spec that may change, and how they are called.

    A name means an argument whose path it is, or the end of exactly one path. ``learning_rate`` also means the seed's
    ``step_size``.
    """

    def __init__(self, spec: specs.Spec) -> None:
        found = (path for path, value in specs.places(spec) if _changes(path, value))
        self._found = {path: position for position, path in enumerate(found)}
        # Back to front, so that paths with one end stand side by side; and with a dot where components end.
        self._reversed = sorted((f"{path[::-1]}.", path) for path in self._found)

    def path(self, name: str) -> str:
        """The whole path that a name means; raises InvalidArgumentError where it is none, or several."""
        if name in self._found:
            return name
        matching = self._ending(name)
        if specs.ends_with(name, "learning_rate"):
            seeds = f"{name.removesuffix('learning_rate')}step_size"
            matching += [path for path in self._ending(seeds) if learning_rates.is_learning_rate(path)]
        inside = _inside(matching, matching)
        outer = [path for path in matching if path not in inside]
        if len(outer) == 1:
            return outer[0]
        listed = ", ".join(outer or self._found) or "none"
        close = "" if outer else catalogue.suggestion(name, self._ends)
        problem = "means several" if outer else f"is none of this session's{close}"
        raise errors.InvalidArgumentError(
            f"hyperparams: {name[:80]!r} {problem}: {listed[:600]}",
            subject=name[:80],
            expected=listed[:400],
            got=name[:80],
        )

    def _ending(self, end: str) -> list[str]:
        """Paths that end with ``end``, in their order in the spec."""
        key = f"{end[::-1]}."
        first = bisect.bisect_left(self._reversed, key, key=operator.itemgetter(0))
        rest = (self._reversed[index] for index in range(first, len(self._reversed)))
        found = itertools.takewhile(lambda pair: pair[0].startswith(key), rest)
        return sorted((path for _, path in found), key=self._found.__getitem__)

    @functools.cached_property
    def _ends(self) -> list[str]:
        """Last components, each once."""
        return list(dict.fromkeys(path.rpartition(".")[2] for path in self._found))


def _changes(path: str, value: specs.Value) -> bool:
    """Whether an argument may change while a session runs: a number, or a schedule in the place of one."""
    if path.endswith("accumulate.k"):
        return False  # it decides which pushes close a step
    if isinstance(value, specs.Spec):
        return build.CATALOGUE[value.name].kind == "schedule" and not path.endswith("]")
    return isinstance(value, int | float) and not isinstance(value, bool)


def current(plans: Sequence[Plan], step: int) -> tuple[Plan, ...]:
    """The plans without those that are over."""
    return tuple(plans[max(bisect.bisect_right(plans, step, key=lambda plan: plan.from_step) - 1, 0) :])


def describe(plan: Plan, tree: trees.TreeSpec, step: int) -> sessions.OptimizerInfo:
    """What a plan does, for people."""
    return sessions.OptimizerInfo(
        text=str(plan.spec),
        spec_digest=plan.spec_digest,
        granularity=str(plan.program.granularity),
        groups=knobs.groups(plan.spec, tuple(leaf.name for leaf in tree.leaves)),
        step=step,
        extras=plan.program.extras,
        views=plan.program.views,
    )
