"""The twelve contracts of ``torch.optim.Optimizer``, each as its table says it; docs/pytorch.md names these tests."""

from __future__ import annotations

import copy
import inspect
import io
import pickle  # noqa: TID251  what copies of an optimizer are made with, by others
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import optwire
from optwire_server import testing

torch = pytest.importorskip("torch", reason="torch is an optional test dependency; `make test` installs it")

from tests.e2e import proxy as proxies  # noqa: E402
from tests.torch import training  # noqa: E402

from optwire.torch import RemoteOptimizer  # noqa: E402

Make = Callable[..., Any]


# ------------------------------------------------------------------------------------------------ 1. be an Optimizer


def test_1_it_is_an_optimizer_and_every_hook_fires_once_a_step(remote: Make) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    model = training.network()
    optimizer = remote(model.named_parameters(), "sgd", lr=0.1)
    assert isinstance(optimizer, torch.optim.Optimizer)
    calls: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    training.backward(model)
    with torch.profiler.profile() as profile:
        optimizer.step()
    for handle in handles:
        handle.remove()
    assert calls == ["global pre", "pre", "post", "global post"]
    assert "Optimizer.step#RemoteOptimizer.step" in {event.key for event in profile.key_averages()}


# ------------------------------------------------------------------------------------------------- 2. torch's names


def every_scheduler() -> dict[str, Callable[[Any], Any]]:
    s = torch.optim.lr_scheduler
    makers: dict[str, Callable[[Any], Any]] = {
        "LambdaLR": lambda o: s.LambdaLR(o, lambda _: 1.0),
        "MultiplicativeLR": lambda o: s.MultiplicativeLR(o, lambda _: 0.9),
        "StepLR": lambda o: s.StepLR(o, 3),
        "MultiStepLR": lambda o: s.MultiStepLR(o, [3]),
        "ConstantLR": s.ConstantLR,
        "LinearLR": s.LinearLR,
        "ExponentialLR": lambda o: s.ExponentialLR(o, 0.9),
        "SequentialLR": lambda o: s.SequentialLR(o, [s.ConstantLR(o), s.ExponentialLR(o, 0.9)], [2]),
        "PolynomialLR": s.PolynomialLR,
        "CosineAnnealingLR": lambda o: s.CosineAnnealingLR(o, 5),
        "ChainedScheduler": lambda o: s.ChainedScheduler([s.ConstantLR(o), s.ExponentialLR(o, 0.9)]),
        "CyclicLR": lambda o: s.CyclicLR(o, 0.01, 0.1),
        "CosineAnnealingWarmRestarts": lambda o: s.CosineAnnealingWarmRestarts(o, 5),
        "OneCycleLR": lambda o: s.OneCycleLR(o, 0.1, total_steps=10),
        "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
    }
    return makers


def test_2_groups_speak_torch_and_every_scheduler_constructs_and_steps(remote: Make) -> None:
    from torch.optim.lr_scheduler import LRScheduler

    kinds = {kind for kind in vars(torch.optim.lr_scheduler).values() if inspect.isclass(kind)}
    known = {kind.__name__ for kind in kinds if issubclass(kind, LRScheduler) and not kind.__name__.startswith("_")}
    assert known - {"LRScheduler", "ReduceLROnPlateau"} <= every_scheduler().keys(), "torch has a new one"
    model = training.network()
    for make in every_scheduler().values():
        optimizer = remote(model.named_parameters(), "adamw", lr=0.1)
        assert set(optimizer.defaults) == set(torch.optim.AdamW([torch.zeros(1)]).defaults)
        scheduler = make(optimizer)
        training.backward(model)
        optimizer.step()
        scheduler.step()
        optimizer.step()
        assert optimizer.last_reply.step == 2


# --------------------------------------------------------------------------------------------- 3. edits are commands


