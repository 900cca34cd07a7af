"""Live sessions, and what is on its way to and from them: plain data that the registry works with."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np

from optwire_proto import aggregations, codecs, sessions, specs, trees
from optwire_server import plans as planning
from optwire_server import replicas, segments, waiting
from optwire_server.engine import departure, engine, landing, mean, program
from optwire_server.session import effects, events, machine

Params = list[np.ndarray[Any, Any]]


class Heard:
    """Which workers were heard of, for the next event of their session. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[str, events.Beat] = {}  # by worker

    def note(self, beat: events.Beat) -> None:
        """A worker that the session knows was heard of."""
        with self._lock:
            self._last[beat.worker] = beat

    def seen(self) -> list[events.Beat]:
        """What was noted, in the order in which it came."""
        with self._lock:
            return list(self._last.values())

    def take(self) -> list[events.Beat]:
        """As ``seen``, and nothing is noted any more."""
        with self._lock:
            beats, self._last = list(self._last.values()), {}
        return beats


@dataclasses.dataclass(slots=True, kw_only=True)
class LiveSession:
    """A session, its arrays, and what its steps use.

    ``plans`` is replaced in the session's turn, as ``machine`` and ``held`` are; ``preparing`` is held by whoever
    compiles for the session meanwhile: the next plans, or another variant of their programs. ``variants`` and ``views``
    are what the program of a new plan should have; what one has, it says itself. ``added`` is a step and what it added
    to the parameters, kept until the next one for a retry of a push that asked for it. In ``room`` are the pushes that
    wait for those of other workers, and in ``brought`` what they change of the hyperparameters. ``replica`` is there
    where replies carry differences, ``total`` where pushes are summed as they come; in ``given`` is, for each worker, a
    step and its parameters, those it was given last, where delays are compensated. ``heard`` is of workers that were
    heard of since the last event.
    """

    machine: machine.Session
    held: engine.Held
    tree: trees.TreeSpec
    terms: sessions.Terms
    created_spec: specs.Spec
    seed: int
    plans: tuple[planning.Plan, ...]
    create_key: str
    created_s: float
    variants: frozenset[program.Variant] = frozenset({program.Variant()})
    views: frozenset[str] = frozenset({""})
    preparing: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    added: tuple[int, Params] | None = None
    room: waiting.WaitingRoom = dataclasses.field(default_factory=waiting.WaitingRoom)
    replica: replicas.Replica | None = None
    brought: dict[str, PushedChange | None] = dataclasses.field(default_factory=dict)
    total: mean.Sum | None = None
    given: dict[str, tuple[int, np.ndarray[Any, Any]]] = dataclasses.field(default_factory=dict)
    heard: Heard = dataclasses.field(default_factory=Heard)

    @property
    def plan(self) -> planning.Plan:
        """What the next step uses."""
        return planning.at(self.plans, self.machine.step)

    def worker_seq(self, worker: str) -> int:
        """The worker's last applied seq; 0 where it has none, or none is named."""
        if not worker:
            return 0
        applied = self.machine.workers.get(sessions.check_id(worker, "worker"))
        return applied.seq if applied else 0

    def prepare(self, variant: program.Variant) -> None:
        """Compiles a variant for all plans, unless it is; on the calling thread."""
        if variant in self.variants and all(plan.program.has(variant) for plan in self.plans):
            return
        with self.preparing:
            for plan in self.plans:
                plan.program.prepare(variant)
            self.variants |= {variant}

    def prepare_view(self, which: str) -> None:
        """Compiles the reading of a view for all plans, unless it is; InvalidArgumentError where there is none."""
        if which in self.views and all(plan.program.has_view(which) for plan in self.plans):
            return
        with self.preparing:
            for plan in self.plans:
                plan.program.prepare_view(which)
            self.views |= {which}

    def info(self) -> sessions.SessionInfo:
        """What the session is and where it stands."""
        now = self.machine
        plan = planning.at(self.plans, now.step)
        return sessions.SessionInfo(
            id=now.id,
            name=now.name,
            incarnation=now.incarnation,
            step=now.step,
            durable_step=0,
            tree=self.tree,
            spec=plan.spec,
            learning_rate=plan.learning_rate(now.step, now.skipped),
            learning_rate_scheduled=plan.scheduled,
            durability=sessions.Durability.MEMORY,
            payload_bytes=self.tree.payload_bytes,
            state_bytes=self.state_bytes,
            created_s=self.created_s,
            failure=now.failure,
            seed=self.seed,
            spec_digest=plan.spec_digest,
            changes=now.changes,
            aggregation=now.aggregation,
            turns=self.held.lane.turns,
            grads_codec=str(self.grads_codec),
            params_codec=str(self.params_codec),
        )

    @property
    def grads_codec(self) -> codecs.Codec:
        """How gradients travel."""
        return self.terms.grads_codec or codecs.RAW

    @property
    def params_codec(self) -> codecs.Codec:
        """How parameters travel in the replies to pushes."""
        return self.terms.params_codec or codecs.RAW

    @property
    def state_bytes(self) -> int:
        """Size of parameters and slots, and of the replica."""
        return self.held.state_bytes + replicas.state_bytes(self.params_codec, self.tree)

    @property
    def held_bytes(self) -> int:
        """As ``state_bytes``, and padding of blocks, memory to encode replies with, and what is kept beside."""
        kept = self.tree.payload_bytes if self.added else 0
        given = len(self.given) * self.held.layout.nbytes  # its items are for the session's turn
        is_summed = self.machine.aggregation.mode is aggregations.Mode.BUFFERED
        total = mean.sum_bytes(self.tree) if is_summed else 0
        return self.held.held_bytes + replicas.held_bytes(self.params_codec, self.tree) + kept + given + total

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
            metrics=dict(reply.metrics),
            changes=self.machine.changed,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Creation:
    """A session whose initial parameters are on their way; ``extended`` is the one whose place it takes."""

    name: str
    spec: specs.Spec
    tree: trees.TreeSpec
    create_key: str
    seed: int
    program: program.Program
    landing: landing.Landing
    extends: sessions.Extension | None = None
    extended: LiveSession | None = None
    terms: sessions.Terms = sessions.USUAL


