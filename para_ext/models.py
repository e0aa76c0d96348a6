"""Live models: the LoRA factors of an nn.Module as LoraFactors, and new factors put in their place, all or nothing.

Read are PEFT's LoRA layers (any base layer, quantized or not; only factors are touched) and modules that hold
``lora_A`` and ``lora_B`` as parameters, as loralib's do. Both are recognised by what they hold, so neither package
is imported. A `_Site` says where one layer keeps its pair of factors; a site of several blocks (experts of one MoE
parameter, groups of a grouped convolution) is read as that many LoraFactors of one group.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .arrays import as_numpy, as_tensor, code_of, holds_data
from .errors import ParaError
from .factors import LoraFactors, fold_bias
from .formats.peft_config import unit_scale_config

# Inits that leave the base weight alone; all others are repeated on the base when a saved adapter is loaded.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal")
# Variants that change how B @ A is applied, not what it is.
_KNOWN_VARIANTS = ("Dora", "ALora")
# What of a written config describes the file and not the live model.
_FILE_ONLY = ("inference_mode",)


@dataclass(frozen=True, eq=False)
class _Slot:
    """Where one factor lives: parameter ``key`` of ``owner``, whose attribute ``size`` (if any) is its rank."""

    owner: nn.Module
    key: str
    size: str | None = None

    @property
    def parameter(self) -> Tensor:
        return self.owner._parameters[self.key]  # type: ignore[return-value]

    def put(self, parameter: nn.Parameter, rank: int) -> None:
        setattr(self.owner, self.key, parameter)
        if self.size is not None:
            setattr(self.owner, self.size, rank)


@dataclass(frozen=True, eq=False)
class _Host:
    """A model that PEFT injected adapters into: its place in the whole model and its adapters' configs."""

    path: str
    model: nn.Module
    configs: dict[str, Any]

    def inside(self, path: str) -> str:
        """The name that PEFT knows the module at ``path`` by."""
        return _plain(path[len(self.path) + 1 :] if self.path else path)

    def outside(self, name: str) -> str:
        """The name in the whole model of what is ``name`` in here: PEFT's own wrappers are left out."""
        around = _plain(self.path.removesuffix("base_model.model").removesuffix("."))
        return f"{around}.{name}" if around else name


