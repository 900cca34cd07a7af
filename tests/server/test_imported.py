"""Programs that clients bring: they do what the function they were exported from does, and hostile ones are refused."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.experimental import io_callback

from optwire_proto import errors, trees
from optwire_server.engine import imported, listing, trial

SHAPES = ((), (1,), (7,), (2, 3, 5), (64, 33), (3, 0))


def adam(step: Any, rate: Any, grad: Any, param: Any, mu: Any, nu: Any) -> Any:
    mu = 0.9 * mu + 0.1 * grad
    nu = 0.999 * nu + 0.001 * grad * grad
    count = (step + 1).astype(jnp.float32)
    unbiased_mu = mu / (1 - 0.9**count).astype(mu.dtype)
    unbiased_nu = nu / (1 - 0.999**count).astype(nu.dtype)
    return param - rate.astype(param.dtype) * unbiased_mu / (jnp.sqrt(unbiased_nu) + 1e-8), mu, nu


def lion(step: Any, rate: Any, grad: Any, param: Any, mu: Any) -> Any:
    return param - rate * (jnp.sign(0.9 * mu + 0.1 * grad) + 0.01 * param), 0.99 * mu + 0.01 * grad


def clipped_sgd(step: Any, rate: Any, grad: Any, param: Any) -> Any:
    return param - rate * grad / jnp.maximum(1.0, jnp.sqrt(jnp.sum(grad * grad)))


def averaging(step: Any, rate: Any, grad: Any, param: Any) -> Any:
    return param - rate * (grad - jnp.mean(grad))


def scheduled(step: Any, rate: Any, grad: Any, param: Any) -> Any:
    warm = jnp.where(step < 10, step / 10, jnp.cos(step.astype(jnp.float32)))
    return (param - rate * warm * jax.nn.gelu(grad) * lax.erf(param) + jnp.clip(grad, -0.1, 0.1) ** 3,)


def ramp(step: Any, rate: Any, grad: Any, param: Any) -> Any:
    return param - rate * grad * jnp.arange(grad.shape[0])


def by_length(step: Any, rate: Any, grad: Any, param: Any) -> Any:
    return param - rate * grad / grad.shape[0]


def muon(step: Any, rate: Any, grad: Any, param: Any, mu: Any) -> Any:
    mu = 0.95 * mu + grad
    x = mu / (jnp.linalg.norm(mu) + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return param - rate * x, mu


def factored(step: Any, rate: Any, grad: Any, param: Any, nu: Any) -> Any:
    rows, columns = jnp.mean(grad**2, 1, keepdims=True), jnp.mean(grad**2, 0, keepdims=True)
    nu = jnp.maximum(nu, rows * columns / jnp.mean(rows))
    table = jnp.asarray(np.linspace(0, 1, grad.size, dtype=np.float32).reshape(grad.shape))
    return param - rate * grad * lax.rsqrt(nu + 1e-3) * table[::-1], nu


def exported(
    update: Callable[..., Any],
    shape: Sequence[int] | str = "n",
    *,
    slots: int = 0,
    dtype: Any = jnp.float32,
    platforms: Sequence[str] = ("cpu",),
    disabled_checks: Sequence[export.DisabledSafetyCheck] = (),
) -> export.Exported:
    sizes = export.symbolic_shape(shape) if isinstance(shape, str) else tuple(shape)
    leaf = jax.ShapeDtypeStruct(sizes, dtype)
    scalars = (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32))
    make = export.export(jax.jit(update), platforms=platforms, disabled_checks=disabled_checks)
    return make(*scalars, *[leaf] * (2 + slots))


def serialized(update: Callable[..., Any], shape: Sequence[int] | str = "n", **options: Any) -> bytes:
    return bytes(exported(update, shape, **options).serialize())


def inputs(shape: tuple[int, ...], slots: int, dtype: Any = np.float32, step: int = 3) -> list[Any]:
    rng = np.random.default_rng(7)
    leaves = [np.asarray(rng.standard_normal(shape)) for _ in range(2 + slots)]
    # Second moments are not negative.
    leaves[2:] = [abs(leaf) for leaf in leaves[2:]]
    return [np.int32(step), np.float32(0.1), *[leaf.astype(dtype) for leaf in leaves]]


def leaf(*shape: int, dtype: str = "f32") -> trees.LeafSpec:
    return trees.LeafSpec("w", shape, dtype)


def assert_same(program: imported.Imported, update: Callable[..., Any], arguments: list[Any]) -> None:
    """Bitwise, under jit: the same operations in the same order, compiled by the same compiler."""
    expected = jax.tree.leaves(jax.jit(update)(*arguments))
    got = jax.jit(program.update)(*arguments)
    assert len(got) == len(expected) == 1 + program.slots
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


# ---------------------------------------------------------------------------------------------------------------------
# What is served.


def test_an_adam_of_five_kilobytes_serves_leaves_of_every_shape() -> None:
    data = serialized(adam, slots=2)
    assert len(data) < 8000  # Of which two are the places in the source, deeper under pytest.
    program = imported.load(data)
    assert (program.slots, program.dtype, program.shape, program.symbolic) == (2, "f32", None, True)
    assert program.digest == hashlib.sha256(data).hexdigest()
    imported.attempt(program, [leaf(*shape) for shape in SHAPES])
    for shape in SHAPES:
        assert_same(program, adam, inputs(shape, 2))


@pytest.mark.parametrize(
    ("update", "slots", "elementwise"),
    [
        (adam, 2, True),
        (lion, 1, True),
        (scheduled, 0, True),
        (clipped_sgd, 0, False),
        (averaging, 0, False),
        (ramp, 0, False),
        (by_length, 0, False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_program_does_what_its_function_does(update: Callable[..., Any], slots: int, elementwise: bool) -> None:
    program = imported.load(serialized(update, slots=slots))
    assert program.elementwise == elementwise
    for size in (1, 33, 4096):
        assert_same(program, update, inputs((size,), slots))


@pytest.mark.parametrize(("update", "slots"), [(muon, 1), (factored, 1), (adam, 2)], ids=("muon", "factored", "adam"))
def test_a_program_for_one_shape_may_look_at_the_whole_matrix(update: Callable[..., Any], slots: int) -> None:
    program = imported.load(serialized(update, (12, 20), slots=slots))
    assert program.shape == (12, 20)
    assert not program.elementwise
    imported.attempt(program, [leaf(12, 20)])
    assert_same(program, update, inputs((12, 20), slots))
    with pytest.raises(
        errors.TreeError, match=r"params\['w'\]: shape \(20, 12\), and the program was exported for \(12"
    ):
        program.check_leaves([leaf(20, 12)])


@pytest.mark.parametrize(("name", "dtype"), [("bf16", jnp.bfloat16), ("f16", jnp.float16), ("f64", jnp.float64)])
def test_a_program_serves_the_element_type_it_was_exported_for(name: str, dtype: Any) -> None:
    with jax.enable_x64(name == "f64"):
        program = imported.load(serialized(adam, slots=2, dtype=dtype))
        assert program.dtype == name
        assert_same(program, adam, inputs((3, 5), 2, dtype))
    imported.attempt(program, [leaf(3, 5, dtype=name)])
    with pytest.raises(errors.TreeError, match=f"element type f32, and the program was exported for {name}"):
        program.check_leaves([leaf(3, 5)])


def test_a_program_for_several_platforms_runs_on_ours() -> None:
    program = imported.load(serialized(clipped_sgd, platforms=("cuda", "cpu")))
    assert_same(program, clipped_sgd, inputs((9,), 0))


def test_a_program_that_ignores_most_of_its_arguments_is_served() -> None:
    program = imported.load(serialized(lambda step, rate, grad, param, slot: (grad, param), slots=1))
    assert_same(program, lambda step, rate, grad, param, slot: (grad, param), inputs((4,), 1))


def test_an_elementwise_program_on_a_piece_gives_the_piece_of_the_result() -> None:
    program = imported.load(serialized(adam, slots=2))
    step, rate, *leaves = inputs((1000,), 2)
    whole = jax.jit(program.update)(step, rate, *leaves)
    piece = jax.jit(program.update)(step, rate, *[array[200:456] for array in leaves])
    for ours, theirs in zip(piece, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs[200:456])


def test_a_constraint_on_the_length_is_kept() -> None:
    constrained = export.SymbolicScope(["n >= 8"])
    sizes = export.symbolic_shape("n", scope=constrained)
    scalars = (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32))
    leaf_of = jax.ShapeDtypeStruct(sizes, jnp.float32)
    program = imported.load(bytes(export.export(jax.jit(clipped_sgd))(*scalars, leaf_of, leaf_of).serialize()))
    assert_same(program, clipped_sgd, inputs((8,), 0))
    with pytest.raises(errors.SpecError, match="not exported for this length"):
        program.check_leaves([leaf(7)])


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, by the file alone.


def _while(step: Any, rate: Any, grad: Any, param: Any) -> Any:
    return lax.while_loop(lambda x: True, lambda x: x + 1, param)


def _callback(step: Any, rate: Any, grad: Any, param: Any) -> Any:
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(param.shape, param.dtype), param)


def _io(step: Any, rate: Any, grad: Any, param: Any) -> Any:
    return io_callback(lambda x: x, jax.ShapeDtypeStruct(param.shape, param.dtype), param, ordered=True)


def _print(step: Any, rate: Any, grad: Any, param: Any) -> Any:
    jax.debug.print("{}", rate)
    return param


def _doubling(times: int) -> Callable[..., Any]:
    def double(value: Any) -> Any:
        return jnp.concatenate([value, value])

    def update(step: Any, rate: Any, grad: Any, param: Any) -> Any:
        value = jnp.full(4, 0.5) * rate
        for _ in range(times):
            value = double(value)
        return param - jnp.sum(value)

    return update


def _calls(depth: int, *, times: int) -> Callable[..., Any]:
    """Functions that call the next one some times each: with two, the work doubles each time and the file does not."""
    function: Callable[[Any], Any] = jnp.sin
    for level in range(depth):

        def repeated(value: Any, inner: Callable[[Any], Any] = function) -> Any:
            for _ in range(times):
                value = inner(value)
            return value

        repeated.__name__ = f"level{level}"
        function = jax.jit(repeated)
    return lambda step, rate, grad, param: function(param)


def _many(step: Any, rate: Any, grad: Any, param: Any) -> Any:
    for _ in range(2500):
        param = param * rate
    return param


NOT_STRAIGHT = {
    "stablehlo.while": _while,
    "stablehlo.case": lambda step, rate, grad, param: lax.cond(step > 0, lambda: param, lambda: grad),
    "stablehlo.sort": lambda step, rate, grad, param: jnp.sort(param),
    "stablehlo.dynamic_slice": lambda step, rate, grad, param: param + grad[step],
    "stablehlo.gather": lambda step, rate, grad, param: param + jnp.take(grad, jnp.asarray([3, 0, 1, 3]), axis=0),
    "lapack_spotrf_ffi": lambda step, rate, grad, param: jnp.linalg.cholesky(param),
    "lapack_ssyevd_ffi": lambda step, rate, grad, param: jnp.linalg.eigh(param)[1],
    "stablehlo.convolution": lambda step, rate, grad, param: jnp.convolve(param[0], grad[0], "same") + param,
}


@pytest.mark.parametrize("operation", NOT_STRAIGHT)
def test_a_program_with_loops_branches_or_calls_is_refused_by_the_name_of_the_operation(operation: str) -> None:
    shape = "n" if operation in ("stablehlo.while", "stablehlo.case", "stablehlo.sort") else (4, 4)
    with pytest.raises(errors.SpecError, match=f"{operation}.*no loops, branches, calls out of it"):
        imported.load(serialized(NOT_STRAIGHT[operation], shape))


@pytest.mark.parametrize(
    ("update", "shape"),
    [
        (lambda step, rate, grad, param: lax.fori_loop(0, 10**9, lambda i, x: x + 1, param), "n"),
        (lambda step, rate, grad, param: param + jax.random.normal(jax.random.key(0), (4,)), (4,)),
        (lambda step, rate, grad, param: lax.rng_bit_generator(jnp.zeros(4, jnp.uint32), (4,))[1] + param, (4,)),
        (lambda step, rate, grad, param: jnp.cumsum(param), (4,)),
        (lambda step, rate, grad, param: param + jnp.argmax(grad), (4,)),
        (_calls(14, times=2), (4,)),
        (_calls(40, times=1), (4,)),
        (_many, (4,)),
        (lambda step, rate, grad, param: param, (1,) * 12),
        (lambda step, rate, grad, param: jnp.sum(param.reshape((1,) * 12)) + param, (1,)),
        (lambda step, rate, grad, param: param, "2*n"),
        (lambda step, rate, grad, param: param, "n, n"),
        (lambda step, rate, grad, param: (param, param), "n"),
        (lambda step, rate, grad, param: param.astype(jnp.bfloat16), "n"),
        (lambda step, rate, grad, param: param[:1], (4,)),
        (lambda step, rate, grad, param: {"param": param}, "n"),
    ],
)
def test_a_program_that_is_not_straight_small_or_of_the_form_is_refused(update: Any, shape: Any) -> None:
    with pytest.raises(errors.SpecError, match="program") as caught:
        imported.load(serialized(update, shape))
    assert caught.value.subject == "program"
    assert caught.value.expected
    assert not any(word in str(caught.value) for word in ("Traceback", ".py", "site-packages"))


def test_an_element_type_that_is_not_floating_point_is_refused() -> None:
    with pytest.raises(errors.SpecError, match="floating-point"):
        imported.load(serialized(lambda step, rate, grad, param: param, dtype=jnp.int32))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([jnp.float32, jnp.float32, jnp.float32, jnp.float32], "step to be one int32"),
        ([jnp.int32, jnp.float16, jnp.float32, jnp.float32], "rate to be one float32"),
        ([jnp.int32, jnp.float32, jnp.float32, jnp.float16], "grad, param, slots and results all"),
        ([jnp.int32, jnp.float32, jnp.float32], "update\\(step, rate, grad, param"),
    ],
)
def test_other_arguments_than_the_form_has_are_named(arguments: list[Any], problem: str) -> None:
    structs = [jax.ShapeDtypeStruct((), dtype) for dtype in arguments]
    data = bytes(export.export(jax.jit(lambda *args: args[-1]))(*structs).serialize())
    with pytest.raises(errors.SpecError, match=problem):
        imported.load(data)


def test_arguments_in_containers_are_refused() -> None:
    leaf_of = jax.ShapeDtypeStruct((3,), jnp.float32)
    scalars = (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32))
    nested: Any = leaf_of
    for _ in range(50):
        nested = [nested]
    made = export.export(jax.jit(lambda step, rate, grad, param: param[0]))(*scalars, leaf_of, [leaf_of])
    deep = export.export(jax.jit(lambda step, rate, grad, param: grad))(*scalars, leaf_of, nested)
    for program in (made, deep):
        with pytest.raises(errors.SpecError, match="in a plain tuple"):
            imported.load(bytes(program.serialize()))


# JAX itself does not serialize these. Were it to begin, it is the server whose refusal is to be shown.
NOT_SERIALIZED = (_callback, _io, _print)


@pytest.mark.parametrize("update", NOT_SERIALIZED, ids=lambda update: update.__name__.strip("_"))
def test_jax_itself_serializes_no_callback(update: Any) -> None:
    with pytest.raises(NotImplementedError, match="host_callbacks"):
        exported(update, (4,))


# The second is what a callback becomes, in a file that somebody made by other means.
@pytest.mark.parametrize("target", ["system", "xla_ffi_python_cpu_callback"])
def test_a_foreign_call_is_refused_by_its_name_though_the_file_says_otherwise(target: str) -> None:
    def update(step: Any, rate: Any, grad: Any, param: Any) -> Any:
        return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(param.shape, param.dtype))(param)

    made = exported(update, (4,), disabled_checks=[export.DisabledSafetyCheck.custom_call(target)])
    with pytest.raises(errors.SpecError, match="program.*safety checks"):
        imported.load(bytes(made.serialize()))
    with pytest.raises(errors.SpecError, match=f"custom_call of '{target}'"):
        imported.load(bytes(dataclasses.replace(made, disabled_safety_checks=()).serialize()))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"nr_devices": 2}, "1 device"),
        ({"platforms": ("tpu",)}, "the platform cpu among its own, got tpu"),
        ({"platforms": ()}, "the platform cpu"),
        ({"calling_convention_version": 99}, "calling convention"),
        ({"calling_convention_version": 1}, "calling convention"),
        ({"disabled_safety_checks": (export.DisabledSafetyCheck.platform(),)}, "safety checks"),
        ({"mlir_module_serialized": b""}, "program"),
        ({"mlir_module_serialized": b"module {}"}, "program"),
        ({"module_kept_var_idx": (0, 1)}, "program"),
        ({"module_kept_var_idx": (0, 1, 2, 3, 4, 500)}, "program"),
        ({"module_kept_var_idx": (3, 2, 1, 0, 4, 5)}, "program"),
    ],
)
def test_a_header_that_this_server_cannot_serve_is_refused(change: dict[str, Any], problem: str) -> None:
    data = bytes(dataclasses.replace(exported(adam, slots=2), **change).serialize())
    with pytest.raises(errors.SpecError, match=problem):
        imported.load(data).check_leaves([leaf(5)])


def test_a_file_beyond_the_limit_is_refused_before_it_is_parsed() -> None:
    table = np.random.default_rng(0).standard_normal(2**19).astype(np.float32)
    data = serialized(lambda step, rate, grad, param: param + jnp.sum(jnp.asarray(table) * rate))
    assert len(data) > 2**21
    with pytest.raises(errors.SpecError, match="expected 1 to 262144 bytes, got 2"):
        imported.load(data)
    with pytest.raises(errors.SpecError, match="got 0 bytes"):
        imported.load(b"")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused for the leaves it would have to serve.


@pytest.mark.parametrize(
    "update",
    [
        lambda step, rate, grad, param: param + jnp.sum(jnp.full((10**6, 10**6), 0.5) * rate),
        lambda step, rate, grad, param: param + jnp.sum(grad[:, None] * param[None, :], 1),
        lambda step, rate, grad, param: param + jnp.sum(jnp.arange(10**10) * rate),
        _doubling(30),
    ],
    ids=("a broadcast to 10^12", "an outer product", "a long iota", "a constant that doubles"),
)
def test_a_value_out_of_proportion_to_the_leaf_is_refused_before_it_exists(update: Callable[..., Any]) -> None:
    program = imported.load(serialized(update, (100_000,)))
    with pytest.raises(errors.SpecError, match=r"makes a value of \d+ bytes for a parameter float32\[100000\]"):
        program.check_leaves([leaf(100_000)])


def test_whether_an_outer_product_is_too_large_is_asked_of_each_leaf() -> None:
    program = imported.load(serialized(lambda step, rate, grad, param: param + jnp.sum(grad[:, None] * param, 1)))
    imported.attempt(program, [leaf(100)])
    with pytest.raises(errors.SpecError, match="a value of 40000000000 bytes"):
        imported.attempt(program, [leaf(100), leaf(100_000)])


def test_matrix_products_beyond_the_limit_are_refused() -> None:
    def power(step: Any, rate: Any, grad: Any, param: Any) -> Any:
        for _ in range(300):
            param = param @ grad
        return param

    program = imported.load(serialized(power, (4096, 4096)))
    with pytest.raises(errors.SpecError, match="expected at most 1099511627776"):
        program.check_leaves([leaf(4096, 4096)])


def test_arithmetic_in_64_bits_is_for_float64_parameters() -> None:
    def wide(step: Any, rate: Any, grad: Any, param: Any) -> Any:
        return (param.astype(jnp.float64) - rate * grad.astype(jnp.float64)).astype(jnp.float32)

    with jax.enable_x64(True):
        program = imported.load(serialized(wide))
    with pytest.raises(errors.SpecError, match="f64, which is served for float64 parameters only"):
        program.check_leaves([leaf(3)])


# ---------------------------------------------------------------------------------------------------------------------
# The trial.


def test_reading_longer_than_the_limit_is_stopped() -> None:
    with pytest.raises(errors.SpecError, match="took longer to read than 0.001 s, the limit"):
        imported.load(serialized(adam, slots=2), imported.Limits(read_s=0.001))


def test_compiling_longer_than_the_limit_is_stopped() -> None:
    program = imported.load(serialized(adam, slots=2), imported.Limits(compile_s=0.01))
    with pytest.raises(errors.SpecError, match="took longer to compile than 0.01 s, the limit"):
        imported.attempt(program, [leaf(5)])


def test_a_step_longer_than_the_limit_is_stopped() -> None:
    def power(step: Any, rate: Any, grad: Any, param: Any) -> Any:
        for _ in range(60):
            param = param @ grad
        return param

    program = imported.load(serialized(power, (2048, 2048)), imported.Limits(step_s=0.3))
    with pytest.raises(errors.SpecError, match="longer to run than 0.3 s, the limit"):
        imported.attempt(program, [leaf(2048, 2048)])


def test_the_step_is_that_of_all_leaves() -> None:
    program = imported.load(serialized(adam, slots=2), imported.Limits(step_s=0.5))
    imported.attempt(program, [leaf(500_000)])
    with pytest.raises(errors.SpecError, match=r"one step took .* s, the limit is 0.5 s"):
        imported.attempt(program, [leaf(500_000)] * 5000)


def test_memory_beyond_the_limit_is_refused() -> None:
    def hungry(step: Any, rate: Any, grad: Any, param: Any) -> Any:
        value = grad[:, None] * param[None, :]
        return param + (value @ value @ value)[0]

    limits = imported.Limits(memory_bytes=32 * 2**20, growth_max=10**6)
    program = imported.load(serialized(hungry, (5000,)), limits)
    with pytest.raises(errors.SpecError, match="33554432 bytes of memory"):
        imported.attempt(program, [leaf(5000)])


def test_one_program_is_tried_at_a_time_and_waiting_has_a_limit() -> None:
    with trial._TURN, pytest.raises(errors.LimitError, match="limit of waiting") as caught:
        imported.load(serialized(adam, slots=2), imported.Limits(wait_s=0.01))
    assert caught.value.retry_after_s == 0.01


def test_the_child_finds_no_secrets_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Recorder(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, env: dict[str, str], **options: Any) -> None:
            seen.append(env)
            super().__init__(*arguments, env=env, **options)

    monkeypatch.setenv("OPTWIRE_TOKEN", "secret")
    monkeypatch.setattr(subprocess, "Popen", Recorder)
    imported.load(serialized(lion, slots=1), imported.Limits(ops_max=1999))
    assert seen
    assert "OPTWIRE_TOKEN" not in seen[0]


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files. The parsers crash on some; that a crash is the child's is what the first test is for.


@pytest.fixture(scope="module")
def damaged() -> list[bytes]:
    """An Adam cut at every 128th byte, 150 with some bytes changed, half of them in the module, and noise."""
    made = exported(adam, slots=2)
    data = bytes(made.serialize())
    start = data.index(made.mlir_module_serialized)
    rng = random.Random(0)
    files = [data[:length] for length in range(0, len(data), 128)]
    for number in range(150):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 4))):
            first = start if number % 2 else 0
            changed[rng.randrange(first, len(data))] = rng.randrange(256)
        files.append(bytes(changed))
    return files + [rng.randbytes(length) for length in (1, 4, 64, 1000, 10_000)]


# Reads each file in a process of its own, as ``trial`` does, but forked from one that has loaded the parsers.
_READ_EACH = """
import json, os, resource, signal, sys
from optwire_proto import errors
from optwire_server.engine import artifact

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for line in sys.stdin:
    data = bytes.fromhex(line)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        signal.alarm(10)
        try:
            answer = artifact.read(data, "cpu", 2000).to_json()
        except errors.SpecError as exc:
            answer = "refused"
        except Exception as exc:
            answer = "raised"
        with os.fdopen(writer, "w") as out:
            out.write(answer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as result:
        answer = result.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([status, answer]), flush=True)
