"""Factors in, factors out, on shapes of well-known models: beside the same in plain torch twice, and beside the floor.

A round times the three methods and the machine one after the other, so that all see the machine in the same mood; all
results of a round are alive until it ends, so that every call writes to memory that is fresh to the process, as users'
calls do; that the machine has it is seen to before each (`machine.back`), as far as one can: what a call spends on
taking memory is told beside it. What is timed with para_ext is everything: checks, cores, SVD, plan, new factors with
their certificates.
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
from machine import back, floor, rates, rest
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


def timed(name: str, function: Callable[..., Any], spent: dict[str, float]) -> Callable[..., Any]:
    """The function, adding the seconds it takes to ``spent[name]``."""

    def call(*args: Any) -> Any:
        start = time.perf_counter()
        result = function(*args)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        return result

    return call


@contextmanager
def native_seconds() -> Iterator[dict[str, float]]:
    """How long the native stages run meanwhile: cores, svd (large cores by torch.linalg included), truncate, and
    truncate once more in the same memory."""
    spent: dict[str, float] = {}
    truncate = _cpu.truncate

    def truncate_twice(*args: Any) -> Any:
        timed("truncate", truncate, spent)(*args)
        return timed("reused", truncate, spent)(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cpu, "cores", timed("cores", _cpu.cores, spent))
        patch.setattr(cpu, "svd", timed("svd", cpu.svd, spent))
        patch.setattr(_cpu, "truncate", truncate_twice)
        yield spent


@contextmanager
def memory_seconds() -> Iterator[dict[str, float]]:
    """How long a call waits for fresh memory meanwhile."""
    spent: dict[str, float] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cpu, "Arena", timed("memory", _cpu.Arena, spent))
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

    times: dict[str, list[float]] = {"memory": []}
    alive: list[Any] = []

    def ready(call: Callable[[], Pairs]) -> None:
        """See to memory and idle threads; small adapters are called once before: waking a processor takes as long."""
        back(fresh)
        if case.floor is None:
            alive.append(call())

    def other_methods() -> None:
        alive.clear()
        machine = rates(threads)
        for method, call in methods.items():
            ready(call)
            times.setdefault(method, []).append(seconds(lambda call=call: alive.append(call())))
        ready(lambda: ours(factors))
        with native_seconds() as native:
            alive.append(ours(factors))
        native["floor"] = sum(floor(factors, ranks, machine))
        native["of floor, reused"] = (native["cores"] + native["reused"]) / native["floor"]
        for stage, value in native.items():
            times.setdefault(stage, []).append(value)
        ready(lambda: ours(factors))

    def one_round() -> None:
        with memory_seconds() as spent:
            alive.append(ours(factors))
        times["memory"].append(spent["memory"])

    benchmark.group = name
    benchmark.pedantic(one_round, setup=other_methods, rounds=ROUNDS)
    whole = benchmark.stats.stats.data
    stages = (times[key] for key in ("cores", "truncate", "memory", "floor"))
    times["of floor"] = [
        (cores + truncate + memory) / best for cores, truncate, memory, best in zip(*stages, strict=True)
    ]
    times["memory at hand"] = [all_of_it - memory for all_of_it, memory in zip(whole, times["memory"], strict=True)]
    medians = {key: statistics.median(values) for key, values in times.items()}
    native = medians["cores"] + medians["svd"] + medians["truncate"]
    benchmark.extra_info.update(medians, whole=statistics.median(whole), modules=len(factors))
    benchmark.extra_info["python"] = medians["memory at hand"] - native
    for method in methods:
        for what, mine in (("", whole), (", memory at hand", times["memory at hand"])):
            ratios = [theirs / ours for theirs, ours in zip(times[method], mine, strict=True)]
            benchmark.extra_info[f"× {method}{what}"] = statistics.median(ratios)
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

    def stage() -> None:
        if rank <= cpu.LARGEST_NATIVE_RANK:
            _cpu.svd(cores.table, cores.scales, threads)
        else:
            cpu.svd(cores, threads)

    def torch_ways() -> None:
        for way, call in ways.items():
            call()  # the second of two is timed, for all: after a rest, waking a processor takes longer than r = 8
            times[way].append(seconds(call))
            rest()
        stage()

    benchmark.group = "core SVD"
    benchmark.pedantic(stage, setup=torch_ways, rounds=ROUNDS)
    expected = torch.linalg.svdvals(stacked)
    for i in range(len(factors)):
        torch.testing.assert_close(torch.from_numpy(cores.sigma(i)), expected[i], rtol=1e-9, atol=1e-9)
    mine = statistics.median(benchmark.stats.stats.data)
    best = min(statistics.median(values) for values in times.values())
    benchmark.extra_info.update({way: statistics.median(values) for way, values in times.items()})
    benchmark.extra_info["× torch.linalg.svd"] = best / mine
    assert best > mine
