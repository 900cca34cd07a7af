"""Torch's own list of what its optimizers take and refuse, where it can be imported (it wants ``expecttest``).

``torch.testing._internal.common_optimizers`` is in torch's wheel: every set of arguments in it that does not choose one
of torch's implementations is trained with, every bad one is refused by the same type of exception.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is an optional test dependency; `make test` installs it")
pytest.importorskip("expecttest", reason="torch's lists of arguments want it; `make test` installs it")

from tests.torch import training  # noqa: E402

from optwire.torch.translation import DEFINITIONS, IMPLEMENTATION  # noqa: E402

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def listed() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's test tools have their own
        from torch.testing._internal import common_optimizers
    return {info.optim_cls.__name__.lower(): info for info in common_optimizers.optim_db}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_every_set_of_arguments_gives_torchs_parameters(remote: Make, listed: dict[str, Any], name: str) -> None:
    info = listed[name]
    for sample in info.optim_inputs_func(device="cpu"):
        arguments = {key: value for key, value in sample.kwargs.items() if key not in IMPLEMENTATION}
        model, twin = training.network(), training.network()
        local = info.optim_cls(twin.parameters(), **arguments)
        optimizer = remote(model.named_parameters(), name, **arguments)
        assert training.follow(local, twin, optimizer, model, range(5)) <= training.RELATIVE, sample.desc


@pytest.mark.parametrize("name", DEFINITIONS)
def test_every_bad_argument_is_refused_as_torch_does(remote: Make, listed: dict[str, Any], name: str) -> None:
    info = listed[name]
    for bad in info.optim_error_inputs_func("cpu", torch.float32):
        sample = bad.optimizer_error_input if hasattr(bad, "optimizer_error_input") else bad.optim_error_input
        if any(sample.kwargs.get(flag) for flag in IMPLEMENTATION):
            continue
        params = [torch.zeros(3, requires_grad=True)] if sample.params is None else sample.params
        with pytest.raises(bad.error_type, match=bad.error_regex):
            remote(params, name, **sample.kwargs)
