"""A session as an optax transformation: updates come from the server, eagerly and under ``jit``, ``scan`` and ``cond``.

Under a trace the push is a callback of JAX's, whose inside is ``_pushing``. What orders pushes is the state that one
hands to the next. JAX's own order (``ordered=True``) would add nothing, and an error in it fails every ordered callback
that the process makes afterwards. ``vmap`` and ``grad`` over a push are refused while tracing, by a guard that every
operand passes.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from optwire import _session
from optwire.jax import _leaves, _pushing, _state
from optwire_proto import errors


def transformation(session: _session.Session) -> Any:
    """An ``optax.GradientTransformationExtraArgs`` whose state lives in a session; needs optax (``optwire[jax]``).

    Works as it is in a plain optax loop, ``flax.training.train_state.TrainState``, ``flax.nnx.Optimizer`` and Equinox
    loops, eagerly or under ``jit``, ``lax.scan`` and ``lax.cond``. Gradients may be any pytree whose leaves have the
    session's names; ``optwire.jax.create_session`` makes a session from one.

    Example:
      >>> session = optwire.jax.create_session(client, params, opt.adam(1e-3))  # doctest: +SKIP
      >>> tx = optwire.jax.transformation(session)  # doctest: +SKIP
      >>> opt_state = tx.init(params)  # doctest: +SKIP
      >>> updates, opt_state = tx.update(grads, opt_state)  # doctest: +SKIP
      >>> params = optax.apply_updates(params, updates)  # doctest: +SKIP

    Args:
      session: a handle; its parameters are those that ``params`` must start from. One process pushes.

    Returns:
      ``init(params)`` checks names, shapes and element types, and gives the ``RemoteState`` of the session's step.
      ``update(updates, state, params=None, **extra_args)`` pushes, and gives what the optimizer adds to the parameters.
      ``value`` or ``loss`` among the extra arguments is the loss, where the optimizer asks for one; others are left
      alone. The same gradients on the same state are pushed once.

    Raises:
      UnsupportedError: optax is not installed. From ``update``: under ``vmap``, ``grad`` or another differentiation.
      InvalidArgumentError: from ``update``: a loss is missing, or the state is of another session.
      TreeMismatchError: from both: other leaves than the session's.
      StaleStepError: from ``update``: the state was pushed on before with other gradients, as ``optax.MultiSteps``
        does; or another worker pushed since. Accumulate on the server: ``optwire.optimizers.accumulate``.

    Under ``jit``, errors of the push itself arrive inside JAX's ``jax.errors.JaxRuntimeError``, whose text has theirs.
    """
    pushing = _pushing.Pushing(session)
    wants_loss = "loss" in session.describe().extras

    def init(params: Any) -> _state.RemoteState:
        _leaves.in_order(session._tree, _leaves.leaves_of(params), "params")
        return _state.state_at(session.step_count, session.id)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, _state.RemoteState]:
        del params  # the server has them
        leaves = _leaves.leaves_of(updates)
        grads = dict(enumerate(_leaves.in_order(session._tree, leaves, "updates")))
        grads = {index: grad for index, grad in grads.items() if grad is not None}
        loss = _loss(extra_args, session) if wants_loss else None
        step, arrays = _push(pushing, tuple(grads), (state.step, state.token, loss, tuple(grads.values())))
        added = {session._tree.leaves[index].name: array for index, array in zip(grads, arrays, strict=True)}
        return leaves.rebuilt(added), _state.RemoteState(step, state.token)

    return _optax().GradientTransformationExtraArgs(init, update)


def _push(pushing: _pushing.Pushing, present: tuple[int, ...], operands: Any) -> tuple[Any, Any]:
    """The step after the push and the updates: arrays, or tracers of what a callback will give."""
    if not _state.is_traced(operands):
        step, arrays = pushing.push(present, *operands)
        return jnp.asarray(step), [jnp.asarray(array) for array in arrays]
    flat, treedef = jax.tree.flatten(operands)
    operands = jax.tree.unflatten(treedef, _guarded(*flat))
    shapes = tuple(jax.ShapeDtypeStruct(grad.shape, grad.dtype) for grad in operands[-1])
    result = (jax.ShapeDtypeStruct((), jnp.int32), shapes)
    step, arrays = io_callback(functools.partial(pushing.push, present), result, *operands)
    return step, arrays


def _loss(extra_args: dict[str, Any], session: _session.Session) -> Any:
    found = extra_args.get("loss")
    found = extra_args.get("value") if found is None else found
    if found is None or np.shape(found) != ():
        got = "nothing" if found is None else f"shape {np.shape(found)}"
        raise errors.InvalidArgumentError(
            f"update: the optimizer of {session} asks for the loss: value={got}, expected a number: "
            "tx.update(grads, state, params, value=loss)",
            subject="value",
            expected="a number",
            got=got,
        )
    return found


# The guard: what passes it comes out as it went in, but for two kinds of trace, in which a push could only go wrong.


@jax.custom_batching.custom_vmap
def _unbatched(*operands: Any) -> Any:
    return operands


@_unbatched.def_vmap
def _refuse_vmap(axis_size: int, in_batched: Any, *operands: Any) -> NoReturn:
    raise errors.UnsupportedError(
        f"update was called under vmap, over {axis_size} elements, but a session takes one push a step; give every "
        "element a session of its own, or reduce the gradients before update",
        subject="update",
        expected="no vmap",
        got="vmap",
    )


@jax.custom_jvp
def _guarded(*operands: Any) -> Any:
    return _unbatched(*operands)


@_guarded.defjvp
def _refuse_grad(primals: Any, tangents: Any) -> NoReturn:
    raise errors.UnsupportedError(
        "update was called inside a function that is being differentiated, but an update that a server computes has no "
        "derivative; call update outside of grad, or apply jax.lax.stop_gradient to the gradients",
        subject="update",
        expected="no differentiation",
        got="differentiation",
    )


def _optax() -> Any:
    try:
        import optax
    except ImportError as exc:
        raise errors.UnsupportedError(
            "optwire.jax.transformation needs optax: pip install 'optwire[jax]'", subject="optax", expected="optax"
        ) from exc
    return optax
