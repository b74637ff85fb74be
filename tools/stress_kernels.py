"""The array functions under load: many callers at once, everything changing around them, every result compared bit for bit.

    python tools/stress_kernels.py --seconds 600 --callers 8
    python tools/stress_kernels.py --growth 1000000

The results that each call must give are computed before, on one thread without vector instructions: random calls (random_calls.py), the
layer and the halves of the backward pass. Then, for `--seconds`, `--callers` threads make these calls, while the number of threads and the
instruction set change, signals arrive, and children compute beside them: forked, spawned, from a fork server, workers of a DataLoader where
torch is installed, and children that may start no thread (RLIMIT_NPROC) or get hardly any memory (RLIMIT_AS). A child gives the right bits,
or a MemoryError or RuntimeError. A watchdog ends the process, with the stack of every thread, where nothing has finished for two minutes.

`--growth` makes so many small calls on one thread and prints how the resident memory grew. Exit code 1 where anything was wrong.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from random_calls import Call

import fastbn
from fastbn import backward_halves

__all__ = ["Load", "growth", "limited"]

CALLS = 120  # random calls beside those of the layer and the halves
LONGEST = 120  # seconds in which something has to finish
ROOT = Path(__file__).resolve().parents[1]


def digest(*arrays: np.ndarray | bytes) -> str:
    """Return a hash of the bits of arrays."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(array if isinstance(array, bytes) else array.tobytes())
    return found.hexdigest()


def random_call(seed: int) -> str:
    """Make a random call, every fourth of them large enough for several threads."""
    return digest(Call(seed, large=seed % 4 == 0, valid=True).bits())


def layer(seed: int) -> str:
    """Train a layer for three steps, then run it in eval mode."""
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((2, 12, 24, 20, 21), dtype=np.float32)
    norm = fastbn.BatchNorm(24, activation="relu" if seed % 2 else None)
    found = []
    for _ in range(3):
        found += [norm(x), *(each for each in norm.backward(dy) if each is not None)]
    norm.eval()
    return digest(*found, norm(x), *(np.asarray(values) for values in norm.state_dict().values()))


def halves(seed: int) -> str:
    """Compute a backward pass in its two halves."""
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((2, 9, 33, 41, 13))
    stats, weight = fastbn.batch_stats(x), rng.standard_normal(33)
    sums, dweight, _ = backward_halves.backward_sums(dy, x, stats, weight)
    assert dweight is not None
    return digest(sums, dweight, backward_halves.backward_input(dy, x, stats, sums, weight))


WORK: dict[str, Callable[[int], str]] = {"random_call": random_call, "layer": layer, "halves": halves}
Job = tuple[str, int]


def run(job: Job) -> str:
    """Return the digest that a job gives here and now."""
    kind, seed = job
    return WORK[kind](seed)


def expected(calls: int) -> dict[Job, str]:
    """Return what each job gives on one thread without vector instructions."""
    jobs = [("random_call", seed) for seed in range(calls)] + [(kind, seed) for kind in ("layer", "halves") for seed in range(2)]
    threads = fastbn.get_num_threads()
    fastbn.set_num_threads(1)
    with fastbn.use_isa("scalar"):
        want = {job: run(job) for job in jobs}
    fastbn.set_num_threads(threads)
    return want


def in_child(pipe: Any, jobs: dict[Job, str], threads: int) -> None:
    """Send how many of the jobs come out wrong, in a process of its own."""
    fastbn.set_num_threads(threads)
    pipe.send(sum(run(job) != digest for job, digest in jobs.items()))
    pipe.close()


class Images:
    """A data set for workers of a DataLoader: whether each job comes out right."""

    def __init__(self, jobs: dict[Job, str]) -> None:
        self.jobs = list(jobs.items())

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> int:
        job, want = self.jobs[index]
        return int(run(job) == want)


LIMITED = """
import json, os, resource, sys, threading
sys.path[:0] = json.loads(sys.argv[1])
import numpy as np, fastbn
from stress_kernels import run
name, room, jobs = sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
fastbn.set_num_threads(1)
run(("layer", 0))  # what is loaded later is loaded now
fastbn.set_num_threads(8)
if name == "RLIMIT_AS":
    with open("/proc/self/statm") as file:
        room += int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
if name == "RLIMIT_NPROC" and os.getuid() == 0:
    os.setuid(65534)  # the limit does not hold for root
resource.setrlimit(getattr(resource, name), (room, room))
right = refused = wrong = 0
for kind, seed, want in jobs:
    try:
        same = run((kind, seed)) == want
        right, wrong = right + same, wrong + (not same)
    except (MemoryError, RuntimeError):
        refused += 1
print(right, refused, wrong)
"""


