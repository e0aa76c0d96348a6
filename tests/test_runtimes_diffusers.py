"""diffusers loads what is written for it: a UNet and its text encoder compute what the merged reference computes.

Sources are files as trainers write them: one for both models, in diffusers' own format or in kohya's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
from bases import BASES, QUIET, logits, merged, random_adapter, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor

import para_ext

pytestmark = [*QUIET, pytest.mark.usefixtures("one_thread")]

MODELS = ("unet", "text_encoder")
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}


@dataclass(frozen=True)
class Sources:
    """Adapters of both models, apart as PEFT folders, and together."""

    folders: Mapping[str, Path]
    diffusers: Path
    kohya: Path

    def errors(self, file: Path, ranks: Mapping[str, int] | None = None, **options: Any) -> dict[str, float]:
        """Of what each model of a pipeline with this file computes, against the merged reference."""
        pipeline = load(file, **options)
        return {name: self.error(name, getattr(pipeline, name), ranks) for name in MODELS}

    def error(self, name: str, model: Any, ranks: Mapping[str, int] | None = None) -> float:
        base = BASES[name]
        of_model = None if ranks is None else of_part(name, ranks)
        reference = merged(base.build(), self.folders[name], of_model)
        return relative_error(logits(model.eval(), base.inputs()), logits(reference, base.inputs()))


def of_part(name: str, ranks: Mapping[str, int]) -> dict[str, int]:
    """The ranks of one model's modules, which older transformers had below ``text_model``."""
    prefix = f"{name}."
    return {
        module.removeprefix(prefix).removeprefix("text_model."): rank
        for module, rank in ranks.items()
        if module.startswith(prefix)
    }


def load(file: Path, **options: Any) -> Any:
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=BASES["text_encoder"].build(),
        tokenizer=None,
        unet=BASES["unet"].build(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, **options)
    return pipeline


def read(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Any]]:
    """A and B by module, and the config."""
    tensors = load_file(folder / "adapter_model.safetensors")
    pairs = {}
    for key, A in tensors.items():
        module, which, _ = key.removeprefix("base_model.model.").partition(".lora_A.weight")
        if which:
            pairs[module] = (A, tensors[key.replace("lora_A", "lora_B")])
    return pairs, json.loads((folder / "adapter_config.json").read_text())


def write_diffusers(folders: Mapping[str, Path], file: Path, *, below: str = "", settings: bool = True) -> Path:
    """As ``save_lora_weights`` writes it; ``below``: what stands before the text encoder's modules."""
    tensors, metadata = {}, {}
    for part, folder in folders.items():
        pairs, config = read(folder)
        stem = f"{part}.{below}" if part == "text_encoder" else f"{part}."
        for module, (A, B) in pairs.items():
            tensors |= {f"{stem}{module}.lora_A.weight": A, f"{stem}{module}.lora_B.weight": B}
        for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "use_dora"):
            metadata[f"{part}.{key}"] = config[key]
    header = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(metadata)} if settings else {})
    save_file(tensors, file, header)
    return file


def write_kohya(folders: Mapping[str, Path], file: Path) -> Path:
    """As sd-scripts writes it, with the alpha of each config."""
    tensors = {}
    for part, folder in folders.items():
        pairs, config = read(folder)
        for module, (A, B) in pairs.items():
            stem = PREFIXES[part] + module.replace(".", "_")
            tensors |= {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B}
            tensors[f"{stem}.alpha"] = torch.tensor(config["lora_alpha"])
    save_file(tensors, file)
    return file


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("sources")
    folders = {name: random_adapter(BASES[name], folder / name) for name in MODELS}
    return Sources(
        folders,
        write_diffusers(folders, folder / "diffusers.safetensors"),
        write_kohya(folders, folder / "kohya.safetensors"),
    )


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_adapters_as_they_were_trained(sources: Sources, kind: str) -> None:
    errors = sources.errors(getattr(sources, kind))
    assert max(errors.values()) <= 1e-5


