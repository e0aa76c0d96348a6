"""PEFT and transformers load what is written: their outputs are those of the merged reference, for every base."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import para_ext
from para_ext.errors import ParaError
from para_ext.formats.base import BaseModel
from para_ext.report import Report

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from bases import BASES, QUIET, Base, logits, merged, random_adapter, relative_error, save  # noqa: E402

pytestmark = [*QUIET, pytest.mark.usefixtures("one_thread")]

PATTERNS = {
    "rank_pattern": {"k_proj": 8, "layers.1.self_attn.q_proj": 4},
    "alpha_pattern": {"v_proj": 20, "layers.10.mlp.up_proj": 7, "layers.1.self_attn.q_proj": 9},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in BASES},
    "llama rslora": ("llama", {"use_rslora": True}),
    "llama patterns": ("llama", PATTERNS),
    "llama rslora patterns": ("llama", {"use_rslora": True} | PATTERNS),
    # Whatever is missing in the file would be random.
    "llama uninitialised": ("llama", {"init_lora_weights": False}),
    "llama embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "mixtral rslora": ("mixtral", {"use_rslora": True}),
}
TRANSFORMERS = [case for case, (base, _) in CASES.items() if base != "unet"]
# With few modules, or with experts that share one rank, no module is so weak that all of it goes.
NOTHING_DROPPED = ("mixtral", "mixtral rslora")


@dataclass(frozen=True)
class Compressed:
    """A base, an adapter for it, and what para_ext made of that."""

    base: Base
    original: Path
    small: Path
    report: Report

    def loaded(self, folder: Path, **options: Any) -> Any:
        return peft.PeftModel.from_pretrained(self.base.build(), folder, **options).eval()

    def error(self, model: Callable[..., Any], ranks: dict[str, int] | None) -> float:
        """Of a model's logits against the merged reference's."""
        inputs = self.base.inputs()
        return relative_error(logits(model, inputs), logits(merged(self.base.build(), self.original, ranks), inputs))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compressed]:
    """By the name of a case; each is made once."""
    made: dict[str, Compressed] = {}

    def make(case: str) -> Compressed:
        if case not in made:
            name, config = CASES[case]
            if name == "unet":
                pytest.importorskip("diffusers")
            folder = tmp_path_factory.mktemp("case")
            original = random_adapter(BASES[name], folder / "original", **config)
            report = para_ext.compress_adapter(original, folder / "small", keep=0.4)
            made[case] = Compressed(BASES[name], original, folder / "small", report)
        return made[case]

    return make


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_what_peft_computes(compressed: Callable[[str], Compressed], case: str) -> None:
    made = compressed(case)
    assert made.error(made.loaded(made.original), None) <= 1e-5


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_truncated_update(
    compressed: Callable[[str], Compressed], case: str, low_cpu_mem_usage: bool
) -> None:
    made = compressed(case)
    model = made.loaded(made.small, low_cpu_mem_usage=low_cpu_mem_usage)
    assert made.error(model, made.report.ranks) <= 1e-5
    assert made.error(model.merge_and_unload(), made.report.ranks) <= 1e-5


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers_computes_the_truncated_update(compressed: Callable[[str], Compressed], case: str) -> None:
    made = compressed(case)
    model = made.base.build()
    model.load_adapter(str(made.small))
    assert made.error(model.eval(), made.report.ranks) <= 1e-5


@pytest.mark.parametrize("target", ["vllm", "trtllm", "uniform"])
@pytest.mark.parametrize("case", ["llama patterns", "llama embedding", "qwen2", "gpt2", "text_encoder"])
def test_folders_for_servers_are_right_in_peft_too(
    compressed: Callable[[str], Compressed], case: str, target: str, tmp_path: Path
) -> None:
    made = compressed(case)
    report = para_ext.compress_adapter(made.original, tmp_path / "small", keep=0.6, target=target)
    assert (len(set(report.ranks.values())) == 1) == (target == "uniform")
    assert made.error(made.loaded(tmp_path / "small"), report.ranks) <= 1e-5
    para_ext.convert_adapter(made.original, tmp_path / "whole", target)
    assert made.error(made.loaded(tmp_path / "whole"), None) <= 1e-5


@pytest.mark.parametrize("layers", [[0, 1, 4, 7], [3, 9]], ids=str)
def test_uniform_folders_keep_the_rules_of_servers(layers: list[int], tmp_path: Path) -> None:
    """SGLang and LMDeploy: leaf names, and exactly r of every one in every layer; LoRAX and TGI: no padded rank."""
    base = BASES["llama"]
    config = base.build().config
    config.save_pretrained(tmp_path / "base")
    leaves = ["q_proj", "v_proj", "down_proj"]
    original = random_adapter(
        base, tmp_path / "original", target_modules=leaves, layers_to_transform=layers, use_rslora=True
    )
    small = tmp_path / "small"
    report = para_ext.compress_adapter(original, small, energy=0.9, target="uniform", base=tmp_path / "base")
    settings = json.loads((small / "adapter_config.json").read_text())
    rank = settings["r"]
    assert rank in {8, *range(16, 513, 16)}
    assert settings["lora_alpha"] == rank and not settings["use_rslora"]
    assert sorted(settings["target_modules"]) == sorted(leaves)
    assert not any(settings[key] for key in ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform"))
    tensors = load_file(small / "adapter_model.safetensors")
    modules = {name for name, _ in base.build().named_modules() if name.endswith(tuple(leaves))}
    assert tensors.keys() == {f"base_model.model.{name}.lora_{which}.weight" for name in modules for which in "AB"}
    assert {tensor.shape["B" in key.rsplit(".", 2)[1]] for key, tensor in tensors.items()} == {rank}
    reference = merged(base.build(), original, report.ranks)
    model = peft.PeftModel.from_pretrained(base.build(), small).eval()
    assert relative_error(logits(model, base.inputs()), logits(reference, base.inputs())) <= 1e-5


def test_uniform_folders_can_be_swapped(tmp_path: Path) -> None:
    """In place, without another compilation; folders with ranks of their own are refused by PEFT, not mixed up."""
    from peft.utils.hotswap import hotswap_adapter

    base, swapped = BASES["llama"], {}
    for seed in (1, 2):
        original = random_adapter(base, tmp_path / f"original-{seed}", seed=seed)
        swapped[seed] = para_ext.compress_adapter(original, tmp_path / f"uniform-{seed}", rank=8, target="uniform")
        para_ext.compress_adapter(original, tmp_path / f"small-{seed}", keep=0.4)
    model = peft.PeftModel.from_pretrained(base.build(), tmp_path / "uniform-1")
    hotswap_adapter(model, str(tmp_path / "uniform-2"), "default")
    reference = merged(base.build(), tmp_path / "original-2", swapped[2].ranks)
    assert relative_error(logits(model.eval(), base.inputs()), logits(reference, base.inputs())) <= 1e-5
    model = peft.PeftModel.from_pretrained(base.build(), tmp_path / "small-1")
    with pytest.raises(ValueError, match="alpha_pattern"):
        hotswap_adapter(model, str(tmp_path / "small-2"), "default")


@pytest.mark.parametrize(
    "case", ["llama rslora patterns", "llama embedding", "qwen2", "gpt2", "bert", "vit", "mixtral", "text_encoder"]
)
def test_merged(compressed: Callable[[str], Compressed], case: str, tmp_path: Path) -> None:
    """The model's own class loads the folder; no LoRA is left."""
    made = compressed(case)
    base = made.base.build()
    save(base, tmp_path / "base")
    report = para_ext.compress_adapter(
        made.original, tmp_path / "merged", keep=0.4, target="merged", base=tmp_path / "base"
    )
    assert report.ranks == made.report.ranks
    assert made.error(type(base).from_pretrained(tmp_path / "merged").eval(), report.ranks) <= 1e-5


