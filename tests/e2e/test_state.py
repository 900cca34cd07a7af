"""Whole states by name: what was read can be loaded again, bit for bit; what cannot be loaded changes nothing.

And sessions that grow: what was there goes on as if nothing had happened, what is new starts fresh.
"""

from __future__ import annotations

import pathlib
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from tests.e2e import catalogue_samples, wire

import optwire
from optwire import optimizers as opt
from optwire_proto import convert, trees
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_server import testing

BF16 = ml_dtypes.bfloat16
PARAMS = {
    "encoder": {"kernel": np.linspace(-1, 1, 1500, dtype=np.float32).reshape(30, 50), "bias": np.ones(3, np.float32)},
    "scale": np.float32(2.0),
    "nothing": np.zeros((0, 4), np.float32),
}
NARROW = {"w": np.linspace(-1, 1, 60).astype(BF16).reshape(12, 5), "b": np.ones(2, np.float32)}
WIDE = {"w": np.linspace(-1, 1, 60).reshape(12, 5), "b": np.ones(2, np.float32)}

SPECS = [
    ("adam(0.01)", PARAMS),
    ("momentum(0.01, 0.9)", PARAMS),
    ("sm3(0.01)", PARAMS),
    ("adagrad(0.01)", WIDE),
    ("adam(exponential_decay(0.1, 2, 0.5))", PARAMS),
    ("optax.adam(0.01)", PARAMS),
    ("optax.adam(0.01)", WIDE),
    ("optax.adam(optax.exponential_decay(0.1, 2, 0.5))", PARAMS),
    ("optax.adafactor(0.01, min_dim_size_to_factor=8)", PARAMS),
    ("chain(clip_by_global_norm(1.0), optax.adam(0.01))", PARAMS),
    ("partition({'encoder/**': optax.adam(0.01), '**': optax.sgd(0.1, momentum=0.9)})", PARAMS),
    ("partition({'encoder/**': optax.adam(0.01), '**': momentum(0.1, 0.9)})", PARAMS),
    ("ema_params(optax.adam(0.01), 0.9, debias=True)", PARAMS),
    ("master_weights(optax.adam(0.01), 'float32')", NARROW),
    ("optax.adam(0.01)", NARROW),
    ("accumulate(optax.adam(0.01), 3)", PARAMS),
    ("on_nonfinite(accumulate(adam(0.01), 2), 'skip')", PARAMS),
    ("accumulate(on_nonfinite(optax.adam(0.01), 'skip'), 2)", PARAMS),
    ("chain(add_noise(0.1, 0.55, 3), optax.sgd(0.01))", PARAMS),
    ("lookahead(optax.sgd(0.1), 3, 0.5)", PARAMS),
    ("per_leaf(torch_adamw(0.01, amsgrad=True))", PARAMS),
    ("per_leaf(adam(0.01))", PARAMS),
    ("grouped([0, 1, 0, 1], per_leaf(torch_adamw(0.01)), per_leaf(torch_sgd(0.1, momentum=0.9)))", PARAMS),
]


def grads(step: int, params: Any = PARAMS) -> Any:
    """Gradients of a step, some of them not finite where the step says so."""
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda leaf: rng.normal(size=np.shape(leaf)).astype(np.asarray(leaf).dtype), params)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def bits_of(state: optwire.State) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in state.arrays.items()}


def train(session: optwire.Session, start: int, stop: int, params: Any = PARAMS) -> list[list[bytes]]:
    """Parameters after each step, bit for bit; the second gradient of those that are skipped is infinite."""
    seen = []
    for step in range(start, stop):
        pushed = grads(step, params)
        if step == 1 and "on_nonfinite" in session.describe().text:
            pushed["scale"] = np.float32(np.inf)
        seen.append(bits(session.step(pushed)))
    return seen


@pytest.fixture(scope="module")
def trusting() -> Iterator[optwire.Client]:
    """A client of a server that takes programs."""
    with testing.serve(allow_programs=True) as serving, optwire.connect(serving.target) as client:
        yield client


@pytest.fixture
def session(client: optwire.Client) -> Iterator[optwire.Session]:
    with client.create_session(PARAMS, "optax.adam(0.01)") as made:
        made.step(grads(0))
        yield made
    client.delete_session(made.name)


# ------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize(("spec", "params"), SPECS, ids=[f"{spec}-{len(params)}" for spec, params in SPECS])
def test_a_loaded_state_goes_on_bit_for_bit(client: optwire.Client, spec: str, params: Any):
    session = client.create_session(params, spec, seed=5)
    train(session, 0, 4, params)
    state = session.state()
    expected = train(session, 4, 9, params)
    session.load_state(state)
    assert session.step_count == session.info().step == state.step == 4
    assert bits_of(session.state()) == bits_of(state)
    assert train(session, 4, 9, params) == expected
    fresh = client.create_session(params, spec, seed=6)
    fresh.load_state(state)
    assert train(fresh, 4, 9, params) == expected
    assert bits_of(fresh.state()) == bits_of(session.state())


