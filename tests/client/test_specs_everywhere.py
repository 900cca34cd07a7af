"""Python, text and protobuf are three spellings of one spec; optwire.optax has optax's own signatures."""

from __future__ import annotations

import inspect
import secrets
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import optax as real
import pytest
from tests.e2e import wire
from tests.e2e.bad_specs import array, spec

import optwire
from optwire import optax, optimizers
from optwire_proto import catalogue, checks, convert, errors, specs, trees
from optwire_proto.optax_entries import ENTRIES
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import tensor_pb2 as tensor_pb
from optwire_server import testing

PARAMS = {"dense": {"bias": np.zeros(3, np.float32), "kernel": np.ones((4, 3), np.float32)}}


class Spelled(NamedTuple):
    """One spec three times: made by Python's constructors, as text, and as a message made by hand."""

    python: specs.Spec
    text: str
    message: pb.Spec


SPELLED = {
    "a real number": Spelled(optimizers.sgd(0.1), "sgd(0.1)", spec("sgd", step_size=0.1)),
    "a whole number": Spelled(optimizers.sgd(1), "sgd(1)", spec("sgd", step_size=1)),
    "arguments by name in another order": Spelled(
        optimizers.momentum(mass=0.9, step_size=0.1),
        "momentum(mass=.9, step_size=1e-1)",
        spec("momentum", mass=0.9, step_size=0.1),
    ),
    "defaults, written out and left out": Spelled(
        optimizers.adam(0.1, b1=0.9, eps=1e-8), "adam(0.1)", spec("adam", step_size=0.1, b2=0.999)
    ),
    "a number of what is unrolled": Spelled(
        optax.muon(0.1, ns_steps=3),
        "optax.contrib.muon(0.1, ns_steps=3)",
        spec("muon", learning_rate=0.1, ns_steps=3),
    ),
    "a NumPy scalar": Spelled(optimizers.adam(np.float64(0.25)), "adam(0.25)", spec("adam", step_size=0.25)),
    "a schedule": Spelled(
        optimizers.adam(optimizers.exponential_decay(0.1, 10, 0.5)),
        "adam(exponential_decay(0.1, decay_steps=10, decay_rate=0.5))",
        spec("adam", step_size=spec("exponential_decay", step_size=0.1, decay_steps=10, decay_rate=0.5)),
    ),
    "a flag": Spelled(
        optimizers.sgd(optimizers.inverse_time_decay(0.1, 10, 0.5, staircase=True)),
        "sgd(inverse_time_decay(0.1, 10, 0.5, true))",
        spec(
            "sgd",
            step_size=spec("inverse_time_decay", step_size=0.1, decay_steps=10, decay_rate=0.5, staircase=True),
        ),
    ),
    "lists of numbers": Spelled(
        optimizers.nesterov(optimizers.piecewise_constant([5, 10], (0.1, 0.01, 0.001)), 0.9),
        "nesterov(piecewise_constant((5, 10), [0.1, 0.01, 0.001]), 0.9)",
        spec("nesterov", step_size=spec("piecewise_constant", boundaries=[5, 10], values=[0.1, 0.01, 0.001]), mass=0.9),
    ),
    "an array": Spelled(
        optimizers.sgd(optimizers.table(np.asarray([0.1, 0.05], np.float32))),
        "sgd(table(array([0.1, 0.05])))",
        spec("sgd", step_size=spec("table", values=array([0.1, 0.05]))),
    ),
    "an array of 64 bits": Spelled(
        optimizers.Spec(
            "sgd", (("step_size", optimizers.Spec("table", (("values", specs.Array.of("f64", (2,), (0.1, 0.2))),))),)
        ),
        "sgd(table(array([0.1, 0.2], 'f64')))",
        spec("sgd", step_size=spec("table", values=array([0.1, 0.2], None, "d", tensor_pb.DATA_TYPE_F64))),
    ),
    "groups by position, leaf by leaf": Spelled(
        optimizers.grouped([0, 1], optimizers.per_leaf(optimizers.torch_adamw(0.1)), optimizers.torch_sgd(0.1)),
        "grouped([0, 1], per_leaf(torch_adamw(0.1)), torch_sgd(0.1))",
        spec(
            "grouped",
            of=array([0, 1], None, "i", tensor_pb.DATA_TYPE_I32),
            optimizers=[
                spec("per_leaf", optimizer=spec("torch_adamw", learning_rate=0.1)),
                spec("torch_sgd", learning_rate=0.1),
            ],
        ),
    ),
    "a chain": Spelled(
        optimizers.chain(optimizers.clip_grads(1.0), optimizers.clip_by_leaf_norm(0.5), optimizers.adam(0.1)),
        "chain(clip_grads(1.0), clip_by_leaf_norm(0.5), adam(0.1))",
        spec(
            "chain",
            members=[
                spec("clip_grads", max_norm=1.0),
                spec("clip_by_leaf_norm", max_norm=0.5),
                spec("adam", step_size=0.1),
            ],
        ),
    ),
    "a chain by name": Spelled(
        optimizers.chain(optax.clip(1.0), optax.lion(0.1)),
        "chain(members=[clip(1.0), lion(0.1)])",
        spec("chain", members=[spec("clip", max_delta=1.0), spec("lion", learning_rate=0.1)]),
    ),
    "a mask of one pattern": Spelled(
        optax.adamw(1e-3, weight_decay=0.1, mask="**/kernel"),
        "adamw(1e-3, weight_decay=0.1, mask='**/kernel')",
        spec("adamw", learning_rate=1e-3, weight_decay=0.1, mask="**/kernel"),
    ),
    "a mask of several patterns": Spelled(
        optax.adamw(1e-3, mask=["dense/*", "!**/bias"], mu_dtype="bfloat16"),
        'optax.adamw(1e-3, mask=["dense/*", "!**/bias"], mu_dtype="bfloat16")',
        spec("adamw", learning_rate=1e-3, mask=["dense/*", "!**/bias"], mu_dtype="bfloat16"),
    ),
    "a mask of all": Spelled(
        optax.lamb(1e-3, mask=True), "lamb(1e-3, mask=True)", spec("lamb", learning_rate=1e-3, mask=True)
    ),
    "optax's adam beside the seed's": Spelled(
        optax.adam(1e-3, nesterov=True),
        "optax.adam(1e-3, nesterov=True)",
        spec("optax.adam", learning_rate=1e-3, nesterov=True),
    ),
    "None and what is left out": Spelled(
        optax.sgd(0.1, momentum=None), "optax.sgd(0.1, None)", spec("optax.sgd", learning_rate=0.1)
    ),
    "None where a number could be": Spelled(
        optax.adafactor(), "adafactor(learning_rate=null)", spec("adafactor", learning_rate=None)
    ),
    "groups": Spelled(
        optimizers.partition({"**/bias": optimizers.sgd(0.1), "**": optax.adamw(1e-3)}),
        "partition({'**/bias': sgd(0.1), '**': adamw(1e-3)})",
        spec("partition", transforms={"**/bias": spec("sgd", step_size=0.1), "**": spec("adamw", learning_rate=1e-3)}),
    ),
    "a count": Spelled(
        optimizers.accumulate(optimizers.sgd(0.1), k=4),
        "accumulate(sgd(0.1), 4)",
        spec("accumulate", optimizer=spec("sgd", step_size=0.1), k=4),
    ),
    "a choice": Spelled(
        optimizers.on_nonfinite(optimizers.sgd(0.1), "skip"),
        "on_nonfinite(sgd(0.1), policy='skip')",
        spec("on_nonfinite", optimizer=spec("sgd", step_size=0.1), policy="skip"),
    ),
    "an average": Spelled(
        optimizers.ema_params(optimizers.momentum(0.1, 0.9), debias=True),
        "ema_params(momentum(0.1, 0.9), debias=True)",
        spec("ema_params", optimizer=spec("momentum", step_size=0.1, mass=0.9), debias=True),
    ),
    "an element type": Spelled(
        optimizers.master_weights(optimizers.sgd(0.1), "float32"),
        "master_weights(sgd(0.1), dtype='float32')",
        spec("master_weights", optimizer=spec("sgd", step_size=0.1), dtype="float32"),
    ),
    "one axis": Spelled(
        optimizers.chain(optax.adaptive_grad_clip(0.1, axis=0), optax.scale(-0.1)),
        "chain(adaptive_grad_clip(0.1, axis=0), scale(-0.1))",
        spec("chain", members=[spec("adaptive_grad_clip", clipping=0.1, axis=0), spec("scale", step_size=-0.1)]),
    ),
    "a seed": Spelled(
        optax.noisy_sgd(0.1, seed=7), "noisy_sgd(0.1, seed=7)", spec("noisy_sgd", learning_rate=0.1, seed=7)
    ),
    "a name and a number": Spelled(
        optax.dog(1.0, init_step=("heuristic", 1e-6)),
        "dog(1.0, init_step=('heuristic', 1e-6))",
        spec("dog", learning_rate=1.0, init_step=["heuristic", 1e-6]),
    ),
    "two numbers": Spelled(
        optax.prodigy(1.0, betas=(0.8, 0.9)),
        "prodigy(1.0, betas=[0.8, 0.9])",
        spec("prodigy", learning_rate=1.0, betas=[0.8, 0.9]),
    ),
    "numbers by step": Spelled(
        optax.lion(optax.piecewise_constant_schedule(0.1, {5: 0.5, 10: 0.1})),
        "lion(piecewise_constant_schedule(0.1, {5: 0.5, 10: 0.1}))",
        spec(
            "lion",
            learning_rate=spec("piecewise_constant_schedule", init_value=0.1, boundaries_and_scales={5: 0.5, 10: 0.1}),
        ),
    ),
    "mappings": Spelled(
        optax.sign_sgd(
            optax.sgdr_schedule([{"init_value": 0.0, "peak_value": 0.1, "decay_steps": 9, "warmup_steps": 3}])
        ),
        "sign_sgd(sgdr_schedule([{'init_value': 0.0, 'peak_value': 0.1, 'decay_steps': 9, 'warmup_steps': 3}]))",
        spec(
            "sign_sgd",
            learning_rate=spec(
                "sgdr_schedule",
                cosine_kwargs=[{"init_value": 0.0, "peak_value": 0.1, "decay_steps": 9, "warmup_steps": 3}],
            ),
        ),
    ),
    "schedules in a list": Spelled(
        optax.sign_sgd(optax.join_schedules([optax.constant_schedule(0.1), optax.constant_schedule(0.01)], [5])),
        "sign_sgd(join_schedules([constant_schedule(0.1), constant_schedule(0.01)], [5]))",
        spec(
            "sign_sgd",
            learning_rate=spec(
                "join_schedules",
                schedules=[spec("constant_schedule", value=0.1), spec("constant_schedule", value=0.01)],
                boundaries=[5],
            ),
        ),
    ),
    "a schedule as what is asked for": Spelled(
        optimizers.chain(optax.scale_by_adam(), optax.scale_by_schedule(optax.linear_schedule(-0.1, 0.0, 10))),
        "chain(scale_by_adam(), scale_by_schedule(linear_schedule(-0.1, 0.0, 10)))",
        spec(
            "chain",
            members=[
                spec("scale_by_adam"),
                spec(
                    "scale_by_schedule",
                    step_size_fn=spec("linear_schedule", init_value=-0.1, end_value=0.0, transition_steps=10),
                ),
            ],
        ),
    ),
    "names of members": Spelled(
        optax.named_chain(("clip", optax.clip(1.0)), ("down", optax.scale(-0.1))),
        "named_chain(('clip', clip(1.0)), ('down', scale(-0.1)))",
        spec("named_chain", args={"clip": spec("clip", max_delta=1.0), "down": spec("scale", step_size=-0.1)}),
    ),
    "an optimizer of optax in one": Spelled(
        optax.lookahead(optax.yogi(0.1), sync_period=3, slow_step_size=0.5),
        "lookahead(yogi(0.1), 3, 0.5)",
        spec("lookahead", fast_optimizer=spec("yogi", learning_rate=0.1), sync_period=3, slow_step_size=0.5),
    ),
    "None and nothing else": Spelled(
        optax.lbfgs(0.1, linesearch=None),
        "lbfgs(0.1, linesearch=None)",
        spec("lbfgs", learning_rate=0.1, linesearch=None),
    ),
    "an optimizer that wants the loss": Spelled(
        optax.polyak_sgd(variant="sps+"), "polyak_sgd(variant='sps+')", spec("polyak_sgd", variant="sps+")
    ),
    "a mask around": Spelled(
        optimizers.chain(optax.masked(optax.trace(0.9), "**/kernel"), optax.freeze("**/bias"), optax.sgd(0.1)),
        "chain(masked(trace(0.9), '**/kernel'), freeze('**/bias'), optax.sgd(0.1))",
        spec(
            "chain",
            members=[
                spec("masked", inner=spec("trace", decay=0.9), mask="**/kernel"),
                spec("freeze", mask="**/bias"),
                spec("optax.sgd", learning_rate=0.1),
            ],
        ),
    ),
    "comments and breaks": Spelled(
        optax.radam(1e-3, eps=1e-5),
        "# what\n  radam( 1_000e-6 , # rate\n\teps=1e-5,\n)\n",
        spec("radam", learning_rate=1e-3, eps=1e-5),
    ),
}
# A server serves it where its operator allows programs.
PROGRAM = Spelled(
    optimizers.exported(b"\x00\xffprogram", 0.1),
    "exported(base64('AP9wcm9ncmFt'), 0.1)",
    spec("exported", update=b"\x00\xffprogram", learning_rate=0.1),
)
ALL = {**SPELLED, "a program": PROGRAM}


