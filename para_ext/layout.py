"""FileLayout: the exact size of the safetensors file that will be written, as a function of the ranks.

The format (https://github.com/huggingface/safetensors): 8 bytes of header length, a compact JSON header padded with
spaces to a multiple of 8, the tensors' bytes. The writer orders tensors by dtype, widest first, then by key; the order
matters here because the header spells every offset in decimal digits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

from .errors import ParaError

# Bits per element, in the order in which the writer lays tensors out.
DTYPE_BITS = {
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F32": 32, "U32": 32, "I32": 32,
    "BF16": 16, "F16": 16, "U16": 16, "I16": 16,
    "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8,
    "F4": 4, "BOOL": 8,
}  # fmt: skip
_PLACE = dict(zip(DTYPE_BITS, count()))

LARGEST = 2**40  # no dimension of a real tensor is near it, and sums over an adapter stay exact in a float


@dataclass(frozen=True)
class Slot:
    """One tensor of the file.

    Attributes:
        key: its name in the file.
        dtype: the format's code: ``F32``, ``BF16``, ...
        shape: as in the header; ``shape[rank_axis]`` holds the elements per unit of rank (1 for a plain factor, the
            number of experts for a stacked one).
        rank_axis: the axis that the rank multiplies; None when the shape is fixed.
        module: the tensor is absent when this module's rank is 0; None for a foreign tensor, which is always there.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    rank_axis: int | None = None
    module: str | None = None

    def __post_init__(self) -> None:
        if self.key == "__metadata__" or not _encodable(self.key):
            raise ParaError(f"tensor key {self.key!r} cannot be written to a safetensors file: rename the tensor")
        if self.dtype not in DTYPE_BITS:
            raise ParaError(f"tensor '{self.key}' has dtype {self.dtype!r}: give one of {', '.join(DTYPE_BITS)}")
        if not all(0 <= d <= LARGEST for d in self.shape):
            raise ParaError(f"tensor '{self.key}' has shape {list(self.shape)}: give dimensions from 0 to {LARGEST}")
        if self.rank_axis is not None and (self.module is None or not 0 <= self.rank_axis < len(self.shape)):
            raise ParaError(f"tensor '{self.key}' has rank_axis {self.rank_axis}: give an axis it has, and a module")


@dataclass(frozen=True)
class FileLayout:
    """The tensors and the metadata of one safetensors file whose ranks are still open.

    Attributes:
        slots: every tensor of the file, in any order.
        metadata: the header's ``__metadata__``; None when the file has none. Values that are not known yet are
            placeholders of their exact length.
    """

    slots: tuple[Slot, ...]
    metadata: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for slot in self.slots:
            if slot.key in seen:
                raise ParaError(f"tensor '{slot.key}' is given twice: give each tensor one slot")
            seen.add(slot.key)
        for key, value in (self.metadata or {}).items():
            if not _encodable(key + value):
                raise ParaError(f"metadata {key!r} cannot be written to a safetensors file: remove it")

    def bytes(self, ranks: Mapping[str, int]) -> int:
        """Size in bytes of the file written with these ranks (module name → rank ≥ 0)."""
        header, end, digits, limit = self._head, 0, 1, 10  # `digits` is the length of `end` in decimal: end < limit
        commas = -1 if self.metadata is None else 0
        for module, text, fixed_bits, rank_bits, per_rank in self._table:
            rank = 1 if module is None else ranks[module]
            if rank == 0:
                continue
            if per_rank:
                header += len(str(per_rank * rank))
            header += text + digits
            end += (fixed_bits + rank_bits * rank) // 8
            while end >= limit:
                digits, limit = digits + 1, limit * 10
            header += digits
            commas += 1
        return 8 + (header + max(commas, 0) + 7) // 8 * 8 + end

    @cached_property
    def _head(self) -> int:
        """Length of the header's braces and metadata."""
        return _json_length({} if self.metadata is None else {"__metadata__": dict(self.metadata)})

    @cached_property
    def _table(self) -> list[tuple[str | None, int, int, int, int]]:
        """Per tensor, as written: module, entry length without the digits that vary, fixed bits, bits per rank, and
        elements of the rank axis per rank (0: no digits of the shape vary)."""
        table = []
        for slot in sorted(self.slots, key=lambda s: (_PLACE[s.dtype], s.key)):
            entry = {slot.key: {"dtype": slot.dtype, "shape": slot.shape, "data_offsets": []}}
            text = _json_length(entry) - 2 + 1  # without the braces, with the comma between the offsets
            bits = DTYPE_BITS[slot.dtype] * math.prod(slot.shape)
            if slot.rank_axis is None:
                table.append((slot.module, text, bits, 0, 0))
            else:
                per_rank = slot.shape[slot.rank_axis]
                table.append((slot.module, text - len(str(per_rank)), 0, bits, per_rank))
        return table

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`from_dict` reads: plain JSON values."""
        return {
            "slots": [{**vars(slot), "shape": list(slot.shape)} for slot in self.slots],
            "metadata": None if self.metadata is None else dict(self.metadata),
        }

    @classmethod
    def from_dict(cls, record: object) -> FileLayout:
        """The layout that :meth:`to_dict` gave; anything else is a ParaError that names the field."""
        slots = []
        for i, item in enumerate(checked(record, "slots", list)):
            shape = checked(item, "shape", list)
            if not all(type(d) is int for d in shape):
                raise ParaError(f"slots[{i}] has the shape {shape!r:.60}, not a list of whole numbers")
            slots.append(
                Slot(
                    key=checked(item, "key", str),
                    dtype=checked(item, "dtype", str),
                    shape=tuple(shape),
                    rank_axis=checked(item, "rank_axis", int, None),
                    module=checked(item, "module", str, None),
                )
            )
        metadata = checked(record, "metadata", dict, None)
        if not all(isinstance(value, str) for value in (metadata or {}).values()):
            raise ParaError("the field 'metadata' holds a value that is not text")
        return cls(tuple(slots), metadata)


def checked(record: object, name: str, *kinds: type | None) -> Any:
    """``record[name]`` of untrusted JSON, whose type must be exactly one of ``kinds`` (None stands for null)."""
    if not isinstance(record, dict) or name not in record:
        raise ParaError(f"the field '{name}' is missing")
    value = record[name]
    if (None if value is None else type(value)) not in kinds:
        wanted = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
        raise ParaError(f"the field '{name}' is {value!r:.60}, not {wanted}")
    return value


def _json_length(value: object) -> int:
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def _encodable(text: str) -> bool:
    """False for text with lone surrogates, which UTF-8 has no bytes for."""
    return not any("\ud800" <= c <= "\udfff" for c in text)
