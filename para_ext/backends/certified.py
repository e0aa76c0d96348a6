"""What stage 3 of a native backend measured, as certificates: the same for the CPU and CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..arrays import UNIT_ROUNDOFF, Array
from ..factors import LoraFactors
from ..pool import map_single_threaded
from . import Truncated


def certified(
    factors: Sequence[LoraFactors],
    outputs: Sequence[tuple[Array, Array]],
    ranks: NDArray[np.int64],
    certificates: NDArray[np.float64],
    betas: Sequence[float],
    norm: Callable[[int], float],
    threads: int,
) -> list[Truncated]:
    """Error bounds of the new factors (B', A'); modules for which the measured terms make a loose one are read again.

    Args:
        ranks: [modules, 2], the old ones and the new.
        certificates: [modules, 7], the members of Certificate (csrc/problem.h); all 0, but for what is lost, where the
            new rank is 0.
        betas: |scale|·‖B‖_F·‖A‖_F per module.
        norm: ‖ΔW‖_F of the module of this number.
    """
    lost, stretch_B, stretch_A, rounding_B, rounding_A, weighted_B, weighted_A = certificates.T
    for i in np.flatnonzero(ranks[:, 1] == 0).tolist():
        lost[i] = norm(i)

    # What a Gram matrix in fp64 can hide: perturbing BᵀB by c·r·u moves ‖BX‖ by up to √(c·r·u)·‖B‖‖X‖.
    floors = np.sqrt(30 * UNIT_ROUNDOFF * ranks[:, 0]) * betas
    with np.errstate(all="ignore"):  # an overflow in storage is refused by the caller, who knows the module's name
        rounding = stretch_B * weighted_A + stretch_A * weighted_B + rounding_B * rounding_A
        measured = lost + rounding
        errors = (measured + floors).tolist()
        # The sum is loose where one of its small terms is not small: hidden cancellation, or storage that underflows.
        hidden, rounded = floors > measured / 2, rounding > lost
    remeasure = [i for i in np.flatnonzero(hidden | rounded).tolist() if hidden[i] or rounding[i] > 0.1 * norm(i)]

    def measure(i: int) -> float:
        from ..certificate import difference

        f = factors[i]
        B, A = outputs[i]
        return difference(f.B, f.A, f.scale, B, A)

    for i, error in zip(remeasure, map_single_threaded(measure, remeasure, threads), strict=True):
        errors[i] = min(errors[i], error)
    return [
        Truncated(B, A, *numbers)
        for (B, A), *numbers in zip(outputs, errors, rounding_B.tolist(), rounding_A.tolist(), strict=True)
    ]
