"""The kernels on PyTorch's own threads: the same bits, no threads beside them, and threads of the child's own after a fork."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")

START = """
import os, threading, warnings, numpy as np, fastbn
fastbn.set_num_threads(3)
x = np.random.default_rng(0).standard_normal((8, 64, 56, 56)).astype("f4")
def results():
    y, stats = fastbn.batch_norm_train(x)
    dx, dweight, dbias = fastbn.batch_norm_backward(x, x, stats, np.ones(64), np.zeros(64))
    return b"".join(np.asarray(a).tobytes() for a in (y, stats.mean, stats.m2, dx, dweight, dbias))
def threads():
    return len(os.listdir("/proc/self/task"))
"""
TORCH = """
import torch
torch.set_num_threads(3)
def multiply():
    torch.ones(600, 600) @ torch.ones(600, 600)
"""


def run(code, before=TORCH):
    environment = {**os.environ, "PYTHONWARNINGS": "error", "FASTBN_SPIN_MICROSECONDS": "0"}
    done = subprocess.run([sys.executable, "-c", START + before + code], capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")


def test_kernels_start_no_threads_beside_those_of_pytorch():
    """The bits are those of the pool's own threads, which run before fastbn.torch is imported."""
    own, shared, pool, omp, after = run(
        """
before = threads(); own = results(); pool = threads() - before
from fastbn._torch.threads import share_threads
assert share_threads()
multiply(); omp = threads()
for _ in range(20):
    assert results() == own
print(hash(own), hash(results()), pool, omp, threads())
"""
    )
    assert own == shared
    assert int(pool) == 2
    assert omp == after


def test_without_a_pool_of_its_own_none_is_started():
    before, after = run("import fastbn.torch; multiply(); before = threads(); results(); print(before, threads())")
    assert before == after


def test_a_team_of_fewer_threads_does_all_of_the_work():
    alike = run(
        """
own = results()
import fastbn.torch
found = []
for count in (1, 2, 3):
    torch.set_num_threads(count)
    found.append(results() == own)
print(*found)
"""
    )
    assert alike == ["True"] * 3


def test_threads_that_call_at_the_same_time_get_the_same_bits():
    (alike,) = run(
        """
own = results()
import fastbn.torch
multiply()
found = []
callers = [threading.Thread(target=lambda: found.extend(results() == own for _ in range(10))) for _ in range(4)]
[caller.start() for caller in callers]; [caller.join() for caller in callers]
print(len(found) == 40 and all(found))
"""
    )
    assert alike == "True"


def test_the_child_of_a_fork_has_threads_of_its_own():
    """OpenMP's do not outlive a fork, and a call on them would wait forever."""
    status, started = run(
        """
import fastbn.torch, warnings
multiply(); own = results()
read, write = os.pipe()
warnings.simplefilter("ignore")  # Python warns of a fork beside threads
child = os.fork()
if child == 0:
    before = threads(); alike = results() == own
    os.write(write, str(threads() - before).encode())
    os._exit(0 if alike else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.read(read, 9).decode())
"""
    )
    assert status == "0"
    assert started == "2"


@pytest.mark.parametrize("is_loaded", [False, True])
def test_fastbn_torch_may_be_imported_after_a_fork(is_loaded):
    """The child has threads of PyTorch's where it loads PyTorch itself; those that the parent had are not there."""
    before, after = (TORCH + "multiply()", "") if is_loaded else ("", TORCH)
    status = run(
        f"""
own = results()
warnings.simplefilter("ignore")  # Python warns of a fork beside threads
child = os.fork()
if child == 0:
    import signal
    signal.alarm(60)
{after.replace(chr(10), chr(10) + "    ")}
    from fastbn._torch.threads import share_threads
    os._exit(2 * (share_threads() is {is_loaded}) + (results() != own))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""",
        before,
    )
    assert status == ["0"]