def test_3_an_edit_rides_in_the_push_and_is_logged_with_its_step(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "adamw", lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        training.backward(model)
        optimizer.step()
        scheduler.step()
    assert [optimizer.last_reply.learning_rate, optimizer.param_groups[0]["lr"]] == [pytest.approx(0.025), 0.0125]
    changes = optimizer.session.info().changes
    path = "per_leaf.optimizer.torch_adamw.learning_rate"
    assert [(change.from_step, dict(change.values)) for change in changes] == [(1, {path: 0.05}), (2, {path: 0.025})]


def test_3_a_tensor_learning_rate_is_edited_in_place_and_stays_a_tensor(remote: Make) -> None:
    model = training.network()
    rate = torch.tensor(0.1)
    optimizer = remote(model.named_parameters(), "sgd", lr=rate)
    for value in (0.1, 0.01):
        rate.fill_(value)
        training.backward(model)
        optimizer.step()
        assert optimizer.last_reply.learning_rate == pytest.approx(value)
    assert optimizer.param_groups[0]["lr"] is rate


def test_3_what_another_client_sets_shows_in_the_groups(remote: Make, client: optwire.Client) -> None:
    model = training.network()
    groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(model.named_parameters())]
    optimizer = remote(groups, "sgd", session="shared-rate")
    training.backward(model)
    optimizer.step()
    place = "grouped.optimizers[{}].per_leaf.optimizer.torch_sgd.learning_rate"
    with client.attach("shared-rate") as other:
        other.set_hyperparams({place.format(0): 0.5, place.format(2): 0.7})
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.2, 0.7, 0.4])
    optimizer.step()
    assert optimizer.last_reply.learning_rate == 0.5, "what was learned is not taken for an edit"


def test_3_an_edit_whose_push_failed_is_repeated_and_applies_once(
    server: testing.Serving, client: optwire.Client
) -> None:
    model = training.network()
    optimizer = RemoteOptimizer(model.named_parameters(), "sgd", lr=0.1, client=client, session="edit-once")
    training.backward(model)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(optwire.OptwireError):
        optimizer.step()
    before = training.values(model)
    optimizer.param_groups[0]["lr"] = 0.2
    training.backward(model)
    optimizer.step()
    for old, p in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), old - 0.2 * p.grad, rtol=1e-6, atol=1e-7)
    assert [dict(c.values) for c in optimizer.session.info().changes] == [
        {"per_leaf.optimizer.torch_sgd.learning_rate": 0.2}
    ]
    client.delete_session("edit-once")


def test_3_an_edit_whose_answer_was_lost_is_not_taken_back_unnoticed(
    server: testing.Serving, client: optwire.Client
) -> None:
    """The push with the edit was applied, and its answer lost; then the edit is taken back."""
    model = training.network()
    with proxies.before(server.target) as proxy:
        optimizer = RemoteOptimizer(
            model.named_parameters(), "sgd", lr=0.1, target=proxy.target, session="lost", timeout=1.0
        )
        training.backward(model)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.5
        proxy.fail(proxies.DOWN, bytes=0, act="hold")
        with pytest.raises(optwire.DeadlineError):
            optimizer.step()
        proxy.heal()
        assert client.attach("lost").info().step == 2
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.pull()
        training.backward(model)
        optimizer.step()
        assert optimizer.last_reply.step == 3
        assert optimizer.last_reply.learning_rate == pytest.approx(0.1)
        optimizer.close()
    client.delete_session("lost")


def test_3_an_edit_whose_answer_was_lost_is_applied_once_by_the_retry(
    server: testing.Serving, client: optwire.Client
) -> None:
    """The push with the edit was applied, and its answer lost; the same step again finds out."""
    model, twin = training.network(), training.network()
    local = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    with proxies.before(server.target) as proxy:
        optimizer = RemoteOptimizer(
            model.named_parameters(), "sgd", lr=0.1, momentum=0.9, target=proxy.target, session="twice", timeout=2.0
        )
        training.follow(local, twin, optimizer, model, range(1))
        for each in (optimizer, local):
            each.param_groups[0]["lr"] = 0.5
        training.backward(twin, 1)
        training.same_gradients(twin, model)
        proxy.fail(proxies.DOWN, bytes=0, act="hold")
        with pytest.raises(optwire.DeadlineError):
            optimizer.step()
        proxy.heal()
        assert client.attach("twice").info().step == 2
        optimizer.step()
        local.step()
        assert training.drift(twin, model) <= training.RELATIVE
        info = optimizer.session.info()
        assert (info.step, [(change.from_step, dict(change.values)) for change in info.changes]) == (
            2,
            [(1, {"per_leaf.optimizer.torch_sgd.learning_rate": 0.5})],
        )
        assert training.follow(local, twin, optimizer, model, range(2, 4)) <= training.RELATIVE
        optimizer.close()
    client.delete_session("twice")


