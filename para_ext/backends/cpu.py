"""Backend `cpu`: the three stages in the native core, threads over modules.

fp16, bf16 and fp32 factors are read where they lie. Cores too large for the native Jacobi, or that it did not converge
on, are decomposed by torch.linalg, one at a time from single-threaded workers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .. import _cpu
from ..arrays import NUMPY, UNIT_ROUNDOFF, Array, as_tensor, code_of, is_tensor
from ..errors import ParaError
from ..factors import LoraFactors
from ..pool import map_single_threaded
from . import Truncated

NAME = "cpu"

# Measured on x86-64-v3: above it torch.linalg.eigh, pooled, overtakes the native Jacobi.
LARGEST_NATIVE_RANK = 96

ISA = os.environ.get("PARA_EXT_ISA", "")
"""ISA level to use, one of `_cpu.isa_levels()`; empty for the best."""

_TYPES = {"F32": 0, "F16": 1, "BF16": 2}  # csrc/problem.h, DType
_SLOT = 64  # bytes; every output starts on a cache line

# Columns of the table from here on are stage 3's (csrc/problem.h).
_NEW_RANK = 12


@dataclass(eq=False)
class Cores:
    """R_B, R_A, M, U, σ of every module in one workspace (layout: csrc/problem.h, Core), and its table."""

    factors: tuple[LoraFactors, ...]
    table: NDArray[np.int64]  # [modules, COLUMNS]
    scales: NDArray[np.float64]  # [modules]
    workspace: NDArray[np.float64]
    offsets: list[int]  # of each module's core in the workspace, in 8-byte words

    def block(self, module: int, index: int) -> NDArray[np.float64]:
        """[r, r] view of R_B, R_A, M or U (index 0 … 3)."""
        r = self.factors[module].rank
        start = self.offsets[module] + index * r * r
        return self.workspace[start : start + r * r].reshape(r, r)

    def sigma(self, module: int) -> NDArray[np.float64]:
        """[r] view of the singular values."""
        r = self.factors[module].rank
        start = self.offsets[module] + 4 * r * r
        return self.workspace[start : start + r]

    @cached_property
    def betas(self) -> list[float]:
        """|scale|·‖B‖_F·‖A‖_F per module, the scale of all its rounding errors."""
        ranks = np.array([f.rank for f in self.factors], dtype=np.int64)
        start = np.array(self.offsets, dtype=np.int64) + 4 * ranks * ranks + ranks
        squares = np.sqrt(self.workspace[start]) * np.sqrt(self.workspace[start + 1])
        betas: list[float] = (np.abs(self.scales) * squares).tolist()
        return betas


def supports(factors: LoraFactors) -> bool:
    """Whether this backend takes the module: data on the CPU, of at most 32 bits."""
    # The core of a rank far above min(m, n) would be all zeros, but of its full size here.
    small = factors.rank <= max(LARGEST_NATIVE_RANK, min(factors.m, factors.n))
    return small and all(code_of(x) in _TYPES and _plain(x) for x in (factors.A, factors.B))


def _plain(x: Array) -> bool:
    """Whether the elements lie in the CPU's memory as they are; a tensor may stand for the opposite of them."""
    return isinstance(x, np.ndarray) or (x.device.type == "cpu" and not x.is_neg())


def _place(x: Array) -> tuple[int, int, int, int]:
    """Address, strides in elements, type."""
    if isinstance(x, np.ndarray):
        row, column = x.strides
        return x.ctypes.data, row // x.itemsize, column // x.itemsize, _TYPES[str(code_of(x))]
    row, column = x.stride()
    return x.data_ptr(), row, column, _TYPES[str(code_of(x))]


def cores(factors: Sequence[LoraFactors], threads: int) -> Cores:
    """See `Backend.cores`."""
    if ISA and ISA not in levels():
        raise ParaError(f"PARA_EXT_ISA is '{ISA}'; unset it, or use one of {', '.join(levels())}")
    words = [_cpu.core_words(f.rank) for f in factors]
    workspace = np.asarray(_cpu.Arena(8 * max(sum(words), 1), threads)).view(np.float64)  # starts on a page
    address = workspace.ctypes.data
    base = 0
    offsets: list[int] = []
    rows: list[tuple[int, ...]] = []
    for f, count in zip(factors, words, strict=True):
        offsets.append(base)
        (m, r), n = f.B.shape, f.A.shape[1]
        B, B_rows, B_columns, B_type = _place(f.B)
        A, A_rows, A_columns, A_type = _place(f.A)
        rows.append((
            B, m, B_rows, B_columns, B_type, A, n, A_rows, A_columns, A_type, r, address + 8 * base, 0, 0, 0, 0
        ))  # fmt: skip
        base += count
    table = np.array(rows, dtype=np.int64).reshape(len(rows), _cpu.COLUMNS)
    scales = np.array([f.scale for f in factors], dtype=np.float64)
    for f, status in zip(factors, _cpu.cores(table, scales, threads, ISA).tolist(), strict=True):
        if status == 3:
            raise ParaError(
                f"module '{f.name}': its singular values exceed the range of float64; scale its factors or alpha down"
            )
        if status:
            raise ParaError(
                f"module '{f.name}': {'B' if status == 1 else 'A'} holds a NaN or an infinity; "
                "repair or retrain the adapter"
            )
    return Cores(tuple(factors), table, scales, workspace, offsets)


