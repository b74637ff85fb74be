"""Both directions of every row by themselves: what a node makes of an affine gives the same numbers; the oracle is onnxruntime.

Backward, the node with the constants that its row changes, on inputs that have the affines that it passes on, gives S * y + T. Forward, the
node on an input that lacks S and T, with those constants, lacks behind it what the row passes on.
"""

import numpy as np
import pytest
from rows import A4, A4P, A4S, A4T, BN, GROUPED, HALVES, LEFT, PER_ELEMENT, TRANSPOSED, K, W, affine, applied, case, ints
from sketch import norm, normal, run

from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.convolution import _added_to_center


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4 * max(1, np.abs(expected).max(initial=0)))


def check_backward(setting):
    plain = run(setting.proto, setting.feeds)
    answers = setting.answers("backward")
    assert answers
    for transfer in answers:
        assert not [*transfer.required]
        inputs = {slot: applied(given, setting.read(slot)) for slot, given in transfer.passed_on}
        if transfer.skip is not None:
            slot, skip = transfer.skip
            inputs[slot] = inputs[slot] + applied(skip.scale, setting.feeds[skip.source.name])
        found = setting.outputs({slot: new.array() for slot, new in transfer.constants.items()}, inputs, transfer.attributes)
        expected = [applied(setting.given, values) if at == setting.slot else values for at, values in enumerate(plain)]
        if setting.skip is not None:
            expected[setting.slot] = expected[setting.slot] + applied(setting.skip, setting.feeds["x"])
        for got, wanted in zip(found, expected, strict=True):
            close(got, wanted)
        assert_terms(transfer)


def check_forward(setting):
    lacking = setting.read(setting.slot)
    for transfer in setting.answers("forward"):
        changes = {slot: new.array() for slot, new in transfer.constants.items()}
        others = {slot: applied(given, setting.read(slot)) for slot, given in transfer.required}
        found = setting.outputs(changes, others, transfer.attributes)
        plain = setting.outputs({}, {setting.slot: applied(setting.given, lacking)}, {})
        behind = dict(transfer.passed_on)
        for at, (got, wanted) in enumerate(zip(found, plain, strict=True)):
            close(applied(behind[at], got) if at in behind else got, wanted)
        assert_terms(transfer)


def assert_terms(transfer):
    """The sizes of terms bound what they sum to."""
    for _, given in transfer.passed_on:
        assert given.scale.shape == given.shift.shape == given.abs_terms.shape
        assert (given.abs_terms >= np.abs(given.shift) * (1 - 1e-12)).all()
    for constant in transfer.constants.values():
        sizes = constant.magnitude()
        assert (sizes >= np.abs(constant.array()) * (1 - 1e-3)).all()


