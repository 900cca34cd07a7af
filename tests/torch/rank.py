"""One of several processes that train one model: ``python rank.py TARGET RANK WORLD DIRECTORY``.

Goes through all cases, and prints what came of each.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import optwire
from optwire.torch import RemoteOptimizer, no_allreduce_hook


def main(target: str, rank: int, world: int, directory: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=world)
    for case in CASES:
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.1 * (rank + 1))  # DDP gives all ranks the parameters of rank 0
        ddp = DistributedDataParallel(model)
        for what, value in case(target, model, ddp, rank).items():
            print(case.__name__, what, value)
        torch.save([p.detach() for p in model.parameters()], directory / f"{case.__name__}.{rank}")
    distributed.destroy_process_group()


def train(model: Any, ddp: Any, optimizer: Any, rank: int, *, steps: int = 5) -> None:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * step + rank))
        (ddp(inputs) ** 2).mean().backward()
        optimizer.step()
        scheduler.step()


def unsaid(target: str, model: Any, ddp: Any, rank: int) -> dict[str, Any]:
    try:
        RemoteOptimizer(model.named_parameters(), "sgd", target=target)
    except optwire.InvalidArgumentError as exc:
        return {"refused": exc}
    return {}


def local(target: str, model: Any, ddp: Any, rank: int) -> dict[str, Any]:
    train(model, ddp, torch.optim.AdamW(model.parameters(), lr=0.05), rank)
    return {}


def replicated(target: str, model: Any, ddp: Any, rank: int) -> dict[str, Any]:
    with RemoteOptimizer(
        model.named_parameters(), "adamw", lr=0.05, target=target, session="replicated", distributed="replicated"
    ) as optimizer:
        train(model, ddp, optimizer, rank)
        told = {"step": optimizer.last_reply.step, "handle": optimizer.state_dict()["state"][0]["remote"]}
    for p in model.parameters():
        p.data.fill_(rank)
    with RemoteOptimizer(  # as after a restart
        model.named_parameters(), "adamw", lr=0.05, target=target, session="replicated", distributed="replicated"
    ):
        return told


def failing(target: str, model: Any, ddp: Any, rank: int) -> dict[str, Any]:
    """Rank 0 cannot push; everyone hears of it, and nobody waits for ever."""
    with RemoteOptimizer(
        model.named_parameters(), "on_nonfinite(adam(0.1))", target=target, distributed="replicated"
    ) as optimizer:
        train(model, ddp, optimizer, rank, steps=1)
        for p in model.parameters():
            p.grad.fill_(float("nan"))
        raised = None
        try:
            optimizer.step()
        except optwire.NonFiniteError as exc:
            raised = exc
        for p in model.parameters():
            p.grad.fill_(0.1)
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        return {"raised": raised, "step": optimizer.last_reply.step}


def workers(target: str, model: Any, ddp: Any, rank: int) -> dict[str, Any]:
    ddp.register_comm_hook(None, no_allreduce_hook)
    with RemoteOptimizer(
        model.named_parameters(), "adamw", lr=0.05, target=target, session="workers", distributed="workers"
    ) as optimizer:
        train(model, ddp, optimizer, rank)
        told = {"step": optimizer.last_reply.step}
    for p in model.parameters():
        p.data.fill_(rank)
    with RemoteOptimizer(
        model.named_parameters(), "adamw", lr=0.05, target=target, session="workers", distributed="workers"
    ):
        return told


def overlapped(target: str, model: Any, ddp: Any, rank: int) -> dict[str, Any]:
    """As ``workers``, while backward and forward run."""
    ddp.register_comm_hook(None, no_allreduce_hook)
    with RemoteOptimizer(
        model.named_parameters(), "adamw", lr=0.05, target=target, distributed="workers", overlap=True
    ) as optimizer:
        train(model, ddp, optimizer, rank)
        was_late = optimizer._overlap._pushed is not None
        return {"step": optimizer.last_reply.step, "late": was_late}


def resumed(target: str, model: Any, distributed: str) -> dict[str, Any]:
    """From a checkpoint of local torch, before there is a session and after."""
    local = torch.optim.AdamW(model.parameters(), lr=0.05)
    ones(model)
    for _ in range(3):
        local.step()
    checkpoint = copy.deepcopy((model.state_dict(), local.state_dict()))
    with RemoteOptimizer(model.named_parameters(), "adamw", target=target, distributed=distributed) as optimizer:
        optimizer.load_state_dict(checkpoint[1])
        optimizer.step()
        once = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        told = {"step": optimizer.last_reply.step}
        model.load_state_dict(checkpoint[0])
        optimizer.load_state_dict(checkpoint[1])
        optimizer.step()
        told["again"] = optimizer.last_reply.step
        told["same"] = all(torch.equal(p.detach(), q) for p, q in zip(model.parameters(), once, strict=True))
    model.load_state_dict(checkpoint[0])
    local.load_state_dict(checkpoint[1])
    ones(model)
    local.step()
    told["near"] = all(torch.allclose(p.detach(), q) for p, q in zip(model.parameters(), once, strict=True))
    return told


def resumed_replicated(target: str, model: Any, ddp: Any, rank: int) -> dict[str, Any]:
    return resumed(target, model, "replicated")


def resumed_workers(target: str, model: Any, ddp: Any, rank: int) -> dict[str, Any]:
    return resumed(target, model, "workers")


def grown(target: str, model: Any, distributed: str) -> dict[str, Any]:
    """A group that is added after a step, and a parameter that has no gradient in one."""
    named = list(model.named_parameters())
    with RemoteOptimizer(named[:2], "sgd", lr=0.1, momentum=0.9, target=target, distributed=distributed) as optimizer:
        ones(model)
        optimizer.step()
        optimizer.add_param_group({"params": named[2:], "lr": 0.5})
        optimizer.step()
        named[1][1].grad = None
        optimizer.step()
        told = {"step": optimizer.last_reply.step}
    return told | {name: [round(value, 4) for value in set((p - 0.1).flatten().tolist())] for name, p in named}


def grown_replicated(target: str, model: Any, ddp: Any, rank: int) -> dict[str, Any]:
    return grown(target, model, "replicated")


def grown_workers(target: str, model: Any, ddp: Any, rank: int) -> dict[str, Any]:
    return grown(target, model, "workers")


def scaled(target: str, model: Any, ddp: Any, rank: int) -> dict[str, Any]:
    """Rank 1 alone meets infinity in the second of four steps: that is no step of anyone."""
    ddp.register_comm_hook(None, no_allreduce_hook)
    with RemoteOptimizer(
        model.named_parameters(), "sgd", lr=0.05, target=target, distributed="workers", amp="server"
    ) as optimizer:
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(batch_loss(ddp, step, rank)).backward()
            if rank == 1 and step == 1:
                model[0].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        return {"step": optimizer.last_reply.step, "scale": scaler.get_scale()}


def unscaled(target: str, model: Any, ddp: Any, rank: int) -> dict[str, Any]:
    """What ``scaled`` does, by local torch."""
    local = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in (0, 2, 3):
        local.zero_grad()
        batch_loss(ddp, step, rank).backward()
        local.step()
    return {}


def refused(target: str, model: Any, ddp: Any, rank: int) -> dict[str, Any]:
    """Where each rank's scaler would leave out steps by itself."""
    with RemoteOptimizer(model.named_parameters(), "sgd", target=target, distributed="workers") as optimizer:
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        scaler.scale(batch_loss(ddp, 0, rank)).backward()
        try:
            scaler.step(optimizer)
        except optwire.UnsupportedError as exc:
            return {"error": exc}
    return {"error": None}


def interrupted(target: str, model: Any, ddp: Any, rank: int) -> dict[str, Any]:
    """Ctrl-C on rank 0 while the others wait for it."""
    with RemoteOptimizer(model.named_parameters(), "sgd", target=target, distributed="replicated") as optimizer:
        ones(model)
        optimizer.step()
        if rank == 0:
            optimizer.param_groups[0]["lr"] = Interrupted()
        try:
            optimizer.step()
        except (KeyboardInterrupt, RuntimeError) as exc:
            return {"raised": type(exc).__name__, "said": exc}
    return {"raised": None}


class Interrupted:
    """A learning rate in whose reading the user presses Ctrl-C."""

    def __float__(self) -> float:
        raise KeyboardInterrupt


def batch_loss(ddp: Any, step: int, rank: int) -> Any:
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * step + rank))
    return (ddp(inputs) ** 2).mean()


def ones(model: Any) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)


CASES = (
    unsaid,
    local,
    replicated,
    failing,
    workers,
    overlapped,
    resumed_replicated,
    resumed_workers,
    grown_replicated,
    grown_workers,
    scaled,
    unscaled,
    refused,
    interrupted,
)

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
