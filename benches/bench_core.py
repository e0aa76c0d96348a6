"""Factors in, factors out: the native stages beside the same in plain torch, on shapes of well-known models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_torch import compress_pairs
from shapes import LLAMA_3_8B, MINILM_L6, Shapes, trained_like

from para_ext import LoraFactors, decompose

KEEP = 0.25
CASES = {
    "Llama-3-8B r=16 fp32": (LLAMA_3_8B, 16, torch.float32),
    "Llama-3-8B r=16 bf16": (LLAMA_3_8B, 16, torch.bfloat16),
    "Llama-3-8B r=64 fp32": (LLAMA_3_8B, 64, torch.float32),
    "MiniLM r=32 fp32": (MINILM_L6, 32, torch.float32),
}


def ours(factors: list[LoraFactors]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    decomposition = decompose(factors, backend="cpu")
    new = decomposition.truncate(decomposition.spectra.plan(keep=KEEP))
    return [(f.B, f.A) for f in new]


def plain(factors: list[LoraFactors]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return compress_pairs([(f.B, f.A, f.scale) for f in factors], KEEP)


def products_agree(x: Any, y: Any, tolerance: float) -> bool:
    """Norm-wise agreement of every B'A', through a few random vectors."""
    generator = torch.Generator().manual_seed(1)
    for (B, A), (B2, A2) in zip(x, y, strict=True):
        probe = torch.randn(A.shape[1], 4, generator=generator)
        left, right = B.float() @ (A.float() @ probe), B2.float() @ (A2.float() @ probe)
        if (left - right).norm() > tolerance * max(left.norm(), right.norm()):
            return False
    return True


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", [ours, plain], ids=["para_ext", "plain torch"])
def test_whole_call(benchmark: Any, case: str, method: Callable[..., Any]) -> None:
    shapes, rank, dtype = CASES[case]
    factors = _factors(shapes, rank, dtype)
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    assert products_agree(ours(factors), plain(factors), tolerance)
    benchmark.group = case
    benchmark.extra_info["modules"] = len(factors)
    benchmark.pedantic(method, args=(factors,), rounds=7, warmup_rounds=1)


def _factors(shapes: Shapes, rank: int, dtype: torch.dtype) -> list[LoraFactors]:
    return [LoraFactors(name, B, A, 2.0) for name, B, A in trained_like(shapes, rank, dtype)]
