"""Where the leaves of a payload lie in memory: in landing buffers, in shared memory, and in what parameters leave in.

Pure: offsets and lengths, no memory. A layout is made with a session and stays, whatever becomes of its blocks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from optwire_proto import limits, trees


@dataclasses.dataclass(frozen=True)
class Layout:
    """Byte offsets of leaves in a buffer.

    Attributes:
      offsets: where each leaf starts.
      nbytes: length of the buffer, a multiple of 64 bytes.
      gaps: (start, stop) of what is read beside leaves, and must be zero: the padding of last blocks.
    """

    offsets: tuple[int, ...]
    nbytes: int
    gaps: tuple[tuple[int, int], ...] = ()

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.offsets, self.nbytes, self.gaps))

    def __hash__(self) -> int:
        """Taken once: there may be tens of thousands of offsets."""
        return self._hash

    def without(self, absent: Sequence[int]) -> Layout:
        """The same buffer for a payload that lacks leaves, by position."""
        gone = frozenset(absent)
        kept = tuple(offset for index, offset in enumerate(self.offsets) if index not in gone)
        return Layout(kept, self.nbytes, self.gaps)


def aligned(tree: trees.TreeSpec) -> Layout:
    """Every leaf on a 64-byte boundary, in order."""
    *offsets, total = tree.aligned_offsets
    return Layout(tuple(offsets), total)


def padded(nbytes: int) -> int:
    """A length up to the next 64-byte boundary."""
    return -(-nbytes // limits.ALIGNMENT_BYTES) * limits.ALIGNMENT_BYTES
