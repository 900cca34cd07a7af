"""Takes a file made by ``jax.export`` apart into a listing. Runs in a child process only (``trial``).

The parser of MLIR, native code, is made for trusted input: of a thousand copies of an exported Adam with a few bytes
changed, two to five end the process. So no process that must live may import this module. What it returns is data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import chlo, mhlo, sdy, stablehlo

from optwire_proto import limits, tensors
from optwire_server.engine import listing, operations

# Functions that call functions: JAX makes a few, an attack without end.
_CALL_DEPTH_MAX = 32
# Marks of the element types in MLIR, where they differ from the protocol's.
_DTYPES = {"i1": "bool", "ui8": "u8", "ui16": "u16", "ui32": "u32", "ui64": "u64"}
_COMPOSITES = ("acos", "acosh", "asin", "asinh", "atanh", "cosh", "erf", "sinh", "tan")
# What an operation may carry without a meaning that matters here.
_IGNORED = {"compare_type", "known_expanding_dimensions", "known_nonexpanding_dimensions", "result_accuracy"}
_NO_CALLS = "a program is straight: no loops, branches, calls out of it, random numbers or sorting"


def read(data: bytes, platform: str, ops_max: int) -> listing.Listing:
    """The listing of an exported update.

    Raises:
      SpecError: it is not an update of the form that ``imported`` describes, or has what no program may have.
      Exception: whatever the parsers raise for damaged bytes.
    """
    exported = export.deserialize(bytearray(data))
    _check_header(exported, platform)
    slots, dtype, shape = _signature(exported)
    context = ir.Context()
    # All that JAX may write, so that what is not served is refused by its name.
    for dialect in (stablehlo, chlo, sdy):
        dialect.register_dialect(context)
    mhlo.register_mhlo_dialect(context)
    with context:
        module = stablehlo.deserialize_portable_artifact(context, exported.mlir_module_serialized)
        module.operation.verify()
        functions = {_text(function.attributes["sym_name"]): function.operation for function in module.body}
        writer = _Writer(functions, ops_max, listing.INPUTS + slots)
        # A module that several platforms share begins with the number of the one it runs on.
        prefix = (
            [writer.constant(np.asarray(exported.platforms.index(platform), np.int32))]
            if len(exported.platforms) > 1
            else []
        )
        outputs = writer.inline("main", prefix + list(exported.module_kept_var_idx), depth=0)
    return listing.Listing(slots, dtype, shape, tuple(writer.instructions), tuple(outputs))


def _check_header(exported: export.Exported, platform: str) -> None:
    """Raises SpecError for anything but one pure function for one device."""
    least = export.minimum_supported_calling_convention_version
    most = export.maximum_supported_calling_convention_version
    version = exported.calling_convention_version
    for holds, expected, got in (
        (least <= version <= most, f"calling convention {least} to {most}", version),
        (platform in exported.platforms, f"the platform {platform} among its own", ", ".join(exported.platforms)),
        (exported.nr_devices == 1, "a program for 1 device", exported.nr_devices),
        (not exported.ordered_effects and not exported.unordered_effects, "a program without effects", "effects"),
        (not exported.disabled_safety_checks, "all safety checks", "some are disabled"),
        (len(set(exported.platforms)) == len(exported.platforms), "different platforms", "one of them twice"),
    ):
        if not holds:
            raise listing.refusal(expected, got)


def _signature(exported: export.Exported) -> tuple[int, str, tuple[int, ...] | None]:
    """Number of slots, element type and shape (None: any length) of ``update(step, rate, grad, param, *slots)``."""
    count = len(exported.in_avals)
    arguments, results = str(exported.in_tree), str(exported.out_tree)
    plain = str(jax.tree.structure(((0,) * count, {})))
    served = [str(jax.tree.structure((0,) * (count - listing.INPUTS + 1)))]
    if count == listing.INPUTS:
        served.append(str(jax.tree.structure(0)))
    if count < listing.INPUTS or arguments != plain or results not in served:
        expected = "update(step, rate, grad, param, *slots) -> (param, *slots) of arrays, in a plain tuple"
        raise listing.refusal(expected, f"{arguments[:80]} -> {results[:80]}")
    step, rate, *leaves = exported.in_avals
    for name, aval, dtype in (("step", step, "int32"), ("rate", rate, "float32")):
        if aval.shape != () or aval.dtype != dtype:
            raise listing.refusal(f"{name} to be one {dtype}", f"{aval.dtype}{list(aval.shape)}")
    first = leaves[0]
    for aval in (*leaves, *exported.out_avals):
        if aval.shape != first.shape or aval.dtype != first.dtype:
            expected = f"grad, param, slots and results all {first.dtype}{list(first.shape)}"
            raise listing.refusal(expected, f"{aval.dtype}{list(aval.shape)}")
    return count - listing.INPUTS, tensors.dtype_name(first.dtype) or str(first.dtype), _leaf_shape(first.shape)


def _leaf_shape(shape: Sequence[Any]) -> tuple[int, ...] | None:
    if all(isinstance(size, int) for size in shape):
        return tuple(shape)
    if len(shape) == 1 and str(shape[0]).isidentifier():
        return None
    raise listing.refusal("a concrete shape, or one symbolic length (n,)", f"({', '.join(map(str, shape))})")


@dataclasses.dataclass(slots=True)
class _Writer:
    """Writes instructions, functions inlined where they are called. Values are numbers; the inputs come first."""

    functions: Mapping[str, ir.Operation]
    ops_max: int
    inputs: int
    instructions: list[operations.Instruction] = dataclasses.field(default_factory=list)

    def inline(self, name: str, arguments: Sequence[int], *, depth: int) -> list[int]:
        """The numbers of the results of a function."""
        if name not in self.functions or depth > _CALL_DEPTH_MAX:
            raise listing.refusal(f"functions of its own, at most {_CALL_DEPTH_MAX} deep", f"a call of {name}")
        blocks = list(self.functions[name].regions[0].blocks)
        if len(blocks) != 1 or len(blocks[0].arguments) != len(arguments):
            raise listing.refusal(f"{name} to be one block of {len(arguments)} arguments", "another form")
        values = dict(zip(blocks[0].arguments, arguments, strict=True))
        for view in blocks[0].operations:
            operation = view.operation
            operands = [values[operand] for operand in operation.operands]
            if operation.name == "func.return":
                return operands
            if operation.name == "func.call":
                results = self.inline(_text(operation.attributes["callee"]), operands, depth=depth + 1)
            else:
                results = self.write(operation, operands)
            values.update(zip(operation.results, results, strict=True))
        raise listing.refusal(f"{name} to return", "a block without an end")

    def write(self, operation: ir.Operation, operands: list[int]) -> list[int]:
        """The number of the result of an operation, if it has one."""
        dialect, _, name = operation.name.partition(".")
        if dialect != "stablehlo":
            raise listing.refusal("operations of StableHLO", operation.name)
        if name == "custom_call" and _text(operation.attributes["call_target_name"]) == "shape_assertion":
            self.emit("assert", operands[:1], (), "bool", {})
            return []
        if name == "composite":
            name = _composite(operation)
        elif name not in operations.NAMES or name == "assert":
            raise _not_served(operation, name)
        if len(operation.results) != 1:
            raise listing.refusal(f"{name} with one result", f"{len(operation.results)}")
        shape, dtype = _type(operation.results[0].type)
        if name == "constant":
            return [self._dense(operation.attributes["value"], shape, dtype)]
        return [self.emit(name, operands, shape, dtype, _attributes(operation, name))]

    def constant(self, value: np.ndarray) -> int:
        """The number of a scalar constant."""
        return self.emit("constant", [], (), tensors.dtype_name(value.dtype) or "", {"data": value.tobytes().hex()})

    def emit(
        self,
        name: str,
        operands: list[int],
        shape: tuple[int, ...],
        dtype: str,
        attributes: Mapping[str, operations.Attribute],
    ) -> int:
        """Appends an instruction; the number of its result."""
        if len(self.instructions) >= self.ops_max:
            raise listing.refusal(f"at most {self.ops_max} operations, functions inlined", "more")
        self.instructions.append(operations.Instruction(name, tuple(operands), shape, dtype, attributes))
        return self.inputs + len(self.instructions) - 1

    def _dense(self, value: Any, shape: tuple[int, ...], dtype: str) -> int:
        """A constant. One number over and over stays one number: it may stand for any amount of memory."""
        if not isinstance(value, (ir.DenseFPElementsAttr, ir.DenseIntElementsAttr)):
            raise listing.refusal("constants whose numbers are in the file", type(value).__name__)
        if value.is_splat:
            element: Any = value.get_splat_value()
            scalar = np.asarray(element.value).astype(tensors.numpy_dtype(dtype))
            number = self.constant(scalar)
            return number if shape == () else self.emit("broadcast_in_dim", [number], shape, dtype, {"dimensions": []})
        if dtype == "bf16":
            raise listing.refusal("constant arrays of other types, such as float32 and then converted", "bfloat16")
        array = np.asarray(value).astype(tensors.numpy_dtype(dtype))
        return self.emit("constant", [], shape, dtype, {"data": array.tobytes().hex()})


def _not_served(operation: ir.Operation, name: str) -> Exception:
    target = f" of {_text(operation.attributes['call_target_name'])!r}" if name == "custom_call" else ""
    problem = f"stablehlo.{name}{target[:100]} is not among the operations that are served; {_NO_CALLS}"
    return listing.refusal("operations that are served", f"stablehlo.{name}{target}", problem=problem)


def _composite(operation: ir.Operation) -> str:
    """The operation that a composite stands for; what the file has for its body is not used."""
    name = _text(operation.attributes["name"])
    if name.removeprefix("chlo.") in _COMPOSITES:
        return name.removeprefix("chlo.")
    raise listing.refusal(f"composites of chlo.{', '.join(_COMPOSITES)}", name)


def _attributes(operation: ir.Operation, name: str) -> dict[str, operations.Attribute]:
    """An operation's attributes by the names of ``operations``; an unknown one is refused."""
    if operation.name == "stablehlo.composite":
        return {}
    readers = _ATTRIBUTES.get(name, {})
    for attribute in operation.attributes:
        if attribute not in readers and attribute not in _IGNORED:
            raise listing.refusal(f"{name} with {', '.join(readers) or 'no attributes'}", attribute)
    found: dict[str, operations.Attribute] = {}
    for attribute, reader in readers.items():
        found |= reader(operation.attributes[attribute]) if attribute in operation.attributes else _ABSENT[attribute]
    if name == "compare" and "TOTALORDER" in str(operation.attributes.get("compare_type")):
        raise listing.refusal("comparisons of numbers", "a comparison in total order")
    return found | ({"reducer": _reducer(operation)} if name == "reduce" else {})


