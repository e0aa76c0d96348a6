"""Live models: every kind of LoRA layer read and rewritten, against a dense SVD of what the layer itself computes."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from para_ext.errors import ParaError
from para_ext.factors import LoraFactors, check_factors
from para_ext.models import LiveAdapter, read_model

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "LoRA adapter added to ConvNd layer with groups",
        "Setting `save_embedding_layers`",
        "fan_in_fan_out is set to False",
        "Already unmerged",  # PEFT's attention says so at every forward without the active adapter
        "`is_gradient_checkpointing` is deprecated",  # PEFT asks transformers for it
        "The following (rank|alpha)_pattern keys did not match",  # PEFT looks for parameters among the modules
        "Unsupported layer type",
        "Could not identify embedding layer",
        "Model with `tie_word_embeddings",
        "Model has `tie_word_embeddings=True`",
        "Adapter default was active which is now deleted",
        "Adapter 'default'.* LoRA tensor.s. have invalid shape.*bias",  # PEFT takes a bias for a shard
        ".*`tie_word_embeddings`",
    )
]


class Net(nn.Module):
    """Named layers, applied one after the other."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.names = list(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            out = getattr(self, name)(x) if name != "attn" else self.attn(x, x, x)[0]
            x = torch.tanh(out)
        return x


def mlp() -> nn.Module:
    return Net(up=nn.Linear(12, 20), mid=nn.Linear(20, 16), down=nn.Linear(16, 10))


def tiny_llama(**kwargs: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, **{"tie_word_embeddings": False} | kwargs,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def tiny_gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def tiny_bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def tiny_vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    return transformers.ViTModel(config, add_pooling_layer=False)


def tiny_mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=16,
    )  # fmt: skip
    config._experts_implementation = "eager"  # the default has no float64
    return transformers.MixtralForCausalLM(config)


def tokens() -> Tensor:
    return torch.arange(10).reshape(2, 5)


@dataclass(frozen=True)
class Case:
    """A base model, the LoRA that is put on it, and an input."""

    base: Callable[[], nn.Module]
    lora: dict[str, Any]
    input: Callable[[], Tensor]
    dora: bool = False

    def model(self, **changes: Any) -> Any:
        base = self.fresh_base()
        lora = {"r": 4, "lora_alpha": 6, "init_lora_weights": False} | self.lora | changes
        model = peft.get_peft_model(base, peft.LoraConfig(**lora))
        randomize(model)
        return model.to(torch.float64).eval()

    def fresh_base(self) -> nn.Module:
        torch.manual_seed(1)
        return self.base().to(torch.float64).eval()

    def x(self) -> Tensor:
        torch.manual_seed(2)
        x = self.input()
        return x.double() if x.is_floating_point() else x


def randomize(model: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name and "magnitude" not in name:
                p.normal_(std=0.3)


CASES = {
    "linear": Case(mlp, {"target_modules": ["up", "mid", "down"]}, lambda: torch.randn(3, 12)),
    "rslora": Case(mlp, {"target_modules": ["up", "mid", "down"], "use_rslora": True}, lambda: torch.randn(3, 12)),
    "patterns": Case(
        mlp,
        {"target_modules": ["up", "mid", "down"], "rank_pattern": {"mid": 7}, "alpha_pattern": {"down": 3}},
        lambda: torch.randn(3, 12),
    ),
    "llama": Case(tiny_llama, {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}, tokens),
    "gpt2": Case(tiny_gpt2, {"target_modules": ["c_attn", "c_fc"], "task_type": "CAUSAL_LM"}, tokens),
    "bert": Case(tiny_bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}, tokens),
    "vit": Case(tiny_vit, {"target_modules": ["projection", "q_proj", "fc1"]}, lambda: torch.randn(2, 3, 8, 8)),
    "conv1d": Case(
        lambda: Net(a=nn.Conv1d(6, 8, 3), b=nn.Conv1d(8, 6, 1)),
        {"target_modules": ["a", "b"]},
        lambda: torch.randn(2, 6, 9),
    ),
    "conv2d": Case(
        lambda: Net(a=nn.Conv2d(6, 8, 3, stride=2), b=nn.Conv2d(8, 6, 1)),
        {"target_modules": ["a", "b"]},
        lambda: torch.randn(2, 6, 9, 9),
    ),
    "conv3d": Case(
        lambda: Net(a=nn.Conv3d(3, 8, 2), b=nn.Conv3d(8, 6, (1, 2, 1))),
        {"target_modules": ["a", "b"]},
        lambda: torch.randn(2, 3, 4, 4, 4),
    ),
    "grouped": Case(
        lambda: Net(a=nn.Conv2d(6, 8, 3, groups=2), b=nn.Conv2d(8, 6, 1)),
        {"target_modules": ["a", "b"]},
        lambda: torch.randn(2, 6, 9, 9),
    ),
    "embedding": Case(
        lambda: Net(emb=nn.Embedding(30, 12), out=nn.Linear(12, 9)),
        {"target_modules": ["emb", "out"]},
        lambda: torch.arange(8),
    ),
    "attention": Case(
        lambda: Net(attn=nn.MultiheadAttention(12, 2, batch_first=True), out=nn.Linear(12, 9)),
        {"target_modules": ["attn", "out"]},
        lambda: torch.randn(2, 4, 12),
    ),
    "experts": Case(
        tiny_mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "task_type": "CAUSAL_LM",
        },
        tokens,
    ),
    "tied": Case(
        lambda: tiny_llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True, "task_type": "CAUSAL_LM"},
        tokens,
    ),
    "bias": Case(
        mlp, {"target_modules": ["up", "mid", "down"], "lora_bias": True}, lambda: torch.randn(3, 12)
    ),
    "dora": Case(
        mlp, {"target_modules": ["up", "mid", "down"], "use_dora": True}, lambda: torch.randn(3, 12), dora=True
    ),
    "dora conv": Case(
        lambda: Net(a=nn.Conv2d(6, 8, 3), b=nn.Conv2d(8, 6, 1)),
        {"target_modules": ["a", "b"], "use_dora": True},
        lambda: torch.randn(2, 6, 9, 9),
        dora=True,
    ),
    "dora embedding": Case(
        lambda: Net(emb=nn.Embedding(30, 12), out=nn.Linear(12, 9)),
        {"target_modules": ["emb", "out"], "use_dora": True},
        lambda: torch.arange(8),
        dora=True,
    ),
}  # fmt: skip
DROPPABLE = [name for name, case in CASES.items() if not case.dora and name not in ("bias", "tied")]


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def output(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, Tensor) else out.get("logits", out.get("last_hidden_state"))


