"""Recipes: what all kernels of a program have in common, and what their updates are told.

Knows specs, and no session.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax

from optwire_proto import errors, specs, trees
from optwire_server.engine import build, executables

# What a push brings along beside gradients, and what optax calls it.
OPTAX_EXTRAS: Final = {"loss": "value"}


class Variant(NamedTuple):
    """Which of a program's compiled updates a push runs.

    Attributes:
      closing: whether the push closes a step; others are only gathered (``accumulate``).
      scaled: whether gradients are divided by a ``grad_scale`` first.
      telemetry: whether the sums that norms are made of are computed.
      absent: whether some leaves have no gradient. Of a whole tree ``Operands.present`` says which do; a smaller block
        has none at all.
      updates: whether what was added to the parameters is returned.
    """

    closing: bool = True
    scaled: bool = False
    telemetry: bool = False
    absent: bool = False
    updates: bool = False


class Operands(NamedTuple):
    """What an update takes beside gradients and state. Python numbers, so that 16-bit leaves are not promoted.

    Attributes:
      rates: learning rates, in the order of ``Program.rate_paths``.
      push: index of the push, from 0.
      grad_scale: what gradients are divided by; None where they are not.
      extras: what the push brought along, by optax's names.
      present: whether each leaf has a gradient; None: all have. An operand a leaf: picking from one array makes XLA
        compile for ten times as long.
    """

    rates: tuple[float, ...]
    push: int
    grad_scale: float | None = None
    extras: Mapping[str, float] = {}
    present: tuple[bool, ...] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """What all kernels of a program have in common.

    Attributes:
      spec: checked.
      leaves: of the tree.
      rate_paths: of the learning rates, in order.
      extras: what pushes bring along, by the protocol's names.
      restores: whether the whole state stays as it was where something is not finite.
      wide: whether it computes with 64 bits.
      device: that it computes on.
      compiled: where executables are found and kept.
    """

    spec: specs.Spec
    leaves: tuple[trees.LeafSpec, ...]
    rate_paths: tuple[str, ...]
    extras: tuple[str, ...]
    restores: bool
    wide: bool
    device: jax.Device
    compiled: executables.Executables

    def site(self, rates: Sequence[Any], changed: Mapping[int, trees.LeafSpec], seed: int = 0) -> build.Site:
        """What the rule is built for: the tree, some of whose leaves have another shape."""
        leaves = self.leaves
        if changed:
            leaves = tuple(changed.get(position, leaf) for position, leaf in enumerate(leaves))
        return build.Site(leaves, dict(zip(self.rate_paths, rates, strict=True)), seed)

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """What tracing and compiling must be in: its precision and device; errors become those of the request."""
        with self.precision(), _refusing(self.spec), jax.default_device(self.device):
            yield

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """What the calling thread must be in: 64 bits for trees that have them, without changing any other program."""
        context: contextlib.AbstractContextManager[Any] = jax.enable_x64(self.wide)
        return context

    def zeros(self, variant: Variant, leaves: int) -> Operands:
        """Operands of a variant to trace with, for so many leaves."""
        return Operands(
            rates=tuple(0.0 for _ in self.rate_paths),
            push=0,
            grad_scale=1.0 if variant.scaled else None,
            extras={OPTAX_EXTRAS[name]: 0.0 for name in self.extras},
            present=(True,) * leaves if variant.absent and leaves > 1 else None,
        )


@contextlib.contextmanager
def _refusing(spec: specs.Spec) -> Iterator[None]:
    """Turns what tracing raises into an error of the request: the rule cannot take these shapes."""
    try:
        yield
    except errors.OptwireError:
        raise
    except (TypeError, ValueError, ArithmeticError, AssertionError, IndexError, NotImplementedError) as exc:
        raise errors.TreeError(f"{spec.name} cannot take these parameters: {exc}"[:800], got=str(exc)[:200]) from exc
