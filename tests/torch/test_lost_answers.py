"""Answers that are lost, clients that are faster, processes that fork: nothing is overwritten, nothing done twice."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import optwire
from optwire_server import testing

torch = pytest.importorskip("torch", reason="torch is an optional test dependency; `make test` installs it")

from tests.e2e import proxy as proxies  # noqa: E402
from tests.torch import training  # noqa: E402

from optwire.torch import RemoteOptimizer  # noqa: E402

Make = Callable[..., Any]


@pytest.fixture
def proxy(server: testing.Serving) -> Iterator[proxies.Proxy]:
    with proxies.before(server.target) as found:
        yield found


def impatient(params: Any, name: str, target: str, **arguments: Any) -> Any:
    return RemoteOptimizer(params, name, target=target, timeout=2.0, **arguments)


@pytest.mark.parametrize("repeats", [True, False])
@pytest.mark.parametrize("direction", [proxies.DOWN, proxies.UP])
def test_a_group_of_unknown_fate_is_found_by_the_next_use(
    client: optwire.Client, proxy: proxies.Proxy, direction: str, repeats: bool
) -> None:
    model = training.network()
    params = list(model.named_parameters())
    # Long enough for the server to compile: what was cancelled before is not done.
    optimizer = RemoteOptimizer(params[:2], "sgd", target=proxy.target, timeout=8.0, lr=0.1)
    training.backward(model)
    optimizer.step()
    proxy.fail(direction, bytes=0, act="hold")
    with pytest.raises((optwire.DeadlineError, optwire.UnavailableError)):
        optimizer.add_param_group({"params": params[2:]})
    assert len(optimizer.param_groups) == 1
    name = optimizer.state_dict()["state"][0]["remote"]["session"]
    proxy.heal()
    if repeats:
        optimizer.add_param_group({"params": params[2:]})
    training.backward(model, 1)
    optimizer.step()
    count = len(optimizer.session.info().tree.leaves)
    assert len(optimizer.param_groups) * 2 == count
    assert count == 4 or not repeats
    assert optimizer.last_reply.step == 2
    optimizer.close()
    client.delete_session(name)


@pytest.mark.parametrize("repeats", [True, False])
def test_a_group_that_was_taken_before_an_interruption_is_there(
    remote: Make, monkeypatch: pytest.MonkeyPatch, repeats: bool
) -> None:
    model = training.network()
    params = list(model.named_parameters())
    optimizer = remote(params[:2], "sgd", lr=0.1)
    training.backward(model)
    optimizer.step()
    create = optwire.Client.create_session

    def interrupted(*args: Any, **options: Any) -> Any:
        create(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(optwire.Client, "create_session", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.add_param_group({"params": params[2:]})
    if repeats:
        optimizer.add_param_group({"params": params[2:]})
    training.backward(model, 1)
    optimizer.step()
    assert (len(optimizer.param_groups), optimizer.last_reply.step) == (2, 2)


def test_loaded_masters_go_up_after_an_upload_that_failed(remote: Make, proxy: proxies.Proxy) -> None:
    model, twin = training.network(torch.bfloat16), training.network(torch.bfloat16)
    first = remote(model.named_parameters(), "adamw", lr=1e-3)
    for step in range(3):
        training.backward(model, step)
        first.step()
    saved, weights, held = copy.deepcopy((first.full_state_dict(), model.state_dict(), first.session.state()))
    second = impatient(twin.named_parameters(), "adamw", proxy.target, lr=1e-3)
    training.backward(twin)
    second.step()
    second.load_state_dict(saved)
    twin.load_state_dict(weights)
    training.backward(model, 3)
    training.same_gradients(model, twin)
    again = second.full_state_dict()
    for index, entry in saved["state"].items():
        assert torch.equal(entry["params"], again["state"][index]["params"])
    proxy.fail(proxies.UP, bytes=0, act="hold")
    with pytest.raises((optwire.DeadlineError, optwire.UnavailableError)):
        second.step()
    proxy.heal()
    first.step()
    second.step()
    expected, got = first.session.state(), second.session.state()
    assert got.step == expected.step == held.step + 1
    assert all((got.arrays[name] == array).all() for name, array in expected.arrays.items())
    second.close()


def test_a_write_after_a_lost_answer_says_what_may_have_been(remote: Make, proxy: proxies.Proxy) -> None:
    model = training.network()
    optimizer = impatient(model.named_parameters(), "sgd", proxy.target, lr=0.1)
    training.backward(model)
    optimizer.step()
    proxy.fail(proxies.DOWN, bytes=0, act="hold")
    with pytest.raises(optwire.DeadlineError):
        optimizer.step()
    proxy.heal()
    with torch.no_grad():
        model[0].weight.clamp_(-0.1, 0.1)
    with pytest.raises(optwire.StaleStepError, match="or the answer to a push of ours was lost"):
        optimizer.step()
    optimizer.close()


def test_a_push_between_comparing_and_writing_is_not_overwritten(
    remote: Make, client: optwire.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "sgd", lr=0.1, session="between")
    training.backward(model)
    optimizer.step()
    other = client.attach("between")
    load = optwire.Session.load_state

    def late(session: Any, *args: Any, **options: Any) -> None:
        other.step(other.params())
        load(session, *args, **options)

    monkeypatch.setattr(optwire.Session, "load_state", late)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    with pytest.raises(optwire.StaleStepError):
        optimizer.step()
    newest = other.params()
    optimizer.pull()
    assert (newest["0.weight"] == model[0].weight.detach().numpy()).all()


FORK = """
import os, signal, sys, torch
from optwire.torch import RemoteOptimizer
model = torch.nn.Linear(3, 1)
optimizer = RemoteOptimizer(model.named_parameters(), "sgd", lr=0.1, target=sys.argv[1], timeout=5.0)
for p in model.parameters():
    p.grad = torch.ones_like(p)
optimizer.step()
signal.alarm(60)
child = os.fork()
if child == 0:
    optimizer.step()
    print("child", optimizer.last_reply.step, optimizer.last_reply.seq, flush=True)
    os._exit(0)
os.waitpid(child, 0)
try:
    optimizer.step()
except Exception as exc:
    print("parent", type(exc).__name__, flush=True)
"""


def test_a_forked_process_is_a_worker_of_its_own(server: testing.Serving) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, server.target], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["child 2 1", "parent StaleStepError"], done.stderr
