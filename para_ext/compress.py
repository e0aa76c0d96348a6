"""The public calls; each reads like the picture: read → decompose → plan → truncate → write, and a report."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, Union, overload

from . import __version__
from .arrays import as_tensor, checked_dtype
from .automatic import automatic
from .backends import Truncated
from .decomposition import Decomposition, checked_threads, cuda_backend
from .errors import ParaError, shown
from .factors import LoraFactors
from .formats import BASED, FILE_SUFFIXES, Adapter, Filled, Wish, housed, read_adapter
from .formats.flux import parts
from .formats.names import matched
from .layout import FileLayout
from .plan import BUDGETS, DEFAULT_ENERGY, Plan
from .progress import Meter, Progress
from .report import (
    GOOD_ENERGY,
    LOW_ENERGY,
    Report,
    megabytes,
    module_reports,
    percent,
    stored,
    undecided_components,
)
from .spectra import Spectra
from .verification import Verification, compare

if TYPE_CHECKING:
    import torch
    from torch import nn

Source = Union[str, Path, "nn.Module", Iterable[LoraFactors]]

# The text that the safetensors header gets takes this many bytes there, so that `size` budgets can count it beforehand.
HEADER_TEXT = 512

_DEFAULTS = {"score": "auto", "min_rank": 0, "multiple_of": 1}


def decompose(
    source: Source,
    *,
    adapter_name: str | None = None,
    backend: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Decomposition:
    """Decompose every module's ΔW = scale·B·A, without forming it.

    Args:
        source: an adapter's folder or file, or its id on the Hugging Face Hub (see :func:`compress_adapter`); a live
            model with LoRA layers; or LoraFactors.
        adapter_name: of a live model's adapters; the active one if None.
        backend: "cpu" or "cuda" (native, where the factors are) or "torch"; the fastest that is installed and takes the
            factors if None.
        device: where to work on an adapter folder: "cpu", "cuda" or "auto", which is "cuda" for that backend only.
        threads: how many to use; if None, ``torch.get_num_threads()`` where PyTorch is loaded, otherwise
            OMP_NUM_THREADS or the CPUs of this process. Results don't depend on it.
        progress: called as ``progress(words, done, total)``: a few words on the stage, its bytes that are done and all
            of them. A stage begins with 0 bytes done and ends when all are (0 of 0: its length is unknown).

    Returns:
        A Decomposition. Its ``factors`` are, of a folder, numpy arrays over the mapped file (bfloat16 by ml_dtypes);
        what its ``truncate`` gives are torch tensors.

    Raises:
        ParaError: the source is refused, naming what and why.
    """
    layout = None
    if _is_model(source):
        from .models import read_model

        factors: Iterable[LoraFactors] = read_model(source, adapter_name).factors
    elif isinstance(source, str | Path):
        adapter = read_adapter(source)
        factors, layout = _moved(adapter.factors, device, backend), adapter.layout(None, " " * HEADER_TEXT)
    elif isinstance(source, Iterable):
        factors = source
    else:
        raise ParaError(f"a {type(source).__name__} cannot be decomposed; give a folder, a model, or LoraFactors")
    decomposition = Decomposition(factors, backend, threads, progress)
    decomposition.spectra = Spectra(decomposition.spectra.modules, layout)
    return decomposition


def compress_model(
    model: nn.Module,
    *,
    adapter_name: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    dtype: torch.dtype | str | None = None,
    balance: str = "even",
    backend: str | None = None,
    threads: int | None = None,
    **budget: Any,
) -> Report:
    """Compress the LoRA layers of a live model in place; on an error the model is as it was.

    ``save_pretrained`` then writes the small adapter. To train on, give the optimizer here or build it afterwards: the
    factors are new parameters.

    Args:
        model: a PeftModel, or any module with LoRA layers (loralib style too).
        adapter_name: which adapter; the active one if None.
        optimizer: gets the new parameters in the place of the old ones; its moments (Adam's, SGD's) are carried over as
            :mod:`para_ext.optimizer` says.
        dtype: of the new factors, ``torch.bfloat16`` or "bfloat16"; each module's own if None.
        balance: "even" puts √σ on both factors and leaves those alone whose rank does not change; "A" or "B" puts all
            of σ on that one, so that the other's rows or columns are orthonormal.
        backend, threads: as for :func:`decompose`.
        **budget: at most one of ``energy=0.95`` (the default), ``keep=0.25``, ``params=10**6``, ``total_rank=500``,
            ``threshold=0.1``, ``rank=8``; with ``score="auto"|"sigma"|"density"`` and shaping by ``min_rank``,
            ``max_rank``, ``multiple_of``, ``allowed_ranks``, ``uniform``. Meaning: ``help(para_ext.plan.plan)``.
            With shaping and no budget, everything that the shaping allows is kept.

    Raises:
        ParaError: the model or the budget is refused, naming what and why.
    """
    start = time.perf_counter()
    if not _is_model(model):
        raise ParaError(
            f"compress_model takes a live model, not a {type(model).__name__}; for a folder use compress_adapter"
        )
    from .models import read_model
    from .optimizer import carry_over, check_optimizer

    if optimizer is not None:
        check_optimizer(optimizer)
    live = read_model(model, adapter_name)
    decomposition = Decomposition(live.factors, backend, threads)
    plan = decomposition.spectra.plan(**budget)
    new = decomposition.truncate_certified(plan, dtype, balance=balance)
    exchanges = live.replace(decomposition.named(new))
    if optimizer is not None:
        carry_over(optimizer, exchanges)
    return _report(
        decomposition.spectra, plan, new, source=type(model).__name__, start=start, decomposition=decomposition
    )


@overload
def compress_adapter(
    source: str | Path, out: str | Path, *, keep: float | str | None = None, **options: Any
) -> Report: ...
@overload
def compress_adapter(
    source: str | Path, out: str | Path, *, keep: list[float | str], **options: Any
) -> list[Report]: ...
def compress_adapter(
    source: str | Path,
    out: str | Path,
    *,
    target: str | list[str] | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    backend: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    balance: str = "even",
    keep: float | str | list[float | str] | None = None,
    **budget: Any,
) -> Report | list[Report]:
    """Compress an adapter into another one.

    Args:
        source: an adapter's folder or file, recognised by what is in it: PEFT, kohya, diffusers, ComfyUI, cloneofsimo,
            loralib, MLX. It is never changed. Or, as a str, its id on the Hugging Face Hub, with the extra ``hub``
            installed: "user/adapter", "user/adapter@revision" for a branch, tag or commit,
            "user/adapter/file.safetensors" for one file among several. What is on the disk under that name goes first.
        out: the folder to make, or for formats of a single file that file (``small.safetensors``, ``small.gguf``); it
            is there whole or not at all. With several ``keep`` values, the folder for one folder each:
            ``out/keep-0.25`` and so on.
        target: who will read it: "peft", "vllm", "uniform", "gguf", "trtllm", "mlx", "diffusers", "kohya" or "merged";
            None keeps the source's own format. All have the scaling folded in, each as its readers apply it. Of a list
            of them each gets a folder of its name in ``out``; one decomposition serves all.
        base: the base model's folder, or its id on the Hub, which "gguf" and "merged" need; "uniform" and "mlx" learn
            from it how many layers there are.
        dtype: of the new factors, ``torch.bfloat16`` or "bfloat16"; each module's own if None.
        overwrite: replace an adapter that is at ``out``.
        dry_run: plan and report, write nothing; errors in the report are then the predicted ones.
        backend, device, threads, progress: as for :func:`decompose`.
        balance: as for :func:`compress_model`.
        keep: the budget of that name, or several: one decomposition serves all.
        **budget: another budget, score and shaping, as for :func:`compress_model`, and ``size="32MiB"``: bytes of the
            written safetensors file.

    Returns:
        A Report, or a list of them where ``keep`` or ``target`` is a list.

    Raises:
        ParaError: refused, naming what and why; nothing was written (of several outputs, none after the failing one).
    """
    job = _Job(target, base, dtype, overwrite, dry_run, backend, device, threads, progress, balance)
    reports = _rewrite(read_adapter(source), str(source), Path(out), _budgets(keep, budget), job)
    return reports if isinstance(keep, list) or isinstance(target, list) else reports[0]


def convert_adapter(
    source: str | Path,
    out: str | Path,
    target: str,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write an adapter for another reader, without truncation: no rank falls, and zeros fill up where ranks must agree.

    Args:
        source, out, target, base, dtype, overwrite, threads, progress: as for :func:`compress_adapter`.

    Raises:
        ParaError: refused, naming what and why; nothing was written.
    """
    job = _Job(target, base, dtype, overwrite, threads=threads, progress=progress)
    return _rewrite(read_adapter(source), str(source), Path(out), _everything, job)[0]