def limited(name: str, room: int, jobs: dict[Job, str]) -> tuple[int, int, int]:
    """Return (right, refused, wrong) of jobs in a process with a limit: of threads in all, or of bytes beside what it has."""
    folders = json.dumps([str(Path(fastbn.__file__).parents[1]), str(ROOT / "tools")])
    rows = json.dumps([(*job, want) for job, want in jobs.items()])
    # The libraries of linear algebra start threads of their own when they are loaded.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, folders, name, str(room), rows]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10 * LONGEST, check=False)
    if result.returncode:
        raise RuntimeError(f"Cannot compute under {name} {room}: exit code {result.returncode}, {result.stderr[-300:]}")
    right, refused, wrong = map(int, result.stdout.split())
    return right, refused, wrong


class Load:
    """One run under load: `counts` says what was done, `wrong` what came out wrong."""

    def __init__(self, seconds: float, callers: int, calls: int) -> None:
        self.want = expected(calls)
        self.counts, self.wrong = Counter[str](), Counter[str]()
        self._end = time.monotonic() + seconds
        self._callers = callers
        self._lock = threading.RLock()  # a signal may be handled while the main thread has it
        self._interrupts, self._watched, self._handling = 0, 0.0, False

    def _note(self, what: str, wrong: int = 0, count: int = 1) -> None:
        with self._lock:
            self.counts[what] += count
            self.wrong[what] += wrong
            if time.monotonic() > self._watched + 1:
                self._watched = time.monotonic()
                faulthandler.dump_traceback_later(LONGEST, exit=True)

    def _until_the_end(self) -> Iterator[int]:
        return itertools.takewhile(lambda _: time.monotonic() < self._end, itertools.count())

    # ---- what the threads do ----

    def _call(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        jobs = list(self.want)
        for _ in self._until_the_end():
            job = jobs[rng.integers(len(jobs))]
            self._note(job[0], run(job) != self.want[job])

    def _change(self) -> None:
        names = fastbn.show_config()["isa_available"]
        for turn in self._until_the_end():
            fastbn.set_num_threads(1 + turn % 9)
            with fastbn.use_isa(names[turn % len(names)]):
                time.sleep(0.003)
            self._note("settings changed")

    def _some(self, seed: int, count: int = 6) -> dict[Job, str]:
        picks = np.random.default_rng(seed).choice(len(self.want), min(count, len(self.want)), replace=False)
        jobs = list(self.want.items())
        return dict(jobs[at] for at in picks)

    def _have_child(self, method: str, turn: int) -> None:
        context = multiprocessing.get_context(method)
        here, there = context.Pipe()
        process = context.Process(target=in_child, args=(there, self._some(turn), 1 + turn % 5))  # type: ignore[attr-defined]  # of each
        process.start()
        there.close()
        ended = here.poll(LONGEST)
        self._note(f"child, {method}", here.recv() if ended else 1)
        process.join(LONGEST)
        if process.is_alive():
            process.kill()

    def _have_children(self, method: str) -> None:
        for turn in self._until_the_end():
            self._have_child(method, turn)

    def _limit(self) -> None:
        for turn in self._until_the_end():
            # As many processes as there are: no thread can be started. And 1 to 64 MB of memory: some calls fail, others do not.
            # A sanitizer needs terabytes of addresses for itself; kernels that are measured are not optimized and need megabytes of stack,
            # which a process without addresses cannot grow.
            is_free = re.search("asan|tsan", os.environ.get("LD_PRELOAD", "")) or "COVERAGE_RUN" in os.environ
            memory = [] if is_free else [("RLIMIT_AS", 1 << 20 + turn % 7)]
            for name, room in (("RLIMIT_NPROC", 1), *memory):
                right, refused, wrong = limited(name, room, self._some(turn, 12))
                self._note(f"child, {name}: right", wrong, right)
                self._note(f"child, {name}: refused", 0, refused)

    def _load_data(self) -> None:
        from torch.utils.data import DataLoader

        for turn in self._until_the_end():
            for right in DataLoader(Images(self._some(turn)), num_workers=2, timeout=LONGEST):
                self._note("DataLoader item", int(not right.item()))

    # ---- the main thread ----

    def _on_signal(self, number: int, frame: object) -> None:
        if self._handling:  # on a busy machine the next signal comes before this one is done
            return
        self._handling = True
        job = ("halves", 0)
        try:
            with fastbn.use_isa("scalar"):
                self._note("call in a signal handler", run(job) != self.want[job])
        finally:
            self._handling = False

    def _meet_signals(self) -> None:
        """Compute on the main thread, where signals are handled; every fourth call is to be interrupted by SIGINT."""
        job = ("layer", 1)
        signal.signal(signal.SIGUSR1, self._on_signal)
        signal.signal(signal.SIGALRM, self._on_signal)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 1, 1)
        for turn in self._until_the_end():
            try:
                if turn % 4 == 0:
                    threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
                elif turn % 4 == 2:
                    os.kill(os.getpid(), signal.SIGUSR1)
                self._note("call on the main thread", run(job) != self.want[job])
                if turn % 4 == 0:
                    time.sleep(LONGEST)  # until the interrupt comes
            except KeyboardInterrupt:
                self._interrupts += 1
        signal.setitimer(signal.ITIMER_REAL, 0)

    def run(self) -> bool:
        """Run to the end; return whether everything came out right."""
        work: list[tuple[Any, ...]] = [(self._call, seed) for seed in range(self._callers)]
        work += [(self._change,), (self._have_children, "spawn"), (self._limit,)]
        work += [(self._have_children, method) for method in ("fork", "forkserver") if method in multiprocessing.get_all_start_methods()]
        if importlib.util.find_spec("torch"):
            work.append((self._load_data,))
        threads = [threading.Thread(target=self._guarded, args=each) for each in work]
        for thread in threads:
            thread.start()
        self._meet_signals()
        for thread in threads:
            thread.join()
        faulthandler.cancel_dump_traceback_later()
        self.counts["SIGINT"] = self._interrupts
        return not any(self.wrong.values())

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            self._note(f"{work.__name__}: {type(error).__name__}: {error}", 1)


