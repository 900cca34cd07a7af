"""Every entry of the catalogue: remote steps against the same optimizer run here; what is not served says why.

The promise: "100 remote steps against the same chain run locally in optax, on a tree with matrices, vectors, scalars
and convolution kernels, f32 and bf16: ≤ 2 ulp per step drift for ELEMENT, and exact where the executable is the same."

Here the update is compiled with every hyperparameter as a constant; the server's has its learning rates as operands, so
that XLA folds and rounds them at different places. ``catalogue_drift`` says how differences are measured.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from tests.e2e import catalogue_drift, catalogue_samples, catalogue_table

import optwire
from optwire import optax as remote
from optwire import optimizers as opt
from optwire_proto import catalogue
from optwire_server import testing
from optwire_server.engine import build

# Torch's are held to torch itself, in tests/server/test_torch_rules.py, outer ones to papers in test_outer_rules.py.
ELSEWHERE = {entry.name for entry in (*catalogue.TORCH, *catalogue.OUTER)}
ENTRIES = sorted(
    name
    for name, entry in build.CATALOGUE.items()
    if entry.kind != "schedule" and not entry.refusal and name not in ELSEWHERE
)
REFUSED = sorted(name for name, entry in build.CATALOGUE.items() if entry.refusal)

# What is further from optax than RELATIVE, and why: (entry, element type) -> (bound, reason).
FURTHER = {
    ("fromage", "float32"): (
        3e-6,
        "it decays parameters by 1 / sqrt(1 + rate**2) - 1, which loses most digits in float32, and so for an operand; "
        "Python works the constant out in 64 bits",
    )
}


@pytest.fixture(scope="module")
def trusting() -> Iterator[optwire.Client]:
    """A client of a server that takes programs."""
    with testing.serve(allow_programs=True) as serving, optwire.connect(serving.target) as client:
        yield client


# In 16 bits every third: the whole list takes minutes more. All of them are measured by `make catalogue-docs`.
@pytest.mark.parametrize(
    ("entry", "dtype"),
    [(entry, dtype) for dtype in catalogue_samples.DTYPES for entry in ENTRIES[:: 1 if dtype == "float32" else 3]],
)
def test_a_hundred_remote_steps_are_those_of_optax_run_here(trusting: optwire.Client, entry: str, dtype: str) -> None:
    drift = catalogue_drift.measure(trusting, entry, dtype)
    bound, _ = FURTHER.get((entry, dtype), (catalogue_drift.RELATIVE[dtype], ""))
    if drift.granularity == "element":
        assert drift.ulps_per_step <= catalogue_drift.ULPS_PER_STEP
    else:  # what mixes a leaf's elements is rounded as the largest of them
        assert drift.relative <= bound
    for which, relative in drift.views.items():
        assert relative <= bound, which


# Entries that differ by rounding where their rates are constants here: optax's transformation of a rate, and the rate.
OPERANDS: dict[str, tuple[Callable[[Any], Any], float]] = {
    "adafactor": (
        lambda rate: optax.adafactor(
            lambda count: rate, min_dim_size_to_factor=4, momentum=0.9, weight_decay_rate=1e-3
        ),
        0.01,
    ),
    "dowg": (
        lambda rate: optax.contrib.dowg(lambda count: rate, weight_decay=0.01, mask=catalogue_samples.KERNELS),
        1.0,
    ),
    "fromage": (lambda rate: optax.fromage(lambda count: rate), 0.01),
    "momo": (lambda rate: optax.contrib.momo(lambda count: rate, weight_decay=0.01, adapt_lower_bound=True), 0.5),
    "reduce_on_plateau": (
        lambda rate: optax.chain(
            optax.adam(lambda count: rate), optax.contrib.reduce_on_plateau(factor=0.5, patience=5)
        ),
        0.01,
    ),
    "zero_nans": (lambda rate: optax.chain(optax.zero_nans(), optax.scale(rate)), -0.1),
}


@pytest.mark.parametrize("entry", OPERANDS)
def test_the_bits_are_optaxs_where_the_rate_is_an_operand_here_too(trusting: optwire.Client, entry: str) -> None:
    sample = catalogue_samples.sample(entry, "float32")
    make, rate = OPERANDS[entry]
    params, grads, losses = catalogue_samples.arrays("float32")

    @jax.jit
    def update(rate: Any, grads: Any, params: Any, state: Any, loss: Any) -> Any:
        extras = {"value": loss} if sample.wants_loss else {}
        updates, state = make(rate).update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state

    local, state = params, make(rate).init(params)
    with trusting.create_session(params, sample.spec) as session:
        for step in range(catalogue_samples.STEPS):
            pushed = grads[step]
            if sample.has_nans and step in catalogue_samples.NAN_STEPS:
                pushed = catalogue_samples.with_nan(pushed)
            local, state = update(rate, pushed, local, state, losses[step])
            there = session.step(pushed, loss=losses[step] if sample.wants_loss else None)
    trusting.delete_session(session.name)
    if entry == "reduce_on_plateau":  # in a block XLA adds its product to the parameter in one operation, or in two
        for ours, theirs in zip(jax.tree.leaves(there), jax.tree.leaves(local), strict=True):
            np.testing.assert_array_max_ulp(ours, np.asarray(theirs), maxulp=2 * catalogue_samples.STEPS)
    else:
        assert_same_bits(there, local)


def test_every_entry_that_is_served_has_a_sample() -> None:
    assert catalogue_samples.entries() == set(ENTRIES)


def test_complex_parameters_go_through_optax_as_pairs_of_real_ones(trusting: optwire.Client) -> None:
    rng = np.random.default_rng(4)
    params, *grads = (
        {"w": (rng.standard_normal((4, 3)) + 1j * rng.standard_normal((4, 3))).astype(np.complex64)} for _ in range(11)
    )
    made = optax.contrib.split_real_and_imaginary(optax.adam(0.01))
    oracle = catalogue_samples.of_optax(made)
    update, state = jax.jit(oracle.update), oracle.init(params)
    with trusting.create_session(params, remote.split_real_and_imaginary(remote.adam(0.01))) as session:
        for step, pushed in enumerate(grads):
            state = update(step, pushed, state, 0.0)
            there = session.step(pushed)
    trusting.delete_session(session.name)
    assert_same_bits(there, oracle.params(state))


@pytest.mark.parametrize(
    ("spec", "local"),
    [
        (remote.schedule_free_sgd(0.1), optax.contrib.schedule_free_sgd(0.1)),
        (remote.schedule_free_adamw(0.01), optax.contrib.schedule_free_adamw(0.01)),
    ],
    ids=["schedule_free_sgd", "schedule_free_adamw"],
)
def test_which_eval_reads_what_optax_evaluates_schedule_free_optimizers_by(
    trusting: optwire.Client, spec: opt.Spec, local: Any
) -> None:
    params, grads, _ = catalogue_samples.arrays("float32")
    oracle = catalogue_samples.of_optax(local)
    update, state = jax.jit(oracle.update), oracle.init(params)
    with trusting.create_session(params, spec) as session:
        for step, pushed in enumerate(grads[:20]):
            state = update(step, pushed, state, 0.0)
            session.step(pushed)
        read = session.params(which="eval")
    trusting.delete_session(session.name)
    expected = optax.contrib.schedule_free_eval_params(state[1], state[0])
    for ours, theirs in zip(jax.tree.leaves(read), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_master_weights_of_64_bits_keep_what_32_bits_would_lose(trusting: optwire.Client, dtype: Any) -> None:
    spec = opt.master_weights(remote.sgd(1e-9), "float64")
    with trusting.create_session({"w": np.ones(3, dtype)}, spec) as session:
        for _ in range(200):
            params = session.step({"w": np.ones(3, dtype)})
    trusting.delete_session(session.name)
    assert params["w"].dtype == dtype
    np.testing.assert_allclose(params["w"], dtype(1 - 2e-7), rtol=1e-14)


# ------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("entry", REFUSED)
def test_what_is_not_served_says_why(client: optwire.Client, entry: str) -> None:
    reason = build.CATALOGUE[entry].refusal
    with pytest.raises(optwire.UnsupportedError) as described:
        client.create_session({"w": np.ones(3, np.float32)}, opt.Spec(entry))
    assert reason in str(described.value)
    if entry == "optax.chain":
        return  # in the text and as a constructor it means optwire's own, which takes the same members
    with pytest.raises(optwire.UnsupportedError) as written:
        client.create_session({"w": np.ones(3, np.float32)}, f"{entry}()")
    assert reason in str(written.value)
    with pytest.raises(optwire.UnsupportedError) as constructed:
        getattr(remote, entry.removeprefix("optax."))()
    assert reason in str(constructed.value)


# ------------------------------------------------------------------------------------------------------ complete


def test_the_document_lists_what_there_is() -> None:
    """Names and signatures; the figures beside them are of one machine. ``make catalogue-docs`` writes it anew."""
    rows = [row for row in catalogue_table.DOCUMENT.read_text(encoding="utf-8").splitlines() if row.startswith("| `")]
    listed = sorted(row.removeprefix("| `").partition("`")[0] for row in rows)
    served = [catalogue_table.signature(entry) for entry in build.CATALOGUE.values() if not entry.refusal]
    assert listed == sorted([*served, *REFUSED])
    for name in REFUSED:
        assert f"| `{name}` | {build.CATALOGUE[name].refusal} |" in rows


# Arguments to try a public name of optax with: each stands in for all that the name demands.
_TRIED = (0.5, 2, optax.identity(), lambda *_: jnp.float32(0.5), "linear", (0.5,), [lambda _: 0.5], {"a": 0.5}, None)
# Types, and a function over states that gives back a number where it is given one.
_NO_MAKERS = {"GradientTransformation", "GradientTransformationExtraArgs", "WrappedSchedule", "tree_map_params"}


def test_whatever_public_name_of_optax_makes_a_transformation_or_schedule_is_in_the_catalogue() -> None:
    """By what the names return when called, not by what their annotations say, as the catalogue is made."""
    found = {}
    for name, maker in sorted({**vars(optax), **vars(optax.contrib)}.items()):
        if callable(maker) and not name.startswith("_") and name not in _NO_MAKERS:
            kind = made_kind(maker)
            if kind:
                found[name] = kind
    kinds = {name.removeprefix("optax."): e.kind for name, e in build.CATALOGUE.items() if e.origin != "optwire"}
    assert found.keys() - kinds.keys() == set()
    assert {name for name in found if (kinds[name] == "schedule") != (found[name] == "schedule")} == set()
    assert len(found) > 120, "most of optax can be called like this"


def made_kind(maker: Any) -> str:
    """What a call of a public name gives, where some stand-in for its arguments gets through; otherwise nothing."""
    try:
        parameters = inspect.signature(maker).parameters.values()
    except (TypeError, ValueError):
        return ""
    demanded = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    for value in _TRIED:
        by_name = {p.name: value for p in demanded if p.kind is p.KEYWORD_ONLY}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = maker(*itertools.repeat(value, len(demanded) - len(by_name)), **by_name)
                if callable(getattr(made, "init", None)) and callable(getattr(made, "update", None)):
                    return "transformation"
                if callable(made) and np.ndim(made(3)) == 0 and np.asarray(made(3)).dtype.kind == "f":
                    return "schedule"
        except Exception:  # noqa: BLE001 - any public function of optax, with arguments that are not its own
            continue
    return ""


def assert_same_bits(there: Any, here: Any) -> None:
    catalogue_drift.assert_alike(there, here)
    for ours, theirs in zip(jax.tree.leaves(there), map(np.asarray, jax.tree.leaves(here)), strict=True):
        assert ours.tobytes() == theirs.tobytes()