def test_there_are_enough_of_them_and_every_kind_of_argument_is_among_them():
    assert len(SPELLED) >= 25
    tried = {
        takes for spelled in ALL.values() for _, _, takes in checks.by_takes(spelled.python, catalogue.CATALOGUE)
    } | {takes for spelled in ALL.values() for takes in nones(spelled.python)}
    everything = {parameter.takes for entry in catalogue.CATALOGUE.values() for parameter in entry.parameters}
    assert {takes.partition(":")[0] for takes in everything} <= {takes.partition(":")[0] for takes in tried}


def nones(described: specs.Spec) -> Iterator[str]:
    """What parameters take that are given as None."""
    for _, value in specs.places(described):
        if isinstance(value, specs.Spec):
            given = dict(value.arguments)
            for parameter in catalogue.CATALOGUE[value.name].parameters:
                if parameter.name in given and given[parameter.name] is None:
                    yield parameter.takes


@pytest.mark.parametrize("spelled", ALL.values(), ids=ALL)
def test_three_spellings_are_one_spec(spelled: Spelled):
    three = [spelled.python, optimizers.parse(spelled.text), convert.spec_from_proto(spelled.message)]
    complete = [checks.check(described) for described in three]
    assert complete[0] == complete[1] == complete[2]
    assert len({str(described) for described in complete}) == 1  # which tells apart 1, 1.0 and True
    assert len({specs.digest(described) for described in complete}) == 1


