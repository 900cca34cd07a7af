"""A spec in the place of a name: its arguments are its own, and ``lr`` in the groups is what the server uses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optwire
from optwire import optax
from optwire import optimizers as opt

torch = pytest.importorskip("torch", reason="torch is an optional test dependency; `make test` installs it")

from tests.torch import training  # noqa: E402

Make = Callable[..., Any]


def steps(model: Any, optimizer: Any, numbers: range) -> None:
    for step in numbers:
        training.backward(model, step)
        optimizer.step()


def test_a_spec_its_text_and_a_session_without_torch_give_the_same_bits(remote: Make, client: optwire.Client) -> None:
    spec = opt.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.01))
    results = []
    for given in (spec, str(spec)):
        model = training.network()
        optimizer = remote(model.named_parameters(), given)
        assert optimizer.param_groups[0]["lr"] == 0.01
        steps(model, optimizer, range(4))
        results.append(training.values(model))
    model = training.network()
    session = client.create_session({name: p.detach().numpy() for name, p in model.named_parameters()}, spec)
    for step in range(4):
        training.backward(model, step)
        params = session.step({name: p.grad.numpy() for name, p in model.named_parameters()})
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.from_numpy(params[name]))
    assert training.equal(results[0], results[1])
    assert training.equal(results[0], training.values(model))


def test_a_schedule_of_the_spec_shows_in_the_groups_and_has_one_owner(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), optax.adamw(optax.linear_schedule(0.1, 0.0, 10)))
    assert math.isnan(optimizer.param_groups[0]["lr"]), "not known before the first step"
    steps(model, optimizer, range(1))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    steps(model, optimizer, range(1, 3))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.08)
    optimizer.param_groups[0]["lr"] = 0.5
    training.backward(model)
    before = training.values(model)
    with pytest.raises(optwire.HyperparameterOwnedError, match=r"\['lr'\] was set to 0.5.*linear_schedule") as caught:
        optimizer.step()
    assert caught.value.subject == "lr"
    assert training.equal(before, training.values(model))
    assert optimizer.session.info().step == 3
    optimizer.param_groups[0]["lr"] = optimizer.last_reply.learning_rate
    optimizer.step()


def test_a_rate_that_a_schedule_showed_is_no_edit_after_a_copy_a_handle_or_a_new_group(remote: Make) -> None:
    model = training.network()
    params = list(model.named_parameters())
    spec = optax.adamw(optax.linear_schedule(0.1, 0.0, 10))
    optimizer = remote(params[:2], spec, session="shown")
    steps(model, optimizer, range(2))
    twin = copy.deepcopy(optimizer)
    twin.attach()
    again = remote(params[:2], spec, session="shown")
    again.load_state_dict(optimizer.state_dict())
    for other in (twin, again):
        other.pull()
        for p in other.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        other.step()
    assert again.last_reply.step == 4
    assert again.param_groups[0]["lr"] == pytest.approx(0.07)
    optimizer.pull()
    optimizer.add_param_group({"params": params[2:]})
    steps(model, optimizer, range(2))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05])


def test_a_scheduler_of_torch_on_a_schedule_of_the_spec_is_refused(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), optax.adamw(optax.linear_schedule(0.1, 0.0, 10)))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    steps(model, optimizer, range(1))
    scheduler.step()
    with pytest.raises(optwire.HyperparameterOwnedError):
        optimizer.step()


@pytest.mark.parametrize("spec", ["adamw(0.1)", "adam(constant(0.1))", "chain(clip(1.0), sgd(0.1))"])
def test_a_scheduler_on_a_spec_with_a_number_works(remote: Make, spec: str) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), spec)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)
    rates = []
    for step in range(4):
        steps(model, optimizer, range(step, step + 1))
        rates.append(optimizer.last_reply.learning_rate)
        scheduler.step()
    assert rates == pytest.approx([0.01, 0.0325, 0.055, 0.0775])


def test_what_a_spec_cannot_say_twice_is_refused_naming_the_knob(remote: Make) -> None:
    params = list(training.network().named_parameters())
    with pytest.raises(
        optwire.InvalidArgumentError, match=r"param_groups\[1\]\['weight_decay'\] = 0.5: the spec adamw"
    ):
        remote([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.5}], "adamw(0.1)")
    with pytest.raises(TypeError, match="'lr': a spec has its arguments inside"):
        remote(params, "adamw(0.1)", lr=0.1)
    optimizer = remote([{"params": params[:2]}, {"params": params[2:], "note": "text is fine"}], "adamw(0.1)")
    for _, p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(optwire.InvalidArgumentError, match="one learning rate for all"):
        optimizer.step()
    optimizer.param_groups[1]["lr"] = 0.01
    optimizer.step()
    assert optimizer.last_reply.learning_rate == pytest.approx(0.01)


def test_several_learning_rates_are_the_sessions_business(remote: Make) -> None:
    model = training.network()
    spec = opt.partition({"*.bias": optax.sgd(0.1), "**": optax.adamw(0.01)})
    optimizer = remote(model.named_parameters(), spec)
    steps(model, optimizer, range(1))
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(optwire.InvalidArgumentError, match="several learning rates.*set_hyperparams"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.session.set_hyperparams({"partition.transforms['*.bias'].optax.sgd.learning_rate": 0.2})
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_an_absent_gradient_needs_per_leaf(remote: Make) -> None:
    model = training.network()
    for spec, works in (("optax.adam(0.1)", False), ("per_leaf(optax.adam(0.1))", True)):
        optimizer = remote(model.named_parameters(), spec)
        training.backward(model)
        model[0].bias.grad = None
        if works:
            before = model[0].bias.detach().clone()
            optimizer.step()
            assert torch.equal(before, model[0].bias)
        else:
            with pytest.raises(optwire.InvalidArgumentError, match="per_leaf"):
                optimizer.step()


def test_slots_of_a_spec_are_saved_and_restored_by_their_own_names(remote: Make) -> None:
    spec = "per_leaf(master_weights(optax.adam(0.01)))"
    model, twin = training.network(torch.bfloat16), training.network(torch.bfloat16)
    optimizer = remote(model.named_parameters(), spec, state="full")
    steps(model, optimizer, range(3))
    saved = optimizer.state_dict()
    assert {"mu", "nu"} <= saved["state"][0].keys()
    again = remote(twin.named_parameters(), spec)
    again.load_state_dict(saved)
    twin.load_state_dict(model.state_dict())
    for m, o in ((model, optimizer), (twin, again)):
        steps(m, o, range(3, 5))
    assert training.equal(training.values(model), training.values(twin))
    assert again.last_reply.step == 5
    ours, theirs = optimizer.session.state().arrays, again.session.state().arrays
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_parameters_changed_under_masters_of_64_bits_go_up_in_64(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "master_weights(optax.adam(0.01), 'float64')")
    steps(model, optimizer, range(1))
    with torch.no_grad():
        model[0].weight.fill_(0.25)
    optimizer.param_groups[0]["lr"] = 0.0
    steps(model, optimizer, range(1, 2))
    assert (optimizer.session.params()["0.weight"] == 0.25).all()
