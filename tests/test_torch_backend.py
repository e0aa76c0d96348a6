"""What is particular to the torch backend and to its pool of single-threaded workers."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import TypeVar

import pytest
import torch
from cases import BF16, CODES, FP16, FP32, FP64, gaussian
from oracles import U64

import para_ext.backends.torch as backend
from para_ext.certificate import triangle
from para_ext.errors import ParaError
from para_ext.factors import LoraFactors
from para_ext.pool import map_single_threaded

T = TypeVar("T")


def in_new_thread(function: Callable[[], T]) -> T:
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def compressed(f: LoraFactors, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    cores = backend.cores([f], 1)
    backend.svd(cores, 1)
    (t,) = backend.truncate([f], cores, [rank], [CODES[dtype]], 1)
    return t.B, t.A


# --- the backend -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 1e-6, 1e-41])
def test_output_is_rounded_once(dtype: torch.dtype, magnitude: float) -> None:
    """Every stored value is the nearest one, or one of two nearest: no neighbour is nearer to the fp64 value."""
    g = torch.Generator().manual_seed(1)
    exact = magnitude * gaussian(g, 300, 4)
    if dtype == BF16:  # just above the middle between two bf16 values, on which fp32 rounding would put it
        exact[:2] = torch.tensor([[1 + 2.0**-8 + 2.0**-40], [-1 - 2.0**-8 - 2.0**-40]])
    stored = backend._rounded(exact, dtype)
    assert stored.dtype == dtype
    distance = (stored.double() - exact).abs()
    for direction in (torch.inf, -torch.inf):
        neighbour = torch.nextafter(stored, torch.full_like(stored, direction))
        assert bool(((neighbour.double() - exact).abs() >= distance).all())


def test_rounding_overflows_to_infinity() -> None:
    exact = torch.tensor([1e39, -1e39, 3.4e38, 65519.0, 65521.0], dtype=FP64)
    assert backend._rounded(exact, FP16).tolist() == [torch.inf, -torch.inf, torch.inf, 65504.0, torch.inf]
    assert backend._rounded(exact, BF16).isinf().tolist() == [True, True, True, False, False]


@pytest.mark.parametrize(("m", "r", "n"), [(50, 6, 40), (2000, 4, 700), (5, 9, 40), (40, 9, 5), (3, 9, 4)])
def test_columns_are_accurate_however_small(m: int, r: int, n: int) -> None:
    """With explicit Q, B'ᵀB' = diag(σ) holds to fp64 relative to each column, not only to the largest."""
    g = torch.Generator().manual_seed(2)
    decay = 10.0 ** -torch.arange(r, dtype=FP64)
    f = LoraFactors("x", gaussian(g, m, r) * decay, gaussian(g, r, n), 0.3)
    B, A = compressed(f, r, FP64)
    for gram in (B.mT @ B, A @ A.mT):
        live = gram.diagonal() > 0
        unit = gram[live][:, live] / gram.diagonal()[live].sqrt() / gram.diagonal()[live].sqrt()[:, None]
        assert float((unit - torch.eye(len(unit), dtype=FP64)).abs().max()) < 30 * r * U64


def test_basis_belongs_to_the_triangle() -> None:
    """truncate computes Q again for the U of the first R: they must match, also where the rank is deficient."""
    for m, r in ((300, 8), (128 * 8, 8), (128 * 8 + 3, 8), (5000, 3), (4, 9)):
        X = gaussian(torch.Generator().manual_seed(m), m, r)
        X[:, r // 2] = X[:, 0]
        ((Q, R),) = map_single_threaded(lambda X: (backend._basis(X), triangle(X)), [X], 1)
        assert float((Q @ R - X).abs().max()) < 30 * r * U64 * float(X.norm())
        assert float((Q.mT @ Q - torch.eye(Q.shape[1], dtype=FP64)).abs().max()) < 30 * r * U64


def test_update_beyond_fp64_is_refused() -> None:
    huge = torch.full((3, 2), 1e200, dtype=FP64)
    f = LoraFactors("layers.0.q_proj", huge, huge.mT)
    with pytest.raises(ParaError, match=r"'layers\.0\.q_proj'.*scale its factors"):
        backend.svd(backend.cores([f], 1), 1)


def test_trained_parameters_are_read_without_gradients() -> None:
    g = torch.Generator().manual_seed(3)
    f = LoraFactors("x", gaussian(g, 20, 3).requires_grad_(), gaussian(g, 3, 10).requires_grad_())
    B, A = compressed(f, 2, FP32)
    assert not B.requires_grad
    assert not A.requires_grad


# --- the pool --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_workers_use_one_thread_and_nobody_else_does(threads: int) -> None:
    before, before_new = torch.get_num_threads(), in_new_thread(torch.get_num_threads)
    torch.set_num_threads(before + 2)
    try:
        inside = map_single_threaded(lambda _: torch.get_num_threads(), range(20), threads)
        assert inside == [1] * 20
        assert torch.get_num_threads() == before + 2
        assert in_new_thread(torch.get_num_threads) == before + 2
    finally:
        torch.set_num_threads(before)
    map_single_threaded(abs, [1], threads)
    assert torch.get_num_threads() == before
    assert in_new_thread(torch.get_num_threads) == before_new


def test_setting_of_one_thread_is_not_made_the_default() -> None:
    """A caller's setting that differs from the default: neither moves when workers are born (5: a pool of its own)."""
    default = in_new_thread(torch.get_num_threads)

    def call() -> int:
        torch.get_num_threads()  # a thread's first call of it would undo the next line
        torch.set_num_threads(default + 3)
        in_new_thread(lambda: torch.set_num_threads(default))
        map_single_threaded(abs, range(50), 5)
        return torch.get_num_threads()

    assert in_new_thread(call) == default + 3
    assert in_new_thread(torch.get_num_threads) == default


