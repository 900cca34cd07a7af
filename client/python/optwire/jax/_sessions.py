"""What a session does, for any pytree: create it, read it, step it. The leaves' names are their key paths."""

from __future__ import annotations

from typing import Any

import numpy as np

from optwire import _client, _session
from optwire.jax import _leaves, _nests, _state
from optwire_proto import errors, specs, tensors, trees


def create_session(client: _client.Client, params: Any, spec: specs.Spec | str, **options: Any) -> _session.Session:
    """As ``Client.create_session``, for any pytree: also Flax states, Equinox modules and other nodes of your own.

    Example:
      >>> session = optwire.jax.create_session(client, eqx.filter(model, eqx.is_array), spec)  # doctest: +SKIP

    Args:
      client: from ``optwire.connect``.
      params: any pytree with arrays at its leaves. Nests of dicts, lists and tuples stay what they are for other
        clients; where there are other nodes, they see a mapping from name to array.
      spec: as in ``Client.create_session``.
      **options: as in ``Client.create_session``.

    Raises:
      TreeError: a leaf is no array, or of an element type that JAX would narrow.
      UnsupportedError: called under ``jit`` or another transformation.
    """
    _state.refuse_traces("create_session", params)
    flat = _flat(_leaves.leaves_of(params))
    for leaf, array in zip(flat.spec.leaves, flat.arrays, strict=True):
        _leaves.to_jax(array.view(tensors.numpy_dtype(leaf.dtype)), leaf.name)  # before there is a session
    return client.create_session(params if _is_nest(params, flat.spec) else flat, spec, **options)


def params(session: _session.Session, like: Any, which: str = "") -> Any:
    """As ``Session.params``, in the structure of a pytree of yours.

    Args:
      session: the session.
      like: a pytree with leaves of the session's names; arrays, ``jax.ShapeDtypeStruct`` or anything but None.
      which: as in ``Session.params``.

    Returns:
      The pytree with JAX arrays; places that are None in ``like`` stay None.

    Raises:
      TreeMismatchError: ``like`` has other leaves.
      UnsupportedError: called under ``jit`` or another transformation.
    """
    _state.refuse_traces("params", like)
    leaves = _leaves.leaves_of(like)
    wanted = _leaves.in_order(session._tree, leaves, "like")
    arrays = _nests.arrays_of(session, session.params(which), "params")
    present = [array if want is not None else None for array, want in zip(arrays, wanted, strict=True)]
    return leaves.rebuilt(_leaves.all_to_jax(session._tree, present))


def step(session: _session.Session, grads: Any, base_step: int | None = None, **options: Any) -> Any:
    """As ``Session.step``, for any pytree: the parameters exactly, as JAX arrays in the structure of ``grads``.

    Args:
      session: the session.
      grads: a pytree with the session's leaves by name. None in the place of an array: no gradient.
      base_step: as in ``Session.step``.
      **options: ``loss``, ``grad_scale``, ``hyperparams`` and ``telemetry`` as in ``Session.step``.

    Returns:
      The parameters after the update, those without a gradient too.

    Raises:
      TreeMismatchError: ``grads`` has other leaves; nothing was sent.
      UnsupportedError: called under ``jit`` or another transformation.
    """
    _state.refuse_traces("step", (grads, options))
    leaves = _leaves.leaves_of(grads)
    nest = _nests.nest_of(session, _leaves.in_order(session._tree, leaves, "grads"))
    reply = session.step(nest, base_step, **options)
    return leaves.rebuilt(_leaves.all_to_jax(session._tree, _nests.arrays_of(session, reply, "params")))


def _flat(leaves: _leaves.Leaves) -> trees.Flat:
    """A tree without a nest: named leaves in JAX's order."""
    found: list[trees.LeafSpec] = []
    arrays: list[tensors.Array] = []
    for name, value in zip(leaves.names, leaves.values, strict=True):
        if value is None:
            continue
        if not hasattr(value, "dtype"):
            raise errors.TreeError(
                f"params[{name!r}]: {type(value).__name__}, expected an array; leave out what is not trained, such as "
                "by equinox.filter(model, equinox.is_array)",
                subject=name,
                expected="array",
                got=type(value).__name__,
            )
        dtype, array = tensors.wire_array(np.asarray(value), f"params[{name!r}]")
        found.append(trees.LeafSpec(name, array.shape, dtype))
        arrays.append(array)
    return trees.Flat(trees.TreeSpec(tuple(found)), arrays, ())


def _is_nest(tree: Any, spec: trees.TreeSpec) -> bool:
    """Whether the containers are those that every client knows, and give the leaves the same names."""
    try:
        return trees.flatten(tree).spec.leaves == spec.leaves
    except errors.TreeError:
        return False
