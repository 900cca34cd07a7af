"""Pushes of several workers that are to make one step: what they must have in common, and what they say together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from optwire_proto import aggregations, errors, sessions
from optwire_server.session import effects, events

# A loss is the worker's own; the step has the mean of them.
_OWN = frozenset({"loss"})
_UPDATES = sessions.ReplyContent.UPDATES


def in_order(gathered: Mapping[str, events.Pushed]) -> list[events.Pushed]:
    """The pushes in the order of their workers' ids: whatever the order they came in, sums have the same bits."""
    return [gathered[worker] for worker in sorted(gathered)]


def same(one: events.Pushed, other: events.Pushed) -> bool:
    """Whether a push is another one again: the same bytes, with the same meaning."""
    what = one.key, one.digest, one.options.meaning
    return what == (other.key, other.digest, other.options.meaning)


def wishing(event: events.Pushed, before: events.Pushed) -> events.Pushed:
    """A push made again, with the wishes of the calls that made it before: they may wait for their answer still."""
    return dataclasses.replace(
        event,
        options=dataclasses.replace(
            event.options,
            telemetry=event.options.telemetry or before.options.telemetry,
            reply=before.options.reply if before.options.reply is _UPDATES else event.options.reply,
        ),
    )


def check_member(name: str, step: int, aggregation: aggregations.Aggregation, worker: str) -> None:
    """Raises InvalidArgumentError where a worker is none of those whose pushes make the steps of a session."""
    if not aggregation.includes(worker):
        most = aggregation.workers - 1
        raise errors.InvalidArgumentError(
            f"session {name!r}: a push of worker {worker}, expected one of the workers 0 to {most}, as its steps are "
            f"of {aggregation}; attach(name, worker=rank)",
            subject="worker",
            expected=f"{sessions.worker_id(0)} to {sessions.worker_id(most)}",
            got=worker,
            step=step,
        )


def replaced(name: str, step: int, worker: str) -> errors.StalePushError:
    """What those hear who wait for a push that another one of the same worker takes the place of."""
    return errors.StalePushError(
        f"session {name!r}: another push of worker {int(worker, 16)} took the place of this one before step {step} was "
        "complete; do two processes have one rank?",
        subject="worker",
        expected="one process for each worker",
        got=worker,
        step=step,
    )


def check_agreement(name: str, step: int, event: events.Pushed, others: Mapping[str, events.Pushed]) -> None:
    """Raises InvalidArgumentError where a push says something else than one of another worker for the same step."""
    for other in others.values():
        before, now = other.options.meaning, event.options.meaning
        for what in before:
            if before[what] != now[what] and what not in _OWN:
                raise errors.InvalidArgumentError(
                    f"session {name!r}: {what} {str(now[what])[:200]} of worker {int(event.key.worker, 16)}, but "
                    f"worker {int(other.key.worker, 16)} pushed with {str(before[what])[:200]}; workers of one step "
                    "must agree",
                    subject=what,
                    expected=str(before[what])[:200],
                    got=str(now[what])[:200],
                    step=step,
                )
        return  # the others agree with each other


def joined(pushes: Sequence[events.Pushed]) -> sessions.PushOptions:
    """What pushes of one step say together: they agree in what the update depends on, extras are the mean."""
    first = pushes[0].options
    names = [name for name, _ in first.extras]
    extras = [dict(pushed.options.extras) for pushed in pushes]
    return sessions.PushOptions(
        grad_scale=first.grad_scale,
        extras=tuple((name, _mean([values[name] for values in extras])) for name in names),
        hyperparams=first.hyperparams,
        absent=first.absent,
        telemetry=any(pushed.options.telemetry for pushed in pushes),
        reply=_UPDATES if any(pushed.options.reply is _UPDATES for pushed in pushes) else first.reply,
    )


def told(gathered: Mapping[str, events.Pushed], error: errors.OptwireError) -> tuple[effects.Answer, ...]:
    """The effects that tell all whose pushes were gathered the same."""
    return tuple(effects.Answer(pushed.key.worker, effects.Fail(error)) for pushed in in_order(gathered))


def _mean(values: Sequence[float]) -> float:
    """The mean; exact but for the last rounding, and never infinite."""
    return math.fsum(value / len(values) for value in values)
