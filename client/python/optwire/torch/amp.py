"""Loss scaling: what a ``GradScaler`` leaves on an optimizer that divides by itself; how several ranks agree on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from optwire.torch import ranks
from optwire_proto import errors

CHOICES: Final = ("client", "server")


def mark(optimizer: Any, amp: str, distributed: str | None) -> None:
    """Has scalers call ``step`` always, and say on the optimizer what they know; not where they are to divide.

    Of several workers each has to call ``step`` always: the others wait for it.
    """
    if amp == "server" or (distributed == "workers" and ranks.world_size() > 1):
        optimizer._step_supports_amp_scaling = True


@contextlib.contextmanager
def cleared(optimizer: Any) -> Iterator[None]:
    """Where something is raised inside, what a scaler said is no longer on the optimizer; it says it anew each time."""
    try:
        yield
    except BaseException:
        for name in ("grad_scale", "found_inf"):
            vars(optimizer).pop(name, None)
        raise


def scale(
    optimizer: Any, amp: str, distributed: str | None, parameters: Sequence[torch.Tensor]
) -> tuple[float, float] | None:
    """What gradients are to be multiplied by, and have been multiplied by then; None where there is to be no step.

    Raises:
      UnsupportedError: the scaler would divide and leave out steps, on each of several workers by itself.
    """
    found_inf, held = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found_inf is None and held is None:
        return 1.0, 1.0
    if amp == "client":
        raise errors.UnsupportedError(
            "amp='client' with distributed='workers': a GradScaler that finds infinity on one rank leaves out the step "
            "there, and the other ranks wait for it; give amp='server' to RemoteOptimizer on every rank",
            subject="amp",
            expected="'server'",
            got="'client'",
        )
    own = 1.0 if held is None else float(held)
    is_infinite, least = found_inf is not None and float(found_inf) > 0, own
    if distributed == "workers":
        is_infinite, least = ranks.agreed(parameters[0].device, is_infinite=is_infinite, scale=own)
    return None if is_infinite else (least / own, least)
