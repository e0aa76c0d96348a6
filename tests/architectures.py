"""The models that real adapters were trained on, with random weights: every adapted layer at its real width and depth.

What no adapter touches is small: vocabulary, other feed-forward layers, experts. A base model is found by the name that
adapter_config.json gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

VOCABULARY = 64
Inputs = dict[str, Tensor]


class EmbeddingConv1D(nn.Module):
    """The model of PEFT's own regression adapter for an embedding and a Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(100, 5)
        self.conv1d: nn.Module = Conv1D(1, 5)  # type: ignore[no-untyped-call]

    def forward(self, ids: Tensor) -> Any:
        return self.conv1d(torch.tanh(self.emb(ids)))


class Double(TorchFunctionMode):
    """fp64 where a model asks for fp32, as they do in norms, softmax and experts: 1e-14 could flip a rounding there."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        named = {key: _widened(value) for key, value in (kwargs or {}).items()}
        return func(*map(_widened, args), **named)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=32, pad_token_id=0)  # 2 labels by default
    return transformers.GPT2ForSequenceClassification(config)


def _gpt_neo() -> nn.Module:
    config = transformers.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        attention_types=[[["global", "local"], 6]],
        intermediate_size=256,
        max_position_embeddings=32,
    )
    return transformers.GPTNeoForCausalLM(config)


def _opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        ffn_dim=256,
        word_embed_proj_dim=768,
        max_position_embeddings=32,
    )
    return transformers.OPTForCausalLM(config)


def _marian() -> nn.Module:
    config = transformers.MarianConfig(
        vocab_size=VOCABULARY,
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return transformers.MarianMTModel(config)


def _smollm2() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=960,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        intermediate_size=256,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def _privacy_filter() -> nn.Module:
    if not hasattr(transformers, "OpenAIPrivacyFilterConfig"):
        pytest.skip(f"transformers {transformers.__version__} does not know openai/privacy-filter")
    config = transformers.OpenAIPrivacyFilterConfig(
        vocab_size=VOCABULARY, num_local_experts=4, num_experts_per_tok=2, intermediate_size=32, pad_token_id=0
    )
    model: nn.Module = transformers.OpenAIPrivacyFilterForTokenClassification(config)  # type: ignore[no-untyped-call]
    return model


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "gpt2": _gpt2,
    "EleutherAI/gpt-neo-125M": _gpt_neo,
    "facebook/opt-125m": _opt,
    "Helsinki-NLP/opus-mt-ar-en": _marian,
    "HuggingFaceTB/SmolLM2-360M-Instruct": _smollm2,
    "openai/privacy-filter": _privacy_filter,
    "ModelEmbConv1D": EmbeddingConv1D,
}


def build(base: str) -> tuple[nn.Module, Inputs]:
    """The model in fp64, the same at every call, and token ids [2, 8] for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = ARCHITECTURES[base]().double().eval()
        ids = torch.randint(2, VOCABULARY, (2, 8))
    if isinstance(model, EmbeddingConv1D):
        return model, {"ids": ids}
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    return model, inputs


@torch.no_grad()
def outputs(model: Callable[..., Any], inputs: Inputs) -> Tensor:
    """The model's logits in fp64 throughout."""
    with Double():
        out = model(**inputs)
    return out if isinstance(out, Tensor) else out.logits