def merge_adapters(
    sources: Mapping[str | Path, float],
    out: str | Path,
    *,
    target: str | list[str] | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    backend: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    balance: str = "even",
    keep: float | str | list[float | str] | None = None,
    **budget: Any,
) -> Report | list[Report]:
    """Write the weighted sum of adapters as one adapter, truncated where a budget is given.

    Args:
        sources: folders, files or ids of one format, and their weights: ``{"a/": 0.6, "b/": -0.4}``; ranks, alphas
            and scalings may differ.
        dtype: of the new factors; the widest of the sources' if None.
        out, target, base, overwrite, dry_run, backend, device, threads, progress, balance, keep, budget:
            as for
            :func:`compress_adapter`; without any budget or shaping nothing is truncated.

    Raises:
        ParaError: refused, naming what and why; nothing was written.
    """
    from .merging import merged, widest

    adapters = [(read_adapter(source), float(weight)) for source, weight in sources.items()]
    if len(adapters) < 2:
        raise ParaError("one adapter alone is not merged: give two or more, as a=0.6 b=0.4")
    dtype = dtype or widest(adapter for adapter, _ in adapters)
    job = _Job(target, base, dtype, overwrite, dry_run, backend, device, threads, progress, balance)
    label = " + ".join(f"{weight:g} × {source}" for source, weight in sources.items())
    plans = _budgets(keep, budget) if keep is not None or _given(budget) else _everything
    summed = merged(adapters)
    summed = replace(summed, notes=(*summed.notes, f"A weighted sum: {label}."))
    reports = _rewrite(summed, label, Path(out), plans, job)
    return reports if isinstance(keep, list) or isinstance(target, list) else reports[0]


