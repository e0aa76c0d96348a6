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
    ("pooler.dense", 384, 384, 1),
)
ROBERTA_BASE = (
    ("roberta.encoder.layer.{}.attention.self.query", 768, 768, 12),
    ("roberta.encoder.layer.{}.attention.self.key", 768, 768, 12),
    ("roberta.encoder.layer.{}.attention.self.value", 768, 768, 12),
    ("roberta.encoder.layer.{}.attention.output.dense", 768, 768, 12),
    ("roberta.encoder.layer.{}.intermediate.dense", 3072, 768, 12),
    ("roberta.encoder.layer.{}.output.dense", 768, 3072, 12),
)
# All linear layers and convolutions (n: channels times kernel), named by shape.
SDXL_UNET = (
    ("conv.320x36.{}", 320, 36, 1),
    ("conv.320x2880.{}", 320, 2880, 8),
    ("linear.320x1280.{}", 320, 1280, 5),
    ("linear.640x640.{}", 640, 640, 70),
    ("linear.640x2048.{}", 640, 2048, 20),
    ("linear.5120x640.{}", 5120, 640, 10),
    ("linear.640x2560.{}", 640, 2560, 10),
    ("conv.640x2880.{}", 640, 2880, 1),
    ("linear.640x1280.{}", 640, 1280, 5),
    ("conv.640x5760.{}", 640, 5760, 8),
    ("conv.640x320.{}", 640, 320, 1),
    ("linear.1280x1280.{}", 1280, 1280, 379),
    ("linear.1280x2048.{}", 1280, 2048, 120),
    ("linear.10240x1280.{}", 10240, 1280, 60),
    ("linear.1280x5120.{}", 1280, 5120, 60),
    ("conv.1280x5760.{}", 1280, 5760, 1),
    ("conv.1280x11520.{}", 1280, 11520, 11),
    ("conv.1280x640.{}", 1280, 640, 1),
    ("conv.1280x23040.{}", 1280, 23040, 2),
    ("conv.1280x2560.{}", 1280, 2560, 2),
    ("conv.1280x17280.{}", 1280, 17280, 1),
    ("conv.1280x1920.{}", 1280, 1920, 1),
    ("conv.640x17280.{}", 640, 17280, 1),
    ("conv.640x1920.{}", 640, 1920, 1),
    ("conv.640x11520.{}", 640, 11520, 1),
    ("conv.640x1280.{}", 640, 1280, 1),
    ("conv.640x8640.{}", 640, 8640, 1),
    ("conv.640x960.{}", 640, 960, 1),
    ("conv.320x8640.{}", 320, 8640, 1),
    ("conv.320x960.{}", 320, 960, 1),
    ("conv.320x5760.{}", 320, 5760, 2),
    ("conv.320x640.{}", 320, 640, 2),
    ("conv.4x2880.{}", 4, 2880, 1),
)


def layers(shapes: Shapes, count: int) -> Shapes:
    """The first ``count`` layers of a model, where all of them would take too long."""
    return tuple((name, m, n, min(count, given)) for name, m, n, given in shapes)


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
