"""Compiled updates: one program per rule and tree, shared by all sessions that have both."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax

from optwire_proto import errors, specs, tensors, trees
from optwire_server.engine import build

# What JAX takes apart as the optimizer's state: an optimizers.OptimizerState.
OptState = Any

# Optimizers whose formula is linear in the gradients, and so means the same for complex numbers.
_COMPLEX = ("sgd", "momentum", "nesterov")
_WIDE = ("f64", "c128")
_FLOATING = ("f32", "f64", "bf16", "f16")


class Program:
    """An optimizer compiled for one tree and device.

    The update has the form ``(learning rate, index, grads, state) -> state`` with the whole state donated and returned
    in the order it came, so that XLA writes the new state over the old. Learning rate and index are operands: neither
    compiles anew.
    """

    def __init__(self, spec: specs.Spec, tree: trees.TreeSpec, device: jax.Device) -> None:
        self._rule = build.rule(spec)
        self._wide = any(leaf.dtype in _WIDE for leaf in tree.leaves)
        self.device = device
        leaves = [jax.ShapeDtypeStruct(leaf.shape, tensors.numpy_dtype(leaf.dtype)) for leaf in tree.leaves]
        with self.precision(), _refusing(spec), jax.default_device(device):
            state = jax.eval_shape(self._rule.init, leaves)
            self.state_bytes: int = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
            # Python scalars, not arrays: a strongly typed operand would promote 16-bit leaves.
            rate = None if self._rule.schedule else 0.0
            lowered = jax.jit(self._rule.update, donate_argnums=3).lower(rate, 0, leaves, state)
            self._update: Callable[..., OptState] = lowered.compile()
            schedule = self._rule.schedule
            self._schedule = jax.jit(schedule).lower(0).compile() if schedule else None

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """What the calling thread must be in: 64 bits for trees that have them, without changing any other program."""
        context: contextlib.AbstractContextManager[Any] = jax.enable_x64(self._wide)
        return context

    def init(self, params: Sequence[tensors.Array]) -> OptState:
        """The state before the first step; copies ``params``."""
        with self.precision(), jax.default_device(self.device):
            return self._rule.init([jax.numpy.array(leaf, copy=True) for leaf in params])

    def update(self, learning_rate: float | None, index: int, grads: Any, state: OptState) -> OptState:
        """Starts one update; ``state`` is consumed. ``learning_rate`` is ignored where a schedule gives it."""
        with self.precision():
            return self._update(None if self._schedule else learning_rate, index, grads, state)

    def params(self, state: OptState) -> list[jax.Array]:
        """The parameters in a state; shares its memory."""
        return jax.tree.leaves(self._rule.get_params(state))

    def learning_rate(self, index: int) -> float | None:
        """What the schedule gives for a step, or None where there is none."""
        if self._schedule is None:
            return None
        with self.precision():
            return float(self._schedule(index))


class ProgramCache:
    """The programs in use, the longest unused forgotten first. Thread-safe; compiles on the calling thread."""

    def __init__(self, device: jax.Device, programs_max: int = 256) -> None:
        self._device = device
        self._programs_max = programs_max
        self._lock = threading.Lock()
        self._programs: collections.OrderedDict[tuple[object, ...], Program] = collections.OrderedDict()
        self._compiling: dict[tuple[object, ...], threading.Lock] = {}

    def get(self, spec: specs.Spec, tree: trees.TreeSpec) -> Program:
        """The program for a checked spec and a tree; compiled at most once, however many ask at the same time.

        Raises:
          TreeError: the optimizer is not defined for a leaf's element type or shape.
        """
        # The learning rate is an operand, names do not matter, and the text of a spec tells 2 from 2.0.
        key = (str(_without_rate(spec)), tuple((leaf.shape, leaf.dtype) for leaf in tree.leaves))
        with self._lock:
            if key in self._programs:
                self._programs.move_to_end(key)
                return self._programs[key]
            compiling = self._compiling.setdefault(key, threading.Lock())
        with compiling:
            with self._lock:
                if key in self._programs:
                    return self._programs[key]
            program = None
            try:
                program = Program(spec, tree, self._device)
                return program
            finally:
                with self._lock:
                    if program is not None:
                        self._programs[key] = program
                    if len(self._programs) > self._programs_max:
                        self._programs.popitem(last=False)
                    self._compiling.pop(key, None)


def check_tree(spec: specs.Spec, tree: trees.TreeSpec) -> None:
    """Raises TreeError where an optimizer is not defined for a leaf's element type."""
    optimizer = specs.core(spec).name
    served = (*_FLOATING, "c64", "c128") if optimizer in _COMPLEX else _FLOATING
    for leaf in tree.leaves:
        if leaf.dtype not in served:
            where = f"params[{leaf.name!r}]" if leaf.name else "params"
            raise errors.TreeError(
                f"{where}: {optimizer} is not defined for element type {leaf.dtype}; "
                f"expected one of {', '.join(served)}",
                subject=leaf.name,
                expected=", ".join(served),
                got=leaf.dtype,
            )
    _check_decay(spec, tree)


def _check_decay(spec: specs.Spec, tree: trees.TreeSpec) -> None:
    """Raises SpecError where Adam's second moment would be corrected by one minus one: its parameters never move."""
    core = specs.core(spec)
    if core.name != "adam":
        return
    for leaf in tree.leaves:
        if tensors.numpy_dtype(leaf.dtype).type(core["b2"]) == 1:
            raise errors.SpecError(
                f"adam.b2: {core['b2']} rounds to 1 in {leaf.dtype}, the type of params[{leaf.name!r}], and no step "
                "would change it; use a smaller b2, such as 0.99, or float32 parameters",
                subject="adam.b2",
                expected=f"a number below 1 in {leaf.dtype}",
                got=str(core["b2"]),
            )


def _without_rate(spec: specs.Spec) -> specs.Spec:
    """The spec with a constant learning rate left out."""
    if specs.learning_rate(spec) is None:
        return spec
    if spec.name == "chain":
        *stages, last = spec["members"]
        return spec.replace(members=(*stages, _without_rate(last)))
    return spec.replace(step_size=None)


@contextlib.contextmanager
def _refusing(spec: specs.Spec) -> Any:
    """Turns what tracing raises into an error of the request: the rule cannot take these shapes."""
    try:
        yield
    except (TypeError, ValueError, OverflowError) as exc:
        raise errors.TreeError(f"{spec.name} cannot take these parameters: {exc}", got=str(exc)[:200]) from exc
