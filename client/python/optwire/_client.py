"""Client: a connection to a server, and the sessions on it."""

from __future__ import annotations

import uuid
import weakref
from types import TracebackType
from typing import Any, Self

from optwire import _deadlines, _options, _payload, _rpc, _session
from optwire_proto import aggregations, catalogue, codecs, errors, limits, sessions, spec_text, specs, trees


def connect(target: str, *, timeout: float = 30.0, transport: str = "auto") -> Client:
    """Makes a client of the server at ``target``. The connection itself is made by the first call.

    Example:
      >>> client = optwire.connect("localhost:50051")  # doctest: +SKIP

    Args:
      target: a gRPC target: "host:port" or "unix:/path".
      timeout: deadline of every call, retries included, in seconds. A call that carries parameters or gradients gets
        one second more for every 4 MiB, in each direction; creating a session, or pushing with options such as
        telemetry, one for every 10 leaves, as the server may have to compile the update first.
      transport: how pushes travel. "shared_memory": where the server is of this host and user, gradients and parameters
        do not travel at all (docs/shared-memory.md). "stream": in chunks on one long-lived stream a session. "unary":
        in one message each way, at most 2 MiB. "auto": in one message up to 64 KiB; beyond, in shared memory where the
        server hands some over, and otherwise in chunks.

    Raises:
      InvalidArgumentError: an argument has a value it cannot take.
    """
    return Client(_options.Options(target=target, timeout_s=timeout, transport=_options.transport(transport)))