@dataclass(frozen=True, eq=False)
class _Site:
    """One layer's pair of factors.

    Attributes:
        name: of the layer in the model, without what wraps it.
        adapter: of a PEFT layer; empty for a module that holds its factors itself.
        key: the name its rank has in the adapter's config; empty where another site's rank holds for it.
        A: [blocks·r, ...] and B: [blocks·m, r, ...], or [m, r·blocks] where columns are ``interleaved`` (r, blocks).
        nominal: the scale that rank and alpha give; what the layer's scaling has beyond it is the user's multiplier.
        per_rank: the layer's own count of ranks for one component of every block.
    """

    name: str
    layer: Any
    A: _Slot
    B: _Slot
    nominal: float
    adapter: str = ""
    key: str = ""
    host: _Host | None = None
    group: str | None = None
    min_rank: int = 0
    blocks: int = 1
    per_rank: int = 1
    interleaved: bool = False

    def factors(self) -> Iterator[LoraFactors]:
        """The live tensors as pairs of B [m, r] and A [r, n], one for each block, nothing copied."""
        A, B = self.A.parameter.detach().flatten(1), self.B.parameter.detach().flatten(1)
        A_blocks = A.chunk(self.blocks)
        B_blocks = [B[:, i :: self.blocks] for i in range(self.blocks)] if self.interleaved else B.chunk(self.blocks)
        for i, (B_i, A_i) in enumerate(zip(B_blocks, A_blocks, strict=True)):
            group = self.group if self.blocks == 1 else self.group or self.name
            yield LoraFactors(self.member(i), B_i, A_i, self.nominal, group, self.min_rank)

    def member(self, i: int) -> str:
        """The name of block i: ``experts.3.down_proj`` for an expert, ``conv.3`` for a group of a convolution."""
        if self.blocks == 1:
            return self.name
        module, _, leaf = self.name.rpartition(".")
        return f"{module}.{i}.{leaf}" if self.interleaved else f"{self.name}.{i}"

    def parameters(self) -> Iterator[Tensor | None]:
        for slot in (self.A, self.B):
            yield slot.parameter if not self.adapter or self.adapter in self.layer.scaling else None

    @property
    def slots(self) -> tuple[_Slot, ...]:
        """Of B, A, and the bias that PEFT's lora_B may have, which the layer scales too."""
        biased = self.B.size is not None and getattr(self.B.owner, "bias", None) is not None
        return (self.B, self.A, *((_Slot(self.B.owner, "bias"),) if biased else ()))

    def held(self) -> tuple[Tensor, ...]:
        """What is in the slots."""
        return tuple(slot.parameter for slot in self.slots)

    def join(self, new: Sequence[LoraFactors]) -> tuple[Tensor, Tensor]:
        """The inverse of `factors`: new tensors of the layer's own shapes, with storage of their own."""
        A, B = self.A.parameter, self.B.parameter
        A_new, B_all = torch.cat([as_tensor(f.A) for f in new]), [as_tensor(f.B) for f in new]
        B_new = torch.stack(B_all, dim=2).flatten(1) if self.interleaved else torch.cat(B_all)
        return A_new.reshape(-1, *A.shape[1:]).to(A.device), B_new.reshape(len(B), -1, *B.shape[2:]).to(B.device)

    def dicts(self) -> Iterator[dict[str, Any]]:
        """Every dict that rewriting this site can change; an empty one stays empty, for no key is ever added."""
        containers = (c for c in self.layer.children() if isinstance(c, nn.ModuleDict | nn.ParameterDict))
        for module in (self.layer, *containers, self.A.owner, self.B.owner):
            yield vars(module)
            yield from (value for value in vars(module).values() if isinstance(value, dict) and value)
        if self.adapter in getattr(self.layer, "lora_magnitude_vector", ()):
            yield getattr(self.layer.lora_magnitude_vector[self.adapter], "_dora_cache", {})

    def put(self, new: Sequence[nn.Parameter] | None, rank: int) -> None:
        """Make these the layer's factors, of this rank; None: take the adapter out."""
        if new is None:
            self.drop()
            return
        for slot, parameter in zip(self.slots, new, strict=True):
            slot.put(parameter, rank * self.blocks)
        self.rescale(rank)

    def rescale(self, rank: int) -> None:
        """Make ``rank`` the layer's rank and alpha, and leave of its scaling the user's multiplier."""
        layer, ranks = self.layer, rank * self.per_rank
        if not self.adapter:
            layer.r, layer.scaling = ranks, 1.0
            if hasattr(layer, "lora_alpha"):
                layer.lora_alpha = ranks
            return
        layer.r[self.adapter] = layer.lora_alpha[self.adapter] = ranks
        if self.nominal:
            layer.scaling[self.adapter] = layer.scaling[self.adapter] / self.nominal
        else:
            layer.scaling[self.adapter] = 1.0
        if self.adapter in getattr(layer, "use_rslora", ()):
            layer.use_rslora[self.adapter] = False
        if self.adapter in layer.lora_magnitude_vector:
            getattr(layer.lora_magnitude_vector[self.adapter], "_dora_cache", {}).clear()

    def drop(self) -> None:
        """Take the adapter out of the layer; its other adapters, and which of them is active, stay as they are."""
        names = (*self.layer.adapter_layer_names, *self.layer.other_param_names, "lora_variant")
        for entries in (getattr(self.layer, name, None) for name in names):
            if isinstance(entries, dict | nn.ModuleDict | nn.ParameterDict) and self.adapter in entries:
                del entries[self.adapter]


