"""What must follow an event. The order in which effects come is the order in which they must be done."""

from __future__ import annotations

import dataclasses

from optwire_proto import errors


@dataclasses.dataclass(frozen=True, slots=True)
class Apply:
    """Run one update with the gradients of the push just made, then report ``Updated`` or ``UpdateFailed``.

    Attributes:
      index: index of the update, from 0: what schedules are evaluated at.
      learning_rate: the learning rate set by hand, or None where the spec gives it.
    """

    index: int
    learning_rate: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """Answer the push: it is applied, now or before. All effects ahead of it must be done first."""

    seq: int
    applied_step: int
    duplicate: bool
    learning_rate: float


@dataclasses.dataclass(frozen=True, slots=True)
class Fail:
    """Answer the push with an error."""

    error: errors.OptwireError


@dataclasses.dataclass(frozen=True, slots=True)
class Free:
    """Free the session's arrays."""


Effect = Apply | Reply | Fail | Free
