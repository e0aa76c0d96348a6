"""Methods: a trained adapter and a number of parameters → a smaller adapter that has no more.

Those that give every module a rank and keep its largest components (``RANKS``) are truncated by para_ext. Those that
keep other components (``COMPONENTS``) are sums of rank-1 terms b·a chosen here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from para_ext import Decomposition, LoraFactors, Spectra

BISECTIONS = 50
Term = TypeVar("Term")


@dataclass(frozen=True)
class Budget:
    """So many LoRA parameters: those of an adapter with one rank, which is ``rank``; ``seed`` is for chance."""

    rank: int
    params: int
    seed: int = 0


# Ranks


def sigma(spectra: Spectra, budget: Budget, norms: Mapping[str, float]) -> dict[str, int]:
    """PARA: the largest σ of all modules."""
    return spectra.plan(params=budget.params, score="sigma").ranks


def density(spectra: Spectra, budget: Budget, norms: Mapping[str, float]) -> dict[str, int]:
    """PARA by energy per parameter: the largest σ²/(m+n)."""
    return spectra.plan(params=budget.params, score="density").ranks


def uniform(spectra: Spectra, budget: Budget, norms: Mapping[str, float]) -> dict[str, int]:
    """One rank for all modules."""
    return spectra.plan(rank=budget.rank).ranks


def layer_energy(spectra: Spectra, budget: Budget, norms: Mapping[str, float]) -> dict[str, int]:
    """PEFT's rule: each module its smallest rank, at least 1, with a fraction of its own energy, the largest that fits.

    Where all at rank 1 are too many, the modules of the least energy go.
    """
    sums = {m.name: torch.tensor(m.sigma, dtype=torch.float64).square().cumsum(0) for m in spectra.modules}

    def ranks(fraction: float) -> dict[str, int]:
        return {name: int((total < fraction * total[-1]).sum()) + 1 for name, total in sums.items()}

    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if parameters(spectra, ranks(middle)) <= budget.params else (low, middle)
    found = ranks(low)
    for name in sorted(sums, key=lambda name: float(sums[name][-1])):
        if parameters(spectra, found) <= budget.params:
            break
        found[name] = 0
    return found


def base_aware(spectra: Spectra, budget: Budget, norms: Mapping[str, float]) -> dict[str, int]:
    """The largest σ/‖W₀‖₂: change beside what the base layer does."""
    return _largest(spectra, budget, lambda name, value: value / norms[name])


def relative(spectra: Spectra, budget: Budget, norms: Mapping[str, float]) -> dict[str, int]:
    """The largest σ/‖ΔW‖_F: every module counts alike."""
    lengths = {m.name: torch.tensor(m.sigma).norm().item() or 1.0 for m in spectra.modules}
    return _largest(spectra, budget, lambda name, value: value / lengths[name])


def density_floor(spectra: Spectra, budget: Budget, norms: Mapping[str, float]) -> dict[str, int]:
    """σ²/(m+n), and no module falls to rank 0 where the budget allows that."""
    if parameters(spectra, {m.name: 1 for m in spectra.modules}) > budget.params:
        return density(spectra, budget, norms)
    return spectra.plan(params=budget.params, score="density", min_rank=1).ranks


def tempered(spectra: Spectra, budget: Budget, norms: Mapping[str, float]) -> dict[str, int]:
    """The largest σ²/((m+n)·‖ΔW‖_F): halfway between all modules' energy pooled and each module by itself."""
    weights = {m.name: (m.m + m.n) * (torch.tensor(m.sigma).norm().item() or 1.0) for m in spectra.modules}
    return _largest(spectra, budget, lambda name, value: value**2 / weights[name])


def _largest(spectra: Spectra, budget: Budget, score: Callable[[str, float], float]) -> dict[str, int]:
    """Ranks of the longest prefix that fits, of all components by descending score."""
    terms = [(score(m.name, value), m.name, m.m + m.n) for m in spectra.modules for value in m.sigma]
    terms.sort(key=lambda term: -term[0])
    found = {m.name: 0 for m in spectra.modules}
    for name in _fitting(((name, cost) for _, name, cost in terms), budget):
        found[name] += 1
    return found


Ranks = Callable[[Spectra, Budget, Mapping[str, float]], dict[str, int]]
RANKS: dict[str, Ranks] = {
    "sigma": sigma,
    "density": density,
    "uniform": uniform,
    "layer-energy": layer_energy,
    "base-aware": base_aware,
    "relative": relative,
    "density-floor": density_floor,
    "tempered": tempered,
}


# Components


