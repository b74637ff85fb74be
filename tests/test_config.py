"""What runs: ISAs and their names, and what importing costs."""

import doctest
import json

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


def test_examples():
    result = doctest.testmod(config)
    assert result.attempted >= 1
    assert result.failed == 0
