"""Adapter: what every file format reads into, and writes new factors from; and Slot, one adapted module of it.

A :class:`Slot` knows how the two tensors of a module split into LoraFactors, in one orientation for all formats:

    Linear       A [r, in]        B [out, r]            one member
    Embedding    A [r, vocab]     B [dim, r]            one member
    Conv         A [r, in, k…]    B [out, r/g, 1…]      g members (groups): member i has rows i·r/g… of A, block i of B
    experts      A [E·r, in]      B [out, r·E]          E members: rows (E, r), columns (r, E)

Converting is to put the same slots into another format's Adapter, which then writes them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..arrays import as_numpy
from ..errors import ParaError
from ..factors import LoraFactors
from ..layout import FileLayout
from .output import check_out, copy_along, write_file, write_folder

FILE_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
"""Of names that nobody would give a folder."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Slot:
    """The two tensors of one adapted module, and how they split into members.

    Attributes:
        name: the module's path in the base model (of experts, the parameter's); in a file for a pipeline of several
            models, with the model's name before it: ``unet.``, ``text_encoder.``.
        A, B: see the table above; A [r, …] or [E·r, in], B [out, …].
        bias: lora_B.bias [out], which is multiplied with the scale too.
        embedding: the weight is [vocab, dim], and ΔW its transpose.
        experts: members stand side by side in A and B.
        members: one LoraFactors per group or expert.
    """

    name: str
    A: NDArray[Any]
    B: NDArray[Any]
    bias: NDArray[Any] | None = None
    embedding: bool = False
    experts: bool = False
    members: tuple[LoraFactors, ...] = ()

    @property
    def units(self) -> tuple[int, int]:
        """Rows of A and columns of B per unit of the members' rank."""
        count = len(self.members)
        return count, count if self.experts else 1

    @property
    def unit(self) -> str:
        """What shares one rank: the group, or the module alone."""
        return self.members[0].group or self.name

    def rank(self, rank: int) -> int:
        """What LoRA calls r when every member has this rank: rows of A, of one expert."""
        return rank if self.experts else rank * len(self.members)

    def join(self, members: Sequence[LoraFactors]) -> tuple[NDArray[Any], NDArray[Any]]:
        """A and B in the slot's orientation, scale folded in, from new factors of the members with one rank k ≥ 1."""
        k = members[0].rank
        A = _joined([as_numpy(f.A) for f in members]).reshape(-1, *self.A.shape[1:])
        Bs = [B if f.scale == 1 else B * B.dtype.type(f.scale) for f in members for B in (as_numpy(f.B),)]
        if self.experts:
            return A, np.stack(Bs, axis=2).reshape(-1, k * len(Bs))
        return A, _joined(Bs).reshape(-1, k, *self.B.shape[2:])

    def split(self, count: int) -> tuple[Sequence[NDArray[Any]], Sequence[NDArray[Any]]]:
        """Views B_i [m, k] and A_i [k, n] of as many members."""
        A = _flat(self.A).reshape(count, -1, self.A[0].size)
        if self.experts:
            B = self.B.reshape(self.B.shape[0], -1, count)
            return [B[:, :, i] for i in range(count)], list(A)
        return list(_flat(self.B).reshape(count, -1, self.B.shape[1])), list(A)

    def changed(self, **changes: Any) -> tuple[LoraFactors, ...]:
        """The members with other group or min_rank."""
        return tuple(replace(f, **changes) for f in self.members)


AnySlot = TypeVar("AnySlot", bound=Slot, covariant=True)


class Filled(NamedTuple):
    """What :meth:`Adapter.fill` did.

    Attributes:
        notes: sentences for the report: what a reader of the output should know.
        rounding: by member of a slot, an upper bound of what storage took from B'·A' beyond the factors' own rounding,
            in ‖·‖_F; 0 if absent.
    """

    notes: Sequence[str] = ()
    rounding: Mapping[str, float] = MappingProxyType({})


