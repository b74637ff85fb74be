"""docs/: the Python of the pages runs as it stands, and the reference has every public name."""

import ast
import importlib.util
import re
import shutil
from pathlib import Path

import pytest

import fastbn

ROOT = Path(__file__).resolve().parents[1]
DOCS, MODELS = ROOT / "docs", ROOT / "tests" / "models"
BLOCKS = {
    path.stem: re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for path in DOCS.glob("*.md")
}

# Page -> the model that its blocks read, and the names that they expect.
GIVEN = {
    "start": ("model.onnx", lambda: {}),
    "fold": ("resnet.onnx", lambda: {}),
    "json": (None, lambda: {}),
    "arrays": (None, lambda: {"torch": pytest.importorskip("torch")}),
    "pytorch": (None, lambda: {"torch": pytest.importorskip("torch")}),
    "keras": (None, lambda: {} if importlib.util.find_spec("keras") else pytest.skip("Keras is not installed")),
}

# Page -> blocks at its end that need other processes.
SKETCHES = {"pytorch": 1}


@pytest.mark.parametrize("page", sorted(name for name, blocks in BLOCKS.items() if blocks))
def test_blocks_are_python(page):
    for block in BLOCKS[page]:
        ast.parse(block)


@pytest.mark.filterwarnings("default")  # of the frameworks: torch's older exporter is going to leave
@pytest.mark.parametrize("page", GIVEN)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, names = GIVEN[page]
    if model:
        shutil.copy(MODELS / "small_cnn.onnx", model)
    scope = {"__name__": page, **names()}
    blocks = BLOCKS[page][: len(BLOCKS[page]) - SKETCHES.get(page, 0)]
    assert blocks
    for block in blocks:
        exec(compile(block, f"docs/{page}.md", "exec"), scope)


# Module -> what else must be installed to import it.
PUBLIC = {"fastbn.torch": "torch", "fastbn.keras": "keras", "fastbn.graph.passes": "onnx_ir", "fastbn.graph.olive": "olive"}
PUBLIC |= dict.fromkeys(("fastbn", "fastbn.deployment", "fastbn.graph", "fastbn.reestimation", "fastbn.zoo", "fastbn.reference"), "numpy")


@pytest.mark.parametrize("module", PUBLIC)
def test_the_reference_has_every_public_name(module):
    pytest.importorskip(PUBLIC[module])
    parts = re.split(r"^\.\. currentmodule:: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    named = {where: set() for where in parts[::2]}
    for where, text in zip(parts[::2], parts[1::2], strict=True):
        named[where] |= set(re.findall(r"^   (\w+)$", text, re.MULTILINE))
    elsewhere = set() if module in ("fastbn", "fastbn.reference", "fastbn.torch", "fastbn.keras") else set(fastbn.__all__)
    assert named.get(module, set()) == set(importlib.import_module(module).__all__) - elsewhere - {"__version__"}


def test_every_page_is_in_a_section():
    listed = {
        name
        for path in DOCS.glob("*.md")
        for block in re.findall(r"```{toctree}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
        for name in re.findall(r"^(\w+)$", block, re.MULTILINE)
    }
    assert listed | {"index"} == {path.stem for path in DOCS.glob("*.md")}
