"""Measures a remote step against a local one: time, bytes on the wire, peak memory, growth. ``make bench`` runs it.

Local, unary and stream steps take turns within a round, and ratios are formed within a round, so that a noisy machine
disturbs them alike. See benchmarks/README.md for what the columns mean.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import counting

HERE = pathlib.Path(__file__).parent
# parameters -> (rounds, steps a round)
SIZES = {1_000: (15, 40), 1_000_000: (15, 5), 25_000_000: (9, 3)}
# What is measured up to how many parameters only.
PARAMETERS_MAX = {"empty": 1_000, "unary": 500_000}
GROWTH_STEPS = 10_000
MIB = 1024 * 1024


class Role:
    """A process of ``roles.py``."""

    def __init__(self, *argv: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "roles.py"), *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, **values: int) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of the benchmark ended with {self.process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(30)


@contextlib.contextmanager
def server() -> Iterator[tuple[str, int]]:
    """A server in a process of its own: (target, pid)."""
    with tempfile.TemporaryDirectory() as folder:
        port_file = pathlib.Path(folder, "port")
        process = subprocess.Popen(
            [sys.executable, "-m", "optwire_server", "serve", "--listen", "127.0.0.1:0", "--port-file", str(port_file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 60
            while not port_file.exists() or not port_file.read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("the server did not start")
                time.sleep(0.05)
            yield port_file.read_text(), process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def memory_bytes(pid: int, what: str = "VmRSS") -> int:
    """Resident memory of a process now (VmRSS), or its peak (VmHWM)."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(what)


def reset_peak(pid: int) -> None:
    """Makes VmHWM start anew."""
    pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")


