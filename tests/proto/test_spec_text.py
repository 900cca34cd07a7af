"""Text becomes the spec that it describes, the canonical text the same spec again, and all else a SpecError."""

from __future__ import annotations

import math
import random
import string
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from optwire_proto import errors, limits, spec_text
from optwire_proto.entries import Entry, Parameter
from optwire_proto.specs import Array, Blob, Spec


def entry(name: str, *parameters: str, origin: str = "optax") -> Entry:
    """An entry; ``*name`` is variadic, ``name!`` by name only."""
    made = tuple(
        Parameter(p.strip("*!"), "number", variadic=p.startswith("*"), keyword_only=p.endswith("!")) for p in parameters
    )
    return Entry(name, "optimizer", made, "", origin=origin)


ENTRIES = {
    made.name: made
    for made in (
        entry("adam", "step_size", "b1", "b2", "eps", origin="optwire"),
        entry("optax.adam", "learning_rate", "b1", "b2", "eps", "eps_root", "mu_dtype", "nesterov!"),
        entry("adamw", "learning_rate", "b1", "b2", "eps", "eps_root", "mu_dtype", "weight_decay", "mask", "nesterov!"),
        entry("muon", "learning_rate", "ns_coeffs", origin="optax.contrib"),
        entry("chain", "*members", origin="optwire"),
        entry("partition", "transforms", origin="optwire"),
        entry("named", "first", "*rest", "last!", origin="optwire"),
        entry("by_name", "x!"),
        entry("set_to_zero"),
        entry("clip_by_global_norm", "max_norm"),
        entry("warmup_cosine_decay_schedule", "init_value", "peak_value", "warmup_steps", "decay_steps", "end_value"),
        entry("table", "values", origin="optwire"),
    )
}
LONG = "n" * (limits.SPEC_NAME_BYTES_MAX + 1)


def parse(text: str) -> Spec:
    return spec_text.parse(text, ENTRIES)


def value(text: str) -> Any:
    """What a text means as the value of an argument."""
    return parse(f"f(x={text})")["x"]


def refused(text: str) -> errors.SpecError:
    with pytest.raises(errors.SpecError) as caught:
        parse(text)
    return caught.value


def same(a: Any, b: Any) -> bool:
    """Equal in types too: 2, 2.0 and True are three things, and so are 0.0 and -0.0."""
    return a == b and repr(a) == repr(b)


# ----------------------------------------------------------------------------------------------------- meaning


def test_the_example_of_the_documentation_means_what_it_says():
    text = """
        chain(clip_by_global_norm(1.0),
              adamw(warmup_cosine_decay_schedule(0, 3e-4, 200, 10000), weight_decay=0.1, mask="**/kernel"))
    """
    schedule = Spec(
        "warmup_cosine_decay_schedule",
        (("init_value", 0), ("peak_value", 3e-4), ("warmup_steps", 200), ("decay_steps", 10000)),
    )
    adamw = Spec("adamw", (("learning_rate", schedule), ("weight_decay", 0.1), ("mask", "**/kernel")))
    clip = Spec("clip_by_global_norm", (("max_norm", 1.0),))
    assert same(parse(text), Spec("chain", (("members", (clip, adamw)),)))


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("1", 1),
        ("+1", 1),
        ("-1", -1),
        ("1_000", 1000),
        ("0", 0),
        ("-0", 0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.5e1", -5.0),
        ("1e-3", 1e-3),
        ("1E+3", 1000.0),
        ("1_0.0_1e1_0", 10.01e10),
        ("007.5", 7.5),
        ("-0.0", -0.0),
        ("1" * 40, int("1" * 40)),
        ("True", True),
        ("true", True),
        ("False", False),
        ("false", False),
        ("None", None),
        ("none", None),
        ("null", None),
        ("''", ""),
        ('"a\'b"', "a'b"),
        (r"'\n\r\t\\\'\"\x41\u20ac\U0001f600'", "\n\r\t\\'\"A€😀"),
        ("'# no comment ('", "# no comment ("),
        ("'tab\tand € stay'", "tab\tand € stay"),
        ("[]", ()),
        ("()", ()),
        ("{}", ()),
        ("[1, 2.0,]", (1, 2.0)),
        ("(1)", 1),
        ("((1))", 1),
        ("(1,)", (1,)),
        ("(1, 2)", (1, 2)),
        ("((1,), [])", ((1,), ())),
        ("{'a': 1, 2: [3],}", (("a", 1), (2, (3,)))),
        ("{'a': 1, 'a': 2}", (("a", 1), ("a", 2))),
        ("set_to_zero", Spec("set_to_zero")),
        ("set_to_zero()", Spec("set_to_zero")),
        ("(set_to_zero)", Spec("set_to_zero")),
        ("none()", Spec("none")),
        ("inf()", Spec("inf")),
        ('base64("AP8=")', Blob(b"\x00\xff")),
        ("base64('')", Blob(b"")),
        ("array([[1.0, 2.0]], 'f32', [1, 2])", Array.of("f32", (1, 2), (1.0, 2.0))),
        ("array([[1.0, 2], [3, 4]])", Array.of("f32", (2, 2), (1.0, 2.0, 3.0, 4.0))),
        ("array([1, -2])", Array.of("i32", (2,), (1, -2))),
        ("array([1, 2], 'f64',)", Array.of("f64", (2,), (1.0, 2.0))),
        ("array([1, 2], 'i64', (2,))", Array.of("i64", (2,), (1, 2))),
        ("array(2.5)", Array.of("f32", (), (2.5,))),
        ("array(3, 'i32', [])", Array.of("i32", (), (3,))),
        ("array([])", Array.of("f32", (0,), ())),
        ("array([[], []])", Array.of("f32", (2, 0), ())),
        ("array([], 'i32', [0, 3])", Array.of("i32", (0, 3), ())),
        ("array([], 'i32', [3, 0, 2])", Array.of("i32", (3, 0, 2), ())),
    ],
)
def test_a_value_means_what_it_says(text: str, meaning: Any):
    assert same(value(text), meaning)
    assert same(value(f"\n {text} # so it is\n"), meaning)


