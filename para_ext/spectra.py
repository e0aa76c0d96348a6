"""Spectra: what planning needs to know of an adapter, numbers only, so that it can be saved and asked what-if."""

from __future__ import annotations

import json
import math
import operator
import os
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import ParaError
from .layout import LARGEST, FileLayout, checked
from .whole_file import write_text

if TYPE_CHECKING:
    from .plan import Plan

_FORMAT = "para_ext spectra"
_VERSION = 1
_LARGEST_SIGMA = 1e150  # squares, and their sum over an adapter, stay finite


@dataclass(frozen=True)
class ModuleSpectrum:
    """The singular values of one module's update ``ΔW = scale · B @ A``, of shape [m, n].

    Attributes:
        name: the module's name, unique within an adapter.
        m, n: the rows and columns of ΔW.
        rank: r as written in the source; it may exceed min(m, n).
        sigma: [min(r, m, n)] singular values, descending, from 0 to 1e150; squares too small for a double count as 0.
        group: modules of one group share one rank.
        min_rank: a rank below which this module must not go.
    """

    name: str
    m: int
    n: int
    rank: int
    sigma: tuple[float, ...]
    group: str | None = None
    min_rank: int = 0

    def __post_init__(self) -> None:
        for field, value in (("m", self.m), ("n", self.n), ("rank", self.rank)):
            if not 1 <= value <= LARGEST:
                raise ParaError(f"module '{self.name}': {field} is {value}, but must lie between 1 and {LARGEST}")
        if not 0 <= self.min_rank <= LARGEST:
            raise ParaError(f"module '{self.name}': min_rank is {self.min_rank}, but must lie between 0 and {LARGEST}")
        if len(self.sigma) != min(self.rank, self.m, self.n):
            raise ParaError(
                f"module '{self.name}': sigma has {len(self.sigma)} values, but must have "
                f"min(rank, m, n) = {min(self.rank, self.m, self.n)}"
            )
        # Every comparison with a NaN is false, so these refuse it too.
        descends = all(map(operator.ge, self.sigma, self.sigma[1:]))
        if not (descends and self.sigma[0] <= _LARGEST_SIGMA and self.sigma[-1] >= 0):
            raise ParaError(
                f"module '{self.name}': sigma must descend from at most {_LARGEST_SIGMA:g} to at least 0; "
                "scale the factors into that range"
            )


@dataclass(frozen=True)
class Spectra:
    """The spectra of all modules of an adapter; with the layout of its file, where there is one.

    Attributes:
        modules: in the adapter's order; names are unique.
        layout: what ``size`` budgets need; None for live models and lists of factors.
    """

    modules: tuple[ModuleSpectrum, ...]
    layout: FileLayout | None = None

    def __post_init__(self) -> None:
        names: set[str] = set()
        for module in self.modules:
            if module.name in names:
                raise ParaError(f"module '{module.name}' is given twice: give each module one spectrum")
            names.add(module.name)
        for slot in self.layout.slots if self.layout else ():
            if slot.module is not None and slot.module not in names:
                raise ParaError(f"tensor '{slot.key}' belongs to module '{slot.module}', which has no spectrum: add it")

    @property
    def parameters(self) -> int:
        """Elements of every A and B as they are written in the source."""
        return sum(module.rank * (module.m + module.n) for module in self.modules)

    @cached_property
    def columns(self) -> dict[str, NDArray[np.float64]]:
        """σ of every module, by name, in the order of the modules."""
        values = np.fromiter(chain.from_iterable(module.sigma for module in self.modules), np.float64)
        ends = accumulate(len(module.sigma) for module in self.modules)
        return {m.name: values[end - len(m.sigma) : end] for m, end in zip(self.modules, ends, strict=True)}

    @cached_property
    def squares(self) -> dict[str, NDArray[np.float64]]:
        """σ² of every module, by name: what each component adds to ‖ΔW‖_F²."""
        return {name: sigma * sigma for name, sigma in self.columns.items()}

    @cached_property
    def energy(self) -> float:
        """Σσ² over all modules, ‖ΔW‖_F² of the adapter, correctly rounded."""
        return math.fsum(chain.from_iterable(squares.tolist() for squares in self.squares.values()))

    def plan(self, **kwargs: Any) -> Plan:
        """Ranks for one budget; the arguments are those of :func:`para_ext.plan.plan`.

        Raises:
            ParaError: for arguments that it does not take, and as it does.
        """
        from .plan import check_arguments, plan  # plan.py imports this module

        check_arguments(kwargs)
        return plan(self, **kwargs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the spectra as JSON; the file is there whole or not at all.

        Raises:
            ParaError: when the file cannot be written.
        """
        record = {
            "format": _FORMAT,
            "version": _VERSION,
            "modules": [{**vars(module), "sigma": list(map(float, module.sigma))} for module in self.modules],
            "layout": self.layout.to_dict() if self.layout else None,
        }
        write_text(Path(path), json.dumps(record))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Spectra:
        """Read what :meth:`save` wrote.

        Raises:
            ParaError: naming the file and the first field that is not as :meth:`save` writes it.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ParaError(
                f"'{path}' cannot be read, {error.strerror}: give a file that inspect or save wrote"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ParaError(f"'{path}' is not JSON: give a file that Spectra.save wrote") from error
        try:
            return cls._from_dict(record)
        except ParaError as error:
            raise ParaError(
                f"'{path}' is not as this version of Spectra.save writes, save it again: {error}"
            ) from error

    @classmethod
    def _from_dict(cls, record: object) -> Spectra:
        for field, wanted in (("format", _FORMAT), ("version", _VERSION)):
            if (found := checked(record, field, type(wanted))) != wanted:
                raise ParaError(f"the field '{field}' is {found!r:.60}, not {wanted!r}")
        modules = []
        for i, item in enumerate(checked(record, "modules", list)):
            sigma = checked(item, "sigma", list)
            if not all(type(s) is float for s in sigma):
                raise ParaError(f"modules[{i}] has the field 'sigma' with a value that is not a float")
            modules.append(
                ModuleSpectrum(
                    name=checked(item, "name", str),
                    m=checked(item, "m", int),
                    n=checked(item, "n", int),
                    rank=checked(item, "rank", int),
                    sigma=tuple(sigma),
                    group=checked(item, "group", str, None),
                    min_rank=checked(item, "min_rank", int),
                )
            )
        layout = checked(record, "layout", dict, None)
        return cls(tuple(modules), None if layout is None else FileLayout.from_dict(layout))
