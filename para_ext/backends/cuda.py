"""Backend `cuda`: the three stages as CUDA kernels over a ragged batch, on the factors' device and in torch's stream.

fp16, bf16 and fp32 factors are read where they lie; memory is torch's. The host waits once for the spectra and once for
the certificates. Cores too large for a thread block's shared memory, or on which Jacobi did not converge, are
decomposed by torch.linalg on the device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arrays import as_tensor, code_of, torch_dtype
from ..errors import ParaError
from ..factors import LoraFactors
from ..pool import map_single_threaded
from . import Truncated
from .certified import certified
from .large import left_vectors
from .table import NEW_A, NEW_B, NEW_RANK, RANK, TYPES, check_status, row, with_outputs

# The head of a spectrum and the numbers of stage 3 (csrc/cuda/work.h).
_SQUARED_NORM_B, _SQUARED_NORM_A, _STATUS, _SWEEPS, _SIGMA = range(5)
_PER_MODULE, _PER_SPAN = 3, 2


@dataclass(eq=False)
class Cores:
    """R_B, R_A, M, U, σ of every module in one workspace on the device (csrc/problem.h, Core), and its table."""

    factors: tuple[LoraFactors, ...]
    table: NDArray[np.int64]  # [modules, COLUMNS]
    scales: NDArray[np.float64]  # [modules]
    workspace: Tensor
    offsets: list[int]  # of each module's core in the workspace, in 8-byte words
    spectra: list[NDArray[np.float64]]  # [4 + r] per module: squared norms, status, sweeps, sigma

    @property
    def betas(self) -> list[float]:
        """|scale|·‖B‖_F·‖A‖_F per module, the scale of all its rounding errors."""
        return [
            abs(scale) * math.sqrt(spectrum[_SQUARED_NORM_B]) * math.sqrt(spectrum[_SQUARED_NORM_A])
            for scale, spectrum in zip(self.scales.tolist(), self.spectra, strict=True)
        ]

    def norm(self, module: int) -> float:
        """‖ΔW‖_F of the module of this number."""
        return math.hypot(*self.spectra[module][_SIGMA:].tolist())


class Stages:
    """The backend on devices of one type, by the native module that works there (see `Backend`)."""

    def __init__(self, name: str, native: ModuleType, device_type: str) -> None:
        self.NAME = name
        self.native: Any = native
        self.device_type = device_type
        self._reasons: dict[torch.device, str] = {}

    def supports(self, f: LoraFactors) -> bool:
        """Whether this backend takes the module: data on its type of device, of at most 32 bits."""
        (m, r), n = f.B.shape, f.A.shape[1]
        # The core of a rank far above min(m, n) would be all zeros, but of its full size here.
        small = r <= 96 or r <= min(m, n, self.native.LARGEST_RANK)
        return small and all(self._plain(x) for x in (f.A, f.B)) and not self.unusable(as_tensor(f.B).device)

    def unusable(self, device: torch.device) -> str:
        """Why the kernels can't run on this device, in a few words, said once; empty where they can."""
        if device not in self._reasons:
            self._reasons[device] = self.native.unusable(device.index or 0)
            if reason := self._reasons[device]:
                warnings.warn(
                    f"para_ext's CUDA kernels can't run on {device} ({reason}), so the torch backend does the work",
                    stacklevel=2,
                )
        return self._reasons[device]

    def _plain(self, x: Any) -> bool:
        if code_of(x) not in TYPES:
            return False
        x = as_tensor(x)
        return x.device.type == self.device_type and not x.is_neg()

    def cores(self, factors: Sequence[LoraFactors], threads: int) -> Cores:
        """See `Backend.cores`; decomposes them too, so that the host waits once."""
        native, factors = self.native, tuple(factors)
        words = [native.core_words(f.rank) + native.core_words(f.rank) % 2 for f in factors]  # of 16-byte pairs
        offsets = np.cumsum([0, *words]).tolist()
        with self._device(factors) as (device, stream):
            workspace = torch.empty(max(offsets[-1], 2), dtype=torch.float64, device=device)
            address = workspace.data_ptr()
            table = np.array(
                [row(f, address + 8 * base) for f, base in zip(factors, offsets, strict=False)],
                dtype=np.int64,
            ).reshape(len(factors), native.COLUMNS)
            scales = np.array([f.scale for f in factors], dtype=np.float64)
            with _told():
                plan = native.CoresPlan(table, scales, device.index or 0)
            results = self._launch(plan, device, stream)
        starts = plan.spectra.tolist()
        spectra = [results[i : i + _SIGMA + f.rank] for f, i in zip(factors, starts, strict=True)]
        check_status(factors, [spectrum[_STATUS] for spectrum in spectra])
        return Cores(factors, table, scales, workspace, offsets[:-1], spectra)

    def betas(self, cores: Cores) -> list[float]:
        """See `Backend.betas`."""
        return cores.betas

    def svd(self, cores: Cores, threads: int) -> list[list[float]]:
        """See `Backend.svd`."""

        def decompose(i: int) -> None:
            r, start = cores.factors[i].rank, cores.offsets[i]
            blocks = cores.workspace[start : start + 4 * r * r].view(4, r, r)
            blocks[3], S = left_vectors(blocks[2])
            cores.workspace[start + 4 * r * r :][:r] = S
            cores.spectra[i][_SIGMA:] = S.cpu().numpy()

        left = [i for i, spectrum in enumerate(cores.spectra) if spectrum[_SWEEPS] < 0]
        map_single_threaded(decompose, left, threads)
        return [
            spectrum[_SIGMA : _SIGMA + min(f.rank, f.m, f.n)].tolist()
            for f, spectrum in zip(cores.factors, cores.spectra, strict=True)
        ]

    def truncate(
        self,
        factors: Sequence[LoraFactors],
        cores: Cores,
        ranks: Sequence[int],
        codes: Sequence[str],
        threads: int,
    ) -> list[Truncated]:
        """See `Backend.truncate`."""
        table, size, starts = with_outputs(cores.table, ranks, codes)
        with self._device(factors) as (device, stream):
            arena = torch.empty(size, dtype=torch.uint8, device=device)
            table[:, [NEW_B, NEW_A]] += arena.data_ptr()
            plan = self.native.TruncatePlan(table, cores.scales)
            results = self._launch(plan, device, stream)
        whole = {code: arena.view(torch_dtype(code)) for code in set(codes)}
        outputs = []
        for f, k, code, (B, A) in zip(factors, ranks, codes, starts, strict=True):
            flat = whole[code]
            outputs.append((flat.as_strided((f.m, k), (k, 1), B), flat.as_strided((k, f.n), (f.n, 1), A)))
        return certified(
            factors,
            outputs,
            table[:, [RANK, NEW_RANK]],
            _certificates(results, plan.sides, table[:, NEW_RANK]),
            cores.betas,
            cores.norm,
            threads,
        )

    @contextmanager
    def _device(self, factors: Sequence[LoraFactors]) -> Iterator[tuple[torch.device, int]]:
        """The factors' device, made the current one, and the address of torch's stream there."""
        if self.device_type != "cuda":
            yield torch.device(self.device_type), 0
            return
        device = as_tensor(factors[0].B).device if factors else torch.device("cuda", torch.cuda.current_device())
        with torch.cuda.device(device):
            yield device, torch.cuda.current_stream(device).cuda_stream

    def _launch(self, plan: Any, device: torch.device, stream: int) -> NDArray[np.float64]:
        """Runs a plan; waits for its results, and brings them to the host."""
        tables = torch.from_numpy(plan.tables)
        if device.type == "cuda":
            tables = tables.pin_memory().to(device, non_blocking=True)
        scratch = torch.empty(plan.scratch, dtype=torch.float64, device=device)
        results = torch.empty(plan.results, dtype=torch.float64, device=device)
        with _told():
            plan.launch(tables.data_ptr(), scratch.data_ptr(), results.data_ptr(), stream)
        values: NDArray[np.float64] = results.cpu().numpy()
        return values


