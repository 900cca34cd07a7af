"""Sessions whose leaves have parted ways go on as any other: the oracles, in 64 bits, know leaves and no blocks."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

import optwire
from optwire import optimizers as opt
from optwire_server import testing
from optwire_server.engine import cut

Tree = dict[str, np.ndarray]

# Leaves across the borders of blocks, one in several blocks, and one that has a block of its own.
SIZES = {"a": cut.SMALL - 5, "b": 7, "c": 2 * cut.SMALL + 3, "d": 1, "e": 900}
EVERY = tuple(SIZES)


def tree(seed: int, names: Sequence[str] = EVERY, dtype: Any = np.float32) -> Tree:
    made = {}
    for name in names:
        rng = np.random.default_rng([seed, ord(name)])
        made[name] = rng.standard_normal(SIZES.get(name, 300)).astype(np.float32).astype(dtype)
        if np.iscomplexobj(made[name]):
            made[name] += 1j * rng.standard_normal(made[name].size).astype(np.float32)
    return made


class Adam:
    """Adam in 64 bits, an instance for each leaf."""

    def __init__(self, params: Tree, rate: float) -> None:
        self.rate = rate
        self.leaves = {name: [leaf.astype(np.float64), 0.0, 0.0, 0] for name, leaf in params.items()}

    def push(self, grads: Mapping[str, np.ndarray]) -> None:
        for name, grad in grads.items():
            x, mu, nu, count = self.leaves[name]
            g = grad.astype(np.float64)
            mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g * g
            count += 1
            x = x - self.rate * (mu / (1 - 0.9**count)) / (np.sqrt(nu / (1 - 0.999**count)) + 1e-8)
            self.leaves[name] = [x, mu, nu, count]

    def assert_near(self, params: Tree) -> None:
        assert params.keys() == self.leaves.keys()
        for name, (x, *_) in self.leaves.items():
            np.testing.assert_allclose(params[name], x, rtol=2e-5, atol=2e-6, err_msg=name)


def some(seed: int, *names: str, like: Sequence[str] = EVERY) -> dict[str, np.ndarray | None]:
    grads = tree(seed, names)
    return {name: grads.get(name) for name in like}


def there(grads: Mapping[str, np.ndarray | None]) -> Tree:
    return {name: grad for name, grad in grads.items() if grad is not None}


def spans(server: testing.Serving, session: optwire.Session) -> list[tuple[int, ...]]:
    return [span.leaves for span in server.server.registry._table.by_name[session.name].held.spans]


@pytest.fixture
def apart(client: optwire.Client, server: testing.Serving) -> tuple[optwire.Session, Adam]:
    """A session four of whose leaves have parted ways, and the same in 64 bits."""
    params, rate = tree(0), 0.01
    session = client.create_session(params, opt.per_leaf(opt.torch_adam(rate)), name=secrets.token_hex(4))
    local = Adam(params, rate)
    assert spans(server, session) == [(0, 1, 2, 4), (3,)]
    for seed, names in enumerate((EVERY, ("a", "c", "d"), ("a", "b")), 1):
        grads = some(seed, *names)
        session.step(grads)
        local.push(there(grads))
    assert sorted(spans(server, session)) == [(0,), (1,), (2,), (3,), (4,)]
    local.assert_near(session.params())
    return session, local


def test_hyperparameters_change_for_leaves_that_are_apart(apart: tuple[optwire.Session, Adam]) -> None:
    session, local = apart
    session.set_hyperparams(learning_rate=0.2)
    local.rate = 0.2
    for seed, names in enumerate((("b", "e"), EVERY, ("c",)), 10):
        grads = some(seed, *names)
        session.step(grads)
        local.push(there(grads))
    local.assert_near(session.params())


def test_another_rule_takes_over_leaves_that_are_apart(
    client: optwire.Client, server: testing.Serving, apart: tuple[optwire.Session, Adam]
) -> None:
    """What is no operand compiles anew, and finds the spans as they are."""
    session, local = apart
    session.set_hyperparams(weight_decay=0.5)
    before = spans(server, session)
    for seed, names in enumerate((EVERY, ("a", "e")), 20):
        grads = some(seed, *names)
        session.step(grads)
        decayed = {name: grad + np.float32(0.5) * local.leaves[name][0] for name, grad in there(grads).items()}
        local.push(decayed)
    assert spans(server, session) == before
    local.assert_near(session.params())
    local.assert_near(client.attach(session.name).params())


def test_a_session_whose_leaves_are_apart_is_extended_and_goes_on(
    client: optwire.Client, server: testing.Serving, apart: tuple[optwire.Session, Adam]
) -> None:
    session, local = apart
    new = tree(7, ("f", "g"))
    counts = {name: array for name, array in session.state().arrays.items() if name.startswith("step/")}
    grown = client.create_session(tree(0) | new, opt.per_leaf(opt.torch_adam(0.01)), extends=session)
    after = grown.state().arrays
    assert {name: int(after[name]) for name in counts} == {name: int(count) for name, count in counts.items()}
    assert sorted(int(count) for count in counts.values()) == [1, 2, 2, 2, 3]
    local.leaves |= Adam(new, 0.01).leaves
    local.assert_near(grown.params())
    assert len(spans(server, grown)) == 5, "leaves of one count lie together again: of 0, 1, 2, 3, and of one element"
    every = (*EVERY, "f", "g")
    for seed, names in enumerate((every, ("a", "f"), ("b", "c", "g")), 30):
        grads = some(seed, *names, like=every)
        grown.step(grads)
        local.push(there(grads))
    local.assert_near(grown.params())


@pytest.mark.parametrize("spec", ["momentum(0.1, 0.9)", "per_leaf(momentum(0.1, 0.9))"])
def test_complex_leaves_lie_in_blocks_and_part_ways(client: optwire.Client, server: testing.Serving, spec: str) -> None:
    params = tree(0, dtype=np.complex64)
    session = client.create_session(params, spec, name=secrets.token_hex(4))
    live = server.server.registry._table.by_name[session.name]
    assert live.plan.program.granularity == "element"
    assert sum(len(span.blocks) for span in live.held.spans) > 3
    x = {name: leaf.astype(np.complex128) for name, leaf in params.items()}
    v = {name: np.zeros_like(leaf) for name, leaf in x.items()}
    for seed, names in enumerate((EVERY, ("a", "c") if spec.startswith("per_leaf") else EVERY, EVERY), 1):
        grads = tree(seed, names, np.complex64)
        got = session.step({name: grads.get(name) for name in EVERY})
        for name, grad in grads.items():
            v[name] = 0.9 * v[name] + grad
            x[name] = x[name] - 0.1 * v[name]
        for name, leaf in x.items():
            assert got[name].dtype == np.complex64
            np.testing.assert_allclose(got[name], leaf, rtol=1e-5, atol=1e-6, err_msg=name)
    assert len(live.held.spans) == (3 if spec.startswith("per_leaf") else 2)


@pytest.mark.parametrize("spec", ["adam(0.1)", "per_leaf(adagrad(0.1))", "optax.lion(0.1)"])
def test_complex_leaves_are_refused_where_the_rule_means_nothing_for_them(client: optwire.Client, spec: str) -> None:
    with pytest.raises(optwire.TreeError, match="is not defined for element type c64") as caught:
        client.create_session(tree(0, dtype=np.complex64), spec)
    assert caught.value.subject == "a"
