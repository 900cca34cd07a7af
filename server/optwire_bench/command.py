"""The command line: `optwire bench step|workers|limits|fairness|cold`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import pathlib
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from optwire_bench import (
    cases,
    cold,
    fairness,
    folders,
    models,
    processes,
    reports,
    scaling,
    stepping,
    stragglers,
    transfers,
)
from optwire_proto import codecs, errors

# What takes turns when nothing is asked for: up to so many parameters, and beyond.
_USUAL = (("stream", "f32"), ("stream", "bf16"), ("stream", "int8"), ("unix", "f32"), ("shared_memory", "f32"))
_USUAL_LARGE = (("shared_memory", "f32"), ("stream", "f32"))
_USUAL_MAX = 25_000_000
_USUAL_WORKERS = (("stream", "f32"), ("stream", "bf16"), ("shared_memory", "f32"))
# Of `limits`, each way: one float32; and what two sessions and raw TCP have room for.
_BYTES_MIN, _BYTES_MAX = 4, 8_000_000_000
_CODECS = ("f32", "bf16", "f16", "int8", "top_k(0.01)", "sign")


def main(argv: Sequence[str]) -> int:
    """Runs a benchmark and reports; returns the exit code: 0, or 1 for a run that failed."""
    parser = _parser()
    flags = parser.parse_args(argv)
    if getattr(flags, "update", False) and not flags.json:
        parser.error("--update needs --json")
    plot = getattr(flags, "plot", None)
    try:
        for path in filter(None, (flags.json, plot)):
            _check_writable(path)
        if plot:
            _check_plot(plot)
        folders.sweep()
        with _ended_by_sigterm():
            result = _measured(flags)
        print(reports.text(result))
        if flags.json:
            reports.write_json(result, flags.json)
        if plot:
            reports.plot(result, plot)
    except (processes.BenchError, errors.OptwireError, OSError) as exc:
        print(f"optwire bench {flags.kind}: {exc}", file=sys.stderr)
        return 1
    return 0


def _measured(flags: argparse.Namespace) -> dict[str, Any]:
    machine = processes.machine()
    before = reports.read_steps(flags.json, machine) if getattr(flags, "update", False) else None
    result: dict[str, Any] = {"kind": flags.kind, "machine": machine, **flags.run(flags)}
    return result if before is None else reports.updated(before, result)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM is raised as SystemExit, once, so that what was started is ended."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_writable(path: pathlib.Path) -> None:
    """Raises OSError where a file cannot be written, while nothing has been measured yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    path.open("ab").close()
    if is_new:
        path.unlink()


def _check_plot(path: pathlib.Path) -> None:
    if path.suffix != ".png":
        raise processes.BenchError(
            f"--plot {path}: expected the name of a PNG file, such as {path.with_suffix('.png')}"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise processes.BenchError("--plot needs matplotlib, which is not installed: pip install matplotlib")


def _parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="optwire bench",
        description="What a remote step costs, beside a local one in the same run. How: docs/performance.md.",
    )
    kinds = root.add_subparsers(dest="kind", required=True)
    _add_step(kinds.add_parser("step", help="steps, remote and local, in turns; parameters checked after every round"))
    _add_workers(kinds.add_parser("workers", help="several workers beside one, and fast ones beside a slow one"))
    _add_limits(kinds.add_parser("limits", help="one way and both ways at once, beside raw TCP and memcpy"))
    _add_fairness(kinds.add_parser("fairness", help="a tiny session beside one that keeps the server busy"))
    _add_cold(kinds.add_parser("cold", help="the first session of a fresh server, and what it compiles"))
    return root


def _add_step(step: argparse.ArgumentParser) -> None:
    step.add_argument(
        "--params",
        type=_list_of(_model),
        metavar="SIZE,...",
        help="number of parameters, such as 25M, or gpt2: 148 arrays as in GPT-2 small (default 1k,1M,25M,100M,gpt2)",
    )
    step.add_argument(
        "--tensors",
        type=_whole(0, 65_536),
        default=0,
        metavar="N",
        help="leaves of about equal size (default: as the model)",
    )
    step.add_argument(
        "--transport",
        type=_list_of(_choice("transport", cases.TRANSPORTS)),
        metavar="NAME,...",
        help=f"of {', '.join(cases.TRANSPORTS)}; unix is the stream over a Unix socket",
    )
    step.add_argument(
        "--grads-codec", type=_list_of(_codec), metavar="CODEC,...", help=f"of {', '.join(_CODECS)} (default f32)"
    )
    step.add_argument("--params-codec", type=_codec, metavar="CODEC", help="way back (default: as the gradients)")
    step.add_argument(
        "--against",
        type=_list_of(_choice("case", (*cases.LOCALS, *cases.NAIVE))),
        metavar="NAME,...",
        help=f"of {', '.join((*cases.LOCALS, *cases.NAIVE))}; local always takes part "
        "(default: the naive ones up to 25M, the ones of optax on gpt2)",
    )
    step.add_argument(
        "--beside",
        action="append",
        default=[],
        type=_beside,
        metavar="NAME=COMMAND",
        help="a program that speaks the lines of optwire_bench.roles takes turns too; repeatable",
    )
    step.add_argument(
        "--steps", type=_whole(1, 10_000), default=0, metavar="N", help="steps of a turn (default: by the size)"
    )
    step.add_argument("--no-extras", action="store_true", help="measure no bytes on the wire and no memory")
    _add_shared(step, rounds=9)
    _add_plot(step)
    step.add_argument(
        "--update", action="store_true", help="keep what the --json file has of sizes that are not measured now"
    )
    step.set_defaults(run=_step)