def _reducer(operation: ir.Operation) -> str:
    """The one operation that a reduction applies."""
    blocks = list(operation.regions[0].blocks)
    steps = [view.operation for block in blocks for view in block.operations]
    name = steps[0].name.removeprefix("stablehlo.") if steps else ""
    plain = len(blocks) == 1 and len(steps) == 2 and len(blocks[0].arguments) == 2 and name in operations.REDUCERS
    if not plain or set(steps[0].operands) != set(blocks[0].arguments) or list(steps[1].operands) != [steps[0].result]:
        raise listing.refusal(f"a reduction by {', '.join(operations.REDUCERS)}", "another one")
    return name


def _type(type_: ir.Type) -> tuple[tuple[int, ...], str]:
    """Shape and element type of a value."""
    if not isinstance(type_, ir.RankedTensorType) or type_.encoding is not None:
        raise listing.refusal("arrays of a known rank", str(type_))
    if type_.rank > limits.RANK_MAX:
        raise listing.refusal(f"arrays of at most {limits.RANK_MAX} dimensions", f"{type_.rank}")
    dtype = str(type_.element_type)
    dtype = _DTYPES.get(dtype, dtype)
    if dtype not in tensors.DTYPE_NAMES:
        raise listing.refusal("numbers of a type that is served", dtype)
    dynamic = (type_.is_dynamic_dim(axis) for axis in range(type_.rank))
    return tuple(
        operations.DYNAMIC if any_size else type_.get_dim_size(axis) for axis, any_size in enumerate(dynamic)
    ), dtype


