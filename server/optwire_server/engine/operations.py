"""The operations that an imported program may have: what each one checks, and what it is in JAX.

A program is replayed from this table, so an operation that is not in it cannot happen: there is no loop, no branch, no
call out of the program, no random number and no device. Knows neither files nor limits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from optwire_proto import tensors

# An integer, a list of integers, a word, a list of words: what the attribute of an operation may be.
Attribute = int | str | list[int] | list[str]
# A dimension that depends on the length of the leaf.
DYNAMIC = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One operation of a program: ``operands`` are numbers of earlier values, the result is the next one.

    ``shape`` may have DYNAMIC dimensions; ``dtype`` is the protocol's name of the element type.
    """

    name: str
    operands: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    attributes: Mapping[str, Attribute]

    def __getitem__(self, attribute: str) -> Any:
        return self.attributes[attribute]


def apply(instruction: Instruction, operands: Sequence[Any], unflattened: tuple[int, ...] | None = None) -> Any:
    """The value of an instruction. Operands are JAX values, or NumPy arrays where they are known when tracing.

    ``unflattened``, if given, is the shape of the arrays that an elementwise program takes for flat ones.

    Raises:
      Exception: whatever JAX raises for operands that do not fit each other.
    """
    if all(isinstance(operand, np.ndarray) for operand in operands) and _is_size(instruction):
        with np.errstate(all="ignore"):
            result = _ON_SIZES[instruction.name](instruction, *operands)
            return np.asarray(result, tensors.numpy_dtype(instruction.dtype))
    if instruction.name in _PLAIN:
        return _PLAIN[instruction.name](*operands)
    if unflattened is not None and instruction.name == "get_dimension_size" and operands[0].shape == unflattened:
        return np.asarray(math.prod(unflattened), np.int32)
    if unflattened is not None and instruction.name == "dynamic_broadcast_in_dim" and not instruction["dimensions"]:
        sizes = _sizes(operands[1])
        return lax.broadcast_in_dim(operands[0], unflattened if sizes == (math.prod(unflattened),) else sizes, ())
    return _SPECIAL[instruction.name](instruction, *operands)


def flops(instruction: Instruction, operands: Sequence[Any], result: Any) -> int:
    """How many additions and multiplications it takes, to the factor that a bound needs."""
    if instruction.name == "dot_general":
        contracted = math.prod(operands[0].shape[axis] for axis in instruction["lhs_contracting"])
        return int(2 * contracted * result.size)
    return int(max([result.size, *(operand.size for operand in operands)]))


def _is_size(instruction: Instruction) -> bool:
    """Whether the result is arithmetic on sizes: a few integers or truths, computed while tracing, as shapes need."""
    small = len(instruction.shape) <= 1 and all(0 <= size <= 8 for size in instruction.shape)
    return small and instruction.dtype in ("i32", "i64", "bool") and instruction.name in _ON_SIZES


def _sizes(shape: Any) -> tuple[int, ...]:
    """The sizes in an operand that gives a shape."""
    if not isinstance(shape, np.ndarray):
        raise TypeError("a size depends on the values of arrays")
    sizes = tuple(int(size) for size in shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"the shape {sizes}")
    return sizes


def _constant(instruction: Instruction) -> np.ndarray:
    data = bytes.fromhex(instruction["data"])
    return np.frombuffer(data, tensors.numpy_dtype(instruction.dtype)).reshape(instruction.shape)


def _dimension_size(instruction: Instruction, operand: Any) -> np.ndarray:
    return np.asarray(operand.shape[instruction["dimension"]], np.int32)


def _assert(instruction: Instruction, condition: Any) -> Any:
    if not (isinstance(condition, np.ndarray) and condition.dtype == np.bool_ and condition.ndim == 0):
        raise TypeError("an assertion that depends on the values of arrays")
    if not condition:
        raise ValueError("the program was not exported for this length")
    return condition


def _broadcast(instruction: Instruction, operand: Any, shape: Any = None) -> Any:
    sizes = instruction.shape if shape is None else _sizes(shape)
    return lax.broadcast_in_dim(operand, sizes, instruction["dimensions"])


def _reshape(instruction: Instruction, operand: Any, shape: Any = None) -> Any:
    return lax.reshape(operand, instruction.shape if shape is None else _sizes(shape))


