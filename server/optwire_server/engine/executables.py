"""Compiled programs by what they compute, shared by whatever traces the same: kernels of all sessions, schedules."""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import logging
import math
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from optwire_proto import errors

# Compilers at work at once, in the whole process: specs that take long must not take every thread and all memory.
_COMPILERS = threading.BoundedSemaphore(4)
_COMPILER_WAIT_S = 60.0
# Functions that a listing of a program names by where they are in memory; none of them says what is computed.
_ADDRESS = re.compile(r"0x[0-9a-f]+")
# The sides of an array that is copied, and how many elements take less time than the call.
_COPY = re.compile(r"\w\[([\d,]+)\]\S* copy\(")
_COPIED_MAX = 256
# Beside arrays that are written in place: scalars, tables of pointers, and what a partial sum is gathered in.
_SCRATCH_BYTES = 1 << 16

_log = logging.getLogger("optwire.executables")


class Executable(NamedTuple):
    """What was compiled of a traced function.

    Attributes:
      run: takes those arguments that are used, in order.
      used: their positions.
      flaw: why the donated arguments are not all written in place, without a copy; empty: they are.
    """

    run: Any
    used: tuple[int, ...]
    flaw: str


class Executables:
    """The executables in use, the longest unused forgotten first. Thread-safe; compiles on the calling thread."""

    def __init__(self, kept_max: int = 4096) -> None:
        self._kept_max = kept_max
        self._lock = threading.Lock()
        self._made: collections.OrderedDict[tuple[object, ...], Executable] = collections.OrderedDict()
        self._compiling: dict[tuple[object, ...], threading.Lock] = {}

    def get(self, closed: Any, outputs: Sequence[int], donated: Sequence[int] = ()) -> Executable:
        """The executable of some results of a traced function; compiled at most once in this context.

        Args:
          closed: its jaxpr.
          outputs: positions of the results that are wanted.
          donated: positions of arguments that results are written over; they are arguments whether used or not.

        Raises:
          LimitError: others have been compiling for too long.
        """
        key = (digest(closed), tuple(outputs), tuple(donated), bool(jax.config.read("jax_enable_x64")))
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key]
            compiling = self._compiling.setdefault(key, threading.Lock())
        with compiling:
            with self._lock:
                if key in self._made:
                    return self._made[key]
            try:
                with _turn():
                    made = _compiled(closed, outputs, donated)
                with self._lock:
                    self._made[key] = made
                    if len(self._made) > self._kept_max:
                        self._made.popitem(last=False)
                return made
            finally:
                with self._lock:
                    self._compiling.pop(key, None)


def digest(closed: Any) -> bytes:
    """Equal for jaxprs that compute the same in the same way."""
    taken = hashlib.sha256(_ADDRESS.sub("", str(closed.jaxpr)).encode())
    for constant in _constants(closed):
        is_key = jax.numpy.issubdtype(getattr(constant, "dtype", np.float64), jax.dtypes.extended)
        array = np.asarray(jax.random.key_data(constant) if is_key else constant)
        taken.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return taken.digest()


def _constants(part: Any) -> Iterator[Any]:
    """The arrays that a jaxpr and those inside it were closed over, which its text has no numbers of, in order."""
    if isinstance(part, (core.ClosedJaxpr, core.Jaxpr)):
        yield from getattr(part, "consts", ())  # JAX 0.12 has one kind of jaxpr, with constants or without
        for equation in part.eqns:
            for parameter in equation.params.values():
                yield from _constants(parameter)
    elif isinstance(part, (tuple, list)):  # such as the branches of a condition
        for each in part:
            yield from _constants(each)


def _compiled(closed: Any, outputs: Sequence[int], donated: Sequence[int]) -> Executable:
    jaxpr = closed.jaxpr
    wanted = frozenset(outputs)
    kept = frozenset(donated)
    own, used = partial_eval.dce_jaxpr(
        jaxpr,
        [position in wanted for position in range(len(jaxpr.outvars))],
        [position in kept for position in range(len(jaxpr.invars))],
    )
    positions = tuple(position for position, is_used in enumerate(used) if is_used)
    arguments = [_abstract(variable.aval) for variable in own.invars]
    donate = tuple(place for place, position in enumerate(positions) if position in kept)
    function = core.jaxpr_as_fun(core.ClosedJaxpr(own, closed.consts))
    run = jax.jit(function, donate_argnums=donate, keep_unused=True).lower(*arguments).compile(_options())
    flaw = _flaw(run, sum(_bytes(arguments[place]) for place in donate)) if donate else ""
    if flaw:
        _log.warning("an update is not all in place: %s", flaw)
    return Executable(run, positions, flaw)


@functools.cache
def _options() -> dict[str, str | bool] | None:
    """For the compiler: without the first it copies a slot that is written while another array is computed from it."""
    wanted: dict[str, str | bool] = {"xla_cpu_copy_insertion_use_region_analysis": True}
    try:
        jax.jit(lambda x: x).lower(0).compile(wanted)
    except jax.errors.JaxRuntimeError:  # it has no such option, or another name for it
        return None
    return wanted


def _flaw(run: Any, donated_bytes: int) -> str:
    memory = run.memory_analysis()
    if memory is None:
        return ""  # what comes out of a cache need not know
    if memory.alias_size_in_bytes < donated_bytes:
        return f"{memory.alias_size_in_bytes} of {donated_bytes} bytes of state are written in place"
    if memory.temp_size_in_bytes > donated_bytes + _SCRATCH_BYTES:
        return f"{memory.temp_size_in_bytes} bytes beside {donated_bytes} bytes of state"
    sizes = (math.prod(map(int, sides.split(","))) for sides in _COPY.findall(run.as_text()))
    return "the state is copied" if any(size > _COPIED_MAX for size in sizes) else ""


def _abstract(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def _bytes(argument: Any) -> int:
    if jax.numpy.issubdtype(argument.dtype, jax.dtypes.extended):
        return 0
    return int(argument.size * argument.dtype.itemsize)


@contextlib.contextmanager
def _turn() -> Iterator[None]:
    if not _COMPILERS.acquire(timeout=_COMPILER_WAIT_S):
        raise errors.LimitError(
            f"other updates have been compiling for {_COMPILER_WAIT_S:.0f} s", subject="compilers", retry_after_s=1.0
        )
    try:
        yield
    finally:
        _COMPILERS.release()