def test_space_and_comments_may_stand_anywhere_between_words():
    text = "# first\nchain ( # of two\r\n\tadam\n(\n0.1 , b1 = # momentum\n .9,) , set_to_zero # last\n) # end"
    adam = Spec("adam", (("step_size", 0.1), ("b1", 0.9)))
    assert same(parse(text), Spec("chain", (("members", (adam, Spec("set_to_zero"))),)))


def test_arguments_without_a_name_take_the_names_of_the_catalogue():
    assert parse("adam(1, 2, eps=3)").arguments == (("step_size", 1), ("b1", 2), ("eps", 3))


def test_a_variadic_parameter_takes_all_the_rest():
    assert parse("named(1, 2, 3, last=4)").arguments == (("first", 1), ("rest", (2, 3)), ("last", 4))
    assert parse("named(1)").arguments == (("first", 1),)
    assert parse("chain([1])").arguments == (("members", ((1,),)),)
    assert parse("chain(members=[1, 2])") == parse("chain(1, 2)")


def test_a_name_that_only_the_server_knows_takes_arguments_by_name():
    assert parse("of_tomorrow(x=1)") == Spec("of_tomorrow", (("x", 1),))
    assert parse("lib.of_tomorrow") == Spec("lib.of_tomorrow")


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("adamw", "adamw"),
        ("optax.adamw", "adamw"),
        ("adam", "adam"),
        ("optax.adam", "optax.adam"),
        ("optax.contrib.muon", "muon"),
        ("muon", "muon"),
        ("optax.muon", "optax.muon"),  # not where optax has it
        ("optax.contrib.adamw", "optax.contrib.adamw"),
        ("optax.chain", "chain"),  # ours takes the same members
        ("other.adamw", "other.adamw"),
        ("of_tomorrow", "of_tomorrow"),
    ],
)
def test_names_of_optax_mean_its_entries(name: str, meaning: str):
    assert spec_text.entry_name(name, ENTRIES) == meaning
    assert spec_text.entry_name(meaning, ENTRIES) == meaning
    assert parse(f"{name}()") == Spec(meaning)


# -------------------------------------------------------------------------------------------------- the way back


def arrays() -> st.SearchStrategy[Array]:
    numbers = {
        "f32": st.floats(width=32, allow_nan=False, allow_infinity=False),
        "f64": st.floats(allow_nan=False, allow_infinity=False),
        "i32": st.integers(-(2**31), 2**31 - 1),
        "i64": st.integers(-(2**63), 2**63 - 1),
    }
    shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)

    def of(dtype: str, shape: tuple[int, ...]) -> st.SearchStrategy[Array]:
        size = math.prod(shape)
        flat = st.lists(numbers[dtype], min_size=size, max_size=size)
        return flat.map(lambda found: Array.of(dtype, shape, tuple(found)))

    return st.tuples(st.sampled_from(sorted(numbers)), shapes).flatmap(lambda drawn: of(*drawn))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
