"""The pool of thread_pool.c: callers at once, forks, and the settings that it follows."""

import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import fastbn

X = np.random.default_rng(0).standard_normal((16, 24, 40, 40), dtype=np.float32)


@pytest.fixture(autouse=True)
def _four_threads():
    before = fastbn.get_num_threads()
    fastbn.set_num_threads(4)
    yield
    fastbn.set_num_threads(before)


def result():
    y, stats = fastbn.batch_norm_train(X)
    dx, _, _ = fastbn.batch_norm_backward(X, X, stats)
    return y.tobytes(), dx.tobytes()


def test_eight_callers_at_once():
    want = result()
    wrong = []

    def work():
        wrong.extend(1 for _ in range(10) if result() != want)

    callers = [threading.Thread(target=work) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def child(pipe):
    pipe.send(result())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning", r"ignore:os\.fork\(\) was called:RuntimeWarning")  # Python; JAX
def test_fork_while_the_pool_lives():
    want = result()
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        here, there = context.Pipe()
        process = context.Process(target=child, args=(there,))
        process.start()
        assert here.poll(60)
        assert here.recv() == want
        process.join()
    assert result() == want


def test_the_number_of_threads_is_settable():
    for threads in (1, 3, 256):
        fastbn.set_num_threads(threads)
        assert fastbn.get_num_threads() == threads
        assert fastbn.show_config()["threads"] == threads
    fastbn.set_num_threads(1000)
    assert fastbn.get_num_threads() == 256
    for wrong, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(error, match=r"Expected an integer.* - at `n`"):
            fastbn.set_num_threads(wrong)


@pytest.fixture
def asked(environment):
    """Return a function that evaluates an expression in a new process with these variables."""

    def ask(expression, **variables):
        command = [sys.executable, "-c", f"import os, fastbn; print({expression})"]
        return subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, check=True).stdout.strip()

    return ask


def test_the_environment_chooses(asked):
    assert asked("fastbn.get_num_threads()", FASTBN_NUM_THREADS="5") == "5"
    assert int(asked("fastbn.get_num_threads()", FASTBN_NUM_THREADS="none")) >= 1
    assert asked("fastbn.show_config()['isa']", FASTBN_ISA="scalar") == "scalar"
    assert asked("fastbn.show_config()['isa']", FASTBN_ISA="no such") == fastbn.show_config()["isa_available"][0]


@pytest.mark.parametrize("spin", ["0", "-5", "none", "99999999999999999999", "200"])
def test_any_time_of_looking_for_work_gives_the_same_bits(asked, spin):
    code = (
        "[fastbn.set_num_threads(n) or [fastbn.batch_norm_train(__import__('numpy').arange(2 << 18, dtype='f4').reshape(4, 8, -1))[1].m2"
        " for _ in range(3)][-1].tobytes() for n in (1, 2, 5)]"
    )
    results = eval(asked(code, FASTBN_SPIN_MICROSECONDS=spin))
    assert results[0] == results[1] == results[2]


def test_a_setting_before_the_first_call_stays(asked):
    work = "fastbn.batch_stats(__import__('numpy').ones((64, 64, 64)))"
    assert asked(f"fastbn.set_num_threads(3) or {work} and fastbn.get_num_threads()") == "3"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_the_affinity_mask_is_respected(asked):
    code = "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]) or fastbn.get_num_threads()"
    assert asked(code, FASTBN_NUM_THREADS="") == "1"


@pytest.mark.parametrize("axis", [1, -1])
def test_a_slice_and_its_copy_differ_by_rounding_alone(axis):
    """The bits are those of a shape and its strides, which decide the order of the additions."""
    rng, equal = np.random.default_rng(0), 0
    for _ in range(200):
        shape = rng.integers(2, 9, rng.integers(2, 6))
        whole = rng.standard_normal(shape + rng.integers(0, 3, len(shape)))
        x = whole.astype(np.float32)[tuple(slice(size) for size in shape)]
        results = []
        for given in (x, np.ascontiguousarray(x)):
            y, stats = fastbn.batch_norm_train(given, axis=axis)
            results.append((y, stats.mean, stats.m2))
        for one, other in zip(*results, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6)
        equal += all(np.array_equal(one, other) for one, other in zip(*results, strict=True))
    assert equal > 100