# Every third: states differ by what they are made of, and the whole list takes minutes. All of them did, when measured.
@pytest.mark.slow
@pytest.mark.parametrize("entry", sorted(catalogue_samples.entries())[::3])
def test_entries_of_the_catalogue_go_on_bit_for_bit_elsewhere(trusting: optwire.Client, entry: str):
    sample = catalogue_samples.sample(entry, "float32")
    params = jax.tree.map(
        lambda shape: np.full(shape, 0.5, np.float32), sample.shapes, is_leaf=lambda node: isinstance(node, tuple)
    )
    loss = 0.5 if sample.wants_loss else None
    session, other = (trusting.create_session(params, sample.spec, seed=seed) for seed in (3, 4))
    for step in range(3):
        session.step(grads(step, params), loss=loss)
    other.load_state(session.state())
    for step in range(3, 6):
        assert bits(session.step(grads(step, params), loss=loss)) == bits(other.step(grads(step, params), loss=loss))
    assert bits_of(session.state()) == bits_of(other.state())


@pytest.mark.parametrize(("spec", "params"), SPECS, ids=[f"{spec}-{len(params)}" for spec, params in SPECS])
def test_parameters_are_a_slot_of_every_optimizer(client: optwire.Client, spec: str, params: Any):
    session = client.create_session(params, spec)
    shown = train(session, 0, 2, params)[-1]
    arrays = session.state().arrays
    kept = [arrays[f"params/{leaf.name}"] for leaf in trees.flatten(params).spec.leaves]
    narrow = [
        np.asarray(array, np.asarray(leaf).dtype) for array, leaf in zip(kept, jax.tree.leaves(params), strict=True)
    ]
    assert bits(narrow) == shown
    assert sum(array.nbytes for name, array in arrays.items() if name != "state/skipped") == session.info().state_bytes


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("sgd(0.1)", ["params/a/w", "params/b"]),
        ("adam(0.1)", ["params/a/w", "params/b", "slot1/a/w", "slot1/b", "slot2/a/w", "slot2/b"]),
        (
            "chain(clip_by_global_norm(1.0), optax.adam(0.1))",
            ["mu/a/w", "mu/b", "nu/a/w", "nu/b", "params/a/w", "params/b", "state/0.count", "state/1.count"],
        ),
        (
            "per_leaf(torch_adamw(0.1))",
            [f"{slot}/{leaf}" for slot in ("exp_avg", "exp_avg_sq", "params", "step") for leaf in ("a/w", "b")],
        ),
        (
            "partition({'a/*': optax.sgd(0.1, momentum=0.9), '*': momentum(0.1, 0.9)})",
            ["params/a/w", "params/b", "slot1/b", "state/count", "trace/a/w"],
        ),
        (
            "chain(trace(0.9), trace(0.8), sgd(0.1))",
            ["0.trace/a/w", "0.trace/b", "1.trace/a/w", "1.trace/b", "params/a/w", "params/b"],
        ),
        ("ema_params(sgd(0.1), 0.9)", ["average/a/w", "average/b", "params/a/w", "params/b", "state/weight"]),
    ],
    ids=str,
)
def test_arrays_are_named_after_slot_and_leaf(client: optwire.Client, spec: str, names: list[str]):
    params = {"a": {"w": np.ones((3, 2), np.float32)}, "b": np.ones(2, np.float32)}
    assert sorted(client.create_session(params, spec).state().arrays) == names


def test_the_arrays_of_a_session_that_is_one_array_are_called_by_their_slots(client: optwire.Client):
    session = client.create_session(np.ones(3, np.float32), "per_leaf(torch_adamw(0.1))")
    session.step(np.ones(3, np.float32))
    state = session.state()
    assert sorted(state.arrays) == ["exp_avg", "exp_avg_sq", "params", "step"]
    session.load_state({"params": np.zeros(3, np.float32)})
    assert session.params().tolist() == [0, 0, 0]


def test_what_is_larger_than_a_chunk_comes_back_whole(client: optwire.Client):
    params = {"large": np.linspace(-1, 1, 700_001, dtype=np.float32), "empty": np.zeros((0, 3), np.float32)}
    session = client.create_session(params, "adam(0.01)")
    expected = train(session, 0, 2, params)
    state = session.state()
    other = client.create_session(params, "adam(0.01)")
    other.load_state(state)
    assert bits(other.params()) == expected[-1]
    assert train(other, 2, 4, params) == train(session, 2, 4, params)


