"""The experiments' methods and analysis, on small factors and made-up rows: seconds, no model, no data."""

from __future__ import annotations

import math

import analysis
import methods
import numpy as np
import pytest
import torch
from methods import Budget

import para_ext
from para_ext import LoraFactors


@pytest.fixture
def factors() -> list[LoraFactors]:
    """Three modules of unlike shape and scale, rank 8."""
    draw = torch.Generator().manual_seed(0)

    def make(name: str, m: int, n: int, scale: float) -> LoraFactors:
        return LoraFactors(name, torch.randn(m, 8, generator=draw), torch.randn(8, n, generator=draw), scale)

    return [make("a", 40, 30, 1.0), make("b", 20, 90, 0.2), make("c", 16, 12, 3.0)]


def budget_of(factors: list[LoraFactors], rank: int) -> Budget:
    return Budget(rank, sum(rank * (f.m + f.n) for f in factors))


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("method", [*methods.RANKS, *methods.COMPONENTS])
def test_a_method_fits_its_budget_and_nearly_fills_it(method: str, rank: int, factors: list[LoraFactors]) -> None:
    budget = budget_of(factors, rank)
    norms = {"a": 1.0, "b": 2.0, "c": 3.0}
    new = methods.compress(method, para_ext.decompose(factors), budget, norms)
    widest = max(f.m + f.n for f in factors)
    assert [f.name for f in new] == [f.name for f in factors]
    # One energy fraction for all layers may have to stop where the next step is one of every layer.
    slack = sum(f.m + f.n for f in factors) if method == "layer-energy" else widest
    assert budget.params - slack < methods.size(new) <= budget.params


@pytest.mark.parametrize("method", list(methods.COMPONENTS))
def test_all_components_are_the_whole_adapter(method: str, factors: list[LoraFactors]) -> None:
    new = methods.COMPONENTS[method](factors, budget_of(factors, 8))
    assert methods.error(factors, new) < 1e-6


def test_random_components_are_the_floor(factors: list[LoraFactors]) -> None:
    budget, decomposition = budget_of(factors, 4), para_ext.decompose(factors)
    errors = {
        method: methods.error(factors, methods.compress(method, decomposition, budget, dict.fromkeys("abc", 1.0)))
        for method in [*methods.RANKS, *methods.COMPONENTS]
    }
    assert max(errors, key=lambda method: errors[method]) == "random"


def test_layer_energy_is_pefts_rule(factors: list[LoraFactors]) -> None:
    spectra = para_ext.decompose(factors).spectra
    budget = budget_of(factors, 4)
    ranks = methods.layer_energy(spectra, budget, {})
    kept = {m.name: np.cumsum(np.square(m.sigma)) / np.sum(np.square(m.sigma)) for m in spectra.modules}
    fraction = min(kept[name][k - 1] for name, k in ranks.items())  # each one's is at least what all must reach
    assert all(k == 1 or kept[name][k - 2] < fraction for name, k in ranks.items())


def test_the_bootstrap_is_of_paired_rows() -> None:
    draw = np.random.default_rng(0)
    theirs = draw.random(2000) < 0.8
    ours = theirs | (draw.random(2000) < 0.1)
    found = analysis.difference([ours], [theirs])
    assert found.mean == pytest.approx((ours & ~theirs).mean())
    assert found.low < found.mean < found.high
    assert found.decided
    assert not analysis.difference([ours], [ours]).decided


def test_estimates_and_rank_correlation() -> None:
    found = analysis.estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.half) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert analysis.spearman([1, 2, 2, 3], [10, 20, 20, 30]) == pytest.approx(1)
    assert analysis.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
