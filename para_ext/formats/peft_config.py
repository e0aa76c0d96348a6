"""adapter_config.json at unit scale, and PEFT's own rules for matching names, simulated before anything is written.

Unit scale: all scaling is folded into the factors, ``lora_alpha == r`` and ``alpha_pattern == rank_pattern``. PEFT up
to 0.14 and from 0.15 on look pattern keys up differently (``get_pattern_key``), and a ``target_modules`` list matches
by suffix; so every config made here is checked by the same rules: a module is injected if and only if it was kept,
with its rank.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import ParaError

# PEFT matches every module against every pattern, and Python caches 512 compiled patterns: above, each match compiles.
MAX_PATTERN_ENTRIES = 480

# Values that follow from folded factors. Set only where the key exists: PEFT up to 0.13 rejects keys it does not know.
_NEUTRAL: dict[str, Any] = {
    "use_rslora": False,
    "init_lora_weights": True,
    "inference_mode": True,
    "corda_config": None,
    "eva_config": None,
    "lora_ga_config": None,
    "loftq_config": {},
}


def unit_scale_config(
    config: Mapping[str, Any],
    ranks: Mapping[str, int],
    *,
    others: Collection[str] = (),
    parameters: Collection[str] = (),
    tied: Collection[str] = (),
    default: int | None = None,
) -> dict[str, Any]:
    """The source's adapter_config changed to unit scale and to new ranks.

    Args:
        config: the source's adapter_config.json.
        ranks: new rank of every adapted module by its path in the base model; 0 means dropped.
        others: module names of the base model, as far as they are known; none of them may be injected.
        parameters: the names of ``ranks`` that ``target_parameters`` adapts, as paths of parameters.
        default: what ``r`` is to be; the largest rank if None.
        tied: the names of ``ranks`` that PEFT adapts because of ``ensure_weight_tying``, not of ``target_modules``.

    Raises:
        ParaError: no config that PEFT would read back as exactly these ranks exists; or nothing is kept.
    """
    kept = {name: ranks[name] for name in sorted(ranks) if ranks[name] > 0}
    if not kept:
        raise ParaError("an adapter config needs at least one module of rank 1 or more: keep one")
    rank = default or max(kept.values())
    new = {**config, "r": rank, "lora_alpha": rank} | {k: v for k, v in _NEUTRAL.items() if k in config}

    patterns = _rank_pattern(kept, rank)
    for key in ("rank_pattern", "alpha_pattern"):
        if patterns or key in config:
            new[key] = dict(patterns)

    parameter_ranks = {name: ranks[name] for name in parameters}
    if config.get("target_parameters"):
        new["target_parameters"] = _target_parameters(config["target_parameters"], parameter_ranks)
    _check_parameters(new, parameter_ranks)

    modules = {name: k for name, k in ranks.items() if name not in parameter_ranks and name not in tied}
    strangers = set(others) - ranks.keys()
    wrong = ""
    for change in _target_changes(config, modules):
        wrong = _wrongly_injected(new | change, modules, strangers)
        if not wrong:
            return new | change
    raise ParaError(f"module '{wrong}': no target_modules could say whether it is adapted; check target_modules, "
                    "exclude_modules and modules_to_save of adapter_config.json")  # fmt: skip


def oldest_peft(config: Mapping[str, Any]) -> str | None:
    """The oldest PEFT release that reads a config of :func:`unit_scale_config`, where that is not the source's own."""
    return "0.15" if any(key.startswith("^") for key in config.get("rank_pattern") or ()) else None


