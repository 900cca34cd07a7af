"""The optimizers: their laws, their errors, and their bits against the seed, `jax.example_libraries.optimizers`.

What holds on the CPU, bit by bit, for all nine rules in float32, bfloat16, float16 and (under x64) float64:
a learning rate passed to the compiled update as an operand gives the bits of one compiled in, the exceptions being
`adam` on float32 scalars with a learning rate of exactly 1 (XLA drops the factor and regroups the divisions) and an
operand that is itself rounded (a float32 one for a float64 leaf; for float16, one time in some thousands);
a step gives the same bits as a Python int, NumPy or jax integer; donated or not; in a nested tree or a flat list.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.example_libraries import optimizers as seed

from optwire_server import optimizers

RULES = {
    "sgd": (),
    "momentum": (0.9,),
    "nesterov": (0.9,),
    "adagrad": (),
    "rmsprop": (),
    "rmsprop_momentum": (),
    "adam": (),
    "adamax": (),
    "sm3": (),
}
SCHEDULES = {
    "constant": (0.01,),
    "exponential_decay": (0.1, 7, 0.6),
    "inverse_time_decay": (0.1, 7, 0.6),
    "inverse_time_decay-staircase": (0.1, 7, 0.6, True),
    "polynomial_decay": (0.1, 10, 0.01),
    "polynomial_decay-quadratic": (0.1, 7, 0.0, 2),
    "piecewise_constant": ([3, 8], [0.1, 0.05, 0.02]),
}
HALVES = (jnp.bfloat16, jnp.float16)
DTYPES = (jnp.float32, *HALVES)
STEPS = 20

every_rule = pytest.mark.parametrize("rule", RULES)


def make(module, rule, step_size):
    return getattr(module, rule)(step_size, *RULES[rule])


def schedule_of(module, name):
    return getattr(module, name.partition("-")[0])(*SCHEDULES[name])


def weak_piecewise_constant(i):
    """The seed's schedule of that name without its strong type, with which it would promote half-precision params."""
    (first, second), (a, b, c) = SCHEDULES["piecewise_constant"]
    return jnp.where(i > second, c, jnp.where(i > first, b, a))


def draw(seed_number, shape, dtype):
    return jnp.asarray(np.random.default_rng(seed_number).standard_normal(shape), dtype)


@functools.cache
def nested(seed_number, dtypes=DTYPES):
    """All kinds of leaves in all kinds of containers; nobody may donate them."""
    keys = iter(range(100 * seed_number, 100 * seed_number + 100))
    return {
        "matrix": [draw(next(keys), (5, 7), dtype) for dtype in dtypes],
        "other": (
            {"scalar": tuple(draw(next(keys), (), dtype) for dtype in dtypes), "nothing": None},
            [draw(next(keys), (0,), dtype) for dtype in dtypes],
        ),
    }


def bits(tree):
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def slot_bits(opt_state):
    """The bits of every slot; in those of the seed's `sm3`, a leaf's shape follows and is left out."""
    return [[slot for slot in map(bits, slots) if "int" not in str(slot[0][0])] for slots in opt_state.packed_state]


def train(optimizer, params, grads, step=None, steps=None):
    init_fun, update_fun, _ = optimizer
    step = step or jax.jit(update_fun)
    opt_state = init_fun(params)
    for i, g in zip(steps or range(len(grads)), grads, strict=True):
        opt_state = step(i, g, opt_state)
    return opt_state


def assert_same_bits(ours, ours_state, theirs, theirs_state):
    assert bits(ours.params_fn(ours_state)) == bits(theirs.params_fn(theirs_state))
    assert slot_bits(ours_state) == slot_bits(theirs_state)


# --- bits of the seed -------------------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("name", SCHEDULES)
def test_bits_of_the_seed(rule, name):
    params, grads = nested(0), [nested(i + 1) for i in range(STEPS)]
    ours = make(optimizers, rule, schedule_of(optimizers, name))
    theirs = make(seed, rule, weak_piecewise_constant if name == "piecewise_constant" else schedule_of(seed, name))
    assert_same_bits(ours, train(ours, params, grads), theirs, train(theirs, params, grads))


