"""The start of a push on a stream: its begin frame, or a stage, whose chunks come before it. Knows no engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from optwire_proto import convert, errors
from optwire_server import registry as registries
from optwire_server.engine import stage as stages
from optwire_server.transport import frames, streams


@contextlib.contextmanager
def begun(
    start: Any,
    messages: Iterator[Any],
    registry: registries.Registry,
    stream: streams.Stream,
    cancel: Callable[[], object],
) -> Iterator[tuple[Any, stages.Stage | None]]:
    """Gives the content of a push's begin frame, and the landing that some of its payload has come to, if any.

    What is staged is received until the push begins. Until then the stream counts as idle: the client computes, and
    sends when it has something. The call is ended after the time that an idle stream may take between two frames, or
    where somebody else needs its place or its landing; the client then pushes as if it had staged nothing.

    Args:
      start: the first frame: begin or stage.
      messages: those that follow.
      registry: lends the landing.
      stream: the call.
      cancel: ends the call, from another thread.

    Raises:
      PayloadError, LimitError, MalformedRequestError: frames that are not those of a stage.
      InvalidArgumentError: the push is for another session than the stage.
    """
    if convert.kind_of(start) != "stage":
        yield frames.begin_of(start), None
        return
    session_id, incarnation = convert.stage_from_proto(start.stage)
    with registry.staging(session_id, incarnation, cancel) as stage:
        begin = _received(messages, stage, stream)
        if begin.key.session_id != session_id:
            raise errors.InvalidArgumentError(
                f"push.key.session_id: {begin.key.session_id[:80]!r}, but staged was for session {session_id!r}",
                subject="session_id",
                expected=session_id,
                got=begin.key.session_id[:80],
            )
        yield begin, stage


def _received(messages: Iterator[Any], stage: stages.Stage, stream: streams.Stream) -> Any:
    """The content of the begin frame that follows staged chunks."""
    for message in messages:
        stream.progressed()
        chunk = convert.chunk_of(message)
        if chunk is None:
            return frames.begin_of(message)
        stage.write(chunk.offset, frames.chunk_data(chunk))
    raise errors.PayloadError(
        "the stream ended before the push that was staged", subject="begin", expected="begin", got="end of stream"
    )
