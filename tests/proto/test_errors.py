"""The tree of errors: all of it in the table, by names that programs may lean on."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

import optwire
from optwire_proto import errors


def subclasses(kind: type[errors.OptwireError]) -> Iterator[type[errors.OptwireError]]:
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from subclasses(child)


ALL = list(subclasses(errors.OptwireError))


def test_every_error_is_in_the_table_under_its_own_reason():
    assert {kind for _, kind in errors.TABLE.values()} == set(ALL)
    assert len(errors.TABLE) == len(ALL), "two errors have one reason"
    for reason, (code, kind) in errors.TABLE.items():
        assert (reason, code) == (kind.reason, kind.code)


@pytest.mark.parametrize("kind", ALL, ids=[kind.__name__ for kind in ALL])
def test_codes_are_those_of_grpc(kind: type[errors.OptwireError]):
    assert kind.code in grpc.StatusCode.__members__
    assert kind.code not in ("OK", "UNKNOWN")


def test_only_a_defect_is_internal():
    assert [kind.__name__ for kind in ALL if kind.code == "INTERNAL"] == ["InternalError"]


def test_every_error_is_public():
    assert {kind.__name__ for kind in ALL} | {"OptwireError"} <= set(optwire.__all__)
    assert all(getattr(optwire, kind.__name__) is kind for kind in ALL)


@pytest.mark.parametrize("kind", ALL, ids=[kind.__name__ for kind in ALL])
def test_an_error_says_why_in_its_docstring_and_its_name(kind: type[errors.OptwireError]):
    assert kind.__doc__
    assert kind.__name__.endswith("Error")
    assert kind.reason == kind.reason.upper()


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.SpecError, ValueError),
        (errors.TreeMismatchError, ValueError),
        (errors.SessionNotFoundError, LookupError),
        (errors.UnavailableError, ConnectionError),
        (errors.DeadlineError, TimeoutError),
    ],
)
def test_errors_are_also_what_python_calls_them(kind: type[errors.OptwireError], builtin: type[Exception]):
    assert issubclass(kind, builtin)
    with pytest.raises(builtin, match="what happened"):
        raise kind("what happened")


def test_the_tree_in_the_docstring_is_the_tree():
    assert errors.__doc__
    drawn = {
        line.strip(" │├└─").split()[0]: line.index(line.strip(" │├└─"))
        for line in errors.__doc__.splitlines()
        if "Error" in line and "─" in line
    }
    assert set(drawn) == {kind.__name__ for kind in ALL}
    for kind in ALL:
        parent = next(base for base in kind.__mro__[1:] if base in ALL or base is errors.OptwireError)
        assert (drawn[kind.__name__] > 8) == (parent is not errors.OptwireError)


def test_every_attribute_is_kept():
    error = errors.StaleStepError("m", subject="s", expected="e", got="g", step=0, retry_after_s=1.5)
    assert (str(error), error.subject, error.expected, error.got, error.step, error.retry_after_s) == (
        "m",
        "s",
        "e",
        "g",
        0,
        1.5,
    )
    bare = errors.StaleStepError("m")
    assert (bare.subject, bare.expected, bare.got, bare.step, bare.retry_after_s) == ("", "", "", None, 0.0)


@pytest.mark.parametrize("code", [code.name for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_becomes_an_error_of_ours(code: str):
    error = errors.from_status(code, "", "m")
    assert isinstance(error, errors.OptwireError)
    assert str(error) == "m"
    if code in {kind.code for kind in ALL} - {"CANCELLED"}:
        assert error.code == code or error.code in ("FAILED_PRECONDITION",)


@pytest.mark.parametrize("reason", errors.TABLE)
def test_a_reason_of_ours_decides_whatever_the_code(reason: str):
    assert type(errors.from_status("UNKNOWN", reason, "m", subject="s")) is errors.TABLE[reason][1]
