"""para_ext: compress trained LoRA adapters after training, without data (PARA, arXiv 2604.27796)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callback import ParaCallback as ParaCallback
    from .compress import compress_adapter as compress_adapter
    from .compress import compress_model as compress_model
    from .compress import convert_adapter as convert_adapter
    from .compress import decompose as decompose
    from .compress import merge_adapters as merge_adapters
    from .compress import predict as predict
    from .compress import verify as verify
    from .decomposition import Decomposition as Decomposition
    from .errors import ParaError as ParaError
    from .factors import LoraFactors as LoraFactors
    from .plan import Plan as Plan
    from .report import Report as Report
    from .spectra import Spectra as Spectra

__version__ = "0.1.0"
SCHEMA = 1
"""Of the JSON documents; it changes with the meaning or the absence of a field (docs/json.md)."""

_HOMES = {
    "compress_adapter": "compress",
    "compress_model": "compress",
    "convert_adapter": "compress",
    "decompose": "compress",
    "merge_adapters": "compress",
    "predict": "compress",
    "verify": "compress",
    "Decomposition": "decomposition",
    "ParaError": "errors",
    "LoraFactors": "factors",
    "ParaCallback": "callback",
    "Plan": "plan",
    "Report": "report",
    "Spectra": "spectra",
}
__all__ = ["SCHEMA", "__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used: importing para_ext alone imports neither torch nor peft."""
    if name not in _HOMES:
        raise AttributeError(f"module 'para_ext' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
