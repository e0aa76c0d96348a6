"""Every stage of every backend, on every kind of factor pair and dtype, against the dense product in fp64."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import BF16, CASES, CODES, FP16, FP32, FP64, Case, instances, powers_of_two
from conftest import Record
from oracles import U32, U64, Dense, dense, gram_bound, qr_bound

from para_ext.backends import Truncated
from para_ext.errors import ParaError
from para_ext.factors import LoraFactors

pytestmark = pytest.mark.usefixtures("one_thread")

INSTANCES = [pytest.param(case, dtype, id=f"{case.name}-{str(dtype)[6:]}") for case, dtype in instances()]

given = functools.cache(Case.factors)


@functools.cache
def oracle(case: Case, dtype: torch.dtype) -> Dense:
    return dense(given(case, dtype))


def supported(backend: Any, f: LoraFactors) -> bool:
    """fp64 factors never reach the native backends."""
    return backend.NAME == "torch" or bool(backend.supports(f))


def require(backend: Any, f: LoraFactors) -> None:
    if not supported(backend, f):
        pytest.skip("fp64 factors go to the torch backend")


def unit_roundoff(f: LoraFactors) -> float:
    """Of the arithmetic that factors of this dtype are promised."""
    return U64 if FP64 in (f.B.dtype, f.A.dtype) else U32


def output_dtype(f: LoraFactors) -> torch.dtype:
    """The dtype in which storage adds nothing to the promised error."""
    return FP64 if unit_roundoff(f) == U64 else FP32


def spectra(backend: Any, factors: Sequence[LoraFactors], threads: int = 1) -> tuple[Any, list[list[float]]]:
    cores = backend.cores(factors, threads)
    return cores, backend.svd(cores, threads)


def truncated(
    backend: Any, factors: Sequence[LoraFactors], ranks: Sequence[int], dtypes: Sequence[torch.dtype], threads: int = 1
) -> list[Truncated]:
    cores, _ = spectra(backend, factors, threads)
    results: list[Truncated] = backend.truncate(factors, cores, ranks, [CODES[d] for d in dtypes], threads)
    return results


def bits(outcome: tuple[list[float], Truncated]) -> tuple[Any, ...]:
    """All that a module's outcome consists of, comparable bit for bit."""
    sigma, t = outcome
    integers = [x.reshape(-1).view(torch.uint8).tolist() for x in (t.B, t.A)]
    return [s.hex() for s in sigma], integers, t.error.hex(), t.rounding_B.hex(), t.rounding_A.hex()


