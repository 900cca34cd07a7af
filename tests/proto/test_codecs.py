"""Codecs against their definitions, in float64 NumPy one block at a time, and against ml_dtypes."""

import math
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from optwire_proto import codecs, errors, limits, tensors, trees
from optwire_proto.codecs import codec as codec_module

ALL = ("f32", "bf16", "f16", "int8", "top_k(0.01)", "top_k(0.3)", "sign")
LOSSY = ALL[3:]
SIZES = (0, 1, 7, 255, 256, 257, 4095, 4096, 4097, codec_module.PIECE - 1, codec_module.PIECE + 4097)


def drawn(size, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(size) * np.exp(3 * rng.standard_normal(size))
    return values.clip(-30_000, 30_000).astype(np.float32)  # within what 16 bits can say


def encoded(how, values, *, left=None, plus=None, factor=1.0):
    leaf = trees.LeafSpec("w", values.shape, tensors.dtype_name(values.dtype))
    arrays = [np.empty(part.shape, tensors.numpy_dtype(part.dtype)) for part in how.encoded(leaf)]
    how.encode(values.size, codecs.reader(values.reshape(-1), plus, factor), arrays, left)
    return arrays


def decoded(how, arrays, size, dtype=np.float32):
    out = np.full(size, 77, dtype)
    how.decode(arrays, out, "grads['w']")
    return out


def oracle(text, values):
    """What a receiver has of values, by the definition in docs/codecs.md, one block after another."""
    x = values.astype(np.float64)
    out = np.zeros_like(x)
    if text == "int8":
        for start in range(0, x.size, 256):
            block = x[start : start + 256]
            scale = np.float64(np.float32(np.abs(block).max()) / np.float32(127))
            codes = np.rint(block.astype(np.float32) / np.float32(scale)) if scale else np.zeros_like(block)
            out[start : start + 256] = np.float32(scale) * codes.astype(np.float32)
    elif text == "sign":
        for start in range(0, x.size, 4096):
            block = x[start : start + 4096]
            out[start : start + 4096] = np.where(block < 0, -1, 1) * np.abs(block).mean()
    elif text.startswith("top_k"):
        count = math.ceil(float(text[6:-1]) * x.size)
        order = np.lexsort((np.arange(x.size), -np.abs(x)))[:count]
        out[order] = x[order]
    else:
        to = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}[text]
        with np.errstate(over="ignore"):
            out[:] = values.astype(to).astype(np.float64)
    return out


@pytest.mark.parametrize("text", ALL)
def test_what_arrives_is_what_the_definition_says(text):
    how = codecs.parse(text)
    for size in SIZES:
        values = drawn(size, size)
        got = decoded(how, encoded(how, values), size)
        np.testing.assert_allclose(got, oracle(text, values), rtol=2e-6, atol=0, err_msg=f"{size}")
        if text in ("bf16", "f16", "int8", "f32") or text.startswith("top_k"):
            np.testing.assert_array_equal(got, oracle(text, values).astype(np.float32))


@pytest.mark.parametrize("text", ALL)
def test_what_is_left_behind_and_what_arrives_make_the_whole(text):
    how = codecs.parse(text)
    values = drawn(300_000)
    plus = drawn(300_000, 1)
    left = np.empty_like(values)
    arrays = encoded(how, values, left=left, plus=plus)
    whole = values + plus
    got = decoded(how, arrays, values.size)
    if text == "f32":
        assert not left.any()
        return
    np.testing.assert_array_equal(left, whole - got)
    again = encoded(how, whole)  # without a residual: the same bytes
    assert [array.tobytes() for array in again] == [array.tobytes() for array in arrays]


def test_a_residual_follows_the_scale_of_the_gradients():
    values, plus = drawn(5000), drawn(5000, 1)
    how = codecs.parse("int8")
    scaled, whole = encoded(how, values, plus=plus, factor=0.5), encoded(how, values + plus / 2)
    assert [array.tobytes() for array in scaled] == [array.tobytes() for array in whole]


