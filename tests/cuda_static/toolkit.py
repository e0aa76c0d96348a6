"""The kernels as nvcc compiles them: registers and memory, machine code, and what is launched, all without a GPU.

The toolkit is the one of cuda-toolkit.txt, in build/cuda-toolkit (`make cuda` puts it there). What it makes stays in
build/cuda-static, named by the content of all that it is made of.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
TOOLKIT = ROOT / "build" / "cuda-toolkit" / "nvidia" / "cu13"
BUILD = ROOT / "build" / "cuda-static"

# Warnings are errors, those of local memory among them: a compilation that passes has none.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-Wall",
    "-Werror=all-warnings",
    "-Xptxas=--verbose,--warn-on-spills,--warn-on-local-memory-usage,-Werror",
)


@dataclass(frozen=True)
class Device:
    """Limits of a multiprocessor, from the CUDA programming guide's table of compute capabilities."""

    threads: int
    shared: int
    shared_limit: int  # of a block
    reserved: int  # of `shared`, by the driver, for each block


def _device(threads: int, shared_kb: int, reserved_kb: int = 1) -> Device:
    return Device(threads, shared_kb << 10, (shared_kb - reserved_kb) << 10, reserved_kb << 10)


DEVICES = {
    75: _device(1024, 64, reserved_kb=0),
    80: _device(2048, 164),
    86: _device(1536, 100),
    89: _device(1536, 100),
    90: _device(2048, 228),
    100: _device(2048, 228),
    120: _device(1536, 100),
}


@dataclass(frozen=True)
class Resources:
    """Registers of a thread, bytes of static shared memory of a block, bytes of local memory of a thread."""

    registers: int
    shared: int
    stack: int
    spills: int


@dataclass(frozen=True)
class Launch:
    kernel: str
    blocks: int
    threads: int  # per block
    shared: int  # bytes per block, dynamic


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # LDG.E.128
    target: int | None  # of a jump


Code = Sequence[Instruction]

_NOTE = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int64)  # as launches.cpp has it

# Names of instructions.
WIDE_LOAD = r"LDG\.E(\.\w+)*\.128(\.\w+)*"
WIDE_STORE = r"STG\.E(\.\w+)*\.128(\.\w+)*"
LOCAL = r"(LDL|STL)(\.\w+)*"


def missing() -> str | None:
    """Why nothing can be compiled here."""
    if not (TOOLKIT / "bin" / "nvcc").exists():
        return "the CUDA toolkit of cuda-toolkit.txt is not in build/; `make test-cuda-static` puts it there"
    return None if shutil.which(_cxx()) else "there is no C++ compiler"


def architectures() -> list[int]:
    """Those that CMakeLists.txt builds for."""
    found = re.search(r"foreach\(architecture ([\d ]+)\)", (ROOT / "CMakeLists.txt").read_text())
    assert found
    return [int(word) for word in found[1].split()]


