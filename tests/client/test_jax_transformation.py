"""A session as an optax transformation: the same loops as with optax alone, and what is refused."""

import ast
import collections
import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optwire
import optwire.jax
from optwire import optax as remote_optax
from optwire import optimizers as opt
from optwire.jax import _nests, _pushing

Layer = collections.namedtuple("Layer", ["weights", "bias"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    """A pytree node of the user's own, as Flax and Equinox have them."""

    layers: list
    scale: jax.Array
    gate: object = None


def initial_params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "hidden": Layer(jax.random.normal(keys[0], (7, 16)), jnp.zeros(16)),
        "out": [jax.random.normal(keys[1], (16, 130)), None, jax.random.normal(keys[2], (130,))],
    }


def loss_fn(params):
    x = jnp.linspace(-1, 1, 56).reshape(8, 7)
    hidden = jnp.tanh(x @ params["hidden"].weights + params["hidden"].bias)
    return jnp.mean((jnp.tanh(hidden @ params["out"][0]) @ params["out"][2] - 1.0) ** 2)


def step_of(tx):
    """One step as everybody writes it."""

    def step(params, opt_state):
        value, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params, value=value)
        return optax.apply_updates(params, updates), opt_state

    return step


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def eagerly(step, params, opt_state, count):
    for _ in range(count):
        params, opt_state = step(params, opt_state)
    return params, opt_state


def jitted(step, params, opt_state, count):
    return eagerly(jax.jit(step), params, opt_state, count)


def scanned(step, params, opt_state, count):
    def body(carry, _):
        return step(*carry), None

    return jax.jit(lambda *carry: jax.lax.scan(body, carry, None, length=count)[0])(params, opt_state)


@pytest.fixture
def session(client):
    return client.create_session(initial_params(), opt.adam(0.01))


@pytest.mark.parametrize("loop", [eagerly, jitted, scanned])
def test_the_loop_has_the_parameters_of_the_session(client, session, loop):
    tx = optwire.jax.transformation(session)
    params, opt_state = loop(step_of(tx), initial_params(), tx.init(initial_params()), 5)
    assert opt_state.step == session.step_count == 5
    assert opt_state.session_id == session.id
    assert_same_bits(params, jax.tree.map(jnp.asarray, session.params()))
    assert loss_fn(params) < loss_fn(initial_params())


# Adafactor scales by norms of whole leaves, which XLA sums in another order where it compiles them with other things.
@pytest.mark.parametrize(
    ("name", "arguments", "ulps"),
    [("sgd", (0.1, 0.9), 0), ("adamw", (0.01,), 4), ("lion", (1e-3,), 0), ("adafactor", (0.01,), None)],
)
def test_updates_are_those_of_optax_itself(client, name, arguments, ulps):
    """Optax's update compiled by itself, leaf by leaf; the server compiles it for blocks, where XLA may round.

    Compiled together with the gradients, XLA may fuse its operations with theirs, too.
    """
    local = getattr(optax, name)(*arguments)
    session = client.create_session(initial_params(), getattr(remote_optax, name)(*arguments))
    remote = optwire.jax.transformation(session)
    gradients, update = jax.jit(jax.grad(loss_fn)), jax.jit(local.update)
    params, local_state, remote_state = initial_params(), local.init(initial_params()), remote.init(initial_params())
    for _ in range(5):
        grads = gradients(params)
        updates, local_state = update(grads, local_state, params)
        came, remote_state = jax.jit(remote.update)(grads, remote_state, params)
        if ulps is not None:
            jax.tree.map(functools.partial(np.testing.assert_array_max_ulp, maxulp=ulps), came, updates)
        else:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), came, updates)
        params = optax.apply_updates(params, came)


def test_jit_compiles_once(session):
    tx = optwire.jax.transformation(session)
    traces = []

    @jax.jit
    def step(params, opt_state):
        traces.append(1)
        return step_of(tx)(params, opt_state)

    eagerly(step, initial_params(), tx.init(initial_params()), 4)
    assert len(traces) == 1


