"""The certificate: how far two factor pairs are apart, ‖scale·BA − B'A'‖_F, bounded from above without an m×n product.

A sum of factor pairs is one pair, ``scale·BA − B'A' = X Yᵀ`` with ``X = [scale·B, −B']`` and ``Y = [A; A']ᵀ``, and
Householder QR in fp64 of both gives ``‖X Yᵀ‖_F = ‖R_X R_Yᵀ‖_F``. The two other ways both fail: the identity
``⟨BᵀB, AAᵀ⟩ − 2⟨B'ᵀB, A'Aᵀ⟩ + ⟨B'ᵀB', A'A'ᵀ⟩`` cannot see below ``√u ‖A‖‖B‖``, and adding the measured storage
rounding to the dropped singular values is below the truth about half the time.

QR is backward stable column by column (Higham, Accuracy and Stability of Numerical Algorithms, §19.3): the computed
R_X belongs to ``X + E`` with ``‖e_j‖ ≤ c·u·‖x_j‖``. So the computed norm is off by at most ``c'·u·Σ_j ‖x_j‖‖y_j‖``,
which does not depend on how the columns are scaled; ``c' = 30·(r + k)`` is added.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arrays import UNIT_ROUNDOFF, Array, as_tensor

SAFETY = 30  # the customary threshold of LAPACK's own tests; the worst of ours stays below 3


def difference(B: Array, A: Array, scale: float, B2: Array, A2: Array) -> float:
    """An upper bound of ``‖scale·BA − B2·A2‖_F``, at most ``60·(r+k)·u·Σ_j ‖x_j‖‖y_j‖`` (u = 2⁻⁵³) above it.

    Exactly 0.0 where the columns of the two pairs agree one by one and ``scale`` is ± a power of two: for identical
    factors, and for such a scale folded into B (a positive one: or into A). inf where a factor holds a NaN or an
    infinity (an overflow in storage), and where the bound exceeds fp64.

    Args:
        B: [m, r] and A: [r, n], any dtype and strides.
        scale: any finite number.
        B2: [m, k] and A2: [k, n], any dtype and strides; k may be 0.
    """
    return difference_and_norm(B, A, scale, B2, A2)[0]


@torch.no_grad()
def difference_and_norm(B: Array, A: Array, scale: float, B2: Array, A2: Array) -> tuple[float, float]:
    """:func:`difference`, and :func:`norm` of the first pair from the same factorizations; inf both where one is.

    The norm is right to within ``30·(r+k)·u·|scale|·Σ_j ‖b_j‖‖a_j‖``.
    """
    B, A, B2, A2 = as_tensor(B), as_tensor(A), as_tensor(B2), as_tensor(A2)
    if not all(bool(t.isfinite().all()) for t in (B, A, B2, A2)):
        return math.inf, math.inf
    X, Y, exponent = joined((B, A, scale), (B2, A2, -1.0))
    r, exact = B.shape[1], abs(math.frexp(scale)[0]) == 0.5
    if exact and torch.equal(X[:, :r], -X[:, r:]) and torch.equal(Y[:, :r], Y[:, r:]):
        return 0.0, norm(B, A, scale)
    R_X, R_Y = triangle(X), triangle(Y)
    whole, distance = (torch.linalg.matrix_norm(R_X[:, :k] @ R_Y[:, :k].mT) for k in (r, X.shape[1]))
    floor = SAFETY * X.shape[1] * UNIT_ROUNDOFF * (X.norm(dim=0) @ Y.norm(dim=0))
    return _ldexp(float(distance + floor), exponent), _ldexp(float(whole), exponent)


@torch.no_grad()
def norm(B: Array, A: Array, scale: float) -> float:
    """``‖scale·BA‖_F`` to within ``30·r·u·|scale|·Σ_j ‖b_j‖‖a_j‖`` (u = 2⁻⁵³).

    Args:
        B: [m, r] and A: [r, n], finite, any dtype and strides.
        scale: any finite number.
    """
    if not B.shape[1]:
        return 0.0
    X, Y, exponent = joined((as_tensor(B), as_tensor(A), scale))
    return _ldexp(float(torch.linalg.matrix_norm(triangle(X) @ triangle(Y).mT)), exponent)


def joined(*pairs: tuple[Tensor, Tensor, float]) -> tuple[Tensor, Tensor, int]:
    """The sum of ``scale·BA`` over (B [m, r_i], A [r_i, n], scale) as one pair in fp64 that can't over- or underflow.

    Returns:
        X [m, Σr_i], Y [n, Σr_i], exponent: the sum is ``2**exponent · X Yᵀ``. All entries are at most 1 in magnitude;
        every column is one of a B or an A times a power of two, and X's times the mantissa of the scale.
    """
    left, right, exponents = [], [], []
    for B, A, scale in pairs:
        mantissa, shift = math.frexp(scale)
        x, x_exponents = _unit_columns(B)
        y, y_exponents = _unit_columns(A.mT)
        left.append(x * mantissa)
        right.append(y)
        exponents.append(x_exponents + y_exponents + shift)
    together = torch.cat(exponents)
    exponent = int(together.max())
    return torch.cat(left, 1) * _exp2(together - exponent), torch.cat(right, 1), exponent


def triangle(X: Tensor) -> Tensor:
    """R [min(m, p), p] of the QR factorization of X [m, p] in fp64, in blocks of rows (TSQR, Demmel et al. 2012)."""
    blocks, rest = blocked(X)
    if not len(blocks):
        R: Tensor = torch.linalg.qr(rest, mode="r").R
        return R
    return triangle(torch.cat([torch.linalg.qr(blocks, mode="r").R.flatten(0, 1), triangle(rest)]))


def blocked(X: Tensor) -> tuple[Tensor, Tensor]:
    """X [m, p] as blocks [count, rows, p] and the rest [< rows, p], or all of X as the rest where one block is enough.

    LAPACK's column norms lose up to u·m/100 (measured on constant columns: 1500 u at m = 128256), and our bounds allow
    30·p·u; a few levels of blocks of 64·p rows stay a tenth of that.
    """
    rows = 64 * X.shape[1]
    whole = len(X) // rows * rows if len(X) > rows else 0
    return X[:whole].reshape(-1, rows, X.shape[1]), X[whole:]


def _unit_columns(t: Tensor) -> tuple[Tensor, Tensor]:
    """t [m, p] as ``x·2^e`` column by column: x [m, p] fp64, largest magnitudes in [½, 1); e [p] int64."""
    x = t.double()
    largest = x.abs().amax(0)
    e = torch.frexp(largest).exponent.long()
    half = e // 2  # 2^-e itself may overflow
    return x * _exp2(-half) * _exp2(half - e), e.where(largest > 0, -4096)  # a zero column must not set the scale


def _exp2(e: Tensor) -> Tensor:
    """2^e in fp64, exact (torch.ldexp goes through fp32); e int64, below fp64's range as its smallest normal number."""
    return ((e.clamp(min=-1022) + 1023) << 52).view(torch.float64)


def _ldexp(x: float, exponent: int) -> float:
    try:
        return math.ldexp(x, exponent)
    except OverflowError:
        return math.inf
