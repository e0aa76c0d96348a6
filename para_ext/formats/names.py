"""Names of modules in files for diffusion models: diffusers' dotted ones are ours, kohya's spell dots as underscores.

    lora_unet_down_blocks_0_attentions_0_proj_in    unet.down_blocks.0.attentions.0.proj_in     kohya
    lora_unet_input_blocks_1_1_proj_in              unet.down_blocks.0.attentions.0.proj_in     CompVis' blocks
    diffusion_model.double_blocks.0.img_attn.qkv    transformer.double_blocks.0.img_attn.qkv    ComfyUI, ai-toolkit
    …attn1.processor.to_out_lora                    ….attn1.to_out.0                            diffusers before 0.20

Which underscores were dots is told by a vocabulary of the words in models; a name with another word stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior", "controlnet")
"""Models of a pipeline whose names stand before their modules'."""

_PREFIXES = {
    "lora_unet_": "",
    "lora_transformer_": "transformer.",
    "lora_prior_unet_": "prior.",
    "lora_te_": "text_encoder.",
    "lora_te1_": "text_encoder.",
    "lora_te2_": "text_encoder_2.",
    "lora_te3_": "text_encoder_3.",
}

_WORDS = frozenset(
    """
    down_blocks up_blocks mid_block attentions resnets transformer_blocks single_transformer_blocks downsamplers
    upsamplers motion_modules attn attn1 attn2 ff ff_context net proj proj_in proj_out proj_mlp to_q to_k to_v to_out
    to_add_out add_q_proj add_k_proj add_v_proj norm norm1 norm2 norm3 norm1_context linear linear_1 linear_2 conv conv1
    conv2 conv_in conv_out conv_shortcut time_emb_proj time_embedding add_embedding time_embed label_emb
    input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection op
    x_embedder context_embedder time_text_embed timestep_embedder guidance_embedder text_embedder norm_out
    double_blocks single_blocks img_attn img_mlp img_mod txt_attn txt_mlp txt_mod qkv lin linear1 linear2 modulation
    final_layer adaLN_modulation img_in txt_in time_in vector_in guidance_in in_layer out_layer
    text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 layer_norm1 layer_norm2
    final_layer_norm embeddings token_embedding position_embedding text_projection
    block layer SelfAttention EncDecAttention DenseReluDense q k v o wi wi_0 wi_1 wo shared relative_attention_bias
    blocks ffn cross_attn joint_blocks context_block x_block
    """.split()  # noqa: SIM905
)
_LONGEST = max(word.count("_") + 1 for word in _WORDS)

# Where CompVis' UNet keeps what diffusers calls …; both have two resnets per block, three in the decoder.
_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_UNET = re.compile(
    r"(down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks|conv_in|conv_out"
    r"|time_embed(ding)?|label_emb|add_embedding)(?![a-z])"
)
# What language models that call themselves so have under "transformer", and diffusers' transformers have not.
_LANGUAGE = re.compile(
    r"transformer\.(h|layer|wte|wpe|ln_f|embedding|word_embeddings?|encoder|output_layer"
    r"|blocks\.\d+\.(attn\.(Wqkv|out_proj)|ffn\.(up_proj|down_proj)))(\.|$)"
)
_DIT = re.compile(r"(single_)?(transformer_blocks|double_blocks|single_blocks|joint_blocks)(?![a-z])")


def canonical(stem: str) -> str:
    """The module's name that a key's stem stands for."""
    for prefix, component in _PREFIXES.items():
        if stem.startswith(prefix):
            name = dotted(stem.removeprefix(prefix)) or stem.removeprefix(prefix)
            return f"{component}{name}" if component else with_component(name)
    for prefix in ("base_model.model.", "model.diffusion_model.", "diffusion_model."):
        if stem.startswith(prefix):
            name = stem.removeprefix(prefix)
            return name if prefix.startswith("base") else with_component(name)
    name = stem
    if ".processor." in name:
        name = re.sub(r"\bto_out$", "to_out.0", name.replace(".processor.", "."))
    if ".self_attn.to_" in name:  # diffusers' first text encoders
        name = re.sub(r"\bto_(q|k|v|out)$", r"\1_proj", name)
    return with_component(name) if _UNET.match(name) or _DIT.match(name) else name


def with_component(name: str) -> str:
    """The name with the pipeline's model before it: ``unet`` where its first word is a UNet's, else ``transformer``."""
    return f"unet.{_diffusers(name)}" if _UNET.match(name) else f"transformer.{name}"


