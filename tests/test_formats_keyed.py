"""Single files of pairs, in every style: the scale that is read, what is written back, and what is refused.

The oracle is ΔW = scale · B·A in fp64, with the scale that the test itself put into the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from single_files import KOHYA, PEFT, STYLES, File, delta_in, number
from torch import Tensor

import para_ext
from para_ext.errors import ParaError
from para_ext.formats import read_adapter


def truncated(delta: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.fixture(params=STYLES, ids=lambda style: style.__name__)
def file(request: pytest.FixtureRequest) -> File:
    return request.param()


def deltas(path: Path) -> dict[str, Tensor]:
    """What para_ext reads: ΔW by module, members of a group one above the other."""
    found: dict[str, list[Tensor]] = {}
    for f in para_ext.decompose(path).factors:
        B, A = (torch.from_numpy(x.astype("f8")) for x in (f.B, f.A))
        found.setdefault(f.group or f.name, []).append(f.scale * B @ A)
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_the_scale_of_every_style(tmp_path: Path, file: File) -> None:
    read = deltas(file.save(tmp_path / "lora.safetensors"))
    assert read.keys() == file.modules.keys()
    for name, module in file.modules.items():
        torch.testing.assert_close(read[name], module.delta, rtol=file.rounding, atol=file.rounding, msg=name)


def test_full_rank_keeps_everything(tmp_path: Path, file: File) -> None:
    """Keys, foreign tensors and metadata stay; A stays to the bit, and ΔW to the rounding of one number."""
    source = file.save(tmp_path / "lora.safetensors")
    report = para_ext.compress_adapter(source, tmp_path / "out.safetensors", keep=1.0)
    old, new = file.tensors, load_file(tmp_path / "out.safetensors")
    alphas = {module.alpha for module in file.modules.values()} if any("alpha" in key for key in old) else set()
    assert new.keys() == (old.keys() | alphas) - {key for key in old if "lora_mid" in key}
    assert all(torch.equal(new[key], old[key]) for key in file.foreign)
    rounding = max(torch.finfo(t.dtype).eps for t in new.values() if t.is_floating_point())
    for name, module in file.modules.items():
        if "resnets_0_conv1.lora_mid.weight" not in "".join(old):
            assert torch.equal(new[module.A], old[module.A]), name
        torch.testing.assert_close(delta_in(new, module), module.delta, rtol=rounding, atol=rounding, msg=name)
    kept = {key: value for key, value in file.metadata.items() if not re.search("_dim|_alpha|_args|hash|adapter", key)}
    assert kept.items() <= header(tmp_path / "out.safetensors").items()
    assert report.bytes_after == (tmp_path / "out.safetensors").stat().st_size
    assert para_ext.verify(source, tmp_path / "out.safetensors").relative_error <= rounding


def test_truncated_to_the_best_approximation(tmp_path: Path, file: File) -> None:
    source = file.save(tmp_path / "lora.safetensors")
    report = para_ext.compress_adapter(source, tmp_path / "out.safetensors", rank=1, dtype="fp32")
    new = load_file(tmp_path / "out.safetensors")
    assert all(tensor.numel() or key in file.foreign for key, tensor in new.items())
    for name, module in file.modules.items():
        groups = len(new[module.A])
        best = torch.cat([truncated(block, 1) for block in module.delta.chunk(groups)])
        torch.testing.assert_close(delta_in(new, module), best, rtol=1e-5, atol=1e-5, msg=name)
    lost = sum(float((delta_in(new, m) - m.delta).square().sum()) for m in file.modules.values()) ** 0.5
    assert lost <= report.error * (1 + 1e-12)
    assert para_ext.verify(source, tmp_path / "out.safetensors").error == pytest.approx(lost, rel=1e-6)


def test_one_alpha_for_all(tmp_path: Path, file: File) -> None:
    """diffusers gives alphas that differ to the wrong modules."""
    source = file.save(tmp_path / "lora.safetensors")
    para_ext.compress_adapter(source, tmp_path / "out.safetensors", energy=0.99)
    new = load_file(tmp_path / "out.safetensors")
    alphas = {key: value for key, value in new.items() if key.endswith(".alpha")}
    if not any(key.endswith(".alpha") for key in file.tensors):
        assert not alphas
        return
    kept = {module.alpha: module for module in file.modules.values() if module.A in new}
    assert alphas.keys() == kept.keys()
    assert {float(value) for value in alphas.values()} == {max(len(new[module.A]) for module in kept.values())}
    for key, value in alphas.items():
        assert value.shape == (file.tensors[key].shape if key in file.tensors else ()), key


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_size_is_an_upper_bound(tmp_path: Path, style: Callable[[], File]) -> None:
    """Of the whole file, and exact where the header does not tell ranks."""
    file = style()
    source = file.save(tmp_path / "lora.safetensors")
    whole = para_ext.compress_adapter(source, tmp_path / "whole.safetensors", keep=1.0).bytes_after
    least = para_ext.compress_adapter(source, tmp_path / "least.safetensors", total_rank=99, max_rank=1).bytes_after
    told = {"ss_network_dim", "lora_adapter_metadata"} & file.metadata.keys()
    for i, size in enumerate(range(least + 400 * bool(told), whole + 64, 97)):
        out = tmp_path / f"{i}.safetensors"
        report = para_ext.compress_adapter(source, out, size=size)
        assert report.bytes_after == out.stat().st_size <= size
    layout = read_adapter(source).layout(metadata=header(tmp_path / "whole.safetensors")["para_ext"])
    ranks = {f.name: f.rank for f in read_adapter(tmp_path / "whole.safetensors").factors}
    assert layout.bytes(ranks) == whole if not told else layout.bytes(ranks) >= whole


# Headers


def test_kohya_hashes_and_dims(tmp_path: Path) -> None:
    """sshs_model_hash is SHA-256 of all that follows the header; sshs_legacy_hash of 64 KiB at 1 MiB of the file."""
    file = File({"ss_network_dim": "64", "ss_network_alpha": "32", "ss_steps": "9", "sshs_model_hash": "?",
                 "sshs_legacy_hash": "?", "modelspec.title": "x"})  # fmt: skip
    for i in range(4):
        file.add(f"unet.down_blocks.{i}.proj_in", f"lora_unet_down_blocks_{i}_proj_in", KOHYA, (2100, 2000),
                 rank=64, alpha=number(32), scale=0.5)  # fmt: skip
    source = file.save(tmp_path / "lora.safetensors")
    para_ext.compress_adapter(source, tmp_path / "same.safetensors", rank=32)
    para_ext.compress_adapter(source, tmp_path / "mixed.safetensors", total_rank=101)
    for name, dim, alpha in (("same", "32", "32.0"), ("mixed", "Dynamic", "28.0")):
        path = tmp_path / f"{name}.safetensors"
        new, tensors = header(path), load_file(path)
        if name == "mixed":
            alpha = str(float(max(len(t) for key, t in tensors.items() if "down.w" in key)))
        assert (new["ss_network_dim"], new["ss_network_alpha"], new["ss_steps"]) == (dim, alpha, "9")
        trained = save(tensors, {key: value for key, value in new.items() if key.startswith("ss_")})
        data = trained[8 + int.from_bytes(trained[:8], "little") :]
        assert len(trained) > 0x110000
        assert new["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
        assert new["sshs_legacy_hash"] == hashlib.sha256(trained[0x100000:0x110000]).hexdigest()[:8]


def test_cloneofsimo_keeps_every_module_and_tells_ranks(tmp_path: Path) -> None:
    """Its readers count modules, and build each with the rank that the header gives it."""
    file = File()
    for i in range(4):
        file.add(f"unet.{i}", f"unet:{i}", (":down", ":up"))
        file.metadata[f"unet:{i}:rank"] = "4"
    file.tensors["unet:0:up"] *= 1e-3
    source = file.save(tmp_path / "lora.safetensors")
    report = para_ext.compress_adapter(source, tmp_path / "out.safetensors", energy=0.97)
    assert any("counts modules" in note for note in report.notes)
    new, ranks = load_file(tmp_path / "out.safetensors"), header(tmp_path / "out.safetensors")
    assert {int(ranks[f"unet:{i}:rank"]) for i in range(4)} > {1}
    for i in range(4):
        assert new[f"unet:{i}:down"].shape[0] == new[f"unet:{i}:up"].shape[1] == int(ranks[f"unet:{i}:rank"])


def test_pipeline_settings_follow_the_ranks(tmp_path: Path) -> None:
    file = File({"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8, "unet.lora_dropout": 0.5,
                                                      "unet.target_modules": ["to_q"]})})  # fmt: skip
    for i in range(4):
        name = f"unet.down_blocks.{i}.attn.to_q"
        file.add(name, name, PEFT)
        file.tensors[name + PEFT[1]] *= 10.0**-i
    para_ext.compress_adapter(file.save(tmp_path / "lora.safetensors"), tmp_path / "out.safetensors", energy=0.9999)
    new = load_file(tmp_path / "out.safetensors")
    ranks = {key[5 : -len(PEFT[0])]: len(value) for key, value in new.items() if key.endswith(PEFT[0])}
    assert len(set(ranks.values())) > 1
    settings = json.loads(header(tmp_path / "out.safetensors")["lora_adapter_metadata"])
    largest = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != largest}
    assert settings["unet.r"] == settings["unet.lora_alpha"] == largest
    assert settings["unet.rank_pattern"] == settings["unet.alpha_pattern"] == others
    assert sorted(settings["unet.target_modules"]) == sorted(ranks)
    assert settings["unet.lora_dropout"] == 0.5
    assert {f.scale for f in read_adapter(tmp_path / "out.safetensors").factors} == {1.0}


# Where it goes


def small() -> File:
    return File({"ss_tag": "x"}).add("unet.down_blocks.0.proj_in", "lora_unet_down_blocks_0_proj_in", KOHYA)


def test_file_or_folder(tmp_path: Path) -> None:
    source = small().save(tmp_path / "in" / "my.safetensors")
    (tmp_path / "in" / "README.md").write_text("card")
    para_ext.compress_adapter(source, tmp_path / "one.safetensors", rank=2)
    para_ext.compress_adapter(source, tmp_path / "folder", rank=2)
    para_ext.compress_adapter(tmp_path / "in", tmp_path / "along", rank=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["along", "folder", "in", "one.safetensors"]
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["my.safetensors", "para_ext.json"]
    assert sorted(p.name for p in (tmp_path / "along").iterdir()) == ["README.md", "my.safetensors", "para_ext.json"]
    files = [load_file(path) for path in (tmp_path / "one.safetensors", tmp_path / "folder" / "my.safetensors")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert para_ext.verify(tmp_path / "folder", tmp_path / "one.safetensors").error == 0


def test_overwrite(tmp_path: Path) -> None:
    source = small().save(tmp_path / "my.safetensors")
    file, folder = tmp_path / "out.safetensors", tmp_path / "out"
    for out in (file, folder):
        para_ext.compress_adapter(source, out, rank=2)
        with pytest.raises(ParaError, match=r"exists: give a new .*overwrite=True"):
            para_ext.compress_adapter(source, out, rank=1)
        para_ext.compress_adapter(source, out, rank=1, overwrite=True)
        assert {f.rank for f in read_adapter(out).factors} == {1}
    for out, why in (
        (source, "is what is read"),
        (tmp_path, "holds .*, which is read"),
        (tmp_path / "x.bin", "would be a folder here"),
    ):
        with pytest.raises(ParaError, match=why):
            para_ext.compress_adapter(source, out, rank=1)
    file.unlink()
    file.symlink_to(source)
    with pytest.raises(ParaError, match=r"is what is read|not a regular file"):
        para_ext.compress_adapter(source, file, rank=1, overwrite=True)
    with pytest.raises(ParaError, match="would be one file, but there are several outputs"):
        para_ext.compress_adapter(source, tmp_path / "new.safetensors", keep=[0.5, 0.25])


def test_everything_dropped_leaves_one_pair_of_zeros(tmp_path: Path) -> None:
    file = small().add("unet.mid_block.proj_in", "lora_unet_mid_block_proj_in", KOHYA, (8, 6, 3, 3), alpha=number(4))
    file.tensors = {key: t if "alpha" in key else 0 * t for key, t in file.tensors.items()}
    para_ext.compress_adapter(file.save(tmp_path / "lora.safetensors"), tmp_path / "out.safetensors")
    new = load_file(tmp_path / "out.safetensors")
    assert {key: list(t.shape) for key, t in new.items() if key.endswith("weight")} == {
        "lora_unet_down_blocks_0_proj_in.lora_down.weight": [1, 10],
        "lora_unet_down_blocks_0_proj_in.lora_up.weight": [12, 1],
    }
    assert all(t.numel() for t in new.values())


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickles_become_safetensors(tmp_path: Path, suffix: str) -> None:
    file = File().add("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn", (".lora_A", ".lora_B"), groups=2)
    report = para_ext.compress_adapter(file.save(tmp_path / f"gpt2{suffix}"), tmp_path / "out", keep=1.0)
    new = load_file(tmp_path / "out" / "gpt2.safetensors")
    assert new.keys() == file.tensors.keys()
    assert all(torch.equal(new[key], tensor) for key, tensor in file.tensors.items())
    assert any("no alpha" in note for note in report.notes)


def test_peft_keys_with_and_without_a_config(tmp_path: Path) -> None:
    """The scale is the config's, where one lies beside the file."""
    file = File().add("layers.0.q_proj", "base_model.model.layers.0.q_proj", PEFT)
    source = file.save(tmp_path / "lora" / "weights.safetensors")
    assert read_adapter(source).factors[0].scale == read_adapter(source.parent).factors[0].scale == 1
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 10, "target_modules": ["q_proj"]}
    (source.parent / "adapter_config.json").write_text(json.dumps(config))
    assert read_adapter(source).factors[0].scale == 2.5
    para_ext.compress_adapter(source, tmp_path / "out", rank=2)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "para_ext.json"]  # fmt: skip
    source.rename(source.with_name("adapter_model.safetensors"))
    with pytest.raises(ParaError, match="is the tensor file of an adapter: give its folder"):
        read_adapter(source.with_name("adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("ends", "magnitude"),
    [
        (KOHYA, "dora_scale"),
        (PEFT, "lora_magnitude_vector"),
        (PEFT, "lora_magnitude_vector.weight"),
        ((".lora_A.default.weight", ".lora_B.default.weight"), "lora_magnitude_vector.default.weight"),
    ],
)
def test_dora_is_never_dropped(tmp_path: Path, ends: tuple[str, str], magnitude: str) -> None:
    file = File()
    for name, size in (("a", 1.0), ("b", 1e-6), ("c", 1e-6)):
        file.add(f"x.{name}", f"lora_unet_{name}", ends)
        file.tensors[f"lora_unet_{name}{ends[1]}"] *= size
    file.also(f"lora_unet_b.{magnitude}", torch.rand(12, 1))
    report = para_ext.compress_adapter(file.save(tmp_path / "lora.safetensors"), tmp_path / "out.safetensors")
    new = load_file(tmp_path / "out.safetensors")
    assert {key for key in new if key.endswith(ends[0])} == {f"lora_unet_{x}{ends[0]}" for x in "ab"}
    assert torch.equal(new[f"lora_unet_b.{magnitude}"], file.tensors[f"lora_unet_b.{magnitude}"])
    assert any("DoRA" in note for note in report.notes)


# Refusals


def pair(stem: str = "lora_unet_mid_block_proj_in", m: int = 6, n: int = 5, r: int = 2) -> dict[str, Tensor]:
    return {f"{stem}.lora_down.weight": torch.ones(r, n), f"{stem}.lora_up.weight": torch.ones(m, r)}


ONE = "lora_unet_mid_block_proj_in"
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "half a pair": ({**pair(), "x.lora_down.weight": torch.ones(2, 3)}, "no 'x.lora_up.weight', the other half"),
    "twice": ({**pair("lora_unet_mid_block_attentions_0_proj_in"), **pair("lora_unet_middle_block_1_proj_in")},
              "holds module 'unet.mid_block.attentions.0.proj_in' twice, also as"),
    "LoKr": ({**pair(), "y.lokr_w1": torch.ones(2, 2)}, "'y.lokr_w1' looks like LoKr"),
    "LoHa": ({**pair(), "y.hada_w1_a": torch.ones(2, 2)}, "'y.hada_w1_a' looks like LoHa"),
    "LoKr alone": ({"y.lokr_w1": torch.ones(2, 2), "y.alpha": torch.ones(())}, "LoKr tensors but no LoRA pair"),
    "no adapter": ({"model.weight": torch.ones(2, 2)}, "no LoRA pair: give a LoRA adapter"),
    "alpha NaN": ({**pair(), f"{ONE}.alpha": torch.tensor(float("nan"))}, "scale is nan"),
    "alpha inf": ({**pair(), f"{ONE}.alpha": torch.tensor(float("inf"))}, "scale is inf"),
    "alpha 0": ({**pair(), f"{ONE}.alpha": torch.zeros(())}, "is 0, which some programs read as no effect"),
    "two alphas": ({**pair(), f"{ONE}.alpha": torch.ones(2)}, r"has shape \[2\]: give one number"),
    "stray alpha": ({**pair(), "y.alpha": torch.ones(())}, "'y.alpha' looks like a part of a LoRA"),
    "reshape": ({**pair(), f"{ONE}.reshape_weight": torch.ones(2)}, "reshape_weight' looks like a part"),
    "ranks differ": ({**pair(), f"{ONE}.lora_up.weight": torch.ones(6, 3)}, "which don't fit"),
    "2-D grouped": ({**pair(r=4), f"{ONE}.lora_up.weight": torch.ones(6, 2)}, "which don't fit"),
    "1-D": ({**pair(), f"{ONE}.lora_down.weight": torch.ones(2)}, "which don't fit"),
    "3-D and 2-D": ({**pair(), f"{ONE}.lora_down.weight": torch.ones(2, 5, 1)}, "which don't fit"),
    "wide up": ({f"{ONE}.lora_down.weight": torch.ones(2, 5, 3, 3), f"{ONE}.lora_up.weight": torch.ones(6, 2, 3, 3)},
                "which don't fit"),
    "empty": ({**pair(r=0)}, "which don't fit"),
    "mid": ({**pair(), f"{ONE}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "lora_mid is .* which do not fit"),
    "NaN": ({**pair(), f"{ONE}.lora_up.weight": torch.full((6, 2), float("nan"))}, "NaN"),
    "integers": ({**pair(), f"{ONE}.lora_up.weight": torch.ones(6, 2, dtype=torch.int32)}, "dtype int32"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_line(tmp_path: Path, name: str) -> None:
    tensors, why = REFUSED[name]
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ParaError, match=why) as refusal:
        para_ext.compress_adapter(tmp_path / "lora.safetensors", tmp_path / "out.safetensors")
    assert "\n" not in str(refusal.value)
    assert [p.name for p in tmp_path.iterdir()] == ["lora.safetensors"]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "is not a JSON object"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"unet.lora_alpha": 4}', "has no r"),
        ('{"unet.r": 4, "unet.lora_alpha": "x"}', "lora_alpha is 'x', but must be a number"),
        ('{"unet.r": 8, "unet.lora_alpha": 8}', "has rank 4, but the file's settings give it another"),
        ('{"unet.r": 4, "unet.lora_alpha": 8, "unet.rank_pattern": {"(": 4}}', "is not a regular expression"),
        ('{"r": 4}', "has no lora_alpha"),
        ("4", "is not a JSON object"),
    ],
)
def test_bad_settings(tmp_path: Path, settings: str, why: str) -> None:
    file = File({"lora_adapter_metadata": settings}).add("unet.x", "unet.x", PEFT)
    with pytest.raises(ParaError, match=why) as refusal:
        read_adapter(file.save(tmp_path / "lora.safetensors"))
    assert "\n" not in str(refusal.value)


def test_bad_files(tmp_path: Path) -> None:
    whole = small().save(tmp_path / "lora.safetensors").read_bytes()
    path = tmp_path / "bad.safetensors"
    for content, why in (
        (b"", "is empty"),
        (whole[:-1], "not a whole safetensors file"),
        (whole[:7], "not a whole safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ):
        path.write_bytes(content)
        with pytest.raises(ParaError, match=why):
            read_adapter(path)
    with pytest.raises(ParaError, match="does not exist"):
        read_adapter(tmp_path / "none.safetensors")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ParaError, match="is not a tensor file"):
        read_adapter(tmp_path / "x.txt")
    with pytest.raises(ParaError, match=r"holds 2 tensor files, such as 'bad.safetensors': give one"):
        read_adapter(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ParaError, match="holds no tensor file"):
        read_adapter(tmp_path / "folder")
