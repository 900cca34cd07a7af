"""The command ``optwire workers``: who works on a session, and for whom its next step waits."""

from __future__ import annotations

from optwire import _client
from optwire_proto import limits, sessions

_HEADINGS = ("worker", "epoch", "state", "seq", "base_step", "pushed", "awaited", "silent")


def listing(name: str, target: str, *, timeout_s: float) -> str:
    """A table of a session's workers, as text; raises as the methods of ``Client`` do."""
    with _client.connect(target, timeout=timeout_s) as client:
        info, workers = client._workers(name)
    rows = [_HEADINGS, *map(_row, workers)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"session {info.name!r}: {info.aggregation}, step {info.step}", *lines])


def _row(worker: sessions.WorkerInfo) -> tuple[str, ...]:
    rank = int(worker.worker, 16)
    return (
        str(rank) if rank < limits.WORKERS_MAX else worker.worker,
        str(worker.epoch),
        str(worker.state),
        str(worker.seq),
        str(worker.base_step),
        "yes" if worker.has_pushed else "no",
        "yes" if worker.is_awaited else "no",
        f"{worker.silent_s:.1f} s",
    )