BACKWARD = {
    "Conv": case("Conv(x, w, b)", A4, w=W, b=normal(4)),
    "Conv without a bias": case("Conv(x, w)", A4, w=W),
    "Conv, one number": case("Conv(x, w)", PER_ELEMENT, w=W),
    "Conv, axis from the end": case("Conv(x, w)", affine(4, -3), w=W),
    "Conv, scale": case("Conv(x, w, b)", A4S, w=W, b=normal(4)),
    "Conv, shift": case("Conv(x, w)", A4T, w=W),
    "Conv of groups": case("Conv <group = 2, strides = [2,1], dilations = [1,2], pads = [1,0,1,0]> (x, w)", A4, w=normal(4, 2, 3, 2)),
    "ConvTranspose": case("ConvTranspose(x, w, b)", affine(3, 1), w=TRANSPOSED, b=normal(3)),
    "ConvTranspose of groups": case(GROUPED, affine(6, 1), w=TRANSPOSED, b=normal(6)),
    "Gemm": case("Gemm(x, w, c)", affine(3, 1), x=(2, 5), w=normal(5, 3), c=normal(3)),
    "Gemm, transB, alpha, beta": case(
        "Gemm <transB = 1, alpha = -0.5, beta = 2.0> (x, w, c)", affine(3, 1), x=(2, 5), w=normal(3, 5), c=normal(2, 3)
    ),
    "Gemm, one bias": case("Gemm(x, w, c)", affine(3, -1), x=(2, 5), w=normal(5, 3), c=normal(1)),
    "Gemm, a number": case("Gemm(x, w, c)", affine(3, 1), x=(2, 5), w=normal(5, 3), c=np.float32(2)),
    "Gemm, transA, no bias": case("Gemm <transA = 1> (x, w)", affine(3, 1), x=(5, 2), w=normal(5, 3)),
    "Gemm, beta 0": case("Gemm <beta = 0.0> (x, w, c)", affine(3, 1), x=(2, 5), w=normal(5, 3), c=normal(3)),
    "MatMul": case("MatMul(x, w)", affine(3, 2, shift=False), x=(2, 4, 5), w=normal(5, 3)),
    "MatMul, another axis": case("MatMul(x, w)", affine(4, 1, shift=False), x=(2, 4, 5), w=normal(5, 3)),
    "MatMul, one number": case("MatMul(x, w)", affine(1, None, shift=False), x=(2, 4, 5), w=normal(5, 3)),
    "MatMul of a stack": case("MatMul(x, w)", affine(3, -1, shift=False), x=(2, 4, 5), w=normal(2, 5, 3)),
    "MatMul, unknown rank": case("MatMul(x, w)", affine(3, -1, shift=False), x=(2, 4, 5), w=normal(5, 3), unknown=True),
    "MatMul from the left": case("MatMul(w, x)", affine(3, 1, shift=False), x=(2, 5, 4), w=normal(3, 5)),
    "MatMul from the left, other axes": case("MatMul(w, x)", affine(4, 2, shift=False), x=(2, 5, 4), w=normal(3, 5)),
    "MatMul of a vector": case("MatMul(w, x)", affine(3, 0, shift=False), x=(5,), w=normal(3, 5)),
    "BatchNormalization": case(BN, A4, **norm(4)),
    "BatchNormalization, one number": case(BN, PER_ELEMENT, **norm(4)),
    "Add": case("Add(x, k)", A4, k=K),
    "Add from the left": case("Add(k, x)", affine(4, -3), k=K),
    "Add, shift": case("Add(x, k)", A4T, k=K),
    "Add of a number": case("Add(x, k)", PER_ELEMENT, k=np.float32(3)),
    "Add of unknown rank": case("Add(x, k)", affine(4, -3), k=K, unknown=True),
    "Sub": case("Sub(x, k)", A4, k=K),
    "Sub from a constant": case("Sub(k, x)", A4, k=K),
    "Mul": case("Mul(x, k)", A4S, k=K),
    "Mul from the left": case("Mul(k, x)", A4S, k=K),
    "Div": case("Div(x, k)", A4S, k=K),
    "Div of a constant": case("Div(k, x)", A4S, k=K),
    "Add of two": case("Add(x, z)", A4, z=(2, 4, 6, 6)),
    "Add of two, scale": case("Add(x, z)", A4S, z=(2, 4, 1, 6)),
    "Add of two, shift": case("Add(x, z)", A4T, z=(4, 1, 1)),
    "Sub of two": case("Sub(x, z)", A4, z=(4, 6, 6)),
    "Sum of two": case("Sum(x, z)", A4, z=(4, 1, 6)),
    "Mul of two": case("Mul(x, z)", A4S, z=(4, 6, 6)),
    "Mul, only one has the channels": case("Mul(x, z)", A4S, z=(2, 1, 6, 6)),
    "Mul of two, one of them one number": case("Mul(x, z)", A4S, z=(1,)),
    "Mul of two, the first one number": case("Mul(z, x)", affine(4, -3, shift=False), z=(1, 1)),
    "Div of two": case("Div(x, z)", A4S, z=(4, 6, 6)),
    "Div of two, the divisor one number": case("Div(x, z)", A4S, z=(1,)),
    "Neg": case("Neg(x)", A4),
    "Relu": case("Relu(x)", affine(4, 1, shift=False, positive=True)),
    "LeakyRelu": case("LeakyRelu(x)", affine(4, 1, shift=False, positive=True)),
    "PRelu": case("PRelu(x, k)", affine(4, 1, shift=False, positive=True), k=K),
    "Identity": case("Identity(x)", A4),
    "Dropout": case("Dropout(x)", A4),
    "Cast": case("Cast <to = 1> (x)", A4),
    "Transpose": case("Transpose <perm = [1,2,3,0]> (x)", affine(6, 1)),
    "Transpose, all": case("Transpose(x)", affine(4, 2)),
    "Transpose, one number": case("Transpose(x)", PER_ELEMENT, unknown=True),
    "Reshape": case("Reshape(x, k)", affine(4, 1), k=ints(2, 4, -1)),
    "Reshape splits what is behind": case("Reshape(x, k)", affine(4, 1), k=ints(2, 4, 2, 3, 6)),
    "Reshape of channels into one axis": case("Reshape(x, k)", affine(4, 1), x=(2, 12), k=ints(2, 4, 3)),
    "Reshape, a channel for two": case("Reshape(x, k)", affine(2, 1), k=ints(2, 2, 72)),
    "Reshape, one channel": case("Reshape(x, k)", affine(1, 1), k=ints(4, 1, 72)),
    "Flatten": case("Flatten(x)", affine(144, 1), x=(2, 144)),
    "Squeeze": case("Squeeze(x, k)", affine(4, 1), x=(2, 4, 1, 6), k=ints(2)),
    "Unsqueeze": case("Unsqueeze(x, k)", affine(4, 1), x=(2, 4, 6), k=ints(2)),
    "Concat": case("Concat <axis = 1> (x, z)", affine(7, 1), z=(2, 3, 6, 6)),
    "Concat from the end": case("Concat <axis = -3> (z, x)", affine(7, 1), z=(2, 3, 6, 6)),
    "Concat, another axis": case("Concat <axis = 2> (x, z)", A4, z=(2, 4, 3, 6)),
    "Concat, one number": case("Concat <axis = 1> (x, z)", PER_ELEMENT, z=(2, 3, 6, 6)),
    "Split": case("Split <axis = 1> (x, k)", affine(3, 1), k=ints(1, 3), slot=1, outputs="y, u"),
    "Split, the first": case("Split <axis = -3> (x, k)", affine(1, 1), k=ints(1, 3), outputs="y, u"),
    "DepthToSpace": case("DepthToSpace <blocksize = 2> (x)", affine(2, 1), x=(2, 8, 3, 3)),
    "DepthToSpace, CRD": case('DepthToSpace <blocksize = 2, mode = "CRD"> (x)', affine(2, 1), x=(2, 8, 3, 3)),
    "Expand": case("Expand(x, k)", affine(4, 1), x=(4, 1, 6), k=ints(2, 4, 5, 6)),
    "Slice": case("Slice(x, k, l, a)", affine(2, 1), k=ints(1), l=ints(3), a=ints(1)),
    "Slice backwards": case("Slice(x, k, l, a, p)", affine(2, 1), k=ints(-1), l=ints(-(2**62)), a=ints(-3), p=ints(-2)),
    "Slice without axes": case("Slice(x, k, l)", affine(3, 1), k=ints(0, 1), l=ints(2, 9)),
    "Slice of the space": case("Slice(x, k, l, a)", A4, k=ints(1), l=ints(3), a=ints(2)),
    "Slice, attributes": case("Slice <starts = [0,1], ends = [2,3]> (x)", affine(2, 1), opset=9),
    "Gather": case("Gather <axis = 1> (x, k)", affine(3, 1), k=ints(3, 0, -2)),
    "Gather by a matrix, behind": case("Gather <axis = 2> (x, k)", A4, k=ints(3, 3, 0, 1).reshape(2, 2)),
    "Gather by a matrix, before": case("Gather <axis = 0> (x, k)", affine(4, 2), k=ints(1, 1, 0, 1).reshape(2, 2)),
    "Gather of one row": case("Gather <axis = 0> (x, k)", affine(4, 0), k=np.int64(1)),
    "Pad": case('Pad <mode = "edge"> (x, k)', A4, k=ints(0, 0, 1, 2, 0, 0, 0, 1)),
    "Pad with zeros": case("Pad(x, k)", A4S, k=ints(1, 0, 1, 2, 0, 0, 0, 1)),
    "Pad with a zero": case("Pad(x, k, o)", A4S, k=ints(0, 0, 1, 2, 0, 0, 0, 1), o=np.float32([0])),
    "Pad of nothing": case("Pad(x, k, o)", A4, k=ints(*[0] * 8), o=np.float32(3)),
    "Pad of listed axes": case('Pad <mode = "reflect"> (x, k, , a)', A4, k=ints(1, 2, 0, 1), a=ints(-1, 2), opset=18),
    "Pad, attributes": case("Pad <pads = [0,0,1,0,0,0,0,1]> (x)", A4S, opset=9),
    "AveragePool": case("AveragePool <kernel_shape = [3,3], pads = [1,1,1,1]> (x)", A4),
    "AveragePool, batch": case("AveragePool <kernel_shape = [2,2]> (x)", affine(2, 0)),
    "AveragePool counts zeros": case("AveragePool <kernel_shape = [3,3], pads = [1,1,1,1], count_include_pad = 1> (x)", A4S),
    "AveragePool counts none": case("AveragePool <kernel_shape = [3,3], count_include_pad = 1> (x)", A4),
    "GlobalAveragePool": case("GlobalAveragePool(x)", A4),
    "MaxPool": case("MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (x)", A4P),
    "MaxPool, windows that reach the data": case("MaxPool <kernel_shape = [2,2], dilations = [2,2], pads = [1,1,1,1]> (x)", A4P),
    "MaxPool, windows as long as the data": case(
        "MaxPool <kernel_shape = [2,2], dilations = [2,2], pads = [1,1,1,1]> (x)", A4P, x=(2, 4, 2, 2)
    ),
    "MaxPool, long windows without padding": case("MaxPool <kernel_shape = [1,1], dilations = [9,9]> (x)", A4P),
    "MaxPool, scale of zero": case("MaxPool <kernel_shape = [2,2]> (x)", Affine(np.array([0.0, 2, 3, 4]), np.ones(4), 1)),
    "GlobalMaxPool": case("GlobalMaxPool(x)", A4P),
    "ReduceMean": case("ReduceMean <axes = [2]> (x)", A4),
    "ReduceMean, an axis before the channels": case("ReduceMean <axes = [0]> (x)", A4),
    "ReduceMean, axes taken out": case("ReduceMean <axes = [0, -1], keepdims = 0> (x)", affine(4, 0)),
    "ReduceSum": case("ReduceSum(x, k)", A4S, k=ints(-1)),
    "ReduceMax": case("ReduceMax <axes = [3], keepdims = 0> (x)", A4P),
    "ReduceMin": case("ReduceMin <axes = [3]> (x)", A4P),
    "ReduceMin, one number": case("ReduceMin(x)", affine(1, None, positive=True)),
    "ReduceL1": case("ReduceL1 <axes = [3]> (x)", affine(4, 1, positive=True, shift=False)),
    "ReduceL2": case("ReduceL2 <axes = [3]> (x)", affine(4, 1, positive=True, shift=False)),
    "Resize": case("Resize(x, , k)", A4, k=np.float32([1, 1, 2, 2])),
    "Resize, linear": case('Resize <mode = "linear"> (x, , k)', A4, k=np.float32([1, 1, 2, 1.5])),
    "Resize to sizes": case("Resize(x, , , k)", A4, k=ints(2, 4, 9, 9)),
    "Resize of listed axes": case("Resize <axes = [2, -1]> (x, , k)", A4, k=HALVES, opset=18),
    "Upsample": case("Upsample(x, k)", A4, k=np.float32([1, 1, 2, 2]), opset=9),
    "Upsample, attribute": case("Upsample <scales = [1.0, 1.0, 2.0, 2.0]> (x)", A4, opset=7),
    "Upsample of unknown sizes, attribute": case("Upsample <scales = [1.0, 1.0, 2.0, 2.0]> (x)", A4, x=(-2, -4, 6, 6), opset=7),
    "Resize of unknown sizes": case("Resize(x, , k)", A4, k=np.float32([1, 1, 2, 2]), x=(-2, -4, 6, 6)),
}

