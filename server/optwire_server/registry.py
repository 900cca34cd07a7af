"""The registry: all live sessions, and the shell that does what their machines decide, in order.

Knows neither protobuf nor update rules. Locks: ``Table.lock`` guards the table; everything that advances a session
runs in the session's turn, for each session one event at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from optwire_proto import codecs, errors, sessions, specs
from optwire_server import answers, creations, segments, states, table, updates
from optwire_server import plans as planning
from optwire_server.config import ServerConfig
from optwire_server.engine import decoding, device, landing, program
from optwire_server.engine import engine as engines
from optwire_server.engine import stage as stages
from optwire_server.engine.layout import Layout
from optwire_server.live import LiveSession, Push, PushedChange, Read, Reply
from optwire_server.session import effects, events, machine
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
        if payload_bytes_max is not None and live.tree.payload_bytes > payload_bytes_max:
            raise creations.over("payload of a unary Step, in bytes", live.tree.payload_bytes, payload_bytes_max)
        machine.admit(live.machine, key)
        updates.check_options(live, options)
        self._check_growth(live, options)
        updates.prepare(live, options)
        change = self._pushed_change(live, key, options)
        tree, layout = live.tree, live.held.layout
        if options.absent:
            tree, layout = tree.without(options.absent), layout.without(options.absent)
        how = live.grads_codec
        if slot:
            _check_way(live, "shared memory", live.grads_codec, live.params_codec)
        claim = self.segments.claim(slot, key) if slot else None
        if claim is not None and stage is not None:
            raise errors.InvalidArgumentError(
                "shared_memory_slot: a push that was staged, expected one whose payload lies in the segment",
                subject="stage",
            )
        if stage is not None:
            lent: landing.Landing = self._taken_over(stage, options)
        elif how != codecs.RAW:
            kind = functools.partial(decoding.Decoding, how)
            lent = self._landings.land_as(kind, tree, layout, codecs.scratch_bytes(how, tree.leaves))
        elif claim is not None and claim.in_place:
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
        machine.check_alive(live.machine)
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

    def _check_growth(self, live: LiveSession, options: sessions.PushOptions) -> None:
        """Raises LimitError where there is no memory for what a session holds after a push beyond what it holds now."""
        grown = self._engine.growth(live.held, options.absent)
        self.creations.check_growth(grown + updates.kept_bytes(live, options))

    def _pushed_change(
        self, live: LiveSession, key: sessions.PushKey, options: sessions.PushOptions
    ) -> PushedChange | None:
        """What a push changes of the hyperparameters, with every program it needs compiled; None for a retry."""
        if not options.hyperparams or key.base_step != live.machine.step:
            return None
        with live.preparing:
            before = live.plans
            now = planning.current(before, key.base_step)
            plans, values = planning.changed(now, dict(options.hyperparams), key.base_step, self._compiler(live))
        return PushedChange(sessions.Change(key.base_step, tuple(values.items())), before, plans)

    def push(self, push: Push, digest: sessions.Digest) -> Reply | Waiting:
        """Applies a push whose payload is in, or answers it from state if it had been applied.

        Returns:
          The reply, or what ``wait`` takes: the step needs pushes of other workers, too.
        """
        if push.claim is None:
            push.landing.finish(digest)
            outcome = self._engine.work(self._apply(push, digest), push.session.held)
            self._engine.served(push.session.held)
            return outcome if isinstance(outcome, Waiting) else answers.encoded(push, outcome)
        segments.check_token(digest, push.landing.payload_bytes)
        if not push.claim.in_place:
            with push.claim.using():
                push.landing.copy(push.claim.grads)
        outcome = self._engine.work(self._apply_shared(push.claim, push, digest), push.session.held)
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
        machine.check_alive(live.machine)
        where = live.held.layout
        # What waits for other workers, and is summed with theirs, is not left where its client can write to it. Nor is
        # what a program of the client's own reads: it may take an element for an index, which must not change between
        # the check and the use.
        inside = (found for _, found in specs.places(live.plan.spec) if isinstance(found, specs.Spec))
        in_place = not live.machine.aggregation.workers and not any(found.name == "exported" for found in inside)
        return self.segments.make(session_id, worker, where.nbytes, in_place=in_place), where

    def _apply_shared(self, claim: segments.Claim, push: Push, digest: sessions.Digest) -> device.Work[Reply | Waiting]:
        """As ``_apply``, for as long as the segment is this push's."""
        with claim.using():
            return (yield from self._apply(push, digest))

    def _apply(self, push: Push, digest: sessions.Digest) -> device.Work[Reply | Waiting]:
        """In the session's turn: tells the machine, then does what it says, in order; yields between blocks."""
        live = push.session
        if push.change and push.change.before is not live.plans and push.key.base_step == live.machine.step:
            raise errors.UnavailableError(
                f"session {live.machine.name!r}: its hyperparameters were changed by another while this push was coming"
            )
        todo: Sequence[effects.Effect]
        after, todo = machine.advance(live.machine, events.Pushed(push.key, digest, push.options))
        updates.check_ready(push, todo)
        for effect in todo:
            if isinstance(effect, effects.Apply):  # others may have grown since it was admitted
                self._check_growth(live, effect.options)
        live.machine = after
        outcome: Reply | Waiting | None = None
        failure: errors.OptwireError | None = None
        while todo:
            effect, *todo = todo
            match effect:
                case effects.Hold():
                    outcome = live.room.hold(push.key.worker, push.landing, push.options, push.claim)
                case effects.Apply():
                    todo += self._advance(live, (yield from updates.run(self._engine, push, effect)))
                case effects.Reply():
                    # The update has given them away; of a retry there was none.
                    done = not effect.duplicate and (push.claim is not None or push.departure is not None)
                    outcome = yield from answers.reply(
                        self._engine, live, push.options, effect, push.claim, is_written=done
                    )
                case effects.Answer():
                    yield from answers.tell(self._engine, live, effect)
                case effects.Fail():
                    failure = effect.error
                case effects.Free():
                    live.held.state = None
        if failure is not None:
            raise failure
        assert outcome is not None, "a push was neither answered nor refused"
        return outcome

    def _advance(self, live: LiveSession, event: events.Event) -> Sequence[effects.Effect]:
        live.machine, todo = machine.advance(live.machine, event)
        return todo

    # ------------------------------------------------------------------------------------------------ other verbs

    @contextlib.contextmanager
    def reading(self, *, id_: str = "", name: str = "", worker: str = "", which: str = "") -> Iterator[Read]:
        """The session, the worker's last applied seq, and the parameters or a view of them, all of one step.

        As long as they are being read they count as bytes in flight, since updates meanwhile must leave them alone.
        """
        live = self._table.find(id_=id_, name=name)
        machine.check_alive(live.machine)
        live.prepare_view(which)

        def look() -> device.Work[Read]:
            machine.check_alive(live.machine)
            if not live.plan.program.has_view(which):
                raise errors.UnavailableError(
                    f"session {live.machine.name!r}: its hyperparameters were changed meanwhile, and the reading of "
                    f"{which!r} is not compiled yet"
                )
            live.held.program = live.plan.program  # the one that has the view
            params = yield from self._engine.params(live.held, which)
            return Read(live.info(), live.worker_seq(worker), params)

        with self._landings.counted(live.tree.payload_bytes):
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
                    self._advance(live, events.Changed(sessions.Change(step, values)))
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
        machine.check_alive(live.machine)
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
        for effect in self._advance(live, events.Deleted()):
            if isinstance(effect, effects.Answer):
                yield from answers.tell(self._engine, live, effect)
            else:
                live.held.state = None

    def drain(self) -> None:
        """Refuses new sessions and pushes from now on; those under way go on."""
        self._draining = True

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
        machine.check_incarnation(session, incarnation)
