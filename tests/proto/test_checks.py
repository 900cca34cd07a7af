"""Every parameter of the catalogue takes what it says and refuses everything else by its path."""

from __future__ import annotations

from typing import Any

import pytest

from optwire_proto import catalogue, checks, entries, errors, limits, spec_text, specs
from optwire_proto.specs import Array, Blob, Spec

CATALOGUE = catalogue.CATALOGUE
SERVED = {name: entry for name, entry in CATALOGUE.items() if not entry.refusal}
NAN, INF = float("nan"), float("inf")


def made(name: str, **arguments: Any) -> Spec:
    return Spec(name, tuple(arguments.items()))


SGD = made("sgd", step_size=0.1)
CONSTANT = made("constant", step_size=0.1)
CLIP = made("clip", max_delta=1.0)

# What a parameter takes -> a value that all of that kind take.
GOOD: dict[str, Any] = {
    **dict.fromkeys(("number", "positive", "nonnegative", "fraction", "decay"), 0.5),
    **dict.fromkeys(("count", "index", "few", "seed", "axes"), 2),
    "rate": CONSTANT,
    "flag": True,
    "dtype": "float32",
    "numbers": (0.5, 0.5),
    "operand": 0.5,
    "array": Array.of("f32", (1,), (0.5,)),
    "positions": Array.of("i32", (1,), (0,)),
    "pairs": ((5, 0.5),),
    "mappings": ((("init_value", 0.5),),),
    "tagged": ("distance", 0.5),
    "mask": "**",
    "groups": (("**", SGD),),
    "schedule": CONSTANT,
    "schedules": (CONSTANT, CONSTANT, CONSTANT),  # one more than the numbers above
    "spec": CLIP,
    "specs": (SGD,),
    "named": (("a", CLIP),),
    "optimizer": SGD,
    "blob": Blob(b"program"),
    "nothing": None,
}
# One value of every kind that can come, and some that are at the edge of what any parameter takes.
ZOO: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31 - 1, 2**31, -(2**31) - 1, 2**63 - 1),
    *(0.0, -0.0, 0.5, 1.0, -0.5, 1.5, 2.0, 1e-320, limits.SPEC_NUMBER_MAX, 1e39, NAN, INF, -INF),
    *("", "0.1", "float32", "**", "!", "x" * 5000, "\ud800", "distance"),
    *((), (0.5,), (0.5, 0.5), (NAN,), ("**",), ("**", 1), (True,), ((),), (5, 0.5), ((5, 0.5),), ((5, NAN),)),
    *(
        (("a", 0.5),),
        (("a", SGD),),
        (("a", SGD), ("a", SGD)),
        ("a", SGD),
        (("\ud800", SGD),),
        (("x" * 5000, SGD),),
        ((1, SGD),),
        ((True, SGD),),
        (SGD,),
        (CLIP, SGD),
        (CONSTANT,),
    ),
    *((0.5,) * (limits.SPEC_LIST_MAX + 1), ((((((0.5,),),),),),), ("distance", 0.5), ("distance", -1.0)),
    *(SGD, CLIP, CONSTANT, made("sophia"), made("sgd"), made("nothing_such"), made("chain", members=())),
    *(Array.of("f32", (1,), (0.5,)), Array.of("f64", (1,), (1e300,)), Array.of("i32", (0,), ())),
    *(Array.of("f32", (), (0.5,)), Array.of("f32", (1, 1), (0.5,)), Blob(b""), Blob(bytes(1000))),
    *({}, {"a": 1}, {1, 2}, b"bytes", 1j, object, object(), len, [0.5], [[5, 0.5]]),
)


def kind_of(entry: entries.Entry) -> str:
    return "schedule" if entry.kind == "schedule" else "transformation"


def good(parameter: entries.Parameter) -> Any:
    return parameter.choices[0] if parameter.choices else GOOD[parameter.takes.partition(":")[0]]


def filled(entry: entries.Entry, **changes: Any) -> Spec:
    """A spec of an entry with every argument given, but one of two that exclude each other."""
    given = {parameter.name: good(parameter) for parameter in entry.parameters}
    if entry.name == "piecewise_constant":
        given["values"] = (0.5, 0.5, 0.5)  # one more than boundaries
    if entry.name == "torch_sgd":
        given["dampening"] = 0.0  # as Nesterov's momentum takes it
    if entry.name == "torch_rprop":
        given["eta_plus"] = 1.5  # a step grows by more than 1
    if {"key", "seed"} <= set(given):
        given["key" if "seed" in changes else "seed"] = None
    return Spec(entry.name, tuple((given | changes).items()))


def test_there_is_a_good_value_for_every_kind_of_parameter():
    kinds = {kind for entry in SERVED.values() for parameter in entry.parameters for kind in parameter.takes.split(":")}
    assert kinds == {*GOOD, "text"}


