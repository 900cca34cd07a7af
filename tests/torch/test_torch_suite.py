"""Torch's own tests of its optimizers, by name: what they ask of every optimizer, asked of ours.

The names are those of ``TestOptimRenewed`` in torch's ``test/test_optim.py``; the code is ours. Local torch is the
oracle wherever the original compares two of its own implementations. State is tested in both forms, handle and full.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest

import optwire

torch = pytest.importorskip("torch", reason="torch is an optional test dependency; `make test` installs it")

from tests.torch import training  # noqa: E402

from optwire.torch.translation import DEFINITIONS, definition  # noqa: E402

Make = Callable[..., Any]
RATES = {"adadelta": 1.0, "rprop": 1e-3, "sgd": 0.1, "asgd": 0.1, "adagrad": 0.1}
every = pytest.mark.parametrize("name", DEFINITIONS)
both_forms = pytest.mark.parametrize("form", ["handle", "full"])
some = pytest.mark.parametrize(("name", "arguments"), [("sgd", {"momentum": 0.9}), ("adamw", {"amsgrad": True})])


def trained(remote: Make, name: str, *, steps: int = 3, **arguments: Any) -> tuple[Any, Any]:
    model = training.network()
    optimizer = remote(model.named_parameters(), name, lr=0.01, **arguments)
    for step in range(steps):
        training.backward(model, step)
        optimizer.step()
    return model, optimizer


def trained_locally(name: str, *, steps: int = 3, **arguments: Any) -> tuple[Any, Any]:
    model = training.network()
    optimizer = DEFINITIONS[name].kind(model.parameters(), lr=0.01, **arguments)
    for step in range(steps):
        training.backward(model, step)
        optimizer.step()
    return model, optimizer


# ---------------------------------------------------------------------------------- direction, groups, schedulers


@every
def test_forloop_goes_right_direction(remote: Make, name: str) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), name, lr=RATES.get(name, 1e-2))
    first = training.loss(model).item()
    for _ in range(15):
        training.backward(model)
        optimizer.step()
    assert training.loss(model).item() < first


def test_param_group_with_lrscheduler_goes_right_direction(remote: Make) -> None:
    model = training.network()
    params = list(model.named_parameters())
    optimizer = remote([{"params": params[:2], "lr": 0.05}, {"params": params[2:]}], "adamw", lr=0.01)
    clocks = [
        torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.9),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
    ]
    first = training.loss(model).item()
    for _ in range(15):
        training.backward(model)
        optimizer.step()
        clocks[0].step()
        clocks[1].step(training.loss(model).item())
    assert training.loss(model).item() < first


def test_param_groups_lr(remote: Make) -> None:
    model = training.network()
    params = list(model.named_parameters())
    optimizer = remote([{"params": params[:2]}, {"params": params[2:], "lr": 0.0}], "adamw", lr=0.1)
    before = training.values(model)
    training.backward(model)
    optimizer.step()
    moved = [not torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True)]
    assert moved == [True, True, False, False]


def test_param_groups_weight_decay(remote: Make) -> None:
    model = training.network()
    params = list(model.named_parameters())
    optimizer = remote([{"params": params[:2], "weight_decay": 0.5}, {"params": params[2:]}], "sgd", lr=0.1)
    before = training.values(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    shrunk = [torch.allclose(p, 0.95 * old) for old, p in zip(before, model.parameters(), strict=True)]
    assert shrunk == [True, True, False, False]


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_tensor_lr(remote: Make, name: str) -> None:
    results = []
    for rate in (0.01, torch.tensor(0.01)):
        model = training.network()
        optimizer = remote(model.named_parameters(), name, lr=rate)
        for step in range(3):
            training.backward(model, step)
            optimizer.step()
        results.append(training.values(model))
    assert training.drift(*map(_as_model, results)) <= training.RELATIVE


def test_step_iteration(remote: Make) -> None:
    _, optimizer = trained(remote, "adamw", steps=2)
    assert [entry["step"].item() for entry in optimizer.full_state_dict()["state"].values()] == [2.0] * 4


# ---------------------------------------------------------------------------------------------------------- no-ops


@some
def test_step_is_noop_when_params_have_no_grad(remote: Make, name: str, arguments: dict[str, Any]) -> None:
    model, optimizer = trained(remote, name, **arguments)
    before = training.values(model)
    model.zero_grad()
    optimizer.step()
    assert training.equal(before, training.values(model))
    assert optimizer.session.info().step == 3


@every
def test_step_is_noop_for_zero_grads(remote: Make, name: str) -> None:
    """By the optimizer's own rule: AdamW decays its parameters all the same, as torch's does; and a step is counted."""
    model, twin = training.network(), training.network()
    optimizer = remote(model.named_parameters(), name, lr=0.01)
    local = DEFINITIONS[name].kind(twin.parameters(), lr=0.01)
    for m, o in ((model, optimizer), (twin, local)):
        for p in m.parameters():
            p.grad = torch.zeros_like(p)
        o.step()
    assert training.drift(twin, model) <= training.RELATIVE
    assert optimizer.last_reply.step == 1


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_grads_are_never_inplaced_into(remote: Make, name: str) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), name, lr=0.1, weight_decay=0.1, maximize=True)
    training.backward(model)
    before = [(p.grad.clone(), p.grad._version) for p in model.parameters()]
    optimizer.step()
    for (old, version), p in zip(before, model.parameters(), strict=True):
        assert torch.equal(p.grad, old)
        assert p.grad._version == version


# ----------------------------------------------------------------------------------------------------------- state


@both_forms
@some
def test_state_dict_deterministic(remote: Make, form: str, name: str, arguments: dict[str, Any]) -> None:
    reference, uninterrupted = trained(remote, name, **arguments)
    model, optimizer = trained(remote, name, state=form, **arguments)
    saved, weights = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    twin = training.network()
    twin.load_state_dict(weights)
    again = remote(twin.named_parameters(), name, lr=0.5, state=form, **arguments)
    again.load_state_dict(saved)
    for step in range(3, 6):
        for m, o in ((reference, uninterrupted), (twin, again)):
            training.backward(m, step)
            o.step()
    assert training.equal(training.values(reference), training.values(twin))
    assert again.last_reply.step == 6
    assert again.param_groups[0]["lr"] == 0.01


@both_forms
def test_can_load_older_state_dict(remote: Make, form: str) -> None:
    _, optimizer = trained(remote, "adamw", state=form)
    saved = copy.deepcopy(optimizer.state_dict())
    for flag in ("maximize", "foreach", "fused", "capturable", "differentiable", "amsgrad", "decoupled_weight_decay"):
        saved["param_groups"][0].pop(flag, None)
    again = remote(training.network().named_parameters(), "adamw")
    again.load_state_dict(saved)
    assert again.param_groups[0]["amsgrad"] is False
    assert again.session.step_count == 3


@pytest.mark.parametrize("names_there", [True, False])
@pytest.mark.parametrize("names_here", [True, False])
def test_can_load_from_to_named_state_dict(remote: Make, names_there: bool, names_here: bool) -> None:
    model, local = training.network(), None
    params = list(model.named_parameters()) if names_there else list(model.parameters())
    local = torch.optim.AdamW(params, lr=0.01)
    training.backward(model)
    local.step()
    twin = copy.deepcopy(model)
    optimizer = remote(list(twin.named_parameters()) if names_here else list(twin.parameters()), "adamw")
    optimizer.load_state_dict(copy.deepcopy(local.state_dict()))
    assert training.follow(local, model, optimizer, twin, range(1, 4)) <= training.RELATIVE
    names = optimizer.state_dict()["param_groups"][0].get("param_names")
    assert names == ([name for name, _ in model.named_parameters()] if names_there or names_here else None)


@both_forms
def test_save_load_equality_with_weights_only(remote: Make, form: str) -> None:
    _, optimizer = trained(remote, "adamw", state=form)
    saved, file = optimizer.state_dict(), io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["param_groups"] == saved["param_groups"]
    assert str(loaded["state"]) == str(saved["state"])
    again = remote(training.network().named_parameters(), "adamw")
    again.load_state_dict(loaded)
    assert again.session.step_count == 3


@pytest.mark.parametrize("kind", [int, float])
def test_load_nontensor_step(remote: Make, kind: type) -> None:
    model, local = trained_locally("adamw")
    saved = copy.deepcopy(local.state_dict())
    for entry in saved["state"].values():
        entry["step"] = kind(entry["step"].item())
    twin = copy.deepcopy(model)
    optimizer = remote(twin.named_parameters(), "adamw")
    optimizer.load_state_dict(saved)
    assert training.follow(local, model, optimizer, twin, range(3, 6)) <= training.RELATIVE
    assert optimizer.last_reply.step == 6


@every
def test_cpu_load_state_dict(remote: Make, name: str) -> None:
    """State of torch's own optimizer, whichever it is, goes on here."""
    model, local = trained_locally(name, **({"momentum": 0.9} if name in ("sgd", "rmsprop") else {}))
    twin = copy.deepcopy(model)
    optimizer = remote(twin.named_parameters(), name, **({"momentum": 0.5} if name in ("sgd", "rmsprop") else {}))
    optimizer.load_state_dict(copy.deepcopy(local.state_dict()))
    assert training.follow(local, model, optimizer, twin, range(3, 6)) <= training.RELATIVE