def _text(attribute: Any) -> str:
    return str(attribute.value)


def _integers(name: str) -> Callable[[Any], dict[str, operations.Attribute]]:
    return lambda attribute: {name: [int(value) for value in attribute]}


def _integer(name: str) -> Callable[[Any], dict[str, operations.Attribute]]:
    return lambda attribute: {name: int(attribute.value)}


def _dot_dimensions(attribute: Any) -> dict[str, operations.Attribute]:
    numbers = stablehlo.DotDimensionNumbers(attribute)
    return {
        "lhs_batching": list(numbers.lhs_batching_dimensions),
        "lhs_contracting": list(numbers.lhs_contracting_dimensions),
        "rhs_batching": list(numbers.rhs_batching_dimensions),
        "rhs_contracting": list(numbers.rhs_contracting_dimensions),
    }


def _precisions(attribute: Any) -> dict[str, operations.Attribute]:
    return {"precision": [stablehlo.PrecisionAttr(value).value for value in attribute]}


_ATTRIBUTES: Mapping[str, Mapping[str, Callable[[Any], dict[str, operations.Attribute]]]] = {
    "broadcast_in_dim": {"broadcast_dimensions": _integers("dimensions")},
    "compare": {
        "comparison_direction": lambda attribute: {"direction": stablehlo.ComparisonDirectionAttr(attribute).value}
    },
    "concatenate": {"dimension": _integer("dimension")},
    "dot_general": {"dot_dimension_numbers": _dot_dimensions, "precision_config": _precisions},
    "dynamic_broadcast_in_dim": {"broadcast_dimensions": _integers("dimensions")},
    "dynamic_iota": {"iota_dimension": _integer("dimension")},
    "get_dimension_size": {"dimension": _integer("dimension")},
    "iota": {"iota_dimension": _integer("dimension")},
    "reduce": {"dimensions": _integers("dimensions")},
    "reduce_precision": {"exponent_bits": _integer("exponent_bits"), "mantissa_bits": _integer("mantissa_bits")},
    "reverse": {"dimensions": _integers("dimensions")},
    "slice": {
        "limit_indices": _integers("limit"),
        "start_indices": _integers("start"),
        "strides": _integers("strides"),
    },
    "transpose": {"permutation": _integers("permutation")},
}
_ABSENT: Mapping[str, dict[str, operations.Attribute]] = {"precision_config": {"precision": []}}
