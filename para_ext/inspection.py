"""Inspection: how compressible an adapter is, from its spectra alone."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .automatic import automatic
from .errors import ParaError
from .naming import module_type, natural_key
from .plan import Plan
from .spectra import ModuleSpectrum, Spectra

ENERGIES = (0.90, 0.95, 0.99)
KEEPS = (0.5, 0.25, 0.125, 0.0625)


@dataclass(frozen=True)
class TypeSummary:
    """Modules of one type.

    Attributes:
        module_count, parameters: how many; ``rank``: the largest of theirs.
        energy_share: the part of the adapter's Σσ² that lies in them.
        sigma_max: the largest σ.
        effective_rank: exp of the entropy of σ/Σσ (Roy & Vetterli 2007); its mean.
        dead: how many of them are zero.
        kept: the part of their parameters that the plan for 95 % of the adapter's energy keeps.
    """

    type: str
    module_count: int
    rank: int
    parameters: int
    energy_share: float
    sigma_max: float
    effective_rank: float
    dead: int
    kept: float


@dataclass(frozen=True)
class DepthSummary:
    """A quarter of the layers, ``first`` to ``last``; the rest as in :class:`TypeSummary`."""

    first: int
    last: int
    module_count: int
    energy_share: float
    kept: float


@dataclass(frozen=True)
class BudgetSummary:
    """What a budget would do.

    Attributes:
        parameters_after, kept: LoRA parameters, and as a part of the adapter's.
        bytes_after: of the tensor file; None where there is none.
        energy, relative_error: part of Σσ² kept, and ‖ΔW − ΔW'‖_F / ‖ΔW‖_F.
        uniform_rank, uniform_energy: the largest rank for all modules that takes no more parameters, and what it keeps;
            None where not even rank 1 does.
    """

    budget: str
    value: float
    parameters_after: int
    kept: float
    bytes_after: int | None
    energy: float
    relative_error: float
    uniform_rank: int | None
    uniform_energy: float | None


@dataclass(frozen=True)
class Floor:
    """What storage rounding hides anyway: components that are free to drop (``auto="dtype"``).

    Attributes:
        kept: part of the parameters without them.
        reason: in words.
    """

    kept: float
    reason: str


@dataclass(frozen=True)
class Inspection:
    """The answer of ``para-ext inspect``."""

    module_count: int
    parameters: int
    norm: float
    types: tuple[TypeSummary, ...]
    depths: tuple[DepthSummary, ...]
    floor: Floor | None
    budgets: tuple[BudgetSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def inspect(spectra: Spectra) -> Inspection:
    """Summarise per module type and depth, and what common budgets would keep."""
    good = spectra.plan(energy=0.95).ranks if spectra.energy else {m.name: 0 for m in spectra.modules}
    by_type: dict[str, list[ModuleSpectrum]] = defaultdict(list)
    for module in spectra.modules:
        by_type[module_type(module.name)].append(module)
    uniform = [spectra.plan(rank=r) for r in range(1, max((m.rank for m in spectra.modules), default=0) + 1)]
    budgets = []
    for name, values in (("energy", ENERGIES), ("keep", KEEPS)):
        for value in values:
            try:
                plan = spectra.plan(**{name: value})
            except ParaError:
                continue  # an adapter too small for this budget
            budgets.append(_summary(name, value, plan, spectra, uniform))
    total = spectra.energy
    return Inspection(
        module_count=len(spectra.modules),
        parameters=spectra.parameters,
        norm=math.sqrt(total),
        types=tuple(_type_summary(name, by_type[name], total, good) for name in sorted(by_type, key=natural_key)),
        depths=_depths(spectra.modules, total, good),
        floor=_floor(spectra),
        budgets=tuple(budgets),
    )


def _type_summary(name: str, modules: list[ModuleSpectrum], total: float, ranks: Mapping[str, int]) -> TypeSummary:
    return TypeSummary(
        type=name,
        module_count=len(modules),
        rank=max(m.rank for m in modules),
        parameters=sum(m.rank * (m.m + m.n) for m in modules),
        energy_share=_energy(modules) / total if total else 0.0,
        sigma_max=max(m.sigma[0] for m in modules),
        effective_rank=math.fsum(_effective_rank(m.sigma) for m in modules) / len(modules),
        dead=sum(m.sigma[0] == 0 for m in modules),
        kept=_kept(modules, ranks),
    )


def _depths(modules: Sequence[ModuleSpectrum], total: float, ranks: Mapping[str, int]) -> tuple[DepthSummary, ...]:
    """Quarters of the layers, by the first number in the names; none where most names have no number."""
    layers: dict[int, list[ModuleSpectrum]] = defaultdict(list)
    for module in modules:
        number = next((part for part in natural_key(module.name) if isinstance(part, int)), None)
        if number is not None:
            layers[number].append(module)
    order = sorted(layers)
    if len(order) < 4:
        return ()
    cuts = [round(len(order) * i / 4) for i in range(5)]
    summaries = []
    for start, end in itertools.pairwise(cuts):
        inside = [module for layer in order[start:end] for module in layers[layer]]
        share = _energy(inside) / total if total else 0.0
        summaries.append(DepthSummary(order[start], order[end - 1], len(inside), share, _kept(inside, ranks)))
    return tuple(summaries)


def _floor(spectra: Spectra) -> Floor | None:
    try:
        budget, reason = automatic("dtype", spectra)
        plan = spectra.plan(**budget)
    except ParaError:  # no file whose types would be known, or ΔW = 0
        return None
    return Floor(plan.parameters_after / plan.parameters_before, reason)


def _energy(modules: Iterable[ModuleSpectrum]) -> float:
    return math.fsum(s * s for m in modules for s in m.sigma)


def _kept(modules: Iterable[ModuleSpectrum], ranks: Mapping[str, int]) -> float:
    pairs = [(ranks[m.name] * (m.m + m.n), m.rank * (m.m + m.n)) for m in modules]
    return sum(after for after, _ in pairs) / sum(before for _, before in pairs)


def _effective_rank(sigma: tuple[float, ...]) -> float:
    total = math.fsum(sigma)
    if total == 0:
        return 0.0
    return math.exp(-math.fsum(s / total * math.log(s / total) for s in sigma if s > 0))


def _summary(name: str, value: float, plan: Plan, spectra: Spectra, uniform: Sequence[Plan]) -> BudgetSummary:
    norm = math.sqrt(spectra.energy)
    fitting = [p for p in uniform if p.parameters_after <= plan.parameters_after]
    return BudgetSummary(
        budget=name,
        value=value,
        parameters_after=plan.parameters_after,
        kept=plan.parameters_after / plan.parameters_before,
        bytes_after=spectra.layout.bytes(plan.ranks) if spectra.layout else None,
        energy=plan.energy,
        relative_error=plan.error / norm if norm else 0.0,
        uniform_rank=max(fitting[-1].ranks.values()) if fitting else None,
        uniform_energy=fitting[-1].energy if fitting else None,
    )
