"""Prints the comparison once all is timed: what pytest-benchmark's own table does not say."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """As timeit does: a search for cycles through all that pytest and PyTorch hold takes up to 90 ms, of any call."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Markdown tables of the whole calls, of those on a GPU, and of the core SVDs."""
    benchmarks = getattr(getattr(config, "_benchmarksession", None), "benchmarks", [])
    calls = [(b.group, b.extra_info) for b in benchmarks if "floor" in b.extra_info]
    write = terminalreporter.write_line
    if calls:
        terminalreporter.section("whole call; milliseconds, medians; stages by the same threads")
        write(
            "| shapes, keep 0.25 | para_ext | × torch QR | × torch Gram | with memory at hand | at the floor | cores "
            "| svd | truncate | Python | memory | floor | × floor | reused memory |"
        )
        write("|---|" + "---:|" * 13)
        for group, info in calls:
            stages = (info[key] for key in ("cores", "svd", "truncate", "python", "memory", "floor"))
            qr, gram, limit = info["wanted"]
            least = info["floor"] + info["svd"]  # a call without Python, fresh memory, or a cycle lost
            write(
                f"| {group} | {info['whole'] * 1e3:.1f} | {_marked(info['× torch QR'], qr)} "
                f"| {_marked(info['× torch Gram'], gram)} "
                f"| {_marked(info['× torch QR, memory at hand'], qr)}, "
                f"{_marked(info['× torch Gram, memory at hand'], gram)} "
                f"| {info['torch QR'] / least:.1f}, {info['torch Gram'] / least:.1f} | "
                + " | ".join(f"{seconds * 1e3:.1f}" for seconds in stages)
                + f" | {info['of floor']:.2f}{_mark(limit is None or info['of floor'] <= limit)}"
                f" | {info['of floor, reused']:.2f} |"
            )
        for key in ("× torch QR", "× torch Gram", "× torch QR, memory at hand", "× torch Gram, memory at hand"):
            mean = math.exp(sum(math.log(info[key]) for _, info in calls) / len(calls))
            lost = [group for group, info in calls if info[key] < 1]
            write(f"{key}: geometric mean {mean:.1f}; slower than it: {', '.join(lost) or 'nowhere'}")
        write("*: what we want is not reached")
    on_gpu = [(b.group, b.extra_info) for b in benchmarks if "GPU" in b.extra_info]
    if on_gpu:
        terminalreporter.section(f"whole call on {on_gpu[0][1]['GPU']}; milliseconds, medians")
        write("| shapes, keep 0.25 | para_ext | × torch QR | × torch Gram | kernels: cores, svd | truncate | a copy |")
        write("|---|" + "---:|" * 6)
        for group, info in on_gpu:
            ratios = f"{info['× torch QR']:.1f} | {info['× torch Gram']:.1f}"
            times = " | ".join(f"{info[key] * 1e3:.3f}" for key in ("cores, svd", "truncate", "copy"))
            write(f"| {group} | {info['whole'] * 1e3:.2f} | {ratios} | {times} |")
        write("a copy: as many bytes as are read and written, by the device's own copy")
    svds = [(b.name, b.extra_info, b) for b in benchmarks if "× torch.linalg.svd" in b.extra_info]
    if svds:
        terminalreporter.section("core SVD; milliseconds, medians")
        write("| | para_ext | batched | pooled | × the faster |")
        write("|---|---:|---:|---:|---:|")
        for name, info, b in svds:
            times = (b.stats.median, info["batched"], info["pooled"])
            row = " | ".join(f"{seconds * 1e3:.2f}" for seconds in times)
            write(f"| {name} | {row} | {info['× torch.linalg.svd']:.1f} |")


def _marked(ratio: float, wanted: float) -> str:
    return f"{ratio:.1f}{_mark(ratio >= wanted)}"


def _mark(reached: bool) -> str:
    return "" if reached else "*"
