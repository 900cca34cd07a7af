"""Images built from the Dockerfile, an engine to run them in, and what was measured, printed at the end."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.container import containers

FIGURES = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = {}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[FIGURES]:
        terminalreporter.section("measured")
    for name, value in config.stash[FIGURES].items():
        terminalreporter.line(f"{name:44} {value}")


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> dict[str, str]:
    return pytestconfig.stash[FIGURES]


@pytest.fixture(scope="session")
def engine() -> Iterator[Any]:
    docker = pytest.importorskip("docker", reason="docker is not installed here; `make test-image` installs it")
    if containers.run("docker", "info").returncode != 0:
        pytest.skip('no container engine answers; eval "$(.ci/engine start)" starts one')
    with contextlib.closing(docker.from_env()) as engine:
        yield engine


@pytest.fixture(scope="session")
def image(engine: Any, measured: dict[str, str]) -> str:
    """The server's image. It is built once; a second build in the same engine finds its layers."""
    name = "optwire:test"
    measured["build of both images, s"] = f"{containers.build(containers.ROOT, name):.1f}"
    return name


@pytest.fixture(scope="session")
def client_image(image: str) -> str:
    return "optwire-client:test"


@pytest.fixture(scope="session")
def network(engine: Any) -> Iterator[Any]:
    network = engine.networks.create(f"optwire-test-{os.getpid()}")
    yield network
    network.remove()


@pytest.fixture(scope="session")
def start(engine: Any, image: str, network: Any) -> containers.Start:
    """Runs a hardened server, with a name on the network and a port on the loopback interface."""

    @contextlib.contextmanager
    def start(name: str, *flags: str, **more: Any) -> Iterator[containers.Running]:
        command = ["serve", "--listen", "0.0.0.0:50051", "--insecure", *flags] if flags else None
        container = engine.containers.run(
            image,
            command,
            name=f"{network.name}-{name}",
            hostname=name,
            network=network.name,
            ports={containers.PORT: ("127.0.0.1", None)},
            detach=True,
            **containers.HARDENED,
            **more,
        )
        try:
            yield containers.Running(container)
        finally:
            container.remove(force=True)

    return start


@pytest.fixture(scope="session")
def server(start: containers.Start, measured: dict[str, str]) -> Iterator[containers.Running]:
    """A healthy one."""
    began = time.monotonic()
    with start("shared") as server:
        containers.until(lambda: server.health() != "starting", 60, "the end of starting")
        assert server.health() == "healthy", server.logs()
        measured["start to healthy, s"] = f"{time.monotonic() - began:.1f}"
        yield server