@every_rule
def test_bits_of_the_seed_for_a_single_array(rule):
    for dtype in DTYPES:
        params, *grads = (draw(i, (37,), dtype) for i in range(STEPS + 1))
        ours, theirs = make(optimizers, rule, 0.01), make(seed, rule, 0.01)
        assert_same_bits(ours, train(ours, params, grads), theirs, train(theirs, params, grads))


def test_bits_of_the_seeds_own_piecewise_constant_in_float32():
    params, *grads = (nested(i, (jnp.float32,)) for i in range(STEPS + 1))
    ours, theirs = (make(module, "adam", schedule_of(module, "piecewise_constant")) for module in (optimizers, seed))
    assert_same_bits(ours, train(ours, params, grads), theirs, train(theirs, params, grads))


@every_rule
def test_bits_of_the_seed_in_float64(rule):
    with jax.enable_x64(True):
        params, *grads = (nested(i, (jnp.float64,)) for i in range(STEPS + 1))
        name = "piecewise_constant" if rule == "adam" else "exponential_decay"
        ours, theirs = (make(module, rule, schedule_of(module, name)) for module in (optimizers, seed))
        assert_same_bits(ours, train(ours, params, grads), theirs, train(theirs, params, grads))


@every_rule
def test_a_learning_rate_may_be_an_operand(rule):
    """One compiled update serves every learning rate, with the bits of an update compiled for that one; donated."""
    params, grads = nested(0), [nested(i + 1) for i in range(5)]

    @functools.partial(jax.jit, donate_argnums=3)
    def update(alpha, i, g, opt_state):
        return make(optimizers, rule, alpha).update_fn(i, g, opt_state)

    for operand in (np.float32(1e-3), 3e-6):  # the last is subnormal in float16
        alpha = round(float(operand), 6)
        ours, theirs = make(optimizers, rule, alpha), make(seed, rule, alpha)
        copied = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
        opt_state = train(ours, copied, grads, functools.partial(update, operand))
        assert_same_bits(ours, opt_state, theirs, train(theirs, params, grads))


def test_a_learning_rate_may_be_an_operand_in_float64():
    with jax.enable_x64(True):
        params, *grads = (nested(i, (jnp.float64,)) for i in range(6))
        update = jax.jit(lambda alpha, i, g, opt_state: optimizers.adam(alpha).update_fn(i, g, opt_state))
        ours, theirs = optimizers.adam(1e-3), seed.adam(1e-3)
        opt_state = train(ours, params, grads, functools.partial(update, 1e-3))
        assert_same_bits(ours, opt_state, theirs, train(theirs, params, grads))


def test_one_learning_rate_has_other_bits_as_an_operand():
    """The known exception: `1 * m / a / b` is compiled as `m / (a * b)` for scalars. If this fails, it is gone."""
    params, *grads = ([draw(100 * i + j, (), jnp.float32) for j in range(20)] for i in range(9))
    update = jax.jit(lambda alpha, i, g, opt_state: optimizers.adam(alpha).update_fn(i, g, opt_state))
    ours = optimizers.adam(1.0)
    baked, traced = train(ours, params, grads), train(ours, params, grads, functools.partial(update, 1.0))
    assert bits(baked) != bits(traced)
    np.testing.assert_allclose(ours.params_fn(baked), ours.params_fn(traced), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "name"), [*((rule, "exponential_decay") for rule in RULES), *(("sgd", name) for name in SCHEDULES)]
)
def test_the_type_of_the_step_does_not_matter(rule, name):
    params, grads = nested(0), [nested(i + 1) for i in range(6)]
    ours = make(optimizers, rule, schedule_of(optimizers, name))
    update = jax.jit(ours.update_fn)
    expected = bits(train(ours, params, grads, update))
    for integer in (np.int32, jnp.asarray):
        assert bits(train(ours, params, grads, update, [integer(i) for i in range(6)])) == expected


