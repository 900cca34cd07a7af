"""Aggregations as text and as messages: what is one, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from optwire_proto import aggregations, convert, errors, limits, sessions
from optwire_proto.v1 import optimizer_pb2 as pb


@pytest.mark.parametrize(
    "text",
    [
        "single",
        "sync(1)",
        "sync(4)",
        f"sync({limits.WORKERS_MAX})",
        "sync(4, combine=sum, lease_s=0.3)",
        "sync(4, lease_s=inf)",
        "k_of_n(3, 4)",
        "quorum(2, 8)",
        "quorum(2, 8, deadline_s=5, lease_s=86401)",
        "async",
        "async(damping=sqrt, compensation=0.04)",
        "bounded_staleness(0)",
        f"bounded_staleness({limits.STEP_MAX}, damping=inverse)",
        "bounded_staleness(3, policy=wait)",
        "buffered(10)",
        "buffered(10, staleness_max=0, damping=sqrt, combine=sum)",
    ],
)
def test_text_and_message_say_the_same(text: str):
    aggregation = aggregations.parse(text)
    assert str(aggregation) == text
    sent = pb.Aggregation.FromString(convert.aggregation_to_proto(aggregation).SerializeToString())
    assert convert.aggregation_from_proto(sent) == aggregation


@pytest.mark.parametrize(
    ("text", "same"),
    [
        (" bounded_staleness( 3 ,policy = scale )".strip(), "bounded_staleness(3, damping=inverse)"),
        ("sync(workers=4)", "sync(4)"),
        ("sync(4, lease_s=30.0)", "sync(4)"),
        ("async()", "async"),
        ("quorum(2, 8, deadline_s=1e-1)", "quorum(2, 8, deadline_s=0.1)"),
    ],
)
def test_two_texts_that_mean_the_same(text: str, same: str):
    assert aggregations.parse(text) == aggregations.parse(same)
    assert str(aggregations.parse(text)) == same


def test_a_lease_is_30_seconds_unless_something_else_is_said():
    assert aggregations.parse("sync(4)").lease_s == 30.0
    assert convert.aggregation_from_proto(pb.Aggregation(mode=pb.Aggregation.MODE_ASYNC)).lease_s == 30.0
    assert aggregations.SINGLE.lease_s == 0.0


def test_a_message_that_says_nothing_is_single():
    assert convert.aggregation_from_proto(pb.Aggregation()) == aggregations.SINGLE == aggregations.Aggregation()


@pytest.mark.parametrize(
    "text",
    [
        "sync",
        "sync()",
        "sync(4, 5)",
        "sync(4, workers=4)",
        "sync(4,)",
        "sync(4, k)",
        "sync(4, mode=single)",
        "single(4",
        "k_of_n(3)",
        "quorum(2, 8, 5)",
        "async(damping=cubic)",
        "async(damping=sqrt, policy=scale)",
        "async(compensation=-1)",
        "async(compensation=nan)",
        "asynchronous",
        "sync(-1)",
        "sync(4",
        "sync4)",
        "sync(04)",
        "sync(+4)",
        "sync(1e9)",
        "sync(99999999999)",
        "sync(" + "1" * 500 + ")",
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
    assert caught.value.expected.startswith("'single', 'sync(N)', 'k_of_n(K, N)', ")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("sync(0)", "workers"),
        ("sync(1025)", "workers"),
        ("sync(4, k=2)", "k"),
        ("k_of_n(5, 4)", "k"),
        ("k_of_n(0, 4)", "k"),
        ("quorum(2, 8, deadline_s=86401)", "deadline_s"),
        ("sync(4, deadline_s=1)", "deadline_s"),
        ("sync(4, lease_s=0.05)", "lease_s"),
        ("single(lease_s=1)", "lease_s"),
        ("sync(4, staleness_max=1)", "staleness_max"),
        ("async(staleness_max=1)", "staleness_max"),
        (f"buffered(2, staleness_max={limits.STEP_MAX + 1})", "staleness_max"),
        ("buffered(0)", "k"),
        ("buffered(2, compensation=1)", "compensation"),
        ("async(compensation=1e7)", "compensation"),
        ("sync(4, damping=inverse)", "damping"),
        ("buffered(2, policy=wait)", "policy"),
        ("async(policy=wait)", "policy"),
        ("single(combine=sum)", "combine"),
    ],
)
def test_what_a_mode_cannot_have_dies_at_birth(text: str, name: str):
    with pytest.raises(errors.InvalidArgumentError, match=rf"aggregation\.{name}: .*, expected .* in mode") as caught:
        aggregations.parse(text)
    assert caught.value.subject == f"aggregation.{name}"


def test_a_message_that_cannot_be_is_refused_by_name():
    for message, name in (
        (pb.Aggregation(mode=pb.Aggregation.MODE_SINGLE, k=1), "k"),
        (pb.Aggregation(mode=pb.Aggregation.MODE_SYNC, workers=2, staleness_steps_max=0), "staleness_max"),
        (pb.Aggregation(mode=pb.Aggregation.MODE_SYNC, workers=2, deadline_s=1), "deadline_s"),
        (pb.Aggregation(mode=pb.Aggregation.MODE_SYNC, workers=2, lease_s=float("nan")), "lease_s"),
        (pb.Aggregation(mode=pb.Aggregation.MODE_BOUNDED_STALENESS), "staleness_max"),
    ):
        with pytest.raises(errors.InvalidArgumentError, match=rf"aggregation\.{name}"):
            convert.aggregation_from_proto(message)


@pytest.mark.parametrize("fields", [{"mode": 8}, {"mode": 99}, {"policy": 3}, {"damping": 3}, {"combine": 3}], ids=str)
def test_what_no_version_has_a_name_for_is_not_served(fields: dict[str, Any]):
    ((name, value),) = fields.items()
    with pytest.raises(errors.UnsupportedError, match=rf"aggregation\.{name}: {value} is not served"):
        convert.aggregation_from_proto(pb.Aggregation(**fields))


def test_workers_are_known_by_their_rank():
    assert sessions.worker_id(11) == "0" * 31 + "b"
    four = aggregations.Aggregation(aggregations.Mode.SYNC, 4)
    assert [four.includes(sessions.worker_id(rank)) for rank in (0, 3, 4, 2**127)] == [True, True, False, False]
    assert aggregations.SINGLE.includes("f" * 32)