def test_cond_pushes_only_where_it_is_taken(session):
    tx = optwire.jax.transformation(session)

    @jax.jit
    def step(params, opt_state, wanted):
        return jax.lax.cond(wanted, step_of(tx), lambda *same: same, params, opt_state)

    params, opt_state = initial_params(), tx.init(initial_params())
    for wanted in (True, False, False, True):
        params, opt_state = step(params, opt_state, wanted)
    assert opt_state.step == session.step_count == 2


def test_stages_of_a_chain_run_here_and_the_session_there(client):
    specs = remote_optax.chain(remote_optax.clip_by_global_norm(0.01), remote_optax.adam(0.01))
    whole = optwire.jax.transformation(client.create_session(initial_params(), specs))
    session = client.create_session(initial_params(), remote_optax.adam(0.01))
    split = optax.chain(optax.clip_by_global_norm(0.01), optwire.jax.transformation(session))
    expected, _ = jitted(step_of(whole), initial_params(), whole.init(initial_params()), 3)
    params, opt_state = jitted(step_of(split), initial_params(), split.init(initial_params()), 3)
    assert opt_state[1].step == 3
    # The norm is rounded otherwise here and there, and Adam takes a step of 0.01 whatever the size of a gradient.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), params, expected)


def test_apply_if_finite_does_not_push_what_is_not(session):
    tx = optax.apply_if_finite(optwire.jax.transformation(session), 3)
    grads = initial_params()
    opt_state = tx.init(grads)
    for factor in (1.0, jnp.nan, 1.0):
        updates, opt_state = tx.update(jax.tree.map(lambda g, by=factor: g * by, grads), opt_state, grads)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    assert opt_state.inner_state.step == session.step_count == 2


# ------------------------------------------------------------------------------------------------------- trees


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_element_types_stay(client, dtype):
    with jax.enable_x64(dtype == "float64"):
        params = {"w": jnp.ones(5, dtype), "b": jnp.ones((), dtype)}
        session = client.create_session(params, opt.sgd(0.25))
        tx = optwire.jax.transformation(session)
        opt_state = tx.init(params)
        for update in (tx.update, jax.jit(tx.update)):
            updates, opt_state = update(params, opt_state)
            assert_same_bits(updates, jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.25), params))
            assert opt_state.step.dtype == np.int32


def test_any_pytree_makes_a_session(client):
    """Quotes the docstring: nodes of your own; for other clients a mapping from name to array."""
    keys = jax.random.split(jax.random.key(0), 12)
    model = Model([{"b": jax.random.normal(key, (3,)), "a": jnp.ones((2, 2))} for key in keys], jnp.ones(4), None)
    session = optwire.jax.create_session(client, model, opt.momentum(0.5, 0.9), name="any-pytree")
    names = [f"layers/{i}/{name}" for i in range(12) for name in "ab"]
    assert list(client.attach("any-pytree").params()) == [*names, "scale"]

    tx = optwire.jax.transformation(session)
    updates, opt_state = jax.jit(tx.update)(model, tx.init(model))
    assert jax.tree.structure(updates) == jax.tree.structure(model)
    model = optax.apply_updates(model, updates)
    assert_same_bits(model, optwire.jax.params(session, model))

    numpy_session = client.attach("any-pytree")
    params = numpy_session.params()
    numpy_session.step({name: np.ones_like(params[name]) for name in reversed(params)})  # a mapping: any order
    with pytest.raises(optwire.StaleStepError):
        tx.update(model, opt_state)
    opt_state = tx.init(optwire.jax.params(session, model))
    assert opt_state.step == 2
    client.delete_session("any-pytree")


def test_nests_stay_nests_for_other_clients(client):
    optwire.jax.create_session(client, initial_params(), opt.sgd(0.1), name="a-nest", seed=7)
    params = client.attach("a-nest").params()
    assert type(params["out"]) is list
    assert params["out"][1] is None
    assert params["hidden"]._fields == ("weights", "bias")
    assert client.attach("a-nest").info().seed == 7
    client.delete_session("a-nest")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
    """A variable, as Flax has them."""

    value: object


