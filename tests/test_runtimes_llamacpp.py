"""llama.cpp loads what is written for it: its logits are those of the merged reference, for every kind of model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("peft")

import gguf
import llamacpp
from bases import QUIET, Base, causal, merged, random_adapter, relative_error, tokens
from llamacpp import MODELS, TOLERANCE, computed, expected, write_base

import para_ext
from para_ext import ParaError

pytestmark = [*QUIET, pytest.mark.usefixtures("one_thread")]


@dataclass(frozen=True)
class Case:
    """A base as transformers and as llama.cpp have it, and an adapter for it."""

    name: str
    folder: Path
    adapter: Path

    @property
    def gguf(self) -> Path:
        return self.folder / "base.gguf"

    def error(self, adapters: dict[Path, float], ranks: dict[str, int] | None = None) -> float:
        """Of llama.cpp's logits with these adapters, against the merged reference's."""
        reference = merged(MODELS[self.name].build(), self.adapter, ranks)
        return relative_error(computed(self.gguf, adapters), expected(reference))

    @property
    def tolerance(self) -> float:
        return TOLERANCE.get(self.name, 1e-5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """By the name of a model; each is made once."""
    cases: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in cases:
            folder = tmp_path_factory.mktemp(name)
            model = MODELS[name].build()
            model.config.save_pretrained(folder)
            write_base(model, folder / "base.gguf")
            cases[name] = Case(name, folder, random_adapter(MODELS[name], folder / "adapter"))
        return cases[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_the_base_alone(made: Callable[[str], Case], name: str) -> None:
    """What else these tests see comes from the adapter."""
    case = made(name)
    assert relative_error(computed(case.gguf), expected(MODELS[name].build())) <= case.tolerance


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_an_adapter_as_it_was_trained(made: Callable[[str], Case], name: str) -> None:
    """The reference, and what we know of the format, by a file that para_ext has no part in."""
    case = made(name)
    config = MODELS[name].build().config
    alpha = json.loads((case.adapter / "adapter_config.json").read_text())["lora_alpha"]
    original = llamacpp.write_adapter(config, case.adapter, case.folder / "original.gguf", alpha)
    assert case.error({original: 1.0}) <= case.tolerance
    assert case.error({original: 0.5}) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_a_compressed_adapter(made: Callable[[str], Case], name: str) -> None:
    case = made(name)
    report = para_ext.compress_adapter(case.adapter, case.folder / "small", keep=0.4, target="gguf", base=case.folder)
    assert len(set(report.ranks.values())) > 2
    small = case.folder / "small" / "adapter.gguf"
    assert case.error({small: 1.0}, report.ranks) <= case.tolerance
    assert case.error({}, report.ranks) > 50 * case.tolerance


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_converted_without_truncation(made: Callable[[str], Case], name: str) -> None:
    case = made(name)
    para_ext.convert_adapter(case.adapter, case.folder / "whole.gguf", "gguf", base=case.folder)
    assert case.error({case.folder / "whole.gguf": 1.0}) <= case.tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 1e-3), ("bf16", 1e-2)])
def test_sixteen_bits(made: Callable[[str], Case], dtype: str, tolerance: float, tmp_path: Path) -> None:
    """ggml rounds activations to the factors' type: that is all that may be lost."""
    case = made("llama")
    report = para_ext.compress_adapter(
        case.adapter, tmp_path / "small.gguf", keep=0.4, target="gguf", base=case.folder, dtype=dtype
    )
    assert case.error({tmp_path / "small.gguf": 1.0}, report.ranks) <= tolerance
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "small.gguf").tensors}
    assert kinds == {{"fp16": "F16", "bf16": "BF16"}[dtype]}
    assert any("16 bits" in note for note in report.notes)


# --- what would be wrong without a word -------------------------------------------------------------------------------


def test_the_alpha_of_a_peft_folder_is_wrong(made: Callable[[str], Case], tmp_path: Path) -> None:
    """What llama.cpp's own converter makes of a folder at unit scale: alpha over each pair's own rank."""
    case = made("llama")
    report = para_ext.compress_adapter(case.adapter, tmp_path / "small", keep=0.4)
    rank = json.loads((tmp_path / "small" / "adapter_config.json").read_text())["lora_alpha"]
    config = MODELS["llama"].build().config
    stock = llamacpp.write_adapter(config, tmp_path / "small", tmp_path / "stock.gguf", rank)
    assert case.error({stock: 1.0}, report.ranks) > 1e-2
    ours = llamacpp.write_adapter(config, tmp_path / "small", tmp_path / "ours.gguf", 0.0)
    assert case.error({ours: 1.0}, report.ranks) <= 1e-5


def test_rows_in_their_own_order_are_wrong(
    made: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = made("llama")
    monkeypatch.setattr(llamacpp, "IN_PAIRS", ())
    unordered = llamacpp.write_adapter(MODELS["llama"].build().config, case.adapter, tmp_path / "a.gguf", 24.0)
    assert case.error({unordered: 1.0}) > 1e-2


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("leaf", ["embed_tokens", "lm_head"])
def test_one_end_of_tied_embeddings_is_refused(leaf: str, tmp_path: Path) -> None:
    """llama.cpp stops the whole process at the one, and cannot load the other."""
    base = Base(lambda: causal("Llama", tie_word_embeddings=True), tokens, {"target_modules": ["q_proj", leaf]})
    base.build().config.save_pretrained(tmp_path)
    adapter = random_adapter(base, tmp_path / "adapter", embeddings=False)
    with pytest.raises(ParaError, match="shares its weight"):
        para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.4, target="gguf", base=tmp_path)
    if leaf == "lm_head":
        base_gguf = write_base(base.build(), tmp_path / "base.gguf")
        file = llamacpp.write_adapter(base.build().config, adapter, tmp_path / "a.gguf", 24.0)
        with pytest.raises(RuntimeError):
            computed(base_gguf, {file: 1.0})


def test_another_architecture_is_refused(made: Callable[[str], Case], tmp_path: Path) -> None:
    """A llama's adapter for a qwen2: both have modules of these names and shapes."""
    llama, qwen2 = made("llama"), made("qwen2")
    para_ext.compress_adapter(qwen2.adapter, tmp_path / "small.gguf", keep=0.4, target="gguf", base=qwen2.folder)
    with pytest.raises(RuntimeError):
        computed(llama.gguf, {tmp_path / "small.gguf": 1.0})


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    """Bloom keeps q, k and v in one tensor, whose rows GGUF orders otherwise."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom", "num_hidden_layers": 3}))
    adapter = random_adapter(MODELS["llama"], tmp_path / "adapter", embeddings=False)
    with pytest.raises(ParaError, match="bloom"):
        para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.4, target="gguf", base=tmp_path)
