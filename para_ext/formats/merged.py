"""The base model with the new ΔW' added to its weights, for runtimes without LoRA; shard by shard, as it is stored.

The one place where ΔW' = B'·A' is formed: it is what is asked for, a module at a time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import UNIT_ROUNDOFF, as_tensor, dtype_name
from ..errors import ParaError
from ..factors import LoraFactors
from ..layout import FileLayout
from ..progress import Meter, Progress
from .adapter import Adapter, Filled
from .base import WEIGHT_SUFFIXES, BaseModel
from .output import SIDECAR, holds_itself, write_safetensors
from .peft import PREFIX, PeftAdapter, PeftSlot
from .tensors import read_tensors

_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64))
# Models whose blocks are of Conv1D, which keeps weights transposed, and what those are called; heads are plain linear
# layers there too. PEFT knows each by its class.
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D_LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")
# What models call their input and output embeddings.
_EMBEDDINGS = (
    "embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared", "tok_embeddings",
    "tokens_embed",
)  # fmt: skip


class Piece(NamedTuple):
    """A tensor of the base, and what is added to it.

    Attributes:
        slot: the adapted module.
        expert: which of its members; None for all.
        rows: of that member's ΔW.
        transposed: the tensor is ΔW's transpose.
    """

    slot: PeftSlot
    expert: int | None = None
    rows: slice = slice(None)
    transposed: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class MergedAdapter(Adapter[PeftSlot]):
    """Writes a model's folder.

    Attributes:
        base: the model.
        pieces: what is added, by key of the base.
        saved: tensors that the adapter holds whole, in the base's types, by the key that they replace.
        progress: told of the base's bytes as they are written.
    """

    tensor_file: str = "*.safetensors"
    base: BaseModel
    pieces: Mapping[str, Piece]
    saved: Mapping[str, NDArray[Any]]
    progress: Progress | None = None

    def layout(self, code: str | None = None, metadata: str = "") -> FileLayout | None:
        """See :meth:`Adapter.layout`: its size does not depend on the ranks."""
        return None

    def factor_type(self, code: str | None) -> str | None:
        """See :meth:`Adapter.factor_type`: they are not stored, so nothing is to be rounded off before the sum."""
        return "F32"

    def fill(self, folder: Path, factors: Mapping[str, LoraFactors], *, metadata: str, code: str | None) -> Filled:
        """See :meth:`Adapter.fill`; the certificate is known when all is written, and stands in para_ext.json only."""
        header_text = json.dumps({**json.loads(metadata), "error": None})
        rounding: dict[str, float] = {}
        files = sorted(set(self.base.shards.values()))
        sizes = [(self.base.folder / file).stat().st_size for file in files]
        meter = Meter(self.progress, f"merging into {len(files)} files", 2 * sum(sizes))
        for file, size in zip(files, sizes, strict=True):
            tensors, header = read_tensors(self.base.folder / file)
            for key in tensors:
                if key in self.saved:
                    tensors[key] = self.saved[key]
                if key in self.pieces:
                    tensors[key], lost = _merged(self.pieces[key], tensors[key], factors)
                    for name, norm in lost.items():
                        rounding[name] = math.hypot(rounding.get(name, 0.0), norm)
                meter.add(tensors[key].nbytes)
            write_safetensors(folder / file, tensors, {**header, "format": "pt", "para_ext": header_text})
            meter.add(2 * size - sum(tensor.nbytes for tensor in tensors.values()))
        for slot in self.slots:
            if slot.role == "tied" and slot.unit in rounding:
                rounding[slot.name] = rounding[slot.unit]
        left_out = []
        for path in sorted(self.base.folder.iterdir()):
            if path.suffix in WEIGHT_SUFFIXES or path.name[0] == "." or path.name == SIDECAR:
                continue
            if holds_itself(path) or path.name == "config.json":  # which was read as such
                shutil.copyfile(path, folder / path.name)
            else:
                left_out.append(path.name)
        notes = [f"'{self.base.folder}' and the adapter in one, in the base's types: no runtime needs to know of LoRA."]
        if left_out:
            notes.append(f"Not copied from the base, as folders or links out of it: {', '.join(left_out)}.")
        return Filled(notes, rounding)


def for_merging(adapter: PeftAdapter, base: BaseModel, progress: Progress | None = None) -> MergedAdapter:
    """The adapter with its base model; ``progress`` is told of the base's bytes as they are written.

    Raises:
        ParaError: a module has no weight in the base that it fits, or the adapter holds what cannot be merged.
    """
    from .servers import check_plain

    check_plain(adapter, "merged", foreign=True)
    weights = _Weights(base)
    saved: dict[str, NDArray[Any]] = {}
    held: dict[str, NDArray[Any]] = {}  # what the adapter changes by holding it whole, by its name in the model
    for key, tensor in adapter.foreign.items():
        name = weights.name(key.removeprefix(PREFIX).replace(".base_layer.", "."))
        twins = weights.twins(name, tensor.shape)
        place = next(filter(None, map(weights.place, (name, *twins))), "")
        if not place or weights.tensors[place].shape != tensor.shape:
            raise ParaError(
                f"'{adapter.path}' also holds '{key}', which is no tensor of '{base.folder}' of its shape: give the "
                "base model of this adapter"
            )
        tensor = _in_type_of(weights.tensors[place], tensor, key)
        if np.array_equal(tensor, weights.tensors[place]):  # PEFT saves the base's own embeddings, too
            continue
        held[name] = saved[place] = tensor
    pieces: dict[str, Piece] = {}
    adapted: dict[str, PeftSlot] = {}
    for slot in adapter.slots:
        name = weights.name(slot.name if slot.experts else f"{slot.name}.weight")
        adapted[name] = slot
        found = _pieces(slot, name, weights, _flipped(slot, adapter, base))
        if not found and slot.role == "tied" and any(map(weights.place, weights.twins(name, _shape(slot)))):
            continue  # what is added to the embedding is added to it
        if not found:
            raise ParaError(
                f"module '{slot.name}' has no weight in '{base.folder}' that its ΔW fits: give the base model of this "
                "adapter, not quantized; for an output layer that shares its weight with the input there is none"
            )
        if twice := next((key for key in found if key in pieces), ""):
            raise ParaError(
                f"modules '{slot.name}' and '{pieces[twice].slot.name}' would both be '{twice}' of '{base.folder}': "
                "give the base model of this adapter"
            )
        pieces |= found
    _check_twins(held, adapted, weights)
    return MergedAdapter(
        path=adapter.path,
        weights=adapter.weights,
        slots=adapter.slots,
        notes=adapter.notes,
        others=(*adapter.others, base.folder),
        base=base,
        pieces=pieces,
        saved=saved,
        progress=progress,
    )


def _flipped(slot: PeftSlot, adapter: PeftAdapter, base: BaseModel) -> bool | None:
    """Whether the module's layer keeps its weight transposed; None where only the shape can tell."""
    if base.kind in _CONV1D:
        return slot.name.rpartition(".")[2] in _CONV1D_LAYERS
    # Of a model that is not listed, fan_in_fan_out speaks of some layer.
    return None if adapter.config.get("fan_in_fan_out") else False


