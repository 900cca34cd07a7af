"""Measures what local steps cost in loss and save in bytes, against a push at every step.

    python benchmarks/diloco.py [--json FILE]
    python benchmarks/diloco.py --steps 300 --cases 'every step,DiLoCo'

Four workers, two in torch and two in JAX, train the character-level transformer of the examples, each on a quarter of
Python's standard library and for as many steps in every case, from parameters that one process had trained for a while
(``--before``). Bytes are those that passed through a forwarder in front of the server, both ways, all of them: the
protocol's own, and the first parameters, too. The loss is that of the session's parameters at the end, on text that
nobody trained on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import optwire
from optwire import optimizers as opt
from optwire.torch import tree_of
from optwire_bench import counting, processes, reports

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo_torch  # noqa: E402
import diloco_worker  # noqa: E402

FRAMEWORKS = ("torch", "torch", "jax", "jax")
WORKER_S = 3600.0
BEFORE_RATE = 3e-3
EVALUATED, ROWS = 32, 64  # batches of held-out text, and rows in each


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One training.

    Attributes:
      every: local steps between two pushes; 0: gradients are pushed at every step.
      codec: of gradients and parameters.
      fragments, delay, mixing: as ``optwire.LocalSteps`` takes them.
      outer: the session's optimizer, where there are local steps.
    """

    every: int = 50
    codec: str = "f32"
    fragments: int = 1
    delay: int = 0
    mixing: float = 0.0
    outer: opt.Spec = dataclasses.field(default_factory=lambda: opt.nesterov(0.7, 0.9))


CASES = {
    "every step": Case(every=0),
    "DiLoCo": Case(),
    "DiLoCo int8": Case(codec="int8"),
    "Streaming DiLoCo": Case(fragments=4, delay=5, mixing=0.5),
    "Streaming DiLoCo int8": Case(fragments=4, delay=5, mixing=0.5, codec="int8"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, metavar="N", help="of every worker")
    parser.add_argument("--before", type=int, default=500, metavar="N", help="steps of one process, before all cases")
    parser.add_argument("--rate", type=float, default=5e-3, metavar="R", help="the highest learning rate")
    parser.add_argument("--cases", default=",".join(CASES), metavar="NAMES")
    parser.add_argument("--outer", metavar="SPEC", help="another optimizer of the session, where there are local steps")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also writes the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, dict[str, Any]] = {}
    data, alphabet = diloco_worker.text()
    model = begun(data, len(alphabet), options.before)
    start = tree_of(model.named_parameters())
    before = evaluated(model, start, data)
    print(f"after {options.before} steps of one process: loss {before:.4f}", flush=True)
    with processes.server() as server:
        for name in options.cases.split(","):
            figures[name] = measured(server.target, CASES[name], options, model, start, data)
            show(name, figures)
    if options.json:
        facts = {"machine": machine(), "workers": FRAMEWORKS, "steps": options.steps, "rate": options.rate}
        facts |= {"before": options.before, "loss_before": before}
        reports.write_json({**facts, "cases": figures}, options.json)


def machine() -> dict[str, Any]:
    """As of every benchmark, and torch."""
    found = processes.machine()
    return {**found, "versions": {**found["versions"], "torch": torch.__version__}}


def show(name: str, figures: dict[str, dict[str, Any]]) -> None:
    found = figures[name]
    first = next(iter(figures.values()))
    found["loss_ratio"] = found["loss"] / first["loss"]
    found["fewer_bytes"] = first["bytes"] / found["bytes"]
    print(
        f"{name:<24} loss {found['loss']:.4f} ({found['loss_ratio'] - 1:+.2%}), {found['bytes']:>13,} bytes "
        f"({found['fewer_bytes']:.1f}x fewer), {found['seconds']:.0f} s",
        flush=True,
    )


