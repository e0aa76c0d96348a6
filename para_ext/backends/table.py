"""The table of a batch, a row of int64 per module, as the native backends fill it (csrc/problem.h has its columns)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..arrays import NUMPY, Array, code_of
from ..errors import ParaError
from ..factors import LoraFactors

TYPES = {"F32": 0, "F16": 1, "BF16": 2}  # DType
B_ROWS, A_COLUMNS, RANK, NEW_RANK, NEW_B, NEW_A, NEW_TYPE = 1, 6, 10, 12, 13, 14, 15

_SLOT = 64  # bytes; every output starts on a cache line


def row(f: LoraFactors, core: int) -> tuple[int, ...]:
    """What stages 1 and 2 need of a module whose core lies at this address; stage 3's columns are 0."""
    (m, r), n = f.B.shape, f.A.shape[1]
    B, B_rows, B_columns, B_type = _place(f.B)
    A, A_rows, A_columns, A_type = _place(f.A)
    return B, m, B_rows, B_columns, B_type, A, n, A_rows, A_columns, A_type, r, core, 0, 0, 0, 0


def _place(x: Array) -> tuple[int, int, int, int]:
    """Address, strides in elements, type."""
    if isinstance(x, np.ndarray):
        down, across = x.strides
        return x.ctypes.data, down // x.itemsize, across // x.itemsize, TYPES[str(code_of(x))]
    down, across = x.stride()
    return x.data_ptr(), down, across, TYPES[str(code_of(x))]


def check_status(factors: Iterable[LoraFactors], statuses: Iterable[float]) -> None:
    """Refuse the first module whose cores stage gave a status other than 0."""
    for f, status in zip(factors, statuses, strict=True):
        if status == 3:
            raise ParaError(
                f"module '{f.name}': its singular values exceed the range of float64; scale its factors or alpha down"
            )
        if status:
            raise ParaError(
                f"module '{f.name}': {'B' if status == 1 else 'A'} holds a NaN or an infinity; "
                "repair or retrain the adapter"
            )


def with_outputs(
    table: NDArray[np.int64], ranks: Sequence[int], codes: Sequence[str]
) -> tuple[NDArray[np.int64], int, list[list[int]]]:
    """The table [modules, COLUMNS] of stage 3, and where in one arena the new factors lie.

    Returns:
        table: a copy, with NEW_B and NEW_A in bytes from the arena's start on.
        size: bytes of the arena, a multiple of every element's.
        starts: per module where B' and A' start, in elements.
    """
    table = table.copy()
    table[:, NEW_RANK] = ranks
    table[:, NEW_TYPE] = [TYPES[code] for code in codes]
    itemsize = np.array([NUMPY[code].itemsize for code in codes], dtype=np.int64)
    # B', A' of module after module, each from the next whole slot on.
    slots = -(-table[:, [B_ROWS, A_COLUMNS]] * (table[:, [NEW_RANK]] * itemsize[:, None]) // _SLOT)
    ends = slots.ravel().cumsum() * _SLOT
    table[:, [NEW_B, NEW_A]] = (ends - slots.ravel() * _SLOT).reshape(-1, 2)
    return table, int(slots.sum()) * _SLOT, (table[:, [NEW_B, NEW_A]] // itemsize[:, None]).tolist()
