"""Plots of spectra, through matplotlib (the extra ``report``)."""

from __future__ import annotations

from collections import defaultdict
from itertools import accumulate
from pathlib import Path

from .errors import ParaError
from .naming import module_type
from .spectra import ModuleSpectrum, Spectra


def plot_spectra(spectra: Spectra, path: Path, title: str) -> None:
    """Draw σ by module type, and energy against parameters for the global and the uniform rule, into an image file.

    Raises:
        ParaError: matplotlib is not installed, or the file type is not one it writes.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ParaError("--plot needs matplotlib; install para_ext[report]") from error
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)

    by_type: dict[str, list[ModuleSpectrum]] = defaultdict(list)
    for module in spectra.modules:
        by_type[module_type(module.name)].append(module)
    for color, (name, modules) in enumerate(sorted(by_type.items())):
        for i, module in enumerate(modules):
            positive = [s for s in module.sigma if s > 0]
            left.semilogy(
                range(1, len(positive) + 1), positive, color=f"C{color % 10}", alpha=0.4, lw=0.8,
                label=name if i == 0 else None,
            )  # fmt: skip
    left.set(xlabel="component", ylabel="σ of ΔW", title="singular values")
    left.legend(fontsize="small")

    right.plot(*_global_curve(spectra), label="global (density)")
    right.plot(*_uniform_curve(spectra), ".-", label="uniform rank")
    right.set(xlabel="LoRA parameters kept", ylabel="energy kept", title="what a budget keeps", ylim=(0, 1.02))
    right.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise ParaError(f"'{path}' cannot be drawn ({error}); give a name that ends in .png, .svg or .pdf") from error


def _global_curve(spectra: Spectra) -> tuple[list[float], list[float]]:
    components = sorted(
        ((s * s, m.m + m.n) for m in spectra.modules for s in m.sigma), key=lambda c: c[0] / c[1], reverse=True
    )
    whole, energy = spectra.parameters, spectra.energy or 1.0
    return (
        [0.0, *(c / whole for c in accumulate(cost for _, cost in components))],
        [0.0, *(e / energy for e in accumulate(gain for gain, _ in components))],
    )


def _uniform_curve(spectra: Spectra) -> tuple[list[float], list[float]]:
    plans = [spectra.plan(rank=r) for r in range(1, max(m.rank for m in spectra.modules) + 1)]
    return [p.parameters_after / p.parameters_before for p in plans], [p.energy for p in plans]
