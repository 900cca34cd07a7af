"""Optax's public signatures as entries of the catalogue: names, order and defaults are those of the installed optax.

``python -m optwire_server.engine.signatures`` prints ``optwire_proto/optax_entries.py``, the copy that clients use.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final

import jax.numpy as jnp
import optax
import optax.contrib

from optwire_proto import catalogue
from optwire_proto.entries import REQUIRED, Entry, Parameter

_NEEDS_FUNCTION: Final = "it takes a function, and no code crosses the wire"
_NEEDS_LOSS_FUNCTION: Final = "it evaluates the loss function during the update, and only the client has that"

# Why a public name of optax is not served.
REFUSALS: Final[Mapping[str, str]] = {
    "chain": "chain is optwire's own; it takes the same members",
    "partition": "partition is optwire's own; it takes ordered name patterns instead of labels",
    "multi_transform": "it is optax's older name for partition, which takes ordered name patterns here",
    "conditionally_mask": _NEEDS_FUNCTION + "; on_nonfinite covers its common use",
    "conditionally_transform": _NEEDS_FUNCTION + "; on_nonfinite covers its common use",
    "differentially_private_aggregate": "it needs the gradients of every example, and a push carries their mean",
    "dpsgd": "it needs the gradients of every example, and a push carries their mean",
    "hutchinson_estimator_diag_hessian": _NEEDS_LOSS_FUNCTION,
    "inject_hyperparams": "every hyperparameter is live already: set_hyperparams changes it",
    "inject_stateful_hyperparams": "every hyperparameter is live already: set_hyperparams changes it",
    "measure_with_ema": _NEEDS_FUNCTION + "; step(..., telemetry=True) reports norms",
    "monitor": _NEEDS_FUNCTION + "; step(..., telemetry=True) reports norms",
    "sam": "a sharpness-aware step needs gradients at a second point; push those of the perturbed parameters instead",
    "scale_by_backtracking_linesearch": _NEEDS_LOSS_FUNCTION,
    "scale_by_muon": "its weight_dimension_numbers take a function; muon treats every matrix so",
    "scale_by_zoom_linesearch": _NEEDS_LOSS_FUNCTION,
    "snapshot": _NEEDS_FUNCTION + "; step(..., telemetry=True) reports norms",
    "sophia": _NEEDS_LOSS_FUNCTION,
    "stateless": _NEEDS_FUNCTION,
    "stateless_with_tree_map": _NEEDS_FUNCTION,
    "with_extra_args_support": "it changes nothing that could be seen from outside",
    "MultiSteps": "a class; accumulate(optimizer, k) does what it does",
}
# Entries whose update wants the loss of the batch, which optax calls `value`.
_WANT_LOSS: Final = frozenset({"momo", "momo_adam", "polyak_sgd", "reduce_on_plateau", "scale_by_polyak"})
# Public makers of transformations that say so in no annotation.
_UNANNOTATED: Final = frozenset(
    {"dog", "dowg", "hutchinson_estimator_diag_hessian", "monitor", "scale_by_factored_rms", "MultiSteps"}
)

# What a number may be, where its name says more than its annotation.
_BY_NAME: Final[Mapping[str, str]] = {
    **dict.fromkeys(("b1", "b2", "b3", "beta3", "decay", "rho", "adam_b1", "adam_b2"), "fraction"),
    **dict.fromkeys(("max_norm", "max_delta", "threshold", "clipping", "clipping_threshold"), "positive"),
    **dict.fromkeys(("eps", "eps_root", "epsilon", "eta", "min_norm", "weight_decay"), "nonnegative"),
    **dict.fromkeys(("k", "sync_period", "accumulation_size"), "count"),
    # Each of these is unrolled in the compiled update, or makes as many slots.
    **dict.fromkeys(("ns_steps", "num_betas", "memory_size"), "few"),
    **dict.fromkeys(("pct_start", "pct_final"), "fraction"),
    **dict.fromkeys(("div_factor", "final_div_factor"), "positive"),
    **dict.fromkeys(("max_consecutive_errors", "decay_steps", "transition_steps"), "count"),
    **dict.fromkeys(
        ("warmup_steps", "transition_begin", "decay_offset", "step_offset", "patience", "cooldown"), "index"
    ),
    **dict.fromkeys(("learning_rate", "max_learning_rate", "peak_value"), "nonnegative"),
}
# What is none of the kinds that annotations tell apart.
_SPECIAL: Final[Mapping[tuple[str, str], str]] = {
    ("adaptive_grad_clip", "axis"): "axes",
    ("dog", "init_step"): "tagged",
    ("lbfgs", "linesearch"): "nothing",
    ("muon", "ns_coeffs"): "numbers",
    ("named_chain", "args"): "named",
    ("piecewise_constant_schedule", "boundaries_and_scales"): "pairs",
    ("piecewise_interpolate_schedule", "boundaries_and_scales"): "pairs",
    ("sgdr_schedule", "cosine_kwargs"): "mappings",
    ("scale_by_distance_over_gradients", "reps_rel"): "number",
    ("scale_by_distance_over_gradients", "eps"): "nonnegative",
    ("scale_by_distance_over_gradients", "global_scale"): "number",
}
_CHOICES: Final[Mapping[tuple[str, str], tuple[str, ...]]] = {
    ("piecewise_interpolate_schedule", "interpolate_type"): ("linear", "cosine"),
    ("polyak_sgd", "variant"): ("sps", "sps+"),
    ("scale_by_polyak", "variant"): ("sps", "sps+"),
}


def entries() -> Mapping[str, Entry]:
    """Every optimizer, transformation and schedule that optax and optax.contrib export, by its name in specs."""
    found: dict[str, Entry] = {}
    for module, origin in ((optax, "optax"), (optax.contrib, "optax.contrib")):
        for name, maker in sorted(vars(module).items()):
            if not name.startswith("_") and _makes(name, maker):
                entry = _entry(name, maker, origin)
                found.setdefault(entry.name, entry)
    return found


def _makes(name: str, maker: Any) -> bool:
    """Whether a public name makes transformations or schedules."""
    if name in _UNANNOTATED:
        return True
    if not inspect.isfunction(maker) and not isinstance(maker, functools.partial):  # nadam is a partial of adam
        return False
    makes = str(inspect.signature(maker).return_annotation)
    return "GradientTransformation" in makes or _is_schedule(name)


def _entry(name: str, maker: Any, origin: str) -> Entry:
    refusal = REFUSALS.get(name, "")
    signature = inspect.signature(maker)
    taken = name in catalogue.OURS and not refusal
    return Entry(
        name=f"optax.{name}" if taken or name in ("chain", "partition") else name,
        kind=_kind(name, signature),
        parameters=() if refusal else tuple(_parameters(name, signature)),
        summary=_summary(maker),
        origin=origin,
        refusal=refusal,
        extras=("loss",) if name in _WANT_LOSS else (),
    )


def _kind(name: str, signature: inspect.Signature) -> str:
    if _is_schedule(name):
        return "schedule"
    wraps = any(_is_transformation(parameter) for parameter in signature.parameters.values())
    if wraps and not (name.startswith("scale_by_") or {"args", "linesearch"} & set(signature.parameters)):
        return "wrapper" if "learning_rate" not in signature.parameters or name == "schedule_free" else "optimizer"
    rated = {"learning_rate", "max_learning_rate"} & set(signature.parameters)
    return "optimizer" if rated and not name.startswith("scale_by_") else "transformation"


def _is_schedule(name: str) -> bool:
    named_so = name.endswith("_schedule") and name != "scale_by_schedule"
    return named_so or name in ("exponential_decay", "join_schedules")


def _summary(maker: Any) -> str:
    lines = (inspect.getdoc(maker) or "").strip().splitlines() or [""]
    first = re.sub(r":\w+:`[~.]*([^`]*)`", r"\1", lines[0]).replace("`", "").strip()
    return first[:110].rstrip(".") + "."


def _parameters(name: str, signature: inspect.Signature) -> Iterator[Parameter]:
    for parameter in signature.parameters.values():
        takes = _takes(name, parameter)
        if takes is None:
            continue  # a function with a default, or what has no effect here
        yield Parameter(
            name=parameter.name,
            takes=takes,
            default=_default(parameter, takes),
            none=parameter.default is None or "NoneType" in str(parameter.annotation),
            # What must be given as None has optax's place, behind parameters with defaults, only by name.
            keyword_only=parameter.kind is parameter.KEYWORD_ONLY or takes == "nothing",
            variadic=parameter.kind is parameter.VAR_POSITIONAL,
            choices=_choices(name, parameter),
        )


def _takes(name: str, parameter: inspect.Parameter) -> str | None:
    """What a parameter takes, in a word of ``checks``; None where it cannot be given at all."""
    annotation, own = str(parameter.annotation), parameter.name
    if (name, own) in _SPECIAL:
        return _SPECIAL[name, own]
    if own in ("key", "seed"):
        return "seed"
    if own in ("verbose", "mask_compatible_extra_args") or own.endswith("_dimension_numbers") or own == "decay_rate_fn":
        return None
    if _choices(name, parameter):
        return "text"
    if own == "boundaries":
        return "numbers"
    if own.startswith("betas"):
        return "numbers"
    if _is_transformation(parameter):
        return "specs" if parameter.kind is parameter.VAR_POSITIONAL else "spec"
    if "mask" in own:
        return "mask"
    if "dtype" in own:
        return "dtype"
    if "Sequence[" in annotation and "Callable" in annotation:
        return "schedules"
    if own == "step_size_fn":
        return "schedule"
    if annotation == "<class 'bool'>":
        return "flag"
    if "Callable" in annotation and "float" not in annotation:
        return None
    number = _BY_NAME.get(own, "index" if annotation == "<class 'int'>" or "Optional[int]" in annotation else "number")
    return f"rate:{number}" if "Callable" in annotation else number


def _is_transformation(parameter: inspect.Parameter) -> bool:
    return "GradientTransformation" in str(parameter.annotation)


def _choices(name: str, parameter: inspect.Parameter) -> tuple[str, ...]:
    literal = re.search(r"^typing\.Literal\[(.*)\]$", str(parameter.annotation))
    return tuple(re.findall(r"'(\w+)'", literal[1])) if literal else _CHOICES.get((name, parameter.name), ())


def _default(parameter: inspect.Parameter, takes: str) -> Any:
    value = parameter.default
    if parameter.kind is parameter.VAR_POSITIONAL or value is parameter.empty or takes == "nothing":
        return REQUIRED
    if takes == "dtype" and value is not None:
        return str(jnp.dtype(value))
    if isinstance(value, tuple):
        return tuple(value)
    assert value is None or isinstance(value, bool | int | float | str), (parameter, value)
    return value


def _printed(found: Mapping[str, Entry]) -> Iterator[str]:
    yield '"""Optax\'s optimizers, transformations and schedules, as the optax named below exports them. Generated."""'
    yield ""
    yield "# Printed by `make catalogue`; never edited by hand."
    yield "from optwire_proto.entries import REQUIRED, Entry, Parameter"
    yield ""
    yield f"OPTAX_VERSION = {optax.__version__!r}"
    yield ""
    yield "ENTRIES = ("
    for entry in found.values():
        yield f"    Entry({entry.name!r}, {entry.kind!r}, ("
        for parameter in entry.parameters:
            yield f"        {_parameter_text(parameter)},"
        rest = "".join(f", {name}={getattr(entry, name)!r}" for name in ("refusal", "extras") if getattr(entry, name))
        yield f"    ), {entry.summary!r}, {entry.origin!r}{rest}),"
    yield ")"


def _parameter_text(parameter: Parameter) -> str:
    blank = Parameter("", "")
    rest = ""
    for name in ("default", "none", "keyword_only", "variadic", "choices"):
        value = getattr(parameter, name)
        if value is not getattr(blank, name) and (name == "default" or value):
            rest += f", {name}={value!r}"
    return f"Parameter({parameter.name!r}, {parameter.takes!r}{rest})"


if __name__ == "__main__":
    sys.stdout.write("\n".join(_printed(entries())) + "\n")
