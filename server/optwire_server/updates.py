"""One update of a live session: which program and operands a push runs with, and what came of it."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from optwire_proto import aggregations, errors, limits, sessions
from optwire_server import compensation, plans, row_pushes
from optwire_server.engine import departure, device, landing, mean, program, rows
from optwire_server.engine import engine as engines
from optwire_server.live import LiveSession, Push
from optwire_server.session import effects, events, machine

_log = logging.getLogger("optwire.updates")


def check_options(live: LiveSession, options: sessions.PushOptions) -> None:
    """Raises InvalidArgumentError unless a push brings along exactly what the optimizer needs and can do without."""
    _check_extras(live, options)
    is_added = live.machine.aggregation.mode is aggregations.Mode.BUFFERED
    if is_added and options.reply is sessions.ReplyContent.UPDATES:
        raise errors.UnsupportedError(
            f"session {live.machine.name!r}: reply 'updates', but its steps are of {live.machine.aggregation}: most "
            "pushes are answered before there is an update; ask for params, or for none",
            subject="reply",
            expected="params or none",
            got="updates",
        )
    if live.machine.aggregation.compensation and options.reply is sessions.ReplyContent.PRESENT:
        raise errors.UnsupportedError(
            f"session {live.machine.name!r}: reply 'present', but its steps are of {live.machine.aggregation}: delays "
            "are compensated from all parameters that a worker was given; ask for params",
            subject="reply",
            expected="params",
            got="present",
        )
    if options.codec not in (None, live.grads_codec.kind):
        raise errors.UnsupportedError(
            f"session {live.machine.name!r}: a push with codec {options.codec.name.lower()}, expected "
            f"{live.grads_codec}, as the session says",
            subject="codec",
            expected=str(live.grads_codec),
            got=options.codec.name.lower(),
        )
    if options.rows:
        row_pushes.check(live, options)
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
    """Bytes of memory that a session takes more for what its update adds, which is kept for a retry of the push.

    Where the update may turn out to be none, also beside what the last one added: that is asked for then.
    """
    is_kept = options.reply is sessions.ReplyContent.UPDATES
    return live.tree.payload_bytes if is_kept and (live.added is None or live.plan.program.rejects) else 0


def prepare(live: LiveSession, options: sessions.PushOptions) -> None:
    """Compiles the variants of the program that a push with these options may run; on the calling thread."""
    aggregation = live.machine.aggregation
    closing = (True,) if live.plan.program.every == 1 else (True, False)
    own = [_variant(options, closing=closes) for closes in closing]
    is_multiplied = aggregation.combine is aggregations.Combine.SUM and options.weight != 1.0
    if aggregation.damping is not aggregations.Damping.NONE or is_multiplied:
        # What the gradients are multiplied by may make up for the scale.
        own = [variant._replace(scaled=scaled) for variant in own for scaled in (True, False)]
    for variant in own:
        live.prepare(variant)
        if options.rows and variant.closing:
            row_pushes.prepare(live, options, variant)
    if aggregation.gathers:
        live.plan.program.prepare_means(
            aggregation.k if aggregation.is_ranked and aggregation.k else aggregation.workers
        )
        # Others of its step may ask for something else; whoever is second to come here sees both.
        for variant, other in itertools.product(own, live.variants):
            live.prepare(
                variant._replace(
                    telemetry=variant.telemetry or other.telemetry, updates=variant.updates or other.updates
                )
            )


def is_of(session: machine.Session, push: Push) -> bool:
    """Whether the update that a session is at is of the push just made, with others or alone; else of some that waited.

    One that waited, too, may be of this worker, and another one.
    """
    return session.pending is not None and session.pending.key == push.key


def check_ready(live: LiveSession, apply: effects.Apply, push: Push | None) -> None:
    """Raises where an update cannot be run, though its pushes were fit; in the session's turn.

    Raises:
      UnavailableError: plans have changed while pushes were on their way, or waited; the push made again compiles what
        is missing.
      InvalidArgumentError: what the gradients are divided by, less what they are multiplied by, is no such number.
    """
    scale = apply.options.grad_scale
    if not limits.GRAD_SCALE_MIN <= scale <= limits.SPEC_NUMBER_MAX:
        raise errors.InvalidArgumentError(
            f"session {live.machine.name!r}: grad_scale {scale:g} once weight and damping are part of it, expected "
            f"{limits.GRAD_SCALE_MIN:g} to {limits.SPEC_NUMBER_MAX:g}",
            subject="grad_scale",
            expected=f"{limits.GRAD_SCALE_MIN:g} to {limits.SPEC_NUMBER_MAX:g}",
            got=f"{scale:g}",
        )
    plan = plans.at(_changed(live, apply, push)[0], apply.index)
    if not plan.program.has(_variant(apply.options, closing=_closes(plan, live, apply))):
        raise errors.UnavailableError(
            f"session {live.machine.name!r}: its hyperparameters were changed while this push was coming, and the "
            "update that it needs is not compiled yet"
        )


def _changed(
    live: LiveSession, apply: effects.Apply, push: Push | None
) -> tuple[tuple[plans.Plan, ...], sessions.Change | None]:
    """What the session's steps use once its pushes are applied, and what is recorded of it, if they change anything.

    Raises:
      UnavailableError: hyperparameters were changed by others since.
    """
    if not apply.options.hyperparams:
        return live.plans, None
    mine = [push.change] if push else [live.brought.get(worker) for worker in apply.workers]
    for pushed in mine:
        if pushed is None or pushed.before is not live.plans:
            continue
        step = pushed.change.from_step  # others may have been applied meanwhile
        after = pushed.plans if step == apply.index else plans.moved(pushed.plans, step, apply.index)
        if after is not None:
            return after, dataclasses.replace(pushed.change, from_step=apply.index)
    raise errors.UnavailableError(
        f"session {live.machine.name!r}: its hyperparameters were changed by another while this push was coming"
    )


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


def run(
    engine: engines.Engine, live: LiveSession, apply: effects.Apply, push: Push | None
) -> device.Work[events.Event]:
    """Runs an update, in the session's turn; says how it ended, whatever happens.

    What its pushes change of the hyperparameters stays changed if the update is applied.

    Args:
      engine: holds the session's arrays.
      live: the session.
      apply: says what the update is of.
      push: the one just made, if it is one of those; whose parameters leave while it is under way.
    """
    after, change = _changed(live, apply, push)
    plan = plans.at(after, apply.index)
    try:
        lent = yield from _gradients(engine, live, apply, push)
        if not plan.program.rejects:
            live.added = None  # there will be an update; else what the last one added may be asked for again
        rate = plan.learning_rate(apply.index, live.machine.skipped)
        live.held.program = plan.program
        operands = _operands(plan, apply, len(live.tree.leaves))
        variant = _variant(apply.options, closing=_closes(plan, live, apply))
        if apply.options.rows and not apply.options.rows_exact:
            notes = yield from engine.update_lazily(live.held, variant, operands, lent)
            added: list[np.ndarray] = []
        else:
            notes, added = yield from engine.update(live.held, variant, operands, lent, _out(push))
    except errors.OutOfStepError as exc:
        return events.UpdateRefused(exc)
    except Exception as exc:  # noqa: BLE001  whatever it was, the machine must hear how the update ended
        _log.exception("session %s: update of step %d failed", live.machine.name, apply.index)
        state_lost = isinstance(exc, engines.UpdateError) and exc.state_lost
        return events.UpdateFailed(str(exc), state_lost)
    skipped = notes.get("finite") == 0.0
    if skipped and plan.program.rejects:
        return events.UpdateRefused((yield from _not_finite(live, lent, apply.options.absent)))
    if change:
        live.plans = after
    live.added = (apply.index + 1, added) if added else None
    return events.Updated(rate, _metrics(notes, apply, rate, skipped=skipped), skipped, change)


def add(live: LiveSession, push: Push, effect: effects.Add) -> device.Work[events.Event]:
    """Adds the gradients of a push to the sum, or begins it with them, in the session's turn; says how that ended."""
    try:
        if live.total is None or effect.is_first:
            live.total = live.total or mean.Sum()
            live.total.begin()
        yield from live.total.add(push.landing.arrays(), effect.factor)
        rate = live.plan.learning_rate(live.machine.step, live.machine.skipped)
    except Exception as exc:  # noqa: BLE001  as for updates
        _log.exception("session %s: gradients were not added", live.machine.name)
        return events.UpdateFailed(str(exc), state_lost=False)
    return events.Added(rate)