def _iota(instruction: Instruction, shape: Any = None) -> Any:
    sizes = instruction.shape if shape is None else _sizes(shape)
    return lax.broadcasted_iota(tensors.numpy_dtype(instruction.dtype), sizes, instruction["dimension"])


def _reduce(instruction: Instruction, operand: Any, start: Any) -> Any:
    return lax.reduce(operand, start, REDUCERS[instruction["reducer"]], instruction["dimensions"])


def _dot_general(instruction: Instruction, left: Any, right: Any) -> Any:
    contracting = (instruction["lhs_contracting"], instruction["rhs_contracting"])
    batching = (instruction["lhs_batching"], instruction["rhs_batching"])
    of_left, of_right = (lax.Precision[name] for name in instruction["precision"] or ("DEFAULT", "DEFAULT"))
    dtype = tensors.numpy_dtype(instruction.dtype)
    return lax.dot_general(
        left, right, (contracting, batching), precision=(of_left, of_right), preferred_element_type=dtype
    )


def _slice(instruction: Instruction, operand: Any) -> Any:
    return lax.slice(operand, instruction["start"], instruction["limit"], instruction["strides"])


def _convert(instruction: Instruction, operand: Any) -> Any:
    return lax.convert_element_type(operand, tensors.numpy_dtype(instruction.dtype))


def _bitcast(instruction: Instruction, operand: Any) -> Any:
    if operand.dtype.itemsize != tensors.itemsize(instruction.dtype):
        raise TypeError("a bitcast between element types of different sizes")
    return lax.bitcast_convert_type(operand, tensors.numpy_dtype(instruction.dtype))


def _compare(instruction: Instruction, left: Any, right: Any) -> Any:
    return COMPARISONS[instruction["direction"]](left, right)


# What is called with the operands alone. In this table each element of the result depends on the same element of the
# operands and nothing else; a composite is known by its name, and what JAX has under that name is used.
_PLAIN: Mapping[str, Callable[..., Any]] = {
    "abs": lax.abs,
    "acos": lax.acos,
    "acosh": lax.acosh,
    "add": lax.add,
    "and": lax.bitwise_and,
    "asin": lax.asin,
    "asinh": lax.asinh,
    "atan2": lax.atan2,
    "atanh": lax.atanh,
    "cbrt": lax.cbrt,
    "ceil": lax.ceil,
    "clamp": lax.clamp,
    "cosh": lax.cosh,
    "cosine": lax.cos,
    "count_leading_zeros": lax.clz,
    "divide": lax.div,
    "erf": lax.erf,
    "exponential": lax.exp,
    "exponential_minus_one": lax.expm1,
    "floor": lax.floor,
    "is_finite": lax.is_finite,
    "log": lax.log,
    "log_plus_one": lax.log1p,
    "logistic": lax.logistic,
    "maximum": lax.max,
    "minimum": lax.min,
    "multiply": lax.mul,
    "negate": lax.neg,
    "not": lax.bitwise_not,
    "or": lax.bitwise_or,
    "popcnt": lax.population_count,
    "power": lax.pow,
    "remainder": lax.rem,
    "round_nearest_afz": functools.partial(lax.round, rounding_method=lax.RoundingMethod.AWAY_FROM_ZERO),
    "round_nearest_even": functools.partial(lax.round, rounding_method=lax.RoundingMethod.TO_NEAREST_EVEN),
    "rsqrt": lax.rsqrt,
    "select": lax.select,
    "shift_left": lax.shift_left,
    "shift_right_arithmetic": lax.shift_right_arithmetic,
    "shift_right_logical": lax.shift_right_logical,
    "sign": lax.sign,
    "sine": lax.sin,
    "sinh": lax.sinh,
    "sqrt": lax.sqrt,
    "subtract": lax.sub,
    "tan": lax.tan,
    "tanh": lax.tanh,
    "xor": lax.bitwise_xor,
}

