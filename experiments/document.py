"""Writes what was measured into docs/evidence.md and README.md: `make evidence-docs`, from the CSV files alone.

The text there is by hand; tables stand between two comments.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import figures
import numpy as np
from analysis import Difference, Estimate, Results, read, spearman

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
FIGURES = ROOT / "docs" / "figures"
DOCUMENTS = (ROOT / "docs" / "evidence.md", ROOT / "README.md")
HEADLINE_TASKS = 3  # one for each model
HEADLINE = ("sigma", "density", "uniform", "trained-low")
PAIRS = (
    ("sigma", "uniform"),
    ("density", "uniform"),
    ("density", "sigma"),
    ("sigma", "layer-energy"),
    ("density", "layer-energy"),
    ("sigma", "trained-low"),
    ("density", "trained-low"),
    ("density-floor", "density"),
    ("tempered", "density"),
    ("base-aware", "density"),
    ("relative", "density"),
    ("columns", "density"),
    ("tuned", "density"),
    ("tuned", "trained-low"),
    ("tuned", "lora-tuned"),
    ("adalora", "trained-low"),
    ("density", "adalora"),
)
WORK = {"trainings": "trainings", "cells": "measurements"}
WHOLE = ("lora-tuned",)  # without a budget


def main() -> None:
    """Draw the figures, fill in the tables."""
    results = Results(read(RESULTS))
    figures.accuracy(results, FIGURES / "accuracy.svg")
    figures.energy(results, FIGURES / "energy.svg")
    figures.error(results, FIGURES / "error.svg")
    figures.adapters(kept_energy(RESULTS / "adapters.csv"), FIGURES / "adapters.svg")
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        if (
            new := filled(text, tables(results))
        ) != text:  # the README's date decides whether the package is built anew
            path.write_text(new, encoding="utf-8")


def tables(results: Results) -> dict[str, Callable[[], str]]:
    """The tables by the names that the documents know them by."""
    return {
        "headline": lambda: headline(results),
        "accuracy": lambda: accuracy(results),
        "holds": lambda: holds(results),
        "pairs": lambda: pairs(results),
        "errors": lambda: errors(results),
        "energies": lambda: energies(results),
        "times": lambda: times(RESULTS),
        "adapters": lambda: adapters(kept_energy(RESULTS / "adapters.csv")),
    }


def filled(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """The text with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match[1]}: made by `make evidence-docs` -->\n{tables[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+): made by `make evidence-docs` -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def headline(results: Results) -> str:
    """A row per budget and task: the part of LoRA's gain that is kept, with the accuracy."""
    rows = []
    for task in results.tasks[:HEADLINE_TASKS]:
        full, head = results.accuracy(task, "lora").mean, results.head(task)
        rows.append([f"**{figures.TITLES[task]}**, LoRA {_percent(full)}, head only {_percent(head)}", *[""] * 4])
        for rank in results.ranks(task):
            cells = [_accuracy(results, task, method, rank) for method in HEADLINE]
            rows.append([f"{_share(results, task, rank)} of the parameters", *cells])
    return _table(["", *(figures.LABELS[method] for method in HEADLINE)], rows)


def accuracy(results: Results) -> str:
    """Every method at every budget."""
    parts = []
    for task in results.tasks:
        ranks = results.ranks(task)
        full = results.seeds(task, "lora")
        more = results.seeds(task, "lora-tuned")
        parts.append(
            f"**{figures.TITLES[task]}**: {next(iter(full.values())).parameters:,} LoRA parameters, "
            f"{len(full)} seed{'s' * (len(full) > 1)}. LoRA {_estimate(results.accuracy(task, 'lora'))}, "
            + (f"with 50 more steps {_estimate(results.accuracy(task, 'lora-tuned'))}, " if more else "")
            + f"head on frozen features {_percent(results.head(task))}."
        )
        rows = [
            [figures.LABELS[method], *(_accuracy(results, task, method, rank) for rank in ranks)]
            for method in results.methods(task)
        ]
        parts.append(_table(["", *(_share(results, task, rank) for rank in ranks)], rows))
    return "\n\n".join(parts)


def holds(results: Results) -> str:
    """The smallest budget up to which accuracy holds."""
    rows = []
    for task in results.tasks:
        for method in (m for m in results.methods(task) if m != "random"):
            if results.seeds(task, method, results.ranks(task)[0]):
                found = [results.smallest(task, method, points=1), results.smallest(task, method, part=0.05)]
                rows.append([task, figures.LABELS[method], *(_share(results, task, k) if k else "none" for k in found)])
    return _table(["task", "method", "< 1 point lost", "< 5 % of the gain lost"], rows, 2)


def pairs(results: Results) -> str:
    """Points between two methods at one budget; bold where the interval leaves out 0."""
    rows = []
    for task in results.tasks:
        ranks = results.ranks(task)
        for ours, theirs in PAIRS:
            cells = [_pair(results, task, ours, theirs, rank) for rank in ranks]
            if any(cells):
                rows.append([task, f"{figures.LABELS[ours]} − {figures.LABELS[theirs]}", *cells])
    shares = [_share(results, results.tasks[0], rank) for rank in results.ranks(results.tasks[0])]
    return _table(["task", "difference in points", *shares], rows, 2)


def errors(results: Results) -> str:
    """Does the smaller predicted error have the higher accuracy?"""
    rows = []
    for task in results.tasks:
        compared = [m for m in results.methods(task) if m not in ("trained-low", "tuned", "adalora")]
        cells = []
        for chosen in (compared, [m for m in compared if m not in ("random", "columns")]):
            within = [
                spearman([-(r.error or 0) for r in found], [r.accuracy for r in found])
                for rank in results.ranks(task)
                for seed in results.seeds(task, "lora")
                if len(found := [s[seed] for m in chosen if seed in (s := results.seeds(task, m, rank))]) > 2
            ]
            everything = [
                r for m in chosen for rank in results.ranks(task) for r in results.seeds(task, m, rank).values()
            ]
            across = spearman([-(r.error or 0) for r in everything], [r.accuracy for r in everything])
            cells += [f"{np.nanmean(within):.2f}", f"{across:.2f}"]
        rows.append([task, *cells])
    head = ["task", "all, at one budget", "all, over all budgets", "without the floor, at one budget"]
    return _table([*head, "without the floor, over all budgets"], rows)


def energies(results: Results) -> str:
    """What an energy budget keeps, and costs."""
    rows = []
    for task in results.tasks:
        full = results.seeds(task, "lora")
        for method in ("energy-sigma", "energy-density"):
            budgets = {r.energy_budget for r in results.rows if r.task == task and r.method == method}
            for energy in sorted((e for e in budgets if e is not None), reverse=True):
                found = results.seeds(task, method, None, energy)
                share = float(np.mean([found[s].parameters / full[s].parameters for s in found]))
                gap = results.compared(task, method, "lora", None, None, energy)
                kept = results.gain_kept(task, method, None, energy)
                seeds = str(len(found))
                score = figures.LABELS[method.removeprefix("energy-")]
                rows.append([task, score, f"{energy:.0%}", seeds, _percent(share), _points(gap), f"{kept:.0%}"])
    head = ["task", "score", "energy", "seeds", "parameters", "accuracy − LoRA's, points", "gain kept"]
    return _table(head, rows, 2)


def times(folder: Path) -> str:
    """Wall and processor time of all trainings and measurements."""
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    for name in ("trainings", "cells"):
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                of_primary = row["method"] in (*figures.SHOWN, "head", "lora")
                what = f"{WORK[name]}{'' if of_primary else ', secondary'}"
                found.setdefault((row["task"], what), []).append(row)
    rows = []
    for (task, what), mine in found.items():
        wall, cpu = (sum(float(r[c]) for r in mine) / 60 for c in ("seconds", "cpu_seconds"))
        rows.append([task, what, str(len(mine)), f"{wall:.0f}", f"{cpu:.0f}"])
    return _table(["task", "", "number", "minutes", "minutes of processor time"], rows, 2)


def kept_energy(path: Path) -> dict[str, dict[str, list[float]]]:
    """Budget → method → energy kept of each adapter."""
    found: dict[str, dict[str, list[float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            budget = f"{float(row['budget']):.4g} %"
            found.setdefault(budget, {}).setdefault(row["method"], []).append(float(row["energy"]))
    return found


def adapters(kept: dict[str, dict[str, list[float]]]) -> str:
    """Median and range over the adapters."""
    methods = list(next(iter(kept.values())))
    rows = [
        [figures.LABELS[m], *(f"{np.median(v[m]):.1%} ({min(v[m]):.1%}–{max(v[m]):.1%})" for v in kept.values())]
        for m in methods
    ]
    counts = [f"{budget} ({len(v[methods[0]])} adapters)" for budget, v in kept.items()]
    return _table(["energy kept, median (range)", *counts], rows)


# Cells of tables


def _accuracy(results: Results, task: str, method: str, rank: int) -> str:
    if not results.seeds(task, method, rank):
        return "not run"
    found = results.accuracy(task, method, rank)
    seeds = len(results.seeds(task, method, rank))
    few = "" if seeds == len(results.seeds(task, "lora")) else f", {seeds} seed{'s' * (seeds > 1)}"
    return f"{_estimate(found)} ({results.gain_kept(task, method, rank):.0%}{few})"


def _pair(results: Results, task: str, ours: str, theirs: str, rank: int) -> str:
    their_rank = None if theirs in WHOLE else rank
    a, b = results.seeds(task, ours, rank), results.seeds(task, theirs, their_rank)
    if not a.keys() & b.keys():
        return ""
    return _points(results.compared(task, ours, theirs, rank, their_rank))


def _points(found: Difference) -> str:
    text = f"{100 * found.mean:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
    return f"**{text}**" if found.decided else text


def _estimate(found: Estimate) -> str:
    return _percent(found.mean) + (f" ± {100 * found.half:.1f}" if math.isfinite(found.half) else "")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _share(results: Results, task: str, rank: int) -> str:
    return f"{100 * rank / (2 * max(results.ranks(task))):.4g} %"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    rule = "|" + "---|" * text_columns + "---:|" * (len(head) - text_columns)
    above, *below = (f"| {' | '.join(row)} |" for row in (head, *rows))
    return "\n".join([above, rule, *below])


if __name__ == "__main__":
    main()
