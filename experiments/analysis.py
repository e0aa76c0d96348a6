"""Analysis: from the measured rows to tables, paired tests and figures. Reads CSV files only, trains nothing."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
# Student's t, two-sided 95 %, by degrees of freedom: seeds are few.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
KEYS = ("task", "seed", "method", "rank", "energy_budget")

Right = NDArray[np.bool_]


@dataclass(frozen=True)
class Row:
    """One measurement; ``right`` says of every test row whether it was answered rightly."""

    task: str
    seed: int
    method: str
    rank: int | None
    energy_budget: float | None
    parameters: int
    energy: float | None
    error: float | None
    accuracy: float
    loss: float
    right: Right


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with the half width of its 95 % interval; nan for one seed."""

    mean: float
    half: float


@dataclass(frozen=True)
class Difference:
    """Accuracy of one method minus another's, mean over seeds, with a bootstrap interval over the test rows."""

    mean: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


# Files


def write(folder: Path, records: Sequence[Mapping[str, Any]], name: str = "cells") -> None:
    """Write name.csv, and beside it name-rows.csv with the answers to every test row."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = [c for c in dict.fromkeys(c for record in records for c in record) if c != "right"]
    for path, chosen in ((folder / f"{name}.csv", columns), (folder / f"{name}-rows.csv", [*KEYS, "right"])):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, chosen, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows({c: _shown(record.get(c)) for c in chosen} for record in records)


def records(folder: Path, name: str = "cells") -> list[dict[str, str]]:
    """What :func:`write` wrote, as text."""
    with (folder / f"{name}-rows.csv").open(encoding="utf-8", newline="") as file:
        right = {key(r): r["right"] for r in csv.DictReader(file)}
    with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return [{**r, "right": right[key(r)]} for r in csv.DictReader(file)]


def read(folder: Path, name: str = "cells") -> list[Row]:
    """What :func:`write` wrote."""
    return [_row(record) for record in records(folder, name)]


def key(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What a record is of, as it is written."""
    return tuple("" if record[k] is None else str(_shown(record[k])) for k in KEYS)


def _shown(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _row(r: Mapping[str, str]) -> Row:
    def number(column: str) -> float | None:
        return float(r[column]) if r[column] else None

    bits = np.unpackbits(np.frombuffer(bytes.fromhex(r["right"]), np.uint8))[: int(r["rows"])].astype(bool)
    rank = number("rank")
    return Row(
        r["task"], int(r["seed"]), r["method"], None if rank is None else int(rank), number("energy_budget"),
        int(r["parameters"]), number("energy"), number("error"),
        bits.mean().item(), float(r["loss"]), bits,
    )  # fmt: skip


# Statistics


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and t interval of one value per seed."""
    array = np.array(list(values))
    if len(array) == 1:
        return Estimate(array.mean().item(), math.nan)
    half = T95[len(array) - 1] * array.std(ddof=1) / math.sqrt(len(array))
    return Estimate(array.mean().item(), half.item())


def difference(ours: Sequence[Right], theirs: Sequence[Right], resamples: int = RESAMPLES) -> Difference:
    """Paired bootstrap over test rows of the accuracies' mean difference over seeds: [rows] per seed, in one order."""
    gaps = np.mean([a.astype(float) - b for a, b in zip(ours, theirs, strict=True)], axis=0)
    # Few distinct gaps occur: how often each is drawn is multinomial, which is quicker than drawing rows.
    values, counts = np.unique(gaps, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(gaps), counts / len(gaps), resamples) @ values / len(gaps)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Difference(gaps.mean().item(), low.item(), high.item())


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank."""
    a, b = _ranked(x), _ranked(y)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else math.nan


def _ranked(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, float)
    return np.array([((array < v).sum() + (array <= v).sum() - 1) / 2 for v in array])


# Questions


class Results:
    """The rows, found by what they are of."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self.found: dict[tuple[str, str, int | None, float | None], dict[int, Row]] = defaultdict(dict)
        for row in self.rows:
            self.found[row.task, row.method, row.rank, row.energy_budget][row.seed] = row

    @property
    def tasks(self) -> list[str]:
        """Those with a LoRA, in the order of the file."""
        return list(dict.fromkeys(row.task for row in self.rows if row.method == "lora"))

    def methods(self, task: str) -> list[str]:
        """Those with a budget in parameters."""
        return list(dict.fromkeys(row.method for row in self.rows if row.task == task and row.rank is not None))

    def ranks(self, task: str) -> list[int]:
        """Budgets, descending."""
        return sorted({row.rank for row in self.rows if row.task == task and row.rank is not None}, reverse=True)

    def seeds(self, task: str, method: str, rank: int | None = None, energy: float | None = None) -> dict[int, Row]:
        """The rows of one cell by seed."""
        return self.found.get((task, method, rank, energy), {})

    def head(self, task: str) -> float:
        """Accuracy of the head on frozen features."""
        return self.seeds(task, "head")[0].accuracy

    def accuracy(self, task: str, method: str, rank: int | None = None, energy: float | None = None) -> Estimate:
        """Over seeds."""
        return estimate(row.accuracy for row in self.seeds(task, method, rank, energy).values())

    def gain_kept(self, task: str, method: str, rank: int | None = None, energy: float | None = None) -> float:
        """The part of LoRA's gain over the head that is kept, of the means over the seeds that the cell has."""
        rows = self.seeds(task, method, rank, energy)
        full = np.mean([self.seeds(task, "lora")[seed].accuracy for seed in rows])
        kept = np.mean([row.accuracy for row in rows.values()])
        return float((kept - self.head(task)) / (full - self.head(task)))

    def compared(
        self, task: str, ours: str, theirs: str, rank: int | None, their_rank: int | None, energy: float | None = None
    ) -> Difference:
        """The first method minus the second, over the seeds that both have; ``energy`` is the first one's budget."""
        a, b = self.seeds(task, ours, rank, energy), self.seeds(task, theirs, their_rank)
        common = sorted(a.keys() & b.keys())
        return difference([a[s].right for s in common], [b[s].right for s in common])

    def smallest(self, task: str, method: str, *, points: float | None = None, part: float | None = None) -> int | None:
        """The smallest rank budget down to which less is lost than so many points, or than a part of LoRA's gain."""
        full, found = self.seeds(task, "lora"), None
        gain = self.accuracy(task, "lora").mean - self.head(task)
        allowed = points / 100 if points is not None else (part or 0) * gain
        for rank in self.ranks(task):
            rows = self.seeds(task, method, rank)
            if not rows or np.mean([full[seed].accuracy - row.accuracy for seed, row in rows.items()]) >= allowed:
                break
            found = rank
        return found
