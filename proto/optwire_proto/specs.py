"""Optimizers described as data: what a spec is, its canonical text, its digest, and the paths inside it.

What may be described, and with which arguments, is the catalogue's business (``catalogue``, ``checks``). Standard
library only.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import struct
from collections.abc import Callable, Iterator
from typing import Any, Final

from optwire_proto import errors, limits

# What an argument may be: None, a flag, a whole or real number, text, a Spec, an Array, a Blob, or a tuple of values.
Value = Any


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """A named constructor and its arguments: an optimizer, a transformation or a schedule.

    Build one with ``optwire.optimizers`` and ``optwire.optax``, or from text; ``checks.check`` completes and validates
    it. ``str`` gives the canonical text, from which ``spec_text.parse`` makes the same spec again.

    Attributes:
      name: name in the catalogue.
      arguments: (parameter name, value) pairs; lists are tuples.
    """

    name: str
    arguments: tuple[tuple[str, Value], ...] = ()

    def __getitem__(self, parameter: str) -> Value:
        """The value of an argument; raises KeyError where it was not given."""
        return dict(self.arguments)[parameter]

    def replace(self, **arguments: Value) -> Spec:
        """The same spec with some arguments changed; order kept."""
        merged = dict(self.arguments) | arguments
        return Spec(self.name, tuple(merged.items()))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={canonical(value)}' for name, value in self.arguments)})"


# Element type of an Array -> how `struct` spells one element.
_FORMATS: Final = {"f32": "f", "f64": "d", "i32": "i", "i64": "q"}


@dataclasses.dataclass(frozen=True, slots=True)
class Array:
    """A small array as an argument.

    Attributes:
      dtype: one of "f32", "f64", "i32", "i64".
      shape: at most 8 dimensions.
      data: the elements, little-endian, row-major; at most 64 KiB.

    Raises:
      SpecError: shape, element type and bytes do not fit each other, or a number is not finite.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        if self.dtype not in _FORMATS:
            raise wrong("array", f"element type {' '.join(_FORMATS)}", self.dtype)
        if len(self.shape) > limits.RANK_MAX or any(not 0 <= size <= limits.DIM_MAX for size in self.shape):
            raise wrong("array", f"at most {limits.RANK_MAX} dimensions from 0 up", self.shape)
        if len(self.data) > limits.SPEC_ARRAY_BYTES_MAX:
            raise wrong("array", f"at most {limits.SPEC_ARRAY_BYTES_MAX} bytes", f"{len(self.data)} bytes")
        expected = struct.calcsize(f"<{_FORMATS[self.dtype]}") * math.prod(self.shape)
        if len(self.data) != expected:
            raise wrong("array", f"{expected} bytes for {self.dtype}{list(self.shape)}", f"{len(self.data)} bytes")
        if not all(map(math.isfinite, self.numbers)):  # the text has no word for them
            raise wrong("array", "finite numbers", self.numbers)

    @classmethod
    def of(cls, dtype: str, shape: tuple[int, ...], numbers: tuple[int | float, ...]) -> Array:
        """An array of Python numbers in row-major order; raises SpecError where one does not fit the element type."""
        if dtype not in _FORMATS:
            raise wrong("array", f"element type {' '.join(_FORMATS)}", dtype)
        try:
            return cls(dtype, shape, struct.pack(f"<{len(numbers)}{_FORMATS[dtype]}", *numbers))
        except (struct.error, OverflowError) as exc:
            raise wrong("array", f"numbers that {dtype} can hold", numbers) from exc

    @property
    def numbers(self) -> tuple[int | float, ...]:
        """The elements in row-major order."""
        return struct.unpack(f"<{math.prod(self.shape)}{_FORMATS[self.dtype]}", self.data)

    def __str__(self) -> str:
        return f"array({_nested(list(self.numbers), self.shape)}, {canonical(self.dtype)}, {canonical(self.shape)})"


@dataclasses.dataclass(frozen=True, slots=True)
class Blob:
    """Bytes as an argument: an exported program.

    Attributes:
      data: at most 256 KiB.
    """

    data: bytes = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        if len(self.data) > limits.SPEC_BLOB_BYTES_MAX:
            raise wrong("blob", f"at most {limits.SPEC_BLOB_BYTES_MAX} bytes", f"{len(self.data)} bytes")

    def __str__(self) -> str:
        return f'base64("{base64.b64encode(self.data).decode()}")'


