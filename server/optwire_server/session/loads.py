"""Loads of a state: what one makes of a session's counts, and when it is another one again."""

from __future__ import annotations

from optwire_proto import errors, limits
from optwire_server.session import events


def is_retry(before: events.Loaded | None, event: events.Loaded) -> bool:
    """Whether a load has the key of the last one, so that it is that one again, or refused."""
    return before is not None and before.load_key == event.load_key


def counts_after(step: int, skipped: int, event: events.Loaded) -> tuple[int, int]:
    """Step and skipped pushes of a session that had so many before: never more skipped than there were pushes."""
    after = step if event.step is None else event.step
    return after, min(skipped if event.skipped is None else event.skipped, after // event.forfeits)


def check_counts(name: str, step: int, event: events.Loaded) -> None:
    """Raises InvalidArgumentError where a load gives a session a step, or skipped pushes, that none can have."""
    after = step if event.step is None else event.step
    for what, value, most in (
        ("step", after, limits.STEP_MAX),
        ("state/skipped", 0 if event.skipped is None else event.skipped, after // event.forfeits),
    ):
        if not 0 <= value <= most:
            raise errors.InvalidArgumentError(
                f"session {name!r}: {what} {value}, expected 0 to {most}",
                subject=what,
                expected=f"0 to {most}",
                got=str(value),
                step=step,
            )


def check_same(name: str, step: int, before: events.Loaded | None, now: events.Loaded) -> None:
    """Raises DivergentRetryError where a key that was used comes with another load; bytes may be still to come."""
    if before is None:
        return
    for what, expected, got in (
        ("arrays", before.names, now.names),
        ("step", before.step, now.step),
        ("bytes", before.digest, now.digest or before.digest),
    ):
        if got != expected:
            raise errors.DivergentRetryError(
                f"session {name!r}: load_key was used for a load of other {what}; make a new key for each load",
                subject=what,
                expected=str(expected)[:200],
                got=str(got)[:200],
                step=step,
            )


def rewritten(name: str, step: int, incarnation: int) -> errors.IncarnationError:
    """What those hear who wait with a push when a load begins an incarnation, at a step."""
    return errors.IncarnationError(
        f"session {name!r}: a state was loaded while this push waited for those of other workers; read the "
        "parameters and compute again",
        subject=name,
        expected=str(incarnation),
        got=str(incarnation - 1),
        step=step,
    )
