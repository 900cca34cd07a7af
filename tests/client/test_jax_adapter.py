"""The seed's triple over the wire, against the seed itself."""

import collections
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.example_libraries import optimizers as seed
from tests.e2e import wire

import optwire
import optwire.jax
from optwire import optimizers as opt

Layer = collections.namedtuple("Layer", ["weights", "bias"])


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert isinstance(a, jax.Array)
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def initial_params():
    keys = jax.random.split(jax.random.key(0), 2)
    return [
        Layer(jax.random.normal(keys[0], (5, 7)), jnp.zeros(7)),
        {"out": (jax.random.normal(keys[1], (7, 1)), None)},
    ]


def loss_fn(params):
    x = jnp.linspace(-1, 1, 40).reshape(8, 5)
    hidden = jnp.tanh(x @ params[0].weights + params[0].bias)
    return jnp.mean((hidden @ params[1]["out"][0] - 1.0) ** 2)


def train(opt_init, opt_update, get_params, num_steps):
    """The usage example in the docstring of ``jax.example_libraries.optimizers``, as it stands there."""
    params = initial_params()
    opt_state = opt_init(params)

    def step(step, opt_state):
        value, grads = jax.value_and_grad(loss_fn)(get_params(opt_state))
        opt_state = opt_update(step, grads, opt_state)
        return value, opt_state

    values = []
    for i in range(num_steps):
        value, opt_state = step(i, opt_state)
        values.append(value)
    return values, get_params(opt_state)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sgd", (0.1,)),
        ("momentum", (0.1, 0.9)),
        ("nesterov", (0.1, 0.9)),
        ("adagrad", (0.1,)),
        ("rmsprop", (0.01,)),
        ("rmsprop_momentum", (0.01,)),
        ("adam", (0.01,)),
        ("adamax", (0.01,)),
        ("sm3", (0.1,)),
    ],
)
def test_the_seeds_example_gives_the_same_bits_remotely(client, name, arguments):
    """Quotes the README: bit-identical to running the update locally with the same jitted function."""
    local = getattr(seed, name)(*arguments)
    remote = optwire.jax.optimizer(client, getattr(opt, name)(*arguments))
    local_values, local_params = train(local.init_fn, jax.jit(local.update_fn), local.params_fn, 6)
    remote_values, remote_params = train(*remote, 6)
    assert_same_bits(remote_params, local_params)
    assert_same_bits(remote_values, local_values)


def test_params_are_those_given_before_the_first_update(client):
    opt_init, _, get_params = optwire.jax.optimizer(client, opt.adam(0.1))
    assert_same_bits(get_params(opt_init(initial_params())), initial_params())


def test_the_state_is_two_small_arrays(client):
    opt_init, opt_update, _ = optwire.jax.optimizer(client, opt.sgd(0.5), name="small")
    state = opt_update(0, {"w": jnp.ones(3)}, opt_init({"w": jnp.ones(3)}))
    leaves = jax.tree.leaves(state)
    assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [((), np.int32), ((16,), np.uint8)]
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert state.step == 1
    assert state.session_id == client.attach("small").id
    client.delete_session("small")


def test_a_jitted_function_of_the_state_compiles_once(client):
    opt_init, opt_update, _ = optwire.jax.optimizer(client, opt.sgd(0.5))
    traces = []

    @jax.jit
    def next_step(state):
        traces.append(state)
        return state.step + 1

    state = opt_init(jnp.ones(3))
    for i in range(4):
        assert next_step(state) == i + 1
        state = opt_update(i, jnp.ones(3), state)
    assert len(traces) == 1


def test_a_state_that_has_been_through_jit_still_works(client):
    opt_init, opt_update, get_params = optwire.jax.optimizer(client, opt.sgd(0.5))
    state = jax.jit(lambda state: state)(opt_init(jnp.ones(3)))
    assert np.array_equal(get_params(opt_update(0, jnp.ones(3), state)), np.full(3, 0.5))


def test_a_session_can_be_named_and_found(client):
    opt_init, opt_update, _ = optwire.jax.optimizer(client, opt.sgd(0.5), name="jax-adapter")
    state = opt_init(jnp.ones(3))
    opt_update(0, jnp.ones(3), state)
    assert client.attach("jax-adapter").step_count == 1
    client.delete_session("jax-adapter")


