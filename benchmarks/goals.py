"""Writes what `make bench` and `make bench-peers` found into docs/performance.md and README.md, beside the goals.

`python benchmarks/goals.py` replaces what lies between the marks ``<!-- NAME -->`` and ``<!-- /NAME -->``.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from optwire_bench import reports

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
DOCUMENTS = (HERE.parent / "docs" / "performance.md", HERE.parent / "README.md")
KINDS = ("step", "peers", "workers", "bytes", "limits", "fairness", "cold")


class Found:
    """The figures that there are."""

    def __init__(self) -> None:
        paths = {kind: RESULTS / f"{kind}.json" for kind in KINDS}
        self.by_kind = {kind: json.loads(path.read_text()) for kind, path in paths.items() if path.exists()}

    def row(self, kind: str, model: str, case: str) -> dict[str, Any]:
        """The figures of a case; raises LookupError."""
        for entry in self.by_kind[kind]["models"]:
            for row in entry["rows"]:
                if (entry["model"], row["case"]) == (model, case):
                    return row | {"payload_bytes": entry["payload_bytes"]}
        raise KeyError(f"{kind}: {model}, {case}")

    def over(self, kind: str, model: str, case: str, other: str) -> str:
        """One case's time over another's, formed within each round; raises LookupError, also where they shared none."""
        own, its = self.row(kind, model, case), self.row(kind, model, other)
        if own["group"] != its["group"]:
            raise LookupError(f"{kind}: {model}, {case} and {other} did not fit in memory at the same time")
        ratios = [a / b for a, b in zip(own["rounds_ms"], its["rounds_ms"], strict=True)]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"

    def crew(self, count: int, case: str, over: str) -> str:
        """A step of so many workers over another's, on 25 million parameters; raises LookupError."""
        scaling = self.by_kind["workers"]["scaling"]
        for row in scaling["rows"] if scaling["model"] == "25M" else ():
            if (row["workers"], row["of"], row["case"]) == (count, count, case) and over in row["over"]:
                ratio = row["over"][over]
                return f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"
        raise KeyError(f"workers: {count}, {case} over {over}")

    def beside_a_slow_one(self, mode: str) -> str:
        """The share of fast workers' pushes; raises LookupError."""
        for row in self.by_kind["workers"]["stragglers"]["rows"]:
            if row["mode"] == mode:
                return f"{mode} {row['share']:.2f} ({row['share_min']:.2f}–{row['share_max']:.2f})"
        raise KeyError(f"workers: {mode}")

    def transfers(self, *ways: str) -> list[dict[str, Any]]:
        """What the stream made of the machine, in some ways, by size."""
        return [row for row in self.by_kind["limits"]["rows"] if row["case"] == "stream" and row["way"] in ways]


def ratio(found: Found, model: str, case: str) -> str:
    row = found.row("step", model, case)
    return f"{row['ratio']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})"


def shares(found: Found, *ways: str) -> str:
    return ", ".join(f"{r['bytes'] / 1e6:g} MB {r['way']} {r['of_raw']:.2f}" for r in found.transfers(*ways))


def costs(found: Found) -> str:
    rows = [row for row in found.transfers("up", "down") if row["bytes"] >= 100_000_000]
    faults, cpu_s = max(row["faults_a_gb"] for row in rows), max(row["cpu_s_a_gb"] for row in rows)
    return f"{faults:,.0f}; {cpu_s:.2f} at most"


def wire(found: Found) -> str:
    said = []
    for case in ("stream bf16", "stream int8", "stream top_k(0.01)", "stream sign"):
        row = found.row("bytes", "1M", case)
        up, down = (row[f"wire_{way}_bytes"] / row["payload_bytes"] for way in ("up", "down"))
        said.append(f"{case.removeprefix('stream ')} {up:.3f} up, {down:.3f} down")
    return "; ".join(said)


def cold_start(found: Found) -> str:
    rows = found.by_kind["cold"]["rows"]
    compile_s = statistics.median(row["first"]["compile_s"] for row in rows)
    return f"{compile_s:.2f} s; {max(row['second']['compilations'] for row in rows)} compilations"


def memory(found: Found) -> str:
    row = found.row("step", "100M", "stream")
    return f"{row['server_above_state_mib']:.0f} MiB; {row['client_above_grads_and_params_mib']:.0f} MiB"


def fair(found: Found, name: str) -> str:
    return "; ".join(
        f"{row['transport']} {row[name]:.2f} ({row[f'{name}_min']:.2f}–{row[f'{name}_max']:.2f})"
        for row in found.by_kind["fairness"]["rows"]
    )


# Of 25 million parameters: what it is called, and the case.
FIGURES = (
    ("local: jitted, flat, state donated", "local"),
    ("shared memory", "shared_memory"),
    ("stream", "stream"),
    ("stream, `bf16` both ways", "stream bf16"),
    ("stream, `int8` both ways", "stream int8"),
    ("naive: generated messages, one unary call", "naive"),
)

