"""One session's rules: which event is legal now, what the session becomes, what must be done.

The whole promise of exactly-once stands here. A push carries (worker, seq, base_step) and the digest of its bytes:

    worker's last seq is L        base_step is B, the session's step is S
    seq == L, same digest         answered from state, never applied again          Reply(duplicate)
    seq == L, other digest        refused; so is another loss, scale or such        DivergentRetryError
    seq <  L                      refused                                           StalePushError
    seq >  L + 1                  refused (a worker has one push under way)         FuturePushError
    B <  S                        refused: another push was faster                  StaleStepError
    B >  S                        refused                                           FutureStepError
    otherwise                     applied: the session's step becomes S + 1         Apply, then Reply
                                  of n workers: gathered until all have pushed      Hold, then Answer

A refused push changes nothing: it raises, and the caller keeps the session it had. A worker that the table does not
know may start at any seq; `base_step` still admits each step once, so forgetting a worker applies no push twice.

Loading a state rewrites history: a new incarnation begins, so that no push of the old one fits, and the workers start
anew. A retry of the last load, told by its key, is answered and loads nothing; the key with another load is refused.

In a session of ``sync(n)`` a push that fits is gathered instead, until one of each worker is there; the mean of them is
one step, and whoever waits is answered then. What is gathered was not applied: the same push again waits like the
first one, and another one of the same worker, restarted and computing anew, takes its place.

The update donates its buffers, so there is no way back from one that fails half-way: the session then turns FAILED and
says so to everybody, rather than serve what may be half a step.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from optwire_proto import aggregations, errors, limits, sessions
from optwire_server.session import effects, events, gathering, loads

# Workers remembered per session; the one that has been quiet longest is forgotten first.
WORKERS_MAX = limits.WORKERS_MAX


class Phase(enum.Enum):
    """Where a session is in its life."""

    OPEN = "open"
    APPLYING = "applying"
    FAILED = "failed"
    DELETED = "deleted"


@dataclasses.dataclass(frozen=True, slots=True)
class Applied:
    """A worker's last applied push."""

    seq: int
    digest: sessions.Digest
    step: int
    learning_rate: float
    options: sessions.PushOptions = sessions.PLAIN
    metrics: tuple[tuple[str, float], ...] = ()


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
      aggregation: how pushes become steps.
      gathered: the pushes that wait for the others of their step, by worker.
      pending: the push being applied, with those gathered; set exactly in phase APPLYING.
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
    aggregation: aggregations.Aggregation = aggregations.SINGLE
    gathered: Mapping[str, events.Pushed] = dataclasses.field(default_factory=dict)
    pending: events.Pushed | None = None
    failure: str = ""


Outcome = tuple[Session, tuple[effects.Effect, ...]]


def advance(session: Session, event: events.Event) -> Outcome:
    """Takes one event.

    Returns:
      The session afterwards, and the effects that must now be done, in order.

    Raises:
      OptwireError: the event is not legal now; nothing has changed.
    """
    match event:
        case events.Pushed():
            return _pushed(session, event)
        case events.Updated():
            return _updated(session, event)
        case events.UpdateFailed():
            return _update_failed(session, event)
        case events.UpdateRefused():
            assert session.phase is Phase.APPLYING, "an update is refused that did not begin"
            return _ended(session, event.error)
        case events.Changed():
            return _changed(session, event.change)
        case events.Loaded():
            return _loaded(session, event)
        case events.Deleted():
            return _deleted(session)


def admit(session: Session, key: sessions.PushKey) -> None:
    """Raises what ``Pushed`` would raise for this key whatever its bytes: at its begin, before the bytes come."""
    check_alive(session)
    check_incarnation(session, key.incarnation)
    gathering.check_member(session.name, session.step, session.aggregation, key.worker)
    last = session.workers.get(key.worker)
    if last and key.seq == last.seq:
        return  # a retry: its digest decides
    if last and key.seq < last.seq:
        raise errors.StalePushError(
            f"session {session.name!r}: push {key.seq} of this worker is older than its last applied push, {last.seq}",
            subject="seq",
            expected=str(last.seq + 1),
            got=str(key.seq),
            step=session.step,
        )
    if last and key.seq > last.seq + 1:
        raise errors.FuturePushError(
            f"session {session.name!r}: push {key.seq} of this worker, expected {last.seq + 1}",
            subject="seq",
            expected=str(last.seq + 1),
            got=str(key.seq),
            step=session.step,
        )
    _must_be_at(session, key.base_step)
    if session.step >= limits.STEP_MAX:
        raise errors.LimitError(
            f"session {session.name!r}: is at step {session.step}, the last there is; load a state of an earlier one",
            subject="step",
            expected=f"a step before {limits.STEP_MAX}",
            got=str(session.step),
            step=session.step,
        )