def truncated(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [m, k], A [k, n] of the best approximation of a dense delta [m, n], in fp64."""
    U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    k = min(rank, len(S))
    B, A = U[:, :k] * S[:k].sqrt(), S[:k].sqrt()[:, None] * Vh[:k]
    return nn.functional.pad(B, (0, rank - k)), nn.functional.pad(A, (0, 0, 0, rank - k))


def shrunk(f: LoraFactors, rank: int) -> LoraFactors:
    B, A = truncated(f.scale * f.B.double() @ f.A.double(), rank)
    return replace(f, B=B.to(f.B.dtype), A=A.to(f.A.dtype), scale=1.0)


def mixed_ranks(live: LiveAdapter, drop: bool = False) -> dict[str, int]:
    """By group: 1, 2, 3, 1, ... and with ``drop`` 0, 1, 2, 3, 0, ..., as far as each may go."""
    groups: dict[str, int] = {}
    for f in live.factors:
        key = f.group or f.name
        k = len(groups) % 4 if drop else len(groups) % 3 + 1
        groups[key] = max(groups.setdefault(key, k), f.min_rank)
    return groups


def compress(model: nn.Module, adapter: str | None = None, drop: bool = False) -> dict[str, int]:
    live = read_model(model, adapter)
    ranks = mixed_ranks(live, drop)
    live.replace([shrunk(f, ranks[f.group or f.name]) for f in live.factors])
    return ranks


def lora_layers(model: nn.Module) -> dict[str, Any]:
    return {path: m for path, m in model.named_modules() if hasattr(m, "lora_embedding_A")}


def plain(path: str) -> str:
    return path.removeprefix("base_model.model.").replace(".base_layer", "")


def reference(case: Case, model: Any, ranks: dict[str, int]) -> nn.Module:
    """A base model whose weights have PEFT's own delta added, each truncated by a dense SVD."""
    base = case.fresh_base()
    for path, layer in lora_layers(model).items():
        name = plain(path)
        scaling = layer.scaling["default"]
        if hasattr(layer, "parameter_name"):
            name = f"{name}.{layer.parameter_name}"
            weight = base.get_parameter(name)
            deltas = layer.get_delta_weight("default").detach().unbind()
            new = torch.stack([torch.matmul(*truncated(d, ranks[name])) for d in deltas])
        else:
            rank = ranks["tied embeddings" if name in ("lm_head", "model.embed_tokens") else name]
            weight = base.get_parameter(f"{name}.weight")
            delta = layer.get_delta_weight("default").detach()
            new = torch.matmul(*truncated(delta.flatten(1), rank)).reshape(delta.shape)
        if name == "lm_head":
            # Its own adapter adds to the tied weight, which the embedding has updated once already.
            base.lm_head.weight = nn.Parameter(case.fresh_base().lm_head.weight.detach() + new)
            continue
        with torch.no_grad():
            if name == "model.embed_tokens":
                base.model.embed_tokens.weight = nn.Parameter(weight + new)
            else:
                weight += new
        if layer.lora_bias.get("default"):
            with torch.no_grad():
                base.get_parameter(f"{name}.bias").add_(layer.lora_B["default"].bias * scaling)
    return base


def padded(model: Any, ranks: dict[str, int]) -> Any:
    """A copy of the model whose factors hold the truncated update at their old rank and scale."""
    twin = copy.deepcopy(model)
    for path, layer in lora_layers(twin).items():
        embedding = "default" in layer.lora_embedding_A
        A = layer.lora_embedding_A["default"] if embedding else layer.lora_A["default"].weight
        B = layer.lora_embedding_B["default"] if embedding else layer.lora_B["default"].weight
        groups = 1 if embedding else getattr(layer.lora_B["default"], "groups", 1)
        with torch.no_grad():
            for A_block, B_block in zip(A.chunk(groups), B.chunk(groups), strict=True):
                rank = A_block.shape[0]
                name = plain(path).removesuffix(".out_proj")
                new_B, new_A = truncated(B_block.flatten(1) @ A_block.flatten(1), ranks[name])
                A_block.copy_(nn.functional.pad(new_A, (0, 0, 0, rank - len(new_A))).reshape(A_block.shape))
                B_block.copy_(nn.functional.pad(new_B, (0, rank - new_B.shape[1])).reshape(B_block.shape))
    return twin


def wanted(case: Case, model: Any, ranks: dict[str, int]) -> Tensor:
    # PEFT's delta is not all of DoRA nor of a grouped convolution, and PEFT adds an attention's out_proj delta twice.
    partial = case.dora or case in (CASES["grouped"], CASES["attention"])
    return output(padded(model, ranks) if partial else reference(case, model, ranks), case.x())


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-11)