def test_the_type_of_the_step_does_not_matter_in_float64():
    with jax.enable_x64(True):
        params, *grads = (nested(i, (jnp.float64,)) for i in range(6))
        ours = optimizers.adam(optimizers.exponential_decay(0.1, 7, 0.6))
        expected = bits(train(ours, params, grads))
        for integer in (np.int32, np.int64):
            assert bits(train(ours, params, grads, steps=[integer(i) for i in range(5)])) == expected


@pytest.mark.parametrize("rule", ["sgd", "adam", "sm3"])
def test_containers_do_not_matter_to_the_bits(rule):
    params, *grads = (nested(i) for i in range(6))
    ours = make(optimizers, rule, 0.01)
    flat = train(ours, jax.tree.leaves(params), list(map(jax.tree.leaves, grads)))
    assert slot_bits(flat) == slot_bits(train(ours, params, grads))


# --- the seed's weaknesses, mended ------------------------------------------------------------------------------------


def test_sm3_gives_its_params_under_jit():
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(())}
    with pytest.raises(TypeError):
        jax.jit(seed.sm3(0.1).params_fn)(seed.sm3(0.1).init_fn(params))
    ours = optimizers.sm3(0.1)
    assert bits(jax.jit(ours.params_fn)(jax.jit(ours.init_fn)(params))) == bits(params)


def test_sm3_takes_an_empty_matrix():
    params = jnp.zeros((0, 3))
    with pytest.raises(ValueError, match="zero-size"):
        seed.sm3(0.1).update_fn(0, params, seed.sm3(0.1).init_fn(params))
    ours = optimizers.sm3(0.1)
    assert bits(ours.params_fn(jax.jit(ours.update_fn)(0, params, ours.init_fn(params)))) == bits(params)


@pytest.mark.parametrize("decay_steps", [7, 10, 30, 1000])
def test_polynomial_decay_of_a_fractional_power_stays_a_number(decay_steps):
    theirs, ours = (jax.jit(module.polynomial_decay(0.1, decay_steps, 0.01, 0.5)) for module in (seed, optimizers))
    assert np.isnan(theirs(decay_steps))
    assert ours(decay_steps) == ours(decay_steps + 5) == np.float32(0.01)
    before = range(0, decay_steps, max(decay_steps // 20, 1))
    assert [bits(ours(i)) for i in before] == [bits(theirs(i)) for i in before]


@pytest.mark.parametrize("power", [1, 1.0, 2, 3.0])
def test_polynomial_decay_of_a_whole_power_keeps_the_seeds_bits(power):
    theirs, ours = (jax.jit(module.polynomial_decay(0.1, 7, 0.01, power)) for module in (seed, optimizers))
    assert [bits(ours(i)) for i in range(12)] == [bits(theirs(i)) for i in range(12)]


@every_rule
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_or_step_changes_a_dtype(rule, name):
    params, grads = nested(0), nested(1)
    ours = make(optimizers, rule, schedule_of(optimizers, name))
    opt_state = ours.init_fn(params)
    for step in (3, np.int32(3), np.float32(3), jnp.asarray(3)):
        after = jax.eval_shape(ours.update_fn, step, grads, opt_state)
        assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(opt_state)]


@pytest.mark.parametrize("dtype", HALVES)
def test_the_seed_does_change_dtypes(dtype):
    params = jnp.ones(3, dtype)
    for name, step in (("exponential_decay", np.int32(3)), ("piecewise_constant", 3)):
        theirs = seed.sgd(schedule_of(seed, name))
        after = theirs.params_fn(jax.jit(theirs.update_fn)(step, params, theirs.init_fn(params)))
        assert after.dtype == jnp.float32


@every_rule
def test_a_strong_learning_rate_or_gradient_changes_no_dtype(rule):
    params, grads = nested(0, HALVES), jax.tree.map(lambda x: x.astype(jnp.float32), nested(1, HALVES))
    ours = make(optimizers, rule, jnp.float32(0.1))
    opt_state = ours.init_fn(params)
    after = jax.jit(ours.update_fn)(0, grads, opt_state)
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(opt_state)]


