"""What both ends say about a session and its pushes, as plain data. Standard library only."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Mapping
from typing import Final

from optwire_proto import aggregations, codecs, entries, errors, limits, specs, trees

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_ID = re.compile(r"[0-9a-f]{32}")


class Durability(enum.IntEnum):
    """What an acknowledged step survives; the values are the protocol's."""

    MEMORY = 1
    SNAPSHOT = 2
    LOG = 3
    LOG_SYNC = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is asked for a session beside its tree and its optimizer. None: as in the session that it extends.

    Attributes:
      aggregation: how pushes become steps; otherwise SINGLE.
      turns: what it gets on the device for each one of a session with 1, when several wait for it; otherwise 1.
      grads_codec: how gradients travel; otherwise RAW.
      params_codec: how parameters travel in the replies to pushes; otherwise RAW.

    Raises:
      InvalidArgumentError: ``turns`` is no whole number from 1 to 64; two codecs with different fractions.
    """

    aggregation: aggregations.Aggregation | None = None
    turns: int | None = None
    grads_codec: codecs.Codec | None = None
    params_codec: codecs.Codec | None = None

    def __post_init__(self) -> None:
        codecs.fraction(*(codec for codec in (self.grads_codec, self.params_codec) if codec is not None))
        turns = self.turns
        if turns is not None and (type(turns) is not int or not 1 <= turns <= limits.TURNS_MAX):
            expected, got = f"a whole number from 1 to {limits.TURNS_MAX}", repr(turns)[:80]
            raise errors.InvalidArgumentError(
                f"turns: {got}, expected {expected}", subject="turns", expected=expected, got=got
            )

    def after(self, old: Terms) -> Terms:
        """With what another one has, where nothing is asked for."""
        return Terms(
            aggregation=self.aggregation or old.aggregation,
            turns=self.turns or old.turns,
            grads_codec=self.grads_codec or old.grads_codec,
            params_codec=self.params_codec or old.params_codec,
        )

    def fits(self, other: Terms) -> bool:
        """Whether another one has all that is asked for."""
        return self.after(other) == other


# What a session has that asks for nothing.
USUAL: Final = Terms(aggregation=aggregations.SINGLE, turns=1, grads_codec=codecs.RAW, params_codec=codecs.RAW)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo:
    """What a session is and where it stands.

    Attributes:
      id: 32 hexadecimal digits, made by the server.
      name: as chosen at creation.
      incarnation: grows when the session's history is rewritten; starts at 1.
      step: number of updates applied.
      durable_step: number of updates that survive as ``durability`` says.
      tree: leaves and nest; None in listings.
      spec: the optimizer, every argument filled in.
      learning_rate: what the next step will use.
      learning_rate_scheduled: whether that comes from the spec's schedule.
      durability: what an acknowledged step survives.
      payload_bytes: length of one payload.
      state_bytes: size of the parameters and slots held.
      created_s: seconds since the Unix epoch, by the server's clock.
      failure: why no further step is accepted; empty while the session is healthy.
      seed: of the session's randomness.
      spec_digest: SHA-256 of the spec's canonical text.
      changes: of hyperparameters, in effect or to come, in the order in which they were made.
      aggregation: how pushes become steps.
      turns: what it gets on the device for each one of a session with 1, when several wait for it.
      grads_codec: how gradients travel, as ``Client.create_session`` takes it.
      params_codec: how parameters travel in the replies to pushes.
      transport: how the pushes of the handle that was asked travel; empty where no handle was.
      transport_reason: why they travel so.
    """

    id: str
    name: str
    incarnation: int
    step: int
    durable_step: int
    tree: trees.TreeSpec | None
    spec: specs.Spec
    learning_rate: float
    learning_rate_scheduled: bool
    durability: Durability
    payload_bytes: int
    state_bytes: int
    created_s: float
    failure: str = ""
    seed: int = 0
    spec_digest: str = ""
    changes: tuple[Change, ...] = ()
    aggregation: aggregations.Aggregation = aggregations.SINGLE
    turns: int = 1
    grads_codec: str = "f32"
    params_codec: str = "f32"
    transport: str = ""
    transport_reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """Hyperparameters that were changed while the session ran.

    Attributes:
      from_step: first step (0-based) that uses the new values.
      values: (whole path inside the spec, new value) pairs.
    """

    from_step: int
    values: tuple[tuple[str, specs.Value], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Extension:
    """Which session a new one takes the place of, as the client knows it.

    Attributes:
      session_id: 32 hexadecimal digits.
      incarnation: of the session.
      step: number of updates it has applied.
    """

    session_id: str
    incarnation: int
    step: int


@dataclasses.dataclass(frozen=True, slots=True)
class LeafGroup:
    """Leaves that an optimizer treats alike.

    Attributes:
      leaves: positions in the session's tree.
      group: patterns of the partitions that chose them, joined by " > "; empty where nothing is partitioned.
      passes: names of the transformations that they pass, in order.
      knobs: every argument that bears on them, by its whole path, with its value in effect.
    """

    leaves: tuple[int, ...]
    group: str
    passes: tuple[str, ...]
    knobs: tuple[tuple[str, specs.Value], ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerInfo:
    """A session's optimizer, as the next step will run it.

    Attributes:
      text: canonical text of the spec, every argument filled in.
      spec_digest: SHA-256 of that text.
      granularity: how finely the state may be cut: "element", "tensor" or "tree".
      groups: every leaf is in exactly one.
      step: what the values are of.
      extras: what every push must bring along, such as "loss".
      views: what ``params(which=...)`` can read beside the parameters, such as "ema".
    """

    text: str
    spec_digest: str
    granularity: str
    groups: tuple[LeafGroup, ...]
    step: int
    extras: tuple[str, ...] = ()
    views: tuple[str, ...] = ()


class WorkerState(enum.StrEnum):
    """Where a worker stands.

    LIVE: heard of within its lease, or without one. LOST: its lease is over, and nobody waits for it until it is heard
    of again. LEFT: it has left. EXPECTED: its rank was never heard of.
    """

    LIVE = "live"
    LOST = "lost"
    LEFT = "left"
    EXPECTED = "expected"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """One worker of a session, as the server knows it.

    Attributes:
      worker: its id, 32 hexadecimal digits.
      epoch: how often a process has joined as this worker; 0: none has.
      state: where it stands.
      seq: its last applied push; 0: none.
      base_step: of the newest parameters that it has, as far as the server knows.
      has_pushed: whether a push of it is gathered for the step to come.
      is_awaited: whether the step to come waits for it.
      silent_s: seconds since it was heard of; 0: never, or now.
    """

    worker: str
    epoch: int
    state: WorkerState
    seq: int
    base_step: int
    has_pushed: bool
    is_awaited: bool
    silent_s: float


class ReplyContent(enum.StrEnum):
    """What a reply carries beside the ack; PRESENT: new parameters of the leaves that the push has gradients for."""

    PARAMS = "params"
    UPDATES = "updates"
    NONE = "none"
    PRESENT = "present"

    @property
    def brings_params(self) -> bool:
        """Whether it carries parameters, of all leaves or of some."""
        return self in (ReplyContent.PARAMS, ReplyContent.PRESENT)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """What a push says beside its gradients.

    Attributes:
      grad_scale: what the gradients were multiplied by; the update divides by it.
      extras: (name, number) pairs that the optimizer needs, such as the loss.
      hyperparams: (name, new value) pairs, as a change of hyperparameters has them, that take effect with this push.
      absent: positions of the leaves that have no gradient, ascending; the payload leaves them out.
      telemetry: whether the ack carries metrics.
      reply: what the reply carries.
      codec: how the payload is encoded; None: as the session says.
      view_step: of the parameters that the client has, where the next ones may come as what has changed since.
      weight: what the gradients count among those of their step, such as the number of samples behind them.
      rows: (position, number of rows) of the leaves whose gradients come by rows, ascending; ``rows`` says how.
      rows_exact: whether their other rows are updated, too, as by gradients of zero.
    """

    grad_scale: float = 1.0
    extras: tuple[tuple[str, float], ...] = ()
    hyperparams: tuple[tuple[str, specs.Value], ...] = ()
    absent: tuple[int, ...] = ()
    telemetry: bool = False
    reply: ReplyContent = ReplyContent.PARAMS
    codec: codecs.Kind | None = None
    view_step: int | None = None
    weight: float = 1.0
    rows: tuple[tuple[int, int], ...] = ()
    rows_exact: bool = False

    @property
    def meaning(self) -> Mapping[str, object]:
        """What makes a difference to the update, by name: a retry must repeat it."""
        return {
            "grad_scale": self.grad_scale,
            "loss": self.extras,
            "hyperparams": self.hyperparams,
            "absent leaves": self.absent,
            "weight": self.weight,
            "leaves by rows": (tuple(leaf for leaf, _ in self.rows), self.rows_exact),
            "numbers of rows": self.rows,
        }


# A push that says nothing beside its gradients.
PLAIN: Final = PushOptions()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PushKey:
    """The idempotency key of a push, and the step it applies to.

    Attributes:
      session_id: 32 hexadecimal digits.
      incarnation: the one that the client knows.
      worker: who pushes.
      seq: the worker's own counter of applied pushes, from 1.
      base_step: of the parameters that the gradients were computed on.
      epoch: the worker's, as joining gave it; 0: it has not joined. A retry may be of a later one.
    """

    session_id: str
    incarnation: int
    worker: str
    seq: int
    base_step: int
    epoch: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadKey:
    """The idempotency key of a load, what it applies to, and where the session goes on.

    Attributes:
      session_id: 32 hexadecimal digits.
      incarnation: the one that the client knows.
      load_key: 32 hexadecimal digits made by the client; a retry repeats them.
      base_step: number of updates that the session must have applied; None: any.
      step: number of updates that it counts afterwards; None: as many as before.
    """

    session_id: str
    incarnation: int
    load_key: str
    base_step: int | None = None
    step: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Digest:
    """What a payload's bytes were; ``digests`` says how it is taken.

    Attributes:
      length: in bytes.
      rows_crc32: of the row sums.
      columns_crc32: of the column sums.
      token: what stands for the sums where the payload lies in shared memory: random bytes, made for one payload.
    """

    length: int
    rows_crc32: int = 0
    columns_crc32: int = 0
    token: bytes = b""

    def __str__(self) -> str:
        if self.token:
            return f"{self.length} bytes in shared memory, token {self.token.hex()}"
        return f"{self.length} bytes, digest {self.rows_crc32:08x}{self.columns_crc32:08x}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """The outcome of a push.

    Attributes:
      step: number of updates applied; the parameters of the reply are of this step.
      applied_step: the step that this push became.
      durable_step: number of updates that survive as the session's durability says.
      incarnation: the session's.
      seq: the push's.
      duplicate: whether this answers a retry of a push that had been applied.
      learning_rate: what the applied update used.
      payload_bytes: length of the parameters that follow.
      metrics: figures of the update by name, where the push asked for telemetry; docs/specs.md lists them.
      changes: how often hyperparameters of the session were changed, in all.
      params_codec: how the parameters that follow are encoded; RAW: they are whole.
    """

    step: int
    applied_step: int
    durable_step: int
    incarnation: int
    seq: int
    duplicate: bool
    learning_rate: float
    payload_bytes: int
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    changes: int = 0
    params_codec: codecs.Kind = codecs.Kind.RAW


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server is.

    Attributes:
      version: of the server's package.
      library_versions: of what it computes with.
      devices: (name, kind) of each accelerator.
      limits: limit name to value, in the unit the name ends with.
      catalogue: the constructors served, by name.
      features: optional capabilities served.
      handover_path: of the Unix socket on which it hands over shared memory; empty: it shares none.
    """

    version: str
    library_versions: Mapping[str, str]
    devices: tuple[tuple[str, str], ...]
    limits: Mapping[str, int]
    catalogue: Mapping[str, entries.Entry]
    features: tuple[str, ...]
    handover_path: str = ""


