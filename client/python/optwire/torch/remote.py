"""A session that stands for the parameters of a torch optimizer: made late, kept in step with them in both directions.

Knows tensors and recipes; hooks, closures and forms of a checkpoint are the optimizer's business.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from optwire import _client, _session
from optwire.torch import arrays, checkpoints, fit, leaves, ranks, recipes, translation, ways
from optwire_proto import errors, sessions, tensors, trees


class Remote:
    """The session of an optimizer, from the first need of one on.

    Attributes:
      way: to the server.
      name: of the session; None: the server makes one.
      leaves: every parameter once, in the order of the groups.
      session: None before the first need.
      loaded: slots by leaf that the session is to have, once there is one.
    """

    def __init__(
        self, recipe: recipes.Recipe, way: ways.Way, *, client: _client.Client | None, name: str | None, workers: bool
    ) -> None:
        self.way = way
        self.name = None if name is None else sessions.check_name(name)
        self.leaves: list[leaves.Leaf] = []
        self.session: _session.Session | None = None
        self.loaded: Mapping[str, Mapping[str, Any]] | None = None
        self._recipe = recipe
        self._client = client
        self._workers = workers
        self._tree: trees.TreeSpec | None = None
        self._acknowledged: recipes.Values = {}
        self._fixed: list[dict[str, Any]] = []
        self._fingerprints: dict[str, tuple[int, int]] = {}
        self._masters: dict[str, tensors.Array] = {}
        self._is_surprised = False  # whether the last reading of parameters changed any
        self._finalizer: weakref.finalize[..., Any] | None = None

    # ------------------------------------------------------------------------------------------------- beginnings

    @property
    def client(self) -> _client.Client:
        """The user's client, or one of our own, which ends with us."""
        if self._client is None:
            self._client = self.way.connect()
            self._finalizer = weakref.finalize(self, self._client.close)
        return self._client

    def find(self, groups: recipes.Groups) -> tuple[int, ...]:
        """Attaches to the session of our name where there is one, which gives the model its parameters.

        Returns:
          Positions of the parameters that were written; empty where there is no such session.
        """
        assert self.name is not None
        self._check_names()
        if self._workers and not self._from_rank_0(self._exists):
            return ()
        try:
            session = self.client.attach(self.name, worker=ranks.rank() if self._workers else None)
        except errors.SessionNotFoundError:
            return ()
        self._attach(session, groups)
        return self.pull()

    def open(self, groups: recipes.Groups) -> _session.Session:
        """The session; made where there is none yet, or attached to, which gives the model its parameters."""
        if self.session is None:
            self._check_names()
            if self._workers:
                self._open_as_worker(groups)
            else:
                self._attach_or_create(groups)
            if not self._fingerprints and self.loaded is None:
                self.pull()
        assert self.session is not None
        if self.loaded is not None:
            self._restore(self.loaded, groups)
            self.loaded = None
        return self.session

    def extend(self, groups: recipes.Groups) -> None:
        """Has the session take leaves that were added to ``leaves``; what it has, it keeps."""
        assert self.session is not None
        self._check_names()
        self._upload_changes(only=set(self._fingerprints))
        self.session = self.client.create_session(
            self._params(), self._recipe.spec(groups, self._kinds()), extends=self.session
        )
        self._born(groups)
        if self._recipe.is_scheduled:
            self._acknowledged = self._recipe.values(groups)

    def close(self) -> None:
        """Releases the handle, and the client if it is ours."""
        if self.session is not None:
            self.session.close()
        if self._finalizer is not None:
            self._finalizer()

    def _attach_or_create(self, groups: recipes.Groups, **options: Any) -> None:
        if self.name is not None:
            try:
                self._attach(self.client.attach(self.name), groups)
                return
            except errors.SessionNotFoundError:
                pass
        try:
            spec = self._recipe.spec(groups, self._kinds())
            self.session = self.client.create_session(self._params(), spec, name=self.name, **options)
        except errors.SessionExistsError:  # somebody was faster
            assert self.name is not None
            self._attach(self.client.attach(self.name), groups)
            return
        self.name = self.session.name
        self._born(groups)

    def _open_as_worker(self, groups: recipes.Groups) -> None:
        def found() -> str:
            self._attach_or_create(groups, aggregation=f"sync({ranks.world_size()})")
            assert self.session is not None
            self.session.close()
            self._fingerprints = {}
            return self.session.name

        self.name = self._from_rank_0(found)
        self._attach(self.client.attach(self.name, worker=ranks.rank()), groups)

    def _from_rank_0(self, action: Callable[[], str]) -> str:
        parameters = [leaf.parameter for leaf in self.leaves]
        return ranks.from_rank_0(lambda: ranks.Outcome(session=action()), parameters).session

    def _exists(self) -> str:
        assert self.name is not None
        try:
            self.client.attach(self.name).close()
        except errors.SessionNotFoundError:
            return ""
        return self.name

    def _attach(self, session: _session.Session, groups: recipes.Groups) -> None:
        info = session.info()
        fit.check_tree(info, [arrays.leaf(leaf.name, leaf.parameter) for leaf in self.leaves])
        fit.check_spec(info, self._recipe.spec(groups, self._kinds()))
        self.session, self._tree, self._fixed = session, info.tree, self._recipe.fixed(groups)
        is_untouched = not recipes.edited(self._recipe.values(groups), self._recipe.initial(groups))
        self._learn(groups)
        if isinstance(self._recipe, recipes.Given) and is_untouched:
            self._show(groups)

    def _born(self, groups: recipes.Groups) -> None:
        self._tree = trees.flatten(self._params()).spec
        self._acknowledged = self._recipe.initial(groups)
        self._fixed = self._recipe.fixed(groups)
        self._remember(self.leaves)

    def _check_names(self) -> None:
        # Names, shapes, element types and their number, before anything is sent.
        trees.TreeSpec(tuple(arrays.leaf(leaf.name, leaf.parameter) for leaf in self.leaves))

    # ---------------------------------------------------------------------------------------------- there and back

    def push(
        self, groups: recipes.Groups, grads: Mapping[str, tensors.Array], *, grad_scale: float = 1.0
    ) -> tuple[int, ...]:
        """One step: changed parameters and edits go up with the gradients, the new parameters are written in place.

        Args:
          groups: of the optimizer; learning rates in them are refreshed.
          grads: by name; leaves that are not in it have no gradient.
          grad_scale: what they were multiplied by.

        Returns:
          Positions of the parameters that were written.

        Raises:
          StaleStepError: the session was attached to only now, and had other parameters than the model.
        """
        is_new, self._is_surprised = self.session is None, False
        session = self.open(groups)
        if is_new and self._is_surprised:
            raise errors.StaleStepError(
                f"{session} is at step {session.step_count} with other parameters than the gradients were computed on; "
                "the model has them now, compute gradients again",
                subject=session.name,
                step=session.step_count,
            )
        assert self._tree is not None
        if len(self.leaves) != len(self._tree.leaves):
            raise errors.TreeMismatchError(
                f"param_groups have {len(self.leaves)} parameters, {session} has {len(self._tree.leaves)}; parameters "
                "are added by add_param_group, and never taken away",
                subject=session.name,
                expected=str(len(self._tree.leaves)),
                got=str(len(self.leaves)),
            )
        self.check_fixed(groups)
        edits = recipes.edited(self._recipe.values(groups), self._acknowledged)
        changes = self._recipe.changes(edits, self._kinds())
        self._upload_changes()
        nest = trees.unflatten(self._tree, [grads.get(leaf.name) for leaf in self._tree.leaves])
        # Should the push fail, it is not known whether the server has them: until it says so, they are edits.
        self._acknowledged = {key: value for key, value in self._acknowledged.items() if key not in edits}
        answer = trees.match(self._tree, session.step(nest, grad_scale=grad_scale, hyperparams=changes), "params")
        self._acknowledged |= edits
        written = self._write(answer, only=grads.keys())
        assert session.last_ack is not None
        self._refresh(groups, session.last_ack.learning_rate)
        return written

    def check_fixed(self, groups: recipes.Groups) -> None:
        """Raises InvalidArgumentError where a group says something else than when the session was made."""
        for index, (old, new) in enumerate(zip(self._fixed, self._recipe.fixed(groups), strict=False)):
            for name, value in new.items():
                if old.get(name, value) != value:
                    raise errors.InvalidArgumentError(
                        f"param_groups[{index}][{name!r}] was changed from {old[name]!r} to {value!r}: it decides what "
                        "slots there are, or how they start; make a new RemoteOptimizer",
                        subject=name,
                        expected=repr(old[name]),
                        got=repr(value),
                    )

    def pull(self) -> tuple[int, ...]:
        """Reads the newest parameters into the model; what was written here is lost."""
        assert self.session is not None and self._tree is not None
        newest = trees.match(self._tree, self.session.params(), "params")
        by_name = dict(zip((leaf.name for leaf in self._tree.leaves), newest, strict=True))
        self._is_surprised = not all(arrays.is_same(leaf.parameter, by_name[leaf.name]) for leaf in self.leaves)
        return self._write(newest)

    def slots(self) -> dict[str, dict[str, Any]]:
        """Slots by leaf as torch keeps them: of the session, or those that it is to have once there is one."""
        if self.session is None:
            return {name: dict(entry) for name, entry in (self.loaded or {}).items()}
        return checkpoints.slots(self.session.state(), {leaf.name: leaf.parameter for leaf in self.leaves})

    def load(self, entries: Mapping[str, Mapping[str, Any]], groups: recipes.Groups) -> None:
        """Has the session continue from slots by leaf, at once or as soon as there is one; all of them or none."""
        if self.session is not None:
            self._restore(entries, groups)
        else:  # no slots at all is what an optimizer has that made no step: nothing to be loaded
            self.loaded = entries or None

    def _restore(self, entries: Mapping[str, Mapping[str, Any]], groups: recipes.Groups) -> None:
        """Replaces the session's slots and step.

        Parameters go up with the next push, as they are in the model then; where the server's own, in 32 bits, were
        loaded and round to them, those.
        """
        assert self.session is not None
        held = self.session.state()
        own = {leaf.name: groups[leaf.kind.group] for leaf in self.leaves}
        slots = checkpoints.replacements(held, entries, own)
        step = checkpoints.step(entries)
        masters = checkpoints.masters(held, entries)
        if not slots and step is not None:  # an optimizer without slots: the step is set along with any array
            slots = dict([*held.arrays.items()][:1])
        if slots:
            self.session.load_state(slots, step=step)
        self._masters = masters

    def _upload_changes(self, only: set[str] | None = None) -> None:
        """Parameters that were written to since the server's were, to the server."""
        masters, self._masters = self._masters, {}
        changed: dict[str, tensors.Array] = {}
        for leaf in self.leaves if only is None else [leaf for leaf in self.leaves if leaf.name in only]:
            master = masters.get(leaf.name)
            if master is not None and torch.equal(torch.from_numpy(master).to(leaf.parameter), leaf.parameter):
                changed[f"params/{leaf.name}"] = master
            elif self._fingerprints.get(leaf.name) != arrays.fingerprint(leaf.parameter):
                changed[f"params/{leaf.name}"] = self._recipe.kept(arrays.to_numpy(leaf.parameter, leaf.name))
        if not changed:
            return
        if self._workers:
            raise errors.UnsupportedError(
                f"{next(iter(changed))}: written to between steps, which distributed='workers' does not take; "
                "pull() brings the server's parameters back"
            )
        assert self.session is not None
        step = self.session.info().step
        if step != self.session.step_count:
            raise errors.StaleStepError(
                f"{next(iter(changed))} was written to on step {self.session.step_count}, {self.session} is at step "
                f"{step}, as another client pushed: call pull, and compute gradients again",
                subject=self.session.name,
                step=step,
            )
        self.session.load_state(changed, step=None)
        self._remember(self.leaves)

    def _write(self, params: Sequence[tensors.Array], only: Any = None) -> tuple[int, ...]:
        assert self._tree is not None
        by_name = dict(zip((leaf.name for leaf in self._tree.leaves), params, strict=True))
        written = [(at, leaf) for at, leaf in enumerate(self.leaves) if only is None or leaf.name in only]
        for _, leaf in written:
            arrays.write(leaf.parameter, by_name[leaf.name])
        self._remember([leaf for _, leaf in written])
        return tuple(at for at, _ in written)

    def _remember(self, leaves: Sequence[leaves.Leaf]) -> None:
        self._fingerprints |= {leaf.name: arrays.fingerprint(leaf.parameter) for leaf in leaves}

    def _learn(self, groups: recipes.Groups) -> None:
        """Asks what hyperparameters the session has in effect."""
        assert self.session is not None and self._tree is not None
        described = self.session.describe()
        knobs = {at: dict(group.knobs) for group in described.groups for at in group.leaves}
        kinds = {leaf.name: leaf.kind for leaf in self.leaves}
        ordered = [kinds[leaf.name] for leaf in self._tree.leaves]
        known = self._recipe.values(groups) if self._recipe.is_scheduled else self._recipe.initial(groups)
        self._acknowledged = known | self._recipe.served([knobs[at] for at in range(len(ordered))], ordered)

    def _refresh(self, groups: recipes.Groups, rate: float) -> None:
        """Has ``lr`` of the groups say what the server used, where that is not what we know."""
        first = (min(leaf.kind.group for leaf in self.leaves), translation.RATE)
        if np.float32(self._acknowledged[first][0]) == np.float32(rate):
            return
        if isinstance(self._recipe, recipes.Named):
            self._learn(groups)
            self._acknowledged[first] = (rate,)
        else:
            self._acknowledged = dict.fromkeys(self._acknowledged, (rate,))
        self._show(groups)

    def _show(self, groups: recipes.Groups) -> None:
        """Has the groups say the learning rates that are in effect."""
        for (index, name), value in self._acknowledged.items():
            if name == translation.RATE:
                _assign(groups[index], value[0])

    def _params(self) -> dict[str, tensors.Array]:
        return {leaf.name: arrays.to_numpy(leaf.parameter, leaf.name) for leaf in self.leaves}

    def _kinds(self) -> list[recipes.Kind]:
        """Of the leaves in the order in which a new session has them: by name."""
        return [leaf.kind for leaf in sorted(self.leaves, key=lambda leaf: leaf.name)]


def _assign(group: dict[str, Any], rate: float) -> None:
    value = group[translation.RATE]
    if isinstance(value, torch.Tensor):
        value.fill_(rate)
    else:
        group[translation.RATE] = rate
