"""Local steps of modules: the same as those of arrays, in place."""

from __future__ import annotations

import concurrent.futures
import pathlib
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is an optional test dependency; `make test` installs it")

import optwire  # noqa: E402
from optwire import optimizers as opt  # noqa: E402
from optwire.torch import LocalSteps, tree_of  # noqa: E402
from optwire_server import testing  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))

OUTER = opt.per_leaf(opt.torch_sgd(0.7, momentum=0.9, nesterov=True))


def module(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2)).to(dtype)


def move(step: int) -> dict[str, np.ndarray]:
    """What a local step adds to each parameter."""
    rng = np.random.default_rng(step)
    return {
        name: np.float32(0.01) * rng.standard_normal(parameter.shape, np.float32)
        for name, parameter in module().named_parameters()
    }


def trained(model: torch.nn.Module, inner: torch.optim.Optimizer, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(16, 6, generator=rng, dtype=next(model.parameters()).dtype)
    inner.zero_grad()
    (model(inputs) - inputs[:, :2]).square().mean().backward()
    inner.step()


@pytest.mark.parametrize("how", [{}, {"fragments": 3, "delay": 1, "mixing": 0.5}], ids=["at once", "streaming"])
def test_a_module_has_what_arrays_have(server: testing.Serving, how: dict[str, float]) -> None:
    """Two workers of one session, the same local steps: one with a module, one with arrays, bit for bit."""
    steps, every = 13, 5
    with optwire.connect(server.target) as client, concurrent.futures.ThreadPoolExecutor(1) as threads:
        first = client.create_session(tree_of(module().named_parameters()), OUTER, aggregation="sync(2)", worker=0)
        second = client.attach(first.name, worker=1)
        moves = [move(step) for step in range(steps)]

        def of_arrays() -> dict[str, np.ndarray]:
            local = optwire.LocalSteps(second, every=every, **how)
            own = local.params()
            for moved in moves:
                own = local.step({name: array + moved[name] for name, array in own.items()})
            return own

        running = threads.submit(of_arrays)
        model = module(seed=1)
        local = LocalSteps(model.named_parameters(), first, every=every, **how)
        wrote = []
        for moved in moves:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter += torch.from_numpy(moved[name])
            wrote.append(local.step())
        wanted = running.result()
        assert wrote.count(True) == (2 if not how else 7)
        for name, parameter in model.named_parameters():
            assert np.array_equal(parameter.detach().numpy(), wanted[name]), name
        client.delete_session(first.name)


def test_a_module_starts_with_the_sessions_parameters_and_keeps_its_memory(client: optwire.Client) -> None:
    session = client.create_session(tree_of(module().named_parameters()), OUTER)
    model = module(seed=1)
    memory = [parameter.data_ptr() for parameter in model.parameters()]
    local = LocalSteps(model.named_parameters(), session, every=2)
    for mine, theirs in zip(model.parameters(), module().parameters(), strict=True):
        assert torch.equal(mine, theirs)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(4):
        trained(model, inner, step)
        assert local.step() == (step % 2 == 1)
    assert [parameter.data_ptr() for parameter in model.parameters()] == memory
    assert all(inner.state[parameter]["step"] == 4 for parameter in model.parameters())
    newest = session.params()
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), newest[name])
    assert (local.local_steps, local.late_count, session.step_count) == (4, 0, 2)


def test_a_push_that_comes_too_late_brings_the_newest_parameters(client: optwire.Client) -> None:
    session = client.create_session(tree_of(module().named_parameters()), OUTER)
    model = module()
    local = LocalSteps(model.named_parameters(), session, every=1)
    client.attach(session.name).step({name: np.ones_like(array) for name, array in session.params().items()})
    assert local.step()
    assert local.late_count == 1
    newest = session.params()
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), newest[name])


def test_modules_in_bfloat16_are_exchanged(client: optwire.Client) -> None:
    model = module(dtype=torch.bfloat16)
    session = client.create_session(tree_of(model.named_parameters()), opt.sgd(1.0))
    local = LocalSteps(model.named_parameters(), session, every=1, mixing=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.5)
    local.step()
    assert all((parameter - 1.5).abs().max() < 0.05 for parameter in model.parameters())


def test_parameters_that_are_not_the_sessions_are_refused(client: optwire.Client) -> None:
    session = client.create_session(tree_of(module().named_parameters()), OUTER)
    others = {
        "missing": dict(list(module().named_parameters())[1:]),
        "unknown": {**dict(module().named_parameters()), "more": torch.zeros(1)},
        "another type": dict(module(dtype=torch.float64).named_parameters()),
    }
    for parameters in others.values():
        with pytest.raises(optwire.TreeMismatchError, match="as in the session"):
            LocalSteps(parameters.items(), session, every=2)


def test_both_frameworks_of_the_example_compute_the_same_loss() -> None:
    """What the mixed training of the example, and its benchmark, lean on."""
    import demo_torch
    import diloco_worker

    torch.manual_seed(0)
    model = demo_torch.Transformer(50)
    rows = np.random.default_rng(0).integers(0, 50, (4, diloco_worker.CONTEXT + 1)).astype(np.int32)
    batch = torch.from_numpy(rows).long()
    theirs = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    ours = diloco_worker.jax_loss(tree_of(model.named_parameters()), rows)
    assert float(ours) == pytest.approx(theirs.item(), rel=1e-5)
