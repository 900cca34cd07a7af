"""Digests tell payloads apart: whatever a retry or a bad link may make of one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optwire_proto import digests

RNG = np.random.default_rng(0)
LENGTHS = (0, 1, 4, 7, 8, 60, 4095, 4096, 4097, 8192, 12_345, 2**20 + 3)


def noise(length: int) -> bytes:
    return RNG.bytes(length)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_digest_does_not_depend_on_the_pieces(length: int):
    data = noise(length)
    whole = digests.digest(data)
    assert whole.length == length
    for size in (1 if length < 10_000 else 999, 7 if length < 10_000 else 5000, 4096, 4097, 2**20):
        digester = digests.Digester()
        for start in range(0, length, size):
            digester.update(data[start : start + size])
        assert digester.digest() == whole


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=9000), cuts=st.lists(st.integers(0, 9000), max_size=6))
def test_a_digest_does_not_depend_on_any_pieces(data: bytes, cuts: list[int]):
    digester = digests.Digester()
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 9000], strict=True):
        digester.update(data[start:end])
    assert digester.digest() == digests.digest(data)


@pytest.mark.parametrize("length", [60, 4096, 9000])
def test_every_flipped_bit_is_seen(length: int):
    data = bytearray(noise(length))
    good = digests.digest(bytes(data))
    for bit in range(0, 8 * length, 1 if length < 100 else 61):
        data[bit // 8] ^= 1 << bit % 8
        assert digests.digest(bytes(data)) != good
        data[bit // 8] ^= 1 << bit % 8


def test_zeros_at_the_end_are_seen():
    assert len({digests.digest(bytes(length)) for length in range(5000)}) == 5000


X = {
    (kind, size): RNG.standard_normal(size).astype(kind)
    for kind in (np.float16, np.float32, np.float64)
    for size in (2, 4, 64, 1024, 5000)
}


@pytest.mark.parametrize("x", X.values(), ids=[f"{np.dtype(kind).name} {size}" for kind, size in X])
def test_gradients_that_differ_have_digests_that_differ(x: np.ndarray):
    half = x.size // 2
    pair = x.copy()
    pair[[0, half]] *= -1
    others = {
        "the same": x,
        "negated": -x,
        "two signs flipped": pair,
        "every other sign flipped": np.where(np.arange(x.size) % 2, -x, x),
        "halves exchanged, as two leaves of one shape would be": np.roll(x, half),
        "reversed": x[::-1],
        "rolled by one": np.roll(x, 1),
        "rolled by eight": np.roll(x, 8 if x.size > 8 else 1),
        "doubled": 2 * x,
        "one added here and taken there": x
        + np.where(np.arange(x.size) == 0, 1, np.where(np.arange(x.size) == 1, -1, 0)),
        "the first element lost": np.append(x[1:], 0),
        "zero": 0 * x,
        "negative zero": -0.0 * abs(x),
    }
    data = {array.astype(x.dtype).tobytes() for array in others.values()}
    assert len({digests.digest(bytes_) for bytes_ in data}) == len(data)


def test_a_transposed_matrix_has_another_digest():
    for size in (8, 16, 32, 64):
        matrix = RNG.standard_normal((size, size), np.float32)
        assert digests.digest(matrix.tobytes()) != digests.digest(matrix.T.tobytes())


def test_sign_patterns_of_small_gradients_are_told_apart():
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 10)).reshape(10, -1).T
    for dtype in (np.float16, np.float32, np.float64):
        assert len({digests.digest(row.astype(dtype).tobytes()) for row in signs}) == 2**10


def test_blocks_exchanged_are_seen():
    blocks = [noise(4096) for _ in range(4)]
    good = digests.digest(b"".join(blocks))
    for i in range(4):
        for j in range(i):
            moved = list(blocks)
            moved[i], moved[j] = moved[j], moved[i]
            assert digests.digest(b"".join(moved)) != good
