"""``export_update``: an update rule of your own as a file that a server can run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export as jax_export

from optwire_proto import errors


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
