"""plan and Spectra against brute force: what is taken, what is refused, what survives a file."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from para_ext.errors import ParaError
from para_ext.layout import FileLayout, Slot
from para_ext.naming import module_type, natural_key
from para_ext.plan import Plan
from para_ext.spectra import ModuleSpectrum, Spectra

deterministic = settings(derandomize=True, deadline=None, database=None, max_examples=120)


def module(name: str, *sigma: float, m: int = 8, n: int = 8, rank: int | None = None, **more: Any) -> ModuleSpectrum:
    return ModuleSpectrum(name, m, n, rank or len(sigma), tuple(map(float, sigma)), **more)


def spectra_of(*modules: ModuleSpectrum) -> Spectra:
    return Spectra(modules)


def layout_for(modules: Iterable[ModuleSpectrum]) -> FileLayout:
    slots = [Slot("classifier.weight", "F32", (3, 7))]
    for s in modules:
        slots.append(Slot(f"{s.name}.lora_A.weight", "F32", (1, s.n), 0, s.name))
        slots.append(Slot(f"{s.name}.lora_B.weight", "BF16", (s.m, 1), 1, s.name))
    return FileLayout(tuple(slots), {"format": "pt"})


# Few distinct values, so that ties and zeros are common; a continuum for the rest.
sigmas = st.sampled_from([0.0, 0.5, 1.0, 1.0, 1.9213528321559221, 2.0, 3.0]) | st.floats(1e-6, 1e6)


@st.composite
def spectra_strategy(draw: st.DrawFn, *, groups: bool = True, required: bool = True, most: int = 6) -> Spectra:
    modules = []
    for i in draw(st.lists(st.integers(0, 12), unique=True, min_size=1, max_size=most)):
        m, n, rank = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 8))
        count = min(m, n, rank)
        sigma = sorted(draw(st.lists(sigmas, min_size=count, max_size=count)), reverse=True)
        name = f"layers.{i}.{draw(st.sampled_from(['q_proj', 'up_proj']))}"
        group = draw(st.sampled_from([None, None, "experts", "tied"])) if groups else None
        least = draw(st.sampled_from([0, 0, 0, 1, 2])) if required else 0
        modules.append(ModuleSpectrum(name, m, n, rank, tuple(sigma), group, least))
    return Spectra(tuple(modules), layout_for(modules))


budgets = st.one_of(
    st.tuples(st.just("energy"), st.sampled_from([0.25, 0.5, 0.9, 0.95, 1.0]) | st.floats(1e-3, 1.0)),
    st.tuples(st.just("keep"), st.sampled_from([0.25, 0.5, 1.0]) | st.floats(1e-3, 1.0)),
    st.tuples(st.just("params"), st.integers(1, 300)),
    st.tuples(st.just("size"), st.integers(1, 3000)),
    st.tuples(st.just("total_rank"), st.integers(1, 40)),
    st.tuples(st.just("threshold"), sigmas),
    st.tuples(st.just("rank"), st.integers(1, 8)),
)
allowed = st.none() | st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any)
shapings = st.fixed_dictionaries(
    {},
    optional={
        "min_rank": st.integers(0, 3),
        "max_rank": st.integers(1, 6),
        "multiple_of": st.integers(1, 3),
        "allowed_ranks": allowed,
        "uniform": st.sampled_from([None, "all", "type"]),
    },
)


def plan_or_none(spectra: Spectra, **arguments: Any) -> Plan | None:
    try:
        return spectra.plan(**arguments)
    except ParaError:
        return None


# ---- brute force, without shaping


def cells_of(spectra: Spectra) -> list[list[ModuleSpectrum]]:
    """Single modules and groups, in natural order of their first member."""
    cells: dict[str, list[ModuleSpectrum]] = {}
    for s in sorted(spectra.modules, key=lambda s: natural_key(s.name)):
        cells.setdefault(f"group {s.group}" if s.group else f"module {s.name}", []).append(s)
    return list(cells.values())


def prefixes(spectra: Spectra, score: str) -> list[dict[str, int]]:
    """The ranks after none, one, two, ... of the components in the order that the documentation gives."""
    components = []
    for place, cell in enumerate(cells_of(spectra)):
        for j in range(max(len(s.sigma) for s in cell)):
            gain = math.fsum(s.sigma[j] ** 2 for s in cell if j < len(s.sigma))
            if score == "density":
                value = gain / sum(s.m + s.n for s in cell)
            else:
                value = cell[0].sigma[j] if len(cell) == 1 else math.sqrt(gain / len(cell))
            components.append((j >= max(s.min_rank for s in cell), -value, place, j, cell))
    ranks = dict.fromkeys((s.name for s in spectra.modules), 0)
    steps = [ranks]
    for _, _, _, j, cell in sorted(components, key=lambda c: (c[0], c[1] if c[0] else 0.0, c[2], c[3])):
        ranks = ranks | {s.name: j + 1 for s in cell}
        steps.append(ranks)
    return steps


def mandatory(spectra: Spectra) -> int:
    return sum(min(max(s.min_rank for s in cell), max(len(s.sigma) for s in cell)) for cell in cells_of(spectra))


def parameters(spectra: Spectra, ranks: dict[str, int]) -> int:
    return sum(ranks[s.name] * (s.m + s.n) for s in spectra.modules)


def energy(spectra: Spectra, ranks: dict[str, int]) -> float:
    return math.fsum(x * x for s in spectra.modules for x in s.sigma[: ranks[s.name]])


def cost(spectra: Spectra, budget: str, ranks: dict[str, int]) -> int:
    """What ranks cost in the unit of a budget."""
    if budget == "size":
        assert spectra.layout is not None
        return spectra.layout.bytes(ranks)
    if budget == "total_rank":
        return sum(ranks.values())
    return max(ranks.values()) if budget == "rank" else parameters(spectra, ranks)


def limit(spectra: Spectra, budget: str, value: Any) -> int:
    return math.floor(Fraction(str(value)) * spectra.parameters) if budget == "keep" else value


COSTS = ("keep", "params", "size", "total_rank")


@deterministic
@given(spectra_strategy(), budgets, st.sampled_from(["auto", "sigma", "density"]))
def test_plan_is_the_longest_prefix_that_fits(spectra: Spectra, budget: tuple[str, Any], score: str) -> None:
    name, value = budget
    assume(name in COSTS)
    resolved = score if score != "auto" else "sigma" if name == "total_rank" else "density"
    order = prefixes(spectra, resolved)
    costs = [cost(spectra, name, ranks) for ranks in order]
    plan = plan_or_none(spectra, **{name: value, "score": score})
    if costs[max(mandatory(spectra), 1)] > limit(spectra, name, value):
        assert plan is None
    else:
        assert plan is not None
        assert plan.ranks == order[sum(c <= limit(spectra, name, value) for c in costs) - 1]
        assert plan.score == resolved


@deterministic
@given(
    spectra_strategy(),
    st.sampled_from([0.25, 0.5, 0.9, 0.95, 1.0]) | st.floats(1e-3, 1.0),
    st.sampled_from(["auto", "sigma", "density"]),
)
def test_energy_is_the_shortest_prefix_that_reaches_it(spectra: Spectra, value: float, score: str) -> None:
    target = Fraction(str(value)) * Fraction(spectra.energy)
    candidates = prefixes(spectra, "sigma" if score == "sigma" else "density")[mandatory(spectra) :]
    expected = next(p for p in candidates if Fraction(energy(spectra, p)) >= target)
    plan = spectra.plan(energy=value, score=score)
    assert plan.ranks == expected
    assert plan.energy >= value


@deterministic
@given(spectra_strategy(groups=False, required=False), st.integers(1, 40))
def test_total_rank_is_the_rule_of_the_paper(spectra: Spectra, k: int) -> None:
    pool = [(-x, natural_key(s.name), j, s.name) for s in spectra.modules for j, x in enumerate(s.sigma)]
    top = [name for *_, name in sorted(pool)[:k]]
    assert spectra.plan(total_rank=k).ranks == {s.name: top.count(s.name) for s in spectra.modules}


@deterministic
@given(spectra_strategy(required=False), sigmas)
def test_threshold_keeps_what_is_not_below_it(spectra: Spectra, threshold: float) -> None:
    expected: dict[str, int] = {}
    for cell in cells_of(spectra):
        columns = [[s.sigma[j] for s in cell if j < len(s.sigma)] for j in range(max(len(s.sigma) for s in cell))]
        scores = [c[0] if len(cell) == 1 else math.sqrt(math.fsum(x * x for x in c) / len(cell)) for c in columns]
        expected |= {s.name: sum(x >= threshold for x in scores) for s in cell}
    if any(expected.values()):
        assert spectra.plan(threshold=threshold).ranks == {s.name: expected[s.name] for s in spectra.modules}
    else:
        with pytest.raises(ParaError, match="largest feasible is threshold="):
            spectra.plan(threshold=threshold)


@deterministic
@given(spectra_strategy(groups=False), st.integers(2, 8))
def test_rank_is_uniform_truncation(spectra: Spectra, rank: int) -> None:
    assert spectra.plan(rank=rank).ranks == {s.name: min(rank, s.rank, s.m, s.n) for s in spectra.modules}


@deterministic
@given(spectra_strategy(groups=False, required=False, most=4), st.integers(1, 200))
def test_density_is_optimal_per_parameter(spectra: Spectra, params: int) -> None:
    plan = plan_or_none(spectra, params=params)
    assume(plan is not None)
    assert plan is not None
    choices = product(*(range(len(s.sigma) + 1) for s in spectra.modules))
    named = (dict(zip(plan.ranks, choice, strict=True)) for choice in choices)
    best = max(energy(spectra, ranks) for ranks in named if parameters(spectra, ranks) <= plan.parameters_after)
    assert energy(spectra, plan.ranks) >= best * (1 - 1e-12)


@deterministic
@given(spectra_strategy(required=False), st.integers(1, 300))
def test_density_loses_to_sigma_by_one_component_at_most(spectra: Spectra, params: int) -> None:
    density, sigma = plan_or_none(spectra, params=params), plan_or_none(spectra, params=params, score="sigma")
    assume(density is not None and sigma is not None)
    assert density is not None and sigma is not None
    following = [p for p in prefixes(spectra, "density") if parameters(spectra, p) > density.parameters_after]
    bound = energy(spectra, following[0]) if following else spectra.energy
    assert energy(spectra, sigma.ranks) <= bound * (1 + 1e-12)


# ---- properties that hold with shaping too


@deterministic
@given(spectra_strategy(), budgets, shapings)
def test_ranks_have_the_shape_and_fit_the_budget(
    spectra: Spectra, budget: tuple[str, Any], shaping: dict[str, Any]
) -> None:
    name, value = budget
    plan = plan_or_none(spectra, **{name: value}, **shaping)
    assume(plan is not None)
    assert plan is not None
    assert list(plan.ranks) == [s.name for s in spectra.modules]
    if name in (*COSTS, "rank"):
        assert cost(spectra, name, plan.ranks) <= limit(spectra, name, value)
    if name == "energy":
        assert plan.energy >= value
    largest = {s.name: len(s.sigma) for s in spectra.modules}
    key: Callable[[ModuleSpectrum], Any]
    for key in (
        lambda s: s.group or s.name,
        {None: lambda s: s.name, "all": lambda s: "", "type": lambda s: module_type(s.name)}[shaping.get("uniform")],
    ):
        for s in spectra.modules:
            mates = [t for t in spectra.modules if key(t) == key(s)]
            assert plan.ranks[s.name] == plan.ranks[mates[0].name]
            largest[s.name] = max(largest[s.name], *(len(t.sigma) for t in mates))
    choices = shaping.get("allowed_ranks")
    for s in spectra.modules:
        rank = plan.ranks[s.name]
        assert rank <= shaping.get("max_rank", rank)
        assert rank % shaping.get("multiple_of", 1) == 0
        assert choices is None or rank in {0, *choices}
        if not shaping.get("uniform") and not s.group:
            assert rank <= min(s.rank, s.m, s.n)
        if max(s.min_rank, shaping.get("min_rank", 0)) > 0:
            assert rank > 0
        if choices is None and shaping.get("multiple_of", 1) == 1:
            assert rank >= min(shaping.get("min_rank", 0), len(s.sigma))
    if not any(shaping.values()):
        assert plan.unshaped_energy is None


@deterministic
@given(
    spectra_strategy(required=False),
    st.sampled_from(["params", "size", "total_rank"]),
    st.floats(0.5, 0.999),
    st.integers(0, 1),
    st.integers(2, 6),
    st.lists(st.integers(2, 6), max_size=3),
)
def test_next_block_would_not_fit(
    spectra: Spectra, name: str, share: float, min_rank: int, max_rank: int, more_ranks: list[int]
) -> None:
    allowed_ranks = sorted({1, 2, *more_ranks})
    shaping = {"min_rank": min_rank, "max_rank": max_rank, "allowed_ranks": allowed_ranks}
    value = math.floor(share * cost(spectra, name, spectra.plan(**shaping).ranks))
    plan = plan_or_none(spectra, **{name: value}, **shaping)
    assume(plan is not None)
    assert plan is not None and plan.largest_dropped is not None
    dropped = next(s for s in spectra.modules if s.name == plan.largest_dropped.module)
    assert plan.largest_dropped.index == plan.ranks[dropped.name]
    grown = min(k for k in allowed_ranks if k > plan.ranks[dropped.name])
    mates = [s.name for s in spectra.modules if s is dropped or (s.group and s.group == dropped.group)]
    assert cost(spectra, name, plan.ranks | dict.fromkeys(mates, grown)) > value


@deterministic
@given(spectra_strategy(), budgets, st.floats(1.0, 4.0), shapings)
def test_ranks_grow_with_the_budget(
    spectra: Spectra, budget: tuple[str, Any], factor: float, shaping: dict[str, Any]
) -> None:
    name, value = budget
    if name == "threshold":
        small, large = value * factor, value
    elif name in ("energy", "keep"):
        small, large = value, min(1.0, value * factor)
    else:
        small, large = value, math.ceil(value * factor)
    first, second = (plan_or_none(spectra, **{name: x}, **shaping) for x in (small, large))
    if name == "energy":
        first, second = (first, second) if second else (None, None)
    if first is not None:
        assert second is not None
        assert all(second.ranks[module] >= rank for module, rank in first.ranks.items())


@deterministic
@given(spectra_strategy(), budgets, shapings, st.randoms(use_true_random=False))
def test_order_of_modules_does_not_matter(
    spectra: Spectra, budget: tuple[str, Any], shaping: dict[str, Any], random: Any
) -> None:
    shuffled = list(spectra.modules)
    random.shuffle(shuffled)
    arguments = {budget[0]: budget[1], **shaping}
    first, second = (
        plan_or_none(spectra, **arguments),
        plan_or_none(Spectra(tuple(shuffled), spectra.layout), **arguments),
    )
    assert first == second


@deterministic
@given(spectra_strategy(), budgets, shapings, st.integers(-40, 40))
def test_scaling_by_a_power_of_two_changes_no_rank(
    spectra: Spectra, budget: tuple[str, Any], shaping: dict[str, Any], power: int
) -> None:
    def scaled(s: ModuleSpectrum) -> ModuleSpectrum:
        return ModuleSpectrum(s.name, s.m, s.n, s.rank, tuple(x * 2.0**power for x in s.sigma), s.group, s.min_rank)

    name, value = budget
    first = plan_or_none(spectra, **{name: value}, **shaping)
    other = Spectra(tuple(map(scaled, spectra.modules)), spectra.layout)
    second = plan_or_none(other, **{name: value * 2.0**power if name == "threshold" else value}, **shaping)
    assert (first and first.ranks) == (second and second.ranks)
    if first and second:
        assert second.error == first.error * 2.0**power


@deterministic
@given(spectra_strategy(required=False), budgets)
def test_a_group_of_one_is_a_single_module(spectra: Spectra, budget: tuple[str, Any]) -> None:
    def regrouped(group: Callable[[ModuleSpectrum], str | None]) -> Spectra:
        modules = (ModuleSpectrum(s.name, s.m, s.n, s.rank, s.sigma, group(s)) for s in spectra.modules)
        return Spectra(tuple(modules), spectra.layout)

    alone, single = (
        plan_or_none(x, **dict([budget])) for x in (regrouped(lambda s: f"only {s.name}"), regrouped(lambda s: None))
    )
    assert alone == single


@deterministic
@given(spectra_strategy(), budgets, shapings)
def test_numbers_of_a_plan_are_those_of_its_ranks(
    spectra: Spectra, budget: tuple[str, Any], shaping: dict[str, Any]
) -> None:
    plan = plan_or_none(spectra, **dict([budget]), **shaping)
    assume(plan is not None)
    assert plan is not None
    assert plan.energy == (energy(spectra, plan.ranks) / spectra.energy if spectra.energy else 1.0)
    assert plan.parameters_before == sum(s.rank * (s.m + s.n) for s in spectra.modules)
    assert plan.parameters_after == parameters(spectra, plan.ranks)
    for s in spectra.modules:
        assert plan.errors[s.name] == math.sqrt(math.fsum(x * x for x in s.sigma[plan.ranks[s.name] :]))
    assert plan.error == pytest.approx(math.hypot(*plan.errors.values()), rel=1e-12)
    assert json.loads(json.dumps(plan.to_dict()))["ranks"] == plan.ranks


# ---- infeasible budgets


def named_in(message: str) -> tuple[str, str]:
    """The budget that a refusal says will work."""
    found = re.search(r"(?:feasible is|ask for at most|give) (\w+)=([^ ]+)", message)
    assert found, message
    return found[1], found[2]


@deterministic
@given(spectra_strategy(), budgets, shapings)
def test_a_refusal_names_the_smallest_feasible_budget(
    spectra: Spectra, budget: tuple[str, Any], shaping: dict[str, Any]
) -> None:
    name, value = budget
    assume(plan_or_none(spectra, rank=8, **shaping) is not None)  # the shaping itself is possible
    value = {"energy": 1.0, "keep": 1e-9, "threshold": 1e9}.get(name, 1)
    try:
        spectra.plan(**{name: value}, **shaping)
    except ParaError as refusal:
        other, text = named_in(str(refusal))
    else:
        return
    exact = float(text) if other in ("energy", "keep", "threshold") else int(text)
    assert spectra.plan(**{other: exact}, **shaping).energy >= 0
    if other == "keep":
        short: Any = float(text) * (1 - 2e-5)
        need = math.floor(Fraction(text) * spectra.parameters)
        assume(math.floor(Fraction(str(short)) * spectra.parameters) < need)
    elif other == "energy":
        short = math.nextafter(exact, 1)
    elif other == "threshold":
        short = math.nextafter(exact, math.inf)
    else:
        short = exact - 1
    if short:
        with pytest.raises(ParaError):
            spectra.plan(**{other: short}, **shaping)


def test_a_refusal_is_one_sentence_with_what_and_what_to_do() -> None:
    spectra = spectra_of(module("a", 3, 2), module("b", 1))
    with pytest.raises(ParaError) as refusal:
        spectra.plan(params=15)
    assert (
        str(refusal.value) == "params=15 is too small for this adapter and shaping: the smallest feasible is params=16"
    )
    with pytest.raises(ParaError, match=r"keep=0\.001 is too small .* keep=0\.333334$"):
        spectra.plan(keep="0.1%")
    with pytest.raises(ParaError, match=r"threshold=3\.5 is above every score, .* threshold=3\.0$"):
        spectra.plan(threshold=3.5)
    with pytest.raises(ParaError, match=r"rank=1 is too small .* rank=2$"):
        spectra_of(module("a", 3, 2)).plan(rank=1, min_rank=2)
    with pytest.raises(ParaError, match=r"energy=1\.0 is more than the shaping allows: .* energy=0\.5$"):
        spectra_of(module("a", 1, 1)).plan(energy=1.0, max_rank=1)


def test_padding_that_no_keep_can_pay_is_refused_with_params() -> None:
    spectra = spectra_of(module("a", 3, 2), module("b", 1))
    with pytest.raises(ParaError, match=r"so is any keep, .* give params=64 "):
        spectra.plan(keep=1.0, uniform="all", min_rank=2)
    assert spectra.plan(params=64, uniform="all", min_rank=2).ranks == {"a": 2, "b": 2}


def test_size_without_a_layout_is_refused() -> None:
    with pytest.raises(ParaError, match="give params or keep"):
        spectra_of(module("a", 1)).plan(size="1MB")


@pytest.mark.parametrize(
    "shaping",
    [
        {"multiple_of": 4},
        {"allowed_ranks": [4, 8]},
        {"multiple_of": 3, "max_rank": 2},
        {"multiple_of": 2, "allowed_ranks": [3]},
    ],
)
def test_a_module_without_an_allowed_rank_is_named(shaping: dict[str, Any]) -> None:
    with pytest.raises(ParaError, match=r"module 'short' can take no rank from 1 to 3"):
        spectra_of(module("short", 1, 1, 1)).plan(rank=8, **shaping)


# ---- examples


def test_ties_go_by_natural_order() -> None:
    spectra = spectra_of(module("layers.10.q", 1, 1), module("layers.2.q", 1, 1))
    assert spectra.plan(total_rank=1).ranks == {"layers.10.q": 0, "layers.2.q": 1}
    assert spectra.plan(total_rank=3).ranks == {"layers.10.q": 1, "layers.2.q": 2}


def test_scores_are_compared_to_the_last_bit() -> None:
    close = spectra_of(module("a", 1.0), module("b", math.nextafter(1.0, 2.0)))
    assert close.plan(total_rank=1).ranks == {"a": 0, "b": 1}
    tiny = spectra_of(module("a", 1e-200), module("b", 2e-200))  # their squares are both 0
    assert tiny.plan(total_rank=1).ranks == {"a": 0, "b": 1}


def test_order_within_a_module_survives_rounding() -> None:
    """The mean of three equal squares rounds above one of them, and would overtake it."""
    s = 1.9213528321559221
    assert math.sqrt(math.fsum([s * s] * 3) / 3) > s
    plan = spectra_of(module("a", s, s, s, s)).plan(total_rank=3, allowed_ranks=[1, 4])
    assert plan.ranks == {"a": 1}


def test_defaults() -> None:
    spectra = spectra_of(module("a", 10, 1, 0), module("b", 3))
    plan = spectra.plan()
    assert (plan.budget, plan.value, plan.score) == ("energy", 0.95, "density")
    assert plan.ranks == {"a": 1, "b": 1}
    shaped = spectra.plan(max_rank=2)
    assert (shaped.budget, shaped.value, shaped.ranks) == (None, None, {"a": 2, "b": 1})
    assert (shaped.unshaped_energy, shaped.unshaped_parameters) == (1.0, 64)
    assert shaped.shaping == {"max_rank": 2}
    assert [spectra.plan(**{b: 1}).score for b in ("energy", "keep", "total_rank", "rank")] == [
        "density", "density", "sigma", "sigma",
    ]  # fmt: skip


def test_keep_is_the_decimal_it_is_written_as() -> None:
    spectra = spectra_of(module("a", *range(100, 0, -1), m=100, n=100))
    assert math.floor(0.29 * 100) == 28
    for keep in (0.29, "0.29", "29%", " 29.0 % ", "2.9e-1"):
        plan = spectra.plan(keep=keep)
        assert (plan.ranks, plan.value) == ({"a": 29}, 0.29)


def test_keep_all_keeps_zero_components_and_never_more_than_there_can_be() -> None:
    spectra = spectra_of(module("a", 1, 0, 0), module("b", 2, 1, m=2, n=9, rank=5))
    assert spectra.plan(keep=1).ranks == {"a": 3, "b": 2}


def test_all_zero_adapter_keeps_nothing() -> None:
    plan = spectra_of(module("a", 0, 0), module("b", 0)).plan()
    assert plan.ranks == {"a": 0, "b": 0}
    assert (plan.energy, plan.error, plan.threshold, plan.smallest_kept) == (1.0, 0.0, None, None)


@pytest.mark.parametrize(
    "budget", [{}, {"keep": 0.5}, {"total_rank": 3}, {"threshold": 1.0}, {"rank": 2}, {"max_rank": 1}]
)
def test_empty_adapter_is_legal(budget: dict[str, Any]) -> None:
    assert spectra_of().plan(**budget).ranks == {}


@pytest.mark.parametrize(
    ("size", "value"),
    [(4000, 4000), ("4000", 4000), ("4kB", 4000), ("4 KiB", 4096), ("0.5MiB", 2**19), ("1.5GB", 1.5e9)],
)
def test_sizes(size: int | str, value: int) -> None:
    modules = (module("a", 3, 2), module("b", 1))
    plan = Spectra(modules, layout_for(modules)).plan(size=size)
    assert (plan.value, plan.ranks) == (value, {"a": 2, "b": 1})


def test_size_counts_header_and_foreign_tensors() -> None:
    modules = (module("a", 3, 2), module("b", 1))
    layout = layout_for(modules)
    spectra = Spectra(modules, layout)
    whole = layout.bytes({"a": 2, "b": 1})
    assert spectra.plan(size=whole).ranks == {"a": 2, "b": 1}
    assert spectra.plan(size=whole - 1).ranks == {"a": 2, "b": 0}


def test_group_shares_a_rank_and_pays_for_all() -> None:
    experts = [module(f"e.{i}", 2 + i, 1, group="experts") for i in range(2)]
    spectra = spectra_of(*experts, module("q", 2.5, 0.5))
    plan = spectra.plan(total_rank=3)  # √((4 + 9)/2) = 2.55 comes before 2.5
    assert plan.ranks == {"e.0": 1, "e.1": 1, "q": 1}
    assert spectra.plan(total_rank=2).ranks == {"e.0": 1, "e.1": 1, "q": 0}
    assert plan.largest_dropped is not None and plan.smallest_kept is not None
    assert (plan.largest_dropped.module, plan.largest_dropped.index, plan.largest_dropped.score) == ("e.0", 1, 1.0)
    assert (plan.smallest_kept.module, plan.smallest_kept.index, plan.smallest_kept.score) == ("q", 0, 2.5)
    assert plan.threshold == 2.5


def test_uniform_type_merges_types_that_share_a_group() -> None:
    modules = [module(f"0.{t}", 3, 2, 1, group=g) for t, g in (("q", None), ("k", "tied"), ("v", "tied"), ("o", None))]
    ranks = spectra_of(*modules, module("1.k", 9, 9, 9), module("1.v", 0.1)).plan(total_rank=13, uniform="type").ranks
    assert ranks["0.k"] == ranks["0.v"] == ranks["1.k"] == ranks["1.v"] == 3  # padded: 1.v has one component
    assert (ranks["0.q"], ranks["0.o"]) == (0, 1)


def test_min_rank_is_charged_first_and_rounded_up_to_an_allowed_rank() -> None:
    spectra = spectra_of(module("big", 9, 8, 7, 6, 5, 4), module("small", 1, 1, 1, min_rank=1))
    assert spectra.plan(total_rank=4).ranks == {"big": 3, "small": 1}
    assert spectra.plan(total_rank=4, allowed_ranks=[2, 4]).ranks == {"big": 2, "small": 2}
    assert spectra.plan(total_rank=5, min_rank=2).ranks == {"big": 3, "small": 2}
    assert spectra.plan(rank=1, min_rank=1).ranks == {"big": 1, "small": 1}


def test_blocks_and_caps() -> None:
    spectra = spectra_of(module("a", 5, 4, 3, 2, 1), module("b", 4, 4, 4, 4, 4))
    assert spectra.plan(rank=8, multiple_of=2).ranks == {"a": 4, "b": 4}
    assert spectra.plan(multiple_of=2, allowed_ranks=[0, 2, 3, 8]).ranks == {"a": 2, "b": 2}
    assert spectra.plan(total_rank=5, max_rank=2).ranks == {"a": 2, "b": 2}
    assert spectra.plan(total_rank=5, allowed_ranks=[1, 3]).ranks == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0.5, "energy": 0.5}, "give one budget"),
        *(({"keep": bad}, "keep=") for bad in (0, -0.5, 1.5, math.nan, math.inf, True, "half", "150%", "1e99999")),
        *(({"energy": bad}, "energy=") for bad in (0.0, 1.01, math.nan, True, "x")),
        *(({b: bad}, f"{b}=") for b in ("params", "total_rank", "rank", "size") for bad in (0, -1, 1.5, True)),
        *(({"size": bad}, "size=") for bad in ("", "MB", "-1MB", "1 furlong", "0kB", "1e3")),
        *(({"threshold": bad}, "threshold=") for bad in (-1.0, math.nan, math.inf, True, "x", 10**400)),
        ({"threshold": 1.0, "score": "sigma"}, "leave score out"),
        ({"score": "knee"}, "score='knee'"),
        ({"uniform": "some"}, "uniform='some'"),
        ({"min_rank": -1}, "min_rank=-1"),
        ({"min_rank": True}, "min_rank=True"),
        ({"max_rank": 0}, "max_rank=0"),
        ({"multiple_of": 0}, "multiple_of=0"),
        ({"allowed_ranks": []}, "allowed_ranks holds"),
        ({"allowed_ranks": [0]}, "allowed_ranks holds"),
        ({"allowed_ranks": "48"}, "allowed_ranks='48'"),
        ({"allowed_ranks": 8}, "allowed_ranks=8"),
        ({"allowed_ranks": [4, -8]}, "allowed_ranks=-8"),
        ({"min_rank": 3, "max_rank": 2}, "lower min_rank"),
        ({"min_rank": 3, "allowed_ranks": [1, 2]}, "lower min_rank"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    spectra = spectra_of(module("a", 2, 1))
    with pytest.raises(ParaError, match=re.escape(message)):
        spectra.plan(**arguments)


# ---- Spectra


def test_totals() -> None:
    spectra = spectra_of(module("a", 3, 4e-9, m=2, n=5, rank=7), module("b", 4))
    assert spectra.parameters == 7 * 7 + 16
    assert spectra.energy == 25.0


@deterministic
@given(spectra=spectra_strategy(), budget=budgets, shaping=shapings)
def test_a_saved_adapter_plans_alike(
    tmp_path_factory: pytest.TempPathFactory, spectra: Spectra, budget: tuple[str, Any], shaping: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "spectra.json"
    spectra.save(path)
    loaded = Spectra.load(path)
    assert loaded == spectra
    arguments = {budget[0]: budget[1], **shaping}
    assert plan_or_none(loaded, **arguments) == plan_or_none(spectra, **arguments)


def test_save_and_load(tmp_path: Path) -> None:
    modules = (module("é.0", math.pi, 5e-324, group="g", min_rank=1), module("b", 4, 0, m=2))
    for spectra in (Spectra(modules, layout_for(modules)), Spectra(modules)):
        spectra.save(tmp_path / "spectra.json")
        loaded = Spectra.load(tmp_path / "spectra.json")
        assert loaded == spectra
        assert loaded.plan(total_rank=2) == spectra.plan(total_rank=2)
    assert [p.name for p in tmp_path.iterdir()] == ["spectra.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "spectra.json"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ParaError, match=r"spectra\.json' cannot be written, No space left"):
        spectra_of(module("a", 1)).save(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_unreachable_places_are_refused(tmp_path: Path) -> None:
    spectra = spectra_of(module("a", 1))
    (tmp_path / "file").write_text("{")
    for path in (tmp_path, tmp_path / "none" / "s.json", tmp_path / "file" / "s.json"):
        with pytest.raises(ParaError, match="cannot be written"):
            spectra.save(path)
        with pytest.raises(ParaError, match="cannot be read"):
            Spectra.load(path)


def changed(record: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy with one field replaced, or removed when the value is ``...``."""
    copy: dict[str, Any] = json.loads(json.dumps(record))
    inner: Any = copy
    for step in path[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy


MODULE = ("modules", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        *(((field,), ..., f"'{field}' is missing") for field in ("format", "version", "modules", "layout")),
        *(((*MODULE, f), ..., f"'{f}' is missing") for f in ("name", "m", "n", "rank", "sigma", "group", "min_rank")),
        (("format",), "other", "'format' is 'other'"),
        (("version",), 2, "'version' is 2"),
        (("version",), True, "'version' is True"),
        (("modules",), {}, "'modules' is"),
        (("layout",), [], "'layout' is"),
        (("layout", "slots", 0, "dtype"), "F1", "dtype 'F1'"),
        (("layout", "slots", 1, "module"), "absent", "'absent'"),
        (MODULE, 7, "'sigma' is missing"),
        ((*MODULE, "name"), 7, "'name' is 7"),
        ((*MODULE, "name"), "b", "'b' is given twice"),
        ((*MODULE, "m"), 0, "m is 0"),
        ((*MODULE, "m"), 8.0, "'m' is 8.0"),
        ((*MODULE, "n"), True, "'n' is True"),
        ((*MODULE, "n"), 10**30, "n is 1000"),
        ((*MODULE, "rank"), -1, "rank is -1"),
        ((*MODULE, "rank"), 3, "sigma has 2 values"),
        ((*MODULE, "sigma"), [], "sigma has 0 values"),
        ((*MODULE, "sigma"), "21", "'sigma' is '21'"),
        ((*MODULE, "sigma"), [2.0, "1"], "'sigma' with a value"),
        ((*MODULE, "sigma"), [True, False], "'sigma' with a value"),
        ((*MODULE, "sigma"), [1.0, 2.0], "sigma must descend"),
        ((*MODULE, "sigma"), [1.0, -1.0], "sigma must descend"),
        ((*MODULE, "sigma"), [math.nan, 1.0], "sigma must descend"),
        ((*MODULE, "sigma"), [math.nan, math.nan], "sigma must descend"),
        ((*MODULE, "sigma"), [math.inf, 1.0], "sigma must descend"),
        ((*MODULE, "sigma"), [1e151, 1.0], "sigma must descend"),
        ((*MODULE, "group"), 1, "'group' is 1"),
        ((*MODULE, "min_rank"), -1, "min_rank is -1"),
        ((*MODULE, "min_rank"), None, "'min_rank' is None"),
    ],
)
def test_corrupted_files_are_refused_by_file_and_field(
    tmp_path: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    modules = (module("a", 2, 1), module("b", 4))
    file = tmp_path / "spectra.json"
    Spectra(modules, layout_for(modules)).save(file)
    file.write_text(json.dumps(changed(json.loads(file.read_text()), path, value)))
    with pytest.raises(ParaError, match=r"spectra\.json' is not as .*" + re.escape(message)):
        Spectra.load(file)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"version https://git-lfs"])
