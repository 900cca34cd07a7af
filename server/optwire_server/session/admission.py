"""What a session takes now, and what it refuses, with the error that says so. Nothing here changes a session."""

from __future__ import annotations

from optwire_proto import aggregations, errors, limits, sessions
from optwire_server.session import events, loads, members, pacing, records


def admit(session: records.Session, key: sessions.PushKey) -> None:
    """Raises what ``Pushed`` would raise for this key whatever its bytes: at its begin, before the bytes come."""
    check_alive(session)
    check_incarnation(session, key.incarnation)
    members.check_worker(session, key.worker)
    members.check_epoch(session, key.worker, key.epoch)
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
    members.check_room(session, key.worker)
    _check_base(session, key)
    if session.step >= limits.STEP_MAX:
        raise errors.LimitError(
            f"session {session.name!r}: is at step {session.step}, the last there is; load a state of an earlier one",
            subject="step",
            expected=f"a step before {limits.STEP_MAX}",
            got=str(session.step),
            step=session.step,
        )


def admit_load(session: records.Session, event: events.Loaded) -> None:
    """Raises what ``Loaded`` would raise: at its begin, before the bytes come, and their digest with them."""
    check_alive(session)
    if loads.is_retry(session.loaded, event):
        loads.check_same(session.name, session.step, session.loaded, event)
        return
    check_incarnation(session, event.incarnation)
    if event.base_step is not None:
        _must_be_at(session, event.base_step)
    loads.check_counts(session.name, session.step, event)


def check_incarnation(session: records.Session, incarnation: int) -> None:
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


def admit_extension(session: records.Session, extends: sessions.Extension) -> None:
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


def divergent(session: records.Session, last: records.Applied, event: events.Pushed) -> errors.OptwireError:
    """What a push hears that has the number of one that was applied, and is another one."""
    if event.key.epoch > last.epoch:
        return _too_late(session, event.key.base_step, "a push of the process before this one counted")
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


def must_exist(session: records.Session) -> None:
    """Raises SessionNotFoundError where a session was deleted."""
    if session.phase is records.Phase.DELETED:
        raise gone(session)


def gone(session: records.Session) -> errors.SessionNotFoundError:
    """What those hear who look for a session that was deleted."""
    return errors.SessionNotFoundError(f"session {session.name!r} was deleted", subject=session.name)


def check_alive(session: records.Session) -> None:
    """Raises SessionNotFoundError or SessionFailedError where a session has no parameters any more."""
    must_exist(session)
    if session.phase is records.Phase.FAILED:
        raise failure(session)


def failure(session: records.Session) -> errors.SessionFailedError:
    """What those hear who look for a session that has lost its state."""
    return errors.SessionFailedError(
        f"session {session.name!r} failed at step {session.step} and lost its state: {session.failure}; delete it and "
        "create it anew",
        subject=session.name,
        step=session.step,
    )


def _check_base(session: records.Session, key: sessions.PushKey) -> None:
    """Raises unless gradients of a step can be taken now."""
    aggregation, staleness = session.aggregation, session.step - key.base_step
    if staleness < 0 or not aggregation.takes_stale:
        if staleness > 0 and aggregation.gathers:
            raise _too_late(session, key.base_step, "that step was made without this push")
        _must_be_at(session, key.base_step)
        return
    if key.worker not in session.workers and key.base_step < session.forgotten_step:
        raise _too_late(session, key.base_step, "a push of this worker may have counted since, and be forgotten")
    if aggregation.staleness_max is not None and staleness > aggregation.staleness_max:
        raise _too_late(session, key.base_step, f"{staleness} steps ago, more than {aggregation.staleness_max}")
    waits = aggregation.policy is aggregations.Policy.WAIT
    if waits and not pacing.keeps(session, key.worker, key.base_step):
        raise _too_late(session, key.base_step, "others would be too late after this one")


def _too_late(session: records.Session, base_step: int, why: str) -> errors.StaleStepError:
    kind = errors.StepClosedError if session.aggregation.gathers else errors.StaleStepError
    return kind(
        f"session {session.name!r}: gradients of step {base_step}, but the session is at {session.step}: {why}; read "
        "the parameters and compute again",
        subject="base_step",
        expected=str(session.step),
        got=str(base_step),
        step=session.step,
    )


def _must_be_at(session: records.Session, base_step: int) -> None:
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
