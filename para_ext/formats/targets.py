"""Targets: which Adapter writes a source for which reader; what a reader would get wrong is refused before any work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ParaError, shown
from ..progress import Progress
from . import names
from .adapter import Adapter, Slot
from .base import BaseModel, read_base
from .flux import unfused
from .keyed import KOHYA, PEFT_KEYS, KeyedAdapter, KeyedSlot, anchored
from .output import DIFFUSERS, SINGLE
from .peft import PREFIX, PeftAdapter, PeftSlot


@dataclass(frozen=True)
class Wish:
    """What the caller asked for besides the target.

    Attributes:
        base: the base model's folder, its config.json, or its id on the Hub.
        progress: told of what takes long beside decomposing and truncating.
    """

    base: str | Path | None = None
    progress: Progress | None = None

    def model(self, target: str, *, weights: bool = False) -> BaseModel:
        """The base model; of one on the Hub with its weights if they are asked for.

        Raises:
            ParaError: none was given, or it cannot be read.
        """
        if self.base is None:
            raise ParaError(f"the target {target} needs the base model: give its folder by base=")
        return read_base(self.base, weights=weights)


def housed(adapter: Adapter[Any], target: str | None, wish: Wish) -> Adapter[Any]:
    """The adapter as one that writes for the target.

    Args:
        target: one of TARGETS; None is the source's own format.

    Raises:
        ParaError: the target is unknown or can't express this adapter; it names what could.
    """
    if target is None:
        return adapter
    if not isinstance(target, str) or target not in TARGETS:
        raise ParaError(f"target {shown(target)} is unknown; use one of {', '.join(TARGETS)}")
    for_target = TARGETS[target](adapter, wish)
    if wish.base is None or not Path(wish.base).exists():
        return for_target
    # Of most targets this is all that is read of a base, so that an output may lie beside it, but not replace it.
    config = Path(wish.base, "config.json") if Path(wish.base).is_dir() else Path(wish.base)
    return replace(for_target, others=(*for_target.others, config))


def as_peft(adapter: Adapter[Any], target: str = "peft") -> PeftAdapter:
    """The adapter as a PEFT folder, with an adapter_config.json made up where it has none.

    Raises:
        ParaError: it is for several models, which a PEFT folder can't be, or its modules' names are unknown.
    """
    if isinstance(adapter, PeftAdapter):
        return adapter if target in ("peft", "merged") else _without_copies(adapter)
    adapter = _apart(adapter)
    # What stands behind PEFT's own prefix is for one model, whatever its first word.
    alone = all(isinstance(slot, KeyedSlot) and slot.stem.startswith(PREFIX) for slot in adapter.slots)
    parts = [""] if alone else sorted({names.component(slot.name) for slot in adapter.slots})
    if len(parts) > 1:
        raise ParaError(
            f"'{adapter.path}' adapts several models ({', '.join(part or 'one more' for part in parts)}), but a PEFT "
            f"folder, which the target {target} writes, is for one: use target='diffusers'"
        )
    _check_names(adapter, target)
    _check_lora_only(adapter, target)
    slots = []
    for slot in adapter.slots:
        name = slot.name.removeprefix(f"{parts[0]}.") if parts[0] else slot.name
        slots.append(
            PeftSlot(name=name, path=PREFIX + name, A=slot.A, B=slot.B, embedding=slot.embedding, members=slot.members)
        )
    _check_distinct(adapter, [slot.name for slot in slots], target)
    rank = max(slot.A.shape[0] for slot in slots)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [slot.name for slot in slots],
        "exclude_modules": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
    }
    notes = (*adapter.notes, "adapter_config.json was made up: name the base model in it.")
    return PeftAdapter(
        path=adapter.path,
        weights=adapter.weights,
        others=adapter.others,
        slots=tuple(slots),
        config=config,
        notes=notes,
    )


def _without_copies(adapter: PeftAdapter) -> PeftAdapter:
    """The adapter without the base's own weights, which PEFT saves beside the factors of embeddings."""
    copies = {f"{slot.path}.base_layer.weight" for slot in adapter.slots}
    foreign = {key: tensor for key, tensor in adapter.foreign.items() if key not in copies}
    if len(foreign) == len(adapter.foreign):
        return adapter
    note = "Copies of the base model's embeddings (base_layer.weight) are left out, taken to be as they are there."
    return replace(adapter, foreign=foreign, notes=(*adapter.notes, note))


