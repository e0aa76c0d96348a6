"""PEFT adapter folders: adapter_config.json with adapter_model.safetensors (or .bin), read without importing PEFT.

Tensors are memory-mapped numpy arrays, so that nothing but pickles needs PyTorch; the factors are 2-D views of them. A
:class:`Slot` knows how one adapted module is stored:

    Linear       A [r, in]        B [out, r]            one member
    Embedding    A [r, vocab]     B [dim, r]            one member, keys ``lora_embedding_A`` and ``_B``
    Conv         A [r, in, k…]    B [out, r/g, 1…]      g members (groups): member i has rows i·r/g… of A, block i of B
    experts      A [E·r, in]      B [out, r·E]          E members (``target_parameters``): rows (E, r), columns (r, E)

Several parameters of one module are nested, ``<module>.base_layer.lora_A`` inside ``<module>.lora_A``, in the order in
which the model registers them.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import layout
from ..arrays import NUMPY, Array, as_numpy, code_of, dtype_name, holds_data
from ..errors import ParaError
from ..factors import LoraFactors, fold_bias, written_code
from ..naming import natural_key
from .mapped import SafetensorError, read_safetensors
from .output import CONFIG, PICKLED, SIDECAR, WEIGHTS, check_out, copy_along, write_folder, write_safetensors
from .peft_config import PatternKeys, Targets, oldest_peft, unit_scale_config

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "base_model.model."
_KEY = re.compile(
    r"(?P<path>.+)\.lora_(?:(?P<which>[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<leaf>weight|bias)"
    r"|embedding_(?P<embedding>[AB])(?:\.(?P<name>[^.]+))?)",
    re.DOTALL,
)

# The order in which models register the parameters of their experts; PEFT nests the wrappers in that order.
_REGISTERED = ("gate_up_proj", "down_proj")

_UNCONVERTED = ("pissa", "olora", "corda", "lora_ga")
_NOT_PLAIN = {
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron's parallel layers",
}
_FORMATS = (
    (r"\.ia3_l(\.|$)", "IA³"),
    (r"\.lokr_", "LoKr"),
    (r"\.hada_", "LoHa"),
    (r"\.lora_E(\.|$)|\.ranknum(\.|$)", "AdaLoRA"),
    (r"\.b?oft_", "OFT"),
    (r"\.vera_lambda_", "VeRA"),
    (r"[._]lora[._](down|up)\.weight$", "kohya or diffusers LoRA"),
    (r":(down|up)$", "cloneofsimo LoRA"),
    (r"(^|\.)w_[ab]_\d+$", "SAM LoRA"),
    (r"^(unet|text_encoder|transformer)\..*\.lora_[AB]\.weight$", "diffusers LoRA"),
    (r"\.lora_[AB]$", "loralib LoRA"),
    (r"\.lora_(embedding_)?[AB]\b", "PEFT LoRA"),
)
_LFS = b"version https://git-lfs"

Role = Literal["module", "parameter", "inner", "tied"]


@dataclass(frozen=True, eq=False)
class Slot:
    """The two tensors of one adapted module, and how they split into members.

    Attributes:
        name: what PEFT's config calls it: the module's path, or the parameter's.
        path: what its keys start with in the file, without ``base_layer`` of wrappers around it.
        depth: how many wrappers of other parameters lie around it.
        role: ``inner`` is the output projection of a MultiheadAttention, which follows the rank of its module;
            ``tied`` is adapted by ensure_weight_tying; neither is looked up in target_modules.
        A, B: as stored, see the table above; A [r, …] or [E·r, in], B [out, …].
        bias: lora_B.bias [out], which PEFT multiplies with the scale too.
        members: one LoraFactors per group or expert.
    """

    name: str
    path: str
    depth: int
    role: Role
    embedding: bool
    A: NDArray[Any]
    B: NDArray[Any]
    bias: NDArray[Any] | None
    members: tuple[LoraFactors, ...] = ()

    @property
    def experts(self) -> bool:
        return self.role == "parameter"

    @property
    def units(self) -> tuple[int, int]:
        """Rows of A and columns of B per unit of the members' rank."""
        count = len(self.members)
        return count, count if self.experts else 1

    def peft_rank(self, rank: int) -> int:
        """What PEFT calls r when every member has this rank."""
        return rank if self.experts else rank * len(self.members)

    def keys(self, depth: int) -> tuple[str, str, str]:
        """Keys of A, B and the bias with this many wrappers around."""
        path = self.path + ".base_layer" * depth
        if self.embedding:
            return f"{path}.lora_embedding_A", f"{path}.lora_embedding_B", ""
        return f"{path}.lora_A.weight", f"{path}.lora_B.weight", f"{path}.lora_B.bias"

    def join(self, members: Sequence[LoraFactors]) -> tuple[NDArray[Any], NDArray[Any]]:
        """A and B as PEFT stores them, scale folded in, from new factors of the members with one rank k ≥ 1."""
        k = members[0].rank
        A = _joined([as_numpy(f.A) for f in members]).reshape(-1, *self.A.shape[1:])
        Bs = [B if f.scale == 1 else B * B.dtype.type(f.scale) for f in members for B in (as_numpy(f.B),)]
        if self.experts:
            return A, np.stack(Bs, axis=2).reshape(-1, k * len(Bs))
        return A, _joined(Bs).reshape(-1, k, *self.B.shape[2:])


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Their rows one after the other; one alone is not copied."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


