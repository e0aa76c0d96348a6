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
from ..arrays import NUMPY, Array, as_tensor, code_of, is_tensor
from ..errors import ParaError
from ..factors import LoraFactors
from ..pool import map_single_threaded
from . import Truncated
from .certified import certified
from .large import left_vectors
from .table import A_COLUMNS, B_ROWS, NEW_A, NEW_B, NEW_RANK, RANK, TYPES, check_status, row, with_outputs

NAME = "cpu"

# Measured on x86-64-v3: above it torch.linalg.eigh, pooled, overtakes the native Jacobi.
LARGEST_NATIVE_RANK = 96

ISA = os.environ.get("PARA_EXT_ISA", "")
"""ISA level to use, one of `_cpu.isa_levels()`; empty for the best."""


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
    A, B, r = factors.A, factors.B, factors.rank
    # The core of a rank far above min(m, n) would be all zeros, but of its full size here.
    small = r <= LARGEST_NATIVE_RANK or r <= min(factors.m, factors.n)
    return small and code_of(A) in TYPES and code_of(B) in TYPES and _plain(A) and _plain(B)


def _plain(x: Array) -> bool:
    """Whether the elements lie in the CPU's memory as they are; a tensor may stand for the opposite of them."""
    return isinstance(x, np.ndarray) or (x.is_cpu and not x.is_neg())


def cores(factors: Sequence[LoraFactors], threads: int) -> Cores:
    """See `Backend.cores`."""
    if ISA and ISA not in levels():
        raise ParaError(f"PARA_EXT_ISA is '{ISA}'; unset it, or use one of {', '.join(levels())}")
    ranks = [f.A.shape[0] for f in factors]
    words_of = {r: _cpu.core_words(r) for r in set(ranks)}
    words = [words_of[r] for r in ranks]
    workspace = np.asarray(_cpu.Arena(8 * max(sum(words), 1), threads)).view(np.float64)  # starts on a page
    address = workspace.ctypes.data
    base = 0
    offsets: list[int] = []
    rows: list[tuple[int, ...]] = []
    for f, count in zip(factors, words, strict=True):
        offsets.append(base)
        rows.append(row(f, address + 8 * base))
        base += count
    table = np.array(rows, dtype=np.int64).reshape(len(rows), _cpu.COLUMNS)
    scales = np.array([f.scale for f in factors], dtype=np.float64)
    check_status(factors, _cpu.cores(table, scales, threads, ISA).tolist())
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

        U, S = left_vectors(torch.from_numpy(cores.block(i, 2)))
        cores.block(i, 3)[:] = U.numpy()
        cores.sigma(i)[:] = S.numpy()

    if large:
        map_single_threaded(decompose, large, threads)
    # All at once, and in lists: a thousand small views of an array cost more than the SVDs of their modules.
    ranks = cores.table[:, RANK]
    counts = np.minimum(np.minimum(ranks, cores.table[:, B_ROWS]), cores.table[:, A_COLUMNS])
    ends = counts.cumsum()
    starts = np.array(cores.offsets, dtype=np.int64) + 4 * ranks * ranks
    values = cores.workspace[np.arange(counts.sum()) + (starts - ends + counts).repeat(counts)].tolist()
    return [values[end - count : end] for end, count in zip(ends.tolist(), counts.tolist(), strict=True)]


def truncate(
    factors: Sequence[LoraFactors], cores: Cores, ranks: Sequence[int], codes: Sequence[str], threads: int
) -> list[Truncated]:
    """See `Backend.truncate`."""
    table, size, starts = with_outputs(cores.table, ranks, codes)
    arena = np.asarray(_cpu.Arena(size, threads))
    table[:, [NEW_B, NEW_A]] += arena.ctypes.data
    whole = {code: arena.view(NUMPY[code]) for code in set(codes)}
    tensors = {code: as_tensor(x) for code, x in whole.items()} if any(is_tensor(f.B) for f in factors) else {}
    outputs: list[tuple[Array, Array]] = []
    for f, k, code, (B, A) in zip(factors, ranks, codes, starts, strict=True):
        m, n = f.B.shape[0], f.A.shape[1]
        if is_tensor(f.B):
            flat = tensors[code]
            outputs.append((flat.as_strided((m, k), (k, 1), B), flat.as_strided((k, n), (n, 1), A)))
        else:
            bits = whole[code]
            outputs.append((bits[B : B + m * k].reshape(m, k), bits[A : A + k * n].reshape(k, n)))
    certificates = _cpu.truncate(table, cores.scales, threads, ISA)
    return certified(
        factors,
        outputs,
        table[:, [RANK, NEW_RANK]],
        certificates,
        cores.betas,
        lambda i: math.hypot(*cores.sigma(i).tolist()),
        threads,
    )


def levels() -> list[str]:
    """ISA levels that were built in and that this machine runs, best first."""
    return _cpu.isa_levels()