def resources() -> dict[tuple[str, int], Resources]:
    """Of every kernel on every architecture, as ptxas reports them."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
        re.DOTALL,
    )
    found = {}
    for source in _sources():
        for name, architecture, *numbers in pattern.findall(_object(source).with_suffix(".log").read_text()):
            stack, stores, loads, registers, shared = (int(number or 0) for number in numbers)
            found[_readable(name), int(architecture)] = Resources(registers, shared, stack, stores + loads)
    return found


@cache
def code() -> dict[tuple[str, int], Code]:
    """Machine code of every kernel on every architecture, as cuobjdump and nvdisasm read it."""
    found: dict[tuple[str, int], list[Instruction]] = {}
    line = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?([\w.]+)([^;]*);")
    into: list[Instruction] = []
    architecture = 0
    for source in _sources():
        for text in _run(str(TOOLKIT / "bin" / "cuobjdump"), "-sass", str(_object(source))).splitlines():
            if text.endswith("*/") and (match := line.match(text)):
                address, name, operands = match.groups()
                target = re.search(r"0x([0-9a-f]+)", operands) if name == "BRA" else None
                into.append(Instruction(int(address, 16), name, int(target[1], 16) if target else None))
            elif match := re.match(r"arch = sm_(\d+)", text):
                architecture = int(match[1])
            elif match := re.match(r"\s+Function : (\w+)", text):
                into = found.setdefault((_readable(match[1]), architecture), [])
    return {key: tuple(instructions) for key, instructions in found.items()}


def loops(instructions: Code) -> Iterator[Code]:
    """Innermost loops, in order."""
    spans = sorted((i.target, i.address) for i in instructions if i.target is not None and i.target <= i.address)
    for first, last in spans:
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in spans):
            yield [i for i in instructions if first <= i.address <= last]


def count(instructions: Code, pattern: str) -> int:
    """How many of them have a name of which the pattern is the whole."""
    return sum(number for name, number in Counter(i.name for i in instructions).items() if re.fullmatch(pattern, name))


def launches(modules: Sequence[tuple[int, int, int, int]], bytes_per_element: int, architecture: int) -> list[Launch]:
    """What a whole call launches for modules of (m, n, r, k), B and A contiguous."""
    noted = []

    def note(kernel: bytes, blocks: int, threads: int, shared: int) -> None:
        noted.append(Launch(_readable(kernel.decode()), blocks, threads, shared))

    dtype = {4: 0, 2: 2}[bytes_per_element]
    rows = [[0, m, r, 1, dtype, 0, n, n, 1, dtype, r, 0, k, 0, 0, dtype] for m, n, r, k in modules]
    table: NDArray[np.int64] = np.array(rows, np.int64)
    address = table.ctypes.data_as(ctypes.c_void_p)
    limit = ctypes.c_int64(DEVICES[architecture].shared_limit)
    _library().note_launches(address, ctypes.c_int64(len(rows)), limit, _NOTE(note))
    return noted


def blocks_per_multiprocessor(architecture: int, kernel: Resources, launch: Launch) -> int:
    """As cuda_occupancy.h has it."""
    device = DEVICES[architecture]
    memory = (ctypes.c_int64(x) for x in (device.shared, device.shared_limit, device.reserved))
    blocks: int = _library().blocks_per_multiprocessor(
        architecture,
        device.threads,
        *memory,
        kernel.registers,
        ctypes.c_int64(kernel.shared),
        launch.threads,
        ctypes.c_int64(launch.shared),
    )
    return blocks


def _readable(name: str) -> str:
    """gram<4> of a mangled name."""
    found = re.match(r"_ZN4para4cuda(\d+)(\w+)", name)
    assert found, name
    length = int(found[1])
    argument = re.match(r"I(?:Li(\d+)|Lb([01]))EE", found[2][length:])
    if argument is None:
        return found[2][:length]
    return f"{found[2][:length]}<{argument[1] or ('false', 'true')[int(argument[2])]}>"


def _sources() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


@cache
def _library() -> ctypes.CDLL:
    """Our own runtime (launches.cpp) and the objects that are launched by it."""
    objects = [str(_object(source)) for source in _sources()]
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", f"-I{CSRC}", f"-isystem{TOOLKIT / 'include'}")
    path = _object(_sources()[0]).with_name(f"launches-{_digest(HERE / 'launches.cpp')}.so")
    if not path.exists():
        temporary = path.with_name(f"{os.getpid()}-{path.name}")
        sources = (str(HERE / "launches.cpp"), str(CSRC / "cuda" / "stages.cpp"))
        _run(_cxx(), *flags, *sources, *objects, "-o", str(temporary))
        temporary.replace(path)
    return ctypes.CDLL(str(path))


@cache
def _object(source: Path) -> Path:
    """The source compiled for all architectures, made only if it isn't there; beside it, what ptxas said."""
    inputs = [*sorted(CSRC.glob("*.h")), *sorted((CSRC / "cuda").iterdir())]
    folder = BUILD / _digest(*inputs, ROOT / "cuda-toolkit.txt", ROOT / "CMakeLists.txt", more=repr(FLAGS))
    path = folder / f"{source.stem}.o"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{os.getpid()}-{path.name}"
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures()]
        threads = str(os.cpu_count() or 1)
        command = (str(TOOLKIT / "bin" / "nvcc"), *FLAGS, *targets, "--threads", threads, "-c", str(source))
        path.with_suffix(".log").write_text(_run(*command, "-o", str(temporary)))
        temporary.replace(path)
    return path


def _digest(*files: Path, more: str = "") -> str:
    return hashlib.sha256(b"\0".join([*(path.read_bytes() for path in files), more.encode()])).hexdigest()[:16]


def _cxx() -> str:
    return os.environ.get("CXX") or "c++"


def _run(*command: str) -> str:
    """stdout and stderr together; AssertionError with them where the command fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout
