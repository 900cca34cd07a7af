"""Whether a session that exists is one for the parameters and the optimizer at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optwire import _session
from optwire.torch import arrays, leaves
from optwire_proto import checks, codecs, errors, sessions, specs, trees


def check_tree(info: sessions.SessionInfo, of: Sequence[trees.LeafSpec]) -> None:
    """Raises TreeMismatchError, with the first leaf, where the session has other leaves; their order is its own."""
    ours = {leaf.name: leaf for leaf in of}
    theirs = {leaf.name: leaf for leaf in info.tree.leaves} if info.tree else {}
    for name in (*ours, *theirs):
        if ours.get(name) != theirs.get(name):
            raise errors.TreeMismatchError(
                f"session {info.name!r} exists with other parameters: {name!r} is {_form(theirs.get(name))} there and "
                f"{_form(ours.get(name))} here; give the session another name",
                subject=name,
                expected=_form(theirs.get(name)),
                got=_form(ours.get(name)),
            )


def check_codec(info: sessions.SessionInfo, asked: str | None) -> None:
    """Raises InvalidArgumentError where gradients have another codec in the session than was asked for; None: none."""
    if asked is not None and codecs.parse(asked) != codecs.parse(info.grads_codec):
        raise errors.InvalidArgumentError(
            f"session {info.name!r} exists with grads_codec={info.grads_codec!r}, and grads_codec={asked!r} was asked "
            "for; leave grads_codec out, or give the session another name",
            subject="grads_codec",
            expected=repr(info.grads_codec),
            got=repr(asked),
        )


def surprise(session: _session.Session) -> errors.StaleStepError:
    """What to raise where the model was given other parameters than its gradients are of."""
    return errors.StaleStepError(
        f"{session} is at step {session.step_count} with other parameters than the gradients were computed on; "
        "the model has them now, compute gradients again",
        subject=session.name,
        step=session.step_count,
    )


def check_leaves(session: _session.Session, tree: trees.TreeSpec, of: Sequence[leaves.Leaf]) -> None:
    """Raises TreeMismatchError where there are not as many parameters as in the session, or one was converted."""
    if len(of) != len(tree.leaves):
        raise errors.TreeMismatchError(
            f"param_groups have {len(of)} parameters, {session} has {len(tree.leaves)}; parameters are added by "
            "add_param_group, and never taken away",
            subject=session.name,
            expected=str(len(tree.leaves)),
            got=str(len(of)),
        )
    dtypes = {leaf.name: leaf.dtype for leaf in tree.leaves}
    for leaf in of:
        if arrays.DTYPES.get(leaf.parameter.dtype) != dtypes.get(leaf.name):
            raise errors.TreeMismatchError(
                f"parameter {leaf.name!r} is of {leaf.parameter.dtype} now, and {dtypes.get(leaf.name)} in {session}; "
                "convert a model before the first step",
                subject=leaf.name,
                expected=str(dtypes.get(leaf.name)),
                got=str(leaf.parameter.dtype),
            )


def check_spec(info: sessions.SessionInfo, spec: specs.Spec) -> None:
    """Raises InvalidArgumentError, with the place, where the session has another optimizer; numbers may differ."""
    ours = checks.check(spec, "optimizer")
    difference = _difference(ours, info.spec)
    if difference:
        raise errors.InvalidArgumentError(
            f"session {info.name!r} exists with another optimizer: {difference}; give the session another name",
            subject=info.name,
            expected=str(info.spec)[:200],
            got=str(ours)[:200],
        )


def _form(leaf: trees.LeafSpec | None) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if leaf else "absent"


def _difference(ours: specs.Spec, theirs: specs.Spec) -> str:
    """Where two specs differ in more than numbers; empty where they do not."""
    for (path, here), (other, there) in zip(specs.places(ours), specs.places(theirs), strict=False):
        if path != other:
            return f"{other} there, {path} here"
        same_kind = _is_number(here) and _is_number(there)
        if not isinstance(here, specs.Spec | tuple) and not same_kind and here != there:
            return f"{path} is {there!r} there, {here!r} here"
        if isinstance(here, specs.Spec) and isinstance(there, specs.Spec) and here.name != there.name:
            return f"{path or 'the spec'} is {there.name} there, {here.name} here"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
