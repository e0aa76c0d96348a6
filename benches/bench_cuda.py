"""bench_core.py's whole calls on a GPU: factors, new factors and all work between them in its memory.

para_ext's CUDA backend beside torch.linalg on the same tensors, as a loop and as Gram matrices in batches
(plain_torch.py), in turns. Kernels are timed by CUDA's events, calls by the clock until the device has come to rest.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from bench_core import CASES, KEEP, ROUNDS, Pairs, error
from measure import seconds
from plain_torch import compress_pairs, compress_pairs_gram
from shapes import trained_like

from para_ext import LoraFactors, decompose

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

COPIED = 1 << 30  # bytes


def ours(factors: list[LoraFactors]) -> Pairs:
    decomposition = decompose(factors, backend="cuda")
    new = decomposition.truncate(decomposition.spectra.plan(keep=KEEP))
    return [(f.B, f.A) for f in new]


def rested_seconds(call: Callable[[], Any]) -> float:
    """How long a call and all that it launched take."""

    def rested() -> None:
        call()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return seconds(rested)


def copy_rate() -> float:
    """Bytes read and written a second by a copy on the device."""
    source = torch.ones(COPIED, dtype=torch.uint8).cuda()
    target = torch.empty_like(source)
    return 2 * COPIED / min(rested_seconds(lambda: target.copy_(source)) for _ in range(ROUNDS))


@contextmanager
def kernel_events() -> Iterator[dict[str, tuple[Any, Any]]]:
    """Events before and after the launches of each plan that runs meanwhile."""
    from para_ext import _cuda

    events: dict[str, tuple[Any, Any]] = {}

    def timed(name: str, launch: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            events[name] = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[name][0].record()
            launch(*args)
            events[name][1].record()

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda.CoresPlan, "launch", timed("cores, svd", _cuda.CoresPlan.launch))
        patch.setattr(_cuda.TruncatePlan, "launch", timed("truncate", _cuda.TruncatePlan.launch))
        yield events


@pytest.mark.parametrize("name", CASES)
def test_whole_call_on_gpu(benchmark: Any, name: str) -> None:
    case = CASES[name]
    host = [(n, B, A) for n, B, A in trained_like(case.shapes, case.rank, case.dtype)]
    factors = [LoraFactors(n, B.cuda(), A.cuda(), 2.0) for n, B, A in host]
    pairs = [(f.B, f.A, f.scale) for f in factors]
    methods: dict[str, Callable[[], Pairs]] = {
        "torch QR": lambda: compress_pairs(pairs, KEEP),
        "torch Gram": lambda: compress_pairs_gram(pairs, KEEP),
    }

    def lost(new: Pairs) -> float:
        return error([(B, A, 2.0) for _, B, A in host], [(B.cpu(), A.cpu()) for B, A in new])

    expected = ours(factors)  # a warm-up too
    for method in methods.values():
        assert lost(method()) == pytest.approx(lost(expected), rel=1e-3)
    moved = sum(
        2 * (f.B.nbytes + f.A.nbytes) + B.nbytes + A.nbytes for f, (B, A) in zip(factors, expected, strict=True)
    )

    times: dict[str, list[float]] = {}

    def other_methods() -> None:
        for method, call in methods.items():
            times.setdefault(method, []).append(rested_seconds(call))
        with kernel_events() as events:
            rested_seconds(lambda: ours(factors))
        for plan, (start, end) in events.items():
            times.setdefault(plan, []).append(start.elapsed_time(end) * 1e-3)

    def one_round() -> None:
        ours(factors)
        torch.cuda.synchronize()

    benchmark.group = f"{name}, GPU"
    benchmark.pedantic(one_round, setup=other_methods, rounds=ROUNDS)
    medians = {key: statistics.median(values) for key, values in times.items()}
    whole = statistics.median(benchmark.stats.stats.data)
    benchmark.extra_info.update(medians, whole=whole, GPU=torch.cuda.get_device_name(), copy=moved / copy_rate())
    for method in methods:
        benchmark.extra_info[f"× {method}"] = medians[method] / whole
        assert medians[method] > whole
