"""Landings of gradients that come encoded: they are decoded as they come, on the thread of the call that brings them.

By NumPy, in pieces that stay in the cache: it decodes as fast as memory is copied, so that handing pieces to a compiled
function and copying its results would take longer (docs/codecs.md has the figures).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from optwire_proto import codecs, sessions, trees
from optwire_server.engine import landing
from optwire_server.engine import layout as layouts


class Decoding(landing.Landing):
    """A landing whose chunks are those of an encoded payload; its arrays are the decoded values.

    Args:
      how: the codec.
      tree: of the gradients.
      layout: where its leaves lie, once decoded.
      memory: of ``layout.nbytes`` and ``codecs.scratch_bytes``, one after the other.
      give_back: called once, when it is closed.
    """

    def __init__(
        self,
        how: codecs.Codec,
        tree: trees.TreeSpec,
        layout: layouts.Layout,
        memory: np.ndarray,
        give_back: Callable[[], None],
    ) -> None:
        super().__init__(tree, layout, memory[: layout.nbytes], give_back)
        self._decoder = codecs.Decoder(how, tree.leaves, self.arrays(), "grads", memory[layout.nbytes :])

    @property
    def payload_bytes(self) -> int:
        """Length of the encoded payload."""
        return self._decoder.payload_bytes

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Decodes a chunk.

        Raises:
          PayloadError: the chunk is empty, leaves a gap, overlaps, or goes past the end.
        """
        self._check_chunk(offset, len(data))
        self._decoder.write(data)
        self._digester.update(data)
        self._received += len(data)

    def finish(self, digest: sessions.Digest) -> None:
        """Checks that all bytes came, came unharmed, and mean values.

        Raises:
          PayloadError: the payload ended early, its digest is another, or it is none of this codec.
        """
        super().finish(digest)
        self._decoder.check()

    def close(self) -> None:
        """Gives the memory back; may be called more than once."""
        self._decoder.close()
        super().close()
