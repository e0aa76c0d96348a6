"""Inspection: how compressible an adapter is, from its spectra alone."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from .errors import ParaError
from .naming import module_type, natural_key
from .plan import Plan
from .spectra import ModuleSpectrum, Spectra

ENERGIES = (0.90, 0.95, 0.99)
KEEPS = (0.5, 0.25, 0.125, 0.0625)


@dataclass(frozen=True)
class TypeSummary:
    """Modules of one type: how many, their ranks, share of the parameters and of Σσ², and effective rank.

    The effective rank of a module is exp of the entropy of σ/Σσ (Roy & Vetterli 2007); here its mean.
    """

    type: str
    modules: int
    rank: int
    parameters: int
    energy: float
    sigma_max: float
    effective_rank: float
    dead: int


@dataclass(frozen=True)
class BudgetSummary:
    """What a budget would do: the part of the parameters and of the energy that it keeps, and the relative error."""

    budget: str
    value: float
    parameters: int
    kept: float
    energy: float
    error: float


@dataclass(frozen=True)
class Inspection:
    """The answer of ``para-ext inspect``."""

    modules: int
    parameters: int
    norm: float
    types: tuple[TypeSummary, ...]
    budgets: tuple[BudgetSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def inspect(spectra: Spectra) -> Inspection:
    """Summarise per module type, and what common budgets would keep."""
    by_type: dict[str, list[ModuleSpectrum]] = defaultdict(list)
    for module in spectra.modules:
        by_type[module_type(module.name)].append(module)
    budgets = []
    for name, values in (("energy", ENERGIES), ("keep", KEEPS)):
        for value in values:
            try:
                plan = spectra.plan(**{name: value})
            except ParaError:
                continue  # an adapter too small for this budget
            budgets.append(_summary(name, value, plan, spectra))
    return Inspection(
        modules=len(spectra.modules),
        parameters=spectra.parameters,
        norm=math.sqrt(spectra.energy),
        types=tuple(_type_summary(name, by_type[name], spectra.energy) for name in sorted(by_type, key=natural_key)),
        budgets=tuple(budgets),
    )


def _type_summary(name: str, modules: list[ModuleSpectrum], total: float) -> TypeSummary:
    return TypeSummary(
        type=name,
        modules=len(modules),
        rank=max(m.rank for m in modules),
        parameters=sum(m.rank * (m.m + m.n) for m in modules),
        energy=math.fsum(s * s for m in modules for s in m.sigma) / total if total else 0.0,
        sigma_max=max(m.sigma[0] for m in modules),
        effective_rank=math.fsum(_effective_rank(m.sigma) for m in modules) / len(modules),
        dead=sum(m.sigma[0] == 0 for m in modules),
    )


def _effective_rank(sigma: tuple[float, ...]) -> float:
    total = math.fsum(sigma)
    if total == 0:
        return 0.0
    return math.exp(-math.fsum(s / total * math.log(s / total) for s in sigma if s > 0))


def _summary(name: str, value: float, plan: Plan, spectra: Spectra) -> BudgetSummary:
    norm = math.sqrt(spectra.energy)
    return BudgetSummary(
        budget=name,
        value=value,
        parameters=plan.parameters_after,
        kept=plan.parameters_after / plan.parameters_before,
        energy=plan.energy,
        error=plan.error / norm if norm else 0.0,
    )