LAYER = {"s": normal(6, seed=5), "t": normal(6, seed=6)}
R4 = affine(4, 1, shift=False, positive=True)
TILED = Affine(np.tile([2.0, 3], 2), np.tile([1.0, 5], 2), 1)
BACKWARD |= {
    "Conv adds its data": case("Conv <pads = [1,1,1,1]> (x, w)", A4, skip=R4, w=W),
    "Conv of groups adds its data": case("Conv <pads = [1,1,1,1], group = 2> (x, w, b)", A4T, skip=R4, w=normal(4, 2, 3, 3), b=normal(4)),
    "Conv off its center adds its data": case("Conv <pads = [2,0,0,2], dilations = [1,1]> (x, w)", A4S, skip=R4, w=W),
    "Conv of spread taps adds its data": case("Conv <pads = [2,1,2,1], dilations = [2,1]> (x, w)", A4S, skip=R4, w=W),
    "Add of two that adds its data": case("Add(z, x)", A4, z=(2, 4, 6, 6), skip=R4),
    "Sub of two that adds its data": case("Sub(z, x)", A4, z=(2, 4, 6, 6), skip=R4),
    "Add of data with themselves that adds them": case("Add(z, x)", A4, z=(2, 4, 6, 6), skip=R4),
    "Add of two that adds its data, shift": case("Add(z, x)", A4T, z=(2, 4, 6, 6), skip=R4),
    "DeformConv": case("DeformConv(x, w, z, b)", A4, opset=19, z=(2, 18, 4, 4), w=W, b=normal(4)),
    "DeformConv without a bias": case("DeformConv <group = 2> (x, w, z)", A4, opset=19, z=(2, 18, 4, 4), w=normal(4, 2, 3, 3)),
    "Gemm of a constant, rows": case("Gemm(w, x, c)", affine(3, 0), x=(5, 2), w=normal(3, 5), c=normal(3, 1)),
    "Gemm of a constant, rows, no bias": case("Gemm <transA = 1> (w, x)", affine(3, 0), x=(5, 2), w=normal(5, 3)),
    "Gemm of a constant, columns": case("Gemm <beta = 2.0> (w, x, c)", affine(2, 1), x=(5, 2), w=normal(3, 5), c=normal(2)),
    "Gemm of a constant, columns of transB": case("Gemm <transB = 1> (w, x)", affine(2, 1), x=(2, 5), w=normal(3, 5)),
    "Gemm of a constant, one number": case("Gemm <alpha = 0.5> (w, x, c)", PER_ELEMENT, x=(5, 2), w=normal(3, 5), c=normal(3, 2)),
    "InstanceNormalization": case("InstanceNormalization(x, s, t)", A4, s=normal(4), t=normal(4, seed=5)),
    "GroupNormalization": case("GroupNormalization <num_groups = 2> (x, s, t)", A4, opset=21, s=normal(4), t=normal(4, seed=5)),
    "LayerNormalization": case("LayerNormalization(x, s, t)", affine(6, 3), **LAYER),
    "LayerNormalization from the end, no bias": case("LayerNormalization(x, s)", affine(6, -1), s=LAYER["s"], unknown=True),
    "LayerNormalization of more axes": case("LayerNormalization <axis = 1> (x, s, t)", A4, s=normal(4, 6, 6), t=normal(4, 6, 6, seed=5)),
    "LayerNormalization, scale": case("LayerNormalization(x, s)", affine(6, 3, shift=False), s=LAYER["s"]),
    "LayerNormalization, one number": case("LayerNormalization(x, s, t)", PER_ELEMENT, **LAYER),
    "RMSNormalization": case("RMSNormalization(x, s)", affine(6, 3, shift=False), opset=23, s=LAYER["s"]),
    "MatMul by a vector, one number": case("MatMul(x, w)", affine(1, None, shift=False), x=(2, 4, 5), w=normal(5)),
    "Add of two, one number": case("Add(x, z)", PER_ELEMENT, z=(4, 6, 6)),
    "Mul of two, one number": case("Mul(x, z)", affine(1, None, shift=False), z=(4, 6, 6)),
    "Max": case("Max(x, z)", A4P, z=(4, 6, 6)),
    "Min": case("Min(x, z)", A4P, z=(2, 4, 6, 6)),
    "Mean": case("Mean(x, z)", A4, z=(2, 4, 6, 6)),
    "Where": case("Where(q, x, z)", A4, z=(2, 4, 6, 6), before="q = Greater(x, z)"),
    "Abs": case("Abs(x)", affine(4, 1, shift=False, positive=True)),
    "Tile": case("Tile(x, k)", TILED, x=(2, 2, 3), k=ints(1, 2, 1)),
    "Tile of another axis": case("Tile(x, k)", A4, k=ints(2, 1, 3, 1)),
    "ReverseSequence": case("ReverseSequence(x, k)", affine(4, 2), x=(3, 2, 4), k=ints(1, 3)),
    "LpPool": case("LpPool <kernel_shape = [2,2]> (x)", affine(4, 1, shift=False, positive=True)),
    "GlobalLpPool": case("GlobalLpPool(x)", affine(4, 1, shift=False, positive=True)),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name):
    check_backward(BACKWARD[name]())


