"""What the backends are judged against: the dense m×n product in fp64 and its SVD, none of our own tricks.

How good the oracle is. Factors are first scaled by powers of two, which is exact. Forming the product in fp64 errs by
at most r·u·‖|B||A|‖_F, and LAPACK's SVD by p·u·σ₁ with a small p: both are O(r·u·β), β = |s|‖A‖₂‖B‖₂. Singular values
below u·β are therefore not resolved, here or by the QR path, and no bound of ours asks for it: every one of them allows
30·r·u·β at least. The products of rank 1 have it exact: |s|‖b‖‖a‖ with correctly rounded sums (LAPACK itself loses
1500 u on a constant column of 128256 rows).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from para_ext.factors import LoraFactors

U64 = 2.0**-53
U32 = 2.0**-24


@dataclass(frozen=True, eq=False)
class Dense:
    """The product ``2**exponent · W`` of one module, W [m, n] fp64 = U S Vᵀ; β = ‖A‖₂‖B‖₂|s|, also over 2**exponent."""

    W: Tensor
    exponent: int
    U: Tensor
    S: Tensor
    V: Tensor
    beta: float

    def sigma(self, values: list[float]) -> Tensor:
        """Singular values of a backend, [min(r, m, n)], in the oracle's units."""
        return torch.tensor([math.ldexp(value, -self.exponent) for value in values], dtype=torch.float64)

    def best(self, k: int) -> Tensor:
        """[m, n]: the best approximation of rank k."""
        if k == len(self.S):
            return self.W
        return self.U[:, :k] * self.S[:k] @ self.V[:, :k].mT

    def tail(self, k: int) -> float:
        """‖W − best(k)‖_F"""
        return float(self.S[k:].norm())

    def product(self, B: Tensor, A: Tensor) -> Tensor:
        """[m, n]: BA of a compressed pair, in the oracle's units."""
        B, A, exponent = _units(B, A, 1.0)
        return _times_power(B @ A, exponent - self.exponent)

    def gaps(self) -> list[int]:
        """The k after which the spectrum falls to a half or less, so that best(k) is well defined."""
        following = torch.cat([self.S[1:], self.S.new_zeros(1)])
        return [k + 1 for k in range(len(self.S)) if self.S[k] > 0 and self.S[k] >= 2 * following[k]]


def dense(f: LoraFactors) -> Dense:
    """The oracle of one module; U, S, V have min(r, m, n) columns."""
    B, A, exponent = _units(f.B, f.A, f.scale)
    beta = float(torch.linalg.matrix_norm(B, 2) * torch.linalg.matrix_norm(A, 2))
    if f.rank == 1:
        b, a = (math.sqrt(math.fsum(x * x for x in t.flatten().tolist())) for t in (B, A))
        return Dense(B @ A, exponent, B / (b or 1), B.new_tensor([b * a]), A.mT / (a or 1), beta)
    W = B @ A
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    k = min(f.rank, f.m, f.n)
    return Dense(W, exponent, U[:, :k], S[:k], Vh[:k].mT, beta)


def gram_bound(sigma: Tensor, beta: float, rank: int) -> Tensor:
    """Error of singular values [k] from Gram matrices in fp64: 30·r·u(σ + β²/σ), and √(30·r·u)·β where that is less."""
    c = 30 * rank * U64
    floor = math.sqrt(c) * beta
    return torch.where(sigma > 0, c * (sigma + beta**2 / sigma), floor).clamp(max=floor)


def qr_bound(sigma: Tensor, beta: float, rank: int) -> Tensor:
    """Error of singular values [k] from Householder QR in fp64: 30·r·u·β."""
    return torch.full_like(sigma, 30 * rank * U64 * beta)


def _units(B: Tensor, A: Tensor, scale: float) -> tuple[Tensor, Tensor, int]:
    """B', A', exponent with scale·BA = 2**exponent · B'A', in fp64, all entries at most 1 in magnitude."""
    mantissa, exponent = math.frexp(scale)
    units = []
    for t in (B.double(), A.double()):
        shift = math.frexp(float(t.abs().max()))[1] if t.numel() else 0
        units.append(_times_power(t, -shift))
        exponent += shift
    return mantissa * units[0], units[1], exponent


def _times_power(x: Tensor, exponent: int) -> Tensor:
    """x · 2**exponent for an exponent that fp64 itself may not hold."""
    exponent = max(-2000, min(2000, exponent))
    half = exponent // 2
    return x * 2.0**half * 2.0 ** (exponent - half)
