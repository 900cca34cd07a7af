"""Sessions on their way into being: what is checked before a byte comes, and the moment in which they are there.

Works with the registry's table. Knows neither protobuf nor update rules.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence

from optwire_proto import aggregations, codecs, errors, sessions, specs, trees
from optwire_server import compensation, extensions, replicas
from optwire_server import plans as planning
from optwire_server.config import ServerConfig
from optwire_server.engine import device, landing, mean
from optwire_server.engine import engine as engines
from optwire_server.engine import layout as layouts
from optwire_server.live import Creation, LiveSession
from optwire_server.session import machine
from optwire_server.table import Table

_log = logging.getLogger("optwire.creations")


class Creations:
    """Makes sessions and enters them in a table. Thread-safe.

    Args:
      engine: holds their arrays.
      config: of the server.
      landings: where their parameters land.
      table: of all sessions.
      refuse_when_draining: raises UnavailableError once the server drains.
      end: ends a session whose place another one took; called in the session's turn.
    """

    def __init__(
        self,
        engine: engines.Engine,
        config: ServerConfig,
        landings: landing.Landings,
        table: Table,
        *,
        refuse_when_draining: Callable[[], None],
        end: Callable[[LiveSession], device.Work[None]],
    ) -> None:
        self._engine = engine
        self._config = config
        self._landings = landings
        self._table = table
        self._refuse_when_draining = refuse_when_draining
        self._end = end
        # Bytes of state, and of payloads that may wait, of each session that is being created.
        self._creating: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def creating(
        self,
        name: str,
        tree: trees.TreeSpec,
        spec: specs.Spec,
        create_key: str,
        seed: int = 0,
        *,
        extends: sessions.Extension | None = None,
        terms: sessions.Terms = sessions.USUAL,
    ) -> Iterator[Creation]:
        """Prepares a session: checks everything, compiles, lends the landing for the initial parameters.

        Raises:
          SpecError, TreeError, InvalidArgumentError: the request is wrong.
          SessionNotFoundError, OutOfStepError: the session that it extends is not where the client saw it.
          SessionExistsError: the name is taken by another request's session.
          LimitError: too many sessions, too much state, or more workers than can wait for each other.
        """
        self._refuse_when_draining()
        sessions.check_id(create_key, "create_key")
        if name:
            sessions.check_name(name)
        checked = self._engine.check(spec)
        if len(tree.leaves) > self._config.leaves_max:
            raise over("leaves_max", len(tree.leaves), self._config.leaves_max)
        old = self._extended(name, create_key, tree, extends)
        name = old.machine.name if old else name
        whole = extensions.terms(terms, old, self._config.aggregation)
        workers = whole.aggregation or aggregations.SINGLE
        _check_codecs(whole, tree)
        with self._table.lock:
            first_try = self._existing(name, create_key, tree, checked, seed, old, terms) is None
            if first_try:
                self._check_room(tree.payload_bytes, old)
                self._check_waiting_room(workers, layouts.aligned(tree), old)
        compiled = self._engine.compile(checked, tree)
        if old is not None:
            extensions.check_closed(old, compiled)
        compensation.check(workers, tree)
        size = compiled.held_bytes + replicas.held_bytes(whole.params_codec or codecs.RAW, tree)
        size += mean.sum_bytes(tree) if workers.mode is aggregations.Mode.BUFFERED else 0
        room = self._reserved(size, compiled.layout, workers, old) if first_try else contextlib.nullcontext()
        with room, contextlib.closing(self._landings.land(tree, compiled.layout)) as lent:
            yield Creation(
                name=name,
                spec=checked,
                tree=tree,
                create_key=create_key,
                seed=seed,
                program=compiled,
                landing=lent,
                extends=extends,
                extended=old,
                terms=terms,
            )

    def _extended(
        self, name: str, create_key: str, tree: trees.TreeSpec, extends: sessions.Extension | None
    ) -> LiveSession | None:
        """The session that a new one is to extend; None: it extends none, or an earlier try has done it."""
        if extends is None:
            return None
        with self._table.lock:
            if any(live.create_key == create_key for live in self._table.by_id.values()):
                return None
        old = self._table.find(id_=extends.session_id)
        extensions.check(old, extends, name, tree)
        return old

    def create(self, creation: Creation, digest: sessions.Digest) -> sessions.SessionInfo:
        """Creates the session once its parameters are in; a retry under the same key finds it."""
        creation.landing.finish(digest)
        with self._table.lock:
            if existing := self._made_before(creation):
                return existing.info()
        plan = planning.make(creation.spec, creation.program, 0, {})
        held = self._engine.hold(creation.program, creation.landing, plan.rates, creation.seed)
        id_ = secrets.token_hex(16)
        name = creation.name or f"session-{id_[:16]}"
        terms = extensions.terms(creation.terms, creation.extended, self._config.aggregation)
        held.lane.turns = terms.turns or 1
        live = LiveSession(
            machine=machine.Session(id=id_, name=name, aggregation=terms.aggregation or aggregations.SINGLE),
            held=held,
            terms=terms,
            replica=replicas.replica(terms.params_codec or codecs.RAW, creation.tree),
            tree=creation.tree,
            created_spec=creation.spec,
            seed=creation.seed,
            plans=(plan,),
            create_key=creation.create_key,
            created_s=time.time(),
        )
        if (old := creation.extended) and creation.extends:
            pairs = extensions.shared(old, live)
            made = self._engine.work(self._succeed(old, live, creation, creation.extends, pairs), old.held)
        else:
            made = self._enter(live, creation)
        if made is live:
            _log.info("session %s created: %s, %d bytes of state", name, creation.spec.name, live.state_bytes)
        return made.info()

    def _succeed(
        self,
        old: LiveSession,
        live: LiveSession,
        creation: Creation,
        extends: sessions.Extension,
        pairs: Sequence[tuple[int, int]],
    ) -> device.Work[LiveSession]:
        """In the turn of an old session: a new one takes over what is shared, and its place; as ``_enter``."""
        with self._table.lock:
            if existing := self._made_before(creation):
                return existing
        yield from extensions.take_over(self._engine, old, live, extends, pairs, self.check_growth)
        made = self._enter(live, creation)
        if made is live:
            yield from self._end(old)
        return made

    def _enter(self, live: LiveSession, creation: Creation) -> LiveSession:
        """Enters a new session, or finds the one that another try entered while the state was made."""
        with self._table.lock:
            if existing := self._made_before(creation):
                return existing
            if creation.extended is not None:
                del self._table.by_id[creation.extended.machine.id]
            self._table.by_id[live.machine.id] = self._table.by_name[live.machine.name] = live
        return live

    def _made_before(self, creation: Creation) -> LiveSession | None:
        asked = creation.name, creation.create_key, creation.tree, creation.spec, creation.seed
        return self._existing(*asked, creation.extended, creation.terms)

    def _existing(
        self,
        name: str,
        create_key: str,
        tree: trees.TreeSpec,
        spec: specs.Spec,
        seed: int,
        old: LiveSession | None,
        terms: sessions.Terms,
    ) -> LiveSession | None:
        """The session that an earlier try of the same request created; raises where name or key are another's."""
        for live in self._table.by_id.values():
            if live.create_key == create_key:
                same = (live.tree, str(live.created_spec), live.seed) == (tree, str(spec), seed)
                if not same or not terms.fits(live.terms) or name not in ("", live.machine.name):
                    raise errors.SessionExistsError(
                        f"create_key was used for session {live.machine.name!r}, which differs from this one",
                        subject="create_key",
                    )
                return live
        if name in self._table.by_name and self._table.by_name[name] is not old:
            raise errors.SessionExistsError(f"session {name!r} exists already", subject=name)
        return None

    @contextlib.contextmanager
    def _reserved(
        self, state_bytes: int, layout: layouts.Layout, workers: aggregations.Aggregation, old: LiveSession | None
    ) -> Iterator[None]:
        """Keeps room for a session while it is being created."""
        wanted = state_bytes, _waiting_bytes(workers, layout)
        with self._table.lock:
            self._check_room(state_bytes, old)
            self._check_waiting_room(workers, layout, old)
            self._creating.append(wanted)
        try:
            yield
        finally:
            with self._table.lock:
                self._creating.remove(wanted)

    def _check_room(self, state_bytes: int, old: LiveSession | None) -> None:
        """Raises LimitError; a session that takes the place of an ``old`` one is held beside it for a moment."""
        held = self._held_bytes()
        for what, count, most in (
            ("sessions_max", len(self._table.by_id) + len(self._creating) + (old is None), self._config.sessions_max),
            ("state_bytes_max", held + state_bytes, self._config.state_bytes_max),
        ):
            if count > most:
                # What is being created may be another try of the same request, or fail.
                raise over(what, count, most, retry_after_s=0.1 if self._creating else 0.0)

    def check_growth(self, grown_bytes: int) -> None:
        """Raises LimitError where no state may take so many bytes more.

        What is counted is held, so two sessions that grow at the same moment may both do so.
        """
        if grown_bytes:
            with self._table.lock:
                held = self._held_bytes() + grown_bytes
            if held > self._config.state_bytes_max:
                why = (
                    "; leaves without gradients are held apart from the others, and updates in replies are kept for a "
                    "retry: push zeros, ask for parameters, or delete a session"
                )
                raise over("state_bytes_max", held, self._config.state_bytes_max, why)

    def _held_bytes(self) -> int:
        """Of all sessions, and of those that are being created; with the lock held."""
        held = sum(live.held_bytes for live in self._table.by_id.values())
        return held + sum(state_bytes for state_bytes, _ in self._creating)

    def _check_waiting_room(
        self, aggregation: aggregations.Aggregation, layout: layouts.Layout, old: LiveSession | None
    ) -> None:
        """Raises LimitError where workers could not all wait for each other: their steps would never be complete.

        Payloads that wait for a worker which never comes take at most half of the landing bytes from everybody else.
        """
        if not aggregation.waits:
            return
        calls = max(aggregation.workers, aggregation.kept_max)
        if calls > self._config.streams_max:
            raise over("streams_max", calls, self._config.streams_max)
        others = (live for live in self._table.by_id.values() if live is not old)
        room = _waiting_bytes(aggregation, layout) + sum(
            _waiting_bytes(live.machine.aggregation, live.held.layout) for live in others
        )
        reserved = sum(waiting_bytes for _, waiting_bytes in self._creating)
        if room + reserved > self._config.landing_bytes_max // 2:
            most = self._config.landing_bytes_max // 2
            raise errors.LimitError(
                f"landing_bytes_max: {room + reserved} bytes of payloads could wait in all sessions, expected at "
                f"most {most}, half of it",
                subject="landing_bytes_max",
                expected=f"at most {most} bytes of payloads that wait",
                got=str(room + reserved),
                retry_after_s=0.1 if reserved else 0.0,
            )


def _check_codecs(terms: sessions.Terms, tree: trees.TreeSpec) -> None:
    """Raises TreeError, with the name of the leaf, where a codec cannot encode it."""
    for codec in (terms.grads_codec or codecs.RAW, terms.params_codec or codecs.RAW):
        for leaf in tree.leaves:
            try:
                codec.encoded(leaf)
            except errors.TreeError as exc:
                message = f"params[{leaf.name!r}]: {exc}"
                raise errors.TreeError(message, subject=leaf.name, expected=exc.expected, got=exc.got) from exc


def _waiting_bytes(aggregation: aggregations.Aggregation, layout: layouts.Layout) -> int:
    """Bytes of landing buffers that pushes of a session may hold while they wait for others."""
    return aggregation.kept_max * landing.buffer_bytes(layout) if aggregation.waits else 0


def over(what: str, count: int, most: int, why: str = "", *, retry_after_s: float = 0.0) -> errors.LimitError:
    """The error for more of something than there may be."""
    return errors.LimitError(
        f"{what}: {count}, expected at most {most}{why}",
        subject=what,
        expected=f"at most {most}",
        got=str(count),
        retry_after_s=retry_after_s,
    )
