"""Arrays of the caller: what a step reads from and fills, and what it refuses to fill."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import optwire
from optwire import optimizers as opt
from optwire_server import testing

TRANSPORTS = ("stream", "unary", "auto")


def nest() -> dict[str, object]:
    """Leaves within chunks and across them, an empty one, and several element types."""
    rng = np.random.default_rng(3)
    return {
        "a": rng.standard_normal((300, 7), np.float32),
        "b": [rng.standard_normal(200_001, np.float32), np.zeros((0, 3), np.float32)],
        "c": (rng.standard_normal(5).astype(np.float16), rng.standard_normal((), np.float32)),
    }


def leaves(tree) -> list[np.ndarray]:
    return [tree["a"], *tree["b"], *tree["c"]]


def equal(left, right) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(leaves(left), leaves(right), strict=True))


@pytest.fixture(params=TRANSPORTS)
def session(request: pytest.FixtureRequest, server: testing.Serving):
    with optwire.connect(server.target, transport=request.param) as client:
        yield client.create_session(nest(), opt.momentum(0.1, 0.9))


def test_a_step_fills_the_arrays_it_is_given(session: optwire.Session):
    own = nest()
    kept = leaves(own)
    filled = session.step(nest(), out=own)
    assert filled is own
    assert all(a is b for a, b in zip(leaves(filled), kept, strict=True))
    assert equal(own, session.params())
    assert session.params(out=own) is own
    updates = session.step(nest(), reply="updates", out=own)
    assert updates is own
    with pytest.raises(optwire.InvalidArgumentError, match="out: given with reply='none'"):
        session.step(nest(), reply="none", out=own)
    assert session.step_count == 2


def test_a_step_into_given_arrays_has_the_bits_of_a_step_into_new_ones(server: testing.Serving):
    with optwire.connect(server.target) as client:
        sessions = [client.create_session(nest(), opt.adam(0.01)) for _ in range(2)]
        out = sessions[1].param_buffers()
        for _ in range(3):
            assert equal(sessions[0].step(nest()), sessions[1].step(nest(), out=out))


def test_buffers_are_always_the_same_arrays(session: optwire.Session):
    for buffers in (session.grad_buffers, session.param_buffers):
        first, second = buffers(), buffers()
        is_shared = session.info().transport == "shared_memory"  # there leaves lie as the server computes with them
        assert list(first) == ["a", "b", "c"]
        for a, b, like in zip(leaves(first), leaves(second), leaves(nest()), strict=True):
            assert np.shares_memory(a, b) or not a.size
            assert (a.shape, a.dtype) == (like.shape, like.dtype)
            assert is_shared or a.ctypes.data % 64 == 0 or not a.size
            assert not a.any()
    grads, params = session.grad_buffers(), session.param_buffers()
    for buffer, array in zip(leaves(grads), leaves(nest()), strict=True):
        buffer[...] = array
    session.step(grads, out=params)
    assert equal(session.param_buffers(), session.params())


def read_only(tree):
    tree["a"].flags.writeable = False
    return tree


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (read_only, r"out\['a'\]: an array that is read-only"),
        (lambda tree: tree | {"a": np.zeros((7, 300), np.float32).T}, r"out\['a'\]: an array that is not contiguous"),
        (
            lambda tree: tree | {"a": np.zeros((300, 7), ">f4")},
            r"out\['a'\]: an array that is not contiguous and little",
        ),
        (lambda tree: tree | {"a": np.zeros((300, 8), np.float32)}, r"out\['a'\]: shape \(300, 8\)"),
        (lambda tree: tree | {"a": np.zeros((300, 7), np.float64)}, r"out\['a'\]: element type f64"),
        (lambda tree: tree | {"a": None}, r"out\['a'\]: None"),
        (lambda tree: {"a": tree["a"]}, r"out: .* missing"),
    ],
)
def test_arrays_that_cannot_be_filled_are_refused_and_nothing_is_sent(session: optwire.Session, change, message: str):
    with pytest.raises(optwire.TreeMismatchError, match=message):
        session.step(nest(), out=change(nest()))
    assert session.info().step == 0


def test_arrays_of_other_libraries_are_not_filled(session: optwire.Session):
    class Foreign:
        def __array__(self, dtype=None, copy=None) -> np.ndarray:
            return np.zeros((300, 7), np.float32)

    with pytest.raises(optwire.TreeMismatchError, match=r"out\['a'\]: Foreign, expected a NumPy array"):
        session.step(nest(), out=nest() | {"a": Foreign()})


def test_arrays_that_lie_over_the_gradients_or_each_other_are_refused(session: optwire.Session):
    """A push that has to be sent again must be the same push."""
    grads = nest()
    with pytest.raises(optwire.InvalidArgumentError, match="out: arrays that share memory"):
        session.step(grads, out=grads)
    whole = np.zeros((400, 7), np.float32)
    with pytest.raises(optwire.InvalidArgumentError, match="out: arrays that share memory"):
        session.step(nest() | {"a": whole[:300]}, out=nest() | {"a": whole[100:]})
    twice = np.zeros(200_001, np.float32)
    with pytest.raises(optwire.InvalidArgumentError, match="out: arrays that share memory"):
        session.step(nest(), out=nest() | {"a": twice[:2100].reshape(300, 7), "b": [twice, nest()["b"][1]]})
    session.step(nest() | {"a": whole[:300]}, out=nest() | {"b": [twice, nest()["b"][1]]})  # side by side is apart
    assert session.step_count == 1


def test_a_handle_does_not_keep_what_it_was_given(session: optwire.Session):
    grads, out = nest(), nest()
    session.step(grads, out=out)
    session.step_async(grads, out=out).result()
    gone = [weakref.ref(array) for array in (*leaves(grads), *leaves(out)) if isinstance(array, np.ndarray)]
    del grads, out
    gc.collect()
    session.params()  # the thread that did it has passed on
    assert [ref() for ref in gone if ref() is not None] == []
