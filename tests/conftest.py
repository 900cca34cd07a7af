"""The real server, once for all tests, and a client of it for each."""

import gc
from collections.abc import Iterator

import jax
import pytest

import optwire
from optwire_server import testing


@pytest.fixture(scope="session")
def server() -> Iterator[testing.Serving]:
    with testing.serve() as serving:
        yield serving


@pytest.fixture
def client(server: testing.Serving) -> Iterator[optwire.Client]:
    with optwire.connect(server.target) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """What one module compiled, the next need not carry along: thousands of programs make all others slow."""
    yield
    jax.clear_caches()
    gc.collect()
