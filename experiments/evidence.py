"""Evidence: does PARA's claim hold on real models?

python experiments/evidence.py rates             try learning rates on rows that are not tested on
python experiments/evidence.py run               train and measure the primary grid
python experiments/evidence.py more              the rest: other scores, more steps, other tasks
python experiments/evidence.py adapters FOLDER   energy kept of a folder of real adapters
python experiments/evidence.py collect           write experiments/results/ from what was measured
python experiments/evidence.py quick             measure one row anew and say how far it is from the one in results/

A run that is stopped goes on where it was. `document.py` makes figures and tables of the results.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # read once, with torch: threads that wait must not burn the other's core

import analysis
import collection
import grid
import torch
import training
import transformers
from grid import Cell, Grid
from peft import PeftModel

import para_ext

RESULTS = Path(__file__).parent / "results"
PRIMARY = ("rotten-tomatoes", "fashion-mnist")
OTHERS = ("garments", "rotten-tomatoes-qv", "vader", "rotten-tomatoes-r32", "imdb")
# What tells most comes first.
PARTS: tuple[Callable[[str, int], list[Cell]], ...] = (
    partial(grid.compressions, chosen=("sigma", "uniform", "density")),
    *(partial(grid.trained_low, divisor=divisor) for divisor in (4, 16)),
    partial(grid.compressions, chosen=("layer-energy", "random")),
    *(partial(grid.trained_low, divisor=divisor) for divisor in (8, 2)),
)
# (rank, learning rate) that were tried; those that tasks.py says are among them.
RATES = {
    "rotten-tomatoes": (
        *((64, 1e-3), (64, 2e-3), (4, 1e-3), (4, 4e-3)),
        *((16, 1e-3), (16, 2e-3), (16, 4e-3)),
    ),
    "fashion-mnist": (
        *((32, 1e-3), (32, 4e-3), (32, 1e-2), (2, 4e-3), (2, 1.6e-2)),
        *((8, 4e-3), (8, 8e-3), (8, 1.6e-2)),
    ),
    "garments": ((32, 2e-3), (32, 4e-3), (32, 8e-3), (2, 8e-3), (2, 1.6e-2), (8, 4e-3), (8, 8e-3)),
}
ADALORA_RATES = (2e-3, 5e-3, 1.25e-2, 3e-2)
QUICK_RANK = 16
QUICK_TOLERANCE = 0.03  # of accuracy: 2.5 standard errors of 1,500 rows, for other processors train other weights


def primary() -> Iterable[tuple[str, Cell]]:
    """Cells of the primary grid."""
    for part, seed, name in itertools.product(PARTS, grid.SEEDS, PRIMARY):
        yield from ((name, cell) for cell in part(name, seed))


def more() -> Iterable[tuple[str, Cell]]:
    """Cells of what comes after it, the most telling first."""
    for part in (
        grid.energies,
        partial(grid.compressions, chosen=("density-floor", "tempered", "relative", "base-aware")),
        partial(grid.compressions, chosen=("columns",)),
    ):
        for seed, name in itertools.product(grid.SEEDS, PRIMARY):
            yield from ((name, cell) for cell in part(name, seed))
    for part in (grid.tuned, grid.allotted):
        for seed, name in itertools.product(grid.SEEDS, PRIMARY):
            yield from ((name, cell) for cell in part(name, seed))
    for seed, name in itertools.product(grid.SEEDS, OTHERS):
        for part in PARTS:
            yield from ((name, cell) for cell in part(name, seed))
    for part in (grid.energies, grid.tuned, grid.allotted):
        for seed in grid.SEEDS:
            yield from (("garments", cell) for cell in part("garments", seed))


def run(cells: Iterable[tuple[str, Cell]], out: Path, tasks: Sequence[str], lacking: bool) -> None:
    """Measure what is not there yet, of these tasks: processes with different tasks may share the work.

    ``lacking``: nor in results/.
    """
    measured = Grid(out)
    there = {analysis.key(record) for record in analysis.records(RESULTS)} if lacking else set()
    for name, cell in cells:
        if name in tasks and analysis.key(grid.identity(name, cell)) not in there:
            measured.measure(name, cell)


def rates(out: Path, tasks: Sequence[str]) -> None:
    """Add to rates.csv what it lacks: accuracy on the validation rows, seed 0."""
    path = RESULTS / "rates.csv"
    there = {(r["task"], r["method"], r["rank"], r["learning_rate"]) for r in _read(path)}
    measured = Grid(out)
    for name in (name for name in RATES if name in tasks):
        task, tried = grid.TASKS[name], RATES[name]
        adalora = [(task.rank // 4, rate, "adalora") for rate in ADALORA_RATES]
        for rank, rate, method in (*((*pair, "lora") for pair in tried), *adalora):
            settings = {"task": name, "method": method, "rank": str(rank), "learning_rate": f"{rate:g}"}
            if tuple(settings.values()) in there:
                continue
            bench = measured.bench(name)
            folder = bench.adapter(replace(grid.Training.of(task, rank, 0, method), learning_rate=rate))
            logits = bench.logits(para_ext.decompose(folder).factors, grid.head_of(folder), "valid")
            found = grid.outcome(logits, task.splits().valid.labels)
            shown = {key: f"{found[key]:.6g}" for key in ("accuracy", "loss")}
            _write("rates", [*_read(path), {**settings, **shown, "code": grid.code()}])


def collect(out: Path) -> None:
    """Write all cells that were measured, in the order of the grid; those of results/ that were not stay there."""
    measured = Grid(out)
    wanted = [*primary(), *more()]
    old = {analysis.key(record): record for record in analysis.records(RESULTS)}
    records = {}
    for name, cell in wanted:
        key, path = analysis.key(grid.identity(name, cell)), measured.path(name, cell)
        if path.exists() or key in old:
            records[key] = json.loads(path.read_text()) if path.exists() else old[key]
    analysis.write(RESULTS, list(records.values()))
    trainings = {tuple(record.values())[:-2]: record for record in _read(RESULTS / "trainings.csv")}
    for path in (cell.training.folder(out) / "training.json" for _, cell in wanted if cell.training):
        if path.exists():
            record = {name: str(value) for name, value in json.loads(path.read_text()).items()}
            trainings[tuple(record.values())[:-2]] = record
    _write("trainings", list(trainings.values()))
    missing = len({measured.path(name, cell) for name, cell in wanted}) - len(records)
    print(f"{len(records)} cells in {RESULTS}; {missing} of the whole plan were not measured")


def adapters(folder: Path) -> None:
    """Write adapters.csv."""
    records = collection.collect(folder)
    _write("adapters", [{**record, "energy": f"{record['energy']:.6g}"} for record in records])


def _write(name: str, records: Sequence[dict[str, Any]]) -> None:
    with (RESULTS / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def quick(out: Path) -> int:
    """Train one LoRA anew, compress it to a file, load that with PEFT, and compare with the row in results/."""
    begin, name = time.perf_counter(), "rotten-tomatoes"
    measured = Grid(out)
    full = Cell(grid.Training.of(grid.TASKS[name], grid.TASKS[name].rank, 0), "lora")
    records = {cell.method: measured.measure(name, cell) for cell in (Cell(None, "head"), full)}
    bench = measured.bench(name)
    adapter, small = bench.adapter(full.training), out / "small"
    report = para_ext.compress_adapter(adapter, small, params=bench.params(QUICK_RANK), score="sigma", overwrite=True)
    share = report.parameters_after / report.parameters_before
    model = PeftModel.from_pretrained(bench.task.model(), small).eval()
    rows = bench.task.splits().test
    records["sigma"] = grid.outcome(training.evaluate(model, rows), rows.labels)
    results = analysis.Results(analysis.read(RESULTS))
    print(f"\n{'':<28}{'accuracy':>10}{'in results/':>13}{'difference':>12}")
    worst = 0.0
    for method, label in (("head", "head only"), ("lora", "LoRA"), ("sigma", f"PARA, σ, {share:.0%}")):
        committed = results.seeds(name, method, QUICK_RANK if method == "sigma" else None)[0].accuracy
        gap = records[method]["accuracy"] - committed
        worst = max(worst, abs(gap))
        print(f"{label:<28}{records[method]['accuracy']:>10.2%}{committed:>13.2%}{100 * gap:>+7.2f} points")
    print(f"\n{time.perf_counter() - begin:.0f} s in all on {torch.get_num_threads()} threads")
    if worst > QUICK_TOLERANCE:
        print(f"evidence: more than {100 * QUICK_TOLERANCE:.0f} points from experiments/results/", file=sys.stderr)
    return int(worst > QUICK_TOLERANCE)


def main() -> int:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("command", choices=["rates", "run", "more", "adapters", "collect", "quick"])
    parser.add_argument("folder", type=Path, nargs="?", help="for adapters: one folder per adapter in it")
    parser.add_argument("--out", type=Path, default=Path("build/evidence"), help="work folder (default: %(default)s)")
    parser.add_argument("--task", choices=list(grid.TASKS), nargs="+", default=list(grid.TASKS), help="these only")
    parser.add_argument("--lacking", action="store_true", help="for run and more: only what results/ lacks")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    if arguments.command == "quick":
        return quick(arguments.out / "quick")
    if arguments.command == "adapters":
        adapters(arguments.folder)
    elif arguments.command == "rates":
        rates(arguments.out, arguments.task)
    elif arguments.command == "collect":
        collect(arguments.out)
    else:
        cells = primary() if arguments.command == "run" else more()
        run(cells, arguments.out, arguments.task, arguments.lacking)
    return 0


if __name__ == "__main__":
    sys.exit(main())
