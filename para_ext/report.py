"""Report: what a compression kept, what it cost, and the certificate of what was lost, per module and in all."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import SCHEMA, __version__
from .arrays import UNIT_ROUNDOFF
from .errors import ParaError
from .naming import module_type
from .plan import Plan
from .spectra import Spectra
from .whole_file import write_text

if TYPE_CHECKING:
    from .backends import Truncated
    from .decomposition import Decomposition
    from .verification import ModuleVerification

LOW_ENERGY = 0.90
GOOD_ENERGY = 0.95


@dataclass(frozen=True)
class ModuleReport:
    """One module, before and after.

    Attributes:
        norm: ‖ΔW‖_F.
        sigma_max: σ₁; sigma_kept, sigma_dropped: the σ on either side of the cut (None where there is none).
        error: upper bound of ‖ΔW − ΔW'‖_F for the tensors as stored; error_floor: no rank-k matrix can do better
            (Eckart & Young 1936).
        energy: Σσ² kept, as a fraction of the module's.
    """

    name: str
    type: str
    m: int
    n: int
    rank_before: int
    rank_after: int
    parameters_before: int
    parameters_after: int
    norm: float
    sigma_max: float
    sigma_kept: float | None
    sigma_dropped: float | None
    error: float
    error_floor: float
    energy: float


@dataclass(frozen=True, repr=False)
class Report:
    """The outcome of one compression.

    Attributes:
        plan: ranks, threshold and predicted error.
        target: who it was written for; None: the source's own format.
        modules: per module, in the adapter's order.
        bytes_before, bytes_after: of the tensor files; None for a live model.
        undecided: components whose σ is so close to the cut that rounding decided (another backend may differ).
        notes: what a user should know beyond the numbers, a sentence each.
        predicted: nothing was truncated; errors are those that the plan predicts, before storage rounding.
    """

    plan: Plan
    modules: tuple[ModuleReport, ...]
    source: str
    output: str | None = None
    target: str | None = None
    backends: tuple[str, ...] = ()
    bytes_before: int | None = None
    bytes_after: int | None = None
    undecided: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    version: str = field(default="")
    predicted: bool = False

    @property
    def ranks(self) -> dict[str, int]:
        """Module name → new rank."""
        return self.plan.ranks

    @property
    def parameters_before(self) -> int:
        return self.plan.parameters_before

    @property
    def parameters_after(self) -> int:
        return self.plan.parameters_after

    @property
    def energy(self) -> float:
        """Σσ² kept, as a fraction of the adapter's, before storage rounding."""
        return self.plan.energy

    @property
    def norm(self) -> float:
        """‖ΔW‖_F over all modules."""
        return math.sqrt(math.fsum(m.norm * m.norm for m in self.modules))

    @property
    def error(self) -> float:
        """The certificate: an upper bound of ‖ΔW − ΔW'‖_F over all modules, storage rounding included."""
        return math.sqrt(math.fsum(m.error * m.error for m in self.modules))

    @property
    def error_floor(self) -> float:
        """The Eckart-Young lower bound of the error at these ranks."""
        return math.sqrt(math.fsum(m.error_floor * m.error_floor for m in self.modules))

    @property
    def relative_error(self) -> float:
        """``error / norm``; see :func:`relative_error`."""
        return relative_error(self.modules)

    def __repr__(self) -> str:
        return f"<Report: {self.summary()}>"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: what ``para_ext.json`` and ``--json`` hold."""
        plan = self.plan.to_dict()
        plan.pop("errors")  # the modules have them
        return {
            "schema": SCHEMA,
            "version": self.version,
            "source": self.source,
            "output": self.output,
            "target": self.target,
            "backends": list(self.backends),
            "seconds": self.seconds,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "norm": self.norm,
            "energy": self.energy,
            "error": self.error,
            "relative_error": self.relative_error,
            "error_floor": self.error_floor,
            "undecided": list(self.undecided),
            "notes": list(self.notes),
            "predicted": self.predicted,
            "plan": plan,
            "modules": [asdict(m) for m in self.modules],
        }

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_dict` as JSON."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    def summary(self) -> str:
        """One line: ranks, size before → after, energy kept, threshold, time."""
        ranks = [m.rank_after for m in self.modules]
        dropped = ranks.count(0)
        parts = [
            f"ranks {span(ranks)}" + (f" ({dropped} dropped)" if dropped else ""),
            f"{self.parameters_before:,} → {self.parameters_after:,} parameters"
            + (f" ({self.parameters_after / self.parameters_before:.1%})" if self.parameters_before else ""),
        ]
        if self.bytes_before is not None and self.bytes_after is not None:
            parts.append(f"{megabytes(self.bytes_before)} → {megabytes(self.bytes_after)}")
        parts.append(f"energy kept {percent(self.energy)}")
        if self.plan.threshold is not None:
            parts.append(f"threshold {self.plan.threshold:.4g} ({'σ' if self.plan.score == 'sigma' else 'σ²/(m+n)'})")
        parts.append(f"{self.seconds:.2f} s")
        return ", ".join(parts)


def relative_error(modules: Sequence[ModuleReport] | Sequence[ModuleVerification]) -> float:
    """Their error over their norm.

    A module that was dropped is off by ‖ΔW‖, which is 1 of its norm: what its bound allows for rounding is not added.
    """
    norm = math.hypot(*(m.norm for m in modules))
    error = math.hypot(*(m.error if m.rank_after else m.norm for m in modules))
    return error / norm if norm else float(error > 0)


def reported(
    spectra: Spectra,
    plan: Plan,
    new: Sequence[Truncated] | None,
    *,
    source: str,
    start: float,
    decomposition: Decomposition | None = None,
    truncates: bool = True,
) -> Report:
    """What is to be said of a plan, and of the new factors where it was carried out.

    Args:
        new: in the order of the modules; None: predicted only.
        source: of what, in words.
        start: of the clock ``time.perf_counter``.
        decomposition: that did the work.
        truncates: False where nothing was to be lost.
    """
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


def stored(report: Report, rounding: Mapping[str, float]) -> Report:
    """The report with what storage took from each module's new ΔW', by name, in the certificate."""
    modules = (replace(m, error=m.error + rounding.get(m.name, 0.0)) for m in report.modules)
    return replace(report, modules=tuple(modules))


def module_reports(spectra: Spectra, plan: Plan, errors: Sequence[float]) -> tuple[ModuleReport, ...]:
    """Join spectra, plan and certified errors, in the modules' order."""
    reports = []
    for module, error in zip(spectra.modules, errors, strict=True):
        rank = plan.ranks[module.name]
        squares = [s * s for s in module.sigma]
        total, dropped = math.fsum(squares), math.fsum(squares[rank:])
        cost = module.m + module.n
        reports.append(
            ModuleReport(
                name=module.name,
                type=module_type(module.name),
                m=module.m,
                n=module.n,
                rank_before=module.rank,
                rank_after=rank,
                parameters_before=module.rank * cost,
                parameters_after=rank * cost,
                norm=math.sqrt(total),
                sigma_max=module.sigma[0],
                sigma_kept=module.sigma[min(rank, len(module.sigma)) - 1] if rank else None,
                sigma_dropped=module.sigma[rank] if rank < len(module.sigma) else None,
                error=error,
                error_floor=math.sqrt(dropped),
                energy=1 - dropped / total if total else 1.0,
            )
        )
    return tuple(reports)


