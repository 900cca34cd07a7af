"""What takes turns in `bench step`, by name, and how the parameters of each are checked."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence

import numpy as np

from optwire_bench import models, processes

# Elements that are compared at a time.
_BLOCK = 1 << 22

TRANSPORTS = ("stream", "unary", "unix", "shared_memory")
LOCALS = ("local", "local-optax", "local-optax-common")
NAIVE = ("naive", "naive-per-tensor")
_UNARY_BYTES_MAX = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """How far parameters may be from others.

    Attributes:
      difference: greatest absolute difference, for each step since the start; 0: equal bit for bit.
      path: instead of that, the distance to the others over the way that those have gone since the start, both as roots
        of sums of squares; 0: not looked at.
      rounded: "bf16" or "f16": they are the others, rounded to that.
    """

    difference: float = 0.0
    path: float = 0.0
    rounded: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"within {self.path * 100:g} % of the way"
        return f"within {self.difference:g} a step" if self.difference else "bit for bit"


# Another program than the reference's rounds otherwise: half a unit in the last place of a parameter a step.
ANOTHER_PROGRAM = Check(difference=4e-7)
# By the codec of the gradients, of what the server holds. The gradients are bfloat16 to begin with. Where a codec loses
# something of them, Adam makes as much of it as of the rest: it divides by their size.
_GRADS = {"f32": Check(), "bf16": Check(), "f16": Check(path=0.02), "int8": Check(path=0.25)}
# By the codec of the parameters, of what comes back beside what the server holds.
_PARAMS = {"f32": Check(), "bf16": Check(rounded="bf16"), "f16": Check(rounded="f16"), "int8": Check(path=0.25)}
# What sends little of each gradient goes another way; it should at least go about as far.
_SPARSE = Check(path=2.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One way to make a step.

    Attributes:
      name: in tables.
      argv: the command of its process; "{target}" and "{unix}" stand for the server's addresses.
      check: of the parameters that the last step gave, after every round; with a codec, of those that the server holds.
      reply: of what the last step gave beside what the server holds, where there is a codec.
      server: whether the server works for it.
      transport: that must be in use; empty: not asked for.
      payloads: memory that it needs at most, in payloads, both ends together.
      payload_bytes_max: largest payload that it takes.
    """

    name: str
    argv: tuple[str, ...]
    check: Check
    reply: Check | None = None
    server: bool = False
    transport: str = ""
    payloads: int = 6
    payload_bytes_max: int = 1 << 40

    def command(self, server: processes.Server) -> list[str]:
        """The command of its process."""
        return [part.format(target=server.target, unix=server.unix) for part in self.argv]


def remote(transport: str, grads_codec: str = "f32", params_codec: str = "") -> Case:
    """Ours over a transport, with a codec up and one down (empty: the same)."""
    params_codec = params_codec or grads_codec
    target, asked = ("{unix}", "stream") if transport == "unix" else ("{target}", transport)
    if transport == "shared_memory":
        target = "{unix}"
    codecs = {grads_codec, params_codec} - {"f32"}
    name = transport if not codecs else f"{transport} {grads_codec}"
    if params_codec != grads_codec:
        name += f"/{params_codec}"
    return Case(
        name,
        tuple(processes.module("roles", "remote", target, asked, grads_codec, params_codec)),
        _GRADS.get(grads_codec, _SPARSE),
        _PARAMS.get(params_codec, _SPARSE) if codecs else None,
        server=True,
        transport=asked,
        payloads=6 if transport == "shared_memory" else 7 if not codecs else 9,
        payload_bytes_max=_UNARY_BYTES_MAX if transport == "unary" else 1 << 40,
    )


def against(name: str) -> Case:
    """What ours is compared with: a local step, or the peer that needs nothing installed.

    Raises:
      ValueError: no such case.
    """
    match name:
        case "local":
            return Case(name, tuple(processes.module("roles", "local")), Check(), payloads=5)
        case "local-optax":
            return Case(name, tuple(processes.module("roles", "optax", "ordered")), ANOTHER_PROGRAM, payloads=6)
        case "local-optax-common":
            return Case(name, tuple(processes.module("roles", "optax", "common")), ANOTHER_PROGRAM, payloads=7)
        case "naive" | "naive-per-tensor":
            form = "tree" if name == "naive" else "tensors"
            return Case(name, tuple(processes.module("naive", form)), Check(), payloads=12, payload_bytes_max=1 << 30)
    raise ValueError(f"{name!r}: expected one of {', '.join((*LOCALS, *NAIVE))}")


def beside(text: str) -> Case:
    """A program of anyone's that speaks the lines of ``roles``: "NAME=COMMAND".

    Raises:
      ValueError: the text is something else.
    """
    name, equals, command = text.partition("=")
    if not (name and equals and command.strip()):
        raise ValueError(f"{text!r}: expected NAME=COMMAND")
    argv = tuple(part.replace("{", "{{").replace("}", "}}") for part in shlex.split(command))
    return Case(name, argv, ANOTHER_PROGRAM, payloads=10)


class Wrong(processes.BenchError):
    """Parameters that are not what they should be."""


def compare(
    found: np.ndarray, reference: np.ndarray, start: np.ndarray, check: Check, *, steps: int, where: str
) -> dict[str, float]:
    """How far parameters are from the reference; raises Wrong where that is farther than the check allows.

    Args:
      found, reference, start: float32, flat; start: what everybody began with.
      check: what is allowed.
      steps: taken since the start.
      where: for the message.
    """
    if found.size != reference.size:
        raise Wrong(f"{where}: {found.size:,} parameters, expected {reference.size:,}")
    unequal, greatest, off, way = 0, 0.0, 0.0, 0.0
    for at in range(0, found.size, _BLOCK):
        mine, wanted = found[at : at + _BLOCK], reference[at : at + _BLOCK]
        if check.rounded:
            wanted = rounded(wanted, check.rounded)
        unequal += int(np.count_nonzero(mine.view(np.uint32) != wanted.view(np.uint32)))
        apart = np.abs(mine - wanted)
        greatest = float(np.maximum(greatest, apart.max(initial=0.0)))  # a NaN stays one
        if check.path:
            off += float(np.square(apart, dtype=np.float64).sum())
            way += float(np.square(wanted - start[at : at + _BLOCK], dtype=np.float64).sum())
    path = (off / way) ** 0.5 if way else 0.0
    if check.path:
        bad = not path <= check.path
    elif check.difference:
        bad = not greatest <= check.difference * max(steps, 1)
    else:
        bad = unequal > 0
    if bad:
        raise Wrong(
            f"{where}: parameters differ from the reference after {steps} steps: {unequal:,} of {found.size:,}, by "
            f"{greatest:.3g} at most, {path:.1%} of the way; expected {check}"
        )
    return {"unequal": unequal, "greatest": greatest, "path": path}


def rounded(array: np.ndarray, codec: str) -> np.ndarray:
    """float32, each rounded to the nearest number of a codec, ties to even. Not by a codec: that is checked."""
    if codec == "f16":
        return array.astype(np.float16).astype(np.float32)
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def start(model: models.Model) -> np.ndarray:
    """The parameters that everybody starts from, flat."""
    flat: Sequence[np.ndarray] = [leaf.reshape(-1) for leaf in models.params(model).values()]
    return np.concatenate(flat)
