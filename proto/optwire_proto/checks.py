"""Whether a spec can be built: names, arguments and their values against the catalogue, defaults filled in.

What a ``Parameter.takes`` may be:

    number positive nonnegative fraction decay count index few   numbers, see ``_NUMBERS``
    rate:KIND          a number of that kind, or a schedule
    operand:KIND       a number of that kind that never compiles an update anew
    flag dtype text    True or False; "float32", "bfloat16", ...; one of ``choices``
    numbers array      a list of numbers; an Array (or a list of numbers, which becomes one)
    pairs mappings     {number: number}; a list of {name: number}
    axes seed tagged   one axis or several; a whole number; (name, number)
    mask groups        a flag, a name pattern or several; {name pattern: optimizer}
    positions          whole numbers from 0 up, as an Array (or a list, which becomes one)
    schedule schedules a schedule; a list of them
    spec specs named   a transformation or optimizer; a list of them; {name: one of them}
    optimizer          a spec that moves parameters
    blob nothing       a Blob; None, and only None
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from optwire_proto import catalogue, errors, limits, patterns, specs
from optwire_proto.entries import REQUIRED, Entry, Parameter
from optwire_proto.specs import Spec, Value, wrong

# takes -> (test, what to say was expected)
_NUMBERS: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "number": (lambda value: True, "a finite number that fits 32 bits"),
    "positive": (lambda value: value > 0, "a positive number"),
    "nonnegative": (lambda value: value >= 0, "a number from 0 up"),
    "fraction": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "decay": (lambda value: 0 <= value < 1, "a number from 0 up to, not including, 1"),
    "count": (lambda value: isinstance(value, int) and value > 0, "a whole number from 1 up"),
    "index": (lambda value: isinstance(value, int) and value >= 0, "a whole number from 0 up"),
    "few": (
        lambda value: isinstance(value, int) and 0 < value <= limits.SPEC_FEW_MAX,
        f"a whole number from 1 to {limits.SPEC_FEW_MAX}",
    ),
}
DTYPES: Final = ("float32", "float64", "bfloat16", "float16")
_TRANSFORMS: Final = ("optimizer", "transformation", "wrapper")
# Transformations that set how far parameters go, where no optimizer does.
_SCALES: Final = ("scale", "scale_by_learning_rate", "scale_by_schedule", "set_to_zero")

Catalogue = Mapping[str, Entry]


def check(spec: Spec, kind: str = "optimizer", *, known: Catalogue | None = None, complete: bool = True) -> Spec:
    """Validates a spec.

    Args:
      spec: what was described.
      kind: what it must be: "optimizer" (whatever moves parameters), "transformation" or "schedule".
      known: the catalogue; None: the one that comes with this package.
      complete: whether to fill in every default.

    Returns:
      The same spec in its stored form: arguments in the catalogue's order, lists as tuples.

    Raises:
      SpecError: names the path inside the spec, what was expected and what came.
      UnsupportedError: the name is known, and refused for the reason given.
    """
    checked = _Checker(known or catalogue.CATALOGUE, complete=complete).spec(spec, kind, "", 1)
    if kind == "optimizer" and not moves(checked):
        raise wrong(
            checked.name, "an optimizer, or a chain with one: nothing in this spec sets a learning rate", checked
        )
    return checked


def moves(spec: Spec) -> bool:
    """Whether what comes out is meant to be added to parameters: there is an optimizer, or a scale, in it."""
    if spec.name in _SCALES:
        return True
    inner = [found for name, found in spec.arguments if name not in ("learning_rate", "step_size")]
    entry = catalogue.CATALOGUE.get(spec.name)
    if entry is None or entry.kind == "optimizer" or spec.name == "schedule_free":
        return True  # a name that only the server knows is the server's to judge
    return any(moves(member) for value in inner for member in _members(value))


def core(spec: Spec) -> Spec:
    """The optimizer itself: the last member of a chain, what a wrapper surrounds, otherwise the spec."""
    if spec.name == "chain":
        return core(spec["members"][-1])
    entry = catalogue.OURS.get(spec.name)
    return core(spec["optimizer"]) if entry is not None and entry.kind == "wrapper" else spec


def extras(spec: Spec, known: Catalogue) -> tuple[str, ...]:
    """What a push must bring along for a checked spec, such as "loss"."""
    found = [known[value.name].extras for _, value in specs.places(spec) if isinstance(value, Spec)]
    return tuple(sorted(set(itertools.chain(*found))))


def check_length(spec: Spec) -> None:
    """Raises LimitError where the canonical text of a checked spec is too long to be told in one message."""
    length, most = len(str(spec)), limits.SPEC_TEXT_FORM_BYTES_MAX
    if length > most:
        raise errors.LimitError(
            f"spec: {length} characters with every argument filled in, expected at most {most}",
            subject="spec",
            expected=f"at most {most} characters",
            got=str(length),
        )


def check_names(spec: Spec, names: tuple[str, ...], known: Catalogue) -> None:
    """Whether the patterns of a checked spec fit a session's leaves.

    Raises:
      SpecError: a pattern matches no leaf, or a leaf is in no group of a partition; lists the names.
      LimitError: too many, too long patterns for so many leaves.
    """
    work = 0
    for path, value, takes in by_takes(spec, known):
        if takes == "positions" and len(value.numbers) != len(names):
            raise wrong(path, f"{len(names)} positions, one for each leaf", value.numbers)
        if takes == "groups":
            listed = tuple(pattern for pattern, _ in value)
        elif takes == "mask" and not isinstance(value, bool):
            listed = (value,) if isinstance(value, str) else value
        else:
            continue
        work += patterns.work(listed, names)
        if work > limits.PATTERN_WORK_MAX:
            raise _too_much(path, work)
        _ = patterns.groups(listed, names, path) if takes == "groups" else patterns.mask(listed, names, path)


def _too_much(path: str, work: int) -> errors.LimitError:
    most = limits.PATTERN_WORK_MAX
    return errors.LimitError(
        f"{path}: matching these patterns takes {work} comparisons of characters, expected at most {most}; use fewer "
        "or shorter patterns",
        subject=path,
        expected=f"at most {most}",
        got=str(work),
    )


def by_takes(spec: Spec, known: Catalogue) -> Iterator[tuple[str, Value, str]]:
    """Path, value and what it is, as in ``Parameter.takes``, of every argument of a checked spec but those left out."""
    for path, value in specs.places(spec):
        if not isinstance(value, Spec):
            continue
        inside = f"{path}.{value.name}" if path else value.name
        takes = {parameter.name: parameter.takes for parameter in known[value.name].parameters}
        for name, argument in value.arguments:
            if argument is not None:
                yield f"{inside}.{name}", argument, takes.get(name, "")


def _members(value: Value) -> Iterator[Spec]:
    if isinstance(value, Spec):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _members(item)


class _Checker:
    """One check: the catalogue, and how many values have been seen."""

    def __init__(self, known: Catalogue, *, complete: bool) -> None:
        self._known = known
        self._complete = complete
        self._values = 0

    def spec(self, spec: Spec, kind: str, where: str, depth: int) -> Spec:
        """A spec that makes a ``kind``, at the path ``where``."""
        specs.check_shape(spec)
        inside = f"{where}.{spec.name[:80]}" if where else spec.name[:80]
        if depth > limits.SPEC_DEPTH_MAX:
            raise errors.SpecError(f"{inside[:80]}…: nested deeper than {limits.SPEC_DEPTH_MAX}", subject=inside[:80])
        entry = self._entry(spec.name, kind, inside)
        given = self._given(spec, entry, inside)
        stored = []
        for parameter in entry.parameters:
            value = given.get(parameter.name, parameter.default)
            if value is REQUIRED:
                why = "; it must be None: a line search needs the loss" if parameter.takes == "nothing" else ""
                raise errors.SpecError(
                    f"{inside}: missing argument {parameter.name!r}{why}",
                    subject=f"{inside}.{parameter.name}",
                    expected=parameter.takes,
                    got="nothing",
                )
            if parameter.name in given or self._complete:
                stored.append((parameter.name, self.value(parameter, value, f"{inside}.{parameter.name}", depth)))
        checked = Spec(entry.name, tuple(stored))
        _check_whole(checked, inside)
        return checked

    def _entry(self, name: str, kind: str, inside: str) -> Entry:
        entry = self._known.get(name)
        if entry is not None and entry.refusal:
            raise errors.UnsupportedError(
                f"{inside}: {name} is not served: {entry.refusal}", subject=inside, expected=entry.refusal, got=name
            )
        kinds = ("schedule",) if kind == "schedule" else _TRANSFORMS
        if entry is None or entry.kind not in kinds:
            names = [other.name for other in self._known.values() if other.kind in kinds and not other.refusal]
            what = f"unknown {kind}" if entry is None else f"{_article(entry.kind)}, expected {_article(kind)}"
            raise errors.SpecError(
                f"{inside!r}: {what}{catalogue.suggestion(name, names)}; expected one of {', '.join(names)[:300]}…",
                subject=inside,
                expected=", ".join(names)[:400],
                got=name[:80],
            )
        return entry

    def _given(self, spec: Spec, entry: Entry, inside: str) -> dict[str, Value]:
        given: dict[str, Value] = {}
        names = [parameter.name for parameter in entry.parameters]
        for name, value in spec.arguments:
            if name in given or name not in names:
                hint = catalogue.suggestion(name, names)
                problem = "given twice" if name in given else f"unknown argument{hint}; expected {', '.join(names)}"
                raise errors.SpecError(
                    f"{inside}({name[:80]}=…): {problem}",
                    subject=f"{inside}.{name[:80]}",
                    expected=", ".join(names),
                    got=name[:80],
                )
            given[name] = value
        return given

    def value(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        """The value in its stored form; raises where the parameter cannot take it."""
        if isinstance(value, tuple | list) and len(value) > limits.SPEC_LIST_MAX:
            raise wrong(path, f"a list of at most {limits.SPEC_LIST_MAX} values, or an array", value)
        self._values += _count(value)
        if self._values > limits.SPEC_VALUES_MAX:
            raise errors.SpecError(f"{path}: more than {limits.SPEC_VALUES_MAX} values in one spec", subject=path)
        if value is None and (parameter.none or parameter.takes == "nothing"):
            return None
        takes, _, number = parameter.takes.partition(":")
        if takes == "rate" and isinstance(value, Spec):
            return self.spec(value, "schedule", path, depth + 1)
        if number or takes in _NUMBERS:
            return _number(number or takes, value, path, " or a schedule" if takes == "rate" else "")
        return getattr(self, f"_{takes}")(parameter, value, path, depth)

    def _flag(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        if not isinstance(value, bool):
            raise wrong(path, "True or False", value)
        return value

    def _dtype(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        if not isinstance(value, str) or value not in DTYPES:
            raise wrong(path, f"an element type, one of {', '.join(DTYPES)}", value)
        return value

    def _text(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        if not isinstance(value, str) or value not in parameter.choices:
            raise wrong(path, f"one of {', '.join(map(repr, parameter.choices))}", value)
        return value

    def _blob(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        if not isinstance(value, specs.Blob):
            raise wrong(path, "bytes of an exported program", value)
        return value

    def _nothing(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        raise wrong(path, "None: a line search evaluates the loss function, which only the client has", value)

    def _seed(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        return _number("index", value, path, ", the seed")

    def _axes(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        if isinstance(value, tuple | list):
            return tuple(_number("index", item, path, " or several of them") for item in value)
        return _number("index", value, path, " or several of them")

    def _tagged(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        names = ("distance", "learning_rate", "heuristic")
        if not isinstance(value, tuple | list) or len(value) != 2 or value[0] not in names:
            raise wrong(path, f"a pair of a name and a number, the name one of {', '.join(names)}", value)
        return (value[0], _number("positive", value[1], path))

    def _numbers(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        if not isinstance(value, tuple | list):
            raise wrong(path, "a list of numbers", value)
        return tuple(_number("number", item, f"{path}[{index}]") for index, item in enumerate(value))

    def _array(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        if isinstance(value, tuple | list):
            numbers = self._numbers(parameter, value, path, depth)
            value = specs.Array.of("f32", (len(numbers),), numbers)
        if not isinstance(value, specs.Array) or len(value.shape) != 1 or not value.numbers:
            raise wrong(path, "an array of one dimension with at least one number", value)
        if not all(map(specs.is_number, value.numbers)):
            raise wrong(path, "an array of finite numbers", value)
        return value

    def _positions(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        if isinstance(value, tuple | list):
            numbers = tuple(_number("index", item, f"{path}[{index}]") for index, item in enumerate(value))
            value = specs.Array.of("i32", (len(numbers),), numbers)
        if not isinstance(value, specs.Array) or len(value.shape) != 1 or not value.numbers:
            raise wrong(path, "a list of whole numbers, one for each leaf", value)
        if value.dtype not in ("i32", "i64"):
            raise wrong(path, "whole numbers", value)
        for index, item in enumerate(value.numbers):
            _number("index", item, f"{path}[{index}]")
        return specs.Array.of("i32", value.shape, value.numbers)

    def _pairs(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        if not isinstance(value, tuple | list) or not all(_is_pair(item) for item in value):
            raise wrong(path, "{step: number}", value)
        if len({key for key, _ in value}) != len(value):
            raise wrong(path, "every step once", value)
        return tuple(
            (_number("index", key, path, ", a step"), _number("number", item, f"{path}[{key!r}]"))
            for key, item in value
        )

    def _mappings(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        if not isinstance(value, tuple | list) or not 0 < len(value) <= limits.SPEC_FEW_MAX:
            raise wrong(path, f"a list of 1 to {limits.SPEC_FEW_MAX} mappings {{name: number}}", value)
        # Each mapping is the arguments of one warmup_cosine_decay_schedule.
        allowed = {"init_value", "peak_value", "warmup_steps", "decay_steps", "end_value", "exponent"}
        stored = []
        for index, item in enumerate(value):
            where = f"{path}[{index}]"
            if not isinstance(item, tuple | list) or not all(_is_pair(pair) and pair[0] in allowed for pair in item):
                raise wrong(where, f"{{name: number}} with names of {', '.join(sorted(allowed))}", item)
            stored.append(tuple((name, _number("number", number, f"{where}[{name!r}]")) for name, number in item))
        return tuple(stored)

    def _mask(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        if isinstance(value, bool):
            return value
        listed = (value,) if isinstance(value, str) else value
        if not isinstance(listed, tuple | list) or not listed:
            raise wrong(path, "a name pattern, a list of them, or True or False", value)
        for pattern in listed:
            patterns.check(pattern, path)
        return value if isinstance(value, str) else tuple(value)

    def _groups(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        if not isinstance(value, tuple | list) or not value or not all(_is_pair(item) for item in value):
            raise wrong(path, "{name pattern: optimizer}", value)
        stored: list[tuple[str, Spec]] = []
        for pattern, member in value:
            patterns.check(pattern, path)
            if pattern in dict(stored):
                raise wrong(f"{path}[{pattern!r}]", "every pattern once", pattern)
            where = f"{path}[{pattern!r}]"
            stored.append((pattern, self._spec(parameter, member, where, depth)))
        return tuple(stored)

    def _schedule(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        if not isinstance(value, Spec):
            raise wrong(path, "a schedule", value)
        return self.spec(value, "schedule", path, depth + 1)

    def _schedules(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        if not isinstance(value, tuple | list) or not value:
            raise wrong(path, "a list of schedules", value)
        return tuple(self._schedule(parameter, item, f"{path}[{index}]", depth) for index, item in enumerate(value))

    def _spec(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        if not isinstance(value, Spec):
            raise wrong(path, "an optimizer or a transformation", value)
        return self.spec(value, "transformation", path, depth + 1)

    def _specs(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        if not isinstance(value, tuple | list) or not value:
            raise wrong(path, "transformations and optimizers", value)
        return tuple(self._spec(parameter, item, f"{path}[{index}]", depth) for index, item in enumerate(value))

    def _named(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        if not isinstance(value, tuple | list) or not value or not all(_is_pair(item) for item in value):
            raise wrong(path, "{name: transformation}", value)
        most = limits.SPEC_NAME_BYTES_MAX
        names = {name for name, _ in value if isinstance(name, str) and name.isprintable() and 0 < len(name) <= most}
        if len(names) != len(value):
            raise wrong(path, f"every name once, names of 1 to {most} printable characters", value)
        return tuple((name, self._spec(parameter, member, f"{path}[{name!r}]", depth)) for name, member in value)

    def _optimizer(self, parameter: Parameter, value: Value, path: str, depth: int) -> Value:
        checked = self._spec(parameter, value, path, depth)
        if not moves(checked):
            raise wrong(path, "an optimizer: nothing in this spec sets a learning rate", checked)
        return checked


def _count(value: Value, levels: int = 3) -> int:
    """How many values an argument is; no parameter takes lists in lists deeper than mappings in a list."""
    items = value if levels and isinstance(value, tuple | list) else ()
    return 1 + sum(_count(item, levels - 1) for item in items)


def _number(kind: str, value: Value, path: str, further: str = "") -> Value:
    test, expected = _NUMBERS[kind]
    # 32 bits hold every count there is; a real number stands for a whole one nowhere.
    if not specs.is_number(value) or not test(value):
        strange = type(value) in (int, float) and not specs.is_number(value)  # NaN, infinite, or beyond 32 bits
        raise wrong(path, expected + ", finite and in 32 bits" * (strange and kind != "number") + further, value)
    return value


def _is_pair(item: Value) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str | int)


def _check_whole(spec: Spec, where: str) -> None:
    """What no argument shows alone."""
    given = dict(spec.arguments)
    if spec.name == "piecewise_constant":
        boundaries, values = given["boundaries"], given["values"]
        if len(values) != len(boundaries) + 1:
            raise wrong(f"{where}.values", f"{len(boundaries) + 1} values, one more than boundaries", values)
        _check_ordered(boundaries, where)
    if spec.name == "join_schedules":
        boundaries, schedules = given["boundaries"], given["schedules"]
        if len(boundaries) != len(schedules) - 1:
            raise wrong(f"{where}.boundaries", f"{len(schedules) - 1} boundaries, one fewer than schedules", boundaries)
        _check_ordered(boundaries, where)
    if spec.name in ("betas", "prodigy", "dadapt_adamw") and len(given.get("betas", (0, 0))) != 2:
        raise wrong(f"{where}.betas", "two numbers", given["betas"])
    if given.get("key") is not None and given.get("seed") is not None:
        raise wrong(f"{where}.seed", "key or seed, not both", given["seed"])
    if spec.name == "grouped":
        _check_groups(given["of"], given["optimizers"], where)
    if spec.name == "torch_sgd":
        _check_nesterov(given, where)
    if spec.name == "torch_rprop":
        _check_factors(given, where)
    if spec.name == "delayed_nesterov":
        _check_share(given, where)


def _check_groups(of: specs.Array, optimizers: tuple[Spec, ...], where: str) -> None:
    """Every position is that of an optimizer, and every optimizer has a leaf."""
    if not optimizers:
        raise wrong(f"{where}.optimizers", "at least one optimizer", optimizers)
    for index, position in enumerate(of.numbers):
        if position >= len(optimizers):
            raise wrong(f"{where}.of[{index}]", f"the position of one of {len(optimizers)} optimizers", position)
    for index, member in enumerate(optimizers):
        if index not in of.numbers:
            raise wrong(f"{where}.optimizers[{index}]", f"an optimizer for at least one leaf: {index} in of", member)


def _check_nesterov(given: Mapping[str, Value], where: str) -> None:
    """Torch takes Nesterov's momentum undampened only."""
    if not given.get("nesterov"):
        return
    if given.get("momentum", 0) == 0:
        raise wrong(f"{where}.momentum", "a positive number, as nesterov is on", given.get("momentum", 0.0))
    if given.get("dampening", 0) != 0:
        raise wrong(f"{where}.dampening", "0, as nesterov is on", given["dampening"])


def _check_factors(given: Mapping[str, Value], where: str) -> None:
    """Rprop's steps shrink by one factor and grow by the other."""
    if given.get("eta_minus", 0.5) >= 1:
        raise wrong(f"{where}.eta_minus", "a number between 0 and 1", given["eta_minus"])
    if given.get("eta_plus", 1.2) <= 1:
        raise wrong(f"{where}.eta_plus", "a number above 1", given["eta_plus"])


def _check_share(given: Mapping[str, Value], where: str) -> None:
    """Of n updates each but the last has a share of the momentum, and all together have it once."""
    n = given.get("n", 4)
    if given.get("c", 0.0) * n > 1:
        raise wrong(f"{where}.c", f"at most 1 / n, which is {1 / n:g}", given["c"])


def _check_ordered(boundaries: Value, where: str) -> None:
    if any(a > b for a, b in itertools.pairwise(boundaries)):
        raise wrong(f"{where}.boundaries", "boundaries that do not decrease", boundaries)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