class PatternKeys:
    """The keys of rank_pattern or alpha_pattern, compiled once.

    Args:
        keys: regular expressions, in the order in which PEFT tries them.
        old: look up as PEFT up to 0.14 does (``.*\\.key$``) instead of ``(.*\\.)?(key)$``.

    Raises:
        ParaError: a key is not a regular expression.
    """

    def __init__(self, keys: Iterable[str], *, old: bool = False) -> None:
        rule = r".*\.%s$" if old else r"(.*\.)?(%s)$"
        self._keys = [(key, _literal_end(key), _compile(rule % key)) for key in keys]

    def find(self, name: str) -> str:
        """The first key that matches the module's name; the name itself, which PEFT then looks up, if there is none."""
        for key, end, pattern in self._keys:
            if name.endswith(end) and pattern.match(name):
                return key
        return name


class Targets:
    """The modules that a config makes PEFT adapt: ``check_target_module_exists``, compiled once.

    ``known`` is False where PEFT asks the base model (``all-linear``, or target_modules left to the model's type).
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        excluded, targets = config.get("exclude_modules"), config.get("target_modules")
        self._excluded = _compile(excluded) if isinstance(excluded, str) and excluded else None
        self._excluded_ends = frozenset() if isinstance(excluded, str) else frozenset(excluded or ())
        self._saved = [_compile(rf"(^|.*\.){m}($|\..*)") for m in config.get("modules_to_save") or ()]
        by_parameters = targets is None and config.get("target_parameters") is not None
        self.known = by_parameters or (targets is not None and str(targets).lower() != "all-linear")
        self._target = _compile(targets) if self.known and isinstance(targets, str) else None
        self._target_ends = frozenset() if isinstance(targets, str) else frozenset(targets or ())
        layers = config.get("layers_to_transform")
        self._layers = frozenset([layers] if isinstance(layers, int) else layers or ())
        pattern = config.get("layers_pattern") or ()
        heads = [rf"(?:^|.*?\.){p}" for p in ([pattern] if isinstance(pattern, str) else pattern)] or [r".*?\.[^.]*"]
        self._layer_index = [_compile(rf"{head}\.(?P<index>\d+)\.") for head in heads]

    def __contains__(self, name: str) -> bool:
        if self._excluded and self._excluded.fullmatch(name):
            return False
        if not self._excluded_ends.isdisjoint(_ends(name)):
            return False
        if any(pattern.match(name) for pattern in self._saved):
            return False
        if self._target:
            return bool(self._target.fullmatch(name))
        if not self.known or name in self._target_ends:
            return True
        return not self._target_ends.isdisjoint(_ends(name)) and (not self._layers or self._layer(name) in self._layers)

    def _layer(self, name: str) -> int | None:
        found = next((match for pattern in self._layer_index if (match := pattern.match(name))), None)
        return int(found["index"]) if found else None


def _rank_pattern(kept: Mapping[str, int], default: int) -> dict[str, int]:
    """Keys that give every kept module its rank under PEFT's rules, in sorted order, as PEFT saves them."""
    entries = {name: k for name, k in kept.items() if k != default}
    candidates: list[tuple[dict[str, int], tuple[bool, ...]]]
    if len(entries) > MAX_PATTERN_ENTRIES:
        alternatives = (
            (f"^(?:{'|'.join(re.escape(name) for name, k in entries.items() if k == rank)})$", rank)
            for rank in set(entries.values())
        )
        candidates = [(dict(sorted(alternatives)), (False,))]
    else:
        escaped = {f"^{re.escape(name)}": k for name, k in entries.items()}
        candidates = [(dict(sorted(entries.items())), (False, True)), (dict(sorted(escaped.items())), (False,))]
    wrong = ""
    for patterns, rules in candidates:
        wrong = next((name for old in rules for name in _wrongly_ranked(patterns, default, kept, old)), "")
        if not wrong:
            return patterns
    raise ParaError(f"module '{wrong}': no rank_pattern key gives it its rank of {kept[wrong]}; rename the module")


def _wrongly_ranked(patterns: Mapping[str, int], default: int, kept: Mapping[str, int], old: bool) -> Iterator[str]:
    try:
        keys = PatternKeys(patterns, old=old)
    except ParaError:
        yield next(iter(kept))
        return
    for name, rank in kept.items():
        if patterns.get(keys.find(name), default) != rank:
            yield name


