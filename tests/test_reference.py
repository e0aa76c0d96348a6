"""The API reference: `make docs` finds every public name, with a docstring, and nothing that it can't resolve."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import para_ext
import para_ext.plan

PAGES = ("para_ext", "para_ext.plan")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pdoc", reason="pdoc is not installed")
    out = tmp_path_factory.mktemp("reference")
    command = [sys.executable, "-m", "pdoc", "-d", "google", "-o", str(out), *PAGES]
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    result = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return out


def test_every_public_name_is_in_the_reference(reference: Path) -> None:
    page = (reference / "para_ext.html").read_text(encoding="utf-8")
    anchors = set(re.findall(r'<section id="(\w+)">', page))
    assert anchors >= set(para_ext.__all__)
    plan = (reference / "para_ext" / "plan.html").read_text(encoding="utf-8")
    assert {"plan", "Plan"} <= set(re.findall(r'<section id="(\w+)">', plan))


@pytest.mark.parametrize("name", sorted(set(para_ext.__all__) - {"__version__"}))
def test_every_public_name_says_what_it_is(name: str) -> None:
    found = getattr(para_ext, name)
    members = vars(found).items() if inspect.isclass(found) else []
    methods = [member for key, member in members if inspect.isfunction(member) and not key.startswith("_")]
    assert all(inspect.getdoc(member) for member in (found, *methods))
