"""What is installed here: versions, backends, ISA level, threads, and why CUDA is or is not available."""

from __future__ import annotations

import platform
from typing import Any

import torch

from .decomposition import cuda_backend, native_backend, without_cuda
from .errors import ParaError


def installation() -> dict[str, Any]:
    """Facts by name, as docs/json.md has them."""
    try:
        native = native_backend(required=True)
        isa = f"{native.ISA or native.levels()[0]} (available: {', '.join(native.levels())})"
        core = "built"
    except ParaError as error:
        isa, core = "none", str(error)
    kernels = "built" if cuda_backend() else "not built: reinstall with nvcc and PARA_EXT_CUDA=ON"
    reason = without_cuda()
    cuda = kernels == "built" and not reason
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "native_core": core,
        "isa_level": isa,
        "cuda_kernels": kernels,
        "cuda": f"not available: {reason}" if reason else torch.cuda.get_device_name(),
        "backends": [*(["cpu"] if core == "built" else []), *(["cuda"] if cuda else []), "torch"],
        "threads": torch.get_num_threads(),
    }
