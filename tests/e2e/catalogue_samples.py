"""One sample of every entry of the catalogue that moves or transforms: what the server is asked for, and an oracle.

A sample of optax's is one function of a module: called with ``optwire.optax`` it makes the spec, called with ``Local``
the transformation itself, so that both get the same Python arguments. What is not optax's has its oracle written out:
the seed from ``jax.example_libraries``, accumulation from ``optax.MultiSteps``, averages from NumPy. Nothing here knows
``optwire_server``.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax import export
from jax.example_libraries import optimizers as seed

from optwire import optax as remote
from optwire import optimizers as opt

STEPS: Final = 100
DTYPES: Final = ("float32", "bfloat16")
# Steps whose gradients have a NaN in them, where a sample is about that.
NAN_STEPS: Final = (3, 4, 40)

# A matrix, a vector, convolution kernels and a scalar; and the same with the scalar as a vector of one element.
ALL: Final = {"conv": {"kernel": (3, 3, 2, 4)}, "dense": {"bias": (5,), "kernel": (6, 4)}, "scale": ()}
NO_SCALARS: Final = ALL | {"scale": (1,)}
# The masks that the patterns of samples mean, written by hand.
KERNELS: Final = {"conv": {"kernel": True}, "dense": {"bias": False, "kernel": True}, "scale": False}
GROUPS: Final = {"conv": {"kernel": "conv"}, "dense": {"bias": "rest", "kernel": "dense"}, "scale": "rest"}


class Oracle(NamedTuple):
    """An optimizer run here.

    Attributes:
      init: params -> state.
      update: (step, grads, state, loss) -> state; jitted with every argument a constant.
      params: state -> params.
      views: other parameters to compare at the end, by the name that the session has for them: state -> params.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any, Any], Any]
    params: Callable[[Any], Any]
    views: Mapping[str, Callable[[Any], Any]] = {}


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """What to try of an entry.

    Attributes:
      spec: what the server is asked for.
      oracle: makes what it is compared with.
      shapes: nest of the shapes of parameters.
      wants_loss: whether pushes bring a loss.
      has_nans: whether some gradients are not finite.
      why_no_scalars: why ``shapes`` has no scalar.
    """

    spec: opt.Spec
    oracle: Callable[[], Oracle]
    shapes: Any = dataclasses.field(default_factory=lambda: ALL)
    wants_loss: bool = False
    has_nans: bool = False
    why_no_scalars: str = ""


def sample(entry: str, dtype: str) -> Sample:
    """The sample of an entry for parameters of an element type; raises KeyError where there is none."""
    if entry == "exported":
        return _of_exported(dtype)
    if entry in _OURS:
        return _OURS[entry]()
    maker = _OPTAX[entry]
    shapes = NO_SCALARS if entry in _NO_SCALARS else ALL
    return Sample(
        maker(remote, "**/kernel"),
        lambda: of_optax(maker(Local, KERNELS), wants_loss=entry in _WANT_LOSS),
        shapes,
        wants_loss=entry in _WANT_LOSS,
        has_nans=entry in _HAVE_NANS,
        why_no_scalars=_NO_SCALARS.get(entry, ""),
    )


def entries() -> set[str]:
    """Names of the entries that have a sample."""
    return {*_OURS, *_OPTAX, "exported"}


@functools.cache
def arrays(dtype: str, *, scalars: bool = True) -> tuple[Any, tuple[Any, ...], tuple[float, ...]]:
    """Initial parameters, gradients and losses of every step; the same at every call."""
    rng = np.random.default_rng(20)
    shapes = ALL if scalars else NO_SCALARS

    def tree() -> Any:
        return jax.tree.map(
            lambda shape: np.asarray(rng.standard_normal(shape)).astype(jnp.dtype(dtype)),
            shapes,
            is_leaf=lambda node: isinstance(node, tuple),
        )

    return tree(), tuple(tree() for _ in range(STEPS)), tuple(float(1 + rng.random()) for _ in range(STEPS))


def with_nan(grads: Any) -> Any:
    """The same gradients with one NaN."""
    spoiled = jax.tree.map(np.array, grads)
    spoiled["dense"]["kernel"][2, 3] = np.nan
    return spoiled


# ------------------------------------------------------------------------------------------------------ oracles


