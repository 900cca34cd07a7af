"""The session machine where several workers make one step: row by row, in every order, and against a simpler model."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.test_machine import ID, RATE, changed, digest, refuses

from optwire_proto import aggregations, errors, sessions
from optwire_server.session import admission, effects, events, machine

OTHER = sessions.PushOptions(grad_scale=2.0)
UPDATES = sessions.ReplyContent.UPDATES


def opened(workers: int = 3) -> machine.Session:
    return machine.Session(id=ID, name="s", aggregation=aggregations.Aggregation(aggregations.Mode.SYNC, workers))


def push(
    rank: int, *, seq: int = 1, base: int = 0, data: int = 7, options: sessions.PushOptions = sessions.PLAIN
) -> events.Pushed:
    worker = sessions.worker_id(rank)
    key = sessions.PushKey(session_id=ID, incarnation=1, worker=worker, seq=seq, base_step=base)
    return events.Pushed(key, digest(data), options)


def ids(*ranks: int) -> tuple[str, ...]:
    return tuple(map(sessions.worker_id, ranks))


def holding(*pushes: events.Pushed, workers: int = 3) -> machine.Session:
    session = opened(workers)
    for pushed in pushes:
        session, todo = machine.advance(session, pushed)
        assert todo == (effects.Hold(),)
    return session


def told(todo: tuple[effects.Effect, ...]) -> dict[str, effects.Reply | effects.Fail]:
    """What each worker that waits is told."""
    return {effect.worker: effect.outcome for effect in todo if isinstance(effect, effects.Answer)}


def stepped(workers: int = 3) -> machine.Session:
    """A session after one step."""
    session = holding(*map(push, range(workers - 1)), workers=workers)
    session, _ = machine.advance(session, push(workers - 1))
    return machine.advance(session, events.Updated(RATE))[0]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_whatever_the_order_the_step_is_of_the_workers_in_the_order_of_their_ids(order: tuple[int, ...]):
    *first, last = order
    session = holding(*map(push, first))
    assert (session.phase, session.step) == (machine.Phase.OPEN, 0)
    session, todo = machine.advance(session, push(last))
    assert todo == (effects.Apply(0, sessions.PLAIN, ids(0, 1, 2)),)
    assert session.phase is machine.Phase.APPLYING
    session, todo = machine.advance(session, events.Updated(RATE))
    reply = effects.Reply(seq=1, applied_step=1, duplicate=False, learning_rate=RATE)
    assert todo[-1] == reply, "the one that is on the line hears last, when all else is done"
    assert told(todo[:-1]) == dict.fromkeys(ids(*first), reply)
    assert (session.step, session.phase, session.gathered, session.pending) == (1, machine.Phase.OPEN, {}, None)
    assert {worker: (now.seq, now.step) for worker, now in session.workers.items()} == dict.fromkeys(
        ids(0, 1, 2), (1, 1)
    )


def test_each_worker_hears_its_own_seq():
    session = holding(push(0, seq=41), push(1, seq=7))
    session, _ = machine.advance(session, push(2, seq=1))
    session, todo = machine.advance(session, events.Updated(RATE))
    assert [outcome.seq for outcome in told(todo).values() if isinstance(outcome, effects.Reply)] == [41, 7]
    assert todo[-1] == effects.Reply(1, 1, False, RATE)


def test_the_same_push_again_waits_like_the_first_and_counts_once():
    session = holding(push(0), push(0), push(0))
    assert list(session.gathered) == [sessions.worker_id(0)]
    session, todo = machine.advance(session, push(1))
    assert todo == (effects.Hold(),)


def test_a_retry_while_gathered_may_ask_for_another_reply():
    session = holding(push(0))
    wish = sessions.PushOptions(reply=UPDATES, telemetry=True)
    session, todo = machine.advance(session, push(0, options=wish))
    assert todo == (effects.Hold(),)
    session = machine.advance(session, push(1))[0]
    _, todo = machine.advance(session, push(2))
    assert todo == (effects.Apply(0, wish, ids(0, 1, 2)),)


@pytest.mark.parametrize("order", [0, 1])
def test_the_wishes_of_all_calls_that_wait_for_a_push_are_heeded(order: int):
    wishes = [sessions.PushOptions(reply=UPDATES), sessions.PushOptions(telemetry=True)]
    session = holding(*(push(0, options=wish) for wish in (wishes[order], wishes[1 - order])), push(1))
    _, todo = machine.advance(session, push(2))
    assert todo == (effects.Apply(0, sessions.PushOptions(reply=UPDATES, telemetry=True), ids(0, 1, 2)),)


@pytest.mark.parametrize(
    "other", [push(0, data=8), push(0, options=OTHER), push(0, seq=2)], ids=["bytes", "scale", "seq"]
)
def test_a_worker_that_computed_anew_takes_the_place_of_what_was_never_applied(other: events.Pushed):
    session, todo = machine.advance(holding(push(0)), other)
    answer, hold = todo
    assert hold == effects.Hold()
    assert isinstance(answer, effects.Answer)
    assert isinstance(answer.outcome, effects.Fail)
    assert isinstance(answer.outcome.error, errors.StalePushError)
    assert "worker 0 took the place of this one before step 0 was complete" in str(answer.outcome.error)
    assert session.gathered == {sessions.worker_id(0): other}
    assert session.workers == {}


def test_a_retry_after_the_step_is_answered_and_another_push_refused():
    session = stepped()
    after, todo = machine.advance(session, push(1))
    assert (after, todo) == (session, (effects.Reply(1, 1, True, RATE),))
    refuses(session, push(1, data=8), errors.DivergentRetryError, "applied as step 1 with other bytes")
    refuses(session, push(1, seq=2), errors.StepClosedError, "gradients of step 0")


def test_a_retry_of_the_step_before_is_answered_while_the_next_one_is_open():
    session = machine.advance(stepped(), push(0, seq=2, base=1))[0]
    after, todo = machine.advance(session, push(1))
    assert (after, todo) == (session, (effects.Reply(1, 1, True, RATE),))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"grad_scale": 2.0}, "grad_scale"),
        ({"hyperparams": (("learning_rate", 0.5),)}, "hyperparams"),
        ({"absent": (1,)}, "absent leaves"),
    ],
    ids=str,
)
def test_workers_of_one_step_must_agree(options: dict[str, Any], name: str):
    session = holding(push(2))
    refuses(session, push(0, options=sessions.PushOptions(**options)), errors.InvalidArgumentError, name)
    assert machine.advance(session, push(0))[1] == (effects.Hold(),)


def test_the_loss_is_the_mean_and_what_one_wants_measured_is_measured():
    session = opened()
    for rank, loss in ((2, 1.0), (0, 2.0)):
        options = sessions.PushOptions(extras=(("loss", loss),), telemetry=rank == 2)
        session = machine.advance(session, push(rank, options=options))[0]
    options = sessions.PushOptions(extras=(("loss", 6.0),), reply=UPDATES)
    _, todo = machine.advance(session, push(1, options=options))
    wish = sessions.PushOptions(extras=(("loss", 3.0),), telemetry=True, reply=UPDATES)
    assert todo == (effects.Apply(0, wish, ids(0, 1, 2)),)


def test_the_mean_of_large_losses_is_finite():
    session = opened(2)
    options = sessions.PushOptions(extras=(("loss", 1.5e308),))
    session = machine.advance(session, push(0, options=options))[0]
    (apply,) = machine.advance(session, push(1, options=options))[1]
    assert isinstance(apply, effects.Apply)
    assert apply.options.extras == (("loss", 1.5e308),)


@pytest.mark.parametrize(
    ("event", "kind", "phase", "ends"),
    [
        (
            events.UpdateRefused(errors.NonFiniteError("not finite")),
            errors.NonFiniteError,
            machine.Phase.OPEN,
            [effects.Fail],
        ),
        (events.UpdateFailed("broken", False), errors.InternalError, machine.Phase.OPEN, [effects.Fail]),
        (
            events.UpdateFailed("broken", True),
            errors.SessionFailedError,
            machine.Phase.FAILED,
            [effects.Fail, effects.Free],
        ),
    ],
    ids=["refused", "failed", "lost"],
)
def test_everyone_hears_of_an_update_that_was_none(event: Any, kind: type[Exception], phase: Any, ends: list[type]):
    session = machine.advance(holding(push(0), push(2)), push(1))[0]
    session, todo = machine.advance(session, event)
    assert [type(effect) for effect in todo] == [effects.Answer, effects.Answer, *ends]
    assert list(told(todo)) == list(ids(0, 2))
    for outcome in (*told(todo).values(), todo[2]):
        assert isinstance(outcome, effects.Fail)
        assert type(outcome.error) is kind
    assert (session.phase, session.step, session.gathered, session.pending) == (phase, 0, {}, None)
    if phase is machine.Phase.OPEN:
        assert machine.advance(session, push(1))[1] == (effects.Hold(),)


def test_a_session_that_is_deleted_tells_those_who_wait():
    session, todo = machine.advance(holding(push(2), push(0)), events.Deleted())
    assert list(told(todo)) == list(ids(0, 2))
    assert all(isinstance(outcome.error, errors.SessionNotFoundError) for outcome in told(todo).values())  # type: ignore[union-attr]
    assert (todo[-1], session.gathered) == (effects.Free(), {})


def test_a_state_that_is_loaded_ends_the_open_step():
    session, todo = machine.advance(holding(push(2), push(0)), events.Loaded(1, "b" * 32))
    assert todo[0] == effects.Replace(), "nobody is told of what has not happened yet"
    assert list(told(todo)) == list(ids(0, 2))
    assert all(isinstance(outcome.error, errors.IncarnationError) for outcome in told(todo).values())  # type: ignore[union-attr]
    assert (session.incarnation, session.gathered) == (2, {})
    refuses(session, push(0), errors.IncarnationError)


def test_a_change_of_hyperparameters_leaves_those_who_wait_alone():
    before = holding(push(0))
    session, todo = machine.advance(before, changed(0.5, 0))
    assert (todo, session.gathered) == ((), before.gathered)


@pytest.mark.parametrize("worker", [*ids(3, 1023, 2**128 - 1), "a" * 32])
def test_a_worker_of_no_rank_is_refused_before_its_bytes_come(worker: str):
    foreign = dataclasses.replace(push(0).key, worker=worker)
    for call in (
        lambda: admission.admit(opened(), foreign),
        lambda: machine.advance(opened(), events.Pushed(foreign, digest(7))),
    ):
        with pytest.raises(
            errors.InvalidArgumentError, match="expected one of the workers 0 to 2, as its steps are of"
        ):
            call()


def test_one_worker_waits_for_nobody():
    session, todo = machine.advance(opened(1), push(0))
    assert todo == (effects.Apply(0, sessions.PLAIN),)
    _, todo = machine.advance(session, events.Updated(RATE))
    assert todo == (effects.Reply(1, 1, False, RATE),)


def test_all_workers_that_may_be_are_remembered():
    most = machine.WORKERS_MAX
    session = stepped(most)
    assert len(session.workers) == most
    assert machine.advance(session, push(0))[1] == (effects.Reply(1, 1, True, RATE),)


# ---------------------------------------------------------------------------------------------------- random histories

RANKS = 3
# (what, rank, bytes): a push that fits, the last one again, or one on another step.
WISH = st.tuples(
    st.sampled_from(["fits"] * 6 + ["applied again", "gathered again", "old step", "next step", "foreign"]),
    st.integers(0, RANKS - 1),
    st.integers(0, 3),
)
ENDING = st.sampled_from(["updated"] * 8 + ["refused", "failed"])


class Model:
    """What each worker's pushes of the open step and of the last one were; how often each bytes were applied."""

    def __init__(self) -> None:
        self.step = 0
        self.open: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.seqs = [0] * RANKS

    def concrete(self, what: str, rank: int, data: int) -> events.Pushed:
        if what == "applied again" and self.last:
            return push(rank, seq=self.seqs[rank], base=self.step - 1, data=self.last[rank])
        if what == "gathered again" and rank in self.open:
            data = self.open[rank]
        base = self.step + {"old step": -1, "next step": 1}.get(what, 0)
        fits = push(rank, seq=self.seqs[rank] + 1, base=base, data=data)
        if what == "foreign":
            return dataclasses.replace(fits, key=dataclasses.replace(fits.key, worker="f" * 32))
        return fits