@every_rule
def test_float64_is_never_narrowed(rule):
    """A tree that jax would compute in 32 bits is computed in 64; its float32 leaves and other threads are not."""
    params, *grads = ({"wide": np.full((2, 3), 1.0 + i), "narrow": np.float32([1 + i, 2])} for i in range(4))
    ours = make(optimizers, rule, optimizers.exponential_decay(0.1, 3, 0.7))
    with jax.enable_x64(True):
        expected = ours.params_fn(train(ours, params, grads, ours.update_fn))["wide"]
    for steps in (range(3), [np.int32(i) for i in range(3)]):
        after = ours.params_fn(train(ours, params, grads, ours.update_fn, steps))
        assert after["wide"].dtype == np.float64
        assert after["narrow"].dtype == np.float32
        np.testing.assert_allclose(after["wide"], expected, rtol=1e-14)
    assert not jax.config.jax_enable_x64


@every_rule
def test_float64_is_not_narrowed_by_jit_either(rule):
    params, grads = {"wide": np.full((2, 3), 1.5)}, {"wide": np.full((2, 3), 0.25)}
    ours, theirs = make(optimizers, rule, 0.1), make(seed, rule, 0.1)
    narrowed = jax.jit(theirs.update_fn)(0, grads, theirs.init_fn(params))
    assert np.dtype(np.float64) not in {x.dtype for x in jax.tree.leaves(narrowed)}
    opt_state = ours.init_fn(params)
    with pytest.raises(TypeError, match=r"float32 for a leaf kept in float64.*enable_x64"):
        jax.jit(ours.update_fn)(0, grads, opt_state)
    with jax.enable_x64(True):
        after = jax.jit(ours.update_fn)(0, grads, opt_state)
    assert {x.dtype for x in jax.tree.leaves(after)} == {np.dtype(np.float64)}
    eager = ours.params_fn(ours.update_fn(0, grads, ours.init_fn(params)))
    np.testing.assert_allclose(ours.params_fn(after)["wide"], eager["wide"], rtol=1e-14)


# --- laws -------------------------------------------------------------------------------------------------------------


def square_loss(params):
    return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(params))


TREES = {
    "vector": jnp.ones(2),
    "scalar": jnp.ones(()),
    "number": 1.0,
    "pair": (jnp.ones(2), jnp.ones((2, 2))),
    "dict": {"x": jnp.ones(2), "y": [jnp.ones((1, 2, 3)), None]},
    "empty": {},
}


@every_rule
@pytest.mark.parametrize("tree", TREES)
def test_laws_of_the_three_functions(rule, tree):
    params = TREES[tree]
    init_fun, update_fun, get_params = make(optimizers, rule, 0.1)
    opt_state = init_fun(params)
    assert isinstance(opt_state, optimizers.OptimizerState)
    assert isinstance(opt_state.packed_state, tuple)
    assert bits(jax.tree.map(jnp.asarray, get_params(opt_state))) == bits(jax.tree.map(jnp.asarray, params))
    grads = jax.tree.map(jnp.ones_like, params)
    for update in (update_fun, jax.jit(update_fun)):
        after = update(0, grads, opt_state)
        assert jax.tree.structure(after) == jax.tree.structure(opt_state)
        assert jax.tree.structure(get_params(after)) == jax.tree.structure(params)
        assert all(x < 1 for x in map(np.max, jax.tree.leaves(get_params(after))))


@every_rule
def test_runs_converge(rule):
    params = {"x": jnp.ones(2), "y": (jnp.ones((2, 2)), jnp.ones(()))}
    mass = (0.5,) if rule in ("momentum", "nesterov") else ()
    optimizer = getattr(optimizers, rule)(0.1, *mass)
    gradient = jax.jit(jax.grad(square_loss))
    for update, steps in ((optimizer.update_fn, 60), (jax.jit(optimizer.update_fn), 150)):
        opt_state = optimizer.init_fn(params)
        for i in range(steps):
            opt_state = update(i, gradient(optimizer.params_fn(opt_state)), opt_state)
        assert square_loss(optimizer.params_fn(opt_state)) < 0.1


