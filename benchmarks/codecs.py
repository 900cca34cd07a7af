"""What codecs cost and what they do to a training: the tables of docs/codecs.md.

    .venv/bin/python benchmarks/codecs.py [--json FILE]

Speed is of NumPy on one thread, in milliseconds of CPU time for 100 MB of float32, so that other work on the machine
weighs less. The task is that of the demo (examples/demo_train.py), trained through a real server.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import optwire
from optwire_bench import processes
from optwire_proto import codecs, tensors, trees
from optwire_server import testing

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
NAMES = ("bf16", "f16", "int8", "top_k(0.01)", "sign")
ELEMENTS = 25 * 2**20
# Optimizer and epochs: plain gradient descent, which a residual is proven for, and the demo's own.
TRAININGS = (("sgd(0.1)", 60), ("adam(0.002)", 30))
# (up, down, whether what was left behind is kept)
RUNS = (
    ("f32", "f32", True),
    *((name, "f32", True) for name in NAMES),
    *(("f32", name, True) for name in NAMES),
    *((name, name, True) for name in NAMES),
    *((name, "f32", False) for name in NAMES[2:]),
)
PLAIN = RUNS[0]
# What is said beside: other optimizers, and longer. 60 epochs are 1,320 steps.
BESIDE = (
    ("adam(0.002)", 60, (PLAIN, ("int8", "int8", True))),
    ("momentum(0.01, 0.9)", 60, (PLAIN, ("top_k(0.01)", "f32", True), ("sign", "f32", True))),
    ("momentum(0.1, 0.9)", 60, (PLAIN, ("sign", "f32", True))),
    ("sgd(cosine_decay_schedule(0.3, 1320))", 60, (PLAIN, ("top_k(0.01)", "f32", True))),
)


def example(name: str) -> Any:
    """A module of the examples."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def milliseconds(call: Callable[[], object], elements: int) -> float:
    """CPU time for 100 MB, the median of five."""
    call()
    times = []
    for _ in range(5):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return statistics.median(times) * 1e3 * 25e6 / elements


def speeds(elements: int) -> dict[str, dict[str, float]]:
    """Of each codec: milliseconds and share of bytes."""
    values = np.random.default_rng(0).standard_normal(elements, np.float32)
    residual, left, out = values[::-1] / 10, np.empty_like(values), np.empty_like(values)
    leaf = trees.LeafSpec("w", (elements,), "f32")
    found = {"memcpy": {"decode": milliseconds(lambda: np.copyto(out, values), elements)}}
    for name in NAMES:
        how = codecs.parse(name)
        arrays = [np.empty(part.shape, tensors.numpy_dtype(part.dtype)) for part in how.encoded(leaf)]
        plus, behind = (residual, left) if how.loses else (None, None)
        read = codecs.reader(values, plus)
        found[name] = {
            "share": how.encoded_bytes(leaf) / leaf.nbytes,
            "encode": milliseconds(lambda: how.encode(elements, read, arrays, behind), elements),  # noqa: B023
            "decode": milliseconds(lambda: how.decode(arrays, out, "w"), elements),  # noqa: B023
        }
        how.decode(arrays, out, "w")
        sent = values + residual if plus is not None else values
        found[name]["error"] = float(np.linalg.norm(sent - out) / np.linalg.norm(sent))
    return found


@dataclasses.dataclass(frozen=True)
class Run:
    """How a training ended.

    Attributes:
      loss: mean of the steps of the last epoch.
      train_loss, test_loss: of the last parameters, on all images of either kind.
      accuracy: on the test images.
    """

    loss: float
    train_loss: float
    test_loss: float
    accuracy: float


def trained(client: optwire.Client, spec: str, up: str, down: str, *, keeps: bool, epochs: int) -> Run:
    demo_data, demo_train, demo = example("demo_data"), example("demo_train"), example("demo")
    data = demo_data.load()
    recipe = dataclasses.replace(demo.RECIPES[data.name], epochs=epochs)
    images, labels = data.train_images, data.train_labels
    params = demo_train.initial_params(images.shape[1], recipe.hidden, demo_data.CLASSES)
    session = client.create_session(params, spec, grads_codec=up, params_codec=down)

    def step(grads: Any) -> Any:
        after = session.step(grads)
        if not keeps:
            session._up.forget()
        return after

    _, losses = demo_train.train(params, images, labels, recipe, step, lambda *_: None)
    last = session.params()
    accuracy = demo_train.accuracy(last, data.test_images, data.test_labels)
    on = [demo_train.loss_and_grads(last, *of)[0] for of in ((images, labels), (data.test_images, data.test_labels))]
    client.delete_session(session.name)
    return Run(float(np.mean(losses[-(len(images) // recipe.batch) :])), *map(float, on), accuracy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    flags = parser.parse_args()
    costs = speeds(flags.elements)
    copied = costs.pop("memcpy")["decode"]
    print("| codec | bytes | encode | decode | error of one payload |\n|---|---:|---:|---:|---:|")
    print(f"| a copy | | | {copied:.0f} | |")
    for name, cost in costs.items():
        error = f"{100 * cost['error']:.2g} %"
        print(f"| {name} | {cost['share']:.3f} | {cost['encode']:.0f} | {cost['decode']:.0f} | {error} |")
    with testing.serve() as server, optwire.connect(server.target) as client:
        task = {spec: compared(client, spec, epochs, RUNS) for spec, epochs in TRAININGS}
        beside = {f"{spec}, {epochs} epochs": compared(client, spec, epochs, runs) for spec, epochs, runs in BESIDE}
    if flags.json:
        found = {"machine": processes.machine(), "speed": costs, "copy": copied, "task": task, "beside": beside}
        flags.json.write_text(json.dumps(found, indent=2) + "\n")


def compared(
    client: optwire.Client, spec: str, epochs: int, runs: Sequence[tuple[str, str, bool]]
) -> dict[str, dict[str, float]]:
    """Trains once for each of the runs, the first being the one that others are compared with; prints a table."""
    print(f"\n{spec}, {epochs} epochs\n\n| up | down | residual | loss | against f32 | train | test | accuracy |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    found: dict[str, dict[str, float]] = {}
    for up, down, keeps in runs:
        run = trained(client, spec, up, down, keeps=keeps, epochs=epochs)
        found[f"{up}, {down}" + ", nothing kept" * (not keeps)] = dataclasses.asdict(run)
        first = Run(**next(iter(found.values())))
        gaps = [
            own / other - 1
            for own, other in zip(
                (run.loss, run.train_loss, run.test_loss), (first.loss, first.train_loss, first.test_loss), strict=True
            )
        ]
        said = "" if not codecs.parse(up).loses else "kept" if keeps else "not kept"
        cells = [up, down, said, f"{run.loss:.5f}", *(f"{gap:+.2%}" for gap in gaps), f"{run.accuracy:.1%}"]
        print("| " + " | ".join(cells) + " |", flush=True)
    return found


if __name__ == "__main__":
    main()
