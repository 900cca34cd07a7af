"""Blocks: what they cover, that they compute what the whole tree does, and what becomes of leaves that part ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np
import pytest

from optwire import optax
from optwire import optimizers as opt
from optwire_proto import checks, limits, specs, tensors, trees
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
        self.held.write_params(out)
        return [leaf.tobytes() for leaf in landing.Landing.filled(out, self.tree, self.program.layout).arrays()]

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
            apart = span.leaves[::2]
            spans += cut.split(made, span, tree, apart) if len(apart) < len(span.leaves) else (span,)
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
    segments = run.held.params()
    assert all(segment.ndim == 1 for segment in segments)
    assert b"".join(segment.tobytes() for segment in segments) == b"".join(run.params())


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
    run.held.replace({named["step/l1"]: np.int32(41), named["exp_avg/l3"]: np.full(7, 3, np.float32)})
    after = run.state()
    assert {name for name in before if before[name] != after[name]} == {"step/l1", "exp_avg/l3"}
    run.push()
    counts = [int(np.frombuffer(run.state()[f"step/l{k}"], np.int32)[0]) for k in range(4)]
    assert counts == [2, 42, 2, 2]


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


def test_a_whole_tree_takes_fewer_leaves_than_blocks() -> None:
    many = tree_of([2] * (program.TREE_LEAVES_MAX + 1))
    assert Run(opt.adam(0.1), many).push() == 1
    with pytest.raises(Exception, match="leaves_max: 2049, expected at most 2048, as its leaves are updated together"):
        Run(optax.noisy_sgd(0.1, 0.5), many)
