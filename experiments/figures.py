"""Figures, drawn from the results alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from analysis import Results

matplotlib.use("svg")
from matplotlib import pyplot as plt

LABELS = {
    "sigma": "PARA, σ",
    "density": "PARA, σ²/(m+n)",
    "uniform": "one rank for all",
    "layer-energy": "energy per layer (PEFT)",
    "trained-low": "trained at the small rank",
    "random": "random components",
    "base-aware": "σ/‖W₀‖₂",
    "relative": "σ/‖ΔW‖_F",
    "density-floor": "PARA, σ²/(m+n), ranks ≥ 1",
    "tempered": "σ²/((m+n)·‖ΔW‖_F)",
    "columns": "largest ‖b‖·‖a‖, no SVD",
    "adalora": "AdaLoRA trained to the budget",
    "lora-tuned": "LoRA and 50 more steps",
    "energy-sigma": "PARA, σ, by energy",
    "energy-density": "PARA, σ²/(m+n), by energy",
    "tuned": "PARA, σ²/(m+n), and 50 more steps",
}
TITLES = {
    "rotten-tomatoes": "MiniLM, r=64, Rotten Tomatoes",
    "rotten-tomatoes-r32": "MiniLM, r=32, Rotten Tomatoes",
    "rotten-tomatoes-qv": "MiniLM, q and v only, r=32, Rotten Tomatoes",
    "imdb": "MiniLM, r=64, IMDB",
    "vader": "MiniLM, r=64, VADER's rated sets",
    "fashion-mnist": "EfficientNet-Lite0, r=32, Fashion-MNIST",
    "garments": "small ViT, r=32, Fashion-MNIST's garments",
}
COLOURS = dict(zip(LABELS, (*plt.get_cmap("tab10").colors, *plt.get_cmap("Dark2").colors), strict=False))
SHOWN = ("sigma", "density", "uniform", "layer-energy", "trained-low", "random")


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "para_ext", "svg.fonttype": "none"}):
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _panels(results: Results) -> tuple[Any, list[Any]]:
    """A figure with a panel per task, two beside each other; those left over are hidden."""
    rows = -(-len(results.tasks) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(9.2, 3.8 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(results.tasks) :]:
        axis.set_visible(False)
    return figure, list(axes.flat)


def accuracy(results: Results, path: Path) -> None:
    """Accuracy over LoRA parameters, a panel per task; bars span the seeds."""
    figure, axes = _panels(results)
    for axis, task in zip(axes, results.tasks, strict=False):
        full = results.accuracy(task, "lora").mean
        axis.axhline(100 * full, color="black", linewidth=0.8)
        axis.axhline(100 * results.head(task), color="black", linewidth=0.8, linestyle=":")
        axis.annotate("LoRA, 100 %", (6.25, 100 * full), va="bottom", fontsize=7)
        axis.annotate("head on frozen features", (6.25, 100 * results.head(task)), va="bottom", fontsize=7)
        for method in (m for m in results.methods(task) if m in SHOWN):
            ranks = [rank for rank in results.ranks(task) if results.seeds(task, method, rank)]
            values = [[100 * r.accuracy for r in results.seeds(task, method, k).values()] for k in ranks]
            means = np.array([np.mean(v) for v in values])
            spread = [means - [min(v) for v in values], [max(v) for v in values] - means]
            where = _shares(results, task, ranks)
            style = "--" if method == "trained-low" else "-"
            axis.errorbar(
                where, means, yerr=spread, label=LABELS[method], color=COLOURS[method], linestyle=style,
                marker="o", markersize=3, linewidth=1.2, elinewidth=0.7, capsize=2,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xticks([6.25, 12.5, 25, 50], ["6.25 %", "12.5 %", "25 %", "50 %"])
        axis.set_title(TITLES[task], fontsize=9)
        axis.set_xlabel("LoRA parameters kept")
        axis.set_ylabel("test accuracy, %")
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=7)
    _save(figure, path)


def _shares(results: Results, task: str, ranks: list[int]) -> list[float]:
    """Budgets in per cent: the ranks are halvings of the LoRA's."""
    return [100 * rank / (2 * max(results.ranks(task))) for rank in ranks]


def energy(results: Results, path: Path) -> None:
    """Points lost over energy kept, by PARA with σ: what energy keeps accuracy?"""
    figure, axis = plt.subplots(figsize=(5, 3.6))
    for colour, task in enumerate(results.tasks):
        full = results.seeds(task, "lora")
        rows = [row for row in results.rows if row.task == task and row.method in ("sigma", "energy-sigma")]
        x = [100 * (row.energy or 0) for row in rows]
        y = [100 * (row.accuracy - full[row.seed].accuracy) for row in rows]
        axis.scatter(x, y, s=14, color=f"C{colour}", label=TITLES[task], alpha=0.8)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axhline(-1, color="black", linewidth=0.8, linestyle=":")
    axis.axvline(95, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlabel("energy kept, % of Σσ²")
    axis.set_ylabel("accuracy − LoRA's, points")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7)
    _save(figure, path)


def error(results: Results, path: Path) -> None:
    """Accuracy over the predicted error, every method and budget."""
    figure, axes = _panels(results)
    for axis, task in zip(axes, results.tasks, strict=False):
        for method in results.methods(task):
            cells = [results.seeds(task, method, rank) for rank in results.ranks(task)]
            rows = [row for cell in cells for row in cell.values() if row.error is not None]
            if rows and method != "trained-low":
                x, y = [row.error for row in rows], [100 * row.accuracy for row in rows]
                axis.scatter(x, y, s=12, color=COLOURS[method], label=LABELS[method])
        axis.set_title(TITLES[task], fontsize=9)
        axis.set_xlabel("‖ΔW − ΔW'‖ / ‖ΔW‖")
        axis.set_ylabel("test accuracy, %")
        axis.grid(alpha=0.25)
    axes[1].legend(fontsize=6, loc="lower left")
    _save(figure, path)


def adapters(kept: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Energy kept by each method, budget → method → one value per adapter."""
    figure, axes = plt.subplots(1, len(kept), figsize=(3.4 * len(kept), 3.6), sharey=True, squeeze=False)
    for axis, (budget, methods) in zip(axes[0], kept.items(), strict=True):
        for place, (method, values) in enumerate(methods.items()):
            axis.plot([place] * len(values), [100 * v for v in values], "o", markersize=3, color=COLOURS[method])
            axis.plot([place - 0.3, place + 0.3], [100 * float(np.median(values))] * 2, color="black")
        axis.set_xticks(range(len(methods)), [LABELS[m] for m in methods], rotation=35, ha="right", fontsize=7)
        axis.set_title(f"{budget} of the parameters", fontsize=9)
        axis.grid(alpha=0.25, axis="y")
    axes[0][0].set_ylabel("energy kept, %")
    _save(figure, path)