FORWARD = {
    "Conv": case("Conv(x, w, b)", A4, w=W, b=normal(4)),
    "Conv, one number": case("Conv(x, w)", PER_ELEMENT, w=W),
    "Conv of groups": case("Conv <group = 2, strides = [2,1], dilations = [1,2]> (x, w)", A4, w=normal(6, 2, 3, 2)),
    "Conv pads, scale": case("Conv <pads = [1,1,1,1]> (x, w)", A4S, w=W),
    "Conv, zeros of pads": case("Conv <pads = [0,0,0,0]> (x, w)", A4, w=W),
    "Conv, VALID": case('Conv <auto_pad = "VALID"> (x, w)', A4, w=W),
    "Conv, SAME of ones": case('Conv <auto_pad = "SAME_UPPER"> (x, w)', A4, w=normal(3, 4, 1, 1)),
    "ConvTranspose, scale": case("ConvTranspose(x, w, b)", A4S, w=TRANSPOSED, b=normal(3)),
    "ConvTranspose, scale of groups": case(GROUPED, A4S, w=TRANSPOSED, b=normal(6)),
    "ConvTranspose, whole kernels": case("ConvTranspose <pads = [1,1,1,1]> (x, w, b)", A4, w=TRANSPOSED, b=normal(3)),
    "ConvTranspose, whole kernels of groups": case("ConvTranspose <group = 2, pads = [1,2,3,1]> (x, w)", A4, w=TRANSPOSED),
    "ConvTranspose, whole spread kernels": case("ConvTranspose <dilations = [2,1], pads = [2,1,2,1]> (x, w)", A4, w=TRANSPOSED),
    "Gemm": case("Gemm(x, w, c)", affine(5, 1), x=(2, 5), w=normal(5, 3), c=normal(3)),
    "Gemm, transA": case("Gemm <transA = 1> (x, w, c)", affine(5, 0), x=(5, 2), w=normal(5, 3), c=normal(3)),
    "Gemm, transB, alpha, beta": case(
        "Gemm <transB = 1, alpha = -0.5, beta = 2.0> (x, w, c)", affine(5, 1), x=(2, 5), w=normal(3, 5), c=normal(2, 3)
    ),
    "Gemm, scale": case("Gemm <beta = 3.0> (x, w, c)", affine(5, -1, shift=False), x=(2, 5), w=normal(5, 3), c=normal(3)),
    "MatMul": case("MatMul(x, w)", affine(5, 2), x=(2, 4, 5), w=normal(5, 3)),
    "MatMul, one number": case("MatMul(x, w)", PER_ELEMENT, x=(2, 4, 5), w=normal(5, 3)),
    "MatMul, another axis": case("MatMul(x, w)", affine(4, 1, shift=False), x=(2, 4, 5), w=normal(5, 3)),
    "MatMul by a vector": case("MatMul(x, w)", affine(5, 2, shift=False), x=(2, 4, 5), w=normal(5)),
    "MatMul by a vector, another axis": case("MatMul(x, w)", affine(4, 1, shift=False), x=(2, 4, 5), w=normal(5)),
    "MatMul of a stack": case("MatMul(x, w)", affine(5, -1, shift=False), x=(2, 4, 5), w=normal(2, 5, 3)),
    "MatMul, unknown rank": case("MatMul(x, w)", affine(5, -1), x=(2, 4, 5), w=normal(5, 3), unknown=True),
    "MatMul from the left": case("MatMul(w, x)", affine(5, 1), x=(2, 5, 4), w=normal(3, 5), slot=1),
    "MatMul from the left, other axes": case("MatMul(w, x)", affine(4, 2, shift=False), x=(2, 5, 4), w=normal(3, 5), slot=1),
    "MatMul of a vector": case("MatMul(w, x)", affine(5, 0), x=(5,), w=normal(3, 5), slot=1),
    "BatchNormalization": case(BN, A4, **norm(4)),
    "LSTM": case(
        "LSTM <hidden_size = 2> (x, w, r, b)",
        affine(5, 2),
        x=(3, 2, 5),
        w=normal(1, 8, 5),
        r=normal(1, 8, 2),
        b=normal(1, 16),
    ),
    "GRU both ways": case(
        'GRU <hidden_size = 2, direction = "bidirectional"> (x, w, r)', affine(5, 2), x=(3, 2, 5), w=normal(2, 6, 5), r=normal(2, 6, 2)
    ),
    "RNN, scale": case("RNN <hidden_size = 2> (x, w, r)", affine(5, 2, shift=False), x=(3, 2, 5), w=normal(1, 2, 5), r=normal(1, 2, 2)),
    "Add": case("Add(x, k)", A4, k=K),
    "Add from the left": case("Add(k, x)", affine(4, -3), k=K, slot=1),
    "Add, shift": case("Add(x, k)", A4T, k=K),
    "Sub": case("Sub(x, k)", A4, k=K),
    "Sub, shift": case("Sub(x, k)", A4T, k=K),
    "Sub from a constant": case("Sub(k, x)", A4, k=K, slot=1),
    "Sub from a constant, shift": case("Sub(k, x)", A4T, k=K, slot=1),
    "Mul": case("Mul(x, k)", A4, k=K),
    "Mul, shift": case("Mul(x, k)", A4T, k=K),
    "Mul by a number": case("Mul(x, k)", PER_ELEMENT, k=np.float32(3)),
    "Mul from the left": case("Mul(k, x)", A4, k=K, slot=1),
    "Div": case("Div(x, k)", A4, k=K),
    "Add of two, shift": case("Add(x, z)", A4T, z=(2, 4, 6, 6)),
    "Add of a narrow one, shift": case("Add(z, x)", affine(4, 0, scale=False), x=(4, 6, 6), z=(2, 4, 6, 6), slot=1),
    "Sub of two, shift": case("Sub(x, z)", A4T, z=(2, 4, 6, 6)),
    "Sub of two, shift of the second": case("Sub(z, x)", A4T, z=(2, 4, 6, 6), slot=1),
    "Add of two, rearranged": case("Add(x, z)", A4, z=(4, 1, 6), strategy="rearrange"),
    "Sub of two, rearranged": case("Sub(z, x)", A4, z=(2, 4, 6, 6), slot=1, strategy="rearrange"),
    "Mul of two": case("Mul(x, z)", A4S, z=(4, 1, 6)),
    "Mul of two, second": case("Mul(z, x)", A4S, z=(4, 1, 6), slot=1),
    "Div of two": case("Div(x, z)", A4S, z=(4, 1, 6)),
    "Neg": case("Neg(x)", A4),
    "Relu": case("Relu(x)", affine(4, 1, shift=False, positive=True)),
    "Transpose": case("Transpose <perm = [1,2,3,0]> (x)", A4),
    "Transpose, all": case("Transpose(x)", A4),
    "Reshape": case("Reshape(x, k)", A4, k=ints(2, 4, -1)),
    "Reshape into one axis": case("Reshape(x, k)", A4, k=ints(2, -1)),
    "Reshape, one channel": case("Reshape(x, k)", affine(1, 1), x=(2, 1, 6, 6), k=ints(9, 8)),
    "Reshape of a number": case("Reshape(x, k)", PER_ELEMENT, k=ints(9, -1)),
    "Flatten": case("Flatten(x)", A4),
    "Squeeze": case("Squeeze(x, k)", A4, x=(2, 4, 1, 6), k=ints(2)),
    "Concat": case("Concat <axis = 1> (x, z)", A4, z=(2, 3, 6, 6)),
    "Concat, the second": case("Concat <axis = -3> (z, x)", A4, z=(2, 3, 6, 6), slot=1),
    "Concat, one number": case("Concat <axis = 1> (x, z)", PER_ELEMENT, z=(2, 3, 6, 6)),
    "Split": case("Split <axis = 1> (x, k)", A4, k=ints(1, 3), outputs="y, u"),
    "Split, another axis": case("Split <axis = 2> (x, k)", A4, k=ints(2, 4), outputs="y, u"),
    "DepthToSpace": case("DepthToSpace <blocksize = 2> (x)", Affine(np.tile([2.0, 3], 4), np.tile([1.0, 5], 4), 1), x=(2, 8, 3, 3)),
    "DepthToSpace, CRD": case(
        'DepthToSpace <blocksize = 2, mode = "CRD"> (x)', Affine(np.repeat([2.0, 3], 4), np.repeat([1.0, 5], 4), 1), x=(2, 8, 3, 3)
    ),
    "Expand": case("Expand(x, k)", affine(4, 0), x=(4, 1, 6), k=ints(2, 4, 5, 6)),
    "Slice": case("Slice(x, k, l, a)", A4, k=ints(1), l=ints(3), a=ints(1)),
    "Gather": case("Gather <axis = 1> (x, k)", A4, k=ints(3, 0, -2, 3)),
    "Gather of one": case("Gather <axis = 1> (x, k)", A4, k=np.int64(2)),
    "Gather by a matrix, behind": case("Gather <axis = 2> (x, k)", A4, k=ints(3, 3, 0, 1).reshape(2, 2)),
    "Gather by a matrix, before": case("Gather <axis = 0> (x, k)", A4, k=ints(1, 1, 0, 1).reshape(2, 2)),
    "Pad": case('Pad <mode = "edge"> (x, k)', A4, k=ints(0, 0, 1, 2, 0, 0, 0, 1)),
    "AveragePool": case("AveragePool <kernel_shape = [3,3], pads = [1,1,1,1]> (x)", A4),
    "MaxPool": case("MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (x)", A4P),
    "ReduceMean": case("ReduceMean <axes = [0, -1], keepdims = 0> (x)", A4),
    "ReduceMean, an axis before the channels": case("ReduceMean <axes = [0]> (x)", A4),
    "ReduceMin": case("ReduceMin <axes = [3]> (x)", A4P),
    "Resize": case("Resize(x, , k)", A4, k=np.float32([1, 1, 2, 2])),
}

