"""Merging: a weighted sum of adapters of one base as one adapter, in factors: Σ wᵢ·sᵢ·BᵢAᵢ = [w₁s₁B₁ …]·[A₁; …].

Nothing is lost before it is truncated: the factors keep the narrowest type in which they are exact, their own where
weights and scales differ by powers of two, otherwise fp64, in which the products are exact to 2⁻⁵³.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from .arrays import as_numpy, code_of
from .errors import ParaError
from .factors import LoraFactors
from .formats import Adapter, PeftAdapter
from .formats.keyed import KeyedAdapter
from .formats.names import matched
from .formats.peft import PeftSlot
from .naming import natural_key


def merged(adapters: Sequence[tuple[Adapter[Any], float]]) -> Adapter[Any]:
    """The weighted sum, in the format of the first adapter, with every module that any of them has.

    Args:
        adapters: and their weights, any finite numbers but 0.

    Raises:
        ParaError: formats or shapes differ, or one holds what has no weighted sum (heads, magnitudes, biases).
    """
    (first, _), *_ = adapters
    for adapter, weight in adapters:
        if not math.isfinite(weight) or weight == 0:
            raise ParaError(f"'{adapter.path}' has the weight {weight:g}: give a finite number that is not 0")
        if type(adapter) is not type(first) or _style(adapter) != _style(first):
            raise ParaError(
                f"'{adapter.path}' and '{first.path}' are of different formats: convert one to the other's first"
            )
        _check_sum(adapter)
    names = [slot.name for adapter, _ in adapters for slot in adapter.slots]
    parts: dict[str, list[tuple[Any, float]]] = {}
    for adapter, weight in adapters:
        spelt = matched(names, [slot.name for slot in adapter.slots])
        for slot in adapter.slots:
            parts.setdefault(spelt[slot.name], []).append((slot, weight))
    slots = tuple(_sum(name, parts[name]) for name in sorted(parts, key=natural_key))
    others = tuple(adapter.path for adapter, _ in adapters[1:])
    changes: dict[str, Any] = {"slots": slots, "others": others}
    if isinstance(first, PeftAdapter):
        everyone = cast("list[PeftAdapter]", [adapter for adapter, _ in adapters])
        changes["config"] = _config(first, everyone, cast("Sequence[PeftSlot]", slots))
    return replace(first, **changes)


def _style(adapter: Adapter[Any]) -> tuple[Any, ...]:
    """What single files must share for their modules to lie in one."""
    if not isinstance(adapter, KeyedAdapter):
        return ()
    return adapter.alphas, adapter.settings, *sorted({slot.style.name for slot in adapter.slots})


def widest(adapters: Iterable[Adapter[Any]]) -> str:
    """Code of the widest type among the factors; float32 where float16 meets bfloat16."""
    codes = {str(code_of(x)) for adapter in adapters for f in adapter.factors for x in (f.A, f.B)}
    return next((code for code in ("F64", "F32") if code in codes), "F32" if len(codes) > 1 else codes.pop())


def _check_sum(adapter: Adapter[Any]) -> None:
    if adapter.foreign:
        key = next(iter(adapter.foreign))
        raise ParaError(f"'{adapter.path}' also holds '{key}', which is not LoRA's and has no weighted sum: remove it")
    if isinstance(adapter, PeftAdapter) and adapter.config.get("use_dora"):
        raise ParaError(f"'{adapter.path}' uses DoRA, whose updates are not a sum: merge each into the base instead")
    biased = next((slot.name for slot in adapter.slots if slot.bias is not None), "")
    if biased:
        raise ParaError(f"module '{biased}' of '{adapter.path}' has a lora_B.bias, which is not merged: remove it")


def _sum(name: str, parts: Sequence[tuple[Any, float]]) -> Any:
    """One slot whose factors are those of the parts side by side."""
    (first, _), *_ = parts
    members = []
    for i, member in enumerate(first.members):
        same = [(slot.members[i], weight) for slot, weight in parts if len(slot.members) == len(first.members)]
        shapes = {(f.m, f.n) for f, _ in same}
        if len(same) < len(parts) or len(shapes) > 1 or len({slot.A.shape[1:] for slot, _ in parts}) > 1:
            raise ParaError(
                f"module '{name}' has another shape in one of the adapters: give adapters of one base model"
            )
        members.append(_together(member, same))
    A, B = first.join([replace(f, scale=1.0) for f in members])
    slot = replace(first, A=A, B=B)
    views = zip(members, *slot.split(len(members)), strict=True)
    return replace(slot, members=tuple(replace(f, B=B, A=A) for f, B, A in views))


def _together(like: LoraFactors, parts: Sequence[tuple[LoraFactors, float]]) -> LoraFactors:
    """ΔW = scale·[…]·[…] of the parts' weighted sum."""
    coefficients = [float(weight * f.scale) for f, weight in parts]
    scale = next((c for c in coefficients if c), 1.0)
    factors = [(as_numpy(f.B), as_numpy(f.A)) for f, _ in parts]
    products = [B.astype(np.float64) * (c / scale) for (B, _), c in zip(factors, coefficients, strict=True)]
    types = {x.dtype for pair in factors for x in pair}
    for dtype in (*types, np.dtype(np.float32), np.dtype(np.float64)):
        with np.errstate(over="ignore"):
            Bs, As = [B.astype(dtype) for B in products], [A.astype(dtype) for _, A in factors]
        same = zip([*products, *(A for _, A in factors)], [*Bs, *As], strict=True)
        if all(np.array_equal(x, y.astype(x.dtype)) for x, y in same):
            break
    least = max(f.min_rank for f, _ in parts)
    return replace(like, B=np.concatenate(Bs, axis=1), A=np.concatenate(As), scale=scale, min_rank=least)


def _config(first: PeftAdapter, adapters: Sequence[PeftAdapter], slots: Sequence[PeftSlot]) -> Mapping[str, Any]:
    """The first adapter's config, for the modules of all."""
    config = dict(first.config)
    if {slot.name for slot in first.slots} != {slot.name for slot in slots}:
        if any(slot.role != "module" for adapter in adapters for slot in adapter.slots):
            raise ParaError(
                f"'{first.path}' adapts other parameters than the others do: give adapters of the same modules"
            )
        config |= {"target_modules": [slot.name for slot in slots]}
        config |= {key: None for key in ("exclude_modules", "layers_to_transform", "layers_pattern") if key in config}
    return config