def _target_changes(config: Mapping[str, Any], modules: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Changes to the targets that leave the dropped modules out, the one nearest to the source first."""
    kept = [name for name, k in modules.items() if k > 0]
    dropped = [name for name, k in modules.items() if k == 0]
    targets = config.get("target_modules")
    change: dict[str, Any] = {}
    if isinstance(targets, Sequence) and not isinstance(targets, str):
        gone = _all_ends(dropped) - _all_ends(kept)
        if not gone.isdisjoint(targets):
            change["target_modules"] = [entry for entry in targets if entry not in gone]
    if "exclude_modules" in config:
        remaining = Targets(dict(config) | change)
        if out := [name for name in dropped if name in remaining]:
            change["exclude_modules"] = _join(config["exclude_modules"], out)
    yield change
    full = {"target_modules": _any_of(kept) if kept else []}
    yield full | {key: None for key in ("layers_to_transform", "layers_pattern") if key in config}


def _join(old: str | Collection[str] | None, names: Iterable[str]) -> str:
    """``exclude_modules`` as one regular expression: the old value, and these names in full."""
    if isinstance(old, str):
        # Flags that hold for the whole expression may only stand at its start: make them hold for the old part alone.
        # (A comment under the flag x would swallow the closing bracket, but for the line break.)
        flags, rest = re.fullmatch(r"((?:\(\?[aiLmsux]+\))*)(.*)", old, re.DOTALL).groups()  # type: ignore[union-attr]
        letters = "".join(sorted(set(re.findall(r"[aiLmsux]", flags))))
        parts = [f"(?{letters}:{rest}\n)" if "x" in letters else f"(?{letters}:{rest})"] if old else []
    else:
        parts = [rf"(?:.*\.)?{re.escape(entry)}" for entry in old or ()]
    return "|".join([*parts, _any_of(names)])


def _any_of(names: Iterable[str]) -> str:
    return f"(?:{'|'.join(re.escape(name) for name in sorted(names))})"


def _wrongly_injected(config: Mapping[str, Any], modules: Mapping[str, int], strangers: Iterable[str]) -> str:
    targets = Targets(config)
    wrong = (name for name, k in modules.items() if (name in targets) != (k > 0))
    return next(wrong, "") or (next((name for name in strangers if name in targets), "") if targets.known else "")


def _target_parameters(targets: Iterable[str], ranks: Mapping[str, int]) -> list[str]:
    """``target_parameters`` without the dropped; PEFT does not consult exclude_modules for parameters."""
    kept = [name for name, k in ranks.items() if k > 0]
    gone = _all_ends(name for name, k in ranks.items() if k == 0)
    new: dict[str, None] = {}
    for entry in targets:
        new |= dict.fromkeys([entry] if entry not in gone else [name for name in kept if entry in _ends(name)])
    return list(new)


def _check_parameters(config: Mapping[str, Any], ranks: Mapping[str, int]) -> None:
    targets = frozenset(config.get("target_parameters") or ())
    for name, rank in ranks.items():
        if targets.isdisjoint(_ends(name)) == (rank > 0):
            raise ParaError(
                f"parameter '{name}': target_parameters cannot say whether it is adapted, because PEFT matches it "
                "by its ending; use min_rank=1"
            )


def _ends(name: str) -> list[str]:
    """The name and every dotted ending of it: what an entry of a PEFT list may be to match it."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _all_ends(names: Iterable[str]) -> set[str]:
    return {end for name in names for end in _ends(name)}


def _literal_end(key: str) -> str:
    """Characters that every match of a plain key ends with: a cheap test before the regular expression."""
    return "" if re.search(r"\\\w|[^\w\\.^-]", key) else key[re.search(r"[\w-]*$", key).start() :]  # type: ignore[union-attr]


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise ParaError(f"adapter_config.json: {pattern[:200]!r} is not a regular expression ({e}): correct it") from e
