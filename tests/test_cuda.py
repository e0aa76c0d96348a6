"""The CUDA backend by itself, emulated: launches, bytes and barriers, limits of devices, refusals, planted bugs."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adapters import write_adapter
from cases import BF16, FP16, FP32, FP64, lora
from conftest import Emulated
from emulator import build
from oracles import dense, gram_bound

import para_ext
from para_ext import LoraFactors, ParaError, decomposition
from para_ext.backends.cuda import Stages

pytestmark = pytest.mark.usefixtures("one_thread")

LIMITS = {75: 64 << 10, 86: 99 << 10, 80: 163 << 10, 90: 227 << 10}
"""Shared memory of a thread block by compute capability (CUDA C++ Programming Guide, Technical Specifications)."""
LARGEST = {75: 88, 86: 111, 80: 143, 90: 169}
"""The largest rank whose core fits there."""


@pytest.fixture
def counted(emulated: Emulated) -> Iterator[Any]:
    """The emulator, its counters at zero and its settings put back afterwards."""
    emulated.emulation.reset()
    yield emulated.emulation
    emulated.emulation.set_shared_limit(LIMITS[90])
    emulated.emulation.set_seed(0)


def factors(rank: int, m: int, n: int, dtype: torch.dtype = FP32, name: str = "x") -> LoraFactors:
    B, A = lora(rank, m, n)(torch.Generator().manual_seed(rank))
    return LoraFactors(name, B.to(dtype), A.to(dtype), 0.5)


def compress(emulated: Emulated, modules: list[LoraFactors], ranks: list[int]) -> Any:
    cores = emulated.stages.cores(modules, 1)
    emulated.stages.svd(cores, 1)
    emulated.stages.truncate(modules, cores, ranks, ["F32"] * len(ranks), 1)
    return cores


# --- what is counted -------------------------------------------------------------------------------------------------


def test_five_launches_for_an_adapter(emulated: Emulated, counted: Any) -> None:
    modules = [factors(r, 40, 50, dtype, f"{r} {dtype}") for r in (1, 8, 16) for dtype in (FP32, FP16, BF16)]
    compress(emulated, modules, [1] * len(modules))
    assert [x.kernel for x in counted.launches()] == ["gram<4>", "cores<false>", "svd", "transforms", "truncate"]


def test_one_more_svd_launch_for_each_bucket_of_ranks(emulated: Emulated, counted: Any) -> None:
    """And one more of gram for ranks above 64, where its tiles are larger."""
    compress(emulated, [factors(r, 70, 80, name=str(r)) for r in (3, 16, 17, 33, 65)], [1] * 5)
    names = [x.kernel for x in counted.launches()]
    assert names == ["gram<4>", "gram<8>", "cores<false>", *["svd"] * 4, "transforms", "truncate"]


def test_nothing_to_write_is_no_launch(emulated: Emulated, counted: Any) -> None:
    compress(emulated, [factors(8, 40, 50)], [0])
    assert [x.kernel for x in counted.launches()] == ["gram<4>", "cores<false>", "svd"]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("rank", "m", "n"), [(16, 4096, 4096), (64, 2048, 4096), (128, 4096, 2048)])
def test_factors_are_read_once_per_stage(
    emulated: Emulated, counted: Any, rank: int, m: int, n: int, dtype: torch.dtype
) -> None:
    f = factors(rank, m, n, dtype)
    cores = emulated.stages.cores([f], 1)
    counted_cores = {x.kernel: x for x in counted.launches()}
    emulated.stages.svd(cores, 1)
    counted.reset()
    k = rank // 4
    emulated.stages.truncate([f], cores, [k], ["F32" if dtype == FP32 else "BF16"], 1)
    truncate = counted.launches()[-1]

    size = f.B.element_size()
    read, written = size * rank * (m + n), size * k * (m + n)
    gram = counted_cores["gram<4>" if rank <= 64 else "gram<8>"]
    assert read <= gram.read <= 1.05 * read
    assert gram.written <= 0.13 * read * 4 / size  # partial Gram matrices are fp64
    assert counted_cores["cores<false>"].read <= gram.written + 512  # and its rows of the tables
    assert read + written <= truncate.read + truncate.written <= 1.05 * (read + written)
    assert written <= truncate.written <= 1.01 * written


def test_one_barrier_per_step_of_jacobi(emulated: Emulated, counted: Any) -> None:
    for rank in (1, 2, 7, 16, 31):
        counted.reset()
        cores = emulated.stages.cores([factors(rank, 40, 50)], 1)
        (svd,) = (x for x in counted.launches() if x.kernel == "svd")
        even = rank + rank % 2
        steps = int(cores.spectra[0][3]) * (even - 1)
        sweeps = int(cores.spectra[0][3])
        before_and_after = 7
        assert svd.block_barriers == steps + sweeps + rank + before_and_after


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", LIMITS)
def test_largest_rank_of_a_device(emulated: Emulated, counted: Any, architecture: int) -> None:
    """Above it torch.linalg decomposes the core, and a triangle that is too large lies in global memory."""
    counted.set_shared_limit(LIMITS[architecture])
    for rank in (LARGEST[architecture], LARGEST[architecture] + 1):
        generator = torch.Generator().manual_seed(rank)
        thin = torch.randn(rank + 2, 3, generator=generator), torch.randn(3, rank + 5, generator=generator)
        # Of rank 3, so that few rotations are needed.
        B = thin[0] @ torch.randn(3, rank, generator=generator)
        f = LoraFactors("x", B, torch.randn(rank, 3, generator=generator) @ thin[1])
        cores = emulated.stages.cores([f], 1)
        assert (cores.spectra[0][3] > 0) == (rank <= LARGEST[architecture])
        (values,) = emulated.stages.svd(cores, 1)
        reference = dense(f)
        error = (reference.sigma(values) - reference.S).abs()
        assert bool((error <= gram_bound(reference.S, reference.beta, rank)).all())


@pytest.mark.parametrize("rank", [65, 96, 129, 200])
@pytest.mark.parametrize("limit", [64 << 10, 227 << 10])
@pytest.mark.parametrize("columns_first", [False, True])
def test_many_columns(emulated: Emulated, counted: Any, rank: int, limit: int, columns_first: bool) -> None:
    """In blocks of columns, or in one: the Gram matrix is what RᵀR says."""
    counted.set_shared_limit(limit)
    f = factors(rank, 2 * rank + 3, 3 * rank + 1)
    if columns_first:
        f = LoraFactors("x", f.B.mT.contiguous().mT, f.A.mT.contiguous().mT)
    cores = emulated.stages.cores([f], 1)
    R = cores.workspace[: 2 * rank * rank].view(2, rank, rank)
    for X, triangle in ((f.B.double(), R[0]), (f.A.double().mT, R[1])):
        gram = X.mT @ X
        assert float((triangle.mT @ triangle - gram).norm()) <= 30 * rank * 2.0**-53 * float(gram.norm())


@pytest.mark.parametrize("seed", range(40))
def test_any_strides(emulated: Emulated, seed: int) -> None:
    """Factors anywhere in a larger matrix of NaNs: chunks of 16 bytes are read whole, and nothing else is."""
    g = torch.Generator().manual_seed(seed)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (1,), generator=g))]

    def somewhere(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        down, across = pick(1, 1, 1, 2), pick(1, 1, 1, 3)
        gap, top, left = pick(0, 0, 1, 8), pick(0, 1, 8), pick(0, 0, 0, 1, 8)
        whole = torch.full((top + rows * down, left + columns * across + gap), torch.nan, dtype=dtype)
        part = whole[top::down, left : left + columns * across : across]
        part.copy_(torch.randn(rows, columns, generator=g))
        return part

    r, m, n = pick(1, 2, 3, 4, 5, 8, 11, 16, 18, 32, 37), pick(1, 7, 64, 403, 1500), pick(1, 9, 128, 777)
    dtype = (FP32, FP16, BF16)[seed % 3]
    B = somewhere(m, r, dtype) if pick(0, 1) else somewhere(r, m, dtype).mT
    A = somewhere(r, n, dtype) if pick(0, 1) else somewhere(n, r, dtype).mT
    f = LoraFactors("x", B, A, 0.7)
    cores = emulated.stages.cores([f], 1)
    emulated.stages.svd(cores, 1)
    k = min(r, m, n)
    (t,) = emulated.stages.truncate([f], cores, [k], ["F32"], 1)
    reference = dense(f)
    assert float((reference.product(t.B, t.A) - reference.W).norm()) <= 30 * r * 2.0**-24 * reference.beta


def test_no_device_is_told(emulated: Emulated, counted: Any) -> None:
    counted.set_shared_limit(0)
    with pytest.raises(ParaError, match="there is no CUDA device"):
        emulated.stages.cores([factors(4, 9, 9)], 1)


def test_a_refused_launch_names_its_stage(emulated: Emulated, counted: Any) -> None:
    counted.set_shared_limit(8 << 10)
    with pytest.raises(ParaError, match="CUDA cannot go on: gram: "):
        emulated.stages.cores([factors(4, 9, 9)], 1)


def test_any_order_of_threads_gives_the_same_bits(emulated: Emulated, counted: Any) -> None:
    modules = [factors(r, 300, 200, dtype, f"{r} {dtype}") for r, dtype in ((5, FP32), (16, BF16), (33, FP16))]

    def outcome(seed: int) -> list[torch.Tensor]:
        counted.set_seed(seed)
        cores = emulated.stages.cores(modules, 1)
        sigma = [torch.tensor(values) for values in emulated.stages.svd(cores, 1)]
        new = emulated.stages.truncate(modules, cores, [3, 7, 9], ["F32", "BF16", "F16"], 1)
        return [*sigma, *(x for t in new for x in (t.B, t.A, torch.tensor(t.error)))]

    first = outcome(1)
    assert all(torch.equal(x, y) for seed in (2, 3) for x, y in zip(first, outcome(seed), strict=True))


# --- which modules it gets -------------------------------------------------------------------------------------------


@pytest.fixture
def pretended(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in a module whose name starts with ``cuda:`` count as being there."""
    places: dict[int, str] = {}

    def check(given: Any) -> Any:
        checked = tuple(given)
        places.update({id(f.B): f.name.split()[0] if f.name.startswith("cuda:") else "cpu" for f in checked})
        return checked

    monkeypatch.setattr(decomposition, "check_factors", check)
    monkeypatch.setattr(decomposition, "device_of", lambda x: places[id(x)])
    monkeypatch.setattr(decomposition, "cuda_backend", lambda required=False: emulated.stages)
    monkeypatch.setattr(decomposition, "native_backend", lambda required=False: _OnCpu(places))


