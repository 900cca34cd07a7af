"""What a session says of its optimizer: the group, the stages and the value in effect of every knob, for every leaf.

The promise: "describe/info echoes, for every parameter, the group and the effective value of every knob."
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import numpy as np
import pytest
from tests.e2e import wire

import optwire
from optwire import optax as remote
from optwire import optimizers as opt
from optwire_proto import convert, sessions, trees
from optwire_proto.v1 import optimizer_pb2 as pb

PARAMS = {
    "base": {"kernel": np.ones((4, 3), np.float32)},
    "head": {"bias": np.ones(3, np.float32), "kernel": np.ones((3, 2), np.float32)},
    "norm": {"scale": np.ones(3, np.float32)},
}
NAMES = ("base/kernel", "head/bias", "head/kernel", "norm/scale")


def flat(nested: Any) -> dict[str, np.ndarray]:
    return {f"{outer}/{inner}": array for outer, leaves in nested.items() for inner, array in leaves.items()}


def by_leaf(described: sessions.OptimizerInfo) -> dict[str, sessions.LeafGroup]:
    """The group of each leaf; every leaf is in exactly one."""
    at = [index for group in described.groups for index in group.leaves]
    assert sorted(at) == list(range(len(NAMES)))
    return {NAMES[index]: group for group in described.groups for index in group.leaves}


def ends(group: sessions.LeafGroup) -> dict[str, Any]:
    """Knobs by the last two components of their path."""
    return {".".join(path.rsplit(".", 2)[-2:]): value for path, value in group.knobs}


# ------------------------------------------------------------------------------------------------------------- groups


def test_leaves_of_a_partition_are_told_their_pattern_and_the_knobs_of_their_own_member(client: optwire.Client) -> None:
    rate = remote.warmup_cosine_decay_schedule(0.0, 3e-3, 2, 10)
    members = {
        "base/**": remote.set_to_zero(),
        "head/**": remote.adamw(rate, weight_decay=0.1, mask="**/kernel"),
        "**": opt.adam(1e-2),
    }
    spec = opt.ema_params(opt.chain(remote.clip_by_global_norm(2.0), opt.partition(members)), decay=0.9)
    session = client.create_session(PARAMS, spec)
    leaf = by_leaf(session.describe())
    assert {name: group.group for name, group in leaf.items()} == {
        "base/kernel": "base/**",
        "head/bias": "head/**",
        "head/kernel": "head/**",
        "norm/scale": "**",
    }
    outer = ("ema_params", "clip_by_global_norm")
    assert leaf["base/kernel"].passes == (*outer, "set_to_zero")
    assert leaf["head/bias"].passes == leaf["head/kernel"].passes == (*outer, "adamw")
    assert leaf["norm/scale"].passes == (*outer, "adam")
    around = {"clip_by_global_norm.max_norm": 2.0, "ema_params.decay": 0.9, "ema_params.debias": False}
    assert ends(leaf["base/kernel"]) == around
    assert ends(leaf["norm/scale"]) == around | {
        "adam.step_size": 1e-2,
        "adam.b1": 0.9,
        "adam.b2": 0.999,
        "adam.eps": 1e-8,
    }
    kernel, bias = ends(leaf["head/kernel"]), ends(leaf["head/bias"])
    assert kernel.pop("adamw.weight_decay") == 0.1
    assert kernel == bias, "what the mask leaves out is absent, and nothing else differs"
    assert bias["adamw.learning_rate"] == opt.parse(str(rate.name) + "(0.0, 0.003, 2, 10, end_value=0.0, exponent=1.0)")
    place = "ema_params.optimizer.chain.members[1].partition.transforms['head/**'].adamw.weight_decay"
    assert dict(leaf["head/kernel"].knobs)[place] == 0.1


def test_what_is_described_is_what_happens(client: optwire.Client) -> None:
    """With gradients of zero only weight decay moves a leaf: exactly where it is a knob."""
    spec = opt.partition(
        {
            "base/**": remote.sgd(0.5),
            "**": opt.chain(remote.add_decayed_weights(0.5, mask=["**", "!**/bias"]), remote.sgd(0.5)),
        }
    )
    session = client.create_session(PARAMS, spec)
    leaf = by_leaf(session.describe())
    zero = {outer: {name: np.zeros_like(array) for name, array in inner.items()} for outer, inner in PARAMS.items()}
    moved = {name: float(array.ravel()[0]) for name, array in flat(session.step(zero)).items()}
    for name in NAMES:
        decay = ends(leaf[name]).get("add_decayed_weights.weight_decay", 0.0)
        assert moved[name] == 1 - 0.5 * decay
    assert moved == {"base/kernel": 1.0, "head/bias": 1.0, "head/kernel": 0.75, "norm/scale": 0.75}


def test_wrappers_with_masks_say_which_leaves_are_inside(client: optwire.Client) -> None:
    spec = opt.chain(
        remote.masked(remote.add_decayed_weights(0.25), mask="**/kernel"),
        remote.freeze("norm/**"),
        remote.selective_transform(remote.sgd(1.0), freeze_mask="base/**"),
    )
    session = client.create_session(PARAMS, spec)
    leaf = by_leaf(session.describe())
    assert {name: group.passes for name, group in leaf.items()} == {
        "base/kernel": ("masked", "add_decayed_weights", "set_to_zero"),
        "head/bias": ("selective_transform", "optax.sgd"),
        "head/kernel": ("masked", "add_decayed_weights", "selective_transform", "optax.sgd"),
        "norm/scale": ("set_to_zero", "selective_transform", "optax.sgd"),
    }
    assert ends(leaf["head/kernel"])["add_decayed_weights.weight_decay"] == 0.25
    assert not any("weight_decay" in path for path, _ in leaf["head/bias"].knobs)
    assert not any("learning_rate" in path for path, _ in leaf["base/kernel"].knobs)
    after = flat(session.step(PARAMS))
    assert {name: float(array.ravel()[0]) for name, array in after.items()} == {
        "base/kernel": 1.0,
        "head/bias": 0.0,
        "head/kernel": -0.25,
        "norm/scale": 1.0,
    }


@pytest.mark.parametrize(
    ("mask", "decayed"),
    [
        (None, NAMES),
        (True, NAMES),
        (False, ()),
        ("head/*", ("head/bias", "head/kernel")),
        (["**", "!**/bias", "!norm/**"], ("base/kernel", "head/kernel")),
    ],
)
def test_a_mask_of_any_form_decides_which_leaves_have_the_knob(
    client: optwire.Client, mask: Any, decayed: tuple[str, ...]
) -> None:
    session = client.create_session(PARAMS, remote.adamw(1e-3, weight_decay=0.2, mask=mask))
    leaf = by_leaf(session.describe())
    assert tuple(name for name in NAMES if "adamw.weight_decay" in ends(leaf[name])) == decayed
    assert len(session.describe().groups) == len({name in decayed for name in NAMES})


def test_a_partition_in_a_partition_names_both_patterns(client: optwire.Client) -> None:
    inner = opt.partition({"**/bias": remote.sgd(0.3), "**": remote.sgd(0.2)})
    session = client.create_session(PARAMS, opt.partition({"head/**": inner, "**": remote.sgd(0.1)}))
    leaf = by_leaf(session.describe())
    assert {name: (group.group, ends(group)["sgd.learning_rate"]) for name, group in leaf.items()} == {
        "base/kernel": ("**", 0.1),
        "head/bias": ("head/** > **/bias", 0.3),
        "head/kernel": ("head/** > **", 0.2),
        "norm/scale": ("**", 0.1),
    }
    after = flat(session.step(PARAMS))
    for name, group in leaf.items():
        rate = ends(group)["sgd.learning_rate"]
        np.testing.assert_array_equal(after[name], np.float32(1) - np.float32(rate))


def test_knobs_of_a_program_are_told_without_its_bytes(client: optwire.Client) -> None:
    session = client.create_session(PARAMS, opt.accumulate(opt.master_weights(remote.lamb(1e-2)), 4))
    (group,) = session.describe().groups
    assert group.group == ""
    assert group.passes == ("accumulate", "master_weights", "lamb")
    knobs = dict(group.knobs)
    assert knobs["accumulate.k"] == 4
    assert knobs["accumulate.optimizer.master_weights.dtype"] == "float32"
    assert knobs["accumulate.optimizer.master_weights.optimizer.lamb.learning_rate"] == 1e-2


def test_every_argument_of_every_stage_is_a_knob(client: optwire.Client) -> None:
    """Defaults, too: whoever reads it need not know the catalogue."""
    session = client.create_session(PARAMS, opt.chain(remote.clip_by_block_rms(1.0), opt.rmsprop_momentum(0.1)))
    (group,) = session.describe().groups
    assert ends(group) == {
        "clip_by_block_rms.threshold": 1.0,
        "rmsprop_momentum.step_size": 0.1,
        "rmsprop_momentum.gamma": 0.9,
        "rmsprop_momentum.eps": 1e-8,
        "rmsprop_momentum.momentum": 0.9,
    }


# --------------------------------------------------------------------------------------------------------- granularity


@pytest.mark.parametrize(
    ("spec", "granularity"),
    [
        (opt.adam(0.1), "element"),
        (remote.adamw(remote.cosine_decay_schedule(0.1, 10), mask="**/kernel"), "element"),
        (opt.chain(remote.clip(1.0), opt.sgd(0.1)), "element"),
        (opt.master_weights(opt.ema_params(opt.accumulate(opt.adam(0.1), 2))), "element"),
        (opt.sm3(0.1), "tensor"),
        (remote.lamb(0.1), "tensor"),
        (remote.adafactor(0.1), "tensor"),
        (opt.chain(remote.clip_by_block_rms(1.0), opt.sgd(0.1)), "tensor"),
        (opt.chain(opt.clip_by_leaf_norm(1.0), opt.sgd(0.1)), "tensor"),
        (opt.chain(opt.clip_grads(1.0), opt.sgd(0.1)), "element"),
        (opt.chain(remote.clip_by_global_norm(1.0), remote.adam(0.1)), "element"),
        (opt.on_nonfinite(opt.sgd(0.1)), "element"),
        (opt.on_nonfinite(opt.sm3(0.1)), "tensor"),
        (remote.noisy_sgd(0.1, 0.5), "tree"),
        (opt.on_nonfinite(opt.sgd(0.1), "zero"), "element"),
    ],
    ids=str,
)
def test_the_granularity_is_how_finely_the_update_couples_elements(
    client: optwire.Client, spec: opt.Spec, granularity: str
) -> None:
    assert client.create_session(PARAMS, spec).describe().granularity == granularity


# --------------------------------------------------------------------------------------------------------------- text

SPECS = {
    "seed": opt.nesterov(opt.piecewise_constant([10, 20], [0.1, 0.01, 0.001]), 0.9),
    "partition": opt.partition({"head/**": remote.set_to_zero(), "**": remote.adamw(1e-3, mask=["**", "!**/bias"])}),
    "nested": opt.ema_params(opt.accumulate(opt.chain(opt.clip_grads(1.0), opt.sm3(0.1)), 3), decay=0.99, debias=True),
    "table": opt.sgd(opt.table([0.1, 0.2, 1e-9])),
    "named": remote.named_chain(("clip", remote.clip(1.0)), ("step", remote.sgd(0.1))),
}


@pytest.mark.parametrize("name", SPECS)
def test_the_text_reads_back_as_the_same_spec_and_its_digest_is_sha256(client: optwire.Client, name: str) -> None:
    session = client.create_session(PARAMS, SPECS[name])
    described, info = session.describe(), session.info()
    assert opt.parse(described.text) == info.spec
    assert str(opt.parse(described.text)) == described.text
    assert described.spec_digest == info.spec_digest == hashlib.sha256(described.text.encode()).hexdigest()
    again = client.create_session(PARAMS, described.text)
    assert again.info().spec_digest == described.spec_digest
    assert again.describe() == described
    ours, theirs = flat(session.step(PARAMS)), flat(again.step(PARAMS))
    assert {name: array.tobytes() for name, array in ours.items()} == {k: v.tobytes() for k, v in theirs.items()}


def test_spellings_of_one_spec_have_one_digest(client: optwire.Client) -> None:
    spellings = ("adamw(0.001)", "adamw(learning_rate=1e-3, b1=.9)", " adamw ( b2 = 0.999 , learning_rate=0.0010 ) ")
    digests = {client.create_session(PARAMS, text).info().spec_digest for text in spellings}
    assert len(digests) == 1
    assert client.create_session(PARAMS, remote.adamw(1e-3)).info().spec_digest in digests
    assert client.create_session(PARAMS, remote.adamw(2e-3)).info().spec_digest not in digests


def test_other_languages_create_sessions_with_the_text_alone(client: optwire.Client, peer: wire.Peer) -> None:
    payload = wire.payload_of(PARAMS)
    text = 'chain(clip_by_global_norm(1.0), adamw(3e-4, weight_decay=0.1, mask="**/kernel"))'
    begin = pb.CreateSessionBegin(
        name="by-text",
        tree=convert.tree_to_proto(trees.flatten(PARAMS).spec),
        spec=pb.Spec(text=text),
        create_key=secrets.token_hex(16),
    )
    made = peer.create_from(begin, wire.chunks(payload, 2**20), pb.PayloadEnd(digest=wire.digest(payload)))
    assert made.name == "by-text"
    by_python = opt.chain(remote.clip_by_global_norm(1.0), remote.adamw(3e-4, weight_decay=0.1, mask="**/kernel"))
    other = client.create_session(PARAMS, by_python)
    assert client.attach("by-text").describe() == other.describe()
    assert made.spec.name == "chain"
    assert not made.spec.text, "answers have the spec by name and arguments"
    client.delete_session("by-text")


# ----------------------------------------------------------------------------------------------------------- catalogue


def test_the_server_lists_what_it_serves_with_signatures_and_a_line_of_documentation(client: optwire.Client) -> None:
    catalogue = client.server_info().catalogue
    for name, entry in catalogue.items():
        assert entry.name == name
        assert entry.kind in ("optimizer", "schedule", "transformation", "wrapper")
        assert entry.origin in ("optwire", "optax", "optax.contrib")
        assert entry.summary, name
        assert "\n" not in entry.summary
        assert entry.signature.startswith(f"{name}(")
        assert entry.signature.endswith(")")
    assert catalogue["adam"].signature == "adam(step_size, b1=0.9, b2=0.999, eps=1e-08)"
    assert catalogue["optax.adam"].origin == "optax"
    assert catalogue["polyak_sgd"].extras == ("loss",)
    assert len(catalogue) > 150


def test_the_clients_names_are_the_servers(client: optwire.Client) -> None:
    catalogue = client.server_info().catalogue
    ours = {name for name in opt.__all__ if name not in ("Spec", "parse")}
    assert ours <= set(catalogue)
    theirs = {name for name in remote.__all__ if name not in ("OPTAX_VERSION", "chain")}
    for name in theirs:
        entry = catalogue.get(f"optax.{name}") or catalogue[name]
        assert not entry.refusal, name


def test_what_is_not_served_says_why(client: optwire.Client) -> None:
    catalogue = client.server_info().catalogue
    refused = {name: entry.refusal for name, entry in catalogue.items() if entry.refusal}
    assert {"conditionally_transform", "monitor", "measure_with_ema"} <= set(refused)
    for name, reason in refused.items():
        if name == "optax.chain":
            continue  # in Python and in text another name for optwire's own
        with pytest.raises(optwire.UnsupportedError, match="is not served: ") as caught:
            getattr(remote, name.removeprefix("optax."))
        assert reason in str(caught.value)
        with pytest.raises(optwire.UnsupportedError):
            client.create_session(PARAMS, f"{name}()")
