"""File formats: each reads an adapter into LoraFactors and writes new factors back in its own layout."""

from __future__ import annotations

from pathlib import Path

from ..errors import ParaError
from .output import CONFIG, PICKLED, WEIGHTS
from .peft import PeftAdapter, read_peft
from .tensors import read_tensors, recognise

__all__ = ["PeftAdapter", "read_adapter", "read_peft"]

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def read_adapter(path: Path) -> PeftAdapter:
    """Read an adapter, recognised by what is there.

    Args:
        path: a folder that PEFT saved.

    Raises:
        ParaError: not an adapter that can be read; it says what was found instead.
    """
    if path.is_dir():
        if any((path / name).is_file() for name in (CONFIG, WEIGHTS, PICKLED)):
            return read_peft(path)
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise ParaError(f"'{path}' holds no tensor file: give the folder that PEFT saved")
        path = files[0]
    if not path.is_file():
        raise ParaError(f"'{path}' does not exist: give the folder that PEFT saved")
    if path.name in (WEIGHTS, PICKLED) and (path.parent / CONFIG).is_file():
        raise ParaError(f"'{path}' is the tensor file of an adapter: give its folder, '{path.parent}'")
    if path.suffix not in _SUFFIXES:
        raise ParaError(f"'{path}' is not a tensor file: give the folder that PEFT saved")
    kind = recognise(read_tensors(path)[0])
    raise ParaError(f"'{path}' holds {kind} tensors, not a PEFT folder: convert it to a PEFT LoRA adapter")
