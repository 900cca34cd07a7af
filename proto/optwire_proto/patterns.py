"""Name patterns: which leaves a mask or a group means.

A leaf's name is a path, ``encoder/dense/kernel``. In a pattern ``*`` stands for any text within one component, ``?``
for one character, ``[ab]`` for one of several, and ``**`` for any number of whole components, none included. The single
array of a tree that is one array has the empty name, which ``**`` matches. Standard library only.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence
from typing import Any

from optwire_proto import errors, limits, specs


def check(pattern: Any, path: str) -> None:
    """Raises SpecError where a value is no pattern."""
    if not isinstance(pattern, str) or not pattern.removeprefix("!") or len(pattern) > limits.PATTERN_CHARS_MAX:
        raise specs.wrong(path, f"a name pattern of at most {limits.PATTERN_CHARS_MAX} characters", pattern)
    if pattern.encode(errors="replace").decode() != pattern:
        raise specs.wrong(path, "a name pattern that is valid Unicode", pattern)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a whole name; in time proportional to the product of their components."""
    wanted, parts = pattern.split("/"), name.split("/") if name else []
    # reached[k]: the components of the pattern so far match the first k of the name
    reached = [True] + [False] * len(parts)
    for component in wanted:
        if component == "**":
            first = reached.index(True) if True in reached else len(reached)
            reached = [k >= first for k in range(len(reached))]
        else:
            reached = [False] + [reached[k] and fnmatch.fnmatchcase(part, component) for k, part in enumerate(parts)]
    return reached[-1]


def work(patterns: Sequence[str], names: Sequence[str]) -> int:
    """What matching costs at worst: each character of a pattern against each of a name."""
    return sum(map(len, patterns)) * sum(map(len, names))


Mask = str | bool | Sequence[str]


def mask(value: Mask, names: Sequence[str], path: str) -> tuple[bool, ...]:
    """For each name whether a mask means it: it matches a pattern, and none that begins with ``!``.

    Patterns with ``!`` alone mean all but what they match.

    Raises:
      SpecError: a pattern matches no name.
    """
    if isinstance(value, bool):
        return (value,) * len(names)
    return _mask((value,) if isinstance(value, str) else tuple(value), tuple(names), path)


@functools.lru_cache(maxsize=32)  # one spec is built several times
def _mask(listed: tuple[str, ...], names: tuple[str, ...], path: str) -> tuple[bool, ...]:
    found = {pattern: [matches(pattern.removeprefix("!"), name) for name in names] for pattern in listed}
    for pattern, hits in found.items():
        if not any(hits):
            raise _no_match(pattern, names, path)
    out = [hits for pattern, hits in found.items() if pattern.startswith("!")]
    into = [hits for pattern, hits in found.items() if not pattern.startswith("!")]
    return tuple(
        (not into or any(hits[k] for hits in into)) and not any(hits[k] for hits in out) for k in range(len(names))
    )


def groups(patterns: Sequence[str], names: Sequence[str], path: str) -> tuple[int, ...]:
    """For each name the index of the first pattern that matches it.

    Raises:
      SpecError: a name that no pattern matches; a pattern that matches nothing, or nothing that an earlier one left.
    """
    return _groups(tuple(patterns), tuple(names), path)


@functools.lru_cache(maxsize=32)
def _groups(patterns: tuple[str, ...], names: tuple[str, ...], path: str) -> tuple[int, ...]:
    chosen: list[int | None] = [None] * len(names)
    for index, pattern in enumerate(patterns):
        hits = [k for k, name in enumerate(names) if matches(pattern, name)]
        if not hits:
            raise _no_match(pattern, names, f"{path}[{pattern!r}]")
        left = [k for k in hits if chosen[k] is None]
        if not left:
            earlier = sorted({patterns[chosen[k] or 0] for k in hits})
            raise errors.SpecError(
                f"{path}[{pattern!r}]: overlaps {', '.join(map(repr, earlier))}, which comes first and takes all that "
                f"it matches: {_listed([names[k] for k in hits])}",
                subject=f"{path}[{pattern!r}]",
                expected="a pattern that matches what earlier ones leave",
                got=pattern,
            )
        for k in left:
            chosen[k] = index
    missing = [name for name, index in zip(names, chosen, strict=True) if index is None]
    if missing:
        raise errors.SpecError(
            f"{path}: in no group: {_listed(missing)}; a last group '**' takes the rest",
            subject=path,
            expected="every parameter in a group",
            got=_listed(missing),
        )
    return tuple(index for index in chosen if index is not None)


def _no_match(pattern: str, names: Sequence[str], path: str) -> errors.SpecError:
    return errors.SpecError(
        f"{path}: pattern {pattern!r} matches no parameter; there are {_listed(names)}",
        subject=path,
        expected=f"a pattern that matches one of {_listed(names)}",
        got=pattern,
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:60]) for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
