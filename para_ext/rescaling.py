"""Rescaling of new factors: B' larger, for readers that divide by a gain again, and σ on one side or the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import NUMPY, as_numpy
from .backends import Truncated
from .factors import LoraFactors

BALANCES = ("even", "A", "B")


def moved(sigma: Sequence[float], balance: str) -> NDArray[np.float64]:
    """What to multiply B's columns by, and to divide A's rows by, [k], so that ``balance`` has all of σ, not √σ."""
    roots = np.sqrt(np.asarray(sigma, np.float64))
    powers = roots if balance == "B" else 1 / np.where(roots > 0, roots, 1.0)
    return np.where(roots > 0, powers, 1.0)


def rescaled(
    f: LoraFactors, new: Truncated, code: str, gain: float = 1.0, columns: NDArray[np.float64] | None = None
) -> Truncated:
    """gain·B'·D and D⁻¹·A' in the type of this ``code``, with the error bound of their product over gain as stored.

    What rounding adds is at most ``‖dB·A'‖ + ‖B''·dA‖``, and ``‖dB·A'‖_F ≤ ‖dB·D‖_F ‖D⁻¹A'‖₂`` for any diagonal D: with
    the norms of A's rows the last factor is close to 1 (they are nearly orthogonal), and at most the square root of the
    largest row sum of ``|D⁻¹A'A'ᵀD⁻¹|``. Where that is not small beside the rest, QR measures.

    Args:
        f: the module before.
        new: its approximation at unit scale, B' [m, k] and A' [k, n] in fp32 or fp64.
        code: of the type to write.
        gain: above 0.
        columns: the diagonal of D, [k], above 0; ones if None.
    """
    exact_B, exact_A = as_numpy(new.B).astype(np.float64), as_numpy(new.A).astype(np.float64)
    if columns is not None:
        exact_B, exact_A = exact_B * columns, exact_A / columns[:, None]
    with np.errstate(all="ignore"):  # an overflow in storage is refused by the caller, who knows the module's name
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


def _product_bound(left: NDArray[Any], right: NDArray[Any]) -> float:
    """An upper bound of ``‖leftᵀ·right‖_F`` for left [k, p] and right [k, q], fp64, but for a few roundings."""
    norms = np.linalg.norm(right, axis=1)
    unit = right / np.where(norms > 0, norms, 1.0)[:, None]
    stretch = float(np.abs(unit @ unit.T).sum(axis=1).max(initial=0.0))
    return float(np.linalg.norm(left * norms[:, None])) * math.sqrt(stretch)
