"""Plots of spectra, through matplotlib (the extra ``report``): what the page of ``page.py`` shows, as one image."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from .charts import DEFAULT, Choice, RankMap, choices, uniform
from .errors import ParaError
from .naming import module_type
from .spectra import ModuleSpectrum, Spectra


def plot_spectra(spectra: Spectra, path: Path, title: str) -> None:
    """Draw σ by module type, size against error for the global and the uniform rule, and ranks into an image file.

    Raises:
        ParaError: matplotlib is not installed, or the file type is not one it writes.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ParaError("a plot needs matplotlib; install para_ext[report]") from error
    plans = choices(spectra)
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplot_mosaic([["spectra", "curve"], ["map", "map"]], height_ratios=[3, 2])
    figure.suptitle(title, parse_math=False)  # a name, which may have dollars in it
    _spectra(panels["spectra"], spectra)
    _curve(panels["curve"], spectra, plans)
    _map(panels["map"], spectra, plans)
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise ParaError(f"'{path}' cannot be drawn ({error}); give a name that ends in .png, .svg or .pdf") from error


def _spectra(axes: Any, spectra: Spectra) -> None:
    by_type: dict[str, list[ModuleSpectrum]] = defaultdict(list)
    for module in spectra.modules:
        by_type[module_type(module.name)].append(module)
    for color, (name, modules) in enumerate(sorted(by_type.items())):
        for i, module in enumerate(modules):
            positive = [s for s in module.sigma if s > 0]
            axes.semilogy(
                range(1, len(positive) + 1), positive, color=f"C{color % 10}", alpha=0.4, lw=0.8,
                label=_literal(name) if i == 0 else None,
            )  # fmt: skip
    axes.set(xlabel="component", ylabel="σ of ΔW", title="singular values")
    axes.legend(fontsize="small")


def _curve(axes: Any, spectra: Spectra, plans: list[Choice]) -> None:
    norm = math.sqrt(spectra.energy) or 1.0
    for label, style, drawn in (
        ("one threshold for all", "-", [c.plan for c in plans if not c.name]),
        ("one rank for all", ".:", uniform(spectra)),
        *((c.name, "D", [c.plan]) for c in plans if c.name),
    ):
        sizes = [p.parameters_after / p.parameters_before for p in drawn]
        axes.plot(sizes, [p.error / norm for p in drawn], style, label=label)
    axes.set(xlabel="LoRA parameters kept", ylabel="‖ΔW − ΔW'‖ / ‖ΔW‖", title="size and error")
    axes.set(xlim=(0, 1.02), ylim=(0, None))
    axes.legend(fontsize="small")


def _map(axes: Any, spectra: Spectra, plans: list[Choice]) -> None:
    chosen = next((c for c in plans if c.option == DEFAULT), plans[-1])
    map_ = RankMap.of([module.name for module in spectra.modules])
    ranks = np.full((len(map_.kinds), len(map_.layers)), np.nan)
    for (layer, kind), rank in zip(map_.cells, chosen.plan.ranks.values(), strict=True):
        ranks[kind, layer] = rank
    image = axes.imshow(ranks, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    axes.figure.colorbar(image, ax=axes, pad=0.01)
    every = -(-len(map_.layers) // 32)
    labels = [_literal(label) for label in map_.labels[::every]]
    axes.set_xticks(range(0, len(map_.layers), every), labels, rotation=90 if max(map(len, labels)) > 3 else 0)
    axes.set_yticks(range(len(map_.kinds)), map(_literal, map_.kinds))
    axes.tick_params(labelsize="small")
    axes.set(xlabel="layer", title=f"ranks for {chosen.option}")


def _literal(name: str) -> str:
    """A name whose dollars are no formula."""
    return name.replace("$", r"\$")