def worker_id(rank: int) -> str:
    """The id of the worker of a rank, from 0."""
    return f"{rank:032x}"


def check_name(name: str) -> str:
    """Returns a session name that is allowed.

    Raises:
      InvalidArgumentError: it is not 1 to 128 characters of A-Z a-z 0-9 . _ - or starts with a dot.
    """
    if not isinstance(name, str):
        raise errors.InvalidArgumentError(
            f"session name: {type(name).__name__}, expected text",
            subject="name",
            expected="text",
            got=type(name).__name__,
        )
    if len(name) > limits.SESSION_NAME_CHARS_MAX or not _NAME.fullmatch(name):
        expected = f"1 to {limits.SESSION_NAME_CHARS_MAX} characters of A-Z a-z 0-9 . _ -, not starting with a dot"
        raise errors.InvalidArgumentError(
            f"session name {name[:80]!r}: expected {expected}", subject="name", expected=expected, got=name[:80]
        )
    return name


def check_id(value: object, what: str) -> str:
    """Returns an id that is 32 lower-case hexadecimal digits.

    Raises:
      InvalidArgumentError: it is not.
    """
    if not isinstance(value, str) or not _ID.fullmatch(value):
        got = repr(value[:80] if isinstance(value, str) else value)[:82]
        expected = "32 lower-case hexadecimal digits"
        raise errors.InvalidArgumentError(
            f"{what} {got}: expected {expected}", subject=what, expected=expected, got=got
        )
    return value
