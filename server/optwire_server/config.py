"""What an operator may set, with units, defaults and reasons; and the one place that reads flags."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import os
from typing import Any

from optwire_proto import aggregations, limits

_THREADS_MIN = 128
_SHORT_CALLS = 32  # threads for what is no stream


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Configuration of one server.

    Attributes:
      listen: addresses to serve on: "host:port" (port 0: a free one) or "unix:/path".
      insecure: whether an address beyond loopback may be served without TLS.
      allow_programs: whether sessions may bring exported programs as their optimizers (docs/programs.md).
      aggregation: how pushes become steps in sessions that ask for none.
      sessions_max: most sessions; one more is refused.
      leaves_max: most leaves of a session's tree. An optimizer that needs the whole tree at once takes at most 2,048.
      streams_max: most streams open at once; each holds a thread while it is open.
      threads: size of the pool that serves requests; what exceeds ``streams_max`` is left to short calls. 0: 32 of
        them, and 128 threads at least.
      landing_bytes_max: most bytes of payloads in flight, of all sessions together; more is refused for now.
      landing_keep_bytes: landing buffers up to this total are kept for the next push instead of being freed.
      handover_dir: folder for the Unix socket on which clients of this host and user are handed shared memory
        (docs/shared-memory.md); "": the one of the first "unix:" address, or else one of its own that nobody else can
        read; "none": no memory is shared.
      shared_bytes_max: most bytes of shared memory, of all clients together; who gets none sends in chunks.
      shared_segments_max: most segments, one a handle; each holds a connection and a thread.
      state_bytes_max: most bytes of parameters and slots, of all sessions together; a session more is refused.
      stall_s: seconds without a byte after which a transfer is given up and its buffers are freed.
      idle_s: seconds without a push after which a stream is closed; clients reopen it by themselves.
      drain_s: seconds that pushes under way get to finish after SIGTERM.
      compiles_ahead: whether a thread compiles, once a first session of an optimizer is served, what sessions of other
        shapes may need. ``optwire serve`` does; a server inside of another process has less to gain.
      compilation_cache: folder in which compiled updates outlive the server's process; "": the user's folder for
        caches; "none": nowhere. Only ``optwire serve`` looks at it, as it is a setting of a whole process.
    """

    listen: tuple[str, ...] = ("127.0.0.1:50051",)
    insecure: bool = False
    allow_programs: bool = False
    aggregation: aggregations.Aggregation = aggregations.SINGLE
    sessions_max: int = 1024
    leaves_max: int = limits.LEAVES_MAX
    streams_max: int = 96
    threads: int = 0
    landing_bytes_max: int = dataclasses.field(default_factory=lambda: _memory_bytes() // 4)
    landing_keep_bytes: int = dataclasses.field(default_factory=lambda: min(1024 * limits.MIB, _memory_bytes() // 8))
    handover_dir: str = ""
    shared_bytes_max: int = dataclasses.field(default_factory=lambda: _memory_bytes() // 4)
    shared_segments_max: int = 256
    state_bytes_max: int = dataclasses.field(default_factory=lambda: _memory_bytes() // 2)
    stall_s: float = 20.0
    idle_s: float = 300.0
    drain_s: float = 5.0
    compiles_ahead: bool = False
    compilation_cache: str = ""

    def __post_init__(self) -> None:
        if self.threads == 0:
            object.__setattr__(self, "threads", max(_THREADS_MIN, self.streams_max + _SHORT_CALLS))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"{field.name}: {value}, expected more than 0")
        if self.threads <= self.streams_max:
            raise ValueError(f"threads: {self.threads}, expected more than streams_max ({self.streams_max})")
        if not self.listen:
            raise ValueError("listen: no address")
        for address in self.listen:
            host, _, port = address.rpartition(":")
            if not address.startswith("unix:") and not (host and port.isdecimal() and int(port) < 2**16):
                raise ValueError(f"listen: {address!r}, expected host:port with a port from 0 to 65535, or unix:/path")
            if not self.insecure and not _is_local(address):
                raise ValueError(
                    f"listen: {address} is not a loopback address, and this version serves without TLS and "
                    "authentication; add --insecure if something in front of it protects it"
                )


def _is_local(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parser(prog: str = "optwire") -> argparse.ArgumentParser:
    """The command line: ``serve``, ``health``, ``optimizers``, ``workers``, and ``bench``, which has its own."""
    root = argparse.ArgumentParser(prog=prog, description="A remote optimizer.")
    commands = root.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="hold optimizer state and apply pushes until SIGTERM or SIGINT")
    serve.add_argument(
        "--listen",
        action="append",
        metavar="HOST:PORT",
        help="address to serve on, or unix:/path; repeatable; port 0 takes a free one (default 127.0.0.1:50051)",
    )
    serve.add_argument("--insecure", action="store_true", help="allow addresses beyond loopback, without TLS")
    serve.add_argument(
        "--allow-programs", action="store_true", help="serve optimizers that clients bring as exported programs"
    )
    serve.add_argument(
        "--aggregation",
        metavar="HOW",
        help="how pushes become steps in sessions that ask for none, such as 'sync(4)' (default single)",
    )
    serve.add_argument(
        "--handover-dir", metavar="DIR", help="where to hand shared memory over, or 'none' (default: its own folder)"
    )
    serve.add_argument("--port-file", metavar="FILE", help="write the first address served to FILE once ready")
    for name, kind, text in (
        ("sessions-max", int, "most sessions (default 1024)"),
        ("leaves-max", int, "most leaves of a session's tree (default 65,536)"),
        ("streams-max", int, "most streams open at once, one a worker (default 96)"),
        ("landing-bytes-max", int, "most bytes of payloads in flight (default: a quarter of the memory)"),
        ("shared-bytes-max", int, "most bytes of shared memory (default: a quarter of the memory)"),
        ("state-bytes-max", int, "most bytes of parameters and slots (default: half of the memory)"),
        ("drain-s", float, "seconds that pushes under way get to finish after SIGTERM (default 5)"),
    ):
        serve.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    serve.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="where compiled updates outlive the server; 'none': nowhere (default: optwire/compiled in the user's "
        "folder for caches)",
    )
    listing = commands.add_parser("optimizers", help="list what this installation serves, or check a spec")
    listing.add_argument("spec", nargs="?", help="a spec as text, such as 'adamw(1e-3)': prints its canonical form")
    health = commands.add_parser("health", help="ask a server whether it serves; exits 0 if so, 2 if not")
    health.add_argument("--target", default="localhost:50051", help="gRPC target (default localhost:50051)")
    health.add_argument("--timeout", type=float, default=5.0, metavar="S", help="seconds to wait (default 5)")
    workers = commands.add_parser("workers", help="list a session's workers, and for whom its next step waits")
    workers.add_argument("name", help="of the session")
    workers.add_argument("--target", default="localhost:50051", help="gRPC target (default localhost:50051)")
    workers.add_argument("--timeout", type=float, default=5.0, metavar="S", help="seconds to wait (default 5)")
    commands.add_parser("bench", add_help=False, help="measure steps beside local ones: optwire bench --help")
    return root


def from_flags(flags: argparse.Namespace) -> ServerConfig:
    """The configuration that parsed ``serve`` flags ask for; raises ValueError for values that cannot be."""
    given: dict[str, Any] = {
        field.name: getattr(flags, field.name)
        for field in dataclasses.fields(ServerConfig)
        if getattr(flags, field.name, None) is not None
    }
    if "listen" in given:
        given["listen"] = tuple(given["listen"])
    if "aggregation" in given:
        given["aggregation"] = aggregations.parse(given["aggregation"])
    return ServerConfig(**given)