@pytest.mark.parametrize("entry", SERVED.values(), ids=SERVED)
def test_every_entry_takes_what_it_says(entry: entries.Entry):
    spec = checks.check(filled(entry), kind_of(entry))
    assert [name for name, _ in spec.arguments] == [parameter.name for parameter in entry.parameters]
    assert str(checks.check(spec, kind_of(entry))) == str(spec)
    assert str(spec_text.parse(str(spec), CATALOGUE)) == str(spec)


@pytest.mark.parametrize("entry", SERVED.values(), ids=SERVED)
def test_every_default_is_one_that_its_parameter_takes(entry: entries.Entry):
    required = [parameter.name for parameter in entry.parameters if parameter.default is entries.REQUIRED]
    given = dict(filled(entry).arguments)
    spec = checks.check(Spec(entry.name, tuple((name, given[name]) for name in required)), kind_of(entry))
    for parameter in entry.parameters:
        if parameter.name not in required:
            assert spec[parameter.name] == parameter.default
            assert type(spec[parameter.name]) is type(parameter.default)


def refusal(spec: Spec, kind: str) -> errors.OptwireError | None:
    """The error that a spec is refused with; None where it is taken."""
    try:
        checks.check(spec, kind)
    except (errors.SpecError, errors.UnsupportedError) as exc:
        return exc
    return None


@pytest.mark.parametrize("entry", SERVED.values(), ids=SERVED)
def test_whatever_an_argument_is_it_is_refused_by_its_path_or_taken_for_good(entry: entries.Entry):
    kind = kind_of(entry)
    for parameter in entry.parameters:
        path, taken = f"{entry.name}.{parameter.name}", 0
        for value in ZOO:
            spec = filled(entry, **{parameter.name: value})
            if error := refusal(spec, kind):
                # What is wrong between two arguments is said of either.
                assert error.subject.startswith(path) or error.subject.rpartition(".")[0] == entry.name, (path, value)
                assert len(str(error)) < 2000
                continue
            taken += 1
            text = str(checks.check(spec, kind))
            again = spec_text.parse(text, CATALOGUE)
            assert text == str(again) == str(checks.check(again, kind)), (path, value)
        assert taken < len(ZOO) / 3, path


REFUSED = {name: entry for name, entry in CATALOGUE.items() if entry.refusal}


@pytest.mark.parametrize("entry", REFUSED.values(), ids=REFUSED)
def test_a_refused_name_is_refused_whatever_its_arguments_are(entry: entries.Entry):
    for arguments in ({}, {"learning_rate": 0.1}, {"qqq": NAN}):
        with pytest.raises(errors.UnsupportedError, match="is not served: ") as caught:
            checks.check(made(entry.name, **arguments))
        assert entry.refusal in str(caught.value)
        assert caught.value.subject == entry.name


# --------------------------------------------------------------------------------------------------- whole specs


@pytest.mark.parametrize(
    ("text", "core"),
    [
        ("sgd(0.1)", "sgd"),
        ("chain(clip(1.0), chain(clip(1.0), adam(0.1)))", "adam"),
        ("accumulate(ema_params(chain(clip(1.0), momentum(0.1, 0.9))), 2)", "momentum"),
        ("master_weights(on_nonfinite(adamw(0.1)))", "adamw"),
        ("partition({'**': sgd(0.1)})", "partition"),
        ("lookahead(optax.sgd(0.1), 2, 0.5)", "lookahead"),
    ],
)
def test_the_core_is_what_chains_and_wrappers_are_around(text: str, core: str):
    assert checks.core(checks.check(spec_text.parse(text, CATALOGUE))).name == core


@pytest.mark.parametrize(
    ("text", "moves"),
    [
        ("chain(scale_by_adam(), scale(-0.1))", True),
        ("chain(scale_by_adam(), scale_by_learning_rate(0.1))", True),
        ("chain(scale_by_adam(), scale_by_schedule(constant(-0.1)))", True),
        ("chain(clip(1.0), set_to_zero())", True),
        ("named_chain(('a', scale(-0.1)))", True),
        ("partition({'a': clip(1.0), '**': sgd(0.1)})", True),
        ("masked(adamw(0.1), 'a')", True),
        ("schedule_free(scale_by_adam(), 0.1)", True),
        ("chain(clip(1.0), scale_by_adam())", False),
        ("identity()", False),
        ("masked(clip(1.0), 'a')", False),
        ("partition({'**': clip(1.0)})", False),
        ("chain(scale_by_schedule(constant(-0.1)))", True),
    ],
)
def test_what_is_added_to_parameters_must_have_a_rate_somewhere(text: str, moves: bool):
    spec = spec_text.parse(text, CATALOGUE)
    assert checks.moves(checks.check(spec, "transformation")) is moves
    if moves:
        checks.check(spec)
    else:
        with pytest.raises(errors.SpecError, match="nothing in this spec sets a learning rate"):
            checks.check(spec)