@dataclass(frozen=True, eq=False)
class Exchange:
    """The parameters of one layer before and after.

    Attributes:
        old, new: B [m, r] and A [r, n], of more dimensions where the layer has them so, and the bias of PEFT's lora_B
            where it has one; ``new`` is None where the layer lost the adapter.
        scale: what the old B·A was multiplied by and the new one is not.
        blocks: how many pairs of matrices B and A hold.
    """

    old: tuple[Tensor, ...]
    new: tuple[nn.Parameter, ...] | None
    scale: float
    blocks: int


Contents = tuple[dict[Any, Any], Mapping[Any, Any]]
"""A dict, and what it is to hold."""


@dataclass(frozen=True, eq=False)
class _Pair:
    """The sites that hold one and the same pair of factors; ``transposed`` ones hold A as Bᵀ and B as Aᵀ."""

    sites: list[_Site]
    transposed: list[_Site]

    @property
    def first(self) -> _Site:
        return self.sites[0]

    @property
    def all(self) -> list[_Site]:
        return self.sites + self.transposed


class LiveAdapter:
    """One adapter of a live model.

    Attributes:
        adapter_name: None where the model's LoRA modules have no adapter names.
        factors: the live tensors, detached, as 2-D views; modules that share their factors are given once.
    """

    def __init__(self, adapter_name: str | None, pairs: Sequence[_Pair]) -> None:
        self.adapter_name = adapter_name
        self._pairs = tuple(pairs)
        self._parameters = self._live()
        self.factors = tuple(f for pair in self._pairs for f in pair.first.factors())

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """B, A and biases of every layer, as they are in the model."""
        return tuple(p for site in self._sites for p in site.held())

    def replace(
        self, new: Sequence[LoraFactors], along: Callable[[Sequence[Exchange]], Iterable[Contents]] | None = None
    ) -> None:
        """Put new factors in the place of ``factors``, all or nothing, and update the adapter's config.

        A module of rank 0 loses this adapter. It keeps a zero pair of rank 1 where it could not do without: in a
        module that holds its factors itself, around another adapted parameter of the same module (PEFT nests their
        wrappers, and the names of their tensors tell the depth), and in the first module if all are dropped.
        Parameters are new; requires_grad, device, training mode and the user's own multiplier of the scale stay. To
        change the model again, read it again.

        Args:
            new: as ``factors``: the same names in the same order, B [m, k], A [k, n], scale 1, k ≥ min_rank, one k
                for a group.
            along: told what every layer's parameters will be, it gives the dicts outside the model that must change
                with it, as an optimizer's.

        Raises:
            ParaError: ``new`` is not of this form, or no config can say what was kept. As on any error, an interrupt
                too, nothing has changed then.
        """
        self._check(new)
        rest = iter(new)
        parts = [[next(rest) for _ in range(pair.first.blocks)] for pair in self._pairs]
        kept = _needs_a_pair(self._pairs, [part[0].rank for part in parts])
        parts = [[_zero(f) for f in part] if i in kept else part for i, part in enumerate(parts)]
        ranks = [part[0].rank for part in parts]
        with torch.no_grad(), torch.inference_mode(False):  # what goes on training must be made outside of it
            exchanges = [e for pair, part in zip(self._pairs, parts, strict=True) for e in _exchanges(pair, part)]
            contents = list(along(exchanges)) if along else []
        contents += _new_configs(self._pairs, ranks)
        rank_of_site = [rank for pair, rank in zip(self._pairs, ranks, strict=True) for _ in pair.all]

        dicts = [*(d for site in self._sites for d in site.dicts()), *(d for d, _ in contents)]
        before = [(d, dict(d)) for d in dicts]
        try:  # no context manager: an interrupt between the body and its exit would leave undoing to the collector
            for site, exchange, rank in zip(self._sites, exchanges, rank_of_site, strict=True):
                site.put(exchange.new, rank)
            _fill(contents)
        except BaseException:
            _fill(before)
            raise

    @property
    def _sites(self) -> list[_Site]:
        return [site for pair in self._pairs for site in pair.all]

    def _live(self) -> list[Tensor | None]:
        """The parameters now in the sites' places; None where the adapter was taken out."""
        return [p for site in self._sites for p in site.parameters()]

    def _check(self, new: Sequence[LoraFactors]) -> None:
        if any(a is not b for a, b in zip(self._live(), self._parameters, strict=True)):
            raise ParaError("the model's factors were replaced after they were read: call read_model again")
        if [f.name for f in new] != [f.name for f in self.factors]:
            raise ParaError("the new factors are not those of this adapter's modules: give one pair for each, in order")
        ranks: dict[str, int] = {}
        for f, old in zip(new, self.factors, strict=True):
            shape = (tuple(f.B.shape), tuple(f.A.shape))
            if shape != ((old.m, f.rank), (f.rank, old.n)) or f.scale != 1:
                raise ParaError(
                    f"module '{f.name}': new factors of shapes {shape[0]} and {shape[1]} at scale {f.scale} do not "
                    f"fit; give B [{old.m}, k] and A [k, {old.n}] at scale 1"
                )
            if f.rank < old.min_rank:
                raise ParaError(f"module '{f.name}' needs a rank of {old.min_rank} or more, not {f.rank}: set min_rank")
            if ranks.setdefault(old.group or old.name, f.rank) != f.rank:
                raise ParaError(f"module '{f.name}': group '{old.group}' needs one rank in all its modules: give one")


