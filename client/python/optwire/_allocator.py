"""The C library's allocator, where chunks come and go: see docs/adr/0011-allocator-of-the-client.md."""

from __future__ import annotations

import functools

from optwire_proto import limits

# The longest block that glibc maps by itself and learns from, less what it puts around it.
_BLOCK_BYTES = 32 * limits.MIB - 64 * limits.KIB


@functools.cache
def warm_up() -> None:
    """Lets glibc keep blocks of a megabyte for the next use, as it does once a program has freed a large one.

    Until then it maps each anew and hands it back when it is freed: two system calls and 256 page faults a chunk. One
    block is made and freed, its memory never touched; the C library draws its own conclusion. What somebody has set by
    ``mallopt`` or ``GLIBC_TUNABLES`` stays as it is set. Other C libraries think nothing of it. Once a process.
    """
    bytes(_BLOCK_BYTES)
