"""File formats: each reads an adapter into LoraFactors and writes new factors back in its own layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ParaError
from .adapter import FILE_SUFFIXES, Adapter, Filled
from .keyed import read_keyed
from .mlx import is_mlx, read_mlx
from .output import CONFIG, PICKLED, WEIGHTS
from .peft import PeftAdapter, read_peft
from .targets import TARGETS, Wish, housed
from .tensors import read_json

__all__ = [
    "FILE_SUFFIXES",
    "TARGETS",
    "Adapter",
    "Filled",
    "PeftAdapter",
    "Wish",
    "housed",
    "read_adapter",
    "read_peft",
]

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def read_adapter(path: Path) -> Adapter[Any]:
    """Read an adapter, recognised by what is there.

    Args:
        path: a folder that PEFT or MLX saved, one that holds a single tensor file, or such a file.

    Raises:
        ParaError: not an adapter that can be read; it says what was found instead.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
        if is_mlx(path):
            return read_mlx(path)
        if any((path / name).is_file() for name in (CONFIG, WEIGHTS, PICKLED)):
            return read_peft(path)
        inside = sorted(folder.name for folder in path.iterdir() if (folder / CONFIG).is_file())
        if not files and inside:
            raise ParaError(f"'{path}' holds several adapters: give one of them, such as '{path / inside[0]}'")
        if not files:
            raise ParaError(f"'{path}' holds no tensor file: give the folder or file that the adapter was saved in")
        if len(files) > 1:
            raise ParaError(f"'{path}' holds {len(files)} tensor files, such as '{files[0].name}': give one of them")
        return read_keyed(path, files[0])
    if path.suffix == ".gguf":
        raise ParaError(f"'{path}' is a GGUF file, which is written here but not read: give the adapter it was made of")
    if not path.is_file():
        raise ParaError(f"'{path}' does not exist: give the folder or file that the adapter was saved in")
    if path.suffix not in _SUFFIXES:
        raise ParaError(f"'{path}' is not a tensor file: give the folder or file that the adapter was saved in")
    if is_mlx(path.parent):
        raise ParaError(f"'{path}' is the tensor file of an adapter: give its folder, '{path.parent}'")
    beside = path.parent / CONFIG
    if beside.is_file() and "peft_type" in read_json(beside):
        if path.name in (WEIGHTS, PICKLED):
            raise ParaError(f"'{path}' is the tensor file of an adapter: give its folder, '{path.parent}'")
        return read_peft(path.parent, path)
    return read_keyed(path, path)