class _OnCpu:
    """The native backend, for what does not count as being on a GPU."""

    NAME = "cpu"

    def __init__(self, places: dict[int, str]) -> None:
        self.places = places
        self.native = pytest.importorskip("para_ext.backends.cpu")

    def supports(self, f: LoraFactors) -> bool:
        return self.places[id(f.B)] == "cpu" and self.native.supports(f)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)


@pytest.mark.usefixtures("pretended")
def test_modules_go_where_their_factors_are() -> None:
    names = ["cuda:0 a", "b", "cuda:1 c", "cuda:0 d", "e"]
    modules = [factors(4, 20, 30, name=name) for name in names] + [factors(4, 20, 30, FP64, "cuda:0 f")]
    d = decomposition.Decomposition(modules)
    assert [(stages.NAME, members) for stages, members, _ in d._parts] == [
        ("cuda-emulated", [0, 3]),
        ("cpu", [1, 4]),
        ("cuda-emulated", [2]),
        ("torch", [5]),
    ]
    assert d.backends == ("cuda-emulated", "cpu", "torch")
    new = d.truncate({f.name: 2 for f in modules})
    for f, t in zip(modules, new, strict=True):
        assert t.B.dtype == f.B.dtype
        reference = dense(f)
        error = float((reference.product(t.B, t.A) - reference.best(2)).norm())
        assert error <= 1e-5 * float(reference.S[0])