class _Local:
    """Optax's public names, those of ``optax.contrib`` among them, called as ``optwire.optax`` is."""

    def __getattr__(self, name: str) -> Any:
        maker = getattr(optax, name) if hasattr(optax, name) else getattr(optax.contrib, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # optimistic_adam is served as long as it is there
                return maker(*args, **kwargs)

        return called


Local: Final = _Local()


def of_optax(made: Any, *, wants_loss: bool = False, views: Mapping[str, Callable[[Any], Any]] | None = None) -> Oracle:
    """The loop that optax's documentation shows. State: (params, optax's)."""

    def update(step: Any, grads: Any, state: Any, loss: Any) -> Any:
        params, inner = state
        updates, inner = made.update(grads, inner, params, **({"value": loss} if wants_loss else {}))
        moved = optax.apply_updates(params, updates)
        # One transformation of optax, scale_by_distance_over_gradients, makes shape (1,) of scalars.
        return jax.tree.map(lambda new, old: jnp.reshape(new, old.shape), moved, params), inner

    return Oracle(lambda params: (params, made.init(params)), update, lambda state: state[0], views or {})


def of_seed(triple: Any) -> Oracle:
    init, update, params = triple
    return Oracle(init, lambda step, grads, state, loss: update(step, grads, state), params)


# ------------------------------------------------------------------------------------------------------ optax's

_Maker = Callable[[Any, Any], Any]


def _chain(o: Any) -> Any:
    return opt.chain if o is remote else optax.chain


def _scaled(maker: _Maker) -> _Maker:
    """A transformation, with the step that optax's own optimizers put behind it."""

    def made(o: Any, kernels: Any) -> Any:
        return _chain(o)(maker(o, kernels), o.scale(-0.1))

    return made


def _fed(maker: _Maker) -> _Maker:
    """A transformation of updates, between Adam's direction and the step."""

    def made(o: Any, kernels: Any) -> Any:
        return _chain(o)(o.scale_by_adam(), maker(o, kernels), o.scale(-0.1))

    return made


def _linear(o: Any) -> Any:
    return o.linear_schedule(0.05, 0.01, 60)


_OPTIMIZERS: Final[dict[str, _Maker]] = {
    "acprop": lambda o, kernels: o.acprop(0.01, weight_decay=0.1, mask=kernels),
    "adabelief": lambda o, kernels: o.adabelief(_linear(o), b1=0.8, nesterov=True),
    "adadelta": lambda o, kernels: o.adadelta(0.5, rho=0.95, weight_decay=0.01, weight_decay_mask=kernels),
    "adafactor": lambda o, kernels: o.adafactor(0.01, min_dim_size_to_factor=4, momentum=0.9, weight_decay_rate=1e-3),
    "adamaxw": lambda o, kernels: o.adamaxw(0.01, weight_decay=0.1, mask=kernels),
    "adamw": lambda o, kernels: o.adamw(0.01, b2=0.99, weight_decay=0.1, mask=kernels),
    "adan": lambda o, kernels: o.adan(0.01, weight_decay=0.1, mask=kernels),
    "ademamix": lambda o, kernels: o.ademamix(0.01, b3=0.99, alpha=2.0, weight_decay=0.1, mask=kernels),
    "adopt": lambda o, kernels: o.adopt(0.01, b2=0.99),
    "amsgrad": lambda o, kernels: o.amsgrad(0.01, b2=0.99),
    "cocob": lambda o, kernels: o.cocob(weight_decay=0.01, mask=kernels),
    "dadapt_adamw": lambda o, kernels: o.dadapt_adamw(1.0, betas=(0.9, 0.99), weight_decay=0.01),
    "dog": lambda o, kernels: o.dog(1.0, weight_decay=0.01, mask=kernels),
    "dowg": lambda o, kernels: o.dowg(1.0, weight_decay=0.01, mask=kernels),
    "fromage": lambda o, kernels: o.fromage(0.01),
    "galore": lambda o, kernels: o.galore(0.01, rank=2, update_proj_gap=10, weight_decay=0.1, mask=kernels),
    "lamb": lambda o, kernels: o.lamb(0.01, weight_decay=0.1, mask=kernels),
    "lars": lambda o, kernels: o.lars(0.1, weight_decay=1e-3, weight_decay_mask=kernels, trust_ratio_mask=kernels),
    "lbfgs": lambda o, kernels: o.lbfgs(0.01, memory_size=4, linesearch=None),
    "lion": lambda o, kernels: o.lion(0.01, weight_decay=0.1, mask=kernels),
    "madgrad": lambda o, kernels: o.madgrad(0.01, weight_decay=0.01),
    "momo": lambda o, kernels: o.momo(0.5, weight_decay=0.01, adapt_lower_bound=True),
    "momo_adam": lambda o, kernels: o.momo_adam(0.05, weight_decay=0.01),
    "muon": lambda o, kernels: o.muon(0.02, weight_decay=0.01, weight_decay_mask=kernels),
    "nadam": lambda o, kernels: o.nadam(0.01, b2=0.99),
    "nadamw": lambda o, kernels: o.nadamw(_linear(o), weight_decay=0.1, mask=kernels),
    "noisy_sgd": lambda o, kernels: o.noisy_sgd(0.01, eta=0.1, key=3),
    "novograd": lambda o, kernels: o.novograd(0.01, weight_decay=0.01),
    "optax.adagrad": lambda o, kernels: o.adagrad(0.1),
    "optax.adam": lambda o, kernels: o.adam(_linear(o), nesterov=True, mu_dtype="float32"),
    "optax.adamax": lambda o, kernels: o.adamax(0.01),
    "optax.rmsprop": lambda o, kernels: o.rmsprop(0.01, centered=True, momentum=0.9, nesterov=True),
    "optax.sgd": lambda o, kernels: o.sgd(0.1, momentum=0.9, nesterov=True),
    "optax.sm3": lambda o, kernels: o.sm3(0.1),
    "optimistic_adam": lambda o, kernels: o.optimistic_adam(0.01, optimism=0.02),
    "optimistic_adam_v2": lambda o, kernels: o.optimistic_adam_v2(0.01, alpha=0.9, beta=0.8),
    "optimistic_gradient_descent": lambda o, kernels: o.optimistic_gradient_descent(0.1, alpha=0.9, beta=0.8),
    "polyak_sgd": lambda o, kernels: o.polyak_sgd(0.5, scaling=0.5, eps=0.1),
    "prodigy": lambda o, kernels: o.prodigy(1.0, weight_decay=0.01, safeguard_warmup=True),
    "radam": lambda o, kernels: o.radam(_linear(o), b2=0.99),
    "rprop": lambda o, kernels: o.rprop(0.01),
    "schedule_free_adamw": lambda o, kernels: o.schedule_free_adamw(0.01, warmup_steps=10, weight_decay=0.01),
    "schedule_free_sgd": lambda o, kernels: o.schedule_free_sgd(0.1, weight_decay=0.01),
    "sign_sgd": lambda o, kernels: o.sign_sgd(0.01),
    "signum": lambda o, kernels: o.signum(0.01),
    "simplified_ademamix": lambda o, kernels: o.simplified_ademamix(0.001, alpha=0.5, weight_decay=0.1, mask=kernels),
    "yogi": lambda o, kernels: o.yogi(0.01),
}

_TRANSFORMATIONS: Final[dict[str, _Maker]] = {
    "adaptive_grad_clip": _scaled(lambda o, kernels: o.adaptive_grad_clip(0.05)),
    "add_decayed_weights": _scaled(lambda o, kernels: o.add_decayed_weights(0.1, mask=kernels)),
    "add_noise": _scaled(lambda o, kernels: o.add_noise(0.1, 0.55, key=3)),
    "apply_every": _scaled(lambda o, kernels: o.apply_every(3)),
    "apply_if_finite": _scaled(lambda o, kernels: o.apply_if_finite(o.scale_by_adam(), 5)),
    "centralize": _scaled(lambda o, kernels: o.centralize()),
    "clip": _scaled(lambda o, kernels: o.clip(0.5)),
    "clip_by_block_rms": _scaled(lambda o, kernels: o.clip_by_block_rms(0.5)),
    "clip_by_global_norm": _scaled(lambda o, kernels: o.clip_by_global_norm(1.0)),
    "ema": _scaled(lambda o, kernels: o.ema(0.9)),
    "flatten": lambda o, kernels: o.flatten(o.adam(0.01)),
    "freeze": _scaled(lambda o, kernels: o.freeze(kernels)),
    "identity": _scaled(lambda o, kernels: o.identity()),
    "keep_params_nonnegative": lambda o, kernels: _chain(o)(o.sgd(0.1), o.keep_params_nonnegative()),
    "masked": lambda o, kernels: o.masked(o.sgd(0.1), kernels),
    "mechanize": lambda o, kernels: o.mechanize(o.sgd(0.1), s_init=1e-3),
    "named_chain": lambda o, kernels: o.named_chain(("clip", o.clip(0.5)), ("adam", o.adam(0.01))),
    "normalize": _scaled(lambda o, kernels: o.normalize()),
    "normalize_by_update_norm": _scaled(lambda o, kernels: o.normalize_by_update_norm()),
    "reduce_on_plateau": lambda o, kernels: _chain(o)(o.adam(0.01), o.reduce_on_plateau(factor=0.5, patience=5)),
    "scale": lambda o, kernels: o.scale(-0.1),
    "scale_by_acprop": _scaled(lambda o, kernels: o.scale_by_acprop()),
    "scale_by_adadelta": _scaled(lambda o, kernels: o.scale_by_adadelta()),
    "scale_by_adam": _scaled(lambda o, kernels: o.scale_by_adam(b2=0.99, eps_root=1e-8)),
    "scale_by_adamax": _scaled(lambda o, kernels: o.scale_by_adamax()),
    "scale_by_adan": _scaled(lambda o, kernels: o.scale_by_adan()),
    "scale_by_ademamix": _scaled(lambda o, kernels: o.scale_by_ademamix(b3=0.99, alpha=_linear(o))),
    "scale_by_adopt": _scaled(lambda o, kernels: o.scale_by_adopt(nesterov=True)),
    "scale_by_amsgrad": _scaled(lambda o, kernels: o.scale_by_amsgrad()),
    "scale_by_belief": _scaled(lambda o, kernels: o.scale_by_belief()),
    "scale_by_cocob": lambda o, kernels: _chain(o)(o.scale_by_cocob(), o.scale(1.0)),
    "scale_by_distance_over_gradients": _scaled(lambda o, kernels: o.scale_by_distance_over_gradients()),
    "scale_by_factored_rms": _scaled(lambda o, kernels: o.scale_by_factored_rms(min_dim_size_to_factor=4)),
    "scale_by_galore": _scaled(lambda o, kernels: o.scale_by_galore(rank=2, update_proj_gap=10)),
    "scale_by_lbfgs": _scaled(lambda o, kernels: o.scale_by_lbfgs(memory_size=3)),
    "scale_by_learning_rate": lambda o, kernels: _chain(o)(o.scale_by_adam(), o.scale_by_learning_rate(_linear(o))),
    "scale_by_lion": _scaled(lambda o, kernels: o.scale_by_lion(mode="smooth")),
    "scale_by_madgrad": lambda o, kernels: _chain(o)(o.scale_by_madgrad(0.01), o.scale(1.0)),
    "scale_by_novograd": _scaled(lambda o, kernels: o.scale_by_novograd()),
    "scale_by_optimistic_gradient": _scaled(lambda o, kernels: o.scale_by_optimistic_gradient()),
    "scale_by_param_block_norm": _fed(lambda o, kernels: o.scale_by_param_block_norm()),
    "scale_by_param_block_rms": _fed(lambda o, kernels: o.scale_by_param_block_rms()),
    "scale_by_polyak": lambda o, kernels: _chain(o)(o.scale_by_polyak(max_learning_rate=0.1), o.scale(-1.0)),
    "scale_by_radam": _scaled(lambda o, kernels: o.scale_by_radam(b2=0.99)),
    "scale_by_rms": _scaled(lambda o, kernels: o.scale_by_rms(eps_in_sqrt=False, bias_correction=True)),
    "scale_by_rprop": lambda o, kernels: _chain(o)(o.scale_by_rprop(0.01), o.scale(-1.0)),
    "scale_by_rss": _scaled(lambda o, kernels: o.scale_by_rss()),
    "scale_by_schedule": lambda o, kernels: _chain(o)(
        o.scale_by_adam(), o.scale_by_schedule(o.linear_schedule(-0.05, -0.01, 60))
    ),
    "scale_by_sign": _scaled(lambda o, kernels: o.scale_by_sign()),
    "scale_by_simplified_ademamix": _scaled(lambda o, kernels: o.scale_by_simplified_ademamix(alpha=0.5)),
    "scale_by_sm3": _scaled(lambda o, kernels: o.scale_by_sm3()),
    "scale_by_stddev": _scaled(lambda o, kernels: o.scale_by_stddev()),
    "scale_by_trust_ratio": _fed(lambda o, kernels: o.scale_by_trust_ratio()),
    "scale_by_yogi": _scaled(lambda o, kernels: o.scale_by_yogi()),
    "schedule_free": lambda o, kernels: o.schedule_free(o.sgd(0.1), 0.1, b1=0.8),
    "selective_transform": lambda o, kernels: o.selective_transform(o.adam(0.01), freeze_mask=kernels),
    "set_to_zero": lambda o, kernels: o.set_to_zero(),
    "split_real_and_imaginary": lambda o, kernels: o.split_real_and_imaginary(o.adam(0.01)),
    "trace": _scaled(lambda o, kernels: o.trace(0.9, nesterov=True)),
    "zero_nans": _scaled(lambda o, kernels: o.zero_nans()),
}

_OPTAX: Final = _OPTIMIZERS | _TRANSFORMATIONS
_WANT_LOSS: Final = {"momo", "momo_adam", "polyak_sgd", "reduce_on_plateau", "scale_by_polyak"}
_HAVE_NANS: Final = {"apply_if_finite", "zero_nans"}
_NO_SCALARS: Final = dict.fromkeys(
    ("optax.sm3", "scale_by_sm3"), "one accumulator a dimension: optax raises IndexError for arrays of shape ()"
)


# ------------------------------------------------------------------------------------------------------ ours

_SEED: Final[dict[str, tuple[Any, ...]]] = {
    "sgd": (0.1,),
    "momentum": (0.1, 0.9),
    "nesterov": (0.1, 0.9),
    "adagrad": (0.1,),
    "rmsprop": (0.01,),
    "rmsprop_momentum": (0.01,),
    # The default b2 rounds to 1 in bfloat16, which the server refuses.
    "adam": (0.01, 0.9, 0.99),
    "adamax": (0.01,),
    "sm3": (0.1,),
}


def _of_seed(name: str) -> Sample:
    no_scalars = "one accumulator a dimension: the seed has no answer for arrays of shape ()" if name == "sm3" else ""
    return Sample(
        getattr(opt, name)(*_SEED[name]),
        lambda: of_seed(getattr(seed, name)(*_SEED[name])),
        NO_SCALARS if no_scalars else ALL,
        why_no_scalars=no_scalars,
    )


def _of_chain() -> Sample:
    spec = opt.chain(remote.clip_by_global_norm(1.0), remote.add_decayed_weights(0.01), remote.adam(0.01))
    return Sample(
        spec,
        lambda: of_optax(
            optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.01), optax.adam(0.01))
        ),
    )


