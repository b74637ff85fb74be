"""What a model costs in onnxruntime at its default options: bytes, time to load, memory, and which of its kernels compute in float."""

from __future__ import annotations

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

from fastbn.graph.model.storage import Source
from fastbn.graph.runtime import runtime_errors, session

if TYPE_CHECKING:
    from fastbn.graph.parity.feeds import Feed

__all__ = ["Kernels", "kernels_of", "load_times", "resident_mb", "size_of"]

NameT = TypeVar("NameT", bound=str)

# Sessions made of each file; their median counts.
LOADS = 3

# What onnxruntime converts between float and integers with; every other kernel that gives floats computes in float.
CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")

FLOATS = ("float", "float16", "bfloat16", "double")

# Run in a process of its own, where no other session holds memory. Linux tells what is resident.
RESIDENT = """
import sys, onnxruntime
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
before = resident()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print((resident() - before) / 1024)
"""


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


def resident_mb(path: Path) -> float | None:
    """Return the resident memory in MB that a loaded model takes, or None where the system does not say."""
    try:
        done = subprocess.run([sys.executable, "-c", RESIDENT, str(path)], capture_output=True, text=True, timeout=120, check=True)
        return float(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def kernels_of(path: Path, feed: Feed, folder: Path) -> Kernels | None:
    """Return the Kernels of a model on one input, from onnxruntime's profile, written to `folder`; None where it does not run."""
    try:
        profiled = session(str(path), optimize=True, profile=folder / "profile")
        profiled.run(None, feed)
        record = Path(profiled.end_profiling())
    except runtime_errors():
        return None
    events = json.loads(record.read_text(encoding="utf-8"))
    record.unlink()
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