@pytest.mark.parametrize("text", ALL)
def test_to_add_is_to_decode_and_add(text):
    how = codecs.parse(text)
    values, base = drawn(140_000), drawn(140_000, 1)
    arrays = encoded(how, values)
    for dtype in (np.float32, np.float64):
        out = base.astype(dtype)
        how.add(arrays, out, "params")
        np.testing.assert_array_equal(out, base.astype(dtype) + decoded(how, arrays, values.size))


@pytest.mark.parametrize("text", ALL)
def test_leaves_of_64_bits_are_rounded_to_32_first(text):
    how = codecs.parse(text)
    values = np.random.default_rng(0).standard_normal(9000)
    leaf = trees.LeafSpec("w", (9000,), "f64")
    if text == "f32":
        assert how.encoded(leaf) == (leaf,)
        return
    wide, narrow = encoded(how, values), encoded(how, values.astype(np.float32))
    assert [array.tobytes() for array in wide] == [array.tobytes() for array in narrow]
    np.testing.assert_array_equal(decoded(how, wide, 9000, np.float64), decoded(how, narrow, 9000))


@pytest.mark.parametrize("text", ALL)
def test_all_but_real_numbers_of_32_and_64_bits_travel_as_they_are(text):
    how = codecs.parse(text)
    for dtype in tensors.DTYPE_NAMES:
        leaf = trees.LeafSpec("w", (3, 5), dtype)
        assert how.bears_on(leaf.dtype) == (dtype in ("f32", "f64") and text != "f32")
        assert how.bears_on(leaf.dtype) or how.encoded(leaf) == (leaf,)


@pytest.mark.parametrize(
    ("text", "share"), [("bf16", 0.5), ("f16", 0.5), ("int8", 0.27), ("top_k(0.01)", 0.03), ("sign", 0.04)]
)
def test_the_bytes_are_as_few_as_promised(text, share):
    leaf = trees.LeafSpec("w", (784, 256), "f32")
    assert codecs.parse(text).encoded_bytes(leaf) <= share * leaf.nbytes


# ------------------------------------------------------------------------------------------------------------- bf16

PATTERNS = (
    (np.arange(2**16, dtype=np.uint32) << 16)[:, None]
    + np.array([0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x5A5A], np.uint32)
).reshape(-1)


def bf16_bits():
    values = PATTERNS.view(np.float32)
    return encoded(codecs.BF16(), values)[0].view(np.uint16)