@pytest.mark.parametrize("target", [None, "diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_a_compressed_adapter(sources: Sources, kind: str, target: str | None, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    report = para_ext.compress_adapter(getattr(sources, kind), small, keep=0.4, target=target)
    assert len(set(report.ranks.values())) > 3 and 0 in report.ranks.values()
    assert max(sources.errors(small, report.ranks).values()) <= 1e-5
    assert min(sources.errors(small).values()) > 1e-3


@pytest.mark.parametrize("target", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_an_adapter_converted_without_truncation(sources: Sources, kind: str, target: str, tmp_path: Path) -> None:
    para_ext.convert_adapter(getattr(sources, kind), tmp_path / "whole.safetensors", target)
    assert max(sources.errors(tmp_path / "whole.safetensors").values()) <= 1e-5


@pytest.mark.parametrize("target", ["diffusers", "kohya"])
def test_a_peft_folder_of_a_unet(sources: Sources, target: str, tmp_path: Path) -> None:
    report = para_ext.compress_adapter(sources.folders["unet"], tmp_path / "small.safetensors", keep=0.4, target=target)
    pipeline = load(tmp_path / "small.safetensors")
    reference = merged(BASES["unet"].build(), sources.folders["unet"], report.ranks)
    inputs = BASES["unet"].inputs()
    assert relative_error(logits(pipeline.unet.eval(), inputs), logits(reference, inputs)) <= 1e-5


def test_other_ways_to_load(sources: Sources, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    report = para_ext.compress_adapter(sources.diffusers, small, keep=0.4)
    assert max(sources.errors(small, report.ranks, low_cpu_mem_usage=True).values()) <= 1e-5
    unet = BASES["unet"].build()
    unet.load_lora_adapter(str(tmp_path), weight_name=small.name, prefix="unet")
    assert sources.error("unet", unet, report.ranks) <= 1e-5
    pipeline = load(small)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert sources.error("unet", pipeline.unet, report.ranks) <= 1e-5


# --- what would be wrong without a word -------------------------------------------------------------------------------


def test_alphas_that_differ_are_wrong(sources: Sources, tmp_path: Path) -> None:
    """diffusers looks for them under other names than it has them; so ours are all the same."""
    report = para_ext.compress_adapter(sources.kohya, tmp_path / "small.safetensors", keep=0.4)
    tensors = load_file(tmp_path / "small.safetensors")
    alphas = {key: float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}
    assert len(set(alphas.values())) == 1
    # The same ΔW, with every alpha equal to its pair's rank.
    for key, alpha in alphas.items():
        up, rank = (
            key.replace(".alpha", ".lora_up.weight"),
            tensors[key.replace(".alpha", ".lora_down.weight")].shape[0],
        )
        tensors[up] = tensors[up] * (alpha / rank)
        tensors[key] = torch.tensor(float(rank))
    save_file(tensors, tmp_path / "differing.safetensors")
    assert min(sources.errors(tmp_path / "differing.safetensors", report.ranks).values()) > 1e-2


def test_a_scale_without_settings_is_wrong(sources: Sources, tmp_path: Path) -> None:
    """The header is all that holds alpha in diffusers' own files."""
    bare = write_diffusers(sources.folders, tmp_path / "bare.safetensors", settings=False)
    assert min(sources.errors(bare).values()) > 1e-2


@pytest.mark.parametrize("target", ["diffusers", "kohya"])
def test_modules_below_text_model(sources: Sources, target: str, tmp_path: Path) -> None:
    """Names of older transformers: today's takes the prefix from the tensors' names, not from patterns."""
    old = write_diffusers(sources.folders, tmp_path / "old.safetensors", below="text_model.")
    assert max(sources.errors(old).values()) <= 1e-5
    report = para_ext.compress_adapter(old, tmp_path / "small.safetensors", keep=0.4, target=target)
    assert max(sources.errors(tmp_path / "small.safetensors", report.ranks).values()) <= 1e-5


def test_names_for_sd_scripts(sources: Sources, tmp_path: Path) -> None:
    """sd-scripts knows the text encoder's modules below text_model only."""
    para_ext.compress_adapter(sources.diffusers, tmp_path / "small.safetensors", keep=0.4, target="kohya")
    ours, theirs = (
        {key.partition(".")[0] for key in load_file(file)} for file in (tmp_path / "small.safetensors", sources.kohya)
    )
    assert ours < theirs


def test_without_any_out_proj(tmp_path: Path) -> None:
    """diffusers tells the format of a text encoder's keys by out_proj: without one, it drops q, k and v."""
    targets = ["q_proj", "v_proj", "fc1", "fc2"]
    folders = {
        "unet": random_adapter(BASES["unet"], tmp_path / "unet"),
        "text_encoder": random_adapter(BASES["text_encoder"], tmp_path / "text_encoder", target_modules=targets),
    }
    file = write_diffusers(folders, tmp_path / "diffusers.safetensors")
    sources = Sources(folders, file, write_kohya(folders, tmp_path / "kohya.safetensors"))
    assert sources.errors(sources.kohya)["text_encoder"] > 1e-2
    report = para_ext.compress_adapter(file, tmp_path / "small.safetensors", keep=0.4, target="kohya")
    assert max(sources.errors(tmp_path / "small.safetensors", report.ranks).values()) <= 1e-5
