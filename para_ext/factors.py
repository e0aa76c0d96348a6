"""LoraFactors: the factor pair of one adapted module, the only input of the core; checked once, never copied."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ParaError

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
            if t.is_meta or t.layout != torch.strided:
                raise ParaError(
                    f"module '{f.name}': {which} holds no dense data (meta or sparse): load the weights first"
                )
        if f.A.device != f.B.device:
            raise ParaError(f"module '{f.name}': A is on {f.A.device}, B on {f.B.device}; move both to one device")
        if not math.isfinite(f.scale):
            raise ParaError(f"module '{f.name}': its scale is {f.scale}; alpha and rank must give a finite number")
    return checked


def _shape(t: Tensor) -> str:
    return f"[{', '.join(map(str, t.shape))}]"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def total_parameters(factors: Sequence[LoraFactors]) -> int:
    """LoRA parameters of an adapter: elements of every A and B as written."""
    return sum(f.parameters for f in factors)