# --- forward and everything that PEFT does with a model afterwards ---------------------------------------------------


def test_factors_are_views_of_the_live_tensors(case: Case) -> None:
    model = case.model()
    live = read_model(model)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert check_factors(live.factors) == live.factors
    for f in live.factors:
        assert {f.A.untyped_storage().data_ptr(), f.B.untyped_storage().data_ptr()} <= storages
        assert not f.A.requires_grad and not f.B.requires_grad


def test_forward_is_that_of_the_truncated_update(case: Case) -> None:
    model = case.model()
    before = output(model, case.x())
    expected = wanted(case, model, mixed_ranks(read_model(model)))
    ranks = compress(model)
    after = output(model, case.x())
    assert same(after, expected)
    assert not torch.allclose(after, before, rtol=1e-6)
    assert [f.rank for f in read_model(model).factors] == [ranks[f.group or f.name] for f in read_model(model).factors]


@pytest.mark.parametrize("name", DROPPABLE)
def test_dropped_modules_add_nothing(name: str) -> None:
    case = CASES[name]
    model = case.model()
    ranks = mixed_ranks(read_model(model), drop=True)
    expected = wanted(case, model, ranks)
    compress(model, drop=True)
    assert same(output(model, case.x()), expected)
    layers = {plain(path): layer for path, layer in lora_layers(model).items() if not hasattr(layer, "parameter_name")}
    gone = [layer for path, layer in layers.items() if ranks.get(path) == 0]
    assert gone
    for layer in gone:
        entries = ("lora_A", "lora_B", "lora_dropout", "lora_embedding_A", "scaling", "r")
        assert not any("default" in getattr(layer, attr) for attr in entries)