def _add_workers(workers: argparse.ArgumentParser) -> None:
    workers.add_argument("--params", type=_model, metavar="SIZE", help="number of parameters (default 25M)")
    workers.add_argument(
        "--workers", type=_list_of(_whole(2, 64)), metavar="N,...", help="how many there are, beside one (default 2,4)"
    )
    workers.add_argument(
        "--transport",
        type=_list_of(_choice("transport", cases.TRANSPORTS)),
        metavar="NAME,...",
        help=f"of {', '.join(cases.TRANSPORTS)} (default stream,shared_memory)",
    )
    workers.add_argument(
        "--grads-codec", type=_list_of(_codec), metavar="CODEC,...", help=f"of {', '.join(_CODECS)} (default f32)"
    )
    workers.add_argument(
        "--beside",
        action="append",
        default=[],
        type=_beside,
        metavar="NAME=COMMAND",
        help="a program that speaks the lines of optwire_bench.roles takes turns too; repeatable",
    )
    workers.add_argument(
        "--steps", type=_whole(1, 10_000), default=0, metavar="N", help="steps of a turn (default: by the size)"
    )
    workers.add_argument(
        "--gradient-ms", type=_whole(1, 10_000), metavar="MS", help="that a fast worker takes for one (default 50)"
    )
    workers.add_argument(
        "--slower", type=_whole(2, 100), default=5, metavar="X", help="times as long takes the slow one (default 5)"
    )
    workers.add_argument("--only", choices=("scaling", "stragglers"), help="one half of it (default: both)")
    _add_shared(workers, rounds=7)
    _add_plot(workers)
    workers.set_defaults(run=_workers)


def _add_limits(limits: argparse.ArgumentParser) -> None:
    limits.add_argument(
        "--bytes", type=_list_of(_size), metavar="SIZE,...", help="bytes each way (default 16M,100M,400M)"
    )
    limits.add_argument(
        "--transport",
        type=_list_of(_choice("transport", ("stream", "unix", "shared_memory"))),
        default=["stream"],
        metavar="NAME,...",
        help="of stream, unix, shared_memory (default stream)",
    )
    _add_shared(limits, rounds=9)
    limits.set_defaults(run=_limits)


def _add_fairness(fair: argparse.ArgumentParser) -> None:
    fair.add_argument("--params", type=_model, metavar="SIZE", help="of the large session (default 100M)")
    fair.add_argument(
        "--transport",
        type=_list_of(_choice("transport", ("stream", "unix", "shared_memory"))),
        metavar="NAME,...",
        help="of the large session (default stream,shared_memory)",
    )
    _add_shared(fair, rounds=5)
    fair.set_defaults(run=_fairness)


def _add_cold(first: argparse.ArgumentParser) -> None:
    first.add_argument("--params", type=_model, default="10M", metavar="SIZE", help="parameters (default 10M)")
    first.add_argument("--tensors", type=_whole(1, 65_536), default=2000, metavar="N", help="leaves (default 2000)")
    first.add_argument("--optimizer", default="adam(1e-3)", metavar="SPEC", help="as text (default adam(1e-3))")
    _add_shared(first, rounds=3)
    first.set_defaults(run=_cold)


def _add_shared(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument("--rounds", type=_whole(1, 1000), metavar="N", help=f"rounds of turns (default {rounds})")
    parser.add_argument("--quick", action="store_true", help="small, few rounds: does it run at all? Under a minute")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--no-progress", action="store_true", help="say nothing until the end")
    parser.set_defaults(usual_rounds=rounds)


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="also draw the figures into this PNG file")


