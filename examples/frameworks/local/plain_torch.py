"""Plain torch: float16 with a gradient scaler, a one-cycle schedule, accumulation, clipping, and a checkpoint.

python plain_torch.py FOLDER 20    # stops after 20 steps
python plain_torch.py FOLDER 40    # goes on from there
"""

import pathlib
import sys

import torch
from torch import nn

STEPS, ACCUMULATE, RATE = 40, 2, 1e-2


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(number))
    return x, x.sin().sum(1, keepdim=True)


def train(folder: pathlib.Path, until: int = STEPS) -> nn.Module:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)  # too much for float16: the first steps are skipped
    keeps = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    checkpoint, start = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start = saved.pop("step")
        for name, kept in keeps.items():
            kept.load_state_dict(saved[name])

    for step in range(start, until):
        for number in range(ACCUMULATE):
            x, y = batch(step * ACCUMULATE + number)
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.mse_loss(model(x), y) / ACCUMULATE
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if scaler.get_scale() >= scale:  # otherwise the gradients had overflowed, and there was no step
            scheduler.step()

    torch.save({"step": until, **{name: kept.state_dict() for name, kept in keeps.items()}}, checkpoint)
    print(
        f"step {until}: loss {loss.item() * ACCUMULATE:.6f}, rate {scheduler.get_last_lr()[0]:.2e}, scale {scale:.0f}"
    )
    return model


if __name__ == "__main__":
    train(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
