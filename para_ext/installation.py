"""What is installed here: versions, backends, ISA level, threads, and why CUDA is or is not available."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import __version__
from .decomposition import native_backend
from .errors import ParaError


def installation() -> dict[str, Any]:
    """Facts by name, each a string or a list of strings."""
    try:
        native = native_backend(required=True)
        isa = f"{native.ISA or native.levels()[0]} (available: {', '.join(native.levels())})"
        core = "built"
    except ParaError as error:
        isa, core = "none", str(error)
    return {
        "para_ext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "native core": core,
        "ISA level": isa,
        "backends": ["cpu", "torch"] if core == "built" else ["torch"],
        "threads": str(torch.get_num_threads()),
        "CUDA": _cuda(),
    }


def _cuda() -> str:
    if torch.version.cuda is None:
        return "not available: this PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return "not available: PyTorch finds no CUDA device or driver"
    return f"{torch.cuda.get_device_name()} (through the torch backend)"