# What needs its attributes or the form of its result.
_SPECIAL: Mapping[str, Callable[..., Any]] = {
    "assert": _assert,
    "bitcast_convert": _bitcast,
    "broadcast_in_dim": _broadcast,
    "compare": _compare,
    "concatenate": lambda instruction, *operands: lax.concatenate(operands, instruction["dimension"]),
    "constant": _constant,
    "convert": _convert,
    "dot_general": _dot_general,
    "dynamic_broadcast_in_dim": _broadcast,
    "dynamic_iota": _iota,
    "dynamic_reshape": _reshape,
    "get_dimension_size": _dimension_size,
    "iota": _iota,
    "reduce": _reduce,
    "reduce_precision": lambda ins, operand: lax.reduce_precision(operand, ins["exponent_bits"], ins["mantissa_bits"]),
    "reshape": _reshape,
    "reverse": lambda instruction, operand: lax.rev(operand, instruction["dimensions"]),
    "slice": _slice,
    "transpose": lambda instruction, operand: lax.transpose(operand, instruction["permutation"]),
}

# The same on NumPy arrays of a few integers, where the sizes of a leaf become the shapes of a program.
_ON_SIZES: Mapping[str, Callable[..., Any]] = {
    "abs": lambda _, x: np.abs(x),
    "add": lambda _, x, y: np.add(x, y),
    "and": lambda _, x, y: np.bitwise_and(x, y),
    "assert": _assert,
    "broadcast_in_dim": lambda instruction, x: np.broadcast_to(x, instruction.shape),
    "compare": lambda instruction, x, y: getattr(operator, instruction["direction"].lower())(x, y),
    "concatenate": lambda instruction, *operands: np.concatenate(operands, instruction["dimension"]),
    "constant": _constant,
    "convert": lambda instruction, x: x,
    "divide": lambda _, x, y: (x - np.fmod(x, y)) // y,
    "maximum": lambda _, x, y: np.maximum(x, y),
    "minimum": lambda _, x, y: np.minimum(x, y),
    "multiply": lambda _, x, y: np.multiply(x, y),
    "negate": lambda _, x: np.negative(x),
    "not": lambda _, x: np.invert(x),
    "or": lambda _, x, y: np.bitwise_or(x, y),
    "remainder": lambda _, x, y: np.fmod(x, y),
    "reshape": lambda instruction, x: np.reshape(x, instruction.shape),
    "select": lambda _, condition, x, y: np.where(condition, x, y),
    "sign": lambda _, x: np.sign(x),
    "slice": lambda ins, x: x[ins["start"][0] : ins["limit"][0] : ins["strides"][0]],
    "subtract": lambda _, x, y: np.subtract(x, y),
}

COMPARISONS = {"EQ": lax.eq, "NE": lax.ne, "GE": lax.ge, "GT": lax.gt, "LE": lax.le, "LT": lax.lt}
REDUCERS: Mapping[str, Callable[[Any, Any], jax.Array]] = {
    "add": lax.add,
    "and": lax.bitwise_and,
    "maximum": lax.max,
    "minimum": lax.min,
    "multiply": lax.mul,
    "or": lax.bitwise_or,
}
PRECISIONS = tuple(precision.name for precision in lax.Precision)

# Attribute -> its form: an integer, integers, words out of a list, or bytes in hexadecimal.
ATTRIBUTES: Mapping[str, Mapping[str, str]] = {
    "broadcast_in_dim": {"dimensions": "integers"},
    "compare": {"direction": "comparison"},
    "concatenate": {"dimension": "integer"},
    "constant": {"data": "bytes"},
    "dot_general": {
        "lhs_batching": "integers",
        "lhs_contracting": "integers",
        "precision": "precisions",
        "rhs_batching": "integers",
        "rhs_contracting": "integers",
    },
    "dynamic_broadcast_in_dim": {"dimensions": "integers"},
    "dynamic_iota": {"dimension": "integer"},
    "get_dimension_size": {"dimension": "integer"},
    "iota": {"dimension": "integer"},
    "reduce": {"dimensions": "integers", "reducer": "reducer"},
    "reduce_precision": {"exponent_bits": "integer", "mantissa_bits": "integer"},
    "reverse": {"dimensions": "integers"},
    "slice": {"limit": "integers", "start": "integers", "strides": "integers"},
    "transpose": {"permutation": "integers"},
}

NAMES = frozenset(_PLAIN) | frozenset(_SPECIAL)
# Operations that never look at another element: with scalars spread over a leaf, all that an elementwise rule is.
ELEMENTWISE = frozenset(_PLAIN) | {"bitcast_convert", "compare", "convert", "reduce_precision"}
