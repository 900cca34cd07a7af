"""Which of the model's parameters are known to be the server's, and what goes up of those that are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from optwire.torch import arrays, leaves
from optwire_proto import tensors


class Mirror:
    """What parameters looked like when the server had the same, and what is to replace the server's own of 32 bits.

    Attributes:
      masters: parameters in the server's width by leaf that were loaded and not yet sent.
    """

    def __init__(self) -> None:
        self.masters: dict[str, tensors.Array] = {}
        self._fingerprints: dict[str, tuple[int, int]] = {}

    def remember(self, of: Iterable[leaves.Leaf]) -> None:
        """These are the server's now."""
        for leaf in of:
            self._fingerprints[leaf.name] = arrays.fingerprint(leaf.parameter)
            self.masters.pop(leaf.name, None)

    def forget(self) -> None:
        """Nothing is known any more, and everything is to be compared."""
        self._fingerprints = {}

    @property
    def is_blank(self) -> bool:
        """Whether nothing is known of any parameter."""
        return not self._fingerprints

    def written(self, of: Iterable[leaves.Leaf]) -> list[leaves.Leaf]:
        """Those that somebody may have written to, or that have something to be sent."""
        return [
            leaf
            for leaf in of
            if leaf.name in self.masters or self._fingerprints.get(leaf.name) != arrays.fingerprint(leaf.parameter)
        ]

    def changed(
        self,
        written: Iterable[leaves.Leaf],
        held: Mapping[str, tensors.Array],
        kept: Callable[[tensors.Array], tensors.Array],
    ) -> dict[str, tensors.Array]:
        """What has to go up, by leaf, in the server's width.

        A parameter of 16 bits that is what the server would send stays there, with the 32 bits behind it.

        Args:
          written: of ``written``.
          held: what the server would send, by leaf.
          kept: brings an array to the width of the server.
        """
        found = {}
        for leaf in written:
            master = self._master(leaf)
            if master is not None:
                found[leaf.name] = master
            elif not arrays.is_same(leaf.parameter, held[leaf.name]):
                found[leaf.name] = kept(arrays.to_numpy(leaf.parameter, leaf.name))
        return found

    def wide(self, leaf: leaves.Leaf, held: torch.Tensor) -> torch.Tensor:
        """A parameter in the server's width as it will be there at the next step.

        Args:
          leaf: which one.
          held: what the server has.
        """
        master = self._master(leaf)
        if master is not None:
            return arrays.from_numpy(master)
        own = leaf.parameter.detach().cpu()
        is_other = bool(self.written([leaf])) and not torch.equal(held.to(own.dtype), own)
        return own.to(held.dtype) if is_other else held

    def _master(self, leaf: leaves.Leaf) -> tensors.Array | None:
        """What was loaded for a leaf, where it still is what the parameter was rounded from."""
        master = self.masters.get(leaf.name)
        if master is None or not torch.equal(arrays.from_numpy(master).to(leaf.parameter), leaf.parameter):
            return None
        return master
