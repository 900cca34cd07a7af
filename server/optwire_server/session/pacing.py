"""Bounded staleness where pushes wait: which ones may be applied now, so that none is ever too stale.

Each push is a step. A worker whose parameters are of step b, and which is the (i + 1)th from now to be applied, is
applied at step + i at the earliest; so the workers keep the bound if, taken with the oldest parameters first,

    step + i - b[i] <= staleness_max        for i = 0, 1, 2 ...

A push is applied as soon as this holds for all others after it, and waits until then. The one on the oldest parameters
never waits, so nothing gets stuck; and as a worker's next parameters are the newest, there may be staleness_max + 1
workers, and no more.
"""

from __future__ import annotations

from optwire_server.session import records


def is_due(session: records.Session, worker: str) -> bool:
    """Whether a worker's push may be applied now."""
    bases = _bases(session)
    bases.pop(worker, None)
    return _fit(sorted(bases.values()), session.step + 1, _bound(session))


def next_due(session: records.Session) -> str | None:
    """The first of the workers whose pushes wait, that waits for nobody any more; in the order in which they came."""
    return next((worker for worker in session.gathered if is_due(session, worker)), None)


def keeps(session: records.Session, worker: str, base_step: int) -> bool:
    """Whether all workers keep the bound with a push of one of them on the parameters of a step."""
    bases = _bases(session) | {worker: base_step}
    return _fit(sorted(bases.values()), session.step, _bound(session))


def slowest(session: records.Session) -> frozenset[str]:
    """The workers that others wait for: those on the oldest parameters, that have not pushed."""
    if not session.gathered:
        return frozenset()
    bases = _bases(session)
    still = {worker: base for worker, base in bases.items() if worker not in session.gathered}
    return frozenset(worker for worker, base in still.items() if base == min(still.values()))


def _bases(session: records.Session) -> dict[str, int]:
    """What each worker that counts has: it is live, or a push of it waits, on parameters that may be older."""
    live = {worker: member.base_step for worker, member in session.members.items() if member.is_live}
    return live | {worker: pushed.key.base_step for worker, pushed in session.gathered.items()}


def _bound(session: records.Session) -> int:
    bound = session.aggregation.staleness_max
    assert bound is not None, "a bound is part of the mode"
    return bound


def _fit(bases: list[int], step: int, bound: int) -> bool:
    return all(step + index - base <= bound for index, base in enumerate(bases))
