"""docs/coverage.md explains what no test runs: what is compared with the reports, and that its rows name functions that there are."""

import ast
import re

import coverage_gaps
from coverage_gaps import Gap, c_gaps, compare, explained, python_gaps


def test_lines_and_ways_of_python_that_do_not_run_are_gaps():
    regions = {
        "": {"missing_lines": [], "missing_branches": []},
        "Folder.clean": {"missing_lines": [8, 9], "missing_branches": [[5, 8], [6, -4], [7, 11], [8, 9]]},
    }
    report = {"files": {"build/coverage/lib/fastbn/graph/a.py": {"functions": regions}}}
    assert list(python_gaps(report)) == [  # a way to a line that does not run is that line; nothing leads on from one that does not
        Gap("graph/a.py", "Folder.clean", 8, ""),
        Gap("graph/a.py", "Folder.clean", 9, ""),
        Gap("graph/a.py", "Folder.clean", 6, "to the end"),
        Gap("graph/a.py", "Folder.clean", 7, "to line 11"),
    ]


SOURCE = """#include "a.h"
static int f(int a,
             int b) {
    return a ? b : 0;
}
int g(void) {
    return f(0, 0);
}
"""


def test_lines_of_c_that_do_not_run_or_do_not_go_every_way_are_gaps(tmp_path):
    for name in ("a.c", "vec.h"):
        (tmp_path / name).write_text(SOURCE)
    lines = [
        {"line_number": 2, "count": 3},
        {"line_number": 4, "count": 3, "branches": [{"count": 3}, {"count": 0}]},
        {"line_number": 6, "count": 3, "branches": [{"count": 1}, {"count": 2}]},
        {"line_number": 7, "count": 0, "branches": [{"count": 0}]},
    ]
    report = {"files": [{"file": f"src_c/{name}", "lines": lines} for name in ("a.c", "vec.h")]}
    found = [Gap("a.c", "f", 4, "1 of 2 branches"), Gap("a.c", "g", 7, ""), Gap("vec.h", "g", 7, "")]
    assert list(c_gaps(report, tmp_path)) == found


def test_a_row_explains_so_many_places_of_a_function():
    page = "| file | function | why |\n|-|-|-|\n| `a.py` | `f` 2, `C.g` | never |\n| `a.c` | `*` 3 | never |\n| `b.py` | text | `f` |\n"
    known = explained(page)
    assert known == {("a.py", "f"): 2, ("a.py", "C.g"): 1, ("a.c", "*"): 3}
    few = [Gap("a.py", "f", 1, ""), Gap("a.py", "f", 2, ""), *(Gap("a.c", f"f{line}", line, "") for line in range(3))]
    assert compare(few, known) == ([], [("a.py", "C.g")])
    # One more, and all of that function are shown: nobody knows which of them is new.
    assert compare([*few, Gap("a.py", "f", 3, "")], known)[0] == [Gap("a.py", "f", line, "") for line in (1, 2, 3)]
    assert compare([*few, Gap("a.c", "h", 9, "")], known)[0] == [*few[2:], Gap("a.c", "h", 9, "")]
    assert compare([Gap("a.py", "other", 7, "")], known)[0] == [Gap("a.py", "other", 7, "")]


def names_in(tree, outer=""):
    """Yield the names of all functions of a Python file, as coverage.py calls them."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        name = f"{outer}{node.name}" if named else ""
        if named and not isinstance(node, ast.ClassDef):
            yield name
        yield from names_in(node, f"{name}." if named else outer)


def test_rows_name_functions_that_there_are():
    rows = explained(coverage_gaps.PAGE.read_text(encoding="utf-8"))
    for file, function in rows:
        path = coverage_gaps.ROOT / ("fastbn" if file.endswith(".py") else "src_c") / file
        text = path.read_text(encoding="utf-8")
        if function in ("*", "(module)"):
            continue
        if file.endswith(".py"):
            assert function in set(names_in(ast.parse(text))), (file, function)
        else:
            assert re.search(rf"\b{re.escape(function)}\b", text), (file, function)
