"""Blocks: what they cover, that they compute what the whole tree does, and what becomes of leaves that part ways."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from jax import lax

from optwire import optax
from optwire import optimizers as opt
from optwire_proto import checks, errors, limits, specs, tensors, trees
from optwire_server.engine import build, cut, executables, held, landing, program, rates
from optwire_server.engine.granularity import Granularity

# Around the edges of blocks.
SIZES = (0, 1, 2, cut.SMALL - 1, cut.SMALL, cut.SMALL + 1, cut.SMALL * cut.SMALL_MAX, cut.BLOCK + 3)
SEEDS = {
    "sgd": opt.sgd(0.1),
    "momentum": opt.momentum(0.1, 0.9),
    "nesterov": opt.nesterov(0.1, 0.9),
    "adagrad": opt.adagrad(0.1),
    "rmsprop": opt.rmsprop(0.1),
    "rmsprop_momentum": opt.rmsprop_momentum(0.1),
    "adam": opt.adam(0.1, b2=0.99),
    "adamax": opt.adamax(0.1, b2=0.99),
    "sm3": opt.sm3(0.1),
}


def tree_of(sizes: Sequence[int], dtypes: Sequence[str] = ("f32",)) -> trees.TreeSpec:
    leaves = [trees.LeafSpec(f"l{k}", (size,), dtypes[k % len(dtypes)]) for k, size in enumerate(sizes)]
    return trees.TreeSpec(tuple(leaves))


class Run:
    """A program on the server's engine, without a server."""

    compiled = executables.Executables()

    def __init__(self, spec: specs.Spec, tree: trees.TreeSpec, finest: Granularity = Granularity.ELEMENT) -> None:
        self.tree = tree
        self.spec = checks.check(spec, known=build.CATALOGUE)
        self.program = program.Program(self.spec, tree, jax.devices()[0], compiled=self.compiled, finest=finest)
        self.rates = tuple(rates.rates(self.spec).values())
        self.held = held.Held(self.program)
        self.held.fill(self.landed(0), self.rates, 0)
        self.pushes = 0

    def landed(self, seed: int, absent: Sequence[int] = ()) -> np.ndarray:
        """Numbers in the session's layout, not finite where leaves are absent."""
        rng = np.random.default_rng(seed)
        lent = landing.Landings(bytes_max=1 << 30, keep_bytes=0).land(self.tree, self.program.layout)
        for index, leaf in enumerate(lent.arrays()):
            leaf[...] = rng.standard_normal(leaf.shape)
            if index in absent:
                leaf[...] = np.nan
        return lent.memory

    def push(self, absent: Sequence[int] = (), out: np.ndarray | None = None) -> int:
        """One update; how many turns it took."""
        variant = program.Variant(absent=bool(absent))
        self.program.prepare(variant)
        present = tuple(k not in absent for k in range(len(self.tree.leaves))) if absent else None
        operands = program.Operands(self.rates, self.pushes, present=present)
        self.pushes += 1
        return sum(1 for _ in self.held.update(variant, operands, self.landed(self.pushes, absent), out))

    def params(self) -> list[bytes]:
        out = np.zeros(self.program.layout.nbytes, np.uint8)
        list(self.held.write_params(out))
        return [leaf.tobytes() for leaf in landing.Landing.filled(out, self.tree, self.program.layout).arrays()]

    def read(self, which: str) -> tuple[list[np.ndarray], int]:
        """The parameters, or a view of them, and how many turns it took to read them."""
        self.program.prepare_view(which)
        reading, turns = self.held.params(which), 0
        while True:
            try:
                next(reading)
            except StopIteration as stop:
                return stop.value, turns
            turns += 1

    def replace(self, arrays: dict[int, tensors.Array], room: held.Room = lambda _: None) -> int:
        """How many turns it took to put arrays in the place of others."""
        return sum(1 for _ in self.held.replace(arrays, room))

    def real_bytes(self) -> int:
        """Bytes of all arrays that are held."""
        return sum(array.nbytes for array in jax.tree.leaves(self.held.state))

    def state(self) -> dict[str, bytes]:
        named = self.program.arrays([leaf.name for leaf in self.tree.leaves])
        return {leaf.name: self.held.array(position).tobytes() for position, leaf in enumerate(named)}


