"""The examples of public docstrings, run as they stand."""

import doctest
import importlib
from pathlib import Path

import pytest

import fastbn

# Modules with examples; those of the graph wing need onnxruntime. The Keras wing runs its own, once for each backend.
MODULES = [
    "fastbn.config",
    "fastbn.folding",
    "fastbn.functional",
    "fastbn.kernel_bench",
    "fastbn.layers",
    "fastbn.masks",
    "fastbn.memory",
    "fastbn.sizes",
    "fastbn.stats",
    "fastbn.torch",
]
MODULES += [
    "fastbn.graph.passes",
    "fastbn.deployment.result",
    "fastbn.graph.fold_result",
    "fastbn.graph.job",
    "fastbn.graph.results",
    "fastbn.reestimation.job",
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_hold(name):
    if name == "fastbn.torch":
        pytest.importorskip("torch")
    if name == "fastbn.graph.passes":
        pytest.importorskip("onnx_ir")
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0, "no examples"
    assert results.failed == 0


def test_no_example_is_left_out():
    package = Path(fastbn.__file__).parent
    having = {path for path in package.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8")}
    names = {".".join(path.relative_to(package.parent).with_suffix("").parts) for path in having}
    assert {name for name in names if not name.startswith("fastbn.keras.")} == set(MODULES)
