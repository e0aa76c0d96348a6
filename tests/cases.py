"""Every kind of factor pair that the numerical tests run on: one list, named, seeded, the same for all backends.

A case makes an fp64 master pair; cast to a dtype, the cast values are the truth. Add a case by adding a line to CASES.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from para_ext.factors import LoraFactors

FP32, FP16, BF16, FP64 = DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CODES = {FP32: "F32", FP16: "F16", BF16: "BF16", FP64: "F64"}

Pair = tuple[Tensor, Tensor]
Make = Callable[[torch.Generator], Pair]
Layout = Callable[[Tensor], Tensor]


def _same(t: Tensor) -> Tensor:
    return t


@dataclass(frozen=True)
class Case:
    """A named pair B [m, r], A [r, n] in fp64, and how it is given: scale, dtypes in which it is finite, strides."""

    name: str
    make: Make
    scale: float = 2.0
    dtypes: tuple[torch.dtype, ...] = DTYPES
    layout: Layout = _same
    a_dtype: torch.dtype | None = None

    def factors(self, dtype: torch.dtype) -> LoraFactors:
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        B, A = self.make(generator)
        B, A = self.layout(B.to(dtype)), self.layout(A.to(self.a_dtype or dtype))
        assert B.isfinite().all() and A.isfinite().all(), self.name
        return LoraFactors(self.name, B, A, self.scale)


def gaussian(g: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=g, dtype=torch.float64)


def orthonormal(g: torch.Generator, rows: int, columns: int) -> Tensor:
    Q: Tensor = torch.linalg.qr(gaussian(g, rows, columns)).Q
    return Q


def powers_of_two(g: torch.Generator, count: int, reach: int) -> Tensor:
    exponents = torch.randint(-reach, reach + 1, (count,), generator=g)
    return torch.pow(2.0, exponents.double())


# --- known spectra ---------------------------------------------------------------------------------------------------


def product(s: Tensor, a: float = 0.5, condition: float = 1.0, m: int = 96, n: int = 72) -> Make:
    """B = Q1 diag(s^a) W, A = W⁻¹ diag(s^(1−a)) Q2ᵀ: singular values s; W cancels in BA, but not in B and A."""

    def make(g: torch.Generator) -> Pair:
        r = len(s)
        P, Q = orthonormal(g, r, r), orthonormal(g, r, r)
        w = _geometric(r, condition) * math.sqrt(condition)
        B = orthonormal(g, m, r) * s**a @ (P * w @ Q.mT)
        A = (Q / w @ P.mT) @ (orthonormal(g, n, r) * s ** (1 - a)).mT
        return B, A

    return make


def _geometric(r: int, condition: float) -> Tensor:
    return torch.logspace(0, -math.log10(condition), r, dtype=torch.float64)


def _arithmetic(r: int, condition: float) -> Tensor:
    return torch.linspace(1, 1 / condition, r, dtype=torch.float64)


def _last_small(r: int, condition: float) -> Tensor:
    s = torch.ones(r, dtype=torch.float64)
    s[-1] = 1 / condition
    return s


def _one_large(r: int, condition: float) -> Tensor:
    s = torch.full((r,), 1 / condition, dtype=torch.float64)
    s[0] = 1
    return s


def _log_random(r: int, condition: float) -> Tensor:
    g = torch.Generator().manual_seed(r)
    exponents: Tensor = torch.rand(r, generator=g, dtype=torch.float64).sort().values
    return torch.exp(-exponents * math.log(condition))


def _repeated(r: int) -> Tensor:
    return 0.25 ** (torch.arange(r) // 3).double()


def lora(r: int, m: int = 160, n: int = 112) -> Make:
    """As training leaves it: A stays close to its Gaussian start, B, which started at zero, carries the decay."""

    def make(g: torch.Generator) -> Pair:
        decay = (1 + torch.arange(r, dtype=torch.float64)) ** -1.5
        B = 0.05 * orthonormal(g, m, min(m, r)) @ gaussian(g, min(m, r), r) @ (orthonormal(g, r, r) * decay)
        return B, gaussian(g, r, n) / math.sqrt(n)

    return make


# --- matrices with a name --------------------------------------------------------------------------------------------


def beside_gaussian(left: Callable[[], Tensor], n: int = 50) -> Make:
    """A given B, and a Gaussian A."""

    def make(g: torch.Generator) -> Pair:
        B = left()
        return B, gaussian(g, B.shape[1], n)

    return make


def _kahan(r: int = 20, theta: float = 1.2) -> Tensor:
    s, c = math.sin(theta), math.cos(theta)
    upper = torch.eye(r, dtype=torch.float64) - c * torch.ones(r, r, dtype=torch.float64).triu(1)
    return s ** torch.arange(r, dtype=torch.float64)[:, None] * upper


def _hilbert(m: int = 40, r: int = 12) -> Tensor:
    return 1 / (1 + torch.arange(m, dtype=torch.float64)[:, None] + torch.arange(r))


def _vandermonde(m: int = 60, r: int = 12) -> Tensor:
    return torch.linspace(-1, 1, m, dtype=torch.float64)[:, None] ** torch.arange(r)


def _lauchli(r: int = 9, eps: float = 1e-9) -> Tensor:
    return torch.cat([torch.ones(1, r, dtype=torch.float64), eps * torch.eye(r, dtype=torch.float64)])


def _graded_columns(g: torch.Generator) -> Pair:
    return gaussian(g, 70, 20) * 2.0 ** -torch.arange(20).double(), gaussian(g, 20, 50)


def _graded_rows(g: torch.Generator) -> Pair:
    return 2.0 ** -torch.arange(40).double()[:, None] * gaussian(g, 40, 12), gaussian(g, 12, 50)


def _rescaled(g: torch.Generator) -> Pair:
    D = powers_of_two(g, 16, 8)
    return gaussian(g, 80, 16) * D, gaussian(g, 16, 60) / D[:, None]


def _demmel_veselic(g: torch.Generator) -> Pair:
    """D A0 D with a well-conditioned A0: small singular values that only a Jacobi-like method gets right."""
    D = torch.logspace(0, -4, 12, dtype=torch.float64)
    A0 = torch.eye(12, dtype=torch.float64) + 0.1 * gaussian(g, 12, 12)
    return orthonormal(g, 60, 12) @ (D[:, None] * A0), D[:, None] * orthonormal(g, 50, 12).mT


# --- degenerate ------------------------------------------------------------------------------------------------------


def plain(m: int, r: int, n: int, magnitude_B: float = 1.0, magnitude_A: float = 1.0) -> Make:
    """Uniform entries in [-magnitude, magnitude], at least one of them at the end of its interval."""

    def make(g: torch.Generator) -> Pair:
        B = 2 * torch.rand(m, r, generator=g, dtype=torch.float64) - 1
        A = 2 * torch.rand(r, n, generator=g, dtype=torch.float64) - 1
        B[-1, 0] = A[0, -1] = 1
        return B * magnitude_B, A * magnitude_A

    return make


def changed(change: Callable[[Tensor, Tensor], object], m: int = 40, r: int = 6, n: int = 30) -> Make:
    """A Gaussian pair after ``change(B, A)`` in place."""

    def make(g: torch.Generator) -> Pair:
        B, A = gaussian(g, m, r), gaussian(g, r, n)
        change(B, A)
        return B, A

    return make


def _duplicate_columns(B: Tensor, A: Tensor) -> None:
    B[:, 1], B[:, 4], A[3] = B[:, 0], -2 * B[:, 2], A[5]


def _rank_one(B: Tensor, A: Tensor) -> None:
    B[:] = B[:, :1]
    A[:] = A[:1]


def _cancelling(B: Tensor, A: Tensor) -> None:
    """BA = 0 with large factors, but for what is lost when B + 1e-3 is rounded."""
    r = len(A) // 2
    B[:, r:] = B[:, :r] + 1e-3
    A[r:] = -A[:r]


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


def _sliced(t: Tensor) -> Tensor:
    wide = t.new_zeros(2 * t.shape[0] + 1, 3 * t.shape[1] + 2)
    wide[1::2, 2::3] = t
    return wide[1::2, 2::3]


def _expanded(t: Tensor) -> Tensor:
    return t[:, :1].expand_as(t)


def _constant(m: int, r: int, n: int) -> Make:
    """Where one running sum over the m equal terms loses the most."""
    return lambda g: (torch.full((m, r), 1 / 3, dtype=torch.float64), torch.full((r, n), 0.7, dtype=torch.float64))


CASES: tuple[Case, ...] = (
    *(
        Case(f"product-a{a}-kappa{condition:.0e}", product(_geometric(16, 1e6), a, condition))
        for a in (0.0, 0.5, 1.0)
        for condition in (1.0, 1e4, 1e7)
    ),
    Case("spectrum-arithmetic", product(_arithmetic(13, 1e3), m=90, n=130)),
    Case("spectrum-geometric", product(_geometric(12, 1e10))),
    Case("spectrum-geometric-slow", product(_geometric(16, 50.0), 1.0)),
    Case("spectrum-last-small", product(_last_small(10, 1e8))),
    Case("spectrum-one-large", product(_one_large(10, 1e5), 1.0)),
    Case("spectrum-log-random", product(_log_random(15, 1e8), 0.25, m=64, n=64)),
    Case("spectrum-repeated", product(_repeated(12))),
    Case("kahan", beside_gaussian(_kahan)),
    Case("hilbert", beside_gaussian(_hilbert)),
    Case("vandermonde", beside_gaussian(_vandermonde)),
    Case("lauchli", beside_gaussian(_lauchli)),
    Case("graded-columns", _graded_columns),
    Case("graded-rows", _graded_rows),
    Case("rescaled-columns", _rescaled),
    Case("demmel-veselic", _demmel_veselic),
    *(Case(f"lora-r{r}", lora(r)) for r in (2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65)),
    Case("lora-r128", lora(128, 144, 200), dtypes=(FP32, BF16, FP64)),
    Case("lora-r200", lora(200, 260, 210), dtypes=(FP32, BF16)),
    Case("zero-B", changed(lambda B, A: B.zero_())),
    Case("zero-A", changed(lambda B, A: A.zero_())),
    Case("zero-both", changed(lambda B, A: (B.zero_(), A.zero_()))),
    Case("zero-scale", plain(20, 4, 30), scale=0.0),
    Case("zero-column-of-B", changed(lambda B, A: B[:, 2].zero_())),
    Case("zero-row-of-A", changed(lambda B, A: A[0].zero_())),
    Case("zero-column-meets-zero-row", changed(lambda B, A: (B[:, 1].zero_(), A[4].zero_()))),
    Case("duplicate-columns", changed(_duplicate_columns)),
    Case("rank-one", changed(_rank_one)),
    Case("cancelling", changed(_cancelling)),
    Case("r-above-m", plain(5, 9, 40)),
    Case("r-above-n", plain(40, 9, 5)),
    Case("r-above-both", plain(7, 20, 6)),
    Case("r-above-both-large", plain(30, 70, 41)),
    Case("r1", plain(33, 1, 21)),
    Case("m1", plain(1, 4, 21)),
    Case("n1", plain(33, 4, 1)),
    Case("all-1", plain(1, 1, 1)),
    Case("r-is-m", plain(12, 12, 12)),
    Case("transposed", plain(37, 8, 29), layout=_transposed),
    Case("sliced", plain(37, 8, 29), layout=_sliced),
    Case("expanded", plain(37, 8, 29), layout=_expanded),
    Case("mixed-with-fp32", lora(8), a_dtype=FP32),
    Case("mixed-with-bf16", lora(8), a_dtype=BF16),
    Case("mixed-with-fp64", lora(8), a_dtype=FP64),
    Case("negative-scale", lora(8), scale=-0.7),
    Case("scale-third", lora(16), scale=1 / 3),
    Case("scale-tiny", plain(20, 4, 30), scale=1e-30),
    Case("largest-fp32", plain(60, 8, 40, 3e38, 3e38), scale=2.0**-6, dtypes=(FP32, BF16, FP64)),
    Case("large-and-small", plain(60, 8, 40, 3e38, 1e-38), dtypes=(FP32, BF16, FP64)),
    Case("small-fp32", plain(60, 8, 40, 1e-38, 1e-38), dtypes=(FP32, BF16, FP64)),
    Case("subnormal-fp32", plain(60, 8, 40, 1e-42, 1.0), dtypes=(FP32, FP64)),
    Case("subnormal-bf16", plain(60, 8, 40, 1e-39, 1.0), dtypes=(BF16, FP32)),
    Case("subnormal-fp16", plain(60, 8, 40, 1e-6, 1.0), dtypes=(FP16,)),
    Case("largest-fp16", plain(60, 8, 40, 65504, 65504), dtypes=(FP16, FP32)),
    Case("largest-fp64", plain(60, 8, 40, 1e150, 1e150), dtypes=(FP64,)),
    Case("smallest-fp64", plain(60, 8, 40, 1e-150, 1e-150), dtypes=(FP64,)),
    Case("opposite-fp64", plain(60, 8, 40, 1e300, 1e-300), dtypes=(FP64,)),
    Case("subnormal-fp64", plain(60, 8, 40, 1e-310, 1e10), dtypes=(FP64,)),
    Case("constant-r1", _constant(128256, 1, 3), dtypes=(FP32, FP64)),
    Case("constant-r1-wide", _constant(5, 1, 14336)),
)


def instances() -> list[tuple[Case, torch.dtype]]:
    """Every case in every dtype it has."""
    return [(case, dtype) for case in CASES for dtype in case.dtypes]