# ---------------------------------------------------------------------------------------------------------------------
# What they cover.


def cuts(count: int) -> Iterator[tuple[trees.TreeSpec, cut.Cut]]:
    for seed in range(count):
        rng = np.random.default_rng(seed)
        sizes = [int(size) for size in rng.choice(SIZES, rng.integers(1, 9))]
        tree = tree_of(sizes, ("f32", "bf16", "f64")[: rng.integers(1, 4)])
        verdicts = [int(verdict) for verdict in rng.integers(0, 2, len(sizes))]
        for granularity in Granularity:
            yield tree, cut.make(tree, granularity, verdicts)


def test_every_element_is_in_one_block_and_where_the_layout_says() -> None:
    for tree, made in cuts(30):
        covered = np.zeros(made.layout.nbytes, np.int8)
        for span in made.spans:
            for block in span.blocks:
                assert block.valid <= sum(part.size for part in block.parts)
                for run in block.runs:
                    part = block.parts[run.part]
                    assert part.offset is not None
                    assert run.offset == part.offset + run.start * part.dtype.itemsize, "no copy is needed"
                    covered[run.offset : run.offset + (run.stop - run.start) * part.dtype.itemsize] += 1
                for part in block.parts:
                    assert part.offset is not None
                    assert part.offset + part.size * part.dtype.itemsize <= made.layout.nbytes
                    assert part.size <= 1 or part.offset % limits.ALIGNMENT_BYTES == 0
        for leaf, offset in zip(tree.leaves, made.layout.offsets, strict=True):
            assert (covered[offset : offset + leaf.nbytes] == 1).all()
        assert covered.sum() == tree.payload_bytes
        for start, stop in made.layout.gaps:
            assert not covered[start:stop].any()


def test_a_split_span_has_the_same_leaves_in_other_blocks() -> None:
    for tree, made in cuts(30):
        if made.granularity is not Granularity.ELEMENT:
            continue
        spans: list[cut.Span] = []
        for span in made.spans:
            groups = [span.leaves[start::3] for start in range(min(3, len(span.leaves)))]
            spans += cut.split(made, span, tree, groups)
        for leaf, pieces in zip(tree.leaves, cut.pieces(spans, len(tree.leaves)), strict=True):
            assert sum(piece.stop - piece.start for piece in pieces) * tensors.itemsize(leaf.dtype) == leaf.nbytes
        assert sorted(leaf for span in spans for leaf in span.leaves) == list(range(len(tree.leaves)))


# ---------------------------------------------------------------------------------------------------------------------
# What they compute.


@pytest.mark.parametrize("spec", SEEDS.values(), ids=SEEDS)
def test_blocks_have_the_bits_of_the_whole_tree(spec: specs.Spec) -> None:
    tree = tree_of((*SIZES, 7, 300), ("f32", "bf16", "f32"))
    blocks, whole = Run(spec, tree), Run(spec, tree, Granularity.TREE)
    assert whole.program.granularity is Granularity.TREE
    assert blocks.program.granularity is (Granularity.TENSOR if spec.name == "sm3" else Granularity.ELEMENT)
    for _ in range(3):
        assert blocks.push() > 3
        assert whole.push() == 1
    assert blocks.params() == whole.params()
    assert blocks.state() == whole.state()


def test_groups_and_element_types_have_blocks_of_their_own_and_the_bits_of_the_whole_tree() -> None:
    spec = opt.grouped([0, 1, 0, 1, 0], opt.adam(0.1, b2=0.99), opt.chain(optax.clip(0.5), opt.momentum(0.5, 0.9)))
    tree = tree_of((5, 300, cut.SMALL + 1, 1, cut.SMALL), ("f32", "f16"))
    blocks, whole = Run(spec, tree), Run(spec, tree, Granularity.TREE)
    assert len(blocks.program.cut.spans) == 3
    for _ in range(3):
        blocks.push()
        whole.push()
    assert blocks.state() == whole.state()


