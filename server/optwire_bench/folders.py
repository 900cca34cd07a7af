"""Folders of a run: gone when it ends, and cleared away by the next one where it was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator

_PREFIX = "optwire-bench-"
# Memory, where writing does not go on for a while as it does on a disk.
_MEMORY = "/dev/shm"
# A folder is locked right after it was made; whoever finds an older one without a lock finds that its run is gone.
_YOUNG_S = 60.0


@contextlib.contextmanager
def folder(*, scratch_bytes: int = 0) -> Iterator[pathlib.Path]:
    """A new folder, until the end of the context.

    Args:
      scratch_bytes: of files that are to be in memory, if there is room; a container may have very little.

    Raises:
      OSError: there is no room on the disk either.
    """
    where = _MEMORY if scratch_bytes and _free_bytes(_MEMORY) >= scratch_bytes else tempfile.gettempdir()
    if _free_bytes(where) < scratch_bytes:
        raise OSError(
            f"{where}: {_free_bytes(where):,} bytes are free, {scratch_bytes:,} are needed; TMPDIR says another"
        )
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=where, ignore_cleanup_errors=True) as made:
        lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield pathlib.Path(made)
        finally:
            os.close(lock)


def sweep() -> None:
    """Clears away the folders of runs that are gone."""
    for where in {_MEMORY, tempfile.gettempdir()}:
        for found in pathlib.Path(where).glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):  # another user's, or somebody else was faster
                _sweep(found)


def _sweep(found: pathlib.Path) -> None:
    if found.is_symlink() or time.time() - found.stat().st_mtime < _YOUNG_S:
        return
    lock = os.open(found, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(found)
    finally:
        os.close(lock)


def _free_bytes(where: str) -> int:
    """That this process may write there; 0 where it may not."""
    if not os.access(where, os.W_OK):
        return 0
    space = os.statvfs(where)
    return space.f_bavail * space.f_frsize