def test_a_state_can_be_kept_in_a_file_of_numpy(client: optwire.Client, tmp_path: pathlib.Path):
    session = client.create_session(NARROW, "optax.adam(0.01)")
    train(session, 0, 2, NARROW)
    state = session.state()
    narrow = [name for name, array in state.arrays.items() if array.dtype == BF16]
    kept = {name: optwire.from_bf16(a) if name in narrow else a for name, a in state.arrays.items()}
    np.savez(tmp_path / "checkpoint.npz", step_count=state.step, **kept)
    expected = train(session, 2, 4, NARROW)
    with np.load(tmp_path / "checkpoint.npz") as file:
        arrays = {name: optwire.to_bf16(file[name]) if name in narrow else file[name] for name in file}
    session.load_state(arrays, step=int(arrays.pop("step_count")))
    assert train(session, 2, 4, NARROW) == expected


# ---------------------------------------------------------------------------------------------- parts, steps, handles


def test_what_is_not_named_stays(session: optwire.Session):
    before = bits_of(session.state())
    session.load_state({"mu/encoder/bias": np.full(3, np.nan, np.float32), "state/0.count": np.array(7, np.int32)})
    after = bits_of(session.state())
    assert {name for name in after if after[name] != before[name]} == {"mu/encoder/bias", "state/0.count"}
    assert np.isnan(session.state().arrays["mu/encoder/bias"]).all()
    assert session.step_count == session.info().step == 1


def test_the_step_is_set_where_it_is_asked_for(session: optwire.Session):
    session.load_state({"params/scale": np.float32(1.0)}, step=40)
    assert session.step_count == 40
    session.step(grads(1))
    assert session.info().step == 41
    state = session.state()
    session.load_state(state, step=3)
    assert session.info().step == 3


def test_the_learning_rate_of_a_seed_schedule_follows_the_step(client: optwire.Client):
    session = client.create_session(PARAMS, "sgd(exponential_decay(0.5, 1, 0.5))")
    session.load_state({"params/scale": np.float32(1.0)}, step=3)
    assert session.info().learning_rate == 0.0625
    session.step(grads(0))
    assert session.last_ack.learning_rate == 0.0625


def test_arrays_that_were_loaded_are_copies(session: optwire.Session):
    state = session.state()
    session.load_state(state)
    for array in state.arrays.values():
        array.fill(77)
    session.step(grads(1))
    assert not any((np.asarray(leaf) == 77).any() for leaf in jax.tree.leaves(session.params()))


def test_hyperparameters_stay_and_changes_to_come_still_come(client: optwire.Client):
    session = client.create_session(PARAMS, "sgd(0.5)")
    session.set_hyperparams(learning_rate=0.25)
    train(session, 0, 2)
    state = session.state()
    train(session, 2, 4)
    session.set_hyperparams(learning_rate=0.125)
    session.set_hyperparams(learning_rate=1.0, from_step=6)
    session.load_state(state)
    rates = [session.last_ack.learning_rate for step in range(2, 8) if session.step(grads(step)) is not None]
    assert rates == [0.125, 0.125, 0.125, 0.125, 1.0, 1.0]
    session.load_state(state)
    session.set_hyperparams(learning_rate=2.0)
    assert session.info().learning_rate == 2.0
    session.load_state(state, step=100)
    assert session.info().learning_rate == 2.0


def test_other_handles_are_refused_until_they_have_read(client: optwire.Client, session: optwire.Session):
    other = client.attach(session.name)
    other.step(grads(1))
    session.params()
    session.load_state(session.state())
    with pytest.raises(optwire.IncarnationError, match="its history was rewritten"):
        other.step(grads(2))
    with pytest.raises(optwire.IncarnationError):
        other.load_state({"params/scale": np.float32(0)})
    session.step(grads(2))
    other.params()
    other.step(grads(3))
    assert client.attach(session.name).step_count == other.step_count == 4