def test_the_name_of_a_leaf_does_not_depend_on_its_box(client):
    boxed = {"w": Box(jnp.ones(3)), "b": [Box(jnp.ones(2)), Box(None)]}
    session = optwire.jax.create_session(client, boxed, opt.sgd(1.0))
    assert [leaf.name for leaf in session.info().tree.leaves] == ["b/0", "w"]
    tx = optwire.jax.transformation(session)
    for params in (boxed, {"w": jnp.ones(3), "b": [jnp.ones(2), None]}):
        updates, _ = tx.update(params, tx.init(params))
        assert_same_bits(updates, jax.tree.map(jnp.negative, params))


def test_a_session_of_a_part_of_the_parameters(client):
    mask = {"a": True, "b": False}
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    session = optwire.jax.create_session(client, {"a": params["a"], "b": optax.MaskedNode()}, opt.sgd(1.0))
    tx = optax.masked(optwire.jax.transformation(session), mask)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert_same_bits(updates, {"a": -params["a"], "b": params["b"]})


def test_create_session_refuses_what_is_no_array(client):
    with pytest.raises(optwire.TreeError, match=r"params\['scale'\]: function, expected an array; leave out"):
        optwire.jax.create_session(client, Model([], jnp.sin.__wrapped__), opt.sgd(0.1))
    with pytest.raises(optwire.TreeError, match=r"params\['scale'\]: element type float64, which JAX would narrow"):
        optwire.jax.create_session(client, Model([], np.ones(3)), opt.sgd(0.1))
    with pytest.raises(optwire.UnsupportedError, match="call create_session outside"):
        jax.jit(lambda params: optwire.jax.create_session(client, params, opt.sgd(0.1)))(jnp.ones(3))


def test_other_structures_with_the_same_names_will_do(client):
    session = client.create_session(
        {"layers": {"0": {"a": np.ones(2, np.float32)}}, "scale": np.ones(4, np.float32)}, opt.sgd(1.0)
    )
    tx = optwire.jax.transformation(session)
    model = Model([{"a": jnp.ones(2)}], jnp.ones(4), None)
    updates, _ = tx.update(model, tx.init(model))
    assert_same_bits(updates, jax.tree.map(jnp.negative, model))


def test_other_leaves_are_refused_while_tracing(session):
    tx = optwire.jax.transformation(session)
    params = initial_params()
    opt_state = tx.init(params)
    wrong = {**params, "out": [params["out"][0], None, jnp.ones(4)]}
    for call in (lambda: tx.init(wrong), lambda: jax.jit(tx.update)(wrong, opt_state)):
        with pytest.raises(optwire.TreeMismatchError, match=r"\['out/2'\]: shape \(4,\), expected \(130,\)"):
            call()
    with pytest.raises(optwire.TreeMismatchError, match=r"\['out/2'\]: element type bf16, expected f32"):
        tx.update({**params, "out": [params["out"][0], None, params["out"][2].astype(jnp.bfloat16)]}, opt_state)
    with pytest.raises(optwire.TreeMismatchError, match=r"params: 1 of the leaves missing: \(out/2\)"):
        tx.init({**params, "out": params["out"][:2]})
    with pytest.raises(optwire.TreeMismatchError, match=r"1 of the leaves not in the session's tree: \(more\)"):
        tx.init({**params, "more": jnp.ones(1)})
    assert session.info().step == 0


def test_none_in_the_place_of_a_gradient_leaves_the_leaf_alone(client):
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    session = client.create_session(params, opt.per_leaf(opt.adam(0.5)))
    tx = optwire.jax.transformation(session)
    opt_state = tx.init(params)
    for update in (tx.update, jax.jit(tx.update)):
        updates, opt_state = update({"a": params["a"], "b": None}, opt_state)
        assert updates["b"] is None
        assert (updates["a"] < 0).all()
    assert np.array_equal(session.params()["b"], params["b"])
    params = optwire.jax.step(session, {"a": None, "b": params["b"]})
    assert params["a"].shape == (3,)


