"""Optimizer specs, their values and the catalogue as messages."""

from __future__ import annotations

from optwire_proto import errors, limits, specs
from optwire_proto.v1 import optimizer_pb2 as pb


def spec_to_proto(spec: specs.Spec) -> pb.Spec:
    return pb.Spec(
        name=spec.name,
        arguments=[pb.Argument(name=name, value=value_to_proto(value)) for name, value in spec.arguments],
    )


def spec_from_proto(message: pb.Spec, depth: int = 0) -> specs.Spec:
    """Raises SpecError for an argument without a value, and for nesting that is too deep."""
    if depth > limits.SPEC_WIRE_DEPTH_MAX:
        raise errors.SpecError(f"spec nested deeper than {limits.SPEC_WIRE_DEPTH_MAX}")
    arguments = []
    for argument in message.arguments:
        where = f"{message.name[:80]}.{argument.name[:80]}"
        arguments.append((argument.name, value_from_proto(argument.value, where, depth)))
    return specs.Spec(message.name, tuple(arguments))


def value_to_proto(value: specs.Value) -> pb.Value:
    if value is None:
        return pb.Value(absent=pb.Absent())
    if isinstance(value, bool):
        return pb.Value(flag=value)
    if isinstance(value, int):
        return pb.Value(integer=value)
    if isinstance(value, float):
        return pb.Value(number=value)
    if isinstance(value, str):
        return pb.Value(text=value)
    if isinstance(value, specs.Spec):
        return pb.Value(spec=spec_to_proto(value))
    return pb.Value(list=pb.ValueList(values=[value_to_proto(item) for item in value]))


def value_from_proto(message: pb.Value, where: str, depth: int = 0) -> specs.Value:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise errors.SpecError(f"{where}: no value", subject=where, got="nothing")
    if kind == "tensor":
        raise errors.UnsupportedError(f"{where}: arrays as arguments are not served", subject=where, got="tensor")
    if kind == "absent":
        return None
    if kind == "spec":
        return spec_from_proto(message.spec, depth + 1)
    if kind == "list":
        if depth > limits.SPEC_WIRE_DEPTH_MAX:
            raise errors.SpecError(f"{where}: nested deeper than {limits.SPEC_WIRE_DEPTH_MAX}", subject=where)
        return tuple(value_from_proto(item, where, depth + 1) for item in message.list.values)
    return getattr(message, kind)


def entry_to_proto(entry: specs.Entry) -> pb.CatalogueEntry:
    return pb.CatalogueEntry(
        name=entry.name,
        kind=entry.kind,
        summary=entry.summary,
        parameters=[
            pb.Parameter(name=parameter.name)
            if parameter.default is specs.REQUIRED
            else pb.Parameter(name=parameter.name, default=value_to_proto(parameter.default))
            for parameter in entry.parameters
        ],
    )


def entry_from_proto(message: pb.CatalogueEntry) -> specs.Entry:
    """``takes`` stays on the server, where arguments are checked; it is empty here."""
    parameters = tuple(
        specs.Parameter(parameter.name, "", value_from_proto(parameter.default, parameter.name))
        if parameter.HasField("default")
        else specs.Parameter(parameter.name, "")
        for parameter in message.parameters
    )
    return specs.Entry(message.name, message.kind, parameters, message.summary)