@pytest.mark.parametrize("spelled", ALL.values(), ids=ALL)
def test_every_spelling_leads_to_the_others_and_back(spelled: Spelled):
    for start in (spelled.python, checks.check(spelled.python), optimizers.parse(spelled.text)):
        message = pb.Spec.FromString(convert.spec_to_proto(start).SerializeToString())
        by_wire, by_text = convert.spec_from_proto(message), optimizers.parse(str(start))
        assert by_wire == by_text == start
        assert str(by_wire) == str(by_text) == str(start)
        assert convert.spec_to_proto(by_text) == message
        assert convert.spec_from_proto(pb.Spec(text=str(start))) == start


@pytest.fixture(scope="module")
def peer(server: testing.Serving) -> Iterator[wire.Peer]:
    peer = wire.Peer(server.target)
    yield peer
    peer.close()


@pytest.mark.parametrize("spelled", SPELLED.values(), ids=SPELLED)
def test_a_server_makes_the_same_of_every_spelling(client: optwire.Client, peer: wire.Peer, spelled: Spelled):
    expected = checks.check(spelled.python)
    made = [client.create_session(PARAMS, spelled.python).name, client.create_session(PARAMS, spelled.text).name]
    payload = wire.payload_of(PARAMS)
    for message in (spelled.message, pb.Spec(text=spelled.text)):
        begin = pb.CreateSessionBegin(
            tree=convert.tree_to_proto(trees.flatten(PARAMS).spec), spec=message, create_key=secrets.token_hex(16)
        )
        end = pb.PayloadEnd(digest=wire.digest(payload))
        made.append(peer.create_from(begin, wire.chunks(payload, 2**20), end).name)
    handles = [client.attach(name) for name in made]
    infos = [handle.info() for handle in handles]
    assert [info.spec_digest for info in infos] == [specs.digest(expected)] * 4
    assert [str(info.spec) for info in infos] == [str(expected)] * 4
    assert [handle.describe().text for handle in handles] == [str(expected)] * 4
    for name in made:
        client.delete_session(name)