# measure, goal, what says it
GOALS: tuple[tuple[str, str, Callable[[Found], str]], ...] = (
    ("shared memory / local flat, 25 M", "≤ 1.6 [1.3]", lambda f: ratio(f, "25M", "shared_memory")),
    ("the same, 100 M", "≤ 1.3 [1.15]", lambda f: ratio(f, "100M", "shared_memory")),
    (
        "shared memory / local optax, GPT-2 small, ordered",
        "≤ 1.0",
        lambda f: f.over("step", "gpt2", "shared_memory", "local-optax"),
    ),
    (
        "shared memory / local optax, GPT-2 small, common form",
        "≤ 0.35",
        lambda f: f.over("step", "gpt2", "shared_memory", "local-optax-common"),
    ),
    ("stream f32 / local flat, 25 M", "≤ 9 [7]", lambda f: ratio(f, "25M", "stream")),
    ("stream bf16 both ways / local flat, 25 M", "≤ 6 [4.5]", lambda f: ratio(f, "25M", "stream bf16")),
    ("stream / raw TCP, one way", "≥ 0.5 [0.65]", lambda f: shares(f, "up", "down")),
    ("stream / raw TCP, duplex", "≥ 0.38 [0.45]", lambda f: shares(f, "duplex")),
    ("minor faults per GB; CPU seconds per GB, both ends", "≤ 10,000 [1,000]; ≤ 1.6 [1.2]", costs),
    ("Ray actor / shared memory, 25 M", "≥ 2 [3]", lambda f: f.over("peers", "25M", "Ray actor", "shared_memory")),
    ("stream f32 / torch rpc, 25 M", "≤ 1.15 [1.0]", lambda f: f.over("peers", "25M", "stream", "torch rpc")),
    ("torch rpc / stream bf16, 25 M", "≥ 1.2", lambda f: f.over("peers", "25M", "torch rpc", "stream bf16")),
    (
        "stream f32 / torch rpc over TCP only, 25 M",
        "none: like with like",
        lambda f: f.over("peers", "25M", "stream", "torch rpc TCP"),
    ),
    (
        "torch rpc over TCP only / stream bf16, 25 M",
        "none: the same bytes' way",
        lambda f: f.over("peers", "25M", "torch rpc TCP", "stream bf16"),
    ),
    ("torch rpc / shared memory, 25 M", "≥ 4", lambda f: f.over("peers", "25M", "torch rpc", "shared_memory")),
    ("naive unary / stream f32, 25 M", "≥ 6 [10]", lambda f: f.over("step", "25M", "naive", "stream")),
    (
        "1,000 parameters on an open stream, p50",
        "≤ 0.5 ms [0.35]",
        lambda f: f"{f.row('step', '1k', 'stream')['p50_ms']:.2f} ms",
    ),
    ("cold start of 2,000 leaves: compile; second session", "≤ 0.5 s; 0 compilations", cold_start),
    ("server above state; client above grads and params, 400 MB", "≤ 64 MB; ≤ 32 MB", memory),
    ("tiny session's p99 beside 100 M / on half the machine", "≤ 2 [1.3]", lambda f: fair(f, "ratio")),
    (
        "the same, beside processes that only compute, as many as cores",
        "none: the scheduler's share",
        lambda f: fair(f, "busy_ratio"),
    ),
    (
        "tiny session's p99 beside 100 M / beside those",
        "none: the server's share",
        lambda f: fair(f, "beside_over_busy"),
    ),
    (
        "two workers over shared memory / one, 25 M",
        "≤ 1.6",
        lambda f: f.crew(2, "shared_memory", "one worker"),
    ),
    (
        "stream f32 / torch rpc, two and four workers, 25 M",
        "≤ 1.2 [1.0]",
        lambda f: "; ".join(f.crew(count, "stream", "torch rpc") for count in (2, 4)),
    ),
    (
        "stream bf16 / torch rpc, two and four workers, 25 M",
        "< 1",
        lambda f: "; ".join(f.crew(count, "stream bf16", "torch rpc") for count in (2, 4)),
    ),
    (
        "stream f32 / torch rpc over TCP only, two and four workers, 25 M",
        "none: like with like",
        lambda f: "; ".join(f.crew(count, "stream", "torch rpc TCP") for count in (2, 4)),
    ),
    (
        "pushes of fast workers beside one 5 times slower / without it",
        "≥ 0.9",
        lambda f: "; ".join(f.beside_a_slow_one(mode) for mode in ("async", "k_of_n(3, 4)")),
    ),
    ("bytes / f32", "bf16 0.50, int8 ≤ 0.27, top-k 1 % ≤ 0.03, sign ≤ 0.04", wire),
)


def goals(found: Found) -> Iterator[str]:
    """The table; what has not been measured says so."""
    yield "| measure | goal [stretch] | measured |"
    yield "|---|---|---|"
    for measure, goal, figure in GOALS:
        try:
            value = figure(found)
        except LookupError:
            value = "not measured"
        yield f"| {measure} | {goal} | {value} |"


def figures(found: Found) -> Iterator[str]:
    """The table of a few cases; raises LookupError."""
    yield "| step | ms, median | times the local step (min–max) |"
    yield "|---|---:|---:|"
    for said, case in FIGURES:
        row = found.row("step", "25M", case)
        yield f"| {said} | {row['median_ms']:.3g} | {ratio(found, '25M', case)} |"


def main() -> None:
    found = Found()
    parts = {"goals": "\n".join(goals(found))}
    with contextlib.suppress(LookupError):
        parts["figures"] = "\n".join(figures(found))
    for kind, result in found.by_kind.items():
        parts[kind] = reports.text(result)
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for name, body in parts.items():
            marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
            text = marked.sub(lambda match, body=body: f"{match[1]}\n{body}\n\n{match[2]}", text)
        document.write_text(text, encoding="utf-8")
    print(parts["goals"])


if __name__ == "__main__":
    main()
