"""Budgets that follow from the adapter itself, each with the reason in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .arrays import dtype_name
from .errors import ParaError
from .layout import DTYPE_BITS
from .plan import Infeasible
from .spectra import Spectra

UNIT_ROUNDOFFS = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""Of the types that factors are stored in: how far rounding moves a number, relatively."""


def automatic(name: str, spectra: Spectra) -> tuple[dict[str, Any], str]:
    """The budget that a rule of this name chooses, as an argument of ``Spectra.plan``, and why.

    Args:
        name: "knee" or "dtype".

    Raises:
        ParaError: there is no such rule, or the spectra lack what it needs.
        Infeasible: ΔW is zero.
    """
    if name not in AUTOMATIC:
        raise ParaError(f"auto={name!r:.40} is unknown: give {' or '.join(map(repr, AUTOMATIC))}")
    return AUTOMATIC[name](spectra)


def _check_trained(spectra: Spectra) -> None:
    if not spectra.energy:
        raise Infeasible("ΔW is zero in every module, so that there is no budget to choose: is this adapter trained?")


def _knee(spectra: Spectra) -> tuple[dict[str, Any], str]:
    """Where the curve of energy over parameters is farthest above its chord (Kneedle, Satopää et al. 2011)."""
    _check_trained(spectra)
    cost = np.concatenate([np.full(len(m.sigma), m.m + m.n) for m in spectra.modules])
    gain = np.concatenate(list(spectra.squares.values()))
    order = np.argsort(-gain / cost, kind="stable")
    kept, energy = cost[order].cumsum() / spectra.parameters, gain[order].cumsum() / spectra.energy
    knee = int(np.argmax(energy - kept))
    params = int(cost[order][: knee + 1].sum())
    reason = (
        f"The knee of energy over parameters is at {kept[knee]:.1%} of the parameters: from there on, a part of them "
        "adds less than the same part of the energy."
    )
    return {"params": params}, reason


def _dtype(spectra: Spectra) -> tuple[dict[str, Any], str]:
    """As much as storage rounding hides: dropped are components whose Σσ² is below that of the rounding errors."""
    factors = [slot for slot in spectra.layout.slots if slot.module is not None] if spectra.layout else []
    codes = {slot.dtype for slot in factors if slot.rank_axis is not None}
    if not codes:
        raise ParaError(
            "auto='dtype' needs to know the type that factors are stored in, which no live model tells, nor do "
            "gguf and merged: give energy, such as energy=0.99999"
        )
    _check_trained(spectra)
    code = max(codes & UNIT_ROUNDOFFS.keys(), key=lambda c: DTYPE_BITS[c])
    # Rounding moves each number by up to u of it, uniformly: by u/√3 of ‖B‖ and of ‖A‖, so by about u·√(2/3)·‖ΔW‖.
    part = 2 / 3 * UNIT_ROUNDOFFS[code] ** 2
    reason = (
        f"Dropped is what rounding to {dtype_name(code)} hides anyway: components that together are below "
        f"{part**0.5:.1e} of ‖ΔW‖, as large as the rounding errors of factors stored so."
    )
    return {"energy": repr(1 - part)}, reason


AUTOMATIC: dict[str, Callable[[Spectra], tuple[dict[str, Any], str]]] = {"knee": _knee, "dtype": _dtype}
