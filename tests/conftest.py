"""The real server, once for all tests, and a client of it for each."""

from collections.abc import Iterator

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
