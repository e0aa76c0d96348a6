"""docs/json.md is what the commands print: every field, of that type, and no other."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import factors, write_adapter

from para_ext import cli

DOCUMENT = Path(__file__).parents[1] / "docs" / "json.md"
PRIMITIVES: dict[str, Callable[[Any], bool]] = {
    "string": lambda x: type(x) is str,
    "integer": lambda x: type(x) is int,
    "number": lambda x: type(x) in (int, float),
    "boolean": lambda x: type(x) is bool,
    "object": lambda x: type(x) is dict,
}


def tables() -> dict[str, dict[str, str]]:
    """Type by field, by the name of the table."""
    found: dict[str, dict[str, str]] = {}
    for section in DOCUMENT.read_text(encoding="utf-8").split("\n### ")[1:]:
        name = section.partition("\n")[0]
        found[name] = dict(
            re.findall(r"^\| `(\w+)` \| ([\w ]+?) \| .*\|$", section.partition("\n## ")[0], re.MULTILINE)
        )
    return found


TABLES = tables()


def check(value: Any, wanted: str, where: str) -> None:
    """Fail unless the value is of the documented type, all the way down."""
    if wanted.endswith(" or null"):
        if value is not None:
            check(value, wanted.removesuffix(" or null"), where)
    elif wanted.startswith("list of "):
        assert type(value) is list, where
        for item in value:
            check(item, wanted.removeprefix("list of "), f"{where}[]")
    elif wanted.startswith("object of "):
        assert type(value) is dict, where
        for item in value.values():
            check(item, wanted.removeprefix("object of "), f"{where}.*")
    elif wanted in PRIMITIVES:
        assert PRIMITIVES[wanted](value), f"{where} is {value!r:.40}, not of the type {wanted}"
    else:
        assert sorted(value) == sorted(TABLES[wanted]), where
        for field, kind in TABLES[wanted].items():
            check(value[field], kind, f"{where}.{field}")


Printed = Callable[..., Any]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Printed:
    """What a command prints with --json."""

    def run(*arguments: object) -> Any:
        monkeypatch.setattr(sys, "argv", ["para-ext", *map(str, arguments), "--json"])
        cli.main()
        shown = capsys.readouterr()
        assert shown.err == ""
        return json.loads(shown.out)

    return run


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", factors(layers=4))


def test_every_command_prints_what_is_documented(printed: Printed, adapter: Path, tmp_path: Path) -> None:
    other, small, spectra, page = (tmp_path / name for name in ("other", "small", "spectra.json", "page.html"))
    write_adapter(other, factors(layers=4, seed=1))
    commands: dict[str, list[tuple[object, ...]]] = {
        "report": [
            ("compress", adapter, small, "--keep", "0.5", "--report", tmp_path / "report.json"),
            ("compress", adapter, tmp_path / "dry", "--max-rank", "4", "--size", "20kB", "--dry-run"),
            ("compress", adapter, tmp_path / "peft", "--target", "peft"),
            ("convert", adapter, tmp_path / "vllm", "--target", "vllm"),
            ("merge", f"{adapter}=0.5", f"{other}=0.5", "-o", tmp_path / "sum"),
        ],
        "list of report": [("compress", adapter, tmp_path / "many", "--keep", "0.5", "--keep", "0.25")],
        "inspection": [("inspect", adapter, "--spectra", spectra)],
        "verification": [("verify", adapter, small), ("verify", adapter, adapter)],
        "installation": [("info",)],
    }
    pytest.importorskip("plotly")
    commands["page"] = [("report", adapter, small, "-o", page)]
    for kind, lines in commands.items():
        for line in lines:
            check(printed(*line), kind, f"para-ext {line[0]}")
    check(printed("plan", spectra, "--keep", "0.5"), "report", "para-ext plan")
    check(printed("plan", spectra, "--keep", "0.5", "--keep", "0.1"), "list of report", "plan")
    check(json.loads((tmp_path / "report.json").read_text()), "report", "--report")
    beside = json.loads((small / "para_ext.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{64}", beside.pop("source_sha256"))
    files = {path.name: path.read_bytes() for path in small.iterdir() if path.name != "para_ext.json"}
    assert beside.pop("files") == {
        name: {
            "bytes": len(content),
            "start_sha256" if name.endswith(".safetensors") else "sha256": hashlib.sha256(content).hexdigest(),
        }
        for name, content in files.items()
    }
    check(beside, "report", "para_ext.json")
    assert set(cli.cli.commands) == {"plan", *(str(line[0]) for lines in commands.values() for line in lines)}


def test_one_name_has_one_type() -> None:
    """But for modules, which are lists of what the command knows of each, and score: its name, and a number."""
    types: dict[str, set[str]] = {}
    for table in TABLES.values():
        for field, kind in table.items():
            if field not in ("modules", "score"):
                types.setdefault(field, set()).add(kind.removesuffix(" or null"))
    assert {field: kinds for field, kinds in types.items() if len(kinds) > 1} == {}


def test_numbers_that_have_one_name_are_the_same(printed: Printed, adapter: Path, tmp_path: Path) -> None:
    """An error is absolute, whoever says it; what inspect says of a budget compress then does."""
    report = printed("compress", adapter, tmp_path / "small", "--keep", "0.5")
    measured = printed("verify", adapter, tmp_path / "small")
    budgets = printed("inspect", adapter)["budgets"]
    foretold = next(b for b in budgets if (b["budget"], b["value"]) == ("keep", 0.5))
    for document in (report, measured):
        assert document["relative_error"] == pytest.approx(document["error"] / document["norm"])
        assert document["norm"] == pytest.approx(report["norm"], rel=1e-9)
        assert document["error"] == pytest.approx(report["error"], rel=1e-4)
        assert document["energy"] == pytest.approx(foretold["energy"], abs=1e-6)
    assert foretold["relative_error"] == pytest.approx(report["relative_error"], rel=1e-4)
    for field in ("parameters_after", "bytes_after"):
        assert foretold[field] == report[field]


def test_a_refusal_prints_no_document(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, adapter: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["para-ext", "compress", str(adapter), str(tmp_path / "x"), "--keep", "2", "--json"]
    )
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
