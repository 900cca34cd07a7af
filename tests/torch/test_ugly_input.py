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
    ("overlap", {"overlap": True}, optwire.UnsupportedError, "overlap=True"),
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
