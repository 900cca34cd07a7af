"""The peer that needs nothing installed: gRPC as its tutorial has it. ``python -m optwire_bench.naive tree|tensors``.

The whole tree in one message each way, or one call for each tensor: unary calls, generated messages, `bytes` for
what is in an array. The server works with the same jitted, donated update as the reference.
"""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from optwire_bench import models, processes, roles

_METHOD = "/optwire.bench.Naive/Step"
_BYTES_MAX = 2**31 - 1
_OPTIONS = [("grpc.max_receive_message_length", _BYTES_MAX), ("grpc.max_send_message_length", _BYTES_MAX)]


def messages() -> Any:
    """The class of ``message Tensors { repeated Tensor tensors = 1; }``, with ``Tensor { string name; bytes data; }``.

    Made when it is needed, by what generated code calls too: the same classes, and no file to generate.
    """
    file = descriptor_pb2.FileDescriptorProto(name="naive.proto", package="optwire.bench", syntax="proto3")
    tensor = file.message_type.add(name="Tensor")
    field = descriptor_pb2.FieldDescriptorProto
    tensor.field.add(name="name", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    tensor.field.add(name="data", number=2, type=field.TYPE_BYTES, label=field.LABEL_OPTIONAL)
    tree = file.message_type.add(name="Tensors")
    tree.field.add(
        name="tensors",
        number=1,
        type=field.TYPE_MESSAGE,
        type_name=".optwire.bench.Tensor",
        label=field.LABEL_REPEATED,
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("optwire.bench.Tensors"))


class Naive:
    """The client: as ``roles`` has them. Its server is a process of its own."""

    def __init__(self, form: str) -> None:
        self._whole = form == "tree"
        self._tensors = messages()

    def open(self, model: models.Model) -> dict[str, Any]:
        command = processes.module("naive", "serve", model.label, str(model.tensors))
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._server.stdout is not None
        self._channel = grpc.insecure_channel(f"127.0.0.1:{int(self._server.stdout.readline())}", options=_OPTIONS)
        self._call = self._channel.unary_unary(
            _METHOD, request_serializer=self._tensors.SerializeToString, response_deserializer=self._tensors.FromString
        )
        self._grads = models.grads(model)
        self._params: dict[str, np.ndarray] = {}
        return {"pids": [self._server.pid]}

    def step(self) -> None:
        names = list(self._grads)
        for part in [names] if self._whole else [[name] for name in names]:
            request = self._tensors()
            for name in part:
                request.tensors.add(name=name, data=self._grads[name].tobytes())
            for tensor in self._call(request).tensors:
                self._params[tensor.name] = np.frombuffer(tensor.data, np.float32)

    def produce(self, factor: float) -> None:
        for leaf in self._grads.values():
            np.multiply(leaf, np.float32(factor), out=leaf)

    def saved(self, what: str) -> Iterable[np.ndarray]:
        return [self._params[name] for name in self._grads]

    def close(self) -> None:
        del self._grads, self._params
        self._channel.close()
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)


def serve(label: str, tensors: int) -> None:
    """Serves one tree until the input ends; writes its port first."""
    import jax

    from optwire_server import optimizers

    kind = messages()
    model = models.model(label, tensors)
    init, update, get_params = optimizers.adam(models.LEARNING_RATE, models.B1, models.B2, models.EPS)
    update = jax.jit(update, donate_argnums=2)
    states = {name: (0, init(jax.numpy.array(leaf))) for name, leaf in models.params(model).items()}

    def step(request: Any, _: grpc.ServicerContext) -> Any:
        response = kind()
        for tensor in request.tensors:
            index, state = states.pop(tensor.name)
            shape = get_params(state).shape
            state = update(index, np.frombuffer(tensor.data, np.float32).reshape(shape), state)
            states[tensor.name] = index + 1, state
            response.tensors.add(name=tensor.name, data=np.asarray(get_params(state)).tobytes())
        return response

    handler = grpc.unary_unary_rpc_method_handler(
        step, request_deserializer=kind.FromString, response_serializer=kind.SerializeToString
    )
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(4), options=_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("optwire.bench.Naive", {"Step": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    sys.stdin.read()
    server.stop(None)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        roles.serve(Naive(sys.argv[1]))
