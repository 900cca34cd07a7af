"""What this version serves of what the protocol names: the rest is refused, never ignored."""

from __future__ import annotations

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
    where = where or message.DESCRIPTOR.name
    unknown_set: Any = unknown_fields.UnknownFieldSet(message)
    for unknown in unknown_set:
        raise errors.UnsupportedError(
            f"{where}: field number {unknown.field_number} is not known to this version",
            subject=where,
            got=str(unknown.field_number),
        )
    # Only the fields that are messages are looked at: reading a chunk's data would copy it.
    for field in message.DESCRIPTOR.fields:
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        value = getattr(message, field.name)
        if isinstance(value, protobuf_message.Message):
            value = [value] if message.HasField(field.name) else []
        for child in value:
            refuse_unknown_fields(child, f"{where}.{field.name}")


def served(where: str, field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raises UnsupportedError where ``value`` is none of ``allowed``."""
    if value not in allowed:
        raise errors.UnsupportedError(
            f"{where}.{field}: {value} is not served by this version",
            subject=f"{where}.{field}",
            expected=f"one of {', '.join(map(repr, allowed))}"[:200],
            got=str(value),
        )