class _Weights:
    """A base's tensors by the names that an adapter calls them by.

    Attributes:
        tensors: by key in the base's files, mapped.
    """

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self.tensors: dict[str, NDArray[Any]] = {}
        for file in sorted(set(base.shards.values())):
            self.tensors |= read_tensors(base.folder / file)[0]

    def name(self, name: str) -> str:
        """What transformers calls it, if it is a weight with several names there."""
        if _outside_layers(name):
            candidates, place = self._candidates(name), self.place(name)
            for other in chain.from_iterable(self._base.shared or ()):
                if other in candidates or (place and self.place(other) == place):
                    return other
        return name

    def place(self, name: str) -> str:
        """The key that holds it; empty where none does."""
        candidates = self._candidates(name)
        if key := next((key for key in candidates if key in self.tensors), ""):
            return key
        sources = self.sources(name)
        return sources[0][0] if len(sources) == 1 else ""

    def sources(self, name: str) -> Sequence[tuple[str, str | None]]:
        """The keys that transformers makes it of, where it renames; see :attr:`BaseModel.renamed`."""
        renamed = self._base.renamed
        return next((renamed[name] for name in self._candidates(name) if name in renamed), [])

    def twins(self, name: str, shape: tuple[int, ...]) -> Collection[str]:
        """The other names of the weight that it is, such as the output layer's of an input embedding.

        Where transformers does not know the model, what looks like an embedding counts as shared, if config.json does
        not say that it isn't.
        """
        if not _outside_layers(name):
            return []
        if self._base.shared is not None:
            found = next((group for group in self._base.shared if name in group), [])
            return [other for other in found if other != name]
        if not (self._base.tied or self._base.config.get("is_encoder_decoder")) or not self._is_embedding(name, shape):
            return []
        others = [key for key, t in self.tensors.items() if key != name and self._is_embedding(key, t.shape)]
        return others or ["lm_head.weight"]  # what most call the output layer

    def _is_embedding(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether it is an input or output embedding, by its name or size."""
        parts = name.split(".")
        named = parts[-1] == "weight" and parts[-2:-1] and parts[-2] in _EMBEDDINGS
        vocabulary = self._base.config.get("vocab_size")
        sized = len(shape) == 2 and vocabulary in shape and vocabulary != 1  # 1: of a model without tokens
        return bool(named) or (sized and _outside_layers(name))

    def _candidates(self, name: str) -> list[str]:
        """What it may be called in the base: models with heads may call their body otherwise, or not at all."""
        kind = self._base.kind
        first, _, rest = name.partition(".")
        bodies = {"model", "transformer", kind, *kind.replace("-", "_").split("_")}
        return [name, *([rest] if first in bodies else []), f"model.{name}"]


def _outside_layers(name: str) -> bool:
    """Whether it may be an embedding or a head; some models number theirs, too."""
    return not any(part.isdigit() for part in name.split(".")) or "embed" in name or "head" in name


def _check_twins(held: Mapping[str, NDArray[Any]], adapted: Mapping[str, PeftSlot], weights: _Weights) -> None:
    """Refuse to change one weight in one place only, for it would change in all."""
    for name, tensor in held.items():
        for twin in weights.twins(name, tensor.shape):
            if twin not in held or not np.array_equal(held[twin], tensor):
                raise _changed_on_one_side(name, twin)
    for name, slot in adapted.items():
        for twin in weights.twins(name, _shape(slot)):
            if twin not in adapted or adapted[twin].unit != slot.unit or "tied" not in (slot.role, adapted[twin].role):
                raise _changed_on_one_side(name, twin)


def _changed_on_one_side(name: str, twin: str) -> ParaError:
    return ParaError(
        f"'{name}' and '{twin}' are one weight in the base, which the adapter does not change alike: it can't be "
        "merged; use target='peft'"
    )


def _in_type_of(weight: NDArray[Any], saved: NDArray[Any], key: str) -> NDArray[Any]:
    """The adapter's own tensor in the type of the base's."""
    with np.errstate(over="ignore"):
        cast: NDArray[Any] = saved.astype(weight.dtype)
    if weight.dtype.kind in "iub":  # counts and the like
        return cast
    if not np.array_equal(np.isfinite(cast), np.isfinite(saved)):
        raise ParaError(
            f"'{key}' of the adapter exceeds the range of {dtype_name(weight.dtype)}, the base's type: use a base that "
            "is stored in a wider one"
        )
    return cast


def _merged(
    piece: Piece, weight: NDArray[Any], factors: Mapping[str, LoraFactors]
) -> tuple[NDArray[Any], dict[str, float]]:
    """weight + ΔW', in fp64 and rounded once; and what the rounding is at most in ‖·‖_F, by member."""
    slot = piece.slot
    members = slot.members if piece.expert is None else slot.members[piece.expert : piece.expert + 1]
    deltas = []
    for member in members:
        new = factors.get(member.name)
        if new is None or not new.rank:
            delta = np.zeros((member.m, member.n))
        else:
            delta = (as_tensor(new.B).double() @ as_tensor(new.A).double()).numpy()
        deltas.append(delta[piece.rows].T if piece.transposed else delta[piece.rows])
    delta = np.stack(deltas) if slot.experts else np.concatenate(deltas)
    exact = weight.astype(np.float64) + delta.reshape(weight.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        merged: NDArray[Any] = exact.astype(weight.dtype)
        lost = (merged.astype(np.float64) - exact).reshape(delta.shape)
    if not np.isfinite(lost).all():
        why = (
            f"a weight exceeds the range of {dtype_name(weight.dtype)} when merged: use a base stored in a wider type"
            if np.isfinite(weight.astype(np.float64)).all()
            else "its weight in the base is not finite (inf or NaN): download or save the base model again"
        )
        raise ParaError(f"module '{slot.name}': {why}")
    parts = lost if slot.experts else np.split(lost, np.cumsum([len(d) for d in deltas])[:-1])
    # ΔW' = 0 adds nothing, nor does its rounding; fp64 sums are exact to their own unit roundoff.
    bounds = {
        member.name: float(np.linalg.norm(part)) * (1 + 1e-9) + UNIT_ROUNDOFF * float(np.linalg.norm(exact))
        for member, part, d in zip(members, parts, deltas, strict=True)
        if d.any()
    }
    return merged, bounds


def _pieces(slot: PeftSlot, name: str, weights: _Weights, flipped: bool | None) -> dict[str, Piece]:
    """Where in the base the slot's ΔW goes; empty where nothing fits."""
    if key := weights.place(name):
        fits = _fits(slot, weights.tensors[key], flipped)
        return {} if fits is None else {key: Piece(slot, transposed=fits)}
    return _of_experts(slot, weights.sources(name), weights.tensors)


def _of_experts(
    slot: PeftSlot, sources: Sequence[tuple[str, str | None]], tensors: Mapping[str, NDArray[Any]]
) -> dict[str, Piece]:
    """Experts that the base keeps one by one, gate and up apart: rows of each one's ΔW in the order of the patterns."""
    patterns: dict[str | None, list[str]] = {}
    for key, pattern in sources:
        patterns.setdefault(pattern, []).append(key)
    pieces: dict[str, Piece] = {}
    start = 0
    # transformers concatenates gate (w1) and up (w3) in this order, which is that of their names too.
    for _, keys in sorted(patterns.items(), key=lambda item: str(item[0])):
        shape = tensors[keys[0]].shape
        if len(keys) != len(slot.members) or len(shape) != 2:
            return {}
        if any(tensors[key].shape != shape or not _is_plain(tensors[key]) for key in keys):
            return {}
        rows = slice(start, start + shape[0])
        pieces |= {key: Piece(slot, expert, rows) for expert, key in enumerate(keys)}
        start += shape[0]
    fits = slot.experts and start == slot.members[0].m and shape[1] == slot.members[0].n if pieces else False
    return pieces if fits else {}


def _shape(slot: PeftSlot) -> tuple[int, ...]:
    """Of its ΔW; of an embedding's and a transposed layer's weight the order is another."""
    return slot.B.shape[0], *slot.A.shape[1:]


def _is_plain(weight: NDArray[Any]) -> bool:
    return weight.dtype in _FLOATS or dtype_name(weight.dtype) == "bfloat16"


def _fits(slot: PeftSlot, weight: NDArray[Any], flipped: bool | None) -> bool | None:
    """Whether the weight is ΔW's transpose; None where it is neither, could be either, or holds no plain numbers.

    Args:
        flipped: whether plain layers keep weights transposed; None where the shape must tell.
    """
    shape = weight.shape
    if not _is_plain(weight):
        return None
    out, *rest = _shape(slot)
    if slot.embedding:
        return True if shape == (*rest, out) else None
    if slot.experts:
        m, n = slot.members[0].m, slot.members[0].n
        if len(shape) == 2:  # a router's, say: PEFT takes a parameter of two dimensions as a linear layer's
            return False if len(slot.members) == 1 and shape == (m, n) else None
        either: dict[tuple[int, ...], bool] = {(len(slot.members), m, n): False, (len(slot.members), n, m): True}
        return either.get(shape) if m != n else None
    found: dict[tuple[int, ...], bool] = {(out, *rest): False, (*rest, out): True}
    if flipped is None:
        return found.get(shape) if len(found) == 2 else None
    return flipped if shape == ((*rest, out) if flipped else (out, *rest)) else None
