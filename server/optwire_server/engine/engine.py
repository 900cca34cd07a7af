"""The engine proper: arrays of sessions on one device, and the one thread that may touch them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jaxlib.version
import numpy as np
import optax

from optwire_proto import checks, entries, errors, specs, tensors, trees
from optwire_server.engine import admission, build, cache, device, program, slots

T = TypeVar("T")


def own_process() -> None:
    """Settings for a process that is nothing but a server; before the first ``Engine``.

    The device's thread waits for each update anyway; on a CPU, handing it to yet another thread only adds time.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


class UpdateError(Exception):
    """An update raised. ``state_lost`` says whether the old state was consumed before it did."""

    def __init__(self, problem: str, *, state_lost: bool) -> None:
        super().__init__(problem)
        self.state_lost = state_lost


@dataclasses.dataclass(slots=True)
class Held:
    """One session's arrays on the device. Only functions run by ``Engine.run`` may read or replace ``state``."""

    program: program.Program
    state: Any
    lane: device.Lane = dataclasses.field(default_factory=device.Lane)

    @property
    def state_bytes(self) -> int:
        """Size of parameters and slots."""
        return self.program.state_bytes


class Engine:
    """Holds the arrays of sessions on one device.

    All JAX work on state is issued by one thread; for one session in the order it was asked for: updates do not race,
    and a reader sees the state between two of them. Compiling happens on the thread that asks, so it delays no update.
    """

    def __init__(self, *, allow_programs: bool = False, state_bytes_max: int = 2**63) -> None:
        self._allow_programs = allow_programs
        self.catalogue: Mapping[str, entries.Entry] = build.CATALOGUE
        self._device = jax.devices()[0]
        self._programs = cache.ProgramCache(self._device, state_bytes_max=state_bytes_max)
        self._turns = device.Device()

    def run(self, function: Callable[[], T], held: Held | None = None) -> T:
        """Runs a function on the device's thread and waits for it; as ``work`` does a generator."""

        def once() -> device.Work[T]:
            yield from ()
            return function()

        return self.work(once(), held)

    def work(self, work: device.Work[T], held: Held | None = None) -> T:
        """Runs a generator on the device's thread and waits for what it returns; others get their turns as it yields.

        Args:
          work: the generator.
          held: of the session that it is done for; None: of none that anybody else knows yet.

        Raises:
          UnavailableError: the engine is closed.
        """
        return self._turns.run(held.lane if held else device.Lane(), work)

    def check(self, spec: specs.Spec) -> specs.Spec:
        """The spec complete, checked against the installed optax; raises SpecError, UnsupportedError."""
        checked = checks.check(spec, known=build.CATALOGUE)
        checks.check_length(checked)
        for path, found in specs.places(checked):
            if isinstance(found, specs.Spec) and found.name == "exported" and not self._allow_programs:
                subject = f"{path}.exported" if path else "exported"
                raise errors.UnsupportedError(
                    f"{subject}: this server takes no programs; its operator allows them with --allow-programs",
                    subject=subject,
                    expected="an optimizer of the catalogue",
                    got="exported",
                )
        return checked

    def compile(self, spec: specs.Spec, tree: trees.TreeSpec) -> program.Program:
        """The program for a checked spec and a tree. May take seconds the first time; raises TreeError."""
        admission.check(spec, tree)
        return self._programs.get(spec, tree)

    def hold(
        self, compiled: program.Program, params: Sequence[tensors.Array], rates: tuple[float, ...] = (), seed: int = 0
    ) -> Held:
        """Makes the state before the first step; copies ``params``.

        Args:
          compiled: the program of the first step.
          params: the leaves.
          rates: its learning rates, in the order of ``rate_paths``.
          seed: of the session's randomness.
        """
        held = Held(compiled, None)

        def init() -> None:
            held.state = jax.block_until_ready(compiled.init(params, rates, seed))

        self.run(init)
        return held

    def update(
        self, held: Held, variant: program.Variant, operands: program.Operands, grads: Sequence[tensors.Array]
    ) -> device.Work[tuple[Mapping[str, float], list[np.ndarray]]]:
        """Replaces the state by the next one, yielding between blocks. On the device's thread only.

        ``grads`` are read until this returns; afterwards their memory may be reused.

        Returns:
          Notes of the update, and what it added to the parameters, where the variant has it.

        Raises:
          UpdateError: nothing or everything of the old state is left, as it says.
        """
        yield
        old = held.state
        try:
            # As NumPy arrays: aligned ones are adopted, at half the cost of putting them on the device first.
            new, notes, added = jax.block_until_ready(held.program.update(variant, operands, list(grads), old))
            held.state = new
        except Exception as exc:
            lost = any(leaf.is_deleted() for leaf in jax.tree.leaves(old))
            held.state = None if lost else old
            raise UpdateError(f"{type(exc).__name__}: {exc}", state_lost=lost) from exc
        return {name: float(value) for name, value in notes.items()}, [np.asarray(leaf) for leaf in added]

    def params(self, held: Held, which: str = "") -> list[np.ndarray]:
        """The parameters, or those of a view that was prepared, as NumPy arrays. On the device's thread only.

        On a CPU they are views of the state: while one is alive, the next update copies instead of writing over it.
        """
        return [np.asarray(leaf) for leaf in held.program.params(held.state, which)]

    def arrays(self, held: Held) -> list[np.ndarray]:
        """All arrays of the state, in JAX's order. On the device's thread only; views as those of ``params``."""
        with held.program.precision():
            return [slots.to_numpy(array) for array in jax.tree.leaves(held.state)]

    def replace(self, held: Held, arrays: Mapping[int, tensors.Array]) -> None:
        """Puts copies of arrays in the place of those of the state, by position. On the device's thread only.

        Whatever it raises, the state is the old one.
        """
        leaves, structure = jax.tree.flatten(held.state)
        with held.program.precision(), jax.default_device(self._device):
            for position, array in arrays.items():
                leaves[position] = slots.from_numpy(array, leaves[position])
            held.state = jax.block_until_ready(jax.tree.unflatten(structure, leaves))

    def carry(self, old: Held, new: Held, pairs: Sequence[tuple[int, int]]) -> None:
        """Puts arrays of one state in the place of those of another, by position. On the device's thread only.

        What is of another type there is left out. The arrays are shared: one of both must be freed before an update.
        """
        theirs = jax.tree.leaves(old.state)
        leaves, structure = jax.tree.flatten(new.state)
        for i, k in pairs:
            if theirs[i].dtype == leaves[k].dtype:
                leaves[k] = theirs[i]
        new.state = jax.tree.unflatten(structure, leaves)

    def describe(self) -> tuple[Mapping[str, str], tuple[tuple[str, str], ...]]:
        """Library versions, and (name, kind) of each device."""
        versions = {
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
            "numpy": np.__version__,
            "optax": optax.__version__,
        }
        devices = tuple((f"{device.platform}:{device.id}", device.device_kind) for device in jax.devices())
        return versions, devices

    def close(self) -> None:
        """Finishes what was asked for and stops the thread."""
        self._turns.close()
