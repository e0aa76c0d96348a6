"""Factors in, factors out, on shapes of well-known models: beside the same in plain torch twice, and beside the floor.

A round times the three methods and the machine one after the other, so that all see the machine in the same mood; all
results of a round are alive until it ends, so that every call writes to memory that is fresh to the process, as users'
calls do; that the machine has it is seen to before each (`machine.back`). What
is timed with para_ext is everything: checks, cores, SVD, plan, new factors with their certificates.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from machine import back, floor, rates
from measure import seconds
from plain_torch import compress_pairs, compress_pairs_gram
from shapes import LLAMA_3_8B, MINILM_L6, ROBERTA_BASE, SDXL_UNET, Shapes, layers, trained_like

from para_ext import LoraFactors, _cpu, decompose
from para_ext.backends import cpu
from para_ext.pool import map_single_threaded

KEEP = 0.25
ROUNDS = 7

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


class Case(NamedTuple):
    """Shapes, rank, dtype; and what we want to reach: × torch QR, × torch Gram, at most × the floor."""

    shapes: Shapes
    rank: int
    dtype: torch.dtype
    qr: float
    gram: float
    floor: float | None = None


FP32, BF16 = torch.float32, torch.bfloat16
LLAMA_8 = layers(LLAMA_3_8B, 8)
CASES = {
    "Llama-3-8B r=16 fp32": Case(LLAMA_3_8B, 16, FP32, 10, 3.5, 2.2),
    "Llama-3-8B r=16 bf16": Case(LLAMA_3_8B, 16, BF16, 10, 3.5, 3),
    "Llama-3-8B r=64 fp32": Case(LLAMA_3_8B, 64, FP32, 10, 4, 2.2),
    "Llama-3-8B r=64 bf16": Case(LLAMA_3_8B, 64, BF16, 10, 4, 2.2),
    "Llama-3-8B/4 r=128 fp32": Case(LLAMA_8, 128, FP32, 8, 4, 2.5),
    "Llama-3-8B/4 r=256 fp32": Case(LLAMA_8, 256, FP32, 5, 2.5, 2.5),
    "SDXL UNet r=16 fp32": Case(SDXL_UNET, 16, FP32, 8, 2.5, 3.5),
    "SDXL UNet r=64 fp32": Case(SDXL_UNET, 64, FP32, 8, 2.5, 3.5),
    "MiniLM r=32 fp32": Case(MINILM_L6, 32, FP32, 4, 2),
    "RoBERTa r=8 fp32": Case(ROBERTA_BASE, 8, FP32, 4, 2),
}


def ours(factors: list[LoraFactors]) -> Pairs:
    decomposition = decompose(factors, backend="cpu")
    new = decomposition.truncate(decomposition.spectra.plan(keep=KEEP))
    return [(f.B, f.A) for f in new]


@contextmanager
def native_seconds() -> Iterator[dict[str, float]]:
    """How long the native stages run meanwhile: cores, svd (large cores by torch.linalg included), truncate, memory."""
    spent = {"cores": 0.0, "svd": 0.0, "truncate": 0.0, "reused": 0.0, "memory": 0.0}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            spent[name] += time.perf_counter() - start
            return result

        return call

    truncate = _cpu.truncate

    def truncate_twice(*args: Any) -> Any:
        timed("truncate", truncate)(*args)
        return timed("reused", truncate)(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cpu, "cores", timed("cores", _cpu.cores))
        patch.setattr(cpu, "svd", timed("svd", cpu.svd))
        patch.setattr(_cpu, "truncate", truncate_twice)
        patch.setattr(_cpu, "Arena", timed("memory", _cpu.Arena))
        yield spent


def error(pairs: list[tuple[torch.Tensor, torch.Tensor, float]], new: Pairs) -> float:
    """‖scale·BA − B'A'‖_F over all modules, estimated through a few random vectors, always the same."""
    generator = torch.Generator().manual_seed(1)
    squared = 0.0
    for (B, A, scale), (B2, A2) in zip(pairs, new, strict=True):
        probe = torch.randn(A.shape[1], 4, generator=generator)
        lost = scale * (B.float() @ (A.float() @ probe)) - B2.float() @ (A2.float() @ probe)
        squared += lost.square().sum().item()
    return math.sqrt(squared)


@pytest.mark.parametrize("name", CASES)
def test_whole_call(benchmark: Any, name: str) -> None:
    case = CASES[name]
    factors = [LoraFactors(n, B, A, 2.0) for n, B, A in trained_like(case.shapes, case.rank, case.dtype)]
    pairs = [(f.B, f.A, f.scale) for f in factors]
    threads = torch.get_num_threads()
    methods: dict[str, Callable[[], Pairs]] = {
        "torch QR": lambda: compress_pairs(pairs, KEEP),
        "torch Gram": lambda: compress_pairs_gram(pairs, KEEP),
    }
    expected = ours(factors)  # a warm-up too
    for method in methods.values():
        # Not the factors: signs are free, and a tie at the threshold may end either way.
        assert error(pairs, method()) == pytest.approx(error(pairs, expected), rel=1e-3)
    fresh = 2 * sum(B.nbytes + A.nbytes for B, A in expected)
    ranks = [A.shape[0] for _, A in expected]

    times: dict[str, list[float]] = {}
    alive: list[Any] = []

    def other_methods() -> None:
        alive.clear()
        machine = rates(threads)
        for method, call in methods.items():
            back(fresh)
            times.setdefault(method, []).append(seconds(lambda call=call: alive.append(call())))
        back(fresh)
        with native_seconds() as native:
            alive.append(ours(factors))
        native["floor"] = sum(floor(factors, ranks, machine))
        native["of floor"] = (native["cores"] + native["truncate"] + native["memory"]) / native["floor"]
        native["of floor, reused"] = (native["cores"] + native["reused"]) / native["floor"]
        for stage, value in native.items():
            times.setdefault(stage, []).append(value)
        back(fresh)

    def one_round() -> None:
        alive.append(ours(factors))

    benchmark.group = name
    benchmark.pedantic(one_round, setup=other_methods, rounds=ROUNDS)
    medians = {key: statistics.median(values) for key, values in times.items()}
    whole = statistics.median(benchmark.stats.stats.data)
    native_whole = medians["cores"] + medians["svd"] + medians["truncate"] + medians["memory"]
    rounds = zip(times["torch QR"], times["torch Gram"], benchmark.stats.stats.data, strict=True)
    ratios = [(qr / mine, gram / mine) for qr, gram, mine in rounds]
    benchmark.extra_info.update(medians, whole=whole, python=whole - native_whole, modules=len(factors))
    benchmark.extra_info["× torch QR"] = statistics.median(qr for qr, _ in ratios)
    benchmark.extra_info["× torch Gram"] = statistics.median(gram for _, gram in ratios)
    benchmark.extra_info["wanted"] = [case.qr, case.gram, case.floor]
    assert benchmark.extra_info["× torch QR"] > 1
    assert benchmark.extra_info["× torch Gram"] > 1


@pytest.mark.parametrize("rank", [8, 16, 32, 64, 128])
def test_core_svd(benchmark: Any, rank: int) -> None:
    """The SVDs of 224 cores (56 of rank 128), beside torch.linalg.svd in fp64: one batch, and one by one in a pool.

    The native routine by itself; where it hands over to torch.linalg.eigh, the whole stage.
    """
    shapes = LLAMA_3_8B if rank < 128 else LLAMA_8
    factors = [
        LoraFactors(n, B, A) for n, B, A in trained_like(tuple((n, 256, 256, c) for n, *_, c in shapes), rank, FP32)
    ]
    threads = torch.get_num_threads()
    cores = cpu.cores(factors, threads)
    stacked = torch.stack([torch.from_numpy(cores.block(i, 2).copy()) for i in range(len(factors))])
    ways: dict[str, Callable[[], Any]] = {
        "batched": lambda: torch.linalg.svd(stacked),
        "pooled": lambda: map_single_threaded(torch.linalg.svd, list(stacked), threads),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}

    def torch_ways() -> None:
        for way, call in ways.items():
            times[way].append(seconds(call))

    benchmark.group = "core SVD"

    def stage() -> None:
        if rank <= cpu.LARGEST_NATIVE_RANK:
            _cpu.svd(cores.table, cores.scales, threads)
        else:
            cpu.svd(cores, threads)

    benchmark.pedantic(stage, setup=torch_ways, rounds=ROUNDS)
    expected = torch.linalg.svdvals(stacked)
    for i in range(len(factors)):
        torch.testing.assert_close(torch.from_numpy(cores.sigma(i)), expected[i], rtol=1e-9, atol=1e-9)
    mine = statistics.median(benchmark.stats.stats.data)
    best = min(statistics.median(values) for values in times.values())
    benchmark.extra_info.update({way: statistics.median(values) for way, values in times.items()})
    benchmark.extra_info["× torch.linalg.svd"] = best / mine
    assert best > mine
