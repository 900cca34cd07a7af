"""Compiled updates: one program per rule and tree, shared by all sessions that have both."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optwire_proto import checks, errors, specs, tensors, trees
from optwire_server.engine import build, granularity, rates, rule, slots, telemetry

# What JAX takes apart as the optimizer's state; it holds the parameters.
OptState = Any
# The new state, notes by name, what was added to the parameters.
Updated = tuple[OptState, dict[str, Any], list[Any]]

_WIDE = ("f64", "c128")
# What a push brings along beside gradients, and what optax calls it.
OPTAX_EXTRAS = {"loss": "value"}
# How often a state's element types are followed to a fixed point: a 16-bit slot may become 32 bits wide, once.
_PROMOTIONS_MAX = 4


class Variant(NamedTuple):
    """Which of a program's compiled updates a push runs.

    Attributes:
      closing: whether the push closes a step; others are only gathered (``accumulate``).
      scaled: whether gradients are divided by a ``grad_scale`` first.
      telemetry: whether norms are computed.
      absent: whether some leaves have no gradient; ``Operands.present`` says which do.
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


class Program:
    """An optimizer compiled for one tree and device.

    Every update has the form ``(operands, grads, state) -> (state, notes, added)`` with the whole state donated and
    returned in the order it came, so that XLA writes the new state over the old. Learning rates, index, scale and
    extras are operands: none of them compiles anew.
    """

    def __init__(
        self, spec: specs.Spec, tree: trees.TreeSpec, device: jax.Device, state_bytes_max: int = 2**63
    ) -> None:
        self.spec = spec
        self._leaves = tree.leaves
        # Of leaves, or of slots that the spec asks for: without, JAX would quietly make 32 bits of them.
        self._wide = any(leaf.dtype in _WIDE for leaf in tree.leaves) or specs.any_inside(
            spec, lambda found: "float64" in (value for _, value in found.arguments)
        )
        self.device = device
        self.rate_paths = tuple(rates.rates(spec))
        self.extras = checks.extras(spec, build.CATALOGUE)
        # Whether what is not finite leaves the parameters alone and counts as a step.
        self.skips = specs.any_inside(spec, lambda found: found.name == "on_nonfinite" and found["policy"] == "skip")
        # Whether what is not finite is refused, rather than skipped.
        self.rejects = specs.any_inside(
            spec, lambda found: found.name == "on_nonfinite" and found["policy"] == "reject"
        )
        self._grads = [jax.ShapeDtypeStruct(leaf.shape, tensors.numpy_dtype(leaf.dtype)) for leaf in tree.leaves]
        self._lock = threading.Lock()
        self._named = slots.Known()
        self._updates: dict[Variant, Callable[..., Updated]] = {}
        self._views: dict[str, Callable[[OptState], list[Any]]] = {}
        # Paths of learning rates that the update does not look at, as only the first state depends on them.
        self.idle_rates: frozenset[str] = frozenset()
        with self._building():
            probe = self._rule(tuple(0.0 for _ in self.rate_paths))
            self.every = probe.every
            # How many pushes a skipped update is the end of: those gathered for it, where it is inside an accumulation.
            self.forfeits = probe.every if _inside_accumulation(spec) else 1
            self.views = tuple(sorted(probe.views))
            self._state = self._settled()
            self.sums = rule.sums(self._state)
            self.state_bytes: int = sum(_bytes(leaf) for leaf in jax.tree.leaves(self._state))
            if self.state_bytes > state_bytes_max:  # before the compiler is asked for as much
                raise errors.LimitError(
                    f"state_bytes_max: {self.state_bytes}, expected at most {state_bytes_max}",
                    subject="state_bytes_max",
                    expected=f"at most {state_bytes_max}",
                    got=str(self.state_bytes),
                )
            self._params = probe.params
            self._owns_params = not jax.make_jaxpr(probe.params)(self._state).eqns
            found = rates.first_rate(spec)
            scheduled = found is not None and rates.constant_rate(spec) is None
            schedule = build.schedule(found[1]) if found and scheduled else None
            self._schedule = jax.jit(schedule).lower(0).compile() if schedule else None
        for closing in (True, False)[: 1 if self.every == 1 else 2]:
            self.prepare(Variant(closing=closing))
        if not self._owns_params:
            self.prepare_view("")

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """What the calling thread must be in: 64 bits for trees that have them, without changing any other program."""
        context: contextlib.AbstractContextManager[Any] = jax.enable_x64(self._wide)
        return context

    def init(self, params: Sequence[tensors.Array], rates: tuple[float, ...], seed: int) -> OptState:
        """The state before the first step; copies ``params``."""
        with self.precision(), jax.default_device(self.device):
            state = self._rule(rates, seed).init([jnp.array(leaf, copy=True) for leaf in params])
            return _owned(state, self._state)

    def has(self, variant: Variant) -> bool:
        """Whether an update is compiled. Waits for nothing."""
        return variant in self._updates

    def has_view(self, which: str) -> bool:
        """Whether the reading of a view is compiled, or needs no compiling. Waits for nothing."""
        return which in self._views or (not which and self._owns_params)

    def prepare(self, variant: Variant) -> None:
        """Compiles an update, unless it is; on the calling thread."""
        with self._lock:
            if self.has(variant):
                return
            with self._building(), _compiling():
                jitted = jax.jit(self._traced(variant), donate_argnums=2)
                traced = jitted.trace(self._zeros(variant), self._grads, self._state)
                if variant == Variant():
                    self.idle_rates = self._idle(traced.jaxpr.jaxpr)
                self._updates[variant] = traced.lower().compile()

    def prepare_view(self, which: str) -> None:
        """Compiles the reading of parameters that are not simply part of the state, unless it is.

        Raises:
          InvalidArgumentError: the spec keeps no such parameters.
        """
        if which and which not in self.views:
            there = ", ".join(map(repr, self.views)) or "none"
            raise errors.InvalidArgumentError(
                f"which: {which[:80]!r}, but this session's optimizer keeps beside its parameters: {there}",
                subject="which",
                expected=there,
                got=which[:80],
            )
        with self._lock:
            if self.has_view(which):
                return
            with self._building():
                made = self._rule(tuple(0.0 for _ in self.rate_paths))
                read = made.views[which] if which else made.params
                self._views[which] = jax.jit(read).lower(self._state).compile()

    def update(self, variant: Variant, operands: Operands, grads: Any, state: OptState) -> Updated:
        """Starts one update that ``prepare`` made; ``state`` is consumed.

        Returns:
          The new state, notes about the update, and what it added to the parameters, where the variant has it.
        """
        with self.precision():
            return self._updates[variant](operands, grads, state)

    def params(self, state: OptState, which: str = "") -> list[jax.Array]:
        """Parameters in a state; those of ``which == ""`` mostly share its memory."""
        with self.precision():  # for casts that change nothing, too: they are no part of a jaxpr, and would narrow here
            read = self._params if not which and self._owns_params else self._views[which]
            return list(read(state))

    def learning_rate(self, index: int) -> float | None:
        """What the schedule of the first learning rate gives for a step, or None where no schedule gives it."""
        if self._schedule is None:
            return None
        with self.precision():
            return float(self._schedule(index))

    @functools.cached_property
    def update_text(self) -> int:
        """A digest of what the update computes, equal for programs that do not differ; traces it once more."""
        with self._building():
            closed = jax.make_jaxpr(self._traced(Variant()))(self._zeros(Variant()), self._grads, self._state)
        constants = tuple(np.asarray(constant).tobytes() for constant in closed.consts)
        return hash((str(closed.jaxpr), constants))

    def _idle(self, jaxpr: Any) -> frozenset[str]:
        used = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
        return frozenset(
            path for path, variable in zip(self.rate_paths, jaxpr.invars, strict=False) if id(variable) not in used
        )

    @functools.cached_property
    def skippable(self) -> bool:
        """Whether a push may leave gradients out: every leaf is treated by itself."""
        return build.skippable(self.spec)

    def arrays(self, leaves: Sequence[str]) -> tuple[trees.LeafSpec, ...]:
        """Name, shape and element type of every array of a state, for leaves of these names.

        Raises:
          TreeError: an array that cannot be sent.
        """
        if (known := self._named.get(leaves)) is not None:
            return known
        with self._building():
            named = slots.names(self._state, self._rule(tuple(0.0 for _ in self.rate_paths)).params, leaves)
        return self._named.put(leaves, slots.leaf_specs(self._state, named))

    def same_state(self, other: Program) -> bool:
        """Whether a state of one is a state of the other."""
        if self is other:
            return True
        return _form(self._state) == _form(other._state)

    @functools.cached_property
    def granularity(self) -> granularity.Granularity:
        """How finely the state may be cut, derived from the update."""
        with self._building():
            step = self._traced(Variant())
            operands = self._zeros(Variant())
            found = granularity.derive(lambda grads, state: step(operands, grads, state)[0], self._grads, self._state)
        if found is granularity.Granularity.ELEMENT and not build.is_elementwise(self.spec):
            return granularity.Granularity.TENSOR
        return found

    @contextlib.contextmanager
    def _building(self) -> Iterator[None]:
        with self.precision(), _refusing(self.spec), jax.default_device(self.device):
            yield

    def _rule(self, rates: tuple[Any, ...], seed: int = 0) -> rule.Rule:
        site = build.Site(self._leaves, dict(zip(self.rate_paths, rates, strict=True)), seed)
        return build.build(self.spec, site)

    def _zeros(self, variant: Variant) -> Operands:
        """Operands of a variant to trace with."""
        return Operands(
            rates=tuple(0.0 for _ in self.rate_paths),
            push=0,
            grad_scale=1.0 if variant.scaled else None,
            extras={OPTAX_EXTRAS[name]: 0.0 for name in self.extras},
            present=(True,) * len(self._leaves) if variant.absent else None,
        )

    def _traced(self, variant: Variant) -> Callable[..., Updated]:
        """The update of a variant, to be traced."""

        def update(operands: Operands, grads: list[Any], state: OptState) -> Updated:
            made = self._rule(operands.rates)
            call = rule.Call(
                operands.push, variant.closing, operands.extras, present=operands.present, rounded=variant.updates
            )
            if variant.scaled:
                grads = [_unscaled(g, operands.grad_scale) for g in grads]
            new = jax.tree.map(_kept, made.update(grads, state, call), state)
            whole = self.rejects or self.forfeits == 1  # what is around the policy keeps its state, too
            if whole and "finite" in call.notes:
                finite = call.notes["finite"]
                new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
            if variant.telemetry:
                clip = build.clips(self.spec, build.Site(self._leaves, {}), state, closing=variant.closing)
                call.notes.update(telemetry.measure(grads, made.params(state), made.params(new), clip))
            new, added = _with_added(call, state, new, made.params) if variant.updates else (new, [])
            return new, call.notes, added

        return update

    def _settled(self) -> OptState:
        """The state's shapes and element types, such that an update returns what it was given."""
        rates = tuple(0.0 for _ in self.rate_paths)
        state = jax.eval_shape(lambda leaves: self._rule(rates).init(leaves), self._grads)
        for _ in range(_PROMOTIONS_MAX):
            new = jax.eval_shape(self._once, rates, self._grads, state)
            if _form(new) == _form(state):
                return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
            state = new
        raise TypeError("the update changes the structure, shape or type of its state at every step")

    def _once(self, rates: tuple[float, ...], grads: list[Any], state: OptState) -> OptState:
        extras = {OPTAX_EXTRAS[name]: 0.0 for name in self.extras}
        return self._rule(rates).update(grads, state, rule.Call(0, True, extras))


