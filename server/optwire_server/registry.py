"""The registry: all live sessions, and the shell that does what their machines decide, in order.

Knows neither protobuf nor update rules. Locks: ``Registry._lock`` guards the tables; everything that advances a session
runs on the engine's thread, one event at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from optwire_proto import errors, sessions, specs, trees
from optwire_server import plans as planning
from optwire_server import updates
from optwire_server.config import ServerConfig
from optwire_server.engine import engine as engines
from optwire_server.engine import landing, program
from optwire_server.live import Creation, LiveSession, Params, Push, PushedChange, Read, Reply
from optwire_server.session import effects, events, machine

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
        self._lock = threading.Lock()
        self._by_id: dict[str, LiveSession] = {}
        self._by_name: dict[str, LiveSession] = {}
        self._creating: list[int] = []  # bytes of state of each session that is being created
        self._draining = False

    # ---------------------------------------------------------------------------------------------------- create

    @contextlib.contextmanager
    def creating(
        self, name: str, tree: trees.TreeSpec, spec: specs.Spec, create_key: str, seed: int = 0
    ) -> Iterator[Creation]:
        """Prepares a session: checks everything, compiles, lends the landing for the initial parameters.

        Raises:
          SpecError, TreeError, InvalidArgumentError: the request is wrong.
          SessionExistsError: the name is taken by another request's session.
          LimitError: too many sessions, or too much state.
        """
        self._refuse_when_draining()
        sessions.check_id(create_key, "create_key")
        if name:
            sessions.check_name(name)
        checked = self._engine.check(spec)
        if len(tree.leaves) > self._config.leaves_max:
            raise _over("leaves_max", len(tree.leaves), self._config.leaves_max)
        with self._lock:
            first_try = self._existing(name, create_key, tree, checked, seed) is None
            if first_try:
                self._check_room(tree.payload_bytes)
        compiled = self._engine.compile(checked, tree)
        room = self._reserved(compiled.state_bytes) if first_try else contextlib.nullcontext()
        with room, contextlib.closing(self._landings.land(tree)) as lent:
            yield Creation(
                name=name,
                spec=checked,
                tree=tree,
                create_key=create_key,
                seed=seed,
                program=compiled,
                landing=lent,
            )

    def create(self, creation: Creation, digest: sessions.Digest) -> sessions.SessionInfo:
        """Creates the session once its parameters are in; a retry under the same key finds it."""
        creation.landing.finish(digest)
        with self._lock:
            if existing := self._made_before(creation):
                return existing.info()
        plan = planning.make(creation.spec, creation.program, 0, {})
        held = self._engine.hold(creation.program, creation.landing.arrays(), plan.rates, creation.seed)
        id_ = secrets.token_hex(16)
        name = creation.name or f"session-{id_[:16]}"
        live = LiveSession(
            machine=machine.Session(id=id_, name=name),
            held=held,
            tree=creation.tree,
            created_spec=creation.spec,
            seed=creation.seed,
            plans=(plan,),
            create_key=creation.create_key,
            created_s=time.time(),
        )
        with self._lock:
            # Another request may have come first while the state was made.
            if existing := self._made_before(creation):
                return existing.info()
            self._by_id[id_] = self._by_name[name] = live
        _log.info("session %s created: %s, %d bytes of state", name, creation.spec.name, held.state_bytes)
        return live.info()

    def _made_before(self, creation: Creation) -> LiveSession | None:
        return self._existing(creation.name, creation.create_key, creation.tree, creation.spec, creation.seed)

    def _existing(
        self, name: str, create_key: str, tree: trees.TreeSpec, spec: specs.Spec, seed: int
    ) -> LiveSession | None:
        """The session that an earlier try of the same request created; raises where name or key are another's."""
        for live in self._by_id.values():
            if live.create_key == create_key:
                same = (live.tree, str(live.created_spec), live.seed) == (tree, str(spec), seed)
                if not same or name not in ("", live.machine.name):
                    raise errors.SessionExistsError(
                        f"create_key was used for session {live.machine.name!r}, which differs from this one",
                        subject="create_key",
                    )
                return live
        if name in self._by_name:
            raise errors.SessionExistsError(f"session {name!r} exists already", subject=name)
        return None

    @contextlib.contextmanager
    def _reserved(self, state_bytes: int) -> Iterator[None]:
        """Keeps room for a session while it is being created."""
        with self._lock:
            self._check_room(state_bytes)
            self._creating.append(state_bytes)
        try:
            yield
        finally:
            with self._lock:
                self._creating.remove(state_bytes)

    def _check_room(self, state_bytes: int) -> None:
        held = sum(live.held.state_bytes for live in self._by_id.values()) + sum(self._creating)
        for what, count, most in (
            ("sessions_max", len(self._by_id) + len(self._creating) + 1, self._config.sessions_max),
            ("state_bytes_max", held + state_bytes, self._config.state_bytes_max),
        ):
            if count > most:
                # What is being created may be another try of the same request, or fail.
                raise _over(what, count, most, retry_after_s=0.1 if self._creating else 0.0)

    # ------------------------------------------------------------------------------------------------------ push

    @contextlib.contextmanager
    def pushing(
        self,
        key: sessions.PushKey,
        options: sessions.PushOptions = sessions.PLAIN,
        *,
        payload_bytes_max: int | None = None,
    ) -> Iterator[Push]:
        """Admits a push and lends the landing for its payload.

        Args:
          key: of the push.
          options: what it says beside its gradients.
          payload_bytes_max: the longest payload that the way it comes on can carry.

        Raises:
          SessionNotFoundError, SessionFailedError: there is nothing to push to.
          OutOfStepError: as ``session.machine`` says.
          InvalidArgumentError: the optimizer needs something beside the gradients that the push lacks, or the reverse.
          LimitError: too many bytes in flight; worth another try.
          UnavailableError: the server is draining.
        """
        self._refuse_when_draining()
        live = self._find(id_=key.session_id)
        if payload_bytes_max is not None and live.tree.payload_bytes > payload_bytes_max:
            raise _over("payload of a unary Step, in bytes", live.tree.payload_bytes, payload_bytes_max)
        machine.admit(live.machine, key)
        updates.check_options(live, options)
        for variant in updates.variants(live, options):
            live.prepare(variant)
        change = self._pushed_change(live, key, options)
        tree = live.tree.without(options.absent) if options.absent else live.tree
        with contextlib.closing(self._landings.land(tree)) as lent:
            yield Push(key, options, live, lent, change)

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

    def push(self, push: Push, digest: sessions.Digest) -> Reply:
        """Applies a push whose payload is in, or answers it from state if it had been applied."""
        push.landing.finish(digest)
        return self._engine.run(lambda: self._apply(push, digest))

    def _apply(self, push: Push, digest: sessions.Digest) -> Reply:
        """On the engine's thread: tells the machine, then does what it says, in order."""
        live = push.session
        if push.change and push.change.before is not live.plans and push.key.base_step == live.machine.step:
            raise errors.UnavailableError(
                f"session {live.machine.name!r}: its hyperparameters were changed by another while this push was coming"
            )
        todo = self._advance(live, events.Pushed(push.key, digest, push.options))
        reply: Reply | None = None
        failure: errors.OptwireError | None = None
        while todo:
            effect, *todo = todo
            match effect:
                case effects.Apply():
                    todo += self._advance(live, updates.run(self._engine, push, effect))
                case effects.Reply():
                    arrays = self._answer(live, push.options.reply, effect.applied_step)
                    reply = Reply(live.ack(effect, sum(leaf.nbytes for leaf in arrays)), arrays)
                case effects.Fail():
                    failure = effect.error
                case effects.Free():
                    live.held.state = None
        if failure is not None:
            raise failure
        assert reply is not None, "a push was neither answered nor refused"
        return reply

    def _answer(self, live: LiveSession, content: sessions.ReplyContent, step: int) -> Params:
        """The arrays that a reply carries to the push that became ``step``."""
        if content is sessions.ReplyContent.NONE:
            return []
        if content is sessions.ReplyContent.PARAMS:
            return self._engine.params(live.held)
        if live.added is None or live.added[0] != step:
            raise errors.StaleStepError(
                f"session {live.machine.name!r}: what step {step} added to the parameters is not kept any more; read "
                "the parameters",
                subject="reply",
                expected="a retry before the next push",
                got=f"a retry at step {live.machine.step}",
                step=live.machine.step,
            )
        return live.added[1]

    def _advance(self, live: LiveSession, event: events.Event) -> Sequence[effects.Effect]:
        live.machine, todo = machine.advance(live.machine, event)
        return todo

    # ------------------------------------------------------------------------------------------------ other verbs

    @contextlib.contextmanager
    def reading(self, *, id_: str = "", name: str = "", worker: str = "", which: str = "") -> Iterator[Read]:
        """The session, the worker's last applied seq, and the parameters or a view of them, all of one step.

        As long as they are being read they count as bytes in flight, since updates meanwhile must leave them alone.
        """
        live = self._find(id_=id_, name=name)
        machine.check_alive(live.machine)
        live.prepare_view(which)

        def look() -> Read:
            machine.check_alive(live.machine)
            live.held.program = live.plan.program  # the one that has the view
            return Read(live.info(), live.worker_seq(worker), self._engine.params(live.held, which))

        with self._landings.counted(live.tree.payload_bytes):
            yield self._engine.run(look)

    def info(self, *, id_: str = "", name: str = "", worker: str = "") -> tuple[sessions.SessionInfo, int]:
        """The session, and the worker's last applied seq (0: none)."""
        live = self._find(id_=id_, name=name)
        return live.info(), live.worker_seq(worker)

    def list(self, page_size: int, after: str) -> tuple[list[sessions.SessionInfo], str]:
        """One page of sessions ordered by name, without their trees, and the token of the next page (empty: none)."""
        with self._lock:
            names = sorted(name for name in self._by_name if name > after)
            page = [self._by_name[name] for name in names[:page_size]]
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
        live = self._find(id_=id_, name=name)
        with live.preparing:
            for _ in range(_CHANGE_TRIES):
                now = planning.current(live.plans, live.machine.step)
                at = live.machine.step if from_step is None else from_step
                # Before anything is compiled for it; again once it is, as the session moves on meanwhile.
                check_incarnation(live.machine, incarnation)
                machine.advance(live.machine, events.Changed(sessions.Change(at, ())))
                plans, values = planning.changed(now, hyperparams, at, self._compiler(live))

                def put(
                    at: int = at, plans: Plans = plans, values: tuple[Any, ...] = tuple(values.items())
                ) -> int | None:
                    check_incarnation(live.machine, incarnation)
                    step = live.machine.step if from_step is None else from_step  # pushes may have come between
                    fitting = planning.moved(plans, at, step)
                    if fitting is None:
                        return None  # among them the first of another plan: other values are to be changed
                    self._advance(live, events.Changed(sessions.Change(step, values)))
                    live.plans = planning.current(fitting, live.machine.step)
                    return step

                if (begins := self._engine.run(put)) is not None:
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
        live = self._find(id_=id_, name=name)
        machine.check_alive(live.machine)
        return planning.describe(live.plan, live.tree, live.machine.step)

    def delete(self, *, id_: str = "", name: str = "") -> sessions.SessionInfo:
        """Ends a session and frees its state; pushes under way are refused."""
        live = self._find(id_=id_, name=name)

        def end() -> sessions.SessionInfo:
            info = live.info()
            for effect in self._advance(live, events.Deleted()):
                assert isinstance(effect, effects.Free)
                live.held.state = None
            return info

        info = self._engine.run(end)
        with self._lock:
            self._by_id.pop(live.machine.id, None)
            self._by_name.pop(live.machine.name, None)
        _log.info("session %s deleted at step %d", live.machine.name, info.step)
        return info

    def drain(self) -> None:
        """Refuses new sessions and pushes from now on; those under way go on."""
        self._draining = True

    # --------------------------------------------------------------------------------------------------- looking up

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise errors.UnavailableError("the server is draining", subject="server", got="draining")

    def _find(self, *, id_: str = "", name: str = "") -> LiveSession:
        with self._lock:
            live = self._by_id.get(id_) if id_ else self._by_name.get(name)
        if live is None:
            raise errors.SessionNotFoundError(
                f"session {id_ or name!r} is not held by this server; sessions in memory end with the server's process",
                subject=id_ or name,
            )
        return live


def _over(what: str, count: int, most: int, *, retry_after_s: float = 0.0) -> errors.LimitError:
    return errors.LimitError(
        f"{what}: {count}, expected at most {most}",
        subject=what,
        expected=f"at most {most}",
        got=str(count),
        retry_after_s=retry_after_s,
    )


def check_incarnation(session: machine.Session, incarnation: int) -> None:
    """Raises IncarnationError where a caller knows another incarnation; 0 stands for any."""
    if incarnation not in (0, session.incarnation):
        raise errors.IncarnationError(
            f"session {session.name!r}: incarnation {incarnation}, expected {session.incarnation}",
            subject=session.name,
            expected=str(session.incarnation),
            got=str(incarnation),
        )
