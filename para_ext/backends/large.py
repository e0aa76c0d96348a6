"""Cores too large for the native Jacobi, by torch.linalg, on the device where they are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def left_vectors(M: Tensor) -> tuple[Tensor, Tensor]:
    """U [r, r] and S [r] of M = U S Vᵀ [r, r], fp64 and finite, S descending; columns of U are zero where S is.

    V is from MᵀM, at two thirds of the cost of an SVD: its error u‖M‖²/σ is within what the Gram matrices left.
    """
    import torch

    exponent = math.frexp(float(M.abs().max()))[1]
    M = M * math.ldexp(1.0, -(exponent // 2)) * math.ldexp(1.0, exponent // 2 - exponent)
    US = M @ torch.linalg.eigh(M.mT @ M).eigenvectors.flip(1)
    S, order = torch.linalg.vector_norm(US, dim=0).sort(descending=True, stable=True)
    U = US[:, order] / S.where(S > 0, 1.0)
    return U, S * math.ldexp(1.0, exponent // 2) * math.ldexp(1.0, exponent - exponent // 2)