def _of_partition() -> Sample:
    spec = opt.partition({"conv/*": remote.adam(0.01), "**/kernel": remote.lion(0.02), "**": remote.sgd(0.1)})
    transforms = {"conv": optax.adam(0.01), "dense": optax.lion(0.02), "rest": optax.sgd(0.1)}
    return Sample(spec, lambda: of_optax(optax.partition(transforms, GROUPS)))


def _of_per_leaf() -> Sample:
    return Sample(opt.per_leaf(remote.adam(0.01)), lambda: of_optax(optax.adam(0.01)))


def _of_grouped() -> Sample:
    """By position what ``_of_partition`` does by pattern: leaves in order are those of GROUPS."""
    spec = opt.grouped([0, 2, 1, 2], remote.adam(0.01), remote.lion(0.02), remote.sgd(0.1))
    transforms = {"conv": optax.adam(0.01), "dense": optax.lion(0.02), "rest": optax.sgd(0.1)}
    return Sample(spec, lambda: of_optax(optax.partition(transforms, GROUPS)))


def _of_clip_grads() -> Sample:
    def oracle() -> Oracle:
        init, update, params = seed.sgd(0.1)
        return Oracle(init, lambda step, grads, state, loss: update(step, seed.clip_grads(grads, 1.0), state), params)

    return Sample(opt.chain(opt.clip_grads(1.0), opt.sgd(0.1)), oracle)


