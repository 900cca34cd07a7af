"""The mean of several workers' gradients, against exact rational arithmetic rounded one operation at a time."""

from __future__ import annotations

import fractions
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optwire import optimizers as opt
from optwire_proto import tensors, trees
from optwire_server.engine import engine, mean

RNG = np.random.default_rng(3)


def rounded(value: fractions.Fraction, dtype: Any) -> fractions.Fraction:
    """The nearest number of a type, the even one of two: what each operation must give."""
    if value == 0:
        return value
    info = ml_dtypes.finfo(dtype)
    exponent = math.floor(math.log2(abs(value)))
    exponent += (abs(value) >= fractions.Fraction(2) ** (exponent + 1)) - (
        abs(value) < fractions.Fraction(2) ** exponent
    )
    unit = fractions.Fraction(2) ** (max(exponent, int(info.minexp)) - int(info.nmant))
    return round(value / unit) * unit


def expected(values: list[float], wide: Any, dtype: Any) -> float:
    total = fractions.Fraction(values[0])
    for value in values[1:]:
        total = rounded(total + fractions.Fraction(value), wide)
    return float(rounded(rounded(total / len(values), wide), dtype))


@pytest.mark.parametrize("workers", [2, 3, 7])
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (np.float32, np.float32),
        (np.float64, np.float64),
        (np.float16, np.float32),
        (ml_dtypes.bfloat16, np.float32),
    ],
    ids=["f32", "f64", "f16", "bf16"],
)
def test_every_operation_is_rounded_once_and_sixteen_bits_at_the_end(workers: int, dtype: Any, wide: Any) -> None:
    grads = [(RNG.standard_normal(40) * 10.0 ** RNG.integers(-3, 4, 40)).astype(dtype) for _ in range(workers)]
    wanted = [expected([float(each[i]) for each in grads], wide, dtype) for i in range(40)]
    list(mean.into_first([[each] for each in grads]))
    assert grads[0].dtype == dtype
    assert [float(value) for value in grads[0]] == wanted


@pytest.mark.parametrize(("dtype", "part"), [(np.complex64, np.float32), (np.complex128, np.float64)], ids=str)
def test_complex_numbers_are_divided_part_by_part(dtype: Any, part: Any) -> None:
    grads = [(RNG.standard_normal(20) + 1j * RNG.standard_normal(20)).astype(dtype) for _ in range(3)]
    real = [expected([float(each[i].real) for each in grads], part, part) for i in range(20)]
    imag = [expected([float(each[i].imag) for each in grads], part, part) for i in range(20)]
    list(mean.into_first([[each] for each in grads]))
    assert (grads[0].real.tolist(), grads[0].imag.tolist()) == (real, imag)