def _adapted(model: Any, folder: Path, **config: Any) -> Any:
    """The model with a random adapter, saved in ``folder``."""
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **config)).eval()
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad and ("modules_to_save" in name or name.endswith(".bias")):
            parameter.data += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(folder)
    return tuned


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("labels", [64, 3])
@pytest.mark.parametrize("head", ["lm_head", "score"])
def test_merged_heads_beside_transposed_layers(tmp_path: Path, head: str, labels: int) -> None:
    """GPT-2's blocks keep weights transposed, its heads do not, square or not."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=labels if head == "lm_head" else 80, n_positions=32, n_embd=64,
                                     n_layer=2, n_head=2, num_labels=labels, pad_token_id=0, eos_token_id=0,
                                     bos_token_id=0, tie_word_embeddings=False)  # fmt: skip
    kind = transformers.GPT2LMHeadModel if head == "lm_head" else transformers.GPT2ForSequenceClassification
    base = kind(config).eval()
    base.save_pretrained(tmp_path / "base")
    tuned = _adapted(base, tmp_path / "adapter", target_modules=["c_attn", "c_proj", head])
    para_ext.convert_adapter(tmp_path / "adapter", tmp_path / "out", "merged", base=tmp_path / "base")
    inputs = {"input_ids": torch.randint(1, min(labels, 80), (2, 8))}
    assert relative_error(logits(kind.from_pretrained(tmp_path / "out").eval(), inputs), logits(tuned, inputs)) <= 1e-5


def test_merged_biases(tmp_path: Path) -> None:
    """With bias="all" PEFT saves the base's biases, under names that tell of its wrappers."""
    torch.manual_seed(0)
    base = BASES["bert"].build()
    save(base, tmp_path / "base")
    tuned = _adapted(base, tmp_path / "adapter", target_modules=["query", "dense"], bias="all")
    para_ext.convert_adapter(tmp_path / "adapter", tmp_path / "out", "merged", base=tmp_path / "base")
    made = type(base).from_pretrained(tmp_path / "out").eval()
    inputs = BASES["bert"].inputs()
    assert relative_error(logits(made, inputs), logits(tuned, inputs)) <= 1e-5