def test_3_whatever_another_client_sets_shows_and_an_edit_since_wins(remote: Make, client: optwire.Client) -> None:
    model = training.network()
    groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(model.named_parameters())]
    optimizer = remote(groups, "adamw", session="any-number")
    training.backward(model)
    optimizer.step()
    place = "grouped.optimizers[{}].per_leaf.optimizer.torch_adamw.{}"
    with client.attach("any-number") as other:
        other.set_hyperparams({place.format(2, "weight_decay"): 0.7, place.format(3, "beta1"): 0.5})
        optimizer.param_groups[1]["lr"] = 0.01
        optimizer.step()
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01, 0.7, 0.01]
        assert [group["betas"][0] for group in optimizer.param_groups] == [0.9, 0.9, 0.9, 0.5]
        assert optimizer.param_groups[1]["lr"] == 0.01
        other.set_hyperparams({place.format(2, "weight_decay"): 0.3})
        optimizer.param_groups[2]["weight_decay"] = 0.2
        optimizer.step()
        assert optimizer.param_groups[2]["weight_decay"] == 0.2
        optimizer.step()
        later = other.info().step + 1
        other.set_hyperparams({place.format(0, "eps"): 1e-3}, from_step=later)
        assert len(other.info().changes) == 5, "two of ours"
        while other.info().step < later:
            optimizer.step()
        assert optimizer.param_groups[0]["eps"] == 1e-3
        assert other.info().step == later, "the group says so before the step that uses it"


# ------------------------------------------------------------------------------------------------ 4. step is wrapped


def test_4_step_is_a_plain_method_that_may_be_wrapped_and_swapped(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "sgd", lr=0.1)
    original = optimizer.step
    assert original.__func__
    assert "step" not in vars(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert "step" in vars(optimizer), "the scheduler's own wrapper"
    calls = []
    wrapped = optimizer.step
    optimizer.step = lambda *args: calls.append("swapped") or wrapped(*args)  # as Accelerate does
    training.backward(model)
    optimizer.step()
    optimizer.step = wrapped
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
    assert calls == ["swapped"]
    assert optimizer.last_reply.step == 2


# -------------------------------------------------------------------------------------------------- 5. state is full


def test_5_torchs_checkpoint_helper_makes_no_step(remote: Make) -> None:
    from torch.distributed.checkpoint import state_dict as helper

    model = training.network()
    optimizer = remote(model.named_parameters(), "adamw", lr=0.1)
    assert all(optimizer.state[p]["remote"] for p in model.parameters())
    for step in range(3):
        training.backward(model, step)
        optimizer.step()
    model.zero_grad()
    for _ in range(10):
        saved = helper.get_optimizer_state_dict(model, optimizer)
        helper.set_optimizer_state_dict(model, optimizer, saved)
    assert optimizer.session.info().step == 3
    assert optimizer.session.info().incarnation == 1


def test_5_a_step_of_zeros_at_rate_zero_is_refused_unless_it_is_meant(remote: Make) -> None:
    model = training.network()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(optwire.InvalidArgumentError, match="allow_zero=True"):
        remote(model.named_parameters(), "adamw", lr=0.0).step()
    optimizer = remote(model.named_parameters(), "adamw", lr=0.0, allow_zero=True)
    optimizer.step()
    assert optimizer.last_reply.step == 1


# ----------------------------------------------------------------------------------------------- 6. a cheap state_dict


def test_6_a_state_dict_is_a_small_handle_and_makes_no_session(remote: Make, client: optwire.Client) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "adamw", lr=0.1)
    sessions = len(client.list_sessions())
    for _ in range(2):  # what Accelerate's prepare() does, before step 0
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(client.list_sessions()) == sessions
    training.backward(model)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert len(file.getvalue()) < 10_000
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    optimizer.load_state_dict(loaded)
    assert optimizer.session.info().incarnation == 1, "a handle of the current step is a no-op"