def test_step_gives_the_parameters_exactly(client):
    model = Model([jnp.ones(3)], jnp.full(2, 2.0), None)
    session = optwire.jax.create_session(client, model, opt.adam(0.01))
    params = optwire.jax.step(session, model, 0, grad_scale=2.0)
    assert isinstance(params, Model)
    assert_same_bits(params, optwire.jax.params(session, model))
    with pytest.raises(optwire.UnsupportedError, match="call step outside"):
        jax.jit(lambda grads: optwire.jax.step(session, grads))(model)
    with pytest.raises(optwire.UnsupportedError, match="call params outside"):
        jax.jit(lambda: optwire.jax.params(session, model))()


# ------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("loop", [eagerly, jitted])
def test_the_loss_goes_along_where_the_optimizer_asks_for_it(client, loop):
    spec = remote_optax.chain(
        remote_optax.adam(0.01), remote_optax.reduce_on_plateau(factor=0.5, patience=1, cooldown=0)
    )
    session = client.create_session(initial_params(), spec)
    assert session.describe().extras == ("loss",)
    tx = optax.chain(optax.identity(), optwire.jax.transformation(session))
    params, _ = loop(step_of(tx), initial_params(), tx.init(initial_params()), 3)
    assert_same_bits(params, jax.tree.map(jnp.asarray, session.params()))
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(optwire.InvalidArgumentError, match="asks for the loss: value=nothing, expected a number"):
            update(params, tx.init(params), params)
    with pytest.raises(optwire.InvalidArgumentError, match=r"value=shape \(2,\), expected a number"):
        tx.update(params, tx.init(params), params, value=jnp.ones(2))


# ------------------------------------------------------------------------------------------------------- once


def test_the_same_push_again_is_answered_and_not_applied(session):
    """A retry by JAX, or a cell that is run again after Ctrl-C."""
    tx = optwire.jax.transformation(session)
    opt_state, grads = tx.init(initial_params()), initial_params()
    first, _ = tx.update(grads, opt_state)
    for update in (tx.update, jax.jit(tx.update)):
        again, after = update(grads, opt_state)
        assert_same_bits(again, first)
        assert after.step == session.info().step == 1


def test_a_loaded_state_is_a_new_history(session):
    """The same push on the same step is another one after the session was taken back."""
    tx = optwire.jax.transformation(session)
    opt_state, grads = tx.init(initial_params()), initial_params()
    before = session.state()
    tx.update(grads, opt_state)
    session.load_state(before, step=0)
    assert session.info().step == 0
    _, opt_state = tx.update(grads, opt_state)
    assert opt_state.step == session.info().step == 1


def other_grads():
    return jax.tree.map(lambda leaf: leaf + 1, initial_params())


def test_other_gradients_on_the_same_state_are_refused(session):
    tx = optwire.jax.transformation(session)
    opt_state = tx.init(initial_params())
    tx.update(initial_params(), opt_state)
    with pytest.raises(optwire.StaleStepError, match="optax.MultiSteps.*optwire.optimizers.accumulate") as caught:
        tx.update(other_grads(), opt_state)
    assert caught.value.step == session.info().step == 1
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"(?s)StaleStepError: update: the state of step 0.*MultiSteps"
    ):
        jax.block_until_ready(jax.jit(tx.update)(other_grads(), opt_state))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_multi_steps_is_refused_at_the_second_micro_step(session, wrap):
    tx = optax.MultiSteps(optwire.jax.transformation(session), every_k_schedule=4)
    update = wrap(tx.update)
    _, opt_state = update(initial_params(), tx.init(initial_params()), initial_params())
    with pytest.raises(jax.errors.JaxRuntimeError, match="StaleStepError.*optax.MultiSteps.*accumulate"):
        jax.block_until_ready(update(other_grads(), opt_state, initial_params()))
    assert session.info().step == 1


def test_accumulation_belongs_to_the_server(client):
    """The advice that goes with the refusal."""
    session = client.create_session(initial_params(), opt.accumulate(opt.sgd(0.5), 2))
    tx = optwire.jax.transformation(session)
    opt_state = tx.init(initial_params())
    update = jax.jit(tx.update)
    first, opt_state = update(initial_params(), opt_state)
    assert all(not leaf.any() for leaf in jax.tree.leaves(first))
    second, opt_state = update(initial_params(), opt_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -0.5 * b, rtol=1e-6), second, initial_params())


