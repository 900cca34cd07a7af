"""RemoteState: what a training loop carries from step to step, small enough for any checkpoint."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optwire_proto import errors


class RemoteState(NamedTuple):
    """Which step of which session the loop is at; the optimizer's state itself lies on the server.

    A pytree of two small arrays, so that ``jit`` compiles once for all steps, and every checkpoint library saves it.

    Attributes:
      step: updates applied so far, shape () and type int32.
      token: the session's id, shape (16,) and type uint8.
    """

    step: Any
    token: Any

    @property
    def session_id(self) -> str:
        """32 hexadecimal digits; of a state that holds arrays, not tracers."""
        return id_of(self.token)


def state_at(step: int, session_id: str) -> RemoteState:
    """The state of a session at a step."""
    return RemoteState(jnp.asarray(step, jnp.int32), jnp.asarray(np.frombuffer(bytes.fromhex(session_id), np.uint8)))


def id_of(token: Any) -> str:
    """The session's id in a token, 32 hexadecimal digits; raises InvalidArgumentError. NumPy only."""
    array = np.asarray(token)
    if array.shape != (16,) or array.dtype != np.uint8:
        raise errors.InvalidArgumentError(
            f"opt_state.token: shape {array.shape} of {array.dtype}, expected (16,) of uint8, as RemoteState has it",
            subject="opt_state",
            expected="(16,) of uint8",
            got=f"{array.shape} of {array.dtype}",
        )
    return array.tobytes().hex()


def is_traced(tree: Any) -> bool:
    """Whether this is a trace, also one that no leaf of ``tree`` is part of: constants of a jitted function."""
    staged = isinstance(jnp.add(np.int32(0), np.int32(0)), jax.core.Tracer)
    return staged or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def refuse_traces(function: str, tree: Any) -> None:
    """Raises UnsupportedError under a trace: ``function`` talks to the server, once a call."""
    if is_traced(tree):
        raise errors.UnsupportedError(
            f"{function} was called under jit, grad, vmap or another transformation, but it talks to the server; "
            f"call {function} outside, and transform only what computes the gradients "
            "(optwire.jax.transformation works under jit)",
            subject=function,
            expected="arrays",
            got="tracers",
        )
