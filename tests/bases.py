"""Tiny base models with random weights, random adapters for them, and the merged reference: base + s·B·A, dense.

Whatever runtime loads an adapter must compute what the merged model computes. The reference reads the adapter as it was
before compression and truncates dense products by itself; it never sees a compressed file, nor para_ext.

    base = BASES["llama"]
    model = base.build()
    random_adapter(base, folder, use_rslora=True)
    report = para_ext.compress_adapter(folder, small, keep=0.4)
    expected = logits(merged(model, folder, report.ranks), base.inputs())
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# What is common to language models; heads are 32 wide, the least that vLLM takes.
VOCABULARY, CONTEXT, HEAD = 256, 64, 32
RANK = 16

Inputs = dict[str, Tensor]

# For ``pytestmark``: what PEFT and transformers warn about here, without reason.
QUIET = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`is_gradient_checkpointing` is deprecated",  # PEFT asks transformers for it
        "Setting `save_embedding_layers`",
        "The following (rank|alpha)_pattern keys did not match",  # PEFT looks for parameters among the modules
    )
]

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Base:
    """A model and what to adapt in it.

    Attributes:
        make: the model; the weights are drawn by whoever calls it.
        inputs: what its forward takes, by name.
        lora: which modules, as peft.LoraConfig takes it.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    lora: dict[str, Any] = field(default_factory=lambda: {"target_modules": "all-linear"})

    def build(self) -> Any:
        """The model in fp32, the same at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make().float().eval()


def token_ids(length: int = 12, seed: int = 0) -> list[int]:
    """One prompt; the first tokens of a vocabulary often have a meaning of their own."""
    return torch.randint(8, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def tokens() -> Inputs:
    return {"input_ids": torch.tensor([token_ids(seed=0), token_ids(seed=1)])}


def _pixels() -> Inputs:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def _latents() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=generator),
    }


def causal(kind: str, config_kind: str | None = None, **config: Any) -> nn.Module:
    """A small language model with grouped heads, by the names of transformers' classes: ``{kind}ForCausalLM``."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 4 * HEAD,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 192,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.06,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    settings = getattr(transformers, f"{config_kind or kind}Config")(**{"num_hidden_layers": 3} | common | config)
    return without_symmetry(getattr(transformers, f"{kind}ForCausalLM")(settings))


def without_symmetry(model: nn.Module) -> nn.Module:
    """Random norms and biases: with ones and zeros there, a runtime that forgets them would be right."""
    for name, p in model.named_parameters():
        if p.ndim == 1:
            nn.init.normal_(p, float(name.endswith("weight")), 0.1)
    return model


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=64, n_layer=3, n_head=2, initializer_range=0.08,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return without_symmetry(transformers.GPT2LMHeadModel(config))


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96,
        max_position_embeddings=CONTEXT, initializer_range=0.08, num_labels=5,
    )  # fmt: skip
    return without_symmetry(transformers.BertForSequenceClassification(config))


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96, image_size=16, patch_size=4,
        initializer_range=0.08, num_labels=5,
    )  # fmt: skip
    return without_symmetry(transformers.ViTForImageClassification(config))


def _mixtral() -> nn.Module:
    return causal("Mixtral", num_hidden_layers=2, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)


def _unet() -> nn.Module:
    import diffusers

    return without_symmetry(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
        )
    )


def _text_encoder() -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=CONTEXT, projection_dim=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return without_symmetry(transformers.CLIPTextModel(config))