def check_finite(live: LiveSession, push: Push) -> device.Work[None]:
    """Raises NonFiniteError where gradients are to be added that the update would refuse, with all in the sum."""
    if live.plan.program.rejects and (error := (yield from _fault(live, push.landing, push.options.absent))):
        raise error


def _out(push: Push | None) -> np.ndarray | departure.Departure | None:
    """Where the new parameters go while the update is under way."""
    if push is None:
        return None
    is_shared = push.claim is not None and push.options.reply.brings_params
    return push.claim.params if push.claim is not None and is_shared else push.departure


def _gradients(
    engine: engines.Engine, live: LiveSession, apply: effects.Apply, push: Push | None
) -> device.Work[landing.Landing | mean.Gathered | rows.Sparse]:
    """What the update takes: the gradients of a push, or of several, whose mean is taken as it is read."""
    if not apply.workers:
        assert push is not None, "an update of a push that was not made"
        if apply.completes_sum:
            assert live.total is not None, "a sum is complete that was not begun"
            yield from live.total.end(push.landing.arrays(), apply.factors[0], apply.divisor)
        else:
            yield from compensation.compensate(engine, live, push.key, push.landing, push.options)
        return push.landing
    lent = [push.landing if push and worker == push.key.worker else live.room.kept(worker) for worker in apply.workers]
    if live.machine.aggregation.gathers and apply.options.rows:
        return (yield from row_pushes.joined(live, lent, apply.factors, apply.divisor))
    if live.machine.aggregation.gathers:
        is_one = len(lent) == 1 and not apply.factors and apply.divisor in (0.0, 1.0)
        return lent[0] if is_one else mean.Gathered(lent, apply.factors, apply.divisor)
    waited = live.machine.gathered[apply.workers[0]]
    yield from compensation.compensate(engine, live, waited.key, lent[0], waited.options)
    return lent[0]


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


def _not_finite(
    live: LiveSession, lent: landing.Landing | mean.Gathered | rows.Sparse, absent: Sequence[int]
) -> device.Work[errors.NonFiniteError]:
    """The refusal of a push, with the name of the first leaf at fault; yields between leaves."""
    if error := (yield from _fault(live, lent, absent)):
        return error
    return errors.NonFiniteError(
        "grads: finite, but the update would make the state infinite; nothing was applied",
        subject="grads",
        expected="gradients whose update is finite",
        got="an update that overflows",
        step=live.machine.step,
    )


def _fault(
    live: LiveSession, lent: landing.Landing | mean.Gathered | rows.Sparse, absent: Sequence[int]
) -> device.Work[errors.NonFiniteError | None]:
    """What is wrong with gradients that are not finite, with the name of the first leaf; yields between leaves."""
    there = live.tree.without(absent).leaves if absent else live.tree.leaves
    for leaf, grad in zip(there, row_pushes.grads(lent), strict=True):
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
    return None
