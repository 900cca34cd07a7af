"""Local steps: training by oneself, with an exchange of parameters now and then. No gRPC, no protobuf.

What is pushed is how far one went: the global parameters minus one's own, a pseudo-gradient. DiLoCo (arXiv:2311.08105)
pushes all leaves at once and waits; Streaming DiLoCo (arXiv:2501.18512) pushes fragments in turn and goes on meanwhile.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optwire import _options, _session
from optwire_proto import errors, patterns, tensors, trees

# Parameters of one's own: of the leaves at some positions, as `trees.match` gives them.
Read = Callable[[Sequence[int]], list[tensors.Array]]
# New ones, by position.
Received = dict[int, tensors.Array]


@dataclasses.dataclass(slots=True)
class _Push:
    """A fragment on its way.

    Attributes:
      leaves: positions.
      due: the local step after which its new parameters are taken.
      base_step: of the session, which it is for; None: any.
      grads: its pseudo-gradients in the session's nest; kept, as a push of unknown outcome is made again.
      arguments: of ``Session.step``.
      future: of its parameters, or of None where it was not made; None: it is to be made, or made again.
    """

    leaves: tuple[int, ...]
    due: int
    base_step: int | None
    grads: Any
    arguments: dict[str, Any]
    future: concurrent.futures.Future[Any] | None = None


class Exchange:
    """When which leaves are exchanged with a session, and what becomes of them; for ``LocalSteps`` of any framework.

    Attributes:
      late_count: pushes that came too late, and were dropped.
      local_steps: made so far.

    Args:
      session: to push to.
      every: local steps between two pushes of a leaf.
      fragments: into how many parts the leaves are divided, of about as many bytes each; or a pattern for each.
      delay: local steps between a push and when its parameters are taken.
      mixing: share of one's own parameters that is kept then.

    Raises:
      InvalidArgumentError: a number that cannot be.
      SpecError: patterns that mean no leaf, or leave one out.
    """

    def __init__(
        self,
        session: _session.Session,
        *,
        every: int,
        fragments: int | Sequence[str] = 1,
        delay: int = 0,
        mixing: float = 0.0,
    ) -> None:
        if not isinstance(session, _session.Session):
            raise _options.wrong("session", "an optwire.Session", session)
        self.session = session
        self.late_count = 0
        self.local_steps = 0
        self._tree = session._tree
        self._every = _options.whole("every", every)
        if not self._every:
            raise _options.wrong("every", "at least 1 local step", every)
        self._fragments = _divided(self._tree, fragments, self._every)
        self._delay = _options.whole("delay", delay)
        if self._delay >= self._every:
            raise _options.wrong("delay", f"less than every, which is {self._every}", delay)
        self._mixing = _options.finite("mixing", mixing)
        if not 0 <= self._mixing <= 1:
            raise _options.wrong("mixing", "a number from 0 to 1", mixing)
        self._began = 0  # the local step that `every` is counted from
        self._pushes = 0
        self._global: list[tensors.Array] = []
        self._under_way: list[_Push] = []
        self.reset()

    def reset(self) -> list[tensors.Array]:
        """Reads the session's newest parameters and goes on from them, as from the first local step.

        What is under way ends first, as others may wait for it, and its answers are of no further use.

        Returns:
          Copies of all of them, in the tree's order.
        """
        newest = trees.match(self._tree, self.session.params(), "params")
        self._under_way.clear()
        self._global, self._began = newest, self.local_steps
        return self.params()

    def params(self) -> list[tensors.Array]:
        """Copies of the session's parameters as they were last received, in the tree's order."""
        return [array.copy() for array in self._global]

    def _is_due(self, step: int) -> bool:
        """Whether a fragment is pushed after a local step."""
        at, count = step - self._began, len(self._fragments)
        return any(at % self._every == (index + 1) * self._every // count % self._every for index in range(count))

    def _next(self) -> tuple[int | None, tuple[int, ...]]:
        """The step of the session that the next push is for, None if any will do, and the leaves that it brings.

        Those who make a step together must bring the same leaves, however many local steps each of them has made. So
        the step says which, and there must be no doubt of what step a push is for.
        """
        if not self.session._gathers:
            return None, self._fragments[self._pushes % len(self._fragments)]
        base = self.session.step_count
        if self._under_way:
            last = self._under_way[-1].base_step
            assert last is not None, "every push of such a session is for one step"
            base = last + 1
        return base, self._fragments[base % len(self._fragments)]

    def advance(self, read: Read, **arguments: Any) -> Received:
        """One local step was made: pushes what is to be pushed after it, and takes what has come.

        Safe to repeat where it raised that an outcome is unknown: what was pushed then is pushed again.

        Args:
          read: one's own parameters.
          **arguments: of ``Session.step``, for a push.

        Returns:
          What changes of one's own parameters, by position: arrays that nobody else has.
        """
        step = self.local_steps + 1
        due = step + self._delay
        if self._is_due(step) and not any(push.due == due for push in self._under_way):
            self._under_way.append(self._pushed(due, read, arguments))
            self._pushes += 1
        received: Received = {}
        try:
            for push in [push for push in self._under_way if push.due <= step]:
                self._take(push, read, received)
        except (errors.StaleStepError, errors.DivergentRetryError) as exc:
            # Of a step that was made without us, or of a push that counts already: either way the newest are ahead.
            newest = self.reset()
            self._began = step
            self.late_count += isinstance(exc, errors.StaleStepError)
            received = dict(enumerate(newest))
        self.local_steps = step
        return received

    def _pushed(self, due: int, read: Read, arguments: dict[str, Any]) -> _Push:
        base_step, leaves = self._next()
        values: list[tensors.Array | None] = [None] * len(self._tree.leaves)
        for index, array in zip(leaves, read(leaves), strict=True):
            values[index] = _difference(self._global[index], array, self._tree.leaves[index].dtype)
        push = _Push(leaves, due, base_step, trees.unflatten(self._tree, values, self.session._types), arguments)
        if self._delay:
            push.future = self.session._later(functools.partial(self._made, push, tuple(self._under_way)))
        return push

    def _made(self, push: _Push, earlier: Sequence[_Push]) -> Any:
        """What comes of a push; None: one before it has failed, and must be made again first."""
        if any(map(_has_failed, earlier)):
            return None
        return self.session.step(push.grads, push.base_step, reply="present", **push.arguments)

    def _take(self, push: _Push, read: Read, received: Received) -> None:
        """Waits for a push, and mixes what comes of it with one's own parameters."""
        own = read(push.leaves) if self._mixing else [None] * len(push.leaves)
        arrays = trees.leaf_values(self._tree, self._answer(push))
        assert arrays is not None, "a reply has the session's structure"
        for index, mine in zip(push.leaves, own, strict=True):
            dtype = self._tree.leaves[index].dtype
            self._global[index] = tensors.wire_array(arrays[index], self._tree.leaves[index].name)[1]
            received[index] = _mixed(mine, self._global[index], self._mixing, dtype)
        self._under_way.remove(push)

    def _answer(self, push: _Push) -> Any:
        """What comes of a push, which is made now if it was not; one that has failed is made again the next time."""
        answer = None
        if push.future is not None:
            try:
                answer = push.future.result()
            except concurrent.futures.CancelledError:
                pass
            except BaseException:
                if _has_failed(push):  # else it is the wait that was interrupted
                    push.future = None
                raise
        return self._made(push, ()) if answer is None else answer