def read_model(model: nn.Module, adapter_name: str | None = None) -> LiveAdapter:
    """Find the LoRA factors of a model: PEFT's layers, or modules that hold ``lora_A`` and ``lora_B`` themselves.

    Args:
        model: a PeftModel, a model that PEFT layers were injected into, or any module around such.
        adapter_name: None for the active adapter.

    Raises:
        ParaError: there is no such adapter, several are active, it is merged, it is not plain LoRA or DoRA, or its
            factors are not whole in memory.
    """
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if any(c.__name__ in ("DistributedDataParallel", "FullyShardedDataParallel") for c in type(module).__mro__):
            raise ParaError(
                f"'{path or 'model'}' is a {type(module).__name__}: compress the model before it is wrapped"
            )
    hosts = _hosts(modules)
    tuners = {path: module for path, module in modules.items() if hasattr(module, "merged_adapters")}
    if tuners or hosts:
        adapter_name = _choose(adapter_name, tuners, hosts)
        sites = [site for path in tuners if (site := _peft_site(path, modules, adapter_name, _host_of(path, hosts)))]
    else:
        sites = [site for path, module in modules.items() if (site := _own_site(path, module))]
    if not sites:
        whose = f"adapter '{adapter_name}'" if adapter_name else "the model"
        raise ParaError(f"{whose} has no LoRA layers: give a model with a LoRA adapter")
    if adapter_name and not tuners and not hosts:
        raise ParaError(f"there is no adapter '{adapter_name}': this model's LoRA modules have no names, leave it out")
    return LiveAdapter(adapter_name, _pair_up(sites))


def _hosts(modules: Mapping[str, nn.Module]) -> list[_Host]:
    """The models with a ``peft_config``; PEFT's wrappers hold the same dict as the model inside, which comes last."""
    found: dict[int, _Host] = {}
    for path, module in modules.items():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict):
            found[id(configs)] = _Host(path, module, configs)
    return list(found.values())


def _host_of(path: str, hosts: Iterable[_Host]) -> _Host | None:
    around = [host for host in hosts if not host.path or f"{path}.".startswith(f"{host.path}.")]
    return max(around, key=lambda host: len(host.path), default=None)


