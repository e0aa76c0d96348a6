"""The list of backends that every numerical test runs on, and the worst ratios to their bounds, shown at the end."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator import build
from torch import Tensor

from para_ext.arrays import as_tensor
from para_ext.backends import Truncated
from para_ext.factors import LoraFactors

BACKENDS = ("cpu", "cuda-emulated", pytest.param("cuda", marks=pytest.mark.gpu), "torch")

Record = Callable[[str, str, str, float], None]

_worst = pytest.StashKey[dict[tuple[str, str], tuple[float, str]]]()


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Work in an empty folder: from the checkout, Python would import the sources instead of what is installed."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    """A module with the three stages; PARA_EXT_REQUIRE_NATIVE=1 makes a missing native core a failure."""
    if request.param == "cuda-emulated":
        return request.getfixturevalue("emulated").stages
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("PyTorch finds no GPU")
        return OnGpu()
    try:
        return importlib.import_module(f"para_ext.backends.{request.param}")
    except ImportError as error:
        if os.environ.get("PARA_EXT_REQUIRE_NATIVE") == "1":
            pytest.fail(f"backend {request.param}: {error}")
        pytest.skip(f"backend {request.param} is not built here")


class OnGpu:
    """The CUDA backend for tests whose factors are in the CPU's memory."""

    NAME = "cuda"

    def __init__(self) -> None:
        from para_ext.backends.cuda import stages

        self.stages = stages()

    @staticmethod
    def _moved(f: LoraFactors) -> LoraFactors:
        # Strides are part of what is tested.
        return replace(f, **{name: _like(getattr(f, name)) for name in ("B", "A")})

    def supports(self, f: LoraFactors) -> bool:
        return self.stages.supports(self._moved(f))

    def cores(self, factors: Sequence[LoraFactors], threads: int) -> Any:
        return self.stages.cores([self._moved(f) for f in factors], threads)

    def svd(self, cores: Any, threads: int) -> list[list[float]]:
        return self.stages.svd(cores, threads)

    def betas(self, cores: Any) -> list[float]:
        return self.stages.betas(cores)

    def truncate(
        self, factors: Sequence[LoraFactors], cores: Any, ranks: Sequence[int], codes: Sequence[str], threads: int
    ) -> list[Truncated]:
        new = self.stages.truncate(cores.factors, cores, ranks, codes, threads)
        return [replace(t, B=as_tensor(t.B).cpu(), A=as_tensor(t.A).cpu()) for t in new]


def _like(x: Tensor) -> Tensor:
    """x on the GPU, with its strides and the alignment of its first element."""
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).cuda()
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


@dataclass(frozen=True)
class Emulated:
    """The CUDA backend on the CPU, and what its kernels did (tests/emulator/emulation.cpp)."""

    stages: Any
    emulation: Any


@pytest.fixture(scope="session")
def emulated() -> Emulated:
    """csrc/cuda compiled against the emulator, under the same Python as on a GPU, with tensors in the CPU's memory."""
    if build.compiler() is None:
        pytest.skip("there is no C++ compiler")
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    from para_ext.backends.cuda import Stages

    name = "_cuda_emulated"
    sources = sorted([*(build.CSRC / "cuda").glob("*.cu"), *(build.CSRC / "cuda").glob("*.cpp")])
    library = build.module(name, sources, [f"PARA_MODULE={name}"])
    return Emulated(Stages("cuda-emulated", build.load(library, name), "cpu"), build.load(library, "emulation"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On matrices this small more threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Record:
    """``record(kind, backend, case, ratio)``: an error over its bound, in the units in which 30 is the limit."""
    worst = pytestconfig.stash.setdefault(_worst, {})

    def keep(kind: str, backend: str, case: str, ratio: float) -> None:
        if ratio > worst.get((kind, backend), (-1.0, ""))[0]:
            worst[kind, backend] = (ratio, case)

    return keep


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> Iterator[None]:
    worst = config.stash.get(_worst, {})
    if worst:
        terminalreporter.section("worst error / bound (limit 30)")
        for (kind, backend), (ratio, case) in sorted(worst.items()):
            terminalreporter.line(f"{kind:24} {backend:6} {ratio:8.3g}  {case}")
    return (yield)
