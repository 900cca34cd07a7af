"""The errors of optwire, one tree, and the one table that ties each to a status code and a reason.

    OptwireError
    ├── InvalidArgumentError           the request is wrong by itself
    │   ├── SpecError                  unknown optimizer or argument, value of the wrong kind
    │   ├── HyperparameterOwnedError   set by the client, while a schedule of the spec decides it
    │   ├── TreeError                  a tree that cannot be served: names, shapes, nesting, element types
    │   ├── TreeMismatchError          gradients that do not match the session's tree
    │   ├── NonFiniteError             gradients with NaN or infinity where the session rejects them
    │   ├── PayloadError               chunks with a gap or overlap, past the end, too few, damaged
    │   └── MalformedRequestError      bytes or frames that are not the protocol
    ├── SessionNotFoundError
    ├── SessionExistsError
    ├── OutOfStepError                 the request does not fit where the session is
    │   ├── StaleStepError             computed on parameters that are no longer the newest
    │   │   └── StepClosedError        of a step that was made without it
    │   ├── FutureStepError            names a step the session has not reached
    │   ├── StalePushError             a push older than the worker's last one
    │   ├── FuturePushError            a push that skips one
    │   ├── DivergentRetryError        a retry whose bytes differ from the push that was applied
    │   ├── ReplacedError              another process has joined as this worker
    │   └── IncarnationError           the session's history was rewritten
    ├── SessionFailedError             the session lost its state and accepts no more steps
    ├── LimitError                     too large or too many
    ├── UnsupportedError               named by the protocol, not served by this server
    ├── UnavailableError               the server cannot be reached, or is draining
    ├── DeadlineError                  no answer in time (also a TimeoutError)
    ├── DetachedError                  the handle was closed (client side only)
    └── InternalError                  a defect of the server

Status codes stand here by their canonical names, so that this module needs no gRPC.
"""

from __future__ import annotations


class OptwireError(Exception):
    """Root of all errors of optwire.

    Attributes:
      subject: what it is about: a leaf, an argument, a session; may be empty.
      expected: what was expected; may be empty.
      got: what came; may be empty.
      step: the session's step where that matters, else None.
      retry_after_s: seconds to wait before a retry; 0 for no advice.
    """

    reason = "INTERNAL"
    code = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        subject: str = "",
        expected: str = "",
        got: str = "",
        step: int | None = None,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.subject = subject
        self.expected = expected
        self.got = got
        self.step = step
        self.retry_after_s = retry_after_s


class InvalidArgumentError(OptwireError, ValueError):
    """The request is wrong by itself; repeating it cannot help."""

    reason = "INVALID_ARGUMENT"
    code = "INVALID_ARGUMENT"


class SpecError(InvalidArgumentError):
    """An optimizer spec names something unknown, or gives an argument a value it cannot take."""

    reason = "INVALID_SPEC"


class HyperparameterOwnedError(InvalidArgumentError):
    """Two owners of one hyperparameter: the client sets what a schedule of the spec decides."""

    reason = "HYPERPARAMETER_OWNED"


class TreeError(InvalidArgumentError):
    """A tree of parameters cannot be served: a name, shape, nesting or element type is not allowed."""

    reason = "INVALID_TREE"


class TreeMismatchError(InvalidArgumentError):
    """Gradients do not match the session's tree: a leaf is missing, extra, misshaped or mistyped."""

    reason = "TREE_MISMATCH"


class NonFiniteError(InvalidArgumentError):
    """Gradients hold NaN or infinity, or would make the state so, and the session's policy is to reject them."""

    reason = "NON_FINITE"


class PayloadError(InvalidArgumentError):
    """The bytes of a payload do not add up: gap, overlap, past the end, too few, or damaged on the way."""

    reason = "INVALID_PAYLOAD"


class MalformedRequestError(InvalidArgumentError):
    """The bytes or the order of frames are not the protocol."""

    reason = "MALFORMED_REQUEST"


class SessionNotFoundError(OptwireError, LookupError):
    """No session has this name or id. Sessions held in memory end with the server's process."""

    reason = "SESSION_NOT_FOUND"
    code = "NOT_FOUND"


class SessionExistsError(OptwireError):
    """A session with this name exists already."""

    reason = "SESSION_EXISTS"
    code = "ALREADY_EXISTS"


class OutOfStepError(OptwireError):
    """The request does not fit where the session is; ``step`` says where that is."""

    reason = "OUT_OF_STEP"
    code = "FAILED_PRECONDITION"


