"""A torch process as one of several workers of a session, beside others that know no torch."""

from __future__ import annotations

import concurrent.futures
import copy
import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import optwire

torch = pytest.importorskip("torch", reason="torch is an optional test dependency; `make test` installs it")

from optwire.torch import RemoteOptimizer  # noqa: E402


@pytest.fixture
def model() -> Any:
    linear = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.fill_(1.0)
    return linear


@pytest.fixture
def pool() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield pool


def arrays(value: float) -> dict[str, np.ndarray]:
    return {"bias": np.full(2, value, np.float32), "weight": np.full((2, 3), value, np.float32)}


def created(client: optwire.Client, aggregation: str, worker: int) -> optwire.Session:
    """By a worker of NumPy, with the optimizer that torch's SGD is served as."""
    with RemoteOptimizer(torch.nn.Linear(3, 2).named_parameters(), "sgd", lr=1.0, client=client) as optimizer:
        spec = str(optimizer.session.info().spec)
        client.delete_session(optimizer.session.name)
    name = secrets.token_hex(4)
    return client.create_session(arrays(1.0), spec, name=name, aggregation=aggregation, worker=worker)


def graded(model: Any, value: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


def holds(model: Any, value: float) -> bool:
    return all(bool((parameter == value).all()) for parameter in model.parameters())


def test_torch_and_numpy_make_steps_together(
    client: optwire.Client, model: Any, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    numpy_worker = created(client, "sync(2)", 0)
    with RemoteOptimizer(
        model.named_parameters(), "sgd", lr=1.0, client=client, session=numpy_worker.name, worker=1
    ) as optimizer:
        for step in (1, 2):
            graded(model, 4.0)
            other = pool.submit(numpy_worker.step, arrays(1.0), weight=2.0)
            optimizer.step(weight=1.0)
            assert holds(model, 1.0 - 2.0 * step)  # (2 * 1 + 1 * 4) / 3
            np.testing.assert_array_equal(other.result(10)["weight"], arrays(1.0 - 2.0 * step)["weight"])
        assert [worker.epoch for worker in numpy_worker.workers()] == [1, 1]
    assert [str(worker.state) for worker in numpy_worker.workers()] == ["live", "left"]


def test_late_gradients_are_dropped_for_the_newest_parameters(client: optwire.Client, model: Any) -> None:
    fast = created(client, "k_of_n(1, 2)", 0)
    optimizer = RemoteOptimizer(
        model.named_parameters(), "sgd", lr=1.0, client=client, session=fast.name, worker=1, late="params"
    )
    fast.step(arrays(3.0))
    graded(model, 100.0)
    optimizer.step()
    assert holds(model, -2.0)
    assert optimizer.late_count == 1
    assert optimizer.session.info().step == 1
    graded(model, 1.0)
    optimizer.step()
    assert holds(model, -3.0)
    assert (optimizer.late_count, optimizer.last_reply.step) == (1, 2)
    optimizer.close()


def test_late_gradients_are_an_error_unless_something_else_is_said(client: optwire.Client, model: Any) -> None:
    fast = created(client, "k_of_n(1, 2)", 0)
    optimizer = RemoteOptimizer(model.named_parameters(), "sgd", lr=1.0, client=client, session=fast.name, worker=1)
    fast.step(arrays(3.0))
    graded(model, 100.0)
    with pytest.raises(optwire.StepClosedError):
        optimizer.step()
    optimizer.pull()
    assert holds(model, -2.0)
    optimizer.close()


def test_a_copy_that_is_attached_takes_the_place_of_the_first(client: optwire.Client, model: Any) -> None:
    fast = created(client, "k_of_n(1, 2)", 0)
    way = {"target": client._options.target, "session": fast.name, "worker": 1, "late": "params"}
    with RemoteOptimizer(model.named_parameters(), "sgd", lr=1.0, **way) as optimizer:
        graded(model, 1.0)
        optimizer.step()
        twin = copy.deepcopy(optimizer)
        assert twin.late_count == 0
        twin.attach()
        for group in twin.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        twin.step()
        assert [worker.epoch for worker in fast.workers()] == [1, 2]
        graded(model, 1.0)
        with pytest.raises(optwire.ReplacedError):
            optimizer.session.step(arrays(1.0))
        twin.close()


@pytest.mark.parametrize(
    ("arguments", "kind", "match"),
    [
        ({"worker": 0, "distributed": "workers"}, optwire.InvalidArgumentError, "worker: 0, expected None with"),
        ({"late": "params", "overlap": True}, optwire.UnsupportedError, "late='params' with overlap=True"),
        ({"late": "params", "distributed": "workers"}, optwire.UnsupportedError, "late='params'"),
        ({"late": "never"}, optwire.InvalidArgumentError, "late: 'never', expected 'raise' or 'params'"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(
    client: optwire.Client, model: Any, arguments: dict[str, Any], kind: type[Exception], match: str
) -> None:
    with pytest.raises(kind, match=match):
        RemoteOptimizer(model.named_parameters(), "sgd", lr=1.0, client=client, **arguments)
