"""The grid: every training and every measurement is a cell, cached on disk by a hash of its settings.

A run that is stopped goes on where it was; a run that finds everything does nothing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import adalora
import methods
import numpy as np
import torch
import training
from peft import PeftModel
from safetensors.torch import load_file
from tasks import TASKS, Classifier, Task
from torch import Tensor
from torch.nn import functional as F

import para_ext
from para_ext import Decomposition, LoraFactors

DIVISORS = (2, 4, 8, 16)  # of the rank: 50, 25, 12.5 and 6.25 % of the parameters
SEEDS = (0, 1, 2)
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Training:
    """All that decides a trained adapter."""

    task: str
    rank: int
    seed: int
    learning_rate: float
    batch: int
    epochs: int
    method: str = "lora"  # or "adalora", whose mean rank ``rank`` is

    @classmethod
    def of(cls, task: Task, rank: int, seed: int, method: str = "lora") -> Training:
        """As the task says."""
        rate = task.adalora_rate if method == "adalora" else task.rate(rank)
        return cls(task.name, rank, seed, rate, task.batch, task.epochs, method)

    def folder(self, out: Path) -> Path:
        """Where the trained adapter is kept."""
        return out / "adapters" / f"{self.task}-{self.method}-r{self.rank}-s{self.seed}-{key(self)}"


@dataclass(frozen=True)
class Cell:
    """One measurement: a method at the parameters of rank ``rank``, or PARA at an energy; neither: no compression."""

    training: Training | None  # None: the head on frozen features
    method: str
    rank: int | None = None  # of the budget
    energy: float | None = None
    steps: int = 0  # trained after compression


def key(settings: Any) -> str:
    """Short hash of a dataclass's fields."""
    return hashlib.sha256(json.dumps(asdict(settings)).encode()).hexdigest()[:12]


@cache
def code() -> str:
    """para_ext's version and the last commit that changed it."""
    command = ["git", "-C", str(HERE), "log", "-1", "--format=%h", "--", "../para_ext", "../csrc"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return f"{para_ext.__version__}+{commit or 'unknown'}"


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> dict[str, float]:
        """Of wall time, and of both processors."""
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        return {"seconds": round(wall, 1), "cpu_seconds": round(cpu, 1)}


class Bench:
    """A task with what all its cells share: the pretrained weights, the head fitted on them, the test rows."""

    def __init__(self, task: Task, out: Path) -> None:
        self.task, self.out = task, out
        self.model: Classifier = task.model()
        self.model.requires_grad_(False)
        self.pretrained = {name: value.clone() for name, value in self.model.state_dict().items()}

    @cached_property
    def features(self) -> Tensor:
        """Frozen features of the training rows, [rows, features]."""
        self.reset()
        return training.evaluate(self.model.features, self.task.splits().train)

    @cached_property
    def head(self) -> dict[str, Tensor]:
        """The head fitted on frozen features of the training rows."""
        path = self.out / "heads" / f"{self.task.name}.pt"
        if not path.exists():
            print(f"{self.task.name}: fit the head on frozen features", flush=True)
            training.fit_head(self.model.classifier, self.features, self.task.splits().train.labels)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.model.classifier.state_dict(), path)
        loaded: dict[str, Tensor] = torch.load(path)
        return loaded

    def baseline(self) -> dict[str, Tensor]:
        """The head fitted on frozen features with the weight decay that suits the validation rows best."""
        splits, features = self.task.splits(), self.features
        self.reset()
        valid = training.evaluate(self.model.features, splits.valid)
        heads = []
        for decay in training.HEAD_DECAYS:
            training.fit_head(self.model.classifier, features, splits.train.labels, decay)
            with torch.no_grad():
                loss = F.cross_entropy(self.model.classifier(valid), splits.valid.labels).item()
            heads.append((loss, decay, {k: v.clone() for k, v in self.model.classifier.state_dict().items()}))
        _, decay, head = min(heads, key=lambda found: found[0])
        print(f"{self.task.name}: weight decay {decay:g} suits the head best", flush=True)
        return head

    @cached_property
    def norms(self) -> dict[str, float]:
        """‖W₀‖₂ of every layer that gets a LoRA."""
        layers = training.ranks(self.task, self.model, 1)
        weights = {name: self.pretrained[f"{name}.weight"].flatten(1) for name in layers}
        return {name: torch.linalg.matrix_norm(weight, 2).item() for name, weight in weights.items()}

    def params(self, rank: int) -> int:
        """LoRA parameters of an adapter with one rank."""
        layers = training.ranks(self.task, self.model, rank)
        return sum(k * sum(self.pretrained[f"{name}.weight"].shape[:2]) for name, k in layers.items())

    def reset(self) -> None:
        """The model as it was pretrained."""
        self.model.load_state_dict(self.pretrained)

    def logits(self, factors: Iterable[LoraFactors], head: dict[str, Tensor], split: str = "test") -> Tensor:
        """Logits [rows, classes] of the pretrained model with every ΔW added to its weight."""
        self.reset()
        self.model.classifier.load_state_dict(head)
        with torch.no_grad():
            for f in factors:
                weight = self.model.get_submodule(f.name).weight
                weight += methods.product(f).to(weight.dtype).reshape(weight.shape)
        return training.evaluate(self.model, getattr(self.task.splits(), split))

    def adapter(self, wanted: Training) -> Path:
        """Folder of the trained adapter, which is trained if it is not there."""
        folder = wanted.folder(self.out)
        if folder.exists():
            return folder
        print(f"{folder.name}: train", flush=True)
        clock = Clock()
        torch.manual_seed(wanted.seed)
        model = self.task.model()
        model.classifier.load_state_dict(self.head)
        if wanted.method == "adalora":
            budget = self.params(wanted.rank)
            adapted = adalora.train(self.task, model, wanted.rank, budget, wanted.seed, wanted.learning_rate)
        else:
            adapted = training.adapt(model, training.ranks(self.task, model, wanted.rank))
            training.train(adapted, self.task.splits().train, self.task, wanted.seed, wanted.learning_rate)
        return save(adapted, folder, {**asdict(wanted), **clock.seconds()})