def test_order_is_kept() -> None:
    def slow_at_first(i: int) -> int:
        time.sleep(0.02 if i == 0 else 0)
        return i * i

    assert map_single_threaded(slow_at_first, range(10), 2) == [i * i for i in range(10)]
    assert map_single_threaded(abs, [], 2) == []


def test_first_exception_in_the_given_order_is_raised() -> None:
    def fail(i: int) -> int:
        if i == 3:
            time.sleep(0.02)
        if i in (3, 4):
            raise ParaError(f"item {i}")
        return i

    with pytest.raises(ParaError, match="item 3"):
        map_single_threaded(fail, range(8), 2)
    assert map_single_threaded(abs, [-1], 2) == [1]


def test_same_bits_for_any_number_of_threads() -> None:
    """torch.linalg on its own differs between 1 and 2 threads at this size."""
    g = torch.Generator().manual_seed(4)
    matrices = [gaussian(g, 128, 128) for _ in range(4)]
    one, two = (map_single_threaded(torch.linalg.svd, matrices, threads) for threads in (1, 2))
    assert all(torch.equal(x, y) for a, b in zip(one, two, strict=True) for x, y in zip(a, b, strict=True))


def test_workers_keep_subnormals_and_record_no_gradients() -> None:
    tiny = torch.tensor(1e-40, requires_grad=True)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:  # 7 threads, so that the workers are born, and inherit, now
        results = map_single_threaded(lambda t: t.double() * 2, [tiny] * 7, 7)
    finally:
        torch.set_flush_denormal(False)
    assert [float(t) for t in results] == [2 * tiny.detach().double().item()] * 7
    assert not any(t.requires_grad for t in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_child_has_workers_of_its_own() -> None:
    map_single_threaded(abs, [1], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork of a process that has threads
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if map_single_threaded(abs, [-1, 2], 2) == [1, 2] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_exact_singular_values_of_a_known_product() -> None:
    """B = [e₁ e₂], A = [3e₁; 4e₂], scale ½: σ = 2, 3/2, with no rounding at all."""
    f = LoraFactors("x", torch.eye(5, 2), torch.diag(torch.tensor([3.0, 4.0])) @ torch.eye(2, 4), 0.5)
    cores = backend.cores([f], 1)
    assert [[Fraction(s) for s in sigma] for sigma in backend.svd(cores, 1)] == [[Fraction(2), Fraction(3, 2)]]
    assert backend.betas(cores) == [pytest.approx(0.5 * 2**0.5 * 5)]
