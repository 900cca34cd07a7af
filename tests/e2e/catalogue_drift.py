"""How far the server's parameters are from those of the same optimizer run here, over a hundred steps.

Two measures, both against the largest magnitude there has been so far. What rounds an element is the magnitude it came
through: where a parameter crosses zero, the distance in representable numbers between two sums of the same terms is
astronomic, and says nothing about the terms.

- ulps per step: for each element, its difference in units in the last place of the largest magnitude that it, or what
  was added to it, has had, divided by the steps so far. A rounding that differs at every step drifts by about one.
- relative: the largest difference in a leaf over the largest magnitude in it, for updates that mix a leaf's elements.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from tests.e2e import catalogue_samples

import optwire

ULPS_PER_STEP: Final = 2.0
# 1e-6 in float32, and as many units in the last place (8.4) in bfloat16.
RELATIVE: Final = {"float32": 1e-6, "bfloat16": 1e-6 * 2**16}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """What a hundred steps of one entry showed.

    Attributes:
      granularity: as the server says.
      ulps_per_step: the worst of all steps and elements; 0: the bits were the same throughout.
      relative: the worst of all steps and leaves.
      views: the same for other parameters that the session keeps, after the last step, by name.
    """

    granularity: str
    ulps_per_step: float
    relative: float
    views: dict[str, float]

    @property
    def is_exact(self) -> bool:
        return self.relative == 0


def measure(client: optwire.Client, entry: str, dtype: str) -> Drift:
    """Runs the sample of an entry there and here, in step.

    Raises:
      AssertionError: an element type differs, or a parameter is not finite.
    """
    sample = catalogue_samples.sample(entry, dtype)
    params, grads, losses = catalogue_samples.arrays(dtype, scalars=not sample.why_no_scalars)
    oracle = sample.oracle()
    update = jax.jit(oracle.update)
    state = oracle.init(params)
    before = [_wide(leaf) for leaf in jax.tree.leaves(params)]
    largest = [np.abs(leaf) for leaf in before]
    ulps = relative = 0.0
    with client.create_session(params, sample.spec) as session:
        for step in range(catalogue_samples.STEPS):
            pushed = grads[step]
            if sample.has_nans and step in catalogue_samples.NAN_STEPS:
                pushed = catalogue_samples.with_nan(pushed)
            state = update(step, pushed, state, losses[step])
            remote = session.step(pushed, loss=losses[step] if sample.wants_loss else None)
            local = oracle.params(state)
            assert_alike(remote, local)
            pairs = zip(jax.tree.leaves(remote), jax.tree.leaves(local), strict=True)
            for k, (ours, theirs) in enumerate(pairs):
                added = np.abs(_wide(theirs) - before[k])
                largest[k] = np.maximum(np.maximum(largest[k], added), np.abs(_wide(theirs)))
                before[k] = _wide(theirs)
                difference = np.abs(_wide(ours) - _wide(theirs))
                ulps = max(ulps, float((difference / _ulp(largest[k], dtype)).max()) / (step + 1))
                relative = max(relative, float(difference.max() / largest[k].max()))
        views = {name: _relative(session.params(which=name), read(state)) for name, read in oracle.views.items()}
        granularity = session.describe().granularity
    client.delete_session(session.name)
    return Drift(granularity=granularity, ulps_per_step=ulps, relative=relative, views=views)


def assert_alike(remote: Any, local: Any) -> None:
    """Raises AssertionError unless structure, shapes and element types are the same, and all numbers finite."""
    assert jax.tree.structure(remote) == jax.tree.structure(local)
    for ours, theirs in zip(jax.tree.leaves(remote), jax.tree.leaves(local), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert np.isfinite(_wide(ours)).all()


def _relative(remote: Any, local: Any) -> float:
    assert_alike(remote, local)
    pairs = zip(jax.tree.leaves(remote), jax.tree.leaves(local), strict=True)
    return max(float(np.abs(_wide(a) - _wide(b)).max() / np.abs(_wide(b)).max()) for a, b in pairs)


def _wide(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _ulp(magnitude: np.ndarray, dtype: str) -> np.ndarray:
    """The distance of neighbouring numbers of an element type at a magnitude."""
    kind = jnp.finfo(dtype)
    return float(kind.eps) * 2.0 ** np.floor(np.log2(np.maximum(magnitude, float(kind.tiny))))
