"""The frames that are read and written by hand, against the generated code: the same bytes, the same verdicts."""

from __future__ import annotations

import pytest
from google.protobuf import message as protobuf_message
from hypothesis import given
from hypothesis import strategies as st

from optwire_proto import convert, errors
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import tensor_pb2 as tensor_pb

KINDS = (
    pb.CreateSessionRequest,
    pb.LoadStateRequest,
    pb.ReadParamsResponse,
    pb.ReadStateResponse,
    pb.StreamStepsRequest,
    pb.StreamStepsResponse,
)
U64 = st.integers(0, 2**64 - 1)
kinds = st.sampled_from(KINDS)
# Lengths and offsets around the borders where a number takes a byte more.
borders = st.sampled_from([2 ** (7 * k) + d for k in range(10) for d in (-1, 0, 1)]).filter(lambda n: 0 <= n < 2**64)
offsets = st.one_of(U64, borders, st.just(0))


def number(value: int, *, longer: int = 0) -> bytes:
    """A number of the wire; with ``longer`` bytes of nothing behind it, which readers must put up with."""
    sevens = [value & 0x7F]
    while value := value >> 7:
        sevens.append(value & 0x7F)
    sevens += [0] * longer
    return bytes([seven | 0x80 for seven in sevens[:-1]] + sevens[-1:])


def field(key: int, content: bytes | int, *, longer: int = 0) -> bytes:
    if isinstance(content, int):
        return bytes([key]) + number(content, longer=longer)
    return bytes([key]) + number(len(content), longer=longer) + content


# Fields as they may stand in a chunk and in a frame: known and unknown ones, in any order, twice, and in odd forms.
longer = st.integers(0, 3)
inner_fields = st.one_of(
    st.builds(lambda value, n: field(0x08, value, longer=n if value < 2**35 else 0), offsets, longer),
    st.builds(lambda data, n: field(0x12, data, longer=n), st.binary(max_size=200), longer),
    st.builds(lambda value: field(0x18, value), st.integers(0, 2**32)),
    st.builds(lambda value: field(0x20, value), U64),  # unknown
    st.builds(lambda data: field(0x3A, data), st.binary(max_size=5)),  # unknown
    st.builds(lambda data: field(0x0A, data), st.binary(max_size=5)),  # the offset, of another wire type
    st.binary(max_size=6),
)
inner = st.lists(inner_fields, max_size=4).map(b"".join)
outer_fields = st.one_of(
    st.builds(lambda data, n: field(0x12, data, longer=n), inner, longer),
    st.builds(lambda data: field(0x0A, data), st.binary(max_size=8)),  # begin or ack
    st.builds(lambda data: field(0x1A, data), st.sampled_from([b"", field(0x0A, b"")])),  # end
    st.builds(lambda value: field(0x78, value), U64),  # unknown
    st.binary(max_size=6),
)
messages = st.lists(outer_fields, max_size=3).map(b"".join)
plain = st.builds(
    lambda offset, data: field(0x12, (field(0x08, offset) if offset else b"") + field(0x12, data)),
    offsets,
    st.binary(min_size=1, max_size=300),
)


def verdict(kind: type[pb.StreamStepsRequest], data: bytes) -> object:
    """What the generated code says of a message: the chunk that it is, the frame that it is, or why it is refused."""
    try:
        message = kind.FromString(data)
        convert.refuse_unknown_fields(message)
    except protobuf_message.DecodeError:
        return "malformed"
    except errors.UnsupportedError as exc:
        return str(exc)
    if message.WhichOneof("frame") == "chunk":
        return message.chunk.offset, message.chunk.data, message.chunk.shard
    return message


def verdict_by_hand(kind: type[pb.StreamStepsRequest], data: bytes) -> object:
    """The same, as the server comes to it."""
    try:
        frame = convert.frame_reader(kind.FromString)(data)
        if type(frame) is not convert.Chunk:
            convert.refuse_unknown_fields(frame)
    except protobuf_message.DecodeError:
        return "malformed"
    except errors.UnsupportedError as exc:
        return str(exc)
    chunk = convert.chunk_of(frame)
    if chunk is None:
        assert convert.kind_of(frame) != "chunk"
        return frame
    assert convert.kind_of(frame) == "chunk"
    return chunk.offset, bytes(chunk.data), chunk.shard


@given(kinds, offsets, st.lists(st.binary(max_size=200), min_size=1, max_size=4).filter(any))
def test_chunks_are_written_as_the_generated_code_writes_them(kind, offset: int, parts: list[bytes]):
    generated = kind(chunk=tensor_pb.Chunk(offset=offset, data=b"".join(parts)))
    written = convert.chunk_to_wire(offset, [memoryview(part) for part in parts])
    assert written == generated.SerializeToString(deterministic=True)
    assert convert.frame_writer(kind.SerializeToString)(written) is written
    assert convert.frame_writer(kind.SerializeToString)(generated) == written


@pytest.mark.parametrize("size", [1, 127, 128, 16_383, 16_384, 1 << 20, 2_097_151, 2_097_152])
@pytest.mark.parametrize("offset", [0, 1, 127, 128, 2**31, 2**32 + 5, 2**63, 2**64 - 1])
def test_lengths_and_offsets_of_any_size_are_written_and_read(size: int, offset: int):
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    written = convert.chunk_to_wire(offset, [memoryview(data)])
    assert verdict(pb.StreamStepsRequest, written) == (offset, data, 0)
    assert verdict_by_hand(pb.StreamStepsRequest, written) == (offset, data, 0)


@given(kinds, st.one_of(messages, plain))
def test_messages_are_read_as_the_generated_code_reads_them(kind, data: bytes):
    assert verdict_by_hand(kind, data) == verdict(kind, data)


@given(kinds, plain, st.data())
def test_damaged_chunks_are_read_as_the_generated_code_reads_them(kind, whole: bytes, data: st.DataObject):
    cut = data.draw(st.integers(0, len(whole)))
    assert verdict_by_hand(kind, whole[:cut]) == verdict(kind, whole[:cut])
    at = data.draw(st.integers(0, min(len(whole) - 1, 30)))
    changed = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    assert verdict_by_hand(kind, changed) == verdict(kind, changed)


@given(plain)
def test_a_plain_chunk_is_a_view_of_its_message(data: bytes):
    def never(data: bytes) -> None:
        raise AssertionError("left to the generated code")

    offset = pb.StreamStepsRequest.FromString(data).chunk.offset
    if offset < 2**63:  # longer numbers are left to it
        chunk = convert.frame_reader(never)(data)
        assert chunk.data.obj is data


def test_every_stream_has_its_chunks_in_the_same_place():
    """What the reader and the writer rely on."""
    service = pb.DESCRIPTOR.services_by_name["OptimizerService"]
    streamed = [m.input_type for m in service.methods if m.client_streaming]
    streamed += [m.output_type for m in service.methods if m.server_streaming]
    assert {kind.name for kind in streamed} == {kind.DESCRIPTOR.name for kind in KINDS}
    for kind in streamed:
        chunk = kind.fields_by_name["chunk"]
        assert (chunk.number, chunk.message_type) == (2, tensor_pb.Chunk.DESCRIPTOR)
        assert kind.oneofs_by_name["frame"].fields[1] == chunk
    assert [(f.number, f.name) for f in tensor_pb.Chunk.DESCRIPTOR.fields] == [(1, "offset"), (2, "data"), (3, "shard")]
