"""Specs that do what optimizers of ``torch.optim`` do, and where the two differ by definition.

The promise: "≤ 1e-6 relative where the formulas agree; where torch and optax differ by definition, say where".
``docs/torch.md`` is the table for people; a test here holds it to the cases.

A small network is trained for 200 steps. In float64 both sides follow their own parameters, as in real training; and
both get the gradients of torch's run, so that the optimizer is compared and not the network. In float32 only that: the
rounding of one step changes the gradients of the next.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optwire

# Not among the developer's tools of pyproject.toml, as it is large; the Makefile installs the build for CPUs alone.
torch = pytest.importorskip("torch", reason="torch is an optional test dependency; `make test` installs it")

STEPS = 200
RELATIVE = 1e-6
DOCUMENT = Path(__file__).parents[2] / "docs" / "torch.md"


# Torch takes ``1 - b2**t`` in Python's 64 bits, optax in 32: of 0.001, at the first step, four digits are right. The
# rectification of RAdam subtracts such numbers. ``master_weights(…, "float64")`` mends both, as do decays like 0.75.
CORRECTED_32 = 2e-5
RECTIFIED_32 = 5e-4


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """An optimizer of torch and a spec.

    Attributes:
      name: in ``torch.optim``.
      arguments: of torch's constructor.
      spec: as text.
      bound_32: of the relative difference in float32.
      is_chaotic: whether training with it blows up the last bit of the first step.
    """

    name: str
    arguments: Mapping[str, Any]
    spec: str
    bound_32: float = RELATIVE
    is_chaotic: bool = False

    @property
    def call(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"

    def optimizer(self, params: Any) -> Any:
        return getattr(torch.optim, self.name)(params, **self.arguments)


EQUAL = (
    Case("SGD", {"lr": 0.1}, "optax.sgd(0.1)"),
    Case("SGD", {"lr": 0.05, "momentum": 0.9}, "optax.sgd(0.05, momentum=0.9)"),
    Case("SGD", {"lr": 0.05, "momentum": 0.9}, "momentum(0.05, 0.9)"),
    Case("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}, "optax.sgd(0.05, momentum=0.9, nesterov=True)"),
    Case(
        "SGD",
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        "chain(add_decayed_weights(0.01), optax.sgd(0.05, momentum=0.9, nesterov=True))",
    ),
    Case("Adam", {"lr": 0.01}, "optax.adam(0.01)", CORRECTED_32),
    Case("Adam", {"lr": 0.01, "betas": (0.5, 0.75)}, "optax.adam(0.01, b1=0.5, b2=0.75)", is_chaotic=True),
    Case("Adam", {"lr": 0.01}, "master_weights(optax.adam(0.01), 'float64')"),
    Case("Adam", {"lr": 0.01, "weight_decay": 0.1}, "chain(add_decayed_weights(0.1), optax.adam(0.01))", CORRECTED_32),
    Case("AdamW", {"lr": 0.01}, "adamw(0.01, weight_decay=0.01)", CORRECTED_32),
    Case(
        "AdamW",
        {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1},
        "adamw(0.01, b1=0.8, b2=0.99, weight_decay=0.1)",
        CORRECTED_32,
    ),
    Case("RMSprop", {"lr": 0.01}, "optax.rmsprop(0.01, decay=0.99, eps_in_sqrt=False)"),
    Case(
        "RMSprop",
        {"lr": 0.01, "weight_decay": 0.1},
        "chain(add_decayed_weights(0.1), optax.rmsprop(0.01, decay=0.99, eps_in_sqrt=False))",
    ),
    Case(
        "RMSprop",
        {"lr": 0.01, "alpha": 0.9, "momentum": 0.9, "centered": True},
        "optax.rmsprop(0.01, decay=0.9, eps_in_sqrt=False, momentum=0.9, centered=True)",
        is_chaotic=True,
    ),
    Case("Adagrad", {"lr": 0.1, "eps": 0.0}, "optax.adagrad(0.1, initial_accumulator_value=0.0, eps=0.0)"),
    Case(
        "Adagrad",
        {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1, "eps": 0.0},
        "optax.adagrad(inverse_time_decay(0.1, 1, 0.1), initial_accumulator_value=0.1, eps=0.0)",
    ),
    Case("Adamax", {"lr": 0.01}, "optax.adamax(0.01)"),
    Case("Adamax", {"lr": 0.01, "weight_decay": 0.1}, "chain(add_decayed_weights(0.1), optax.adamax(0.01))"),
    Case("NAdam", {"lr": 0.01, "momentum_decay": 1e6}, "nadam(0.01)", CORRECTED_32),
    Case(
        "NAdam",
        {"lr": 0.01, "momentum_decay": 1e6, "weight_decay": 0.1, "decoupled_weight_decay": True},
        "nadamw(0.01, weight_decay=0.1)",
        CORRECTED_32,
    ),
    Case("RAdam", {"lr": 0.01, "eps": 0.0}, "radam(0.01, eps=0.0)", RECTIFIED_32),
    Case(
        "RAdam",
        {"lr": 0.01, "eps": 0.0, "betas": (0.5, 0.75)},
        "radam(0.01, eps=0.0, b1=0.5, b2=0.75)",
        is_chaotic=True,
    ),
    Case(
        "RAdam",
        {"lr": 0.01, "eps": 0.0, "weight_decay": 0.1},
        "chain(add_decayed_weights(0.1), radam(0.01, eps=0.0))",
        RECTIFIED_32,
    ),
)
# What one would write first, and what torch does not do.
DIFFERENT = (
    Case("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}, "optax.sgd(0.05, momentum=0.9)"),
    Case("Adam", {"lr": 0.01, "weight_decay": 0.1}, "adamw(0.01, weight_decay=0.1)"),
    Case("Adam", {"lr": 0.01, "amsgrad": True}, "amsgrad(0.01)"),
    Case("AdamW", {"lr": 0.01}, "adamw(0.01)"),
    Case("RMSprop", {"lr": 0.01}, "optax.rmsprop(0.01)"),
    Case("RMSprop", {"lr": 0.01, "eps": 1e-3}, "optax.rmsprop(0.01, decay=0.99, eps=0.001)"),
    Case("Adagrad", {"lr": 0.1}, "optax.adagrad(0.1)"),
    Case("Adagrad", {"lr": 0.1, "eps": 1e-3}, "optax.adagrad(0.1, initial_accumulator_value=0.0, eps=0.001)"),
    Case("NAdam", {"lr": 0.01}, "nadam(0.01)"),
    Case("RAdam", {"lr": 0.01, "eps": 1e-3}, "radam(0.01, eps=0.001)"),
)


def network(dtype: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A small network, and its loss on fixed data."""
    torch.manual_seed(3)
    layers = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).to(dtype)
    inputs, targets = torch.randn(64, 6, dtype=dtype), torch.randn(64, 3, dtype=dtype)
    return layers, lambda model: torch.nn.functional.mse_loss(model(inputs), targets)


