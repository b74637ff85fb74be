"""The kernels on PyTorch's own threads: the same bits, no threads beside them, and threads of the child's own after a fork."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")

START = '''
import os, threading, warnings, numpy as np, fastbn
from fastbn import _native
fastbn.set_num_threads(3)
x = np.random.default_rng(0).standard_normal((8, 64, 56, 56)).astype("f4")
def arrays():
    return fastbn.batch_norm_train(x)[0].tobytes()
def on_team():
    """A call as torch's tensors make it, without torch, which waits forever itself in the child of a fork."""
    mean, m2 = np.empty(64), np.empty(64)
    _native.Job((8, 64, 56 * 56), 0, 0, 1e-5, 3).stats(x=x, batch_mean=mean, batch_m2=m2)
    return mean.tobytes() + m2.tobytes()
def threads():
    return len(os.listdir("/proc/self/task"))
'''
TORCH = """
import torch, fastbn.torch
torch.set_num_threads(3)
def results():
    given = torch.tensor(x, requires_grad=True)
    y = fastbn.torch.batch_norm(given, None, None, torch.ones(64), torch.zeros(64), training=True)
    (dx,) = torch.autograd.grad(y, given, torch.tensor(x))
    return b"".join(tensor.detach().numpy().tobytes() for tensor in (y, dx))
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
    """The bits are those of the pool's own threads, which are taken first."""
    pool, omp, after = run(
        """
from fastbn._torch.threads import share_threads
_native.use_team(0, 0)
multiply(); before = threads(); own = results(); pool = threads() - before
assert share_threads()
omp = threads()
for _ in range(20):
    assert results() == own
print(pool, omp, threads())
"""
    )
    assert int(pool) == 2
    assert omp == after


def test_without_a_pool_of_its_own_none_is_started():
    before, after = run("multiply(); before = threads(); results(); print(before, threads())")
    assert before == after


def test_arrays_keep_to_threads_of_our_own():
    """They need not wait until PyTorch's are all there."""
    before, after = run("multiply(); before = threads(); arrays(); print(before, threads())")
    assert int(after) == int(before) + 2


def test_a_team_of_fewer_threads_does_all_of_the_work():
    alike = run(
        """
_native.use_team(0, 0); own = results(); fastbn._torch.threads.share_threads()
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
_native.use_team(0, 0); own = results(); fastbn._torch.threads.share_threads()
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
multiply(); own = on_team()
read, write = os.pipe()
warnings.simplefilter("ignore")  # Python warns of a fork beside threads
child = os.fork()
if child == 0:
    before = threads(); alike = on_team() == own
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
warnings.simplefilter("ignore")  # Python warns of a fork beside threads
child = os.fork()
if child == 0:
    import signal
    signal.alarm(60)
{after.replace(chr(10), chr(10) + "    ")}
    from fastbn._torch.threads import share_threads
    shares = share_threads()
    found = on_team()
    _native.use_team(0, 0)
    os._exit(2 * (shares is {is_loaded}) + (on_team() != found))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""",
        before,
    )
    assert status == ["0"]
