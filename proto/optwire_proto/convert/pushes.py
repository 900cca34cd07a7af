"""Pushes, their chunks, digests and acknowledgements as messages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Final

from optwire_proto import codecs, errors, limits, rows, sessions, specs
from optwire_proto.convert.served import served
from optwire_proto.convert.sessions import codec_from_proto, codec_to_proto
from optwire_proto.convert.specs import changes_from_proto, value_from_proto, value_to_proto
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import tensor_pb2 as tensor_pb

_Reply = sessions.ReplyContent
_REPLIES: Final = {
    _Reply.PARAMS: pb.REPLY_CONTENT_PARAMS,
    _Reply.UPDATES: pb.REPLY_CONTENT_UPDATES,
    _Reply.NONE: pb.REPLY_CONTENT_NONE,
    _Reply.PRESENT: pb.REPLY_CONTENT_PRESENT,
}
_REPLIES_OF: Final = {pb.REPLY_CONTENT_UNSPECIFIED: _Reply.PARAMS} | {number: ours for ours, number in _REPLIES.items()}


def push_to_proto(key: sessions.PushKey, options: sessions.PushOptions = sessions.PLAIN) -> pb.PushBegin:
    return pb.PushBegin(
        key=pb.PushKey(
            session_id=key.session_id,
            incarnation=key.incarnation,
            worker=key.worker,
            seq=key.seq,
            base_step=key.base_step,
            worker_epoch=key.epoch,
        ),
        weight=0.0 if options.weight == 1.0 else options.weight,
        grad_scale=0.0 if options.grad_scale == 1.0 else options.grad_scale,
        extras=[pb.Argument(name=name, value=pb.Value(number=value)) for name, value in options.extras],
        hyperparams=[pb.Argument(name=name, value=value_to_proto(value)) for name, value in options.hyperparams],
        absent_leaves=options.absent,
        telemetry=options.telemetry,
        reply=_REPLIES[options.reply],
        codec=tensor_pb.CODEC_UNSPECIFIED if options.codec is None else codec_to_proto(options.codec),
        view_step=options.view_step,
        rows=[pb.LeafRows(leaf=leaf, count=count) for leaf, count in options.rows],
        rows_exact=options.rows_exact,
    )


def slot_into(message: pb.PushBegin, slot: int) -> pb.PushBegin:
    """Says that a push's payload lies in the segment of a slot; changes and returns ``message``."""
    message.shared_memory_slot = slot
    return message


def slot_from_proto(message: pb.PushBegin) -> int:
    """The slot of the segment that a push's payload lies in; 0: chunks follow."""
    return message.shared_memory_slot


def push_from_proto(message: pb.PushBegin) -> tuple[sessions.PushKey, sessions.PushOptions]:
    """The key, and what the push says beside its gradients.

    Raises:
      InvalidArgumentError: an id that is none, a seq of 0, a weight, scale or extra that cannot be.
      UnsupportedError: a capability that this version does not serve.
    """
    key = message.key
    served("push", "reply", message.reply, _REPLIES_OF)
    if key.seq == 0:
        raise errors.InvalidArgumentError("push.key.seq: 0, expected 1 or more", subject="seq", got="0")
    return sessions.PushKey(
        session_id=sessions.check_id(key.session_id, "push.key.session_id"),
        incarnation=key.incarnation,
        worker=sessions.check_id(key.worker, "push.key.worker"),
        seq=key.seq,
        base_step=key.base_step,
        epoch=key.worker_epoch,
    ), _options(message)


def _options(message: pb.PushBegin) -> sessions.PushOptions:
    extras: dict[str, float] = {}
    for argument in message.extras:
        value = value_from_proto(argument.value, f"push.extras.{argument.name[:80]}")
        if argument.name in extras or not specs.is_number(value):
            got = "given twice" if argument.name in extras else specs.shown(value)
            raise errors.InvalidArgumentError(
                f"push.extras.{argument.name[:80]}: {got}, expected one finite number",
                subject=argument.name[:80],
                expected="one finite number",
                got=got,
            )
        extras[argument.name] = float(value)
    return sessions.PushOptions(
        grad_scale=_positive("grad_scale", message.grad_scale or 1.0),
        extras=tuple(sorted(extras.items())) if extras else (),
        hyperparams=tuple(sorted(changes_from_proto(message.hyperparams).items())) if message.hyperparams else (),
        absent=_absent(message.absent_leaves) if message.absent_leaves else (),
        telemetry=message.telemetry,
        reply=_REPLIES_OF[message.reply],
        codec=codec_from_proto(message.codec, "push.codec"),
        view_step=message.view_step if message.HasField("view_step") else None,
        weight=_weight(message.weight or 1.0),
        rows=_rows(message),
        rows_exact=message.rows_exact,
    )


def _positive(name: str, value: float) -> float:
    expected = "a positive finite number that is normal in 32 bits"
    if not limits.GRAD_SCALE_MIN <= value <= limits.SPEC_NUMBER_MAX:  # NaN is neither
        raise errors.InvalidArgumentError(
            f"push.{name}: {value}, expected {expected}", subject=name, expected=expected, got=str(value)
        )
    return value


def _weight(value: float) -> float:
    expected = f"{limits.WEIGHT_MIN:g} to {limits.WEIGHT_MAX:g}"
    if not limits.WEIGHT_MIN <= value <= limits.WEIGHT_MAX:
        raise errors.InvalidArgumentError(
            f"push.weight: {value}, expected {expected}", subject="weight", expected=expected, got=str(value)
        )
    return value