INTEGERS = st.integers(1 - 10**40, 10**40 - 1)
WORDS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
NAMES = st.one_of(
    st.sampled_from(sorted(ENTRIES)),
    st.sampled_from(["none", "True", "nan", "inf", "a.b.c"]),
    WORDS.filter(lambda name: name not in ("array", "base64")),
)
SIMPLE = st.one_of(
    st.none(),
    st.booleans(),
    INTEGERS,
    st.floats(allow_nan=False, allow_infinity=False),
    TEXTS,
    arrays(),
    st.binary(max_size=20).map(Blob),
)


def spec_of(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Spec]:
    arguments = st.dictionaries(WORDS, values, max_size=3).map(lambda found: tuple(found.items()))
    return st.builds(Spec, NAMES, arguments)


VALUES = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(tuple),
        st.lists(st.tuples(st.one_of(TEXTS, INTEGERS), inner), max_size=3).map(tuple),  # printed as a mapping
        spec_of(inner),
    ),
    max_leaves=20,
)


@settings(max_examples=400, deadline=None)
@given(spec_of(VALUES))
@example(Spec("f", (("x", ((1, 2), (3, 4))), ("y", ((True, 1),)), ("z", ((1, 2), 3)))))
@example(Spec("f", (("x", (("a", 1), ("a", 2))), ("y", ((),)))))
@example(Spec("f", (("x", (2, 2.0, True, 0, 0.0, -0.0, False)), ("y", 1e22), ("z", 5e-324))))
@example(Spec("f", (("x", "'\"\\\n\r\t\x00\x7f\x85\xa0\u2028\ufeff\U0010ffff#€"),)))
def test_the_canonical_text_of_a_spec_means_the_same_spec(spec: Spec):
    again = parse(str(spec))
    assert same(again, spec)
    assert str(again) == str(spec)


def test_the_largest_arguments_come_back():
    deep: Any = 1
    for _ in range(limits.SPEC_DEPTH_MAX):
        deep = Spec("chain", (("members", (deep,)),))
    largest = (
        deep,
        Spec("f", (("x", Blob(bytes(limits.SPEC_BLOB_BYTES_MAX))),)),
        Spec("f", (("x", Array.of("f32", (128, 128), tuple(map(float, range(16384))))),)),
        Spec("f", (("x", tuple(range(16_000))),)),
        Spec("f", (("x", Array.of("f32", (1,) * limits.RANK_MAX, (1.0,))),)),
        Spec("n" * limits.SPEC_NAME_BYTES_MAX),
    )
    for spec in largest:
        assert parse(str(spec)) == spec


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_an_array_holds_only_numbers_that_its_text_has(dtype: str, number: float):
    with pytest.raises(errors.SpecError, match="finite numbers"):
        Array.of(dtype, (2,), (0.0, number))


# ------------------------------------------------------------------------------------------------------- errors


