"""llama.cpp for tests, through xllamacpp: models and adapters as GGUF files, and logits after some prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
import xllamacpp
from bases import BASES, CONTEXT, HEAD, Base, causal, logits, token_ids, tokens
from safetensors.torch import load_file
from torch import Tensor, nn

# What llama.cpp calls a model_type of transformers.
ARCHITECTURES = {
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "starcoder2": gguf.MODEL_ARCH.STARCODER2,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
}
# These turn neighbours (2i, 2i + 1) of q and k by rotary embedding where transformers turns (i, i + d/2).
IN_PAIRS = ("llama", "mistral", "mixtral", "granite", "smollm3")


_GEMMA = {"head_dim": HEAD, "query_pre_attn_scalar": HEAD, "sliding_window": CONTEXT, "tie_word_embeddings": True}
_LLAMA = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
_WHOLE = {"target_modules": [*_LLAMA["target_modules"], "embed_tokens", "lm_head"]}
_SCALES = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}
MODELS = {
    "llama": Base(BASES["llama"].make, tokens, _WHOLE),
    "mistral": Base(lambda: causal("Mistral", sliding_window=None), tokens, _LLAMA),
    "mixtral": BASES["mixtral"],
    "qwen2": Base(BASES["qwen2"].make, tokens, _WHOLE),
    "qwen3": Base(lambda: causal("Qwen3", head_dim=HEAD), tokens, _LLAMA),
    "gemma2": Base(lambda: causal("Gemma2", **_GEMMA), tokens, _LLAMA),
    "gemma3_text": Base(lambda: causal("Gemma3", "Gemma3Text", **_GEMMA), tokens, _LLAMA),
    "phi3": Base(
        lambda: causal("Phi3"), tokens, {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
    ),
    "granite": Base(lambda: causal("Granite", **_SCALES), tokens, _LLAMA),
    "olmo2": Base(lambda: causal("Olmo2"), tokens, _LLAMA),
    "smollm3": Base(lambda: causal("SmolLM3"), tokens, _LLAMA),
    "starcoder2": Base(
        lambda: causal("Starcoder2"), tokens, {"target_modules": ["q_proj", "k_proj", "v_proj", "c_fc", "c_proj"]}
    ),
    "gpt2": BASES["gpt2"],
}
# A GELU's fp16 rounding can fall the other way than ours.
TOLERANCE = dict.fromkeys(("gpt2", "starcoder2", "gemma2", "gemma3_text"), 5e-4)
PROMPTS = [token_ids(5, seed=0), token_ids(12, seed=1), token_ids(40, seed=2)]


class TabulatedGelu(nn.Module):
    """As ggml computes it: input and output rounded to fp16 by way of a table."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


@torch.no_grad()
def expected(model: nn.Module) -> Tensor:
    """[prompts, vocabulary]: the logits after each prompt, less their mean, as llama.cpp computes them."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ in ("NewGELUActivation", "GELUTanh"):
                setattr(module, name, TabulatedGelu())
    rows = [logits(model, {"input_ids": torch.tensor([prompt])})[0, -1] for prompt in PROMPTS]
    return _centred(torch.stack(rows))


def _centred(rows: Tensor) -> Tensor:
    """Logits and log-probabilities differ by a constant per row."""
    return rows - rows.mean(-1, keepdim=True)


def write_base(model: Any, path: Path) -> Path:
    """A causal model of transformers as a GGUF file in fp32, with a vocabulary of made-up words."""
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _add_settings(writer, config)
    _add_vocabulary(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for part, weight in _parts(key, stored(config, key, tensor)):
            name = names.get_name(part, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(name, weight.contiguous().numpy())
    return _finish(writer, path)


def _add_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    kind = config.model_type
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if kind == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if kind == "starcoder2":
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if kind == "mixtral":
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if kind in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if kind == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def stored(config: Any, key: str, tensor: Tensor) -> Tensor:
    """A weight [out, …] as GGUF has it: Conv1D's transposed, some q and k in pairs, gemma's norms with their 1."""
    kind = config.model_type
    if kind == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.T
    if kind in IN_PAIRS and "q_proj" in key:
        return in_pairs(tensor, config.num_attention_heads)
    if kind in IN_PAIRS and "k_proj" in key:
        return in_pairs(tensor, config.num_key_value_heads)
    if kind in ("gemma2", "gemma3_text") and key.endswith("norm.weight"):
        return tensor + 1
    return tensor


def _parts(key: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """By key: experts' gate and up are two tensors there, and every name ends as a module's weight does."""
    if key.endswith("experts.gate_up_proj"):
        module = key.removesuffix("gate_up_proj")
        return [(f"{module}{part}_proj.weight", x) for part, x in zip(("gate", "up"), tensor.chunk(2, 1), strict=True)]
    return [(key if key.endswith((".weight", ".bias")) else f"{key}.weight", tensor)]


def in_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows (head, half, i) → (head, i, half) of [out, …]."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    special = ["<unk>", "<s>", "</s>"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(special + [f"w{i}" for i in range(len(special), size)])
    writer.add_token_scores([0.0] * size)
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (size - len(special)))
    writer.add_vocab_size(size)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def computed(base: Path, adapters: dict[Path, float] | None = None) -> Tensor:
    """[prompts, vocabulary]: what llama.cpp computes, to be compared with :func:`expected`.

    Args:
        base: a GGUF file.
        adapters: LoRA GGUF files and the scale that the user gives each.
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), s) for path, s in (adapters or {}).items()]
    # The default, fp16, would cost three digits.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.verbosity = 0
    server = xllamacpp.Server(params)
    rows = []
    for prompt in PROMPTS:
        request = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 10**6, "cache_prompt": False}
        (content,) = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        found = {entry["id"]: entry["logprob"] for entry in content["top_logprobs"]}
        rows.append([found[token] for token in range(len(found))])
    return _centred(torch.tensor(rows, dtype=torch.float64))


def write_adapter(config: Any, folder: Path, path: Path, alpha: float) -> Path:
    """A PEFT folder of uniform rank as a GGUF adapter, factors as they are; ``alpha`` for all modules.

    llama.cpp multiplies B·A with the user's scale and, unless alpha is 0, with alpha over the rank of each pair.
    """
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, which = key.removeprefix("base_model.model.").partition(".lora_")
        if not which:
            continue
        name = f"{names.get_name(module)}.weight"
        is_a = which.removeprefix("embedding_")[0] == "A"
        if not is_a:
            tensor = stored(config, module, tensor)
        if is_a and name == "token_embd.weight":
            tensor = tensor.T
        writer.add_tensor(f"{name}.lora_{'a' if is_a else 'b'}", tensor.contiguous().numpy())
    return _finish(writer, path)


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