def test_the_server_owns_the_step(client):
    opt_init, opt_update, _ = optwire.jax.optimizer(client, opt.sgd(0.5))
    state = opt_update(jnp.int32(0), jnp.ones(3), opt_init(jnp.ones(3)))
    assert state.step == 1
    with pytest.raises(optwire.StaleStepError, match="step 0, expected 1.*the server owns the step"):
        opt_update(0, jnp.ones(3), state)
    with pytest.raises(optwire.FutureStepError, match="step 2, expected 1"):
        opt_update(2, jnp.ones(3), state)
    assert opt_update(1, jnp.ones(3), state).step == 2


def test_a_state_that_was_updated_cannot_be_updated_again(client):
    opt_init, opt_update, get_params = optwire.jax.optimizer(client, opt.sgd(0.5))
    old = opt_init(jnp.ones(3))
    new = opt_update(0, jnp.ones(3), old)
    with pytest.raises(optwire.StaleStepError) as caught:
        opt_update(0, jnp.ones(3), old)
    assert caught.value.step == 1
    assert np.array_equal(get_params(opt_update(1, jnp.ones(3), new)), jnp.zeros(3))


def test_updating_under_a_transformation_says_to_call_it_outside(client):
    opt_init, opt_update, get_params = optwire.jax.optimizer(client, opt.sgd(0.5))
    state = opt_init(jnp.ones(3))
    with pytest.raises(optwire.UnsupportedError, match="call get_params outside"):
        jax.jit(get_params)(state)
    with pytest.raises(optwire.UnsupportedError, match="call opt_update outside"):
        jax.jit(opt_update, static_argnums=0)(0, jnp.ones(3), state)
    with pytest.raises(optwire.UnsupportedError, match="call opt_update outside"):
        jax.jit(partial(opt_update, grads=jnp.ones(3), opt_state=state))(0)
    with pytest.raises(optwire.UnsupportedError, match="call opt_update outside"):
        jax.grad(lambda grads: get_params(opt_update(0, grads, state)).sum())(jnp.ones(3))
    with pytest.raises(optwire.UnsupportedError, match="call opt_init outside"):
        jax.vmap(opt_init)(jnp.ones((2, 3)))
    for call in (lambda: opt_update(0, np.ones(3, np.float32), state), lambda: get_params(state)):
        with pytest.raises(optwire.UnsupportedError, match="outside"):
            jax.jit(call)()  # constants: no tracer to be seen
    assert opt_update(0, jnp.ones(3), state).step == 1


def test_the_parameters_of_an_old_state_are_gone(client):
    opt_init, opt_update, get_params = optwire.jax.optimizer(client, opt.sgd(0.5))
    old = opt_init(jnp.ones(3))
    assert np.array_equal(get_params(old), np.ones(3))
    new = opt_update(0, jnp.ones(3), old)
    with pytest.raises(optwire.StaleStepError, match="parameters of step 0 are gone: .* is at step 1") as caught:
        get_params(old)
    assert caught.value.step == 1
    assert np.array_equal(get_params(new), np.full(3, 0.5))


def test_a_saved_state_attaches_to_its_session(server, client):
    """As another process does it: another client, another triple, and arrays that a checkpoint gave."""
    opt_init, opt_update, get_params = optwire.jax.optimizer(client, opt.momentum(0.5, 0.9))
    state = opt_update(0, initial_params(), opt_init(initial_params()))
    expected = get_params(opt_update(1, initial_params(), state))

    state = opt_update(0, initial_params(), opt_init(initial_params()))
    saved = optwire.jax.RemoteState(*[np.array(leaf) for leaf in state])
    before = get_params(state)
    with optwire.connect(server.target) as other:
        _, opt_update, get_params = optwire.jax.optimizer(other, opt.momentum(0.5, 0.9))
        assert_same_bits(jax.tree.leaves(get_params(saved)), jax.tree.leaves(before))
        assert_same_bits(get_params(opt_update(1, initial_params(), saved)), expected)


def test_a_saved_state_that_others_have_moved_past_is_refused(server, client):
    opt_init, opt_update, _ = optwire.jax.optimizer(client, opt.sgd(0.5))
    saved = opt_init(jnp.ones(3))
    opt_update(0, jnp.ones(3), saved)
    with optwire.connect(server.target) as other:
        _, opt_update, get_params = optwire.jax.optimizer(other, opt.sgd(0.5))
        with pytest.raises(optwire.StaleStepError, match="step 0 are gone"):
            get_params(saved)
        with pytest.raises(optwire.StaleStepError):
            opt_update(0, jnp.ones(3), saved)