def faults(pid: int) -> int:
    """Minor page faults of a process so far."""
    return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(parameters: int, roles: dict[str, Role], server_pid: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """One size: a row for each role that takes it."""
    used = {name: role for name, role in roles.items() if parameters <= PARAMETERS_MAX.get(name, parameters)}
    before = memory_bytes(server_pid)
    held = {}
    for name, role in used.items():
        if name == "stream":
            before = memory_bytes(server_pid)
        role.ask("open", parameters=parameters)
        role.ask("step", count=3)  # compile, warm up
        held[name] = memory_bytes(role.process.pid)
    reset_peak(server_pid)
    for role in used.values():
        reset_peak(role.process.pid)
    spent = dict.fromkeys(used, 0.0)
    faulted = dict.fromkeys(used, 0)
    medians: dict[str, list[float]] = {name: [] for name in used}
    samples: dict[str, list[float]] = {name: [] for name in used}
    for _ in range(rounds):
        for name, role in used.items():
            pids = (role.process.pid,) if name == "local" else (role.process.pid, server_pid)
            cpu, minor = sum(map(cpu_s, pids)), sum(map(faults, pids))
            seconds = role.ask("step", count=steps)
            spent[name] += sum(map(cpu_s, pids)) - cpu
            faulted[name] += sum(map(faults, pids)) - minor
            medians[name].append(statistics.median(seconds))
            samples[name] += seconds
    payload, state = 4 * parameters, 12 * parameters
    rows = []
    for name, role in used.items():
        ratios = [own / local for own, local in zip(medians[name], medians["local"], strict=True)]
        row: dict[str, Any] = {
            "parameters": parameters,
            "transport": name,
            "step_ms_min": min(samples[name]) * 1e3,
            "step_ms_median": statistics.median(samples[name]) * 1e3,
            "step_ms_p90": statistics.quantiles(samples[name], n=10)[-1] * 1e3,
            "ratio_median": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "cpu_s_per_step": spent[name] / (rounds * steps),
            "faults_per_step": faulted[name] / (rounds * steps),
            "client_peak_over_idle_payloads": (memory_bytes(role.process.pid, "VmHWM") - held[name]) / payload,
        }
        if name == "stream":
            peak = memory_bytes(server_pid, "VmHWM") - before
            row["server_peak_bytes"] = peak
            row["server_peak_above_state_payloads"] = (peak - state) / payload
        rows.append(row)
    for role in used.values():
        role.ask("close")
    return rows


def wire_bytes(target: str, parameters: int) -> dict[str, float]:
    """Bytes of TCP payload a step, up and down, counted by a forwarder in between."""
    with counting.forwarder(target) as (front, count):
        role = Role("stream", front)
        role.ask("open", parameters=parameters)
        role.ask("step", count=1)
        up, down = count.up, count.down
        role.ask("step", count=2)
        result = {"up": (count.up - up) / 2, "down": (count.down - down) / 2}
        role.ask("close")
        role.end()
    return result


def growth(roles: dict[str, Role], server_pid: int) -> dict[str, float]:
    """Resident memory gained over many small steps, after a warm-up of a tenth of them."""
    result = {}
    for name in ("unary", "stream"):
        role = roles[name]
        role.ask("open", parameters=1_000)
        role.ask("step", count=GROWTH_STEPS // 10)
        start = memory_bytes(server_pid), memory_bytes(role.process.pid)
        role.ask("step", count=GROWTH_STEPS)
        result[f"{name}_server_mib"] = (memory_bytes(server_pid) - start[0]) / MIB
        result[f"{name}_client_mib"] = (memory_bytes(role.process.pid) - start[1]) / MIB
        role.ask("close")
    return result


def report(result: dict[str, Any]) -> None:
    """Prints the table that benchmarks/README.md shows."""
    print(f"{result['machine']}; adam, float32, 4 leaves at 1,000 parameters and 16 above; {result['versions']}\n")
    print("| parameters | step | median ms | min | p90 | ratio to local, median (min–max) | CPU s/step | faults/step |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    for row in result["steps"]:
        print(
            f"| {row['parameters']:,} | {row['transport']} | {row['step_ms_median']:.3g} | {row['step_ms_min']:.3g} | "
            f"{row['step_ms_p90']:.3g} | {row['ratio_median']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f}) | "
            f"{row['cpu_s_per_step']:.2g} | {row['faults_per_step']:.0f} |"
        )
    print()
    for parameters, wire in result["wire"].items():
        payload = 4 * int(parameters)
        print(
            f"wire, {int(parameters):,} parameters: {wire['up']:,.0f} bytes up, {wire['down']:,.0f} down a step "
            f"({wire['up'] / payload:.4f} and {wire['down'] / payload:.4f} of the payload)"
        )
    for row in result["steps"]:
        if "server_peak_bytes" in row:
            above_state = row["server_peak_bytes"] - 12 * row["parameters"]
            print(
                f"memory, {row['parameters']:,} parameters: server's peak above its state {above_state / MIB:.1f} MiB, "
                f"{row['server_peak_above_state_payloads']:.2f} payloads; client's peak above its idle "
                f"{row['client_peak_over_idle_payloads']:.2f} payloads"
            )
    print(f"growth over {GROWTH_STEPS:,} steps of 1,000 parameters, MiB:", json.dumps(result["growth"]))


def versions() -> str:
    """What the figures were measured with."""
    from importlib import metadata

    names = ("jax", "grpcio", "protobuf", "numpy")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in names)])


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    flags.add_argument("--sizes", default=",".join(map(str, SIZES)), help="parameters, comma-separated")
    options = flags.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    with server() as (target, server_pid):
        roles = {"local": Role("local")} | {name: Role(name, target) for name in ("empty", "unary", "stream")}
        result: dict[str, Any] = {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "versions": versions(),
            "steps": [],
            "wire": {},
        }
        for size in sizes:
            result["steps"] += measure(size, roles, server_pid, *SIZES.get(size, (9, 3)))
        for size in sizes:
            result["wire"][size] = wire_bytes(target, size)
        result["growth"] = growth(roles, server_pid)
        for role in roles.values():
            role.end()
    report(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
