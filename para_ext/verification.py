"""Verification: how far two adapters of the same base are apart, measured module by module on the tensors as stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .arrays import as_tensor
from .errors import ParaError
from .factors import LoraFactors, total_parameters
from .naming import module_type
from .pool import map_single_threaded
from .progress import Meter, Progress
from .report import at_most, percent, relative_error


@dataclass(frozen=True)
class ModuleVerification:
    """One module of both adapters; a rank of 0 where one of them lacks it.

    Attributes:
        norm: ‖ΔW‖_F of the original.
        error: upper bound of ‖ΔW − ΔW'‖_F, from QR factorizations in fp64 (see ``certificate.difference``).
    """

    name: str
    type: str
    rank_before: int
    rank_after: int
    norm: float
    error: float

    @property
    def energy(self) -> float:
        """1 − error²/norm², at least 0: a lower bound of the energy kept when ΔW' approximates ΔW best."""
        return _energy([self])


@dataclass(frozen=True, repr=False)
class Verification:
    """Errors per module, and in all."""

    modules: tuple[ModuleVerification, ...]
    parameters_before: int
    parameters_after: int

    @property
    def norm(self) -> float:
        return math.sqrt(math.fsum(m.norm * m.norm for m in self.modules))

    @property
    def error(self) -> float:
        """Upper bound of ‖ΔW − ΔW'‖_F over all modules."""
        return math.sqrt(math.fsum(m.error * m.error for m in self.modules))

    @property
    def energy(self) -> float:
        return _energy(self.modules)

    @property
    def relative_error(self) -> float:
        """``error / norm``; see :func:`para_ext.report.relative_error`."""
        return relative_error(self.modules)

    def __repr__(self) -> str:
        return f"<Verification: {self.summary()}>"

    def summary(self) -> str:
        """One line: modules, parameters, energy kept, relative error."""
        return (
            f"{len(self.modules)} modules, {self.parameters_before:,} → {self.parameters_after:,} parameters, "
            f"energy kept ≥ {percent(self.energy)}, error ≤ {at_most(self.relative_error)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "norm": self.norm,
            "error": self.error,
            "relative_error": self.relative_error,
            "energy": self.energy,
            "modules": [{**asdict(m), "energy": m.energy} for m in self.modules],
        }


def compare(
    original: Sequence[LoraFactors], other: Sequence[LoraFactors], threads: int, progress: Progress | None = None
) -> Verification:
    """Measure ‖ΔW − ΔW'‖_F of every module that either adapter has.

    Raises:
        ParaError: naming the module whose shape differs, or which holds a NaN or an infinity.
    """
    from .certificate import difference_and_norm

    left, right = {f.name: f for f in original}, {f.name: f for f in other}
    if left and right and not left.keys() & right.keys():
        raise ParaError("the two adapters have no module in common; compare adapters of the same base model")

    def measure(name: str) -> ModuleVerification:
        f, g = left.get(name), right.get(name)
        known = f or g
        assert known is not None
        if f and g and (f.m, f.n) != (g.m, g.n):
            raise ParaError(
                f"module '{name}' is {f.m}×{f.n} in one adapter and {g.m}×{g.n} in the other; "
                "compare adapters of the same base model"
            )
        f = f or _nothing(known)
        g = g or _nothing(known)
        # The second scale is folded exactly: ‖sBA − tB'A'‖ = |t|·‖(s/t)BA − B'A'‖ only where t ≠ 0, so use fp64 B'.
        B2 = g.B if g.scale == 1 else as_tensor(g.B).double() * g.scale
        error, norm = difference_and_norm(f.B, f.A, f.scale, B2, g.A)
        if not math.isfinite(error):
            raise ParaError(f"module '{name}' holds a NaN or an infinity; write it again with dtype='fp32'")
        return ModuleVerification(name, module_type(name), f.rank, g.rank, norm, error)

    names = [*left, *(name for name in right if name not in left)]
    meter = Meter(progress, f"measuring {len(names)} modules", sum(f.bytes for f in left.values()))

    def measured(name: str) -> None:
        meter.add(left[name].bytes if name in left else 0)

    modules = tuple(map_single_threaded(measure, names, threads, measured))
    return Verification(modules, total_parameters(original), total_parameters(other))


def _nothing(f: LoraFactors) -> LoraFactors:
    return LoraFactors(f.name, f.B[:, :0], f.A[:0])


def _energy(modules: Sequence[ModuleVerification]) -> float:
    return max(0.0, 1 - relative_error(modules) ** 2)