def undecided_components(spectra: Spectra, plan: Plan, betas: Sequence[float]) -> tuple[str, ...]:
    """Components on either side of the cut whose intervals of possible σ overlap, as ``module[index]``.

    The intervals are the a-priori bounds of singular values from fp64 Gram matrices,
    |δσ| ≤ min(30·r·u·(σ + β²/σ), √(30·r·u)·β) with β = |s|·‖A‖_F·‖B‖_F and u = 2⁻⁵³.
    """
    if plan.threshold is None or plan.budget == "rank" or plan.shaping:
        return ()
    kept: list[tuple[float, float, str]] = []
    dropped: list[tuple[float, float, str]] = []
    for module, beta in zip(spectra.modules, betas, strict=True):
        if module.group is not None:
            continue
        rank = plan.ranks[module.name]
        for index in (rank - 1, rank):  # σ is sorted: only the module's own neighbours of the cut can be in doubt
            if module.min_rank <= index < len(module.sigma):
                low, high = _interval(module.sigma[index], module.rank, beta)
                if plan.score == "density":
                    low, high = low * low / (module.m + module.n), high * high / (module.m + module.n)
                (kept if index < rank else dropped).append((low, high, f"{module.name}[{index}]"))
    if not kept or not dropped:
        return ()
    lowest_kept, highest_dropped = min(low for low, _, _ in kept), max(high for _, high, _ in dropped)
    doubtful = [name for low, _, name in kept if low <= highest_dropped]
    doubtful += [name for _, high, name in dropped if high >= lowest_kept]
    return tuple(doubtful) if len(doubtful) > 1 else ()


def _interval(sigma: float, rank: int, beta: float) -> tuple[float, float]:
    noise = 30 * rank * UNIT_ROUNDOFF
    absolute = math.sqrt(noise) * beta
    width = min(noise * (sigma + beta * beta / sigma), absolute) if sigma > 0 else absolute
    return max(0.0, sigma - width), sigma + width


def megabytes(count: int) -> str:
    """Bytes for people, in units of 10⁶ (or 10³) bytes."""
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.2f} kB"


def percent(fraction: float) -> str:
    """A part that is kept, for people: rounded down, so that a lower bound stays one."""
    return f"{(Decimal(repr(fraction)) * 100).quantize(Decimal('0.01'), ROUND_FLOOR)}%"


def at_most(error: float) -> str:
    """An error for people: rounded up, so that an upper bound stays one."""
    if not math.isfinite(error):
        return str(error)
    return f"{float(Context(prec=3, rounding=ROUND_CEILING).create_decimal(repr(error))):.2e}"


def span(ranks: Sequence[int]) -> str:
    """The smallest and the largest of some ranks: ``8``, or ``0–8``."""
    low, high = min(ranks, default=0), max(ranks, default=0)
    return str(low) if low == high else f"{low}–{high}"
