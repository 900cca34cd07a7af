"""Noise in updates: of the session's seed and the number of the update, and of nothing else.

The promise: "Randomness is seeded per session and a function of (seed, step)."
"""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optwire
from optwire import optax as remote
from optwire import optimizers as opt
from optwire_server import testing

Tree = dict[str, np.ndarray]

SHAPES = {"a": (50,), "b": (50,), "w": (20, 30)}
ZERO = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
STEPS = 8


def tree(seed: int) -> Tree:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}


GRADS = [tree(seed) for seed in range(1, STEPS + 1)]
NOISY = remote.noisy_sgd(0.5, eta=1.0, gamma=0.55)


def bits(params: Tree) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in params.items()}


def run(client: optwire.Client, spec: opt.Spec, seed: int, grads: list[Tree] | None = None) -> list[Tree]:
    """Parameters after each step."""
    with client.create_session(ZERO, spec, seed=seed) as session:
        return [session.step(g) for g in grads or GRADS]


def noise(path: list[Tree], grads: list[Tree], rate: float) -> list[Tree]:
    """What was added to each gradient, up to rounding."""
    before, found = ZERO, []
    for after, g in zip(path, grads, strict=True):
        found.append({name: (before[name] - after[name]).astype(float) / rate - g[name] for name in after})
        before = after
    return found


def test_a_seed_gives_the_same_bits_on_two_servers() -> None:
    paths = []
    for _ in range(2):
        with testing.serve() as serving, optwire.connect(serving.target) as client:
            if paths:  # the other one has had other sessions, and compiled other things, before
                run(client, remote.noisy_sgd(0.1), 1)
            paths.append([bits(params) for params in run(client, NOISY, 7)])
    assert paths[0] == paths[1]


def test_another_seed_gives_other_bits_in_every_leaf(client: optwire.Client) -> None:
    seeds = (0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1)
    ends = [bits(run(client, NOISY, seed, GRADS[:2])[-1]) for seed in seeds]
    for name in SHAPES:
        assert len({end[name] for end in ends}) == len(seeds)


def test_a_session_says_its_seed_and_has_zero_unless_told(client: optwire.Client) -> None:
    session = client.create_session(ZERO, NOISY, seed=2**64 - 1, name="seeded")
    assert session.info().seed == client.attach("seeded").info().seed == 2**64 - 1
    client.delete_session("seeded")
    plain = client.create_session(ZERO, NOISY)
    assert plain.info().seed == 0
    assert bits(plain.step(GRADS[0])) == bits(run(client, NOISY, 0)[0])
    for seed in (-1, 2**64, 1.5, True, None):
        with pytest.raises(optwire.InvalidArgumentError):
            client.create_session(ZERO, NOISY, seed=seed)  # type: ignore[arg-type]


def test_the_noise_of_a_step_is_the_same_whatever_the_gradients_are(client: optwire.Client) -> None:
    others = [{name: 3 * array for name, array in g.items()} for g in reversed(GRADS)]
    first, second = noise(run(client, NOISY, 3), GRADS, 0.5), noise(run(client, NOISY, 3, others), others, 0.5)
    for step in range(STEPS):
        for name in SHAPES:
            np.testing.assert_allclose(first[step][name], second[step][name], atol=1e-4)
            assert np.abs(first[step][name]).max() > 0.1


def test_the_noise_of_a_step_does_not_depend_on_other_sessions_or_on_how_it_came(server: testing.Serving) -> None:
    with optwire.connect(server.target, transport="unary") as client:
        quiet = [bits(params) for params in run(client, NOISY, 11)]
    done = threading.Event()

    def others() -> None:
        with optwire.connect(server.target) as own, own.create_session(ZERO, NOISY, seed=11) as session:
            while not done.is_set():
                session.step(GRADS[0])

    busy = threading.Thread(target=others)
    busy.start()
    try:
        with optwire.connect(server.target, transport="stream") as client:
            session = client.create_session(ZERO, NOISY, seed=11, name="in-turns")
            other = client.attach("in-turns")
            for step, g in enumerate(GRADS):
                # In turns by two workers; some ask for figures, some read before.
                worker = (session, other)[step % 2]
                if step % 3 == 0:
                    session.params()
                worker.params()
                assert bits(worker.step(g, telemetry=step % 2 == 0)) == quiet[step]
            client.delete_session("in-turns")
    finally:
        done.set()
        busy.join(30)


