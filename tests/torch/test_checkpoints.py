"""Checkpoints in torch's own layout: from torch to the server and back, by name, checked, without a loss.

The promise: "torch AdamW → remote → torch AdamW within 1e-6 of uninterrupted; permuted modules restore right by name."
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

import optwire

torch = pytest.importorskip("torch", reason="torch is an optional test dependency; `make test` installs it")

from tests.torch import training  # noqa: E402

Make = Callable[..., Any]


def steps(model: Any, optimizer: Any, numbers: range) -> None:
    for step in numbers:
        training.backward(model, step)
        optimizer.step()


@pytest.mark.parametrize("named", [True, False])
def test_from_torch_to_the_server_and_back_is_as_if_uninterrupted(remote: Make, named: bool) -> None:
    def params(m: Any) -> Any:
        return m.named_parameters() if named else m.parameters()

    model, reference = training.network(torch.float64), training.network(torch.float64)
    uninterrupted = torch.optim.AdamW(params(reference), lr=0.01)
    first = torch.optim.AdamW(params(model), lr=0.01)
    steps(reference, uninterrupted, range(15))
    steps(model, first, range(5))
    second = remote(params(model), "adamw", lr=0.5)
    second.load_state_dict(first.state_dict())
    steps(model, second, range(5, 10))
    third = torch.optim.AdamW(params(model), lr=0.5)
    third.load_state_dict(second.full_state_dict())
    steps(model, third, range(10, 15))
    assert training.drift(reference, model) <= training.RELATIVE
    assert [entry["step"].item() for entry in third.state.values()] == [15.0] * 4
    assert second.last_reply.step == 10


def test_a_full_state_has_torchs_keys_shapes_and_types(remote: Make) -> None:
    model, twin = training.network(), training.network()
    ours, theirs = remote(model.named_parameters(), "adamw"), torch.optim.AdamW(twin.named_parameters())
    steps(model, ours, range(2))
    steps(twin, theirs, range(2))
    a, b = ours.full_state_dict(), theirs.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for mine, own in zip(a["state"].values(), b["state"].values(), strict=True):
        assert mine.keys() == own.keys()
        for slot in own:
            assert (mine[slot].dtype, mine[slot].shape) == (own[slot].dtype, own[slot].shape)
            torch.testing.assert_close(mine[slot], own[slot], rtol=1e-5, atol=1e-7)


def test_permuted_modules_are_restored_right_by_name(remote: Make) -> None:
    def model(order: str) -> Any:
        layers = {name: torch.nn.Linear(3, 3) for name in order}
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name in "abc":
                for p in layers[name].parameters():
                    p.copy_(torch.randn(p.shape, generator=generator))
        return torch.nn.ModuleDict(layers)

    def train(m: Any, optimizer: Any, numbers: range) -> None:
        for step in numbers:
            optimizer.zero_grad()
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            (m["c"](torch.tanh(m["b"](torch.tanh(m["a"](x))))) ** 2).mean().backward()
            optimizer.step()

    one, other = model("abc"), model("cab")
    first = torch.optim.AdamW(one.named_parameters(), lr=0.01)
    train(one, first, range(5))
    other.load_state_dict(one.state_dict())
    second = remote(other.named_parameters(), "adamw", lr=0.01)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["param_names"][0] == "c.weight", "ours stay the names of our parameters"
    train(one, first, range(5, 8))
    train(other, second, range(5, 8))
    for name, p in one.named_parameters():
        torch.testing.assert_close(dict(other.named_parameters())[name], p, rtol=1e-5, atol=1e-6)


def test_loading_into_a_session_under_way_replaces_slots_and_step(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "adamw", lr=0.01, state="full")
    steps(model, optimizer, range(3))
    saved, weights = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    steps(model, optimizer, range(3, 6))
    expected = training.values(model)
    optimizer.load_state_dict(saved)
    model.load_state_dict(weights)  # and the parameters, in whichever order
    assert optimizer.session.step_count == 3
    steps(model, optimizer, range(3, 6))
    assert training.equal(expected, training.values(model))
    assert optimizer.last_reply.step == 6


def test_parameters_without_slots_start_anew(remote: Make) -> None:
    """As in torch, where a state that is not in the dict is a state that was never made."""
    for name, arguments in (("adamw", {}), ("adagrad", {"initial_accumulator_value": 0.5}), ("nadam", {})):
        model, twin = training.network(), training.network()
        optimizer = remote(model.named_parameters(), name, lr=0.01, **arguments)
        steps(model, optimizer, range(3))
        fresh = remote(twin.named_parameters(), name, lr=0.01, **arguments)
        fresh.load_state_dict(fresh.full_state_dict())
        empty = {**optimizer.full_state_dict(), "state": {}}
        optimizer.load_state_dict(empty)
        model.load_state_dict(twin.state_dict())
        for m, o in ((model, optimizer), (twin, fresh)):
            steps(m, o, range(2))
        assert training.equal(training.values(model), training.values(twin))


@pytest.mark.parametrize("form", ["full", "handle"])
def test_what_prepare_does_before_the_first_step_leaves_a_session_alone(remote: Make, form: str) -> None:
    """Accelerate loads the state it just read, before there is a session."""
    results = []
    for prepares in (False, True):
        model, twin = training.network(), training.network()
        first = remote(model.named_parameters(), "adamw", lr=0.01, session=f"going-on-{form}-{prepares}")
        steps(model, first, range(3))
        second = remote(twin.named_parameters(), "adamw", lr=0.01, session=first.session.name, state=form)
        if prepares:
            second.load_state_dict(copy.deepcopy(second.state_dict()))
        steps(twin, second, range(3, 5))
        assert (second.session.info().incarnation == 1) == (form == "handle" or not prepares)
        results.append(training.values(twin))
    assert training.equal(*results)


@pytest.mark.parametrize("full", [True, False])
def test_distributed_checkpoint_in_both_forms_and_all_its_options(remote: Make, full: bool) -> None:
    from torch.distributed.checkpoint import state_dict as helper

    model = training.network()
    optimizer = remote(model.named_parameters(), "adamw", lr=0.01, state="full" if full else "handle")
    steps(model, optimizer, range(3))
    expected = optimizer.session.state()
    # "Full" is about shards to torch, and looks for a tensor in what it loads: a handle has none.
    gathered = [helper.StateDictOptions(full_state_dict=True, cpu_offload=True)] * full
    for options in (helper.StateDictOptions(), helper.StateDictOptions(cpu_offload=True), *gathered):
        for _ in range(5):
            saved = helper.get_optimizer_state_dict(model, optimizer, options=options)
            helper.set_optimizer_state_dict(model, optimizer, saved, options=options)
    assert optimizer.session.info().step == 3
    state = optimizer.session.state()
    assert all((state.arrays[name] == array).all() for name, array in expected.arrays.items())
    steps(model, optimizer, range(3, 4))
    assert optimizer.last_reply.step == 4


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # one process is what is meant
@pytest.mark.parametrize("form", ["handle", "full"])
def test_ten_distributed_checkpoints_on_disk_make_no_step(remote: Make, tmp_path: Any, form: str) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as helper

    model = training.network()
    optimizer = remote(model.named_parameters(), "adamw", lr=0.01, state=form)
    steps(model, optimizer, range(3))
    expected = optimizer.session.state()
    for k in range(10):
        saved = dict(zip(("model", "optimizer"), helper.get_state_dict(model, optimizer), strict=True))
        checkpoint.save(saved, checkpoint_id=tmp_path / str(k), no_dist=True)
        checkpoint.load(saved, checkpoint_id=tmp_path / str(k), no_dist=True)
        helper.set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    assert optimizer.session.info().step == 3
    state = optimizer.session.state()
    assert all((state.arrays[name] == array).all() for name, array in expected.arrays.items())
    steps(model, optimizer, range(3, 4))
    assert optimizer.last_reply.step == 4


def test_a_dict_that_does_not_fit_is_an_error_that_names_both(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.parameters(), "adamw", lr=0.01)
    steps(model, optimizer, range(1))
    saved = optimizer.full_state_dict()
    before = optimizer.session.state()

    turned = copy.deepcopy(saved)
    turned["state"][0]["exp_avg"] = turned["state"][0]["exp_avg"].T.contiguous()
    with pytest.raises(ValueError, match=r"'exp_avg' of shape \(4, 8\) for 'g0.p0', expected \(8, 4\)"):
        optimizer.load_state_dict(turned)

    other = torch.optim.SGD(model.parameters(), momentum=0.9)
    steps(model, other, range(1))
    with pytest.raises(ValueError, match="has 'momentum_buffer' for 'g0.p0'; this optimizer keeps step, exp_avg"):
        optimizer.load_state_dict(other.state_dict())

    with pytest.raises(ValueError, match="different number of parameter groups: 2, expected 1"):
        optimizer.load_state_dict({**saved, "param_groups": saved["param_groups"] * 2})
    fewer = copy.deepcopy(saved)
    fewer["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="group 0 has 3 parameters, expected 4"):
        optimizer.load_state_dict(fewer)
    flagged = copy.deepcopy(saved)
    flagged["param_groups"][0]["amsgrad"] = True
    with pytest.raises(optwire.InvalidArgumentError, match="amsgrad"):
        optimizer.load_state_dict(flagged)

    after = optimizer.session.state()
    assert all((after.arrays[name] == array).all() for name, array in before.arrays.items())
    named = remote(model.named_parameters(), "adamw")
    renamed = copy.deepcopy(saved)
    renamed["param_groups"][0]["param_names"] = [f"x.{i}" for i in range(4)]
    with pytest.raises(ValueError, match=r"no parameter '0.weight', it has x.0"):
        named.load_state_dict(renamed)


def test_masters_survive_writes_that_change_nothing(remote: Make) -> None:
    """Clamping within bounds, weights swapped out and in again, a handle and then the model."""
    model, twin = training.network(torch.bfloat16), training.network(torch.bfloat16)
    ours, theirs = (remote(m.named_parameters(), "sgd", lr=1e-4) for m in (model, twin))
    for step in range(6):
        for m, optimizer in ((model, ours), (twin, theirs)):
            training.backward(m, step)
            optimizer.step()
        with torch.no_grad():
            for p in model.parameters():
                kept = p.clone()
                p.mul_(0.5)
                p.copy_(kept).clamp_(-100, 100)
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    a, b = ours.session.state().arrays, theirs.session.state().arrays
    assert all((a[name] == b[name]).all() for name in a)
    assert ours.session.info().incarnation == 1


@pytest.mark.parametrize("trouble", ["step", "dtype"])
def test_a_handle_that_is_refused_changes_nothing(remote: Make, trouble: str) -> None:
    model = training.network()
    first = remote(model.named_parameters(), "adamw", lr=0.01)
    steps(model, first, range(1))
    handle = copy.deepcopy(first.state_dict())
    other = training.network(torch.bfloat16 if trouble == "dtype" else torch.float32)
    if trouble == "step":
        steps(model, first, range(1, 2))
    second = remote(other.named_parameters(), "adamw", lr=0.5)
    before = training.values(other)
    with pytest.raises(optwire.OutOfStepError if trouble == "step" else optwire.TreeMismatchError):
        second.load_state_dict(handle)
    assert training.equal(before, training.values(other))
    assert second.param_groups[0]["lr"] == 0.5
    steps(other, second, range(1))
    assert second.session.name != first.session.name
    assert second.last_reply.step == 1


def test_a_full_state_under_way_is_of_the_model_that_is_here(remote: Make, client: optwire.Client) -> None:
    """Another client pushed: what is loaded goes with our parameters, not with theirs."""
    model, twin = training.network(), training.network()
    local = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    optimizer = remote(model.named_parameters(), "sgd", lr=0.1, momentum=0.9, session="under-way")
    training.follow(local, twin, optimizer, model, range(2))
    saved = copy.deepcopy(optimizer.full_state_dict())
    with client.attach("under-way") as other:
        other.step({name: array + 1 for name, array in other.params().items()})
    optimizer.load_state_dict(saved)
    assert training.follow(local, twin, optimizer, model, range(2, 4)) <= training.RELATIVE


def test_a_copy_with_a_session_of_its_own_takes_the_slots_along(remote: Make, client: optwire.Client) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "adamw", lr=0.01)
    steps(model, optimizer, range(3))
    twin, clone = copy.deepcopy((model, optimizer))
    lost, orphan = copy.deepcopy((model, optimizer))
    clone.attach("a-copy-with-slots")
    steps(twin, clone, range(3, 5))
    steps(model, optimizer, range(3, 5))
    assert training.equal(training.values(model), training.values(twin))
    client.delete_session(optimizer.session.name)
    orphan.attach("an-orphan")
    with pytest.raises(optwire.SessionNotFoundError, match="of whose optimizer this is a copy, is gone"):
        steps(lost, orphan, range(3, 4))
    clone.close()


def test_writes_that_were_not_sent_survive_a_pickle(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "sgd", lr=0.0, allow_zero=True)
    steps(model, optimizer, range(1))
    with torch.no_grad():
        model[0].bias.fill_(3.0)
    twin, clone = copy.deepcopy((model, optimizer))
    clone.attach()
    steps(twin, clone, range(1))
    assert (clone.session.params()["0.bias"] == 3.0).all()
    clone.close()
