"""Tensors of torch as NumPy arrays and back; without a copy wherever the memory is laid out for it."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

from optwire_proto import errors, tensors, trees

# torch's element type -> the protocol's.
DTYPES: Final = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


def leaf(name: str, parameter: torch.Tensor) -> trees.LeafSpec:
    """Name, shape and element type of a parameter.

    Raises:
      TreeError: a name, shape or element type that cannot be served.
      UnsupportedError: a parameter of which this process holds a part only.
    """
    _refuse_distributed(name, parameter)
    if isinstance(parameter, torch.nn.parameter.UninitializedTensorMixin):
        raise errors.TreeError(
            f"parameter {name!r} of a lazy module has no shape yet: run the model once, then make the optimizer",
            subject=name,
            got=type(parameter).__name__,
        )
    if parameter.dtype not in DTYPES:
        served = ", ".join(str(dtype) for dtype in DTYPES)
        raise errors.TreeError(
            f"parameter {name!r}: element type {parameter.dtype}, expected one of {served}",
            subject=name,
            expected=served,
            got=str(parameter.dtype),
        )
    return trees.LeafSpec(name, tuple(parameter.shape), DTYPES[parameter.dtype])


def to_numpy(tensor: torch.Tensor, name: str) -> tensors.Array:
    """The tensor's elements as an array of its shape: a view where the tensor is dense, contiguous, on the CPU.

    Args:
      tensor: of one of ``DTYPES``; not changed.
      name: of the parameter, for errors.

    Raises:
      UnsupportedError: a sparse tensor, or one that is spread over processes.
      TreeError: a tensor without values.
    """
    _refuse_distributed(name, tensor)
    if tensor.layout is not torch.strided:
        raise errors.UnsupportedError(
            f"parameter {name!r}: a gradient of layout {tensor.layout}; sparse gradients are not served, "
            "use dense ones (sparse=False in the embedding)",
            subject=name,
            expected="torch.strided",
            got=str(tensor.layout),
        )
    if tensor.is_meta:
        raise errors.TreeError(
            f"parameter {name!r} is on the meta device and has no values: move the model with to_empty, and fill it",
            subject=name,
            expected="a device with memory",
            got=str(tensor.device),
        )
    dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if dense.dtype is torch.bfloat16:  # NumPy has no such type: its bits, and a dtype that says what they are
        bits: tensors.Array = dense.view(torch.int16).numpy().view(np.uint16)
        return bits.view(tensors.numpy_dtype("bf16"))
    array: tensors.Array = dense.numpy()
    return array


def from_numpy(array: tensors.Array) -> torch.Tensor:
    """A tensor on the CPU over the array's memory."""
    if tensors.is_bf16(array.dtype):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def write(parameter: torch.Tensor, array: tensors.Array) -> None:
    """Copies an array, of the parameter's element type as it travels, into the parameter's own memory."""
    if parameter.device.type == "cpu" and parameter.is_contiguous():
        # By NumPy: torch divides small copies among threads, which may take longer to meet than the copy itself.
        own = parameter.detach()
        bits = own.view(torch.int16) if own.dtype is torch.bfloat16 else own
        np.copyto(bits.numpy(), array.view(np.int16) if own.dtype is torch.bfloat16 else array)
        torch.autograd.graph.increment_version(parameter)
        return
    with torch.no_grad():
        parameter.copy_(from_numpy(_tagged(parameter, array)))


def is_same(parameter: torch.Tensor, array: tensors.Array) -> bool:
    """Whether a parameter has the values of an array of its element type and shape, bit by bit."""
    mine, theirs = to_numpy(parameter, ""), np.ascontiguousarray(array)
    return np.array_equal(mine.reshape(-1).view(np.uint8), theirs.reshape(-1).view(np.uint8))


def _tagged(parameter: torch.Tensor, array: tensors.Array) -> tensors.Array:
    """bfloat16 travels as its bits; the same with a dtype that says so."""
    return array.view(tensors.BF16) if parameter.dtype is torch.bfloat16 else array


def widened(array: tensors.Array) -> tensors.Array:
    """16-bit elements in 32 bits, exactly; others as they are."""
    if tensors.is_bf16(array.dtype):
        return tensors.bf16_to_f32(array)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def fingerprint(parameter: torch.Tensor) -> tuple[int, int]:
    """What changes when somebody writes to the parameter, or gives it other memory; writes through ``.data`` do not."""
    return parameter._version, parameter.data_ptr()


def _refuse_distributed(name: str, tensor: Any) -> None:
    if hasattr(tensor, "placements") and hasattr(tensor, "to_local"):
        raise errors.UnsupportedError(
            f"parameter {name!r}: a DTensor, of which this process holds a part; distributed='shards' will take it "
            "once the server assembles slices",
            subject=name,
            got=type(tensor).__name__,
        )