FORWARD |= {
    "DeformConv, scale": case("DeformConv <group = 2> (x, w, z)", A4S, opset=19, z=(2, 18, 4, 4), w=normal(4, 2, 3, 3)),
    "Gemm of a constant, rows of B": case("Gemm(w, x, c)", affine(5, 0), x=(5, 2), w=normal(3, 5), c=normal(3, 1), slot=1),
    "Gemm of a constant, rows of B, alpha": case(
        "Gemm <transA = 1, transB = 1, alpha = -2.0> (w, x)", affine(5, 1), x=(2, 5), w=normal(5, 3), slot=1
    ),
    "Gemm of a constant, one number": case("Gemm(w, x)", PER_ELEMENT, x=(5, 2), w=normal(3, 5), slot=1),
    "Gemm of a constant, columns of B": case(
        "Gemm <beta = 3.0> (w, x, c)", affine(2, 1, shift=False), x=(5, 2), w=normal(3, 5), c=normal(2), slot=1
    ),
    "Gemm of a constant, columns of B, no bias": case("Gemm(w, x)", affine(2, 1, shift=False), x=(5, 2), w=normal(3, 5), slot=1),
    "Add, one scale is 1": case("Add(x, k)", Affine(np.array([1.0, 2, 3, 4]), np.ones(4), 1), k=K),
    "Mean, shift": case("Mean(x, z)", A4T, z=(2, 4, 6, 6)),
    "Abs": case("Abs(x)", affine(4, 1, shift=False, positive=True)),
    "Tile": case("Tile(x, k)", affine(2, 1), x=(2, 2, 3), k=ints(1, 2, 1)),
    "ReverseSequence": case("ReverseSequence(x, k)", affine(4, 2), x=(3, 2, 4), k=ints(1, 3)),
    "LpPool": case("LpPool <kernel_shape = [2,2]> (x)", affine(4, 1, shift=False, positive=True)),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name):
    check_forward(FORWARD[name]())