class Written(NamedTuple):
    """What :meth:`PeftAdapter.write` did.

    Attributes:
        size: bytes of the tensor file.
        left_out: the source's files that were not copied.
        oldest_peft: the oldest PEFT that reads the config's patterns as they are meant; None if any does.
    """

    size: int
    left_out: list[str]
    oldest_peft: str | None


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """A LoRA adapter as PEFT saves it; nothing of it is ever changed.

    Attributes:
        path: the folder.
        weights: the tensor file in it.
        config: adapter_config.json.
        slots: the adapted modules in natural order.
        foreign: every other tensor by key (heads, magnitude vectors, embeddings, trained tokens, biases).
        metadata: of the safetensors header.
    """

    path: Path
    weights: Path
    config: Mapping[str, Any]
    slots: tuple[Slot, ...]
    foreign: Mapping[str, NDArray[Any]]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def factors(self) -> tuple[LoraFactors, ...]:
        """All members of all slots; 2-D views of the stored tensors."""
        return tuple(chain.from_iterable(slot.members for slot in self.slots))

    def header(self, metadata: str) -> dict[str, str]:
        """Metadata of the written header: the source's, and the JSON text ``metadata`` under ``para_ext``."""
        return {**self.metadata, "format": "pt", "para_ext": metadata}

    def layout(self, code: str | None = None, metadata: str = "") -> layout.FileLayout:
        """The written tensor file with open ranks; its modules are the first members of the slots.

        It is exact but for two cases: all ranks 0, where one pair of zeros is written, and a parameter that is kept
        inside one that is dropped, whose two keys lose 11 bytes each.

        Args:
            code: the new factors' type; None keeps each tensor's own.
            metadata: the text for the header's ``para_ext``, or a placeholder of its exact length.
        """
        slots = [layout.Slot(key, _code(key, t), t.shape) for key, t in self.foreign.items()]
        for slot in self.slots:
            module = slot.members[0].name
            key_A, key_B, key_bias = slot.keys(slot.depth)
            rows, columns = slot.units
            shape_A, shape_B = (rows, *slot.A.shape[1:]), (slot.B.shape[0], columns, *slot.B.shape[2:])
            new = written_code(slot.A, slot.B, code)
            slots.append(layout.Slot(key_A, new, shape_A, 0, module))
            slots.append(layout.Slot(key_B, new, shape_B, 1, module))
            if slot.bias is not None:
                slots.append(layout.Slot(key_bias, code or _code(key_bias, slot.bias), slot.bias.shape, None, module))
        return layout.FileLayout(tuple(slots), self.header(metadata))

    def tensors(self, new_factors: Sequence[LoraFactors], code: str | None = None) -> dict[str, NDArray[Any]]:
        """The tensors of the new file by key, contiguous and unshared; if no component is kept, one pair of zeros.

        Args:
            new_factors: by name; B [m, k] and A [k, n]; a missing one or k = 0 means dropped.
            code: the type of what else is written anew (lora_B.bias); None keeps its own.
        """
        given = {f.name: f for f in new_factors}
        ranks = self._ranks({f.name: f.rank for f in new_factors})
        tensors: dict[str, NDArray[Any]] = {}
        for slot, rank in zip(self.slots, ranks, strict=True):
            if rank == 0:
                continue
            members = [given[f.name] if f.name in given and given[f.name].rank else _zeros(f) for f in slot.members]
            A, B = slot.join(members)
            kept = (other for other, k in zip(self.slots, ranks, strict=True) if k)
            depth = sum(other.path == slot.path and other.depth < slot.depth for other in kept) if slot.depth else 0
            key_A, key_B, key_bias = slot.keys(depth)
            tensors |= {key_A: np.ascontiguousarray(A), key_B: np.ascontiguousarray(B)}
            if slot.bias is not None:
                new = code or _code(key_bias, slot.bias)
                tensors[key_bias] = fold_bias(slot.name, slot.bias, slot.members[0].scale, new)
        # Not ascontiguousarray, which makes an array of what has no dimension.
        return tensors | {key: np.asarray(array, order="C") for key, array in self.foreign.items()}

    def new_config(self, ranks: Mapping[str, int], *, others: Collection[str] = ()) -> dict[str, Any]:
        """adapter_config.json for new ranks (of ``factors``, by name; a missing one is 0), at unit scale.

        Args:
            others: module names of the base model, as far as they are known.
        """
        slots = zip(self.slots, self._ranks(ranks), strict=True)
        peft_ranks = {slot.name: slot.peft_rank(rank) for slot, rank in slots if slot.role != "inner"}
        return unit_scale_config(
            self.config,
            peft_ranks,
            others=others,
            parameters=[slot.name for slot in self.slots if slot.role == "parameter"],
            tied=[slot.name for slot in self.slots if slot.role == "tied"],
        )

    def check_out(self, out: Path, *, overwrite: bool) -> None:
        """Refuse an output folder that :meth:`write` would refuse, before any work."""
        check_out(out, overwrite=overwrite, source=self.path)

    def write(
        self,
        out: Path,
        new_factors: Sequence[LoraFactors],
        *,
        metadata: str,
        sidecar: Mapping[str, Any],
        code: str | None = None,
        overwrite: bool = False,
    ) -> Written:
        """Write the compressed adapter as a folder, whole or not at all.

        Args:
            out: the folder to make.
            new_factors: as for :meth:`tensors`.
            metadata: JSON text for ``para_ext`` in the safetensors header.
            sidecar: what para_ext.json holds.
            code: as for :meth:`tensors`.
            overwrite: replace an adapter that is already there.

        Raises:
            ParaError: refused or not written; nothing has changed.
        """
        tensors = self.tensors(new_factors, code)
        config = self.new_config({f.name: f.rank for f in new_factors})
        size, left_out = 0, []

        def fill(folder: Path) -> None:
            nonlocal size, left_out
            write_safetensors(folder / WEIGHTS, tensors, self.header(metadata))
            _write_json(folder / CONFIG, config)
            _write_json(folder / SIDECAR, sidecar)
            left_out = copy_along(self.path, folder)
            size = (folder / WEIGHTS).stat().st_size

        write_folder(out, fill, overwrite=overwrite, source=self.path)
        return Written(size, left_out, oldest_peft(config))

    def _ranks(self, ranks: Mapping[str, int]) -> list[int]:
        """The rank of each slot's members; if all are 0, then 1 for the first slot and what shares its rank."""
        new = []
        for slot in self.slots:
            found = {ranks.get(f.name, 0) for f in slot.members}
            if len(found) > 1:
                raise ParaError(f"module '{slot.name}': its members have the ranks {sorted(found)}; give them one rank")
            new.append(found.pop())
        if not any(new):
            first = self.slots[0]
            new = [int(_unit(slot) == _unit(first)) for slot in self.slots]
        return new