# Text, place inside the spec, a fragment of the message.
WRONG = [
    # No spec at all.
    ("", "spec", "the end of the text, expected a value, at line 1, column 1"),
    (" # nothing\n ", "spec", "the end of the text, expected a value, at line 2, column 2"),
    ("3", "spec", "3, expected a name with arguments, such as adam(0.1)"),
    ("none", "spec", "None, expected a name with arguments"),
    ("[adam(1)]", "spec", "expected a name with arguments"),
    ("array([1])", "spec", "expected a name with arguments"),
    ("é(1)", "spec", "'é', expected a value"),
    ("adam(1) adam(1)", "spec", "'adam', expected the end of the text, at line 1, column 9"),
    ("adam(1))", "spec", "')', expected the end of the text"),
    ("adam.(1)", "spec", "'.', expected the end of the text"),
    (f"{LONG}()", "spec", "129 bytes, expected a name of at most 128 bytes"),
    # Arguments.
    ("adam(", "adam.step_size", "the end of the text, expected a value"),
    ("adam(1", "adam", "the end of the text, expected ',' or ')'"),
    ("adam(,)", "adam.step_size", "',', expected a value, at line 1, column 6"),
    ("adam(1,,)", "adam.b1", "',', expected a value"),
    ("adam(1 b1=2)", "adam", "'b1', expected ',' or ')'"),
    ("adam(b1==2)", "adam.b1", "'=', expected a value"),
    ("adam(b1=)", "adam.b1", "')', expected a value"),
    ("adam(1 # forgot\n 2)", "adam", "'2', expected ',' or ')', at line 2, column 2"),
    ("adam(b1=1, 2)", "adam", "an argument without a name, expected name=value, as an argument before it has"),
    ("adam(b1=1, b1=2)", "adam.b1", "b1 for the second time, expected each argument once"),
    ("adam(1, step_size=2)", "adam.step_size", "step_size for the second time"),
    ("chain(adam(1), members=[])", "chain.members", "members for the second time"),
    (
        "adam(1, 2, 3, 4, 5)",
        "adam",
        "number 5, expected at most 4 arguments without a name: step_size, b1, b2, eps, at",
    ),
    ("by_name(1)", "by_name", "number 1, expected at most 0 arguments without a name; by name only: x, at"),
    ("set_to_zero(1)", "set_to_zero", "number 1, expected at most 0 arguments without a name"),
    (f"adam({LONG}=1)", "adam", "129 bytes, expected a name of at most 128 bytes"),
    ("adam(lambda x: x)", "adam", "'x', expected ',' or ')'"),
    ("adam(*x)", "adam.step_size", "'*', expected a value"),
    # Names.
    ("adamww(1)", "adamww", "expected name=value, as the catalogue has no adamww; did you mean adamw?"),
    ("zzz(1)", "zzz", "the catalogue has no zzz, at line 1, column 5"),
    ("chain(adam(1), optax.adam2(1))", "chain.members[1].optax.adam2", "did you mean adam?"),
    # Numbers.
    ("adam(inf)", "adam.step_size", "inf, expected a finite number"),
    ("adam(-inf)", "adam.step_size", "'-inf', expected a finite number"),
    ("adam(NaN)", "adam.step_size", "NaN, expected a finite number"),
    ("adam(np.inf)", "adam.step_size", "np.inf, expected a finite number"),
    ("adam(1e999)", "adam.step_size", "1e999, expected a finite number"),
    ("adam(0x10)", "adam.step_size", "'0x10', expected a number such as 1, -2.5 or 1e-3"),
    ("adam(010)", "adam.step_size", "010, expected a number such as"),
    ("adam(1__0)", "adam.step_size", "1__0, expected a number such as"),
    ("adam(1_)", "adam.step_size", "1_, expected a number such as"),
    ("adam(1.2.3)", "adam.step_size", "'1.2.3', expected a number such as"),
    ("adam(1e)", "adam.step_size", "'1e', expected a number such as"),
    ("adam(1j)", "adam.step_size", "'1j', expected a number such as"),
    ("adam(--1)", "adam.step_size", "'--1', expected a number such as"),
    ("adam(- 1)", "adam.step_size", "'-', expected a number such as"),
    ("adam(.)", "adam.step_size", "'.', expected a number such as"),
    ("adam(٣)", "adam.step_size", "'٣', expected a number such as"),
    ("adam(2.0**40)", "adam", "'*', expected ',' or ')'"),
    ("adam(1-2)", "adam", "'-2', expected ',' or ')'"),
    (f"adam({'9' * 41})", "adam.step_size", "41 digits, expected a number of at most 40 digits"),
    (f"adam(0.{'9' * 40})", "adam.step_size", "41 digits, expected a number of at most 40 digits"),
    # Text.
    ("adam('a", "adam.step_size", "the end of the text, expected a closing '"),
    ('adam("a\n")', "adam.step_size", 'the end of the line, expected a closing ", at line 1, column 8'),
    ("adam('a\\", "adam.step_size", "'\\', expected an escape such as"),
    (r"adam('\q')", "adam.step_size", r"'\q', expected an escape such as \n \t"),
    (r"adam('\0')", "adam.step_size", r"'\0', expected an escape such as"),
    (r"adam('\x4')", "adam.step_size", "expected an escape such as"),
    (r"adam('\u12g4')", "adam.step_size", "expected an escape such as"),
    (r"adam('\ud800')", "adam.step_size", r"\ud800, expected a character of Unicode"),
    (r"adam('\U00110000')", "adam.step_size", r"\U00110000, expected a character of Unicode"),
    ("adam('\ud800')", "spec", r"'\ud800', expected text that is valid Unicode, at line 1, column 7"),
    ("adam('a' 'b')", "adam", "expected ',' or ')'"),
    ("adam(b'a')", "adam", "expected ',' or ')'"),
    # Lists and mappings.
    ("adam([1, 2)", "adam.step_size", "')', expected ',' or ']'"),
    ("adam([1, x y])", "adam.step_size", "'y', expected ',' or ']'"),
    ("adam([1, ]])", "adam", "']', expected ',' or ')'"),
    ("adam([1, [2, ?]])", "adam.step_size[1][1]", "'?', expected a value"),
    ("adam((1, ?))", "adam.step_size[1]", "'?', expected a value"),
    ("adam((?, 1))", "adam.step_size", "'?', expected a value"),
    ("adam({1})", "adam.step_size[0]", "'}', expected ':'"),
    ("adam({'a': 1, b: 2})", "adam.step_size[1]", "'b', expected text in quotes or a whole number as key"),
    ("adam({1.5: 2})", "adam.step_size[0]", "'1.5', expected text in quotes or a whole number as key"),
    ("adam({'a': inf})", "adam.step_size['a']", "inf, expected a finite number"),
    ("adam({'a': 1, 'b': -})", "adam.step_size[1][1]", "expected a number such as"),
    (
        "partition({'**/bias': adam(1), '**': chain(adam(1), adam(1 2))})",
        "partition.transforms['**'].chain.members[1].adam",
        "'2', expected ',' or ')'",
    ),
    # Arrays and blobs.
    ("table(array)", "table.values", "')', expected '(' after array"),
    ("table(array())", "table.values", "nothing, expected numbers, such as array([1.0, 2.0])"),
    ("table(array('f32'))", "table.values", "expected a number or a list of numbers"),
    ("table(array([1, True]))", "table.values", "'True', expected a number or a list of numbers"),
    ("table(array([[1, 2], [3]]))", "table.values", "an item of shape [1], expected shape [2], as the items"),
    ("table(array([1, [2]]))", "table.values", "an item of shape [1], expected shape []"),
    ("table(array([[[[[[[[[1]]]]]]]]]))", "table.values", "more, expected at most 8 dimensions"),
    ("table(array([1], f32))", "table.values", "'f32', expected an element type in quotes"),
    ("table(array([1], 'float32'))", "table.values", "'float32', expected element type f32 f64 i32 i64"),
    ("table(array([1.5], 'i32'))", "table.values", "expected numbers that i32 can hold"),
    ("table(array([2147483648]))", "table.values", "expected numbers that i32 can hold"),
    ("table(array([1e39]))", "table.values", "expected numbers that f32 can hold"),
    ("table(array([1], 'i32', 1))", "table.values", "1, expected a shape such as [2, 3]"),
    ("table(array([1], 'i32', [True]))", "table.values", "[True], expected a shape such as [2, 3]"),
    ("table(array([1], 'i32', [2]))", "table.values", "[2], expected shape [1], as the numbers have"),
    ("table(array([[1, 2]], 'i32', [2, 1]))", "table.values", "[2, 1], expected shape [1, 2]"),
    ("table(array([], 'i32', []))", "table.values", "[], expected shape [0]"),
    ("table(array([[]], 'i32', [2, 0]))", "table.values", "[2, 0], expected shape [1, 0]"),
    ("table(array([], 'i32', [0, -1]))", "table.values", "expected at most 8 dimensions from 0 up"),
    ("table(array([1], 'i32', [1], 2))", "table.values", "expected ')' after numbers, element type and shape"),
    ("table(array([1], dtype='i32'))", "table.values", "'dtype', expected an element type in quotes"),
    ("table(base64)", "table.values", "expected '(' after base64"),
    ("table(base64())", "table.values", "')', expected base64 in quotes"),
    ("table(base64('a'))", "table.values", "'a', expected base64"),
    ("table(base64('QQ= ='))", "table.values", "expected base64"),
    ("table(base64('QR=='))", "table.values", "'QR==', expected base64 that ends in zero bits"),
    ("table(base64('é'))", "table.values", "expected base64"),
    ("table(base64('QQ==', 1))", "table.values", "expected ',' or ')'"),
]


