"""PEFT folders: every kind of layer against the installed PEFT, end to end, and every refusal."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CODES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from para_ext.errors import ParaError
from para_ext.factors import LoraFactors, as_tensors, check_factors
from para_ext.formats import PeftAdapter, read_adapter, read_peft
from para_ext.formats.output import CONFIG, PICKLED, WEIGHTS
from para_ext.formats.tensors import read_tensors

peft = pytest.importorskip("peft", reason="PEFT writes and loads the adapters")

P = "base_model.model."


class Experts(nn.Module):
    def __init__(self, first: str = "gate_up_proj", second: str = "down_proj") -> None:
        super().__init__()
        self.names = first, second
        self.register_parameter(first, nn.Parameter(torch.randn(3, 10, 6)))
        self.register_parameter(second, nn.Parameter(torch.randn(3, 6, 10)))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (getattr(self, name) for name in self.names)
        return torch.einsum("...eo,eio->...i", torch.einsum("...i,eoi->...eo", x, up).tanh(), down)


class Zoo(nn.Module):
    """Every kind of layer that PEFT adapts."""

    def __init__(self, **experts: str) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.lin = nn.Linear(6, 6)
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.experts = Experts(**experts)
        self.c1, self.c2, self.c3 = nn.Conv1d(6, 6, 3, padding=1), nn.Conv2d(1, 4, 3), nn.Conv3d(1, 2, (1, 2, 2))
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.experts(self.attn(*[self.lin(self.emb(tokens))] * 3)[0])
        image = self.c1(x.mT)[:, None]
        return torch.cat([self.grouped(self.c2(image)).flatten(1), self.c3(image[:, None]).flatten(1)], 1)


KINDS = {"emb": 1, "lin": 1, "attn": 1, "c1": 1, "c2": 1, "c3": 1, "grouped": 2}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def build(seed: int = 0, **experts: str) -> Zoo:
    torch.manual_seed(seed)
    return Zoo(**experts).eval()


def adapt(base: nn.Module, **config: Any) -> Any:
    """The model with random LoRA factors; the base is left as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def save(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def load(base: nn.Module, folder: Path, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?!.*missing adapter keys)")
        warnings.filterwarnings("error", message=".*missing adapter keys")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder), **kwargs).eval()


def truncate(f: LoraFactors, k: int) -> LoraFactors:
    """The best rank-k approximation, by the dense SVD in float64, scale folded in."""
    U, S, Vh = torch.linalg.svd(f.scale * f.B.double() @ f.A.double(), full_matrices=False)
    B, A = U[:, :k] * S[:k].sqrt(), S[:k, None].sqrt() * Vh[:k]
    return LoraFactors(f.name, B.to(f.B.dtype), A.to(f.A.dtype), 1.0, f.group)


def factors_of(adapter: PeftAdapter) -> list[LoraFactors]:
    """With tensors, which numpy arrays of bfloat16 cannot be compared to."""
    return [as_tensors(f) for f in adapter.factors]


def write(adapter: PeftAdapter, out: Path, rank: Callable[[LoraFactors], int]) -> Path:
    new = [truncate(f, rank(f)) for f in factors_of(adapter)]
    metadata = json.dumps({"version": "1", "ä": 0})
    written = adapter.write(out, new, metadata=metadata, sidecar=lambda _: {"b": 1})
    assert written.size == (out / WEIGHTS).stat().st_size
    if any(f.rank for f in new):
        assert written.size == adapter.layout(metadata=metadata).bytes({f.name: f.rank for f in new})
    assert json.loads((out / "para_ext.json").read_text())["b"] == 1
    return out


def ranks_in(model: Any) -> dict[str, int]:
    """Rank by module as PEFT injected it."""
    tuned = peft.tuners.lora.LoraLayer
    return {name.removeprefix(P): m.r["default"] for name, m in model.named_modules() if isinstance(m, tuned)}


TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 1]])


