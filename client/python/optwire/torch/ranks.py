"""Several processes that train one model, by ``torch.distributed``: who pushes, and how the others hear of it.

What passes between processes is text and tensors, by torch's own collectives. Nothing here knows the server.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed

from optwire_proto import errors, sessions

CHOICES = ("replicated", "workers", "shards")


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a step.

    Attributes:
      session: name of the session; empty where there is none yet.
      ack: of the push; None where nothing was pushed.
      written: positions of the parameters that have new values.
    """

    session: str = ""
    ack: sessions.Ack | None = None
    written: tuple[int, ...] = ()


def world_size() -> int:
    """Processes that train together; 1 without ``torch.distributed``."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def rank() -> int:
    """This process's number among them."""
    return distributed.get_rank() if world_size() > 1 else 0


def check(choice: object) -> str | None:
    """What the user chose in the argument ``distributed``.

    Raises:
      InvalidArgumentError: no choice that there is, or none where several processes train together.
      UnsupportedError: "shards".
    """
    if choice == "shards":
        raise errors.UnsupportedError(
            "distributed='shards': each process would push its slice of every leaf; that comes with the assembly of "
            "slices on the server. 'replicated' and 'workers' work",
            subject="distributed",
        )
    if choice is not None and choice not in CHOICES:
        raise errors.InvalidArgumentError(
            f"distributed: {choice!r}, expected None or one of {', '.join(map(repr, CHOICES))}",
            subject="distributed",
            got=repr(choice),
        )
    if choice is None and world_size() > 1:
        raise errors.InvalidArgumentError(
            f"distributed=None, but {world_size()} processes train together and each of them calls step(). Choose: "
            "'replicated' (gradients are averaged already, as DDP does: rank 0 pushes, all get its parameters), "
            "'workers' (gradients are not averaged, see no_allreduce_hook: every rank pushes, the server averages), "
            "'shards' (not served yet)",
            subject="distributed",
            expected=", ".join(CHOICES),
            got="None",
        )
    return None if choice is None else str(choice)


def from_rank_0(action: Callable[[], Outcome], parameters: Sequence[torch.Tensor]) -> Outcome:
    """Runs ``action`` on rank 0 only; every rank gets its outcome and the parameters it wrote, or raises its error."""
    if world_size() == 1:
        return action()
    device = parameters[0].device
    if rank() == 0:
        try:
            outcome = action()
        except BaseException as exc:  # the other ranks wait: whatever it was, Ctrl-C included, they must hear of it
            _broadcast_text(json.dumps(_described(exc)), device)
            raise
        _broadcast_text(json.dumps(dataclasses.asdict(outcome)), device)
    else:
        outcome = _read(json.loads(_broadcast_text("", device)))
    with torch.no_grad():
        for position in outcome.written:
            # A tensor of its own, as not every parameter is laid out as collectives want it.
            values = parameters[position].detach().contiguous()
            distributed.broadcast(values, src=0)
            if rank() != 0:
                parameters[position].copy_(values)
    return outcome


def agreed(device: torch.device, *, is_infinite: bool, scale: float) -> tuple[bool, float]:
    """Whether a ``GradScaler`` of any rank found a gradient that is not finite, and the least of their scales.

    A scaler hears of its own rank's gradients only: after an infinity there its scale is another one.
    """
    if world_size() == 1:
        return is_infinite, scale
    mine = torch.tensor([float(is_infinite), -scale], dtype=torch.float32, device=device)
    distributed.all_reduce(mine, op=distributed.ReduceOp.MAX)
    return bool(mine[0] > 0), -float(mine[1])


def no_allreduce_hook(state: object, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A communication hook for ``DistributedDataParallel`` that leaves each rank its own gradients.

    For ``distributed="workers"``: the server averages, so that an all-reduce before would be in vain.

    Example:
      >>> model.register_comm_hook(None, no_allreduce_hook)  # doctest: +SKIP

    Args:
      state: what was registered with the hook; not used.
      bucket: gradients that DDP would average now.

    Returns:
      The gradients as they are.
    """
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


if distributed.is_available():  # DDP compares the annotations, and takes no text for them
    no_allreduce_hook.__annotations__ |= {
        "bucket": distributed.GradBucket,
        "return": torch.futures.Future[torch.Tensor],
    }


def _broadcast_text(text: str, device: torch.device) -> str:
    """Rank 0's text, on every rank."""
    data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8).to(device)
    size = torch.tensor([data.numel()], device=device)
    distributed.broadcast(size, src=0)
    if rank() != 0:
        data = torch.empty(int(size.item()), dtype=torch.uint8, device=device)
    distributed.broadcast(data, src=0)
    return bytes(data.cpu().tolist()).decode()


def _described(exc: BaseException) -> dict[str, Any]:
    told = {"error": str(exc), "type": type(exc).__name__}
    if not isinstance(exc, errors.OptwireError):
        return told
    details = {"subject": exc.subject, "expected": exc.expected, "got": exc.got, "step": exc.step}
    return {**told, "code": exc.code, "reason": exc.reason, "details": details}


def _read(told: dict[str, Any]) -> Outcome:
    if "error" in told:
        message = f"rank 0: {told['error']}"
        if "reason" in told:
            raise errors.from_status(told["code"], told["reason"], message, **told["details"])
        raise RuntimeError(f"{message} ({told['type']})")
    ack = sessions.Ack(**told["ack"]) if told["ack"] else None
    return Outcome(told["session"], ack, tuple(told["written"]))
