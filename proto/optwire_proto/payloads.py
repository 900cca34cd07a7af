"""Arrays as the pieces of a payload, for both ends."""

from __future__ import annotations

from collections.abc import Iterator

from optwire_proto import limits, tensors


def pieces(arrays: list[tensors.Array]) -> Iterator[bytes]:
    """The bytes of arrays in order, in pieces of CHUNK_BYTES but for the last; copies one piece at a time.

    Empties ``arrays`` as it goes and holds on to none of them once it is exhausted: on the server they are views of a
    session's state, which the next update cannot write over while a view is alive.
    """
    views: list[memoryview] = []
    room = limits.CHUNK_BYTES
    arrays.reverse()
    while arrays:
        view = tensors.wire_bytes(tensors.wire_array(arrays.pop(), "params")[1])
        start = 0
        while start < view.nbytes:
            views.append(view[start : start + room])
            start += views[-1].nbytes
            room -= views[-1].nbytes
            if room == 0:
                piece = b"".join(views)
                views, room = [], limits.CHUNK_BYTES
                yield piece
    if views:
        piece = b"".join(views)
        views.clear()
        yield piece
