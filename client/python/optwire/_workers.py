"""The command ``optwire workers``: who works on a session, and for whom its next step waits."""

from __future__ import annotations

import sys

from optwire import _client
from optwire_proto import errors, limits, sessions

_HEADINGS = ("worker", "epoch", "state", "seq", "base_step", "pushed", "awaited", "silent")


def show(name: str, target: str, timeout_s: float) -> int:
    """Prints a table of a session's workers; returns the exit code: 0, or 2 where the server gave no answer."""
    try:
        with _client.connect(target, timeout=timeout_s) as client:
            info, workers = client._workers(name)
    except errors.OptwireError as exc:
        print(f"optwire workers: {exc}", file=sys.stderr)
        return 64 if isinstance(exc, errors.InvalidArgumentError) else 2
    print(f"session {info.name!r}: {info.aggregation}, step {info.step}")
    rows = [_HEADINGS, *map(_row, workers)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


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
