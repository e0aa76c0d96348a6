"""The native core by itself: ISA levels, stubs, refusals of malformed tables."""

from __future__ import annotations

import ast
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CODES
from emulator import build

import para_ext
from para_ext import LoraFactors

_cpu = pytest.importorskip("para_ext._cpu", reason="the native core is not built here", exc_type=ImportError)
cpu = pytest.importorskip("para_ext.backends.cpu")

RANKS = (1, 2, 3, 5, 8, 13, 16, 24, 33, 64, 70, 128)


def _factors(rank: int, dtype: torch.dtype) -> LoraFactors:
    generator = torch.Generator().manual_seed(rank)
    B = torch.randn(rank * 3 + 7, rank, generator=generator, dtype=torch.float64)
    A = torch.randn(rank, rank * 2 + 150, generator=generator, dtype=torch.float64)
    B *= torch.logspace(0, -4, rank, dtype=torch.float64)
    return LoraFactors(f"m{rank}", B.to(dtype), A.to(dtype), 0.7)


@pytest.fixture(params=_cpu.isa_levels())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(cpu, "ISA", request.param)
    yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_isa_levels_agree_bit_for_bit(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def results() -> tuple[list[list[float]], list[torch.Tensor]]:
        factors = [_factors(rank, dtype) for rank in RANKS]
        cores = cpu.cores(factors, 2)
        sigma = cpu.svd(cores, 2)
        new = cpu.truncate(factors, cores, [(r + 2) // 3 for r in RANKS], [CODES[dtype]] * len(RANKS), 2)
        return sigma, [x for t in new for x in (t.B, t.A)]

    sigma, tensors = results()
    monkeypatch.setattr(cpu, "ISA", _cpu.isa_levels()[0])
    best_sigma, best_tensors = results()
    assert sigma == best_sigma
    assert all(torch.equal(x, y) for x, y in zip(tensors, best_tensors, strict=True))


def test_levels_of_this_machine() -> None:
    levels = _cpu.isa_levels()
    assert levels[-1] == "plain"
    if platform.machine() in ("x86_64", "AMD64") and platform.system() == "Linux":
        assert "v2" in levels


def test_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="ISA level 'v9' is not built in"):
        _cpu.cores(np.zeros((0, _cpu.COLUMNS), np.int64), np.zeros(0), 1, "v9")


def test_empty_batch() -> None:
    table, scales = np.zeros((0, _cpu.COLUMNS), np.int64), np.zeros(0)
    assert _cpu.cores(table, scales, 2).shape == (0,)
    assert _cpu.svd(table, scales, 2).shape == (0,)
    assert _cpu.truncate(table, scales, 2).shape == (0, 7)


@pytest.mark.parametrize(
    ("table", "scales", "message"),
    [
        (np.zeros((1, 3), np.int64), np.zeros(1), "the table must be"),
        (np.zeros((1, _cpu.COLUMNS), np.int64), np.zeros(2), "the table must be"),
        (np.zeros((1, _cpu.COLUMNS), np.int64), np.zeros(1), "row 0 of the table has an empty shape"),
        (np.full((1, _cpu.COLUMNS), 9, np.int64), np.zeros(1), "dtype code 9 is unknown"),
    ],
)
def test_malformed_tables_are_refused(table: np.ndarray, scales: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _cpu.cores(table, scales, 1)


def test_arena_is_zero_writable_and_keeps_itself_alive() -> None:
    tensor = torch.frombuffer(_cpu.Arena(4096, 2), dtype=torch.float32, count=8, offset=64)
    assert not tensor.any()
    tensor += 1
    assert tensor.sum() == 8
    with pytest.raises(MemoryError):
        _cpu.Arena(1 << 62, 1)


def test_stub_names_the_whole_module() -> None:
    stub = ast.parse((Path(para_ext.__file__).parent / "_cpu.pyi").read_text(encoding="utf-8"))
    declared = {n.name for n in stub.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    declared |= {n.target.id for n in stub.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert declared == {name for name in dir(_cpu) if not name.startswith("_")}
    assert _cpu.core_words(3) == 4 * 9 + 3 * 3 + 4


@pytest.mark.sanitizers
@pytest.mark.parametrize("mode", ["address", "thread"])
def test_core_under_sanitizers(mode: str, tmp_path: Path) -> None:
    """tests/sanitized.cpp with every level that is built in, as CMakeLists.txt compiles them but for the optimizer."""
    if (compiler := build.compiler()) is None:
        pytest.skip("there is no C++ compiler")
    flags = [*build.MODES[mode][0], "-g1", "-std=c++17", "-ffp-contract=off", "-Wno-psabi", "-pthread"]
    levels = [level for level in ("v4", "v3", "v2") if platform.machine() in ("x86_64", "AMD64")]
    objects = [tmp_path / f"{level}.o" for level in (*levels, "plain")]

    def compiled(*arguments: str) -> None:
        subprocess.run([*compiler, *flags, *arguments], check=True)

    for target in objects:
        march = [] if target.stem == "plain" else [f"-march=x86-64-{target.stem}"]
        source = str(build.CSRC / "cpu" / "kernels.cpp")
        compiled(*march, f"-DPARA_ISA={target.stem}", "-c", source, "-o", str(target))
    sources = [
        Path(__file__).with_name("sanitized.cpp"),
        *(build.CSRC / "cpu" / f"{x}.cpp" for x in ("stages", "dispatch")),
    ]
    program = tmp_path / "sanitized"
    chosen = ["-DPARA_X86_LEVELS"] if levels else []
    compiled(*chosen, *map(str, [*sources, *objects]), "-o", str(program))
    assert build.run(program, mode).stdout == "right\n"
