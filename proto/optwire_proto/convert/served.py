"""What this version serves of what the protocol names: the rest is refused, never ignored."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

from google.protobuf import message as protobuf_message
from google.protobuf import unknown_fields

from optwire_proto import errors


def refuse_unknown_fields(message: protobuf_message.Message, where: str = "") -> None:
    """Raises where a message, or one inside it, has a field this version does not know.

    protobuf would keep quiet about it, and a newer client's wish would be ignored.

    Raises:
      UnsupportedError: names the message and the field's number.
    """
    descriptor = message.DESCRIPTOR
    unknown_set: Any = unknown_fields.UnknownFieldSet(message)
    for unknown in unknown_set:
        where = where or descriptor.name
        raise errors.UnsupportedError(
            f"{where}: field number {unknown.field_number} is not known to this version",
            subject=where,
            got=str(unknown.field_number),
        )
    # Only the fields that are messages are looked at: reading a chunk's data would copy it.
    for name, is_repeated in _inside(descriptor):
        if is_repeated:
            for child in getattr(message, name):
                refuse_unknown_fields(child, f"{where or descriptor.name}.{name}")
        elif message.HasField(name):
            refuse_unknown_fields(getattr(message, name), f"{where or descriptor.name}.{name}")


@functools.cache
def _inside(descriptor: Any) -> tuple[tuple[str, bool], ...]:
    """Names of a message's fields that are messages, and whether each is repeated."""
    return tuple(
        (field.name, field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED)
        for field in descriptor.fields
        if field.message_type is not None and not field.message_type.GetOptions().map_entry
    )


def served(where: str, field: str, value: Any, allowed: Collection[Any]) -> None:
    """Raises UnsupportedError where ``value`` is none of ``allowed``."""
    if value not in allowed:
        raise errors.UnsupportedError(
            f"{where}.{field}: {value} is not served by this version",
            subject=f"{where}.{field}",
            expected=f"one of {', '.join(map(repr, allowed))}"[:200],
            got=str(value),
        )
