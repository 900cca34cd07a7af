"""Digests of payloads: what tells a retry from another push, at a fraction of the cost of copying the bytes.

The payload, padded with zeros, is read as rows of 4,096 bytes: 512 little-endian words of 64 bits, or 1,024 of 32 bits.
A digest is the CRC-32 of the row sums (of 64-bit words) and the CRC-32 of the column sums (of 32-bit words, so that no
top bit is lost), both modulo 2**64 and little-endian. Another payload has the same digest only if all its row sums and
all its column sums coincide, or by the chance of a 64-bit hash. Not cryptographic: whoever may push may push anything.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from optwire_proto import sessions

ROW_BYTES = 4096
_WORD = np.dtype("<u8")
_HALF_WORD = np.dtype("<u4")


class Digester:
    """Takes a payload piece by piece."""

    def __init__(self) -> None:
        self._length = 0
        self._rows_crc32 = 0
        self._columns = np.zeros(ROW_BYTES // _HALF_WORD.itemsize, _WORD)
        self._rest = b""  # the start of a row that is not whole yet

    def update(self, data: bytes | memoryview) -> None:
        """Takes the next piece, bytes or a view of bytes; cheapest where pieces are whole rows."""
        view = memoryview(data)
        self._length += view.nbytes
        if self._rest:
            missing = ROW_BYTES - len(self._rest)
            self._rest += view[:missing]
            if len(self._rest) < ROW_BYTES:
                return
            self._add(np.frombuffer(self._rest, np.uint8))
            view = view[missing:]
        whole = view.nbytes // ROW_BYTES * ROW_BYTES
        if whole:
            self._add(np.frombuffer(view, np.uint8, whole))
        self._rest = bytes(view[whole:])

    @property
    def length(self) -> int:
        """Bytes that came so far."""
        return self._length

    def digest(self) -> sessions.Digest:
        """Of what came so far; nothing may be added afterwards."""
        if self._rest:
            self._add(np.frombuffer(self._rest.ljust(ROW_BYTES, b"\0"), np.uint8))
            self._rest = b""
        return sessions.Digest(self._length, self._rows_crc32, zlib.crc32(self._columns.data))

    def _add(self, whole_rows: npt.NDArray[np.uint8]) -> None:
        rows = whole_rows.reshape(-1, ROW_BYTES)
        self._rows_crc32 = zlib.crc32(rows.view(_WORD).sum(axis=1, dtype=_WORD).data, self._rows_crc32)
        self._columns += rows.view(_HALF_WORD).sum(axis=0, dtype=_WORD)


def digest(data: bytes) -> sessions.Digest:
    """The digest of a whole payload."""
    digester = Digester()
    digester.update(data)
    return digester.digest()
