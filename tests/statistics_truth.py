"""What a re-estimation must find, by the plainest means: the whole model on all the data, one batch normalization after the other."""

import numpy as np
import onnx
from onnx import numpy_helper
from sketch import model, norm, normal, run

__all__ = ["as_float64", "branches", "images", "population"]


def images(count=23, size=8, channels=3, seed=5):
    """Images whose channels have different means and deviations."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, channels, size, size)) * np.arange(1, channels + 1).reshape(1, -1, 1, 1) + 2
    return x.astype(np.float32)


def branches(opset=17, **options):
    """A network with a residual branch, two BN of one value, and a BN behind a pooling: 5 BN in 4 levels."""
    text = """(float[N, 3, H, W] x) => (float[N, 5] y) {
        c1 = Conv <pads = [1, 1, 1, 1]> (x, w1)
        b1 = BatchNormalization (c1, s1, t1, m1, v1)
        r1 = Relu (b1)
        c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2)
        b2 = BatchNormalization (c2, s2, t2, m2, v2)
        b3 = BatchNormalization (c2, s3, t3, m3, v3)
        k = Mul (b2, b3)
        sum = Add (k, r1)
        r2 = Relu (sum)
        b4 = BatchNormalization (r2, s4, t4, m4, v4)
        p = GlobalAveragePool (b4)
        f = Flatten (p)
        g = Gemm <transB = 1> (f, w3)
        y = BatchNormalization (g, s5, t5, m5, v5)
        }"""
    weights = {"w1": normal(4, 3, 3, 3), "w2": normal(4, 4, 3, 3), "w3": normal(5, 4)}
    parameters = {}
    for number, channels in enumerate((4, 4, 4, 4, 5), 1):
        parameters |= norm(channels, str(number), seed=number)
    return model(text, opset=opset, **weights, **parameters, **options)


def as_float64(stats):
    """BatchStats of float64 from all values at once."""
    values = np.moveaxis(np.asarray(stats, np.float64), 1, 0).reshape(stats.shape[1], -1)
    mean = values.mean(axis=1, dtype=np.longdouble)
    return mean.astype(float), ((values - mean[:, None]) ** 2).mean(axis=1).astype(float)


def population(proto, feeds, skip=(), unbiased=False):
    """Return name of each BN -> (mean, var), and the model that has them: each taken on all the data, with all before it replaced."""
    done = onnx.ModelProto()
    done.CopyFrom(proto)
    tensors = {tensor.name: tensor for tensor in done.graph.initializer}
    found = {}
    for node in done.graph.node:
        if node.op_type != "BatchNormalization" or node.name in skip:
            continue
        asked = onnx.ModelProto()
        asked.CopyFrom(done)
        del asked.graph.output[:]
        asked.graph.output.add(name=node.input[0])
        (values,) = run(asked, feeds)
        mean, var = as_float64(values)
        if unbiased:
            count = values.size // values.shape[1]
            var = var * count / (count - 1)
        found[node.name] = mean, var
        for name, array in zip(node.input[3:], (mean, var), strict=True):
            dtype = numpy_helper.to_array(tensors[name]).dtype
            tensors[name].CopyFrom(numpy_helper.from_array(array.astype(dtype), name))
    return found, done
