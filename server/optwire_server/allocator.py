"""Tunes the C library's allocator for buffers of a megabyte that come and go. Linux with glibc only."""

from __future__ import annotations

import ctypes
import logging
import platform

from optwire_proto.limits import MIB

_log = logging.getLogger("optwire.allocator")

# Parameters of mallopt(3) and what they are set to. By default glibc maps every block beyond 128 KiB anew and hands it
# back when it is freed: two system calls and 256 page faults for each chunk of a payload.
_SETTINGS = (
    (-3, 8 * MIB),  # M_MMAP_THRESHOLD: blocks up to this size come from the heap
    (-1, 64 * MIB),  # M_TRIM_THRESHOLD: and this much of it is kept when free
    (-2, 4 * MIB),  # M_TOP_PAD: and it grows by this much at once
    (-8, 4),  # M_ARENA_MAX: heaps that many threads share, so that each thread does not keep its own
)


def tune() -> bool:
    """Sets the allocator of this process; returns whether it is one that can be set."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = all(mallopt(parameter, value) == 1 for parameter, value in _SETTINGS)
    if not done:
        _log.warning("the allocator refused a setting")
    return done
