"""Page: one HTML file that shows an adapter's spectra, what any budget would keep, and certificates; through plotly.

Nothing on it is planned in the browser: a slider goes through plans that ``Spectra.plan`` made, so that the page and
``compress`` agree. ``page.html`` is its frame, ``page.js`` draws. Names come from files and are text everywhere: as
data they cannot end their script element, and a content security policy lets nothing run but what is hashed here, and
nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from . import __version__
from .charts import DEFAULT, Choice, RankMap, choices, uniform
from .compress import decompose, verify
from .errors import ParaError
from .factors import LoraFactors
from .formats import place_of, read_adapter
from .formats.output import SIDECAR
from .formats.tensors import read_json
from .layout import checked
from .naming import module_type, natural_key
from .progress import Progress
from .report import Report, at_most, megabytes, percent, span
from .rewriting import HEADER_TEXT
from .spectra import Spectra
from .whole_file import check_new, write_text

_SAME = 1e-5  # by which σ₁ may differ, relatively, between backends and versions, and not between adapters


def write_page(
    out: str | Path,
    adapter: str | Path | Spectra,
    compressed: Iterable[str | Path | Report] = (),
    *,
    title: str | None = None,
    overwrite: bool = False,
    backend: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write one self-contained HTML page about an adapter and what it was compressed to.

    It shows singular values by module type, the rank of every module, and size against error for the global and the
    uniform rule; a slider goes through budgets from 1 % to 100 % of the parameters; a table has every module's ranks,
    σ₁, error, floor and energy. It needs the extra ``report``.

    Args:
        out: the file to write; it is there whole or not at all.
        adapter: a folder, file or id that ``compress_adapter`` takes, a file that ``Spectra.save`` wrote (``.json``),
            or Spectra.
        compressed: what was made of the adapter: a Report, or a folder, file or id. A folder's certificate is that of
            its ``para_ext.json``; without one that belongs to this adapter, it is measured as by ``verify``.
        title: of the page; by default the adapter's name.
        overwrite: replace a file that is at ``out``.
        backend, threads, progress: as for ``decompose``.

    Raises:
        ParaError: plotly is not installed, ``out`` is refused, or an adapter is, naming what and why.
    """
    plotly, out, compressed = _plotly(), Path(out), list(compressed)
    check_new(out, [Path(p) for p in (adapter, *compressed) if isinstance(p, str | Path)], "out=", overwrite=overwrite)
    places = [item if isinstance(item, Report) else (str(item), place_of(item)) for item in compressed]
    factors: tuple[LoraFactors, ...] | None = None
    shaping: Mapping[str, Any] = {}
    if isinstance(adapter, Spectra):
        spectra = adapter
    elif Path(adapter).suffix == ".json":
        spectra = Spectra.load(adapter)
    else:
        source = read_adapter(adapter)
        factors, shaping = tuple(source.factors), source.shaping
        modules = decompose(factors, backend=backend, threads=threads, progress=progress).spectra.modules
        spectra = Spectra(modules, source.layout(None, " " * HEADER_TEXT))
    if progress is not None:
        progress("planning", 0, 0)
    stops = [_planned(spectra, choice) for choice in choices(spectra, **shaping)]
    stops += [_made(spectra, factors, item, threads, progress) for item in places]
    if title is None:
        title = "LoRA adapter" if isinstance(adapter, Spectra) else Path(adapter).resolve().name.removesuffix(".json")
    write_text(out, _html(title, _document(spectra, stops), plotly))


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ParaError("a report needs plotly; install para_ext[report]") from error
    return str(get_plotlyjs())


# Stops of the slider: plans, and what was made


@dataclass(frozen=True)
class _Stop:
    """Ranks of all modules, and what they keep.

    Attributes:
        name: of its button; empty for a budget among many.
        origin: where it comes from: the options of ``compress``, or how its errors are known.
        error, energy: in all, absolute and as a part.
        errors: upper bounds per module; None where they are those that the spectra predict.
        energies: lower bounds per module, where spectra don't say.
    """

    name: str
    origin: str
    ranks: list[int]
    error: float
    energy: float
    bytes: int | None
    errors: list[float] | None = None
    energies: list[float] | None = None