def read_peft(path: Path) -> PeftAdapter:
    """Read an adapter folder; safetensors is preferred where a .bin lies beside it, as PEFT does.

    Raises:
        ParaError: what is wrong with it, and what to do.
    """
    weights = next((path / name for name in (WEIGHTS, PICKLED) if (path / name).is_file()), None)
    if weights is None:
        raise ParaError(f"'{path}' holds neither {WEIGHTS} nor {PICKLED}: give the folder that PEFT saved")
    if not (path / CONFIG).is_file():
        kind = recognise(read_tensors(weights)[0])
        if kind != "PEFT LoRA":
            raise ParaError(f"'{path}' holds {kind} tensors and no {CONFIG}: give the folder of a PEFT LoRA adapter")
        raise ParaError(f"'{path}' has no {CONFIG}, so rank and alpha are unknown: put it beside the tensors")
    config = _read_config(path / CONFIG)
    tensors, metadata = read_tensors(weights)
    pairs, foreign = _sort(tensors, weights)
    if not pairs:
        raise ParaError(f"'{weights}' holds {recognise(tensors)} tensors but no LoRA pair: give a LoRA adapter")
    slots = _tie(_members(_bare_slots(pairs, config), config), config)
    slots = sorted(_floor(slots, config, foreign), key=_natural)
    return PeftAdapter(path, weights, config, tuple(slots), foreign, metadata)


