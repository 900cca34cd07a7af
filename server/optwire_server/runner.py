"""The runner: tells the machine of a session what happened, and does what it says must follow, in order.

Everything here is done in the session's turn: one event at a time, with all that follows from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence

from optwire_proto import errors, sessions
from optwire_server import answers, clock, compensation, updates
from optwire_server.engine import device
from optwire_server.engine import engine as engines
from optwire_server.live import LiveSession, Push, Reply
from optwire_server.session import effects, events, machine
from optwire_server.waiting import Waiting


@dataclasses.dataclass(slots=True)
class _Outcome:
    """What became of the push just made, if there is one."""

    answer: Reply | Waiting | None = None
    failure: Exception | None = None
    is_written: bool = False  # whether its update has given its parameters away


class Runner:
    """Advances sessions.

    Args:
      engine: holds their arrays.
      room: asked for so many bytes of state more.
    """

    def __init__(self, engine: engines.Engine, room: engines.Room) -> None:
        self._engine = engine
        self._room = room
        self._clock = clock.Clock(self._tick)

    def close(self) -> None:
        """Takes no notice of time any more."""
        self._clock.close()

    def pushed(self, push: Push, digest: sessions.Digest, now_s: float) -> device.Work[Reply | Waiting]:
        """Applies a push, keeps it until its step is made, or answers it from state; yields between blocks.

        ``now_s`` is the time at which it began to wait for its turn, as it is in all events.
        """
        live = push.session
        yield from self._hear(live)
        after, todo = machine.advance(live.machine, events.Pushed(push.key, digest, push.options, now_s))
        for effect in todo:
            # A push that is refused here was never made.
            if isinstance(effect, effects.Add) or (isinstance(effect, effects.Apply) and effect.completes_sum):
                yield from updates.check_finite(live, push)
            if isinstance(effect, effects.Apply) and updates.is_of(after, push):
                updates.check_ready(live, effect, push)  # others were changed, or have grown, while it was coming
                self.check_growth(live, effect.options)
        live.machine = after
        outcome = yield from self._done(live, todo, push)
        if outcome.failure is not None:
            raise outcome.failure
        assert outcome.answer is not None, "a push was neither answered nor refused"
        return outcome.answer

    def told(self, live: LiveSession, event: events.Event) -> device.Work[None]:
        """Tells a session of what is no push; raises what the machine does, and nothing has changed then."""
        yield from self._hear(live)
        yield from self._done(live, self._advance(live, event))

    def _hear(self, live: LiveSession) -> device.Work[None]:
        """Tells a session of the workers that were heard of meanwhile; those that were replaced since are no matter."""
        for beat in live.heard.take():
            with contextlib.suppress(errors.OptwireError):
                yield from self._done(live, self._advance(live, beat))

    def read(self, live: LiveSession, read: events.Read, *, is_all: bool) -> device.Work[None]:
        """Tells a session that a worker is given its parameters, all of them or some.

        Raises:
          LimitError: no memory to keep them in, where they are kept for the worker.
        """
        member = live.machine.members.get(read.worker)
        if is_all and member is not None and member.epoch == read.epoch:
            self.check_growth(live, sessions.PLAIN, read.worker)
            yield from compensation.keep(self._engine, live, read.worker)
        yield from self.told(live, read)

    def check_growth(self, live: LiveSession, options: sessions.PushOptions, worker: str = "") -> None:
        """Raises LimitError where there is no memory for what a session holds after a push beyond what it holds now."""
        grown = self._engine.growth(live.held, options.absent)
        kept = compensation.growth(live, worker) if worker else 0
        self._room(grown + updates.kept_bytes(live, options) + kept)

    def _done(
        self, live: LiveSession, todo: Sequence[effects.Effect], push: Push | None = None
    ) -> device.Work[_Outcome]:
        """Does what must follow, and what follows from that."""
        outcome = _Outcome()
        try:
            while todo:
                effect, *todo = todo
                todo += yield from self._one(live, effect, push, outcome)
        finally:
            self._clock.watch(live, machine.next_deadline(live.machine))
        return outcome

    def _one(
        self, live: LiveSession, effect: effects.Effect, push: Push | None, outcome: _Outcome
    ) -> device.Work[Sequence[effects.Effect]]:
        """Does one thing that must follow; gives what follows from it."""
        match effect:
            case effects.Apply():
                mine = push if push and updates.is_of(live.machine, push) else None
                outcome.is_written |= mine is not None
                return self._advance(live, (yield from self._update(live, effect, mine)))
            case effects.Answer():
                yield from answers.tell(self._engine, live, effect)
                if isinstance(effect.outcome, effects.Reply):
                    content = live.machine.workers[effect.worker].options.reply
                    yield from compensation.keep(self._engine, live, effect.worker, content)
            case effects.Free():
                live.held.state = live.total = live.added = None
                live.given.clear()
            case _:
                assert push is not None, f"{type(effect).__name__} without a push"
                return (yield from self._answered(push, effect, outcome))
        return ()

    def _answered(self, push: Push, effect: effects.Effect, outcome: _Outcome) -> device.Work[Sequence[effects.Effect]]:
        """Does what bears on the push just made; gives what follows from it."""
        live = push.session
        match effect:
            case effects.Hold():
                outcome.answer = live.room.hold(push.key.worker, push.landing, push.options, push.claim)
                live.brought[push.key.worker] = push.change
            case effects.Add():
                return self._advance(live, (yield from updates.add(live, push, effect)))
            case effects.Reply():
                has_departed = push.departure is not None and push.departure.has_begun
                is_written = has_departed or (push.claim is not None and outcome.is_written)
                try:
                    outcome.answer = yield from answers.reply(
                        self._engine, live, push.options, effect, push.landing, push.claim, is_written=is_written
                    )
                    yield from compensation.keep(self._engine, live, push.key.worker, push.options.reply)
                except Exception as exc:  # noqa: BLE001  this call's own; what else is to be done, must be
                    outcome.failure = exc
            case effects.Fail():
                outcome.failure = effect.error
        return ()

    def _update(self, live: LiveSession, apply: effects.Apply, push: Push | None) -> device.Work[events.Event]:
        """Runs an update. Nothing is lost where it cannot be run: those whose pushes it is of push again."""
        try:
            updates.check_ready(live, apply, push)
            self.check_growth(live, apply.options)
        except errors.OptwireError as exc:
            return events.UpdateRefused(exc)
        return (yield from updates.run(self._engine, live, apply, push))

    def _advance(self, live: LiveSession, event: events.Event) -> Sequence[effects.Effect]:
        live.machine, todo = machine.advance(live.machine, event)
        return todo

    def _tick(self, live: LiveSession) -> None:
        # The time before the turn: what comes before it in the queue, is before it in time.
        self._engine.work(self.told(live, events.Ticked(time.monotonic())), live.held)
