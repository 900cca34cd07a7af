"""Specs from text: ``chain(clip_by_global_norm(1.0), adamw(3e-4, weight_decay=0.1))``.

The grammar is docs/spec-grammar.md; ``str`` of a spec is the way back. Nothing is evaluated: a text is read once, from
left to right, and gives a spec or a SpecError. Whether the spec makes sense is the business of ``checks``. Standard
library only.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Final

from optwire_proto import errors, limits, specs
from optwire_proto.entries import Entry, Parameter

# Python's conversion takes time quadratic in the number of digits; what a number of 64 bits needs is at most 20.
_DIGITS_MAX: Final = 40
_ARRAY_NUMBERS_MAX: Final = limits.SPEC_ARRAY_BYTES_MAX // 4

_LITERALS: Final = {
    "True": True,
    "true": True,
    "False": False,
    "false": False,
    "None": None,
    "none": None,
    "null": None,
}
_NO_NUMBERS: Final = frozenset({"inf", "infinity", "nan"})
_A_NUMBER: Final = "a number such as 1, -2.5 or 1e-3"

# Each of these looks at a character once: whatever can follow a repetition cannot continue it.
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_COMMENT: Final = re.compile(r"#[^\n]*")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*")
_PARAMETER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NUMBER: Final = re.compile(r"[+-]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][+-]?[0-9][0-9_]*)?")
_PLAIN: Final = {quote: re.compile(rf"[^{quote}\\\r\n]*") for quote in "'\""}
_HEX: Final = re.compile(r"[0-9A-Fa-f]*")
_TOKEN: Final = re.compile(r"[\w.+-]{1,40}|.", re.DOTALL)

_ESCAPES: Final = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", "'": "'", '"': '"'}
_HEX_DIGITS: Final = {"x": 2, "u": 4, "U": 8}


def parse(text: str, entries: Mapping[str, Entry]) -> specs.Spec:
    """The spec that a text describes; ``parse(str(spec), entries) == spec``.

    Args:
      text: at most 512 KiB in UTF-8.
      entries: the catalogue, by name. Gives arguments without a name theirs; names that it does not have are kept, as
        the server may know more, but take arguments by name only.

    Raises:
      SpecError: the text is no spec. Says where in the spec and where in the text, with an excerpt.
    """
    _check_size(text)
    return _Parser(text, entries).spec()


def entry_name(name: str, entries: Mapping[str, Entry]) -> str:
    """The name in the catalogue of what Python knows as ``optax.adamw``, or ``name`` itself where there is none.

    What optax and the seed both have, the catalogue holds as "optax.adam" beside "adam"; optax's chain is ours.
    """
    if name == "optax.chain":
        return "chain"
    origin, _, short = name.rpartition(".")
    if origin in ("optax", "optax.contrib"):
        for candidate in (short, f"optax.{short}"):
            if candidate in entries and entries[candidate].origin == origin:
                return candidate
    return name


def _check_size(text: str) -> None:
    """Raises SpecError where a text is too long, or no Unicode, before anything is read."""
    try:
        # Where there are too many characters already, no copy is made to count the bytes.
        size = len(text) if len(text) > limits.SPEC_TEXT_FORM_BYTES_MAX else len(text.encode())
    except UnicodeEncodeError as exc:
        raise _error(text, exc.start, "spec", "text that is valid Unicode", ascii(text[exc.start])) from exc
    if size > limits.SPEC_TEXT_FORM_BYTES_MAX:
        expected, got = f"text of at most {limits.SPEC_TEXT_FORM_BYTES_MAX} bytes", f"at least {size} bytes"
        raise errors.SpecError(f"spec: {got}, expected {expected}", subject="spec", expected=expected, got=got)


def _error(text: str, at: int, subject: str, expected: str, got: str) -> errors.SpecError:
    """The error for what stands in a text at an offset, with at most 60 characters of its line and a caret below."""
    start = text.rfind("\n", 0, at) + 1
    end = text.find("\n", at)
    left = max(start, at - 30)
    excerpt = text[left : min(left + 60, end if end >= 0 else len(text))]
    # Neither tabs, which would move the caret, nor what a terminal would obey.
    excerpt = "".join(char if char.isprintable() else " " for char in excerpt)
    where = f"line {text.count(chr(10), 0, at) + 1}, column {at - start + 1}"
    message = f"{subject}: {got}, expected {expected}, at {where}\n    {excerpt}\n    {' ' * (at - left)}^"
    return errors.SpecError(message, subject=subject, expected=expected, got=got)


class _Parser:
    """One reading of one text: where it stands, and what it is inside of."""

    __slots__ = ("at", "calls", "depth", "entries", "path", "text", "values")

    def __init__(self, text: str, entries: Mapping[str, Entry]) -> None:
        self.text = text
        self.entries = entries
        self.at = 0  # offset of what is read next
        self.path: list[str] = []  # the place of the value being read, in pieces, as ``specs.places`` writes them
        self.calls = 0  # specs that are open
        self.depth = 0  # specs and lists that are open
        self.values = 0  # read or begun so far

    def spec(self) -> specs.Spec:
        """The whole text as one spec."""
        self._skip()
        start = self.at
        value = self._value()
        if not isinstance(value, specs.Spec):
            raise self._error("a name with arguments, such as adam(0.1)", specs.shown(value), at=start)
        if self._peek():
            raise self._error("the end of the text")
        return value

    # ---------------------------------------------------------------------------------------------------- values

    def _value(self) -> specs.Value:
        self.values += 1
        if self.values > limits.SPEC_VALUES_MAX:
            raise self._error(f"at most {limits.SPEC_VALUES_MAX} values in all", "more")
        char = self._peek()
        if char in ("'", '"'):
            return self._text()
        if char == "[":
            return self._list()
        if char == "(":
            return self._parenthesized()
        if char == "{":
            return self._mapping()
        if _starts_number(char):
            return self._number()
        return self._named()

    def _named(self) -> specs.Value:
        """What begins with a name: a literal, an array, a blob or a spec."""
        start = self.at
        name = self._match(_NAME)
        if not name:
            raise self._error("a value")
        if len(name) > limits.SPEC_NAME_BYTES_MAX:
            raise self._error(f"a name of at most {limits.SPEC_NAME_BYTES_MAX} bytes", f"{len(name)} bytes", at=start)
        if name == "array":
            return self._array(start)
        if name == "base64":
            return self._blob(start)
        called = self._peek() == "("
        if not called and name in _LITERALS:
            return _LITERALS[name]
        if not called and name.rpartition(".")[2].lower() in _NO_NUMBERS:
            raise self._error("a finite number", name, at=start)
        return self._call(name)

    def _number(self) -> int | float:
        """A number as Python writes it."""
        start, word = self.at, self._match(_NUMBER)
        following = self.text[self.at : self.at + 1]
        if not word or following.isalnum() or following in ("_", "."):
            self.at = start
            sign = self.text[start] in "+-"
            rest = _NAME.match(self.text, start + sign)
            infinite = rest is not None and rest[0].rpartition(".")[2].lower() in _NO_NUMBERS
            raise self._error("a finite number" if infinite else _A_NUMBER)
        digits = sum(map(str.isdecimal, word))
        if digits > _DIGITS_MAX:
            raise self._error(f"a number of at most {_DIGITS_MAX} digits", f"{digits} digits", at=start)
        try:
            number = _number(word)
        except ValueError as exc:
            raise self._error(_A_NUMBER, word, at=start) from exc
        if math.isinf(number):
            raise self._error("a finite number", word, at=start)
        return number

    def _text(self) -> str:
        """Text in quotes, as Python's ``repr`` writes it."""
        quote = self.text[self.at]
        self.at += 1
        pieces = []
        while True:
            pieces.append(self._match(_PLAIN[quote]))
            char = self.text[self.at : self.at + 1]
            if char == "\\":
                pieces.append(self._escape())
            elif char == quote:
                self.at += 1
                return "".join(pieces)
            else:
                raise self._error(f"a closing {quote}", "the end of the line" if char else "the end of the text")

    def _escape(self) -> str:
        """The character that an escape stands for."""
        start, kind = self.at, self.text[self.at + 1 : self.at + 2]
        self.at += 2
        if kind in _ESCAPES:
            return _ESCAPES[kind]
        size = _HEX_DIGITS.get(kind, 0)
        digits = self.text[self.at : self.at + size]
        if size and len(digits) == size and _HEX.fullmatch(digits):
            self.at += size
            code = int(digits, 16)
            if code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF:
                return chr(code)
            raise self._error("a character of Unicode", f"\\{kind}{digits}", at=start)
        got = repr(f"\\{kind}{digits}").replace("\\\\", "\\")
        raise self._error("an escape such as \\n \\t \\\\ \\' \\\" \\x7f \\u20ac \\U0001f600", got, at=start)

    # ------------------------------------------------------------------------------------------------- containers

    def _list(self) -> tuple[specs.Value, ...]:
        self.at += 1
        with self._deeper():
            return tuple([self._value_at(f"[{index}]") for index in self._items("]")])

    def _parenthesized(self) -> specs.Value:
        """A tuple, or a value in parentheses."""
        self.at += 1
        items: list[specs.Value] = []
        comma = False
        with self._deeper():
            while not self._take(")"):
                # Whether the first value is an item of a tuple shows only behind it.
                items.append(self._value_at(f"[{len(items)}]" if items else ""))
                comma = self._take(",")
                if not comma:
                    self._close(")")
                    break
        return items[0] if len(items) == 1 and not comma else tuple(items)

    def _mapping(self) -> tuple[specs.Value, ...]:
        """A mapping: a list of (key, value) pairs. Twice the same key is for ``checks`` to judge."""
        self.at += 1
        pairs = []
        with self._deeper(2):
            for index in self._items("}"):
                with self._place(f"[{index}]"):
                    key = self._key()
                    if not self._take(":"):
                        raise self._error("':'")
                pairs.append((key, self._value_at(self._pair_place(key, index))))
        return tuple(pairs)

    def _key(self) -> str | int:
        char, start = self._peek(), self.at
        if char in ("'", '"'):
            return self._text()
        key = self._number() if _starts_number(char) else None
        if not isinstance(key, int):
            raise self._error("text in quotes or a whole number as key", at=start)
        return key

    def _pair_place(self, key: str | int, index: int) -> str:
        """The place of a pair's value, which begins here: specs go by their key, all else by position."""
        self._skip()
        found = _NAME.match(self.text, self.at)
        if isinstance(key, str) and found and found[0] not in (*_LITERALS, "array", "base64"):
            return f"[{key!r}]"
        return f"[{index}][1]"

    # ---------------------------------------------------------------------------------------------------- specs

    def _call(self, name: str) -> specs.Spec:
        """A spec; its name was read."""
        name = entry_name(name, self.entries)
        if self.calls == limits.SPEC_DEPTH_MAX:
            raise self._error(f"at most {limits.SPEC_DEPTH_MAX} specs inside one another", name)
        self.calls += 1
        with self._place(f".{name}"), self._deeper():
            arguments = self._arguments(name) if self._take("(") else {}
        self.calls -= 1
        return specs.Spec(name, tuple(arguments.items()))

    def _arguments(self, name: str) -> dict[str, specs.Value]:
        """Arguments by position, then by name, up to the closing parenthesis."""
        entry = self.entries.get(name)
        positional = [parameter for parameter in entry.parameters if not parameter.keyword_only] if entry else []
        arguments: dict[str, specs.Value] = {}
        variadic: list[specs.Value] = []
        named = False
        for index in self._items(")"):
            keyword = self._keyword()
            named = named or bool(keyword)
            if not keyword:
                parameter = self._by_position(entry, name, positional, index, after_named=named)
                if parameter.variadic:
                    with self._deeper():
                        variadic.append(self._value_at(f".{parameter.name}[{len(variadic)}]"))
                    arguments[parameter.name] = ()  # keeps its place until the rest is read
                    continue
                keyword = parameter.name
            with self._place(f".{keyword}"):
                if keyword in arguments:
                    raise self._error("each argument once", f"{keyword} for the second time")
                arguments[keyword] = self._value()
        if variadic:
            arguments[positional[-1].name] = tuple(variadic)
        return arguments

    def _by_position(
        self, entry: Entry | None, name: str, positional: list[Parameter], index: int, *, after_named: bool
    ) -> Parameter:
        """The parameter that an argument without a name is for."""
        if after_named:
            raise self._error("name=value, as an argument before it has", "an argument without a name")
        if entry is None:
            hint = _suggestion(name, self.entries)
            raise self._error(f"name=value, as the catalogue has no {name}{hint}", "an argument without a name")
        if index < len(positional):
            return positional[index]
        if positional and positional[-1].variadic:
            return positional[-1]
        expected = f"at most {len(positional)} arguments without a name{_listed(': ', positional)}"
        by_name = [parameter for parameter in entry.parameters if parameter.keyword_only]
        raise self._error(f"{expected}{_listed('; by name only: ', by_name)}", f"number {index + 1}")

    def _keyword(self) -> str:
        """The name of an argument and its equals sign, or nothing where the argument has none."""
        self._skip()
        start = self.at
        keyword = self._match(_PARAMETER)
        if keyword and self._take("="):
            if len(keyword) > limits.SPEC_NAME_BYTES_MAX:
                expected = f"a name of at most {limits.SPEC_NAME_BYTES_MAX} bytes"
                raise self._error(expected, f"{len(keyword)} bytes", at=start)
            return keyword
        self.at = start
        return ""

    # ------------------------------------------------------------------------------------------- arrays and blobs

    def _array(self, start: int) -> specs.Array:
        """``array(numbers, element type, shape)``; its name was read."""
        self._open("array")
        numbers: list[int | float] = []
        nesting: tuple[int, ...] = ()
        dtype, shape = "", None
        for index in self._items(")"):
            self._skip()
            at = self.at
            if index == 0:
                nesting = self._nesting(numbers, 0)
            elif index == 1:
                dtype = self._quoted("an element type in quotes")
            elif index == 2:
                shape = self._value()
                if not isinstance(shape, tuple) or any(type(size) is not int for size in shape):
                    raise self._error("a shape such as [2, 3]", specs.shown(shape), at=at)
                # The nesting of an empty array does not show its other dimensions.
                if shape != nesting and not (nesting == (0,) and 0 in shape):
                    raise self._error(f"shape {list(nesting)}, as the numbers have", str(list(shape)), at=at)
            else:
                raise self._error("')' after numbers, element type and shape")
        if not nesting and not numbers:
            raise self._error("numbers, such as array([1.0, 2.0])", "nothing", at=start)
        dtype = dtype or ("i32" if numbers and all(isinstance(number, int) for number in numbers) else "f32")
        try:
            return specs.Array.of(dtype, nesting if shape is None else shape, tuple(numbers))
        except errors.SpecError as exc:
            raise self._error(exc.expected, exc.got, at=start) from exc

    def _nesting(self, numbers: list[int | float], rank: int) -> tuple[int, ...]:
        """Reads nested lists of numbers into one, and returns their shape."""
        char = self._peek()
        if _starts_number(char):
            if len(numbers) == _ARRAY_NUMBERS_MAX:
                raise self._error(f"an array of at most {_ARRAY_NUMBERS_MAX} numbers", "more")
            numbers.append(self._number())
            return ()
        if not self._take("["):
            raise self._error("a number or a list of numbers")
        if rank == limits.RANK_MAX:
            raise self._error(f"at most {limits.RANK_MAX} dimensions", "more")
        count, inner = 0, None
        for index in self._items("]"):
            self._skip()
            start, found = self.at, self._nesting(numbers, rank + 1)
            if inner is not None and found != inner:
                expected = f"shape {list(inner)}, as the items before it have"
                raise self._error(expected, f"an item of shape {list(found)}", at=start)
            count, inner = index + 1, found
        return (count, *(inner or ()))

    def _blob(self, start: int) -> specs.Blob:
        """``base64("...")``; its name was read."""
        self._open("base64")
        self._skip()
        at = self.at
        encoded = self._quoted("base64 in quotes")
        self._close(")")
        try:
            data = base64.b64decode(encoded, validate=True)
        except ValueError as exc:
            raise self._error("base64", specs.shown(encoded[:40]), at=at) from exc
        if base64.b64encode(data).decode() != encoded:  # bits that mean nothing, and would be lost
            raise self._error("base64 that ends in zero bits", specs.shown(encoded[-40:]), at=at)
        try:
            return specs.Blob(data)
        except errors.SpecError as exc:
            raise self._error(exc.expected, exc.got, at=start) from exc

    def _quoted(self, expected: str) -> str:
        if self._peek() not in ("'", '"'):
            raise self._error(expected)
        return self._text()

    # ------------------------------------------------------------------------------------------------------- steps

    def _value_at(self, place: str) -> specs.Value:
        with self._place(place):
            return self._value()

    @contextlib.contextmanager
    def _place(self, piece: str) -> Iterator[None]:
        """Inside, errors are about this place. After an error nothing is read, so nothing is put back."""
        self.path.append(piece)
        yield
        self.path.pop()

    @contextlib.contextmanager
    def _deeper(self, levels: int = 1) -> Iterator[None]:
        self.depth += levels
        if self.depth > limits.SPEC_WIRE_DEPTH_MAX:
            raise self._error(f"at most {limits.SPEC_WIRE_DEPTH_MAX} specs and lists inside one another", "more")
        yield
        self.depth -= levels

    def _items(self, closing: str) -> Iterator[int]:
        """Stops before every item of a list, with its index, for the caller to read it; ends behind the bracket."""
        index = 0
        while not self._take(closing):
            yield index
            index += 1
            if not self._take(","):
                self._close(closing)
                return

    def _open(self, name: str) -> None:
        if not self._take("("):
            raise self._error(f"'(' after {name}")

    def _close(self, closing: str) -> None:
        if not self._take(closing):
            raise self._error(f"',' or '{closing}'")

    def _take(self, char: str) -> bool:
        """Whether this character comes next; if so, it is read."""
        if self._peek() != char:
            return False
        self.at += 1
        return True

    def _peek(self) -> str:
        """The next character that means something, or nothing at the end."""
        self._skip()
        return self.text[self.at : self.at + 1]

    def _skip(self) -> None:
        """Reads space and comments."""
        while True:
            self._match(_SPACE)
            if not self._match(_COMMENT):
                return

    def _match(self, pattern: re.Pattern[str]) -> str:
        """Reads what a pattern finds here, if anything."""
        found = pattern.match(self.text, self.at)
        if found is None:
            return ""
        self.at = found.end()
        return found[0]

    def _error(self, expected: str, got: str = "", *, at: int | None = None) -> errors.SpecError:
        """The error for what stands at an offset, here if none is given."""
        at = self.at if at is None else at
        token = _TOKEN.match(self.text, at)
        came = got or (repr(token[0]) if token else "the end of the text")
        subject = "".join(self.path).lstrip(".")[-200:] or "spec"
        return _error(self.text, at, subject, expected, came)


def _starts_number(char: str) -> bool:
    return char.isdecimal() or char in ("+", "-", ".")


def _number(word: str) -> int | float:
    """A number as Python reads it; raises ValueError where it would not."""
    digits = word.lstrip("+-").replace("_", "")
    if not digits.isdecimal():
        return float(word)
    if digits.startswith("0") and digits.strip("0"):
        raise ValueError(f"{word}: leading zeros")  # 010 is 8 in some languages and 10 in others
    return int(word)


def _listed(before: str, parameters: list[Parameter]) -> str:
    return before + ", ".join(parameter.name for parameter in parameters) if parameters else ""


def _suggestion(name: str, entries: Mapping[str, Entry]) -> str:
    """The name that was meant, perhaps."""
    for wanted in (name.rpartition(".")[2], name):
        for close in difflib.get_close_matches(wanted, entries, n=1):
            return f"; did you mean {close}?"
    return ""
