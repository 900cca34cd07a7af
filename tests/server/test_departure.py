"""Departures: what leaves of an update that is not over, in which order, and that of one that is none nothing does."""

from __future__ import annotations

import queue
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from optwire import optimizers as opt
from optwire_proto import checks, specs, trees
from optwire_server.engine import build, cut, departure, device, held, landing, program, rates

# Whole blocks, small ones, and a leaf of one element, which has a block of its own.
SIZES = (cut.BLOCK + 5, 1, 3 * cut.SMALL)


class Run:
    """A session's arrays, without a server."""

    def __init__(self, spec: specs.Spec, sizes: Sequence[int] = SIZES) -> None:
        checked = checks.check(spec, known=build.CATALOGUE)
        self.tree = trees.TreeSpec(tuple(trees.LeafSpec(f"l{k}", (size,), "f32") for k, size in enumerate(sizes)))
        self.program = program.Program(checked, self.tree, jax.devices()[0])
        self.rates = tuple(rates.rates(checked).values())
        self.held = held.Held(self.program)
        self.held.fill(self.landed().memory, self.rates, 0)

    def landed(self, value: float = 1.0) -> landing.Landing:
        lent = landing.Landings(bytes_max=1 << 30, keep_bytes=0).land(self.tree, self.program.layout)
        for leaf in lent.arrays():
            leaf[...] = value
        return lent

    def params(self) -> bytes:
        return b"".join(segment.tobytes() for segment in device.Device().run(device.Lane(), self.held.params()))


def left(out: departure.Departure) -> bytes:
    """What has left since the last look."""
    data = b""
    while True:
        try:
            segment = out._segments.get_nowait()
        except queue.Empty:
            return data
        data += b"" if segment is None else segment.tobytes()


def test_each_block_leaves_before_the_next_is_updated() -> None:
    run = Run(opt.adam(0.1), (3 * cut.BLOCK,))
    before, out = run.params(), departure.Departure()
    update = run.held.update(program.Variant(), program.Operands(run.rates, 0), run.landed().memory, out)
    gone = b""
    for number in range(1, 4):
        next(update)
        gone += left(out)
        assert len(gone) == 4 * number * cut.BLOCK
        assert run.params() == gone + before[len(gone) :], "later blocks are as they were"
    with pytest.raises(StopIteration):
        next(update)
    assert gone != before


@pytest.mark.parametrize(
    "spec",
    [
        opt.adam(0.1),
        opt.sm3(0.1),
        opt.master_weights(opt.adam(0.1)),
        opt.partition({"l1": opt.sgd(0.1), "**": opt.adam(0.1)}),
    ],
    ids=str,
)
def test_what_leaves_is_the_parameters_in_payload_order(spec: specs.Spec) -> None:
    run, out = Run(spec), departure.Departure()
    assert run.held.is_in_blocks
    for _ in run.held.update(program.Variant(), program.Operands(run.rates, 0), run.landed(0.5).memory, out):
        pass
    out.end()
    assert b"".join(segment.tobytes() for segment in out.segments()) == run.params()


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_nothing_leaves_of_an_update_that_is_refused(value: float) -> None:
    run = Run(opt.on_nonfinite(opt.adam(0.1), "reject"))
    before, out = run.params(), departure.Departure()
    for _ in run.held.update(program.Variant(), program.Operands(run.rates, 0), run.landed(value).memory, out):
        pass
    assert left(out) == (run.params() if value == 1.0 else b"")
    assert (run.params() == before) == (value != 1.0)


def test_what_has_left_stays_as_it_was_while_the_next_update_is_made() -> None:
    run, out = Run(opt.sgd(0.1)), departure.Departure()
    for _ in run.held.update(program.Variant(), program.Operands(run.rates, 0), run.landed().memory, out):
        pass
    out.end()
    expected, segments = run.params(), list(out.segments())
    for _ in run.held.update(program.Variant(), program.Operands(run.rates, 1), run.landed().memory, None):
        pass
    assert b"".join(segment.tobytes() for segment in segments) == expected != run.params()
