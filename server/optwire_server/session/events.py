"""What may happen to a session."""

from __future__ import annotations

import dataclasses

from optwire_proto import sessions


@dataclasses.dataclass(frozen=True, slots=True)
class Pushed:
    """A whole payload has arrived and its digest was verified."""

    key: sessions.PushKey
    digest: sessions.Digest


@dataclasses.dataclass(frozen=True, slots=True)
class Updated:
    """The update that ``Apply`` asked for is done; the new state is in place."""

    learning_rate: float


@dataclasses.dataclass(frozen=True, slots=True)
class UpdateFailed:
    """The update that ``Apply`` asked for raised; ``state_lost`` says whether the old state went with it."""

    problem: str
    state_lost: bool


@dataclasses.dataclass(frozen=True, slots=True)
class RateSet:
    """The learning rate of all further steps was set."""

    learning_rate: float


@dataclasses.dataclass(frozen=True, slots=True)
class Deleted:
    """The session was deleted."""


Event = Pushed | Updated | UpdateFailed | RateSet | Deleted
