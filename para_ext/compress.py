"""The public calls; each reads like the picture: read → decompose → plan → truncate → write, and a report."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, Union, overload

from .decomposition import Decomposition, checked_threads, on_device
from .errors import ParaError, shown
from .factors import LoraFactors
from .formats import read_adapter
from .formats.flux import parts
from .formats.names import matched
from .plan import Infeasible
from .progress import Progress
from .report import Report, reported
from .rewriting import HEADER_TEXT, Job, budgets, everything, given, planned, rewrite, several
from .spectra import Spectra
from .verification import Verification, compare

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .models import Contents, Exchange, LiveAdapter

Source = Union[str, Path, "nn.Module", Iterable[LoraFactors]]
Fractions = list[float | str] | tuple[float | str, ...]


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
        factors, layout = on_device(adapter.factors, device, backend), adapter.layout(None, " " * HEADER_TEXT)
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
    """Compress the LoRA layers of a live model in place; on an error the model and its optimizer are as they were.

    ``save_pretrained`` then writes the small adapter. To train on, give the optimizer here or build it afterwards: the
    factors are new parameters, without the gradients and hooks of the old ones, so call it between ``optimizer.step()``
    and the next backward pass, and register such hooks again.

    Args:
        model: a PeftModel, or any module with LoRA layers (loralib style too).
        adapter_name: which adapter; the active one if None.
        optimizer: gets the new parameters in the place of the old ones; its moments (Adam's, SGD's) are carried over as
            :mod:`para_ext.optimizer` says. A second moment that the type would round to 0 becomes its smallest number.
        dtype: of the new factors, ``torch.bfloat16`` or "bfloat16"; each module's own if None.
        balance: "even" puts √σ on both factors and leaves those alone whose rank does not change; "A" or "B" puts all
            of σ on that one, so that the other's rows or columns are orthonormal.
        backend, threads: as for :func:`decompose`.
        **budget: at most one of ``energy=0.95`` (the default), ``keep=0.25``, ``params=10**6``, ``total_rank=500``,
            ``threshold=0.1``, ``rank=8``, ``auto="knee"``; with ``score="auto"|"sigma"|"density"`` and shaping by
            ``min_rank``, ``max_rank``, ``multiple_of``, ``allowed_ranks``, ``uniform``. Meaning:
            ``help(para_ext.plan.plan)``. With shaping and no budget, everything that the shaping allows is kept.

    Raises:
        ParaError: the model, the optimizer or the budget is refused, naming what and why.
    """
    start = time.perf_counter()
    live, along = _opened(model, adapter_name, optimizer)
    decomposition = Decomposition(live.factors, backend, threads)
    plan, notes = planned(budget, decomposition.spectra)
    new = decomposition.truncate_certified(plan, dtype, balance=balance)
    report = reported(
        decomposition.spectra, plan, new, source=type(model).__name__, start=start, decomposition=decomposition
    )
    live.replace(decomposition.named(new), along)
    return replace(report, notes=(*notes, *report.notes))


def check_compression(
    model: nn.Module,
    *,
    adapter_name: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    dtype: torch.dtype | str | None = None,
    balance: str = "even",
    backend: str | None = None,
    threads: int | None = None,
    **budget: Any,
) -> None:
    """Refuse what :func:`compress_model` would refuse of this adapter however it is trained on.

    Raises:
        ParaError: naming what and why.
    """
    live, _ = _opened(model, adapter_name, optimizer)
    decomposition = Decomposition(live.factors, backend, threads)
    with suppress(Infeasible):
        planned(budget, decomposition.spectra)
    decomposition.truncate_certified({f.name: 0 for f in live.factors}, dtype, balance=balance)


def _opened(
    model: nn.Module, adapter_name: str | None, optimizer: torch.optim.Optimizer | None
) -> tuple[LiveAdapter, Callable[[Sequence[Exchange]], list[Contents]] | None]:
    """A model's adapter, and what is to change along with it: the optimizer, if one is given."""
    if not _is_model(model):
        raise ParaError(
            f"compress_model takes a live model, not a {type(model).__name__}; for a folder use compress_adapter"
        )
    from .models import read_model
    from .optimizer import carried_over, checked_optimizer

    live = read_model(model, adapter_name)
    if optimizer is None:
        return live, None
    return live, partial(carried_over, checked_optimizer(optimizer, live.parameters))


@overload
def compress_adapter(
    source: str | Path, out: str | Path, *, keep: float | str | None = None, **options: Any
) -> Report: ...
@overload
def compress_adapter(source: str | Path, out: str | Path, *, keep: Fractions, **options: Any) -> list[Report]: ...
def compress_adapter(
    source: str | Path,
    out: str | Path,
    *,
    target: str | Sequence[str] | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    backend: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    balance: str = "even",
    keep: float | str | Fractions | None = None,
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
        overwrite: replace what para_ext wrote at ``out``; refused where anything there was added or changed since.
        dry_run: plan and report, write nothing; errors in the report are then the predicted ones.
        backend, device, threads, progress: as for :func:`decompose`.
        balance: as for :func:`compress_model`.
        keep: the budget of that name, or several: one decomposition serves all.
        **budget: another budget, score and shaping, as for :func:`compress_model`, and ``size="32MiB"``: bytes of the
            written safetensors file.

    Returns:
        A Report, or a list of them where ``keep`` or ``target`` has several values: is a list or a tuple.

    Raises:
        ParaError: refused, naming what and why; nothing was written (of several outputs, none after the failing one).
    """
    keeps, targets = several(keep=keep, target=target)
    job = Job(targets, base, dtype, overwrite, dry_run, backend, device, threads, progress, balance)
    reports = rewrite(read_adapter(source), str(source), Path(out), budgets(keeps, budget), job)
    return reports if isinstance(keeps, list) or isinstance(targets, list) else reports[0]


def convert_adapter(
    source: str | Path,
    out: str | Path,
    target: str | None,
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
    if target is not None and not isinstance(target, str):
        raise ParaError(f"target is {shown(target)}: give one, as text, such as 'vllm'")
    job = Job(target, base, dtype, overwrite, threads=threads, progress=progress)
    return rewrite(read_adapter(source), str(source), Path(out), everything, job)[0]


def merge_adapters(
    sources: Mapping[str | Path, float],
    out: str | Path,
    *,
    target: str | Sequence[str] | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    backend: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    balance: str = "even",
    keep: float | str | Fractions | None = None,
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

    keeps, targets = several(keep=keep, target=target)
    adapters = [(read_adapter(source), float(weight)) for source, weight in sources.items()]
    if len(adapters) < 2:
        raise ParaError("one adapter alone is not merged: give two or more, as a=0.6 b=0.4")
    dtype = dtype or widest(adapter for adapter, _ in adapters)
    job = Job(targets, base, dtype, overwrite, dry_run, backend, device, threads, progress, balance)
    label = " + ".join(f"{weight:g} × {source}" for source, weight in sources.items())
    plans = budgets(keeps, budget) if keeps is not None or given(budget) else everything
    summed = merged(adapters)
    summed = replace(summed, notes=(*summed.notes, f"A weighted sum: {label}."))
    reports = rewrite(summed, label, Path(out), plans, job)
    return reports if isinstance(keeps, list) or isinstance(targets, list) else reports[0]


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
    plan, notes = planned(budget, spectra)
    report = reported(spectra, plan, None, source=source, start=start)
    size = spectra.layout.bytes(plan.ranks) if spectra.layout else None
    return replace(report, bytes_after=size, notes=(*notes, *report.notes))


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
