"""The seed's triple over a remote session: ``opt_init, opt_update, get_params = optwire.jax.optimizer(client, spec)``.

Gradients are computed under ``jit`` as ever; the three functions talk to the server and are called outside of it.
"""

from __future__ import annotations

import collections
import operator
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optwire import _client, _session
from optwire.jax import _leaves, _nests, _sessions, _state
from optwire_proto import catalogue, checks, errors, spec_text, specs

# Any pytree with arrays at its leaves.
Params = Any

# Sessions that a triple keeps a handle on, those used last: states may take turns, and a handle holds a stream.
_SESSIONS_MAX = 4


class Optimizer(NamedTuple):
    """The seed's triple."""

    init_fn: Callable[[Params], _state.RemoteState]
    update_fn: Callable[[int, Params, _state.RemoteState], _state.RemoteState]
    params_fn: Callable[[_state.RemoteState], Params]


def optimizer(client: _client.Client, spec: specs.Spec | str, *, name: str | None = None) -> Optimizer:
    """A drop-in for an optimizer of ``jax.example_libraries.optimizers`` whose state lives on the server.

    Example:
      >>> opt_init, opt_update, get_params = optwire.jax.optimizer(client, opt.sgd(0.1))  # doctest: +SKIP
      >>> opt_state = opt_init(params)  # doctest: +SKIP
      >>> opt_state = opt_update(0, grads, opt_state)  # doctest: +SKIP

    Args:
      client: from ``optwire.connect``.
      spec: as in ``Client.create_session``.
      name: of the session that ``opt_init`` creates, as in ``Client.create_session``.

    Returns:
      ``opt_init(params)`` creates a session. ``opt_update(i, grads, opt_state)`` pushes and returns the state after the
      update; ``i`` must be the step of ``opt_state``, as the server owns the step: else ``StaleStepError`` or
      ``FutureStepError``. An ``opt_state`` that was updated before raises ``StaleStepError``.
      ``get_params(opt_state)`` gives the parameters, and ``StaleStepError`` where the session has moved on, as only the
      newest are kept. An ``opt_state`` that comes out of a checkpoint attaches to its session by itself, which must
      have been made with the same spec; parameters then come in the session's structure, until gradients say another.
      Sessions live on until ``client.delete_session``, after another ``opt_init`` too; the triple keeps handles on the
      four that it used last, and attaches to others again when their states come.
      All three raise ``UnsupportedError`` under ``jit``, ``grad`` or ``vmap``, and what ``Client.create_session`` and
      ``Session.step`` raise.
    """
    remote = _Remote(client, spec, name)
    return Optimizer(remote.init, remote.update, remote.params)


class _Held(NamedTuple):
    session: _session.Session
    structure: _leaves.Leaves | None  # without values; None: the session's own


class _Newest(NamedTuple):
    session_id: str
    step: int
    params: Params


class _Remote:
    """What the three functions share. Keeps the parameters of one session at one step; the server has them all."""

    def __init__(self, client: _client.Client, spec: specs.Spec | str, name: str | None) -> None:
        self._client = client
        self._spec = spec
        self._name = name
        self._held: collections.OrderedDict[str, _Held] = collections.OrderedDict()  # by id, used last at the end
        self._newest: _Newest | None = None
        self._lock = threading.Lock()

    def init(self, params: Params) -> _state.RemoteState:
        _state.refuse_traces("opt_init", params)
        session = _sessions.create_session(self._client, params, self._spec, name=self._name)
        leaves = _leaves.leaves_of(params)
        present = ((n, v) for n, v in zip(leaves.names, leaves.values, strict=True) if v is not None)
        # Copies: what was given is the caller's, to be written over or donated.
        by_name = {name: jnp.array(_leaves.to_jax(value, name), copy=True) for name, value in present}
        with self._lock:
            return self._kept(session, session.step_count, leaves, leaves.rebuilt(by_name))

    def update(self, i: int, grads: Params, opt_state: _state.RemoteState) -> _state.RemoteState:
        _state.refuse_traces("opt_update", (i, grads, opt_state))
        step = int(np.asarray(opt_state.step))
        _check_step(operator.index(i), step)
        with self._lock:
            session = self._attached(opt_state)
            params = _sessions.step(session, grads, step)
            return self._kept(session, session.step_count, _leaves.leaves_of(params), params)

    def params(self, opt_state: _state.RemoteState) -> Params:
        _state.refuse_traces("get_params", opt_state)
        session_id, step = opt_state.session_id, int(np.asarray(opt_state.step))
        with self._lock:
            if self._newest is None or self._newest[:2] != (session_id, step) or _is_donated(self._newest.params):
                session = self._attached(opt_state)
                structure = self._held[session_id].structure
                params = session.params()
                _check_kept(session, step)
                arrays = _nests.arrays_of(session, params, "params")
                by_name = _leaves.all_to_jax(session._tree, arrays)
                leaves = _leaves.leaves_of(params) if structure is None else structure
                self._kept(session, step, leaves, leaves.rebuilt(by_name))
            assert self._newest is not None
            return self._newest.params

    def _kept(self, session: _session.Session, step: int, leaves: _leaves.Leaves, params: Params) -> _state.RemoteState:
        self._hold(session, leaves._replace(values=()))
        self._newest = _Newest(session.id, step, params)
        return _state.state_at(step, session.id)

    def _hold(self, session: _session.Session, structure: _leaves.Leaves | None) -> None:
        self._held[session.id] = _Held(session, structure)
        self._held.move_to_end(session.id)
        while len(self._held) > _SESSIONS_MAX:
            _, oldest = self._held.popitem(last=False)
            oldest.session.close()

    def _attached(self, opt_state: _state.RemoteState) -> _session.Session:
        """The handle on the state's session, made where there is none."""
        session_id = opt_state.session_id
        if session_id not in self._held:
            names = [info.name for info in self._client.list_sessions() if info.id == session_id]
            session = self._client.attach(names[0]) if names else None
            if session is None or session.id != session_id:
                raise errors.SessionNotFoundError(
                    f"opt_state: the server has no session {session_id}; it was deleted, or is on another server",
                    subject="opt_state",
                    got=session_id,
                )
            self._check_spec(session)
            self._hold(session, None)
        return self._held[session_id].session

    def _check_spec(self, session: _session.Session) -> None:
        info = session.info()
        spec = self._spec
        mine = checks.check(spec_text.parse(spec, catalogue.CATALOGUE) if isinstance(spec, str) else spec)
        if not info.changes and mine != info.spec:  # changes may have been made to any of its values
            raise errors.SpecError(
                f"opt_state: {session} was made with {specs.shown(info.spec)}, expected {specs.shown(mine)}",
                subject="opt_state",
                expected=specs.shown(mine),
                got=specs.shown(info.spec),
            )


def _is_donated(params: Params) -> bool:
    """Whether a jitted function has taken the memory of what ``get_params`` gave."""
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def _check_kept(session: _session.Session, step: int) -> None:
    if session.step_count != step:
        raise errors.StaleStepError(
            f"get_params: the parameters of step {step} are gone: {session} is at step {session.step_count}, and only "
            "the newest are kept; take the state that opt_update returned last",
            subject="opt_state",
            expected=str(session.step_count),
            got=str(step),
            step=session.step_count,
        )


def _check_step(i: int, step: int) -> None:
    if i == step:
        return
    kind = errors.StaleStepError if i < step else errors.FutureStepError
    raise kind(
        f"opt_update: step {i}, expected {step}, the step of opt_state; the server owns the step",
        subject="i",
        expected=str(step),
        got=str(i),
        step=step,
    )