def _of_clip_by_leaf_norm() -> Sample:
    """Optax clips one leaf's norm where the whole tree is that leaf."""

    def oracle() -> Oracle:
        each = {label: optax.clip_by_global_norm(0.5) for label in ("conv", "dense", "bias", "scale")}
        labels = {"conv": {"kernel": "conv"}, "dense": {"bias": "bias", "kernel": "dense"}, "scale": "scale"}
        return of_optax(optax.chain(optax.partition(each, labels), optax.sgd(0.1)))

    return Sample(opt.chain(opt.clip_by_leaf_norm(0.5), remote.sgd(0.1)), oracle)


def _of_accumulate() -> Sample:
    """``MultiSteps`` keeps a running mean where the server keeps a sum, so bits differ and the mean does not."""

    def oracle() -> Oracle:
        return of_optax(optax.MultiSteps(optax.adam(0.01), 4))

    return Sample(opt.accumulate(remote.adam(0.01), 4), oracle)


def _of_on_nonfinite() -> Sample:
    def oracle() -> Oracle:
        return of_optax(optax.apply_if_finite(optax.adam(0.01), 10**6))

    return Sample(opt.on_nonfinite(remote.adam(0.01), "skip"), oracle, has_nans=True)


def _of_ema_params() -> Sample:
    """State: (average, the optimizer's); the average from its formula, in NumPy's order of operations."""

    def oracle() -> Oracle:
        inner = of_optax(optax.adam(0.01))

        def update(step: Any, grads: Any, state: Any, loss: Any) -> Any:
            average, held = state
            held = inner.update(step, grads, held, loss)
            moved = jax.tree.map(lambda e, p: (0.9 * e + (1 - 0.9) * p).astype(e.dtype), average, inner.params(held))
            return moved, held

        return Oracle(
            lambda params: (params, inner.init(params)),
            update,
            lambda state: inner.params(state[1]),
            {"ema": lambda state: state[0]},
        )

    return Sample(opt.ema_params(remote.adam(0.01), 0.9), oracle)


