"""Torch's optimizers on the server against torch itself: the same gradients, 200 steps, every setting.

The promise: "exact to 1e-6 relative in float32". In float64 to 1e-12.
"""

from __future__ import annotations

import dataclasses
import fractions
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from optwire import optimizers as opt
from optwire_proto import checks, errors, trees
from optwire_server.engine import build, cache, held, landing, program, rates
from optwire_server.optimizers import formulas, torch_rules

# Not among the developer's tools of pyproject.toml, as it is large; the Makefile installs the build for CPUs alone.
torch = pytest.importorskip("torch", reason="torch is an optional test dependency; `make test` installs it")

STEPS = 200
BOUND_32 = 1e-6
BOUND_64 = 1e-12

# A matrix, a vector, a scalar, and one without elements; in the order of the tree.
SHAPES = {"a": (5, 3), "b": (7,), "c": (), "d": (0, 3)}
# What torch gives as a pair.
PAIRS = {"betas": ("beta1", "beta2"), "etas": ("eta_minus", "eta_plus"), "step_sizes": ("step_min", "step_max")}


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """An optimizer of torch.

    Attributes:
      name: in ``torch.optim``.
      arguments: of torch's constructor.
    """

    name: str
    arguments: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"

    @property
    def spec(self) -> opt.Spec:
        """The same by our names."""
        made: opt.Spec = getattr(opt, f"torch_{self.name.lower()}")(**ours(self.arguments))
        return made

    def optimizer(self, params: Any) -> Any:
        return getattr(torch.optim, self.name)(params, **self.arguments)


