"""One of several processes that train one model: ``python rank.py TARGET RANK WORLD DIRECTORY``.

Goes through all cases, and prints what came of each.
"""

from __future__ import annotations

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
    for case in (unsaid, local, replicated, failing, workers):
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


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
