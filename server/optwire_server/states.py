"""Whole states of live sessions by name: reading them, and replacing arrays of them.

Works with what the registry holds. Knows neither protobuf nor update rules.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from optwire_proto import errors, limits, nests, sessions, tensors, trees
from optwire_server import answers
from optwire_server import plans as planning
from optwire_server.engine import device, landing, layout, slots
from optwire_server.engine import engine as engines
from optwire_server.live import LiveSession, Load, StateRead
from optwire_server.session import admission, effects, events, loads, machine

# How many pushes left the parameters alone: the machine's, where the optimizer skips what is not finite.
_SKIPPED = trees.LeafSpec(slots.SKIPPED, (), "i64")

_log = logging.getLogger("optwire.states")


class States:
    """Reads and loads states of the sessions that ``find(id_=..., name=...)`` finds. Thread-safe."""

    def __init__(
        self,
        engine: engines.Engine,
        landings: landing.Landings,
        find: Callable[..., LiveSession],
        refuse_when_draining: Callable[[], None],
        check_growth: engines.Room,
    ) -> None:
        self._engine = engine
        self._landings = landings
        self._find = find
        self._refuse_when_draining = refuse_when_draining
        self._check_growth = check_growth

    @contextlib.contextmanager
    def reading(self, *, id_: str = "", name: str = "") -> Iterator[StateRead]:
        """The session and every array of its state, all of one step; counted as bytes in flight while they are read.

        Raises:
          SessionNotFoundError, SessionFailedError: there is nothing to read.
          LimitError: too many arrays, or too many bytes in flight.
        """
        live = self._find(id_=id_, name=name)
        admission.check_alive(live.machine)
        tree = _tree(live)

        def look() -> StateRead:
            admission.check_alive(live.machine)
            read = StateRead(live.info(), tree, self._engine.arrays(live.held))
            if live.plan.program.skips:
                read.arrays.append(np.asarray(live.machine.skipped, np.int64))
            return read

        with self._landings.counted(tree.payload_bytes):
            yield self._engine.run(look, live.held)

    @contextlib.contextmanager
    def loading(self, key: sessions.LoadKey, tree: trees.TreeSpec) -> Iterator[Load]:
        """Admits arrays that are to replace those of a state, and lends the landing for them.

        Raises:
          SessionNotFoundError, SessionFailedError: there is nothing to load into.
          IncarnationError: history was rewritten since the client looked.
          OutOfStepError: the session is at another step than the key says.
          TreeError, TreeMismatchError: an array that the state does not have so.
          InvalidArgumentError: a step that no session reaches, or that sums of gradients which stay do not fit.
          DivergentRetryError: the key was used for another load.
          UnavailableError: the server is draining.
          LimitError: too many bytes in flight, or more than may ever be.
        """
        self._refuse_when_draining()
        live = self._find(id_=key.session_id)
        event = _event(live, key, tree)
        admission.admit_load(live.machine, event)
        _check(tree, _leaves(live))
        if slots.SKIPPED not in event.names and not loads.is_retry(live.machine.loaded, event):
            _check_sums(live, event)
        self._landings.check_size(layout.aligned(tree), "load it in parts: a mapping of some of its arrays at a time")
        with contextlib.closing(self._landings.land(tree)) as lent:
            yield Load(live, tree, key, lent)

    def load(self, load: Load, digest: sessions.Digest) -> sessions.SessionInfo:
        """Replaces the arrays once they are in, and begins a new incarnation; a retry finds that done.

        Raises:
          LimitError: leaves of other counts than others would be held apart, in more memory than there may be.
        """
        load.landing.finish(digest)
        live = load.session
        named = dict(zip((leaf.name for leaf in load.tree.leaves), load.landing.arrays(), strict=True))
        skipped = named.pop(slots.SKIPPED, None)
        positions = {leaf.name: position for position, leaf in enumerate(_leaves(live))}
        replaced = {positions[name]: array for name, array in named.items()}
        event = dataclasses.replace(
            _event(live, load.key, load.tree), skipped=None if skipped is None else int(skipped), digest=digest
        )
        with live.preparing:  # changes of hyperparameters are made for the steps as they are
            info = self._engine.work(self._put(live, event, replaced), live.held)
        _log.info("session %s: %d arrays loaded, step %d", live.machine.name, len(replaced), info.step)
        return info

    def _put(
        self, live: LiveSession, event: events.Loaded, replaced: Mapping[int, tensors.Array]
    ) -> device.Work[sessions.SessionInfo]:
        """In the session's turn: asks the machine, replaces the arrays, and only then believes the machine."""
        after, todo = machine.advance(live.machine, event)
        if effects.Replace() in todo:
            _check_sums(live, event)
        # Who waits is told last: there may be no room for the arrays.
        for effect in sorted(todo, key=lambda effect: isinstance(effect, effects.Answer)):
            if isinstance(effect, effects.Answer):
                yield from answers.tell(self._engine, live, effect)
                continue
            assert isinstance(effect, effects.Replace)
            yield from self._engine.replace(live.held, replaced, self._check_growth)
            live.plans = planning.rebased(live.plans, live.machine.step, after.step)
            live.added = live.total = None
            live.given.clear()
        live.machine = after
        return live.info()


