"""Accelerate: bfloat16, accumulation, clipping, a scheduler, and save_state / load_state.

python accelerate_loop.py FOLDER 20    # stops after 20 steps
python accelerate_loop.py FOLDER 40    # goes on from there
"""

import os
import pathlib
import sys

import torch
from accelerate import Accelerator
from torch import nn

from optwire.torch import RemoteOptimizer

STEPS, ACCUMULATE, RATE = 40, 2, 1e-2
TARGET = os.environ.get("OPTWIRE_TARGET", "localhost:50051")


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(number))
    return x, x.sin().sum(1, keepdim=True)


def train(folder: pathlib.Path, until: int = STEPS) -> nn.Module:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=ACCUMULATE)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))
    optimizer = RemoteOptimizer(model.named_parameters(), "adamw", lr=RATE, weight_decay=0.1, target=TARGET)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    checkpoint, start = folder / "checkpoint", 0
    if checkpoint.exists():
        accelerator.load_state(str(checkpoint))
        start = scheduler.scheduler.last_epoch

    for number in range(start * ACCUMULATE, until * ACCUMULATE):
        x, y = batch(number)
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    accelerator.save_state(str(checkpoint))
    print(f"step {until}: loss {loss.item():.6f}, rate {scheduler.get_last_lr()[0]:.2e}")
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    train(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