def _planned(spectra: Spectra, choice: Choice) -> _Stop:
    plan = choice.plan
    size = spectra.layout.bytes(plan.ranks) if spectra.layout else None
    return _Stop(choice.name, choice.option, list(plan.ranks.values()), plan.error, plan.energy, size)


def _made(
    spectra: Spectra,
    factors: Sequence[LoraFactors] | None,
    item: tuple[str, Path] | Report,
    threads: int | None,
    progress: Progress | None,
) -> _Stop:
    """A compressed adapter, by its certificate where it has one of this adapter, measured otherwise.

    Args:
        item: a Report, or an adapter's name and where it lies.
    """
    if isinstance(item, Report):
        record, name = item.to_dict(), item.output or "compressed"
    else:
        name, path = item
        sidecar = path / SIDECAR
        record = read_json(sidecar) if sidecar.is_file() else {}
    if record:
        stop = _certified(spectra, record, name)
        if stop is not None:
            return stop
    if isinstance(item, Report):
        raise ParaError(f"the report of '{name}' is not of this adapter: give the adapter that it was made of")
    if factors is None:
        raise ParaError(
            f"'{name}' has no {SIDECAR} that belongs to these spectra, so it must be measured: "
            "give the adapter itself, not its spectra"
        )
    return _measured(spectra, factors, name, path, threads, progress)


def _certified(spectra: Spectra, record: Mapping[str, Any], name: str) -> _Stop | None:
    """What a report says; None where it is a report of another adapter."""
    rows: dict[str, tuple[float, int, float]] = {}
    try:
        for item in checked(record, "modules", list):
            sigma, error = float(checked(item, "sigma_max", float, int)), float(checked(item, "error", float, int))
            rank = checked(item, "rank_after", int)
            if not (0 <= error < math.inf and rank >= 0):
                raise ParaError(f"the error {error:g} or the rank {rank} of a module is out of range")
            rows[checked(item, "name", str)] = sigma, rank, error
        size = checked(record, "bytes_after", int, None)
        predicted = checked(record, "predicted", bool)
    except ParaError as error:
        raise ParaError(f"the certificate of '{name}' is damaged, compress again: {error}") from error
    if rows.keys() != {module.name for module in spectra.modules}:
        return None
    if any(not math.isclose(rows[m.name][0], m.sigma[0], rel_tol=_SAME) for m in spectra.modules):
        return None
    ranks, errors = {m.name: rows[m.name][1] for m in spectra.modules}, [rows[m.name][2] for m in spectra.modules]
    kept = math.fsum(s for name, squares in spectra.squares.items() for s in squares[: ranks[name]].tolist())
    return _Stop(
        name=name,
        origin="predicted, nothing was written" if predicted else "as certified when it was written",
        ranks=list(ranks.values()),
        error=math.hypot(*errors),
        energy=kept / spectra.energy if spectra.energy else 1.0,
        bytes=size,
        errors=errors,
    )


def _measured(
    spectra: Spectra,
    factors: Sequence[LoraFactors],
    name: str,
    path: Path,
    threads: int | None,
    progress: Progress | None,
) -> _Stop:
    other = read_adapter(path)
    found = verify(factors, other.factors, threads=threads, progress=progress)
    by_name = {module.name: module for module in found.modules}
    if by_name.keys() != spectra.columns.keys():
        odd = min(by_name.keys() ^ spectra.columns.keys(), key=natural_key)
        raise ParaError(f"'{name}' and the adapter differ in the module '{odd}': give what was made of this adapter")
    modules = [by_name[name] for name in spectra.columns]
    return _Stop(
        name=name,
        origin="measured on the files",
        ranks=[m.rank_after for m in modules],
        error=found.error,
        energy=found.energy,
        bytes=other.weights.stat().st_size,
        errors=[m.error for m in modules],
        energies=[m.energy for m in modules],
    )