def test_full_rank_changes_nothing_but_the_scale(case: Case) -> None:
    model = case.model()
    before = output(model, case.x())
    live = read_model(model)
    live.replace([replace(f, B=f.scale * f.B, scale=1.0) for f in live.factors])
    assert same(output(model, case.x()), before)
    for layer in lora_layers(model).values():
        assert layer.scaling == {"default": 1.0}
        assert layer.r == layer.lora_alpha


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("drop", [False, True])
def test_save_and_load(case: Case, drop: bool, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = case.model()
    compress(model, drop=drop)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(case.fresh_base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    again = again.to(torch.float64).eval()
    assert torch.allclose(output(again, case.x()), output(model, case.x()), rtol=1e-5, atol=1e-6)
    old, new = ({f.name: (f.rank, f.scale) for f in read_model(m).factors} for m in (model, again))
    if case is CASES["tied"]:
        new.pop("lm_head", None)  # loaded with low_cpu_mem_usage, PEFT ties no longer
    assert new == old


def test_config_and_layers_agree(case: Case) -> None:
    model = case.model()
    theirs = model.peft_config["default"]
    before = copy.deepcopy(vars(theirs))
    compress(model, drop=True)
    config = model.peft_config["default"]
    assert vars(theirs) == before, "the config that the caller passed in is the caller's"
    assert config.lora_alpha == config.r and config.alpha_pattern == config.rank_pattern and not config.use_rslora
    assert config.init_lora_weights is True
    assert config.inference_mode == theirs.inference_mode
    for layer in lora_layers(model).values():
        assert layer.r == layer.lora_alpha
        for module in (*layer.lora_A.values(), *layer.lora_B.values()):
            rows, columns = module.weight.shape[:2]
            unit = "features" if isinstance(module, nn.Linear) else "channels"
            assert getattr(module, f"out_{unit}") == rows
            assert getattr(module, f"in_{unit}") == columns * getattr(module, "groups", 1)


def test_merge_and_unmerge(case: Case) -> None:
    model = case.model()
    if case in (CASES["grouped"], CASES["tied"]):
        pytest.skip("PEFT does not merge grouped convolutions, and merges tied weights twice")
    compress(model, drop=True)
    before, weights = output(model, case.x()), copy.deepcopy(model.state_dict())
    model.merge_adapter()
    assert same(output(model, case.x()), before)
    model.unmerge_adapter()
    assert all(torch.allclose(v, weights[k], atol=1e-12) for k, v in model.state_dict().items())
    merged = model.merge_and_unload()
    assert same(output(merged, case.x()), before)


def test_copies_and_loads_its_state(case: Case) -> None:
    if case is CASES["tied"]:
        pytest.skip("PEFT's tied layers hold tensors of a graph, which cannot be copied")
    model = case.model()
    compress(model, drop=True)
    before = output(model, case.x())
    twin = copy.deepcopy(model)
    randomize(twin)
    assert not torch.allclose(output(twin, case.x()), before)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(output(twin, case.x()), before)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_torch_save_of_the_whole_model(name: str) -> None:
    case = CASES[name]
    model = case.model()
    compress(model, drop=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(output(again, case.x()), output(model, case.x()))


def test_training_goes_on(case: Case) -> None:
    model = case.model().train()
    compress(model, drop=True)
    assert model.training
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in n or "modules_to_save" in n for n in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
    losses = []
    for _ in range(2):
        out = model(case.x())
        out = out if isinstance(out, Tensor) else out.get("logits", out.get("last_hidden_state"))
        loss = (out * torch.linspace(-1, 1, out.shape[-1])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    moved = [n for n, p in trained.items() if p.grad is not None and p.grad.abs().max() > 0]
    assert any("lora_A" in n or "embedding_A" in n for n in moved)


# --- all or nothing --------------------------------------------------------------------------------------------------


def state(model: Any) -> Any:
    """All that a failed replace must leave as it was, bit for bit, in its order."""
    layers = {
        path: {k: dict(v) for k, v in vars(layer).items() if isinstance(v, dict) and not k.startswith("_")}
        for path, layer in lora_layers(model).items()
    }
    sizes = {
        path: {k: v for k, v in vars(m).items() if isinstance(v, int)}
        for path, m in model.named_modules()
    }  # fmt: skip
    tensors = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False) if ".lora_" in name]
    return layers, sizes, tensors, id(model.peft_config["default"]), copy.deepcopy(vars(model.peft_config["default"]))


class Injected(Exception):
    pass


class Writes:
    """Counts the writes to modules and to the dicts of LoRA layers, and fails right after the one past ``allowed``."""

    def __init__(self, model: Any) -> None:
        self.done, self.allowed = 0, -1
        writes = self

        class Watched(dict[str, Any]):
            def __setitem__(self, key: str, value: Any) -> None:
                super().__setitem__(key, value)
                writes.count()

            def __delitem__(self, key: str) -> None:
                super().__delitem__(key)
                writes.count()

        for layer in lora_layers(model).values():
            for name in ("r", "lora_alpha", "scaling", "use_rslora"):
                vars(layer)[name] = Watched(vars(layer)[name])
        model.base_model.peft_config = model.base_model.model.peft_config = Watched(model.peft_config)

    def watch_modules(self, monkeypatch: pytest.MonkeyPatch) -> None:
        set_attribute, delete_item = nn.Module.__setattr__, nn.ModuleDict.__delitem__

        def attribute(module: nn.Module, name: str, value: Any) -> None:
            set_attribute(module, name, value)
            self.count()

        def item(module: nn.ModuleDict, name: str) -> None:
            delete_item(module, name)
            self.count()

        monkeypatch.setattr(nn.Module, "__setattr__", attribute)
        monkeypatch.setattr(nn.ModuleDict, "__delitem__", item)

    def count(self) -> None:
        self.done += 1
        if self.done == self.allowed:
            raise Injected


@pytest.mark.parametrize("name", ["linear", "attention", "grouped", "embedding", "dora", "bias", "tied"])
def test_a_failure_at_any_step_leaves_the_model_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    model = case.model()
    writes = Writes(model)
    live = read_model(model)
    ranks = mixed_ranks(live, drop=True)
    new = [shrunk(f, ranks[f.group or f.name]) for f in live.factors]
    before, out, weights = state(model), output(model, case.x()), copy.deepcopy(model.state_dict())
    writes.watch_modules(monkeypatch)
    for writes.allowed in range(1, 1000):
        writes.done = 0
        try:
            live.replace(new)
        except Injected:
            writes.done = -(10**6)
        else:
            break
        assert state(model) == before
        assert list(model.state_dict()) == list(weights)
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        assert torch.equal(output(model, case.x()), out)
    assert writes.allowed == writes.done + 1 > 10
    assert model.peft_config["default"].alpha_pattern == model.peft_config["default"].rank_pattern
    assert not torch.equal(output(model, case.x()), out)


def test_a_failed_config_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CASES["linear"].model()
    before = state(model)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ParaError("no such config")

    monkeypatch.setattr("para_ext.models.unit_scale_config", refuse)
    with pytest.raises(ParaError, match="no such config"):
        compress(model)
    assert state(model) == before


# --- scale, dtype, adapters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_the_users_multiplier_survives(rslora: bool) -> None:
    case = CASES["linear"]
    model = case.model(use_rslora=rslora)
    layer = model.base_model.model.mid
    layer.set_scale("default", 0.5)
    before = output(model, case.x())
    live = read_model(model)
    live.replace([replace(f, B=f.scale * f.B, scale=1.0) for f in live.factors])
    assert layer.scaling["default"] == 0.5
    assert same(output(model, case.x()), before)
    layer.set_scale("default", 1.0)
    assert layer.scaling["default"] == 1.0


def test_alpha_zero_is_no_update() -> None:
    case = CASES["linear"]
    model = case.model(lora_alpha=0)
    base = output(case.fresh_base(), case.x())
    compress(model)
    assert same(output(model, case.x()), base)


def test_scaling_held_as_a_tensor_for_hotswapping() -> None:
    case = CASES["linear"]
    model = case.model()
    layer = model.base_model.model.up
    layer.scaling["default"] = torch.tensor(3.0)
    compress(model)
    assert isinstance(layer.scaling["default"], Tensor) and layer.scaling["default"].item() == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_grad_and_mode_are_kept(dtype: torch.dtype) -> None:
    model = CASES["linear"].model().to(dtype).train()
    for p in model.base_model.model.mid.lora_A.parameters():
        p.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    compress(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(m.training for m in model.modules())


def test_the_asked_dtype_is_written_with_storage_of_its_own() -> None:
    model = CASES["linear"].model()
    live = read_model(model)
    arena = torch.zeros(1000, dtype=torch.float32)
    new = []
    for f in live.factors:
        k = shrunk(f, 2)
        A = arena[: k.A.numel()].view(k.A.shape).copy_(k.A)
        new.append(replace(k, A=A, B=k.B.float()))
    live.replace(new)
    for p in (p for n, p in model.named_parameters() if ".lora_" in n):
        assert p.dtype == torch.float32
        assert p.untyped_storage().nbytes() == p.numel() * 4
        assert p.untyped_storage().data_ptr() != arena.untyped_storage().data_ptr()


def test_replacing_in_inference_mode_leaves_trainable_parameters() -> None:
    model = CASES["linear"].model()
    with torch.inference_mode():
        compress(model)
    assert not any(p.is_inference() for p in model.parameters())
    model(CASES["linear"].x()).sum().backward()


def two_adapters() -> Any:
    model = CASES["linear"].model()
    config = peft.LoraConfig(r=3, lora_alpha=9, target_modules=["up", "mid"], init_lora_weights=False)
    model.add_adapter("other", config)
    return model.to(torch.float64)


@pytest.mark.parametrize("chosen", ["default", "other"])
def test_only_the_chosen_adapter_changes(chosen: str) -> None:
    model = two_adapters()
    kept = "other" if chosen == "default" else "default"
    x = CASES["linear"].x()
    model.set_adapter(kept)
    before, config = output(model, x), copy.deepcopy(vars(model.peft_config[kept]))
    weights = {n: (id(p), p.clone()) for n, p in model.named_parameters() if f".{kept}." in n}
    active = {path: layer.active_adapters for path, layer in lora_layers(model).items()}
    compress(model, chosen, drop=True)
    assert {path: layer.active_adapters for path, layer in lora_layers(model).items()} == active
    assert torch.equal(output(model, x), before)
    assert vars(model.peft_config[kept]) == config
    for n, p in model.named_parameters():
        assert n not in weights or (weights[n][0] == id(p) and torch.equal(weights[n][1], p))


def test_a_dropped_module_does_not_fall_back_on_another_adapter() -> None:
    model, case = two_adapters(), CASES["linear"]
    expected = wanted(case, case.model(), {"up": 0, "mid": 1, "down": 2})
    compress(model, "default", drop=True)
    assert same(output(model, case.x()), expected)
    with model.disable_adapter():
        assert same(output(model, case.x()), output(case.fresh_base(), case.x()))
    model.set_adapter("other")
    model.set_adapter("default")
    assert same(output(model, case.x()), expected)
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]


def test_the_active_adapter_is_the_default() -> None:
    model = two_adapters()
    model.set_adapter("other")
    live = read_model(model)
    assert live.adapter_name == "other" and {f.rank for f in live.factors} == {3}


def test_all_modules_dropped_leaves_one_zero_pair(tmp_path: Path) -> None:
    for name in ("linear", "attention", "experts"):
        case = CASES[name]
        model = case.model()
        live = read_model(model)
        live.replace([shrunk(f, 0) for f in live.factors])
        base = output(case.fresh_base(), case.x())
        assert same(output(model, case.x()), base)
        model.save_pretrained(tmp_path / name)
        again = peft.PeftModel.from_pretrained(case.fresh_base(), tmp_path / name).eval()
        assert torch.allclose(output(again, case.x()), base, atol=1e-6)
        left = {f.group or f.name for f in read_model(again).factors}
        assert len(left) == 1 and {f.rank for f in read_model(again).factors} == {1}


@pytest.mark.parametrize("dropped", ["gate_up_proj", "down_proj"])
def test_dropping_one_of_two_parameters_of_a_module_still_loads(dropped: str, tmp_path: Path) -> None:
    case = CASES["experts"]
    model = case.model()
    live = read_model(model)
    ranks = {f.group or f.name: 0 if dropped in f.name else 2 for f in live.factors}
    expected = wanted(case, model, ranks)
    live.replace([shrunk(f, ranks[f.group or f.name]) for f in live.factors])
    assert same(output(model, case.x()), expected)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(case.fresh_base(), tmp_path).to(torch.float64).eval()
    assert torch.allclose(output(again, case.x()), expected, rtol=1e-5, atol=1e-6)


# --- what is shared stays shared -------------------------------------------------------------------------------------


def test_grouped_convolution_pairs_are_the_layers_own_map() -> None:
    model = CASES["grouped"].model()
    layer = model.base_model.model.a
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    probes = torch.eye(6 * 9, dtype=torch.float64).view(-1, 6, 3, 3)
    with torch.no_grad():
        delta = B(A(probes)).flatten(1).T * layer.scaling["default"]
    pairs = [f for f in read_model(model).factors if f.group == "a"]
    assert [f.name for f in pairs] == ["a.0", "a.1"]
    assert torch.allclose(torch.cat([f.scale * f.B @ f.A for f in pairs]), delta)


def test_expert_pairs_are_the_wrappers_own_deltas() -> None:
    model = CASES["experts"].model()
    name = "model.layers.1.mlp.experts.gate_up_proj"
    pairs = [f for f in read_model(model).factors if f.group == name]
    assert [f.name for f in pairs] == [name.replace("gate", f"{e}.gate") for e in range(3)]
    wrapper = [w for w in lora_layers(model).values() if getattr(w, "parameter_name", "") == "gate_up_proj"][1]
    delta = wrapper.get_delta_weight("default").detach()
    assert torch.allclose(torch.stack([f.scale * f.B @ f.A for f in pairs]), delta)


def test_tied_embeddings_are_compressed_once_and_stay_tied() -> None:
    model = CASES["tied"].model()
    live = read_model(model)
    tied = [f for f in live.factors if f.group == "tied embeddings"]
    embedding, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    shared = head.lora_A["default"].weight.data_ptr() == embedding.lora_embedding_B["default"].data_ptr()
    assert len(tied) == (1 if shared else 2) and {f.min_rank for f in tied} == {1}
    compress(model)
    assert (head.lora_A["default"].weight.data_ptr() == embedding.lora_embedding_B["default"].data_ptr()) is shared
    delta = embedding.get_delta_weight("default")
    assert torch.allclose(head.get_delta_weight("default"), delta)


def test_tied_factors_that_share_storage() -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    model = peft.get_peft_model(tiny_llama(tie_word_embeddings=True), config)
    randomize(model)
    assert [f.name for f in read_model(model).factors if f.group] == ["model.embed_tokens"]
    embedding, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    compress(model)
    assert head.lora_A["default"].weight.data_ptr() == embedding.lora_embedding_B["default"].data_ptr()
    assert head.lora_B["default"].weight.data_ptr() == embedding.lora_embedding_A["default"].data_ptr()
    assert torch.equal(head.lora_A["default"].weight, embedding.lora_embedding_B["default"].T)
    assert head.r == embedding.r == head.lora_alpha


def test_one_layer_under_two_names_is_read_once() -> None:
    model = peft.get_peft_model(mlp(), peft.LoraConfig(target_modules=["up", "down"], init_lora_weights=False))
    inner = model.base_model.model
    inner.again = inner.up
    assert [f.name for f in read_model(model).factors] == ["up", "down"]
    compress(model)
    assert inner.again is inner.up and inner.up.r == {"default": 1}


def test_shared_parameters_stay_one() -> None:
    base = Net(a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["a", "b"], init_lora_weights=False))
    a, b = model.base_model.model.a, model.base_model.model.b
    b.lora_A["default"].weight, b.lora_B["default"].weight = a.lora_A["default"].weight, a.lora_B["default"].weight
    assert [f.name for f in read_model(model).factors] == ["a"]
    compress(model)
    assert b.lora_A["default"].weight is a.lora_A["default"].weight and b.r == a.r == {"default": 1}
    assert b.lora_B["default"].in_features == 1

    b.lora_B["default"].weight = nn.Parameter(a.lora_B["default"].weight.detach().clone())
    with pytest.raises(ParaError, match="'b' shares one factor with 'a'"):
        read_model(model)
    b.lora_B["default"].weight = a.lora_B["default"].weight
    b.lora_alpha["default"] = 5
    with pytest.raises(ParaError, match="'b' shares its factors with 'a' but not scale"):
        read_model(model)


# --- other ways to hold LoRA layers ----------------------------------------------------------------------------------


class Quantized(nn.Linear):
    """A base layer whose stored weight is codes; any write to it would be a defect."""

    def __init__(self) -> None:
        super().__init__(12, 10, bias=False)
        self.weight = nn.Parameter(torch.randint(-8, 8, (10, 12), dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) / 8).T


def test_quantized_base_layers_are_not_touched() -> None:
    torch.manual_seed(0)
    base = Net(q=Quantized())
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q"], init_lora_weights=False))
    weight = model.base_model.model.q.base_layer.weight
    version, before = weight._version, weight.clone()
    compress(model)
    now = model.base_model.model.q.base_layer.weight
    assert now is weight and now._version == version and torch.equal(now, before)
    assert torch.isfinite(output(model, torch.randn(3, 12))).all()


def test_modules_to_save_are_not_touched() -> None:
    model = CASES["bert"].model()
    saved = {n: (id(p), p.clone()) for n, p in model.named_parameters() if "classifier" in n}
    assert any("modules_to_save" in n for n in saved)
    compress(model, drop=True)
    assert {n: id(p) for n, p in model.named_parameters() if "classifier" in n} == {n: i for n, (i, _) in saved.items()}
    assert all(torch.equal(p, saved[n][1]) for n, p in model.named_parameters() if "classifier" in n)


def test_trained_biases_keep_their_module() -> None:
    model = CASES["linear"].model(bias="lora_only")
    assert {f.min_rank for f in read_model(model).factors} == {1}


def test_a_zero_lora_bias_does_not_keep_its_module() -> None:
    model = CASES["bias"].model()
    with torch.no_grad():
        model.base_model.model.up.lora_B["default"].bias.zero_()
    assert {f.name: f.min_rank for f in read_model(model).factors} == {"up": 0, "mid": 1, "down": 1}


def test_dora_magnitudes_stay() -> None:
    model = CASES["dora"].model()
    magnitudes = {n: (id(p), p.clone()) for n, p in model.named_parameters() if "magnitude" in n}
    compress(model, drop=True)
    now = {n: p for n, p in model.named_parameters() if "magnitude" in n}
    assert now.keys() == magnitudes.keys() and all(torch.equal(p, magnitudes[n][1]) for n, p in now.items())
    assert {f.min_rank for f in read_model(model).factors} == {1}


def test_dora_caches_are_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    dora = pytest.importorskip("peft.tuners.lora.dora")
    if not hasattr(dora, "ENABLE_DORA_CACHING"):
        pytest.skip("this PEFT does not cache")
    case = CASES["dora"]
    model = case.model()
    expected = wanted(case, model, mixed_ranks(read_model(model)))
    monkeypatch.setattr(dora, "ENABLE_DORA_CACHING", True)
    output(model, case.x())
    compress(model)
    assert same(output(model, case.x()), expected)


def test_layers_injected_into_a_plain_model() -> None:
    case = CASES["linear"]
    config = peft.LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, case.fresh_base()).to(torch.float64)
    ranks = compress(model, drop=True)
    assert ranks == {"up": 0, "down": 1}
    again = peft.inject_adapter_in_model(model.peft_config["default"], case.fresh_base())
    assert {path: layer.r for path, layer in lora_layers(again).items()} == {"down": {"default": 1}}


