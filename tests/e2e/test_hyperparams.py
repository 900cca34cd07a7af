"""Hyperparameters that change while a session runs, against loops that change them at the same counts.

The promise: "session.set_hyperparams(learning_rate=…) and any numeric argument by path; takes effect at a named step,
is recorded with the session, visible in info, never recompiles for the learning rate. A schedule can be replaced while
running." That nothing recompiles is counted in ``test_compilations``.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tests import oracles
from tests.e2e import wire

import optwire
from optwire import optax as remote
from optwire import optimizers as opt
from optwire_proto import limits, sessions, specs
from optwire_server import testing

Tree = dict[str, np.ndarray]

SHAPES = {"body/w": (4, 3), "head/b": (3,), "head/w": (2, 3)}


def nest(flat: Tree) -> dict[str, Tree]:
    return {"body": {"w": flat["body/w"]}, "head": {"b": flat["head/b"], "w": flat["head/w"]}}


def flat(nested: Any) -> Tree:
    return {f"{outer}/{inner}": array for outer, leaves in nested.items() for inner, array in leaves.items()}


def tree(seed: int) -> dict[str, Tree]:
    rng = np.random.default_rng(seed)
    return nest({name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()})


PARAMS = tree(0)
GRADS = [tree(seed) for seed in range(1, 25)]


def close(ours: Any, theirs: Any, relative: float = 5e-6) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), relative, relative, err_msg=str(path))


def bits(params: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def by_leaf(rule: Callable[..., Any], rates: list[float], *arguments: Any) -> Any:
    """A rule of ``oracles`` on each leaf, for as many gradients as there are rates."""
    leaves = flat(PARAMS)
    grads = [flat(g) for g in GRADS[: len(rates)]]
    return nest(
        {
            name: rule(leaf.astype(float), [g[name].astype(float) for g in grads], rates, *arguments)
            for name, leaf in leaves.items()
        }
    )


def push(session: optwire.Session, steps: int) -> list[float]:
    """Pushes the gradients of the steps that the session is at; returns the learning rates used."""
    used = []
    for _ in range(steps):
        session.step(GRADS[session.step_count])
        assert session.last_ack is not None
        used.append(session.last_ack.learning_rate)
    return used


def optax_loop(pieces: list[tuple[Any, int]]) -> Any:
    """What a loop gives that changes its transformation, and keeps the state, after so many steps of each."""
    params: Any = jax.tree.map(jnp.asarray, PARAMS)
    state = pieces[0][0].init(params)
    count = itertools.count()
    for update, steps in pieces:
        step = jax.jit(update.update)
        for _ in range(steps):
            changes, state = step(GRADS[next(count)], state, params)
            params = optax.apply_updates(params, changes)
    return params


# ---------------------------------------------------------------------------------------------------- what is named


@pytest.mark.parametrize(
    "name",
    ["learning_rate", "adamw.learning_rate", "members[1].adamw.learning_rate", "chain.members[1].adamw.learning_rate"],
)
def test_a_number_is_named_by_keyword_by_path_and_by_the_end_of_a_path(client: optwire.Client, name: str) -> None:
    session = client.create_session(PARAMS, opt.chain(remote.clip_by_global_norm(1e6), remote.adamw(1e-2)))
    assert session.set_hyperparams({name: 3e-3}) == 0
    assert session.info().changes == (sessions.Change(0, (("chain.members[1].adamw.learning_rate", 3e-3),)),)
    assert push(session, 3) == [3e-3] * 3


@pytest.mark.parametrize("name", ["learning_rate", "step_size", "adam.learning_rate", "adam.step_size"])
def test_the_seeds_step_size_is_a_learning_rate_too(client: optwire.Client, name: str) -> None:
    session = client.create_session(PARAMS, opt.adam(1e-2))
    session.set_hyperparams({name: 3e-3})
    assert session.info().changes == (sessions.Change(0, (("adam.step_size", 3e-3),)),)
    push(session, 5)
    close(session.params(), by_leaf(oracles.adam, [3e-3] * 5, 0.9, 0.999, 1e-8))


def test_a_keyword_sets_a_number_and_the_next_step_uses_it(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, remote.sgd(0.1, momentum=0.9))
    push(session, 4)
    assert session.set_hyperparams(learning_rate=0.02) == 4
    assert push(session, 4) == [0.02] * 4
    info = session.info()
    assert info.learning_rate == 0.02
    assert not info.learning_rate_scheduled
    close(session.params(), by_leaf(oracles.momentum, [0.1] * 4 + [0.02] * 4, 0.9))


def test_groups_have_learning_rates_of_their_own(client: optwire.Client) -> None:
    spec = opt.partition({"head/**": remote.sgd(0.1), "**": remote.sgd(0.01)})
    session = client.create_session(PARAMS, spec)
    with pytest.raises(optwire.InvalidArgumentError, match="'learning_rate' means several: ") as caught:
        session.set_hyperparams(learning_rate=1.0)
    assert "transforms['head/**']" in caught.value.expected
    push(session, 2)
    assert session.set_hyperparams({"partition.transforms['head/**'].optax.sgd.learning_rate": 0.5}) == 2
    push(session, 2)
    assert session.set_hyperparams({"transforms['**'].optax.sgd.learning_rate": 0.25}) == 4
    push(session, 2)
    expected = flat(by_leaf(oracles.sgd, [0.1, 0.1, 0.5, 0.5, 0.5, 0.5]))
    expected["body/w"] = flat(by_leaf(oracles.sgd, [0.01, 0.01, 0.01, 0.01, 0.25, 0.25]))["body/w"]
    close(session.params(), nest(expected))
    knobs = {group.group: dict(group.knobs) for group in session.describe().groups}
    assert knobs["head/**"]["partition.transforms['head/**'].optax.sgd.learning_rate"] == 0.5
    assert knobs["**"]["partition.transforms['**'].optax.sgd.learning_rate"] == 0.25


def test_hundreds_of_groups_change_all_their_numbers_in_a_breath(client: optwire.Client) -> None:
    """Twelve numbers a group: what goes over all of them for each of them takes half a minute."""
    count = 240
    leaves = {f"g{i:03}": np.ones(1, np.float32) for i in range(count)}
    spec = opt.grouped(list(range(count)), *[opt.torch_sgd(0.1) for _ in range(count)])
    session = client.create_session(leaves, spec)
    paths = [path for path, value in specs.places(session.info().spec) if type(value) is float]
    rates = [path for path in paths if path.endswith("learning_rate")]
    assert len(rates) == count
    begun_s = time.monotonic()
    for k in range(10):
        session.set_hyperparams(
            {path if k % 2 else path.partition(".")[2]: 0.5 + i + k for i, path in enumerate(rates)}
        )
    with pytest.raises(optwire.InvalidArgumentError, match=f"{re.escape(repr(rates[3]))} and another name give"):
        session.set_hyperparams({**dict.fromkeys([path.partition(".")[2] for path in rates], 1.0), rates[3]: 2.0})
    with pytest.raises(optwire.InvalidArgumentError, match="'zz' is none of this session's"):
        session.set_hyperparams({**dict.fromkeys(paths, 0.25), "zz": 1.0})
    assert time.monotonic() - begun_s < 8, "measured: 1 s"
    after = session.step(leaves)
    np.testing.assert_allclose(list(after.values()), 1 - (9.5 + np.arange(count)[:, None]), 1e-6)


def test_so_many_names_make_a_change_and_no_more(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.sgd(0.1))
    names = {f"n{i}": 1.0 for i in range(limits.HYPERPARAM_NAMES_MAX + 1)}
    with pytest.raises(optwire.LimitError, match="16385 names in one change, expected at most 16384"):
        session.set_hyperparams(names)
    del names["n0"]
    with pytest.raises(optwire.InvalidArgumentError, match="'n1' is none"):
        session.set_hyperparams(names)


def test_several_change_together_or_not_at_all(client: optwire.Client) -> None:
    spec = opt.chain(remote.clip_by_global_norm(1.0), remote.adamw(1e-2, weight_decay=0.1))
    session = client.create_session(PARAMS, spec)
    before = session.info()
    wrong: list[tuple[type[Exception], dict[str, Any]]] = [
        (optwire.SpecError, {"learning_rate": 0.5, "max_norm": -1.0}),
        (optwire.SpecError, {"learning_rate": 0.5, "weight_decay": 0.2, "b1": 7}),
        (optwire.InvalidArgumentError, {"learning_rate": 0.5, "momentum": 0.9}),
        (optwire.InvalidArgumentError, {"learning_rate": 0.5, "adamw.learning_rate": 0.25}),
        (optwire.InvalidArgumentError, {"learning_rate": 0.5, "members": 1.0}),
        (optwire.SpecError, {"b1": 0.5, "learning_rate": remote.sgd(0.1)}),
    ]
    for kind, values in wrong:
        with pytest.raises(kind):
            session.set_hyperparams(values)
        assert session.info() == before
    assert push(session, 1) == [1e-2]
    session.set_hyperparams({"max_norm": 1e6}, learning_rate=0.1, weight_decay=0.0)
    changed = dict(session.info().changes[0].values)
    assert changed == {
        "chain.members[0].clip_by_global_norm.max_norm": 1e6,
        "chain.members[1].adamw.learning_rate": 0.1,
        "chain.members[1].adamw.weight_decay": 0.0,
    }
    push(session, 3)
    pieces = [
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1)), 1),
        (optax.chain(optax.clip_by_global_norm(1e6), optax.adamw(0.1, weight_decay=0.0)), 3),
    ]
    close(session.params(), optax_loop(pieces))


def test_how_many_pushes_make_a_step_cannot_change(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.accumulate(opt.sgd(0.1), 2))
    with pytest.raises(optwire.InvalidArgumentError, match="'k' is none of this session's"):
        session.set_hyperparams(k=3)


# -------------------------------------------------------------------------------------------------------------- when


def test_a_change_takes_effect_exactly_at_the_step_it_names(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, remote.adam(1e-2))
    assert session.set_hyperparams(learning_rate=0.1, from_step=3) == 3
    assert session.info().learning_rate == 1e-2
    assert push(session, 3) == [1e-2] * 3
    assert session.info().learning_rate == 0.1
    assert push(session, 3) == [0.1] * 3
    close(session.params(), by_leaf(oracles.adam, [1e-2] * 3 + [0.1] * 3, 0.9, 0.999, 1e-8))


def test_two_changes_wait_for_their_steps_whichever_was_made_first(client: optwire.Client) -> None:
    for order in ((2, 4), (4, 2)):
        session = client.create_session(PARAMS, remote.sgd(0.1))
        for step in order:
            assert session.set_hyperparams(learning_rate=step / 10, from_step=step) == step
        assert [change.from_step for change in session.info().changes] == list(order)
        assert push(session, 6) == [0.1, 0.1, 0.2, 0.2, 0.4, 0.4]


def test_a_change_before_a_pending_one_keeps_it(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, remote.sgd(0.1, momentum=0.5))
    session.set_hyperparams(learning_rate=0.4, from_step=4)
    session.set_hyperparams(momentum=0.9, from_step=2)
    session.set_hyperparams(learning_rate=0.2)
    assert push(session, 6) == [0.2] * 4 + [0.4] * 2
    assert "momentum=0.9" in str(session.info().spec)
    pieces = [(optax.sgd(0.2, 0.5), 2), (optax.sgd(0.2, 0.9), 2), (optax.sgd(0.4, 0.9), 2)]
    close(session.params(), optax_loop(pieces))


def test_changes_of_one_step_add_up_and_the_last_one_wins(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, remote.sgd(0.1, momentum=0.5))
    session.set_hyperparams(learning_rate=0.3, from_step=2)
    session.set_hyperparams(momentum=0.9, from_step=2)
    session.set_hyperparams(learning_rate=0.2, from_step=2)
    assert push(session, 4) == [0.1, 0.1, 0.2, 0.2]
    close(session.params(), optax_loop([(optax.sgd(0.1, 0.5), 2), (optax.sgd(0.2, 0.9), 2)]))


def test_a_change_goes_into_a_schedule_that_was_set_for_the_same_step(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, remote.sgd(0.1))
    session.set_hyperparams(learning_rate=remote.exponential_decay(0.5, 1, 0.5), from_step=2)
    session.set_hyperparams({"exponential_decay.decay_rate": 0.1}, from_step=2)
    assert push(session, 3) == pytest.approx([0.1, 0.1, 0.5 * 0.1**2], rel=1e-6)
    # Another one in its place takes what was set inside with it, also when an earlier change is made later.
    session.set_hyperparams(learning_rate=remote.exponential_decay(0.5, 1, 0.5), from_step=5)
    session.set_hyperparams({"exponential_decay.decay_rate": 0.1}, from_step=5)
    session.set_hyperparams(learning_rate=0.25, from_step=5)
    session.set_hyperparams(learning_rate=0.7, from_step=4)
    assert push(session, 3) == pytest.approx([0.5 * 0.1**3, 0.7, 0.25], rel=1e-6)


def test_a_change_that_would_lose_a_pending_one_is_refused(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, remote.sgd(remote.exponential_decay(0.5, 1, 0.5)))
    session.set_hyperparams({"exponential_decay.decay_rate": 0.1}, from_step=4)
    before = session.info()
    with pytest.raises(optwire.InvalidArgumentError, match="decay_rate is to change at step 4, and would not be there"):
        session.set_hyperparams(learning_rate=0.5, from_step=2)
    assert session.info() == before
    session.set_hyperparams(learning_rate=0.5, from_step=4)
    assert push(session, 5) == pytest.approx([0.5, 0.25, 0.125, 0.0625, 0.5], rel=1e-6)


def test_a_step_that_has_passed_is_refused(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, remote.sgd(0.1))
    push(session, 3)
    with pytest.raises(optwire.InvalidArgumentError, match="from_step 2, but the next step is 3"):
        session.set_hyperparams(learning_rate=0.5, from_step=2)
    assert session.set_hyperparams(learning_rate=0.5, from_step=3) == 3
    assert push(session, 1) == [0.5]
    for step in (-1, 1.5, True, 2**64):
        with pytest.raises(optwire.InvalidArgumentError):
            session.set_hyperparams(learning_rate=0.5, from_step=step)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("transport", ["unary", "stream"])
def test_a_schedule_gives_way_to_a_number_and_to_a_schedule_again(server: testing.Serving, transport: str) -> None:
    first = (0.1, 5, 0.5)
    second = (0.0, 0.05, 4, 20)
    with optwire.connect(server.target, transport=transport) as client:
        session = client.create_session(PARAMS, remote.adamw(remote.exponential_decay(*first)))
        used = push(session, 5)
        assert session.info().learning_rate_scheduled
        session.set_hyperparams(learning_rate=0.03)
        used += push(session, 4)
        assert not session.info().learning_rate_scheduled
        session.set_hyperparams(learning_rate=remote.warmup_cosine_decay_schedule(*second), from_step=12)
        used += push(session, 6)
        assert session.info().learning_rate_scheduled
        params = session.params()
    before, after = optax.exponential_decay(*first), optax.warmup_cosine_decay_schedule(*second)
    expected = [float(before(i)) for i in range(5)] + [0.03] * 7 + [float(after(i)) for i in range(12, 15)]
    assert used == pytest.approx(expected, rel=1e-6)
    pieces = [(optax.adamw(before), 5), (optax.adamw(lambda count: 0.03), 7), (optax.adamw(after), 3)]
    close(params, optax_loop(pieces))


def test_the_seeds_schedules_are_replaced_as_well(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.adam(0.1))
    used = push(session, 3)
    session.set_hyperparams(learning_rate=opt.exponential_decay(0.2, 4, 0.5))
    used += push(session, 4)
    session.set_hyperparams(step_size=opt.polynomial_decay(0.1, 20, 0.01))
    used += push(session, 3)
    session.set_hyperparams(learning_rate=0.05)
    used += push(session, 2)
    expected = [0.1] * 3 + [0.2 * 0.5 ** (i / 4) for i in range(3, 7)]
    expected += [oracles.polynomial_decay(i, 0.1, 20, 0.01) for i in range(7, 10)] + [0.05] * 2
    assert used == pytest.approx(expected, rel=1e-6)
    close(session.params(), by_leaf(oracles.adam, expected, 0.9, 0.999, 1e-8))


def test_an_argument_of_a_schedule_changes_in_place(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.sgd(opt.exponential_decay(0.2, 2, 0.5)))
    used = push(session, 2)
    session.set_hyperparams(decay_rate=0.25)
    used += push(session, 2)
    session.set_hyperparams({"sgd.step_size.exponential_decay.step_size": 0.4})
    used += push(session, 2)
    expected = [0.2 * 0.5 ** (i / 2) for i in (0, 1)]
    expected += [0.2 * 0.25 ** (i / 2) for i in (2, 3)] + [0.4 * 0.25 ** (i / 2) for i in (4, 5)]
    assert used == pytest.approx(expected, rel=1e-6)


def test_weight_decay_and_b1_take_effect_in_the_update(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, remote.adamw(1e-2, weight_decay=0.1))
    push(session, 4)
    session.set_hyperparams(weight_decay=0.9)
    push(session, 4)
    session.set_hyperparams(b1=0.5)
    push(session, 4)
    pieces = [
        (optax.adamw(1e-2, weight_decay=0.1), 4),
        (optax.adamw(1e-2, weight_decay=0.9), 4),
        (optax.adamw(1e-2, b1=0.5, weight_decay=0.9), 4),
    ]
    close(session.params(), optax_loop(pieces))


def test_a_wrappers_number_takes_effect(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.ema_params(opt.sgd(0.1), decay=0.5))
    average: Any = jax.tree.map(lambda leaf: leaf.astype(float), PARAMS)
    session.set_hyperparams(decay=0.9, from_step=3)
    for step in range(6):
        params = session.step(GRADS[step])
        decay = 0.5 if step < 3 else 0.9
        average = jax.tree.map(lambda e, leaf, d=decay: d * e + (1 - d) * leaf, average, params)
        close(session.params("ema"), average)


# -------------------------------------------------------------------------------------------- recorded and described


def test_changes_are_recorded_with_the_session_and_its_spec_is_the_one_in_effect(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, remote.adamw(1e-2), name="recorded")
    assert session.info().changes == ()
    digests = [session.info().spec_digest]
    push(session, 2)
    session.set_hyperparams(learning_rate=5e-3)
    digests.append(session.info().spec_digest)
    session.set_hyperparams(weight_decay=0.5, from_step=4)
    assert session.info().spec_digest == digests[-1], "what is to come is not in effect"
    push(session, 2)
    digests.append(session.info().spec_digest)
    assert len(set(digests)) == 3
    info = session.info()
    assert info.changes == (
        sessions.Change(2, (("adamw.learning_rate", 5e-3),)),
        sessions.Change(4, (("adamw.weight_decay", 0.5),)),
    )
    assert info.spec["learning_rate"] == 5e-3
    assert info.spec["weight_decay"] == 0.5
    assert client.attach("recorded").info() == info
    described = session.describe()
    assert described.step == 4
    assert described.text == str(info.spec)
    assert described.spec_digest == info.spec_digest
    knobs = dict(described.groups[0].knobs)
    assert knobs["adamw.learning_rate"] == 5e-3
    assert knobs["adamw.weight_decay"] == 0.5
    assert knobs["adamw.b1"] == 0.9
    client.delete_session("recorded")


def test_describe_says_what_the_next_step_will_run_with(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, remote.sgd(0.1))
    session.set_hyperparams(learning_rate=remote.cosine_decay_schedule(0.5, 10), from_step=1)
    assert dict(session.describe().groups[0].knobs)["optax.sgd.learning_rate"] == 0.1
    push(session, 1)
    shown = dict(session.describe().groups[0].knobs)["optax.sgd.learning_rate"]
    assert isinstance(shown, opt.Spec)
    assert shown.name == "cosine_decay_schedule"
    assert shown["init_value"] == 0.5


def test_the_newest_changes_are_kept(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.sgd(0.1))
    for number in range(1200):
        session.set_hyperparams(learning_rate=float(number))
    info = session.info()
    assert len(info.changes) == 1024
    assert [dict(change.values)["sgd.step_size"] for change in info.changes] == [float(n) for n in range(176, 1200)]
    assert info.learning_rate == 1199.0
    assert push(session, 1) == [1199.0]


def test_changes_wait_for_so_many_steps_and_no_more(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.sgd(0.1))
    for step in range(256, 0, -1):
        session.set_hyperparams(learning_rate=float(step), from_step=step)
    before = session.info()
    with pytest.raises(optwire.LimitError, match="waiting for 256 steps to come"):
        session.set_hyperparams(learning_rate=0.5, from_step=300)
    assert session.info() == before
    # What is in effect, and a step that has a change already, are no more of them.
    session.set_hyperparams(learning_rate=0.25)
    session.set_hyperparams(learning_rate=7.5, from_step=2)
    assert push(session, 3) == [0.25, 1.0, 7.5]
    # As steps pass there is room again.
    for step in (300, 301, 302):  # 1 and 2 are over, and 3 is in effect
        session.set_hyperparams(learning_rate=0.5, from_step=step)
    with pytest.raises(optwire.LimitError):
        session.set_hyperparams(learning_rate=0.5, from_step=303)


# ---------------------------------------------------------------------------------------------- ends, retries, races


def test_a_session_that_is_gone_takes_no_change(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.sgd(0.1), name="gone")
    client.delete_session("gone")
    with pytest.raises(optwire.SessionNotFoundError, match="session 'gone'"):
        session.set_hyperparams(learning_rate=0.2)
    session.close()
    with pytest.raises(optwire.DetachedError):
        session.set_hyperparams(learning_rate=0.2)


def test_a_session_that_failed_takes_no_change() -> None:
    with testing.serve() as serving, optwire.connect(serving.target) as client:
        session = client.create_session(PARAMS, opt.adam(0.1), name="doomed")
        # What a device does that goes away in the middle of an update.
        for leaf in jax.tree.leaves(serving.server.registry._table.by_name["doomed"].held.state):
            leaf.delete()
        with pytest.raises(optwire.SessionFailedError):
            session.step(GRADS[0])
        with pytest.raises(optwire.SessionFailedError):
            session.set_hyperparams(learning_rate=0.2)
        assert session.info().changes == ()


def test_a_retry_after_a_change_reports_the_rate_that_was_used(client: optwire.Client, peer: wire.Peer) -> None:
    made = peer.create(PARAMS, opt.sgd(0.1), name="retried")
    payload = wire.payload_of(GRADS[0])
    first = peer.step(wire.push(made, 1, 0), payload)
    assert first.ack.learning_rate == 0.1
    session = client.attach("retried")
    session.set_hyperparams(learning_rate=0.7)
    again = peer.step(wire.push(made, 1, 0), payload)
    assert again.ack.duplicate
    assert again.ack.learning_rate == 0.1
    assert again.payload == first.payload
    second = peer.step(wire.push(made, 2, 1), payload)
    assert not second.ack.duplicate
    assert second.ack.learning_rate == 0.7
    client.delete_session("retried")


def test_pushes_and_changes_at_the_same_time_leave_steps_without_gaps_and_rates_that_were_set(
    server: testing.Serving, client: optwire.Client
) -> None:
    client.create_session(PARAMS, remote.adamw(1.0), name="busy").close()
    acks: list[sessions.Ack] = []
    rates = {1.0}
    failures: list[BaseException] = []
    done = threading.Event()

    def pushes() -> None:
        try:
            with optwire.connect(server.target) as own, own.attach("busy") as session:
                session.params()
                mine = 0
                while mine < 60:
                    try:
                        session.step(GRADS[mine % len(GRADS)])
                    except optwire.StaleStepError:
                        session.params()
                        continue
                    mine += 1
                    assert session.last_ack is not None
                    acks.append(session.last_ack)
        except BaseException as exc:  # noqa: BLE001  the test's own thread raises it
            failures.append(exc)

    def changes() -> None:
        try:
            with optwire.connect(server.target) as own, own.attach("busy") as session:
                for number in itertools.count(2):
                    if done.is_set():
                        return
                    rates.add(float(number))
                    decay = {"weight_decay": 0.01 * (1 + number % 3)} if number % 20 == 0 else {}
                    at = session.set_hyperparams(decay, learning_rate=float(number))
                    assert at <= session.info().step
        except BaseException as exc:  # noqa: BLE001
            failures.append(exc)

    pushers = [threading.Thread(target=pushes) for _ in range(2)]
    changer = threading.Thread(target=changes)
    for thread in (*pushers, changer):
        thread.start()
    for thread in pushers:
        thread.join(60)
    done.set()
    changer.join(60)
    assert not failures
    acks.sort(key=lambda ack: ack.applied_step)
    assert [ack.applied_step for ack in acks] == list(range(1, 121))
    assert {ack.learning_rate for ack in acks} <= rates
    used = [ack.learning_rate for ack in acks]
    assert used == sorted(used), "a later step never goes back to an earlier rate"
    assert len(set(used)) > 5
    recorded = client.attach("busy").info().changes
    assert [change.from_step for change in recorded] == sorted(change.from_step for change in recorded)
    client.delete_session("busy")
