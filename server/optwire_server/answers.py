"""What pushes are answered with, in the session's turn: the calls that made them, and those that waited.

Only ``departure`` and ``encoded`` are for the threads of calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable

import numpy as np

from optwire_proto import aggregations, errors, limits, sessions, trees
from optwire_server import row_pushes, segments
from optwire_server.engine import departure as departures
from optwire_server.engine import device, landing
from optwire_server.engine import engine as engines
from optwire_server.live import LiveSession, Params, Push, Reply
from optwire_server.session import effects


def reply(
    engine: engines.Engine,
    live: LiveSession,
    options: sessions.PushOptions,
    effect: effects.Reply,
    lent: landing.Landing,
    claim: segments.Claim | None = None,
    *,
    is_written: bool = False,
) -> device.Work[Reply]:
    """The reply to a push with these options, yielding between blocks that are written.

    Args:
      engine: holds the session's arrays.
      live: the session.
      options: what the push asked for.
      effect: what is to be said.
      lent: where the gradients came to; of rows it says which.
      claim: where the arrays of the reply go, within its use; None: they are part of the reply.
      is_written: whether the parameters are there already, or on their way.

    Raises:
      StaleStepError: a retry asks for updates that are not kept any more.
    """
    content = options.reply
    if claim is not None and content is sessions.ReplyContent.PRESENT:
        content = sessions.ReplyContent.PARAMS  # what lies in shared memory is as whole as what the update writes
    if (is_written or claim is not None) and content is sessions.ReplyContent.PARAMS:
        if claim is not None and not is_written:
            yield from engine.write_params(live.held, claim.params)
        return Reply(live.ack(effect, live.tree.payload_bytes), [])
    if options.rows and content.brings_params:
        arrays = yield from row_pushes.params(engine, live, lent)
    else:
        arrays = yield from _arrays(engine, live, options, effect.applied_step)
    if claim is not None:
        ack = live.ack(effect, sum(leaf.nbytes for leaf in arrays))
        if arrays:
            _spread(arrays, landing.Landing.filled(claim.params, live.tree, live.held.layout).arrays())
        return Reply(ack, [])
    return Reply(live.ack(effect, sum(leaf.nbytes for leaf in arrays)), arrays)


def tell(engine: engines.Engine, live: LiveSession, answer: effects.Answer) -> device.Work[None]:
    """Gives all who wait for what becomes of a worker's push their answer, and its payload back."""
    live.brought.pop(answer.worker, None)
    for waiting in live.room.release(answer.worker):
        match answer.outcome:
            case effects.Reply():
                try:
                    with waiting.claim.using() if waiting.claim else contextlib.nullcontext():
                        answered = yield from reply(
                            engine, live, waiting.options, answer.outcome, waiting.landing, waiting.claim
                        )
                    waiting.outcome.set_result(answered)
                except Exception as exc:  # noqa: BLE001  this call's own; the others have theirs
                    waiting.outcome.set_exception(exc)
            case effects.Fail():
                waiting.outcome.set_exception(answer.outcome.error)


def departure(live: LiveSession, options: sessions.PushOptions) -> departures.Departure | None:
    """What the parameters of an update leave by before it is over; None where none can, or nothing is gained by it.

    A push that may have to wait for others is answered with all who wait; a replica takes whole parameters.
    """
    aggregation = live.machine.aggregation
    is_alone = not aggregation.waits and aggregation.mode is not aggregations.Mode.BUFFERED
    is_possible = is_alone and not live.params_codec.loses
    is_long = live.tree.payload_bytes > limits.CHUNK_BYTES and live.held.is_in_blocks
    is_wanted = options.reply is sessions.ReplyContent.PARAMS and not options.rows
    return departures.Departure() if is_possible and is_long and is_wanted else None


def encoded(push: Push, reply: Reply) -> Reply:
    """A reply as it travels; on the thread of the call, which waits for others of the session that are at it."""
    live, how = push.session, push.session.params_codec
    if push.claim is not None or not push.options.reply.brings_params:
        return reply
    size = sum(map(how.encoded_bytes, _tree(push).leaves))
    if how.casts:
        return Reply(dataclasses.replace(reply.ack, payload_bytes=size, params_codec=how.kind), reply.params, how)
    if live.replica is None:
        return reply
    answer = live.replica.answer(
        reply.params,
        absent=_left_out(push.options),
        incarnation=reply.ack.incarnation,
        step=reply.ack.step,
        view_step=push.options.view_step,
        room=lambda: _room(push),
    )
    ack = dataclasses.replace(reply.ack, step=answer.step)
    if answer.is_difference:
        ack = dataclasses.replace(ack, payload_bytes=size, params_codec=how.kind)
    return Reply(ack, answer.arrays)


def _room(push: Push) -> Params:
    """Arrays for parameters: in the landing, which is lent until the reply is out; its gradients have been used."""
    layout = push.session.held.layout
    memory = push.landing.memory if push.landing.is_open else np.empty(layout.nbytes, np.uint8)
    absent = _left_out(push.options)
    return list(landing.Landing.filled(memory, _tree(push), layout.without(absent) if absent else layout).arrays())


def _tree(push: Push) -> trees.TreeSpec:
    """The leaves whose parameters the reply to a push carries."""
    tree, absent = push.session.tree, _left_out(push.options)
    return tree.without(absent) if absent else tree


def _left_out(options: sessions.PushOptions) -> tuple[int, ...]:
    """Positions of the leaves whose parameters a reply does not carry."""
    return options.absent if options.reply is sessions.ReplyContent.PRESENT else ()


def _without(segments: Iterable[np.ndarray], tree: trees.TreeSpec, absent: tuple[int, ...]) -> Params:
    """Of segments of a whole payload, those of the leaves that are not absent."""
    gone, kept = frozenset(absent), []
    rest = np.empty(0, np.uint8)
    source = iter(segments)
    for index, leaf in enumerate(tree.leaves):
        left = leaf.elements
        while left:
            if not rest.size:
                rest = next(source)
            count = min(rest.size, left)
            if index not in gone:
                kept.append(rest[:count])
            rest, left = rest[count:], left - count
    return kept


def _spread(pieces: Iterable[np.ndarray], arrays: Iterable[np.ndarray]) -> None:
    """Copies pieces over arrays; each of both is the same payload, cut elsewhere."""
    rest = np.empty(0, np.uint8)
    source = iter(pieces)
    for array in arrays:
        target = array.reshape(-1).view(np.uint8)
        while target.size:
            if not rest.size:
                rest = next(source).reshape(-1).view(np.uint8)
            count = min(rest.size, target.size)
            target[:count] = rest[:count]
            rest, target = rest[count:], target[count:]


def _arrays(engine: engines.Engine, live: LiveSession, options: sessions.PushOptions, step: int) -> device.Work[Params]:
    """The arrays that a reply carries to the push that became ``step``; in a list of its own, as sending empties it."""
    if options.reply is sessions.ReplyContent.NONE:
        return []
    if options.reply.brings_params:
        segments = yield from engine.params(live.held)
        return _without(segments, live.tree, options.absent) if _left_out(options) else segments
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