def _step(flags: argparse.Namespace) -> dict[str, Any]:
    labels = flags.params or (["100k"] if flags.quick else ["1k", "1M", "25M", "100M", "gpt2"])
    result: dict[str, Any] = {}
    for label in labels:
        is_large = models.model(label).parameters > _USUAL_MAX
        pairs: Sequence[tuple[str, str]] = _USUAL_LARGE if is_large else _USUAL
        if flags.transport or flags.grads_codec:
            pairs = [(w, c) for w in flags.transport or ["stream"] for c in flags.grads_codec or ["f32"]]
        ours = [cases.remote(way, codec, flags.params_codec or "") for way, codec in pairs]
        names = flags.against if flags.against is not None else _usual_against(label, quick=flags.quick)
        others = [cases.against(name) for name in names if name != stepping.REFERENCE]
        plan = stepping.Plan(
            labels=(label,),
            tensors=flags.tensors,
            cases=(*others, *ours, *flags.beside),
            rounds=_rounds(flags),
            steps=flags.steps,
            extras=not flags.no_extras and not flags.quick,
        )
        part = stepping.run(plan, _progress(flags))
        if result:
            result["models"] += part["models"]
        else:
            result = part
    return result


def _usual_against(label: str, *, quick: bool) -> list[str]:
    if label == "gpt2":
        return ["local-optax", "local-optax-common"]
    return [] if models.model(label).parameters > _USUAL_MAX else ["naive"] if quick else list(cases.NAIVE)


def _workers(flags: argparse.Namespace) -> dict[str, Any]:
    pairs: Sequence[tuple[str, str]] = _USUAL_WORKERS
    if flags.transport or flags.grads_codec:
        pairs = [(w, c) for w in flags.transport or ["stream"] for c in flags.grads_codec or ["f32"]]
    plan = scaling.Plan(
        label=flags.params or ("100k" if flags.quick else "25M"),
        counts=tuple(flags.workers or ([2] if flags.quick else [2, 4])),
        cases=(*(cases.remote(way, codec) for way, codec in pairs), *flags.beside),
        rounds=_rounds(flags),
        steps=flags.steps,
    )
    gradient_s, window_s = (flags.gradient_ms or (20 if flags.quick else 50)) / 1e3, 0.6 if flags.quick else 5.0
    result: dict[str, Any] = {}
    if flags.only != "stragglers":
        result["scaling"] = scaling.run(plan, _progress(flags))
    if flags.only != "scaling":
        result["stragglers"] = stragglers.run(gradient_s, flags.slower, window_s, plan.rounds, _progress(flags))
    return result


def _limits(flags: argparse.Namespace) -> dict[str, Any]:
    sizes = flags.bytes or ([4_000_000] if flags.quick else [16_000_000, 100_000_000, 400_000_000])
    return transfers.run(sizes, flags.transport, _rounds(flags), _progress(flags))


def _fairness(flags: argparse.Namespace) -> dict[str, Any]:
    transports = flags.transport or (["stream"] if flags.quick else ["stream", "shared_memory"])
    label = flags.params or ("1M" if flags.quick else "100M")
    return fairness.run(label, transports, _rounds(flags), 0.3 if flags.quick else 3.0, _progress(flags))


def _cold(flags: argparse.Namespace) -> dict[str, Any]:
    return cold.run(flags.tensors, flags.params, flags.optimizer, _rounds(flags), _progress(flags))


def _rounds(flags: argparse.Namespace) -> int:
    return int(flags.rounds or (2 if flags.quick else flags.usual_rounds))


def _progress(flags: argparse.Namespace) -> stepping.Progress:
    return (lambda line: None) if flags.no_progress else (lambda line: print(f"-- {line}", file=sys.stderr, flush=True))


# What reads one argument: raises argparse.ArgumentTypeError, which becomes the command's error.


def _checked(read: Any) -> Any:
    def checked(text: str) -> Any:
        try:
            return read(text)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from None

    return checked


def _list_of(read: Any) -> Any:
    def listed(text: str) -> list[Any]:
        found = [read(part.strip()) for part in text.split(",") if part.strip()]
        if not found:
            raise argparse.ArgumentTypeError("expected at least one")
        if len(set(found)) < len(found):
            raise argparse.ArgumentTypeError(f"{text!r}: the same twice")
        return found

    return listed


def _choice(what: str, allowed: Sequence[str]) -> Any:
    def chosen(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"no {what} {text!r}; there are {', '.join(allowed)}")
        return text

    return chosen


def _whole(least: int, most: int) -> Any:
    def whole(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {least} to {most:,}")
        return int(text)

    return whole


def _model(text: str) -> str:
    _checked(models.model)(text)
    return text


def _size(text: str) -> int:
    """Bytes, as parameters are written."""
    found: int = _checked(models.count)(text)
    if not _BYTES_MIN <= found <= _BYTES_MAX:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {_BYTES_MIN} to {_BYTES_MAX // 10**9}G bytes")
    return found


def _beside(text: str) -> cases.Case:
    case: cases.Case = _checked(cases.beside)(text)
    program = case.argv[0].format()
    if shutil.which(program) is None:
        raise argparse.ArgumentTypeError(f"{text!r}: there is no program {program!r}")
    return case


def _codec(text: str) -> str:
    return str(_checked(codecs.parse)(text))