class LocalSteps:
    """Trains in steps of one's own, and exchanges parameters with a session now and then.

    After every local step call ``step`` with the parameters and go on with those that it returns: the same objects,
    except after every ``every``-th, when the session has made a step of how far its workers went. The inner optimizer's
    state is yours, and stays as it is. For any nest of arrays that NumPy can read, such as JAX's;
    ``optwire.torch.LocalSteps`` is for modules.

    Example:
      >>> session = client.create_session(  # doctest: +SKIP
      ...     params, opt.nesterov(0.7, 0.9), name="run", aggregation="sync(4)"
      ... )
      >>> local = optwire.LocalSteps(session, every=50)  # doctest: +SKIP
      >>> params = local.params()  # doctest: +SKIP
      >>> for batch in batches:  # doctest: +SKIP
      ...     params, state = inner_step(params, state, batch)
      ...     params = local.step(params)

    Where a push comes too late for its step, it is dropped and counted in ``late_count``, and ``step`` returns the
    session's newest parameters. One thread at a time.

    Args:
      session: whose optimizer is the outer one; it gets the session's parameters minus one's own as gradients.
      every: local steps between two pushes of a leaf.
      fragments: 1: all leaves at once. More: parts of about as many bytes each, pushed in turn, so that a push is
        smaller, and none waits long; at most ``every``. Or patterns of names, one for each part; the first that fits
        decides. The session's optimizer must be in ``per_leaf``.
      delay: local steps between a push and when its parameters are taken; meanwhile it travels in the background.
      mixing: share of one's own parameters that is kept then, from 0 to 1, as local steps were made meanwhile.

    Raises:
      InvalidArgumentError: a number that cannot be.
      SpecError: patterns that mean no leaf, or leave one out.
    """

    def __init__(
        self,
        session: _session.Session,
        *,
        every: int,
        fragments: int | Sequence[str] = 1,
        delay: int = 0,
        mixing: float = 0.0,
    ) -> None:
        self._exchange = Exchange(session, every=every, fragments=fragments, delay=delay, mixing=mixing)
        self._tree, self._types = session._tree, session._types

    @property
    def late_count(self) -> int:
        """Pushes that came too late, and were dropped."""
        return self._exchange.late_count

    @property
    def local_steps(self) -> int:
        """Local steps made so far."""
        return self._exchange.local_steps

    def params(self) -> Any:
        """The session's parameters as they were last received, to start from: new NumPy arrays."""
        return self._nest(self._exchange.params())

    def reset(self) -> Any:
        """Reads the session's newest parameters, to go on from: new NumPy arrays. Counts ``every`` from here.

        Pushes that are under way end first; what comes of them is dropped.

        For those who went on otherwise than by ``step``, or after ``load_state``.
        """
        return self._nest(self._exchange.reset())

    def _nest(self, arrays: Sequence[tensors.Array]) -> Any:
        return trees.unflatten(self._tree, list(map(_users, arrays, self._tree.leaves)), self._types)

    def step(self, params: Any, *, weight: float = 1.0, loss: float | None = None) -> Any:
        """Says that a local step was made.

        Safe to repeat: after a ``DeadlineError``, ``UnavailableError`` or Ctrl-C call it again with the same
        parameters; the step and the push count once.

        Args:
          params: after the step; read where a push is to be made, and not changed.
          weight: of the push, as ``Session.step`` takes it.
          loss: of the push, as ``Session.step`` takes it.

        Returns:
          Parameters for the next step: ``params``, or a nest like it where leaves that were exchanged are new NumPy
          arrays, and the others the same objects as before.

        Raises:
          TreeMismatchError: another structure, shape or element type than the session's.
          OptwireError: as ``Session.step``, except for what came too late.
        """
        values = trees.leaf_values(self._tree, params)
        if values is None:
            trees.match(self._tree, params, "params")  # says what is wrong
            raise errors.TreeMismatchError("params: containers that are none of the session's", subject="params")

        def read(leaves: Sequence[int]) -> list[tensors.Array]:
            part = trees.TreeSpec(tuple(self._tree.leaves[index] for index in leaves))
            return trees.match(part, {self._tree.leaves[index].name: values[index] for index in leaves}, "params")

        received = self._exchange.advance(read, weight=weight, loss=loss)
        if not received:
            return params
        for index, array in received.items():
            values[index] = _users(array, self._tree.leaves[index])
        return trees.unflatten(self._tree, values, self._types)


