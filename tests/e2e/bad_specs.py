"""Specs that a server must refuse, each with the path inside the spec that its error names."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import pytest

from optwire_proto.v1 import optimizer_pb2 as pb
from optwire_proto.v1 import tensor_pb2 as tensor_pb

NAN, INF = float("nan"), float("inf")
INVALID, NOT_SERVED = ("INVALID_ARGUMENT", "INVALID_SPEC"), ("UNIMPLEMENTED", "NOT_SERVED")


@dataclasses.dataclass(frozen=True)
class BadSpec:
    """One spec, and what must come of it: the path that the error names, a part of its message, status and reason."""

    spec: pb.Spec
    subject: str
    fragment: str
    outcome: tuple[str, str] = INVALID


def value(given: Any) -> pb.Value:
    """A value as a message, right or wrong; a mapping becomes a list of pairs, bytes a blob."""
    if isinstance(given, pb.Value):
        return given
    if isinstance(given, dict):
        given = list(given.items())
    if isinstance(given, list | tuple | range):
        return pb.Value(list=pb.ValueList(values=map(value, given)))
    kinds = {
        type(None): "absent",
        bool: "flag",
        int: "integer",
        float: "number",
        str: "text",
        bytes: "blob",
        pb.Spec: "spec",
        pb.TensorValue: "tensor",
    }
    return pb.Value(**{kinds[type(given)]: pb.Absent() if given is None else given})


def spec(name: str, **arguments: Any) -> pb.Spec:
    return made(name, arguments.items())


def made(name: str, arguments: Any) -> pb.Spec:
    return pb.Spec(name=name, arguments=[pb.Argument(name=key, value=value(given)) for key, given in arguments])


def array(numbers: Any, shape: Any = None, kind: str = "f", data_type: int = tensor_pb.DATA_TYPE_F32) -> pb.TensorValue:
    leaf = tensor_pb.LeafSpec(shape=[len(numbers)] if shape is None else shape, data_type=data_type)
    return pb.TensorValue(leaf=leaf, data=struct.pack(f"<{len(numbers)}{kind}", *numbers))


def wrapped(tags: bytes, data: bytes = b"") -> bytes:
    """A message inside as many others as there are tags, the outermost first."""
    for tag in reversed(tags):
        length, size = len(data), b""
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        data = bytes([tag]) + size + bytes([length]) + data
    return data


def bad(name: str, described: pb.Spec, subject: str, fragment: str, outcome: tuple[str, str] = INVALID) -> Any:
    return pytest.param(BadSpec(described, subject, fragment, outcome), id=name)


def text(name: str, written: str, subject: str, fragment: str, outcome: tuple[str, str] = INVALID) -> Any:
    return bad(f"{name}, as text", pb.Spec(text=written), subject, fragment, outcome)


RATE = {"learning_rate": 0.1}
SGD = spec("sgd", step_size=0.1)
ADAMW = spec("adamw", **RATE)
SCALE = spec("scale", step_size=-0.1)
CLIP = spec("clip_by_global_norm", max_norm=1.0)


def chain(*members: Any) -> pb.Spec:
    return spec("chain", members=members)


def chains(depth: int) -> pb.Spec:
    return chain(chains(depth - 1)) if depth else SGD


def scheduled(schedule: Any) -> pb.Spec:
    return spec("sgd", step_size=schedule)


def partition(transforms: Any) -> pb.Spec:
    return spec("partition", transforms=transforms)


def masked(mask: Any) -> pb.Spec:
    return spec("adamw", **RATE, mask=mask)


NAMES = [
    bad("a name misspelt", spec("adamwd", **RATE), "adamwd", "unknown optimizer (did you mean 'adamw'?)"),
    bad("a name in capitals", spec("AdamW", **RATE), "AdamW", "(did you mean 'adamw'?)"),
    bad("muon of 65 steps", spec("muon", learning_rate=0.1, ns_steps=65), "muon.ns_steps", "from 1 to 64"),
    bad("a name like no other", spec("qqq", **RATE), "qqq", "unknown optimizer; expected one of sgd, momentum"),
    bad("no name", spec("", **RATE), "", "unknown optimizer"),
    bad("no spec", pb.Spec(), "", "unknown optimizer"),
    bad("a Python attribute", spec("__class__"), "__class__", "unknown optimizer"),
    bad("a name of optax that makes no optimizer", spec("apply_updates"), "apply_updates", "unknown optimizer"),
    bad("a name of 129 bytes", spec("x" * 129), "spec", "expected text of at most 128 bytes"),
    bad(
        "a misspelt transformation",
        chain(spec("clip_by_globl_norm", max_norm=1.0), SGD),
        "chain.members[0].clip_by_globl_norm",
        "unknown transformation (did you mean 'clip_by_global_norm'?)",
    ),
    bad(
        "a misspelt schedule",
        scheduled(spec("cosine_decay", init_value=0.1, decay_steps=9)),
        "sgd.step_size.cosine_decay",
        "unknown schedule (did you mean",
    ),
    bad("a schedule as optimizer", spec("constant", step_size=0.1), "constant", "a schedule, expected an optimizer"),
    bad("an optimizer as schedule", scheduled(SGD), "sgd.step_size.sgd", "an optimizer, expected a schedule"),
    bad(
        "a transformation as schedule",
        spec("adamw", learning_rate=CLIP),
        "adamw.learning_rate.clip_by_global_norm",
        "a transformation, expected a schedule",
    ),
    bad("a transformation alone", CLIP, "clip_by_global_norm", "nothing in this spec sets a learning rate"),
    bad("a chain of transformations", chain(CLIP, CLIP), "chain", "nothing in this spec sets a learning rate"),
    bad(
        "a transformation in a wrapper of optimizers",
        spec("accumulate", optimizer=CLIP, k=2),
        "accumulate.optimizer",
        "an optimizer: nothing in this spec sets a learning rate",
    ),
    bad("sophia", spec("sophia", **RATE), "sophia", "not served: it evaluates the loss function", NOT_SERVED),
    bad("optax's chain", spec("optax.chain"), "optax.chain", "chain is optwire's own", NOT_SERVED),
    bad(
        "a refused name inside",
        spec("ema_params", optimizer=spec("sam", optimizer=SGD)),
        "ema_params.optimizer.sam",
        "is not served: a sharpness-aware step",
        NOT_SERVED,
    ),
    bad("a program where none is allowed", spec("exported", update=b"program"), "exported", "no programs", NOT_SERVED),
    bad(
        "a program inside",
        chain(CLIP, spec("exported", update=b"program")),
        "chain.members[1].exported",
        "takes no programs",
        NOT_SERVED,
    ),
]

ARGUMENTS = [
    bad("an unknown argument", spec("adamw", **RATE, beta1=0.9), "adamw.beta1", "unknown argument"),
    bad("a misspelt argument", spec("adamw", **RATE, weight_decy=0.1), "adamw.weight_decy", "mean 'weight_decay'?"),
    bad("optax's name for the seed's argument", spec("adam", **RATE), "adam.learning_rate", "expected step_size, b1"),
    bad("an argument without a name", made("sgd", [("", 0.1)]), "sgd.", "unknown argument; expected step_size"),
    bad("an argument twice", made("sgd", [("step_size", 0.1), ("step_size", 0.1)]), "sgd.step_size", "given twice"),
    bad("an argument's name of 129 bytes", made("sgd", [("x" * 129, 0.1)]), "sgd", "at most 128 bytes"),
    bad("a missing learning rate", spec("adamw"), "adamw.learning_rate", "missing argument 'learning_rate'"),
    bad("a missing argument of a schedule", scheduled(spec("table")), "sgd.step_size.table.values", "missing argument"),
    bad("an argument without a value", scheduled(pb.Value()), "sgd.step_size", "no value"),
    bad(
        "an argument deep inside without a value",
        chain(CLIP, spec("accumulate", optimizer=scheduled(pb.Value()), k=2)),
        "chain.members[1].accumulate.optimizer.sgd.step_size",
        "no value",
    ),
    bad("a function that is refused as argument", spec("lbfgs", **RATE), "lbfgs.linesearch", "it must be None"),
    bad("a line search", spec("lbfgs", **RATE, linesearch=CLIP), "lbfgs.linesearch", "expected None: a line search"),
    bad("key and seed", spec("noisy_sgd", **RATE, key=1, seed=2), "noisy_sgd.seed", "key or seed, not both"),
]

NUMBERS = [
    bad("a rate of NaN", scheduled(NAN), "sgd.step_size", "nan, expected a number from 0 up"),
    bad("an infinite rate", scheduled(INF), "sgd.step_size", "inf, expected"),
    bad("a negative rate", scheduled(-0.1), "sgd.step_size", "-0.1, expected a number from 0 up or a schedule"),
    bad("a negative whole rate", spec("adamw", learning_rate=-1), "adamw.learning_rate", "-1, expected"),
    bad("a rate beyond 32 bits", scheduled(1e39), "sgd.step_size", "1e+39, expected a number from 0 up, finite"),
    bad("a whole rate beyond 32 bits", scheduled(2**31), "sgd.step_size", "2147483648, expected"),
    bad("a flag as rate", scheduled(True), "sgd.step_size", "True, expected a number from 0 up"),
    bad("a text as rate", scheduled("0.1"), "sgd.step_size", "'0.1', expected a number from 0 up"),
    bad("None as rate", scheduled(None), "sgd.step_size", "None, expected a number from 0 up"),
    bad("a list as rate", scheduled([0.1, 0.2]), "sgd.step_size", "[0.1, 0.2], expected a number from 0 up"),
    bad("an array as rate", scheduled(array([0.1])), "sgd.step_size", "expected a number from 0 up"),
    bad("a blob as rate", scheduled(b"0.1"), "sgd.step_size", "3 bytes, sha256"),
    bad(
        "a schedule as number",
        spec("momentum", step_size=0.1, mass=spec("constant", step_size=0.9)),
        "momentum.mass",
        "expected a finite number",
    ),
    bad(
        "a number of a schedule that is NaN",
        scheduled(spec("constant", step_size=NAN)),
        "sgd.step_size.constant.step_size",
        "nan, expected a finite number",
    ),
    bad("b1 of 1.5", spec("adam", step_size=0.1, b1=1.5), "adam.b1", "1.5, expected a number from 0 up to, not"),
    bad("optax's b1 of 1.5", spec("adamw", **RATE, b1=1.5), "adamw.b1", "1.5, expected a number from 0 to 1"),
    bad("b2 below 0", spec("adamw", **RATE, b2=-1e-9), "adamw.b2", "expected a number from 0 to 1"),
    bad("eps of 0", spec("adam", step_size=0.1, eps=0), "adam.eps", "0, expected a positive number"),
    bad("negative eps", spec("adamw", **RATE, eps=-1e-8), "adamw.eps", "-1e-08, expected a number from 0 up"),
    bad("max_norm of 0", chain(spec("clip", max_delta=0.0), SGD), "chain.members[0].clip.max_delta", "positive"),
    bad("k of 0", spec("accumulate", optimizer=SGD, k=0), "accumulate.k", "0, expected a whole number from 1 up"),
    bad("k of 2.5", spec("accumulate", optimizer=SGD, k=2.5), "accumulate.k", "2.5, expected a whole number"),
    bad("k of 2.0", spec("accumulate", optimizer=SGD, k=2.0), "accumulate.k", "2.0, expected a whole number"),
    bad("a flag as k", spec("accumulate", optimizer=SGD, k=True), "accumulate.k", "True, expected a whole number"),
    bad(
        "sync_period of 0",
        spec("lookahead", fast_optimizer=ADAMW, sync_period=0, slow_step_size=0.5),
        "lookahead.sync_period",
        "0, expected a whole number from 1 up",
    ),
    bad(
        "negative transition_steps",
        scheduled(spec("linear_schedule", init_value=1.0, end_value=0.0, transition_steps=-1)),
        "sgd.step_size.linear_schedule.transition_steps",
        "-1, expected a whole number from 1 up",
    ),
    bad(
        "a negative number of warm-up steps",
        scheduled(spec("warmup_constant_schedule", init_value=0.0, peak_value=1.0, warmup_steps=-5)),
        "sgd.step_size.warmup_constant_schedule.warmup_steps",
        "-5, expected a whole number from 0 up",
    ),
    bad("a seed that is real", spec("noisy_sgd", **RATE, seed=0.5), "noisy_sgd.seed", "0.5, expected a whole number"),
    bad("a weight decay of NaN", spec("adamw", **RATE, weight_decay=NAN), "adamw.weight_decay", "nan, expected"),
    bad("momentum of minus infinity", spec("optax.sgd", **RATE, momentum=-INF), "optax.sgd.momentum", "-inf, expected"),
]

KINDS = [
    bad("a number as flag", spec("adamw", **RATE, nesterov=1), "adamw.nesterov", "1, expected True or False"),
    bad("a text as flag", spec("adamw", **RATE, nesterov="yes"), "adamw.nesterov", "'yes', expected True or False"),
    bad("an unknown element type", spec("adamw", **RATE, mu_dtype="f8"), "adamw.mu_dtype", "one of float32, float64"),
    bad("a number as element type", spec("adamw", **RATE, mu_dtype=32), "adamw.mu_dtype", "32, expected an element"),
    bad(
        "an unknown element type of weights",
        spec("master_weights", optimizer=SGD, dtype="int8"),
        "master_weights.dtype",
        "'int8', expected an element type",
    ),
    bad(
        "an unknown choice",
        spec("on_nonfinite", optimizer=SGD, policy="ignore"),
        "on_nonfinite.policy",
        "'ignore', expected one of 'reject', 'skip', 'zero'",
    ),
    bad("None as choice", spec("on_nonfinite", optimizer=SGD, policy=None), "on_nonfinite.policy", "None, expected"),
    bad(
        "an unknown way to interpolate",
        scheduled(spec("piecewise_interpolate_schedule", interpolate_type="cubic", init_value=1.0)),
        "sgd.step_size.piecewise_interpolate_schedule.interpolate_type",
        "expected one of 'linear', 'cosine'",
    ),
    bad("a number as list of numbers", spec("prodigy", **RATE, betas=0.9), "prodigy.betas", "expected a list of numb"),
    bad("a text among numbers", spec("prodigy", **RATE, betas=[0.9, "x"]), "prodigy.betas[1]", "'x', expected a fin"),
    bad("three betas", spec("prodigy", **RATE, betas=[0.9, 0.9, 0.9]), "prodigy.betas", "expected two numbers"),
    bad(
        "a list of 4,097",
        scheduled(spec("piecewise_constant", boundaries=[1] * 4097, values=[1.0])),
        "sgd.step_size.piecewise_constant.boundaries",
        "a list of 4097 values, expected a list of at most 4096",
    ),
    bad(
        "24,000 values in lists that are short enough",
        scheduled(
            spec(
                "join_schedules",
                schedules=[spec("piecewise_constant", boundaries=range(4095), values=[0.1] * 4096)] * 3,
                boundaries=[1, 2],
            )
        ),
        "sgd.step_size.join_schedules.schedules[1].piecewise_constant.values",
        "more than 16384 values in one spec",
    ),
    bad(
        "as many values as boundaries",
        scheduled(spec("piecewise_constant", boundaries=[10], values=[1.0])),
        "sgd.step_size.piecewise_constant.values",
        "expected 2 values, one more than boundaries",
    ),
    bad(
        "boundaries that decrease",
        scheduled(spec("piecewise_constant", boundaries=[10, 5], values=[1.0, 0.5, 0.1])),
        "sgd.step_size.piecewise_constant.boundaries",
        "that do not decrease",
    ),
    bad(
        "as many boundaries as schedules",
        scheduled(spec("join_schedules", schedules=[spec("constant", step_size=0.1)], boundaries=[5])),
        "sgd.step_size.join_schedules.boundaries",
        "one fewer than schedules",
    ),
    bad(
        "steps in words",
        scheduled(spec("piecewise_constant_schedule", init_value=0.1, boundaries_and_scales={"ten": 0.5})),
        "sgd.step_size.piecewise_constant_schedule.boundaries_and_scales",
        "'ten', expected a whole number from 0 up, a step",
    ),
    bad(
        "a step twice",
        scheduled(spec("piecewise_constant_schedule", init_value=0.1, boundaries_and_scales=[[5, 0.5], [5, 0.1]])),
        "sgd.step_size.piecewise_constant_schedule.boundaries_and_scales",
        "every step once",
    ),
    bad(
        "steps without numbers",
        scheduled(spec("piecewise_constant_schedule", init_value=0.1, boundaries_and_scales=[5, 10])),
        "sgd.step_size.piecewise_constant_schedule.boundaries_and_scales",
        "expected {step: number}",
    ),
    bad(
        "a scale that is NaN",
        scheduled(spec("piecewise_constant_schedule", init_value=0.1, boundaries_and_scales={5: NAN})),
        "sgd.step_size.piecewise_constant_schedule.boundaries_and_scales[5]",
        "nan, expected a finite number",
    ),
    bad(
        "cycles that are numbers",
        scheduled(spec("sgdr_schedule", cosine_kwargs=[1.0])),
        "sgd.step_size.sgdr_schedule.cosine_kwargs[0]",
        "expected {name: number} with names of",
    ),
    bad(
        "a cycle with an unknown argument",
        scheduled(spec("sgdr_schedule", cosine_kwargs=[{"warm_up": 1}])),
        "sgd.step_size.sgdr_schedule.cosine_kwargs[0]",
        "warmup_steps",
    ),
    bad(
        "an axis that is a text",
        chain(spec("adaptive_grad_clip", clipping=0.1, axis="0"), SGD),
        "chain.members[0].adaptive_grad_clip.axis",
        "or several of them",
    ),
    bad("a tag nobody knows", spec("dog", **RATE, init_step=["speed", 1e-6]), "dog.init_step", "distance, learning_"),
    bad("a tag without a number", spec("dog", **RATE, init_step=["distance", 0.0]), "dog.init_step", "positive number"),
    bad(
        "a number as schedule",
        chain(spec("scale_by_schedule", step_size_fn=0.1)),
        "chain.members[0].scale_by_schedule.step_size_fn",
        "0.1, expected a schedule",
    ),
    bad(
        "numbers as schedules",
        scheduled(spec("join_schedules", schedules=[0.1, 0.2], boundaries=[5])),
        "sgd.step_size.join_schedules.schedules[0]",
        "0.1, expected a schedule",
    ),
    bad("an empty chain", chain(), "chain.members", "[], expected transformations and optimizers"),
    bad("a chain that is one spec", spec("chain", members=SGD), "chain.members", "expected transformations and opt"),
    bad("a number in a chain", chain(1.0, SGD), "chain.members[0]", "1.0, expected an optimizer or a transformation"),
    bad("a text as optimizer", spec("accumulate", optimizer="sgd", k=2), "accumulate.optimizer", "'sgd', expected"),
    bad("a list as inner optimizer", spec("flatten", inner=[SGD]), "flatten.inner", "expected an optimizer or"),
    bad(
        "a named chain without names",
        spec("named_chain", args=[SGD]),
        "named_chain.args",
        "expected {name: transformation}",
    ),
    bad(
        "a name twice in a chain",
        spec("named_chain", args=[["a", SCALE], ["a", SCALE]]),
        "named_chain.args",
        "every name once",
    ),
    bad(
        "a number as name in a chain",
        spec("named_chain", args=[[1, SCALE]]),
        "named_chain.args",
        "expected every name once, names of 1 to 128 printable",
    ),
    bad(
        "a name of 1,000 characters in a chain",
        spec("named_chain", args={"x" * 1000: SCALE}),
        "named_chain.args",
        "expected every name once, names of 1 to 128 printable",
    ),
    bad(
        "a number in a named chain",
        spec("named_chain", args={"a": 1.0}),
        "named_chain.args['a']",
        "1.0, expected an optimizer",
    ),
    bad("a text as program", spec("exported", update="code"), "exported.update", "bytes of an exported program"),
    bad("a program of 300 kB", spec("exported", update=bytes(300_000)), "exported.update", "at most 262144 bytes"),
]

PLACES = [
    bad(
        "the seed's adam in the middle",
        chain(CLIP, spec("adam", step_size=0.1), SCALE),
        "chain.members[1]",
        "adam replaces parameters instead of making updates",
    ),
    bad("the seed's sgd in optax's wrapper", spec("flatten", inner=SGD), "flatten.inner", "replaces parameters"),
    bad(
        "accumulate in accumulate",
        spec("accumulate", optimizer=spec("accumulate", optimizer=SGD, k=2), k=2),
        "accumulate.optimizer",
        "accumulate inside another accumulate",
    ),
    bad(
        "accumulate in a group",
        partition({"b": SGD, "**": spec("accumulate", optimizer=SGD, k=2)}),
        "partition.transforms['**']",
        "accumulate inside a partition",
    ),
    bad(
        "a group without the rest", partition({"b": SGD}), "partition.transforms", "in no group: 'w'; a last group '**'"
    ),
    bad("no group", partition({}), "partition.transforms", "[], expected {name pattern: optimizer}"),
    bad("a pattern twice", partition([["b", SGD], ["b", ADAMW]]), "partition.transforms['b']", "every pattern once"),
    bad(
        "groups of which one takes all",
        partition({"**": SGD, "w": ADAMW}),
        "partition.transforms['w']",
        "overlaps '**', which comes first and takes all that it matches: 'w'",
    ),
    bad(
        "a group of nothing",
        partition({"kernel": SGD, "**": ADAMW}),
        "partition.transforms['kernel']",
        "pattern 'kernel' matches no parameter; there are 'b', 'w'",
    ),
    bad("a group without a pattern", partition({"": SGD}), "partition.transforms", "'', expected a name pattern"),
    bad("a number as group", partition({"**": 0.1}), "partition.transforms['**']", "0.1, expected an optimizer"),
    bad("groups in a list", partition([SGD, SGD]), "partition.transforms", "expected {name pattern: optimizer}"),
    bad("a number as pattern of a group", partition({1: SGD}), "partition.transforms", "1, expected a name pattern"),
    bad(
        "a value missing in a group",
        partition({"b": scheduled(pb.Value()), "**": SGD}),
        "partition.transforms['b'].sgd.step_size",
        "no value",
    ),
    bad("a mask of nothing", masked("kernel"), "adamw.mask", "pattern 'kernel' matches no parameter; there are 'b'"),
    bad("a mask that excludes nothing", masked(["**", "!kernel"]), "adamw.mask", "pattern '!kernel' matches no"),
    bad("a mask without patterns", masked([]), "adamw.mask", "[], expected a name pattern, a list of them"),
    bad("a number as mask", masked(1), "adamw.mask", "1, expected a name pattern, a list of them, or True or False"),
    bad("a mask of numbers", masked(["b", 1]), "adamw.mask", "1, expected a name pattern"),
    bad("an empty pattern", masked(""), "adamw.mask", "'', expected a name pattern"),
    bad("nothing but !", masked("!"), "adamw.mask", "'!', expected a name pattern"),
    bad("a pattern of 257 characters", masked("x" * 257), "adamw.mask", "at most 256 characters"),
    bad("a pattern of 10,000 characters", masked("*" * 10_000), "adamw.mask", "at most 4096 bytes"),
    bad("4,097 patterns", masked(["b"] * 4097), "adamw.mask", "a list of 4097 values"),
    bad("a required mask left out", chain(spec("freeze"), SGD), "chain.members[0].freeze.mask", "missing argument"),
]

IN_TABLE = "sgd.step_size.table.values"


def table(name: str, values: Any, fragment: str) -> Any:
    return bad(name, scheduled(spec("table", values=values)), IN_TABLE, fragment)


TABLES = [
    table("an empty table", array([]), "at least one number"),
    table("an empty list as table", [], "at least one number"),
    table("a table without an array", pb.TensorValue(), "element type of f32, f64, i32, i64"),
    table("a number as table", 0.1, "0.1, expected an array of one dimension"),
    table("NaN in a table", array([0.1, NAN]), "expected finite numbers"),
    table("infinity in a table", array([0.1, INF]), "expected finite numbers"),
    table("a table beyond 32 bits", array([1e300], kind="d", data_type=tensor_pb.DATA_TYPE_F64), "finite numbers"),
    table("a table of two dimensions", array([0.1] * 4, [2, 2]), "expected an array of one dimension"),
    table("a table without dimensions", array([0.1], []), "expected an array of one dimension"),
    table("a table of nine dimensions", array([0.1], [1] * 9), "at most 8 dimensions"),
    table("a table that is too short", array([0.1] * 3, [4]), "'12 bytes', expected 16 bytes for f32[4]"),
    table("a table that is too long", array([0.1] * 5, [4]), "'20 bytes', expected 16 bytes for f32[4]"),
    table("a table of half an element", pb.TensorValue(leaf=array([0.1]).leaf, data=b"123"), "'3 bytes', expected 4"),
    table("a table of 16-bit numbers", array([1], kind="h", data_type=tensor_pb.DATA_TYPE_F16), "element type of f32"),
    table("a table of an unknown type", array([1], data_type=99), "element type 99"),
    table("a table with a name", pb.TensorValue(leaf=tensor_pb.LeafSpec(name="x", shape=[1], data_type=1)), "'x'"),
    table("a table of 16,385 points", array([0.1] * 16_385), "at most 65536 bytes"),
    table("a list of 5,000 points", [0.1] * 5000, "expected a list of at most 4096 values, or an array"),
    table("a list of 300,000 points", range(300_000), "a list of 300000 values, expected a list of at most 4096"),
    table("a table that says 10,000,000 points", array([0.1] * 100, [10**7]), "'400 bytes', expected 40000000 bytes"),
    table("a table that says 2**80 points", array([0.1], [2**40, 2**40]), "'4 bytes', expected"),
    table("a table of minus one points", array([0.1], [-1]), "at most 8 dimensions from 0 up"),
    table("a table with an empty dimension of many", array([], [0, 2**40]), "expected an array of one dimension"),
]


def lists(depth: int) -> pb.Value:
    return value([lists(depth - 1)]) if depth else value(1.0)


def nested_in_text(depth: int) -> str:
    return "chain(" * depth + "sgd(0.1)" + ")" * depth


DEPTHS = [
    bad("chains 17 deep", chains(16), ".members[0].chain.members[0].chain", "nested deeper than 16"),
    bad("chains 19 deep", chains(18), ".members[0]", "nested deeper than"),
    bad("lists 45 deep", scheduled(lists(45)), "[0][0][0]", "nested deeper than 40"),
]

TEXTS = [
    text("a name misspelt", "adamwd(0.1)", "adamwd", "the catalogue has no adamwd; did you mean adamw?"),
    text("a name misspelt beside named arguments", "adamwd(learning_rate=0.1)", "adamwd", "(did you mean 'adamw'?)"),
    text("an argument misspelt", "adamw(0.1, weight_decy=0.1)", "adamw.weight_decy", "mean 'weight_decay'?"),
    text("an argument twice", "adam(0.1, step_size=0.2)", "adam.step_size", "step_size for the second time"),
    text("an argument too many", "sgd(0.1, 0.9)", "sgd", "at most 1 arguments without a name: step_size"),
    text("an argument by position behind names", "adam(step_size=0.1, 0.9)", "adam", "an argument without a name"),
    text("a missing argument", "adamw()", "adamw.learning_rate", "missing argument 'learning_rate'"),
    text("an open parenthesis", "sgd(0.1", "sgd", "the end of the text, expected ',' or ')', at line 1, column 8"),
    text("an open quote", "adamw(0.1, mask='b)", "adamw.mask", "the end of the text, expected a closing '"),
    text("two specs", "sgd(0.1) sgd(0.1)", "spec", "'sgd', expected the end of the text"),
    text("a number alone", "0.1", "spec", "0.1, expected a name with arguments"),
    text("space alone", "  # nothing", "spec", "the end of the text, expected a value"),
    text("a sum", "sgd(0.1 + 0.2)", "sgd", "'+', expected ',' or ')'"),
    text("Python", "__import__('os').system('true')", "__import__", "has no __import__"),
    text("a rate of NaN", "sgd(nan)", "sgd.step_size", "nan, expected a finite number"),
    text("an infinite rate", "sgd(-inf)", "sgd.step_size", "expected a finite number"),
    text("a negative rate", "adamw(-0.1)", "adamw.learning_rate", "-0.1, expected a number from 0 up"),
    text("a rate beyond 64 bits", "sgd(1e999)", "sgd.step_size", "1e999, expected a finite number"),
    text("a rate of 50 digits", "sgd(0." + "1" * 50 + ")", "sgd.step_size", "a number of at most 40 digits"),
    text(
        "a bad place deep inside", "chain(clip(1.0), adamw(0.1, b1=1.5))", "chain.members[1].adamw.b1", "1.5, expected"
    ),
    text("a schedule as optimizer", "constant(0.1)", "constant", "a schedule, expected an optimizer"),
    text("a transformation alone", "clip(1.0)", "clip", "nothing in this spec sets a learning rate"),
    text("sophia", "sophia(learning_rate=0.1)", "sophia", "not served: it evaluates the loss", NOT_SERVED),
    text("a program", "exported(base64('AAAA'))", "exported", "takes no programs", NOT_SERVED),
    text("base64 that is none", "exported(base64('@'))", "exported.update", "expected base64"),
    text("a mask of nothing", "adamw(0.1, mask='kernel')", "adamw.mask", "matches no parameter; there are 'b', 'w'"),
    text(
        "a group of nothing left",
        "partition({'**': sgd(0.1), 'w': sgd(0.2)})",
        "partition.transforms['w']",
        "overlaps '**'",
    ),
    text(
        "a pattern of 10,000 characters", f"adamw(0.1, mask={'*' * 10_000!r})", "adamw.mask", "at most 256 characters"
    ),
    text("NaN in a table", "sgd(table(array([0.1, nan])))", "sgd.step_size.table.values", "nan"),
    text("a ragged array", "sgd(table(array([[1, 2], [3]])))", "sgd.step_size.table.values", "shape [2]"),
    text(
        "a table of 20,000 points", f"sgd(table(array({[1] * 20_000})))", "sgd.step_size.table.values", "16384 numbers"
    ),
    text(
        "a list of 20,000 values", f"sgd(table({[1] * 20_000}))", "sgd.step_size.table.values[16381]", "at most 16384"
    ),
    text("chains 17 deep", nested_in_text(16), ".members[0]", "at most 16 specs inside one another"),
    text("chains 10,000 deep", nested_in_text(10_000), ".members[0]", "at most 16 specs inside one another"),
    text("lists 10,000 deep", "sgd(" + "[" * 10_000, "[0][0][0]", "at most 40 specs and lists inside"),
    text("1 MB of text", "sgd(0.1)" + " " * 2**20, "spec", "expected text of at most 524288 bytes"),
    text("1 MB of a name", "a" * 2**20, "spec", "expected text of at most 524288 bytes"),
    text("500 KiB of a name", "a" * 500 * 1024, "spec", "expected a name of at most 128 bytes"),
    text("500 KiB of commas", "sgd(" + "," * 500 * 1024, "sgd.step_size", "expected a value"),
    bad("text beside a name", pb.Spec(name="sgd", text="sgd(0.1)"), "spec", "text beside a name or arguments"),
    bad("text beside arguments", pb.Spec(text="sgd", arguments=SGD.arguments), "spec", "text beside a name"),
    bad(
        "text inside that is no spec",
        chain(CLIP, pb.Spec(text="sgd(0.1, 0.2)")),
        "chain.members[1].sgd",
        "at most 1 arguments without a name",
    ),
    bad(
        "text inside with a bad value", chain(pb.Spec(text="sgd(-1)")), "chain.members[0].sgd.step_size", "-1, expected"
    ),
]


def grouped(of: list[float], *members: Any, **more: Any) -> pb.Spec:
    return spec(
        "grouped", of=array(of, **{"kind": "i", "data_type": tensor_pb.DATA_TYPE_I32} | more), optimizers=members
    )


LEAF_BY_LEAF = [
    bad("fewer groups than leaves", grouped([0], SGD), "grouped.of", "expected"),
    bad("more groups than leaves", grouped([0] * 9, SGD), "grouped.of", "expected"),
    bad("a group that is not there", grouped([0, 1], SGD), "grouped.of[1]", "expected"),
    bad("a group below none", grouped([0, -1], SGD), "grouped.of[1]", "expected"),
    bad("a group that nobody is in", grouped([0, 0], SGD, SGD), "grouped.optimizers[1]", "expected"),
    bad("groups of no optimizer", grouped([0, 0]), "grouped.optimizers", "expected"),
    bad(
        "groups that are no whole numbers",
        grouped([0, 0], SGD, kind="f", data_type=tensor_pb.DATA_TYPE_F32),
        "grouped.of",
        "expected",
    ),
    bad("groups as text", spec("grouped", of="0, 1", optimizers=[SGD]), "grouped.of", "expected"),
    bad("groups in groups", grouped([0, 0], grouped([0, 0], SGD)), "grouped.optimizers[0]", "grouped inside grouped"),
    bad("a group of a transformation alone", grouped([0, 0], CLIP), "grouped", "expected"),
    bad(
        "accumulation leaf by leaf",
        spec("per_leaf", optimizer=spec("accumulate", optimizer=SGD, k=2)),
        "per_leaf.optimizer",
        "accumulate inside per_leaf",
    ),
    bad("a beta of 1", spec("torch_adamw", beta1=1.0), "torch_adamw.beta1", "expected"),
    bad("a negative decay", spec("torch_sgd", **RATE, weight_decay=-0.1), "torch_sgd.weight_decay", "expected"),
    bad("an eta_minus of 1", spec("torch_rprop", eta_minus=1.0), "torch_rprop.eta_minus", "expected"),
    bad("a dampening that is text", spec("torch_sgd", **RATE, dampening="0.1"), "torch_sgd.dampening", "expected"),
    bad("torch's own name of the rate", spec("torch_adamw", lr=0.1), "torch_adamw.lr", "did you mean 'learning_rate'?"),
    bad("Nesterov without momentum", spec("torch_sgd", **RATE, nesterov=True), "torch_sgd.momentum", "expected"),
]
ALL = [*LEAF_BY_LEAF, *NAMES, *ARGUMENTS, *NUMBERS, *KINDS, *PLACES, *TABLES, *DEPTHS, *TEXTS]

# ------------------------------------------------------------------------------------- sessions that are there already

# Sessions that bad pushes, reads and changes are aimed at, by name.
SESSIONS = {
    "plain": "adam(0.1)",
    "polyak": "chain(clip_by_global_norm(1.0), polyak_sgd(0.5))",
    "averaged": "ema_params(accumulate(adamw(linear_schedule(0.1, 0.0, 100), mask='w'), k=1))",
    "grouped": "partition({'b': optax.sgd(0.1), '**': optax.sgd(0.2, momentum=0.9)})",
    "bounded": "lbfgs(0.1, memory_size=4, linesearch=None)",
}


@dataclasses.dataclass(frozen=True)
class BadRequest:
    """One push, read or change of a session of ``SESSIONS``, and what must come of it."""

    session: str
    changes: dict[str, Any]
    subject: str
    fragment: str
    reason: str = "INVALID_ARGUMENT"
    code: str = "INVALID_ARGUMENT"
    compiles: bool = False  # whether the mistake shows only in the state of a program


def wrong(name: str, session: str, subject: str, fragment: str, reason: str = INVALID[0], **more: Any) -> Any:
    own = {key: more.pop(key) for key in ("code", "compiles") if key in more}
    return pytest.param(BadRequest(session, more, subject, fragment, reason, **own), id=name)


def extras(*pairs: tuple[str, Any]) -> list[pb.Argument]:
    return [pb.Argument(name=name, value=value(given)) for name, given in pairs]


LOSS = extras(("loss", 0.5))

PUSHES = [
    wrong("no loss where one is needed", "polyak", "extras", "needs exactly loss, but the push brings nothing"),
    wrong("a loss where none is needed", "plain", "extras", "needs nothing beside the gradients", extras=LOSS),
    wrong("another extra", "plain", "extras", "but the push brings value", extras=extras(("value", 0.5))),
    wrong("a loss and more", "polyak", "extras", "brings loss, value", extras=extras(("loss", 0.5), ("value", 0.5))),
    wrong("a loss of NaN", "polyak", "loss", "nan, expected one finite number", extras=extras(("loss", NAN))),
    wrong("an infinite loss", "polyak", "loss", "inf, expected one finite number", extras=extras(("loss", -INF))),
    wrong("a loss beyond 32 bits", "polyak", "loss", "1e+39, expected", extras=extras(("loss", 1e39))),
    wrong("a loss in words", "polyak", "loss", "'low', expected one finite", extras=extras(("loss", "low"))),
    wrong("a flag as loss", "polyak", "loss", "True, expected one finite number", extras=extras(("loss", True))),
    wrong("a list as loss", "polyak", "loss", "[0.5], expected one finite number", extras=extras(("loss", [0.5]))),
    wrong("a loss twice", "polyak", "loss", "given twice, expected", extras=[*LOSS, *LOSS]),
    wrong(
        "a loss without a value",
        "polyak",
        "push.extras.loss",
        "no value",
        "INVALID_SPEC",
        extras=extras(("loss", pb.Value())),
    ),
    wrong("a negative scale", "plain", "grad_scale", "-1.0, expected a positive finite number", grad_scale=-1.0),
    wrong("a scale of NaN", "plain", "grad_scale", "nan, expected a positive finite number", grad_scale=NAN),
    wrong("an infinite scale", "plain", "grad_scale", "inf, expected a positive finite number", grad_scale=INF),
    wrong("a scale beyond 32 bits", "plain", "grad_scale", "1e+39, expected a positive", grad_scale=1e39),
]

READS = [
    wrong("an average that is not kept", "plain", "which", "'ema', but this session's optimizer keeps", which="ema"),
    wrong("a view nobody knows", "averaged", "which", "'best', but this session's", which="best"),
    wrong("a view that the spec could keep", "averaged", "which", "keeps beside its parameters: 'ema'", which="eval"),
    wrong("a view with a name of 10,000 characters", "plain", "which", "keeps beside its", which="x" * 10_000),
]


def change(name: str, session: str, subject: str, fragment: str, *pairs: Any, **more: Any) -> Any:
    return wrong(name, session, subject, fragment, hyperparams=extras(*pairs), **more)


SPEC = "INVALID_SPEC"
DECAY = "ema_params.optimizer.accumulate.optimizer.adamw"

CHANGES = [
    change("no hyperparameter", "plain", "hyperparams", "nothing, expected every name once"),
    change("a name twice", "plain", "hyperparams", "a name twice", ("b1", 0.5), ("b1", 0.6)),
    change("an empty name", "plain", "", "is none of this session's", ("", 0.5)),
    change("a misspelt name", "plain", "step_sise", "(did you mean 'step_size'?)", ("step_sise", 0.5)),
    change("another optimizer's name", "plain", "weight_decay", "is none of this", ("weight_decay", 0.5)),
    change("half a name", "plain", "size", "is none of this session's", ("size", 0.5)),
    change("a name that is none of its places", "plain", "sgd.step_size", "is none of", ("sgd.step_size", 0.5)),
    change("a name that means several", "grouped", "learning_rate", "means several: partition", ("learning_rate", 0.5)),
    change("the end of several", "grouped", "optax.sgd.learning_rate", "several", ("optax.sgd.learning_rate", 0.5)),
    change(
        "two names for one place",
        "plain",
        "adam.step_size",
        "give adam.step_size two values",
        ("learning_rate", 0.5),
        ("adam.step_size", 0.6),
    ),
    change(
        "a schedule and what is inside it",
        "averaged",
        "transition_steps",
        "and another name give",
        ("learning_rate", 0.5),
        ("transition_steps", 50),
    ),
    change("a rate of NaN", "plain", "learning_rate", "nan, expected a finite number", ("learning_rate", NAN)),
    change("an infinite rate", "plain", "learning_rate", "inf, expected a finite number", ("learning_rate", INF)),
    change("a rate in words", "plain", "learning_rate", "'fast', expected a finite", ("learning_rate", "fast")),
    change("a list of rates", "plain", "learning_rate", "[0.1, 0.2], expected a", ("learning_rate", [0.1, 0.2])),
    change("a flag as rate", "plain", "learning_rate", "True, expected a finite", ("learning_rate", True)),
    change("None as rate", "plain", "learning_rate", "None, expected a finite", ("learning_rate", None)),
    change("an array as rate", "plain", "learning_rate", "expected a finite", ("learning_rate", array([0.1]))),
    change("a rate without a value", "plain", "learning_rate", "no value", ("learning_rate", pb.Value()), reason=SPEC),
    change("a negative rate", "plain", "adam.step_size", "-0.1, expected", ("learning_rate", -0.1), reason=SPEC),
    change("b1 of 1.5", "plain", "adam.b1", "1.5, expected a number from 0 up", ("b1", 1.5), reason=SPEC),
    change(
        "a schedule as b1",
        "plain",
        "adam.b1",
        "expected a number",
        ("b1", spec("constant", step_size=0.5)),
        reason=SPEC,
    ),
    change(
        "an optimizer as rate", "plain", "adam.step_size.sgd", "expected a schedule", ("step_size", SGD), reason=SPEC
    ),
    change(
        "a schedule with a bad place",
        "plain",
        "adam.step_size.constant.step_size",
        "nan, expected",
        ("learning_rate", spec("constant", step_size=NAN)),
        reason=SPEC,
    ),
    change("one good and one bad", "plain", "adam.b2", "2.0, expected", ("b1", 0.5), ("b2", 2.0), reason=SPEC),
    change("a flag of the spec", "averaged", "nesterov", "is none of this", ("nesterov", 1)),
    change("a mask", "averaged", "mask", "is none of this session's", ("mask", 1)),
    change("the number of pushes of a step", "averaged", "accumulate.k", "is none of this", ("accumulate.k", 2)),
    change("the number of pushes of a step, in short", "averaged", "k", "is none of this", ("k", 2)),
    change("a decay beyond 1", "averaged", "ema_params.decay", "1.5, expected", ("decay", 1.5), reason=SPEC),
    change(
        "steps of a schedule that are real",
        "averaged",
        f"{DECAY}.learning_rate.linear_schedule.transition_steps",
        "2.5",
        ("transition_steps", 2.5),
        reason=SPEC,
    ),
    change(
        "momentum where there was none",
        "grouped",
        "partition.transforms['b'].optax.sgd.momentum",
        "is none of",
        ("partition.transforms['b'].optax.sgd.momentum", 0.9),
    ),
    change(
        "a change that needs other slots",
        "bounded",
        "lbfgs.memory_size",
        "needs another state than the session",
        ("memory_size", 2),
        reason=SPEC,
        compiles=True,
    ),
    change(
        "a step that has passed", "plain", "from_step", "from_step 0, but the next", ("learning_rate", 0.5), from_step=0
    ),
    change(
        "b1 from a step that has passed",
        "plain",
        "from_step",
        "from_step 0, but the next step is",
        ("b1", 0.25),
        from_step=0,
    ),
    change(
        "b1 for another incarnation",
        "plain",
        "plain",
        "incarnation 9, expected 1",
        ("b1", 0.75),
        incarnation=9,
        code="FAILED_PRECONDITION",
        reason="WRONG_INCARNATION",
    ),
    change("256 changes of one name", "plain", "hyperparams", "a name twice", *[("b1", 0.5)] * 256),
]