def chance(factors: Sequence[LoraFactors], budget: Budget) -> list[LoraFactors]:
    """Random components of the SVD: the floor of all methods that keep some of them."""
    orthogonal = [_components(f) for f in factors]
    terms = [(i, j) for i, f in enumerate(orthogonal) for j in range(f.rank)]
    random.Random(budget.seed).shuffle(terms)
    return _kept(orthogonal, terms, budget)


def columns(factors: Sequence[LoraFactors], budget: Budget) -> list[LoraFactors]:
    """The terms b·a that were trained, without any SVD, the largest ‖b‖·‖a‖ of all modules."""
    size = [abs(f.scale) * _tensor(f.B).norm(dim=0) * _tensor(f.A).norm(dim=1) for f in factors]
    terms = sorted(((i, j) for i, f in enumerate(factors) for j in range(f.rank)), key=lambda t: -size[t[0]][t[1]])
    return _kept(factors, terms, budget)


Components = Callable[[Sequence[LoraFactors], Budget], list[LoraFactors]]
COMPONENTS: dict[str, Components] = {"random": chance, "columns": columns}


def _components(f: LoraFactors) -> LoraFactors:
    """The same ΔW from orthogonal terms."""
    left, upper = torch.linalg.qr(_tensor(f.B).double())
    right, lower = torch.linalg.qr(_tensor(f.A).double().T)
    u, s, vh = torch.linalg.svd(f.scale * upper @ lower.T)
    return LoraFactors(f.name, (left @ u * s).float(), (vh @ right.T).float(), 1.0)


def _kept(factors: Sequence[LoraFactors], terms: Iterable[tuple[int, int]], budget: Budget) -> list[LoraFactors]:
    costs = (((i, j), factors[i].m + factors[i].n) for i, j in terms)
    taken: list[list[int]] = [[] for _ in factors]
    for i, j in _fitting(costs, budget):
        taken[i].append(j)
    return [
        LoraFactors(f.name, _tensor(f.B)[:, js] * f.scale, _tensor(f.A)[js], 1.0)
        for f, js in zip(factors, taken, strict=True)
    ]


# All of them


def compress(
    method: str, decomposition: Decomposition, budget: Budget, norms: Mapping[str, float]
) -> list[LoraFactors]:
    """What the method keeps; ``norms`` are the base layers' ‖W₀‖₂ by module.

    Raises:
        ValueError: it is more than the budget.
    """
    if method in RANKS:
        new = decomposition.truncate(RANKS[method](decomposition.spectra, budget, norms))
    else:
        new = COMPONENTS[method](decomposition.factors, budget)
    if (count := size(new)) > budget.params:
        raise ValueError(f"{method} keeps {count} parameters, more than {budget.params}")
    return new


def parameters(spectra: Spectra, ranks: Mapping[str, int]) -> int:
    """LoRA parameters at these ranks."""
    return sum(ranks[m.name] * (m.m + m.n) for m in spectra.modules)


def energy(spectra: Spectra, ranks: Mapping[str, int]) -> float:
    """Σσ² kept at these ranks, as a fraction of the adapter's."""
    return math.fsum(value**2 for m in spectra.modules for value in m.sigma[: ranks[m.name]]) / spectra.energy


def size(factors: Iterable[LoraFactors]) -> int:
    """LoRA parameters of an adapter."""
    return sum(f.A.shape[0] * (f.m + f.n) for f in factors)


def error(old: Sequence[LoraFactors], new: Sequence[LoraFactors]) -> float:
    """‖ΔW − ΔW'‖_F / ‖ΔW‖_F over all modules."""
    lost = sum(_norm([f, replace(g, scale=-g.scale)]) ** 2 for f, g in zip(old, new, strict=True))
    return math.sqrt(lost / sum(_norm([f]) ** 2 for f in old))


def product(f: LoraFactors) -> Tensor:
    """ΔW, float64 [m, n]."""
    return f.scale * _tensor(f.B).double() @ _tensor(f.A).double()


def _norm(terms: Sequence[LoraFactors]) -> float:
    """‖Σ ΔW‖_F in float64, from the triangular factors of all B and of all A beside each other."""
    upper = torch.linalg.qr(torch.cat([f.scale * _tensor(f.B).double() for f in terms], 1), mode="r").R
    lower = torch.linalg.qr(torch.cat([_tensor(f.A).double() for f in terms]).T, mode="r").R
    return float((upper @ lower.T).norm())


def _tensor(values: Any) -> Tensor:
    """Folders are read as numpy arrays, whose 16-bit floats PyTorch does not know."""
    return values if isinstance(values, Tensor) else torch.as_tensor(values.astype(np.float32))


def _fitting(terms: Iterable[tuple[Term, int]], budget: Budget) -> Iterable[Term]:
    """The longest prefix of (term, cost) that fits."""
    left = budget.params
    for term, cost in terms:
        left -= cost
        if left < 0:
            return
        yield term
