"""Instructions of the three stages, counted by valgrind: the same in every run, whatever else the machine is doing.

    python benches/instructions.py        needs valgrind and g++, on x86-64

Valgrind knows no AVX-512, so what is counted is the level v3. Per row of B or column of A, and per matrix of the SVD.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LEVEL = "v3"
MODULES, SIZE = 8, 1024  # as many modules as the SVD takes at a time, of SIZE × SIZE
RANKS = (8, 16, 32, 64)
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-g1"]
KERNEL_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]


def build(folder: Path) -> Path:
    """The driver, with the levels that it can choose from."""
    sources = HERE.parent / "csrc" / "cpu"
    objects = []
    for level in ("plain", "v2", "v3", "v4"):
        objects.append(folder / f"{level}.o")
        march = [] if level == "plain" else [f"-march=x86-64-{level}"]
        defines = [f"-DPARA_ISA={level}", "-c", str(sources / "kernels.cpp"), "-o", str(objects[-1])]
        subprocess.run(["g++", *FLAGS, *KERNEL_FLAGS, *march, *defines], check=True)
    rest = [HERE / "instructions.cpp", sources / "stages.cpp", sources / "dispatch.cpp", *objects]
    program = folder / "instructions"
    arguments = ["-DPARA_X86_LEVELS", *map(str, rest), "-o", str(program), "-pthread"]
    subprocess.run(["g++", *FLAGS, *arguments], check=True)
    return program


def count(program: Path, stage: str, rank: int, folder: Path) -> int:
    """Instructions inside one stage."""
    out = folder / "callgrind.out"
    shape = [LEVEL, *map(str, (MODULES, SIZE, SIZE, rank, rank // 4))]
    valgrind = ["valgrind", "--tool=callgrind", f"--toggle-collect=para::cpu::{stage}(*", f"--callgrind-out-file={out}"]
    subprocess.run([*valgrind, str(program), *shape], check=True, capture_output=True)
    totals = re.search(r"^(?:summary|totals): (\d+)", out.read_text(), re.MULTILINE)
    assert totals, "callgrind wrote no total"
    return int(totals[1])


def main() -> None:
    """Print the table."""
    missing = [tool for tool in ("valgrind", "g++") if not shutil.which(tool)]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} not found: install what is missing")
    print(f"| level {LEVEL}, fp32, keep ¼ | cores, per row | truncate, per row | svd, per matrix |")
    print("|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = build(folder)
        for rank in RANKS:
            cores, svd, truncate = (count(program, stage, rank, folder) for stage in ("cores", "svd", "truncate"))
            rows = MODULES * 2 * SIZE
            print(f"| r={rank} | {cores / rows:.0f} | {truncate / rows:.0f} | {svd / MODULES:,.0f} |")


if __name__ == "__main__":
    main()
