"""The composition root: builds a server from its configuration, starts it, drains it."""

from __future__ import annotations

import concurrent.futures
import os

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from optwire_proto import limits
from optwire_server import config as configs
from optwire_server import registry as registries
from optwire_server import segments
from optwire_server.engine import engine
from optwire_server.transport import boundary, handover, servicer, streams

SERVICE = "optwire.v1.OptimizerService"

_OPTIONS = (
    ("grpc.so_reuseport", 0),  # two servers on one port must be an error, not a coin toss
    ("grpc.max_receive_message_length", limits.MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", limits.MESSAGE_BYTES_MAX),
    ("grpc.max_metadata_size", 16 * limits.KIB),
    ("grpc.max_concurrent_streams", 256),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients ping every 20 s, also while they wait for other workers; without this they would be sent away for it.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


class Server:
    """A running server. ``stop`` drains and ends it.

    Attributes:
      handover: what hands shared memory over; None where none is shared.
      unshared_reason: why none is.
    """

    def __init__(self, config: configs.ServerConfig) -> None:
        self.config = config
        self.engine = engine.Engine(
            allow_programs=config.allow_programs,
            state_bytes_max=config.state_bytes_max,
            compiles_ahead=config.compiles_ahead,
        )
        self.registry = registries.Registry(self.engine, config)
        self.streams = streams.StreamTable(streams_max=config.streams_max, stall_s=config.stall_s, idle_s=config.idle_s)
        self._health = health.HealthServicer()
        self._pool = concurrent.futures.ThreadPoolExecutor(config.threads, thread_name_prefix="optwire-rpc")
        self._grpc = grpc.server(
            self._pool,
            interceptors=[boundary.Boundary()],
            options=_OPTIONS,
            maximum_concurrent_rpcs=config.threads,
        )
        self.handover, self.unshared_reason = _handover(self.registry, config)
        path = self.handover.path if self.handover else ""
        servicer.Servicer(self.registry, self.engine, self.streams, config, path).register(self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        try:
            self.addresses = tuple(self._bind(address) for address in config.listen)
        except OSError:
            if self.handover:
                self.handover.close()
            raise

    def start(self) -> None:
        """Starts serving."""
        if self.handover:
            self.handover.start()
        self._grpc.start()
        for service in ("", SERVICE):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> None:
        """Refuses new work, lets pushes under way finish for ``drain_s`` seconds, ends the rest."""
        self._health.enter_graceful_shutdown()
        self.registry.drain()
        self.streams.drain()
        self._grpc.stop(self.config.drain_s).wait()
        self.streams.close()
        if self.handover:
            self.handover.close()
        self.registry.close()
        self.engine.close()
        # Not waited for: a handler may be compiling, for a client that has been told to go away.
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _bind(self, address: str) -> str:
        try:
            port = self._grpc.add_insecure_port(address)
        except RuntimeError as exc:
            raise OSError(f"cannot listen on {address}: in use, or not an address or folder of this host") from exc
        return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"


def _handover(registry: registries.Registry, config: configs.ServerConfig) -> tuple[handover.Handover | None, str]:
    """What hands shared memory over; or None, and why there is none.

    Raises:
      OSError: the configuration asks for a folder in which there can be no socket.
    """
    if config.handover_dir == "none":
        return None, "handover_dir is 'none'"
    if why := segments.missing():
        return None, why
    sockets = [address.removeprefix("unix:") for address in config.listen if address.startswith("unix:")]
    folder = config.handover_dir or (os.path.dirname(os.path.abspath(sockets[0])) if sockets else "")
    try:
        return handover.Handover(registry, folder, config.shared_segments_max), ""
    except OSError as exc:
        if config.handover_dir:
            raise
        return None, f"there can be no socket: {exc}"
