"""Small models that fold, of the operators of both tables: what model_faults.py puts faults into."""

import random

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper

# The operators of both tables, beside batch normalizations.
GRAPHS = (
    "c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) y = Relu(n)",
    "c = Conv(x, w) e = Mul(c, k) f = Add(e, k) n = BatchNormalization(f, s, t, m, v) y = Identity(n)",
    "r = Relu(x) n = BatchNormalization(r, s3, t3, m3, v3) p = Pad(n, pads) y = Conv(p, w, b)",
    "c = ConvTranspose(x, u, b) n = BatchNormalization(c, s, t, m, v) q = AveragePool <kernel_shape = [2,2]> (n) y = Flatten(q)",
    "c = Conv(x, w, b) g = GlobalAveragePool(c) f = Flatten(g) n = BatchNormalization(f, s, t, m, v) y = Gemm(n, d)",
    "c = Conv(x, w, b) i, j = Split <axis = 1> (c, two2) l = Concat <axis = 1> (i, j) n = BatchNormalization(l, s, t, m, v) "
    "y = MaxPool <kernel_shape = [2,2]> (n)",
    "c = Conv(x, w, b) h = Shape(c) g = Gather(h, zero) o = Unsqueeze(g, zero1) p = Concat <axis = 0> (o, rest) f = Reshape(c, p) "
    "e = Reshape(f, back) n = BatchNormalization(e, s, t, m, v) y = Transpose <perm = [0,2,3,1]> (n)",
    'c = Conv(x, w, b) z = Resize <mode = "nearest"> (c, none, scales) l = Slice(z, zero1, four1, zero1) '
    "n = BatchNormalization(l, s, t, m, v) y = Sigmoid(n)",
    "c = Conv(x, w, b) a = Gather <axis = 1> (c, order) n = BatchNormalization(a, s, t, m, v) y = ReduceMean <axes = [2,3]> (n)",
    "c = Conv(x, w, b) o = ConstantOfShape(four1) e = Expand(o, four1) n = BatchNormalization(c, s, e, m, v) l = PRelu(n, k) "
    "y = DepthToSpace <blocksize = 2> (l)",
    "q = DequantizeLinear <axis = 0> (qw, s) c = Conv(x, q, b) n = BatchNormalization(c, s, t, m, v) y = Clip(n)",
    "c = Conv(x, w, b) i = InstanceNormalization(c, s, t) n = BatchNormalization(i, s, t, m, v) l = Dropout(n) y = Sub(l, c)",
    "y = If (flag) < then_branch = yes () => (a) { c = Conv(x, w, b) a = BatchNormalization(c, s, t, m, v) }, "
    "else_branch = no () => (e) { e = Conv(x, w) } >",
    "a = Transpose <perm = [0,2,3,1]> (x) p = MatMul(a, d3) e = Add(p, b) f = Transpose <perm = [0,3,1,2]> (e) "
    "n = BatchNormalization(f, s, t, m, v) h = Neg(n) y = Squeeze(h)",
    "i = Neg(k) j = Sqrt(i) l = Tile(j, ones3) o = Concat <axis = 1> (l, l) c = Conv(x, w) e = Mul(c, k) "
    "n = BatchNormalization(e, s, t, m, v) y = Div(n, o)",
)


def norm(channels: int, suffix: str = "") -> dict[str, np.ndarray]:
    """Return the parameters s, t, m, v (scale, bias, mean, var) of a BatchNormalization."""
    rng = np.random.default_rng([1, channels])
    scale = rng.uniform(0.5, 2, channels) * rng.choice([-1, 1], channels)
    parameters = {"s": scale, "t": rng.normal(size=channels), "m": rng.normal(size=channels), "v": rng.uniform(0.3, 3, channels)}
    return {name + suffix: values.astype(np.float32) for name, values in parameters.items()}


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng([0, *shape]).standard_normal(shape).astype(np.float32)


def constants() -> dict[str, np.ndarray]:
    """Return name -> array of everything that the graphs read."""
    lists = {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "zero1": [0], "rest": [-1], "back": [0, 4, 6, 6], "four1": [4], "two2": [2, 2]}
    lists |= {"order": [3, 1, 0, 2], "ones3": [1, 1, 1]}
    found = {name: np.array(values, np.int64) for name, values in lists.items()}
    found |= {"zero": np.int64(0), "scales": np.ones(4, np.float32), "none": np.zeros(0, np.float32)}
    found |= {"w": _normal(4, 3, 3, 3), "u": _normal(3, 4, 3, 3), "qw": np.int8(50 * _normal(4, 3, 3, 3)), "b": _normal(4)}
    found |= {"k": np.abs(_normal(4, 1, 1)), "d": _normal(4, 5), "d3": _normal(3, 4)}
    return found | norm(4) | norm(3, "3")


def sound(choose: random.Random) -> ModelProto:
    """Return a model that folds."""
    text = choose.choice(GRAPHS)
    used = {name: values for name, values in constants().items() if any(f"{a}{name}{b}" in text for a in " (" for b in ",)")}
    batch = choose.choice(["N", "1", "2"])
    flag = ", bool flag" if "flag" in text else ""
    graph = onnx.parser.parse_graph(f"g (float[{batch},3,8,8] x{flag}) => (float y) {{ {text} }}")
    graph.initializer.extend(numpy_helper.from_array(np.asarray(values), name) for name, values in used.items())
    for node in graph.node:
        node.name = node.output[0]
    opset = choose.choice([9, 11, 13, 17, 17, 18, 21])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)], producer_name="fuzz")
