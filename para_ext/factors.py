"""LoraFactors: the factor pair of one adapted module, the only input of the core; checked once, never copied."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .arrays import FACTOR_CODES, NUMPY, Array, as_tensor, code_of, device_of, dtype_name, holds_data, is_tensor
from .errors import ParaError, shown

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """One module's update ``ΔW = scale · B @ A``.

    Args:
        name: the module's name, unique within an adapter.
        B: [m, r], a torch tensor with any strides, or a numpy array; float32, float16, bfloat16 or float64.
        A: [r, n], likewise; dtype may differ from B's; on B's device.
        scale: alpha/r, or alpha/√r with rsLoRA; any finite number.
        group: modules of one group share one rank (experts of one MoE parameter, groups of a grouped conv).
        min_rank: a rank below which this module must not go (1 where leaving it out would not mean ΔW = 0: DoRA).
    """

    name: str
    B: Tensor | NDArray[Any]
    A: Tensor | NDArray[Any]
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

    @property
    def bytes(self) -> int:
        """What the elements of A and B take."""
        return self.B.nbytes + self.A.nbytes


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
        B, A = f.B.shape, f.A.shape
        if len(B) != 2 or len(A) != 2 or B[1] != A[0]:
            raise ParaError(
                f"module '{f.name}': B is {_shape(f.B)} and A is {_shape(f.A)}; "
                "B must be [m, r] and A [r, n] with one rank r"
            )
        if not (B[0] and B[1] and A[1]):
            raise ParaError(f"module '{f.name}': B is {_shape(f.B)} and A is {_shape(f.A)}; no dimension may be 0")
        for which, t in (("B", f.B), ("A", f.A)):
            if code_of(t) not in FACTOR_CODES:
                raise ParaError(
                    f"module '{f.name}': {which} has dtype {dtype_name(t.dtype)}; convert it to float32, float16, "
                    "bfloat16 or float64 first"
                )
            if not holds_data(t):
                raise ParaError(
                    f"module '{f.name}': {which} holds no dense data (meta, sparse or freed): load the weights first"
                )
            if isinstance(t, np.ndarray) and not (t.flags.aligned and all(s >= 0 for s in t.strides)):
                raise ParaError(
                    f"module '{f.name}': {which} is a numpy array with unaligned or backward elements; give a copy"
                )
        both_torch = is_tensor(f.A) and is_tensor(f.B)
        if f.A.device != f.B.device if both_torch else device_of(f.A) != device_of(f.B):
            raise ParaError(
                f"module '{f.name}': A is on {device_of(f.A)}, B on {device_of(f.B)}; move both to one device"
            )
        if not (type(f.scale) is float or isinstance(f.scale, Real)) or not _finite(f.scale):
            raise ParaError(
                f"module '{f.name}': its scale is {shown(f.scale)}; alpha and rank must give a finite number"
            )
    return checked


def _finite(scale: Real | float) -> bool:
    try:
        return math.isfinite(scale)
    except OverflowError:  # an integer or a fraction beyond every float
        return False


def as_tensors(f: LoraFactors) -> LoraFactors:
    """The same factors as torch tensors."""
    return f if is_tensor(f.B) and is_tensor(f.A) else replace(f, B=as_tensor(f.B), A=as_tensor(f.A))


def written_code(A: Array, B: Array, code: str | None) -> str:
    """What a module's new factors are written in: ``code``, or its own, the wider one where A's and B's differ."""
    if code is not None:
        return code
    if A.dtype == B.dtype:
        return str(code_of(A))
    wider = {code_of(A), code_of(B)}
    return "F64" if "F64" in wider else "F32"  # float16 and bfloat16 hold each other only in float32


def fold_bias(name: str, bias: NDArray[Any], scale: float, code: str) -> NDArray[Any]:
    """``scale · bias`` for a module's lora_B.bias [m], which PEFT scales as it does B·A.

    Raises:
        ParaError: it holds a NaN or an infinity, or the type of this ``code`` cannot hold it.
    """
    exact = bias.astype(np.float64) * scale
    if not np.isfinite(exact).all():
        raise ParaError(f"module '{name}': lora_B.bias holds a NaN or an infinity; repair or retrain the adapter")
    with np.errstate(over="ignore"):
        folded = exact.astype(NUMPY[code])
    if not np.isfinite(folded.astype(np.float64)).all():
        raise ParaError(
            f"module '{name}': a value of lora_B.bias exceeds the range of {dtype_name(code)} with the scale folded "
            "in; write with a wider type, such as dtype='bf16'"
        )
    return folded


def _shape(t: Array) -> str:
    return f"[{', '.join(map(str, t.shape))}]"


def total_parameters(factors: Sequence[LoraFactors]) -> int:
    """LoRA parameters of an adapter: elements of every A and B as written."""
    return sum(f.parameters for f in factors)
