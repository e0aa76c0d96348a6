"""Layer shapes of well-known models, shared by all benches: (name, out_features m, in_features n, count)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LLAMA_3_8B = (
    ("model.layers.{}.self_attn.q_proj", 4096, 4096, 32),
    ("model.layers.{}.self_attn.k_proj", 1024, 4096, 32),
    ("model.layers.{}.self_attn.v_proj", 1024, 4096, 32),
    ("model.layers.{}.self_attn.o_proj", 4096, 4096, 32),
    ("model.layers.{}.mlp.gate_proj", 14336, 4096, 32),
    ("model.layers.{}.mlp.up_proj", 14336, 4096, 32),
    ("model.layers.{}.mlp.down_proj", 4096, 14336, 32),
)
MINILM_L6 = (
    ("encoder.layer.{}.attention.self.query", 384, 384, 6),
    ("encoder.layer.{}.attention.self.key", 384, 384, 6),
    ("encoder.layer.{}.attention.self.value", 384, 384, 6),
    ("encoder.layer.{}.attention.output.dense", 384, 384, 6),
    ("encoder.layer.{}.intermediate.dense", 1536, 384, 6),
    ("encoder.layer.{}.output.dense", 384, 1536, 6),
)

Shapes = tuple[tuple[str, int, int, int], ...]


def trained_like(shapes: Shapes, rank: int, dtype: torch.dtype, seed: int = 0) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, B [m, r], A [r, n]): A as it is initialised, B with decaying columns, as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for name, m, n, count in shapes:
        for i in range(count):
            decay = torch.logspace(0, -2, rank) * torch.rand(1, generator=generator)
            B = torch.randn(m, rank, generator=generator) * decay
            A = torch.randn(rank, n, generator=generator) / n**0.5
            yield name.format(i), B.to(dtype), A.to(dtype)