def test_pushes_and_loads_that_race_leave_a_state_that_somebody_asked_for(client: optwire.Client):
    session = client.create_session(PARAMS, "adam(0.01)")
    train(session, 0, 2)
    state = session.state()
    expected = train(session, 2, 3)[0]
    ended = threading.Event()
    refused = []

    def push() -> None:
        other = client.attach(session.name)
        while not ended.is_set():
            try:
                other.step(grads(9))
            except optwire.OutOfStepError as exc:
                refused.append(type(exc))
                other.params()

    thread = threading.Thread(target=push)
    thread.start()
    for _ in range(20):
        try:
            session.load_state(state)
        except optwire.IncarnationError:
            session.params()
    ended.set()
    thread.join()
    session.params()
    session.load_state(state)
    assert bits(session.step(grads(2))) == expected
    assert optwire.IncarnationError in refused


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arrays", "kind", "fragment"),
    [
        ({"nu/encoder/bia": np.ones(3, np.float32)}, optwire.TreeMismatchError, "nu/encoder/bia"),
        ({"encoder/bias": np.ones(3, np.float32)}, optwire.TreeMismatchError, "encoder/bias"),
        ({"mu/encoder/bias": np.ones(4, np.float32)}, optwire.TreeMismatchError, r"shape \(4,\), expected \(3,\)"),
        ({"mu/encoder/bias": np.ones((3, 1), np.float32)}, optwire.TreeMismatchError, "mu/encoder/bias"),
        ({"mu/encoder/bias": np.ones(3)}, optwire.TreeMismatchError, "element type f64, expected f32"),
        ({"state/0.count": np.array(1)}, optwire.TreeMismatchError, "element type i64, expected i32"),
        (
            {"mu/scale": np.float32(1), "params/scale": np.float32(1), "z": np.float32(1)},
            optwire.TreeMismatchError,
            "'z'",
        ),
        ({"state/skipped": np.array(0)}, optwire.TreeMismatchError, "state/skipped"),
        ({}, optwire.TreeError, "no arrays"),
        ({"mu/scale": 1.0}, optwire.TreeError, "mu/scale"),
        ({"mu/scale\x00": np.float32(1)}, optwire.TreeError, "control characters"),
        ({"mu//scale": np.float32(1)}, optwire.TreeError, "component"),
        ({"": np.float32(1)}, optwire.TreeMismatchError, "no such array"),
        ({"x" * 2000: np.float32(1)}, optwire.TreeError, "2000 bytes"),
        ({1: np.float32(1)}, optwire.TreeMismatchError, "no such array"),
        ({"mu": {"scale": np.float32(1)}, "mu/scale": np.float32(1)}, optwire.TreeError, "two leaves have the name"),
        ({f"x{i}": np.float32(1) for i in range(100_000)}, optwire.TreeError, "100000 leaves"),
        ([np.ones(3)], optwire.InvalidArgumentError, "state"),
        (None, optwire.InvalidArgumentError, "state"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_what_the_state_does_not_have_so_is_refused(
    session: optwire.Session, arrays: Any, kind: type[Exception], fragment: str
):
    before = bits_of(session.state())
    with pytest.raises(kind, match=fragment):
        session.load_state(arrays)
    assert bits_of(session.state()) == before
    assert session.info().incarnation == 1
    session.step(grads(1))


@pytest.mark.parametrize("step", [-1, 2**31, 2**64, 1.5, True, "3"])
def test_a_step_that_no_update_can_be_of_is_refused(session: optwire.Session, step: Any):
    with pytest.raises(optwire.InvalidArgumentError, match="step"):
        session.load_state({"params/scale": np.float32(1)}, step=step)
    assert session.info().incarnation == 1


@pytest.mark.parametrize("skipped", [-1, 5, 2**40])
def test_more_skipped_pushes_than_pushes_are_refused(client: optwire.Client, skipped: int):
    session = client.create_session(PARAMS, "on_nonfinite(adam(0.1), 'skip')")
    before = bits_of(session.state())
    with pytest.raises(optwire.InvalidArgumentError, match="skipped"):
        session.load_state({"state/skipped": np.array(skipped, np.int64), "params/scale": np.float32(9)}, step=4)
    assert (bits_of(session.state()), session.info().step) == (before, 0)


def test_a_skipped_update_inside_an_accumulation_is_the_end_of_all_its_pushes(client: optwire.Client):
    spec = "accumulate(on_nonfinite(sgd(exponential_decay(0.5, 1, 0.5)), 'skip'), 4)"
    session = client.create_session(PARAMS, spec)
    with pytest.raises(optwire.InvalidArgumentError, match="state/skipped 3, expected 0 to 2"):
        session.load_state({"state/skipped": np.int64(3)}, step=8)
    session.load_state({"state/skipped": np.int64(2)}, step=8)
    assert session.info().learning_rate == 0.5


def test_the_last_step_can_be_reached_and_left(client: optwire.Client):
    session = client.create_session(PARAMS, "adam(exponential_decay(0.1, 10, 0.9))", name="last")
    session.load_state({"params/scale": np.float32(1)}, step=2**31 - 2)
    session.step(grads(0))
    for _ in range(2):
        with pytest.raises(optwire.LimitError, match="is at step 2147483647, the last there is"):
            session.step(grads(0))
    assert session.info().step == client.attach("last").step_count == 2**31 - 1
    assert "last" in [info.name for info in client.list_sessions()]
    session.load_state({"params/scale": np.float32(1)}, step=0)
    session.step(grads(0))
    client.delete_session("last")


def test_sums_must_fit_the_step_that_is_loaded(client: optwire.Client):
    session = client.create_session({"w": np.zeros(2, np.float32)}, "accumulate(sgd(1.0), 4)")
    grad = {"w": np.ones(2, np.float32)}
    for _ in range(3):
        session.step(grad)
    for step in (0, 1, 6):
        with pytest.raises(optwire.InvalidArgumentError, match=r"the sums that stay are of 3: \(sums/w\)"):
            session.load_state({"params/w": np.zeros(2, np.float32)}, step=step)
    assert session.info().incarnation == 1
    session.load_state({"params/w": np.full(2, 5, np.float32)}, step=7)
    np.testing.assert_array_equal(session.step(grad)["w"], [4, 4])
    session.load_state({"sums/w": np.full(2, 2, np.float32)}, step=2)
    session.step(grad)
    np.testing.assert_array_equal(session.step(grad)["w"], [3, 3])


def test_a_state_of_another_optimizer_is_refused(client: optwire.Client, session: optwire.Session):
    other = client.create_session(PARAMS, "momentum(0.1, 0.9)")
    with pytest.raises(optwire.TreeMismatchError, match="mu/encoder/bias"):
        other.load_state(session.state())


def test_a_deleted_session_has_no_state(client: optwire.Client):
    session = client.create_session(PARAMS, "sgd(0.1)")
    state = session.state()
    client.delete_session(session.name)
    with pytest.raises(optwire.SessionNotFoundError):
        session.state()
    with pytest.raises(optwire.SessionNotFoundError):
        session.load_state(state)


# ------------------------------------------------------------------------------------------------------- on the wire


Changes = dict[str, Any]


def load(peer: wire.Peer, id_: str, arrays: Any, *, payload: bytes | None = None, **changes: Any) -> pb.Session:
    flat = trees.flatten(arrays)
    begin = {
        "session_id": id_,
        "incarnation": 1,
        "load_key": secrets.token_hex(16),
        "tree": convert.tree_to_proto(trees.TreeSpec(flat.spec.leaves)),
    }
    right = wire.payload_of(arrays)
    sent = right if payload is None else payload
    frames = [
        pb.LoadStateRequest(begin=pb.LoadStateBegin(**begin | changes)),
        *(pb.LoadStateRequest(chunk=chunk) for chunk in wire.chunks(sent, 2**20)),
        pb.LoadStateRequest(end=pb.PayloadEnd(digest=wire.digest(right))),
    ]
    return peer.stub.LoadState(iter(frames), timeout=wire.TIMEOUT_S).session


def test_the_same_load_again_is_answered_and_loads_nothing(peer: wire.Peer, session: optwire.Session):
    key = secrets.token_hex(16)
    first = load(peer, session.id, {"params/scale": np.float32(5)}, load_key=key, step=3)
    session.params()
    session.step(grads(4))
    expected = bits_of(session.state())
    again = load(peer, session.id, {"params/scale": np.float32(5)}, load_key=key, step=3)
    assert (first.incarnation, again.incarnation) == (2, 2)
    assert (first.step, again.step) == (3, 4)
    assert bits_of(session.state()) == expected


def test_a_load_made_again_in_the_middle_of_an_accumulation_is_answered(peer: wire.Peer, client: optwire.Client):
    session = client.create_session({"w": np.zeros(2, np.float32)}, "accumulate(sgd(1.0), 4)")
    key, arrays = secrets.token_hex(16), {"params/w": np.ones(2, np.float32)}
    load(peer, session.id, arrays, load_key=key, step=4)
    session.params()
    session.step({"w": np.ones(2, np.float32)})
    assert load(peer, session.id, arrays, load_key=key, step=4).step == 5


@pytest.mark.parametrize(
    ("arrays", "step", "what"),
    [
        ({"params/scale": np.float32(6)}, 3, "bytes"),
        ({"params/scale": np.float32(5)}, 4, "step"),
        ({"params/encoder/bias": np.ones(3, np.float32)}, 3, "arrays"),
    ],
    ids=["bytes", "step", "arrays"],
)
def test_the_key_of_a_load_with_another_load_is_refused(
    peer: wire.Peer, session: optwire.Session, arrays: Any, step: int, what: str
):
    key = secrets.token_hex(16)
    load(peer, session.id, {"params/scale": np.float32(5)}, load_key=key, step=3)
    before = bits_of(session.state())
    failure = wire.Failure.of(lambda: load(peer, session.id, arrays, load_key=key, step=step))
    assert failure is not None
    assert failure.detail is not None
    assert (failure.detail.reason, failure.detail.subject) == ("DIVERGENT_RETRY", what)
    assert bits_of(session.state()) == before


@pytest.mark.parametrize(
    ("code", "reason", "changes"),
    [
        ("FAILED_PRECONDITION", "WRONG_INCARNATION", {"incarnation": 0}),
        ("FAILED_PRECONDITION", "WRONG_INCARNATION", {"incarnation": 2}),
        ("FAILED_PRECONDITION", "WRONG_INCARNATION", {"incarnation": 2**64 - 1}),
        ("INVALID_ARGUMENT", "INVALID_ARGUMENT", {"load_key": ""}),
        ("INVALID_ARGUMENT", "INVALID_ARGUMENT", {"load_key": "A" * 32}),
        ("INVALID_ARGUMENT", "INVALID_ARGUMENT", {"session_id": "x"}),
        ("NOT_FOUND", "SESSION_NOT_FOUND", {"session_id": "0" * 32}),
        ("INVALID_ARGUMENT", "INVALID_ARGUMENT", {"step": 2**64 - 1}),
        (
            "INVALID_ARGUMENT",
            "INVALID_TREE",
            {"tree": convert.tree_to_proto(trees.flatten({"params": {"scale": np.float32(1)}}).spec)},
        ),
        ("INVALID_ARGUMENT", "INVALID_PAYLOAD", {"payload": b""}),
        ("INVALID_ARGUMENT", "INVALID_PAYLOAD", {"payload": b"123"}),
        ("INVALID_ARGUMENT", "INVALID_PAYLOAD", {"payload": b"1234"}),
        ("INVALID_ARGUMENT", "INVALID_PAYLOAD", {"payload": b"12345"}),
    ],
    ids=str,
)
def test_loads_that_are_wrong_change_nothing(
    server: testing.Serving, peer: wire.Peer, session: optwire.Session, code: str, reason: str, changes: Changes
):
    before = bits_of(session.state())
    failure = wire.Failure.of(
        lambda: load(peer, changes.pop("session_id", session.id), {"params/scale": np.float32(5)}, **changes)
    )
    assert failure is not None
    assert (failure.code, failure.detail.reason) == (code, reason)
    assert bits_of(session.state()) == before
    session.step(grads(1))
    wire.until(wire.idle(server.server), "landing buffers and streams given back")


def test_a_load_that_breaks_off_changes_nothing(server: testing.Serving, peer: wire.Peer, session: optwire.Session):
    before = bits_of(session.state())
    tree = convert.tree_to_proto(trees.TreeSpec(trees.flatten({"params/scale": np.float32(5)}).spec.leaves))
    begin = pb.LoadStateBegin(session_id=session.id, incarnation=1, load_key="1" * 32, tree=tree)
    for frames in (
        [],
        [pb.LoadStateRequest(begin=begin)],
        [pb.LoadStateRequest(begin=begin)] * 2,
        [pb.LoadStateRequest()],
    ):
        assert wire.Failure.of(lambda frames=frames: peer.stub.LoadState(iter(frames), timeout=wire.TIMEOUT_S))
    assert bits_of(session.state()) == before
    wire.until(wire.idle(server.server), "landing buffers and streams given back")


@pytest.mark.parametrize("method", ["ReadState", "LoadState"])
@pytest.mark.parametrize("message", [b"\xff", b"\xa0\x38\x01"], ids=["no message", "an unknown field"])
def test_what_is_no_request_is_refused(peer: wire.Peer, method: str, message: bytes):
    failure = wire.Failure.of(lambda: peer.raw(f"/{wire.SERVICE.full_name}/{method}", message))
    assert failure is not None
    assert failure.code in ("INVALID_ARGUMENT", "UNIMPLEMENTED")


def test_a_draining_server_loads_nothing_more():
    with testing.serve() as serving, optwire.connect(serving.target, timeout=1.0) as client:
        session = client.create_session(PARAMS, "sgd(0.1)")
        serving.server.registry.drain()
        with pytest.raises(optwire.UnavailableError, match="draining"):
            session.load_state({"params/scale": np.float32(5)})
        assert session.info().incarnation == 1


def test_a_state_larger_than_the_landing_buffers_is_read_alone_and_loaded_in_parts():
    params = {"w": np.ones(200_000, np.float32)}
    with (
        testing.serve(landing_bytes_max=2**20) as serving,
        optwire.connect(serving.target, transport="stream", timeout=2.0) as client,
    ):
        session = client.create_session(params, "adam(0.1)")  # three times 800 kB of state
        session.step(params)
        state = session.state()
        wire.until(lambda: serving.server.registry._landings.lent_bytes == 0, "the reading is over at the server, too")
        with serving.server.registry.reading(name=session.name), pytest.raises(optwire.LimitError, match="landing"):
            session.state()  # it would pass, were it alone
        with serving.server.registry.states.reading(name=session.name), pytest.raises(optwire.LimitError):
            session.step(params)
        session.step(params)
        with pytest.raises(optwire.LimitError, match="landing_bytes_max is 1048576; load it in parts"):
            session.load_state(state)
        for name, array in state.arrays.items():
            session.load_state({name: array}, step=state.step)
        assert bits_of(session.state()) == bits_of(state)


# --------------------------------------------------------------------------------------------------- sessions that grow

NEW = {"head": np.linspace(3, 4, 8, dtype=np.float32), "a": np.float32(0.5)}
GROWN = {**PARAMS, **NEW}
GROWING = [
    "adam(0.01)",
    "sm3(0.01)",
    "optax.adam(0.01)",
    "optax.adafactor(0.01)",
    "chain(clip_by_global_norm(1.0), optax.adam(0.01))",
    "ema_params(optax.adam(0.01), 0.9)",
    "per_leaf(torch_adamw(0.01))",
    "on_nonfinite(adam(0.01), 'skip')",
]


@pytest.mark.parametrize("spec", GROWING)
def test_old_leaves_go_on_and_new_ones_start_fresh(client: optwire.Client, spec: str):
    old = client.create_session(PARAMS, spec)
    train(old, 0, 3)
    before = old.state()
    fresh = client.create_session(GROWN, spec).state()
    new = client.create_session(jax.tree.map(np.zeros_like, GROWN) | NEW, spec, extends=old)
    assert (new.name, new.step_count, new.info().incarnation) == (old.name, 3, 2)
    after = new.state()
    assert after.step == 3
    assert {name: bits_of(after)[name] for name in before.arrays} == bits_of(before)
    added = after.arrays.keys() - before.arrays.keys()
    assert {name: bits_of(after)[name] for name in added} == {name: bits_of(fresh)[name] for name in added}
    assert added == {name for name in after.arrays if name.endswith(("/head", "/a"))}


@pytest.mark.parametrize("spec", ["adam(0.01)", "optax.adam(0.01)", "per_leaf(torch_adamw(0.01))"])
def test_a_grown_session_trains_its_old_leaves_as_if_nothing_had_happened(client: optwire.Client, spec: str):
    alone, growing = client.create_session(PARAMS, spec), client.create_session(PARAMS, spec)
    train(alone, 0, 3)
    train(growing, 0, 3)
    grown = client.create_session(GROWN, spec, extends=growing)
    for step in range(3, 6):
        expected = alone.step(grads(step))
        got = grown.step(grads(step) | jax.tree.map(np.zeros_like, NEW))
        assert bits({name: got[name] for name in PARAMS}) == bits(expected)


def test_the_old_session_is_gone_and_the_name_is_kept(client: optwire.Client, session: optwire.Session):
    count = len(client.list_sessions())
    grown = client.create_session(GROWN, "adam(0.1)", extends=session)
    assert len(client.list_sessions()) == count
    assert grown.id != session.id
    for call in (session.params, session.state, session.info, lambda: session.step(grads(1))):
        with pytest.raises(optwire.SessionNotFoundError):
            call()
    assert client.attach(session.name).id == grown.id
    assert bits(grown.params()["encoder"]) == bits(client.attach(session.name).params()["encoder"])


def refused(client: optwire.Client, kind: type[Exception], fragment: str, call: Callable[[], object]) -> None:
    before = sorted((info.name, info.id, info.step) for info in client.list_sessions())
    with pytest.raises(kind, match=fragment):
        call()
    assert sorted((info.name, info.id, info.step) for info in client.list_sessions()) == before


def test_an_extension_that_does_not_fit_changes_nothing(client: optwire.Client, session: optwire.Session):
    spec, before = "optax.adam(0.01)", bits_of(session.state())
    fewer = {name: leaf for name, leaf in GROWN.items() if name != "scale"}
    for params, kind, fragment in (
        (fewer, optwire.TreeMismatchError, "scale.*missing"),
        ({**GROWN, "scale": np.ones(1, np.float32)}, optwire.TreeMismatchError, "scale.*shape"),
        ({**GROWN, "scale": np.float64(1)}, optwire.TreeMismatchError, "scale.*element type"),
    ):
        refused(client, kind, fragment, lambda params=params: client.create_session(params, spec, extends=session))
    refused(
        client,
        optwire.InvalidArgumentError,
        "name: 'else'",
        lambda: client.create_session(GROWN, spec, name="else", extends=session),
    )
    refused(client, optwire.SpecError, "nosuch", lambda: client.create_session(GROWN, "nosuch(1)", extends=session))
    refused(
        client,
        optwire.InvalidArgumentError,
        "extends",
        lambda: client.create_session(GROWN, spec, extends=session.name),
    )
    assert bits_of(session.state()) == before
    session.step(grads(1))


@pytest.mark.parametrize(
    ("k", "steps", "new_k", "said"),
    [
        (4, 3, 4, "the session's optimizer is 3 of 4 pushes into an update"),
        (4, 2, 2, "the session's optimizer is 2 of 4 pushes into an update"),
        (2, 2, 4, "the new optimizer is 2 of 4 pushes into an update"),
        (4, 4, 2, None),
        (4, 4, 1, None),
        (3, 6, 2, None),
    ],
)
def test_a_session_is_extended_where_a_step_has_closed(
    client: optwire.Client, k: int, steps: int, new_k: int, said: str | None
):
    session = client.create_session({"w": np.zeros(2, np.float32)}, f"accumulate(sgd(1.0), {k})")
    for _ in range(steps):
        session.step({"w": np.ones(2, np.float32)})
    spec = f"accumulate(sgd(1.0), {new_k})" if new_k > 1 else "sgd(1.0)"
    more = {"v": np.zeros(1, np.float32), "w": np.zeros(2, np.float32)}
    if said is not None:
        refused(
            client,
            optwire.InvalidArgumentError,
            said,
            lambda: client.create_session(more, spec, extends=session),
        )
        return
    before = session.params()["w"][0]
    grown = client.create_session(more, spec, extends=session)
    for _ in range(new_k):
        params = grown.step({"v": np.full(1, 2, np.float32), "w": np.ones(2, np.float32)})
    np.testing.assert_array_equal(params["w"], [before - 1] * 2)
    np.testing.assert_array_equal(params["v"], [-2])


def test_a_session_that_has_moved_on_is_not_extended(client: optwire.Client, session: optwire.Session):
    other = client.attach(session.name)
    other.step(grads(1))
    refused(
        client,
        optwire.StaleStepError,
        "is to be extended at step 1, but is at 2",
        lambda: client.create_session(GROWN, opt.adam(0.1), extends=session),
    )
    other.load_state(other.state())
    session.step_count  # noqa: B018  still what it was
    refused(
        client,
        optwire.IncarnationError,
        "history was rewritten",
        lambda: client.create_session(GROWN, opt.adam(0.1), extends=session),
    )
    session.params()
    assert client.create_session(GROWN, opt.adam(0.1), extends=session).step_count == 2


def test_an_extension_is_made_once_however_often_it_is_asked_for(
    peer: wire.Peer, client: optwire.Client, session: optwire.Session
):
    key = secrets.token_hex(16)
    payload = wire.payload_of(GROWN)
    begin = pb.CreateSessionBegin(
        tree=convert.tree_to_proto(trees.flatten(GROWN).spec),
        spec=convert.spec_to_proto(opt.adam(0.1)),
        create_key=key,
        extends=pb.Extension(session_id=session.id, incarnation=1, step=1),
    )
    frames = (begin, wire.chunks(payload, 2**20), pb.PayloadEnd(digest=wire.digest(payload)))
    first = peer.create_from(*frames)
    again = peer.create_from(begin, wire.chunks(payload, 2**20), pb.PayloadEnd(digest=wire.digest(payload)))
    assert first == again
    assert (first.name, first.step, first.incarnation) == (session.name, 1, 2)
    assert client.attach(session.name).id == first.id


def test_an_extension_needs_no_place_of_its_own_among_the_sessions():
    with testing.serve(sessions_max=1) as serving, optwire.connect(serving.target, timeout=2.0) as client:
        session = client.create_session(PARAMS, "sgd(0.1)")
        grown = client.create_session(GROWN, "sgd(0.1)", extends=session)
        with pytest.raises(optwire.LimitError, match="sessions_max"):
            client.create_session(PARAMS, "sgd(0.1)")
        client.delete_session(grown.name)
        client.create_session(PARAMS, "sgd(0.1)")


def test_a_load_for_another_step_changes_nothing(client: optwire.Client) -> None:
    params = {"w": np.ones(3, np.float32)}
    session = client.create_session(params, opt.momentum(0.5, 0.9))
    other = client.attach(session.name)
    session.load_state({"params/w": np.zeros(3, np.float32)}, base_step=0)
    other.params()
    after = other.step(params)
    with pytest.raises(optwire.StaleStepError, match="gradients of step 0, but the session is at 1"):
        session.load_state({"params/w": np.ones(3, np.float32)}, base_step=0)
    with pytest.raises(optwire.FutureStepError):
        session.load_state({"params/w": np.ones(3, np.float32)}, base_step=2)
    np.testing.assert_array_equal(session.params()["w"], after["w"])
    session.load_state({"params/w": np.ones(3, np.float32)}, base_step=1, step=7)
    assert session.step_count == 7
