"""Types of the native core (csrc/bindings.cpp)."""

import numpy as np
from numpy.typing import NDArray

COLUMNS: int

class Arena:
    """A zero-filled block of fresh memory, readable and writable through the buffer protocol."""

    def __init__(self, bytes: int, threads: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def core_words(rank: int) -> int:
    """8-byte words that a module of this rank needs in the workspace."""

def cores(table: NDArray[np.int64], scales: NDArray[np.float64], threads: int, isa: str = "") -> NDArray[np.int32]:
    """Stage 1. table [modules, COLUMNS], scales [modules] → per module 0, or 1 (2, 3) if B (A, M) is not finite."""

def svd(table: NDArray[np.int64], scales: NDArray[np.float64], threads: int, isa: str = "") -> NDArray[np.int32]:
    """Stage 2 → sweeps per module, or -1 where Jacobi did not converge."""

def truncate(table: NDArray[np.int64], scales: NDArray[np.float64], threads: int, isa: str = "") -> NDArray[np.float64]:
    """Stage 3 → [modules, 7]: the members of Certificate (csrc/problem.h)."""

def isa_levels() -> list[str]:
    """Levels that were built in and that this machine runs, best first."""