TIED = {
    "Bloom": ("word_embeddings", {"hidden_size": 32, "n_layer": 1, "n_head": 2}, ["query_key_value"]),
    "Falcon": ("word_embeddings", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
               ["query_key_value"]),
    "GPTNeoX": ("embed_in", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                             "intermediate_size": 40, "tie_word_embeddings": True}, ["query_key_value"]),
    "Llama": ("embed_tokens", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                               "intermediate_size": 40, "tie_word_embeddings": True}, ["q_proj"]),
    "OPT": ("lm_head", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 40,
                        "word_embed_proj_dim": 32}, ["q_proj"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("kind", TIED)
def test_merged_refuses_one_side_of_tied_weights(tmp_path: Path, kind: str, known: bool) -> None:
    """The other side would change too, whatever the model calls it."""
    saved, settings, targets = TIED[kind]
    config = getattr(transformers, f"{kind}Config")(vocab_size=48, **settings)
    base = getattr(transformers, f"{kind}ForCausalLM")(config)
    base.save_pretrained(tmp_path / "base")
    _adapted(base, tmp_path / "adapter", target_modules=targets, modules_to_save=[saved])
    with pytest.raises(ParaError, match="are one weight in the base"):
        para_ext.convert_adapter(tmp_path / "adapter", tmp_path / "out", "merged", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif("ensure_weight_tying" not in signature(peft.LoraConfig).parameters, reason="PEFT is too old")
@pytest.mark.parametrize(
    ("targets", "saved"), [(["q_proj"], ["embed_tokens"]), (["q_proj", "embed_tokens"], None)], ids=["saved", "LoRA"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_takes_both_sides_of_tied_weights(
    tmp_path: Path, targets: list[str], saved: list[str] | None, dtype: torch.dtype
) -> None:
    """Trained as one weight, they are merged as one, and both modules' certificates have its rounding."""
    _, settings, _ = TIED["Llama"]
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=48, **settings)).to(dtype).eval()
    base.save_pretrained(tmp_path / "base")
    tuned = _adapted(
        base, tmp_path / "adapter", target_modules=targets, modules_to_save=saved, ensure_weight_tying=True
    )
    report = para_ext.convert_adapter(tmp_path / "adapter", tmp_path / "out", "merged", base=tmp_path / "base")
    made = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    inputs = {"input_ids": torch.randint(1, 48, (2, 8))}
    error = relative_error(logits(made, inputs), logits(tuned.float(), inputs))
    assert error <= (1e-5 if dtype == torch.float32 else 0.02)
    errors = {module.name: module.error for module in report.modules}
    if saved is None:
        assert errors["lm_head"] == pytest.approx(errors["model.embed_tokens"], rel=0.01) != 0


@pytest.fixture(params=[True, False], ids=["known", "unknown"])
def known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether transformers knows the model; where it doesn't, names and config.json must tell."""
    if not request.param:
        monkeypatch.setattr(BaseModel, "_model", None)
    return bool(request.param)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ensured", [False, True])
@pytest.mark.parametrize("saved", [None, ["embed_tokens"], ["lm_head"]], ids=str)
def test_merged_embeddings_of_models_known_or_not(
    tmp_path: Path, known: bool, tied: bool, ensured: bool, saved: list[str] | None
) -> None:
    if ensured and not (tied and saved != ["lm_head"]):
        pytest.skip("nothing that PEFT could tie")
    torch.manual_seed(0)
    settings = TIED["Llama"][1] | {"tie_word_embeddings": tied}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=48, **settings)).eval()
    base.save_pretrained(tmp_path / "base")
    options = {"ensure_weight_tying": True} if ensured else {}
    targets = ["q_proj"] if saved else ["q_proj", "embed_tokens"]
    tuned = _adapted(base, tmp_path / "adapter", target_modules=targets, modules_to_save=saved, **options)
    if tied and not ensured:
        with pytest.raises(ParaError, match="are one weight in the base"):
            para_ext.convert_adapter(tmp_path / "adapter", tmp_path / "out", "merged", base=tmp_path / "base")
        return
    para_ext.convert_adapter(tmp_path / "adapter", tmp_path / "out", "merged", base=tmp_path / "base")
    made = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    inputs = {"input_ids": torch.randint(1, 48, (2, 8))}
    assert relative_error(logits(made, inputs), logits(tuned, inputs)) <= 1e-5


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_merged_into_a_base_without_its_head(tmp_path: Path) -> None:
    """Loaded with a head, as the adapter's model was, it shares the embedding."""
    settings = TIED["Llama"][1]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=48, **settings))
    model.model.save_pretrained(tmp_path / "base")
    _adapted(model, tmp_path / "adapter", target_modules=["embed_tokens"])
    with pytest.raises(ParaError, match="are one weight in the base"):
        para_ext.convert_adapter(tmp_path / "adapter", tmp_path / "out", "merged", base=tmp_path / "base")


