"""Files for servers that can't run here, loaded by the rules of their loaders, a function each, with its source."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_adapter
from safetensors.torch import load_file
from sources import LANGUAGE, LAYERS, LEAVES, RANK, UNET, Source, dense, kohya_unet, language
from torch import Tensor

import para_ext
from para_ext.errors import ParaError
from para_ext.formats.peft_config import Targets

Deltas = Mapping[str, Tensor]


# What each reader does with a file


def config_and_pairs(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """adapter_config.json, and B and A by module."""
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix, ends = "base_model.model.", (".lora_B.weight", ".lora_A.weight")
    assert all(key.startswith(prefix) and key.endswith(ends) for key in tensors)
    names = {key.removeprefix(prefix).removesuffix(ends[1]) for key in tensors if key.endswith(ends[1])}
    pairs = {
        name: (tensors[prefix + name + ends[0]].double(), tensors[prefix + name + ends[1]].double()) for name in names
    }
    return json.loads((folder / "adapter_config.json").read_text()), pairs


def sglang(folder: Path) -> Deltas:
    """sglang 0.5.23, srt/lora: LoRAConfig takes ``r`` and a list of leaf names, LoRAAdapter scales by lora_alpha / r
    whatever use_rslora says, mem_pool.load_lora_weight_to_buffer asserts that every buffer has r rows, and q, k, v of
    a layer are concatenated."""
    config, pairs = config_and_pairs(folder)
    assert isinstance(config["target_modules"], list)
    assert not any("." in name for name in config["target_modules"])
    for i in range(LAYERS):
        for leaf in LEAVES:
            B, A = pairs[f"model.layers.{i}.{leaf}"]
            assert len(A) == B.shape[1] == config["r"]
    return {name: config["lora_alpha"] / config["r"] * B @ A for name, (B, A) in pairs.items()}


def lmdeploy(folder: Path) -> Deltas:
    """lmdeploy 0.18.0, pytorch/adapter/adapter.py and nn/linear/lora.py: buffers of ``r`` rows, made by torch.empty for
    every module whose leaf is in target_modules, and filled by copy_, which broadcasts a rank of 1."""
    config, pairs = config_and_pairs(folder)
    for i in range(LAYERS):
        for leaf in LEAVES:
            assert (leaf.rpartition(".")[2] in config["target_modules"]) == (f"model.layers.{i}.{leaf}" in pairs)
    assert all(len(A) == config["r"] for _, A in pairs.values())
    return {name: config["lora_alpha"] / config["r"] * B @ A for name, (B, A) in pairs.items()}


def lorax(folder: Path, reverse: bool = False) -> Deltas:
    """LoRAX and TGI, adapters/lora.py: per type of layer the factors of all layers are stacked (the type is left out if
    a layer lacks them), scaled by lora_alpha / config.r, padded to a rank of 8 or a multiple of 16; and config.r
    becomes that rank before the next type is loaded."""
    config, pairs = config_and_pairs(folder)
    r = config["r"]
    loaded = {}
    for leaf in sorted(LEAVES, reverse=reverse):
        layers = [pairs[f"model.layers.{i}.{leaf}"] for i in range(LAYERS)]
        torch.stack([A for _, A in layers])
        for i, (B, A) in enumerate(layers):
            loaded[f"model.layers.{i}.{leaf}"] = config["lora_alpha"] / r * B @ A
        rank = len(layers[0][1])
        r = 8 if rank <= 8 else -(-rank // 16) * 16
    return loaded


def tensorrt(folder: Path) -> Deltas:
    """TensorRT-LLM (since PR 2366), lora_manager.py: scaled by lora_alpha / (rows of A), or its root with rsLoRA; older
    HfLoraLoader looks every entry of target_modules up among the leaf names that it knows."""
    config, pairs = config_and_pairs(folder)
    assert set(config["target_modules"]) <= {leaf.rpartition(".")[2] for leaf in LEAVES}
    assert not config["use_rslora"]
    return {name: config["lora_alpha"] / len(A) * B @ A for name, (B, A) in pairs.items()}


def vllm_before_032(folder: Path) -> Deltas:
    """vLLM ≤ 0.31, lora/peft_helper.py: lora_alpha / r for all modules; ``r``, which is compared to --max-lora-rank,
    must hold every module's rank."""
    config, pairs = config_and_pairs(folder)
    assert all(len(A) <= config["r"] for _, A in pairs.values())
    return {name: config["lora_alpha"] / config["r"] * B @ A for name, (B, A) in pairs.items()}


