"""Errors as the detail in the trailing metadata."""

from __future__ import annotations

from google.protobuf import message as protobuf_message

from optwire_proto import errors, limits
from optwire_proto.v1 import optimizer_pb2 as pb


def error_to_proto(error: errors.OptwireError) -> bytes:
    """The error for the trailing metadata, serialized; texts cut to what metadata may carry."""
    most = limits.ERROR_DETAIL_BYTES_MAX
    return pb.ErrorDetail(
        reason=error.reason,
        subject=cut(error.subject, most),
        expected=cut(error.expected, most),
        got=cut(error.got, most),
        step=error.step,
        retry_after_s=error.retry_after_s,
    ).SerializeToString()


def cut(text: str, bytes_max: int) -> str:
    """As much of a text as fits into ``bytes_max`` bytes of UTF-8; what is no Unicode is replaced."""
    return text.encode(errors="replace")[:bytes_max].decode(errors="ignore")


def error_from_proto(code: str, message: str, detail: bytes | None) -> errors.OptwireError:
    """The error of a status; ``detail`` as ``error_to_proto`` made it, or None where the status is not ours."""
    try:
        parsed = pb.ErrorDetail.FromString(detail or b"")
    except protobuf_message.DecodeError:  # damaged on the way; the status itself still says what matters
        parsed = pb.ErrorDetail()
    return errors.from_status(
        code,
        parsed.reason,
        message,
        subject=parsed.subject,
        expected=parsed.expected,
        got=parsed.got,
        step=parsed.step if parsed.HasField("step") else None,
        retry_after_s=parsed.retry_after_s,
    )
