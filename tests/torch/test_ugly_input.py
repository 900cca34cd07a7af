"""What cannot be meant is an error that names the thing, before anything is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import optwire
from optwire_server import testing

torch = pytest.importorskip("torch", reason="torch is an optional test dependency; `make test` installs it")

from tests.torch import training  # noqa: E402

from optwire.torch import RemoteOptimizer  # noqa: E402

Make = Callable[..., Any]


def parameter(*shape: int, dtype: Any = torch.float32) -> Any:
    return torch.nn.Parameter(torch.zeros(shape or (3,), dtype=dtype))


UGLY: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("a name that is none", {"optimizer": "adamv"}, optwire.InvalidArgumentError, "'adamv' is no optimizer.*'adamw'"),
    ("a class that is none", {"optimizer": torch.nn.Linear}, optwire.InvalidArgumentError, "Linear.*no optimizer"),
    ("an object", {"optimizer": 3}, TypeError, "optimizer is int"),
    ("a spec that is none", {"optimizer": "adamw(0.1"}, optwire.SpecError, "line 1"),
    ("an argument of optax", {"learning_rate": 0.1}, TypeError, "'learning_rate'; AdamW takes lr, betas"),
    ("no server", {"target": None}, TypeError, "exactly one of target= and client="),
    ("two servers", {"client": object()}, TypeError, "exactly one of target= and client="),
    ("a target that is none", {"target": "nowhere"}, optwire.InvalidArgumentError, "target"),
    ("a transport that is none", {"transport": "pigeon"}, optwire.InvalidArgumentError, "transport: 'pigeon'"),
    ("a timeout of zero", {"timeout": 0}, optwire.InvalidArgumentError, "timeout: 0"),
    ("a session name", {"session": "a/b"}, optwire.InvalidArgumentError, "session name 'a/b'"),
    ("a form of state", {"state": "half"}, optwire.InvalidArgumentError, "state: 'half'"),
    ("a way to scale", {"amp": True}, optwire.InvalidArgumentError, "amp: True"),
    ("a rule for None", {"missing_grad": "zero"}, optwire.InvalidArgumentError, "missing_grad: 'zero'"),
    ("a way to distribute", {"distributed": "ddp"}, optwire.InvalidArgumentError, "distributed: 'ddp'.*replicated"),
    ("shards", {"distributed": "shards"}, optwire.UnsupportedError, "assembly of slices"),
    ("an overlap that is neither", {"overlap": "yes"}, optwire.InvalidArgumentError, "overlap: 'yes'"),
    ("overlap", {"overlap": True, "distributed": "replicated"}, optwire.UnsupportedError, "overlap=True"),
    ("a whole number as parameter", {"params": [torch.zeros(3, dtype=torch.int32)]}, optwire.TreeError, "torch.int32"),
    ("eight bits", {"params": [torch.zeros(3).to(torch.float8_e4m3fn)]}, optwire.TreeError, "float8_e4m3fn"),
    ("a name that is no path", {"params": [("a//b", parameter())]}, optwire.TreeError, "'a//b'"),
    ("text as a value", {"lr": "fast"}, TypeError, "not supported between"),
    (
        "text in a group",
        {"params": [{"params": [parameter()], "weight_decay": "much"}]},
        TypeError,
        "not supported between",
    ),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), [u[1:] for u in UGLY], ids=[u[0] for u in UGLY])
def test_a_bad_argument_is_refused_at_construction(
    server: testing.Serving, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    good = {"params": [parameter()], "optimizer": "adamw", "target": server.target}
    with pytest.raises(kind, match=message):
        RemoteOptimizer(**(good | arguments))


def test_two_parameters_of_one_name_are_refused_before_a_session_is_made(remote: Make) -> None:
    optimizer = remote([("w", parameter()), ("w", parameter())], "sgd")
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones(3)
    with pytest.raises(optwire.TreeError, match="two leaves have the name 'w'"):
        optimizer.step()


@pytest.mark.parametrize("value", ["fast", None, float("nan"), float("inf"), -1.0, (0.1, 0.2)])
def test_an_edit_that_is_no_rate_is_refused_and_the_step_can_be_repeated(remote: Make, value: Any) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "sgd", lr=0.1)
    training.backward(model)
    optimizer.step()
    before = training.values(model)
    optimizer.param_groups[0]["lr"] = value
    with pytest.raises((ValueError, TypeError)):
        optimizer.step()
    assert training.equal(before, training.values(model))
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert optimizer.last_reply.step == 2


def test_an_edit_of_what_decides_slots_says_what_to_do(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "adamw")
    training.backward(model)
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(optwire.InvalidArgumentError, match=r"\['amsgrad'\] was changed from False to True.*make a new"):
        optimizer.step()


def test_a_momentum_where_there_was_none_is_the_servers_to_refuse(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "sgd", lr=0.1)
    training.backward(model)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(optwire.OptwireError, match="momentum"):
        optimizer.step()


def test_keys_of_others_in_groups_are_left_alone(remote: Make) -> None:
    p = parameter()
    optimizer = remote([{"params": [p], "name": "head", "note": object()}], "sgd", lr=0.1)
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.param_groups[0]["name"] == "head"


def test_odd_layouts_are_written_in_place(remote: Make) -> None:
    """Transposed, strided, channels last, a scalar, nothing at all, a conjugated gradient."""
    params = [
        torch.nn.Parameter(torch.zeros(3, 4).T),
        torch.nn.Parameter(torch.zeros(8)[::2]),
        torch.nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)),
        torch.nn.Parameter(torch.tensor(0.0)),
        torch.nn.Parameter(torch.zeros(0, 3)),
        torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64)),
    ]
    optimizer = remote(params, "sgd", lr=1.0)
    shapes = [(p.shape, p.stride(), p.data_ptr()) for p in params]
    grads = [torch.arange(p.numel(), dtype=torch.float32).reshape(p.shape) for p in params[:5]]
    for p, grad in zip(params, grads, strict=False):
        p.grad = grad.clone()
    params[5].grad = torch.tensor([1 + 2j, 3j]).conj()
    optimizer.step()
    assert [(p.shape, p.stride(), p.data_ptr()) for p in params] == shapes
    for p, grad in zip(params, grads, strict=False):
        assert torch.equal(p, -grad)
    assert torch.equal(params[5], -torch.tensor([1 - 2j, -3j]))


def test_one_tensor_that_is_given_twice_is_one_leaf(remote: Make) -> None:
    p = parameter()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = remote([p, p], "sgd", lr=1.0)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p, -torch.ones(3))
    assert len(optimizer.session.info().tree.leaves) == 1


def test_tied_parameters_of_a_module_are_one_leaf(remote: Make) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    optimizer = remote(model.named_parameters(), "sgd", lr=0.1)
    twin = torch.nn.Parameter(model[0].weight.detach().clone())
    model(torch.ones(1, 3)).sum().backward()
    twin.grad = model[0].weight.grad.clone()
    torch.optim.SGD([twin], lr=0.1).step()
    optimizer.step()
    torch.testing.assert_close(model[1].weight, twin)


def test_a_parameter_that_changed_its_type_is_refused(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "sgd")
    training.backward(model)
    optimizer.step()
    model.double()
    training.backward(model)
    with pytest.raises(optwire.TreeMismatchError):
        optimizer.step()


def test_parameters_that_moved_to_other_memory_are_still_those(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "sgd", lr=0.0, allow_zero=True)
    training.backward(model)
    optimizer.step()
    model[0].bias.data = torch.full((8,), 3.0)
    optimizer.step()
    assert (optimizer.session.params()["0.bias"] == 3.0).all()


def test_a_server_that_is_not_there_is_an_error_and_nothing_is_lost(remote: Make) -> None:
    model = training.network()
    optimizer = RemoteOptimizer(model.named_parameters(), "sgd", target="127.0.0.1:1", timeout=0.3)
    training.backward(model)
    before = training.values(model)
    with pytest.raises(ConnectionError):
        optimizer.step()
    assert training.equal(before, training.values(model))
    optimizer.close()


def test_a_bad_group_leaves_the_optimizer_as_it_was(remote: Make) -> None:
    model = training.network()
    params = list(model.named_parameters())
    optimizer = remote(params[:2], "adamw")
    training.backward(model)
    optimizer.step()
    for bad in ({"params": params[2:], "lr": -1.0}, {"params": [("x", torch.zeros(3, dtype=torch.int8))]}):
        with pytest.raises(ValueError):
            optimizer.add_param_group(bad)
    assert len(optimizer.param_groups) == 1
    optimizer.step()
    assert optimizer.last_reply.step == 2


def test_a_model_converted_before_the_first_step_has_masters_and_after_it_is_an_error(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "sgd", lr=1e-4)
    model.bfloat16()
    training.backward(model)
    optimizer.step()
    assert optimizer.session.state().arrays["params/0.weight"].dtype == "float32"
    model.float()
    training.backward(model)
    with pytest.raises(optwire.TreeMismatchError, match=r"parameter '0\.weight' is of torch\.float32 now"):
        optimizer.step()


def test_complex_parameters_beside_16_bits_and_in_groups(remote: Make) -> None:
    params = [parameter(dtype=dtype) for dtype in (torch.complex64, torch.bfloat16, torch.float32)]
    optimizer = remote([{"params": params[:2]}, {"params": params[2:], "lr": 2.0}], "sgd", lr=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [p[0].item() for p in params] == [-1, -1, -2]


def test_parameters_without_shape_or_values_are_named(remote: Make) -> None:
    with pytest.raises(optwire.TreeError, match="parameter 'weight' of a lazy module has no shape"):
        remote(torch.nn.LazyLinear(3).named_parameters(), "sgd")
    model = torch.nn.Linear(2, 2, device="meta")
    optimizer = remote(model.named_parameters(), "sgd")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(optwire.TreeError, match="parameter 'weight' is on the meta device"):
        optimizer.step()


def test_a_number_beyond_all_floats_is_refused(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "sgd", lr=0.1)
    training.backward(model)
    optimizer.param_groups[0]["lr"] = 10**400
    with pytest.raises(optwire.InvalidArgumentError, match="expected a number"):
        optimizer.step()


def test_rprop_leaves_alone_what_has_no_number_for_a_gradient(remote: Make) -> None:
    ours, theirs = parameter(), parameter()
    optimizer, local = remote([ours], "rprop", lr=0.1), torch.optim.Rprop([theirs], lr=0.1)
    for bad in (1.0, float("nan"), 1.0, 1.0):
        for p in (ours, theirs):
            p.grad = torch.tensor([1.0, bad, -bad])
        optimizer.step()
        local.step()
        torch.testing.assert_close(ours, theirs)


def test_what_a_scaler_said_is_gone_after_a_step_that_raised(remote: Make) -> None:
    model = training.network()
    optimizer = remote(model.named_parameters(), "sgd", lr=0.1, amp="server")
    training.backward(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.zeros(1))
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises((ValueError, TypeError)):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