def _of_master_weights() -> Sample:
    """Optax in float32, with casts where numbers come in and go out. State: (the element types, optax's)."""

    def oracle() -> Oracle:
        inner = of_optax(optax.adam(0.01))

        def wide(tree: Any) -> Any:
            return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)

        return Oracle(
            lambda params: (params, inner.init(wide(params))),
            lambda step, grads, state, loss: (state[0], inner.update(step, wide(grads), state[1], loss)),
            lambda state: jax.tree.map(lambda p, own: p.astype(own.dtype), inner.params(state[1]), state[0]),
        )

    return Sample(opt.master_weights(remote.adam(0.01)), oracle)


def _of_lookahead() -> Sample:
    def oracle() -> Oracle:
        made = optax.lookahead(optax.adam(0.02), sync_period=5, slow_step_size=0.5)

        def init(params: Any) -> Any:
            both = optax.LookaheadParams.init_synced(params)
            return both, made.init(both)

        def update(step: Any, grads: Any, state: Any, loss: Any) -> Any:
            both, inner = state
            updates, inner = made.update(grads, inner, both)
            return optax.apply_updates(both, updates), inner

        return Oracle(init, update, lambda state: state[0].fast, {"eval": lambda state: state[0].slow})

    return Sample(remote.lookahead(remote.adam(0.02), sync_period=5, slow_step_size=0.5), oracle)


