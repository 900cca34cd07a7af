"""Sessions against the real server: what comes back, whose step it is, and what closing means."""

import collections
import copy
import pickle  # noqa: TID251  it is what does not work
import subprocess
import sys
import threading
import time
import uuid

import jax
import ml_dtypes
import numpy as np
import pytest

import optwire
from optwire import optimizers as opt
from optwire_server import testing

Layer = collections.namedtuple("Layer", ["weights", "bias"])


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def assert_same_nest(left, right):
    """Equal in structure, types, dtypes, shapes and bits."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert list(left) == (sorted(right) if type(right) is dict else list(right))  # as in JAX
        for key in left:
            assert_same_nest(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same_nest(a, b)
    elif left is not None:
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.tobytes() == right.tobytes()


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def odd_leaves() -> list[np.ndarray]:
    """1.6 MB in leaves that lie within chunks, across them, and beside empty ones."""
    rng = np.random.default_rng(7)
    sizes = [1, 0, 3, 65_537, 200_003, 0, 5, 131_072, 7]
    return [rng.standard_normal(size, dtype=np.float32) for size in sizes]


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4().hex}"


@pytest.mark.parametrize("transport", ["auto", "stream", "unary"])
@pytest.mark.parametrize(
    "nest",
    [
        ones(3),
        np.float32(2.0),
        {"b": ones(2), "a": [ones(1, 2), None, (ones(), ones(0, 3))]},
        collections.OrderedDict([("z", ones(2)), ("a", ones(1))]),
        {3: ones(2), -1: ones(1)},
        [Layer(ones(2, 2), ones(2)), Layer(weights=ones(1), bias=None)],
        {"half": ones(5).astype(ml_dtypes.bfloat16)},
    ],
    ids=lambda nest: type(nest).__name__,
)
def test_params_come_back_in_the_structure_they_went_in(server, transport, nest):
    with optwire.connect(server.target, transport=transport) as client:
        session = client.create_session(nest, opt.sgd(0.5))
        before = session.params()
        after = session.step(nest)
    nest = jax.tree.map(np.asarray, nest)
    assert_same_nest(before, nest)
    assert_same_nest(after, jax.tree.map(lambda leaf: np.asarray(leaf * leaf.dtype.type(0.5)), nest))


@pytest.mark.parametrize("spec", [opt.adam(1e-2), opt.chain(opt.clip_grads(1.0), opt.momentum(0.1, 0.9))], ids=str)
def test_stream_and_unary_give_the_same_bits(server, spec):
    leaves = odd_leaves()
    results = []
    for transport in ("stream", "unary", "auto"):
        with optwire.connect(server.target, transport=transport) as client:
            session = client.create_session(leaves, spec)
            for _ in range(3):
                params = session.step([0.1 * leaf for leaf in leaves])
            results.append(params)
            assert_same_nest(session.params(), params)
    assert_same_nest(results[0], results[1])
    assert_same_nest(results[0], results[2])


def test_a_payload_of_many_chunks_arrives_whole(client):
    rng = np.random.default_rng(3)
    params = {f"layer{i}": rng.standard_normal((i * 100_003 + 1,), dtype=np.float32) for i in range(6)}
    session = client.create_session(params, opt.sgd(1.0))
    assert_same_nest(session.params(), params)
    for _ in range(2):
        params = session.step(params)
    assert all(not leaf.any() for leaf in params.values())


def test_arrays_of_any_layout_are_read_as_they_look(client):
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    session = client.create_session(np.zeros((4, 3), np.float32), opt.sgd(1.0))
    assert np.array_equal(session.step(grid.T), -grid.T)
    assert np.array_equal(session.step(grid.T.astype(">f4")), -2 * grid.T)


def test_the_callers_arrays_are_not_changed_and_results_are_new(client):
    params = ones(4)
    session = client.create_session(params, opt.sgd(1.0))
    first = session.step(params)
    second = session.step(params)
    assert np.array_equal(params, ones(4))
    assert np.array_equal(first, 0 * params)
    assert np.array_equal(second, -params)
    second[:] = 9  # writable


def test_a_session_is_found_by_name_with_its_step(client, name):
    session = client.create_session({"w": ones(2)}, opt.sgd(0.5), name=name)
    assert (session.name, session.step_count, session.last_ack) == (name, 0, None)
    session.step({"w": ones(2)})
    assert session.step_count == 1
    assert session.last_ack.applied_step == 1
    assert not session.last_ack.duplicate

    other = client.attach(name)
    assert (other.id, other.name, other.step_count) == (session.id, name, 1)
    assert_same_nest(other.params(), {"w": 0.5 * ones(2)})
    assert_same_nest(other.step({"w": ones(2)}), {"w": 0 * ones(2)})


def test_attach_can_step_without_reading_first(client, name):
    client.create_session(ones(2), opt.sgd(0.5), name=name).step(ones(2))
    assert np.array_equal(client.attach(name).step(ones(2)), 0 * ones(2))


def test_attach_rebuilds_named_tuples_that_look_the_same(client, name):
    client.create_session(Layer(ones(2), ones(1)), opt.sgd(0.5), name=name)
    params = client.attach(name).params()
    assert type(params).__name__ == "Layer"
    assert params._fields == ("weights", "bias")


def test_a_push_on_an_old_step_is_refused_until_params_are_read(client, name):
    first = client.create_session(ones(2), opt.sgd(0.25), name=name)
    second = client.attach(name)
    first.step(ones(2))
    with pytest.raises(optwire.StaleStepError, match=name) as caught:
        second.step(ones(2))
    assert caught.value.step == 1
    assert second.step_count == 0
    with pytest.raises(optwire.StaleStepError):
        second.step(ones(2))
    assert np.array_equal(second.params(), 0.75 * ones(2))
    assert np.array_equal(second.step(ones(2)), 0.5 * ones(2))


def test_base_step_says_which_parameters_the_gradients_are_of(client):
    session = client.create_session(ones(2), opt.sgd(0.25))
    session.step(ones(2), 0)
    with pytest.raises(optwire.StaleStepError):
        session.step(ones(2), base_step=0)
    with pytest.raises(optwire.FutureStepError):
        session.step(ones(2), base_step=2)
    session.step(ones(2), base_step=1)
    assert session.step_count == 2


@pytest.mark.parametrize("base_step", [-1, True, 1.0, "1", 2**64])
def test_a_base_step_that_is_no_step_is_refused(client, base_step):
    session = client.create_session(ones(2), opt.sgd(0.25))
    with pytest.raises(optwire.InvalidArgumentError, match="base_step"):
        session.step(ones(2), base_step=base_step)


@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_a_refused_push_leaves_the_handle_usable(server, transport):
    with optwire.connect(server.target, transport=transport) as client:
        session = client.create_session(ones(2), opt.sgd(0.25))
        for _ in range(3):
            with pytest.raises(optwire.FutureStepError):
                session.step(ones(2), base_step=7)
            session.step(ones(2))
        assert session.step_count == 3


def test_gradients_that_do_not_match_are_refused_before_anything_is_sent(client):
    session = client.create_session({"w": ones(2, 3)}, opt.sgd(0.25))
    session.close()  # sending would say so
    with pytest.raises(optwire.TreeMismatchError, match=r"grads\['w'\]: shape \(3, 2\), expected \(2, 3\)"):
        session.step({"w": ones(3, 2)})
    with pytest.raises(optwire.TreeMismatchError, match="missing"):
        session.step({"v": ones(2, 3)})
    with pytest.raises(optwire.TreeMismatchError, match="element type f64, expected f32"):
        session.step({"w": np.ones((2, 3))})


def test_unary_transport_names_the_limit_it_keeps(server):
    with optwire.connect(server.target, transport="unary") as client:
        session = client.create_session(ones(600_000), opt.sgd(0.25))
        with pytest.raises(optwire.LimitError, match="2400000 bytes, expected at most 2097152"):
            session.step(ones(600_000))
        assert session.step_count == 0


def test_closing_a_handle_leaves_the_session(client, name):
    with client.create_session(ones(40_000), opt.sgd(0.5), name=name) as session:
        session.step(ones(40_000))
    session.close()
    for call in (
        lambda: session.step(ones(40_000)),
        session.params,
        session.info,
        lambda: session.set_hyperparams(learning_rate=1),
    ):
        with pytest.raises(optwire.DetachedError, match=name):
            call()
    assert client.attach(name).step_count == 1


def test_after_the_client_is_closed_every_call_says_so(server, name):
    client = optwire.connect(server.target)
    session = client.create_session(ones(40_000), opt.sgd(0.5), name=name)
    session.step(ones(40_000))
    client.close()
    client.close()
    for call in (client.server_info, client.list_sessions, session.params, lambda: session.step(ones(40_000))):
        with pytest.raises(optwire.DetachedError):
            call()
    session.close()


def test_closing_leaves_no_thread_behind(server):
    before = set(threading.enumerate())

    def ours() -> list[str]:
        """Threads of the client; those of the server live in this process too."""
        names = [thread.name for thread in set(threading.enumerate()) - before]
        return [name for name in names if not name.startswith(("optwire-device", "optwire-rpc"))]

    client = optwire.connect(server.target, transport="stream")
    handles = [client.create_session(ones(2), opt.sgd(0.5)) for _ in range(3)]
    for handle in handles:
        handle.step(ones(2))
    del handle
    assert len(ours()) == 5  # one a stream, the watchdog, and gRPC's for the channel
    handles.pop().close()
    handles.pop()  # dropped without a word
    wait_until(lambda: len(ours()) == 3)
    client.close()
    wait_until(lambda: not ours())


def test_two_threads_on_one_handle_wait_for_each_other(client):
    session = client.create_session(ones(30_000), opt.sgd(0.25))
    threads = [threading.Thread(target=lambda: [session.step(ones(30_000)) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert session.step_count == 80
    assert np.array_equal(session.params(), (1 - 20) * ones(30_000))


def test_the_learning_rate_can_be_replaced(client):
    session = client.create_session(ones(2), opt.sgd(opt.exponential_decay(0.5, 10, 0.5)))
    assert session.info().learning_rate_scheduled
    session.step(ones(2))
    assert session.set_hyperparams(learning_rate=np.float32(0.25)) == 1
    info = session.info()
    assert (info.learning_rate, info.learning_rate_scheduled, info.step) == (0.25, False, 1)
    session.step(ones(2))
    assert session.last_ack.learning_rate == 0.25
    for wrong in (float("nan"), "0.1", None, True):
        with pytest.raises(optwire.InvalidArgumentError, match="learning_rate"):
            session.set_hyperparams(learning_rate=wrong)


def test_info_does_not_move_the_handle(client, name):
    session = client.create_session(ones(2), opt.sgd(0.5), name=name)
    client.attach(name).step(ones(2))
    assert session.info().step == 1
    assert session.step_count == 0
    with pytest.raises(optwire.StaleStepError):
        session.step(ones(2))


def test_sessions_are_listed_through_all_pages_and_deleted_by_name(client):
    prefix = f"page-{uuid.uuid4().hex}"
    names = [f"{prefix}-{i:03}" for i in range(120)]
    for each in names:
        client.create_session(ones(1), opt.sgd(0.5), name=each).close()
    listed = [info for info in client.list_sessions() if info.name.startswith(prefix)]
    assert [info.name for info in listed] == names
    assert listed[0].tree is None
    for each in names:
        client.delete_session(each)
    assert not [info for info in client.list_sessions() if info.name.startswith(prefix)]


def test_server_info_says_what_is_served(client):
    info = client.server_info()
    assert info.devices
    assert "adam" in info.catalogue
    assert info.limits["chunk_bytes_max"] == 2 * 1024 * 1024


def test_a_unix_socket_serves_as_well(tmp_path):
    with testing.serve(listen=(f"unix:{tmp_path}/optwire.sock",)) as server, optwire.connect(server.target) as client:
        session = client.create_session(ones(40_000), opt.sgd(0.5))
        assert np.array_equal(session.step(ones(40_000)), 0.5 * ones(40_000))


def test_a_client_without_ml_dtypes_keeps_bf16_as_tagged_bits(server):
    code = """
import sys, numpy as np, optwire
from optwire import optimizers as opt
client = optwire.connect(sys.argv[1])
params = optwire.to_bf16(np.array([1.0, -2.5], np.float32))
session = client.create_session({"w": params}, opt.sgd(0.5))
for after in (session.step({"w": params})["w"], session.params()["w"]):
    assert after.dtype == np.uint16 and after.dtype.metadata, after.dtype
    assert optwire.from_bf16(after).tolist() == [0.5, -1.25]
session.step({"w": after})
assert "ml_dtypes" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, server.target], check=True, timeout=60)


def test_a_handle_says_how_to_have_another_one(client, name):
    session = client.create_session([np.zeros(3, np.float32)], opt.sgd(1.0), name=name)
    for call in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=f"attach.'{name}'. makes another"):
            call(session)


def test_turns_may_be_a_number_of_numpys(client, name):
    session = client.create_session([np.zeros(3, np.float32)], opt.sgd(1.0), name=name, turns=np.int64(2))
    assert session.info().turns == 2