BASES = {
    # layers.1 and layers.10: a careless pattern takes one for the other.
    "llama": Base(lambda: causal("Llama", num_hidden_layers=11), tokens),
    "qwen2": Base(lambda: causal("Qwen2"), tokens),
    "gpt2": Base(_gpt2, tokens, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "bert": Base(_bert, tokens, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "vit": Base(_vit, _pixels, {"target_modules": ["projection", "q_proj", "v_proj", "fc1", "fc2"]}),
    "mixtral": Base(
        _mixtral,
        tokens,
        {
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "unet": Base(
        _unet,
        _latents,
        {"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut"]},
    ),
    "text_encoder": Base(
        _text_encoder, tokens, {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}
    ),
}


@torch.no_grad()
def logits(model: Callable[..., Any], inputs: Inputs) -> Tensor:
    """The model's output in fp64, computed in the model's own precision."""
    out = model(**inputs)
    for name in ("logits", "sample", "last_hidden_state"):
        if hasattr(out, name):
            return getattr(out, name).double()
    raise TypeError(f"{type(out).__name__} has no logits")


def relative_error(value: Tensor, expected: Tensor) -> float:
    """‖value − expected‖ / ‖expected‖"""
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def random_adapter(base: Base, folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """An adapter with decaying factors as PEFT saves it; some modules matter three hundred times as much as others.

    Args:
        base: what to adapt.
        folder: the folder to make.
        seed: of the factors.
        config: for peft.LoraConfig; alpha/r is 1.5 unless given otherwise.
    """
    settings = {"r": RANK, "lora_alpha": 1.5 * RANK} | base.lora | config
    model = peft.get_peft_model(base.build(), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, A in parameters.items():
            if not re.search(r"\.lora_(embedding_)?A\b", name):
                continue
            B = parameters[re.sub(r"(lora_(?:embedding_)?)A", r"\1B", name)]
            A.normal_(0, (A[0].numel()) ** -0.5, generator=generator)
            gain = 10 ** (-2.5 * torch.rand((), generator=generator))
            # Experts' columns are ordered by component first.
            decay = torch.logspace(0, -2, B.shape[1])
            shape = (-1, *[1] * (B.ndim - 2))
            B.normal_(0, B.shape[0] ** -0.5, generator=generator).mul_(gain * decay.reshape(shape))
    model.save_pretrained(folder)
    return folder


def deltas(model: nn.Module, folder: Path, ranks: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """What an adapter folder adds to each parameter of its base model, in fp64, by PEFT's definition of the scale.

    Args:
        model: the base.
        folder: as PEFT saved it.
        ranks: by module (of an expert, ``<experts>.<i>.<parameter>``); dense products are truncated to them, and a
            missing module has rank 0. None leaves all as they are.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    parameters = dict(model.named_parameters())
    adapted = tuple(config.get("target_parameters") or ())
    found = {}
    for key in tensors:
        if not re.search(r"\.lora_(embedding_)?A\b", key):
            continue
        A, B = tensors[key].double(), tensors[re.sub(r"(lora_(?:embedding_)?)A", r"\1B", key)].double()
        module = key.removeprefix(_PREFIX).partition(".lora_")[0]
        path = module.removesuffix(".base_layer")
        if f"{path}.weight" in parameters:
            name, count = path, 1
            weight = parameters[f"{path}.weight"]
        else:
            # Of two parameters of one module, PEFT puts the one registered first in the inner wrapper.
            names = [name for name in parameters if name.startswith(f"{path}.") and name.endswith(adapted)]
            name = names[0 if path != module else -1]
            weight = parameters[name]
            count = len(weight)
        rank = len(A) // count
        alpha = next(
            (a for suffix, a in config["alpha_pattern"].items() if name.endswith(suffix)), config["lora_alpha"]
        )
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        if count == 1:
            delta = _truncated(scale * B.flatten(1) @ A.flatten(1), name, ranks)
            transposed = isinstance(model.get_submodule(path), nn.Embedding | Conv1D)
            found[f"{name}.weight"] = delta.T if transposed else delta.reshape(weight.shape)
            continue
        leaf = name.rpartition(".")[2]
        each = zip(B.reshape(len(B), rank, count).unbind(2), A.chunk(count), strict=True)
        products = [_truncated(scale * b @ a, f"{path}.{i}.{leaf}", ranks) for i, (b, a) in enumerate(each)]
        found[name] = torch.stack(products)
    return found


def _truncated(delta: Tensor, name: str, ranks: Mapping[str, int] | None) -> Tensor:
    """The best approximation of ``delta`` [m, n] of the rank that ``name`` has."""
    if ranks is None:
        return delta
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    k = ranks.get(name, 0)
    return U[:, :k] * S[:k] @ Vh[:k]


def merged(model: nn.Module, folder: Path, ranks: Mapping[str, int] | None = None) -> nn.Module:
    """A copy of the base with the adapter, truncated to ``ranks``, added to its weights (see :func:`deltas`)."""
    new = copy.deepcopy(model)
    with torch.no_grad():
        for name, delta in deltas(model, folder, ranks).items():
            weight = new.get_parameter(name)
            weight.copy_(weight.double() + delta)
    return new


def save(model: Any, folder: Path) -> Path:
    """The base as a folder for other runtimes; it has no tokenizer."""
    model.save_pretrained(folder)
    return folder