def test_parameters_are_written_as_they_come_and_anew() -> None:
    run = Run(opt.master_weights(opt.adam(0.1)), tree_of((5, cut.SMALL * 17, 0, 1, 300), ("bf16", "f32")))
    out = np.zeros(run.program.layout.nbytes, np.uint8)
    run.push(out=out)
    written = landing.Landing.filled(out, run.tree, run.program.layout).arrays()
    assert [leaf.tobytes() for leaf in written] == run.params()
    segments, turns = run.read("")
    assert all(segment.ndim == 1 for segment in segments)
    assert b"".join(segment.tobytes() for segment in segments) == b"".join(run.params())
    assert turns == 1, "those in 16 bits are computed of their masters, in a block"


def test_a_view_that_is_computed_gives_others_their_turns_and_one_that_is_there_takes_none() -> None:
    run = Run(optax.schedule_free_sgd(0.1), tree_of((5, cut.SMALL * 3, 300)))
    run.push()
    blocks = sum(len(span.blocks) for span in run.held.spans)
    assert blocks > 1
    (params, none), (view, turns) = run.read(""), run.read("eval")
    assert (none, turns) == (0, blocks)
    assert len(b"".join(segment.tobytes() for segment in view)) == run.tree.payload_bytes
    assert all(segment.base is not None or not segment.flags.owndata for segment in params), "views of the state"


