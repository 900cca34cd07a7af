"""Programs: an optimizer for one tree, as the kernels that it is cut into; shared by all sessions that have both."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from optwire_proto import checks, errors, patterns, specs, trees
from optwire_server.engine import build, cut, executables, kernel, means, movers, rates, recipe, slots
from optwire_server.engine.granularity import Granularity
from optwire_server.engine.kernel import LEAF, Call, Kernel
from optwire_server.engine.layout import Layout

Variant = recipe.Variant
Operands = recipe.Operands
OPTAX_EXTRAS = recipe.OPTAX_EXTRAS

_WIDE = ("f64", "c128")
# So many kinds of leaves, such as those with weight decay and those without, are compiled for ahead in all sizes.
_KINDS_FEW = 4
# Where a spec tells more kinds of leaves apart, one program for all of them is there sooner than one for each.
_KINDS_MAX = 16
# From here on one program for all tensors compiles sooner than one for each.
_TENSORS_MAX = 64
# The time to compile a whole tree grows faster than the number of its leaves.
TREE_LEAVES_MAX = 2048

_log = logging.getLogger("optwire.program")


class Place(NamedTuple):
    """Where an array of a whole state is.

    Attributes:
      leaf: the leaf that it belongs to; None: to none.
      array: which of the arrays of that leaf's kernel it is, or of the first kernel's.
      name: with ``LEAF`` for the name of the leaf.
    """

    leaf: int | None
    array: int
    name: str


class Program:
    """An optimizer compiled for one tree and device.

    Every update of a block has the form ``(operands, sums, gradients, common, own) -> (own, common, ...)`` with all own
    arrays donated and returned in the order they came, so that XLA writes the new state over the old. Learning rates,
    index, scale and extras are operands: none of them compiles anew.

    Args:
      spec: checked.
      tree: the session's.
      device: that it computes on.
      state_bytes_max: a larger state is refused before anything is compiled.
      compiled: executables that are shared; None: none are.
      finest: how finely it is cut at most.
    """

    def __init__(
        self,
        spec: specs.Spec,
        tree: trees.TreeSpec,
        device: jax.Device,
        state_bytes_max: int = 2**63,
        compiled: executables.Executables | None = None,
        finest: Granularity = Granularity.ELEMENT,
    ) -> None:
        self.spec = spec
        self.tree = tree
        self.rate_paths = tuple(rates.rates(spec))
        self.extras = checks.extras(spec, build.CATALOGUE)
        # Whether what is not finite leaves the parameters alone and counts as a step.
        self.skips = specs.any_inside(spec, lambda found: found.name == "on_nonfinite" and found["policy"] == "skip")
        # Whether what is not finite is refused, rather than skipped.
        self.rejects = specs.any_inside(
            spec, lambda found: found.name == "on_nonfinite" and found["policy"] == "reject"
        )
        self._recipe = recipe.Recipe(
            spec=spec,
            leaves=tree.leaves,
            rate_paths=self.rate_paths,
            extras=self.extras,
            restores=self.rejects or not _inside_accumulation(spec),
            # Of leaves, or of slots that the spec asks for: without, JAX would quietly make 32 bits of them.
            wide=any(leaf.dtype in _WIDE for leaf in tree.leaves)
            or specs.any_inside(spec, lambda found: "float64" in (value for _, value in found.arguments)),
            device=device,
            compiled=compiled or executables.Executables(),
        )
        self._lock = threading.Lock()
        self._named = slots.Known()
        self._ready: set[Variant] = set()
        self._meant: set[int] = set()
        self._state_bytes_max = state_bytes_max
        self.cut, self._kernels = self._fitting(finest)
        if not self.is_tree:  # which may start from random numbers, and has as many small arrays as leaves
            for each in self._kernels.values():
                each.prepare_first()
        first = next(iter(self._kernels.values()))
        self.every = first.every
        # How many pushes a skipped update is the end of: those gathered for it, where it is inside an accumulation.
        self.forfeits = self.every if _inside_accumulation(spec) else 1
        self.views = first.views
        self._schedule = self._compiled_schedule()
        self._usual = tuple(Variant(closing=closing) for closing in (True, False)[: 1 if self.every == 1 else 2])
        for variant in self._usual:
            self.prepare(variant)
        self.prepare_view("")

    # ------------------------------------------------------------------------------------------- what it is

    @property
    def layout(self) -> Layout:
        """Where the leaves of a payload lie."""
        return self.cut.layout

    @property
    def granularity(self) -> Granularity:
        """How finely the state is cut."""
        return self.cut.granularity

    @property
    def is_wide(self) -> bool:
        """Whether it computes with 64 bits."""
        return self._recipe.wide

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """What a thread that runs its executables must be in."""
        return self._recipe.precision()

    def placing(self) -> contextlib.AbstractContextManager[Any]:
        """What a thread that makes arrays for it must be in."""
        context: contextlib.AbstractContextManager[Any] = jax.default_device(self._recipe.device)
        return context

    @functools.cached_property
    def elements(self) -> int:
        """Elements of all leaves."""
        return sum(math.prod(leaf.shape) for leaf in self.tree.leaves)

    @property
    def is_tree(self) -> bool:
        """Whether one block is the whole tree."""
        return self.granularity is Granularity.TREE

    def kernel(self, span: cut.Span, block: cut.Block) -> Kernel:
        """What updates a block."""
        return self._kernels[span.kind, block.parts[0].size if self.cut.is_flat else 0]

    def kernel_for(self, span: cut.Span, count: int) -> tuple[int, Kernel]:
        """The smallest flat kernel of a span that so many elements fit, and its size."""
        sizes = (size for size in (1, cut.SMALL, cut.BLOCK) if size >= count)
        return next((size, self._kernels[span.kind, size]) for size in sizes if (span.kind, size) in self._kernels)

    def run(self, call: Call, arguments: Sequence[Any]) -> list[Any]:
        """Runs an executable of one of its kernels."""
        if self.is_wide == jax.config.read("jax_enable_x64"):
            made: list[Any] = call.run(*arguments)
            return made
        with self.precision():
            made = call.run(*arguments)
            return made

    @functools.cached_property
    def means(self) -> means.Means:
        """What takes the mean of several pushes, block by block."""
        return means.Means(self._recipe)

    def prepare_means(self, pushes: int) -> None:
        """Compiles the mean of so many pushes' flat blocks, unless it is; on the calling thread."""
        if self.cut.is_flat and pushes not in self._meant:
            for span in self.cut.spans:
                for part in {block.parts[0] for block in span.blocks}:
                    self.means.prepare(part.size, part.dtype, pushes)
            self._meant.add(pushes)

    @functools.cached_property
    def movers(self) -> movers.Movers:
        """What moves elements in and out of its blocks."""
        return movers.Movers(self._recipe, is_host=self._recipe.device.platform == "cpu")

    def kernel_of(self, leaf: int) -> Kernel:
        """What updates the first block of a leaf."""
        span = self._span_of[leaf]
        return self.kernel(span, span.blocks[0])

    @functools.cached_property
    def _span_of(self) -> dict[int, cut.Span]:
        return {leaf: span for span in self.cut.spans for leaf in span.leaves}

    @functools.cached_property
    def skippable(self) -> bool:
        """Whether a push may leave gradients out: every leaf is treated by itself."""
        return build.skippable(self.spec)

    @functools.cached_property
    def idle_rates(self) -> frozenset[str]:
        """Paths of learning rates that no update looks at, as only the first state depends on them."""
        used = frozenset[str]().union(*(each.used_rates for each in self._kernels.values()))
        return frozenset(self.rate_paths) - used

    @functools.cached_property
    def update_text(self) -> int:
        """A digest of what the update computes, equal for programs that do not differ; traces it once more."""
        return hash(tuple(each.digest() for each in self._kernels.values()))

    @functools.cached_property
    def held_bytes(self) -> int:
        """Bytes of a state in memory, padding included, before any leaves part ways."""
        return sum(map(self.span_bytes, self.cut.spans))

    def span_bytes(self, span: cut.Span, sizes: Sequence[int] | None = None) -> int:
        """Bytes of the state of a span in memory; of leaves of its kind in blocks of these ``sizes``, where given."""
        return _span_bytes(self._kernels, span, _block_sizes(self.cut, span) if sizes is None else sizes)

    @functools.cached_property
    def state_bytes(self) -> int:
        """Bytes of all arrays of a state, as they can be read."""
        total = 0
        for place in self.places:
            holder = self.kernel_of(place.leaf or 0)
            array = holder.arrays[place.array]
            size = kernel.nbytes(array)
            if self.cut.is_flat and place.leaf is not None and array.shape:
                size = math.prod(self.tree.leaves[place.leaf].shape) * array.dtype.itemsize
            total += size
        return total

    @functools.cached_property
    def places(self) -> tuple[Place, ...]:
        """Every array of a state: of each slot those of all leaves, in order."""
        if self.is_tree:
            names = self.kernel_of(0).names([leaf.name for leaf in self.tree.leaves])
            return tuple(Place(None, array, name) for array, name in enumerate(names))
        kernels = [self._kernels_of_kind[kind] for kind in range(len(self.cut.kinds))]
        kinds = {leaf: span.kind for leaf, span in self._span_of.items()}
        places: list[Place] = []
        for name in dict.fromkeys(name for each in kernels for name in each.templates):
            at = [each.position(name) for each in kernels]
            if LEAF not in name:
                places.append(Place(None, next(array for array in at if array is not None), name))
                continue
            found = ((leaf, at[kinds[leaf]]) for leaf in range(len(self.tree.leaves)))
            places += [Place(leaf, array, name) for leaf, array in found if array is not None]
        return tuple(places)

    def array_dtype(self, position: int) -> Any:
        """Element type of an array, by position among places."""
        place = self.places[position]
        return self.kernel_of(place.leaf or 0).arrays[place.array].dtype

    def array_shape(self, position: int) -> tuple[int, ...]:
        """Shape of an array as it travels, by position among places."""
        place = self.places[position]
        shape = self.kernel_of(place.leaf or 0).specs[place.array].shape
        return self.tree.leaves[place.leaf].shape if self.cut.is_flat and place.leaf is not None and shape else shape

    @functools.cached_property
    def _kernels_of_kind(self) -> dict[int, Kernel]:
        return {span.kind: self.kernel(span, span.blocks[0]) for span in reversed(self.cut.spans)}

    @functools.cached_property
    def sums(self) -> tuple[int, ...]:
        """Positions, among all arrays, of what ``accumulate`` has gathered for the update to come."""
        return tuple(
            position
            for position, place in enumerate(self.places)
            if place.array in self.kernel_of(place.leaf or 0).gathered
        )

    def arrays(self, leaves: Sequence[str]) -> tuple[trees.LeafSpec, ...]:
        """Name, shape and element type of every array of a state, for leaves of these names, in the order of places.

        Raises:
          TreeError: an array that cannot be sent.
        """
        if (known := self._named.get(leaves)) is not None:
            return known
        if self.is_tree:
            names = self.kernel_of(0).names(leaves)
            return self._named.put(leaves, slots.leaf_specs(self.kernel_of(0).state, names))
        made: dict[str, trees.LeafSpec] = {}
        for place in self.places:
            form = self.kernel_of(place.leaf or 0).specs[place.array]
            shape = form.shape
            if self.cut.is_flat and place.leaf is not None and shape:
                shape = self.tree.leaves[place.leaf].shape
            name = _filled(place.name, None if place.leaf is None else leaves[place.leaf])
            while name in made:
                name = f"{name}_"
            made[name] = trees.LeafSpec(name, shape, form.dtype)
        return self._named.put(leaves, tuple(made.values()))

    def same_state(self, other: Program) -> bool:
        """Whether a state of one is a state of the other."""
        if self is other:
            return True
        return self.cut == other.cut and all(
            each.form == other._kernels[key].form for key, each in self._kernels.items()
        )

    def learning_rate(self, index: int) -> float | None:
        """What the schedule of the first learning rate gives for a step, or None where no schedule gives it."""
        if self._schedule is None:
            return None
        with self._recipe.precision():
            return float(self._schedule(index)[0])

    # ------------------------------------------------------------------------------------------- what is compiled

    def has(self, variant: Variant) -> bool:
        """Whether an update is compiled. Waits for nothing."""
        return variant in self._ready

    def has_view(self, which: str) -> bool:
        """Whether the reading of a view is compiled. Waits for nothing."""
        return all(each.has_view(which) for each in self._kernels.values())

    def prepare(self, variant: Variant) -> None:
        """Compiles an update, unless it is; on the calling thread."""
        with self._lock:
            if self.has(variant):
                return
            for each in self._kernels.values():
                for own in self.variants(each, variant):
                    each.prepare(own)
            self._ready.add(variant)

    def variants(self, each: Kernel, variant: Variant) -> tuple[Variant, ...]:
        """What a variant needs of a kernel: first for leaves that have gradients, then for those that have none."""
        if not variant.absent or self.is_tree:
            return (variant,)
        there = variant._replace(absent=False)
        stays = each.is_alone and not variant.telemetry and not variant.updates
        return (there,) if stays else (there, variant)

    @functools.cached_property
    def family(self) -> Hashable:
        """Equal for programs that blocks of all sizes have the same executables of."""
        return str(rates.rateless(self.spec)), frozenset(kind[:2] for kind in self.cut.kinds if isinstance(kind, tuple))

    def compile_ahead(self) -> None:
        """Compiles for flat blocks of the sizes that this tree does not have, and others may; on the calling thread.

        Where there are few kinds of leaves: what is compiled is then found by programs of any other trees.
        """
        if not self.cut.is_flat or len(self.cut.kinds) > _KINDS_FEW:
            return
        for span in self.cut.spans:
            for size in (cut.SMALL, cut.BLOCK, 1):
                if (span.kind, size) not in self._kernels:
                    each = self._kernel(self.cut, span, size)
                    each.prepare_first()
                    for variant in self._usual:
                        each.prepare(variant)
                    each.prepare_view("")

    def prepare_view(self, which: str) -> None:
        """Compiles the reading of parameters, unless it is.

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
        for each in self._kernels.values():
            each.prepare_view(which)

    @property
    def flaws(self) -> tuple[str, ...]:
        """Why updates do not write all of the state in place."""
        ready = itertools.product(self._kernels.values(), self._ready)
        steps = (each.step(own) for each, variant in ready for own in self.variants(each, variant) if each.has(own))
        return tuple(step.flaw for step in steps if step.flaw)

    def _compiled_schedule(self) -> Any:
        found = rates.first_rate(self.spec)
        if found is None or rates.constant_rate(self.spec) is not None:
            return None
        with self._recipe.building():
            closed = jax.make_jaxpr(build.schedule(found[1]))(0)
            made = self._recipe.compiled.get(closed, (0,))
        return made.run if made.used else lambda index: made.run()

    # ------------------------------------------------------------------------------------------- how it is cut

    def _fitting(self, finest: Granularity) -> tuple[cut.Cut, dict[tuple[int, int], Kernel]]:
        """The finest cut, but no finer than asked for, that the rule computes the same in, and its kernels."""
        verdicts = _verdicts(self.spec, tuple(leaf.name for leaf in self.tree.leaves))
        if len(set(verdicts)) > _KINDS_MAX and len(self.tree.leaves) <= TREE_LEAVES_MAX:
            whole = cut.make(self.tree, Granularity.TREE, verdicts)
            return whole, self._cut_into(whole, None)
        few = Kernel(self._recipe, *self._sample(verdicts), is_flat=False)
        order = list(Granularity)
        for found in order[max(order.index(self._derived(few)), order.index(finest)) :]:
            made = cut.make(self.tree, found, verdicts)
            try:
                return made, self._cut_into(made, few)
            except kernel.UnfitError as exc:
                _log.info("%s is not cut into %ss: %s", self.spec.name, found, exc)
        raise AssertionError("a whole tree always fits")

    def _sample(self, verdicts: Sequence[Hashable]) -> tuple[list[int], list[trees.LeafSpec]]:
        """Leaves that show how all are treated: rules look at verdicts, element types, ranks and lengths of sides."""
        alike: dict[Hashable, list[int]] = {}
        for index, leaf in enumerate(self.tree.leaves):
            alike.setdefault((verdicts[index], leaf.dtype, len(leaf.shape)), []).append(index)
        chosen: set[int] = set()
        for members in alike.values():
            members.sort(key=lambda index: sorted(self.tree.leaves[index].shape)[-2:])
            chosen |= {members[0], members[-1]}
        positions = sorted(chosen)
        return positions, [self.tree.leaves[index] for index in positions]

    def _derived(self, few: Kernel) -> Granularity:
        if any(
            parameter.takes == "seed"
            for _, found in specs.places(self.spec)
            if isinstance(found, specs.Spec)
            for parameter in build.CATALOGUE[found.name].parameters
        ):
            return Granularity.TREE
        found = few.granularity()
        if found is Granularity.ELEMENT and not build.is_elementwise(self.spec):
            return Granularity.TENSOR
        return found

    def _cut_into(self, made: cut.Cut, few: Kernel | None) -> dict[tuple[int, int], Kernel]:
        """The kernels of a cut, their updates compiled; raises UnfitError."""
        if made.granularity is Granularity.TREE and len(self.tree.leaves) > TREE_LEAVES_MAX:
            raise _over("leaves_max", len(self.tree.leaves), TREE_LEAVES_MAX, ", as its leaves are updated together")
        many = len(made.kinds) > _TENSORS_MAX and len(self.tree.leaves) <= TREE_LEAVES_MAX
        if made.granularity is Granularity.TENSOR and many:
            raise kernel.UnfitError(f"{len(made.kinds)} kinds of tensors")
        kernels: dict[tuple[int, int], Kernel] = {}
        for span in made.spans:
            for size in _sizes(made, span):
                if (span.kind, size) not in kernels:
                    kernels[span.kind, size] = self._kernel(made, span, size)
        if few is not None and made.granularity is not Granularity.TREE:
            self._check_names(made, kernels, few)
        held = sum(_span_bytes(kernels, span, _block_sizes(made, span)) for span in made.spans)
        if held > self._state_bytes_max:  # before the compiler is asked for as much
            raise _over("state_bytes_max", held, self._state_bytes_max)
        is_many = made.granularity is not Granularity.TREE
        for each in kernels.values():
            each.prepare(Variant(), is_one_of_many=is_many)
        if len({len(each.step(Variant()).partials) for each in kernels.values()}) > 1:
            raise kernel.UnfitError("kinds of leaves take another number of sums")
        return kernels

    def _kernel(self, made: cut.Cut, span: cut.Span, size: int) -> Kernel:
        leaves = [self.tree.leaves[index] for index in span.leaves]
        if not made.is_flat:
            return Kernel(self._recipe, span.leaves, leaves, is_flat=False)
        block = trees.LeafSpec(leaves[0].name, (size,), leaves[0].dtype)
        return Kernel(self._recipe, span.leaves[:1], [block], is_flat=True)

    def _check_names(self, made: cut.Cut, kernels: dict[tuple[int, int], Kernel], few: Kernel) -> None:
        """Raises UnfitError where the arrays of single leaves are not, by name, those of several together."""
        kinds = {leaf: span for span in made.spans for leaf in span.leaves}
        named = few.names([self.tree.leaves[leaf].name for leaf in few.positions])
        together = {(name, array.shape) for name, array in zip(named, few.arrays, strict=True)}
        alone: set[tuple[str, tuple[int, ...]]] = set()
        for leaf in few.positions:
            span = kinds[leaf]
            each = kernels[span.kind, span.blocks[0].parts[0].size if made.is_flat else 0]
            for name, array in zip(each.templates, each.arrays, strict=True):
                shape = self.tree.leaves[leaf].shape if made.is_flat and array.shape else array.shape
                alone.add((_filled(name, self.tree.leaves[leaf].name), shape))
        if together != alone:
            raise kernel.UnfitError(f"arrays of single leaves have other names: {sorted(together ^ alone)[:4]}")


def _sizes(made: cut.Cut, span: cut.Span) -> list[int]:
    """The sizes of a span's flat blocks, also after it is split; 0 where blocks are not flat."""
    sizes = set(_block_sizes(made, span))
    return sorted(sizes | {cut.SMALL} if cut.BLOCK in sizes else sizes)


