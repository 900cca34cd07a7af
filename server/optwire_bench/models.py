"""The trees that are stepped, and their gradients: the same in every process that is measured. NumPy only.

Peers run in environments of their own and import this module too.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

LEARNING_RATE = 1e-3
B1, B2, EPS = 0.9, 0.999, 1e-8

# Below this, a model has two layers: kernel and bias each.
_SMALL_PARAMETERS_MAX = 10_000
_SMALL_SHARES = (0.9, 0.03, 0.06)
_SHARES = (0.5, 0.25, 0.125, 0.0625, *(0.005,) * 11)
_UNITS = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kMG]?)")

# Between one step and the next the gradients are multiplied by these, one after the other and over again: exact in
# every floating type, no two neighbours alike, and their product is 1.
FACTORS = (-0.5, 2.0, -2.0, 0.5, -0.25, -1.0, 4.0, -1.0, -1.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """Names and shapes of the leaves of a model, all float32.

    Attributes:
      label: as the command line names it: "25M", "gpt2".
      tensors: as asked for; 0: what is usual for the size.
      shapes: (name, shape) of each leaf, in order.
    """

    label: str
    tensors: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def parameters(self) -> int:
        """Elements of all leaves."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    @property
    def payload_bytes(self) -> int:
        """Bytes of all leaves in float32."""
        return 4 * self.parameters


def model(label: str, tensors: int = 0) -> Model:
    """The model of a label: a number of parameters such as "25M" or "1k", or "gpt2".

    Args:
      label: what is asked for.
      tensors: leaves of about equal size that a number of parameters is cut into; 0: 4 leaves up to 10,000 parameters,
        16 of very different sizes above. "gpt2" has its own 148.

    Raises:
      ValueError: no such model.
    """
    if label == "gpt2":
        return Model(label, 0, _gpt2())
    try:
        parameters = count(label)
    except ValueError as exc:
        raise ValueError(f"{exc}, or gpt2") from None
    if not 16 <= parameters <= 2_000_000_000:
        raise ValueError(f"{label!r}: expected 16 to 2G parameters")
    if tensors > parameters:
        raise ValueError(f"{tensors} tensors: more than there are parameters")
    if tensors:
        sizes = [parameters // tensors] * (tensors - 1)
    else:
        sizes = [int(parameters * s) for s in (_SMALL_SHARES if parameters <= _SMALL_PARAMETERS_MAX else _SHARES)]
    sizes.append(parameters - sum(sizes))
    return Model(label, tensors, tuple((f"leaf{index:04}", (size,)) for index, size in enumerate(sizes)))


def count(text: str) -> int:
    """A number as people write it: 25M, 1k; raises ValueError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r}: expected a number such as 1k, 25M or 100M")
    return round(float(match[1]) * _UNITS[match[2]])


def params(model: Model, seed: int = 0) -> dict[str, np.ndarray]:
    """The parameters that everybody starts from."""
    return leaves(model, np.random.default_rng(seed).standard_normal(model.parameters, np.float32))


def grads(model: Model, rank: int = 0) -> dict[str, np.ndarray]:
    """The gradients of a worker's first step: each is a bfloat16, so that bf16 loses nothing of them and can be checked
    bit for bit."""
    flat = np.random.default_rng(1 + rank).standard_normal(model.parameters, np.float32)
    flat.view(np.uint32)[...] &= np.uint32(0xFFFF0000)
    return leaves(model, flat)


def leaves(model: Model, flat: np.ndarray) -> dict[str, np.ndarray]:
    """Views of one flat array, leaf after leaf."""
    found, start = {}, 0
    for name, shape in model.shapes:
        stop = start + math.prod(shape)
        found[name] = flat[start:stop].reshape(shape)
        start = stop
    return found


def factor(step: int) -> float:
    """What the gradients of a step (0-based) are multiplied by to become those of the next one."""
    return FACTORS[step % len(FACTORS)]


def _gpt2() -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The 148 arrays of GPT-2 small, 124 million parameters: Radford et al., 2019."""
    width, layers, words, positions = 768, 12, 50257, 1024
    layer = (
        ("ln_1/bias", (width,)),
        ("ln_1/scale", (width,)),
        ("attn/qkv/bias", (3 * width,)),
        ("attn/qkv/kernel", (width, 3 * width)),
        ("attn/out/bias", (width,)),
        ("attn/out/kernel", (width, width)),
        ("ln_2/bias", (width,)),
        ("ln_2/scale", (width,)),
        ("mlp/in/bias", (4 * width,)),
        ("mlp/in/kernel", (width, 4 * width)),
        ("mlp/out/bias", (width,)),
        ("mlp/out/kernel", (4 * width, width)),
    )
    around = (("ln_f/bias", (width,)), ("ln_f/scale", (width,)), ("wpe", (positions, width)), ("wte", (words, width)))
    return (*((f"h{index:02}/{name}", shape) for index in range(layers) for name, shape in layer), *around)