@settings(max_examples=300, deadline=None)
@given(history=st.lists(st.tuples(WISH, ENDING), min_size=1, max_size=60))
def test_every_history_is_what_a_simpler_model_says(history: list[tuple[tuple[str, int, int], str]]):
    model, session = Model(), opened(RANKS)
    for (what, rank, data), ending in history:
        if what == "old step" and model.step == 0:
            continue
        event = model.concrete(what, rank, data)
        if what in ("old step", "next step", "foreign"):
            refuses(
                session,
                event,
                {"old step": errors.StepClosedError, "next step": errors.FutureStepError}.get(
                    what, errors.InvalidArgumentError
                ),
            )
            continue
        if event.key.base_step < model.step:
            after, todo = machine.advance(session, event)
            assert (after, todo) == (session, (effects.Reply(event.key.seq, model.step, True, RATE),))
            continue
        session = pushed(model, session, event, rank, ending)
        assert {int(worker, 16) for worker in session.gathered} == set(model.open)
        assert session.step == model.step


def pushed(model: Model, session: machine.Session, event: events.Pushed, rank: int, ending: str) -> machine.Session:
    data = next(data for data in range(256) if digest(data) == event.digest)
    replaces = rank in model.open and model.open[rank] != data
    session, todo = machine.advance(session, event)
    model.open[rank] = data
    if len(model.open) < RANKS:
        assert [type(effect) for effect in todo] == [effects.Answer] * replaces + [effects.Hold]
        assert not replaces or list(told(todo)) == list(ids(rank))
        return session
    assert todo == (effects.Apply(model.step, sessions.PLAIN, ids(*range(RANKS))),)
    taken = {int(one.key.worker, 16): one.digest for one in (*session.gathered.values(), event)}
    assert taken == {rank: digest(data) for rank, data in model.open.items()}, "the bytes last sent are applied"
    end = {
        "updated": events.Updated(RATE),
        "refused": events.UpdateRefused(errors.NonFiniteError("x")),
        "failed": events.UpdateFailed("x", False),
    }[ending]
    session, todo = machine.advance(session, end)
    assert sorted(told(todo)) == sorted(set(ids(*range(RANKS))) - {event.key.worker}), "each hears, and hears once"
    kind = effects.Reply if ending == "updated" else effects.Fail
    assert {type(outcome) for outcome in (*told(todo).values(), todo[-1])} == {kind}
    if ending == "updated":
        model.step += 1
        model.last, model.seqs = model.open, [seq + 1 for seq in model.seqs]
    model.open = {}
    return session
