"""The catalogue: every constructor that a spec may name, with its parameters. Standard library only.

The seed's names are the seed's, what surrounds the update is ours, ``torch_*`` are torch's optimizers by torch's names,
outer optimizers are their papers', and the rest is optax's, from the signatures of the installed optax: clients use the
copy in ``optax_entries`` (``make catalogue``), a server reads them anew.
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
        "per_leaf",
        "wrapper",
        (_INNER,),
        "One optimizer of its own for each leaf: a push may leave gradients out, and what they belong to stays.",
    ),
    Entry(
        "grouped",
        "transformation",
        (Parameter("of", "positions"), Parameter("optimizers", "specs", variadic=True)),
        "An optimizer for each group of parameters: `of` says for every leaf, in order, which one.",
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

_LR = "rate:nonnegative"
_BETAS = (Parameter("beta1", "operand:decay", 0.9), Parameter("beta2", "operand:decay", 0.999))
_MAXIMIZE = Parameter("maximize", "flag", False, keyword_only=True)
_AMSGRAD = Parameter("amsgrad", "flag", False)


def _operand(name: str, default: float, number: str = "nonnegative") -> Parameter:
    return Parameter(name, f"operand:{number}", default)


def _decoupled(*, keyword_only: bool) -> Parameter:
    return Parameter("decoupled_weight_decay", "flag", False, keyword_only=keyword_only)


# Names, parameters and defaults are those of torch.optim, its pairs taken apart; tests hold them to it. Numbers are
# operands of the compiled update.
TORCH: Final = (
    Entry(
        "torch_sgd",
        "optimizer",
        (
            Parameter("learning_rate", _LR, 0.001),
            _operand("momentum", 0.0),
            _operand("dampening", 0.0, "number"),
            _operand("weight_decay", 0.0),
            Parameter("nesterov", "flag", False),
            _MAXIMIZE,
        ),
        "torch.optim.SGD: gradient descent, with momentum where it is not 0.",
    ),
    Entry(
        "torch_adam",
        "optimizer",
        (
            Parameter("learning_rate", _LR, 0.001),
            *_BETAS,
            _operand("eps", 1e-8),
            _operand("weight_decay", 0.0),
            _AMSGRAD,
            _MAXIMIZE,
            _decoupled(keyword_only=True),
        ),
        "torch.optim.Adam, whose weight decay is added to the gradient.",
    ),
    Entry(
        "torch_adamw",
        "optimizer",
        (
            Parameter("learning_rate", _LR, 0.001),
            *_BETAS,
            _operand("eps", 1e-8),
            _operand("weight_decay", 0.01),
            _AMSGRAD,
            _MAXIMIZE,
        ),
        "torch.optim.AdamW, whose weight decay shrinks the parameters by themselves.",
    ),
    Entry(
        "torch_nadam",
        "optimizer",
        (
            Parameter("learning_rate", _LR, 0.002),
            *_BETAS,
            _operand("eps", 1e-8),
            _operand("weight_decay", 0.0),
            _operand("momentum_decay", 0.004),
            _decoupled(keyword_only=False),
            _MAXIMIZE,
        ),
        "torch.optim.NAdam: Adam with Nesterov's momentum, which grows from step to step.",
    ),
    Entry(
        "torch_radam",
        "optimizer",
        (
            Parameter("learning_rate", _LR, 0.001),
            *_BETAS,
            _operand("eps", 1e-8),
            _operand("weight_decay", 0.0),
            _decoupled(keyword_only=False),
            _MAXIMIZE,
        ),
        "torch.optim.RAdam: Adam that is rectified while its second moment has seen little.",
    ),
    Entry(
        "torch_adamax",
        "optimizer",
        (
            Parameter("learning_rate", _LR, 0.002),
            *_BETAS,
            _operand("eps", 1e-8),
            _operand("weight_decay", 0.0),
            _MAXIMIZE,
        ),
        "torch.optim.Adamax: Adam with the infinity norm.",
    ),
    Entry(
        "torch_adadelta",
        "optimizer",
        (
            Parameter("learning_rate", _LR, 1.0),
            _operand("rho", 0.9, "fraction"),
            _operand("eps", 1e-6),
            _operand("weight_decay", 0.0),
            _MAXIMIZE,
        ),
        "torch.optim.Adadelta: steps as long as the ones before them.",
    ),
    Entry(
        "torch_adagrad",
        "optimizer",
        (
            Parameter("learning_rate", _LR, 0.01),
            _operand("lr_decay", 0.0),
            _operand("weight_decay", 0.0),
            _operand("initial_accumulator_value", 0.0),
            _operand("eps", 1e-10),
            _MAXIMIZE,
        ),
        "torch.optim.Adagrad: rates shrink with the squared gradients seen.",
    ),
    Entry(
        "torch_rmsprop",
        "optimizer",
        (
            Parameter("learning_rate", _LR, 0.01),
            _operand("alpha", 0.99),
            _operand("eps", 1e-8),
            _operand("weight_decay", 0.0),
            _operand("momentum", 0.0),
            Parameter("centered", "flag", False),
            _MAXIMIZE,
        ),
        "torch.optim.RMSprop: gradients divided by a running root mean square, or deviation.",
    ),
    Entry(
        "torch_rprop",
        "optimizer",
        (
            Parameter("learning_rate", _LR, 0.01),
            _operand("eta_minus", 0.5, "positive"),
            _operand("eta_plus", 1.2, "positive"),
            _operand("step_min", 1e-6),
            _operand("step_max", 50.0),
            _MAXIMIZE,
        ),
        "torch.optim.Rprop: steps by the gradient's sign, longer while it stays the same.",
    ),
    Entry(
        "torch_asgd",
        "optimizer",
        (
            Parameter("learning_rate", _LR, 0.01),
            _operand("lambd", 0.0001, "number"),
            _operand("alpha", 0.75, "number"),
            _operand("t0", 1e6, "number"),
            _operand("weight_decay", 0.0),
            _MAXIMIZE,
        ),
        "torch.optim.ASGD: gradient descent that keeps the average of its parameters.",
    ),
)

_LR_OUTER = Parameter("learning_rate", _LR)
_FEDOPT = (_operand("tau", 1e-3, "positive"), _operand("initial_accumulator_value", 0.0))

# Outer optimizers: of pseudo-gradients, which say how far workers went by themselves. Numbers are operands here, too.
OUTER: Final = (
    Entry(
        "fedavgm",
        "optimizer",
        (Parameter("learning_rate", _LR, 1.0), _operand("momentum", 0.9)),
        "FedAvgM: momentum on pseudo-gradients.",
    ),
    Entry(
        "fedadagrad",
        "optimizer",
        (_LR_OUTER, Parameter("beta1", "operand:decay", 0.0), *_FEDOPT),
        "FedAdagrad: rates shrink with the squared pseudo-gradients seen.",
    ),
    Entry(
        "fedadam",
        "optimizer",
        (_LR_OUTER, Parameter("beta1", "operand:decay", 0.9), Parameter("beta2", "operand:decay", 0.99), *_FEDOPT),
        "FedAdam: Adam on pseudo-gradients, whose moments are not corrected for their start.",
    ),
    Entry(
        "fedyogi",
        "optimizer",
        (_LR_OUTER, Parameter("beta1", "operand:decay", 0.9), Parameter("beta2", "operand:decay", 0.99), *_FEDOPT),
        "FedYogi: as FedAdam, but the second moment moves by the new square, however far away it is.",
    ),
    Entry(
        "delayed_nesterov",
        "optimizer",
        (
            Parameter("learning_rate", _LR, 0.7),
            _operand("momentum", 0.9),
            Parameter("n", "count", 4),
            _operand("c", 0.0),
        ),
        "Delayed Nesterov: of pseudo-gradients that come one by one, every n-th changes the momentum.",
    ),
)

OURS: Final[Mapping[str, Entry]] = {entry.name: entry for entry in (*SEED, *AROUND, *TORCH, *OUTER)}
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