def test_files_that_are_not_json_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "spectra.json"
    file.write_bytes(content)
    with pytest.raises(ParaError, match=r"spectra\.json' is not JSON"):
        Spectra.load(file)


def test_costs_beyond_the_machine_s_integers() -> None:
    count, dim = 2**21, 2**40
    spectra = spectra_of(module("a", *[1.0] * count, m=dim, n=dim))
    assert spectra.parameters == 2**62
    assert spectra.plan(params=2**62 - 1).ranks == {"a": count - 1}
    assert spectra.plan(keep=1).ranks == {"a": count}


def test_energy_in_doubt_is_summed_exactly() -> None:
    """Prefixes of 0.1² and its neighbours, at every fraction that one of them reaches or just misses."""
    spectra = spectra_of(*[module(f"m.{i}", 0.1, math.nextafter(0.1, 0), 0.05) for i in range(7)])
    squares = sorted((s * s for m in spectra.modules for s in m.sigma), reverse=True)
    total = math.fsum(squares)
    for taken in range(1, len(squares)):
        reached = math.fsum(squares[:taken]) / total
        for energy in (math.nextafter(reached, 0), reached, math.nextafter(reached, 1)):
            needed = next(
                t for t in range(len(squares) + 1)
                if Fraction(math.fsum(squares[:t])) >= Fraction(str(energy)) * Fraction(total)
            )  # fmt: skip
            assert sum(spectra.plan(energy=energy).ranks.values()) == needed