def test_bf16_rounds_as_ml_dtypes_at_every_pattern(monkeypatch):
    values = PATTERNS.view(np.float32)
    with np.errstate(all="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    numbers = ~np.isnan(values)
    with_it = bf16_bits()
    monkeypatch.delitem(sys.modules, "ml_dtypes")
    without = bf16_bits()
    for bits in (with_it, without):
        np.testing.assert_array_equal(bits[numbers], expected[numbers])
        wide = np.empty(bits.size, np.float32)
        codecs.BF16().widen(bits, wide)
        assert np.isnan(wide[~numbers]).all()
    every = np.arange(2**16, dtype=np.uint16)
    wide = np.empty(2**16, np.float32)
    codecs.BF16().widen(every, wide)
    np.testing.assert_array_equal(wide.view(np.uint32), every.astype(np.uint32) << 16)


def test_bf16_needs_no_ml_dtypes():
    code = (
        "import sys, numpy as np; from optwire_proto import codecs\n"
        "values, bits = np.float32([1.00390625, 1.01171875, np.nan, 3.4e38, -0.0]), np.empty(5, np.uint16)\n"
        "codecs.BF16().encode(5, codecs.reader(values), [bits])\n"
        "print(bits.tolist(), 'ml_dtypes' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert out.strip() == "[16256, 16258, 32704, 32640, 32768] False"


# ------------------------------------------------------------------------------------------------------ not finite

BAD = (np.nan, np.inf, -np.inf)


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_arrives_as_not_finite(text, bad):
    how = codecs.parse(text)
    values = drawn(20_000)
    values[12_345] = bad
    left = np.empty_like(values)
    got = decoded(how, encoded(how, values, left=left), values.size)
    assert not np.isfinite(got[12_345])
    assert np.isfinite(left).all(), "a residual would stay so for ever"
    around = np.delete(got, 12_345)
    if text == "sign":  # a whole block of it
        assert np.isnan(got[8192 + 4096 : 16384]).all()
        around = np.delete(got, slice(12_288, 16_384))
    assert np.isfinite(around).all()


@pytest.mark.parametrize("text", LOSSY)
def test_more_that_is_not_finite_than_is_sent_leaves_nothing_of_it_behind(text):
    values, left = np.full(5000, np.inf, np.float32), np.empty(5000, np.float32)
    values[::2] = np.nan
    how = codecs.parse(text)
    got = decoded(how, encoded(how, values, left=left), 5000)
    assert not np.isfinite(got).all()
    assert np.isfinite(left).all()


@pytest.mark.parametrize("text", ALL)
def test_the_largest_and_the_smallest_numbers_stay_numbers(text):
    how = codecs.parse(text)
    tiny = np.full(9000, np.finfo(np.float32).smallest_subnormal * 100, np.float32)
    tiny[::3] = np.finfo(np.float32).smallest_subnormal * 190
    huge = np.full(9000, np.finfo(np.float32).max, np.float32)
    for values in (tiny, -tiny, huge, -huge, np.zeros(9000, np.float32)):
        left = np.empty_like(values)
        got = decoded(how, encoded(how, values, left=left), values.size)
        if text in ("bf16", "f16") and abs(values[0]) > 1:
            assert np.isinf(got).all(), "as IEEE 754 rounds"
            continue
        assert np.isfinite(got).all()
        assert np.isfinite(left).all()
        assert (np.abs(got) <= np.abs(values).max()).all()


# ------------------------------------------------------------------------------------------------------------ top-k


def test_of_equal_magnitudes_those_at_lower_positions_are_sent():
    values = np.tile(np.float32([1, -1, 2, 0]), 50_000)
    indices, sent = encoded(codecs.TopK(0.3), values)
    twos, ones = np.arange(2, 200_000, 4), np.flatnonzero(np.abs(values) == 1)[:10_000]
    np.testing.assert_array_equal(indices, np.sort(np.concatenate([twos, ones])))
    np.testing.assert_array_equal(sent, values[indices])


@pytest.mark.parametrize("size", [1_000_003, 300_000])
@pytest.mark.parametrize("shape", ["normal", "columns", "few", "same", "sorted"])
def test_the_guess_of_the_threshold_has_no_influence(shape, size):
    values = drawn(size)
    if shape == "columns":  # all that is large stands where no sample is taken
        values[:] = 0.001
        values[5::64] = 1 + np.arange(values[5::64].size, dtype=np.float32)
    elif shape == "few":
        values[:] = 0
        values[[3, size - 1]] = 5
    elif shape == "same":
        values[:] = 0.5
    elif shape == "sorted":
        values.sort()
    indices, _ = encoded(codecs.TopK(0.01), values)
    order = np.lexsort((np.arange(size), -np.abs(values.astype(np.float64))))[: math.ceil(0.01 * size)]
    np.testing.assert_array_equal(indices, np.sort(order))


# --------------------------------------------------------------------------------------------------------- malformed


def damaged(text, change):
    how = codecs.parse(text)
    arrays = encoded(how, drawn(5001))
    change(arrays)
    with pytest.raises(errors.PayloadError, match=r"grads\['w'\]") as caught:
        decoded(how, arrays, 5001)
    assert caught.value.subject == "grads['w']"
    return str(caught.value)


def put(array, at, value):
    return lambda arrays: arrays[array].__setitem__(at, value)


def test_encoded_arrays_that_mean_no_values_are_refused():
    for text in ("int8", "sign"):
        for scale in (np.inf, -np.inf, -1.0):
            assert "scale 1" in damaged(text, put(0, 1, scale))
    assert "scale 1" in damaged("int8", put(0, 1, np.nan))
    assert "less than 5001" in damaged("top_k(0.01)", put(0, -1, 5001))
    assert "less than 5001" in damaged("top_k(0.01)", put(0, -1, 2**32 - 1))
    assert "the one before" in damaged("top_k(0.01)", lambda arrays: put(0, 7, arrays[0][6])(arrays))
    assert "the one before" in damaged("top_k(0.01)", lambda arrays: put(0, 7, 0)(arrays))
    assert "zeros after" in damaged("sign", lambda arrays: put(1, -1, 0x80)(arrays))


# ----------------------------------------------------------------------------------------------------------- decoder

TREE = (
    trees.LeafSpec("flag", (3,), "u8"),
    trees.LeafSpec("a/w", (70, 70), "f32"),
    trees.LeafSpec("none", (0, 4), "f32"),
    trees.LeafSpec("n", (), "f32"),
    trees.LeafSpec("wide", (601,), "f64"),
    trees.LeafSpec("half", (5,), "bf16"),
)


def a_payload(how):
    rng = np.random.default_rng(3)
    data, expected = b"", []
    for leaf in TREE:
        values = np.asarray(rng.standard_normal(leaf.shape) * 9).astype(tensors.numpy_dtype(leaf.dtype))
        if not how.bears_on(leaf.dtype):
            arrays = [values]
            expected.append(values)
        else:
            arrays = encoded(how, values.reshape(-1))
            expected.append(decoded(how, arrays, leaf.elements, values.dtype).reshape(leaf.shape))
        data += b"".join(array.tobytes() for array in arrays)
    return data, expected


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("chunk", [1, 3, 64, 1001, 10**9])
def test_a_payload_in_pieces_of_any_length_is_decoded(text, chunk):
    how = codecs.parse(text)
    data, expected = a_payload(how)
    out = [np.empty(leaf.shape, tensors.numpy_dtype(leaf.dtype)) for leaf in TREE]
    decoder = codecs.Decoder(how, TREE, out, "grads")
    assert decoder.payload_bytes == len(data)
    for start in range(0, len(data), chunk):
        decoder.write(data[start : start + chunk])
    decoder.check()
    for got, wanted in zip(out, expected, strict=True):
        assert got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("text", ["f32", "bf16", "f16"])
def test_a_payload_that_is_cast_as_it_leaves_is_the_same(text):
    how = codecs.parse(text)
    rng = np.random.default_rng(5)
    arrays = [
        np.arange(3, dtype=np.uint8),  # so that values of two bytes stand at odd places
        rng.standard_normal((700, 1001), np.float32),
        rng.standard_normal(400_001),
        np.zeros((0, 3), np.float32),
        rng.standard_normal(9).astype(np.float16),
    ]
    expected = b""
    for array in arrays:
        is_cast = how.bears_on(tensors.dtype_name(array.dtype))
        expected += b"".join(part.tobytes() for part in (encoded(how, array) if is_cast else [array]))
    pieces = [b"".join(piece) for piece in codecs.payload_views(how, list(arrays))]
    assert b"".join(pieces) == expected
    assert max(map(len, pieces)) <= limits.CHUNK_BYTES
    assert min(map(len, pieces[:-1])) >= limits.CHUNK_BYTES - 1


def test_the_first_leaf_that_means_no_values_is_named():
    how = codecs.TopK(0.01)
    data, _ = a_payload(how)
    out = [np.empty(leaf.shape, tensors.numpy_dtype(leaf.dtype)) for leaf in TREE]
    decoder = codecs.Decoder(how, TREE, out, "grads")
    decoder.write(data[:3] + b"\xff" * (len(data) - 3))
    with pytest.raises(errors.PayloadError, match="grads\\['a/w'\\]: index 1 is 4294967295"):
        decoder.check()


# -------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("text", ALL)
def test_a_codec_is_its_text(text):
    how = codecs.parse(text)
    assert str(how) == text
    assert codecs.parse(str(how)) == how
    assert codecs.of(how.kind, codecs.fraction(how)) == how
    assert hash(codecs.parse(text)) == hash(how)


def test_top_k_without_a_fraction_is_a_hundredth():
    assert codecs.parse("top_k") == codecs.TopK(0.01) == codecs.parse("top_k(1e-2)")


@pytest.mark.parametrize(
    "text", ["", "f64", "BF16", "top_k()", "top_k(0)", "top_k(nan)", "top_k(0.6)", "top_k(-0.1)", "top_k(1_0)", 7, None]
)
def test_what_is_no_codec_is_refused_by_name(text):
    with pytest.raises(errors.InvalidArgumentError, match="params_codec: .*expected one of f32, bf16"):
        codecs.parse(text, "params_codec")


def test_a_session_has_one_fraction():
    assert codecs.fraction(codecs.TopK(0.1), codecs.TopK(0.1)) == 0.1
    assert codecs.fraction(codecs.RAW, codecs.TopK(0.1)) == 0.1
    assert codecs.fraction(codecs.RAW, codecs.Int8()) == 0.0
    with pytest.raises(errors.InvalidArgumentError, match="fractions 0.1 and 0.2"):
        codecs.fraction(codecs.TopK(0.2), codecs.TopK(0.1))


def test_a_leaf_beyond_32_bits_of_positions_is_refused():
    with pytest.raises(errors.TreeError, match="top_k"):
        codecs.TopK(0.01).encoded(trees.LeafSpec("w", (2**32 + 1,), "f32"))


def _at_every(stride: int, here: float, elsewhere: float, size: int) -> np.ndarray:
    large = np.where(np.arange(size) % stride == 0, here, elsewhere)
    return (large * np.random.default_rng(5).uniform(1, 2, size)).astype(np.float32)


# A sample of every 31st value, as top_k takes it of so many, says little of the last two.
MISLEADING = {
    "alike": lambda size: np.ones(size, np.float32),
    "drawn": drawn,
    "the sampled ones are large": lambda size: _at_every(31, 1.0, 1e-3, size),
    "the sampled ones are small": lambda size: _at_every(31, 1e-3, 1.0, size),
}


@pytest.mark.parametrize("text", [*LOSSY, "top_k(0.5)"])
@pytest.mark.parametrize("kind", MISLEADING)
def test_encoding_takes_no_more_memory_than_it_says(text, kind):
    how, size = codecs.parse(text), 2_000_000
    values = MISLEADING[kind](size)
    leaf = trees.LeafSpec("w", (size,), "f32")
    arrays = [np.empty(part.shape, tensors.numpy_dtype(part.dtype)) for part in how.encoded(leaf)]
    tracemalloc.start()
    try:
        how.encode(size, codecs.reader(values), arrays)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    pieces = 24 * codec_module.PIECE  # what is worked on at once, whatever the size
    assert peak <= how.encoding_bytes(size) + pieces
    assert how.encoding_bytes(size) <= 2 * peak


@pytest.mark.parametrize("fraction", [1e-4, 0.01, 0.3, 0.5])
@pytest.mark.parametrize("kind", MISLEADING)
def test_what_a_sample_says_of_the_largest_does_not_change_which_they_are(fraction, kind):
    how, size = codecs.TopK(fraction), 2_000_003
    values = MISLEADING[kind](size)
    arrays = [np.empty(how.count(size), np.uint32), np.empty(how.count(size), np.float32)]
    how.encode(size, codecs.reader(values), arrays)
    wanted = np.sort(np.argsort(-np.abs(values), kind="stable")[: how.count(size)])
    assert np.array_equal(arrays[0], wanted)
    assert np.array_equal(arrays[1], values[wanted])
