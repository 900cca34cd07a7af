"""What must follow an event. The order in which effects come is the order in which they must be done."""

from __future__ import annotations

import dataclasses

from optwire_proto import errors, sessions


@dataclasses.dataclass(frozen=True, slots=True)
class Apply:
    """Run one update, then report ``Updated``, ``UpdateFailed`` or ``UpdateRefused``.

    Attributes:
      index: index of the update, from 0: what hyperparameters are looked up for.
      options: what the push said beside its gradients; of several, what they said together.
      workers: whose pushes make the step: those that are kept for them, and the one just made if it is one of theirs,
        with their gradients summed in this order. Empty: the one just made alone.
      factors: what the gradients of each are multiplied by; empty: 1.
      divisor: what the sum is divided by; 0: how many they are.
      completes_sum: whether the push just made comes last to the sum that ``Add`` began, times the one factor.
    """

    index: int
    options: sessions.PushOptions
    workers: tuple[str, ...] = ()
    factors: tuple[float, ...] = ()
    divisor: float = 0.0
    completes_sum: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Add:
    """Add the gradients of the push just made, times a factor, to the sum that is kept, or begin one; then report
    ``Added`` or ``UpdateFailed``."""

    factor: float
    is_first: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Hold:
    """Keep the payload of the push just made until its step is made, in the place of one that is kept for this worker;
    ``Answer`` will follow."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """Answer the push: it is applied, now or before. All effects ahead of it must be done first."""

    seq: int
    applied_step: int
    duplicate: bool
    learning_rate: float
    metrics: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Fail:
    """Answer the push with an error."""

    error: errors.OptwireError


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """Answer all who wait for what becomes of the push that is kept for a worker; its payload is done with."""

    worker: str
    outcome: Reply | Fail


@dataclasses.dataclass(frozen=True, slots=True)
class Replace:
    """Put the arrays that were loaded in the place of those they are named after."""


@dataclasses.dataclass(frozen=True, slots=True)
class Free:
    """Free the session's arrays."""


Effect = Apply | Add | Hold | Reply | Fail | Answer | Replace | Free
