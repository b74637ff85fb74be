"""Fuzzing of the ONNX part: hostile models and wrong bytes, folded and verified in processes that may end.

    python tools/fuzz_models.py                                  100,000 mutations and 20,000 built models
    python tools/fuzz_models.py --bytes 2000 --built 2000 --first 5000
    python tools/fuzz_models.py --again bytes:4711 --keep bad.onnx    one of them, and what it is

Mutations are of every .onnx file in the folders (`--models`), built models are sound ones with faults. Seed and kind say everything about a
case: the model, the options of the fold, what is done with the result. A case ends as

    result, error     a FoldResult, or a FastbnError
    not-a-case        the faults cancelled each other, or nest too deep: there is nothing that protobuf writes
    traceback         any other exception
    signal, slow      the process ended, or took more than 10 s of CPU time in all threads together, beside runs of the model: a model
                      is a program, and one of its runs may take 60 s
    fat               more than 2 GB of memory
    invalid           onnxruntime calls the result invalid, and not the model
    differs           the result fails the comparison with the model
    noise             something was printed: a warning of NumPy, a line of onnxruntime

Only the first three are right, and the exit code is 1 where there is any other. A worker has many cases, one after the other; the one that
ends it is known by its number, and the next worker goes on behind it.
"""

import argparse
import collections
import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from byte_faults import Corpus, mutated
from google.protobuf.message import EncodeError
from model_faults import DATA_FILE, DATA_SIZE, hostile

import fastbn
from fastbn.cli import main as command
from fastbn.graph import runtime

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "tests" / "models" / "small_cnn.onnx"
FOLDERS = [ROOT / "tests" / "models", ROOT.parent / "shared"]

GOOD = ("result", "error", "not-a-case")

# Seconds of CPU time for a case and for one run of its model, seconds of a clock after which a worker hangs, and bytes of memory. The
# system gives a worker no more than these: a fold that asks for more has failed; a run of the model in onnxruntime that does is refused, as
# it is with --limits.
CPU_SECONDS, RUN_SECONDS, CLOCK_SECONDS, MOST_MEMORY = 10, 60, 300, 2 << 30

# What onnxruntime says where it gets no memory.
NO_MEMORY = ("bad_alloc", "bad allocation", "Failed to allocate memory")

# A worker's caches grow; after this many cases there is a new one.
CASES_OF_A_WORKER = 1000