def placed(name: str) -> str:
    """The name with the pipeline's model before it, of an adapter for that model alone; empty where it is of none."""
    if _UNET.match(name) or _DIT.match(name):
        return with_component(name)
    return f"text_encoder.{name}" if name.startswith("text_model.") else ""


def original(name: str) -> bool:
    """Whether a module is named as in the model's first release, where diffusers' has other modules."""
    first = r"(double_blocks|single_blocks|joint_blocks|blocks\.\d+\.(self_attn|cross_attn|ffn\.\d))"
    unet = r"unet\.(time_embed|label_emb|input_blocks|middle_block|output_blocks|out)\."
    return bool(re.match(rf"transformer\.({first}(\.|$)|final_layer\.)|{unet}", name))


def matched(left: Iterable[str], right: Iterable[str]) -> dict[str, str]:
    """The right adapter's names as the left one spells them, where dots, underscores or the component differ.

    No two get one name: a module of which the left one has none keeps its own.
    """
    left, right = list(left), list(right)
    parts_left, parts_right = ({component(name) for name in names} for names in (left, right))
    # A PEFT folder for one model has no component in its names, a file for pipelines has.
    bare = parts_left != parts_right and "" in parts_left | parts_right and len(parts_left) == len(parts_right) == 1

    def flat(name: str) -> str:
        return (name.removeprefix(f"{component(name)}.") if bare else name).replace(".", "_")

    ours, theirs = set(left), set(right)
    spelt = {flat(name): name for name in left if name not in theirs}
    return {name: name if name in ours else spelt.pop(flat(name), name) for name in right}


def component(name: str) -> str:
    """The pipeline's model that the name begins with; empty where there is none."""
    first = name.partition(".")[0]
    return first if first in COMPONENTS and not _LANGUAGE.match(name) else ""


def has_dots(stem: str) -> bool:
    """Whether :func:`canonical` knows where the dots of the name are, which kohya's spelling has none of."""
    flat = next((stem.removeprefix(prefix) for prefix in _PREFIXES if stem.startswith(prefix)), None)
    return flat is None or bool(dotted(flat))


def dotted(flat: str) -> str:
    """The name whose dots are spelt as underscores, of the longest words from the left; empty where one is unknown."""
    parts = flat.split("_")
    ends = [0] * len(parts) + [len(parts)]  # of the word at each place, where all from there on can be split; else 0
    for start in reversed(range(len(parts))):
        for end in range(min(start + _LONGEST, len(parts)), start, -1):
            word = "_".join(parts[start:end])
            if ends[end] and (word in _WORDS or word.isdecimal()):
                ends[start] = end
                break
    if not ends[0]:
        return ""
    name, start = [], 0
    while start < len(parts):
        name.append("_".join(parts[start : ends[start]]))
        start = ends[start]
    return ".".join(name)


def kohya(name: str, *, several_encoders: bool) -> str:
    """The stem of kohya's keys for a module of a pipeline.

    Args:
        several_encoders: the pipeline has more than one text encoder, whose names are then numbered.
    """
    model, _, rest = name.partition(".")
    if model.startswith("text_encoder") and rest.startswith("encoder.layers."):
        rest = f"text_model.{rest}"  # as CLIP's are called in all kohya files
    flat = rest.replace(".", "_")
    if not model.startswith("text_encoder"):
        return f"lora_prior_unet_{flat}" if model == "prior" else f"lora_unet_{flat}"
    number = model.removeprefix("text_encoder_") if model != "text_encoder" else "1" if several_encoders else ""
    return f"lora_te{number}_{flat}"


def _diffusers(name: str) -> str:
    """CompVis' block names as diffusers': input_blocks.4.1 is down_blocks.1.attentions.0."""
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)(?:\.(.+))?|middle_block\.(\d+)\.(.+)", name)
    if match is None:
        return name
    if match[5]:
        place, rest = int(match[5]), match[6]
        return (
            f"mid_block.attentions.0.{rest}"
            if place == 1
            else f"mid_block.resnets.{place // 2}.{_RESNET.get(rest, rest)}"
        )
    side, number, rest = match[1], int(match[2]), match[4]
    if rest is None:
        return "conv_in" if side == "input" and number == 0 else name
    block, layer = divmod(number - 1, 3) if side == "input" else divmod(number, 3)
    blocks = "down_blocks" if side == "input" else "up_blocks"
    if rest == "op":
        return f"{blocks}.{block}.downsamplers.0.conv"
    if rest == "conv":
        return f"{blocks}.{block}.upsamplers.0.conv"
    if rest in _RESNET:
        return f"{blocks}.{block}.resnets.{layer}.{_RESNET[rest]}"
    return f"{blocks}.{block}.attentions.{layer}.{rest}"