def test_a_sum_over_all_leaves_leaves_blocks_alone() -> None:
    """What a clip needs of other blocks are sums: the whole tree computes the same, to what a norm rounds."""
    spec = opt.chain(optax.clip_by_global_norm(1.0), opt.adam(0.1))
    tree = tree_of((5, cut.SMALL * 17, 1, 300))
    blocks, whole = Run(spec, tree), Run(spec, tree, Granularity.TREE)
    assert blocks.program.granularity is Granularity.ELEMENT
    for _ in range(2):
        blocks.push()
        whole.push()
    for ours, theirs in zip(blocks.params(), whole.params(), strict=True):
        np.testing.assert_allclose(np.frombuffer(ours, "f4"), np.frombuffer(theirs, "f4"), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Leaves that part ways.


@pytest.mark.parametrize(
    "spec",
    [
        opt.per_leaf(opt.torch_adamw(0.1)),
        opt.per_leaf(opt.adam(0.1)),
        opt.ema_params(opt.per_leaf(opt.adam(0.1)), 0.9),
        opt.on_nonfinite(opt.per_leaf(opt.adam(0.1)), "skip"),
    ],
    ids=["torch_adamw", "adam", "average", "nonfinite"],
)
def test_what_is_absent_stays_and_the_rest_goes_on_as_in_the_whole_tree(spec: specs.Spec) -> None:
    """The promise: "A leaf whose gradient is absent keeps its bits, its slots and its count"."""
    tree = tree_of((5, cut.SMALL + 1, 1, cut.SMALL * 17, 300, 0))
    blocks, whole = Run(spec, tree), Run(spec, tree, Granularity.TREE)
    assert blocks.program.granularity is Granularity.ELEMENT
    for absent in ((), (1, 4), (0, 2, 3, 5), (), (1,)):
        before = blocks.params()
        blocks.push(absent)
        whole.push(absent)
        after = blocks.params()
        for leaf in tree.leaves:
            at = int(leaf.name[1:])
            assert (before[at] == after[at]) == (at in absent or not leaf.nbytes)
    ours, theirs = blocks.state(), whole.state()
    assert ours.keys() == theirs.keys()
    for name in ours:
        kind = "i4" if name.startswith(("step/", "counts/", "state/taken")) else "f4"
        close = {"rtol": 1e-5, "atol": 1e-6} if kind == "f4" else {"rtol": 0}
        np.testing.assert_allclose(np.frombuffer(ours[name], kind), np.frombuffer(theirs[name], kind), **close)


def test_leaves_of_one_span_may_be_given_counts_of_their_own() -> None:
    run = Run(opt.per_leaf(opt.torch_adamw(0.1)), tree_of((5, 300, cut.SMALL, 7)))
    named = {leaf.name: at for at, leaf in enumerate(run.program.arrays([leaf.name for leaf in run.tree.leaves]))}
    run.push()
    before = run.state()
    run.replace({named["step/l1"]: np.int32(41), named["exp_avg/l3"]: np.full(7, 3, np.float32)})
    after = run.state()
    assert {name for name in before if before[name] != after[name]} == {"step/l1", "exp_avg/l3"}
    run.push()
    counts = [int(np.frombuffer(run.state()[f"step/l{k}"], np.int32)[0]) for k in range(4)]
    assert counts == [2, 42, 2, 2]


def test_many_counts_of_their_own_part_all_leaves_at_once() -> None:
    count = 320
    run = Run(opt.per_leaf(opt.adam(0.1)), tree_of([2] * count))
    named = run.program.arrays([leaf.name for leaf in run.tree.leaves])
    counts = {at: np.int32(at) for at, leaf in enumerate(named) if leaf.shape == () and leaf.dtype == "i32"}
    assert len(counts) == count
    began = time.perf_counter()
    turns = run.replace(counts)
    assert time.perf_counter() - began < 5, "all at once"
    assert turns > count, "others have their turns meanwhile"
    assert len(run.held.spans) == count
    assert run.held.held_bytes == run.real_bytes()
    assert [int(np.frombuffer(run.state()[named[at].name], np.int32)[0]) for at in counts] == list(counts)
    run.push()
    assert run.held.held_bytes == run.real_bytes()


def test_what_parts_ways_is_counted_and_has_a_limit() -> None:
    """A span that is split takes more memory than its leaves have: never without end, and never uncounted."""
    run = Run(opt.per_leaf(opt.adam(0.1)), tree_of([2] * 512))
    assert run.held.held_bytes == run.real_bytes() == run.program.held_bytes
    most = run.program.held_bytes + 64 * limits.MIB
    for bit in range(8):
        absent = [leaf for leaf in range(512) if leaf >> bit & 1]
        grown, before = run.held.growth(frozenset(absent)), run.real_bytes()
        run.push(absent)
        assert run.real_bytes() == run.held.held_bytes == before + grown
        assert run.held.growth(frozenset(absent)) == 0, "they are apart already"
    with pytest.raises(errors.LimitError, match=f"expected at most {most}: leaves that have no gradients while") as no:
        run.held.growth(frozenset(range(256, 512)))
    assert no.value.subject == "state"
    assert 32 * limits.MIB < run.real_bytes() <= most
    before_state, before_spans = run.state(), run.held.spans
    named = run.program.arrays([leaf.name for leaf in run.tree.leaves])
    counts = {at: np.int32(at) for at, leaf in enumerate(named) if leaf.shape == () and leaf.dtype == "i32"}
    with pytest.raises(errors.LimitError, match="load equal counts"):
        run.replace(counts)
    assert run.held.spans == before_spans
    assert run.state() == before_state


def test_a_load_that_there_is_no_room_for_changes_nothing() -> None:
    run = Run(opt.per_leaf(opt.torch_adamw(0.1)), tree_of((5, 300, cut.SMALL, 7)))
    named = {leaf.name: at for at, leaf in enumerate(run.program.arrays([leaf.name for leaf in run.tree.leaves]))}
    before, spans, asked = run.state(), run.held.spans, list[int]()

    def room(size: int) -> None:
        asked.append(size)
        raise MemoryError

    with pytest.raises(MemoryError):
        run.replace({named["step/l1"]: np.int32(41)}, room)
    assert run.state() == before
    assert run.held.spans == spans
    held_before = run.real_bytes()
    run.replace({named["step/l1"]: np.int32(41)})
    assert asked == [run.real_bytes() - held_before]
    run.replace({named["step/l0"]: np.int32(0)}, room)  # nothing grows


# ---------------------------------------------------------------------------------------------------------------------
# Failures.


def test_a_failure_before_the_first_block_leaves_the_state() -> None:
    run = Run(opt.adam(0.1), tree_of((cut.SMALL * 3,)))
    before = run.state()
    with pytest.raises(held.UpdateError) as failed:
        for _ in run.held.update(program.Variant(), program.Operands(run.rates, 0), np.zeros(64, np.uint8), None):
            pass
    assert not failed.value.state_lost
    assert run.state() == before


def test_a_failure_in_a_middle_block_loses_the_state() -> None:
    """As the blocks before it are of the next step already, and nobody may see half of one."""
    run = Run(opt.adam(0.1), tree_of((cut.SMALL * 3,)))
    assert run.held.state is not None
    run.held.state[0].blocks[1][0].delete()  # what a device does that goes away in the middle of an update
    with pytest.raises(held.UpdateError) as failed:
        run.push()
    assert failed.value.state_lost
    assert run.held.state is None


# ---------------------------------------------------------------------------------------------------------------------
# What is compiled.


def test_programs_of_other_trees_and_names_share_what_they_compute() -> None:
    first = Run(opt.adam(0.1), tree_of((5, 300)))
    other = Run(opt.adam(0.1), tree_of((7, cut.SMALL + 2, 9)))
    step, same = (next(iter(run.program._kernels.values())).step(program.Variant()).apply.run for run in (first, other))
    assert step is same


def test_functions_that_differ_in_what_they_are_closed_over_are_told_apart() -> None:
    """However deep: the text of a jaxpr has no numbers of an array."""

    argument = jax.ShapeDtypeStruct((3,), np.float32)

    def inside(array: Any) -> Any:
        return jax.make_jaxpr(jax.jit(lambda x: x * array))(argument)

    def deeper(array: Any) -> Any:
        inner = jax.jit(lambda x: x * array)
        return jax.make_jaxpr(jax.jit(lambda x: lax.cond(x[0] > 0, inner, lambda y: y, x)))(argument)

    one, other = (np.array(numbers, np.float32) for numbers in ((1, 2, 3), (1, 2, 4)))
    for made in (inside, deeper):
        assert executables.digest(made(one)) == executables.digest(made(one.copy()))
        assert executables.digest(made(one)) != executables.digest(made(other))
        kept = executables.Executables()
        results = [kept.get(made(array), (0,)).run(np.ones(3, np.float32))[0] for array in (one, other)]
        np.testing.assert_array_equal(results, [one, other])


@pytest.mark.parametrize("spec", [opt.sm3(0.1), optax.muon(0.1)], ids=["sm3", "muon"])
def test_a_first_state_of_tensors_compiles_nothing_once_the_program_is_there(spec: specs.Spec) -> None:
    shapes = [(8 + size, 4) for size in range(6)]
    tree = trees.TreeSpec(tuple(trees.LeafSpec(f"l{k}", shape, "f32") for k, shape in enumerate(shapes)))
    run = Run(spec, tree)
    assert run.program.granularity is Granularity.TENSOR
    compiled = list[str]()

    def hear(event: str, _: float, **__: Any) -> None:
        compiled.extend([event] if event.endswith("backend_compile_duration") else [])

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        again = held.Held(run.program)
        again.fill(run.landed(0), run.rates, 0)
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
    assert compiled == []


def test_a_whole_tree_takes_fewer_leaves_than_blocks() -> None:
    many = tree_of([2] * (program.TREE_LEAVES_MAX + 1))
    assert Run(opt.adam(0.1), many).push() == 1
    with pytest.raises(Exception, match="leaves_max: 2049, expected at most 2048, as its leaves are updated together"):
        Run(optax.noisy_sgd(0.1, 0.5), many)