def _has_failed(push: _Push) -> bool:
    """Whether a push is over without an answer, or was never begun."""
    future = push.future
    if future is None:
        return True
    return future.done() and (future.cancelled() or future.exception() is not None or future.result() is None)


def _divided(tree: trees.TreeSpec, fragments: int | Sequence[str], every: int) -> tuple[tuple[int, ...], ...]:
    """Positions of the leaves of every fragment.

    Raises:
      InvalidArgumentError: more fragments than leaves, or than local steps.
      SpecError: patterns that mean no leaf, or leave one out.
    """
    names = [leaf.name for leaf in tree.leaves]
    given = fragments if isinstance(fragments, Sequence) and not isinstance(fragments, str) else None
    count = len(given) if given is not None else _options.whole("fragments", fragments)
    if not 1 <= count <= min(every, len(names)):
        expected = f"from 1 to {min(every, len(names))}: no more than leaves, nor than local steps between two pushes"
        raise _options.wrong("fragments", expected, fragments)
    if given is not None:
        of: Sequence[int] = patterns.groups(tuple(given), names, "fragments")
    else:
        total = sum(leaf.nbytes for leaf in tree.leaves) or 1
        ends = itertools.accumulate(leaf.nbytes for leaf in tree.leaves)
        # By the middle of a leaf, so that one that lies across a border goes to where most of it is.
        of = [
            min(int((end - leaf.nbytes / 2) * count / total), count - 1)
            for end, leaf in zip(ends, tree.leaves, strict=True)
        ]
    found = (tuple(index for index, part in enumerate(of) if part == each) for each in range(count))
    return tuple(part for part in found if part)  # of a large leaf, a part may be all of its neighbours'


def _difference(start: tensors.Array, own: tensors.Array, dtype: str) -> tensors.Array:
    """How far one's own parameters are from where they started, with the sign of a gradient."""
    if dtype == "bf16":
        return tensors.f32_to_bf16(tensors.bf16_to_f32(start) - tensors.bf16_to_f32(own))
    difference: tensors.Array = np.asarray(start - own)
    return difference


def _mixed(own: tensors.Array | None, new: tensors.Array, share: float, dtype: str) -> tensors.Array:
    """A share of one's own parameters, and for the rest the new ones; memory of its own."""
    if own is None:
        return new.copy()
    if dtype == "bf16":
        wide = share * tensors.bf16_to_f32(own) + (1 - share) * tensors.bf16_to_f32(new)
        return tensors.f32_to_bf16(np.asarray(wide, np.float32)).view(np.uint16)
    return np.asarray(share * own + (1 - share) * new).astype(new.dtype)


def _users(array: tensors.Array, leaf: trees.LeafSpec) -> tensors.Array:
    """An array as users have it: bfloat16 in its own type."""
    return array.view(tensors.numpy_dtype(leaf.dtype))