@pytest.mark.parametrize(("opset", "attributes"), [(6, {"broadcast": 1}), (7, {}), (17, {})])
@pytest.mark.parametrize("direction", ["backward", "forward"])
def test_a_new_bias_of_a_gemm_broadcasts(direction, opset, attributes):
    setting = case("Gemm(x, w, c)", affine(3, 1), x=(2, 3), w=normal(3, 3), c=normal(3), opset=opset)()
    assert setting.answers(direction)[0].attributes == attributes


NUMBERS = {
    "Slice": ("Slice(x, k, l, a)", {"k": ints(1), "l": ints(3), "a": ints(1)}),
    "Gather": ("Gather <axis = 1> (x, k)", {"k": ints(3, 0)}),
    "Pad": ('Pad <mode = "edge"> (x, k)', {"k": ints(0, 1, 1, 2, 0, 0, 0, 1)}),
    "Resize": ("Resize(x, , k)", {"k": np.float32([1, 2, 2, 2])}),
    "Expand": ("Expand(x, k)", {"k": ints(3, 1, 1, 1, 1)}),
    "DepthToSpace": ("DepthToSpace <blocksize = 2> (x)", {}),
    "Squeeze": ("Squeeze(x)", {}),
    "Transpose": ("Transpose <perm = [3,2,0,1]> (x)", {}),
    "ReduceMean": ("ReduceMean <axes = [1]> (x)", {}),
    "AveragePool": ("AveragePool <kernel_shape = [2,2]> (x)", {}),
    "GlobalAveragePool": ("GlobalAveragePool(x)", {}),
    "ConvTranspose": ("ConvTranspose <pads = [1,1,1,1]> (x, w)", {"w": TRANSPOSED}),
    "Neg": ("Neg(x)", {}),
}


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_one_number_for_every_element_passes_whatever_moves(name, unknown):
    node, constants = NUMBERS[name]
    hidden = unknown and name not in ("ReduceMean", "ConvTranspose", "Pad")
    setting = case(node, PER_ELEMENT, unknown=hidden, **constants)
    check_backward(setting())
    check_forward(setting())


