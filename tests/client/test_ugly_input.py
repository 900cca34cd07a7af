"""What users get wrong: each answer names the thing, what was expected and what came, and nothing changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optwire
from optwire import optimizers as opt
from optwire_server import testing


def nested(depth: int, around: Callable[[Any], Any]) -> Any:
    value: Any = opt.sgd(0.1)
    for _ in range(depth):
        value = around(value)
    return value


PARAMS = {"w": np.ones((2, 3), np.float32)}


@pytest.mark.parametrize(
    "target",
    [
        "",
        "localhost",
        "localhost:",
        ":50051",
        "localhost:0",
        "localhost:70000",
        "localhost:http",
        "localhost:" + "9" * 5000,
        "https://localhost:443",
        "::1:50051",
        "a b:1",
        "a\n:1",
        "\udc80:1",
        5,
        None,
    ],
    ids=lambda target: ascii(target)[:30],
)
def test_a_target_that_cannot_be_is_refused_at_connect(target: Any) -> None:
    started = time.monotonic()
    with pytest.raises(optwire.InvalidArgumentError, match=r"target: .*expected host:port"):
        optwire.connect(target)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    "target",
    [
        "localhost:1",
        "my_host-1.local:65535",
        "[::1]:50051",
        "[fe80::1%eth0]:1",
        "unix:/x",
        "unix:x",
        "dns:///a.b:1",
        "ipv4:127.0.0.1:1",
        "ipv6:[::1]:1",
    ],
)
def test_targets_in_all_their_forms_are_taken(target: str) -> None:
    optwire.connect(target).close()


@pytest.mark.parametrize("name", [5, b"x", ["x"], 1.5], ids=repr)
def test_a_session_name_that_is_no_text_is_refused(client: optwire.Client, name: Any) -> None:
    for call in (
        lambda: client.attach(name),
        lambda: client.delete_session(name),
        lambda: client.create_session(PARAMS, opt.sgd(0.1), name=name),
    ):
        with pytest.raises(optwire.InvalidArgumentError, match=f"session name: {type(name).__name__}, expected text"):
            call()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (opt.Spec(5), "spec: 5, expected text"),  # type: ignore[arg-type]
        (opt.Spec("sgd", (("step_size", {}),)), r"sgd\.step_size: dict"),
        (opt.Spec("sgd", (("step_size", b"x"),)), r"sgd\.step_size: bytes"),
        (opt.Spec("sgd", (("step_size", object()),)), r"sgd\.step_size: object"),
        (opt.Spec("sgd", (("step_size", 2**70),)), r"sgd\.step_size: int"),
        (opt.Spec("sgd", (("step_size", "\udc80"),)), "valid Unicode"),
        (opt.Spec("sgd", (("x" * 200, 1.0),)), "at most 128 bytes"),
        (opt.Spec("sgd", (("step_size", "x" * 5000),)), r"sgd\.step_size: .*at most 4096 bytes"),
        (opt.Spec("sgd", None), "sgd: arguments: None, expected"),  # type: ignore[arg-type]
        (opt.Spec("sgd", (5,)), "sgd: arguments: 5, expected"),  # type: ignore[arg-type]
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_spec_that_cannot_travel_is_refused_before_it_does(client: optwire.Client, spec: Any, message: str) -> None:
    with pytest.raises(optwire.SpecError, match=message):
        client.create_session(PARAMS, spec)


def test_a_spec_beyond_what_can_be_written_down_is_refused(client: optwire.Client) -> None:
    for spec, message in (
        (opt.Spec("sgd", (("step_size", 10**5000),)), "a whole number of 16610 bits"),
        (nested(500, lambda inner: opt.Spec("chain", (("members", (inner,)),))), "nested deeper than 40"),
        (opt.Spec("sgd", (("step_size", nested(500, lambda inner: (inner,))),)), "nested deeper than 40"),
    ):
        with pytest.raises(optwire.SpecError, match=message):
            client.create_session(PARAMS, spec)


@pytest.mark.parametrize("rate", [np.float32(0.5), np.float64(0.5), np.array(0.5), np.array(0.5, np.float16)], ids=repr)
def test_scalars_of_numpy_are_numbers(rate: Any) -> None:
    assert str(opt.adam(rate)) == str(opt.adam(0.5))


def test_arrays_of_numpy_are_lists_of_numbers() -> None:
    spec = opt.piecewise_constant(np.array([1, 2]), np.array([0.5, 0.25, 0.125]))
    assert str(spec) == str(opt.piecewise_constant([1, 2], [0.5, 0.25, 0.125]))


@pytest.mark.parametrize(
    "wrong",
    [None, 5, opt.Spec(5), opt.Spec("sgd", None)],  # type: ignore[arg-type]
    ids=["none", "number", "a spec without a name", "a spec without arguments"],
)
def test_what_is_no_description_inside_a_chain_is_refused(wrong: Any) -> None:
    with pytest.raises(optwire.SpecError, match="expected"):
        opt.chain(wrong)


def test_a_number_too_long_to_write_down_is_refused(client: optwire.Client) -> None:
    with pytest.raises(
        optwire.SpecError, match=r"adam\.step_size: a whole number of 16610 bits, expected a number from 0 up, finite"
    ):
        opt.adam(10**5000)
    with client.create_session(PARAMS, opt.sgd(0.1)) as session:
        for rate in (10**400, 10**5000):
            with pytest.raises(optwire.InvalidArgumentError, match="learning_rate: .*expected a finite number"):
                session.set_hyperparams(learning_rate=rate)
        with pytest.raises(optwire.InvalidArgumentError, match="base_step: int, expected a number of steps"):
            session.step(PARAMS, base_step=10**5000)
        client.delete_session(session.name)


def test_a_range_is_a_list_of_numbers() -> None:
    assert opt.piecewise_constant(range(1, 3), [3.0, 2.0, 1.0]) == opt.piecewise_constant([1, 2], [3.0, 2.0, 1.0])


@pytest.mark.parametrize(("boundaries", "values"), [(None, [1.0]), ([1], None), ([1, "2"], [1.0, 2.0, 3.0])], ids=repr)
def test_boundaries_that_are_none_are_refused(boundaries: Any, values: Any) -> None:
    with pytest.raises(optwire.SpecError, match="piecewise_constant"):
        opt.piecewise_constant(boundaries, values)


def test_a_decay_rate_without_real_powers_is_refused() -> None:
    with pytest.raises(optwire.SpecError, match=r"decay_rate: -0\.5, expected a positive number"):
        opt.exponential_decay(0.1, 10, -0.5)


def test_a_mask_is_not_dropped(client: optwire.Client) -> None:
    masked = {"w": np.ma.masked_array(np.ones((2, 3), np.float32), mask=np.eye(2, 3))}
    with pytest.raises(optwire.TreeError, match=r"params\['w'\]: a masked array"):
        client.create_session(masked, opt.sgd(0.1))
    with client.create_session(PARAMS, opt.sgd(0.1), name="masked") as session:
        with pytest.raises(optwire.TreeMismatchError, match=r"grads\['w'\]: a masked array"):
            session.step(masked)
        session.step(PARAMS)
    client.delete_session("masked")


@pytest.mark.parametrize(
    "grads",
    [
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.arange(12, dtype=np.float32).reshape(2, 6)[:, ::2],
        np.broadcast_to(np.float32(2.0), (2, 3)),
    ],
    ids=["fortran", "big-endian", "strided", "broadcast"],
)
def test_arrays_laid_out_otherwise_have_the_same_effect(client: optwire.Client, grads: np.ndarray) -> None:
    plain = np.array(grads, np.float32, order="C")
    results = []
    for gradient in (grads, plain):
        with client.create_session(PARAMS, opt.sgd(0.5), name="layout") as session:
            results.append(session.step({"w": gradient})["w"].tobytes())
        client.delete_session("layout")
    assert results[0] == results[1] == (PARAMS["w"] - np.float32(0.5) * plain).tobytes()


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        (None, "grads"),
        ({}, "grads"),
        ({"w": None}, r"grads\['w'\]: None, and so is every other array"),
        ({"w": 1.0}, r"grads\['w'\]: float"),
        ({"w": [1.0] * 3}, r"grads\['w/0'\]: float"),
        ({"w": np.ones((3, 2), np.float32)}, r"grads\['w'\]: shape \(3, 2\), expected \(2, 3\)"),
        ({"w": np.ones((2, 3))}, r"grads\['w'\]: element type f64, expected f32"),
        ({"w": np.ones((2, 3), np.float32), "b": np.ones(1, np.float32)}, "not in the session's tree"),
    ],
    ids=lambda value: str(value)[:30].replace("\n", " "),
)
def test_gradients_that_do_not_match_are_refused_and_change_nothing(
    client: optwire.Client, grads: Any, message: str
) -> None:
    with client.create_session(PARAMS, opt.sgd(0.5), name="mismatch") as session:
        with pytest.raises(optwire.TreeMismatchError, match=message):
            session.step(grads)
        assert session.params()["w"].tobytes() == PARAMS["w"].tobytes()
        assert session.step_count == 0
    client.delete_session("mismatch")


def test_none_in_the_place_of_an_array_is_said_to_be_none(client: optwire.Client) -> None:
    session = client.create_session({"a": np.ones(1), "b": [np.ones(1)]}, opt.sgd(0.5))
    with pytest.raises(optwire.InvalidArgumentError, match=r"grads\['b/0'\] is absent, but the optimizer"):
        session.step({"a": np.ones(1), "b": [None]})
    client.delete_session(session.name)


def test_a_deleted_session_is_called_by_its_name(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.sgd(0.5), name="deleted")
    client.delete_session("deleted")
    for call in (session.info, session.params, lambda: session.step(PARAMS)):
        with pytest.raises(optwire.SessionNotFoundError, match="session 'deleted'") as caught:
            call()
        assert caught.value.subject == "deleted"


def test_a_refusal_that_lasts_stays_what_it_was() -> None:
    with (
        testing.serve(landing_bytes_max=100_000) as serving,
        optwire.connect(serving.target, timeout=1.0) as client,
    ):
        session = client.create_session(PARAMS, opt.sgd(0.5))
        live = serving.server.registry._table.find(name=session.name)
        others = [serving.server.registry._landings.land(live.tree, live.held.layout)]
        with pytest.raises(optwire.LimitError, match="refused after [0-9]+ tries") as refused:
            session.step(PARAMS)
        assert "may or may not" not in str(refused.value)
        for landing in others:
            landing.close()
        session.step(PARAMS)


def test_more_calls_than_threads_wait_their_turn() -> None:
    with testing.serve(threads=2, streams_max=1) as serving:
        failures: list[Exception] = []

        def train(name: str) -> None:
            try:
                with optwire.connect(serving.target) as client:
                    session = client.create_session(PARAMS, opt.sgd(0.5), name=name)
                    for _ in range(20):
                        session.step(PARAMS)
            except Exception as exc:  # noqa: BLE001  shown by the assertion
                failures.append(exc)

        threads = [threading.Thread(target=train, args=(f"crowd-{i}",)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


def test_the_thread_that_watches_deadlines_goes_when_it_is_idle(server: testing.Serving) -> None:
    client = optwire.connect(server.target, transport="stream", timeout=1.0)
    session = client.create_session(PARAMS, opt.sgd(0.5), name="watched")
    session.step(PARAMS)
    deadline = time.monotonic() + 10
    while any(thread.name == "optwire-deadlines" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    session.step(PARAMS)
    client.delete_session("watched")
    client.close()
