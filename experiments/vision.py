"""A vision transformer, small enough to be pretrained here: on some classes, so that a LoRA can learn the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH, WIDTH, HEADS, LAYERS = 4, 128, 4, 4
PATCHES = (28 // PATCH) ** 2


class Block(nn.Module):
    """Attention and MLP, normalised first; ``nn.TransformerEncoderLayer`` would skip LoRA layers in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[images, patches, width] to the same."""
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Images of 28×28 in patches of 4×4, four blocks, the mean over the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.places = nn.Parameter(0.02 * torch.randn(PATCHES, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        """[images, 1, 28, 28] → [images, width]."""
        x = self.patches(pixels).flatten(2).transpose(1, 2) + self.places
        return self.norm(self.blocks(x)).mean(1)


def pretrained(path: Path, train: Callable[[nn.Module], None], classes: int) -> dict[str, Any]:
    """Weights of a Transformer that ``train`` trained with a head for so many classes; kept at ``path``."""
    if not path.exists():
        print("vision transformer: pretrain", flush=True)
        torch.manual_seed(0)
        body = Transformer()
        train(nn.Sequential(body, nn.Linear(WIDTH, classes)))
        torch.save(body.state_dict(), path)
    weights: dict[str, Any] = torch.load(path, weights_only=True)
    return weights