def test_two_peft_models_in_one() -> None:
    case = CASES["linear"]
    both = nn.ModuleDict({"first": case.model(), "second": case.model()})
    live = read_model(both)
    assert [f.name for f in live.factors] == [f"{m}.{n}" for m in ("first", "second") for n in ("up", "mid", "down")]
    live.replace([shrunk(f, 1 if f.name.startswith("first") else 2) for f in live.factors])
    assert [both[m].peft_config["default"].r for m in ("first", "second")] == [1, 2]
    x = case.x()
    for m, k in (("first", 1), ("second", 2)):
        assert same(output(both[m], x), wanted(case, case.model(), dict.fromkeys(("up", "mid", "down"), k)))


def test_transformers_own_adapters() -> None:
    model = tiny_llama()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    assert compress(model, drop=True) == {"model.layers.0.self_attn.q_proj": 0, "model.layers.1.self_attn.q_proj": 1}
    assert torch.isfinite(output(model, tokens())).all()


class OwnLinear(nn.Linear):
    """A linear layer in the style of loralib: factors are its own parameters, `eval` merges."""

    def __init__(self, n: int, m: int, r: int, alpha: int) -> None:
        super().__init__(n, m)
        self.r, self.lora_alpha, self.scaling, self.merged = r, alpha, alpha / r, False
        self.lora_A = nn.Parameter(torch.randn(r, n))
        self.lora_B = nn.Parameter(torch.randn(m, r))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T * self.scaling


