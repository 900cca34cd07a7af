"""A kernel: a rule traced for the leaves of one block, and what is compiled of it.

The arrays of a block's state are its **own**, of the size of the block and written in place, or **common**: what
belongs to no element, such as a count of updates. Blocks of one span have one set of common arrays: each takes the old
ones and gives the same new ones. Only flat blocks have any; where leaves keep their shapes, all are the block's own.

Knows no session, and neither which blocks there are nor where they lie.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optwire_proto import tensors, trees
from optwire_server.engine import build, executables, granularity, reductions, rule, slots, telemetry
from optwire_server.engine.recipe import Operands, Recipe, Variant

# How often a state's element types are followed to a fixed point: a 16-bit slot may become 32 bits wide, once.
_PROMOTIONS_MAX = 4
# Sums over all leaves that one update may ask for, one after the other.
_SUMS_MAX = 16
# What stands for the name of a leaf, which no name contains.
LEAF: Final = "\0"


class UnfitError(Exception):
    """A rule that does not compute block by block what it computes for the whole tree."""


class Arguments(NamedTuple):
    """Which arguments an executable takes, in the order of the fields.

    Attributes:
      operands: positions among those of ``Operands``.
      reduced: positions among the sums over all leaves.
      valid: whether it takes the number of elements that count.
      grads: positions of gradients.
      common: positions of common arrays.
      own: positions of own arrays.
    """

    operands: tuple[int, ...]
    reduced: tuple[int, ...]
    valid: bool
    grads: tuple[int, ...]
    common: tuple[int, ...]
    own: tuple[int, ...]


class Call(NamedTuple):
    """An executable, and what it takes."""

    run: Any
    takes: Arguments

    def arguments(
        self,
        operands: Sequence[Any],
        reduced: Sequence[Any],
        valid: int,
        grad: Callable[[int], Any],
        common: Sequence[Any],
        own: Sequence[Any],
    ) -> list[Any]:
        """What it takes of all that there is; ``grad`` gives the gradient of a position."""
        takes = self.takes
        return [
            *(operands[at] for at in takes.operands),
            *(reduced[at] for at in takes.reduced),
            *((valid,) if takes.valid else ()),
            *map(grad, takes.grads),
            *(common[at] for at in takes.common),
            *(own if len(takes.own) == len(own) else (own[at] for at in takes.own)),
        ]


class Step(NamedTuple):
    """A compiled update.

    Attributes:
      apply: gives the new own arrays, the new common ones, notes, sums and what was added, in this order; without the
        sums where ``figures`` gives them.
      figures: gives the sums, before the update writes over what they are taken of; None: the update gives them.
      partials: for each sum over all leaves, what gives the block's part of it, or the part that every block has.
      notes: names of scalars that are the same for every block.
      sums: names of scalars that are added over all blocks.
      flaw: as that of the executable.
    """

    apply: Call
    figures: Call | None
    partials: tuple[Call | float, ...]
    notes: tuple[str, ...]
    sums: tuple[str, ...]
    flaw: str


class View(NamedTuple):
    """How parameters are read from a state.

    Attributes:
      call: computes them; None: they are arrays of the state.
      arrays: positions of these among the own arrays.
    """

    call: Call | None
    arrays: tuple[int, ...]


class _Traced(NamedTuple):
    closed: Any
    operands: int
    notes: tuple[str, ...]
    sums: tuple[str, ...]
    added: int
    partials: int


class Kernel:
    """A rule for the leaves of one block.

    Args:
      recipe: of its program.
      positions: of the leaves, in the tree.
      leaves: in the shapes that they have in the block, with their own names.
      is_flat: whether it is a block of elements of any leaves of one kind.

    Raises:
      UnfitError: a flat block's state has arrays that are neither of the block's shape nor scalars.
      TreeError: the rule is not defined for these leaves.
    """

    def __init__(
        self, recipe: Recipe, positions: Sequence[int], leaves: Sequence[trees.LeafSpec], *, is_flat: bool
    ) -> None:
        self._recipe = recipe
        self._is_flat = is_flat
        self.positions = tuple(positions)
        changed = zip(positions, leaves, strict=True)
        self._changed = {at: leaf for at, leaf in changed if leaf.shape != recipe.leaves[at].shape}
        self._grads = [jax.ShapeDtypeStruct(leaf.shape, tensors.numpy_dtype(leaf.dtype)) for leaf in leaves]
        self._lock = threading.Lock()
        self._steps: dict[Variant, Step] = {}
        self._views: dict[str, View] = {}
        self._first: executables.Executable | None = None
        # Paths of learning rates that some update looks at.
        self.used_rates: frozenset[str] = frozenset()
        with recipe.building():
            self._probe = self._rule(tuple(0.0 for _ in recipe.rate_paths))
            self.state = self._settled()
            self.arrays, self._structure = jax.tree.flatten(self.state)
            common = self._scalars() if is_flat else ()
        self.common = tuple(common)
        self.own = tuple(index for index in range(len(self.arrays)) if index not in frozenset(common))

    # ------------------------------------------------------------------------------------------- what it is

    @property
    def views(self) -> tuple[str, ...]:
        """Names of parameters that can be read beside the main ones."""
        return tuple(sorted(self._probe.views))

    @property
    def every(self) -> int:
        """Pushes that make one update."""
        return self._probe.every

    @property
    def form(self) -> tuple[Any, list[Any]]:
        """Structure of the state, shapes and element types."""
        return self._structure, [(array.shape, array.dtype) for array in self.arrays]

    @functools.cached_property
    def gathered(self) -> frozenset[int]:
        """Positions of what ``accumulate`` has gathered for the update to come."""
        return frozenset(rule.sums(self.state))

    def names(self, leaves: Sequence[str]) -> tuple[str, ...]:
        """Names of all arrays, for leaves of these names."""
        with self._recipe.building():
            return slots.names(self.state, self._probe.params, leaves)

    @functools.cached_property
    def templates(self) -> tuple[str, ...]:
        """Names of all arrays of a block of one leaf, with ``LEAF`` for its name."""
        return self.names([LEAF])

    @functools.cached_property
    def specs(self) -> tuple[trees.LeafSpec, ...]:
        """Shapes and element types of all arrays as they travel; names are those of templates, shown.

        Raises:
          TreeError: an array that cannot be sent.
        """
        with self._recipe.building():
            shown = [name.replace(LEAF, "leaf") for name in self.templates]
            return slots.leaf_specs(self.state, [f"{index}.{name}"[:80] for index, name in enumerate(shown)])

    @functools.cached_property
    def own_bytes(self) -> int:
        """Bytes of a block's own arrays."""
        return sum(nbytes(self.arrays[at]) for at in self.own)

    @functools.cached_property
    def common_bytes(self) -> int:
        """Bytes of the common arrays, which a span has once."""
        return sum(nbytes(self.arrays[at]) for at in self.common)

    @functools.cached_property
    def where(self) -> Mapping[int, tuple[bool, int]]:
        """For each array whether it is common, and its position among those."""
        own = {array: (False, at) for at, array in enumerate(self.own)}
        return own | {array: (True, at) for at, array in enumerate(self.common)}

    def position(self, template: str) -> int | None:
        """Which array has a name, if any has."""
        return self._by_template.get(template)

    @functools.cached_property
    def _by_template(self) -> dict[str, int]:
        return {template: array for array, template in enumerate(self.templates)}

    @functools.cached_property
    def is_alone(self) -> bool:
        """Whether every array belongs to a leaf: what has no gradient need not be looked at."""
        return all(LEAF in name for name in self.templates)

    def _check_apart(self, traced: _Traced) -> None:
        """Raises UnfitError where what many blocks share depends on what is in one of them."""
        shared = [LEAF not in name for name in self.templates]
        common, own = self.common, self.own
        arrays = [*common, *own]
        first = len(traced.closed.jaxpr.invars) - len(arrays)
        before = len(self._grads) + 1  # what only one block has: valid, gradients
        inside = {*range(first - before, first), *(first + k for k, at in enumerate(arrays) if not shared[at])}
        tainted = _tainted(traced.closed.jaxpr, inside)
        outputs = [*own, *common]
        if any(shared[at] and tainted[k] for k, at in enumerate(outputs)):
            raise UnfitError("what belongs to no leaf depends on one")
        if any(tainted[len(outputs) : len(outputs) + len(traced.notes)]):
            raise UnfitError("what is told of the update depends on one block of it")
        elements = {*range(first - before, first), *range(first + len(common), first + len(arrays))}
        tainted = _tainted(traced.closed.jaxpr, elements)
        if any(tainted[len(own) : len(outputs)]):
            raise UnfitError("what belongs to no element depends on one")

    def granularity(self) -> granularity.Granularity:
        """How finely what it computes may be cut, sums over all leaves taken apart."""
        operands = self._recipe.zeros(Variant(), 1)

        def update(grads: list[Any], state: Any) -> Any:
            call = rule.Call(operands.push, True, operands.extras)
            return self._advanced(self._rule(operands.rates), grads, state, call)

        with self._recipe.building():
            seen, state = reductions.opaque(update, self._grads, self.state)
            return granularity.derive(seen, self._grads, state)

    # ------------------------------------------------------------------------------------------- what is compiled

    def has(self, variant: Variant) -> bool:
        """Whether an update is compiled. Waits for nothing."""
        return variant in self._steps

    def step(self, variant: Variant) -> Step:
        """A compiled update; ``prepare`` comes first."""
        return self._steps[variant]

    def prepare(self, variant: Variant, *, is_one_of_many: bool = False) -> Step:
        """Compiles an update, unless it is; on the calling thread.

        Raises:
          UnfitError: it is one block of many, and what they share depends on what is in it.
        """
        with self._lock:
            if (step := self._steps.get(variant)) is None:
                with self._recipe.building():
                    traced = self._trace(variant)
                    if is_one_of_many:
                        self._check_apart(traced)
                    step = self._steps[variant] = self._compiled(traced)
            return step

    def has_view(self, which: str) -> bool:
        """Whether the reading of parameters is compiled. Waits for nothing."""
        return which in self._views

    def view(self, which: str) -> View:
        """How parameters are read; ``prepare_view`` comes first."""
        return self._views[which]

    def prepare_first(self) -> None:
        """Compiles how the first state is made, unless it is; without, it is made piece by piece."""
        with self._lock:
            if self._first is None:
                zeros = self._recipe.zeros(Variant(), 1).rates
                with self._recipe.building():
                    closed = jax.make_jaxpr(self._started)(*zeros, *self._grads)
                    self._first = self._recipe.compiled.get(closed, range(len(self.arrays)))

    def prepare_view(self, which: str) -> None:
        """Compiles how parameters are read, unless it is."""
        with self._lock:
            if which not in self._views:
                with self._recipe.building():
                    self._views[which] = self._compiled_view(which)

    def digest(self) -> bytes:
        """Of what the update computes, equal for kernels that do not differ; traces it once more."""
        with self._recipe.building():
            return executables.digest(self._trace(Variant()).closed)

    def init(self, params: Sequence[tensors.Array], rates: tuple[float, ...], seed: int) -> tuple[list[Any], list[Any]]:
        """The own and the common arrays before the first step; copies ``params``.

        May compile where ``prepare_first`` was not called.
        """
        with self._recipe.precision(), jax.default_device(self._recipe.device):
            if self._first is None:  # a whole tree, which may start from random numbers
                leaves = [jnp.array(leaf, copy=True) for leaf in params]
                arrays = jax.tree.leaves(_owned(self._rule(rates, seed).init(leaves), self.state))
            else:
                given = [*rates, *params]
                arrays = _apart(self._first.run(*(given[at] for at in self._first.used)))
        return [arrays[at] for at in self.own], [arrays[at] for at in self.common]

    # ------------------------------------------------------------------------------------------- tracing

    def _rule(self, rates: Sequence[Any], seed: int = 0) -> rule.Rule:
        return build.build(self._recipe.spec, self._recipe.site(rates, self._changed, seed), self.positions)

    def _settled(self) -> Any:
        """The state's shapes and element types, such that an update returns what it was given."""
        operands = self._recipe.zeros(Variant(), 1)
        state = jax.eval_shape(lambda rates, leaves: self._rule(rates).init(leaves), operands.rates, self._grads)

        def once(rates: tuple[Any, ...], grads: list[Any], state: Any) -> Any:
            return self._rule(rates).update(grads, state, rule.Call(0, True, operands.extras))

        for _ in range(_PROMOTIONS_MAX):
            new = jax.eval_shape(once, operands.rates, self._grads, state)
            if _form(new) == _form(state):
                return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
            state = new
        raise TypeError("the update changes the structure, shape or type of its state at every step")

    def _started(self, *given: Any) -> list[Any]:
        """The arrays of a first state, of rates and parameters; to be traced."""
        count = len(self._recipe.rate_paths)
        state = self._rule(given[:count]).init([jnp.array(leaf, copy=True) for leaf in given[count:]])

        def settled(leaf: Any, kind: Any) -> Any:
            return jnp.reshape(jnp.asarray(leaf, kind.dtype), kind.shape)

        return jax.tree.leaves(jax.tree.map(settled, state, self.state))

    def _scalars(self) -> list[int]:
        """Positions of what belongs to no element of a flat block: what stays as it is where the block is longer."""
        (grad,) = self._grads
        longer = [jax.ShapeDtypeStruct((2 * grad.size,), grad.dtype)]
        other = jax.eval_shape(lambda leaves: self._probe.init(leaves), longer)
        structure: Any = jax.tree.structure(other)
        if structure != self._structure:
            raise UnfitError("the structure of the state depends on the size of a leaf")
        found = []
        for index, (one, two) in enumerate(zip(self.arrays, jax.tree.leaves(other), strict=True)):
            if one.shape == () == two.shape:
                found.append(index)
            elif one.shape != grad.shape or two.shape != longer[0].shape:
                raise UnfitError("an array of the state is neither of a leaf's shape nor a scalar")
        return found

    def _trace(self, variant: Variant) -> _Traced:
        zeros = self._recipe.zeros(variant, len(self.positions))
        reduced = [jax.ShapeDtypeStruct((), reductions.dtype())] * _SUMS_MAX
        arrays = self.arrays
        with self._recipe.building():
            closed, shapes = jax.make_jaxpr(functools.partial(self._update, variant), return_shape=True)(
                zeros, reduced, 0, self._grads, [arrays[at] for at in self.common], [arrays[at] for at in self.own]
            )
        _, _, notes, sums, added, partials = shapes
        if len(partials) > _SUMS_MAX:
            raise UnfitError(f"the update takes more than {_SUMS_MAX} sums over all leaves")
        return _Traced(closed, len(jax.tree.leaves(zeros)), tuple(notes), tuple(sums), len(added), len(partials))

    def _update(
        self,
        variant: Variant,
        operands: Operands,
        reduced: list[Any],
        valid: Any,
        grads: list[Any],
        common: list[Any],
        own: list[Any],
    ) -> tuple[list[Any], list[Any], dict[str, Any], dict[str, Any], list[Any], list[Any]]:
        """The update of a variant, to be traced."""
        state = self._joined(common, own)
        is_tree = len(self.positions) > 1
        present = operands.present if is_tree else (False,) if variant.absent else None
        made = self._rule(operands.rates)
        call = rule.Call(operands.push, variant.closing, operands.extras, present=present, rounded=variant.updates)
        if variant.scaled:
            grads = [_unscaled(g, operands.grad_scale) for g in grads]
        within = (
            contextlib.nullcontext(None) if is_tree else reductions.reducing(reduced, valid if self._is_flat else None)
        )
        sums: dict[str, Any] = {}
        with within as reducer:
            new = self._advanced(made, grads, state, call)
            if variant.telemetry:
                sums = self._sums(variant, grads, state, new, made)
        new, added = _with_added(call, state, new, made.params) if variant.updates else (new, [])
        arrays = jax.tree.leaves(new)
        return (
            [arrays[at] for at in self.own],
            [arrays[at] for at in self.common],
            dict(sorted(call.notes.items())),
            dict(sorted(sums.items())),
            added,
            reducer.partials if reducer else [],
        )

    def _advanced(self, made: rule.Rule, grads: list[Any], state: Any, call: rule.Call) -> Any:
        """The state after an update, in the element types that it has for good."""
        new = jax.tree.map(_kept, made.update(grads, state, call), state)
        if (self._recipe.restores or self.every == 1) and "finite" in call.notes:
            finite = call.notes["finite"]  # what is around the policy keeps its state, too
            new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        return new

    def _sums(self, variant: Variant, grads: list[Any], old: Any, new: Any, made: rule.Rule) -> dict[str, Any]:
        """What figures are made of."""
        if variant.absent and len(self.positions) == 1:
            return telemetry.still(made.params(new))
        site = self._recipe.site((0.0,) * len(self._recipe.rate_paths), self._changed)
        changed = build.clips(self._recipe.spec, site, old, closing=variant.closing, only=self.positions)
        return telemetry.sums(grads, made.params(old), made.params(new), changed)

    def _joined(self, common: Sequence[Any], own: Sequence[Any]) -> Any:
        """The state of these arrays."""
        arrays = dict(zip((*self.common, *self.own), (*common, *own), strict=True))
        return jax.tree.unflatten(self._structure, [arrays[at] for at in range(len(arrays))])

    def _compiled(self, traced: _Traced) -> Step:
        compiled = self._recipe.compiled
        arguments, results = len(traced.closed.jaxpr.invars), len(traced.closed.jaxpr.outvars)
        donated = range(arguments - len(self.own), arguments)
        wanted = list(range(results - traced.partials))
        calls, figures = [], None
        if traced.sums and self._is_flat:
            # In one executable, what is written in place would be copied for the sums; computing it twice takes less.
            first = len(self.own) + len(self.common) + len(traced.notes)
            summed, wanted[first : first + len(traced.sums)] = wanted[first : first + len(traced.sums)], []
            figures = self._call(compiled.get(traced.closed, summed), traced)
            calls.append(figures)
        apply = compiled.get(traced.closed, wanted, donated)
        applying = self._call(apply, traced)
        calls.append(applying)
        partials: list[Call | float] = []
        for at in range(results - traced.partials, results):
            variable = traced.closed.jaxpr.outvars[at]
            if isinstance(variable, jax.extend.core.Literal):
                partials.append(float(variable.val))
                continue
            calls.append(self._call(compiled.get(traced.closed, (at,)), traced))
            partials.append(calls[-1])
        paths = self._recipe.rate_paths
        self.used_rates |= {paths[at] for call in calls for at in call.takes.operands if at < len(paths)}
        return Step(applying, figures, tuple(partials), traced.notes, traced.sums, apply.flaw)

    def _call(self, compiled: executables.Executable, traced: _Traced) -> Call:
        """What an executable of a traced update takes."""
        counts = (traced.operands, _SUMS_MAX, 1, len(self._grads), len(self.common), len(self.own))
        groups, first = [], 0
        for count in counts:
            groups.append(tuple(at - first for at in compiled.used if first <= at < first + count))
            first += count
        operands, reduced, valid, grads, common, own = groups
        return Call(compiled.run, Arguments(operands, reduced, bool(valid), grads, common, own))

    def _compiled_view(self, which: str) -> View:
        read = self._probe.views.get(which, self._probe.params)
        arrays = [*(self.arrays[at] for at in self.common), *(self.arrays[at] for at in self.own)]
        first = len(self.common)
        closed = jax.make_jaxpr(lambda *held: list(read(self._joined(held[:first], held[first:]))))(*arrays)
        jaxpr = closed.jaxpr
        position = {id(variable): at for at, variable in enumerate(jaxpr.invars)}
        if all(position.get(id(out), -1) >= first for out in jaxpr.outvars):
            return View(None, tuple(position[id(out)] - first for out in jaxpr.outvars))
        made = self._recipe.compiled.get(closed, range(len(jaxpr.outvars)))
        common = tuple(at for at in made.used if at < first)
        own = tuple(at - first for at in made.used if at >= first)
        return View(Call(made.run, Arguments((), (), False, (), common, own)), ())