@both_forms
def test_non_empty_state(remote: Make, form: str) -> None:
    _, optimizer = trained(remote, "adamw", state=form)
    assert len(optimizer.state) == 4
    assert all(entry for entry in optimizer.state_dict()["state"].values())


def test_deepcopy_copies_all_public_attrs(remote: Make) -> None:
    _, optimizer = trained(remote, "adamw")

    def public(o: Any) -> set[str]:
        return {name for name in vars(o) if not name.startswith("_")}

    assert public(copy.deepcopy(optimizer)) == public(optimizer)


# ----------------------------------------------------------------------------------------------------------- hooks


def test_step_pre_hook(remote: Make) -> None:
    _, optimizer = trained(remote, "sgd", steps=1)
    calls: list[int] = []
    with_hook = optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(o.last_reply.step))
    optimizer.step()
    with_hook.remove()
    optimizer.step()
    assert calls == [1]


def test_step_post_hook(remote: Make) -> None:
    _, optimizer = trained(remote, "sgd", steps=1)
    calls: list[int] = []
    with_hook = optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(o.last_reply.step))
    optimizer.step()
    with_hook.remove()
    optimizer.step()
    assert calls == [2]


def test_step_all_hooks(remote: Make) -> None:
    from torch.optim import optimizer as base

    _, optimizer = trained(remote, "sgd", steps=1)
    calls: list[str] = []
    handles = [
        base.register_optimizer_step_pre_hook(lambda *_: calls.append("all before")),
        base.register_optimizer_step_post_hook(lambda *_: calls.append("all after")),
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert calls == ["all before", "before", "after", "all after"]


@both_forms
def test_state_dict_pre_hook(remote: Make, form: str) -> None:
    _, optimizer = trained(remote, "sgd", state=form)
    optimizer.register_state_dict_pre_hook(lambda o: o.param_groups[0].update(note="seen"))
    assert optimizer.state_dict()["param_groups"][0]["note"] == "seen"


@both_forms
def test_state_dict_post_hook(remote: Make, form: str) -> None:
    _, optimizer = trained(remote, "sgd", state=form)
    optimizer.register_state_dict_post_hook(lambda o, saved: {"replaced": len(saved["state"])})
    assert optimizer.state_dict() == {"replaced": 4}


@both_forms
def test_state_dict_pre_post_hook(remote: Make, form: str) -> None:
    _, optimizer = trained(remote, "sgd", state=form)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("second"))
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("first"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("last"))
    optimizer.state_dict()
    assert calls == ["first", "second", "last"]