class OwnMerged(OwnLinear):
    """Three projections in one, of which two have factors: a grouped 1×1 convolution of A's rows."""

    def __init__(self, n: int, m: int, r: int, alpha: int) -> None:
        super().__init__(n, 3 * m, r, alpha)
        self.enable_lora = [True, False, True]
        self.lora_A = nn.Parameter(torch.randn(2 * r, n))
        self.lora_B = nn.Parameter(torch.randn(2 * m, r))

    def delta(self) -> Tensor:
        out = nn.functional.conv1d(self.lora_A[None], self.lora_B[..., None], groups=2)[0] * self.scaling
        first, last = out.chunk(2)
        return torch.cat([first, torch.zeros_like(first), last])

    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x) + x @ self.delta().T


def own_model() -> Net:
    torch.manual_seed(0)
    return Net(a=OwnLinear(8, 6, 4, 6), b=OwnLinear(6, 7, 2, 2), qkv=OwnMerged(7, 5, 3, 5)).double()


def test_modules_with_factors_of_their_own() -> None:
    model = own_model()
    x = torch.randn(4, 8, dtype=torch.float64)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for layer, k in ((expected.a, 0), (expected.b, 1)):
            B, A = truncated(layer.scaling * layer.lora_B @ layer.lora_A, k)
            layer.weight += B @ A
            layer.scaling = 0.0
        blocks = expected.qkv.delta().chunk(3)
        expected.qkv.weight += torch.cat([torch.matmul(*truncated(d, 2)) for d in blocks])
        expected.qkv.scaling = 0.0
    live = read_model(model)
    assert live.adapter_name is None
    assert [(f.name, f.group) for f in live.factors] == [("a", None), ("b", None), ("qkv.0", "qkv"), ("qkv.1", "qkv")]
    live.replace([shrunk(f, k) for f, k in zip(live.factors, (0, 1, 2, 2), strict=True)])
    assert same(output(model, x), output(expected, x))
    assert [(m.r, m.lora_alpha, m.scaling) for m in (model.a, model.b)] == [(1, 1, 1.0)] * 2
    assert (model.qkv.r, model.qkv.lora_alpha, model.qkv.scaling) == (2, 2, 1.0)
    assert not model.a.lora_A.any() and model.a.lora_A.shape == (1, 8)
    assert isinstance(model.b.lora_A, nn.Parameter) and model.b.lora_A.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.a, "merged", True), "'a' has its factors merged.*model.train"),
        (lambda m: setattr(m.a, "r", 3), "'a': a OwnLinear with lora_A .* of no known kind"),
        (lambda m: setattr(m.a, "scaling", None), "'a': a OwnLinear .* scaling None"),
        (lambda m: setattr(m.qkv, "enable_lora", [True] * 3), "'qkv': a OwnMerged"),
    ],
)
def test_unknown_modules_with_factors_of_their_own_are_refused(change: Callable[[Net], None], message: str) -> None:
    model = own_model()
    change(model)
    with pytest.raises(ParaError, match=message):
        read_model(model)


