"""Aggregations as text and as messages: what is one, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from optwire_proto import aggregations, convert, errors, limits, sessions
from optwire_proto.v1 import optimizer_pb2 as pb

SYNC = aggregations.Mode.SYNC


@pytest.mark.parametrize("text", ["single", "sync(1)", "sync(4)", f"sync({limits.WORKERS_MAX})"])
def test_text_and_message_say_the_same(text: str):
    aggregation = aggregations.parse(text)
    assert str(aggregation) == text
    sent = pb.Aggregation.FromString(convert.aggregation_to_proto(aggregation).SerializeToString())
    assert convert.aggregation_from_proto(sent) == aggregation


def test_a_message_that_says_nothing_is_single():
    assert convert.aggregation_from_proto(pb.Aggregation()) == aggregations.SINGLE == aggregations.Aggregation()


@pytest.mark.parametrize(
    "text",
    [
        "sync(0)",
        "sync(1025)",
        "sync(-1)",
        "sync(4",
        "sync4)",
        "sync(04)",
        "sync(+4)",
        "sync(1e9)",
        "sync(4)\n",
        "",
        None,
        4,
    ],
    ids=repr,
)
def test_other_texts_are_refused(text: Any):
    with pytest.raises(errors.InvalidArgumentError) as caught:
        aggregations.parse(text)
    assert caught.value.subject == "aggregation"
    assert caught.value.expected == "'single', or 'sync(N)' with N from 1 to 1024 workers"


@pytest.mark.parametrize(("mode", "workers"), [(SYNC, 0), (SYNC, 1025), (aggregations.Mode.SINGLE, 1)], ids=str)
def test_a_number_of_workers_that_a_mode_cannot_have_dies_at_birth(mode: aggregations.Mode, workers: int):
    with pytest.raises(errors.InvalidArgumentError, match=f"aggregation.workers: {workers}, expected"):
        aggregations.Aggregation(mode, workers)


@pytest.mark.parametrize("mode", [*range(3, 9), 99])
def test_other_modes_are_not_served(mode: Any):
    with pytest.raises(errors.UnsupportedError, match=rf"aggregation\.mode: {mode} is not served"):
        convert.aggregation_from_proto(pb.Aggregation(mode=mode, workers=2))


@pytest.mark.parametrize("field", ["k", "staleness_steps_max", "deadline_s"])
def test_what_a_mode_does_not_use_is_refused_by_name(field: str):
    for mode in (pb.Aggregation.MODE_SINGLE, pb.Aggregation.MODE_SYNC):
        message = pb.Aggregation(mode=mode, workers=2 * (mode == pb.Aggregation.MODE_SYNC), **{field: 1})
        with pytest.raises(errors.UnsupportedError, match=rf"aggregation\.{field}: 1"):
            convert.aggregation_from_proto(message)


def test_workers_are_known_by_their_rank():
    assert sessions.worker_id(11) == "0" * 31 + "b"
    four = aggregations.Aggregation(SYNC, 4)
    assert [four.includes(sessions.worker_id(rank)) for rank in (0, 3, 4, 2**127)] == [True, True, False, False]
    assert aggregations.SINGLE.includes("f" * 32)
