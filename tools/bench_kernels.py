"""Time the array functions beside NumPy, PyTorch, ONNX Runtime, oneDNN, JAX and TensorFlow, and beside what memory allows, in one run.

    python tools/bench_kernels.py                                  twenty shapes, float32, one thread and all
    python tools/bench_kernels.py --threads 1 2 4 8 16             the same on a machine with 16 cores, some minutes
    python tools/bench_kernels.py --shapes shapes.json             those of tools/shapes.json, or another list of {"N", "C", "spatial"}
    python tools/bench_kernels.py --json bench.json --chart bench.svg
    python tools/bench_kernels.py --accuracy                       the error of y beside PyTorch's, and no times

Every result is checked before it is timed. The sides take turns, those of both layouts together, and each figure is the 10th percentile of
the calls of all turns, in microseconds. All read and write memory of NumPy (out=), but for "backward new", where every side allocates, as
PyTorch's backward pass does. The roofs: a copy (np.copyto), a copy with streaming stores, and reading alone. Peers that are not installed
are left out, with a line that says so. oneDNN is taken plain and in blocks of 16 channels (8 without AVX-512), whose rearranging is not
timed. JAX and TensorFlow stand in runs with one --threads N only.
"""

import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from kernel_peers import OneDNN, build_onednn, jax_calls, limit_threads, numpy_calls, onnx_calls, optional, tensorflow_calls, torch_calls
from kernel_tables import OPERATIONS, chart, markdown, print_case, summary

import fastbn
from fastbn import reference
from fastbn.kernel_bench import percentile, time_calls

SHAPES = [
    (64, 512),
    (128, 2048),
    (3136, 256),
    (4096, 256),
    (1, 2048, 7, 7),
    (8, 19, 33, 33),
    (32, 160, 7, 7),
    (16, 24, 28, 28),
    (1, 64, 56, 56),
    (1, 64, 112, 112),
    (2, 256, 28, 28),
    (2, 251, 28, 28),
    (1, 3, 224, 224),
    (50, 512, 7, 7),
    (32, 2048, 7, 7),
    (96, 192, 17, 17),
    (32, 1024, 14, 14),
    (32, 512, 28, 28),
    (32, 256, 56, 56),
    (32, 64, 112, 112),
]
TURNS = 6
REST = 0.01  # seconds before a turn, in which the threads of the side before stop waiting for work: OpenMP's take 8 ms here
ROOF_SOURCE = """
#include <emmintrin.h>
#include <stddef.h>
void streaming_copy(char *to, const char *from, size_t bytes) {
    for (size_t i = 0; i + 64 <= bytes; i += 64)
        for (size_t j = i; j < i + 64; j += 16)
            _mm_stream_si128((__m128i *)(to + j), _mm_loadu_si128((const __m128i *)(from + j)));
    _mm_sfence();
}
static __m128i add(__m128i sum, const char *from) {
    return _mm_add_epi32(sum, _mm_loadu_si128((const __m128i *)from));
}
void read_all(char *to, const char *from, size_t bytes) {
    __m128i a = _mm_setzero_si128(), b = a, c = a, d = a;
    for (size_t i = 0; i + 128 <= bytes; i += 128) {
        a = add(add(a, from + i), from + i + 64);
        b = add(add(b, from + i + 16), from + i + 80);
        c = add(add(c, from + i + 32), from + i + 96);
        d = add(add(d, from + i + 48), from + i + 112);
    }
    if (bytes >= 16)
        _mm_storeu_si128((__m128i *)to, _mm_add_epi32(_mm_add_epi32(a, b), _mm_add_epi32(c, d)));
}
"""


def build_roofs(folder):
    """What memory allows: a copy with streaming stores, the least above the cache, and reading alone. Empty without a compiler."""
    compiler = shutil.which("cc")
    if compiler is None or os.uname().machine != "x86_64":
        print("streaming copy, read: no C compiler for x86-64, left out", file=sys.stderr)
        return {}
    source, library = Path(folder) / "roof.c", Path(folder) / "roof.so"
    source.write_text(ROOF_SOURCE)
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    functions = {"streaming copy": ctypes.CDLL(str(library)).streaming_copy, "read": ctypes.CDLL(str(library)).read_all}
    for function in functions.values():
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return functions


