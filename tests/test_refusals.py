"""What rows refuse, with which code and in which words, asked without the planner around them."""

import numpy as np
import pytest
from rows import A4, A4P, A4S, A4T, BN, LEFT, TRANSPOSED, K, W, affine, assert_refused, case, ints
from sketch import norm, normal

from fastbn.graph.ops.affine import Affine


def refused(direction, code, part, *arguments, **options):
    """Return a setting, and what its row says."""
    return case(*arguments, **options), direction, code, part


REFUSED = {
    "Conv pads, shift": refused("forward", "padding", "pads its input with zeros", "Conv <pads = [0,1,0,0]> (x, w)", A4, w=W),
    "Conv, SAME": refused("forward", "padding", "zeros", 'Conv <auto_pad = "SAME_LOWER"> (x, w)', A4, w=normal(3, 4, 1, 3)),
    "Conv, another axis": refused("backward", "axis", "axis 2, the output channels of Conv 'y' axis 1", "Conv(x, w)", affine(6, 2), w=W),
    "Conv, another input axis": refused("forward", "axis", "axis 2, the input channels", "Conv(x, w)", affine(6, 2), w=W),
    "Conv, other channels": refused("backward", "axis", "5 channels meet the 4 output channels", "Conv(x, w)", affine(5, 1), w=W),
    "Conv, other input channels": refused("forward", "axis", "5 channels meet the 4 input channels", "Conv(x, w)", affine(5, 1), w=W),
    "Conv, one channel": refused("backward", "axis", "1 channels meet the 4", "Conv(x, w)", affine(1, 1), w=W),
    "Conv, its weight": refused("forward", "no-absorber", "it is the weight or the bias of Conv 'y'", "Conv(x, w)", A4, w=W, slot=1),
    "Conv, widened": refused("backward", "axis", "rank 5 widens the value at Conv 'y'", "Conv(x, w)", affine(4, 1, rank=5), w=W),
    "Conv, no such axis": refused("backward", "axis", "widens the value", "Conv(x, w)", affine(4, -5), w=W),
    "ConvTranspose, strides": refused(
        "forward", "padding", "sum parts of its kernel", "ConvTranspose <strides = [2,1], pads = [1,1,1,1]> (x, w)", A4, w=TRANSPOSED
    ),
    "ConvTranspose, a border": refused(
        "forward", "padding", "sum parts of its kernel", "ConvTranspose <pads = [1,1,1,0]> (x, w)", A4, w=TRANSPOSED
    ),
    "ConvTranspose, another border": refused(
        "forward", "padding", "sum parts of its kernel", "ConvTranspose <pads = [1,0,1,1]> (x, w)", A4, w=TRANSPOSED
    ),
    "ConvTranspose, more output": refused(
        "forward",
        "padding",
        "sum parts of its kernel",
        "ConvTranspose <pads = [1,1,1,1], output_padding = [0,1], strides = [1,2]> (x, w)",
        A4,
        w=TRANSPOSED,
    ),
    "ConvTranspose, output_shape": refused(
        "forward", "padding", "sum parts of its kernel", "ConvTranspose <output_shape = [5,5]> (x, w)", A4, w=TRANSPOSED
    ),
    "ConvTranspose, auto_pad": refused(
        "forward", "padding", "sum parts of its kernel", 'ConvTranspose <auto_pad = "VALID"> (x, w)', A4, w=TRANSPOSED
    ),
    "Gemm, rows": refused("backward", "axis", "axis 0, the output channels", "Gemm(x, w)", affine(2, 0), x=(2, 5), w=normal(5, 3)),
    "Gemm, input rows": refused("forward", "axis", "axis 0, the input channels", "Gemm(x, w)", affine(2, 0), x=(2, 5), w=normal(5, 3)),
    "Gemm, its matrix": refused(
        "forward", "no-absorber", "not the first operand of Gemm", "Gemm(x, w)", affine(5, 1), x=(2, 5), w=normal(5, 3), slot=1
    ),
    "Gemm, channels": refused("backward", "axis", "5 channels meet the 3 output", "Gemm(x, w)", affine(5, 1), x=(2, 5), w=normal(5, 3)),
    "Gemm, input channels": refused("forward", "axis", "3 channels meet the 5 input", "Gemm(x, w)", affine(3, 1), x=(2, 5), w=normal(5, 3)),
    "MatMul, shift": refused("backward", "shift-cannot-pass", "has no bias", "MatMul(x, w)", affine(3, 1), x=(2, 5), w=normal(5, 3)),
    "MatMul, shift elsewhere": refused(
        "backward", "shift-cannot-pass", "a shift along axis 1 cannot pass", "MatMul(x, w)", affine(4, 1), x=(2, 4, 5), w=normal(5, 3)
    ),
    "MatMul, shift elsewhere, forward": refused(
        "forward", "shift-cannot-pass", "a shift along axis 1 cannot pass", "MatMul(x, w)", affine(4, 1), x=(2, 4, 5), w=normal(5, 3)
    ),
    "MatMul of a stack, shift": refused(
        "forward", "shift-cannot-pass", "is no matrix", "MatMul(x, w)", affine(5, 2), x=(2, 4, 5), w=normal(2, 5, 3)
    ),
    "MatMul of a stack, elsewhere": refused(
        "forward", "axis", "mixes axis 1", "MatMul(x, w)", affine(4, 1, shift=False), x=(2, 4, 5), w=normal(2, 5, 3)
    ),
    "MatMul of a stack, elsewhere, backward": refused(
        "backward", "axis", "its channels are axis 1", "MatMul(x, w)", affine(4, 1, shift=False), x=(2, 4, 5), w=normal(2, 5, 3)
    ),
    "MatMul by a vector": refused(
        "backward", "axis", "is a vector: its output has no axis", "MatMul(x, w)", affine(4, 1, shift=False), x=(2, 4, 5), w=normal(5)
    ),
    "MatMul, its weight": refused(
        "forward", "no-absorber", "no constant operand", "MatMul(x, w)", affine(3, 1, shift=False), x=(2, 5), w=normal(5, 3), slot=1
    ),
    "MatMul, unknown rank": refused(
        "backward", "axis-unknown", "the rank of", "MatMul(x, w)", affine(3, 2, shift=False), x=(2, 4, 5), w=normal(5, 3), unknown=True
    ),
    "MatMul from the left, unknown rank": refused(
        "backward", "axis-unknown", "the rank of", "MatMul(w, x)", affine(3, -2, shift=False), x=(5, 4), w=normal(3, 5), unknown=True
    ),
    "MatMul, the first axis of an unknown rank": refused(
        "backward", "axis-unknown", "the rank of", "MatMul(x, w)", affine(2, 0, shift=False), x=(2, 4, 5), w=normal(5, 3), unknown=True
    ),
    "MatMul, widened": refused(
        "backward", "axis-unknown", "of rank 4 may widen", "MatMul(x, w)", affine(3, -1, shift=False, rank=4), x=(2, 5), w=normal(5, 3)
    ),
    "BatchNormalization, channels": refused("backward", "axis", "5 channels meet the 4 output channels", BN, affine(5, 1), **norm(4)),
    "BatchNormalization, input channels": refused("forward", "axis", "5 channels meet the 4 input channels", BN, affine(5, 1), **norm(4)),
    "BatchNormalization, axis": refused("backward", "axis", "its channels are axis 2, the output", BN, affine(6, 2), **norm(4)),
    "BatchNormalization, input axis": refused("forward", "axis", "its channels are axis 2, the input", BN, affine(6, 2), **norm(4)),
    "BatchNormalization, a parameter": refused("forward", "no-absorber", "which must stay as it is", BN, A4, slot=1, **norm(4)),
    "LSTM, its weight": refused(
        "forward",
        "no-absorber",
        "it is not the input sequence of LSTM",
        "LSTM <hidden_size = 2> (x, w, r)",
        affine(5, 2),
        x=(3, 2, 5),
        w=normal(1, 8, 5),
        r=normal(1, 8, 2),
        slot=1,
    ),
    "LSTM, batch": refused(
        "forward", "axis", "axis 1", "LSTM <hidden_size = 2> (x, w, r)", affine(2, 1), x=(3, 2, 5), w=normal(1, 8, 5), r=normal(1, 8, 2)
    ),
    "LSTM, channels": refused(
        "forward",
        "axis",
        "4 channels meet the 5 input channels",
        "LSTM <hidden_size = 2> (x, w, r)",
        affine(4, 2),
        x=(3, 2, 5),
        w=normal(1, 8, 5),
        r=normal(1, 8, 2),
    ),
    "Add, scale of zero": refused(
        "forward", "no-absorber", "a scale of zero cannot be taken out", "Add(x, k)", Affine(np.array([0.0, 2, 3, 4]), np.ones(4), 1), k=K
    ),
    "Mul, shift": refused("backward", "shift-cannot-pass", "has no constant to take the shift", "Mul(x, k)", A4, k=K),
    "Mul, shift of two axes": refused(
        "forward", "shift-cannot-pass", "the shift behind Mul 'y' is not one number per channel", "Mul(x, k)", A4T, k=LEFT[1]
    ),
    "Div, its divisor": refused("forward", "no-absorber", "it is the divisor of Div", "Div(k, x)", A4S, k=K, slot=1),
    "Div, scale of zero": refused(
        "backward", "no-absorber", "cannot go into the divisor", "Div(x, k)", Affine(np.array([0.0, 2, 3, 4]), np.zeros(4), 1), k=K
    ),
    "Add of unknown rank": refused("backward", "axis-unknown", "so axis 1 cannot be placed", "Add(x, k)", A4, k=K, unknown=True),
    "Add of unknown rank, widened": refused(
        "backward", "axis-unknown", "a constant of rank 4 may widen", "Add(x, k)", affine(4, -3, rank=4), k=K, unknown=True
    ),
    "Add, widened": refused("backward", "axis-unknown", "a constant of rank 5 may widen", "Add(x, k)", affine(4, -3, rank=5), k=K),
    "Add, no such axis": refused("backward", "axis", "widens the value", "Add(x, k)", affine(4, 4), k=K),
    "Add makes the channels": refused("backward", "axis", "by broadcasting a narrower value", "Add(x, k)", A4, x=(2, 1, 6, 6), k=K),
    "Add makes the channels, from the end": refused(
        "backward", "axis", "by broadcasting a narrower value", "Add(x, k)", affine(4, -3), x=(6, 6), k=K
    ),
    "Add makes axes": refused("backward", "axis", "by broadcasting a narrower value", "Add(x, k)", affine(6, 2), x=(6, 6), k=K),
    "Add, channels that do not fit": refused(
        "backward",
        "axis",
        "3 channels meet the constant of Add 'y', which has shape (4, 1, 1)",
        "Add(x, k)",
        affine(3, 1),
        x=(2, -4, 6, 6),
        k=K,
    ),
    "Add of two, unknown": refused("backward", "axis-unknown", "the shapes at Add 'y'", "Add(x, z)", A4, z=(4, 6, 6), unknown=True),
    "Add of two makes the channels": refused("backward", "axis", "makes the 4 channels by broadcasting", "Add(x, z)", A4, z=(2, 1, 6, 6)),
    "Add of two of unknown channels": refused("backward", "axis", "by broadcasting", "Add(x, z)", A4, z=(2, -4, 6, 6)),
    "Add of two without the axis": refused("backward", "axis", "makes the 4 channels by broadcasting", "Add(x, z)", A4, z=(6, 6)),
    "Add of two, forward": refused("forward", "other-branch", "does not have its scale", "Add(x, z)", A4, z=(2, 4, 6, 6)),
    "Add of two, scale of zero": refused(
        "forward",
        "other-branch",
        "does not have its scale",
        "Add(x, z)",
        Affine(np.array([0.0, 2, 3, 4]), np.ones(4), 1),
        z=(2, 4, 6, 6),
        strategy="rearrange",
    ),
    "Mul of two, shift": refused(
        "backward", "shift-cannot-pass", "a shift cannot pass Mul 'y' of two values", "Mul(x, z)", A4, z=(4, 6, 6)
    ),
    "Mul of two, shift, forward": refused("forward", "shift-cannot-pass", "a shift cannot pass", "Mul(x, z)", A4, z=(4, 6, 6)),
    "Div of two, its divisor": refused("forward", "no-absorber", "it is the divisor", "Div(z, x)", A4S, z=(2, 4, 6, 6), slot=1),
    "Div of two, a scale of zero and the divisor": refused(
        "backward", "axis", "by broadcasting", "Div(x, z)", Affine(np.array([0.0, 2, 3, 4]), np.zeros(4), 1), x=(2, 1, 6, 6), z=(2, 4, 6, 6)
    ),
    "Relu, negative": refused(
        "backward", "mixed-sign-through-relu", "lets only a positive scale pass; it is not positive in channels 1, 3", "Relu(x)", A4S
    ),
    "Relu, zero": refused(
        "backward", "mixed-sign-through-relu", "not positive in channels 0", "Relu(x)", Affine(np.array([0.0, 2, 3, 4]), np.zeros(4), 1)
    ),
    "Relu, shift": refused("backward", "shift-through-relu", "a shift cannot pass Relu", "Relu(x)", A4P),
    "Cast": refused("backward", "no-absorber", "may change the type of 'x'", "Cast <to = 7> (x)", A4),
    "Dropout": refused("backward", "training-dropout", "opset 6 without is_test=1", "Dropout(x)", A4, opset=6),
    "Dropout in training": refused("backward", "training-dropout", "drops at", "Dropout(x, r, k)", A4, r=np.float32(0.5), k=np.array(True)),
    "Transpose, unknown": refused("backward", "axis-unknown", "the rank of 'y' at Transpose", "Transpose(x)", affine(4, -3), unknown=True),
    "Transpose without a list, unknown": refused("backward", "axis-unknown", "is not known", "Transpose(x)", A4, unknown=True),
    "Reshape mixes": refused(
        "backward", "axis", "splits or mixes the channels of axis 1: 2x6x24", "Reshape(x, k)", affine(6, 1), k=ints(2, 6, 24)
    ),
    "Reshape of an unknown rank": refused(
        "forward", "axis-unknown", "not known well enough to place axis 1", "Reshape(x, k)", A4, k=ints(2, 4, -1), unknown=True
    ),
    "Reshape, channels": refused("forward", "axis", "3 channels meet axis 1 of Reshape", "Reshape(x, k)", affine(3, 1), k=ints(2, 4, -1)),
    "Concat, another axis": refused("forward", "other-branch", "along another axis", "Concat <axis = 2> (x, z)", A4, z=(2, 4, 6, 6)),
    "Concat, channels": refused(
        "backward", "axis", "6 channels meet the 7 of Concat", "Concat <axis = 1> (x, z)", affine(6, 1), z=(2, 3, 6, 6)
    ),
    "Concat, unknown": refused(
        "forward", "axis-unknown", "the sizes of the parts at Concat", "Concat <axis = 1> (x, z)", A4, z=(2, -3, 6, 6)
    ),
    "Concat, unknown rank": refused(
        "forward", "axis-unknown", "at Concat 'y' is not known", "Concat <axis = -3> (x, z)", A4, z=(2, 3, 6, 6), unknown=True
    ),
    "Split, another axis": refused(
        "backward", "graph-output", "is a graph output", "Split <axis = 2> (x, k)", A4, k=ints(2, 4), outputs="y, u"
    ),
    "Split, unknown": refused(
        "forward", "axis-unknown", "the sizes of the parts at Split", "Split <axis = 1> (x)", A4, x=(2, -4, 6, 6), outputs="y, u"
    ),
    "DepthToSpace, another axis": refused(
        "backward", "axis", "mixes the elements of axis 2", "DepthToSpace <blocksize = 2> (x)", affine(6, 2), x=(2, 8, 3, 3)
    ),
    "DepthToSpace, different scales": refused(
        "forward", "axis", "of different affines", "DepthToSpace <blocksize = 2> (x)", affine(8, 1, shift=False), x=(2, 8, 3, 3)
    ),
    "DepthToSpace, different shifts": refused(
        "forward", "axis", "of different affines", "DepthToSpace <blocksize = 2> (x)", affine(8, 1, scale=False), x=(2, 8, 3, 3)
    ),
    "Expand of the channels": refused(
        "backward", "axis", "makes the channels by repeating", "Expand(x, k)", affine(4, 1), x=(2, 1, 6), k=ints(2, 4, 6)
    ),
    "Expand makes axes": refused("backward", "axis", "makes the channels by repeating", "Expand(x, k)", affine(2, 0), x=(6,), k=ints(2, 6)),
    "Expand, unknown": refused("forward", "axis-unknown", "the ranks at Expand", "Expand(x, k)", A4, k=ints(2, 4, 6, 6), unknown=True),
    "Slice, channels": refused(
        "backward", "axis", "3 channels meet axis 1 of Slice", "Slice(x, k, l, a)", affine(3, 1), k=ints(1), l=ints(3), a=ints(1)
    ),
    "Slice of unknown size": refused(
        "backward", "axis-unknown", "before Slice", "Slice(x, k, l, a)", affine(2, 1), x=(2, -4, 6, 6), k=ints(1), l=ints(3), a=ints(1)
    ),
    "Gather gives twice": refused("backward", "axis", "one channel out twice", "Gather <axis = 1> (x, k)", affine(3, 1), k=ints(1, 0, 1)),
    "Gather by a matrix": refused(
        "forward", "axis", "spreads its channels over 2 axes", "Gather <axis = 1> (x, k)", A4, k=ints(3, 3, 0, 1).reshape(2, 2)
    ),
    "Gather, the last of them": refused(
        "backward", "axis", "spreads its channels", "Gather <axis = 1> (x, k)", affine(2, 2), k=ints(3, 3, 0, 1).reshape(2, 2)
    ),
    "Pad of the channels": refused("forward", "axis", "pads axis 1", 'Pad <mode = "edge"> (x, k)', A4, k=ints(0, 0, 0, 0, 0, 1, 0, 0)),
    "Pad with zeros, shift": refused("backward", "padding", "adds a constant", "Pad(x, k)", A4, k=ints(0, 0, 0, 0, 0, 0, 0, 1)),
    "Pad with ones": refused(
        "backward", "padding", "adds a constant", "Pad(x, k, o)", A4S, k=ints(0, 0, 1, 0, 0, 0, 0, 0), o=np.float32(1)
    ),
    "AveragePool counts zeros": refused(
        "backward", "padding", "counts zeros", "AveragePool <kernel_shape = [3,3], pads = [1,1,1,1], count_include_pad = 1> (x)", A4
    ),
    "AveragePool counts what ceil adds": refused(
        "backward", "padding", "counts zeros", "AveragePool <kernel_shape = [2,2], ceil_mode = 1, count_include_pad = 1> (x)", A4
    ),
    "AveragePool counts SAME": refused(
        "backward", "padding", "counts zeros", 'AveragePool <kernel_shape = [3,3], auto_pad = "SAME_LOWER", count_include_pad = 1> (x)', A4
    ),
    "AveragePool over the space": refused(
        "forward", "axis", "the elements of axis 2", "AveragePool <kernel_shape = [2,2]> (x)", affine(6, 2)
    ),
    "GlobalAveragePool over the space": refused("forward", "axis", "mixes the elements of axis 3", "GlobalAveragePool(x)", affine(6, 3)),
    "MaxPool, negative": refused(
        "backward",
        "mixed-sign-through-maxpool",
        "non-negative scale pass; it is negative in channels",
        "MaxPool <kernel_shape = [2,2]> (x)",
        A4,
    ),
    "MaxPool, windows in the padding": refused(
        "forward",
        "padding",
        "no element but",
        "MaxPool <kernel_shape = [2,2], dilations = [3,1], pads = [1,1,1,1]> (x)",
        A4P,
        x=(2, 4, 2, 6),
    ),
    "MaxPool, windows of unknown data": refused(
        "forward",
        "padding",
        "no element but",
        "MaxPool <kernel_shape = [2,2], dilations = [1,2], pads = [1,1,1,1]> (x)",
        A4P,
        x=(2, 4, 6, -6),
    ),
    "MaxPool, windows of an unknown rank": refused(
        "forward", "padding", "no element but", "MaxPool <kernel_shape = [2,2], dilations = [2,2], pads = [1,1,1,1]> (x)", A4P, unknown=True
    ),
    "ReduceMean of the channels": refused("forward", "axis", "reduces axis 1", "ReduceMean <axes = [-3]> (x)", A4),
    "ReduceMean takes the channels out": refused("forward", "axis", "reduces axis 1", "ReduceMean <axes = [1], keepdims = 0> (x)", A4),
    "ReduceMean of all": refused("forward", "axis", "or axes that are not known", "ReduceMean(x)", A4),
    "ReduceL1, shift": refused("forward", "shift-cannot-pass", "a shift cannot pass ReduceL1", "ReduceL1 <axes = [2]> (x)", A4P),
    "ReduceL2, negative": refused("forward", "mixed-sign-through-maxpool", "negative in channels 1, 3", "ReduceL2 <axes = [2]> (x)", A4S),
    "ReduceMin, negative": refused("forward", "mixed-sign-through-maxpool", "negative in channels 1, 3", "ReduceMin <axes = [2]> (x)", A4S),
    "ReduceMax, negative": refused(
        "backward", "mixed-sign-through-maxpool", "negative in channels 1, 3", "ReduceMax <axes = [2]> (x)", A4S
    ),
    "Resize of the channels": refused("backward", "axis", "resizes axis 1", "Resize(x, , k)", affine(8, 1), k=np.float32([1, 2, 1, 1])),
    "Resize of listed channels": refused(
        "backward", "axis", "resizes axis 1", "Resize <axes = [-3]> (x, , k)", affine(8, 1), k=np.float32([2]), opset=18
    ),
    "Resize, cubic": refused(
        "backward", "interpolation", "keep a shift", 'Resize <mode = "cubic"> (x, , k)', A4, k=np.float32([1, 1, 2, 2])
    ),
    "Upsample of the channels": refused(
        "backward", "axis", "resizes axis 1", "Upsample <scales = [1.0, 2.0, 2.0, 2.0]> (x)", affine(8, 1), opset=7
    ),
    "PRelu, its slope": refused("forward", "no-absorber", "it is input 1 of PRelu 'y', not the data", "PRelu(x, k)", A4P, k=K, slot=1),
    "Split, its list": refused(
        "forward", "no-absorber", "it is input 1 of Split", "Split <axis = 1> (x, k)", A4, k=ints(1, 3), slot=1, outputs="y, u"
    ),
    "Resize of axes from the end of an unknown rank": refused(
        "forward",
        "axis-unknown",
        "the rank of the value before Resize",
        "Resize <axes = [-1]> (x, , k)",
        A4,
        k=np.float32([2]),
        opset=18,
        unknown=True,
    ),
    "Slice by computed bounds": refused(
        "forward",
        "dynamic-index",
        "the bounds of Slice 'y' along axis 1 are no constants",
        "Slice(x, u, l, a)",
        A4,
        z=(1,),
        before="u = Cast <to = 7> (z)",
        l=ints(3),
        a=ints(1),
    ),
    "Gather by computed indices": refused(
        "forward", "dynamic-index", "are no constant list", "Gather <axis = 1> (x, u)", A4, z=(2,), before="u = Cast <to = 7> (z)"
    ),
    "Gather by indices of unknown rank": refused(
        "forward",
        "axis-unknown",
        "the rank of the indices of Gather 'y'",
        "Gather <axis = 1> (x, u)",
        A4,
        z=(2,),
        before="v = Cast <to = 7> (z) p = NonZero(z) q = Squeeze(p, o) u = Reshape(v, q)",
        o=ints(0),
    ),
    "Pad of axes from the end of an unknown rank": refused(
        "forward", "axis-unknown", "at Pad", 'Pad <mode = "edge"> (x, k, , a)', A4, k=ints(1, 2), a=ints(-1), opset=18, unknown=True
    ),
    "Pad by computed sizes": refused(
        "forward", "dynamic-index", "is no constant", 'Pad <mode = "edge"> (x, u)', A4, z=(8,), before="u = Cast <to = 7> (z)"
    ),
    "Pad of computed axes": refused(
        "forward",
        "dynamic-index",
        "is no constant",
        'Pad <mode = "edge"> (x, k, , u)',
        A4,
        z=(1,),
        before="u = Cast <to = 7> (z)",
        k=ints(1, 2),
        opset=18,
    ),
    "Pad with a computed number": refused(
        "forward", "padding", "adds a constant", "Pad(x, k, u)", A4S, z=(1,), before="u = Identity(z)", k=ints(0, 0, 0, 0, 0, 0, 0, 1)
    ),
    "Dropout of a computed mode": refused(
        "backward",
        "training-dropout",
        "is not a constant false",
        "Dropout(x, r, u)",
        A4,
        z=(1,),
        before="v = Cast <to = 9> (z) u = Squeeze(v)",
        r=np.float32(0.5),
    ),
    "ReduceMean of computed axes": refused(
        "forward", "axis", "axes that are not known", "ReduceMean(x, u)", A4, z=(1,), before="u = Cast <to = 7> (z)", opset=18
    ),
    "Conv that does not see each element": refused(
        "backward", "other-branch", "does not see each element of 'x'", "Conv(x, w)", A4, skip=A4S, w=W
    ),
    "Conv of steps": refused(
        "backward", "other-branch", "does not see each", "Conv <pads = [1,1,1,1], strides = [2,2]> (x, w)", A4, skip=A4S, w=W
    ),
    "Conv of other channels": refused(
        "backward", "other-branch", "does not see each", "Conv <pads = [1,1,1,1]> (x, w)", affine(5, 1), skip=A4S, w=normal(5, 4, 3, 3)
    ),
    "DeformConv, shift": refused(
        "forward", "padding", "may sample beyond the border", "DeformConv(x, w, z)", A4, opset=19, z=(2, 18, 4, 4), w=W
    ),
    "Gemm of a constant, shift of columns": refused(
        "forward", "shift-cannot-pass", "a shift along the columns of B", "Gemm(w, x)", affine(2, 1), x=(5, 2), w=normal(3, 5), slot=1
    ),
    "Gemm of a constant grows": refused(
        "backward", "grows", "would grow from 2 to 6", "Gemm(w, x, c)", affine(3, 0), x=(5, 2), w=normal(3, 5), c=normal(2)
    ),
    "Gemm of a constant, channels": refused(
        "backward", "axis", "4 channels meet the 3 output", "Gemm(w, x)", affine(4, 0), x=(5, 2), w=normal(3, 5)
    ),
    "LayerNormalization, another axis": refused("backward", "axis", "runs along", "LayerNormalization(x, s)", A4, s=normal(6)),
    "LayerNormalization of an unknown rank": refused(
        "backward", "axis-unknown", "is not known", "LayerNormalization(x, s)", affine(6, 3), s=normal(6), unknown=True
    ),
    "RMSNormalization, shift": refused(
        "backward", "shift-cannot-pass", "has no bias", "RMSNormalization(x, s)", affine(6, 3), opset=23, s=normal(6)
    ),
    "InstanceNormalization, axis": refused(
        "backward", "axis", "axis 2, the output", "InstanceNormalization(x, s, t)", affine(6, 2), s=normal(4), t=normal(4)
    ),
    "InstanceNormalization, channels": refused(
        "backward", "axis", "5 channels meet", "InstanceNormalization(x, s, t)", affine(5, 1), s=normal(4), t=normal(4)
    ),
    "Max, negative": refused("backward", "mixed-sign-through-maxpool", "negative in channels 1, 3", "Max(x, z)", A4, z=(2, 4, 6, 6)),
    "Min, negative": refused("backward", "mixed-sign-through-maxpool", "negative in channels 1, 3", "Min(x, z)", A4, z=(2, 4, 6, 6)),
    "Mean, scale": refused("forward", "other-branch", "does not have its scale", "Mean(x, z)", A4, z=(2, 4, 6, 6)),
    "Tile, other channels": refused(
        "backward", "axis", "which repeats it 2 times", "Tile(x, k)", affine(3, 1), x=(2, 2, 3), k=ints(1, 2, 1)
    ),
    "Tile, different scales": refused(
        "backward", "axis", "of different affines", "Tile(x, k)", affine(4, 1, shift=False, positive=True), x=(2, 2, 3), k=ints(1, 2, 1)
    ),
    "Tile, different shifts": refused("backward", "axis", "of different affines", "Tile(x, k)", A4T, x=(2, 2, 3), k=ints(1, 2, 1)),
    "Tile by a computed list": refused(
        "forward", "dynamic-index", "is no constant list", "Tile(x, u)", A4, z=(4,), before="u = Cast <to = 7> (z)"
    ),
    "ReverseSequence, time": refused(
        "forward", "axis", "the order of axis 0", "ReverseSequence(x, k)", affine(3, 0), x=(3, 2, 4), k=ints(1, 3)
    ),
    "ReverseSequence, batch": refused(
        "backward", "axis", "the order of axis 1", "ReverseSequence(x, k)", affine(2, 1), x=(3, 2, 4), k=ints(1, 3)
    ),
    "LpPool, shift": refused("backward", "shift-cannot-pass", "cannot pass LpPool", "LpPool <kernel_shape = [2,2]> (x)", A4P),
    "LpPool, negative": refused("backward", "mixed-sign-through-maxpool", "in channels 1, 3", "LpPool <kernel_shape = [2,2]> (x)", A4S),
    "LpPool over the space": refused("backward", "axis", "elements of axis 2", "GlobalLpPool(x)", affine(6, 2, shift=False, positive=True)),
    "MatMul, an axis that a matrix has not, of an unknown rank": refused(
        "backward", "axis", "widens the value", "MatMul(x, w)", affine(2, -3, shift=False), x=(2, 4, 5), w=normal(5, 3), unknown=True
    ),
    "Conv that adds its data along another axis": refused(
        "backward",
        "other-branch",
        "does not see",
        "Conv <pads = [1,1,1,1]> (x, w)",
        A4,
        x=(2, 4, 4, 4),
        skip=affine(4, 2, shift=False),
        w=W,
    ),
    "Abs, negative": refused("backward", "mixed-sign-through-relu", "not positive in channels 1, 3", "Abs(x)", A4S),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    assert_refused(*REFUSED[name])