def save(adapted: Any, folder: Path, record: dict[str, Any]) -> Path:
    """Write a PEFT model, whole or not at all."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    adapted.save_pretrained(unfinished)
    (unfinished / "training.json").write_text(json.dumps(record))
    unfinished.rename(folder)
    print(f"  {record['seconds']} s", flush=True)
    return folder


def head_of(folder: Path) -> dict[str, Tensor]:
    """The head that was trained with an adapter."""
    prefix = "base_model.model.classifier."
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def outcome(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """What is measured on rows; ``right`` is one bit per row, packed, in hexadecimal digits."""
    right = logits.argmax(1) == labels
    return {
        "rows": len(labels),
        "accuracy": right.double().mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
        "right": np.packbits(right.numpy()).tobytes().hex(),
    }


def identity(name: str, cell: Cell) -> dict[str, Any]:
    """What a record is of."""
    return {
        "task": name, "seed": _seed(cell), "method": cell.method, "rank": cell.rank, "energy_budget": cell.energy
    }  # fmt: skip


class Grid:
    """Measures cells; ``out`` holds adapters and results."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.bench = cache(lambda name: Bench(TASKS[name], out))
        self.decomposition = cache(para_ext.decompose)

    def measure(self, name: str, cell: Cell) -> dict[str, Any]:
        """The cell's record, from the cache or measured now."""
        path = self.path(name, cell)
        if not path.exists():
            bench = self.bench(name)
            if cell.training:
                bench.adapter(cell.training)  # whose training has its own time
            clock = Clock()
            record = self._measured(bench, cell)
            about = {**clock.seconds(), "code": code(), "date": date.today().isoformat()}
            record = {**identity(name, cell), **record, **about}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record))
            print(f"{path.stem}: accuracy {record['accuracy']:.4f}, {record['seconds']} s", flush=True)
        loaded: dict[str, Any] = json.loads(path.read_text())
        return loaded

    def path(self, name: str, cell: Cell) -> Path:
        """Where the cell's record is kept."""
        budget = cell.energy or cell.rank
        return self.out / "cells" / f"{name}-{cell.method}-{budget}-s{_seed(cell)}-{key(cell)}.json"

    def _measured(self, bench: Bench, cell: Cell) -> dict[str, Any]:
        labels = bench.task.splits().test.labels
        if cell.training is None:
            return {"parameters": 0, **outcome(bench.logits([], bench.baseline()), labels)}
        folder = bench.adapter(cell.training)
        if cell.steps:
            folder = self._tuned(bench, folder, cell)
        decomposition = self.decomposition(folder)
        old = decomposition.factors
        new, error = (old, None) if cell.steps else self._compressed(bench, decomposition, cell)
        ranks = [f.rank for f in new]
        return {
            "parameters": methods.size(new), "smallest_rank": min(ranks), "largest_rank": max(ranks),
            "error": error, "energy": None if error is None else 1 - error**2,
            **outcome(bench.logits(new, head_of(folder)), labels),
        }  # fmt: skip

    def _compressed(
        self, bench: Bench, decomposition: Decomposition, cell: Cell
    ) -> tuple[Sequence[LoraFactors], float | None]:
        """What the method makes of the adapter, and how far that is from it (None: it was made otherwise)."""
        if cell.energy is not None:
            score = cell.method.removeprefix("energy-")
            new = decomposition.truncate(decomposition.spectra.plan(energy=cell.energy, score=score))
        elif cell.method in ("lora", "trained-low", "adalora"):
            return decomposition.factors, None
        else:
            budget = methods.Budget(cell.rank, bench.params(cell.rank), cell.training.seed)
            new = methods.compress(cell.method, decomposition, budget, bench.norms)
        return new, methods.error(decomposition.factors, new)

    def _tuned(self, bench: Bench, folder: Path, cell: Cell) -> Path:
        """The adapter, compressed where there is a budget, after so many more steps of training."""
        tuned = folder.with_name(f"{folder.name}-tuned-{key(cell)}")
        if tuned.exists():
            return tuned
        clock = Clock()
        small = folder
        if cell.rank is not None:
            small = folder.with_name(f"{folder.name}-small")
            para_ext.compress_adapter(folder, small, params=bench.params(cell.rank), overwrite=True)
        model = PeftModel.from_pretrained(bench.task.model(), small, is_trainable=True).eval()
        rows = bench.task.splits().train
        training.train(model, rows, bench.task, cell.training.seed + 100, cell.training.learning_rate / 2, cell.steps)
        return save(model, tuned, {**asdict(cell), **clock.seconds()})


