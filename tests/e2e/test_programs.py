"""Optimizers that clients bring: they compute what the function they come from does; hostile ones are stopped.

The promise: "Bring your own optimizer (exported program)... A 5 kB Adam exported with a symbolic length runs on every
block. A hostile program (custom call, while-true, 10^12 elements, truncated bytes, random bytes) is refused or stopped,
the server goes on, other sessions feel nothing."
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export, lax
from tests import oracles
from tests.e2e import wire

import optwire
import optwire.jax
from optwire import optax as remote
from optwire import optimizers as opt
from optwire_server import testing
from optwire_server.engine import landing

Tree = dict[str, np.ndarray]

SHAPES: dict[str, tuple[int, ...]] = {
    "conv": (3, 3, 2, 4),
    "empty": (0, 3),
    "long": (5000,),
    "matrix": (17, 9),
    "one": (1,),
    "scalar": (),
}
# Reported by JAX once for each module that XLA compiles, on whichever thread.
COMPILED = "/jax/core/compile/backend_compile_duration"


def adam(step: Any, rate: Any, grad: Any, param: Any, mu: Any, nu: Any) -> Any:
    mu = 0.9 * mu + 0.1 * grad
    nu = 0.999 * nu + 0.001 * grad * grad
    count = (step + 1).astype(jnp.float32)
    return param - rate * (mu / (1 - 0.9**count)) / (jnp.sqrt(nu / (1 - 0.999**count)) + 1e-8), mu, nu


def tree(seed: int, dtype: Any = np.float32) -> Tree:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


PARAMS = tree(0)
GRADS = [tree(seed) for seed in range(1, 8)]


def bits(params: Tree) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in params.items()}


@pytest.fixture(scope="module")
def program() -> bytes:
    return optwire.jax.export_update(adam, slots=2)


@pytest.fixture(scope="module")
def trusting() -> Iterator[testing.Serving]:
    with testing.serve(allow_programs=True) as serving:
        yield serving


@pytest.fixture
def client(trusting: testing.Serving) -> Iterator[optwire.Client]:
    with optwire.connect(trusting.target) as client:
        yield client


class Local:
    """The same function run here, leaf by leaf in one compiled update, slots zero at first."""

    def __init__(self, params: Tree) -> None:
        self.state = {name: (leaf, np.zeros_like(leaf), np.zeros_like(leaf)) for name, leaf in params.items()}
        self.steps = 0
        self._update = jax.jit(
            lambda step, rate, grads, state: {name: adam(step, rate, grads[name], *own) for name, own in state.items()}
        )

    def step(self, rate: float, grads: Tree) -> Tree:
        self.state = self._update(np.int32(self.steps), np.float32(rate), grads, self.state)
        self.steps += 1
        return self.params

    @property
    def params(self) -> Tree:
        return {name: np.asarray(param) for name, (param, *_) in self.state.items()}


# ------------------------------------------------------------------------------------------------------ what it gives


def test_an_exported_adam_gives_the_bits_of_its_function_on_leaves_of_every_shape(
    client: optwire.Client, program: bytes
) -> None:
    assert len(program) < 8000  # two of which are the places in the source, deeper under pytest
    session = client.create_session(PARAMS, opt.exported(program, 1e-3))
    local = Local(PARAMS)
    for step in range(50):
        ours, theirs = session.step(GRADS[step % 7]), local.step(1e-3, GRADS[step % 7])
    # The replay traces the same operations in the same order, and the same compiler sees them.
    assert bits(ours) == bits(theirs)
    paper = oracles.adam(
        PARAMS["matrix"].astype(float), [GRADS[step % 7]["matrix"] for step in range(50)], [1e-3] * 50, 0.9, 0.999, 1e-8
    )
    np.testing.assert_allclose(ours["matrix"], paper, rtol=1e-5, atol=1e-6)
    assert session.describe().granularity == "element"
    assert session.info().state_bytes >= 3 * session.info().payload_bytes


def test_the_text_of_a_session_with_a_program_is_the_program(client: optwire.Client, program: bytes) -> None:
    session = client.create_session(PARAMS, opt.exported(program, 1e-3))
    described = session.describe()
    assert opt.parse(described.text) == session.info().spec
    again = client.create_session(PARAMS, described.text)
    assert again.info().spec_digest == described.spec_digest
    assert bits(again.step(GRADS[0])) == bits(session.step(GRADS[0]))


def test_learning_rates_are_operands_of_a_program(client: optwire.Client, program: bytes) -> None:
    session = client.create_session(PARAMS, opt.exported(program, 1e-3))
    local = Local(PARAMS)
    heard: list[str] = []

    def hear(event: str, duration_s: float, **_: Any) -> None:
        if event == COMPILED:
            heard.append(event)

    session.step(GRADS[0])
    local.step(1e-3, GRADS[0])
    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        for number, rate in enumerate((0.5, 1e-4, 0.0, 0.25), 1):
            assert session.set_hyperparams(learning_rate=rate) == number
            assert bits(session.step(GRADS[number])) == bits(local.step(rate, GRADS[number]))
            assert session.last_ack is not None
            assert session.last_ack.learning_rate == rate
        other = client.create_session(PARAMS, opt.exported(program, 0.125))
        other.step(GRADS[0])
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
    assert not heard
    # The other one started from the beginning, with slots of its own.
    assert bits(other.params()) == bits(Local(PARAMS).step(0.125, GRADS[0]))


def test_a_program_follows_a_schedule(client: optwire.Client, program: bytes) -> None:
    schedule = optax.exponential_decay(0.1, 2, 0.5)
    session = client.create_session(PARAMS, opt.exported(program, remote.exponential_decay(0.1, 2, 0.5)))
    local = Local(PARAMS)
    for step in range(6):
        ours = session.step(GRADS[step])
        theirs = local.step(float(schedule(step)), GRADS[step])
        assert session.last_ack is not None
        assert session.last_ack.learning_rate == pytest.approx(0.1 * 0.5 ** (step / 2), rel=1e-6)
    for name, leaf in ours.items():
        # The schedule is compiled into the update: its last digit may be another.
        np.testing.assert_allclose(leaf, theirs[name], rtol=1e-6, atol=1e-6)


def test_a_program_is_the_optimizer_of_a_group(client: optwire.Client, program: bytes) -> None:
    spec = opt.partition({"long": opt.exported(program, 1e-2), "**": opt.sgd(0.5)})
    session = client.create_session(PARAMS, spec)
    local = Local({"long": PARAMS["long"]})
    rest = {name: leaf.astype(np.float32) for name, leaf in PARAMS.items() if name != "long"}
    for g in GRADS:
        params = session.step(g)
        local.step(1e-2, {"long": g["long"]})
        rest = {name: leaf - np.float32(0.5) * g[name] for name, leaf in rest.items()}
    assert params["long"].tobytes() == local.params["long"].tobytes()
    for name, leaf in rest.items():
        np.testing.assert_allclose(params[name], leaf, rtol=1e-6, atol=1e-6)
    groups = {group.group: group.passes for group in session.describe().groups}
    assert groups == {"long": ("exported",), "**": ("sgd",)}


def test_a_program_for_one_shape_serves_the_group_of_that_shape(client: optwire.Client) -> None:
    def normalized(step: Any, rate: Any, grad: Any, param: Any) -> Any:
        return param - rate * grad / jnp.sqrt(jnp.sum(grad * grad, 0, keepdims=True))

    data = optwire.jax.export_update(normalized, slots=0, shape=(17, 9))
    spec = opt.partition({"matrix": opt.exported(data, 0.5), "**": remote.set_to_zero()})
    session = client.create_session(PARAMS, spec)
    g = GRADS[0]["matrix"].astype(float)
    params = session.step(GRADS[0])
    expected = PARAMS["matrix"] - 0.5 * g / np.linalg.norm(g, axis=0)
    np.testing.assert_allclose(params["matrix"], expected, rtol=1e-6, atol=1e-6)
    assert params["long"].tobytes() == PARAMS["long"].tobytes()
    with pytest.raises(optwire.TreeError, match=r"params\['conv'\]: shape \(3, 3, 2, 4\), and the program was"):
        client.create_session(PARAMS, opt.exported(data, 0.5))


def test_a_program_is_averaged_clipped_and_gathered_as_any_optimizer(client: optwire.Client, program: bytes) -> None:
    inner = opt.chain(remote.clip(0.5), opt.exported(program, 1e-2))
    session = client.create_session(PARAMS, opt.ema_params(opt.accumulate(inner, 2), decay=0.5))
    local = Local(PARAMS)
    average: dict[str, Any] = {name: leaf.astype(float) for name, leaf in PARAMS.items()}
    for first, second in zip(GRADS[:6:2], GRADS[1:6:2], strict=True):
        session.step(first)
        ours = session.step(second)
        means = {name: np.clip((first[name] + second[name]) / np.float32(2), -0.5, 0.5) for name in first}
        theirs = local.step(1e-2, means)
        average = {name: 0.5 * average[name] + 0.5 * ours[name] for name in average}
    for name, leaf in session.params("ema").items():
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(leaf, average[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_program_in_32_bits_serves_narrow_leaves_under_master_weights(
    client: optwire.Client, program: bytes, dtype: str
) -> None:
    narrow = jnp.dtype(dtype)
    start = tree(0, narrow)
    session = client.create_session(start, opt.master_weights(opt.exported(program, 1e-4)))
    local = Local({name: leaf.astype(np.float32) for name, leaf in start.items()})
    for step in range(20):
        g = tree(step % 7 + 1, narrow)
        ours = session.step(g)
        theirs = local.step(1e-4, {name: leaf.astype(np.float32) for name, leaf in g.items()})
    assert bits(ours) == bits({name: leaf.astype(narrow) for name, leaf in theirs.items()})
    with pytest.raises(optwire.TreeError, match="the program was exported for f32"):
        client.create_session(start, opt.exported(program, 1e-4))


def test_a_program_for_narrow_leaves_serves_them(client: optwire.Client) -> None:
    def update(step: Any, rate: Any, grad: Any, param: Any) -> Any:
        return param.astype(jnp.float32) - rate * grad.astype(jnp.float32)

    start = tree(0, jnp.bfloat16)
    data = optwire.jax.export_update(update, slots=0, dtype="bfloat16")
    g = tree(1, jnp.bfloat16)
    params = client.create_session(start, opt.exported(data, 0.25)).step(g)
    for name, leaf in params.items():
        expected = start[name].astype(np.float32) - np.float32(0.25) * g[name].astype(np.float32)
        np.testing.assert_array_equal(leaf, expected.astype(jnp.bfloat16))


# ----------------------------------------------------------------------------------------------------- what is refused


def _foreign(step: Any, rate: Any, grad: Any, param: Any) -> Any:
    return jax.ffi.ffi_call("system", jax.ShapeDtypeStruct(param.shape, param.dtype))(param)


def _for_ever(step: Any, rate: Any, grad: Any, param: Any) -> Any:
    return lax.while_loop(lambda x: True, lambda x: x + 1, param)


def _enormous(step: Any, rate: Any, grad: Any, param: Any) -> Any:
    return param + jnp.sum(jnp.full((10**6, 10**6), 0.5) * rate)


def _foreign_call() -> bytes:
    """A call of a function of the server's libraries, with the sign of it taken off the file."""
    leaf = jax.ShapeDtypeStruct((4,), jnp.float32)
    scalars = (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32))
    allowed = [export.DisabledSafetyCheck.custom_call("system")]
    made = export.export(jax.jit(_foreign), platforms=("cpu",), disabled_checks=allowed)(*scalars, leaf, leaf)
    return bytes(dataclasses.replace(made, disabled_safety_checks=()).serialize())


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "a custom call": lambda adam: _foreign_call(),
    "a loop that never ends": lambda adam: optwire.jax.export_update(_for_ever, slots=0),
    "10^12 elements": lambda adam: optwire.jax.export_update(_enormous, slots=0),
    "a file cut in half": lambda adam: adam[: len(adam) // 2],
    "a file without its last bytes": lambda adam: adam[:-64],  # the last eleven are a name that nothing needs
    "random bytes": lambda adam: np.random.default_rng(0).bytes(5000),
    "one byte": lambda adam: b"\0",
    "no bytes": lambda adam: b"",
}


