"""Sessions, what is asked of them, and the server as messages."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Final, TypeVar

from optwire_proto import aggregations, codecs, errors, limits, sessions, specs, trees
from optwire_proto.convert.served import served
from optwire_proto.convert.specs import (
    arguments_from_proto,
    arguments_to_proto,
    changes_from_proto,
    entry_from_proto,
    entry_to_proto,
    spec_from_proto,
    spec_to_proto,
)
from optwire_proto.convert.trees import tree_from_proto, tree_to_proto
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import tensor_pb2 as tensor_pb

_Choice = TypeVar("_Choice", bound=enum.StrEnum)

_MODES: Final = {
    aggregations.Mode.SINGLE: pb.Aggregation.MODE_SINGLE,
    aggregations.Mode.SYNC: pb.Aggregation.MODE_SYNC,
    aggregations.Mode.K_OF_N: pb.Aggregation.MODE_K_OF_N,
    aggregations.Mode.QUORUM: pb.Aggregation.MODE_QUORUM,
    aggregations.Mode.ASYNC: pb.Aggregation.MODE_ASYNC,
    aggregations.Mode.BOUNDED_STALENESS: pb.Aggregation.MODE_BOUNDED_STALENESS,
    aggregations.Mode.BUFFERED: pb.Aggregation.MODE_BUFFERED,
}
_POLICIES: Final = {
    aggregations.Policy.REJECT: pb.Aggregation.POLICY_REJECT,
    aggregations.Policy.WAIT: pb.Aggregation.POLICY_WAIT,
}
_DAMPINGS: Final = {
    aggregations.Damping.NONE: pb.Aggregation.DAMPING_UNSPECIFIED,
    aggregations.Damping.INVERSE: pb.Aggregation.DAMPING_INVERSE,
    aggregations.Damping.SQRT: pb.Aggregation.DAMPING_SQRT,
}
_COMBINES: Final = {
    aggregations.Combine.MEAN: pb.Aggregation.COMBINE_MEAN,
    aggregations.Combine.SUM: pb.Aggregation.COMBINE_SUM,
}
_STATES: Final = {
    sessions.WorkerState.LIVE: pb.Worker.STATE_LIVE,
    sessions.WorkerState.LOST: pb.Worker.STATE_LOST,
    sessions.WorkerState.LEFT: pb.Worker.STATE_LEFT,
    sessions.WorkerState.EXPECTED: pb.Worker.STATE_EXPECTED,
}


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
        aggregation=aggregation_to_proto(info.aggregation),
        grads_codec=codec_to_proto(codecs.parse(info.grads_codec).kind),
        params_codec=codec_to_proto(codecs.parse(info.params_codec).kind),
        top_k_fraction=codecs.fraction(codecs.parse(info.grads_codec), codecs.parse(info.params_codec)),
        payload_bytes=info.payload_bytes,
        state_bytes=info.state_bytes,
        created_s=info.created_s,
        failure=info.failure,
        seed=info.seed,
        spec_digest=info.spec_digest,
        changes=_newest(info.changes),
        turns=info.turns,
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
        seed=message.seed,
        spec_digest=message.spec_digest,
        changes=tuple(
            sessions.Change(change.from_step, arguments_from_proto(change.hyperparams)) for change in message.changes
        ),
        aggregation=aggregation_from_proto(message.aggregation),
        grads_codec=str(_codec(message.grads_codec, message.top_k_fraction, "Session.grads_codec") or codecs.RAW),
        params_codec=str(_codec(message.params_codec, message.top_k_fraction, "Session.params_codec") or codecs.RAW),
        turns=message.turns or 1,
    )


def aggregation_to_proto(aggregation: aggregations.Aggregation) -> pb.Aggregation:
    return pb.Aggregation(
        mode=_MODES[aggregation.mode],
        workers=aggregation.workers,
        k=aggregation.k,
        staleness_steps_max=aggregation.staleness_max,
        deadline_s=aggregation.deadline_s,
        policy=_POLICIES[aggregation.policy],
        damping=_DAMPINGS[aggregation.damping],
        combine=_COMBINES[aggregation.combine],
        lease_s=aggregation.lease_s,
        compensation=aggregation.compensation,
    )


def aggregation_from_proto(message: pb.Aggregation) -> aggregations.Aggregation:
    """How pushes become steps.

    Raises:
      UnsupportedError: a mode, or another choice, that this version does not serve.
      InvalidArgumentError: a value that the mode cannot have.
    """
    return aggregations.Aggregation(
        mode=_ours("Session.aggregation.mode", message.mode or pb.Aggregation.MODE_SINGLE, _MODES),
        workers=message.workers,
        k=message.k,
        staleness_max=message.staleness_steps_max if message.HasField("staleness_steps_max") else None,
        policy=_ours("Session.aggregation.policy", message.policy or pb.Aggregation.POLICY_REJECT, _POLICIES),
        damping=_ours("Session.aggregation.damping", message.damping, _DAMPINGS),
        combine=_ours("Session.aggregation.combine", message.combine or pb.Aggregation.COMBINE_MEAN, _COMBINES),
        deadline_s=message.deadline_s,
        lease_s=message.lease_s,
        compensation=message.compensation,
    )


def worker_to_proto(info: sessions.WorkerInfo) -> pb.Worker:
    return pb.Worker(
        worker=info.worker,
        epoch=info.epoch,
        state=_STATES[info.state],
        seq=info.seq,
        base_step=info.base_step,
        has_pushed=info.has_pushed,
        is_awaited=info.is_awaited,
        silent_s=info.silent_s,
    )


def worker_from_proto(message: pb.Worker) -> sessions.WorkerInfo:
    return sessions.WorkerInfo(
        worker=message.worker,
        epoch=message.epoch,
        state=_ours("Worker.state", message.state, _STATES),
        seq=message.seq,
        base_step=message.base_step,
        has_pushed=message.has_pushed,
        is_awaited=message.is_awaited,
        silent_s=message.silent_s,
    )


def _ours(where: str, number: int, choices: Mapping[_Choice, int]) -> _Choice:
    """Our name of a choice; raises UnsupportedError."""
    message, _, field = where.rpartition(".")
    served(message, field, number, choices.values())
    return next(ours for ours, theirs in choices.items() if theirs == number)


def _newest(changes: Sequence[sessions.Change]) -> list[pb.HyperparamChange]:
    """The newest changes that fit beside the rest of a message."""
    kept: list[pb.HyperparamChange] = []
    left = limits.CHANGES_BYTES_MAX
    for change in reversed(changes):
        message = _change_to_proto(change)
        left -= message.ByteSize()
        if left < 0:
            break
        kept.append(message)
    return kept[::-1]


def _change_to_proto(change: sessions.Change) -> pb.HyperparamChange:
    return pb.HyperparamChange(from_step=change.from_step, hyperparams=arguments_to_proto(change.values))


def optimizer_to_proto(info: sessions.OptimizerInfo) -> pb.DescribeOptimizerResponse:
    return pb.DescribeOptimizerResponse(
        text=info.text,
        spec_digest=info.spec_digest,
        granularity=info.granularity,
        groups=[
            pb.LeafGroup(
                leaves=group.leaves, group=group.group, passes=group.passes, knobs=arguments_to_proto(group.knobs)
            )
            for group in info.groups
        ],
        step=info.step,
        extras=info.extras,
        views=info.views,
    )


def optimizer_from_proto(message: pb.DescribeOptimizerResponse) -> sessions.OptimizerInfo:
    return sessions.OptimizerInfo(
        text=message.text,
        spec_digest=message.spec_digest,
        granularity=message.granularity,
        groups=tuple(
            sessions.LeafGroup(tuple(group.leaves), group.group, tuple(group.passes), arguments_from_proto(group.knobs))
            for group in message.groups
        ),
        step=message.step,
        extras=tuple(message.extras),
        views=tuple(message.views),
    )


def ref_to_proto(*, id: str = "", name: str = "") -> pb.SessionRef:
    return pb.SessionRef(id=id) if id else pb.SessionRef(name=name)


def ref_from_proto(message: pb.SessionRef) -> tuple[str, str]:
    """(id, name), one of them empty; raises InvalidArgumentError where neither is given."""
    kind = message.WhichOneof("ref")
    if kind is None:
        raise errors.InvalidArgumentError(
            "session: neither id nor name given", subject="session", expected="an id or a name", got="nothing"
        )
    if kind == "id":
        return sessions.check_id(message.id, "session id"), ""
    return "", sessions.check_name(message.name)


def check_begin(message: pb.CreateSessionBegin) -> None:
    """Raises UnsupportedError where a session asks for what this version does not serve."""
    for field, value, allowed in (
        ("durability", message.durability, (pb.DURABILITY_UNSPECIFIED, pb.DURABILITY_MEMORY)),
    ):
        served("CreateSession", field, value, allowed)


def terms_into(begin: pb.CreateSessionBegin, terms: sessions.Terms) -> None:
    """Writes what is asked for a session into the message that creates it."""
    if terms.aggregation is not None:
        begin.aggregation.CopyFrom(aggregation_to_proto(terms.aggregation))
    begin.turns = terms.turns or 0
    asked = [codec for codec in (terms.grads_codec, terms.params_codec) if codec is not None]
    if terms.grads_codec is not None:
        begin.grads_codec = codec_to_proto(terms.grads_codec.kind)
    if terms.params_codec is not None:
        begin.params_codec = codec_to_proto(terms.params_codec.kind)
    begin.top_k_fraction = codecs.fraction(*asked)


def terms_from_proto(message: pb.CreateSessionBegin) -> sessions.Terms:
    """What is asked for a session; raises InvalidArgumentError, UnsupportedError."""
    return sessions.Terms(
        aggregation=aggregation_from_proto(message.aggregation) if message.HasField("aggregation") else None,
        turns=message.turns or None,
        grads_codec=_codec(message.grads_codec, message.top_k_fraction, "CreateSession.grads_codec"),
        params_codec=_codec(message.params_codec, message.top_k_fraction, "CreateSession.params_codec"),
    )


def codec_to_proto(kind: codecs.Kind) -> tensor_pb.Codec.ValueType:
    return tensor_pb.Codec.ValueType(kind)


_CODECS: Final = (tensor_pb.CODEC_UNSPECIFIED, *codecs.Kind)


def codec_from_proto(number: int, where: str) -> codecs.Kind | None:
    """The kind of a codec; None where none is said. Raises UnsupportedError."""
    message, _, field = where.rpartition(".")
    served(message, field, number, _CODECS)
    return codecs.Kind(number) if number else None


def _codec(number: int, fraction: float, where: str) -> codecs.Codec | None:
    kind = codec_from_proto(number, where)
    return codecs.of(kind, fraction or codecs.TOP_K_FRACTION) if kind is not None else None


def extension_to_proto(extends: sessions.Extension) -> pb.Extension:
    return pb.Extension(session_id=extends.session_id, incarnation=extends.incarnation, step=extends.step)


def extension_from_proto(message: pb.CreateSessionBegin) -> sessions.Extension | None:
    """Which session is extended; None: none is. Raises InvalidArgumentError."""
    if not message.HasField("extends"):
        return None
    id_ = sessions.check_id(message.extends.session_id, "extends.session_id")
    return sessions.Extension(id_, message.extends.incarnation, message.extends.step)


def load_to_proto(key: sessions.LoadKey, tree: trees.TreeSpec) -> pb.LoadStateBegin:
    return pb.LoadStateBegin(
        session_id=key.session_id,
        incarnation=key.incarnation,
        tree=tree_to_proto(tree),
        step=key.step,
        load_key=key.load_key,
        base_step=key.base_step,
    )


def load_from_proto(message: pb.LoadStateBegin) -> tuple[sessions.LoadKey, trees.TreeSpec]:
    """The key, and the arrays by name.

    Raises:
      InvalidArgumentError: an id that is none.
      TreeError: as ``TreeSpec`` and its parts do.
    """
    key = sessions.LoadKey(
        session_id=sessions.check_id(message.session_id, "session id"),
        incarnation=message.incarnation,
        load_key=sessions.check_id(message.load_key, "load_key"),
        base_step=message.base_step if message.HasField("base_step") else None,
        step=message.step if message.HasField("step") else None,
    )
    return key, tree_from_proto(message.tree)


def check_read(message: pb.ReadParamsRequest) -> None:
    """Raises UnsupportedError where a reader asks for the parameters of another step."""
    served("ReadParams", "step", message.HasField("step"), (False,))


def hyperparams_from_proto(message: pb.UpdateHyperparamsRequest) -> dict[str, specs.Value]:
    """New values by path, or end of a path.

    Raises:
      InvalidArgumentError: none was given, one was given twice, or is neither a number nor a schedule.
    """
    return changes_from_proto(message.hyperparams)


def server_to_proto(info: sessions.ServerInfo) -> pb.GetServerInfoResponse:
    return pb.GetServerInfoResponse(
        version=info.version,
        library_versions=dict(info.library_versions),
        devices=[pb.Device(name=name, kind=kind) for name, kind in info.devices],
        limits=pb.Limits(**info.limits),
        catalogue=[entry_to_proto(entry) for entry in info.catalogue.values()],
        features=info.features,
        handover_path=info.handover_path,
    )


def server_from_proto(message: pb.GetServerInfoResponse) -> sessions.ServerInfo:
    return sessions.ServerInfo(
        version=message.version,
        library_versions=dict(message.library_versions),
        devices=tuple((device.name, device.kind) for device in message.devices),
        limits={field.name: getattr(message.limits, field.name) for field in message.limits.DESCRIPTOR.fields},
        catalogue={entry.name: entry_from_proto(entry) for entry in message.catalogue},
        features=tuple(message.features),
        handover_path=message.handover_path,
    )
