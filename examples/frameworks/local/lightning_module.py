"""Lightning: bfloat16, clipping, accumulation and a scheduler by the Trainer, and its checkpoints.

python lightning_module.py FOLDER 20    # stops after 20 steps
python lightning_module.py FOLDER 40    # goes on from there
"""

import pathlib
import sys
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils import data

STEPS, RATE = 40, 1e-2


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layers(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def batches() -> data.DataLoader[Any]:
    x = torch.randn(320, 8, generator=torch.Generator().manual_seed(0))
    return data.DataLoader(data.TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=16)


def train(folder: pathlib.Path, until: int = STEPS) -> nn.Module:
    folder.mkdir(parents=True, exist_ok=True)
    lightning.seed_everything(0, verbose=False)
    model = Regression()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=until,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        callbacks=[ModelCheckpoint(folder, save_last=True, every_n_train_steps=20)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    newest = folder / "last.ckpt"
    trainer.fit(model, batches(), ckpt_path=newest if newest.exists() else None)
    print(f"step {trainer.global_step}: loss {model.training_step(next(iter(batches())), 0).item():.6f}")
    return model


if __name__ == "__main__":
    train(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