def ours(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Torch's arguments by our names."""
    named: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in PAIRS:
            named.update(zip(PAIRS[name], value, strict=True))
        else:
            named["learning_rate" if name == "lr" else name] = value
    return named


CASES = (
    *(Case(name, {}) for name in ("SGD", "AdamW", "Rprop", "ASGD")),
    Case("SGD", {"lr": 0.1}),
    Case("SGD", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    Case("SGD", {"lr": 0.05, "momentum": 0.9}),
    Case("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    Case("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    Case("Adam", {"lr": 0.01}),
    Case("Adam", {"lr": 0.01, "betas": (0.5, 0.75), "weight_decay": 0.1}),
    Case("Adam", {"lr": 0.01, "betas": (0.0, 0.0), "eps": 1e-3}),
    Case("Adam", {"lr": 0.01, "betas": (0.95, 0.9999), "amsgrad": True, "maximize": True}),
    Case("Adam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    Case("AdamW", {"lr": 0.01}),
    Case("AdamW", {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1, "amsgrad": True}),
    Case("AdamW", {"lr": 0.01, "weight_decay": 0.0, "maximize": True}),
    Case("NAdam", {"lr": 0.01}),
    Case("NAdam", {"lr": 0.01, "betas": (0.8, 0.99), "momentum_decay": 0.5, "weight_decay": 0.1}),
    Case("NAdam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}),
    Case("RAdam", {"lr": 0.01}),
    Case("RAdam", {"lr": 0.01, "betas": (0.5, 0.75), "eps": 1e-3}),
    Case("RAdam", {"lr": 0.01, "betas": (0.9, 0.9999), "weight_decay": 0.1}),
    Case("RAdam", {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "decoupled_weight_decay": True}),
    Case("RAdam", {"lr": 0.01, "maximize": True}),
    Case("Adamax", {"lr": 0.01}),
    Case("Adamax", {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1, "maximize": True}),
    Case("Adadelta", {"lr": 1.0}),
    Case("Adadelta", {"lr": 0.5, "rho": 0.95, "eps": 1e-4, "weight_decay": 0.1, "maximize": True}),
    Case("Adagrad", {"lr": 0.1}),
    Case("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1, "weight_decay": 0.1}),
    Case("Adagrad", {"lr": 0.1, "eps": 1e-3, "maximize": True}),
    Case("RMSprop", {"lr": 0.01}),
    Case("RMSprop", {"lr": 0.01, "alpha": 0.9, "momentum": 0.9, "weight_decay": 0.1}),
    Case("RMSprop", {"lr": 0.01, "alpha": 0.9, "momentum": 0.9, "centered": True, "eps": 1e-3}),
    Case("RMSprop", {"lr": 0.01, "alpha": 0.999, "centered": True, "maximize": True, "eps": 1e-3}),
    Case("Rprop", {"lr": 0.01}),
    Case("Rprop", {"lr": 0.01, "etas": (0.3, 1.5), "step_sizes": (1e-3, 0.1), "maximize": True}),
    Case("ASGD", {"lr": 0.1}),
    Case("ASGD", {"lr": 0.1, "lambd": 0.01, "alpha": 0.5, "t0": 50.0, "weight_decay": 0.1, "maximize": True}),
)


def arrays(dtype: Any, *, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    made = []
    for shape in SHAPES.values():
        array = rng.standard_normal(shape)
        if np.issubdtype(dtype, np.complexfloating):
            array = array + 1j * rng.standard_normal(shape)
        made.append(np.asarray(array, dtype))
    return made


class Run:
    """A spec on the server's engine, without a server."""

    def __init__(self, spec: opt.Spec, params: Sequence[np.ndarray], names: Sequence[str] = tuple(SHAPES)) -> None:
        self.cache = cache.ProgramCache(jax.devices()[0])
        self.tree = trees.flatten(dict(zip(names, params, strict=True))).spec
        self.spec = checks.check(spec, known=build.CATALOGUE)
        self.program = self.cache.get(self.spec, self.tree)
        self.held = held.Held(self.program)
        self.held.fill(self._landed(params), self.rates, 0)
        self.pushes = 0

    @property
    def rates(self) -> tuple[float, ...]:
        return tuple(rates.rates(self.spec).values())

    def change(self, **arguments: float) -> None:
        """Other numbers, the same program."""
        self.spec = checks.check(self.spec.replace(**arguments), known=build.CATALOGUE)
        assert self.cache.get(rates.with_slots(self.spec, self.program.spec), self.tree) is self.program

    def push(self, grads: Sequence[np.ndarray], present: Sequence[bool] | None = None) -> list[np.ndarray]:
        variant = program.Variant(absent=present is not None)
        self.program.prepare(variant)
        mask = None if present is None else tuple(present)
        operands = program.Operands(self.rates, self.pushes, present=mask)
        for _ in self.held.update(variant, operands, self._landed(grads), None):
            pass
        self.pushes += 1
        return self.params()

    def params(self) -> list[np.ndarray]:
        out = np.zeros(self.program.layout.nbytes, np.uint8)
        list(self.held.write_params(out))
        return list(landing.Landing.filled(out, self.tree, self.program.layout).arrays())

    @property
    def state(self) -> dict[str, np.ndarray]:
        """Every array of the state by name."""
        specs = self.program.arrays([leaf.name for leaf in self.tree.leaves])
        return {
            leaf.name: np.array(self.held.array(position)).reshape(leaf.shape) for position, leaf in enumerate(specs)
        }

    def _landed(self, leaves: Sequence[np.ndarray]) -> np.ndarray:
        lent = landing.Landings(bytes_max=1 << 30, keep_bytes=0).land(self.tree, self.program.layout)
        for target, leaf in zip(lent.arrays(), leaves, strict=True):
            target[...] = leaf
        return lent.memory


def of_torch(optimizer: Any, params: Sequence[Any], grads: Sequence[np.ndarray]) -> list[np.ndarray]:
    """One step of torch: parameters afterwards."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = torch.from_numpy(grad.copy())
    optimizer.step()
    return [param.detach().numpy().copy() for param in params]


def drift(
    case: Case, dtype: Any, change: Callable[[int], Mapping[str, Any]] | None = None, steps: int = STEPS
) -> float:
    """The largest difference in a parameter array, over the largest magnitude that it has had: a scalar may cross 0."""
    start = arrays(dtype, seed=0)
    params = [torch.nn.Parameter(torch.from_numpy(array.copy())) for array in start]
    theirs, run = case.optimizer(params), Run(case.spec, start)
    worst, largest = 0.0, [float(np.abs(array).max(initial=0.0)) for array in start]
    for step in range(steps):
        if change is not None:
            theirs.param_groups[0].update(change(step))
            run.change(**ours(change(step)))
        grads = arrays(dtype, seed=step + 1)
        expected = of_torch(theirs, params, grads)
        largest = [max(most, float(np.abs(b).max(initial=0.0))) for most, b in zip(largest, expected, strict=True)]
        triples = zip(run.push(grads), expected, largest, strict=True)
        worst = max(worst, *(float(np.abs(a - b).max()) / most for a, b, most in triples if b.size))
    return worst


@pytest.fixture
def wide() -> Iterator[None]:
    """Torch keeps the counts and products of its own in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_hundred_gradients_of_32_bits_move_parameters_as_in_torch(case: Case) -> None:
    assert drift(case, np.float32) <= BOUND_32


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_hundred_gradients_of_64_bits_move_parameters_as_in_torch(case: Case) -> None:
    assert drift(case, np.float64) <= BOUND_64


# What a OneCycleLR or CyclicLR does at each step, and more.
CHANGING: Mapping[str, Callable[[int], Mapping[str, Any]]] = {
    "SGD": lambda k: {"lr": 0.1 / (1 + k), "momentum": 0.95 - 0.001 * k, "weight_decay": 0.01 * (k % 3)},
    "Adam": lambda k: {"lr": 0.01 / (1 + k), "betas": (0.95 - 0.001 * k, 0.999 - 0.0001 * k), "weight_decay": 0.1},
    "AdamW": lambda k: {"lr": 0.02 * (1 + k % 5), "betas": (0.85 + 0.0005 * k, 0.99), "eps": 1e-8 * (1 + k)},
    "NAdam": lambda k: {"lr": 0.01 / (1 + k), "betas": (0.95 - 0.001 * k, 0.999), "momentum_decay": 0.004 * (1 + k)},
    "RAdam": lambda k: {"lr": 0.01 / (1 + k), "betas": (0.95 - 0.001 * k, 0.999 - 0.0001 * k)},
    "Adamax": lambda k: {"lr": 0.01 / (1 + k), "betas": (0.95 - 0.001 * k, 0.999 - 0.0001 * k)},
    "Adadelta": lambda k: {"lr": 1.0 / (1 + k), "rho": 0.9 + 0.0001 * k},
    "Adagrad": lambda k: {"lr": 0.1 / (1 + k), "lr_decay": 0.01 * k},
    "RMSprop": lambda k: {"lr": 0.01 / (1 + k), "alpha": 0.99 - 0.0001 * k, "momentum": 0.95 - 0.001 * k},
    "Rprop": lambda k: {"lr": 1.0 + k, "etas": (0.5 - 0.001 * k, 1.2 + 0.001 * k), "step_sizes": (1e-6, 0.1)},
    "ASGD": lambda k: {"lr": 0.1 / (1 + k), "lambd": 1e-4 * (1 + k), "t0": float(k % 50), "alpha": 0.75},
}


def changing(name: str) -> Case:
    momentum = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    return Case(name, momentum)


@pytest.mark.parametrize("name", CHANGING)
def test_numbers_that_change_at_each_step_are_torchs_and_one_program(name: str) -> None:
    assert drift(changing(name), np.float32, CHANGING[name]) <= BOUND_32


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", CHANGING)
def test_numbers_of_64_bits_that_change_at_each_step_are_torchs(name: str) -> None:
    assert drift(changing(name), np.float64, CHANGING[name]) <= BOUND_64


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_complex_leaves_are_pairs_as_in_torch(case: Case) -> None:
    assert drift(case, np.complex128, steps=50) <= BOUND_64


@pytest.mark.parametrize("name", CHANGING)
def test_complex_leaves_of_32_bits_are_pairs_as_in_torch(name: str) -> None:
    assert drift(changing(name), np.complex64, steps=50) <= BOUND_32


@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_a_momentum_that_becomes_0_leaves_its_buffer_alone_as_in_torch(name: str) -> None:
    def change(step: int) -> Mapping[str, Any]:
        return {"momentum": 0.9 if step % 20 < 10 else 0.0}

    assert drift(Case(name, {"lr": 0.01, "momentum": 0.9}), np.float32, change) <= BOUND_32


@pytest.mark.parametrize("name", ["torch_adam", "torch_adamw", "torch_sgd", "torch_asgd"])
def test_no_weight_decay_does_not_look_at_parameters(name: str) -> None:
    """Zero times infinity would be NaN."""
    start = arrays(np.float32, seed=0)
    start[0][0, 0] = np.inf
    run = Run(getattr(opt, name)(weight_decay=0.0, **({"lambd": 0.0} if name == "torch_asgd" else {})), start)
    moved = run.push(arrays(np.float32, seed=1))
    assert moved[0][0, 0] == np.inf
    assert np.isfinite(moved[0].ravel()[1:]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CHANGING)
def test_16_bits_are_32_rounded_once(name: str, dtype: str) -> None:
    """Of one step: all that is kept is then what 32 bits give, to half a unit in the last place of 16."""
    kind = jax.numpy.dtype(dtype)
    narrow = [array.astype(kind) for array in arrays(np.float32, seed=0)]
    grads = [array.astype(kind) for array in arrays(np.float32, seed=1)]
    moved = Run(changing(name).spec, narrow).push(grads)
    wide = Run(changing(name).spec, [a.astype(np.float32) for a in narrow]).push([g.astype(np.float32) for g in grads])
    for ours, theirs in zip(moved, wide, strict=True):
        assert ours.dtype == kind
        np.testing.assert_array_equal(ours, theirs.astype(kind))


# ---------------------------------------------------------------------------------------------------------------------
# An oracle of our own: torch's documentation in NumPy's 64 bits.


def test_adamw_is_its_documentation() -> None:
    lr, b1, b2, eps, decay = 0.01, 0.9, 0.999, 1e-8, 0.1
    x = arrays(np.float64, seed=0)
    run = Run(opt.torch_adamw(lr, b1, b2, eps, decay), arrays(np.float32, seed=0))
    m, v = [np.zeros_like(leaf) for leaf in x], [np.zeros_like(leaf) for leaf in x]
    for t in range(1, STEPS + 1):
        grads = arrays(np.float32, seed=t)
        for i, g in enumerate(np.asarray(grad, np.float64) for grad in grads):
            x[i] = x[i] - lr * decay * x[i]
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g**2
            m_hat, v_hat = m[i] / (1 - b1**t), v[i] / (1 - b2**t)
            x[i] = x[i] - lr * m_hat / (np.sqrt(v_hat) + eps)
        ours = run.push(grads)
    for mine, exact in zip(ours, x, strict=True):
        np.testing.assert_allclose(mine, exact, rtol=0, atol=2e-5)


def test_sgd_with_nesterovs_momentum_is_its_documentation() -> None:
    lr, mu, decay = 0.05, 0.9, 0.01
    x = arrays(np.float64, seed=0)
    run = Run(opt.torch_sgd(lr, mu, weight_decay=decay, nesterov=True), arrays(np.float64, seed=0))
    b: list[Any] = [None] * len(x)
    for t in range(1, STEPS + 1):
        grads = arrays(np.float64, seed=t)
        for i, g in enumerate(grads):
            g = g + decay * x[i]
            b[i] = g if t == 1 else mu * b[i] + g
            x[i] = x[i] - lr * (g + mu * b[i])
        ours = run.push(grads)
    for mine, exact in zip(ours, x, strict=True):
        np.testing.assert_allclose(mine, exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.999999])
@pytest.mark.parametrize("t", [1, 2, 5, 6, 7, 30, 1000, 2**24 + 1])
def test_what_depends_on_numbers_alone_loses_no_digits_in_32_bits(beta: float, t: int) -> None:
    """Against Python's fractions: 64 bits lose some themselves."""
    number = formulas.Number.of(beta)
    unbiased = 1 - fractions.Fraction(beta) ** t if t < 2000 else fractions.Fraction(1)
    assert abs(float(number.complement) / (1 - beta) - 1) < 1e-7
    if t < 2000 or beta <= 0.99999:
        assert abs(fractions.Fraction(float(number.unbiased(jax.numpy.float32(t)))) / unbiased - 1) < 5e-7
    if not beta or t >= 2000:
        return
    exact = fractions.Fraction(beta)
    length = 2 / (1 - exact) - 1 - 2 * t * exact**t / (1 - exact**t)
    found = torch_rules._length(-number.log, number.complement, jax.numpy.float32(t))
    assert abs(float(found) - float(length)) <= 1e-6 * max(float(length), 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# The state, and what is refused.


@pytest.mark.parametrize(
    ("spec", "scalars", "lists"),
    [
        (opt.torch_sgd(), ["step"], []),
        (opt.torch_sgd(momentum=0.9), ["step"], ["momentum_buffer"]),
        (opt.torch_adam(), ["step"], ["exp_avg", "exp_avg_sq"]),
        (opt.torch_adamw(amsgrad=True), ["step"], ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
        (opt.torch_nadam(), ["step", "mu_product"], ["exp_avg", "exp_avg_sq"]),
        (opt.torch_radam(), ["step"], ["exp_avg", "exp_avg_sq"]),
        (opt.torch_adamax(), ["step"], ["exp_avg", "exp_inf"]),
        (opt.torch_adadelta(), ["step"], ["square_avg", "acc_delta"]),
        (opt.torch_adagrad(), ["step"], ["sum"]),
        (opt.torch_rmsprop(), ["step"], ["square_avg"]),
        (opt.torch_rmsprop(momentum=0.9, centered=True), ["step"], ["square_avg", "momentum_buffer", "grad_avg"]),
        (opt.torch_rprop(), ["step"], ["prev", "step_size"]),
        (opt.torch_asgd(), ["step", "eta", "mu"], ["ax"]),
    ],
    ids=lambda value: value.name if isinstance(value, opt.Spec) else "",
)
def test_slots_are_torchs_by_name(spec: opt.Spec, scalars: list[str], lists: list[str]) -> None:
    state = Run(spec, arrays(np.float32, seed=0)).state
    expected = {f"{slot}/{leaf}": shape for slot in ("params", *lists) for leaf, shape in SHAPES.items()}
    expected |= {f"state/{name}": () for name in scalars}
    assert {name: array.shape for name, array in state.items()} == expected
    assert state["state/step"].dtype == np.int32


def test_first_slots_are_torchs() -> None:
    start = arrays(np.complex64, seed=0)
    assert Run(opt.torch_adagrad(initial_accumulator_value=0.5), start).state["sum/b"][0] == 0.5 + 0.5j
    assert Run(opt.torch_rprop(0.25), start).state["step_size/a"][0, 0] == 0.25 + 0.25j
    assert Run(opt.torch_asgd(0.25), start).state["state/eta"] == 0.25


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("torch_sgd(nesterov=True)", "torch_sgd.momentum"),
        ("torch_sgd(momentum=0.9, dampening=0.1, nesterov=True)", "torch_sgd.dampening"),
        ("torch_adam(beta1=1.0)", "torch_adam.beta1"),
        ("torch_adam(weight_decay=linear_schedule(0.1, 0.0, 10))", "torch_adam.weight_decay"),
        ("torch_rprop(eta_minus=1.0)", "torch_rprop.eta_minus"),
        ("torch_rprop(eta_plus=1.0)", "torch_rprop.eta_plus"),
        ("torch_adadelta(rho=1.5)", "torch_adadelta.rho"),
        ("torch_adamw(lr=0.1)", "torch_adamw.lr"),
    ],
)
def test_what_torch_refuses_is_refused_by_name(text: str, subject: str) -> None:
    with pytest.raises(errors.SpecError) as caught:
        checks.check(opt.parse(text))
    assert caught.value.subject == subject


@pytest.mark.parametrize("name", sorted({case.name for case in CASES}))
def test_defaults_are_torchs(name: str) -> None:
    defaults = getattr(torch.optim, name)([torch.zeros(1)]).defaults
    spec = getattr(opt, f"torch_{name.lower()}")()
    given = {ours_name: value for ours_name, value in ours(defaults).items() if ours_name in dict(spec.arguments)}
    assert given == dict(spec.arguments)
    # What is left of torch's is how it computes, and no argument of the optimizer.
    left = {"foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}
    assert set(ours(defaults)) - set(given) <= left


def test_a_rate_may_be_a_schedule_of_the_updates() -> None:
    start = arrays(np.float32, seed=0)
    run = Run(opt.torch_sgd(opt.table([0.5, 0.25, 0.125])), start)
    expected = [leaf.copy() for leaf in start]
    for step, rate in enumerate([0.5, 0.25, 0.125, 0.125]):
        grads = arrays(np.float32, seed=step)
        expected = [x - np.float32(rate) * g for x, g in zip(expected, grads, strict=True)]
        for ours_, exact in zip(run.push(grads), expected, strict=True):
            np.testing.assert_array_equal(ours_, exact)
