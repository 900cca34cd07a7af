"""Hyperparameters between the groups of an optimizer and the server: what the user says wins, the rest is the server's.

Knows numbers only; gradients and parameters are of no concern here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from optwire import _session
from optwire.torch import recipes, translation
from optwire_proto import sessions


class Hyperparams:
    """What the server is known to have in effect; before there is a session, what the groups say by default.

    A value of the groups that differs from it is an edit: the user's, or a scheduler's. Edits go up, with the next
    push; a value that is none gives way to the server's.

    Attributes:
      known: by group and torch's name; replaced, never written to.
    """

    def __init__(self, recipe: recipes.Recipe) -> None:
        self.known: recipes.Values = {}
        self._recipe = recipe
        self._changes = 0  # how often the session's were changed, as far as we know
        self._pending: tuple[int, ...] = ()  # steps from which changes count that were made for later
        self._scheduled: tuple[int, str] | None = None  # the rate of ours that another client gave a schedule

    def default(self, groups: recipes.Groups, index: int, given: Iterable[str]) -> None:
        """Notes a group that was just added, in which the caller gave the arguments ``given`` and left out the rest."""
        told = set() if isinstance(self._recipe, recipes.Given) else set(given)
        values = self._recipe.values(groups).items()
        self.known = self.known | {
            (at, name): value for (at, name), value in values if at == index and name not in told
        }

    def born(self, groups: recipes.Groups) -> None:
        """A session was made with what the groups say."""
        self.known = self._begun(groups)
        self._changes, self._pending, self._scheduled = 0, (), None

    def edits(self, groups: recipes.Groups) -> recipes.Values:
        """What the server does not have yet."""
        return recipes.edited(self._recipe.values(groups), self.known)

    def sent(self, edits: recipes.Values) -> None:
        """A push that brings edits is on its way: until the server says that it has them, they are edits still."""
        self.known = {key: value for key, value in self.known.items() if key not in edits}

    def applied(self, edits: recipes.Values, ack: sessions.Ack) -> bool:
        """The server has them; returns whether ``learn`` is needed, as others changed something too."""
        self.known = self.known | edits
        expected, self._changes = self._changes + bool(edits), ack.changes
        is_surprise = ack.changes != expected or any(step <= ack.step for step in self._pending)
        return is_surprise and isinstance(self._recipe, recipes.Named)

    def learn(self, groups: recipes.Groups, session: _session.Session, kinds: Sequence[recipes.Kind]) -> None:
        """Takes over what the session has in effect; the groups say so too, except where they were edited.

        Args:
          groups: of the optimizer; changed.
          session: is asked.
          kinds: of its leaves, in the order of its tree.
        """
        described = session.describe()
        knobs = {at: dict(group.knobs) for group in described.groups for at in group.leaves}
        served = self._recipe.served([knobs[at] for at in range(len(kinds))], kinds)
        edits = self.edits(groups)
        self.known = self._begun(groups) | served
        show(groups, {key: value for key, value in served.items() if key not in edits})
        first = (min(kind.group for kind in kinds), translation.RATE)
        self._scheduled = None if first in served else first
        self._pending = tuple(c.from_step for c in session.info().changes if c.from_step > described.step)

    def follow(self, groups: recipes.Groups, rate: float) -> None:
        """Has ``lr`` of the groups say what the last step used, where the server decides it.

        Args:
          groups: of the optimizer; changed.
          rate: of the step.
        """
        keys = list(self.known) if isinstance(self._recipe, recipes.Given) else [self._scheduled]
        new = {key: (rate,) for key in keys if key is not None and not _is_close(self.known.get(key), rate)}
        self.known = self.known | new
        show(groups, new)

    def _begun(self, groups: recipes.Groups) -> recipes.Values:
        """What a session has in effect that begins with these groups; a schedule owns what it said last."""
        if not self._recipe.is_scheduled:
            return self._recipe.initial(groups)
        edits = self.edits(groups)
        return {key: value for key, value in self._recipe.values(groups).items() if key not in edits}


def _is_close(value: tuple[float, ...] | None, rate: float) -> bool:
    """The server computes in 32 bits."""
    return value is not None and np.float32(value[0]) == np.float32(rate)


def show(groups: recipes.Groups, values: Mapping[tuple[int, str], tuple[float, ...]]) -> None:
    """Writes values into the groups, in the form that theirs have."""
    for (index, name), value in values.items():
        group = groups[index]
        if recipes.floats(group[name], name, len(value)) == value:
            continue  # as it is written there: an int stays an int
        if isinstance(group[name], torch.Tensor):
            group[name].fill_(value[0])
        elif isinstance(group[name], tuple | list):
            group[name] = tuple(_assigned(old, new) for old, new in zip(group[name], value, strict=True))
        else:
            group[name] = value[0]


def _assigned(old: Any, new: float) -> Any:
    return old.fill_(new) if isinstance(old, torch.Tensor) else new
