"""Decomposition: an adapter's factors and cores, ready to be planned (numbers) and truncated (new factors)."""

from __future__ import annotations

import functools
import importlib.util
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import (
    NUMPY,
    Array,
    as_numpy,
    as_tensor,
    checked_dtype,
    code_of,
    default_threads,
    device_of,
    dtype_name,
    torch_dtype,
)
from .backends import Backend, Truncated
from .errors import ParaError, first_line, shown
from .factors import LoraFactors, as_tensors, check_factors, written_code
from .layout import LARGEST
from .plan import Plan
from .pool import map_single_threaded
from .progress import Meter, Progress
from .rescaling import BALANCES, rescaled
from .spectra import ModuleSpectrum, Spectra

if TYPE_CHECKING:
    import torch

BACKENDS = ("cpu", "cuda", "torch")

_FIRST_STEP = 256 << 20  # bytes of factors: smaller adapters are not worth a second step
_STEP_SECONDS = 0.5
_LANES = 8  # the native core decomposes so many modules at once


class Decomposition:
    """Spectra of every module's ΔW, and all that is needed to truncate at any ranks.

    Made by :func:`para_ext.decompose`. The factors are referred to, not copied: they must not change meanwhile.

    Attributes:
        factors: the modules, in the order they were given.
        spectra: their singular values and shapes; plan with ``spectra.plan(keep=0.25)``.
        betas: per module |scale|·‖B‖_F·‖A‖_F, what rounding errors are relative to.
    """

    def __init__(
        self,
        factors: Iterable[LoraFactors],
        backend: str | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.factors = check_factors(factors)
        self.threads = checked_threads(threads)
        self._parts: list[tuple[Backend, list[int], Any]] = []
        sigma: list[list[float]] = [[]] * len(self.factors)
        self.betas = [0.0] * len(self.factors)
        parts = _assign(self.factors, backend)
        meter = Meter(progress, f"decomposing {len(self.factors)} modules", self.bytes)
        for stages, members in ((stages, step) for stages, all_ in parts for step in self._steps(all_)):
            cores = stages.cores([self.factors[i] for i in members], self.threads)
            self._parts.append((stages, members, cores))
            spectra = stages.svd(cores, self.threads)
            for i, values, beta in zip(members, spectra, stages.betas(cores), strict=True):
                sigma[i] = values
                self.betas[i] = beta
            meter.add(sum(self.factors[i].bytes for i in members))
        self.spectra = Spectra(
            tuple(
                ModuleSpectrum(f.name, f.m, f.n, f.rank, tuple(values), f.group, f.min_rank)
                for f, values in zip(self.factors, sigma, strict=True)
            )
        )

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of the backends at work."""
        return tuple(dict.fromkeys(stages.NAME for stages, _, _ in self._parts))

    @property
    def bytes(self) -> int:
        """What all factors take."""
        return sum(f.bytes for f in self.factors)

    def _steps(self, members: list[int]) -> Iterator[list[int]]:
        """The members in runs that take about half a second each, so that progress is seen and an interrupt heard.

        A module's bits depend on that module alone, so the clock may decide.
        """
        if device_of(self.factors[members[0]].B) != "cpu":
            yield members  # a GPU waits for nothing that would be worth a step
            return
        start, step = 0, float(_FIRST_STEP)
        while start < len(members):
            end, size = start, 0
            while end < len(members) and (size <= step or (end - start) % (_LANES * self.threads)):
                size += self.factors[members[end]].bytes
                end += 1
            began = time.perf_counter()
            yield members[start:end]
            step = size * _STEP_SECONDS / max(time.perf_counter() - began, 1e-6)
            start = end

    def truncate(
        self, plan: Plan | Mapping[str, int], dtype: torch.dtype | str | None = None, balance: str = "even"
    ) -> list[LoraFactors]:
        """New factors at the plan's ranks, scale 1, as torch tensors; see :meth:`truncate_certified`."""
        return [as_tensors(f) for f in self.named(self.truncate_certified(plan, dtype, balance=balance))]

    def named(self, new: Iterable[Truncated]) -> list[LoraFactors]:
        """What :meth:`truncate_certified` gave, as factors of the same modules at scale 1."""
        return [LoraFactors(f.name, t.B, t.A, 1.0, f.group, f.min_rank) for f, t in zip(self.factors, new, strict=True)]

    def truncate_certified(
        self,
        plan: Plan | Mapping[str, int],
        dtype: torch.dtype | str | None = None,
        gains: Mapping[str, float] | None = None,
        balance: str = "even",
        meter: Meter | None = None,
    ) -> list[Truncated]:
        """The best approximation of every ΔW at the plan's rank, with its error bound, in the order of ``factors``.

        A module whose rank does not change keeps A bit for bit, and B becomes scale·B rounded once; one that is given
        a larger rank is filled up with zeros. Others have √σ on both sides. Rank 0 gives B [m, 0], A [0, n].

        Args:
            plan: a Plan, or a rank for every module's name.
            dtype: of the new factors; each module's own if None (the wider one where A's and B's differ).
            gains: by name, how much larger B' is to be, for readers that divide by it again: ΔW' = B'A'/gain; 1 if
                absent.
            balance: "even", or the side that has all of σ, in every module: with "A", B's columns are orthonormal, with
                "B", A's rows.
            meter: told of the factors' bytes as they are truncated.

        Raises:
            ParaError: naming the module, if a value overflows ``dtype`` or too much of it is lost to subnormals.
        """
        ranks = self._ranks(plan.ranks if isinstance(plan, Plan) else plan)
        code = checked_dtype(dtype)
        if code == "F64" and set(self.backends) != {"torch"}:
            raise ParaError("the native core does not write float64; decompose with backend='torch' for that")
        if balance not in BALANCES:
            raise ParaError(f"balance is {shown(balance)}; give one of {', '.join(BALANCES)}")
        results: list[Truncated | None] = [None] * len(self.factors)
        gain = [(gains or {}).get(f.name, 1.0) for f in self.factors]
        as_truncated = [g == 1 and balance == "even" for g in gain]
        unchanged = [i for i, f in enumerate(self.factors) if ranks[i] >= f.rank and balance == "even"]
        for i in unchanged:
            results[i] = _fold_exactly(self.factors[i], code, gain[i])
        inexact = [i for i in unchanged if results[i] is None]

        def copy(i: int) -> Truncated:
            return _fold_scale(self.factors[i], code, gain[i])

        for i, copied in zip(inexact, map_single_threaded(copy, inexact, self.threads), strict=True):
            results[i] = copied
        for i in unchanged:
            results[i] = _filled(results[i], ranks[i])
        written = [written_code(f.A, f.B, code) for f in self.factors]
        for stages, members, cores in self._parts:
            # Unchanged modules go through as rank 0: the stage indexes its cores by position.
            part_ranks = [0 if results[i] is not None else min(ranks[i], self.factors[i].rank) for i in members]
            part = [self.factors[i] for i in members]
            # What is rescaled is rounded to 16 bits after that, and only then.
            codes = [written[i] if as_truncated[i] or written[i] == "F64" else "F32" for i in members]
            for i, new in zip(members, stages.truncate(part, cores, part_ranks, codes, self.threads), strict=True):
                if results[i] is None:
                    results[i] = new
            if meter is not None:
                meter.add(sum(f.bytes for f in part))
        as_before = set(unchanged)
        rescale = [
            (i, new) for i, new in enumerate(results) if new and i not in as_before and ranks[i] and not as_truncated[i]
        ]

        def scaled(work: tuple[int, Truncated]) -> Truncated:
            i, new = work
            return rescaled(self.factors[i], new, written[i], gain[i], balance)

        if rescale:
            with ThreadPoolExecutor(self.threads) as workers:  # of numpy's work only, which needs no PyTorch
                for (i, _), new in zip(rescale, workers.map(scaled, rescale), strict=True):
                    results[i] = _filled(new, ranks[i])
        new_factors = [result for result in results if result is not None]
        for i, new in enumerate(new_factors):
            self._check_rounding(i, new, balanced=i not in as_before and as_truncated[i])
        return new_factors

    def _ranks(self, ranks: Mapping[str, int]) -> list[int]:
        missing = [f.name for f in self.factors if f.name not in ranks]
        if missing or len(ranks) != len(self.factors):
            where = f"'{missing[0]}' has no rank" if missing else "it names modules that this adapter lacks"
            raise ParaError(f"the plan is not for this adapter: {where}; plan with this decomposition's spectra")
        for name, rank in ranks.items():
            if type(rank) is not int or not 0 <= rank <= LARGEST:
                raise ParaError(f"module '{name}': its rank is {shown(rank)}; give a whole number of at least 0")
        return [ranks[f.name] for f in self.factors]

    def _check_rounding(self, i: int, new: Truncated, balanced: bool) -> None:
        # Balanced factors have the norm √Σσ; to read them again would take as long as to truncate.
        sigma = self.spectra.modules[i].sigma
        if balanced and max(new.rounding_B, new.rounding_A) ** 2 <= 0.01 * sigma[0]:
            return
        root = math.sqrt(math.fsum(sigma[: new.A.shape[0]]))
        for which, rounding, factor in (("B", new.rounding_B, new.B), ("A", new.rounding_A, new.A)):
            if rounding == 0:
                continue
            name = dtype_name(code_of(factor))
            if not math.isfinite(rounding):
                raise ParaError(
                    f"module '{self.factors[i].name}': a value of the new {which} exceeds the range of {name}; "
                    "write with a wider type, such as dtype='bf16'"
                )
            norm = root if balanced else _norm(factor)
            if rounding * rounding > 0.01 * norm * norm:
                raise ParaError(
                    f"module '{self.factors[i].name}': over 1 % of the new {which}'s squared norm would be lost to "
                    f"values too small for {name}; write with a wider type, such as dtype='bf16'"
                )


def _assign(factors: Sequence[LoraFactors], wanted: str | None) -> list[tuple[Backend, list[int]]]:
    """Backends, and the modules that each takes, all on one device: `torch` whatever no other one does."""
    if wanted is not None and wanted not in BACKENDS:
        raise ParaError(f"backend '{wanted}' is unknown; use one of {', '.join(BACKENDS)}")
    native = native_backend(required=wanted == "cpu") if wanted in (None, "cpu") else None
    if native is None and wanted is None:
        _warn_without_native()
    on_gpu = [device_of(f.B).startswith("cuda") for f in factors]
    cuda: Any = None
    if wanted == "cuda" or (wanted is None and any(on_gpu)):
        cuda = cuda_backend(required=wanted == "cuda")
    if wanted == "cuda" and not all(on_gpu):
        raise ParaError(
            f"module '{factors[on_gpu.index(False)].name}': its factors are not on a CUDA device; move them there, or "
            "use another backend"
        )
    if wanted == "cuda":
        for device in {as_tensor(f.B).device for f in factors}:
            if reason := cuda.unusable(device):
                raise ParaError(f"the CUDA kernels can't run on {device} ({reason}); use backend='torch'")
    chosen: dict[tuple[str, str], tuple[Backend, list[int]]] = {}
    for i, f in enumerate(factors):
        for stages in (native, cuda):
            if stages is not None and stages.supports(f):
                break
        else:
            stages = importlib.import_module(f"{__package__}.backends.torch")
        where = device_of(f.B) if stages is cuda else ""
        chosen.setdefault((stages.NAME, where), (stages, []))[1].append(i)
    return list(chosen.values())


def checked_threads(threads: int | None) -> int:
    """How many threads to use: as asked, or PyTorch's setting."""
    if threads is None:
        return default_threads()
    if type(threads) is not int or not 1 <= threads < 2**31:
        raise ParaError(f"threads={shown(threads)} is out of range; give a whole number of at least 1, below 2^31")
    return threads


def native_backend(required: bool = False) -> Any:
    """The `cpu` backend's module, or None where the native core was not built.

    Raises:
        ParaError: if it is required and missing.
    """
    try:
        return importlib.import_module(f"{__package__}.backends.cpu")
    except ImportError as error:
        if required:
            raise ParaError(
                f"the native core is not installed{_unloadable('_cpu', error)}; reinstall with a C++ compiler and "
                "PARA_EXT_NATIVE=ON"
            ) from error
        return None


def cuda_backend(required: bool = False) -> Any:
    """The `cuda` backend, or None where its kernels were not built.

    Raises:
        ParaError: if it is required and missing, or there is no device to run it.
    """
    try:
        stages = importlib.import_module(f"{__package__}.backends.cuda").stages()
    except ImportError as error:
        if required:
            raise ParaError(
                f"the CUDA kernels are not installed{_unloadable('_cuda', error)}; reinstall with nvcc and "
                "PARA_EXT_CUDA=ON, or use backend='cpu'"
            ) from error
        return None
    if required and (reason := without_cuda()):
        raise ParaError(f"there is no CUDA device to work on ({reason}); use backend='cpu'")
    return stages


def _unloadable(module: str, error: ImportError) -> str:
    """What keeps a native module, if it was built, from being loaded."""
    return f" ({first_line(error)})" if importlib.util.find_spec(f"{__package__}.{module}") else ""


def without_cuda() -> str:
    """Why PyTorch has no CUDA device; empty where it has one."""
    import torch

    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    return "" if torch.cuda.is_available() else "PyTorch finds no CUDA device or driver"


@functools.cache
def _warn_without_native() -> None:
    here = Path(__file__).parent
    checkout = (here.parent / "csrc").is_dir()
    remedy = (
        f"this is the checkout at {here.parent}; run Python elsewhere" if checkout else "reinstall with a C++ compiler"
    )
    warnings.warn(
        f"para_ext's native core is not installed, so the slower torch backend does the work: {remedy}", stacklevel=2
    )


def _filled(new: Truncated | None, rank: int) -> Truncated:
    """The same with columns and rows of zeros up to this rank."""
    assert new is not None
    missing = rank - new.A.shape[0]
    if missing == 0:
        return new
    B, A = as_numpy(new.B), as_numpy(new.A)
    return replace(new, B=np.pad(B, ((0, 0), (0, missing))), A=np.pad(A, ((0, missing), (0, 0))))


def _fold_exactly(f: LoraFactors, code: str | None, gain: float) -> Truncated | None:
    """A as it is and gain·scale·B, of numpy arrays where nothing is rounded; otherwise None."""
    if not (isinstance(f.A, np.ndarray) and isinstance(f.B, np.ndarray)):
        return None
    scale = float(f.scale) * gain
    if abs(math.frexp(scale)[0]) != 0.5 or abs(math.frexp(f.scale)[0]) != 0.5:
        return None
    dtype = NUMPY[written_code(f.A, f.B, code)]
    with np.errstate(all="ignore"):
        scaled = f.B.astype(np.float64) * scale
        B, A = scaled.astype(dtype, order="C"), f.A.astype(dtype, order="C")
    exact = np.array_equal(B.astype(np.float64), scaled) and np.array_equal(A, f.A)
    return Truncated(B, A, 0.0, 0.0, 0.0) if exact else None


def _fold_scale(f: LoraFactors, code: str | None, gain: float) -> Truncated:
    """A as it is and gain·scale·B: the rank does not fall, so nothing is gained by touching more bits than that."""
    import torch

    from .certificate import difference

    dtype = torch_dtype(written_code(f.A, f.B, code))
    old_B, old_A = as_tensor(f.B), as_tensor(f.A)
    scale = float(f.scale) * gain
    scaled = old_B.to(torch.float64) * scale
    B = scaled.to(dtype).contiguous()
    A = old_A.to(dtype, copy=True).contiguous()
    rounding_B = torch.linalg.vector_norm(B.to(torch.float64) - scaled).item()
    rounding_A = torch.linalg.vector_norm(A.to(torch.float64) - old_A.to(torch.float64)).item()
    power_of_two = abs(math.frexp(f.scale)[0]) == abs(math.frexp(gain)[0]) == 0.5
    if rounding_A == rounding_B == 0 and power_of_two:
        error = 0.0
    elif math.isfinite(rounding_A) and math.isfinite(rounding_B):
        error = difference(old_B, old_A, scale, B, A) / gain
    else:
        error = math.inf
    return Truncated(B, A, error, *(x if math.isfinite(x) else math.inf for x in (rounding_B, rounding_A)))


def _norm(x: Array) -> float:
    """‖x‖_F in fp64; of numpy arrays without PyTorch, whose import takes longer."""
    if isinstance(x, np.ndarray):
        return float(np.linalg.norm(x.astype(np.float64)))
    import torch

    return float(torch.linalg.vector_norm(as_tensor(x), dtype=torch.float64))


def on_device(factors: Iterable[LoraFactors], device: str, backend: str | None) -> Iterable[LoraFactors]:
    if device == "auto" and backend == "cuda":
        cuda_backend(required=True)
        device = "cuda"
    if device in ("auto", "cpu"):
        return factors
    if device != "cuda":
        raise ParaError(f"device '{device}' is unknown; use auto, cpu or cuda")
    if reason := without_cuda():
        raise ParaError(f"there is no CUDA device to work on ({reason}); use device='cpu'")
    return [replace(f, B=as_tensor(f.B).to(device), A=as_tensor(f.A).to(device)) for f in factors]
