"""The compiled updates that outlive a server: XLA's own cache, in a folder that nobody else can write.

What lies there is machine code that the next server runs, so a folder that others could have filled is not used.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import stat

import jax

from optwire_proto.limits import MIB

# The oldest files beyond this are removed when a server starts; an update takes 5 KiB to 1 MiB.
_BYTES_MAX = 512 * MIB

_log = logging.getLogger("optwire.engine")


def default_folder() -> pathlib.Path:
    """Where compiled updates are kept unless an operator says otherwise: in the user's folder for caches."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(base, "optwire", "compiled")


def keep(folder: pathlib.Path) -> bool:
    """Keeps what this process compiles in a folder, and looks there first; returns whether it can.

    An environment that names a folder for JAX itself is left as it is.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return True
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as exc:
        _log.info("compiled updates are not kept: %s", exc)
        return False
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or not os.access(folder, os.W_OK):
        _log.warning("compiled updates are not kept: %s must be writable by this user, and by nobody else", folder)
        return False
    _prune(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # What is kept is small, and reading it takes a hundredth of what compiling does.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return True


def _prune(folder: pathlib.Path) -> None:
    """Removes the oldest files beyond ``_BYTES_MAX``; others may do the same at the same time."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            found = path.stat()
            files.append((found.st_mtime, found.st_size, path))
    left = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if left <= _BYTES_MAX:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            left -= size
