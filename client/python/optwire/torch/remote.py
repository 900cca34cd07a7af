"""A session that stands for the parameters of a torch optimizer: made late, kept in step with them in both directions.

Knows tensors and recipes; hooks, closures and forms of a checkpoint are the optimizer's business.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from optwire import _session
from optwire.torch import arrays, checkpoints, fit, hyperparams, leaves, link, ranks, recipes
from optwire_proto import errors, tensors, trees


class Remote(link.Link):
    """The session of an optimizer, from the first need of one on."""

    # ------------------------------------------------------------------------------------------------- beginnings

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
            session = self.client.attach(self.name, worker=self._worker)
        except errors.SessionNotFoundError:
            return ()
        with self._or_as_before(groups, session):
            self._attach(session, groups)
            return self._receive()

    def load_handle(self, handle: checkpoints.Handle, groups: recipes.Groups) -> None:
        """Goes on with the session of a handle, which gives the model its parameters; or it is ours already.

        Raises:
          OutOfStepError: the session is at another step.
          TreeMismatchError, InvalidArgumentError: it is not one for these parameters and this optimizer.
        """
        if not handle.session or self.session is not None or self.name not in (None, handle.session):
            checkpoints.check(handle, self.name, self.session.step_count if self.session else 0)
            return
        self._check_names()
        session = self.client.attach(handle.session, worker=self._worker)
        with self._or_as_before(groups, session):
            checkpoints.check(handle, session.name, session.step_count)
            self.name = session.name
            self._attach(session, groups)
            self._receive(handle)

    def open(self, groups: recipes.Groups) -> _session.Session:
        """The session; made where there is none yet, or attached to, which gives the model its parameters."""
        if self.session is None:
            self._check_names()
            if self._workers:
                self._open_as_worker(groups)
            else:
                self._attach_or_create(groups)
        assert self.session is not None
        if self.loaded is not None:
            self._restore(self.loaded, groups)
            self.loaded = None
        return self.session

    def settle(self, groups: recipes.Groups, rejoin: Callable[[], None]) -> None:
        """After a lost answer: a new handle on the session as it is, whatever became of what was asked.

        Args:
          groups: of the optimizer.
          rejoin: called where the session has been extended, for the parameters of the group to become ``leaves``.
        """
        old = self.session
        if not self.is_unsure or old is None:
            return
        session = self.client.attach(old.name, worker=self._worker)
        try:
            tree = session.info().tree
            if tree is not None and len(tree.leaves) > len(self.leaves):
                rejoin()
            self._attach(session, groups)
        except BaseException:
            self._session = old
            session.close()
            raise
        old.close()
        self.is_unsure = False
        self._is_behind |= session.step_count != old.step_count
        self._mirror.forget()

    def extend(self, groups: recipes.Groups) -> None:
        """Has the session take leaves that were added to ``leaves``; what it has, it keeps."""
        if not self._workers:
            self._extend(groups)
            return
        old = self.session
        assert old is not None
        self._by_rank_0(lambda: self._extend(groups))
        old.close()
        self._attach_as_worker(groups)

    def _extend(self, groups: recipes.Groups) -> None:
        old = self.session
        assert old is not None and self._tree is not None
        self._check_names()
        self._check_step()
        self._upload_changes(only={leaf.name for leaf in self._tree.leaves})
        self._learn(groups)  # what others changed is to be as it is
        with self._unsure():
            self._session = self.client.create_session(
                self._params(), self._recipe.spec(groups, self._kinds()), extends=old
            )
        old.close()
        self._born(groups)

    @contextlib.contextmanager
    def _or_as_before(self, groups: recipes.Groups, session: _session.Session) -> Iterator[None]:
        """Whatever is raised inside, everything here and in the groups is as it was, and the handle closed."""
        known = copy.copy(self.hyperparams)
        known.known = dict(known.known)
        before = {**vars(self), "hyperparams": known}
        values = [{name: copy.deepcopy(group[name]) for name in self._recipe.defaults} for group in groups]
        try:
            yield
        except BaseException:
            session.close()
            vars(self).update(before)
            for group, old in zip(groups, values, strict=True):
                for name, value in old.items():
                    group[name] = group[name].copy_(value) if isinstance(group[name], torch.Tensor) else value
            raise

    def _attach_or_create(self, groups: recipes.Groups, **options: Any) -> None:
        try:
            if self._join(groups):
                return
            if self.origin is not None and self.loaded is None:
                self.loaded = checkpoints.copied(self.client, self.origin, self._by_name())
            spec = self._recipe.spec(groups, self._kinds())
            self._session = self.client.create_session(
                self._params(), spec, name=self.name, worker=self._rank, grads_codec=self.way.grads_codec, **options
            )
        except errors.SessionExistsError:  # somebody was faster
            if not self._join(groups):
                raise
            return
        self.name = self._session.name
        self._born(groups)

    def _join(self, groups: recipes.Groups) -> bool:
        """Goes on with the session of our name, which gives the model its parameters; whether there is one."""
        if self.name is None:
            return False
        try:
            session = self.client.attach(self.name, worker=self._rank)
        except errors.SessionNotFoundError:
            return False
        with self._or_as_before(groups, session):
            self._attach(session, groups)
            if self.loaded is None:
                self._receive()
        return True

    def _open_as_worker(self, groups: recipes.Groups) -> None:
        def found() -> None:
            self._attach_or_create(groups, aggregation=f"sync({ranks.world_size()})")
            if self.loaded is not None:
                self._restore(self.loaded, groups)
                self._upload_changes(is_for_all=True)

        self._by_rank_0(found)
        self.loaded = None
        self._attach_as_worker(groups)

    def _by_rank_0(self, action: Callable[[], None]) -> None:
        """Has rank 0 do what is to be done once, on a session that every rank attaches to afterwards."""

        def done() -> str:
            action()
            session, self._session = self._session, None
            assert session is not None
            session.close()
            self._mirror.forget()
            return session.name

        self.name = self._from_rank_0(done)

    def _attach_as_worker(self, groups: recipes.Groups) -> None:
        assert self.name is not None
        session = self.client.attach(self.name, worker=self._worker)
        with self._or_as_before(groups, session):
            self._attach(session, groups)
            self._receive()

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
        fit.check_codec(info, self.way.grads_codec)
        self._session, self._tree, self._fixed = session, info.tree, self._recipe.fixed(groups)
        self._learn(groups)

    def _born(self, groups: recipes.Groups) -> None:
        self._tree = trees.flatten(self._params()).spec
        self.hyperparams.born(groups)
        self._fixed = self._recipe.fixed(groups)
        self._mirror.remember(self.leaves)
        self.origin, self.unsent = None, None

    def _check_names(self) -> None:
        if self._session is None:  # until then a model may be converted
            self.leaves = [leaves.refreshed(leaf) for leaf in self.leaves]
        # Names, shapes, element types and their number, before anything is sent.
        trees.TreeSpec(tuple(arrays.leaf(leaf.name, leaf.parameter) for leaf in self.leaves))

    # ---------------------------------------------------------------------------------------------- there and back

    def push(
        self,
        groups: recipes.Groups,
        grads: Mapping[str, tensors.Array],
        *,
        grad_scale: float = 1.0,
        loss: float | None = None,
        weight: float = 1.0,
        telemetry: bool = False,
    ) -> tuple[int, ...]:
        """One step: changed parameters and edits go up with the gradients, the new parameters are written in place.

        Args:
          groups: of the optimizer; learning rates in them are refreshed.
          grads: by name; leaves that are not in it have no gradient.
          grad_scale: what they were multiplied by.
          loss: of the batch, where the optimizer asks for it.
          weight: what they count among those of other workers.
          telemetry: whether the ack is to have metrics.

        Returns:
          Positions of the parameters that were written.

        Raises:
          StaleStepError: the session has other parameters than the gradients were computed on.
          TreeMismatchError: there are more parameters, or less, or one of another element type.
        """
        session, tree, edits, changes = self.prepare(groups)
        nest = trees.unflatten(tree, [grads.get(leaf.name) for leaf in tree.leaves])
        self.hyperparams.sent(edits)
        pushed = session.step(
            nest, loss=loss, grad_scale=grad_scale, hyperparams=changes, weight=weight, telemetry=telemetry
        )
        written = self._write(trees.match(tree, pushed, "params"), only=grads.keys())
        self.follow(groups, edits)
        return written

    def prepare(
        self, groups: recipes.Groups
    ) -> tuple[_session.Session, trees.TreeSpec, recipes.Values, dict[str, float]]:
        """All that comes before a push; raises as ``push`` does.

        Returns:
          The session, its tree, the edits that are to go up, and the hyperparameters that they change there.
        """
        is_new, self._is_surprised = self.session is None, False
        session = self.open(groups)
        if is_new and self._is_surprised:
            raise fit.surprise(session)
        self._check_step()
        assert self._tree is not None
        fit.check_leaves(session, self._tree, self.leaves)
        self.check_fixed(groups)
        edits = self.hyperparams.edits(groups)
        changes = self._recipe.changes(edits, self._kinds())
        self._upload_changes()
        return session, self._tree, edits, changes

    def follow(self, groups: recipes.Groups, edits: recipes.Values, since: recipes.Values | None = None) -> None:
        """After a push: the groups say what the server has.

        Args:
          groups: of the optimizer; changed.
          edits: that the push brought.
          since: what the groups said when it was made: what they say otherwise by now stays. None: it was just made.
        """
        assert self.session is not None and self.session.last_ack is not None
        ack, now = self.session.last_ack, {} if since is None else self.values(groups)
        if self.hyperparams.applied(edits, ack):
            self._learn(groups)
        self.hyperparams.follow(groups, ack.learning_rate)
        hyperparams.show(groups, {key: value for key, value in now.items() if value != (since or {}).get(key)})

    def values(self, groups: recipes.Groups) -> recipes.Values:
        """What the groups say."""
        return self._recipe.values(groups)

    def write(self, leaf: leaves.Leaf, values: tensors.Array) -> None:
        """Gives one parameter the values that the server has."""
        arrays.write(leaf.parameter, values)
        self._mirror.remember([leaf])

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

    def _check_step(self) -> None:
        """Raises StaleStepError, with the newest parameters in the model, where gradients are of others."""
        if self._is_behind:
            self.pull()
            assert self.session is not None
            raise fit.surprise(self.session)

    def load(self, entries: Mapping[str, Mapping[str, Any]], groups: recipes.Groups) -> None:
        """Has the session continue from slots by leaf, at once or as soon as there is one; all of them or none."""
        if self.session is not None and self._workers:
            self._from_rank_0(lambda: self._restored(entries, groups))
            self.pull()
        elif self.session is not None:
            self._restore(entries, groups)
        else:  # no slots at all is what an optimizer has that made no step: nothing to be loaded
            self.loaded, self.origin = entries or None, None

    def _restored(self, entries: Mapping[str, Mapping[str, Any]], groups: recipes.Groups) -> str:
        """For all workers, parameters included; returns the name of the session."""
        self._restore(entries, groups)
        self._upload_changes(is_for_all=True)
        assert self.session is not None
        return self.session.name

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
            with self._unsure():
                self.session.load_state(slots, step=step)
            self._mirror.forget()  # the session may have had other parameters than the model
            self._is_behind = False
        self._mirror.masters = masters