class Wrong(Exception):
    """A case that ends in another way than it may: its class, and what to say of it."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def made(corpus: Corpus | None, kind: str, seed: int) -> bytes:
    """Return the bytes of a case."""
    if corpus is not None and kind == "bytes":
        return mutated(corpus, seed)
    data: bytes = hostile(seed).SerializeToString()
    return data


def folded(choose: random.Random, data: bytes, folder: Path) -> str:
    """Fold and verify a model as the seed says; return how that ended, or raise Wrong."""
    path = folder / "hostile.onnx"
    path.write_bytes(data)
    options: dict[str, Any] = {
        "verify": choose.random() < 0.4,
        "as_inference": choose.random() < 0.3,
        "freeze_inputs": choose.random() < 0.3,
        "rewrite_left": choose.choice([None, None, "conv", "affine"]),
    }
    if choose.random() < 0.1:
        options["input_shapes"] = {"x": choose.choice([[2, 3, 8, 8], [1 << 40, 3, 8, 8], [1, 3, 1 << 31, 1 << 31], [1]])}
    if choose.random() < 0.05:
        return _by_command(choose, path, options)
    given = path if choose.random() < 0.7 else data
    try:
        result = fastbn.fold(given, **options)
        if choose.random() < 0.2:
            result.save(folder / "folded.onnx")
        if choose.random() < 0.1:
            fastbn.verify(path, result.model, input_shapes=options.get("input_shapes"))
    except fastbn.FastbnError:
        return "error"
    json.dumps(result.to_dict())
    text = str(result)
    if not options["verify"] and any(part in text for part in NO_MEMORY):
        raise Wrong("fat", text)
    if result.parity is not None and result.parity.status == "failed":
        raise Wrong("differs", str(result.parity))
    if result.folded or result.rewritten:
        _check_validity(data, path, result)
    return "result"


def _by_command(choose: random.Random, path: Path, options: dict[str, Any]) -> str:
    """Hand a model to the command: mostly to fold it, else to compare, time or deploy it, or to estimate its statistics again."""
    model, out, chosen = str(path), str(path.with_name("out.onnx")), choose.random()
    if chosen < 0.6:
        words = ["fold", model, out, "--force", "--json", str(path.with_name("out.json"))]
        words += ["--no-verify"] * (not options["verify"]) + ["--as-inference"] * options["as_inference"]
        words += choose.choice([[], ["--dry-run"], ["-q"], ["--strict"], ["--explain", "*"]])
    elif chosen < 0.7:
        samples = path.with_name("samples.npz")
        np.savez(samples, **_samples(path))
        words = ["reestimate", model, out, "--data", str(samples), "--workers=0", "--batch=2", "--force"]
    elif chosen < 0.85:
        words = ["verify", *choose.choice([(model, model), (model, str(SAMPLE)), (str(SAMPLE), model)])]
    elif chosen < 0.95:
        words = ["bench", model, "--runs", "1"]
    else:
        words = ["deploy", model, out, "--force", "--runs", "1", "--report", str(path.with_name("out.html"))]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = command(words)
    said = errors.getvalue()
    if code not in (0, 2, 3, 4, 5):
        raise Wrong("traceback" if code == 70 else "differs", f"exit code {code} of {' '.join(words)}: {said}")
    if any(not line.startswith("fastbn: ") for line in said.splitlines()) or (code in (2, 5) and not said.startswith("fastbn: ")):
        raise Wrong("noise", said)
    return "error" if code == 2 else "result"


def _samples(path: Path) -> dict[str, np.ndarray]:
    """Return four samples for each input of a model, in the sizes that it states as far as these are small."""
    try:
        inputs = onnx.load_model(path, load_external_data=False).graph.input
    except Exception:  # of protobuf
        return {"x": np.ones((4, 3, 8, 8), np.float32)}
    sizes = {each.name: [max(1, min(axis.dim_value or 8, 64)) for axis in each.type.tensor_type.shape.dim][1:5] for each in inputs}
    names = [name for name in sizes if isinstance(name, str) and len(name) < 100 and name.isprintable()]
    return {name: np.ones((4, *sizes[name]), np.float32) for name in names}


def _check_validity(data: bytes, path: Path, result: fastbn.FoldResult) -> None:
    """Raise Wrong where onnxruntime opens the model, and not the result."""
    try:
        runtime.session(data, path.parent, threads=1)
    except Exception:  # onnxruntime raises many kinds: the model is none that it takes
        return
    try:
        runtime.session(result.to_bytes(), path.parent, threads=1)
    except Exception as error:
        raise Wrong("invalid", str(error)[:300]) from error


def ending(corpus: Corpus | None, kind: str, seed: int, folder: Path) -> tuple[str, str]:
    """Return (class, text) of a case."""
    try:
        data = made(corpus, kind, seed)
    except (EncodeError, UnicodeError, ValueError, RecursionError):
        return "not-a-case", ""
    try:
        return folded(random.Random(seed + 1), data, folder), ""
    except Wrong as wrong:
        return wrong.kind, str(wrong)
    except MemoryError as error:
        return "fat", _place(error)
    except Exception as error:
        return "traceback", _place(error)


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "fastbn" in frame.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"
    return f"{type(error).__name__}: {str(error)[:200]} ({where})"


# ---- a worker ----


def _on_time_of_its_own(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return onnxruntime's run of a model, which stops the clock of the case."""

    def timed(*arguments: Any, **options: Any) -> Any:
        left, _ = signal.setitimer(signal.ITIMER_PROF, RUN_SECONDS)
        try:
            return run(*arguments, **options)
        finally:
            signal.setitimer(signal.ITIMER_PROF, left or CPU_SECONDS)

    return timed


