"""Pushes whose gradients come by rows: what they must be, and what they are made ready with and answered with."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NoReturn

from optwire_proto import aggregations, codecs, errors, rows, sessions, tensors
from optwire_server.engine import device, landing, lazy, mean, program
from optwire_server.engine import engine as engines
from optwire_server.engine import rows as sparse
from optwire_server.live import LiveSession, Params


def check(live: LiveSession, options: sessions.PushOptions) -> None:
    """Raises InvalidArgumentError, or UnsupportedError, unless a session can take such a push."""
    rows.check(live.tree, options.rows)
    aggregation = live.machine.aggregation
    used = [str(codec) for codec in (live.grads_codec, live.params_codec) if codec != codecs.RAW]
    if options.absent:
        raise _refused(live, "absent leaves", "no rows of a leaf, which leave it as it is")
    if options.reply is sessions.ReplyContent.UPDATES:
        raise _refused(live, "reply 'updates'", "reply 'params' or 'none'")
    if options.telemetry and not options.rows_exact:
        raise _refused(live, "telemetry", "an exact update, or no telemetry")
    if used:
        raise _refused(live, f"codecs ({', '.join(used)})", "a session of f32 both ways")
    if aggregation.mode is aggregations.Mode.BUFFERED or aggregation.compensation:
        raise _refused(live, f"aggregation {aggregation}", "another, or one without compensation")


def refuse_way(live: LiveSession, what: str) -> NoReturn:
    """Raises UnsupportedError for a way that such pushes do not come by."""
    raise _refused(live, what, "a payload in messages")


def _refused(live: LiveSession, what: str, expected: str) -> errors.UnsupportedError:
    return errors.UnsupportedError(
        f"session {live.machine.name!r}: a push by rows with {what}, expected {expected}",
        subject="rows",
        expected=expected,
        got=what,
    )


def prepare(live: LiveSession, options: sessions.PushOptions, variant: program.Variant) -> None:
    """Compiles what an update of rows needs beside its variant; raises UnsupportedError where it cannot be lazy."""
    if options.rows_exact:
        return
    compiled = live.plan.program
    if why := lazy.problem(compiled, variant):
        raise errors.UnsupportedError(
            f"session {live.machine.name!r}: a lazy update of rows, but its optimizer {why}; push with rows='exact'",
            subject="rows",
            expected="an exact update",
            got="a lazy one",
        )
    whole = [leaf.elements for leaf in live.tree.leaves]
    for position, count in options.rows:
        leaf = live.tree.leaves[position]
        whole[position] = count * (leaf.elements // max(leaf.shape[0], 1))
    lazy.prepare(compiled, sum(whole) * max(live.machine.aggregation.workers, 1))


def land(landings: landing.Landings, live: LiveSession, options: sessions.PushOptions) -> landing.Landing:
    """Lends the landing for the payload of such a push; as ``Landings.land``."""
    kind = functools.partial(sparse.RowLanding, live.tree, options.rows)
    return landings.land_as(kind, rows.payload_tree(live.tree, options.rows), None, 0)


def params(engine: engines.Engine, live: LiveSession, lent: landing.Landing) -> device.Work[Params]:
    """What the reply to such a push carries: of leaves that came by rows, those rows; copies."""
    assert isinstance(lent, sparse.RowLanding), "a push by rows has a landing of its own"
    return engine.read(live.held, "", lent.selected)


def joined(
    live: LiveSession, lent: Sequence[landing.Landing], factors: Sequence[float], divisor: float
) -> device.Work[sparse.Sparse]:
    """The gradients of several pushes by rows that make one step; as ``engine.rows.joined``."""
    return sparse.joined(live.tree, list(map(_sparse, lent)), factors, divisor)


def grads(lent: landing.Landing | mean.Gathered | sparse.Sparse) -> Iterable[tensors.Array]:
    """The gradients of a push, or of several, one array for each leaf that has any."""
    if isinstance(lent, sparse.Sparse):
        return lent.values
    if isinstance(lent, mean.Gathered):
        return lent.arrays()
    return _sparse(lent).values if isinstance(lent, sparse.RowLanding) else lent.arrays()


def _sparse(lent: landing.Landing) -> sparse.Sparse:
    assert isinstance(lent, sparse.RowLanding), "a push by rows has a landing of its own"
    return lent.sparse


def selected(live: LiveSession, wanted: rows.Wanted) -> list[sparse.Selected | None] | None:
    """The elements of each leaf that are to be read; None: all of all.

    Raises:
      InvalidArgumentError: as ``rows.unpacked`` says.
    """
    if not wanted:
        return None
    indices = rows.unpacked(live.tree, wanted)
    return [
        sparse.selected(leaf, indices[position]) if position in indices else None
        for position, leaf in enumerate(live.tree.leaves)
    ]


def nbytes(live: LiveSession, chosen: Sequence[sparse.Selected | None]) -> int:
    """Bytes of some elements."""
    return sum(
        found.size * tensors.itemsize(leaf.dtype)
        for leaf, found in zip(live.tree.leaves, chosen, strict=True)
        if found is not None
    )
