"""Rewriting files: one decomposition, a plan for every output, each truncated and written, with its report."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import __version__
from .arrays import checked_dtype
from .automatic import automatic
from .backends import Truncated
from .decomposition import Decomposition, on_device
from .errors import ParaError, shown
from .formats import BASED, FILE_SUFFIXES, Adapter, Filled, Wish, housed
from .layout import FileLayout
from .plan import BUDGETS, DEFAULT_ENERGY, Plan
from .progress import Meter, Progress
from .report import Report, megabytes, reported, stored
from .spectra import Spectra

if TYPE_CHECKING:
    import torch

# The text that the safetensors header gets takes this many bytes there, so that `size` budgets can count it beforehand.
HEADER_TEXT = 512

_DEFAULTS = {"score": "auto", "min_rank": 0, "multiple_of": 1}


@dataclass(frozen=True)
class Job:
    """What a run is to do besides its budget, as :func:`compress_adapter` documents it."""

    target: str | list[str] | None = None
    base: str | Path | None = None
    dtype: torch.dtype | str | None = None
    overwrite: bool = False
    dry_run: bool = False
    backend: str | None = None
    device: str = "auto"
    threads: int | None = None
    progress: Progress | None = None
    balance: str = "even"
    start: float = field(default_factory=time.perf_counter)


class _Planned(NamedTuple):
    """A plan, the name that its output has among several (empty for one alone), and notes on how it was chosen.

    ``truncates`` is False where nothing was to be lost.
    """

    name: str
    plan: Plan
    notes: tuple[str, ...] = ()
    truncates: bool = True


Plans = Callable[[Spectra, Adapter[Any]], list[_Planned]]
"""Plans for an adapter in a target's format."""


def several(**arguments: Any) -> Iterator[Any]:
    """Arguments that may have several values: those that do as lists.

    Raises:
        ParaError: there is none among them, or one twice.
    """
    for name, value in arguments.items():
        if not isinstance(value, Sequence) or isinstance(value, str):
            yield value
            continue
        if not value:
            raise ParaError(f"{name} is an empty list: give one value at least, or leave it out")
        for i, one in enumerate(value):
            if one in value[:i]:
                raise ParaError(f"{name} has {shown(one)} twice: give each value once")
        yield list(value)


def budgets(keep: Any, budget: dict[str, Any]) -> Plans:
    """Plans for one budget, or for several values of ``keep``."""
    keeps = keep if isinstance(keep, list) else [keep]

    def plans(spectra: Spectra, adapter: Adapter[Any]) -> list[_Planned]:
        chosen, notes = choose({**budget, "keep": keeps[0]}, spectra)
        shaped = _shaped(chosen, adapter.shaping, keeps)
        try:
            made = [spectra.plan(**(shaped if k is None else {**shaped, "keep": k})) for k in keeps]
        except ParaError as e:
            if "allowed_ranks" in given(budget) or "allowed_ranks" not in adapter.shaping:
                raise
            raise ParaError(
                f"{e}; ranks are 8, 16, 32 … for this target: where its reader takes any, give allowed_ranks=[1,2,4,6]"
            ) from e
        return [_Planned(f"keep-{plan.value:g}" if isinstance(keep, list) else "", plan, notes) for plan in made]

    return plans