def _choose(adapter_name: str | None, tuners: Mapping[str, Any], hosts: Sequence[_Host]) -> str:
    """The adapter that is meant; refused unless every config of that name is of a LoRA that can be rewritten."""
    present = list(dict.fromkeys(name for host in hosts for name in host.configs))
    if not present:
        present = list(dict.fromkeys(name for layer in tuners.values() for name in getattr(layer, "scaling", ())))
    if adapter_name is None:
        active = list(dict.fromkeys(name for layer in tuners.values() for name in layer.active_adapters)) or present
        if len(active) != 1:
            state = f"the active adapters are {_quoted(active)}" if active else "no adapter is active"
            raise ParaError(f"{state}: choose one with adapter_name")
        adapter_name = active[0]
    if adapter_name not in present:
        raise ParaError(f"there is no adapter '{adapter_name}' in the model: it has {_quoted(present) or 'none'}")
    for config in (host.configs[adapter_name] for host in hosts if adapter_name in host.configs):
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA":
            raise ParaError(f"adapter '{adapter_name}' is of type {kind}, which is not LoRA: give a LoRA adapter")
        init = getattr(config, "init_lora_weights", True)
        if init and init is not True and str(init).lower() not in _PLAIN_INITS:
            raise ParaError(
                f"adapter '{adapter_name}' was initialized with '{init}', which changes the base model whenever the "
                "adapter is loaded: save it with path_initial_model_for_weight_conversion=..., and load that"
            )
    return adapter_name


