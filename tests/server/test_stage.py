"""Which bytes have come, against a set of all of them."""

from __future__ import annotations

import random

from optwire_server.engine import stage


def test_ranges_know_what_a_set_of_their_offsets_knows() -> None:
    for seed in range(60):
        choose = random.Random(seed)
        ranges, offsets = stage.Ranges(), set()
        for _ in range(40):
            start = choose.randrange(60)
            stop = start + choose.randrange(1, 8)
            ranges.add(start, stop)
            offsets.update(range(start, stop))
            assert len(ranges) == sum(at - 1 not in offsets for at in offsets), "those that touch are one"
            low, high = sorted((choose.randrange(70), choose.randrange(70)))
            assert ranges.count(low, high) == len(offsets & set(range(low, high)))