@pytest.mark.usefixtures("pretended")
def test_asked_for_it_takes_no_factors_from_elsewhere() -> None:
    with pytest.raises(ParaError, match="module 'b': its factors are not on a CUDA device"):
        decomposition.Decomposition([factors(4, 20, 30, name=n) for n in ("cuda:0 a", "b")], "cuda")
    assert decomposition.Decomposition([factors(4, 20, 30, name="cuda:0 a")], "cuda").backends == ("cuda-emulated",)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_it_without_a_gpu_is_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    for ask in (
        lambda: para_ext.decompose([factors(4, 20, 30)], backend="cuda"),
        lambda: para_ext.compress_adapter(adapter, tmp_path / "out", backend="cuda"),
    ):
        with pytest.raises(ParaError, match=r"CUDA (kernels are not installed|device to work on)") as refused:
            ask()
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_why_it_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not built is no reason of an importer's; built and not loadable is one."""
    monkeypatch.setitem(sys.modules, "para_ext._cuda", None)
    monkeypatch.delattr(para_ext, "_cuda", raising=False)
    remedy = "reinstall with nvcc and PARA_EXT_CUDA=ON, or use backend='cpu'"
    with pytest.raises(ParaError) as refused:
        decomposition.cuda_backend(required=True)
    assert str(refused.value) == f"the CUDA kernels are not installed; {remedy}"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ParaError) as refused:
        decomposition.cuda_backend(required=True)
    assert re.fullmatch(rf"the CUDA kernels are not installed \(.+\); {re.escape(remedy)}", str(refused.value))


