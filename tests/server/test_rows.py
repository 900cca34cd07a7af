"""Gradients by rows, in the engine: which elements they are, and what lazy and exact updates make of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optwire_proto import checks, errors, rows, spec_text, trees
from optwire_server.engine import build, cut, device, held, landing, lazy, movers, program
from optwire_server.engine import rows as engine_rows
from optwire_server.engine.program import Operands, Variant

# A table that ends in the middle of a block, one that shares its blocks with small leaves, and rows across blocks.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "small": {"a": (3,), "table": (40, 3), "z": ()},
    "across": {"a": (5,), "table": (9_000, 7), "tail": (11, 2)},
    "large": {"a": (3,), "table": (300_000, 7), "z": (16_384,)},
}
ELEMENTWISE = [
    "sgd(0.1)",
    "momentum(0.1, 0.9)",
    "adagrad(0.1)",
    "rmsprop(0.1)",
    "adam(0.1)",
    "nesterov(0.1, 0.9)",
    "rmsprop_momentum(0.1)",
    "adamax(0.1)",
    "adamw(0.1, weight_decay=0.1)",
    "lion(0.1)",
    "chain(clip_by_global_norm(0.5), adam(0.1))",
]


def tree_of(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}


def compiled(text: str, tree: trees.TreeSpec) -> program.Program:
    spec = checks.check(spec_text.parse(text, build.CATALOGUE), known=build.CATALOGUE)
    return program.Program(spec, tree, jax.devices()[0])


def memory_of(made: program.Program, arrays: list[Any]) -> np.ndarray:
    whole = np.zeros(made.layout.nbytes + 64, np.uint8)
    start = -whole.ctypes.data % 64
    memory = whole[start : start + made.layout.nbytes]
    for there, array in zip(landing.Landing.filled(memory, made.tree, made.layout).arrays(), arrays, strict=True):
        there[...] = array
    return memory


def holding(made: program.Program, params: list[Any]) -> held.Held:
    found = held.Held(made)
    found.fill(memory_of(made, params), rates_of(made), 0)
    return found


def rates_of(made: program.Program) -> tuple[float, ...]:
    return tuple(0.1 for _ in made.rate_paths)


def done(work: device.Work[Any]) -> Any:
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


def arrays_of(found: held.Held) -> dict[str, np.ndarray]:
    names = [leaf.name for leaf in found.program.arrays([leaf.name for leaf in found.program.tree.leaves])]
    return {name: found.array(at).reshape(found.program.array_shape(at)) for at, name in enumerate(names)}


def gradients(
    shapes: dict[str, tuple[int, ...]], chosen: np.ndarray, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Whole gradients of which only some rows of "table" are not zero, and the same by rows."""
    whole = tree_of(shapes, seed)
    table = np.zeros_like(whole["table"])
    table[chosen] = whole["table"][chosen]
    dense, by_rows = [], []
    for name in sorted(shapes):
        dense.append(table if name == "table" else whole[name])
        by_rows += [chosen.astype(np.int32), table[chosen]] if name == "table" else [whole[name]]
    return dense, by_rows


def sparse_of(tree: trees.TreeSpec, by_rows: list[np.ndarray], count: int) -> engine_rows.Sparse:
    table = [leaf.name for leaf in tree.leaves].index("table")
    return engine_rows.Sparse(tree, ((table, count),), by_rows)