def _event(live: LiveSession, key: sessions.LoadKey, tree: trees.TreeSpec) -> events.Loaded:
    """A load whose bytes are still to come."""
    return events.Loaded(
        incarnation=key.incarnation,
        load_key=key.load_key,
        step=key.step,
        base_step=key.base_step,
        names=tuple(leaf.name for leaf in tree.leaves),
        forfeits=live.plan.program.forfeits,
    )


def _check_sums(live: LiveSession, event: events.Loaded) -> None:
    """Raises InvalidArgumentError where sums of gradients stay that are not of as many pushes as the new step says."""
    plan, now = live.plan, live.machine
    step, skipped = loads.counts_after(now.step, now.skipped, event)
    before, after = plan.gathered(now.step, now.skipped), plan.gathered(step, skipped)
    loaded, own = frozenset(event.names), _leaves(live)
    missing = [own[position].name for position in plan.program.sums if own[position].name not in loaded]
    if before != after and missing:
        every = plan.program.every
        raise errors.InvalidArgumentError(
            f"session {now.name!r}: step {step} is {after} of {every} pushes into an update, but the sums that stay "
            f"are of {before}: {nests.brief(tuple(missing))}; load them, too, or choose a step that fits",
            subject="step",
            expected=f"a step {before} of {every} pushes into an update",
            got=f"step {step}, {after} pushes into one",
            step=now.step,
        )


def _tree(live: LiveSession) -> trees.TreeSpec:
    """Every array of a session's state, as a flat tree."""
    leaves = _leaves(live)
    if len(leaves) > limits.LEAVES_MAX:
        raise errors.LimitError(
            f"session {live.machine.name!r}: its state has {len(leaves)} arrays; at most {limits.LEAVES_MAX} can be "
            "read at once",
            subject="state",
            expected=f"at most {limits.LEAVES_MAX} arrays",
            got=str(len(leaves)),
        )
    return trees.TreeSpec(leaves)


def arrays(live: LiveSession) -> tuple[trees.LeafSpec, ...]:
    """Name, shape and element type of every array on the device, in JAX's order."""
    return live.plan.program.arrays([leaf.name for leaf in live.tree.leaves])


def _leaves(live: LiveSession) -> tuple[trees.LeafSpec, ...]:
    """As ``arrays``, and what the machine adds."""
    return (*arrays(live), _SKIPPED) if live.plan.program.skips else arrays(live)


def _check(tree: trees.TreeSpec, leaves: Sequence[trees.LeafSpec]) -> None:
    """Raises TreeError or TreeMismatchError, with the name of the first array that a state does not have so."""
    if tree.nodes:
        raise errors.TreeError("state: a nest, expected arrays by name", expected="arrays by name", got="a nest")
    own = {leaf.name: leaf for leaf in leaves}
    for leaf in tree.leaves:
        if leaf.name not in own:
            raise errors.TreeMismatchError(
                f"state[{leaf.name!r}]: the session's state has no such array; it has {nests.brief(tuple(own))}",
                subject=leaf.name,
                expected=nests.brief(tuple(own)),
                got=leaf.name,
            )
        check_form("state", leaf, own[leaf.name])


def check_form(what: str, leaf: trees.LeafSpec, expected: trees.LeafSpec) -> None:
    """Raises TreeMismatchError where a leaf has another shape or element type."""
    for field, came, wanted in (("shape", leaf.shape, expected.shape), ("element type", leaf.dtype, expected.dtype)):
        if came != wanted:
            raise errors.TreeMismatchError(
                f"{what}[{leaf.name!r}]: {field} {came}, expected {wanted}",
                subject=leaf.name,
                expected=str(wanted),
                got=str(came),
            )
