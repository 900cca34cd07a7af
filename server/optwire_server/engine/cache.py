"""The cache of compiled programs: one for each optimizer and tree, shared by all sessions that have both."""

from __future__ import annotations

import collections
import threading

import jax

from optwire_proto import checks, specs, trees
from optwire_server.engine import build, executables, program, rates


class ProgramCache:
    """The programs in use, the longest unused forgotten first. Thread-safe; compiles on the calling thread."""

    def __init__(self, device: jax.Device, programs_max: int = 256, state_bytes_max: int = 2**63) -> None:
        self._device = device
        self._state_bytes_max = state_bytes_max
        self._programs_max = programs_max
        # Of all programs: what two of them have in common is compiled once.
        self._compiled = executables.Executables()
        self._lock = threading.Lock()
        self._programs: collections.OrderedDict[tuple[object, ...], program.Program] = collections.OrderedDict()
        self._compiling: dict[tuple[object, ...], threading.Lock] = {}

    def get(self, spec: specs.Spec, tree: trees.TreeSpec) -> program.Program:
        """The program for a checked spec and a tree; compiled at most once, however many ask at the same time.

        Raises:
          TreeError: the optimizer is not defined for a leaf's element type or shape.
          SpecError: an argument cannot be served.
        """
        # Learning rates are operands, and the text of a spec tells 2 from 2.0. Names matter to patterns only.
        named = any(takes in ("mask", "groups") for _, _, takes in checks.by_takes(spec, build.CATALOGUE))
        names = tuple(leaf.name for leaf in tree.leaves) if named else ()
        key = (str(rates.rateless(spec)), tuple((leaf.shape, leaf.dtype) for leaf in tree.leaves), names)
        with self._lock:
            if key in self._programs:
                self._programs.move_to_end(key)
                return self._programs[key]
            compiling = self._compiling.setdefault(key, threading.Lock())
        with compiling:
            with self._lock:
                if key in self._programs:
                    return self._programs[key]
            made = None
            try:
                made = program.Program(spec, tree, self._device, self._state_bytes_max, self._compiled)
                return made
            finally:
                with self._lock:
                    if made is not None:
                        self._programs[key] = made
                    if len(self._programs) > self._programs_max:
                        self._programs.popitem(last=False)
                    self._compiling.pop(key, None)
