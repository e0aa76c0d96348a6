"""Single files of LoRA pairs in every style that is read, each with the ΔW that it stands for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK = 4


@dataclass
class Module:
    """Keys of a module's tensors in the file, and its ΔW [m, n] with m and n of all axes."""

    A: str
    B: str
    alpha: str
    delta: Tensor
    transposed: bool = False


@dataclass
class File:
    """What a test puts into a file, by module as para_ext is to call it."""

    metadata: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, Module] = field(default_factory=dict)
    foreign: set[str] = field(default_factory=set)
    rounding: float = 1e-12

    def add(
        self,
        name: str,
        stem: str,
        ends: tuple[str, str],
        shape: tuple[int, ...] = (12, 10),
        *,
        scale: float = 1.0,
        alpha: Tensor | None = None,
        groups: int = 1,
        rank: int = RANK,
        dtype: torch.dtype = torch.float32,
    ) -> File:
        """A pair with random values and ΔW of this ``scale``; A's keys end with ``ends[0]``, B's with ``ends[1]``."""
        generator = torch.Generator().manual_seed(len(self.tensors))
        m, n, *kernel = shape
        decay = torch.logspace(0, -2, rank // groups)[(..., *[None] * len(kernel))]
        A = torch.randn(rank, n, *kernel, generator=generator).to(dtype)
        B = (torch.randn(m, rank // groups, *[1] * len(kernel), generator=generator) * decay).to(dtype)
        self.tensors |= {stem + ends[0]: A, stem + ends[1]: B}
        if alpha is not None:
            self.tensors[stem + ".alpha"] = alpha
        self.modules[name] = Module(stem + ends[0], stem + ends[1], stem + ".alpha", scale * product(B, A))
        return self

    def also(self, key: str, tensor: Tensor) -> File:
        """A tensor that is no part of a pair."""
        self.tensors[key] = tensor
        self.foreign.add(key)
        return self

    def save(self, path: Path) -> Path:
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(self.tensors, path, {"format": "pt", **self.metadata})
        else:
            torch.save(self.tensors, path)
        return path


def product(B: Tensor, A: Tensor) -> Tensor:
    """[m, n] in fp64 of B [m, r/g, 1…] and A [r, n, …], where B has fewer columns than A rows: block by block."""
    A, B = A.double().flatten(1), B.double().flatten(1)
    groups = len(A) // B.shape[1]
    return (B.reshape(groups, -1, B.shape[1]) @ A.reshape(groups, B.shape[1], -1)).flatten(0, 1)


def delta_in(tensors: Mapping[str, Tensor], module: Module) -> Tensor:
    """ΔW as every reader of the written file forms it: times alpha / rank where there is an alpha."""
    A, B = tensors[module.A], tensors[module.B]
    alpha = tensors.get(module.alpha)
    return product(B, A) * (1.0 if alpha is None else float(alpha) / len(A))


KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
UNET = "down_blocks.0.attentions.0.transformer_blocks.0."
FLAT = "lora_unet_" + UNET.replace(".", "_")


def number(value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, value, dtype=dtype)


def kohya() -> File:
    file = File({"ss_network_dim": "4", "ss_network_alpha": "3.0", "ss_network_module": "networks.lora",
                 "ss_network_args": json.dumps({"conv_dim": "4", "conv_alpha": "1", "dropout": "0.1"}),
                 "sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8, "ss_tag": "ä"})  # fmt: skip
    file.add(f"unet.{UNET}attn1.to_q", f"{FLAT}attn1_to_q", KOHYA, alpha=number(3), scale=3 / RANK)
    file.add(f"unet.{UNET}attn1.to_v", f"{FLAT}attn1_to_v", KOHYA, alpha=number(2, 1), scale=2 / RANK)
    file.add(f"unet.{UNET}attn2.to_v", f"{FLAT}attn2_to_v", KOHYA, alpha=number(-2.5), scale=-2.5 / RANK)
    file.add("unet.down_blocks.0.attentions.0.proj_in", "lora_unet_down_blocks_0_attentions_0_proj_in", KOHYA,
             (12, 10, 1, 1), alpha=number(8, dtype=torch.float16), scale=2)  # fmt: skip
    file.add("unet.down_blocks.0.resnets.0.conv1", "lora_unet_down_blocks_0_resnets_0_conv1", KOHYA, (12, 10, 3, 3),
             alpha=number(1), scale=1 / 6, rank=6)  # fmt: skip
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    file.add(f"text_encoder.{name}", f"lora_te_{name.replace('.', '_')}", KOHYA)  # no alpha: kohya takes the rank
    return file


def kohya_bf16() -> File:
    file = File({"ss_network_dim": "4", "ss_network_alpha": "5"})
    for i in range(3):
        file.add(f"transformer.double_blocks.{i}.img_attn.qkv", f"lora_unet_double_blocks_{i}_img_attn_qkv", KOHYA,
                 alpha=number(5, dtype=torch.bfloat16), scale=5 / RANK, dtype=torch.bfloat16)  # fmt: skip
    return file


def tucker() -> File:
    file = File(rounding=1e-6)  # of A, the product of two tensors, in fp32
    file.add("unet.mid_block.resnets.0.conv1", "lora_unet_mid_block_resnets_0_conv1", KOHYA, (12, 10, 1, 1),
             alpha=number(2))  # fmt: skip
    module = file.modules["unet.mid_block.resnets.0.conv1"]
    mid = torch.randn(RANK, RANK, 3, 3)
    file.tensors["lora_unet_mid_block_resnets_0_conv1.lora_mid.weight"] = mid
    down, up = file.tensors[module.A].double(), file.tensors[module.B].double()
    # As two convolutions after another: ΔW[o, i, k, l] = Σ up[o, r] mid[r, q, k, l] down[q, i].
    dense = torch.einsum("or,rqkl,qi->oikl", up[:, :, 0, 0], mid.double(), down[:, :, 0, 0])
    module.delta = 2 / RANK * dense.flatten(1)
    return file


def onetrainer() -> File:
    file = File()
    stem = "lora_transformer_single_transformer_blocks_1_attn_to_k"
    file.add("transformer.single_transformer_blocks.1.attn.to_k", stem, KOHYA, alpha=number(1), scale=1 / RANK)
    file.also(f"{stem}.dora_scale", torch.rand(1, 10))
    stem = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    file.add("text_encoder.text_model.encoder.layers.0.mlp.fc1", stem, KOHYA, alpha=number(1), scale=1 / RANK)
    return file.also(f"{stem}.dora_scale", torch.rand(12, 1)).also("bundle_emb.x.string_to_param", torch.rand(2, 5))


def diffusers_old() -> File:
    file = File()
    processor = UNET + "attn1.processor.to_"
    file.add(f"unet.{UNET}attn1.to_q", f"{processor}q", ("_lora.down.weight", "_lora.up.weight"))
    return file.add(f"unet.{UNET}attn1.to_out.0", f"{processor}out", ("_lora.down.weight", "_lora.up.weight"))


def diffusers() -> File:
    file = File()
    stem = f"unet.{UNET}attn1.to_k"
    file.add(stem, stem, (".lora.down.weight", ".lora.up.weight"), alpha=number(6), scale=6 / RANK)
    stem = "text_encoder.text_model.encoder.layers.1.mlp.fc2"
    return file.add(stem, stem, (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"))


def diffusers_alike() -> File:
    flat = {"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.target_modules": ["to_q"]}
    file = File({"lora_adapter_metadata": json.dumps(flat)})
    for i in range(9):
        name = f"transformer.transformer_blocks.{i}.attn.to_q"
        file.add(name, name, PEFT)
    return file


def diffusers_one_model() -> File:
    """As a model saves it without its pipeline: no component before keys and settings."""
    settings = {"r": 4, "lora_alpha": 2, "target_modules": ["to_q"], "alpha_pattern": {"attn2.to_q": 3}}
    file = File({"lora_adapter_metadata": json.dumps(settings)})
    file.add(f"unet.{UNET}attn1.to_q", f"{UNET}attn1.to_q", PEFT, scale=2 / 4)
    file.add(f"unet.{UNET}attn2.to_q", f"{UNET}attn2.to_q", PEFT, scale=3 / 4)
    return file.add("blocks.0.attn1.to_q", "blocks.0.attn1.to_q", PEFT, scale=2 / 4)


def diffusers_metadata() -> File:
    rules = {"r": 4, "lora_alpha": 6, "use_rslora": False, "target_modules": ["to_q", "to_k"], "bias": "none",
             "rank_pattern": {"attn2.to_k": 2}, "alpha_pattern": {"attn2.to_k": 5}, "lora_dropout": 0.0}  # fmt: skip
    encoder = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj"]}
    flat = {f"unet.{k}": v for k, v in rules.items()} | {f"text_encoder_2.{k}": v for k, v in encoder.items()}
    file = File({"lora_adapter_metadata": json.dumps(flat), "note": "kept"})
    file.add(f"unet.{UNET}attn1.to_q", f"unet.{UNET}attn1.to_q", PEFT, scale=6 / 4)
    file.add(f"unet.{UNET}attn2.to_k", f"unet.{UNET}attn2.to_k", PEFT, scale=5 / 2, rank=2)
    name = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
    return file.add(name, name, PEFT, scale=8 / 4**0.5)


def comfyui() -> File:
    file = File()
    for i, name in enumerate(("img_attn.proj", "img_mlp.0")):
        file.add(f"transformer.double_blocks.{i}.{name}", f"diffusion_model.double_blocks.{i}.{name}", KOHYA,
                 alpha=number(16), scale=4)  # fmt: skip
    return file


def ai_toolkit() -> File:
    file = File({"software": '{"name": "ai-toolkit"}', "version": "1.0"})
    for i, name in enumerate(("img_attn.proj", "txt_mlp.2")):
        file.add(f"transformer.double_blocks.{i}.{name}", f"diffusion_model.double_blocks.{i}.{name}", PEFT)
    return file


def qwen() -> File:
    name = "transformer_blocks.0.attn.to_k"
    return File().add(f"transformer.{name}", name, KOHYA, alpha=number(16), scale=4)


def peft_keys() -> File:
    file = File()
    file.add("model.layers.0.mlp.up_proj", "base_model.model.model.layers.0.mlp.up_proj", PEFT)
    file.add("grouped", "base_model.model.grouped", PEFT, (6, 2, 3, 3), groups=2)
    return file.add(
        "model.embed_tokens", "base_model.model.model.embed_tokens", (".lora_embedding_A", ".lora_embedding_B")
    )


def peft_default() -> File:
    stem = "base_model.model.model.layers.0.mlp.up_proj"
    return File().add(stem[17:], stem, (".lora_A.default.weight", ".lora_B.default.weight"), dtype=torch.float16)


def cloneofsimo() -> File:
    file = File({"unet": '["CrossAttention", "Attention", "GEGLU"]', "<word>": "<embed>"})
    for i in range(11):
        file.add(f"unet.{i}", f"unet:{i}", (":down", ":up"), rank=2 + i % 3)
        file.metadata[f"unet:{i}:rank"] = str(2 + i % 3)
    file.add("text_encoder.0", "text_encoder:0", (":down", ":up"))
    file.metadata["text_encoder:0:rank"] = "4"
    return file.also("<word>", torch.rand(768))


def loralib() -> File:
    file = File()
    file.add("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn", (".lora_A", ".lora_B"), (12, 10), groups=2)
    return file.add("transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_fc", (".lora_A", ".lora_B"))


STYLES: tuple[Callable[[], File], ...] = (
    kohya, kohya_bf16, tucker, onetrainer, comfyui, ai_toolkit, qwen,
    diffusers_old, diffusers, diffusers_alike, diffusers_one_model, diffusers_metadata,
    peft_keys, peft_default, cloneofsimo, loralib,
)  # fmt: skip
