"""What compiles, and what must not. JAX itself counts: it reports the time that each compilation took.

The promise: "Changing the learning rate 1,000 times: zero compilations (counted). Two sessions with different
elementwise rates share one executable."
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from tests.e2e import wire

import optwire
from optwire import optax as remote
from optwire import optimizers as opt
from optwire_proto import checks, errors, specs, trees
from optwire_server import testing
from optwire_server.engine import build, cache, program

# Reported by JAX once for each module that XLA compiles, on whichever thread.
EVENT = "/jax/core/compile/backend_compile_duration"
# Once for each function that JAX traces.
TRACED = "/jax/core/compile/jaxpr_trace_duration"


class Compilations:
    """How many there have been since it was made."""

    def __init__(self, event: str) -> None:
        self.count = 0
        self._event = event

    def hear(self, event: str, duration_s: float, **_: Any) -> None:
        self.count += event == self._event


@contextlib.contextmanager
def counted(event: str = EVENT) -> Iterator[Compilations]:
    heard = Compilations(event)
    jax.monitoring.register_event_duration_secs_listener(heard.hear)
    try:
        yield heard
    finally:
        jax.monitoring.unregister_event_duration_listener(heard.hear)


def params(size: int = 5) -> dict[str, Any]:
    return {"dense": {"kernel": np.ones((size, 3), np.float32), "bias": np.ones(3, np.float32)}}


SPECS = {
    "adam": opt.adam(0.1),
    "optax.adam": remote.adam(0.1),
    "adamw in a chain": opt.chain(remote.clip_by_global_norm(1.0), remote.adamw(0.1, mask="**/kernel")),
    "sgd": opt.sgd(0.1),
}


def test_the_counter_counts_compilations_on_any_thread(client: optwire.Client) -> None:
    with counted() as heard:
        jax.jit(lambda x: x * 3.25)(np.ones(17)).block_until_ready()
        here = heard.count
        assert here >= 1
        # Whole tensors, of a shape that no other test has: the server's threads compile for it.
        with client.create_session(params(23), opt.sm3(0.1)) as session:
            assert heard.count > here
    client.delete_session(session.name)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_thousand_learning_rates_compile_nothing(client: optwire.Client, spec: opt.Spec) -> None:
    with client.create_session(params(), spec) as session:
        # The first reading of a scalar on the device may compile how it is read.
        session.set_hyperparams(learning_rate=0.05)
        session.step(params())
        with counted() as heard:
            for k in range(1000):
                rate = 0.1 + k / 1000
                session.set_hyperparams(learning_rate=rate)
                if k % 50 == 0:
                    session.step(params())
                    assert session.last_ack is not None
                    assert session.last_ack.learning_rate == rate
            assert session.info().learning_rate == 0.1 + 999 / 1000
            session.step(params())
        assert heard.count == 0
        assert session.step_count == 22
    client.delete_session(session.name)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_first_change_of_a_session_traces_nothing(client: optwire.Client, spec: opt.Spec) -> None:
    """Of a shape that no other test has, so that the program is new: whatever it needs to know it knows by then."""
    grads = params(29)
    with client.create_session(grads, spec) as session:
        with counted(TRACED) as heard:
            other = client.create_session(params(31), spec)
        assert heard.count > 0, "JAX tells of the tracing of an update"
        session.step(grads)
        with counted(TRACED) as heard:
            session.step(grads, hyperparams={"learning_rate": 0.05})
            session.set_hyperparams(learning_rate=0.025)
            session.step(grads)
        assert heard.count == 0
        assert session.last_ack is not None
        assert session.last_ack.learning_rate == 0.025
    other.close()
    for each in (session, other):
        client.delete_session(each.name)


def test_changed_rates_give_the_bits_of_an_optimizer_made_with_them(client: optwire.Client) -> None:
    """That nothing compiled must not mean that nothing changed."""
    changed, made = (client.create_session(params(), remote.sgd(rate)) for rate in (0.1, 0.7))
    changed.set_hyperparams(learning_rate=0.7)
    ours, theirs = changed.step(params()), made.step(params())
    np.testing.assert_array_equal(ours["dense"]["kernel"], theirs["dense"]["kernel"])
    assert ours["dense"]["bias"][0] == np.float32(1) - np.float32(0.7)
    for session in (changed, made):
        session.close()
        client.delete_session(session.name)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_session_with_other_rates_compiles_nothing(client: optwire.Client, spec: opt.Spec) -> None:
    first = client.create_session(params(), spec)
    first.step(params())
    other = opt.parse(str(spec).replace("=0.1", "=0.025"))
    assert other != spec
    with counted() as heard, client.create_session(params(), other) as second:
        second.step(params())
    assert heard.count == 0
    first.close()
    for session in (first, second):
        client.delete_session(session.name)


@pytest.mark.parametrize("spec", [opt.adam(0.1), remote.adamw(0.1)], ids=["adam", "optax.adamw"])
def test_a_second_session_of_any_shape_compiles_nothing(spec: opt.Spec) -> None:
    """Quotes ADR 0003: "A new model under an elementwise rule compiles nothing, whatever its size"."""
    others = (
        {"a": np.ones((300, 700), np.float32), "b": np.float32(1)},
        [np.ones((k + 1, 3), np.float32) for k in range(200)],
        {"large": np.ones(1_300_000, np.float32)},
    )
    with testing.serve(compiles_ahead=True) as serving, optwire.connect(serving.target) as client:
        with counted() as heard:
            client.create_session(params(), spec).step(params())
            first = heard.count
            wire.until(lambda: not serving.server.engine.is_compiling_ahead, "the other sizes of blocks", 120)
        assert heard.count > first, "nobody waited for these"
        with counted() as heard:
            for other in others:
                client.create_session(other, spec).step(other)
        assert heard.count == 0


def test_specs_that_differ_in_rates_are_one_program() -> None:
    programs = cache.ProgramCache(jax.devices()[0])
    tree = trees.flatten(params()).spec

    def made(text: str) -> program.Program:
        return programs.get(checks.check(opt.parse(text), known=build.CATALOGUE), tree)

    assert made("optax.adam(0.1)") is made("optax.adam(0.2)") is made("optax.adam(2)")
    assert made("partition({'**/bias': sgd(1.0), '**': adam(0.1)})") is made(
        "partition({'**/bias': sgd(0.5), '**': adam(0.3)})"
    )
    assert made("optax.adam(0.1)") is not made("optax.adam(0.1, b1=0.8)")
    # A constant schedule is a number in other words.
    assert made("optax.adam(constant_schedule(0.1))") is made("optax.adam(constant_schedule(0.2))")


def test_a_schedule_replaced_by_a_number_and_back_compiles_once_each(client: optwire.Client) -> None:
    schedule = remote.cosine_decay_schedule(0.1, 1000)
    with client.create_session(params(), remote.adam(schedule)) as session:
        session.step(params())
        with counted() as heard:
            session.set_hyperparams(learning_rate=0.5)
            session.step(params())
            assert session.last_ack is not None
            assert session.last_ack.learning_rate == 0.5
        assert heard.count <= 2, "the update with a rate as an operand, unless another session has it"
        with counted() as heard:
            session.set_hyperparams(learning_rate=schedule)
            session.step(params())
            assert session.last_ack.learning_rate == pytest.approx(float(0.05 * (1 + np.cos(np.pi * 2 / 1000))))
            for rate in (0.5, 0.25, schedule, 0.125, schedule):
                session.set_hyperparams(learning_rate=rate)
                session.step(params())
        assert heard.count == 0, "the programs of both are there"
    client.delete_session(session.name)


TORCH = {
    "torch_adamw": opt.per_leaf(opt.torch_adamw(0.1)),
    "torch_sgd": opt.torch_sgd(0.1, momentum=0.9),
    "in groups": opt.grouped([0, 1], opt.per_leaf(opt.torch_nadam()), opt.master_weights(opt.torch_adamw())),
}


@pytest.mark.parametrize("spec", TORCH.values(), ids=TORCH)
def test_numbers_of_torchs_that_change_at_every_step_compile_nothing(client: optwire.Client, spec: opt.Spec) -> None:
    """What OneCycleLR does to momenta and betas, and to every other number."""
    with client.create_session(params(), spec) as session:
        session.step(params())
        numbers = {path: value for path, value in specs.places(spec) if type(value) is float}
        with counted() as heard:
            for k in range(1, 20):
                session.set_hyperparams({path: value * (1 - k / 100) for path, value in numbers.items()})
                session.step(params())
        assert heard.count == 0
    client.delete_session(session.name)


def test_a_momentum_becomes_0_without_compiling_and_cannot_come_from_nowhere(client: optwire.Client) -> None:
    with client.create_session(params(), opt.torch_sgd(0.1, momentum=0.9)) as session:
        session.step(params())
        with counted() as heard:
            for momentum in (0.0, 0.5, 0.0):
                session.set_hyperparams(momentum=momentum)
                session.step(params())
        assert heard.count == 0
    client.delete_session(session.name)
    session = client.create_session(params(), opt.torch_sgd(0.1))
    with pytest.raises(errors.SpecError, match="momentum: this change needs another state"):
        session.set_hyperparams(momentum=0.9)
    session.close()
    client.delete_session(session.name)


def test_a_name_in_two_groups_lists_both_and_a_whole_path_changes_one(client: optwire.Client) -> None:
    spec = opt.grouped([0, 1], opt.torch_sgd(0.5), opt.per_leaf(opt.torch_sgd(0.5)))
    whole = "grouped.optimizers[1].per_leaf.optimizer.torch_sgd.learning_rate"
    with client.create_session(params(), spec) as session:
        with pytest.raises(errors.InvalidArgumentError, match=r"grouped\.optimizers\[0\].*grouped\.optimizers\[1\]"):
            session.set_hyperparams(learning_rate=0.25)
        session.set_hyperparams({whole: 0.25})
        moved = session.step(params())
        assert moved["dense"]["bias"][0] == 0.5
        assert moved["dense"]["kernel"][0, 0] == 0.75
    client.delete_session(session.name)