def betas(cores: Cores) -> list[float]:
    """See `Backend.betas`."""
    return cores.betas


def svd(cores: Cores, threads: int) -> list[list[float]]:
    """See `Backend.svd`."""
    factors = cores.factors
    native = np.array([f.rank <= LARGEST_NATIVE_RANK for f in factors], dtype=bool)
    sweeps = np.full(len(factors), -1, dtype=np.int32)
    sweeps[native] = _cpu.svd(cores.table[native], cores.scales[native], threads, ISA)
    large = [i for i, done in enumerate(sweeps.tolist()) if done < 0]

    def decompose(i: int) -> None:
        import torch

        # V from MᵀM, at two thirds of the cost of an SVD: its error u‖M‖²/σ is within what the Gram matrices left.
        M = torch.from_numpy(cores.block(i, 2))
        exponent = math.frexp(float(M.abs().max()))[1]
        M = M * math.ldexp(1.0, -(exponent // 2)) * math.ldexp(1.0, exponent // 2 - exponent)
        US = M @ torch.linalg.eigh(M.mT @ M).eigenvectors.flip(1)
        S, order = torch.linalg.vector_norm(US, dim=0).sort(descending=True, stable=True)
        cores.block(i, 3)[:] = (US[:, order] / S.where(S > 0, 1.0)).numpy()
        cores.sigma(i)[:] = S.numpy() * math.ldexp(1.0, exponent // 2) * math.ldexp(1.0, exponent - exponent // 2)

    if large:
        map_single_threaded(decompose, large, threads)
    return [cores.sigma(i)[: min(f.rank, f.m, f.n)].tolist() for i, f in enumerate(factors)]


def truncate(
    factors: Sequence[LoraFactors], cores: Cores, ranks: Sequence[int], codes: Sequence[str], threads: int
) -> list[Truncated]:
    """See `Backend.truncate`."""
    sizes = [
        (k * f.m * NUMPY[code].itemsize, k * f.n * NUMPY[code].itemsize)
        for f, k, code in zip(factors, ranks, codes, strict=True)
    ]
    arena = np.asarray(_cpu.Arena(sum(-(-size // _SLOT) * _SLOT for pair in sizes for size in pair), threads))
    address = arena.ctypes.data
    table = cores.table.copy()
    outputs: list[tuple[Array, Array]] = []
    columns: list[tuple[int, ...]] = []
    offset = 0
    for f, k, code, (size_B, size_A) in zip(factors, ranks, codes, sizes, strict=True):
        dtype = NUMPY[code]
        start, offset = offset, offset + -(-size_B // _SLOT) * _SLOT
        columns.append((k, address + start, address + offset, _TYPES[code]))
        B: Array = arena[start : start + size_B].view(dtype).reshape(f.m, k)
        A: Array = arena[offset : offset + size_A].view(dtype).reshape(k, f.n)
        offset += -(-size_A // _SLOT) * _SLOT
        outputs.append((as_tensor(B), as_tensor(A)) if is_tensor(f.B) else (B, A))
    table[:, _NEW_RANK:] = np.array(columns, dtype=np.int64).reshape(len(columns), 4)
    certificates = _cpu.truncate(table, cores.scales, threads, ISA)

    errors = []
    remeasure = []
    for i, (lost, stretch_B, stretch_A, rounding_B, rounding_A, weighted_B, weighted_A) in enumerate(
        certificates.tolist()
    ):
        if ranks[i] == 0:
            lost = float(np.linalg.norm(cores.sigma(i)))
        rounding = stretch_B * weighted_A + stretch_A * weighted_B + rounding_B * rounding_A
        measured = lost + rounding
        # What a Gram matrix in fp64 can hide: perturbing BᵀB by c·r·u moves ‖BX‖ by up to √(c·r·u)·‖B‖‖X‖.
        floor = math.sqrt(30 * factors[i].rank * UNIT_ROUNDOFF) * cores.betas[i]
        errors.append(measured + floor)
        # The sum is loose where one of its small terms is not small: hidden cancellation, or storage that underflows.
        if floor > measured / 2 or (rounding > lost and rounding > 0.1 * float(np.linalg.norm(cores.sigma(i)))):
            remeasure.append(i)

    def measure(i: int) -> float:
        from ..certificate import difference

        f = factors[i]
        B, A = outputs[i]
        return difference(f.B, f.A, f.scale, B, A)

    for i, error in zip(remeasure, map_single_threaded(measure, remeasure, threads), strict=True):
        errors[i] = min(errors[i], error)
    return [
        Truncated(B, A, errors[i], certificates[i, 3].item(), certificates[i, 4].item())
        for i, (B, A) in enumerate(outputs)
    ]


def levels() -> list[str]:
    """ISA levels that were built in and that this machine runs, best first."""
    return _cpu.isa_levels()
