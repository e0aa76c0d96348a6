"""llama.cpp for tests, through xllamacpp: a base model as GGUF, and the logprobs of all tokens after a prompt.

What llama.cpp computes rounds a little differently from PyTorch (its own SIMD kernels); the cache is set to fp32, since
its default fp16 alone would cost three digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
import xllamacpp
from safetensors.torch import load_file
from torch import Tensor

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "gpt2": gguf.MODEL_ARCH.GPT2}


def write_base(model: Any, path: Path) -> Path:
    """A causal model of transformers as a GGUF file in fp32, with a vocabulary of made-up words."""
    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    if arch == "gpt2":
        writer.add_context_length(config.n_positions)
        writer.add_embedding_length(config.n_embd)
        writer.add_block_count(config.n_layer)
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    _add_vocabulary(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(ARCHITECTURES[arch], config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and tied:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, stored(config, key, tensor).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(config: Any, key: str, tensor: Tensor) -> Tensor:
    """A weight [out, …] as GGUF has it: transposed where the model has Conv1D; Llama's q and k in pairs for its rotary
    embedding, which turns neighbours (2i, 2i + 1) where transformers turns (i, i + d/2)."""
    if config.model_type == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.T
    if config.model_type == "llama" and "q_proj" in key:
        return in_pairs(tensor, config.num_attention_heads)
    if config.model_type == "llama" and "k_proj" in key:
        return in_pairs(tensor, config.num_key_value_heads)
    return tensor


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


def logprobs(base: Path, prompts: Sequence[Sequence[int]], adapters: dict[Path, float] | None = None) -> Tensor:
    """[prompts, vocabulary], in fp64: log-probabilities of the token that follows each prompt.

    Args:
        base: a GGUF file.
        prompts: token ids.
        adapters: LoRA GGUF files and the scale that the user gives each.
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), s) for path, s in (adapters or {}).items()]
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.verbosity = 0
    server = xllamacpp.Server(params)
    rows = []
    for prompt in prompts:
        request = {"prompt": list(prompt), "max_tokens": 1, "temperature": 0, "logprobs": 10**6, "cache_prompt": False}
        (content,) = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        found = {entry["id"]: entry["logprob"] for entry in content["top_logprobs"]}
        rows.append([found[token] for token in range(len(found))])
    return torch.tensor(rows, dtype=torch.float64)


def write_adapter(config: Any, folder: Path, path: Path, alpha: float) -> Path:
    """A PEFT folder of uniform rank as a GGUF adapter, factors as they are; ``alpha`` for all modules.

    llama.cpp multiplies B·A with the user's scale and, unless alpha is 0, with alpha over the rank of each pair.
    """
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, which = key.removeprefix("base_model.model.").partition(".lora_")
        if not which:
            continue
        name = f"{names.get_name(module)}.weight"
        is_a = which.removeprefix("embedding_")[0] == "A"
        if not is_a and config.model_type == "llama":
            tensor = stored(config, module, tensor)
        if is_a and name == "token_embd.weight":
            tensor = tensor.T
        writer.add_tensor(f"{name}.lora_{'a' if is_a else 'b'}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