@pytest.mark.parametrize(
    ("text", "extras"),
    [
        ("adamw(0.1)", ()),
        ("polyak_sgd()", ("loss",)),
        ("chain(optax.sgd(0.1), reduce_on_plateau())", ("loss",)),
        ("partition({'a': momo(0.1), 'b': polyak_sgd(), '**': sgd(0.1)})", ("loss",)),
    ],
)
def test_a_push_must_bring_what_any_part_needs_once(text: str, extras: tuple[str, ...]):
    assert checks.extras(checks.check(spec_text.parse(text, CATALOGUE)), CATALOGUE) == extras


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("chain(masked(clip(1.0), 'x'), adamw(0.1))", "chain.members[0].masked.mask"),
        ("chain(clip(1.0), adamw(0.1, mask=['a', '!x']))", "chain.members[1].adamw.mask"),
        ("partition({'x': sgd(0.1), '**': sgd(0.1)})", "partition.transforms['x']"),
        ("accumulate(partition({'a': sgd(0.1)}), 2)", "accumulate.optimizer.partition.transforms"),
        ("partition({'**': adamw(0.1, mask='x')})", "partition.transforms['**'].adamw.mask"),
        ("partition({'**': partition({'a': sgd(0.1)})})", "partition.transforms['**'].partition.transforms"),
    ],
)
def test_patterns_are_held_against_the_names_wherever_they_stand(text: str, subject: str):
    spec = checks.check(spec_text.parse(text, CATALOGUE))
    with pytest.raises(errors.SpecError) as caught:
        checks.check_names(spec, ("a", "b"), CATALOGUE)
    assert caught.value.subject == subject


def test_a_mask_that_is_a_flag_needs_no_names():
    checks.check_names(checks.check(made("adamw", learning_rate=0.1, mask=True)), (), CATALOGUE)


def test_without_complete_only_what_was_given_is_kept_and_lists_become_tuples():
    spec = Spec("adamw", (("mask", ["**"]), ("learning_rate", 0.1)))
    assert checks.check(spec, complete=False) == Spec("adamw", (("learning_rate", 0.1), ("mask", ("**",))))
    assert len(checks.check(spec).arguments) == len(CATALOGUE["adamw"].parameters)


def test_another_catalogue_decides_what_there_is():
    known = {"own": entries.Entry("own", "optimizer", (entries.Parameter("rate", "number"),), "One of these days.")}
    assert checks.check(made("own", rate=1), known=known) == made("own", rate=1)
    with pytest.raises(errors.SpecError, match="unknown optimizer; expected one of own"):
        checks.check(SGD, known=known)


def test_values_count_wherever_they_stand():
    def spec(schedules: int) -> Spec:
        piece = made("piecewise_constant", boundaries=tuple(range(1800)), values=(0.1,) * 1801)
        return made(
            "sgd", step_size=made("join_schedules", schedules=(piece,) * schedules, boundaries=(1,) * (schedules - 1))
        )

    assert checks.check(spec(4)).name == "sgd"
    with pytest.raises(errors.SpecError, match="more than 16384 values in one spec") as caught:
        checks.check(spec(5))
    assert caught.value.subject.startswith("sgd.step_size.join_schedules.schedules[4].piecewise_constant.")
    # What passes here can be written down and read again.
    text = str(checks.check(spec(4)))
    assert str(spec_text.parse(text, CATALOGUE)) == text


def test_depth_counts_schedules_too():
    schedule = CONSTANT
    for _ in range(limits.SPEC_DEPTH_MAX - 2):
        schedule = made("join_schedules", schedules=(schedule,), boundaries=())
    assert checks.check(made("sgd", step_size=schedule)).name == "sgd"
    with pytest.raises(errors.SpecError, match="nested deeper than 16"):
        checks.check(made("sgd", step_size=made("join_schedules", schedules=(schedule,), boundaries=())))


@pytest.mark.parametrize(
    "spec",
    [
        Spec(None),  # type: ignore[arg-type]
        Spec("sgd", None),  # type: ignore[arg-type]
        Spec("sgd", ((None, 1),)),  # type: ignore[arg-type]
        Spec("sgd", (("step_size",),)),  # type: ignore[arg-type]
        Spec("sgd", ("ab",)),  # type: ignore[arg-type]
    ],
    ids=["no name", "no arguments", "an argument without a name", "an argument without a value", "a text"],
)
def test_a_spec_of_the_wrong_shape_is_a_spec_error(spec: Spec):
    with pytest.raises(errors.SpecError):
        checks.check(spec)
    with pytest.raises(errors.SpecError):
        checks.check(made("chain", members=(spec,)))


def test_places_and_paths_of_errors_are_the_same():
    spec = checks.check(spec_text.parse("chain(clip(1.0), partition({'a': sgd(0.1), '**': adamw(0.1)}))", CATALOGUE))
    for path, value in specs.places(spec):
        if isinstance(value, float):
            with pytest.raises(errors.SpecError) as caught:
                checks.check(specs.replaced(spec, {path: NAN}))
            assert caught.value.subject == path
