"""State: the whole state of a session at one step, as named arrays. No gRPC, no protobuf."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from optwire import _options
from optwire_proto import tensors, trees


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """The whole state of a session, as ``Session.state`` reads it and ``Session.load_state`` takes it.

    Attributes:
      step: number of updates applied.
      arrays: every array by name: "SLOT/LEAF" where it belongs to a leaf, such as "mu/encoder/kernel"; parameters are
        the slot "params". Otherwise "state/PATH", such as "state/count". The leaf of a session that is a single array
        has no name: its arrays are called by their slots.
    """

    step: int
    arrays: Mapping[str, tensors.Array]

    def __repr__(self) -> str:
        return f"<optwire.State step={self.step}, {len(self.arrays)} arrays>"


def flat(state: State | Mapping[str, Any]) -> trees.Flat:
    """Arrays of a state by name, as they travel.

    Raises:
      InvalidArgumentError: neither a state nor a mapping.
      TreeError: a name or an array that cannot be sent, or no array at all.
    """
    arrays = state.arrays if isinstance(state, State) else state
    if not isinstance(arrays, Mapping):
        raise _options.wrong("state", "an optwire.State, or a mapping from name to array", arrays)
    found = trees.flatten(dict(arrays), "state")
    return trees.Flat(trees.TreeSpec(found.spec.leaves), found.arrays, ())