# Compilers at work at once, in the whole process: specs that take long must not take every thread and all memory.
_COMPILERS = threading.BoundedSemaphore(4)
_COMPILER_WAIT_S = 60.0


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    if not _COMPILERS.acquire(timeout=_COMPILER_WAIT_S):
        raise errors.LimitError(
            f"other updates have been compiling for {_COMPILER_WAIT_S:.0f} s", subject="compilers", retry_after_s=1.0
        )
    try:
        yield
    finally:
        _COMPILERS.release()


def _with_added(
    call: rule.Call, state: OptState, new: OptState, read: Callable[[OptState], list[Any]]
) -> tuple[OptState, list[Any]]:
    """The new state, and what its update added to the parameters: the optimizer's own word, or the difference.

    A difference is rounded; parameters in the state become the old ones plus it, as whoever adds it elsewhere has them.
    """
    before, after = read(state), read(new)
    if call.added is not None:
        return new, rule.like(call.added, before)
    added = [rule.rounded(b - a, call.index) for a, b in zip(before, after, strict=True)]
    sums = {id(b): a + change for a, b, change in zip(before, after, added, strict=True)}
    return jax.tree.map(lambda leaf: sums.get(id(leaf), leaf), new), added


def _inside_accumulation(spec: specs.Spec) -> bool:
    """Whether what is not finite is skipped inside an accumulation, and not push by push."""
    places = specs.places(spec)
    skips = (path for path, value in places if isinstance(value, specs.Spec) and value.name == "on_nonfinite")
    return any("accumulate.optimizer" in path for path in skips)