def test_6_a_handle_of_another_step_or_session_says_what_to_do(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "adamw", lr=0.1, session="handles")
    training.backward(model)
    optimizer.step()
    handle = optimizer.state_dict()
    optimizer.step()
    with pytest.raises(optwire.OutOfStepError, match=r"step 1.*at step 2.*state='full'") as caught:
        optimizer.load_state_dict(handle)
    assert caught.value.step == 2
    with pytest.raises(optwire.InvalidArgumentError, match="'handles'.*'others'"):
        remote(model.named_parameters(), "adamw", session="others").load_state_dict(handle)


def test_6_a_handle_brings_a_new_process_back_to_its_session(remote: Make) -> None:
    model, twin = training.network(), training.network()
    optimizer = remote(model.named_parameters(), "adamw", lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    training.backward(model)
    optimizer.step()
    scheduler.step()
    again = remote(twin.named_parameters(), "adamw", lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    assert again.session.name == optimizer.session.name
    assert training.equal(training.values(twin), training.values(model))
    training.backward(twin)
    again.step()
    assert (again.last_reply.step, again.last_reply.learning_rate) == (2, pytest.approx(0.05))


# --------------------------------------------------------------------------------------------- 7. slots, by name: see
# test_checkpoints.py, and 8, no element type is lost.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_8_parameters_of_16_bits_are_those_of_32_rounded(remote: Make, dtype: Any) -> None:
    """The oracle: torch in 32 bits on the same gradients."""
    model, masters = training.network(dtype), training.network(dtype).float()
    optimizer = remote(model.named_parameters(), "adamw", lr=0.01)
    local = torch.optim.AdamW(masters.parameters(), lr=0.01)
    for step in range(10):
        training.backward(model, step)
        for p, q in zip(model.parameters(), masters.parameters(), strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        local.step()
    kept = optimizer.session.state().arrays
    for p, (name, q) in zip(model.parameters(), masters.named_parameters(), strict=True):
        torch.testing.assert_close(torch.from_numpy(kept[f"params/{name}"]), q.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(p, torch.from_numpy(kept[f"params/{name}"]).to(dtype))


def test_8_slots_of_a_bf16_model_survive_bit_for_bit(remote: Make) -> None:
    model = training.network(torch.bfloat16)
    optimizer = remote(model.named_parameters(), "adamw", lr=0.1, state="full")
    for step in range(3):
        training.backward(model, step)
        optimizer.step()
    saved, weights, before = copy.deepcopy((optimizer.state_dict(), model.state_dict(), optimizer.session.state()))
    assert {name: value.dtype for name, value in saved["state"][0].items() if name != "step"} == dict.fromkeys(
        ("exp_avg", "exp_avg_sq", "params"), torch.float32
    )
    optimizer.step()
    twin = training.network(torch.bfloat16)
    restored = remote(twin.named_parameters(), "adamw", lr=0.1)
    restored.load_state_dict(saved)
    twin.load_state_dict(weights)
    slots = [name for name in before.arrays if not name.startswith("params/")]
    after = restored.session.state()
    assert after.step == before.step == 3
    assert all((before.arrays[name] == after.arrays[name]).all() for name in slots)
    training.same_gradients(model, twin)
    restored.step()
    uninterrupted, resumed = optimizer.session.state(), restored.session.state()
    assert all((uninterrupted.arrays[name] == resumed.arrays[name]).all() for name in uninterrupted.arrays)
    assert training.equal(training.values(model), training.values(twin))


# ------------------------------------------------------------------------------------------------- 9. copy and pickle


def test_9_an_unpickled_optimizer_attaches_by_itself(server: testing.Serving, client: optwire.Client) -> None:
    model = training.network()
    with RemoteOptimizer(model.named_parameters(), "adamw", lr=0.1, target=server.target) as optimizer:
        training.backward(model)
        optimizer.step()
        data = pickle.dumps((model, optimizer))
        twin, again = pickle.loads(data)  # noqa: S301
        with again:
            assert again.param_groups[0]["params"][0] is twin[0].weight
            training.backward(twin)
            again.step()
            assert again.last_reply.step == 2
            with pytest.raises(optwire.StaleStepError):
                optimizer.step()
            optimizer.pull()
            assert training.equal(training.values(model), training.values(twin))
        client.delete_session(optimizer.session.name)


def test_9_an_unpickled_optimizer_takes_over_what_was_changed_meanwhile(
    server: testing.Serving, client: optwire.Client
) -> None:
    model = training.network()
    with RemoteOptimizer(
        model.named_parameters(), "adamw", lr=0.1, weight_decay=0.2, target=server.target, session="meanwhile"
    ) as optimizer:
        training.backward(model)
        optimizer.step()
        optimizer.param_groups[0]["eps"] = 1e-4
        pickled = pickle.dumps((model, optimizer))
    with client.attach("meanwhile") as other:
        other.set_hyperparams(weight_decay=0.5)
        again_model, again = pickle.loads(pickled)  # noqa: S301  our own
        with again:
            training.backward(again_model)
            again.step()
            assert again.param_groups[0]["weight_decay"] == 0.5
        changed = [{path.rpartition(".")[2]: value for path, value in c.values} for c in other.info().changes]
    assert changed == [{"weight_decay": 0.5}, {"eps": 1e-4}]
    client.delete_session("meanwhile")


def test_9_workers_of_a_data_loader_may_hold_the_optimizer(server: testing.Serving, tmp_path: Path) -> None:
    """Forked and spawned; in a process of its own, as this one has JAX in it, which is not to be forked."""
    script = tmp_path / "loop.py"
    script.write_text(LOOP)
    result = subprocess.run([sys.executable, str(script), server.target], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["fork", "1", "spawn", "2"], result.stderr


LOOP = """
import sys
import torch
from optwire.torch import RemoteOptimizer

class Data(torch.utils.data.Dataset):
    def __init__(self, optimizer):
        self.optimizer = optimizer
    def __len__(self):
        return 2
    def __getitem__(self, index):
        return torch.full((3,), self.optimizer.param_groups[0]["lr"])

if __name__ == "__main__":
    model = torch.nn.Linear(3, 1)
    optimizer = RemoteOptimizer(model.named_parameters(), "sgd", lr=0.5, target=sys.argv[1])
    for context in ("fork", "spawn"):
        loader = torch.utils.data.DataLoader(
            Data(optimizer), batch_size=2, num_workers=1, multiprocessing_context=context
        )
        for batch in loader:
            assert batch.eq(0.5).all()
            model(batch).sum().backward()
            optimizer.step()
        print(context, optimizer.last_reply.step)
"""


def test_9_a_deep_copy_is_detached_until_it_is_told_otherwise(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "adamw", lr=0.1)
    training.backward(model)
    optimizer.step()
    twin, clone = copy.deepcopy((model, optimizer))
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert {name for name in vars(clone) if not name.startswith("_")} == public
    training.backward(twin)
    with pytest.raises(optwire.DetachedError, match=r"attach\('NAME'\)"):
        clone.step()
    clone.attach("a-copy")
    clone.step()
    assert (clone.session.name, clone.last_reply.step) == ("a-copy", 2), "with the slots of its origin"
    with pytest.raises(optwire.DetachedError):
        copy.copy(optimizer).step()
    assert optimizer.session.info().step == 1


# ------------------------------------------------------------------------------------------------------ 10. no gradient


def test_10_a_parameter_without_gradient_keeps_itself_and_its_slots(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "adamw", lr=0.1, weight_decay=0.5)
    training.backward(model)
    optimizer.step()
    before, state = training.values(model), optimizer.session.state().arrays
    training.backward(model, 1)
    model[0].weight.grad = None
    optimizer.step()
    after = optimizer.session.state().arrays
    changed = {name for name in state if (state[name] != after[name]).any()}
    assert changed
    assert not any(name.endswith("/0.weight") for name in changed)
    assert torch.equal(model[0].weight, before[0])
    strict = remote(model.named_parameters(), "adamw", missing_grad="error")
    with pytest.raises(optwire.InvalidArgumentError, match=r"'0\.weight' has no gradient"):
        strict.step()


def test_10_with_no_gradient_at_all_nothing_is_pushed(remote: Make, client: optwire.Client) -> None:
    sessions = len(client.list_sessions())
    optimizer = remote(training.network().named_parameters(), "adamw")
    optimizer.step()
    assert optimizer.last_reply is None
    assert len(client.list_sessions()) == sessions


# --------------------------------------------------------------------------------------------------------- 11. closures


def test_11_a_closure_runs_once_with_gradients_and_its_value_comes_back(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "sgd", lr=0.1)
    places = [p.data_ptr() for p in model.parameters()]
    calls = []

    def closure() -> Any:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        value = training.loss(model)
        value.backward()
        return value

    with torch.no_grad():
        value = optimizer.step(closure)
    assert calls == [True]
    assert value.item() == pytest.approx(training.loss(training.network()).item())
    assert [p.data_ptr() for p in model.parameters()] == places, "written in place"
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_11_autograd_notices_that_parameters_were_written(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "sgd", lr=0.1)
    early = training.loss(model)
    training.backward(model, 1)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        early.backward()


# -------------------------------------------------------------------------------------------------------------- 12. AMP


def test_12_the_scaler_divides_unless_the_server_is_asked_to(remote: Make) -> None:
    params = list(training.network().named_parameters())
    assert not getattr(remote(params, "sgd"), "_step_supports_amp_scaling", False)
    assert remote(params, "sgd", amp="server")._step_supports_amp_scaling


@pytest.mark.parametrize("amp", ["client", "server"])
def test_12_a_scheduler_warns_after_a_skipped_first_step_as_with_torch(remote: Make, amp: str) -> None:
    """That it came before the first step: where the scaler leaves the step out, and not where the optimizer does."""

    def warned(optimizer: Any, model: Any) -> list[str]:
        clock = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scaler.scale(training.loss(model)).backward()
        model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            clock.step()
        return [str(warning.message) for warning in caught]

    model, twin = training.network(), training.network()
    ours = warned(remote(model.named_parameters(), "adamw", amp=amp), model)
    theirs = warned(torch.optim.AdamW(twin.parameters(), fused=amp == "server"), twin)
    assert ours == theirs
    assert len(ours) == (1 if amp == "client" else 0)


def test_12_scaled_f16_gradients_go_up_as_they_are(remote: Make) -> None:
    """Which torch's scaler refuses to unscale by itself."""
    model, plain = training.network(torch.float16), training.network(torch.float16)
    optimizer = remote(model.named_parameters(), "sgd", lr=0.1, amp="server")
    unscaled = remote(plain.named_parameters(), "sgd", lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.zeros(1))
    training.backward(plain)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        p.grad = q.grad * 64
    scaler.step(optimizer)
    scaler.update()
    unscaled.step()
    assert training.drift(model, plain) < 1e-3
    model[0].weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.last_reply.step == 1
    assert scaler.get_scale() == 32.0


def test_telemetry_asks_for_metrics(remote: Make) -> None:
    model = training.network()
    training.backward(model)
    silent, telling = (remote(model.named_parameters(), "adamw", lr=0.1, telemetry=on) for on in (False, True))
    silent.step()
    assert not silent.last_reply.metrics
    telling.step()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters())).item()
    assert telling.last_reply.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert telling.last_reply.metrics["learning_rate"] == pytest.approx(0.1)


def test_a_spec_that_asks_for_the_loss_gets_what_the_closure_returned(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "chain(optax.sgd(0.1), reduce_on_plateau(patience=1, cooldown=0))")
    assert optimizer.session.describe().extras == ("loss",)

    def closure() -> Any:
        training.backward(model)
        return training.loss(model)

    assert optimizer.step(closure).requires_grad
    assert optimizer.step(lambda: closure().item()) > 0
    assert optimizer.last_reply.step == 2
    with pytest.raises(optwire.InvalidArgumentError, match="asks for the loss.*closure"):
        optimizer.step()
    assert optimizer.last_reply.step == 2


# ------------------------------------------------------------------------------------------------------ and around them


def test_parameters_changed_between_steps_go_up_before_the_push(remote: Make) -> None:
    local_model, model = training.network(), training.network()
    local = torch.optim.AdamW(local_model.parameters(), lr=0.01)
    optimizer = remote(model.named_parameters(), "adamw", lr=0.01)

    def clamp(_: int) -> None:
        for m in (local_model, model):
            with torch.no_grad():
                m[0].weight.clamp_(-0.3, 0.3)

    assert training.follow(local, local_model, optimizer, model, range(5), clamp) <= training.RELATIVE
    checkpoint = copy.deepcopy(model.state_dict())
    training.follow(local, local_model, optimizer, model, range(5, 8))
    for m in (local_model, model):
        m.load_state_dict(checkpoint)
    assert training.follow(local, local_model, optimizer, model, range(8, 10)) <= training.RELATIVE


def test_a_checkpoint_loaded_after_construction_is_what_training_starts_from(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "sgd", lr=0.0, allow_zero=True)
    with torch.no_grad():
        model[0].weight.fill_(2.0)
    training.backward(model)
    optimizer.step()
    assert (optimizer.session.params()["0.weight"] == 2.0).all()


def test_written_parameters_do_not_overwrite_what_another_client_pushed(remote: Make, client: optwire.Client) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "sgd", lr=0.1, session="written")
    training.backward(model)
    optimizer.step()
    with client.attach("written") as other:
        newest = other.step(other.params())
    with torch.no_grad():
        model[0].weight.clamp_(-0.1, 0.1)
    with pytest.raises(optwire.StaleStepError, match="params/0.weight was written to on step 1"):
        optimizer.step()
    optimizer.pull()
    assert (newest["0.weight"] == model[0].weight.detach().numpy()).all()


def test_parameters_that_a_framework_puts_in_their_places_are_trained(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "sgd", lr=0.1)
    training.backward(model)
    optimizer.step()
    twin = copy.deepcopy(model)
    optimizer.param_groups[0]["params"] = list(twin.parameters())
    training.backward(twin)
    before = training.values(twin)
    optimizer.step()
    assert not training.equal(before, training.values(twin))
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.zeros(3)))
    optimizer.param_groups[0]["param_names"].append("more")
    with pytest.raises(optwire.TreeMismatchError, match="5 parameters.*add_param_group"):
        optimizer.step()


