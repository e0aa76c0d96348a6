"""plan: the pure function from spectra and one budget to a rank per module.

Modules that share one rank form a *cell*: a single module, a group, or what ``uniform`` ties together. Component j of a
cell is its members' j-th singular values; the components between two ranks that the cell may take form a *block*. All
blocks stand in one order, highest score first, and a plan is a prefix of it. With single modules and the score σ that
is the global rule of PARA (arXiv 2604.27796).
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from decimal import ROUND_CEILING, Context, Decimal
from fractions import Fraction
from functools import cached_property
from inspect import signature
from itertools import chain, zip_longest
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ParaError, shown
from .naming import module_type, natural_key
from .spectra import ModuleSpectrum, Spectra

DEFAULT_ENERGY = 0.95
_NUMBER = r"\d{1,40}(?:\.\d{0,40})?|\.\d{1,40}"
_LARGEST_WHOLE = 2**62
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class Infeasible(ParaError):
    """A budget that these singular values can't meet, while others, of modules of the same shapes, may."""


@dataclass(frozen=True)
class Component:
    """A component, or the first one of a block: ``sigma[index]`` of the cell that ``module`` is the first member of."""

    module: str
    index: int
    score: float


@dataclass(frozen=True)
class Plan:
    """The rank of every module, and what it is predicted to cost.

    Attributes:
        ranks: module name → rank, in the order of the spectra's modules; 0 drops the module.
        budget, value: the budget that was asked for, as a number (``size`` in bytes); None when there was only shaping.
        score: ``"sigma"`` or ``"density"``.
        shaping: the shaping arguments that differ from their defaults.
        threshold: score of the last block taken; None when ``rank`` was the budget or ``min_rank`` took all there is.
        smallest_kept, largest_dropped: of the blocks that the shaping allows; None when there is none.
        energy: Σσ² kept, as a fraction of the adapter's (1 when that is 0).
        error: predicted ‖ΔW − ΔW'‖_F over all modules, the root of the dropped Σσ².
        errors: the same per module.
        parameters_before, parameters_after: elements of every A and B as written, zero padding included.
        unshaped_energy, unshaped_parameters: what the same budget gives without shaping; None when nothing is shaped.
    """

    ranks: dict[str, int]
    budget: str | None
    value: float | int | None
    score: str
    shaping: dict[str, Any]
    threshold: float | None
    smallest_kept: Component | None
    largest_dropped: Component | None
    energy: float
    error: float
    errors: dict[str, float]
    parameters_before: int
    parameters_after: int
    unshaped_energy: float | None
    unshaped_parameters: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def plan(
    spectra: Spectra,
    *,
    energy: float | str | None = None,
    keep: float | str | None = None,
    params: int | None = None,
    size: int | str | None = None,
    total_rank: int | None = None,
    threshold: float | None = None,
    rank: int | None = None,
    sv_ratio: float | None = None,
    sv_cumulative: float | str | None = None,
    sv_fro: float | str | None = None,
    layer_energy: float | str | None = None,
    score: str = "auto",
    min_rank: int = 0,
    max_rank: int | None = None,
    multiple_of: int = 1,
    allowed_ranks: Iterable[int] | None = None,
    uniform: str | None = None,
) -> Plan:
    """Choose the ranks: the longest prefix of the order that fits the budget; for ``energy`` the shortest that does.

    The order: score descending, ties by natural order of the module's name, then index. What ``min_rank`` asks for
    comes first and is charged to the budget.

    Args:
        spectra: of the adapter.
        energy: fraction of Σσ² to reach, 0.95 or "95%". Without budget and shaping it is 0.95.
        keep: fraction of the adapter's LoRA parameters, 0.25 or "25%", read as the decimal it is written as.
        params: number of LoRA parameters.
        size: bytes of the written file, header and foreign tensors included; an int, "32MiB", "500kB".
        total_rank: number of rank-1 components in all.
        threshold: keep σ ≥ threshold.
        rank: every module keeps its own top min(rank, r, m, n).
        sv_ratio, sv_cumulative, sv_fro, layer_energy: the rules of other tools, each module by itself: the σ above
            σ₁/sv_ratio; the fewest with Σσ, √Σσ², or Σσ² at least this part of the module's own.
        score: "sigma", "density" (σ² per parameter), or "auto": density for energy, keep, params and size, where it
            takes the fewest parameters (docs/evidence.md compares the two); else sigma.
        min_rank: at least this rank, as far as a module has one.
        max_rank: at most this rank.
        multiple_of: ranks are multiples of this.
        allowed_ranks: ranks are among these, or 0.
        uniform: "all" gives every module one rank, "type" every module of one type; with ``allowed_ranks``, zeros fill
            a module up to the first of them that holds all it has.

    Raises:
        ParaError: for a budget that nothing fits, naming the smallest that something fits; for arguments out of range.
    """
    budgets = {
        "energy": energy, "keep": keep, "params": params, "size": size,
        "total_rank": total_rank, "threshold": threshold, "rank": rank, "sv_ratio": sv_ratio,
        "sv_cumulative": sv_cumulative, "sv_fro": sv_fro, "layer_energy": layer_energy,
    }  # fmt: skip
    shaping = _Shaping.checked(min_rank, max_rank, multiple_of, allowed_ranks, uniform)
    budget = _Budget.checked(budgets, shaping.given, score)

    order = _Order.of(spectra, shaping, budget)
    taken = _prefix(order, budget)
    _check_feasible(order, budget, taken)
    kept = _Outcome.of(spectra, order.ranks(taken))
    unshaped: _Outcome | None = None
    if shaping.given:
        free = _Order.of(spectra, _Shaping(), budget)
        unshaped = _Outcome.of(spectra, free.ranks(_prefix(free, budget)))

    scored = taken > order.mandatory and budget.name != "rank" and budget.name not in OWN_RULES
    return Plan(
        ranks=kept.ranks,
        budget=budget.name,
        value=float(budget.value) if isinstance(budget.value, Fraction) else budget.value,
        score=budget.score,
        shaping=shaping.given,
        threshold=order.score[taken - 1].item() if scored else None,
        smallest_kept=order.component(taken - 1 - order.score[:taken][::-1].argmin().item()) if taken else None,
        largest_dropped=order.component(taken + order.score[taken:].argmax().item()) if taken < len(order) else None,
        energy=kept.energy,
        error=kept.error,
        errors=kept.errors,
        parameters_before=spectra.parameters,
        parameters_after=kept.parameters,
        unshaped_energy=unshaped.energy if unshaped else None,
        unshaped_parameters=unshaped.parameters if unshaped else None,
    )


