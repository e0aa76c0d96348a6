"""Reading safetensors files into numpy arrays over the mapped file: nothing is copied, and nothing needs PyTorch."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..arrays import NUMPY
from ..errors import ParaError

__all__ = ["SafetensorError", "read_safetensors"]


def read_safetensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """All tensors, in the order of their keys, and the header's metadata.

    The library checks the file (sizes, offsets, overlaps); what is read here is a header that it found right.

    Raises:
        SafetensorError, OSError, ValueError, LookupError: it is not a whole safetensors file.
        ParaError: a tensor's type is none that numpy or ml_dtypes has.
    """
    with safe_open(path, framework="numpy") as file:
        keys, metadata = list(file.keys()), dict(file.metadata() or {})
    with path.open("rb") as file:
        # Copy on write: the arrays may be written to as torch wants, the file is never changed.
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    start = 8 + int.from_bytes(view[:8], "little")
    header = json.loads(bytes(view[8:start]), object_pairs_hook=_no_duplicates)
    arrays = {}
    for key in keys:
        entry = header[key]
        if entry["dtype"] not in NUMPY:
            raise ParaError(f"tensor '{key}' has dtype {entry['dtype']}, which cannot be written: convert it first")
        first, end = entry["data_offsets"]
        array = np.frombuffer(view[start + first : start + end], NUMPY[entry["dtype"]]).reshape(entry["shape"])
        arrays[key] = array if array.flags.aligned else array.copy()
    return arrays, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("its header gives a key twice")
    return members
