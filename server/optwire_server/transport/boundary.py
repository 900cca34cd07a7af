"""What every call passes: messages that cannot be read, fields nobody knows, errors on their way out as statuses."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf import message as protobuf_message

from optwire_proto import convert, errors, limits

_log = logging.getLogger("optwire.transport")

ERROR_METADATA = "optwire-error-bin"
_SERVICE = "/optwire.v1."


class _Unreadable:
    """Stands for a message that protobuf could not parse; gRPC would answer INTERNAL by itself."""

    def __init__(self, method: str, size: int) -> None:
        self.method = method
        self.size = size


class Boundary(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps every method, so that the servicers raise our errors and see only messages they fully understand."""

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = continuation(handler_call_details)
        if handler is None:
            return None  # gRPC answers UNIMPLEMENTED
        method = handler_call_details.method
        kind = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        wrap = _streaming if handler.response_streaming else _single
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        wrapped: grpc.RpcMethodHandler[Any, Any] = make(
            wrap(getattr(handler, kind), _each_readable if handler.request_streaming else _readable),
            request_deserializer=_tolerant(_reader(handler, method), method),
            response_serializer=_writer(handler, method),
        )
        return wrapped


def _reader(handler: Any, method: str) -> Callable[[bytes], Any]:
    """What reads requests: in streams of our own service they are frames."""
    read = handler.request_deserializer
    return convert.frame_reader(read) if handler.request_streaming and method.startswith(_SERVICE) else read


def _writer(handler: Any, method: str) -> Callable[[Any], bytes]:
    write = handler.response_serializer
    return convert.frame_writer(write) if handler.response_streaming and method.startswith(_SERVICE) else write


def _single(method: Callable[..., Any], read: Callable[[Any], Any]) -> Callable[..., Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Any:
        with _statuses(context):
            return method(read(request), context)

    return call


def _streaming(method: Callable[..., Any], read: Callable[[Any], Any]) -> Callable[..., Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with _statuses(context):
            yield from method(read(request), context)

    return call


def _each_readable(requests: Iterator[Any]) -> Iterator[Any]:
    return map(_readable, requests)


def _readable(request: Any) -> Any:
    if isinstance(request, _Unreadable):
        raise errors.MalformedRequestError(
            f"{request.method}: {request.size} bytes that are not its request message",
            subject=request.method,
            got=f"{request.size} bytes",
        )
    if type(request) is not convert.Chunk:  # which has been read to its end, and has no other fields
        convert.refuse_unknown_fields(request)
    return request


def _tolerant(parse: Callable[[bytes], Any], method: str) -> Callable[[bytes], Any]:
    def tolerant(data: bytes) -> Any:
        try:
            return parse(data)
        except protobuf_message.DecodeError:
            return _Unreadable(method, len(data))

    return tolerant


@contextlib.contextmanager
def _statuses(context: grpc.ServicerContext) -> Iterator[None]:
    """Ends the call with the status of the error that a method raised."""
    try:
        yield
    except errors.OptwireError as exc:
        error = exc
    except grpc.RpcError:
        context.abort(grpc.StatusCode.CANCELLED, "the client has gone")
    except Exception as exc:  # noqa: BLE001  the boundary: whatever else is raised is a defect of ours
        reference = secrets.token_hex(4)
        _log.exception("defect, reference %s", reference)
        error = errors.InternalError(f"the server failed, see its log under {reference}; {type(exc).__name__}")
    else:
        return
    code = grpc.StatusCode[errors.TABLE[error.reason][0]]
    context.set_trailing_metadata(((ERROR_METADATA, convert.error_to_proto(error)),))
    context.abort(code, convert.cut(str(error), limits.ERROR_MESSAGE_BYTES_MAX))