# Arguments


@dataclass(frozen=True)
class _Shaping:
    min_rank: int = 0
    max_rank: int | None = None
    multiple_of: int = 1
    allowed_ranks: tuple[int, ...] | None = None
    uniform: str | None = None

    @classmethod
    def checked(
        cls,
        min_rank: int,
        max_rank: int | None,
        multiple_of: int,
        allowed_ranks: Iterable[int] | None,
        uniform: str | None,
    ) -> _Shaping:
        if uniform is not None and (not isinstance(uniform, str) or uniform not in ("all", "type")):
            raise ParaError(f"uniform={shown(uniform)} is unknown: give 'all' or 'type', or leave it out")
        if allowed_ranks is not None:
            if isinstance(allowed_ranks, str) or not isinstance(allowed_ranks, Iterable):
                raise ParaError(
                    f"allowed_ranks={shown(allowed_ranks)} is not a list of ranks: give one like [4, 8, 16]"
                )
            allowed_ranks = tuple(sorted({_whole("allowed_ranks", k, 0) for k in allowed_ranks} - {0}))
            if not allowed_ranks:
                raise ParaError("allowed_ranks holds no rank above 0: give one like [4, 8, 16]")
        shaping = cls(
            _whole("min_rank", min_rank, 0),
            None if max_rank is None else _whole("max_rank", max_rank, 1),
            _whole("multiple_of", multiple_of, 1),
            allowed_ranks,
            uniform,
        )
        most = min(shaping.max_rank or math.inf, max(allowed_ranks or [math.inf]))
        if shaping.min_rank > most:
            raise ParaError(f"min_rank={min_rank} is above {most}, the largest rank that is allowed: lower min_rank")
        return shaping

    @property
    def given(self) -> dict[str, Any]:
        """The arguments that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @cached_property
    def by_one(self) -> bool:
        """Whether a cell may take every rank up to its largest: every block is one component."""
        return self.multiple_of == 1 and self.allowed_ranks is None

    @cached_property
    def allowed(self) -> list[int]:
        return [k for k in self.allowed_ranks or () if k % self.multiple_of == 0]

    def count(self, available: int) -> int:
        """How many ranks above 0 a cell with so many components may take."""
        most = available if self.max_rank is None else min(available, self.max_rank)
        return most // self.multiple_of if self.allowed_ranks is None else bisect_right(self.allowed, most)

    def first_above(self, available: int) -> int:
        """The first allowed rank that holds so many components; so many where none does."""
        return next((k for k in self.allowed if k >= available), available)

    def ranks(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ranks with these numbers, ascending from number 0."""
        if self.allowed_ranks is None:
            return (numbers + 1) * self.multiple_of
        return np.array(self.allowed, dtype=np.int64)[numbers]


