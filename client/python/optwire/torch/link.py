"""The session of an optimizer, and the parameters that are to be the same here and there.

Knows tensors and recipes; how a session comes about, and what it is asked for, is the business of ``remote``.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from optwire import _client, _session
from optwire.torch import arrays, checkpoints, hyperparams, leaves, mirror, ranks, recipes, ways
from optwire_proto import errors, sessions, tensors, trees

# After these it is not known whether the server did what it was asked to.
_UNKNOWN: Final = (errors.DeadlineError, errors.UnavailableError, KeyboardInterrupt)


class Link:
    """A handle on the session, its connection, and what is known of the parameters on both sides.

    Attributes:
      way: to the server.
      name: of the session; None: the server makes one.
      leaves: every parameter once, in the order of the groups.
      origin: name of the session that this optimizer is a copy of, whose slots a new one starts with.
      unsent: names of parameters that were written to before a copy or pickle was made, and the step they were of.
      loaded: slots by leaf that the session is to have, once there is one.
      hyperparams: what the server has of those in the groups.
    """

    def __init__(
        self,
        recipe: recipes.Recipe,
        way: ways.Way,
        *,
        client: _client.Client | None,
        name: str | None,
        workers: bool,
        rank: int | None = None,
    ) -> None:
        self.way = way
        self.name = None if name is None else sessions.check_name(name)
        self.leaves: list[leaves.Leaf] = []
        self.origin: str | None = None
        self.unsent: tuple[frozenset[str], int] | None = None
        self.is_unsure = False  # whether an answer was lost that would say what the session is now
        self.loaded: Mapping[str, Mapping[str, Any]] | None = None
        self._recipe = recipe
        self._client = client
        self._workers = workers  # whether every process of `torch.distributed` is one
        self._rank = rank  # that the user gave this one
        self._tree: trees.TreeSpec | None = None
        self.hyperparams = hyperparams.Hyperparams(recipe)
        self._fixed: list[dict[str, Any]] = []
        self._mirror = mirror.Mirror()
        self._is_surprised = False  # whether the last reading of parameters changed any
        self._is_behind = False  # whether the session was found at another step than the parameters are of
        self._session: _session.Session | None = None
        self._pid = os.getpid()
        self._finalizer: weakref.finalize[..., Any] | None = None

    @property
    def session(self) -> _session.Session | None:
        """None before the first need; and in a forked process, which is a worker of its own."""
        self._leave_parent()
        return self._session

    @property
    def tree(self) -> trees.TreeSpec | None:
        """Of the session."""
        return self._tree

    @property
    def client(self) -> _client.Client:
        """The user's client, or one of our own, which ends with us."""
        self._leave_parent()
        if self._client is None:
            self._client = self.way.connect()
            self._finalizer = weakref.finalize(self, self._client.close)
        return self._client

    def _leave_parent(self) -> None:
        """In a forked process: leaves handle and connection to the parent, as if this had been pickled."""
        if os.getpid() == self._pid:
            return
        self.unsent = self.written()
        if self._finalizer is not None:
            self._finalizer.detach()
        self._pid, self._session, self._client, self._finalizer = os.getpid(), None, None, None
        self._mirror.forget()

    def written(self) -> tuple[frozenset[str], int] | None:
        """Names of the parameters that were written to and have not gone up, and the session's step; None: none."""
        if self._session is None:
            return self.unsent
        names = frozenset(leaf.name for leaf in self._mirror.written(self.leaves))
        return (names, self._session.step_count) if names else None

    def close(self) -> None:
        """Releases the handle, and the client if it is ours."""
        if self.session is not None:
            self.session.close()
        if self._finalizer is not None:
            self._finalizer()

    @property
    def _worker(self) -> int | None:
        return ranks.rank() if self._workers else self._rank

    @contextlib.contextmanager
    def _unsure(self) -> Iterator[None]:
        try:
            yield
        except _UNKNOWN:
            self.is_unsure = True
            raise

    def pull(self) -> tuple[int, ...]:
        """Reads the newest parameters into the model; what was written here is lost."""
        self.unsent = None
        written = self._receive()
        self._is_behind = False
        return written

    def _receive(self, handle: checkpoints.Handle | None = None) -> tuple[int, ...]:
        """Reads the newest parameters into the model, except those that were written to and are to go up."""
        assert self.session is not None and self._tree is not None
        newest = trees.match(self._tree, self.session.params(), "params")
        if handle is not None:
            checkpoints.check(handle, self.session.name, self.session.step_count)
            self.unsent = None
        by_name = dict(zip((leaf.name for leaf in self._tree.leaves), newest, strict=True))
        names, step = self.unsent or (frozenset(), 0)
        own = names if step == self.session.step_count else frozenset()
        taken = [leaf for leaf in self.leaves if leaf.name not in own]
        self._is_surprised = not all(arrays.is_same(leaf.parameter, by_name[leaf.name]) for leaf in taken)
        self.unsent = None
        return self._write(newest, only={leaf.name for leaf in taken})

    def slots(self) -> dict[str, dict[str, Any]]:
        """Slots by leaf as torch keeps them: of the session, or those that it is to have once there is one."""
        if self.session is None:
            return {name: dict(entry) for name, entry in (self.loaded or {}).items()}
        found = checkpoints.slots(self.session.state(), self._by_name())
        for leaf in self.leaves:
            if checkpoints.PARAMS in found[leaf.name]:
                found[leaf.name][checkpoints.PARAMS] = self._mirror.wide(leaf, found[leaf.name][checkpoints.PARAMS])
        return found

    def _upload_changes(self, only: set[str] | None = None, *, is_for_all: bool = False) -> None:
        """Parameters that were written to since the server's were, and differ from them, to the server.

        Args:
          only: names; None: all.
          is_for_all: whether, of several workers, this is the one that does it while the others wait.
        """
        written = self._mirror.written(leaf for leaf in self.leaves if only is None or leaf.name in only)
        if not written:
            return
        assert self.session is not None
        changed = self._mirror.changed(written, self._newest(written[0].name), self._recipe.kept)
        if changed and self._workers and not is_for_all:
            raise errors.UnsupportedError(
                f"params/{next(iter(changed))}: written to between steps, which distributed='workers' does not take; "
                "pull() brings the server's parameters back"
            )
        if changed:
            with self._unsure():
                uploads = {f"params/{name}": array for name, array in changed.items()}
                self.session.load_state(uploads, base_step=self.session.step_count)
        self._mirror.remember(written)

    def _newest(self, written: str) -> dict[str, tensors.Array]:
        """The server's parameters by leaf, read without a word to the session that we have them.

        Raises:
          StaleStepError: they are of another step than ours, and a parameter, ``written``, was written to.
          SessionNotFoundError: our session is gone, or another has its name.
        """
        session = self.session
        assert session is not None and self._tree is not None
        with self.client.attach(session.name) as reader:
            if reader.id != session.id:
                raise errors.SessionNotFoundError(
                    f"{session} is gone, and another one has its name", subject=session.name
                )
            newest = trees.match(self._tree, reader.params(), "params")
            step = reader.step_count
        if step != session.step_count:
            raise errors.StaleStepError(
                f"params/{written} was written to on step {session.step_count}, {session} is at step {step}: another "
                "client pushed, or the answer to a push of ours was lost; call pull, and compute gradients again",
                subject=session.name,
                step=step,
            )
        return dict(zip((leaf.name for leaf in self._tree.leaves), newest, strict=True))

    def _write(self, params: Sequence[tensors.Array], only: Any = None) -> tuple[int, ...]:
        assert self._tree is not None
        by_name = dict(zip((leaf.name for leaf in self._tree.leaves), params, strict=True))
        written = [(at, leaf) for at, leaf in enumerate(self.leaves) if only is None or leaf.name in only]
        for _, leaf in written:
            arrays.write(leaf.parameter, by_name[leaf.name])
        self._mirror.remember(leaf for _, leaf in written)
        return tuple(at for at, _ in written)

    def _learn(self, groups: recipes.Groups) -> None:
        """Asks what hyperparameters the session has in effect."""
        assert self.session is not None and self._tree is not None
        kinds = {leaf.name: leaf.kind for leaf in self.leaves}
        self.hyperparams.learn(groups, self.session, [kinds[leaf.name] for leaf in self._tree.leaves])

    def _params(self) -> dict[str, tensors.Array]:
        return {leaf.name: arrays.to_numpy(leaf.parameter, leaf.name) for leaf in self.leaves}

    def _by_name(self) -> dict[str, torch.Tensor]:
        return {leaf.name: leaf.parameter for leaf in self.leaves}

    def _kinds(self) -> list[recipes.Kind]:
        """Of the leaves in the order in which a new session has them: by name."""
        return [leaf.kind for leaf in sorted(self.leaves, key=lambda leaf: leaf.name)]
