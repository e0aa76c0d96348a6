"""The same job in plain torch: a loop of QR, QR, SVD and matmul per module, one global threshold.

    python plain_torch.py ADAPTER OUT KEEP

What a careful person writes in half an hour; the reference that para-ext is timed against.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Pair = tuple[Tensor, Tensor, float]  # B [m, r], A [r, n], scale


def compress_pairs(pairs: Sequence[Pair], keep: float) -> list[tuple[Tensor, Tensor]]:
    """B' [m, k], A' [k, n] of every pair; k by σ²/(m+n) over all pairs, within keep · parameters."""
    decomposed = []
    for B, A, scale in pairs:
        Q_B, R_B = torch.linalg.qr(B.float())
        Q_A, R_A = torch.linalg.qr(A.float().mT)
        U, S, Vh = torch.linalg.svd(scale * R_B @ R_A.mT)
        decomposed.append((Q_B, U, S, Vh, Q_A))
    spectra = [S for _, _, S, _, _ in decomposed]
    costs = torch.cat([torch.full_like(S, len(B) + A.shape[1]) for (B, A, _), S in zip(pairs, spectra, strict=True)])
    scores = torch.cat(spectra).square() / costs
    order = scores.argsort(descending=True)
    budget = keep * sum(B.numel() + A.numel() for B, A, _ in pairs)
    taken = order[costs[order].double().cumsum(0) <= budget]
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[taken] = True
    new = []
    chosen_by_module = chosen.split([len(S) for S in spectra])
    for (B, A, _), (Q_B, U, S, Vh, Q_A), mine in zip(pairs, decomposed, chosen_by_module, strict=True):
        k = int(mine.sum())
        root = S[:k].sqrt()
        new.append(((Q_B @ (U[:, :k] * root)).to(B.dtype), ((root[:, None] * Vh[:k]) @ Q_A.mT).to(A.dtype)))
    return new


def main(adapter: Path, out: Path, keep: float) -> None:
    """Compress a folder of Linear layers."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    scale = config["lora_alpha"] / config["r"]
    new = compress_pairs([(tensors[f"{n}.lora_B.weight"], tensors[f"{n}.lora_A.weight"], scale) for n in names], keep)
    kept = {name: pair for name, pair in zip(names, new, strict=True) if len(pair[1])}
    ranks = {name.removeprefix("base_model.model."): len(A) for name, (_, A) in kept.items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{n}.lora_{side}.weight": t.contiguous() for n, (B, A) in kept.items() for side, t in (("A", A), ("B", B))},
        out / "adapter_model.safetensors",
    )
    config |= {"rank_pattern": ranks, "alpha_pattern": ranks}
    (out / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
