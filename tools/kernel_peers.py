"""What bench_kernels times beside fastbn: NumPy, PyTorch, ONNX Runtime, oneDNN, JAX and TensorFlow on the arrays of a case.

Each function returns {operation: call}. A call computes once and returns the result, or a function that brings it, so that what only a
check needs is not timed.
"""

import ctypes
import functools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

BN_EPS = 1e-5


def optional(name):
    try:
        return __import__(name)
    except ImportError:
        print(f"{name}: not installed, left out", file=sys.stderr)
        return None


def numpy_calls(case):
    shape = [-1 if i == case.axis % case.x.ndim else 1 for i in range(case.x.ndim)]
    axes = tuple(i for i in range(case.x.ndim) if i != case.axis % case.x.ndim)
    weight, bias = case.weight.reshape(shape), case.bias.reshape(shape)

    def train():
        mean = case.x.mean(axes, keepdims=True)
        centered = np.subtract(case.x, mean, out=case.out)
        centered *= weight / np.sqrt(np.square(centered).mean(axes, keepdims=True) + 1e-5)
        centered += bias
        return centered

    return {"train": train}


def torch_calls(torch, case):
    """PyTorch on the same memory; channels last is a transposed view, as PyTorch has it."""

    def view(array):
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype.name == "bfloat16" else torch.from_numpy(array)
        return tensor.movedim(-1, 1) if case.axis == -1 else tensor

    x, dy, residual, out = (view(array) for array in (case.x, case.dy, case.residual, case.out))
    dtype = torch.float64 if case.dtype == np.float64 else torch.float32
    weight, bias, mean, var = (torch.from_numpy(values).to(dtype) for values in (case.weight, case.bias, case.mean, case.var))
    back = (lambda t: t.movedim(1, -1)) if case.axis == -1 else (lambda t: t)
    saved = torch.empty(case.shape[1], dtype=dtype), torch.empty(case.shape[1], dtype=dtype)
    _, save_mean, save_std = torch.native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)

    def forward(training):
        running = (None, None) if training else (mean, var)
        torch.native_batch_norm(x, weight, bias, *running, training, 0.0, 1e-5, out=(out, *saved))
        return back(out)

    def backward():
        grads = torch.ops.aten.native_batch_norm_backward(dy, x, weight, mean, var, save_mean, save_std, True, 1e-5, [True, True, True])
        return back(grads[0])

    def fused():
        y = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, 1e-5, out=(out, *saved))[0]
        return back(torch.relu_(y.add_(residual)))

    return {"train": lambda: forward(True), "backward new": backward, "infer": lambda: forward(False), "fused": fused}


def onnx_calls(onnxruntime, onnx, case, threads):
    if case.layout != "NCHW" or case.dtype != np.float32:
        return {}
    helper, numpy_helper, FLOAT = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT
    node = helper.make_node("BatchNormalization", ["x", "w", "b", "m", "v"], ["y"])
    values = zip("wbmv", (case.weight, case.bias, case.mean, case.var), strict=True)
    ends = [helper.make_tensor_value_info(name, FLOAT, case.shape) for name in "xy"]
    graph = helper.make_graph([node], "bn", ends[:1], ends[1:], [numpy_helper.from_array(array, name) for name, array in values])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", case.x)
    binding.bind_output("y", "cpu", 0, np.float32, case.shape, case.out.ctypes.data)

    def infer():
        session.run_with_iobinding(binding)
        return case.out

    return {"infer": infer}


def build_onednn(folder, prefix):
    """The functions of onednn_peer.cpp, None where a C++ compiler or oneDNN is missing below a folder with include/ and lib/."""
    compiler, prefix = shutil.which("c++") or shutil.which("g++"), Path(prefix)
    if compiler is None or not (prefix / "include/oneapi/dnnl/dnnl.hpp").exists() or not (prefix / "lib/libdnnl.so").exists():
        print("onednn: no C++ compiler or no oneDNN (pip install onednn-cpu-gomp onednn-devel-cpu-gomp), left out", file=sys.stderr)
        return None
    source, library = Path(__file__).with_name("onednn_peer.cpp"), Path(folder) / "onednn_peer.so"
    paths = [f"-I{prefix / 'include'}", f"-L{prefix / 'lib'}", f"-Wl,-rpath,{prefix / 'lib'}"]
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-fopenmp", source, *paths, "-ldnnl", "-o", library], check=True)
    functions = ctypes.CDLL(str(library))
    functions.peer_open.restype = ctypes.c_void_p
    functions.peer_open.argtypes = [ctypes.c_int] * 3 + [ctypes.c_void_p] * 4
    functions.peer_run.argtypes = [ctypes.c_void_p, ctypes.c_int]
    functions.peer_fetch.argtypes = functions.peer_close.argtypes = [ctypes.c_void_p]
    return functions


