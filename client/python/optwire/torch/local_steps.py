"""Local steps of a torch module, with an exchange of parameters now and then. Knows tensors, and no server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from optwire import _local_steps, _session
from optwire.torch import arrays
from optwire_proto import errors, tensors, trees


class LocalSteps:
    """Trains a module in steps of one's own, and exchanges its parameters with a session now and then.

    The same as ``optwire.LocalSteps``, in place: what is exchanged is written to the module's own memory, and the inner
    optimizer goes on with its state. Buffers, such as those of batch norm, are not exchanged.

    Example:
      >>> from optwire.torch import LocalSteps, tree_of
      >>> session = client.create_session(  # doctest: +SKIP
      ...     tree_of(model.named_parameters()), opt.nesterov(0.7, 0.9), aggregation="sync(4)"
      ... )
      >>> local = LocalSteps(model.named_parameters(), session, every=50)  # doctest: +SKIP
      >>> for batch in batches:  # doctest: +SKIP
      ...     loss(model, batch).backward()
      ...     inner.step()
      ...     local.step()

    Args:
      named_parameters: (name, parameter) pairs; each is a leaf of the session of its name. They get the session's
        values at once.
      session: as ``optwire.LocalSteps`` takes it, and all that follows.
      every: local steps between two pushes of a leaf.
      fragments: into how many parts the leaves are divided, or a pattern of names for each.
      delay: local steps between a push and when its parameters are taken.
      mixing: share of one's own parameters that is kept then.

    Raises:
      InvalidArgumentError: a number that cannot be.
      SpecError: patterns that mean no leaf, or leave one out.
      TreeMismatchError: parameters that are not the session's leaves.
      TreeError, UnsupportedError: a parameter that cannot be served.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.Tensor]],
        session: _session.Session,
        *,
        every: int,
        fragments: int | Sequence[str] = 1,
        delay: int = 0,
        mixing: float = 0.0,
    ) -> None:
        self._exchange = _local_steps.Exchange(session, every=every, fragments=fragments, delay=delay, mixing=mixing)
        self._parameters = _in_order(session._tree, dict(named_parameters))
        self._write(dict(enumerate(self._exchange.params())))

    @property
    def late_count(self) -> int:
        """Pushes that came too late, and were dropped."""
        return self._exchange.late_count

    @property
    def local_steps(self) -> int:
        """Local steps made so far."""
        return self._exchange.local_steps

    def reset(self) -> None:
        """Reads the session's newest parameters into the module; as ``optwire.LocalSteps.reset``."""
        self._write(dict(enumerate(self._exchange.reset())))

    def step(self, *, weight: float = 1.0, loss: float | None = None) -> bool:
        """Says that a local step was made; raises as ``optwire.LocalSteps.step``, and is as safe to repeat.

        Args:
          weight: of a push, as ``Session.step`` takes it.
          loss: of a push, as ``Session.step`` takes it.

        Returns:
          Whether parameters were written to.
        """
        received = self._exchange.advance(self._read, weight=weight, loss=loss)
        self._write(received)
        return bool(received)

    def _read(self, leaves: Sequence[int]) -> list[tensors.Array]:
        named = ((self._exchange.session._tree.leaves[index].name, self._parameters[index]) for index in leaves)
        return [tensors.wire_array(arrays.to_numpy(parameter, name), name)[1] for name, parameter in named]

    def _write(self, received: _local_steps.Received) -> None:
        for index, array in received.items():
            arrays.write(self._parameters[index], array)


def tree_of(named_parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, tensors.Array]:
    """Parameters as what a session is created from: copies by name.

    Raises:
      TreeError, UnsupportedError: a parameter that cannot be served.
    """
    return {name: _copy(name, parameter) for name, parameter in named_parameters}


def _copy(name: str, parameter: torch.Tensor) -> tensors.Array:
    arrays.leaf(name, parameter)
    return arrays.to_numpy(parameter, name).copy()


def _in_order(tree: trees.TreeSpec, parameters: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The parameters in the order of the session's leaves.

    Raises:
      TreeMismatchError: one is missing or unknown, or of another shape or element type.
    """
    here = {name: arrays.leaf(name, parameter) for name, parameter in parameters.items()}
    there = {leaf.name: leaf for leaf in tree.leaves}
    for name in [*there, *here]:
        ours, theirs = here.get(name), there.get(name)
        if ours != theirs:
            raise errors.TreeMismatchError(
                f"parameter {name!r}: {_shown(ours)}, expected {_shown(theirs)}, as in the session",
                subject=name,
                expected=_shown(theirs),
                got=_shown(ours),
            )
    return [parameters[leaf.name] for leaf in tree.leaves]


def _shown(leaf: trees.LeafSpec | None) -> str:
    return "none" if leaf is None else f"{leaf.dtype} of shape {leaf.shape}"
