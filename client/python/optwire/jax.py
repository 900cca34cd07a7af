"""The seed's triple over a remote session: ``opt_init, opt_update, get_params = optwire.jax.optimizer(client, spec)``.

And ``export_update``, which turns an update rule of your own into a file that a server can run.

The only module of the client that knows JAX. Gradients are computed under ``jit`` as ever; ``opt_update`` talks to the
server and is called outside of it.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export as jax_export

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


def export_update(
    update: Callable[..., Any],
    *,
    slots: int,
    shape: Sequence[int] | None = None,
    dtype: str = "float32",
    platforms: Sequence[str] = ("cpu",),
) -> bytes:
    """Exports an update rule as a file for ``optwire.optimizers.exported``; needs flatbuffers (``optwire[jax]``).

    The file holds the path of the source and the names of its functions, as all of JAX's exports do;
    ``jax.config.update("jax_traceback_in_locations_limit", 0)`` beforehand keeps them out.

    Example:
      >>> def sgd(step, rate, grad, param):
      ...     return param - rate * grad
      >>> spec = optwire.optimizers.exported(export_update(sgd, slots=0), 0.1)  # doctest: +SKIP

    Args:
      update: ``(step, rate, grad, param, *slots) -> (param, *slots)``, straight JAX without loops, branches, random
        numbers or sorting. ``step`` has shape () and type int32 and counts from 0, ``rate`` is the learning rate, shape
        () and float32; the others have the shape and element type of a leaf. Slots start as zeros.
      slots: how many it keeps for each leaf.
      shape: of the leaves it is for; None: any, each given flattened, shape (n,).
      dtype: element type of the leaves, a name that JAX knows.
      platforms: of the servers it is for.

    Raises:
      SpecError: the update does not return a parameter and its slots in the shapes and types that it got.
    """
    kind = jnp.dtype(dtype)
    sizes = jax_export.symbolic_shape("n") if shape is None else tuple(shape)
    leaf = jax.ShapeDtypeStruct(sizes, kind)
    step, rate = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)

    def flat(step: Any, rate: Any, grad: Any, param: Any, *slots: Any) -> tuple[Any, ...]:
        results = update(step, rate, grad, param, *slots)
        # A float32 rate promotes 16-bit leaves; what comes back must have their type.
        return tuple(jnp.asarray(result, kind) for result in (results if isinstance(results, tuple) else (results,)))

    with jax.enable_x64(kind == jnp.float64):
        made = jax_export.export(jax.jit(flat), platforms=tuple(platforms))(step, rate, leaf, leaf, *[leaf] * slots)
    got = [(aval.shape, aval.dtype) for aval in made.out_avals]
    expected = [(leaf.shape, leaf.dtype)] * (1 + slots)
    if got != expected:
        raise errors.SpecError(
            f"update: returns {got}, expected the parameter and {slots} slots: {expected}",
            subject="update",
            expected=str(expected),
            got=str(got),
        )
    return bytes(made.serialize())


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
