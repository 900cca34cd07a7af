"""Trains a model on real images twice at once: with its optimizer on a server, and locally. ``make demo`` runs it.

The server is a process. The client that trains through it is another, and never imports JAX. Both trainings must end
on the same parameters, bit for bit, and the model must have learned something; otherwise this exits with 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import demo_data
import demo_train
import numpy as np
from rich import console, progress

HERE = pathlib.Path(__file__).parent
PICTURE = pathlib.Path("demo-output", "loss.png")
RECIPES = {
    "Fashion-MNIST": demo_train.Recipe(hidden=256, epochs=5, batch=256, learning_rate=2e-3, accuracy_min=0.86),
    "digits": demo_train.Recipe(hidden=128, epochs=30, batch=64, learning_rate=2e-3, accuracy_min=0.96),
}
ROLES = {"through-server": "through the server", "locally": "locally, with JAX"}
START_S = 60.0
STOP_S = 20.0

out = console.Console(highlight=False)


def main() -> None:
    began_s = time.monotonic()
    # `timeout` and container engines end with SIGTERM: then, too, no process may stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="optwire-demo-") as name, contextlib.ExitStack() as processes:
        folder = pathlib.Path(name)
        out.print("[bold]optwire demo[/]: a model learns, its optimizer lives in another process\n")
        server = processes.enter_context(Process(folder, "server", *SERVE, str(folder / "port")))
        data = demo_data.load()
        recipe = RECIPES[data.name]
        params = demo_train.initial_params(data.train_images.shape[1], recipe.hidden, demo_data.CLASSES)
        say("data", f"{data.name} of {data.source}: {len(data.train_images):,} images, {len(data.test_images):,} to test")
        say(
            "model",
            f"{data.train_images.shape[1]} → {recipe.hidden} → {demo_data.CLASSES} in NumPy, "
            f"{sum(leaf.size for leaf in params.values()):,} parameters, Adam",
        )
        target = wait_for_target(server, folder / "port")
        say("server", f"{target}, process {server.pid}, ready after {time.monotonic() - began_s:.1f} s")

        (folder / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe)))
        np.savez(folder / "data.npz", images=data.train_images, labels=data.train_labels)
        trainings = {
            role: processes.enter_context(
                Process(folder, role, str(HERE / "demo_train.py"), str(folder), role, *arguments)
            )
            for role, arguments in {"through-server": [target], "locally": []}.items()
        }
        show_progress(trainings, recipe.steps(len(data.train_images)))
        for training in trainings.values():
            training.expect_success()
        server.process.terminate()
        server.expect_success()

        remote, local = (np.load(folder / f"{role}.npz") for role in ROLES)
        report()


if __name__ == "__main__":
    main()
