"""Compensation of delays: what gradients of older parameters would be of the newest ones, to first order.

    g + lambda * g * g * (newest parameters - those that g was computed on)

elementwise (DC-ASGD, arXiv:1609.08326), where the session's aggregation asks for it. The server keeps the parameters
that each worker was given last, and one copy more to compute with.
"""

from __future__ import annotations

import numpy as np

from optwire_proto import aggregations, errors, sessions, trees
from optwire_server.engine import device, landing, mean
from optwire_server.engine import engine as engines
from optwire_server.live import LiveSession


def check(aggregation: aggregations.Aggregation, tree: trees.TreeSpec) -> None:
    """Raises UnsupportedError where leaves are of types that are not computed with on the host."""
    if not aggregation.compensation:
        return
    for leaf in tree.leaves:
        if leaf.dtype not in ("f32", "f64"):
            raise errors.UnsupportedError(
                f"params[{leaf.name!r}]: element type {leaf.dtype}, expected f32 or f64, as steps are of {aggregation}",
                subject=leaf.name,
                expected="f32 or f64",
                got=leaf.dtype,
            )


def growth(live: LiveSession, worker: str) -> int:
    """Bytes of memory that a session takes more once a worker was given parameters."""
    if not live.machine.aggregation.compensation or worker in live.given:
        return 0
    return (1 if live.given else 2) * live.held.layout.nbytes


def keep(
    engine: engines.Engine,
    live: LiveSession,
    worker: str,
    content: sessions.ReplyContent = sessions.ReplyContent.PARAMS,
) -> device.Work[None]:
    """In the session's turn: keeps the parameters that a worker is given now, yielding between blocks."""
    if not live.machine.aggregation.compensation:
        return
    members = live.machine.members
    for gone in [other for other in live.given if other not in members or not members[other].is_live]:
        del live.given[gone]
    if content is not sessions.ReplyContent.PARAMS or worker not in members:
        return
    _, memory = live.given.pop(worker, (0, None))
    memory = _copy_room(live) if memory is None else memory
    yield from engine.write_params(live.held, memory)
    live.given[worker] = live.machine.step, memory


def compensate(
    engine: engines.Engine,
    live: LiveSession,
    key: sessions.PushKey,
    lent: landing.Landing,
    options: sessions.PushOptions,
) -> device.Work[None]:
    """In the session's turn: writes what a push's gradients would be of the newest parameters over them.

    Raises:
      StaleStepError: the parameters that they were computed on are not kept.
    """
    strength, step = live.machine.aggregation.compensation, live.machine.step
    if not strength or key.base_step == step:
        return
    had, then = live.given.get(key.worker, (-1, None))
    if then is None or had != key.base_step:
        raise errors.StaleStepError(
            f"session {live.machine.name!r}: gradients of step {key.base_step}, whose parameters are not kept for this "
            "worker, to compensate the delay; read the parameters and compute again",
            subject="base_step",
            expected=str(had if then is not None else step),
            got=str(key.base_step),
            step=step,
        )
    now = _copy_room(live)
    yield from engine.write_params(live.held, now)
    absent = frozenset(options.absent)
    old, new = (landing.Landing.filled(memory, live.tree, live.held.layout).arrays() for memory in (then, now))
    there = [position for position in range(len(live.tree.leaves)) if position not in absent]
    pairs = [(old[position], new[position]) for position in there]
    yield from mean.compensate(lent.arrays(), pairs, strength / options.grad_scale)


def _copy_room(live: LiveSession) -> np.ndarray:
    return np.empty(live.held.layout.nbytes, np.uint8)