@dataclass(frozen=True)
class _Budget:
    """A budget as a number (fractions exact), and the score that orders the blocks for it."""

    name: str | None
    value: Fraction | float | int | None
    score: str

    @classmethod
    def checked(cls, budgets: dict[str, Any], shaped: object, score: str) -> _Budget:
        given = [name for name, value in budgets.items() if value is not None]
        if len(given) > 1:
            raise ParaError(f"{' and '.join(given)} are given together: give one budget")
        if not isinstance(score, str) or (score != "auto" and score not in _SCORES):
            raise ParaError(f"score={shown(score)} is unknown: give 'auto', {' or '.join(map(repr, _SCORES))}")
        if not given and not shaped:
            given, budgets = ["energy"], {"energy": DEFAULT_ENERGY}
        name = given[0] if given else None
        if name == "threshold" and score != "auto":
            raise ParaError(f"score={shown(score)} is given with threshold, which is always on sigma: leave score out")
        if score == "auto":
            score = "density" if name in ("energy", "keep", "params", "size") else "sigma"
        return cls(name, _READERS[name](name, budgets[name]) if name else None, score)


def _whole(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= _LARGEST_WHOLE:
        raise ParaError(f"{name}={shown(value)} is out of range: give a whole number of at least {least}")
    return int(value)


def _fraction(name: str, value: Any) -> Fraction:
    """A fraction in (0, 1], exactly the decimal that the caller wrote."""
    text = "" if isinstance(value, int) and value > 1 else str(value)  # str of a huge int is an error
    match = re.fullmatch(rf"\s*((?:{_NUMBER})(?:e-?\d{{1,3}})?)\s*(%?)\s*", text.lower())
    fraction = Fraction(match[1]) / (100 if match[2] else 1) if match else Fraction(0)
    if not 0 < fraction <= 1:
        raise ParaError(
            f"{name}={shown(value)} is out of range: give a fraction above 0 and up to 1, like 0.25 or '25%'"
        )
    return fraction


def _bytes(name: str, value: Any) -> int:
    if not isinstance(value, str):
        return _whole(name, value)
    match = re.fullmatch(rf"\s*({_NUMBER})\s*([a-z]*)\s*", value.lower())
    if not match or match[2] not in _UNITS:
        raise ParaError(
            f"{name}={shown(value)} is not a size: give bytes, or a number and a unit, like '32MiB' or '500kB'"
        )
    return _whole(name, math.floor(Fraction(match[1]) * _UNITS[match[2]]))


def _ratio(name: str, value: Any) -> float:
    ratio = _sigma(name, value)
    if ratio <= 1:
        raise ParaError(f"{name}={shown(value)} is out of range: give a number above 1, like 10 for all above σ₁/10")
    return ratio


def _sigma(name: str, value: Any) -> float:
    try:
        sigma = float(value)
    except (TypeError, ValueError, OverflowError):
        sigma = math.nan
    if isinstance(value, bool) or not 0 <= sigma < math.inf:
        raise ParaError(f"{name}={shown(value)} is out of range: give a singular value, a number of at least 0")
    return sigma


_READERS: dict[str, Callable[[str, Any], Fraction | float | int]] = {
    "energy": _fraction,
    "keep": _fraction,
    "params": _whole,
    "size": _bytes,
    "total_rank": _whole,
    "threshold": _sigma,
    "rank": _whole,
    "sv_ratio": _ratio,
    "sv_cumulative": _fraction,
    "sv_fro": _fraction,
    "layer_energy": _fraction,
}


BUDGETS = frozenset(_READERS)
"""Names of all budgets."""


def check_arguments(names: Iterable[str]) -> None:
    """Refuse what :func:`plan` doesn't take, by the name that may have been meant."""
    known = signature(plan).parameters.keys() - {"spectra"}
    for name in names:
        if name not in known:
            from difflib import get_close_matches

            meant = get_close_matches(name, known, 1, cutoff=0.8)
            remedy = f"did you mean {meant[0]}=?" if meant else "a budget is given like keep=0.25"
            raise ParaError(f"'{name}' is no argument here: {remedy}")


# Rules of other tools, each module by itself


def _count(sigma: NDArray[np.float64], power: int, part: float) -> int:
    """The fewest σ whose powers' sum is at least this part of all; 0 where all are 0."""
    sums = np.cumsum(sigma**power)
    return int(np.searchsorted(sums, part * sums[-1])) + 1 if sums[-1] > 0 else 0


OWN_RULES: dict[str, Callable[[NDArray[np.float64], float], int]] = {
    "sv_ratio": lambda sigma, ratio: int(np.count_nonzero(sigma > sigma[0] / ratio)),
    "sv_cumulative": lambda sigma, part: _count(sigma, 1, part),
    "sv_fro": lambda sigma, part: _count(sigma, 2, part * part),
    "layer_energy": lambda sigma, part: _count(sigma, 2, part),
}
"""How many components a module keeps: of its σ, descending, and the budget's value."""


# The order


@dataclass(frozen=True)
class _Cell:
    """Modules that share one rank, in natural order; a unit of rank costs all of them ``width`` parameters."""

    members: tuple[ModuleSpectrum, ...]

    @property
    def name(self) -> str:
        return self.members[0].name

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def width(self) -> int:
        return sum([m.m + m.n for m in self.members])

    def components(self, columns: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """Σσ² of each component; a member with fewer components than another counts as zero there."""
        if self.size == 1:
            return columns[self.name]
        rows = zip_longest(*(columns[m.name].tolist() for m in self.members), fillvalue=0.0)
        return np.array([math.fsum(row) for row in rows])


@dataclass(frozen=True)
class _Blocks:
    """Blocks as columns, [blocks] each: 50,000 objects would cost more than the sorting.

    Attributes:
        cell: which cell each is of.
        start, rank: it holds the cell's components ``start`` to ``rank - 1``.
        gain: its Σσ².
        sigma: where it is one component of one module, its σ.
        size, width: of its cell.
    """

    cell: NDArray[np.int64]
    start: NDArray[np.int64]
    rank: NDArray[np.int64]
    gain: NDArray[np.float64]
    sigma: NDArray[np.float64]
    size: NDArray[np.int64]
    width: NDArray[np.int64]

    @classmethod
    def of(cls, cells: Sequence[_Cell], spectra: Spectra, shaping: _Shaping) -> _Blocks:
        """All blocks that the shaping allows, cell after cell, by rank.

        Raises:
            ParaError: a cell may take no rank at all.
        """
        components = [cell.components(spectra.squares) for cell in cells]
        sigmas = [spectra.columns[c.name] if c.size == 1 else g for c, g in zip(cells, components, strict=True)]
        if shaping.uniform is not None and shaping.allowed_ranks is not None:
            # Readers that want one of these ranks are given zeros: up to the first that holds everything.
            zeros = [shaping.first_above(len(gains)) - len(gains) for gains in components]
            components, sigmas = (
                [np.pad(values, (0, more)) for values, more in zip(columns, zeros, strict=True)]
                for columns in (components, sigmas)
            )
        available = [len(gains) for gains in components]
        counts = [shaping.count(n) for n in available]
        for tied, count, n in zip(cells, counts, available, strict=True):
            if not count:
                raise ParaError(
                    f"module '{tied.name}' can take no rank from 1 to {n}, all it has: "
                    "change multiple_of, allowed_ranks=[1,2,4,8] or max_rank so that one of these is allowed"
                )
        cell = np.repeat(np.arange(len(cells)), counts)
        number = _positions(counts)
        rank = shaping.ranks(number)
        start = np.where(number > 0, np.roll(rank, 1), 0)
        first = _starts(available)[cell] + start
        flat = _joined(components)
        sigma = _joined(sigmas)
        if shaping.by_one:
            gain = flat[first]
        else:
            low, high = first.tolist(), (first + rank - start).tolist()
            gain = np.array([math.fsum(flat[i:j].tolist()) for i, j in zip(low, high, strict=True)])
        size, width = np.array([(c.size, c.width) for c in cells], dtype=np.int64).reshape(-1, 2)[cell].T
        return cls(cell, start, rank, gain, sigma[first], size, width)

    def __getitem__(self, order: NDArray[np.int64]) -> _Blocks:
        return _Blocks(*(getattr(self, f.name)[order] for f in fields(self)))

    @property
    def height(self) -> NDArray[np.int64]:
        return self.rank - self.start


def _score_sigma(blocks: _Blocks) -> NDArray[np.float64]:
    """Root mean square of each block's σ; for one component of one module σ itself, without a round trip."""
    count = blocks.size * blocks.height
    return np.where(count == 1, blocks.sigma, np.sqrt(blocks.gain / count))


def _score_density(blocks: _Blocks) -> NDArray[np.float64]:
    """Σσ² per parameter of each block."""
    score: NDArray[np.float64] = blocks.gain / (blocks.width * blocks.height)
    return score


_SCORES = {"sigma": _score_sigma, "density": _score_density}


@dataclass(frozen=True)
class _Order:
    """All blocks in the order in which they are taken.

    Attributes:
        cells: in natural order.
        mandatory: how many blocks at the front are what ``min_rank`` asks for.
        blocks, score: [blocks] in order.
    """

    spectra: Spectra
    cells: list[_Cell]
    mandatory: int
    blocks: _Blocks
    score: NDArray[np.float64]

    @classmethod
    def of(cls, spectra: Spectra, shaping: _Shaping, budget: _Budget) -> _Order:
        cells = _cells(spectra.modules, shaping.uniform)
        blocks = _Blocks.of(cells, spectra, shaping)
        score = _SCORES[budget.score](blocks)
        if not shaping.by_one:
            # A block's mean can round above that of the block before it; within a cell the order is fixed.
            for mine in np.split(score, np.flatnonzero(blocks.start == 0)[1:]):
                np.minimum.accumulate(mine, out=mine)
        least = [max([shaping.min_rank, *[m.min_rank for m in cell.members]]) for cell in cells]
        forced = blocks.start < np.array(least, dtype=np.int64)[blocks.cell]
        # Blocks stand in natural order here, and sorting is stable, so that is how ties end.
        key: NDArray[Any]
        if budget.name in OWN_RULES:
            key = blocks.rank > _own_ranks(cells, spectra, budget)[blocks.cell]
        else:
            key = blocks.rank if budget.name == "rank" else -score
        order = np.lexsort((key, ~forced)) if forced.any() else np.argsort(key, kind="stable")
        mandatory = int(forced.sum())
        order[:mandatory].sort()
        return cls(spectra, cells, mandatory, blocks[order], score[order])

    def __len__(self) -> int:
        return len(self.score)

    @cached_property
    def homes(self) -> list[int]:
        """The cell of every module, in the order of the spectra."""
        home = {m.name: i for i, cell in enumerate(self.cells) for m in cell.members}
        return [home[m.name] for m in self.spectra.modules]

    def ranks(self, taken: int) -> dict[str, int]:
        """Ranks of all modules when the first ``taken`` blocks are kept."""
        reached = np.zeros(len(self.cells), dtype=np.int64)
        np.maximum.at(reached, self.blocks.cell[:taken], self.blocks.rank[:taken])
        return dict(zip(self.spectra.squares, reached[self.homes].tolist(), strict=True))

    def component(self, block: int) -> Component:
        cell, start = self.blocks.cell[block].item(), self.blocks.start[block].item()
        return Component(self.cells[cell].name, start, self.score[block].item())

    def energy(self, taken: int) -> Fraction:
        """Σσ² of the first ``taken`` blocks, correctly rounded."""
        return Fraction(_kept(self.spectra, self.ranks(taken)))


def _own_ranks(cells: Sequence[_Cell], spectra: Spectra, budget: _Budget) -> NDArray[np.int64]:
    """[cells] the rank that each keeps by a rule of :data:`OWN_RULES`; of several modules, by their σ together."""
    rule, value = OWN_RULES[str(budget.name)], float(budget.value or 0)
    sigmas = (spectra.columns[c.name] if c.size == 1 else np.sqrt(c.components(spectra.squares)) for c in cells)
    return np.array([rule(sigma, value) for sigma in sigmas], dtype=np.int64)


def _positions(counts: Sequence[int]) -> NDArray[np.int64]:
    """0 … count − 1 for every count, one after the other."""
    return np.arange(sum(counts)) - np.repeat(_starts(counts), counts)


def _starts(counts: Sequence[int]) -> NDArray[np.int64]:
    """How many come before each."""
    ends = np.cumsum(counts, dtype=np.int64)
    return ends - np.array(counts, dtype=np.int64)


def _joined(arrays: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate(arrays) if arrays else np.zeros(0)


def _cells(modules: Sequence[ModuleSpectrum], uniform: str | None) -> list[_Cell]:
    """Cells in natural order: groups and what ``uniform`` ties, merged where they overlap."""
    parent: dict[object, object] = {}

    def root(node: object) -> object:
        while (above := parent.get(node, node)) != node:
            node = above
        return node

    def node_of(module: ModuleSpectrum) -> object:
        return ("module", module.name) if module.group is None else ("group", module.group)

    if uniform is not None:
        for module in modules:
            tie = root(("type", module_type(module.name) if uniform == "type" else None))
            if (node := root(node_of(module))) != tie:
                parent[node] = tie
    cells: defaultdict[object, list[ModuleSpectrum]] = defaultdict(list)
    in_order = sorted(modules, key=lambda m: natural_key(m.name))
    if uniform is None and all(m.group is None for m in modules):
        return [_Cell((module,)) for module in in_order]
    for module in in_order:
        cells[root(node_of(module))].append(module)
    return [_Cell(tuple(members)) for members in cells.values()]


# The prefix


def _prefix(order: _Order, budget: _Budget) -> int:
    """How many blocks the budget takes; all of them when ``energy`` is out of reach."""
    limit = budget.value
    if limit is None:
        return len(order)
    if budget.name == "energy":
        target = limit * Fraction(order.spectra.energy)
        # Sums in fp64 leave few prefixes in doubt; those are summed exactly.
        sums = np.concatenate([[0.0], order.blocks.gain.cumsum()])
        doubt = len(order) * 2.0**-52 * order.spectra.energy + 2.0**-1070  # so that it isn't 0 among the smallest
        low, high = np.searchsorted(sums, [float(target) - doubt, float(target) + doubt]).tolist()
        prefixes = range(max(order.mandatory, low), max(order.mandatory, min(high, len(order))))
        return prefixes.start + bisect_left(prefixes, True, key=lambda taken: order.energy(taken) >= target)
    if budget.name in OWN_RULES:
        own = _own_ranks(order.cells, order.spectra, budget)[order.blocks.cell]
        return order.mandatory + int(np.count_nonzero((order.blocks.rank <= own)[order.mandatory :]))
    if budget.name == "size":
        return bisect_right(range(len(order)), limit, key=lambda i: _bytes_of(order, i + 1))
    if budget.name == "keep":
        limit = math.floor(limit * order.spectra.parameters)
    elif budget.name == "threshold":
        limit = -limit
    return bisect_right(_costs(order, budget.name), limit)


def _bytes_of(order: _Order, taken: int) -> int:
    layout = order.spectra.layout
    if layout is None:
        raise ParaError(
            "size is given, but no safetensors file is written whose size would be known: give params or keep"
        )
    return layout.bytes(order.ranks(taken))


def _costs(order: _Order, budget: str | None) -> NDArray[Any]:
    """[blocks] what the prefix that ends with each block costs, in the budget's unit; they never fall."""
    blocks = order.blocks
    if budget == "threshold":
        free = np.arange(len(order)) < order.mandatory
        return np.where(free, -np.inf, -order.score)
    if budget == "rank":
        return np.maximum.accumulate(blocks.rank)
    return _prices(blocks, budget).cumsum()


def _prices(blocks: _Blocks, budget: str | None) -> NDArray[Any]:
    """[blocks] what each costs: parameters, or for ``total_rank`` components."""
    price = blocks.size if budget == "total_rank" else blocks.width
    # In Python's integers where those of the machine might not do.
    exact = np.multiply(price, blocks.height, dtype=np.float64).sum() < 2.0**62
    return price.astype(np.int64 if exact else object) * blocks.height


def _check_feasible(order: _Order, budget: _Budget, taken: int) -> None:
    """Refuse a budget that not even the mandatory blocks fit, or without any the first; or an energy out of reach."""
    if budget.value is None:
        return
    name, value = budget.name, budget.value
    asked = f"{name}={float(value) if isinstance(value, Fraction) else value}"
    if name == "energy":
        kept, total = order.energy(taken), Fraction(order.spectra.energy)
        if kept < value * total:
            most = float(kept / total)
            while Fraction(str(most)) * total > kept:
                most = math.nextafter(most, 0)
            raise Infeasible(f"{asked} is more than the shaping allows: loosen it or ask for at most energy={most}")
        return
    least = max(order.mandatory, min(1, len(order)))
    if taken >= least:
        return
    if name in OWN_RULES:
        raise Infeasible(f"{asked} leaves no module a rank that the shaping allows: loosen the shaping or the rule")
    need = _bytes_of(order, least) if name == "size" else np.asarray(_costs(order, name)[least - 1]).item()
    if name == "threshold":
        raise Infeasible(f"{asked} is above every score, so nothing is kept: the largest feasible is threshold={-need}")
    smallest = str(need)
    if name == "keep":
        share = Context(prec=6, rounding=ROUND_CEILING).divide(Decimal(need), Decimal(order.spectra.parameters))
        if share > 1:
            raise ParaError(
                f"{asked} is too small, and so is any keep, because zero padding needs more parameters than "
                f"there are: give params={need} or loosen the shaping"
            )
        smallest = f"{share.normalize():f}"
    refusal = ParaError
    if name in ("keep", "params", "total_rank") and not order.mandatory:
        # It is up to the values which block comes first: another one may fit.
        cheapest = _prices(order.blocks, name)[order.blocks.start == 0].min()
        if cheapest <= (value * order.spectra.parameters if name == "keep" else value):
            refusal = Infeasible
    raise refusal(f"{asked} is too small for this adapter and shaping: the smallest feasible is {name}={smallest}")


@dataclass(frozen=True)
class _Outcome:
    """What ranks keep and cost, predicted from the spectra."""

    ranks: dict[str, int]
    energy: float
    error: float
    errors: dict[str, float]
    parameters: int

    @classmethod
    def of(cls, spectra: Spectra, ranks: dict[str, int]) -> _Outcome:
        dropped = {name: squares[ranks[name] :].tolist() for name, squares in spectra.squares.items()}
        return cls(
            ranks,
            _kept(spectra, ranks) / spectra.energy if spectra.energy else 1.0,
            math.sqrt(math.fsum(chain.from_iterable(dropped.values()))),
            {name: math.sqrt(math.fsum(squares)) for name, squares in dropped.items()},
            sum(ranks[m.name] * (m.m + m.n) for m in spectra.modules),
        )


def _kept(spectra: Spectra, ranks: Mapping[str, int]) -> float:
    """Σσ² that these ranks keep, correctly rounded."""
    return math.fsum(chain.from_iterable(squares[: ranks[name]].tolist() for name, squares in spectra.squares.items()))
