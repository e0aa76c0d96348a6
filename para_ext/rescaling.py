"""Rescaling of new factors: B' larger, for readers that divide by a gain again, and σ on one side or the other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import NUMPY, as_numpy
from .backends import Truncated
from .factors import LoraFactors

BALANCES = ("even", "A", "B")


def rescaled(f: LoraFactors, new: Truncated, code: str, gain: float = 1.0, balance: str = "even") -> Truncated:
    """gain·B'·A' as factors in the type of this ``code``, with the error bound of their product over gain as stored.

    What rounding adds is at most ``‖dB·A'‖ + ‖B''·dA‖``, and ``‖dB·A'‖_F ≤ ‖dB·D‖_F ‖D⁻¹A'‖₂`` for any diagonal D: with
    the norms of A's rows the last factor is close to 1 (they are nearly orthogonal), and at most the square root of the
    largest row sum of ``|D⁻¹A'A'ᵀD⁻¹|``. Where that is not small beside the rest, QR measures.

    Args:
        f: the module before.
        new: its approximation at unit scale, B' [m, k] and A' [k, n] in fp32 or fp64.
        code: of the type to write.
        gain: above 0.
        balance: "even" leaves B' and A' as they are; "A" or "B" gives that one all of σ.

    Returns:
        B'' [m, k] and A'' [k, n]; with a balance at most as many components as its orthonormal side allows.
    """
    exact_B, exact_A = as_numpy(new.B).astype(np.float64), as_numpy(new.A).astype(np.float64)
    with np.errstate(all="ignore"):  # an overflow is refused by the caller, who knows the module's name
        if balance == "A":
            exact_B, exact_A = _orthonormal(exact_B, exact_A)
        elif balance == "B":
            exact_A, exact_B = (x.T for x in _orthonormal(exact_A.T, exact_B.T))
        B, A = (exact_B * gain).astype(NUMPY[code]), exact_A.astype(NUMPY[code])
        stored_B = B.astype(np.float64) / gain
        dB, dA = stored_B - exact_B, A.astype(np.float64) - exact_A
        rounding = _product_bound(dB.T, exact_A) + _product_bound(dA, stored_B.T)
        lost = [float(np.linalg.norm(d)) for d in (dB * gain, dA)]
    finite = math.isfinite(rounding)
    error = new.error + rounding * (1 + 1e-9) if finite else math.inf
    if finite and rounding > 0.1 * new.error:
        from .certificate import difference

        error = min(error, difference(f.B, f.A, f.scale * gain, B, A) / gain)
    return Truncated(B, A, error, *(x if math.isfinite(x) else math.inf for x in lost))


def _orthonormal(X: NDArray[Any], Y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """X [p, k] · Y [k, q] with orthonormal columns in the place of X, all of them, for X's smallest are roundoff."""
    Q, R = np.linalg.qr(X)
    signs = np.where(np.diagonal(R) < 0, -1.0, 1.0)  # where X's columns are orthogonal, Q's have their directions
    return Q * signs, (R * signs[:, None]) @ Y


def _product_bound(left: NDArray[Any], right: NDArray[Any]) -> float:
    """An upper bound of ``‖leftᵀ·right‖_F`` for left [k, p] and right [k, q], fp64, but for a few roundings."""
    norms = np.linalg.norm(right, axis=1)
    unit = right / np.where(norms > 0, norms, 1.0)[:, None]
    stretch = float(np.abs(unit @ unit.T).sum(axis=1).max(initial=0.0))
    return float(np.linalg.norm(left * norms[:, None])) * math.sqrt(stretch)
