"""Models as ONNX text, random weights for them, and onnxruntime as oracle."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

import fastbn

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


def model(text, *, opset=17, ir_version=8, imports=(), **constants):
    """Return the ModelProto of a graph in ONNX text; constants become initializers, and a node is named after its first output."""
    graph = onnx.parser.parse_graph(f"g {text}")
    graph.initializer.extend(numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items())
    for node in graph.node:
        node.name = node.name or node.output[0]
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in imports)]
    return helper.make_model(graph, ir_version=ir_version, opset_imports=opsets, producer_name="tests")


def normal(*shape, seed=0, dtype=np.float32):
    """Return a random weight."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def norm(channels, suffix="", *, seed=1, dtype=np.float32, positive=False):
    """Return the parameters s, t, m, v (scale, bias, mean, var) of a BatchNormalization as keyword arguments of `model`."""
    rng = np.random.default_rng([seed, channels])
    scale = rng.uniform(0.5, 2, channels) * (1 if positive else rng.choice([-1, 1], channels))
    parameters = {"s": scale, "t": rng.normal(size=channels), "m": rng.normal(size=channels), "v": rng.uniform(0.3, 3, channels)}
    return {name + suffix: values.astype(dtype) for name, values in parameters.items()}


def run(proto, feeds=None, seed=3, reuses_memory=True):
    """Return the outputs of a model in onnxruntime, its optimizer off, on the feeds or on random ones."""
    options = onnxruntime.SessionOptions()
    options.enable_mem_reuse = reuses_memory
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, random_feeds(proto, seed) if feeds is None else feeds)


def random_feeds(proto, seed=3):
    """Return one normal input for each graph input that is no initializer; unknown sizes are 2."""
    rng = np.random.default_rng(seed)
    known = {tensor.name for tensor in proto.graph.initializer}
    feeds = {}
    for info in proto.graph.input:
        if info.name not in known:
            kind = info.type.tensor_type
            shape = [dim.dim_value or 2 for dim in kind.shape.dim]
            feeds[info.name] = rng.standard_normal(shape).astype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return feeds


def assert_same(original, folded, feeds=None, units=64):
    """Compare two models in onnxruntime: no element may differ by more than some rounding errors of the largest."""
    feeds = random_feeds(original) if feeds is None else feeds
    for before, after in zip(run(original, feeds), run(folded, feeds), strict=True):
        assert before.dtype == after.dtype
        assert before.shape == after.shape
        unit = UNIT.get(before.dtype.name, 0.0)
        before, after = before.astype(np.float64), after.astype(np.float64)
        assert np.isfinite(before).all()
        assert np.abs(before - after).max(initial=0) <= units * unit * np.abs(before).max(initial=0)


def ops(proto):
    """Return the operators of a model's main graph as a string, in order."""
    return " ".join(node.op_type for node in proto.graph.node)


def folds(proto, expected, **options):
    """Fold a model, demand these operators afterwards and the same outputs; return the FoldResult."""
    result = fastbn.fold(proto, **options)
    assert ops(result.model) == expected, [(kept.code, kept.reason) for kept in result.kept]
    onnx.checker.check_model(result.model)
    assert result.parity.status == "ok", result.parity
    assert all(fold.error <= fold.bound for fold in result.folded if fold.error is not None)
    assert_same(proto, result.model)
    return result


def refuses(proto, code=None, **options):
    """Fold a model that must stay as it is, byte for byte; return the reason's sentence."""
    result = fastbn.fold(proto, **options)
    assert [(fold.bn, fold.into) for fold in result.folded] == []
    assert result.to_bytes() == proto.SerializeToString()
    (kept,) = result.kept
    if code is not None:
        assert kept.code == code, kept.reason
    return kept.reason


def initializers(proto):
    """Return name -> array of a model's initializers."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def codes(result):
    """Return how many nodes stay for which reason."""
    return Counter(kept.code for kept in result.kept)


CONV_BN = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
    c = Conv(x, w, b)
    y = BatchNormalization(c, s, t, m, v)
}"""


CLASSIFIER = """(float[N,3,8,8] x) => (float[N,5] y) {
    c = Conv(x, w, b)
    n = BatchNormalization(c, s, t, m, v)
    r = Relu(n)
    p = GlobalAveragePool(r)
    f = Flatten(p)
    y = Gemm(f, w2)
}"""


def classifier(**changes):
    """Return a small classifier of images: Conv, BatchNormalization, Relu, pooling and a Gemm."""
    return conv_bn(CLASSIFIER, w2=normal(4, 5), **changes)


def conv_bn(text=CONV_BN, **changes):
    """Return Conv and BatchNormalization with 4 channels, the model most tests start from."""
    constants = {"w": normal(4, 3, 3, 3), "b": normal(4), **norm(4)}
    options = {name: changes.pop(name) for name in ("opset", "ir_version", "imports") if name in changes}
    constants.update(changes)
    if text is CONV_BN and constants["b"] is None:
        text = text.replace(", b)", ")")
    return model(text, **options, **{name: values for name, values in constants.items() if values is not None})
