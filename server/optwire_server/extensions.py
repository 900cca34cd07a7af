"""A session that takes the place of another one, with more leaves: what it must have, and what it takes over."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from optwire_proto import aggregations, errors, sessions, trees
from optwire_server import states
from optwire_server.engine import device, program
from optwire_server.engine import engine as engines
from optwire_server.live import LiveSession
from optwire_server.session import admission, members


def check(old: LiveSession, extends: sessions.Extension, name: str, tree: trees.TreeSpec) -> None:
    """Checks a session that is to extend ``old``.

    Raises:
      SessionNotFoundError, SessionFailedError: there is nothing to extend.
      IncarnationError, OutOfStepError: the old session has moved on since the client looked.
      InvalidArgumentError: another name.
      TreeMismatchError: a leaf of the old session is missing, or has another shape or element type.
    """
    admission.admit_extension(old.machine, extends)
    if name not in ("", old.machine.name):
        raise errors.InvalidArgumentError(
            f"name: {name!r}, expected {old.machine.name!r}, the name of the session that is extended, or none",
            subject="name",
            expected=old.machine.name,
            got=name,
        )
    new = {leaf.name: leaf for leaf in tree.leaves}
    for leaf in old.tree.leaves:
        if leaf.name not in new:
            raise errors.TreeMismatchError(
                f"params[{leaf.name!r}]: missing, expected every leaf of session {old.machine.name!r}",
                subject=leaf.name,
                expected="every leaf of the session that is extended",
                got="missing",
            )
        states.check_form("params", new[leaf.name], leaf)


def check_closed(old: LiveSession, compiled: program.Program) -> None:
    """Raises InvalidArgumentError where pushes wait in sums for a step to close, in the old session or the new one.

    New leaves have no part in such sums, and another number of pushes to a step gives them another meaning.
    """
    step, skipped = old.machine.step, old.machine.skipped
    mine = _skipped(old, compiled)
    for whose, gathered, every in (
        ("the session's optimizer", old.plan.gathered(step, skipped), old.plan.program.every),
        ("the new optimizer", (step - mine * compiled.forfeits) % compiled.every, compiled.every),
    ):
        if gathered:
            raise errors.InvalidArgumentError(
                f"session {old.machine.name!r}: is to be extended at step {step}, where {whose} is {gathered} of "
                f"{every} pushes into an update; extend it where accumulate.k pushes have closed one",
                subject="accumulate.k",
                expected=f"{every} of {every} pushes",
                got=f"{gathered} of {every} pushes",
                step=step,
            )


def _skipped(old: LiveSession, compiled: program.Program) -> int:
    """The skipped pushes that a new session counts on with; no more than its step allows."""
    return min(old.machine.skipped, old.machine.step // compiled.forfeits)


def terms(asked: sessions.Terms, old: LiveSession | None, aggregation: aggregations.Aggregation) -> sessions.Terms:
    """What a new session has beside tree and optimizer: as it was asked for, or as in the session that it extends.

    Where it extends none, and asks for no ``aggregation``, it has the one given here.
    """
    return asked.after(old.terms if old else dataclasses.replace(sessions.USUAL, aggregation=aggregation))


def shared(old: LiveSession, new: LiveSession) -> list[tuple[int, int]]:
    """Positions, in both states, of the arrays that have one name, shape and element type."""
    theirs = {leaf: position for position, leaf in enumerate(states.arrays(old))}
    return [(theirs[leaf], position) for position, leaf in enumerate(states.arrays(new)) if leaf in theirs]


def take_over(
    engine: engines.Engine,
    old: LiveSession,
    new: LiveSession,
    extends: sessions.Extension,
    pairs: Sequence[tuple[int, int]],
    check_growth: engines.Room,
) -> device.Work[None]:
    """In the session's turn: gives a new session what is shared, and the step of the old one, which keeps its state.

    Raises:
      OptwireError: as ``check``, where the old session has moved on meanwhile; the new one is as it was.
    """
    admission.admit_extension(old.machine, extends)
    yield from engine.carry(old.held, new.held, pairs, check_growth)
    new.machine = dataclasses.replace(
        new.machine,
        incarnation=old.machine.incarnation + 1,
        step=old.machine.step,
        skipped=_skipped(old, new.plan.program),
        members=members.after(old.machine, new.machine.aggregation),
        forgotten_epoch=old.machine.forgotten_epoch,
    )