class StaleStepError(OutOfStepError):
    """The gradients were computed on parameters that are no longer the newest; read them and compute again."""

    reason = "STALE_STEP"
    code = "ABORTED"


class StepClosedError(StaleStepError):
    """The step that the push is for was made of other workers' pushes; read the newest parameters and go on."""

    reason = "STEP_CLOSED"


class FutureStepError(OutOfStepError):
    """The push names a step that the session has not reached."""

    reason = "FUTURE_STEP"


class StalePushError(OutOfStepError):
    """The push is older than the worker's last applied one; it was applied before or replaced."""

    reason = "STALE_PUSH"
    code = "ABORTED"


class FuturePushError(OutOfStepError):
    """The push skips one of the worker's pushes."""

    reason = "FUTURE_PUSH"


class DivergentRetryError(OutOfStepError):
    """A push with this key was applied, with other bytes; read the parameters and go on from there."""

    reason = "DIVERGENT_RETRY"
    code = "ABORTED"


class ReplacedError(OutOfStepError):
    """Another process has joined as this worker since; this one's pushes are of no further use."""

    reason = "REPLACED"


class IncarnationError(OutOfStepError):
    """The session's history was rewritten since the client attached; attach again."""

    reason = "WRONG_INCARNATION"


class SessionFailedError(OptwireError):
    """The session lost its state in a failed update and accepts no more steps; delete it and create it anew."""

    reason = "SESSION_FAILED"
    code = "DATA_LOSS"


class LimitError(OptwireError):
    """Too large or too many; the message names the limit."""

    reason = "LIMIT_EXCEEDED"
    code = "RESOURCE_EXHAUSTED"


class UnsupportedError(OptwireError):
    """The protocol has a name for it, this server does not serve it."""

    reason = "NOT_SERVED"
    code = "UNIMPLEMENTED"


class UnavailableError(OptwireError, ConnectionError):
    """The server cannot be reached, or is draining; the same call may succeed later."""

    reason = "UNAVAILABLE"
    code = "UNAVAILABLE"


class DeadlineError(OptwireError, TimeoutError):
    """No answer in time. A push that timed out may have been applied; the handle finds out at its next call."""

    reason = "DEADLINE_EXCEEDED"
    code = "DEADLINE_EXCEEDED"


class DetachedError(OptwireError):
    """The handle was closed."""

    reason = "DETACHED"
    code = "CANCELLED"


class InternalError(OptwireError):
    """A defect of the server; its log says more under the same reference."""


# (code, reason) of every error; a reason stands for one class, and neither changes once released.
TABLE: dict[str, tuple[str, type[OptwireError]]] = {
    kind.reason: (kind.code, kind)
    for kind in (
        InvalidArgumentError,
        SpecError,
        HyperparameterOwnedError,
        TreeError,
        TreeMismatchError,
        NonFiniteError,
        PayloadError,
        MalformedRequestError,
        SessionNotFoundError,
        SessionExistsError,
        OutOfStepError,
        StaleStepError,
        StepClosedError,
        FutureStepError,
        StalePushError,
        FuturePushError,
        DivergentRetryError,
        ReplacedError,
        IncarnationError,
        SessionFailedError,
        LimitError,
        UnsupportedError,
        UnavailableError,
        DeadlineError,
        DetachedError,
        InternalError,
    )
}

# What a status code means when it comes without a reason of ours: from gRPC itself, a proxy, another server.
_BY_CODE: dict[str, type[OptwireError]] = {
    "INVALID_ARGUMENT": InvalidArgumentError,
    "NOT_FOUND": SessionNotFoundError,
    "ALREADY_EXISTS": SessionExistsError,
    "FAILED_PRECONDITION": OutOfStepError,
    "ABORTED": OutOfStepError,
    "DATA_LOSS": SessionFailedError,
    "RESOURCE_EXHAUSTED": LimitError,
    "UNIMPLEMENTED": UnsupportedError,
    "UNAVAILABLE": UnavailableError,
    "CANCELLED": UnavailableError,
    "DEADLINE_EXCEEDED": DeadlineError,
}


def from_status(code: str, reason: str, message: str, **details: object) -> OptwireError:
    """Builds the error for a status.

    Args:
      code: canonical name of the status code, such as "NOT_FOUND".
      reason: our reason, or empty when the status did not come from optwire.
      message: the status message.
      **details: attributes of ``OptwireError``.
    """
    kind = TABLE[reason][1] if reason in TABLE else _BY_CODE.get(code, InternalError)
    return kind(message, **details)  # type: ignore[arg-type]
