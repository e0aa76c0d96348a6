"""MLX adapters: adapters.safetensors with ``<module>.lora_a`` [in, r] and ``.lora_b`` [r, out], one rank, one scale."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import layout
from ..errors import ParaError
from ..factors import LoraFactors, written_code
from ..naming import natural_key
from .adapter import Adapter, Filled, Slot
from .base import BaseModel
from .output import CONFIG, MLX, write_json, write_safetensors
from .peft import PeftAdapter, is_number
from .tensors import read_json, read_tensors, recognise, writable_code

_A, _B = ".lora_a", ".lora_b"

# The file does not tell them from linear layers; ΔW is then the transpose of theirs.
_EMBEDDINGS = ("embed_tokens", "tok_embeddings", "word_embeddings", "wte")
# What a language model's modules are called there, too. Not so several models in one, or experts one by one; mlx_lm
# passes over names that it does not know.
_KNOWN = re.compile(r"model\.(layers|h)\.\d+(\.[^.\d][^.]*)+|model\.[^.]+|lm_head")


@dataclass(frozen=True, eq=False, kw_only=True)
class MlxAdapter(Adapter[Slot]):
    """As mlx_lm saves it.

    Attributes:
        config: adapter_config.json.
    """

    tensor_file: str = MLX
    config: Mapping[str, Any]

    @property
    def shaping(self) -> Mapping[str, Any]:
        """See :attr:`Adapter.shaping`."""
        return {"uniform": "all"}

    def layout(self, code: str | None = None, metadata: str = "") -> layout.FileLayout:
        """See :meth:`Adapter.layout`."""
        slots = [layout.Slot(key, writable_code(key, t), t.shape) for key, t in self.foreign.items()]
        for slot in self.slots:
            module, new = slot.members[0].name, written_code(slot.A, slot.B, code)
            slots.append(layout.Slot(slot.name + _A, new, (slot.A.shape[1], 1), 1, module))
            slots.append(layout.Slot(slot.name + _B, new, (1, slot.B.shape[0]), 0, module))
        return layout.FileLayout(tuple(slots), {**self.metadata, "para_ext": metadata})

    def fill(self, folder: Path, factors: Mapping[str, LoraFactors], *, metadata: str, code: str | None) -> Filled:
        """See :meth:`Adapter.fill`."""
        kept = self.pairs(factors)
        (rank,) = {A.shape[0] for _, A, _ in kept}
        tensors = {key: np.asarray(array, order="C") for key, array in self.foreign.items()}
        for slot, A, B in kept:
            tensors[slot.name + _A] = np.ascontiguousarray(A.T)
            tensors[slot.name + _B] = np.ascontiguousarray(B.T)
        parameters = {**self.config["lora_parameters"], "rank": rank, "scale": 1.0}
        write_safetensors(folder / MLX, tensors, {**self.metadata, "para_ext": metadata})
        write_json(folder / CONFIG, {**self.config, "lora_parameters": parameters})
        return Filled()


def is_mlx(path: Path) -> bool:
    """Whether a folder's adapter_config.json is one of MLX."""
    config = path / CONFIG
    return config.is_file() and "lora_parameters" in read_json(config)


def read_mlx(path: Path) -> MlxAdapter:
    """Read an adapter folder.

    Raises:
        ParaError: what is wrong with it, and what to do.
    """
    config = read_json(path / CONFIG)
    if config.get("fine_tune_type", "lora") != "lora":
        raise ParaError(
            f"'{path / CONFIG}' says fine_tune_type {config['fine_tune_type']!r:.40}, but only lora is read"
        )
    parameters = config["lora_parameters"]
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not is_number(scale):
        raise ParaError(f"'{path / CONFIG}' has no number for lora_parameters.scale: add it")
    weights = path / MLX
    if not weights.is_file():
        raise ParaError(f"'{path}' holds no {MLX}: give the folder that mlx_lm saved")
    tensors, metadata = read_tensors(weights)
    slots, foreign = [], dict(tensors)
    for key in tensors:
        name = key.removesuffix(_A)
        if name == key:
            continue
        a, b = foreign.pop(key), foreign.pop(name + _B, None)
        if b is None:
            raise ParaError(f"module '{name}' has no lora_b beside its lora_a; save the adapter again")
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or 0 in a.shape + b.shape:
            raise ParaError(
                f"module '{name}': lora_a is {list(a.shape)} and lora_b {list(b.shape)}, but only linear layers can be "
                "read: lora_a [in, r], lora_b [r, out]"
            )
        members = (LoraFactors(name, b.T, a.T, float(scale)),)
        embedding = name.rpartition(".")[2] in _EMBEDDINGS
        slots.append(Slot(name=name, A=a.T, B=b.T, embedding=embedding, members=members))
    if not slots:
        raise ParaError(f"'{weights}' holds no LoRA pair: give a LoRA adapter of MLX")
    for key in foreign:
        if key.endswith((_A, _B)) or recognise([key]) != "unknown":
            raise ParaError(f"'{weights}': tensor {key!r} is a part of no LoRA pair of MLX; remove it")
    slots.sort(key=lambda slot: natural_key(slot.name))
    return MlxAdapter(path=path, weights=weights, slots=tuple(slots), foreign=foreign, metadata=metadata, config=config)


def for_mlx(adapter: PeftAdapter, base: BaseModel | None) -> MlxAdapter:
    """A PEFT adapter for mlx_lm; ``keys`` are whole paths, so that it wraps the adapted modules and no others.

    Args:
        base: the base model, if it is known.

    Raises:
        ParaError: it holds what mlx_lm can't load.
    """
    from .servers import check_plain

    check_plain(adapter, "mlx")
    slots, layers = [], [0]
    for slot in adapter.slots:
        name = slot.name
        if base is not None and base.kind == "gpt2":
            name = re.sub(r"^transformer\.", "model.", name)
        if not _KNOWN.fullmatch(name) or slot.experts or slot.A.ndim > 2 or slot.role == "tied":
            raise ParaError(f"module '{slot.name}' has no name that is known in MLX: use target='merged'")
        if slot.embedding and (base is None or base.tied):
            raise ParaError(
                f"module '{slot.name}' may share its weight with the output layer, which MLX would adapt too: give "
                "a base model where it doesn't by base=, or use target='merged'"
            )
        layers += [int(number) + 1 for number in re.findall(r"\.(\d+)\.", name)[:1]]
        slots.append(Slot(name=name, A=slot.A, B=slot.B, embedding=slot.embedding, members=slot.members))
    config = {
        "fine_tune_type": "lora",
        "num_layers": base.layers if base else max(layers),
        "lora_parameters": {"rank": 0, "scale": 1.0, "dropout": 0.0, "keys": [slot.name for slot in slots]},
    }
    return MlxAdapter(
        path=adapter.path,
        weights=adapter.weights,
        others=adapter.others,
        slots=tuple(slots),
        notes=adapter.notes,
        config=config,
    )
