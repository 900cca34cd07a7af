"""What a run found, as JSON, as a Markdown table, and as a plot."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optwire_bench import fairness, processes, stepping

# Columns that are no numbers.
_WORDS = ("model", "step", "checked", "way", "transport", "session", "mode", "crews")
_OURS, _LOCAL, _PEER = "#1f77b4", "#777777", "#d98c3f"


def text(result: Mapping[str, Any]) -> str:
    """The whole report in Markdown: the machine, a table, and what there is to say about it."""
    bodies = {"step": _step, "workers": _workers, "limits": _limits, "fairness": _fairness, "cold": _cold}
    body = bodies[result["kind"]]
    return "\n".join([_machine(result["machine"]), "", *body(result)])


def write_json(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes the figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def updated(before: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Steps measured earlier with the models measured now in place of those of the same name; by size.

    Args:
      before: what ``read_steps`` gave.
      result: of this run.
    """
    by_name = {entry["model"]: entry for entry in (*before["models"], *result["models"])}
    return {**result, "models": sorted(by_name.values(), key=lambda entry: entry["parameters"])}


def read_steps(path: pathlib.Path, machine: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of ``bench step`` in a file.

    Raises:
      BenchError: there is no such file, it is something else, or it is of another machine or other versions.
    """
    try:
        before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, other = before["kind"], before["machine"]
    except (OSError, ValueError, LookupError, TypeError) as exc:
        raise processes.BenchError(f"{path}: no figures to update: {exc}") from exc
    if kind != "step":
        raise processes.BenchError(f"{path}: figures of {kind!r}, expected those of 'step'")
    if other != machine:
        raise processes.BenchError(f"{path}: of {_machine(other)}; this is {_machine(machine)}: measure all of it anew")
    return before


def plot(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws the figures as bars, the median of the rounds, with whiskers to the least and the greatest, as a PNG file.

    Raises:
      ModuleNotFoundError: there is no matplotlib.
    """
    picture = {"step": _step_plot, "workers": _workers_plot}[result["kind"]](result)
    picture.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=130)


def _step_plot(result: Mapping[str, Any]) -> Any:
    from matplotlib import figure

    entries = result["models"]
    picture = figure.Figure(figsize=(9, 0.6 + sum(0.9 + 0.32 * len(entry["rows"]) for entry in entries)))
    axes = picture.subplots(
        len(entries), 1, squeeze=False, gridspec_kw={"height_ratios": [len(entry["rows"]) + 1 for entry in entries]}
    )
    for entry, (axis,) in zip(entries, axes, strict=True):
        rows = entry["rows"][::-1]
        values = [row["median_ms"] for row in rows]
        spread = [
            [row["median_ms"] - min(row["rounds_ms"]) for row in rows],
            [max(row["rounds_ms"]) - row["median_ms"] for row in rows],
        ]
        colours = [_OURS if row["ours"] else _LOCAL if row["case"].startswith("local") else _PEER for row in rows]
        axis.barh([row["case"] for row in rows], values, xerr=spread, color=colours, ecolor="#333333", capsize=2)
        axis.set_xscale("log")
        axis.set_title(f"{entry['model']}: {entry['parameters']:,} parameters, {entry['tensors']} leaves", fontsize=10)
        axis.set_xlabel("ms a step", fontsize=8)
        axis.tick_params(labelsize=8)
        for place, row in enumerate(rows):
            axis.annotate(
                f" {row['ratio']:.2f}×", (max(row["rounds_ms"]), place), va="center", fontsize=7, annotation_clip=False
            )
        axis.margins(x=0.15)
    return picture


def _workers_plot(result: Mapping[str, Any]) -> Any:
    from matplotlib import figure

    halves = [name for name in ("scaling", "stragglers") if name in result]
    picture = figure.Figure(figsize=(6.5 * len(halves), 5))
    for axis, half in zip(picture.subplots(1, len(halves), squeeze=False)[0], halves, strict=True):
        found = result[half]
        if half == "scaling":
            axis.set_title(f"{found['model']} parameters, Adam: ms a step of all workers", fontsize=10)
            rows = [(f"{r['case']}, {r['workers']}", r) for r in _once(found["rows"])][::-1]
            values = [row["median_ms"] for _, row in rows]
            least, greatest = ([of(row["rounds_ms"]) for _, row in rows] for of in (min, max))
            axis.set_xscale("log")
            axis.tick_params(axis="x", which="minor", labelbottom=False)
        else:
            axis.set_title(f"fast workers beside one {found['slower']}× slower: share of their pushes", fontsize=10)
            rows = [(row["mode"], row) for row in found["rows"]][::-1]
            values, least, greatest = ([row[name] for _, row in rows] for name in ("share", "share_min", "share_max"))
            axis.axvline(0.9, color=_LOCAL, linestyle=":")
        spread = [[v - low for v, low in zip(values, least, strict=True)]]
        spread.append([high - v for v, high in zip(values, greatest, strict=True)])
        colours = [
            _LOCAL if row.get("case") == "local" else _OURS if row.get("ours", True) else _PEER for _, row in rows
        ]
        axis.barh([name for name, _ in rows], values, xerr=spread, color=colours, ecolor="#333333", capsize=2)
        axis.tick_params(labelsize=8)
    return picture