class Case:
    """One shape, layout and dtype, with the arrays that every side reads and writes."""

    def __init__(self, shape, layout, dtype):
        self.shape, self.layout, self.dtype = shape, layout, dtype
        rng = np.random.default_rng(0)
        order = (0, *range(2, len(shape)), 1) if layout == "NHWC" else tuple(range(len(shape)))

        def tensor():
            values = rng.standard_normal(shape, dtype=np.float32) + np.float32(0.5)
            return np.ascontiguousarray(values.transpose(order)).astype(dtype)

        self.axis = -1 if layout == "NHWC" else 1
        self.x, self.dy, self.residual = tensor(), tensor(), tensor()
        self.out = np.zeros_like(self.x)
        self.weight, self.bias = rng.standard_normal((2, shape[1])).astype(np.float32)
        self.mean, self.var = np.full(shape[1], 0.5, np.float32), np.ones(shape[1], np.float32)
        self.stats = fastbn.batch_stats(self.x, axis=self.axis)
        self.want = functools.cache(self.compute)

    def compute(self, operation):
        """The result by the float64 twin, on the first channels only where all of them would take long."""
        few = slice(0, max(1, min(self.shape[1], 2_000_000 // (self.x.size // self.shape[1]))))
        at = (..., few) if self.axis == -1 else (slice(None), few)
        x, dy, residual = (array[at].astype(np.float64) for array in (self.x, self.dy, self.residual))
        weight, bias = self.weight[few], self.bias[few]
        if operation == "train":
            return at, reference.batch_norm_train(x, weight, bias, axis=self.axis)[0]
        if operation.startswith("backward"):
            return at, reference.batch_norm_backward(dy, x, reference.batch_stats(x, axis=self.axis), weight, bias, axis=self.axis)[0]
        extra = {"activation": "relu", "residual": residual} if operation == "fused" else {}
        return at, reference.batch_norm(x, self.mean[few], self.var[few], weight, bias, axis=self.axis, **extra)

    def check(self, who, operation, result):
        at, want = self.want(operation)
        error = np.abs(np.asarray(result)[at].astype(np.float64) - want).max()
        bound = {2: 0.1, 4: 1e-3, 8: 1e-9}[self.dtype.itemsize]
        if not error < bound:
            raise SystemExit(f"{who} {operation} {self.shape} {self.layout}: wrong by {error}")


def fastbn_calls(case):
    keywords = {"axis": case.axis, "out": case.out}
    return {
        "train": lambda: fastbn.batch_norm_train(case.x, case.weight, case.bias, **keywords)[0],
        "backward": lambda: fastbn.batch_norm_backward(case.dy, case.x, case.stats, case.weight, case.bias, **keywords)[0],
        "backward new": lambda: fastbn.batch_norm_backward(case.dy, case.x, case.stats, case.weight, case.bias, axis=case.axis)[0],
        "infer": lambda: fastbn.batch_norm(case.x, case.mean, case.var, case.weight, case.bias, **keywords),
        "fused": lambda: fastbn.batch_norm(
            case.x, case.mean, case.var, case.weight, case.bias, activation="relu", residual=case.residual, **keywords
        ),
    }


def sides_of(case, threads, modules, stack):
    """Return the calls of each side; the stack closes those that hold memory of their own."""
    sides = {"fastbn": fastbn_calls(case)}
    if case.dtype in (np.float32, np.float64) and threads == 1:
        sides["numpy"] = numpy_calls(case)
    if modules["torch"] and case.dtype != np.float16:
        modules["torch"].set_num_threads(threads)
        sides["torch"] = torch_calls(modules["torch"], case)
    if modules["onnxruntime"] and modules["onnx"]:
        sides["onnxruntime"] = onnx_calls(modules["onnxruntime"], modules["onnx"], case, threads)
    if modules["onednn"] and case.dtype.name in ("float32", "bfloat16"):
        for name in ("onednn", "onednn blocked") if case.layout == "NCHW" else ("onednn",):
            peer = stack.enter_context(contextlib.closing(OneDNN(modules["onednn"], case, threads, name != "onednn")))
            sides[name] = peer.calls()
    if modules.get("jax"):
        sides["jax"] = jax_calls(modules["jax"], case)
    if modules.get("tensorflow"):
        sides["tensorflow"] = tensorflow_calls(modules["tensorflow"], case)
    return sides


def roofs_of(case, modules):
    roofs = {"copy": lambda: np.copyto(case.out, case.x)}
    start = -case.out.ctypes.data % 64
    if case.out.nbytes > 1024:
        addresses = case.out.ctypes.data + start, case.x.ctypes.data + start, case.out.nbytes - 64
        roofs |= {name: functools.partial(function, *addresses) for name, function in modules["roofs"].items()}
    return roofs


def time_in_turn(calls, seconds):
    """Return the microseconds of each call. They take turns, so that what else the machine does meets all of them."""
    times = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            time.sleep(REST)
            times[name] += time_calls(call, seconds / TURNS, least=2)
    return {name: percentile(each) for name, each in times.items()}


def check_sides(case, sides):
    for who, calls in sides.items():
        for operation, call in calls.items():
            result = call()
            if callable(result):
                result = result()
            if who == "torch" and case.dtype.name == "bfloat16":
                result = result.float()
            case.check(who, operation, result)


def calls_of(case, threads, modules, stack):
    """The calls of each side, checked, and the roofs, by side and operation."""
    sides = sides_of(case, threads, modules, stack)
    check_sides(case, sides)
    calls = {(side, operation): call for operation in OPERATIONS for side, each in sides.items() if (call := each.get(operation))}
    return {(side, "roof"): call for side, call in roofs_of(case, modules).items()} | calls


def rows(cases, threads, seconds, modules):
    """One record per layout, operation and side."""
    fastbn.set_num_threads(threads)
    with contextlib.ExitStack() as stack:
        calls = {(case, *what): call for case in cases for what, call in calls_of(case, threads, modules, stack).items()}
        calls = dict(sorted(calls.items(), key=lambda item: ("roof", *OPERATIONS).index(item[0][2])))
        for (case, side, operation), us in time_in_turn(calls, seconds).items():
            about = {"shape": case.shape, "layout": case.layout, "dtype": case.dtype.name, "threads": threads, "bytes": case.x.nbytes}
            yield {**about, "side": side, "operation": operation, "us": us}


def measure(shapes, dtypes, layouts, thread_counts, seconds, onednn):
    modules = {name: optional(name) for name in ("torch", "onnxruntime", "onnx")}
    if len(thread_counts) == 1:
        modules |= limit_threads(thread_counts[0])
    records = []
    with tempfile.TemporaryDirectory() as folder:
        modules |= {"roofs": build_roofs(folder), "onednn": build_onednn(folder, onednn)}
        for shape in shapes:
            for dtype in dtypes:
                cases = [Case(shape, layout, dtype) for layout in (layouts if math.prod(shape[2:]) > 1 else ("NCHW",))]
                for threads in thread_counts:
                    records += rows(cases, threads, seconds, modules)
                for case in cases:
                    print_case(records, case)
    return records


def print_accuracy():
    """The largest error of y against long double: x = k + randn, 65,536 values per channel, weight 1, bias 0."""
    torch = optional("torch")
    for k in (1.0, 1e2, 1e4, 1e6, 1e7):
        for layout, shape in (("channels first", (4, 2, 16384)), ("channels last", (65536, 2))):
            x = (np.random.default_rng(0).standard_normal(shape) + k).astype(np.float32)
            axes = (0, *range(2, x.ndim))
            centered = x - x.astype(np.longdouble).mean(axes, keepdims=True)
            want = centered / np.sqrt((centered**2).mean(axes, keepdims=True) + 1e-5)
            line = f"mean/std {k:8.0e} {layout:14} fastbn {float(np.abs(fastbn.batch_norm_train(x)[0] - want).max()):.0e}"
            if torch is not None:
                y = torch.nn.functional.batch_norm(torch.from_numpy(x), None, None, training=True).numpy()
                line += f" torch {float(np.abs(y - want).max()):.0e}"
            print(line)


def dtype_of(name):
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def read_shapes(path):
    """Return the shapes that a file lists, N, C and spatial each; a name that is not here may be that of a file beside this script."""
    path = Path(path) if Path(path).exists() else Path(__file__).with_name(str(path))
    return [(item["N"], item["C"], *item["spatial"]) for item in json.loads(path.read_text(encoding="utf-8"))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", help="JSON list of shapes: N, C and spatial")
    parser.add_argument("--most-bytes", type=int, default=1 << 28, help="leave out shapes whose float32 tensor is larger")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "float64", "float16", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, fastbn.get_num_threads()}))
    parser.add_argument("--seconds", type=float, default=0.15, help="for each figure")
    parser.add_argument("--layout", nargs="+", default=["NCHW", "NHWC"], choices=["NCHW", "NHWC"])
    parser.add_argument("--onednn", default=sys.prefix, metavar="FOLDER", help="where include/ and lib/ of oneDNN are")
    parser.add_argument("--accuracy", action="store_true", help="print errors instead of times")
    parser.add_argument("--json", help="write every figure here")
    parser.add_argument("--chart", help="write an SVG here")
    parser.add_argument("--markdown", action="store_true", help="print the float32 figures as the table of docs/benchmarks.md at the end")
    arguments = parser.parse_args()
    if arguments.accuracy:
        print_accuracy()
        return
    shapes = read_shapes(arguments.shapes) if arguments.shapes else SHAPES
    shapes = [shape for shape in dict.fromkeys(shapes) if math.prod(shape) * 4 <= arguments.most_bytes]
    dtypes = [dtype_of(name) for name in arguments.dtype]
    records = measure(shapes, dtypes, arguments.layout, arguments.threads, arguments.seconds, arguments.onednn)
    print("\n".join(summary(records)))
    if arguments.json:
        about = {"config": fastbn.show_config(), "records": records}
        Path(arguments.json).write_text(json.dumps(about, indent=1) + "\n")
    if arguments.chart:
        chart(records, arguments.chart)
    if arguments.markdown:
        print(markdown(records))


if __name__ == "__main__":
    main()