def choices(shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Few rows, neighbours, the first and the last, none, all."""
    rng = np.random.default_rng(7)
    rows_ = shape[0]
    yield np.sort(rng.choice(rows_, min(rows_, 17), replace=False))
    yield np.arange(rows_ // 3, rows_ // 2)
    yield np.array([0, rows_ - 1])
    yield np.array([], np.int64)
    yield np.arange(rows_)


CASES = [(text, size) for text in ELEMENTWISE for size in ("small", "across")] + [("adam(0.1)", "large")]


@pytest.mark.parametrize(("text", "size"), CASES)
def test_exact_is_the_dense_update_and_lazy_is_it_on_touched_rows(text: str, size: str) -> None:
    shapes = SHAPES[size]
    params = trees.flatten(tree_of(shapes))
    made = compiled(text, params.spec)
    assert not lazy.problem(made, Variant())
    dense, exact = holding(made, params.arrays), holding(made, params.arrays)
    for step, chosen in enumerate(choices(shapes["table"])):
        whole, by_rows = gradients(shapes, chosen, step)
        sparse = sparse_of(params.spec, by_rows, chosen.size)
        operands = Operands(rates_of(made), step)
        before = arrays_of(dense)
        # A lazy update of what the dense one starts from.
        alone = holding(made, params.arrays)
        done(alone.replace(dict(enumerate(before.values())), lambda _: None))
        done(dense.update(Variant(), operands, memory_of(made, whole), None))
        done(exact.update(Variant(), operands, sparse, None))
        done(alone.update_lazily(Variant(), operands, sparse))
        after, lazily = arrays_of(dense), arrays_of(alone)
        for name, array in arrays_of(exact).items():
            np.testing.assert_array_equal(array, after[name], err_msg=name)
        for name, array in lazily.items():
            expected = after[name].copy()
            if name.endswith("/table"):
                untouched = np.ones(len(array), bool)
                untouched[chosen] = False
                expected[untouched] = before[name][untouched]
            np.testing.assert_array_equal(array, expected, err_msg=name)


@pytest.mark.parametrize("is_host", [True, False])
@pytest.mark.parametrize("count", [1, 512, 513, 16_384, 40_000])
def test_movers_gather_and_scatter_as_numpy_does(count: int, is_host: bool) -> None:
    made = compiled("adam(0.1)", trees.flatten({"table": np.zeros(300_000, np.float32)}).spec)
    each = made.kernel_of(0)
    mover = movers.Movers(made._recipe, is_host=is_host)
    rng = np.random.default_rng(count)
    positions = np.sort(rng.choice(cut.BLOCK, count, replace=False))
    arrays = [rng.standard_normal(cut.BLOCK, np.float32) for _ in each.own]
    values = [rng.standard_normal(count, np.float32) for _ in each.own]
    own = [jax.numpy.array(array) for array in arrays]
    for got, array in zip(mover.gather(each, own, positions), arrays, strict=True):
        np.testing.assert_array_equal(got, array[positions])
    for got, array, value in zip(mover.scatter(each, own, positions, values), arrays, values, strict=True):
        array[positions] = value
        np.testing.assert_array_equal(got, array)
    assert all(array.is_deleted() for array in own)


def test_what_is_read_by_rows_is_what_all_parameters_have_there() -> None:
    shapes = SHAPES["large"]
    params = trees.flatten(tree_of(shapes))
    for text in ("adam(0.1)", "adafactor(0.1)", "noisy_sgd(0.1)"):  # blocks of elements, tensors, a tree
        found = holding(compiled(text, params.spec), params.arrays)
        for chosen in choices(shapes["table"]):
            wanted = [None, engine_rows.selected(params.spec.leaves[1], chosen), None]
            (got,) = done(found.read("", wanted))
            np.testing.assert_array_equal(got.reshape(-1, 7), params.arrays[1][chosen])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("adafactor(0.1)", "granularity is tensor"),
        ("noisy_sgd(0.1)", "granularity is tree"),
        ("accumulate(adam(0.1), 2)", "several pushes"),
        ("chain(trace(0.9), clip_by_global_norm(1.0), scale(-0.1))", "sums over elements that have no gradients"),
    ],
)
def test_what_cannot_be_lazy_says_why(text: str, why: str) -> None:
    assert why in lazy.problem(compiled(text, trees.flatten(tree_of(SHAPES["small"])).spec), Variant())


@pytest.mark.parametrize("text", ["adafactor(0.1)", "sm3(0.1)", "accumulate(adam(0.1), 2)", "lamb(0.1)"])
def test_exact_is_the_dense_update_for_any_rule(text: str) -> None:
    shapes = {"a": (3,), "table": (40, 3)}
    params = trees.flatten(tree_of(shapes))
    made = compiled(text, params.spec)
    dense, exact = holding(made, params.arrays), holding(made, params.arrays)
    for step, chosen in enumerate(choices(shapes["table"])):
        whole, by_rows = gradients(shapes, chosen, step)
        variant = Variant(closing=made.every == 1 or step % 2 == 1)
        made.prepare(variant)
        operands = Operands(rates_of(made), step)
        done(dense.update(variant, operands, memory_of(made, whole), None))
        done(exact.update(variant, operands, sparse_of(params.spec, by_rows, chosen.size), None))
        expected = arrays_of(dense)
        for name, array in arrays_of(exact).items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), count=st.integers(1, 60), width=st.integers(1, 9))
def test_rows_within_a_range_are_those_of_a_mask(data: st.DataObject, count: int, width: int) -> None:
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, count - 1)))), np.int64)
    leaf = trees.LeafSpec("table", (count, width), "f32")
    low = data.draw(st.integers(0, count * width - 1))
    high = data.draw(st.integers(low + 1, count * width))
    positions, which = engine_rows.selected(leaf, chosen).within(low, high)
    mask = np.zeros((count, width), bool)
    mask[chosen] = True
    np.testing.assert_array_equal(positions, np.flatnonzero(mask.reshape(-1)[low:high]))
    numbers = np.arange(count * width).reshape(count, width)[chosen].reshape(-1)
    np.testing.assert_array_equal(numbers[which], positions + low)


def test_only_blocks_that_are_touched_are_written() -> None:
    shapes = {"table": (400_000, 16)}  # six blocks of 1 Mi elements and some small ones
    params = trees.flatten(tree_of(shapes))
    made = compiled("adam(0.1)", params.spec)
    found = holding(made, params.arrays)
    assert found.state is not None
    before = [block[0].unsafe_buffer_pointer() for block in found.state[0].blocks]
    arrays = [block[0] for block in found.state[0].blocks]
    chosen = np.array([0, 1, 200_000])  # in the first and the fourth block
    sparse = engine_rows.Sparse(params.spec, ((0, 3),), [chosen.astype(np.int32), np.ones((3, 16), np.float32)])
    done(found.update_lazily(Variant(), Operands(rates_of(made), 0), sparse))
    written = [at for at, array in enumerate(arrays) if array.is_deleted()]
    assert written == [0, 3]
    # In place: what was written over is where it was.
    assert [block[0].unsafe_buffer_pointer() for block in found.state[0].blocks] == before


def test_an_update_that_fails_before_anything_is_written_leaves_the_state() -> None:
    params = trees.flatten(tree_of(SHAPES["small"]))
    made = compiled("adam(0.1)", params.spec)
    found = holding(made, params.arrays)
    before = arrays_of(found)
    chosen = np.array([1, 2])
    _, by_rows = gradients(SHAPES["small"], chosen, 0)
    sparse = sparse_of(params.spec, by_rows, 2)
    with pytest.raises(held.UpdateError) as failure:  # an operand that is none
        done(found.update_lazily(Variant(), Operands(("no number",), 0), sparse))  # type: ignore[arg-type]
    assert not failure.value.state_lost
    for name, array in arrays_of(found).items():
        np.testing.assert_array_equal(array, before[name])


def test_the_second_lazy_update_of_any_size_compiles_nothing() -> None:
    params = trees.flatten(tree_of(SHAPES["across"]))
    made = compiled("adam(0.1)", params.spec)
    found = holding(made, params.arrays)
    lazy.prepare(made, 9_000 * 7 + 27)
    there = dict(made.movers._made)
    for step, chosen in enumerate(choices((9_000, 7))):
        _, by_rows = gradients(SHAPES["across"], chosen, step)
        done(
            found.update_lazily(Variant(), Operands(rates_of(made), step), sparse_of(params.spec, by_rows, chosen.size))
        )
    assert made.movers._made == there


def test_pushes_of_several_workers_are_joined_on_the_union_of_their_rows() -> None:
    tree = trees.flatten(tree_of(SHAPES["small"])).spec
    pushes, whole = [], []
    for seed, chosen in enumerate((np.array([1, 5]), np.array([5, 7, 39]), np.array([], np.int64))):
        dense, by_rows = gradients(SHAPES["small"], chosen, seed)
        whole.append([array.copy() for array in dense])
        pushes.append(sparse_of(tree, by_rows, chosen.size))
    factors = (1.0, 2.0, 0.5)
    got = done(engine_rows.joined(tree, pushes, factors, 3.5))
    np.testing.assert_array_equal(got.indices[1], [1, 5, 7, 39])
    for position, leaf in enumerate(tree.leaves):
        out = np.zeros(leaf.elements, np.float32)
        got.fill(position, out)
        total = sum(np.float32(f) * push[position] for f, push in zip(factors, whole, strict=True))
        np.testing.assert_array_equal(out.reshape(leaf.shape), np.asarray(total / np.float32(3.5)))


@pytest.mark.parametrize(
    ("indices", "problem"),
    [([3, 2], "3 before 2"), ([2, 2], "2 before 2"), ([-1], "-1, expected numbers from 0 to 3"), ([4], "4, expected")],
)
def test_indices_are_in_range_and_ascend(indices: list[int], problem: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=problem):
        rows.check_indices(trees.LeafSpec("table", (4, 2), "f32"), np.array(indices))


def test_groups_hold_no_more_than_fits_a_kernel() -> None:
    params = trees.flatten(tree_of({"table": (300_000, 7)}))
    made = compiled("sgd(0.1)", params.spec)
    found = holding(made, params.arrays)
    chosen = np.sort(np.random.default_rng(0).choice(300_000, 30_000, replace=False))
    sparse = engine_rows.Sparse(params.spec, ((0, chosen.size),), [chosen.astype(np.int32), params.arrays[0][chosen]])
    (span,) = made.cut.spans
    groups = list(sparse.groups(span, found._divided.members[0]))
    assert sum(group.size for group in groups) == chosen.size * 7
    assert all(group.size <= cut.SMALL or len(group.members) == 1 for group in groups)