def resident() -> int:
    """Return the bytes of memory that this process has now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def growth(calls: int) -> list[int]:
    """Return the resident memory at each twentieth of so many calls, of every function in turn, the first of them at a tenth."""
    x = np.random.default_rng(0).standard_normal((4, 16, 6, 6), dtype=np.float32)
    weight, norm, running = np.ones(16, np.float32), fastbn.BatchNorm(16), np.zeros((2, 16), np.float32) + 1
    found = []
    for number in range(0, calls, 5):
        if number % (calls // 20) < 5 and number >= calls // 10:
            found.append(resident())
        fastbn.batch_norm(x, running[0], running[1], weight, activation="relu")
        _, stats = fastbn.batch_norm_train(x, weight, running_mean=running[0], running_var=running[1])
        fastbn.batch_norm_backward(x, x[::-1], stats, weight, residual=x)
        norm(x)
        with contextlib.suppress(fastbn.ArgumentError):
            fastbn.batch_norm(x, running[0, 1:], running[1])
    return [*found, resident()]


def main() -> int:
    """Run what the command line asks for and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="of load (default: %(default)s)")
    parser.add_argument("--callers", type=int, default=8, help="threads that call all the time (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=CALLS, help="random calls to choose from (default: %(default)s)")
    parser.add_argument("--growth", type=int, help="make so many small calls instead, and print how memory grew")
    options = parser.parse_args()
    # Forks beside threads are what this is about.
    warnings.filterwarnings("ignore", "This process", DeprecationWarning)
    if options.growth is not None:
        sizes = growth(options.growth)
        slope = np.polyfit(np.linspace(0.1, 1, len(sizes)) * options.growth, sizes, 1)[0]
        first, last = (size / 2**20 for size in (sizes[0], sizes[-1]))
        print(f"{options.growth} calls: {first:.2f} MB after a tenth of them, {last:.2f} MB at the end, {slope:.3f} bytes a call")
        return 1 if slope > 1 else 0
    load = Load(options.seconds, options.callers, options.calls)
    right = load.run()
    for what, count in sorted(load.counts.items()):
        print(f"{what}: {count}, {load.wrong[what]} wrong")
    print(f"resident memory: {resident() / 2**20:.0f} MB, at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MB")
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