def _block_sizes(made: cut.Cut, span: cut.Span) -> list[int]:
    """The sizes of a span's blocks; 0 where blocks are not flat."""
    return [block.parts[0].size for block in span.blocks] if made.is_flat else [0]


def _span_bytes(kernels: Mapping[tuple[int, int], Kernel], span: cut.Span, sizes: Sequence[int]) -> int:
    of = [kernels[span.kind, size] for size in sizes]
    return sum(each.own_bytes for each in of) + of[0].common_bytes


def _verdicts(spec: specs.Spec, names: tuple[str, ...]) -> Sequence[Hashable]:
    """What masks, groups and positions of a checked spec say of each leaf."""
    columns: list[Sequence[Hashable]] = []
    for path, value, takes in checks.by_takes(spec, build.CATALOGUE):
        if takes == "mask" and not isinstance(value, bool):
            columns.append(patterns.mask(value, names, path))
        elif takes == "groups":
            columns.append(patterns.groups(tuple(pattern for pattern, _ in value), names, path))
        elif takes == "positions":
            columns.append(value.numbers)
    return list(zip(*columns, strict=True)) if columns else [()] * len(names)


def _filled(template: str, leaf: str | None) -> str:
    """A name for a leaf; that of a tree which is a single array is empty."""
    return template.replace(LEAF, leaf) if leaf else template.replace(f"/{LEAF}", "")


def _inside_accumulation(spec: specs.Spec) -> bool:
    """Whether what is not finite is skipped inside an accumulation, and not push by push."""
    places = specs.places(spec)
    skips = (path for path, value in places if isinstance(value, specs.Spec) and value.name == "on_nonfinite")
    return any("accumulate.optimizer" in path for path in skips)


def _over(what: str, count: int, most: int, why: str = "") -> errors.LimitError:
    return errors.LimitError(
        f"{what}: {count}, expected at most {most}{why}", subject=what, expected=f"at most {most}", got=str(count)
    )
