"""The three stages in plain torch, fp64 Householder QR: the fallback, the definition, and the tests' first oracle.

    scale·B·A = Q_X·R_X·R_Yᵀ·Q_Yᵀ,   M = R_X R_Yᵀ = U S Vᵀ,   B' = Q_X·U_k·S_k^½,   A' = S_k^½·V_kᵀ·Q_Yᵀ

(X and Y are B and Aᵀ scaled by powers of two, see ``certificate.joined``.) No condition number is squared and nothing
is divided by: rank-deficient, zero and trapezoidal factors are no special cases, and every column of B' is accurate.
Q is computed again when it is needed, so that memory stays that of one module per thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..arrays import as_tensor, torch_dtype
from ..certificate import blocked, difference, joined, triangle
from ..errors import ParaError
from ..factors import LoraFactors
from ..pool import map_single_threaded
from . import Truncated

NAME = "torch"


@dataclass(frozen=True, eq=False)
class Core:
    """scale·B·A between the orthonormal bases, ``2**exponent · M``, and β = |scale|‖B‖_F‖A‖_F.

    M is [min(m, r), min(n, r)], fp64, on the CPU: its SVD is far quicker there than on a GPU, one by one.
    """

    name: str
    M: Tensor
    exponent: int
    beta: float


@dataclass(frozen=True, eq=False)
class Cores:
    """What the stages hand on: the cores, and after the svd stage (U, S, V) of each."""

    modules: list[Core]
    triplets: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


def cores(factors: Sequence[LoraFactors], threads: int) -> Cores:
    """Stage 1; raises ParaError naming the first module that holds a NaN or an infinity."""
    return Cores(map_single_threaded(_core, factors, threads))


def svd(cores: Cores, threads: int) -> list[list[float]]:
    """Stage 2: the singular values of every scale·B·A, min(r, m, n) each, descending, with error O(r·u·‖A‖‖B‖)."""
    cores.triplets[:] = map_single_threaded(_svd, cores.modules, threads)
    return [_sigma(core, S) for core, (_, S, _) in zip(cores.modules, cores.triplets, strict=True)]


def betas(cores: Cores) -> list[float]:
    """|scale|·‖B‖_F·‖A‖_F of every module."""
    return [core.beta for core in cores.modules]


def truncate(
    factors: Sequence[LoraFactors], cores: Cores, ranks: Sequence[int], codes: Sequence[str], threads: int
) -> list[Truncated]:
    """Stage 3: B' [m, k] and A' [k, n], the best rank-k approximation of each, rounded once from fp64."""
    dtypes = map(torch_dtype, codes)
    modules = zip(factors, cores.modules, cores.triplets, ranks, dtypes, strict=True)
    return map_single_threaded(_truncate, modules, threads)


def _core(f: LoraFactors) -> Core:
    B, A = as_tensor(f.B), as_tensor(f.A)
    for which, t in (("B", B), ("A", A)):
        if not t.isfinite().all():
            raise ParaError(f"module '{f.name}': {which} holds NaN or infinite values; repair or leave out this module")
    X, Y, exponent = joined((B, A, f.scale))
    beta = abs(f.scale) * (_norm(B) * _norm(A))
    return Core(f.name, (triangle(X) @ triangle(Y).mT).cpu(), exponent, beta)


def _svd(core: Core) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(core.M, full_matrices=False)
    return U, S, Vh.mT


def _sigma(core: Core, S: Tensor) -> list[float]:
    try:
        return [math.ldexp(s, core.exponent) for s in S.tolist()]
    except OverflowError:
        raise ParaError(
            f"module '{core.name}': its singular values exceed the range of float64; scale its factors down"
        ) from None


def _truncate(
    module: tuple[LoraFactors, Core, tuple[Tensor, Tensor, Tensor], int, torch.dtype],
) -> Truncated:
    f, core, triplet, rank, dtype = module
    X, Y, _ = joined((as_tensor(f.B), as_tensor(f.A), f.scale))
    U, S, V = (t[..., :rank].to(X.device) for t in triplet)
    half, odd = divmod(core.exponent, 2)
    root = (S * 2.0**odd).sqrt()
    B, rounding_B = _stored(_basis(X) @ (U * root) * 2.0**half, (f.m, rank), dtype)
    A, rounding_A = _stored((V * root).mT @ _basis(Y).mT * 2.0**half, (rank, f.n), dtype)
    return Truncated(B, A, difference(f.B, f.A, f.scale, B, A), rounding_B, rounding_A)


def _basis(X: Tensor) -> Tensor:
    """Q [m, min(m, p)] that belongs to ``triangle(X)``: by the same blocks, so that R is the same bit for bit."""
    blocks, rest = blocked(X)
    if not len(blocks):
        Q: Tensor = torch.linalg.qr(rest).Q
        return Q
    Q, R = torch.linalg.qr(blocks)
    top = _basis(torch.cat([R.flatten(0, 1), triangle(rest)]))
    of_blocks, of_rest = top[: R[..., 0].numel()].reshape(R.shape), top[R[..., 0].numel() :]
    return torch.cat([(Q @ of_blocks).flatten(0, 1), _basis(rest) @ of_rest])


def _stored(exact: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, float]:
    """exact, fp64, rounded to ``dtype`` and filled with zeros to ``shape``; ‖stored − exact‖_F."""
    stored = exact.new_zeros(shape, dtype=dtype)
    part = stored[: exact.shape[0], : exact.shape[1]]
    part.copy_(_rounded(exact, dtype))
    return stored, _norm(part.double() - exact)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, fp64, to the nearest of ``dtype``; torch goes to 16 bits through fp32, which rounds twice.

    Rounding to odd on the way (toward zero, then the last bit set where that was inexact) makes the second one right.
    """
    if dtype in (torch.float32, torch.float64):
        return x.to(dtype)
    single = x.float()
    bits = single.view(torch.int32) - (single.double().abs() > x.abs()).int()
    return (bits | (single.double() != x).int()).view(torch.float32).to(dtype)


def _norm(x: Tensor) -> float:
    """‖x‖_F in fp64, also where squares over- or underflow."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    if largest == 0 or math.isinf(largest):
        return largest
    return largest * float((x.double() / largest).norm())
