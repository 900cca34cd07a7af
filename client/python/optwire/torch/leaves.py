"""Parameters of torch as the leaves of a session: what each is called, and which optimizer of the spec it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from optwire.torch import arrays, recipes


class Leaf(NamedTuple):
    """A parameter and what it is called on the server."""

    name: str
    parameter: torch.Tensor
    kind: recipes.Kind


def named(groups: recipes.Groups, known: Mapping[int, str]) -> list[Leaf]:
    """Every parameter of the groups once, one that is given twice included.

    Args:
      groups: of an optimizer.
      known: names of parameters that have one, by id.

    Raises:
      TreeError: a parameter that cannot be served.
    """
    found: dict[int, Leaf] = {}
    for index, group in enumerate(groups):
        names = group.get("param_names") or [f"g{index}.p{at}" for at in range(len(group["params"]))]
        for name, parameter in zip(names, group["params"], strict=True):
            kind = recipes.Kind(index, recipes.is_16_bit(parameter))
            leaf = Leaf(known.get(id(parameter), name), parameter, kind)
            arrays.leaf(leaf.name, parameter)
            found.setdefault(id(parameter), leaf)
    return list(found.values())


def refreshed(leaf: Leaf) -> Leaf:
    """The leaf with the element type that its parameter has now."""
    return leaf._replace(kind=leaf.kind._replace(is_16_bit=recipes.is_16_bit(leaf.parameter)))


def by_group(leaves: Sequence[Leaf], groups: recipes.Groups) -> list[list[str]]:
    """Names of each group's parameters, one that is given twice twice."""
    names = {id(leaf.parameter): leaf.name for leaf in leaves}
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]
