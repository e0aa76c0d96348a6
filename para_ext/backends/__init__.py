"""The three stages (cores, svd, truncate) and who can run them: one contract, backends `cpu`, `cuda` and `torch`.

A backend is a module, or an object, with a ``NAME`` and the functions of :class:`Backend`. What ``cores`` and ``svd``
keep for ``truncate`` is the backend's own business; what crosses is spectra (numbers) and new factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..arrays import Array
from ..factors import LoraFactors


@dataclass(eq=False, slots=True)
class Truncated:
    """One module after stage 3.

    Attributes:
        B: [m, k] and A: [k, n], contiguous, of the asked type, with ΔW' = B @ A (scale folded in); numpy
            arrays where the module's factors are and the backend needs no PyTorch, otherwise tensors.
        error: an upper bound of ‖ΔW − ΔW'‖_F for the stored tensors, storage rounding included.
        rounding_B, rounding_A: ‖stored − unrounded‖_F of each; inf where a value overflowed the dtype.
    """

    B: Array
    A: Array
    error: float
    rounding_B: float
    rounding_A: float


class Backend(Protocol):
    """Each stage takes a ragged batch of checked modules and works with at most ``threads`` threads.

    Every backend gives bit-identical results for any number of threads and any order of the modules.
    """

    NAME: str

    def cores(self, factors: Sequence[LoraFactors], threads: int) -> Any:
        """Stage 1: factors to r×r cores in fp64 (numerics: R_B, R_A with RᵀR the Gram matrix, M = s·R_B·R_Aᵀ).

        Raises ParaError naming the first module (in the given order) that holds a NaN or an infinity.
        """

    def svd(self, cores: Any, threads: int) -> list[list[float]]:
        """Stage 2: singular values of every ΔW, min(r, m, n) each, descending, ≥ 0; keeps U in ``cores``."""

    def betas(self, cores: Any) -> list[float]:
        """|scale|·‖B‖_F·‖A‖_F of every module: what rounding errors are relative to."""

    def truncate(
        self,
        factors: Sequence[LoraFactors],
        cores: Any,
        ranks: Sequence[int],
        codes: Sequence[str],
        threads: int,
    ) -> list[Truncated]:
        """Stage 3: B' = B·T_B [m, k], A' = T_A·A [k, n], the best rank-k approximation of each ΔW.

        ``0 ≤ ranks[i]``; a rank above min(r, m, n) is filled with zero columns and rows. ``codes``: the types to write.
        """
