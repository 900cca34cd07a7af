"""What an entry of the catalogue is. Standard library only."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

REQUIRED: Final = object()


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a constructor.

    Attributes:
      name: as the constructor spells it.
      takes: what it takes, in a word; ``checks`` has the list.
      default: its default, or REQUIRED.
      none: whether it takes None beside that.
      keyword_only: whether it must be given by name.
      variadic: whether it takes all further positional arguments, as a list.
      choices: the texts it takes, where ``takes`` is "text".
    """

    name: str
    takes: str
    default: Any = REQUIRED
    none: bool = False
    keyword_only: bool = False
    variadic: bool = False
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One constructor of the catalogue.

    Attributes:
      name: in specs. Optax's names that the seed has too are written "optax.adam".
      kind: what it makes: "optimizer", "schedule", "transformation", or "wrapper", an optimizer around another one.
      parameters: in order.
      summary: one line.
      origin: whose definition it is: "optwire", "optax" or "optax.contrib".
      refusal: why it is not served, where it is known and refused.
      extras: what a push must bring along beside the gradients, such as "loss".
    """

    name: str
    kind: str
    parameters: tuple[Parameter, ...]
    summary: str
    origin: str = "optwire"
    refusal: str = ""
    extras: tuple[str, ...] = ()

    @property
    def signature(self) -> str:
        """As Python would write the call: ``clip(max_delta)``, ``adam(step_size, b1=0.9, b2=0.999, eps=1e-08)``."""
        shown, star = [], False
        for parameter in self.parameters:
            if parameter.keyword_only and not star:
                shown.append("*")
                star = True
            default = "" if parameter.default is REQUIRED else f"={parameter.default!r}"
            shown.append(f"{'*' * parameter.variadic}{parameter.name}{default}")
        return f"{self.name}({', '.join(shown)})"
