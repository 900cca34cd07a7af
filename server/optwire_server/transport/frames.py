"""The frames of a payload on its way in: begin, chunks copied to their landing, end. Knows them by their fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from optwire_proto import convert, errors, limits, sessions
from optwire_server.engine import landing
from optwire_server.transport import streams


def first(messages: Iterator[Any]) -> Any:
    """The content of the begin frame that a stream must start with."""
    begin = next_begin(messages)
    if begin is None:
        raise errors.MalformedRequestError("the stream ended before its begin frame", expected="begin", got="end")
    return begin


def next_begin(messages: Iterator[Any]) -> Any:
    """The content of the next begin frame, or None at the end of the stream.

    Raises:
      MalformedRequestError: another frame came.
    """
    message = next(messages, None)
    return None if message is None else begin_of(message)


def begin_of(message: Any) -> Any:
    """The content of a frame that must be a begin; raises MalformedRequestError where it is another."""
    _expect(message, "begin")
    return message.begin


def land(messages: Iterator[Any], lent: landing.Landing, stream: streams.Stream) -> sessions.Digest:
    """Copies chunks to their landing until the end frame, and returns its digest.

    Raises:
      PayloadError, LimitError, MalformedRequestError: the frames are not one whole payload.
    """
    with stream.transferring():
        for message in messages:
            stream.progressed()
            chunk = convert.chunk_of(message)
            if chunk is not None:
                lent.write(chunk.offset, chunk_data(chunk))
            else:
                _expect(message, "end")
                return convert.end_from_proto(message.end)
    raise errors.PayloadError(
        "the stream ended before the payload did", subject="end", expected="the end of the payload", got="end of stream"
    )


def end(messages: Iterator[Any], stream: streams.Stream) -> sessions.Digest:
    """The digest of the end frame that must follow the begin of a push whose payload does not travel."""
    with stream.transferring():
        message = next(messages, None)
    if message is None:
        raise errors.MalformedRequestError("the stream ended before the push did", expected="end", got="end of stream")
    _expect(message, "end")
    return convert.end_from_proto(message.end)


def _expect(message: Any, kind: str) -> None:
    came = convert.kind_of(message)
    if came != kind:
        raise errors.MalformedRequestError(
            f"frame {came or 'without content'!r}, expected {kind!r}",
            subject="frame",
            expected=kind,
            got=came or "none",
        )


def chunk_data(chunk: convert.Chunk) -> memoryview:
    """The bytes of a chunk; raises LimitError, UnsupportedError where it cannot be taken."""
    data = chunk.data
    if len(data) > limits.CHUNK_BYTES_MAX:
        raise errors.LimitError(
            f"chunk of {len(data)} bytes, expected at most {limits.CHUNK_BYTES_MAX}",
            subject="chunk",
            expected=f"at most {limits.CHUNK_BYTES_MAX} bytes",
            got=str(len(data)),
        )
    if chunk.shard:
        raise errors.UnsupportedError(
            f"chunk.shard: {chunk.shard}; this server holds all of a payload",
            subject="shard",
            expected="0",
            got=str(chunk.shard),
        )
    return data
