"""Untrusted files: safetensors by mapped bytes, pickles with weights_only, JSON; and what adapter keys tell of."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..arrays import NUMPY, Array, as_numpy, code_of, dtype_name, holds_data
from ..errors import ParaError, first_line
from .mapped import SafetensorError, read_safetensors

if TYPE_CHECKING:
    from torch import Tensor

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


def read_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """All tensors of a safetensors or pickled file, memory-mapped, and the header's metadata.

    Raises:
        ParaError: empty, truncated, a Git LFS pointer, or not a plain dict of tensors.
    """
    check_file(path)
    if path.suffix == ".safetensors":
        try:
            return read_safetensors(path)
        except ParaError as e:
            raise ParaError(f"'{path}': {e}") from e
        except (SafetensorError, OSError, ValueError, LookupError) as e:
            raise ParaError(
                f"'{path}' is not a whole safetensors file ({first_line(e)}): download or save it again"
            ) from e
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
        raise ParaError(f"'{path}' is not a whole PyTorch file ({first_line(e)}): download or save it again") from e
    fits = isinstance(loaded, dict) and all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items()
    )
    if not fits:
        raise ParaError(f"'{path}' is not a plain dict of tensors: save the adapter's state dict alone")
    for key, tensor in loaded.items():
        if not holds_data(tensor):
            raise ParaError(f"'{path}': tensor '{key}' is not dense (sparse, nested, quantized or meta): save it dense")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ParaError(f"'{path}': tensor '{key}' repeats its elements to fill its shape: save it contiguous")
        writable_code(key, tensor)
    return dict(loaded)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ParaError: empty, a Git LFS pointer, no JSON, not an object, or one with a key twice.
    """
    check_file(path)
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=partial(_no_duplicates, path))
    except (ValueError, RecursionError) as e:
        if isinstance(e, ParaError):
            raise
        raise ParaError(f"'{path}' is not valid JSON ({first_line(e)}): correct it, or save the adapter again") from e
    if not isinstance(value, dict):
        raise ParaError(f"'{path}' is not a JSON object: save the adapter again")
    return value


def _no_duplicates(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ParaError(f"'{path}' gives {twice!r} twice: remove one")
    return seen


def recognise(keys: Collection[str]) -> str:
    """What kind of adapter has these tensor keys, in words."""
    return next((name for pattern, name in _FORMATS if any(re.search(pattern, key) for key in keys)), "unknown")


def writable_code(key: str, x: Array) -> str:
    code = code_of(x)
    if code not in NUMPY:
        raise ParaError(f"tensor '{key}' has dtype {dtype_name(x.dtype)}, which cannot be written: convert it first")
    return str(code)


def check_file(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(len(_LFS))
    if not start:
        raise ParaError(f"'{path}' is empty: download or save it again")
    if start == _LFS:
        raise ParaError(f"'{path}' is a Git LFS pointer, not the file itself: run 'git lfs pull'")
