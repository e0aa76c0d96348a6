"""Names of modules across the spellings of diffusion adapters, on made-up names and on the keys of real files.

``PARA_EXT_TEST_KEYS`` names a folder of JSON files, key → shape, of real adapters without their values.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import para_ext
from para_ext.errors import ParaError
from para_ext.formats import names, read_adapter

words = st.sampled_from(sorted(names._WORDS)) | st.integers(0, 99).map(str)
dotted_names = st.lists(words, min_size=1, max_size=8).map(".".join)


@given(st.text("abcdefgh_.0123456789:", max_size=40) | dotted_names.map(lambda name: name.replace(".", "_")))
def test_dots_come_from_underscores_alone(flat: str) -> None:
    name = names.dotted(flat)
    assert not name or name.replace(".", "_") == flat


@given(dotted_names)
@example("final_layer.norm_out")  # not final_layer_norm and a word "out"
def test_known_words_are_always_split(name: str) -> None:
    assert names.dotted(name.replace(".", "_"))


@given(dotted_names.filter(lambda name: not name.startswith(("input_blocks", "middle_block", "output_blocks"))))
def test_kohya_and_back(name: str) -> None:
    flat = name.replace(".", "_")
    for stem in (f"lora_unet_{flat}", f"lora_te_{flat}", f"lora_te1_{flat}", f"lora_te2_{flat}", f"lora_te3_{flat}"):
        assert names.kohya(names.canonical(stem), several_encoders="te1" in stem) == stem


@given(st.text(max_size=60))
def test_canonical_takes_anything(stem: str) -> None:
    name = names.canonical(stem)
    assert names.component(name) in ("", *names.COMPONENTS)
    assert names.canonical(name) == name or names.component(stem) == ""


CANONICAL = {
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0":
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "lora_unet_mid_block_resnets_1_time_emb_proj": "unet.mid_block.resnets.1.time_emb_proj",
    "lora_unet_input_blocks_0_0": "unet.conv_in",
    "lora_unet_input_blocks_1_0_in_layers_2": "unet.down_blocks.0.resnets.0.conv1",
    "lora_unet_input_blocks_3_0_op": "unet.down_blocks.0.downsamplers.0.conv",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_0_proj":
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "lora_unet_input_blocks_8_0_skip_connection": "unet.down_blocks.2.resnets.1.conv_shortcut",
    "lora_unet_middle_block_0_emb_layers_1": "unet.mid_block.resnets.0.time_emb_proj",
    "lora_unet_middle_block_1_proj_in": "unet.mid_block.attentions.0.proj_in",
    "lora_unet_middle_block_2_out_layers_3": "unet.mid_block.resnets.1.conv2",
    "lora_unet_output_blocks_2_2_conv": "unet.up_blocks.0.upsamplers.0.conv",
    "lora_unet_output_blocks_8_1_proj_out": "unet.up_blocks.2.attentions.2.proj_out",
    "lora_unet_single_blocks_7_modulation_lin": "transformer.single_blocks.7.modulation.lin",
    "lora_unet_words_that_are_new": "transformer.words_that_are_new",
    "lora_transformer_transformer_blocks_3_norm1_context_linear":
        "transformer.transformer_blocks.3.norm1_context.linear",
    "lora_prior_unet_transformer_blocks_3_attn1_to_q": "prior.transformer_blocks.3.attn1.to_q",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "lora_te2_text_model_encoder_layers_31_mlp_fc1": "text_encoder_2.text_model.encoder.layers.31.mlp.fc1",
    "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0":
        "text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wi_0",
    "diffusion_model.double_blocks.0.txt_mlp.2": "transformer.double_blocks.0.txt_mlp.2",
    "diffusion_model.input_blocks.1.1.proj_in": "unet.down_blocks.0.attentions.0.proj_in",
    "base_model.model.model.layers.0.mlp.up_proj": "model.layers.0.mlp.up_proj",
    "transformer_blocks.0.attn.to_k": "transformer.transformer_blocks.0.attn.to_k",
    "down_blocks.0.attentions.1.attn1.processor.to_out": "unet.down_blocks.0.attentions.1.attn1.to_out.0",
    "text_encoder.text_model.encoder.layers.0.self_attn.to_out":
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
    "model.layers.0.self_attn.q_proj": "model.layers.0.self_attn.q_proj",
    "x": "x",
}  # fmt: skip


@pytest.mark.parametrize("stem", CANONICAL)
def test_canonical(stem: str) -> None:
    assert names.canonical(stem) == CANONICAL[stem]


@pytest.mark.parametrize(
    ("name", "several", "stem"),
    [
        ("unet.mid_block.attentions.0.proj_in", False, "lora_unet_mid_block_attentions_0_proj_in"),
        ("transformer.single_blocks.0.linear1", True, "lora_unet_single_blocks_0_linear1"),
        ("prior.transformer_blocks.3.attn1.to_q", False, "lora_prior_unet_transformer_blocks_3_attn1_to_q"),
        ("text_encoder.text_model.x", False, "lora_te_text_model_x"),
        ("text_encoder.encoder.layers.0.mlp.fc1", True, "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        ("text_encoder_2.text_model.x", True, "lora_te2_text_model_x"),
    ],
)
def test_kohya(name: str, several: bool, stem: str) -> None:
    assert names.kohya(name, several_encoders=several) == stem


@pytest.mark.parametrize(
    ("name", "component", "placed"),
    [
        ("unet.x", "unet", ""),
        ("down_blocks.0.x", "", "unet.down_blocks.0.x"),
        ("single_transformer_blocks.0.x", "", "transformer.single_transformer_blocks.0.x"),
        ("text_model.encoder.x", "", "text_encoder.text_model.encoder.x"),
        ("transformer.transformer_blocks.0.attn.to_q", "transformer", ""),
        # Language models that call themselves so.
        ("transformer.h.0.attn.c_attn", "", ""),
        ("transformer.wte", "", ""),
        ("transformer.word_embeddings", "", ""),
        ("transformer.encoder.layers.0.self_attention.query_key_value", "", ""),
        ("transformer.blocks.0.attn.Wqkv", "", ""),
        ("transformer.blocks.0.attn1.to_q", "transformer", ""),
        ("model.layers.0.mlp.up_proj", "", ""),
    ],
)
def test_components(name: str, component: str, placed: str) -> None:
    assert names.component(name) == component
    assert names.placed(name) == placed


@pytest.mark.parametrize(
    ("name", "is_original"),
    [
        ("transformer.double_blocks.0.img_attn.qkv", True),
        ("transformer.joint_blocks.0.x_block.attn.qkv", True),
        ("transformer.blocks.0.self_attn.q", True),
        ("transformer.blocks.0.ffn.2", True),
        ("transformer.blocks.0.attn1.to_q", False),
        ("transformer.blocks.0.ffn.net.0.proj", False),
        ("transformer.transformer_blocks.0.attn.to_q", False),
        ("unet.down_blocks.0.x", False),
    ],
)
def test_original(name: str, is_original: bool) -> None:
    assert names.original(name) == is_original


@pytest.mark.parametrize(
    ("stem", "known"),
    [
        ("lora_unet_img_in", True),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", True),
        ("lora_unet_img_new", False),
        ("lora_te1_something", False),
        ("base_model.model.lin_1", True),
        ("transformer_blocks.0.new_word", True),
    ],
)
def test_where_the_dots_are(stem: str, known: bool) -> None:
    assert names.has_dots(stem) == known


def test_matched_spells_the_right_as_the_left() -> None:
    left = ["unet.down_blocks.0.proj_in", "unet.mid_block.x", "unet.only_left"]
    assert names.matched(left, ["unet.down.blocks.0.proj.in", "unet.mid_block.x", "unet.only_right"]) == {
        "unet.down.blocks.0.proj.in": "unet.down_blocks.0.proj_in",
        "unet.mid_block.x": "unet.mid_block.x",
        "unet.only_right": "unet.only_right",
    }
    assert names.matched(left, ["down_blocks.0.proj_in"]) == {"down_blocks.0.proj_in": "unet.down_blocks.0.proj_in"}
    assert names.matched(["down_blocks.0.x"], ["unet.down_blocks.0.x"]) == {"unet.down_blocks.0.x": "down_blocks.0.x"}
    # Each is matched once, and by its own name where the left has it.
    assert names.matched(["a.b_c"], ["a_b.c", "a.b_c", "a_b_c"]) == {
        "a_b.c": "a_b.c",
        "a.b_c": "a.b_c",
        "a_b_c": "a_b_c",
    }
    assert names.matched(["a.b_c"], ["a_b.c", "a_b_c"]) == {"a_b.c": "a.b_c", "a_b_c": "a_b_c"}
    # Both encoders of a pipeline have modules of one name, and stay apart.
    both = ["text_encoder.x", "text_encoder_2.x"]
    assert names.matched(both, both) == dict(zip(both, both, strict=True))


@given(*[st.lists(st.text("a._", min_size=1, max_size=4), unique=True, max_size=6)] * 2)
def test_matched_never_makes_one_of_two(left: list[str], right: list[str]) -> None:
    found = names.matched(left, right)
    assert list(found) == right
    assert len(set(found.values())) == len(right)


# Real keys

KEYS = Path(os.environ.get("PARA_EXT_TEST_KEYS", ""))
LISTS = sorted(KEYS.glob("*_format.json")) if "PARA_EXT_TEST_KEYS" in os.environ else []
LORA = {path.stem: path for path in LISTS if "lokr" not in path.read_text()}
LOKR = {path.stem: path for path in LISTS if path.stem not in LORA}

needs_keys = pytest.mark.skipif(not LISTS, reason="PARA_EXT_TEST_KEYS does not name a folder of key lists")


def synthetic(path: Path, out: Path) -> Path:
    """A file of these keys with values of decaying importance, every dimension a 32nd of the real one."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, (key, shape) in enumerate(json.loads(path.read_text()).items()):
        axis = (
            0 if ".lora_down." in key or ".lora_A." in key else 1 if ".lora_up." in key or ".lora_B." in key else None
        )
        reduced = [d if j == axis else max(1, d // 32) for j, d in enumerate(shape)]
        if axis is None:
            tensors[key] = torch.full(reduced, 2.0)
        else:
            size = torch.logspace(0, -2, shape[axis])[(..., None) if axis == 0 else (None,)] / (1 + i % 7)
            tensors[key] = torch.randn(reduced, generator=generator) * size
    save_file(tensors, out)
    return out


@needs_keys
@pytest.mark.parametrize("name", LORA)
def test_real_keys(tmp_path: Path, name: str) -> None:
    source = synthetic(LORA[name], tmp_path / "lora.safetensors")
    old = load_file(source)
    adapter = read_adapter(source)
    assert len(adapter.slots) == sum(key.endswith(("down.weight", "lora_A.weight")) for key in old)
    assert all(names.component(slot.name) and names.has_dots(slot.stem) for slot in adapter.slots)
    keep = 0.3 if "dora" in name else 0.1  # rank 1 of 4 at least
    report = para_ext.compress_adapter(source, tmp_path / "out.safetensors", keep=keep)
    new = load_file(tmp_path / "out.safetensors")
    stems = {slot.name: slot.stem for slot in adapter.slots}
    dropped = {stems[name] for name, rank in report.ranks.items() if rank == 0}
    assert new.keys() == {key for key in old if not key.startswith(tuple(f"{stem}." for stem in dropped))}
    assert dropped or "dora" in name
    assert report.parameters_after <= keep * report.parameters_before
    assert para_ext.verify(source, tmp_path / "out.safetensors").error == pytest.approx(report.error, rel=1e-3)
    assert math.isclose(sum(t.numel() for k, t in new.items() if k.endswith("weight")), report.parameters_after)


@needs_keys
@pytest.mark.parametrize("name", LOKR)
def test_real_keys_of_lokr_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ParaError, match="holds LoKr tensors but no LoRA pair"):
        read_adapter(synthetic(LOKR[name], tmp_path / "lora.safetensors"))


@needs_keys
@pytest.mark.parametrize("name", [name for name in LORA if "dora" not in name])
def test_real_keys_in_other_spellings(tmp_path: Path, name: str) -> None:
    """ΔW stays to the bit in diffusers' names and in kohya's; Flux as diffusers has it is not for them."""
    source = synthetic(LORA[name], tmp_path / "lora.safetensors")
    kohya, diffusers = (tmp_path / f"{target}.safetensors" for target in ("kohya", "diffusers"))
    para_ext.convert_adapter(source, diffusers, "diffusers")
    assert para_ext.verify(source, diffusers).error == 0
    if "flux" in name:
        with pytest.raises(ParaError, match="no reader of kohya's files takes: use target='diffusers'"):
            para_ext.convert_adapter(diffusers, kohya, "kohya")
    if name == "flux_lora_diffusers_format":
        return
    para_ext.convert_adapter(source, kohya, "kohya")
    assert para_ext.verify(source, kohya).error == 0
    stems = {key.partition(".")[0] for key in load_file(kohya)}
    if "kohya" in name:
        assert stems == {key.partition(".")[0] for key in load_file(source)}
    assert all("." not in stem for stem in stems)
