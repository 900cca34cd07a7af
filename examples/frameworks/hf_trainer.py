"""Hugging Face Trainer with an optimizer and a scheduler of one's own; checkpoints are the Trainer's.

python hf_trainer.py FOLDER 20    # stops after 20 steps
python hf_trainer.py FOLDER 40    # goes on from there
"""

import os
import pathlib
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from optwire.torch import RemoteOptimizer

STEPS, RATE, CONTEXT = 40, 1e-3, 16
TARGET = os.environ.get("OPTWIRE_TARGET", "localhost:50051")


def data() -> list[dict[str, torch.Tensor]]:
    """Pieces of a text that every Python has, as bytes."""
    text = torch.tensor(list((pathlib.__doc__ or "").encode() + pathlib.Path.__doc__.encode()))
    rows = [text[at : at + CONTEXT] % 128 for at in range(0, len(text) - CONTEXT, 2)]
    return [{"input_ids": row, "labels": row} for row in rows]


def train(folder: pathlib.Path, until: int = STEPS) -> torch.nn.Module:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_positions=CONTEXT, n_embd=16, n_layer=1, n_head=2)
    config.bos_token_id = config.eos_token_id = None
    model = GPT2LMHeadModel(config)
    optimizer = RemoteOptimizer(model.named_parameters(), "adamw", lr=RATE, weight_decay=0.1, target=TARGET)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=until,
        save_steps=20,
        logging_steps=20,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=data(), optimizers=(optimizer, scheduler))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    print(f"step {trainer.state.global_step}: loss {trainer.state.log_history[-2]['loss']:.6f}")
    return model


if __name__ == "__main__":
    train(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