def predict(spectra: Spectra, source: str = "", **budget: Any) -> Report:
    """What :func:`compress_adapter` would report, from spectra alone: ``Spectra.load("spectra.json")``.

    Args:
        spectra: of the adapter.
        source: its name, for the report.
        **budget: as for :func:`compress_adapter`.

    Raises:
        ParaError: the budget is refused.
    """
    start = time.perf_counter()
    chosen, notes = _chosen(budget, spectra)
    plan = spectra.plan(**chosen)
    report = _report(spectra, plan, None, source=source, start=start)
    size = spectra.layout.bytes(plan.ranks) if spectra.layout else None
    return replace(report, bytes_after=size, notes=(*notes, *report.notes))


@dataclass(frozen=True)
class _Job:
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


def _budgets(keep: Any, budget: dict[str, Any]) -> Plans:
    """Plans for one budget, or for several values of ``keep``."""
    keeps = keep if isinstance(keep, list) else [keep]
    if not keeps:
        raise ParaError("keep is an empty list; give at least one fraction such as 0.25")

    def plans(spectra: Spectra, adapter: Adapter[Any]) -> list[_Planned]:
        chosen, notes = _chosen({**budget, "keep": keeps[0]}, spectra)
        shaped = _shaped(chosen, adapter.shaping, keeps)
        made = [spectra.plan(**(shaped if k is None else {**shaped, "keep": k})) for k in keeps]
        return [_Planned(f"keep-{plan.value:g}" if isinstance(keep, list) else "", plan, notes) for plan in made]

    return plans


