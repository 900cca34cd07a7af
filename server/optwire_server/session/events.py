"""What may happen to a session."""

from __future__ import annotations

import dataclasses

from optwire_proto import errors, sessions


@dataclasses.dataclass(frozen=True, slots=True)
class Pushed:
    """A whole payload has arrived and its digest was verified; ``now_s`` is a time in seconds, that only grows."""

    key: sessions.PushKey
    digest: sessions.Digest
    options: sessions.PushOptions = sessions.PLAIN
    now_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Updated:
    """The update that ``Apply`` asked for is done; the new state is in place.

    Attributes:
      learning_rate: what it used.
      metrics: figures of it, by name.
      skipped: whether it left the parameters alone, since the gradients were not finite.
      change: of hyperparameters, that the push brought along and the update used.
    """

    learning_rate: float
    metrics: tuple[tuple[str, float], ...] = ()
    skipped: bool = False
    change: sessions.Change | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Added:
    """The gradients that ``Add`` is of are part of the sum; the learning rate is what the step would use now."""

    learning_rate: float


@dataclasses.dataclass(frozen=True, slots=True)
class UpdateFailed:
    """What ``Apply`` or ``Add`` asked for raised; ``state_lost`` says whether the old state went with it."""

    problem: str
    state_lost: bool


@dataclasses.dataclass(frozen=True, slots=True)
class UpdateRefused:
    """The update that ``Apply`` asked for found the gradients unfit; the state is as it was."""

    error: errors.OptwireError


@dataclasses.dataclass(frozen=True, slots=True)
class Changed:
    """Hyperparameters were changed, from a step on that is not past."""

    change: sessions.Change


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """Whole arrays of a state have arrived and their digest was verified.

    Attributes:
      incarnation: the one that the client knows.
      load_key: 32 hexadecimal digits; a retry repeats them.
      step: number of updates that the session counts afterwards; None: as many as before.
      skipped: how many of those left the parameters alone; None: as many as before.
      base_step: number of updates that the session must have applied; None: any.
      names: of the arrays, in the order of their bytes; a retry repeats them, too.
      digest: of the bytes; None while they are still to come.
      forfeits: how many pushes one skipped update is the end of.
    """

    incarnation: int
    load_key: str
    step: int | None = None
    skipped: int | None = None
    base_step: int | None = None
    names: tuple[str, ...] = ()
    digest: sessions.Digest | None = None
    forfeits: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Deleted:
    """The session was deleted."""


@dataclasses.dataclass(frozen=True, slots=True)
class Joined:
    """A process joins as a worker.

    Attributes:
      worker: 32 hexadecimal digits.
      join_key: 32 hexadecimal digits; a retry repeats them.
      now_s: a time in seconds, as in ``Pushed``.
    """

    worker: str
    join_key: str
    now_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Beat:
    """A worker, known by the epoch that joining gave it, is there still."""

    worker: str
    epoch: int
    now_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Left:
    """A worker, known by its epoch, leaves."""

    worker: str
    epoch: int
    now_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Read:
    """A worker, known by its epoch, was given the newest parameters."""

    worker: str
    epoch: int = 0
    now_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""

    now_s: float


Event = (
    Pushed
    | Updated
    | Added
    | UpdateFailed
    | UpdateRefused
    | Changed
    | Loaded
    | Deleted
    | Joined
    | Beat
    | Left
    | Read
    | Ticked
)
