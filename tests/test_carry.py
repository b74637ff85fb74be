"""Operators that let an affine pass, in both directions: PASSES where they may, STAYS, with the code of the refusal, where they may not."""

import numpy as np
import onnx
import pytest
from sketch import conv_bn, folds, initializers, model, norm, normal, ops, refuses

import fastbn

W, B = normal(4, 3, 3, 3), normal(4, seed=8)


def ints(*values):
    return np.array(values, np.int64)


def zeroed(parameters):
    return {name: np.zeros_like(values) if name[0] in "tm" else values for name, values in parameters.items()}


def backward(nodes, *, channels=4, x="2,3,8,8", positive=False, shift=True, opset=17, w=W, **constants):
    """Return Conv, which gives c (2x4x6x6), `nodes`, which give d from c, and a BatchNormalization of d."""
    parameters = norm(channels, positive=positive)
    parameters = parameters if shift else zeroed(parameters)
    text = f"(float[{x}] x) => (float y) {{ c = Conv(x, w, b) {nodes} y = BatchNormalization(d, s, t, m, v) }}"
    used = {"b": normal(w.shape[0], seed=8), **parameters, **constants}
    return model(text, opset=opset, w=w, **used)


def forward(nodes, *, x="2,4,6,6", w, positive=False, shift=True, opset=17, **constants):
    """Return Tanh, a BatchNormalization, which gives n, `nodes`, which give d from n, and Conv of d (Gemm where w is a matrix)."""
    channels = int(x.split(",")[1])
    parameters = norm(channels, positive=positive)
    parameters = parameters if shift else zeroed(parameters)
    last = "y = Conv(d, w)" if w.ndim > 2 else "y = Gemm(d, w)"
    text = f"(float[{x}] x) => (float y) {{ r = Tanh(x) n = BatchNormalization(r, s, t, m, v) {nodes} {last} }}"
    return model(text, opset=opset, w=w, **parameters, **constants)


