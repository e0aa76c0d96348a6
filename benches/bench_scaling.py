"""How the time grows: with threads, with m + n, with the number of tiny modules; and what memory a call asks for."""

from __future__ import annotations

import os
import statistics
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import anonymous_bytes, seconds
from shapes import LLAMA_3_8B, Shapes, layers, trained_like

from para_ext import LoraFactors, decompose
from para_ext.backends import cpu

ROUNDS = 7


def factors_of(shapes: Shapes, rank: int) -> list[LoraFactors]:
    return [LoraFactors(name, B, A) for name, B, A in trained_like(shapes, rank, torch.float32)]


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="one thread only")
def test_two_threads(benchmark: Any) -> None:
    """Stages of a rank-64 adapter by one thread and by two, in turns."""
    factors = factors_of(layers(LLAMA_3_8B, 16), 64)
    ranks, codes = [16] * len(factors), ["F32"] * len(factors)
    times: dict[tuple[str, int], list[float]] = {}

    def stages(threads: int) -> None:
        cores = None

        def first() -> None:
            nonlocal cores
            cores = cpu.cores(factors, threads)

        for stage, call in (
            ("cores", first),
            ("svd", lambda: cpu.svd(cores, threads)),
            ("truncate", lambda: cpu.truncate(factors, cores, ranks, codes, threads)),
        ):
            times.setdefault((stage, threads), []).append(seconds(call))

    benchmark.group = "two threads"
    benchmark.pedantic(stages, args=(2,), setup=lambda: stages(1), rounds=ROUNDS)
    names = ("cores", "svd", "truncate")
    single, double = ({name: statistics.median(times[name, threads][-ROUNDS:]) for name in names} for threads in (1, 2))
    gains = {name: single[name] / double[name] for name in names}
    gains["all"] = sum(single.values()) / sum(double.values())
    benchmark.extra_info.update(gains)
    print("\ntwo threads against one: " + ", ".join(f"{name} {gain:.2f}×" for name, gain in gains.items()))
    assert gains["all"] > 1.3


def test_tiny_modules(benchmark: Any) -> None:
    """What a module costs beside its arithmetic: 1,000 of 32 × 32, rank 4."""
    factors = factors_of((("tiny.{}", 32, 32, 1000),), 4)

    def call() -> list[LoraFactors]:
        decomposition = decompose(factors, backend="cpu")
        return decomposition.truncate(decomposition.spectra.plan(keep=0.25))

    benchmark.group = "tiny modules"
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=1)
    each = statistics.median(benchmark.stats.stats.data) / len(factors)
    benchmark.extra_info["µs each"] = each * 1e6
    print(f"\ntiny modules: {each * 1e6:.0f} µs each")
    assert each < 500e-6


def test_linear_in_size(benchmark: Any) -> None:
    """Stages 1 and 3 at a fixed rank: four times the rows and columns, four times the time."""
    small, large = (factors_of((("m.{}", size, size, 64),), 32) for size in (2048, 8192))

    def stages(factors: list[LoraFactors]) -> float:
        cores = cpu.cores(factors, 1)
        cpu.svd(cores, 1)
        first = seconds(lambda: cpu.cores(factors, 1))
        return first + seconds(lambda: cpu.truncate(factors, cores, [8] * 64, ["F32"] * 64, 1))

    ratios = []

    def one_round() -> None:
        ratios.append(stages(large) / stages(small))

    benchmark.group = "four times the size"
    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    ratio = statistics.median(ratios)
    benchmark.extra_info["ratio"] = ratio
    print(f"\nfour times the rows and columns: {ratio:.2f} times the time")
    assert ratio < 5


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory(benchmark: Any) -> None:
    """Anonymous memory at its peak, beyond what was there: new factors, r × r matrices and at most 64 MiB."""
    factors = factors_of(layers(LLAMA_3_8B, 16), 64)
    matrices = sum(4 * 8 * f.rank**2 for f in factors)

    def extra() -> int:
        before = peak = anonymous_bytes(os.getpid())
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.001):
                peak = max(peak, anonymous_bytes(os.getpid()))

        watcher = threading.Thread(target=watch)
        watcher.start()
        decomposition = decompose(factors, backend="cpu")
        new = decomposition.truncate(decomposition.spectra.plan(keep=0.25))
        done.set()
        watcher.join()
        return max(peak, anonymous_bytes(os.getpid())) - before - sum(f.B.nbytes + f.A.nbytes for f in new) - matrices

    extra()  # torch and the pool of threads take theirs once
    benchmark.group = "memory"
    most = benchmark.pedantic(extra, rounds=1)
    benchmark.extra_info["bytes"] = most
    print(f"\nbeyond outputs and r × r matrices: {most / 2**20:.1f} MiB")
    assert most <= 64 << 20
