"""The rules of other tools, each module by itself: against their definitions, written out one module at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from para_ext.errors import ParaError
from para_ext.spectra import ModuleSpectrum, Spectra

spectra_strategy = st.lists(
    st.lists(st.floats(1e-3, 10), min_size=1, max_size=8).map(lambda s: tuple(sorted(s, reverse=True))),
    min_size=1,
    max_size=5,
).map(lambda rows: Spectra(tuple(ModuleSpectrum(f"m{i}", 16, 12, len(s), s) for i, s in enumerate(rows))))


def fewest(sigma: tuple[float, ...], power: int, part: float) -> int:
    """The smallest k whose first σ^power sum to at least this part of all; one more or less where rounding decides."""
    whole = math.fsum(s**power for s in sigma)
    return next(
        k for k in range(1, len(sigma) + 1) if math.fsum(s**power for s in sigma[:k]) >= part * whole * (1 - 1e-12)
    )


DEFINITIONS: dict[str, Any] = {
    "sv_ratio": lambda sigma, x: sum(s > sigma[0] / x for s in sigma),
    "sv_cumulative": lambda sigma, x: fewest(sigma, 1, x),
    "sv_fro": lambda sigma, x: fewest(sigma, 2, x * x),
    "layer_energy": lambda sigma, x: fewest(sigma, 2, x),
}


@settings(deadline=None)
@given(spectra_strategy, st.sampled_from(sorted(DEFINITIONS)), st.floats(0.05, 0.99))
def test_each_module_keeps_what_the_rule_says(spectra: Spectra, rule: str, value: float) -> None:
    value = 1 / value if rule == "sv_ratio" else value
    plan = spectra.plan(**{rule: value})
    assert plan.ranks == {m.name: DEFINITIONS[rule](m.sigma, value) for m in spectra.modules}
    assert plan.threshold is None


@settings(deadline=None)
@given(spectra_strategy, st.floats(0.05, 0.99), st.integers(1, 4))
def test_max_rank_caps_it(spectra: Spectra, value: float, cap: int) -> None:
    free, capped = spectra.plan(layer_energy=value), spectra.plan(layer_energy=value, max_rank=cap)
    assert capped.ranks == {name: min(rank, cap) for name, rank in free.ranks.items()}


def test_names_that_look_alike_differ() -> None:
    """kohya's sv_fro of 0.9 is an energy of 0.81, PEFT's 0.9 one of 0.9; a zero module keeps nothing."""
    module = ModuleSpectrum("a", 9, 9, 4, (3.0, 1.0, 0.9, 0.1))
    spectra = Spectra((module, ModuleSpectrum("b", 9, 9, 2, (0.0, 0.0))))
    assert spectra.plan(sv_fro=0.9).ranks == {"a": 1, "b": 0}
    assert spectra.plan(layer_energy=0.9).ranks == {"a": 2, "b": 0}
    assert spectra.plan(layer_energy="81%").ranks == spectra.plan(sv_fro=0.9).ranks
    assert spectra.plan(layer_energy=0.9, min_rank=1).ranks == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sv_ratio": 1.0}, "a number above 1"),
        ({"sv_ratio": "x"}, "out of range"),
        ({"sv_fro": 1.5}, "out of range"),
        ({"layer_energy": 0.9, "keep": 0.5}, "given together"),
        ({"layer_energy": 0.1, "allowed_ranks": [2]}, "leaves no module a rank"),
    ],
)
def test_refusals(arguments: dict[str, Any], words: str) -> None:
    spectra = Spectra((ModuleSpectrum("a", 9, 9, 4, (3.0, 1.0, 0.9, 0.1)),))
    with pytest.raises(ParaError, match=words):
        spectra.plan(**arguments)
