"""Whether an optimizer can serve a tree: element types, patterns, and what no argument shows alone."""

from __future__ import annotations

from optwire_proto import checks, errors, specs, tensors, trees
from optwire_server.engine import build

# Linear in the gradients, up to a real factor, or taking numbers apart: the same for complex numbers.
_COMPLEX = ("sgd", "momentum", "nesterov", "clip_grads", "clip_by_global_norm", "split_real_and_imaginary")
# What gives its inside but a part of the parameters, and how paths lead there.
_PARTS = {"per_leaf": "per_leaf.optimizer", "grouped": "grouped.optimizers[", "a partition": "partition.transforms["}
_FLOATING = ("f32", "f64", "bf16", "f16")


def check(spec: specs.Spec, tree: trees.TreeSpec) -> None:
    """Raises TreeError where an optimizer is not defined for a leaf's element type, SpecError for masks and groups."""
    for position, leaf in enumerate(tree.leaves):
        own = _serving(spec, position)
        optimizer = checks.core(own).name
        served = (*_FLOATING, "c64", "c128") if _takes_complex(own) else _FLOATING
        if leaf.dtype not in served:
            where = f"params[{leaf.name!r}]" if leaf.name else "params"
            raise errors.TreeError(
                f"{where}: {optimizer} is not defined for element type {leaf.dtype}; "
                f"expected one of {', '.join(served)}",
                subject=leaf.name,
                expected=", ".join(served),
                got=leaf.dtype,
            )
    checks.check_names(spec, tuple(leaf.name for leaf in tree.leaves), build.CATALOGUE)
    _check_decay(spec, tree)
    _check_parts(spec)
    _check_accumulation(spec)
    _check_policy(spec)
    _check_lookahead(spec)


def _serving(spec: specs.Spec, position: int) -> specs.Spec:
    """The optimizer that a leaf gets, where leaves have several by position; otherwise that of all."""
    if spec.name != "grouped" or position >= len(spec["of"].numbers):
        return spec
    found: specs.Spec = spec["optimizers"][spec["of"].numbers[position]]
    return found


def _takes_complex(spec: specs.Spec) -> bool:
    """Whether every stage means the same for complex numbers."""
    if spec.name == "chain":
        return all(map(_takes_complex, spec["members"]))
    if spec.name == "partition":
        return all(_takes_complex(member) for _, member in spec["transforms"])
    if spec.name == "grouped":
        return all(map(_takes_complex, spec["optimizers"]))
    if spec.name in ("accumulate", "ema_params", "on_nonfinite", "per_leaf"):
        return _takes_complex(spec["optimizer"])
    # Torch's take complex numbers for pairs of real ones.
    return spec.name in _COMPLEX or spec.name.startswith("torch_")


def _check_lookahead(spec: specs.Spec) -> None:
    """Raises SpecError where lookahead surrounds what needs the loss, since optax's does not hand it on."""
    for path, found in specs.places(spec):
        if isinstance(found, specs.Spec) and found.name == "lookahead" and checks.extras(found, build.CATALOGUE):
            subject = f"{path}.lookahead.fast_optimizer" if path else "lookahead.fast_optimizer"
            raise specs.wrong(subject, "an optimizer that needs gradients alone", found["fast_optimizer"])


def _check_decay(spec: specs.Spec, tree: trees.TreeSpec) -> None:
    """Raises SpecError where Adam's second moment would be corrected by one minus one: its parameters never move."""
    if specs.any_inside(spec, lambda found: found.name == "master_weights"):
        return
    for path, found in specs.places(spec):
        if not isinstance(found, specs.Spec) or found.name != "adam":
            continue
        inside = f"{path}.adam" if path else "adam"
        for leaf in tree.leaves:
            if tensors.numpy_dtype(leaf.dtype).type(found["b2"]) == 1:
                raise errors.SpecError(
                    f"{inside}.b2: {found['b2']} rounds to 1 in {leaf.dtype}, the type of params[{leaf.name!r}], and "
                    "no step would change it; use a smaller b2, such as 0.99, float32 parameters, or master_weights",
                    subject=f"{inside}.b2",
                    expected=f"a number below 1 in {leaf.dtype}",
                    got=str(found["b2"]),
                )


def _in_part(path: str) -> str:
    """What a path leads through that gets but a part of the parameters; nothing: it gets all of them."""
    return next((what for what, step in _PARTS.items() if step in path), "")


def _check_parts(spec: specs.Spec) -> None:
    """Raises SpecError where what tells leaves apart gets but some of them."""
    for path, found in specs.places(spec):
        if not isinstance(found, specs.Spec):
            continue
        part = _in_part(path)
        if (found.name == "grouped" and part) or (found.name in ("partition", "per_leaf") and part == "per_leaf"):
            raise errors.SpecError(
                f"{path}: {found.name} inside {part}, which gives it but a part of the parameters; put it around",
                subject=path,
                expected=f"{found.name} around all parameters",
                got=f"{found.name} inside {part}",
            )


def _check_accumulation(spec: specs.Spec) -> None:
    """Raises SpecError unless there is at most one accumulate, and all leaves are in it: a push closes one step."""
    found = [path for path, value in specs.places(spec) if isinstance(value, specs.Spec) and value.name == "accumulate"]
    inside = [path for path in found if _in_part(path)]
    if len(found) > 1 or inside:
        path = (inside or found[1:])[0]
        raise errors.SpecError(
            f"{path}: accumulate inside {_in_part(path) or 'another accumulate'}; one accumulate around all "
            "parameters is served",
            subject=path,
            expected="one accumulate around all parameters",
            got=f"{len(found)}",
        )


def _check_policy(spec: specs.Spec) -> None:
    """Raises SpecError where a policy for what is not finite could not be kept, or its count would mean nothing."""
    found = [
        (path, value["policy"])
        for path, value in specs.places(spec)
        if isinstance(value, specs.Spec) and value.name == "on_nonfinite"
    ]
    skips = [path for path, policy in found if policy == "skip"]
    problem = ""
    for path, policy in found:
        if policy == "reject" and "accumulate.optimizer" in path:
            problem = "'reject' inside accumulate, which has taken all pushes but one by then"
        elif policy != "zero" and any(
            other not in ("zero", policy) and path.startswith(f"{outer}.on_nonfinite." if outer else "on_nonfinite.")
            for outer, other in found
        ):
            problem = "another policy around it"
        elif policy == "skip" and (_in_part(path) or path != skips[0]):
            problem = "'skip' for a part of the parameters, or twice; a push is skipped as a whole"
        if problem:
            raise errors.SpecError(
                f"{path}: on_nonfinite with {problem}; put one on_nonfinite around everything",
                subject=path,
                expected="on_nonfinite around everything",
                got=policy,
            )
