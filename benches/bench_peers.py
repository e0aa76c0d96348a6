"""Other tools' ways to lower a LoRA's rank, on a small adapter (MiniLM, 37 modules, r=32 → 8): `make bench-peers`.

PEFT's own converter, and what kohya-style tools do: the dense product of every module, decomposed in full or by a
randomized SVD. Every way gives every module the rank 8, so that all do the same job.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes import MINILM_L6, trained_like
from torch import nn

import para_ext

peft = pytest.importorskip("peft")
RANK, NEW_RANK = 32, 8


class Model(nn.Module):
    """Linear layers of MiniLM's shapes, by flat names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {name.replace(".", "_"): nn.Linear(len(A.T), len(B), bias=False) for name, B, A in adapter()}
        )


def adapter() -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    return list(trained_like(MINILM_L6, RANK, torch.float32))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    names = [name.replace(".", "_") for name, _, _ in adapter()]
    lora = peft.get_peft_model(Model(), peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
    for (_, B, A), name in zip(adapter(), names, strict=True):
        layer = lora.base_model.model.layers[name]
        layer.lora_A["default"].weight.data.copy_(A)
        layer.lora_B["default"].weight.data.copy_(B)
    return lora


Truth = list[tuple[torch.Tensor, torch.Tensor]]


def with_para_ext(model: nn.Module) -> Truth:
    decomposition = para_ext.decompose(model)
    return [(f.B, f.A) for f in decomposition.truncate(decomposition.spectra.plan(rank=NEW_RANK))]


def with_peft(model: nn.Module) -> Truth:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a LoRA already
        _, state = peft.convert_to_lora(model, rank=NEW_RANK)
    return [(state[key.replace("lora_A", "lora_B")], state[key]) for key in state if "lora_A" in key]


def _halves(U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    root = S[:NEW_RANK].sqrt()
    return U[:, :NEW_RANK] * root, root[:, None] * Vh[:NEW_RANK]


def with_dense_svd(model: nn.Module) -> Truth:
    return [_halves(*torch.linalg.svd(B @ A, full_matrices=False)) for _, B, A in adapter()]


def with_svd_lowrank(model: nn.Module) -> Truth:
    new = []
    for _, B, A in adapter():
        U, S, V = torch.svd_lowrank(B @ A, q=min(2 * NEW_RANK, RANK), niter=2)
        new.append(_halves(U, S, V.mT))
    return new


@pytest.mark.parametrize("way", [with_para_ext, with_peft, with_dense_svd, with_svd_lowrank])
def test_rank_8(benchmark: Any, model: nn.Module, way: Callable[[nn.Module], Truth]) -> None:
    given = adapter()
    new = way(copy.deepcopy(model))
    assert len(new) == len(given)
    lost = sum((B @ A - B2 @ A2).square().sum() for (_, B, A), (B2, A2) in zip(given, new, strict=True)).sqrt()
    best = sum(torch.linalg.svdvals(B @ A)[NEW_RANK:].square().sum() for _, B, A in given).sqrt()
    assert lost < 1.01 * best  # none is below; the randomized one may be a little above
    benchmark.group = f"{len(given)} modules, r={RANK} → {NEW_RANK}"
    benchmark.extra_info["error / optimum"] = float(lost / best)
    benchmark.pedantic(way, args=(model,), rounds=5, warmup_rounds=1)
