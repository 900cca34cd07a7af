"""The runner: tells the machine of a session what happened, and does what it says must follow, in order.

Everything here is done in the session's turn: one event at a time, with all that follows from it.
"""

from __future__ import annotations

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
    failure: errors.OptwireError | None = None
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

    def pushed(self, push: Push, digest: sessions.Digest) -> device.Work[Reply | Waiting]:
        """Applies a push, keeps it until its step is made, or answers it from state; yields between blocks."""
        live = push.session
        event = events.Pushed(push.key, digest, push.options, time.monotonic())
        after, todo = machine.advance(live.machine, event)
        for effect in todo:
            if isinstance(effect, effects.Apply) and updates.is_of(effect, push):
                # A push that is refused here was never made: others were changed, or have grown, while it was coming.
                updates.check_ready(live, effect, push)
                self.check_growth(live, effect.options)
        live.machine = after
        outcome = yield from self._done(live, todo, push)
        if outcome.failure is not None:
            raise outcome.failure
        assert outcome.answer is not None, "a push was neither answered nor refused"
        return outcome.answer

    def told(self, live: LiveSession, event: events.Event) -> device.Work[None]:
        """Tells a session of what is no push; raises what the machine does, and nothing has changed then."""
        yield from self._done(live, self._advance(live, event))

    def read(self, live: LiveSession, worker: str) -> device.Work[None]:
        """Tells a session that a worker is given its parameters."""
        yield from compensation.keep(self._engine, live, worker)
        yield from self.told(live, events.Read(worker))

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
        while todo:
            effect, *todo = todo
            match effect:
                case effects.Apply():
                    mine = push if push and updates.is_of(effect, push) else None
                    outcome.is_written |= mine is not None
                    todo += self._advance(live, (yield from self._update(live, effect, mine)))
                case effects.Answer():
                    yield from answers.tell(self._engine, live, effect)
                    if isinstance(effect.outcome, effects.Reply):
                        content = live.machine.workers[effect.worker].options.reply
                        yield from compensation.keep(self._engine, live, effect.worker, content)
                case effects.Free():
                    live.held.state, live.total = None, None
                case _:
                    assert push is not None, f"{type(effect).__name__} without a push"
                    todo += yield from self._answered(push, effect, outcome)
        self._clock.watch(live, machine.next_deadline(live.machine))
        return outcome

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
                outcome.answer = yield from answers.reply(
                    self._engine, live, push.options, effect, push.landing, push.claim, is_written=is_written
                )
                yield from compensation.keep(self._engine, live, push.key.worker, push.options.reply)
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
        def now() -> device.Work[None]:
            yield from self.told(live, events.Ticked(time.monotonic()))

        self._engine.work(now(), live.held)
