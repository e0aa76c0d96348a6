"""Cores too large for the native Jacobi, by torch.linalg, on the device where they are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


_GRADED = 2.0**-17  # u·(σ₁/σ)², how far two columns are from orthogonal, is 2e-6 here


def left_vectors(M: Tensor) -> tuple[Tensor, Tensor]:
    """U [r, r] and S [r] of M = U S Vᵀ [r, r], fp64 and finite, S descending; columns of U are zero where S is.

    V is from MᵀM, at two thirds of the cost of an SVD: its error u‖M‖²/σ is within what the Gram matrices left. Columns
    of U that belong to σ far below σ₁ would not be orthogonal, though: where there are such, it is an SVD after all.
    """
    import torch

    exponent = math.frexp(float(M.abs().max()))[1]
    M = M * math.ldexp(1.0, -(exponent // 2)) * math.ldexp(1.0, exponent // 2 - exponent)
    US = M @ torch.linalg.eigh(M.mT @ M).eigenvectors.flip(1)
    S, order = torch.linalg.vector_norm(US, dim=0).sort(descending=True, stable=True)
    if S[-1] < S[0] * _GRADED:
        U, S, _ = torch.linalg.svd(M)
        U = U * (S > 0)
    else:
        U = US[:, order] / S
    return U, S * math.ldexp(1.0, exponent // 2) * math.ldexp(1.0, exponent - exponent // 2)