def digest(spec: Spec) -> str:
    """SHA-256 of the canonical text, in hexadecimal digits."""
    return hashlib.sha256(str(spec).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------- paths


def places(value: Value, path: str = "") -> Iterator[tuple[str, Value]]:
    """Every value inside a spec with its path, outermost first: ``chain.members[1].adam.step_size``.

    A spec adds its name to the path, an argument its own, a list the index in brackets; in a list of (text, spec)
    pairs, such as the groups of a partition, the text stands in the place of the index.
    """
    yield path, value
    if isinstance(value, Spec):
        inside = f"{path}.{value.name}" if path else value.name
        for name, argument in value.arguments:
            yield from places(argument, f"{inside}.{name}")
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            if _is_group(item):
                yield from places(item[1], f"{path}[{item[0]!r}]")
            else:
                yield from places(item, f"{path}[{index}]")


def replaced(value: Value, changes: dict[str, Value], path: str = "") -> Value:
    """The same spec with other values at some paths, as ``places`` has them."""
    if path in changes:
        return changes[path]
    if isinstance(value, Spec):
        inside = f"{path}.{value.name}" if path else value.name
        arguments = tuple((name, replaced(argument, changes, f"{inside}.{name}")) for name, argument in value.arguments)
        return Spec(value.name, arguments)
    if isinstance(value, tuple | list):
        return tuple(
            (item[0], replaced(item[1], changes, f"{path}[{item[0]!r}]"))
            if _is_group(item)
            else replaced(item, changes, f"{path}[{index}]")
            for index, item in enumerate(value)
        )
    return value


def ends_with(path: str, end: str) -> bool:
    """Whether a path is ``end``, or ends with it after a dot."""
    return path == end or path.endswith(f".{end}")


def any_inside(value: Value, test: Callable[[Spec], bool]) -> bool:
    """Whether any spec inside, or the spec itself, passes a test."""
    return any(isinstance(found, Spec) and test(found) for _, found in places(value))


def _is_group(item: Value) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Spec)


# ------------------------------------------------------------------------------------------------------- text


def canonical(value: Value) -> str:
    """A value as the canonical text has it: every number and text as Python writes it, pairs as a mapping."""
    if isinstance(value, tuple | list):
        if value and all(_is_pair(item) for item in value):
            return f"{{{', '.join(f'{canonical(key)}: {canonical(item)}' for key, item in value)}}}"
        return f"[{', '.join(map(canonical, value))}]"
    if isinstance(value, Spec | Array | Blob):
        return str(value)
    if isinstance(value, int) and value.bit_length() > 1024:  # Python refuses to write down the longest
        return f"a whole number of {value.bit_length()} bits"
    return repr(value)


def shown(value: Value) -> str:
    """A value in a message: as ``canonical``, cut to 80 characters, a blob by its digest."""
    if isinstance(value, Blob):
        return f"{len(value.data)} bytes, sha256 {hashlib.sha256(value.data).hexdigest()[:16]}…"
    if isinstance(value, tuple | list) and len(value) > limits.SPEC_LIST_MAX:
        return f"a list of {len(value)} values"
    if isinstance(value, str | bytes):
        return repr(value[:80])[:80]
    return canonical(value)[:80]


def wrong(path: str, expected: str, value: Value) -> errors.SpecError:
    """The error for a value that an argument cannot take."""
    got = shown(value)
    return errors.SpecError(
        f"{path[-200:]}: {got}, expected {expected}", subject=path[-200:], expected=expected, got=got
    )


def is_number(value: Value) -> bool:
    """Whether an argument can be this number: finite, also in 32 bits."""
    if isinstance(value, int):
        # JAX takes whole numbers as 32 bits; larger ones must say that they are real numbers: 2.0**40.
        return not isinstance(value, bool) and -(2**31) <= value < 2**31
    return isinstance(value, float) and abs(value) <= limits.SPEC_NUMBER_MAX  # False for NaN


def check_shape(spec: Any) -> None:
    """Raises SpecError unless a spec has a name and (name, value) pairs, as its types say."""
    if not isinstance(spec.name, str):
        raise wrong("spec", "text", spec.name)
    arguments = spec.arguments if isinstance(spec.arguments, tuple | list) else (spec.arguments,)
    for argument in arguments:
        if not isinstance(argument, tuple | list) or len(argument) != 2 or not isinstance(argument[0], str):
            raise wrong(f"{spec.name[:80]}: arguments", "(name, value) pairs", argument)


def _is_pair(item: Value) -> bool:
    """Whether an item reads best as ``key: value``."""
    return (
        isinstance(item, tuple | list)
        and len(item) == 2
        and isinstance(item[0], str | int)
        and not isinstance(item[0], bool)
    )


def _nested(flat: list[int | float], shape: tuple[int, ...]) -> str:
    """Elements of an array as nested lists."""
    if not shape:
        return repr(flat[0])
    row = math.prod(shape[1:])
    rows = [flat[start : start + row] for start in range(0, len(flat), row)] if row else []
    return f"[{', '.join(_nested(part, shape[1:]) for part in rows)}]"
