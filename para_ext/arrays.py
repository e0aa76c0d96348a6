"""What factors are stored in: torch tensors, or numpy arrays where nothing needs PyTorch, whose import takes seconds.

Element types have the safetensors format's codes (``F32``, ``BF16``) everywhere but at the edges; numpy gets those that
it lacks from ml_dtypes.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, Union

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .errors import ParaError, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Array: TypeAlias = Union["Tensor", NDArray[Any]]

# By code: what numpy and torch call the type. Those that only newer releases of a library have may be missing there.
_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
FACTOR_CODES = ("F32", "F16", "BF16", "F64")
"""The element types that factors may have."""

UNIT_ROUNDOFF = 2.0**-53
"""Of float64, in which everything is computed."""

_ALIASES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "fp64": "F64"}
NUMPY: dict[str, np.dtype[Any]] = {
    code: np.dtype(getattr(ml_dtypes, name, None) or name)
    for code, name in _NAMES.items()
    if hasattr(ml_dtypes, name) or not name.startswith("float8")
}
"""numpy's type by code."""

_codes: dict[Any, str] = {dtype: code for code, dtype in NUMPY.items()}  # by numpy's type, and torch's once it is there


def is_tensor(x: Array) -> TypeGuard[Tensor]:
    """Whether it is torch's, not numpy's."""
    return not isinstance(x, np.ndarray)


def code_of(x: Array) -> str | None:
    """The code of the element type; None where there is none."""
    return _codes.get(x.dtype) or (_torch_codes().get(x.dtype) if is_tensor(x) else None)


def device_of(x: Array) -> str:
    """torch's name of where it lies: ``cpu``, ``cuda:0``."""
    return "cpu" if isinstance(x, np.ndarray) else str(x.device)


def dtype_name(dtype: object) -> str:
    """A type's name for people, of a code, a numpy or a torch type."""
    return _NAMES.get(str(dtype)) or str(dtype).removeprefix("torch.")


def checked_dtype(dtype: torch.dtype | str | None) -> str | None:
    """The code of what new factors shall be written in: torch's type, or ``"float32"``, ``"fp32"``, ``"F32"``; or None.

    Raises:
        ParaError: it is none of float32, float16, bfloat16 and float64.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    code = _ALIASES.get(name) or next((code for code in FACTOR_CODES if name in (code, _NAMES[code])), None)
    if code is None:
        raise ParaError(f"dtype {shown(name)} is not one of float32, float16, bfloat16 and float64")
    return code


def as_tensor(x: Array) -> Tensor:
    """The same memory as a torch tensor."""
    if not isinstance(x, np.ndarray):
        return x
    if x.flags.writeable:
        return _shared(x)
    with warnings.catch_warnings():
        # That an array is read-only, which torch can't express: nothing here writes to factors.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        return _shared(x)


def _shared(x: NDArray[Any]) -> Tensor:
    import torch

    if x.dtype.isbuiltin == 1:
        return torch.from_numpy(x)
    # torch takes only numpy's own types; others go as bits.
    return torch.from_numpy(x.view(f"u{x.itemsize}")).view(torch_dtype(_codes[x.dtype]))


def as_numpy(x: Array) -> NDArray[Any]:
    """The same memory as a numpy array; of a tensor on another device, a copy.

    Raises:
        ParaError: a tensor of a type that numpy and ml_dtypes lack.
    """
    if isinstance(x, np.ndarray):
        return x
    code = code_of(x)
    if code not in NUMPY:
        raise ParaError(f"a tensor of dtype {dtype_name(x.dtype)} cannot be written: convert it first")
    import torch

    x = x.detach().cpu().resolve_conj().resolve_neg()
    if NUMPY[code].isbuiltin == 1:
        return x.numpy()
    bits = torch.uint8 if x.element_size() == 1 else torch.int16
    return x.view(bits).numpy().view(NUMPY[code])


def torch_dtype(code: str) -> torch.dtype:
    """torch's type of a code."""
    import torch

    return getattr(torch, _NAMES[code])  # type: ignore[no-any-return]


def holds_data(x: Array) -> bool:
    """Whether the elements lie in memory: not on meta, not sparse, not faked, and not freed (as FSDP does)."""
    if isinstance(x, np.ndarray):
        return True
    torch = sys.modules["torch"]  # an import statement, asked of every factor of every call, would cost more
    if type(x) in (torch.Tensor, torch.nn.Parameter) and x.is_cpu and x.layout == torch.strided and x.is_contiguous():
        # Most tensors by far, and asked of every factor of every call.
        count, held = x.numel(), x.untyped_storage().nbytes()
        return count == 0 or (x.data_ptr() != 0 and held >= (x.storage_offset() + count) * x.itemsize)
    if x.is_meta or x.layout != torch.strided or x.is_nested or x.is_quantized:
        return False
    try:
        storage = x.untyped_storage()
        if storage.device.type == "meta":
            return False
        count = x.numel()
        if not x.is_contiguous():
            count = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        return x.numel() == 0 or (x.data_ptr() != 0 and storage.nbytes() >= (x.storage_offset() + count) * x.itemsize)
    except (RuntimeError, NotImplementedError):  # wrappers that have no storage of their own
        return False


def default_threads() -> int:
    """PyTorch's setting where it is loaded; otherwise OMP_NUM_THREADS, or the CPUs of this process."""
    if "torch" in sys.modules:
        return sys.modules["torch"].get_num_threads()  # type: ignore[no-any-return]
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch_codes() -> dict[Any, str]:
    import torch

    if torch.float32 not in _codes:
        _codes.update({getattr(torch, name): code for code, name in _NAMES.items() if hasattr(torch, name)})
    return _codes
