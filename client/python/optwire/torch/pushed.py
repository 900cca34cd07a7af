"""A push of an overlapped step: its answer is waited for late, and its parameters are written as they are needed."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from optwire import _session
from optwire.torch import arrays, fit, leaves, ranks, recipes, remote
from optwire_proto import errors, tensors, trees

# After these nobody knows whether the push was applied, or it was refused for now: it is to be made again.
_OPEN: Final = (errors.DeadlineError, errors.UnavailableError, errors.LimitError)


class Coming(NamedTuple):
    """A parameter whose new values are on their way."""

    leaf: leaves.Leaf
    values: tensors.Array  # where they are put
    stop: int  # how many bytes of the reply have come when all of them have
    fingerprint: tuple[int, int]  # of the parameter when the push was made


class Pushed:
    """A push, and the parameters that it brings. Not thread-safe, but for ``heard``.

    Args:
      of: whose session it goes to.
      session: it goes to.
      tree: of the session.
      grads: as ``session.step_async`` takes them; kept as they are until it is over.
      names: of the leaves that have a gradient.
      groups: of the optimizer.
      edits: of theirs, which the push brings.
      arguments: that ``session.step_async`` takes beside.

    Attributes:
      ids: of the parameters that it changes.
    """

    def __init__(
        self,
        of: remote.Remote,
        session: _session.Session,
        tree: trees.TreeSpec,
        *,
        grads: Any,
        names: Mapping[str, Any],
        groups: recipes.Groups,
        edits: recipes.Values,
        arguments: Mapping[str, Any],
    ) -> None:
        self._remote = of
        self._session = session
        self._grads = grads
        self._groups = groups
        self._values = of.values(groups)
        self._edits = edits
        new = session.param_buffers()
        self._arguments = {**arguments, "out": new}
        self._coming = _coming(of, tree, trees.match(tree, new, "params"), names)
        self._left = dict(self._coming)  # what is not written yet
        self._touched = ""  # a parameter that was written to meanwhile
        self._step: int | None = None  # of the parameters that were written first
        self._arrived = threading.Condition()
        self._come = (-1, 0)  # step of the parameters that are arriving, and how many bytes of them have
        self._is_told = False  # whether somebody heard that the push failed
        self._future: concurrent.futures.Future[Any]

    @property
    def ids(self) -> frozenset[int]:
        return frozenset(self._coming)

    def make(self) -> None:
        """Has the push be made, for the first time or again: the server tells whether it has it."""
        self._is_told = False
        self._future = self._session.step_async(self._grads, **self._arguments)
        self._future.add_done_callback(lambda _: self.heard(*self._come))

    def when_over(self, then: Callable[[], None]) -> None:
        """Calls ``then`` once this try is over, on the thread that made it; at once if it is."""
        self._future.add_done_callback(lambda _: then())

    def heard(self, step: int, count: int) -> None:
        """So many bytes of parameters of a step have come; called by the thread that receives them."""
        with self._arrived:
            self._come = step, count
            self._arrived.notify_all()

    def take(self, ids: frozenset[int]) -> bool:
        """Waits for the new values of parameters, and writes them; whether ``finish`` is to be called now."""
        for at, coming in sorted(self._left.items(), key=lambda item: item[1].stop):
            if at in ids:
                with self._arrived:
                    while self._come[1] < coming.stop and not self._future.done():
                        self._arrived.wait()
                    step, count = self._come
                if count < coming.stop:  # all have come in another way, or there is an error
                    return True
                self._step = step if self._step is None else self._step
                self._write(at)
        return not self._left

    def finish(self) -> ranks.Outcome:
        """Waits for the answer, and does all that is left to be done.

        Raises:
          DeadlineError, UnavailableError, LimitError: it is unknown whether the push was applied, or it was refused for
            now. Calling again makes it again; it is applied once.
          StaleStepError: others pushed while the parameters came; the model has the newest.
          UnsupportedError: a parameter was written to meanwhile; it has the server's values.
          OptwireError: the push was refused for good.
        """
        if self._is_told:
            self.make()
        try:
            self._future.result()
        except _OPEN:
            self._is_told = True
            raise
        ack = self._session.last_ack
        assert ack is not None
        is_mixed = self._step not in (None, ack.step)
        for at in self._coming if is_mixed else [*self._left]:
            self._write(at)
        self._remote.follow(self._groups, self._edits, since=self._values)
        if is_mixed:
            raise fit.surprise(self._session)
        if self._touched:
            raise errors.UnsupportedError(
                f"params/{self._touched}: written to while its new values were on their way, which it has now; call "
                "optimizer.synchronize() before writing to parameters",
                subject="overlap",
                got=self._touched,
            )
        return ranks.Outcome(self._session.name, ack)

    def is_open(self, exc: BaseException) -> bool:
        """Whether the push may be made again after an error of ``finish``; Ctrl-C only ends the waiting."""
        is_refused = isinstance(exc, errors.LimitError) and not exc.retry_after_s
        return not is_refused and isinstance(exc, (*_OPEN, KeyboardInterrupt))

    def _write(self, at: int) -> None:
        leaf, values, _, fingerprint = self._coming[at]
        if at in self._left and arrays.fingerprint(leaf.parameter) != fingerprint:
            self._touched = leaf.name
        self._left.pop(at, None)
        self._remote.write(leaf, values)


def _coming(
    of: remote.Remote, tree: trees.TreeSpec, values: list[tensors.Array], names: Mapping[str, Any]
) -> dict[int, Coming]:
    """By id of the parameter."""
    at = {leaf.name: position for position, leaf in enumerate(tree.leaves)}
    return {
        id(leaf.parameter): Coming(
            leaf, values[at[leaf.name]], tree.offsets[at[leaf.name] + 1], arrays.fingerprint(leaf.parameter)
        )
        for leaf in of.leaves
        if leaf.name in names
    }