# The document that page.js draws


def _document(spectra: Spectra, stops: Sequence[_Stop]) -> dict[str, Any]:
    modules, norm = spectra.modules, math.sqrt(spectra.energy)
    map_ = RankMap.of([module.name for module in modules])
    types = [module_type(module.name) for module in modules]
    before = spectra.layout.bytes({m.name: m.rank for m in modules}) if spectra.layout else None
    facts = [
        f"{len(modules):,} modules of rank {span([m.rank for m in modules])}",
        f"{spectra.parameters:,} parameters",
        *([] if before is None else [megabytes(before)]),
        f"‖ΔW‖ = {norm:.4g}",
    ]
    # A stable sort: what was made stands after the plan of the same size.
    cost = [module.m + module.n for module in modules]
    records = sorted((_record(stop, cost, spectra.parameters, norm) for stop in stops), key=lambda r: r["size"])
    made = [i for i, record in enumerate(records) if record["errors"] is not None]
    return {
        "facts": " · ".join(facts),
        "version": __version__,
        "modules": [
            {"name": m.name, "type": t, "m": m.m, "n": m.n, "rank": m.rank, "sigma": m.sigma, "cell": cell}
            for m, t, cell in zip(modules, types, map_.cells, strict=True)
        ],
        "types": sorted(set(types), key=natural_key),
        "map": {"layers": map_.layers, "labels": map_.labels, "kinds": map_.kinds},
        "stops": records,
        "start": made[0] if made else next((i for i, r in enumerate(records) if r["origin"] == DEFAULT), 0),
        "uniform": [
            {
                "rank": max(plan.ranks.values()),
                "size": plan.parameters_after / plan.parameters_before,
                "error": _part(plan.error, norm),
            }
            for plan in uniform(spectra)
        ],
    }


def _record(stop: _Stop, cost: Sequence[int], whole: int, norm: float) -> dict[str, Any]:
    """Numbers to draw, and the words of the readout, as the command line has them."""
    parameters = sum(rank * c for rank, c in zip(stop.ranks, cost, strict=True))
    dropped = stop.ranks.count(0)
    return {
        "name": stop.name,
        "origin": stop.origin,
        "ranks": stop.ranks,
        "size": parameters / whole,
        "error": _part(stop.error, norm),
        "errors": stop.errors,
        "energies": stop.energies,
        "words": {
            "ranks": span(stop.ranks) + (f" ({dropped} dropped)" if dropped else ""),
            "parameters": f"{parameters:,} ({parameters / whole:.1%})",
            "energy": percent(stop.energy),
            "error": at_most(_part(stop.error, norm)),
            "bytes": "–" if stop.bytes is None else megabytes(stop.bytes),
        },
    }


def _part(error: float, norm: float) -> float:
    return error / norm if norm else float(error > 0)


# HTML


def _html(title: str, document: dict[str, Any], plotly: str) -> str:
    script = (files("para_ext") / "page.js").read_text(encoding="utf-8")
    # Where JSON has these characters they are in strings.
    data = re.sub("[<>&\u2028\u2029]", lambda c: f"\\u{ord(c[0]):04x}", json.dumps(document, allow_nan=False))
    filling = {
        "title": html.escape(title),
        "policy": "; ".join(
            [
                "default-src 'none'",
                f"script-src {_hashed(plotly)} {_hashed(script)}",
                "style-src 'unsafe-inline'",
                "img-src data: blob:",
                "base-uri 'none'",
                "form-action 'none'",
            ]
        ),
        "data": data,
        "plotly": plotly,
        "script": script,
    }
    frame = (files("para_ext") / "page.html").read_text(encoding="utf-8")
    return re.sub(
        r"\{\{(\w+)\}\}", lambda field: filling[field[1]], frame
    )  # one pass: what is filled in is not searched


def _hashed(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
