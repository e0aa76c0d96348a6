"""BaseModel: what an adapter's base model is, by its config.json and its safetensors shards; read only where needed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ParaError
from ..naming import natural_key
from .hub import located
from .output import CONFIG
from .tensors import read_json

WEIGHT_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".safetensors")
"""How the names of files with weights end, in whatever format."""

MOST_LAYERS = 10_000  # ten times those of the deepest models: files are untrusted, and each layer costs time

_INDEX = "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A base model as transformers saves it.

    Attributes:
        folder: where it lies.
        config: config.json; of a model of several parts, that of its language model.
        whole: config.json as it stands.
    """

    folder: Path
    config: Mapping[str, Any]
    whole: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """Its ``model_type``: ``llama``, ``qwen2``."""
        return str(self.config.get("model_type", ""))

    @property
    def tied(self) -> bool:
        """Whether input and output share one weight, as transformers takes it where config.json does not say.

        Of a model of several parts, whether any of them says so: what holds is not the same in every version.
        """
        return bool(self.config.get("tie_word_embeddings", True)) or bool(self.whole.get("tie_word_embeddings", False))

    @property
    def layers(self) -> int:
        """How many layers it has.

        Raises:
            ParaError: config.json does not say, or says what can't be.
        """
        layers = self.number("num_hidden_layers", "n_layer", "num_layers")
        if layers > MOST_LAYERS:
            raise ParaError(
                f"'{self.folder / 'config.json'}' speaks of {layers} layers: give the folder of the base model"
            )
        return layers

    def rows(self, projection: str) -> tuple[int, int]:
        """Heads, and rows of a head, of an attention layer's ``q_proj`` or ``k_proj``.

        Raises:
            ParaError: config.json does not say.
        """
        heads = self.number("num_attention_heads")
        size = self.config.get("head_dim")
        if type(size) is not int or size < 1:
            size = self.number("hidden_size") // heads
        return heads if projection == "q_proj" else self.number("num_key_value_heads", "num_attention_heads"), size

    def number(self, *keys: str) -> int:
        """The first of these settings that config.json has, a positive whole number."""
        for key in keys:
            value = self.config.get(key)
            if type(value) is int and value > 0:
                return value
        raise ParaError(f"'{self.folder / 'config.json'}' has no {keys[0]}: give the folder of the base model")

    @cached_property
    def shards(self) -> Mapping[str, str]:
        """Which file holds each tensor, by key.

        Raises:
            ParaError: there are no safetensors files, or the index names one that is not beside it.
        """
        index, whole = self.folder / _INDEX, self.folder / _ONE_FILE
        if index.is_file() and not whole.is_file():  # transformers loads the one file where there are both
            shards = read_json(index).get("weight_map")
            named = isinstance(shards, dict) and all(isinstance(file, str) for file in shards.values())
            if not named or not isinstance(shards, dict):
                raise ParaError(f"'{index}' has no weight_map of file names: download or save the base model again")
            for file in set(shards.values()):
                if Path(file).name != file or not (self.folder / file).is_file():
                    raise ParaError(f"'{index}' names {file!r:.100}, which is no file beside it: download it")
            return shards
        if not whole.is_file():
            raise ParaError(
                f"'{self.folder}' holds neither {_ONE_FILE} nor {_INDEX}: save the base model as safetensors"
            )
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(whole, framework="numpy") as file:
                return dict.fromkeys(file.keys(), _ONE_FILE)
        except OSError as e:
            raise ParaError(f"'{whole}' could not be read ({e.strerror or e}): make it readable") from e
        except SafetensorError as e:
            raise ParaError(f"'{whole}' is not a whole safetensors file: download or save it again") from e

    @cached_property
    def _model(self) -> Any:
        """The model as transformers makes it, without weights; None where it can't. Code of the folder is never run."""
        try:
            import torch
            import transformers

            if any(type(n) is int and n > MOST_LAYERS for key, n in self.config.items() if "layer" in key):
                return None
            config = transformers.AutoConfig.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
            kind = getattr(transformers, config.architectures[0])
            if not issubclass(kind, transformers.PreTrainedModel):
                return None
            with torch.device("meta"):
                return kind(config)
        except Exception:  # not installed, older, or no model of transformers
            return None

    @cached_property
    def shared(self) -> Sequence[Collection[str]] | None:
        """Names in transformers of parameters that are one weight there, weight by weight; None if it can't tell."""
        if self._model is None:
            return None
        # What a model without a head is loaded into may have one, which shares the embedding.
        if type(self._model).__name__.endswith("Model") and self._model.get_output_embeddings() is None:
            return None
        names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            names[id(parameter)].append(name)
        return [group for group in names.values() if len(group) > 1]

    @cached_property
    def renamed(self) -> Mapping[str, Sequence[tuple[str, str | None]]]:
        """The shards' keys by the names that modules have in transformers, where that renames at load; else empty.

        A key that is one of several that make up one parameter comes with the pattern that it matched.
        """
        if self._model is None:
            return {}
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

            rules = get_model_conversion_mapping(self._model)
        except Exception:  # older: then the names are the keys
            return {}
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        renamed: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
        for key in sorted(self.shards, key=natural_key):
            name, pattern = rename_source_key(key, renamings, converters)
            renamed[name].append((key, pattern))
        return renamed


def read_base(source: str | Path, *, weights: bool = False) -> BaseModel:
    """Read a base model's config.json.

    Args:
        source: its folder, or the config.json in it; as a str also an id on the Hub (see ``hub.py``).
        weights: of one on the Hub, fetch all that makes the model, not config.json alone.

    Raises:
        ParaError: there is none.
    """
    path = located(source, _whole if weights else _config)
    if not path.exists():
        raise ParaError(f"'{path}' does not exist: download the base model, and give its folder by base=")
    file = path / "config.json" if path.is_dir() else path
    if (path / CONFIG).is_file():
        raise ParaError(f"'{path}' is an adapter: give the folder of its base model by base=")
    if file.name != "config.json" or not file.is_file():
        raise ParaError(f"'{path}' is no base model, which has a config.json: give its folder")
    whole = config = read_json(file)
    for part in ("text_config", "llm_config"):
        if isinstance(config.get(part), dict):
            config = {**config, **config[part]}
    return BaseModel(file.parent, config, whole)


def _config(source: str, names: Sequence[str], file: str | None) -> Sequence[str]:
    """Of a repository's files, what tells of the model."""
    if "config.json" not in names:
        raise ParaError(f"'{source}' is no base model, which has a config.json: give its folder or id")
    return ["config.json"]


def _whole(source: str, names: Sequence[str], file: str | None) -> Sequence[str]:
    """Of a repository's files, those of the model as transformers saves it as safetensors."""
    config = _config(source, names, file)
    weights = [name for name in names if Path(name).suffix in WEIGHT_SUFFIXES]
    shards = [name for name in weights if name.startswith("model") and name.endswith(".safetensors")]
    return [*config, *(name for name in names if name not in weights and name not in config), *shards]