def _unscaled(g: Any, scale: Any) -> Any:
    """A gradient divided by what it was multiplied by, in 32 bits at least: 65,536 is infinite in f16."""
    wide = jnp.promote_types(g.dtype, jnp.float32)
    return g.astype(wide) / jnp.asarray(scale, wide)


def _kept(new: Any, old: Any) -> Any:
    """A part of the state in the element type that it has for good."""
    if jnp.issubdtype(old.dtype, jax.dtypes.extended):
        return new
    return lax.convert_element_type(new, old.dtype)


def _form(state: OptState) -> tuple[Any, list[Any]]:
    """Structure, shapes and element types."""
    leaves, structure = jax.tree.flatten(state)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _owned(state: OptState, like: OptState) -> OptState:
    """A first state of the shapes and element types of ``like``, in which no two arrays share memory."""
    seen: set[int] = set()

    def own(leaf: Any, kind: Any) -> Any:
        if jnp.issubdtype(kind.dtype, jax.dtypes.extended):
            return leaf
        array = jnp.reshape(lax.convert_element_type(leaf, kind.dtype), kind.shape)
        if id(array) in seen:
            array = jnp.array(array, copy=True)
        seen.add(id(array))
        return array

    return jax.tree.map(own, state, like)


def _bytes(leaf: Any) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):  # a key of randomness
        return 8
    return int(leaf.size * leaf.dtype.itemsize)


@contextlib.contextmanager
def _refusing(spec: specs.Spec) -> Iterator[None]:
    """Turns what tracing raises into an error of the request: the rule cannot take these shapes."""
    try:
        yield
    except errors.OptwireError:
        raise
    except (TypeError, ValueError, ArithmeticError, AssertionError, IndexError, NotImplementedError) as exc:
        raise errors.TreeError(f"{spec.name} cannot take these parameters: {exc}"[:800], got=str(exc)[:200]) from exc
