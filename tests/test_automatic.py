"""Budgets that follow from the adapter: the knee of its curve, and what storage rounding hides."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from adapters import factors, write_adapter

import para_ext
from para_ext.automatic import automatic
from para_ext.errors import ParaError
from para_ext.spectra import ModuleSpectrum, Spectra


def test_the_knee_is_where_the_curve_turns() -> None:
    """Four components hold nearly all: the knee takes these and no more."""
    sigma = (10.0, 9.0, 0.1, 0.1, 0.1, 0.1)
    spectra = Spectra(tuple(ModuleSpectrum(name, 8, 8, 6, sigma) for name in "ab"))
    budget, reason = automatic("knee", spectra)
    assert budget == {"params": 4 * 16}
    assert "33.3%" in reason
    assert set(spectra.plan(**budget).ranks.values()) == {2}


def test_the_knee_of_a_flat_curve_keeps_all() -> None:
    spectra = Spectra((ModuleSpectrum("a", 4, 4, 4, (1.0, 1.0, 1.0, 1.0)),))
    assert spectra.plan(**automatic("knee", spectra)[0]).energy >= 0.25


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_what_rounding_hides_is_dropped(tmp_path: Path, dtype: torch.dtype, unit: float) -> None:
    """Components below the rounding errors go, and the file is as far from the original as storing it would be."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for name in ("q_proj", "v_proj"):
        Q, P = (torch.linalg.qr(torch.randn(64, 8, generator=generator)).Q for _ in range(2))
        sigma = torch.tensor([1, 0.5, 0.2, 0.1, unit / 8, unit / 16, unit / 32, unit / 64])
        pairs.append((name, Q * sigma, P.T.contiguous()))
    exact = write_adapter(tmp_path / "exact", pairs)
    report = para_ext.compress_adapter(exact, tmp_path / "small", auto="dtype", dtype=dtype)
    assert set(report.ranks.values()) == {4}
    assert any("rounding to" in note for note in report.notes)
    assert report.plan.error <= math.sqrt(2 / 3) * unit * report.norm


def test_refusals(tmp_path: Path) -> None:
    spectra = Spectra((ModuleSpectrum("a", 4, 4, 1, (1.0,)),))
    with pytest.raises(ParaError, match="auto='x' is unknown"):
        automatic("x", spectra)
    with pytest.raises(ParaError, match="needs to know the type"):
        automatic("dtype", spectra)
    with pytest.raises(ParaError, match="ΔW is zero"):
        automatic("knee", Spectra((ModuleSpectrum("a", 4, 4, 1, (0.0,)),)))
    with pytest.raises(ParaError, match="needs to know the type"):
        automatic("dtype", Spectra(()))
    adapter = write_adapter(tmp_path / "a", factors())
    with pytest.raises(ParaError, match="auto and keep are given together"):
        para_ext.compress_adapter(adapter, tmp_path / "b", auto="knee", keep=0.5)


def test_a_live_model_by_its_knee() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r, self.lora_alpha, self.scaling = 4, 4, 1.0
            self.lora_A = torch.nn.Parameter(torch.randn(4, 9) * torch.tensor([[9.0], [1.0], [0.1], [0.1]]))
            self.lora_B = torch.nn.Parameter(torch.randn(8, 4))

    report = para_ext.compress_model(torch.nn.ModuleDict({"a": Layer()}), auto="knee")
    assert 0 < report.ranks["a"] < 4
    assert "knee" in report.notes[0]
