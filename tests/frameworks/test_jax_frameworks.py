"""Flax and Equinox loops as their documentation writes them, with a session in the place of optax's optimizer.

Runs where they are installed; the gate's environment has neither.
"""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optwire
import optwire.jax
from optwire import optax as remote_optax

STEPS = 4
X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)
Y = np.sin(X.sum(axis=1, keepdims=True))


def assert_same_bits(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_close(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), left, right)


@pytest.fixture
def spec():
    return remote_optax.adamw(0.01)


@pytest.fixture
def local():
    return optax.adamw(0.01)


# ------------------------------------------------------------------------------------------------------- Flax linen


def linen_state(tx_of):
    linen = pytest.importorskip("flax.linen")
    train_state = pytest.importorskip("flax.training.train_state")

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1)(linen.tanh(linen.Dense(5)(x)))

    network = Network()
    params = network.init(jax.random.key(0), X)
    return train_state.TrainState.create(apply_fn=network.apply, params=params, tx=tx_of(params))


@jax.jit
def linen_step(state):
    def loss_fn(params):
        return jnp.mean((state.apply_fn(params, X) - Y) ** 2)

    return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))


def test_train_state(client, spec, local):
    sessions = []

    def remote(params):
        sessions.append(optwire.jax.create_session(client, params, spec))
        return optwire.jax.transformation(sessions[0])

    ours, theirs = linen_state(remote), linen_state(lambda params: local)
    for _ in range(STEPS):
        ours, theirs = linen_step(ours), linen_step(theirs)
    assert ours.step == ours.opt_state.step == sessions[0].step_count == STEPS
    assert_close(ours.params, theirs.params)
    assert_same_bits(ours.params, optwire.jax.params(sessions[0], ours.params))


def test_a_train_state_goes_through_flax_serialization(client, spec):
    serialization = pytest.importorskip("flax.serialization")

    def create(params):
        return optwire.jax.transformation(optwire.jax.create_session(client, params, spec, name="linen"))

    state = linen_step(linen_step(linen_state(create)))
    data = serialization.to_bytes(state)
    expected = linen_step(state)
    client.delete_session("linen")

    state = linen_step(linen_step(linen_state(create)))
    fresh = linen_state(lambda params: optwire.jax.transformation(client.attach("linen")))
    restored = serialization.from_bytes(fresh, data)
    assert restored.opt_state.step == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="the state is of session"):  # that one was deleted
        jax.block_until_ready(linen_step(restored))
    restored = serialization.from_bytes(fresh, serialization.to_bytes(state))
    assert_same_bits(linen_step(restored).params, expected.params)
    client.delete_session("linen")


def test_a_train_state_goes_through_orbax(client, spec, tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")

    def create(params):
        return optwire.jax.transformation(optwire.jax.create_session(client, params, spec, name="orbax"))

    state = linen_step(linen_state(create))
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        fresh = linen_state(lambda params: optwire.jax.transformation(client.attach("orbax")))
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: fresh))
    state = linen_step(restored)
    assert state.opt_state.step == client.attach("orbax").step_count == 2
    client.delete_session("orbax")


# ------------------------------------------------------------------------------------------------------- Flax nnx


def nnx_model(nnx):
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 5, use_bias=False, rngs=rngs)  # the norm takes a bias out again
            self.norm = nnx.BatchNorm(5, rngs=rngs)
            self.last = nnx.Linear(5, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.norm(self.first(x))))

    return Network(nnx.Rngs(0))


def nnx_step(nnx, compiled):
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(X) - Y) ** 2))(model)
        optimizer.update(model, grads)

    return nnx.jit(step) if compiled else step


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_nnx_optimizer(client, spec, local, compiled):
    nnx = pytest.importorskip("flax.nnx")
    ours, theirs = nnx_model(nnx), nnx_model(nnx)
    session = optwire.jax.create_session(client, nnx.state(ours, nnx.Param), spec, name="nnx")
    assert "first/kernel" in client.attach("nnx").params()
    our_optimizer = nnx.Optimizer(ours, optwire.jax.transformation(session), wrt=nnx.Param)
    their_optimizer = nnx.Optimizer(theirs, local, wrt=nnx.Param)
    step = nnx_step(nnx, compiled)
    for _ in range(STEPS):
        step(ours, our_optimizer)
        step(theirs, their_optimizer)
    state = nnx.state(ours, nnx.Param)
    assert_close(state, nnx.state(theirs, nnx.Param))
    assert_same_bits(state, optwire.jax.params(session, state))

    nnx.update(ours, jax.tree.map(jnp.zeros_like, state))
    nnx.update(ours, optwire.jax.params(session, state))
    assert_same_bits(nnx.state(ours, nnx.Param), state)

    again = nnx.Optimizer(ours, optwire.jax.transformation(client.attach("nnx")), wrt=nnx.Param)
    step(ours, again)  # as another process does it
    assert session.info().step == STEPS + 1
    client.delete_session("nnx")


# ------------------------------------------------------------------------------------------------------- Equinox


def equinox_step(eqx, tx):
    def step(model, opt_state):
        grads = eqx.filter_grad(lambda model: jnp.mean((jax.vmap(model)(X) - Y) ** 2))(model)
        updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), opt_state

    return step


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_equinox(client, spec, local, compiled):
    eqx = pytest.importorskip("equinox")
    start = eqx.nn.MLP(3, 1, 5, 1, key=jax.random.key(0))
    session = optwire.jax.create_session(client, eqx.filter(start, eqx.is_array), spec)
    models = []
    for tx in (optwire.jax.transformation(session), local):
        step = equinox_step(eqx, tx)
        step = eqx.filter_jit(step) if compiled else step
        model, opt_state = start, tx.init(eqx.filter(start, eqx.is_array))
        for _ in range(STEPS):
            model, opt_state = step(model, opt_state)
        models.append(eqx.filter(model, eqx.is_array))
    assert_close(*models)
    assert_same_bits(models[0], optwire.jax.params(session, models[0]))


def test_a_state_goes_through_equinox_serialisation(client, spec):
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.Linear(3, 1, key=jax.random.key(0))
    tx = optwire.jax.transformation(optwire.jax.create_session(client, model, spec, name="eqx"))
    model, opt_state = equinox_step(eqx, tx)(model, tx.init(model))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, (model, opt_state))
    file.seek(0)
    tx = optwire.jax.transformation(client.attach("eqx"))
    model, opt_state = eqx.tree_deserialise_leaves(file, (model, tx.init(model)))
    _, opt_state = equinox_step(eqx, tx)(model, opt_state)
    assert opt_state.step == 2
    client.delete_session("eqx")