def _peft_site(path: str, modules: Mapping[str, Any], adapter: str, host: _Host | None) -> _Site | None:
    layer = modules[path]
    inside = host.inside(path) if host else _plain(path)
    name = host.outside(inside) if host else inside
    if adapter not in getattr(layer, "lora_A", ()) and adapter not in getattr(layer, "lora_embedding_A", ()):
        return None
    variant = type(getattr(layer, "lora_variant", {}).get(adapter)).__name__
    if not variant.startswith((*_KNOWN_VARIANTS, "NoneType")):
        kind = variant.removesuffix("Variant")
        raise ParaError(f"module '{name}' is adapted by {kind}, whose update is not scale · B · A: leave it out")
    if adapter in layer.merged_adapters:
        raise ParaError(f"adapter '{adapter}' is merged into module '{name}': call model.unmerge_adapter() first")
    if getattr(layer, "_tp_info", None) is not None:
        raise ParaError(f"module '{name}' is sharded by tensor parallelism: load the model without it")
    A, B = _peft_slots(layer, adapter, name)
    _refuse_absent(name, A, B)

    config = host.configs.get(adapter) if host else None
    rslora = getattr(layer, "use_rslora", {}).get(adapter, getattr(config, "use_rslora", False))
    alpha, rank = layer.lora_alpha[adapter], layer.r[adapter]
    nominal = alpha / (math.sqrt(rank) if rslora else rank) or float(layer.scaling[adapter])
    if config is None:
        host, inside = None, ""
    site = _Site(name, layer, A, B, nominal, adapter, inside, host)

    base = layer.get_base_layer()
    attention, _, projection = path.rpartition(".base_layer.")
    if hasattr(layer, "parameter_name"):
        inside, name = (place and f"{place}.{layer.parameter_name}" for place in (inside, name))
        site = replace(site, name=name, key=inside, blocks=layer.num_experts, interleaved=layer.num_experts > 1)
    elif isinstance(base, nn.MultiheadAttention):
        site = replace(site, group=name)
    elif projection == "out_proj" and isinstance(modules[attention].get_base_layer(), nn.MultiheadAttention):
        # PEFT gives both projections of an attention one rank, looked up under the attention's name.
        site = replace(site, key="", group=name.removesuffix(".out_proj"))
    elif isinstance(B.owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        site = replace(site, blocks=B.owner.groups, per_rank=B.owner.groups)

    tied = _tied(config)
    if site.key in tied or (tied and isinstance(base, nn.Embedding)):
        # PEFT ties them when the adapter is loaded, so neither can be absent, or of another rank, alone.
        site = replace(site, group="tied embeddings", min_rank=1)
    bias = getattr(B.owner, "bias", None) if B.size else None
    biased = bias is not None and bool(bias.any())
    trained_bias = getattr(config, "bias", "none") != "none" and getattr(base, "bias", None) is not None
    if adapter in layer.lora_magnitude_vector or biased or trained_bias:
        site = replace(site, min_rank=1)
    return site


def _peft_slots(layer: Any, adapter: str, name: str) -> tuple[_Slot, _Slot]:
    if adapter in layer.lora_embedding_A:
        return _Slot(layer.lora_embedding_A, adapter), _Slot(layer.lora_embedding_B, adapter)
    slots = []
    for factor, linear, conv in (("lora_A", "out_features", "out_channels"), ("lora_B", "in_features", "in_channels")):
        module = getattr(layer, factor)[adapter]
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or "weight" not in module._parameters:
            raise ParaError(
                f"module '{name}': its {factor} is a {type(module).__name__} without a weight of its own: "
                "make it a plain linear or convolution layer"
            )
        slots.append(_Slot(module, "weight", linear if isinstance(module, nn.Linear) else conv))
    return slots[0], slots[1]


def _own_site(path: str, module: Any) -> _Site | None:
    """A module with ``lora_A`` [r, n] and ``lora_B`` [m, r] of its own; [g·r, n] and [g·m, r] with g parts enabled."""
    if "lora_A" not in module._parameters or "lora_B" not in module._parameters:
        return None
    name, rank, scaling = _plain(path), getattr(module, "r", None), getattr(module, "scaling", None)
    blocks = sum(getattr(module, "enable_lora", (True,)))
    A, B = module.lora_A, module.lora_B
    fits = A.ndim == B.ndim == 2 and isinstance(rank, int) and (len(A), B.shape[1]) == (rank * blocks, rank)
    if not fits or not isinstance(scaling, int | float):
        raise ParaError(
            f"module '{name}': a {type(module).__name__} with lora_A {list(A.shape)}, lora_B {list(B.shape)}, r {rank} "
            f"and scaling {scaling} is of no known kind: replace it by a PEFT layer"
        )
    if getattr(module, "merged", False):
        raise ParaError(f"module '{name}' has its factors merged into its weight: call model.train() first")
    slots = _Slot(module, "lora_A"), _Slot(module, "lora_B")
    _refuse_absent(name, *slots)
    return _Site(name, module, *slots, float(scaling), blocks=blocks)


def _refuse_absent(name: str, *slots: _Slot) -> None:
    for t in (slot.parameter for slot in slots):
        if hasattr(t, "ds_id"):
            remedy = "are partitioned by DeepSpeed ZeRO-3: load the adapter without ZeRO-3"
        elif hasattr(t, "full_tensor") or hasattr(t, "_fsdp_flattened"):
            remedy = "are sharded (FSDP or DTensor): load the model unsharded, compress, and shard then"
        elif not holds_data(t):
            remedy = "hold no data (meta device, offloaded, or freed): load the whole model into memory first"
        else:
            continue
        raise ParaError(f"module '{name}': its factors {remedy}")


def _pair_up(sites: Iterable[_Site]) -> list[_Pair]:
    """Sites by the tensors they hold, so that what is shared is compressed once and stays shared."""
    pairs: dict[tuple[Any, Any], _Pair] = {}
    owners: dict[int, _Site] = {}
    for site in sites:
        A, B = site.A.parameter.detach(), site.B.parameter.detach()
        pair = pairs.get((_place(A), _place(B)))
        twin = pairs.get((_place(B.T), _place(A.T))) if A.ndim == B.ndim == 2 else None
        other = owners.setdefault(A.data_ptr(), site), owners.setdefault(B.data_ptr(), site)
        shared = pair or twin
        if shared is None:
            first = next((o for o in other if o is not site), None)
            if first is not None:
                raise ParaError(
                    f"module '{site.name}' shares one factor with '{first.name}' but not the other: "
                    "give each its own copy"
                )
            pairs[_place(A), _place(B)] = _Pair([site], [])
            continue
        if site.nominal != shared.first.nominal or site.min_rank > shared.first.min_rank:
            raise ParaError(
                f"module '{site.name}' shares its factors with '{shared.first.name}' but not scale and kind: "
                "give each its own copy"
            )
        (shared.sites if pair else shared.transposed).append(site)
    return list(pairs.values())


def _place(t: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return t.data_ptr(), tuple(t.shape), t.stride()


def _needs_a_pair(pairs: Sequence[_Pair], ranks: Sequence[int]) -> set[int]:
    """Indices of the pairs of rank 0 that keep a zero pair all the same (see `LiveAdapter.replace`)."""
    needed = {i for i, pair in enumerate(pairs) if not ranks[i] and not pair.first.adapter}
    kept_layers = {id(site.layer) for pair, rank in zip(pairs, ranks, strict=True) if rank for site in pair.all}
    for i, pair in enumerate(pairs):
        inner = pair.first.layer
        while not ranks[i] and hasattr(inner, "parameter_name"):
            inner = inner.base_layer
            if id(inner) in kept_layers:
                needed.add(i)
    for host in {id(pair.first.host): pair.first.host for pair in pairs}.values():
        inside = [i for i, pair in enumerate(pairs) if pair.first.host is host]
        if not any(ranks[i] for i in inside):
            group = pairs[inside[0]].first.group
            needed |= {i for i in inside if i == inside[0] or (group and pairs[i].first.group == group)}
    return needed


def _zero(f: LoraFactors) -> LoraFactors:
    return replace(f, B=as_tensor(f.B).new_zeros(f.m, 1), A=as_tensor(f.A).new_zeros(1, f.n))


def _exchanges(pair: _Pair, new: Sequence[LoraFactors]) -> Iterator[Exchange]:
    """Of every site: one new parameter for each old one, with one storage where the old ones had one."""
    if not new[0].rank:
        yield from (Exchange(site.held(), None, site.nominal, site.blocks) for site in pair.all)
        return
    A, B = pair.first.join(new)
    made: dict[int, nn.Parameter] = {}
    for site in pair.all:
        values = [A.T, B.T] if site in pair.transposed else [B, A]
        old = site.held()
        for bias in old[2:]:
            folded = fold_bias(site.name, as_numpy(bias), site.nominal, str(code_of(B)))
            values.append(as_tensor(folded).to(B.device))
        for p, value in zip(old, values, strict=True):
            if id(p) not in made:
                made[id(p)] = nn.Parameter(value, requires_grad=p.requires_grad)
        yield Exchange(old, tuple(made[id(p)] for p in old), site.nominal, site.blocks)


def _new_configs(pairs: Sequence[_Pair], ranks: Sequence[int]) -> list[Contents]:
    """Every host's configs, with a copy of the adapter's that is changed to unit scale and the new ranks."""
    sites = [(site, rank * site.per_rank) for pair, rank in zip(pairs, ranks, strict=True) for site in pair.all]
    new: list[Contents] = []
    for host in {id(site.host): site.host for site, _ in sites if site.host}.values():
        own = {site.key: (site, rank) for site, rank in sites if site.host is host and site.key}
        adapter = next(iter(own.values()))[0].adapter
        config = host.configs[adapter]
        old = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        changed = unit_scale_config(
            old,
            {key: rank for key, (_, rank) in own.items()},
            others=[_plain(path) for path, _ in host.model.named_modules() if path and ".lora_" not in path],
            parameters=[key for key, (site, _) in own.items() if hasattr(site.layer, "parameter_name")],
            tied=[key for key in own if key in _tied(config)],
        )
        config = copy.copy(config)
        for key, value in changed.items():
            if key not in _FILE_ONLY and (key not in old or old[key] != value):
                setattr(config, key, value)
        new.append((host.configs, {**host.configs, adapter: config}))
    return new


def _tied(config: Any) -> Iterable[str]:
    """The modules whose factors PEFT makes those of the input embedding, transposed."""
    return getattr(config, "target_modules_to_tie", None) or ()


def _fill(contents: Iterable[Contents]) -> None:
    for d, content in contents:
        d.clear()
        d.update(content)


def _plain(path: str) -> str:
    """A module's name without what PEFT and torch.compile put between its parts."""
    return ".".join(part for part in path.split(".") if part not in ("base_layer", "_orig_mod"))


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
