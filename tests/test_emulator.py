"""The emulator: right kernels pass in any order of their threads, planted bugs are caught, counters count."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from emulator import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")

SELFTEST = build.HERE / "selftest.cu"
SANITIZERS = [pytest.param(mode, marks=pytest.mark.sanitizers) for mode in ("address", "thread")]
PLACE = re.compile(r"selftest\.cu:(\d+)")

# What a report must hold, and how many of the lines that bear the bug's name in selftest.cu.
TEXT = "kernel "
WRONG = "wrong: "
RACE = "data race"
OUTSIDE = "out of bounds|heap-buffer-overflow"
CAUGHT = {
    "lost_update": {"thread": (RACE, 1)},
    "half_a_warp": {"plain": (TEXT, 2), "address": (TEXT, 2), "thread": (TEXT, 2)},
    "sync_in_a_branch": {"plain": (TEXT, 2), "address": (TEXT, 2), "thread": (TEXT, 2)},
    "own_lane": {"plain": (TEXT, 1), "address": (TEXT, 1), "thread": (TEXT, 1)},
    "ended_lane": {"plain": (TEXT, 1), "address": (TEXT, 1), "thread": (TEXT, 1)},
    "out_of_array": {"plain": (TEXT, 0), "address": (OUTSIDE, 1)},
    "out_of_bounds": {"plain": (TEXT, 0), "address": (OUTSIDE, 1)},
    "uninitialised": {"plain": (WRONG, 0), "address": (WRONG, 0)},
    "no_first_sync": {"plain": (WRONG, 0), "address": (WRONG, 0), "thread": (RACE, 1)},
    "no_second_sync": {"plain": (WRONG, 0), "address": (WRONG, 0), "thread": (RACE, 1)},
    "no_syncthreads": {"thread": (RACE, 1)},
    "no_syncwarp": {"plain": (WRONG, 0), "address": (WRONG, 0), "thread": (RACE, 1)},
    "half_a_syncwarp": {"thread": (RACE, 1)},
    "no_second_syncwarp": {"plain": (WRONG, 0), "address": (WRONG, 0), "thread": (RACE, 1)},
    "misaligned": {"plain": (TEXT, 1), "address": (TEXT, 1), "thread": (TEXT, 1)},
    "too_much_shared": {"plain": (TEXT, 0), "address": (TEXT, 0), "thread": (TEXT, 0)},
}


def _selftest(mode: str, *args: str) -> subprocess.CompletedProcess[str]:
    return build.run(build.program("selftest", [SELFTEST], mode), mode, *args)


@pytest.mark.parametrize("mode", ["plain", *SANITIZERS])
@pytest.mark.parametrize("seed", range(6))
def test_right_kernels_pass(mode: str, seed: int) -> None:
    done = _selftest(mode, "none", str(seed))
    assert (done.returncode, done.stdout) == (0, "right\n")


@pytest.mark.parametrize(
    ("bug", "mode"),
    [
        pytest.param(bug, mode, marks=() if mode == "plain" else pytest.mark.sanitizers)
        for bug, modes in CAUGHT.items()
        for mode in modes
    ],
)
def test_planted_bugs_are_caught(bug: str, mode: str) -> None:
    report, count = CAUGHT[bug][mode]
    lines = {i for i, line in enumerate(SELFTEST.read_text().splitlines(), 1) if re.search(f"//.*\\b{bug}\\b", line)}
    for seed in range(3):
        done = _selftest(mode, bug, str(seed))
        assert done.returncode != 0
        assert re.search(report, done.stdout), done.stdout
        assert len(lines & {int(line) for line in PLACE.findall(done.stdout)}) >= count, done.stdout


def test_fifty_small_matrices_take_no_second() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        assert _selftest("plain", "speed", "1").returncode == 0
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1


def test_bare_shared_memory_does_not_compile(tmp_path: Path) -> None:
    source = tmp_path / "bare.cu"
    source.write_text('#include "cuda/platform.h"\n__global__ void kernel() { __shared__ float x[2]; x[0] = 1; }\n')
    with pytest.raises(build.BuildError, match="declared with PARA_SHARED"):
        build.program("bare", [source])


def test_python_module() -> None:
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    emulation = build.load(build.module("empty", []), "emulation")
    emulation.set_seed(3)
    emulation.reset()
    assert emulation.launches() == []


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_nvcc_accepts_the_same_source(tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-Werror", "all-warnings", f"-I{build.CSRC}", "-c", str(SELFTEST)]
    done = subprocess.run([*command, "-o", str(tmp_path / "selftest.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
