"""What the files of this folder share: the server they speak to, a client that frames by hand, and quiet logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from tests.e2e import wire

from optwire_server import testing


@pytest.fixture(scope="module")
def serving(server: testing.Serving) -> testing.Serving:
    """The server that a file speaks to: that of all tests. A file that needs one of its own says so."""
    return server


@pytest.fixture
def peer(serving: testing.Serving) -> Iterator[wire.Peer]:
    """A client of it that sends what it is told to."""
    peer = wire.Peer(serving.target)
    yield peer
    peer.close()


@pytest.fixture
def no_error_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """For files whose tests go wrong in everyday ways: no traceback in anybody's log."""
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.ERROR] == []