def repeated(nodes, *, times=2, **constants):
    """Return what `backward` does with a norm whose channels are a first part, repeated."""
    proto = backward(nodes, **constants)
    for tensor in proto.graph.initializer:
        if tensor.name in "stmv":
            values = onnx.numpy_helper.to_array(tensor)
            tensor.raw_data = np.tile(values[: values.size // times], times).tobytes()
    return proto


def gone(proto):
    """Return the operators of a model without its BatchNormalization."""
    return " ".join(op for op in ops(proto).split() if op != "BatchNormalization")


W4 = normal(5, 4, 2, 2)

# The one window of a single element takes what is before it and what is behind it.
SPREAD = "<kernel_shape = [2,2], dilations = [2,2], pads = [1,1,1,1]>"

SWAP, REVERSED = "Transpose <perm = [0,2,1,3]>", "ReverseSequence <time_axis = 1, batch_axis = 0>"

# name -> model whose norm goes.
PASSES = {
    "Dropout whose mask something reads": backward("d, e = Dropout(c) z = Cast <to = 1> (e)"),
    "Dropout whose mask something reads, forward": forward("d, e = Dropout(n) z = Cast <to = 1> (e)", w=W4),
    "Identity": backward("d = Identity(c)"),
    "Cast to the same type": backward("d = Cast<to = 1>(c)"),
    "Cast to the same type forward": forward("d = Cast<to = 1>(n)", w=W4),
    "Neg": backward("d = Neg(c)"),
    "Neg forward": forward("d = Neg(n)", w=W4),
    "Transpose and back": backward("e = Transpose <perm = [0,2,3,1]> (c) d = Transpose <perm = [0,3,1,2]> (e)"),
    "Transpose without perm": backward("e = Transpose(c) f = Transpose <perm = [3,2,1,0]> (e) d = Identity(f)"),
    "Transpose forward": forward("e = Transpose <perm = [0,2,3,1]> (n) d = Transpose <perm = [0,3,1,2]> (e)", w=W4),
    "Reshape keeps": backward("d = Reshape(c, k)", k=ints(0, 4, -1)),
    "Reshape merges the space": backward("d = Reshape(c, k)", k=ints(2, 4, 36)),
    "Reshape splits the space": backward("d = Reshape(c, k)", k=ints(2, 4, 2, 3, 6)),
    "Flatten expands": forward("d = Flatten(n)", w=normal(4 * 36, 3)),
    "Flatten of 1x1": forward("p = GlobalAveragePool(n) d = Flatten(p)", w=normal(4, 3)),
    "Flatten of one axis": backward("p = GlobalAveragePool(c) d = Flatten <axis = 1> (p)"),
    "Reshape expands": forward("d = Reshape(n, k)", w=normal(4 * 36, 3), k=ints(2, -1)),
    "Reshape there and back": backward("e = Reshape(c, k) d = Reshape(e, l)", k=ints(2, 4, 36), l=ints(2, 4, 6, 6)),
    "Reshape, a channel for two": backward("d = Reshape(c, k)", channels=2, k=ints(2, 2, 2, 36)),
    "Reshape of one channel": forward(
        "e = Reshape(n, k) d = Reshape(e, l)", x="2,1,6,6", w=normal(4, 2, 3, 3), k=ints(9, 8), l=ints(1, 2, 6, 6)
    ),
    "Unsqueeze": backward("d = Unsqueeze(c, k)", k=ints(2)),
    "Unsqueeze, attribute": backward("d = Unsqueeze <axes = [4]> (c)", opset=11),
    "Squeeze": backward("p = GlobalAveragePool(c) d = Squeeze(p, k)", k=ints(2, 3)),
    "Squeeze, attribute": backward("p = GlobalAveragePool(c) d = Squeeze <axes = [2,3]> (p)", opset=11),
    "Squeeze forward": forward("p = GlobalAveragePool(n) d = Squeeze(p, k)", w=normal(4, 3), k=ints(-1, -2)),
    "Concat on the channels": backward("e = Conv(x, w2) d = Concat <axis = 1> (c, e)", channels=6, w2=normal(2, 3, 3, 3)),
    "Concat on the channels, axis -3": backward("e = Conv(x, w2) d = Concat <axis = -3> (e, c)", channels=6, w2=normal(2, 3, 3, 3)),
    "Concat on another axis": backward("e = Conv(x, w2) d = Concat <axis = 2> (c, e)", w2=normal(4, 3, 3, 3)),
    "Concat of a constant": backward("d = Concat <axis = 1> (c, k)", channels=6, k=normal(2, 2, 6, 6)),
    "Concat forward": forward("d = Concat <axis = 1> (r, n)", w=normal(5, 8, 2, 2)),
    "Split backwards": backward("e, d = Split <axis = 1> (c, k) z = Tanh(e)", channels=3, k=ints(1, 3)),
    "Split forward": forward(
        "e, f = Split <axis = 1> (n, k) g = Conv(f, w2) d = Identity(e)", w=normal(5, 1, 2, 2), w2=normal(5, 3, 2, 2), k=ints(1, 3)
    ),
    "Split of the space": forward("e, f = Split <axis = 2> (n, k) g = Conv(f, w) d = Identity(e)", w=normal(5, 4, 2, 2), k=ints(2, 4)),
    "Split, attribute": forward(
        "e, f = Split <axis = 1, split = [1,3]> (n) g = Conv(f, w2) d = Identity(e)", w=normal(5, 1, 2, 2), w2=normal(5, 3, 2, 2), opset=11
    ),
    "Slice of channels": backward("d = Slice(c, k, l, a)", channels=2, k=ints(1), l=ints(3), a=ints(1)),
    "Slice of channels, last ones": backward("d = Slice(c, k, l, a)", channels=2, k=ints(-2), l=ints(2**62), a=ints(1)),
    "Slice, steps": backward("d = Slice(c, k, l, a, p)", channels=2, k=ints(3), l=ints(-(2**62)), a=ints(1), p=ints(-2)),
    "Slice of the space": backward("d = Slice(c, k, l, a)", k=ints(1, 0), l=ints(4, 3), a=ints(2, 3)),
    "Slice, attribute": backward("d = Slice <axes = [1], starts = [1], ends = [3]> (c)", channels=2, opset=9),
    "Slice forward": forward("d = Slice(n, k, l, a)", w=normal(5, 2, 2, 2), k=ints(1), l=ints(3), a=ints(-3)),
    "Gather of channels": backward("d = Gather <axis = 1> (c, k)", channels=3, k=ints(3, 0, -2)),
    "Gather by a matrix, behind the channels": backward("d = Gather <axis = 2> (c, k)", k=ints(3, 3, 0, 1).reshape(2, 2)),
    "Gather by an array, from the end": backward("d = Gather <axis = -1> (c, k)", k=ints(3, 3, 0, 1).reshape(2, 1, 2)),
    "Gather by a number, behind the channels": backward("d = Gather <axis = 3> (c, k)", k=np.int64(-1)),
    "Gather by a number, before the channels": backward(
        "e = Transpose <perm = [0,2,1,3]> (c) f = Gather <axis = 1> (e, k) d = Identity(f)", k=np.int64(2)
    ),
    "Gather by a matrix, before the channels": backward(
        "e = Transpose <perm = [2,0,1,3]> (c) f = Gather <axis = 0> (e, k) d = Transpose <perm = [0,3,1,2,4]> (f)",
        k=ints(0, 1).reshape(2, 1),
    ),
    "Gather by an input, another axis": backward(
        "f = Flatten(x) i = ArgMax <axis = 1, keepdims = 0> (f) e = Mod(i, six) d = Gather <axis = 2> (c, e)", six=ints(6)
    ),
    "Gather of the space": backward("d = Gather <axis = 2> (c, k)", k=ints(3, 3, 0)),
    "Gather forward by a number": forward("d = Gather <axis = 2> (n, k)", w=normal(4, 3), k=np.int64(1), x="2,4,6"),
    "Gather forward by a matrix": forward(
        "e = Gather <axis = 3> (n, k) d = Flatten(e)", w=normal(4 * 36, 3), k=ints(*range(6)).reshape(2, 3)
    ),
    "Gather forward, twice": forward("d = Gather <axis = 1> (n, k)", w=normal(5, 3, 2, 2), k=ints(3, 3, -4)),
    "AveragePool": backward("d = AveragePool <kernel_shape = [2,2]> (c)"),
    "AveragePool, pads not counted": backward("d = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1]> (c)"),
    "AveragePool, ceil": backward("d = AveragePool <kernel_shape = [3,3], strides = [2,2], ceil_mode = 1> (c)"),
    "AveragePool, no shift": backward("d = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1], count_include_pad = 1> (c)", shift=False),
    "AveragePool forward": forward("d = AveragePool <kernel_shape = [2,2]> (n)", w=W4),
    "GlobalAveragePool": backward("d = GlobalAveragePool(c)"),
    "MaxPool": backward("d = MaxPool <kernel_shape = [2,2], pads = [1,1,1,1]> (c)", positive=True),
    "MaxPool forward": forward("d = MaxPool <kernel_shape = [2,2]> (n)", w=W4, positive=True),
    "GlobalMaxPool": backward("d = GlobalMaxPool(c)", positive=True),
    "ReduceMean keeps": backward("d = ReduceMean <axes = [2,3], keepdims = 1> (c)"),
    "ReduceMean drops": backward("d = ReduceMean <axes = [2,3], keepdims = 0> (c)"),
    "ReduceMean, axes as input": backward("d = ReduceMean <keepdims = 0> (c, k)", opset=18, k=ints(-1, -2)),
    "ReduceMean drops the axis before": backward("e = Transpose <perm = [2,0,1,3]> (c) d = ReduceMean <axes = [0], keepdims = 0> (e)"),
    "ReduceMean forward": forward("d = ReduceMean <axes = [2,3], keepdims = 0> (n)", w=normal(4, 3)),
    "ReduceMean forward, axes as input": forward("d = ReduceMean <keepdims = 0> (n, k)", w=normal(4, 3), opset=18, k=ints(2, 3)),
    "ReduceMax": backward("d = ReduceMax <axes = [2,3]> (c)", positive=True),
    "ReduceMin": backward("d = ReduceMin <axes = [2,3]> (c)", positive=True),
    "ReduceSum, no shift": backward("d = ReduceSum(c, k)", shift=False, k=ints(2)),
    "ReduceL2, no shift": backward("d = ReduceL2 <axes = [2,3]> (c)", shift=False, positive=True),
    "Relu": backward("d = Relu(c)", positive=True, shift=False),
    "Relu forward": forward("d = Relu(n)", w=W4, positive=True, shift=False),
    "LeakyRelu": backward("d = LeakyRelu <alpha = 0.2> (c)", positive=True, shift=False),
    "PRelu of a steep slope": forward("d = PRelu(n, k)", w=W4, positive=True, shift=False, k=30 * normal(4, 1, 1)),
    "LeakyRelu of a steep slope": forward("d = LeakyRelu <alpha = 30.0> (n)", w=W4, positive=True, shift=False),
    "PRelu": backward("d = PRelu(c, k)", positive=True, shift=False, k=normal(4, 1, 1)),
    "Resize nearest": backward("d = Resize(c, , k)", k=np.float32([1, 1, 2, 2])),
    "Resize linear": backward('d = Resize <mode = "linear"> (c, , k)', k=np.float32([1, 1, 1.5, 2])),
    "Resize to sizes": backward("d = Resize(c, , , k)", k=ints(2, 4, 9, 12)),
    "Resize of listed axes": backward("d = Resize <axes = [2,3]> (c, , k)", opset=18, k=np.float32([2, 2])),
    "Resize, opset 10": backward("d = Resize(c, k)", opset=10, k=np.float32([1, 1, 2, 2])),
    "Upsample": backward("d = Upsample(c, k)", opset=9, k=np.float32([1, 1, 2, 2])),
    "Resize forward": forward("d = Resize(n, , k)", w=W4, k=np.float32([1, 1, 2, 2])),
    "DepthToSpace DCR": backward("d = DepthToSpace <blocksize = 2> (c)", channels=2, w=normal(8, 3, 3, 3)),
    "DepthToSpace CRD": backward('d = DepthToSpace <blocksize = 2, mode = "CRD"> (c)', channels=2, w=normal(8, 3, 3, 3)),
    "SpaceToDepth": repeated("d = SpaceToDepth <blocksize = 2> (c)", times=4, channels=16),
    "SpaceToDepth forward": forward("d = SpaceToDepth <blocksize = 3> (n)", w=normal(5, 36, 2, 2)),
    "SpaceToDepth of one number": forward(
        "e = Reshape(n, k) d = SpaceToDepth <blocksize = 2> (e)", x="2,1,6,6", w=normal(5, 8, 2, 2), k=ints(1, 2, 6, 6)
    ),
    "Expand": backward("p = GlobalAveragePool(c) d = Expand(p, k)", k=ints(2, 4, 3, 3)),
    "Expand by an axis": backward(
        "e = Transpose <perm = [1,0,2,3]> (c) f = Expand(e, k) d = Transpose <perm = [2,1,0,3,4]> (f)", k=ints(3, 4, 2, 6, 6)
    ),
    "Pad edge": backward('d = Pad <mode = "edge"> (c, k)', k=ints(0, 0, 1, 1, 0, 0, 1, 1)),
    "Pad reflect, attribute": backward('d = Pad <mode = "reflect", pads = [0,0,1,1,0,0,1,1]> (c)', opset=10),
    "Pad with zeros, no shift": backward("d = Pad(c, k)", shift=False, k=ints(0, 0, 1, 1, 0, 0, 1, 1)),
    "Pad of listed axes": backward('d = Pad <mode = "edge"> (c, k, , a)', opset=18, k=ints(1, 1), a=ints(-1)),
    "Add of two branches": backward("e = Conv(x, w2) d = Add(c, e)", w2=normal(4, 3, 3, 3, seed=2)),
    "Sub of two branches": backward("e = Conv(x, w2) d = Sub(e, c)", w2=normal(4, 3, 3, 3, seed=2)),
    "Sum of three branches": backward("e = Conv(x, w2) f = Conv(x, w) d = Sum(e, c, f)", w2=normal(4, 3, 3, 3, seed=2)),
    "Mean of two branches": backward("e = Conv(x, w2) d = Mean(e, c)", w2=normal(4, 3, 3, 3, seed=2)),
    "Max of two branches": backward("e = Conv(x, w2) d = Max(e, c)", positive=True, w2=normal(4, 3, 3, 3, seed=2)),
    "Min of a branch and a constant": backward("d = Min(c, k)", positive=True, k=normal(1, 4, 1, 1)),
    "Where": backward("e = Conv(x, w2) g = Conv(x, w) f = Greater(g, k) d = Where(f, c, e)", w2=normal(4, 3, 3, 3, seed=2), k=B[:1]),
    "Where of a constant": backward("e = Conv(x, w) f = Greater(e, l) d = Where(f, c, k)", k=normal(1, 4, 1, 1), l=B[:1]),
    "Abs": backward("d = Abs(c)", shift=False, positive=True),
    "Abs forward": forward("d = Abs(n)", w=W4, shift=False, positive=True),
    "LpPool": backward("d = LpPool <kernel_shape = [2,2], p = 3> (c)", shift=False, positive=True),
    "LpPool forward": forward("d = LpPool <kernel_shape = [2,2]> (n)", w=W4, shift=False, positive=True),
    "GlobalLpPool": backward("d = GlobalLpPool(c)", shift=False, positive=True),
    "GlobalLpPool forward": forward("p = GlobalLpPool(n) d = Flatten(p)", w=normal(4, 3), shift=False, positive=True),
    "Tile": backward("d = Tile(c, k)", k=ints(1, 1, 2, 1)),
    "Tile forward": forward("d = Tile(n, k)", w=W4, k=ints(1, 1, 1, 2)),
    "Tile of the channels": forward("d = Tile(n, k)", w=normal(5, 8, 1, 1), k=ints(1, 2, 1, 1)),
    "Tile of the channels, backward": repeated("d = Tile(c, k)", w=normal(2, 3, 3, 3), k=ints(1, 2, 1, 1)),
    "ReverseSequence": backward(f"e = {SWAP} (c) f = {REVERSED} (e, k) d = {SWAP} (f)", k=ints(3, 2)),
    "ReverseSequence forward": forward(f"e = {SWAP} (n) f = {REVERSED} (e, k) d = {SWAP} (f)", w=W4, k=ints(3, 2)),
    "Mul by a mask, no shift": backward(
        "p = Sigmoid(x) q = ReduceMean <axes = [1]> (p) e = AveragePool <kernel_shape = [3,3]> (q) d = Mul(c, e)", shift=False
    ),
    "Div by a value, no shift": backward(
        "p = Exp(x) q = ReduceMean <axes = [1]> (p) e = AveragePool <kernel_shape = [3,3]> (q) d = Div(c, e)", shift=False
    ),
    "Mul by a mask forward": forward("p = Sigmoid(x) q = ReduceMean <axes = [1]> (p) d = Mul(q, n)", w=W4, shift=False),
}


@pytest.mark.parametrize("case", PASSES)
def test_passes(case):
    proto = PASSES[case]
    folds(proto, gone(proto))


# name -> (code, model whose norm stays).
STAYS = {
    "MaxPool of windows in the padding": ("padding", backward(f"d = MaxPool {SPREAD} (c)", positive=True, w=normal(4, 3, 8, 8))),
    "MaxPool of windows in the padding, forward": (
        "padding",
        forward(f"d = MaxPool {SPREAD} (n)", x="N,4,1,1", positive=True, w=normal(5, 4, 1, 1)),
    ),
    "AveragePool of windows in the padding": ("padding", backward(f"d = AveragePool {SPREAD} (c)", opset=19, w=normal(4, 3, 8, 8))),
    "Reshape splits the channels": ("axis", forward("d = Reshape(n, k)", k=ints(2, 2, 2, 36), w=normal(5, 2, 2, 2))),
    "Reshape mixes the channels": ("axis", backward("d = Reshape(c, k)", channels=6, k=ints(2, 6, 24))),
    "Reshape of an unknown target": (
        "axis-unknown",
        forward("k = Shape(x) l = ReduceMax <axes = [0]> (k) o = Concat <axis = 0> (l, l, l, l) d = Reshape(n, o)", x="N,4,6,M", w=W4),
    ),
    "Flatten behind the channels": ("axis", forward("d = Flatten <axis = 2> (n)", w=normal(36, 3))),
    "Concat on another axis": ("other-branch", forward("d = Concat <axis = 2> (n, x)", w=W4)),
    "Concat of a value that cannot take it": (
        "graph-output",
        backward("e = Tanh(c) f = Conv(x, w) d = Concat <axis = 1> (f, e)", channels=8),
    ),
    "Concat of one value twice": ("other-readers", backward("d = Concat <axis = 1> (c, c)", channels=8)),
    "Split, one branch cannot": (
        "no-absorber",
        forward("e, f = Split <axis = 1> (n, k) g = Tanh(f) d = Identity(e)", w=normal(5, 2, 2, 2), k=ints(2, 2)),
    ),
    "Split of the space backwards": ("other-outputs", backward("d, e = Split <axis = 2> (c, k) z = Tanh(e)", k=ints(3, 3))),
    "Slice by computed bounds": (
        "dynamic-index",
        backward(
            "o = Flatten <axis = 0> (x) k = ArgMax <axis = 0> (o) q = Reshape(k, one) d = Slice(c, nul, q, one)",
            channels=2,
            one=ints(1),
            nul=ints(0),
        ),
    ),
    "Gather spreads the channels": (
        "axis",
        backward("e = Gather <axis = 1> (c, k) d = Transpose <perm = [0,2,1,3,4]> (e)", channels=2, k=ints(0, 1, 2, 3).reshape(2, 2)),
    ),
    "GatherElements": ("axis", backward("d = GatherElements <axis = 1> (c, k)", channels=1, k=np.zeros((2, 1, 6, 6), np.int64))),
    "Gather gives a channel twice": ("axis", backward("d = Gather <axis = 1> (c, k)", k=ints(0, 1, 1, 2))),
    "Gather by an input": (
        "dynamic-index",
        backward(
            "f = Flatten(x) k = ArgMax <axis = 1, keepdims = 0> (f) e = Mod(k, four) d = Gather <axis = 1> (c, e)", channels=2, four=ints(4)
        ),
    ),
    "AveragePool counts padding": (
        "padding",
        backward("d = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1], count_include_pad = 1> (c)"),
    ),
    "AveragePool counts SAME padding": (
        "padding",
        backward('d = AveragePool <kernel_shape = [3,3], auto_pad = "SAME_UPPER", count_include_pad = 1> (c)'),
    ),
    "AveragePool counts what ceil adds": (
        "padding",
        backward("d = AveragePool <kernel_shape = [2,2], strides = [3,3], ceil_mode = 1, count_include_pad = 1> (c)"),
    ),
    "AveragePool over the channels": (
        "axis",
        backward("e = Transpose <perm = [0,2,1,3]> (c) f = AveragePool <kernel_shape = [1,1]> (e) d = Transpose <perm = [0,2,1,3]> (f)"),
    ),
    "MaxPool, negative scale": ("mixed-sign-through-maxpool", backward("d = MaxPool <kernel_shape = [2,2]> (c)")),
    "MaxPool forward, negative scale": ("mixed-sign-through-maxpool", forward("d = MaxPool <kernel_shape = [2,2]> (n)", w=W4)),
    "GlobalMaxPool, negative scale": ("mixed-sign-through-maxpool", backward("d = GlobalMaxPool(c)")),
    "MaxPool with its indices": (
        "other-outputs",
        forward("d, i = MaxPool <kernel_shape = [2,2]> (n) j = Cast <to = 1> (i)", w=W4, positive=True),
    ),
    "ReduceMean of the channels": ("axis", forward("e = ReduceMean <axes = [1]> (n) d = Concat <axis = 1> (e, e, e, e)", w=W4)),
    "ReduceSum counts the shift": ("axis-unknown", forward("d = ReduceSum(n, k)", x="2,4,H,6", w=normal(5, 4, 1, 2), k=ints(2))),
    "ReduceMax, negative scale": ("mixed-sign-through-maxpool", backward("d = ReduceMax <axes = [2]> (c)")),
    "Relu, negative scale": ("mixed-sign-through-relu", backward("d = Relu(c)", shift=False)),
    "Relu, shift": ("shift-through-relu", backward("d = Relu(c)", positive=True)),
    "LeakyRelu, shift": ("shift-through-relu", backward("d = LeakyRelu(c)", positive=True)),
    "PRelu, negative scale": ("mixed-sign-through-relu", backward("d = PRelu(c, k)", shift=False, k=normal(4, 1, 1))),
    "Resize of the channels": ("axis", backward("d = Resize(c, , k)", channels=8, k=np.float32([1, 2, 1, 1]))),
    "Resize of the channels, listed": ("axis", backward("d = Resize <axes = [1,2]> (c, , k)", opset=18, channels=8, k=np.float32([2, 1]))),
    "Resize cubic": ("interpolation", backward('d = Resize <mode = "cubic"> (c, , k)', k=np.float32([1, 1, 2, 2]))),
    "Resize of a region": (
        "interpolation",
        backward(
            'd = Resize <mode = "linear", coordinate_transformation_mode = "tf_crop_and_resize"> (c, roi, k)',
            k=np.float32([1, 1, 2, 2]),
            roi=np.float32([0, 0, 0, 0, 1, 1, 2, 2]),
        ),
    ),
    "DepthToSpace forward": ("axis", forward("d = DepthToSpace <blocksize = 2> (n)", w=normal(5, 1, 2, 2))),
    "SpaceToDepth of channels that differ": ("axis", backward("d = SpaceToDepth <blocksize = 2> (c)", channels=16)),
    "SpaceToDepth of the space": (
        "axis",
        backward(
            "e = Transpose <perm = [0,2,1,3]> (c) f = SpaceToDepth <blocksize = 2> (e) g = DepthToSpace <blocksize = 2> (f)"
            " d = Transpose <perm = [0,2,1,3]> (g)"
        ),
    ),
    "Expand of the channels": ("axis", backward("d = Expand(c, k)", w=normal(1, 3, 3, 3), k=ints(2, 4, 6, 6))),
    "Pad with zeros": ("padding", backward("d = Pad(c, k)", k=ints(0, 0, 1, 1, 0, 0, 1, 1))),
    "Pad with ones": ("padding", backward("d = Pad(c, k, o)", shift=False, k=ints(0, 0, 1, 1, 0, 0, 1, 1), o=np.float32(1))),
    "Pad of the channels": ("axis", backward('d = Pad <mode = "edge"> (c, k)', k=ints(0, 1, 0, 0, 0, -1, 0, 0))),
    "Pad of listed channels": ("axis", backward('d = Pad <mode = "edge"> (c, k, , a)', opset=18, k=ints(1, -1), a=ints(1))),
    "Add of a branch that cannot": ("graph-output", backward("e = Tanh(c) f = Conv(x, w) d = Add(f, e)")),
    "Add forward": ("other-branch", forward("d = Add(n, x)", w=W4)),
    "Add that makes the channels": ("axis", backward("g = Conv(x, w1) d = Add(c, g)", w1=normal(1, 3, 3, 3))),
    "Mul by a mask, shift": ("shift-cannot-pass", forward("p = Sigmoid(x) d = Mul(n, p)", w=W4)),
    "Cast to another type and back": ("graph-output", backward("h = Cast<to = 11>(c) d = Cast<to = 1>(h)")),
    "Cast forward": ("no-absorber", forward("h = Cast<to = 11>(n) d = Cast<to = 1>(h)", w=W4)),
    "Max, scale of mixed signs": (
        "mixed-sign-through-maxpool",
        backward("e = Conv(x, w2) d = Max(e, c)", w2=normal(4, 3, 3, 3, seed=2)),
    ),
    "Where forward": ("no-absorber", forward("f = Greater(x, k) d = Where(f, n, x)", w=W4, k=B[:1])),
    "Abs of a shift": ("shift-through-relu", forward("d = Abs(n)", w=W4, positive=True)),
    "LpPool of a shift": ("shift-cannot-pass", forward("d = LpPool <kernel_shape = [2,2]> (n)", w=W4, positive=True)),
    "Tile of channels that differ": ("axis", backward("d = Tile(c, k)", channels=8, k=ints(1, 2, 1, 1))),
    "ReverseSequence of the channels": (
        "axis",
        backward("e = Transpose <perm = [1,0,2,3]> (c) f = ReverseSequence(e, k) d = Transpose <perm = [1,0,2,3]> (f)", k=ints(3, 2)),
    ),
    "Mean of a scale forward": ("other-branch", forward("d = Mean(n, x)", w=W4)),
    "Div by the value": ("no-absorber", forward("p = Sigmoid(x) d = Div(p, n)", w=W4, shift=False)),
    "Softmax": ("graph-output", backward("d = Softmax <axis = 1> (c)")),
    "graph output": (
        "graph-output",
        model(
            "(float[2,3,8,8] x) => (float y, float c) { c = Conv(x, w, b) d = Identity(c) y = BatchNormalization(d, s, t, m, v) }",
            w=W,
            b=B,
            **norm(4),
        ),
    ),
}


@pytest.mark.parametrize("case", STAYS)
def test_stays(case):
    code, proto = STAYS[case]
    result = fastbn.fold(proto, verify=False)
    (kept,) = result.kept
    assert kept.code == code, kept.reason
    assert result.to_bytes() == proto.SerializeToString()


def test_add_gives_the_scale_to_both_and_the_shift_to_one():
    proto = PASSES["Add of two branches"]
    before, after = initializers(proto), initializers(fastbn.fold(proto).model)
    scale = before["s"] / np.sqrt(before["v"] + 1e-5)
    np.testing.assert_allclose(after["w2"], before["w2"] * scale.reshape(4, 1, 1, 1), rtol=1e-6)
    assert sorted(set(after) - set(before)) == []
    np.testing.assert_allclose(after["b"], before["b"] * scale + before["t"] - before["m"] * scale, rtol=1e-5, atol=1e-6)


TEN = dict(zip("stmv", (np.full(4, value, np.float32) for value in (3, 1, 0, 1)), strict=True))


def test_the_norm_behind_a_relu_is_not_moved_before_it():
    """OpenCV did so, whatever the signs and the shift."""
    assert "Relu" in refuses(backward("d = Relu(c)"))


def test_the_scale_of_a_norm_behind_a_residual_add_reaches_both_branches():
    """OpenCV dropped it on one."""
    proto = backward(
        "p = Conv <pads = [1,1,1,1]> (c, w2) e = Conv(x, w3) d = Add(e, p)", w2=normal(4, 4, 3, 3), w3=normal(4, 3, 3, 3, seed=3)
    )
    folds(proto, gone(proto))


def test_the_bias_of_a_depthwise_convolution_is_scaled():
    """ncnn forgot it."""
    text = "(float[2,4,6,6] x) => (float y) { c = Conv <group = 4> (x, w, b) y = BatchNormalization(c, s, t, m, v) }"
    result = folds(conv_bn(text, w=normal(4, 1, 3, 3), b=B + 10, **TEN), "Conv")
    np.testing.assert_allclose(initializers(result.model)["b"], (B + 10) * 3 / np.sqrt(1 + 1e-5) + 1, rtol=1e-6)


SQUARE = {
    "MatMul, Transpose": "c = MatMul(x, w) d = Transpose <perm = [1,0]> (c)",
    "MatMul, Reshape": "c = MatMul(x, w) e = Reshape(c, k) d = Transpose <perm = [1,0]> (e)",
}


@pytest.mark.parametrize("case", SQUARE)
def test_the_axis_is_followed_where_all_are_equally_long(case):
    """onnxruntime 1.17 to 1.31 folds along the wrong one; here only x could take the scale."""
    used = {"k": ints(4, 4)} if "Reshape" in case else {}
    text = f"(float[4,4] x) => (float y) {{ {SQUARE[case]} y = BatchNormalization(d, s, t, m, v) }}"
    refuses(model(text, w=normal(4, 4), **used, **norm(4)))


def test_a_reshaped_value_that_is_a_graph_output():
    """onnxruntime fails to create a session of this."""
    text = "(float[2,3] x) => (float y, float[2,4] d) { c = MatMul(x, w) d = Reshape(c, k) y = BatchNormalization(d, s, t, m, v) }"
    refuses(model(text, w=normal(3, 4), k=ints(2, 4), **norm(4)), "graph-output")


def test_types_are_not_mixed():
    """A float16 convolution and float32 parameters, which onnxruntime would refuse if the weights became float32."""
    text = "(float16[2,3,8,8] x) => (float16 y) { c = Conv(x, w, b) y = BatchNormalization(c, s, t, m, v) }"
    parameters = {name: values.astype(np.float32 if name in "mv" else np.float16) for name, values in norm(4).items()}
    proto = model(text, opset=15, w=W.astype(np.float16), b=B.astype(np.float16), **parameters)
    result = fastbn.fold(proto)
    assert ops(result.model) == "Conv"
    assert {array.dtype.name for array in initializers(result.model).values()} == {"float16"}


def test_parameters_per_element_stay():
    text = "(float[2,3,8,8] x) => (float y) { c = Conv(x, w, b) y = BatchNormalization <spatial = 0> (c, s, t, m, v) }"
    parameters = {name: np.ones((4, 6, 6), np.float32) for name in "stmv"}
    refuses(model(text, opset=8, ir_version=7, w=W, b=B, **parameters), "per-element", verify=False)


# RepVGG: the norm of the identity becomes the center of the kernel beside it.
def test_the_scale_goes_before_a_matmul_over_another_axis_and_the_shift_stays_as_an_add():
    text = """(float[2,3,8,8] x) => (float y) {
        c = Conv(x, w, b)
        d = MatMul(c, w2)
        y = BatchNormalization(d, s, t, m, v)
    }"""
    folds(conv_bn(text, w2=normal(6, 6)), "Conv MatMul Add")


def test_the_other_parts_of_a_split_stay_as_they_are():
    text = """(float[2,3,8,8] x) => (float y, float z) {
        c = Conv(x, w, b)
        d, e = Split <axis = 1> (c, k)
        y = BatchNormalization(d, s, t, m, v)
        z = Tanh(e)
    }"""
    proto = conv_bn(text, **norm(2), k=ints(2, 2))
    folds(proto, "Conv Split Tanh")


def test_an_axis_of_any_length_takes_no_memory():
    proto = forward("d = Concat <axis = 1> (n, z)", w=normal(5, 8, 2, 2))
    proto.graph.input.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [2, 1 << 31, 6, 6]))
    assert "too long" in refuses(proto, verify=False)
