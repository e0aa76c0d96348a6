"""How fast the kernels could be on four GPUs, and how fast they may be on an H100, from their own machine code.

Nothing here was measured on a GPU. The adapter is Llama-3-8B's of benches/shapes.py, a quarter of which is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shapes import LLAMA_3_8B

from . import toolkit
from .toolkit import Code, Launch, count

WARP = 32


@dataclass(frozen=True)
class Gpu:
    """From its maker's data sheet and the CUDA programming guide's table of arithmetic throughput."""

    architecture: int
    multiprocessors: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes/s
    fp64: int  # multiply-adds per clock and multiprocessor, outside tensor cores

    @property
    def rate(self) -> float:
        """fp64 operations a second; a multiply-add is two."""
        return 2 * self.fp64 * self.multiprocessors * self.clock


GPUS = {
    "H100 SXM": Gpu(90, 132, 1.98e9, 3.35e12, 64),
    "A100 SXM 80 GB": Gpu(80, 108, 1.41e9, 2.039e12, 32),
    "RTX 4090": Gpu(89, 128, 2.52e9, 1.008e12, 2),
    "L4": Gpu(89, 58, 2.04e9, 0.3e12, 2),
}
H100 = GPUS["H100 SXM"]
CLOCK = 1.755e9  # Hz, what we assume an H100 to hold under load

# Sweeps that Jacobi took on cores of such adapters, counted by the emulator; of other ranks as many as of 64.
SWEEPS = {16: 5, 64: 7}


@dataclass(frozen=True)
class Adapter:
    rank: int
    bytes: int  # per element

    @property
    def kept(self) -> int:
        return self.rank // 4

    @property
    def modules(self) -> list[tuple[int, int, int, int]]:
        """m, n, r, k."""
        return [(m, n, self.rank, self.kept) for _, m, n, number in LLAMA_3_8B for _ in range(number)]

    @property
    def rows(self) -> int:
        """Of all factors as tall matrices: Σ m + n."""
        return sum(m + n for m, n, _, _ in self.modules)

    @property
    def name(self) -> str:
        return f"r = {self.rank} {'fp32' if self.bytes == 4 else 'bf16'}"


@dataclass(frozen=True)
class Work:
    """Bytes of global memory and fp64 operations that a kernel can't do without."""

    bytes: int
    operations: int