class Written(NamedTuple):
    """What :meth:`Adapter.write` did.

    Attributes:
        size: bytes of the tensor file.
        left_out: the source's files that were not copied.
        filled: what :meth:`Adapter.fill` did.
    """

    size: int
    left_out: Sequence[str]
    filled: Filled


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapter(ABC, Generic[AnySlot]):
    """A LoRA adapter in one format; nothing of it is ever changed.

    Attributes:
        path: the folder or file that was read.
        weights: the tensor file.
        slots: the adapted modules in natural order.
        foreign: every other tensor by key (heads, magnitude vectors, embeddings, trained tokens, biases).
        metadata: of the safetensors header.
        notes: sentences for the report: how the source was understood.
        tensor_file: name of the tensor file in a folder that is written.
        others: what else was read (other sources, the base model's folder): nothing is written there.
    """

    path: Path
    weights: Path
    slots: tuple[AnySlot, ...]
    foreign: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tensor_file: str
    others: tuple[Path, ...] = ()

    @cached_property
    def factors(self) -> tuple[LoraFactors, ...]:
        """All members of all slots; 2-D views of the stored tensors."""
        return tuple(chain.from_iterable(slot.members for slot in self.slots))

    @property
    def shaping(self) -> Mapping[str, Any]:
        """Arguments that every plan for this format must have, as for ``Spectra.plan``."""
        return {}

    def check_ranks(self, ranks: Mapping[str, int]) -> None:
        """Refuse ranks (of ``factors``, by name) that the format cannot express, naming the flag that would help."""

    def gains(self, ranks: Mapping[str, int]) -> Mapping[str, float]:
        """By which factor each B' is to be larger than at unit scale, where readers divide by it again; 1 if absent."""
        return {}

    def factor_type(self, code: str | None) -> str | None:
        """The type that :meth:`fill` is to get the new factors in where ``code`` is asked for; None: each one's own."""
        return code

    @abstractmethod
    def layout(self, code: str | None = None, metadata: str = "") -> FileLayout | None:
        """The written safetensors file with open ranks, its modules the first members of the slots; None if none is.

        Args:
            code: the new factors' type; None keeps each tensor's own.
            metadata: the text for the header's ``para_ext``, or a placeholder of its exact length.
        """

    @abstractmethod
    def fill(self, folder: Path, factors: Mapping[str, LoraFactors], *, metadata: str, code: str | None) -> Filled:
        """Write the format's own files into an empty folder.

        Args:
            factors: by name; B' [m, k] and A' [k, n], with the gains that :meth:`gains` asks for; a missing one or
                k = 0 means dropped.
            metadata: JSON text for ``para_ext`` in a header.
            code: the type of what else is written anew (lora_B.bias); None keeps its own.
        """

    def as_file(self, out: Path) -> bool:
        """Whether ``out`` names a single file: it has the tensor file's suffix, and the format needs no other file."""
        return False

    def check_name(self, out: Path) -> None:
        """Refuse the name of a file where this format is a folder, or of another kind of file."""
        if not self.as_file(out) and out.suffix in FILE_SUFFIXES:
            raise ParaError(f"'{out}' would be a folder here, not a file: give a name without {out.suffix}")

    def check_out(self, out: Path, *, overwrite: bool) -> None:
        """Refuse an output that :meth:`write` would refuse, before any work."""
        self.check_name(out)
        check_out(out, overwrite=overwrite, sources=self._sources, file=self.as_file(out))

    def write(
        self,
        out: Path,
        new_factors: Sequence[LoraFactors],
        *,
        metadata: str,
        sidecar: Callable[[Filled], Mapping[str, Any]],
        code: str | None = None,
        overwrite: bool = False,
    ) -> Written:
        """Write the compressed adapter, whole or not at all: as a folder, or where :meth:`as_file` a single file.

        Args:
            out: the folder or file to make.
            new_factors: see ``factors`` of :meth:`fill`.
            metadata, code: see :meth:`fill`.
            sidecar: gives what para_ext.json holds; a single file has none.
            overwrite: replace what was written there before, and not changed since.

        Raises:
            ParaError: refused or not written; nothing has changed.
        """
        factors = {f.name: f for f in new_factors}
        single = self.as_file(out)
        size = 0
        left_out: list[str] = []
        filled = Filled()

        def fill(folder: Path) -> Mapping[str, Any]:
            nonlocal size, filled
            filled = self.fill(folder, factors, metadata=metadata, code=code)
            whole = "*" not in self.tensor_file  # else brackets in a name would be a pattern, too
            tensors = [folder / self.tensor_file] if whole else folder.glob(self.tensor_file)
            size = sum(path.stat().st_size for path in tensors)
            if not single and self.path.is_dir():
                left_out.extend(copy_along(self.path, folder, own=self.weights.name))
            return sidecar(filled)

        if single:
            write_file(out, self.tensor_file, fill, overwrite=overwrite, sources=self._sources)
        else:
            write_folder(out, fill, overwrite=overwrite, sources=self._sources)
        return Written(size, left_out, filled)

    @property
    def _sources(self) -> tuple[Path, ...]:
        return self.path, *self.others

    def ranks(self, ranks: Mapping[str, int]) -> list[int]:
        """The rank of each slot's members; if all are 0, then 1 for the first slot and what shares its rank."""
        new = []
        for slot in self.slots:
            found = {ranks.get(f.name, 0) for f in slot.members}
            if len(found) > 1:
                raise ParaError(f"module '{slot.name}': its members have the ranks {sorted(found)}; give them one rank")
            new.append(found.pop())
        if not any(new):
            new = [int(slot.unit == self.slots[0].unit) for slot in self.slots]
        return new

    def pairs(self, factors: Mapping[str, LoraFactors]) -> list[tuple[AnySlot, NDArray[Any], NDArray[Any]]]:
        """Every kept slot, one at least (see :meth:`ranks`), with its new A and B, contiguous."""
        ranks = self.ranks({f.name: f.rank for f in factors.values()})
        kept = []
        for slot, rank in zip(self.slots, ranks, strict=True):
            if rank:
                members = [factors[f.name] if f.name in factors and factors[f.name].rank else _zeros(f)
                           for f in slot.members]  # fmt: skip
                A, B = slot.join(members)
                kept.append((slot, np.ascontiguousarray(A), np.ascontiguousarray(B)))
        return kept


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Their rows one after the other; one alone is not copied."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _flat(x: NDArray[Any]) -> NDArray[Any]:
    """[first, all others]"""
    return x.reshape(len(x), -1)


def _zeros(f: LoraFactors) -> LoraFactors:
    B, A = as_numpy(f.B), as_numpy(f.A)
    return replace(f, B=np.zeros((f.m, 1), B.dtype), A=np.zeros((1, f.n), A.dtype), scale=1.0)