def choose(budget: dict[str, Any], spectra: Spectra) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The budget, where ``auto`` is one the one that it chooses, and why."""
    auto = budget.get("auto")
    rest = {name: value for name, value in budget.items() if name != "auto"}
    if auto is None:
        return rest, ()
    if others := sorted(given(rest) & BUDGETS):
        raise ParaError(f"auto and {others[0]} are given together: give one budget")
    found, reason = automatic(auto, spectra)
    return {**rest, **found}, (reason,)


def planned(budget: dict[str, Any], spectra: Spectra) -> tuple[Plan, tuple[str, ...]]:
    """The plan for a budget, and why it is that one where ``auto`` chose it."""
    chosen, notes = choose(budget, spectra)
    return spectra.plan(**chosen), notes


def everything(spectra: Spectra, adapter: Adapter[Any]) -> list[_Planned]:
    """The plan that truncates nothing."""
    plan = spectra.plan(**(adapter.shaping or {"keep": 1.0}))
    for module in spectra.modules:
        if plan.ranks[module.name] < min(module.rank, module.m, module.n):
            raise ParaError(
                f"module '{module.name}' has rank {module.rank}, but this target takes at most "
                f"{plan.ranks[module.name]}: compress with that target"
            )
    return [_Planned("", replace(plan, threshold=None), truncates=False)]


@dataclass(frozen=True)
class _Output:
    """One of the outputs of a run, planned and not yet written."""

    adapter: Adapter[Any]
    decomposition: Decomposition
    layout: FileLayout | None
    target: str | None
    planned: _Planned
    out: Path

    @property
    def size(self) -> int:
        """Bytes of the tensor file, if that is of safetensors; otherwise near those of the new factors."""
        plan = self.planned.plan
        if self.layout is not None:
            return self.layout.bytes(plan.ranks)
        return self.decomposition.bytes * plan.parameters_after // plan.parameters_before


def rewrite(source: Adapter[Any], label: str, out: Path, plans: Plans, job: Job) -> list[Report]:
    """Decompose once, plan for every target, truncate and write each plan."""
    code = checked_dtype(job.dtype)
    targets = job.target if isinstance(job.target, list) else [job.target]
    if job.base is not None and not BASED & set(targets):
        raise ParaError(
            f"base is read for {', '.join(sorted(BASED))} only, and none of these is a target: leave it out"
        )
    wish = Wish(job.base, job.progress)
    housed_for = {target: housed(source, target, wish) for target in targets}
    with _hashed(source.weights) as digest:
        decompositions: dict[tuple[int, ...], Decomposition] = {}
        outputs: list[_Output] = []
        for target, adapter in housed_for.items():
            key = tuple(map(id, adapter.factors))  # most targets take the source's own
            if key not in decompositions:
                moved = on_device(adapter.factors, job.device, job.backend)
                decompositions[key] = Decomposition(moved, job.backend, job.threads, job.progress)
            layout = adapter.layout(code, " " * HEADER_TEXT)
            spectra = Spectra(decompositions[key].spectra.modules, layout)
            try:
                planned_outputs = plans(spectra, adapter)
            except ParaError as e:
                if len(housed_for) == 1:
                    raise
                raise ParaError(f"target {target}: {e}") from e
            for planned in planned_outputs:
                place = (str(target or "same") if isinstance(job.target, list) else "", planned.name)
                path = out.joinpath(*filter(None, place))
                if path != out and out.suffix in FILE_SUFFIXES:
                    raise ParaError(f"'{out}' would be one file, but there are several outputs: give a folder")
                adapter.check_name(path)
                if any(path == other.out for other in outputs):
                    raise ParaError(f"two outputs would be '{path}'; give each value once")
                adapter.check_ranks(planned.plan.ranks)
                if not job.dry_run:
                    adapter.check_out(path, overwrite=job.overwrite)
                outputs.append(_Output(adapter, decompositions[key], layout, target, planned, path))
        if job.dry_run:
            return [_said(output, None, label, job) for output in outputs]
        return _written(outputs, label, digest, code, job)


def _written(outputs: Sequence[_Output], label: str, digest: Future[str], code: str | None, job: Job) -> list[Report]:
    """Truncate and write all outputs, in order: while one is written, the next one is truncated."""
    meter = Meter(job.progress, "truncating", sum(o.decomposition.bytes + o.size for o in outputs))
    reports: list[Report] = []

    def collect(write: Callable[[], Report], size: int) -> None:
        reports.append(write())
        meter.add(size)

    with ThreadPoolExecutor(1) as aside:
        pending: tuple[Callable[[], Report], int] | None = None
        for output in outputs:
            meter.add(0, f"truncating for {output.out}")
            gains = output.adapter.gains(output.planned.plan.ranks)
            typed = output.adapter.factor_type(code)
            try:
                new = output.decomposition.truncate_certified(output.planned.plan, typed, gains, job.balance, meter)
            except Exception:
                if pending is not None:
                    collect(*pending)  # what went wrong there went wrong first
                raise
            report = replace(_said(output, new, label, job), output=str(output.out))
            if pending is not None:
                collect(*pending)
            meter.add(0, f"writing {output.out}")
            write = partial(_write, output, new, report, digest, code, job.overwrite)
            # The last one here, so that an interrupt need not wait for its end; likewise a whole model.
            if output is outputs[-1] or output.layout is None:
                collect(write, output.size)
                pending = None
            else:
                pending = aside.submit(write).result, output.size
    return reports


def _said(output: _Output, new: Sequence[Truncated] | None, label: str, job: Job) -> Report:
    """What is to be said of an output before it is written; without new factors, of a dry run."""
    adapter, plan = output.adapter, output.planned.plan
    report = reported(
        output.decomposition.spectra,
        plan,
        new,
        source=label,
        start=job.start,
        decomposition=output.decomposition,
        truncates=output.planned.truncates,
    )
    report = _with_sizes(report, adapter, output.layout.bytes(plan.ranks) if output.layout else None)
    return replace(report, target=output.target, notes=(*adapter.notes, *output.planned.notes, *report.notes))


def given(budget: Mapping[str, Any]) -> set[str]:
    """The names of the arguments that are not as they are by default."""
    return {name for name, value in budget.items() if value is not None and value != _DEFAULTS.get(name)}


def _shaped(budget: dict[str, Any], shaping: Mapping[str, Any], keeps: list[Any]) -> dict[str, Any]:
    """The budget with what the target needs of every plan."""
    asked = given(budget)
    if shaping and not asked - {"score"} and keeps == [None]:
        budget = {**budget, "energy": DEFAULT_ENERGY}  # shaping alone, which the user did not ask for, would keep all
    wanted = {name: budget[name] for name in asked & shaping.keys()}
    if "uniform" in wanted and wanted["uniform"] != shaping["uniform"]:
        raise ParaError(f"uniform={shown(wanted['uniform'])} is not what this target needs: leave it out")
    return {**budget, **shaping, **wanted}


def _with_sizes(report: Report, adapter: Adapter[Any], size: int | None) -> Report:
    foreign = sum(t.nbytes for t in adapter.foreign.values())
    notes = report.notes
    if size is not None and foreign > size / 2:
        notes += (f"{megabytes(foreign)} of the file are not LoRA factors (heads and the like) and stay as they are.",)
    return replace(report, bytes_before=adapter.weights.stat().st_size, bytes_after=size, notes=notes)


def _write(
    output: _Output,
    new: Sequence[Truncated],
    report: Report,
    digest: Future[str],
    code: str | None,
    overwrite: bool,
) -> Report:
    """Write the new factors; the report with what is known afterwards."""
    header = {
        "version": __version__,
        "source_sha256": digest.result(),
        "budget": report.plan.budget,
        "value": report.plan.value,
        "score": report.plan.score,
        "threshold": report.plan.threshold,
        "energy": report.energy,
        "error": report.error,
    }
    text = json.dumps(header)
    text = text.ljust(HEADER_TEXT - text.count('"'))  # the header escapes quotes
    factors = output.decomposition.named(new)

    def sidecar(filled: Filled) -> Mapping[str, Any]:
        return {"source_sha256": digest.result(), **stored(report, filled.rounding).to_dict()}

    written = output.adapter.write(output.out, factors, metadata=text, sidecar=sidecar, code=code, overwrite=overwrite)
    report = stored(report, written.filled.rounding)
    notes = report.notes
    if written.left_out:
        notes += (f"Not copied: {', '.join(written.left_out)}.",)
    return replace(report, bytes_after=written.size, notes=(*notes, *written.filled.notes))


@contextmanager
def _hashed(path: Path) -> Iterator[Future[str]]:
    """The file's SHA-256, found meanwhile: hashlib releases the GIL, so reading the file twice overlaps with work."""
    over = threading.Event()

    def digest() -> str:
        found = hashlib.sha256()
        with path.open("rb") as file:
            while not over.is_set() and (block := file.read(1 << 20)):
                found.update(block)
        return found.hexdigest()

    with ThreadPoolExecutor(1) as aside:
        try:
            yield aside.submit(digest)
        finally:
            over.set()  # an interrupt does not wait for the rest of a large file
