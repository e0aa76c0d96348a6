"""PEFT adapter folders: adapter_config.json with adapter_model.safetensors (or .bin), read without importing PEFT.

Tensors are memory-mapped numpy arrays, so that nothing but pickles needs PyTorch; the factors are 2-D views of them.
Experts are ``target_parameters``; several parameters of one module are nested, ``<module>.base_layer.lora_A`` inside
``<module>.lora_A``, in the order in which the model registers them.
"""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from .. import layout
from ..errors import ParaError
from ..factors import LoraFactors, fold_bias, written_code
from ..naming import natural_key
from .adapter import Adapter, Filled, Slot
from .output import CONFIG, PICKLED, WEIGHTS, write_json, write_safetensors
from .peft_config import PatternKeys, Targets, oldest_peft, unit_scale_config
from .tensors import read_json, read_tensors, recognise, writable_code

PREFIX = "base_model.model."
_KEY = re.compile(
    r"(?P<path>.+)\.lora_(?:(?P<which>[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<leaf>weight|bias)"
    r"|embedding_(?P<embedding>[AB])(?:\.(?P<name>[^.]+))?)",
    re.DOTALL,
)

# The order in which models register the parameters of their experts; PEFT nests the wrappers in that order.
_REGISTERED = ("gate_up_proj", "down_proj")

_EXPERT = re.compile(r"\.experts\.\d+\.(w[123]|(gate|up|down)_proj)$")

_UNCONVERTED = ("pissa", "olora", "corda", "lora_ga")
_NOT_PLAIN = {
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron's parallel layers",
}
Role = Literal["module", "parameter", "inner", "tied"]


@dataclass(frozen=True, eq=False, kw_only=True)
class PeftSlot(Slot):
    """Where PEFT keeps an adapted module; its name is what the config calls it.

    Attributes:
        path: what its keys start with in the file, without ``base_layer`` of wrappers around it.
        depth: how many wrappers of other parameters lie around it.
        role: ``inner`` is the output projection of a MultiheadAttention, which follows the rank of its module;
            ``tied`` is adapted by ensure_weight_tying; neither is looked up in target_modules.
    """

    path: str
    depth: int = 0
    role: Role = "module"

    def keys(self, depth: int) -> tuple[str, str, str]:
        """Keys of A, B and the bias with this many wrappers around."""
        path = self.path + ".base_layer" * depth
        if self.embedding:
            return f"{path}.lora_embedding_A", f"{path}.lora_embedding_B", ""
        return f"{path}.lora_A.weight", f"{path}.lora_B.weight", f"{path}.lora_B.bias"


@dataclass(frozen=True, eq=False, kw_only=True)
class PeftAdapter(Adapter[PeftSlot]):
    """A LoRA adapter as PEFT saves it.

    Attributes:
        config: adapter_config.json.
    """

    tensor_file: str = WEIGHTS
    config: Mapping[str, Any]

    def header(self, metadata: str) -> dict[str, str]:
        """Metadata of the written header: the source's, and the JSON text ``metadata`` under ``para_ext``."""
        return {**self.metadata, "format": "pt", "para_ext": metadata}

    def layout(self, code: str | None = None, metadata: str = "") -> layout.FileLayout:
        """See :meth:`Adapter.layout`.

        It is exact but for two cases: all ranks 0, where one pair of zeros is written, and a parameter that is kept
        inside one that is dropped, whose two keys lose 11 bytes each.
        """
        slots = [layout.Slot(key, writable_code(key, t), t.shape) for key, t in self.foreign.items()]
        for slot in self.slots:
            module = slot.members[0].name
            key_A, key_B, key_bias = slot.keys(slot.depth)
            rows, columns = slot.units
            shape_A, shape_B = (rows, *slot.A.shape[1:]), (slot.B.shape[0], columns, *slot.B.shape[2:])
            new = written_code(slot.A, slot.B, code)
            slots.append(layout.Slot(key_A, new, shape_A, 0, module))
            slots.append(layout.Slot(key_B, new, shape_B, 1, module))
            if slot.bias is not None:
                own = code or writable_code(key_bias, slot.bias)
                slots.append(layout.Slot(key_bias, own, slot.bias.shape, None, module))
        return layout.FileLayout(tuple(slots), self.header(metadata))

    def tensors(self, factors: Mapping[str, LoraFactors], code: str | None = None) -> dict[str, NDArray[Any]]:
        """The tensors of the new file by key, contiguous and unshared; if no component is kept, one pair of zeros.

        Args:
            factors, code: see :meth:`Adapter.fill`.
        """
        kept = self.pairs(factors)
        tensors: dict[str, NDArray[Any]] = {}
        for slot, A, B in kept:
            around = (other for other, _, _ in kept if other.path == slot.path and other.depth < slot.depth)
            depth = sum(1 for _ in around) if slot.depth else 0
            key_A, key_B, key_bias = slot.keys(depth)
            tensors |= {key_A: A, key_B: B}
            if slot.bias is not None:
                new = code or writable_code(key_bias, slot.bias)
                tensors[key_bias] = fold_bias(slot.name, slot.bias, slot.members[0].scale, new)
        # Not ascontiguousarray, which makes an array of what has no dimension.
        return tensors | {key: np.asarray(array, order="C") for key, array in self.foreign.items()}

    def new_config(self, ranks: Mapping[str, int], *, others: Collection[str] = ()) -> dict[str, Any]:
        """adapter_config.json for new ranks (of ``factors``, by name; a missing one is 0), at unit scale.

        Args:
            others: module names of the base model, as far as they are known.
        """
        of_slots = list(zip(self.slots, self.ranks(ranks), strict=True))
        return unit_scale_config(
            self.config,
            {slot.name: slot.rank(rank) for slot, rank in of_slots if slot.role != "inner"},
            default=next((slot.rank(rank) for slot, rank in of_slots if _EXPERT.search(slot.name)), None),
            others=others,
            parameters=[slot.name for slot in self.slots if slot.role == "parameter"],
            tied=[slot.name for slot in self.slots if slot.role == "tied"],
        )

    def fill(self, folder: Path, factors: Mapping[str, LoraFactors], *, metadata: str, code: str | None) -> Filled:
        """See :meth:`Adapter.fill`."""
        tensors = self.tensors(factors, code)
        config = self.new_config({name: f.rank for name, f in factors.items()})
        write_safetensors(folder / WEIGHTS, tensors, self.header(metadata))
        write_json(folder / CONFIG, config)
        oldest = oldest_peft(config)
        return Filled([f"The ranks are written as patterns that need PEFT ≥ {oldest}."] if oldest else [])