@pytest.mark.parametrize(("text", "subject", "fragment"), WRONG)
def test_a_wrong_text_is_refused_with_its_place_and_reason(text: str, subject: str, fragment: str):
    error = refused(text)
    assert fragment in str(error)
    assert error.subject == subject
    assert str(error).startswith(f"{subject}: {error.got}, expected {error.expected}, at line ")


def test_an_error_shows_the_line_and_a_caret_below_the_character():
    error = refused("chain(\n  adam(0.1),\n  adamw(inf)\n)")
    assert str(error) == (
        "chain.members[1].adamw.learning_rate: inf, expected a finite number, at line 3, column 9\n"
        "      adamw(inf)\n"
        "            ^"
    )


def test_an_excerpt_is_short_and_holds_nothing_that_a_terminal_obeys():
    _, excerpt, caret = str(refused(f"chain({'adam(1),' * 50}\t'\x1b[2J\u202e', ?,{'adam(1),' * 50})")).split("\n")
    assert len(excerpt) <= 4 + 60
    assert excerpt.isprintable()
    assert excerpt[caret.index("^")] == "?"


# ------------------------------------------------------------------------------------------------------- limits


def seconds(text: str) -> tuple[float, Spec | errors.SpecError]:
    """How long a text took, and what came of it; any other exception is a failure."""
    start = time.perf_counter()
    try:
        outcome: Spec | errors.SpecError = parse(text)
    except errors.SpecError as exc:
        outcome = exc
    return time.perf_counter() - start, outcome