def test_a_saved_state_wants_the_spec_of_its_session(client):
    state = optwire.jax.optimizer(client, opt.sgd(0.5)).init_fn(jnp.ones(3))
    _, opt_update, get_params = optwire.jax.optimizer(client, opt.sgd(0.25))
    for call in (lambda: get_params(state), lambda: opt_update(0, jnp.ones(3), state)):
        with pytest.raises(optwire.SpecError, match=r"made with sgd\(step_size=0.5.*expected sgd\(step_size=0.25"):
            call()
    _, opt_update, _ = optwire.jax.optimizer(client, "sgd(0.5)")
    assert opt_update(0, jnp.ones(3), state).step == 1


def test_a_saved_state_whose_session_is_gone_is_refused(client):
    state = optwire.jax.optimizer(client, opt.sgd(0.5), name="gone").init_fn(jnp.ones(3))
    client.delete_session("gone")
    _, opt_update, _ = optwire.jax.optimizer(client, opt.sgd(0.5))
    with pytest.raises(optwire.SessionNotFoundError, match=f"no session {state.session_id}"):
        opt_update(0, jnp.ones(3), state)
    with pytest.raises(optwire.InvalidArgumentError, match=r"opt_state.token: shape \(4,\) of uint32"):
        opt_update(0, jnp.ones(3), state._replace(token=jnp.zeros(4, jnp.uint32)))


def test_two_sessions_of_one_triple_take_turns(client):
    opt_init, opt_update, get_params = optwire.jax.optimizer(client, opt.sgd(0.5))
    one, two = opt_init(jnp.ones(3)), opt_init((jnp.zeros(2), None))
    for i in range(2):
        one = opt_update(i, jnp.ones(3), one)
        two = opt_update(i, (jnp.ones(2), None), two)
        assert np.array_equal(get_params(one), np.full(3, 0.5 - 0.5 * i))
        assert_same_bits(get_params(two), (jnp.full(2, -0.5 - 0.5 * i), None))


def test_parameters_given_are_copied(client):
    """Large enough that JAX would take an aligned array as it is."""
    opt_init, _, get_params = optwire.jax.optimizer(client, opt.sgd(0.5))
    given = np.zeros(1 << 16 | 16, np.float32)
    given = given[-given.ctypes.data % 64 // 4 :][: 1 << 16]
    state = opt_init({"w": given})
    given += 5
    assert not np.any(get_params(state)["w"])
    array = jnp.ones(8)
    state = opt_init(array)
    jax.jit(lambda w: w + 1, donate_argnums=0)(array)
    assert np.array_equal(get_params(state), np.ones(8))


def test_parameters_that_were_donated_are_read_again(client):
    opt_init, opt_update, get_params = optwire.jax.optimizer(client, opt.sgd(0.5))
    add = jax.jit(lambda params: jax.tree.map(lambda leaf: leaf + 7, params), donate_argnums=0)
    state = opt_init({"w": jnp.ones(8), "none": None})
    for i in range(2):
        taken = get_params(state)
        add(taken)
        assert taken["w"].is_deleted()
        assert_same_bits(get_params(state), {"w": jnp.full(8, 1 - i / 2), "none": None})
        state = opt_update(i, {"w": jnp.ones(8), "none": None}, state)
    get_params(state)


def test_handles_do_not_add_up_and_sessions_live_on(server):
    with optwire.connect(server.target) as client:
        opt_init, opt_update, get_params = optwire.jax.optimizer(client, opt.sgd(0.5))
        before = len(server.server.streams)
        states = [opt_update(0, {"w": jnp.ones(3)}, opt_init({"w": jnp.ones(3)})) for _ in range(12)]
        wire.until(lambda: len(server.server.streams) - before <= 4, "streams given back")
        for state in states:
            assert np.array_equal(get_params(opt_update(1, {"w": jnp.ones(3)}, state))["w"], np.zeros(3))
        names = [info.name for info in client.list_sessions() if info.id in {state.session_id for state in states}]
        assert len(names) == 12
        for name in names:
            client.delete_session(name)


def test_double_precision_needs_x64(client):
    opt_init, opt_update, get_params = optwire.jax.optimizer(client, opt.sgd(0.5))
    params = {"w": np.ones(3)}
    with pytest.raises(optwire.TreeError, match=r"params\['w'\]: element type float64.*jax_enable_x64"):
        opt_init(params)
    with jax.enable_x64(True):
        state = opt_update(0, params, opt_init(params))
        assert get_params(state)["w"].dtype == np.float64


def test_bfloat16_stays_bfloat16(client):
    opt_init, opt_update, get_params = optwire.jax.optimizer(client, opt.sgd(0.5))
    params = jnp.ones(3, jnp.bfloat16)
    assert get_params(opt_update(0, params, opt_init(params))).dtype == jnp.bfloat16