# ------------------------------------------------------------------------------------------------- optwire.optax

SERVED = {entry.name.removeprefix("optax."): entry for entry in ENTRIES if not entry.refusal}
# optwire's own chain takes what optax's does, and stands in its place.
REFUSED = {
    entry.name.removeprefix("optax."): entry for entry in ENTRIES if entry.refusal and entry.name != "optax.chain"
}
# Parameters of optax that are left out here: functions that have a default, and what has no effect on a server.
LEFT_OUT = {
    "adafactor": {"decay_rate_fn"},
    "adopt": {"clip_value_fn"},
    "galore": {"weight_dimension_numbers"},
    "masked": {"mask_compatible_extra_args"},
    "muon": {"muon_weight_dimension_numbers"},
    "scale_by_adopt": {"clip_value_fn"},
    "scale_by_factored_rms": {"decay_rate_fn"},
    "scale_by_galore": {"weight_dimension_numbers"},
}


def theirs(name: str) -> Any:
    return getattr(real.contrib if SERVED[name].origin == "optax.contrib" else real, name)


@pytest.mark.parametrize("name", SERVED)
def test_signatures_are_optaxs_own(name: str):
    ours = inspect.signature(getattr(optax, name)).parameters
    expected = inspect.signature(theirs(name)).parameters
    left_out = set(expected) - set(ours)
    assert left_out <= {"verbose"} | LEFT_OUT.get(name, set())
    assert all(expected[key].default is not inspect.Parameter.empty for key in left_out)
    assert list(ours) == [key for key in expected if key not in left_out]
    for key, parameter in ours.items():
        default = expected[key].default
        if (name, key) == ("lbfgs", "linesearch"):  # optax's default is a line search, which cannot be: give None
            assert parameter.default is inspect.Parameter.empty
            continue
        assert parameter.kind is expected[key].kind, key
        if "dtype" in key and default is not None:
            assert np.dtype(parameter.default) == np.dtype(default)
        else:
            assert parameter.default == default
            assert type(parameter.default) is type(default)


