"""Optimizer specs, their values and the catalogue as messages."""

from __future__ import annotations

from collections.abc import Iterable

from optwire_proto import catalogue, entries, errors, limits, spec_text, specs
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import tensor_pb2 as tensor_pb

_TENSOR_TYPES = {
    "f32": tensor_pb.DATA_TYPE_F32,
    "f64": tensor_pb.DATA_TYPE_F64,
    "i32": tensor_pb.DATA_TYPE_I32,
    "i64": tensor_pb.DATA_TYPE_I64,
}


def spec_to_proto(spec: specs.Spec, depth: int = 0) -> pb.Spec:
    """Raises SpecError where a spec holds what no argument can be, or is nested too deep."""
    if depth > limits.SPEC_WIRE_DEPTH_MAX:
        raise errors.SpecError(f"spec nested deeper than {limits.SPEC_WIRE_DEPTH_MAX}")
    specs.check_shape(spec)
    _text(spec.name, "spec", limits.SPEC_NAME_BYTES_MAX)
    arguments = []
    for name, value in spec.arguments:
        _text(name, spec.name, limits.SPEC_NAME_BYTES_MAX)
        arguments.append(pb.Argument(name=name, value=value_to_proto(value, f"{spec.name}.{name}", depth)))
    return pb.Spec(name=spec.name, arguments=arguments)


def spec_from_proto(message: pb.Spec, depth: int = 0) -> specs.Spec:
    """Raises SpecError for an argument without a value, for nesting that is too deep, and for text that is no spec."""
    if depth > limits.SPEC_WIRE_DEPTH_MAX:
        raise errors.SpecError(f"spec nested deeper than {limits.SPEC_WIRE_DEPTH_MAX}")
    if message.text:
        if message.name or message.arguments:
            raise errors.SpecError("spec: text beside a name or arguments, expected one of them", subject="spec")
        return spec_text.parse(message.text, catalogue.CATALOGUE)
    _text(message.name, "spec", limits.SPEC_NAME_BYTES_MAX)
    arguments = []
    for argument in message.arguments:
        _text(argument.name, message.name, limits.SPEC_NAME_BYTES_MAX)
        where = f"{message.name[:80]}.{argument.name[:80]}"
        arguments.append((argument.name, value_from_proto(argument.value, where, depth)))
    return specs.Spec(message.name, tuple(arguments))


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
        return pb.Value(spec=spec_to_proto(value, depth + 1))
    if isinstance(value, specs.Array):
        leaf = tensor_pb.LeafSpec(shape=value.shape, data_type=_TENSOR_TYPES[value.dtype])
        return pb.Value(tensor=pb.TensorValue(leaf=leaf, data=value.data))
    if isinstance(value, specs.Blob):
        return pb.Value(blob=value.data)
    if isinstance(value, tuple | list) and depth <= limits.SPEC_WIRE_DEPTH_MAX:
        return pb.Value(list=pb.ValueList(values=[value_to_proto(item, where, depth + 1) for item in value]))
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
        problem = f"expected text of at most {bytes_max} bytes"
    except UnicodeEncodeError:
        problem = "expected text that is valid Unicode"
    got = ascii(value)[:80]
    raise errors.SpecError(f"{where}: {got}, {problem}", subject=where[:80], got=got)


def value_from_proto(message: pb.Value, where: str, depth: int = 0) -> specs.Value:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise errors.SpecError(f"{where}: no value", subject=where, got="nothing")
    if kind == "tensor":
        return _array_from_proto(message.tensor, where)
    if kind == "blob":
        return specs.Blob(message.blob)
    if kind == "absent":
        return None
    if kind == "text":
        return _text(message.text, where, limits.SPEC_TEXT_BYTES_MAX)
    if kind == "spec":
        return spec_from_proto(message.spec, depth + 1)
    if kind == "list":
        if depth > limits.SPEC_WIRE_DEPTH_MAX:
            raise errors.SpecError(f"{where}: nested deeper than {limits.SPEC_WIRE_DEPTH_MAX}", subject=where)
        return tuple(value_from_proto(item, where, depth + 1) for item in message.list.values)
    return getattr(message, kind)


def _array_from_proto(message: pb.TensorValue, where: str) -> specs.Array:
    dtype = next((name for name, number in _TENSOR_TYPES.items() if number == message.leaf.data_type), "")
    if message.leaf.name or not dtype:
        got = repr(message.leaf.name[:80]) if message.leaf.name else f"element type {message.leaf.data_type}"
        raise errors.SpecError(
            f"{where}: array with {got}, expected no name and an element type of {', '.join(_TENSOR_TYPES)}",
            subject=where,
            got=got,
        )
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
