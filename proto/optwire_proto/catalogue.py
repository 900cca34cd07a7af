"""The catalogue: every constructor that a spec may name, with its parameters. Standard library only.

The seed's names are the seed's, what surrounds the update is ours, and the rest is optax's, from the signatures of the
installed optax: clients use the copy in ``optax_entries`` (``make catalogue``), a server reads them anew.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Final

from optwire_proto.entries import Entry, Parameter
from optwire_proto.optax_entries import ENTRIES as OPTAX_ENTRIES

_RATE = Parameter("step_size", "rate:nonnegative")
_INNER = Parameter("optimizer", "optimizer")

# Names, parameters and defaults are those of jax.example_libraries.optimizers; tests hold them to it.
SEED: Final = (
    Entry("sgd", "optimizer", (_RATE,), "Stochastic gradient descent."),
    Entry("momentum", "optimizer", (_RATE, Parameter("mass", "number")), "Heavy-ball momentum."),
    Entry("nesterov", "optimizer", (_RATE, Parameter("mass", "number")), "Nesterov's accelerated gradient."),
    Entry(
        "adagrad",
        "optimizer",
        (_RATE, Parameter("momentum", "number", 0.9)),
        "Adagrad with momentum: rates shrink with the squared gradients seen.",
    ),
    Entry(
        "rmsprop",
        "optimizer",
        (_RATE, Parameter("gamma", "number", 0.9), Parameter("eps", "positive", 1e-8)),
        "RMSProp: gradients divided by a running root mean square.",
    ),
    Entry(
        "rmsprop_momentum",
        "optimizer",
        (
            _RATE,
            Parameter("gamma", "number", 0.9),
            Parameter("eps", "positive", 1e-8),
            Parameter("momentum", "number", 0.9),
        ),
        "RMSProp with momentum.",
    ),
    Entry(
        "adam",
        "optimizer",
        (_RATE, Parameter("b1", "decay", 0.9), Parameter("b2", "decay", 0.999), Parameter("eps", "positive", 1e-8)),
        "Adam: running means of gradients and squared gradients, corrected for their start.",
    ),
    Entry(
        "adamax",
        "optimizer",
        (_RATE, Parameter("b1", "decay", 0.9), Parameter("b2", "decay", 0.999), Parameter("eps", "positive", 1e-8)),
        "Adamax: Adam with the infinity norm.",
    ),
    Entry(
        "sm3",
        "optimizer",
        (_RATE, Parameter("momentum", "number", 0.9)),
        "SM3: second moments kept per row and column only.",
    ),
    Entry("constant", "schedule", (Parameter("step_size", "number"),), "The same learning rate at every step."),
    Entry(
        "exponential_decay",
        "schedule",
        # A negative rate has no real power between whole multiples of decay_steps.
        (Parameter("step_size", "number"), Parameter("decay_steps", "positive"), Parameter("decay_rate", "positive")),
        "step_size * decay_rate ** (step / decay_steps).",
    ),
    Entry(
        "inverse_time_decay",
        "schedule",
        (
            Parameter("step_size", "number"),
            Parameter("decay_steps", "positive"),
            Parameter("decay_rate", "number"),
            Parameter("staircase", "flag", False),
        ),
        "step_size / (1 + decay_rate * step / decay_steps).",
    ),
    Entry(
        "polynomial_decay",
        "schedule",
        (
            Parameter("step_size", "number"),
            Parameter("decay_steps", "positive"),
            Parameter("final_step_size", "number"),
            Parameter("power", "number", 1.0),
        ),
        "From step_size to final_step_size over decay_steps, along a power.",
    ),
    Entry(
        "piecewise_constant",
        "schedule",
        (Parameter("boundaries", "numbers"), Parameter("values", "numbers")),
        "One value before, between and after the boundaries (in steps).",
    ),
    Entry(
        "clip_grads",
        "transformation",
        (Parameter("max_norm", "positive"),),
        "Scales all gradients so that their joint L2 norm is at most max_norm.",
    ),
)

# What surrounds the update, and what neither the seed nor optax has.
AROUND: Final = (
    Entry(
        "chain",
        "transformation",
        (Parameter("members", "specs", variadic=True),),
        "Members in order, each on the updates of the one before; an optimizer of the seed can only be the last.",
    ),
    Entry(
        "partition",
        "transformation",
        (Parameter("transforms", "groups"),),
        "An optimizer for each group of parameters: {name pattern: optimizer}, the first pattern that fits decides.",
    ),
    Entry(
        "accumulate",
        "wrapper",
        (_INNER, Parameter("k", "count")),
        "One update of the optimizer for every k pushes, with the mean of their gradients.",
    ),
    Entry(
        "on_nonfinite",
        "wrapper",
        (_INNER, Parameter("policy", "text", "reject", choices=("reject", "skip", "zero"))),
        "What becomes of a push that is not finite, or would make the state so: refused, skipped, or zeroed.",
    ),
    Entry(
        "ema_params",
        "wrapper",
        (_INNER, Parameter("decay", "decay", 0.999), Parameter("debias", "flag", False)),
        'Keeps a moving average of the parameters beside them, to be read as which="ema".',
    ),
    Entry(
        "master_weights",
        "wrapper",
        (_INNER, Parameter("dtype", "dtype", "float32")),
        "Keeps the parameters, and computes, in a wider type than the one that travels.",
    ),
    Entry(
        "clip_by_leaf_norm",
        "transformation",
        (Parameter("max_norm", "positive"),),
        "Scales the gradient of each leaf so that its L2 norm is at most max_norm.",
    ),
    Entry(
        "table",
        "schedule",
        (Parameter("values", "array"),),
        "One value for each step, from an array; the last one goes on.",
    ),
    Entry(
        "exported",
        "optimizer",
        (Parameter("update", "blob"), Parameter("learning_rate", "rate:nonnegative", 1.0)),
        "An update function exported with jax.export, where the server's operator allows programs.",
    ),
)

OURS: Final[Mapping[str, Entry]] = {entry.name: entry for entry in (*SEED, *AROUND)}
# Names of the hyperparameter that everyone calls the learning rate.
RATES: Final = ("learning_rate", "step_size", "step_size_fn", "max_learning_rate")


def merged(optax_entries: Iterable[Entry]) -> Mapping[str, Entry]:
    """The whole catalogue with optax's entries in it."""
    return {**OURS, **{entry.name: entry for entry in optax_entries}}


CATALOGUE: Final[Mapping[str, Entry]] = merged(OPTAX_ENTRIES)


# What other libraries call an argument.
_ALSO_KNOWN_AS: Final = {"lr": ("learning_rate", "step_size"), "wd": ("weight_decay",), "betas": ("b1",)}


def suggestion(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'adamw'?)`` where a name is close to a known one, otherwise nothing."""
    known = list(known)
    for other in _ALSO_KNOWN_AS.get(name, ()):
        if other in known:
            return f" (did you mean {other!r}?)"
    if name.lower() in known:
        return f" (did you mean {name.lower()!r}?)"
    close = difflib.get_close_matches(name[:80], known, 1, 0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