def read_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """All tensors of a safetensors or pickled file, memory-mapped, and the header's metadata.

    Raises:
        ParaError: empty, truncated, a Git LFS pointer, or not a plain dict of tensors.
    """
    _check_file(path)
    if path.suffix == ".safetensors":
        try:
            return read_safetensors(path)
        except ParaError as e:
            raise ParaError(f"'{path}': {e}") from e
        except (SafetensorError, OSError, ValueError, LookupError) as e:
            raise ParaError(f"'{path}' is not a whole safetensors file ({_line(e)}): download or save it again") from e
    return {key: as_numpy(tensor) for key, tensor in _unpickled(path).items()}, {}


def _unpickled(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as e:
        raise ParaError(
            f"'{path}' is a pickle of more than tensors, which is not run: convert it to safetensors"
        ) from e
    except Exception as e:  # torch.load raises nearly anything for a damaged file
        raise ParaError(f"'{path}' is not a whole PyTorch file ({_line(e)}): download or save it again") from e
    fits = isinstance(loaded, dict) and all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items()
    )
    if not fits:
        raise ParaError(f"'{path}' is not a plain dict of tensors: save the adapter's state dict alone")
    for key, tensor in loaded.items():
        if not holds_data(tensor):
            raise ParaError(f"'{path}': tensor '{key}' is not dense (sparse, nested, quantized or meta): save it dense")
        _code(key, tensor)
    return dict(loaded)


def recognise(keys: Collection[str]) -> str:
    """What kind of adapter has these tensor keys, in words."""
    return next((name for pattern, name in _FORMATS if any(re.search(pattern, key) for key in keys)), "unknown")


# --- config -----------------------------------------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    _check_file(path)
    try:
        config = json.loads(path.read_bytes(), object_pairs_hook=partial(_no_duplicates, path))
    except (ValueError, RecursionError) as e:
        if isinstance(e, ParaError):
            raise
        raise ParaError(f"'{path}' is not valid JSON ({_line(e)}): correct it, or save the adapter again") from e
    if not isinstance(config, dict):
        raise ParaError(f"'{path}' is not a JSON object: save the adapter again")
    if config.get("peft_type") != "LORA":
        raise ParaError(f"'{path}' says peft_type {config.get('peft_type')!r}, but only LORA can be compressed")
    for key, (fits, wanted) in _FIELDS.items():
        if key in config and not fits(config[key]):
            raise ParaError(f"'{path}': {key} is {config[key]!r:.80}, but must be {wanted}: correct it")
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise ParaError(f"'{path}' has no {key}, so the scale is unknown: add it")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_UNCONVERTED):
        raise ParaError(
            f"'{path}': the adapter was initialised by {init}, which also changed the base weights; convert it first, "
            "by model.save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if init == "loftq" or config.get("loftq_config"):
        raise ParaError(f"'{path}': the adapter was initialised by LoftQ, which changed the base weights too; merge it")
    for key, name in _NOT_PLAIN.items():
        if config.get(key):
            raise ParaError(f"'{path}': the adapter uses {name}, which is not plain LoRA; merge it instead")
    return config


def _no_duplicates(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ParaError(f"'{path}' gives {twice!r} twice: remove one")
    return seen


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _is_dict(fits: Callable[[object], bool], value: object) -> bool:
    return value is None or (isinstance(value, dict) and all(map(fits, value.values())))


def _is_names(value: object) -> bool:
    return value is None or isinstance(value, str) or _is_list(value)


def _is_list(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(entry, str) for entry in value))


def _is_layers(value: object) -> bool:
    return value is None or type(value) is int or (isinstance(value, list) and all(type(i) is int for i in value))


_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_rank, "a positive whole number"),
    "lora_alpha": (_is_number, "a number"),
    "rank_pattern": (partial(_is_dict, _is_rank), "a dict of positive whole numbers"),
    "alpha_pattern": (partial(_is_dict, _is_number), "a dict of numbers"),
    "target_modules": (_is_names, "a list of names or a string"),
    "exclude_modules": (_is_names, "a list of names or a string"),
    "layers_pattern": (_is_names, "a list of names or a string"),
    "target_parameters": (_is_list, "a list of names"),
    "modules_to_save": (_is_list, "a list of names"),
    "layers_to_transform": (_is_layers, "a whole number or a list of them"),
}