@pytest.mark.parametrize("opening", ["(", "[", "chain(", "{'a':", "f(x=[", "f(x={1:", "(f(x=", "array("])
def test_ten_thousand_levels_are_refused_at_once(opening: str):
    for text in (opening * 10_000, f"f(x={opening * 10_000}"):
        took, outcome = seconds(text)
        assert isinstance(outcome, errors.SpecError)
        assert took < 1


def test_ten_thousand_dimensions_are_refused_at_once():
    assert "at most 8 dimensions" in str(refused(f"f(x=array({'[' * 10_000}"))


def test_specs_nest_as_deep_as_the_limit_and_no_deeper():
    deep = limits.SPEC_DEPTH_MAX
    assert parse("chain(" * (deep - 1) + "adam(1)" + ")" * (deep - 1)).name == "chain"
    assert f"adam, expected at most {deep} specs" in str(refused("chain(" * deep + "adam(1)"))


def test_lists_nest_as_deep_as_the_limit_and_no_deeper():
    lists = limits.SPEC_WIRE_DEPTH_MAX - 1  # the spec around them is one too
    assert parse(f"f(x={'[' * lists}{']' * lists})")
    for opening in ("[", "("):
        expected = f"at most {limits.SPEC_WIRE_DEPTH_MAX} specs and lists inside one another"
        assert expected in str(refused(f"f(x={opening * (lists + 1)}"))
    assert parse(f"f(x={'{1: ' * (lists // 2)}1{'}' * (lists // 2)})")  # a list of pairs, which are lists
    assert expected in str(refused(f"f(x={'{1: ' * (lists // 2 + 1)}1"))


