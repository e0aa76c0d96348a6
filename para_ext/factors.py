"""LoraFactors: the factor pair of one adapted module, the only input of the core; checked once, never copied."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from .errors import ParaError, shown

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """One module's update ``ΔW = scale · B @ A``.

    Args:
        name: the module's name, unique within an adapter.
        B: [m, r], any strides; float32, float16, bfloat16 or float64.
        A: [r, n], any strides; dtype may differ from B's; on B's device.
        scale: alpha/r, or alpha/√r with rsLoRA; any finite number.
        group: modules of one group share one rank (experts of one MoE parameter, groups of a grouped conv).
        min_rank: a rank below which this module must not go (1 where leaving it out would not mean ΔW = 0: DoRA).
    """

    name: str
    B: Tensor
    A: Tensor
    scale: float = 1.0
    group: str | None = None
    min_rank: int = 0

    @property
    def m(self) -> int:
        return self.B.shape[0]

    @property
    def n(self) -> int:
        return self.A.shape[1]

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def parameters(self) -> int:
        """Elements of A and B as they are written."""
        return self.rank * (self.m + self.n)


def check_factors(factors: Iterable[LoraFactors]) -> tuple[LoraFactors, ...]:
    """Check shapes, dtypes, devices, scales and names once; values are checked by the cores stage, which reads them.

    Raises:
        ParaError: naming the module and what is wrong with it.
    """
    checked = tuple(factors)
    seen: set[str] = set()
    for f in checked:
        if f.name in seen:
            raise ParaError(f"module '{f.name}' is given twice: give each module one pair of factors")
        seen.add(f.name)
        if f.B.ndim != 2 or f.A.ndim != 2 or f.B.shape[1] != f.A.shape[0]:
            raise ParaError(
                f"module '{f.name}': B is {_shape(f.B)} and A is {_shape(f.A)}; "
                "B must be [m, r] and A [r, n] with one rank r"
            )
        if 0 in f.B.shape or 0 in f.A.shape:
            raise ParaError(f"module '{f.name}': B is {_shape(f.B)} and A is {_shape(f.A)}; no dimension may be 0")
        for which, t in (("B", f.B), ("A", f.A)):
            if t.dtype not in DTYPES:
                raise ParaError(
                    f"module '{f.name}': {which} has dtype {dtype_name(t.dtype)}; convert it to float32, float16, "
                    "bfloat16 or float64 first"
                )
            if not holds_data(t):
                raise ParaError(
                    f"module '{f.name}': {which} holds no dense data (meta, sparse or freed): load the weights first"
                )
        if f.A.device != f.B.device:
            raise ParaError(f"module '{f.name}': A is on {f.A.device}, B on {f.B.device}; move both to one device")
        if not isinstance(f.scale, Real) or not abs(f.scale) <= sys.float_info.max:
            raise ParaError(
                f"module '{f.name}': its scale is {shown(f.scale)}; alpha and rank must give a finite number"
            )
    return checked


def holds_data(t: Tensor) -> bool:
    """Whether a tensor's elements lie in memory: not on meta, not sparse, not faked, and not freed (as FSDP does)."""
    if t.is_meta or t.layout != torch.strided or t.is_nested or t.is_quantized:
        return False
    try:
        storage = t.untyped_storage()
        if storage.device.type == "meta":
            return False
        count = t.numel()
        if not t.is_contiguous():
            count = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        return t.numel() == 0 or (t.data_ptr() != 0 and storage.nbytes() >= (t.storage_offset() + count) * t.itemsize)
    except (RuntimeError, NotImplementedError):  # wrappers that have no storage of their own
        return False


def written_dtype(A: Tensor, B: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What a module's new factors are written in: ``dtype``, or its own, the wider one where A's and B's differ."""
    return dtype if dtype is not None else torch.promote_types(A.dtype, B.dtype)


def fold_bias(name: str, bias: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale · bias`` for a module's lora_B.bias [m], which PEFT scales as it does B·A.

    Raises:
        ParaError: it holds a NaN or an infinity, or ``dtype`` cannot hold it.
    """
    if not bias.isfinite().all():
        raise ParaError(f"module '{name}': lora_B.bias holds a NaN or an infinity; repair or retrain the adapter")
    folded = (bias.double() * scale).to(dtype)
    if not folded.isfinite().all():
        raise ParaError(
            f"module '{name}': a value of lora_B.bias exceeds the range of {dtype_name(dtype)} with the scale folded "
            "in; write with a wider --dtype such as bf16 or fp32"
        )
    return folded


def _shape(t: Tensor) -> str:
    return f"[{', '.join(map(str, t.shape))}]"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def total_parameters(factors: Sequence[LoraFactors]) -> int:
    """LoRA parameters of an adapter: elements of every A and B as written."""
    return sum(f.parameters for f in factors)