class OneDNN:
    """oneDNN on the memory of a case or, blocked, on copies in blocks of channels, which lie in memory of NumPy as all that is timed."""

    def __init__(self, functions, case, threads, blocked):
        self.functions, self.case = functions, case
        N, C, *spatial = case.shape
        shape = np.int64([N, C, math.prod(spatial[:1]), math.prod(spatial[1:])])
        mean, m2 = case.stats.mean, case.stats.m2
        vectors = (case.weight, case.bias, case.mean, case.var, mean, m2 / case.stats.count, np.zeros(C))
        self.values = np.concatenate([np.float32(vector) for vector in vectors])
        layout = 2 if blocked else int(case.layout == "NHWC")
        padded = case.x.size // C * -(-C // 16) * 16 if blocked else 0
        self.blocked = [np.zeros(padded, case.dtype) for _ in range(3)]
        plain, own = (np.uintp([array.ctypes.data for array in arrays]) for arrays in ((case.x, case.dy, case.out), self.blocked))
        is_bfloat16 = case.dtype.name == "bfloat16"
        pointers = (array.ctypes.data for array in (shape, plain, own, self.values))
        self.handle = functions.peer_open(layout, is_bfloat16, threads, *pointers)

    def calls(self):
        # Training overwrites the mean and the variance of the batch with the same values.
        numbers = {"train": 0, "infer": 1, "backward": 2} if self.handle else {}
        return {operation: functools.partial(self.run, number) for operation, number in numbers.items()}

    def run(self, number):
        self.functions.peer_run(self.handle, number)
        return self.fetch

    def fetch(self):
        self.functions.peer_fetch(self.handle)
        return self.case.out

    def close(self):
        if self.handle:
            self.functions.peer_close(self.handle)


def jax_calls(jax, case):
    """Compiled by XLA; JAX allocates every result, and chooses the number of threads itself."""
    if case.dtype != np.float32:
        return {}
    x, weight, bias, mean, var = (jax.numpy.asarray(array) for array in (case.x, case.weight, case.bias, case.mean, case.var))
    axes = tuple(i for i in range(case.x.ndim) if i != case.axis % case.x.ndim)
    shape = [-1 if i == case.axis % case.x.ndim else 1 for i in range(case.x.ndim)]

    def affine(x, mean, var, weight, bias):
        scale = weight * jax.lax.rsqrt(var + BN_EPS)
        return (x - mean.reshape(shape)) * scale.reshape(shape) + bias.reshape(shape)

    def train(x, weight, bias):
        mean = x.mean(axes)
        return affine(x, mean, jax.numpy.square(x - mean.reshape(shape)).mean(axes), weight, bias)

    infer, train = jax.jit(affine), jax.jit(train)
    return {
        "train": lambda: train(x, weight, bias).block_until_ready(),
        "infer": lambda: infer(x, mean, var, weight, bias).block_until_ready(),
    }


def tensorflow_calls(tensorflow, case):
    """The kernels of channels last; those of channels first are of GPUs only. TensorFlow allocates every result."""
    if case.layout != "NHWC" or case.dtype != np.float32 or case.x.ndim != 4:
        return {}
    arrays = (case.x, case.dy, case.weight, case.bias, case.mean, case.var)
    x, dy, weight, bias, mean, var = (tensorflow.constant(array) for array in arrays)
    ops = tensorflow.raw_ops
    empty = tensorflow.constant(np.zeros(0, np.float32))
    saved = ops.FusedBatchNormV3(x=x, scale=weight, offset=bias, mean=empty, variance=empty, epsilon=BN_EPS, is_training=True)

    def forward(training):
        statistics = {"mean": empty, "variance": empty} if training else {"mean": mean, "variance": var}
        y = ops.FusedBatchNormV3(x=x, scale=weight, offset=bias, epsilon=BN_EPS, is_training=training, **statistics).y
        return y.numpy  # without a copy, and it waits for the result

    def backward():
        spaces = {f"reserve_space_{i}": saved[2 + i] for i in (1, 2, 3)}
        grads = ops.FusedBatchNormGradV3(y_backprop=dy, x=x, scale=weight, epsilon=BN_EPS, is_training=True, **spaces)
        return grads.x_backprop.numpy

    return {"train": lambda: forward(True), "infer": lambda: forward(False), "backward new": backward}


def limit_threads(threads):
    """JAX and TensorFlow, if there; they take the number of their threads when they are loaded, and keep it."""
    os.environ |= {"NPROC": str(threads), "TF_CPP_MIN_LOG_LEVEL": "2"}
    jax, tensorflow = optional("jax"), optional("tensorflow")
    if tensorflow:
        tensorflow.config.threading.set_intra_op_parallelism_threads(threads)
        tensorflow.config.threading.set_inter_op_parallelism_threads(1)
    return {"jax": jax, "tensorflow": tensorflow}
