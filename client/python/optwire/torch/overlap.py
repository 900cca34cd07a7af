"""Gradients that go up while backward runs, and parameters that come down until they are needed.

Each gradient is copied to the session's stage when autograd has accumulated it. A step compares the copies with what
the gradients are by then, copies again what differs, and starts the push; the new parameters are written when somebody
comes to a door: the forward of a module that uses them, or whatever asks the optimizer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from optwire import _session, _stages
from optwire.torch import arrays, doors, pushed, ranks, recipes, remote
from optwire_proto import errors, tensors, trees

_log = logging.getLogger("optwire.torch")


class Overlap:
    """What an optimizer with ``overlap=True`` has beside its session. Thread-safe.

    Args:
      of: the session and its parameters.

    Attributes:
      outcome: of the last push that was answered.
    """

    def __init__(self, of: remote.Remote) -> None:
        self.outcome = ranks.Outcome()
        self._remote = of
        self._pid = os.getpid()
        self._lock = threading.RLock()  # held while waiting: whoever comes meanwhile waits for the same
        self._pushed: pushed.Pushed | None = None
        self._session: _session.Session | None = None  # that the stage is of
        self._stage: _stages.Stage | None = None
        self._resent_bytes = 0  # of stages of other sessions
        self._positions: dict[int, tuple[int, str]] = {}  # by id of a parameter: position in the tree, and name
        self._fired: dict[int, int] = {}  # how often each gradient was added to since the last step
        self._expected: dict[int, int] = {}  # and for the step before
        self._hooks: dict[int, tuple[weakref.ref[torch.Tensor], Any]] = {}
        self._doors = doors.Doors(self.wait)

    @property
    def resent_bytes(self) -> int:
        """Bytes that went up in vain so far."""
        return self._resent_bytes + (self._stage.resent_bytes if self._stage is not None else 0)

    # -------------------------------------------------------------------------------------------------- gradients

    def watch(self) -> None:
        """Has every parameter that is trained say when it has a gradient."""
        for leaf in self._remote.leaves:
            parameter = leaf.parameter
            known = self._hooks.get(id(parameter))
            if parameter.requires_grad and parameter.is_leaf and (known is None or known[0]() is not parameter):
                handle = parameter.register_post_accumulate_grad_hook(_Accumulated(self))
                self._hooks[id(parameter)] = weakref.ref(parameter), handle

    def accumulated(self, parameter: torch.Tensor) -> None:
        """Something was added to a parameter's gradient; it goes up once it is whole.

        That is, after as many times as in the step before: with several micro-batches, in the last of them.
        """
        self._leave_parent()
        with self._lock:
            count = self._fired[id(parameter)] = self._fired.get(id(parameter), 0) + 1
            if self._remote.session is None or count < self._expected.get(id(parameter), 1):
                return
            self.wait()
            with contextlib.suppress(errors.OptwireError):  # whatever it is, the step will meet it
                self._copy(parameter)

    def _copy(self, parameter: torch.Tensor) -> None:
        gradient, stage = parameter.grad, self._opened()
        position, name = self._positions.get(id(parameter), (-1, ""))
        if position < 0 or gradient is None or gradient.dtype != parameter.dtype:
            return
        array = arrays.to_numpy(gradient, name)
        if array.nbytes == stage.buffers[position].nbytes:
            stage.copy(position, array)

    def _opened(self) -> _stages.Stage:
        """The stage of the session as it is now."""
        session, tree = self._remote.session, self._remote.tree
        assert session is not None and tree is not None
        if self._session is not session or self._stage is None:
            self._resent_bytes, self._session = self.resent_bytes, session
            at = {leaf.name: position for position, leaf in enumerate(tree.leaves)}
            self._positions = {
                id(leaf.parameter): (at[leaf.name], leaf.name) for leaf in self._remote.leaves if leaf.name in at
            }
            self._stage = None
        if self._stage is None or not self._stage.is_sending:
            self._stage = session._staging()
            self._stage.heard = _Heard(self)
        return self._stage

    # ------------------------------------------------------------------------------------------------------ steps

    def stepped(self, *, is_made: bool) -> None:
        """A step was made, or left out: what is accumulated from now on is for the next one."""
        with self._lock:
            self._expected, self._fired = self._fired if is_made else self._expected, {}

    def push(
        self,
        groups: recipes.Groups,
        grads: Mapping[str, tensors.Array],
        *,
        grad_scale: float = 1.0,
        loss: float | None = None,
        weight: float = 1.0,
        telemetry: bool = False,
    ) -> None:
        """Starts what ``Remote.push`` does; ends it too where it is not known who will use the parameters."""
        with self._lock:
            self.wait()
            session, tree, edits, changes = self._remote.prepare(groups)
            self.watch()
            given = trees.match_present(tree, trees.unflatten(tree, [grads.get(leaf.name) for leaf in tree.leaves]))
            stage = self._opened()
            for position, array in enumerate(given):
                if array is not None and not stage.has(position, array):
                    stage.copy(position, array)
            copies = [None if array is None else stage.buffers[at] for at, array in enumerate(given)]
            self.stepped(is_made=True)
            self._remote.hyperparams.sent(edits)
            new = pushed.Pushed(
                self._remote,
                session,
                tree,
                grads=trees.unflatten(tree, copies),
                names=grads,
                groups=groups,
                edits=edits,
                arguments={
                    "loss": loss,
                    "grad_scale": grad_scale,
                    "hyperparams": changes,
                    "weight": weight,
                    "telemetry": telemetry,
                },
            )
            self._pushed = new  # before it is made: some of it may come at once
            try:
                new.make()
            except BaseException:
                self._over()
                raise
            if not self._doors.shut(new.ids):
                self.wait()

    def heard(self, step: int, count: int) -> None:
        """So many bytes of parameters of a step have come; called by the thread that receives them."""
        if (under_way := self._pushed) is not None:
            under_way.heard(step, count)

    def wait(self, ids: frozenset[int] | None = None) -> None:
        """Writes the new values of parameters, as soon as they have come.

        Args:
          ids: of the parameters that are needed; None: all of them, and the push is to be over.

        Raises:
          OptwireError: what ``step`` would have raised. Where it is unknown whether the push was applied, the next call
            makes it again; otherwise there is nothing to be waited for any more.
        """
        self._leave_parent()
        with self._lock:
            if self._pushed is None or (ids is not None and not self._pushed.take(ids)):
                return
            try:
                self.outcome = self._pushed.finish()
            except BaseException as exc:
                if not self._pushed.is_open(exc):
                    self._over()
                raise
            self._over()

    def abandon(self) -> None:
        """Ends the push that is under way, whatever becomes of it."""
        with self._lock:
            try:
                self.wait()
            except errors.OptwireError:
                self._over()

    def _over(self) -> None:
        self._pushed = None
        self._doors.open()

    # ----------------------------------------------------------------------------------------------------- endings

    def end(self) -> None:
        """For an optimizer that is gone: ends what is under way, and leaves nothing behind.

        A garbage collector may call this on any thread, and those that must not wait, as the push needs them, are
        daemons: there it is done once the push is over.
        """
        under_way = self._pushed
        if under_way is not None and threading.current_thread().daemon:
            under_way.when_over(self._end)
        else:
            self._end()

    def _end(self) -> None:
        try:
            self.wait()
        except errors.OptwireError as exc:  # nobody is there to be told
            _log.warning("the last push of a RemoteOptimizer that is gone failed: %s", exc)
        finally:
            self.remove()

    def remove(self) -> None:
        """Takes all hooks away."""
        self._over()
        self._doors.remove()
        hooks, self._hooks = self._hooks, {}
        for _, handle in hooks.values():
            handle.remove()

    def _leave_parent(self) -> None:
        """In a forked process: what is under way is the parent's."""
        if os.getpid() != self._pid:
            self._pid, self._lock = os.getpid(), threading.RLock()
            self._session, self._stage = None, None
            self._over()


class _Hook:
    """A hook that keeps nothing alive."""

    def __init__(self, overlap: Overlap) -> None:
        self._overlap = weakref.ref(overlap)


class _Accumulated(_Hook):
    def __call__(self, parameter: torch.Tensor) -> None:
        if (overlap := self._overlap()) is not None:
            overlap.accumulated(parameter)


class _Heard(_Hook):
    def __call__(self, step: int, count: int) -> None:
        if (overlap := self._overlap()) is not None:
            overlap.heard(step, count)