def test_merged_takes_both_sides_where_both_are_stored(tmp_path: Path) -> None:
    """As some tied models' files have it; transformers would part them if only one were changed."""
    _, settings, _ = TIED["Llama"]
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=48, **settings)).eval()
    base.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    tuned = _adapted(base, tmp_path / "adapter", target_modules=["embed_tokens"], ensure_weight_tying=True)
    report = para_ext.convert_adapter(tmp_path / "adapter", tmp_path / "out", "merged", base=tmp_path / "base")
    made = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    inputs = {"input_ids": torch.randint(1, 48, (2, 8))}
    assert relative_error(logits(made, inputs), logits(tuned, inputs)) <= 1e-5
    assert report.error <= 1e-5 * report.norm


def test_merged_takes_embeddings_that_were_changed_before_training(tmp_path: Path) -> None:
    """PEFT saves them beside the factors and loads them in the place of the base's."""
    _, settings, _ = TIED["Llama"]
    config = transformers.LlamaConfig(vocab_size=48, **settings | {"tie_word_embeddings": False})
    base = transformers.LlamaForCausalLM(config).eval()
    base.save_pretrained(tmp_path / "base")
    base.model.embed_tokens.weight.data[3:20] = torch.randn(17, 32)
    tuned = _adapted(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    para_ext.convert_adapter(tmp_path / "adapter", tmp_path / "out", "merged", base=tmp_path / "base")
    made = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    inputs = {"input_ids": torch.randint(1, 48, (2, 8))}
    assert relative_error(logits(made, inputs), logits(tuned, inputs)) <= 1e-5


def _llava(tied: bool) -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    text = transformers.LlamaConfig(**TIED["Llama"][1] | {"tie_word_embeddings": False}, vocab_size=64, pad_token_id=0)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=60, tie_word_embeddings=tied)
    ).eval()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [None, ["lm_head"], ["embed_tokens"]])