@pytest.mark.parametrize("sigma", [3e-162, 2.3e-162, 1e-160])
def test_energy_of_the_smallest_spectra(sigma: float) -> None:
    spectra = spectra_of(module("a", sigma, sigma, sigma))
    squares = [sigma * sigma] * 3
    for energy in (0.1, 0.3, 0.4, 0.6, 0.7, 1.0):
        target = Fraction(str(energy)) * Fraction(math.fsum(squares))
        needed = next(t for t in range(4) if Fraction(math.fsum(squares[:t])) >= target)
        assert spectra.plan(energy=energy).ranks == {"a": needed}


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "spectra.json"
    spectra_of(module("a", 2, 1)).save(file)
    whole = file.read_text()
    for length in range(len(whole)):
        file.write_text(whole[:length])
        with pytest.raises(ParaError, match="is not JSON"):
            Spectra.load(file)


def test_planning_needs_no_torch() -> None:
    code = "import sys, para_ext.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [{"score": []}, {"score": {}}, {"uniform": [1, 2]}, {"rank": 10**5000}, {"keep": 10**5000}, {"size": 10**5000},
     {"threshold": 10**5000}, {"rank": 10**300}, {"allowed_ranks": 7}],
    ids=lambda a: next(iter(a)),
)  # fmt: skip
def test_absurd_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ParaError):
        spectra_of(module("a", 3, 2, 1)).plan(**arguments)