def outcomes(
    backend: Any, factors: Sequence[LoraFactors], threads: int = 1
) -> dict[str, tuple[list[float], Truncated]]:
    """Spectrum and truncation to half the rank of each module by name."""
    cores, sigma = spectra(backend, factors, threads)
    ranks = [(f.rank + 1) // 2 for f in factors]
    results = backend.truncate(factors, cores, ranks, [CODES[f.B.dtype] for f in factors], threads)
    return {f.name: pair for f, pair in zip(factors, zip(sigma, results, strict=True), strict=True)}


def same_bits(a: dict[str, tuple[list[float], Truncated]], b: dict[str, tuple[list[float], Truncated]]) -> list[str]:
    """Names of the modules whose outcomes differ."""
    return [name for name in a if bits(a[name]) != bits(b[name])]


# --- stage 1 and 2 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "dtype"), INSTANCES)
def test_singular_values(backend: Any, case: Case, dtype: torch.dtype, record: Record) -> None:
    f, reference = given(case, dtype), oracle(case, dtype)
    require(backend, f)
    values = spectra(backend, [f])[1][0]

    assert len(values) == min(f.rank, f.m, f.n)
    assert values == sorted(values, reverse=True)
    assert values[-1] >= 0
    gram = backend.NAME != "torch"
    limit = (gram_bound if gram else qr_bound)(reference.S, reference.beta, f.rank)
    error = (reference.sigma(values) - reference.S).abs()
    assert bool((error <= limit).all()), f"error / bound {float((error / limit).max()):.3g}"
    if reference.beta > 0:
        ratio = 30 * float((error / limit).max())
        record("sigma, Gram" if gram else "sigma, QR", backend.NAME, f"{case.name} {dtype}", ratio)


# --- stage 3 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "dtype"), INSTANCES)
def test_truncation(backend: Any, case: Case, dtype: torch.dtype, record: Record) -> None:
    """√(‖ΔW − B'A'‖² − tail²), measured as ‖B'A' − (ΔW)_k‖_F, which has no cancellation.

    With D = B'A' − (ΔW)_k and the tail T = ΔW − (ΔW)_k: ‖ΔW − B'A'‖² − ‖T‖² = ‖D‖² − 2⟨D, T⟩. ⟨D, T⟩ sees only the part
    of D between the dropped subspaces; B'A' has rank k, so that part is of second order, at most about ‖D‖²/σ_k, and
    |⟨D, T⟩| ≤ ‖D‖²·σ_{k+1}/σ_k ≤ ‖D‖²/2: the two agree to within a factor √2 wherever σ_k ≥ 2σ_{k+1}.
    """
    f, reference = given(case, dtype), oracle(case, dtype)
    require(backend, f)
    ranks = reference.gaps() or [min(f.rank, f.m, f.n)]
    unit = f.rank * unit_roundoff(f) * reference.beta
    results = truncated(backend, [f] * len(ranks), ranks, [output_dtype(f)] * len(ranks))

    for k, result in zip(ranks, results, strict=True):
        error = float((reference.product(result.B, result.A) - reference.best(k)).norm())
        assert error <= 30 * unit, f"rank {k}: error / unit {error / unit:.3g}"
        if unit > 0:
            record("truncation", backend.NAME, f"{case.name} {dtype} k={k}", error / unit)


@pytest.mark.parametrize(("case", "dtype"), INSTANCES)
def test_shapes_and_zero_fill(backend: Any, case: Case, dtype: torch.dtype) -> None:
    f = given(case, dtype)
    require(backend, f)
    full = min(f.rank, f.m, f.n)
    none, whole, above = truncated(backend, [f] * 3, [0, full, full + 3], [FP32, dtype, dtype])

    assert (none.B.shape, none.A.shape, none.B.dtype) == ((f.m, 0), (0, f.n), FP32)
    assert none.rounding_B == none.rounding_A == 0
    assert (whole.B.shape, whole.A.shape) == ((f.m, full), (full, f.n))
    assert (above.B.shape, above.A.shape) == ((f.m, full + 3), (full + 3, f.n))
    assert not above.B[:, full:].any()
    assert not above.A[full:].any()
    for t in (none, whole, above):
        assert t.B.is_contiguous()
        assert t.A.is_contiguous()
    for t in (whole, above):
        assert t.B.dtype == t.A.dtype == dtype
    assert torch.equal(above.B[:, :full], whole.B)
    assert torch.equal(above.A[:full], whole.A)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16, FP64], ids=lambda dtype: str(dtype)[6:])
def test_balanced_with_orthogonal_components(backend: Any, dtype: torch.dtype) -> None:
    """B'ᵀB' = A'A'ᵀ = diag(σ₁ … σ_k), to the precision of the output."""
    f = given(next(case for case in CASES if case.name == "lora-r16"), dtype)
    require(backend, f)
    _, (sigma,) = spectra(backend, [f])
    (t,) = truncated(backend, [f], [6], [FP32])

    expected = torch.tensor(sigma[:6], dtype=torch.float64).diag()
    tolerance = 1e-5 * sigma[0]
    for gram in (t.B.double().mT @ t.B.double(), t.A.double() @ t.A.double().mT):
        assert float((gram - expected).abs().max()) <= tolerance


# --- the certificate of stage 3 --------------------------------------------------------------------------------------


def test_certificate(backend: Any, record: Record) -> None:
    """Never below the true error; above three times it in at most 1 % of all cases, dtypes and ranks."""
    below, loose, count = [], [], 0
    for case, dtype in instances():
        f, reference = given(case, dtype), oracle(case, dtype)
        if not supported(backend, f):
            continue
        full = min(f.rank, f.m, f.n)
        half = (full + 1) // 2
        jobs = [(0, FP32), (half, FP32), (half, BF16), (half, FP16), (full, FP32 if dtype == FP64 else dtype)]
        results = truncated(backend, [f] * len(jobs), [k for k, _ in jobs], [out for _, out in jobs])
        for (k, out), t in zip(jobs, results, strict=True):
            if not (t.B.isfinite().all() and t.A.isfinite().all()):
                assert t.error == math.inf
                assert math.inf in (t.rounding_B, t.rounding_A)
                continue
            true = float((reference.W - reference.product(t.B, t.A)).norm())
            error = float(reference.sigma([t.error]))
            where = f"{case.name} {dtype} k={k} → {out}: {error:.3g} for {true:.3g}"
            count += 1
            if error < true * (1 - 1e-12):
                below.append(where)
            if error > 3 * true:
                loose.append(where)
            elif true > 0:
                record("certificate / true, ×10", backend.NAME, where, 10 * error / true)
    assert not below
    assert count > 1000
    assert len(loose) <= count / 100, f"{len(loose)} of {count}: {loose}"


