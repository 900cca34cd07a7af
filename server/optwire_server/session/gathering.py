"""Pushes that are to make one step: when it is complete, what they must have in common, and what they say together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from optwire_proto import aggregations, errors, limits, sessions
from optwire_server.session import effects, events, members, records

_MODE = aggregations.Mode
# A loss is the worker's own, and the step has the mean of them; so is its weight, and which rows it has.
_OWN = frozenset({"loss", "weight", "numbers of rows"})
_UPDATES = sessions.ReplyContent.UPDATES


def in_order(gathered: Mapping[str, events.Pushed]) -> list[events.Pushed]:
    """The pushes in the order of their workers' ids: whatever the order they came in, sums have the same bits."""
    return [gathered[worker] for worker in sorted(gathered)]


def same(one: events.Pushed, other: events.Pushed) -> bool:
    """Whether a push is another one again: the same bytes, with the same meaning; perhaps from another process."""
    key = dataclasses.replace(one.key, epoch=other.key.epoch)
    return (key, one.digest, one.options.meaning) == (other.key, other.digest, other.options.meaning)


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


def is_complete(session: records.Session, now_s: float) -> bool:
    """Whether what is gathered makes a step now, in the modes that gather."""
    aggregation, count = session.aggregation, len(session.gathered)
    if aggregation.mode is not _MODE.QUORUM:
        enough = aggregation.k or aggregation.workers
        return count > 0 and (count >= enough or members.missing(session) <= 0)
    is_over = closes_s(session) <= now_s
    return count >= aggregation.k and (is_over or members.missing(session) == 0)


def closes_s(session: records.Session) -> float:
    """When the open step will not wait any longer for more pushes than it needs; infinite: for ever."""
    aggregation = session.aggregation
    has_deadline = aggregation.deadline_s > 0 and len(session.gathered) >= max(aggregation.k, 1)
    return session.opened_s + aggregation.deadline_s if has_deadline else math.inf


def apply(session: records.Session) -> effects.Apply:
    """The update that the pushes of a step are applied by: those that are ``taken``, and the ``pending`` one."""
    pending = session.pending
    if session.buffered and pending is not None:
        return _closing(session, pending)
    found = {worker: session.gathered[worker] for worker in session.taken}
    pushes = in_order(found | {pending.key.worker: pending} if pending else found)
    if not session.aggregation.gathers:
        return _alone(session, pushes[0])
    sums = session.aggregation.combine is aggregations.Combine.SUM
    weights = tuple(pushed.options.weight for pushed in pushes)
    if len(pushes) == 1 and not sums:
        return _alone(session, pushes[0])
    workers = tuple(pushed.key.worker for pushed in pushes)
    factors = weights if any(weight != 1.0 for weight in weights) else ()
    divisor = 1.0 if sums else math.fsum(weights) if factors else 0.0
    return effects.Apply(session.step, joined(pushes), workers, factors, divisor)


def factor(session: records.Session, pushed: events.Pushed) -> float:
    """What the gradients of a push are multiplied by in a sum: its weight, less what it is too late by."""
    damping = session.aggregation.damping.factor(session.step - pushed.key.base_step)
    return damping * pushed.options.weight


def _alone(session: records.Session, pushed: events.Pushed) -> effects.Apply:
    """The update of one push: what it is to be multiplied by, the update divides by less."""
    aggregation, options = session.aggregation, pushed.options
    times = aggregation.damping.factor(session.step - pushed.key.base_step)
    if aggregation.combine is aggregations.Combine.SUM:
        times *= options.weight
    if times != 1.0:
        options = dataclasses.replace(options, grad_scale=options.grad_scale / times)
    return effects.Apply(session.step, options, () if pushed is session.pending else (pushed.key.worker,))


def _closing(session: records.Session, pending: events.Pushed) -> effects.Apply:
    """The update of a sum with the push that is the last of it; only that one's wishes can still be heeded."""
    pushes = (*session.buffered, pending)
    is_mean = session.aggregation.combine is aggregations.Combine.MEAN
    divisor = math.fsum(pushed.options.weight for pushed in pushes) if is_mean else 1.0
    options = dataclasses.replace(joined(pushes), telemetry=pending.options.telemetry, reply=pending.options.reply)
    times = (factor(session, pending),)
    return effects.Apply(session.step, options, (), times, divisor, completes_sum=True)


def replaced(name: str, step: int, worker: str) -> errors.StalePushError:
    """What those hear who wait for a push that another one of the same worker takes the place of."""
    return errors.StalePushError(
        f"session {name!r}: another push of worker {_called(worker)} took the place of this one before step {step} was "
        "complete; do two processes have one rank?",
        subject="worker",
        expected="one process for each worker",
        got=worker,
        step=step,
    )


def check_agreement(name: str, step: int, event: events.Pushed, others: Iterable[events.Pushed]) -> None:
    """Raises InvalidArgumentError where a push says something else than one of another worker for the same step."""
    for other in others:
        before, now = other.options.meaning, event.options.meaning
        for what in before:
            if before[what] != now[what] and what not in _OWN:
                raise errors.InvalidArgumentError(
                    f"session {name!r}: {what} {str(now[what])[:200]} of worker {_called(event.key.worker)}, but "
                    f"worker {_called(other.key.worker)} pushed with {str(before[what])[:200]}; workers of one step "
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
    weights = [pushed.options.weight for pushed in pushes]
    return sessions.PushOptions(
        grad_scale=first.grad_scale,
        extras=tuple((name, _mean([values[name] for values in extras], weights)) for name in names),
        hyperparams=first.hyperparams,
        absent=first.absent,
        rows=first.rows,
        rows_exact=first.rows_exact,
        telemetry=any(pushed.options.telemetry for pushed in pushes),
        reply=_UPDATES if any(pushed.options.reply is _UPDATES for pushed in pushes) else first.reply,
    )


def told(gathered: Mapping[str, events.Pushed], error: errors.OptwireError) -> tuple[effects.Answer, ...]:
    """The effects that tell all whose pushes were gathered the same."""
    return tuple(effects.Answer(pushed.key.worker, effects.Fail(error)) for pushed in in_order(gathered))


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted mean; where all weights are the same, exact but for the last rounding. Never infinite."""
    if len(set(weights)) == 1:
        return math.fsum(value / len(values) for value in values)
    whole = math.fsum(weights)
    return math.fsum(value * (weight / whole) for value, weight in zip(values, weights, strict=True))


def _called(worker: str) -> str:
    """A worker as messages name it: by its rank, where its id is one."""
    rank = int(worker, 16)
    return str(rank) if rank < limits.WORKERS_MAX else worker
