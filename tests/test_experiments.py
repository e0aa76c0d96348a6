"""The experiments' methods and analysis, on small factors and made-up rows: seconds, no model, no data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adalora
import analysis
import methods
import numpy as np
import pytest
import torch
import training
from methods import Budget
from torch import Tensor, nn

import para_ext
from para_ext import LoraFactors

terms = adalora._terms


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


class Net(nn.Module):
    """Two layers of unlike shape, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.classifier = nn.Linear(6, 40), nn.Linear(40, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.classifier(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return found


class Rows:
    """Points of a plane, and on which side of a line they are."""

    points = torch.randn(256, 6, generator=torch.Generator().manual_seed(1))
    labels = (points[:, 0] > points[:, 1]).long()

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, ...]:
        return (self.points[list(rows)],)

    def batches(self, size: int, seed: int) -> list[list[int]]:
        return [list(range(i, i + size)) for i in range(0, 256, size)]


@pytest.mark.parametrize("params", [192, 120])
def test_adalora_becomes_a_lora_of_the_budget(params: int, monkeypatch: pytest.MonkeyPatch) -> None:
    task: Any = SimpleNamespace(
        targets=("first", "second"), batch=8, epochs=1, model=Net,
        splits=lambda: SimpleNamespace(train=Rows()),
    )  # fmt: skip
    trained: list[Any] = []
    monkeypatch.setattr(adalora, "_terms", lambda adapted, params: trained.append(adapted) or terms(adapted, params))
    plain = adalora.train(task, Net(), 2, params, 0, 0.05)
    factors = para_ext.decompose(plain).factors
    assert 0 < methods.size(factors) <= params
    before, after = (training.evaluate(model, Rows(), 64) for model in (trained[0], plain))
    # Two ranks in the mean are at most 4 × 50 parameters, so that the smaller budget takes components away.
    assert torch.allclose(before, after, atol=1e-5) == (methods.size(factors) == pruned(trained[0]))
    assert (before.argmax(1) == Rows.labels).double().mean() > 0.9


def pruned(adapted: Any) -> int:
    """LoRA parameters of what AdaLoRA left."""
    layers = [layer for layer in adapted.modules() if hasattr(layer, "lora_E")]
    kept = [(layer.lora_E["default"] != 0).sum().item() for layer in layers]
    return sum(k * (layer.in_features + layer.out_features) for k, layer in zip(kept, layers, strict=True))


def test_estimates_and_rank_correlation() -> None:
    found = analysis.estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.half) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert analysis.spearman([1, 2, 2, 3], [10, 20, 20, 30]) == pytest.approx(1)
    assert analysis.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


def row(method: str, rank: int | None, rights: int, seed: int = 0) -> analysis.Row:
    right = np.arange(1000) < rights
    return analysis.Row("task", seed, method, rank, None, 10, None, None, right.mean().item(), 0.0, right)


def test_results_are_read_as_written_and_answer_how_far_accuracy_holds(tmp_path: Path) -> None:
    rows = [
        row("head", None, 700),
        row("lora", None, 800),
        row("sigma", 4, 798),
        row("sigma", 2, 792),
        row("sigma", 1, 700),
    ]
    records = [{**vars(r), "rows": 1000, "right": np.packbits(r.right).tobytes().hex()} for r in rows]
    analysis.write(tmp_path, records)
    results = analysis.Results(analysis.read(tmp_path))
    assert [(r.method, r.rank, r.accuracy) for r in results.rows] == [(r.method, r.rank, r.accuracy) for r in rows]
    assert results.smallest("task", "sigma", points=1) == 2
    assert results.smallest("task", "sigma", part=0.05) == 4
    assert results.gain_kept("task", "sigma", 2) == pytest.approx(0.92)


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    pytest.importorskip("matplotlib", reason="document.py draws figures as well")
    import document

    tables = document.tables(analysis.Results(analysis.read(document.RESULTS)))
    for path in document.DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert document.filled(text, tables) == text, f"run make evidence-docs, which writes {path.name}"
