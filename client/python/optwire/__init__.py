"""optwire: optimizer state on a server, gradients in and parameters out.

Example:
  >>> import numpy as np, optwire
  >>> from optwire import optimizers as opt
  >>> with optwire.connect("localhost:50051") as client:  # doctest: +SKIP
  ...     session = client.create_session({"w": np.zeros(3, np.float32)}, opt.adam(1e-3), name="tiny")
  ...     params = session.step({"w": np.ones(3, np.float32)})

Adapters are modules of their own, imported only by those who use them: ``optwire.jax``.
"""

from optwire import optax, optimizers
from optwire._client import Client, connect
from optwire._local_steps import LocalSteps
from optwire._session import Session
from optwire._state import State
from optwire_proto.errors import (
    DeadlineError,
    DetachedError,
    DivergentRetryError,
    FuturePushError,
    FutureStepError,
    HyperparameterOwnedError,
    IncarnationError,
    InternalError,
    InvalidArgumentError,
    LimitError,
    MalformedRequestError,
    NonFiniteError,
    OptwireError,
    OutOfStepError,
    PayloadError,
    ReplacedError,
    SessionExistsError,
    SessionFailedError,
    SessionNotFoundError,
    SpecError,
    StalePushError,
    StaleStepError,
    StepClosedError,
    TreeError,
    TreeMismatchError,
    UnavailableError,
    UnsupportedError,
)
from optwire_proto.rows import Rows
from optwire_proto.sessions import Ack, OptimizerInfo, ServerInfo, SessionInfo, WorkerInfo, WorkerState
from optwire_proto.tensors import bf16_to_f32 as from_bf16
from optwire_proto.tensors import f32_to_bf16 as to_bf16

__version__ = "0.1.0"

__all__ = [
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
