"""Schedules: the learning rates that a server applies are those of the function that the spec names, bit for bit.

The promise: "schedules equal at steps 0, 1, boundaries, 10⁶". The oracles are optax and ``jax.example_libraries``,
called by name here; the server makes its functions from the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.example_libraries import optimizers as seed

import optwire
from optwire_proto import catalogue, checks, spec_text, specs, trees
from optwire_server.engine import build, program, rates

# Text of a schedule, the same made by its library, and the steps at which its formula changes.
SCHEDULES: dict[str, tuple[str, Callable[[], Any], Sequence[int]]] = {
    "constant": ("constant(0.1)", lambda: seed.constant(0.1), ()),
    "exponential_decay": ("exponential_decay(0.1, 10, 0.9)", lambda: seed.exponential_decay(0.1, 10, 0.9), (10,)),
    "inverse_time_decay": (
        "inverse_time_decay(0.1, 10, 0.5, staircase=True)",
        lambda: seed.inverse_time_decay(0.1, 10, 0.5, staircase=True),
        (10, 20),
    ),
    "polynomial_decay": ("polynomial_decay(0.1, 20, 0.01, 2)", lambda: seed.polynomial_decay(0.1, 20, 0.01, 2), (20,)),
    "piecewise_constant": (
        "piecewise_constant([5, 12], [0.1, 0.01, 0.001])",
        lambda: seed.piecewise_constant([5, 12], [0.1, 0.01, 0.001]),
        (5, 12),
    ),
    "table": (
        "table(array([0.1, 0.2, 0.05]))",
        lambda: lambda count: jax.numpy.take(np.float32([0.1, 0.2, 0.05]), jax.numpy.minimum(count, 2)),
        (2,),
    ),
    "constant_schedule": ("constant_schedule(0.1)", lambda: optax.constant_schedule(0.1), ()),
    "cosine_decay_schedule": (
        "cosine_decay_schedule(0.1, 50, alpha=0.05, exponent=1.5)",
        lambda: optax.cosine_decay_schedule(0.1, 50, alpha=0.05, exponent=1.5),
        (50,),
    ),
    "cosine_onecycle_schedule": (
        "cosine_onecycle_schedule(100, 0.1, pct_start=0.25)",
        lambda: optax.cosine_onecycle_schedule(100, 0.1, pct_start=0.25),
        (25, 100),
    ),
    "join_schedules": (
        "join_schedules([linear_schedule(0.0, 0.1, 10), constant_schedule(0.1), cosine_decay_schedule(0.1, 20)], "
        "[10, 30])",
        lambda: optax.join_schedules(
            [optax.linear_schedule(0.0, 0.1, 10), optax.constant_schedule(0.1), optax.cosine_decay_schedule(0.1, 20)],
            [10, 30],
        ),
        (10, 30, 50),
    ),
    "linear_onecycle_schedule": (
        "linear_onecycle_schedule(100, 0.1)",
        lambda: optax.linear_onecycle_schedule(100, 0.1),
        (30, 85, 100),
    ),
    "linear_schedule": (
        "linear_schedule(0.1, 0.01, 20, transition_begin=5)",
        lambda: optax.linear_schedule(0.1, 0.01, 20, transition_begin=5),
        (5, 25),
    ),
    "optax.exponential_decay": (
        "optax.exponential_decay(0.1, 10, 0.5, transition_begin=3, staircase=True, end_value=0.01)",
        lambda: optax.exponential_decay(0.1, 10, 0.5, transition_begin=3, staircase=True, end_value=0.01),
        (3, 13, 33, 43),
    ),
    "piecewise_constant_schedule": (
        "piecewise_constant_schedule(0.1, {5: 0.5, 12: 0.1})",
        lambda: optax.piecewise_constant_schedule(0.1, {5: 0.5, 12: 0.1}),
        (5, 12),
    ),
    "piecewise_interpolate_schedule": (
        "piecewise_interpolate_schedule('cosine', 0.1, {5: 0.5, 12: 0.1})",
        lambda: optax.piecewise_interpolate_schedule("cosine", 0.1, {5: 0.5, 12: 0.1}),
        (5, 12),
    ),
    "polynomial_schedule": (
        "polynomial_schedule(0.1, 0.01, 2, 20, transition_begin=5)",
        lambda: optax.polynomial_schedule(0.1, 0.01, 2, 20, transition_begin=5),
        (5, 25),
    ),
    "sgdr_schedule": (
        "sgdr_schedule([{'init_value': 0.0, 'peak_value': 0.1, 'warmup_steps': 5, 'decay_steps': 20}, "
        "{'init_value': 0.0, 'peak_value': 0.05, 'warmup_steps': 5, 'decay_steps': 30, 'end_value': 0.01}])",
        lambda: optax.sgdr_schedule(
            [
                {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 5, "decay_steps": 20},
                {"init_value": 0.0, "peak_value": 0.05, "warmup_steps": 5, "decay_steps": 30, "end_value": 0.01},
            ]
        ),
        (5, 20, 25, 50),
    ),
    "warmup_constant_schedule": (
        "warmup_constant_schedule(0.0, 0.1, 10)",
        lambda: optax.warmup_constant_schedule(0.0, 0.1, 10),
        (10,),
    ),
    "warmup_cosine_decay_schedule": (
        "warmup_cosine_decay_schedule(0.0, 0.1, 10, 60, end_value=0.001)",
        lambda: optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 60, end_value=0.001),
        (10, 60),
    ),
    "warmup_exponential_decay_schedule": (
        "warmup_exponential_decay_schedule(0.0, 0.1, 10, 20, 0.5, transition_begin=5)",
        lambda: optax.warmup_exponential_decay_schedule(0.0, 0.1, 10, 20, 0.5, transition_begin=5),
        (10, 15, 35),
    ),
}
# A number in other words: an operand of the update, whose value nothing computes.
CONSTANTS = ("constant", "constant_schedule")


def parsed(text: str, kind: str) -> specs.Spec:
    return checks.check(spec_text.parse(text, catalogue.CATALOGUE), kind, known=build.CATALOGUE)


def steps_of(boundaries: Sequence[int]) -> list[int]:
    near = {b + d for b in boundaries for d in (-1, 0, 1)}
    return sorted({0, 1, 10**6, *near})


def test_every_schedule_of_the_catalogue_is_tried() -> None:
    assert {name for name, entry in build.CATALOGUE.items() if entry.kind == "schedule"} == SCHEDULES.keys()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_its_librarys_at_the_first_steps_at_boundaries_and_a_million_steps_on(name: str) -> None:
    text, make, boundaries = SCHEDULES[name]
    ours, theirs = jax.jit(build.schedule(parsed(text, "schedule"))), jax.jit(make())
    for step in steps_of(boundaries):
        served, expected = np.asarray(ours(step)), np.asarray(theirs(step))
        assert served.shape == ()
        assert served.tobytes() == expected.tobytes(), (step, served, expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_program_reports_the_rate_that_its_update_applies(name: str) -> None:
    text, make, boundaries = SCHEDULES[name]
    spec = parsed(f"optax.sgd({text})", "optimizer")
    made = program.Program(spec, trees.flatten({"w": np.zeros((), np.float32)}).spec, jax.devices()[0])
    oracle = jax.jit(make())
    if name in CONSTANTS:
        assert rates.constant_rate(spec) == 0.1
        return
    for step in steps_of(boundaries):
        assert made.learning_rate(step) == float(oracle(step))


def test_a_power_that_is_not_whole_may_end_in_a_rate_that_is_not_a_number_as_it_does_in_optax() -> None:
    """Compiled, ``20 * (1 / 20)`` is above 1, and optax takes a power of the rest; the seed's name does not."""
    text = "polynomial_schedule(0.1, 0.01, 2.5, 20)"
    ours, theirs = build.schedule(parsed(text, "schedule")), optax.polynomial_schedule(0.1, 0.01, 2.5, 20)
    for step in (0, 1, 19, 20, 10**6):
        np.testing.assert_array_equal(jax.jit(ours)(step), jax.jit(theirs)(step))
    held = jax.jit(build.schedule(parsed("polynomial_decay(0.1, 20, 0.01, 2.5)", "schedule")))
    assert float(held(10**6)) == pytest.approx(0.01)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_sessions_steps_apply_and_report_the_schedule(client: optwire.Client, name: str) -> None:
    """With gradients of -1, what SGD adds is the rate itself."""
    text, make, _ = SCHEDULES[name]
    oracle = jax.jit(make())
    with client.create_session(np.float32(0), f"optax.sgd({text})") as session:
        at = np.float32(0)
        for step in range(15):
            rate = np.float32(oracle(step))
            assert np.float32(session.info().learning_rate) == rate
            at = np.float32(at + rate)
            assert session.step(np.float32(-1)) == at
            assert session.last_ack is not None
            assert np.float32(session.last_ack.learning_rate) == rate
        assert session.info().learning_rate_scheduled == (name not in CONSTANTS)
    client.delete_session(session.name)