@dataclasses.dataclass(frozen=True, slots=True)
class PushedChange:
    """Hyperparameters that a push changes: what they are, the plans before, and those after."""

    change: sessions.Change
    before: tuple[planning.Plan, ...]
    plans: tuple[planning.Plan, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Push:
    """A push whose payload is on its way; with a ``claim`` it lies in shared memory, and so will the reply's.

    With a ``departure`` the parameters of its update leave that way, and not in the reply.
    """

    key: sessions.PushKey
    options: sessions.PushOptions
    session: LiveSession
    landing: landing.Landing
    change: PushedChange | None = None
    claim: segments.Claim | None = None
    departure: departure.Departure | None = None


@dataclasses.dataclass(slots=True)
class Reply:
    """The answer to a push: what became of it, and the parameters (in order), or what was added to them, if asked for.

    On a CPU ``params`` are views that keep the next update from writing in place: let go of them soon. They are to be
    cast on their way out where ``codec`` casts; what other codecs do is done.
    """

    ack: sessions.Ack
    params: Params
    codec: codecs.Codec = codecs.RAW


@dataclasses.dataclass(slots=True)
class Read:
    """A session, a worker's last applied seq, and the parameters (as in ``Reply``), all of one step."""

    info: sessions.SessionInfo
    worker_seq: int
    params: Params


@dataclasses.dataclass(slots=True)
class StateRead:
    """A session and all arrays of its state, named by ``tree``, of one step; views as those of ``Reply``."""

    info: sessions.SessionInfo
    tree: trees.TreeSpec
    arrays: Params


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """Arrays of a state that are on their way, named by ``tree``."""

    session: LiveSession
    tree: trees.TreeSpec
    key: sessions.LoadKey
    landing: landing.Landing
