"""A client's program taken apart: its instructions as data, checked when read, replayed as ordinary JAX.

The listing is what crosses from the child process that parses a file (``artifact``) into the server, as JSON. The
server trusts none of it: what is not in the tables of ``operations``, in range and of the right form is refused, so a
child that a file has taken over can do no more than send another listing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax.numpy as jnp
import numpy as np
from jax import lax

from optwire_proto import errors, limits, tensors
from optwire_server.engine import operations

# The values a program starts with: step, rate, grad, param; the slots follow.
INPUTS = 4
# A program that keeps more state than this beside each parameter is a mistake.
SLOTS_MAX = 16
# A JSON number for each dimension and operand, and constants twice as long as in the file.
TEXT_BYTES_MAX = 32 * limits.SPEC_BLOB_BYTES_MAX


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a program may take. Of the times, those of the server's machine count; 0 allows nothing.

    Attributes:
      bytes_max: of the file. An exported Adam takes 5 kB.
      ops_max: instructions, functions inlined; compiling grows with them. Adam has 56.
      growth_max: bytes of one value, relative to the leaf. Products of a matrix with its transpose take a few; an outer
        product of a vector with itself takes its length.
      spare_bytes: what one value may have in any case, so that small leaves are not refused for a small table.
      flops_max: additions and multiplications of one update of one leaf, before the clock is asked.
      read_s: seconds to parse the file, in a process of its own.
      compile_s: seconds to compile for all leaves of a session.
      step_s: seconds of one update of all leaves: it holds up the other sessions for as long.
      memory_bytes: of the process that reads or tries, over what an idle one has and the arrays themselves.
      wait_s: seconds to wait for the programs of others, which are tried one at a time.
    """

    bytes_max: int = limits.SPEC_BLOB_BYTES_MAX
    ops_max: int = 2000
    growth_max: int = 16
    spare_bytes: int = limits.MIB
    flops_max: int = 2**40
    read_s: float = 10.0
    compile_s: float = 20.0
    step_s: float = 5.0
    memory_bytes: int = 1024 * limits.MIB
    wait_s: float = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class Listing:
    """The instructions of a program. ``shape`` is None where one program serves all lengths.

    Raises:
      SpecError: something that no listing has.
    """

    slots: int
    dtype: str
    shape: tuple[int, ...] | None
    instructions: tuple[operations.Instruction, ...]
    outputs: tuple[int, ...]

    def __post_init__(self) -> None:
        _expect(_is_integer(self.slots) and 0 <= self.slots <= SLOTS_MAX, f"at most {SLOTS_MAX} slots", self.slots)
        _expect(self.dtype in ("f32", "f64", "bf16", "f16"), "a floating-point element type", self.dtype)
        _expect(self.shape is None or _is_shape(self.shape, least=0), "a shape", self.shape)
        for number, instruction in enumerate(self.instructions):
            _check(instruction, INPUTS + self.slots + number)
        values = INPUTS + self.slots + len(self.instructions)
        _expect(len(self.outputs) == 1 + self.slots, "a parameter and the slots as results", self.outputs)
        _expect(_are_integers(self.outputs, below=values), "results among the values", self.outputs)

    def update(self, inputs: Sequence[Any], most: Limits) -> tuple[Any, ...]:
        """``(param, *slots)`` made of ``(step, rate, grad, param, *slots)``; for tracing, which allocates nothing.

        A program for all lengths sees a leaf flattened, and an empty leaf not at all. An elementwise one cannot tell,
        so it is spared the flattening, and what is traced shows that it is elementwise.

        Raises:
          SpecError: the program does not fit these shapes, or becomes larger than the limits allow.
        """
        step, rate, *leaves = inputs
        shape = leaves[0].shape
        if self.shape is None and leaves[0].size == 0:
            return tuple(leaves[1:])
        scalars = [lax.convert_element_type(step, np.int32), lax.convert_element_type(rate, np.float32)]
        if self.shape is not None or self.elementwise:
            return tuple(self._replay([*scalars, *leaves], most))
        flat = [lax.reshape(leaf, (leaf.size,)) for leaf in leaves]
        return tuple(lax.reshape(result, shape) for result in self._replay([*scalars, *flat], most))

    def _replay(self, inputs: list[Any], most: Limits) -> list[Any]:
        leaf = inputs[INPUTS - 1]
        unflattened = leaf.shape if self.shape is None and len(leaf.shape) != 1 else None
        values = list(inputs)
        bytes_max = most.growth_max * leaf.size * leaf.dtype.itemsize + most.spare_bytes
        flops = 0
        for instruction in self.instructions:
            operands = [values[number] for number in instruction.operands]
            value = _apply(instruction, operands, unflattened)
            nbytes = value.size * value.dtype.itemsize
            if nbytes > bytes_max:
                raise _large(f"a value of {nbytes} bytes", f"at most {bytes_max} bytes", instruction.name, leaf)
            flops += operations.flops(instruction, operands, value)
            if flops > most.flops_max:
                raise _large(f"{flops} operations", f"at most {most.flops_max}", instruction.name, leaf)
            values.append(value)
        results = [values[number] for number in self.outputs]
        for result in results:
            got = f"{result.dtype}{list(result.shape)}"
            _expect(result.shape == leaf.shape and result.dtype == leaf.dtype, "results like the parameter", got)
        return results

    @property
    def elementwise(self) -> bool:
        """Whether each element of the results depends on the same element of the inputs and on scalars only.

        Then the program may run on any piece of a leaf, or on several leaves laid end to end. A program in whose values
        the length of the leaf shows is not: a piece has another length.
        """
        # Known without the inputs, but for the length; and what depends on the length, or on the place in an array.
        known, positional = set[int](), set[int]()
        for number, instruction in enumerate(self.instructions, INPUTS + self.slots):
            operands = set(instruction.operands)
            if instruction.name in ("broadcast_in_dim", "dynamic_broadcast_in_dim") and not instruction["dimensions"]:
                # A scalar, spread. The second operand, where there is one, is a shape and may depend on the length.
                if instruction.operands[0] in positional:
                    positional.add(number)
            elif operands <= known:
                known.add(number)
                if instruction.name == "get_dimension_size" or instruction.shape or operands & positional:
                    positional.add(number)
            elif instruction.name == "get_dimension_size":
                known.add(number)
                positional.add(number)
            elif instruction.name not in operations.ELEMENTWISE or operands & positional:
                return False
        return not positional & set(self.outputs)

    def to_json(self) -> str:
        """The listing as text."""
        steps = [
            [step.name, step.operands, step.shape, step.dtype, dict(step.attributes)] for step in self.instructions
        ]
        return json.dumps([self.slots, self.dtype, self.shape, steps, self.outputs], separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Listing:
        """The listing in a text.

        Raises:
          SpecError: the text is no listing.
        """
        try:
            slots, dtype, shape, steps, outputs = json.loads(text)
            instructions = tuple(
                operations.Instruction(name, tuple(operands), tuple(result), kind, dict(attributes))
                for name, operands, result, kind, attributes in steps
            )
            return cls(slots, dtype, None if shape is None else tuple(shape), instructions, tuple(outputs))
        except (ValueError, TypeError, RecursionError) as exc:
            if isinstance(exc, errors.SpecError):
                raise
            raise refusal("a program that can be taken apart", "something else") from exc


def refusal(expected: str, got: object, *, problem: str = "") -> errors.SpecError:
    """The error for a program that is not served; ``problem`` says it where "expected, got" would not be a sentence."""
    came, wanted = _printable(str(got), 200), _printable(expected, 200)
    message = _printable(problem, 400) or f"expected {wanted}, got {came}"
    return errors.SpecError(f"program: {message}", subject="program", expected=wanted, got=came)


def _printable(text: str, chars_max: int) -> str:
    """A text that may quote names out of a file, fit for a terminal and a log."""
    return "".join(char if char.isprintable() else "?" for char in text[:chars_max])


def _apply(instruction: operations.Instruction, operands: Sequence[Any], unflattened: tuple[int, ...] | None) -> Any:
    """The value of an instruction; raises SpecError unless it is what the file says it is.

    Where an array ``unflattened`` stands for one of its length, as many elements are that array's shape.
    """
    known = all(isinstance(operand, np.ndarray) for operand in operands)
    if not known and tensors.itemsize(instruction.dtype) == 8 and jnp.result_type(float) != np.float64:
        what = f"{instruction.name} computes in {instruction.dtype}, which is served for float64 parameters only"
        raise refusal("element types of at most 32 bits", instruction.dtype, problem=what)
    try:
        value = operations.apply(instruction, operands, unflattened)
    except Exception as exc:
        # The boundary to a client's program: whatever JAX says of operands that do not fit each other.
        raise refusal(f"operands that {instruction.name} can take", f"{type(exc).__name__}: {exc}") from exc
    sizes = zip(instruction.shape, value.shape, strict=False)
    fits = all(declared in (operations.DYNAMIC, size) for declared, size in sizes)
    fits = fits and len(value.shape) == len(instruction.shape)
    if unflattened is not None and value.shape == unflattened:
        fits = instruction.shape in ((operations.DYNAMIC,), unflattened)
    if not fits or value.dtype != tensors.numpy_dtype(instruction.dtype):
        expected = f"{instruction.name} to give {instruction.dtype}{list(instruction.shape)}"
        raise refusal(expected, f"{value.dtype}{list(value.shape)}")
    return value


def _large(what: str, expected: str, name: str, leaf: Any) -> errors.SpecError:
    shape = f"{leaf.dtype}{list(leaf.shape)}"
    return refusal(expected, what, problem=f"{name} makes {what} for a parameter {shape}, expected {expected}")


def _check(instruction: operations.Instruction, number: int) -> None:
    """Raises SpecError for an instruction that could not be replayed. ``number`` is that of its result."""
    name = instruction.name
    _expect(name in operations.NAMES, "an operation that is served", name)
    _expect(_are_integers(instruction.operands, below=number), "operands before their use", instruction.operands)
    _expect(_is_shape(instruction.shape, least=operations.DYNAMIC), "a shape", instruction.shape)
    _expect(instruction.dtype in tensors.DTYPE_NAMES, "an element type", instruction.dtype)
    forms = operations.ATTRIBUTES.get(name, {})
    found = instruction.attributes.keys()
    _expect(found == forms.keys(), f"{name} with {', '.join(forms) or 'no attributes'}", ", ".join(found))
    for attribute, form in forms.items():
        _expect(_FORMS[form](instruction[attribute]), f"{name}.{attribute} to be {form}", instruction[attribute])
    if name == "constant":
        length = math.prod(instruction.shape) * tensors.itemsize(instruction.dtype)
        _expect(len(instruction["data"]) == 2 * length, f"a constant of {length} bytes", len(instruction["data"]) // 2)


def _expect(condition: bool, expected: str, got: object) -> None:  # noqa: FBT001 - reads as an assertion
    if not condition:
        raise refusal(expected, got)


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _are_integers(values: object, *, below: int) -> bool:
    return isinstance(values, (list, tuple)) and all(_is_integer(value) and 0 <= value < below for value in values)


def _is_shape(shape: object, *, least: int) -> bool:
    if not isinstance(shape, (list, tuple)) or len(shape) > limits.RANK_MAX:
        return False
    return all(_is_integer(size) and least <= size <= limits.DIM_MAX for size in shape)


def _is_hex(value: object) -> bool:
    return isinstance(value, str) and len(value) % 2 == 0 and all(char in "0123456789abcdef" for char in value)


_FORMS: dict[str, Callable[[Any], bool]] = {
    "bytes": _is_hex,
    "comparison": lambda value: isinstance(value, str) and value in operations.COMPARISONS,
    "integer": lambda value: _is_integer(value) and 0 <= value <= limits.DIM_MAX,
    "integers": lambda values: _are_integers(values, below=limits.DIM_MAX + 1) and len(values) <= limits.RANK_MAX,
    "precisions": lambda values: len(values) in (0, 2) and all(value in operations.PRECISIONS for value in values),
    "reducer": lambda value: isinstance(value, str) and value in operations.REDUCERS,
}
