#!/usr/bin/env python3
"""Compare the report of `make coverage` with docs/coverage.md: print what no test runs and no row of a table there explains.

    python tools/coverage_gaps.py build/coverage/python.json build/coverage/c.json

A row of a table names a file, functions of it, and why: `ops/layout.py` | `_tile` 2, `_pads` | ... . The number, one where there is none,
is how many places of that function may go without a run: lines, and branches of lines that run. `*` stands for all functions of a file.
A row that explains nothing is printed too. The exit code is 1 where a place is not explained.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "coverage.md"

ROW = re.compile(r"^\| *`([\w./]+\.(?:py|c|h|inc))` *\|([^|]+)\|[^|]+\|$")
# Where a function of C begins.
HEAD = re.compile(r"(?!#|typedef|struct|enum|return)[A-Za-z].*?\b(\w+)\((?!.*;$)")
EXPANDED = {"channels.h", "vec.h", "kernels.inc", "maps.inc", "reductions.inc", "column_reductions.inc"}
FUNCTION = re.compile(r"`([^`]+)`(?: (\d+))?")


class Gap(NamedTuple):
    """A place that no test runs: a line, or a way on from a line that runs."""

    file: str
    function: str
    line: int
    target: str


def python_gaps(report: dict[str, Any]) -> Iterator[Gap]:
    """Yield the gaps in what `coverage json` has written."""
    for path, measured in report["files"].items():
        file = path.rpartition("fastbn/")[2]
        for name, region in measured["functions"].items():
            missing = set(region["missing_lines"])
            for line in region["missing_lines"]:
                yield Gap(file, name or "(module)", line, "")
            for line, target in region["missing_branches"]:
                if line not in missing and target not in missing:
                    yield Gap(file, name or "(module)", line, "to the end" if target < 0 else f"to line {target}")


def c_gaps(report: dict[str, Any], folder: Path = ROOT / "src_c") -> Iterator[Gap]:
    """Yield the gaps in what `gcovr --json` has written.

    A line counts once, however many branches it has. Of EXPANDED files lines alone count: one is compiled for each instruction set, type
    and number of rows, and gcov adds up the branches of all.
    """
    for measured in report["files"]:
        file = measured["file"].rpartition("/")[2]
        heads = [(number, match[1]) for number, match in enumerate(map(HEAD.match, (folder / file).read_text().splitlines()), 1) if match]
        for line in measured["lines"]:
            number = line["line_number"]
            function = next((name for at, name in reversed(heads) if at <= number), "(file)")
            taken = [branch["count"] > 0 for branch in line.get("branches", ())]
            if line["count"] == 0:
                yield Gap(file, function, number, "")
            elif not all(taken) and file not in EXPANDED:
                yield Gap(file, function, number, f"{taken.count(False)} of {len(taken)} branches")


def explained(page: str) -> dict[tuple[str, str], int]:
    """Return (file, function) -> how many gaps of it the tables of the page explain."""
    found: dict[tuple[str, str], int] = {}
    for row in page.splitlines():
        if match := ROW.match(row):
            for name, count in FUNCTION.findall(match[2]):
                key = match[1], name
                found[key] = found.get(key, 0) + int(count or 1)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", type=Path, help="what `coverage json` has written")
    parser.add_argument("c", type=Path, help="what `gcovr --json` has written")
    arguments = parser.parse_args()
    gaps = [*python_gaps(json.loads(arguments.python.read_text())), *c_gaps(json.loads(arguments.c.read_text()))]
    unexplained, stale = compare(gaps, explained(PAGE.read_text(encoding="utf-8")))
    for gap in unexplained:
        folder = "fastbn" if gap.file.endswith(".py") else "src_c"
        text = (ROOT / folder / gap.file).read_text(encoding="utf-8").splitlines()[gap.line - 1].strip()
        print(f"{gap.file}:{gap.line} {gap.function}: {text[:90]}{f'  ({gap.target})' if gap.target else ''}")
    for file, name in stale:
        print(f"docs/coverage.md: {name} of {file} is run")
    print(f"{len(gaps)} places that no test runs, {len(unexplained)} of them not explained")
    return 1 if unexplained else 0


def compare(gaps: list[Gap], known: dict[tuple[str, str], int]) -> tuple[list[Gap], list[tuple[str, str]]]:
    """Return the gaps of functions that have more of them than is explained, and what explains nothing."""
    by_function: dict[tuple[str, str], list[Gap]] = {}
    for gap in sorted(set(gaps)):
        key = (gap.file, "*") if (gap.file, "*") in known else (gap.file, gap.function)
        by_function.setdefault(key, []).append(gap)
    unexplained = [gap for key, found in by_function.items() if len(found) > known.get(key, 0) for gap in found]
    return unexplained, [key for key in known if key not in by_function]


if __name__ == "__main__":
    sys.exit(main())
