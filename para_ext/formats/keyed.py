"""Single files of LoRA pairs that carry their scale with them: kohya, diffusers, ComfyUI, cloneofsimo, loralib, MLX.

They differ in how a pair's two keys end (:class:`Style`) and in where the scale is: a tensor ``.alpha`` beside the pair
(scale = alpha / rank), PEFT's settings in the header's ``lora_adapter_metadata``, or nowhere, which every reader takes
as 1. New factors are written under the source's own keys, at unit scale, or with ONE alpha for all modules, by whose
alpha / rank readers multiply: diffusers applies alphas that differ to the wrong modules.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from .. import layout
from ..errors import ParaError
from ..factors import LoraFactors, written_code
from ..naming import natural_key
from . import names
from .adapter import Adapter, Filled, Slot
from .output import write_safetensors
from .tensors import read_tensors, recognise, writable_code

SETTINGS = "lora_adapter_metadata"
"""Header key under which diffusers keeps PEFT's settings, ``{"unet.r": 8, "unet.lora_alpha": 16, …}``."""

_MID, _ALPHA = ".lora_mid.weight", ".alpha"
_DORA = re.compile(r"\.(dora_scale|lora_magnitude_vector(\.weight|\.default\.weight)?)$")


@dataclass(frozen=True)
class Style:
    """How the keys of a pair end, after the module's stem.

    Attributes:
        name: of the format, for people.
        A, B: the endings.
        embedding: ΔW is the transpose of B·A.
        needs_all: readers count modules, so that none may be left out.
    """

    name: str
    A: str
    B: str
    embedding: bool = False
    needs_all: bool = False


