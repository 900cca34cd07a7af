"""Trains one model twice at once, with its optimizer on a server and locally. ``make demo`` runs it.

The server is a process. The client that trains through it is another, and never imports JAX. Both trainings must end
on the same parameters, bit for bit, and the model must have learned something; otherwise the exit code is 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Self

import demo_data
import demo_train
import numpy as np
import numpy.typing as npt
from rich import console, progress

HERE = pathlib.Path(__file__).parent
PICTURE = pathlib.Path("demo-output", "loss.png")
RECIPES = {
    "Fashion-MNIST": demo_train.Recipe(hidden=256, epochs=5, batch=256, learning_rate=2e-3, accuracy_min=0.86),
    "digits": demo_train.Recipe(hidden=128, epochs=30, batch=64, learning_rate=2e-3, accuracy_min=0.96),
}
START_S = 60.0
STOP_S = 20.0
ENVIRONMENT = {
    # One thread for NumPy: sums come in the same order in both trainings, and the other core is free for JAX.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # On a GPU, two processes share its memory.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}

out = console.Console(highlight=False)


class FailedError(Exception):
    """A process of the demo failed, or the trainings did not end as they must. Says what to print."""


class Process:
    """A Python process; what it says on standard error is kept, and shown if it fails. Ends with its ``with`` block."""

    def __init__(self, folder: pathlib.Path, name: str, *arguments: str) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **ENVIRONMENT},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout
        self.output = self._process.stdout
        self.id = self._process.pid

    def is_running(self) -> bool:
        return self._process.poll() is None

    def failed(self, why: str) -> FailedError:
        """The error to raise, with what the process said."""
        return FailedError(f"{self.name}: {why}\n{self._log.read_text()[-4000:]}")

    def check_health(self) -> None:
        """Raises if the process ended, and not well."""
        if self._process.poll():
            raise self.failed(f"exit code {self._process.returncode}")

    def check_success(self) -> None:
        """Waits for the process to end and raises unless it ended well."""
        try:
            code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired as exc:
            raise self.failed(f"still running after {STOP_S:.0f} s") from exc
        if code:
            raise self.failed(f"exit code {code}")

    def terminate(self) -> None:
        """Sends SIGTERM to this process, and to no other."""
        self._process.terminate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_running():
            self.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self.output.close()


def say(what: str, text: str) -> None:
    out.print(f"[bold cyan]{what:<11}[/]{text}", soft_wrap=True)


def start_server(folder: pathlib.Path) -> Process:
    return Process(
        folder, "server", "-m", "optwire_server", "serve", "--listen", "127.0.0.1:0", "--port-file", f"{folder}/port"
    )


def wait_for_target(server: Process, port_file: pathlib.Path) -> str:
    """The server's address, once it serves."""
    give_up_s = time.monotonic() + START_S
    while not (port_file.exists() and port_file.read_text()):
        if not server.is_running():
            raise server.failed("ended before it served")
        if time.monotonic() > give_up_s:
            raise server.failed(f"does not serve after {START_S:.0f} s")
        time.sleep(0.05)
    return port_file.read_text()


def show_progress(trainings: dict[str, Process], steps: int, server: Process) -> None:
    """Draws a bar for each training until all have ended; raises if one of them or the server fails."""
    columns = (
        progress.TextColumn("           {task.description:<19}"),
        progress.BarColumn(),
        progress.TextColumn("step {task.completed:>5,.0f}/{task.total:,.0f}  loss {task.fields[loss]:.4f}"),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=out) as bars:

        def follow(training: Process, bar: progress.TaskID) -> None:
            for line in training.output:
                step, loss = line.split()
                bars.update(bar, completed=int(step), loss=float(loss))

        threads = []
        for label, training in trainings.items():
            bar = bars.add_task(label, total=steps, loss=float("nan"))
            threads.append(threading.Thread(target=follow, args=(training, bar), daemon=True))
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for process in (server, *trainings.values()):
                process.check_health()
            time.sleep(0.05)


