"""Adapter folders made on the spot, as PEFT saves them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

LINEARS = (("layers.{}.attn.q_proj", 48, 32), ("layers.{}.attn.v_proj", 24, 32), ("layers.{}.mlp.up", 96, 32))


def factors(
    layers: int = 3, rank: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Iterable[tuple[str, Tensor, Tensor]]:
    """(name, B [m, r], A [r, n]) with decaying B, of a small model with three linears per layer."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(layers):
        for name, m, n in LINEARS:
            decay = torch.logspace(0, -3, rank) * (1 + torch.rand(1, generator=generator))
            B = torch.randn(m, rank, generator=generator) * decay
            A = torch.randn(rank, n, generator=generator) / n**0.5
            yield name.format(i), B.to(dtype), A.to(dtype)


def write_adapter(
    folder: Path,
    pairs: Iterable[tuple[str, Tensor, Tensor]] | None = None,
    foreign: dict[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """A PEFT folder with these pairs; ``config`` overrides adapter_config.json."""
    folder.mkdir(parents=True)
    tensors = dict(foreign or {})
    rank = 8
    for name, B, A in factors() if pairs is None else pairs:
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
        rank = A.shape[0]
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj", "up"],
        "exclude_modules": None, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False,
    } | config  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