@pytest.mark.parametrize("name", SCHEDULES)
def test_runs_converge_along_schedules(name):
    optimizer = optimizers.sgd(schedule_of(optimizers, name))

    def body(i, opt_state):
        return optimizer.update_fn(i, jax.grad(square_loss)(optimizer.params_fn(opt_state)), opt_state)

    opt_state = jax.jit(lambda x: jax.lax.fori_loop(0, 300, body, optimizer.init_fn(x)))(jnp.ones(3))
    assert square_loss(optimizer.params_fn(opt_state)) < 1


@every_rule
def test_vmap_is_a_loop(rule):
    optimizer = make(optimizers, rule, optimizers.exponential_decay(0.1, 7, 0.6))
    params, grads = (jnp.stack([draw(3 * j + i, (2, 3), jnp.float32) for i in range(3)]) for j in range(2))

    def one(alpha, x, g):
        scaled = make(optimizers, rule, alpha)
        return scaled.params_fn(scaled.update_fn(1, g, optimizer.init_fn(x)))

    alphas = jnp.array([0.1, 0.2, 0.3])
    together = jax.vmap(one)(alphas, params, grads)
    apart = jnp.stack([one(*each) for each in zip(alphas, params, grads, strict=True)])
    np.testing.assert_allclose(together, apart, rtol=1e-6)


# jax itself warns where code outside the optimizer meets a float64 array while x64 is off.
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
@pytest.mark.parametrize("x0", [jnp.ones(1), np.ones(1)], ids=["float32", "float64"])
def test_a_run_can_be_differentiated(x0):
    optimizer = optimizers.sgd(0.1)

    def last(slope):
        def step(opt_state, i):
            grads = jax.grad(lambda x: jnp.sum(slope * x))(optimizer.params_fn(opt_state))
            return optimizer.update_fn(i, grads, opt_state), None

        opt_state, _ = jax.lax.scan(step, optimizer.init_fn(x0), jnp.arange(10))
        return optimizer.params_fn(opt_state)[0]

    assert jax.jacfwd(last)(0.5) == pytest.approx(-1.0, rel=1e-6)
    assert jax.jacrev(last)(0.5) == pytest.approx(-1.0, rel=1e-6)


@every_rule
def test_complex_leaves_have_the_seeds_bits(rule):
    params, *grads = (draw(2 * i, (5,), jnp.complex64) + 1j * draw(2 * i + 1, (5,), jnp.float32) for i in range(6))
    ours, theirs = (make(module, rule, 0.01) for module in (optimizers, seed))
    assert_same_bits(ours, train(ours, params, grads), theirs, train(theirs, params, grads))


def test_integer_leaves_move_by_integers_only():
    params, grads = jnp.array([5, 6]), jnp.array([1, -1])
    whole = optimizers.sgd(1)
    after = whole.params_fn(jax.jit(whole.update_fn)(0, grads, whole.init_fn(params)))
    assert after.dtype == params.dtype
    assert after.tolist() == [4, 7]
    for optimizer in (optimizers.sgd(0.5), optimizers.sgd(np.float32(0.5)), optimizers.adam(1)):
        with pytest.raises(TypeError, match=r"float32 does not fit a slot of dtype int32, shape \(2,\)"):
            optimizer.update_fn(0, grads, optimizer.init_fn(params))


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_tracing_a_schedule(name):
    schedule = schedule_of(optimizers, name)
    compiled = jax.jit(schedule)
    for i in (0, 3, 5, 9, 40):
        np.testing.assert_allclose(compiled(i), schedule(i), rtol=1e-5, atol=1e-8)


def test_make_schedule_takes_scalars_and_schedules():
    schedule = optimizers.constant(0.5)
    assert optimizers.make_schedule(schedule) is schedule
    for scalar in (0.5, np.float32(0.5), np.array(0.5), jnp.array(0.5)):
        assert optimizers.make_schedule(scalar)(7) == 0.5


@pytest.mark.parametrize("wrong", [None, "0.1", [0.1], np.ones(1), np.ones((2, 2))], ids=repr)
def test_make_schedule_refuses_the_rest(wrong):
    with pytest.raises(TypeError, match="a learning rate is a scalar or a schedule"):
        optimizers.make_schedule(wrong)