def test_changing_hyperparameters_leaves_the_noise_alone(client: optwire.Client) -> None:
    session = client.create_session(ZERO, NOISY, seed=5)
    path = [session.step(g) for g in GRADS[:4]]
    session.set_hyperparams(learning_rate=0.25)
    changed = [session.step(g) for g in GRADS[4:]]
    plain = run(client, NOISY, 5)
    assert [bits(params) for params in path] == [bits(params) for params in plain[:4]]
    for step in range(4, STEPS):
        before = path[-1] if step == 4 else changed[step - 5]
        moved = {name: 2 * (before[name] - changed[step - 4][name]) for name in SHAPES}
        for name in SHAPES:
            np.testing.assert_allclose(moved[name], plain[step - 1][name] - plain[step][name], atol=1e-4)


def test_skipped_and_rejected_pushes_use_up_no_noise(client: optwire.Client) -> None:
    bad = {name: np.full_like(array, np.nan) for name, array in ZERO.items()}
    for policy in ("skip", "reject"):
        spec = opt.on_nonfinite(NOISY, policy)
        calm = run(client, spec, 6)
        session = client.create_session(ZERO, spec, seed=6)
        for step, g in enumerate(GRADS):
            if policy == "skip":
                session.step(bad)
            else:
                with pytest.raises(optwire.NonFiniteError):
                    session.step(bad)
            assert bits(session.step(g)) == bits(calm[step])


def test_an_accumulation_draws_once_for_every_update(client: optwire.Client) -> None:
    doubled = [g for g in GRADS for _ in range(2)]
    gathered = run(client, opt.accumulate(remote.noisy_sgd(0.5, key=4), 2), 0, doubled)
    plain = run(client, remote.noisy_sgd(0.5, key=4), 0)
    for ours, theirs in zip(gathered[1::2], plain, strict=True):
        for name in SHAPES:  # two programs, rounded at different places
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("argument", ["key", "seed"])
def test_a_key_in_the_spec_overrides_the_sessions_seed_and_means_what_optax_means(
    client: optwire.Client, argument: str
) -> None:
    given: dict[str, Any] = {argument: 42}
    spec = remote.noisy_sgd(0.5, eta=1.0, gamma=0.55, **given)
    first, second = run(client, spec, 1), run(client, spec, 2)
    assert [bits(params) for params in first] == [bits(params) for params in second]
    update = optax.noisy_sgd(0.5, eta=1.0, gamma=0.55, key=42)
    params: Any = {name: jnp.asarray(leaf) for name, leaf in ZERO.items()}
    state, step = update.init(params), jax.jit(update.update)
    for number, g in enumerate(GRADS):
        changes, state = step(g, state, params)
        params = optax.apply_updates(params, changes)
        for name, leaf in first[number].items():
            np.testing.assert_allclose(leaf, params[name], rtol=1e-6, atol=1e-6)


def test_two_stages_and_two_groups_draw_different_noise(client: optwire.Client) -> None:
    zero = [ZERO] * 2
    draw = remote.add_noise(1.0, 0.0)
    # The same noise twice would cancel; two kinds add up to a variance of two.
    twice = run(client, opt.chain(draw, remote.scale(-1.0), draw, opt.sgd(1.0)), 9, zero)
    once = run(client, opt.chain(draw, opt.sgd(1.0)), 9, zero)
    assert np.std(once[0]["w"]) == pytest.approx(1.0, abs=0.15)
    assert np.std(twice[0]["w"]) == pytest.approx(2**0.5, abs=0.15)
    groups = opt.partition({"a": remote.noisy_sgd(1.0), "**": remote.noisy_sgd(1.0)})
    params = run(client, groups, 9, zero)[0]
    assert abs(np.corrcoef(params["a"], params["b"])[0, 1]) < 0.5


def test_leaves_and_steps_draw_independently_with_the_variance_of_the_formula(client: optwire.Client) -> None:
    """Neelakantan et al. (2015): variance eta / (1 + t) ** gamma, t from 0."""
    shape = {"u": np.zeros(20_000, np.float32), "v": np.zeros(20_000, np.float32)}
    session = client.create_session(shape, remote.noisy_sgd(1.0, eta=0.5, gamma=2.0), seed=12)
    before, drawn = shape, []
    for _ in range(3):
        after = session.step(shape)
        drawn.append({name: after[name].astype(float) - before[name] for name in after})
        before = after
    for t, values in enumerate(drawn):
        for array in values.values():
            assert np.std(array) == pytest.approx((0.5 / (1 + t) ** 2.0) ** 0.5, rel=0.03)
            assert abs(np.mean(array)) < 5 * np.std(array) / 20_000**0.5
    everything = np.stack([array for values in drawn for array in values.values()])
    assert np.abs(np.corrcoef(everything) - np.eye(6)).max() < 0.04
