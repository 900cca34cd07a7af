"""Session: the user's handle on one optimization held by the server. No gRPC, no protobuf."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import inspect
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np

from optwire import (
    _background,
    _codecs,
    _deadlines,
    _membership,
    _options,
    _payload,
    _route,
    _rows,
    _rpc,
    _stages,
    _state,
)
from optwire_proto import codecs, errors, sessions, specs, tensors, trees

_UNKNOWN = "the push may or may not have been applied: call step again with the same grads, or params"


class Session:
    """A handle on one session; made by ``Client.create_session`` and ``Client.attach``.

    The session itself lives on the server, beyond this handle and this process. A handle is one worker: it counts its
    pushes, so that each is applied exactly once however often it has to be sent. Calls on one handle from several
    threads wait for each other.

    Every method that asks the server raises ``DeadlineError`` or ``UnavailableError`` when no answer came in time,
    ``DetachedError`` after ``close``, and ``SessionNotFoundError`` once the session is deleted or its server restarted.
    """

    def __init__(
        self,
        channel: _rpc.Channel,
        options: _options.Options,
        info: sessions.SessionInfo,
        tree: trees.TreeSpec,
        types: tuple[type, ...],
        worker: str,
        seq: int,
    ) -> None:
        self._channel = channel
        self._options = options
        self._id = info.id
        self._name = info.name
        self._incarnation = info.incarnation
        self._state_bytes = info.state_bytes
        self._tree = tree
        self._types = types
        self._gathers = info.aggregation.gathers  # whether a step is made of pushes that were computed on it
        self._worker = worker
        self._seq = seq  # of this worker's last push known to be applied
        self._step = info.step  # of the parameters last received
        self._late = 0
        self._last_ack: sessions.Ack | None = None
        self._up = _codecs.Up(codecs.parse(info.grads_codec), tree)
        self._downs = _codecs.Downs(codecs.parse(info.params_codec), tree)
        used = [str(codec) for codec in (self._up.codec, self._downs.codec) if codec != codecs.RAW]
        self._route = _route.Route(
            channel,
            options.transport,
            tree,
            session_id=info.id,
            worker=worker,
            codecs=", ".join(used),
            is_encoded=self._up.codec != codecs.RAW,
        )
        self._membership = _membership.Membership(channel, info, worker)
        weakref.finalize(self, self._membership.beats.end)
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._closed = False
        self._pushing: _background.Background | None = None

    @property
    def id(self) -> str:
        """32 hexadecimal digits, made by the server."""
        return self._id

    @property
    def name(self) -> str:
        """As chosen at creation, or made by the server."""
        return self._name

    @property
    def step_count(self) -> int:
        """Updates applied to the parameters that this handle last received; others may have pushed since."""
        return self._step

    @property
    def last_ack(self) -> sessions.Ack | None:
        """The outcome of this handle's last push; None before the first."""
        return self._last_ack

    @property
    def late_count(self) -> int:
        """Pushes of this handle that came too late, and were dropped for the newest parameters: ``late="params"``."""
        return self._late

    def step(
        self,
        grads: Any,
        base_step: int | None = None,
        *,
        loss: float | None = None,
        grad_scale: float = 1.0,
        hyperparams: Mapping[str, float | specs.Spec] | None = None,
        weight: float = 1.0,
        telemetry: bool = False,
        reply: str = "params",
        late: str = "raise",
        rows: str = "lazy",
        out: Any = None,
    ) -> Any:
        """Pushes gradients, applies one update, and returns the new parameters.

        Safe to repeat: after a ``DeadlineError``, ``UnavailableError`` or Ctrl-C it is unknown whether the update was
        applied; calling again with the same gradients finds out, and applies them once.

        Example:
          >>> params = session.step({"w": np.ones(3, np.float32)})  # doctest: +SKIP

        Args:
          grads: a nest of the session's structure, shapes and element types: NumPy arrays, or arrays that NumPy can
            read in place. Not copied as a whole; do not change them during the call. None in the place of an array: the
            leaf, its slots and its count of updates stay as they are, where the optimizer is in ``per_leaf``. ``Rows``
            in the place of an array: gradients of some of its rows; the reply has ``Rows`` there, too, the new values
            of these rows in the order of their indices.
          base_step: the step of the parameters that the gradients were computed on, where that is not ``step_count``.
          loss: the loss of the batch, a finite number, exactly where the optimizer asks for it (``describe().extras``).
          grad_scale: what the gradients were multiplied by (loss scaling); the update divides by it first.
          hyperparams: new values from this step on, as ``set_hyperparams`` takes them; applied with the push or not.
          weight: what the gradients count among those of their step, such as the number of samples behind them; a
            number from 1e-12 to 1e12. Where a push is a step by itself, it counts only in ``combine=sum``.
          telemetry: whether ``last_ack.metrics`` reports norms and the like, at the price of computing them.
          reply: "params", "present" (those of the leaves that have a gradient here, and no others), "updates" (what the
            optimizer added to the parameters), or "none".
          late: what becomes of gradients that come too late, as their step was made without them. "raise":
            ``StaleStepError``, most often ``StepClosedError``. "params": they are dropped and counted in
            ``late_count``, and the newest parameters are returned, for the next step to build on.
          rows: what becomes of rows that ``Rows`` do not name. "lazy": they and their slots stay as they are, where the
            optimizer treats each element by itself. "exact": they are updated as by gradients of zero, which takes the
            server as long as whole gradients.
          out: a nest of the session's structure whose arrays are filled with the reply: NumPy's, writable, apart from
            those of ``grads``, such as ``param_buffers()``. Saves the time that new memory costs. After an error they
            hold anything.

        Returns:
          The parameters after the update, or the updates: ``out`` where it was given, else new NumPy arrays in the
          structure given at creation, with None in the places that "present" leaves out. None where nothing was
          asked for.

        Raises:
          InvalidArgumentError: the loss is missing, or not wanted; a loss or scale that is no finite number; a gradient
            is absent that the optimizer needs; hyperparameters as in ``set_hyperparams``; ``out`` where nothing is
            asked for; "exact" without ``Rows``.
          SpecError: a value that a hyperparameter cannot take.
          NonFiniteError: the session rejects gradients that are not finite; nothing was applied.
          TreeMismatchError: the gradients, or ``out``, differ from the session's tree; nothing was sent.
          StaleStepError: another worker pushed since; call ``params`` and compute again. ``StepClosedError`` where the
            step was made of others' pushes.
          ReplacedError: another process has joined as this worker.
          FutureStepError: ``base_step`` lies beyond the session's step.
          DivergentRetryError: an earlier push of unknown outcome was applied, with other gradients; call ``params``.
          LimitError: too large for the transport "unary", or for the server.
          UnsupportedError: gradients by rows that the optimizer or the session cannot take; docs/rows.md has which.
          SessionFailedError: the session lost its state in a failed update.
        """
        arrays = trees.match_present(self._tree, grads, other=_rows.Rows)
        sparse = _rows.gradients(self._tree, arrays)
        present = [array for array in arrays if array is not None]
        content = _options.reply(reply)
        if content is sessions.ReplyContent.PRESENT and len(present) == len(arrays):
            content = sessions.ReplyContent.PARAMS
        options = sessions.PushOptions(
            grad_scale=_options.positive("grad_scale", grad_scale),
            extras=() if loss is None else (("loss", _options.finite("loss", loss)),),
            hyperparams=tuple(sorted((name, _hyperparam(name, value)) for name, value in (hyperparams or {}).items())),
            absent=tuple(index for index, array in enumerate(arrays) if array is None),
            telemetry=bool(telemetry),
            reply=content,
            weight=_options.weight(weight),
            rows=sparse.counts if sparse else (),
            rows_exact=_rows.exactness(rows, sparse),
        )
        wanted = options.reply is not sessions.ReplyContent.NONE
        may_drop = _options.late(late, options.reply)
        if out is not None and not wanted:
            raise errors.InvalidArgumentError(
                "out: given with reply='none', which brings nothing to fill it with; leave one of them out",
                subject="out",
                expected="None with reply='none'",
                got=type(out).__name__,
            )
        left_out = options.absent if content is sessions.ReplyContent.PRESENT else ()
        _rows.refuse_out(out, options)
        filled = [] if not wanted else sparse.targets() if sparse else self._targets(out, present, left_out)
        with self._using():
            base = self._step if base_step is None else _step_number(base_step)
            try:
                answer = self._push(arrays, sparse, options, base, filled)
            except errors.StaleStepError:
                if not may_drop:
                    raise
                answer = [] if not wanted else sparse.newest(self._read, filled) if sparse else self._read(filled)
                self._late += 1
        if not wanted:
            return None
        if out is not None:
            return out
        if sparse is not None:
            return trees.unflatten(self._tree, sparse.answer(answer), self._types)
        rest = iter(answer)
        leaves = [None if index in left_out else next(rest) for index in range(len(arrays))] if left_out else answer
        return trees.unflatten(self._tree, leaves, self._types)

    def _push(
        self,
        arrays: Sequence[tensors.Array | None],
        sparse: _rows.Gradients | None,
        options: sessions.PushOptions,
        base_step: int,
        filled: list[tensors.Array],
    ) -> list[tensors.Array]:
        """One push, and the arrays of its reply; under the lock."""
        # The server may have to compile what a push asks for beside a plain update, the first time.
        compiles = dataclasses.replace(options, extras=(), weight=1.0) != sessions.PLAIN
        deadline = self._deadline(2 * self._tree.payload_bytes, len(self._tree.leaves) if compiles else 0)
        self._join(deadline)
        key = sessions.PushKey(
            session_id=self._id,
            incarnation=self._incarnation,
            worker=self._worker,
            seq=self._seq + 1,
            base_step=base_step,
            epoch=self._membership.epoch,
        )
        is_present = options.reply is sessions.ReplyContent.PRESENT
        is_params = is_present or options.reply is sessions.ReplyContent.PARAMS
        down = self._downs.of(options.absent if is_present else ())
        receive = sparse.receiving(filled) if sparse else down.receiving(filled, is_params=is_params)
        with self._route.sharing.settled():
            push = self._route.way(deadline, sparse.payload.length if sparse else None)
            payload = sparse.payload if sparse else self._up.outgoing(arrays, options.grad_scale)

            def attempt(_: int) -> tuple[sessions.Ack, list[tensors.Array]]:
                # What the reply may differ from: an earlier try may have changed it.
                told = dataclasses.replace(options, view_step=down.step) if is_params else options
                return push(deadline, key, told, payload, receive)

            with self._up.settling(key.seq, payload):
                ack, answer = _deadlines.retried(attempt, deadline, f"push on step {base_step} of {self}", _UNKNOWN)
            self._up.applied(payload, ack)
            self._seq, self._step, self._last_ack = key.seq, ack.step, ack
        return answer

    def _leave(self, deadline: _deadlines.Deadline) -> None:
        """Is none of the session's workers any more; also while a call is under way."""
        self._membership.leave(deadline)

    def _join(self, deadline: _deadlines.Deadline) -> None:
        """Becomes one of the session's workers, where it has some; under the lock."""
        seq = self._membership.join(deadline)
        if seq is not None:
            self._seq = seq

    def step_async(self, grads: Any, base_step: int | None = None, **arguments: Any) -> concurrent.futures.Future[Any]:
        """Does what ``step`` does, on a thread of the handle, and returns at once.

        Several wait for each other in the order in which they were asked for, and other calls on the handle wait for
        all that were asked for before them. ``base_step`` is ``step_count`` when the turn comes. Do not change the
        gradients, nor read ``out``, before the future is done. Where 64 wait already, the call waits until one begins.

        At the end of the program pushes that were asked for are made, up to the first that fails; the others are
        dropped, with a warning in the log. Each has its own deadline.

        Example:
          >>> future = session.step_async(grads)  # doctest: +SKIP
          >>> params = future.result()  # doctest: +SKIP

        Args:
          grads: as ``step`` takes them.
          base_step: as ``step`` takes it.
          **arguments: as ``step`` takes them.

        Returns:
          A future of what ``step`` returns or raises. It can be cancelled until its turn comes; a cancelled push was
          never sent.

        Raises:
          DetachedError: the handle was closed.
          TypeError: ``step`` has no such argument.
        """
        _STEP.bind(self, grads, base_step, **arguments)
        return self._later(functools.partial(self.step, grads, base_step, **arguments))

    def _later(self, task: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """Does a task in its turn; as ``step_async``."""
        with self._asking:
            self._check_open()
            if self._pushing is None:
                self._pushing = _background.Background(f"optwire-{self._name}")
                weakref.finalize(self, self._pushing.end)
        # Not inside: it may wait for room, and a callback of what is waited for may ask as well.
        return self._pushing.submit(task)

    def grad_buffers(self) -> Any:
        """Arrays to write gradients to, in the structure given at creation; always the same ones. Zeros at first.

        Nobody but you writes to them: a ``step`` with other gradients leaves them as they are. A forked process has its
        own. They save a copy where a push would need one; ``step`` takes any others as well. Where memory is shared
        with the server they lie in it: do not write to them while a ``step`` with them is under way.
        """
        if (buffers := self._route.grads()) is None:
            with self._using():
                buffers = self._route.make_buffers(self._deadline())
        return trees.unflatten(self._tree, buffers, self._types)

    def param_buffers(self) -> Any:
        """Arrays for ``step(..., out=)`` to fill, in the structure given at creation; always the same ones.

        Zeros, until a step has filled them. Where memory is shared with the server they lie in it, and any step may
        write to them, whatever its ``out``. A forked process has its own.
        """
        if (buffers := self._route.params()) is None:
            with self._using():
                buffers = self._route.make_param_buffers(self._deadline())
        return trees.unflatten(self._tree, buffers, self._types)

    def params(self, which: str = "", *, out: Any = None) -> Any:
        """The newest parameters: new NumPy arrays in the structure given at creation.

        The next ``step`` builds on them, whatever became of an earlier push.

        Args:
          which: "" for the ones that gradients are computed on; others that the spec keeps beside them: "ema" for the
            moving average of ``ema_params``, "eval" for the parameters that a schedule-free or lookahead optimizer is
            to be judged by. ``describe().views`` says which there are.
          out: a nest of arrays to be filled and returned, as in ``step``.

        Raises:
          InvalidArgumentError: the spec keeps no such parameters.
        """
        if not isinstance(which, str):
            raise _options.wrong("which", "text", which)
        filled = self._targets(out)
        with self._using():
            arrays = self._read(filled, which)
        return trees.unflatten(self._tree, arrays, self._types) if out is None else out

    def rows(self, indices: Mapping[str, Any], *, which: str = "") -> dict[str, Any]:
        """Some rows of the newest parameters, and whole leaves, all of one step; nothing else travels.

        The next ``step`` builds on them, as on ``params``.

        Example:
          >>> session.rows({"table": [7, 3, 7], "dense/w": None})  # doctest: +SKIP

        Args:
          indices: by name of a leaf, which rows along its first axis, in any order, and the same row may come again;
            None: all of the leaf.
          which: as in ``params``.

        Returns:
          New NumPy arrays by name of their leaf: the rows, in the order of the indices.

        Raises:
          InvalidArgumentError: a name of no leaf, indices that are none of its rows; the spec keeps no such parameters.
          LimitError: more indices than fit one message, a million.
        """
        if not isinstance(which, str):
            raise _options.wrong("which", "text", which)
        wanted = _rows.Wanted(self._tree, indices)
        filled = wanted.targets()
        with self._using():
            return wanted.answer(self._read(filled, which, wanted.sent))

    def _read(self, filled: list[tensors.Array], which: str = "", wanted: _rows.Sent = ()) -> list[tensors.Array]:
        """The newest parameters, which the next push builds on; under the lock."""
        deadline = self._deadline(self._tree.payload_bytes)
        info, seq, arrays = _deadlines.retried(
            lambda _: self._channel.read_params(
                deadline,
                id=self._id,
                worker=self._worker,
                epoch=self._membership.epoch,
                incoming=_payload.Incoming(filled),
                which=which,
                wanted=wanted,
            ),
            deadline,
            f"params of {self}",
        )
        if info.incarnation == self._incarnation:
            self._up.learned(seq)
        else:
            self._up.forget()
            self._downs.forget()
        self._incarnation, self._seq, self._step = info.incarnation, seq, info.step
        return arrays

    def state(self) -> _state.State:
        """The whole state, parameters and slots, of one step: new NumPy arrays by name.

        With it ``load_state`` takes this session, or another of the same tree and optimizer, to where this one is now.

        Raises:
          LimitError: more arrays than one message can name.
        """
        with self._using():
            deadline = self._deadline(self._state_bytes)
            info, names, arrays = _deadlines.retried(
                lambda _: self._channel.read_state(deadline, id=self._id), deadline, f"state of {self}"
            )
        return _state.State(info.step, dict(zip(names, arrays, strict=True)))

    def load_state(
        self, state: _state.State | Mapping[str, Any], *, step: int | None = None, base_step: int | None = None
    ) -> None:
        """Replaces arrays of the session's state, all of them at once or none; those not named stay as they are.

        A new incarnation of the session begins, at which this handle goes on; what other handles push is refused with
        ``IncarnationError`` until they have called ``params``. Hyperparameters stay as they are.

        Example:
          >>> checkpoint = session.state()  # doctest: +SKIP
          >>> session.load_state(checkpoint)  # doctest: +SKIP
          >>> session.load_state({"params/w": np.zeros(3, np.float32)})  # doctest: +SKIP

        Args:
          state: what ``state`` returned, or arrays by name, in the shapes and element types that ``state`` gives them.
          step: number of updates that the session counts afterwards; None: that of a ``State``, else as many as before.
          base_step: number of updates that the session must have applied; None: any.

        Raises:
          StaleStepError, FutureStepError: the session is at another step than ``base_step``; nothing was changed.
          TreeMismatchError: the state has no array of this name, shape and element type; nothing was changed.
          TreeError: something cannot be sent, or there is nothing.
          IncarnationError: the session's history was rewritten since; call ``params`` or attach again.
        """
        flat = _state.flat(state)
        if step is None and isinstance(state, _state.State):
            step = state.step
        if step is not None:
            step = _step_number(step, "step")
        if base_step is not None:
            base_step = _step_number(base_step)
        payload, load_key = _payload.Outgoing(flat.arrays), uuid.uuid4().hex
        with self._using():
            deadline = self._deadline(payload.length)
            key = sessions.LoadKey(
                session_id=self._id, incarnation=self._incarnation, load_key=load_key, base_step=base_step, step=step
            )
            info = _deadlines.retried(
                lambda _: self._channel.load_state(deadline, key, flat.spec, payload),
                deadline,
                f"load_state of {self}",
                "the state may or may not have been loaded",
            )
            self._up.forget()
            self._downs.forget()
            self._incarnation, self._seq, self._step = info.incarnation, 0, info.step

    def info(self) -> sessions.SessionInfo:
        """What the server says about the session now; changes nothing here, ``step_count`` included."""
        with self._using():
            deadline = self._deadline()
            info, _ = _deadlines.retried(
                lambda _: self._channel.get_session(deadline, id=self._id), deadline, f"info of {self}"
            )
            transport, reason = self._route.sharing.transport
            return dataclasses.replace(info, transport=transport, transport_reason=reason)

    def workers(self) -> tuple[sessions.WorkerInfo, ...]:
        """The workers that the session knows, ordered by id: where each stands, and whether the next step waits for it.

        Asks also while a ``step`` of this handle waits for others. Empty in a session of "single".
        """
        self._check_open()
        deadline = self._deadline()
        _, workers = _deadlines.retried(
            lambda _: self._channel.workers(deadline, id=self._id), deadline, f"workers of {self}"
        )
        return workers

    def describe(self) -> sessions.OptimizerInfo:
        """The session's optimizer as its next step will run it, and what every leaf gets."""
        with self._using():
            deadline = self._deadline()
            return _deadlines.retried(
                lambda _: self._channel.describe_optimizer(deadline, id=self._id), deadline, f"describe of {self}"
            )

    def set_hyperparams(
        self,
        hyperparams: Mapping[str, float | specs.Spec] | None = None,
        /,
        *,
        from_step: int | None = None,
        **named: float | specs.Spec,
    ) -> int:
        """Changes hyperparameters from a step on, for all workers. Learning rates compile nothing anew.

        Example:
          >>> session.set_hyperparams(learning_rate=3e-4)  # doctest: +SKIP
          >>> session.set_hyperparams({"partition.transforms['head/**'].adamw.learning_rate": 1e-4})  # doctest: +SKIP

        Args:
          hyperparams: new values by path inside the spec, or by the end of a path that no other ends with;
            ``describe()`` lists them. ``learning_rate`` also means the seed's ``step_size``. Values are numbers, or
            schedules where a learning rate stands.
          from_step: first step (0-based) that uses them; None: the next one.
          **named: the same, by keyword.

        Returns:
          The first step (0-based) that uses them.

        Raises:
          InvalidArgumentError: a name that means no argument or several; no number; a step that has passed.
          SpecError: a value that the argument cannot take.
        """
        values = {name: _hyperparam(name, value) for name, value in {**(hyperparams or {}), **named}.items()}
        if from_step is not None:
            from_step = _step_number(from_step, "from_step")
        with self._using():
            deadline = self._deadline()
            return _deadlines.retried(
                lambda _: self._channel.update_hyperparams(
                    deadline,
                    id=self._id,
                    incarnation=self._incarnation,
                    hyperparams=values,
                    from_step=from_step,
                ),
                deadline,
                f"set_hyperparams of {self}",
                "they may or may not have been changed",
            )

    def _extension(self) -> sessions.Extension:
        """Where this handle last saw the session; what ``Client.create_session`` says of the one it extends."""
        with self._using():
            return sessions.Extension(self._id, self._incarnation, self._step)

    def close(self) -> None:
        """Releases the handle; the session lives on and can be attached to. Waits for a call under way; idempotent.

        A worker leaves its session: the others' steps do not wait for it any more. What ``step_async`` was asked for
        and has not begun ends with ``DetachedError``.
        """
        with self._asking:
            self._closed = True  # from here on nothing begins
        if self._pushing is not None:
            self._pushing.close()
        with self._lock:
            self._route.close()
            self._leave(_deadlines.Deadline(_options.CLOSE_S))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self}: a handle cannot be copied or pickled; client.attach({self._name!r}) makes another one"
        )

    def __repr__(self) -> str:
        return f"<optwire.Session {self._name!r} step_count={self._step}{' closed' * self._closed}>"

    def __str__(self) -> str:
        return f"session {self._name!r}"

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        if self._pushing is not None:
            self._pushing.wait()
        with self._lock:
            self._check_open()
            try:
                yield
            except errors.SessionNotFoundError as exc:  # the server was asked by id; users know the name
                raise errors.SessionNotFoundError(f"{self}: {exc}", subject=self._name) from exc

    def _check_open(self) -> None:
        if self._closed:
            raise errors.DetachedError(f"{self}: this handle was closed; attach again", subject=self._name)

    def _targets(
        self, out: Any, grads: Sequence[tensors.Array] = (), absent: Sequence[int] = ()
    ) -> list[tensors.Array]:
        """The arrays that a reply goes to: those of ``out``, none of which may lie over another or the gradients.

        Without those at the positions ``absent``, which it does not carry.
        """
        if out is None:
            return _payload.fresh(self._tree.without(absent))  # before anything is sent: there may be no memory
        arrays = trees.match_into(self._tree, out)
        if absent:
            arrays = [array for index, array in enumerate(arrays) if index not in absent]
        if _payload.overlap(arrays, grads):
            raise errors.InvalidArgumentError(
                "out: arrays that share memory with each other or with grads, expected ones that lie apart; a push "
                "that has to be sent again would be another",
                subject="out",
                expected="memory of its own",
                got="shared memory",
            )
        return arrays

    def _deadline(self, payload_bytes: int = 0, leaves: int = 0) -> _deadlines.Deadline:
        return _deadlines.Deadline(self._options.timeout_s, payload_bytes, leaves)

    def _staging(self) -> _stages.Stage:
        """A stage for the next push; see ``Route.staging``."""
        with self._using():
            return self._route.staging(self._deadline(), self._incarnation)


_STEP = inspect.signature(Session.step)


def _step_number(value: object, name: str = "base_step") -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= int(value) < 2**64:
        raise _options.wrong(name, "a number of steps", value)
    return int(value)


def _hyperparam(name: object, value: object) -> float | specs.Spec:
    if not isinstance(name, str):
        raise _options.wrong("hyperparams", "names as text", name)
    if isinstance(value, specs.Spec):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and specs.is_number(value):
        return value
    return _options.finite(name, value)