@pytest.mark.parametrize(
    ("boundaries", "values", "message"),
    [
        (1, [0.1, 0.2], "flat sequence"),
        ([1], 0.1, "flat sequence"),
        ([[1]], [0.1, 0.2], "flat sequence"),
        ([1, 2], [0.1, 0.2], "2 values need one boundary fewer, not 2"),
        ([], [], "0 values need one boundary fewer"),
    ],
)
def test_piecewise_constant_refuses_bad_boundaries(boundaries, values, message):
    with pytest.raises(ValueError, match=message):
        optimizers.piecewise_constant(boundaries, values)


# --- rules of one's own, and their errors -----------------------------------------------------------------------------


@optimizers.optimizer
def counted(step_size=0.1, *, faulty=False):
    """Gradient descent that counts its steps, with room for a fault."""

    def init(x0):
        return {"x": x0, "count": jnp.zeros((), jnp.int32)}

    def update(i, g, state):
        state = {"x": state["x"] - step_size * g, "count": state["count"] + 1}
        return state | {"fault": g} if faulty else state

    def get_params(state):
        return state["x"]

    return init, update, get_params


def test_a_rule_of_ones_own_works_on_trees():
    assert counted.__name__ == "counted"
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": (jnp.ones(()), None)}
    optimizer = counted(jnp.float32(0.5))
    assert isinstance(optimizer, optimizers.Optimizer)
    opt_state = train(optimizer, params, [params, params])
    after = optimizer.params_fn(opt_state)
    assert bits(after) == bits(jax.tree.map(jnp.zeros_like, params))
    assert [int(slots[0]) for slots in opt_state.packed_state] == [2, 2]


def test_a_rule_that_changes_its_structure_is_refused():
    optimizer = counted(faulty=True)
    opt_state = optimizer.init_fn(jnp.zeros(3))
    with pytest.raises(TypeError, match=r"changed the structure of its state from .*count.* to .*fault"):
        optimizer.update_fn(0, jnp.zeros(3), opt_state)


@pytest.mark.parametrize("grads", [(1.0,), {"x": 1.0, "z": 1.0}, {"x": 1.0, "y": None}, 1.0], ids=repr)
def test_grads_of_another_structure_are_refused(grads):
    optimizer = optimizers.momentum(0.1, 0.9)
    opt_state = optimizer.init_fn({"x": 1.0, "y": 2.0})
    for update in (optimizer.update_fn, jax.jit(optimizer.update_fn)):
        with pytest.raises(TypeError, match="grads do not have the structure of the params"):
            update(0, grads, opt_state)


# --- norms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, jnp.complex64])
def test_norm_and_clipping_have_the_seeds_bits(dtype):
    grads = {"a": draw(1, (5, 7), dtype), "b": [draw(2, (), dtype), draw(3, (0,), dtype), None]}
    assert bits(jax.jit(optimizers.l2_norm)(grads)) == bits(jax.jit(seed.l2_norm)(grads))
    for max_norm in (0.3, 1e4):
        ours = jax.jit(lambda g, most=max_norm: optimizers.clip_grads(g, most))(grads)
        theirs = jax.jit(lambda g, most=max_norm: seed.clip_grads(g, most))(grads)
        assert bits(ours) == bits(theirs)


def test_clipping_keeps_dtypes_whatever_the_norm_and_the_limit_are():
    grads = {"a": jnp.full(4, 2.0, jnp.bfloat16), "b": jnp.ones(2), "c": jnp.full(1, 3j)}
    for max_norm in (1.0, jnp.float32(1.0)):
        clipped = jax.jit(optimizers.clip_grads)(grads, max_norm)
        assert [x.dtype for x in clipped.values()] == [x.dtype for x in grads.values()]
        assert abs(optimizers.l2_norm(clipped)) == pytest.approx(1.0, rel=1e-2)


def test_the_norm_of_nothing_is_zero():
    assert optimizers.l2_norm({}) == 0
    assert optimizers.clip_grads({"a": None}, 1.0) == {"a": None}
