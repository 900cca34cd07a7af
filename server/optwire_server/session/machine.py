"""One session's rules: which event is legal now, what the session becomes, what must be done.

The whole promise of exactly-once stands here. A push carries (worker, seq, base_step) and the digest of its bytes:

    worker's last seq is L        base_step is B, the session's step is S
    seq == L, same digest         answered from state, never applied again          Reply(duplicate)
    seq == L, other digest        refused; so is another loss, scale or such        DivergentRetryError
    seq <  L                      refused                                           StalePushError
    seq >  L + 1                  refused (a worker has one push under way)         FuturePushError
    B <  S                        refused: another push was faster                  StaleStepError
         unless the mode takes it; where it gathers, its step was made without it   StepClosedError
    B >  S                        refused                                           FutureStepError
    otherwise                     applied: the session's step becomes S + 1         Apply, then Reply
                                  or gathered until its step is complete            Hold, then Apply and Answer
                                  or added to a sum of which step S + 1 will be     Add, then Reply

A refused push changes nothing: it raises, and the caller keeps the session it had. A worker that the table does not
know may start at any seq; `base_step` still admits each step once, so forgetting a worker applies no push twice. Where
stale gradients are taken, those of a worker that is not known are, from the newest step on that a forgotten push is
part of.

Loading a state rewrites history: a new incarnation begins, so that no push of the old one fits, and the workers start
anew. A retry of the last load, told by its key, is answered and loads nothing; the key with another load is refused.

In the modes that gather (``sync``, ``k_of_n``, ``quorum``) a push that fits waits for others of its step, and where
bounded staleness waits, for slow workers (``pacing``). What is gathered was not applied: the same push again waits like
the first one, and another one of the same worker, restarted and computing anew, takes its place. Whatever happens, what
can be applied then is: an event may end with the update of pushes that came long before. What is ``buffered`` counts as
applied.

A worker that joins gets an epoch and a lease (``members``). A push of an earlier epoch is refused: another process has
taken its place. Nobody waits for a worker whose lease is over, or that has left; what it has pushed before counts.

The update donates its buffers, so there is no way back from one that fails half-way: the session then turns FAILED and
says so to everybody, rather than serve what may be half a step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from optwire_proto import aggregations, errors, limits, sessions
from optwire_server.session import admission, effects, events, gathering, loads, members, pacing, records

# Workers remembered per session; the one that has been quiet longest is forgotten first.
WORKERS_MAX = limits.WORKERS_MAX

Phase = records.Phase
Applied = records.Applied
Member = records.Member
Session = records.Session
Outcome = records.Outcome


def advance(session: Session, event: events.Event) -> Outcome:
    """Takes one event.

    Returns:
      The session afterwards, and the effects that must now be done, in order.

    Raises:
      OptwireError: the event is not legal now; nothing has changed.
    """
    after, todo = _taken(session, event)
    is_retry = after is session and isinstance(event, events.Pushed)  # of what counts: it is not its part to go on
    if after.phase is not Phase.OPEN or not after.gathered or is_retry:
        return after, todo
    return _going_on(after, todo, getattr(event, "now_s", -math.inf))


def next_deadline(session: Session) -> float | None:
    """When ``Ticked`` should come, in the time that events tell; None: no need."""
    if session.phase is not Phase.OPEN:
        return None
    earliest = min(members.next_lost_s(session), gathering.closes_s(session))
    return earliest if earliest < math.inf else None


def _taken(session: Session, event: events.Event) -> Outcome:
    """The session and the effects of one event by itself."""
    match event:
        case events.Pushed():
            return _pushed(session, event)
        case events.Updated():
            return _updated(session, event)
        case events.Added():
            return _added(session, event)
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
    return _membership(session, event)


def _membership(
    session: Session, event: events.Joined | events.Beat | events.Left | events.Read | events.Ticked
) -> Outcome:
    """The session where a worker comes, goes or is heard of, or time passes."""
    assert session.phase is not Phase.APPLYING, "one executor does one thing at a time"
    if isinstance(event, events.Ticked):
        return members.expired(session, event.now_s), ()
    admission.check_alive(session)
    match event:
        case events.Joined():
            return _joined(session, event)
        case events.Beat():
            return members.heard(session, event.worker, event.epoch, event.now_s), ()
        case events.Left():
            return members.left(session, event.worker, event.epoch, event.now_s), ()
        case events.Read():
            return members.reading(session, event.worker, event.epoch, event.now_s), ()


def _joined(session: Session, event: events.Joined) -> Outcome:
    """The session with a process in the place of one that may have pushed."""
    after = members.joined(session, event.worker, event.join_key, event.now_s)
    held = session.gathered.get(event.worker)
    is_new = after.members[event.worker].epoch != (held.key.epoch if held else None)
    if held is None or not is_new or session.aggregation.gathers:
        return after, ()
    rest = {worker: pushed for worker, pushed in session.gathered.items() if worker != event.worker}
    error = gathering.replaced(session.name, session.step, event.worker)
    return dataclasses.replace(after, gathered=rest), (effects.Answer(event.worker, effects.Fail(error)),)


def _going_on(session: Session, todo: tuple[effects.Effect, ...], now_s: float) -> Outcome:
    """The session when what waits and need not wait any more is being applied."""
    if session.aggregation.gathers:
        taken = tuple(sorted(session.gathered)) if gathering.is_complete(session, now_s) else ()
    else:
        due = pacing.next_due(session)
        taken = () if due is None else (due,)
    if not taken:
        return session, todo
    applying = dataclasses.replace(session, phase=Phase.APPLYING, taken=taken)
    return applying, (*todo, gathering.apply(applying))


def _loaded(session: Session, event: events.Loaded) -> Outcome:
    assert session.phase is not Phase.APPLYING, "one executor does one thing at a time"
    admission.admit_load(session, event)
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
        forgotten_step=0,
        members={worker: dataclasses.replace(member, base_step=step) for worker, member in session.members.items()},
        gathered={},
        buffered=(),
    )
    rewritten = loads.rewritten(session.name, step, loaded.incarnation)
    return loaded, (effects.Replace(), *gathering.told(session.gathered, rewritten))


def _pushed(session: Session, event: events.Pushed) -> Outcome:
    assert session.phase is not Phase.APPLYING, "one executor applies one push at a time"
    key, mode = event.key, session.aggregation.mode
    admission.admit(session, key)
    last = session.workers.get(key.worker)
    if last and key.seq == last.seq:
        if event.digest != last.digest or event.options.meaning != last.options.meaning:
            raise admission.divergent(session, last, event)
        return session, (effects.Reply(last.seq, last.step, True, last.learning_rate, last.metrics),)
    others = {worker: pushed for worker, pushed in session.gathered.items() if worker != key.worker}
    if session.aggregation.gathers:
        gathering.check_agreement(session.name, session.step, event, others.values())
    gathering.check_agreement(session.name, session.step, event, session.buffered)
    after = members.pushing(session, key.worker, key.epoch, key.base_step, event.now_s)
    if mode is aggregations.Mode.BUFFERED and len(session.buffered) + 1 < session.aggregation.k:
        adding = dataclasses.replace(after, phase=Phase.APPLYING, pending=event)
        return adding, (effects.Add(gathering.factor(session, event), is_first=not session.buffered),)
    before = session.gathered.get(key.worker)
    # The same one again waits with the calls that made it before, if only until what waits goes on: all are answered.
    is_again = before is not None and gathering.same(before, event)
    if session.aggregation.waits and (is_again or not _applies_now(after, event, others)):
        return _gathered(after, event, others)
    taken = tuple(sorted(others)) if session.aggregation.gathers else ()
    applying = dataclasses.replace(after, phase=Phase.APPLYING, gathered=others, pending=event, taken=taken)
    replaced = _replaced(session, event)
    return applying, (*replaced, gathering.apply(applying))


def _applies_now(session: Session, event: events.Pushed, others: Mapping[str, events.Pushed]) -> bool:
    """Whether a push that has just come need not wait, nor let another one go first."""
    with_it = dataclasses.replace(
        session, gathered={**others, event.key.worker: event}, opened_s=_opened_s(session, event)
    )
    if session.aggregation.gathers:
        return gathering.is_complete(with_it, event.now_s)
    return pacing.next_due(with_it) == event.key.worker


def _opened_s(session: Session, event: events.Pushed) -> float:
    return session.opened_s if session.gathered else event.now_s


def _gathered(session: Session, event: events.Pushed, others: Mapping[str, events.Pushed]) -> Outcome:
    """The session with a push that waits for those of other workers."""
    worker = event.key.worker
    before = session.gathered.get(worker)
    is_again = before is not None and gathering.same(before, event)
    if before and is_again:
        event = gathering.wishing(event, before)
    gathered = {**(session.gathered if is_again else others), worker: event}  # the same one again keeps its place
    waiting = dataclasses.replace(session, gathered=gathered, opened_s=_opened_s(session, event))
    return waiting, (*_replaced(session, event), effects.Hold())


def _replaced(session: Session, event: events.Pushed) -> tuple[effects.Effect, ...]:
    """What tells those who wait for another push of a worker that this one took its place."""
    before = session.gathered.get(event.key.worker)
    if before is None or gathering.same(before, event):
        return ()
    replaced = gathering.replaced(session.name, session.step, event.key.worker)
    return (effects.Answer(event.key.worker, effects.Fail(replaced)),)


def _updated(session: Session, event: events.Updated) -> Outcome:
    assert session.phase is Phase.APPLYING, "an update ends that did not begin"
    step, pending = session.step + 1, session.pending
    pushes = [session.gathered[worker] for worker in session.taken] + ([pending] if pending else [])
    replies = [effects.Reply(one.key.seq, step, False, event.learning_rate, event.metrics) for one in pushes]
    advanced = dataclasses.replace(
        _counting(session, pushes, replies),
        phase=Phase.OPEN,
        step=step,
        skipped=session.skipped + event.skipped,
        changes=_with(session.changes, event.change) if event.change else session.changes,
        changed=session.changed + (event.change is not None),
        gathered={worker: pushed for worker, pushed in session.gathered.items() if worker not in session.taken},
        buffered=(),
        pending=None,
        taken=(),
    )
    answers = tuple(
        reply if one is pending else effects.Answer(one.key.worker, reply)
        for one, reply in zip(pushes, replies, strict=True)
    )
    return members.having(advanced, [one.key.worker for one in pushes], step), answers


def _added(session: Session, event: events.Added) -> Outcome:
    pushed = session.pending
    assert session.phase is Phase.APPLYING and pushed is not None, "a sum grew to which nothing was added"
    reply = effects.Reply(pushed.key.seq, session.step + 1, False, event.learning_rate)
    counted = _counting(session, [pushed], [reply])
    added = dataclasses.replace(counted, phase=Phase.OPEN, pending=None, buffered=(*session.buffered, pushed))
    return members.having(added, [pushed.key.worker], session.step), (reply,)


def _counting(session: Session, pushes: Sequence[events.Pushed], replies: Sequence[effects.Reply]) -> Session:
    """The session where pushes are the last ones of their workers that count as applied."""
    workers, forgotten_step = dict(session.workers), session.forgotten_step
    for pushed, reply in zip(pushes, replies, strict=True):
        key = pushed.key
        workers.pop(key.worker, None)  # so that it moves to the end
        if len(workers) >= WORKERS_MAX:
            forgotten_step = max(forgotten_step, workers.pop(next(iter(workers))).step)
        workers[key.worker] = Applied(
            key.seq, pushed.digest, reply.applied_step, reply.learning_rate, pushed.options, reply.metrics, key.epoch
        )
    return dataclasses.replace(session, workers=workers, forgotten_step=forgotten_step)


def _update_failed(session: Session, event: events.UpdateFailed) -> Outcome:
    assert session.phase is Phase.APPLYING, "an update fails that did not begin"
    if not event.state_lost:
        error = errors.InternalError(
            f"session {session.name!r}: the update of step {session.step} failed and changed nothing: {event.problem}",
            subject=session.name,
            step=session.step,
        )
        return _ended(session, error)
    failed = dataclasses.replace(session, failure=event.problem, taken=tuple(session.gathered))
    failed, told = _ended(failed, admission.failure(failed))
    return dataclasses.replace(failed, phase=Phase.FAILED), (*told, effects.Free())


def _ended(session: Session, error: errors.OptwireError) -> Outcome:
    """The session after an update that changed nothing: all whose pushes it was of hear why."""
    over = {worker: session.gathered[worker] for worker in session.taken}
    rest = {worker: pushed for worker, pushed in session.gathered.items() if worker not in over}
    ended = dataclasses.replace(session, phase=Phase.OPEN, gathered=rest, buffered=(), pending=None, taken=())
    last = (effects.Fail(error),) if session.pending else ()
    return ended, (*gathering.told(over, error), *last)


def _deleted(session: Session) -> Outcome:
    admission.must_exist(session)
    deleted = dataclasses.replace(session, phase=Phase.DELETED, gathered={}, buffered=(), pending=None)
    return deleted, (*gathering.told(session.gathered, admission.gone(session)), effects.Free())


def _changed(session: Session, change: sessions.Change) -> Outcome:
    admission.check_alive(session)
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
