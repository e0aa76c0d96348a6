"""Adapters for llama.cpp and what is built on it (Ollama): GGUF, as its ``src/llama-adapter.cpp`` reads it.

Per adapted weight ``<name>.weight.lora_a`` and ``.lora_b``, as PEFT stores them; ``adapter.lora.alpha`` is 0, with
which llama.cpp takes the factors as they are (any other is divided by each tensor's own rank). Models whose GGUF keeps
q and k for interleaved rotary embeddings have their rows in another order, and so have the factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ParaError
from ..factors import LoraFactors
from ..layout import FileLayout
from .adapter import Adapter, Filled
from .base import BaseModel
from .output import GGUF
from .peft import PeftAdapter, PeftSlot

# By model_type: llama.cpp's name of the architecture, and whether rows of q and k are interleaved.
_ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "mixtral": ("llama", True),
    "granite": ("granite", True),
    "smollm3": ("smollm3", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "phi3": ("phi3", False),
    "starcoder2": ("starcoder2", False),
    "olmo2": ("olmo2", False),
    "gpt2": ("gpt2", False),
}
_LONGEST_NAME = 63

Pair = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True, eq=False, kw_only=True)
class GgufAdapter(Adapter[PeftSlot]):
    """Writes one GGUF file.

    Attributes:
        base: the base model.
        targets: the weights' names in GGUF, by slot; two where it holds two there.
    """

    tensor_file: str = GGUF
    base: BaseModel
    targets: Mapping[str, tuple[str, ...]]

    def as_file(self, out: Path) -> bool:
        """See :meth:`Adapter.as_file`."""
        return out.suffix == ".gguf"

    def layout(self, code: str | None = None, metadata: str = "") -> FileLayout | None:
        """See :meth:`Adapter.layout`: no safetensors file is written."""
        return None

    def fill(self, folder: Path, factors: Mapping[str, LoraFactors], *, metadata: str, code: str | None) -> Filled:
        """See :meth:`Adapter.fill`."""
        gguf = _library()
        architecture, interleaved = _ARCHITECTURES[self.base.kind]
        writer = gguf.GGUFWriter(folder / GGUF, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
        writer.add_string("para_ext", metadata)
        pairs = self.pairs(factors)
        for slot, A, B in pairs:
            if interleaved and (projection := slot.name.rpartition(".")[2]) in ("q_proj", "k_proj"):
                B = _interleaved(B, self.base.rows(projection)[0])
            for target, (a, b) in zip(self.targets[slot.name], _pairs(slot, A, B), strict=True):
                for which, array in (("a", a), ("b", b)):
                    _add(gguf, writer, f"{target}.weight.lora_{which}", np.ascontiguousarray(array))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        sixteen = any(A.dtype.itemsize == 2 or B.dtype.itemsize == 2 for _, A, B in pairs)
        note = "llama.cpp rounds activations to 16 bits where factors have 16; dtype='fp32' avoids it."
        return Filled([note] * sixteen)


def for_llama_cpp(adapter: PeftAdapter, base: BaseModel) -> GgufAdapter:
    """The adapter for llama.cpp.

    Raises:
        ParaError: the base's architecture is none that is known to be right, or the adapter holds what llama.cpp lacks.
    """
    from .servers import check_plain

    check_plain(adapter, "gguf")
    if base.kind not in _ARCHITECTURES:
        raise ParaError(
            f"'{base.folder}' is a {base.kind or 'model without model_type'}, whose weights GGUF may order otherwise; "
            f"the target gguf is for {', '.join(_ARCHITECTURES)}: use target='merged' and convert that"
        )
    gguf = _library()
    names = gguf.get_tensor_name_map(_architecture(gguf, base), max(base.layers, 1))
    targets, taken = {}, set()
    for slot in adapter.slots:
        targets[slot.name] = _targets(slot, names)
        if not all(targets[slot.name]):
            raise ParaError(
                f"module '{slot.name}' has no place in a GGUF of '{base.folder}': give its own base model, "
                f"or use target='merged'"
            )
        for target in targets[slot.name]:
            if target in taken or len(f"{target}.weight.lora_a") > _LONGEST_NAME:
                raise ParaError(f"module '{slot.name}' is '{target}' in GGUF, which is taken: use target='merged'")
            taken.add(target)
        if (len(slot.members) > 1 and not slot.experts) or slot.A.ndim > 2:
            raise ParaError(f"module '{slot.name}' is no linear layer, which the target gguf needs: use target='peft'")
        _check_heads(slot, base)
        if base.tied and targets[slot.name][0] in ("token_embd", "output"):
            raise ParaError(
                f"module '{slot.name}' shares its weight with another in '{base.folder}', and llama.cpp stops at an "
                "adapter for one of them: use target='merged' for an adapter of both, or leave it out"
            )
    return GgufAdapter(
        path=adapter.path,
        weights=adapter.weights,
        slots=adapter.slots,
        notes=adapter.notes,
        others=adapter.others,
        base=base,
        targets=targets,
    )


def _targets(slot: PeftSlot, names: Any) -> tuple[str, ...]:
    """What GGUF calls the slot's weight; empty where it has no name for it."""
    module, _, parameter = slot.name.rpartition(".")
    if slot.experts:
        kinds = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.get(parameter, ())
        router = names.get_name(module.removesuffix(".experts") + ".gate") or ""
        block = router.rpartition(".")[0]
        return tuple(f"{block}.ffn_{kind}_exps" for kind in kinds) if block and kinds else ("",)
    return (names.get_name(slot.name) or "",)


def _pairs(slot: PeftSlot, A: NDArray[Any], B: NDArray[Any]) -> list[Pair]:
    """lora_a and lora_b of each of the slot's weights in GGUF."""
    if slot.embedding:
        return [(A.T, B)]
    if not slot.experts:
        return [(A, B)]
    count = len(slot.members)
    a, b = A.reshape(count, -1, A.shape[1]), B.reshape(B.shape[0], -1, count).transpose(2, 0, 1)
    if slot.name.endswith(".gate_up_proj"):
        half = b.shape[1] // 2
        return [(a, b[:, :half]), (a, b[:, half:])]
    return [(a, b)]


def _check_heads(slot: PeftSlot, base: BaseModel) -> None:
    """The base's heads must make up B's rows: another model of the same names would order them otherwise."""
    projection = slot.name.rpartition(".")[2]
    if projection in ("q_proj", "k_proj") and _ARCHITECTURES[base.kind][1]:
        (heads, size), rows = base.rows(projection), slot.B.shape[0]
        if heads * size != rows or size % 2:
            raise ParaError(
                f"module '{slot.name}' has {rows} rows, but '{base.folder}' has {heads} heads of {size}: give the base "
                "model of this adapter by base="
            )


def _interleaved(B: NDArray[Any], heads: int) -> NDArray[Any]:
    """B [out, r] with its rows (head, half, i) in the order (head, i, half)."""
    out, r = B.shape
    return B.reshape(heads, 2, out // heads // 2, r).swapaxes(1, 2).reshape(out, r)


def _add(gguf: Any, writer: Any, name: str, array: NDArray[Any]) -> None:
    if array.dtype.name == "bfloat16":
        bits = array.view(np.uint8).reshape(*array.shape[:-1], -1)
        writer.add_tensor(name, bits, raw_shape=bits.shape, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, array)


def _architecture(gguf: Any, base: BaseModel) -> Any:
    wanted = _ARCHITECTURES[base.kind][0]
    return next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)


def _library() -> Any:
    try:
        import gguf
    except ImportError as e:
        raise ParaError("the target gguf needs the package gguf: pip install 'para_ext[gguf]'") from e
    return gguf
