"""``docs/catalogue.md``: every entry of the catalogue, with what was measured of it (``make catalogue-docs``).

python -m tests.e2e.catalogue_table    # writes docs/catalogue.md; takes some minutes
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import jax
import numpy as np
import optax
from tests.e2e import catalogue_drift, catalogue_samples

import optwire
from optwire_proto import catalogue, entries
from optwire_proto.entries import Entry, Parameter
from optwire_server import testing
from optwire_server.engine import build

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "catalogue.md"
# What a slot costs shows on parameters that dwarf counts and scalars; both sides of the matrix are above the 128 from
# which factored second moments are kept.
LARGE: Final = {"conv": {"kernel": (3, 3, 32, 64)}, "dense": {"bias": (256,), "kernel": (512, 256)}}
_INTRODUCTION: Final = """\
# Catalogue

What a spec may name. The seed's names and what surrounds an update are optwire's own; the rest is optax's, of the
version that the server has, by optax's names, arguments and defaults. Where the seed has the same name, optax's is
written `optax.adam`. [specs.md](specs.md) says how specs are written; `optwire optimizers` prints what a server has.
"""
_TITLES: Final = {
    "optimizer": "Optimizers",
    "wrapper": "Wrappers",
    "transformation": "Transformations",
    "schedule": "Schedules",
}


def signature(entry: Entry) -> str:
    """An entry as it is called."""
    return f"{entry.name}({', '.join(_written(entry.parameters))})"


def _written(parameters: tuple[Parameter, ...]) -> Iterator[str]:
    by_name = False
    for parameter in parameters:
        if parameter.keyword_only and not by_name:
            by_name = True
            yield "*"
        star = "*" * parameter.variadic
        yield star + parameter.name + ("" if parameter.default is entries.REQUIRED else f"={parameter.default!r}")


def _main() -> None:
    with testing.serve(allow_programs=True) as serving, optwire.connect(serving.target) as client:
        DOCUMENT.write_text("\n".join(_lines(client)) + "\n", encoding="utf-8")


def _lines(client: optwire.Client) -> Iterator[str]:
    yield _INTRODUCTION
    elsewhere = (*catalogue.TORCH, *catalogue.OUTER)
    served = [entry for entry in build.CATALOGUE.values() if not entry.refusal and entry not in elsewhere]
    for kind, title in _TITLES.items():
        yield f"## {title}\n"
        own = sorted((entry for entry in served if entry.kind == kind), key=lambda entry: entry.name)
        if kind == "schedule":
            yield "| Entry | What it is | Origin |"
            yield "|---|---|---|"
            yield from (f"| `{signature(entry)}` | {entry.summary} | {entry.origin} |" for entry in own)
        else:
            yield "| Entry | What it is | Origin | Granularity | Worst, f32 | Worst, bf16 | Bytes | A push brings |"
            yield "|---|---|---|---|---|---|---|---|"
            yield from (_measured(client, entry) for entry in own)
        yield ""
    yield "## Torch's own\n"
    yield "Held to torch itself, by `tests/server/test_torch_rules.py`; see [torch.md](torch.md).\n"
    yield "| Entry | What it is |"
    yield "|---|---|"
    yield from (f"| `{signature(entry)}` | {entry.summary} |" for entry in catalogue.TORCH)
    yield ""
    yield "## Outer optimizers\n"
    yield "Held to their papers, by `tests/server/test_outer_rules.py`; see [local-steps.md](local-steps.md).\n"
    yield "| Entry | What it is |"
    yield "|---|---|"
    yield from (f"| `{signature(entry)}` | {entry.summary} |" for entry in catalogue.OUTER)
    yield ""
    yield "## Known and refused\n"
    yield "| Entry | Why |"
    yield "|---|---|"
    refused = sorted((entry for entry in build.CATALOGUE.values() if entry.refusal), key=lambda entry: entry.name)
    yield from (f"| `{entry.name}` | {entry.refusal} |" for entry in refused)
    yield ""
    yield from _method()


def _measured(client: optwire.Client, entry: Entry) -> str:
    sys.stderr.write(f"{entry.name}\n")
    drifts = [catalogue_drift.measure(client, entry.name, dtype) for dtype in catalogue_samples.DTYPES]
    extras = ", ".join(entry.extras)
    return (
        f"| `{signature(entry)}` | {entry.summary} | {entry.origin} | {drifts[0].granularity} | "
        f"{' | '.join(map(_worst, drifts))} | {_slot_bytes(client, entry.name):.1f} | {extras} |"
    )


def _worst(drift: catalogue_drift.Drift) -> str:
    if drift.is_exact:
        return "exact"
    return f"{drift.ulps_per_step:.2g} ulp a step" if drift.granularity == "element" else f"{drift.relative:.1e}"


def _slot_bytes(client: optwire.Client, entry: str) -> float:
    """Bytes that a session holds for each parameter beside the parameter itself, of float32."""
    rng = np.random.default_rng(5)
    sample = catalogue_samples.sample(entry, "float32")

    def drawn(shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(rng.standard_normal(shape), np.float32)

    params = jax.tree.map(drawn, LARGE, is_leaf=lambda node: isinstance(node, tuple))
    params["scale"] = drawn((1,) if sample.why_no_scalars else ())
    with client.create_session(params, sample.spec) as session:
        info = session.info()
    client.delete_session(session.name)
    return (info.state_bytes - info.payload_bytes) / (info.payload_bytes / 4)


def _method() -> Iterator[str]:
    versions = f"jax {jax.__version__}, optax {optax.__version__}, Python {platform.python_version()}"
    yield f"""\
## How this was made

By `make catalogue-docs`, with {versions}, on a {platform.machine()} CPU. `tests/e2e/test_catalogue.py` repeats the
measurements and holds them to their bounds; `tests/server/test_schedules.py` holds schedules to theirs, bit for bit.

Each entry made {catalogue_samples.STEPS} steps with random gradients over a tree with convolution kernels, a matrix, a
vector and a scalar, on a server through its wire; and the same by the same optax (or the seed, or a formula for what is
our own), called with the same arguments and compiled with `jax.jit`: those of `tests/e2e/catalogue_samples.py`. A
transformation stood in a chain that ends in a step.

- **Granularity** is how finely a session's state may be cut into blocks, read off the update's dataflow.
- **Worst** is the largest difference over all steps and elements. *exact*: the bits were the same throughout. *ulp a
  step*: units in the last place, of the largest magnitude that the element or what was added to it has had so far,
  divided by the number of steps; up to {catalogue_drift.ULPS_PER_STEP:g} is allowed.
  A plain number: the difference over the largest magnitude in the leaf. Differences come from learning rates being
  operands of the server's executable, where the local one has them as constants, which XLA folds, and from blocks,
  which it compiles otherwise than leaves; `accumulate` keeps a sum where `optax.MultiSteps` keeps a running mean, sums
  over all leaves are rounded once, `on_nonfinite` selects where `optax.apply_if_finite` branches; `clip_by_leaf_norm`
  takes norms in 32 bits at least.
- **Bytes** are what the session holds for each parameter of float32 beside the parameter itself, with the arguments of
  the sample: 4 for each slot of 32 bits."""
    without = [
        (name, catalogue_samples.sample(name, "float32").why_no_scalars) for name in sorted(catalogue_samples.entries())
    ]
    yield "- Without a scalar in their tree: " + "; ".join(f"`{name}` ({why})" for name, why in without if why) + "."


if __name__ == "__main__":
    _main()
