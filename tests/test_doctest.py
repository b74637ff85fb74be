"""The examples of public docstrings, run as they stand."""

import doctest
import importlib

import pytest

# Modules with examples; those of the graph wing need onnxruntime.
MODULES = ["fastbn.deployment.result", "fastbn.graph.fold_result", "fastbn.graph.job"]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_hold(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0, "no examples"
    assert results.failed == 0