def _lookups(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """PEFT's rules from name to rank and alpha, as functions of the name: from 0.15 on, 0.14, up to 0.13."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for rank_keys, alpha_keys in (
        (PatternKeys(ranks), PatternKeys(alphas)),
        (PatternKeys(ranks, old=True), PatternKeys(alphas, old=True)),
        (PatternKeys(chain(ranks, alphas), old=True),) * 2,
    ):
        yield {
            "rank": lambda name, keys=rank_keys: ranks.get(keys.find(name), config["r"]),
            "alpha": lambda name, keys=alpha_keys: alphas.get(keys.find(name), config["lora_alpha"]),
        }


# --- tensors ----------------------------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    A: NDArray[Any]
    B: NDArray[Any]
    bias: NDArray[Any] | None
    embedding: bool


def _sort(tensors: Mapping[str, NDArray[Any]], file: Path) -> tuple[dict[str, _Pair], dict[str, NDArray[Any]]]:
    """Pairs by path, and the other tensors by key; an adapter's name in the keys is taken out."""
    parts: dict[str, dict[str, NDArray[Any]]] = defaultdict(dict)
    foreign: dict[str, NDArray[Any]] = {}
    adapters = set()
    for key, tensor in tensors.items():
        if key.startswith(_PREFIX * 2):
            raise ParaError(f"'{file}': key '{key}' has its prefix twice; save the adapter from one PeftModel")
        match = _KEY.fullmatch(key)
        if match is None:
            foreign[key] = tensor
            continue
        adapters.add(match["adapter"] or match["name"])
        part = f"embedding {match['embedding']}" if match["embedding"] else f"{match['which']} {match['leaf']}"
        if parts[match["path"]].setdefault(part, tensor) is not tensor:
            raise ParaError(f"'{file}' holds '{match['path']}' for two adapters: save one of them alone")
    for key in foreign if parts else ():
        if (kind := recognise([key])) != "unknown":
            # Passed through, it would keep its scale under a config that says another.
            raise ParaError(f"'{file}': tensor {key!r} looks like {kind} but is no part of a PEFT LoRA pair; remove it")
    if len(adapters) > 1:
        names = ", ".join(sorted(str(name) for name in adapters))
        raise ParaError(f"'{file}' holds tensors of several adapters ({names}): save one of them alone")
    if adapter := next(iter(adapters), None):
        foreign = {re.sub(rf"\.lora_magnitude_vector\.{re.escape(adapter)}(?=\.|$)", ".lora_magnitude_vector", k): t
                   for k, t in foreign.items()}  # fmt: skip
    return {path: _pair(path, found) for path, found in parts.items()}, foreign


def _pair(path: str, found: dict[str, NDArray[Any]]) -> _Pair:
    embedding = any(part.startswith("embedding") for part in found)
    key_A, key_B = ("embedding A", "embedding B") if embedding else ("A weight", "B weight")
    name = path.removeprefix(_PREFIX)
    for which, key in (("A", key_A), ("B", key_B)):
        if key not in found:
            raise ParaError(f"module '{name}' has no {which} beside its {next(iter(found))}; save the adapter again")
    if strange := found.keys() - {key_A, key_B, "B bias"}:
        raise ParaError(f"module '{name}' also has an unknown {strange.pop()}; save the adapter again")
    A, B, bias = found[key_A], found[key_B], found.get("B bias")
    if A.ndim < 2 or B.ndim < 2 or 0 in A.shape or 0 in B.shape:
        raise ParaError(
            f"module '{name}': A is {list(A.shape)} and B is {list(B.shape)}, which is a sharded or empty tensor; "
            "gather the weights (ZeRO-3, FSDP) and save the adapter again"
        )
    if bias is not None and bias.shape != B.shape[:1]:
        raise ParaError(
            f"module '{name}': its bias is {list(bias.shape)} but B {list(B.shape)}; save the adapter again"
        )
    return _Pair(A, B, bias, embedding)


def _bare_slots(pairs: Mapping[str, _Pair], config: Mapping[str, Any]) -> list[Slot]:
    """Slots without members: what each path is to PEFT."""
    wrapped: dict[str, list[str]] = defaultdict(list)
    for path in sorted(pairs, key=len):
        wrapped[re.sub(r"(\.base_layer)+$", "", path)].append(path)
    targets, slots = Targets(config), []
    for module, paths in wrapped.items():
        name = module.removeprefix(_PREFIX)
        parameters = _parameters(name, config, targets)
        if not parameters and len(paths) == 1 and paths[0] == module:
            inner = ".base_layer." in name
            slots.append(Slot(name.replace(".base_layer.", "."), module, 0, "inner" if inner else "module",
                              pairs[module].embedding, *pairs[module][:3]))  # fmt: skip
            continue
        depths = [path.removeprefix(module).count(".base_layer") for path in paths]
        if len(parameters) != len(paths) or depths != list(range(len(paths))):
            raise ParaError(
                f"module '{name}' has {len(paths)} nested pairs of factors, but target_parameters names "
                f"{len(parameters)} of its parameters; save adapter and config again"
            )
        # The outermost wrapper, depth 0, holds the parameter registered last.
        for depth, (path, parameter) in enumerate(zip(paths, reversed(parameters), strict=True)):
            slots.append(Slot(parameter, module, depth, "parameter", False, *pairs[path][:3]))
    return slots


def _parameters(module: str, config: Mapping[str, Any], targets: Targets) -> list[str]:
    """Paths of the module's parameters that target_parameters names, in the order of their registration."""
    if not config.get("target_parameters") or (targets.known and module in targets):
        return []
    entries = (entry.rpartition(".") for entry in config["target_parameters"])
    leaves = {leaf for owner, _, leaf in entries if not owner or f".{module}".endswith(f".{owner}")}
    order = sorted(leaves, key=lambda leaf: (_REGISTERED.index(leaf) if leaf in _REGISTERED else 0, leaf))
    return [f"{module}.{leaf}" for leaf in order]


def _members(slots: Sequence[Slot], config: Mapping[str, Any]) -> list[Slot]:
    """The slots with their members, by the first of PEFT's rules that agrees with every tensor."""
    refusals = []
    siblings: dict[str, list[Slot]] = defaultdict(list)
    for slot in slots:
        siblings[_owner(slot)].append(slot)
    for lookup in _lookups(config):
        try:
            return [_with_members(slot, siblings[_owner(slot)], config, lookup) for slot in slots]
        except ParaError as e:  # noqa: PERF203 - three rounds at most
            refusals.append(e)
    raise refusals[0]


def _owner(slot: Slot) -> str:
    """The module that PEFT wraps: of all parameters of a module, and of both projections of an attention, the same."""
    return slot.path.removeprefix(_PREFIX).partition(".base_layer.")[0]


def _with_members(slot: Slot, siblings: Sequence[Slot], config: Mapping[str, Any], lookup: Mapping[str, Any]) -> Slot:
    module = _owner(slot)
    owner = slot.name if slot.experts else module
    rank, alpha = lookup["rank"](owner), lookup["alpha"](owner)
    A, B = slot.A, slot.B
    rows, columns, out = A.shape[0], B.shape[1], B.shape[0]
    shapes = f"module '{slot.name}': A is {list(A.shape)}, B is {list(B.shape)}"
    if slot.experts:
        count = rows // rank
        fits, agrees = A.ndim == B.ndim == 2 and rows == columns, rows == count * rank
    else:
        count = rows // columns
        grouped = A.ndim > 2 and count > 0 and out % count == 0
        fits = A.ndim == B.ndim <= 5 and rows == count * columns and (count == 1 or grouped) and set(B.shape[2:]) <= {1}
        agrees = rows == rank
    if not fits:
        raise ParaError(f"{shapes}, which do not fit; save the adapter again")
    if not agrees:
        raise ParaError(f"{shapes}, but {CONFIG} gives it rank {rank}; put the config that belongs to the tensors")

    leaf = slot.name.rpartition(".")[2]
    several = slot.experts and len(siblings) > 1
    unordered = several and any(other.name.rpartition(".")[2] not in _REGISTERED for other in siblings)
    if unordered and len({(lookup["rank"](other.name), lookup["alpha"](other.name)) for other in siblings}) > 1:
        raise ParaError(f"{shapes}, but its parameters have several ranks and the file does not tell which is which; "
                        "train them with one rank")  # fmt: skip
    names = [slot.name]
    if slot.experts and unordered:
        names = [f"{module}.{i}.{slot.depth}" for i in range(count)]
    elif count > 1:
        names = [f"{module}.{i}.{leaf}" if slot.experts else f"{slot.name}.{i}" for i in range(count)]
    group = module if unordered else owner if count > 1 or (len(siblings) > 1 and not several) else None
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    views = zip(names, *_split(slot, count), strict=True)
    return replace(slot, members=tuple(LoraFactors(name, B, A, scale, group) for name, B, A in views))


def _split(slot: Slot, count: int) -> tuple[Sequence[NDArray[Any]], Sequence[NDArray[Any]]]:
    """Views B_i [m, k] and A_i [k, n] of the members."""
    A = _flat(slot.A).reshape(count, -1, slot.A[0].size)
    if slot.experts:
        B = slot.B.reshape(slot.B.shape[0], -1, count)
        return [B[:, :, i] for i in range(count)], list(A)
    return list(_flat(slot.B).reshape(count, -1, slot.B.shape[1])), list(A)


def _flat(x: NDArray[Any]) -> NDArray[Any]:
    """[first, all others]"""
    return x.reshape(len(x), -1)


def _tie(slots: list[Slot], config: Mapping[str, Any]) -> list[Slot]:
    """With ensure_weight_tying, the output layer's factors are the embedding's, transposed: one rank for both."""
    if not config.get("ensure_weight_tying"):
        return slots
    embedding = next((slot for slot in slots if slot.embedding), None)
    tied = [slot for slot in slots if embedding and _transposed(slot, embedding)]
    if embedding and tied:
        together = {slot.name: replace(slot, role="tied", members=_with(slot, group=embedding.name)) for slot in tied}
        together[embedding.name] = replace(embedding, members=_with(embedding, group=embedding.name))
        slots = [together.get(slot.name, slot) for slot in slots]
    return slots


def _transposed(slot: Slot, embedding: Slot) -> bool:
    return np.array_equal(slot.A, embedding.B.T) and np.array_equal(slot.B, embedding.A.T)


def _floor(slots: Sequence[Slot], config: Mapping[str, Any], foreign: Collection[str]) -> list[Slot]:
    """Rank 1 at least where a missing module would not mean ΔW = 0, or would orphan tensors stored under it."""
    holders = {key[: match.start()] for key in foreign for match in re.finditer(r"\.", key)}
    held = {
        _unit(slot)
        for slot in slots
        if config.get("use_dora")
        or slot.role == "tied"
        or slot.path in holders
        or (slot.bias is not None and slot.bias.any())
    }
    return [replace(slot, members=_with(slot, min_rank=1)) if _unit(slot) in held else slot for slot in slots]


def _with(slot: Slot, **changes: Any) -> tuple[LoraFactors, ...]:
    return tuple(replace(f, **changes) for f in slot.members)


def _unit(slot: Slot) -> str:
    """What shares one rank: the group, or the module alone."""
    return slot.members[0].group or slot.name


def _natural(slot: Slot) -> list[int | str]:
    return natural_key(slot.members[0].name)


def _zeros(f: LoraFactors) -> LoraFactors:
    B, A = as_numpy(f.B), as_numpy(f.A)
    return replace(f, B=np.zeros((f.m, 1), B.dtype), A=np.zeros((1, f.n), A.dtype), scale=1.0)


def _code(key: str, x: Array) -> str:
    code = code_of(x)
    if code not in NUMPY:
        raise ParaError(f"tensor '{key}' has dtype {dtype_name(x.dtype)}, which cannot be written: convert it first")
    return str(code)


def _check_file(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(len(_LFS))
    if not start:
        raise ParaError(f"'{path}' is empty: download or save it again")
    if start == _LFS:
        raise ParaError(f"'{path}' is a Git LFS pointer, not the file itself: run 'git lfs pull'")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _line(e: Exception) -> str:
    return str(e).splitlines()[0][:160] if str(e) else type(e).__name__
