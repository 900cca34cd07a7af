"""Gradients of a step: which there are, and which make no step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from optwire.torch import arrays, leaves, recipes, translation
from optwire_proto import errors, tensors

# What None in the place of a gradient may mean.
MISSING: Final = ("skip", "error")


def gathered(of: Sequence[leaves.Leaf], missing: str, factor: float = 1.0) -> dict[str, tensors.Array]:
    """The gradients that there are, by leaf; not copied where they lie as they travel.

    Args:
      of: all leaves.
      missing: one of ``MISSING``.
      factor: what they are multiplied by, where that is not 1.

    Raises:
      InvalidArgumentError: one is missing, and that is an error.
      UnsupportedError: one is sparse.
    """
    found = {}
    for leaf in of:
        if leaf.parameter.grad is not None:
            gradient = leaf.parameter.grad if factor == 1 else leaf.parameter.grad * factor
            found[leaf.name] = arrays.to_numpy(gradient, leaf.name)
        elif missing == "error":
            raise errors.InvalidArgumentError(
                f"parameter {leaf.name!r} has no gradient, and missing_grad is 'error'", subject=leaf.name
            )
    return found


def loss(returned: Any, *, is_wanted: bool) -> float | None:
    """What a closure returned as a number, where the optimizer asks for the loss.

    Raises:
      InvalidArgumentError: there is none, or it is no number.
    """
    if not is_wanted:
        return None
    value = returned.detach() if isinstance(returned, torch.Tensor) else returned
    return recipes.floats(
        "nothing" if value is None else value, "step: the spec asks for the loss, which closure returns", 1
    )[0]


def refuse_phantom(groups: recipes.Groups, grads: Mapping[str, tensors.Array]) -> None:
    """Tools that have optimizers initialize their state step with zeros; here that would be a step of the session."""
    rates = [group[translation.RATE] for group in groups]
    is_still = all(rate == (0.0,) for rate in (recipes.floats(rate, "lr", 1) for rate in rates))
    if is_still and not any(arrays.widened(grad).any() for grad in grads.values()):
        raise errors.InvalidArgumentError(
            "step: every learning rate and every gradient is 0, which changes no parameter but counts as a step and "
            "decays moments; give allow_zero=True to RemoteOptimizer if it is meant",
            subject="allow_zero",
        )