def work(a: Adapter) -> dict[str, Work]:
    r, k, modules = a.rank, a.kept, len(a.modules)
    factors, matrix = a.rows * r * a.bytes, 8 * r * r * modules
    return {
        "gram": Work(factors, a.rows * r * r),
        # Two Cholesky factorizations and M; both R, M, from the Gram matrices.
        "cores": Work(4 * matrix, modules * (2 * r**3 // 3 + 2 * r**3)),
        # A reduction to triangular form, sweeps of dot products, and rotations in all but the last.
        "svd": Work(2 * matrix, modules * (4 * r**3 // 3 + SWEEPS.get(r, SWEEPS[64]) * 6 * r**3 - 3 * r**3)),
        # T_B, T_A, R_B·T_B, R_A·T_A, what is lost, and two Gram matrices for its bounds.
        "transforms": Work(4 * matrix, modules * (9 * r * r * k + 4 * r * k * k)),
        "truncate": Work(factors + a.rows * k * a.bytes, 2 * a.rows * r * k),
    }


def floor(gpu: Gpu, part: Work) -> float:
    """Seconds: all bytes at full bandwidth or all operations at full rate, whichever takes longer."""
    return max(part.bytes / gpu.bandwidth, part.operations / gpu.rate)


# Cycles of a multiprocessor that a warp's instruction keeps a unit of an H100 busy.
FP64 = WARP / H100.fp64
CONVERSION = WARP / 16
SHARED_128, SHARED_64 = 4, 2  # at 128 bytes a cycle, without conflicts
ISSUE = 1 / 4  # four schedulers

# Cycles from an instruction to one that needs its result; assumed, in round numbers.
SHARED_LATENCY, SHUFFLE, FP64_LATENCY, ROOT, DIVISION, BARRIER = 30, 25, 8, 90, 90, 30
L1, L2 = 40, 300
INDEX = 100  # a remainder by a number unknown to the compiler


@dataclass(frozen=True)
class Estimate:
    """Seconds that each resource alone would take."""

    launch: Launch
    bytes: float
    fp64: float
    shared: float
    issue: float
    latency: float

    @property
    def least(self) -> float:
        """If all of it overlaps."""
        return max(self.bytes, self.fp64, self.shared, self.issue, self.latency)

    @property
    def most(self) -> float:
        """If nothing does."""
        return self.bytes + self.fp64 + self.shared + self.issue + self.latency


def estimate(a: Adapter) -> dict[str, Estimate]:
    """Of every kernel on an H100, where the adapter needs each just once."""
    found = {}
    for launch in toolkit.launches(a.modules, a.bytes, H100.architecture):
        name = launch.kernel.split("<")[0]
        code = toolkit.code()[launch.kernel, H100.architecture]
        cycles = {"gram": _gram, "cores": _cores, "svd": _svd, "transforms": _transforms, "truncate": _truncate}[name]
        busiest = math.ceil(launch.blocks / H100.multiprocessors)  # multiprocessor's blocks
        fp64, shared, issue, latency = cycles(a, launch, code)
        found[name] = Estimate(
            launch=launch,
            bytes=_bytes(a, name) / H100.bandwidth,
            fp64=busiest * fp64 / CLOCK,
            shared=busiest * shared / CLOCK,
            issue=busiest * issue / CLOCK,
            latency=latency / CLOCK,
        )
    return found


def _bytes(a: Adapter, name: str) -> int:
    """With partial Gram matrices, which `gram` writes and `cores` reads."""
    partial = 8 * a.rank * (a.rank + 1) // 2 * (_blocks(a, "gram") if name in ("gram", "cores") else 0)
    return work(a)[name].bytes + partial


def _blocks(a: Adapter, name: str) -> int:
    launches = toolkit.launches(a.modules, a.bytes, H100.architecture)
    return sum(launch.blocks for launch in launches if launch.kernel.startswith(name))


Cycles = tuple[float, float, float, float]  # of fp64, shared memory and issue per block; of latency in all


def _gram(a: Adapter, launch: Launch, code: Code) -> Cycles:
    """The product's loop; a warp's iteration is one row, each thread a tile of STRIP². And the rows' conversion."""
    strip = int(launch.kernel[5])
    loop = _loop(code, strip * strip)
    strips = math.ceil(a.rank / strip)
    tiles = strips * (strips + 1) // 2
    groups = launch.threads // tiles
    rows = a.rows / launch.blocks
    iterations = rows / groups * math.ceil(groups * tiles / WARP)
    fp64, shared, issue = _reading(code, rows * a.rank)
    return (
        fp64 + iterations * strip * strip * FP64,
        shared + iterations * count(loop, r"LDS\.128") * SHARED_128,
        issue + iterations * len(loop) * ISSUE,
        0,
    )


def _truncate(a: Adapter, launch: Launch, code: Code) -> Cycles:
    """The product's loop; an iteration is two columns of X, each thread a tile of 4 × 4. And conversions to and fro."""
    loop = _loop(code, 32)
    across = math.ceil(a.kept / 4)
    height = min(launch.threads // across * 4 & ~7, 128)
    rows = a.rows / launch.blocks
    iterations = rows / height * math.ceil(height // 4 * across / WARP) * math.ceil(a.rank / 2)
    fp64, shared, issue = _reading(code, rows * a.rank)
    written = rows * a.kept / WARP  # per element: rounded, its error squared and weighted, put in order
    return (
        fp64 + iterations * 32 * FP64 + written * (5 * FP64 + CONVERSION),
        shared + iterations * count(loop, r"LDS\.128") * SHARED_128 + written,
        issue + iterations * len(loop) * ISSUE + written * 15 * ISSUE,
        0,
    )


def _svd(a: Adapter, launch: Launch, code: Code) -> Cycles:
    """Steps of Jacobi and of the reduction before it; all pairs are rotated in all sweeps but the last."""
    r, sweeps, warps = a.rank, SWEEPS[a.rank], launch.threads // WARP
    apart, each, loops = r | 1, math.ceil(r / 8), list(toolkit.loops(code))
    (at,) = (i for i, loop in enumerate(loops) if count(loop, "DFMA") == 1.5 * count(loop, r"LDS\.64") > 0)
    dots, rotation = loops[at], next(loop for loop in loops[at + 1 :] if count(loop, "DMUL") == count(loop, "DFMA") > 0)
    between = [i for i in code if dots[-1].address < i.address < rotation[0].address]
    scalar = sum(count(between, name) for name in ("DFMA", "DADD", "DMUL", r"DSETP.*"))
    pairs = wavefronts([8 * ((lane // 8) * apart + lane % 8) for lane in range(WARP)], 8)
    lines = wavefronts([8 * (lane % 8 * apart + lane // 8) for lane in range(WARP)], 8)
    steps, rotated = (r - 1) * sweeps * warps, (r - 1) * (sweeps - 1) * warps
    reduced = r**3 / 3 / WARP
    fp64 = steps * (3 * each + scalar) + rotated * 4 * each + reduced * 4
    shared = (steps * 2 + rotated * 4) * each * pairs + reduced * 5 * lines
    issue = steps * (3 * each * len(dots) / count(dots, "DFMA") + len(between))
    issue += rotated * 4 * each * len(rotation) / (2 * count(rotation, "DFMA")) + reduced * 12
    sums = 3 * (SHUFFLE + FP64_LATENCY)
    step = BARRIER + INDEX + 2 * SHARED_LATENCY + (each + 12) * FP64_LATENCY + sums + 2 * ROOT + 2 * DIVISION
    largest = 5 * (SHUFFLE + 3 * FP64_LATENCY)
    pivot = BARRIER + largest + 3 * SHARED_LATENCY + 2 * sums + 2 * each * FP64_LATENCY + ROOT + DIVISION
    return fp64 * FP64, shared, issue * ISSUE, (r - 1) * sweeps * step + r * pivot


def _cores(a: Adapter, launch: Launch, code: Code) -> Cycles:
    """Partial Gram matrices added up, a search and a division per step of Cholesky, its updates, and M."""
    r, half = a.rank, launch.threads // 2
    parts = max(math.ceil(max(m, n) * _blocks(a, "gram") / a.rows) for m, n, _, _ in a.modules)
    sums = math.ceil(r * (r + 1) / 2 / half) * math.ceil(parts / 4) * L2
    search = SHARED_LATENCY + 5 * (SHUFFLE + 3 * FP64_LATENCY)
    step = search + ROOT + DIVISION + 2 * SHARED_LATENCY + 3 * BARRIER
    row = 2 * SHARED_LATENCY + FP64_LATENCY  # of an update
    updates = sum(math.ceil(i / (half // WARP)) * math.ceil(i / WARP) for i in range(r)) * row
    product = math.ceil((r / 4) ** 2 / launch.threads) * r * (L1 + 16 * FP64)
    operations = work(a)["cores"].operations / len(a.modules) / 2 / WARP
    return operations * FP64, operations * 3 * SHARED_64, operations * 5 * ISSUE, sums + r * step + updates + product


def _transforms(a: Adapter, launch: Launch, code: Code) -> Cycles:
    """A triangular solve row by row, then products staged in shared memory: three for T, what is lost, two bounds."""
    r, k = a.rank, a.kept
    solve = r * (L2 + BARRIER + SHARED_LATENCY)

    def stages(rows: int, columns: int, inner: int) -> int:
        return math.ceil(rows / 128) * math.ceil(columns / 32) * math.ceil(inner / 16)

    stage = L2 + 2 * BARRIER + 16 * (SHARED_LATENCY + FP64_LATENCY)
    products = 3 * stages(r, k, r) + stages(r, r, k) + 2 * stages(k, k, r)
    operations = work(a)["transforms"].operations / len(a.modules) / 2 / WARP
    return operations * FP64, operations * SHARED_128 / 4, operations * 2 * ISSUE, solve + products * stage


def _reading(code: Code, elements: float) -> tuple[float, float, float]:
    """Cycles of fp64, shared memory and issue to convert elements and put them into a panel."""
    warps = elements / WARP
    conversions = [i for i in code if i.name == "F2F.F64.F32"]
    around = sum(conversions[0].address <= i.address <= conversions[-1].address for i in code) / len(conversions)
    return warps * CONVERSION, warps * SHARED_64, warps * around * ISSUE


def _loop(code: Code, multiply_adds: int) -> Code:
    """The one innermost loop with so many."""
    (loop,) = (loop for loop in toolkit.loops(code) if count(loop, "DFMA") == multiply_adds)
    return loop


def wavefronts(addresses: Sequence[int], size: int) -> int:
    """Cycles of shared memory for a warp's access of ``size`` bytes per lane: 128 bytes at a time, 32 banks of 4."""
    lanes = 128 // size
    total = 0
    for first in range(0, len(addresses), lanes):
        words = {address // 4 + i for address in addresses[first : first + lanes] for i in range(size // 4)}
        total += max(sum(word % 32 == bank for word in words) for bank in range(32))
    return total
