"""Every target from every source that it can express: one ΔW whatever the format, and refusals before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import write_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from single_files import KOHYA, PEFT, File, number
from sources import (
    DIFFUSION,
    LANGUAGE,
    LAYERS,
    WITHOUT_SCALE,
    Source,
    comfyui_flux,
    dense,
    kohya_pipeline,
    kohya_unet,
    language,
    norm,
    peft_folder,
    peft_rslora,
    peft_unet,
)
from torch import Tensor

import para_ext
from para_ext.errors import ParaError
from para_ext.formats import TARGETS, Wish, housed, read_adapter
from para_ext.formats.names import matched

MATRIX = [
    *((source, target) for source in LANGUAGE for target in ("peft", "vllm", "uniform", "trtllm", "mlx", None)),
    *((source, None) for source in WITHOUT_SCALE),
    *((source, target) for source in DIFFUSION for target in ("peft", "uniform", "diffusers", "kohya", None)),
    *((kohya_pipeline, target) for target in ("diffusers", "kohya")),
    *((comfyui_flux, target) for target in ("peft", "kohya", "diffusers")),
]
matrix = pytest.mark.parametrize(
    ("make", "target"), MATRIX, ids=lambda x: x if isinstance(x, str) else "own" if x is None else x.__name__
)


@pytest.mark.parametrize("make", WITHOUT_SCALE)
@pytest.mark.parametrize("target", ["peft", "vllm", "uniform", "trtllm", "mlx"])
def test_a_file_that_keeps_its_alpha_elsewhere_is_for_its_own_readers(
    tmp_path: Path, make: Source, target: str
) -> None:
    """Another file would state a scale, and nobody knows it."""
    with pytest.raises(ParaError, match="holds no alpha"):
        para_ext.convert_adapter(make(tmp_path / "source"), tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


@matrix
def test_convert(tmp_path: Path, make: Source, target: str | None) -> None:
    source = make(tmp_path / "source")
    report = para_ext.convert_adapter(source, tmp_path / "out", target)
    result = para_ext.verify(source, tmp_path / "out")
    rounding = 2.0**-8 if make is peft_rslora else 2.0**-22
    assert result.relative_error <= rounding
    assert report.error <= 2 * rounding * report.norm
    assert report.target == target
    assert all(t.numel() for file in (tmp_path / "out").glob("*.safetensors") for t in load_file(file).values())
    assert norm(dense(tmp_path / "out")) == pytest.approx(norm(dense(source)), rel=rounding)


def test_convert_is_for_one_target(tmp_path: Path) -> None:
    """And cuts nothing, so that it tells of no threshold."""
    source = peft_folder(tmp_path / "source")
    with pytest.raises(ParaError, match="give one, as text"):
        para_ext.convert_adapter(source, tmp_path / "out", ["peft", "vllm"])  # type: ignore[arg-type]
    report = para_ext.convert_adapter(source, tmp_path / "out", "peft")
    assert report.plan.threshold is None and "threshold" not in report.summary()


@matrix
@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_compress_and_its_certificate(tmp_path: Path, make: Source, target: str | None, keep: float) -> None:
    source = make(tmp_path / "source")
    budget = {"energy": 0.99 if keep == 0.5 else 0.9} if target == "uniform" else {"keep": keep}
    report = para_ext.compress_adapter(source, tmp_path / "out", target=target, **budget)
    old, new = dense(source), dense(tmp_path / "out")
    if not (make is comfyui_flux and target in ("diffusers", "peft")):  # whose names are others there
        spelt = matched(list(old), list(new))
        found = {spelt[name]: delta for name, delta in new.items()}
        lost = norm({name: old.get(name, 0) - found.get(name, 0) for name in old.keys() | found.keys()})
        assert lost <= report.error * (1 + 1e-9)
        assert report.error <= 3 * lost or report.error <= 1e-5 * report.norm
        assert para_ext.verify(source, tmp_path / "out").error == pytest.approx(lost, rel=1e-6, abs=1e-9 * report.norm)
    assert para_ext.verify(source, tmp_path / "out").parameters_after == report.parameters_after


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (peft_folder, "trtllm"),
        (peft_folder, "uniform"),
        (peft_folder, "mlx"),
        (peft_rslora, "vllm"),
        (kohya_unet, "kohya"),
        (kohya_unet, "peft"),
        (peft_unet, "diffusers"),
        (kohya_pipeline, "diffusers"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_size_is_of_the_written_file(tmp_path: Path, make: Source, target: str) -> None:
    """Never more than was asked for; and what ``dry_run`` tells is it, but where the header tells ranks."""
    source = make(tmp_path / "source")
    whole = para_ext.convert_adapter(source, tmp_path / "whole", target).bytes_after
    assert whole is not None
    for i, part in enumerate((1.0, 0.99, 0.9, 0.8)):
        size = int(whole * part) + 2000 * (target == "diffusers")
        budget = {"size": size, "target": target}
        if target == "uniform" and part < 1:
            with pytest.raises(ParaError, match=r"the smallest feasible is size=.*give allowed_ranks=\[1,2,4,6\]"):
                para_ext.compress_adapter(source, tmp_path / str(i), **budget)
            continue
        report = para_ext.compress_adapter(source, tmp_path / str(i), **budget)
        (file,) = (tmp_path / str(i)).glob("*.safetensors")
        assert report.bytes_after == file.stat().st_size <= size
        planned = para_ext.compress_adapter(source, tmp_path / "not", dry_run=True, **budget).bytes_after
        assert planned == report.bytes_after or (target == "diffusers" and report.bytes_after < planned <= size)


def test_kohya_keeps_what_training_wrote(tmp_path: Path) -> None:
    file = File({"ss_steps": "9", "ss_network_dim": "4", "modelspec.title": "t", "sshs_model_hash": "x", "other": "y"})
    file.add("x", "lora_unet_input_blocks_4_1_proj_in", KOHYA, alpha=number(1))
    para_ext.compress_adapter(file.save(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", target="kohya", rank=2)
    with safe_open(tmp_path / "b.safetensors", "pt") as opened:
        header = opened.metadata()
        assert set(opened.keys()) == {
            f"lora_unet_down_blocks_1_attentions_0_proj_in{end}" for end in (*KOHYA, ".alpha")
        }
    assert (header["ss_steps"], header["ss_network_dim"], header["modelspec.title"]) == ("9", "2", "t")
    assert len(header["sshs_model_hash"]) == 64 and "other" not in header


# The base model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A llama, its tensors in two files."""
    folder = tmp_path / "base"
    folder.mkdir()
    config = {"model_type": "llama", "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1,
              "hidden_size": 16, "tie_word_embeddings": True}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    weights = {f"{name}.weight": torch.randn(len(B), A.shape[1]) for name, B, A in language()}
    files = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(weights)}
    for file in set(files.values()):
        save_file({key: t for key, t in weights.items() if files[key] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


@pytest.mark.parametrize("make", LANGUAGE, ids=lambda make: make.__name__)
def test_merged(tmp_path: Path, base: Path, make: Source) -> None:
    source = make(tmp_path / "source")
    report = para_ext.compress_adapter(source, tmp_path / "out", target="merged", base=base, keep=0.5)
    before = {key: t for file in base.glob("*.safetensors") for key, t in load_file(file).items()}
    after = {key: t for file in (tmp_path / "out").glob("*.safetensors") for key, t in load_file(file).items()}
    assert after.keys() == before.keys()
    lost = norm({n: after[f"{n}.weight"].double() - before[f"{n}.weight"] - d for n, d in dense(source).items()})
    assert lost <= report.error * (1 + 1e-5) <= 3 * lost
    assert (tmp_path / "out" / "config.json").read_text() == (base / "config.json").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_the_certificate_of_merged_weights_has_their_rounding(
    tmp_path: Path, base: Path, dtype: torch.dtype, keep: float
) -> None:
    for file in base.glob("*.safetensors"):
        save_file({key: t.to(dtype) for key, t in load_file(file).items()}, file, {"format": "pt"})
    source = peft_folder(tmp_path / "source")
    report = para_ext.compress_adapter(source, tmp_path / "out", target="merged", base=base, keep=keep)
    before = {key: t for file in base.glob("*.safetensors") for key, t in load_file(file).items()}
    after = {key: t for file in (tmp_path / "out").glob("*.safetensors") for key, t in load_file(file).items()}
    lost = {n: after[f"{n}.weight"].double() - before[f"{n}.weight"].double() - d for n, d in dense(source).items()}
    for module in report.modules:
        true = float(lost[module.name].norm())
        assert true <= module.error * (1 + 1e-9) <= 3 * true
    assert norm(lost) <= report.error <= 3 * norm(lost)
    assert report.error > 1.001 * report.plan.error  # which knows of no rounding
    record = json.loads((tmp_path / "out" / "para_ext.json").read_text())
    assert record["error"] == report.error


def test_merged_replaces_what_it_wrote_and_nothing_else(tmp_path: Path, base: Path) -> None:
    source, out = peft_folder(tmp_path / "source"), tmp_path / "out"
    (base / "generation_config.json").write_text("{}")
    for keep in (0.5, 0.25):
        para_ext.compress_adapter(source, out, target="merged", base=base, keep=keep, overwrite=True)
    (out / "mine.txt").write_text("")
    with pytest.raises(ParaError, match=r"also holds mine.txt, so overwrite=True does not replace it"):
        para_ext.compress_adapter(source, out, target="merged", base=base, overwrite=True)
    (out / "mine.txt").unlink()
    (out / "para_ext.json").write_text('{"files": 3}')
    with pytest.raises(ParaError, match="was not written by para-ext"):
        para_ext.compress_adapter(source, out, target="merged", base=base, overwrite=True)


def test_weights_that_are_kept_transposed(tmp_path: Path, base: Path) -> None:
    """In a model that is not known as shapes say; a square one's orientation is not guessed."""
    config = json.loads((base / "config.json").read_text()) | {"model_type": "my_model"}
    (base / "config.json").write_text(json.dumps(config))
    for file in base.glob("*.safetensors"):
        save_file({key: t.T.contiguous() for key, t in load_file(file).items()}, file, {"format": "pt"})
    plain = [(name, B, A) for name, B, A in language() if len(B) != A.shape[1]]
    source = write_adapter(tmp_path / "source", plain, fan_in_fan_out=True)
    report = para_ext.compress_adapter(source, tmp_path / "out", target="merged", base=base, keep=0.9)
    before = {key: t for file in base.glob("*.safetensors") for key, t in load_file(file).items()}
    after = {key: t for file in (tmp_path / "out").glob("*.safetensors") for key, t in load_file(file).items()}
    lost = norm({n: (after[f"{n}.weight"].double() - before[f"{n}.weight"]).T - d for n, d in dense(source).items()})
    assert 0 < lost <= report.error * (1 + 1e-5)
    square = [(name, B, A) for name, B, A in language() if len(B) == A.shape[1]]
    folder = write_adapter(tmp_path / "square", square, fan_in_fan_out=True)
    with pytest.raises(ParaError, match="has no weight in"):
        para_ext.compress_adapter(folder, tmp_path / "out2", target="merged", base=base)


def test_merged_adds_the_factors_before_they_are_rounded(tmp_path: Path, base: Path) -> None:
    """They are stored nowhere: what is lost without truncation is the rounding of the weights, in whatever type."""
    modules = [(name, B.bfloat16(), A.bfloat16()) for name, B, A in language()]
    source = write_adapter(tmp_path / "source", modules, r=6, lora_alpha=7)
    report = para_ext.convert_adapter(source, tmp_path / "out", "merged", base=base)
    before = {key: t.double() for file in base.glob("*.safetensors") for key, t in load_file(file).items()}
    after = {key: t for file in (tmp_path / "out").glob("*.safetensors") for key, t in load_file(file).items()}
    lost = norm({n: after[f"{n}.weight"].double() - before[f"{n}.weight"] - d for n, d in dense(source).items()})
    assert lost <= report.error <= 2.0**-23 * norm(before)


def test_merged_keeps_the_types_and_range_of_the_base(tmp_path: Path, base: Path) -> None:
    """What the adapter brings besides its factors takes the base's type, and must fit into it."""
    (extra := load_file(base / "model-0.safetensors"))["model.norm.weight"] = torch.ones(16)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-0.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({key: t.half() for key, t in extra.items()}, base / "model-0.safetensors", {"format": "pt"})
    source = peft_folder(tmp_path / "source")
    weights = load_file(source / "adapter_model.safetensors")
    for value, fits in ((3.0, True), (1e6, False), (float("inf"), True)):
        weights["base_model.model.model.norm.weight"] = torch.full((16,), value)
        save_file(weights, source / "adapter_model.safetensors", {"format": "pt"})
        out = tmp_path / f"out{value}"
        if fits:
            para_ext.compress_adapter(source, out, target="merged", base=base)
            saved = load_file(out / "model-0.safetensors")["model.norm.weight"]
            assert torch.equal(saved, torch.full((16,), value).half())
        else:
            with pytest.raises(ParaError, match=r"norm\.weight' of the adapter exceeds the range of float16"):
                para_ext.compress_adapter(source, out, target="merged", base=base)
            assert not out.exists()
    infinite = {key: torch.full_like(t, torch.inf) for key, t in load_file(base / "model-0.safetensors").items()}
    save_file(infinite, base / "model-0.safetensors", {"format": "pt"})
    with pytest.raises(ParaError, match="its weight in the base is not finite"):
        para_ext.compress_adapter(source, tmp_path / "out", target="merged", base=base)


def test_merged_certificates_of_large_weights(tmp_path: Path, base: Path) -> None:
    """Whose norm exceeds their own type's range."""
    for file in base.glob("*.safetensors"):
        save_file({key: (t * 300).half() for key, t in load_file(file).items()}, file, {"format": "pt"})
    source = peft_folder(tmp_path / "source")
    report = para_ext.convert_adapter(source, tmp_path / "out", "merged", base=base)
    before = {key: t.double() for file in base.glob("*.safetensors") for key, t in load_file(file).items()}
    after = {key: t for file in (tmp_path / "out").glob("*.safetensors") for key, t in load_file(file).items()}
    assert max(float(t.norm()) for t in before.values()) > 256
    lost = {n: after[f"{n}.weight"].double() - before[f"{n}.weight"] - d for n, d in dense(source).items()}
    assert norm(lost) <= report.error <= 3 * norm(lost)


def test_a_base_runs_no_code(tmp_path: Path, base: Path) -> None:
    """Of a model that transformers doesn't know it would ask, and wait, or do what a file in the folder says."""
    pytest.importorskip("transformers")
    config = json.loads((base / "config.json").read_text())
    names = {"AutoConfig": "conf.MyConfig"}
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": names}))
    (base / "conf.py").write_text(
        f"open({str(tmp_path / 'executed')!r}, 'w')\nfrom transformers import PretrainedConfig as MyConfig\n"
    )
    source = write_adapter(tmp_path / "source", [("lm_head", torch.ones(4, 2), torch.ones(2, 4))])
    with pytest.raises(ParaError, match="has no weight in"):
        para_ext.convert_adapter(source, tmp_path / "out", "merged", base=base)
    assert not (tmp_path / "executed").exists()


def test_what_goes_along_with_merged(tmp_path: Path, base: Path) -> None:
    """The base's own files but no link out of its folder; of the adapter's the tokenizer, not the licence."""
    source = peft_folder(tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (base / "notes").symlink_to(tmp_path / "secret")
    (base / "1_Pooling").mkdir()
    (base / "config.json").rename(tmp_path / "config.json")
    (base / "config.json").symlink_to(tmp_path / "config.json")
    for folder, names in ((base, "LICENSE tokenizer.json"), (source, "LICENSE NOTICE tokenizer.json")):
        for name in names.split():
            (folder / name).write_text(folder.name)
    report = para_ext.compress_adapter(source, tmp_path / "out", target="merged", base=base)
    texts = {p.name: p.read_text() for p in (tmp_path / "out").iterdir() if p.suffix != ".safetensors"}
    assert (texts["LICENSE"], texts["NOTICE"], texts["tokenizer.json"]) == ("base", "source", "source")
    assert "notes" not in texts and json.loads(texts["config.json"])["model_type"] == "llama"
    assert any("Not copied from the base, as folders or links out of it: 1_Pooling, notes." in n for n in report.notes)
    assert any("Not copied: LICENSE" in note for note in report.notes)
    # A merged model is a base like any other; its para_ext.json is not the next one's.
    again = tmp_path / "again"
    for _ in range(2):
        para_ext.compress_adapter(source, again, target="merged", base=tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("target", ["gguf", "uniform"])
def test_a_base_that_cannot_be_the_adapters_is_refused(tmp_path: Path, base: Path, target: str) -> None:
    pytest.importorskip("gguf", reason="it writes and reads the format")
    source = peft_folder(tmp_path / "source")
    config = json.loads((base / "config.json").read_text())
    cases: list[tuple[dict[str, int], str]] = [({"num_hidden_layers": 10**12}, "speaks of 1000000000000 layers")]
    if target == "gguf":
        cases += [({"num_attention_heads": 4, "head_dim": 8}, "has 16 rows, but .* has 4 heads of 8"),
                  ({"hidden_size": 32}, "has 8 rows, but .* has 1 heads of 16")]  # fmt: skip
    for change, message in cases:
        (base / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ParaError, match=message):
            para_ext.compress_adapter(source, tmp_path / f"out{'.gguf' * (target == 'gguf')}", target=target, base=base)


@pytest.mark.parametrize("target", ["uniform", "mlx", "gguf", "merged"])
@pytest.mark.parametrize("by_config", [False, True])
def test_no_base_is_replaced(tmp_path: Path, base: Path, target: str, by_config: bool) -> None:
    """Though it may be a model that para_ext merged, which could be replaced by another one."""
    if target == "gguf":
        pytest.importorskip("gguf", reason="it writes and reads the format")
    source, mine = peft_folder(tmp_path / "source"), tmp_path / "mine"
    para_ext.convert_adapter(source, mine, "merged", base=base)
    given = mine / "config.json" if by_config else mine
    for out in (mine, tmp_path):
        with pytest.raises(ParaError, match=r"is what is read|holds '.*', which is read"):
            para_ext.compress_adapter(source, out, target=target, base=given, overwrite=True)
    assert given.exists() and (mine / "model-0.safetensors").is_file()
    if target == "merged":
        with pytest.raises(ParaError, match="lies inside"):
            para_ext.compress_adapter(source, mine / "new", target=target, base=given)
    else:
        para_ext.compress_adapter(source, mine / "new", target=target, base=given)


def test_a_base_that_nothing_reads_is_refused(tmp_path: Path, base: Path) -> None:
    source = peft_folder(tmp_path / "source")
    with pytest.raises(ParaError, match="base is read for gguf, merged, mlx, uniform only"):
        para_ext.compress_adapter(source, tmp_path / "out", target="vllm", base=base)


def test_layers_without_end_are_not_filled_up(tmp_path: Path) -> None:
    (name, B, A), *_ = language()
    far = name.replace("layers.0", "layers.999999999999")
    source = write_adapter(tmp_path / "source", [(name, B, A), (far, B + 1, A + 1)])
    with pytest.raises(ParaError, match="is of more layers than models have"):
        para_ext.compress_adapter(source, tmp_path / "out", target="uniform")


def test_merged_takes_no_weight_of_another_part(tmp_path: Path, base: Path) -> None:
    """Only what models with heads call their body may be left out of a name."""
    modules = [(f"vision.{name}", B, A) for name, B, A in language()]
    folder = write_adapter(tmp_path / "source", modules)
    with pytest.raises(ParaError, match=r"module 'vision\..*' has no weight in"):
        para_ext.compress_adapter(folder, tmp_path / "out", target="merged", base=base)


@pytest.mark.parametrize("make", LANGUAGE, ids=lambda make: make.__name__)
def test_gguf(tmp_path: Path, base: Path, make: Source) -> None:
    gguf = pytest.importorskip("gguf", reason="it writes and reads the format")
    source = make(tmp_path / "source")
    report = para_ext.compress_adapter(source, tmp_path / "out.gguf", target="gguf", base=base, keep=0.5, dtype="fp32")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.get_field("adapter.lora.alpha").contents() == 0.0  # with which llama.cpp takes the scale as 1
    assert reader.get_field("general.architecture").contents() == "llama"
    tensors = {t.name: torch.from_numpy(np.array(t.data)).double() for t in reader.tensors}
    kinds = {"self_attn.q_proj": ("attn_q", 2), "self_attn.k_proj": ("attn_k", 1), "self_attn.v_proj": ("attn_v", 0),
             "mlp.up_proj": ("ffn_up", 0)}  # fmt: skip
    found = {}
    for i in range(LAYERS):
        for leaf, (kind, heads) in kinds.items():
            name = f"blk.{i}.{kind}.weight"
            if f"{name}.lora_a" in tensors:
                B = tensors[f"{name}.lora_b"]
                if heads:  # rows are (head, i, half) there, (head, half, i) in transformers
                    B = B.reshape(heads, -1, 2, B.shape[1]).swapaxes(1, 2).reshape(B.shape)
                found[f"model.layers.{i}.{leaf}"] = B @ tensors[f"{name}.lora_a"]
    assert found.keys() == {name for name, rank in report.ranks.items() if rank}
    lost = norm({name: delta - found.get(name, 0) for name, delta in dense(source).items()})
    assert lost <= report.error * (1 + 1e-5) <= 3 * lost


# Refusals


def with_tensors(folder: Path, more: dict[str, Tensor], **config: Any) -> Path:
    write_adapter(folder, language(), foreign=more, **config)
    return folder


def merged_linear(path: Path) -> Path:
    file = File().add("x", "h.0.attn", (".lora_A", ".lora_B"), groups=2)
    return file.save(path.with_suffix(".safetensors"))


def keyed(path: Path, stem: str, ends: tuple[str, str] = KOHYA, **more: Tensor) -> Path:
    file = File().add("x", stem, ends)
    file.tensors |= {key.replace("__", "."): t for key, t in more.items()}
    return file.save(path.with_suffix(".safetensors"))


NOT_PEFT = tuple(target for target in TARGETS if target != "peft")
Q = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Source, tuple[str, ...], str]] = {
    "DoRA": (lambda p: with_tensors(p, {f"{Q}.lora_magnitude_vector": torch.ones(16)}, use_dora=True),
             NOT_PEFT, "uses DoRA.*target='peft'"),
    "bias": (lambda p: with_tensors(p, {f"{Q}.lora_B.bias": torch.ones(16)}, lora_bias=True),
             NOT_PEFT, "has a lora_B.bias.*target='peft'"),
    "aLoRA": (lambda p: peft_folder(p, alora_invocation_tokens=[1, 2]),
              NOT_PEFT, "uses aLoRA.*target='peft'"),
    "layer replication": (lambda p: peft_folder(p, layer_replication=[[0, 2], [1, 3]]),
                          NOT_PEFT, "uses layer replication"),
    "trained tokens": (lambda p: peft_folder(p, trainable_token_indices=[1]), NOT_PEFT, "uses trained tokens"),
    "modules_to_save": (lambda p: with_tensors(p, {"base_model.model.lm_head.weight": torch.ones(4, 16)},
                                               modules_to_save=["lm_head"]),
                        ("vllm", "uniform", "trtllm", "mlx", "gguf"),
                        "also holds 'base_model.model.lm_head.weight'.*target='peft' or target='merged'"),
    "pipeline": (kohya_pipeline, ("peft", "vllm", "uniform", "trtllm", "mlx", "gguf", "merged"),
                 r"adapts several models \(text_encoder, text_encoder_2, unet\).*use target='diffusers'"),
    "numbers": (lambda p: keyed(p, "unet:0", (":down", ":up")), ("peft", "kohya", "diffusers", "uniform"),
                "has a number for a name.*compress without a target"),
    "unknown words": (lambda p: keyed(p, "lora_unet_new_kind_of_block_0_x"), ("peft", "diffusers", "kohya", "uniform"),
                      "whose dots are unknown.*compress without a target"),
    "dora_scale": (lambda p: keyed(p, "lora_unet_conv_in", lora_unet_conv_in__dora_scale=torch.ones(12, 1)),
                   ("peft", "diffusers", "kohya"), "dora_scale.*compress without a target to keep"),
    "merged linear": (merged_linear, ("peft", "vllm", "uniform", "trtllm", "mlx"), "is several layers in one"),
    "no diffusion": (peft_folder, ("diffusers", "kohya"), "is of no diffusion model that is known.*target='peft'"),
    "original names": (lambda p: keyed(p, "lora_unet_joint_blocks_0_x_block_attn_qkv"), ("diffusers",),
                       "named as in the original model.*use target='kohya'"),
    "grouped": (lambda p: File().add("x", "unet.x", PEFT, (6, 2, 3, 3), groups=2).save(p.with_suffix(".safetensors")),
                ("kohya", "diffusers", "uniform", "trtllm"), "target='peft'"),
    "no base": (peft_folder, ("gguf", "merged"), "needs the base model: give its folder by base="),
    "convolution": (peft_unet, ("trtllm", "mlx"), "target='(peft|merged|diffusers)'"),
    "names MLX lacks": (lambda p: write_adapter(p), ("mlx",), "has no name that is known in MLX: use target='merged'"),
    **{f"{name} in MLX": (lambda p, n=name: write_adapter(p, [(n, torch.ones(4, 2), torch.ones(2, 4))]), ("mlx",),
                          "has no name that is known in MLX: use target='merged'")
       for name in ("model.layers.0.mlp.experts.3.up_proj", "model.language_model.layers.0.self_attn.q_proj",
                    "model.visual.blocks.0.attn.qkv", "transformer.h.0.attn.c_attn")},
}  # fmt: skip


@pytest.mark.parametrize(("case", "target"), [(case, t) for case, (_, targets, _) in REFUSED.items() for t in targets])
def test_refusals(tmp_path: Path, base: Path, case: str, target: str) -> None:
    """By reading names and shapes alone, in one line."""
    make, _, why = REFUSED[case]
    adapter = read_adapter(make(tmp_path / "source"))
    with pytest.raises(ParaError, match=why) as refusal:
        housed(adapter, target, Wish(base=None if case == "no base" else base))
    assert "\n" not in str(refusal.value)


def test_refusals_for_ranks_and_shaping(tmp_path: Path) -> None:
    wide = [("model.layers.0.x", torch.randn(600, 530), torch.randn(530, 600))]
    source = write_adapter(tmp_path / "wide", wide, target_modules=["x"])
    with pytest.raises(ParaError, match=r"would have rank 530, but vLLM takes at most 512: compress with max_rank=512"):
        para_ext.convert_adapter(source, tmp_path / "out", "vllm")
    with pytest.raises(ParaError, match=r"has rank 530, but this target takes at most 512: compress"):
        para_ext.convert_adapter(source, tmp_path / "out", "uniform")
    small = peft_folder(tmp_path / "small")
    with pytest.raises(ParaError, match="uniform='type' is not what this target needs: leave it out"):
        para_ext.compress_adapter(small, tmp_path / "out", target="mlx", uniform="type")
    with pytest.raises(ParaError, match=r"target 'ollama' is unknown; use one of peft, vllm"):
        para_ext.compress_adapter(small, tmp_path / "out", target="ollama")
    with pytest.raises(ParaError, match=r"does not exist: download the base model"):
        para_ext.compress_adapter(small, tmp_path / "out", target="merged", base=small / "adapter_config.json.no")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small", "wide"]


def test_every_target_is_tried_here() -> None:
    tried = {target for _, target in MATRIX} | {"gguf", "merged"}
    assert tried == {*TARGETS, None}