ENERGIES = {"energy-sigma": (0.99, 0.95, 0.9, 0.8), "energy-density": (0.95, 0.9)}
TUNING_STEPS = 50


def compressions(name: str, seed: int, chosen: Sequence[str]) -> list[Cell]:
    """The head, the LoRA, and what the chosen methods make of it."""
    high = _high(name, seed)
    return [
        *([Cell(None, "head")] if seed == 0 else []),
        Cell(high, "lora"),
        *(Cell(high, method, rank) for method in chosen for rank in _small(name)),
    ]


def energies(name: str, seed: int) -> list[Cell]:
    """PARA by energy, the default budget."""
    high = _high(name, seed)
    return [Cell(high, method, energy=energy) for method, energies in ENERGIES.items() for energy in energies]


def trained_low(name: str, seed: int, divisor: int) -> list[Cell]:
    """A LoRA trained at a small rank from the start."""
    task = TASKS[name]
    return [Cell(Training.of(task, task.rank // divisor, seed), "trained-low", task.rank // divisor)]


def tuned(name: str, seed: int) -> list[Cell]:
    """Compressed, and trained a little more; and the LoRA itself, trained as much more."""
    high = _high(name, seed)
    return [
        Cell(high, "lora-tuned", steps=TUNING_STEPS),
        *(Cell(high, "tuned", rank, steps=TUNING_STEPS) for rank in _small(name)),
    ]


def allotted(name: str, seed: int) -> list[Cell]:
    """AdaLoRA, trained to each budget."""
    return [Cell(Training.of(TASKS[name], rank, seed, "adalora"), "adalora", rank) for rank in _small(name)]


def _seed(cell: Cell) -> int:
    return cell.training.seed if cell.training else 0


def _high(name: str, seed: int) -> Training:
    return Training.of(TASKS[name], TASKS[name].rank, seed)


def _small(name: str) -> list[int]:
    return [TASKS[name].rank // divisor for divisor in DIVISORS]
