"""The catalogue is the seed's, on both ends; what cannot be is refused; the text of a spec tells apart what differs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.example_libraries import optimizers as seed

import optwire.optimizers as opt
from optwire_proto import catalogue, checks, convert, entries, errors, limits
from optwire_proto.catalogue import CATALOGUE, OURS
from optwire_proto.specs import Spec
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_server import optimizers as served

SEED = [entry.name for entry in catalogue.SEED]
RATE = ("step_size", 0.1)


def signature(function: Any) -> dict[str, Any]:
    """Parameter names in order, with their defaults."""
    return {
        name: entries.REQUIRED if parameter.default is parameter.empty else parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
    }


def described(name: str) -> dict[str, Any]:
    return {parameter.name: parameter.default for parameter in OURS[name].parameters}


def seed_signature(name: str) -> dict[str, Any]:
    """That of the seed; what a transformation is applied to is no parameter of its description."""
    found = signature(getattr(seed, name))
    if OURS[name].kind == "transformation":
        found.pop(next(iter(found)))
    return found


@pytest.mark.parametrize("name", SEED)
def test_the_catalogue_has_the_names_order_and_defaults_of_the_seed(name: str):
    ours, theirs = described(name), seed_signature(name)
    assert list(ours.items()) == list(theirs.items())
    assert [type(value) for value in ours.values()] == [type(value) for value in theirs.values()]


def test_every_optimizer_and_schedule_of_the_seed_is_in_the_catalogue():
    makers = {
        name
        for name, function in inspect.getmembers(seed, inspect.isfunction)
        if "step_size" in inspect.signature(function).parameters or name in ("piecewise_constant", "clip_grads")
    }
    assert makers == set(SEED)


@pytest.mark.parametrize("name", [name for name in SEED if name != "clip_grads"])
def test_the_served_functions_have_the_signatures_of_the_seed(name: str):
    ours = signature(getattr(served, name))
    assert list(ours.items()) == list(signature(getattr(seed, name)).items())


@pytest.mark.parametrize("name", OURS)
def test_the_client_describes_with_the_signatures_of_the_catalogue(name: str):
    variadic = [parameter.name for parameter in OURS[name].parameters if parameter.variadic]
    if variadic:
        ours = inspect.signature(getattr(opt, name)).parameters
        assert list(ours) == list(described(name))
        assert ours[variadic[0]].kind is inspect.Parameter.VAR_POSITIONAL
    else:
        assert list(signature(getattr(opt, name)).items()) == list(described(name).items())


def test_the_client_describes_all_of_the_catalogue_and_nothing_else():
    assert set(opt.__all__) - {"Spec", "parse"} == set(OURS)


SCHEDULES = {
    "constant": opt.constant(0.1),
    "exponential_decay": opt.exponential_decay(0.1, 10, 0.5),
    "inverse_time_decay": opt.inverse_time_decay(0.1, 10, 0.5, staircase=True),
    "polynomial_decay": opt.polynomial_decay(0.1, 10, 0.0),
    "piecewise_constant": opt.piecewise_constant([5, 10], [0.1, 0.01, 0.001]),
    "table": opt.table([0.1, 0.01, 0.001]),
}
COMPLETE = {
    "sgd": opt.sgd(0.1),
    "momentum": opt.momentum(0.1, 0.9),
    "nesterov": opt.nesterov(SCHEDULES["piecewise_constant"], mass=0.9),
    "adagrad": opt.adagrad(SCHEDULES["exponential_decay"]),
    "rmsprop": opt.rmsprop(SCHEDULES["inverse_time_decay"]),
    "rmsprop_momentum": opt.rmsprop_momentum(SCHEDULES["polynomial_decay"]),
    "adam": opt.adam(1e-3),
    "adamax": opt.adamax(SCHEDULES["constant"]),
    "sm3": opt.sm3(1),
    "chain": opt.chain(opt.clip_grads(1.0), opt.clip_grads(2), opt.chain(opt.adam(1e-3))),
    "partition": opt.partition({"**/b": opt.sgd(SCHEDULES["table"]), "**": opt.adam(1e-3)}),
    "per_leaf": opt.per_leaf(opt.torch_adamw(SCHEDULES["constant"])),
    "grouped": opt.grouped([0, 1, 0], opt.adam(1e-3), opt.per_leaf(opt.torch_sgd(0.1, momentum=0.9))),
    **{entry.name: getattr(opt, entry.name)() for entry in catalogue.TORCH},
    **{entry.name: getattr(opt, entry.name)(learning_rate=0.1) for entry in catalogue.OUTER},
    "accumulate": opt.accumulate(opt.adam(1e-3), 4),
    "on_nonfinite": opt.on_nonfinite(opt.adam(1e-3), "skip"),
    "ema_params": opt.ema_params(opt.adam(1e-3), 0.99, debias=True),
    "master_weights": opt.master_weights(opt.adam(1e-3)),
    "exported": opt.exported(b"\0program", 0.1),
}


def test_every_entry_is_tried():
    assert set(SCHEDULES) | set(COMPLETE) | {"clip_grads", "clip_by_leaf_norm"} == set(OURS)


@pytest.mark.parametrize("spec", COMPLETE.values(), ids=COMPLETE)
def test_a_checked_spec_is_complete_and_checked_again_the_same(spec: Spec):
    checked = checks.check(spec)
    assert checked == checks.check(checked)
    assert str(checked) == str(checks.check(checked))
    assert [name for name, _ in checked.arguments] == [parameter.name for parameter in OURS[spec.name].parameters]


@pytest.mark.parametrize("spec", (COMPLETE | SCHEDULES).values(), ids=COMPLETE | SCHEDULES)
def test_a_spec_survives_the_wire_with_its_types(spec: Spec):
    message = pb.Spec.FromString(convert.spec_to_proto(spec).SerializeToString())
    back = convert.spec_from_proto(message)
    assert back == spec
    assert str(back) == str(spec)


def test_arguments_may_come_in_any_order_and_are_stored_in_the_catalogues():
    spec = Spec("adam", (("eps", 1e-6), ("b2", 0.5), RATE))
    assert checks.check(spec).arguments == (RATE, ("b1", 0.9), ("b2", 0.5), ("eps", 1e-6))


def test_text_tells_apart_what_python_holds_equal():
    texts = {str(Spec("polynomial_decay", (("power", value),))) for value in (2, 2.0, True, "2", (2,), None)}
    assert len(texts) == 6
    assert str(opt.momentum(0.1, 1)) != str(opt.momentum(0.1, 1.0))
    assert str(opt.momentum(0.1, 0.0)) != str(opt.momentum(0.1, -0.0))
    assert str(opt.adam(0.1 + 0.2)) != str(opt.adam(0.3))


def test_text_of_a_spec_reads_like_the_call():
    assert str(opt.adam(1e-3)) == "adam(step_size=0.001, b1=0.9, b2=0.999, eps=1e-08)"
    spec = opt.chain(opt.clip_grads(1.0), opt.sgd(opt.piecewise_constant([5], [1.0, 0.5])))
    assert str(spec) == (
        "chain(members=[clip_grads(max_norm=1.0), "
        "sgd(step_size=piecewise_constant(boundaries=[5], values=[1.0, 0.5]))])"
    )


def test_every_name_of_the_catalogue_is_of_ours_or_of_optax():
    assert [name for name, entry in CATALOGUE.items() if entry.origin == "optwire"] == list(OURS)
    assert {entry.origin for entry in CATALOGUE.values()} == {"optwire", "optax", "optax.contrib"}


def test_the_core_of_a_chain_is_its_optimizer():
    assert checks.core(COMPLETE["chain"]).name == "adam"
    assert checks.core(COMPLETE["sgd"]) is COMPLETE["sgd"]


@pytest.mark.parametrize("parameter", ["gamma", "mass", "momentum"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.9", True, None, [0.9], 2**31, opt.sgd(0.1)])
def test_a_number_is_a_finite_number(parameter: str, value: object):
    name = {"gamma": "rmsprop", "mass": "nesterov", "momentum": "sm3"}[parameter]
    with pytest.raises(errors.SpecError, match=f"{name}.{parameter}: .*expected a finite number") as caught:
        checks.check(Spec(name, (RATE, (parameter, value))))
    assert caught.value.subject == f"{name}.{parameter}"


@pytest.mark.parametrize("value", [0.0, 0, 0.999999, 5e-324])
def test_decays_from_0_up_to_1_are_taken(value: float):
    assert checks.check(Spec("adam", (RATE, ("b1", value))))["b1"] == value


@pytest.mark.parametrize("value", [1, 1.0, -1e-9, 2.0])
def test_other_decays_are_not(value: float):
    with pytest.raises(errors.SpecError, match="from 0 up to, not including, 1"):
        checks.check(Spec("adam", (RATE, ("b2", value))))


@pytest.mark.parametrize(("kind", "what"), [("schedule", "sgd"), ("optimizer", "constant"), ("optimizer", "clip")])
def test_one_kind_does_not_stand_for_another(kind: str, what: str):
    with pytest.raises(errors.SpecError, match=f"expected an? {kind}"):
        checks.check(Spec(what, (("max_delta", 1.0) if what == "clip" else RATE,)), kind)


def test_what_is_wrong_deep_inside_is_named_with_its_path():
    inner = Spec(
        "sgd", (("step_size", Spec("polynomial_decay", (RATE, ("decay_steps", 0), ("final_step_size", 0.0)))),)
    )
    with pytest.raises(errors.SpecError) as caught:
        checks.check(Spec("chain", (("members", (Spec("clip_grads", (("max_norm", 1.0),)), inner)),)))
    assert str(caught.value).startswith(
        "chain.members[1].sgd.step_size.polynomial_decay.decay_steps: 0, expected a positive number"
    )
    assert caught.value.subject == "chain.members[1].sgd.step_size.polynomial_decay.decay_steps"


@pytest.mark.parametrize("name", ["", "x" * 100_000, "adam\0", "__import__", "Adam", "adam "])
def test_a_name_that_is_unknown_is_told_what_is_known(name: str):
    with pytest.raises(
        errors.SpecError, match="unknown optimizer.*; expected one of sgd, momentum, nesterov"
    ) as caught:
        checks.check(Spec(name, (RATE,)))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (pb.Spec(name="x" * 129), "spec: .*at most 128 bytes"),
        (pb.Spec(name="sgd", arguments=[pb.Argument(name="é" * 65, value=pb.Value(number=1))]), "at most 128 bytes"),
        (pb.Spec(name="sgd", arguments=[pb.Argument(name="x", value=pb.Value(text="é" * 2049))]), "at most 4096 bytes"),
    ],
    ids=["name", "argument", "text"],
)
def test_names_and_texts_from_outside_have_a_limit(message: pb.Spec, problem: str):
    with pytest.raises(errors.SpecError, match=problem):
        convert.spec_from_proto(message)


def test_names_and_texts_at_the_limit_are_taken():
    spec = Spec("x" * 128, (("y" * 128, "z" * 4096), ("é" * 64, ("é" * 2048,))))
    assert convert.spec_from_proto(convert.spec_to_proto(spec)) == spec


def test_chains_nest_to_the_limit_and_no_deeper():
    spec = opt.sgd(0.1)
    for _ in range(limits.SPEC_DEPTH_MAX - 1):
        spec = Spec("chain", (("members", (spec,)),))
    assert convert.spec_from_proto(convert.spec_to_proto(checks.check(spec))) == spec
    with pytest.raises(errors.SpecError, match="nested deeper than 16"):
        checks.check(Spec("chain", (("members", (spec,)),)))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda child: st.one_of(
        st.lists(child, max_size=3).map(tuple),
        st.builds(
            lambda name, arguments: Spec(name, tuple(arguments)),
            st.sampled_from([*OURS, "other"]),
            st.lists(st.tuples(st.sampled_from(["step_size", "mass", "members", "b1", "x"]), child), max_size=3),
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=500, deadline=None)
@given(
    name=st.sampled_from([*OURS, "other"]),
    arguments=st.lists(
        st.tuples(st.sampled_from(sorted({p.name for e in OURS.values() for p in e.parameters})), VALUES),
        max_size=4,
    ),
)
def test_any_description_is_refused_with_a_spec_error_or_complete(name: str, arguments: list[tuple[str, Any]]):
    try:
        checked = checks.check(Spec(name, tuple(arguments)))
    except errors.SpecError:
        return
    assert checks.check(checked) == checked
    assert convert.spec_from_proto(convert.spec_to_proto(checked)) == checked