def _tainted(jaxpr: Any, inside: set[int]) -> list[bool]:
    """For each result of a jaxpr whether one of some arguments may reach it."""
    reached = {id(variable) for at, variable in enumerate(jaxpr.invars) if at in inside}
    for equation in jaxpr.eqns:
        if any(id(atom) in reached for atom in equation.invars):
            reached.update(map(id, equation.outvars))
    return [id(out) in reached for out in jaxpr.outvars]


def _with_added(call: rule.Call, state: Any, new: Any, read: Callable[[Any], list[Any]]) -> tuple[Any, list[Any]]:
    """The new state, and what its update added to the parameters: the optimizer's own word, or the difference.

    A difference is rounded; parameters in the state become the old ones plus it, as whoever adds it elsewhere has them.
    """
    before, after = read(state), read(new)
    if call.added is not None:
        return new, rule.like(call.added, before)
    added = [rule.rounded(b - a, call.index) for a, b in zip(before, after, strict=True)]
    sums = {id(b): a + change for a, b, change in zip(before, after, added, strict=True)}
    return jax.tree.map(lambda leaf: sums.get(id(leaf), leaf), new), added


def _unscaled(g: Any, scale: Any) -> Any:
    """A gradient divided by what it was multiplied by, in 32 bits at least: 65,536 is infinite in f16."""
    wide = jnp.promote_types(g.dtype, jnp.float32)
    return g.astype(wide) / jnp.asarray(scale, wide)


def _kept(new: Any, old: Any) -> Any:
    """A part of the state in the element type that it has for good."""
    if jnp.issubdtype(old.dtype, jax.dtypes.extended):
        return new
    return lax.convert_element_type(new, old.dtype)


def _form(state: Any) -> tuple[Any, list[Any]]:
    """Structure, shapes and element types."""
    leaves, structure = jax.tree.flatten(state)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _owned(state: Any, like: Any) -> Any:
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


def _apart(arrays: Sequence[Any]) -> list[Any]:
    """Arrays no two of which share memory."""
    seen: set[int] = set()
    made = []
    for array in arrays:
        pointer = array.unsafe_buffer_pointer()
        made.append(jnp.array(np.asarray(array), copy=True) if pointer in seen and array.size else array)
        seen.add(pointer)
    return made


def nbytes(array: Any) -> int:
    """Bytes of an array, abstract or not."""
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):  # a key of randomness
        return 8
    return int(np.prod(array.shape, dtype=np.int64)) * int(array.dtype.itemsize)