KOHYA = Style("kohya", ".lora_down.weight", ".lora_up.weight")
PEFT_KEYS = Style("PEFT keys", ".lora_A.weight", ".lora_B.weight")
STYLES = (
    KOHYA,
    PEFT_KEYS,
    Style("PEFT keys", ".lora_A.default.weight", ".lora_B.default.weight"),
    Style("PEFT keys", ".lora_embedding_A", ".lora_embedding_B", embedding=True),
    Style("diffusers", ".lora.down.weight", ".lora.up.weight"),
    Style("diffusers", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    Style("diffusers", "_lora.down.weight", "_lora.up.weight"),
    Style("loralib", ".lora_A", ".lora_B"),
    Style("cloneofsimo", ":down", ":up", needs_all=True),
)


@dataclass(frozen=True, eq=False, kw_only=True)
class KeyedSlot(Slot):
    """A pair and the keys it is written under.

    Attributes:
        stem: what the keys begin with.
        alpha: shape of the tensor ``.alpha`` beside it.
    """

    stem: str
    style: Style
    alpha: tuple[int, ...] = ()

    @property
    def keys(self) -> tuple[str, str, str]:
        """Of A, B and alpha."""
        return self.stem + self.style.A, self.stem + self.style.B, self.stem + _ALPHA


@dataclass(frozen=True, eq=False, kw_only=True)
class KeyedAdapter(Adapter[KeyedSlot]):
    """A single file of pairs.

    Attributes:
        alphas: a tensor ``.alpha`` is written beside every pair; without, readers take the scale as 1.
        settings: PEFT's settings are written into the header, by component.
    """

    alphas: bool
    settings: bool = False

    def as_file(self, out: Path) -> bool:
        """See :meth:`Adapter.as_file`."""
        return out.suffix == ".safetensors"

    def gains(self, ranks: Mapping[str, int]) -> Mapping[str, float]:
        """r / alpha for every module, because readers multiply by alpha / r: alpha is the largest rank."""
        if not self.alphas:
            return {}
        of_slots = self.ranks(ranks)
        alpha = max(slot.rank(rank) for slot, rank in zip(self.slots, of_slots, strict=True))
        return {
            f.name: slot.rank(rank) / alpha
            for slot, rank in zip(self.slots, of_slots, strict=True)
            for f in slot.members
            if rank
        }

    def layout(self, code: str | None = None, metadata: str = "") -> layout.FileLayout:
        """See :meth:`Adapter.layout`; where the header tells ranks, at least as large as the file."""
        slots = [layout.Slot(key, writable_code(key, t), t.shape) for key, t in self.foreign.items()]
        for slot in self.slots:
            module, new = slot.members[0].name, written_code(slot.A, slot.B, code)
            rows, columns = slot.units
            key_A, key_B, key_alpha = slot.keys
            slots.append(layout.Slot(key_A, new, (rows, *slot.A.shape[1:]), 0, module))
            slots.append(layout.Slot(key_B, new, (slot.B.shape[0], columns, *slot.B.shape[2:]), 1, module))
            if self.alphas:
                slots.append(layout.Slot(key_alpha, "F32", slot.alpha, None, module))
        longest = {slot.name: slot.A.shape[0] for slot in self.slots}
        return layout.FileLayout(tuple(slots), self._header(longest, metadata, ("0" * 64, "0" * 8), longest=True))

    def fill(self, folder: Path, factors: Mapping[str, LoraFactors], *, metadata: str, code: str | None) -> Filled:
        """See :meth:`Adapter.fill`."""
        kept = self.pairs(factors)
        ranks = {slot.name: A.shape[0] for slot, A, _ in kept}
        alpha = max(ranks.values())
        tensors: dict[str, NDArray[Any]] = {}
        for slot, A, B in kept:
            key_A, key_B, key_alpha = slot.keys
            tensors |= {key_A: A, key_B: B}
            if self.alphas:
                tensors[key_alpha] = np.full(slot.alpha, alpha, np.float32)
        tensors |= {key: np.asarray(array, order="C") for key, array in self.foreign.items()}
        hashes = _hashes(tensors, self._header(ranks, metadata)) if "sshs_model_hash" in self.metadata else ("", "")
        write_safetensors(folder / self.tensor_file, tensors, self._header(ranks, metadata, hashes))
        old = self.slots[0].style.name == "diffusers"
        return Filled(["The keys are those of old diffusers, as they were; target='diffusers' writes today's."] * old)

    def _header(
        self, ranks: Mapping[str, int], metadata: str, hashes: tuple[str, str] = ("", ""), *, longest: bool = False
    ) -> dict[str, str]:
        """The source's metadata with what depends on the ranks brought up to date.

        Args:
            ranks: of the slots that are kept, by name.
            metadata: text for ``para_ext``.
            hashes: of kohya, by model and legacy.
            longest: at least as long as for any lower ranks, which may all differ.
        """
        header = {**self.metadata, "para_ext": metadata}
        if "ss_network_dim" in header:
            alike = len(set(ranks.values())) == 1 and not longest
            header["ss_network_dim"] = str(max(ranks.values())) if alike else "Dynamic"
            header["ss_network_alpha"] = str(float(max(ranks.values())))
        if "ss_network_args" in header:
            header["ss_network_args"] = _without_conv(header["ss_network_args"])
        if "sshs_model_hash" in header:
            header |= {"sshs_model_hash": hashes[0], "sshs_legacy_hash": hashes[1]}
        for key in [key for key in header if key.endswith(":rank")]:
            name = key.removesuffix(":rank").replace(":", ".")
            if name in ranks:
                header[key] = str(ranks[name])
        header.pop(SETTINGS, None)
        if self.settings:
            header[SETTINGS] = json.dumps(_settings(ranks, self.metadata.get(SETTINGS), longest), sort_keys=True)
        return header


def read_keyed(path: Path, weights: Path) -> KeyedAdapter:
    """Read a single file of pairs.

    Args:
        path: what the user gave: the file, or the folder it is alone in.
        weights: the file.

    Raises:
        ParaError: what is wrong with it, and what to do.
    """
    tensors, metadata = read_tensors(weights)
    slots, foreign = _pairs(tensors, weights)
    if not slots:
        raise ParaError(f"'{weights}' holds {recognise(tensors)} tensors but no LoRA pair: give a LoRA adapter")
    alphas = any(_alpha_key(slot.stem, tensors) for slot in slots)
    settings = _read_settings(metadata, weights)
    dora = {_DORA.sub("", key) for key in foreign if _DORA.search(key)}
    named: dict[str, KeyedSlot] = {}
    for slot in slots:
        if slot.name in named:
            raise ParaError(f"'{weights}' holds module '{slot.name}' twice, also as '{slot.stem}': remove one")
        scale = _scale(slot, tensors, settings)
        least = int(slot.style.needs_all or slot.stem in dora or slot.stem + ".bias" in foreign)
        named[slot.name] = replace(slot, members=_members(slot, scale, least))
    used = {key for slot in slots if (key := _alpha_key(slot.stem, tensors))}
    foreign = {key: tensor for key, tensor in foreign.items() if key not in used}
    for key in foreign:
        if (kind := recognise([key])) != "unknown" or key.endswith((_ALPHA, ".reshape_weight")):
            what = kind if kind != "unknown" else "a part of a LoRA"
            raise ParaError(f"'{weights}': tensor {key!r} looks like {what} but is no part of a LoRA pair; remove it")
    notes = []
    if any(slot.stem + _MID in tensors for slot in slots):
        notes.append("Convolutions with a lora_mid are written without it, as plain ones of the same ΔW in float32.")
    if not alphas and not settings and slots[0].style.name == "loralib":
        notes.append(
            "The file holds no alpha: give every layer the rank of its tensors and an alpha that keeps the old alpha/r."
        )
    return KeyedAdapter(
        path=path,
        weights=weights,
        slots=tuple(sorted(anchored(list(named.values())), key=lambda slot: natural_key(slot.name))),
        foreign=foreign,
        metadata=metadata,
        notes=tuple(notes),
        tensor_file=weights.with_suffix(".safetensors").name,
        alphas=alphas,
        settings=settings is not None and not alphas,  # diffusers refuses a file with both
    )


def anchored(slots: Sequence[KeyedSlot], *, add: bool = False) -> list[KeyedSlot]:
    """kohya's slots, of which one out_proj of each text encoder is never dropped.

    diffusers (up to 0.42) takes the attention of a text encoder without one for its own first layout, and drops it.

    Args:
        add: where there is none, put a pair of zeros there.
    """
    anchors: dict[str, KeyedSlot] = {}
    attention: dict[str, KeyedSlot] = {}
    for slot in slots:
        part = names.component(slot.name)
        if part.startswith("text_encoder") and slot.style == KOHYA:
            if slot.name.endswith(".self_attn.out_proj"):
                anchors.setdefault(part, slot)
            elif ".self_attn." in slot.name:
                attention.setdefault(part, slot)
    added = []
    for part, slot in attention.items():
        if part in anchors:
            anchor = anchors[part]
            anchors[part] = replace(anchor, members=anchor.changed(min_rank=1))
        elif add:
            ends = [re.sub(r"(?<=self_attn[._])[a-z]_proj$", "out_proj", text) for text in (slot.name, slot.stem)]
            A, B = np.zeros((1, slot.A.shape[1]), slot.A.dtype), np.zeros((slot.A.shape[1], 1), slot.B.dtype)
            members = (LoraFactors(ends[0], B, A, min_rank=1),)
            added.append(replace(slot, name=ends[0], stem=ends[1], A=A, B=B, members=members))
    kept = {slot.name: slot for slot in anchors.values()}
    return [*(kept.get(slot.name, slot) for slot in slots), *added]


def _pairs(tensors: Mapping[str, NDArray[Any]], file: Path) -> tuple[list[KeyedSlot], dict[str, NDArray[Any]]]:
    """Slots without members, and the tensors that are no part of one (alphas are still among them)."""
    found: dict[tuple[str, Style], dict[str, NDArray[Any]]] = defaultdict(dict)
    foreign = {}
    for key, tensor in tensors.items():
        for style in STYLES:
            which = "A" if key.endswith(style.A) else "B" if key.endswith(style.B) else ""
            if which:
                found[key.removesuffix(style.A if which == "A" else style.B), style][which] = tensor
                break
        else:
            foreign[key] = tensor
    slots = []
    for (stem, style), pair in found.items():
        if pair.keys() != {"A", "B"}:
            missing = stem + (style.B if "A" in pair else style.A)
            raise ParaError(f"'{file}' has no '{missing}', the other half of a pair; save the adapter again")
        A, B = pair["A"], pair["B"]
        if (mid := foreign.pop(stem + _MID, None)) is not None:
            A = _absorbed(stem, A, mid)
        name = names.canonical(stem) if style.name != "cloneofsimo" else stem.replace(":", ".")
        alpha = tensors.get(stem + _ALPHA)
        shape = () if alpha is None else alpha.shape
        slots.append(KeyedSlot(name=name, A=A, B=B, embedding=style.embedding, stem=stem, style=style, alpha=shape))
    return slots, foreign


def _absorbed(stem: str, down: NDArray[Any], mid: NDArray[Any]) -> NDArray[Any]:
    """A [r, in, k, k] of a convolution kept as down [r, in, 1, 1] and mid [r, r, k, k] (LyCORIS: a Tucker form)."""
    if mid.ndim != 4 or down.ndim != 4 or set(mid.shape[:2]) != {len(down)} or down.shape[2:] != (1, 1):
        raise ParaError(
            f"module '{stem}': lora_mid is {list(mid.shape)} and lora_down {list(down.shape)}, which do not fit; "
            "save the adapter again"
        )
    product = np.einsum("rqkl,qi->rikl", mid.astype(np.float64), down[:, :, 0, 0].astype(np.float64))
    absorbed: NDArray[Any] = product.astype(np.result_type(down.dtype, np.float32))
    return absorbed


def _members(slot: KeyedSlot, scale: float, least: int) -> tuple[LoraFactors, ...]:
    A, B = slot.A, slot.B
    if A.ndim < 2 or A.ndim != B.ndim or 0 in A.shape or 0 in B.shape or not set(B.shape[2:]) <= {1}:
        fits = False
    else:
        count = A.shape[0] // B.shape[1]
        fits = A.shape[0] == count * B.shape[1] and count > 0 and B.shape[0] % count == 0
        fits = fits and (count == 1 or A.ndim > 2 or slot.style.name == "loralib")
    if not fits:
        raise ParaError(
            f"module '{slot.name}': A is {list(A.shape)}, B is {list(B.shape)}, which don't fit; save the adapter again"
        )
    labels = [slot.name] if count == 1 else [f"{slot.name}.{i}" for i in range(count)]
    group = slot.name if count > 1 else None
    return tuple(
        LoraFactors(label, B, A, scale, group, least) for label, B, A in zip(labels, *slot.split(count), strict=True)
    )


def _alpha_key(stem: str, tensors: Collection[str]) -> str:
    key = stem + _ALPHA
    return key if key in tensors else ""


def _scale(
    slot: KeyedSlot, tensors: Mapping[str, NDArray[Any]], settings: Mapping[str, Mapping[str, Any]] | None
) -> float:
    """alpha / rank; 1 where the file gives no alpha."""
    rank = slot.A.shape[0]
    if key := _alpha_key(slot.stem, tensors):
        alpha = tensors[key]
        if alpha.size != 1:
            raise ParaError(f"tensor '{key}' has shape {list(alpha.shape)}: give one number")
        value = float(alpha.astype(np.float64).ravel()[0])
        if value == 0:
            raise ParaError(
                f"tensor '{key}' is 0, which some programs read as no effect and others as a scale of 1: correct it"
            )
        return float(value / rank)
    if settings is None:
        return 1.0
    from .peft import scale_of

    part, name = _placed(slot.name, settings)
    return scale_of(settings[part], name, rank) if part in settings else 1.0


def _read_settings(metadata: Mapping[str, str], file: Path) -> dict[str, dict[str, Any]] | None:
    """The header's ``lora_adapter_metadata`` by component, which is "" in a file of one; None where there is none."""
    if SETTINGS not in metadata:
        return None
    from .peft import checked_config

    try:
        flat = json.loads(metadata[SETTINGS])
    except (ValueError, RecursionError) as e:
        raise ParaError(f"'{file}': its {SETTINGS} is not valid JSON: save the adapter again") from e
    if not isinstance(flat, dict):
        raise ParaError(f"'{file}': its {SETTINGS} is not a JSON object: save the adapter again")
    return {part: checked_config(f"{file}: {SETTINGS} {part}", config) for part, config in _by_part(flat).items()}


def _by_part(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings by component; a model that was saved without its pipeline has none before its keys."""
    if "r" in flat:
        return {"": dict(flat)}
    settings: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in flat.items():
        part, _, name = key.partition(".")
        settings[part][name] = value
    return settings


def _placed(name: str, settings: Collection[str]) -> tuple[str, str]:
    """Under which component the settings of a module are, and what they call it."""
    if "" in settings:
        return "", name.removeprefix(f"{names.component(name)}.")
    part, _, rest = name.partition(".")
    return part, rest


def _settings(ranks: Mapping[str, int], old: str | None, longest: bool) -> dict[str, Any]:
    """``lora_adapter_metadata`` at unit scale.

    Args:
        ranks: of the kept modules, by name with the component before it.
        old: the source's text.
        longest: with a pattern for every module.
    """
    from .peft_config import unit_scale_config

    before = _by_part(json.loads(old)) if old else {}
    parts: dict[str, dict[str, int]] = defaultdict(dict)
    for name, rank in ranks.items():
        part, module = _placed(name, before)
        # transformers 5 has no text_model in these names, and PEFT finds the shorter ones in both.
        parts[part][module.removeprefix("text_model.")] = rank
    settings: dict[str, Any] = {}
    for part, of_part in parts.items():
        config = before.get(part, {}) | {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
        config |= {"target_modules": sorted(of_part), "exclude_modules": None, "layers_to_transform": None}
        new = unit_scale_config(config, of_part)
        if longest:
            patterns = {f"^(?:{re.escape(name)})$": rank for name, rank in of_part.items()}
            new |= {"rank_pattern": patterns, "alpha_pattern": patterns}
        settings |= {f"{part}.{key}" if part else key: value for key, value in new.items() if value is not None}
    return settings


def _without_conv(text: str) -> str:
    """kohya's ss_network_args without the ranks and alphas of convolutions, which are no longer what they say."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(arguments, dict):
        return text
    return json.dumps({k: v for k, v in arguments.items() if k not in ("conv_dim", "conv_alpha")})


def _hashes(tensors: Mapping[str, NDArray[Any]], header: Mapping[str, str]) -> tuple[str, str]:
    """kohya's sshs_model_hash and sshs_legacy_hash: SHA-256 of the tensors' bytes, and of 64 KiB at 1 MiB of the file.

    Both are of a file whose header has only the training metadata, ``ss_…``.
    """
    data = save(dict(tensors), {key: value for key, value in header.items() if key.startswith("ss_")})
    start = 8 + int.from_bytes(data[:8], "little")
    model = hashlib.sha256(memoryview(data)[start:]).hexdigest()
    return model, hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
