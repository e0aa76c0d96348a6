"""Types of the CUDA kernels' module (csrc/cuda/bindings.cpp).

A plan says which thread blocks do what. Its ``tables`` must be copied to the device; ``scratch`` and ``results`` are
how many 8-byte words it needs there. All addresses are multiples of 16; a launch waits for nothing.
"""

import numpy as np
from numpy.typing import NDArray

COLUMNS: int
LARGEST_RANK: int

class CoresPlan:
    """Stages 1 and 2. Results per module: ‖B‖_F², ‖A‖_F², status, sweeps, sigma [r].

    status: 0, or 1 (2, 3) if B (A, M) is not finite. sweeps: -1 where no sigma and no U were made.
    """

    def __init__(self, table: NDArray[np.int64], scales: NDArray[np.float64], device: int) -> None:
        """table [modules, COLUMNS], scales [modules]; for the device of this number.

        Raises:
            RuntimeError: there is none.
        """

    @property
    def tables(self) -> NDArray[np.int64]: ...
    @property
    def spectra(self) -> NDArray[np.int64]:
        """[modules]: where in the results each one's start."""

    @property
    def scratch(self) -> int: ...
    @property
    def results(self) -> int: ...
    def launch(self, tables: int, scratch: int, results: int, stream: int) -> None:
        """Addresses on the device, and CUDA's stream.

        Raises:
            RuntimeError: "stage: what CUDA says".
        """

class TruncatePlan:
    """Stage 3. Results: lost, stretch_b, stretch_a per module; then per span the squared rounding error of a part of a
    new factor, plain and weighted by sigma."""

    def __init__(self, table: NDArray[np.int64], scales: NDArray[np.float64]) -> None: ...
    @property
    def tables(self) -> NDArray[np.int64]: ...
    @property
    def sides(self) -> NDArray[np.int64]:
        """[spans]: twice the module of each, one more for A."""

    @property
    def scratch(self) -> int: ...
    @property
    def results(self) -> int: ...
    def launch(self, tables: int, scratch: int, results: int, stream: int) -> None: ...

def unusable(device: int) -> str:
    """Why the kernels can't run on the device of this number; empty where they can."""

def core_words(rank: int) -> int:
    """8-byte words that a module of this rank needs in the workspace."""
