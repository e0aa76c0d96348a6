"""What this machine can do (machine.cpp), and the floor that follows from it for a set of factor pairs."""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from para_ext import LoraFactors

BYTES = 1 << 28


@dataclass(frozen=True)
class Rates:
    """fp64 operations a second (a fused multiply-add is two), bytes read a second, bytes read and written by a copy."""

    fma: float
    read: float
    copy: float


@cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or "c++"
    path = Path(tempfile.mkdtemp(prefix="para-ext-bench-")) / "machine.so"
    source = Path(__file__).with_name("machine.cpp")
    flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, str(source), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    shutil.rmtree(path.parent)
    for name, arguments in (
        ("fma_rate", [ctypes.c_int, ctypes.c_double]),
        ("read_rate", [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]),
        ("copy_rate", [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]),
    ):
        getattr(library, name).restype = ctypes.c_double
        getattr(library, name).argtypes = arguments
    return library


@cache
def _memory() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(BYTES, dtype=torch.uint8), torch.ones(BYTES, dtype=torch.uint8)


def rates(threads: int) -> Rates:
    """Medians of five, by ``threads`` threads, on memory as tensors have it."""
    library, (source, target) = _library(), (memory.data_ptr() for memory in _memory())
    return Rates(
        statistics.median(library.fma_rate(threads, 0.02) for _ in range(5)),
        statistics.median(library.read_rate(source, BYTES, threads) for _ in range(5)),
        2 * statistics.median(library.copy_rate(source, target, BYTES, threads) for _ in range(5)),
    )


def floor(factors: Sequence[LoraFactors], ranks: Sequence[int], machine: Rates) -> tuple[float, float]:
    """Seconds that cores and truncate can't do without: bytes at full bandwidth, or operations at full rate.

    cores: both factors are read once; (m+n)·r² operations (half of a symmetric product). truncate: read again, the new
    ones written; 2·(m+n)·r·k operations, in fp64 as they accumulate.
    """
    read = sum((f.B.numel() + f.A.numel()) * f.A.itemsize for f in factors)
    written = sum(k * (f.m + f.n) * f.A.itemsize for f, k in zip(factors, ranks, strict=True))
    gram = sum((f.m + f.n) * f.rank**2 for f in factors)
    thin = sum(2 * (f.m + f.n) * f.rank * k for f, k in zip(factors, ranks, strict=True))
    return max(read / machine.read, gram / machine.fma), max((read + written) / machine.copy, thin / machine.fma)


def back(size: int) -> None:
    """Touch and free as much memory: a virtual machine's host takes free pages away within seconds, and getting them
    back costs more than all that we time."""
    np.ones(size, np.uint8)  # not torch.ones, whose threads spin on into what is timed next
    rest()


def rest() -> None:
    """Wait until the last call's threads have come to rest: OpenMP's spin on for a while when there is no work left."""
    time.sleep(0.02)
