"""Weighted sums of adapters: exact in factors, against dense sums; and what has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import factors, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import para_ext
from para_ext.errors import ParaError
from para_ext.formats import read_adapter


def dense(folder: Path) -> dict[str, Tensor]:
    """ΔW [m, n] of every module in fp64."""
    return {
        f.name: f.scale * torch.tensor(f.B.astype("f8")) @ torch.tensor(f.A.astype("f8"))  # type: ignore[union-attr]
        for f in read_adapter(folder).factors
    }


def total(parts: list[tuple[dict[str, Tensor], float]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for deltas, weight in parts:
        for name, delta in deltas.items():
            found[name] = found.get(name, torch.zeros_like(delta)) + weight * delta
    return found


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    names = left.keys() | right.keys()
    zero = torch.zeros(())
    return float(sum((left.get(n, zero) - right.get(n, zero)).square().sum() for n in names).sqrt())  # type: ignore[union-attr]


def norm(deltas: dict[str, Tensor]) -> float:
    return distance(deltas, {})


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters with other ranks, alphas, scaling and modules."""
    a = write_adapter(tmp_path / "a", factors(seed=0, rank=8))
    b = write_adapter(tmp_path / "b", factors(seed=1, rank=4, layers=2), use_rslora=True, lora_alpha=3)
    return a, b


@pytest.mark.parametrize("weights", [(0.6, -0.4), (1.0, 1.0), (-2.0, 0.5), (1e-3, 7.0)])
def test_the_sum_is_exact(tmp_path: Path, pair: tuple[Path, Path], weights: tuple[float, float]) -> None:
    out = tmp_path / "out"
    report = para_ext.merge_adapters(dict(zip(pair, weights, strict=True)), out)
    assert isinstance(report, para_ext.Report)
    expected = total([(dense(path), weight) for path, weight in zip(pair, weights, strict=True)])
    assert distance(dense(out), expected) <= max(report.error, 1e-7 * norm(expected))
    assert report.error <= 1e-6 * norm(expected)
    assert set(report.ranks.values()) == {8, 12}


def test_truncated_to_a_budget_it_is_as_good_as_the_dense_sum_truncated(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    out, (a, b) = tmp_path / "out", pair
    report = para_ext.merge_adapters({a: 0.6, b: -0.4}, out, keep=0.3)
    assert isinstance(report, para_ext.Report)
    expected = total([(dense(a), 0.6), (dense(b), -0.4)])
    lost = 0.0
    for name, delta in expected.items():
        lost += float(torch.linalg.svdvals(delta)[report.ranks[name] :].square().sum())
    true = distance(dense(out), expected)
    assert true == pytest.approx(lost**0.5, rel=1e-4)
    assert true <= report.error <= 3 * true


def test_opposites_cancel(tmp_path: Path) -> None:
    a, b = (write_adapter(tmp_path / name, factors(seed=0)) for name in "ab")
    report = para_ext.merge_adapters({a: 1, b: -1}, tmp_path / "out")
    assert isinstance(report, para_ext.Report)
    assert norm(dense(tmp_path / "out")) <= 1e-6 * norm(dense(a))
    assert any("ΔW is zero" in note for note in report.notes) or report.norm <= 1e-6 * norm(dense(a))


@given(st.lists(st.floats(-4, 4).filter(lambda w: abs(w) > 1e-3), min_size=2, max_size=3), st.booleans())
@settings(max_examples=15, deadline=None)
def test_sums_in_any_precision(tmp_path_factory: pytest.TempPathFactory, weights: list[float], half: bool) -> None:
    root = tmp_path_factory.mktemp("sum")
    dtype = torch.bfloat16 if half else torch.float32
    sources = [
        write_adapter(root / str(i), factors(layers=1, rank=2 + i, seed=i, dtype=dtype)) for i in range(len(weights))
    ]
    report = para_ext.merge_adapters(dict(zip(sources, weights, strict=True)), root / "out")
    assert isinstance(report, para_ext.Report)
    expected = total([(dense(path), weight) for path, weight in zip(sources, weights, strict=True)])
    assert distance(dense(root / "out"), expected) <= report.error + 1e-12 * norm(expected)
    assert {f.A.dtype.name for f in read_adapter(root / "out").factors} == {"bfloat16" if half else "float32"}  # type: ignore[attr-defined]


def test_modules_of_either_are_targets(tmp_path: Path) -> None:
    pairs = list(factors(layers=2))
    a = write_adapter(tmp_path / "a", pairs[:3], target_modules=["q_proj", "v_proj", "up"], layers_to_transform=[0])
    b = write_adapter(tmp_path / "b", pairs[3:])
    para_ext.merge_adapters({a: 0.5, b: 0.5}, tmp_path / "out")
    merged = read_adapter(tmp_path / "out")
    assert {f.name for f in merged.factors} == {name for name, _, _ in pairs}


def refused(match: str, sources: dict[Any, float], out: Path) -> None:
    with pytest.raises(ParaError, match=match):
        para_ext.merge_adapters(sources, out)
    assert not out.exists()


def test_what_has_no_sum(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    a, b = pair
    out = tmp_path / "out"
    refused("one adapter alone", {a: 1.0}, out)
    refused("has the weight 0", {a: 1.0, b: 0.0}, out)
    refused("has the weight nan", {a: 1.0, b: float("nan")}, out)
    headed = write_adapter(tmp_path / "headed", foreign={"base_model.model.head.weight": torch.ones(2, 2)})
    refused("head.weight', which is not LoRA's", {a: 1.0, headed: 1.0}, out)
    other = write_adapter(tmp_path / "other", [("layers.0.attn.q_proj", torch.ones(5, 2), torch.ones(2, 6))])
    refused("module 'layers.0.attn.q_proj' has another shape", {a: 1.0, other: 1.0}, out)
    dora = write_adapter(tmp_path / "dora", factors(), use_dora=True)
    refused("uses DoRA", {a: 1.0, dora: 1.0}, out)
    para_ext.convert_adapter(a, tmp_path / "mlx-like", "vllm")
    single = tmp_path / "single.safetensors"
    (tmp_path / "b" / "adapter_config.json").unlink()
    (tmp_path / "b" / "adapter_model.safetensors").rename(single)
    refused("of different formats", {a: 1.0, single: 1.0}, out)


def test_no_source_is_written_to(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    a, b = pair
    for out, words in ((b, "is what is read"), (b / "inside", "lies inside"), (a, "is what is read")):
        with pytest.raises(ParaError, match=words):
            para_ext.merge_adapters({a: 0.5, b: 0.5}, out, overwrite=True)
    assert {f.rank for f in read_adapter(b).factors} == {4}
