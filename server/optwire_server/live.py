"""Live sessions, and what is on its way to and from them: plain data that the registry works with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from optwire_proto import sessions, specs, trees
from optwire_server.engine import engine, landing, program
from optwire_server.session import effects, machine

Params = list[np.ndarray[Any, Any]]


@dataclasses.dataclass(slots=True, kw_only=True)
class LiveSession:
    """A session, its arrays, and what never changes about it."""

    machine: machine.Session
    held: engine.Held
    tree: trees.TreeSpec
    spec: specs.Spec
    schedule: Callable[[int], float | None]  # what the spec's schedule gives for a step, if it has one
    create_key: str
    created_s: float

    def worker_seq(self, worker: str) -> int:
        """The worker's last applied seq; 0 where it has none, or none is named."""
        if not worker:
            return 0
        applied = self.machine.workers.get(sessions.check_id(worker, "worker"))
        return applied.seq if applied else 0

    def learning_rate(self, index: int, set_by_hand: float | None) -> float:
        """What the update ``index`` uses: the rate set by hand, else what the spec gives."""
        if set_by_hand is not None:
            return set_by_hand
        constant = specs.learning_rate(self.spec)
        scheduled = self.schedule(index) if constant is None else constant
        assert scheduled is not None, "a spec has a constant learning rate or a schedule"
        return scheduled

    def info(self) -> sessions.SessionInfo:
        """What the session is and where it stands."""
        now = self.machine
        return sessions.SessionInfo(
            id=now.id,
            name=now.name,
            incarnation=now.incarnation,
            step=now.step,
            durable_step=0,
            tree=self.tree,
            spec=self.spec,
            learning_rate=self.learning_rate(now.step, now.learning_rate),
            learning_rate_scheduled=now.learning_rate is None and specs.learning_rate(self.spec) is None,
            durability=sessions.Durability.MEMORY,
            payload_bytes=self.tree.payload_bytes,
            state_bytes=self.held.state_bytes,
            created_s=self.created_s,
            failure=now.failure,
        )

    def ack(self, reply: effects.Reply, payload_bytes: int) -> sessions.Ack:
        """The outcome of a push as the client hears it."""
        return sessions.Ack(
            step=self.machine.step,
            applied_step=reply.applied_step,
            durable_step=0,
            incarnation=self.machine.incarnation,
            seq=reply.seq,
            duplicate=reply.duplicate,
            learning_rate=reply.learning_rate,
            payload_bytes=payload_bytes,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Creation:
    """A session whose initial parameters are on their way."""

    name: str
    spec: specs.Spec
    tree: trees.TreeSpec
    create_key: str
    program: program.Program
    landing: landing.Landing


@dataclasses.dataclass(frozen=True, slots=True)
class Push:
    """A push whose payload is on its way."""

    key: sessions.PushKey
    session: LiveSession
    landing: landing.Landing


@dataclasses.dataclass(slots=True)
class Reply:
    """The answer to a push: what became of it, and the parameters (in order) if they were asked for.

    On a CPU ``params`` are views that keep the next update from writing in place: let go of them soon.
    """

    ack: sessions.Ack
    params: Params


@dataclasses.dataclass(slots=True)
class Read:
    """A session, a worker's last applied seq, and the parameters (as in ``Reply``), all of one step."""

    info: sessions.SessionInfo
    worker_seq: int
    params: Params
