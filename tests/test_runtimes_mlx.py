"""mlx_lm, on the CPU, loads what is written for it: its logits are those of the merged reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mlx_lm")
pytest.importorskip("peft")

import mlx.core as mx
from bases import BASES, QUIET, logits, merged, random_adapter, relative_error, save
from mlx_lm.utils import load_adapters, load_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import para_ext
from para_ext import ParaError

pytestmark = [*QUIET, pytest.mark.usefixtures("one_thread")]

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]


@dataclass(frozen=True)
class Case:
    """A base's folder and an adapter for it."""

    name: str
    folder: Path
    adapter: Path

    def computed(self, adapter: Path | None = None) -> Tensor:
        """[prompts, tokens, vocabulary]: MLX's logits."""
        with mx.stream(mx.cpu):
            # transformers writes rope_theta where mlx_lm's qwen2 does not look for it.
            model, _ = load_model(self.folder, model_config={"rope_theta": 10000.0})
            if adapter is not None:
                load_adapters(model, str(adapter))
            model.eval()
            out = model(mx.array(BASES[self.name].inputs()["input_ids"].numpy()))
            return torch.from_numpy(np.array(out)).double()

    def error(self, adapter: Path | None, ranks: dict[str, int] | None = None) -> float:
        """Against the merged reference."""
        reference = merged(BASES[self.name].build(), self.adapter, ranks)
        return relative_error(self.computed(adapter), logits(reference, BASES[self.name].inputs()))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """By the name of a base; each is made once."""
    cases: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in cases:
            folder = tmp_path_factory.mktemp(name)
            save(BASES[name].build(), folder / "base")
            adapter = random_adapter(BASES[name], folder / "adapter", embeddings=False, target_modules=TARGETS)
            cases[name] = Case(name, folder / "base", adapter)
        return cases[name]

    return make


def as_mlx(adapter: Path, out: Path, rank: int) -> Path:
    """The tensors of a PEFT folder as mlx_lm would have them; the ranks stay as they are."""
    out.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors, keys = {}, set()
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, _, which = key.removeprefix("base_model.model.").partition(".lora_")
        keys.add(module)
        tensors[f"{module}.lora_{which.removeprefix('embedding_')[0].lower()}"] = tensor.T.contiguous()
    save_file(tensors, out / "adapters.safetensors")
    parameters = {"rank": rank, "scale": config["lora_alpha"] / config["r"], "dropout": 0.0, "keys": sorted(keys)}
    settings = {"fine_tune_type": "lora", "num_layers": 99, "lora_parameters": parameters}
    (out / "adapter_config.json").write_text(json.dumps(settings))
    return out


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_base_and_an_adapter_as_it_was_trained(made: Callable[[str], Case], name: str, tmp_path: Path) -> None:
    case = made(name)
    assert relative_error(case.computed(), logits(BASES[name].build(), BASES[name].inputs())) <= 1e-5
    assert case.error(as_mlx(case.adapter, tmp_path / "original", 16)) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("from_mlx", [False, True], ids=["from-peft", "from-mlx"])
def test_a_compressed_adapter(made: Callable[[str], Case], name: str, from_mlx: bool, tmp_path: Path) -> None:
    case = made(name)
    source = as_mlx(case.adapter, tmp_path / "mlx", 16) if from_mlx else case.adapter
    report = para_ext.compress_adapter(source, tmp_path / "small", keep=0.4, target="mlx", base=case.folder)
    assert len(set(report.ranks.values())) == 1
    assert case.error(tmp_path / "small", report.ranks) <= 1e-5
    assert case.error(tmp_path / "small") > 1e-3
    assert case.error(None, report.ranks) > 1e-2


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_non_uniform_ranks_padded_with_zeros(made: Callable[[str], Case], name: str, tmp_path: Path) -> None:
    """An adapter compressed for PEFT, converted afterwards, loses nothing more."""
    case = made(name)
    report = para_ext.compress_adapter(case.adapter, tmp_path / "small", keep=0.4)
    assert len(set(report.ranks.values())) > 2 and 0 in report.ranks.values()
    para_ext.convert_adapter(tmp_path / "small", tmp_path / "mlx", "mlx", base=case.folder)
    assert case.error(tmp_path / "mlx", report.ranks) <= 1e-5


def test_what_mlx_cannot_load_fails_loudly(made: Callable[[str], Case], tmp_path: Path) -> None:
    """Ranks that differ, and a PEFT folder: no wrong result, so nothing to guard against."""
    case = made("qwen2")
    para_ext.compress_adapter(case.adapter, tmp_path / "small", keep=0.4)
    with pytest.raises(ValueError, match="incompatible tensors"):
        case.computed(as_mlx(tmp_path / "small", tmp_path / "uneven", 16))
    with pytest.raises(AttributeError, match="num_layers"):
        case.computed(tmp_path / "small")


def test_experts_are_refused(tmp_path: Path) -> None:
    adapter = random_adapter(BASES["mixtral"], tmp_path / "adapter")
    with pytest.raises(ParaError, match="no name that is known in MLX"):
        para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.4, target="mlx")