def _peak() -> int:
    """Return the most memory of this process since it was last asked, in bytes."""
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) << 10
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def work(kind: str, seeds: range, folders: list[Path]) -> None:
    """Have these cases, and print a line before and after each on the stdout that this process was started with."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # On one CPU each, or the threads of onnxruntime would wait for one another, which takes CPU time, too.
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[seeds.start % len(cpus)]})
    out = os.fdopen(os.dup(1), "w", buffering=1)
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryFile() as said:
        folder = Path(name)
        for descriptor in (1, 2):
            os.dup2(said.fileno(), descriptor)
        corpus = Corpus(folders) if kind == "bytes" else None
        (folder / DATA_FILE).write_bytes(bytes(DATA_SIZE))
        warnings.simplefilter("error")
        runtime.silence_log()
        onnxruntime.InferenceSession.run = _on_time_of_its_own(onnxruntime.InferenceSession.run)
        for seed in seeds:
            print(f"{seed}", file=out)
            _peak()
            start = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # whose signal ends the process, wherever it is
            end, text = ending(corpus, kind, seed, folder)
            signal.setitimer(signal.ITIMER_PROF, 0)
            took, peak = time.process_time() - start, _peak()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            printed = os.pread(said.fileno(), 1000, 0).decode(errors="replace")
            os.ftruncate(said.fileno(), 0)
            os.lseek(said.fileno(), 0, os.SEEK_SET)
            if end in GOOD and printed:
                end, text = "noise", printed
            if peak > MOST_MEMORY:
                end = "fat"
            print(json.dumps({"end": end, "text": text, "seconds": took, "bytes": peak}), file=out)


# ---- the driver ----


class Run:
    """The cases of one kind, by one worker after the other.

    Attributes
    ----------
    ends : Counter
        How many cases ended in each way.
    wrong : list of dict
        Kind, seed, class and text of those that ended in a wrong one.
    slowest, largest : list of (number, seed)
        The most seconds of CPU time, and the most bytes, of a case.
    """

    def __init__(self, kind: str, seeds: range, folders: list[Path]) -> None:
        self.kind = kind
        self.ends: Counter[str] = Counter()
        self.wrong: list[dict[str, Any]] = []
        self.slowest: list[tuple[float, int]] = []
        self.largest: list[tuple[float, int]] = []
        self._folders = folders
        self._left = seeds

    def run(self) -> None:
        """Have all cases."""
        while self._left:
            self._one_worker()

    def _one_worker(self) -> None:
        part = self._left[:CASES_OF_A_WORKER]
        command = [sys.executable, __file__, "--worker", self.kind, str(part.start), str(part.stop), str(part.step)]
        command += ["--models", *map(str, self._folders)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            watch = _Watch(worker.pid)
            seed = None
            for line in worker.stdout:
                if not line.startswith("{"):
                    seed = int(line)
                    watch.begin()
                elif seed is not None:
                    watch.stop()
                    self._left = self._left[1:]
                    self._note(seed, **json.loads(line))
                    seed = None
            watch.stop()
            code = worker.wait()
        if seed is not None:
            self._left = self._left[1:]
            end, text = watch.why or ("slow" if code == -signal.SIGPROF else "signal", f"exit code {code}")
            self._note(seed, end, text, 0.0, 0)
        elif code:
            raise SystemExit(f"a worker ended with exit code {code} before its first case")

    def _note(self, seed: int, end: str, text: str, seconds: float, bytes: int) -> None:
        self.ends[end] += 1
        self.slowest = sorted([*self.slowest, (round(seconds, 2), seed)])[-5:]
        self.largest = sorted([*self.largest, (bytes, seed)])[-5:]
        if end not in GOOD:
            self.wrong.append({"kind": self.kind, "seed": seed, "end": end, "text": text})
            print(f"{self.kind}:{seed} {end}: {text}", flush=True)

    def report(self) -> dict[str, Any]:
        """Return what came of it."""
        return {"ends": dict(self.ends), "slowest": self.slowest, "largest": self.largest, "wrong": self.wrong}


class _Watch:
    """Ends a process that takes too much memory, or too long without taking CPU time."""

    def __init__(self, pid: int) -> None:
        self.why: tuple[str, str] | None = None
        self._pid = pid
        self._begun: float | None = None
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Begin with a case."""
        self._begun = time.monotonic()

    def stop(self) -> None:
        """End with a case."""
        self._begun = None

    def _look(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        statm = Path(f"/proc/{self._pid}/statm")
        while True:
            time.sleep(0.05)
            try:
                used = int(statm.read_text().split()[1]) * page
            except (OSError, IndexError):
                return
            if self._begun is None:
                continue
            if used > MOST_MEMORY:
                self.why = "fat", f"{used} bytes"
            elif time.monotonic() - self._begun > CLOCK_SECONDS:
                self.why = "slow", f"{CLOCK_SECONDS} s by the clock"
            if self.why is not None:
                os.kill(self._pid, signal.SIGKILL)
                return


def fuzz(cases: dict[str, range], workers: int, folders: list[Path], place: Path | None) -> dict[str, Any]:
    """Have the cases of each kind in several processes at once; return the report, which a file has every minute."""
    # Neighbors have different CPUs, see work().
    runs = [Run(kind, seeds[number::workers], folders) for kind, seeds in cases.items() for number in range(workers)]
    pending = collections.deque(runs)

    def work_off() -> None:
        while pending:
            pending.popleft().run()

    threads = [threading.Thread(target=work_off) for _ in range(workers)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    while True:
        for thread in threads:
            thread.join(60 / workers)
        kinds = {kind: _sum([run for run in runs if run.kind == kind]) for kind in cases}
        report = {"version": fastbn.__version__, "seconds": round(time.monotonic() - start), "kinds": kinds}
        if place is not None:
            place.write_text(json.dumps(report, indent=2) + "\n")
        if not any(thread.is_alive() for thread in threads):
            return report


def _sum(runs: list[Run]) -> dict[str, Any]:
    total = Run(runs[0].kind, range(0), [])
    for run in runs:
        total.ends += run.ends
        total.wrong += run.wrong
        total.slowest = sorted([*total.slowest, *run.slowest])[-5:]
        total.largest = sorted([*total.largest, *run.largest])[-5:]
    return total.report()


def again(case: str, keep: str | None, folders: list[Path]) -> int:
    """Have one case once more in this process, with its traceback; write the model to a file."""
    kind, _, number = case.partition(":")
    seed = int(number)
    corpus = Corpus(folders) if kind == "bytes" else None
    data = made(corpus, kind, seed)
    if keep is not None:
        Path(keep).write_bytes(data)
    faulthandler.dump_traceback_later(CPU_SECONDS, repeat=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / DATA_FILE).write_bytes(bytes(DATA_SIZE))
        try:
            print(folded(random.Random(seed + 1), data, Path(folder)))
        except Exception:
            traceback.print_exc()
            return 1
    return 0


def main() -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=100_000, help="mutations of files")
    parser.add_argument("--built", type=int, default=20_000, help="built models")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--models", type=Path, nargs="+", default=[folder for folder in FOLDERS if folder.exists()])
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--again", metavar="KIND:SEED", help="one case once more")
    parser.add_argument("--keep", metavar="FILE", help="with --again: where the model goes")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, *numbers = arguments.worker
        work(kind, range(*map(int, numbers)), arguments.models)
        return 0
    if arguments.again:
        return again(arguments.again, arguments.keep, arguments.models)
    counts = {"bytes": arguments.bytes, "built": arguments.built}
    cases = {kind: range(arguments.first, arguments.first + count) for kind, count in counts.items() if count}
    report = fuzz(cases, arguments.workers, arguments.models, arguments.json)
    for kind, found in report["kinds"].items():
        print(f"{kind}: {found['ends']}, at most {found['slowest'][-1][0]} s and {found['largest'][-1][0] >> 20} MB")
    return any(found["wrong"] for found in report["kinds"].values())


if __name__ == "__main__":
    sys.exit(main())
