"""Optimizer specs, their values and the catalogue as messages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from optwire_proto import catalogue, entries, errors, limits, spec_text, specs
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import tensor_pb2 as tensor_pb

_TENSOR_TYPES = {
    "f32": tensor_pb.DATA_TYPE_F32,
    "f64": tensor_pb.DATA_TYPE_F64,
    "i32": tensor_pb.DATA_TYPE_I32,
    "i64": tensor_pb.DATA_TYPE_I64,
}


def spec_to_proto(spec: specs.Spec, where: str = "", depth: int = 0) -> pb.Spec:
    """The spec at the path ``where``; raises SpecError where it holds what cannot travel, or is nested too deep."""
    _check_depth(where, depth)
    specs.check_shape(spec)
    _text(spec.name, where or "spec", limits.SPEC_NAME_BYTES_MAX)
    inside = _inside(where, spec.name)
    arguments = []
    for name, value in spec.arguments:
        _text(name, inside, limits.SPEC_NAME_BYTES_MAX)
        arguments.append(pb.Argument(name=name, value=value_to_proto(value, f"{inside}.{name}", depth)))
    return pb.Spec(name=spec.name, arguments=arguments)


def spec_from_proto(message: pb.Spec, where: str = "", depth: int = 0) -> specs.Spec:
    """The spec at the path ``where``.

    Raises:
      SpecError: an argument without a value, nesting that is too deep, text that is no spec.
    """
    _check_depth(where, depth)
    if message.text:
        if message.name or message.arguments:
            subject = where or "spec"
            raise errors.SpecError(f"{subject}: text beside a name or arguments, expected one of them", subject=subject)
        with _at(where):
            return spec_text.parse(message.text, catalogue.CATALOGUE)
    _text(message.name, where or "spec", limits.SPEC_NAME_BYTES_MAX)
    inside = _inside(where, message.name)
    arguments = []
    for argument in message.arguments:
        _text(argument.name, inside, limits.SPEC_NAME_BYTES_MAX)
        arguments.append((argument.name, value_from_proto(argument.value, f"{inside}.{argument.name}", depth)))
    return specs.Spec(message.name, tuple(arguments))


def _inside(where: str, name: str) -> str:
    return f"{where[-200:]}.{name}" if where else name


def _check_depth(where: str, depth: int) -> None:
    if depth > limits.SPEC_WIRE_DEPTH_MAX:
        subject = where[-80:] or "spec"
        raise errors.SpecError(f"{subject}: nested deeper than {limits.SPEC_WIRE_DEPTH_MAX}", subject=subject)


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """Puts the path of a value before what is said about a part of it alone."""
    try:
        yield
    except errors.SpecError as exc:
        if not where:
            raise
        part = "" if exc.subject in ("array", "blob", "spec") else f".{exc.subject}"
        subject = f"{where}{part}"[-200:]
        raise errors.SpecError(f"{where[-200:]}: {exc}", subject=subject, expected=exc.expected, got=exc.got) from exc


def value_to_proto(value: specs.Value, where: str = "value", depth: int = 0) -> pb.Value:
    if value is None:
        return pb.Value(absent=pb.Absent())
    if isinstance(value, bool):
        return pb.Value(flag=value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return pb.Value(integer=value)
    if isinstance(value, float):
        return pb.Value(number=value)
    if isinstance(value, str):
        return pb.Value(text=_text(value, where, limits.SPEC_TEXT_BYTES_MAX))
    if isinstance(value, specs.Spec):
        return pb.Value(spec=spec_to_proto(value, where, depth + 1))
    if isinstance(value, specs.Array):
        leaf = tensor_pb.LeafSpec(shape=value.shape, data_type=_TENSOR_TYPES[value.dtype])
        return pb.Value(tensor=pb.TensorValue(leaf=leaf, data=value.data))
    if isinstance(value, specs.Blob):
        return pb.Value(blob=value.data)
    if isinstance(value, tuple | list) and depth <= limits.SPEC_WIRE_DEPTH_MAX:
        values = [value_to_proto(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
        return pb.Value(list=pb.ValueList(values=values))
    if isinstance(value, tuple | list):
        raise errors.SpecError(f"{where}: nested deeper than {limits.SPEC_WIRE_DEPTH_MAX}", subject=where)
    got = f"{type(value).__name__} {specs.shown(value)}"[:80]
    raise errors.SpecError(
        f"{where}: {got}, expected a number of at most 64 bits, flag, text, spec, list, array, blob or None",
        subject=where,
        got=got,
    )


def _text(value: object, where: str, bytes_max: int) -> str:
    """A text that may travel; raises SpecError where it is none, too long, or no Unicode."""
    try:
        if isinstance(value, str) and len(value.encode()) <= bytes_max:
            return value
        expected = f"text of at most {bytes_max} bytes"
    except UnicodeEncodeError:
        expected = "text that is valid Unicode"
    got = ascii(value)[:80]
    raise errors.SpecError(f"{where}: {got}, expected {expected}", subject=where[:80], expected=expected, got=got)


def value_from_proto(message: pb.Value, where: str, depth: int = 0) -> specs.Value:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise errors.SpecError(f"{where}: no value", subject=where, expected="a value", got="nothing")
    if kind == "tensor":
        return _array_from_proto(message.tensor, where)
    if kind == "blob":
        with _at(where):
            return specs.Blob(message.blob)
    if kind == "absent":
        return None
    if kind == "text":
        return _text(message.text, where, limits.SPEC_TEXT_BYTES_MAX)
    if kind == "spec":
        return spec_from_proto(message.spec, where, depth + 1)
    if kind == "list":
        _check_depth(where, depth)
        values = message.list.values
        if len(values) > limits.SPEC_LIST_MAX:
            raise specs.wrong(where, f"a list of at most {limits.SPEC_LIST_MAX} values, or an array", tuple(values))
        return tuple(value_from_proto(item, place, depth + 1) for item, place in _places(values, where))
    return getattr(message, kind)


def _places(values: Sequence[pb.Value], where: str) -> Iterator[tuple[pb.Value, str]]:
    """The items of a list, each with its path as ``specs.places`` has it."""
    for index, item in enumerate(values):
        pair = item.list.values
        name = pair[0].text[:80] if _is_group(pair) else index
        yield item, where if _is_group(values) else f"{where}[{name!r}]"


def _is_group(values: Sequence[pb.Value]) -> bool:
    return len(values) == 2 and values[0].HasField("text") and values[1].HasField("spec")


def _array_from_proto(message: pb.TensorValue, where: str) -> specs.Array:
    dtype = next((name for name, number in _TENSOR_TYPES.items() if number == message.leaf.data_type), "")
    if message.leaf.name or not dtype:
        got = repr(message.leaf.name[:80]) if message.leaf.name else f"element type {message.leaf.data_type}"
        raise errors.SpecError(
            f"{where}: array with {got}, expected no name and an element type of {', '.join(_TENSOR_TYPES)}",
            subject=where,
            got=got,
        )
    with _at(where):
        return specs.Array(dtype, tuple(message.leaf.shape), message.data)


def arguments_to_proto(arguments: Iterable[tuple[str, specs.Value]]) -> list[pb.Argument]:
    return [pb.Argument(name=name, value=value_to_proto(value, name)) for name, value in arguments]


def arguments_from_proto(messages: Iterable[pb.Argument]) -> tuple[tuple[str, specs.Value], ...]:
    return tuple((argument.name, value_from_proto(argument.value, argument.name[:80])) for argument in messages)


def entry_to_proto(entry: entries.Entry) -> pb.CatalogueEntry:
    return pb.CatalogueEntry(
        name=entry.name,
        kind=entry.kind,
        summary=entry.summary,
        parameters=[
            pb.Parameter(
                name=parameter.name,
                default=None if parameter.default is entries.REQUIRED else value_to_proto(parameter.default),
                takes=parameter.takes,
                keyword_only=parameter.keyword_only,
            )
            for parameter in entry.parameters
        ],
        origin=entry.origin,
        refusal=entry.refusal,
        extras=entry.extras,
    )


def entry_from_proto(message: pb.CatalogueEntry) -> entries.Entry:
    """``none``, ``variadic`` and ``choices`` stay on the server, where arguments are checked."""
    parameters = tuple(
        entries.Parameter(
            parameter.name,
            parameter.takes,
            value_from_proto(parameter.default, parameter.name) if parameter.HasField("default") else entries.REQUIRED,
            keyword_only=parameter.keyword_only,
        )
        for parameter in message.parameters
    )
    return entries.Entry(
        message.name,
        message.kind,
        parameters,
        message.summary,
        message.origin,
        message.refusal,
        tuple(message.extras),
    )


def changes_from_proto(arguments: Sequence[pb.Argument]) -> dict[str, specs.Value]:
    """New values of hyperparameters by path, or end of a path.

    Raises:
      InvalidArgumentError: none was given, one was given twice, or is neither a number nor a schedule.
    """
    values = dict(arguments_from_proto(arguments))
    if not values or len(values) != len(arguments):
        got = "nothing" if not values else "a name twice"
        raise errors.InvalidArgumentError(
            f"hyperparams: {got}, expected every name once", subject="hyperparams", expected="names, each once", got=got
        )
    for name, value in values.items():
        if not specs.is_number(value) and not isinstance(value, specs.Spec):
            got = specs.shown(value)
            raise errors.InvalidArgumentError(
                f"hyperparams: {name[:80]}={got}, expected a finite number or a schedule",
                subject=name[:80],
                expected="a finite number or a schedule",
                got=got,
            )
    return values