def test_a_state_of_another_session_is_refused(client, session):
    other = optwire.jax.transformation(client.create_session(initial_params(), opt.adam(0.01)))
    tx = optwire.jax.transformation(session)
    with pytest.raises(
        optwire.InvalidArgumentError, match=f"the state is of session {other.init(initial_params()).session_id}"
    ):
        tx.update(initial_params(), other.init(initial_params()))


def test_a_saved_state_goes_on_in_another_process(server, session):
    tx = optwire.jax.transformation(session)
    params, opt_state = jitted(step_of(tx), initial_params(), tx.init(initial_params()), 2)
    saved = [np.array(leaf) for leaf in jax.tree.leaves((params, opt_state))]
    structure = jax.tree.structure((params, opt_state))
    with optwire.connect(server.target) as other:
        tx = optwire.jax.transformation(other.attach(session.name))
        assert jax.eval_shape(tx.init, params) == jax.eval_shape(lambda: opt_state)
        params, opt_state = jitted(step_of(tx), *jax.tree.unflatten(structure, saved), 2)
    assert opt_state.step == 4
    assert_same_bits(params, jax.tree.map(jnp.asarray, session.params()))


# ------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_vmap_is_refused(session, wrap):
    tx = optwire.jax.transformation(session)
    opt_state = tx.init(initial_params())
    grads = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), initial_params())
    for call in (lambda g: wrap(tx.update)(g, opt_state), wrap(lambda g: tx.update(g, opt_state))):
        with pytest.raises(optwire.UnsupportedError, match="under vmap, over 2 elements.*a session of its own"):
            jax.vmap(call)(grads)
    assert session.info().step == 0


@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "checkpoint"])
def test_differentiation_is_refused(session, transform, wrap):
    tx = optwire.jax.transformation(session)
    opt_state = tx.init(initial_params())

    def unrolled(grads):
        return optax.global_norm(wrap(tx.update)(grads, opt_state)[0])

    with pytest.raises(optwire.UnsupportedError, match="is being differentiated.*call update outside of grad"):
        transform(unrolled)(initial_params())
    assert session.info().step == 0


def test_errors_of_the_push_arrive_inside_those_of_jax(client, session):
    tx = optwire.jax.transformation(session)
    opt_state = tx.init(initial_params())
    step = jax.jit(step_of(tx))
    client.delete_session(session.name)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"(?s)SessionNotFoundError: session '{session.name}'"):
        jax.block_until_ready(step(initial_params(), opt_state))
    with pytest.raises(optwire.SessionNotFoundError):
        tx.update(initial_params(), opt_state)


def test_the_loop_goes_on_after_an_error(session):
    tx = optwire.jax.transformation(session)
    opt_state = tx.init(initial_params())
    step = jax.jit(tx.update)
    with pytest.raises(jax.errors.JaxRuntimeError, match="FutureStepError"):
        jax.block_until_ready(step(initial_params(), opt_state._replace(step=jnp.int32(7))))
    _, opt_state = jax.block_until_ready(step(initial_params(), opt_state))
    assert opt_state.step == session.info().step == 1


def test_a_donating_step_that_failed_goes_on_with_what_the_session_has(client):
    params = {"w": jnp.zeros(4), "b": jnp.zeros(())}
    session = optwire.jax.create_session(client, params, opt.sgd(0.5))
    tx, like = optwire.jax.transformation(session), jax.eval_shape(lambda: params)
    grads = jax.tree.map(jnp.ones_like, params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = step(params, tx.init(params))
    client.attach(session.name).step(grads)
    with pytest.raises(jax.errors.JaxRuntimeError, match="StaleStepError"):
        jax.block_until_ready(step(params, opt_state))
    assert params["w"].is_deleted()
    params = optwire.jax.params(session, like)
    params, opt_state = step(params, tx.init(params))
    assert opt_state.step == 3
    assert_same_bits(params, {"w": jnp.full(4, -1.5), "b": jnp.float32(-1.5)})
    assert_same_bits(params, session.params())


def test_map_pushes_each_element_on_one_state_and_the_error_says_so(session):
    tx = optwire.jax.transformation(session)
    opt_state = tx.init(initial_params())
    grads = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), initial_params())
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?s)StaleStepError.*Under pmap and lax\.map.*lax\.pmean"):
        jax.block_until_ready(jax.lax.map(lambda g: tx.update(g, opt_state)[0], grads))
    assert session.info().step == 1


