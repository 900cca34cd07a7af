"""The engine proper: arrays of sessions on one device, and whose turn it is to touch them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jaxlib.version
import numpy as np
import optax

from optwire_proto import checks, entries, errors, specs, tensors, trees
from optwire_server.engine import admission, ahead, build, cache, departure, device, held, landing, mean, program, rows

T = TypeVar("T")

Held = held.Held
UpdateError = held.UpdateError
Room = held.Room


def own_process() -> None:
    """Settings for a process that is nothing but a server; before the first ``Engine``.

    Whoever has the turn waits for each update anyway; on a CPU, handing it to another thread only adds time.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


class Engine:
    """Holds the arrays of sessions on one device.

    Every call works on its own thread, and on state only when it is its turn; for one session in the order it was asked
    for: updates do not race, and a reader sees the state between two of them. Compiling, and making the first state of
    a session that nobody knows yet, take no turn: they delay no update.

    Args:
      allow_programs: whether sessions may bring exported programs.
      state_bytes_max: a larger state is refused before anything is compiled.
      compiles_ahead: whether a thread compiles what sessions of other shapes may need, once a first one is served.
    """

    def __init__(
        self, *, allow_programs: bool = False, state_bytes_max: int = 2**63, compiles_ahead: bool = False
    ) -> None:
        self._allow_programs = allow_programs
        self._ahead = ahead.Ahead() if compiles_ahead else None
        self.catalogue: Mapping[str, entries.Entry] = build.CATALOGUE
        self._device = jax.devices()[0]
        self._programs = cache.ProgramCache(self._device, state_bytes_max=state_bytes_max)
        self._turns = device.Device()

    def run(self, function: Callable[[], T], held: Held | None = None) -> T:
        """Runs a function in a session's turn and waits for it; as ``work`` does a generator."""

        def once() -> device.Work[T]:
            yield from ()
            return function()

        return self.work(once(), held)

    def work(self, work: device.Work[T], held: Held | None = None) -> T:
        """Runs a generator in a session's turns and waits for what it returns; others get their turns as it yields.

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
        self, compiled: program.Program, lent: landing.Landing, rates: tuple[float, ...] = (), seed: int = 0
    ) -> Held:
        """Makes the state before the first step; copies the parameters. Takes no turn.

        Args:
          compiled: the program of the first step.
          lent: holds the parameters, in the layout of the program.
          rates: its learning rates, in the order of ``rate_paths``.
          seed: of the session's randomness.
        """
        made = held.Held(compiled)
        made.fill(lent.memory, rates, seed)
        return made

    def update(
        self,
        holding: Held,
        variant: program.Variant,
        operands: program.Operands,
        lent: landing.Landing | mean.Gathered | rows.Sparse,
        out: np.ndarray | departure.Departure | None = None,
    ) -> device.Work[tuple[Mapping[str, float], list[np.ndarray]]]:
        """Replaces the state by the next one, yielding between blocks. In the session's turn only.

        Args:
          holding: the session's arrays.
          variant: which of its program's updates to run; prepared.
          operands: what it takes beside gradients.
          lent: holds the gradients, in the session's layout, of several pushes, or by rows; is read until this returns.
          out: where the new parameters go, each block as soon as it is there: memory that they are written to in the
            session's layout, shape=(layout.nbytes,), uint8; a departure, which none goes to where the program rejects
            the gradients; None: nowhere.

        Returns:
          Notes of the update, and what it added to the parameters, where the variant has it: segments in payload order.

        Raises:
          UpdateError: nothing or everything of the old state is left, as it says.
        """
        return holding.update(variant, operands, rows.given(lent), out)

    def update_lazily(
        self,
        holding: Held,
        variant: program.Variant,
        operands: program.Operands,
        lent: landing.Landing | mean.Gathered | rows.Sparse,
    ) -> device.Work[Mapping[str, float]]:
        """As ``update``, of those elements only that have gradients, which come by rows; gives notes alone."""
        sparse = rows.given(lent)
        assert isinstance(sparse, rows.Sparse), "gradients that are whole leave no element out"
        return holding.update_lazily(variant, operands, sparse)

    def read(
        self, holding: Held, which: str, selected: Sequence[rows.Selected | None]
    ) -> device.Work[list[np.ndarray]]:
        """Parts of the parameters, or of a view that was prepared, yielding between blocks: flat copies, in order.

        Args:
          holding: the session's arrays.
          which: as in ``params``.
          selected: of each leaf; None: nothing.
        """
        return holding.read(which, selected)

    def served(self, holding: Held) -> None:
        """To be told once an update was made: what sessions of other shapes may need is compiled, where it is to be."""
        if self._ahead is not None:
            self._ahead.add(holding.program)

    @property
    def is_compiling_ahead(self) -> bool:
        """Whether something is compiled that nobody waits for."""
        return self._ahead is not None and not self._ahead.is_idle

    def growth(self, holding: Held, absent: Sequence[int]) -> int:
        """Bytes of memory that the state takes more for a push without some gradients, by position. At any time.

        Raises:
          LimitError: more than any state may grow by.
        """
        return holding.growth(frozenset(absent))

    def write_params(self, holding: Held, out: np.ndarray) -> device.Work[None]:
        """Writes the parameters to memory, in the session's layout, yielding between blocks. In its turn only.

        Args:
          holding: the session's arrays.
          out: shape=(layout.nbytes,), uint8
        """
        return holding.write_params(out)

    def params(self, holding: Held, which: str = "") -> device.Work[list[np.ndarray]]:
        """The parameters, or those of a view that was prepared: flat segments, in the order of a payload.

        In the session's turn only, yielding between blocks where they are computed. Otherwise they are views of the
        state, on a CPU: while one is alive, the next update copies instead of writing over it.
        """
        return holding.params(which)

    def arrays(self, holding: Held) -> list[np.ndarray]:
        """All arrays of the state, in the order that their program names them: segments, as those of ``params``."""
        return holding.arrays()

    def replace(self, holding: Held, arrays: Mapping[int, tensors.Array], room: Room) -> device.Work[None]:
        """Puts copies of arrays in the place of those of the state, yielding between them. In the session's turn only.

        Whatever it raises, the state is the old one.

        Args:
          holding: the session's arrays.
          arrays: by position, in the order of ``arrays``.
          room: asked for so many bytes of memory more, where leaves part ways, before anything is copied.
        """
        return holding.replace(arrays, room)

    def carry(self, old: Held, new: Held, pairs: Sequence[tuple[int, int]], room: Room) -> device.Work[None]:
        """Copies arrays of one state to the place of those of another, by position; as ``replace``.

        What is of another type there is left out.
        """
        return old.carry(new, pairs, room)

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
        """Finishes what was asked for, and takes nothing more."""
        self._turns.close()