def _exported_update(step: Any, rate: Any, grad: Any, param: Any, velocity: Any) -> Any:
    velocity = 0.9 * velocity + grad
    return param - rate.astype(param.dtype) * velocity, velocity


def _of_exported(dtype: str) -> Sample:
    """Momentum as a program; it is exported for one element type, so each needs its own."""
    leaf = jax.ShapeDtypeStruct(export.symbolic_shape("n"), jnp.dtype(dtype))
    scalars = (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32))
    made = export.export(jax.jit(_exported_update), platforms=("cpu",))(*scalars, leaf, leaf, leaf)

    def oracle() -> Oracle:
        return of_optax(optax.sgd(0.1, momentum=0.9))

    return Sample(opt.exported(bytes(made.serialize()), 0.1), oracle)


_OURS: Final[dict[str, Callable[[], Sample]]] = {
    **{name: functools.partial(_of_seed, name) for name in _SEED},
    "chain": _of_chain,
    "partition": _of_partition,
    "per_leaf": _of_per_leaf,
    "grouped": _of_grouped,
    "clip_grads": _of_clip_grads,
    "clip_by_leaf_norm": _of_clip_by_leaf_norm,
    "accumulate": _of_accumulate,
    "on_nonfinite": _of_on_nonfinite,
    "ema_params": _of_ema_params,
    "master_weights": _of_master_weights,
    "lookahead": _of_lookahead,
}
