"""MLX's adapters: lora_a [in, r] and lora_b [r, out] with one rank and one scale for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sources import LANGUAGE, language, mlx_folder, peft_folder
from torch import Tensor

import para_ext
from para_ext.errors import ParaError
from para_ext.formats import read_adapter

SCALE = 20.0


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def test_scale_and_orientation(tmp_path: Path) -> None:
    read = {f.name: f for f in read_adapter(mlx_folder(tmp_path / "a")).factors}
    assert read.keys() == {name for name, _, _ in language()}
    for name, B, A in language():
        f = read[name]
        delta = f.scale * torch.from_numpy(f.B).double() @ torch.from_numpy(f.A).double()
        torch.testing.assert_close(delta, SCALE * B.double() @ A.double(), rtol=1e-12, atol=1e-12)


def test_back_into_its_own_format(tmp_path: Path) -> None:
    """One rank for all, scale 1; keys, config, header and other tensors as they were."""
    source = mlx_folder(tmp_path / "a")
    tensors = {**load_file(source / "adapters.safetensors"), "model.norm.weight": torch.rand(16)}
    save_file(tensors, source / "adapters.safetensors", {"format": "mlx", "note": "kept"})
    config = config_of(source) | {"model": "some/base", "data": "d"}
    (source / "adapter_config.json").write_text(json.dumps(config))
    report = para_ext.compress_adapter(source, tmp_path / "out", energy=0.9)
    (rank,) = set(report.ranks.values())
    assert 1 <= rank < 6
    new = load_file(tmp_path / "out" / "adapters.safetensors")
    assert new.keys() == tensors.keys()
    assert torch.equal(new["model.norm.weight"], tensors["model.norm.weight"])
    assert {t.shape[1] for key, t in new.items() if key.endswith("lora_a")} == {rank}
    parameters = {"rank": rank, "scale": 1.0}
    assert config_of(tmp_path / "out") == {**config, "lora_parameters": parameters}
    with safe_open(tmp_path / "out" / "adapters.safetensors", "pt") as file:
        assert {"format": "mlx", "note": "kept"}.items() <= file.metadata().items()
    lost = sum(
        float((new[f"{n}.lora_a"].double() @ new[f"{n}.lora_b"].double() - SCALE * (B.double() @ A.double()).T).norm())
        ** 2
        for n, B, A in language()
    )
    assert lost**0.5 <= report.error * (1 + 1e-9) <= 3 * lost**0.5
    assert report.bytes_after == (tmp_path / "out" / "adapters.safetensors").stat().st_size


def test_size_is_exact(tmp_path: Path) -> None:
    source = mlx_folder(tmp_path / "a")
    for i, size in enumerate((7000, 10000)):
        report = para_ext.compress_adapter(source, tmp_path / str(i), size=size)
        assert report.bytes_after == (tmp_path / str(i) / "adapters.safetensors").stat().st_size <= size
        larger = para_ext.compress_adapter(source, tmp_path / f"{i}+", rank=next(iter(report.ranks.values())) + 1)
        assert larger.bytes_after is not None and larger.bytes_after > size


@pytest.mark.parametrize("make", LANGUAGE, ids=lambda make: make.__name__)
def test_there_and_back(tmp_path: Path, make: Any) -> None:
    """Into MLX's format and from it into PEFT's: the same ΔW, whatever the ranks were before."""
    source = make(tmp_path / "source")
    para_ext.convert_adapter(source, tmp_path / "mlx", "mlx", dtype="fp32")
    para_ext.convert_adapter(tmp_path / "mlx", tmp_path / "back", "peft")
    assert para_ext.verify(source, tmp_path / "back").relative_error < 1e-6


def test_overwrite_and_what_is_not_one(tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "a")
    para_ext.convert_adapter(source, tmp_path / "out", "mlx")
    with pytest.raises(ParaError, match="exists: give a new folder"):
        para_ext.convert_adapter(source, tmp_path / "out", "mlx")
    para_ext.convert_adapter(source, tmp_path / "out", "mlx", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapters.safetensors", "para_ext.json"]  # fmt: skip
    with pytest.raises(ParaError, match="would be a folder here"):
        para_ext.convert_adapter(source, tmp_path / "x.safetensors", "mlx")


A, B = torch.ones(5, 2), torch.ones(2, 4)
PAIR = {"x.lora_a": A, "x.lora_b": B}
CONFIG = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 1.0}}
NO_SCALE = "has no number for lora_parameters.scale"
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "DoRA": (PAIR, CONFIG | {"fine_tune_type": "dora"}, "fine_tune_type 'dora', but only lora is read"),
    "full": (PAIR, CONFIG | {"fine_tune_type": "full"}, "fine_tune_type 'full'"),
    "no scale": (PAIR, CONFIG | {"lora_parameters": {"rank": 2}}, NO_SCALE),
    "a list": (PAIR, CONFIG | {"lora_parameters": [1]}, NO_SCALE),
    "scale true": (PAIR, CONFIG | {"lora_parameters": {"scale": True}}, NO_SCALE),
    "scale NaN": (
        PAIR,
        CONFIG | {"lora_parameters": {"scale": float("nan")}},
        NO_SCALE,
    ),
    "scale huge": (PAIR, CONFIG | {"lora_parameters": {"scale": 10**400}}, NO_SCALE),
    "no b": ({"x.lora_a": A}, CONFIG, "'x' has no lora_b beside its lora_a"),
    "no a": ({**PAIR, "y.lora_b": B.clone()}, CONFIG, "'y.lora_b' is a part of no LoRA pair of MLX"),
    "shapes": ({"x.lora_a": A, "x.lora_b": torch.ones(3, 4)}, CONFIG, "only linear layers can be read"),
    "experts": ({"x.lora_a": torch.ones(3, 2, 5), "x.lora_b": torch.ones(3, 4, 2)}, CONFIG, "only linear layers"),
    "empty": ({"x.lora_a": torch.ones(5, 0), "x.lora_b": torch.ones(0, 4)}, CONFIG, "only linear layers"),
    "magnitude": ({**PAIR, "x.m": torch.ones(4)}, CONFIG | {"fine_tune_type": "dora"}, "only lora is read"),
    "PEFT's": ({**PAIR, "y.lora_A.weight": A.clone()}, CONFIG, "part of no LoRA pair of MLX"),
    "nothing": ({"y": A}, CONFIG, "holds no LoRA pair"),
    "NaN": ({"x.lora_a": A, "x.lora_b": B * float("nan")}, CONFIG, "NaN"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path: Path, case: str) -> None:
    tensors, config, why = REFUSED[case]
    folder = tmp_path / "a"
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ParaError, match=why) as refusal:
        para_ext.compress_adapter(folder, tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_no_tensor_file(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ParaError, match=r"holds no adapters\.safetensors"):
        read_adapter(tmp_path)


def test_an_embedding_stays_one(tmp_path: Path) -> None:
    """Its ΔW is the transpose of a linear layer's, and PEFT has other keys for it."""
    folder = tmp_path / "mlx"
    folder.mkdir()
    name = "model.embed_tokens"
    save_file(
        {f"{name}.lora_a": torch.randn(40, 2), f"{name}.lora_b": torch.randn(2, 8)}, folder / "adapters.safetensors"
    )
    parameters = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": [name]}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    para_ext.convert_adapter(folder, tmp_path / "peft", "peft")
    keys = load_file(tmp_path / "peft" / "adapter_model.safetensors").keys()
    assert keys == {f"base_model.model.{name}.lora_embedding_{side}" for side in "AB"}
