"""The real server, once for all tests, and a client of it for each."""

import gc
import os
import pathlib
from collections.abc import Iterator

# Before JAX is imported, and for every process that a test starts: what one has compiled, the others read. Thousands of
# updates are compiled here, most of them more than once.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

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