def _rows(message: pb.PushBegin) -> rows.Counts:
    counts = tuple((leaf.leaf, leaf.count) for leaf in message.rows)
    if counts:
        _ascending("rows", [leaf for leaf, _ in counts])
    elif message.rows_exact:
        raise errors.InvalidArgumentError(
            "push.rows_exact: true without rows, expected rows",
            subject="rows_exact",
            expected="rows, or false",
            got="true",
        )
    return counts


def _absent(positions: Sequence[int]) -> tuple[int, ...]:
    return _ascending("absent_leaves", positions)


def _ascending(name: str, positions: Sequence[int]) -> tuple[int, ...]:
    found = tuple(positions)
    if any(after <= before for before, after in itertools.pairwise(found)):
        raise errors.InvalidArgumentError(
            f"push.{name}: not ascending, expected each position once, in order",
            subject=name,
            expected="ascending positions",
            got=str(found)[:200],
        )
    return found


def wanted_to_proto(wanted: rows.Wanted) -> list[pb.LeafIndices]:
    return [pb.LeafIndices(leaf=leaf, indices=data or b"", whole=data is None) for leaf, data in wanted]


def wanted_from_proto(message: pb.ReadParamsRequest) -> rows.Wanted:
    """The rows to be read; raises InvalidArgumentError where a whole leaf has indices."""
    for found in message.rows:
        if found.whole and found.indices:
            raise errors.InvalidArgumentError(
                f"ReadParams.rows: {len(found.indices)} bytes of indices of leaf {found.leaf}, which is read whole",
                subject="rows",
                expected="either indices or whole",
                got="both",
            )
    return tuple((found.leaf, None if found.whole else found.indices) for found in message.rows)


def stage_to_proto(session_id: str, incarnation: int) -> pb.PushStage:
    return pb.PushStage(session_id=session_id, incarnation=incarnation)


def stage_from_proto(message: pb.PushStage) -> tuple[str, int]:
    """The session that is going to be pushed to, and its incarnation; raises InvalidArgumentError."""
    return sessions.check_id(message.session_id, "stage.session_id"), message.incarnation


def ack_to_proto(ack: sessions.Ack) -> pb.PushAck:
    return pb.PushAck(
        step=ack.step,
        applied_step=ack.applied_step,
        durable_step=ack.durable_step,
        incarnation=ack.incarnation,
        seq=ack.seq,
        duplicate=ack.duplicate,
        learning_rate=ack.learning_rate,
        payload_bytes=ack.payload_bytes,
        metrics=ack.metrics,
        changes=ack.changes,
        params_codec=codec_to_proto(ack.params_codec),
    )


def ack_from_proto(message: pb.PushAck) -> sessions.Ack:
    return sessions.Ack(
        step=message.step,
        applied_step=message.applied_step,
        durable_step=message.durable_step,
        incarnation=message.incarnation,
        seq=message.seq,
        duplicate=message.duplicate,
        learning_rate=message.learning_rate,
        payload_bytes=message.payload_bytes,
        metrics=dict(message.metrics),
        changes=message.changes,
        params_codec=codec_from_proto(message.params_codec, "PushAck.params_codec") or codecs.Kind.RAW,
    )


def chunk_into(frame: Any, offset: int, data: bytes) -> Any:
    """Makes a frame a chunk. In place: a chunk handed to the frame's constructor would be copied once more."""
    frame.chunk.offset = offset
    frame.chunk.data = data
    return frame


def digest_to_proto(digest: sessions.Digest) -> tensor_pb.PayloadDigest:
    if digest.token:
        return tensor_pb.PayloadDigest(length=digest.length, token=digest.token)
    return tensor_pb.PayloadDigest(
        length=digest.length, rows_crc32=digest.rows_crc32, columns_crc32=digest.columns_crc32
    )


def digest_from_proto(message: tensor_pb.PayloadDigest) -> sessions.Digest:
    """The digest of an upload; raises PayloadError where a part of it is missing."""
    served("digest", "sha256", message.sha256, (b"",))
    if message.token:
        return sessions.Digest(message.length, token=_token(message))
    for part in ("rows_crc32", "columns_crc32"):
        if not message.HasField(part):
            raise errors.PayloadError(f"digest without {part}", subject="digest", expected=part, got="nothing")
    return sessions.Digest(message.length, message.rows_crc32, message.columns_crc32)


def _token(message: tensor_pb.PayloadDigest) -> bytes:
    """A token, which must stand alone."""
    token = message.token
    if len(token) != limits.TOKEN_BYTES or message.HasField("rows_crc32") or message.HasField("columns_crc32"):
        expected = f"{limits.TOKEN_BYTES} bytes and no checksums beside them"
        raise errors.PayloadError(
            f"digest.token: {len(token)} bytes, expected {expected}",
            subject="digest.token",
            expected=expected,
            got=f"{len(token)} bytes",
        )
    return token


def end_from_proto(message: pb.PayloadEnd) -> sessions.Digest:
    if not message.HasField("digest"):
        raise errors.PayloadError(
            "end of the payload without a digest", subject="digest", expected="a digest", got="nothing"
        )
    return digest_from_proto(message.digest)