# --- refusals --------------------------------------------------------------------------------------------------------


def linear() -> Any:
    return CASES["linear"].model()


def several_active() -> Any:
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    return model


def none_active() -> Any:
    model = linear()
    for layer in lora_layers(model).values():
        layer._active_adapter = []
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["up"]))
    for layer in lora_layers(model).values():
        layer._active_adapter = []
    return model


def merged() -> Any:
    model = linear()
    model.merge_adapter()
    return model


def other_type(config: Any) -> Any:
    return peft.get_peft_model(CASES["linear"].fresh_base(), config)


def prompt_tuning() -> Any:
    return peft.get_peft_model(tiny_llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def no_config() -> Any:
    model = other_type(peft.LoKrConfig(target_modules=["up"])).base_model.model
    del model.peft_config
    return model


def pissa() -> Any:
    return peft.get_peft_model(mlp(), peft.LoraConfig(r=4, target_modules=["up"], init_lora_weights="pissa"))


def on_meta() -> Any:
    with torch.device("meta"):
        return peft.get_peft_model(mlp(), peft.LoraConfig(r=4, target_modules=["up"], lora_bias=True))


def offloaded() -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(linear(), execution_device=torch.device("cpu"))


def zero3() -> Any:
    model = linear()
    model.base_model.model.up.lora_A["default"].weight.ds_id = 7
    return model


def fsdp() -> Any:
    model = linear()
    model.base_model.model.up.lora_A["default"].weight._fsdp_flattened = True
    return model


class FullyShardedDataParallel(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def tensor_parallel() -> Any:
    model = linear()
    model.base_model.model.up._tp_info = object()
    return model


def parametrized() -> Any:
    model = linear()
    torch.nn.utils.parametrizations.weight_norm(model.base_model.model.up.lora_A["default"])
    return model


def variant() -> Any:
    model = linear()
    model.base_model.model.up.lora_variant["default"] = type("ArrowLinearVariant", (), {})()
    return model


@pytest.mark.parametrize(
    ("build", "adapter", "message"),
    [
        (mlp, None, "the model has no LoRA layers"),
        (mlp, "x", "'x' has no LoRA layers"),
        (own_model, "x", "no adapter 'x'"),
        (linear, "x", "no adapter 'x' in the model: it has 'default'"),
        (two_adapters, "x", "it has 'default', 'other'"),
        (several_active, None, "'default', 'other': choose one with adapter_name"),
        (none_active, None, "choose one with adapter_name"),
        (merged, None, r"merged into module 'up': call model.unmerge_adapter\(\)"),
        (lambda: other_type(peft.LoKrConfig(target_modules=["up"])), None, "of type LOKR"),
        (lambda: other_type(peft.IA3Config(target_modules=["up"], feedforward_modules=[])), None, "of type IA3"),
        (lambda: other_type(peft.AdaLoraConfig(target_modules=["up"], total_step=10)), None, "of type ADALORA"),
        (prompt_tuning, None, "of type PROMPT_TUNING"),
        (no_config, None, "adapter 'default' has no LoRA layers"),
        (pissa, None, "initialized with 'pissa'.*path_initial_model_for_weight_conversion"),
        (on_meta, None, "'up': its factors hold no data.*load the whole model"),
        (offloaded, None, "offloaded"),
        (zero3, None, "'up': .*ZeRO-3"),
        (fsdp, None, "'up': .*FSDP"),
        (lambda: FullyShardedDataParallel(linear()), None, "'model' is a FullyShardedDataParallel"),
        (tensor_parallel, None, "'up' is sharded by tensor parallelism"),
        (parametrized, None, "'up': its lora_A is a .*Linear without a weight of its own"),
        (variant, None, "'up' is adapted by ArrowLinear"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refused(build: Callable[[], Any], adapter: str | None, message: str) -> None:
    model = build()
    with pytest.raises(ParaError, match=message) as error:
        read_model(model, adapter)
    assert "\n" not in str(error.value)


def test_sharded_by_dtensor_is_refused() -> None:
    distributed = pytest.importorskip("torch.distributed")
    tensor = pytest.importorskip("torch.distributed.tensor")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        model = linear()
        weight = model.base_model.model.up.lora_A["default"].weight
        sharded = tensor.distribute_tensor(weight.detach(), mesh, [tensor.Shard(0)])
        model.base_model.model.up.lora_A["default"].weight = nn.Parameter(sharded)
        with pytest.raises(ParaError, match="'up': its factors are sharded"):
            read_model(model)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda new: new[::-1], "not those of this adapter's modules"),
        (lambda new: new[:-1], "not those of this adapter's modules"),
        (lambda new: [replace(f, scale=2.0) for f in new], "at scale 2.0"),
        (lambda new: [replace(f, B=f.B[1:]) for f in new], "do not fit"),
        (lambda new: [replace(f, A=f.A[1:]) for f in new], "do not fit"),
    ],
)
def test_new_factors_that_do_not_fit_are_refused(change: Callable[[Any], Any], message: str) -> None:
    model = linear()
    before = state(model)
    live = read_model(model)
    with pytest.raises(ParaError, match=message):
        live.replace(change([shrunk(f, 2) for f in live.factors]))
    assert state(model) == before


def test_ranks_of_a_group_must_agree_and_min_rank_holds() -> None:
    live = read_model(CASES["attention"].model())
    with pytest.raises(ParaError, match="group 'attn' needs one rank"):
        live.replace([shrunk(f, i + 1) for i, f in enumerate(live.factors)])
    live = read_model(CASES["dora"].model())
    with pytest.raises(ParaError, match="'up' needs a rank of 1 or more, not 0"):
        live.replace([shrunk(f, 0) for f in live.factors])


def test_a_second_replace_needs_a_second_read() -> None:
    model = linear()
    live = read_model(model)
    new = [shrunk(f, 2) for f in live.factors]
    live.replace(new)
    with pytest.raises(ParaError, match="call read_model again"):
        live.replace(new)
    live = read_model(model)
    live.replace([shrunk(f, 0 if f.name == "up" else 1) for f in live.factors])
    with pytest.raises(ParaError, match="call read_model again"):
        live.replace(new)


def test_a_deleted_adapter_is_not_written() -> None:
    model = two_adapters()
    live = read_model(model, "default")
    model.delete_adapter("default")
    with pytest.raises(ParaError, match="call read_model again"):
        live.replace([shrunk(f, 1) for f in live.factors])
    assert all("default" not in layer.r for layer in lora_layers(model).values())


def test_peft_is_not_imported() -> None:
    code = "import sys, para_ext.models; sys.exit(any(m in sys.modules for m in ('peft', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_bias_follows_the_factors_into_another_dtype() -> None:
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 6)), peft.LoraConfig(r=4, target_modules=["0"], lora_bias=True)
    )
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    nn.init.normal_(model.base_model.model[0].lora_B["default"].bias)
    live = read_model(model)
    live.replace([LoraFactors(f.name, f.B[:, :2].bfloat16(), f.A[:2].bfloat16()) for f in live.factors])
    assert model.base_model.model[0].lora_B["default"].bias.dtype == torch.bfloat16
    model(torch.randn(3, 8))


def test_freed_factors_are_refused() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), peft.LoraConfig(r=4, target_modules=["0"]))
    model.base_model.model[0].lora_A["default"].weight.untyped_storage().resize_(0)
    with pytest.raises(ParaError, match="hold no data"):
        read_model(model)
