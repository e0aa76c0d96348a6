"""The same job in plain torch, one global threshold: the references that para-ext is timed against.

    python plain_torch.py ADAPTER OUT KEEP

`compress_pairs` is what a careful person writes in half an hour: a loop of QR, QR, SVD and matmul per module.
`compress_pairs_gram` is para-ext's own algorithm in torch operations, everything r × r in batches: what remains
between it and para-ext is the native core's doing.
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
    ranks = _global_ranks(pairs, [S for _, _, S, _, _ in decomposed], keep)
    new = []
    for (B, A, _), (Q_B, U, S, Vh, Q_A), k in zip(pairs, decomposed, ranks, strict=True):
        root = S[:k].sqrt()
        new.append(((Q_B @ (U[:, :k] * root)).to(B.dtype), ((root[:, None] * Vh[:k]) @ Q_A.mT).to(A.dtype)))
    return new


def compress_pairs_gram(pairs: Sequence[Pair], keep: float) -> list[tuple[Tensor, Tensor]]:
    """The same; all pairs of one rank r. Gram matrices and all that is r × r in fp64."""
    R_B = _cholesky(torch.stack([B.double().mT @ B.double() for B, _, _ in pairs]))
    R_A = _cholesky(torch.stack([A.double() @ A.double().mT for _, A, _ in pairs]))
    scales = torch.tensor([scale for _, _, scale in pairs], dtype=torch.float64, device=R_B.device)
    M = scales[:, None, None] * (R_B @ R_A.mT)
    squares, V = torch.linalg.eigh(M.mT @ M)
    S, V = squares.clamp_min(0).sqrt().flip(-1), V.flip(-1)
    new = []
    for i, ((B, A, scale), k) in enumerate(zip(pairs, _global_ranks(pairs, list(S), keep), strict=True)):
        root = S[i, :k].sqrt()
        T_B = scale * R_A[i].mT @ V[i, :, :k] / root
        T_A = (scale * R_B[i].mT @ (M[i] @ V[i, :, :k]) / (S[i, :k] * root)).mT
        new.append(((B.float() @ T_B.float()).to(B.dtype), (T_A.float() @ A.float()).to(A.dtype)))
    return new


def _cholesky(G: Tensor) -> Tensor:
    """R with RᵀR = G + a trace of the identity: without one, a factor with r > m has no Cholesky factorization."""
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    return torch.linalg.cholesky(G + 1e-14 * torch.diag_embed(trace.expand(G.shape[:-1])), upper=True)


def _global_ranks(pairs: Sequence[Pair], spectra: Sequence[Tensor], keep: float) -> list[int]:
    """How many components of each pair are taken, by σ²/(m+n), within keep · parameters."""
    costs = torch.cat([torch.full_like(S, len(B) + A.shape[1]) for (B, A, _), S in zip(pairs, spectra, strict=True)])
    scores = torch.cat(list(spectra)).square() / costs
    order = scores.argsort(descending=True)
    budget = keep * sum(B.numel() + A.numel() for B, A, _ in pairs)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[order[costs[order].double().cumsum(0) <= budget]] = True
    return [int(mine.sum()) for mine in chosen.split([len(S) for S in spectra])]


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
