"""What runs: ISAs and their names, and what importing costs."""

import doctest
import json
import threading

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


def test_use_isa_in_several_threads_leaves_what_was():
    """The blocks overlap: each thread leaves its own while that of the next is open."""
    before, names = fastbn.show_config()["isa"], fastbn.show_config()["isa_available"]
    entered = [threading.Event() for _ in names]
    seen = []

    def work(place):
        if place:
            entered[place - 1].wait(60)
        with fastbn.use_isa(names[place]):
            entered[place].set()
            entered[-1].wait(60)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
        seen.append(fastbn.show_config()["isa"])
    assert seen[-1] == before


def test_use_isa_obeys_the_block_that_was_entered_last():
    before = fastbn.show_config()["isa"]
    names = fastbn.show_config()["isa_available"]
    first, second = fastbn.use_isa(names[-1]), fastbn.use_isa(names[0])
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert fastbn.show_config()["isa"] == names[0]
    second.__exit__()
    assert fastbn.show_config()["isa"] == before
    with first:
        with first:
            pass
        assert fastbn.show_config()["isa"] == names[-1]
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
