"""Writes what `make test-runtimes` measured into docs/runtimes.md: `make runtimes-docs`.

The text there is by hand; the tables stand between two comments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "runtimes.md"
RESULTS = ROOT / "build" / "runtimes" / "results.json"

Results = dict[str, dict[str, Any]]


def document(text: str, results: Results) -> str:
    """The text with its tables made anew."""
    tables = {"errors": errors(results), "environments": environments(results)}

    def filled(match: re.Match[str]) -> str:
        return f"<!-- {match[1]}: made by `make runtimes-docs` -->\n{tables[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- (\w+): made by [^>]*-->.*?<!-- end -->", filled, text, flags=re.DOTALL)


def errors(results: Results) -> str:
    """A row per case, a column per runtime: the largest error over all bases; bold where it is none of rounding."""
    cases = list(dict.fromkeys(row["case"] for found in results.values() for row in found["rows"]))
    found = {
        (name, case): _error([row for row in result["rows"] if row["case"] == case])
        for name, result in results.items()
        for case in cases
    }
    head = ["given", *(_title(result) for result in results.values())]
    return _table(head, ([_code(case), *(found[name, case] for name in results)] for case in cases))


def environments(results: Results) -> str:
    head = ["runtime", "in its environment", "compared", "installed", "asked", "MB", "date"]
    rows = []
    for name, result in results.items():
        (_, *others) = result["versions"].items()
        rows.append([
            f"`{name}`",
            f"{_title(result)}, " + ", ".join(f"{package} {version}" for package, version in others),
            result["gives"],
            f"{result['install_seconds']} s",
            f"{sum(result['seconds'].values()):.0f} s",
            f"{result['megabytes']:,}",
            result["date"],
        ])  # fmt: skip
    return _table(head, rows)


def _title(result: dict[str, Any]) -> str:
    package, version = next(iter(result["versions"].items()))
    return f"{package} {version}"


def _code(case: str) -> str:
    return f"`{case}`" if case.startswith("--") else case


def _error(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    if any("refused" in row for row in rows):
        return "refused"
    worst = max(row["error"] for row in rows)
    return f"{worst:.1e}" if all(row["right"] for row in rows) else f"**{worst:.2f}**"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    above, *below = (f"| {' | '.join(row)} |" for row in (head, *rows))
    return "\n".join([above, "|" + "---|" * len(head), *below])


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text(), json.loads(RESULTS.read_text())))
