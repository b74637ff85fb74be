"""docs/numerics.md tells where constants come from: those that it names have the values that it names, and none of the code is left out."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTION = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8").split("## Parity of graphs")[1].split("\n## ")[0]
NAMED = re.findall(r"`([A-Z_]+)` = ([0-9]+(?:[.][0-9]+)?(?:e-[0-9]+)?(?:\^[0-9]+)?)", SECTION)
MODULES = ["job", *(f"parity.{path.stem}" for path in sorted((ROOT / "fastbn" / "graph" / "parity").glob("[a-z]*.py")))]


def constants():
    """Return (module, name) -> value of every number that stands at the top of a file."""
    found = {}
    for module in MODULES:
        tree = ast.parse((ROOT / "fastbn" / "graph" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        names = [node.id for item in tree.body if isinstance(item, ast.Assign) for node in ast.walk(item) if isinstance(node, ast.Name)]
        loaded = importlib.import_module(f"fastbn.graph.{module}")
        found |= {(module, name): getattr(loaded, name) for name in names if isinstance(getattr(loaded, name, None), (int, float))}
    return found


def number(text):
    base, _, exponent = text.partition("^")
    return float(base) ** float(exponent or 1)


@pytest.mark.parametrize(("name", "value"), NAMED)
def test_a_constant_has_the_value_that_the_page_tells(name, value):
    values = {found for (_, each), found in constants().items() if each == name}
    assert values == {number(value)}


def test_every_constant_is_told_of():
    told = set(re.findall(r"`([A-Z_]+)`", SECTION))
    assert sorted({name for _, name in constants()} - told) == []
    assert len(NAMED) > 15