def _once(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows without those that another group has as well."""
    return list({(row["case"], row["workers"]): row for row in reversed(rows)}.values())[::-1]


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['cores']} cores, {machine['processor']}, {machine['memory_gib']} GiB; {versions}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield ("|" + "|".join("---" if name in _WORDS else "---:" for name in head) + "|")
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _step(result: Mapping[str, Any]) -> Iterator[str]:
    rounds = ", ".join(f"{entry['rounds']} on {entry['model']}" for entry in result["models"])
    yield (
        f"Adam, float32; rounds in which all take turns: {rounds}; {result['warm_up']} steps of warm-up, and one at "
        "the start of each turn, are not counted; ratios are formed within a round."
    )
    yield ""
    head = ("model", "step", "median ms", "best", "p99", "ratio to local (min–max)", "CPU s", "faults", "checked")
    rows = []
    for entry in result["models"]:
        for row in entry["rows"]:
            rows.append(
                (
                    entry["model"],
                    row["case"],
                    f"{row['median_ms']:.3g}",
                    f"{row['best_ms']:.3g}",
                    f"{row['p99_ms']:.3g}",
                    f"{row['ratio']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})",
                    f"{row['cpu_s_a_step']:.2g}",
                    f"{row['faults_a_step']:.0f}",
                    row["check"],
                )
            )
    yield from _table(head, rows)
    yield ""
    for entry in result["models"]:
        for row in entry["rows"]:
            said = [row["says"]] if row["says"] else []
            if "wire_up_bytes" in row:
                up, down = (row[f"wire_{way}_bytes"] / entry["payload_bytes"] for way in ("up", "down"))
                said.append(f"on the wire {up:.4f} of the float32 payload up, {down:.4f} down")
            if "server_above_state_mib" in row:
                said.append(
                    f"peak memory {row['server_above_state_mib']:.0f} MiB above the state on the server, "
                    f"{row['client_above_grads_and_params_mib']:.0f} MiB above gradients and parameters in the client"
                )
            if said:
                yield f"* {entry['model']}, {row['case']}: {'; '.join(said)}."
        if entry["disturbed"]:
            yield (
                f"* {entry['model']}: **disturbed**: the local step's median is over {stepping.DISTURBED} times its "
                "best. Something else used the machine; measure again."
            )
        for line in entry["left_out"]:
            yield f"* Left out: {line}"


def _workers(result: Mapping[str, Any]) -> Iterator[str]:
    if "scaling" in result:
        yield from _scaling(result["scaling"])
    if len(result.keys() & {"scaling", "stragglers"}) == 2:
        yield ""
    if "stragglers" in result:
        yield from _stragglers(result["stragglers"])


def _scaling(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Adam on {found['model']} parameters, float32, the mean of all workers' gradients; {found['rounds']} rounds "
        f"in which all of a group take turns of {found['steps_a_turn']} steps. A step ends when every worker has its "
        "parameters; ratios are formed within a round."
    )
    yield ""
    peers = [row["case"] for row in _once(found["rows"]) if not row["ours"] and row["case"] != stepping.REFERENCE]
    peers = list(dict.fromkeys(peers))
    over = ["one worker", *peers]
    rows = []
    for row in found["rows"]:
        ratios = [row["over"].get(name) for name in over]
        rows.append(
            (
                f"1 and {row['of']}" + (f" ({row['group'] + 1})" if row["group"] else ""),
                row["case"],
                str(row["workers"]),
                f"{row['median_ms']:.3g}",
                f"{row['best_ms']:.3g}",
                f"{row['worst_ms']:.3g}",
                *(f"{r['median']:.2f} ({r['min']:.2f}–{r['max']:.2f})" if r else "–" for r in ratios),
                f"{row['cpu_s_a_step']:.2g}",
                row["check"],
            )
        )
    head = (
        "crews",
        "step",
        "workers",
        "median ms",
        "best",
        "worst",
        *(f"/ {name}" for name in over),
        "CPU s",
        "checked",
    )
    yield from _table(head, rows)
    yield ""
    for case, says in {row["case"]: row["says"] for row in found["rows"] if row["says"]}.items():
        yield f"* {case}: {says}."
    for count in found["disturbed"]:
        yield (
            f"* {count} workers: **disturbed**: a local step's median is over {stepping.DISTURBED} times its best. "
            "Something else used the machine; measure again."
        )
    for line in found["left_out"]:
        yield f"* Left out: {line}"


def _stragglers(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{found['fast']} workers whose gradient takes {found['gradient_ms']:g} ms, and one {found['slower']:g} times "
        f"slower; {found['model']} parameters; {found['rounds']} rounds of windows of {found['window_s']:g} s. Pushes "
        "a second that became part of a step, of the fast workers beside the slow one and without it, and the share "
        "of the two, formed within a round."
    )
    yield ""
    rows = [
        (
            row["mode"],
            f"{row['steps_a_s']:.1f}",
            f"{row['fast_a_s']:.1f}",
            f"{row['fast_alone_a_s']:.1f}",
            f"{row['share']:.2f} ({row['share_min']:.2f}–{row['share_max']:.2f})",
            f"{row['slow_a_s']:.1f}",
            f"{row['slow_late_a_s']:.1f}",
        )
        for row in found["rows"]
    ]
    yield from _table(
        ("mode", "steps/s", "fast", "without the slow one", "share (min–max)", "slow", "slow, too late"), rows
    )


def _limits(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"{result['rounds']} rounds in which all take turns; the share of raw TCP is formed within a round."
    yield ""
    head = ("MB", "way", "transport", "GB/s", "best", "of raw TCP (min–max)", "CPU s/GB", "faults/GB")
    rows = []
    for row in result["rows"]:
        share = f"{row['of_raw']:.2f} ({row['of_raw_min']:.2f}–{row['of_raw_max']:.2f})" if "of_raw" in row else "–"
        rows.append(
            (
                f"{row['bytes'] / 1e6:g}",
                row["way"],
                row["case"],
                f"{row['gb_s']:.2f}",
                f"{row['gb_s_best']:.2f}",
                share,
                f"{row['cpu_s_a_gb']:.2f}",
                f"{row['faults_a_gb']:.0f}",
            )
        )
    yield from _table(head, rows)


def _fairness(result: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"A session of {result['tiny']} parameters over a stream: ms a step. {result['rounds']} rounds of windows of "
        f'{result["window_s"]:g} s; "half": server and client on {result["half_cores"]} of the cores, nobody beside; '
        f'"busy": beside {result["computing"]} processes that only compute, without a server.'
    )
    yield ""
    states = [cell for state in fairness.STATES for cell in (f"{state} p50", "p99")]
    ratios = [f"{own}/{other}" for _, own, other in fairness.RATIOS]
    rows = []
    for row in result["rows"]:
        figures = [f"{row[f'{state}_{name}_ms']:.2f}" for state in fairness.STATES for name in ("p50", "p99")]
        formed = [
            f"{row[name]:.2f} ({row[f'{name}_min']:.2f}–{row[f'{name}_max']:.2f})" for name, _, _ in fairness.RATIOS
        ]
        rows.append((f"{row['beside']} over {row['transport']}", *figures, *formed))
    yield from _table(("transport", *states, *(f"p99 {ratio} (min–max)" for ratio in ratios)), rows)


def _cold(result: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{result['optimizer']} on {result['model']} parameters in {result['tensors']:,} leaves, then on 50 leaves of "
        f"other shapes; {result['rounds']} fresh servers, the median one."
    )
    yield ""
    rows = []
    for name in ("first", "second"):
        ordered = sorted((row[name] for row in result["rows"]), key=lambda row: row["create_s"] + row["step_s"])
        row = ordered[len(ordered) // 2]
        counts = str(row["compilations"]), f"{row['compile_s']:.2f}", str(row["ahead"])
        rows.append((name, f"{row['create_s']:.2f}", f"{row['step_s']:.2f}", *counts))
    yield from _table(("session", "create s", "first step s", "compilations", "compile s", "ahead, later"), rows)
