"""The workers of a session: who is there, who is lost, who may come, and whom the open step waits for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from optwire_proto import aggregations, errors, limits, sessions
from optwire_server.session import pacing, records

_MODE = aggregations.Mode
_LIVE, _LOST, _LEFT = sessions.WorkerState.LIVE, sessions.WorkerState.LOST, sessions.WorkerState.LEFT
# Who is forgotten first where too many are known.
_GONE_FIRST = (_LEFT, _LOST, _LIVE)


def check_worker(session: records.Session, worker: str) -> None:
    """Raises InvalidArgumentError where a worker is none of those whose pushes make the steps of a session."""
    if not session.aggregation.includes(worker):
        most = session.aggregation.workers - 1
        raise errors.InvalidArgumentError(
            f"session {session.name!r}: worker {worker}, expected one of the workers 0 to {most}, as its steps are "
            f"of {session.aggregation}; attach(name, worker=rank)",
            subject="worker",
            expected=f"{sessions.worker_id(0)} to {sessions.worker_id(most)}",
            got=worker,
            step=session.step,
        )


def check_epoch(session: records.Session, worker: str, epoch: int) -> None:
    """Raises ReplacedError where another process has joined as a worker, or the one that did has left."""
    member = session.members.get(worker, records.Member(state=_LEFT))
    if epoch == member.epoch and (member.state is not _LEFT or not epoch):
        return
    if epoch > member.epoch or worker not in session.members:
        problem = "is not known to have joined"
    else:
        problem = "has left" if epoch == member.epoch else f"is in epoch {member.epoch}: another process has joined"
    raise _not_it(session, worker, epoch, problem)


def _not_it(session: records.Session, worker: str, epoch: int, problem: str) -> errors.ReplacedError:
    return errors.ReplacedError(
        f"session {session.name!r}: worker {worker} of epoch {epoch} {problem}; attach again",
        subject="worker",
        expected="the process that joined last",
        got=f"epoch {epoch}",
        step=session.step,
    )


def check_room(session: records.Session, worker: str) -> None:
    """Raises LimitError where a worker would be there that is not, and no more may be."""
    member = session.members.get(worker)
    if (member is not None and member.is_live) or worker in session.gathered:
        return
    aggregation = session.aggregation
    if not aggregation.waits:
        return  # nobody waits for anybody, and who never joined can be forgotten
    most = limits.WORKERS_MAX
    if aggregation.mode is _MODE.QUORUM:
        most = aggregation.workers
    elif aggregation.policy is aggregations.Policy.WAIT and aggregation.staleness_max is not None:
        most = min(most, aggregation.staleness_max + 1)
    there = {name for name, other in session.members.items() if other.is_live} | set(session.gathered)
    _check_count(session, len(there - {worker}), most)


def _check_count(session: records.Session, there: int, most: int) -> None:
    if there >= most:
        raise errors.LimitError(
            f"session {session.name!r}: {there} workers are there, the most for steps of {session.aggregation}",
            subject="workers",
            expected=f"at most {most} workers",
            got=str(there + 1),
            step=session.step,
        )


def joined(session: records.Session, worker: str, join_key: str, now_s: float) -> records.Session:
    """The session with a process that has joined as a worker: in a new epoch, unless this is a retry.

    Raises:
      InvalidArgumentError: a worker of no rank.
      LimitError: no more workers may be there.
      ReplacedError: a retry of a process that has left since.
    """
    check_worker(session, worker)
    before = session.members.get(worker, records.Member(state=_LEFT))
    if before.join_key == join_key:
        return heard(session, worker, before.epoch, now_s)
    check_room(session, worker)
    others = sum(member.is_live and member.epoch > 0 for name, member in session.members.items() if name != worker)
    _check_count(session, others, limits.WORKERS_MAX)
    epoch, base_step = max(before.epoch, session.forgotten_epoch) + 1, session.step
    return _with(session, worker, records.Member(_LIVE, epoch, join_key, base_step, now_s))


def heard(session: records.Session, worker: str, epoch: int, now_s: float) -> records.Session:
    """The session with a worker that is there, since it was heard of, whatever it was before.

    Raises:
      ReplacedError: it is not the one that joined last, or has left.
      LimitError: it was lost, and no more workers may be there.
    """
    check_worker(session, worker)
    check_epoch(session, worker, epoch)
    if worker not in session.members:
        raise _not_it(session, worker, epoch, "is not known to have joined")
    check_room(session, worker)
    before = session.members[worker]
    base_step = before.base_step
    if session.aggregation.policy is aggregations.Policy.WAIT and not before.is_live:
        # Others have gone on without it, and need not wait for parameters that are too old.
        base_step = base_step if pacing.keeps(session, worker, base_step) else session.step
    heard_s = max(before.heard_s, now_s)
    return _with(session, worker, dataclasses.replace(before, state=_LIVE, base_step=base_step, heard_s=heard_s))


def reading(session: records.Session, worker: str, epoch: int, now_s: float) -> records.Session:
    """The session with a worker that was given the newest parameters: the one that joined last, or nothing changes."""
    before = session.members.get(worker)
    if before is None or before.epoch != epoch or before.state is _LEFT:
        return session
    try:
        there = heard(session, worker, epoch, now_s)
    except errors.LimitError:
        return session  # it was lost, and others have its place
    return having(there, [worker], session.step)


def pushing(session: records.Session, worker: str, epoch: int, base_step: int, now_s: float) -> records.Session:
    """The session with a worker that has pushed gradients of a step, where the modes look at workers at all."""
    if session.aggregation.mode is _MODE.SINGLE and worker not in session.members:
        return session
    before = session.members.get(worker) or records.Member(epoch=epoch)
    base_step, heard_s = max(before.base_step, base_step), max(before.heard_s, now_s)
    return _with(session, worker, dataclasses.replace(before, state=_LIVE, base_step=base_step, heard_s=heard_s))


def left(session: records.Session, worker: str, epoch: int, now_s: float) -> records.Session:
    """The session without a worker, until it joins again; raises ReplacedError where another process is that worker."""
    check_worker(session, worker)
    before = session.members.get(worker) or records.Member()
    if (before.state, before.epoch) != (_LEFT, epoch):
        check_epoch(session, worker, epoch)
    if worker not in session.members and not session.aggregation.is_ranked:
        return session
    return _with(session, worker, dataclasses.replace(before, state=_LEFT, heard_s=max(before.heard_s, now_s)))


def after(old: records.Session, aggregation: aggregations.Aggregation) -> Mapping[str, records.Member]:
    """The workers of a session that takes the place of an old one; all must join anew where its rule is another."""
    if aggregation == old.aggregation:
        return {worker: dataclasses.replace(member, base_step=old.step) for worker, member in old.members.items()}
    return {worker: dataclasses.replace(member, state=_LEFT) for worker, member in old.members.items()}


def having(session: records.Session, workers: Iterable[str], base_step: int) -> records.Session:
    """The session with those of some workers that are there having the parameters of a step."""
    there = [worker for worker in workers if worker in session.members and session.members[worker].is_live]
    if not there:
        return session
    newer = {worker: dataclasses.replace(session.members[worker], base_step=base_step) for worker in there}
    return dataclasses.replace(session, members={**session.members, **newer})


def expired(session: records.Session, now_s: float) -> records.Session:
    """The session with the workers lost whose leases are over."""
    lease_s = session.aggregation.lease_s
    over = [worker for worker, member in session.members.items() if member.lost_s(lease_s) <= now_s]
    if not over:
        return session
    lost = {worker: dataclasses.replace(session.members[worker], state=_LOST) for worker in over}
    return dataclasses.replace(session, members={**session.members, **lost})


def next_lost_s(session: records.Session) -> float:
    """When the next lease will be over; infinite: none will."""
    lease_s = session.aggregation.lease_s
    return min((member.lost_s(lease_s) for member in session.members.values()), default=math.inf)


def missing(session: records.Session) -> int:
    """How many workers have not pushed that the open step waits for, of a mode that gathers."""
    gathered, members = session.gathered, session.members.items()
    if session.aggregation.is_ranked:
        gone = sum(not member.is_live and worker not in gathered for worker, member in members)
        return session.aggregation.workers - gone - len(gathered)
    return sum(member.is_live and worker not in gathered for worker, member in members)


def awaited(session: records.Session) -> tuple[str, ...]:
    """The workers that a step waits for, in the order of their ids."""
    aggregation, members = session.aggregation, session.members
    if session.phase is records.Phase.APPLYING:
        return ()
    if aggregation.policy is aggregations.Policy.WAIT:
        return tuple(sorted(pacing.slowest(session)))
    if not aggregation.gathers:
        return ()
    ranks = map(sessions.worker_id, range(aggregation.workers)) if aggregation.is_ranked else iter(members)
    there = (worker for worker in ranks if worker not in members or members[worker].is_live)
    return tuple(sorted(worker for worker in there if worker not in session.gathered))


def infos(session: records.Session, now_s: float) -> tuple[sessions.WorkerInfo, ...]:
    """What is known of each worker, in the order of their ids; of ranks, also of those that were never heard of."""
    aggregation = session.aggregation
    ranks = map(sessions.worker_id, range(aggregation.workers)) if aggregation.is_ranked else ()
    expected, waits_for = sessions.WorkerState.EXPECTED, frozenset(awaited(session))
    found = []
    for worker in sorted({*ranks, *session.members}):
        member, applied = session.members.get(worker), session.workers.get(worker)
        found.append(
            sessions.WorkerInfo(
                worker=worker,
                epoch=member.epoch if member else 0,
                state=member.state if member else expected,
                seq=applied.seq if applied else 0,
                base_step=member.base_step if member else 0,
                has_pushed=worker in session.gathered,
                is_awaited=worker in waits_for,
                silent_s=max(now_s - member.heard_s, 0.0) if member else 0.0,
            )
        )
    return tuple(found)


def _with(session: records.Session, worker: str, member: records.Member) -> records.Session:
    """The session with a worker as the one that was heard of last."""
    members, epoch = dict(session.members), session.forgotten_epoch
    members.pop(worker, None)
    members[worker] = member
    while len(members) > limits.WORKERS_MAX:
        gone = min(members, key=lambda name: (_GONE_FIRST.index(members[name].state), members[name].epoch > 0))
        epoch = max(epoch, members.pop(gone).epoch)
    return dataclasses.replace(session, members=members, forgotten_epoch=epoch)
