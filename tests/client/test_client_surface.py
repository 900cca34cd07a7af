"""The public surface, spelled out: what is not here may change, what is here may not."""

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import optwire
from optwire_proto import errors

ROOT = Path(__file__).resolve().parents[2]


def test_the_package_exports_exactly_these_names():
    assert sorted(optwire.__all__) == sorted(
        [
            "Ack",
            "Client",
            "DeadlineError",
            "DetachedError",
            "DivergentRetryError",
            "FuturePushError",
            "FutureStepError",
            "HyperparameterOwnedError",
            "IncarnationError",
            "InternalError",
            "InvalidArgumentError",
            "LimitError",
            "LocalSteps",
            "MalformedRequestError",
            "NonFiniteError",
            "OptimizerInfo",
            "OptwireError",
            "OutOfStepError",
            "PayloadError",
            "ReplacedError",
            "Rows",
            "ServerInfo",
            "Session",
            "SessionExistsError",
            "SessionFailedError",
            "SessionInfo",
            "SessionNotFoundError",
            "SpecError",
            "StalePushError",
            "StaleStepError",
            "State",
            "StepClosedError",
            "TreeError",
            "TreeMismatchError",
            "UnavailableError",
            "UnsupportedError",
            "WorkerInfo",
            "WorkerState",
            "__version__",
            "connect",
            "from_bf16",
            "optax",
            "optimizers",
            "to_bf16",
        ]
    )
    assert all(hasattr(optwire, name) for name in optwire.__all__)


def test_every_error_of_the_protocol_is_exported():
    kinds = {kind.__name__ for _, kind in errors.TABLE.values()} | {"OptwireError"}
    assert kinds <= set(optwire.__all__)


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (optwire.connect, "(target: str, *, timeout: float = 30.0, transport: str = 'auto') -> Client"),
        (
            optwire.Client.create_session,
            "(self, params: Any, spec: specs.Spec | str, *, name: str | None = None, seed: int = 0, "
            "extends: _session.Session | None = None, aggregation: str | None = None, worker: int | None = None, "
            "turns: int | None = None, grads_codec: str | None = None, params_codec: str | None = None) "
            "-> _session.Session",
        ),
        (optwire.Client.attach, "(self, name: str, *, worker: int | None = None) -> _session.Session"),
        (optwire.Client.list_sessions, "(self) -> list[sessions.SessionInfo]"),
        (optwire.Client.delete_session, "(self, name: str) -> None"),
        (optwire.Client.server_info, "(self) -> sessions.ServerInfo"),
        (optwire.Client.close, "(self) -> None"),
        (
            optwire.Session.step,
            "(self, grads: Any, base_step: int | None = None, *, loss: float | None = None, grad_scale: float = 1.0, "
            "hyperparams: Mapping[str, float | specs.Spec] | None = None, weight: float = 1.0, "
            "telemetry: bool = False, reply: str = params, late: str = raise, rows: str = lazy, out: Any = None) "
            "-> Any",
        ),
        (
            optwire.Session.step_async,
            "(self, grads: Any, base_step: int | None = None, **arguments: Any) -> concurrent.futures.Future[Any]",
        ),
        (optwire.Session.grad_buffers, "(self) -> Any"),
        (optwire.Session.param_buffers, "(self) -> Any"),
        (optwire.Session.params, "(self, which: str = , *, out: Any = None) -> Any"),
        (optwire.Session.describe, "(self) -> sessions.OptimizerInfo"),
        (optwire.Session.info, "(self) -> sessions.SessionInfo"),
        (optwire.Session.workers, "(self) -> tuple[sessions.WorkerInfo, ...]"),
        (optwire.Session.state, "(self) -> _state.State"),
        (
            optwire.Session.load_state,
            "(self, state: _state.State | Mapping[str, Any], *, step: int | None = None, base_step: int | None = None) "
            "-> None",
        ),
        (
            optwire.Session.set_hyperparams,
            "(self, hyperparams: Mapping[str, float | specs.Spec] | None = None, /, *, "
            "from_step: int | None = None, **named: float | specs.Spec) -> int",
        ),
        (optwire.Session.close, "(self) -> None"),
    ],
)
def test_signatures_are_as_promised(function, signature):
    assert str(inspect.signature(function)).replace("'", "") == signature.replace("'", "")


def test_classes_have_no_public_names_beyond_the_promised_ones():
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(optwire.Client) == {
        "attach",
        "close",
        "create_session",
        "delete_session",
        "list_sessions",
        "server_info",
    }
    assert public(optwire.Session) == {
        "close",
        "describe",
        "grad_buffers",
        "id",
        "info",
        "last_ack",
        "late_count",
        "load_state",
        "name",
        "param_buffers",
        "params",
        "rows",
        "set_hyperparams",
        "state",
        "step",
        "step_async",
        "step_count",
        "workers",
    }


def test_the_version_is_the_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert optwire.__version__ == project["version"]


def test_importing_the_client_imports_neither_jax_nor_torch_nor_ml_dtypes():
    code = "import sys, optwire; print(sorted({'jax', 'torch', 'ml_dtypes', 'optwire_server'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("target", ["", None, 50051, b"localhost:1"])
def test_a_target_that_is_no_text_is_refused(target):
    with pytest.raises(optwire.InvalidArgumentError, match="target"):
        optwire.connect(target)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), "30", None, True, 1e9])
def test_a_timeout_that_is_no_positive_number_is_refused(timeout):
    with pytest.raises(optwire.InvalidArgumentError, match="timeout"):
        optwire.connect("localhost:1", timeout=timeout)


@pytest.mark.parametrize("transport", ["shared-memory", "", None, "AUTO", ["auto"]])
def test_an_unknown_transport_is_refused_by_name(transport):
    with pytest.raises(optwire.InvalidArgumentError, match="expected one of auto, stream, unary, shared_memory"):
        optwire.connect("localhost:1", transport=transport)


def test_bf16_round_trips():
    values = np.array([1.0, -2.5, 0.0], np.float32)
    assert np.array_equal(optwire.from_bf16(optwire.to_bf16(values)), values)
