"""PEFT and transformers load what is written: their outputs are those of the merged reference, for every base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import para_ext
from para_ext.report import Report

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from bases import BASES, QUIET, Base, logits, merged, random_adapter, relative_error  # noqa: E402

pytestmark = [*QUIET, pytest.mark.usefixtures("one_thread")]

PATTERNS = {
    "rank_pattern": {"k_proj": 8, "layers.1.self_attn.q_proj": 4},
    "alpha_pattern": {"v_proj": 20, "layers.10.mlp.up_proj": 7, "layers.1.self_attn.q_proj": 9},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in BASES},
    "llama rslora": ("llama", {"use_rslora": True}),
    "llama patterns": ("llama", PATTERNS),
    "llama rslora patterns": ("llama", {"use_rslora": True} | PATTERNS),
    "llama embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "mixtral rslora": ("mixtral", {"use_rslora": True}),
}
TRANSFORMERS = [case for case, (base, _) in CASES.items() if base != "unet"]
# With few modules, or with experts that share one rank, no module is so weak that all of it goes.
NOTHING_DROPPED = ("mixtral", "mixtral rslora")


@dataclass(frozen=True)
class Compressed:
    """A base, an adapter for it, and what para_ext made of that."""

    base: Base
    original: Path
    small: Path
    report: Report

    def loaded(self, folder: Path, **options: Any) -> Any:
        return peft.PeftModel.from_pretrained(self.base.build(), folder, **options).eval()

    def error(self, model: Callable[..., Any], ranks: dict[str, int] | None) -> float:
        """Of a model's logits against the merged reference's."""
        inputs = self.base.inputs()
        return relative_error(logits(model, inputs), logits(merged(self.base.build(), self.original, ranks), inputs))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compressed]:
    """By the name of a case; each is made once."""
    made: dict[str, Compressed] = {}

    def make(case: str) -> Compressed:
        if case not in made:
            name, config = CASES[case]
            if name == "unet":
                pytest.importorskip("diffusers")
            folder = tmp_path_factory.mktemp("case")
            original = random_adapter(BASES[name], folder / "original", **config)
            report = para_ext.compress_adapter(original, folder / "small", keep=0.4)
            made[case] = Compressed(BASES[name], original, folder / "small", report)
        return made[case]

    return make


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_what_peft_computes(compressed: Callable[[str], Compressed], case: str) -> None:
    made = compressed(case)
    assert made.error(made.loaded(made.original), None) <= 1e-5


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_truncated_update(
    compressed: Callable[[str], Compressed], case: str, low_cpu_mem_usage: bool
) -> None:
    made = compressed(case)
    model = made.loaded(made.small, low_cpu_mem_usage=low_cpu_mem_usage)
    assert made.error(model, made.report.ranks) <= 1e-5
    assert made.error(model.merge_and_unload(), made.report.ranks) <= 1e-5


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers_computes_the_truncated_update(compressed: Callable[[str], Compressed], case: str) -> None:
    made = compressed(case)
    model = made.base.build()
    model.load_adapter(str(made.small))
    assert made.error(model.eval(), made.report.ranks) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_the_comparison_is_not_empty(compressed: Callable[[str], Compressed], case: str) -> None:
    """Ranks differ, modules are dropped, and a module too much or too little would be seen."""
    made = compressed(case)
    ranks = made.report.ranks
    assert len(set(ranks.values())) > 2
    assert (0 in ranks.values()) == (case not in NOTHING_DROPPED)
    reference = merged(made.base.build(), made.original, ranks)
    assert made.error(reference, None) > 1e-3
    assert made.error(made.base.build(), ranks) > 1e-2
    # One component less, in the module that has the fewest; twice what the tests allow.
    least = min((name for name in ranks if ranks[name]), key=lambda name: ranks[name])
    assert made.error(reference, ranks | {least: ranks[least] - 1}) > 2e-5
