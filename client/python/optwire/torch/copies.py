"""Copies, pickles and endings of a remote optimizer: what goes along, and that two never push as one."""

from __future__ import annotations

import abc
import copy
import weakref
from types import TracebackType
from typing import Any, Final, Self

import torch

from optwire import _client
from optwire.torch import amp as amps
from optwire.torch import overlap as overlaps
from optwire.torch import ranks, recipes, remote
from optwire_proto import errors, sessions

_KEPT: Final = (
    "_distributed",
    "_form",
    "_amp",
    "_missing_grad",
    "_allow_zero",
    "_is_detached",
    "_recipe",
    "_telemetry",
    "_given",
    "_rank",
    "_late",
)


class Detachable(torch.optim.Optimizer, abc.ABC):
    """An optimizer with a session that copies do not share, until they are told to."""

    _remote: remote.Remote
    _overlap: overlaps.Overlap | None
    _ending: tuple[_client.Client | None, weakref.finalize[..., Any]]
    _recipe: recipes.Recipe
    _amp: str
    _distributed: str | None
    _is_detached: bool
    _pending: dict[str, Any] | None
    _rejoined: dict[str, Any] | None
    _last: ranks.Outcome
    _rank: int | None
    _late_count: int

    @abc.abstractmethod
    def _show_handles(self) -> None:
        """Has ``state`` say where the session stands."""

    @abc.abstractmethod
    def _name_leaves(self) -> None:
        """Has the session's leaves be the parameters of the groups."""

    def attach(self, session: str | None = None) -> None:
        """Gives a copy a session of its own: one of that name, or, without a name, the one it was copied from.

        The session is made, or its parameters are read, at the next ``step``. One that is made starts with the model's
        parameters, and the slots that the session it was copied from has by then.

        Raises:
          InvalidArgumentError: no name that a session can have.
        """
        if session is not None:
            self._remote.name = sessions.check_name(session)
        self._is_detached = False

    def synchronize(self) -> None:
        """Waits for the push that is on its way, and writes the new parameters; with ``overlap=True`` only.

        Raises:
          OptwireError: what ``step`` would have raised.
        """
        if self._overlap is not None:
            self._overlap.wait()
            if self._overlap.outcome.ack is not None:
                self._last = self._overlap.outcome

    def close(self) -> None:
        """Releases the session's handle, and the connection where it was made from ``target``. The session lives on."""
        try:
            self.synchronize()
        finally:
            if self._overlap is not None:
                self._overlap.remove()
            self._remote.close()

    def _set_up_overlap(self) -> None:
        """For a new optimizer with ``overlap=True``: watches its parameters, for as long as it lives."""
        self._overlap = overlaps.Overlap(self._remote)
        self._ending = None, weakref.finalize(self, self._overlap.end)
        self._overlap.watch()

    def _outlive_client(self) -> None:
        """Has the client be closed after our last push is over: when a process ends, what was made last ends first."""
        client, ending = self._ending
        if client is not self._remote.client:
            assert self._overlap is not None
            ending.detach()
            self._ending = self._remote.client, weakref.finalize(self, self._overlap.end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        self.synchronize()
        self._show_handles()
        return {
            **super().__getstate__(),
            **{name: self.__dict__[name] for name in _KEPT},
            "_way": self._remote.way,
            "_loaded": self._remote.loaded,
            "_origin": self._remote.name if self._remote.session is not None else self._remote.origin,
            "_unsent": self._remote.written(),
            "_name": self._remote.name,
            "_known": self._remote.hyperparams.known,
            "_leaf_names": [leaf.name for leaf in self._remote.leaves],
            "_overlaps": self._overlap is not None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        way, name, names, loaded = (state.pop(key) for key in ("_way", "_name", "_leaf_names", "_loaded"))
        known, origin, unsent = (state.pop(key) for key in ("_known", "_origin", "_unsent"))
        overlaps_too = state.pop("_overlaps")
        self._overlap = None
        super().__setstate__(state)
        amps.mark(self, self._amp, self._distributed)
        self._last = ranks.Outcome()
        self._late_count = 0
        workers = self._distributed == "workers"
        self._remote = remote.Remote(self._recipe, way, client=None, name=name, workers=workers, rank=self._rank)
        self._remote.loaded, self._remote.hyperparams.known = loaded, known
        self._remote.origin, self._remote.unsent = origin, unsent
        self._pending = self._rejoined = None
        self._name_leaves()
        self._remote.leaves = [leaf._replace(name=own) for leaf, own in zip(self._remote.leaves, names, strict=True)]
        if overlaps_too:
            self._set_up_overlap()

    def __copy__(self) -> Self:
        return self._detached(self.__getstate__())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self._detached(copy.deepcopy(self.__getstate__(), memo))

    def _detached(self, state: dict[str, Any]) -> Self:
        twin = self.__class__.__new__(self.__class__)
        twin.__setstate__(state | {"_is_detached": True})
        return twin

    def _check_attached(self) -> None:
        if self._is_detached:
            raise errors.DetachedError(
                "this optimizer is a copy, and two owners of one session push twice; call attach('NAME') for a "
                "session of its own, or attach() to go on with the one it was copied from",
                subject=self._remote.name or "",
            )
