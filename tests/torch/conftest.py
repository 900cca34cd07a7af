"""Remote optimizers on the one server of the tests. torch is optional: without it every module here skips itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import optwire


@pytest.fixture
def remote(client: optwire.Client) -> Iterator[Callable[..., Any]]:
    """Makes remote optimizers; their sessions end with the test."""
    from optwire.torch import RemoteOptimizer

    def make(params: Any, *args: Any, **arguments: Any) -> Any:
        return RemoteOptimizer(params, *args, client=client, **arguments)

    before = {info.name for info in client.list_sessions()}
    yield make
    for info in client.list_sessions():
        if info.name not in before:
            client.delete_session(info.name)
