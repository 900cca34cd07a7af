"""Frames that carry chunks as bytes of the wire, by hand: one copy out, none in.

Whatever is not exactly one chunk, in the form that this module and the generated code write, is left to the generated
code, so that nothing is read here otherwise than there. A chunk takes the same place in every frame of the protocol:

    12 <length>          the frame's field `chunk`, all of the frame
       08 <offset>       not there where the offset is 0
       12 <length>       the data, up to the end
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final

from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import tensor_pb2 as tensor_pb

# A key is the field's number times 8, plus 0 for a number and 2 for what has a length.
_FRAME_CHUNK: Final = bytes((8 * pb.StreamStepsRequest.CHUNK_FIELD_NUMBER + 2,))
_OFFSET: Final = bytes((8 * tensor_pb.Chunk.OFFSET_FIELD_NUMBER,))
_DATA: Final = bytes((8 * tensor_pb.Chunk.DATA_FIELD_NUMBER + 2,))
# The longest number that is read here, in bytes of seven bits; longer ones may need 64.
_NUMBER_BYTES_MAX: Final = 9


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """A frame that is a chunk.

    Attributes:
      offset: of its first byte in the payload.
      data: a view of the message it came in.
      shard: which slice of the payload.
    """

    offset: int
    data: memoryview
    shard: int = 0


def chunk_to_wire(offset: int, views: Sequence[memoryview]) -> bytes:
    """The frame of a chunk, whatever kind of frame; the data in ``views`` is copied once.

    Args:
      offset: of the chunk in the payload.
      views: of bytes, 1 byte or more in all.
    """
    length = sum(view.nbytes for view in views)
    head = (_OFFSET + _number(offset) if offset else b"") + _DATA + _number(length)
    return b"".join((_FRAME_CHUNK, _number(len(head) + length), head, *views))


def frame_writer(write: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """A serializer of frames; what ``chunk_to_wire`` made passes as it is, ``write`` does the others."""
    return lambda frame: frame if type(frame) is bytes else write(frame)


def frame_reader(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A deserializer of frames: to a ``Chunk`` without a copy where they are one, by ``read`` where not."""

    def read_frame(data: bytes) -> Any:
        chunk = _chunk(data)
        return read(data) if chunk is None else chunk

    return read_frame


def chunk_of(frame: Any) -> Chunk | None:
    """The chunk that a frame is; None where it is another kind. ``frame`` is what ``frame_reader`` gave."""
    if type(frame) is Chunk:
        return frame
    if frame.WhichOneof("frame") != "chunk":
        return None
    chunk = frame.chunk  # in a form that was left to the generated code
    return Chunk(chunk.offset, memoryview(chunk.data), chunk.shard)


def kind_of(frame: Any) -> str | None:
    """Which kind of frame it is; None where it is none. ``frame`` is what ``frame_reader`` gave."""
    if type(frame) is Chunk:
        return "chunk"
    kind: str | None = frame.WhichOneof("frame")
    return kind


def _chunk(data: bytes) -> Chunk | None:
    """The chunk that a message is, or None where the generated code is to say what it is."""
    size = len(data)
    at, length = _read(data, 0, _FRAME_CHUNK)
    if at == 0 or at + length != size:
        return None
    inside = at
    at, offset = _read(data, inside, _OFFSET)
    at, length = _read(data, at or inside, _DATA)
    if at == 0 or length == 0 or at + length != size:
        return None
    return Chunk(offset, memoryview(data)[at:])


def _read(data: bytes, at: int, key: bytes) -> tuple[int, int]:
    """Where the field of ``key`` at ``at`` goes on, and its number; (0, 0) where another is there, or an odd form."""
    if data[at : at + 1] != key:
        return 0, 0
    number = 0
    for index, seven in enumerate(data[at + 1 : at + 1 + _NUMBER_BYTES_MAX]):
        number |= (seven & 0x7F) << 7 * index
        if seven < 0x80:
            return (at + index + 2, number) if seven or not index else (0, 0)
    return 0, 0


def _number(value: int) -> bytes:
    """A number as its wire form has it, seven bits a byte."""
    seven = bytearray()
    while value > 0x7F:
        seven.append(value & 0x7F | 0x80)
        value >>= 7
    seven.append(value)
    return bytes(seven)
