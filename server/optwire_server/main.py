"""The command ``optwire``: ``serve`` runs a server until a signal, ``health`` asks one whether it serves.

``optimizers`` lists what a server with this installation serves, and checks a spec; ``workers`` lists those of a
session; ``bench`` measures.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Sequence

import optwire_server
from optwire_server import config as configs

_log = logging.getLogger("optwire")

# How long a thread may keep the interpreter while others wait: a tiny push waits that long for each step of its way
# while a large one is being received. Python's own 5 ms are several tiny steps.
_SWITCH_INTERVAL_S = 0.0005


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``optwire``; returns its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    own = given[:1] == ["bench"]  # reads what follows by itself
    flags = configs.parser().parse_args(given[:1] if own else given)
    flags.arguments = given[1:]
    try:
        commands = {
            "serve": _serve,
            "health": _check_health,
            "optimizers": _list_optimizers,
            "workers": _list_workers,
            "bench": _bench,
        }
        return commands[flags.command](flags)
    except ModuleNotFoundError as exc:
        print(f"optwire {flags.command}: {exc.name} is not installed; pip install 'optwire[server]'", file=sys.stderr)
        return 64


def _serve(flags: argparse.Namespace) -> int:
    # Not at the top: a health check must not load JAX, and the thin client's installation has none.
    from optwire_server import allocator
    from optwire_server import server as servers
    from optwire_server.engine import compilations, engine

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("jax").setLevel(logging.WARNING)  # which accelerators it did not find is no news
    allocator.tune()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    engine.own_process()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: _end(number, ended))
    try:
        config = dataclasses.replace(configs.from_flags(flags), compiles_ahead=True)
        if config.compilation_cache != "none":
            folder = config.compilation_cache
            compilations.keep(pathlib.Path(folder) if folder else compilations.default_folder())
        server = servers.Server(config)
        server.start()
        _announce(server.addresses[0], flags.port_file)
    except (ValueError, OSError) as exc:
        print(f"optwire serve: {exc}", file=sys.stderr)
        return 64 if isinstance(exc, ValueError) else 2
    _, devices = server.engine.describe()
    print(f"optwire {optwire_server.__version__}  device {', '.join(name for name, _ in devices)}")
    print(f"gRPC       {'  '.join(server.addresses)}   plaintext")
    print(f"shared     {server.handover.path if server.handover else f'no memory: {server.unshared_reason}'}")
    example = f"import optwire; print(optwire.connect({server.addresses[0]!r}).list_sessions())"
    print(f'try        python -c "{example}"', flush=True)
    ended.wait()
    _log.info("draining")
    server.stop()
    _log.info("stopped")
    # Without waiting for threads: one may be compiling for minutes, for a client that has been told to go away.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _end(number: int, ended: threading.Event) -> None:
    """The first signal drains, the second ends at once."""
    if ended.is_set():
        os._exit(128 + number)
    ended.set()


def _announce(address: str, port_file: str | None) -> None:
    """Writes the port file. It appears whole: whoever waits for it must not read half of it."""
    if port_file:
        unfinished = pathlib.Path(f"{port_file}.{os.getpid()}")
        unfinished.write_text(address)
        unfinished.replace(port_file)


def _list_optimizers(flags: argparse.Namespace) -> int:
    # Not at the top: optax's signatures take JAX to read.
    from optwire_proto import checks, errors, spec_text, specs
    from optwire_server.engine import build

    if flags.spec:
        try:
            checked = checks.check(spec_text.parse(flags.spec, build.CATALOGUE), known=build.CATALOGUE)
        except errors.OptwireError as exc:
            print(f"optwire optimizers: {exc}", file=sys.stderr)
            return 64
        print(f"{checked}\nsha256 {specs.digest(checked)}")
        return 0
    for kind in ("optimizer", "wrapper", "transformation", "schedule"):
        print(f"\n{kind}s")
        for entry in sorted(build.CATALOGUE.values(), key=lambda entry: entry.name):
            if entry.kind == kind and not entry.refusal:
                needs = f" Each push brings {', '.join(entry.extras)}." if entry.extras else ""
                print(f"  {entry.signature}\n      {entry.summary}{needs}")
    print("\nnot served")
    for entry in build.CATALOGUE.values():
        if entry.refusal:
            print(f"  {entry.name}: {entry.refusal}")
    return 0


def _list_workers(flags: argparse.Namespace) -> int:
    from optwire import _workers
    from optwire_proto import errors

    try:
        print(_workers.listing(flags.name, flags.target, timeout_s=flags.timeout))
    except errors.OptwireError as exc:
        print(f"optwire workers: {exc}", file=sys.stderr)
        return 64 if isinstance(exc, errors.InvalidArgumentError) else 2
    return 0


def _bench(flags: argparse.Namespace) -> int:
    from optwire_bench import command

    return command.main(flags.arguments)


def _check_health(flags: argparse.Namespace) -> int:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(flags.target) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service="optwire.v1.OptimizerService"), timeout=flags.timeout
            )
        except grpc.RpcError as exc:
            print(f"{flags.target}: {exc.code().name}: {exc.details()}")
            return 2
    print(f"{flags.target}: {health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)}")
    return 0 if reply.status == health_pb2.HealthCheckResponse.SERVING else 2
