"""What pushes are answered with, on the device's thread: the calls that made them, and those that waited."""

from __future__ import annotations

from optwire_proto import errors, sessions
from optwire_server.engine import engine as engines
from optwire_server.live import LiveSession, Params, Reply
from optwire_server.session import effects


def reply(engine: engines.Engine, live: LiveSession, options: sessions.PushOptions, effect: effects.Reply) -> Reply:
    """The reply to a push with these options.

    Raises:
      StaleStepError: a retry asks for updates that are not kept any more.
    """
    arrays = _arrays(engine, live, options.reply, effect.applied_step)
    return Reply(live.ack(effect, sum(leaf.nbytes for leaf in arrays)), arrays)


def tell(engine: engines.Engine, live: LiveSession, answer: effects.Answer) -> None:
    """Gives all who wait for what becomes of a worker's push their answer, and its payload back."""
    for waiting in live.room.release(answer.worker):
        match answer.outcome:
            case effects.Reply():
                try:
                    waiting.outcome.set_result(reply(engine, live, waiting.options, answer.outcome))
                except Exception as exc:  # noqa: BLE001  this call's own; the others have theirs
                    waiting.outcome.set_exception(exc)
            case effects.Fail():
                waiting.outcome.set_exception(answer.outcome.error)


def _arrays(engine: engines.Engine, live: LiveSession, content: sessions.ReplyContent, step: int) -> Params:
    """The arrays that a reply carries to the push that became ``step``; in a list of its own, as sending empties it."""
    if content is sessions.ReplyContent.NONE:
        return []
    if content is sessions.ReplyContent.PARAMS:
        return engine.params(live.held)
    if live.added is None or live.added[0] != step:
        pushes = live.machine.workers.values()
        was_kept = any(push.step == step and push.options.reply is sessions.ReplyContent.UPDATES for push in pushes)
        what, expected = "is not kept any more", "a retry before the next push"
        if not was_kept:
            what, expected = "was not kept, as no push asked for it then", "what the push asked for"
        raise errors.StaleStepError(
            f"session {live.machine.name!r}: what step {step} added to the parameters {what}; read the parameters",
            subject="reply",
            expected=expected,
            got=f"a retry at step {live.machine.step}",
            step=live.machine.step,
        )
    return list(live.added[1])