# uniform with allowed ranks: zeros fill modules up to the first allowed rank that holds all they have


def test_uniform_pads_to_the_first_allowed_rank_that_holds_all() -> None:
    spectra = spectra_of(module("a.q", 3, 2, 1), module("b.q", 5), module("a.up", *[1] * 5))
    for allowed, budget, rank in (
        ([8, 16], {}, 8),
        ([4, 8], {}, 8),
        ([4, 8], {"params": 192}, 4),
        ([2, 4], {}, 4),  # none holds 5
        ([2, 5], {}, 5),
        ([16], {"energy": 1.0}, 16),
    ):
        plan = spectra.plan(uniform="all", allowed_ranks=allowed, **budget)
        assert set(plan.ranks.values()) == {rank}, allowed
        assert plan.parameters_after == rank * sum(m.m + m.n for m in spectra.modules)


def test_uniform_by_type_pads_each_type_by_itself() -> None:
    spectra = spectra_of(module("a.q", 3, 2, 1), module("b.q", 5), module("a.up", *[1] * 8))
    assert spectra.plan(uniform="type", allowed_ranks=[4, 16]).ranks == {"a.q": 4, "b.q": 4, "a.up": 16}
    with pytest.raises(ParaError, match="can take no rank from 1 to 8"):
        spectra.plan(uniform="all", allowed_ranks=[4], max_rank=3, rank=2)


