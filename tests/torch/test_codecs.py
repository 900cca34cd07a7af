"""RemoteOptimizer with a codec: fewer bytes go up, and the model learns."""

from __future__ import annotations

import copy

import pytest
import torch

import optwire
from optwire.torch import RemoteOptimizer
from optwire_server import testing


def model_and_loss(codec: str, server: testing.Serving) -> tuple[float, RemoteOptimizer, torch.nn.Module]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    inputs = torch.randn(256, 20)
    wanted = inputs[:, :1] - inputs[:, 1:2] * 0.5
    optimizer = RemoteOptimizer(model.named_parameters(), "sgd", lr=0.1, target=server.target, grads_codec=codec)
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), wanted)
        loss.backward()
        optimizer.step()
    return loss.item(), optimizer, model


@pytest.mark.parametrize("codec", ["int8", "sign"])
def test_a_model_learns_with_a_codec_as_without(server: testing.Serving, codec: str):
    exact, optimizer, _ = model_and_loss("f32", server)
    optimizer.close()
    loss, optimizer, _ = model_and_loss(codec, server)
    assert optimizer.session.info().grads_codec == codec
    assert loss < 1.1 * exact
    optimizer.close()


def test_copies_keep_the_codec(server: testing.Serving):
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = RemoteOptimizer([weight], "sgd", lr=0.1, target=server.target, grads_codec="int8")
    twin = copy.deepcopy(optimizer)
    twin.attach("twin")
    assert twin.session.info().grads_codec == "int8"
    twin.close()


def test_a_session_with_another_codec_than_asked_for_is_an_error_that_names_both(server: testing.Serving):
    def joined(codec: str | None) -> RemoteOptimizer:
        weight = torch.nn.Parameter(torch.ones(3))
        return RemoteOptimizer([weight], "sgd", lr=0.1, target=server.target, session="shared", grads_codec=codec)

    first = joined("int8")
    next(iter(first.param_groups))["params"][0].grad = torch.ones(3)
    first.step()
    for other in ("f32", "top_k(0.01)"):
        with pytest.raises(optwire.InvalidArgumentError) as refused:
            joined(other)
        assert f"'shared' exists with grads_codec='int8', and grads_codec={other!r} was asked for" in str(refused.value)
        assert (refused.value.expected, refused.value.got) == ("'int8'", repr(other))
    for same in ("int8", None):
        optimizer = joined(same)
        assert optimizer.session.info().grads_codec == "int8"
        assert optimizer.session.step_count == 1
        optimizer.close()
    first.close()


def test_a_session_that_was_made_meanwhile_must_have_the_codec_too(server: testing.Serving):
    early, late = (
        RemoteOptimizer(
            [torch.nn.Parameter(torch.ones(3))], "sgd", lr=0.1, target=server.target, session="race", grads_codec=codec
        )
        for codec in ("bf16", "sign")
    )
    for optimizer in (early, late):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    early.step()
    with pytest.raises(optwire.InvalidArgumentError, match=r"grads_codec='bf16', and grads_codec='sign'"):
        late.step()
    early.close()
    late.close()


def test_what_is_no_codec_is_refused_at_once(server: testing.Serving):
    with pytest.raises(optwire.InvalidArgumentError, match="grads_codec"):
        RemoteOptimizer([torch.nn.Parameter(torch.zeros(3))], "sgd", lr=0.1, target=server.target, grads_codec="zip")
