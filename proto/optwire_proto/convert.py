"""Plain data to protobuf messages and back: total one way, strict the other.

The only shared module that knows generated code. What a message names and this version does not serve is refused here
with UnsupportedError, never ignored.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import message as protobuf_message
from google.protobuf import unknown_fields

from optwire_proto import errors, limits, sessions, specs, tensors, trees
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import tensor_pb2 as tensor_pb

_DATA_TYPES = {name: getattr(tensor_pb, f"DATA_TYPE_{name.upper()}") for name in tensors.DTYPE_NAMES}
_DTYPE_NAMES = {number: name for name, number in _DATA_TYPES.items()}


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


# ------------------------------------------------------------------------------------------------------------ trees


def tree_to_proto(tree: trees.TreeSpec) -> tensor_pb.TreeSpec:
    return tensor_pb.TreeSpec(
        leaves=[
            tensor_pb.LeafSpec(name=leaf.name, shape=leaf.shape, data_type=_DATA_TYPES[leaf.dtype])
            for leaf in tree.leaves
        ],
        nodes=[
            tensor_pb.TreeNode(
                kind=tensor_pb.TreeNode.Kind.ValueType(node.kind),
                children=node.children,
                keys=[
                    tensor_pb.TreeKey(text=key) if isinstance(key, str) else tensor_pb.TreeKey(integer=key)
                    for key in node.keys
                ],
                type_name=node.type_name,
            )
            for node in tree.nodes
        ],
    )


def tree_from_proto(message: tensor_pb.TreeSpec) -> trees.TreeSpec:
    """Raises TreeError as ``TreeSpec`` and its parts do."""
    leaves = []
    for leaf in message.leaves:
        dtype = _DTYPE_NAMES.get(leaf.data_type)
        if dtype is None:
            raise errors.TreeError(
                f"leaf {leaf.name[:80]!r}: unknown element type number {leaf.data_type}", subject=leaf.name[:80]
            )
        leaves.append(trees.LeafSpec(leaf.name, tuple(leaf.shape), dtype))
    nodes = []
    for node in message.nodes:
        nodes.append(trees.Node(_kind(node.kind), node.children, tuple(map(_key, node.keys)), node.type_name))
    return trees.TreeSpec(tuple(leaves), tuple(nodes))


def _key(message: tensor_pb.TreeKey) -> trees.Key:
    which = message.WhichOneof("key")
    if which is None:
        raise errors.TreeError("a key of the nest without a value", got="nothing")
    return message.text if which == "text" else message.integer


def _kind(number: int) -> trees.Kind:
    try:
        return trees.Kind(number)
    except ValueError as exc:
        raise errors.TreeError(f"unknown kind of node, number {number}", got=str(number)) from exc


# ------------------------------------------------------------------------------------------------------------ specs


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


# --------------------------------------------------------------------------------------------------------- sessions


def session_to_proto(info: sessions.SessionInfo) -> pb.Session:
    return pb.Session(
        id=info.id,
        name=info.name,
        incarnation=info.incarnation,
        step=info.step,
        durable_step=info.durable_step,
        tree=tree_to_proto(info.tree) if info.tree else None,
        spec=spec_to_proto(info.spec),
        learning_rate=info.learning_rate,
        learning_rate_scheduled=info.learning_rate_scheduled,
        durability=pb.Durability.ValueType(info.durability),
        aggregation=pb.Aggregation(mode=pb.Aggregation.MODE_SINGLE),
        grads_codec=tensor_pb.CODEC_RAW,
        params_codec=tensor_pb.CODEC_RAW,
        payload_bytes=info.payload_bytes,
        state_bytes=info.state_bytes,
        created_s=info.created_s,
        failure=info.failure,
    )


def session_from_proto(message: pb.Session) -> sessions.SessionInfo:
    return sessions.SessionInfo(
        id=message.id,
        name=message.name,
        incarnation=message.incarnation,
        step=message.step,
        durable_step=message.durable_step,
        tree=tree_from_proto(message.tree) if message.HasField("tree") else None,
        spec=spec_from_proto(message.spec),
        learning_rate=message.learning_rate,
        learning_rate_scheduled=message.learning_rate_scheduled,
        durability=sessions.Durability(message.durability or pb.DURABILITY_MEMORY),
        payload_bytes=message.payload_bytes,
        state_bytes=message.state_bytes,
        created_s=message.created_s,
        failure=message.failure,
    )


def ref_to_proto(*, id: str = "", name: str = "") -> pb.SessionRef:
    return pb.SessionRef(id=id) if id else pb.SessionRef(name=name)


def ref_from_proto(message: pb.SessionRef) -> tuple[str, str]:
    """(id, name), one of them empty; raises InvalidArgumentError where neither is given."""
    kind = message.WhichOneof("ref")
    if kind is None:
        raise errors.InvalidArgumentError("session: neither id nor name given", subject="session", got="nothing")
    if kind == "id":
        return sessions.check_id(message.id, "session id"), ""
    return "", sessions.check_name(message.name)


def check_begin(message: pb.CreateSessionBegin) -> None:
    """Raises UnsupportedError where a session asks for what this version does not serve."""
    for field, value, served in (
        ("durability", message.durability, (pb.DURABILITY_UNSPECIFIED, pb.DURABILITY_MEMORY)),
        (
            "aggregation.mode",
            message.aggregation.mode,
            (pb.Aggregation.MODE_UNSPECIFIED, pb.Aggregation.MODE_SINGLE),
        ),
        ("aggregation.workers", message.aggregation.workers, (0,)),
        ("aggregation.k", message.aggregation.k, (0,)),
        ("aggregation.staleness_steps_max", message.aggregation.staleness_steps_max, (0,)),
        ("aggregation.deadline_s", message.aggregation.deadline_s, (0,)),
        ("grads_codec", message.grads_codec, (tensor_pb.CODEC_UNSPECIFIED, tensor_pb.CODEC_RAW)),
        ("params_codec", message.params_codec, (tensor_pb.CODEC_UNSPECIFIED, tensor_pb.CODEC_RAW)),
        ("seed", message.seed, (0,)),
    ):
        _served("CreateSession", field, value, served)


def check_read(message: pb.ReadParamsRequest) -> None:
    """Raises UnsupportedError where a reader asks for other parameters than the newest."""
    _served("ReadParams", "which", message.which, ("",))
    _served("ReadParams", "step", message.HasField("step"), (False,))


def learning_rate_from_proto(message: pb.UpdateHyperparamsRequest) -> float:
    """The one hyperparameter that this version changes.

    Raises:
      InvalidArgumentError: none was given, or not a number.
      UnsupportedError: another was given.
    """
    for argument in message.hyperparams:
        _served("UpdateHyperparams", "hyperparams", argument.name, ("learning_rate",))
    values = [value_from_proto(argument.value, argument.name) for argument in message.hyperparams]
    if len(values) != 1 or isinstance(values[0], bool) or not isinstance(values[0], int | float):
        got = ", ".join(str(value) for value in values) or "nothing"
        raise errors.InvalidArgumentError(
            f"hyperparams: learning_rate={got}, expected one number", subject="learning_rate", got=got
        )
    return float(values[0])


# ----------------------------------------------------------------------------------------------------------- pushes


def push_to_proto(key: sessions.PushKey) -> pb.PushBegin:
    return pb.PushBegin(
        key=pb.PushKey(
            session_id=key.session_id,
            incarnation=key.incarnation,
            worker=key.worker,
            seq=key.seq,
            base_step=key.base_step,
        )
    )


def push_from_proto(message: pb.PushBegin) -> tuple[sessions.PushKey, bool]:
    """The key, and whether the reply carries parameters.

    Raises:
      InvalidArgumentError: an id that is none, a seq of 0.
      UnsupportedError: a capability that this version does not serve.
    """
    for field, value, served in (
        ("codec", message.codec, (tensor_pb.CODEC_UNSPECIFIED, tensor_pb.CODEC_RAW)),
        ("weight", message.weight, (0.0, 1.0)),
        ("grad_scale", message.grad_scale, (0.0, 1.0)),
        ("hyperparams", len(message.hyperparams), (0,)),
        ("extras", len(message.extras), (0,)),
        ("absent_leaves", len(message.absent_leaves), (0,)),
        ("shared_memory_slot", message.shared_memory_slot, (0,)),
        (
            "reply",
            message.reply,
            (pb.REPLY_CONTENT_UNSPECIFIED, pb.REPLY_CONTENT_PARAMS, pb.REPLY_CONTENT_NONE),
        ),
        ("key.worker_epoch", message.key.worker_epoch, (0,)),
    ):
        _served("push", field, value, served)
    key = message.key
    if key.seq == 0:
        raise errors.InvalidArgumentError("push.key.seq: 0, expected 1 or more", subject="seq", got="0")
    return sessions.PushKey(
        session_id=sessions.check_id(key.session_id, "push.key.session_id"),
        incarnation=key.incarnation,
        worker=sessions.check_id(key.worker, "push.key.worker"),
        seq=key.seq,
        base_step=key.base_step,
    ), message.reply != pb.REPLY_CONTENT_NONE


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
    )


def chunk_into(frame: Any, offset: int, data: bytes) -> Any:
    """Makes a frame a chunk. In place: a chunk handed to the frame's constructor would be copied once more."""
    frame.chunk.offset = offset
    frame.chunk.data = data
    return frame


