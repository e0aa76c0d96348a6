"""Writes what is known of the kernels without a GPU into docs/: `make cuda-static`, after every change to csrc/cuda.

docs/cuda-kernels.md is made as a whole. In docs/cuda.md the text is by hand, and tables stand between two comments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import toolkit
from .estimate import GPUS, H100, Adapter, estimate, floor, work

DOCS = toolkit.ROOT / "docs"
RANKS = (16, 32, 64, 128, 256)
SHAPE = (4096, 4096)

HEAD = """# The CUDA kernels as they are compiled

Made by `make cuda-static`; CI compiles with the same toolkit (`cuda-toolkit.txt`) and fails where anything differs.
All of it is computed without a GPU. What the kernels do and how fast they may be: [cuda.md](cuda.md).
"""

Row = Sequence[object]


def documents() -> dict[Path, str]:
    """What the files should hold."""
    parts = [HEAD, "## Registers", _registers(), "## Machine code", _machine_code(), "## Launches", _launches()]
    by_hand = DOCS / "cuda.md"
    tables = {"work": _work(), "floor": _floor(), "estimate": _estimate()}

    def filled(match: re.Match[str]) -> str:
        return f"<!-- {match[1]}: made by `make cuda-static` -->\n{tables[match[1]]}\n<!-- end -->"

    text = re.sub(r"<!-- (\w+): made by [^>]*-->.*?<!-- end -->", filled, by_hand.read_text(), flags=re.DOTALL)
    return {DOCS / "cuda-kernels.md": "\n\n".join(part.strip() for part in parts) + "\n", by_hand: text}


def _table(head: Row, rows: Iterable[Row], text_columns: int = 1) -> str:
    rule = "|" + "---|" * text_columns + "---:|" * (len(head) - text_columns)
    above, *below = (f"| {' | '.join(str(cell) for cell in row)} |" for row in (head, *rows))
    return "\n".join([above, rule, *below])


def _architectures() -> list[str]:
    return [f"sm_{architecture}" for architecture in toolkit.architectures()]


def _kernels() -> list[str]:
    return sorted({kernel for kernel, _ in toolkit.resources()})


def _registers() -> str:
    resources = toolkit.resources()
    rows = []
    for kernel in _kernels():
        mine = [resources[kernel, architecture] for architecture in toolkit.architectures()]
        most = [max(getattr(x, field) for x in mine) for field in ("shared", "stack", "spills")]
        rows.append([f"`{kernel}`", *(x.registers for x in mine), *most])
    text = (
        "Per thread, as ptxas reports them; bytes of static shared memory per block, stack and spills per thread.\n\n"
    )
    return text + _table(["kernel", *_architectures(), "shared", "stack", "spills"], rows)


def _machine_code() -> str:
    patterns = (toolkit.WIDE_LOAD, toolkit.WIDE_STORE, "DFMA")
    rows = []
    for kernel in _kernels():
        codes = [toolkit.code()[kernel, architecture] for architecture in toolkit.architectures()]
        rows.append([f"`{kernel}`", *("/".join(str(toolkit.count(code, p)) for p in patterns) for code in codes)])
    text = (
        "Instructions in the code: 16-byte loads / 16-byte stores / fp64 multiply-adds. None touches local memory.\n\n"
    )
    return text + _table(["kernel", *_architectures()], rows)


def _launches() -> str:
    """Blocks per multiprocessor; a line for each launch that some architecture makes."""
    resources = toolkit.resources()
    found: dict[tuple[str, int, int, int], dict[int, int]] = {}
    for architecture in toolkit.architectures():
        ranks = sorted({*RANKS, _largest_svd(architecture)})
        for r in ranks:
            for launch in toolkit.launches([(*SHAPE, r, r // 4)], 4, architecture):
                blocks = toolkit.blocks_per_multiprocessor(architecture, resources[launch.kernel, architecture], launch)
                found.setdefault((launch.kernel, r, launch.threads, launch.shared), {})[architecture] = blocks
    rows = [
        [f"`{kernel}`", r, threads, f"{shared:,}", *(blocks.get(a, "–") for a in toolkit.architectures())]
        for (kernel, r, threads, shared), blocks in sorted(found.items())
    ]
    text = (
        "Blocks per multiprocessor (`cuda_occupancy.h`) of the launches that a call makes for factors of rank r, a\n"
        "quarter of it kept: threads per block, bytes of dynamic shared memory. –: no such launch there. Among the\n"
        "ranks is the largest whose SVD fits each architecture.\n\n"
    )
    return text + _table(["kernel", "r", "threads", "shared", *_architectures()], rows)


def _largest_svd(architecture: int) -> int:
    """The largest rank with a launch of `svd`."""
    fits = (
        r
        for r in range(256, 0, -1)
        if any(launch.kernel == "svd" for launch in toolkit.launches([(*SHAPE, r, 1)], 4, architecture))
    )
    return next(fits)


def _work() -> str:
    rows = []
    for a in (Adapter(16, 4), Adapter(64, 4)):
        for kernel, x in estimate(a).items():
            part = work(a)[kernel]
            rows.append(
                [
                    f"`{kernel}`",
                    a.rank,
                    f"{x.launch.blocks:,}",
                    x.launch.threads,
                    f"{x.launch.shared / 1024:.1f}",
                    f"{part.bytes / 1e6:,.1f}",
                    f"{part.operations / 1e9:.3f}",
                ]
            )
    return _table(["kernel", "r", "blocks", "threads", "shared, KB", "MB", "GFLOP"], rows)


def _floor() -> str:
    rows = []
    for name, gpu in GPUS.items():
        for r in (16, 64, 256):
            row: list[object] = [name, r]
            for size in (2, 4):
                seconds = {kernel: floor(gpu, part) for kernel, part in work(Adapter(r, size)).items()}
                small = seconds["cores"] + seconds["svd"] + seconds["transforms"]
                row += [_ms(x) for x in (seconds["gram"], small, seconds["truncate"], sum(seconds.values()))]
            rows.append(row)
    heads = [f"{part} {dtype}" for dtype in ("bf16", "fp32") for part in ("gram", "r × r", "truncate", "all")]
    return _table(["GPU", "r", *heads], rows)


def _estimate() -> str:
    rows = []
    for a in (Adapter(16, 2), Adapter(16, 4), Adapter(64, 2), Adapter(64, 4)):
        found = estimate(a)
        for kernel, x in found.items():
            parts = (x.bytes, x.fp64, x.shared, x.issue, x.latency)
            shown = [_ms(part) if part else "–" for part in parts]
            rows.append([a.name, f"`{kernel}`", _ms(floor(H100, work(a)[kernel])), *shown, _ms(x.least), _ms(x.most)])
        floors = sum(floor(H100, part) for part in work(a).values())
        ends = (sum(x.least for x in found.values()), sum(x.most for x in found.values()))
        rows.append([a.name, "all", _ms(floors), *[""] * 5, *map(_ms, ends)])
    heads = ["floor", "bytes", "fp64", "shared", "issue", "latency", "least", "most"]
    return _table(["adapter", "kernel", *heads], rows, text_columns=2)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 1e-3 else f"{seconds * 1e3:.2f}"


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text)