def test_what_is_left_out_is_of_functions_that_are_served():
    assert set(LEFT_OUT) <= set(SERVED)


def test_every_public_maker_of_optax_is_served_or_refused_with_a_reason():
    makers = {
        name
        for module in (real, real.contrib)
        for name, maker in vars(module).items()
        if inspect.isfunction(maker)
        and not name.startswith("_")
        and any(word in str(inspect.signature(maker).return_annotation) for word in ("Transformation", "Schedule"))
    }
    assert len(makers) > 100
    assert makers - {"schedule_free_eval_params"} <= {*SERVED, *REFUSED, "chain"}
    assert all(entry.refusal for entry in REFUSED.values())


def test_dir_lists_what_is_served():
    assert set(SERVED) <= set(dir(optax))
    assert not set(REFUSED) & set(dir(optax))
    assert [name for name in dir(optax) if name.startswith("__")] == []
    assert set(dir(optax)) == set(optax.__all__)
    assert all(callable(getattr(optax, name)) for name in SERVED)


def test_a_function_says_what_it_is():
    assert optax.adamw.__name__ == "adamw"
    assert optax.adamw.__module__ == "optwire.optax"
    assert "weight decay" in optax.adamw.__doc__
    assert optax.adamw is optax.adamw
    assert optax.chain is optimizers.chain


