"""The seed's triple over a remote session: ``opt_init, opt_update, get_params = optwire.jax.optimizer(client, spec)``.

The only module of the client that knows JAX. Gradients are computed under ``jit`` as ever; ``opt_update`` talks to the
server and is called outside of it.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optwire import _client, _session
from optwire_proto import errors, specs

# Any nest of dict, OrderedDict, list, tuple, named tuple and None with arrays at its leaves.
Params = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class RemoteState:
    """What the loop carries from step to step: the parameters, and which step of which session they are.

    A pytree whose children are the parameters. The step is static: hand ``get_params(state)`` to jitted functions, not
    the state, or they compile anew at each step.

    Attributes:
      params: the parameters as JAX arrays, in the structure given to ``opt_init``.
      session_id: 32 hexadecimal digits.
      step: updates applied to ``params``.
    """

    params: Params
    session_id: str = dataclasses.field(metadata={"static": True})
    step: int = dataclasses.field(metadata={"static": True})


class Optimizer(NamedTuple):
    """The seed's triple."""

    init_fn: Callable[[Params], RemoteState]
    update_fn: Callable[[int, Params, RemoteState], RemoteState]
    params_fn: Callable[[RemoteState], Params]


def optimizer(client: _client.Client, spec: specs.Spec, *, name: str | None = None) -> Optimizer:
    """A drop-in for an optimizer of ``jax.example_libraries.optimizers`` whose state lives on the server.

    Example:
      >>> opt_init, opt_update, get_params = optwire.jax.optimizer(client, opt.sgd(0.1))  # doctest: +SKIP
      >>> opt_state = opt_init(params)  # doctest: +SKIP
      >>> opt_state = opt_update(0, grads, opt_state)  # doctest: +SKIP

    Args:
      client: from ``optwire.connect``.
      spec: from ``optwire.optimizers``.
      name: of the session that ``opt_init`` creates, as in ``Client.create_session``.

    Returns:
      ``opt_init(params)`` creates a session. ``opt_update(i, grads, opt_state)`` pushes and returns the state after the
      update; ``i`` must be the step of ``opt_state``, as the server owns the step: else ``StaleStepError`` or
      ``FutureStepError``. An ``opt_state`` that was updated before raises ``StaleStepError``. All but
      ``get_params(opt_state)`` raise ``UnsupportedError`` under ``jit``, ``grad`` or ``vmap``, and what
      ``Client.create_session`` and ``Session.step`` raise.
    """
    sessions: dict[str, _session.Session] = {}

    def init_fn(params: Params) -> RemoteState:
        _refuse_tracers("opt_init", params)
        arrays = _to_jax(params)  # before there is a session, as it may refuse
        session = client.create_session(params, spec, name=name)
        sessions[session.id] = session
        return RemoteState(arrays, session.id, session.step_count)

    def update_fn(i: int, grads: Params, opt_state: RemoteState) -> RemoteState:
        _refuse_tracers("opt_update", (i, grads, opt_state))
        session = sessions.get(opt_state.session_id)
        if session is None:
            raise errors.InvalidArgumentError(
                "opt_update: the state comes from the opt_init of another optimizer", subject="opt_state"
            )
        _check_step(operator.index(i), opt_state.step)
        params = _to_jax(session.step(grads, opt_state.step))
        return RemoteState(params, session.id, session.step_count)

    def params_fn(opt_state: RemoteState) -> Params:
        return opt_state.params

    return Optimizer(init_fn, update_fn, params_fn)


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


def _refuse_tracers(function: str, tree: Any) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        raise errors.UnsupportedError(
            f"{function} was called under jit, grad, vmap or another transformation, but it talks to the server; "
            f"call {function} outside, and transform only what computes the gradients",
            subject=function,
            expected="arrays",
            got="tracers",
        )


def _to_jax(tree: Any) -> Any:
    """The same nest of JAX arrays; refuses what JAX would silently narrow."""

    def convert(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and jax.dtypes.canonicalize_dtype(dtype) != dtype:
            name = jax.tree_util.keystr(path)
            raise errors.TreeError(
                f"params{name}: element type {dtype}, which JAX would narrow; set jax.config.update('jax_enable_x64', "
                f"True), or convert the array",
                subject=name,
                expected=str(jax.dtypes.canonicalize_dtype(dtype)),
                got=str(dtype),
            )
        return jnp.asarray(leaf)

    return jax.tree_util.tree_map_with_path(convert, tree)