def _chosen(budget: dict[str, Any], spectra: Spectra) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The budget, where ``auto`` is one the one that it chooses, and why."""
    auto = budget.get("auto")
    rest = {name: value for name, value in budget.items() if name != "auto"}
    if auto is None:
        return rest, ()
    if others := sorted(_given(rest) & BUDGETS):
        raise ParaError(f"auto and {others[0]} are given together: give one budget")
    found, reason = automatic(auto, spectra)
    return {**rest, **found}, (reason,)


def _everything(spectra: Spectra, adapter: Adapter[Any]) -> list[_Planned]:
    """The plan that truncates nothing."""
    plan = spectra.plan(**(adapter.shaping or {"keep": 1.0}))
    for module in spectra.modules:
        if plan.ranks[module.name] < min(module.rank, module.m, module.n):
            raise ParaError(
                f"module '{module.name}' has rank {module.rank}, but this target takes at most "
                f"{plan.ranks[module.name]}: compress with that target"
            )
    return [_Planned("", plan, truncates=False)]


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


def _rewrite(source: Adapter[Any], label: str, out: Path, plans: Plans, job: _Job) -> list[Report]:
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
                moved = _moved(adapter.factors, job.device, job.backend)
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
            return [_reported(output, None, label, job) for output in outputs]
        return _written(outputs, label, digest, code, job)


def _written(outputs: Sequence[_Output], label: str, digest: Future[str], code: str | None, job: _Job) -> list[Report]:
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
            new = output.decomposition.truncate_certified(output.planned.plan, code, gains, job.balance, meter)
            report = replace(_reported(output, new, label, job), output=str(output.out))
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


def _reported(output: _Output, new: Sequence[Truncated] | None, label: str, job: _Job) -> Report:
    """What is to be said of an output before it is written; without new factors, of a dry run."""
    adapter, plan = output.adapter, output.planned.plan
    report = _report(
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


def _given(budget: Mapping[str, Any]) -> set[str]:
    """The names of the arguments that are not as they are by default."""
    return {name for name, value in budget.items() if value is not None and value != _DEFAULTS.get(name)}


def _shaped(budget: dict[str, Any], shaping: Mapping[str, Any], keeps: list[Any]) -> dict[str, Any]:
    """The budget with what the target needs of every plan."""
    given = _given(budget)
    if shaping and not given - {"score"} and keeps == [None]:
        budget = {**budget, "energy": DEFAULT_ENERGY}  # shaping alone, which the user did not ask for, would keep all
    wanted = {name: budget[name] for name in given & shaping.keys()}
    if "uniform" in wanted and wanted["uniform"] != shaping["uniform"]:
        raise ParaError(f"uniform={shown(wanted['uniform'])} is not what this target needs: leave it out")
    return {**budget, **shaping, **wanted}


def verify(
    adapter: str | Path | Iterable[LoraFactors],
    compressed: str | Path | Iterable[LoraFactors],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Measure ‖ΔW − ΔW'‖_F between two adapters of one base, module by module, on the tensors as they are stored.

    Formats, ranks and scalings may differ. Only the factors are compared: not heads, biases, or DoRA's magnitudes.

    Args:
        adapter, compressed: folders, files or ids, as for :func:`compress_adapter`, or LoraFactors.
        threads, progress: as for :func:`decompose`.

    Raises:
        ParaError: one cannot be read, or they are not of the same base.
    """
    left, right = (
        tuple(read_adapter(x).factors) if isinstance(x, str | Path) else tuple(x) for x in (adapter, compressed)
    )
    named = matched([f.name for f in left], [f.name for f in right])
    ours, theirs = {f.name for f in left}, set(named.values())
    if ours - theirs and theirs - ours:  # modules that are one layer in one of them may be several in the other
        left, right = (tuple(part for f in factors for part in parts(f)) for factors in (left, right))
        named = matched([f.name for f in left], [f.name for f in right])
    return compare(left, [replace(f, name=named[f.name]) for f in right], checked_threads(threads), progress)