def test_importing_it_imports_neither_optax_nor_jax():
    code = (
        "import sys; from optwire import optax, optimizers; optax.adamw(0.1); optimizers.parse('lion(0.1)'); "
        "print(sorted({'jax', 'jaxlib', 'optax', 'torch', 'optwire_server'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_name_says_why(name: str):
    with pytest.raises(errors.UnsupportedError, match=f"optax.{name} is not served: ") as caught:
        getattr(optax, name)
    assert REFUSED[name].refusal in str(caught.value)
    assert caught.value.subject == name


def test_an_unknown_name_is_an_attribute_error_with_a_suggestion():
    with pytest.raises(AttributeError, match="has no 'adamwd' .did you mean 'adamw'"):
        optax.adamwd  # noqa: B018  the mistake itself
    with pytest.raises(AttributeError, match="has no 'qqq'$"):
        optax.qqq  # noqa: B018
    assert not hasattr(optax, "apply_updates")


WRONG = {
    "a misspelt keyword": (lambda: optax.adamw(0.1, weight_decy=0.1), "adamw.weight_decy", "mean 'weight_decay'"),
    "an unknown keyword": (lambda: optax.adamw(0.1, qqq=1), "adamw.qqq", "unexpected keyword argument 'qqq'; expected"),
    "too many positional": (lambda: optax.clip(1.0, 2.0), "clip", "too many positional arguments"),
    "a keyword-only by position": (lambda: optax.flatten(optax.sgd(0.1), 1), "flatten", "too many positional"),
    "an argument twice": (lambda: optax.clip(1.0, max_delta=2.0), "clip", "multiple values for argument 'max_delta'"),
    "a missing argument": (lambda: optax.adamw(), "adamw", "missing a required argument: 'learning_rate'"),
    "a missing argument of None": (lambda: optax.lbfgs(0.1), "lbfgs", "missing a required .*'linesearch'"),
    "a wrong type": (lambda: optax.adamw("0.1"), "adamw.learning_rate", "'0.1', expected a number"),
    "a function as schedule": (lambda: optax.adamw(lambda step: 0.1), "adamw.learning_rate", "expected a number"),
    "a function as mask": (lambda: optax.adamw(0.1, mask=lambda p: p), "adamw.mask", "expected a name pattern"),
    "a tree as mask": (lambda: optax.adamw(0.1, mask={"w": True}), "adamw.mask", "expected a name pattern"),
    "optax itself": (lambda: optax.flatten(real.sgd(0.1)), "flatten.inner", "expected an optimizer or a transf"),
    "a real number for a count": (lambda: optax.apply_every(2.0), "apply_every.k", "2.0, expected a whole number"),
    "NaN": (lambda: optax.adamw(0.1, b1=float("nan")), "adamw.b1", "nan, expected a number from 0 to 1"),
    "a number of NumPy that is NaN": (lambda: optimizers.sgd(np.float32("nan")), "sgd.step_size", "nan, expected"),
    "a bad place deep inside": (
        lambda: optax.adamw(optax.join_schedules([optimizers.Spec("constant", (("step_size", "x"),))], [])),
        "join_schedules.schedules[0].constant.step_size",
        "'x', expected a finite number",
    ),
    "a schedule as optimizer": (lambda: optimizers.accumulate(optimizers.constant(0.1), 2), None, "a schedule, exp"),
    "a transformation as optimizer": (lambda: optimizers.accumulate(optax.clip(1.0), 2), None, "an optimizer: nothing"),
    "no member": (lambda: optimizers.chain(), "chain.members", r"\[\], expected transformations"),
    "a list of members": (lambda: optimizers.chain([optimizers.sgd(0.1)]), "chain.members[0]", "expected an optimizer"),
    "1,000,000 points": (lambda: optimizers.table(range(10**6)), None, "at most 16384 numbers|at most 4096"),
    "1,000,000 points of NumPy": (
        lambda: optimizers.table(np.zeros(10**6)),
        None,
        "at most 16384 numbers|at most 4096",
    ),
    "a table of two dimensions": (lambda: optimizers.table(np.zeros((2, 2))), None, "expected"),
    "a blob of 300 kB": (lambda: optimizers.exported(bytes(300_000)), None, "at most 262144 bytes"),
    "an element type of NumPy": (
        lambda: optax.adamw(0.1, mu_dtype=np.dtype(np.int32)),
        "adamw.mu_dtype",
        "expected an element type, one of float32",
    ),
    "text that is no spec": (lambda: optimizers.parse("adamw(0.1"), "adamw", "at line 1, column 10"),
    "nothing": (lambda: optimizers.parse(""), "spec", "expected"),
}


@pytest.mark.parametrize(("make", "subject", "problem"), WRONG.values(), ids=WRONG)
def test_a_constructor_refuses_what_it_cannot_take(make: Any, subject: str | None, problem: str):
    with pytest.raises(errors.SpecError, match=problem) as caught:
        make()
    if subject is not None:
        assert caught.value.subject == subject


def test_text_that_is_no_text_is_refused():
    with pytest.raises(errors.SpecError, match="spec: None, expected text"):
        optimizers.parse(None)


def test_element_types_of_numpy_are_taken_by_their_names():
    assert optax.adamw(0.1, mu_dtype=np.float32)["mu_dtype"] == "float32"
    assert optax.adamw(0.1, mu_dtype=np.dtype("float16"))["mu_dtype"] == "float16"


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: optimizers.adam(0.1, beta1=0.9), "unexpected keyword argument 'beta1'"),
        (lambda: optimizers.sgd(0.1, 0.9), "positional argument"),
        (lambda: optimizers.sgd(), "missing 1 required positional argument"),
    ],
    ids=["a misspelt keyword", "too many positional", "a missing argument"],
)
def test_the_seeds_constructors_are_plain_functions_and_raise_what_python_raises(make: Any, problem: str):
    with pytest.raises(TypeError, match=problem):
        make()
