"""The size of what a reader takes in at once: lines of a file, and of a function with its docstring."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 450, 60

ENDINGS = {".py", ".pyi", ".pyx", ".pxi", ".c", ".h", ".inc", ".j2", ".css", ".js"}
GENERATED = {"fastbn/_native.c"}

# What is too long still. These lists may only shrink: what is short again must leave them.
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()


def sources(*folders):
    """Yield (name, text) of the source files in folders of the project."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in ENDINGS and name not in GENERATED:
                yield name, path.read_text(encoding="utf-8")


def functions(text):
    """Yield (name, lines) of the functions of a Python file, nested ones and methods included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def test_a_file_is_not_too_long():
    lines = {name: len(text.splitlines()) for name, text in sources("docs", "examples", "fastbn", "src_c", "tests", "tools")}
    assert len(lines) > 200
    assert {name for name, count in lines.items() if count > MOST_LINES} == LONG_FILES


def test_a_function_is_not_too_long():
    python = [(name, text) for name, text in sources("docs", "examples", "fastbn", "tools") if name.endswith(".py")]
    found = {(f"{name}:{function}", lines) for name, text in python for function, lines in functions(text)}
    assert len(found) > 1000
    assert {name for name, lines in found if lines > MOST_LINES_OF_A_FUNCTION} == LONG_FUNCTIONS
