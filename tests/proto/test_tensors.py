"""Element types and bytes: every type there and back, every layout, and bfloat16 exactly as ml_dtypes has it."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from optwire_proto import errors, tensors

BF16 = np.dtype(ml_dtypes.bfloat16)
VALUES = {
    "f32": [0.0, -0.0, 1.5, np.inf, -np.inf, np.nan, 1e-45],
    "f64": [0.0, -0.0, 1.5, np.inf, np.nan, 5e-324],
    "bf16": [0.0, -0.0, 1.5, np.inf, np.nan, 3.0e38],
    "f16": [0.0, -0.0, 1.5, np.inf, np.nan, 6e-8],
    "c64": [0, 1 - 2j, complex(np.inf, np.nan)],
    "c128": [0, 1 - 2j, complex(-np.inf, 5e-324)],
    "i8": [-128, 0, 127],
    "i16": [-(2**15), 0, 2**15 - 1],
    "i32": [-(2**31), 0, 2**31 - 1],
    "i64": [-(2**63), 0, 2**63 - 1],
    "u8": [0, 255],
    "u16": [0, 2**16 - 1],
    "u32": [0, 2**32 - 1],
    "u64": [0, 2**64 - 1],
    "bool": [True, False],
}
SIZES = {"f32": 4, "f64": 8, "bf16": 2, "f16": 2, "c64": 8, "c128": 16, "bool": 1} | {
    f"{sign}{bits}": bits // 8 for sign in "iu" for bits in (8, 16, 32, 64)
}
MULTIBYTE = [name for name in VALUES if SIZES[name] > 1 and name != "bf16"]


def sample(name: str) -> np.ndarray:
    return np.array(VALUES[name], tensors.numpy_dtype(name))


def test_every_element_type_is_sampled():
    assert set(tensors.DTYPE_NAMES) == set(VALUES) == set(SIZES)


@pytest.mark.parametrize("name", VALUES)
def test_an_element_type_survives_the_way_there_and_back(name: str):
    array = sample(name)
    assert tensors.dtype_name(array.dtype) == name
    got, wire = tensors.wire_array(array, "x")
    assert got == name
    data = bytes(tensors.wire_bytes(wire))
    assert data == array.astype(array.dtype.newbyteorder("<")).tobytes()
    assert tensors.itemsize(name) == SIZES[name] == len(data) // array.size
    back = tensors.empty(array.shape, name)
    tensors.wire_bytes(tensors.wire_array(back, "x")[1])[:] = data
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("name", VALUES)
def test_an_array_that_is_laid_out_right_is_not_copied(name: str):
    array = sample(name)
    _, wire = tensors.wire_array(array, "x")
    assert np.shares_memory(wire, array)
    wire = tensors.wire_bytes(wire)
    assert np.shares_memory(np.frombuffer(wire, np.uint8), array)


@pytest.mark.parametrize("name", MULTIBYTE)
def test_big_endian_is_turned_round(name: str):
    array = sample(name)
    got, wire = tensors.wire_array(array.astype(array.dtype.newbyteorder(">")), "x")
    assert got == name
    assert bytes(tensors.wire_bytes(wire)) == array.tobytes()


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(np.asfortranarray, id="Fortran order"),
        pytest.param(lambda a: np.repeat(np.repeat(a, 2, 0), 3, 1)[::2, ::3], id="strided"),
        pytest.param(lambda a: a[::-1, ::-1].copy()[::-1, ::-1], id="backwards"),
        pytest.param(lambda a: np.moveaxis(np.moveaxis(a, 0, 1).copy(), 0, 1), id="transposed"),
    ],
)
def test_layouts_become_rows(name: str, layout):
    values = sample(name)
    array = np.stack([values, values[::-1]])
    _, wire = tensors.wire_array(layout(array), "x")
    assert wire.flags.c_contiguous
    assert wire.shape == array.shape
    assert bytes(tensors.wire_bytes(wire)) == array.tobytes()


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1, 1)])
def test_shapes_are_kept(name: str, shape: tuple[int, ...]):
    for order in ("<", ">"):
        dtype = tensors.numpy_dtype(name)
        array = np.ones(shape, dtype if name == "bf16" else dtype.newbyteorder(order))
        got, wire = tensors.wire_array(array, "x")
        assert (got, wire.shape) == (name, shape)
        assert len(tensors.wire_bytes(wire)) == array.nbytes


def test_a_slice_of_no_dimension_is_kept():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    _, wire = tensors.wire_array(array[1, 2, ...], "x")
    assert (wire.shape, wire[()]) == ((), 5.0)


def test_both_forms_of_bf16_are_one_element_type():
    bits = np.array([0x3F80, 0xBF80, 0x7FC0], np.uint16)
    ours, theirs = bits.view(tensors.BF16), bits.view(BF16)
    assert tensors.is_bf16(ours.dtype)
    assert tensors.is_bf16(theirs.dtype)
    for array in (ours, theirs):
        name, wire = tensors.wire_array(array, "x")
        assert name == "bf16"
        assert bytes(tensors.wire_bytes(wire)) == bits.tobytes()
    assert tensors.dtype_name(bits.dtype) == "u16"


@pytest.mark.parametrize(
    "change", [np.copy, lambda a: a.reshape(1, 3), lambda a: a[:], lambda a: a[::2], np.asfortranarray]
)
def test_our_bf16_survives_what_keeps_elements(change):
    assert tensors.dtype_name(change(np.zeros(3, tensors.BF16)).dtype) == "bf16"


def test_bf16_is_ours_where_ml_dtypes_is_not_loaded():
    program = (
        "import sys, numpy as np; from optwire_proto import tensors;"
        "assert 'ml_dtypes' not in sys.modules; array = tensors.f32_to_bf16(np.float32([1, -2]));"
        "assert tensors.dtype_name(array.dtype) == 'bf16' and array.tolist() == [0x3F80, 0xC000];"
        "assert tensors.bf16_to_f32(array).tolist() == [1, -2];"
        "assert tensors.dtype_name(tensors.empty((2,), 'bf16').dtype) == 'bf16'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_other_types_are_refused_by_name():
    served = set(tensors.DTYPE_NAMES)
    for name in (
        "float8_e5m2",
        "float8_e4m3fn",
        "float8_e4m3b11fnuz",
        "float8_e3m4",
        "int4",
        "uint4",
        "int2",
        "float4_e2m1fn",
    ):
        dtype = np.dtype(getattr(ml_dtypes, name))
        assert tensors.dtype_name(dtype) is None, name
        with pytest.raises(errors.TreeError, match=f"x: element type {name}, expected one of f32"):
            tensors.wire_array(np.zeros(2, dtype), "x")
    for dtype in (object, "U3", "S3", "M8[s]", "m8[ns]", np.dtype([("a", "f4")]), np.dtype("V4"), np.dtype("f4,f4")):
        assert tensors.dtype_name(np.dtype(dtype)) is None
    if np.dtype(np.longdouble).itemsize > 8:
        assert tensors.dtype_name(np.dtype(np.longdouble)) is None
        assert tensors.dtype_name(np.dtype(np.clongdouble)) is None
    assert {tensors.dtype_name(np.dtype(code)) for code in "?bBhHiIlLqQefdFD"} <= served


@pytest.mark.parametrize("low", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_rounding_to_bf16_is_that_of_ml_dtypes_for_every_upper_half(low: int):
    bits = (np.arange(2**16, dtype=np.uint32) << np.uint32(16)) | np.uint32(low)
    values = bits.view(np.float32)
    ours = tensors.f32_to_bf16(values)
    with np.errstate(all="ignore"):
        theirs = values.astype(BF16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(np.isnan(tensors.bf16_to_f32(ours)), nan)
    np.testing.assert_array_equal(ours.view(np.uint16)[~nan], theirs.view(np.uint16)[~nan])
    # A NaN stays one of its sign, and a quiet one.
    np.testing.assert_array_equal(ours.view(np.uint16)[nan] >> 15, bits[nan] >> np.uint32(31))
    assert (ours.view(np.uint16)[nan] & 0x0040).all()


def test_widening_bf16_is_exact():
    bits = np.arange(2**16, dtype=np.uint16)
    ours = tensors.bf16_to_f32(bits.view(tensors.BF16))
    np.testing.assert_array_equal(ours.view(np.uint32), bits.astype(np.uint32) << np.uint32(16))
    finite = ~np.isnan(ours)
    np.testing.assert_array_equal(ours[finite], bits.view(BF16).astype(np.float32)[finite])
    np.testing.assert_array_equal(tensors.f32_to_bf16(ours).view(np.uint16)[finite], bits[finite])


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3), (3, 1, 2)])
def test_conversions_keep_the_shape(shape: tuple[int, ...]):
    values = np.full(shape, 1.0 + 2**-7, np.float32)
    narrow = tensors.f32_to_bf16(values)
    assert narrow.shape == shape
    assert tensors.dtype_name(narrow.dtype) == "bf16"
    wide = tensors.bf16_to_f32(narrow)
    assert (wide.shape, wide.dtype) == (shape, np.float32)
    np.testing.assert_array_equal(wide, values)


def test_conversions_take_any_layout():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    for array in (values.T, values[::2, ::3], values.astype(">f4"), np.asfortranarray(values)):
        np.testing.assert_array_equal(tensors.bf16_to_f32(tensors.f32_to_bf16(array)), array)
    narrow = tensors.f32_to_bf16(values)
    np.testing.assert_array_equal(tensors.bf16_to_f32(narrow.T), values.T)
    np.testing.assert_array_equal(tensors.bf16_to_f32(narrow[::2, ::3]), values[::2, ::3])


def test_conversions_warn_of_nothing():
    values = np.array([np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45], np.float32)
    with np.errstate(all="raise"):
        tensors.f32_to_bf16(values)
