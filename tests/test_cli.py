"""The command line: what it prints, its exit codes, and that every refusal is one line that leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import contents, factors, write_adapter
from safetensors.torch import load_file, save_file

from para_ext import ParaError, cli, compress_adapter

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["para-ext", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code
        shown = capsys.readouterr()
        return code or 0, shown.out, shown.err

    return call


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def test_help_is_quick_and_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['para-ext', '--help']\n"
        "from para_ext.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - start)
        assert shown.endswith("False False\n")
        assert "compress" in shown
    bare = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        bare.append(time.perf_counter() - start)
    # 0.3 s on a quiet machine; a busy one is as slow at starting Python at all.
    assert statistics.median(seconds) < max(0.3, 12 * statistics.median(bare))


@pytest.mark.parametrize("command", ["inspect", "compress", "convert", "merge", "plan", "report", "verify", "info"])
def test_every_command_has_help_with_examples(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "--json" in out
    examples = [line.split() for line in out.splitlines() if line.startswith("    para-ext ")]
    assert examples
    for words in examples:
        assert words[1] == command
        known = {name for parameter in cli.cli.commands[command].params for name in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known


def test_help_groups_options(run: Run) -> None:
    """Every option once, and those that every command has at the end."""
    _, out, _ = run("compress", "--help")
    titles = [line for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert [title.split()[0] for title in titles] == ["Budget:", "Shape", "Reader:", "Output:", "Work:", "Options:"]
    for parameter in cli.cli.commands["compress"].params:
        for name in parameter.opts:
            assert sum(line.split()[:1] == [name] for line in out.splitlines()) == name.startswith("-")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete(tmp_path: Path, shell: str) -> None:
    """Scripts for the shell; adapters as paths, options by their names, choices by their values."""
    code = "import sys; sys.argv = ['para-ext']; from para_ext.cli import main; main()"

    def completed(step: str, words: str = "", last: str = "", **more: str) -> str:
        environment = {**os.environ, "_PARA_EXT_COMPLETE": f"{shell}_{step}", "COMP_WORDS": f"para-ext {words}{last}"}
        environment |= {"COMP_CWORD": last if shell == "fish" else str(1 + len(words.split()))}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
        )
        assert done.stderr == ""
        return done.stdout

    script = completed("source")
    assert "_PARA_EXT_COMPLETE" in script and "para-ext" in script
    assert "file" in completed("complete", "inspect ", "ada")
    assert "file" in completed("complete", "merge ", "sty")
    assert "--keep" in completed("complete", "compress ", "--ke")
    assert "trtllm" in completed("complete", "compress --target ", "tr")


def test_messages_name_options_as_the_caller_writes_them(run: Run, adapter: Path, tmp_path: Path) -> None:
    """keep=0.05 from Python, --keep 0.05 here; names of paths stay as they are."""
    odd = adapter.rename(tmp_path / "rank=8")
    for arguments, python, here in (
        (("--keep", "7"), r"^keep='7' is out of range", "para-ext: --keep 7 is out of range"),
        (("--multiple-of", "0"), "^multiple_of=0 is", "para-ext: --multiple-of 0 is out of range"),
        (("--allowed-ranks", "2,x"), None, "para-ext: --allowed-ranks 2,x is not a list"),
        (("--target", "gguf"), "give its folder by base=$", "needs the base model: give its folder by --base\n"),
        (("--dtype", "fp16"), "such as dtype='bf16'$", "such as --dtype bf16\n"),
    ):
        if "--dtype" in arguments:
            _damage(odd, "overflow")
        code, _, err = run("compress", odd, tmp_path / "out", *arguments)
        assert (code, err.count("\n")) == (1, 1)
        assert here in err
        if python is not None:
            name, value = arguments[0].strip("-").replace("-", "_"), arguments[1]
            with pytest.raises(ParaError, match=python):
                compress_adapter(odd, tmp_path / "out", **{name: int(value) if value == "0" else value})
    _, _, err = run("inspect", tmp_path / "rank=9")
    assert f"'{tmp_path}/rank=9' does not exist" in err
    _, out, _ = run("compress", write_adapter(tmp_path / "a"), tmp_path / "b", "--uniform", "all")
    assert "--allowed-ranks 1,2,4,6." in out and "--energy 0.95 is a good one" in out


def test_the_library_names_no_options() -> None:
    """A caller from Python has none. (Charts are drawn for readers of the command line.)"""
    options = {name for command in cli.cli.commands.values() for p in command.params for name in p.opts if "--" in name}
    for file in Path(cli.__file__).parent.rglob("*.py"):
        if file.name not in ("cli.py", "options.py", "charts.py"):
            text = file.read_text(encoding="utf-8").replace("``--json``", "")
            found = {name for name in options if re.search(rf"(?<![\w-]){name}(?![\w-])", text)}
            assert not found, f"{file.name} names {found}"


@pytest.mark.parametrize("columns", [160, 80, 62, 40])
def test_a_narrow_terminal_cuts_no_number(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, columns: int
) -> None:
    """And of the worst module's name it shows the end, or nothing."""
    pairs = [(f"base.language_model.with.a.long.name.{name}", B, A) for name, B, A in factors()]
    adapter = write_adapter(tmp_path / "adapter", pairs)
    run("compress", adapter, tmp_path / "small", "--keep", "0.5")
    _, wide, _ = run("verify", adapter, tmp_path / "small")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = run("verify", adapter, tmp_path / "small")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", out).splitlines()
    expected = {line.split()[0]: line.split() for line in wide.splitlines() if line.startswith(" ") and "→" in line}
    assert len(expected) == 4
    for line in lines:
        assert len(line.rstrip()) <= columns
        if line.split()[:1] and line.split()[0] in expected:
            *numbers, name = expected[line.split()[0]]
            assert line.split()[: len(numbers)] == numbers
            shown = line.split()[len(numbers) :]
            assert shown == ([name] if columns == 160 else [] if columns == 40 else shown)
            assert not shown or (name.endswith(shown[0].lstrip("…")) and len(shown[0]) >= 16)


