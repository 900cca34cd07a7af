"""The session machine: its table row by row, then thousands of random histories against a model that is simpler."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optwire_proto import digests, errors, limits, sessions
from optwire_server.session import admission, effects, events, machine

ID = "0" * 32
A, B, C = "a" * 32, "b" * 32, "c" * 32
RATE = 0.25


@functools.cache
def digest(data: int, length: int = 8) -> sessions.Digest:
    return digests.digest(bytes([data]) * length)


def push(
    worker: str = A, *, seq: int = 1, base: int = 0, data: int = 7, length: int = 8, incarnation: int = 1
) -> events.Pushed:
    key = sessions.PushKey(session_id=ID, incarnation=incarnation, worker=worker, seq=seq, base_step=base)
    return events.Pushed(key, digest(data, length))


def changed(rate: float, from_step: int = 1) -> events.Changed:
    return events.Changed(sessions.Change(from_step, (("adam.step_size", rate),)))


def opened() -> machine.Session:
    return machine.Session(id=ID, name="s")


def applied(*pushes: events.Pushed) -> machine.Session:
    """A session that took these pushes one after another."""
    session = opened()
    for pushed in pushes:
        session, todo = machine.advance(session, pushed)
        assert isinstance(todo[0], effects.Apply)
        session, _ = machine.advance(session, events.Updated(RATE))
    return session


def refuses(
    session: machine.Session, event: events.Event, kind: type[errors.OptwireError], fragment: str | None = None
) -> None:
    before = dataclasses.replace(session, workers=dict(session.workers))
    with pytest.raises(kind, match=fragment) as caught:
        machine.advance(session, event)
    assert type(caught.value) is kind
    assert session == before, "a refused event changed the session"


# ------------------------------------------------------------------------------------------- the table, row by row


def test_a_push_that_fits_is_applied_and_then_answered():
    session, todo = machine.advance(opened(), push(seq=1, base=0))
    assert todo == (effects.Apply(index=0, options=sessions.PLAIN),)
    assert session.phase is machine.Phase.APPLYING
    session, todo = machine.advance(session, events.Updated(RATE))
    assert todo == (effects.Reply(seq=1, applied_step=1, duplicate=False, learning_rate=RATE),)
    assert (session.step, session.phase, session.pending) == (1, machine.Phase.OPEN, None)


def test_nothing_is_answered_before_the_update_is_done():
    _, todo = machine.advance(opened(), push())
    assert not any(isinstance(effect, effects.Reply) for effect in todo)


def test_the_same_push_again_is_answered_and_not_applied():
    session = applied(push(seq=1, base=0))
    after, todo = machine.advance(session, push(seq=1, base=0))
    assert todo == (effects.Reply(seq=1, applied_step=1, duplicate=True, learning_rate=RATE),)
    assert after is session


def test_a_retry_is_answered_though_others_have_pushed_since():
    session = applied(push(A, seq=1, base=0), push(B, seq=1, base=1), push(B, seq=2, base=2))
    after, todo = machine.advance(session, push(A, seq=1, base=0))
    assert todo == (effects.Reply(seq=1, applied_step=1, duplicate=True, learning_rate=RATE),)
    assert after is session


def test_a_retry_reports_the_learning_rate_that_was_used_then():
    session = applied(push(seq=1, base=0))
    session, _ = machine.advance(session, changed(0.5))
    _, todo = machine.advance(session, push(seq=1, base=0))
    assert todo == (effects.Reply(seq=1, applied_step=1, duplicate=True, learning_rate=RATE),)


@pytest.mark.parametrize("change", [{"data": 8}, {"length": 9}], ids=["bytes", "length"])
def test_a_retry_with_other_bytes_is_refused(change: dict[str, int]):
    session = applied(push(seq=1, base=0))
    refuses(session, push(seq=1, base=0, **change), errors.DivergentRetryError, "applied as step 1 with other bytes")


@pytest.mark.parametrize(
    ("meaning", "name"),
    [
        ({"grad_scale": 2.0}, "grad_scale"),
        ({"extras": (("loss", 0.5),)}, "loss"),
        ({"hyperparams": (("learning_rate", 0.5),)}, "hyperparams"),
        ({"absent": (1,)}, "absent leaves"),
    ],
    ids=str,
)
def test_a_retry_that_says_something_else_is_refused(meaning: dict[str, Any], name: str):
    session = applied(push(seq=1, base=0))
    other = dataclasses.replace(push(seq=1, base=0), options=sessions.PushOptions(**meaning))
    refuses(session, other, errors.DivergentRetryError, f"applied as step 1 with other {name}")


def test_a_retry_may_ask_for_less_and_hears_what_was_measured_then():
    session, _ = machine.advance(opened(), push(seq=1, base=0))
    session, _ = machine.advance(session, events.Updated(RATE, (("grad_norm", 2.0),)))
    quiet = dataclasses.replace(push(seq=1, base=0), options=sessions.PushOptions(reply=sessions.ReplyContent.NONE))
    _, (reply,) = machine.advance(session, quiet)
    assert reply == effects.Reply(1, 1, True, RATE, (("grad_norm", 2.0),))


def test_what_a_push_changes_is_recorded_with_its_step_and_not_before():
    change = sessions.Change(0, (("sgd.step_size", 0.5),))
    applying, _ = machine.advance(opened(), push(seq=1, base=0))
    assert applying.changes == ()
    after, _ = machine.advance(applying, events.Updated(RATE, change=change))
    assert after.changes == (change,)


def test_a_refused_update_leaves_the_session_as_it_was():
    before = applied(push(seq=1, base=0))
    applying, _ = machine.advance(before, push(seq=2, base=1))
    refusal = errors.NonFiniteError("not finite")
    after, todo = machine.advance(applying, events.UpdateRefused(refusal))
    assert (after, todo) == (before, (effects.Fail(refusal),))


def test_a_skipped_push_counts_as_a_step_and_is_counted():
    session, _ = machine.advance(opened(), push(seq=1, base=0))
    session, _ = machine.advance(session, events.Updated(RATE, (("skipped", 1.0),), skipped=True))
    assert (session.step, session.skipped) == (1, 1)


def test_a_push_older_than_the_last_is_refused():
    session = applied(push(seq=1, base=0), push(seq=2, base=1))
    refuses(session, push(seq=1, base=0), errors.StalePushError, "push 1 of this worker is older")


def test_a_push_that_skips_one_is_refused():
    session = applied(push(seq=1, base=0))
    refuses(session, push(seq=3, base=1), errors.FuturePushError, "push 3 of this worker, expected 2")


def test_gradients_of_an_old_step_are_refused():
    session = applied(push(A, seq=1, base=0))
    refuses(session, push(B, seq=1, base=0), errors.StaleStepError, "gradients of step 0, but the session is at 1")


def test_gradients_of_a_future_step_are_refused():
    refuses(opened(), push(seq=1, base=1), errors.FutureStepError, "gradients of step 1, but the session is at 0")


@pytest.mark.parametrize("incarnation", [0, 2])
def test_another_incarnation_is_refused(incarnation: int):
    refuses(opened(), push(incarnation=incarnation), errors.IncarnationError, "its history was rewritten")


def test_a_refused_push_says_where_the_session_is():
    session = applied(push(A, seq=1, base=0), push(A, seq=2, base=1))
    for event in (push(A, seq=1), push(A, seq=4), push(B, base=0), push(B, base=9), push(A, seq=2, data=1)):
        with pytest.raises(errors.OutOfStepError) as caught:
            machine.advance(session, event)
        assert caught.value.step == 2


def test_an_unknown_worker_may_start_anywhere():
    session = applied(push(A, seq=41, base=0))
    assert session.workers[A].seq == 41
    session, todo = machine.advance(session, push(A, seq=42, base=1))
    assert todo == (effects.Apply(index=1, options=sessions.PLAIN),)


def test_a_forgotten_worker_cannot_apply_its_push_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "WORKERS_MAX", 2)
    session = applied(push(A, seq=1, base=0), push(B, seq=1, base=1), push(C, seq=1, base=2))
    assert list(session.workers) == [B, C]
    refuses(session, push(A, seq=1, base=0), errors.StaleStepError, "gradients of step 0")


def test_the_worker_that_has_been_quiet_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "WORKERS_MAX", 2)
    session = applied(push(A, seq=1, base=0), push(B, seq=1, base=1), push(A, seq=2, base=2), push(C, seq=1, base=3))
    assert list(session.workers) == [A, C]


def test_a_known_worker_pushes_out_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "WORKERS_MAX", 2)
    session = applied(push(A, seq=1, base=0), push(B, seq=1, base=1), push(B, seq=2, base=2))
    assert list(session.workers) == [A, B]


def test_an_update_that_fails_and_loses_nothing_may_be_tried_again():
    before, _ = machine.advance(opened(), push())
    session, todo = machine.advance(before, events.UpdateFailed("out of memory", state_lost=False))
    assert session == opened()
    (fail,) = todo
    assert isinstance(fail, effects.Fail)
    assert isinstance(fail.error, errors.InternalError)
    assert "changed nothing: out of memory" in str(fail.error)
    assert machine.advance(session, push())[1] == (effects.Apply(0, sessions.PLAIN),)


def test_an_update_that_loses_the_state_fails_the_session_for_everybody():
    session, _ = machine.advance(opened(), push())
    session, todo = machine.advance(session, events.UpdateFailed("device lost", state_lost=True))
    assert [type(effect) for effect in todo] == [effects.Fail, effects.Free]
    assert (session.phase, session.step, session.failure) == (machine.Phase.FAILED, 0, "device lost")
    for event in (push(), push(B, seq=5), changed(0.1)):
        refuses(session, event, errors.SessionFailedError, "device lost; delete it and create it anew")


def test_a_failed_session_can_be_deleted():
    session, _ = machine.advance(opened(), push())
    session, _ = machine.advance(session, events.UpdateFailed("device lost", state_lost=True))
    session, todo = machine.advance(session, events.Deleted())
    assert (session.phase, todo) == (machine.Phase.DELETED, (effects.Free(),))


def test_a_deleted_session_takes_nothing():
    session, todo = machine.advance(applied(push()), events.Deleted())
    assert todo == (effects.Free(),)
    for event in (push(), push(seq=2, base=1), changed(0.1), events.Deleted()):
        refuses(session, event, errors.SessionNotFoundError, "was deleted")


def test_a_change_is_kept_with_the_step_it_begins_at():
    session, todo = machine.advance(applied(push()), changed(0.5, 1))
    assert todo == ()
    session, _ = machine.advance(session, changed(0.25, 9))
    assert [change.from_step for change in session.changes] == [1, 9]
    refuses(session, changed(0.1, 0), errors.InvalidArgumentError, "from_step 0, but the next step is 1")


def test_changes_are_remembered_up_to_a_number():
    session = opened()
    for number in range(limits.HYPERPARAM_CHANGES_MAX + 3):
        session, _ = machine.advance(session, changed(float(number), 0))
    assert len(session.changes) == limits.HYPERPARAM_CHANGES_MAX
    assert session.changes[0].values == (("adam.step_size", 3.0),)


LOAD = "1" * 32


def test_a_load_begins_a_new_incarnation_in_which_every_worker_starts_anew():
    before = applied(push(A, seq=7, base=0), push(B, seq=1, base=1))
    session, todo = machine.advance(before, events.Loaded(1, LOAD, step=1))
    assert todo == (effects.Replace(),)
    assert (session.incarnation, session.step, session.workers) == (2, 1, {})
    refuses(session, push(A, seq=8, base=1), errors.IncarnationError, "its history was rewritten")
    _, todo = machine.advance(session, push(A, seq=1, base=1, incarnation=2))
    assert todo == (effects.Apply(index=1, options=sessions.PLAIN),)


def test_a_load_without_a_step_leaves_the_counts_as_they_are():
    before = dataclasses.replace(applied(push(seq=1, base=0), push(seq=2, base=1)), skipped=1)
    session, _ = machine.advance(before, events.Loaded(1, LOAD))
    assert (session.step, session.skipped) == (2, 1)


def test_more_pushes_are_never_skipped_than_there_were():
    before = dataclasses.replace(applied(push(seq=1, base=0), push(seq=2, base=1)), skipped=2)
    session, _ = machine.advance(before, events.Loaded(1, LOAD, step=1))
    assert (session.step, session.skipped) == (1, 1)
    refuses(before, events.Loaded(1, LOAD, step=1, skipped=2), errors.InvalidArgumentError, "skipped 2, expected 0 to")
    refuses(before, events.Loaded(1, LOAD, step=1, skipped=-1), errors.InvalidArgumentError, "skipped -1")


def test_the_same_load_again_is_answered_and_loads_nothing():
    session, _ = machine.advance(applied(push()), events.Loaded(1, LOAD, step=0))
    session, _ = machine.advance(session, push(A, seq=1, base=0, incarnation=2))
    session, _ = machine.advance(session, events.Updated(RATE))
    after, todo = machine.advance(session, events.Loaded(1, LOAD, step=0))
    assert (after, todo) == (session, ())


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"digest": digest(2)}, "bytes"),
        ({"names": ("params/b",)}, "arrays"),
        ({"names": ("params/a", "params/b")}, "arrays"),
        ({"step": 1}, "step"),
        ({"step": None}, "step"),
    ],
    ids=str,
)
def test_the_key_of_a_load_with_another_load_is_refused(other: dict[str, Any], what: str):
    load = events.Loaded(1, LOAD, step=0, names=("params/a",), digest=digest(1))
    session, _ = machine.advance(applied(push()), load)
    assert machine.advance(session, load) == (session, ())
    admission.admit_load(session, dataclasses.replace(load, digest=None))  # its bytes are still to come
    refuses(session, dataclasses.replace(load, **other), errors.DivergentRetryError, f"a load of other {what}")


def test_where_a_skipped_update_is_the_end_of_several_pushes_no_more_are_skipped_than_that():
    refuses(
        opened(),
        events.Loaded(1, LOAD, step=11, skipped=3, forfeits=4),
        errors.InvalidArgumentError,
        "skipped 3, expected 0 to 2",
    )
    before = dataclasses.replace(opened(), step=12, skipped=3)
    session, _ = machine.advance(before, events.Loaded(1, LOAD, step=7, forfeits=4))
    assert (session.step, session.skipped) == (7, 1)


def test_there_is_no_step_after_the_last():
    session = dataclasses.replace(opened(), step=limits.STEP_MAX - 1)
    session, _ = machine.advance(session, push(base=limits.STEP_MAX - 1))
    session, _ = machine.advance(session, events.Updated(RATE))
    assert session.step == limits.STEP_MAX
    refuses(session, push(seq=2, base=limits.STEP_MAX), errors.LimitError, "is at step 2147483647, the last there is")
    assert machine.advance(session, push(base=limits.STEP_MAX - 1))[1][0].duplicate
    assert machine.advance(session, events.Loaded(1, LOAD, step=0))[0].step == 0


def test_a_load_that_knows_another_incarnation_is_refused():
    session, _ = machine.advance(opened(), events.Loaded(1, LOAD))
    for incarnation in (0, 1, 3):
        refuses(session, events.Loaded(incarnation, "2" * 32), errors.IncarnationError, f"incarnation {incarnation},")


def test_a_load_to_a_step_that_no_update_can_be_of_is_refused():
    refuses(opened(), events.Loaded(1, LOAD, step=2**31), errors.InvalidArgumentError, "step 2147483648, expected 0 to")
    assert machine.advance(opened(), events.Loaded(1, LOAD, step=2**31 - 1))[0].step == 2**31 - 1


def test_a_session_without_parameters_takes_no_load():
    session, _ = machine.advance(opened(), push())
    failed, _ = machine.advance(session, events.UpdateFailed("device lost", state_lost=True))
    refuses(failed, events.Loaded(1, LOAD), errors.SessionFailedError)
    deleted, _ = machine.advance(opened(), events.Deleted())
    refuses(deleted, events.Loaded(1, LOAD), errors.SessionNotFoundError)


@pytest.mark.parametrize(("to", "steps"), [(0, [0, 0, 4]), (1, [0, 1, 4]), (3, [0, 2, 4]), (9, [0, 2, 4])])
def test_a_change_in_effect_stays_so_and_one_to_come_still_comes(to: int, steps: list[int]):
    session = opened()
    for step, at in enumerate((0, 2, 4)):
        session, _ = machine.advance(session, changed(float(step), at))
    session = dataclasses.replace(session, step=3)
    session, _ = machine.advance(session, events.Loaded(1, LOAD, step=to))
    assert [change.from_step for change in session.changes] == steps


def test_an_extension_must_know_where_the_session_is():
    session = applied(push())
    admission.admit_extension(session, sessions.Extension(ID, 1, 1))
    for known, kind in (
        (sessions.Extension(ID, 1, 0), errors.StaleStepError),
        (sessions.Extension(ID, 1, 2), errors.FutureStepError),
        (sessions.Extension(ID, 2, 1), errors.IncarnationError),
    ):
        with pytest.raises(kind) as caught:
            admission.admit_extension(session, known)
        assert caught.value.step == 1


@pytest.mark.parametrize("event", [events.Updated(RATE), events.UpdateFailed("x", state_lost=False)])
def test_an_update_that_did_not_begin_cannot_end(event: events.Event):
    with pytest.raises(AssertionError, match="did not begin"):
        machine.advance(opened(), event)


def test_admission_refuses_what_the_push_would_and_lets_retries_pass():
    session = applied(push(A, seq=1, base=0), push(A, seq=2, base=1))
    admission.admit(session, push(A, seq=3, base=2).key)
    admission.admit(session, push(A, seq=2, base=1).key)
    admission.admit(session, push(A, seq=2, base=1, data=99).key)  # its bytes are not known yet
    for event, kind in (
        (push(A, seq=1), errors.StalePushError),
        (push(A, seq=4, base=2), errors.FuturePushError),
        (push(B, base=1), errors.StaleStepError),
        (push(B, base=3), errors.FutureStepError),
        (push(incarnation=2), errors.IncarnationError),
    ):
        with pytest.raises(kind):
            admission.admit(session, event.key)


# ---------------------------------------------------------------------------------------------------- random histories

WORKERS_MAX = 3  # so that workers are forgotten all the time
SEQ = st.integers(1, 6) | st.integers(1, 2**64 - 1)
PUSH = st.builds(
    push,
    st.sampled_from([A, B, C, "d" * 32, "e" * 32]),
    seq=SEQ,
    base=st.integers(0, 12),
    data=st.integers(0, 1),
    incarnation=st.sampled_from([1, 1, 1, 1, 1, 1, 1, 2]),
)
# A push that fits, as seen from the model, so that histories get somewhere; or the last one again.
FITTING = st.tuples(st.sampled_from(["fits", "again"]), st.sampled_from([A, B, C, "d" * 32]), st.integers(0, 1))
CHANGED = st.builds(changed, st.floats(0, 1), st.integers(0, 20))
FAILURE = st.sampled_from([None] * 12 + [False, False, True])
EVENT = st.one_of(PUSH, FITTING, FITTING, FITTING, CHANGED)


class Model:
    """What was applied, as a list; everything else follows from it."""

    def __init__(self) -> None:
        self.applied: list[tuple[str, int, sessions.Digest]] = []
        self.changes: list[sessions.Change] = []
        self.end = ""  # failed or deleted

    def remembered(self) -> dict[str, tuple[int, sessions.Digest, int]]:
        """The last push of those workers that pushed most recently."""
        last: dict[str, tuple[int, sessions.Digest, int]] = {}
        for step, (worker, seq, taken) in reversed(list(enumerate(self.applied, 1))):
            if worker not in last and len(last) < WORKERS_MAX:
                last[worker] = (seq, taken, step)
        return last

    def verdict(self, event: events.Pushed) -> type[errors.OptwireError] | int | None:
        """The error, the step of which this is a retry, or None where it is applied."""
        key = event.key
        if self.end:
            return {"failed": errors.SessionFailedError, "deleted": errors.SessionNotFoundError}[self.end]
        if key.incarnation != 1:
            return errors.IncarnationError
        if key.worker in (last := self.remembered()):
            seq, taken, step = last[key.worker]
            if key.seq == seq:
                return step if taken == event.digest else errors.DivergentRetryError
            if key.seq != seq + 1:
                return errors.StalePushError if key.seq < seq else errors.FuturePushError
        if key.base_step != len(self.applied):
            return errors.StaleStepError if key.base_step < len(self.applied) else errors.FutureStepError
        return None

    def concrete(self, wish: tuple[str, str, int]) -> events.Pushed:
        what, worker, data = wish
        seq, last, step = self.remembered().get(worker, (0, digest(data), 0))
        if what == "again" and seq:
            return dataclasses.replace(push(worker, seq=seq, base=step - 1), digest=last)
        return push(worker, seq=seq + 1, base=len(self.applied), data=data)


@settings(max_examples=400, deadline=None)
@given(history=st.lists(st.tuples(EVENT, FAILURE), min_size=1, max_size=60), deleted_at=st.integers(0, 200))
def test_every_history_is_what_a_simpler_model_says(history: list[tuple[Any, bool | None]], deleted_at: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "WORKERS_MAX", WORKERS_MAX)
        run(history, deleted_at)


def run(history: list[tuple[Any, bool | None]], deleted_at: int) -> None:
    model, session = Model(), opened()
    for number, (wish, failure) in enumerate(history):
        event = model.concrete(wish) if isinstance(wish, tuple) else wish
        if number == deleted_at and not model.end:
            session, todo = machine.advance(session, events.Deleted())
            assert todo == (effects.Free(),)
            model.end = "deleted"
        elif isinstance(event, events.Changed):
            session = change(model, session, event)
        else:
            session = pushed(model, session, event, failure)
        assert session.step == len(model.applied), "steps are contiguous"
        assert {
            worker: (now.seq, now.digest, now.step) for worker, now in session.workers.items()
        } == model.remembered()
        assert (session.pending is None) == (session.phase is not machine.Phase.APPLYING)


def change(model: Model, session: machine.Session, event: events.Changed) -> machine.Session:
    if model.end:
        with pytest.raises((errors.SessionFailedError, errors.SessionNotFoundError)):
            machine.advance(session, event)
        return session
    if event.change.from_step < len(model.applied):
        refuses(session, event, errors.InvalidArgumentError, "but the next step is")
        return session
    model.changes.append(event.change)
    session, todo = machine.advance(session, event)
    assert todo == ()
    assert list(session.changes) == model.changes[-limits.HYPERPARAM_CHANGES_MAX :]
    return session


def pushed(model: Model, session: machine.Session, event: events.Pushed, failure: bool | None) -> machine.Session:
    verdict = model.verdict(event)
    if isinstance(verdict, type):
        refuses(session, event, verdict)
        return session
    if verdict is not None:
        after, todo = machine.advance(session, event)
        assert after is session, "a duplicate changed the session"
        (reply,) = todo
        assert isinstance(reply, effects.Reply)
        assert (reply.applied_step, reply.seq, reply.duplicate) == (verdict, event.key.seq, True)
        return session
    applying, todo = machine.advance(session, event)
    assert todo == (effects.Apply(len(model.applied), sessions.PLAIN),)
    if failure is not None:
        after, todo = machine.advance(applying, events.UpdateFailed("broken", failure))
        if not failure:
            assert (after, [type(effect) for effect in todo]) == (session, [effects.Fail])
            return after
        assert [type(effect) for effect in todo] == [effects.Fail, effects.Free]
        model.end = "failed"
        return after
    model.applied.append((event.key.worker, event.key.seq, event.digest))
    after, todo = machine.advance(applying, events.Updated(RATE))
    assert todo == (effects.Reply(event.key.seq, len(model.applied), False, RATE),)
    return after