def report(data: demo_data.Dataset, recipe: demo_train.Recipe, results: dict[str, dict[str, npt.NDArray[Any]]]) -> None:
    """Prints what came of it; raises unless it is what must come."""
    remote, local = results["remote"], results["local"]
    say(
        "client",
        f"imported {remote['modules']} modules, none of them {', '.join(demo_train.FORBIDDEN[:-1])} or "
        f"{demo_train.FORBIDDEN[-1]}",
    )
    accuracy = demo_train.accuracy(remote, data.test_images, data.test_labels)
    say("accuracy", f"[bold]{accuracy:.1%}[/] on the test images; at least {recipe.accuracy_min:.0%} is asked for")
    say("loss", f"{remote['losses'][-1]:.6f} at the last step through the server, {local['losses'][-1]:.6f} locally")
    names = demo_train.PARAMS
    difference = max(float(np.abs(remote[name] - local[name]).max()) for name in names)
    say("difference", f"[bold]{difference:g}[/] is the largest between the parameters of the two trainings")
    draw(data.name, remote["losses"], local["losses"])
    say("picture", str(PICTURE))
    if any(remote[name].tobytes() != local[name].tobytes() for name in names):
        raise FailedError("the two trainings did not end on the same parameters")
    if accuracy < recipe.accuracy_min:
        raise FailedError(f"accuracy {accuracy:.1%}, expected at least {recipe.accuracy_min:.0%}")


def draw(title: str, remote: npt.NDArray[np.float64], local: npt.NDArray[np.float64]) -> None:
    """Writes the picture of both loss curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    window = max(1, len(remote) // 50)
    steps = np.arange(window, len(remote) + 1)
    mean = np.ones(window) / window
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, np.convolve(remote, mean, "valid"), color="tab:blue", linewidth=2, label="server's optimizer")
    axes.plot(steps, np.convolve(local, mean, "valid"), color="black", linestyle=(0, (3, 6)), label="local optimizer")
    axes.set(
        title=f"{title}: training loss", xlabel="step", ylabel=f"cross-entropy, mean of {window} steps", yscale="log"
    )
    axes.grid(which="both", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


def run(folder: pathlib.Path, processes: contextlib.ExitStack) -> None:
    began_s = time.monotonic()
    server = processes.enter_context(start_server(folder))
    data = demo_data.load()
    recipe = RECIPES[data.name]
    images, pixels = data.train_images.shape
    say("data", f"{data.name} from {data.source}: {images:,} images to train on, {len(data.test_images):,} to test")
    parameters = (pixels + 1) * recipe.hidden + (recipe.hidden + 1) * demo_data.CLASSES
    say("model", f"{pixels} → {recipe.hidden} → {demo_data.CLASSES} units in NumPy, {parameters:,} parameters, Adam")
    np.savez(folder / "data.npz", images=data.train_images, labels=data.train_labels)
    (folder / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe)))

    target = wait_for_target(server, folder / "port")
    say("server", f"on {target}, process {server.id}, up after {time.monotonic() - began_s:.1f} s")
    script = str(HERE / "demo_train.py")
    remote = processes.enter_context(Process(folder, "remote", script, str(folder), target))
    local = processes.enter_context(Process(folder, "local", script, str(folder)))
    say("training", f"twice at once, in processes {remote.id} and {local.id}")
    show_progress({"through the server": remote, "locally, with JAX": local}, recipe.steps(images), server)
    remote.check_success()
    local.check_success()
    server.terminate()
    server.check_success()
    say("server", "stopped by SIGTERM, exit code 0")

    results = {}
    for training in (remote, local):
        with np.load(folder / f"{training.name}.npz") as arrays:
            results[training.name] = dict(arrays)
    report(data, recipe, results)
    out.print(f"\n[bold green]done[/] in {time.monotonic() - began_s:.0f} s")


def main() -> int:
    # `timeout` and container engines end with SIGTERM: then, too, no process may stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out.print("[bold]optwire demo[/]: a model trains here, its optimizer lives in another process\n")
    try:
        with tempfile.TemporaryDirectory(prefix="optwire-demo-") as name, contextlib.ExitStack() as processes:
            run(pathlib.Path(name), processes)
    except KeyboardInterrupt:
        out.print("\n[bold]interrupted[/]; every process was stopped")
        return 130
    except FailedError as exc:
        out.print("\n[bold red]failed[/]")
        out.print(str(exc), markup=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
