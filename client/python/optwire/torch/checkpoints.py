"""What ``state_dict`` holds and ``load_state_dict`` takes: a handle on the session, or the slots in torch's own layout.

A handle is plain types only, so that ``torch.load(weights_only=True)`` opens it, and small. Knows no session.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any, Final

import numpy as np
import torch

import optwire
from optwire.torch import arrays, translation
from optwire_proto import errors, tensors

# The key of a handle among what torch keeps for a parameter.
REMOTE: Final = "remote"
PARAMS: Final = "params"
STEP: Final = "step"
# Scalars that torch keeps for each parameter beside its step; what a leaf starts with that was never updated, where
# that is not zero. Adagrad's `sum` starts at a value of the group's.
_FRESH: Final = {"mu_product": 1.0, "mu": 1.0}


@dataclasses.dataclass(frozen=True, slots=True)
class Handle:
    """Which step of which session a checkpoint was made at; the name is empty where there was no session yet."""

    session: str
    step: int

    def entry(self, leaf: str) -> dict[str, Any]:
        """What stands for one parameter's slots."""
        return {REMOTE: {"session": self.session, "step": self.step, "leaf": leaf}}


# Before the first step.
NONE: Final = Handle("", 0)


def handle(state: Mapping[Any, Any]) -> Handle | None:
    """The handle in the "state" of a loaded dict; None where there are slots, or nothing.

    Raises:
      InvalidArgumentError: no handle of ours, or of several sessions.
    """
    entries = [entry[REMOTE] for entry in state.values() if isinstance(entry, Mapping) and REMOTE in entry]
    if not entries:
        return None
    try:
        found = {Handle(str(entry["session"]), int(entry["step"])) for entry in entries}
    except (TypeError, KeyError, ValueError) as exc:
        raise errors.InvalidArgumentError("load_state_dict: a handle without session and step") from exc
    if len(found) != 1 or len(entries) != len(state):
        raise errors.InvalidArgumentError(
            f"load_state_dict: handles of {len(found)} sessions or steps for {len(state)} parameters, expected one"
        )
    return found.pop()


def check(handle: Handle, session: str | None, at_step: int) -> None:
    """Raises where a handle is of another session or step than there are.

    Raises:
      InvalidArgumentError: of another session.
      OutOfStepError: of another step.
    """
    if handle.session and session not in (None, handle.session):
        raise errors.InvalidArgumentError(
            f"load_state_dict: a handle of session {handle.session!r}, this optimizer has {session!r}; give "
            f"session={handle.session!r} to RemoteOptimizer, or save with state='full'",
            subject=handle.session,
            expected=repr(session),
            got=repr(handle.session),
        )
    if handle.step != at_step:
        raise errors.OutOfStepError(
            f"load_state_dict: a handle of step {handle.step}, session {session or handle.session!r} is at step "
            f"{at_step}, and the server keeps no snapshots to go back to; save with state='full' to restore any step",
            subject=handle.session,
            expected=str(at_step),
            got=str(handle.step),
            step=at_step,
        )


def merged(
    groups: Sequence[Mapping[str, Any]], loaded: Sequence[Mapping[str, Any]], *, leaving_out: Set[str]
) -> list[dict[str, Any]]:
    """Values of each loaded group that replace those of ours; how torch is to compute is none of them."""
    found = []
    for old, new in zip(groups, loaded, strict=True):
        # Our names stay those of our parameters, whatever order the others were in.
        without = {"params", *translation.IMPLEMENTATION, *leaving_out, *({"param_names"} & old.keys())}
        values = {name: copy.deepcopy(value) for name, value in new.items() if name not in without}
        found.append({name: tuple(v) if isinstance(old.get(name), tuple) else v for name, v in values.items()})
    return found


# -------------------------------------------------------------------------------------------------- torch's layout


