"""Sessions that torch shares: with other clients, with other optimizers, with the processes that come after."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import optwire
import optwire.jax
from optwire_server import testing

torch = pytest.importorskip("torch", reason="torch is an optional test dependency; `make test` installs it")

from tests.torch import training  # noqa: E402

from optwire.torch import RemoteOptimizer  # noqa: E402

Make = Callable[..., Any]
ROOT = Path(__file__).parents[2]


def test_a_torch_a_numpy_and_a_jax_client_at_once_read_the_same_bits(
    server: testing.Serving, client: optwire.Client
) -> None:
    """Each makes steps of its own, at once; whatever step several of them have read, they have read the same of it."""
    model, pushes = training.network(), 4
    optimizer = RemoteOptimizer(model.named_parameters(), "adamw", lr=0.01, target=server.target, session="three")
    training.backward(model)
    optimizer.step()
    read: dict[str, dict[int, dict[str, bytes]]] = {"torch": {}, "numpy": {}, "jax": {}}
    begin = threading.Barrier(len(read))

    def trained(who: str, push: Callable[[], Any], pull: Callable[[], Any], at: Callable[[], int]) -> None:
        done = 0
        while done < pushes:
            try:
                params = push()
                done += 1
            except optwire.StaleStepError:
                params = pull()
            read[who][at()] = {name: np.asarray(p).tobytes() for name, p in params.items()}
        begin.wait()  # all have made their steps
        read[who][at()] = {name: np.asarray(p).tobytes() for name, p in pull().items()}

    def in_torch() -> None:
        def values() -> dict[str, Any]:
            return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}

        def push() -> dict[str, Any]:
            training.backward(model, optimizer.session.step_count)
            optimizer.step()
            return values()

        def pull() -> dict[str, Any]:
            optimizer.pull()
            return values()

        begin.wait()
        trained("torch", push, pull, lambda: optimizer.session.step_count)

    def in_numpy() -> None:
        with optwire.connect(server.target) as own, own.attach("three") as session:
            ones = {name: np.ones_like(array) for name, array in session.params().items()}
            begin.wait()
            trained("numpy", lambda: session.step(ones), session.params, lambda: session.step_count)

    def in_jax() -> None:
        with optwire.connect(server.target) as own, own.attach("three") as session:
            ones = jax.tree.map(jax.numpy.ones_like, session.params())
            begin.wait()
            trained(
                "jax",
                lambda: optwire.jax.step(session, ones),
                lambda: optwire.jax.params(session, ones),
                lambda: session.step_count,
            )

    with futures.ThreadPoolExecutor(len(read)) as pool:
        for ended in [pool.submit(each) for each in (in_torch, in_numpy, in_jax)]:
            ended.result(timeout=120)
    last = 1 + pushes * len(read)
    with client.attach("three") as other:
        assert other.info().step == last
        newest = {name: array.tobytes() for name, array in other.params().items()}
    for who, steps in read.items():
        assert max(steps) == last, who
        assert steps[last] == newest, who
        for step in steps:
            assert all(others.get(step, steps[step]) == steps[step] for others in read.values()), (who, step)
    optimizer.close()
    client.delete_session("three")


def test_what_the_caller_left_out_is_what_the_session_has(remote: Make, client: optwire.Client) -> None:
    model, twin = training.network(), training.network()
    first = remote(model.named_parameters(), "adamw", lr=0.1, weight_decay=0.5, session="left-out")
    training.backward(model)
    first.step()
    second = remote(twin.named_parameters(), "adamw", lr=0.2, session="left-out")
    assert second.param_groups[0]["weight_decay"] == 0.5
    assert second.param_groups[0]["betas"] == (0.9, 0.999)
    training.backward(twin)
    second.step()
    with client.attach("left-out") as other:
        changes = [dict(change.values) for change in other.info().changes]
    assert changes == [{"per_leaf.optimizer.torch_adamw.learning_rate": 0.2}]


def test_an_edit_of_what_was_left_out_goes_up(remote: Make, client: optwire.Client) -> None:
    """The session comes to be after the optimizer was made: nothing has been taken over when the edit is made."""
    models = [training.network(), training.network()]
    late = remote(models[1].named_parameters(), "adamw", session="late")
    first = remote(models[0].named_parameters(), "adamw", weight_decay=0.5, lr=0.1, session="late")
    training.backward(models[0])
    first.step()
    late.param_groups[0]["weight_decay"] = 0.25
    training.backward(models[1])
    with pytest.raises(optwire.StaleStepError):
        late.step()
    training.backward(models[1])
    late.step()
    assert (late.param_groups[0]["lr"], late.param_groups[0]["weight_decay"]) == (0.1, 0.25)
    with client.attach("late") as other:
        changes = [dict(change.values) for change in other.info().changes]
    assert changes == [{"per_leaf.optimizer.torch_adamw.weight_decay": 0.25}]


def test_a_name_that_exists_is_attached_to_and_gives_its_parameters(remote: Make) -> None:
    model, twin = training.network(), training.network()
    first = remote(model.named_parameters(), "sgd", lr=0.1, session="going-on")
    for step in range(2):
        training.backward(model, step)
        first.step()
    with torch.no_grad():
        twin[0].weight.zero_()
    second = remote(twin.named_parameters(), "sgd", lr=0.2, session="going-on")
    assert training.equal(training.values(model), training.values(twin))
    training.backward(twin)
    second.step()
    assert second.last_reply.learning_rate == pytest.approx(0.2), "groups are commands"


def test_a_session_that_came_to_be_after_construction_makes_the_first_gradients_stale(remote: Make) -> None:
    models = [training.network(), training.network()]
    with torch.no_grad():
        models[1][0].weight.zero_()
    first, second = (remote(m.named_parameters(), "sgd", lr=0.1, session="race") for m in models)
    for model, optimizer in zip(models, (first, second), strict=True):
        training.backward(model)
        if optimizer is second:
            with pytest.raises(optwire.StaleStepError, match="compute gradients again"):
                optimizer.step()
            assert training.equal(training.values(models[0]), training.values(models[1]))
            training.backward(model)
        optimizer.step()
    assert second.last_reply.step == 2


def test_a_session_that_is_another_one_is_refused_naming_the_difference(remote: Make) -> None:
    model = training.network()
    first = remote(model.named_parameters(), "adamw", session="mine")
    training.backward(model)
    first.step()
    with pytest.raises(optwire.TreeMismatchError, match=r"'0.bias' is f32\[8\] there and absent here"):
        remote([("0.weight", model[0].weight)], "adamw", session="mine").step()
    with pytest.raises(optwire.InvalidArgumentError, match="torch_adamw there, torch_adam here"):
        remote(model.named_parameters(), "adam", session="mine").step()
    with pytest.raises(optwire.InvalidArgumentError, match="amsgrad is False there, True here"):
        remote(model.named_parameters(), "adamw", amsgrad=True, session="mine").step()


def test_after_another_handle_rewrote_history_pull_goes_on(remote: Make, client: optwire.Client) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "sgd", lr=0.1, session="rewritten")
    training.backward(model)
    optimizer.step()
    with client.attach("rewritten") as other:
        other.load_state({"params/0.weight": np.zeros((8, 4), np.float32)})
    with pytest.raises(optwire.IncarnationError):
        optimizer.step()
    optimizer.pull()
    assert not model[0].weight.any()
    training.backward(model)
    optimizer.step()
    assert optimizer.last_reply.step == 2


def test_the_leaves_of_a_session_may_be_a_nest_of_another_client(remote: Make, client: optwire.Client) -> None:
    from optwire import optimizers as opt

    nest = {"layer": [{"w": np.ones((2, 3), np.float32)}, {"w": np.ones(3, np.float32)}]}
    client.create_session(nest, opt.sgd(0.5), name="nested").close()
    params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 3))]
    optimizer = remote([("layer/1/w", params[0]), ("layer/0/w", params[1])], opt.sgd(0.5), session="nested")
    optimizer.session  # noqa: B018  attaches
    for p in params:
        assert p.eq(1).all()
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(p.eq(0.5).all() for p in params)


def test_closing_releases_the_handle_and_leaves_the_session(server: testing.Serving, client: optwire.Client) -> None:
    model = training.network()
    with RemoteOptimizer(model.named_parameters(), "sgd", target=server.target, session="left") as optimizer:
        training.backward(model)
        optimizer.step()
    with pytest.raises(optwire.DetachedError):
        optimizer.step()
    assert client.attach("left").info().step == 1
    client.delete_session("left")


def test_import_loads_neither_jax_nor_the_server() -> None:
    code = "import sys, optwire.torch; print(*sorted(sys.modules), sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert {"optwire", "torch"} <= loaded
    assert not {"jax", "jaxlib", "optwire_server"} & loaded


def test_a_process_with_torch_alone_trains(server: testing.Serving, client: optwire.Client) -> None:
    """The loop of the README, where neither JAX nor the server can be imported."""
    code = f"""
import sys
for name in ("jax", "jaxlib", "optax", "ml_dtypes", "optwire_server"):
    sys.modules[name] = None
import torch
from optwire.torch import RemoteOptimizer
for dtype in (torch.float32, torch.bfloat16):
    model = torch.nn.Linear(4, 2).to(dtype)
    optimizer = RemoteOptimizer(model.named_parameters(), "adamw", lr=0.1, target={server.target!r})
    inputs = torch.randn(16, 4, dtype=dtype)
    losses = []
    for _ in range(20):
        loss = ((model(inputs) - 1) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, losses
print("trained")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.stdout.strip() == "trained", result.stderr