def test_leaves_of_any_shape_and_length() -> None:
    shapes = [(), (0,), (1,), (mean._BLOCK - 1,), (2, mean._BLOCK), (3, mean._BLOCK // 2 + 1)]
    grads = [[np.full(shape, value, np.float32) for shape in shapes] for value in (1.0, 2.0, 6.0)]
    list(mean.into_first(grads))
    for shape, leaf in zip(shapes, grads[0], strict=True):
        np.testing.assert_array_equal(leaf, np.full(shape, 3.0, np.float32), strict=True)


def test_others_have_their_turn_after_every_million_elements() -> None:
    grads = [[np.ones(3 << 20, np.float32), np.ones(5, np.float32)] for _ in range(2)]
    assert len(list(mean.into_first(grads))) == 3


def test_what_is_not_finite_stays_so_without_a_warning() -> None:
    values = [np.inf, -np.inf, np.nan, 3e38, -0.0]
    grads = [np.array(values, np.float32), np.array([1.0, np.inf, 1.0, 3e38, -0.0], np.float32)]
    list(mean.into_first([[each] for each in grads]))
    assert [str(value) for value in grads[0]] == ["inf", "nan", "nan", "inf", "-0.0"]


def weighted(values: list[float], factors: list[float], divisor: float, wide: Any, dtype: Any) -> float:
    """As ``expected``, with what each value is multiplied by, and the sum divided by."""
    exact = fractions.Fraction
    total: fractions.Fraction | None = None
    for value, factor in zip(values, factors, strict=True):
        product = rounded(exact(value) * exact(float(np.dtype(wide).type(factor))), wide)
        total = product if total is None else rounded(total + product, wide)
    assert total is not None
    return float(rounded(rounded(total / exact(float(np.dtype(wide).type(divisor))), wide), dtype))


TYPES = pytest.mark.parametrize(
    ("dtype", "wide"),
    [(np.float32, np.float32), (np.float64, np.float64), (np.float16, np.float32), (ml_dtypes.bfloat16, np.float32)],
    ids=["f32", "f64", "f16", "bf16"],
)


@TYPES
def test_a_weighted_mean_is_rounded_after_each_operation(dtype: Any, wide: Any) -> None:
    grads = [RNG.standard_normal(40).astype(dtype) for _ in range(3)]
    factors = [3.0, 0.7, 11.0]
    wanted = [weighted([float(each[i]) for each in grads], factors, 14.7, wide, dtype) for i in range(40)]
    list(mean.into_first([[each] for each in grads], factors, 14.7))
    assert [float(value) for value in grads[0]] == wanted


@TYPES
def test_a_sum_of_pushes_as_they_come_is_that_of_pushes_that_wait(dtype: Any, wide: Any) -> None:
    grads = [[RNG.standard_normal((3, 5)).astype(dtype), RNG.standard_normal(()).astype(dtype)] for _ in range(3)]
    factors = [3.0, 0.7, 11.0]
    wanted = [
        [weighted([float(each[leaf].flat[i]) for each in grads], factors, 14.7, wide, dtype) for i in range(size)]
        for leaf, size in ((0, 15), (1, 1))
    ]
    total = mean.Sum()
    for _ in range(2):  # begun anew, nothing of what was there before is left
        copies = [[np.array(leaf) for leaf in each] for each in grads]
        total.begin()
        list(total.add(copies[0], factors[0]))
        list(total.add(copies[1], factors[1]))
        list(total.end(copies[2], factors[2], 14.7))
        assert [[float(value) for value in leaf.reshape(-1)] for leaf in copies[2]] == wanted
        assert all(np.array_equal(leaf, was) for leaf, was in zip(copies[0], grads[0], strict=True)), "only read"


def test_a_sum_takes_the_memory_that_it_says() -> None:
    leaves = [trees.LeafSpec("a", (3, 5), "bf16"), trees.LeafSpec("b", (7,), "f64"), trees.LeafSpec("c", (2,), "c64")]
    tree = trees.TreeSpec(tuple(leaves))
    total = mean.Sum()
    grads = [np.ones(leaf.shape, tensors.numpy_dtype(leaf.dtype)) for leaf in leaves]
    total.begin()
    list(total.add(grads, 1.0))
    assert sum(array.nbytes for array in total._total) == mean.sum_bytes(tree) == 15 * 4 + 7 * 8 + 2 * 8


def test_a_sum_of_complex_numbers_is_taken_part_by_part() -> None:
    grads = [(RNG.standard_normal(20) + 1j * RNG.standard_normal(20)).astype(np.complex64) for _ in range(2)]
    factors = [3.0, 0.7]
    parts = [
        [
            weighted([float(getattr(each[i], part)) for each in grads], factors, 3.7, np.float32, np.float32)
            for i in range(20)
        ]
        for part in ("real", "imag")
    ]
    total = mean.Sum()
    total.begin()
    list(total.add([grads[0]], factors[0]))
    list(total.end([grads[1]], factors[1], 3.7))
    assert [grads[1].real.tolist(), grads[1].imag.tolist()] == parts


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_delays_are_compensated_as_the_paper_says(dtype: Any) -> None:
    shape = (2, mean._BLOCK // 2 + 3)
    grad, old, new = (RNG.standard_normal(shape).astype(dtype) for _ in range(3))
    wide = [array.astype(np.float64) for array in (grad, old, new)]
    list(mean.compensate([grad], [(old, new)], 0.3))
    wanted = wide[0] + 0.3 * wide[0] ** 2 * (wide[2] - wide[1])
    np.testing.assert_allclose(grad, wanted, rtol=0, atol=20 * np.finfo(dtype).eps)


@pytest.mark.parametrize("pushes", [2, 3, 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16], ids=str)
def test_what_is_compiled_for_blocks_has_the_bits_of_numpy(pushes: int, dtype: Any) -> None:
    running = engine.Engine()
    tree = trees.flatten({"w": np.zeros(4096, dtype)}).spec
    program = running.compile(running.check(opt.sgd(0.1)), tree)
    grads = [(RNG.standard_normal(4096) * 10.0 ** RNG.integers(-3, 4, 4096)).astype(dtype) for _ in range(pushes)]
    assert program.means.take(grads, pushes) is None
    program.means.prepare(4096, np.dtype(dtype), pushes)
    taken = np.asarray(program.means.take(grads, pushes))
    list(mean.into_first([[each] for each in grads]))
    assert taken.tobytes() == grads[0].tobytes()
