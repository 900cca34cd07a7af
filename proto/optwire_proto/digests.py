"""Digests of payloads: what tells a retry from another push, at a fraction of the cost of copying the bytes.

The payload is cut into blocks of 4,096 bytes, the last one padded with zeros, and each block is summed as 64-bit
little-endian words modulo 2**64. A digest is the sum of the block sums, and the sum of the block sums weighted by the
block's number (from 1), both modulo 2**64. Integer sums are the same in every order, so that they may be taken while
bytes arrive, by several threads, or on a device. Not cryptographic: whoever may push may push anything.
"""

from __future__ import annotations

import numpy as np

from optwire_proto import sessions

BLOCK_BYTES = 4096
_WORD = np.dtype("<u8")
_MODULUS = 2**64


class Digester:
    """Takes a payload piece by piece."""

    def __init__(self) -> None:
        self._length = 0
        self._blocks = 0
        self._sum = 0
        self._weighted_sum = 0
        self._rest = b""  # the start of a block that is not whole yet

    def update(self, data: bytes) -> None:
        """Takes the next piece; cheapest where pieces are whole blocks."""
        self._length += len(data)
        if self._rest:
            data = self._rest + data
        whole = len(data) // BLOCK_BYTES * BLOCK_BYTES
        self._add(np.frombuffer(data, _WORD, whole // _WORD.itemsize))
        self._rest = data[whole:]

    def digest(self) -> sessions.Digest:
        """Of what came so far; nothing may be added afterwards."""
        if self._rest:
            self._add(np.frombuffer(self._rest.ljust(BLOCK_BYTES, b"\0"), _WORD))
            self._rest = b""
        return sessions.Digest(self._length, self._sum, self._weighted_sum)

    def _add(self, words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        sums = words.reshape(-1, BLOCK_BYTES // _WORD.itemsize).sum(axis=1, dtype=np.uint64)
        numbers = np.arange(self._blocks + 1, self._blocks + 1 + sums.size, dtype=np.uint64)
        self._blocks += sums.size
        self._sum = (self._sum + int(sums.sum())) % _MODULUS
        self._weighted_sum = (self._weighted_sum + int((sums * numbers).sum())) % _MODULUS


def digest(data: bytes) -> sessions.Digest:
    """The digest of a whole payload."""
    digester = Digester()
    digester.update(data)
    return digester.digest()
