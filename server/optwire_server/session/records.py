"""What the machine knows of a session and its workers, as plain data."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping

from optwire_proto import aggregations, sessions
from optwire_server.session import effects, events


class Phase(enum.Enum):
    """Where a session is in its life."""

    OPEN = "open"
    APPLYING = "applying"
    FAILED = "failed"
    DELETED = "deleted"


@dataclasses.dataclass(frozen=True, slots=True)
class Applied:
    """A worker's last applied push; its step is the one that it is part of. ``epoch`` is the worker's of that time."""

    seq: int
    digest: sessions.Digest
    step: int
    learning_rate: float
    options: sessions.PushOptions = sessions.PLAIN
    metrics: tuple[tuple[str, float], ...] = ()
    epoch: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A worker that has joined, or has pushed without.

    Attributes:
      state: where it stands: LIVE, LOST or LEFT.
      epoch: greater with each process that joins as this worker; 0: none has, and it has no lease.
      join_key: of the process that joined last.
      base_step: of the newest parameters that it has.
      heard_s: when it was heard of last.
    """

    state: sessions.WorkerState = sessions.WorkerState.LIVE
    epoch: int = 0
    join_key: str = ""
    base_step: int = 0
    heard_s: float = 0.0

    @property
    def is_live(self) -> bool:
        """Whether a step may wait for it."""
        return self.state is sessions.WorkerState.LIVE

    def lost_s(self, lease_s: float) -> float:
        """When it is lost unless it is heard of before; infinite: never."""
        return self.heard_s + lease_s if self.epoch and self.is_live and lease_s else math.inf


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """All that the rules depend on.

    Attributes:
      id: 32 hexadecimal digits.
      name: for messages.
      incarnation: grows when history is rewritten.
      loaded: the load that began this incarnation; None where none did.
      step: number of updates applied.
      phase: where the session is in its life.
      skipped: how many of those left the parameters alone, since gradients were not finite.
      changes: of hyperparameters, in the order in which they were made; the newest of them.
      changed: how many there were in all.
      workers: each worker's last applied push, the longest quiet first.
      forgotten_step: the newest step of those that are not known any more, since there were too many.
      aggregation: how pushes become steps.
      members: workers that have joined or pushed, the longest quiet first.
      forgotten_epoch: the highest of workers that are not known any more.
      gathered: the pushes that wait, for others of their step or for slow workers, by worker, in the order of arrival.
      opened_s: when the first of them came, of the open step.
      buffered: the pushes whose gradients are in the sum, in the order in which they were added.
      pending: the push just made that is being applied or added, in phase APPLYING only.
      taken: the workers whose gathered pushes are being applied, with it or without, in phase APPLYING only.
      failure: what happened, in phase FAILED.
    """

    id: str
    name: str
    incarnation: int = 1
    loaded: events.Loaded | None = None
    step: int = 0
    phase: Phase = Phase.OPEN
    skipped: int = 0
    changes: tuple[sessions.Change, ...] = ()
    changed: int = 0
    workers: Mapping[str, Applied] = dataclasses.field(default_factory=dict)
    forgotten_step: int = 0
    aggregation: aggregations.Aggregation = aggregations.SINGLE
    members: Mapping[str, Member] = dataclasses.field(default_factory=dict)
    forgotten_epoch: int = 0
    gathered: Mapping[str, events.Pushed] = dataclasses.field(default_factory=dict)
    opened_s: float = 0.0
    buffered: tuple[events.Pushed, ...] = ()
    pending: events.Pushed | None = None
    taken: tuple[str, ...] = ()
    failure: str = ""


Outcome = tuple[Session, tuple[effects.Effect, ...]]