def read_peft(path: Path, weights: Path | None = None) -> PeftAdapter:
    """Read an adapter folder; safetensors is preferred where a .bin lies beside it, as PEFT does.

    Args:
        weights: its tensor file, if that has another name than PEFT gives it.

    Raises:
        ParaError: what is wrong with it, and what to do.
    """
    weights = weights or next((path / name for name in (WEIGHTS, PICKLED) if (path / name).is_file()), None)
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
    slots = sorted(_floor(_share(slots), config, foreign), key=_natural)
    return PeftAdapter(
        path=path, weights=weights, config=config, slots=tuple(slots), foreign=foreign, metadata=metadata
    )


# --- config -----------------------------------------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ParaError(f"'{path}' says peft_type {config.get('peft_type')!r}, but only LORA can be compressed")
    return checked_config(str(path), config)


def checked_config(where: str, config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a LoraConfig, if they are well-formed and describe plain LoRA.

    Args:
        where: what they were read from.

    Raises:
        ParaError: they are not, or belong to a variant whose ΔW is not scale·B·A.
    """
    for key, (fits, wanted) in _FIELDS.items():
        if key in config and not fits(config[key]):
            raise ParaError(f"'{where}': {key} is {config[key]!r:.80}, but must be {wanted}: correct it")
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise ParaError(f"'{where}' has no {key}, so the scale is unknown: add it")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_UNCONVERTED):
        raise ParaError(
            f"'{where}': the adapter was initialised by {init}, which also changed the base weights; convert it first, "
            "by model.save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if init == "loftq" or config.get("loftq_config"):
        raise ParaError(
            f"'{where}': the adapter was initialised by LoftQ, which changed the base weights too; merge it"
        )
    for key, name in _NOT_PLAIN.items():
        if config.get(key):
            raise ParaError(f"'{where}': the adapter uses {name}, which is not plain LoRA; merge it instead")
    return config


def scale_of(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha/r, or alpha/√r with rsLoRA, of a module by the first of PEFT's rules that gives it its rank.

    Raises:
        ParaError: none does.
    """
    for lookup in _lookups(config):
        if lookup["rank"](name) == rank:
            return float(lookup["alpha"](name) / (math.sqrt(rank) if config.get("use_rslora") else rank))
    raise ParaError(
        f"module '{name}' has rank {rank}, but the file's settings give it another; put those of its tensors"
    )


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of JSON is a number that a float holds."""
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
    "lora_alpha": (is_number, "a number"),
    "rank_pattern": (partial(_is_dict, _is_rank), "a dict of positive whole numbers"),
    "alpha_pattern": (partial(_is_dict, is_number), "a dict of numbers"),
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
        if key.startswith(PREFIX * 2):
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
    name = path.removeprefix(PREFIX)
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


def _bare_slots(pairs: Mapping[str, _Pair], config: Mapping[str, Any]) -> list[PeftSlot]:
    """Slots without members: what each path is to PEFT."""
    wrapped: dict[str, list[str]] = defaultdict(list)
    for path in sorted(pairs, key=len):
        wrapped[re.sub(r"(\.base_layer)+$", "", path)].append(path)
    targets, slots = Targets(config), []
    for module, paths in wrapped.items():
        name = module.removeprefix(PREFIX)
        parameters = _parameters(name, config, targets, len(paths))
        if not parameters and len(paths) == 1 and paths[0] == module:
            inner = ".base_layer." in name
            role: Role = "inner" if inner else "module"
            slots.append(
                PeftSlot(name=name.replace(".base_layer.", "."), path=module, role=role, **pairs[module]._asdict())
            )
            continue
        depths = [path.removeprefix(module).count(".base_layer") for path in paths]
        if len(parameters) != len(paths) or depths != list(range(len(paths))):
            raise ParaError(
                f"module '{name}' has {len(paths)} nested pairs of factors, but target_parameters names "
                f"{len(parameters)} of its parameters; save adapter and config again"
            )
        # The outermost wrapper, depth 0, holds the parameter registered last.
        for depth, (path, parameter) in enumerate(zip(paths, reversed(parameters), strict=True)):
            pair = pairs[path]._asdict()
            slots.append(PeftSlot(name=parameter, path=module, depth=depth, role="parameter", experts=True, **pair))
    return slots


def _parameters(module: str, config: Mapping[str, Any], targets: Targets, count: int) -> list[str]:
    """Paths of the module's parameters that target_parameters names, in the order of their registration.

    A name alone may be of any module, and the file does not tell which ones have such a parameter: where ``count`` are
    adapted, and as many are named together with the module, it is these.
    """
    if not config.get("target_parameters") or (targets.known and module in targets):
        return []
    entries = [entry.rpartition(".") for entry in config["target_parameters"]]
    leaves = {leaf for owner, _, leaf in entries if owner and f".{module}".endswith(f".{owner}")}
    if len(leaves) != count:
        leaves |= {leaf for owner, _, leaf in entries if not owner}
    order = sorted(leaves, key=lambda leaf: (_REGISTERED.index(leaf) if leaf in _REGISTERED else 0, leaf))
    return [f"{module}.{leaf}" for leaf in order]


def _members(slots: Sequence[PeftSlot], config: Mapping[str, Any]) -> list[PeftSlot]:
    """The slots with their members, by the first of PEFT's rules that agrees with every tensor."""
    refusals = []
    siblings: dict[str, list[PeftSlot]] = defaultdict(list)
    for slot in slots:
        siblings[_owner(slot)].append(slot)
    for lookup in _lookups(config):
        try:
            return [_with_members(slot, siblings[_owner(slot)], config, lookup) for slot in slots]
        except ParaError as e:  # noqa: PERF203 - three rounds at most
            refusals.append(e)
    raise refusals[0]


def _owner(slot: PeftSlot) -> str:
    """The module that PEFT wraps: of all parameters of a module, and of both projections of an attention, the same."""
    return slot.path.removeprefix(PREFIX).partition(".base_layer.")[0]


def _with_members(
    slot: PeftSlot, siblings: Sequence[PeftSlot], config: Mapping[str, Any], lookup: Mapping[str, Any]
) -> PeftSlot:
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
    views = zip(names, *slot.split(count), strict=True)
    return replace(slot, members=tuple(LoraFactors(name, B, A, scale, group) for name, B, A in views))


def _tie(slots: list[PeftSlot], config: Mapping[str, Any]) -> list[PeftSlot]:
    """With ensure_weight_tying, the output layer's factors are the embedding's, transposed: one rank for both."""
    if not config.get("ensure_weight_tying"):
        return slots
    embedding = next((slot for slot in slots if slot.embedding), None)
    tied = [slot for slot in slots if embedding and _transposed(slot, embedding)]
    if embedding and tied:
        together = {slot.name: replace(slot, role="tied", members=slot.changed(group=embedding.name)) for slot in tied}
        together[embedding.name] = replace(embedding, members=embedding.changed(group=embedding.name))
        slots = [together.get(slot.name, slot) for slot in slots]
    return slots


def _share(slots: Sequence[PeftSlot]) -> list[PeftSlot]:
    """One rank, 1 at least, for the experts of a mixture that are adapted one by one.

    Their weights are one parameter in newer models, and readers stack the factors: transformers 5 takes the rank from
    ``r``, vLLM wants every expert there.
    """
    return [
        replace(slot, members=slot.changed(group="experts", min_rank=1)) if _EXPERT.search(slot.name) else slot
        for slot in slots
    ]


def _transposed(slot: PeftSlot, embedding: PeftSlot) -> bool:
    return np.array_equal(slot.A, embedding.B.T) and np.array_equal(slot.B, embedding.A.T)


def _floor(slots: Sequence[PeftSlot], config: Mapping[str, Any], foreign: Collection[str]) -> list[PeftSlot]:
    """Rank 1 at least where a missing module would not mean ΔW = 0, or would orphan tensors stored under it."""
    holders = {key[: match.start()] for key in foreign for match in re.finditer(r"\.", key)}
    held = {
        slot.unit
        for slot in slots
        if config.get("use_dora")
        or slot.role == "tied"
        or slot.path in holders
        or (slot.bias is not None and slot.bias.any())
    }
    return [replace(slot, members=slot.changed(min_rank=1)) if slot.unit in held else slot for slot in slots]


def _natural(slot: PeftSlot) -> list[int | str]:
    return natural_key(slot.members[0].name)