def gradients(model: Any, loss: Callable[[Any], Any]) -> dict[str, np.ndarray]:
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def parameters(model: Any) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def training(case: Case, dtype: Any) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Torch's run: the gradients of each step, and the parameters after it."""
    model, loss = network(dtype)
    optimizer = case.optimizer(model.parameters())
    for _ in range(STEPS):
        grads = gradients(model, loss)
        optimizer.step()
        yield grads, parameters(model)


def drift(client: optwire.Client, case: Case, dtype: Any, *, follows_itself: bool) -> float:
    """The largest difference in a parameter array over the largest magnitude in it, of all steps."""
    model, loss = network(dtype)
    ours = copy.deepcopy(model)
    worst = 0.0
    with client.create_session(parameters(model), case.spec) as session:
        for grads, expected in training(case, dtype):
            remote = session.step(gradients(ours, loss) if follows_itself else grads)
            with torch.no_grad():
                for name, p in ours.named_parameters():
                    p.copy_(torch.from_numpy(remote[name]))
            worst = max(worst, *(float(np.abs(remote[n] - p).max() / np.abs(p).max()) for n, p in expected.items()))
    client.delete_session(session.name)
    return worst


@pytest.fixture
def wide() -> Iterator[None]:
    """Torch keeps the counts and products of its own in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def named(case: Case) -> str:
    return f"{case.call} as {case.spec}"


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("case", [case for case in EQUAL if not case.is_chaotic], ids=named)
def test_two_hundred_steps_of_training_are_torchs(client: optwire.Client, case: Case) -> None:
    assert drift(client, case, torch.float64, follows_itself=True) <= RELATIVE


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("case", EQUAL, ids=named)
def test_two_hundred_gradients_of_64_bits_move_parameters_as_in_torch(client: optwire.Client, case: Case) -> None:
    assert drift(client, case, torch.float64, follows_itself=False) <= 1e-12


@pytest.mark.parametrize("case", EQUAL, ids=named)
def test_two_hundred_gradients_of_32_bits_move_parameters_as_in_torch(client: optwire.Client, case: Case) -> None:
    assert drift(client, case, torch.float32, follows_itself=False) <= case.bound_32


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("case", DIFFERENT, ids=named)
def test_what_differs_by_definition_differs(client: optwire.Client, case: Case) -> None:
    """Where one of these fails, torch or optax has changed, and ``docs/torch.md`` with it."""
    assert drift(client, case, torch.float64, follows_itself=False) > 1000 * RELATIVE


@pytest.mark.parametrize("case", [*EQUAL, *DIFFERENT], ids=named)
def test_the_document_has_every_case(case: Case) -> None:
    rows = DOCUMENT.read_text(encoding="utf-8").splitlines()
    assert any(f"`{case.call}`" in row and f"`{case.spec}`" in row for row in rows)