def mlx_lm(folder: Path) -> Deltas:
    """mlx_lm 0.32.2, tuner/utils.py and tuner/lora.py: layers of lora_parameters.rank, into which weights of another
    shape do not go; the last num_layers layers' modules whose path is among ``keys``."""
    tensors = load_file(folder / "adapters.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    parameters = config["lora_parameters"]
    deltas = {}
    for key in [key for key in tensors if key.endswith(".lora_a")]:
        name = key.removesuffix(".lora_a")
        a, b = tensors[key].double(), tensors[name + ".lora_b"].double()
        assert a.shape[1] == b.shape[0] == parameters["rank"]
        deltas[name] = parameters["scale"] * (a @ b).T
    return deltas


READERS: dict[str, list[Callable[[Path], Deltas]]] = {
    "uniform": [sglang, lmdeploy, lorax, lambda folder: lorax(folder, reverse=True), vllm_before_032, tensorrt],
    "trtllm": [tensorrt],
    "vllm": [vllm_before_032],
    "peft": [vllm_before_032],
    "mlx": [mlx_lm],
}


@pytest.mark.parametrize("make", LANGUAGE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("target", READERS)
def test_readers_find_the_truncated_delta(tmp_path: Path, make: Source, target: str) -> None:
    source, out = make(tmp_path / "source"), tmp_path / "out"
    budget = {"energy": 0.9, "dtype": "fp32"} if target in ("uniform", "mlx") else {"keep": 0.3, "dtype": "fp32"}
    ranks = para_ext.compress_adapter(source, out, target=target, **budget).ranks
    expected = {}
    for name, delta in dense(source).items():
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        expected[name] = U[:, : ranks[name]] * S[: ranks[name]] @ Vh[: ranks[name]]
    for read in READERS[target]:
        found = read(out)
        assert found.keys() == {name for name, rank in ranks.items() if rank}
        for name, delta in found.items():
            torch.testing.assert_close(delta, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_uniform_by_type_would_be_wrong_in_lorax(tmp_path: Path) -> None:
    """Why the target has one rank for all."""
    pairs = [(n, B[:, :8], A[:8]) if "k_proj" in n else (n, B, A) for n, B, A in language(rank=16)]
    folder = write_adapter(tmp_path / "a", pairs, r=16, lora_alpha=16, rank_pattern={"k_proj": 8})
    expected = {name: B.double() @ A.double() for name, B, A in pairs}
    wrong = [n for n, delta in lorax(folder).items() if not torch.allclose(delta, expected[n])]
    assert {name.rpartition(".")[2] for name in wrong} == {"q_proj"}
    with pytest.raises(ParaError, match="uniform='type' is not what this target needs"):
        para_ext.compress_adapter(folder, tmp_path / "out", target="uniform", uniform="type")


# The target uniform


def test_uniform_fills_missing_layers(tmp_path: Path) -> None:
    """One module of one layer is adapted, one leaf nowhere in the first layer, and the base has a layer more."""
    pairs = [p for p in language() if p[0] not in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj")]
    source = write_adapter(tmp_path / "source", pairs, target_modules=r".*\.(q|k|v|up)_proj", exclude_modules="x.*",
                           layers_to_transform=None)  # fmt: skip
    (tmp_path / "base").mkdir()
    config = {"model_type": "llama", "num_hidden_layers": 1, "text_config": {"num_hidden_layers": LAYERS + 1}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    for base, layers in (
        (None, LAYERS),
        (tmp_path / "base", LAYERS + 1),
        (tmp_path / "base" / "config.json", LAYERS + 1),
    ):
        out = tmp_path / f"out{base is None}{layers}"
        report = para_ext.convert_adapter(source, out, "uniform", base=base, overwrite=True)
        added = 2 + 4 * (layers - LAYERS)
        assert (
            f"{added} modules that the adapter lacks are there with zeros, so that every layer has all." in report.notes
        )
        config, found = config_and_pairs(out)
        assert found.keys() == {f"model.layers.{i}.{leaf}" for i in range(layers) for leaf in LEAVES}
        assert {(len(A), B.shape[1]) for B, A in found.values()} == {(8, 8)}
        assert config["r"] == config["lora_alpha"] == 8
        assert config["target_modules"] == ["k_proj", "q_proj", "up_proj", "v_proj"]
        assert not any(
            config[key] for key in ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform")
        )
        assert para_ext.verify(source, out).relative_error < 1e-6


@pytest.mark.parametrize(("rank", "expected"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 48)])
def test_uniform_ranks(tmp_path: Path, rank: int, expected: int) -> None:
    """Those that LoRAX and TGI leave as they are, whatever the matrices' own size is."""
    pairs = [(f"layers.0.{name}", torch.ones(40, rank), torch.ones(rank, 3 * n)) for n, name in enumerate("abc", 1)]
    pairs.append(("layers.0.large", torch.randn(40, rank), torch.randn(rank, 40)))
    source = write_adapter(tmp_path / "source", pairs, lora_alpha=3, target_modules=["a", "b", "c", "large"])
    para_ext.convert_adapter(source, tmp_path / "out", "uniform")
    config, found = config_and_pairs(tmp_path / "out")
    assert {len(A) for _, A in found.values()} == {config["r"]} == {expected}
    assert para_ext.verify(source, tmp_path / "out").relative_error < 1e-6


def test_uniform_needs_one_shape_for_what_it_fills(tmp_path: Path) -> None:
    pairs = [("layers.0.x", torch.ones(4, 2), torch.ones(2, 3)), ("layers.2.x", torch.ones(5, 2), torch.ones(2, 3))]
    source = write_adapter(tmp_path / "source", pairs)
    with pytest.raises(ParaError, match=r"module 'layers.1.x' is not adapted and its shape is unknown.*target='peft'"):
        para_ext.convert_adapter(source, tmp_path / "out", "uniform")


def test_made_up_config_names_what_is_adapted_and_nothing_else(tmp_path: Path) -> None:
    para_ext.compress_adapter(kohya_unet(tmp_path / "source"), tmp_path / "out", target="peft", keep=0.3)
    config, pairs = config_and_pairs(tmp_path / "out")
    targets = Targets(config)
    assert all(name in targets for name in pairs)
    others = [name.replace("attn1", "attn2") for name in UNET] + [name.replace("blocks.1", "blocks.2") for name in UNET]
    assert not [name for name in others if name not in UNET and name in targets]
    assert config["r"] == config["lora_alpha"] == max(len(A) for _, A in pairs.values())


def test_trtllm_is_right_in_peft_too(tmp_path: Path) -> None:
    """With experts one by one, whose rank is ``r``, lora_alpha is still the largest rank."""
    pairs = [
        (f"model.layers.0.mlp.experts.{e}.{w}", B, A)
        for e in range(2)
        for w, (_, B, A) in zip(("w1", "w3"), language()[:2], strict=True)
    ]
    pairs += [("model.layers.0.self_attn.q_proj", *language()[0][1:])]
    pairs = [
        (n, B * (1e-2 if "experts" in n else 1) * torch.logspace(0, -3 * ("experts" in n), RANK), A)
        for n, B, A in pairs
    ]
    source = write_adapter(tmp_path / "source", pairs, lora_alpha=9, target_modules=["w1", "w3", "q_proj"])
    report = para_ext.compress_adapter(source, tmp_path / "out", target="trtllm", keep=0.5)
    config, written = config_and_pairs(tmp_path / "out")
    assert config["lora_alpha"] == max(report.ranks.values()) > min(report.ranks.values()) > 0
    by_peft = dense(tmp_path / "out")
    for name, (B, A) in written.items():
        torch.testing.assert_close(config["lora_alpha"] / len(A) * B @ A, by_peft[name])


def test_vllm_says_what_to_start_it_with(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source", language(rank=12), target_modules=list("x"))
    report = para_ext.convert_adapter(source, tmp_path / "out", "vllm")
    assert any("--max-lora-rank 16" in note and "max_rank=8 " in note for note in report.notes)
