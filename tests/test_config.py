"""What runs: ISAs and their names, and what importing costs."""

import doctest
import json
import subprocess
import sys

import pytest

import fastbn
from fastbn import config


def test_use_isa_ends_with_its_block():
    before = fastbn.show_config()["isa"]
    with fastbn.use_isa("scalar"):
        assert fastbn.show_config()["isa"] == "scalar"
        with pytest.raises(KeyError), fastbn.use_isa(before):
            raise KeyError
        assert fastbn.show_config()["isa"] == "scalar"
    assert fastbn.show_config()["isa"] == before


def test_configuration_is_json():
    shown = fastbn.show_config()
    assert json.loads(json.dumps(shown)) == shown
    assert shown["isa"] in shown["isa_available"]
    assert shown["isa_available"][-1] == "scalar"


def test_import_loads_numpy_only():
    code = (
        "import sys, numpy; before = set(sys.modules); import fastbn;"
        "print([name for name in set(sys.modules) - before if not name.startswith(('fastbn', '_cython', 'cython_runtime'))])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_examples():
    result = doctest.testmod(config)
    assert result.attempted >= 1
    assert result.failed == 0
