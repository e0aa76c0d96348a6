"""File formats: each reads an adapter into LoraFactors and writes new factors back in its own layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ParaError
from .adapter import FILE_SUFFIXES, Adapter, Filled
from .hub import located
from .keyed import read_keyed
from .mlx import is_mlx, read_mlx
from .output import CONFIG, MLX, PICKLED, SIDECAR, WEIGHTS, goes_along
from .peft import PeftAdapter, read_peft
from .targets import BASED, TARGETS, Wish, housed
from .tensors import read_json

__all__ = [
    "BASED",
    "FILE_SUFFIXES",
    "TARGETS",
    "Adapter",
    "Filled",
    "PeftAdapter",
    "Wish",
    "housed",
    "place_of",
    "read_adapter",
    "read_peft",
]

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def place_of(adapter: str | Path) -> Path:
    """Where an adapter lies: the path itself, or what is fetched from the Hub where a str is an id there.

    Raises:
        ParaError: it is such an id, and can't be fetched.
    """
    return located(adapter, _needed)


def _needed(source: str, names: Sequence[str], file: str | None) -> Sequence[str]:
    """Of a repository's files those of the adapter that :func:`read_adapter` would read, and what goes along."""
    if file is not None:
        if file not in names:
            raise ParaError(f"'{source}' names a file that its repository does not have: give one that it has")
        return [file, *(name for name in names if name == CONFIG)]
    weights = [name for name in names if name in (WEIGHTS, MLX)] or [name for name in names if name == PICKLED]
    weights = weights or [name for name in names if Path(name).suffix in _SUFFIXES]
    if not weights:
        raise ParaError(f"'{source}' has no tensor file at its top: download the folder that you want, and give that")
    if weights[0] not in (WEIGHTS, MLX, PICKLED) and len(weights) > 1:
        raise ParaError(f"'{source}' has {len(weights)} tensor files: give one of them, such as {source}/{weights[0]}")
    return [*weights, *(name for name in names if name in (CONFIG, SIDECAR) or goes_along(name))]


def read_adapter(source: str | Path) -> Adapter[Any]:
    """Read an adapter, recognised by what is there.

    Args:
        source: a folder that PEFT or MLX saved, one that holds a single tensor file, or such a file; as a str also an
            id on the Hub (see ``hub.py``).

    Raises:
        ParaError: not an adapter that can be read; it says what was found instead.
    """
    path = place_of(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
        if is_mlx(path):
            return read_mlx(path)
        if any((path / name).is_file() for name in (CONFIG, WEIGHTS, PICKLED)):
            return read_peft(path)
        inside = sorted(folder.name for folder in path.iterdir() if (folder / CONFIG).is_file())
        if not files and inside:
            raise ParaError(f"'{source}' holds several adapters: give one of them, such as '{path / inside[0]}'")
        if not files:
            raise ParaError(f"'{source}' holds no tensor file: give the folder or file that the adapter was saved in")
        if len(files) > 1:
            raise ParaError(f"'{source}' holds {len(files)} tensor files, such as '{files[0].name}': give one of them")
        return read_keyed(path, files[0])
    if path.suffix == ".gguf" and path.is_file():
        raise ParaError(
            f"'{source}' is a GGUF file, which is written here but not read: give the adapter it was made of"
        )
    if not path.is_file():
        raise ParaError(f"'{source}' does not exist: give the folder or file that the adapter was saved in")
    if path.suffix not in _SUFFIXES:
        raise ParaError(f"'{source}' is not a tensor file: give the folder or file that the adapter was saved in")
    on_hub = path != Path(source)
    whole = f"its repository, {str(source).replace(f'/{path.name}', '')}" if on_hub else f"its folder, '{path.parent}'"
    if is_mlx(path.parent):
        raise ParaError(f"'{source}' is the tensor file of an adapter: give {whole}")
    beside = path.parent / CONFIG
    if beside.is_file() and "peft_type" in read_json(beside):
        if path.name in (WEIGHTS, PICKLED):
            raise ParaError(f"'{source}' is the tensor file of an adapter: give {whole}")
        return read_peft(path.parent, path)
    return read_keyed(path, path)