def admit_load(session: Session, event: events.Loaded) -> None:
    """Raises what ``Loaded`` would raise: at its begin, before the bytes come, and their digest with them."""
    check_alive(session)
    if loads.is_retry(session.loaded, event):
        loads.check_same(session.name, session.step, session.loaded, event)
        return
    check_incarnation(session, event.incarnation)
    if event.base_step is not None:
        _must_be_at(session, event.base_step)
    loads.check_counts(session.name, session.step, event)


def check_incarnation(session: Session, incarnation: int) -> None:
    """Raises IncarnationError where a client knows another incarnation."""
    if incarnation != session.incarnation:
        raise errors.IncarnationError(
            f"session {session.name!r}: incarnation {incarnation}, expected {session.incarnation}: its history was "
            "rewritten; attach again",
            subject=session.name,
            expected=str(session.incarnation),
            got=str(incarnation),
            step=session.step,
        )


def admit_extension(session: Session, extends: sessions.Extension) -> None:
    """Raises unless a session is where the client that wants to extend it saw it."""
    check_alive(session)
    check_incarnation(session, extends.incarnation)
    if extends.step != session.step:
        kind = errors.StaleStepError if extends.step < session.step else errors.FutureStepError
        raise kind(
            f"session {session.name!r}: is to be extended at step {extends.step}, but is at {session.step}; read the "
            "parameters and try again",
            subject="step",
            expected=str(session.step),
            got=str(extends.step),
            step=session.step,
        )


def _loaded(session: Session, event: events.Loaded) -> Outcome:
    assert session.phase is not Phase.APPLYING, "one executor does one thing at a time"
    admit_load(session, event)
    if loads.is_retry(session.loaded, event):
        return session, ()
    step, skipped = loads.counts_after(session.step, session.skipped, event)
    # What was in effect stays in effect, from the new step on if that comes earlier; what was to come, still comes.
    changes = [
        dataclasses.replace(change, from_step=min(change.from_step, step))
        if change.from_step <= session.step
        else change
        for change in session.changes
    ]
    loaded = dataclasses.replace(
        session,
        incarnation=session.incarnation + 1,
        loaded=event,
        step=step,
        skipped=skipped,
        changes=tuple(changes),
        workers={},
        gathered={},
    )
    rewritten = loads.rewritten(session.name, step, loaded.incarnation)
    return loaded, (effects.Replace(), *gathering.told(session.gathered, rewritten))


def _pushed(session: Session, event: events.Pushed) -> Outcome:
    assert session.phase is not Phase.APPLYING, "one executor applies one push at a time"
    key = event.key
    admit(session, key)
    last = session.workers.get(key.worker)
    if last and key.seq == last.seq:
        if event.digest != last.digest or event.options.meaning != last.options.meaning:
            raise _divergent(session, last, event)
        return session, (effects.Reply(last.seq, last.step, True, last.learning_rate, last.metrics),)
    others = {worker: pushed for worker, pushed in session.gathered.items() if worker != key.worker}
    gathering.check_agreement(session.name, session.step, event, others)
    if len(others) + 1 < session.aggregation.workers:
        return _gathered(session, event, others)
    applying = dataclasses.replace(session, phase=Phase.APPLYING, pending=event)
    if not others:
        return applying, (effects.Apply(session.step, event.options),)
    pushes = gathering.in_order({**others, key.worker: event})
    workers = tuple(pushed.key.worker for pushed in pushes)
    return applying, (effects.Apply(session.step, gathering.joined(pushes), workers),)


def _gathered(session: Session, event: events.Pushed, others: Mapping[str, events.Pushed]) -> Outcome:
    """The session with a push that waits for those of other workers."""
    worker = event.key.worker
    before = session.gathered.get(worker)
    again = before is None or gathering.same(before, event)
    if before and again:
        event = gathering.wishing(event, before)
    waiting = dataclasses.replace(session, gathered={**others, worker: event})
    if again:
        return waiting, (effects.Hold(),)
    replaced = gathering.replaced(session.name, session.step, worker)
    return waiting, (effects.Answer(worker, effects.Fail(replaced)), effects.Hold())