# What a node says against its own part, which counts once everything else works out: its constant would grow.
GROWING = {
    "Add": ("backward", "Add(x, k)", A4),
    "Add, forward": ("forward", "Add(x, k)", A4),
    "Add of a shift": ("forward", "Add(x, k)", A4T),
    "Mul": ("backward", "Mul(x, k)", A4S),
    "Mul, forward": ("forward", "Mul(x, k)", A4S),
}


@pytest.mark.parametrize("name", GROWING)
def test_objects_to_growing(name):
    direction, node, affine = GROWING[name]
    (transfer,) = case(node, affine, k=LEFT[1])().answers(direction)
    assert transfer.objection is not None
    assert transfer.objection.code == "grows"
    assert "would grow from 6 to 24 values" in transfer.objection.sentence


def test_the_terms_of_a_bias_made_by_a_constant_matrix():
    """alpha * |A| times the terms of the shift: not more, not less."""
    given = affine(5, 1)
    (transfer,) = case("Gemm <transA = 1, transB = 1, alpha = -2.0> (w, x)", given, x=(2, 5), w=(matrix := normal(5, 3)), slot=1)().answers(
        "forward"
    )
    np.testing.assert_allclose(transfer.constants[2].magnitude().ravel(), 2 * np.abs(matrix.T) @ given.abs_terms, rtol=1e-6)


def test_the_terms_of_a_scale_added_to_the_center_of_a_kernel():
    setting = case("Conv <pads = [1,1,1,1]> (x, w)", A4, w=W)()
    added = _added_to_center(setting.node, A4, setting.view.weight(setting.node, 1))
    values, terms = W.astype(np.float64), np.abs(W).astype(np.float64)
    for channel in range(4):
        values[channel, channel, 1, 1] += A4.scale[channel]
        terms[channel, channel, 1, 1] += abs(A4.scale[channel])
    np.testing.assert_allclose(added.values, values, rtol=1e-12)
    np.testing.assert_allclose(added.abs_terms, terms, rtol=1e-12)


def test_one_number_for_all_elements_joins_numbers_of_channels_in_a_sum():
    setting, number = case("Add(x, z)", A4T, z=(2, 4, 6, 6))(), affine(1, None, scale=False)
    ((slot, behind),) = setting.row.join(setting.node, {0: A4T, 1: number}, setting.view).passed_on
    assert (slot, behind.axis, behind.scale.tolist()) == (0, 1, [1] * 4)
    np.testing.assert_array_equal(behind.shift, A4T.shift + number.shift)