def test_rounding_is_measured(backend: Any) -> None:
    f = given(next(case for case in CASES if case.name == "lora-r16"), FP32)
    wide, narrow = truncated(backend, [f] * 2, [8, 8], [FP32, BF16])
    for which in ("B", "A"):
        stored, unrounded = getattr(narrow, which).double(), getattr(wide, which).double()
        measured = getattr(narrow, f"rounding_{which}")
        assert measured == pytest.approx(float((stored - unrounded).norm()), rel=1e-3)
        assert measured > 1000 * getattr(wide, f"rounding_{which}")


def test_overflow_in_storage_is_told(backend: Any) -> None:
    f = given(next(case for case in CASES if case.name == "largest-fp32"), FP32)
    (t,) = truncated(backend, [f], [2], [FP16])
    assert t.error == t.rounding_B == t.rounding_A == math.inf


# --- determinism -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16, FP64], ids=lambda dtype: str(dtype)[6:])
def test_same_bits_for_any_threads_order_and_batch(backend: Any, dtype: torch.dtype) -> None:
    factors = [f for case in CASES if dtype in case.dtypes for f in [given(case, dtype)] if supported(backend, f)]
    if not factors:
        pytest.skip("fp64 factors go to the torch backend")
    together = outcomes(backend, factors, threads=2)
    order = torch.randperm(len(factors), generator=torch.Generator().manual_seed(1)).tolist()
    assert same_bits(together, outcomes(backend, [factors[i] for i in order], threads=1)) == []
    alone: dict[str, tuple[list[float], Truncated]] = {}
    for f in factors:
        alone |= outcomes(backend, [f], threads=2)
    assert same_bits(together, alone) == []


def test_column_scaling_by_powers_of_two_changes_no_bit(backend: Any) -> None:
    """(B·D)(D⁻¹·A) is the same product, and scaling by powers of two is exact in every step."""
    g = torch.Generator().manual_seed(5)
    for m, r, n in ((40, 6, 30), (200, 16, 130), (70, 33, 150)):
        B, A = torch.randn(m, r, generator=g), torch.randn(r, n, generator=g)
        D = powers_of_two(g, r, 12).float()
        plain, scaled = LoraFactors("x", B, A), LoraFactors("x", B * D, A / D[:, None])
        one, other = outcomes(backend, [plain]), outcomes(backend, [scaled])
        assert one["x"][0] == other["x"][0]
        assert torch.equal(one["x"][1].B, other["x"][1].B)
        assert torch.equal(one["x"][1].A, other["x"][1].A)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=lambda dtype: str(dtype)[6:])
def test_flushing_subnormals_changes_no_bit(backend: Any, dtype: torch.dtype) -> None:
    factors = [given(case, dtype) for case in CASES if "subnormal" in case.name and dtype in case.dtypes]
    kept = outcomes(backend, factors)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        flushed = outcomes(backend, factors)
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(kept, flushed) == []
    assert all(sigma[0] > 0 for sigma, _ in kept.values())


# --- what a batch may hold -------------------------------------------------------------------------------------------


def test_empty_batch(backend: Any) -> None:
    cores, sigma = spectra(backend, [])
    assert sigma == []
    assert backend.truncate([], cores, [], [], 1) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["B", "A"])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16, FP64], ids=lambda dtype: str(dtype)[6:])
def test_module_that_is_not_finite_is_named(backend: Any, dtype: torch.dtype, which: str, value: float) -> None:
    g = torch.Generator().manual_seed(2)

    def module(name: str) -> LoraFactors:
        return LoraFactors(name, torch.randn(50, 5, generator=g).to(dtype), torch.randn(5, 35, generator=g).to(dtype))

    good = [module("layers.0.good"), module("layers.1.good")]
    bad, later = module("layers.2.bad"), module("layers.3.bad")
    require(backend, bad)
    getattr(bad, which)[-1, -1] = value
    later.B[0, 0] = later.A[0, 0] = value
    with pytest.raises(ParaError, match=rf"module 'layers\.2\.bad': {which} "):
        backend.cores([good[0], bad, good[1], later], 2)
    assert all(math.isfinite(s) for sigma in spectra(backend, good)[1] for s in sigma)


def test_inputs_are_not_changed(backend: Any) -> None:
    factors = [case.factors(FP32) for case in CASES if case.name in ("lora-r16", "transposed", "sliced", "scale-third")]
    before = [(f.B.clone(), f.A.clone()) for f in factors]
    outcomes(backend, factors)
    assert all(torch.equal(f.B, B) and torch.equal(f.A, A) for f, (B, A) in zip(factors, before, strict=True))
