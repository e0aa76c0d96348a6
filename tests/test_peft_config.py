"""adapter_config.json at unit scale, against the rules of the installed PEFT and a copy of the older lookup."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from para_ext.errors import ParaError
from para_ext.formats.peft_config import MAX_PATTERN_ENTRIES, PatternKeys, Targets, oldest_peft, unit_scale_config

peft = pytest.importorskip("peft", reason="PEFT's own functions are the oracle")
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists  # noqa: E402
from peft.utils.other import get_pattern_key  # noqa: E402

LEAVES = ("q_proj", "k_proj", "v_proj", "fc1")


def config_of(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 32,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": True,
        "init_lora_weights": "eva",
        "inference_mode": False,
        "eva_config": {"rho": 2.0},
        "target_modules": list(LEAVES),
        "exclude_modules": None,
        "lora_dropout": 0.1,
        **changes,
    }


def old_peft(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in ("exclude_modules", "eva_config")}


def loaded(config: dict[str, Any]) -> Any:
    """The config as PEFT reads it back from a file it has saved: keys sorted."""
    return peft.LoraConfig(**json.loads(json.dumps(config, sort_keys=True)))


def injected(config: Any, name: str) -> bool:
    found = check_target_module_exists(config, name)
    return bool(found) and not isinstance(found, _ExcludedModule)


def peft_rank(config: Any, name: str) -> tuple[int, int]:
    r_key, a_key = get_pattern_key(config.rank_pattern, name), get_pattern_key(config.alpha_pattern, name)
    return config.rank_pattern.get(r_key, config.r), config.alpha_pattern.get(a_key, config.lora_alpha)


def old_rank(config: dict[str, Any], name: str) -> int:
    """PEFT up to 0.13: the first key over both patterns that matches after a dot, used for both."""
    keys = [*config["rank_pattern"], *config["alpha_pattern"]]
    key = next((key for key in keys if re.match(rf".*\.{key}$", name)), name)
    assert config["rank_pattern"].get(key) == config["alpha_pattern"].get(key)
    return int(config["rank_pattern"].get(key, config["r"]))


def check(config: dict[str, Any], ranks: dict[str, int], others: tuple[str, ...] = ()) -> dict[str, Any]:
    new = unit_scale_config(config, ranks, others=others)
    as_peft = loaded(new)
    for name, rank in ranks.items():
        assert injected(as_peft, name) == (rank > 0), name
        if rank:
            assert peft_rank(as_peft, name) == (rank, rank), name
            if oldest_peft(new) is None:
                assert old_rank(new, name) == rank, name
    assert not any(injected(as_peft, name) for name in others)
    return new


segment = st.sampled_from(["layers", "vision", "model", "1", "11", "0", "blocks", "a-b", "x_y"])
paths = st.lists(segment, min_size=0, max_size=4)
names = st.builds(lambda path, leaf: ".".join([*path, leaf]), paths, st.sampled_from(LEAVES))
trees = st.dictionaries(names, st.integers(0, 3), min_size=1, max_size=30).filter(lambda ranks: any(ranks.values()))


@settings(max_examples=100, deadline=None)
@given(ranks=trees, old=st.booleans())
def test_peft_injects_exactly_the_kept(ranks: dict[str, int], old: bool) -> None:
    check(old_peft(config_of()) if old else config_of(), ranks)


@settings(max_examples=60, deadline=None)
@given(
    ranks=trees,
    excluded=st.one_of(st.none(), st.lists(names, max_size=3), st.just(r"other\..*|lm_head")),
    layers=st.one_of(st.none(), st.integers(0, 1), st.lists(st.sampled_from([0, 1, 11]), min_size=1, max_size=2)),
    pattern=st.sampled_from([None, "layers", ["layers", "blocks"]]),
    saved=st.sampled_from([None, ["head"], ["vision"]]),
    targets=st.sampled_from([list(LEAVES), ["q_proj", "layers.1.k_proj"], r".*\.(q_proj|fc1)"]),
    name=names,
)
def test_targets_are_those_of_peft(
    ranks: dict[str, int], excluded: Any, layers: Any, pattern: Any, saved: Any, targets: Any, name: str
) -> None:
    if isinstance(targets, str) or layers is None:
        layers = pattern = None
    config = config_of(
        exclude_modules=excluded,
        layers_to_transform=layers,
        layers_pattern=pattern,
        modules_to_save=saved,
        target_modules=targets,
    )
    ours, as_peft = Targets(config), loaded(config)
    for module in [*ranks, name]:
        assert (module in ours) == injected(as_peft, module), module
    kept = {module: rank for module, rank in ranks.items() if module in ours}
    if any(kept.values()):
        check(config, kept, tuple(module for module in ranks if module not in kept))


@given(keys=st.lists(names, max_size=5), name=names)
def test_pattern_lookup_is_that_of_peft(keys: list[str], name: str) -> None:
    keys = [*keys, r"(q|k)_proj", r"\w+\.1.fc1"]
    assert PatternKeys(keys).find(name) == get_pattern_key(keys, name)
    assert PatternKeys(keys, old=True).find(name) == next((k for k in keys if re.match(rf".*\.{k}$", name)), name)


def test_a_dropped_tower_does_not_take_the_other_with_it() -> None:
    new = check(config_of(), {"layers.0.q_proj": 0, "vision.layers.0.q_proj": 2, "layers.1.q_proj": 3})
    assert new["exclude_modules"] == r"(?:layers\.0\.q_proj)"
    new = check(old_peft(config_of()), {"layers.0.q_proj": 2, "vision.layers.0.q_proj": 0, "layers.1.q_proj": 3})
    assert new["target_modules"] == r"(?:layers\.0\.q_proj|layers\.1\.q_proj)"
    assert "exclude_modules" not in new


def test_dots_of_a_plain_key_would_match_other_layers() -> None:
    ranks = {"blocks.1.1.q_proj": 1, "blocks.111.q_proj": 2, "blocks.11.q_proj": 3}
    check(config_of(), {f"model.{name}": rank for name, rank in ranks.items()})
    new = check(config_of(), {"a.b.q_proj": 1, "axb.q_proj": 2, "c.q_proj": 3})
    assert list(new["rank_pattern"]) == [r"^a\.b\.q_proj", r"^axb\.q_proj"]
    assert oldest_peft(new) == "0.15"


def test_plain_keys_where_every_release_reads_them() -> None:
    new = check(config_of(), {"m.layers.1.q_proj": 1, "m.layers.11.q_proj": 2, "m.layers.2.q_proj": 5})
    assert new["rank_pattern"] == {"m.layers.1.q_proj": 1, "m.layers.11.q_proj": 2} == new["alpha_pattern"]


def test_unit_scale_fields() -> None:
    source = config_of(loftq_config={}, corda_config=None, base_model_name_or_path="org/model")
    before = json.dumps(source)
    new = unit_scale_config(source, {"q_proj": 3, "k_proj": 3})
    assert json.dumps(source) == before
    assert new == source | {
        "r": 3, "lora_alpha": 3, "use_rslora": False, "init_lora_weights": True, "inference_mode": True,
        "eva_config": None, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    assert type(new["lora_alpha"]) is int
    bare = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"]}
    assert unit_scale_config(bare, {"q_proj": 8, "k_proj": 8}).keys() == bare.keys()
    assert unit_scale_config(bare, {"q_proj": 8, "k_proj": 4}).keys() == bare.keys() | {"rank_pattern", "alpha_pattern"}


def test_a_leaf_dropped_everywhere_leaves_the_list() -> None:
    ranks = {f"layers.{i}.{leaf}": 0 if leaf == "fc1" else i for i in range(1, 4) for leaf in LEAVES}
    for source in (config_of(), old_peft(config_of())):
        new = check(source, ranks)
        assert new["target_modules"] == ["q_proj", "k_proj", "v_proj"]
        assert new.get("exclude_modules") is None


@pytest.mark.parametrize(
    ("old", "joined"),
    [
        (None, r"(?:layers\.0\.q_proj)"),
        ("", r"(?:layers\.0\.q_proj)"),
        (["lm_head", "a.b"], r"(?:.*\.)?lm_head|(?:.*\.)?a\.b|(?:layers\.0\.q_proj)"),
        (r"a|vision\..*", r"(?:a|vision\..*)|(?:layers\.0\.q_proj)"),
    ],
)
def test_excluded_names_join_the_old_value(old: Any, joined: str) -> None:
    others = ("vision.layers.0.q_proj",) if isinstance(old, str) and old else ()
    new = check(config_of(exclude_modules=old), {"layers.0.q_proj": 0, "layers.1.q_proj": 1}, others)
    assert new["exclude_modules"] == joined


def test_a_regex_forbids_layers_to_transform() -> None:
    source = old_peft(config_of(layers_to_transform=[0, 1], layers_pattern="layers"))
    new = check(source, {"m.layers.0.q_proj": 0, "m.layers.1.q_proj": 1})
    assert isinstance(new["target_modules"], str)
    assert new["layers_to_transform"] is None is new["layers_pattern"]
    kept = check(config_of(layers_to_transform=[0, 1]), {"m.layers.0.q_proj": 0, "m.layers.1.q_proj": 1})
    assert kept["layers_to_transform"] == [0, 1]


def test_other_modules_of_the_base_model_stay_out() -> None:
    """The source targets a module it holds no tensors for; only full names keep it out."""
    new = check(config_of(), {"a.q_proj": 1, "b.q_proj": 2}, others=("c.q_proj", "head"))
    assert new["target_modules"] == r"(?:a\.q_proj|b\.q_proj)"


def test_all_linear_excludes_what_was_dropped() -> None:
    new = unit_scale_config(config_of(target_modules="all-linear"), {"a.q": 1, "b.q": 0}, others=("c",))
    assert (new["target_modules"], new["exclude_modules"]) == ("all-linear", r"(?:b\.q)")


def test_parameters_leave_their_own_list() -> None:
    ranks = {f"m.{i}.experts.{leaf}": k for i, leaf, k in [(0, "up", 0), (1, "up", 2), (0, "down", 0), (1, "down", 0)]}
    source = config_of(target_parameters=["experts.up", "experts.down"])
    new = unit_scale_config(source, {**ranks, "m.0.q_proj": 4}, parameters=list(ranks))
    assert new["target_parameters"] == ["m.1.experts.up"]
    assert new["rank_pattern"] == {"m.1.experts.up": 2}
    assert new["exclude_modules"] is None
    with pytest.raises(ParaError, match=r"parameter 'v\.experts\.up'.*min_rank=1"):
        unit_scale_config(source, {"experts.up": 1, "v.experts.up": 0}, parameters=["experts.up", "v.experts.up"])


def test_only_parameters_left() -> None:
    source = config_of(target_parameters=["experts.up"])
    new = unit_scale_config(source, {"m.q_proj": 0, "m.experts.up": 2}, parameters=["m.experts.up"], others=("m.fc1",))
    as_peft = loaded(new)
    assert not any(injected(as_peft, name) for name in ("m.q_proj", "m.fc1"))


def test_refusals() -> None:
    with pytest.raises(ParaError, match="at least one module"):
        unit_scale_config(config_of(), {"q_proj": 0})
    with pytest.raises(ParaError, match=r"module 'm\.q_proj': no target_modules"):
        unit_scale_config(config_of(modules_to_save=["m"]), {"m.q_proj": 1})
    with pytest.raises(ParaError, match="not a regular expression"):
        unit_scale_config(config_of(exclude_modules="("), {"q_proj": 1})


@pytest.mark.parametrize("step", [1, 3])
def test_790_modules_in_a_second(step: int) -> None:
    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    modules = [f"model.language_model.layers.{i}.x.{leaf}" for i in range(113) for leaf in leaves][:790]
    ranks = {name: (i % 16 if i % step == 0 else 16) for i, name in enumerate(modules)}
    started = time.perf_counter()
    new = unit_scale_config(config_of(target_modules=leaves), ranks, others=modules)
    assert time.perf_counter() - started < 1
    assert len(new["rank_pattern"]) == (14 if step == 1 else sum(0 < k < 16 for k in ranks.values()))
    assert len(new["rank_pattern"]) <= MAX_PATTERN_ENTRIES
    assert oldest_peft(new) == ("0.15" if step == 1 else None)
    as_peft = loaded(new)
    for name in modules[::7]:
        assert injected(as_peft, name) == (ranks[name] > 0)
        assert not ranks[name] or peft_rank(as_peft, name) == (ranks[name],) * 2


@pytest.mark.parametrize("old", ["(?i).*LM_HEAD", "(?x) .*lm_head  # the head", "(?is).*LM_HEAD"])
def test_flags_of_an_old_exclude_modules_stay_its_own(old: str) -> None:
    config = {"r": 8, "lora_alpha": 8, "target_modules": ["q", "lm_head"], "exclude_modules": old}
    new = unit_scale_config(config, {"layers.0.q": 0, "layers.1.q": 4}, others=["lm_head"])
    excluded = re.compile(new["exclude_modules"])
    assert excluded.fullmatch("lm_head")
    assert excluded.fullmatch("layers.0.q")
    assert not excluded.fullmatch("layers.1.q")
    assert not excluded.fullmatch("LAYERS.0.Q")
