"""One update of a live session: which program and operands a push runs with, and what came of it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from optwire_proto import errors, sessions
from optwire_server import plans
from optwire_server.engine import device, landing, mean, program
from optwire_server.engine import engine as engines
from optwire_server.live import LiveSession, Push
from optwire_server.session import effects, events

_log = logging.getLogger("optwire.updates")


def check_options(live: LiveSession, options: sessions.PushOptions) -> None:
    """Raises InvalidArgumentError unless a push brings along exactly what the optimizer needs and can do without."""
    _check_extras(live, options)
    if options.codec not in (None, live.grads_codec.kind):
        raise errors.UnsupportedError(
            f"session {live.machine.name!r}: a push with codec {options.codec.name.lower()}, expected "
            f"{live.grads_codec}, as the session says",
            subject="codec",
            expected=str(live.grads_codec),
            got=options.codec.name.lower(),
        )
    leaves = live.tree.leaves
    if not options.absent:
        return
    beyond = next((position for position in options.absent if position >= len(leaves)), None)
    if beyond is not None:
        raise errors.InvalidArgumentError(
            f"absent_leaves: position {beyond}, expected positions below {len(leaves)}, the number of leaves",
            subject="absent_leaves",
            expected=f"positions below {len(leaves)}",
            got=str(beyond),
        )
    if len(options.absent) == len(leaves):
        raise errors.InvalidArgumentError(
            f"absent_leaves: all {len(leaves)} leaves, expected a gradient for one of them at least",
            subject="absent_leaves",
            expected=f"fewer than {len(leaves)} positions",
            got=f"{len(options.absent)} positions",
        )
    if not live.plan.program.skippable:
        name = leaves[options.absent[0]].name
        raise errors.InvalidArgumentError(
            f"grads[{name!r}] is absent, but the optimizer of session {live.machine.name!r} needs every gradient; put "
            "per_leaf(...) around the part that is to leave such leaves alone",
            subject=name,
            expected="a gradient for every leaf, or an optimizer in per_leaf",
            got="none",
        )


def _check_extras(live: LiveSession, options: sessions.PushOptions) -> None:
    needed, given = live.plan.program.extras, tuple(sorted(name for name, _ in options.extras))
    if given != needed:
        expected = f"exactly {', '.join(needed)}" if needed else "nothing beside the gradients"
        missing = [name for name in needed if name not in given]
        raise errors.InvalidArgumentError(
            f"session {live.machine.name!r}: its optimizer needs {expected}, but the push brings "
            f"{', '.join(given)[:200] or 'nothing'}" + (f"; step(grads, {missing[0]}=...)" if missing else ""),
            subject="extras",
            expected=expected,
            got=", ".join(given)[:200],
        )


def kept_bytes(live: LiveSession, options: sessions.PushOptions) -> int:
    """Bytes of memory that a session takes more for what its update adds, which is kept for a retry of the push."""
    is_kept = options.reply is sessions.ReplyContent.UPDATES
    return live.tree.payload_bytes if is_kept and live.added is None else 0


def prepare(live: LiveSession, options: sessions.PushOptions) -> None:
    """Compiles the variants of the program that a push with these options may run; on the calling thread."""
    closing = (True,) if live.plan.program.every == 1 else (True, False)
    own = [_variant(options, closing=closes) for closes in closing]
    for variant in own:
        live.prepare(variant)
    if live.machine.aggregation.workers > 1:
        # Others of its step may ask for something else; whoever is second to come here sees both.
        for variant, other in itertools.product(own, live.variants):
            live.prepare(
                variant._replace(
                    telemetry=variant.telemetry or other.telemetry, updates=variant.updates or other.updates
                )
            )


def check_ready(push: Push, todo: Sequence[effects.Effect]) -> None:
    """Raises UnavailableError where an update that is to be done for a push is not compiled; in the session's turn.

    Plans change while pushes are on their way; the push made again compiles what is missing.
    """
    live = push.session
    for apply in todo:
        if not isinstance(apply, effects.Apply):
            continue
        plan = _plan(push, apply)
        if not plan.program.has(_variant(apply.options, closing=_closes(plan, live, apply))):
            raise errors.UnavailableError(
                f"session {live.machine.name!r}: its hyperparameters were changed while this push was coming, and the "
                "update that it needs is not compiled yet"
            )


def _plan(push: Push, apply: effects.Apply) -> plans.Plan:
    return plans.at(push.change.plans if push.change else push.session.plans, apply.index)


def _closes(plan: plans.Plan, live: LiveSession, apply: effects.Apply) -> bool:
    return plan.gathered(apply.index, live.machine.skipped) == plan.program.every - 1


def _variant(options: sessions.PushOptions, *, closing: bool) -> program.Variant:
    return program.Variant(
        closing=closing,
        scaled=options.grad_scale != 1.0,
        telemetry=options.telemetry,
        absent=bool(options.absent),
        updates=options.reply is sessions.ReplyContent.UPDATES,
    )


def run(engine: engines.Engine, push: Push, apply: effects.Apply) -> device.Work[events.Event]:
    """Runs the update that a push asks for, in the session's turn; says how it ended, whatever happens.

    What the push changes of the hyperparameters stays changed if the update is applied.
    """
    live = push.session
    plan = _plan(push, apply)
    live.added = None
    try:
        lent = yield from _gathered(push, apply)
        rate = plan.learning_rate(apply.index, live.machine.skipped)
        closing = _closes(plan, live, apply)
        live.held.program = plan.program
        operands = _operands(plan, apply, len(live.tree.leaves))
        variant = _variant(apply.options, closing=closing)
        out = push.claim.params if push.claim and push.options.reply is sessions.ReplyContent.PARAMS else push.departure
        notes, added = yield from engine.update(live.held, variant, operands, lent, out)
    except Exception as exc:  # noqa: BLE001  whatever it was, the machine must hear how the update ended
        _log.exception("session %s: update of step %d failed", live.machine.name, apply.index)
        state_lost = isinstance(exc, engines.UpdateError) and exc.state_lost
        return events.UpdateFailed(str(exc), state_lost)
    skipped = notes.get("finite") == 0.0
    if skipped and plan.program.rejects:
        return events.UpdateRefused((yield from _not_finite(live, lent, apply.options.absent)))
    if push.change:
        live.plans = push.change.plans
    live.added = (apply.index + 1, added) if added else None
    change = push.change.change if push.change else None
    return events.Updated(rate, _metrics(notes, apply, rate, skipped=skipped), skipped, change)


def _gathered(push: Push, apply: effects.Apply) -> device.Work[landing.Landing]:
    """What the update takes: the gradients of a push, or the mean of several, in the place of the first of them."""
    live = push.session
    lent = [push.landing if worker == push.key.worker else live.room.kept(worker) for worker in apply.workers]
    if lent:
        yield from mean.into_first([each.arrays() for each in lent])
    return (lent or [push.landing])[0]


def _operands(plan: plans.Plan, apply: effects.Apply, leaves: int) -> program.Operands:
    scale = apply.options.grad_scale
    extras = {program.OPTAX_EXTRAS[name]: value for name, value in apply.options.extras}
    present = None
    if apply.options.absent:
        gone = frozenset(apply.options.absent)
        present = tuple(index not in gone for index in range(leaves))
    return program.Operands(plan.rates, apply.index, scale if scale != 1.0 else None, extras, present)


def _metrics(
    notes: Mapping[str, float], apply: effects.Apply, rate: float, *, skipped: bool
) -> tuple[tuple[str, float], ...]:
    metrics = {name: value for name, value in notes.items() if name != "finite"}
    if apply.options.telemetry:
        metrics |= {"learning_rate": rate, "step": float(apply.index + 1)}
    if skipped or (apply.options.telemetry and "finite" in notes):
        metrics["skipped"] = float(skipped)
    return tuple(sorted(metrics.items()))


def _not_finite(live: LiveSession, lent: landing.Landing, absent: Sequence[int]) -> device.Work[errors.NonFiniteError]:
    """The refusal of a push, with the name of the first leaf at fault; yields between leaves."""
    there = live.tree.without(absent).leaves if absent else live.tree.leaves
    for leaf, grad in zip(there, lent.arrays(), strict=True):
        bad = grad.size - np.count_nonzero(np.isfinite(np.asarray(grad, np.float64 if leaf.dtype == "f64" else None)))
        if bad:
            where = f"grads[{leaf.name!r}]" if leaf.name else "grads"
            return errors.NonFiniteError(
                f"{where}: {bad} of {grad.size} elements are not finite; nothing was applied",
                subject=leaf.name,
                expected="finite gradients",
                got=f"{bad} of {grad.size} not finite",
                step=live.machine.step,
            )
        yield
    return errors.NonFiniteError(
        "grads: finite, but the update would make the state infinite; nothing was applied",
        subject="grads",
        expected="gradients whose update is finite",
        got="an update that overflows",
        step=live.machine.step,
    )
