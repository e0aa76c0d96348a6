"""Adapters of one small language model and one small diffusion model in every format, as sources for targets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from adapters import write_adapter
from safetensors.torch import save_file
from single_files import KOHYA, PEFT, File, number
from torch import Tensor

from para_ext.formats import read_adapter

LEAVES = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "mlp.up_proj": (24, 16),
}
LAYERS, RANK = 3, 6


def language(
    *, dtype: torch.dtype = torch.float32, rank: int = RANK, seed: int = 0
) -> list[tuple[str, Tensor, Tensor]]:
    """(name, B, A) of a small language model."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for i in range(LAYERS):
        for leaf, (m, n) in LEAVES.items():
            decay = torch.logspace(0, -2, rank) * 4.0 ** -torch.rand(1, generator=generator)
            B, A = torch.randn(m, rank, generator=generator) * decay, torch.randn(rank, n, generator=generator)
            pairs.append((f"model.layers.{i}.{leaf}", B.to(dtype), A.to(dtype)))
    return pairs


def peft_folder(folder: Path, **config: Any) -> Path:
    leaves = [leaf.rpartition(".")[2] for leaf in LEAVES]
    return write_adapter(folder, language(), **{"lora_alpha": 10, "target_modules": leaves} | config)


def peft_rslora(folder: Path) -> Path:
    pairs = [(n, B[:, :2], A[:2]) if "k_proj" in n else (n, B.bfloat16(), A.bfloat16()) for n, B, A in language()]
    return write_adapter(folder, pairs, r=RANK, lora_alpha=5, use_rslora=True, rank_pattern={"k_proj": 2},
                         alpha_pattern={"model.layers.0.self_attn.k_proj": 3}, layers_to_transform=[0, 1, 2],
                         target_modules=r"model\.layers\.\d+\..*(q|k|v|up)_proj")  # fmt: skip


def mlx_folder(folder: Path) -> Path:
    folder.mkdir()
    tensors = {}
    for name, B, A in language():
        tensors |= {f"{name}.lora_a": A.T.contiguous(), f"{name}.lora_b": B.T.contiguous()}
    save_file(tensors, folder / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "num_layers": LAYERS, "lora_parameters": {"rank": RANK, "scale": 20.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def single(path: Path, prefix: str, ends: tuple[str, str]) -> Path:
    file = File()
    for name, B, A in language():
        file.tensors |= {prefix + name + ends[0]: A, prefix + name + ends[1]: B}
    return file.save(path.with_suffix(".safetensors"))


def peft_keys(path: Path) -> Path:
    return single(path, "base_model.model.", PEFT)


def loralib(path: Path) -> Path:
    return single(path, "", (".lora_A", ".lora_B"))


UNET = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (8, 8),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (16, 16),
    "down_blocks.1.attentions.0.proj_in": (16, 16, 1, 1),
    "mid_block.resnets.0.conv1": (16, 16, 3, 3),
}


def kohya_unet(path: Path) -> Path:
    file = File()
    for i, (name, shape) in enumerate(UNET.items()):
        file.add(f"unet.{name}", f"lora_unet_{name.replace('.', '_')}", KOHYA, shape, alpha=number(1 + i))
    return file.save(path.with_suffix(".safetensors"))


def diffusers_unet(path: Path) -> Path:
    settings = {"unet.r": 4, "unet.lora_alpha": 6, "unet.use_rslora": True}
    file = File({"lora_adapter_metadata": json.dumps(settings)})
    for name, shape in UNET.items():
        file.add(f"unet.{name}", f"unet.{name}", PEFT, shape)
    return file.save(path.with_suffix(".safetensors"))


def peft_unet(folder: Path) -> Path:
    file = File()
    for name, shape in UNET.items():
        file.add(name, name, PEFT, shape)
    pairs = [(name, file.tensors[name + PEFT[1]], file.tensors[name + PEFT[0]]) for name in UNET]
    return write_adapter(folder, pairs, lora_alpha=3, target_modules=["to_q", "proj_in", "conv1"])


def kohya_pipeline(path: Path) -> Path:
    """SDXL's names: CompVis' blocks and two text encoders."""
    file = File()
    for i, (model, name) in enumerate(
        [("unet", "input_blocks_4_1_transformer_blocks_0_attn1_to_q"), ("unet", "middle_block_1_proj_in")]
        + [
            (f"te{n}", f"text_model_encoder_layers_{n}_self_attn_{leaf}")
            for n in (1, 2)
            for leaf in ("q_proj", "out_proj")
        ]
    ):
        file.add(name, f"lora_{model}_{name}", KOHYA, (12, 12), alpha=number(1 + i))
    return file.save(path.with_suffix(".safetensors"))


def comfyui_flux(path: Path) -> Path:
    file = File()
    for i in range(2):
        file.add(f"{i}", f"diffusion_model.double_blocks.{i}.img_attn.proj", KOHYA, alpha=number(2 + i))
        file.add(f"f{i}", f"diffusion_model.double_blocks.{i}.txt_attn.qkv", KOHYA, (36, 12), alpha=number(3))
    return file.save(path.with_suffix(".safetensors"))


Source = Callable[[Path], Path]
LANGUAGE: tuple[Source, ...] = (peft_folder, peft_rslora, mlx_folder)
WITHOUT_SCALE: tuple[Source, ...] = (peft_keys, loralib)
DIFFUSION: tuple[Source, ...] = (kohya_unet, diffusers_unet, peft_unet)


def dense(path: Path) -> dict[str, Tensor]:
    """ΔW in fp64 by module as para_ext reads it."""
    read = {}
    for f in read_adapter(path).factors:
        B, A = (torch.from_numpy(x.astype("f8")) for x in (f.B, f.A))
        read[f.name] = f.scale * B @ A
    return read


def norm(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.stack([t.norm() for t in tensors.values()]).norm())
