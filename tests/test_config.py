"""What runs: ISAs and their names, and what importing costs."""

import doctest
import json
import os
import signal
import threading

import pytest

import fastbn
from fastbn import _native, config


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_forked_while_another_thread_is_at_it_has_its_own_blocks_alone():
    before, names = fastbn.show_config()["isa"], fastbn.show_config()["isa_available"]
    held, done = threading.Event(), threading.Event()

    def work():
        with fastbn.use_isa(names[0]), config._lock:
            held.set()
            done.wait(60)

    outer, thread = fastbn.use_isa("scalar"), threading.Thread(target=work)
    outer.__enter__()
    thread.start()
    held.wait(60)
    child = os.fork()
    if not child:
        signal.alarm(30)  # which ends a child that waits for the lock of a thread that it does not have
        seen = [_native.isa()]
        with fastbn.use_isa(names[0]):
            seen.append(_native.isa())
        seen.append(_native.isa())
        outer.__exit__()
        os._exit(0 if [*seen, _native.isa()] == ["scalar", names[0], "scalar", before] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    done.set()
    thread.join()
    outer.__exit__()
    assert fastbn.show_config()["isa"] == before


@pytest.mark.parametrize("interrupted", range(4))
def test_a_block_inside_the_entry_or_the_exit_of_another(interrupted, monkeypatch):
    """As where a signal is handled there, by code that enters a block: before each call of the compiled part."""
    before, names = _native.isa(), _native.isas()
    calls = []

    class Native:
        @staticmethod
        def isa():
            return Native.call(_native.isa)

        @staticmethod
        def use_isa(name):
            Native.call(lambda: _native.use_isa(name))

        @staticmethod
        def call(work):
            calls.append(work)
            if len(calls) == interrupted + 1:
                with fastbn.use_isa(names[0]):
                    pass
            return work()

    def blocks():
        with fastbn.use_isa("scalar"):
            seen.append(_native.isa())
            with fastbn.use_isa(names[0]):
                pass
            seen.append(_native.isa())

    seen = []
    monkeypatch.setattr(config, "_native", Native)
    thread = threading.Thread(target=blocks, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert seen == ["scalar", "scalar"]
    assert _native.isa() == before
    assert (config._open, config._before) == ([], None)


def test_configuration_is_json():
    shown = fastbn.show_config()
    assert json.loads(json.dumps(shown)) == shown
    assert shown["isa"] in shown["isa_available"]
    assert shown["isa_available"][-1] == "scalar"


def test_examples():
    result = doctest.testmod(config)
    assert result.attempted >= 1
    assert result.failed == 0