@pytest.mark.parametrize("low_cpu", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_every_kind_of_layer_at_rank_one(tmp_path: Path, rslora: bool, low_cpu: bool) -> None:
    """Members that have rank 1 are written at rank 1 without loss, so the model's output stays."""
    base = build()
    model = adapt(base, r=4, lora_alpha=3, use_rslora=rslora, target_modules=list(KINDS), target_parameters=PARAMETERS)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_embedding_A" in name:
            members = 3 if "experts" in name else 2 if "grouped" in name else 1
            keep = torch.zeros(parameter.shape[0])
            keep[:: parameter.shape[0] // members] = 1
            parameter.data *= keep.reshape(-1, *[1] * (parameter.ndim - 1))
    expected = model(TOKENS)
    assert (expected - base(TOKENS)).abs().max() > 0.1
    adapter = read_adapter(save(model, tmp_path / "adapter"))
    check_factors(adapter.factors)
    out = write(adapter, tmp_path / "out", lambda f: 1)
    small = load(base, out, low_cpu_mem_usage=low_cpu)
    torch.testing.assert_close(small(TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert {name: r for name, r in ranks_in(small).items() if r != 1} == {"grouped": 2}
    again = read_peft(out)
    assert {f.scale for f in factors_of(again)} <= {1.0}
    assert [f.name for f in factors_of(again)] == [f.name for f in factors_of(adapter)]


def test_full_rank_keeps_the_output(tmp_path: Path) -> None:
    base = build()
    model = adapt(base, r=4, lora_alpha=3, target_modules=list(KINDS), target_parameters=PARAMETERS,
                  rank_pattern={"lin": 2, "grouped": 6, "experts.down_proj": 3}, alpha_pattern={"c1": 7})  # fmt: skip
    adapter = read_peft(save(model, tmp_path / "adapter"))
    out = write(adapter, tmp_path / "out", lambda f: min(f.rank, f.m, f.n))
    torch.testing.assert_close(load(base, out)(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
    for f, g in zip(factors_of(adapter), factors_of(read_peft(out)), strict=True):
        torch.testing.assert_close(g.B @ g.A, f.scale * f.B @ f.A, rtol=1e-4, atol=1e-4)


def test_names_groups_and_views(tmp_path: Path) -> None:
    model = adapt(build(), r=4, lora_alpha=8, target_modules=list(KINDS), target_parameters=PARAMETERS)
    adapter = read_peft(save(model, tmp_path / "adapter"))
    by_name = {f.name: f for f in factors_of(adapter)}
    experts = [f"experts.{e}.{leaf}" for e in range(3) for leaf in ("gate_up_proj", "down_proj")]
    assert sorted(by_name) == sorted(
        [*(KINDS.keys() - {"grouped"}), "attn.out_proj", "grouped.0", "grouped.1", *experts]
    )
    assert by_name["grouped.0"].group == by_name["grouped.1"].group == "grouped"
    assert by_name["attn"].group == by_name["attn.out_proj"].group == "attn"
    assert {by_name[name].group for name in experts} == set(PARAMETERS)
    assert {f.name for f in factors_of(adapter) if f.group is None} == {"emb", "lin", "c1", "c2", "c3"}
    assert {f.scale for f in factors_of(adapter)} == {2.0}
    stored = {x.ctypes.data for s in adapter.slots for x in (s.A, s.B)}
    assert {by_name["grouped.0"].A.data_ptr(), by_name["experts.0.down_proj"].B.data_ptr()} <= stored
    layer = model.base_model.model.experts
    for leaf, wrapper in (("down_proj", layer), ("gate_up_proj", layer.base_layer)):
        assert wrapper.parameter_name == leaf
        delta = wrapper.get_delta_weight("default")
        for e in range(3):
            f = by_name[f"experts.{e}.{leaf}"]
            torch.testing.assert_close(f.scale * f.B @ f.A, delta[e], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("low_cpu", [False, True])
@pytest.mark.parametrize(
    "dropped", [["lin", "attn"], ["gate_up_proj"], ["down_proj"], ["proj"], ["emb", "grouped", "c3"]]
)
def test_dropped_modules_are_not_injected(tmp_path: Path, dropped: list[str], low_cpu: bool) -> None:
    base = build()
    model = adapt(base, r=4, lora_alpha=4, target_modules=list(KINDS), target_parameters=PARAMETERS)
    adapter = read_peft(save(model, tmp_path / "adapter"))

    def gone(f: LoraFactors) -> bool:
        return any(word in f.name.replace("out_proj", "") for word in dropped)

    out = write_any(adapter, tmp_path / "out", lambda f: 0 if gone(f) else min(f.rank, f.m, f.n))
    zeros = [LoraFactors(f.name, f.B * (0 if gone(f) else 1), f.A, f.scale, f.group) for f in factors_of(adapter)]
    same = load(base, write_any(adapter, tmp_path / "zeros", zeros))
    small = load(base, out, low_cpu_mem_usage=low_cpu)
    torch.testing.assert_close(small(TOKENS), same(TOKENS), rtol=1e-4, atol=1e-4)
    assert len(ranks_in(small)) == len(ranks_in(same)) - sum(
        all(gone(f) for f in slot.members) for slot in adapter.slots
    )


def write_any(adapter: PeftAdapter, out: Path, new: Any) -> Path:
    factors = [truncate(f, new(f)) for f in factors_of(adapter)] if callable(new) else new
    adapter.write(out, factors, metadata="{}", sidecar=lambda _: {})
    return out


def test_parameters_of_unknown_order_share_one_rank(tmp_path: Path) -> None:
    base = build(first="w1", second="w2")
    config: dict[str, Any] = {"r": 2, "target_modules": [], "target_parameters": ["experts.w1", "experts.w2"]}
    model = adapt(base, **config)
    adapter = read_peft(save(model, tmp_path / "adapter"))
    assert {f.group for f in factors_of(adapter)} == {"experts"}
    out = write(adapter, tmp_path / "out", lambda f: 2)
    torch.testing.assert_close(load(base, out)(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
    several = adapt(base, **config, rank_pattern={"experts.w1": 4})
    with pytest.raises(ParaError, match=r"experts\.w.*A is.*"):
        read_peft(save(several, tmp_path / "several"))


def test_a_two_dimensional_parameter(tmp_path: Path) -> None:
    base = build()
    model = adapt(base, r=3, lora_alpha=6, target_modules=["c1"], target_parameters=["lin.weight"])
    adapter = read_peft(save(model, tmp_path / "adapter"))
    assert [f.name for f in factors_of(adapter)] == ["c1", "lin.weight"]
    out = write(adapter, tmp_path / "out", lambda f: 2 if f.name == "c1" else 3)
    torch.testing.assert_close(load(base, out).lin.get_delta_weight("default"), model.lin.get_delta_weight("default"))


def test_nothing_kept_is_one_pair_of_zeros(tmp_path: Path) -> None:
    base = build()
    adapter = read_peft(save(adapt(base, r=4, target_modules=list(KINDS)), tmp_path / "adapter"))
    out = write(adapter, tmp_path / "out", lambda f: 0)
    tensors = load_file(out / WEIGHTS)
    assert set(tensors) == {f"{P}attn{inner}.lora_{x}.weight" for inner in ("", ".base_layer.out_proj") for x in "AB"}
    assert not any(t.any() for t in tensors.values())
    torch.testing.assert_close(load(base, out, low_cpu_mem_usage=True)(TOKENS), base(TOKENS))


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(12))
        self.vision = nn.ModuleDict({"layers": copy.deepcopy(self.layers)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, *self.vision.get_submodule("layers").children()):
            x = x + layer["q"](x) * layer["v"](x).tanh()
        return x


@pytest.mark.parametrize("low_cpu", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_two_towers(tmp_path: Path, old: bool, low_cpu: bool) -> None:
    torch.manual_seed(0)
    base = Towers()
    folder = save(adapt(base, r=3, lora_alpha=6, target_modules=["q", "v"]), tmp_path / "adapter")
    if old:
        config = json.loads((folder / CONFIG).read_text())
        kept = ("r", "lora_alpha", "peft_type", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")
        (folder / CONFIG).write_text(json.dumps({key: config[key] for key in kept}))
    adapter = read_peft(folder)
    ranks = {f.name: i % 4 for i, f in enumerate(factors_of(adapter))}
    out = write(adapter, tmp_path / "out", lambda f: ranks[f.name])
    small = load(base, out, low_cpu_mem_usage=low_cpu)
    assert ranks_in(small) == {name: rank for name, rank in ranks.items() if rank}
    assert small(torch.ones(1, 4)).isfinite().all()
    new = json.loads((out / CONFIG).read_text())
    assert ("exclude_modules" in new) != old
    assert new["alpha_pattern"] == new["rank_pattern"]


def test_llama_with_heads_and_bias(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="a real model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    base = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**sizes, vocab_size=32, attention_bias=True, pad_token_id=0)
    ).eval()
    model = adapt(
        base, r=4, lora_alpha=8, task_type="SEQ_CLS", bias="lora_only", target_modules=["q_proj", "down_proj"]
    )
    folder = save(model, tmp_path / "adapter")
    adapter = read_peft(folder)
    # The biases of adapted layers are stored under base_layer, so those layers must stay.
    assert {f.min_rank for f in factors_of(adapter) if "q_proj" in f.name} == {1}
    assert {f.min_rank for f in factors_of(adapter) if "down_proj" in f.name} == {0}
    out = write(adapter, tmp_path / "out", lambda f: 1 if "q_proj" in f.name else 0)
    new, old = load_file(out / WEIGHTS), load_file(folder / WEIGHTS)
    foreign = [key for key in old if "lora_" not in key]
    assert f"{P}score.weight" in foreign
    assert all(torch.equal(new[key], old[key]) for key in foreign)
    small = load(base, out, low_cpu_mem_usage=True)
    assert set(ranks_in(small)) == {f"model.layers.{i}.self_attn.q_proj" for i in range(3)}
    assert json.loads((out / CONFIG).read_text())["target_modules"] == ["q_proj"]


def test_dora_and_lora_bias(tmp_path: Path) -> None:
    base = build()
    model = adapt(base, r=4, lora_alpha=8, target_modules=["lin", "c1"], use_dora=True)
    adapter = read_peft(save(model, tmp_path / "dora"))
    assert {f.min_rank for f in factors_of(adapter)} == {1}
    out = write(adapter, tmp_path / "out", lambda f: 4)
    torch.testing.assert_close(load(base, out)(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)

    model = adapt(base, r=4, lora_alpha=8, target_modules=["lin", "c1", "attn"], lora_bias=True)
    model.base_model.model.lin.lora_B["default"].bias.data.zero_()
    adapter = read_peft(save(model, tmp_path / "bias"))
    assert {f.name: f.min_rank for f in factors_of(adapter)} == {"lin": 0, "c1": 1, "attn": 1, "attn.out_proj": 1}
    model = adapt(base, r=4, lora_alpha=8, target_modules=["lin", "c1"], lora_bias=True)
    adapter = read_peft(save(model, tmp_path / "bias2"))
    out = write(adapter, tmp_path / "biased", lambda f: 4)
    torch.testing.assert_close(load(base, out)(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)


def test_tied_embeddings_share_one_rank(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="a real model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                                      vocab_size=32, tie_word_embeddings=True)  # fmt: skip
    base = transformers.LlamaForCausalLM(config).eval()
    targets = ["embed_tokens", "q_proj"]
    model = adapt(base, r=4, lora_alpha=8, target_modules=targets, ensure_weight_tying=True)
    adapter = read_peft(save(model, tmp_path / "adapter"))
    groups = {f.name: (f.group, f.min_rank) for f in factors_of(adapter) if "q_proj" not in f.name}
    assert groups == dict.fromkeys(("lm_head", "model.embed_tokens"), ("model.embed_tokens", 1))
    out = write(adapter, tmp_path / "out", lambda f: 4 if "q_proj" in f.name else 2)
    assert ranks_in(load(base, out)) == {
        "lm_head": 2, "model.embed_tokens": 2, "model.layers.0.self_attn.q_proj": 4
    }  # fmt: skip


# --- files as they come ----------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "v"]}


def pair(name: str = "q", r: int = 2, m: int = 5, n: int = 3, suffix: str = "weight") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(name))
    A, B = torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator)
    return {f"{P}{name}.lora_A.{suffix}": A, f"{P}{name}.lora_B.{suffix}": B}


def folder_of(path: Path, tensors: Mapping[str, Tensor] | None = None, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / CONFIG).write_text(json.dumps(GOOD | config))
    save_file(dict(pair() if tensors is None else tensors), path / WEIGHTS, {"format": "pt", "origin": "test"})
    return path


def test_the_first_version_of_peft(tmp_path: Path) -> None:
    adapter = read_peft(folder_of(tmp_path / "a"))
    assert [(f.name, f.rank, f.scale) for f in factors_of(adapter)] == [("q", 2, 2.0)]
    assert adapter.new_config({"q": 1}) == GOOD | {"r": 1, "lora_alpha": 1}
    adapter.write(tmp_path / "out", factors_of(adapter), metadata="{}", sidecar=lambda _: {})
    again = read_peft(tmp_path / "out")
    assert again.metadata == {"format": "pt", "origin": "test", "para_ext": "{}"}
    assert torch.equal(factors_of(again)[0].B, 2 * factors_of(adapter)[0].B)
    assert torch.equal(factors_of(again)[0].A, factors_of(adapter)[0].A)


def test_patterns_of_older_releases_are_read_by_their_rules(tmp_path: Path) -> None:
    """Up to 0.14 a key that is an expression matches only after a dot: here not the module 'q'."""
    tensors = pair("q", r=2) | pair("m.q", r=4)
    adapter = read_peft(folder_of(tmp_path / "a", tensors, rank_pattern={"m.q": 4}, alpha_pattern={"m.q": 16}))
    assert {f.name: f.scale for f in factors_of(adapter)} == {"q": 2.0, "m.q": 4.0}
    adapter = read_peft(folder_of(tmp_path / "a", tensors, rank_pattern={"[qk]": 4}))
    assert {f.name: f.scale for f in factors_of(adapter)} == {"q": 2.0, "m.q": 1.0}


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_tensors(tmp_path: Path, legacy: bool) -> None:
    folder = folder_of(tmp_path / "a")
    tensors = pair() | {f"{P}head.weight": torch.ones(4, 4).T, f"{P}head.copy": torch.ones(4)}
    tensors[f"{P}head.copy"] = tensors[f"{P}head.weight"][0]
    tensors[f"{P}head.none"] = torch.ones(0, 4)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / PICKLED, _use_new_zipfile_serialization=not legacy)
    adapter = read_adapter(folder)
    adapter.write(tmp_path / "out", factors_of(adapter), metadata="{}", sidecar=lambda _: {})
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)[f"{P}head.weight"], torch.ones(4, 4))


def test_an_adapter_name_in_the_keys_is_taken_out(tmp_path: Path) -> None:
    magnitude = {f"{P}q.lora_magnitude_vector.default.weight": torch.ones(5)}
    adapter = read_peft(folder_of(tmp_path / "a", pair(suffix="default.weight") | magnitude, use_dora=True))
    assert adapter.tensors({f.name: f for f in factors_of(adapter)}).keys() == {
        *pair(),
        f"{P}q.lora_magnitude_vector.weight",
    }


def test_safetensors_is_preferred_and_links_are_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    (folder / PICKLED).write_bytes(b"rubbish")
    blob = tmp_path / "blob"
    (folder / WEIGHTS).rename(blob)
    (folder / WEIGHTS).symlink_to(blob)
    assert read_peft(folder).weights.name == WEIGHTS


def test_zeros_and_ranks_above_the_sizes_are_fine(tmp_path: Path) -> None:
    tensors = pair(r=8)
    tensors[f"{P}q.lora_B.weight"].zero_()
    assert read_peft(folder_of(tmp_path / "a", tensors, r=8)).factors[0].rank == 8


def damage(path: Path, name: str, content: Callable[[bytes], bytes]) -> None:
    (path / name).write_bytes(content((path / name).read_bytes()))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (WEIGHTS, lambda _: b"", "is empty: download"),
        (WEIGHTS, lambda old: old[:-4], "not a whole safetensors file"),
        (WEIGHTS, lambda old: old[:20], "not a whole safetensors file"),
        (WEIGHTS, lambda _: LFS, "Git LFS pointer.*git lfs pull"),
        (CONFIG, lambda _: LFS, "Git LFS pointer"),
        (CONFIG, lambda _: b"", "is empty"),
        (CONFIG, lambda old: old[:-3], "not valid JSON"),
        (CONFIG, lambda _: b"\xff\xfe", "not valid JSON"),
        (CONFIG, lambda _: b"[" * 100_000, "not valid JSON"),
        (CONFIG, lambda _: b"[1]", "not a JSON object"),
        (CONFIG, lambda old: old[:-1] + b', "r": 3}', "gives 'r' twice"),
        (CONFIG, lambda old: old[:-1] + b', "lora_dropout": {"a": 1, "a": 2}}', "gives 'a' twice"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: Callable[[bytes], bytes], words: str) -> None:
    folder = folder_of(tmp_path / "a")
    damage(folder, name, content)
    with pytest.raises(ParaError, match=words) as refusal:
        read_adapter(folder)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_type_that_cannot_be_written(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", pair() | {"head": torch.ones(2, dtype=torch.uint8)})
    damage(folder, WEIGHTS, lambda old: old.replace(b'"U8","shape":[2]', b'"F4","shape":[4]'))
    with pytest.raises(ParaError, match="tensor 'head' has dtype F4, which cannot be written"):
        read_adapter(folder)


def test_a_header_that_gives_a_key_twice_is_refused(tmp_path: Path) -> None:
    entry = '"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    header = f"{{{entry}, {entry}}}".encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ParaError, match="a key twice"):
        read_tensors(file)


def test_a_tensor_given_twice(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", pair() | {A.replace("lora_A", "lora_X"): ones(2, 3)})
    damage(folder, WEIGHTS, lambda old: old.replace(b"lora_X", b"lora_A"))
    with pytest.raises(ParaError, match="not a whole safetensors file"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        *(({"peft_type": kind}, f"peft_type '{kind}'") for kind in ("IA3", "LOHA", "LOKR", "ADALORA", "XLORA")),
        ({"peft_type": None}, "peft_type None"),
        *(
            ({"init_lora_weights": init}, f"initialised by {init}.*path_initial_model_for_weight_conversion")
            for init in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga")
        ),
        ({"init_lora_weights": "loftq"}, "LoftQ"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"arrow_config": {"top_k": 3}}, "Arrow"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
        ({"r": 0}, "r is 0, but must be a positive"),
        ({"r": True}, "r is True"),
        ({"r": 4}, "module 'q'.*gives it rank 4"),
        ({"lora_alpha": "4"}, "lora_alpha is '4'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"rank_pattern": {"q": 3}}, "module 'q'.*gives it rank 3"),
        ({"rank_pattern": {"q": 2.0}}, "rank_pattern"),
        ({"rank_pattern": {"(": 2}}, "not a regular expression"),
        ({"alpha_pattern": {"q": None}}, "alpha_pattern"),
        ({"target_modules": [1]}, "target_modules"),
        ({"layers_to_transform": "0"}, "layers_to_transform"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ParaError, match=words):
        read_adapter(folder_of(tmp_path / "a", **config))


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_rank_and_alpha_are_needed(tmp_path: Path, key: str) -> None:
    folder = folder_of(tmp_path / "a")
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in GOOD.items() if k != key}))
    with pytest.raises(ParaError, match=f"has no {key}"):
        read_peft(folder)


A, B = f"{P}q.lora_A.weight", f"{P}q.lora_B.weight"
ones = torch.ones


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({A: ones(2, 3)}, {}, "module 'q' has no B"),
        ({B: ones(5, 2)}, {}, "module 'q' has no A"),
        ({f"{P}q.lora_embedding_B": ones(5, 2)}, {}, "module 'q' has no A"),
        ({A: ones(2, 3), B: ones(5, 4)}, {}, r"module 'q': A is \[2, 3\], B is \[5, 4\], which do not fit"),
        ({A: ones(4, 3), B: ones(5, 2)}, {"r": 4}, "do not fit"),
        ({A: ones(2), B: ones(5, 2)}, {}, "sharded or empty.*gather"),
        ({A: ones(2, 0), B: ones(5, 2)}, {}, "sharded or empty"),
        ({A: ones(2, 3, 3, 3), B: ones(5, 2)}, {}, "do not fit"),
        ({A: ones(2, 3, 3, 3), B: ones(5, 2, 3, 3)}, {}, "do not fit"),
        ({A: ones(4, 3, 3, 3), B: ones(5, 2, 1, 1)}, {"r": 4}, "do not fit"),
        ({A: ones(2, 3), B: ones(5, 2), f"{P}q.lora_B.bias": ones(4)}, {}, "its bias is"),
        ({A: ones(2, 3), B: ones(5, 2), f"{P}q.lora_A.bias": ones(2)}, {}, "unknown A bias"),
        ({P + A: ones(2, 3), P + B: ones(5, 2)}, {}, "its prefix twice"),
        (pair() | pair(suffix="other.weight"), {}, "for two adapters"),
        (pair() | pair("v", suffix="other.weight"), {}, "several adapters"),
        (
            {f"{P}q.base_layer.lora_A.weight": ones(2, 3), f"{P}q.base_layer.lora_B.weight": ones(5, 2)},
            {},
            "nested pairs",
        ),
        ({f"{P}q.ia3_l": ones(2)}, {}, "IA³ tensors but no LoRA pair"),
        ({}, {}, "unknown tensors but no LoRA pair"),
        (pair(r=3), {"target_modules": [], "target_parameters": ["q"]}, "rank 2"),
    ],
)
def test_tensors_that_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ParaError, match=words):
        read_adapter(folder_of(tmp_path / "a", tensors, **config))


def test_pickles_that_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    (folder / WEIGHTS).unlink()
    for content, words in ((os.getcwd, "more than tensors, which is not run"), ({"state": {}}, "not a plain dict")):
        torch.save(content, folder / PICKLED)
        with pytest.raises(ParaError, match=words):
            read_adapter(folder)
    damage(folder, PICKLED, lambda old: old[: len(old) // 2])
    with pytest.raises(ParaError, match=PICKLED):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (A, "so rank and alpha are unknown"),
        ("q.ia3_l", "IA³"),
        ("lora_te_q.lokr_w1_a", "LoKr"),
        ("lora_te_q.hada_w1_a", "LoHa"),
        ("q.lora_E", "AdaLoRA"),
    ],
)
def test_without_a_config(tmp_path: Path, key: str, words: str) -> None:
    folder = folder_of(tmp_path / "a", {key: ones(2)})
    (folder / CONFIG).unlink()
    with pytest.raises(ParaError, match=words):
        read_adapter(folder)


def test_other_things_than_peft_folders(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    with pytest.raises(ParaError, match="holds no tensor file"):
        read_adapter(folder)
    save_file({"x": ones(2, 2)}, folder / "x.safetensors")
    for path in (folder, folder / "x.safetensors"):
        with pytest.raises(ParaError, match=r"x\.safetensors' holds unknown tensors but no LoRA pair"):
            read_adapter(path)
    with pytest.raises(ParaError, match="does not exist"):
        read_adapter(tmp_path / "none")
    with pytest.raises(ParaError, match="give its folder"):
        read_adapter(folder_of(tmp_path / "a") / WEIGHTS)
    with pytest.raises(ParaError, match="not a tensor file"):
        read_adapter(tmp_path / "a" / CONFIG)
    (tmp_path / "a" / WEIGHTS).unlink()
    with pytest.raises(ParaError, match="holds neither"):
        read_adapter(tmp_path / "a")


def test_members_must_share_their_rank(tmp_path: Path) -> None:
    adapter = read_peft(save(adapt(build(), r=4, target_modules=["grouped"]), tmp_path / "adapter"))
    with pytest.raises(ParaError, match="module 'grouped': its members have the ranks"):
        adapter.new_config({"grouped.0": 1, "grouped.1": 2})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_layout_in_another_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    model = adapt(build(), r=4, target_modules=["lin", "grouped", "c1"], lora_bias=True)
    adapter = read_peft(save(model, tmp_path / "adapter"))
    new = [LoraFactors(f.name, f.B[:, :1].to(dtype), f.A[:1].to(dtype)) for f in factors_of(adapter)]
    written = adapter.write(tmp_path / "out", new, metadata="[]", sidecar=lambda _: {}, code=CODES[dtype])
    assert written.size == adapter.layout(CODES[dtype], metadata="[]").bytes({f.name: 1 for f in new})


ADAPTERS = os.environ.get("PARA_EXT_TEST_ADAPTERS")


@pytest.mark.skipif(not ADAPTERS, reason="PARA_EXT_TEST_ADAPTERS does not name a folder of trained adapters")
def test_trained_adapters(tmp_path: Path) -> None:
    read = 0
    for folder in sorted(Path(ADAPTERS or "").iterdir()):
        if not (folder / CONFIG).is_file() or folder.name.startswith("ia3"):
            continue
        adapter = read_peft(folder)
        check_factors(adapter.factors)
        read += 1
        for k in (0, 1, 2):
            new = [LoraFactors(f.name, f.B[:, :k], f.A[:k], f.scale) for f in factors_of(adapter)]
            out = tmp_path / f"{folder.name}-{k}"
            written = adapter.write(out, new, metadata="{}", sidecar=lambda _: {})
            if k:
                assert written.size == adapter.layout(metadata="{}").bytes({f.name: k for f in new})
            assert {f.rank for f in read_peft(out).factors} == {max(k, 1)}
            assert load_file(out / WEIGHTS).keys() >= adapter.foreign.keys()
    assert read


def test_lora_tensors_that_are_no_pair_are_refused(tmp_path: Path) -> None:
    """Passed through, they would keep their old scale under the new config."""
    folder = save(adapt(build(), r=4, target_modules=["lin"]), tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in ("base_model.model.x.lora_A", "base_model.model.x.lora_up.weight", "base_model.model.x.lora_E"):
        save_file({**tensors, key: torch.ones(2, 2)}, folder / "adapter_model.safetensors")
        with pytest.raises(ParaError, match="is no part of a PEFT LoRA pair"):
            read_peft(folder)


def test_a_module_name_with_a_line_break_is_read(tmp_path: Path) -> None:
    folder = save(adapt(build(), r=4, target_modules=["lin"]), tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k.replace("lin", "l\nin"): t for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    assert [f.name for f in read_peft(folder).factors] == ["l\nin"]


def test_tensors_that_are_not_dense_are_refused(tmp_path: Path) -> None:
    folder = save(adapt(build(), r=4, target_modules=["lin"]), tmp_path / "adapter")
    tensors: dict[str, Any] = dict(load_file(folder / "adapter_model.safetensors"))
    (folder / "adapter_model.safetensors").unlink()
    for strange in (torch.eye(3).to_sparse(), torch.empty(2, 2, device="meta")):
        torch.save({**tensors, "head.weight": strange}, folder / "adapter_model.bin")
        with pytest.raises(ParaError, match=r"'head.weight' is not dense|not a whole PyTorch file"):
            read_peft(folder)


def test_an_alpha_of_hundreds_of_digits_is_refused(tmp_path: Path) -> None:
    folder = save(adapt(build(), r=4, target_modules=["lin"]), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 10**400}))
    with pytest.raises(ParaError, match="lora_alpha"):
        read_peft(folder)
