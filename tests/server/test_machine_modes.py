"""The session machine with many workers, as transcripts: each mode, each way in which a worker comes and goes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from tests.server.test_machine import ID, RATE, digest, refuses

from optwire_proto import aggregations, errors, limits, sessions
from optwire_server.session import effects, events, machine, members

LIVE, LOST, LEFT = sessions.WorkerState.LIVE, sessions.WorkerState.LOST, sessions.WorkerState.LEFT
EXPECTED = sessions.WorkerState.EXPECTED
LEASE_S = 10.0


def opened(mode: str) -> machine.Session:
    aggregation = dataclasses.replace(aggregations.parse(mode), lease_s=LEASE_S)
    return machine.Session(id=ID, name="s", aggregation=aggregation)


def push(rank: int, base: int = 0, *, seq: int = 1, epoch: int = 0, now: float = 0.0, **options: Any) -> events.Pushed:
    worker = sessions.worker_id(rank)
    key = sessions.PushKey(session_id=ID, incarnation=1, worker=worker, seq=seq, base_step=base, epoch=epoch)
    return events.Pushed(key, digest(rank + 10 * seq), sessions.PushOptions(**options), now)


def joined(rank: int, key: int = 0, now: float = 0.0) -> events.Joined:
    return events.Joined(sessions.worker_id(rank), f"{key:032x}", now)


def play(session: machine.Session, *happened: events.Event) -> tuple[machine.Session, list[str]]:
    """The session after events whose updates all succeed, and what happened, in words."""
    told: list[str] = []
    for event in happened:
        session, todo = machine.advance(session, event)
        while todo:
            effect, *rest = todo
            told.append(words(effect))
            more: tuple[effects.Effect, ...] = ()
            if isinstance(effect, effects.Apply):
                session, more = machine.advance(session, events.Updated(RATE))
            elif isinstance(effect, effects.Add):
                session, more = machine.advance(session, events.Added(RATE))
            todo = (*rest, *more)
    return session, told


def words(effect: effects.Effect) -> str:
    match effect:
        case effects.Apply():
            return " ".join(["apply", *(str(int(worker, 16)) for worker in effect.workers)])
        case effects.Add():
            return f"add {effect.factor:g}"
        case effects.Answer(worker, effects.Reply() as reply):
            return f"answer {int(worker, 16)}: step {reply.applied_step}"
        case effects.Answer(worker, effects.Fail(error)):
            return f"answer {int(worker, 16)}: {type(error).__name__}"
        case effects.Reply():
            return f"reply: step {effect.applied_step}"
    return type(effect).__name__.lower()


def states(session: machine.Session, now: float = 0.0) -> dict[int, sessions.WorkerState]:
    return {int(info.worker, 16): info.state for info in members.infos(session, now)}


def awaited(session: machine.Session) -> list[int]:
    return [int(worker, 16) for worker in members.awaited(session)]


# ---------------------------------------------------------------------------------------------------------- the modes


def test_the_first_k_of_n_make_the_step_and_the_others_hear_that_it_is_closed():
    session, told = play(opened("k_of_n(2, 3)"), push(2), push(0))
    assert told == ["hold", "apply 0 2", "answer 2: step 1", "reply: step 1"]
    refuses(
        session, push(1), errors.StepClosedError, "gradients of step 0, but the session is at 1: that step was made"
    )
    assert play(session, push(1, base=1))[1] == ["hold"]


def test_fewer_than_k_of_n_make_the_step_where_no_more_are_left():
    session, _ = play(opened("k_of_n(2, 3)"), joined(1), joined(2), push(0, now=5))
    session, told = play(session, events.Ticked(LEASE_S))
    assert told == ["apply 0", "answer 0: step 1"]


def test_a_quorum_waits_for_all_who_are_there_and_for_enough():
    session, told = play(opened("quorum(2, 3)"), push(7))
    assert (told, awaited(session)) == (["hold"], []), "there is nobody else, and one is not enough"
    session, told = play(session, joined(9), push(8))
    assert (told, awaited(session)) == (["hold"], [9])
    session, told = play(session, push(9, epoch=1))
    assert told == ["apply 7 8 9", "answer 7: step 1", "answer 8: step 1", "reply: step 1"]


def test_a_quorum_waits_no_longer_than_its_deadline():
    session, _ = play(opened("quorum(1, 3, deadline_s=4)"), joined(1, now=1), joined(2, now=1), push(1, epoch=1, now=2))
    assert machine.next_deadline(session) == 6.0
    assert play(session, events.Ticked(5.9))[1] == []
    assert play(session, events.Ticked(6.0))[1] == ["apply 1", "answer 1: step 1"]


def test_the_deadline_of_a_quorum_that_lacks_workers_is_over_with_the_push_that_makes_it_one():
    session, _ = play(opened("quorum(2, 3, deadline_s=4)"), joined(1), joined(2), joined(3), push(1, epoch=1))
    assert machine.next_deadline(session) == LEASE_S, "nothing is due of the step while it lacks a push"
    assert play(session, push(2, epoch=1, now=9))[1] == ["apply 1 2", "answer 1: step 1", "reply: step 1"]


def overdue() -> tuple[machine.Session, events.Pushed]:
    """A quorum whose step could be made since time 4, which it has not heard of yet, and the push that waits."""
    session, _ = play(opened("quorum(1, 3, deadline_s=4)"), joined(1), push(1, epoch=1), joined(2))
    held = push(1, base=1, seq=2, epoch=1)
    session, told = play(session, held)
    assert told == ["hold"]
    return session, held


def test_a_retry_of_what_counts_does_not_make_the_step_that_is_due():
    session, _ = overdue()
    assert play(session, push(1, epoch=1, now=6)) == (session, ["reply: step 1"])
    assert machine.next_deadline(session) == 4.0
    assert play(session, events.Ticked(6.0))[1] == ["apply 1", "answer 1: step 2"]


def test_a_retry_of_what_waits_makes_the_step_that_is_due_and_all_its_calls_are_answered():
    session, held = overdue()
    session, told = play(session, dataclasses.replace(held, now_s=6.0))
    assert told == ["hold", "apply 1", "answer 1: step 2"]
    assert (session.step, session.gathered) == (2, {})


def test_a_quorum_has_no_more_workers_than_it_says_but_one_may_take_the_place_of_another():
    session, _ = play(opened("quorum(1, 2)"), joined(1), joined(2))
    refuses(session, joined(3), errors.LimitError, "2 workers are there, the most for steps of")
    refuses(session, push(3), errors.LimitError)
    session, _ = play(session, events.Left(sessions.worker_id(2), 1, 1.0))
    assert states(play(session, joined(3))[0]) == {1: LIVE, 2: LEFT, 3: LIVE}


@pytest.mark.parametrize(
    ("mode", "scales"),
    [
        ("async", [1.0, 1.0, 1.0]),
        ("async(damping=inverse)", [1.0, 2.0, 3.0]),
        ("async(damping=sqrt)", [1.0, math.sqrt(2.0), math.sqrt(3.0)]),
        ("async(combine=sum)", [0.5, 0.5, 0.5]),
        ("bounded_staleness(2, combine=sum, damping=inverse)", [0.5, 1.0, 1.5]),
    ],
)
def test_what_is_late_counts_as_much_as_the_mode_says(mode: str, scales: list[float]):
    session, found = opened(mode), []
    for rank in range(3):
        session, todo = machine.advance(session, push(rank, weight=2.0))
        assert isinstance(todo[0], effects.Apply)
        found.append(todo[0].options.grad_scale)
        session, _ = machine.advance(session, events.Updated(RATE))
    assert found == pytest.approx(scales, rel=1e-15)


def test_gradients_beyond_the_bound_of_staleness_are_refused():
    session, _ = play(opened("bounded_staleness(1)"), push(0), push(1))
    refuses(session, push(2), errors.StaleStepError, "2 steps ago, more than 1")
    refuses(session, push(2, base=3), errors.FutureStepError)


def test_where_staleness_is_bounded_by_waiting_the_fast_wait_for_the_slow():
    session, _ = play(opened("bounded_staleness(1, policy=wait)"), joined(0), joined(1))
    session, told = play(session, push(0, epoch=1), push(0, base=1, seq=2, epoch=1))
    assert told == ["apply", "reply: step 1", "hold"]
    assert awaited(session) == [1]
    session, told = play(session, push(1, epoch=1))
    assert told == ["apply", "reply: step 2", "apply 0", "answer 0: step 3"]


@pytest.mark.parametrize(
    "event",
    [events.Read(sessions.worker_id(1), 1, 1.0), events.Left(sessions.worker_id(1), 1, 1.0), events.Ticked(15.0)],
    ids=["reads", "leaves", "is lost"],
)
def test_a_fast_worker_goes_on_when_the_slow_one_needs_not_be_waited_for(event: events.Event):
    session, _ = play(opened("bounded_staleness(1, policy=wait)"), joined(0, now=9), joined(1))
    session, _ = play(session, push(0, epoch=1, now=9), push(0, base=1, seq=2, epoch=1, now=9))
    assert play(session, event)[1] == ["apply 0", "answer 0: step 2"]


def test_a_worker_that_was_lost_and_comes_back_too_late_must_read():
    session, _ = play(opened("bounded_staleness(1, policy=wait)"), joined(0, now=9), joined(1), events.Ticked(12.0))
    session, _ = play(session, push(0, epoch=1, now=12), push(0, base=1, seq=2, epoch=1, now=12))
    refuses(session, push(1, epoch=1), errors.StaleStepError, "2 steps ago, more than 1")
    session, told = play(session, events.Beat(sessions.worker_id(1), 1, 13.0), push(0, base=2, seq=3, epoch=1))
    assert told == ["apply", "reply: step 3"], "it is there again, and the others need not wait for what it had"


def test_there_are_no_more_workers_than_the_bound_of_staleness_has_room_for():
    session, _ = play(opened("bounded_staleness(1, policy=wait)"), joined(0), joined(1))
    refuses(session, joined(2), errors.LimitError, "2 workers are there, the most for steps of")


def test_pushes_are_added_to_a_sum_as_they_come_and_answered_at_once():
    session, told = play(opened("buffered(3, damping=inverse)"), push(0, weight=3.0), push(1), push(0, seq=2))
    assert told == ["add 3", "reply: step 1", "add 1", "reply: step 1", "apply", "reply: step 1"]
    assert (session.step, session.buffered) == (1, ())
    session, todo = machine.advance(session, push(2, weight=3.0))
    assert todo == (effects.Add(1.5, is_first=True),), "of step 0, and half of it counts"


def test_the_last_push_of_a_sum_comes_to_it_with_the_update():
    session, _ = play(opened("buffered(2)"), push(0, weight=3.0))
    _, (apply,) = machine.advance(session, push(1, weight=5.0))
    assert apply == effects.Apply(0, sessions.PushOptions(), (), (5.0,), 8.0, completes_sum=True)
    _, (apply,) = machine.advance(play(opened("buffered(2, combine=sum)"), push(0))[0], push(1))
    assert isinstance(apply, effects.Apply)
    assert apply.divisor == 1.0


def test_a_push_that_is_in_a_sum_is_not_added_again():
    session, _ = play(opened("buffered(3)"), push(0))
    assert play(session, push(0)) == (session, ["reply: step 1"])
    refuses(session, push(0, weight=2.0), errors.DivergentRetryError, "with other weight")


@pytest.mark.parametrize(
    "event", [events.Loaded(1, "1" * 32), events.Deleted(), events.UpdateFailed("x", state_lost=False)], ids=str
)
def test_a_sum_ends_with_what_it_was_of(event: events.Event):
    session, _ = play(opened("buffered(2)"), push(0))
    if isinstance(event, events.UpdateFailed):
        session, _ = machine.advance(session, push(1))
    assert machine.advance(session, event)[0].buffered == ()


@pytest.mark.parametrize("mode", ["sync(2)", "quorum(2, 2)", "k_of_n(2, 2)"])
@pytest.mark.parametrize(
    ("combine", "weights", "factors", "divisor"),
    [
        ("mean", (1.0, 1.0), (), 0.0),
        ("mean", (1.0, 3.0), (1.0, 3.0), 4.0),
        ("sum", (1.0, 1.0), (), 1.0),
        ("sum", (2.0, 3.0), (2.0, 3.0), 1.0),
    ],
)
def test_what_is_gathered_is_weighted(mode: str, combine: str, weights: Any, factors: Any, divisor: float):
    session, _ = play(opened(mode.replace(")", f", combine={combine})")), push(0, weight=weights[0]))
    _, todo = machine.advance(session, push(1, weight=weights[1]))
    assert isinstance(todo[-1], effects.Apply)
    assert (todo[-1].factors, todo[-1].divisor) == (factors, divisor)


def test_a_loss_counts_as_its_gradients_do():
    session, _ = play(opened("sync(2)"), push(0, weight=1.0, extras=(("loss", 4.0),)))
    _, (apply,) = machine.advance(session, push(1, weight=3.0, extras=(("loss", 8.0),)))
    assert isinstance(apply, effects.Apply)
    assert apply.options.extras == (("loss", 7.0),)


# -------------------------------------------------------------------------------------------- who is there, and who not


def test_joining_gives_an_epoch_and_joining_again_with_the_same_key_the_same():
    session, _ = play(opened("sync(3)"), joined(0, 1), joined(0, 1, 2.0))
    assert session.members[sessions.worker_id(0)] == machine.Member(LIVE, 1, f"{1:032x}", 0, 2.0)
    session, _ = play(session, joined(0, 2, 3.0))
    assert session.members[sessions.worker_id(0)].epoch == 2


def test_a_process_that_was_replaced_is_fenced():
    session, _ = play(opened("sync(2)"), joined(0, 1), joined(0, 2))
    old = sessions.worker_id(0)
    refuses(session, push(0, epoch=1), errors.ReplacedError, "worker .* of epoch 1 is in epoch 2: another process")
    refuses(session, push(0), errors.ReplacedError, "another process")
    refuses(session, push(0, epoch=3), errors.ReplacedError, "is not known to have joined")
    refuses(session, events.Beat(old, 1), errors.ReplacedError)
    refuses(session, events.Left(old, 1), errors.ReplacedError)
    assert play(session, push(0, epoch=2))[1] == ["hold"]


def test_what_a_replaced_process_pushed_counts_unless_the_new_one_pushes_in_time():
    session, _ = play(opened("sync(2)"), joined(0, 1), push(0, epoch=1), joined(0, 2))
    taken, told = play(session, push(1))
    assert told == ["apply 0 1", "answer 0: step 1", "reply: step 1"]
    late = dataclasses.replace(push(0, epoch=2), digest=digest(99))
    refuses(taken, late, errors.StepClosedError, "a push of the process before this one counted")
    assert play(taken, push(0, epoch=2))[1] == ["reply: step 1"], "the same push again"
    assert play(session, late)[1] == ["answer 0: StalePushError", "hold"]


def test_a_worker_is_lost_with_its_lease_and_releases_those_who_wait():
    session, _ = play(opened("sync(3)"), joined(0), joined(1), joined(2, now=5), push(0, epoch=1, now=5))
    session, _ = play(session, push(2, epoch=1, now=6))
    assert (machine.next_deadline(session), awaited(session)) == (LEASE_S, [1])
    session, told = play(session, events.Ticked(LEASE_S))
    assert told == ["apply 0 2", "answer 0: step 1", "answer 2: step 1"]
    assert states(session) == {0: LIVE, 1: LOST, 2: LIVE}


def test_what_keeps_a_lease_alive():
    session, _ = play(opened("sync(3)"), joined(0), joined(1), joined(2))
    session, _ = play(session, events.Beat(sessions.worker_id(0), 1, 8.0), push(1, epoch=1, now=8))
    assert states(play(session, events.Ticked(12.0))[0]) == {0: LIVE, 1: LIVE, 2: LOST}


def test_a_lost_worker_that_is_heard_of_is_awaited_again():
    session, _ = play(opened("sync(2)"), joined(0), joined(1, now=9), events.Ticked(LEASE_S))
    assert awaited(session) == [1]
    beaten, _ = play(session, events.Beat(sessions.worker_id(0), 1, 11.0))
    assert awaited(beaten) == [0, 1]
    assert play(session, push(0, epoch=1, now=11))[1] == ["hold"]


def test_a_worker_that_never_joined_has_no_lease():
    session, _ = play(opened("sync(2)"), push(0), events.Ticked(1e9))
    assert (states(session), awaited(session)) == ({0: LIVE, 1: EXPECTED}, [1])
    assert machine.next_deadline(session) is None


def test_a_worker_that_leaves_is_not_waited_for_and_must_join_again():
    session, _ = play(opened("sync(2)"), joined(0), joined(1), push(0, epoch=1))
    session, told = play(session, events.Left(sessions.worker_id(1), 1, 1.0))
    assert told == ["apply 0", "answer 0: step 1"]
    refuses(session, push(1, base=1, epoch=1), errors.ReplacedError, "has left; attach again")
    refuses(session, joined(1), errors.ReplacedError, "has left")
    assert play(session, events.Left(sessions.worker_id(1), 1, 2.0))[1] == []
    assert states(play(session, joined(1, 5))[0]) == {0: LIVE, 1: LIVE}


def test_where_all_have_gone_the_next_step_waits_for_whoever_comes():
    session, _ = play(opened("sync(2)"), joined(0), joined(1), events.Ticked(LEASE_S))
    assert (states(session), awaited(session)) == ({0: LOST, 1: LOST}, [])
    assert play(session, push(0, epoch=1, now=11))[1] == ["apply", "reply: step 1"]


def test_nobody_joins_a_session_that_has_ended_or_beats_in_one_unknown():
    deleted, _ = machine.advance(opened("sync(2)"), events.Deleted())
    refuses(deleted, joined(0), errors.SessionNotFoundError)
    assert play(deleted, events.Ticked(5.0)) == (deleted, [])
    refuses(opened("sync(2)"), events.Beat(sessions.worker_id(0), 0), errors.ReplacedError, "is not known to have")
    refuses(opened("sync(2)"), joined(2), errors.InvalidArgumentError, "expected one of the workers 0 to 1")


def test_members_stay_through_a_load_and_have_to_read():
    session, _ = play(opened("bounded_staleness(1, policy=wait)"), joined(0), push(0, epoch=1))
    session, _ = machine.advance(session, events.Loaded(1, "1" * 32, step=7))
    assert session.members[sessions.worker_id(0)].base_step == 7


def test_no_more_workers_are_known_than_the_limit_and_those_who_left_are_forgotten_first(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(limits, "WORKERS_MAX", 3)
    session, _ = play(opened("async"), push(0), joined(1), push(2), events.Left(sessions.worker_id(1), 1))
    session, _ = play(session, push(3))
    assert states(session) == {0: LIVE, 2: LIVE, 3: LIVE}
    assert states(play(session, push(4))[0]) == {2: LIVE, 3: LIVE, 4: LIVE}
    session, _ = play(opened("quorum(1, 3)"), joined(0), joined(1), joined(2))
    refuses(session, joined(3), errors.LimitError)


def test_a_retry_of_a_push_is_refused_once_its_worker_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "WORKERS_MAX", 3)
    for mode in ("async", "bounded_staleness(9)", "buffered(1)"):
        session, _ = play(opened(mode), push(0), *(push(rank, base=rank) for rank in range(1, 4)))
        refuses(
            session, push(0), errors.StaleStepError, "a push of this worker may have counted since, and be forgotten"
        )
        assert play(session, push(0, base=1))[1] == ["apply", "reply: step 5"], "none of it can be of that step"
        assert play(session, push(1, base=1))[1] == ["reply: step 2"]
        session, _ = machine.advance(session, events.Loaded(1, "1" * 32, step=0))
        again = push(0)
        again = dataclasses.replace(again, key=dataclasses.replace(again.key, incarnation=2))
        assert play(session, again)[1] == ["apply", "reply: step 1"]


def test_epochs_do_not_begin_anew_where_a_worker_was_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "WORKERS_MAX", 2)
    session, _ = play(opened("async"), joined(0, 1), joined(0, 2), events.Left(sessions.worker_id(0), 2))
    session, _ = play(session, joined(1), joined(2))
    assert states(session) == {1: LIVE, 2: LIVE}
    session, _ = play(session, events.Left(sessions.worker_id(1), 1), joined(0, 3))
    assert session.members[sessions.worker_id(0)].epoch == 3
    refuses(session, push(0, epoch=1), errors.ReplacedError)


def test_nobody_who_has_joined_and_is_there_is_forgotten_for_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "WORKERS_MAX", 2)
    session, _ = play(opened("async"), push(0), joined(1), joined(2))
    assert states(session) == {1: LIVE, 2: LIVE}, "who never joined has nothing to lose"
    refuses(session, joined(3), errors.LimitError, "2 workers are there, the most")
    assert play(session, events.Left(sessions.worker_id(3), 0))[0] == session
    session, told = play(session, push(3))
    assert (states(session), told) == ({1: LIVE, 2: LIVE}, ["apply", "reply: step 2"])


def test_a_read_counts_for_the_process_that_joined_last_and_for_no_other():
    session, _ = play(
        opened("bounded_staleness(3, policy=wait)"), joined(1, 1), joined(1, 2), joined(0), push(0, epoch=1)
    )
    worker = sessions.worker_id(1)
    for epoch in (0, 1, 3):
        assert play(session, events.Read(worker, epoch, 5.0))[0] == session
    read = play(session, events.Read(worker, 2, 5.0))[0].members[worker]
    assert (read.base_step, read.heard_s) == (1, 5.0)
    lost, _ = play(session, events.Ticked(LEASE_S))
    assert states(play(lost, events.Read(worker, 2, 12.0))[0])[1] == LIVE
    gone, _ = play(session, events.Left(worker, 2))
    assert play(gone, events.Read(worker, 2, 5.0))[0] == gone


def test_what_is_heard_of_a_worker_late_takes_nothing_back():
    session, _ = play(
        opened("sync(2)"), joined(0, now=5), push(0, epoch=1, now=3), events.Beat(sessions.worker_id(0), 1, 2)
    )
    assert session.members[sessions.worker_id(0)].heard_s == 5


def test_while_an_update_runs_nobody_is_waited_for():
    session, _ = play(opened("sync(2)"), push(0))
    assert awaited(machine.advance(session, push(1))[0]) == []


def test_what_is_told_of_workers():
    session, _ = play(opened("sync(3)"), joined(0, now=1), push(0, epoch=1, now=3), joined(1, now=4))
    first, second, third = members.infos(session, 6.0)
    assert first == sessions.WorkerInfo(
        worker=sessions.worker_id(0),
        epoch=1,
        state=LIVE,
        seq=0,
        base_step=0,
        has_pushed=True,
        is_awaited=False,
        silent_s=3.0,
    )
    assert (second.epoch, second.state, second.has_pushed, second.is_awaited, second.silent_s) == (
        1,
        LIVE,
        False,
        True,
        2,
    )
    assert (third.epoch, third.state, third.has_pushed, third.is_awaited, third.silent_s) == (
        0,
        EXPECTED,
        False,
        True,
        0,
    )


def test_the_workers_of_a_session_stay_with_the_one_that_takes_its_place():
    session, _ = play(opened("sync(2)"), joined(0), joined(1), push(0, epoch=1), push(1, epoch=1))
    kept = members.after(session, session.aggregation)
    assert {(one.state, one.epoch, one.base_step) for one in kept.values()} == {(LIVE, 1, 1)}
    others = members.after(session, aggregations.parse("sync(3)"))
    assert {(one.state, one.epoch) for one in others.values()} == {(LEFT, 1)}