def test_merged_embeddings_of_models_of_several_parts(tmp_path: Path, tied: bool, saved: list[str] | None) -> None:
    """Under other names in files than in the model, and tied as the whole model says, not its language model."""
    torch.manual_seed(0)
    base = _llava(tied)
    base.save_pretrained(tmp_path / "base")
    targets = ["q_proj"] if saved else ["q_proj", "embed_tokens"]
    tuned = _adapted(base, tmp_path / "adapter", target_modules=targets, modules_to_save=saved)
    if tied:
        with pytest.raises(ParaError, match="are one weight in the base"):
            para_ext.convert_adapter(tmp_path / "adapter", tmp_path / "out", "merged", base=tmp_path / "base")
        return
    para_ext.convert_adapter(tmp_path / "adapter", tmp_path / "out", "merged", base=tmp_path / "base")
    made = type(base).from_pretrained(tmp_path / "out").eval()
    inputs = {"input_ids": torch.randint(1, 50, (1, 7))}
    assert relative_error(logits(made, inputs), logits(tuned, inputs)) <= 1e-5


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("vit", {"target_modules": "all-linear", "bias": "all"}),
        ("mixtral", {"target_modules": "all-linear"}),
        ("mixtral", {"target_modules": ["gate", "q_proj"]}),
    ],
)
def test_merged_against_the_live_model(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    """Biases under other names in files; and the routers of mixtures, which PEFT adapts as parameters."""
    torch.manual_seed(0)
    base = BASES[name].build()
    save(base, tmp_path / "base")
    tuned = _adapted(base, tmp_path / "adapter", **config)
    report = para_ext.convert_adapter(tmp_path / "adapter", tmp_path / "out", "merged", base=tmp_path / "base")
    assert name != "mixtral" or any("gate.weight" in name for name in report.ranks)
    made = type(base).from_pretrained(tmp_path / "out").eval()
    assert relative_error(logits(made, BASES[name].inputs()), logits(tuned, BASES[name].inputs())) <= 1e-5


def test_merged_embeddings_that_nothing_shares(tmp_path: Path) -> None:
    """A model without an output layer has them for itself, whatever its type ties by default."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=48, n_positions=32, n_embd=32, n_layer=1, n_head=2, pad_token_id=0)
    base = transformers.GPT2ForSequenceClassification(config).eval()
    base.save_pretrained(tmp_path / "base")
    tuned = _adapted(base, tmp_path / "adapter", target_modules=["wte"], modules_to_save=["score"])
    para_ext.convert_adapter(tmp_path / "adapter", tmp_path / "out", "merged", base=tmp_path / "base")
    made = type(base).from_pretrained(tmp_path / "out").eval()
    inputs = {"input_ids": torch.randint(1, 48, (2, 8))}
    assert relative_error(logits(made, inputs), logits(tuned, inputs)) <= 1e-5


def test_merged_refuses_the_shared_embedding_of_encoder_and_decoder(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=48, d_model=32, d_kv=16, d_ff=40, num_layers=1, num_heads=2,
                                   tie_word_embeddings=False)  # fmt: skip
    base = transformers.T5ForConditionalGeneration(config)
    base.save_pretrained(tmp_path / "base")
    _adapted(base, tmp_path / "adapter", target_modules=["q"], modules_to_save=["shared"])
    with pytest.raises(ParaError, match="are one weight in the base"):
        para_ext.convert_adapter(tmp_path / "adapter", tmp_path / "out", "merged", base=tmp_path / "base")


def experts_one_by_one(folder: Path, rank: int = 6, alpha: float = 9.0) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter of a Mixtral as transformers before 5 had it, one pair per expert and projection; ΔW by module."""
    model = BASES["mixtral"].build()
    generator = torch.Generator().manual_seed(0)
    hidden, inner = model.config.hidden_size, model.config.intermediate_size
    tensors, deltas = {}, {}
    for layer in range(model.config.num_hidden_layers):
        for expert in range(model.config.num_local_experts):
            for name, m, n in (("w1", inner, hidden), ("w2", hidden, inner), ("w3", inner, hidden)):
                module = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                decay = torch.logspace(0, -3, rank)
                B = torch.randn(m, rank, generator=generator) * decay / m**0.5
                A = torch.randn(rank, n, generator=generator) / n**0.5
                tensors[f"base_model.model.{module}.lora_A.weight"] = A
                tensors[f"base_model.model.{module}.lora_B.weight"] = B
                deltas[module] = alpha / rank * B.double() @ A.double()
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM")
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder, deltas


def with_experts(deltas: dict[str, torch.Tensor], ranks: dict[str, int] | None) -> Any:
    """The merged reference for them."""
    model = BASES["mixtral"].build()
    inner = model.config.intermediate_size
    for module, delta in deltas.items():
        if ranks is not None:
            U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
            delta = U[:, : ranks[module]] * S[: ranks[module]] @ Vh[: ranks[module]]
        _, _, layer, _, _, expert, name = module.split(".")
        experts = model.model.layers[int(layer)].mlp.experts
        weight = experts.down_proj if name == "w2" else experts.gate_up_proj
        rows = {"w1": slice(inner), "w2": slice(None), "w3": slice(inner, None)}[name]
        with torch.no_grad():
            weight[int(expert)][rows] += delta.float()
    return model


def test_experts_one_by_one(tmp_path: Path) -> None:
    """PEFT makes one pair of all experts' when it loads them, for which they must have one rank."""
    original, deltas = experts_one_by_one(tmp_path / "original")
    inputs = BASES["mixtral"].inputs()

    def error(folder: Path, ranks: dict[str, int] | None) -> float:
        model = peft.PeftModel.from_pretrained(BASES["mixtral"].build(), folder).eval()
        return relative_error(logits(model, inputs), logits(with_experts(deltas, ranks), inputs))

    assert error(original, None) <= 1e-5
    report = para_ext.compress_adapter(original, tmp_path / "small", keep=0.5)
    assert set(report.ranks.values()) == {3}
    assert error(tmp_path / "small", report.ranks) <= 1e-5
    assert error(tmp_path / "small", None) > 2e-5


@pytest.mark.parametrize("case", CASES)
def test_the_comparison_is_not_empty(compressed: Callable[[str], Compressed], case: str) -> None:
    """Ranks differ, modules are dropped, and a module too much or too little would be seen."""
    made = compressed(case)
    ranks = made.report.ranks
    assert len(set(ranks.values())) > 2
    assert (0 in ranks.values()) == (case not in NOTHING_DROPPED)
    reference = merged(made.base.build(), made.original, ranks)
    assert made.error(reference, None) > 1e-3
    assert made.error(made.base.build(), ranks) > 1e-2
    # One component less, in the module that has the fewest; twice what the tests allow.
    least = min((name for name in ranks if ranks[name]), key=lambda name: ranks[name])
    assert made.error(reference, ranks | {least: ranks[least] - 1}) > 2e-5