"""


@pytest.mark.slow
def test_a_damaged_file_is_refused_or_is_a_program_that_passes_every_wall(damaged: list[bytes]) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _READ_EACH],
        input="".join(data.hex() + "\n" for data in damaged),
        capture_output=True,
        text=True,
        timeout=200,
    )
    outcomes = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(outcomes) == len(damaged), result.stderr[-2000:]
    survivors, refused, dead = 0, [], []
    for data, (status, answer) in zip(damaged, outcomes, strict=True):
        if status != 0:
            dead.append(data)
        elif answer in ("refused", "raised"):
            refused.append(data)
        else:
            survivors += 1
            with contextlib.suppress(errors.SpecError, errors.TreeError):
                program = imported.Imported("", listing.Listing.from_json(answer), imported.DEFAULTS)
                program.check_leaves([trees.LeafSpec("w", program.shape or (5,), program.dtype)])
    assert survivors > 10
    print(f"{len(damaged)} files: {survivors} are programs, {len(dead)} ended the process that read them")
    # The same by the way that clients take, for a few. Whether a parser crashes on a file depends on what lies beside
    # it in memory: one that ended a process above may be read this time, but it never ends this one.
    for data in [*refused[1:150:50], *refused[-3:]]:
        with pytest.raises(errors.SpecError, match="program"):
            imported.load(data)
    for data in dead[:4]:
        with contextlib.suppress(errors.SpecError, errors.TreeError):
            imported.load(data).check_leaves([leaf(5)])
    imported.load(serialized(adam, slots=2)).check_leaves([leaf(5)])


def _changed(text: str) -> Iterator[str]:
    """Listings in which one place is something else."""
    document = json.loads(text)
    for value in (None, -1, 10**9, 1.5, "x", [], {}, True, [[[]]], 2**70):
        for place in range(5):
            yield json.dumps([value if place == at else part for at, part in enumerate(document)])
        for number, instruction in enumerate(document[3]):
            for place in range(5):
                other = [value if place == at else part for at, part in enumerate(instruction)]
                steps = [other if number == at else step for at, step in enumerate(document[3])]
                yield json.dumps([*document[:3], steps, document[4]])
            for attribute in instruction[4]:
                attributes = {**instruction[4], attribute: value}
                steps = [*document[3][:number], [*instruction[:4], attributes], *document[3][number + 1 :]]
                yield json.dumps([*document[:3], steps, document[4]])


def test_a_listing_from_a_child_that_was_taken_over_is_refused_or_harmless() -> None:
    program = imported.load(serialized(factored, (3, 4), slots=1))
    for text in (*_changed(program.body.to_json()), "", "[]", "{}", "[" * 10_000, "null"):
        with contextlib.suppress(errors.SpecError, errors.TreeError):
            body = listing.Listing.from_json(text)
            imported.Imported("", body, imported.DEFAULTS).check_leaves([leaf(3, 4)])
