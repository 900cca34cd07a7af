"""Measures steps of a torch model with ``overlap=True`` against the same steps without it.

    python benchmarks/overlap.py [--json FILE]       # over loopback, and over a link of 1 Gbit/s each way
    python benchmarks/overlap.py --gbits 0 --threads 2 --parameters 8000000

The model's batch is chosen so that backward takes as long as the transfer of its gradients and parameters together (or
``--backward`` times as long). Both kinds of step take turns within a round, with their own copies of one model; at the
end the copies must be equal bit for bit. The link is a forwarder in a process of its own, which lets so many bytes pass
a second in each direction, so that a transfer costs time and hardly any CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from optwire_bench import processes, reports

ROUNDS, STEPS, WARM = 9, 3, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=4_000_000, metavar="N", help="of the model, about")
    parser.add_argument("--gbits", type=float, nargs="*", default=[0.0, 1.0], metavar="G", help="links; 0: loopback")
    parser.add_argument("--backward", type=float, nargs="*", default=[1.0], metavar="X", help="over the transfer")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also writes the figures to this file")
    parser.add_argument("--forward", nargs=2, metavar=("TARGET", "BYTES_PER_S"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.forward:
        forward(options.forward[0], float(options.forward[1]))
        return
    figures = []
    for gbits in options.gbits:
        for backward in options.backward:
            with served() as target, linked(target, gbits) as reached:
                figures.append({"gbits": gbits, **measured(reached, options, backward)})
                show(figures[-1], options)
    if options.json:
        facts = {"machine": machine(), "torch_threads": options.threads, "rounds": options.rounds}
        reports.write_json({**facts, "steps_a_turn": STEPS, "figures": figures}, options.json)


def machine() -> dict[str, Any]:
    """As of every benchmark, and torch."""
    found = processes.machine()
    return {**found, "versions": {**found["versions"], "torch": metadata.version("torch")}}


def show(found: dict[str, Any], options: argparse.Namespace) -> None:
    link = f"{found['gbits']:g} Gbit/s" if found["gbits"] else "loopback"
    print(
        f"{link}: {found['parameters']:,} parameters, {os.cpu_count()} cores, torch on {options.threads}; "
        f"forward {found['forward_ms']:.0f} ms, backward {found['backward_ms']:.0f} ms, transfer both ways "
        f"{found['transfer_ms']:.0f} ms\n"
        f"  off {found['off_ms']:.1f} ms, on {found['on_ms']:.1f} ms a step; ratio {found['ratio']:.2f} "
        f"({found['ratio_min']:.2f} to {found['ratio_max']:.2f}), median of {options.rounds} rounds; "
        f"step() itself {found['step_off_ms']:.1f} and {found['step_on_ms']:.1f} ms; "
        f"{found['resent_bytes']:,} bytes sent again; equal bits",
        flush=True,
    )


# ---------------------------------------------------------------------------------------------------- what is measured


class Trained:
    """A copy of the model, its optimizer, and the loop."""

    def __init__(self, target: str, width: int, *, overlap: bool) -> None:
        import torch

        from optwire.torch import RemoteOptimizer

        torch.manual_seed(0)
        layers = [torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh()) for _ in range(8)]
        self.model = torch.nn.Sequential(*layers)
        self.overlap = overlap
        self.optimizer = RemoteOptimizer(
            self.model.named_parameters(), "adamw", lr=1e-3, target=target, transport="stream", overlap=overlap
        )
        self.step_s: list[float] = []

    def step(self, inputs: Any) -> None:
        self.optimizer.zero_grad()
        self.model(inputs).square().mean().backward()
        begun_s = time.perf_counter()
        self.optimizer.step()
        self.step_s.append(time.perf_counter() - begun_s)

    def steps(self, inputs: Any, count: int) -> float:
        """Seconds a step; with all parameters in the model at the end."""
        begun_s = time.perf_counter()
        for _ in range(count):
            self.step(inputs)
        self.optimizer.synchronize()
        return (time.perf_counter() - begun_s) / count


def measured(target: str, options: argparse.Namespace, ratio: float) -> dict[str, Any]:
    import torch

    torch.set_num_threads(options.threads)
    width = int((options.parameters / 8) ** 0.5)
    off, on = (Trained(target, width, overlap=overlap) for overlap in (False, True))
    inputs = torch.randn(8, width)
    for each in (off, on):
        each.steps(inputs, WARM)
    transfer_s, _ = (statistics.median(pushed_s(each) for _ in range(7)) for each in (off, on))
    inputs, forward_s, backward_s = fitting(off.model, width, transfer_s * ratio)
    for each in (off, on):
        each.steps(inputs, WARM)
        each.step_s.clear()
    rounds = []
    for index in range(options.rounds):
        order = (off, on) if index % 2 else (on, off)
        took = {each.overlap: each.steps(inputs, STEPS) for each in order}
        rounds.append((took[False], took[True]))
    same = all(map(torch.equal, off.model.parameters(), on.model.parameters()))
    assert same, "overlap changed the bits"
    ratios = [slow / fast for slow, fast in rounds]
    found = {
        "parameters": sum(p.numel() for p in off.model.parameters()),
        "batch": len(inputs),
        "forward_ms": 1e3 * forward_s,
        "backward_ms": 1e3 * backward_s,
        "transfer_ms": 1e3 * transfer_s,
        "off_ms": 1e3 * statistics.median(slow for slow, _ in rounds),
        "on_ms": 1e3 * statistics.median(fast for _, fast in rounds),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "step_off_ms": 1e3 * statistics.median(off.step_s),
        "step_on_ms": 1e3 * statistics.median(on.step_s),
        "resent_bytes": on.optimizer.resent_bytes,
    }
    for each in (off, on):
        each.optimizer.close()
    return found


def pushed_s(trained: Trained) -> float:
    """Seconds of a step without overlap: up, update, down."""
    begun_s = time.perf_counter()
    trained.optimizer.step()
    trained.optimizer.synchronize()
    return time.perf_counter() - begun_s


def fitting(model: Any, width: int, wanted_s: float) -> tuple[Any, float, float]:
    """A batch with which backward takes so long, and how long forward and backward take with it."""
    import torch

    size = 64
    for _ in range(6):
        inputs = torch.randn(size, width)
        pairs = sorted(_once(model, inputs) for _ in range(5))
        forward_s, backward_s = (statistics.median(column) for column in zip(*pairs, strict=True))
        if abs(backward_s - wanted_s) < 0.1 * wanted_s:
            break
        size = max(1, round(size * wanted_s / backward_s))
    return inputs, forward_s, backward_s


def _once(model: Any, inputs: Any) -> tuple[float, float]:
    model.zero_grad()
    begun_s = time.perf_counter()
    loss = model(inputs).square().mean()
    middle_s = time.perf_counter()
    loss.backward()
    return middle_s - begun_s, time.perf_counter() - middle_s


# --------------------------------------------------------------------------------------------------- server and link


@contextlib.contextmanager
def served() -> Iterator[str]:
    """A server in a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "optwire_server", "serve", "--listen", f"127.0.0.1:{port}"]
    with running(command, port):
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def linked(target: str, gbits: float) -> Iterator[str]:
    """The target behind a link of so many Gbit/s each way; 0: as it is."""
    if not gbits:
        yield target
        return
    port = free_port()
    command = [sys.executable, __file__, "--forward", f"{port}:{target}", str(gbits * 1e9 / 8)]
    with running(command, port):
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end_s = time.monotonic() + 60
        while not _answers(port):
            assert process.poll() is None, f"{command} ended"
            assert time.monotonic() < end_s, f"{command} does not listen"
            time.sleep(0.05)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def forward(where: str, bytes_per_s: float) -> None:
    """Listens on a port, and lets so many bytes pass a second in each direction."""
    port, host, far_port = where.split(":")
    listener = socket.create_server(("127.0.0.1", int(port)))
    while True:
        near, _ = listener.accept()
        far = socket.create_connection((host, int(far_port)))
        for source, sink in ((near, far), (far, near)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_pump, args=(source, sink, bytes_per_s), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, bytes_per_s: float) -> None:
    free_s = 0.0  # when the link has passed on what came so far
    with contextlib.suppress(OSError):
        while data := source.recv(64 * 1024):
            now_s = time.monotonic()
            free_s = max(free_s, now_s) + len(data) / bytes_per_s
            if free_s - now_s > 0.001:
                time.sleep(free_s - now_s)
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    main()
