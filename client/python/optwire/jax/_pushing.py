"""What happens between JAX's entry into Python and its return: one push, in NumPy alone.

A call of JAX in here would wait for a device that waits for us. ``tests/client/test_jax_transformation.py`` watches.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from optwire import _session
from optwire.jax import _nests
from optwire_proto import digests, errors, payloads, sessions, tensors


@dataclasses.dataclass(frozen=True, slots=True)
class Pushed:
    """The last push, and what it gave.

    Attributes:
      base_step: of the state that it was made on.
      digest: of what was pushed.
      stands: step and incarnation of the session right after it.
      updates: in the order of the leaves that had gradients.
    """

    base_step: int
    digest: tuple[sessions.Digest, tuple[int, ...], float | None]
    stands: tuple[int, int]
    updates: tuple[tensors.Array, ...]


class Pushing:
    """Pushes on behalf of one transformation. Holds the updates of the last push, the size of the parameters.

    The same gradients on the same state are the same push: it is answered again, not applied again.
    """

    def __init__(self, session: _session.Session) -> None:
        self._session = session
        self._last: Pushed | None = None
        self._lock = threading.Lock()

    def push(
        self, present: tuple[int, ...], step: Any, token: Any, loss: Any, grads: Sequence[Any]
    ) -> tuple[np.int32, tuple[tensors.Array, ...]]:
        """Pushes gradients on a step.

        Args:
          present: positions, in the session's order, of the leaves that have gradients.
          step: of the state, shape () and a whole number.
          token: of the state, shape (16,) and uint8.
          loss: a real number, shape (); None: not asked for.
          grads: arrays of the present leaves.

        Returns:
          The step after the push, and the updates of the present leaves.

        Raises:
          InvalidArgumentError: the state is of another session.
          StaleStepError: the state was pushed on before, with other gradients.
        """
        self._check(np.asarray(token).tobytes().hex())
        base_step = int(np.asarray(step))
        number = None if loss is None else float(np.asarray(loss))
        arrays = [np.asarray(array) for array in grads]
        digest = (_digest(arrays), present, number)
        with self._lock:
            last = self._last
            if last is None or (last.base_step, last.stands) != (base_step, self._stands()):
                updates = self._pushed(present, arrays, base_step, number)
                last = self._last = Pushed(base_step, digest, self._stands(), updates)
            if last.digest != digest:
                raise self._twice(base_step)
            return np.int32(last.stands[0]), last.updates

    def _pushed(
        self, present: tuple[int, ...], arrays: list[tensors.Array], base_step: int, loss: float | None
    ) -> tuple[tensors.Array, ...]:
        values: list[Any] = [None] * len(self._session._tree.leaves)
        for index, array in zip(present, arrays, strict=True):
            values[index] = array
        nest = _nests.nest_of(self._session, values)
        reply = self._session.step(nest, base_step, loss=loss, reply="updates")
        updates = _nests.arrays_of(self._session, reply, "updates")
        return tuple(updates[index] for index in present)

    def _stands(self) -> tuple[int, int]:
        return self._session.step_count, self._session._incarnation

    def _check(self, session_id: str) -> None:
        if session_id != self._session.id:
            raise errors.InvalidArgumentError(
                f"update: the state is of session {session_id}, expected {self._session.id}, of {self._session}; "
                "attach to the session that the state was saved with, or start with init",
                subject="state",
                expected=self._session.id,
                got=session_id,
            )

    def _twice(self, base_step: int) -> errors.StaleStepError:
        return errors.StaleStepError(
            f"update: the state of step {base_step} was pushed on already, with other gradients: {self._session} is at "
            f"step {self._session.step_count}. What runs an update and discards its state, as optax.MultiSteps does at "
            "every micro-step, cannot be undone here: one micro-step has been applied. Accumulate on the server "
            "instead, with optwire.optimizers.accumulate(optimizer, k), in a new session. Under pmap and lax.map, "
            "which run one update on one state many times, reduce the gradients first (jax.lax.pmean)",
            subject="state",
            expected=str(self._session.step_count),
            got=str(base_step),
            step=self._session.step_count,
        )


def _digest(arrays: list[tensors.Array]) -> sessions.Digest:
    digester = digests.Digester()
    for piece in payloads.pieces(list(arrays)):
        digester.update(piece)
    return digester.digest()
