"""Charts: what the page and the plots draw: plans over many budgets, and where modules stand in a map of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from .automatic import automatic
from .errors import ParaError
from .naming import natural_key, place
from .plan import DEFAULT_ENERGY, Plan
from .spectra import Spectra

_STEPS = ((1, 6, 0.5), (6, 30, 1), (30, 50, 2), (50, 101, 5))  # finer where adapters lose most
KEEPS = tuple(sorted({6.25, 12.5, *(k for step in _STEPS for k in np.arange(*step).tolist())}))
"""Parts of the parameters, in percent."""

DEFAULT = f"--energy {DEFAULT_ENERGY:g}"
"""What ``compress`` does without any option."""

_UNIFORM = 32  # so many points draw a curve as well as all ranks do


@dataclass(frozen=True)
class Choice:
    """A plan, and the options of ``compress`` that give it; ``name`` where it is a budget of its own kind."""

    option: str
    plan: Plan
    name: str = ""


def choices(spectra: Spectra, **shaping: object) -> list[Choice]:
    """A plan for each of KEEPS that something fits, for the default budget and for the knee, by parameters."""
    if not spectra.modules:
        raise ParaError("there are no modules to show: give an adapter with LoRA layers")
    budgets: list[tuple[str, str, dict[str, object]]] = [(f"--keep {k:g}%", "", {"keep": f"{k:g}%"}) for k in KEEPS]
    budgets.append((DEFAULT, f"{DEFAULT_ENERGY:.0%} of the energy", {"energy": DEFAULT_ENERGY}))
    if spectra.energy:
        budgets.append(("--auto knee", "Knee", automatic("knee", spectra)[0]))
    found = []
    for option, name, budget in budgets:
        with suppress(ParaError):  # too small for this adapter and shaping
            found.append(Choice(option, spectra.plan(**budget, **shaping), name))
    return sorted(found, key=lambda choice: (choice.plan.parameters_after, choice.plan.energy))


def uniform(spectra: Spectra) -> list[Plan]:
    """What one rank for all would keep, from rank 1 to the adapter's."""
    most = max(module.rank for module in spectra.modules)
    ranks = sorted({int(r) for r in np.linspace(1, most, min(most, _UNIFORM)).round()})
    return [spectra.plan(rank=rank) for rank in ranks]


@dataclass(frozen=True)
class RankMap:
    """Layers × kinds of modules, each module in a cell of its own.

    Attributes:
        layers, kinds: the headings, in natural order; ``labels`` are short forms of the layers.
        cells: per module, the indices of its layer and kind.
    """

    layers: tuple[str, ...]
    labels: tuple[str, ...]
    kinds: tuple[str, ...]
    cells: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> RankMap:
        """The map of modules with these names."""
        places = [place(name) for name in names]
        layers, kinds = ({p[axis]: None for p in places} for axis in (0, 1))
        columns = {layer: i for i, layer in enumerate(sorted(layers, key=natural_key))}
        rows = {kind: i for i, kind in enumerate(kinds)}  # q, k, v, … as the adapter has them
        return cls(
            tuple(columns), tuple(_short(list(columns))), tuple(rows), tuple((columns[c], rows[r]) for c, r in places)
        )


def _short(layers: list[str]) -> list[str]:
    """Layers without what all have in common: the first word that remains, and the numbers."""
    parts = [layer.replace("_", ".").split(".") for layer in layers]
    common = sum(1 for _ in takewhile(lambda heads: len(set(heads)) == 1, zip(*(p[:-1] for p in parts), strict=False)))
    labels = []
    for rest in (p[common:] for p in parts):
        words, numbers = [p for p in rest if not p.isdecimal()], [p for p in rest if p.isdecimal()]
        labels.append(" ".join(filter(None, [*words[:1], ".".join(numbers)])))
    return labels