@contextmanager
def _told() -> Iterator[None]:
    """What the native module says of a device or a launch, as a refusal."""
    try:
        yield
    except RuntimeError as error:
        raise ParaError(f"CUDA cannot go on: {error}; use backend='torch'") from error


def _certificates(
    results: NDArray[np.float64], sides: NDArray[np.int64], ranks: NDArray[np.int64]
) -> NDArray[np.float64]:
    """[modules, 7] of the results of stage 3: what spans measured is added up side by side, in their order."""
    modules = len(ranks)
    certificates = np.zeros((modules, 7))
    certificates[:, :_PER_MODULE] = results[: modules * _PER_MODULE].reshape(-1, _PER_MODULE)
    certificates[ranks == 0] = 0
    spans = results[modules * _PER_MODULE :].reshape(-1, _PER_SPAN)
    if len(spans):
        firsts = np.flatnonzero(np.diff(sides, prepend=-1))
        sums = np.zeros((2 * modules, _PER_SPAN))
        with np.errstate(over="ignore"):
            sums[sides[firsts]] = np.add.reduceat(spans, firsts, axis=0)
        certificates[:, _PER_MODULE:] = np.sqrt(sums).reshape(modules, 2, 2).swapaxes(1, 2).reshape(modules, 4)
    return certificates


def stages() -> Stages:
    """The backend, where `_cuda` was built.

    Raises:
        ImportError: it was not.
    """
    from .. import _cuda

    return Stages("cuda", _cuda, "cuda")
