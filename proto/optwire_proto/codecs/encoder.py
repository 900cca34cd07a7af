"""Payloads that are cast on their way out, without being held as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from optwire_proto import limits, payloads, tensors
from optwire_proto.codecs import casts, codec


def views(how: codec.Codec, arrays: Iterable[tensors.Array]) -> Iterator[list[memoryview]]:
    """The bytes of arrays in order, as ``payloads.views``, cast where ``how`` is a codec that casts.

    The memory of what is yielded is used again for what comes next.
    """
    if not isinstance(how, casts.Cast):
        yield from payloads.views(arrays)
        return
    buffer = np.empty(limits.CHUNK_BYTES, np.uint8)
    used = 0
    for given in payloads.taken(arrays):
        name, array = tensors.wire_array(given, "params")
        rest = array.reshape(-1)
        is_cast = how.bears_on(name)
        if not is_cast:
            rest = rest.view(np.uint8)
        width = 2 if is_cast else 1
        while rest.size:
            # A value that does not fit any more begins the next piece, unless the piece must be full.
            count = min(rest.size, (buffer.size - used) // width)
            target = buffer[used : used + count * width]
            if is_cast:
                how.cast(rest[:count], target.view(np.uint16))
            else:
                target[:] = rest[:count]
            used += target.size
            rest = rest[count:]
            if used > buffer.size - 2:
                yield [buffer[:used].data]
                used = 0
        del given, array, rest  # views of a session's state must not be held on to
    if used:
        yield [buffer[:used].data]
