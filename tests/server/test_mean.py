"""The mean of several workers' gradients, against exact rational arithmetic rounded one operation at a time."""

from __future__ import annotations

import fractions
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optwire_server.engine import mean

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
