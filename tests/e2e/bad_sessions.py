"""Requests about sessions that a server must refuse: optimizers, names, uploads of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.e2e import wire
from tests.e2e.bench import Bench, Case

from optwire_proto import convert, specs
from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import tensor_pb2 as tensor_pb

Spec = specs.Spec
NAN, INF = float("nan"), float("inf")


def spec(name: str, **arguments: Any) -> Spec:
    return Spec(name, tuple(arguments.items()))


def refused(name: str, code: str, reason: str, fragment: str, call: Callable[[Bench], object]) -> Any:
    return pytest.param(Case(call, code, reason, fragment), id=name)


def wrong_spec(name: str, described: Spec, fragment: str, code: str = "INVALID_ARGUMENT") -> Any:
    reason = "INVALID_SPEC" if code == "INVALID_ARGUMENT" else "NOT_SERVED"
    return refused(name, code, reason, fragment, lambda b: b.create(spec=convert.spec_to_proto(described)))


def wrong_value(
    name: str, value: pb.Value, fragment: str, code: str = "INVALID_ARGUMENT", reason: str = "INVALID_SPEC"
) -> Any:
    described = pb.Spec(name="sgd", arguments=[pb.Argument(name="step_size", value=value)])
    return refused(name, code, reason, fragment, lambda b: b.create(spec=described))


def chains(depth: int) -> Spec:
    return spec("chain", members=(chains(depth - 1),)) if depth else spec("sgd", step_size=0.1)


def lists(depth: int) -> pb.Value:
    return pb.Value(list=pb.ValueList(values=[lists(depth - 1)])) if depth else pb.Value(number=1.0)


def wrapped(tags: bytes) -> bytes:
    """An empty message, inside as many others as there are tags, the outermost first."""
    data = b""
    for tag in reversed(tags):
        length = len(data)
        size = bytes([length]) if length < 128 else bytes([length & 127 | 128, length >> 7])
        data = bytes([tag]) + size + data
    return data


SGD = spec("sgd", step_size=0.1)
RATE = {"step_size": 0.1}
CLIP = spec("clip_grads", max_norm=1.0)

SPECS = [
    wrong_spec("an optimizer nobody knows", spec("zzz", **RATE), "unknown optimizer; expected one of sgd"),
    wrong_spec("an optimizer without a name", spec("", **RATE), "unknown optimizer"),
    wrong_spec("an optimizer spelled in capitals", spec("Adam", **RATE), "unknown optimizer"),
    wrong_spec("an optimizer with a very long name", spec("x" * 128, **RATE), "unknown optimizer"),
    wrong_spec("a Python attribute as optimizer", spec("__class__", **RATE), "unknown optimizer"),
    wrong_spec("a schedule as optimizer", spec("constant", **RATE), "a schedule, expected an optimizer"),
    wrong_spec("a transformation as optimizer", CLIP, "nothing in this spec sets a learning rate"),
    wrong_spec(
        "an unknown argument", spec("adam", **RATE, beta1=0.9), "beta1=…): unknown argument; expected step_size, b1"
    ),
    wrong_spec("an argument given twice", Spec("sgd", (("step_size", 0.1), ("step_size", 0.2))), "given twice"),
    wrong_spec("a missing learning rate", spec("adam"), "adam: missing argument 'step_size'"),
    wrong_spec("a missing mass", spec("momentum", **RATE), "momentum: missing argument 'mass'"),
    wrong_spec("text for a number", spec("sgd", step_size="0.1"), "sgd.step_size: '0.1', expected a number"),
    wrong_spec("a flag for a number", spec("sgd", step_size=True), "sgd.step_size: True, expected a number"),
    wrong_spec("a list for a number", spec("sgd", step_size=(0.1,)), "sgd.step_size: [0.1], expected a number"),
    wrong_spec("nothing for a number", spec("sgd", step_size=None), "sgd.step_size: None, expected a number"),
    wrong_spec(
        "a spec for a number", spec("momentum", **RATE, mass=SGD), "momentum.mass: sgd(step_size=0.1), expected"
    ),
    wrong_spec("an optimizer where a schedule belongs", spec("sgd", step_size=SGD), "expected a schedule"),
    wrong_spec(
        "an unknown schedule",
        spec("sgd", step_size=spec("cosine", **RATE)),
        "unknown schedule; expected one of constant",
    ),
    wrong_spec(
        "a learning rate that is not a number",
        spec("sgd", step_size=NAN),
        "sgd.step_size: nan, expected a number from 0 up, finite",
    ),
    wrong_spec(
        "an infinite learning rate",
        spec("adam", step_size=INF),
        "adam.step_size: inf, expected a number from 0 up, finite",
    ),
    wrong_spec(
        "a schedule without end", spec("sgd", step_size=spec("constant", step_size=-INF)), "-inf, expected a finite"
    ),
    wrong_spec(
        "b1 of 1", spec("adam", **RATE, b1=1.0), "adam.b1: 1.0, expected a number from 0 up to, not including, 1"
    ),
    wrong_spec("b1 below 0", spec("adam", **RATE, b1=-0.1), "adam.b1: -0.1"),
    wrong_spec("b2 of 1 as a whole number", spec("adamax", **RATE, b2=1), "adamax.b2: 1, expected a number from 0"),
    wrong_spec("eps of 0", spec("adam", **RATE, eps=0.0), "adam.eps: 0.0, expected a positive number"),
    wrong_spec("eps that is not a number", spec("rmsprop", **RATE, eps=NAN), "rmsprop.eps: nan"),
    wrong_spec(
        "max_norm of 0",
        spec("chain", members=(spec("clip_grads", max_norm=0), SGD)),
        "clip_grads.max_norm: 0, expected a positive",
    ),
    wrong_spec("mass beyond 32 bits", spec("momentum", **RATE, mass=2**40), "1099511627776"),
    wrong_spec(
        "decay_steps of 0",
        spec("sgd", step_size=spec("exponential_decay", **RATE, decay_steps=0, decay_rate=0.9)),
        "decay_steps: 0, expected a positive number",
    ),
    wrong_spec(
        "negative decay_steps",
        spec("sgd", step_size=spec("polynomial_decay", **RATE, decay_steps=-5.0, final_step_size=0.0)),
        "decay_steps: -5.0, expected a positive number",
    ),
    wrong_spec(
        "a number for a flag",
        spec("sgd", step_size=spec("inverse_time_decay", **RATE, decay_steps=5, decay_rate=0.9, staircase=1)),
        "staircase: 1, expected True or False",
    ),
    wrong_spec(
        "a schedule inside a schedule",
        spec("sgd", step_size=spec("constant", step_size=spec("constant", step_size=0.1))),
        "constant(step_size=0.1), expected a finite number",
    ),
    wrong_spec(
        "boundaries that decrease",
        spec("sgd", step_size=spec("piecewise_constant", boundaries=(10, 5), values=(1.0, 0.5, 0.1))),
        "expected boundaries that do not decrease",
    ),
    wrong_spec(
        "as many values as boundaries",
        spec("sgd", step_size=spec("piecewise_constant", boundaries=(10,), values=(1.0,))),
        "expected 2 values, one more than boundaries",
    ),
    wrong_spec(
        "a number for boundaries",
        spec("sgd", step_size=spec("piecewise_constant", boundaries=10, values=(1.0, 0.5))),
        "boundaries: 10, expected a list",
    ),
    wrong_spec(
        "text among boundaries",
        spec("sgd", step_size=spec("piecewise_constant", boundaries=("10",), values=(1.0, 0.5))),
        "boundaries[0]: '10', expected a finite number",
    ),
    wrong_spec(
        "too many boundaries",
        spec("sgd", step_size=spec("piecewise_constant", boundaries=(1,) * 4097, values=(1.0,) * 4098)),
        "expected a list of at most 4096 values",
    ),
    wrong_spec(
        "an empty chain", spec("chain", members=()), "chain.members: [], expected transformations and optimizers"
    ),
    wrong_spec(
        "a chain without an optimizer", spec("chain", members=(CLIP, CLIP)), "nothing in this spec sets a learning rate"
    ),
    wrong_spec(
        "a chain with its optimizer first",
        spec("chain", members=(SGD, CLIP)),
        "sgd replaces parameters instead of making updates",
    ),
    wrong_spec("a chain of numbers", spec("chain", members=(1.0, SGD)), "chain.members[0]: 1.0, expected an optimizer"),
    wrong_spec(
        "a chain that is a single spec",
        spec("chain", members=SGD),
        "chain.members: sgd(step_size=0.1), expected transformations",
    ),
    wrong_spec("chains in chains, 17 deep", chains(17), "nested deeper than 16"),
    wrong_value("lists in lists, 45 deep", lists(45), "nested deeper than"),
    refused(
        "lists in lists, too deep for protobuf",
        "INVALID_ARGUMENT",
        "MALFORMED_REQUEST",
        "bytes that are not its request message",
        lambda b: b.peer.raw(
            f"/{wire.SERVICE.full_name}/CreateSession", wrapped(b"\x0a\x1a\x12\x12" + b"\x32\x0a" * 200)
        ),
    ),
    wrong_value("an argument without a value", pb.Value(), "sgd.step_size: no value"),
    wrong_value("an array without a type for a number", pb.Value(tensor=pb.TensorValue()), "array with element type 0"),
    refused("no spec", "INVALID_ARGUMENT", "INVALID_SPEC", "unknown optimizer", lambda b: b.create(spec=pb.Spec())),
]


def wrong_name(name: str, value: str) -> Any:
    return refused(
        name, "INVALID_ARGUMENT", "INVALID_ARGUMENT", "expected 1 to 128 characters", lambda b: b.create(name=value)
    )


NAMES = [
    wrong_name("a session name that climbs", "../x"),
    wrong_name("a session name that is hidden", ".x"),
    wrong_name("a session name with a slash", "a/b"),
    wrong_name("a session name with a space", "a b"),
    wrong_name("a session name that ends in a line break", "ab\n"),
    wrong_name("a session name with NUL", "a\0b"),
    wrong_name("a session name of 129 characters", "x" * 129),
    wrong_name("a session name written from right to left", "\u202eexe.txt"),
    wrong_name("a session name in other digits", "٣"),
    refused(
        "a name that is taken",
        "ALREADY_EXISTS",
        "SESSION_EXISTS",
        "'reference' exists already",
        lambda b: b.create(name="reference"),
    ),
    *(
        refused(
            f"a create_key {what}",
            "INVALID_ARGUMENT",
            "INVALID_ARGUMENT",
            "create_key",
            lambda b, k=key: b.create(create_key=k),
        )
        for what, key in {
            "that is empty": "",
            "that is short": "ab",
            "in capitals": "A" * 32,
            "of 33 digits": "a" * 33,
            "that is no hexadecimal": "g" * 32,
        }.items()
    ),
]


def wrong_upload(
    name: str, fragment: str, *frames: Any, reason: str = "INVALID_PAYLOAD", code: str = "INVALID_ARGUMENT"
) -> Any:
    return refused(name, code, reason, fragment, lambda b: b.peer.create_from(b.create_begin(), *frames))


GOOD = bytes(range(60))  # as long as the reference parameters
END = pb.PayloadEnd(digest=wire.digest(GOOD))


def chunk(offset: int, data: bytes, **more: Any) -> tensor_pb.Chunk:
    return tensor_pb.Chunk(offset=offset, data=data, **more)


UPLOADS = [
    wrong_upload(
        "parameters with a gap", "leaves a gap: expected offset 20", chunk(0, GOOD[:20]), chunk(24, GOOD[24:]), END
    ),
    wrong_upload(
        "parameters that overlap", "overlaps: expected offset 20", chunk(0, GOOD[:20]), chunk(16, GOOD[16:]), END
    ),
    wrong_upload(
        "parameters past the end", "goes past the end of the payload, 60 bytes", chunk(0, GOOD + b"1234"), END
    ),
    wrong_upload("parameters far beyond", "leaves a gap", chunk(2**64 - 1, b"1234"), END),
    wrong_upload("an empty chunk", "is empty", chunk(0, b""), END),
    wrong_upload("parameters that end early", "payload ended after 20 of 60 bytes", chunk(0, GOOD[:20]), END),
    wrong_upload("no parameters", "payload ended after 0 of 60 bytes", END),
    wrong_upload("parameters without an end", "the stream ended before the payload did", chunk(0, GOOD)),
    wrong_upload("an end without a digest", "without a digest", chunk(0, GOOD), pb.PayloadEnd()),
    wrong_upload("parameters damaged on the way", "payload damaged", chunk(0, GOOD[::-1]), END),
    wrong_upload(
        "two begins", "frame 'begin', expected 'end'", pb.CreateSessionBegin(), END, reason="MALFORMED_REQUEST"
    ),
    wrong_upload(
        "a SHA-256",
        "sha256",
        chunk(0, GOOD),
        pb.PayloadEnd(digest=wire.digest(GOOD, sha256=b"1" * 32)),
        code="UNIMPLEMENTED",
        reason="NOT_SERVED",
    ),
    wrong_upload(
        "a chunk for a shard", "shard", chunk(0, GOOD, shard=1), END, code="UNIMPLEMENTED", reason="NOT_SERVED"
    ),
    wrong_upload(
        "a chunk over 2 MiB",
        "expected at most 2097152",
        chunk(0, bytes(2**21 + 1)),
        code="RESOURCE_EXHAUSTED",
        reason="LIMIT_EXCEEDED",
    ),
    refused(
        "parameters before their begin",
        "INVALID_ARGUMENT",
        "MALFORMED_REQUEST",
        "frame 'chunk', expected 'begin'",
        lambda b: b.peer.create_from(chunk(0, GOOD)),
    ),
    refused(
        "an end and nothing else",
        "INVALID_ARGUMENT",
        "MALFORMED_REQUEST",
        "frame 'end', expected 'begin'",
        lambda b: b.peer.create_from(END),
    ),
    refused(
        "a creation without frames",
        "INVALID_ARGUMENT",
        "MALFORMED_REQUEST",
        "the stream ended before its begin frame",
        lambda b: b.peer.create_from(),
    ),
]