def digest_to_proto(digest: sessions.Digest) -> tensor_pb.PayloadDigest:
    return tensor_pb.PayloadDigest(
        length=digest.length, rows_crc32=digest.rows_crc32, columns_crc32=digest.columns_crc32
    )


def digest_from_proto(message: tensor_pb.PayloadDigest) -> sessions.Digest:
    """The digest of an upload; raises PayloadError where a part of it is missing."""
    _served("digest", "sha256", message.sha256, (b"",))
    for part in ("rows_crc32", "columns_crc32"):
        if not message.HasField(part):
            raise errors.PayloadError(f"digest without {part}", subject="digest", got="nothing")
    return sessions.Digest(message.length, message.rows_crc32, message.columns_crc32)


def end_from_proto(message: pb.PayloadEnd) -> sessions.Digest:
    if not message.HasField("digest"):
        raise errors.PayloadError("end of the payload without a digest", subject="digest", got="nothing")
    return digest_from_proto(message.digest)


# ----------------------------------------------------------------------------------------------------------- server


def server_to_proto(info: sessions.ServerInfo) -> pb.GetServerInfoResponse:
    return pb.GetServerInfoResponse(
        version=info.version,
        library_versions=dict(info.library_versions),
        devices=[pb.Device(name=name, kind=kind) for name, kind in info.devices],
        limits=pb.Limits(**info.limits),
        catalogue=[entry_to_proto(entry) for entry in info.catalogue.values()],
        features=info.features,
    )


def server_from_proto(message: pb.GetServerInfoResponse) -> sessions.ServerInfo:
    return sessions.ServerInfo(
        version=message.version,
        library_versions=dict(message.library_versions),
        devices=tuple((device.name, device.kind) for device in message.devices),
        limits={field.name: getattr(message.limits, field.name) for field in message.limits.DESCRIPTOR.fields},
        catalogue={entry.name: entry_from_proto(entry) for entry in message.catalogue},
        features=tuple(message.features),
    )


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


def _served(where: str, field: str, value: Any, served: tuple[Any, ...]) -> None:
    if value not in served:
        raise errors.UnsupportedError(
            f"{where}.{field}: {value} is not served by this version", subject=f"{where}.{field}", got=str(value)
        )
