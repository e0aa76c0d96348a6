"""Real adapters: the energy that each method keeps at equal parameters. Needs the adapters, not their models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import methods
from grid import DIVISORS, code

import para_ext
from para_ext import Decomposition, ParaError

METHODS = ("sigma", "density", "uniform", "layer-energy", "relative")  # others need the base model


def collect(folder: Path) -> list[dict[str, Any]]:
    """Records of all adapters in a folder of them, whatever para_ext reads."""
    records = []
    for adapter in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            factors = para_ext.decompose(adapter).factors
        except ParaError as refusal:
            print(f"{adapter.name}: left out, {refusal}")
            continue
        # Floors and shared ranks are rules of files and layers, not of the methods compared here.
        free = Decomposition([replace(f, group=None, min_rank=0) for f in factors])
        records += [{"adapter": adapter.name, **record, "code": code()} for record in _kept(free)]
    return records


def _kept(decomposition: Decomposition) -> Iterator[dict[str, Any]]:
    """Of every method at every fraction of the largest rank that is at least 1; the budget is what one rank takes."""
    spectra = decomposition.spectra
    largest = max(module.rank for module in spectra.modules)
    for divisor in DIVISORS:
        rank = largest // divisor
        if rank < 1 or spectra.energy == 0:
            continue
        budget = methods.Budget(rank, spectra.plan(rank=rank).parameters_after)
        found = {method: methods.RANKS[method](spectra, budget, {}) for method in METHODS}
        energies = {method: methods.energy(spectra, ranks) for method, ranks in found.items()}
        new = methods.compress("columns", decomposition, budget, {})
        energies["columns"] = 1 - methods.error(decomposition.factors, new) ** 2
        for method, energy in energies.items():
            yield {"modules": len(spectra.modules), "budget": 100 / divisor, "method": method, "energy": energy}
