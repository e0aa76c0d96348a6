"""Tables for people: what the command line prints."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .errors import printable
from .inspection import Inspection
from .naming import natural_key
from .report import ModuleReport, Report, at_most, megabytes, percent, relative_error, span
from .verification import ModuleVerification, Verification

_LEGEND = "energy: kept part of Σσ². error: bound of ‖ΔW−ΔW'‖_F / ‖ΔW‖_F."
_LEAST_ROOM = 20  # columns in which the end of a module's name still tells it from others
_PREDICTED = "energy: kept part of Σσ². error: ‖ΔW−ΔW'‖_F / ‖ΔW‖_F as predicted, before storage rounding."


def report_table(report: Report) -> None:
    """Per module type and in all: ranks, parameters, energy kept, relative error; then notes and the summary."""
    table = _Table()
    for heading in ("modules", "", "rank", "parameters", "kept", "energy", "error"):
        table.add_column(heading, justify="left" if heading == "modules" else "right", no_wrap=True)
    by_type: dict[str, list[ModuleReport]] = defaultdict(list)
    for module in report.modules:
        by_type[module.type].append(module)
    for name in sorted(by_type, key=natural_key):
        table.add_row(*_report_row(name, by_type[name]))
    table.add_section()
    table.add_row(*_report_row("all", report.modules), style="bold")
    console = _console()
    _print(console, _heading(report), style="italic")
    console.print(table)
    _print(console, _PREDICTED if report.predicted else _LEGEND, style="dim")
    for note in report.notes:
        _print(console, note)
    _print(console, report.summary(), style="bold")


def _heading(report: Report) -> str:
    """What became what; of a plan, by which budget it would."""
    if report.output is not None:
        return f"{report.source} → {report.output}"
    plan = report.plan
    budget = "" if plan.budget is None else f", {plan.budget.replace('_', ' ')} {plan.value:,}"
    return report.source + budget + (f", for {report.target}" if report.target else "")


def _report_row(name: str, modules: Sequence[ModuleReport]) -> tuple[str, ...]:
    before, after = sum(m.parameters_before for m in modules), sum(m.parameters_after for m in modules)
    squared_norm = math.fsum(m.norm * m.norm for m in modules)
    dropped = math.fsum(m.error_floor * m.error_floor for m in modules)
    return (
        name,
        f"×{len(modules)}",
        f"{span([m.rank_before for m in modules])} → {span([m.rank_after for m in modules])}",
        f"{before:,} → {after:,}",
        f"{after / before:.1%}",
        percent(1 - dropped / squared_norm) if squared_norm else "–",
        at_most(relative_error(modules)) if squared_norm else "–",
    )


def inspection_tables(inspection: Inspection) -> None:
    """Module types, then budgets."""
    console = _console()
    modules, norm = f"{inspection.module_count} modules", f"‖ΔW‖ = {inspection.norm:.4g}"
    _print(console, f"{modules}, {inspection.parameters:,} LoRA parameters, {norm}", style="italic")
    types = _Table()
    for heading in ("type", "", "rank", "effective", "parameters", "share of energy", "σ₁", "zero", "kept at 95%"):
        types.add_column(heading, justify="left" if heading == "type" else "right", no_wrap=" " not in heading)
    for t in inspection.types:
        types.add_row(
            t.type, f"×{t.module_count}", str(t.rank), f"{t.effective_rank:.1f}", f"{t.parameters:,}",
            f"{t.energy_share:.1%}",
            f"{t.sigma_max:.3g}", str(t.dead or ""), f"{t.kept:.1%}",
        )  # fmt: skip
    for d in inspection.depths:
        layers = "layers" if d.first < d.last else "layer"
        name, share, kept = f"{layers} {span([d.first, d.last])}", f"{d.energy_share:.1%}", f"{d.kept:.1%}"
        types.add_row(name, f"×{d.module_count}", "", "", "", share, "", "", kept)
    console.print(types)
    _print(console, "what a budget would keep", style="italic")
    budgets = _Table()
    for heading in ("budget", "parameters", "kept", "file", "energy kept", "relative error", "one rank for all"):
        budgets.add_column(heading, justify="left" if heading == "budget" else "right", no_wrap=" " not in heading)
    for b in inspection.budgets:
        budgets.add_row(
            f"--{b.budget} {b.value:g}", f"{b.parameters_after:,}", f"{b.kept:.1%}",
            "–" if b.bytes_after is None else megabytes(b.bytes_after), percent(b.energy), f"{b.relative_error:.3g}",
            "–" if b.uniform_energy is None else f"{b.uniform_rank}: {percent(b.uniform_energy)}",
        )  # fmt: skip
    console.print(budgets)
    if inspection.floor is not None and inspection.floor.kept < 1:
        free = 1 - inspection.floor.kept
        _print(console, f"{free:.1%} of the parameters are free to drop. {inspection.floor.reason}")


def verification_table(verification: Verification) -> None:
    """Per module type and in all: ranks, energy kept, relative error, and the worst module, as far as it fits."""
    by_type: dict[str, list[ModuleVerification]] = defaultdict(list)
    for module in verification.modules:
        by_type[module.type].append(module)

    def drawn(room: int) -> Table:
        table = _Table()
        for heading in ("modules", "", "rank", "energy", "error"):
            table.add_column(heading, justify="left" if heading == "modules" else "right", no_wrap=True)
        if room:
            table.add_column("worst module", no_wrap=True)
        for name in sorted(by_type, key=natural_key):
            table.add_row(*_verification_row(name, by_type[name], room))
        table.add_section()
        table.add_row(*_verification_row("all", verification.modules, room), style="bold")
        return table

    console = _console()
    room = console.width - console.measure(drawn(0)).maximum - 2
    console.print(drawn(room if room >= _LEAST_ROOM else 0))
    _print(console, _LEGEND, style="dim")
    _print(console, verification.summary(), style="bold")


def _verification_row(name: str, modules: Sequence[ModuleVerification], room: int) -> tuple[str, ...]:
    """The cells; the last, where there is room for it, is the worst module's name in so many columns."""
    worst = max(modules, key=lambda m: m.error)
    relative = relative_error(modules) if any(m.norm for m in modules) else None
    return (
        name,
        f"×{len(modules)}",
        f"{span([m.rank_before for m in modules])} → {span([m.rank_after for m in modules])}",
        "–" if relative is None else percent(max(0.0, 1 - relative**2)),
        at_most(math.hypot(*(m.error for m in modules)) if relative is None else relative),
        *([_ending(worst.name, room) if worst.error else "–"] if room else []),
    )


def _ending(name: str, length: int) -> str:
    """The end of a module's name, which tells it from the others."""
    return name if len(name) <= length else f"…{name[1 - length :]}"


# Names and paths come from files: what looks like markup in them is text, and what would steer a terminal is spelt out.


class _Table(Table):
    def __init__(self) -> None:
        super().__init__(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)

    def add_row(self, *cells: str, style: str | None = None) -> None:  # type: ignore[override]
        super().add_row(*map(printable, cells), style=style)


def _print(console: Console, text: str, style: str | None = None) -> None:
    console.print(printable(text), style=style, highlight=False, markup=False)


def _console() -> Console:
    # In a pipe there is no width to fit into, and cutting columns would lose what the reader asked for.
    console = Console(markup=False, emoji=False)
    return console if console.is_terminal else Console(markup=False, emoji=False, width=max(console.width, 160))
