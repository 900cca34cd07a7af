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
from collections.abc import Callable
from typing import Any

import numpy as np

import optwire
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
    """How a training ended: mean loss of the steps of its last epoch, and accuracy on the test images."""

    loss: float
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
    accuracy = demo_train.accuracy(session.params(), data.test_images, data.test_labels)
    client.delete_session(session.name)
    return Run(float(np.mean(losses[-(len(images) // recipe.batch) :])), accuracy)


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
    losses: dict[str, dict[str, Any]] = {}
    with testing.serve() as server, optwire.connect(server.target) as client:
        for spec, epochs in TRAININGS:
            print(f"\n{spec}, {epochs} epochs\n\n| up | down | residual | loss | against f32 | accuracy |")
            print("|---|---|---|---:|---:|---:|")
            for up, down, keeps in RUNS:
                run = trained(client, spec, up, down, keeps=keeps, epochs=epochs)
                losses.setdefault(spec, {})[f"{up}, {down}" + ", nothing kept" * (not keeps)] = dataclasses.asdict(run)
                gap = run.loss / losses[spec]["f32, f32"]["loss"] - 1
                said = "" if not codecs.parse(up).loses else "kept" if keeps else "not kept"
                print(f"| {up} | {down} | {said} | {run.loss:.5f} | {gap:+.2%} | {run.accuracy:.1%} |", flush=True)
    if flags.json:
        flags.json.write_text(json.dumps({"speed": costs, "copy": copied, "task": losses}, indent=2) + "\n")


if __name__ == "__main__":
    main()
