"""What a model costs in onnxruntime at its default options: bytes, time to load, memory, and which of its kernels compute in float."""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

import numpy as np
import onnx

from fastbn.errors import StorageError
from fastbn.graph.model.storage import Source
from fastbn.graph.runtime import runtime_errors, session

if TYPE_CHECKING:
    from fastbn.graph.parity.feeds import Feed

__all__ = ["Kernels", "give_back_large_blocks", "kernels_of", "load_times", "quick_ms", "resident_mb", "size_of", "trim"]

NameT = TypeVar("NameT", bound=str)

# Sessions made of each file; their median counts.
LOADS = 3

# What onnxruntime converts between float and integers with; every other kernel that gives floats computes in float.
CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")

# Runs of a first impression of a latency, and milliseconds that they may take.
QUICK_RUNS, QUICK_MS = 30, 200.0

FLOATS = ("float", "float16", "bfloat16", "double")

# What glibc's mallopt calls the bytes from which on a block is the system's, and how many that are here.
M_MMAP_THRESHOLD, LARGE_BLOCK = -3, 1 << 20

# Run in a process of its own, whose children make one session each: onnxruntime is loaded there and has made a session of a model that does
# nothing, so that what a child takes more is the model's. Linux tells what is resident; pages of libraries do not count.
RESIDENT = """
import os, sys, time
import onnxruntime
rounds, fewest, seconds, nothing, paths = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), bytes.fromhex(sys.argv[4]), sys.argv[5:]
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
alone = onnxruntime.SessionOptions()
alone.intra_op_num_threads = 1
warm = onnxruntime.InferenceSession(nothing, alone, providers=["CPUExecutionProvider"])
def resident():
    total, counts = 0, False
    for line in open("/proc/self/smaps"):
        if line.startswith("Rss:"):
            total += int(line.split()[1]) * counts
        elif not line.split(maxsplit=1)[0].endswith(":"):
            counts = ".so" not in line
    return total
start = time.monotonic()
for turn in range(rounds):
    if turn >= fewest and time.monotonic() - start > seconds:
        break
    for number, path in enumerate(paths):
        child = os.fork()
        if not child:
            try:
                before = resident()
                session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
                os.write(1, f"{number} {(resident() - before) / 1024}\\n".encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
"""

# Measurements of the memory of each file, at least so many, however long they take, and seconds after which no further round starts.
MEASUREMENTS, FEWEST_MEASUREMENTS, RESIDENT_SECONDS = 5, 3, 2.0

NOTHING = '<ir_version: 8, opset_import: ["": 13]> nothing (float[1] x) => (float[1] y) { y = Identity(x) }'


class KernelFields(TypedDict):
    """Kernels as JSON holds them."""

    float: int
    conversions: int
    other: int
    float_ops: dict[str, int]


@dataclass(frozen=True)
class Kernels:
    """How many kernels onnxruntime runs for a model, after its optimization: in float, converting, and the rest; floats is op -> number."""

    float: int
    conversions: int
    other: int
    floats: dict[str, int]

    def to_dict(self) -> KernelFields:
        """Return the fields as JSON holds them."""
        return {"float": self.float, "conversions": self.conversions, "other": self.other, "float_ops": self.floats}


def size_of(path: Path) -> int:
    """Return the bytes of a model file and of the data files it reads."""
    return Source(onnx.load(path, load_external_data=False), path, str(path)).size()


def load_times(paths: Mapping[NameT, Path], progress: Callable[[str], None] | None = None) -> dict[NameT, float]:
    """Return name -> median milliseconds that onnxruntime takes to make a session of each file, in turn."""
    times: dict[NameT, list[float]] = {name: [] for name in paths}
    for turn in range(LOADS):
        for name, path in paths.items():
            if progress:
                progress(f"{name}, {turn + 1} of {LOADS}")
            start = time.perf_counter()
            session(str(path), optimize=True)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def resident_mb(paths: Mapping[NameT, Path]) -> dict[NameT, list[float]]:
    """Return name -> resident memory in MB that each loaded model takes, measured some times in turn; nothing where no system says it."""
    nothing = onnx.parser.parse_model(NOTHING).SerializeToString().hex()
    numbers = [str(MEASUREMENTS), str(FEWEST_MEASUREMENTS), str(RESIDENT_SECONDS)]
    found: dict[NameT, list[float]] = {}
    names = list(paths)
    try:
        command = [sys.executable, "-c", RESIDENT, *numbers, nothing, *map(str, paths.values())]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        for number, value in map(str.split, done.stdout.splitlines()):
            found.setdefault(names[int(number)], []).append(float(value))
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    return found


def trim() -> None:
    """Let the C library give freed memory back to the system: glibc keeps what closed sessions have taken."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def give_back_large_blocks() -> None:
    """Let the C library give every large block back to the system as soon as it is freed, from now on and in the whole process: glibc takes
    ever larger ones from its heap otherwise, in which sessions that are made and closed leave holes."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def quick_ms(path: Path, feed: Feed) -> float | None:
    """Return the median milliseconds of a few runs on one thread, None where it does not run: a first impression, without an interval."""
    times: list[float] = []
    try:
        model = session(str(path), threads=1, optimize=True)
        model.run(None, feed)
        while len(times) < QUICK_RUNS and sum(times) < QUICK_MS:
            start = time.perf_counter()
            model.run(None, feed)
            times.append(1e3 * (time.perf_counter() - start))
    except runtime_errors():
        return None
    return float(np.median(times))


def kernels_of(path: Path, feed: Feed, folder: Path) -> Kernels | None:
    """Return the Kernels of a model on one input, from onnxruntime's profile, written to `folder`; None where it does not run.

    Raises StorageError where the profile is not there or not whole: onnxruntime does not say that it could not write it.
    """
    try:
        profiled = session(str(path), optimize=True, profile=folder / "profile")
        profiled.run(None, feed)
        record = Path(profiled.end_profiling())
    except runtime_errors():
        return None
    try:
        events = json.loads(record.read_text(encoding="utf-8"))
        record.unlink()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not whole"
        raise StorageError(f"Cannot use '{record}', onnxruntime's profile: {str(reason).lower()}") from error
    # A kernel in a loop runs many times: each counts once.
    kernels = {event["args"]["node_index"] + event["name"]: event["args"] for event in events if event["name"].endswith("_kernel_time")}
    floats: dict[str, int] = {}
    conversions = 0
    for kernel in kernels.values():
        kinds = {kind for output in kernel["output_type_shape"] for kind in output}
        if kernel["op_name"] in CONVERSIONS:
            conversions += 1
        elif kinds & set(FLOATS):
            floats[kernel["op_name"]] = floats.get(kernel["op_name"], 0) + 1
    count = sum(floats.values())
    return Kernels(count, conversions, len(kernels) - count - conversions, dict(sorted(floats.items())))