def test_an_error_does_not_stick_to_what_runs_next(client):
    """JAX may return before a step has run: on inputs that are still computed, its error comes late."""
    params = {"w": jnp.full((700, 700), 0.5)}
    slowly = jax.jit(lambda w: functools.reduce(lambda x, _: jnp.sin(x @ w), range(10), w))
    tx = optwire.jax.transformation(client.create_session(params, opt.sgd(0.1)))
    other = optwire.jax.transformation(client.create_session(params, opt.sgd(0.1)))
    opt_state, other_state = tx.init(params), other.init(params)

    @functools.partial(jax.jit, static_argnums=0)
    def step(tx, grads, opt_state):
        return tx.update(grads, opt_state)

    def fails():
        _, state = step(tx, {"w": slowly(params["w"])}, opt_state._replace(step=jnp.int32(99)))
        return jax.block_until_ready(state)

    for i in range(1, 5):
        with pytest.raises(jax.errors.JaxRuntimeError, match="FutureStepError"):
            fails()
        _, other_state = step(other, {"w": slowly(params["w"])}, other_state)
        _, opt_state = step(tx, {"w": slowly(params["w"])}, opt_state)
        assert other_state.step == opt_state.step == i
    jax.effects_barrier()


# ------------------------------------------------------------------------------------------------------- callbacks


def test_constants_of_a_jitted_function_are_pushed_when_it_runs(session):
    tx = optwire.jax.transformation(session)
    grads, opt_state = initial_params(), tx.init(initial_params())
    compiled = jax.jit(lambda: tx.update(grads, opt_state)).lower().compile()
    assert session.info().step == 0
    assert compiled()[1].step == session.info().step == 1


def test_the_inside_of_a_callback_imports_no_jax():
    for module in (_pushing, _nests):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert {name for name in imported if name and name.split(".")[0] in ("jax", "jaxlib")} == set()


def test_the_inside_of_a_callback_calls_no_jax(session):
    """A call of JAX between entry and return may wait for a device that waits for the callback."""
    called = set()
    pushing = _pushing.Pushing(session)
    grads = [np.ones(leaf.shape, np.float32) for leaf in session.info().tree.leaves]
    token = np.frombuffer(bytes.fromhex(session.id), np.uint8)
    sys.setprofile(lambda frame, event, _: called.add(frame.f_globals.get("__name__", "")))
    try:
        step, updates = pushing.push((0, 1, 2, 3), np.int32(0), token, None, grads)
    finally:
        sys.setprofile(None)
    assert step == 1
    assert "optwire._session" in called
    assert all(type(array) is np.ndarray for array in updates)
    assert {name for name in called if name.split(".")[0] in ("jax", "jaxlib")} == set()


def test_many_large_steps_in_flight_do_not_wait_for_each_other(client):
    """JAX returns before a step has run: the next ones queue up behind its callback."""
    params = {str(i): jnp.ones((500, 500)) for i in range(8)}
    session = client.create_session(params, opt.sgd(1e-3))
    tx = optwire.jax.transformation(session)

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(lambda p: sum(jnp.sum(leaf @ leaf) for leaf in p.values()) * 1e-6)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = eagerly(step, params, tx.init(params), 10)
    assert opt_state.step == 10
    assert_same_bits(params, jax.tree.map(jnp.asarray, session.params()))


def test_without_optax_the_extra_is_named(session, monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(optwire.UnsupportedError, match=r"needs optax: pip install 'optwire\[jax\]'"):
        optwire.jax.transformation(session)