def _peft(adapter: Adapter[Any], wish: Wish) -> Adapter[Any]:
    return as_peft(adapter)


def _vllm(adapter: Adapter[Any], wish: Wish) -> Adapter[Any]:
    from .servers import for_vllm

    return for_vllm(as_peft(adapter, "vllm"))


def _uniform(adapter: Adapter[Any], wish: Wish) -> Adapter[Any]:
    from .servers import uniform

    layers = wish.model("uniform").layers if wish.base else None
    return uniform(as_peft(adapter, "uniform"), layers)


def _trtllm(adapter: Adapter[Any], wish: Wish) -> Adapter[Any]:
    from .servers import for_trtllm

    return for_trtllm(as_peft(adapter, "trtllm"))


def _diffusers(adapter: Adapter[Any], wish: Wish) -> Adapter[Any]:
    slots = [
        KeyedSlot(**_plain(slot), name=name, stem=name, style=PEFT_KEYS)
        for slot, name in _pipeline(_apart(adapter), "diffusers")
    ]
    return _single(adapter, slots, alphas=False, settings=True)


def _apart(adapter: Adapter[Any]) -> Adapter[Any]:
    """The adapter with the modules that diffusers has, where Flux's first release has one for several."""
    if not isinstance(adapter, KeyedAdapter):
        return adapter
    slots, notes = tuple(unfused(adapter.slots)), adapter.notes
    if len(slots) > len(adapter.slots):
        notes += ("Layers that diffusers has in several parts are written in parts, each with an A of its own.",)
    return replace(adapter, slots=slots, notes=notes)


def _kohya(adapter: Adapter[Any], wish: Wish) -> Adapter[Any]:
    pipeline = _pipeline(adapter, "kohya")
    several = any(names.component(name) in ("text_encoder_2", "text_encoder_3", "transformer") for _, name in pipeline)
    slots = [
        KeyedSlot(**_plain(slot), name=name, stem=names.kohya(name, several_encoders=several), style=KOHYA)
        for slot, name in pipeline
    ]
    single = _single(adapter, anchored(slots, add=True), alphas=True, settings=False)
    trained = {k: v for k, v in adapter.metadata.items() if k.startswith(("ss_", "sshs_", "modelspec."))}
    return replace(single, metadata={**single.metadata, **trained})


def _gguf(adapter: Adapter[Any], wish: Wish) -> Adapter[Any]:
    from .gguf import for_llama_cpp

    return for_llama_cpp(as_peft(adapter, "gguf"), wish.model("gguf"))


def _mlx(adapter: Adapter[Any], wish: Wish) -> Adapter[Any]:
    from .mlx import MlxAdapter, for_mlx

    if isinstance(adapter, MlxAdapter):
        return adapter
    return for_mlx(as_peft(adapter, "mlx"), wish.model("mlx") if wish.base else None)


def _merged(adapter: Adapter[Any], wish: Wish) -> Adapter[Any]:
    from .merged import for_merging

    return for_merging(as_peft(adapter, "merged"), wish.model("merged", weights=True), wish.progress)


BASED = frozenset({"gguf", "merged", "mlx", "uniform"})
"""Targets that read the base model, where it is given or must be."""

TARGETS: Mapping[str, Callable[[Adapter[Any], Wish], Adapter[Any]]] = {
    "peft": _peft,
    "vllm": _vllm,
    "uniform": _uniform,
    "gguf": _gguf,
    "trtllm": _trtllm,
    "mlx": _mlx,
    "diffusers": _diffusers,
    "kohya": _kohya,
    "merged": _merged,
}


