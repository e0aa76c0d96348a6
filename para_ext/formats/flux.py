"""Flux: its first release has q, k, v (and the MLP) of a block in one linear layer, diffusers has them apart.

ΔW = B·A of such a layer is that of the parts by the rows of B; each part takes the A of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ..arrays import as_numpy
from ..factors import LoraFactors
from .keyed import KeyedSlot

_STREAMS = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
}


def parts(f: LoraFactors) -> list[LoraFactors]:
    """The module as diffusers names it, or the several that it is there; itself where it is none of the first release.

    The last modulation (``final_layer.adaLN_modulation``), whose halves diffusers swaps, is left as it is.
    """
    match = re.fullmatch(r"transformer\.(?:(double|single)_blocks\.(\d+)\.)?(.+)", f.name)
    if match is None:
        return [f]
    kind, number, rest = match.groups()
    if kind is None:
        return [replace(f, name=f"transformer.{_OUTER[rest]}")] if rest in _OUTER else [f]
    new = (_STREAMS if kind == "double" else _SINGLE).get(rest)
    if new is None:
        return [f]
    blocks = "transformer_blocks" if kind == "double" else "single_transformer_blocks"
    names = [f"transformer.{blocks}.{number}.{name}" for name in new]
    if len(names) == 1:
        return [replace(f, name=names[0])]
    height = f.n if kind == "single" else f.m // 3  # q, k and v are as high as the layer is wide
    ends = [*(height * i for i in range(1, len(names))), f.m]
    if height * (len(names) - 1) >= f.m or (kind == "double" and f.m % 3):
        return [f]
    starts = [0, *ends[:-1]]
    return [replace(f, name=name, B=f.B[start:end]) for name, start, end in zip(names, starts, ends, strict=True)]


def unfused(slots: Sequence[KeyedSlot]) -> list[KeyedSlot]:
    """The slots with those of the first release in their parts."""
    new = []
    for slot in slots:
        if len(slot.members) != 1 or slot.B.ndim != 2:
            new.append(slot)
            continue
        new += [replace(slot, name=f.name, B=as_numpy(f.B), members=(f,)) for f in parts(slot.members[0])]
    return new
