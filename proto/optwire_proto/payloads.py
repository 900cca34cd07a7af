"""Arrays as the pieces of a payload, for both ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from optwire_proto import limits, tensors


def views(arrays: Iterable[tensors.Array]) -> Iterator[list[memoryview]]:
    """The bytes of arrays in order, in pieces of CHUNK_BYTES but for the last; each as views that copy nothing.

    Empties a list as it goes, and holds on to no array once it is exhausted: on the server they are views of a
    session's state, which the next update cannot write over while a view is alive. Each list that is yielded is emptied
    before the next is made, for the same reason.
    """
    piece: list[memoryview] = []
    room = limits.CHUNK_BYTES
    for array in taken(arrays):
        view = tensors.wire_bytes(tensors.wire_array(array, "params")[1])
        start, size = 0, view.nbytes
        while start < size:
            piece.append(view[start : start + room])
            count = piece[-1].nbytes
            start += count
            room -= count
            if room == 0:
                yield piece
                piece.clear()
                room = limits.CHUNK_BYTES
    if piece:
        yield piece
        piece.clear()


def taken(arrays: Iterable[tensors.Array]) -> Iterator[tensors.Array]:
    """Arrays in order; a list is emptied as it goes."""
    if not isinstance(arrays, list):
        yield from arrays
        return
    arrays.reverse()
    while arrays:
        yield arrays.pop()


def pieces(arrays: list[tensors.Array]) -> Iterator[bytes]:
    """As ``views``, but each piece is copied."""
    return map(b"".join, views(arrays))