def _updated(session: Session, event: events.Updated) -> Outcome:
    pushed = session.pending
    assert session.phase is Phase.APPLYING and pushed is not None, "an update ends that did not begin"
    step = session.step + 1
    workers = dict(session.workers)
    answers: list[effects.Effect] = []
    for one in (*gathering.in_order(session.gathered), pushed):
        worker, seq = one.key.worker, one.key.seq
        workers.pop(worker, None)  # so that it moves to the end
        if len(workers) >= WORKERS_MAX:
            del workers[next(iter(workers))]
        workers[worker] = Applied(seq, one.digest, step, event.learning_rate, one.options, event.metrics)
        reply = effects.Reply(seq, step, False, event.learning_rate, event.metrics)
        answers.append(reply if one is pushed else effects.Answer(worker, reply))
    advanced = dataclasses.replace(
        session,
        phase=Phase.OPEN,
        step=step,
        skipped=session.skipped + event.skipped,
        changes=_with(session.changes, event.change) if event.change else session.changes,
        changed=session.changed + (event.change is not None),
        workers=workers,
        gathered={},
        pending=None,
    )
    return advanced, tuple(answers)


def _update_failed(session: Session, event: events.UpdateFailed) -> Outcome:
    assert session.phase is Phase.APPLYING, "an update fails that did not begin"
    if not event.state_lost:
        error = errors.InternalError(
            f"session {session.name!r}: the update of step {session.step} failed and changed nothing: {event.problem}",
            subject=session.name,
            step=session.step,
        )
        return _ended(session, error)
    failed = dataclasses.replace(session, failure=event.problem)
    failed, told = _ended(failed, _failure(failed))
    return dataclasses.replace(failed, phase=Phase.FAILED), (*told, effects.Free())


def _ended(session: Session, error: errors.OptwireError) -> Outcome:
    """The session after an update that changed nothing: all whose pushes it was of hear why."""
    ended = dataclasses.replace(session, phase=Phase.OPEN, gathered={}, pending=None)
    return ended, (*gathering.told(session.gathered, error), effects.Fail(error))


def _deleted(session: Session) -> Outcome:
    _must_exist(session)
    deleted = dataclasses.replace(session, phase=Phase.DELETED, gathered={}, pending=None)
    return deleted, (*gathering.told(session.gathered, _gone(session)), effects.Free())


def _changed(session: Session, change: sessions.Change) -> Outcome:
    check_alive(session)
    if change.from_step < session.step:
        raise errors.InvalidArgumentError(
            f"session {session.name!r}: from_step {change.from_step}, but the next step is {session.step}",
            subject="from_step",
            expected=f"{session.step} or later",
            got=str(change.from_step),
            step=session.step,
        )
    changes = _with(session.changes, change)
    return dataclasses.replace(session, changes=changes, changed=session.changed + 1), ()


def _with(changes: tuple[sessions.Change, ...], change: sessions.Change) -> tuple[sessions.Change, ...]:
    """The newest changes, one more among them."""
    return (*changes, change)[-limits.HYPERPARAM_CHANGES_MAX :]


def _divergent(session: Session, last: Applied, event: events.Pushed) -> errors.DivergentRetryError:
    before = {"bytes": last.digest, **last.options.meaning}
    now = {"bytes": event.digest, **event.options.meaning}
    what = next(name for name in before if before[name] != now[name])
    return errors.DivergentRetryError(
        f"session {session.name!r}: push {event.key.seq} of this worker was applied as step {last.step} with other "
        f"{what}; read the parameters and go on from there",
        subject=what,
        expected=str(before[what])[:200],
        got=str(now[what])[:200],
        step=session.step,
    )


def _must_exist(session: Session) -> None:
    if session.phase is Phase.DELETED:
        raise _gone(session)


def _gone(session: Session) -> errors.SessionNotFoundError:
    return errors.SessionNotFoundError(f"session {session.name!r} was deleted", subject=session.name)


def check_alive(session: Session) -> None:
    """Raises SessionNotFoundError or SessionFailedError where a session has no parameters any more."""
    _must_exist(session)
    if session.phase is Phase.FAILED:
        raise _failure(session)


def _failure(session: Session) -> errors.SessionFailedError:
    return errors.SessionFailedError(
        f"session {session.name!r} failed at step {session.step} and lost its state: {session.failure}; delete it and "
        "create it anew",
        subject=session.name,
        step=session.step,
    )


def _must_be_at(session: Session, base_step: int) -> None:
    if base_step < session.step:
        raise errors.StaleStepError(
            f"session {session.name!r}: gradients of step {base_step}, but the session is at {session.step}: another "
            "push was faster; read the parameters and compute again",
            subject="base_step",
            expected=str(session.step),
            got=str(base_step),
            step=session.step,
        )
    if base_step > session.step:
        raise errors.FutureStepError(
            f"session {session.name!r}: gradients of step {base_step}, but the session is at {session.step}",
            subject="base_step",
            expected=str(session.step),
            got=str(base_step),
            step=session.step,
        )
