"""Trains a character-level transformer twice, with torch's AdamW and with a server's. ``make demo-torch`` runs it.

The loop is one and the same; the two runs differ in the line that makes the optimizer. The text is real: Python's own
standard library. A scheduler and gradient clipping are in the loop, as they would be anywhere.
"""

from __future__ import annotations

import contextlib
import pathlib
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import demo
import torch
from rich import progress
from torch import nn
from torch.nn import functional

from optwire.torch import RemoteOptimizer

STEPS = 240
BATCH, CONTEXT = 32, 48
WIDTH, LAYERS, HEADS = 64, 2, 4
RATE = 3e-3
LOSS_MAX = 2.6  # nats a character at the end; a model that knows only how often characters come has 3.3
DIFFERENCE_MAX = 0.02  # of the loss at the last step, relative: rounding that 240 steps of training carry along


def text() -> str:
    """The modules of the standard library, one after another."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    return "".join(path.read_text("utf-8", "replace") for path in sorted(folder.glob("*.py")))


class Transformer(nn.Module):
    """Predicts the next character from up to ``CONTEXT`` of them."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, WIDTH)
        self.place = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.read = nn.Linear(WIDTH, characters, bias=False)
        self.read.weight = self.embed.weight  # tied: one parameter with two names

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        length = characters.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.layers(self.embed(characters) / 8 + self.place[:length], mask=mask, is_causal=True)
        return self.read(self.norm(hidden))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: torch.Tensor, seen: Callable[[float], None]
) -> None:
    """The loop. It does not know whose optimizer it has."""
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    draw = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        at = torch.randint(len(data) - CONTEXT - 1, (BATCH,), generator=draw)
        rows = torch.stack([data[i : i + CONTEXT + 1] for i in at])
        loss = functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        seen(loss.item())


def fresh(characters: int) -> Transformer:
    torch.manual_seed(0)
    return Transformer(characters)


def run_both(data: torch.Tensor, characters: int, target: str) -> tuple[dict[str, list[float]], Transformer]:
    """The losses of both runs, and the model that the server's optimizer trained."""
    losses: dict[str, list[float]] = {}
    model = fresh(characters)
    for label in ("torch's AdamW", "the server's AdamW"):
        model = fresh(characters)
        optimizer: Any
        if label.startswith("torch"):
            optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
        else:
            optimizer = RemoteOptimizer(
                model.named_parameters(), "adamw", lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, target=target
            )
        losses[label] = []
        with progress.Progress(*columns(), console=demo.out) as bars:
            bar = bars.add_task(label, total=STEPS, loss=float("nan"))

            def seen(loss: float, label: str = label, bars: Any = bars, bar: Any = bar) -> None:
                losses[label].append(loss)
                bars.update(bar, advance=1, loss=loss)

            train(model, optimizer, data, seen)
        if isinstance(optimizer, RemoteOptimizer):
            optimizer.close()
    return losses, model


def columns() -> Iterable[progress.ProgressColumn]:
    yield progress.TextColumn("           {task.description:<19}")
    yield progress.BarColumn()
    yield progress.TextColumn("step {task.completed:>5,.0f}/{task.total:,.0f}  loss {task.fields[loss]:.4f}")
    yield progress.TimeElapsedColumn()


@torch.no_grad()
def continued(model: Transformer, start: str, alphabet: str) -> str:
    """What the model would write next."""
    torch.manual_seed(2)
    written = torch.tensor([[alphabet.index(character) for character in start]])
    for _ in range(100):
        chances = functional.softmax(model(written[:, -CONTEXT:])[:, -1] / 0.6, dim=-1)
        written = torch.cat([written, torch.multinomial(chances, 1)], dim=1)
    return "".join(alphabet[i] for i in written[0])


def run(folder: pathlib.Path, processes: contextlib.ExitStack) -> None:
    began_s = time.monotonic()
    torch.set_num_threads(1)  # the other core is the server's
    server = processes.enter_context(demo.start_server(folder))
    source = text()
    alphabet = "".join(sorted(set(source)))
    index = {character: i for i, character in enumerate(alphabet)}
    data = torch.tensor([index[character] for character in source])
    demo.say("data", f"Python's standard library: {len(source):,} characters, {len(alphabet)} different ones")
    parameters = sum(parameter.numel() for parameter in fresh(len(alphabet)).parameters())
    demo.say("model", f"a transformer of {LAYERS} layers, {WIDTH} wide, {parameters:,} parameters, tied embeddings")
    target = demo.wait_for_target(server, folder / "port")
    demo.say("server", f"on {target}, process {server.id}, up after {time.monotonic() - began_s:.1f} s")
    demo.say("training", f"twice, {STEPS} steps each, with a one-cycle schedule and clipping")

    losses, model = run_both(data, len(alphabet), target)
    server.terminate()
    server.check_success()
    demo.say("server", "stopped by SIGTERM, exit code 0")
    loaded = [name for name in sys.modules if name.split(".")[0] in ("jax", "jaxlib", "optwire_server")]
    demo.say("client", f"{len(sys.modules):,} modules, {'none' if not loaded else len(loaded)} of them JAX")
    local, remote = (sum(run[-20:]) / 20 for run in losses.values())
    demo.say("loss", f"[bold]{remote:.4f}[/] over the last 20 steps through the server, {local:.4f} with torch's own")
    demo.say("writes", repr(continued(model, "def ", alphabet)))
    demo.out.print(f"\n[bold green]done[/] in {time.monotonic() - began_s:.0f} s")
    if loaded:
        raise demo.FailedError(f"the client imported {loaded[0]}")
    if remote > LOSS_MAX or abs(remote / local - 1) > DIFFERENCE_MAX:
        raise demo.FailedError(f"loss {remote:.4f}, expected at most {LOSS_MAX} and within 2% of {local:.4f}")


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    demo.out.print("[bold]optwire demo[/]: PyTorch trains here, its optimizer lives in another process\n")
    try:
        with tempfile.TemporaryDirectory(prefix="optwire-demo-") as name, contextlib.ExitStack() as processes:
            run(pathlib.Path(name), processes)
    except KeyboardInterrupt:
        demo.out.print("\n[bold]interrupted[/]; every process was stopped")
        return 130
    except demo.FailedError as exc:
        demo.out.print("\n[bold red]failed[/]")
        demo.out.print(str(exc), markup=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
