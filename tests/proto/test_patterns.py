"""Which names a pattern, a mask and groups mean, against matchers written from the words of the documentation."""

from __future__ import annotations

import itertools
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optwire_proto import errors, limits, patterns

NAMES = ("encoder/dense/bias", "encoder/dense/kernel", "encoder/norm/scale", "head/bias", "head/kernel")
PATH = "adamw.mask"


def means(pattern: list[str], name: list[str]) -> bool:
    """Whether components mean components: every way to lay ``**`` over the name is tried."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(means(pattern[1:], name[k:]) for k in range(len(name) + 1))
    return bool(name) and fits(pattern[0], name[0]) and means(pattern[1:], name[1:])


def fits(component: str, text: str) -> bool:
    """Whether one component of a pattern means one of a name: every way to lay ``*`` over the text is tried."""
    if not component:
        return not text
    if component[0] == "*":
        return any(fits(component[1:], text[k:]) for k in range(len(text) + 1))
    if not text:
        return False
    if component[0] == "?":
        return fits(component[1:], text[1:])
    several = re.match(r"\[(!?)([^]]+)\]", component)
    if several:
        chars = several[2].replace("a-c", "abc")
        return (text[0] in chars) is not bool(several[1]) and fits(component[several.end() :], text[1:])
    return component[0] == text[0] and fits(component[1:], text[1:])


def components(path: str) -> list[str]:
    return path.split("/") if path else []


PIECES = ["a", "b", "c", "/", "/", "*", "?", "**", "/**/", "**/", "/**", "[ab]", "[!a]", "[a-c]", "[!ab]", "."]
PATTERNS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=7).map("".join)
LEAVES = st.lists(st.sampled_from([*"abc./", "/"]), max_size=8).map("".join)


@settings(max_examples=1500, deadline=None)
@given(pattern=PATTERNS, name=LEAVES)
def test_a_pattern_means_what_the_documentation_says(pattern: str, name: str):
    assert patterns.matches(pattern, name) == means(pattern.split("/"), components(name))


def test_short_patterns_mean_what_the_documentation_says_all_of_them():
    names = ["/".join(parts) for size in range(4) for parts in itertools.product(("a", "b", "ab"), repeat=size)]
    wanted = ["/".join(parts) for size in (1, 2, 3) for parts in itertools.product(("a", "*", "?", "**"), repeat=size)]
    for pattern, name in itertools.product(wanted, names):
        assert patterns.matches(pattern, name) == means(pattern.split("/"), components(name)), (pattern, name)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("**", NAMES),
        ("**/bias", ("encoder/dense/bias", "head/bias")),
        ("*/bias", ("head/bias",)),
        ("encoder/**", NAMES[:3]),
        ("encoder/*/*", NAMES[:3]),
        ("encoder", ()),
        ("head/*", NAMES[3:]),
        ("**/head/**/bias", ("head/bias",)),
        ("**/[bk]*", ("encoder/dense/bias", "encoder/dense/kernel", "head/bias", "head/kernel")),
        ("**/?????", ("encoder/norm/scale",)),
        ("*", ()),
        ("/head/bias", ()),
        ("head/bias/", ()),
        ("HEAD/bias", ()),
        ("hea./bias", ()),
        ("**/**/**", NAMES),
    ],
)
def test_examples_read_as_paths_do(pattern: str, found: tuple[str, ...]):
    assert tuple(name for name in NAMES if patterns.matches(pattern, name)) == found


@pytest.mark.parametrize(
    ("pattern", "meant"), [("**", True), ("**/**", True), ("*", False), ("?", False), ("x", False)]
)
def test_the_single_array_has_the_empty_name(pattern: str, meant: bool):
    assert patterns.matches(pattern, "") is meant


@pytest.mark.parametrize("char", [".", "+", "(", ")", "^", "$", "|", "\\", "{", "\n", "é", "\U0001f600", "]"])
def test_other_characters_stand_for_themselves(char: str):
    assert patterns.matches(f"a{char}b/**", f"a{char}b/c")
    assert not patterns.matches(f"a{char}b", "ab")
    assert not patterns.matches(f"a{char}b", "aab")


# --------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (True, NAMES),
        (False, ()),
        ("**/kernel", ("encoder/dense/kernel", "head/kernel")),
        (["**/kernel", "**/scale"], ("encoder/dense/kernel", "encoder/norm/scale", "head/kernel")),
        (["**", "!**/bias"], ("encoder/dense/kernel", "encoder/norm/scale", "head/kernel")),
        (["!**/bias", "**"], ("encoder/dense/kernel", "encoder/norm/scale", "head/kernel")),
        ("!**/bias", ("encoder/dense/kernel", "encoder/norm/scale", "head/kernel")),
        (["!**/bias", "!head/**"], ("encoder/dense/kernel", "encoder/norm/scale")),
        (["encoder/**", "!**/bias", "!**/scale"], ("encoder/dense/kernel",)),
        (["**/bias", "!**"], ()),
        (["**/bias", "**/bias"], ("encoder/dense/bias", "head/bias")),
    ],
)
def test_a_mask_means_what_matches_and_is_not_excluded(mask: patterns.Mask, found: tuple[str, ...]):
    hits = patterns.mask(mask, NAMES, PATH)
    assert tuple(name for name, hit in zip(NAMES, hits, strict=True) if hit) == found


@settings(max_examples=300, deadline=None)
@given(
    listed=st.lists(st.tuples(st.booleans(), PATTERNS), min_size=1, max_size=4),
    names=st.lists(LEAVES, min_size=1, max_size=6, unique=True),
)
def test_any_mask_is_an_error_or_the_names_within_and_not_without(listed: list[tuple[bool, str]], names: list[str]):
    """A pattern that itself begins with ! is no case: the first ! is taken off."""
    mask = [f"!{pattern}" if out else pattern for out, pattern in listed]

    def meant(pattern: str, name: str) -> bool:
        return means(pattern.split("/"), components(name))

    if not all(any(meant(pattern, name) for name in names) for _, pattern in listed):
        with pytest.raises(errors.SpecError, match="matches no parameter"):
            patterns.mask(mask, names, PATH)
        return
    within = [pattern for out, pattern in listed if not out] or ["**"]
    without = [pattern for out, pattern in listed if out]
    expected = [
        any(meant(pattern, name) for pattern in within) and not any(meant(pattern, name) for pattern in without)
        for name in names
    ]
    assert list(patterns.mask(mask, names, PATH)) == expected


@pytest.mark.parametrize("mask", ["**/gain", ["**", "**/gain"], ["**", "!**/gain"], "!**/gain"])
def test_a_pattern_of_a_mask_that_matches_nothing_is_named_with_the_names_there_are(mask: patterns.Mask):
    with pytest.raises(
        errors.SpecError, match="adamw.mask: pattern '!?...gain' matches no parameter; there are"
    ) as got:
        patterns.mask(mask, NAMES, PATH)
    assert all(repr(name) in str(got.value) for name in NAMES)
    assert got.value.subject == PATH
    assert got.value.got.endswith("**/gain")


def test_of_many_names_eight_are_listed_and_the_rest_counted():
    names = [f"layer{index}/{'x' * 100}" for index in range(1000)]
    with pytest.raises(errors.SpecError, match="'layer7/x{53}' and 992 more") as caught:
        patterns.mask("nothing", names, PATH)
    assert "layer8" not in str(caught.value)
    assert len(str(caught.value)) < limits.ERROR_MESSAGE_BYTES_MAX


def test_without_any_name_no_pattern_matches():
    assert patterns.mask(True, (), PATH) == ()
    with pytest.raises(errors.SpecError, match="matches no parameter"):
        patterns.mask("**", (), PATH)


# -------------------------------------------------------------------------------------------------------- groups


def test_the_first_pattern_that_matches_decides():
    assert patterns.groups(["**/bias", "encoder/**", "**"], NAMES, PATH) == (0, 1, 1, 0, 2)
    assert patterns.groups(["encoder/**", "**/bias", "**"], NAMES, PATH) == (0, 0, 0, 1, 2)
    assert patterns.groups(["**"], NAMES, PATH) == (0,) * 5


@settings(max_examples=300, deadline=None)
@given(
    listed=st.lists(PATTERNS, min_size=1, max_size=4, unique=True),
    names=st.lists(LEAVES, min_size=1, max_size=6, unique=True),
)
def test_any_groups_are_an_error_or_the_first_that_matches(listed: list[str], names: list[str]):
    listed = [*listed, "**"] if "**" not in listed else listed
    chosen = [
        next((k for k, pattern in enumerate(listed) if means(pattern.split("/"), components(name))), None)
        for name in names
    ]
    if set(chosen) == set(range(len(listed))):
        assert list(patterns.groups(listed, names, PATH)) == chosen
    else:
        with pytest.raises(errors.SpecError):
            patterns.groups(listed, names, PATH)


def test_a_group_that_others_leave_nothing_is_refused_with_what_takes_it():
    with pytest.raises(errors.SpecError) as caught:
        patterns.groups(["**/bias", "head/**", "head/bias", "**"], NAMES, "partition.transforms")
    assert str(caught.value) == (
        "partition.transforms['head/bias']: overlaps '**/bias', which comes first and takes all that it matches: "
        "'head/bias'"
    )
    assert caught.value.subject == "partition.transforms['head/bias']"


def test_a_group_that_several_take_together_names_them_all():
    with pytest.raises(errors.SpecError, match=r"overlaps '\*\*/bias', '\*\*/kernel', which"):
        patterns.groups(["**/kernel", "**/bias", "head/*", "**"], NAMES, PATH)


def test_groups_that_overlap_in_part_are_taken_in_their_order():
    assert patterns.groups(["head/**", "**/bias", "**"], NAMES, PATH) == (1, 2, 2, 0, 0)


def test_a_group_that_matches_nothing_is_refused():
    with pytest.raises(errors.SpecError, match="pattern '.*gain' matches no parameter") as caught:
        patterns.groups(["**/gain", "**"], NAMES, PATH)
    assert caught.value.subject == "adamw.mask['**/gain']"


def test_names_in_no_group_are_listed():
    with pytest.raises(errors.SpecError) as caught:
        patterns.groups(["**/bias"], NAMES, PATH)
    assert str(caught.value) == (
        "adamw.mask: in no group: 'encoder/dense/kernel', 'encoder/norm/scale', 'head/kernel'; "
        "a last group '**' takes the rest"
    )


def test_in_a_group_an_exclamation_mark_is_a_character():
    """Only masks exclude: in groups the order does what ``!`` would do."""
    assert patterns.groups(["!a", "**"], ["!a", "a"], PATH) == (0, 1)


# --------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("pattern", [None, 1, b"*", ["*"], "", "!", "x" * (limits.PATTERN_CHARS_MAX + 1)])
def test_what_is_no_pattern_is_refused(pattern: object):
    with pytest.raises(errors.SpecError, match="adamw.mask: .*expected a name pattern of at most 256 characters"):
        patterns.check(pattern, PATH)


def test_a_pattern_that_is_no_unicode_is_refused():
    with pytest.raises(errors.SpecError, match="expected a name pattern that is valid Unicode"):
        patterns.check("a/\ud800", PATH)


@pytest.mark.parametrize("pattern", ["*", "!*", "!!", " ", "[", "x" * limits.PATTERN_CHARS_MAX])
def test_any_other_text_is_a_pattern(pattern: str):
    patterns.check(pattern, PATH)


ADVERSARIAL = {
    "stars in one component": ("*a" * 127 + "b", "a" * limits.NAME_BYTES_MAX),
    "stars and question marks": ("*?" * 127 + "b", "a" * limits.NAME_BYTES_MAX),
    "stars alone": ("*" * 255 + "b", "a" * limits.NAME_BYTES_MAX),
    "classes": ("*[ab]" * 51, "a" * (limits.NAME_BYTES_MAX - 1) + "c"),
    "components": ("**/" + "*/" * 126 + "x", "/".join("a" * 512)),
    "any components": ("**/*/" * 50 + "x", "/".join("a" * 512)),
    "components that begin alike": ("**/" + "a/" * 100 + "b", "/".join("a" * 512)),
    "stars in components": ("**/" + "*a*/" * 60 + "b", "/".join(["aaa"] * 256)),
    "an open class": ("*[" * 127, "a[" * 512),
}


@pytest.mark.parametrize(("pattern", "name"), ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_no_pattern_takes_long(pattern: str, name: str):
    assert len(pattern) <= limits.PATTERN_CHARS_MAX
    assert len(name) <= limits.NAME_BYTES_MAX
    start_s = time.perf_counter()
    patterns.matches(pattern, name)
    assert time.perf_counter() - start_s < 1


def test_many_names_and_patterns_take_no_more_than_their_number():
    names = [f"block{block}/{part}/{leaf}" for block in range(64) for part in "qkvo" for leaf in ("kernel", "bias")]
    listed = [*(f"block{block}/**" for block in range(64)), "**"]
    start_s = time.perf_counter()
    with pytest.raises(errors.SpecError, match="overlaps 'block0/..', 'block1/..'"):
        patterns.groups(listed, names, PATH)
    assert patterns.groups(listed[:-1], names, PATH) == tuple(index // 8 for index in range(len(names)))
    assert time.perf_counter() - start_s < 2
