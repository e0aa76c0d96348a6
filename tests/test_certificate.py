"""The certificate is never below the truth, tight, exactly 0 for what is equal, and safe over all of fp64's range."""

from __future__ import annotations

import math

import pytest
import torch
from cases import BF16, DTYPES, FP16, FP32, FP64, gaussian, powers_of_two
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import para_ext
from para_ext import LoraFactors
from para_ext.certificate import blocked, difference, joined, norm, triangle

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(40, 5, 30), (7, 3, 500), (500, 3, 7), (6, 20, 9), (1, 1, 1), (1, 4, 30), (30, 4, 1)]


def pair(seed: int, m: int, r: int, n: int, dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return gaussian(g, m, r).to(dtype), gaussian(g, r, n).to(dtype)


def truth(B: Tensor, A: Tensor, scale: float, B2: Tensor, A2: Tensor) -> float:
    return float((scale * (B.double() @ A.double()) - B2.double() @ A2.double()).norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32), (FP16, BF16), (FP64, FP64)], ids=str)
def test_unrelated_pairs(shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    m, r, n = shape
    B, A = pair(1, m, r, n, dtypes[0])
    for k in (0, 1, r, r + 2):
        B2, A2 = pair(2, m, k, n, dtypes[1])
        true = truth(B, A, -0.7, B2, A2)
        assert true * (1 - 1e-12) <= difference(B, A, -0.7, B2, A2) <= true * (1 + 1e-10)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 2.0, 1 / 3, -1.7]),
    distance=st.floats(1e-16, 1.0),
)
def test_small_changes(
    seed: int, shape: tuple[int, int, int], dtype: torch.dtype, scale: float, distance: float
) -> None:
    """Against the product of the differences, which has none of the cancellation that ΔW − ΔW' has."""
    B, A = pair(seed, *shape, dtype)
    dB, dA = pair(seed + 1, *shape, FP64)
    B2, A2 = scale * B.double() + distance * dB, A.double() + distance * dA
    true = float(((B2 - scale * B.double()) @ A2 + scale * B.double() @ (A2 - A.double())).norm())
    columns = B2.norm(dim=0) @ A2.norm(dim=1) + abs(scale) * B.double().norm(dim=0) @ A.double().norm(dim=1)
    allowance = 60 * 2 * shape[1] * 2.0**-53 * float(columns)
    assert true * (1 - 1e-12) <= difference(B, A, scale, B2, A2) <= true * (1 + 1e-12) + allowance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_products_are_zero_apart(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    B, A = pair(3, *shape, dtype)
    D = powers_of_two(torch.Generator().manual_seed(4), shape[1], 3)
    assert difference(B, A, 1.0, B, A) == 0.0
    assert difference(B, A, 1.0, B.double(), A.mT.contiguous().mT) == 0.0
    assert difference(B, A, 0.25, 0.25 * B.double(), A) == 0.0
    assert difference(B, A, -2.0, -2.0 * B.double(), A) == 0.0
    assert difference(B, A, 2.0, B, 2.0 * A.double()) == 0.0
    assert difference(B, A, 1.0, B.double() * D, A.double() / D[:, None]) == 0.0
    assert difference(0 * B, A, 0.3, B[:, :0], A[:0]) == 0.0


def test_one_changed_bit_is_seen() -> None:
    B, A = pair(5, 40, 5, 30)
    B2 = B.clone()
    B2[7, 2] = torch.nextafter(B2[7, 2], torch.tensor(math.inf))
    true = float((B2[7, 2].double() - B[7, 2].double()).abs() * A[2].double().norm())
    assert true <= difference(B, A, 1.0, B2, A) <= 1.001 * true


def test_scale_that_is_no_power_of_two_is_not_called_exact() -> None:
    B, A = pair(6, 40, 5, 30)
    assert 0 < difference(B, A, 0.3, (0.3 * B.double()), A) < 1e-11


@pytest.mark.parametrize(
    ("b", "a"), [(1e300, 1e-300), (1e-300, 1e300), (1e150, 1e150), (1e-150, 1e-150), (1e-310, 1e10)]
)
def test_range(b: float, a: float) -> None:
    """Powers of two near these magnitudes change the bound by exactly their product."""
    b, a = (2.0 ** round(math.log2(x)) for x in (b, a))
    (B, A), (B2, A2) = pair(7, 40, 5, 30), pair(8, 40, 3, 30)
    expected = math.frexp(difference(B, A, 0.5, B2, A2))
    moved = difference(B.double() * b, A.double() * a, 0.5, B2.double() * b, A2.double() * a)
    subnormal = b < 1e-300 and a > 1
    assert math.frexp(moved)[0] == pytest.approx(expected[0], rel=1e-3 if subnormal else 1e-14)
    assert math.frexp(moved)[1] == expected[1] + round(math.log2(b) + math.log2(a))
    assert norm(B.double() * b, A.double() * a, 0.5) > 0


def test_what_exceeds_fp64_or_is_not_finite_is_infinite() -> None:
    B, A = pair(9, 10, 2, 10, FP64)
    assert difference(B * 1e200, A * 1e200, 1.0, B, A) == math.inf
    for bad in (math.inf, math.nan):
        worse = B.clone()
        worse[3, 1] = bad
        assert difference(B, A, 1.0, worse, A) == math.inf
        assert difference(B, A, 1.0, B, worse.mT) == math.inf


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm(shape: tuple[int, int, int]) -> None:
    B, A = pair(10, *shape)
    assert norm(B, A, -1.5) == pytest.approx(float((1.5 * B.double() @ A.double()).norm()), rel=1e-12)
    assert norm(B * 0, A, 2.0) == 0.0


def test_factors_that_need_gradients_are_only_read() -> None:
    B, A = (t.requires_grad_() for t in pair(11, 10, 2, 10))
    assert difference(B, A, 1.0, B, A) == 0.0
    assert norm(B, A, 1.0) > 0
    assert B.requires_grad


# --- its parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 3, 4, 511, 512, 513, 1024, 5000, 70001])
def test_triangle(m: int) -> None:
    """RᵀR = XᵀX for any number of blocks."""
    X = gaussian(torch.Generator().manual_seed(m), m, 4)
    R = triangle(X)
    assert R.shape == (min(m, 4), 4)
    assert torch.equal(R, R.triu())
    assert torch.allclose(R.mT @ R, X.mT @ X, rtol=0, atol=1e-14 * float(X.norm()) ** 2)


def test_triangle_of_a_long_constant_column() -> None:
    """One LAPACK call is off by 1500 u here."""
    X = torch.full((128256, 1), 0.7, dtype=FP64)
    assert float(triangle(X).abs()) == pytest.approx(0.7 * math.sqrt(128256), rel=10 * 2.0**-53)


@pytest.mark.parametrize(("m", "count", "rest"), [(128, 0, 128), (129, 1, 1), (256, 2, 0), (300, 2, 44)])
def test_blocks_and_rest_are_all_rows(m: int, count: int, rest: int) -> None:
    X = gaussian(torch.Generator().manual_seed(0), m, 2)
    blocks, tail = blocked(X)
    assert (len(blocks), len(tail)) == (count, rest)
    assert torch.equal(torch.cat([blocks.flatten(0, 1), tail]), X)


def test_joined_is_the_sum() -> None:
    (B, A), (B2, A2) = pair(12, 20, 3, 15), pair(13, 20, 2, 15, BF16)
    X, Y, exponent = joined((B, A, -3.0), (B2, A2, 0.1))
    assert X.shape == (20, 5)
    assert Y.shape == (15, 5)
    assert max(float(X.abs().max()), float(Y.abs().max())) <= 1
    expected = -3 * (B.double() @ A.double()) + 0.1 * (B2.double() @ A2.double())
    assert torch.allclose(X @ Y.mT * 2.0**exponent, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(("rank", "decay", "k"), [(104, 2.0, 64), (128, 1.0, 127), (128, 4.0, 96)])
def test_large_graded_cores(backend: str, rank: int, decay: float, k: int) -> None:
    """Cores above the native rank whose singular values fall far below what MᵀM can tell apart."""
    if backend == "cpu":
        pytest.importorskip("para_ext._cpu", reason="the native core is not built here", exc_type=ImportError)
    generator = torch.Generator().manual_seed(1)
    B = torch.randn(160, rank, generator=generator) * torch.exp2(-decay * torch.arange(rank))
    A = torch.randn(rank, 150, generator=generator)
    d = para_ext.decompose([LoraFactors("x", B, A)], backend=backend)
    (new,) = d.truncate_certified({"x": k})
    true = difference(B, A, 1.0, new.B, new.A)
    assert true <= 1e-7 * d.betas[0]
    assert true <= 2 * new.error
    assert new.error <= 3 * true