def test_a_text_that_is_too_long_is_refused_before_it_is_read():
    longest = limits.SPEC_TEXT_FORM_BYTES_MAX
    assert parse("f(x=1)".ljust(longest)) == Spec("f", (("x", 1),))
    for text in ("f(x=1)".ljust(longest + 1), "x" * 2**20, "(" * 2**20, "f('" + "€" * (longest // 3)):
        took, outcome = seconds(text)
        assert f"expected text of at most {longest} bytes" in str(outcome)
        assert took < 1


def test_a_spec_holds_as_many_values_as_the_limit_and_no_more():
    inside = limits.SPEC_VALUES_MAX - 2  # the spec and its list are values too
    assert len(value(f"[{'1,' * inside}]")) == inside
    expected = f"at most {limits.SPEC_VALUES_MAX} values in all"
    assert expected in str(refused(f"f(x=[{'1,' * (inside + 1)}])"))
    assert expected in str(refused(f"chain({'adam(1),' * inside})"))
    assert expected in str(refused(f"f({','.join(f'a{index}=1' for index in range(inside + 2))})"))


def test_an_array_is_refused_at_its_first_number_too_many():
    assert len(value(f"array([{'1,' * 16_384}])").numbers) == 16_384
    assert "an array of at most 16384 numbers" in str(refused(f"f(x=array([{'1,' * 16_385}"))
    too_large = f"f(x=array([{'1,' * 16_384}], 'f64'))"
    assert f"expected at most {limits.SPEC_ARRAY_BYTES_MAX} bytes" in str(refused(too_large))


def test_a_blob_that_is_too_large_is_refused():
    text = f"f(x=base64('{'AAAA' * (limits.SPEC_BLOB_BYTES_MAX // 3 + 1)}'))"
    assert f"expected at most {limits.SPEC_BLOB_BYTES_MAX} bytes" in str(refused(text))


HALF = limits.SPEC_TEXT_FORM_BYTES_MAX - 100


@pytest.mark.parametrize(
    "text",
    [
        " " * HALF,
        "#\n" * (HALF // 2),
        "f(" + " #\n" * (HALF // 3) + "x",
        "f(" + "a #\n" * (HALF // 4),
        "a" * HALF,
        "a." * (HALF // 2),
        "f(" + "a" * HALF + "=1)",
        "f(x=" + "1" * HALF,
        "f(x=" + "1_" * (HALF // 2),
        "f(x=0." + "0" * HALF + "1",
        "f(x=1e" + "9" * HALF,
        "f(x=" + "-" * HALF,
        "f(x='" + "a" * HALF,
        "f(x='" + "\\n" * (HALF // 2) + "'",
        "f(x=array([" + "[]," * (HALF // 3) + "]))",
        "f(x=base64('" + "A" * HALF,
        "f(x={'" + "a" * (HALF // 2) + "': g(x=[" + "1," * 16_000 + "?",
        "f(x=[" + "adam(1)," * 8_000 + "?",
        "f(x=[" + "{1:1}," * 8_000 + "?",
        "f(" + "\n" * HALF + "?",
    ],
    ids=lambda text: repr(text[:14]),
)
def test_the_longest_texts_take_no_longer_than_their_length(text: str):
    took, _ = seconds(text)
    assert took < 20  # about 0.1 on a machine that is not busy; what is quadratic takes minutes


# ------------------------------------------------------------------------------------------- whatever comes along


def total(text: str) -> None:
    """Every text is a spec, whose text is one again, or a SpecError that says where."""
    _, outcome = seconds(text)
    if isinstance(outcome, Spec):
        assert same(parse(str(outcome)), outcome)
    else:
        assert 0 < len(outcome.subject) <= 200
        assert outcome.expected
        assert outcome.got


VALID = [
    'chain(clip_by_global_norm(1.0), adamw(3e-4, weight_decay=0.1, mask="**/kernel"))',
    "partition({'**/bias': optax.adam(1e-3, nesterov=True), '**': set_to_zero}) # groups",
    "table(array([[1.0, -2.5], [3, 4]], 'f32', [2, 2]))",
    "named(base64('AP8='), (1,), [], {}, None, {1: 'a\\n\\x00\\u20ac'}, last=-.5e+3)",
]
TOKENS = ["(", ")", "[", "]", "{", "}", ",", ":", "=", " ", "\n", "#", "'a'", '"', "\\", "1", "-1", ".5", "1e3", "nan"]
TOKENS += [
    "adam",
    "optax.adam",
    "chain",
    "array",
    "base64",
    "'QQ=='",
    "'f32'",
    "True",
    "null",
    "x=",
    "b1=",
    "f(x=",
    "é",
]


@settings(max_examples=500, deadline=None)
@given(st.text(string.ascii_lowercase[:6] + "xnu0189_.+-()[]{},:='\"\\# \n\té\ud800\x00", max_size=60))
def test_any_text_is_a_spec_or_a_spec_error(text: str):
    total(text)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(TOKENS), max_size=25).map("".join))
def test_any_row_of_words_is_a_spec_or_a_spec_error(text: str):
    total(text)
    total(f"f(x={text})")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(VALID), st.randoms(use_true_random=False))
def test_any_damage_to_a_valid_text_gives_a_spec_or_a_spec_error(text: str, draw: random.Random):
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(text) + 1)
        end = min(len(text), start + draw.choice([0, 1, 1, 3]))
        text = text[:start] + draw.choice(["", draw.choice(TOKENS), text[end : end + 5]]) + text[end:]
    total(text)


@pytest.mark.parametrize("text", VALID)
def test_every_beginning_of_a_valid_text_is_a_spec_or_a_spec_error(text: str):
    assert isinstance(parse(text), Spec)
    for end in range(len(text)):
        total(text[:end])