def test_a_flag_of_a_group_is_checked_with_the_defaults(remote: Make) -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = remote([{"params": [p], "nesterov": True}], "sgd", lr=0.1, momentum=0.9)
    q = torch.nn.Parameter(torch.zeros(3))
    local = torch.optim.SGD([{"params": [q], "nesterov": True}], lr=0.1, momentum=0.9)
    for _ in range(3):
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
        local.step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_group_added_after_steps_joins_the_session(remote: Make, name: str) -> None:
    local_model, model = training.network(), training.network()
    local = getattr(torch.optim, {"adamw": "AdamW", "sgd": "SGD"}[name])(local_model[0].parameters(), lr=0.01)
    first, second = list(model.named_parameters())[:2], list(model.named_parameters())[2:]
    optimizer = remote(first, name, lr=0.01, session=f"grown-{name}")
    training.follow(local, local_model, optimizer, model, range(3))
    local.add_param_group({"params": list(local_model[2].parameters()), "lr": 0.02})
    optimizer.add_param_group({"params": second, "lr": 0.02})
    assert training.follow(local, local_model, optimizer, model, range(3, 6)) <= training.RELATIVE
    assert (optimizer.session.name, optimizer.last_reply.step) == (f"grown-{name}", 6)
    optimizer.param_groups[1]["lr"] = local.param_groups[1]["lr"] = 0.005
    assert training.follow(local, local_model, optimizer, model, range(6, 8)) <= training.RELATIVE


def test_compiled_models_train_and_step_breaks_no_graph(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "sgd", lr=0.1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        training.backward(compiled)
        optimizer.step()
    assert optimizer.last_reply.step == 2
