"""Optimizer states as flat dictionaries of named tensors, for files and wires that hold nothing else.

Knows names, shapes and dtypes. Must not know files, formats, sessions or update rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr

from optwire_server.optimizers.precision import dtype_of
from optwire_server.optimizers.state import OptimizerState, unpack_optimizer_state


class StateTensorsError(ValueError):
    """Named tensors do not make up the state they are read as.

    Attributes:
        missing: names the state has and the tensors lack.
        extra: names the tensors have and the state lacks.
        misshaped: names whose tensor has another shape than the state.
        mistyped: names whose tensor has another dtype than the state.
    """

    def __init__(
        self,
        missing: tuple[str, ...] = (),
        extra: tuple[str, ...] = (),
        misshaped: tuple[str, ...] = (),
        mistyped: tuple[str, ...] = (),
    ) -> None:
        """Names every tensor at fault."""
        self.missing, self.extra, self.misshaped, self.mistyped = missing, extra, misshaped, mistyped
        faults = {"missing": missing, "extra": extra, "of another shape": misshaped, "of another dtype": mistyped}
        listed = "; ".join(f"{fault}: {', '.join(map(repr, names))}" for fault, names in faults.items() if names)
        super().__init__(f"tensors do not match the optimizer state: {listed}")


def state_to_tensors(opt_state: OptimizerState) -> dict[str, Any]:
    """Gives every array of a state under a name: the path of the leaf, `/`, and the slot of the rule's state.

    The second moment of `params["dense"][0]` under `adam` is `dense/0/2`; a list within a rule's state adds its index
    after a dot, as in `dense/0/2.1`. `/`, `.` and `%` within a key are written as `%2F`, `%2E` and `%25`.

    Args:
        opt_state: a state, or what `jax.eval_shape` gives for one: then the shapes and dtypes to expect.

    Returns:
        The arrays themselves, none of them copied, by name, in the order of the tree.

    Raises:
        ValueError: two arrays have the same name, as only the keys of containers unknown to jax can bring about.
    """
    tensors: dict[str, Any] = {}
    for name, value in _named_slots(opt_state):
        if name in tensors:
            raise ValueError(f"two arrays of the optimizer state are both named {name!r}")
        tensors[name] = value
    return tensors


def state_from_tensors(tensors: Mapping[str, Any], like: OptimizerState) -> OptimizerState:
    """Makes a state of the tensors `state_to_tensors` gave.

    Args:
        tensors: arrays by name. The `.npy` format forgets dtypes numpy itself lacks, bfloat16 among them, and gives
            them back as so many raw bytes; those are taken for the dtype the state asks for.
        like: a state of the same optimizer over the same params, for its structure, shapes and dtypes only;
            `jax.eval_shape(init_fun, params)` will do.

    Returns:
        A state of the structure of `like` that holds the tensors themselves.

    Raises:
        StateTensorsError: a tensor is missing, is one too many, or has another shape or dtype than in `like`.
    """
    expected = state_to_tensors(like)
    given = {name: _typed(tensors[name], slot) for name, slot in expected.items() if name in tensors}
    faults = {
        "missing": tuple(name for name in expected if name not in given),
        "extra": tuple(name for name in tensors if name not in expected),
        "misshaped": tuple(name for name, value in given.items() if np.shape(value) != np.shape(expected[name])),
        "mistyped": tuple(name for name, value in given.items() if value.dtype != dtype_of(expected[name])),
    }
    if any(faults.values()):
        raise StateTensorsError(**faults)
    return jax.tree.unflatten(jax.tree.structure(like), [given[name] for name in expected])


def _named_slots(opt_state: OptimizerState) -> Iterator[tuple[str, Any]]:
    marks, _ = jax.tree_util.tree_flatten_with_path(unpack_optimizer_state(opt_state))
    for path, mark in marks:
        for slot_path, value in jax.tree_util.tree_leaves_with_path(mark.subtree):
            slot = ".".join(map(_escaped, slot_path)) or "0"
            yield "/".join([*map(_escaped, path), slot]), value


def _escaped(key: Any) -> str:
    name = keystr((key,), simple=True)
    return name.replace("%", "%25").replace("/", "%2F").replace(".", "%2E")


def _typed(tensor: Any, slot: Any) -> Any:
    """Gives a tensor of raw bytes the dtype of its slot, if that is a dtype numpy lacks and of the same size."""
    value = tensor if hasattr(tensor, "dtype") else np.asarray(tensor)
    dtype = dtype_of(slot)
    forgotten = value.dtype.type is np.void and value.dtype.names is None and dtype.isbuiltin != 1
    return value.view(dtype) if forgotten and value.dtype.itemsize == dtype.itemsize else value