def _is_model(source: object) -> TypeGuard[nn.Module]:
    return "torch" in sys.modules and isinstance(source, sys.modules["torch"].nn.Module)


def _moved(factors: Iterable[LoraFactors], device: str, backend: str | None) -> Iterable[LoraFactors]:
    if device == "auto" and backend == "cuda":
        cuda_backend(required=True)
        device = "cuda"
    if device in ("auto", "cpu"):
        return factors
    if device != "cuda":
        raise ParaError(f"device '{device}' is unknown; use auto, cpu or cuda")
    import torch

    if not torch.cuda.is_available():
        raise ParaError("no CUDA device is available to PyTorch; use the device cpu")
    return [replace(f, B=as_tensor(f.B).to(device), A=as_tensor(f.A).to(device)) for f in factors]


def _report(
    spectra: Spectra,
    plan: Plan,
    new: Sequence[Truncated] | None,
    *,
    source: str,
    start: float,
    decomposition: Decomposition | None = None,
    truncates: bool = True,
) -> Report:
    predicted = [plan.errors[module.name] for module in spectra.modules]
    errors = predicted if new is None else [t.error for t in new]
    notes = []
    floored = sum(module.min_rank > 0 for module in spectra.modules)
    if floored:
        notes.append(
            f"Rank ≥ 1 is kept in {floored} of {len(spectra.modules)} modules, which can't be left out (DoRA, a bias, "
            "other weights of their own, or the format counts modules; with DoRA the error is that of B·A alone)."
        )
    if spectra.modules and spectra.energy == 0:
        notes.append("ΔW is zero in every module: is this adapter trained?")
    if plan.energy < LOW_ENERGY:
        notes.append(f"Energy kept is below {LOW_ENERGY:.0%}; {_better(spectra, plan)}.")
    if plan.shaping.get("uniform"):
        free = spectra.plan(params=plan.parameters_after)
        if percent(free.energy) != percent(plan.energy):
            notes.append(
                f"Without one rank for all, as many parameters would keep {percent(free.energy)} of the energy, not "
                f"{percent(plan.energy)}."
            )
        if plan.parameters_after >= plan.parameters_before:
            notes.append(
                f"Nothing is saved: one rank for all is {max(plan.ranks.values())} here. For a reader that takes any "
                "rank, allow smaller ones: allowed_ranks=[1, 2, 4, 6].",
            )
    if plan.budget is None and truncates:
        notes.append("No budget was given, so everything that the shaping allows is kept; energy=0.95 is a good one.")
    elif not plan.shaping.get("uniform") and plan.unshaped_energy is not None and plan.unshaped_energy > plan.energy:
        notes.append(f"Without shaping the same budget would keep {plan.unshaped_energy:.2%} of the energy.")
    undecided = undecided_components(spectra, plan, decomposition.betas) if decomposition else ()
    if undecided:
        notes.append(
            f"{len(undecided)} components are equal to the threshold within rounding; another backend may choose "
            "others among them."
        )
    return Report(
        plan=plan,
        modules=module_reports(spectra, plan, errors),
        source=source,
        backends=decomposition.backends if decomposition else (),
        undecided=undecided,
        notes=tuple(notes),
        seconds=time.perf_counter() - start,
        version=__version__,
        predicted=new is None,
    )


def _better(spectra: Spectra, plan: Plan) -> str:
    """The `keep` that would give enough energy with the same shaping."""
    try:
        better = spectra.plan(energy=GOOD_ENERGY, score=plan.score, **plan.shaping)
    except ParaError:
        return f"with this shaping no budget gives {GOOD_ENERGY:.0%}"
    fraction = -(-better.parameters_after * 1000 // better.parameters_before) / 1000
    if plan.score == "sigma" and plan.budget in ("keep", "params", "size"):
        return f"energy={GOOD_ENERGY:g} would take {fraction:.1%} of the parameters"
    return f"keep={fraction:g} would give {GOOD_ENERGY:.0%}"


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