class Client:
    """A connection to one server; made by ``connect``. Safe to use from several threads; a context manager.

    Every method raises ``DeadlineError`` or ``UnavailableError`` when no answer came in time, and ``DetachedError``
    after ``close``.
    """

    def __init__(self, options: _options.Options) -> None:
        self._options = options
        self._channel = _rpc.Channel(options)
        self._handles: weakref.WeakSet[_session.Session] = weakref.WeakSet()

    def create_session(
        self,
        params: Any,
        spec: specs.Spec | str,
        *,
        name: str | None = None,
        seed: int = 0,
        extends: _session.Session | None = None,
        aggregation: str | None = None,
        worker: int | None = None,
        turns: int | None = None,
        grads_codec: str | None = None,
        params_codec: str | None = None,
    ) -> _session.Session:
        """Creates a session from initial parameters and an optimizer.

        With ``extends`` the new session takes the place, the name and the step of another one, all at once or not at
        all: every leaf of that one must be there, with its shape and element type, and keeps its parameters and slots;
        only for leaves that are new, ``params`` counts. The other handle is of no further use.

        Args:
          params: any nest of dict, OrderedDict, list, tuple, named tuple and None with arrays at its leaves, or one
            array. Its structure, shapes and element types are the session's for good.
          spec: the optimizer, from ``optwire.optimizers`` and ``optwire.optax``, or as text:
            ``"chain(clip_by_global_norm(1.0), adamw(1e-3))"``.
          name: 1 to 128 characters of ``A-Z a-z 0-9 . _ -``, not starting with a dot; None: the server makes one.
          seed: of what is random in the updates, 0 to 2**64 - 1: a function of it and the number of updates.
          extends: the session to be extended, at the step that this handle last saw.
          aggregation: how pushes become steps. "single": each that fits is one step. "sync(4)": the mean of one push of
            each of four workers is one step, and each ``step`` waits for it; the timeout must cover the slowest worker.
            "k_of_n(3, 4)": of the first three. "quorum(2, 8, deadline_s=5)": of those that are there. "async",
            "bounded_staleness(4)", "buffered(8)": of gradients on older parameters as well. docs/workers.md has all of
            them, and their options. None: as in the session that is extended, otherwise what the server was started
            with, which is "single" unless it was told another.
          worker: the rank of this handle, which joins the session as in ``attach``. None: it joins with its first push,
            as worker 0 where there are ranks, or as that of the handle whose session is extended.
          turns: blocks of this session, 1 to 64, that the server's device works off for each one of a session with 1
            when several sessions wait for it. None: as in the session that is extended, otherwise 1.
          grads_codec: how gradients travel, of all workers. "f32": as they are. "bf16", "f16": rounded to half as many
            bytes. "int8", "sign", "top_k(0.01)", which sends a hundredth of the values: what they leave behind is kept
            by the handle, and added to the next gradients. docs/codecs.md says what they do to training. None: as in
            the session that is extended, otherwise "f32".
          params_codec: how parameters travel in the replies to pushes; ``params`` is always exact. "int8", "sign" and
            "top_k(...)" send how they differ from what was sent before, once the handle had its first reply. Of two
            "top_k(...)", both have one fraction. None: as in the session that is extended, otherwise "f32".

        Returns:
          A handle at step 0, or at the step of the session that was extended.

        Raises:
          TreeError: something in ``params`` cannot be served.
          SpecError: the server does not know the optimizer, or an argument has a value it cannot take.
          SessionExistsError: the name is taken.
          LimitError: the server has no room.
          TreeMismatchError: a leaf of the session to be extended is missing, or of another shape or element type.
          StaleStepError, IncarnationError: that session has moved on; call its ``params`` first.
        """
        if isinstance(spec, str):
            spec = spec_text.parse(spec, catalogue.CATALOGUE)
        if not isinstance(spec, specs.Spec):
            raise errors.SpecError(
                f"spec: {type(spec).__name__}, expected an optimizer of optwire.optimizers or optwire.optax, or text",
                subject="spec",
                expected="optwire.optimizers.Spec",
                got=type(spec).__name__,
            )
        flat = trees.flatten(params)
        payload = _payload.Outgoing(flat.arrays)
        deadline = _deadlines.Deadline(self._options.timeout_s, payload.length, leaves=len(flat.spec.leaves))
        checked_name = "" if name is None else sessions.check_name(name)
        create_key = uuid.uuid4().hex
        checked_seed = _options.whole("seed", seed)
        if extends is not None and not isinstance(extends, _session.Session):
            raise _options.wrong("extends", "an optwire.Session", extends)
        extension = extends._extension() if extends is not None else None
        terms = sessions.Terms(
            aggregation=None if aggregation is None else aggregations.parse(aggregation),
            turns=_options.plain(turns),
            grads_codec=None if grads_codec is None else codecs.parse(grads_codec, "grads_codec"),
            params_codec=None if params_codec is None else codecs.parse(params_codec, "params_codec"),
        )
        if worker is not None:
            _check_rank(worker, terms.aggregation or aggregations.SINGLE)
        info = _deadlines.retried(
            lambda _: self._channel.create_session(
                deadline,
                name=checked_name,
                tree=flat.spec,
                spec=spec,
                create_key=create_key,
                seed=checked_seed,
                params=payload,
                extends=extension,
                terms=terms,
            ),
            deadline,
            f"create_session {checked_name!r}" if checked_name else "create_session",
            "the session may or may not have been created",
        )
        own = _own_worker(worker, info.aggregation, extends)
        handle = _session.Session(self._channel, self._options, info, flat.spec, flat.types, worker=own, seq=0)
        return self._joined(handle, worker)

    def attach(self, name: str, *, worker: int | None = None) -> _session.Session:
        """A new handle, and with it a worker, on a session that exists.

        Parameters come in the structure the creating client gave; its named tuples as types that look the same.

        In a session whose steps are of several workers the handle joins: others wait for it as long as it is heard of,
        and no longer than its lease once it is not; ``close`` leaves. Whoever joins as a worker that another process
        is, takes its place: from then on the other's pushes raise ``ReplacedError``.

        Args:
          name: of the session.
          worker: the rank of this handle, from 0, which joins at once; whoever attaches with it again, after a restart,
            is the same worker and goes on with its count of pushes. In a session of "sync(4)", 0 to 3. None: a worker
            of its own, who joins with its first push; it can only read where there are ranks.

        Raises:
          SessionNotFoundError: no session has this name.
          InvalidArgumentError: the session has no worker of this rank.
          LimitError: the session has as many workers as it can have.
        """
        sessions.check_name(name)
        own = uuid.uuid4().hex if worker is None else _own_worker(worker)
        deadline = self._deadline()
        info, seq = _deadlines.retried(
            lambda _: self._channel.get_session(deadline, name=name, worker=own), deadline, f"attach {name!r}"
        )
        if info.tree is None:
            raise errors.InternalError(f"attach {name!r}: the server answered without the session's tree")
        if worker is not None:
            _check_rank(worker, info.aggregation)
        handle = _session.Session(self._channel, self._options, info, info.tree, (), worker=own, seq=seq)
        return self._joined(handle, worker)

    def _joined(self, handle: _session.Session, worker: int | None) -> _session.Session:
        """A handle, as a worker of its session where it is of a rank."""
        self._handles.add(handle)
        if worker is not None:
            try:
                handle._join(self._deadline())
            except BaseException:
                handle.close()
                raise
        return handle

    def _workers(self, name: str) -> tuple[sessions.SessionInfo, tuple[sessions.WorkerInfo, ...]]:
        """A session and its workers, without a handle on it."""
        sessions.check_name(name)
        deadline = self._deadline()
        return _deadlines.retried(
            lambda _: self._channel.workers(deadline, name=name), deadline, f"workers of session {name!r}"
        )

    def list_sessions(self) -> list[sessions.SessionInfo]:
        """All sessions of the server, ordered by name, without their trees; asks page by page."""
        found: list[sessions.SessionInfo] = []
        deadline = self._deadline()
        token = ""
        while True:
            page, token = _deadlines.retried(
                lambda _, token=token: self._channel.list_sessions(deadline, token),  # type: ignore[misc]
                deadline,
                "list_sessions",
            )
            found += page
            if not token:
                return found

    def delete_session(self, name: str) -> None:
        """Ends a session and frees its state on the server, for all who are attached.

        Raises:
          SessionNotFoundError: no session has this name.
        """
        sessions.check_name(name)
        deadline = self._deadline()

        def attempt(tries: int) -> None:
            try:
                self._channel.delete_session(deadline, name=name)
            except errors.SessionNotFoundError:
                if tries == 1:
                    raise  # otherwise an earlier try did it, and only its answer was lost

        _deadlines.retried(
            attempt, deadline, f"delete_session {name!r}", "the session may or may not have been deleted"
        )

    def server_info(self) -> sessions.ServerInfo:
        """What the server is: versions, devices, limits, catalogue."""
        deadline = self._deadline()
        return _deadlines.retried(lambda _: self._channel.server_info(deadline), deadline, "server_info")

    def close(self) -> None:
        """Ends every call under way and the connection; handles are of no further use, sessions live on. Idempotent.

        Workers leave their sessions before.
        """
        deadline = _deadlines.Deadline(_options.CLOSE_S)
        for handle in tuple(self._handles):
            handle._leave(deadline)
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<optwire.Client {self._options.target!r}>"

    def _deadline(self, payload_bytes: int = 0) -> _deadlines.Deadline:
        return _deadlines.Deadline(self._options.timeout_s, payload_bytes)


def _own_worker(
    rank: int | None,
    aggregation: aggregations.Aggregation = aggregations.SINGLE,
    extends: _session.Session | None = None,
) -> str:
    """The id of a handle's worker; raises InvalidArgumentError where there is none of this rank."""
    if rank is not None:
        _check_rank(rank, aggregation)
        return sessions.worker_id(rank)
    if extends is not None and aggregation.includes(extends._worker):
        return extends._worker
    return sessions.worker_id(0) if aggregation.is_ranked else uuid.uuid4().hex


def _check_rank(rank: object, aggregation: aggregations.Aggregation) -> None:
    most = (aggregation.workers if aggregation.is_ranked else limits.WORKERS_MAX) - 1
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= most:
        raise _options.wrong("worker", f"a rank from 0 to {most}", rank)
