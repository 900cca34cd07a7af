"""Optimizers over trees of arrays: three pure functions each, for `jit`, `vmap`, donation and plain Python alike.

    init_fun(params) -> opt_state
    update_fun(step, grads, opt_state) -> opt_state
    get_params(opt_state) -> params

Knows update rules, schedules and states. Must not know sessions, the wire, files or clocks.

`params` and `grads` are trees of the same structure; `step` counts from 0 and only schedules and bias corrections look
at it. An `opt_state` holds the params along with what the rule keeps for them, and is itself a tree of arrays. No
function changes its arguments or the dtype of a parameter.

    init_fun, update_fun, get_params = adam(exponential_decay(1e-3, decay_steps=1000, decay_rate=0.9))
    opt_state = init_fun(params)

    @jax.jit
    def train(step, opt_state, batch):
        grads = jax.grad(loss)(get_params(opt_state), batch)
        return update_fun(step, grads, opt_state)

    for step, batch in enumerate(batches):
        opt_state = train(step, opt_state, batch)
    params = get_params(opt_state)
"""

from optwire_server.optimizers.norms import clip_grads, l2_norm
from optwire_server.optimizers.rules import (
    adagrad,
    adam,
    adamax,
    momentum,
    nesterov,
    rmsprop,
    rmsprop_momentum,
    sgd,
    sm3,
)
from optwire_server.optimizers.schedules import (
    constant,
    exponential_decay,
    inverse_time_decay,
    make_schedule,
    piecewise_constant,
    polynomial_decay,
)
from optwire_server.optimizers.state import (
    JoinPoint,
    Optimizer,
    OptimizerState,
    optimizer,
    pack_optimizer_state,
    unpack_optimizer_state,
)
from optwire_server.optimizers.tensors import StateTensorsError, state_from_tensors, state_to_tensors

__all__ = [
    "JoinPoint",
    "Optimizer",
    "OptimizerState",
    "StateTensorsError",
    "adagrad",
    "adam",
    "adamax",
    "clip_grads",
    "constant",
    "exponential_decay",
    "inverse_time_decay",
    "l2_norm",
    "make_schedule",
    "momentum",
    "nesterov",
    "optimizer",
    "pack_optimizer_state",
    "piecewise_constant",
    "polynomial_decay",
    "rmsprop",
    "rmsprop_momentum",
    "sgd",
    "sm3",
    "state_from_tensors",
    "state_to_tensors",
    "unpack_optimizer_state",
]