def test_compress_prints_table_and_summary(run: Run, adapter: Path, tmp_path: Path) -> None:
    code, out, err = run("compress", adapter, tmp_path / "small", "--keep", "40%")
    assert code == 0
    assert err == ""
    lines = out.splitlines()
    for name in ("q_proj", "v_proj", "up", "all"):
        assert any(line.split()[:1] == [name] for line in lines)
    assert all(word in lines[-1] for word in ("ranks ", "parameters", "→", "energy kept ", "threshold ", " s"))


def test_low_energy_is_said_with_the_keep_that_would_do(run: Run, adapter: Path, tmp_path: Path) -> None:
    _, out, _ = run("compress", adapter, tmp_path / "tiny", "--keep", "0.05")
    assert "Energy kept is below 90%; --keep " in out
    keep = out.split("--keep ")[1].split()[0]
    code, out, _ = run("compress", adapter, tmp_path / "better", "--keep", keep, "--json")
    assert code == 0
    assert json.loads(out)["energy"] >= 0.95


def test_json_and_report_file(run: Run, adapter: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code, out, _ = run("compress", adapter, tmp_path / "small", "--json", "--report", report)
    assert code == 0
    document = json.loads(out)
    assert json.loads(report.read_text()) == document
    assert document["plan"]["budget"] == "energy"
    assert document["energy"] >= 0.95
    assert len(document["modules"]) == 9
    code, _, err = run("compress", adapter, tmp_path / "other", "--report", report)
    assert code == 1
    assert "exists: give another --report, or --overwrite" in err
    other = write_adapter(tmp_path / "b", factors(seed=1))
    for words in (("merge", f"{adapter}=1", f"{other}=1", "-o"), ("convert", adapter, "--target", "peft")):
        again = (*words, tmp_path / words[0], "--report", tmp_path / f"{words[0]}.json", "--json")
        code, out, _ = run(*again)
        assert code == 0
        assert json.loads((tmp_path / f"{words[0]}.json").read_text()) == json.loads(out)


def test_several_keeps(run: Run, adapter: Path, tmp_path: Path) -> None:
    code, out, _ = run("compress", adapter, tmp_path / "many", "--keep", "0.5", "--keep", "10%", "--json")
    assert code == 0
    assert [Path(r["output"]).name for r in json.loads(out)] == ["keep-0.5", "keep-0.1"]
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["keep-0.1", "keep-0.5"]


def test_every_table_of_several_says_what_of(run: Run, adapter: Path, tmp_path: Path) -> None:
    """Outputs by their names, predictions by their budgets and targets."""
    several = ("--keep", "0.5", "--keep", "10%")
    run("inspect", adapter, "--spectra", tmp_path / "s.json")
    _, out, _ = run("plan", tmp_path / "s.json", *several)
    assert [line.rstrip() for line in out.splitlines() if ".json" in line] == [
        f"{tmp_path}/s.json, keep 0.5",
        f"{tmp_path}/s.json, keep 0.1",
    ]
    _, out, _ = run("compress", adapter, tmp_path / "out", *several, "--target", "vllm", "--dry-run")
    assert f"{adapter}, keep 0.5, for vllm" in out and f"{adapter}, keep 0.1, for vllm" in out
    _, out, _ = run("compress", adapter, tmp_path / "out", *several)
    assert f"{adapter} → {tmp_path}/out/keep-0.5" in out and f"{adapter} → {tmp_path}/out/keep-0.1" in out
    assert f"{tmp_path}/s.json, size 20,000" in run("plan", tmp_path / "s.json", "--size", "20kB")[1]
    assert f"{tmp_path}/s.json, energy 0.95" in run("plan", tmp_path / "s.json")[1]


def test_dry_run_writes_nothing(run: Run, adapter: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run("compress", adapter, tmp_path / "small", "--size", "20kB", "--dry-run")
    assert code == 0
    assert "energy kept" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_overwrite(run: Run, adapter: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    assert run("compress", adapter, small, "--keep", "0.5")[0] == 0
    first = contents(small)
    code, _, err = run("compress", adapter, small, "--keep", "0.25")
    assert code == 1
    assert "--overwrite" in err
    assert contents(small) == first
    assert run("compress", adapter, small, "--keep", "0.25", "--overwrite")[0] == 0
    assert contents(small) != first


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "fp16", "float32", "same"])
def test_dtype(run: Run, adapter: Path, tmp_path: Path, dtype: str) -> None:
    assert run("compress", adapter, tmp_path / "small", "--dtype", dtype)[0] == 0
    expected = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    assert {t.dtype for t in load_file(tmp_path / "small" / "adapter_model.safetensors").values()} == {expected}


def test_shaping_options(run: Run, adapter: Path, tmp_path: Path) -> None:
    code, out, _ = run(
        "compress", adapter, tmp_path / "small", "--keep", "0.5", "--allowed-ranks", "2,4,8", "--max-rank", "4",
        "--min-rank", "2", "--score", "sigma", "--json",
    )  # fmt: skip
    assert code == 0
    assert set(json.loads(out)["plan"]["ranks"].values()) <= {2, 4}
    code, out, _ = run("compress", adapter, tmp_path / "uniform", "--keep", "0.5", "--uniform", "all", "--json")
    assert set(json.loads(out)["plan"]["ranks"].values()) == {4}


def test_verify_sets_the_exit_code(run: Run, adapter: Path, tmp_path: Path) -> None:
    run("compress", adapter, tmp_path / "small", "--energy", "0.95")
    assert run("verify", adapter, tmp_path / "small")[0] == 0
    assert run("verify", adapter, tmp_path / "small", "--min-energy", "0.9", "--max-error", "0.3")[0] == 0
    assert run("verify", adapter, tmp_path / "small", "--min-energy", "90%", "--max-error", "30%")[0] == 0
    for nonsense in ("90", "-1", "much", "nan", "150%"):
        code, _, err = run("verify", adapter, tmp_path / "small", "--min-energy", nonsense)
        assert code == 2 and "is not a part from 0 to 1" in err
    code, out, err = run("verify", adapter, tmp_path / "small", "--min-energy", "0.9999")
    assert code == 1
    assert "less than --min-energy" in err
    assert "q_proj" in out
    code, out, _ = run("verify", adapter, tmp_path / "small", "--max-error", "0.001", "--json")
    assert code == 1
    assert 0.95 <= json.loads(out)["energy"] < 1
    code, out, _ = run("verify", adapter, adapter, "--max-error", "0")
    assert code == 0


def test_verify_of_another_model_is_refused(run: Run, adapter: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", [(name, B[:-1], A) for name, B, A in factors()])
    code, _, err = run("verify", adapter, other)
    assert code == 1
    assert "same base model" in err


def test_inspect(run: Run, adapter: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    code, out, _ = run("inspect", adapter)
    assert code == 0
    assert "--energy 0.95" in out
    assert "q_proj" in out
    code, out, _ = run("inspect", adapter, "--json")
    document = json.loads(out)
    assert document["module_count"] == 9
    assert sum(t["energy_share"] for t in document["types"]) == pytest.approx(1)
    assert contents(tmp_path) == before


def test_files_that_were_asked_for_are_named(run: Run, adapter: Path, tmp_path: Path) -> None:
    spectra, report = tmp_path / "spectra.json", tmp_path / "report.json"
    assert run("inspect", adapter, "--spectra", spectra)[1].endswith(f"\nWritten: {spectra}\n")
    assert run("compress", adapter, tmp_path / "out", "--report", report)[1].endswith(f"\nWritten: {report}\n")
    assert json.loads(run("inspect", adapter, "--spectra", spectra, "--json")[1])["module_count"] == 9
    before = contents(adapter)
    for option in ("--spectra", "--plot"):
        code, _, err = run("inspect", adapter, option, adapter / "adapter_config.json")
        assert code == 1
        assert f"lies inside an adapter: give {option} a place elsewhere" in err
    assert contents(adapter) == before


def test_plot(run: Run, adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run("inspect", adapter, "--plot", tmp_path / "spectra.png")[0] == 0
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = run("inspect", adapter, "--plot", tmp_path / "spectra.nonsense")
    assert code == 1
    assert "cannot be drawn" in err


def test_info(run: Run) -> None:
    code, out, _ = run("info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert "torch" in facts["backends"]
    assert facts["cuda"]
    assert "native core" in run("info")[1]


@pytest.mark.parametrize(
    "arguments",
    [(), ("compress",), ("compress", "a", "b", "--kee", "0.5"), ("compress", "a", "b", "--score", "x"), ("nonsense",)],
    ids=" ".join,
)
def test_usage_errors_exit_2(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert "Usage:" in out + err


# Bad input: each is one line that says what, where and what to do; nothing is written, nothing changed.


def _damage(adapter: Path, kind: str) -> None:
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    settings, tensors = json.loads(config.read_text()), load_file(weights)
    key = "base_model.model.layers.1.attn.q_proj.lora_B.weight"
    metadata = {"format": "pt"}
    if kind == "empty":
        weights.write_bytes(b"")
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "lfs":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif kind == "nan":
        tensors[key][0, 0] = torch.nan
        save_file(tensors, weights, metadata)
    elif kind == "shape":
        tensors[key] = torch.zeros(48, 5)
        save_file(tensors, weights, metadata)
    elif kind == "no A":
        del tensors[key.replace("lora_B", "lora_A")]
        save_file(tensors, weights, metadata)
    elif kind == "rank":
        config.write_text(json.dumps(settings | {"r": 4}))
    elif kind == "alpha":
        config.write_text(json.dumps(settings | {"lora_alpha": "many"}))
    elif kind == "type":
        config.write_text(json.dumps(settings | {"peft_type": "LOKR"}))
    elif kind == "adalora":
        config.write_text(json.dumps(settings | {"peft_type": "ADALORA"}))
    elif kind == "pissa":
        config.write_text(json.dumps(settings | {"init_lora_weights": "pissa"}))
    elif kind == "duplicate keys":
        config.write_text(json.dumps(settings)[:-1] + ', "r": 4}')
    elif kind == "double prefix":
        save_file({f"base_model.model.{k}": t for k, t in tensors.items()}, weights, metadata)
    elif kind == "no config":
        config.unlink()
    elif kind == "bad config":
        config.write_text("{")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "overflow":
        save_file({k: t * 1e6 for k, t in tensors.items()}, weights, metadata)
    elif kind == "underflow":
        save_file({k: t * 1e-9 for k, t in tensors.items()}, weights, metadata)
    elif kind == "pickle":
        weights.unlink()
        torch.save({"x": Path("evil")}, adapter / "adapter_model.bin")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("empty", "empty"), ("truncated", "safetensors"), ("lfs", "git lfs pull"), ("nan", "layers.1.attn.q_proj"),
        ("shape", "layers.1.attn.q_proj"), ("no A", "layers.1.attn.q_proj"), ("rank", "rank"), ("alpha", "lora_alpha"),
        ("type", "LOKR"), ("adalora", "ADALORA"), ("pissa", "pissa"), ("duplicate keys", "twice"),
        ("double prefix", "base_model.model.base_model.model."), ("no config", "adapter_config.json"),
        ("bad config", "adapter_config.json"), ("no weights", "adapter_model.safetensors"), ("overflow", "--dtype"),
        ("underflow", "--dtype"), ("pickle", "pickle"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(
    run: Run, adapter: Path, tmp_path: Path, kind: str, says: str
) -> None:
    _damage(adapter, kind)
    before = contents(tmp_path)
    code, out, err = run("compress", adapter, tmp_path / "small", "--keep", "0.5", "--dtype", "fp16")
    assert code == 1
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("para-ext: ")
    assert says.lower() in err.lower()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--keep", "0.5", "--rank", "2"), "one budget"),
        (("--keep", "1.5"), "keep"),
        (("--keep", "many"), "keep"),
        (("--keep", "nan"), "keep"),
        (("--energy", "2"), "energy"),
        (("--rank", "0"), "rank"),
        (("--threshold", "1e9"), "largest"),
        (("--threshold", "1", "--score", "density"), "score"),
        (("--size", "10"), "smallest feasible"),
        (("--size", "ten"), "size"),
        (("--params", "3"), "smallest feasible"),
        (("--keep", "0.1", "--min-rank", "4"), "smallest feasible"),
        (("--allowed-ranks", "two"), "4,8,16"),
        (("--multiple-of", "16"), "multiple_of"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else None,
)
def test_refused_budgets(run: Run, adapter: Path, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    code, _, err = run("compress", adapter, tmp_path / "small", *arguments)
    assert code == 1
    assert err.count("\n") == 1
    assert says in err
    assert not (tmp_path / "small").exists()


def test_missing_adapter_is_one_line(run: Run, tmp_path: Path) -> None:
    code, _, err = run("inspect", tmp_path / "nowhere")
    assert code == 1
    assert "does not exist" in err


def test_output_on_the_input_is_refused(run: Run, adapter: Path) -> None:
    before = contents(adapter)
    for out in (adapter, adapter / "small", adapter.parent):
        assert run("compress", adapter, out, "--overwrite")[0] == 1
    assert contents(adapter) == before


def test_no_space_left(run: Run, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run("compress", adapter, tmp_path / "small")
    assert code == 1
    assert "no space left" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


# Names and paths that look like something else.


def test_brackets_in_names_and_paths_are_text(run: Run, tmp_path: Path) -> None:
    pairs = [(name.replace("q_proj", "q[/b]"), B, A) for name, B, A in factors()]
    adapter = write_adapter(tmp_path / "a[/b]", pairs, target_modules=["q[/b]", "v_proj", "up"])
    code, out, _ = run("compress", adapter, tmp_path / "o[/b]", "--keep", "0.5")
    assert code == 0
    assert "q[/b]" in out
    assert run("verify", adapter, tmp_path / "o[/b]")[0] == 0
    assert "q[/b]" in run("inspect", adapter)[1]


def test_names_cannot_steer_the_terminal(run: Run, tmp_path: Path) -> None:
    """Line ends and escapes in names of modules, files and folders are spelt out in every table and refusal."""
    pairs = [(name.replace("q_proj", "q\x1b[2J\n\u202e"), B, A) for name, B, A in factors()]
    adapter = write_adapter(tmp_path / "a\x1b[1m", pairs, target_modules=["q\x1b[2J\n\u202e", "v_proj", "up"])
    (adapter / "no\nte.bin").write_bytes(b"x")
    small = tmp_path / "o\x1b[1m"
    for words in (
        ("inspect", adapter),
        ("compress", adapter, small, "--keep", "0.5"),
        ("compress", adapter, small),
        ("verify", adapter, small),
        ("inspect", tmp_path / "\x1b[1m"),
        ("compress", adapter, small, "--overwrite", "--report", tmp_path / "\x1b[1m" / "r"),
    ):
        _, out, err = run(*words)
        assert all(line.isprintable() for line in (out + err).splitlines())
        assert r"\x1b[2J\n\u202e" in out or r"\x1b[1m" in err
    assert r"Not copied: no\nte.bin." in run("compress", adapter, small, "--overwrite")[1]


def test_output_without_utf8_is_no_traceback(adapter: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "para_ext", "compress", str(adapter), str(tmp_path / "small")],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_report_never_replaces_a_part_of_an_adapter(run: Run, adapter: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    small = tmp_path / "small"
    for report in (adapter / "adapter_config.json", small / "adapter_config.json", tmp_path / "nowhere" / "x.json"):
        code, _, err = run("compress", adapter, small, "--keep", "0.5", "--overwrite", "--report", report)
        assert code == 1
        assert "--report" in err
        assert contents(tmp_path) == before


def test_a_damaged_isa_setting_is_one_line(run: Run, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = pytest.importorskip("para_ext.backends.cpu")
    monkeypatch.setattr(cpu, "ISA", "abacus")
    code, _, err = run("inspect", adapter)
    assert code == 1
    assert "PARA_EXT_ISA is 'abacus'" in err


def test_plan_from_spectra_says_what_compress_then_measures(run: Run, adapter: Path, tmp_path: Path) -> None:
    spectra = tmp_path / "spectra.json"
    assert run("inspect", adapter, "--spectra", spectra)[0] == 0
    code, out, _ = run("plan", spectra, "--keep", "0.3", "--json")
    planned = json.loads(out)
    _, out, _ = run("compress", adapter, tmp_path / "small", "--keep", "0.3", "--json")
    done = json.loads(out)
    assert code == 0
    assert planned["predicted"] and not done["predicted"]
    assert planned["plan"]["ranks"] == done["plan"]["ranks"]
    assert planned["bytes_after"] == done["bytes_after"]
    assert done["error"] == pytest.approx(planned["error"], rel=1e-6, abs=1e-6 * done["norm"])  # what rounding adds
    code, out, _ = run("plan", spectra, "--keep", "0.5", "--keep", "0.1")
    assert code == 0
    assert out.count("energy kept") >= 2
    assert run("plan", adapter, "--keep", "0.5")[0] == 1


def test_several_targets_and_budgets_are_several_folders(run: Run, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, _ = run(
        "compress", adapter, out, "--target", "peft", "--target", "vllm", "--keep", "0.5", "--keep", "0.25"
    )
    assert code == 0
    found = {str(path.parent.relative_to(out)) for path in out.rglob("adapter_model.safetensors")}
    assert found == {f"{target}/keep-{keep}" for target in ("peft", "vllm") for keep in ("0.5", "0.25")}
    code, _, error = run(
        "compress", adapter, tmp_path / "x.safetensors", "--target", "kohya", "--keep", "1", "--keep", ".5"
    )
    assert code == 1
    assert error.count("\n") == 1


def test_merge(run: Run, adapter: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", factors(seed=3, rank=4))
    code, out, _ = run("merge", f"{adapter}=0.6", f"{other}=-0.4", "-o", tmp_path / "sum")
    assert code == 0
    assert "A weighted sum: 0.6 ×" in out
    code, out, _ = run("merge", f"{adapter}=0.6", f"{other}=-0.4", "-o", tmp_path / "small", "--keep", "25%", "--json")
    assert code == 0
    assert json.loads(out)["parameters_after"] <= 0.25 * json.loads(out)["parameters_before"]
    for words in (f"{adapter}", f"{adapter}=x", "=1"):
        assert run("merge", words, f"{other}=1", "-o", tmp_path / "no")[0] == 2
    assert run("merge", f"{other}=1", f"{other}=1", "-o", tmp_path / "no")[0] == 2
    assert not (tmp_path / "no").exists()


def test_familiar_rules(run: Run, adapter: Path, tmp_path: Path) -> None:
    for rule in (("sv_fro", "0.9"), ("sv_ratio", "10"), ("sv_cumulative", "80%")):
        code, _, _ = run(
            "compress", adapter, tmp_path / rule[0], "--dynamic-method", rule[0], "--dynamic-param", rule[1]
        )
        assert code == 0
    assert run("compress", adapter, tmp_path / "layer", "--layer-energy", "90%", "--max-rank", 4)[0] == 0
    assert run("compress", adapter, tmp_path / "no", "--dynamic-method", "sv_fro")[0] == 2
    code, out, _ = run("compress", adapter, tmp_path / "knee", "--auto", "knee")
    assert code == 0
    assert "The knee of energy" in out
