"""What a model costs in onnxruntime at its default options: bytes, time to load, memory, and which of its kernels compute in float."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from fastbn.graph.model.storage import Source, external_tensors
from fastbn.graph.runtime import runtime_errors, session

__all__ = ["Kernels", "kernels_of", "load_times", "resident_mb", "size_of"]

LOADS = 3

# What onnxruntime converts between float and integers with; every other kernel that gives floats computes in float.
CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")

FLOATS = ("float", "float16", "bfloat16", "double")

# A process of its own, so that what other sessions left behind does not count. Linux says what is resident.
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


@dataclass(frozen=True)
class Kernels:
    """How many kernels onnxruntime runs for a model, after its optimisation: in float, converting, and the rest; floats is op -> number."""

    float: int
    conversions: int
    other: int
    floats: dict

    def to_dict(self):
        return {"float": self.float, "conversions": self.conversions, "other": self.other, "float_ops": self.floats}


def size_of(path):
    """Return the bytes of a model file and of the data files it reads."""
    source = Source(onnx.load(path, load_external_data=False), Path(path), str(path))
    return source.size(external_tensors(source.proto))


def load_times(paths, progress=None):
    """Return name -> median milliseconds that onnxruntime takes to make a session of each file, in turn."""
    times = {name: [] for name in paths}
    for turn in range(LOADS):
        for name, path in paths.items():
            if progress:
                progress(f"{name}, {turn + 1} of {LOADS}")
            start = time.perf_counter()
            session(str(path), optimize=True)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def resident_mb(path):
    """Return the resident memory in MB that a loaded model takes, or None where the system does not say."""
    try:
        done = subprocess.run([sys.executable, "-c", RESIDENT, str(path)], capture_output=True, text=True, timeout=120, check=True)
        return float(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def kernels_of(path, feed, folder):
    """Return the Kernels of a model on one input, from onnxruntime's own profile; None where it does not run."""
    try:
        run = session(str(path), optimize=True, profile=folder / "profile")
        run.run(None, feed)
        record = Path(run.end_profiling())
    except runtime_errors():
        return None
    events = json.loads(record.read_text(encoding="utf-8"))
    record.unlink()
    # A kernel in a loop runs many times: each counts once.
    kernels = {event["args"]["node_index"] + event["name"]: event["args"] for event in events if event["name"].endswith("_kernel_time")}
    floats, conversions = {}, 0
    for kernel in kernels.values():
        kinds = {kind for output in kernel["output_type_shape"] for kind in output}
        if kernel["op_name"] in CONVERSIONS:
            conversions += 1
        elif kinds & set(FLOATS):
            floats[kernel["op_name"]] = floats.get(kernel["op_name"], 0) + 1
    count = sum(floats.values())
    return Kernels(count, conversions, len(kernels) - count - conversions, dict(sorted(floats.items())))
