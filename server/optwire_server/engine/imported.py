"""Optimizers that a client brings: an update exported with ``jax.export``, served as data.

A program is the serialized form of a function

    update(step, rate, grad, param, *slots) -> (param, *slots)

``step`` is an int32 scalar, counted from 0; ``rate`` a float32 scalar, the learning rate; ``grad``, ``param`` and the
slots are arrays of one shape and one floating-point type. The shape is concrete, or one symbolic length ``(n,)``: then
the program serves leaves of every shape, each flattened. Slots start as zeros; there are as many as the function has
arguments after the fourth. It is exported for this server's platform, with no checks disabled, and is straight:
elementwise arithmetic, reductions, matrix products and changes of shape, but no loop, branch, custom call, callback,
random number or sort.

Three walls, and each is there because the one before it is not enough:

1. The file is parsed in a child process (``trial``, ``artifact``), for the parsers crash on damaged files. What comes
   back is a listing of instructions, as JSON.
2. The listing is checked against a list of what is allowed, and replayed as ordinary JAX (``listing``,
   ``operations``). Nothing of the file reaches a compiler of this process but through that replay. Since nothing in it
   depends on data, its time and memory are those of any other input of the same shapes.
3. Before it serves a session it is compiled and run once for the session's shapes in another child, with limits of
   time and memory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import jax

from optwire_proto import errors, tensors, trees
from optwire_server.engine import listing, trial

# The listing's, under the name that callers look for here.
Limits = listing.Limits
DEFAULTS = Limits()


@functools.lru_cache(maxsize=64)  # at most 16 MiB of files
def load(data: bytes, limits: Limits = DEFAULTS, *, platform: str = "cpu") -> Imported:
    """Reads a program. Starts a process, and takes a second or two; the programs read last are remembered.

    Args:
      data: what ``jax.export.Exported.serialize`` gave.
      limits: what it may take.
      platform: of the server's device; the program must have been exported for it.

    Raises:
      SpecError: it is not a program, or one that is not served.
      LimitError: programs of others were in the way for too long.
      UnsupportedError: a library that reads such files is not installed.
    """
    if not 0 < len(data) <= limits.bytes_max:
        raise listing.refusal(f"1 to {limits.bytes_max} bytes", f"{len(data)} bytes")
    body = trial.read(data, platform, limits)
    # The child counts, too; but a child that the file has taken over may send what it likes.
    if len(body.instructions) > 2 * limits.ops_max:
        raise listing.refusal(f"at most {limits.ops_max} operations", f"{len(body.instructions)} instructions")
    return Imported(hashlib.sha256(data).hexdigest(), body, limits)


def attempt(program: Imported, leaves: Sequence[trees.LeafSpec]) -> None:
    """Compiles and runs a program once in a process of its own, for leaves of the shapes that it is to serve.

    Raises:
      TreeError, SpecError: as ``check_leaves``; or it took more time or memory than its limits allow, or crashed.
      LimitError: programs of others were in the way for too long.
    """
    program.check_leaves(leaves)
    trial.run(program.body, [leaf for leaf in leaves if leaf.nbytes], program.limits)


@dataclasses.dataclass(frozen=True, slots=True)
class Imported:
    """A program that has been read.

    Attributes:
      digest: SHA-256 of its bytes, in hexadecimal: two with the same one are the same program.
      body: what it does.
      limits: what it may take.
    """

    digest: str
    body: listing.Listing
    limits: Limits

    @property
    def slots(self) -> int:
        """How many arrays it keeps beside each parameter; they start as zeros."""
        return self.body.slots

    @property
    def dtype(self) -> str:
        """The protocol's name of the element type of all its arrays."""
        return self.body.dtype

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of all its arrays, or None where it serves every shape."""
        return self.body.shape

    @property
    def symbolic(self) -> bool:
        """Whether it serves leaves of every shape, each flattened."""
        return self.body.shape is None

    @property
    def elementwise(self) -> bool:
        """Whether it may run on any piece of a leaf, or on several leaves laid end to end."""
        return self.symbolic and self.body.elementwise

    def check_leaves(self, leaves: Sequence[trees.LeafSpec]) -> None:
        """Traces the program for each shape; allocates nothing.

        Raises:
          TreeError: a leaf has another element type or shape than the program is for.
          SpecError: for a leaf of this shape it is inconsistent, or larger than its limits allow.
        """
        for leaf in leaves:
            self._check_leaf(leaf)
        for shape in {leaf.shape for leaf in leaves}:
            array = jax.ShapeDtypeStruct(shape, tensors.numpy_dtype(self.dtype))
            scalars = (jax.ShapeDtypeStruct((), "int32"), jax.ShapeDtypeStruct((), "float32"))
            with jax.enable_x64(self.dtype == "f64"):
                jax.eval_shape(self.update, *scalars, *[array] * (2 + self.slots))

    def update(self, step: Any, rate: Any, grad: Any, param: Any, *slots: Any) -> tuple[Any, ...]:
        """``(param, *slots)`` after one step of one leaf; to be traced, and pure.

        Arrays of float64 need 64 bits enabled, as everywhere in JAX.

        Raises:
          SpecError: as ``check_leaves``.
        """
        return self.body.update((step, rate, grad, param, *slots), self.limits)

    def _check_leaf(self, leaf: trees.LeafSpec) -> None:
        for what, expected, got in (("element type", self.dtype, leaf.dtype), ("shape", self.shape, leaf.shape)):
            if expected not in (None, got):
                where = f"params[{leaf.name!r}]" if leaf.name else "params"
                raise errors.TreeError(
                    f"{where}: {what} {got}, and the program was exported for {expected}",
                    subject=leaf.name,
                    expected=str(expected),
                    got=str(got),
                )
