"""The registry: all live sessions, and the shell that does what their machines decide, in order.

Knows neither protobuf nor update rules. Locks: ``Table.lock`` guards the table; everything that advances a session
runs in the session's turn, for each session one event at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from optwire_proto import aggregations, codecs, errors, limits, rows, sessions, specs
from optwire_server import answers, creations, row_pushes, runner, segments, states, table, updates
from optwire_server import plans as planning
from optwire_server.config import ServerConfig
from optwire_server.engine import decoding, device, landing, program
from optwire_server.engine import engine as engines
from optwire_server.engine import stage as stages
from optwire_server.engine.layout import Layout
from optwire_server.live import LiveSession, Push, PushedChange, Read, Reply
from optwire_server.session import admission, events, machine, members
from optwire_server.waiting import Waiting

Plans = tuple[planning.Plan, ...]
# How often a change is worked out anew, since a change that was waiting came into effect meanwhile.
_CHANGE_TRIES = 8

_log = logging.getLogger("optwire.registry")


class Registry:
    """All live sessions of one server. Thread-safe."""

    def __init__(self, engine: engines.Engine, config: ServerConfig) -> None:
        self._engine = engine
        self._config = config
        self._landings = landing.Landings(bytes_max=config.landing_bytes_max, keep_bytes=config.landing_keep_bytes)
        self.segments = segments.Segments(bytes_max=config.shared_bytes_max)
        self._table = table.Table()
        self._draining = False
        refuse = self._refuse_when_draining
        self.creations = creations.Creations(
            engine, config, self._landings, self._table, refuse_when_draining=refuse, end=self._end
        )
        self.states = states.States(engine, self._landings, self._table.find, refuse, self.creations.check_growth)
        self._runner = runner.Runner(engine, self.creations.check_growth)

    # ------------------------------------------------------------------------------------------------------ push

    @contextlib.contextmanager
    def pushing(
        self,
        key: sessions.PushKey,
        options: sessions.PushOptions = sessions.PLAIN,
        *,
        payload_bytes_max: int | None = None,
        slot: int = 0,
        stage: stages.Stage | None = None,
        departs: bool = False,
    ) -> Iterator[Push]:
        """Admits a push and lends the landing for its payload.

        Args:
          key: of the push.
          options: what it says beside its gradients.
          payload_bytes_max: the longest payload that the way it comes on can carry.
          slot: of the segment that the payload lies in; 0: none.
          stage: where the payload comes to already, of ``staging`` for the same session; None: it has not begun.
          departs: whether parameters may leave before the update is over; the push has a departure where any would.

        Raises:
          SessionNotFoundError, SessionFailedError: there is nothing to push to.
          OutOfStepError: as ``session.machine`` says.
          InvalidArgumentError: the optimizer needs something beside the gradients that the push lacks, or the reverse;
            a slot that was not handed over for this session and worker.
          LimitError: too many bytes in flight; worth another try. Or more memory for leaves without gradients, which
            are held apart from the others, than there may be.
          UnavailableError: the server is draining.
        """
        self._refuse_when_draining()
        live = self._table.find(id_=key.session_id)
        if payload_bytes_max is not None and live.tree.payload_bytes > payload_bytes_max and not options.rows:
            raise creations.over("payload of a unary Step, in bytes", live.tree.payload_bytes, payload_bytes_max)
        admission.admit(live.machine, key)
        updates.check_options(live, options)
        self._runner.check_growth(live, options, key.worker)
        updates.prepare(live, options)
        change = self._pushed_change(live, key, options)
        tree, layout = live.tree, live.held.layout
        if options.absent:
            tree, layout = tree.without(options.absent), layout.without(options.absent)
        how = live.grads_codec
        if slot:
            _check_way(live, "shared memory", live.grads_codec, live.params_codec)
        if options.rows and (slot or stage is not None):
            row_pushes.refuse_way(live, "shared memory" if slot else "a stage")
        claim = self.segments.claim(slot, key) if slot else None
        if claim is not None and stage is not None:
            raise errors.InvalidArgumentError(
                "shared_memory_slot: a push that was staged, expected one whose payload lies in the segment",
                subject="stage",
            )
        if stage is not None:
            lent: landing.Landing = self._taken_over(stage, options)
        elif options.rows:
            lent = row_pushes.land(self._landings, live, options)
        elif how != codecs.RAW:
            kind = functools.partial(decoding.Decoding, how)
            lent = self._landings.land_as(kind, tree, layout, codecs.scratch_bytes(how, tree.leaves))
        elif claim is not None and _may_lie(live) and live.machine.aggregation.waits:
            lent = self._landings.land_as(landing.Lying, tree, layout, 0)
        elif claim is not None and _may_lie(live):
            lent = landing.Landing.filled(claim.grads, tree, layout)
        else:
            lent = self._landings.land(tree, layout)
        try:
            out = answers.departure(live, options) if departs and claim is None else None
            yield Push(key, options, live, lent, change, claim, out)
        finally:
            live.room.leave(lent)

    @contextlib.contextmanager
    def staging(self, session_id: str, incarnation: int, give_way: Callable[[], object]) -> Iterator[stages.Stage]:
        """Lends the landing for a payload whose push is not known yet, until a push has taken it over.

        Args:
          session_id: of the session to be pushed to.
          incarnation: that the client knows; 0: any.
          give_way: called, from another thread, where somebody else needs the room: is to end this.

        Raises:
          SessionNotFoundError, SessionFailedError, IncarnationError: there is nothing to push to.
          UnsupportedError: its gradients come encoded.
          LimitError: too many bytes in flight.
          UnavailableError: the server is draining.
        """
        self._refuse_when_draining()
        live = self._table.find(id_=session_id)
        admission.check_alive(live.machine)
        check_incarnation(live.machine, incarnation)
        _check_way(live, "a stage", live.grads_codec)
        stage = self._landings.land_early(stages.Stage, live.tree, live.held.layout, give_way)
        try:
            yield stage
        finally:
            self._landings.keep(stage)
            if not stage.is_pushed:
                stage.close()

    def _taken_over(self, stage: stages.Stage, options: sessions.PushOptions) -> stages.Stage:
        if not self._landings.keep(stage):
            raise errors.UnavailableError("the stage of this push gave way to others; send it again", subject="stage")
        stage.leave_out(options.absent)
        stage.is_pushed = True
        return stage

    def _pushed_change(
        self, live: LiveSession, key: sessions.PushKey, options: sessions.PushOptions
    ) -> PushedChange | None:
        """What a push changes of the hyperparameters, with every program it needs compiled; None for a retry."""
        if not options.hyperparams or live.worker_seq(key.worker) == key.seq:
            return None
        with live.preparing:
            before, step = live.plans, live.machine.step
            now = planning.current(before, step)
            plans, values = planning.changed(now, dict(options.hyperparams), step, self._compiler(live))
        return PushedChange(sessions.Change(step, tuple(values.items())), before, plans)

    def push(self, push: Push, digest: sessions.Digest) -> Reply | Waiting:
        """Applies a push whose payload is in, or answers it from state if it had been applied.

        Returns:
          The reply, or what ``wait`` takes: the step needs pushes of other workers, too.
        """
        if push.claim is None:
            push.landing.finish(digest)
            outcome = self._engine.work(self._runner.pushed(push, digest, time.monotonic()), push.session.held)
            self._engine.served(push.session.held)
            return outcome if isinstance(outcome, Waiting) else answers.encoded(push, outcome)
        segments.check_token(digest, push.landing.payload_bytes)
        if not push.landing.has_come and not isinstance(push.landing, landing.Lying):
            with push.claim.using():
                push.landing.copy(push.claim.grads)
        outcome = self._engine.work(self._apply_shared(push.claim, push, digest, time.monotonic()), push.session.held)
        self._engine.served(push.session.held)
        return outcome

    def wait(self, push: Push, waiting: Waiting, is_wanted: Callable[[], bool]) -> Reply:
        """Waits for the other pushes of a step. The push stays gathered even if the wait ends before the step.

        Raises:
          UnavailableError: the server drains, or the call is not wanted any more.
          OptwireError: what became of the step.
        """

        def look() -> None:
            self._refuse_when_draining()
            if not is_wanted():
                raise errors.UnavailableError(f"session {push.session.machine.name!r}: the call has ended")

        reply: Reply = waiting.result(look)
        return answers.encoded(push, reply)

    def share(self, session_id: str, worker: str) -> tuple[segments.Segment, Layout]:
        """A segment for the pushes of a worker, and where the leaves of a payload lie in either half of it.

        Raises:
          SessionNotFoundError, SessionFailedError: there is nothing to push to.
          LimitError: too many bytes of shared memory.
          UnavailableError: the server is draining.
        """
        self._refuse_when_draining()
        live = self._table.find(id_=session_id)
        admission.check_alive(live.machine)
        where = live.held.layout
        return self.segments.make(session_id, worker, where.nbytes), where

    def _apply_shared(
        self, claim: segments.Claim, push: Push, digest: sessions.Digest, now_s: float
    ) -> device.Work[Reply | Waiting]:
        """As ``Runner.pushed``, for as long as the segment is this push's."""
        lent = push.landing
        with claim.using():
            if isinstance(lent, landing.Lying):
                lent.lie(claim.grads, claim.keep(functools.partial(self._move, push.session, lent)))
            outcome = yield from self._runner.pushed(push, digest, now_s)
            if not isinstance(outcome, Waiting):
                lent.used()
            return outcome

    def _move(self, live: LiveSession, lent: landing.Lying) -> None:
        """Moves a payload that waits away from where it lies, as its client wants the memory back."""
        with contextlib.suppress(errors.UnavailableError):  # the server ends
            self._engine.run(lent.move, live.held)

    # --------------------------------------------------------------------------------------------------- workers

    def join(
        self, worker: str, join_key: str, *, id_: str = "", name: str = ""
    ) -> tuple[sessions.SessionInfo, int, int, float]:
        """Takes a process in as a worker, in the place of one that was it before.

        Args:
          worker: 32 hexadecimal digits.
          join_key: 32 hexadecimal digits; a retry repeats them.
          id_: of the session; or
          name: of the session.

        Returns:
          The session, the worker's last applied seq, its epoch, and the seconds after which it is lost unless it is
          heard of: infinite, if never.

        Raises:
          SessionNotFoundError, SessionFailedError: there is nothing to join.
          InvalidArgumentError: a worker of no rank.
          LimitError: no more workers may be there.
          ReplacedError: the process of this join_key has left.
          UnavailableError: the server is draining.
        """
        self._refuse_when_draining()
        sessions.check_id(worker, "worker")
        sessions.check_id(join_key, "join_key")
        live = self._table.find(id_=id_, name=name)
        event = events.Joined(worker, join_key, time.monotonic())

        def joined() -> device.Work[tuple[sessions.SessionInfo, int, int, float]]:
            yield from self._runner.told(live, event)
            epoch = live.machine.members[worker].epoch
            return live.info(), live.worker_seq(worker), epoch, live.machine.aggregation.lease_s or math.inf

        return self._engine.work(joined(), live.held)

    def beat(self, session_id: str, worker: str, epoch: int) -> tuple[int, int, tuple[str, ...]]:
        """Renews a worker's lease; gives the session's step and incarnation, and the first workers it waits for.

        Waits for nobody's turn, unless the worker was lost: what is due is done when time has passed, or with the next
        event.

        Raises:
          SessionNotFoundError, SessionFailedError: the session is no more.
          ReplacedError: another process has joined as this worker, or it has left.
          LimitError: it was lost, and no more workers may be there.
        """
        sessions.check_id(worker, "worker")
        live, beat = self._table.find(id_=session_id), events.Beat(worker, epoch, time.monotonic())
        now = live.machine
        admission.check_alive(now)
        members.heard(now, worker, epoch, beat.now_s)
        if now.members[worker].is_live:
            live.heard.note(beat)
        else:
            self._engine.work(self._runner.told(live, beat), live.held)
            now = live.machine
        return now.step, now.incarnation, members.awaited(now)[: limits.AWAITED_MAX]

    def leave(self, session_id: str, worker: str, epoch: int) -> None:
        """Lets a worker go, that nobody waits for any more; what it has pushed still counts.

        Raises:
          SessionNotFoundError, SessionFailedError: the session is no more.
          ReplacedError: another process has joined as this worker.
        """
        sessions.check_id(worker, "worker")
        live = self._table.find(id_=session_id)
        self._engine.work(self._runner.told(live, events.Left(worker, epoch, time.monotonic())), live.held)

    def workers(self, *, id_: str = "", name: str = "") -> tuple[sessions.WorkerInfo, ...]:
        """The workers that a session knows, in the order of their ids; of ranks, also those never heard of."""
        live = self._table.find(id_=id_, name=name)
        now = live.machine
        for beat in live.heard.seen():
            with contextlib.suppress(errors.OptwireError):
                now = members.heard(now, beat.worker, beat.epoch, beat.now_s)
        return members.infos(now, time.monotonic())

    # ------------------------------------------------------------------------------------------------ other verbs

    @contextlib.contextmanager
    def reading(
        self,
        *,
        id_: str = "",
        name: str = "",
        worker: str = "",
        epoch: int = 0,
        which: str = "",
        wanted: rows.Wanted = (),
    ) -> Iterator[Read]:
        """The session, the worker's last applied seq, and the parameters or a view of them, all of one step.

        As long as they are being read they count as bytes in flight, since updates meanwhile must leave them alone.
        With ``wanted`` the rows that it names, and nothing else: copies.
        """
        live = self._table.find(id_=id_, name=name)
        admission.check_alive(live.machine)
        live.prepare_view(which)
        selected = row_pushes.selected(live, wanted)
        event = events.Read(worker, epoch, time.monotonic())

        def look() -> device.Work[Read]:
            admission.check_alive(live.machine)
            if not live.plan.program.has_view(which):
                raise errors.UnavailableError(
                    f"session {live.machine.name!r}: its hyperparameters were changed meanwhile, and the reading of "
                    f"{which!r} is not compiled yet"
                )
            live.held.program = live.plan.program  # the one that has the view
            if selected is None:
                params = yield from self._engine.params(live.held, which)
            else:
                params = yield from self._engine.read(live.held, which, selected)
            read = Read(live.info(), live.worker_seq(worker), params)
            if worker:
                yield from self._runner.read(live, event, is_all=not which and selected is None)
            return read

        size = live.tree.payload_bytes if selected is None else row_pushes.nbytes(live, selected)
        with self._landings.counted(size):
            yield self._engine.work(look(), live.held)

    def info(self, *, id_: str = "", name: str = "", worker: str = "") -> tuple[sessions.SessionInfo, int]:
        """The session, and the worker's last applied seq (0: none)."""
        live = self._table.find(id_=id_, name=name)
        return live.info(), live.worker_seq(worker)

    def list(self, page_size: int, after: str) -> tuple[list[sessions.SessionInfo], str]:
        """One page of sessions ordered by name, without their trees, and the token of the next page (empty: none)."""
        with self._table.lock:
            names = sorted(name for name in self._table.by_name if name > after)
            page = [self._table.by_name[name] for name in names[:page_size]]
        infos = [dataclasses.replace(live.info(), tree=None, changes=()) for live in page]
        return infos, names[page_size - 1] if len(names) > page_size else ""

    def set_hyperparams(
        self,
        hyperparams: Mapping[str, specs.Value],
        *,
        id_: str = "",
        name: str = "",
        incarnation: int = 0,
        from_step: int | None = None,
    ) -> tuple[sessions.SessionInfo, int]:
        """Changes hyperparameters from a step on; returns the session and the first step that uses the new values.

        Raises:
          InvalidArgumentError: a name that means nothing or several values; a step that has passed.
          SpecError: a value that the argument cannot take.
        """
        live = self._table.find(id_=id_, name=name)
        with live.preparing:
            for _ in range(_CHANGE_TRIES):
                before = live.plans
                now = planning.current(before, live.machine.step)
                at = live.machine.step if from_step is None else from_step
                # Before anything is compiled for it; again once it is, as the session moves on meanwhile.
                check_incarnation(live.machine, incarnation)
                machine.advance(live.machine, events.Changed(sessions.Change(at, ())))
                plans, values = planning.changed(now, hyperparams, at, self._compiler(live))

                def put(
                    at: int = at,
                    before: Plans = before,
                    plans: Plans = plans,
                    values: tuple[Any, ...] = tuple(values.items()),
                ) -> int | None:
                    check_incarnation(live.machine, incarnation)
                    if live.plans is not before:
                        return None  # a push brought a change along, which must not be lost
                    step = live.machine.step if from_step is None else from_step  # pushes may have come between
                    fitting = planning.moved(plans, at, step)
                    if fitting is None:
                        return None  # among them the first of another plan: other values are to be changed
                    live.machine, _ = machine.advance(live.machine, events.Changed(sessions.Change(step, values)))
                    live.plans = planning.current(fitting, live.machine.step)
                    return step

                if (begins := self._engine.run(put, live.held)) is not None:
                    return live.info(), begins
        raise errors.UnavailableError(
            f"session {live.machine.name!r}: its hyperparameters change too fast to change them"
        )

    def _compiler(self, live: LiveSession) -> Callable[[specs.Spec], program.Program]:
        """Compiles a spec for a session, in all variants that it has used."""

        def program_of(spec: specs.Spec) -> program.Program:
            compiled = self._engine.compile(spec, live.tree)
            for variant in live.variants:
                compiled.prepare(variant)
            for which in live.views:
                compiled.prepare_view(which)
            return compiled

        return program_of

    def describe(self, *, id_: str = "", name: str = "") -> sessions.OptimizerInfo:
        """The session's optimizer as its next step will run it, and what every leaf gets."""
        live = self._table.find(id_=id_, name=name)
        admission.check_alive(live.machine)
        return planning.describe(live.plan, live.tree, live.machine.step)

    def delete(self, *, id_: str = "", name: str = "") -> sessions.SessionInfo:
        """Ends a session and frees its state; pushes under way are refused."""
        live = self._table.find(id_=id_, name=name)

        def end() -> device.Work[sessions.SessionInfo]:
            try:
                return live.info()
            finally:  # whatever describing it may raise
                yield from self._end(live)
                self._table.drop(live)

        info = self._engine.work(end(), live.held)
        _log.info("session %s deleted at step %d", live.machine.name, info.step)
        return info

    def _end(self, live: LiveSession) -> device.Work[None]:
        """In the session's turn: the session is over."""
        yield from self._runner.told(live, events.Deleted())

    def drain(self) -> None:
        """Refuses new sessions and pushes from now on; those under way go on."""
        self._draining = True

    def close(self) -> None:
        """Ends what would be done by itself, once time has passed."""
        self._runner.close()

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise errors.UnavailableError("the server is draining", subject="server", got="draining")


def _check_way(live: LiveSession, what: str, *of: codecs.Codec) -> None:
    """Raises UnsupportedError where gradients or parameters would travel in a way that leaves their codecs out."""
    used = [str(codec) for codec in of if codec != codecs.RAW]
    if used:
        raise errors.UnsupportedError(
            f"session {live.machine.name!r}: a push in {what}, which codecs ({', '.join(used)}) do not go with",
            subject=live.machine.name,
            expected="a push in messages",
            got=what,
        )


def check_incarnation(session: machine.Session, incarnation: int) -> None:
    """Raises IncarnationError where a caller knows another incarnation; 0 stands for any."""
    if incarnation:
        admission.check_incarnation(session, incarnation)


def _may_lie(live: LiveSession) -> bool:
    """Whether gradients may be read where their client can write to them; a client that does hurts its own session.

    What is written over must not be the client's own. Nor is left there what a program of the client's own reads: it
    may take an element for an index, which must not change between the check and the use.
    """
    aggregation = live.machine.aggregation
    is_written = aggregation.mode is aggregations.Mode.BUFFERED or aggregation.compensation
    inside = (found for _, found in specs.places(live.plan.spec) if isinstance(found, specs.Spec))
    return not is_written and not any(found.name == "exported" for found in inside)