def begun(data: np.ndarray, characters: int, steps: int) -> torch.nn.Module:
    """What all cases start with: some steps of one process."""
    torch.manual_seed(0)
    model = demo_torch.Transformer(characters)
    decay = diloco_worker.DECAY
    adamw = torch.optim.AdamW(
        model.parameters(), lr=BEFORE_RATE, betas=(decay["b1"], decay["b2"]), weight_decay=decay["weight_decay"]
    )
    rng = np.random.default_rng(2)
    for step in range(steps):
        for group in adamw.param_groups:
            group["lr"] = BEFORE_RATE * min(1.0, (step + 1) / diloco_worker.WARM_UP)
        rows = diloco_worker.drawn(data[: -diloco_worker.HELD_OUT], rng, diloco_worker.BATCH)
        batch = torch.from_numpy(rows).long()
        adamw.zero_grad()
        functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
    return model


def measured(
    target: str,
    case: Case,
    options: argparse.Namespace,
    model: torch.nn.Module,
    start: dict[str, np.ndarray],
    data: np.ndarray,
) -> dict[str, Any]:
    began_s = time.monotonic()
    with optwire.connect(target, timeout=300) as client:
        session = client.create_session(
            start,
            spec(case, options),
            aggregation=f"sync({len(FRAMEWORKS)})",
            grads_codec=case.codec,
            params_codec=case.codec,
        )
        up, down = trained(target, session.name, case, options)
        loss = evaluated(model, session.params(), data)
        client.delete_session(session.name)
    return {
        "every": case.every,
        "codec": case.codec,
        "fragments": case.fragments,
        "delay": case.delay,
        "mixing": case.mixing,
        "loss": loss,
        "bytes": up + down,
        "bytes_up": up,
        "bytes_down": down,
        "seconds": time.monotonic() - began_s,
    }


def spec(case: Case, options: argparse.Namespace) -> opt.Spec:
    """The session's optimizer: the outer one, or the one that local steps have to themselves."""
    if case.every:
        outer = opt.parse(options.outer) if options.outer else case.outer
        return opt.per_leaf(outer) if case.fragments > 1 else outer
    adamw = optwire.optax.adamw(diloco_worker.schedule(options.rate, options.steps), **diloco_worker.DECAY)
    return opt.chain(optwire.optax.clip_by_global_norm(1.0), adamw)


def trained(target: str, session: str, case: Case, options: argparse.Namespace) -> tuple[int, int]:
    """Bytes that went up and down while all workers trained."""
    command = [sys.executable, str(EXAMPLES / "diloco_worker.py")]
    numbers = {name: getattr(case, name) for name in ("every", "fragments", "delay", "mixing")}
    numbers |= {"steps": options.steps, "rate": options.rate}
    further = [part for name, value in numbers.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    with contextlib.ExitStack() as stack:
        counts, workers = [], []
        for rank, framework in enumerate(FRAMEWORKS):
            reached, count = stack.enter_context(counting.forwarder(target))
            counts.append(count)
            arguments = [*command, reached, session, str(rank), framework, *further]
            worker = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)
            stack.callback(worker.kill)
            workers.append(worker)
        for worker in workers:
            said, _ = worker.communicate(timeout=WORKER_S)
            if worker.returncode:
                raise SystemExit(f"a worker ended with code {worker.returncode}")
            json.loads(said)
    return sum(count.up for count in counts), sum(count.down for count in counts)


@torch.no_grad()
def evaluated(model: torch.nn.Module, params: dict[str, np.ndarray], data: np.ndarray) -> float:
    """Mean loss on held-out text, the same rows in every case."""
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.from_numpy(params[name]))
    rng = np.random.default_rng(1)
    losses = []
    for _ in range(EVALUATED):
        rows = torch.from_numpy(diloco_worker.drawn(data[-diloco_worker.HELD_OUT :], rng, ROWS)).long()
        losses.append(functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).item())
    return float(np.mean(losses))


if __name__ == "__main__":
    main()