@deterministic
@given(
    spectra_strategy(groups=False, required=False),
    st.lists(st.integers(1, 24), min_size=1, max_size=4).filter(lambda ranks: min(ranks) <= 6),
    st.sampled_from(["energy", "keep", None]),
    st.floats(0.05, 1),
)
def test_padding_costs_parameters_and_no_energy(
    spectra: Spectra, allowed: list[int], budget: str | None, value: float
) -> None:
    """The rank is allowed, zeros count as parameters, and what is kept is what the modules have up to that rank."""
    try:
        plan = spectra.plan(uniform="all", allowed_ranks=allowed, **({budget: value} if budget else {}))
    except ParaError as refusal:
        assert "feasible" in str(refusal) or "too small" in str(refusal) or "more than the shaping" in str(refusal)
        return
    (rank,) = set(plan.ranks.values())
    most = max(len(m.sigma) for m in spectra.modules)
    above = [k for k in allowed if k >= most]
    assert rank in (0, *(k for k in allowed if k < most), *([min(above)] if above else []))
    if budget is None:
        assert rank == (min(above) if above else max(allowed))
    assert plan.parameters_after == rank * sum(m.m + m.n for m in spectra.modules)
    lost = math.fsum(s * s for m in spectra.modules for s in m.sigma[rank:])
    assert plan.error == pytest.approx(math.sqrt(lost), rel=1e-12)
    if budget == "energy":
        lower = [k for k in sorted({0, *allowed}) if k < rank]
        if lower:  # the next smaller one would not do
            kept = math.fsum(s * s for m in spectra.modules for s in m.sigma[: lower[-1]])
            assert kept <= value * spectra.energy * (1 + 1e-12)
