"""One of several processes that train one model: `python rank.py TARGET CASE RANK WORLD FILE`; prints what came of it."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import optwire
from optwire.torch import RemoteOptimizer, no_allreduce_hook


def main(target: str, case: str, rank: int, world: int, file: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch.manual_seed(rank)  # DDP gives all ranks the parameters of rank 0
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.1 * (rank + 1))
    ddp = DistributedDataParallel(model)
    CASES[case](target, model, ddp, rank)
    distributed.destroy_process_group()


def train(model: Any, ddp: Any, optimizer: Any, rank: int, *, steps: int = 5) -> None:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * step + rank))
        (ddp(inputs) ** 2).mean().backward()
        optimizer.step()
        scheduler.step()
    data = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    print("params", hashlib.sha256(data).hexdigest())
    print("step", optimizer.last_reply.step if isinstance(optimizer, RemoteOptimizer) else steps)
    torch.save([p.detach() for p in model.parameters()], sys.argv[5] + f".{rank}")


def unsaid(target: str, model: Any, ddp: Any, rank: int) -> None:
    try:
        RemoteOptimizer(model.named_parameters(), "sgd", target=target)
    except optwire.InvalidArgumentError as exc:
        print("refused", exc)


def local(target: str, model: Any, ddp: Any, rank: int) -> None:
    train(model, ddp, torch.optim.AdamW(model.parameters(), lr=0.05), rank)


def replicated(target: str, model: Any, ddp: Any, rank: int) -> None:
    optimizer = RemoteOptimizer(
        model.named_parameters(), "adamw", lr=0.05, target=target, session="replicated", distributed="replicated"
    )
    train(model, ddp, optimizer, rank)
    print("handle", optimizer.state_dict()["state"][0]["remote"])
    optimizer.close()


def failing(target: str, model: Any, ddp: Any, rank: int) -> None:
    """Rank 0 cannot push; everyone hears of it, and nobody waits for ever."""
    optimizer = RemoteOptimizer(
        model.named_parameters(), "on_nonfinite(adam(0.1))", target=target, distributed="replicated"
    )
    train(model, ddp, optimizer, rank, steps=1)
    for p in model.parameters():
        p.grad.fill_(float("nan"))
    try:
        optimizer.step()
    except optwire.NonFiniteError as exc:
        print("raised", exc)
    ddp(torch.ones(2, 4)).sum().backward()  # and training goes on
    for p in model.parameters():
        p.grad.fill_(0.1)
    optimizer.step()
    print("then", optimizer.last_reply.step)


def workers(target: str, model: Any, ddp: Any, rank: int) -> None:
    ddp.register_comm_hook(None, no_allreduce_hook)
    optimizer = RemoteOptimizer(model.named_parameters(), "adamw", lr=0.05, target=target, distributed="workers")
    train(model, ddp, optimizer, rank)


CASES = {"unsaid": unsaid, "local": local, "replicated": replicated, "failing": failing, "workers": workers}

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