def slots(state: optwire.State, parameters: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The slots of each leaf as torch keeps them, in the element types of the server.

    A parameter that the server keeps in another width comes along as "params".
    """
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in parameters}
    for name, held in _by_leaf(state).items():
        if name not in parameters:
            continue
        for slot, array in held.items():
            if slot == PARAMS and arrays.from_numpy(array).dtype is parameters[name].dtype:
                continue
            found[name][slot] = torch.tensor(float(array)) if slot == STEP else arrays.from_numpy(array)
        if found[name]:  # where the optimizer does not count by itself, the session does
            found[name].setdefault(STEP, torch.tensor(float(state.step)))
    return found


def copied(
    client: optwire.Client, origin: str, parameters: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]] | None:
    """The slots that a copy of an optimizer starts with: those of its origin's session, as it is now.

    Raises:
      SessionNotFoundError: that one is gone.
    """
    try:
        with client.attach(origin) as session:
            found = slots(session.state(), parameters)
    except errors.SessionNotFoundError as exc:
        raise errors.SessionNotFoundError(
            f"session {origin!r}, of whose optimizer this is a copy, is gone and its slots with it: load a full state "
            "first, or make a new RemoteOptimizer",
            subject=origin,
        ) from exc
    return found if any(found.values()) else None


def by_name(
    state_dict: Mapping[str, Any], names: Sequence[Sequence[str]], own_names: Sequence[Sequence[str] | None]
) -> dict[str, Mapping[str, Any]]:
    """The loaded slots of each leaf: by name where both sides have names, otherwise by position.

    Args:
      state_dict: in torch's layout.
      names: leaves of each group.
      own_names: names of each group's parameters where the user gave them.

    Raises:
      ValueError: other groups, other numbers of parameters in them, or other names.
    """
    saved = state_dict["param_groups"]
    if len(saved) != len(names):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(saved)}, expected {len(names)}"
        )
    state = copy.deepcopy(state_dict["state"])  # those of torch's optimizers go on changing
    entries: dict[str, Mapping[str, Any]] = {}
    for index, (group, leaves) in enumerate(zip(saved, names, strict=True)):
        if len(group["params"]) != len(leaves):
            raise ValueError(
                f"loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"group {index} has {len(group['params'])} parameters, expected {len(leaves)}"
            )
        if not group.get("param_names") or not own_names[index]:
            entries |= {leaf: state[key] for leaf, key in zip(leaves, group["params"], strict=True) if key in state}
    named = {
        name: key for group in saved for name, key in zip(group.get("param_names") or (), group["params"], strict=False)
    }
    for group, leaves, own in zip(saved, names, own_names, strict=True):
        if group.get("param_names") and own:
            for leaf in leaves:
                if leaf not in named:
                    raise ValueError(
                        f"loaded state dict has no parameter {leaf!r}, it has {', '.join(sorted(named))[:300]}; rename "
                        "them in a register_load_state_dict_pre_hook, or take 'param_names' out to go by position"
                    )
                if named[leaf] in state:
                    entries[leaf] = state[named[leaf]]
    return entries


def step(entries: Mapping[str, Mapping[str, Any]]) -> int | None:
    """The greatest count of updates in it; None where there is none."""
    counts = [int(float(entry[STEP])) for entry in entries.values() if entry.get(STEP) is not None]
    return max(counts, default=None)


def replacements(
    held: optwire.State, entries: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Mapping[str, Any]]
) -> dict[str, tensors.Array]:
    """Arrays for ``Session.load_state`` that take every leaf to what was loaded; leaves without slots start anew.

    Args:
      held: what the session has now: which slots there are, their shapes and element types.
      entries: loaded slots by leaf.
      groups: hyperparameters by leaf.

    Raises:
      ValueError: a slot that the session does not have, or of another shape.
    """
    found: dict[str, tensors.Array] = {}
    by_leaf = _by_leaf(held)
    for name, group in groups.items():
        entry = {slot: value for slot, value in entries.get(name, {}).items() if value is not None and slot != PARAMS}
        own = {slot: array for slot, array in by_leaf[name].items() if slot != PARAMS}
        for slot in entry:
            if slot not in own and slot != STEP:
                raise ValueError(
                    f"loaded state dict has {slot!r} for {name!r}; this optimizer keeps {', '.join(own) or 'nothing'}"
                )
        if STEP in own and STEP not in entry and entry:
            entry[STEP] = 1  # SGD counts here, and not in torch: what matters is that there was a step
        for slot, array in own.items():
            found[f"{slot}/{name}"] = (
                _like(array, entry[slot], slot, name) if slot in entry else _fresh(array, slot, group)
            )
    return found


def masters(held: optwire.State, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, tensors.Array]:
    """Parameters in the server's own width by leaf, where they were loaded."""
    return {
        name: _like(held.arrays[f"{PARAMS}/{name}"], entry[PARAMS], PARAMS, name)
        for name, entry in entries.items()
        if PARAMS in entry
    }


def _by_leaf(state: optwire.State) -> dict[str, dict[str, tensors.Array]]:
    """Arrays of a state by leaf and slot; what belongs to no leaf is under "PATH" of "state"."""
    found: dict[str, dict[str, tensors.Array]] = {}
    for whole, array in state.arrays.items():
        slot, _, leaf = whole.partition("/")
        if slot != "state":
            found.setdefault(leaf, {})[slot] = array
    return found


def _like(array: tensors.Array, value: Any, slot: str, name: str) -> tensors.Array:
    """A loaded value in the shape and element type of an array of the session."""
    tensor = value.detach().cpu() if isinstance(value, torch.Tensor) else torch.tensor(value)
    if array.shape == () and tensor.numel() == 1:
        tensor = tensor.reshape(())
    if tuple(tensor.shape) != array.shape:
        raise ValueError(
            f"loaded state dict has {slot!r} of shape {tuple(tensor.shape)} for {name!r}, expected {array.shape}; "
            "with 'param_names' on both sides slots are matched by name"
        )
    return arrays.to_numpy(tensor.to(arrays.from_numpy(array).dtype), name)


def _fresh(array: tensors.Array, slot: str, group: Mapping[str, Any]) -> tensors.Array:
    start = float(group.get("initial_accumulator_value", 0.0)) if slot == "sum" else _FRESH.get(slot, 0.0)
    return np.full_like(array, complex(start, start) if np.iscomplexobj(array) else start)