@both_forms
def test_load_state_dict_pre_hook_and_prepend(remote: Make, form: str) -> None:
    _, optimizer = trained(remote, "sgd", state=form)

    def halve(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": group["lr"] / 2} for group in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    def expect_half(_: Any, saved: dict[str, Any]) -> None:
        assert saved["param_groups"][0]["lr"] == 0.005

    optimizer.register_load_state_dict_pre_hook(expect_half)
    optimizer.register_load_state_dict_pre_hook(halve, prepend=True)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.005


@both_forms
def test_load_state_dict_post_hook(remote: Make, form: str) -> None:
    _, optimizer = trained(remote, "sgd", state=form)
    optimizer.register_load_state_dict_post_hook(lambda o: o.param_groups[0].update(lr=0.25))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.last_reply.learning_rate == 0.25


@both_forms
def test_load_state_dict_pre_post_hook(remote: Make, form: str) -> None:
    _, optimizer = trained(remote, "sgd", state=form)
    calls: list[str] = []
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", "post"]


# ---------------------------------------------------------------------------------------------- construction errors

BAD_VALUES = [
    ("sgd", {"lr": 1e-2, "momentum": -0.5}, "Invalid momentum value: -0.5"),
    ("sgd", {"lr": torch.tensor([0.001, 0.002])}, "Tensor lr must be 1-element"),
    ("sgd", {"nesterov": True}, "Nesterov momentum requires"),
    ("adam", {"lr": 1e-2, "betas": (1.0, 0.0)}, "Invalid beta parameter at index 0: 1.0"),
    ("adamw", {"lr": 1e-2, "weight_decay": -1}, "Invalid weight_decay value: -1"),
    ("adamw", {"lr": -1e-2}, "Invalid learning rate: -0.01"),
    ("nadam", {"momentum_decay": -0.2}, "Invalid momentum_decay value: -0.2"),
    ("radam", {"weight_decay": -1}, "Invalid weight_decay value: -1"),
    ("adamax", {"betas": (0.0, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
    ("adadelta", {"rho": 1.1}, "Invalid rho value: 1.1"),
    ("adagrad", {"lr_decay": -0.5}, "Invalid lr_decay value: -0.5"),
    ("rmsprop", {"momentum": -1.0}, "Invalid momentum value: -1.0"),
    ("rprop", {"etas": (1.0, 0.5)}, "Invalid eta values: 1.0, 0.5"),
    ("asgd", {"weight_decay": -0.5}, "Invalid weight_decay value: -0.5"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), BAD_VALUES)
def test_errors(remote: Make, name: str, arguments: dict[str, Any], message: str) -> None:
    p = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        DEFINITIONS[name].kind([p], **arguments)
    with pytest.raises(ValueError, match=message):
        remote([p], name, **arguments)
    if "betas" not in arguments and "lr" not in arguments:
        with pytest.raises(ValueError, match=message):
            remote([{"params": [p], **arguments}], name)


@pytest.mark.parametrize(
    ("params", "kind", "message"),
    [
        (torch.zeros(3), TypeError, "iterable of Tensors or dicts"),
        ([], ValueError, "empty parameter list"),
        (["text"], TypeError, "can only optimize Tensors"),
        ([{"params": {torch.zeros(3)}}], TypeError, "ordered collections"),
        ([torch.zeros(3, requires_grad=True) * 2], ValueError, "non-leaf Tensor"),
        ([("a", torch.zeros(3)), torch.zeros(3)], ValueError, "with/without names"),
    ],
)
def test_errors_of_parameters(remote: Make, params: Any, kind: type[Exception], message: str) -> None:
    for make in (torch.optim.SGD, lambda params: remote(params, "sgd")):
        with pytest.raises(kind, match=message):
            make(copy.copy(params))


def test_errors_of_a_parameter_in_two_groups(remote: Make) -> None:
    p = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="more than one parameter group"):
        remote([{"params": [p]}, {"params": [p]}], "sgd")


def test_optimizer_can_be_printed(remote: Make) -> None:
    _, optimizer = trained(remote, "adamw")
    text = repr(optimizer)
    assert all(name in text for name in ("RemoteOptimizer", "Parameter Group 0", "lr: 0.01", "adamw", "step 3"))
    assert optimizer.session.name in text
    assert "127.0.0.1:" in text


# --------------------------------------------------------------------------------------------------- mixed, complex


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_mixed_device_dtype(remote: Make, name: str) -> None:
    """In one group; 16 bits beside 32 and 64. (There is one device here.)"""
    dtypes = (torch.float32, torch.float16, torch.float64)
    ours, theirs = ([torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes] for _ in range(2))
    local, optimizer = DEFINITIONS[name].kind(theirs, lr=0.1), remote(ours, name, lr=0.1)
    for _ in range(3):
        for p in (*ours, *theirs):
            p.grad = torch.full_like(p, 0.5)
        local.step()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = local.param_groups[0]["lr"] = local.param_groups[0]["lr"] / 2
    for p, q in zip(ours, theirs, strict=True):
        assert p.dtype == q.dtype
        torch.testing.assert_close(p, q, rtol=1e-3 if p.dtype is torch.float16 else 1e-6, atol=1e-6)


@every
def test_complex(remote: Make, name: str) -> None:
    _complex_is_torchs(remote, name, (4,))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_complex_2d(remote: Make, name: str) -> None:
    _complex_is_torchs(remote, name, (2, 3))


def test_state_dict_with_cuda_params(remote: Make) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA here")
    p = torch.nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = remote([p], "adamw", lr=0.1, state="full")
    p.grad = torch.ones_like(p)
    optimizer.step()
    again = remote([torch.nn.Parameter(p.detach().clone())], "adamw", lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    assert again.session.step_count == 1


# ------------------------------------------------------------------------------------------- implementation flags


def _is_refused(remote: Make, flag: str) -> None:
    """In an argument and in a group; None and False, as checkpoints have them, are taken."""
    p = torch.zeros(3, requires_grad=True)
    with pytest.raises(optwire.InvalidArgumentError, match=rf"{flag}=True.*remote: not needed"):
        remote([p], "adamw", **{flag: True})
    with pytest.raises(optwire.InvalidArgumentError, match=rf"param_groups\[0\].*{flag}=True"):
        remote([{"params": [p], flag: True}], "adamw")
    for default in (None, False):
        assert not remote([p], "adamw", **{flag: default}).param_groups[0][flag]


def test_foreach_matches_forloop(remote: Make) -> None:
    """Refused by name: the loop is on the server."""
    _is_refused(remote, "foreach")


def test_foreach_large_tensor(remote: Make) -> None:
    _is_refused(remote, "foreach")


def test_peak_memory_foreach(remote: Make) -> None:
    _is_refused(remote, "foreach")


def test_defaults_changed_to_foreach(remote: Make) -> None:
    """Whatever torch chooses where nothing was said: we choose none of them."""
    _is_refused(remote, "foreach")
    optimizer = remote([torch.zeros(3, requires_grad=True)], "adamw")
    assert not any(optimizer.param_groups[0].get(flag) for flag in ("foreach", "fused"))


def test_fused_matches_forloop(remote: Make) -> None:
    """Refused by name: every update is one program on the server."""
    _is_refused(remote, "fused")


def test_fused_large_tensor(remote: Make) -> None:
    _is_refused(remote, "fused")


def test_fused_cpu_matches_cuda(remote: Make) -> None:
    _is_refused(remote, "fused")


def test_fused_does_not_step_if_foundinf(remote: Make) -> None:
    """``fused`` is refused; what it promises to scalers, ``amp="server"`` does."""
    _is_refused(remote, "fused")
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = remote([p], "sgd", lr=0.1, amp="server")
    p.grad = torch.ones(3)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    assert optimizer.last_reply is None
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.95))


@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
def test_graphs_and_gradients_of_the_update_are_refused(remote: Make, flag: str) -> None:
    _is_refused(remote, flag)


def test_rosenbrock_sparse(remote: Make) -> None:
    """Refused: gradients that are sparse, naming the parameter."""
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = remote(embedding.named_parameters(), "sgd", lr=0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(optwire.UnsupportedError, match="'weight'.*sparse"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["LBFGS", "SparseAdam", "Adafactor", "Muon"])
def test_second_order_optims_return_consistent_types(remote: Make, kind: str) -> None:
    """Refused, by name and as a class, with what to take instead."""
    if not hasattr(torch.optim, kind):
        pytest.skip(f"this torch has no {kind}")
    for optimizer in (kind.lower(), getattr(torch.optim, kind)):
        with pytest.raises(optwire.UnsupportedError, match=kind):
            remote([torch.zeros(3, requires_grad=True)], optimizer)


def test_every_optimizer_of_torch_is_served_or_refused_with_a_reason() -> None:
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type)]
    names = {kind.__name__.lower() for kind in kinds if issubclass(kind, torch.optim.Optimizer)} - {"optimizer"}
    served = {name for name in names if name in DEFINITIONS}
    assert served == set(DEFINITIONS)
    for name in names - served:
        with pytest.raises(optwire.UnsupportedError, match=name):
            definition(name)


def _complex_is_torchs(remote: Make, name: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, dtype=torch.complex64, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    local, optimizer = DEFINITIONS[name].kind([theirs], lr=0.01), remote([ours], name, lr=0.01)
    for _ in range(5):
        ours.grad = torch.randn(shape, dtype=torch.complex64, generator=generator)
        theirs.grad = ours.grad.clone()
        local.step()
        optimizer.step()
        assert training.drift(_as_model([theirs]), _as_model([ours])) <= training.RELATIVE


def _as_model(values: list[Any]) -> Any:
    return torch.nn.ParameterList(values)
