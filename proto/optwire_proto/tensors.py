"""Element types, and arrays as little-endian bytes. NumPy only; bfloat16 needs no ``ml_dtypes`` here.

NumPy has no bfloat16. Where ``ml_dtypes`` is installed its scalar type is accepted and returned; elsewhere a bf16 leaf
is a ``uint16`` array of bit patterns with the dtype ``BF16`` below, which carries its meaning in the dtype's metadata.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from optwire_proto import errors

Array = npt.NDArray[Any]

# A uint16 dtype that says what its bits are. NumPy treats it as uint16 and keeps the metadata through views and copies
# of whole arrays; `is_bf16` is the only reader.
BF16: Final = np.dtype(np.uint16, metadata={"optwire": "bf16"})

# name -> (bytes an element, little-endian NumPy dtype the bytes are viewed as). The names are the protocol's.
_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "f32": np.dtype("<f4"),
    "f64": np.dtype("<f8"),
    "bf16": np.dtype("<u2"),
    "f16": np.dtype("<f2"),
    "c64": np.dtype("<c8"),
    "c128": np.dtype("<c16"),
    "i8": np.dtype("i1"),
    "i16": np.dtype("<i2"),
    "i32": np.dtype("<i4"),
    "i64": np.dtype("<i8"),
    "u8": np.dtype("u1"),
    "u16": np.dtype("<u2"),
    "u32": np.dtype("<u4"),
    "u64": np.dtype("<u8"),
    "bool": np.dtype("?"),
}
DTYPE_NAMES: Final = tuple(_DTYPES)
_NAME_BY_DTYPE: Final = {dtype: name for name, dtype in _DTYPES.items() if name != "bf16"}


def itemsize(name: str) -> int:
    """Bytes of one element of the element type ``name``."""
    return _DTYPES[name].itemsize


def is_bf16(dtype: np.dtype[Any]) -> bool:
    """Whether ``dtype`` is bfloat16: ``ml_dtypes``' scalar type, or our tagged ``uint16``."""
    if dtype.kind != "u":  # asking for the name is slow, and most arrays are of other kinds
        return dtype.kind == "V" and dtype.name == "bfloat16"
    return bool(dtype.metadata and dtype.metadata.get("optwire") == "bf16")


def dtype_name(dtype: np.dtype[Any]) -> str | None:
    """The protocol's name of a NumPy dtype, or None where it has none (objects, text, dates, 8-bit floats, …)."""
    if is_bf16(dtype):
        return "bf16"
    if dtype.kind == "V":  # other scalar types of ml_dtypes compare equal to nothing we serve
        return None
    return _NAME_BY_DTYPE.get(dtype.newbyteorder("<"))


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype that arrays of element type ``name`` have in user code: ``ml_dtypes``' for bf16 where loaded.

    ``ml_dtypes`` is used only if the program has imported it (JAX does), so the thin client never needs it.
    """
    if name != "bf16":
        return _DTYPES[name]
    ml_dtypes = sys.modules.get("ml_dtypes")
    return np.dtype(ml_dtypes.bfloat16) if ml_dtypes is not None else BF16


def wire_array(array: Array, where: str) -> tuple[str, Array]:
    """Returns the element type's name and a C-contiguous little-endian array whose bytes are the wire bytes.

    Copies only where the array is not laid out so already.

    Args:
      array: any shape; one of the served element types.
      where: what to call the array in an error.

    Raises:
      TreeError: the element type is not served.
    """
    name = dtype_name(array.dtype)
    if name is None:
        served = ", ".join(DTYPE_NAMES)
        raise errors.TreeError(
            f"{where}: element type {array.dtype}, expected one of {served}",
            subject=where,
            expected=served,
            got=str(array.dtype),
        )
    if name == "bf16":
        array = array.view(np.uint16)
    if array.flags.c_contiguous and array.dtype == _DTYPES[name]:
        return name, array
    # ascontiguousarray would turn a scalar into a vector of one.
    return name, np.require(array, dtype=_DTYPES[name], requirements="C").reshape(array.shape)


def wire_bytes(array: Array) -> memoryview:
    """A flat view of the bytes of a C-contiguous array; shares its memory."""
    return array.reshape(-1).view(np.uint8).data


def empty(shape: tuple[int, ...], name: str) -> Array:
    """An uninitialised array of element type ``name``, with the dtype that ``numpy_dtype`` gives."""
    return np.empty(shape, numpy_dtype(name))


def f32_to_bf16(array: npt.NDArray[np.float32]) -> Array:
    """Rounds float32 to bfloat16, to nearest, ties to even; NaN stays NaN. Shape kept; result as ``numpy_dtype``."""
    bits = np.ascontiguousarray(array, np.float32).reshape(array.shape).view(np.uint32)
    with np.errstate(over="ignore"):  # only NaN patterns can wrap, and those are replaced below
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x0040)
    return np.where(np.isnan(array), quiet_nan, rounded).astype(np.uint16).view(numpy_dtype("bf16"))


def bf16_to_f32(array: Array) -> npt.NDArray[np.float32]:
    """Widens bfloat16 to float32, exactly. Shape kept."""
    return (array.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
