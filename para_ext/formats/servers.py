"""PEFT folders for servers that read less of adapter_config.json than PEFT does; what they would misread is refused.

vllm       as PEFT's; ranks may differ, but not above what --max-lora-rank can be
uniform    one rank for all modules, no patterns: SGLang, LMDeploy, LoRAX, TGI, hotswapping, and readers unknown
trtllm     TensorRT-LLM takes lora_alpha / (a tensor's own rank): one lora_alpha, B larger by rank / lora_alpha
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ParaError
from ..factors import LoraFactors
from ..naming import module_type
from . import names
from .adapter import Filled
from .base import MOST_LAYERS
from .peft import PeftAdapter, PeftSlot

UNIFORM_RANKS = (8, *range(16, 513, 16))
"""Ranks that LoRAX and TGI, which pad to 8 or to multiples of 16, leave as they are."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""

_PLAIN = {
    "use_dora": "DoRA",
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "layer replication",
    "trainable_token_indices": "trained tokens",
}


def check_plain(adapter: PeftAdapter, target: str, *, foreign: bool = False, bias: bool = False) -> None:
    """Refuse what only PEFT itself gives its meaning.

    Args:
        foreign: tensors that are no LoRA factors (heads, trained embeddings) are welcome.
        bias: so is lora_B.bias.

    Raises:
        ParaError: naming it.
    """
    diffusion = next((slot.name for slot in adapter.slots if names.placed(slot.name)), "")
    if diffusion and target in ("vllm", "trtllm"):
        raise ParaError(
            f"module '{diffusion}' is of a diffusion model, which the target {target} is not for: use "
            "target='diffusers' or target='kohya'"
        )
    for key, name in _PLAIN.items():
        if adapter.config.get(key):
            raise ParaError(f"'{adapter.path}' uses {name}, which the target {target} can't express: use target='peft'")
    biased = next((slot.name for slot in adapter.slots if slot.bias is not None), "")
    if biased and not bias:
        raise ParaError(f"module '{biased}' has a lora_B.bias, which the target {target} ignores: use target='peft'")
    if adapter.foreign and not foreign:
        key = next(iter(adapter.foreign))
        raise ParaError(
            f"'{adapter.path}' also holds '{key}' and {len(adapter.foreign) - 1} other tensors that are not LoRA's, "
            f"which the target {target} would leave out: use target='peft' or target='merged'"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class VllmAdapter(PeftAdapter):
    """For vLLM ≥ 0.32, and right in older ones, because ``r`` is the largest rank and every scale is 1."""

    def check_ranks(self, ranks: Mapping[str, int]) -> None:
        """See :meth:`Adapter.check_ranks`."""
        of_slots = dict(zip([slot.name for slot in self.slots], self.ranks(ranks), strict=True))
        largest = max(of_slots, key=of_slots.__getitem__)
        if of_slots[largest] > VLLM_RANKS[-1]:
            raise ParaError(
                f"module '{largest}' would have rank {of_slots[largest]}, but vLLM takes at most {VLLM_RANKS[-1]}: "
                f"compress with max_rank={VLLM_RANKS[-1]}"
            )

    def fill(self, folder: Path, factors: Mapping[str, LoraFactors], *, metadata: str, code: str | None) -> Filled:
        """See :meth:`Adapter.fill`."""
        notes, rounding = super().fill(folder, factors, metadata=metadata, code=code)
        largest = max(f.rank for f in factors.values())
        bucket = next(rank for rank in VLLM_RANKS if rank >= largest)
        below = max((rank for rank in VLLM_RANKS if rank < largest), default=1)
        start = (
            f"vLLM: start with --max-lora-rank {bucket}. The memory of its slots depends on that alone, not on "
            f"the ranks below it." + (f" With max_rank={below} it would be smaller." if below > 1 else "")
        )
        return Filled([*notes, start], rounding)


def for_vllm(adapter: PeftAdapter) -> VllmAdapter:
    """The same adapter, if vLLM can load it.

    Raises:
        ParaError: what it can't.
    """
    check_plain(adapter, "vllm")
    return VllmAdapter(**_fields(adapter))


@dataclass(frozen=True, eq=False, kw_only=True)
class UniformAdapter(PeftAdapter):
    """One rank for all modules, no patterns, and target_modules that are leaf names.

    One rank per type would not do: LoRAX and TGI scale by the rank of the type that they load first.
    """

    @property
    def shaping(self) -> Mapping[str, Any]:
        """See :attr:`Adapter.shaping`."""
        return {"uniform": "all", "allowed_ranks": UNIFORM_RANKS}

    def new_config(self, ranks: Mapping[str, int], *, others: Collection[str] = ()) -> dict[str, Any]:
        """See :meth:`PeftAdapter.new_config`."""
        config = super().new_config(ranks, others=others) | {"rank_pattern": {}, "alpha_pattern": {}}
        return _by_leaf({**config, "exclude_modules": None} if "exclude_modules" in config else config, self.slots)


def uniform(adapter: PeftAdapter, layers: int | None = None) -> UniformAdapter:
    """The same adapter with every adapted leaf in every layer: where one is missing, a pair of zeros.

    Args:
        layers: how many the base model has; if None, up to the last one that is adapted.

    Raises:
        ParaError: it holds what such readers can't load.
    """
    check_plain(adapter, "uniform")
    grouped = next((slot.name for slot in adapter.slots if slot.A.ndim > 2 and len(slot.members) > 1), "")
    if grouped:
        raise ParaError(
            f"module '{grouped}' is a grouped convolution, which needs a rank of its own: use target='peft'"
        )
    added = _missing(adapter.slots, layers)
    notes = adapter.notes
    if added:
        notes += (f"{len(added)} modules that the adapter lacks are there with zeros, so that every layer has all.",)
    return UniformAdapter(**{**_fields(adapter), "slots": (*adapter.slots, *added), "notes": notes})


@dataclass(frozen=True, eq=False, kw_only=True)
class TrtllmAdapter(PeftAdapter):
    """For TensorRT-LLM ≥ 0.16 (PR 2366), which scales by lora_alpha / (the tensor's rank) and reads no pattern."""

    def gains(self, ranks: Mapping[str, int]) -> Mapping[str, float]:
        """See :meth:`Adapter.gains`."""
        of_slots = self.ranks(ranks)
        alpha = max(of_slots)
        pairs = zip(self.slots, of_slots, strict=True)
        return {f.name: rank / alpha for slot, rank in pairs if rank for f in slot.members}

    def new_config(self, ranks: Mapping[str, int], *, others: Collection[str] = ()) -> dict[str, Any]:
        """See :meth:`PeftAdapter.new_config`."""
        config = super().new_config(ranks, others=others)
        return config | {"lora_alpha": max(self.ranks(ranks)), "alpha_pattern": {}}


def for_trtllm(adapter: PeftAdapter) -> TrtllmAdapter:
    """The same adapter, if TensorRT-LLM can load it.

    Raises:
        ParaError: what it can't.
    """
    check_plain(adapter, "trtllm")
    several = next((slot.name for slot in adapter.slots if len(slot.members) > 1 or slot.A.ndim > 2), "")
    if several:
        raise ParaError(
            f"module '{several}' is no plain linear layer, which the target trtllm needs: use target='peft'"
        )
    # By exclude_modules, because a target_modules that names what is kept would be no list of leaves.
    config = {"exclude_modules": None, **_by_leaf(adapter.config, adapter.slots)}
    return TrtllmAdapter(**{**_fields(adapter), "config": config})


def _by_leaf(config: Mapping[str, Any], slots: Sequence[PeftSlot]) -> dict[str, Any]:
    """The config with the leaf names of the slots for target_modules, which is all that some readers take."""
    named = [slot.name for slot in slots if slot.role != "parameter"]
    leaves = sorted({name if name.count(".") < 2 else module_type(name) for name in named})
    cleared = {key: None for key in ("layers_to_transform", "layers_pattern") if key in config}
    return {**config, "target_modules": leaves, **cleared}


def _fields(adapter: PeftAdapter) -> dict[str, Any]:
    return {name: getattr(adapter, name) for name in PeftAdapter.__dataclass_fields__}


def _missing(slots: Sequence[PeftSlot], layers: int | None) -> list[PeftSlot]:
    """Zero slots for modules that other layers of a language model have, where all of them have one shape.

    Raises:
        ParaError: they have several, so that the missing one's is unknown.
    """
    stacks: dict[str, set[int]] = defaultdict(set)  # of layers, by what stands before the number
    kinds: dict[tuple[str, str], dict[int, PeftSlot]] = defaultdict(dict)
    for slot in slots:
        match = re.match(r"((?:[^.]*[^.\d][^.]*\.)*?)(\d+)\.(.+)", slot.name)
        if match and slot.role == "module" and not names.placed(slot.name):
            stacks[match[1]].add(int(match[2]))
            kinds[match[1], match[3]][int(match[2])] = slot
    added = []
    for (stack, rest), present in kinds.items():
        # config.json counts the layers of the language model; other stacks (a vision tower) have their own number.
        last = layers if layers is not None and len(stacks) == 1 else max(stacks[stack]) + 1
        if last > MOST_LAYERS:
            raise ParaError(f"module '{stack}{last - 1}.{rest}' is of more layers than models have: is its name right?")
        for layer in range(last):
            if layer in present:
                continue
            name = f"{stack}{layer}.{rest}"
            shapes = {(slot.B.shape[:1], slot.A.shape[1:], slot.A.dtype, slot.B.dtype) for slot in present.values()}
            if len(shapes) > 1:
                raise ParaError(
                    f"module '{name}' is not adapted and its shape is unknown, but the target uniform needs every "
                    "layer: use target='peft'"
                )
            added.append(_zero(next(iter(present.values())), name))
    return added


def _zero(like: PeftSlot, name: str) -> PeftSlot:
    A, B = (
        np.zeros((1, *like.A.shape[1:]), like.A.dtype),
        np.zeros((like.B.shape[0], 1, *like.B.shape[2:]), like.B.dtype),
    )
    path = like.path.removesuffix(like.name) + name
    slot = replace(like, name=name, path=path, A=A, B=B, bias=None)
    views = zip(*slot.split(1), strict=True)
    return replace(slot, members=tuple(LoraFactors(name, B, A) for B, A in views))