def _pipeline(adapter: Adapter[Any], target: str) -> list[tuple[Slot, str]]:
    """Slots and their names with the pipeline's model before them.

    Raises:
        ParaError: it is no adapter of a diffusion pipeline, or one that would lose something.
    """
    if isinstance(adapter, PeftAdapter):
        from .servers import check_plain

        check_plain(adapter, target)
    else:
        _check_names(adapter, target)
        _check_lora_only(adapter, target)
    pipeline = []
    for slot in adapter.slots:
        name = slot.name if names.component(slot.name) else names.placed(slot.name)
        if not name:
            raise ParaError(
                f"module '{slot.name}' is of no diffusion model that is known, which the target {target} is for: "
                "use target='peft'"
            )
        if slot.embedding or len(slot.members) > 1:
            raise ParaError(f"module '{slot.name}' is no plain linear layer or convolution: use target='peft'")
        if target == "kohya" and "single_transformer_blocks." in name:
            raise ParaError(
                f"module '{slot.name}' is Flux's as diffusers has it, which no reader of kohya's files takes: use "
                "target='diffusers'"
            )
        pipeline.append((slot, name))
    _check_distinct(adapter, [name for _, name in pipeline], target)
    return pipeline


def _check_distinct(adapter: Adapter[Any], there: Sequence[str], target: str) -> None:
    """Two of the adapter's modules must not be one where their names are those of the target."""
    first: dict[str, str] = {}
    for slot, name in zip(adapter.slots, there, strict=True):
        known = slot.stem if isinstance(slot, KeyedSlot) else slot.name
        if first.setdefault(name, known) != known:
            raise ParaError(
                f"modules '{first[name]}' and '{known}' of '{adapter.path}' would both be '{name}' for the target "
                f"{target}: leave one of them out"
            )


def _check_names(adapter: Adapter[Any], target: str) -> None:
    for slot in adapter.slots:
        if isinstance(slot, KeyedSlot) and not names.has_dots(slot.stem):
            raise ParaError(
                f"module '{slot.name}' has a name whose dots are unknown, so that the target {target} can't be given "
                "it: compress without a target to keep the names"
            )
        if len(slot.members) > 1 and slot.A.ndim == 2 and not slot.experts:
            raise ParaError(
                f"module '{slot.name}' is several layers in one, each with rows of its own in A, which the target "
                f"{target} can't express: compress without a target"
            )
        if isinstance(slot, KeyedSlot) and slot.style.needs_all:
            raise ParaError(
                f"module '{slot.name}' has a number for a name, as only its own format has: compress without a target"
            )
        if target == "diffusers" and names.original(slot.name):
            raise ParaError(
                f"module '{slot.name}' is named as in the original model, not as in diffusers: use target='kohya', "
                "which diffusers converts when it loads it"
            )
    if isinstance(adapter, KeyedAdapter) and not adapter.alphas and not adapter.settings:
        kept_apart = next((s for s in adapter.slots if s.style.name == "loralib" or s.stem.startswith(PREFIX)), None)
        if kept_apart is not None:
            raise ParaError(
                f"'{adapter.path}' holds no alpha, which is kept elsewhere, so that the scale is unknown: give a PEFT "
                "folder, with its adapter_config.json, or compress without a target"
            )


def _check_lora_only(adapter: Adapter[Any], target: str) -> None:
    if adapter.foreign:
        key = next(iter(adapter.foreign))
        raise ParaError(
            f"'{adapter.path}' also holds '{key}' and {len(adapter.foreign) - 1} other tensors that are not LoRA's, "
            f"which the target {target} would leave out: compress without a target to keep them"
        )


def _plain(slot: Slot) -> dict[str, Any]:
    return {"A": slot.A, "B": slot.B, "members": slot.members}


def _single(adapter: Adapter[Any], slots: list[KeyedSlot], *, alphas: bool, settings: bool) -> KeyedAdapter:
    return KeyedAdapter(
        path=adapter.path,
        weights=adapter.weights,
        others=adapter.others,
        slots=tuple(slots),
        metadata={"format": "pt"},
        notes=adapter.notes,
        alphas=alphas,
        settings=settings,
        tensor_file=DIFFUSERS if settings else SINGLE,
    )
