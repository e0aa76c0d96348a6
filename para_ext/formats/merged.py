"""The base model with the new ΔW' added to its weights, for runtimes without LoRA; shard by shard, as it is stored.

The one place where ΔW' = B'·A' is formed: it is what is asked for, a module at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import as_tensor, dtype_name
from ..errors import ParaError
from ..factors import LoraFactors
from ..layout import FileLayout
from .adapter import Adapter
from .base import BaseModel
from .output import write_safetensors
from .peft import PREFIX, PeftAdapter, PeftSlot
from .tensors import read_tensors

_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64))
_NEVER = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".safetensors")


@dataclass(frozen=True, eq=False, kw_only=True)
class MergedAdapter(Adapter[PeftSlot]):
    """Writes a model's folder.

    Attributes:
        base: the model.
        keys: of each slot's weight in it, by the slot's name.
        saved: tensors of modules_to_save, by the key that they replace.
        transposed: names of slots whose weight is [in, out].
    """

    tensor_file: str = "*.safetensors"
    base: BaseModel
    keys: Mapping[str, str]
    saved: Mapping[str, NDArray[Any]]
    transposed: frozenset[str]

    def layout(self, code: str | None = None, metadata: str = "") -> FileLayout | None:
        """See :meth:`Adapter.layout`: its size does not depend on the ranks."""
        return None

    def fill(
        self, folder: Path, factors: Mapping[str, LoraFactors], *, metadata: str, code: str | None
    ) -> Sequence[str]:
        """See :meth:`Adapter.fill`."""
        slots = {self.keys[slot.name]: slot for slot in self.slots}
        for file in sorted(set(self.base.shards.values())):
            tensors, header = read_tensors(self.base.folder / file)
            for key in tensors:
                if key in self.saved:
                    tensors[key] = self.saved[key].astype(tensors[key].dtype)
                elif key in slots:
                    tensors[key] = self._merged(slots[key], tensors[key], factors)
            write_safetensors(folder / file, tensors, {**header, "format": "pt", "para_ext": metadata})
        for path in sorted(self.base.folder.iterdir()):
            if path.is_file() and not path.is_symlink() and path.suffix not in _NEVER and path.name[0] != ".":
                shutil.copyfile(path, folder / path.name)
        return [f"'{self.base.folder}' and the adapter in one: no runtime needs to know of LoRA."]

    def _merged(self, slot: PeftSlot, weight: NDArray[Any], factors: Mapping[str, LoraFactors]) -> NDArray[Any]:
        """weight + ΔW', in fp64 and rounded once."""
        deltas = []
        for member in slot.members:
            new = factors.get(member.name)
            if new is None or not new.rank:
                deltas.append(np.zeros((member.m, member.n)))
            else:
                deltas.append((as_tensor(new.B).double() @ as_tensor(new.A).double()).numpy())
        if slot.experts:
            delta = np.stack([d if d.shape == weight.shape[1:] else d.T for d in deltas])
        else:
            delta = np.concatenate(deltas)
            delta = delta.T if slot.embedding or slot.name in self.transposed else delta
        merged: NDArray[Any] = (weight.astype(np.float64) + delta.reshape(weight.shape)).astype(weight.dtype)
        if not np.isfinite(merged.astype(np.float64)).all():
            raise ParaError(f"module '{slot.name}': merged, a weight exceeds the range of {dtype_name(weight.dtype)}")
        return merged


def for_merging(adapter: PeftAdapter, base: BaseModel) -> MergedAdapter:
    """The adapter with its base model.

    Raises:
        ParaError: a module has no weight in the base that it fits, or the adapter holds what cannot be merged.
    """
    from .servers import check_plain

    check_plain(adapter, "merged", foreign=True)
    shapes = _shapes(base)
    saved = {}
    for key, tensor in adapter.foreign.items():
        name = _key(key.removeprefix(PREFIX), shapes)
        if not name or shapes[name] != tensor.shape:
            raise ParaError(
                f"'{adapter.path}' also holds '{key}', which is no tensor of '{base.folder}' of its shape: give the "
                "base model of this adapter"
            )
        saved[name] = tensor
    keys, transposed = {}, set()
    for slot in adapter.slots:
        key = _key(slot.name if slot.experts else f"{slot.name}.weight", shapes)
        if not key:
            raise ParaError(
                f"module '{slot.name}' has no weight in '{base.folder}'; give the base model of this adapter (one"
                " that shares the weight between input and output can't be merged with an adapter for the output)"
            )
        fits, flipped = _fits(slot, shapes[key], bool(adapter.config.get("fan_in_fan_out")))
        if not fits:
            raise ParaError(
                f"module '{slot.name}': ΔW is {slot.B.shape[0]}×{slot.members[0].n}, but '{key}' of '{base.folder}' is "
                f"{list(shapes[key])}: give the base model of this adapter, not quantized"
            )
        keys[slot.name] = key
        if flipped:
            transposed.add(slot.name)
    tied = base.config.get("tie_word_embeddings")
    embedding = next((slot.name for slot in adapter.slots if slot.embedding), "")
    if tied and embedding:
        raise ParaError(
            f"module '{embedding}' shares its weight with the output layer of '{base.folder}', which the adapter "
            "leaves alone: it can't be merged; use --target peft"
        )
    return MergedAdapter(
        path=adapter.path,
        weights=adapter.weights,
        slots=adapter.slots,
        notes=adapter.notes,
        base=base,
        keys=keys,
        saved=saved,
        transposed=frozenset(transposed),
    )


def _shapes(base: BaseModel) -> dict[str, tuple[int, ...]]:
    """Of every tensor of the base that holds plain floating-point numbers."""
    shapes = {}
    for file in sorted(set(base.shards.values())):
        tensors, _ = read_tensors(base.folder / file)
        for key, tensor in tensors.items():
            if tensor.dtype in _FLOATS or dtype_name(tensor.dtype) == "bfloat16":
                shapes[key] = tensor.shape
    return shapes


def _key(name: str, shapes: Mapping[str, Any]) -> str:
    """The base's key for a tensor's name: they may differ by a first part, which heads put before their model."""
    candidates = [name, name.partition(".")[2], *(f"{prefix}.{name}" for prefix in ("model", "base_model"))]
    return next((key for key in candidates if key in shapes), "")


def _fits(slot: PeftSlot, shape: tuple[int, ...], fan_in_fan_out: bool) -> tuple[bool, bool]:
    """Whether ΔW has the weight's shape, and whether transposed."""
    out, rest = slot.B.shape[0], slot.A.shape[1:]
    if slot.experts:
        m, n = slot.members[0].m, slot.members[0].n
        return shape[1:] in ((m, n), (n, m)) and shape[0] == len(slot.members), shape[1:] == (n, m)
    if slot.embedding:
        return shape == (*rest, out), True
    plain, flipped = shape == (out, *rest), shape == (*rest, out)
    return (flipped, True) if fan_in_fan_out and flipped else (plain, False) if plain else (flipped, True)