def children() -> set[int]:
    """Processes that this one started and that are there, zombies too."""
    found = set()
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(path.parent.name))
    return found


@pytest.mark.slow
def test_hostile_programs_are_refused_and_other_sessions_feel_nothing(
    trusting: testing.Serving, client: optwire.Client, program: bytes
) -> None:
    before = children()
    live = client.create_session(PARAMS, opt.adam(1e-2), name="live")
    done = threading.Event()
    failures: list[BaseException] = []

    def pushes() -> None:
        try:
            while not done.wait(0.005):
                live.step(GRADS[live.step_count % 7])
        except BaseException as exc:  # noqa: BLE001  the test's own thread raises it
            failures.append(exc)

    pusher = threading.Thread(target=pushes)
    pusher.start()
    peer = wire.Peer(trusting.target)
    registry: Any = trusting.server.registry
    try:
        for what, make in HOSTILE.items():
            data = make(program)
            steps = live.step_count
            with pytest.raises(optwire.SpecError, match="program") as caught:
                client.create_session(PARAMS, opt.exported(data, 0.1), name="hostile")
            assert caught.value.expected, what
            assert not any(word in str(caught.value) for word in ("Traceback", ".py", "site-packages")), what
            failure = wire.Failure.of(lambda data=data: peer.create(PARAMS, opt.exported(data, 0.1), name="hostile"))  # type: ignore[misc]
            assert failure is not None
            assert failure.code == "INVALID_ARGUMENT", what
            assert failure.detail is not None
            assert failure.detail.reason == "INVALID_SPEC", what
            assert [info.name for info in client.list_sessions()].count("hostile") == 0
            assert not registry.creations._creating, what
            # The other session pushes meanwhile, so what is lent at any moment is room for one payload at most.
            assert registry._landings.lent_bytes <= landing.buffer_bytes(registry._table.by_name["live"].held.layout), (
                what
            )
            assert children() == before, what
            wire.until(lambda steps=steps: live.step_count > steps or bool(failures), "the other session goes on")  # type: ignore[misc]
    finally:
        done.set()
        pusher.join(30)
        peer.close()
    assert not failures
    steps = live.step_count
    final = bits(live.params())
    live.close()  # and its stream
    wire.until(wire.idle(trusting.server), "nothing is left of what was refused", 60)
    assert steps > 2 * len(HOSTILE)
    calm = client.create_session(PARAMS, opt.adam(1e-2))
    for step in range(steps):
        expected = calm.step(GRADS[step % 7])
    assert final == bits(expected)
    # The same server still takes programs, under the same name.
    good = client.create_session(PARAMS, opt.exported(program, 1e-3), name="hostile")
    assert bits(good.step(GRADS[0])) == bits(Local(PARAMS).step(1e-3, GRADS[0]))
    for name in ("live", "hostile"):
        client.delete_session(name)


def test_programs_are_refused_where_the_operator_does_not_allow_them(server: testing.Serving, program: bytes) -> None:
    before = children()
    with optwire.connect(server.target) as client:
        for spec in (opt.exported(program, 1e-3), opt.ema_params(opt.accumulate(opt.exported(program, 1e-3), 2))):
            with pytest.raises(optwire.UnsupportedError, match="takes no programs; its operator allows them"):
                client.create_session(PARAMS, spec, name="not-here")
            with pytest.raises(optwire.UnsupportedError, match="takes no programs"):
                client.create_session(PARAMS, str(spec), name="not-here")
        assert all(info.name != "not-here" for info in client.list_sessions())
    assert children() == before


def test_an_update_of_another_form_is_refused_before_it_is_sent() -> None:
    with pytest.raises(optwire.SpecError, match="returns .*, expected the parameter and 1 slots"):
        optwire.jax.export_update(lambda step, rate, grad, param, mu: param - rate * grad, slots=1)
    with pytest.raises(optwire.SpecError, match="expected the parameter and 0 slots"):
        optwire.jax.export_update(lambda step, rate, grad, param: jnp.sum(grad), slots=0)