# --- the native module -----------------------------------------------------------------------------------------------


def test_stub_names_the_whole_module(emulated: Emulated) -> None:
    native = emulated.stages.native
    stub = ast.parse((Path(para_ext.__file__).parent / "_cuda.pyi").read_text(encoding="utf-8"))
    declared = {n.name for n in stub.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    declared |= {n.target.id for n in stub.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert declared == {name for name in dir(native) if not name.startswith("_")}
    for plan in (n for n in stub.body if isinstance(n, ast.ClassDef)):
        members = {n.name for n in plan.body if isinstance(n, ast.FunctionDef)} - {"__init__"}
        assert members == {name for name in dir(getattr(native, plan.name)) if not name.startswith("_")}


def test_malformed_tables_are_refused(emulated: Emulated) -> None:
    native = emulated.stages.native
    with pytest.raises(ValueError, match="the table must be"):
        native.TruncatePlan(np.zeros((1, 3), np.int64), np.zeros(1))
    with pytest.raises(ValueError, match="row 0 of the table has an empty shape"):
        native.CoresPlan(np.zeros((1, native.COLUMNS), np.int64), np.zeros(1), 0)
    with pytest.raises(ValueError, match="dtype code 9 is unknown"):
        native.TruncatePlan(np.full((1, native.COLUMNS), 9, np.int64), np.zeros(1))


def test_a_device_that_the_kernels_cannot_use_is_left_to_torch() -> None:
    """An old driver, an old GPU, another vendor's: told once."""
    old = Stages("cuda", SimpleNamespace(unusable=lambda device: "too old", LARGEST_RANK=1024), "cpu")
    f = factors(4, 20, 30)
    with pytest.warns(UserWarning, match=r"can't run on cpu \(too old\)"):
        assert not old.supports(f)
    assert not old.supports(f)


# --- under sanitizers ------------------------------------------------------------------------------------------------

KERNELS = [*sorted((build.CSRC / "cuda").glob("*.cu")), build.CSRC / "cuda" / "stages.cpp", build.HERE / "kernels.cpp"]
# What the program says of a bug that is compiled in. Jacobi heals itself: numbers never show that a barrier is missing.
CAUGHT = {
    ("JACOBI_SYNC", "thread"): "data race",
    ("GRAM_SECOND_SYNC", "plain"): "wrong: ",
    ("GRAM_SECOND_SYNC", "thread"): "data race",
    ("UNINITIALISED", "plain"): "wrong: ",
    ("OUT_OF_BOUNDS", "address"): "heap-buffer-overflow",
}


def _kernels(mode: str, seed: int, ranks: str, bug: str | None = None) -> str:
    if build.compiler() is None:
        pytest.skip("there is no C++ compiler")
    program = build.program("kernels", KERNELS, mode, [f"PARA_BUG_{bug}"] if bug else [])
    return build.run(program, mode, str(seed), *ranks.split()).stdout


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("mode", "ranks"),
    [
        ("plain", "1 2 3 7 12 16 20 30 33 64 65 100"),
        *(pytest.param(mode, "1 3 8 16 20 32", marks=pytest.mark.sanitizers) for mode in ("address", "thread")),
    ],
)
def test_kernels_are_right(mode: str, ranks: str, seed: int) -> None:
    assert _kernels(mode, seed, ranks) == "right\n"


@pytest.mark.sanitizers
@pytest.mark.parametrize("mode", ["address", "thread"])
def test_larger_ranks_are_right(mode: str) -> None:
    assert _kernels(mode, 5, "64 70 129") == "right\n"


@pytest.mark.parametrize(
    ("bug", "mode"),
    [pytest.param(*case, marks=() if case[1] == "plain" else pytest.mark.sanitizers) for case in CAUGHT],
)
def test_planted_bugs_are_caught(bug: str, mode: str) -> None:
    assert re.search(CAUGHT[bug, mode], _kernels(mode, 1, "16 33", bug))


BARRIERS = [
    f"{source.name}:{number}"
    for source in sorted((build.CSRC / "cuda").glob("*.cu*"))
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1)
    if "__syncthreads();" in line
]


@pytest.mark.sanitizers
@pytest.mark.parametrize("barrier", BARRIERS)
def test_every_barrier_is_needed(barrier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it threads race, or go astray: none is there for nothing, and none could be lost unnoticed."""
    monkeypatch.setenv("PARA_EMULATOR_LEAVE_OUT", barrier)
    outputs = (_kernels("thread", 1, ranks) for ranks in ("5 16 33", "20 64 70", "31 129"))
    assert any(output != "right\n" for output in outputs)
